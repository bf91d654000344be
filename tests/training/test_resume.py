"""Resume equals uninterrupted, bit for bit, after kill -9; evaluating does not touch training."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from dprl.cli import main
from dprl.data import Episodes, save_dataset
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features
from dprl.spec import resolve
from dprl.training import RunFolder

PUSH = "metaworld/push-v3"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy for Push and a small random data set."""
    folder = tmp_path_factory.mktemp("inputs")
    DiffusionPolicy(Features(39, 4), DiffusionConfig(num_train_timesteps=6)).save_pretrained(folder / "policy")
    rng = np.random.default_rng(0)
    observations, actions = (rng.uniform(-1, 1, (90, n)).astype(np.float32) for n in (39, 4))
    no = np.zeros(3, np.bool_)
    data = Episodes(
        observations, actions, np.zeros(90, np.float32), observations[:3], np.array([30, 60, 90]), no, no,
        np.arange(3), PUSH,
    )  # fmt: skip
    save_dataset(data, folder / "data", resolve(PUSH))
    return folder


def command(kind: str, inputs: Path, out: Path) -> list[str]:
    """A run of six iterations; episodes of DPPO's cross the iterations' ends."""
    if kind == "pretrain":
        return ["pretrain", str(inputs / "data"), "--out", str(out), "--steps", "300", "--checkpoint-every", "1",
                "--bc.steps-per-iteration", "50", "--bc.batch-size", "16", "--quiet"]  # fmt: skip
    if kind == "offline":
        return ["offline", str(inputs / "data"), "--out", str(out), "--steps", "300", "--checkpoint-every", "1",
                "--idql.bc.steps-per-iteration", "50", "--idql.bc.batch-size", "16", "--idql.batch-size", "16",
                "--idql.critic.hidden-size", "8", "--quiet",
                "ln-resnet", "--policy.denoiser.hidden-size", "8"]  # fmt: skip
    if kind == "online":
        return ["finetune", str(inputs / "policy"), "--agent", "idql", "--env", PUSH, "--out", str(out),
                "--n-envs", "4",
                "--total-timesteps", "440", "--idql.n-steps", "5", "--idql.start-decisions", "30", "--idql.candidates",
                "3", "--idql.learner.critic.hidden-size", "8", "--data", str(inputs / "data"),
                "--checkpoint-every", "1", "--eval-every", "0",
                "--options.max-episode-steps", "30", "--options.reward", "dense",
                "--quiet"]  # fmt: skip
    return ["finetune", str(inputs / "policy"), "--env", PUSH, "--out", str(out), "--n-envs", "4",
            "--total-timesteps", "440", "--dppo.tuned-steps", "3", "--dppo.n-steps", "5", "--dppo.batch-size", "20",
            "--dppo.n-epochs", "2", "--checkpoint-every", "1", "--eval-every", "0",
            "--options.max-episode-steps", "30", "--options.reward", "dense", "--quiet"]  # fmt: skip


def rows(run: Path) -> list[dict[str, float]]:
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
    complete = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in complete]


def kill_after(arguments: list[str], run: Path, iteration: int) -> None:
    """Start dprl in a process of its own and kill -9 it once it has logged `iteration`."""
    process = subprocess.Popen([sys.executable, "-m", "dprl", *arguments])
    deadline = time.monotonic() + 120
    while not rows(run) or rows(run)[-1]["iteration"] < iteration:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def assert_same_checkpoint(a: Path, b: Path) -> None:
    for name in ("model.safetensors", "training.safetensors"):
        ours, theirs = load_file(a / name), load_file(b / name)
        assert ours.keys() == theirs.keys()
        different = [key for key in ours if not np.array_equal(ours[key], theirs[key], equal_nan=True)]
        assert not different, f"{name}: {different}"
    for name in ("training.json", "config.json"):
        assert (a / name).read_text() == (b / name).read_text()


ALIKE = [pytest.param(kind, marks=pytest.mark.full) for kind in ("pretrain", "offline", "online")]
"""What trains on data, too; the agents' own tests stop and resume them without a process each."""


@pytest.mark.parametrize("kind", [*ALIKE, "finetune"])
def test_killed_and_resumed_equals_uninterrupted(kind: str, inputs: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(command(kind, inputs, whole)) == 0
    kill_after(command(kind, inputs, killed), killed, iteration=3)
    assert rows(killed)[-1]["iteration"] < 6
    assert main(["resume", str(killed), "--quiet"]) == 0
    assert len(rows(whole)) == 7, "six iterations after the start"
    assert rows(killed) == rows(whole)
    assert_same_checkpoint(killed / "checkpoints" / "last", whole / "checkpoints" / "last")
    names = load_file(whole / "checkpoints" / "last" / "training.safetensors").keys()
    for part in ("exp_avg", "generator"):
        assert any(part in name for name in names), f"{part} is not in the checkpoint"


@pytest.mark.full
@pytest.mark.parametrize("iteration", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("kind", ["pretrain", "offline", "online", "finetune"])
def test_killed_anywhere(kind: str, iteration: int, inputs: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(command(kind, inputs, whole)) == 0
    kill_after(command(kind, inputs, killed), killed, iteration)
    assert main(["resume", str(killed), "--quiet"]) == 0
    assert rows(killed) == rows(whole)
    assert_same_checkpoint(killed / "checkpoints" / "last", whole / "checkpoints" / "last")


@pytest.mark.full
def test_evaluating_more_often_changes_no_byte_of_training(inputs: Path, tmp_path: Path) -> None:
    runs = {}
    for every in (0, 1, 3):
        runs[every] = tmp_path / f"every{every}"
        arguments = command("finetune", inputs, runs[every])
        arguments[arguments.index("--eval-every") + 1] = str(every)
        assert main([*arguments, "--eval-episodes", "2"]) == 0
        assert_same_checkpoint(runs[every] / "checkpoints" / "last", runs[0] / "checkpoints" / "last")
    trained = {every: [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in rows(run)]
               for every, run in runs.items()}  # fmt: skip
    assert trained[0] == trained[1] == trained[3]
    assert any("eval/return_mean" in row for row in rows(runs[1]))


def test_sigterm_finishes_the_iteration_and_the_run_resumes(inputs: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(command("pretrain", inputs, whole)) == 0
    process = subprocess.Popen([sys.executable, "-m", "dprl", *command("pretrain", inputs, stopped)],
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    while not rows(stopped):
        assert process.poll() is None
        time.sleep(0.005)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "dprl resume" in errors
    assert RunFolder(stopped).progress()["iteration"] == rows(stopped)[-1]["iteration"]
    assert main(["resume", str(stopped), "--quiet"]) == 0
    assert rows(stopped) == rows(whole)
    assert_same_checkpoint(stopped / "checkpoints" / "last", whole / "checkpoints" / "last")


def test_resuming_a_complete_run_changes_nothing(inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(command("pretrain", inputs, run)) == 0
    before = rows(run)
    assert main(["resume", str(run), "--quiet"]) == 0
    assert rows(run) == before


def test_a_run_killed_before_its_first_checkpoint_starts_anew(inputs: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(command("pretrain", inputs, whole)) == 0
    killed.mkdir()
    (killed / "run.json").write_bytes((whole / "run.json").read_bytes())
    assert main(["resume", str(killed), "--quiet"]) == 0
    assert rows(killed) == rows(whole)
    assert_same_checkpoint(killed / "checkpoints" / "last", whole / "checkpoints" / "last")


@pytest.mark.full
def test_a_run_that_another_process_trains_is_left_alone(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(command("pretrain", inputs, run)) == 0
    before = sorted((file, file.stat().st_mtime_ns) for file in run.rglob("*") if file.is_file())
    monkeypatch.setattr("dprl.training.run.LOCK_PATIENCE_S", 0.1)
    held = "import sys; from dprl.training import RunFolder; from pathlib import Path\n" \
           "with RunFolder(Path(sys.argv[1])).locked(): print('held', flush=True); sys.stdin.read()"  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", held, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert main(["resume", str(run), "--quiet"]) == 2
        other.communicate()
    assert "is being trained by another process" in capsys.readouterr().err
    assert sorted((file, file.stat().st_mtime_ns) for file in run.rglob("*") if file.is_file()) == before
    assert main(["resume", str(run), "--quiet"]) == 0, "the lock is free again"


@pytest.mark.parametrize("content", ["[]", "{}", '{"kind": "x", "config": {}}', "not json"])
def test_a_damaged_run_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text(content)
    assert main(["resume", str(tmp_path)]) == 2
    assert "dprl: error:" in capsys.readouterr().err


def test_resume_works_from_another_folder(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inputs)
    arguments = command("pretrain", inputs, tmp_path / "run")
    arguments[1] = "data"
    assert main(arguments) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["resume", str(tmp_path / "run"), "--quiet"]) == 0


@pytest.mark.parametrize("lost", ["the last link", "links became folders"])
def test_a_copied_run_is_the_same_run(lost: str, inputs: Path, tmp_path: Path) -> None:
    """Many ways to copy a folder keep no links."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    assert main(command("pretrain", inputs, run)) == 0
    shutil.copytree(run, copy, symlinks=lost == "the last link")
    if lost == "the last link":
        (copy / "checkpoints" / "last").unlink()
    before = (copy / "metrics.jsonl").read_text()
    assert main(["resume", str(copy), "--quiet"]) == 0
    assert (copy / "metrics.jsonl").read_text() == before, "nothing was trained again"
    assert (copy / "checkpoints" / "last").is_symlink()
    assert_same_checkpoint(run / "checkpoints" / "last", copy / "checkpoints" / "last")

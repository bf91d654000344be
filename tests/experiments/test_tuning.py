"""`dprl tune-guidance`: what is tried, what it leaves, how it goes on, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dprl.cli import main
from dprl.errors import CheckpointError, ConfigError, DprlError, RunExistsError
from dprl.experiments import tuning
from dprl.experiments.tuning import Combination, TuneConfig
from dprl.policy import ChunkCritic, CriticConfig, Features, InferenceConfig, Policy
from dprl.spec import EnvOptions
from tests.policy.small import small_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    policy = small_policy("diffusion", Features(2, 2, env_id="Avoid-v0"))
    policy.scorer = ChunkCritic(policy, CriticConfig(hidden_size=8))
    policy.save_pretrained(tmp_path_factory.mktemp("tuning") / "policy")
    return tmp_path_factory.getbasetemp() / "tuning0" / "policy"


def config(policy: Path, **changes: object) -> TuneConfig:
    options = EnvOptions(max_episode_steps=6)
    settings = {"guide": "critic", "scales": (1.0, 0.1), "episodes": 3, "options": options}
    return TuneConfig(str(policy), **{**settings, **changes})


def test_what_is_tried() -> None:
    tried = TuneConfig("p", "critic", scales=(3.0, 1.0), skip_last=(2, 0), candidates=(4, 1)).combinations
    assert tried[:2] == [Combination(0.0, 0, 1), Combination(0.0, 0, 4)]
    assert tried[2:6] == [(1.0, 0, 1), (3.0, 0, 1), (1.0, 2, 1), (3.0, 2, 1)]
    assert len(tried) == 2 + 2 * 2 * 2


def test_it_leaves_table_and_figure_and_names_the_best(policy: Path, tmp_path: Path) -> None:
    best = tuning.tune(config(policy, candidates=(1, 2)), tmp_path / "out", progress_bar=False)
    rows = json.loads((tmp_path / "out" / "tried.json").read_text())
    assert len(rows) == 2 * 3
    assert best.score == max(row["success"] for row in rows)
    unguided = [row for row in rows if row["scale"] == 0]
    assert all((row["distance"], row["disagreement"]) == (0.0, None) for row in unguided)
    assert all(row["distance"] > 0 for row in rows if row["scale"])
    table = (tmp_path / "out" / "tuning.md").read_text()
    assert f"dprl evaluate {policy}" in table
    assert {"tuning.csv", "tuning.png", "tuning.json"} < {file.name for file in (tmp_path / "out").iterdir()}


def test_it_goes_on_with_what_is_missing(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, out = config(policy), tmp_path / "out"
    tuning.tune(settings, out, progress_bar=False)
    rows = json.loads((out / "tried.json").read_text())
    (out / "tried.json").write_text(json.dumps(rows[:1]))
    played = []
    original = tuning._tried
    monkeypatch.setattr(tuning, "_tried", lambda *args: played.append(args[4]) or original(*args))
    tuning.tune(settings, out, progress_bar=False)
    assert played == [(0.1, 0, 1), (1.0, 0, 1)]
    tuning.tune(replace(settings, scales=(0.1, 1.0, 2.0)), out, progress_bar=False)
    assert played[2:] == [(2.0, 0, 1)]
    again = json.loads((out / "tried.json").read_text())
    assert [row["distance"] for row in again[:3]] == [row["distance"] for row in rows]
    (out / "tried.json").write_text('[{"scale": 0.1}]')
    with pytest.raises(CheckpointError, match=r"tried\.json' is damaged"):
        tuning.tune(settings, out, progress_bar=False)


def test_what_cannot_be_is_refused_before_anything_is_played(policy: Path, tmp_path: Path) -> None:
    for changes, complaint in (
        ({"guide": "nothing"}, "guide = 'nothing'"),
        ({"env": "Nowhere-v0"}, "Nowhere-v0"),
        ({"scales": ()}, "scales"),
        ({"scales": (0.0, 1.0)}, "must not have 0"),
        ({"candidates": (2, 2)}, "candidates"),
        ({"inference": InferenceConfig(candidates=4)}, "inference.candidates"),
        ({"gradient": "noisy"}, "is not of noisy actions"),
        ({"skip_last": (0, 99)}, "skip_last = 99: the guide moves nothing"),
        ({"guide": f"{__name__}:column"}, r"value = \(\d+, 1\): must be a tensor of one number"),
        ({"device": "nowhere"}, "device"),
    ):
        with pytest.raises(DprlError, match=complaint):
            tuning.tune(config(policy, **changes), tmp_path / "out", progress_bar=False)
        assert not (tmp_path / "out").exists(), complaint
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(RunExistsError):
        tuning.tune(config(policy), tmp_path / "full", progress_bar=False)
    tuning.tune(config(policy), tmp_path / "out", progress_bar=False)
    with pytest.raises(ConfigError, match="episodes = 4: must be 3, as in"):
        tuning.tune(config(policy, episodes=4), tmp_path / "out", progress_bar=False)


def test_other_weights_in_the_same_folder_are_told_apart(policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(policy, folder)
    tuning.tune(config(folder), tmp_path / "out", progress_bar=False)
    other = Policy.from_pretrained(folder)
    with torch.no_grad():
        next(other.base.parameters()).add_(0.1)
    other.save_pretrained(folder, overwrite=True)
    with pytest.raises(ConfigError, match="has changed since"):
        tuning.tune(config(folder), tmp_path / "out", progress_bar=False)


def test_a_function_that_was_edited_is_told_apart(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "my_tuned_reward.py"
    file.write_text("def up(obs, actions):\n    return actions.sum((1, 2))\n")
    settings = config(policy, guide="my_tuned_reward:up")
    tuning.tune(settings, tmp_path / "out", progress_bar=False)
    file.write_text("def up(obs, actions):\n    return -actions.sum((1, 2))\n")
    with pytest.raises(ConfigError, match="guide = 'my_tuned_reward:up': has changed since"):
        tuning.tune(settings, tmp_path / "out", progress_bar=False)


def column(obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    return actions.sum((1, 2))[:, None]


def test_the_command_line(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--options.max-episode-steps", "4", "--temperature", "0.5"]
    arguments = [
        "--guide",
        "critic",
        "--scales",
        "1",
        "--episodes",
        "2",
        *options[:2],
        "--inference.temperature",
        "0.5",
    ]
    out = tmp_path / "out"
    assert main(["tune-guidance", str(policy), "--out", str(out), *arguments, "--quiet"]) == 0
    command = capsys.readouterr().out.split("Next: ")[1].split()
    assert command[:3] == ["dprl", "evaluate", str(policy)]
    assert command[3:7] == options
    assert " ".join(command) in (out / "tuning.md").read_text()
    assert main([*command[1:], "--episodes", "2", "--quiet"]) == 0

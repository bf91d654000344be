"""The command line: one clear message and exit code 2 for every user's error, and nothing left behind."""

import json
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from dprl.cli import main
from dprl.data import Episodes, save_dataset
from dprl.networks import MLPConfig
from dprl.policy import DiffusionPolicy, PolicyConfig
from dprl.spec import EnvSpec

PENDULUM = "InvertedPendulum-v5"
PUSH = "metaworld/push-v3"
SHORT = "--options.max-episode-steps 8"


def save_policy(path, observation_size, action_size):
    config = PolicyConfig(observation_size, action_size, num_train_timesteps=4, denoiser=MLPConfig(8, time_size=4))
    DiffusionPolicy(config).save_pretrained(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything commands take. No error may add to it."""
    folder = tmp_path_factory.mktemp("cli")
    save_policy(folder / "policy", 4, 1)
    save_policy(folder / "other", 5, 1)
    save_policy(folder / "push", 39, 4)
    random = np.random.default_rng(0)
    data = Episodes(
        observations=random.normal(size=(16, 4)).astype(np.float32),
        actions=random.uniform(-3, 3, (16, 1)).astype(np.float32),
        rewards=np.ones(16, np.float32),
        final_observations=np.zeros((2, 4), np.float32),
        ends=np.array([8, 16]),
        terminated=np.zeros(2, bool),
        success=np.zeros(2, bool),
        seeds=np.arange(2),
        env_id=PENDULUM,
    )
    spec = EnvSpec(PENDULUM, "", PENDULUM, 4, (-3.0,), (3.0,), 8)
    for name in ("data", "corrupt", "cut"):
        save_dataset(data, folder / name, spec)
    file = folder / "corrupt" / "data" / "main_data.hdf5"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    file = folder / "cut" / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:1000])
    (folder / "cut" / "manifest.json").unlink()
    (folder / "taken").mkdir()
    (folder / "taken" / "run.json").write_text('{"kind": "pretrain", "config": {"data": "data"}}')
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    (folder / "empty").mkdir()
    return folder


def run(arguments):
    """The exit code, however it comes; the error that a user would see a traceback of."""
    try:
        return main(arguments.split())
    except SystemExit as stopped:
        return stopped.code
    except Exception as error:
        return error


PRETRAIN = "pretrain data --out new --quiet"
FINETUNE = f"finetune policy --env {PENDULUM} --out new --quiet --n-envs 2 --dppo.tuned-steps 2 {SHORT}"
EVALUATE = f"evaluate policy --env {PENDULUM} --episodes 1 --quiet {SHORT}"
COLLECT = f"collect {PUSH} --out new --quiet --episodes 1 {SHORT}"

ERRORS = {
    "unknown environment": ("evaluate policy --env metaworld/pusj-v3", "metaworld/pusj-v3", "Did you mean metaworld/"),
    "unknown Gymnasium id": ("evaluate policy --env Hoper-v5", "Hoper-v5", "Hopper-v5"),
    "unknown module": ("evaluate policy --env no_such_module:Env-v0", "no_such_module"),
    "unknown environment to collect": ("collect metaworld/pusj-v3 --out new", "metaworld/pusj-v3", "Did you mean"),
    "unknown environment to tune in": ("finetune policy --env Hoper-v5 --out new", "Hoper-v5", "Hopper-v5"),
    "discrete actions": ("evaluate policy --env CartPole-v1", "CartPole-v1", "continuous actions"),
    "unknown expert": (f"{COLLECT} --expert scriptd", "scriptd", "Did you mean scripted"),
    "expert of other environments": ("collect Hopper-v5 --out new", "scripted", "Hopper-v5"),
    "unknown experiment": ("demo pussh --out new", "pussh", "Did you mean push"),
    "unknown config key": (f"{FINETUNE} --dppo.tuned-stesp 3", "--dppo.tuned-stesp", "--dppo.tuned-steps"),
    "unknown command": ("pretrian data", "pretrian"),
    "unknown list": ("list env", "env"),
    "wrong type": (f"{PRETRAIN} --steps many", "--steps", "many"),
    "missing option": ("evaluate policy", "--env"),
    "too many executed (pretrain)": (f"{PRETRAIN} --n-action-steps 5", "n_action_steps = 5", "horizon"),
    "too many executed (finetune)": (f"{FINETUNE} --n-action-steps 5", "n_action_steps = 5", "horizon"),
    "too many tuned": (f"{FINETUNE} --dppo.tuned-steps 5", "tuned_steps = 5", "denoising steps, which are 4"),
    "horizon beyond episodes": (f"{PRETRAIN} --horizon 9", "horizon of 9", "8 steps"),
    "missing data": ("pretrain nowhere --out new", "nowhere", "main_data.hdf5"),
    "corrupt data": ("pretrain corrupt --out new", "main_data.hdf5", "damaged"),
    "cut data": ("pretrain cut --out new", "main_data.hdf5", "damaged"),
    "missing policy": (f"evaluate nowhere --env {PENDULUM}", "nowhere", "config.json"),
    "missing policy to tune": (f"finetune nowhere --env {PENDULUM} --out new", "nowhere", "config.json"),
    "other observation size (evaluate)": (f"evaluate other --env {PENDULUM}", "observation_size = 5", "has 4"),
    "other observation size (finetune)": (f"finetune other --env {PENDULUM} --out new", "observation_size = 5"),
    "run exists (pretrain)": ("pretrain data --out taken", "taken", "resume"),
    "run exists (finetune)": (f"finetune policy --env {PENDULUM} --out taken", "taken", "resume"),
    "folder in use (pretrain)": ("pretrain data --out full", "full", "not empty"),
    "folder in use (collect)": (f"collect {PUSH} --out full", "full", "already exists"),
    "folder in use (demo)": ("demo smoke --out full", "full", "already exists"),
    "no run to resume": ("resume data", "data", "run.json"),
    "nowhere to resume": ("resume nowhere", "nowhere", "run.json"),
    "a file where a folder must be": (
        "collect metaworld/push-v3 --out data/data/metadata.json/x",
        "metadata.json",
        "folder",
    ),
    "negative seed (demo)": ("demo smoke --seed -1 --out new", "seed = -1"),
    "negative episodes (evaluate)": (f"{EVALUATE} --episodes -1", "episodes = -1"),
    "negative episodes (collect)": (f"{COLLECT} --episodes -1", "episodes", "-1"),
    "no environments": (f"{FINETUNE} --n-envs 0", "n_envs", "0"),
    "slice size": (f"{FINETUNE} --n-envs 4 --slice-size 3", "slice_size = 3", "4"),
    "workers": (f"{FINETUNE} --n-envs 4 --slice-size 2 --workers 3", "workers = 3", "slices"),
    "device (pretrain)": (f"{PRETRAIN} --device warp", "device", "warp"),
    "device (finetune)": (f"{FINETUNE} --device warp", "device", "warp"),
    "sparse reward without success": (f"{EVALUATE} --options.reward sparse", "reward = 'sparse'", "success"),
    "no steps (pretrain)": (f"{PRETRAIN} --steps 0", "steps = 0"),
    "no steps (finetune)": (f"{FINETUNE} --total-timesteps 0", "total_timesteps = 0"),
    "no checkpoints (pretrain)": (f"{PRETRAIN} --steps 1 --checkpoint-every 0", "checkpoint_every = 0"),
    "no checkpoints (finetune)": (f"{FINETUNE} --total-timesteps 8 --checkpoint-every 0", "checkpoint_every = 0"),
    "negative interval": (f"{FINETUNE} --total-timesteps 8 --eval-every -1", "eval_every = -1"),
    "negative seed (evaluate)": (f"{EVALUATE} --seed -1", "seed = -1"),
    "negative seed (collect)": (f"{COLLECT} --seed -1", "seed = -1"),
    "negative seed (pretrain)": (f"{PRETRAIN} --steps 1 --seed -1", "seed = -1"),
    "negative seed (finetune)": (f"{FINETUNE} --total-timesteps 8 --seed -1", "seed = -1"),
    "no time": (f"{EVALUATE.removesuffix(' 8')} 0", "max_episode_steps = 0"),
    "negative time": (f"{EVALUATE.removesuffix(' 8')} -1", "max_episode_steps = -1"),
}


@pytest.mark.parametrize(("arguments", "fragments"), [(a, f) for a, *f in ERRORS.values()], ids=ERRORS)
def test_an_error_is_one_message_exit_code_2_and_no_files(folder, monkeypatch, capsys, arguments, fragments):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    code = run(arguments)
    out, err = capsys.readouterr()
    added = sorted(set(folder.rglob("*")) - set(before))
    shutil.rmtree(folder / "new", ignore_errors=True)  # the next test starts clean
    assert code == 2
    assert len(re.findall(r"^dprl: error: |For full helptext", err, re.MULTILINE)) == 1  # tyro's end so
    text = re.sub(r"[\s│]+", " ", err)
    assert [fragment for fragment in fragments if fragment not in text] == []
    assert "Traceback" not in err
    assert out == ""
    assert added == []


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("envs", [PUSH, "Hopper-v5"]),
        ("experts", ["scripted"]),
        ("experiments", ["push", "pick-place", "smoke"]),
        ("agents", ["bc", "dppo"]),
    ],
)
def test_list_shows_every_kind_of_name(capsys, what, names):
    assert run(f"list {what}") == 0
    first_words = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert set(names) <= first_words


def test_doctor_names_packages_and_exits_0(capsys):
    assert run("doctor") == 0
    out = capsys.readouterr().out
    for what in ("python", f"torch {torch.__version__.split('+')[0]}", "gymnasium", "offscreen rendering", "W&B login"):
        assert what in re.sub(r" +", " ", out)


def test_python_m_dprl_shows_help(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "dprl", "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for command in ("demo", "collect", "pretrain", "finetune", "resume", "evaluate", "doctor", "list"):
        assert command in result.stdout


def evaluate_json(capsys, arguments):
    """Standard output as strict JSON: no Infinity, no NaN."""
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run(arguments) == 0
    return json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize(("policy", "env"), [("policy", PENDULUM), ("push", PUSH)])
def test_evaluate_json_prints_one_reproducible_object(folder, monkeypatch, capsys, policy, env):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    command = f"evaluate {policy} --env {env} --episodes 3 --seed 5 {SHORT} --json"
    first, second = evaluate_json(capsys, command), evaluate_json(capsys, command)
    for result in (first, second):
        assert result.pop("policy_latency_ms_p50") > 0
    assert first == second
    assert (first["env"], first["episodes"], first["seed"]) == (env, 3, 5)
    assert 1 <= first["episode_length_mean"] <= 8
    assert first["return_ci95"][0] <= first["return_mean"] <= first["return_ci95"][1]
    if env == PUSH:
        assert first["success_ci95"][0] <= first["success_rate"] <= first["success_ci95"][1]
    else:
        assert first["success_rate"] is first["success_ci95"] is None
    assert sorted(folder.rglob("*")) == before


def test_evaluate_json_of_a_single_episode_is_json(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert evaluate_json(capsys, f"{EVALUATE} --json")["episodes"] == 1


def test_evaluate_shows_a_table_and_another_seed_differs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert run(EVALUATE) == 0
    assert "return_mean" in capsys.readouterr().out
    results = [evaluate_json(capsys, f"{EVALUATE} --episodes 3 --seed {seed} --json") for seed in (0, 1)]
    assert results[0]["return_mean"] != results[1]["return_mean"]


@pytest.mark.parametrize("command", [f"{PRETRAIN} --steps 2 --num-train-timesteps 2", COLLECT])
def test_an_empty_folder_may_be_written_to(folder, monkeypatch, tmp_path, command):
    """As the help of --out says."""
    monkeypatch.chdir(folder)
    assert run(command.replace("--out new", f"--out {tmp_path}")) == 0
    assert list(tmp_path.iterdir())

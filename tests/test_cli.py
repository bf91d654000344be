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

from dprl import cli
from dprl.cli import main
from dprl.data import Episodes, save_dataset
from dprl.envs import catalogue
from dprl.experiments import plots
from dprl.experiments.catalogue import STUDIES
from dprl.networks import LNResNetConfig, MLPConfig, TransformerConfig, UNetConfig
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features, GMMConfig, GMMPolicy, InferenceConfig, Policy
from dprl.spec import EnvSpec

PENDULUM = "InvertedPendulum-v5"
PUSH = "metaworld/push-v3"
SHORT = "--options.max-episode-steps 8"


def save_policy(path, observation_size, action_size):
    config = DiffusionConfig(num_train_timesteps=4, denoiser=MLPConfig(8, time_size=4))
    DiffusionPolicy(Features(observation_size, action_size), config).save_pretrained(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything commands take. No error may add to it."""
    folder = tmp_path_factory.mktemp("cli")
    save_policy(folder / "policy", 4, 1)
    save_policy(folder / "other", 5, 1)
    save_policy(folder / "push", 39, 4)
    GMMPolicy(Features(4, 1), GMMConfig(hidden_size=8, n_blocks=1)).save_pretrained(folder / "gmm")
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
    "missing option": ("finetune policy --out new", "--env"),
    "a policy of nowhere": ("evaluate policy", "env: the policy does not say where it learned"),
    "too many executed (pretrain)": (f"{PRETRAIN} mlp --policy.n-action-steps 5", "n_action_steps = 5", "horizon"),
    "too many executed (evaluate)": (f"{EVALUATE} --n-action-steps 5", "n_action_steps = 5", "horizon"),
    "too many executed (finetune)": (f"{FINETUNE} --n-action-steps 5", "n_action_steps = 5", "horizon"),
    "too many tuned": (f"{FINETUNE} --dppo.tuned-steps 5", "tuned_steps = 5", "denoising steps, which are 4"),
    "horizon beyond episodes": (
        f"{PRETRAIN} --bc.pad-after 0 mse --policy.horizon 9",
        "horizon of 9",
        "8 steps",
    ),
    "unknown policy": (f"{PRETRAIN} gnm", "gnm", "gmm"),
    "option of another policy": (f"{PRETRAIN} mse --policy.n-modes 3", "--policy.n-modes"),
    "option of another network": (f"{PRETRAIN} mlp --policy.denoiser.down-dims 8 16", "--policy.denoiser.down-dims"),
    "wrong option of a policy": (f"{PRETRAIN} gmm --policy.n-modes 0", "n_modes = 0", "at least 1"),
    "too many bins": (f"{PRETRAIN} bet --policy.n-bins 50", "make no 50 bins"),
    "augmentation": (f"{PRETRAIN} mse --policy.vision.augmentation crop", "crop_size = None", "crop"),
    "flow by another solver": (f"{PRETRAIN} flow --policy.sampling.solver ddim", "solver = 'ddim'", "euler"),
    "flow of another schedule": (f"{PRETRAIN} flow --policy.schedule linear", "velocity"),
    "solver of no diffusion policy (pretrain)": (
        f"{PRETRAIN} --inference.solver ddim gmm",
        "solver = 'ddim': policies of type gmm have none",
    ),
    "solver of no diffusion policy (evaluate)": (
        f"evaluate gmm --env {PENDULUM} --solver ddim",
        "solver = 'ddim': policies of type gmm have none",
    ),
    "unknown solver": (f"{EVALUATE} --solver dpm", "--solver", "dpmsolver++"),
    "solver of the other family": (f"{EVALUATE} --solver euler", "solver = 'euler'", "squaredcos_cap_v2"),
    "eta without ddim": (f"{EVALUATE} --eta 0.5", "eta = 0.5", "ddim"),
    "too many steps": (f"{EVALUATE} --num-inference-steps 5", "num_inference_steps = 5", "which are 4"),
    "too many steps (demo)": (
        "demo smoke --solver ddim --num-inference-steps 11 --out new",
        "num_inference_steps = 11",
    ),
    "warm start and ensembling": (f"{EVALUATE} --warm-start-steps 1 --temporal-ensembling 0", "warm_start_steps = 1"),
    "warm start of too many steps": (f"{EVALUATE} --warm-start-steps 5", "warm_start_steps = 5", "which are 4"),
    "negative temperature": (f"{EVALUATE} --temperature -1", "temperature = -1.0"),
    "temperature of a solver that draws nothing": (
        f"{EVALUATE} --solver ddim --temperature 0.5",
        "temperature = 0.5",
        "draws no noise",
        "ddpm",
    ),
    "executed actions and ensembling": (
        f"{EVALUATE} --n-action-steps 2 --temporal-ensembling 0",
        "n_action_steps = 2",
        "decides at every step",
    ),
    "a network beyond all memory": (f"{PRETRAIN} mse --policy.hidden-size 40000000", "allocate", "smaller network"),
    "more than one step of a mixture": (f"finetune gmm --env {PENDULUM} --out new", "tuned_steps = 10", "must be 1"),
    "dpmsolver to tune": (
        f"{FINETUNE} --dppo.solver.solver dpmsolver++",
        "solver = 'dpmsolver++'",
        "ddpm, ddim or euler",
    ),
    "no paper's size": ("experiment ablations --paper --out new", "paper = True", "'ablations' has one size"),
    "unknown study": ("experiment imitatoin --out new", "imitatoin", "imitation"),
    "no seeds": ("experiment multimodal --out new --seeds", "seeds"),
    "no episodes (experiment)": ("experiment multimodal --out new --quiet --scale 0.0001 --episodes 0", "episodes = 0"),
    "no jobs": ("experiment multimodal --out new --quiet --jobs 0", "jobs = 0"),
    "validation of everything": (f"{PRETRAIN} --bc.validation-share 1", "validation_share = 1"),
    "missing data": ("pretrain nowhere --out new", "nowhere", "holds no data set"),
    "corrupt data": ("pretrain corrupt --out new", "main_data.hdf5", "damaged"),
    "cut data": ("pretrain cut --out new", "main_data.hdf5", "damaged"),
    "guide that is none": (f"{EVALUATE} --guide critics", "guide = 'critics'", "module:function"),
    "scale of nothing": (f"{EVALUATE} --scale 2", "scale = 2.0", "needs a guide"),
    "critics of a policy without": (f"{EVALUATE} --guide critic", "guide = 'critic'", "dprl offline"),
    "scorer of nothing": (f"{EVALUATE} --scorer tests.toys:reach_spec", "scorer = ", "needs candidates"),
    "guide of no diffusion policy": (f"evaluate gmm --env {PENDULUM} --guide tests.toys:reach_spec", "guide = ", "gmm"),
    "no workers": (f"{EVALUATE} --pool ray --workers 0", "workers = 0"),
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
    "a nested option": (
        f"{PRETRAIN} --policy.denoiser.hidden-size=-1",
        "--policy.denoiser.hidden-size: hidden_size = -1",
    ),
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
        ("experiments", ["dprl"]),
        ("agents", ["bc", "dppo", "idql", "iql", "diffusion-ql", "online-idql"]),
    ],
)
def test_list_shows_every_kind_of_name(capsys, what, names):
    assert run(f"list {what}") == 0
    first_words = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert set(names) <= first_words


def test_list_envs_shows_all_of_the_catalogue(capsys):
    """Those with pixels of Meta-World by a pattern."""
    assert run("list envs") == 0
    first_words = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert set(catalogue.NAMES) - set(catalogue.METAWORLD_PIXELS) <= first_words


def test_list_experiments_shows_the_commands(capsys):
    assert run("list experiments") == 0
    text = capsys.readouterr().out
    for command in ("demo push", "demo pick-place", "demo smoke", *(f"experiment {name}" for name in STUDIES)):
        assert f"dprl {command} " in text


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
    for command in (
        "demo",
        "experiment",
        "collect",
        "inspect",
        "convert",
        "pretrain",
        "offline",
        "finetune",
        "resume",
        "evaluate",
        "doctor",
        "list",
    ):
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


def test_another_environment_than_the_datas_is_noted(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    policy = DiffusionPolicy(Features(4, 1, env_id=PUSH), DiffusionConfig(num_train_timesteps=2))
    policy.save_pretrained("learned-elsewhere")
    assert main(f"evaluate learned-elsewhere --env {PENDULUM} --episodes 1 --json {SHORT}".split()) == 0
    assert f"the policy learned in {PUSH}, not in {PENDULUM}" in capsys.readouterr().err


def test_evaluate_json_of_a_single_episode_is_json(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert evaluate_json(capsys, f"{EVALUATE} --json")["episodes"] == 1


def test_evaluate_shows_a_table_and_another_seed_differs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert run(EVALUATE) == 0
    assert "return_mean" in capsys.readouterr().out
    assert evaluate_json(capsys, f"evaluate gmm --env {PENDULUM} {SHORT} --episodes 2 --json")["episodes"] == 2
    results = [evaluate_json(capsys, f"{EVALUATE} --episodes 3 --seed {seed} --json") for seed in (0, 1)]
    assert results[0]["return_mean"] != results[1]["return_mean"]


def test_evaluate_is_steered_by_a_function_beside_it(folder, monkeypatch, tmp_path, capsys):
    (tmp_path / "my_reward.py").write_text("def strong(obs, actions):\n    return (actions ** 2).sum((1, 2))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(folder)
    command = f"{EVALUATE} --episodes 3 --json"
    plain, guided, chosen, still = (
        evaluate_json(capsys, f"{command} {how}")
        for how in (
            "",
            "--guide my_reward:strong --scale 0.5 --scaling normalized",
            "--candidates 4 --scorer my_reward:strong",
            "--guide my_reward:strong --scale 0",
        )
    )
    assert len({result["return_mean"] for result in (plain, guided, chosen)}) == 3
    assert still["return_mean"] == plain["return_mean"]
    assert guided["guidance"]["guide"] == "my_reward:strong"
    assert "guidance" not in plain


@pytest.mark.full
def test_evaluate_on_ray_is_evaluate_here(folder, monkeypatch, tmp_path, capsys):
    (tmp_path / "my_reward_on_ray.py").write_text("def strong(obs, actions):\n    return (actions ** 2).sum((1, 2))\n")
    monkeypatch.chdir(tmp_path)
    command = f"{EVALUATE.replace(' policy', f' {folder}/policy')} --episodes 3 --json --candidates 3"
    command += " --guide my_reward_on_ray:strong --scorer my_reward_on_ray:strong"
    here, on_ray = (evaluate_json(capsys, f"{command} --pool {pool}") for pool in ("local", "ray"))
    for result in (here, on_ray):
        assert result.pop("policy_latency_ms_p50") > 0
    assert here == on_ray


@pytest.mark.parametrize("command", [f"{PRETRAIN} --steps 2 mlp --policy.num-train-timesteps 2", COLLECT])
def test_an_empty_folder_may_be_written_to(folder, monkeypatch, tmp_path, command):
    """As the help of --out says."""
    monkeypatch.chdir(folder)
    assert run(command.replace("--out new", f"--out {tmp_path}")) == 0
    assert list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ the new options

SMALL = {
    "mlp": "--policy.denoiser.hidden-size 8",
    "unet": "--policy.denoiser.down-dims 8 16 --policy.denoiser.n-groups 4 --policy.denoiser.time-size 4",
    "transformer": "--policy.denoiser.embedding-size 8 --policy.denoiser.n-layers 1 --policy.denoiser.n-heads 2",
    "flow": "--policy.denoiser.hidden-size 8",
    "ln-resnet": "--policy.denoiser.hidden-size 8",
    "bet": "--policy.hidden-size 8 --policy.n-bins 3",
}
KINDS = {
    "mlp": "diffusion", "unet": "diffusion", "transformer": "diffusion", "flow": "diffusion", "ln-resnet": "diffusion",
    "mse": "mse",
    "gaussian": "gaussian", "gmm": "gmm", "lstm-gmm": "lstm_gmm", "categorical": "categorical", "bet": "bet",
    "ibc": "ibc",
}  # fmt: skip
DENOISERS = {
    "mlp": MLPConfig, "unet": UNetConfig, "transformer": TransformerConfig, "flow": MLPConfig,
    "ln-resnet": LNResNetConfig,
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_policy_can_be_chosen_by_name(folder, monkeypatch, tmp_path, name):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(plots, "training_curves", lambda run: None)  # which takes longer than the rest
    chunks = "--policy.horizon 3 --policy.n-action-steps 2 --policy.n-obs-steps 2"
    sizes = SMALL.get(name, "--policy.hidden-size 8")
    assert (
        run(f"pretrain data --out {tmp_path / 'run'} --quiet --steps 1 --bc.batch-size 4 {name} {chunks} {sizes}") == 0
    )
    policy = Policy.from_pretrained(tmp_path / "run")
    assert policy.name == KINDS[name]
    assert (policy.config.horizon, policy.config.n_action_steps, policy.config.n_obs_steps) == (3, 2, 2)
    if name in DENOISERS:
        assert type(policy.config.denoiser) is DENOISERS[name]
        assert policy.schedule.config.is_flow == (name == "flow")


def test_all_kinds_have_a_name_on_the_command_line():
    assert {*KINDS.values(), "planner"} == set(Policy.kinds)


@pytest.mark.parametrize(("name", "denoised"), [("planner", "rows"), ("state-planner", "states")])
def test_planners_can_be_cloned(folder, monkeypatch, tmp_path, name, denoised):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(plots, "training_curves", lambda run: None)
    chunks = "--policy.horizon 4 --policy.n-action-steps 2 --policy.command None"
    assert run(f"pretrain data --out {tmp_path / 'run'} --quiet --steps 1 --bc.batch-size 4 {name} {chunks}") == 0
    policy = Policy.from_pretrained(tmp_path / "run")
    assert (policy.name, policy.config.denoised) == ("planner", denoised)


def test_without_a_name_the_policy_is_diffusion_with_an_mlp(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    assert run(f"pretrain data --out {tmp_path / 'run'} --quiet --steps 1") == 0
    assert Policy.from_pretrained(tmp_path / "run").config == DiffusionConfig(num_train_timesteps=10)


def test_options_of_behaviour_cloning_reach_the_run(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    options = (
        "--bc.warmup-steps 3 --bc.ema-power 0.75 --bc.max-grad-norm 1 --bc.validation-share 0.5 --bc.precision "
        "bfloat16 --bc.pad-after 2 --bc.num-workers 1 --memory-map True --bc.weight-decay 0.1"
    )
    assert run(f"pretrain data --out {tmp_path / 'run'} --quiet --steps 1 {options} mse") == 0
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert config["memory_map"] is True
    expected = {"warmup_steps": 3, "ema_power": 0.75, "max_grad_norm": 1.0, "validation_share": 0.5, "pad_after": 2,
                "precision": "bfloat16", "num_workers": 1, "weight_decay": 0.1}  # fmt: skip
    assert expected.items() <= config["bc"].items()


@pytest.mark.parametrize(
    "options",
    [
        "--solver ddim --num-inference-steps 2 --eta 0.5",
        "--solver dpmsolver++ --num-inference-steps 2 --timestep-spacing trailing",
        "--temperature 0",
        "--n-action-steps 1",
        "--temporal-ensembling 0.5",
        "--warm-start-steps 2",
    ],
)
def test_how_a_policy_acts_is_chosen_when_it_acts(folder, monkeypatch, capsys, options):
    monkeypatch.chdir(folder)
    command = f"evaluate push --env {PUSH} --options.reward dense --episodes 2 --json {SHORT}"
    usual, first, again = (evaluate_json(capsys, c) for c in (command, f"{command} {options}", f"{command} {options}"))
    for result in (usual, first, again):
        result.pop("policy_latency_ms_p50")
    assert first == again
    assert first != usual, "it makes a difference"


def test_the_solvers_of_demo_and_evaluate_are_the_same(capsys):
    for command in ("demo", "evaluate"):
        assert run(f"{command} --help") == 0
        text = re.sub(r"\s+", "", capsys.readouterr().out)
        for solver in ("ddpm", "ddim", "dpmsolver++", "sde-dpmsolver++", "euler"):
            assert solver in text


def test_every_study_is_on_the_command_line(capsys):
    assert run("experiment --help") == 0
    text = capsys.readouterr().out
    assert [name for name in STUDIES if name not in text] == []


@pytest.mark.parametrize(
    ("acting", "options"),
    [
        (InferenceConfig(), ""),
        (InferenceConfig(candidates=64, selection="argmax"), " --candidates 64"),
        (
            InferenceConfig("ddim", 2, 0.5, candidates=7, selection="softmax", selection_scale=3.0, temperature=0.5),
            " --solver ddim --num-inference-steps 2 --eta 0.5 --temperature 0.5 --candidates 7 --selection softmax"
            " --selection-scale 3.0",
        ),
    ],
)
def test_what_comes_next_says_how_the_policy_acts(acting, options):
    assert cli._how(acting) == options

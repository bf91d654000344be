"""The three kinds of work, for every kind of policy: what is checked before anything is written, and what is stored."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dprl.agents import BCConfig, DPPOConfig, OnlineIDQLConfig
from dprl.config import from_json, to_json
from dprl.data import load_dataset, save_dataset
from dprl.errors import ConfigError, DatasetError, DprlError, EnvError
from dprl.experiments import plots, runs
from dprl.experiments.runs import FLOW, CollectConfig, FinetuneConfig, PretrainConfig
from dprl.log import read_metrics
from dprl.observations import Camera
from dprl.policy import Features, GMMConfig, InferenceConfig, MSEConfig, Policy
from dprl.spec import EnvOptions, EnvSpec, resolve
from tests.policy.small import KINDS, VIT, random_episodes, small_config

ENV = "Avoid-v0"
BC = BCConfig(batch_size=8, steps_per_iteration=2)

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves of a training take longer to draw than these trainings take."""
    monkeypatch.setattr(plots, "training_curves", lambda run: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three short episodes of Avoid-v0."""
    folder = tmp_path_factory.mktemp("runs") / "data"
    runs.collect(CollectConfig(ENV, episodes=3, options=EnvOptions(max_episode_steps=12)), folder, progress_bar=False)
    return folder


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four episodes with images."""
    folder = tmp_path_factory.mktemp("runs") / "seen"
    features = Features(3, 2, (Camera("top", 24, 24),))
    spec = EnvSpec("some/env", "", "", 3, (-1.0,) * 2, (1.0,) * 2, 10, cameras=features.cameras)
    save_dataset(replace(random_episodes(features), env_id=None), folder, spec)
    return folder


def config_of(kind: str, data: Path, **changes: object) -> PretrainConfig:
    return PretrainConfig(
        str(data), policy=small_config(kind), **({"steps": 6, "bc": BC, "checkpoint_every": 1} | changes)
    )


def timeless(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(folder)]


@every_kind
def test_every_kind_is_pretrained_evaluated_and_resumed(kind: str, data: Path, tmp_path: Path) -> None:
    """The config in run.json is of the exact class; a run cut back to its first checkpoint ends as the whole one."""
    config = config_of(kind, data, eval_every=3, eval_episodes=2)
    run = runs.pretrain(config, tmp_path / "whole", progress_bar=False)
    about = json.loads((run.path / "run.json").read_text())
    stored = from_json(PretrainConfig, about["config"], "run.json")
    assert stored == replace(config, data=str(data))
    assert type(stored.policy) is type(config.policy)
    rows = timeless(run.path)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
    assert "eval/success_rate" in rows[-1]
    policy = Policy.from_pretrained(run.path)
    assert policy.features == Features(2, 2, (), ENV)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "run.json").write_text((run.path / "run.json").read_text())
    runs.resume(cut, progress_bar=False)
    assert timeless(cut) == rows
    ours, theirs = (Policy.from_pretrained(folder).state_dict() for folder in (run.path, cut))
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_images_are_learned_from_on_disk(seen: Path, tmp_path: Path) -> None:
    config = config_of("mse", seen, steps=2)
    config = replace(config, policy=replace(config.policy, vision=VIT))
    mapped = replace(config, memory_map=True, bc=replace(BC, num_workers=1))
    weights = []
    for name, which in (("memory", config), ("disk", mapped)):
        runs.pretrain(which, tmp_path / name, progress_bar=False)
        policy = Policy.from_pretrained(tmp_path / name)
        assert policy.features == Features(3, 2, (Camera("top", 24, 24),), "some/env")
        weights.append(policy.state_dict())
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_the_first_episodes_only(data: Path, tmp_path: Path) -> None:
    """Ranges are of these episodes too."""
    first = load_dataset(data).select([0])
    run = runs.pretrain(config_of("mse", data, episodes=1, steps=1), tmp_path / "run", progress_bar=False)
    policy = Policy.from_pretrained(run.path)
    np.testing.assert_array_equal(policy.observation_normalizer.high, first.observations.max(0))
    np.testing.assert_array_equal(policy.action_normalizer.low, first.actions.min(0))


def test_ranges_are_not_of_the_held_out_episodes(data: Path, tmp_path: Path) -> None:
    bc = replace(BC, validation_share=0.5)
    config = config_of("mse", data, bc=bc, steps=1)
    shown, _ = load_dataset(data).split(0.5, config.seed)
    policy = Policy.from_pretrained(runs.pretrain(config, tmp_path / "run", progress_bar=False).path)
    np.testing.assert_array_equal(policy.observation_normalizer.high, shown.observations.max(0))
    np.testing.assert_array_equal(policy.action_normalizer.low, shown.actions.min(0))


@pytest.mark.parametrize(
    ("kind", "changes", "error", "message"),
    [
        (
            "gmm",
            {"inference": InferenceConfig(solver="ddim")},
            ConfigError,
            "solver = 'ddim': policies of type gmm have none",
        ),
        ("diffusion", {"inference": InferenceConfig(solver="euler")}, ConfigError, "solver = 'euler'"),
        ("diffusion", {"inference": InferenceConfig(num_inference_steps=5)}, ConfigError, "num_inference_steps = 5"),
        ("mse", {"episodes": 4}, ConfigError, "episodes = 4: the data set has 3"),
        ("bet", {"policy": small_config("bet", n_bins=500)}, DatasetError, "chunks of 3 actions make no 500 bins"),
        ("mse", {"device": "warp"}, ConfigError, "device = 'warp'"),
        ("mse", {"bc": replace(BC, validation_share=0.5), "episodes": 1}, DatasetError, "single episode"),
        ("mse", {"bc": replace(BC, pad_after=0), "policy": MSEConfig(horizon=50)}, DatasetError, "horizon of 50"),
    ],
    ids=["solver", "other family", "solver steps", "episodes", "bins", "device", "validation", "horizon"],
)
def test_what_cannot_work_is_refused_before_a_folder_is_made(
    kind: str, changes: dict[str, object], error: type[DprlError], message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        runs.pretrain(replace(config_of(kind, data), **changes), tmp_path / "run", progress_bar=False)
    assert list(tmp_path.iterdir()) == []


def test_evaluations_need_an_environment_that_fits(data: Path, seen: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvError, match="some/env"):
        runs.pretrain(config_of("mse", seen, eval_every=1), tmp_path / "run", progress_bar=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
def test_evaluations_beside_fine_tuning_change_nothing_else(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    cloned = runs.pretrain(config_of("diffusion", data, steps=1), tmp_path / "cloned", progress_bar=False)
    waits = FinetuneConfig(
        str(cloned.path), ENV, total_timesteps=900, n_envs=2, workers=0, eval_every=2, eval_episodes=2,
        dppo=DPPOConfig(tuned_steps=2, n_steps=20),
    )  # fmt: skip
    rows, evaluated = [], []
    for i, config in enumerate((waits, replace(waits, eval_workers=1))):
        runs.finetune(config, tmp_path / str(i), progress_bar=False)
        found = timeless(tmp_path / str(i))
        rows.append([{k: v for k, v in row.items() if not k.startswith("eval/")} for row in found])
        evaluated.append([row["eval/return_mean"] for row in found if "eval/return_mean" in row])
    assert rows[0] == rows[1]
    assert len(rows[0]) > 3
    assert evaluated[1] == evaluated[0]


DENSITIES = ("gaussian", "gmm", "lstm_gmm")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("diffusion", *DENSITIES)])
def test_a_policy_without_a_density_is_not_fine_tuned(kind: str, data: Path, tmp_path: Path) -> None:
    run = runs.pretrain(config_of(kind, data, steps=1), tmp_path / "cloned", progress_bar=False)
    with pytest.raises(ConfigError, match=r"must be a DiffusionPolicy, or a Gaussian or a mixture"):
        runs.finetune(FinetuneConfig(str(run.path), ENV, n_envs=2), tmp_path / "tuned", progress_bar=False)
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize("kind", DENSITIES)
def test_a_density_is_fine_tuned_as_one_step(kind: str, data: Path, tmp_path: Path) -> None:
    run = runs.pretrain(config_of(kind, data, steps=1), tmp_path / "cloned", progress_bar=False)
    config = FinetuneConfig(str(run.path), ENV, n_envs=2, total_timesteps=1, eval_every=0)
    with pytest.raises(ConfigError, match=r"tuned_steps = 10: must be 1: a \w+ policy does not denoise"):
        runs.finetune(config, tmp_path / "tuned", progress_bar=False)
    assert not (tmp_path / "tuned").exists()
    config = replace(config, dppo=DPPOConfig(tuned_steps=1, n_steps=4, n_epochs=1, batch_size=4))
    runs.finetune(config, tmp_path / "tuned", progress_bar=False)
    before, after = (Policy.from_pretrained(tmp_path / name) for name in ("cloned", "tuned"))
    assert type(before) is type(after)
    assert any(not torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))


def test_what_only_dppo_refuses_leaves_no_run_behind(data: Path, tmp_path: Path) -> None:
    run = runs.pretrain(config_of("gmm", data, steps=1), tmp_path / "cloned", progress_bar=False)
    dppo = DPPOConfig(tuned_steps=1, regularizer="kl")
    with pytest.raises(ConfigError, match="regularizer = 'kl'"):
        runs.finetune(FinetuneConfig(str(run.path), ENV, n_envs=2, dppo=dppo), tmp_path / "tuned", progress_bar=False)
    assert not (tmp_path / "tuned").exists()


def test_the_flow_of_the_command_line_is_one(data: Path, tmp_path: Path) -> None:
    config = replace(config_of("diffusion", data, steps=1), policy=FLOW)
    policy = Policy.from_pretrained(runs.pretrain(config, tmp_path / "flow", progress_bar=False).path)
    assert policy.config == FLOW
    policy.check_inference(InferenceConfig("euler", 3))
    with pytest.raises(ConfigError, match="solver = 'ddpm'"):
        policy.check_inference(InferenceConfig("ddpm"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"episodes": 0}, "episodes = 0"),
        ({"eval_every": -1}, "eval_every = -1"),
        ({"seed": -1}, "seed = -1"),
        (
            {"memory_map": True, "bc": BCConfig(num_workers=0)},
            "bc.num_workers = 0: must be at least 1 with memory_map",
        ),
        ({"policy": "gmm"}, "policy = 'gmm'|policy: "),
    ],
    ids=str,
)
def test_a_wrong_config_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PretrainConfig("data", **changes)


def test_a_key_that_a_policy_does_not_have_is_named() -> None:
    """For the class that has the others."""
    stored = json.loads(json.dumps(to_json(PretrainConfig("data", policy=GMMConfig()))))
    stored["policy"]["n_mods"] = stored["policy"].pop("n_modes")
    with pytest.raises(ConfigError, match=r"unknown key 'n_mods' for GMMConfig.*Did you mean n_modes"):
        from_json(PretrainConfig, stored, "run.json")


def test_a_config_that_lacks_a_new_field_is_still_of_its_class() -> None:
    """Runs that were stored before a field existed can be resumed."""
    for kind in KINDS:
        config = small_config(kind)
        whole = json.loads(json.dumps(to_json(PretrainConfig("data", policy=config))))
        for name in ("vision", "n_obs_steps"):
            stored = whole | {"policy": {k: v for k, v in whole["policy"].items() if k != name}}
            assert type(from_json(PretrainConfig, stored, "run.json").policy) is type(config)
    part = {"n_modes": 5, "n_blocks": 2}
    assert GMMConfig() == from_json(PretrainConfig, {"data": "x", "policy": part}, "run.json").policy


def test_collected_data_are_of_the_environment_that_was_asked_for(data: Path) -> None:
    spec = resolve(ENV)
    policy = Policy.kinds["mse"].for_dataset(load_dataset(data), small_config("mse"))
    assert policy.features == Features(spec.observation_size, spec.action_size, (), ENV)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "data"}, "data = 'data': is for the agent idql only"),
        ({"agent": "idql", "dppo": DPPOConfig(n_steps=5)}, "agent = 'idql': must be dppo for the settings of dppo"),
        ({"idql": OnlineIDQLConfig(candidates=5)}, "agent = 'dppo': must be idql for the settings of idql"),
        ({"data_keys": ("a",)}, r"data_keys = \('a',\): is of the data, and none are given"),
        ({"eval_every": 0, "eval_workers": 1}, "eval_workers = 1: must be 0 with eval_every 0"),
    ],
    ids=str,
)
def test_a_wrong_fine_tuning_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig("policy", ENV, **changes)

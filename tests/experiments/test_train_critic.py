"""`dprl train-critic`: runs, what they leave behind, and what is refused before anything starts."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from dprl.agents import DPPOConfig, EnergyConfig, OutcomeConfig
from dprl.agents.prospects import StateValue, prospects
from dprl.checkpoint import load_state
from dprl.cli import main
from dprl.config import from_json
from dprl.data import load_dataset
from dprl.errors import CheckpointError, ConfigError, DatasetError, RunExistsError
from dprl.experiments import plots, runs
from dprl.experiments.runs import CollectConfig, CriticTrainingConfig, FinetuneConfig
from dprl.log import read_metrics
from dprl.policy import ChunkValueConfig, DiffusionConfig, DiffusionPolicy, NoisyChunkValue, Policy
from dprl.policy.base import find_policy
from dprl.spec import resolve
from dprl.training import RunFolder
from dprl.training.loop import InterruptedRunError
from tests.policy.small import small_policy

SMALL = ChunkValueConfig(hidden_size=8, n_layers=1)
OUTCOME = OutcomeConfig(critic=SMALL, batch_size=8, steps_per_iteration=2, validation_every=1)
ENERGY = EnergyConfig(SMALL, samples=3, batch_size=8, steps_per_iteration=2)


def straight(obs: object, actions: object) -> object:
    return actions[..., 0].sum(1)


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "training_curves", lambda run: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("critic") / "data"
    good, bad = CollectConfig("Avoid-v0", noise=0.5, episodes=4), CollectConfig("Avoid-v0", noise=3.0, episodes=4)
    runs.collect(good, folder, more=[bad], progress_bar=False)
    return folder


@pytest.fixture(scope="module")
def policy(data: Path) -> Path:
    config = DiffusionConfig(num_train_timesteps=3, horizon=4)
    policy = DiffusionPolicy.for_dataset(load_dataset(str(data)), config)
    policy.save_pretrained(data.parent / "policy")
    return data.parent / "policy"


def config(data: Path, policy: Path, agent: str, **changes: object) -> CriticTrainingConfig:
    settings = {"outcome": {"outcome": OUTCOME}, "energy": {"energy": ENERGY, "scorer": f"{__name__}:straight"}}[agent]
    return CriticTrainingConfig(str(data), str(policy), **{"agent": agent, "steps": 6, **settings, **changes})


@pytest.mark.parametrize("agent", ["outcome", "energy"])
def test_it_leaves_the_policy_as_it_was_with_what_its_chunks_are_worth(
    agent: str, data: Path, policy: Path, tmp_path: Path
) -> None:
    run = runs.train_critic(config(data, policy, agent), tmp_path / "run", progress_bar=False)
    rows = read_metrics(run.path)
    assert [row["timesteps"] for row in rows] == [0, 2, 4, 6]
    assert f"{agent}/loss" in rows[-1]
    before, after = Policy.from_pretrained(policy), Policy.from_pretrained(run.path)
    assert isinstance(after.scorer, NoisyChunkValue)
    assert before.scorer is None
    assert all(a.equal(b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True))


@pytest.mark.parametrize("agent", ["outcome", "energy"])
def test_interrupted_it_goes_on_as_if_it_had_not_been(agent: str, data: Path, policy: Path, tmp_path: Path) -> None:
    settings = config(data, policy, agent)
    whole = runs.train_critic(settings, tmp_path / "whole", progress_bar=False)
    step = {"outcome": "Outcome", "energy": "Energy"}[agent]
    with pytest.MonkeyPatch.context() as patch:
        kind = getattr(runs, step)
        update = kind.update

        def stopping(self: object, batch: object) -> dict[str, float]:
            signal.raise_signal(signal.SIGINT)
            return update(self, batch)

        patch.setattr(kind, "update", stopping)
        with pytest.raises(InterruptedRunError):
            runs.train_critic(settings, tmp_path / "cut", progress_bar=False)
    cut = runs.resume(tmp_path / "cut", progress_bar=False)
    for name in ("value.safetensors", "model.safetensors"):
        assert (cut.last / name).read_bytes() == (whole.last / name).read_bytes()


def test_the_command_line(data: Path, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--outcome.critic.hidden-size", "8", "--outcome.of", "success", "--quiet", "--steps", "3"]
    out = str(tmp_path / "run")
    assert main(["train-critic", str(data), "--policy", str(policy), "--out", out, *small]) == 0
    assert f"dprl evaluate {out} --candidates 16" in capsys.readouterr().out
    options = ["--episodes", "2", "--json", "--options.max-episode-steps", "8", "--candidates", "3"]
    guided = ["--guide", "critic", "--gradient", "noisy", "--scaling", "score"]
    assert main(["evaluate", out, *options, *guided]) == 0
    assert json.loads(capsys.readouterr().out)["guidance"]["gradient"] == "noisy"


@pytest.fixture(scope="module")
def tuned(policy: Path) -> Path:
    """A run of DPPO."""
    dppo = DPPOConfig(2, n_steps=2, n_epochs=1, batch_size=8, critic_hidden_size=8)
    runs.finetune(
        FinetuneConfig(str(policy), "Avoid-v0", 16, n_envs=2, dppo=dppo, eval_every=0),
        policy.parent / "tuned",
        progress_bar=False,
    )
    return policy.parent / "tuned"


def test_dppos_critic_says_what_follows(data: Path, policy: Path, tuned: Path, tmp_path: Path) -> None:
    run = runs.train_critic(config(data, policy, "outcome", critics=str(tuned)), tmp_path / "run", progress_bar=False)
    learned = Policy.from_pretrained(run.path).scorer
    _, _, about = RunFolder.open(tuned)
    dppo = from_json(FinetuneConfig, about, "").dppo
    state = load_state(find_policy(tuned), "training")
    value = StateValue.of_dppo(Policy.from_pretrained(tuned), dppo, state, resolve("Avoid-v0").reward)
    shown, _ = load_dataset(str(data)).split(OUTCOME.validation_share, 0)
    ahead = prospects(shown, 4, value)
    assert float(learned.mean) == pytest.approx(ahead.mean(), rel=1e-4)
    assert float(learned.std) == pytest.approx(ahead.std(), rel=1e-4)
    (tuned / "checkpoints").rename(tuned / "away")
    try:
        with pytest.raises(CheckpointError, match="holds no policy"):
            runs.train_critic(config(data, policy, "outcome", critics=str(tuned)), tmp_path / "b", progress_bar=False)
    finally:
        (tuned / "away").rename(tuned / "checkpoints")


def test_what_cannot_be_is_refused_before_a_run_is_made(data: Path, policy: Path, tmp_path: Path) -> None:
    small_policy("gaussian").save_pretrained(tmp_path / "gaussian")
    small_policy("diffusion").save_pretrained(tmp_path / "other")
    for changes, error, complaint in (
        ({"agent": "energy", "energy": ENERGY, "outcome": OutcomeConfig(), "scorer": None}, ConfigError, "no critics"),
        ({"policy": str(tmp_path / "gaussian")}, ConfigError, "must be a diffusion policy or flow"),
        ({"policy": str(tmp_path / "other")}, DatasetError, "observation and action numbers"),
        ({"policy": str(tmp_path / "nothing")}, CheckpointError, "holds no policy"),
        ({"episodes": 9}, ConfigError, "the data set has 8"),
        ({"critics": str(policy)}, ConfigError, "critics: the policy has none that were learned"),
        ({"agent": "energy", "energy": ENERGY, "outcome": OutcomeConfig(), "critics": "x"}, ConfigError, "are for the"),
        ({"device": "nowhere"}, ConfigError, "device"),
    ):
        with pytest.raises(error, match=complaint):
            runs.train_critic(replace(config(data, policy, "outcome"), **changes), tmp_path / "run", progress_bar=False)
        assert not (tmp_path / "run").exists()
    with pytest.raises(RunExistsError):
        runs.train_critic(config(data, policy, "outcome"), policy, progress_bar=False)


def test_settings_of_what_is_not_learned_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be energy for the settings of energy"):
        CriticTrainingConfig("data", "policy", energy=ENERGY)
    with pytest.raises(ConfigError, match="must be at least 1 with memory_map"):
        CriticTrainingConfig("data", "policy", memory_map=True, outcome=replace(OUTCOME, num_workers=0))
    with pytest.raises(ConfigError, match="outcomes are learned from the data"):
        CriticTrainingConfig("data", "policy", scorer="a:b")

"""`dprl offline --agent diffuser` and `decision-diffuser`: runs, and how they are evaluated."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dprl.agents import BCConfig, DiffuserConfig, IDQLConfig, OutcomeConfig
from dprl.cli import main
from dprl.errors import ConfigError, DprlError
from dprl.experiments import plots, runs
from dprl.experiments.runs import CollectConfig, OfflineConfig
from dprl.guidance.spec import GuidanceConfig, steering
from dprl.log import read_metrics
from dprl.networks import MLPConfig
from dprl.policy import (
    ChunkValue,
    ChunkValueConfig,
    CriticConfig,
    DiffusionConfig,
    InferenceConfig,
    PlannerConfig,
    Policy,
)

SMALL = PlannerConfig(horizon=4, n_action_steps=2, num_train_timesteps=3, denoiser=MLPConfig(hidden_size=8))
BC = BCConfig(batch_size=8, steps_per_iteration=2)
DIFFUSER = DiffuserConfig(BC, OutcomeConfig(critic=ChunkValueConfig(hidden_size=8, n_layers=1), batch_size=8))
AGENTS = {
    "diffuser": {"policy": SMALL, "diffuser": DIFFUSER},
    "decision-diffuser": {
        "policy": replace(SMALL, denoised="states", command="return", inverse_size=8),
        "decision_diffuser": BC,
    },
}
MAZE = "PointMaze-Halves-Pieces-v0"


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "training_curves", lambda run: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planning") / "data"
    runs.collect(CollectConfig(MAZE, episodes=12, noise=0.3), folder, progress_bar=False)
    return folder


def config(data: Path, agent: str, **changes: object) -> OfflineConfig:
    return OfflineConfig(str(data), agent=agent, **({"steps": 6} | AGENTS[agent] | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def critics(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("critics") / "run"
    policy = DiffusionConfig(num_train_timesteps=2, denoiser=MLPConfig(hidden_size=8))
    idql = IDQLConfig(BC, critic=CriticConfig(hidden_size=8), batch_size=8)
    runs.offline(OfflineConfig(str(data), policy, steps=2, idql=idql), folder, progress_bar=False)
    return folder


@pytest.mark.parametrize(
    ("agent", "judged"), [("diffuser", False), ("decision-diffuser", False), ("decision-diffuser", True)]
)
def test_a_run_is_resumed_exactly_and_evaluated_as_it_acts(
    agent: str, judged: bool, data: Path, critics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(data, agent, critics=str(critics) if judged else None, eval_every=2, eval_episodes=2)
    whole = runs.offline(settings, tmp_path / "whole", progress_bar=False)
    rows = read_metrics(whole.path)
    assert [row["timesteps"] for row in rows] == [0, 2, 4, 6]
    assert "eval/success_rate" in rows[-1]
    with monkeypatch.context() as stopped:
        stopped.setattr("dprl.agents.bc.BC.metrics", _stop_in_the_second())
        with pytest.raises(KeyboardInterrupt):
            runs.offline(replace(settings, checkpoint_every=1), tmp_path / "part", progress_bar=False)
    runs.resume(tmp_path / "part", progress_bar=False)
    ours, theirs = (Policy.from_pretrained(tmp_path / name / "checkpoints" / "last") for name in ("whole", "part"))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert isinstance(ours.scorer, ChunkValue) == (agent == "diffuser")


def _stop_in_the_second():
    from dprl.agents import BC as Cloning

    usual, seen = Cloning.metrics, []

    def metrics(self, losses):
        seen.append(losses)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return usual(self, losses)

    return metrics


@pytest.mark.parametrize(
    ("agent", "policy", "steering"),
    [
        ("diffuser", "planner", " --candidates 16 --guide critic --gradient noisy"),
        ("decision-diffuser", "state-planner", " --temperature 0.5 --command 1.0"),
    ],
)
def test_the_command_says_how_the_policy_is_evaluated(
    agent: str, policy: str, steering: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    small = ["--policy.horizon", "4", "--policy.n-action-steps", "2", "--policy.num-train-timesteps", "2"]
    assert main(["offline", str(data), "--agent", agent, "--steps", "2", "--out", out, "--quiet", policy, *small]) == 0
    told = capsys.readouterr().out
    assert steering in told
    command = re.search(r"dprl (evaluate .*)", told)
    assert command is not None
    options = ["--env", "PointMaze-Halves-v0", "--episodes", "2", "--options.max-episode-steps", "8"]
    assert main([*command[1].split(), *options]) == 0
    assert "PointMaze-Halves-v0" in capsys.readouterr().out


def test_how_they_act() -> None:
    assert config(Path("data"), "diffuser").acting == InferenceConfig(candidates=16)
    assert config(Path("data"), "diffuser").steering.gradient == "noisy"
    assert config(Path("data"), "decision-diffuser").acting == InferenceConfig(temperature=0.5)
    assert config(Path("data"), "decision-diffuser").steering.command == (1.0,)
    assert OfflineConfig("data").steering == GuidanceConfig()


@pytest.mark.parametrize(
    ("agent", "changes", "message"),
    [
        ("diffuser", {"policy": DiffusionConfig()}, "policy = 'DiffusionConfig': must be planner: diffuser plans"),
        ("decision-diffuser", {"policy": SMALL}, "must be a planner that denoises states"),
        ("decision-diffuser", {"critics": "nowhere"}, "nowhere"),
        ("diffuser", {"decision_diffuser": BCConfig(batch_size=3)}, "must be another for the settings of decision_dif"),
        ("decision-diffuser", {"diffuser": DIFFUSER}, "must be another for the settings of diffuser"),
    ],
)
def test_bad_settings_are_refused(
    agent: str, changes: dict[str, object], message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(DprlError, match=message):
        runs.offline(config(data, agent, **changes), tmp_path / "run", progress_bar=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("agent", ["idql", "diffuser"])
def test_critics_are_for_the_one_that_is_told(agent: str) -> None:
    policy = {} if agent == "idql" else {"policy": SMALL}
    with pytest.raises(ConfigError, match="critics = 'x': are for decision-diffuser; others take theirs when they act"):
        OfflineConfig("data", agent=agent, critics="x", **policy)


def test_a_run_goes_on_though_its_critics_were_moved(data: Path, critics: Path, tmp_path: Path) -> None:
    shutil.copytree(critics, tmp_path / "critics")
    settings = config(data, "decision-diffuser", critics=str(tmp_path / "critics"))
    runs.offline(settings, tmp_path / "run", progress_bar=False)
    (tmp_path / "critics").rename(tmp_path / "moved")
    runs.run_or_resume(replace(settings, critics=str(tmp_path / "moved")), tmp_path / "run", progress_bar=False)


def test_critics_of_other_chunks_are_refused_and_those_of_actions_judge_plans(
    data: Path, critics: Path, tmp_path: Path
) -> None:
    """By their first actions."""
    small = {}
    for name, agent, changes in (
        ("rows", "diffuser", {}),
        ("longer", "diffuser", {"policy": replace(SMALL, horizon=5)}),
        ("states", "decision-diffuser", {}),
    ):
        runs.offline(config(data, agent, **changes), tmp_path / name, progress_bar=False)
        small[name] = Policy.from_pretrained(tmp_path / name)
    cloned, rows = Policy.from_pretrained(critics), small["rows"]
    for policy, spec, gradient in (
        (cloned, tmp_path / "rows", "held"),
        (small["longer"], tmp_path / "rows", "held"),
        (small["states"], tmp_path / "rows", "noisy"),
    ):
        with pytest.raises(ConfigError, match="its critics are of"):
            steering(GuidanceConfig(guide=str(spec), gradient=gradient), policy)
    obs = torch.zeros(2, 1, rows.features.observation_size) + 2
    judged = steering(GuidanceConfig(guide=str(critics), scorer=str(critics)), rows)
    plans = rows.sample(obs, guide=judged.guide, candidates=2, scorer=judged.scorer)
    assert torch.equal(judged.scorer.score(obs, plans), judged.scorer.score(obs, rows.act(plans)))
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "rows", other)
    with torch.no_grad():
        rows.observation_normalizer.high.add_(1.0)
        rows.observation_normalizer._refresh()
    with pytest.raises(ConfigError, match="its critics are of range of chunks"):
        steering(GuidanceConfig(guide=str(other), gradient="noisy"), rows)

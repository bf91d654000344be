"""`dprl offline`: runs, what they leave behind, and what is refused before anything starts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dprl.agents import BCConfig, DiffusionQLConfig, IDQLConfig, OnlineIDQLConfig
from dprl.cli import main
from dprl.data import save_dataset
from dprl.errors import ConfigError, DatasetError, EnvError
from dprl.experiments import plots, runs
from dprl.experiments.runs import CollectConfig, FinetuneConfig, OfflineConfig
from dprl.log import read_metrics
from dprl.networks import LNResNetConfig
from dprl.policy import ChunkCritic, CriticConfig, DiffusionConfig, Features, GaussianConfig, InferenceConfig, Policy
from dprl.spec import EnvOptions, EnvSpec
from tests.policy.small import random_episodes

IDQL = IDQLConfig(BCConfig(batch_size=8, steps_per_iteration=2), critic=CriticConfig(hidden_size=8), batch_size=8)
POLICY = DiffusionConfig(num_train_timesteps=3, schedule="vp", denoiser=LNResNetConfig(hidden_size=8, n_blocks=1))


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "training_curves", lambda run: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offline") / "data"
    options = EnvOptions(max_episode_steps=12)
    runs.collect(CollectConfig("Avoid-v0", episodes=3, options=options), folder, progress_bar=False)
    return folder


def config(data: Path, **changes: object) -> OfflineConfig:
    return OfflineConfig(str(data), **({"policy": POLICY, "steps": 6, "idql": IDQL} | changes))


def test_a_run_evaluates_with_candidates_and_leaves_a_policy_with_critics(data: Path, tmp_path: Path) -> None:
    settings = config(data, eval_every=1, eval_episodes=2, inference=InferenceConfig(candidates=3))
    run = runs.offline(settings, tmp_path / "run", progress_bar=False)
    rows = read_metrics(run.path)
    assert [row["timesteps"] for row in rows] == [0, 2, 4, 6]
    assert all("eval/success_rate" in row for row in rows)
    assert {"idql/q_loss", "idql/value_loss", "bc/loss"} <= rows[-1].keys()
    assert isinstance(Policy.from_pretrained(run.path).scorer, ChunkCritic)


def test_a_policy_of_any_kind(data: Path, tmp_path: Path) -> None:
    arguments = ["--quiet", "--steps", "2", "--idql.bc.steps-per-iteration", "2", "--idql.critic.hidden-size", "8"]
    small = ["gaussian", "--policy.hidden-size", "8"]
    assert main(["offline", str(data), "--out", str(tmp_path / "run"), *arguments, *small]) == 0
    assert Policy.from_pretrained(tmp_path / "run").name == "gaussian"


def test_evaluate_takes_candidates(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.offline(config(data), tmp_path / "run", progress_bar=False)
    capsys.readouterr()
    options = ["--env", "Avoid-v0", "--episodes", "2", "--json", "--options.max-episode-steps", "8"]
    assert main(["evaluate", str(tmp_path / "run"), *options, "--candidates", "4", "--selection", "implicit"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["inference"]["candidates"] == 4
    assert shown["episodes"] == 2


def test_critics_of_other_actions_than_are_executed_are_told_of(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.offline(config(data), tmp_path / "run", progress_bar=False)
    options = ["--episodes", "1", "--json", "--options.max-episode-steps", "4", "--candidates", "2"]
    for more, told in (([], False), (["--n-action-steps", "2"], True)):
        capsys.readouterr()
        assert main(["evaluate", str(tmp_path / "run"), *options, *more]) == 0
        assert ("the critics judge 4 actions of a chunk, and 2 are executed" in capsys.readouterr().err) == told


def test_by_default_it_is_the_papers_behaviour_policy() -> None:
    usual = OfflineConfig("data")
    assert usual.policy == DiffusionConfig(num_train_timesteps=5, schedule="vp", denoiser=LNResNetConfig())
    assert usual.acting == InferenceConfig(candidates=64)


def test_data_of_an_unknown_environment_are_evaluated_where_it_is_said(tmp_path: Path) -> None:
    spec = EnvSpec("some/env", "", "", 2, (-1.0,) * 2, (1.0,) * 2, 10)
    save_dataset(replace(random_episodes(Features(2, 2)), env_id=None), tmp_path / "data", spec)
    metadata = tmp_path / "data" / "data" / "metadata.json"
    metadata.write_text(metadata.read_text().replace('"some/env"', "null"))
    (tmp_path / "data" / "manifest.json").unlink()
    settings = config(tmp_path / "data", eval_every=3, eval_episodes=2)
    with pytest.raises(ConfigError, match="eval_every: the data set does not say which environment"):
        runs.offline(settings, tmp_path / "run", progress_bar=False)
    assert not (tmp_path / "run").exists()
    run = runs.offline(replace(settings, env="Avoid-v0"), tmp_path / "run", progress_bar=False)
    assert "eval/success_rate" in read_metrics(run.path)[-1]


def test_data_without_rewards_are_refused_before_a_run_is_made(tmp_path: Path) -> None:
    spec = EnvSpec("some/env", "", "", 3, (-1.0,) * 2, (1.0,) * 2, 10)
    bare = replace(random_episodes(), rewards_from="none", rewards=np.zeros(28, np.float32))
    save_dataset(bare, tmp_path / "data", spec)
    with pytest.raises(DatasetError, match=f"'{tmp_path / 'data'}': .* neither rewards nor success"):
        runs.offline(config(tmp_path / "data"), tmp_path / "run", progress_bar=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"eval_every": -1}, "eval_every = -1"),
        (
            {"memory_map": True, "idql": IDQLConfig(BCConfig(num_workers=0))},
            "idql.bc.num_workers = 0: must be at least 1",
        ),
        ({"agent": "diffusion-ql"}, "agent = 'diffusion-ql': must be another for the settings of idql"),
        (
            {"diffusion_ql": DiffusionQLConfig(eta=2.0)},
            "agent = 'idql': must be another for the settings",
        ),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(Path("data"), **changes)


@pytest.mark.parametrize(
    ("agent", "inference"),
    [
        ("idql", InferenceConfig(candidates=64)),
        ("iql", InferenceConfig(temperature=0.0)),
        ("diffusion-ql", InferenceConfig(candidates=50, selection="softmax")),
    ],
)
def test_every_agent_is_evaluated_as_it_acts(agent: str, inference: InferenceConfig) -> None:
    settings = runs.OfflineConfig("data", agent=agent)  # type: ignore[arg-type]
    assert settings.acting == inference
    asked = InferenceConfig(candidates=3)
    acting = replace(settings, inference=asked).acting
    assert (acting.candidates, acting.selection) == (3, None)
    fewer = replace(settings, inference=InferenceConfig(num_inference_steps=2)).acting
    assert fewer == replace(inference, num_inference_steps=2)


def test_the_env_is_the_policys_own_unless_another_is_given(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["offline", str(data), "--steps", "2", "--out", str(tmp_path / "run"), "--quiet", "mlp"]) == 0
    told = capsys.readouterr().out
    assert f"dprl evaluate {tmp_path / 'run'} --candidates 64" in told
    assert "--env" not in told
    options = ["--episodes", "2", "--options.max-episode-steps", "8", "--candidates", "64"]
    assert main(["evaluate", str(tmp_path / "run"), *options]) == 0
    assert "on Avoid-v0" in capsys.readouterr().out


def test_an_env_that_does_not_exist_is_refused_even_if_nothing_is_evaluated(data: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvError, match=r"Avod-v0.*Did you mean Avoid-v0"):
        runs.offline(config(data, env="Avod-v0"), tmp_path / "run", progress_bar=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("idql", "acting"),
    [
        (OnlineIDQLConfig(), InferenceConfig(candidates=64, selection="argmax")),
        (OnlineIDQLConfig(actor="continues"), InferenceConfig(candidates=64, selection="implicit")),
        (OnlineIDQLConfig(candidates=1), InferenceConfig(candidates=1)),
    ],
)
def test_online_it_is_evaluated_as_it_acts(idql: OnlineIDQLConfig, acting: InferenceConfig) -> None:
    assert FinetuneConfig("policy", "Avoid-v0", agent="idql", idql=idql).acting == acting


def test_what_the_policy_does_not_have_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="solver = 'euler'"):
        runs.offline(
            config(data, inference=InferenceConfig("euler", candidates=2)), tmp_path / "run", progress_bar=False
        )
    assert not (tmp_path / "run").exists()


def test_iql_with_a_policy_that_draws_nothing(data: Path, tmp_path: Path) -> None:
    small = ["--steps", "2", "--eval-every", "1", "--eval-episodes", "1", "--idql.bc.steps-per-iteration", "1"]
    arguments = ["offline", str(data), "--agent", "iql", "--quiet", *small, "--out", str(tmp_path / "run")]
    assert main([*arguments, "mse", "--policy.hidden-size", "8"]) == 0
    assert Policy.from_pretrained(tmp_path / "run").name == "mse"


def test_iqls_candidates_differ() -> None:
    asked = InferenceConfig(candidates=8)
    assert OfflineConfig("data", GaussianConfig(), agent="iql", inference=asked).acting == asked
    assert OfflineConfig("data", GaussianConfig(), agent="iql").acting == InferenceConfig(temperature=0.0)


def test_too_few_steps_to_learn_anything_online_are_refused(data: Path, tmp_path: Path) -> None:
    runs.offline(config(data), tmp_path / "run", progress_bar=False)
    short = FinetuneConfig(str(tmp_path / "run"), "Avoid-v0", total_timesteps=1_000, agent="idql", n_envs=4, workers=0)
    with pytest.raises(ConfigError, match="total_timesteps = 1000: are about 250 decisions; nothing is learned before"):
        runs.finetune(short, tmp_path / "short", progress_bar=False)
    assert not (tmp_path / "short").exists()


def test_a_policy_and_data_of_another_environment_are_told(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs.offline(config(data), tmp_path / "run", progress_bar=False)
    here = FinetuneConfig(
        str(tmp_path / "run"), "PointMaze-Halves-v0", total_timesteps=8, agent="idql", n_envs=4, workers=0,
        idql=OnlineIDQLConfig(start_decisions=1, candidates=2), eval_every=0, data=str(data),
    )  # fmt: skip
    runs.finetune(here, tmp_path / "tuned", progress_bar=False)
    for which in ("the policy learned in", "the data are from"):
        assert f"{which} Avoid-v0, not PointMaze-Halves-v0" in caplog.text

"""Offline learning in studies: that it is run, continued and compared as it says. What it learns is in docs/results."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dprl.agents import BCConfig, DPPOConfig, IDQLConfig
from dprl.data import load_dataset
from dprl.errors import ConfigError, RunExistsError
from dprl.experiments import offline, plots, runs, studies
from dprl.experiments.offline import References
from dprl.experiments.runs import CollectConfig, Seen
from dprl.experiments.studies import Outcome, StudyConfig, run_cells
from dprl.networks import LNResNetConfig, MLPConfig
from dprl.policy import ChunkCritic, CriticConfig, DiffusionConfig, GaussianPolicy, Policy, find_policy
from tests.experiments.test_finetuning import outcome

TINY = offline.Recipe(
    (CollectConfig("PointMaze-Halves-Pieces-v0", noise=0.3, episodes=12),),
    steps=3,
    idql=IDQLConfig(
        BCConfig(batch_size=8, steps_per_iteration=3), critic=CriticConfig(hidden_size=8, n_layers=1), batch_size=8
    ),
    env="PointMaze-Halves-v0",
    policy=DiffusionConfig(num_train_timesteps=2, schedule="vp", denoiser=MLPConfig(hidden_size=8)),
)


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "training_curves", lambda run: None)
    monkeypatch.setattr(offline, "CANDIDATES", (1, 64))


def changed_at(out: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in sorted(out.rglob("*.json"))}


def test_a_study_is_run_written_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "MAZES", {"halves": TINY})
    config = StudyConfig(tmp_path / "out", seeds=(0,), episodes=2)
    page = offline.on_mazes(config, progress_bar=False)
    text = page.read_text()
    assert all(f"| halves | {shown} |" in text for shown in offline.METHODS.values())
    assert page.with_suffix(".png").stat().st_size > 1_000
    made = changed_at(config.out)
    offline.on_mazes(config, progress_bar=False)
    assert changed_at(config.out) == made
    kinds = {name: Policy.from_pretrained(config.out / "runs" / f"halves.{name}.seed0") for name in ("idql", "iql")}
    assert isinstance(kinds["iql"], GaussianPolicy)
    assert isinstance(kinds["idql"].scorer, ChunkCritic)
    kept = json.loads((config.out / "runs/halves.filtered.seed0/run.json").read_text())["config"]
    assert kept["best"] == offline.BEST
    learned = json.loads((config.out / "runs/halves.diffusion-ql.seed0/run.json").read_text())
    folders = {name: find_policy(config.out / f"runs/halves.{name}.seed0") for name in ("idql", "iql", "diffusion-ql")}
    assert {json.loads((f / "agent.json").read_text())["agent"] for f in folders.values()} == set(folders)
    data = load_dataset(kept["data"])
    used = Policy.from_pretrained(config.out / "runs/halves.filtered.seed0").observation_normalizer
    assert torch.equal(used.low, torch.as_tensor(data.best(offline.BEST).limits("observations")[0]))
    assert not torch.equal(used.low, kinds["idql"].observation_normalizer.low)
    assert (learned["kind"], learned["config"]["agent"], learned["config"]["steps"]) == ("offline", "diffusion-ql", 3)


def test_learning_with_other_settings_is_not_taken_for_this(tmp_path: Path) -> None:
    config = StudyConfig(tmp_path / "out", seeds=(0,), episodes=2)
    cell = offline.cells_of({"halves": TINY}, config)[0]
    run_cells([cell], config, progress_bar=False)
    other = replace(cell, offline=replace(cell.offline, idql=replace(TINY.idql, gamma=0.5)))
    with pytest.raises(ConfigError, match=r"gamma = 0.99, not 0.5"):
        run_cells([other], config, progress_bar=False)
    (config.out / "cells" / f"{cell.name}.json").unlink()  # then the run itself says
    with pytest.raises(ConfigError, match=r"gamma = 0.99, not 0.5"):
        run_cells([other], config, progress_bar=False)
    assert len(run_cells([cell], config, progress_bar=False)) == 2


def test_looks_are_where_the_task_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    evaluate = studies.evaluate
    monkeypatch.setattr(
        studies, "evaluate", lambda policy, spec, *a, **k: seen.append(spec.id) or evaluate(policy, spec, *a, **k)
    )
    config = StudyConfig(tmp_path / "out", seeds=(0,), episodes=1)
    run_cells(offline.cells_of({"halves": TINY}, config)[:1], config, progress_bar=False)
    assert seen == ["PointMaze-Halves-v0"] * 2


def test_episodes_of_several_demonstrators_are_put_together(tmp_path: Path) -> None:
    mixed = replace(TINY, sources=tuple(replace(TINY.sources[0], noise=n, episodes=k) for n, k in ((0.0, 4), (1.0, 3))))
    config = StudyConfig(tmp_path / "out", seeds=(0,), episodes=1)
    alone, together = (offline.cells_of({"halves": recipe}, config)[1] for recipe in (TINY, mixed))
    folders = {studies._data_folder(config, c.collect, c.more) for c in (alone, together)}
    assert len(folders) == 2
    data = runs.collect(together.collect, tmp_path / "data", more=together.more, progress_bar=False)
    assert data.n_episodes == 7
    with pytest.raises(ConfigError, match="env = 'Avoid-v0': must be PointMaze"):
        runs.collect(together.collect, tmp_path / "other", more=[CollectConfig("Avoid-v0")], progress_bar=False)


def test_going_on_online_uses_data_critics_and_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "ONLINE", ("push",))
    monkeypatch.setattr(offline, "ONLINE_STEPS", 8)
    collect = (CollectConfig("metaworld/push-v3", noise=0.5, episodes=2, options=TINY.sources[0].options),)
    monkeypatch.setattr(offline, "metaworld", lambda task: replace(TINY, sources=collect, env=None))
    config = StudyConfig(tmp_path / "out", seeds=(0,), episodes=1)
    cells = [
        replace(
            cell,
            finetune=cell.finetune
            and replace(
                cell.finetune,
                n_envs=2, eval_every=1, eval_episodes=1,
                **{
                    "idql": {"idql": replace(cell.finetune.idql, n_steps=2, start_decisions=1, candidates=2)},
                    "dppo": {"dppo": DPPOConfig(tuned_steps=2, n_steps=2, batch_size=4, n_epochs=1)},
                }[cell.finetune.agent],
            ),
        )
        for cell in offline.online_cells(config)
    ]  # fmt: skip
    monkeypatch.setattr(offline, "online_cells", lambda config: cells)
    text = offline.to_online(config, progress_bar=False).read_text()
    assert all(f"| push | {shown} |" in text for shown in offline.WAYS.values())
    for name in ("frozen", "continues"):
        kept = json.loads((config.out / f"runs/push.{name}.seed0/run.json").read_text())["config"]
        assert Path(kept["data"]).is_dir()
        assert kept["idql"]["actor"] == name
    made = changed_at(config.out)
    offline.to_online(config, progress_bar=False)
    assert changed_at(config.out) == made


def test_mujocos_data_sets_follow_the_recipe() -> None:
    medium, replay, both = (
        offline.mujoco("Hopper-v5", kind, ["step-1", "step-2"], offline.SINGLE) for kind in offline.KINDS
    )
    assert [s.expert for s in medium.sources] == ["experts/Hopper-v5/medium.zip"]
    assert [s.expert.rsplit("/")[-1] for s in replay.sources] == ["step-1.zip", "step-2.zip"]
    assert [s.expert.rsplit("/")[-1] for s in both.sources] == ["medium.zip", "expert.zip"]
    transitions = [sum(s.transitions or 0 for s in recipe.sources) for recipe in (medium, replay, both)]
    assert transitions == [100_000, 100_000, 200_000]


def test_the_papers_size_is_d4rls_and_the_papers() -> None:
    config = StudyConfig(Path("unused"), seeds=(0,), paper=True)
    cells = offline.cells_of({"x": offline.mujoco("Hopper-v5", "medium", (), offline.PAPER)}, config)
    assert {c.collect.transitions for c in cells} == {1_000_000}
    idql, _filtered, iql, _ql = cells
    assert isinstance(idql.pretrain.policy, DiffusionConfig)
    assert isinstance(idql.pretrain.policy.denoiser, LNResNetConfig)
    assert {c.pretrain.policy.n_action_steps for c in cells} == {1}
    assert idql.offline is not None
    assert (idql.pretrain.steps, idql.offline.idql.batch_size, idql.offline.idql.return_range) == (3_000_000, 512, 1000)
    assert iql.pretrain.policy.hidden_size == 256


def test_forerunners_are_those_up_to_the_medium_one(tmp_path: Path) -> None:
    pytest.importorskip("stable_baselines3")
    seen = [Seen(100 * i, float(i), r, 1.0) for i, r in enumerate((1.0, 30.0, 60.0, 90.0))]
    (tmp_path / "returns.json").write_text(json.dumps([vars(s) for s in seen]))
    assert [s.timesteps for s in runs.forerunners(tmp_path)] == [0, 100]


def test_scores_are_normalised_between_the_references() -> None:
    found = offline.normalised(outcome("x", return_mean=60.0, return_error=4.0), References(random=20.0, expert=100.0))
    assert (found.return_mean, found.return_error) == pytest.approx((50.0, 5.0))


def test_the_return_of_random_actions_is_that_of_an_episode() -> None:
    pytest.importorskip("envpool")
    found = offline.random_return("Hopper-v5", episodes=20)
    assert 5 < found < 40  # D4RL's reference is 18 to 20 there, of Hopper-v2
    assert found == offline.random_return("Hopper-v5", episodes=20)


def test_all_of_mujoco_is_tabled_with_its_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without training anything."""
    monkeypatch.setattr(
        offline, "demonstrators_of", lambda *a, **k: (Seen(9, 1.0, 3_000.0, 1.0), Seen(3, 0.5, 1_000.0, 1.0))
    )
    monkeypatch.setattr(runs, "forerunners", lambda out: [Seen(1, 0.1, 300.0, 1.0), Seen(3, 0.5, 1_000.0, 1.0)])
    monkeypatch.setattr(offline, "random_return", lambda env: 0.0)

    def pretend(cells: list[studies.Cell], config: StudyConfig, *, progress_bar: bool) -> list[Outcome]:
        return [
            replace(outcome(cell.name), look=look.name, return_mean=1_500.0, return_error=30.0)
            for cell in cells
            for look in cell.looks
        ]

    monkeypatch.setattr(offline, "run_cells", pretend)
    page = offline.on_all_of_mujoco(StudyConfig(tmp_path, seeds=(0, 1)), progress_bar=False)
    text = page.read_text()
    assert "| hopper-medium-replay | IDQL, N = 64 | 50 (" in text
    assert "medium-replay is of 2 policies" in text
    assert (text.count(offline.CHUNKS[:-1]), text.count("Decisions are single actions; ")) == (1, 2)
    assert "| mean | BC | 50.00 |" in text
    assert sum("| 50 (" in line for line in text.splitlines()) == 9 * len(offline.METHODS)


class CollectingError(Exception):
    """It came as far as the data."""


def test_an_expert_is_trained_in_a_new_folder_and_then_its_data_are_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of a real run: what is trained first is no stranger in the study's folder."""
    trained = []

    def train_expert(expert: runs.ExpertConfig, out: Path, *, progress_bar: bool) -> tuple[Seen, Seen]:
        (out / "checkpoints").mkdir(parents=True)
        (out / "medium.zip").touch()
        trained.append(expert.env)
        return Seen(9, 1.0, 3_000.0, 1.0), Seen(3, 0.5, 1_000.0, 1.0)

    def collect(config: CollectConfig, *args: object, **kwargs: object) -> None:
        raise CollectingError(config.expert)

    monkeypatch.setattr(runs, "train_expert", train_expert)
    monkeypatch.setattr(runs, "forerunners", lambda out: [Seen(3, 0.5, 1_000.0, 1.0)])
    monkeypatch.setattr(runs, "collect", collect)
    monkeypatch.setattr(offline, "random_return", lambda env: 0.0)
    config = StudyConfig(tmp_path / "new", seeds=(0,))
    with pytest.raises(CollectingError, match=r"new/experts/Hopper-v5/medium\.zip"):
        offline.on_hopper(config, progress_bar=False)
    assert trained == ["Hopper-v5"]


def test_a_folder_that_is_none_of_a_study_is_refused_before_an_expert_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "train_expert", lambda *_, **__: pytest.fail("it was trained"))
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunExistsError, match="not empty"):
        offline.on_hopper(StudyConfig(tmp_path, seeds=(0,)), progress_bar=False)

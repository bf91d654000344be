"""Fine-tuning in studies: that it is run, continued and compared as it says. What it learns is in docs/results."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dprl.agents import DPPOConfig
from dprl.errors import ConfigError, DprlError
from dprl.experiments import ablations, finetuning, plots, runs, studies
from dprl.experiments.runs import CollectConfig, FinetuneConfig, PretrainConfig, Seen
from dprl.experiments.studies import Cell, Look, Outcome, StudyConfig, run_cells, tuned
from dprl.mdp import mdp_of
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features, InferenceConfig, Policy

CLONING = PretrainConfig("", DiffusionConfig(num_train_timesteps=2), steps=2)
BASE = Cell("cloned", CollectConfig("Avoid-v0", episodes=3), CLONING, (Look("default", episodes=2),))
DPPO = DPPOConfig(tuned_steps=2, n_steps=4, n_epochs=1, batch_size=8)
TUNED = tuned(BASE, "tuned", FinetuneConfig("", "Avoid-v0", 20, n_envs=2, dppo=DPPO, eval_every=1, eval_episodes=2))


def outcome(cell: str, success: float = math.nan, **changes: float) -> Outcome:
    return replace(Outcome(cell, "default", success, 100, 1.0, 60.0, 1_000, "a laptop", 0.0, 0.0, 1_000), **changes)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "out"
    run_cells([BASE, TUNED], StudyConfig(out), progress_bar=False)
    return out


def test_a_cell_fine_tunes_the_policy_of_another(done: Path) -> None:
    cloned, fine_tuned = (Policy.from_pretrained(done / "runs" / name) for name in ("cloned", "tuned"))
    assert isinstance(cloned, DiffusionPolicy)
    assert isinstance(fine_tuned, DiffusionPolicy)
    assert fine_tuned.tuned_below == 2
    rows = [json.loads(line) for line in (done / "runs/tuned/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["timesteps"] >= 20
    assert (done / "cells/tuned.json").is_file()
    curve = [json.loads(line) for line in (done / "cells/tuned.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if "eval/return_mean" in row]
    assert curve
    assert [(r["timesteps"], r["eval/return_mean"]) for r in curve] == [
        (r["timesteps"], r["eval/return_mean"]) for r in evaluated
    ]
    assert not any(name.startswith("dppo/") for row in curve for name in row)


def test_a_lost_curve_is_written_anew(done: Path) -> None:
    file = done / "cells/tuned.jsonl"
    before = file.read_text()
    file.unlink()
    run_cells([BASE, TUNED], StudyConfig(done), progress_bar=False)
    assert file.read_text() == before


def test_outcomes_tell_of_returns_and_steps(done: Path) -> None:
    before, after = run_cells([BASE, TUNED], StudyConfig(done), progress_bar=False)
    assert before.timesteps == 2
    assert after.timesteps >= 20
    assert 0 <= after.success <= 1
    assert math.isfinite(after.return_mean)
    assert after.return_error >= 0


def test_other_settings_are_refused(done: Path) -> None:
    assert TUNED.finetune is not None
    other = replace(TUNED, finetune=replace(TUNED.finetune, n_envs=3))
    with pytest.raises(ConfigError, match=r"finetune\.n_envs = 2, not 3"):
        run_cells([BASE, other], StudyConfig(done), progress_bar=False)
    (done / "cells/tuned.json").rename(done / "aside.json")
    try:
        with pytest.raises(ConfigError, match="n_envs = 2, not 3"):
            run_cells([BASE, other], StudyConfig(done), progress_bar=False)
    finally:
        (done / "aside.json").rename(done / "cells/tuned.json")


def test_settings_that_were_added_later_have_their_defaults(done: Path) -> None:
    file = done / "cells/tuned.json"
    text = file.read_text()
    for path, value in ((("dppo", "gae_lambda"), 0.95), (("inference",), None)):
        result = json.loads(text)
        settings = result["settings"]["finetune"]
        for name in path[:-1]:
            settings = settings[name]
        assert value is None or settings[path[-1]] == value
        del settings[path[-1]]
        file.write_text(json.dumps(result))
        assert len(run_cells([BASE, TUNED], StudyConfig(done), progress_bar=False)) == 2
    assert TUNED.finetune is not None
    other = replace(TUNED, finetune=replace(TUNED.finetune, inference=InferenceConfig(temperature=0.5)))
    with pytest.raises(ConfigError, match=r"inference.temperature = 1.0, not 0.5"):
        run_cells([BASE, other], StudyConfig(done), progress_bar=False)
    file.write_text(text)


def test_a_study_may_be_moved(done: Path) -> None:
    moved = done.rename(done.with_name("moved"))
    try:
        assert len(run_cells([BASE, TUNED], StudyConfig(moved), progress_bar=False)) == 2
    finally:
        moved.rename(done)


def test_what_cannot_be_fine_tuned_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    assert TUNED.finetune is not None
    impossible = replace(TUNED, name="bad", finetune=replace(TUNED.finetune, dppo=replace(DPPO, tuned_steps=3)))
    with pytest.raises(DprlError, match=r"1 of 3 cells failed(.|\n)*bad: tuned_steps = 3"):
        run_cells([BASE, impossible, TUNED], StudyConfig(tmp_path / "out"), progress_bar=False)
    assert (tmp_path / "out/cells/tuned.json").is_file()


def test_fine_tuning_scales_with_the_study(tmp_path: Path) -> None:
    scaled = studies._scaled(TUNED, StudyConfig(tmp_path, scale=0.5))
    assert scaled.finetune is not None
    assert (scaled.pretrain.steps, scaled.finetune.total_timesteps) == (1, 10)


# ----------------------------------------------------------------------------------------------- what is in the studies


def of_group(name: str, *, paper: bool = False) -> list[Cell]:
    return finetuning.cells_of(finetuning.GROUPS[name], StudyConfig(Path("unused"), seeds=(0, 1), paper=paper))


GROUPS = [*((name, False) for name in finetuning.GROUPS), *((name, True) for name in finetuning.PAPER)]


@pytest.mark.parametrize(("name", "paper"), GROUPS)
def test_every_fine_tuning_of_a_group_can_be_one(name: str, paper: bool) -> None:
    check_cells(of_group(name, paper=paper))


def test_every_ablation_can_be_run() -> None:
    cells = ablations.cells(StudyConfig(Path("unused"), seeds=(0, 1)))
    check_cells(cells)
    assert len({json.dumps(studies._settings(replace(c, name="", base=None))) for c in cells}) == len(cells)
    rows = {choice: [v for v in ablations.variants() if v.choice == choice] for choice in ablations.USUAL_VALUES}
    assert all(rows.values())


def check_cells(cells: list[Cell]) -> None:
    names = [c.name for c in cells]
    assert len(set(names)) == len(names)
    for c in cells:
        if c.finetune is None:
            assert c.base is None
            continue
        base = next(b for b in cells if b.name == c.base)
        assert names.index(base.name) < names.index(c.name)
        assert (base.collect, base.pretrain) == (c.collect, c.pretrain)
        assert c.finetune.env == c.collect.env
        assert c.finetune.seed == c.pretrain.seed == c.collect.seed
        kind = next(kind for kind in Policy.kinds.values() if kind.config_class is type(c.pretrain.policy))
        dppo = c.finetune.dppo
        mdp_of(kind(Features(3, 2), c.pretrain.policy), dppo.tuned_steps, dppo.exploration, dppo.solver)
        assert dppo.n_steps * c.finetune.n_envs * dppo.tuned_steps >= 2 * dppo.batch_size


@pytest.mark.parametrize("task", finetuning.SMALL)
def test_ppo_takes_as_many_gradient_steps_on_as_many_decisions(task: str) -> None:
    recipe = finetuning.SMALL[task]
    (_, dppo), (_, ppo) = finetuning._dppo(recipe), finetuning._ppo(recipe)
    assert dppo.dppo.batch_size / dppo.dppo.tuned_steps == ppo.dppo.batch_size
    assert ppo.inference.temperature == 0
    ppo = replace(ppo, inference=dppo.inference)
    assert (
        replace(ppo, dppo=replace(ppo.dppo, tuned_steps=dppo.dppo.tuned_steps, batch_size=dppo.dppo.batch_size)) == dppo
    )


def test_cells_that_do_not_fit_are_refused_before_an_expert_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = StudyConfig(tmp_path)
    studies.require_ready(config)
    first = finetuning.cells_of(("hopper",), config)[0]
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / f"{first.name}.json").write_text(json.dumps({"settings": {"name": "another"}, "looks": {}}))
    monkeypatch.setattr(runs, "train_expert", lambda *_, **__: pytest.fail("it was trained"))
    with pytest.raises(ConfigError, match=r"holds 'hopper\.dppo\.cloned\.seed0' with"):
        finetuning.run("hopper", config, progress_bar=False)


def test_the_papers_size_of_what_it_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the paper has no 'push'"):
        finetuning.run("finetune-metaworld", StudyConfig(tmp_path / "out", paper=True), progress_bar=False)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ what becomes of them


def write_curve(file: Path, scores: list[float], key: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"iteration": i, "timesteps": 100 * i, "eval/return_mean": 9.0, key: s} for i, s in enumerate(scores)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def invent(cells: list[Cell], out: Path, *, success: bool) -> list[Outcome]:
    found = []
    for c in cells:
        value = (0.9 if c.base else 0.3) + 0.02 * c.pretrain.seed
        found.append(
            outcome(c.name, value) if success else outcome(c.name, return_mean=1000 * value, return_error=10.0)
        )
        if c.base:
            key = "eval/success_rate" if success else "eval/return_mean"
            write_curve(out / "cells" / f"{c.name}.jsonl", [0.3, 0.6, value], key)
    return found


@pytest.mark.parametrize("name", finetuning.GROUPS)
def test_a_group_writes_table_and_curves(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = StudyConfig(tmp_path, seeds=(0, 1))
    studies.require_ready(config)
    is_gym = name not in ("finetune-metaworld", "avoid")
    invented = invent(finetuning.cells_of(finetuning.GROUPS[name], config), tmp_path, success=not is_gym)
    trained = []

    def train_expert(expert: runs.ExpertConfig, out: Path, *, progress_bar: bool) -> tuple[Seen, Seen]:
        trained.append((expert.env, out))
        return Seen(2_000, 1.0, 3_000.0, 1.0), Seen(1_000, 0.5, 1_000.0, 1.0)

    monkeypatch.setattr(finetuning, "run_cells", lambda cells, config, progress_bar: invented)
    monkeypatch.setattr(runs, "train_expert", train_expert)
    text = finetuning.run(name, config, progress_bar=False).read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 2 * len(finetuning.GROUPS[name])
    assert len(trained) == (len(rows) // 2 if is_gym else 0)
    assert ("has a return of 3,000" in text) == is_gym
    if is_gym:
        assert all("| 310 (296 to 324) | 910 (896 to 924) | 2.94 | 900, 920 | 1,000 | 1.0 |" in row for row in rows)
    else:
        assert all(
            "| 0.31 (0.25 to 0.38) | 0.91 (0.86 to 0.94) | 2.94 | 0.90, 0.92 | 1,000 | 1.0 |" in row for row in rows
        )
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_done_needs_no_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of experts and runs only the figures were kept, as in docs/results."""
    config = StudyConfig(tmp_path, seeds=(0,))
    studies.require_ready(config)
    invented = invent(finetuning.cells_of(("hopper",), config), tmp_path, success=False)
    expert = tmp_path / "experts/Hopper-v5"
    expert.mkdir(parents=True)
    rows = [Seen(1_000, 0.5, 1_000.0, 1.0), Seen(2_000, 1.0, 3_000.0, 1.0)]
    (expert / "returns.json").write_text(json.dumps([vars(row) for row in rows]))
    monkeypatch.setattr(finetuning, "run_cells", lambda cells, config, progress_bar: invented)
    monkeypatch.setattr(finetuning, "is_done", lambda cell, config: True)
    monkeypatch.setattr(runs, "train_expert", lambda *_, **__: pytest.fail("it was trained"))
    text = finetuning.run("hopper", config, progress_bar=False).read_text()
    assert "has a return of 3,000 after 2,000 steps; the `medium` one that demonstrates, 1,000 after 1,000" in text


def test_ablations_are_drawn_beside_the_usual_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, drawn = StudyConfig(tmp_path, seeds=(0, 1)), []
    invented = invent(ablations.cells(config), tmp_path, success=True)
    monkeypatch.setattr(ablations, "run_cells", lambda cells, config, progress_bar: invented)
    monkeypatch.setattr(plots, "over_seeds", lambda panels, file, n_columns: drawn.append(panels))
    text = ablations.run(config, progress_bar=False).read_text()
    for choice, usual in ablations.USUAL_VALUES.items():
        assert f"| {choice} | {usual} (usual) | 0.31 (0.25 to 0.38) | 0.91 (0.86 to 0.94) | 0.60 |" in text
        assert list(drawn[0][choice])[-1] == usual
        assert len(drawn[0][choice]) > 1


def test_bands_are_students_intervals_over_seeds() -> None:
    scores = np.array([[0.2, 0.5], [0.4, 0.5], [0.9, 0.8]])
    low, high = plots.mean_ci95(scores)
    for i in range(2):
        expected = stats.t.interval(0.95, 2, loc=scores[:, i].mean(), scale=stats.sem(scores[:, i]))
        assert (low[i], high[i]) == pytest.approx(expected)


def test_curves_hold_the_evaluations_that_all_seeds_have(tmp_path: Path) -> None:
    write_curve(tmp_path / "a", [0.1, 0.2, 0.3], "eval/success_rate")
    write_curve(tmp_path / "b", [0.3, 0.4], "eval/success_rate")
    steps, scores, metric = plots._evaluations([tmp_path / "a", tmp_path / "b"])
    assert metric == "eval/success_rate"
    assert steps.tolist() == [[0, 100], [0, 100]]
    assert scores.tolist() == [[0.1, 0.2], [0.3, 0.4]]

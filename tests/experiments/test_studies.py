"""Studies: every cell once, whatever happens in between; tables that say what was run."""

import csv
import importlib
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dprl.agents import BC, BCConfig
from dprl.errors import CheckpointError, ConfigError, DprlError, MissingDependencyError, RunExistsError
from dprl.experiments import (
    horizons,
    imitation,
    multimodal,
    obstacle,
    plots,
    runs,
    score_field,
    solvers,
    studies,
    vision,
)
from dprl.experiments.catalogue import STUDIES
from dprl.experiments.policies import ALL, COMPETITORS, DIFFUSION, slug, with_chunks
from dprl.experiments.runs import CollectConfig, PretrainConfig, Seen
from dprl.experiments.studies import (
    Cell,
    Look,
    Outcome,
    StudyConfig,
    grouped,
    mean_interval,
    paths_of,
    policy_folder,
    run_cells,
    shown,
    write_table,
)
from dprl.guidance.spec import GuidanceConfig, steering
from dprl.log import read_metrics
from dprl.policy import Features, GMMConfig, InferenceConfig, LSTMGMMConfig, MSEConfig, Policy
from dprl.rollout.evaluation import wilson
from dprl.spec import EnvOptions, load
from dprl.training.loop import InterruptedRunError, LoopConfig, train
from tests.policy.small import KINDS, small_config

ENV, OPTIONS = "Avoid-v0", EnvOptions(max_episode_steps=12)
STUDY_MODULES = [importlib.import_module(name) for name in dict.fromkeys(r.split(":")[0] for r, _ in STUDIES.values())]
OF_CELLS = [module for module in STUDY_MODULES if hasattr(module, "cells")]


def short_name(module: object) -> str:
    return module.__name__.rsplit(".", 1)[1]


def cell(name: str, policy: object = None, seed: int = 0, looks: tuple[Look, ...] | None = None) -> Cell:
    """A training of ten gradient steps in two iterations."""
    bc = BCConfig(batch_size=8, steps_per_iteration=5)
    policy = policy or MSEConfig(horizon=2, hidden_size=8, n_blocks=1)
    return Cell(
        name,
        CollectConfig(ENV, episodes=3, seed=seed, options=OPTIONS),
        PretrainConfig("", policy=policy, steps=10, bc=bc, checkpoint_every=1, seed=seed),
        looks or (Look("default", episodes=3),),
    )


GMM = GMMConfig(horizon=2, hidden_size=8, n_blocks=1, n_modes=2)
CELLS = [cell("one"), cell("two", GMM, looks=(Look("a", episodes=3), Look("b", n_action_steps=1, episodes=2)))]


def run(cells: list[Cell], out: Path, **changes: object) -> list[Outcome]:
    return run_cells(cells, StudyConfig(out, **changes), progress_bar=False)


def timeless(outcomes: list[Outcome]) -> list[Outcome]:
    return [replace(o, latency_ms=0.0, train_s=0.0, made_with="") for o in outcomes]


def changed_at(out: Path) -> dict[Path, int]:
    """Every file but what torch or the loop touches without writing anew."""
    return {file: file.stat().st_mtime_ns for file in sorted(out.rglob("*")) if file.is_file()}


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves of a training take longer to draw than these trainings take."""
    monkeypatch.setattr(plots, "training_curves", lambda run: None)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Outcome]]:
    out = tmp_path_factory.mktemp("study")
    return out, run(CELLS, out)


# ------------------------------------------------------------------------------------------------------------- cells


def test_outcomes_come_in_the_order_of_cells_and_looks(done: tuple[Path, list[Outcome]]) -> None:
    out, outcomes = done
    assert [(o.cell, o.look, o.episodes) for o in outcomes] == [("one", "default", 3), ("two", "a", 3), ("two", "b", 2)]
    for outcome in outcomes:
        assert 0 <= outcome.success <= 1
        assert outcome.interval == wilson(round(outcome.success * outcome.episodes), outcome.episodes)
        assert outcome.latency_ms > 0
        assert outcome.train_s > 0
        policy = Policy.from_pretrained(out / "runs" / outcome.cell)
        assert outcome.parameters == sum(p.numel() for p in policy.parameters())
    assert policy_folder(StudyConfig(out), CELLS[1]) == out / "runs" / "two"
    assert len(list((out / "data").iterdir())) == 1, "cells that collect the same share the data"


def test_what_is_done_is_not_done_again(done: tuple[Path, list[Outcome]]) -> None:
    out, outcomes = done
    before = changed_at(out)
    assert run(CELLS, out) == outcomes, "timings and all"
    assert changed_at(out) == before


def test_a_lost_result_is_evaluated_anew_without_training(done: tuple[Path, list[Outcome]], tmp_path: Path) -> None:
    out = tmp_path / "study"
    shutil.copytree(done[0], out, symlinks=True)
    (out / "cells" / "two.json").unlink()
    before = {path: at for path, at in changed_at(out).items() if "checkpoints" in path.parts or "one" in path.name}
    assert timeless(run(CELLS, out)) == timeless(done[1])
    assert before.items() <= changed_at(out).items()


def test_more_cells_add_to_a_study(done: tuple[Path, list[Outcome]], tmp_path: Path) -> None:
    out = tmp_path / "study"
    shutil.copytree(done[0], out, symlinks=True)
    third = cell("three", seed=1)
    outcomes = run([third, *CELLS], out)
    assert outcomes[1:] == done[1]
    assert outcomes[0].cell == "three"
    assert len(list((out / "data").iterdir())) == 2, "another seed has demonstrations of its own"


def test_an_interrupted_training_goes_on(
    done: tuple[Path, list[Outcome]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the first of two iterations, it is as if nothing had happened."""
    from dprl.training import run as run_module

    out, save, saved = tmp_path / "study", run_module.RunFolder.save, []

    def dies(self: object, agent: object, iteration: int, **options: object) -> None:
        save(self, agent, iteration, **options)
        saved.append(iteration)
        if iteration == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module.RunFolder, "save", dies)
        with pytest.raises(InterruptedRunError, match="the same command"):
            run(CELLS, out)
    assert saved == [0, 1]
    assert not (out / "cells" / "one.json").exists()
    assert timeless(run(CELLS, out)) == timeless(done[1])
    assert [row["iteration"] for row in read_metrics(out / "runs" / "one")] == [0, 1, 2]
    for name in ("one", "two"):
        ours, theirs = (Policy.from_pretrained(folder / "runs" / name).state_dict() for folder in (out, done[0]))
        assert all(ours[key].equal(theirs[key]) for key in ours)


@pytest.mark.full
def test_cells_side_by_side_give_the_same(done: tuple[Path, list[Outcome]], tmp_path: Path) -> None:
    assert timeless(run(CELLS, tmp_path / "study", jobs=2)) == timeless(done[1])


@pytest.fixture
def heeded_interrupts() -> Iterator[None]:
    """What a shell starts in the background ignores them, and so does what that starts."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.full
@pytest.mark.usefixtures("heeded_interrupts")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_study_leaves_no_process(tmp_path: Path, signum: signal.Signals) -> None:
    out = tmp_path / "study"
    command = [sys.executable, "-m", "dprl", "experiment", "multimodal", "--out", str(out), "--jobs", "2", "--quiet"]
    study = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    try:
        while len(list(out.glob("runs/*/metrics.jsonl"))) < 2:
            assert study.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        os.kill(study.pid, signum)
        _, errors = study.communicate(timeout=60)
        assert study.returncode == (130 if signum == signal.SIGINT else -signum)
        assert "Traceback" not in errors
        while group_has_processes(study.pid):
            assert time.monotonic() < deadline, "a process goes on"
            time.sleep(0.2)
    finally:
        study.kill()
    assert not list(out.glob("cells/*.json")), "nothing was far enough for a result"


def group_has_processes(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_interrupted_study_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(cell: Cell, config: StudyConfig) -> None:
        raise pickle.loads(pickle.dumps(InterruptedRunError(signal.SIGTERM, "continue with 'dprl resume there'")))

    monkeypatch.setattr(studies, "_run_cell", stopped)
    with pytest.raises(InterruptedRunError, match="the same command goes on from there") as caught:
        run(CELLS, tmp_path / "study")
    assert caught.value.exit_code == 143


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_cell_that_fails_does_not_end_the_study(jobs: int, tmp_path: Path) -> None:
    diverging = cell("diverging")
    bc = replace(diverging.pretrain.bc, learning_rate=1e30)
    diverging = replace(diverging, pretrain=replace(diverging.pretrain, bc=bc))
    with pytest.raises(DprlError, match=r"1 of 3 cells failed; every other has its result(.|\n)*diverging: bc/loss"):
        run([CELLS[0], diverging, CELLS[1]], tmp_path, jobs=jobs)
    assert sorted(file.name for file in (tmp_path / "cells").glob("*.json")) == ["one.json", "two.json"]


def test_scale_multiplies_the_gradient_steps(tmp_path: Path) -> None:
    run([cell("half"), cell("least")], tmp_path / "a", scale=0.5)
    assert json.loads((tmp_path / "a" / "runs" / "half" / "run.json").read_text())["config"]["steps"] == 5
    run([cell("least")], tmp_path / "b", scale=0.001)
    assert json.loads((tmp_path / "b" / "runs" / "least" / "run.json").read_text())["config"]["steps"] == 1


def test_a_look_keeps_its_paths(tmp_path: Path) -> None:
    """And evaluates the episodes they are of."""
    kept = cell("kept", looks=(Look("seen", episodes=4, keep_paths=True),))
    config = StudyConfig(tmp_path)
    (outcome,) = run([kept], tmp_path)
    paths = paths_of(config, kept, "seen")
    assert len(paths) == 4
    assert all(path.ndim == 2 and path.shape[1] == 2 and 2 <= len(path) <= 13 for path in paths)
    assert np.mean([path[-1, 1] >= 0.8 for path in paths]) == outcome.success


def test_results_of_other_settings_are_not_taken_for_these(done: tuple[Path, list[Outcome]], tmp_path: Path) -> None:
    """The table would state numbers of episodes and gradient steps that nobody played or took."""
    out = tmp_path / "study"
    shutil.copytree(done[0], out, symlinks=True)
    more = [replace(c, looks=tuple(replace(look, episodes=5) for look in c.looks)) for c in CELLS]
    try:
        outcomes = run(more, out)
    except ConfigError:
        return
    assert [o.episodes for o in outcomes] == [5, 5, 5]


def test_gradient_steps_of_another_scale_are_not_taken_for_these(
    done: tuple[Path, list[Outcome]], tmp_path: Path
) -> None:
    out = tmp_path / "study"
    shutil.copytree(done[0], out, symlinks=True)
    with pytest.raises(ConfigError, match=r"scale|steps"):
        run(CELLS, out, scale=2.0)


def test_demonstrations_of_other_noise_are_not_taken_for_these(tmp_path: Path) -> None:
    """Everything that makes a data set another one is in its folder's name."""
    clean, noisy = cell("clean"), cell("noisy")
    noisy = replace(noisy, collect=replace(noisy.collect, noise=0.5))
    run([clean, noisy], tmp_path)
    assert len(list((tmp_path / "data").iterdir())) == 2


@pytest.mark.parametrize(
    "changes",
    [{"seeds": ()}, {"seeds": (-1,)}, {"episodes": 0}, {"jobs": 0}, {"scale": 0.0}, {"scale": -1.0}],
    ids=str,
)
def test_a_wrong_study_is_refused_before_anything_is_run(changes: dict[str, object], tmp_path: Path) -> None:
    (name,) = changes
    with pytest.raises(ConfigError, match=name):
        StudyConfig(tmp_path, **changes)


# ----------------------------------------------------------------------------------------------------------- numbers


def test_mean_interval_is_wilsons_of_all_episodes() -> None:
    assert mean_interval([0.5, 0.7], 50) == pytest.approx((0.6, *wilson(60, 100)))
    assert mean_interval([1.0], 20) == pytest.approx((1.0, *wilson(20, 20)))
    mean, low, high = mean_interval([0.0, 0.0, 0.0], 10)
    assert (mean, low) == (0.0, 0.0)
    assert high == pytest.approx(0.1135, abs=1e-4), "z² / (30 + z²)"


def test_a_rate_is_shown_with_its_interval() -> None:
    assert shown(0.866, 0.8, 0.925) == "0.87 (0.80 to 0.93)"


def test_outcomes_are_grouped_in_order() -> None:
    outcomes = [Outcome(name, "x", 0.0, 1, 0.0, 0.0, 0, "") for name in ("b.1", "a.1", "b.2")]
    groups = grouped(outcomes, lambda o: o.cell.split(".")[0])
    assert {key: [o.cell for o in group] for key, group in groups.items()} == {"b": ["b.1", "b.2"], "a": ["a.1"]}
    assert list(groups) == ["b", "a"]


def test_relative_gain_by_hand() -> None:
    """Push: 0.9 against 0.6, half as much again; pick-place: a quarter; peg: none can, so it does not count."""
    success = {(task, name): (0.1, 0.0, 1.0) for task in imitation.TASKS for name in ALL}
    diffusion = next(iter(DIFFUSION))
    best = list(COMPETITORS)[2]
    success["push", best], success["push", diffusion] = (0.6, 0, 1), (0.9, 0, 1)
    success["pick-place", f"{best}, cool"], success["pick-place", diffusion] = (0.8, 0, 1), (0.2, 0, 1)
    for name in ALL:
        success["peg-insert-side", name] = (0.0, 0, 1)
    success["peg-insert-side", diffusion] = (0.02, 0, 1)
    assert imitation.relative_gain(success, diffusion) == pytest.approx((0.5 - 0.75) / 2)
    assert "Without peg-insert-side, where no competitor" in imitation._gains(success)[0]
    nothing = dict.fromkeys(success, (0.0, 0, 1))
    assert math.isnan(imitation.relative_gain(nothing, diffusion))
    assert imitation._gains(nothing)[0] == "No competitor ever succeeded, so there is no relative gain."


def test_modes_are_counted_where_the_disc_was_passed() -> None:
    left, right = ([(0.0, -0.8), (x, -0.1), (x, 0.1), (-x, 0.9)] for x in (-0.5, 0.5))
    stopped = [(0.0, -0.8), (0.0, -0.3), (0.1, 0.1)]
    shares = multimodal.count_modes([np.array(path) for path in (left, left, right, stopped)])
    assert shares == multimodal.Shares(left=2, right=1, none=1)
    assert shares.of_passed(shares.left) == "0.67"
    assert multimodal.Shares(0, 0, 3).of_passed(0) == "-"


# ------------------------------------------------------------------------------------------------------------ tables


def test_a_table_is_markdown_and_csv(tmp_path: Path) -> None:
    rows = [["a, b", "0.5 (0.4 to 0.6)"], ["c", "1"]]
    file = write_table(
        StudyConfig(tmp_path, seeds=(3, 5), scale=0.5),
        "name",
        "Title",
        ["policy", "success"],
        rows,
        ["A note.", "Another."],
        [Outcome("one", "x", 0.0, 1, 0.0, 0.0, 0, made) for made in ("a laptop", "a cluster", "a laptop")],
    )
    assert file == tmp_path / "name.md"
    *lines, made_by = file.read_text().splitlines()
    assert made_by.startswith("`dprl experiment name --seeds 3 5 --episodes 100 --scale 0.5 --out FOLDER`")
    assert "`, a laptop; a cluster; times" in made_by, "not the machine that draws"
    assert "Intervals are Wilson's" in made_by
    bare = studies.provenance("name", StudyConfig(tmp_path, seeds=(3, 5)))
    assert bare.startswith("`dprl experiment name --seeds 3 5 --out FOLDER`")
    assert "Intervals" not in bare
    assert lines == [
        "# Title", "", "| policy | success |", "|---|---|", "| a, b | 0.5 (0.4 to 0.6) |", "| c | 1 |", "",
        "![Title](name.png)", "", "A note.", "Another.", "",
    ]  # fmt: skip
    with (tmp_path / "name.csv").open(newline="") as stream:
        assert list(csv.reader(stream)) == [["policy", "success"], *rows]


# ----------------------------------------------------------------------------------------------------------- studies


@pytest.mark.parametrize("module", OF_CELLS, ids=short_name)
def test_cells_of_a_study_have_names_and_folders_of_their_own(module: object, tmp_path: Path) -> None:
    cells = module.cells(StudyConfig(tmp_path, seeds=(0, 1, 2), episodes=7))
    names = [c.name for c in cells]
    assert len(set(names)) == len(names)
    assert all(os.path.basename(name) == name for name in names)
    folders: dict[Path, CollectConfig] = {}
    for c in cells:
        folder = studies._data_folder(StudyConfig(tmp_path), c.collect)
        assert folders.setdefault(folder, c.collect) == c.collect, "two data sets in one folder"
        looks = [look.name for look in c.looks]
        assert len(set(looks)) == len(looks) > 0
        assert {look.episodes for look in c.looks} == {7}
        assert c.collect.seed == c.pretrain.seed
        assert c.pretrain.policy.horizon >= max(look.n_action_steps or 1 for look in c.looks)
    assert {c.pretrain.seed for c in cells} == {0, 1, 2}


def test_looks_fit_their_policies() -> None:
    """A setting that does not fit is an error after hours of training."""
    for module in OF_CELLS:
        for c in module.cells(StudyConfig(Path("unused"), seeds=(0,))):
            kind = next(k for k in Policy.kinds if Policy.kinds[k].config_class is type(c.pretrain.policy))
            policy = Policy.kinds[kind](Features(2, 2), c.pretrain.policy)
            if c.offline is not None:  # whose looks may ask for critics
                runs._offline_agent(policy, replace(c.offline, critics=None))
            for look in c.looks:
                policy.check_inference(look.inference)
                steering(look.guidance, policy)
                if look.n_action_steps is not None:
                    policy.set_n_action_steps(look.n_action_steps)


def test_every_study_of_the_catalogue_can_be_run() -> None:
    for reference, summary in STUDIES.values():
        assert callable(load(reference))
        assert summary
    assert {multimodal, imitation, horizons, solvers} <= set(OF_CELLS)


def test_fewer_frames_are_rendered_at_a_small_scale() -> None:
    for scale, episodes in ((2.0, 100), (1.0, 100), (0.1, 10), (0.001, 2)):
        cells = vision.metaworld_cells(StudyConfig(Path("unused"), scale=scale))
        assert {c.collect.episodes for c in cells} == {episodes}


def test_slugs_name_every_policy_and_its_files() -> None:
    assert slug("diffusion, U-Net") == "diffusion-u-net"
    slugs = [slug(name) for name in ALL]
    assert len(set(slugs)) == len(ALL) == len(DIFFUSION) + len(COMPETITORS)
    assert all(word.replace("-", "").isalnum() and "." not in word for word in slugs)


def test_every_kind_is_compared() -> None:
    """But planners, which are told apart by what they earn."""
    kinds = {kind.config_class for name, kind in Policy.kinds.items() if name != "planner"}
    assert {type(config) for config in ALL.values()} == kinds


def test_critics_of_a_look_may_be_its_bases() -> None:
    base, climb = Path("base"), GuidanceConfig(guide="critic", scale=0.3)
    assert Look("own", guidance=climb).steered(base) == climb
    judged = Look("judged", guidance=climb, by_base=True).steered(base)
    assert judged == GuidanceConfig(guide="base", scale=0.3, scorer="base")
    assert Look("chosen", by_base=True).steered(base) == GuidanceConfig(scorer="base")


def test_an_lstm_keeps_its_single_steps() -> None:
    assert with_chunks(LSTMGMMConfig(), 8, 4) == LSTMGMMConfig()
    for name, config in ALL.items():
        chunked = with_chunks(config, 8, 4)
        assert type(chunked) is type(config)
        if name != "LSTM-GMM":
            assert (chunked.horizon, chunked.n_action_steps) == (8, 4)
            assert replace(chunked, horizon=config.horizon, n_action_steps=config.n_action_steps) == config


@pytest.mark.parametrize("module", OF_CELLS, ids=short_name)
def test_a_study_writes_table_and_figure(module: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From invented outcomes: what is under test is what becomes of them."""
    config = StudyConfig(tmp_path, seeds=(0, 1), episodes=10, scale=0.5)
    cells = module.cells(config)
    if hasattr(module, "demonstrators_of"):  # which trains them
        seen = (Seen(9, 1.0, 3_000.0, 1.0), Seen(3, 0.5, 1_000.0, 1.0))
        monkeypatch.setattr(module, "demonstrators_of", lambda *a, **k: seen)

    def invented(todo: list[Cell], config: StudyConfig, *, progress_bar: bool = True) -> list[Outcome]:
        assert [c.name for c in todo] == [c.name for c in cells]
        return [Outcome(c.name, look.name, 0.5, 10, 2.0, 60.0, 1_000_000, "a laptop") for c in todo for look in c.looks]

    path = np.array([(0.0, -0.8), (-0.5, 0.1), (0.0, 0.9)])
    monkeypatch.setattr(module, "run_cells", invented)
    if hasattr(module, "paths_of"):
        monkeypatch.setattr(module, "paths_of", lambda config, cell, look: [path] * 10)
    name = short_name(module)
    file = module.run(config, progress_bar=False)
    assert file == tmp_path / f"{name}.md"
    lines = file.read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    width = table[0].count("|")
    assert all(line.count("|") == width for line in table), "a cell breaks the table"
    with (tmp_path / f"{name}.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert len(rows) == len(table) - 1
    assert {len(row) for row in rows} == {width - 1}
    expected = {
        "multimodal": len(ALL) + 1,
        "imitation": 3 * 3 + 1 + 1 + 2 * 6,
        "horizons": 5 + 5,
        "solvers": 8 * len(solvers.STEPS),
        "obstacle": len(obstacle.LOOKS),
    }
    assert len(rows) - 1 == expected.get(name, len(rows) - 1) > 0
    assert "0.50 (0.30 to 0.70)" in file.read_text(), "two seeds of ten episodes"
    assert "Seeds 0, 1" in file.read_text()
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_a_whole_study_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of policy on Avoid-v0."""
    tiny = {kind: small_config(kind) for kind in KINDS}
    monkeypatch.setattr(multimodal, "POLICIES", tiny)
    monkeypatch.setattr(multimodal, "with_chunks", lambda config, horizon, executed: config)
    config = StudyConfig(tmp_path, seeds=(0,), episodes=3, scale=0.001)
    file = multimodal.run(config, progress_bar=False)
    assert all(kind in file.read_text() for kind in KINDS)
    assert plots.new_figure()


def test_inference_of_a_look_is_used(tmp_path: Path) -> None:
    """Temperature 0 of a mixture is another policy."""
    policy = replace(GMM, low_noise_sampling=False)
    looks = tuple(
        Look(name, InferenceConfig(temperature=t), episodes=3, keep_paths=True)
        for name, t in (("cold", 0.0), ("warm", 1.0))
    )
    found = cell("looks", policy, looks=looks)
    run([found], tmp_path)
    cold, warm = (paths_of(StudyConfig(tmp_path), found, name) for name in ("cold", "warm"))
    np.testing.assert_array_equal(cold[0][0], warm[0][0])
    assert not np.array_equal(cold[0][1], warm[0][1])


@pytest.mark.parametrize("holds", ["a run", "something else", "a file", "data", "cells"])
def test_a_folder_of_something_else_is_refused(holds: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if holds == "a file":
        out.write_text("text")
    else:
        out.mkdir()
        (out / ("run.json" if holds == "a run" else "letters.txt")).write_text("{}")
        (out / (holds if holds in ("data", "cells") else "checkpoints")).mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunExistsError, match="already"):
        run(CELLS, out)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_study_without_matplotlib_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match="matplotlib"):
        run(CELLS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_study_that_was_moved_goes_on(done: tuple[Path, list[Outcome]], tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    first = cell("one")
    run([first], here)
    (here / "cells" / "one.json").unlink()
    checkpoints = here / "runs" / "one" / "checkpoints"
    shutil.rmtree(checkpoints)  # killed before its first checkpoint
    here.rename(there)
    assert timeless(run([first], there)) == timeless(done[1])[:1]


def test_what_differs_is_named(done: tuple[Path, list[Outcome]], tmp_path: Path) -> None:
    out = tmp_path / "study"
    shutil.copytree(done[0], out, symlinks=True)
    changed = replace(CELLS[0], pretrain=replace(CELLS[0].pretrain, steps=20))
    with pytest.raises(ConfigError, match=r"holds 'one' with pretrain.steps = 10, not 20"):
        run([changed], out)


def test_what_differs_within_a_list_is_named(done: tuple[Path, list[Outcome]], tmp_path: Path) -> None:
    out = tmp_path / "study"
    shutil.copytree(done[0], out, symlinks=True)
    look = replace(CELLS[1].looks[1], episodes=9)
    with pytest.raises(ConfigError, match=r"holds 'two' with looks.1.episodes = 2, not 9\. Choose"):
        run([replace(CELLS[1], looks=(CELLS[1].looks[0], look))], out)


DAMAGE = {
    "cells/one.json": ["[]", "{}", "not json", '{"settings": {}, "looks": {}}', '{"settings": SETTINGS, "looks": {}}'],
    "runs/one/run.json": ["[]", "{}"],
}


@pytest.mark.parametrize(("file", "content"), [(f, c) for f, contents in DAMAGE.items() for c in contents])
def test_a_damaged_file_is_named_and_can_be_made_again(
    file: str, content: str, done: tuple[Path, list[Outcome]], tmp_path: Path
) -> None:
    out = tmp_path / "study"
    shutil.copytree(done[0], out, symlinks=True)
    result = out / "cells" / "one.json"
    settings = json.dumps(json.loads(result.read_text())["settings"])
    if file.startswith("runs"):
        result.unlink()
    (out / file).write_text(content.replace("SETTINGS", settings))
    with pytest.raises(DprlError, match=r"one\.json|run\.json|holds 'one' with"):
        run([CELLS[0]], out)
    (out / file).unlink()
    if file.startswith("runs"):
        shutil.rmtree(out / "runs" / "one")
    assert timeless(run([CELLS[0]], out)) == timeless(done[1])[:1]


def test_paths_that_are_lost_or_damaged_are_recorded_anew(tmp_path: Path) -> None:
    kept = cell("kept", looks=(Look("default", episodes=2, keep_paths=True),))
    run([kept], tmp_path)
    file, config = tmp_path / "cells" / "kept.default.npz", StudyConfig(tmp_path)
    before = paths_of(config, kept, "default")
    file.write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"kept\.default\.npz' is damaged.*Remove it"):
        paths_of(config, kept, "default")
    file.unlink()
    run([kept], tmp_path)
    for one, other in zip(before, paths_of(config, kept, "default"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_run_that_lost_its_log_is_evaluated(done: tuple[Path, list[Outcome]], tmp_path: Path) -> None:
    out = tmp_path / "study"
    shutil.copytree(done[0], out, symlinks=True)
    (out / "cells" / "one.json").unlink()
    (out / "runs" / "one" / "metrics.jsonl").unlink()
    (found,) = run([CELLS[0]], out)
    assert found.train_s > 0


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "_run_cell", killed)
    with pytest.raises(DprlError, match="a process was killed, perhaps because memory ran out: the same command"):
        run(CELLS, tmp_path, jobs=2)


@pytest.mark.parametrize("changes", [{"seeds": (1, 1)}, {"scale": 1e308}, {"scale": float("nan")}, {"seeds": ()}])
def test_settings_of_a_study_that_make_no_sense_are_refused(changes: dict[str, object]) -> None:
    (name,) = changes
    with pytest.raises(ConfigError, match=name):
        StudyConfig(Path("unused"), **changes)


def test_the_score_field_is_learned_once(tmp_path: Path) -> None:
    config = StudyConfig(tmp_path / "out", seeds=(0,), scale=0.004)
    table = score_field.run(config, progress_bar=False)
    text, at = table.read_text(), changed_at(tmp_path / "out" / "runs")
    assert at
    assert score_field.run(config, progress_bar=False).read_text() == text
    assert changed_at(tmp_path / "out" / "runs") == at
    with pytest.raises(ConfigError, match="'steps': 20}, not of 50 steps"):
        score_field.run(replace(config, scale=0.01), progress_bar=False)


@pytest.mark.full
def test_an_interrupted_score_field_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = StudyConfig(tmp_path / "whole", seeds=(0,), scale=0.06)
    text = score_field.run(whole, progress_bar=False).read_text()

    def stop(agent: BC[Any], config: LoopConfig, **others: Any) -> None:
        train(agent, replace(config, total_timesteps=100), **others)
        raise InterruptedRunError(signal.SIGINT, "all is saved")

    cut = replace(whole, out=tmp_path / "cut")
    with monkeypatch.context() as patched:
        patched.setattr(score_field, "train_agent", stop)
        with pytest.raises(InterruptedRunError, match="the same command goes on"):
            score_field.run(cut, progress_bar=False)
    began_at = []

    def go_on(agent: BC[Any], config: LoopConfig, **others: Any) -> None:
        began_at.append(agent.timesteps)
        train(agent, config, **others)

    monkeypatch.setattr(score_field, "train_agent", go_on)
    assert score_field.run(cut, progress_bar=False).read_text() == text
    assert began_at == [100]

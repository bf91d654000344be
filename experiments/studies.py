"""Studies: many trainings and evaluations, each done once, then a table and a figure.

A study is a list of cells. A cell trains one policy, or fine-tunes that of another cell, and evaluates it in some ways;
its result is a JSON file, and a cell whose file exists is not run again. So an interrupted study goes on where it was,
inside a training too.

    OUT/study.json      says that this is a study's folder
    OUT/data/           demonstrations, one folder for each task and seed
    OUT/runs/CELL/      the training
    OUT/cells/CELL.json its evaluations
    OUT/cells/CELL.jsonl of a fine-tuning, the evaluations on the way
    OUT/NAME.md, .csv, .png
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import multiprocessing
import os
import platform
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import dprl
from dprl import checkpoint
from dprl.config import from_json, to_json
from dprl.cores import one_thread
from dprl.errors import CheckpointError, ConfigError, DprlError, check
from dprl.experiments import plots, runs
from dprl.experiments.runs import CollectConfig, FinetuneConfig, OfflineConfig, PretrainConfig
from dprl.guidance.spec import GuidanceConfig, steering
from dprl.log import read_metrics
from dprl.policy import InferenceConfig, Policy
from dprl.rollout import Evaluation, evaluate
from dprl.rollout.evaluation import Z95, record, wilson
from dprl.rollout.recording import Trajectory
from dprl.spec import resolve
from dprl.training.loop import InterruptedRunError
from dprl.training.progress import ProgressBar
from dprl.training.run import RUN_FILE, RunFolder

Item = TypeVar("Item")

# Evaluations use start states that neither demonstrations nor training of the same seed have.
HELD_OUT = 2_000_000
MAX_SCALE = 1_000
STUDY_FILE = "study.json"
FORMAT_VERSION = 1
PLACES = {"pretrain": ("data",), "offline": ("data", "critics"), "finetune": ("policy", "data")}
"""Of each stage the fields that say where something lies, on which no result depends. The last of a cell's is run."""
REMEDY = "Remove it, and the same command makes it again"


@dataclass(frozen=True)
class Look:
    """One way to evaluate a trained policy."""

    name: str
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    n_action_steps: int | None = None
    episodes: int = 100
    keep_paths: bool = False
    """Also keep every trajectory's states."""
    blind: bool = False
    """Show the policy black images."""
    env: str | None = None
    """Where. Default: where it was shown."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    """What steers the policy."""
    by_base: bool = False
    """Whether the critics that steer and choose are those of the cell's base."""

    def steered(self, base: Path | None) -> GuidanceConfig:
        """What steers the policy, with the folder of the base's policy in its place."""
        if not self.by_base:
            return self.guidance
        return replace(self.guidance, guide=self.guidance.guide and str(base), scorer=str(base))


@dataclass(frozen=True)
class Cell:
    """One training and its evaluations."""

    name: str
    collect: CollectConfig
    pretrain: PretrainConfig
    looks: tuple[Look, ...] = (Look("default"),)
    base: str | None = None
    """The cell whose policy is fine-tuned, or whose critics judge plans or what follows them; it is run before. Of a
    fine-tuning `collect` and `pretrain` are its own."""
    finetune: FinetuneConfig | None = None
    """How; its `policy` is filled in, and with idql its `data`."""
    more: tuple[CollectConfig, ...] = ()
    """Further demonstrations of the same environment."""
    offline: OfflineConfig | None = None
    """How, if rewards are learned from as well; its data, policy, steps and seed are those of `pretrain`."""

    def __post_init__(self) -> None:
        own = self.pretrain
        alike = self.offline is None or (own.best == 1 and own.bc == self.offline.bc)
        check(alike, "offline", self.name, "must have the `bc` of `pretrain`, and all of its episodes")

    @property
    def training(self) -> PretrainConfig | OfflineConfig | FinetuneConfig:
        """What is run."""
        return self.finetune or self.offline or self.pretrain


def tuned(base: Cell, name: str, finetune: FinetuneConfig) -> Cell:
    """Return the cell that fine-tunes the policy of `base`, and is evaluated as it is."""
    return replace(base, name=name, base=base.name, finetune=replace(finetune, seed=base.pretrain.seed))


@dataclass(frozen=True)
class StudyConfig:
    """How much of a study to run, and where."""

    out: Path
    """Folder; one that exists is continued."""
    seeds: tuple[int, ...] = (0, 1)
    """Of demonstrations, training and evaluation."""
    episodes: int = 100
    """Held-out episodes of each evaluation."""
    scale: float = 1.0
    """Multiplies gradient and environment steps; 0.01 shows that all runs."""
    paper: bool = False
    """Where a study has it, the paper's size, for machines with many cores or a GPU."""
    jobs: int = 1
    """Cells at a time, each on a thread of its own; a fine-tuning that is alone has every core."""

    def __post_init__(self) -> None:
        check(self.episodes >= 1, "episodes", self.episodes, "must be at least 1")
        check(self.jobs >= 1, "jobs", self.jobs, "must be at least 1")
        check(0 < self.scale <= MAX_SCALE, "scale", self.scale, f"must be above 0 and at most {MAX_SCALE:,}")
        fits = len(self.seeds) > 0 and all(seed >= 0 for seed in self.seeds)
        check(fits, "seeds", self.seeds, "must be at least one, of at least 0")
        check(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "must differ")


@dataclass(frozen=True)
class Outcome:
    """What one look at one cell found."""

    cell: str
    look: str
    success: float
    """NaN where the environment reports none."""
    episodes: int
    latency_ms: float
    train_s: float
    """Seconds of training."""
    parameters: int
    made_with: str
    """Versions, machine and trainings at a time."""
    return_mean: float = math.nan
    return_error: float = math.nan
    """Its standard error over the episodes."""
    timesteps: int = 0
    """Environment steps of a fine-tuning, gradient steps of a pretraining; 0 where its log was lost."""

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the success."""
        return wilson(round(self.success * self.episodes), self.episodes)


def run_cells(cells: Sequence[Cell], config: StudyConfig, *, progress_bar: bool = True) -> list[Outcome]:
    """Run what has no result yet and return all outcomes, in the order of `cells` and their looks.

    Raises:
        ConfigError: the folder holds a result or a training of the same name with other settings.
        CheckpointError: a file of the study is damaged; the message names it.
        DprlError: some cells failed, say by diverging; the others were run to their end all the same.
        InterruptedRunError: on SIGINT or SIGTERM, with what was trained so far saved.
    """
    cells = require_ready_for(cells, config)
    todo = [cell for cell in cells if not is_done(cell, config)]
    asked = {cell.base for cell in todo}
    todo += [cell for cell in cells if cell.name in asked and cell not in todo and not _is_trained(cell, config)]
    for collect, more in dict.fromkeys((cell.collect, cell.more) for cell in todo):
        folder = _data_folder(config, collect, more)
        if not folder.exists():
            demonstrators = [_with_expert(source, config) for source in (collect, *more)]
            runs.collect(demonstrators[0], folder, more=demonstrators[1:], progress_bar=progress_bar)
    failures: list[str] = []
    with ProgressBar("cells", len(cells), len(cells) - len(todo), shown=progress_bar) as bar:
        try:
            for stage in ([c for c in todo if c.base is None], [c for c in todo if c.base is not None]):
                for failure in (_one_by_one if config.jobs == 1 else _side_by_side)(stage, config, bar):
                    failures += [failure] if failure else []
                    bar.advance(1)
        except (InterruptedRunError, KeyboardInterrupt) as error:
            signum = error.signum if isinstance(error, InterruptedRunError) else signal.SIGINT
            raise InterruptedRunError(signum, "the same command goes on from there") from error
    if failures:
        others = "every other has its result in" if len(failures) < len(cells) else "see"
        raise DprlError("\n".join([f"{len(failures)} of {len(cells)} cells failed; {others} {config.out}", *failures]))
    return [outcome for cell in cells for outcome in _outcomes(cell, config)]


def require_ready_for(cells: Sequence[Cell], config: StudyConfig) -> list[Cell]:
    """Return the cells as they are run, having checked all that can be before anything is."""
    cells = [_scaled(cell, config) for cell in cells]
    require_ready(config)
    for cell in cells:
        _require_same(cell, config)
    return cells


def require_ready(config: StudyConfig) -> None:
    """Raise an error unless figures can be drawn and `config.out` is the folder of a study, or can become one."""
    plots.new_figure()
    file = config.out / STUDY_FILE
    if not file.exists():
        RunFolder.require_free(config.out)
        config.out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(file, {"format_version": FORMAT_VERSION})


def paths_of(config: StudyConfig, cell: Cell, look: str) -> list[np.ndarray[Any, Any]]:
    """Return the states (T+1, D) of every episode of a look that keeps them."""
    file = _paths_file(config, cell, look)
    try:
        with np.load(file) as data:
            return [data[name] for name in data.files]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"'{file}' is damaged: {error}. {REMEDY}") from error


def policy_folder(config: StudyConfig, cell: Cell) -> Path:
    """Return the run folder of a cell's training."""
    return config.out / "runs" / cell.name


def curve_file(config: StudyConfig, cell: str) -> Path:
    """Return the file of the evaluations during a fine-tuning: rows of its metrics."""
    return config.out / "cells" / f"{cell}.jsonl"


def _scaled(cell: Cell, config: StudyConfig) -> Cell:
    """The cell with its data's folder and as many gradient steps as the study's scale makes of them."""
    steps = max(1, round(cell.pretrain.steps * config.scale))
    data = str(_data_folder(config, cell.collect, cell.more).resolve())
    cell = replace(cell, pretrain=replace(cell.pretrain, data=data, steps=steps))
    if cell.offline is not None:
        own = cell.pretrain
        offline = replace(cell.offline, data=data, policy=own.policy, steps=steps, seed=own.seed)
        cell = replace(cell, offline=offline)
    if cell.base is None:
        return cell
    policy = str((config.out / "runs" / cell.base).resolve())
    if cell.finetune is None:
        assert cell.offline is not None
        told = cell.offline.agent == "decision-diffuser"
        return replace(cell, offline=replace(cell.offline, critics=policy)) if told else cell
    timesteps = max(1, round(cell.finetune.total_timesteps * config.scale))
    finetune = replace(cell.finetune, policy=policy, total_timesteps=timesteps)
    return replace(cell, finetune=finetune if finetune.agent == "dppo" else replace(finetune, data=data))


def _with_expert(collect: CollectConfig, config: StudyConfig) -> CollectConfig:
    """Find an expert that the study trained, which is named by its file within the study's folder."""
    trained = collect.expert.endswith(".zip")
    return replace(collect, expert=str(config.out / collect.expert)) if trained else collect


def _settings(cell: Cell) -> Any:
    """What a cell's result depends on, as it reads in JSON; not where data and policies lie."""
    data = to_json(cell)
    for stage, places in PLACES.items():
        for place in places if data[stage] is not None else ():
            del data[stage][place]
    return json.loads(json.dumps(data))


def _require_same(cell: Cell, config: StudyConfig) -> None:
    """Raise ConfigError if what is there for `cell` was made with other settings, CheckpointError if it is damaged."""
    file, run = _result_file(config, cell), policy_folder(config, cell)
    ours = _settings(cell)
    if file.exists():
        stored = checkpoint.read_json(file)
        stored = stored.get("settings") if isinstance(stored, dict) else None
        if not isinstance(stored, dict):
            raise CheckpointError(f"'{file}' is damaged: it has no settings. {REMEDY}")
    elif (run / RUN_FILE).exists():
        _, _, trained = RunFolder.open(run)
        stage = next(name for name in reversed(PLACES) if getattr(cell, name) is not None)
        stored = ours | {stage: {key: trained[key] for key in ours[stage] if key in trained}}
    else:
        return
    differing = _differences(_with_defaults(stored, file), ours)
    check(not differing, "out", str(config.out), f"holds '{cell.name}' with {'; '.join(differing[:3])}. Choose another "
          "folder, or the settings (or the version of dprl) that it was made with")  # fmt: skip
    if file.exists():
        _outcomes(cell, config)


def _with_defaults(stored: Any, file: Path) -> Any:
    """Settings of an earlier version, with what has been added since as it was then: at its default."""
    data = json.loads(json.dumps(stored))
    try:
        for stage, (place, *_) in PLACES.items():
            if data.get(stage) is not None:
                data[stage][place] = ""
        return _settings(from_json(Cell, data, str(file)))
    except (ConfigError, KeyError, TypeError):
        return stored  # of another make: what differs is said


def is_done(cell: Cell, config: StudyConfig) -> bool:
    """Whether all that is kept of a cell is there."""
    kept = [_paths_file(config, cell, look.name) for look in cell.looks if look.keep_paths]
    kept += [] if cell.finetune is None else [curve_file(config, cell.name)]
    return all(file.exists() for file in (_result_file(config, cell), *kept))


def _is_trained(cell: Cell, config: StudyConfig) -> bool:
    """Whether a cell's policy is there, which its result does not hold."""
    return (policy_folder(config, cell) / "checkpoints" / "last").exists()


def _outcomes(cell: Cell, config: StudyConfig) -> list[Outcome]:
    """What was found of a cell that is done."""
    file = _result_file(config, cell)
    data = checkpoint.read_json(file)
    try:
        return [Outcome(**data["looks"][look.name]) for look in cell.looks]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"'{file}' is damaged: {error}. {REMEDY}") from error


def _differences(stored: Any, ours: Any, where: str = "") -> list[str]:
    """What differs between two settings, leaf by leaf: ``pretrain.steps = 10, not 20``."""
    if isinstance(stored, list) and isinstance(ours, list):
        stored, ours = ({str(i): value for i, value in enumerate(values)} for values in (stored, ours))
    if isinstance(stored, dict) and isinstance(ours, dict):
        names = list(dict.fromkeys([*stored, *ours]))
        pairs = [(f"{where}.{name}".strip("."), stored.get(name), ours.get(name)) for name in names]
        return [line for name, old, new in pairs for line in _differences(old, new, name)]
    return [] if stored == ours else [f"{where} = {stored}, not {ours}"]


def _one_by_one(cells: Sequence[Cell], config: StudyConfig, bar: ProgressBar) -> Iterator[str | None]:
    for cell in cells:
        bar.note(cell.name)
        yield _run_cell(cell, config)


def _side_by_side(cells: Sequence[Cell], config: StudyConfig, bar: ProgressBar) -> Iterator[str | None]:
    """Run cells in processes of their own; yield whenever one is done. An interruption ends the processes."""
    context, waiting = multiprocessing.get_context("spawn"), iter(cells)
    with ProcessPoolExecutor(config.jobs, mp_context=context, initializer=_follow_parent) as executor:
        try:
            running: dict[Future[str | None], str] = {}
            while True:  # hand out no more than run: the executor could not take a cell back
                for cell in islice(waiting, config.jobs - len(running)):
                    running[executor.submit(_run_cell, cell, config)] = cell.name
                if not running:
                    return
                bar.note(", ".join(running.values()))
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    del running[future]
                    yield future.result()
        except BrokenProcessPool as error:
            raise DprlError("a process was killed, perhaps because memory ran out: the same command goes on; with "
                            "fewer jobs it needs less") from error  # fmt: skip
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()  # a training then saves its iteration
            raise


def _follow_parent() -> None:
    """Leave a terminal's signals to the parent, and end when it has; everything that is written can bear that."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _run_cell(cell: Cell, config: StudyConfig) -> str | None:
    """Run a cell; return what went wrong, if anything did."""
    try:
        with nullcontext() if cell.finetune is not None and config.jobs == 1 else one_thread():
            _train_and_look(cell, config)
    except InterruptedRunError:
        raise
    except (DprlError, OSError, MemoryError) as error:
        return f"{cell.name}: {error}"
    return None


def _train_and_look(cell: Cell, config: StudyConfig) -> None:
    folder = policy_folder(config, cell)
    run = runs.run_or_resume(cell.training, folder, progress_bar=False)
    looks = {}
    for look in cell.looks:
        spec = resolve(look.env or cell.collect.env, cell.collect.options)
        policy = Policy.from_pretrained(folder)
        if look.n_action_steps is not None:
            policy.set_n_action_steps(look.n_action_steps)
        if look.blind:
            _blindfold(policy)
        seed, how = HELD_OUT + cell.pretrain.seed, look.inference
        base = None if cell.base is None else config.out / "runs" / cell.base
        guide, scorer = steering(look.steered(base), policy)
        result = evaluate(policy, spec, look.episodes, seed, inference=how, guide=guide, scorer=scorer)
        if look.keep_paths:
            played = record(policy, spec, look.episodes, seed, inference=how, guide=guide, scorer=scorer)
            _save_paths(config, cell, look, played)
        looks[look.name] = vars(_outcome(cell, look, config, run, policy, result))
    file = _result_file(config, cell)
    file.parent.mkdir(parents=True, exist_ok=True)
    if cell.finetune is not None:
        _save_curve(run, curve_file(config, cell.name))
    checkpoint.write_json(file, {"settings": _settings(cell), "looks": looks})


def _save_curve(run: RunFolder, file: Path) -> None:
    kept = ("iteration", "timesteps", "time/elapsed_s")
    rows = [
        {name: value for name, value in row.items() if name in kept or name.startswith("eval/")}
        for row in read_metrics(run.path)
        if plots.RETURN in row
    ]
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(file)


def _outcome(
    cell: Cell, look: Look, config: StudyConfig, run: RunFolder, policy: Policy, result: Evaluation
) -> Outcome:
    low, high = result.return_ci95 or (math.nan, math.nan)
    rows = read_metrics(run.path)
    return Outcome(
        cell=cell.name,
        look=look.name,
        success=math.nan if result.success_rate is None else result.success_rate,
        episodes=look.episodes,
        latency_ms=result.policy_latency_ms_p50,
        train_s=60 * runs.minutes_of(run),
        parameters=sum(p.numel() for p in policy.parameters()),
        made_with=made_with(config),
        return_mean=result.return_mean,
        return_error=(high - low) / (2 * Z95),
        timesteps=int(rows[-1]["timesteps"]) if rows else 0,
    )


def _blindfold(policy: Policy) -> None:
    """Let the encoder see black images from now on."""
    assert policy.encoder is not None

    def blacken(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        images, *rest = inputs
        return ({name: torch.zeros_like(image) for name, image in images.items()}, *rest)

    policy.encoder.register_forward_pre_hook(blacken)


def _save_paths(config: StudyConfig, cell: Cell, look: Look, trajectories: list[Trajectory]) -> None:
    file = _paths_file(config, cell, look.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, *[t.states() for t in trajectories])


def _data_folder(config: StudyConfig, collect: CollectConfig, more: Sequence[CollectConfig] = ()) -> Path:
    sources = [to_json(source) for source in (collect, *more)]
    text = json.dumps(sources if more else sources[0], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return config.out / "data" / f"{collect.env.replace('/', '-')}-seed{collect.seed}-{digest}"


def _paths_file(config: StudyConfig, cell: Cell, look: str) -> Path:
    return config.out / "cells" / f"{cell.name}.{look}.npz"


def _result_file(config: StudyConfig, cell: Cell) -> Path:
    return config.out / "cells" / f"{cell.name}.json"


# ------------------------------------------------------------------------------------------------- tables


def mean_interval(rates: Sequence[float], episodes: int) -> tuple[float, float, float]:
    """Mean of the success rates of several seeds, and Wilson's 95 % interval of all their episodes together."""
    total = episodes * len(rates)
    mean = float(np.mean(rates))
    return (mean, *wilson(round(mean * total), total))


def write_table(
    config: StudyConfig,
    name: str,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    outcomes: Sequence[Outcome] = (),
) -> Path:
    """Write ``name.md`` (with `notes`, ``name.png``, and how `outcomes` were made), ``name.csv``; return the former."""
    return write_files(config.out, name, title, columns, rows, [*notes, "", provenance(name, config, outcomes)])


def write_files(
    out: Path, name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]
) -> Path:
    """Write ``name.md``, with ``name.png`` and `notes`, and ``name.csv`` into `out`; return the former."""
    with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([columns, *rows])
    lines = [f"# {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", f"![{title}]({name}.png)", "", *notes, ""]
    file = out / f"{name}.md"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def provenance(name: str, config: StudyConfig, outcomes: Sequence[Outcome] = ()) -> str:
    """Return which command made a table, on what: of outcomes, what each was made with."""
    command = f"dprl experiment {name} --seeds {' '.join(map(str, config.seeds))}"
    command += f" --episodes {config.episodes}" if outcomes else ""
    command += " --paper" if config.paper else ""
    command += "" if config.scale == 1 else f" --scale {config.scale:g}"
    command += " --out FOLDER"
    if not outcomes:
        return f"`{command}`, {made_with()}."
    return (
        f"`{command}`, {'; '.join(dict.fromkeys(o.made_with for o in outcomes))}; times were taken beside whatever "
        "else ran. Intervals are Wilson's (of returns, normal ones), of the episodes of all seeds together."
    )


def made_with(config: StudyConfig | None = None) -> str:
    """Return versions and machine in words, and of a study how many trainings run at a time."""
    machine = f"dprl {dprl.__version__}, torch {torch.__version__}, {os.cpu_count()} cores ({platform.machine()})"
    return machine if config is None else f"{machine}, {config.jobs} training(s) at a time on a thread each"


def training_hours(outcomes: Sequence[Outcome]) -> float:
    """Hours of all trainings together, each counted once however often it was looked at."""
    return sum({o.cell: o.train_s for o in outcomes}.values()) / 3600


def shown(mean: float, low: float, high: float) -> str:
    """``0.87 (0.80 to 0.92)``."""
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def grouped(items: Sequence[Item], key: Callable[[Item], str]) -> dict[str, list[Item]]:
    """Collect items by `key`, in order of first appearance."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups

"""The main job end to end: noisy demonstrations, behaviour cloning, DPPO, and what changed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dprl import checkpoint
from dprl.config import to_json
from dprl.data import Episodes, load_dataset
from dprl.diffusion import SolverConfig, solver_steps
from dprl.diffusion.solvers import SolverName, default_solver
from dprl.envs import rendering
from dprl.errors import RunExistsError
from dprl.experiments import plots, runs, video
from dprl.experiments.catalogue import Experiment
from dprl.networks import DENOISERS, DenoiserConfig, MLPConfig, TransformerConfig, UNetConfig
from dprl.policy import DiffusionConfig, DiffusionPolicy
from dprl.rollout import Evaluation, evaluate
from dprl.spec import EnvSpec, resolve
from dprl.training import RunFolder
from dprl.training.loop import InterruptedRunError
from dprl.training.progress import ProgressBar

# Final evaluations and videos use seeds that no training run of the same seed uses.
HELD_OUT = 1_000_000
DEMO_FILE, RESULTS_FILE = "demo.json", "results.json"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    stage: str
    success_rate: float
    low: float
    high: float
    episodes: int
    steps: str
    minutes: float


# Networks for two cores and chunks of four actions.
NETWORKS: dict[str, DenoiserConfig] = {
    "mlp": MLPConfig(),
    "unet": UNetConfig(down_dims=(16, 32), time_size=16),
    "transformer": TransformerConfig(n_layers=2, embedding_size=48, attention_dropout=0.0, causal=False),
}


def with_network(experiment: Experiment, denoiser: str) -> Experiment:
    """Return `experiment` with another network."""
    policy = experiment.pretrain.policy
    assert isinstance(policy, DiffusionConfig)
    policy = replace(policy, denoiser=NETWORKS[denoiser])
    return replace(experiment, pretrain=replace(experiment.pretrain, policy=policy))


def with_solver(experiment: Experiment, solver: SolverName, num_inference_steps: int | None) -> Experiment:
    """Return `experiment` with a policy that samples by another solver, and is fine-tuned through it where that goes.

    DPPO tunes the chains of ddpm, ddim (with eta = 1, to explore) and euler. For the dpmsolvers, whose steps look back,
    it tunes every training timestep through ddpm, so that any solver samples from what was tuned.

    Raises:
        ConfigError: the number of steps does not fit.
    """
    policy = experiment.pretrain.policy
    assert isinstance(policy, DiffusionConfig)
    if solver == "euler":
        flow = runs.FLOW
        own = flow.sampling.num_inference_steps
        num_inference_steps = own if num_inference_steps is None else num_inference_steps
        policy = replace(
            policy,
            num_train_timesteps=flow.num_train_timesteps,
            schedule=flow.schedule,
            prediction_type=flow.prediction_type,
        )
    sampling = SolverConfig(solver, num_inference_steps)
    policy = replace(policy, sampling=sampling)
    tuned = SolverConfig("ddpm") if solver.endswith("dpmsolver++") else sampling
    tuned = replace(tuned, eta=1.0) if solver == "ddim" else tuned
    steps = len(solver_steps(policy.noise, tuned))
    return replace(
        experiment,
        pretrain=replace(experiment.pretrain, policy=policy),
        finetune=replace(experiment.finetune, dppo=replace(experiment.finetune.dppo, solver=tuned, tuned_steps=steps)),
    )


def run(experiment: Experiment, seed: int, out: Path, *, progress_bar: bool = True, pictures: bool = True) -> list[Row]:
    """Run `experiment` in the folder `out`; print its table and leave data, runs, plots and a video there.

    What an interrupted demo of the same settings left in `out` is continued.

    Raises:
        RunExistsError: `out` holds something else, or a demo that is complete.
        InterruptedRunError: on SIGINT or SIGTERM, with what was trained so far saved.
    """
    console, start = Console(), time.perf_counter()
    spec = resolve(experiment.collect.env, experiment.collect.options)
    found = _stages(experiment, spec, seed, out, console, progress_bar=progress_bar)
    rows = _rows(experiment, found)
    checkpoint.write_json(out / RESULTS_FILE, {
        "experiment": experiment.name, "policy": policy_in_words(experiment), "seed": seed,
        "before": found.before.to_json(), "after": found.after.to_json(), "rows": [vars(row) for row in rows],
    })  # fmt: skip
    console.print(_table(experiment, seed, rows))

    console.print("[bold]5/5[/] plot and video")
    try:
        plots.learning_curve(found.tuned.path, out / "learning_curve.png", before=found.before, after=found.after)
        if pictures:
            _pictures(found.cloned.path, found.tuned.path, spec, seed, out, console)
    except Exception as error:  # graphics fail in many ways; none of them may spoil a finished run
        console.print(f"[yellow]not all pictures were drawn: {escape(str(error))}[/]")
    training = runs.minutes_of(found.cloned) + runs.minutes_of(found.tuned)
    print(f"{training:.1f} minutes of training, {_minutes_since(start):.1f} from the start of this command.")
    print(f"Everything is in {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    print(f"Next: dprl evaluate {out / 'finetune'} --env {spec.id} --episodes 100 --seed 1")
    return rows


@dataclass(frozen=True)
class _Found:
    """What the stages of a demo made."""

    data: Episodes
    collect_minutes: float
    cloned: RunFolder
    before: Evaluation
    tuned: RunFolder
    after: Evaluation


def _stages(
    experiment: Experiment, spec: EnvSpec, seed: int, out: Path, console: Console, *, progress_bar: bool
) -> _Found:
    """Do, or go on with, all that takes long."""
    collect = replace(experiment.collect, seed=seed)
    pretrain = replace(experiment.pretrain, data=str(out / "data"), seed=seed)
    finetune = replace(experiment.finetune, policy=str(out / "pretrain"), seed=seed)
    _require_own(out, experiment, seed)

    console.print(f"[bold]1/5[/] {collect.episodes} demonstrations of {spec.id}, action noise {collect.noise}")
    start = time.perf_counter()
    if (out / "data").exists():
        data = load_dataset(out / "data")
    else:
        data = runs.collect(collect, out / "data", progress_bar=progress_bar)
    collect_minutes = _minutes_since(start)

    console.print(f"[bold]2/5[/] behaviour cloning, {pretrain.steps} gradient steps")
    with _goes_on():
        cloned = runs.run_or_resume(pretrain, out / "pretrain", progress_bar=progress_bar)
    before = _evaluate(cloned.path, spec, experiment, seed, "before", progress_bar=progress_bar)

    console.print(f"[bold]3/5[/] DPPO, {finetune.total_timesteps:,} environment steps")
    with _goes_on():
        tuned = runs.run_or_resume(finetune, out / "finetune", progress_bar=progress_bar)

    console.print(f"[bold]4/5[/] evaluation on {experiment.eval_episodes} held-out episodes")
    after = _evaluate(tuned.path, spec, experiment, seed, "after", progress_bar=progress_bar)
    return _Found(data, collect_minutes, cloned, before, tuned, after)


def _rows(experiment: Experiment, found: _Found) -> list[Row]:
    """The table's rows, one a stage."""
    data, cloned, tuned = found.data, found.cloned, found.tuned
    demonstrations = runs.wilson_of(data)
    return [
        Row("demonstrations", data.success_rate, *demonstrations, data.n_episodes, f"{data.ends[-1]:,} env",
            found.collect_minutes),
        _row("behaviour cloning", found.before, f"{experiment.pretrain.steps:,} gradient", runs.minutes_of(cloned)),
        _row("fine-tuned (DPPO)", found.after, f"{runs.last_timesteps(tuned):,} env", runs.minutes_of(tuned)),
    ]  # fmt: skip


def _minutes_since(start: float) -> float:
    return (time.perf_counter() - start) / 60


def _require_own(out: Path, experiment: Experiment, seed: int) -> None:
    """Make `out`, or find there an incomplete demo of the same settings."""
    file, ours = out / DEMO_FILE, json.loads(json.dumps({"experiment": to_json(experiment), "seed": seed}))
    if not file.exists():
        RunFolder.require_free(out)
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(file, ours)
    elif (out / RESULTS_FILE).exists():
        raise RunExistsError(f"'{out}' already holds a complete demo: choose another folder")
    elif checkpoint.read_json(file) != ours:
        raise RunExistsError(f"'{out}' already holds a demo of other settings: choose another folder")


@contextmanager
def _goes_on() -> Iterator[None]:
    """Let an interruption say how to continue the demo, and not one of its runs."""
    try:
        yield
    except InterruptedRunError as error:
        remedy = "the same command, with the --out of this folder, goes on from there"
        raise InterruptedRunError(error.signum, remedy) from error


def _evaluate(
    path: Path, spec: EnvSpec, experiment: Experiment, seed: int, label: str, *, progress_bar: bool
) -> Evaluation:
    policy = DiffusionPolicy.from_pretrained(path)
    with ProgressBar(f"evaluate {label}", experiment.eval_episodes, shown=progress_bar) as bar:
        return evaluate(policy, spec, experiment.eval_episodes, HELD_OUT + seed, on_progress=bar.advance)


def _pictures(before: Path, after: Path, spec: EnvSpec, seed: int, out: Path, console: Console) -> None:
    """Video where this machine can render, drawn trajectories in any case."""
    policies = {"before": DiffusionPolicy.from_pretrained(before), "after": DiffusionPolicy.from_pretrained(after)}
    episodes = video.record(policies, spec, HELD_OUT + seed, out / "before_after.gif")
    plots.trajectories(episodes, out / "trajectories.png")
    if not any(episode.frames for episode in episodes["before"]):
        console.print(f"[yellow]no video: no GL library could be loaded; {rendering.REMEDY}[/]")


def _row(stage: str, result: Evaluation, steps: str, minutes: float) -> Row:
    assert result.success_rate is not None
    assert result.success_ci95 is not None
    return Row(stage, result.success_rate, *result.success_ci95, result.episodes, steps, minutes)


def policy_in_words(experiment: Experiment) -> str:
    """Return the network and how it samples: ``unet, ddim with 5 steps``."""
    policy = experiment.pretrain.policy
    assert isinstance(policy, DiffusionConfig)
    name = next(name for name, network in DENOISERS.items() if isinstance(policy.denoiser, network.config))
    solver = policy.sampling.solver or default_solver(policy.noise)
    return f"{name}, {solver} with {len(solver_steps(policy.noise, policy.sampling))} steps"


def _table(experiment: Experiment, seed: int, rows: list[Row]) -> Table:
    title = f"{experiment.collect.env}, {policy_in_words(experiment)}, seed {seed}"
    table = Table(title=title, box=None, padding=(0, 1), pad_edge=False)
    for column in ("", "success", "95 %", "episodes", "steps", "minutes"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for row in rows:
        interval = f"{row.low:.2f} to {row.high:.2f}"
        table.add_row(
            row.stage, f"{row.success_rate:.2f}", interval, str(row.episodes), row.steps, f"{row.minutes:.1f}"
        )
    return table

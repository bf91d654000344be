"""The one loop: collect, update, evaluate, checkpoint, log. For every algorithm."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from dprl.config import validate
from dprl.errors import DprlError, EnvFaultError, WorkerError
from dprl.log import MetricsLog
from dprl.training.agent import Agent, load_agent_state
from dprl.training.progress import ProgressBar
from dprl.training.run import RunFolder

if TYPE_CHECKING:
    from dprl.rollout.evaluation import Evaluation


Evaluate = Callable[[], "Evaluation | Future[Evaluation]"]


@dataclass(frozen=True)
class LoopConfig:
    """When to stop, evaluate and save."""

    total_timesteps: int
    """Environment steps over all environments; gradient steps for behaviour cloning."""
    eval_every: int = 0
    """Iterations between evaluations; 0 never evaluates."""
    checkpoint_every: int = 10
    """Iterations between checkpoints."""

    def __post_init__(self) -> None:
        validate(self, at_least={"total_timesteps": 1, "eval_every": 0, "checkpoint_every": 1})


class InterruptedRunError(DprlError):
    """The user asked the run to stop; it was saved."""

    def __init__(self, signum: int, remedy: str) -> None:
        super().__init__(signum, remedy)
        self.signum = signum
        self.remedy = remedy
        self.exit_code = 128 + signum

    def __str__(self) -> str:
        return f"stopped; {self.remedy}"


@dataclass
class _Progress:
    """Where a run is."""

    iteration: int = 0
    best: float | None = None
    pending: Future[Evaluation] | None = None
    """An evaluation of the last iteration's policy that runs beside this iteration."""
    started: float = field(default_factory=time.perf_counter)
    seconds_before: float = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds of work, those before a resume included."""
        return self.seconds_before + time.perf_counter() - self.started

    def improves(self, result: Evaluation) -> bool:
        """Note the best score; of equals the longer trained is the better."""
        better = self.best is None or result.score >= self.best
        self.best = result.score if better else self.best
        return better


def train(
    agent: Agent[Any],
    config: LoopConfig,
    *,
    run: RunFolder | None = None,
    evaluate: Evaluate | None = None,
    resume: bool = False,
    wandb_project: str | None = None,
    progress_bar: bool = True,
) -> None:
    """Drive `agent` to `config.total_timesteps`.

    A checkpoint is written before the first iteration, every `checkpoint_every`, at every new best evaluation, at the
    end, and when the run is interrupted. An iteration is logged before it is saved, and a resumed run drops the rows
    after its checkpoint and writes them anew: so a killed run continues as if it had never stopped.

    Args:
        agent: what learns.
        config: when to stop, evaluate and save.
        run: where to save and log; None keeps all in memory.
        evaluate: scores the agent's policy as it is now; must not touch its state. Where it returns a future, training
            goes on meanwhile, and the figures are in the row of the iteration that follows.
        resume: continue from the run's newest checkpoint.
        wandb_project: also log to this W&B project.
        progress_bar: show one.

    Raises:
        EnvFaultError, WorkerError: an environment failed more often than the pool forgives; all before it is saved.
        InterruptedRunError: on SIGINT or SIGTERM, after the current iteration was finished and, in a run, saved.
        RunExistsError: another process trains the same run.
    """
    with run.locked() if run is not None else nullcontext(), _interruptible() as interrupted:
        progress = _Progress()
        if run is not None and resume:
            assert run.last is not None
            about = load_agent_state(agent, run.last)
            progress = _Progress(about["iteration"], about["best_score"], seconds_before=about["elapsed_s"])
            if about.get("pending_evaluation") and evaluate is not None:
                progress.pending = _as_future(evaluate())
        kept = progress.iteration if resume else -1
        fault: DprlError | None = None
        log = MetricsLog(run.path, keep_iterations=kept, wandb_project=wandb_project) if run else None
        try:
            with ProgressBar(agent.name, config.total_timesteps, agent.timesteps, shown=progress_bar) as bar:
                if not resume:
                    fault = _finish_iteration(agent, config, progress, {}, run, evaluate, log, bar)
                while fault is None and agent.timesteps < config.total_timesteps and not interrupted:
                    try:
                        metrics = _iterate(agent)
                    except (EnvFaultError, WorkerError) as error:  # the agent is as the last iteration left it
                        fault = error
                        break
                    progress.iteration += 1
                    fault = _finish_iteration(agent, config, progress, metrics, run, evaluate, log, bar)
            if run is not None and (run.last is None or run.progress()["iteration"] != progress.iteration):
                run.save(agent, progress.iteration, best=progress.best, is_best=False, elapsed_s=progress.elapsed_s)
        finally:
            if log is not None:
                log.close()
    remedy = f"all iterations are saved; continue with 'dprl resume {run.path}'" if run else "nothing was saved"
    if fault is not None:
        fault.add_note(remedy)
        raise fault
    if interrupted:
        raise InterruptedRunError(interrupted[0], remedy)


def _iterate(agent: Agent[Any]) -> dict[str, float]:
    """One collection and update, timed."""
    before, start = agent.timesteps, time.perf_counter()
    batch = agent.collect()
    collected = time.perf_counter()
    metrics = agent.update(batch)
    end = time.perf_counter()
    for name, value in metrics.items():
        if math.isinf(value) or (math.isnan(value) and name.endswith("loss")):
            raise DprlError(
                f"{name} = {value} at timestep {agent.timesteps}: training diverged; lower the learning rate"
            )
    collect_s, total_s = collected - start, end - start
    inference_s = metrics.get("time/inference_s", 0.0)
    return metrics | {
        "time/collect_s": collect_s,
        "time/update_s": end - collected,
        "time/timesteps_per_s": (agent.timesteps - before) / total_s,
        "time/rollout_share": (collect_s - inference_s) / total_s,
        "time/inference_share": inference_s / total_s,
        "time/update_share": (end - collected) / total_s,
    }


def _finish_iteration(
    agent: Agent[Any],
    config: LoopConfig,
    progress: _Progress,
    metrics: dict[str, float],
    run: RunFolder | None,
    evaluate: Evaluate | None,
    log: MetricsLog | None,
    bar: ProgressBar,
) -> DprlError | None:
    """Evaluate, log and checkpoint, as far as each is due; return what an evaluation failed with."""
    i, finished = progress.iteration, agent.timesteps >= config.total_timesteps
    is_best, fault = False, None
    try:
        if progress.pending is not None:
            earlier = progress.pending.result()
            progress.pending = None
            metrics = metrics | earlier.metrics()
            if progress.improves(earlier) and run is not None:
                run.mark_best(i - 1)
        if evaluate is not None and config.eval_every and (i % config.eval_every == 0 or finished):
            result = evaluate()
            if isinstance(result, Future) and not finished:
                progress.pending = result
            else:
                score = result.result() if isinstance(result, Future) else result
                is_best = progress.improves(score)
                metrics = metrics | score.metrics()
    except (EnvFaultError, WorkerError) as error:
        fault = error
    metrics = metrics | {"time/elapsed_s": progress.elapsed_s}
    if log is not None:
        log.write(metrics, i, agent.timesteps)
    pending = progress.pending is not None  # then this may turn out to be the best
    if run is not None and (is_best or pending or i % config.checkpoint_every == 0 or finished):
        run.save(agent, i, best=progress.best, is_best=is_best, elapsed_s=metrics["time/elapsed_s"], pending=pending)
    bar.update(agent.timesteps, metrics)
    return fault


def _as_future(result: Evaluation | Future[Evaluation]) -> Future[Evaluation]:
    if isinstance(result, Future):
        return result
    done: Future[Evaluation] = Future()
    done.set_result(result)
    return done


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the list it yields; a second one acts at once, as it would have."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def handle(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        print("\nstopping after this iteration; once more to stop at once", file=sys.stderr)
        for number, handler in previous.items():
            signal.signal(number, handler)

    try:
        for asked in (signal.SIGINT, signal.SIGTERM):
            previous[asked] = signal.signal(asked, handle)
    except ValueError:  # not in the main thread: no handlers can be set
        pass
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""Ray actors under supervision: whoever dies, hangs or whose environment fails is set right, and the call made again.

Restarts are Ray's (``max_restarts=-1``). Ray repeats no call by itself (``max_task_retries=0``): on an actor that has
lost its environments that would be wrong.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from dprl.config import validate
from dprl.errors import (
    ClosedPoolError,
    ConfigError,
    DprlError,
    EnvFaultError,
    MissingDependencyError,
    WorkerError,
    check,
    check_count,
)
from dprl.rollout.collector import Collector, Share
from dprl.spec import EnvSpec, EnvState, FloatArray

try:
    import ray
    from ray.exceptions import ActorDiedError, GetTimeoutError, RayError, RayTaskError
except ImportError as error:
    raise MissingDependencyError("ray", "ray", "a Ray rollout pool") from error

from dprl.rollout.ray_pool.surroundings import Surroundings

START_TIMEOUT_S = 120.0
FREEING_TIMEOUT_S = 10.0
ABANDONED_TIMEOUT_S = 5.0
POLL_S = 0.1
RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")
ROUNDING = 1e-6
"""Of sums of CPUs, which are fractions."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resource:
    """One of Ray's custom resources."""

    name: str
    amount: float = 1.0

    def __post_init__(self) -> None:
        validate(self, above={"amount": 0})
        own = self.name and self.name not in RAYS_OWN
        check(bool(own), "name", self.name, f"must be a custom resource's, not empty or one of {', '.join(RAYS_OWN)}")


@dataclass(frozen=True)
class WorkerOptions:
    """What each worker claims of the cluster, and what it is forgiven."""

    cpus: float = 1.0
    """CPUs of those that Ray has declared, and the threads of the simulator."""
    gpus: float = 0.0
    """Of those that Ray has declared; for simulators that use one."""
    resources: tuple[Resource, ...] = ()
    """Ray's custom resources, which only some nodes have."""
    placement: Literal["DEFAULT", "SPREAD"] = "DEFAULT"
    """Ray's scheduling strategy: fill one node after the other, or spread over all."""
    timeout_s: float = 600.0
    """A call that takes longer has hung: a collection, or the part of an evaluation that one worker plays at once."""
    restart_timeout_s: float = 60.0
    """A worker that does not come back within this time is given up, and the others take its environments over."""
    max_failures: int = 3
    """How many failures of one worker in one call are mended."""

    def __post_init__(self) -> None:
        validate(
            self,
            at_least={"cpus": 0, "gpus": 0, "max_failures": 0},
            above={"timeout_s": 0, "restart_timeout_s": 0},
        )


class BlankWorkerError(Exception):
    """The worker was restarted, as the process `pid`, and no longer has the environments it was asked for."""

    def __init__(self, pid: int) -> None:
        super().__init__(pid)
        self.pid = pid


class Worker:
    """Runs in its own process, and holds the shares that were given to it."""

    def __init__(self, surroundings: Surroundings | None = None) -> None:
        import torch

        torch.set_num_threads(1)
        if surroundings is not None:
            surroundings.enter()
        self._collectors: dict[int, Collector] = {}

    def ready(self) -> int:
        """Return the process it is."""
        return os.getpid()

    def call(self, share: Share, method: str, *arguments: Any) -> Reply:
        """Call a method of the share's collector."""
        if share.first_env not in self._collectors:
            raise BlankWorkerError(os.getpid())
        collector = self._collectors[share.first_env]
        result = getattr(collector, method)(*arguments)
        noted = method == "step_chunk" and share.spec.replayable
        return Reply(result, None if noted else collector.state())

    def call_anew(
        self,
        share: Share,
        state: EnvState | None,
        chunks: Sequence[FloatArray],
        lost: bool,
        method: str,
        *arguments: Any,
    ) -> Reply:
        """Build the share's environments, in place of those it has; bring them to where they were; then `call`.

        Where that is `lost`, the next episodes have begun, and there is no result.
        """
        old = self._collectors.pop(share.first_env, None)
        if old is not None:
            old.dispose()
        collector = self._collectors[share.first_env] = share.build()
        if state is not None:
            collector.restore(state)
        for actions in chunks:
            collector.step_chunk(actions)
        return Reply(None, collector.state()) if lost else self.call(share, method, *arguments)

    def apply(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that has nothing to do with the shares."""
        return function(*arguments)


class Reply(NamedTuple):
    """What a share's collector returned."""

    result: Any
    """None: it was lost, and could not be made up for."""
    state: EnvState | None
    """Where the environments are now; None after a chunk that whoever sent it can note, to replay it."""


def sent(what: str, value: Any) -> Any:
    """Put `value` into the object store; return its reference.

    Raises:
        ConfigError: it cannot be sent to another process.
    """
    try:
        return ray.put(value)
    except TypeError as error:
        why = str(error).splitlines()[0]
        raise ConfigError(f"{what} = {type(value).__name__}: cannot be sent to Ray workers: {why}") from error


def writable(state: EnvState) -> EnvState:
    """Return a copy: what comes from the object store is read-only."""
    return EnvState(np.array(state.episodes), np.array(state.lengths), np.array(state.actions))


class Job(Protocol):
    """One call on one worker, which can be made again."""

    host: int
    """Which worker."""

    def start(self, worker: Any, *, again: bool, failed: bool) -> Any:
        """Submit the call; return its reference.

        Args:
            worker: the actor.
            again: whether it may lack what earlier calls left with it.
            failed: whether this call was under way already, and was lost.
        """
        ...


@dataclass
class _Running:
    """A call that is under way."""

    number: int
    host: int
    deadline: float


class Crew:
    """Workers, by number. All calls go through `finish`."""

    def __init__(self, num_workers: int, options: WorkerOptions, spec: EnvSpec) -> None:
        """Start them, where the environments of `spec` can be built, and wait until all answer.

        Raises:
            ConfigError: Ray has less free than they claim.
        """
        check_count("num_workers", num_workers)
        self.options = options
        require_capacity(num_workers, options)
        actor = ray.remote(Worker).options(
            num_cpus=options.cpus,
            num_gpus=options.gpus,
            resources={resource.name: resource.amount for resource in options.resources},
            scheduling_strategy=options.placement,
            max_restarts=-1,
            max_task_retries=0,
        )
        surroundings = Surroundings.here(spec)
        self._workers: list[Any] = [actor.remote(surroundings) for _ in range(num_workers)]
        self._running: dict[Any, _Running] = {}
        self._lost: dict[int, float] = {}  # those that have not answered since they died, and until when they may
        self._asked: dict[Any, int] = {}  # what they are asked, one thing at a time
        self._closed = False
        self._turn = threading.Lock()
        self.failures = 0
        """Calls that were made again so far."""
        try:
            self._pids: list[int] = ray.get([w.ready.remote() for w in self._workers], timeout=START_TIMEOUT_S)
        except BaseException as error:
            self.close()
            if isinstance(error, GetTimeoutError):
                raise ConfigError(
                    f"num_workers = {num_workers}: not all of them started within {START_TIMEOUT_S:g} s; "
                    "'ray status' shows what they wait for"
                ) from error
            if isinstance(error, RayError):
                why = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
                raise ConfigError(f"num_workers = {num_workers}: one could not start: {why}") from error
            raise

    @property
    def hosts(self) -> list[int]:
        """The workers that are not given up."""
        return [i for i, worker in enumerate(self._workers) if worker is not None]

    def finish(self, jobs: Sequence[Job], on_result: Callable[[Any], None] | None = None) -> list[Any]:
        """Make all calls, one at a time on each worker; return their results; `on_result` sees each as it comes.

        Threads take turns.

        Raises:
            WorkerError: a worker failed more often than it is forgiven, or none is left.
            ClosedPoolError: they are closed.
            Exception: what a job raised, where the fault is not an environment's.
        """
        with self._turn:
            return self._finish(jobs, on_result)

    def _finish(self, jobs: Sequence[Job], on_result: Callable[[Any], None] | None) -> list[Any]:
        self.require_open()
        self._drain()
        results: list[Any] = [None] * len(jobs)
        failures, again = [0] * len(jobs), [False] * len(jobs)
        waiting = deque(range(len(jobs)))
        while waiting or self._running:
            self.require_open()
            self._start(jobs, waiting, again, failures)
            for ref in self._arrived():
                number = self._running[ref].number
                try:
                    results[number] = self._outcome(ref)
                except BlankWorkerError as blank:
                    self._meet(jobs[number].host, blank.pid)
                    again[number] = True
                    waiting.appendleft(number)
                except (EnvFaultError, WorkerLostError) as failure:
                    self.require_open()
                    if isinstance(failure, WorkerLostError):
                        self._miss(jobs[number].host)
                    failures[number] += 1
                    if failures[number] > self.options.max_failures:
                        times = f"failed {failures[number]} times in one call; the last time"
                        raise WorkerError(f"{jobs[number]} {times}: {failure}") from failure
                    log.warning("%s: %s; made again (failure %d)", jobs[number], failure, failures[number])
                    self.failures += 1
                    again[number] = True
                    waiting.appendleft(number)
                else:
                    if on_result is not None:
                        on_result(results[number])
                del self._running[ref]  # not before: an interrupt in here leaves it to `_drain`
        return results

    def close(self) -> None:
        """End the workers. A `finish` in another thread then raises ClosedPoolError."""
        self._closed = True
        for worker in self._workers:
            if worker is not None and ray.is_initialized():  # else `kill` would start a Ray
                with suppress(Exception):  # it may be another Ray than theirs
                    ray.kill(worker)
        if self._turn.acquire(timeout=ABANDONED_TIMEOUT_S):  # by then another thread has noticed
            self._turn.release()

    def require_open(self) -> None:
        """Raise ClosedPoolError after `close`, and after Ray has ended."""
        if self._closed or not ray.is_initialized():
            raise ClosedPoolError

    def _start(self, jobs: Sequence[Job], waiting: deque[int], again: list[bool], failures: list[int]) -> None:
        """Start the jobs whose workers are free; give those of a worker that was given up another one."""
        busy = {*self._lost, *(call.host for call in self._running.values())}
        for number in list(waiting):
            job = jobs[number]
            if self._workers[job.host] is None:
                job.host, again[number] = self._heir(job), True
            if job.host not in busy:
                busy.add(job.host)
                waiting.remove(number)
                ref = job.start(self._workers[job.host], again=again[number], failed=failures[number] > 0)
                self._running[ref] = _Running(number, job.host, time.monotonic() + self.options.timeout_s)

    def _arrived(self) -> list[Any]:
        """Wait for calls that have ended, well or badly, or for lost workers; end those that take too long."""
        restarting = set(self._lost) - set(self._asked.values())
        self._asked |= {self._workers[host].ready.remote(): host for host in restarting}
        under_way = [*self._running, *self._asked]
        deadline = min([*self._lost.values(), *(call.deadline for call in self._running.values())])
        ready, _ = ray.wait(under_way, timeout=max(0.0, deadline - time.monotonic()))
        if ready:  # and whatever else is there: one look for each of thousands of workers would take long
            ready, _ = ray.wait(under_way, num_returns=len(under_way), timeout=0)
        if deadline <= time.monotonic():
            self._end_late()
        self._hear([ref for ref in ready if ref in self._asked])
        return [ref for ref in ready if ref in self._running]

    def _end_late(self) -> None:
        """End the workers whose calls take too long, so that these fail; not where a result is on its way."""
        under_way = list(self._running)
        finished, _ = ray.wait(under_way, num_returns=len(under_way), timeout=0, fetch_local=False)
        for ref, call in self._running.items():
            if call.deadline <= time.monotonic():
                call.deadline = time.monotonic() + self.options.restart_timeout_s
                if ref not in finished:
                    ray.kill(self._workers[call.host], no_restart=False)

    def _drain(self) -> None:
        """Wait a little for what an interrupted `finish` has left behind, then end it: nobody wants its results.

        Workers that were lost in it are no failure of the next call.
        """
        for call in self._running.values():
            call.deadline = min(call.deadline, time.monotonic() + ABANDONED_TIMEOUT_S)
        while self._running or self._lost:
            for ref in self._arrived():
                try:
                    ray.get(ref)
                except RayTaskError:
                    pass
                except RayError:
                    self._miss(self._running[ref].host)
                del self._running[ref]

    def _outcome(self, ref: Any) -> Any:
        """Return a job's result, or raise what it came to in terms of this library."""
        try:
            return ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, DprlError | BlankWorkerError):
                raise error.cause from None
            raise
        except RayError as error:
            raise WorkerLostError(
                f"it died, or did not answer for {self.options.timeout_s:g} s and was ended ({type(error).__name__})"
            ) from error

    def _meet(self, host: int, pid: int) -> None:
        """Count a process that was lost without anyone waiting for it."""
        if self._pids[host] != pid:
            log.warning("worker %d: its process was restarted since the last call (failure)", host)
            self.failures += 1
            self._pids[host] = pid

    def _miss(self, host: int) -> None:
        """Give a lost worker time to come back; nothing else is asked of it until then."""
        self._lost[host] = time.monotonic() + self.options.restart_timeout_s

    def _hear(self, answers: list[Any]) -> None:
        """Take up the lost workers that answer; give up those that do not come back."""
        for ref in answers:
            host = self._asked.pop(ref)
            try:
                self._pids[host] = ray.get(ref)
                self._lost.pop(host, None)
            except ActorDiedError:
                self.require_open()
                self._give_up(host)
            except RayError:  # it is being restarted
                time.sleep(POLL_S / len(answers))
        for host in [host for host, until in self._lost.items() if until <= time.monotonic()]:
            self._give_up(host)

    def _give_up(self, host: int) -> None:
        log.warning("worker %d does not come back: the others take its environments over", host)
        self._asked = {ref: other for ref, other in self._asked.items() if other != host}
        self._lost.pop(host, None)
        worker, self._workers[host] = self._workers[host], None
        ray.kill(worker)

    def _heir(self, job: Job) -> int:
        if not self.hosts:
            raise WorkerError("no worker is left: none came back after it died")
        return self.hosts[job.host % len(self.hosts)]


class WorkerLostError(Exception):
    """A worker's process died or hung."""


def require_capacity(num_workers: int, options: WorkerOptions) -> None:
    """Refuse what would wait for ever: an actor that does not fit what Ray has declared stays pending.

    Raises:
        ConfigError: with the arithmetic.
    """
    each = {"CPU": options.cpus, "GPU": options.gpus, **{r.name: r.amount for r in options.resources}}
    _require_nodes(num_workers, {name: amount for name, amount in each.items() if amount})
    deadline = time.monotonic() + FREEING_TIMEOUT_S  # workers that were just ended give theirs back a little later
    for name, amount in each.items():
        wanted, total = num_workers * amount, ray.cluster_resources().get(name, 0.0)
        enough = wanted - ROUNDING
        while (free := ray.available_resources().get(name, 0.0)) < enough <= total and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if free < enough:
            label = _label(name)
            raise ConfigError(
                f"num_workers = {num_workers}: {num_workers} workers x {amount:g} {label} each = {wanted:g}, but Ray "
                f"has {free:g} {label} free; use fewer workers, or let each claim less"
            )


def _label(name: str) -> str:
    return f"{name}s" if name in ("CPU", "GPU") else f"'{name}'"


def _require_nodes(num_workers: int, each: dict[str, float]) -> None:
    """Refuse workers of which the nodes, each by itself, have no room for as many."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = [min((int(node.get(name, 0.0) / amount + ROUNDING) for name, amount in each.items()), default=num_workers)
            for node in nodes]  # fmt: skip
    total = {name: sum(node.get(name, 0.0) for node in nodes) for name in each}
    if sum(fits) < num_workers and all(total[name] > num_workers * amount - ROUNDING for name, amount in each.items()):
        claim = " and ".join(f"{amount:g} {_label(name)}" for name, amount in each.items())
        raise ConfigError(
            f"num_workers = {num_workers}: together Ray's {len(nodes)} nodes have enough, but of workers that claim "
            f"{claim} each, which must be on one node, they hold only {sum(fits)}; use fewer, or let each claim less"
        )

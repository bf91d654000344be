"""The environments on Ray workers, each with a share of them and a copy of the policy.

One remote call per worker and collection: the weights go once into the object store, whole rollouts come back through
it, read where they lie.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dprl.errors import WorkerError, check
from dprl.guidance import Guide
from dprl.observations import Observation
from dprl.policy import InferenceConfig, Policy, RecedingHorizon, Scorer
from dprl.rollout.collector import Share
from dprl.rollout.evaluation import Evaluation, check_evaluation, summary
from dprl.rollout.pool import (
    Actor,
    Rollout,
    RolloutPool,
    check_collection,
    check_state,
    checked_slice_size,
    cut,
    joined,
)
from dprl.rollout.ray_pool.cluster import RayConnection
from dprl.rollout.ray_pool.evaluator import on_cpu, play_on
from dprl.rollout.ray_pool.workers import Crew, Reply, WorkerOptions, sent, writable
from dprl.spec import ChunkStep, EnvOptions, EnvSpec, EnvState, FloatArray, builder_of, check_actions, spec_of

JOURNAL_LENGTH = 100
"""Chunks of a policy that acts elsewhere, after which the environments' state is noted anew."""


class RayPool(RolloutPool):
    """N environments on Ray workers. The same seed and slice size give the same rollouts as in one process."""

    def __init__(
        self,
        env: str | EnvSpec,
        n_envs: int,
        *,
        num_workers: int,
        seed: int = 0,
        slice_size: int | None = None,
        options: EnvOptions | None = None,
        workers: WorkerOptions | None = None,
        address: str | None = None,
        runtime_env: dict[str, Any] | None = None,
    ) -> None:
        """Start `num_workers` actors on the Ray that runs in this process, at `address`, or is started here.

        Args:
            env: the task.
            n_envs: environments over all workers.
            num_workers: must divide the number of slices.
            seed: of the environments and of the exploration noise.
            slice_size: environments per inference batch; must divide `n_envs`. Default: at most 32.
            options: of the environment, if it is named.
            workers: what each claims, and what it is forgiven.
            address: of a running cluster, as `ray.init` takes it.
            runtime_env: Ray's, of a cluster. Default: one that carries this checkout's code to its nodes.

        Raises:
            ConfigError: the numbers do not divide, or Ray has too few CPUs.
        """
        self.spec = spec_of(env, options)
        builder_of(self.spec)
        self.n_envs = n_envs
        self.slice_size = checked_slice_size(n_envs, slice_size)
        workers = WorkerOptions() if workers is None else workers
        check(isinstance(workers, WorkerOptions), "workers", workers, "must be WorkerOptions(...)")
        threads = max(1, int(workers.cpus))
        shares = Share(self.spec, seed, self.slice_size, 0, n_envs, threads).divided(num_workers, "num_workers")
        self._turn = threading.RLock()
        self._ray = RayConnection(address, runtime_env)
        try:
            self._crew = Crew(num_workers, workers, self.spec)
            self._seats = [_Seat(share, host) for host, share in enumerate(shares)]
            self._everywhere("state", [()] * num_workers)
        except BaseException:
            self.close()
            raise

    @property
    def failures(self) -> int:
        """How many calls had to be made again so far."""
        return self._crew.failures

    def reset(self) -> Observation:
        """See `RolloutPool.reset`."""
        return joined(self._complete("reset", [()] * len(self._seats)))

    def step_chunk(self, actions: FloatArray) -> ChunkStep:
        """See `RolloutPool.step_chunk`."""
        self._crew.require_open()
        check_actions(actions, self.n_envs, self.spec)
        if len(self._seats[0].chunks) >= JOURNAL_LENGTH:
            self.state()
        pieces = cut(np.array(actions), [seat.share.n_envs for seat in self._seats])  # a copy, for the journal
        return ChunkStep.concatenate(self._complete("step_chunk", [(piece,) for piece in pieces]))

    def collect(self, actor: Actor, n_steps: int) -> Rollout:
        """See `RolloutPool.collect`.

        Raises:
            WorkerError: a worker failed more often than it is forgiven: `state` is then what it was before. Or every
                worker was lost, and episodes cannot be replayed: the next ones then begin.
        """
        self._crew.require_open()
        check_collection(actor, n_steps, self.spec)
        shared = sent("actor", actor.cpu())
        parts = self._everywhere("collect", [(shared, n_steps)] * len(self._seats))
        kept = [part for part in parts if part is not None]
        if not kept:
            raise WorkerError(f"{self.spec.id}: every worker was lost, and episodes cannot be replayed")
        return Rollout.concatenate(kept)

    def evaluate(
        self,
        policy: Policy,
        episodes: int,
        seed: int,
        *,
        inference: InferenceConfig | None = None,
        guide: Guide | None = None,
        scorer: Scorer | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Evaluation:
        """See `RolloutPool.evaluate`. Its slices are divided among the workers."""
        self._crew.require_open()
        check_evaluation(policy, self.spec, episodes, seed)
        control = RecedingHorizon(policy, inference, guide=guide, scorer=scorer)
        outcomes = play_on(
            self._crew, sent("policy", on_cpu(control)), self.spec, episodes, seed,
            num_threads=self._seats[0].share.num_threads, on_progress=on_progress,
        )  # fmt: skip
        return summary(control, self.spec, seed, outcomes)

    def state(self) -> EnvState:
        """See `RolloutPool.state`; it fits any number of workers."""
        if any(seat.chunks for seat in self._seats):
            self._complete("state", [()] * len(self._seats))
        return EnvState.concatenate([seat.state for seat in self._seats if seat.state is not None])

    def restore(self, state: EnvState) -> None:
        """See `RolloutPool.restore`."""
        self._crew.require_open()
        check_state(state, self.n_envs, self.spec)
        with self._turn:
            before = self._seats
            self._seats = [seat.at(state.part(seat.share.first_env, seat.share.n_envs)) for seat in before]
            try:
                self._everywhere("state", [()] * len(self._seats))
            except BaseException:
                self._seats = [replace(seat, built=False) for seat in before]
                raise

    def close(self) -> None:
        """End the workers, and Ray if it was started for them."""
        try:
            if hasattr(self, "_crew"):
                self._crew.close()
        finally:
            self._ray.close()

    def _complete(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """Call a method of every share, where none can be done without."""
        results = self._everywhere(method, arguments)
        if any(result is None for result in results):
            raise WorkerError(f"{self.spec.id}: a worker was lost, and its episodes cannot be replayed")
        return results

    def _everywhere(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """Call a method of every share; either all are then further, or none is."""
        with self._turn:
            jobs = [_ShareCall(seat, method, a, seat.built) for seat, a in zip(self._seats, arguments, strict=True)]
            for seat in self._seats:
                seat.built = False  # until all are further
            replies = self._crew.finish(jobs)
            self._seats = [seat.after(reply, a) for seat, reply, a in zip(self._seats, replies, arguments, strict=True)]
        return [reply.result for reply in replies]


@dataclass
class _Seat:
    """Where a share is, and all that brings it back."""

    share: Share
    host: int
    built: bool = False
    state: EnvState | None = None
    chunks: list[FloatArray] = field(default_factory=list)
    """What was executed since `state`."""

    def at(self, state: EnvState) -> _Seat:
        """The same, still to be brought to `state`."""
        return replace(self, built=False, state=state, chunks=[])

    def after(self, reply: Reply, arguments: tuple[Any, ...]) -> _Seat:
        """Where it is once a call has come back."""
        if reply.state is None:
            return replace(self, built=True, chunks=[*self.chunks, arguments[0]])
        return replace(self, built=True, state=writable(reply.state), chunks=[])


@dataclass
class _ShareCall:
    """A method of a share's collector."""

    seat: _Seat
    method: str
    arguments: tuple[Any, ...]
    built: bool
    """Whether its worker has the share as it should be."""

    @property
    def host(self) -> int:
        return self.seat.host

    @host.setter
    def host(self, host: int) -> None:
        self.seat.host = host

    def start(self, worker: Any, *, again: bool, failed: bool) -> Any:
        seat = self.seat
        if self.built and not again:
            return worker.call.remote(seat.share, self.method, *self.arguments)
        # a chunk is meant for the episodes that were open; a collection goes on with others, unless it had begun
        lost = again if self.method == "step_chunk" else failed and self.method == "collect"
        lost = lost and not seat.share.spec.replayable
        return worker.call_anew.remote(seat.share, seat.state, seat.chunks, lost, self.method, *self.arguments)

    def __str__(self) -> str:
        return f"worker {self.host} ({self.seat.share})"

"""All environments in this process: what costs nothing on a laptop, and what a policy on an accelerator wants."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

from dprl.errors import ClosedPoolError, ConfigError, EnvError, EnvFaultError, check, check_count
from dprl.guidance import Guide
from dprl.observations import Observation
from dprl.policy import InferenceConfig, Policy, Scorer
from dprl.rollout.collector import Collector, Record, Share
from dprl.rollout.evaluation import Evaluation, evaluate
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
from dprl.spec import BatchedEnv, ChunkStep, EnvOptions, EnvSpec, EnvState, FloatArray, check_actions, spec_of

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class InProcessPool(RolloutPool):
    """All environments in this process."""

    def __init__(
        self,
        env: BatchedEnv | EnvSpec | str,
        n_envs: int | None = None,
        *,
        seed: int = 0,
        slice_size: int | None = None,
        options: EnvOptions | None = None,
        double_buffer: bool = False,
        max_failures: int = 3,
    ) -> None:
        """Take a batched environment, or build `n_envs` from a spec or a name.

        Args:
            env: the environments, or what to build.
            n_envs: how many to build; only with a spec or a name.
            seed: of the environments built and of the exploration noise.
            slice_size: environments per inference batch; must divide their number. Default: at most 32.
            options: of the environment, if it is named.
            double_buffer: let one half of the environments move while the policy decides for the other. The rollouts
                are the same. Needs a spec, and an even number of slices. Slower wherever it was measured, with a
                small policy on a GPU too: for one whose arithmetic outlasts the launching of its kernels.
            max_failures: how many failures of one call are mended: environments built from a spec whose episodes can be
                replayed are built again and brought to where they were, and the call is repeated.

        Raises:
            ConfigError: the numbers do not divide, or one does not fit what `env` is.
        """
        check_count("max_failures", max_failures, 0)
        check_count("seed", seed, 0)
        check(isinstance(double_buffer, bool), "double_buffer", double_buffer, "must be True or False")
        self._max_failures = max_failures
        if isinstance(env, str | EnvSpec):
            env = spec_of(env, options)
        else:
            _require_batched(env)
        if isinstance(env, EnvSpec):
            if n_envs is None:
                raise ConfigError("n_envs = None: state how many environments to build from a spec")
            size = checked_slice_size(n_envs, slice_size)
            slices = n_envs // size
            halves = not double_buffer or slices % 2 == 0
            check(halves, "double_buffer", double_buffer, "needs an even number of slices: "
                  f"{n_envs} environments / slice_size {size} = {slices}; set another slice_size")  # fmt: skip
            self._shares = Share(env, seed, size, 0, n_envs).divided(2 if double_buffer else 1, "double_buffer")
            self._parts = _built(self._shares)
        else:
            check(n_envs in (None, env.n_envs), "n_envs", n_envs, f"there are {env.n_envs} environments")
            check(not double_buffer, "double_buffer", double_buffer, "needs a spec: halves are built apart")
            size = checked_slice_size(env.n_envs, slice_size)
            self._shares = []
            self._parts = [Collector(env, seed, size)]
        self.spec, self.n_envs, self.slice_size = self._parts[0].env.spec, sum(p.env.n_envs for p in self._parts), size
        self._sizes = [part.env.n_envs for part in self._parts]
        self._saved: EnvState | None = None  # where to go back to, after a failure
        self._closed = False

    def reset(self) -> Observation:
        """See `RolloutPool.reset`."""
        return self._attempted(lambda: joined([part.reset() for part in self._parts]))

    def step_chunk(self, actions: FloatArray) -> ChunkStep:
        """See `RolloutPool.step_chunk`."""
        self._require_open()
        check_actions(actions, self.n_envs, self.spec)
        pieces = cut(actions, self._sizes)
        return self._attempted(
            lambda: ChunkStep.concatenate([p.step_chunk(a) for p, a in zip(self._parts, pieces, strict=True)])
        )

    def collect(self, actor: Actor, n_steps: int) -> Rollout:
        """See `RolloutPool.collect`."""
        self._require_open()
        check_collection(actor, n_steps, self.spec)
        if len(self._parts) == 1:
            return self._attempted(lambda: self._parts[0].collect(actor, n_steps))
        return self._attempted(lambda: _collect_in_turns(self._parts, actor, n_steps))

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
        """See `RolloutPool.evaluate`."""
        self._require_open()
        return evaluate(
            policy, self.spec, episodes, seed,
            inference=inference, guide=guide, scorer=scorer, on_progress=on_progress, max_failures=self._max_failures,
        )  # fmt: skip

    def state(self) -> EnvState:
        """See `RolloutPool.state`."""
        return self._saved or EnvState.concatenate([part.state() for part in self._parts])

    def restore(self, state: EnvState) -> None:
        """See `RolloutPool.restore`."""
        self._require_open()
        check_state(state, self.n_envs, self.spec)
        if self._shares:  # built again: a simulator may be unable to go back
            before, self._saved = self.state(), state
            self._attempted(lambda: None, before)
        else:
            self._attempted(lambda: self._place(state))

    def close(self) -> None:
        """See `RolloutPool.close`."""
        self._closed = True
        with ExitStack() as all_of_them:
            for part in self._parts:
                all_of_them.callback(part.env.close)

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedPoolError

    def _gives_up(self, failures: int) -> bool:
        return failures > self._max_failures or not self._shares or not self.spec.replayable

    def _attempted(self, call: Callable[[], Result], before: EnvState | None = None) -> Result:
        """Make `call`. Where it fails, all is brought back to before it: to be made again, or left so."""
        self._require_open()
        goal = self.state()
        before = goal if before is None else before
        for failures in itertools.count(1):
            try:
                if self._saved is not None:
                    self._build_again(self._saved)
                return call()
            except EnvFaultError as fault:
                self._saved = before if self._gives_up(failures) else goal
                if self._gives_up(failures):
                    raise
                log.warning("%s; the environments are built again (failure %d)", fault, failures)
            except BaseException:
                self._saved = before if self._shares else self._saved
                raise
        raise AssertionError

    def _build_again(self, state: EnvState) -> None:
        if not self._shares:
            raise EnvError(f"{self.spec.id}: an environment has failed, and this pool did not build it: make a new one")
        for part in self._parts:
            part.dispose()
        self._parts = _built(self._shares)
        self._place(state)
        self._saved = None

    def _place(self, state: EnvState) -> None:
        """Bring the environments to `state`."""
        first = 0
        for part in self._parts:
            part.restore(state.part(first, part.env.n_envs))
            first += part.env.n_envs


def _built(shares: list[Share]) -> list[Collector]:
    """Build all, or leave none behind."""
    with ExitStack() as undo:
        parts = []
        for share in shares:
            parts.append(share.build())
            undo.callback(parts[-1].dispose)
        undo.pop_all()
    return parts


def as_pool(env: BatchedEnv | RolloutPool, seed: int) -> RolloutPool:
    """Return `env` if it is a pool already, else a pool around it.

    Raises:
        EnvError: it is neither.
    """
    _require_batched(env)
    return env if isinstance(env, RolloutPool) else InProcessPool(env, seed=seed)


def _require_batched(env: object) -> None:
    if not hasattr(env, "step_chunk"):
        raise EnvError(f"{type(env).__name__} {env!r} is no batched environment: take dprl.make(id, n_envs=...)")


def _collect_in_turns(parts: list[Collector], actor: Actor, n_steps: int) -> Rollout:
    """While the policy decides for one part of the environments, a thread moves another."""
    records = [Record(part.indices) for part in parts]
    moving: list[Future[ChunkStep] | None] = [None] * len(parts)
    with ThreadPoolExecutor(1, "dprl-simulator") as simulator:
        for _ in range(n_steps):
            for i, (part, record) in enumerate(zip(parts, records, strict=True)):
                arrived = moving[i]
                if arrived is not None:
                    record.end(arrived.result())
                decision = part.decide(actor)
                record.begin(decision)
                moving[i] = simulator.submit(part.step_chunk, decision.actions)
        for record, arrived in zip(records, moving, strict=True):
            assert arrived is not None
            record.end(arrived.result())
    return Rollout.concatenate([record.rollout() for record in records])

"""Evaluation on Ray workers: on those of a pool, or on others, while training goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from dprl.errors import check, check_count
from dprl.guidance import Guide
from dprl.guidance.departure import climbed
from dprl.policy import ChunkCritic, ChunkValue, InferenceConfig, Policy, RecedingHorizon, Scorer
from dprl.rollout.evaluation import Evaluation, Outcome, check_evaluation, play, seats, summary
from dprl.rollout.ray_pool.cluster import RayConnection
from dprl.rollout.ray_pool.workers import Crew, WorkerOptions, sent
from dprl.spec import EnvOptions, EnvSpec, builder_of, spec_of


class RayEvaluator:
    """Evaluates on Ray workers of its own, while the learner collects and updates. A context manager."""

    def __init__(
        self,
        env: str | EnvSpec,
        *,
        num_workers: int = 1,
        options: EnvOptions | None = None,
        workers: WorkerOptions | None = None,
        address: str | None = None,
        runtime_env: dict[str, Any] | None = None,
    ) -> None:
        """Start `num_workers` actors, as `RayPool` does.

        Args:
            env: the task.
            num_workers: among which the slices of an evaluation are divided, which are two for the usual 50 episodes.
            options: of the environment, if it is named.
            workers: what each claims, and what it is forgiven.
            address: of a running cluster, as `ray.init` takes it.
            runtime_env: Ray's, of a cluster. Default: one that carries this checkout's code to its nodes.

        Raises:
            ConfigError: no workers, or more than Ray has CPUs for.
        """
        check_count("num_workers", num_workers)
        self.spec = spec_of(env, options)
        builder_of(self.spec)
        self._options = WorkerOptions() if workers is None else workers
        check(isinstance(self._options, WorkerOptions), "workers", workers, "must be WorkerOptions(...)")
        self._ray = RayConnection(address, runtime_env)
        self._thread = ThreadPoolExecutor(1, "dprl-evaluation")
        try:
            self._crew = Crew(num_workers, self._options, self.spec)
        except BaseException:
            self._ray.close()
            raise

    def start(
        self,
        policy: Policy,
        episodes: int,
        seed: int,
        *,
        inference: InferenceConfig | None = None,
        guide: Guide | None = None,
        scorer: Scorer | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Future[Evaluation]:
        """Evaluate `policy` as it is now, see `dprl.rollout.evaluate`; what becomes of it later does not matter.

        The result is that of `evaluate`, but for the latency, which is a worker's.
        """
        self._crew.require_open()
        check_evaluation(policy, self.spec, episodes, seed)
        control = RecedingHorizon(policy, inference, guide=guide, scorer=scorer)
        return self._thread.submit(self._evaluate, sent("policy", on_cpu(control)), episodes, seed, on_progress)

    def close(self) -> None:
        """End the workers, and Ray if it was started for them. An evaluation under way fails with ClosedPoolError."""
        try:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._crew.close()
            self._thread.shutdown()
        finally:
            self._ray.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _evaluate(
        self, control: Any, episodes: int, seed: int, on_progress: Callable[[int], None] | None
    ) -> Evaluation:
        threads = max(1, int(self._options.cpus))
        outcomes = play_on(self._crew, control, self.spec, episodes, seed, num_threads=threads, on_progress=on_progress)
        # its latency is measured there too: the learner's torch must not be disturbed
        (result,) = self._crew.finish([Call(0, summary, (control, self.spec, seed, outcomes), "summary")])
        assert isinstance(result, Evaluation)
        return result


@dataclass
class Call:
    """A function of which any worker can be asked."""

    host: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    what: str

    def start(self, worker: Any, *, again: bool, failed: bool) -> Any:
        """See `Job.start`."""
        return worker.apply.remote(self.function, *self.arguments)

    def __str__(self) -> str:
        return f"worker {self.host} ({self.what})"


def play_on(
    crew: Crew,
    control: Any,
    spec: EnvSpec,
    episodes: int,
    seed: int,
    *,
    num_threads: int,
    on_progress: Callable[[int], None] | None = None,
) -> dict[int, Outcome]:
    """Play the episodes of an evaluation, its slices divided among the workers; `control` is in the object store."""
    hosts = crew.hosts or [0]
    jobs = []
    for i, part in enumerate(seats(episodes)):
        arguments = (control, spec, episodes, seed, part, num_threads)
        what = f"environments {part.start} to {part.stop - 1} of an evaluation in {spec.id}"
        jobs.append(Call(hosts[i % len(hosts)], play, arguments, what))
    outcomes: dict[int, Outcome] = {}

    def take(part: dict[int, Outcome]) -> None:
        outcomes.update(part)
        if on_progress is not None:
            on_progress(len(part))

    crew.finish(jobs, take)
    return outcomes


def on_cpu(control: RecedingHorizon) -> RecedingHorizon:
    """Return it, or a copy of it on the CPU."""
    if control.policy.device.type == "cpu":
        return control
    copied = copy.deepcopy(control)  # a guide's critic, if it is the policy's scorer, is so still
    copied.policy.cpu()
    for judge in (copied.scorer, *([] if copied.guide is None else climbed(copied.guide))):
        if isinstance(judge, nn.Module):
            judge.cpu()
        if isinstance(judge, ChunkCritic | ChunkValue):
            judge.sees_as.cpu()
    return copied

"""Ray actors that each hold a slice of the environments and act with a copy of the policy.

One remote call per collection: the weights go once into the object store, whole rollouts come back.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import numpy as np

from dprl.errors import ConfigError, MissingDependencyError, check
from dprl.rollout.pool import Actor, Collector, PoolState, Rollout, RolloutPool, checked_slice_size
from dprl.spec import EnvOptions, EnvSpec, build, env_seeds, resolve

try:
    import ray
except ImportError as error:
    raise MissingDependencyError("ray", "ray", "a Ray rollout pool") from error

START_TIMEOUT_S = 120.0
FREEING_TIMEOUT_S = 10.0


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
        cpus_per_worker: float = 1.0,
        options: EnvOptions | None = None,
    ) -> None:
        """Start `num_workers` actors; joins the running Ray, or starts one on this machine.

        Args:
            env: the task.
            n_envs: environments over all workers.
            num_workers: must divide the number of slices.
            seed: of the environments and of the exploration noise.
            slice_size: environments per inference batch; must divide `n_envs`. Default: at most 32.
            cpus_per_worker: CPUs each worker claims of those Ray has declared, and its simulator threads.
            options: of the environment, if it is named.

        Raises:
            ConfigError: the numbers do not divide, or Ray has too few CPUs.
        """
        self.spec = env if isinstance(env, EnvSpec) else resolve(env, options)
        self.n_envs = n_envs
        self.slice_size = checked_slice_size(n_envs, slice_size)
        slices = n_envs // self.slice_size
        fits = num_workers >= 1 and slices % num_workers == 0
        check(
            fits,
            "num_workers",
            num_workers,
            f"must divide the number of slices: {n_envs} environments / slice_size {self.slice_size} = {slices}",
        )
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            # Ray's default is 15: beside any busy process its workers then hardly run, and the learner waits for them
            os.environ.setdefault("RAY_worker_niceness", "0")
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        self._require_capacity(num_workers, cpus_per_worker)
        self._envs_per_worker = n_envs // num_workers
        worker = ray.remote(_Worker)
        self._workers: list[Any] = [
            worker.options(num_cpus=cpus_per_worker).remote(
                self.spec, self._envs_per_worker, i * self._envs_per_worker, seed, self.slice_size, cpus_per_worker
            )
            for i in range(num_workers)
        ]
        try:
            ray.get([w.ready.remote() for w in self._workers], timeout=START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def collect(self, actor: Actor, n_action_steps: int, n_steps: int) -> Rollout:
        """See `RolloutPool.collect`."""
        shared = ray.put(actor.cpu())
        return Rollout.concatenate(ray.get([w.collect.remote(shared, n_action_steps, n_steps) for w in self._workers]))

    def state(self) -> PoolState:
        """See `RolloutPool.state`; it fits any number of workers."""
        return PoolState.concatenate(ray.get([w.state.remote() for w in self._workers]))

    def restore(self, state: PoolState) -> None:
        """See `RolloutPool.restore`."""
        n = self._envs_per_worker
        parts = [state.part(i * n, n, self.slice_size) for i in range(len(self._workers))]
        ray.get([w.restore.remote(part) for w, part in zip(self._workers, parts, strict=True)])

    def close(self) -> None:
        """End the workers, and Ray if this pool started it."""
        for worker in self._workers:
            ray.kill(worker)
        self._workers = []
        if self._owns_ray and ray.is_initialized():
            ray.shutdown()

    def _require_capacity(self, num_workers: int, cpus_per_worker: float) -> None:
        """Refuse what would wait for ever: an actor that does not fit Ray's declared CPUs stays pending."""
        wanted = num_workers * cpus_per_worker
        deadline = time.monotonic() + FREEING_TIMEOUT_S  # workers that were just ended free their CPUs a little later
        while True:
            free = ray.available_resources().get("CPU", 0.0)
            hopeless = wanted > ray.cluster_resources().get("CPU", 0.0) or time.monotonic() > deadline
            if wanted <= free or hopeless:
                break
            time.sleep(0.1)
        if wanted > free:
            if self._owns_ray:
                ray.shutdown()
            raise ConfigError(
                f"num_workers = {num_workers}: {num_workers} workers x {cpus_per_worker:g} CPUs each = "
                f"{wanted:g}, but Ray has {free:g} CPUs free; use fewer workers or a smaller "
                "cpus_per_worker"
            )


class _Worker:
    """Runs in its own process."""

    def __init__(self, spec: EnvSpec, n_envs: int, first_env: int, seed: int, slice_size: int, cpus: float) -> None:
        import torch

        torch.set_num_threads(1)
        env = build(spec, env_seeds(seed, n_envs, first_env), max(1, int(cpus)))
        self._collector = Collector(env, seed, slice_size, first_env // slice_size)

    def ready(self) -> bool:
        return True

    def collect(self, actor: Actor, n_action_steps: int, n_steps: int) -> Rollout:
        return self._collector.collect(actor, n_action_steps, n_steps)

    def state(self) -> PoolState:
        return self._collector.state()

    def restore(self, state: PoolState) -> None:
        writable = PoolState(
            type(state.env)(np.array(state.env.episodes), np.array(state.env.lengths), np.array(state.env.actions)),
            state.generators.clone(),
        )
        self._collector.restore(writable)

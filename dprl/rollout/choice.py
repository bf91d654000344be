"""Which pool suits: what `RolloutPool.auto` decides by."""

from __future__ import annotations

import importlib.util
import logging
import sys
from dataclasses import dataclass, replace

import torch

from dprl.cores import available_cores
from dprl.errors import ConfigError, check_count
from dprl.rollout.pool import RolloutPool, checked_slice_size
from dprl.spec import EnvSpec

ENOUGH_CORES = 8
"""From here on workers that decide at once are expected to outdo a single thread of inference; not measured."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Machine:
    """What there is to run on."""

    cores: int
    """That this process may use, or that a running Ray has free."""
    nodes: int = 1
    """Of a running Ray."""
    has_ray: bool = True

    @staticmethod
    def here() -> Machine:
        """Look around; a Ray that runs in this process counts, none is started."""
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            alive = [node for node in ray.nodes() if node["Alive"]]
            return Machine(int(ray.available_resources().get("CPU", 0)), len(alive))
        return Machine(available_cores(), has_ray=importlib.util.find_spec("ray") is not None)


@dataclass(frozen=True)
class Choice:
    """A kind of pool, and why."""

    num_workers: int
    """Ray workers; 0: in this process."""
    why: str

    def __str__(self) -> str:
        return f"{f'{self.num_workers} Ray workers' if self.num_workers else 'in this process'}: {self.why}"


def choose(
    spec: EnvSpec, n_envs: int, slice_size: int | None, machine: Machine, device: str, num_workers: int | None
) -> Choice:
    """Choose the kind of pool for `n_envs` environments and a policy on `device`; `num_workers` overrides it."""
    slices = n_envs // checked_slice_size(n_envs, slice_size)
    most = max(n for n in range(1, slices + 1) if slices % n == 0 and n <= max(machine.cores, 1))
    at_once = f"{spec.id} steps all its environments at once"
    rules = (  # the first that applies
        (num_workers is not None, num_workers or 0, "as asked for"),
        (not machine.has_ray, 0, "Ray is not installed"),
        (machine.cores < 1, 0, "no CPU is free for Ray workers"),
        (machine.nodes > 1, most, f"Ray runs on {machine.nodes} nodes with {machine.cores} CPUs"),
        (most == 1, 0, f"nothing to divide: {machine.cores} cores, {n_envs} environments in {slices} slices"),
        (spec.serial, most, f"{spec.id} steps one environment after the other, and there are {machine.cores} cores"),
        (device != "cpu", 0, f"{at_once}, and the policy is on {device}"),
        (machine.cores < ENOUGH_CORES, 0, f"{at_once}, and {machine.cores} cores are few"),
        (True, most, f"the policy then decides on {most} of {machine.cores} cores at once"),
    )
    return next(Choice(workers, why) for applies, workers, why in rules if applies)


def _kind(device: str) -> str:
    try:
        return torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device = {device!r}: must be one of torch's, such as 'cpu' or 'cuda'") from error


def auto_pool(
    spec: EnvSpec,
    n_envs: int,
    *,
    seed: int = 0,
    slice_size: int | None = None,
    device: str = "cpu",
    num_workers: int | None = None,
    other_workers: int = 0,
) -> RolloutPool:
    """See `RolloutPool.auto`."""
    if num_workers is not None:
        check_count("num_workers", num_workers, 0)
    check_count("other_workers", other_workers, 0)
    check_count("seed", seed, 0)
    machine = Machine.here()
    machine = replace(machine, cores=max(0, machine.cores - other_workers))
    choice = choose(spec, n_envs, slice_size, machine, _kind(device), num_workers)
    log.info("rollouts %s", choice)
    pool: RolloutPool
    if choice.num_workers:
        from dprl.rollout.ray_pool import RayPool

        pool = RayPool(spec, n_envs, num_workers=choice.num_workers, seed=seed, slice_size=slice_size)
    else:
        from dprl.rollout.in_process import InProcessPool

        pool = InProcessPool(spec, n_envs, seed=seed, slice_size=slice_size)
    pool.choice = choice
    return pool

"""Where an iteration's time goes, and what slices, threads and workers cost or bring.

    python -m dprl.experiments.benchmarks.throughput

Every figure is the median of repeated runs, next to a reference measured in the same process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dprl.agents import DPPO, DPPOConfig
from dprl.config import validate
from dprl.experiments.benchmarks import command
from dprl.mdp import PolicyMDP
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features
from dprl.rollout import InProcessPool
from dprl.seeding import torch_generator
from dprl.spec import build, env_seeds, resolve


@dataclass(frozen=True)
class ThroughputConfig:
    """What to measure."""

    env: str = "metaworld/push-v3"
    n_envs: int = 64
    n_steps: int = 25
    """Decisions per environment in one collection."""
    repeats: int = 3

    def __post_init__(self) -> None:
        validate(self, at_least=dict.fromkeys(("n_envs", "n_steps", "repeats"), 1))


def main(config: ThroughputConfig) -> None:
    """Print the table."""
    spec = resolve(config.env)
    policy = DiffusionPolicy(Features(spec.observation_size, spec.action_size), DiffusionConfig(num_train_timesteps=10))
    steps = config.n_envs * config.n_steps * policy.n_action_steps
    rng = np.random.default_rng(0)
    table = Table("what", "seconds", "environment steps/s", "times the simulator alone", title=config.env, box=None)

    with InProcessPool(spec, config.n_envs) as pool:
        agent = DPPO(policy, pool, DPPOConfig(n_steps=config.n_steps))
        mdp = agent.mdp
        rollout = agent.collect()
        collect = _median(agent.collect, config.repeats)
        update = _median(lambda: agent.update(rollout), config.repeats)

    env = build(spec, env_seeds(0, config.n_envs))
    env.reset()
    shape = (config.n_envs, policy.n_action_steps, spec.action_size)

    def simulate() -> None:
        for _ in range(config.n_steps):
            env.step_chunk(rng.uniform(-1, 1, shape).astype(np.float32))

    simulator = _median(simulate, config.repeats)
    env.close()
    inference = _median(lambda: _infer(mdp, config), config.repeats)
    for what, seconds in (
        ("simulator alone", simulator),
        ("inference alone", inference),
        ("collect (simulator + inference)", collect),
        ("update", update),
        ("iteration (collect + update)", collect + update),
    ):
        table.add_row(what, f"{seconds:.2f}", f"{steps / seconds:,.0f}", f"{seconds / simulator:.2f}")
    Console().print(table)
    Console().print(f"{config.repeats} repeats, torch on {torch.get_num_threads()} threads")


def _infer(mdp: PolicyMDP, config: ThroughputConfig) -> None:
    obs = torch.zeros(config.n_envs, 1, mdp.policy.features.observation_size)
    generator = torch_generator(0, "benchmark")
    for _ in range(config.n_steps):
        mdp.sample(obs, generator=generator)


def _median(action: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


if __name__ == "__main__":
    command(main, ThroughputConfig)

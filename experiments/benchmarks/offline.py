"""Offline learning's speed: gradient steps of critics and behaviour policy, against the bare arithmetic; its loading.

    python -m dprl.experiments.benchmarks.offline [--device cuda]

At the sizes of IDQL's paper (arXiv:2304.10573): minibatches of 256 decisions for the critics and 1,024 chunks for the
behaviour policy, of one action each. Everything is measured in turn in the same run, several times; figures are
medians. The bare arithmetic are forward and backward passes of the same networks on as many rows, without losses,
optimisers, targets, averages or data.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dprl.agents import IDQL, BCConfig, DiffusionQL, DiffusionQLConfig, IDQLConfig
from dprl.config import validate
from dprl.cores import available_cores
from dprl.data import Episodes
from dprl.experiments.benchmarks import command, seconds
from dprl.experiments.runs import BEHAVIOUR, check_device
from dprl.policy import DiffusionPolicy
from dprl.training.progress import ProgressBar

OBSERVATION_SIZE, ACTION_SIZE = 17, 6
"""HalfCheetah's."""
BC_PART = BCConfig(batch_size=1_024, learning_rate=3e-4, final_learning_rate=1e-6, ema_decay=0.999)
PAPER = IDQLConfig(bc=BC_PART)
EDP = DiffusionQLConfig(bc=BC_PART)


@dataclass(frozen=True)
class OfflineBenchmark:
    """What to measure."""

    steps: int = 10
    """Gradient steps of one measurement."""
    repeats: int = 7
    transitions: int = 100_000
    """Of the data."""
    device: str = "cpu"
    json: Path | None = None
    """Also write the figures to this file."""

    def __post_init__(self) -> None:
        validate(self, at_least={"steps": 1, "repeats": 1, "transitions": 1_000})
        check_device(self.device)


@dataclass(frozen=True)
class Figure:
    """One way to learn."""

    way: str
    steps_per_s: float
    """Gradient steps, each of critics and behaviour policy."""
    share_of_bare: float
    """The time of the bare arithmetic over this: the median of the ratios of measurements next to each other."""
    loading: float
    """Share of the time that reading minibatches takes."""


def main(config: OfflineBenchmark) -> list[Figure]:
    """Print the table and return its figures."""
    figures = measure(config)
    table = Table("way", "gradient steps/s", "bare arithmetic's share", "loading's share", box=None)
    for figure in figures:
        table.add_row(figure.way, f"{figure.steps_per_s:.1f}", f"{figure.share_of_bare:.0%}", f"{figure.loading:.1%}")
    console = Console()
    console.print(table)
    console.print(
        f"{config.repeats} repeats of {config.steps} steps, {available_cores()} cores, {config.device}, "
        f"torch {torch.__version__}"
    )
    if config.json is not None:
        config.json.write_text(json.dumps([asdict(f) for f in figures], indent=2) + "\n", encoding="utf-8")
    return figures


def measure(config: OfflineBenchmark) -> list[Figure]:
    """Measure every way in turn."""
    agents = learners(random_data(config.transitions), config)
    bare = bare_arithmetic(next(iter(agents.values())), config)
    actions: list[Callable[[], object]] = [bare]
    for agent in agents.values():
        actions += [lambda agent=agent: agent.update(agent.collect()), lambda agent=agent: load(agent)]  # type: ignore[misc]
    with ProgressBar("measure", config.repeats + 1) as bar:
        times = []
        for _ in range(config.repeats + 1):  # the first compiles
            times.append([seconds(action, config.device) for action in actions])
            bar.advance(1)
    taken = np.array(times[1:])
    return [
        Figure(
            way,
            config.steps / float(np.median(taken[:, 1 + 2 * i])),
            float(np.median(taken[:, 0] / taken[:, 1 + 2 * i])),
            float(np.median(taken[:, 2 + 2 * i] / taken[:, 1 + 2 * i])),
        )
        for i, way in enumerate(agents)
    ]


def learners(data: Episodes, config: OfflineBenchmark) -> dict[str, IDQL]:
    """Every way to learn."""

    def make(learning: IDQLConfig, *, compiled: bool = False) -> IDQL:
        bc = replace(learning.bc, steps_per_iteration=config.steps, compile=compiled)
        learning, policy = replace(learning, bc=bc), DiffusionPolicy.for_dataset(data, replace(BEHAVIOUR, horizon=1))
        policy = policy.to(config.device)
        agent = DiffusionQL(policy, learning) if isinstance(learning, DiffusionQLConfig) else IDQL(policy, learning)
        agent.set_data(data, 10**9)
        return agent

    return {
        "IDQL": make(PAPER),
        "IDQL, compiled": make(PAPER, compiled=True),
        "Diffusion-QL, one step": make(EDP),
        "Diffusion-QL, chain": make(replace(EDP, improvement="chain")),
    }


def random_data(transitions: int) -> Episodes:
    """Episodes of a thousand steps of noise."""
    rng = np.random.default_rng(0)
    ends = np.append(np.arange(1_000, transitions, 1_000), transitions)
    n = len(ends)
    no = np.zeros(n, np.bool_)
    return Episodes(
        observations=rng.standard_normal((transitions, OBSERVATION_SIZE), np.float32),
        actions=rng.uniform(-1, 1, (transitions, ACTION_SIZE)).astype(np.float32),
        rewards=rng.standard_normal(transitions, np.float32),
        final_observations=rng.standard_normal((n, OBSERVATION_SIZE), np.float32),
        ends=ends,
        terminated=no,
        success=no,
        seeds=np.arange(n),
    )


def bare_arithmetic(agent: IDQL, config: OfflineBenchmark) -> Callable[[], None]:
    """Return `steps` forward and backward passes of IDQL's networks: Q, V, their forward ones in targets, denoiser."""
    critic, policy, device = agent.critic, agent.policy, torch.device(config.device)
    assert isinstance(policy, DiffusionPolicy)
    rows, chunks = agent.config.batch_size, agent.config.bc.batch_size
    seen = torch.randn(rows, OBSERVATION_SIZE, device=device)
    both = torch.randn(rows, OBSERVATION_SIZE + ACTION_SIZE, device=device)
    noisy, time_ = torch.randn(chunks, 1, ACTION_SIZE, device=device), torch.zeros(chunks, device=device).long()
    condition = torch.randn(chunks, 1, OBSERVATION_SIZE, device=device)
    denoiser = policy.base

    def passes(network: nn.Module, *inputs: Tensor) -> None:
        network(*inputs).sum().backward()
        network.zero_grad()

    def run() -> None:
        for _ in range(config.steps):
            with torch.no_grad():
                critic.q_net(both)
                critic.v_net(seen)
            passes(critic.q_net, both)
            passes(critic.v_net, seen)
            passes(denoiser, noisy, time_, condition)

    return run


def load(agent: IDQL) -> None:
    """Read the minibatches of an iteration, and do nothing with them."""
    picks = agent.collect()
    for _ in zip(agent.actor.read(picks.chunks), agent.decisions.read(picks.decisions), strict=True):
        pass


if __name__ == "__main__":
    command(main, OfflineBenchmark)

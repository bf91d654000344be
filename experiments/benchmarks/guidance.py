"""What value guidance costs: guided sampling against unguided, over the bare gradients that it needs.

    python -m dprl.experiments.benchmarks.guidance [--device cuda]

The bare arithmetic of a step is one gradient of the critic at clean chunks, with `through` one of the denoiser at noisy
ones, too. It is taken as in sampling, each after a forward pass of the denoiser; what the forward passes alone take is
taken off. What guidance adds is the time of a guided sample less that of an unguided one. Medians of repeated
measurements, in turn in the same run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dprl.config import validate
from dprl.experiments.benchmarks import command, seconds
from dprl.experiments.runs import check_device
from dprl.guidance import ValueGuide
from dprl.guidance.value import Gradient
from dprl.networks import DenoiserConfig, MLPConfig, UNetConfig
from dprl.policy import ChunkCritic, CriticConfig, DiffusionConfig, DiffusionPolicy, Features
from dprl.seeding import torch_generator
from dprl.training.progress import ProgressBar

DENOISERS: dict[str, DenoiserConfig] = {"mlp": MLPConfig(), "unet": UNetConfig(down_dims=(64, 128))}
GRADIENTS: tuple[Gradient, ...] = ("held", "through")
BATCHES = (1, 64, 1_024)


@dataclass(frozen=True)
class GuidanceBenchmark:
    """What to measure."""

    steps: int = 10
    """Denoising steps."""
    horizon: int = 4
    observation_size: int = 39
    action_size: int = 4
    repeats: int = 30
    """Interleaved measurements of each figure."""
    threads: int = 1
    device: str = "cpu"
    json: Path | None = None
    """Also write the figures to this file."""

    def __post_init__(self) -> None:
        counts = ("steps", "horizon", "observation_size", "action_size", "repeats", "threads")
        validate(self, at_least=dict.fromkeys(counts, 1))
        check_device(self.device)


@dataclass(frozen=True)
class Figure:
    """One gradient with one denoiser at one batch size."""

    denoiser: str
    gradient: str
    batch: int
    unguided_ms: float
    guided_ms: float
    bare_ms: float
    """Of the gradients alone."""
    overhead: float
    """(guided - unguided) / bare - 1: the median of those of measurements next to each other."""


def main(config: GuidanceBenchmark) -> list[Figure]:
    """Print the table and return its figures."""
    torch.set_num_threads(config.threads)
    cases = [(d, g, b) for d in DENOISERS for g in GRADIENTS for b in BATCHES]
    figures = []
    with ProgressBar("measure", len(cases)) as bar:
        for case in cases:
            figures.append(measure(config, *case))
            bar.advance(1)
    table = Table("denoiser", "gradient", "batch", "unguided, ms", "guided, ms", "bare, ms", "overhead", box=None)
    for f in figures:
        times = (f"{value:.2f}" for value in (f.unguided_ms, f.guided_ms, f.bare_ms))
        table.add_row(f.denoiser, f.gradient, str(f.batch), *times, f"{f.overhead:+.0%}")
    console = Console()
    console.print(table)
    console.print(
        f"{config.steps} steps, horizon {config.horizon}, {config.repeats} repeats, {config.threads} threads, "
        f"{config.device}, torch {torch.__version__}"
    )
    if config.json is not None:
        config.json.write_text(json.dumps([asdict(f) for f in figures], indent=2) + "\n", encoding="utf-8")
    return figures


def measure(config: GuidanceBenchmark, denoiser: str, gradient: Gradient, batch: int) -> Figure:
    """Measure one cell of the table."""
    device = torch.device(config.device)
    policy_config = DiffusionConfig(
        num_train_timesteps=config.steps, horizon=config.horizon, denoiser=DENOISERS[denoiser]
    )
    policy = DiffusionPolicy(Features(config.observation_size, config.action_size), policy_config).to(device)
    critic = ChunkCritic(policy, CriticConfig()).to(device).requires_grad_(False)
    guide = ValueGuide(critic, 0.1, gradient, "noise")
    obs = torch.zeros(batch, 1, config.observation_size, device=device)
    generator = torch_generator(0, "benchmark", device=device)
    actions = [
        lambda: policy.sample(obs, generator=generator),
        lambda: policy.sample(obs, generator=generator, guide=guide),
        forwards(policy, obs, config.steps),
        with_gradients(policy, critic, obs, gradient, config.steps),
    ]
    for action in actions:
        action()
    times = np.array([[seconds(action, device) for action in actions] for _ in range(config.repeats)])
    unguided, guided, forward, both = times.T
    ratio = float(np.median((guided - unguided) / (both - forward)))
    unguided_ms, guided_ms, bare_ms = (1000 * float(np.median(took)) for took in (unguided, guided, both - forward))
    return Figure(denoiser, gradient, batch, unguided_ms, guided_ms, bare_ms, ratio - 1)


def with_gradients(
    policy: DiffusionPolicy, critic: ChunkCritic, obs: Tensor, gradient: Gradient, steps: int
) -> Callable[[], None]:
    """Return `steps` forward passes of the denoiser, each with the gradients of one guided step, and nothing else."""
    seen, noisy, prepared = critic.see(obs), *_denoised(policy, obs)
    clean = noisy.clone().requires_grad_()
    through = gradient == "through"
    noisy = noisy.clone().requires_grad_(through)

    def run() -> None:
        for _ in range(steps):
            with torch.set_grad_enabled(through):
                predicted = policy.base.denoise(noisy, prepared)
            q = critic.q_net(torch.cat([seen, clean.flatten(1)], dim=1)).amin(0)
            (given,) = torch.autograd.grad(q, clean, torch.ones_like(q))
            if through:
                torch.autograd.grad(predicted, noisy, given)

    return run


def forwards(policy: DiffusionPolicy, obs: Tensor, steps: int) -> Callable[[], None]:
    """Return `steps` forward passes of the denoiser."""
    noisy, prepared = _denoised(policy, obs)

    @torch.no_grad()
    def run() -> None:
        for _ in range(steps):
            policy.base.denoise(noisy, prepared)

    return run


@torch.no_grad()
def _denoised(policy: DiffusionPolicy, obs: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy chunks, and what a denoiser prepares for them."""
    chunk = (len(obs), policy.config.horizon, policy.features.action_size)
    timestep = policy.schedule.timesteps[:1]
    return torch.randn(chunk, device=obs.device), policy.base.prepare(
        policy.base.embed(timestep), policy.condition(obs)
    )


if __name__ == "__main__":
    command(main, GuidanceBenchmark)

"""What sampling costs: each denoiser and solver against its bare forward passes, measured in turn in the same run.

    python -m dprl.experiments.benchmarks.sampling [--compiled] [--device cuda]

The overhead is the time of `policy.sample` over the number of denoiser evaluations times one forward pass. Medians of
repeated, interleaved measurements.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dprl.config import validate
from dprl.diffusion import SolverConfig, solver_steps
from dprl.diffusion.solvers import SolverName
from dprl.errors import check
from dprl.experiments.benchmarks import command, seconds
from dprl.experiments.runs import check_device
from dprl.networks import DenoiserConfig, MLPConfig, TransformerConfig, UNetConfig
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features
from dprl.seeding import torch_generator

DENOISERS: dict[str, DenoiserConfig] = {
    "mlp": MLPConfig(),
    "unet": UNetConfig(),
    "transformer": TransformerConfig(),
}
SOLVERS: tuple[SolverName, ...] = ("ddpm", "ddim", "dpmsolver++", "sde-dpmsolver++", "euler")
BATCHES = (1, 64)
TIMESTEPS = 100


@dataclass(frozen=True)
class SamplingBenchmark:
    """What to measure."""

    steps: int = 10
    """Denoising steps."""
    horizon: int = 16
    observation_size: int = 39
    action_size: int = 4
    repeats: int = 30
    """Interleaved measurements of each figure."""
    threads: int = 1
    compiled: bool = False
    """Compile the denoisers with torch.compile."""
    device: str = "cpu"
    json: Path | None = None
    """Also write the figures to this file."""

    def __post_init__(self) -> None:
        counts = ("steps", "horizon", "observation_size", "action_size", "repeats", "threads")
        validate(self, at_least=dict.fromkeys(counts, 1))
        check(self.steps <= TIMESTEPS, "steps", self.steps, f"must be at most {TIMESTEPS}, the training timesteps")
        check_device(self.device)


@dataclass(frozen=True)
class Figure:
    """One denoiser with one solver at one batch size."""

    denoiser: str
    solver: str
    batch: int
    sample_ms: float
    """One call of `sample`."""
    forward_ms: float
    """One forward pass of the denoiser."""
    overhead: float
    """sample / (steps x forward) - 1: the median of the ratios of measurements next to each other."""


def main(config: SamplingBenchmark) -> list[Figure]:
    """Print the table and return its figures."""
    torch.set_num_threads(config.threads)
    figures = [
        measure(config, denoiser, solver, batch) for denoiser in DENOISERS for solver in SOLVERS for batch in BATCHES
    ]
    table = Table("denoiser", "solver", "batch", "sample, ms", "forward, ms", "overhead", "samples/s", box=None)
    for f in figures:
        table.add_row(
            f.denoiser, f.solver, str(f.batch), f"{f.sample_ms:.2f}", f"{f.forward_ms:.3f}", f"{f.overhead:+.1%}",
            f"{1000 * f.batch / f.sample_ms:,.0f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(
        f"{config.steps} steps, horizon {config.horizon}, {config.repeats} repeats, {config.threads} threads, "
        f"{config.device}, {'compiled' if config.compiled else 'eager'}, torch {torch.__version__}"
    )
    if config.json is not None:
        config.json.write_text(json.dumps([asdict(f) for f in figures], indent=2) + "\n", encoding="utf-8")
    return figures


@torch.no_grad()
def measure(config: SamplingBenchmark, denoiser: str, solver: SolverName, batch: int) -> Figure:
    """Measure one cell of the table."""
    flow = solver == "euler"
    policy_config = DiffusionConfig(
        num_train_timesteps=TIMESTEPS,
        schedule="rectified_flow" if flow else "squaredcos_cap_v2",
        prediction_type="velocity" if flow else "epsilon",
        horizon=config.horizon,
        denoiser=DENOISERS[denoiser],
    )
    policy = DiffusionPolicy(Features(config.observation_size, config.action_size), policy_config).to(config.device)
    network = policy.base
    if config.compiled:
        network.compile()
    device = torch.device(config.device)
    obs = torch.zeros(batch, 1, config.observation_size, device=device)
    noisy = torch.randn(batch, config.horizon, config.action_size, device=device)
    condition, t = policy.condition(obs), policy.schedule.timesteps[50:51]
    n = len(solver_steps(policy_config.noise, SolverConfig(solver, config.steps)))
    generator = torch_generator(0, "benchmark", device=device)

    def sample() -> None:
        policy.sample(obs, solver=solver, num_inference_steps=config.steps, generator=generator)

    def forward() -> None:
        for _ in range(n):
            network(noisy, t, condition)

    sample()
    forward()
    pairs = [(seconds(sample, device), seconds(forward, device)) for _ in range(config.repeats)]
    sampled, bare = (float(np.median(column)) for column in zip(*pairs, strict=True))
    ratio = float(np.median([a / b for a, b in pairs]))
    return Figure(denoiser, solver, batch, 1000 * sampled, 1000 * bare / n, ratio - 1)


if __name__ == "__main__":
    command(main, SamplingBenchmark)

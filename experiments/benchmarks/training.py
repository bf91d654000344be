"""What bfloat16 and torch.compile do for behaviour cloning: time of a gradient step against float32, eager.

    python -m dprl.experiments.benchmarks.training [--device cuda]

Medians of repeated, interleaved measurements on random data.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dprl.agents import BC, BCConfig
from dprl.config import validate
from dprl.data import Episodes
from dprl.experiments import vision
from dprl.experiments.benchmarks import command
from dprl.experiments.policies import DIFFUSION, MLP
from dprl.experiments.runs import check_device
from dprl.observations import Camera
from dprl.policy import DiffusionConfig, DiffusionPolicy

CAMERA = Camera("camera", 84, 84)
STATE_SIZE, ACTION_SIZE, STEPS = 39, 4, 400


class Case(NamedTuple):
    """What is trained."""

    policy: DiffusionConfig
    batch_size: int
    sees: bool


CASES = {
    "mlp": Case(MLP, 256, sees=False),
    "unet": Case(DIFFUSION["diffusion, U-Net"], 256, sees=False),
    "transformer": Case(DIFFUSION["diffusion, transformer"], 256, sees=False),
    "mlp, ViT": Case(replace(MLP, vision=vision.VIT), 64, sees=True),
    "mlp, ResNet-18": Case(replace(MLP, vision=vision.RESNET), 64, sees=True),
}
WAYS = {
    "float32": BCConfig(),
    "bfloat16": BCConfig(precision="bfloat16"),
    "compiled": BCConfig(compile=True),
    "compiled, bfloat16": BCConfig(compile=True, precision="bfloat16"),
}


@dataclass(frozen=True)
class TrainingBenchmark:
    """What to measure."""

    horizon: int = 16
    steps: int = 10
    """Gradient steps of one measurement."""
    repeats: int = 7
    """Interleaved measurements of each figure."""
    threads: int = 1
    device: str = "cpu"
    json: Path | None = None
    """Also write the figures to this file."""

    def __post_init__(self) -> None:
        validate(self, at_least=dict.fromkeys(("horizon", "steps", "repeats", "threads"), 1))
        check_device(self.device)


@dataclass(frozen=True)
class Figure:
    """One policy trained in one way."""

    policy: str
    way: str
    step_ms: float
    """One gradient step."""
    speedup: float
    """Time of float32 over this: the median of the ratios of measurements next to each other."""


def main(config: TrainingBenchmark) -> list[Figure]:
    """Print the table and return its figures."""
    torch.set_num_threads(config.threads)
    figures = [figure for policy in CASES for figure in measure(config, policy)]
    table = Table("policy", *(f"{way}, ms" for way in WAYS), *(f"{way}, speed-up" for way in list(WAYS)[1:]), box=None)
    for policy in CASES:
        own = [figure for figure in figures if figure.policy == policy]
        table.add_row(policy, *(f"{f.step_ms:.1f}" for f in own), *(f"{f.speedup:.2f}" for f in own[1:]))
    console = Console()
    console.print(table)
    console.print(
        f"horizon {config.horizon}, {config.repeats} repeats of {config.steps} steps, {config.threads} threads, "
        f"{config.device}, torch {torch.__version__}"
    )
    if config.json is not None:
        config.json.write_text(json.dumps([asdict(f) for f in figures], indent=2) + "\n", encoding="utf-8")
    return figures


def measure(config: TrainingBenchmark, name: str) -> list[Figure]:
    """Measure one row of the table."""
    case = CASES[name]
    data = random_data(case)
    agents = []
    for way in WAYS.values():
        policy = DiffusionPolicy.for_dataset(data, replace(case.policy, horizon=config.horizon)).to(config.device)
        agent = BC(policy, replace(way, batch_size=case.batch_size, steps_per_iteration=config.steps))
        agent.set_data(data, 1_000_000)
        _iterate(agent, config)  # compiles
        agents.append(agent)
    seconds = np.array([[_iterate(agent, config) for agent in agents] for _ in range(config.repeats)])
    speedup = np.median(seconds[:, :1] / seconds, axis=0)
    step_ms = 1000 * np.median(seconds, axis=0) / config.steps
    return [Figure(name, way, float(step_ms[i]), float(speedup[i])) for i, way in enumerate(WAYS)]


def random_data(case: Case) -> Episodes:
    """One episode of noise, with images or without."""
    rng = np.random.default_rng(0)
    state = rng.uniform(-1, 1, (STEPS, STATE_SIZE)).astype(np.float32)
    action = rng.uniform(-1, 1, (STEPS, ACTION_SIZE)).astype(np.float32)
    images = rng.integers(0, 256, (STEPS, *CAMERA.shape), np.uint8)
    no = np.zeros(1, np.bool_)
    return Episodes(
        observations=state,
        actions=action,
        rewards=np.zeros(STEPS, np.float32),
        final_observations=state[:1],
        ends=np.array([STEPS]),
        terminated=no,
        success=no,
        seeds=np.zeros(1, np.int64),
        images={CAMERA.name: images} if case.sees else {},
        final_images={CAMERA.name: images[:1]} if case.sees else {},
    )


def _iterate(agent: BC[DiffusionPolicy], config: TrainingBenchmark) -> float:
    start = time.perf_counter()
    agent.update(agent.collect())  # ends with the loss on the CPU
    if config.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    command(main, TrainingBenchmark)

"""Study `score-field`: what a denoiser learns of a 2-D distribution, drawn, next to the truth.

The data are a mixture of Gaussians, so the noised data are one too, and their score ∇ log p_t(x) is known. The policy's
is -ε̂ / noise_t (arXiv:2011.13456).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dprl.agents import BC, BCConfig
from dprl.data import Episodes
from dprl.diffusion import SolverConfig
from dprl.errors import check
from dprl.experiments import plots
from dprl.experiments.policies import MLP
from dprl.experiments.studies import StudyConfig, require_ready, write_table
from dprl.policy import DiffusionConfig, DiffusionPolicy, InferenceConfig
from dprl.seeding import numpy_generator, torch_generator
from dprl.training import load_agent_state
from dprl.training.loop import InterruptedRunError, LoopConfig
from dprl.training.loop import train as train_agent
from dprl.training.run import RUN_FILE, RunFolder

CENTERS = np.array([[-0.6, -0.4], [0.6, -0.4], [0.0, 0.7]])
STD = 0.12
N_POINTS = 4_000
STEPS = 5_000
TIMESTEPS = (45, 25, 10, 3)
SOLVERS = {"ddpm": SolverConfig("ddpm"), "ddim, 10 steps": SolverConfig("ddim", 10),
           "dpmsolver++, 10 steps": SolverConfig("dpmsolver++", 10)}  # fmt: skip


def points_as_episodes(points: np.ndarray[Any, Any]) -> Episodes:
    """Return points (n, 2) as one-step episodes: the actions, under an observation that says nothing."""
    n = len(points)
    zeros = np.zeros((n, 1), np.float32)
    no = np.zeros(n, np.bool_)
    return Episodes(
        observations=zeros,
        actions=points.astype(np.float32),
        rewards=zeros[:, 0],
        final_observations=zeros,
        ends=np.arange(1, n + 1),
        terminated=~no,
        success=no,
        seeds=np.zeros(n, np.int64),
    )


def mixture_score(x: Tensor, signal: float, noise: float, centers: Tensor, std: Tensor) -> Tensor:
    """∇ log p_t(x) (n, 2) of the noised mixture, centres (M, 2) and std (2,) in the units of x."""
    variance = (signal * std) ** 2 + noise**2
    away = signal * centers - x[:, None]
    weight = (-0.5 * (away**2 / variance).sum(-1)).softmax(-1)
    return (weight[..., None] * away / variance).sum(1)


def run(config: StudyConfig, *, progress_bar: bool = True) -> Path:
    """Train on every seed; write ``score-field.md``, ``.csv`` and ``.png`` (of the first seed) and return the first."""
    require_ready(config)
    rows = []
    for seed in config.seeds:
        rng = numpy_generator(seed, "score field")
        points = CENTERS[rng.integers(len(CENTERS), size=N_POINTS)] + STD * rng.standard_normal((N_POINTS, 2))
        data = points_as_episodes(points)
        policy = DiffusionPolicy.for_dataset(data, DiffusionConfig(horizon=1, denoiser=MLP.denoiser,
                                                                   num_train_timesteps=50), seed=seed)  # fmt: skip
        train(policy, data, config, seed, progress_bar=progress_bar)
        rows += [[str(seed), *errors(policy, points, t)] for t in TIMESTEPS]
        if seed == config.seeds[0]:
            draw(policy, points, config.out / "score-field.png")
    return write_table(
        config,
        "score-field",
        "The score field of a 2-D mixture",
        ["seed", "timestep", "noise", "relative error of the score", "cosine to the true score"],
        rows,
        [
            f"Three Gaussians of standard deviation {STD}, {N_POINTS:,} points; an MLP, 50 timesteps, "
            f"{STEPS * config.scale:,.0f} gradient steps. Errors over points drawn from the noised data: root mean "
            "squared difference over root mean squared score."
        ],
    )


def train(policy: DiffusionPolicy, data: Episodes, config: StudyConfig, seed: int, *, progress_bar: bool) -> None:
    """Train `policy`, or go on with the run that is there.

    Raises:
        ConfigError: that run is for another number of steps.
        InterruptedRunError: on SIGINT or SIGTERM, with what was trained so far saved.
    """
    folder, steps = config.out / "runs" / f"score-field.seed{seed}", max(1, round(STEPS * config.scale))
    if not (folder / RUN_FILE).exists():
        RunFolder.create(folder, "score-field", {"steps": steps})
    run, _, about = RunFolder.open(folder)
    same = about == {"steps": steps}
    check(same, "out", str(config.out), f"'{folder}' is of {about}, not of {steps} steps: choose another folder, or "
          "the scale it was made with")  # fmt: skip
    agent = BC(policy, BCConfig(), seed=seed)
    agent.set_data(data, steps)
    if run.last is not None:
        load_agent_state(agent, run.last)
    if agent.timesteps == steps:
        return
    try:
        train_agent(agent, LoopConfig(steps), run=run, resume=run.last is not None, progress_bar=progress_bar)
    except InterruptedRunError as error:
        raise InterruptedRunError(error.signum, "the same command goes on from there") from error


@torch.no_grad()
def errors(policy: DiffusionPolicy, points: np.ndarray[Any, Any], timestep: int) -> list[str]:
    """Compare the learned score at noised data with the true one."""
    generator = torch_generator(0, "score error", timestep)
    clean = policy.action_normalizer.normalize(torch.as_tensor(points, dtype=torch.float32))
    noise = torch.randn(clean.shape, generator=generator)
    level = policy.schedule.timesteps[timestep]
    x = policy.schedule.add_noise(clean[:, None], noise[:, None], level.expand(len(clean)))[:, 0]
    learned, true = learned_score(policy, x, timestep), true_score(policy, x, timestep)
    error = ((learned - true) ** 2).mean().sqrt() / (true**2).mean().sqrt()
    cosine = torch.nn.functional.cosine_similarity(learned, true).mean()
    return [
        str(timestep),
        f"{float(policy.schedule.noise[timestep]):.2f}",
        f"{float(error):.3f}",
        f"{float(cosine):.3f}",
    ]


def learned_score(policy: DiffusionPolicy, x: Tensor, timestep: int) -> Tensor:
    """-ε̂ / noise (n, 2) at normalised x (n, 2)."""
    condition = policy.condition(policy.blank_observation(len(x)))
    noise = policy.base(x[:, None], policy.schedule.timesteps[timestep : timestep + 1], condition)[:, 0]
    score: Tensor = -noise / policy.schedule.noise[timestep]
    return score


def true_score(policy: DiffusionPolicy, x: Tensor, timestep: int) -> Tensor:
    """The noised mixture's score (n, 2) at normalised x (n, 2)."""
    normalizer, schedule = policy.action_normalizer, policy.schedule
    centers = normalizer.normalize(torch.as_tensor(CENTERS, dtype=torch.float32))
    std = STD * 2 / (normalizer.high - normalizer.low)
    return mixture_score(x, float(schedule.signal[timestep]), float(schedule.noise[timestep]), centers, std)


@torch.no_grad()
def draw(policy: DiffusionPolicy, points: np.ndarray[Any, Any], file: Path) -> None:
    """Draw learned and true arrows at some noise levels, and what the solvers sample."""
    figure = plots.new_figure(figsize=(3 * len(TIMESTEPS), 6))
    axes = figure.subplots(2, len(TIMESTEPS))
    line = torch.linspace(-1.5, 1.5, 16)
    grid = torch.cartesian_prod(line, line)
    for axis, timestep in zip(axes[0], TIMESTEPS, strict=True):
        for score, colour in (
            (true_score(policy, grid, timestep), "0.7"),
            (learned_score(policy, grid, timestep), "C0"),
        ):
            arrow = score / (1 + score.norm(dim=-1, keepdim=True))
            axis.quiver(*grid.T, *arrow.T, color=colour, angles="xy", scale=14, width=0.005)
        axis.set_title(f"score at noise {float(policy.schedule.noise[timestep]):.2f}", fontsize=9)
    axes[1, 0].scatter(*points[:1000].T, s=2)
    axes[1, 0].set_title("data", fontsize=9)
    obs = policy.blank_observation(1_000)
    for axis, (name, solver) in zip(axes[1, 1:], SOLVERS.items(), strict=False):
        inference = InferenceConfig(solver.solver, solver.num_inference_steps)
        drawn = policy.draw(obs, inference, torch_generator(0, "samples"))[:, 0]
        axis.scatter(*drawn.T, s=2, color="C1")
        axis.set_title(name, fontsize=9)
    for axis in axes.flat:
        axis.set_aspect("equal")
        axis.set_xticks([])
        axis.set_yticks([])
    for axis in axes[1]:
        axis.set_xlim(-1.2, 1.2)
        axis.set_ylim(-1, 1.3)
    figure.suptitle("learned (blue) and true (grey) score", fontsize=10)
    figure.savefig(file, dpi=110)

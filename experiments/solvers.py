"""Study `solvers`: success and latency against solver, steps and temperature, on the same checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from dprl.experiments import plots
from dprl.experiments.policies import DIFFUSION, MLP
from dprl.experiments.runs import CollectConfig, PretrainConfig
from dprl.experiments.studies import Cell, Look, StudyConfig, grouped, mean_interval, run_cells, shown, write_table
from dprl.policy import InferenceConfig

TASK = "push"
STEPS = (1, 2, 4, 8, 16, 32, 100)
# All begin where there is nothing but noise, so that few steps compare solvers and not grids.
SOLVERS = {
    "ddpm": InferenceConfig("ddpm", timestep_spacing="trailing"),
    "ddpm, temperature 0.5": InferenceConfig("ddpm", timestep_spacing="trailing", temperature=0.5),
    "ddpm, temperature 0": InferenceConfig("ddpm", timestep_spacing="trailing", temperature=0.0),
    "ddim, eta 0.5": InferenceConfig("ddim", eta=0.5, timestep_spacing="trailing"),
    "ddim": InferenceConfig("ddim", timestep_spacing="trailing"),
    "dpmsolver++": InferenceConfig("dpmsolver++"),
    "sde-dpmsolver++": InferenceConfig("sde-dpmsolver++"),
}


def cells(config: StudyConfig) -> list[Cell]:
    """One diffusion policy and one rectified flow for each seed, looked at with every solver and number of steps."""
    diffusion = tuple(
        Look(f"{name} | {n}", replace(inference, num_inference_steps=n), episodes=config.episodes)
        for name, inference in SOLVERS.items()
        for n in STEPS
    )
    flow = tuple(Look(f"euler | {n}", InferenceConfig("euler", n), episodes=config.episodes) for n in STEPS)
    policies = {
        "diffusion": (replace(MLP, num_train_timesteps=100, horizon=8, n_action_steps=4), diffusion),
        "flow": (replace(DIFFUSION["rectified flow, MLP"], horizon=8, n_action_steps=4), flow),
    }
    return [
        Cell(
            f"{name}.seed{seed}",
            CollectConfig(f"metaworld/{TASK}-v3", noise=0.5, episodes=100, seed=seed),
            PretrainConfig("", policy=policy, steps=15_000, seed=seed),
            looks,
        )
        for seed in config.seeds
        for name, (policy, looks) in policies.items()
    ]


def run(config: StudyConfig, *, progress_bar: bool = True) -> Path:
    """Run the study; write ``solvers.md``, ``.csv`` and ``.png`` and return the first."""
    outcomes = run_cells(cells(config), config, progress_bar=progress_bar)
    groups = grouped(outcomes, lambda o: o.look)
    rates = {look: mean_interval([o.success for o in group], config.episodes) for look, group in groups.items()}
    latency = {look: float(np.mean([o.latency_ms for o in group])) for look, group in groups.items()}
    rows = [[*look.split(" | "), shown(*rates[look]), f"{latency[look]:.2f}"] for look in groups]
    figure = plots.new_figure(figsize=(9, 4.2))
    axes = figure.subplots(1, 2, sharey=True)
    for name in (*SOLVERS, "euler"):
        looks = [f"{name} | {n}" for n in STEPS]
        means = [rates[look][0] for look in looks]
        axes[0].plot(STEPS, means, "o-", ms=4, label=name)
        axes[1].plot([latency[look] for look in looks], means, "o-", ms=4)
    axes[0].set_xlabel("denoising steps")
    axes[1].set_xlabel("milliseconds per decision, one environment")
    axes[0].set_ylabel("success")
    axes[0].set_ylim(0, 1.02)
    for axis in axes:
        axis.set_xscale("log")
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(config.out / "solvers.png", dpi=120)
    setting = (
        f"Meta-World {TASK}, 100 demonstrations with action noise 0.5; an MLP, 100 training timesteps, "
        f"{15_000 * config.scale:,.0f} gradient steps; ddpm and ddim visit timesteps in `trailing` "
        "spacing; a temperature below 1 takes less noise in every step than ddpm would; euler is a rectified flow's. "
        "Seeds "
        f"{', '.join(map(str, config.seeds))}, {config.episodes} held-out episodes each, the same for every solver."
    )
    columns = ["solver", "steps", "success (95 %)", "ms per decision"]
    return write_table(config, "solvers", "Solvers and steps", columns, rows, [setting], outcomes)

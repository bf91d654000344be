"""Study `obstacle`: a reward of a user's own steers a clone of `Avoid-v0` round a pillar that its data do not have.

The pillar stands where half of the demonstrations pass. No simulator knows of it: a trajectory that enters it is
counted here. The reward is `clear`, as a user would write it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dprl.envs import avoid
from dprl.experiments import plots
from dprl.experiments.runs import CollectConfig, PretrainConfig
from dprl.experiments.studies import (
    Cell,
    Look,
    StudyConfig,
    grouped,
    mean_interval,
    paths_of,
    run_cells,
    shown,
    write_table,
)
from dprl.guidance.spec import GuidanceConfig
from dprl.policy import DiffusionConfig, InferenceConfig

PILLAR, RADIUS, MARGIN = torch.tensor([0.5, 0.0]), 0.25, 0.1
POLICY = DiffusionConfig(num_train_timesteps=20, horizon=16, n_action_steps=8)
STEPS = 6_000
CLEAR = f"{__name__}:clear"


def clear(obs: Tensor, actions: Tensor) -> Tensor:
    """How far planned paths keep from the pillar: (B, 1, 2), (B, H, 2) -> (B,)."""
    path = obs[:, -1:] + avoid.SPEED * actions.cumsum(1)
    distance: Tensor = (path - PILLAR.to(path)).norm(dim=-1)
    return distance.clamp(max=RADIUS + MARGIN).sum(1)


LOOKS = {
    "not guided": (InferenceConfig(), GuidanceConfig()),
    **{
        f"guided, scale {scale:g}": (InferenceConfig(), GuidanceConfig(CLEAR, scale))
        for scale in (1.0, 3.0, 10.0, 30.0, 100.0)
    },
    "best of 16": (InferenceConfig(candidates=16), GuidanceConfig(scorer=CLEAR)),
    "guided, scale 30, best of 16": (InferenceConfig(candidates=16), GuidanceConfig(CLEAR, 30.0, scorer=CLEAR)),
}
DRAWN = ("not guided", "guided, scale 1", "guided, scale 30", "best of 16")


def cells(config: StudyConfig) -> list[Cell]:
    """A clone of each seed's demonstrations, steered in every way."""
    looks = tuple(
        Look(name, inference, episodes=config.episodes, keep_paths=True, guidance=guidance)
        for name, (inference, guidance) in LOOKS.items()
    )
    return [
        Cell(
            f"clone-seed{seed}",
            CollectConfig(avoid.STATE_ID, noise=0.1, episodes=100, seed=seed),
            PretrainConfig("", policy=POLICY, steps=STEPS, seed=seed),
            looks,
        )
        for seed in config.seeds
    ]


def run(config: StudyConfig, *, progress_bar: bool = True) -> Path:
    """Run the study; write ``obstacle.md``, ``.csv`` and ``.png`` and return the first."""
    todo = cells(config)
    outcomes = run_cells(todo, config, progress_bar=progress_bar)
    rows, paths = [], dict[str, list[np.ndarray[Any, Any]]]()
    for name, own in grouped(outcomes, lambda o: o.look).items():
        played = [path for cell in todo for path in paths_of(config, cell, name)]
        entered = np.array([enters(path) for path in played])
        arrived = np.array([path[-1, 1] >= avoid.FINISH for path in played])
        both = shown(*mean_interval([float((arrived & ~entered).mean())], len(played)))
        latency = f"{np.mean([o.latency_ms for o in own]):.1f}"
        success = shown(*mean_interval([o.success for o in own], config.episodes))
        rows.append([name, both, success, f"{entered.mean():.2f}", latency])
        paths[name] = paths_of(config, todo[0], name)
    draw({name: paths[name] for name in DRAWN}, config.out / "obstacle.png")
    columns = ["", "arrived, clear of the pillar (95 %)", "arrived (95 %)", "entered the pillar", "ms per decision"]
    setting = (
        f"`{avoid.STATE_ID}`, clones of 100 demonstrations that pass the disc on either side; an MLP, {POLICY.horizon} "
        f"actions of which {POLICY.n_action_steps} are executed, {POLICY.num_train_timesteps} steps of ddpm, "
        f"{STEPS * config.scale:,.0f} gradient steps. The reward is the distance of the planned path from the pillar, "
        f"up to {MARGIN} from it, summed over its steps; its gradient is taken at the predicted clean actions, the "
        f"network held still, scaled by the variance. Seeds {', '.join(map(str, config.seeds))}; {config.episodes} "
        "held-out episodes each. The figure shows the first seed's: green arrived clear of the pillar, red did not."
    )
    return write_table(config, "obstacle", "Round a pillar it never saw", columns, rows, [setting], outcomes)


def enters(path: np.ndarray[Any, Any]) -> bool:
    """Whether a trajectory (T+1, 2) comes into the pillar."""
    return bool((np.linalg.norm(path - PILLAR.numpy(), axis=1) < RADIUS).any())


def draw(panels: dict[str, Sequence[np.ndarray[Any, Any]]], file: Path) -> None:
    """Draw trajectories, the disc and the pillar."""
    figure = plots.new_figure(figsize=(3.0 * len(panels), 3.2))
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    angle = np.linspace(0, 2 * np.pi, 100)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    for axis, (name, played) in zip(axes, panels.items(), strict=True):
        axis.fill(*(avoid.RADIUS * circle), color="0.8")
        axis.fill(*(RADIUS * circle + PILLAR.numpy()[:, None]), color="C1", alpha=0.7)
        axis.axhline(avoid.FINISH, color="0.5", lw=1)
        for path in played:
            good = path[-1, 1] >= avoid.FINISH and not enters(path)
            axis.plot(*path.T, lw=0.6, alpha=0.7, color="C2" if good else "C3")
        axis.set_title(name, fontsize=9)
        axis.set_xlim(-1, 1)
        axis.set_ylim(-1, 1)
        axis.set_aspect("equal")
    figure.savefig(file, dpi=120)

"""Study `multimodal`: which policies keep both ways round the disc of `Avoid-v0` (arXiv:2303.04137, figure 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dprl.diffusion import SolverConfig
from dprl.envs import avoid
from dprl.experiments import plots
from dprl.experiments.policies import COMPETITORS, DIFFUSION, MLP, TRANSFORMER, slug, with_chunks
from dprl.experiments.runs import CollectConfig, PolicyChoice, PretrainConfig
from dprl.experiments.studies import (
    Cell,
    Look,
    Outcome,
    StudyConfig,
    grouped,
    mean_interval,
    paths_of,
    run_cells,
    shown,
    training_hours,
    write_table,
)
from dprl.policy import DiffusionConfig

Path2D = np.ndarray[Any, Any]
LOOK = "default"
HORIZON, EXECUTED = 16, 8
STEPS = 8_000
STEPS_OF = {"diffusion, transformer": 12_000, "IBC": 4_000}
"""Gradient steps in place of STEPS."""
# The diffusion policies sample as in the paper. Few steps of a deterministic solver map some noise between the modes.
SAMPLING = SolverConfig("ddpm")
# With the mask an action's noise is predicted without the later actions: no network can make that the data's score.
UNMASKED = {"diffusion, transformer, not causal": replace(MLP, denoiser=replace(TRANSFORMER, causal=False))}
POLICIES: dict[str, PolicyChoice] = {**DIFFUSION, **UNMASKED, **COMPETITORS}


@dataclass(frozen=True)
class Shares:
    """Of one policy's episodes, over all seeds, those that passed on either side."""

    left: int
    right: int
    none: int

    def of_passed(self, side: int) -> str:
        """Share of `side` among the episodes that passed the disc, for a table."""
        passed = self.left + self.right
        return f"{side / passed:.2f}" if passed else "-"


def cells(config: StudyConfig) -> list[Cell]:
    """Every policy on every seed's 100 demonstrations."""
    return [
        Cell(
            f"{slug(name)}-seed{seed}",
            CollectConfig(avoid.STATE_ID, noise=0.1, episodes=100, seed=seed),
            PretrainConfig(
                "",
                policy=with_sampling(with_chunks(policy, HORIZON, EXECUTED)),
                steps=STEPS_OF.get(name, STEPS),
                seed=seed,
            ),
            (Look(LOOK, episodes=config.episodes, keep_paths=True),),
        )
        for name, policy in POLICIES.items()
        for seed in config.seeds
    ]


def with_sampling(config: PolicyChoice) -> PolicyChoice:
    """Return `config`, of a diffusion policy with `SAMPLING`; a flow keeps its own."""
    if not isinstance(config, DiffusionConfig) or config.noise.is_flow:
        return config
    return replace(config, sampling=SAMPLING)


def run(config: StudyConfig, *, progress_bar: bool = True) -> Path:
    """Run the study; write ``multimodal.md``, ``.csv`` and ``.png`` and return the first."""
    todo = cells(config)
    outcomes = run_cells(todo, config, progress_bar=progress_bar)
    by_name = {slug(name): name for name in POLICIES}
    rows = []
    paths: dict[str, list[Path2D]] = {}
    for key, group in grouped(outcomes, lambda o: o.cell.rsplit("-seed", 1)[0]).items():
        own = [cell for cell in todo if cell.name.rsplit("-seed", 1)[0] == key]
        played = [path for cell in own for path in paths_of(config, cell, LOOK)]
        shares = count_modes(played)
        paths[by_name[key]] = paths_of(config, own[0], LOOK)
        rows.append(
            [
                by_name[key],
                shown(*mean_interval([o.success for o in group], config.episodes)),
                shares.of_passed(shares.left),
                shares.of_passed(shares.right),
                f"{shares.none / len(played):.2f}",
                f"{np.mean([o.latency_ms for o in group]):.1f}",
            ]
        )
    draw(paths, config.out / "multimodal.png")
    return write_table(
        config,
        "multimodal",
        "Both ways round",
        ["policy", "success (95 %)", "left of those that passed", "right", "passed neither side", "ms per decision"],
        rows,
        _notes(config, outcomes),
        outcomes,
    )


def count_modes(paths: Sequence[Path2D]) -> Shares:
    """Count the sides on which trajectories (T+1, 2) passed the disc."""
    sides = [avoid.mode(path) for path in paths]
    return Shares(sides.count("left"), sides.count("right"), sides.count("none"))


def draw(paths: dict[str, list[Path2D]], file: Path) -> None:
    """Draw every policy's trajectories around the disc."""
    columns = 4
    rows = -(-len(paths) // columns)
    figure = plots.new_figure(figsize=(2.6 * columns, 2.7 * rows))
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(paths) :]:
        axis.axis("off")
    for axis, (name, played) in zip(axes.flat, paths.items(), strict=False):
        angle = np.linspace(0, 2 * np.pi, 100)
        axis.fill(avoid.RADIUS * np.cos(angle), avoid.RADIUS * np.sin(angle), color="0.8")
        axis.axhline(avoid.FINISH, color="C2", lw=1)
        for path in played:
            axis.plot(*path.T, lw=0.6, alpha=0.6, color="C0" if path[-1, 1] >= avoid.FINISH else "C3")
        axis.set_title(name, fontsize=8)
        axis.set_xlim(-1, 1)
        axis.set_ylim(-1, 1)
        axis.set_aspect("equal")
    figure.savefig(file, dpi=120)


def _notes(config: StudyConfig, outcomes: list[Outcome]) -> list[str]:
    return [
        f"`{avoid.STATE_ID}`, 100 scripted demonstrations with action noise 0.1, on either side with equal chance; "
        f"{STEPS * config.scale:,.0f} gradient steps (causal transformer: half as many again; IBC: half) of 256 "
        f"chunks of {HORIZON} actions, {EXECUTED} of them executed (the LSTM: one); diffusion samples "
        "with ddpm, 50 steps, the flow with 10. "
        f"Seeds {', '.join(map(str, config.seeds))}; {config.episodes} held-out episodes each, the policy as it is "
        "after the last step. Blue in the figure: reached the line; red: did not. Shares are of the episodes that "
        f"came past the disc. {training_hours(outcomes):.1f} hours of training on one core.",
    ]

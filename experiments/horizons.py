"""Study `horizons`: success against a plan's executed actions and its length (arXiv:2303.04137, figure 5)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dprl.experiments import plots
from dprl.experiments.policies import MLP
from dprl.experiments.runs import CollectConfig, PretrainConfig
from dprl.experiments.studies import (
    Cell,
    Look,
    StudyConfig,
    grouped,
    mean_interval,
    run_cells,
    shown,
    training_hours,
    write_table,
)

TASK = "push"
HORIZONS = (1, 2, 4, 8, 16, 32)
EXECUTED = (1, 2, 4, 8, 16, 32)
FIXED = 16
"""The horizon whose executed actions vary from closed loop to open loop."""


def cells(config: StudyConfig) -> list[Cell]:
    """A training for each horizon and seed; the fixed horizon is looked at with every number of executed actions."""
    found = []
    for seed in config.seeds:
        for horizon in HORIZONS:
            executed = [n for n in EXECUTED if n <= horizon] if horizon == FIXED else [min(4, horizon)]
            looks = tuple(Look(f"executed-{n}", n_action_steps=n, episodes=config.episodes) for n in executed)
            found.append(
                Cell(
                    f"horizon-{horizon}.seed{seed}",
                    CollectConfig(f"metaworld/{TASK}-v3", noise=0.5, episodes=100, seed=seed),
                    PretrainConfig("", policy=replace(MLP, horizon=horizon), steps=10_000, seed=seed),
                    looks,
                )
            )
    return found


def run(config: StudyConfig, *, progress_bar: bool = True) -> Path:
    """Run the study; write ``horizons.md``, ``.csv`` and ``.png`` and return the first."""
    outcomes = run_cells(cells(config), config, progress_bar=progress_bar)
    found = {
        tuple(int(part.split("-")[1]) for part in key.split("|")): mean_interval(
            [o.success for o in group], config.episodes
        )
        for key, group in grouped(outcomes, lambda o: f"{o.cell.split('.')[0]}|{o.look}").items()
    }
    rows = [[str(horizon), str(executed), shown(*rate)] for (horizon, executed), rate in sorted(found.items())]
    figure = plots.new_figure(figsize=(9, 3.6))
    axes = figure.subplots(1, 2, sharey=True)
    closed_to_open = {executed: rate for (horizon, executed), rate in sorted(found.items()) if horizon == FIXED}
    lengths = {horizon: rate for (horizon, executed), rate in sorted(found.items()) if executed == min(4, horizon)}
    for axis, points, label in (
        (axes[0], closed_to_open, f"executed actions of a plan of {FIXED}"),
        (axes[1], lengths, "actions of a plan, of which up to 4 are executed"),
    ):
        rates = list(points.values())
        errors = [[max(m - low, 0) for m, low, _ in rates], [max(high - m, 0) for m, _, high in rates]]
        axis.errorbar(list(points), [m for m, _, _ in rates], yerr=errors, fmt="o-", capsize=3)
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(points), [str(n) for n in points])
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("success (95 % interval)")
    axes[0].set_ylim(0, 1)
    figure.savefig(config.out / "horizons.png", dpi=120)
    setting = (
        f"Meta-World {TASK}, 100 demonstrations with action noise 0.5; diffusion policy with an MLP, "
        f"{10_000 * config.scale:,.0f} gradient steps; ddim, 10 steps. Seeds {', '.join(map(str, config.seeds))}, "
        f"{config.episodes} held-out episodes each; {training_hours(outcomes):.1f} hours of training on one core."
    )
    columns = ["horizon", "executed", "success (95 %)"]
    return write_table(config, "horizons", "Horizons, closed loop to open loop", columns, rows, [setting], outcomes)

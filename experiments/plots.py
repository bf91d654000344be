"""Plots, drawn without a display."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dprl.envs import metaworld
from dprl.errors import MissingDependencyError
from dprl.log import read_metrics
from dprl.rollout import Evaluation

if TYPE_CHECKING:
    from dprl.experiments.video import Episode


# What `training_curves` draws: one plot each, with its counterpart of the evaluations.
CURVES = {
    "bc/loss": "eval/success_rate",
    "rollout/success_rate": "eval/success_rate",
    "rollout/return_mean": "eval/return_mean",
}


def new_figure(**options: Any) -> Any:
    """Return a matplotlib figure that needs no display, or raise MissingDependencyError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "plots", "drawing plots") from error
    figure = Figure(layout="constrained", **options)
    FigureCanvasAgg(figure)
    return figure


def training_curves(run: Path) -> None:
    """Draw a run's own curves into its ``plots/``: loss, or return and success. Without matplotlib, say so only."""
    rows = read_metrics(run)
    shown = [name for name in CURVES if any(name in row for row in rows)]
    try:
        figure = new_figure(figsize=(4.5 * max(1, len(shown)), 3.4))
    except MissingDependencyError as error:
        warnings.warn(f"no plots: {error}", stacklevel=2)
        return
    for axis, name in zip(np.atleast_1d(figure.subplots(1, max(1, len(shown)))), shown, strict=False):
        for curve in (name, CURVES[name]):
            points = [(row["timesteps"], row[curve]) for row in rows if row.get(curve) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", ms=2, lw=1, label=curve)
        axis.set_xlabel("timesteps")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    (run / "plots").mkdir(exist_ok=True)
    figure.savefig(run / "plots" / "training.png", dpi=120)


def learning_curve(run: Path, file: Path, *, before: Evaluation, after: Evaluation) -> None:
    """Draw success with its 95 % interval against environment steps and against minutes.

    Args:
        run: a fine-tuning run.
        file: the PNG to write.
        before: held-out evaluation of the policy it started from.
        after: held-out evaluation of the policy it made.
    """
    rows = read_metrics(run)
    evaluated = [row for row in rows if "eval/success_rate" in row]
    collected = [row for row in rows if "rollout/success_rate" in row]
    figure = new_figure(figsize=(9, 3.6))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, label, key, scale in (
        (axes[0], "environment steps", "timesteps", 1.0),
        (axes[1], "minutes", "time/elapsed_s", 1 / 60),
    ):
        x = [row[key] * scale for row in evaluated]
        rate = np.array([row["eval/success_rate"] for row in evaluated])
        low = np.array([row["eval/success_low"] for row in evaluated])
        high = np.array([row["eval/success_high"] for row in evaluated])
        axis.plot(
            [row[key] * scale for row in collected],
            [row["rollout/success_rate"] for row in collected],
            color="0.7", lw=1, label="while exploring",
        )  # fmt: skip
        axis.errorbar(x, rate, yerr=[rate - low, high - rate], fmt="o-", ms=3, capsize=2, label="during training")
        end = rows[-1][key] * scale
        for position, result, name in ((0.0, before, "held out, before"), (end, after, "held out, after")):
            assert result.success_rate is not None
            assert result.success_ci95 is not None
            error = [[result.success_rate - result.success_ci95[0]], [result.success_ci95[1] - result.success_rate]]
            axis.errorbar([position], [result.success_rate], yerr=error, fmt="s", ms=6, capsize=4, label=name)
        axis.set_xlabel(label)
        axis.locator_params(axis="x", nbins=6)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("success (95 % interval)")
    axes[0].set_ylim(-0.02, 1.02)
    axes[1].legend(fontsize=8, loc="lower right")
    figure.suptitle(f"{after.env}: {before.success_rate:.2f} before, {after.success_rate:.2f} after", fontsize=11)
    figure.savefig(file, dpi=120)


def trajectories(episodes: dict[str, list[Episode]], file: Path) -> None:
    """Draw the paths of hand and object, seen from above, of the same start states before and after.

    Args:
        episodes: what `video.record` returned.
        file: the PNG to write.
    """
    starts = len(next(iter(episodes.values())))
    figure = new_figure(figsize=(3.2 * starts, 3.2 * len(episodes)))
    axes = np.atleast_2d(figure.subplots(len(episodes), starts, sharex=True, sharey=True))
    for row, (name, played) in zip(axes, episodes.items(), strict=True):
        for axis, episode in zip(row, played, strict=True):
            path = episode.observations
            axis.plot(*path[:, metaworld.HAND][:, :2].T, color="C0", lw=1, label="hand")
            axis.plot(*path[:, metaworld.OBJECT][:, :2].T, color="C1", lw=2, label="object")
            axis.plot(*path[0, metaworld.GOAL][:2], "*", color="C2", ms=12, label="goal")
            verdict = f"success after {len(path) - 1} steps" if episode.success else "no success"
            axis.set_title(f"{name}: {verdict}", fontsize=9)
            axis.set_aspect("equal", adjustable="box")
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(file, dpi=120)

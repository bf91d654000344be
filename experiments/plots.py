"""Plots, drawn without a display."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dprl.envs import metaworld
from dprl.errors import MissingDependencyError
from dprl.log import read_metrics, read_rows
from dprl.rollout import Evaluation

if TYPE_CHECKING:
    from dprl.experiments.video import Episode


SUCCESS, RETURN = "eval/success_rate", "eval/return_mean"
# What `training_curves` draws: one plot each, with its counterpart of the evaluations.
CURVES = {
    "bc/loss": SUCCESS,
    "outcome/loss": "validation/explained_variance",
    "energy/loss": SUCCESS,
    "rollout/success_rate": SUCCESS,
    "rollout/return_mean": RETURN,
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


def over_seeds(panels: Mapping[str, Mapping[str, Sequence[Path]]], file: Path, *, n_columns: int | None = None) -> None:
    """Draw the evaluations of runs against environment steps: the mean over seeds, its 95 % interval, every seed thin.

    Two seeds tell so little of their spread that their interval, which would fill the panel, is not drawn.

    Args:
        panels: title -> what is compared in it -> the curves of its seeds, files of metrics' rows.
        file: the PNG to write.
        n_columns: panels side by side. Default: all.
    """
    n_columns = n_columns or len(panels)
    n_rows = math.ceil(len(panels) / n_columns)
    figure = new_figure(figsize=(4.2 * n_columns, 3.4 * n_rows))
    axes = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.axis("off")
    for axis, (title, compared) in zip(axes, panels.items(), strict=False):
        for i, (name, files) in enumerate(compared.items()):
            steps, scores, metric = _evaluations(files)
            axis.plot(steps.T, scores.T, color=f"C{i}", lw=0.6, alpha=0.5)
            axis.plot(steps.mean(0), scores.mean(0), "o-", color=f"C{i}", ms=3, label=name)
            if len(files) > 2:
                low, high = mean_ci95(scores)
                bounds = (0, 1) if metric == SUCCESS else (-np.inf, np.inf)
                axis.fill_between(steps.mean(0), *np.clip((low, high), *bounds), color=f"C{i}", alpha=0.15, lw=0)
            axis.set_ylabel(metric.removeprefix("eval/").replace("_", " "))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("environment steps")
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def mean_ci95(scores: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Student's 95 % interval of the mean over seeds: (seeds, points) -> (2, points)."""
    from scipy.stats import t

    n = len(scores)
    half = t.ppf(0.975, n - 1) * scores.std(0, ddof=1) / np.sqrt(n)
    return np.stack([scores.mean(0) - half, scores.mean(0) + half])


def _evaluations(files: Sequence[Path]) -> tuple[npt.NDArray[Any], npt.NDArray[Any], str]:
    """Timesteps and scores (runs, points) of the evaluations that all runs have, and what they are."""
    rows = [{row["iteration"]: row for row in read_rows(file) if RETURN in row} for file in files]
    common = sorted(set.intersection(*(set(own) for own in rows)))
    metric = SUCCESS if all(SUCCESS in row for own in rows for row in own.values()) else RETURN
    steps, scores = ([[own[i][key] for i in common] for own in rows] for key in ("timesteps", metric))
    return np.array(steps), np.array(scores), metric


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


def bars(panels: dict[str, dict[str, Sequence[float]]], file: Path) -> None:
    """Draw for every panel a bar for each name, the mean of its scores, and a dot for each of them."""
    figure = new_figure(figsize=(1.8 + 2.8 * len(panels), 0.8 + 0.35 * max(map(len, panels.values()))))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, groups) in zip(axes, panels.items(), strict=True):
        for i, scores in enumerate(groups.values()):
            axis.barh(i, sum(scores) / len(scores), color=f"C{i}", alpha=0.6)
            axis.plot(scores, [i] * len(scores), "k.", ms=4)
        axis.set_yticks(range(len(groups)), list(groups) if axis is axes[0] else [])
        axis.invert_yaxis()
        axis.set_xlabel("score")
        axis.set_title(title, fontsize=10)
    figure.savefig(file, dpi=120)

"""What `dprl inspect` shows of a data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Group
from rich.table import Table

from dprl.data import Summary
from dprl.experiments import plots

Numbers = npt.NDArray[np.floating[Any]]

BARS = "▁▂▃▄▅▆▇█"
BINS = 24
MOST_PANELS = 24
"""So many numbers of an action get a histogram in the figure; in the terminal all have a line."""


def bars(values: Numbers, limits: Numbers) -> str:
    """A histogram in one line, from the least to the largest; a bin that holds anything shows."""
    counts, _ = np.histogram(values.astype(np.float64), BINS, _range(limits))
    return "".join(" " if n == 0 else BARS[int(np.ceil(n / counts.max() * len(BARS))) - 1] for n in counts)


def report(summary: Summary) -> Group:
    """Return tables for a terminal."""
    about = Table.grid(padding=(0, 2))
    for name, value in _facts(summary):
        about.add_row(name, value)
    spread = Table("", "least", "mean", "largest", "histogram", box=None)
    for name, values, mean, limits in _spreads(summary):
        figures = (limits[0], mean, limits[1])
        spread.add_row(name, *(f"{figure:,.4g}" for figure in figures), bars(values, limits))
    return Group(about, "", spread)


def draw(summary: Summary, file: Path) -> None:
    """Draw the histograms."""
    panels = list(_spreads(summary))
    left_out = max(0, summary.action_size - MOST_PANELS)
    panels = panels[: len(panels) - left_out]
    n_columns = min(4, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure = plots.new_figure(figsize=(3.2 * n_columns, 2.4 * n_rows))
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flat
    for axis, (name, values, _, limits) in zip(axes, panels, strict=False):
        axis.hist(values.astype(np.float64), bins=40, range=_range(limits))
        axis.set_title(name, fontsize=9)
    for axis in list(axes)[len(panels) :]:
        axis.remove()
    if left_out:
        figure.supxlabel(f"and {left_out} more numbers of an action", fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def _facts(summary: Summary) -> Iterator[tuple[str, str]]:
    n = len(summary.lengths)
    yield "format", summary.format
    yield "environment", summary.env_id or "not known"
    yield "episodes", f"{n:,}, {int(summary.lengths.sum()):,} steps"
    cameras = "".join(f", {name} {'x'.join(map(str, shape))}" for name, shape in summary.cameras.items())
    named = ", ".join(f"{name} {size}" for name, size in summary.parts.items() if name)
    yield "observation", f"{summary.observation_size} numbers{f' ({named})' if named else ''}{cameras}"
    yield "action", f"{summary.action_size} numbers"
    yield "rewards", _rewards(summary)
    yield "success", "not known" if summary.success is None else f"{summary.success.mean():.2f} of the episodes"
    yield "terminated", f"{int(summary.terminated.sum())} of {n}; the others were cut off, or nobody knows"
    unknown = n - int(summary.final_known.sum())
    if unknown:
        yield "last outcome", f"not kept in {unknown} of {n}: what an episode's last action led to"


def _rewards(summary: Summary) -> str:
    if summary.returns is not None:
        return "in the data"
    if summary.success is not None:
        return "none; 1 at the end of episodes that succeeded is made of them"
    return "none, nor success: for imitation alone"


def _spreads(summary: Summary) -> Iterator[tuple[str, Numbers, float, Numbers]]:
    """What has a histogram: its name, values, the mean of all, and the least and largest of all."""
    lengths = summary.lengths.astype(np.float64)
    yield "steps of an episode", lengths, float(lengths.mean()), _limits(lengths)
    if summary.returns is not None:
        yield "return", summary.returns, float(summary.returns.mean()), _limits(summary.returns)
    for i in range(summary.action_size):
        yield f"action {i}", summary.actions[:, i], float(summary.action_mean[i]), summary.action_limits[:, i]


def _range(limits: Numbers) -> tuple[float, float]:
    """Of a histogram: around a single value, where there is but one."""
    least, largest = map(float, limits)
    around = max(0.5, 0.01 * abs(least)) if least == largest else 0.0
    return least - around, largest + around


def _limits(values: Numbers) -> Numbers:
    return np.array([values.min(), values.max()])

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
MOST_NUMBERS = 12
"""So many numbers of an action get a line of their own."""


def bars(values: Numbers, limits: Numbers) -> str:
    """A histogram in one line, from the least to the largest; a bin that holds anything shows."""
    counts, _ = np.histogram(values.astype(np.float64), BINS, (float(limits[0]), float(limits[1])))
    return "".join(" " if n == 0 else BARS[int(np.ceil(n / counts.max() * len(BARS))) - 1] for n in counts)


def report(summary: Summary) -> Group:
    """Return tables for a terminal."""
    about = Table.grid(padding=(0, 2))
    for name, value in _facts(summary):
        about.add_row(name, value)
    spread = Table("", "least", "mean", "largest", "histogram", box=None)
    for name, values, limits in _spreads(summary):
        figures = (limits[0], values.mean(dtype=np.float64), limits[1])
        spread.add_row(name, *(f"{figure:,.4g}" for figure in figures), bars(values, limits))
    return Group(about, "", spread)


def draw(summary: Summary, file: Path) -> None:
    """Draw the histograms."""
    panels = list(_spreads(summary))
    n_columns = min(4, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure = plots.new_figure(figsize=(3.2 * n_columns, 2.4 * n_rows))
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flat
    for axis, (name, values, limits) in zip(axes, panels, strict=False):
        axis.hist(values.astype(np.float64), bins=40, range=tuple(map(float, limits)))
        axis.set_title(name, fontsize=9)
    for axis in list(axes)[len(panels) :]:
        axis.remove()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def _facts(summary: Summary) -> Iterator[tuple[str, str]]:
    n = len(summary.lengths)
    yield "format", summary.format
    yield "environment", summary.env_id or "not known"
    yield "episodes", f"{n:,}, {int(summary.lengths.sum()):,} steps"
    cameras = "".join(f", {name} {'x'.join(map(str, shape))}" for name, shape in summary.cameras.items())
    yield "observation", f"{summary.observation_size} numbers{cameras}"
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


def _spreads(summary: Summary) -> Iterator[tuple[str, Numbers, Numbers]]:
    """What has a histogram: its name, values, and the least and largest of all."""
    lengths = summary.lengths.astype(np.float64)
    yield "steps of an episode", lengths, _limits(lengths)
    if summary.returns is not None:
        yield "return", summary.returns, _limits(summary.returns)
    for i in range(min(summary.action_size, MOST_NUMBERS)):
        yield f"action {i}", summary.actions[:, i], summary.action_limits[:, i]


def _limits(values: Numbers) -> Numbers:
    return np.array([values.min(), values.max()])

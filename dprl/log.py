"""Metrics of a run: JSON lines always, TensorBoard where it is installed, Weights & Biases when asked.

A failing logger must never stop a run: TensorBoard and W&B are switched off, with one warning, at their first error.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dprl.errors import CheckpointError, MissingDependencyError

METRICS_FILE = "metrics.jsonl"
WANDB_INIT_TIMEOUT_S = 20

Sink = Callable[[Mapping[str, float], int], None]


class MetricsLog:
    """Writes one row per iteration to every destination."""

    def __init__(self, folder: Path, *, keep_iterations: int = 0, wandb_project: str | None = None) -> None:
        """Open the logs of the run in `folder`.

        Args:
            folder: the run folder.
            keep_iterations: rows of later iterations are dropped; a resumed run writes them anew.
            wandb_project: W&B project to log to; offline where there is no login.
        """
        self._file = folder / METRICS_FILE
        rows = [row for row in read_metrics(folder) if row["iteration"] <= keep_iterations]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self._file)
        self._stream = self._file.open("a", encoding="utf-8")
        self._sinks: dict[str, Sink] = {}
        self._closers: dict[str, Callable[[], None]] = {}
        self._open("TensorBoard", lambda: self._tensorboard(folder, rows[-1]["timesteps"] + 1 if rows else None))
        if wandb_project is not None:
            self._open("W&B", lambda: self._wandb(folder, wandb_project))

    def write(self, metrics: Mapping[str, float], iteration: int, timesteps: int) -> None:
        """Write one row."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # strict JSON
        row = {"iteration": iteration, "timesteps": timesteps, **finite}
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        for name, sink in list(self._sinks.items()):
            self._guard(name, partial(sink, metrics, timesteps))

    def close(self) -> None:
        """Close every destination."""
        self._stream.close()
        for name, close in list(self._closers.items()):
            self._guard(name, close)

    def _open(self, name: str, opener: Callable[[], tuple[Sink, Callable[[], None]] | None]) -> None:
        def run() -> None:
            opened = opener()
            if opened is not None:
                self._sinks[name], self._closers[name] = opened

        self._guard(name, run)

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a logger does, the run goes on
            self._sinks.pop(name, None)
            self._closers.pop(name, None)
            warnings.warn(f"logging to {name} is off: {type(error).__name__}: {error}", stacklevel=2)

    @staticmethod
    def _tensorboard(folder: Path, purge_step: int | None) -> tuple[Sink, Callable[[], None]] | None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

        def sink(metrics: Mapping[str, float], timesteps: int) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, timesteps)

        return sink, writer.close

    @staticmethod
    def _wandb(folder: Path, project: str) -> tuple[Sink, Callable[[], None]]:
        import wandb

        has_login = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if has_login else "offline")
        if not has_login and mode == "offline":
            warnings.warn("W&B logs offline (no login); upload later with 'wandb sync'", stacklevel=2)
        settings = wandb.Settings(init_timeout=WANDB_INIT_TIMEOUT_S, silent=True)
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[
            :16
        ]  # a resumed run goes on as the same one
        options: dict[str, Any] = {
            "project": project, "dir": str(folder), "name": folder.name, "id": identity, "resume": "allow",
            "settings": settings,
        }  # fmt: skip
        try:
            run = wandb.init(mode=mode, **options)
        except (wandb.errors.UsageError, wandb.errors.CommError) as error:
            warnings.warn(f"W&B cannot be reached, so it logs offline: {error}", stacklevel=2)
            run = wandb.init(mode="offline", **options)

        def sink(metrics: Mapping[str, float], timesteps: int) -> None:
            run.log({**metrics, "timesteps": timesteps})

        return sink, run.finish


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics, see `read_rows`."""
    return read_rows(folder / METRICS_FILE)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of metrics, none if there is no file; a last line that was cut short is left out.

    Raises:
        CheckpointError: another line is damaged.
    """
    if not file.is_file():
        return []
    lines = file.read_bytes().splitlines()
    rows = []
    for i, line in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and {"iteration", "timesteps"} <= row.keys():
            rows.append(row)
        elif i < len(lines) - 1:
            raise CheckpointError(f"'{file}', line {i + 1} is damaged; remove it, or the file, and resume again")
    return rows


def require_wandb() -> None:
    """Raise MissingDependencyError where W&B is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise MissingDependencyError("wandb", "wandb", "logging to Weights & Biases")

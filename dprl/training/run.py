"""A run folder.

run.json                  what was asked for: kind of run and its whole config
metrics.jsonl             one row per iteration
checkpoints/iteration-N/  policy and training state; `last` and `best` are links to two of them
tensorboard/              the same for TensorBoard, where it is installed
plots/training.png        drawn when the run is complete
.lock                     held by the process that trains it
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dprl import checkpoint
from dprl.errors import CheckpointError, ConfigError, RunExistsError
from dprl.training.agent import AGENT_FILE, Agent, write_agent

RUN_FILE = "run.json"
LOCK_PATIENCE_S = 6.0
"""Worker processes of a trainer that was killed hold its lock until they notice."""


class RunFolder:
    """One run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock = FileLock(path / ".lock")

    @classmethod
    def create(cls, path: Path, kind: str, config: dict[str, Any]) -> RunFolder:
        """Make a new run folder.

        Raises:
            RunExistsError: `path` exists and is not an empty folder.
        """
        cls.require_free(path)
        path.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(path / RUN_FILE, {"kind": kind, "config": config})
        return cls(path)

    @staticmethod
    def require_free(path: Path) -> None:
        """Raise RunExistsError or ConfigError unless `path` can become a new folder."""
        if (path / RUN_FILE).exists():
            raise RunExistsError(f"'{path}' already holds a run: choose another folder, or 'dprl resume {path}'")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunExistsError(f"'{path}' already exists and is not empty: choose another folder")
        parent = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise ConfigError(f"'{path}' cannot be made: '{parent}' is not a folder that can be written to")

    @classmethod
    def open(cls, path: Path) -> tuple[RunFolder, str, dict[str, Any]]:
        """Return an existing run, its kind and its config.

        Raises:
            CheckpointError: there is no run.
        """
        if not (path / RUN_FILE).is_file():
            raise CheckpointError(f"'{path}' holds no run: '{path / RUN_FILE}' is missing")
        about = checkpoint.read_json(path / RUN_FILE)
        if not isinstance(about, dict) or not {"kind", "config"} <= about.keys():
            raise CheckpointError(f"'{path / RUN_FILE}' is damaged: it must hold the kind and the config of a run")
        run = cls(path)
        run._mend_links()
        return run, about["kind"], about["config"]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training this run; may be nested.

        Raises:
            RunExistsError: one of them is at it.
        """
        try:
            self._lock.acquire(timeout=LOCK_PATIENCE_S)
        except Timeout:
            raise RunExistsError(
                f"'{self.path}' is being trained by another process: wait for it, or choose another folder"
            ) from None
        try:
            yield
        finally:
            self._lock.release()

    @property
    def last(self) -> Path | None:
        """The newest checkpoint, if any."""
        link = self.checkpoints / "last"
        return link.resolve() if link.exists() else None

    def save(
        self,
        agent: Agent[Any],
        iteration: int,
        *,
        best: float | None,
        is_best: bool,
        elapsed_s: float,
        pending: bool = False,
    ) -> None:
        """Publish a checkpoint; point `last`, and `best` if it is, at it; then drop those no link names.

        `pending` says that it is being evaluated: `mark_best` may follow before the next checkpoint.
        """
        target = self._checkpoint(iteration)
        extra = {
            "iteration": iteration, "best_score": best, "elapsed_s": elapsed_s, "pending_evaluation": pending
        }  # fmt: skip
        checkpoint.publish(target, lambda folder: write_agent(agent, folder, extra), overwrite=True)
        if is_best:  # before `last`: a run killed in between resumes from the old one and comes here again
            self.mark_best(iteration)
        checkpoint.replace_link(self.checkpoints / "last", target.name)
        self._prune()

    def mark_best(self, iteration: int) -> None:
        """Point `best` at the checkpoint of `iteration`, which must be there."""
        checkpoint.replace_link(self.checkpoints / "best", self._checkpoint(iteration).name)

    def _checkpoint(self, iteration: int) -> Path:
        return self.checkpoints / f"iteration-{iteration:06d}"

    def progress(self) -> dict[str, Any]:
        """Return the newest checkpoint's agent.json."""
        if self.last is None:
            raise CheckpointError(f"'{self.path}' has no checkpoint yet")
        about: dict[str, Any] = checkpoint.read_json(self.last / AGENT_FILE)
        return about

    def _mend_links(self) -> None:
        """Make `last` and `best` links again where a copy of the run lost them or holds folders in their place."""
        for name in ("best", "last"):
            copy = self.checkpoints / name
            if copy.is_dir() and not copy.is_symlink():
                about = checkpoint.read_json(copy / AGENT_FILE)
                if not isinstance(about, dict) or not isinstance(about.get("iteration"), int):
                    raise CheckpointError(f"'{copy / AGENT_FILE}' is damaged: it must name an iteration")
                target = self._checkpoint(about["iteration"])
                if target.exists():
                    shutil.rmtree(copy)
                else:
                    copy.rename(target)
                checkpoint.replace_link(copy, target.name)
        kept = sorted(self.checkpoints.glob("iteration-*"))
        if kept and not (self.checkpoints / "last").exists():
            checkpoint.replace_link(self.checkpoints / "last", kept[-1].name)

    def _prune(self) -> None:
        kept = {(self.checkpoints / link).resolve() for link in ("last", "best")}
        for folder in self.checkpoints.iterdir():
            if not folder.is_symlink() and folder.resolve() not in kept:
                shutil.rmtree(folder, ignore_errors=True)

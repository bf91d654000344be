"""Every error a user can cause: one family, so that the command line can print one line and exit with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral
from typing import Self


class DprlError(Exception):
    """Base of all errors that say what was wrong with the input and what would be right."""


class ConfigError(DprlError):
    """A setting that is unknown, of the wrong type, out of range, or at odds with another one."""


class DatasetError(DprlError, ValueError):
    """A data set that is missing, damaged, or does not fit; the message names file, episode and step."""


class CheckpointError(DprlError, ValueError):
    """A policy or checkpoint that is missing, damaged, too new, or does not fit."""


class EnvError(DprlError, ValueError):
    """An environment that is unknown, misused, or returned something it must not."""


class LocatedEnvError(EnvError):
    """An error that says which environment it was, where that is known, and where in its episode."""

    def __init__(
        self,
        env_id: str,
        what: str,
        detail: str = "",
        index: int | None = None,
        episode: int = -1,
        step: int = -1,
        seed: int = -1,
    ) -> None:
        """Say what happened, and in which environment if that is known; `episode` and `step` count from 0."""
        where = f" in environment {index}, episode {episode}, step {step} (environment seed {seed})"
        super().__init__(f"{env_id}: {what}{'' if index is None else where}{detail and f': {detail}'}")
        self._made_of = (env_id, what, detail, index, episode, step, seed)

    def counted_from(self, first: int) -> Self:
        """Return the same error of environment `first` + index."""
        env_id, what, detail, index, *rest = self._made_of
        return type(self)(env_id, what, detail, None if index is None else first + index, *rest)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), self._made_of


class EnvFaultError(LocatedEnvError):
    """An environment raised, or returned something it must not, through no fault of its caller's."""


class EnvActionError(LocatedEnvError):
    """An environment was given what it cannot execute."""


class ClosedPoolError(DprlError):
    """A pool was used after `close`."""

    def __init__(self) -> None:
        super().__init__("this pool is closed: make a new one")


class WorkerError(DprlError):
    """A worker of a pool failed more often than it is forgiven."""


class RunExistsError(DprlError, FileExistsError):
    """The output folder already holds something that would be overwritten."""


class MissingDependencyError(DprlError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}'; in dprl's checkout: pip install '.[{extra}]'")
        self._made_of = (package, extra, purpose)

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), self._made_of


def did_you_mean(word: str, known: Iterable[str], n: int = 3) -> str:
    """Return ``" Did you mean a, b or c?"`` for the nearest known words, or an empty string."""
    nearest = difflib.get_close_matches(word, list(known), n=n, cutoff=0.5)
    if not nearest:
        return ""
    *head, last = nearest
    return f" Did you mean {', '.join(head) + ' or ' if head else ''}{last}?"


def is_count(value: object, least: int = 1) -> bool:
    """Whether it is a whole number from `least` on."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def check_count(field: str, value: object, least: int = 1) -> None:
    """Raise ConfigError unless `value` is a whole number from `least` on."""
    check(is_count(value, least), field, value, f"must be a whole number, at least {least}")


def check(condition: bool, field: str, value: object, expected: str) -> None:
    """Raise ConfigError naming the field, its value and what would be right, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{field} = {value!r}: {expected}")

"""How many cores there are to use, and how many threads use them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Return those of this process's affinity, and of a container no more than its quota: a node may have many more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota())))


@contextmanager
def at_most_threads(n: int) -> Iterator[None]:
    """Let torch compute on at most `n` threads, and on no more than it was to use anyway."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(n, threads))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def one_thread() -> AbstractContextManager[None]:
    """Run torch on one thread: small batches are faster so, and the result does not depend on the machine's cores."""
    return at_most_threads(1)


def _quota() -> float:
    """Cores by the time that the container may use in a period; infinite without a limit."""
    with suppress(OSError, ValueError):  # cgroup v2
        used, period = (CGROUP / "cpu.max").read_text(encoding="utf-8").split()
        return math.inf if used == "max" else int(used) / int(period)
    with suppress(OSError, ValueError):
        files = (CGROUP / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
        used, period = (file.read_text(encoding="utf-8") for file in files)
        return math.inf if int(used) <= 0 else int(used) / int(period)
    return math.inf

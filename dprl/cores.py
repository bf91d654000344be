"""How many cores there are to use."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Return those of this process's affinity, and of a container no more than its quota: a node may have many more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota())))


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

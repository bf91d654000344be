"""What a pool may leave behind: processes, by psutil, and actors, by Ray's state API."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import psutil
import pytest
import ray

PATIENCE_S = 20.0


def worker_processes() -> list[psutil.Process]:
    """Those that this process has started, directly or not, and that run a pool's worker."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith("ray::Worker"):
                found.append(process)
    return found


def living_actors() -> list[str]:
    """What Ray knows of that is not dead."""
    from ray._private.worker import get_dashboard_url
    from ray.util.state import list_actors

    # of this Ray, since tests beside this one have theirs; without the filter it would list the first hundred
    actors = list_actors(f"http://{get_dashboard_url()}", filters=[("state", "!=", "DEAD")], limit=1000)
    return [f"{actor.class_name} {actor.state}" for actor in actors]


def assert_nothing_is_left() -> None:
    """Wait for a while until there are no actors and no workers' processes."""
    assert_becomes(lambda: [*living_actors(), *worker_processes()] == [])


def assert_becomes(condition: Callable[[], bool]) -> None:
    """Wait for a while until it is true: the state API lags behind."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert condition()


def start_ray(num_cpus: int) -> None:
    """Start Ray with what answers its state API."""
    pytest.importorskip("aiohttp_cors", reason="Ray's state API needs ray[default]")
    ray.init("local", num_cpus=num_cpus, include_dashboard=True, log_to_driver=False)

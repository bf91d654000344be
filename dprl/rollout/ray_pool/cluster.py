"""The connection to Ray: the one that runs already, a cluster's, or one of our own."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

import dprl
from dprl.errors import ConfigError, MissingDependencyError, check

try:
    import ray
except ImportError as error:
    raise MissingDependencyError("ray", "ray", "a Ray rollout pool") from error

ANSWER_TIMEOUT_S = 5.0
PACKAGES = ("agents", "envs", "experiments")


class RayConnection:
    """Ray, for as long as someone in this process needs it. What was started here ends with the last of them."""

    _users: ClassVar[WeakSet[RayConnection]] = WeakSet()
    _started: ClassVar[str | None] = None
    """Where the Ray is that was started here, or joined."""

    def __init__(self, address: str | None = None, runtime_env: dict[str, Any] | None = None) -> None:
        """Take the Ray that runs in this process; else join the cluster at `address`; else start one on this machine.

        A cluster that ``RAY_ADDRESS`` names, as in Ray's jobs, is joined as it is: this code must be on its nodes.

        Raises:
            ConfigError: another Ray runs in this process already, or none is at `address`.
        """
        if ray.is_initialized():
            for name, value in (("address", address), ("runtime_env", runtime_env)):
                check(value is None, name, value, "Ray is initialised in this process already; leave it out")
        else:
            prepare_environment()
            with _code_for(address, runtime_env) as environment:
                _start(address, environment)
            RayConnection._started = _whereabouts()
        self._users.add(self)

    def close(self) -> None:
        """Let go of it."""
        self._users.discard(self)
        if self._started is not None and not self._users:
            if ray.is_initialized() and self._started == _whereabouts():  # and not one that the user started since
                ray.shutdown()
            RayConnection._started = None


def _whereabouts() -> str:
    """Which Ray this process is in, and as which of its jobs."""
    context = ray.get_runtime_context()
    return f"{context.gcs_address} {context.get_job_id()}"


def prepare_environment() -> None:
    """Set what a Ray that is started here should know, unless the user has set it."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # Ray's default is 15: beside any busy process its workers then hardly run, and the learner waits for them
    os.environ.setdefault("RAY_worker_niceness", "0")


def _start(address: str | None, runtime_env: dict[str, Any] | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        elsewhere = "RAY_ADDRESS" in os.environ
        here: dict[str, Any] = {} if elsewhere else {"address": "local", "include_dashboard": False}
        try:
            ray.init(runtime_env=runtime_env, **here, **quiet)
        except Exception as error:  # Ray raises plain ones, where its processes took too long
            raise ConfigError(f"Ray did not start: {error}; without it, set workers and eval_workers to 0") from error
        return
    try:
        host, _, port = address.partition(":")
        if port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), ANSWER_TIMEOUT_S).close()
        ray.init(address, runtime_env=runtime_env, **quiet)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RuntimeEnvSetupError) as error:
        raise ConfigError(f"address = {address!r}: this cluster cannot be joined: {error}") from error


@contextmanager
def _code_for(address: str | None, runtime_env: dict[str, Any] | None) -> Iterator[dict[str, Any] | None]:
    """Add this code to what a cluster's nodes are given; a Ray on this machine finds it where it is."""
    if address is None or runtime_env is not None:
        yield runtime_env
        return
    package = Path(dprl.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "dprl")
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(package, copy, ignore=skipped)
        for name in PACKAGES:  # a checkout keeps them beside the package, a wheel inside
            if (beside := package.parent / name).is_dir() and not (copy / name).exists():
                shutil.copytree(beside, copy / name, ignore=skipped)
        yield {"py_modules": [str(copy)]}

"""Offscreen rendering: whether it works on this machine, and what to install where it does not."""

from __future__ import annotations

import os
import subprocess
import sys

PROBE = "import mujoco; context = mujoco.GLContext(16, 16); context.make_current(); context.free()"
REMEDY = "on Debian or Ubuntu: apt-get install libegl1 libgl1 (or libosmesa6)"


def find_backend() -> str | None:
    """Return the first of ``$MUJOCO_GL``, egl and osmesa that renders offscreen, and set ``MUJOCO_GL`` to it.

    Each is tried in a process of its own, since a GL library that fails can take its process along. None: none works.
    """
    asked = os.environ.get("MUJOCO_GL")
    for backend in [asked] if asked else ["egl", "osmesa"]:
        environment = {**os.environ, "MUJOCO_GL": backend}
        if subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, check=False).returncode:
            continue
        os.environ["MUJOCO_GL"] = backend
        return backend
    return None

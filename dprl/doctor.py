"""What is installed, what this machine offers, and what to install for what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass

from dprl.cores import available_cores
from dprl.envs import rendering


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    ok: bool
    found: str
    remedy: str = ""


# (distribution, extra that installs it; None: part of the core)
PACKAGES: tuple[tuple[str, str | None], ...] = (
    ("torch", None),
    ("numpy", None),
    ("safetensors", None),
    ("tyro", None),
    ("rich", None),
    ("filelock", None),
    ("gymnasium", "envs"),
    ("mujoco", "envs"),
    ("envpool", "envs"),
    ("metaworld", "envs"),
    ("h5py", "envs"),
    ("matplotlib", "plots"),
    ("pillow", "plots"),
    ("gym-pusht", "pusht"),
    ("tensorboard", "tensorboard"),
    ("ray", "ray"),
    ("wandb", "wandb"),
    ("minari", "dev"),
    ("stable-baselines3", "sb3"),
)


def examine() -> list[Finding]:
    """Return one finding per package and per ability of this machine."""
    findings = [Finding("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    findings += [_package(name, extra) for name, extra in PACKAGES]
    return [*findings, _processors(), _accelerator(), _ray(), _rendering(), _wandb()]


def _package(name: str, extra: str | None) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        if name == "envpool" and sys.platform != "linux":
            return Finding(name, True, "not installed: Linux only; the same tasks run on slower environments")
        remedy = f"pip install {name}" if extra is None else f"in the checkout: pip install '.[{extra}]'"
        return Finding(name, False, "not installed", remedy)


def _processors() -> Finding:
    import torch

    return Finding("processors", True, f"{available_cores()} cores, torch uses {torch.get_num_threads()} threads")


def _accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("accelerator", True, f"CUDA: {', '.join(names)}")
    if torch.backends.mps.is_available():
        return Finding("accelerator", True, "Apple MPS")
    return Finding("accelerator", True, "none; the CPU is used")


def _ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    if address:
        return Finding("ray cluster", True, f"RAY_ADDRESS={address}")
    return Finding("ray cluster", True, "none named; a pool with workers starts Ray on this machine")


def _rendering() -> Finding:
    backend = rendering.find_backend()
    if backend is not None:
        return Finding("offscreen rendering", True, f"works with MUJOCO_GL={backend}")
    return Finding("offscreen rendering", False, "no GL library could be loaded", rendering.REMEDY)


def _wandb() -> Finding:
    if os.environ.get("WANDB_API_KEY"):
        return Finding("W&B login", True, "WANDB_API_KEY is set")
    return Finding("W&B login", True, "none in the environment; --wandb logs offline unless 'wandb login' was run")

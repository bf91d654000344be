"""Benchmarks: ratios measured in one run, since absolute speeds of shared machines mean little."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import tyro

from dprl.errors import DprlError, check

Config = TypeVar("Config")


def check_reference(path: Path | None) -> None:
    """Raise ConfigError unless `path` is None or a checkout of the DPPO authors' code."""
    code = path is None or (path / "model/diffusion/diffusion_ppo.py").is_file()
    check(code, "reference", str(path), "must be a checkout of DPPO, with model/diffusion/diffusion_ppo.py")


def seconds(action: Callable[[], object], device: torch.device | str) -> float:
    """Return how long `action` takes, with all that it leaves a GPU to do."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    action()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def command(main: Callable[[Config], object], config_class: type[Config]) -> None:
    """Run `main` with the config of the command line. A user's error is one line, and exit code 2."""
    try:
        main(tyro.cli(config_class))
    except DprlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

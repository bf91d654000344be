"""Benchmarks: ratios measured in one run, since absolute speeds of shared machines mean little."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from dprl.errors import DprlError

Config = TypeVar("Config")


def command(main: Callable[[Config], object], config_class: type[Config]) -> None:
    """Run `main` with the config of the command line. A user's error is one line, and exit code 2."""
    try:
        main(tyro.cli(config_class))
    except DprlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

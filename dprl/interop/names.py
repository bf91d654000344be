"""Renaming the parameters of other projects' networks to ours and back, complete or not at all.

A table maps their names to ours. It is made from the names of the state to translate, whichever side they are from, so
that it fits any number of blocks, levels and layers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from dprl.errors import CheckpointError

State = dict[str, Tensor]
Table = dict[str, str]


def with_parts(layers: Mapping[str, str]) -> Table:
    """Turn a table of layers into one of their weights and biases."""
    return {f"{a}.{part}": f"{b}.{part}" for a, b in layers.items() for part in ("weight", "bias")}


def count(pattern: str, names: Collection[str]) -> int:
    """Return how many different values the group of `pattern`, a regular expression, takes at the start of `names`."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def strip(state: Mapping[str, Tensor], prefix: str, what: str) -> State:
    """Return what in `state` begins with `prefix`, without it.

    Raises:
        CheckpointError: there is nothing.
    """
    stripped = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if not stripped:
        raise CheckpointError(f"{what}: no parameter begins with '{prefix}'" if prefix else f"{what}: no parameters")
    return stripped


def rename(state: Mapping[str, Tensor], table: Table, what: str, prefix: str = "") -> State:
    """Return `state` under the names that `table` has for its names; the tensors are the same objects.

    Args:
        state: parameters (or their gradients), by name.
        table: every name that `state` must have -> its new name.
        what: how to call the network in errors.
        prefix: how to begin the names in errors.

    Raises:
        CheckpointError: naming the parameters that are missing, and those that the table does not know.
    """
    faults = {"lacks": table.keys() - state.keys(), "has, unknown to it,": state.keys() - table.keys()}
    found = [f"{verb} {_listing(prefix, names)}" for verb, names in faults.items() if names]
    if found:
        raise CheckpointError(f"{what}: the state {' and '.join(found)}")
    return {new: state[old] for old, new in table.items()}


def inverse(table: Table) -> Table:
    """Swap the sides of a table."""
    return {ours: theirs for theirs, ours in table.items()}


def _listing(prefix: str, names: Collection[str], most: int = 5) -> str:
    shown = ", ".join(f"'{prefix}{name}'" for name in sorted(names)[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown

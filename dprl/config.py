"""Frozen dataclasses to JSON and back, strictly: an unknown key or a wrong type is an error with a hint."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import Any, TypeVar, cast

from dprl.errors import ConfigError, check, did_you_mean

T = TypeVar("T")
LARGEST_FLOAT = (2 - 2**-23) * 2.0**127
"""Of float32, in which torch computes."""
LARGEST_INT = 2**63 - 1
Json = dict[str, Any]


def to_json(config: Any) -> Json:
    """Return a dataclass instance as nested plain dictionaries and lists, ready for `json.dump`."""
    return dataclasses.asdict(config)


def from_json(cls: type[T], data: Any, where: str) -> T:
    """Build the dataclass `cls` from parsed JSON.

    Args:
        cls: a (frozen) dataclass; its own ``__post_init__`` checks ranges.
        data: what `json.load` returned.
        where: how to name the place in errors, e.g. a file name.

    Raises:
        ConfigError: unknown or missing key, wrong type, or a value the dataclass refuses.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected an object with the keys of {cls.__name__}, found {data!r}")
    fields = {f.name: f for f in dataclasses.fields(cast("Any", cls))}
    for key in data:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key '{key}' for {cls.__name__}.{did_you_mean(key, fields)}")
    hints = _hints(cast("Any", cls))
    values = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in data.items()}
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: {cls.__name__} lacks the key '{missing[0]}'")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def validate(
    config: Any, *, at_least: Mapping[str, float] | None = None, above: Mapping[str, float] | None = None
) -> None:
    """Check a config from its ``__post_init__``: every field's type, that torch can hold its numbers, and lower bounds.

    Args:
        config: a dataclass instance.
        at_least: field -> smallest value allowed. None values are left alone.
        above: field -> value it must exceed.

    Raises:
        ConfigError: naming field, value and what would be right.
    """
    for name, hint in _hints(cast("Any", type(config))).items():
        value = getattr(config, name)
        _convert(hint, value, name)
        if isinstance(value, float):
            fits = math.isfinite(value) and abs(value) <= LARGEST_FLOAT
            check(fits, name, value, f"must be a finite number of at most {LARGEST_FLOAT:.1e}")
        elif isinstance(value, int):
            check(abs(value) <= LARGEST_INT, name, value, f"must be at most {LARGEST_INT:.1e}")
    for name, bound in (at_least or {}).items():
        value = getattr(config, name)
        check(value is None or value >= bound, name, value, f"must be at least {bound}")
    for name, bound in (above or {}).items():
        check(getattr(config, name) > bound, name, getattr(config, name), f"must be above {bound}")


@lru_cache
def _hints(cls: Hashable) -> dict[str, Any]:
    """Types of a dataclass's fields. Cached: configs are also made while a policy acts."""
    return typing.get_type_hints(cls)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check `value` against the type `hint`, turning lists into tuples and objects into dataclasses."""
    if dataclasses.is_dataclass(hint):
        cls = cast("type[Any]", hint)
        return value if isinstance(value, cls) else from_json(cls, value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(f"{where} = {value!r}: must be one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} = {value!r}: must be a list")
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} = {value!r}: must be of type {hint.__name__}")
    return value


def _misfit(cls: Any, value: Mapping[str, Any]) -> tuple[int, int]:
    """How many keys of `value` the dataclass `cls` does not know, and how many of its own are missing."""
    if not dataclasses.is_dataclass(cls):
        return len(value) + 1, 0
    known = {f.name for f in dataclasses.fields(cls)}
    return len(value.keys() - known), len(known - value.keys())


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    """Take the first member of the union that fits, of several dataclasses the one whose keys fit best."""
    if value is None and type(None) in args:
        return None
    if isinstance(value, Mapping):
        args = tuple(sorted(args, key=lambda arg: _misfit(arg, value)))[:1]
    errors: list[str] = []
    for arg in args:
        if arg is type(None):
            continue
        try:
            return _convert(arg, value, where)
        except ConfigError as error:
            errors.append(str(error))
    raise ConfigError(errors[0])

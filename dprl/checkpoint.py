"""Folders of tensors and JSON, published atomically, verified on loading, never unpickled.

A folder is written under a temporary name, flushed to disk, and renamed: a reader sees all of it or nothing. Its
``manifest.json`` holds the SHA-256 of every other file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dprl.errors import CheckpointError, RunExistsError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

StateTree = Mapping[str, Any]
"""Nested mappings with string keys whose leaves are tensors or JSON scalars."""


def publish(path: Path, write: Callable[[Path], None], *, overwrite: bool = False) -> None:
    """Let `write(folder)` fill a temporary folder, then rename it to `path` in one step.

    Args:
        path: the folder to create. Its parents are created too; if `write` fails, they are not there either.
        write: writes files into the folder it is given.
        overwrite: whether an existing folder may be replaced; the old one is kept until the new one is complete.

    Raises:
        RunExistsError: `path` exists and `overwrite` is not set, or it is no folder, or the working directory.
    """
    if path.absolute() == Path.cwd():
        raise RunExistsError(f"'{path}' is the folder that you are in; name a new one in it")
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        raise RunExistsError(f"'{path}' already exists and is no folder; choose another name or remove it first")
    occupied = path.exists() and any(path.iterdir())
    if occupied and not overwrite:
        raise RunExistsError(f"'{path}' already exists; choose another folder or remove it first")
    new_parents = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    replaced = temporary.with_suffix(".old")
    try:
        temporary.mkdir()
        write(temporary)
        write_manifest(temporary)
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
        _fsync(path.parent)
    finally:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
        for parent in () if path.exists() else new_parents:
            with contextlib.suppress(OSError):  # something else was put there meanwhile
                parent.rmdir()


def write_manifest(folder: Path) -> None:
    """Flush every file of `folder` to disk and record its SHA-256."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    digests = {file.relative_to(folder).as_posix(): _sha256(file) for file in files}
    write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, "sha256": digests})
    for file in [*files, folder / MANIFEST]:
        _fsync(file)
    _fsync(folder)


def verify(folder: Path) -> None:
    """Compare every file with the manifest; a folder without one (written by other tools) passes.

    Raises:
        CheckpointError: a file is missing or changed, or the format is newer than this version of dprl reads.
    """
    if not (folder / MANIFEST).is_file():
        return
    manifest = read_json(folder / MANIFEST)
    version, digests = (manifest.get(k) if isinstance(manifest, dict) else None for k in ("format_version", "sha256"))
    if not isinstance(version, int) or not isinstance(digests, dict):
        raise CheckpointError(f"'{folder / MANIFEST}' is damaged: it lacks format_version or sha256")
    if version > FORMAT_VERSION:
        raise CheckpointError(f"'{folder}' has format {version}; this dprl reads up to "
                              f"{FORMAT_VERSION}: upgrade dprl")  # fmt: skip
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"'{file}' is missing: the checkpoint is incomplete; use another one")
        if _sha256(file) != digest:
            raise CheckpointError(f"'{file}' is damaged: its SHA-256 differs from the manifest's; use another one")


def fingerprint(folder: Path) -> str:
    """Return what tells the weights in a folder apart from others: the SHA-256 of those of its .safetensors files."""
    digests = [f"{file.name} {_sha256(file)}" for file in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def replace_link(link: Path, target: str) -> None:
    """Point the symbolic link `link` at `target` (relative) in one step."""
    temporary = link.parent / f".{link.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.symlink_to(target)
        temporary.replace(link)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync(link.parent)


def write_json(file: Path, data: Any) -> None:
    """Write `data` so that a reader sees the old file or the new one, never a half."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: it is missing or not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"'{file}' is missing") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"'{file}' is not valid JSON: {error}") from error


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, each with storage of its own."""
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, file)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return load_file(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"'{file}' is missing") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"'{file}' cannot be read: {error}") from error


def save_state(folder: Path, name: str, state: StateTree) -> None:
    """Write a state tree as ``name.safetensors`` (tensors) and ``name.json`` (all else)."""
    leaves = dict(_flatten(state))
    save_tensors(folder / f"{name}.safetensors", {k: v for k, v in leaves.items() if isinstance(v, Tensor)})
    write_json(folder / f"{name}.json", {k: v for k, v in leaves.items() if not isinstance(v, Tensor)})


def load_state(folder: Path, name: str) -> dict[str, Any]:
    """Read a state tree that `save_state` wrote."""
    leaves = {**load_tensors(folder / f"{name}.safetensors"), **read_json(folder / f"{name}.json")}
    tree: dict[str, Any] = {}
    for key, value in leaves.items():
        *parents, last = key.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's moments as a state tree (its settings come from the config)."""
    moments = optimizer.state_dict()["state"]
    return {str(index): dict(values) for index, values in moments.items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: StateTree) -> None:
    """Take up what `optimizer_state` returned."""
    current = optimizer.state_dict()
    current["state"] = {int(index): dict(values) for index, values in state.items()}
    optimizer.load_state_dict(current)


def _flatten(tree: StateTree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    # Some file systems cannot flush a folder; a file that cannot be flushed is an error.
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

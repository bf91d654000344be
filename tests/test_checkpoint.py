"""Folders on disk: published whole or not at all, verified when read, never unpickled."""

import ast
import contextlib
import errno
import itertools
import json
import os
import stat
from pathlib import Path

import pytest
import torch

from dprl import checkpoint
from dprl.errors import CheckpointError, RunExistsError

ROOT = Path(__file__).resolve().parent.parent
NO_SPACE = OSError(errno.ENOSPC, "no space left on device")


def writer(text):
    """Write two files, one of them in a subfolder."""

    def write(folder):
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text(text)
        checkpoint.save_tensors(folder / "b.safetensors", {"x": torch.arange(64.0)})

    return write


def content(folder):
    """What a folder that verifies holds; None where there is none."""
    if not folder.exists():
        return None
    checkpoint.verify(folder)
    assert checkpoint.load_tensors(folder / "b.safetensors")["x"].equal(torch.arange(64.0))
    return (folder / "sub" / "a.txt").read_text()


def fail_call(patch, function, nth, error):
    """Let the nth call of ``os.<function>`` raise; return the list that then holds the error."""
    original, calls, raised = getattr(os, function), itertools.count(1), []

    def faulty(*args, **kwargs):
        if next(calls) == nth:
            raised.append(error)
            raise error
        return original(*args, **kwargs)

    patch.setattr(os, function, faulty)
    return raised


@pytest.fixture(params=["new", "overwriting"])
def old(request, tmp_path):
    """What stands at ``tmp_path / 'run'`` before: nothing, or an old folder."""
    if request.param == "new":
        return None
    checkpoint.publish(tmp_path / "run", writer("old"))
    return "old"


def require_untouched(tmp_path, old):
    assert content(tmp_path / "run") == old
    assert [path.name for path in tmp_path.iterdir()] == (["run"] if old else [])


def test_publish_writes_or_replaces_the_whole_folder(tmp_path, old):
    checkpoint.publish(tmp_path / "run", writer("new"), overwrite=True)
    assert content(tmp_path / "run") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_publish_refuses_an_existing_folder(tmp_path):
    checkpoint.publish(tmp_path / "run", writer("old"))
    with pytest.raises(RunExistsError, match="run"):
        checkpoint.publish(tmp_path / "run", writer("new"))
    require_untouched(tmp_path, "old")


@pytest.mark.parametrize("error", [NO_SPACE, KeyboardInterrupt()], ids=["OSError", "KeyboardInterrupt"])
def test_a_failing_writer_leaves_nothing(tmp_path, old, error):
    def write(folder):
        writer("new")(folder)
        raise error

    with pytest.raises(type(error)):
        checkpoint.publish(tmp_path / "run", write, overwrite=True)
    require_untouched(tmp_path, old)


def test_a_failing_manifest_leaves_nothing(tmp_path, old, monkeypatch):
    def fail(*_):
        raise NO_SPACE

    monkeypatch.setattr(checkpoint, "write_json", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoint.publish(tmp_path / "run", writer("new"), overwrite=True)
    require_untouched(tmp_path, old)


@pytest.mark.parametrize("error", [NO_SPACE, KeyboardInterrupt()], ids=["OSError", "KeyboardInterrupt"])
@pytest.mark.parametrize("function", ["rename", "replace"])
def test_a_failing_rename_leaves_the_old_folder_or_nothing(tmp_path, old, function, error):
    for nth in itertools.count(1):
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(type(error)):
            raised = fail_call(patch, function, nth, error)
            checkpoint.publish(tmp_path / "run", writer("new"), overwrite=True)
        if not raised:
            break
        require_untouched(tmp_path, old)
    assert nth > 1


def test_an_interrupted_flush_leaves_a_whole_folder_and_no_others(tmp_path, old):
    """After the rename the new folder is the whole one."""
    for nth in itertools.count(1):
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            raised = fail_call(patch, "fsync", nth, KeyboardInterrupt())
            checkpoint.publish(tmp_path / "run", writer("new"), overwrite=True)
        if not raised:
            break
        assert content(tmp_path / "run") in (old, "new")
        assert {path.name for path in tmp_path.iterdir()} <= {"run"}
    assert nth > 4


def test_a_file_that_cannot_be_flushed_is_not_published(tmp_path, old, monkeypatch):
    original = os.fsync

    def faulty(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "input/output error")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", faulty)
    with pytest.raises(OSError, match="input/output"):
        checkpoint.publish(tmp_path / "run", writer("new"), overwrite=True)
    require_untouched(tmp_path, old)


def test_a_file_system_that_cannot_flush_folders_will_do(tmp_path, monkeypatch):
    original = os.fsync

    def faulty(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "invalid argument")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", faulty)
    checkpoint.publish(tmp_path / "run", writer("new"))
    assert content(tmp_path / "run") == "new"


@pytest.fixture
def folder(tmp_path):
    checkpoint.publish(tmp_path / "run", writer("text"))
    return tmp_path / "run"


def flip(file, position):
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["sub/a.txt", "b.safetensors"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damage_is_found_and_named(folder, name, damage):
    file = folder / name
    if damage == "flipped":
        flip(file, -1)
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.verify(folder)
    assert str(file) in str(caught.value)


def test_a_newer_format_is_refused(folder):
    manifest = checkpoint.read_json(folder / "manifest.json")
    checkpoint.write_json(folder / "manifest.json", manifest | {"format_version": 99})
    with pytest.raises(CheckpointError, match=r"format 99.*upgrade") as caught:
        checkpoint.verify(folder)
    assert str(folder) in str(caught.value)


def test_a_damaged_manifest_is_no_crash(folder):
    """Whichever byte of it changes: a CheckpointError, or no harm done."""
    manifest = folder / "manifest.json"
    whole = manifest.read_bytes()
    crashes = {}
    for position in range(len(whole)):
        flip(manifest, position)
        try:
            checkpoint.verify(folder)
        except CheckpointError:
            pass
        except Exception as error:
            crashes[position] = repr(error)
        manifest.write_bytes(whole)
    assert crashes == {}


@pytest.mark.parametrize("data", [[], {"format_version": 1}, {"format_version": "1", "sha256": {}}, {"sha256": []}])
def test_a_manifest_of_another_shape_is_refused(folder, data):
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="manifest"):
        checkpoint.verify(folder)


def test_a_folder_without_manifest_passes(folder):
    (folder / "manifest.json").unlink()
    checkpoint.verify(folder)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and a.equal(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize(
    "state",
    [
        {"x": torch.arange(6).view(2, 3), "scalar": torch.tensor(2.5, dtype=torch.float64), "none": torch.zeros(0, 4)},
        {"a": {"b": {"c": torch.ones(2, dtype=torch.uint8), "d": 1}, "e": 0.5}, "f": None, "g": "text", "h": True},
        {"moments": {}, "step": 3},
        {"outer": {"inner": {}}},
        {},
    ],
    ids=["tensors", "nested", "empty", "nested-empty", "nothing"],
)
def test_state_round_trip(tmp_path, state):
    checkpoint.save_state(tmp_path, "state", state)
    assert equal(checkpoint.load_state(tmp_path, "state"), state)


def test_tensors_that_share_memory_come_back_apart(tmp_path):
    base = torch.arange(4.0)
    checkpoint.save_state(tmp_path, "state", {"all": base, "part": base[1:3]})
    assert equal(checkpoint.load_state(tmp_path, "state"), {"all": base, "part": base[1:3]})


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    "sgd-plain": lambda p: torch.optim.SGD(p, 1e-2),
}


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_restored_optimizer_continues_identically(tmp_path, make, steps_before):
    def advance(weight, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (weight**4).sum().backward()
            optimizer.step()

    weight = torch.linspace(-1, 1, 5).requires_grad_()
    optimizer = make([weight])
    advance(weight, optimizer, steps_before)
    checkpoint.save_state(tmp_path, "state", checkpoint.optimizer_state(optimizer))
    restored = weight.detach().clone().requires_grad_()
    other = make([restored])
    checkpoint.load_optimizer_state(other, checkpoint.load_state(tmp_path, "state"))
    advance(weight, optimizer, 3)
    advance(restored, other, 3)
    assert restored.equal(weight)


def test_replace_link(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        checkpoint.replace_link(tmp_path / "last", name)
        assert os.readlink(tmp_path / "last") == name
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "last"}


def test_a_failing_replace_link_keeps_the_old_target(tmp_path, monkeypatch):
    checkpoint.replace_link(tmp_path / "last", "a")
    fail_call(monkeypatch, "replace", 1, NO_SPACE)
    with pytest.raises(OSError, match="no space"):
        checkpoint.replace_link(tmp_path / "last", "b")
    assert os.readlink(tmp_path / "last") == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def unpickling(source):
    """Whatever in `source` reads or writes pickles."""
    names = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in names)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in names:
                yield node.module
            yield from (f"torch.{a.name}" for a in node.names if node.module == "torch" and a.name in ("load", "save"))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save", "torch.hub"):
            yield ast.unparse(node)
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            yield node.arg


def test_nothing_in_the_library_unpickles():
    files = [file for folder in ("dprl", "agents", "envs", "experiments") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 30
    found = {str(file): list(unpickling(file.read_text(encoding="utf-8"))) for file in files}
    assert {file: names for file, names in found.items() if names} == {}
    assert list(unpickling("import torch as t, torch\ntorch.load('x')\nfrom pickle import loads")) != []


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(RunExistsError, match="is no folder"):
        checkpoint.publish(tmp_path / "notes", lambda folder: None, overwrite=True)
    assert (tmp_path / "notes").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failing_writer_leaves_no_parents_either(tmp_path):
    (tmp_path / "there").mkdir()

    def write(folder):
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        checkpoint.publish(tmp_path / "there/new/newer/run", write)
    assert list((tmp_path / "there").iterdir()) == []


def test_a_link_to_nothing_and_the_folder_one_is_in_are_refused(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    monkeypatch.chdir(tmp_path)
    for path, words in ((Path("link"), "is no folder"), (Path(), "the folder that you are in")):
        with pytest.raises(RunExistsError, match=words):
            checkpoint.publish(path, lambda folder: None)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link"]

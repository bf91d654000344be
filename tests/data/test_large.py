"""Data sets larger than memory: they are read, converted and looked at a part at a time."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

h5py = pytest.importorskip("h5py")

EPISODE, D, A = 1_000, 17, 6
ROW = 4 * (D + A + 1) + 2
MB = 2**20

READ = """
import sys, numpy as np
from dprl.data import Chunks, convert, load_dataset, open_dataset, summarize
from dprl.policy import Policy
from dprl.data.loader import ChunkBatches
import torch
path, what = sys.argv[1:]
if what == "convert":
    with open_dataset(path) as source:
        convert(source, path + ".converted")
elif what == "inspect":
    with open_dataset(path) as source:
        print(len(summarize(source).lengths))
elif what == "load":
    data = load_dataset(path, memory_map=True)
    policy = Policy.kinds["mse"].for_dataset(data)
    assert policy.action_normalizer.high.tolist() == [1.0] * 6
    first, last = data.actions[:5], data.actions[-5:]
    assert not np.array_equal(first, last)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) // 1024)
"""


def write(file: Path, rows: int) -> None:
    rng = np.random.default_rng(0)
    block = EPISODE * 20
    with h5py.File(file, "w") as h5:
        for name, size in (
            ("observations", (D,)),
            ("actions", (A,)),
            ("rewards", ()),
            ("terminals", ()),
            ("timeouts", ()),
        ):
            kind = np.bool_ if name in ("terminals", "timeouts") else np.float32
            dataset = h5.create_dataset(name, (rows, *size), kind)
            for first in range(0, rows, block):
                n = min(block, rows - first)
                values = (
                    rng.uniform(-1, 1, (n, *size)).astype(kind) if kind == np.float32 else np.zeros((n, *size), kind)
                )
                if name == "actions":
                    values[0], values[1] = 1.0, -1.0
                if name == "timeouts":
                    values[EPISODE - 1 :: EPISODE] = True
                dataset[first : first + n] = values


def peak(file: Path, what: str) -> int:
    """Most memory that a process held, in MB, mapped files included."""
    result = subprocess.run(
        [sys.executable, "-c", READ, str(file), what], capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.timeout(3_000)
@pytest.mark.parametrize("size", [100 * MB, pytest.param(5_000 * MB, marks=pytest.mark.full)], ids=["0.1 GB", "5 GB"])
def test_a_file_is_read_with_less_memory_than_it_has(size: int, tmp_path: Path) -> None:
    file = tmp_path / "large.hdf5"
    write(file, size // ROW // EPISODE * EPISODE)
    before = peak(file, "nothing")
    for what in ("load", "inspect", "convert") if size > 1_000 * MB else ("load",):
        used = peak(file, what)
        print(f"{size / MB:,.0f} MB, {what}: {used} MB at most; {before} before anything was read")
        assert used < 1_000
        assert used - before < 80 + 0.1 * size / MB

"""Cores of an affinity, and of a container's quota."""

import os

import pytest
import torch

from dprl import cores


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 6),
        ({"cpu.max": "max 100000\n"}, 6),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, 6),
        ({"cpu.max": "nonsense\n"}, 6),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 6),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ],
)
def test_a_containers_quota_counts(files, expected, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert cores.available_cores() == expected


def test_threads_are_never_more_than_allowed_and_are_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for asked, used in ((2, 2), (3, 3), (8, 3)):
            with cores.at_most_threads(asked):
                assert torch.get_num_threads() == used
                with cores.one_thread():
                    assert torch.get_num_threads() == 1
                assert torch.get_num_threads() == used
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)

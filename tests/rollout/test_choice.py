"""What `RolloutPool.auto` chooses."""

from dataclasses import replace

import pytest
import torch

from dprl.errors import ConfigError
from dprl.rollout import InProcessPool, RolloutPool
from dprl.rollout.choice import Machine, choose
from dprl.spec import EnvSpec
from tests.toys import reach_spec

BATCHED, SERIAL = reach_spec(), replace(reach_spec(), serial=True)


@pytest.mark.parametrize(
    ("spec", "machine", "device", "slice_size", "workers", "why"),
    [
        (BATCHED, Machine(2), "cpu", None, 0, "2 cores are few"),
        (BATCHED, Machine(2), "cpu", 8, 0, "2 cores are few"),
        (BATCHED, Machine(16), "cpu", 8, 8, "8 of 16 cores"),
        (BATCHED, Machine(16), "cuda", 8, 0, "the policy is on cuda"),
        (BATCHED, Machine(16, has_ray=False), "cpu", 8, 0, "Ray is not installed"),
        (BATCHED, Machine(6, nodes=3), "cpu", 8, 4, "3 nodes with 6 CPUs"),
        (BATCHED, Machine(6, nodes=3), "cuda", 8, 4, "3 nodes"),
        (SERIAL, Machine(2), "cpu", None, 2, "one environment after the other"),
        (SERIAL, Machine(2), "cuda", None, 2, "one environment after the other"),
        (SERIAL, Machine(3), "cpu", None, 2, "3 cores"),
        (SERIAL, Machine(1), "cpu", None, 0, "nothing to divide: 1 cores, 64 environments in 2 slices"),
        (SERIAL, Machine(16), "cpu", 64, 0, "nothing to divide: 16 cores, 64 environments in 1 slices"),
        (SERIAL, Machine(2, has_ray=False), "cpu", None, 0, "Ray is not installed"),
        (SERIAL, Machine(0, nodes=2), "cpu", None, 0, "no CPU is free"),
    ],
)
def test_choice(spec: EnvSpec, machine: Machine, device: str, slice_size: int | None, workers: int, why: str) -> None:
    choice = choose(spec, 64, slice_size, machine, device, None)
    assert choice.num_workers == workers
    assert why in choice.why
    assert choose(spec, 64, slice_size, machine, device, 1).num_workers == 1, "can be overridden"
    assert choose(spec, 64, slice_size, machine, device, 0).num_workers == 0


def test_auto_builds_what_it_chose_and_says_so():
    with RolloutPool.auto(reach_spec(), 4, num_workers=0) as pool:
        assert isinstance(pool, InProcessPool)
        assert str(pool.choice) == "in this process: as asked for"
    with RolloutPool.auto(reach_spec(), 4, slice_size=4) as pool:
        assert isinstance(pool, InProcessPool)
        assert "toy/reach" in str(pool.choice) or "nothing to divide" in str(pool.choice)


def test_auto_takes_a_name():
    pytest.importorskip("envpool")
    with RolloutPool.auto("Hopper-v5", 2, num_workers=0) as pool:
        assert pool.spec.id == "Hopper-v5"


def test_room_is_left_for_others_workers():
    serial = replace(reach_spec(), serial=True)
    assert choose(serial, 4, 1, Machine(2), "cpu", None).num_workers == 2
    with RolloutPool.auto(serial, 4, slice_size=1, other_workers=1000) as pool:
        assert str(pool.choice) == "in this process: no CPU is free for Ray workers"


@pytest.mark.parametrize("other_workers", [-1, None, 1.5])
def test_no_number_of_other_workers_is_refused(other_workers):
    with pytest.raises(ConfigError, match=r"other_workers = .*: must be a whole number, at least 0"):
        RolloutPool.auto(reach_spec(), 4, other_workers=other_workers)


@pytest.mark.parametrize("device", ["gpu", None, 3.5])
def test_no_device_is_refused(device):
    with pytest.raises(ConfigError, match=r"device = .*: must be one of torch's"):
        RolloutPool.auto(reach_spec(), 4, device=device)


@pytest.mark.parametrize("device", ["cpu:0", torch.device("cpu")])
def test_every_name_of_the_cpu_is_one(device, monkeypatch):
    monkeypatch.setattr(Machine, "here", staticmethod(lambda: Machine(2)))
    with RolloutPool.auto(reach_spec(), 4, slice_size=1, device=device) as pool:
        assert "2 cores are few" in str(pool.choice)


@pytest.mark.parametrize("num_workers", [-1, True, "2", 1.0])
def test_no_number_of_workers_is_refused(num_workers):
    with pytest.raises(ConfigError, match=r"num_workers = .*: must be a whole number, at least 0"):
        RolloutPool.auto(reach_spec(), 4, num_workers=num_workers)


def test_a_slice_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="slice_size = 3"):
        RolloutPool.auto(reach_spec(), 4, slice_size=3)

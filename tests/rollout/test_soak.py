"""A pool under a rain of faults: every rollout is the undisturbed one, and nothing grows."""

import gc
import time

import numpy as np
import pytest

from dprl.experiments.benchmarks.rollout import memory_mb
from dprl.mdp import DenoisingMDP, ExplorationConfig
from dprl.rollout import InProcessPool
from dprl.seeding import numpy_generator
from dprl.spec import EnvState
from tests.rollout.faulty import FAULTS, Fault, faulty_spec, plant
from tests.toys import toy_policy

ray = pytest.importorskip("ray")
from dprl.rollout.ray_pool import RayPool, WorkerOptions  # noqa: E402
from tests.rollout.leaks import assert_nothing_is_left, start_ray  # noqa: E402
from tests.rollout.test_faults import N_ENVS, SEED, SEEDS, SLICE, assert_same, planted  # noqa: E402

WORKERS, DECISIONS = 2, 4
OPTIONS = WorkerOptions(timeout_s=8.0)


def due_now(state: EnvState, rng: np.random.Generator) -> Fault:
    """A fault of any kind in the next step of one of the environments."""
    index = int(rng.integers(N_ENVS))
    kind = FAULTS[rng.integers(len(FAULTS))]
    return Fault(kind, SEEDS[index], int(state.episodes[index]), int(state.lengths[index]))


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("seconds", "rate"), [(6, 0.2), (600, 0.01)], ids=["short", "10 minutes"])
def test_soak(seconds, rate, tmp_path, capsys):
    """Faults of all kinds in `rate` of the calls on workers."""
    start_ray(num_cpus=4)
    actor, rng = DenoisingMDP(toy_policy(), 2, ExplorationConfig()), numpy_generator(0, "soak")
    none, some = tmp_path / "none", tmp_path / "some"
    none.mkdir()
    some.mkdir()
    memory: list[float] = []
    calls = faults = 0
    start = time.monotonic()
    try:
        with (
            InProcessPool(faulty_spec(none), N_ENVS, seed=SEED, slice_size=SLICE) as calm,
            RayPool(
                faulty_spec(some), N_ENVS, num_workers=WORKERS, seed=SEED, slice_size=SLICE, workers=OPTIONS
            ) as pool,
        ):
            assert_same([pool.collect(actor, DECISIONS)], [calm.collect(actor, DECISIONS)])
            while (passed := time.monotonic() - start) < seconds or faults == 0:
                for _ in range(WORKERS):
                    if rng.random() < rate and planted(some) == 0:
                        plant(some, due_now(pool.state(), rng))
                        faults += 1
                assert_same([pool.collect(actor, DECISIONS)], [calm.collect(actor, DECISIONS)])
                assert planted(some) == 0
                calls += WORKERS
                if passed > 0.3 * seconds and (not memory or passed > (0.3 + 0.07 * len(memory)) * seconds):
                    gc.collect()
                    memory.append(memory_mb())
            assert pool.failures == faults > 0
            assert len(pool._crew.hosts) == WORKERS
        assert_nothing_is_left()
    finally:
        ray.shutdown()
    if seconds < 60:
        return  # too short to see memory grow
    assert len(memory) >= 4
    first, last = np.mean(memory[:2]), np.mean(memory[-2:])
    with capsys.disabled():
        print(f"\nsoak: {calls} calls, {faults} faults in {passed:.0f} s; memory {first:.0f} to {last:.0f} MB")
    assert last < 1.05 * first

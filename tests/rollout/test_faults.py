"""Workers that die, hang or whose environments fail: the rollout is the undisturbed one, or the loss is counted."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakSet

import numpy as np
import psutil
import pytest

from dprl.errors import ClosedPoolError, ConfigError, EnvActionError, EnvError, EnvFaultError, WorkerError
from dprl.mdp import DenoisingMDP, ExplorationConfig
from dprl.rollout import InProcessPool, Rollout, as_pool, evaluate
from dprl.seeding import numpy_generator
from dprl.spec import EnvOptions, EnvSpec, EnvState, build, env_seeds, resolve
from tests.rollout.faulty import FAULTS, Fault, faulty_spec, plant
from tests.toys import ARRAYS, toy_policy

N_ENVS, SLICE, SEED, DECISIONS = 8, 2, 5, 12
SEEDS = env_seeds(SEED, N_ENVS)

ray = pytest.importorskip("ray")
from dprl.rollout.ray_pool import RayPool, WorkerOptions  # noqa: E402
from dprl.rollout.ray_pool.cluster import RayConnection  # noqa: E402
from tests.rollout.leaks import assert_becomes, assert_nothing_is_left, living_actors, start_ray  # noqa: E402


@pytest.fixture(scope="module")
def actor() -> DenoisingMDP:
    return DenoisingMDP(toy_policy(), 2, ExplorationConfig())


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    start_ray(num_cpus=8)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def undisturbed(actor, tmp_path_factory) -> list[Rollout]:
    with InProcessPool(faulty_spec(tmp_path_factory.mktemp("none")), N_ENVS, seed=SEED, slice_size=SLICE) as pool:
        return [pool.collect(actor, DECISIONS) for _ in range(2)]


def on_ray(spec: EnvSpec, num_workers: int = 2, timeout_s: float = 30.0, max_failures: int = 3) -> RayPool:
    options = WorkerOptions(timeout_s=timeout_s, max_failures=max_failures)
    return RayPool(spec, N_ENVS, num_workers=num_workers, seed=SEED, slice_size=SLICE, workers=options)


def in_process(spec: EnvSpec, max_failures: int = 3) -> InProcessPool:
    return InProcessPool(spec, N_ENVS, seed=SEED, slice_size=SLICE, max_failures=max_failures)


def random_fault(kind: str, rollouts: list[Rollout], number: int, times: int = 1) -> Fault:
    """A fault at a step that is surely reached: one of an episode that came to its end."""
    rng = numpy_generator(number, "fault")
    lengths: dict[tuple[int, int], int] = {}
    episode = np.zeros(N_ENVS, int)
    for rollout in rollouts:
        for t, index in np.ndindex(rollout.ended.shape):
            if rollout.ended[t, index]:
                lengths[index, episode[index]] = int(rollout.episode_lengths[t, index])
                episode[index] += 1
    index, which = sorted(lengths)[rng.integers(len(lengths))]
    return Fault(kind, SEEDS[index], int(which), int(rng.integers(lengths[index, which])), times)


def assert_same(rollouts: list[Rollout], expected: list[Rollout]) -> None:
    for rollout, undisturbed in zip(rollouts, expected, strict=True):
        for field in ARRAYS:
            np.testing.assert_array_equal(getattr(rollout, field.name), getattr(undisturbed, field.name), field.name)


def planted(folder: Path) -> int:
    return len(list(folder.iterdir()))


# what both pools do in the same way is tried on Ray, whose workers take seconds to start, in the long suite
ALIKE = [pytest.param(on_ray, marks=pytest.mark.full), in_process]
REPEATS = [pytest.param(i, marks=pytest.mark.full) if i else i for i in range(20)]
# what a worker reports takes one way, whichever it is; in one process each is tried
KINDS = [pytest.param(kind, marks=pytest.mark.full) if kind != "kill" else kind for kind in FAULTS]


@pytest.mark.parametrize("repeat", REPEATS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_that_fails_changes_nothing(kind, repeat, cluster, actor, undisturbed, tmp_path):
    plant(tmp_path, random_fault(kind, undisturbed, repeat))
    start = time.monotonic()
    with on_ray(faulty_spec(tmp_path), num_workers=2 - repeat % 2, timeout_s=2.0 if kind == "hang" else 30.0) as pool:
        assert_same([pool.collect(actor, DECISIONS) for _ in range(2)], undisturbed)
        assert pool.failures == 1
    assert planted(tmp_path) == 0, "the fault should have happened"
    assert time.monotonic() - start < 30
    assert_nothing_is_left()


@pytest.mark.parametrize("repeat", REPEATS)
@pytest.mark.parametrize("kind", ["raise", "nan", "shape"])
def test_an_environment_that_fails_in_this_process_changes_nothing(kind, repeat, actor, undisturbed, tmp_path):
    plant(tmp_path, random_fault(kind, undisturbed, repeat))
    with in_process(faulty_spec(tmp_path)) as pool:
        assert_same([pool.collect(actor, DECISIONS) for _ in range(2)], undisturbed)
    assert planted(tmp_path) == 0


@pytest.mark.parametrize("make", [on_ray, in_process])
def test_too_many_failures_stop_with_all_that_is_known(make, cluster, actor, undisturbed, tmp_path):
    """And the pool is where it was before the collection, so that a run can be saved, and go on."""
    fault = Fault("nan", SEEDS[6], 1, 2, times=3)
    with make(faulty_spec(tmp_path), max_failures=2) as pool:
        assert_same([pool.collect(actor, 1)], [first_decisions(undisturbed[0], 1)])
        before = pool.state()
        plant(tmp_path, fault)
        where = rf"observation is not finite in environment 6, episode 1, step 2 \(environment seed {SEEDS[6]}\)"
        with pytest.raises((EnvFaultError, WorkerError), match=where):
            pool.collect(actor, 2 * DECISIONS - 1)
        assert planted(tmp_path) == 0
        for field in fields(before):
            np.testing.assert_array_equal(getattr(pool.state(), field.name), getattr(before, field.name))
        rest = pool.collect(actor, 2 * DECISIONS - 1)
        np.testing.assert_array_equal(rest.rewards[-1], undisturbed[1].rewards[-1])
        np.testing.assert_array_equal(rest.observations[-1], undisturbed[1].observations[-1])


def first_decisions(rollout: Rollout, n: int) -> Rollout:
    whole = {field.name: getattr(rollout, field.name) for field in ARRAYS}
    return Rollout(**{name: array if name == "environments" else array[:n] for name, array in whole.items()})


def test_environments_that_were_given_stop_at_the_first_fault_and_keep_their_state(actor, tmp_path):
    """The pool cannot build again what it did not build."""
    pool = as_pool(build(faulty_spec(tmp_path), SEEDS), SEED)
    pool.collect(actor, 1)
    before = pool.state()
    plant(tmp_path, Fault("raise", SEEDS[2], 1, 0))
    with pytest.raises(EnvFaultError, match="the simulator raised: RuntimeError: the motor is on fire"):
        pool.collect(actor, DECISIONS)
    np.testing.assert_array_equal(pool.state().actions, before.actions)
    with pytest.raises(EnvError, match="make a new one"):
        pool.collect(actor, 1)


@pytest.mark.full
def test_what_cannot_be_replayed_is_left_out_and_counted(cluster, actor, undisturbed, tmp_path):
    plant(tmp_path, Fault("raise", SEEDS[5], 1, 0))
    with on_ray(faulty_spec(tmp_path, replayable=False), num_workers=4) as pool:
        rollout, after = pool.collect(actor, DECISIONS), pool.collect(actor, DECISIONS)
    np.testing.assert_array_equal(rollout.environments, [0, 1, 2, 3, 6, 7])
    np.testing.assert_array_equal(rollout.rewards, undisturbed[0].rewards[:, rollout.environments])
    np.testing.assert_array_equal(after.environments, np.arange(N_ENVS))
    np.testing.assert_array_equal(after.rewards[:, :4], undisturbed[1].rewards[:, :4])


@pytest.mark.full
def test_losing_every_worker_is_an_error_where_nothing_can_be_replayed(cluster, actor, tmp_path):
    plant(tmp_path, Fault("raise", SEEDS[5], 1, 0))
    pool = on_ray(faulty_spec(tmp_path, replayable=False), num_workers=1)
    with pool, pytest.raises(WorkerError, match="every worker was lost"):
        pool.collect(actor, DECISIONS)


def processes(pool: RayPool) -> list[psutil.Process]:
    """The workers' processes."""
    pids = ray.get([worker.apply.remote(os.getpid) for worker in pool._crew._workers if worker is not None])
    return [psutil.Process(pid) for pid in pids]


def answers(pool: RayPool) -> bool:
    """Whether all its workers' processes run; they are restarted some time after they have died."""
    time.sleep(0.5)
    try:
        return len(processes(pool)) > 0
    except ray.exceptions.RayActorError:
        return False


@pytest.mark.full
def test_a_worker_killed_between_collections_changes_nothing(cluster, actor, undisturbed, tmp_path):
    with on_ray(faulty_spec(tmp_path)) as pool:
        first = pool.collect(actor, DECISIONS)
        processes(pool)[1].kill()
        assert_same([first, pool.collect(actor, DECISIONS)], undisturbed)


@pytest.mark.full
def test_the_environments_processes_end_with_their_worker(cluster, tmp_path):
    """Though it was killed, and could not end them."""
    spec = resolve("Pendulum-v1", EnvOptions(vectorization="async", max_episode_steps=5))
    with RayPool(spec, 4, num_workers=1, slice_size=2) as pool:
        pool.reset()
        (worker,) = processes(pool)
        children = worker.children()
        assert len(children) >= 4
        worker.kill()
        assert pool.reset().shape[0] == 4
        _, alive = psutil.wait_procs(children, timeout=20)
        assert alive == []


@pytest.mark.full
@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_policy_that_acts_elsewhere_survives_a_fault(num_workers, cluster, tmp_path):
    """Its chunks since the last state that is known are replayed."""
    rng = numpy_generator(0, "chunks")
    chunks = rng.uniform(-1, 1, (20, N_ENVS, 3, 1)).astype(np.float32)
    plant(tmp_path, Fault("kill", SEEDS[1], 3, 4))
    with on_ray(faulty_spec(tmp_path), num_workers) as pool, in_process(faulty_spec(tmp_path)) as other:
        np.testing.assert_array_equal(pool.reset(), other.reset())
        buffer = np.empty_like(chunks[0])  # one for all: the journal must not be of what is in it later
        ours = []
        for chunk in chunks:
            buffer[:] = chunk
            ours.append(pool.step_chunk(buffer))
        assert pool.failures == 1
        theirs = [other.step_chunk(chunk) for chunk in chunks]
        assert ours[0].episode_length.max() == 3
        for one, two in zip(ours, theirs, strict=True):
            for field in fields(one):
                np.testing.assert_array_equal(getattr(one, field.name), getattr(two, field.name), field.name)
        np.testing.assert_array_equal(pool.state().actions, other.state().actions)


@pytest.mark.full
def test_a_worker_that_does_not_come_back_is_replaced_by_the_others(cluster, actor, undisturbed, tmp_path, monkeypatch):
    with on_ray(faulty_spec(tmp_path), num_workers=2) as pool:
        first = pool.collect(actor, DECISIONS)
        gone = pool._crew._workers[0]
        ray.kill(gone)  # for good
        assert_same([first, pool.collect(actor, DECISIONS)], undisturbed)
        assert pool._crew.hosts == [1]
        assert len(processes(pool)) == 1
        pool.collect(actor, 1)


def test_no_worker_left_is_an_error(cluster, actor, tmp_path):
    with on_ray(faulty_spec(tmp_path), num_workers=1) as pool:
        ray.kill(pool._crew._workers[0])
        with pytest.raises(WorkerError, match="no worker is left"):
            pool.collect(actor, 1)


@pytest.mark.full
@pytest.mark.parametrize("replayable", [True, False])
def test_a_mistake_of_the_policys_is_not_tried_again(replayable, cluster, actor, tmp_path):
    class Mistaken:
        n_action_steps, noise_shape = actor.n_action_steps, actor.noise_shape

        def sample(self, obs, *, noise):
            raise ZeroDivisionError("a policy's own")

        def cpu(self):
            return self

    with on_ray(faulty_spec(tmp_path, replayable=replayable)) as pool:
        pool.collect(actor, 1)
        before = pool.state()
        assert (before.lengths > 0).all()
        with pytest.raises(ZeroDivisionError, match="a policy's own"):
            pool.collect(Mistaken(), 1)
        assert pool.failures == 0
        rollout = pool.collect(actor, 1)
        np.testing.assert_array_equal(rollout.environments, np.arange(N_ENVS))
        expected = rollout.n_steps[0] + (before.lengths if replayable else 0)
        np.testing.assert_array_equal(rollout.episode_lengths[0], expected, "else the next episodes begin")
        ended = rollout.ended[0].astype(int)
        np.testing.assert_array_equal(pool.state().episodes, before.episodes + (not replayable) + ended)


@pytest.mark.parametrize("make", ALIKE)
def test_a_closed_pool_says_so(make, cluster, actor, tmp_path):
    with make(faulty_spec(tmp_path)) as pool:
        pool.reset()
    for call in (
        pool.reset,
        lambda: pool.collect(actor, 1),
        lambda: pool.evaluate(actor.policy, 1, 0),
        lambda: pool.step_chunk(np.zeros((N_ENVS, 1, 1), np.float32)),
    ):
        with pytest.raises(ClosedPoolError, match="this pool is closed"):
            call()


@pytest.mark.parametrize("make", ALIKE)
def test_a_fault_while_it_is_restored_is_mended(make, cluster, actor, tmp_path):
    with in_process(faulty_spec(tmp_path)) as pool:
        pool.collect(actor, 3)
        state, expected = pool.state(), pool.collect(actor, 5)
    plant(tmp_path, Fault("nan", SEEDS[0], 0, 2))
    with make(faulty_spec(tmp_path)) as pool:
        pool.restore(state)
        assert planted(tmp_path) == 0
        assert_same([pool.collect(actor, 5)], [expected])


@pytest.mark.parametrize("make", ALIKE)
def test_whatever_was_before_it_is_restored(make, cluster, actor, tmp_path):
    """Episodes that were played, or a failure that was not mended."""
    with in_process(faulty_spec(tmp_path)) as pool:
        pool.collect(actor, 7)
        state, expected = pool.state(), pool.collect(actor, 5)
    with make(faulty_spec(tmp_path), max_failures=0) as pool:
        pool.collect(actor, 1)
        plant(tmp_path, Fault("nan", SEEDS[0], 0, 3))
        with pytest.raises((EnvFaultError, WorkerError)):
            pool.collect(actor, 3)
        pool.restore(state)
        assert_same([pool.collect(actor, 5)], [expected])
        pool.restore(state)
        assert_same([pool.collect(actor, 5)], [expected])


@pytest.mark.parametrize("make", ALIKE)
def test_where_nothing_can_be_replayed_the_next_episodes_begin(make, cluster, actor, tmp_path):
    spec = faulty_spec(tmp_path, replayable=False)
    with make(spec) as pool:
        pool.collect(actor, 1)
        state = pool.state()
        assert (state.lengths > 0).all()
    with make(spec) as pool:
        pool.restore(state)
        restored = pool.state()
        np.testing.assert_array_equal(restored.episodes, state.episodes + 1)
        np.testing.assert_array_equal(restored.lengths, 0)
        np.testing.assert_array_equal(pool.collect(actor, 2).episode_lengths[0], pool.state().lengths * 0 + 2)


@pytest.mark.full
def test_a_worker_that_dies_costs_nothing_where_nothing_was_under_way(cluster, actor, tmp_path):
    """Though its episodes cannot be replayed: they are begun anew, or others are."""
    with on_ray(faulty_spec(tmp_path, replayable=False)) as pool:
        pool.collect(actor, 1)
        state = pool.state()
        processes(pool)[0].kill()
        pool.restore(state)
        np.testing.assert_array_equal(pool.state().episodes, state.episodes + 1)
        processes(pool)[1].kill()
        assert pool.reset().shape[0] == N_ENVS
        processes(pool)[0].kill()
        assert_becomes(lambda: answers(pool))  # before anyone asks it for its environments
        np.testing.assert_array_equal(pool.collect(actor, 1).environments, np.arange(N_ENVS))
        assert pool.failures == 3


@pytest.mark.full
def test_a_policy_that_acts_elsewhere_goes_on_in_new_episodes(cluster, tmp_path):
    """Where a chunk was lost, and nothing can be replayed: not in those that were there before."""
    actions = np.zeros((N_ENVS, 4, 1), np.float32)
    with on_ray(faulty_spec(tmp_path, replayable=False)) as pool:
        pool.reset()
        played = sum(pool.step_chunk(actions).ended.astype(int) for _ in range(5))
        assert played.min() >= 2
        processes(pool)[0].kill()
        with pytest.raises(WorkerError, match="cannot be replayed"):
            pool.step_chunk(actions)
        assert (pool.state().episodes >= played).all()
        pool.step_chunk(actions)


@pytest.mark.full
def test_a_worker_whose_failure_was_not_forgiven_is_waited_for(cluster, actor, undisturbed, tmp_path):
    """By the next call, whose failure it is not."""
    with on_ray(faulty_spec(tmp_path), max_failures=0) as pool:
        processes(pool)[0].kill()
        with pytest.raises(WorkerError):
            pool.collect(actor, DECISIONS)
        assert_same([pool.collect(actor, DECISIONS)], undisturbed[:1])


@pytest.mark.full
def test_threads_collect_one_after_the_other(cluster, actor, undisturbed, tmp_path):
    with on_ray(faulty_spec(tmp_path)) as pool, ThreadPoolExecutor(2) as threads:
        rollouts = list(threads.map(lambda _: pool.collect(actor, DECISIONS), range(2)))
    rollouts.sort(key=lambda rollout: not np.array_equal(rollout.chains, undisturbed[0].chains))
    assert_same(rollouts, undisturbed)


@pytest.mark.full
def test_what_is_restored_beside_a_collection_is_not_lost(cluster, actor, undisturbed, tmp_path):
    """It waits for its turn."""
    with on_ray(faulty_spec(tmp_path)) as pool, ThreadPoolExecutor(1) as thread:
        beginning = pool.state()
        collection = thread.submit(pool.collect, Slow(actor), 2)
        while not pool._crew._turn.locked():
            time.sleep(0.01)
        pool.restore(beginning)
        assert_same([pool.collect(actor, DECISIONS)], undisturbed[:1])
        collection.result()


def test_what_has_failed_can_go_back_to_the_beginning(actor, undisturbed, tmp_path):
    """Though nothing came of its only collection."""
    plant(tmp_path, random_fault("raise", undisturbed[:1], 0))
    with in_process(faulty_spec(tmp_path), max_failures=0) as pool:
        beginning = pool.state()
        with pytest.raises(EnvFaultError):
            pool.collect(actor, DECISIONS)
        pool.restore(beginning)
        assert_same([pool.collect(actor, DECISIONS)], undisturbed[:1])


def test_environments_that_were_given_can_go_back_to_the_beginning(actor, undisturbed, tmp_path):
    with InProcessPool(build(faulty_spec(tmp_path), SEEDS), seed=SEED, slice_size=SLICE) as pool:
        beginning = pool.state()
        pool.collect(actor, DECISIONS)
        pool.restore(beginning)
        assert_same([pool.collect(actor, DECISIONS)], undisturbed[:1])


def test_an_interrupted_reset_of_environments_that_were_given_is_made_again(actor, tmp_path, monkeypatch):
    with InProcessPool(build(faulty_spec(tmp_path), SEEDS), seed=SEED, slice_size=SLICE) as pool:
        pool.collect(actor, DECISIONS)
        with monkeypatch.context() as interrupted:
            interrupted.setattr(pool._parts[0].env, "_observation", _interrupt)  # after all have begun
            with pytest.raises(KeyboardInterrupt):
                pool.reset()
        begun = pool.state().episodes
        rollout = pool.collect(actor, 1)
        np.testing.assert_array_equal(rollout.episode_lengths[0], rollout.n_steps[0])
        assert (pool.state().episodes > begun).all()


def test_an_interrupt_in_environments_that_were_given_begins_new_episodes(actor, tmp_path, monkeypatch):
    """Nobody knows how far the chunk came."""
    env = build(faulty_spec(tmp_path), SEEDS)
    pool = as_pool(env, SEED)
    pool.collect(actor, 1)
    before = pool.state()
    with monkeypatch.context() as interrupted:
        interrupted.setattr(env._simulator, "_due", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            pool.collect(actor, 1)
    rollout = pool.collect(actor, 1)
    np.testing.assert_array_equal(rollout.episode_lengths, rollout.n_steps)
    np.testing.assert_array_equal(pool.state().episodes, before.episodes + 1 + rollout.ended[0])


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.full
def test_a_pool_whose_ray_has_ended_starts_none(cluster, actor, tmp_path, monkeypatch):
    """As `ray.kill` and `ray.put` would."""
    killed: list[object] = []
    with on_ray(faulty_spec(tmp_path)) as pool, monkeypatch.context() as ended:
        ended.setattr(ray, "is_initialized", lambda: False)
        ended.setattr(ray, "kill", killed.append)
        with pytest.raises(ClosedPoolError):
            pool.collect(actor, 1)
        pool._crew.close()
    assert killed == []


@pytest.mark.full
def test_why_a_worker_cannot_start_is_said(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("dprl.rollout.ray_pool.surroundings.Surroundings.here", lambda spec: Unusable())
    with pytest.raises(ConfigError, match=r"num_workers = 1: one could not start: .*no such module here"):
        on_ray(faulty_spec(tmp_path), num_workers=1)


class Unusable:
    """Surroundings that cannot be entered."""

    def enter(self) -> None:
        raise RuntimeError("no such module here")


def test_the_environment_whose_replay_ends_is_named_as_the_pool_counts_it(tmp_path):
    plant(tmp_path, Fault("end", SEEDS[6], 0, 2))
    pool = InProcessPool(faulty_spec(tmp_path), N_ENVS, seed=SEED, slice_size=SLICE, double_buffer=True)
    with pool, pytest.raises(EnvError, match="ends when it is replayed in environment 6, episode 0, step 3"):
        pool.restore(five_steps(6))


def five_steps(index: int) -> EnvState:
    """Of one environment's first episode."""
    lengths = 5 * (np.arange(N_ENVS) == index)
    return EnvState(np.zeros(N_ENVS, np.int64), lengths, np.zeros((5, 1), np.float32))


@pytest.mark.parametrize("make", ALIKE)
def test_an_episode_that_ends_in_its_replay_is_an_error_that_leaves_all_as_it_was(
    make, cluster, actor, undisturbed, tmp_path
):
    with make(faulty_spec(tmp_path)) as pool:
        first = pool.collect(actor, DECISIONS)
        before = pool.state()
        plant(tmp_path, Fault("end", SEEDS[3], 0, 2))
        with pytest.raises(EnvError, match="ends when it is replayed in environment 3"):
            pool.restore(five_steps(3))
        for name in ("episodes", "lengths", "actions"):
            np.testing.assert_array_equal(getattr(pool.state(), name), getattr(before, name))
        assert_same([first, pool.collect(actor, DECISIONS)], undisturbed[:2])


def test_a_rebuild_that_fails_can_be_tried_again(actor, tmp_path, monkeypatch):
    actions = np.zeros((N_ENVS, 2, 1), np.float32)
    with in_process(faulty_spec(tmp_path)) as pool:
        pool.reset()
        expected = [pool.step_chunk(actions).observation for _ in range(2)][1]
    plant(tmp_path, Fault("nan", SEEDS[0], 0, 2))
    with in_process(faulty_spec(tmp_path)) as pool:
        pool.reset()
        pool.step_chunk(actions)
        with monkeypatch.context() as broken:
            broken.setattr("tests.rollout.faulty.build_faulty", _cannot)
            with pytest.raises(OSError, match="too many open files"):
                pool.step_chunk(actions)
        np.testing.assert_array_equal(pool.step_chunk(actions).observation, expected)


def _cannot(*_: object) -> None:
    raise OSError("too many open files")


@pytest.mark.parametrize(
    "make", [on_ray, in_process, lambda s: InProcessPool(s, N_ENVS, seed=SEED, slice_size=SLICE, double_buffer=True)]
)
def test_an_action_that_is_not_finite_is_named_and_costs_nothing(make, cluster, tmp_path):
    actions = np.zeros((N_ENVS, 2, 1), np.float32)
    wrong = actions.copy()
    wrong[6] = np.nan
    with make(faulty_spec(tmp_path)) as pool:
        pool.reset()
        with pytest.raises(EnvActionError, match=f"environment 6, episode 0, step 0 .environment seed {SEEDS[6]}"):
            pool.step_chunk(wrong)
        assert pool.step_chunk(actions).n_steps.tolist() == [2] * N_ENVS


@pytest.mark.full
def test_threads_take_turns(cluster, actor, tmp_path):
    with on_ray(faulty_spec(tmp_path)) as pool, ThreadPoolExecutor(1) as thread:
        expected = evaluate(actor.policy, pool.spec, 60, 1)
        for _ in range(3):
            evaluation = thread.submit(pool.evaluate, actor.policy, 60, 1)
            pool.collect(actor, 5)
            assert evaluation.result().metrics() == expected.metrics()


@pytest.mark.full
def test_what_an_interrupt_ends_is_no_failure(cluster, actor, tmp_path, monkeypatch):
    """Its calls are ended; that their workers are restarted is nobody's fault."""
    monkeypatch.setattr("dprl.rollout.ray_pool.workers.ABANDONED_TIMEOUT_S", 0.5)
    with in_process(faulty_spec(tmp_path)) as pool:
        expected = [pool.collect(actor, DECISIONS) for _ in range(2)]
    with on_ray(faulty_spec(tmp_path), max_failures=0) as pool:
        rollouts = [pool.collect(actor, DECISIONS)]
        timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            pool.collect(Slow(actor), DECISIONS)
        assert_same([*rollouts, pool.collect(actor, DECISIONS)], expected)
        assert pool.failures == 0


@pytest.mark.full
@pytest.mark.parametrize("lost", [False, True])
def test_an_interrupt_as_a_result_is_taken_is_no_failure(lost, cluster, actor, undisturbed, tmp_path, monkeypatch):
    """Nor is the worker forgotten that died just then."""
    with on_ray(faulty_spec(tmp_path), max_failures=0) as pool:
        if lost:
            processes(pool)[0].kill()
        monkeypatch.setattr(pool._crew, "_outcome", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            pool.collect(actor, DECISIONS)
        monkeypatch.undo()
        started = time.monotonic()
        assert_same([pool.collect(actor, DECISIONS)], undisturbed[:1])
        assert pool.failures == 0
        assert time.monotonic() - started < 20


class Slow:
    """Takes a second for a decision."""

    def __init__(self, actor: DenoisingMDP) -> None:
        self._actor = actor
        self.n_action_steps, self.noise_shape = actor.n_action_steps, actor.noise_shape

    def sample(self, obs, *, noise):
        time.sleep(1)
        return self._actor.sample(obs, noise=noise)

    def cpu(self):
        return self


class FakeRay:
    """Counts how often it is started and ended."""

    def __init__(self) -> None:
        self.running, self.starts, self.ends = False, 0, 0

    def init(self, *_: object, **__: object) -> None:
        self.running, self.starts = True, self.starts + 1

    def shutdown(self) -> None:
        self.running, self.ends = False, self.ends + 1

    def is_initialized(self) -> bool:
        return self.running

    def get_runtime_context(self) -> SimpleNamespace:
        return SimpleNamespace(gcs_address=f"127.0.0.1:{self.starts}", get_job_id=lambda: "01")


def test_only_the_ray_that_was_started_for_pools_is_ended(monkeypatch):
    monkeypatch.setattr("dprl.rollout.ray_pool.cluster.ray", fake := FakeRay())
    monkeypatch.setattr(RayConnection, "_users", WeakSet())
    monkeypatch.setattr(RayConnection, "_started", None)
    one, other = RayConnection(), RayConnection()
    one.close()
    assert fake.running, "somebody needs it"
    other.close()
    assert not fake.running
    one = RayConnection()
    fake.shutdown()
    fake.init()  # the user's own
    one.close()
    assert fake.running
    fake.shutdown()
    forgotten, one = RayConnection(), RayConnection()
    del forgotten
    one.close()
    assert not fake.running, "who was forgotten needs it no more"


def test_what_a_running_ray_cannot_have_is_refused(cluster, tmp_path):
    with pytest.raises(ConfigError, match=r"runtime_env = .*leave it out"):
        RayPool(faulty_spec(tmp_path), N_ENVS, num_workers=1, runtime_env={"env_vars": {"A": "B"}})


ALONE = """
import threading
from pathlib import Path

import psutil

from dprl.mdp import DenoisingMDP, ExplorationConfig
from dprl.rollout.ray_pool import RayEvaluator, RayPool
from tests.toys import reach_spec, toy_policy


def use():
    policy = toy_policy()
    with RayPool(reach_spec(), 4, num_workers=1, slice_size=2) as pool:
        pool.collect(DenoisingMDP(policy, 2, ExplorationConfig()), 3)
    with RayEvaluator(reach_spec()) as evaluator:
        evaluator.start(policy, 4, 0).result()


def remains():
    process = psutil.Process()
    shared = {str(path) for path in Path("/dev/shm").iterdir()}
    files = {file.path for file in process.open_files() if "/ray/session_" not in file.path}  # Ray keeps its log open
    return [p.name() for p in process.children(recursive=True)], shared, files, {t.name for t in threading.enumerate()}


nothing = remains()
use()
assert remains() == nothing, (nothing, remains())
"""


@pytest.mark.full
def test_nothing_is_left_of_a_ray_that_the_pool_started():
    """No process, thread, shared memory or open file."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


ERRORS = [KeyboardInterrupt, *(pytest.param(error, marks=pytest.mark.full) for error in (None, EnvFaultError))]


@pytest.mark.parametrize("error", ERRORS)
def test_nothing_is_left_after_close(error, cluster, actor, tmp_path):
    try:
        with on_ray(faulty_spec(tmp_path)) as pool:
            workers = processes(pool)
            pool.collect(actor, 1)
            assert_becomes(lambda: len(living_actors()) == 2)
            if error is not None:
                raise error("toy", "fails")
    except (KeyboardInterrupt, EnvFaultError):
        pass
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []
    assert_nothing_is_left()


@pytest.mark.parametrize("make", ALIKE)
def test_a_fault_while_another_is_mended_counts_and_loses_nothing(make, cluster, actor, undisturbed, tmp_path):
    """The second one waits in the actions that are replayed to get back to where the collection began."""
    first, second = Fault("nan", SEEDS[4], 0, 3), Fault("nan", SEEDS[5], 0, 1, times=2)
    with make(faulty_spec(tmp_path), max_failures=1) as pool:
        begun = pool.collect(actor, 1)
        before = pool.state()
        plant(tmp_path, first)
        plant(tmp_path, second)
        with pytest.raises((EnvFaultError, WorkerError), match="environment 5, episode 0, step 1 "):
            pool.collect(actor, 2 * DECISIONS - 1)
        for field in fields(before):
            np.testing.assert_array_equal(getattr(pool.state(), field.name), getattr(before, field.name))
        for left in tmp_path.iterdir():
            left.unlink()
        rest = pool.collect(actor, DECISIONS - 1)
    np.testing.assert_array_equal(begun.rewards[0], undisturbed[0].rewards[0])
    np.testing.assert_array_equal(rest.chains, undisturbed[0].chains[1:])


@pytest.mark.full
def test_one_hang_is_one_failure_however_much_a_worker_has_to_do(cluster, actor, undisturbed, tmp_path):
    """Here it has both shares, since the other worker is gone."""
    with on_ray(faulty_spec(tmp_path), timeout_s=2.0, max_failures=1) as pool:
        ray.kill(pool._crew._workers[0])
        first = pool.collect(actor, DECISIONS)
        assert pool._crew.hosts == [1]
        before = pool.failures
        state = pool.state()
        index = int(np.argmax(state.lengths > 0))
        plant(tmp_path, Fault("hang", SEEDS[index], int(state.episodes[index]), int(state.lengths[index])))
        assert_same([first, pool.collect(actor, DECISIONS)], undisturbed)
        assert pool.failures == before + 1


def evaluation_fault(seed: int, environment: int, kind: str, times: int = 1) -> Fault:
    (its_seed,) = env_seeds(seed, 1, environment, purpose="evaluation")
    return Fault(kind, its_seed, 0, 0, times)


@pytest.mark.parametrize("make", ALIKE)
def test_an_evaluation_survives_a_fault(make, cluster, actor, tmp_path):
    spec = faulty_spec(tmp_path)
    expected = evaluate(actor.policy, spec, 60, seed=1)
    plant(tmp_path, evaluation_fault(1, 30, "raise"))
    with make(spec) as pool:
        result = pool.evaluate(actor.policy, 60, 1)
    assert planted(tmp_path) == 0
    assert replace(result, policy_latency_ms_p50=0.0) == replace(expected, policy_latency_ms_p50=0.0)


@pytest.mark.full
def test_an_evaluation_names_the_environment_as_the_pool_counts_it(cluster, actor, tmp_path):
    plant(tmp_path, evaluation_fault(1, 30, "nan", times=9))
    with on_ray(faulty_spec(tmp_path), max_failures=1) as pool, pytest.raises(WorkerError, match="environment 30, "):
        pool.evaluate(actor.policy, 60, 1)


@pytest.mark.full
def test_a_worker_given_up_in_an_evaluation_is_made_up_for(cluster, actor, undisturbed, tmp_path):
    with on_ray(faulty_spec(tmp_path)) as pool:
        first = pool.collect(actor, DECISIONS)
        ray.kill(pool._crew._workers[0])
        pool.evaluate(actor.policy, 60, 1)
        assert pool._crew.hosts == [1]
        assert_same([first, pool.collect(actor, DECISIONS)], undisturbed)


@pytest.mark.parametrize("make", ALIKE)
def test_no_decisions_are_refused(make, cluster, actor, tmp_path):
    with make(faulty_spec(tmp_path)) as pool:
        with pytest.raises(ConfigError, match="n_steps = 0"):
            pool.collect(actor, 0)
        with pytest.raises(ConfigError, match="episodes = 0"):
            pool.evaluate(actor.policy, 0, 1)

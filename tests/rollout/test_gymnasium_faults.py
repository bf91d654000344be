"""Faults of Gymnasium environments: their processes die, or they return what they must not."""

from functools import cache

import gymnasium
import numpy as np
import pytest

from dprl.errors import EnvFaultError
from dprl.mdp import DenoisingMDP, ExplorationConfig
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features
from dprl.rollout import InProcessPool, evaluate
from dprl.spec import EnvOptions, EnvSpec, env_seeds, resolve
from tests.rollout.mortal import FOLDER, ID, Mortal

N_ENVS, SEED = 4, 5
SHAPE, NONE = r"\(3,\), not \(2,\) in \['n'\]", "(TypeError|AssertionError)"

# gymnasium.vector tells what its processes raised
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    for vectorization in ("sync", "async"):
        mortal(vectorization)
    return tmp_path


@pytest.fixture
def policy() -> DiffusionPolicy:
    return DiffusionPolicy(Features(2, 1), DiffusionConfig(horizon=2, num_train_timesteps=4))


@pytest.fixture
def actor(policy) -> DenoisingMDP:
    return DenoisingMDP(policy, 2, ExplorationConfig())


@cache  # resolving an id takes a step, before anything fails
def mortal(vectorization: str = "async") -> EnvSpec:
    return resolve(ID, EnvOptions(vectorization=vectorization))


def in_process(max_failures: int = 3, vectorization: str = "async") -> InProcessPool:
    return InProcessPool(mortal(vectorization), N_ENVS, seed=SEED, slice_size=2, max_failures=max_failures)


def test_a_process_that_dies_changes_nothing(folder, actor):
    with in_process() as pool:
        expected = pool.collect(actor, 4)
    (folder / "step-kill").touch()
    with in_process() as pool:
        np.testing.assert_array_equal(pool.collect(actor, 4).observations, expected.observations)
    assert not list(folder.iterdir())


def test_a_process_that_dies_again_and_again_is_an_error_that_says_so(folder, actor):
    """And closing what is broken hides it not."""
    (folder / "step-always-kill").touch()
    with pytest.raises(EnvFaultError, match="the simulator raised"), in_process(max_failures=1) as pool:
        pool.collect(actor, 4)


def test_an_evaluation_whose_process_dies_is_made_again(folder, policy):
    expected = evaluate(policy, mortal(), 6, 0)
    (folder / "step-kill").touch()
    progress: list[int] = []
    again = evaluate(policy, mortal(), 6, 0, on_progress=progress.append)
    assert again.metrics() == expected.metrics()
    assert sum(progress) == 6


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("call", ["reset", "step"])
@pytest.mark.parametrize(("kind", "what"), [("shape", SHAPE), ("none", NONE)])
def test_an_observation_of_another_shape_is_named(vectorization, call, kind, what, folder, actor):
    with in_process(max_failures=0, vectorization=vectorization) as pool:
        pool.reset()
        (folder / f"{call}-always-{kind}").touch()
        where = r"the environment raised in environment \d, episode \d, step \d+ .environment seed \d+.*"
        with pytest.raises(EnvFaultError, match=where + what):
            pool.reset() if call == "reset" else pool.collect(actor, 1)


@pytest.mark.full
def test_what_this_process_has_registered_is_there_on_ray_too(folder, actor):
    """Under a plain id, of a class of a module or of a script."""
    pytest.importorskip("ray")
    from dprl.rollout.ray_pool import RayEvaluator, RayPool

    class Local(Mortal):
        """Cannot be imported."""

    gymnasium.register("Local-v0", Local, max_episode_steps=20)
    try:
        spec = resolve("Local-v0")
        with InProcessPool(spec, N_ENVS, seed=SEED, slice_size=2) as pool:
            expected = pool.collect(actor, 4)
        with RayPool(spec, N_ENVS, num_workers=2, seed=SEED, slice_size=2) as pool:
            np.testing.assert_array_equal(pool.collect(actor, 4).observations, expected.observations)
        with RayEvaluator(spec) as evaluator:
            ours = evaluator.start(actor.policy, 4, 0).result()
        assert ours.metrics() == evaluate(actor.policy, spec, 4, 0).metrics()
    finally:
        del gymnasium.registry["Local-v0"]


def test_seeds_are_those_of_the_environments(folder):
    """The check of these tests: an environment's number is drawn from its seed."""
    with in_process(vectorization="sync") as pool:
        first = pool.reset()[:, 0, 0]
    assert len(set(first.tolist())) == N_ENVS
    assert len(set(env_seeds(SEED, N_ENVS))) == N_ENVS

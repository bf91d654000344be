"""What pools and evaluations are given: whatever is wrong is named before any work starts."""

import importlib.util
import threading
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch

import dprl
from dprl.errors import ClosedPoolError, ConfigError, DprlError, EnvError, EnvFaultError
from dprl.mdp import DenoisingMDP, ExplorationConfig
from dprl.policy import DiffusionPolicy, Features
from dprl.rollout import InProcessPool, RolloutPool, evaluate
from dprl.spec import MAX_EPISODE_STEPS, EnvOptions, EnvSpec, EnvState, build, env_seeds, load
from tests.rollout.faulty import Fault, faulty_spec, plant
from tests.toys import reach_spec, toy_policy

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="needs Ray")
N = 4


@pytest.fixture
def pool() -> InProcessPool:
    return InProcessPool(reach_spec(), N)


@pytest.fixture
def no_ray(monkeypatch) -> None:
    """Whatever is wrong must be found before a Ray is started or looked for."""
    pytest.importorskip("ray")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a Ray was asked for")

    monkeypatch.setattr("dprl.rollout.ray_pool.cluster.RayConnection.__init__", refuse)


def actor() -> DenoisingMDP:
    return DenoisingMDP(toy_policy(), 2, ExplorationConfig())


@pytest.mark.parametrize("seed", [None, "a", 1.5, True, -1])
def test_no_seed_is_refused(seed, pool, no_ray):
    from dprl.rollout.ray_pool import RayPool

    for make in (
        lambda: InProcessPool(reach_spec(), N, seed=seed),
        lambda: InProcessPool(build(reach_spec(), env_seeds(0, N)), seed=seed),
        lambda: RolloutPool.auto(reach_spec(), N, seed=seed),
        lambda: RayPool(reach_spec(), N, num_workers=1, seed=seed),
        lambda: dprl.make(reach_spec(), N, seed=seed),
        lambda: pool.evaluate(toy_policy(), 2, seed),
        lambda: evaluate(toy_policy(), reach_spec(), 2, seed),
    ):
        with pytest.raises(ConfigError, match=r"seed = .*: must be a whole number, at least 0"):
            make()


@pytest.mark.parametrize("env", [None, 3, b"x", [], object()])
def test_no_environment_is_refused(env, no_ray):
    from dprl.rollout.ray_pool import RayEvaluator, RayPool

    with pytest.raises(EnvError, match=r"is no batched environment: take dprl.make"):
        InProcessPool(env, 2)
    for make in (
        lambda: RayPool(env, 2, num_workers=1),
        lambda: RayEvaluator(env),
        lambda: RolloutPool.auto(env, 2),
        lambda: dprl.make(env, 2),
    ):
        with pytest.raises(ConfigError, match=r"env = .*: must be the name of an environment"):
            make()


def test_a_gymnasium_environment_is_no_batched_one():
    env = gymnasium.make("Pendulum-v1")
    with pytest.raises(EnvError, match=r"TimeLimit .* is no batched environment: take dprl.make"):
        InProcessPool(env, 2)
    env.close()


@pytest.mark.parametrize("options", ["dense", 3, {}, EnvOptions])
def test_no_options_are_refused(options):
    with pytest.raises(ConfigError, match=r"options = .*: must be EnvOptions\(\.\.\.\)"):
        InProcessPool("Pendulum-v1", 2, options=options)


def test_options_that_would_do_nothing_are_refused(no_ray):
    from dprl.rollout.ray_pool import RayPool

    options = EnvOptions(max_episode_steps=5)
    for make in (
        lambda: InProcessPool(reach_spec(), N, options=options),
        lambda: RayPool(reach_spec(), N, num_workers=1, options=options),
        lambda: dprl.make(reach_spec(), N, options=options),
    ):
        with pytest.raises(ConfigError, match=r"options = .* is a spec: change that, or name it"):
            make()


@pytest.mark.parametrize("builder", ["nope:build", "tests.toys:nope", "tests.toys", "math:pi", ""])
def test_a_builder_that_is_none_is_named(builder, no_ray):
    from dprl.rollout.ray_pool import RayEvaluator, RayPool

    spec = replace(reach_spec(), builder=builder)
    for make in (
        lambda: InProcessPool(spec, N),
        lambda: RayPool(spec, N, num_workers=1),
        lambda: RayEvaluator(spec),
    ):
        with pytest.raises(DprlError, match=rf"reference = '{builder}'|was handed in ready-made"):
            make()


@pytest.mark.parametrize("reference", ["nope:f", "math", "math:nope", "", None, 3, ":", "math:pi"])
def test_a_reference_to_nothing_is_named(reference):
    with pytest.raises(ConfigError, match=r"reference = "):
        load(reference)


@pytest.mark.parametrize("value", [None, "3", 1.5, True, -1])
def test_no_number_of_failures_is_refused(value):
    with pytest.raises(ConfigError, match=r"max_failures = .*: must be a whole number, at least 0"):
        InProcessPool(reach_spec(), N, max_failures=value)


@pytest.mark.parametrize("value", [None, "2", 2.0, True, 0])
def test_no_number_of_environments_is_refused(value):
    with pytest.raises(ConfigError, match=r"n_envs = .*: must be a whole number, at least 1"):
        dprl.make(reach_spec(), value)


@pytest.mark.parametrize("value", ["yes", 2, None])
def test_double_buffer_is_true_or_false(value):
    with pytest.raises(ConfigError, match=r"double_buffer = .*: must be True or False"):
        InProcessPool(reach_spec(), N, slice_size=2, double_buffer=value)


def test_an_episode_has_a_largest_length():
    with pytest.raises(ConfigError, match=rf"max_episode_steps = .*: must be at most {MAX_EPISODE_STEPS}"):
        replace(reach_spec(), max_episode_steps=MAX_EPISODE_STEPS + 1)


# ------------------------------------------------------------------------------------------------------- evaluations


@pytest.mark.parametrize("policy", [None, "x", 3])
def test_no_policy_is_refused(policy, pool):
    for call in (lambda: pool.evaluate(policy, 2, 0), lambda: evaluate(policy, reach_spec(), 2, 0)):
        with pytest.raises(ConfigError, match=r"policy = .*: must be a policy"):
            call()


def test_an_mdp_is_not_its_policy(pool):
    with pytest.raises(ConfigError, match=r"policy = 'DenoisingMDP': must be a policy: the MDP has it as \.policy"):
        pool.evaluate(actor(), 2, 0)


def test_a_name_is_not_a_spec():
    with pytest.raises(ConfigError, match=r"spec = 'Pendulum-v1': must be an EnvSpec"):
        evaluate(toy_policy(), "Pendulum-v1", 1, 0)


@pytest.mark.parametrize("episodes", [None, "2", 1.0, True, 0])
def test_no_number_of_episodes_is_refused(episodes, pool):
    with pytest.raises(ConfigError, match=r"episodes = .*: must be a whole number, at least 1"):
        pool.evaluate(toy_policy(), episodes, 0)


def test_an_evaluation_forgives_as_much_as_its_pool(tmp_path):
    spec = faulty_spec(tmp_path)
    for forgiven in (0, 1):
        plant(tmp_path, Fault("nan", env_seeds(5, 1, purpose="evaluation")[0], 0, 1))
        with InProcessPool(spec, 2, max_failures=forgiven) as pool:
            if forgiven:
                assert pool.evaluate(toy_policy(), 2, 5).episodes == 2
            else:
                with pytest.raises(EnvFaultError, match=r"observation is not finite"):
                    pool.evaluate(toy_policy(), 2, 5)


# ------------------------------------------------------------------------------------------------------- collections


class Lacks:
    """An actor without one of its parts."""

    def __init__(self, part: str) -> None:
        whole = actor()
        for name in {"n_action_steps", "noise_shape", "sample", "cpu"} - {part}:
            setattr(self, name, getattr(whole, name))


@pytest.mark.parametrize("part", ["n_action_steps", "noise_shape", "sample", "cpu"])
def test_an_actor_has_all_its_parts(part, pool):
    with pytest.raises(ConfigError, match=r"actor = 'Lacks': must act by noise that it is given"):
        pool.collect(Lacks(part), 1)


def test_a_class_is_no_actor(pool):
    with pytest.raises(ConfigError, match=r"actor = <class .*DenoisingMDP'>: must act"):
        pool.collect(DenoisingMDP, 1)


def test_a_policy_of_another_task_is_refused_before_anything_is_reset(pool):
    for features, what in ((Features(3, 1), "observation_size = 3"), (Features(2, 2), "action_size = 2")):
        other = DenoisingMDP(DiffusionPolicy(features, toy_policy().config), 2, ExplorationConfig())
        with pytest.raises(EnvError, match=rf"the policy was trained with {what}"):
            pool.collect(other, 1)
    longer = DiffusionPolicy(Features(2, 1), replace(toy_policy().config, n_obs_steps=2))
    with pytest.raises(ConfigError, match=r"n_obs_steps = 1: the policy sees 2"):
        pool.collect(DenoisingMDP(longer, 2, ExplorationConfig()), 1)
    assert (pool.state().episodes == -1).all()


@pytest.mark.parametrize(
    "actions",
    [np.full((N, 2, 1), "a"), torch.zeros(N, 2, 1, requires_grad=True), np.zeros((N, 2, 1), complex), None],
    ids=["text", "gradient", "complex", "none"],
)
def test_actions_are_numbers(actions, pool):
    pool.reset()
    with pytest.raises(EnvError, match=r"expects an array of numbers"):
        pool.step_chunk(actions)


# ------------------------------------------------------------------------------------------------------------- states


def changed(state: EnvState, **changes: object) -> EnvState:
    return replace(state, **changes)


BAD_STATES = {
    "no-state": (lambda s: {}, "state = 'dict': must be what"),
    "nothing": (lambda s: None, "state = 'NoneType': must be what"),
    "others": (lambda s: EnvState(s.episodes[:2], s.lengths[:2], s.actions[:4]), "n_envs = 4: the saved state is of 2"),
    "negative": (lambda s: changed(s, lengths=s.lengths * 0 - 1), r"state.lengths = .*: must be from 0 to"),
    "too-long": (lambda s: changed(s, lengths=s.lengths * 0 + 50), r"state.lengths = .*: must be from 0 to"),
    "unbegun": (lambda s: changed(s, episodes=s.episodes * 0 - 1), r"state.lengths = .*0 where no episode has begun"),
    "no-episode": (lambda s: changed(s, episodes=s.episodes * 0 - 2), r"state.episodes = .*: must be at least -1"),
    "floats": (lambda s: changed(s, lengths=s.lengths.astype(float)), r"state.lengths = .*: must be whole numbers"),
    "surplus": (lambda s: changed(s, actions=np.zeros((99, 1), np.float32)), r"state.actions = \(99, 1\): must have"),
    "wide": (lambda s: changed(s, actions=np.zeros((16, 3), np.float32)), r"state.actions = .*: must have the shape"),
    "few": (lambda s: changed(s, actions=np.zeros((0, 1), np.float32)), r"state.actions = .*: must have the shape"),
    "nan": (lambda s: changed(s, actions=s.actions * np.nan), r"state.actions = .*: must be finite"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_no_state_is_refused_and_nothing_is_lost(case, pool):
    make, message = BAD_STATES[case]
    pool.collect(actor(), 2)
    state = pool.state()
    with pytest.raises(ConfigError, match=message):
        pool.restore(make(state))
    np.testing.assert_array_equal(pool.state().lengths, state.lengths)
    rollout = pool.collect(actor(), 2)
    with InProcessPool(reach_spec(), N) as other:
        other.collect(actor(), 2)
        np.testing.assert_array_equal(rollout.chains, other.collect(actor(), 2).chains)


def test_a_closed_pool_says_so_whatever_it_is_given(pool):
    pool.close()
    for call in (lambda: pool.step_chunk("x"), lambda: pool.restore(None), lambda: pool.collect(None, 0)):
        with pytest.raises(ClosedPoolError):
            call()


# ---------------------------------------------------------------------------------------------------------------- Ray


@needs_ray
@pytest.mark.parametrize("name", ["CPU", "GPU", "memory", ""])
def test_a_resource_of_rays_own_is_refused(name):
    from dprl.rollout.ray_pool import Resource

    with pytest.raises(ConfigError, match=rf"name = '{name}': must be a custom resource's"):
        Resource(name, 1)


class Locked:
    """What no process can send to another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()


@needs_ray
def test_what_cannot_be_sent_is_named(monkeypatch):
    from dprl.rollout.ray_pool import workers

    def put(value: object) -> None:
        raise TypeError("Could not serialize the put value <...>:\nmany lines")

    monkeypatch.setattr(workers.ray, "put", put)
    with pytest.raises(ConfigError, match=r"actor = Locked: cannot be sent to Ray workers: Could not[^\n]*$"):
        workers.sent("actor", Locked())


@needs_ray
def test_a_registration_that_cannot_be_sent_is_named():
    from dprl.rollout.ray_pool.surroundings import Surroundings

    lock = threading.Lock()
    gymnasium.register("Locked-v0", lambda **_: (lock, gymnasium.make("Pendulum-v1"))[1], max_episode_steps=9)
    try:
        spec = EnvSpec("Locked-v0", "dprl.envs.gymnasium:build", "Locked-v0", 3, (-2.0,), (2.0,), 9)
        with pytest.raises(EnvError, match=r"Locked-v0: what registers it cannot be sent .*'module:Locked-v0'"):
            Surroundings.here(spec)
    finally:
        del gymnasium.registry["Locked-v0"]


# ----------------------------------------------------------------------------------------- environments that are tried


class Fails(gymnasium.Env):
    """Fails in one way or another as soon as it is tried."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, how: str) -> None:
        self.how = how

    def reset(self, *, seed=None, options=None):
        if self.how == "reset":
            raise RuntimeError("no motor")
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return {"raises": lambda: 1 // 0, "four": lambda: (np.zeros(2), 0.0, False, {}), "none": lambda: None}[
            self.how
        ]()


@pytest.mark.parametrize("how", ["reset", "raises", "four", "none"])
@pytest.mark.filterwarnings("ignore:.*")
def test_an_environment_that_fails_when_it_is_tried_is_named(how):
    gymnasium.register("Fails-v0", lambda **_: Fails(how), max_episode_steps=9)
    try:
        with pytest.raises(EnvError, match=r"'Fails-v0' fails in its first step: "):
            InProcessPool("Fails-v0", 2)
    finally:
        del gymnasium.registry["Fails-v0"]


def test_whole_numbers_are_no_continuous_actions():
    space = gymnasium.spaces.Box(0, 5, (2,), np.int64)
    env = type("Whole", (Fails,), {"action_space": space})
    gymnasium.register("Whole-v0", lambda **_: env("none"), max_episode_steps=9)
    try:
        with pytest.raises(EnvError, match=r"'Whole-v0' has the action space .* continuous actions"):
            InProcessPool("Whole-v0", 2)
    finally:
        del gymnasium.registry["Whole-v0"]

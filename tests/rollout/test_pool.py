"""Pools: the same seed and slice size give the same rollouts, however the environments are spread."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dprl.envs import vec_env
from dprl.errors import ConfigError, EnvError
from dprl.guidance import ValueGuide
from dprl.mdp import DenoisingMDP, ExplorationConfig
from dprl.networks import MLPConfig, VisionConfig
from dprl.networks.vit import ViTConfig
from dprl.observations import map_parts
from dprl.policy import ChunkCritic, CriticConfig, DiffusionConfig, DiffusionPolicy, Features, InferenceConfig
from dprl.rollout import InProcessPool, Rollout, RolloutPool, as_pool, evaluate
from dprl.rollout.collector import Share
from dprl.rollout.pool import checked_slice_size
from dprl.seeding import EpisodeNoise
from dprl.spec import ChunkStep, EnvOptions, EnvSpec, EnvState, FloatArray, build, env_seeds, resolve, with_n_obs_steps
from tests.toys import ARRAYS, reach_spec

pytest.importorskip("envpool")

N_ENVS, SLICE, SEED = 8, 2, 3
HORIZON, EXECUTED, TUNED, DECISIONS = 4, 3, 2, 5


@pytest.fixture(scope="module")
def spec() -> EnvSpec:
    return with_n_obs_steps(resolve("Hopper-v5", EnvOptions(max_episode_steps=10)), 2)


@pytest.fixture(scope="module")
def actor(spec) -> DenoisingMDP:
    config = DiffusionConfig(
        horizon=HORIZON,
        n_action_steps=EXECUTED,
        n_obs_steps=2,
        num_train_timesteps=4,
        denoiser=MLPConfig(hidden_size=16),
    )
    features = Features(spec.observation_size, spec.action_size)
    return DenoisingMDP(DiffusionPolicy(features, config), TUNED, ExplorationConfig())


@pytest.fixture(scope="module")
def ray() -> Iterator[object]:
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@dataclass
class Collected:
    """Two collections, one after the other, and the state between them."""

    first: Rollout
    state: EnvState
    second: Rollout


def collect(pool: RolloutPool, actor: DenoisingMDP) -> Collected:
    with pool:
        first = pool.collect(actor, DECISIONS)
        state = pool.state()
        return Collected(first, state, pool.collect(actor, DECISIONS))


def in_process(spec: EnvSpec, seed: int = SEED, slice_size: int | None = SLICE) -> InProcessPool:
    return InProcessPool(spec, N_ENVS, seed=seed, slice_size=slice_size)


@pytest.fixture(scope="module")
def reference(spec, actor) -> Collected:
    collected = collect(in_process(spec), actor)
    assert collected.first.ended.sum() >= N_ENVS, "there should be resets"
    return collected


@pytest.fixture(scope="module")
def on_ray(ray, spec, actor) -> Callable[[int], Collected]:
    """Collect with so many workers; each number once."""
    from dprl.rollout.ray_pool import RayPool

    done: dict[int, Collected] = {}

    def collected(num_workers: int) -> Collected:
        if num_workers not in done:
            pool = RayPool(spec, N_ENVS, num_workers=num_workers, seed=SEED, slice_size=SLICE)
            done[num_workers] = collect(pool, actor)
        return done[num_workers]

    return collected


def assert_same(one: Rollout, other: Rollout) -> None:
    for field in ARRAYS:
        map_parts(np.testing.assert_array_equal, getattr(one, field.name), getattr(other, field.name))


def assert_same_state(one: EnvState, other: EnvState) -> None:
    for field in fields(EnvState):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), field.name)


def test_shapes(reference, spec):
    rollout, rows = reference.first, (DECISIONS, N_ENVS)
    shapes = {field.name: getattr(rollout, field.name).shape for field in ARRAYS}
    assert shapes.pop("observations") == (*rows, 2, spec.observation_size)
    assert shapes.pop("final_observations") == (*rows, 2, spec.observation_size)
    assert shapes.pop("log_probs") == (*rows, TUNED, HORIZON, spec.action_size)
    assert shapes.pop("chains") == (*rows, TUNED + 1, HORIZON, spec.action_size)
    np.testing.assert_array_equal(rollout.environments, np.arange(N_ENVS))
    assert shapes.pop("environments") == (N_ENVS,)
    assert shapes.pop("step_rewards") == (*rows, rollout.n_steps.max())
    assert set(shapes.values()) == {rows}


def test_decisions_follow_one_another(reference):
    observations = np.concatenate([reference.first.observations, reference.second.observations])
    final = np.concatenate([reference.first.final_observations, reference.second.final_observations])
    goes_on = ~np.concatenate([reference.first.ended, reference.second.ended])[:-1]
    np.testing.assert_array_equal(observations[1:][goes_on], final[:-1][goes_on])
    assert (observations[1:][~goes_on] != final[:-1][~goes_on]).any(axis=(1, 2)).all()


def test_returns_and_lengths_add_up(reference):
    rollout = reference.first
    returns, lengths = np.zeros(N_ENVS), np.zeros(N_ENVS, int)
    for t in range(DECISIONS):
        returns, lengths = returns + rollout.rewards[t], lengths + rollout.n_steps[t]
        np.testing.assert_allclose(rollout.episode_returns[t], returns, rtol=1e-5)
        np.testing.assert_array_equal(rollout.episode_lengths[t], lengths)
        returns[rollout.ended[t]], lengths[rollout.ended[t]] = 0, 0
    assert rollout.episode_lengths.max() <= 10
    assert rollout.n_steps.max() == EXECUTED


def test_chain_ends_in_the_executed_actions(reference, actor, spec):
    env = build(spec, env_seeds(SEED, N_ENVS))
    env.reset()
    x = torch.from_numpy(reference.first.chains[0, :, -1])
    actions = actor.policy.action_normalizer.unnormalize(x).numpy()[:, :EXECUTED]
    np.testing.assert_array_equal(env.step_chunk(actions).final_observation, reference.first.final_observations[0])


def test_same_seed_is_equal_and_another_is_not(reference, spec, actor):
    assert_same(collect(in_process(spec), actor).second, reference.second)
    other = collect(in_process(spec, seed=SEED + 1), actor)
    assert not np.array_equal(other.first.observations[0], reference.first.observations[0])
    assert not np.array_equal(other.first.chains, reference.first.chains)


def test_slices_and_collections_draw_noise_of_their_own(reference):
    start = np.concatenate([reference.first.chains[0, :, 0], reference.second.chains[0, :, 0]])
    assert len(np.unique(start.reshape(2 * N_ENVS, -1), axis=0)) == 2 * N_ENVS


def test_inference_runs_on_one_thread_and_leaves_torchs_setting(spec, actor):
    class Spy:
        threads: ClassVar[list[int]] = []
        n_action_steps, noise_shape = actor.n_action_steps, actor.noise_shape

        def sample(self, obs, *, noise):
            self.threads.append(torch.get_num_threads())
            return actor.sample(obs, noise=noise)

        def cpu(self):
            return self

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with in_process(spec) as pool:
            pool.collect(Spy(), 1)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert Spy.threads == [1] * (N_ENVS // SLICE)


def test_environments_of_ones_own_give_the_same(reference, spec, actor):
    pool = as_pool(build(spec, env_seeds(SEED, N_ENVS)), SEED)
    assert_same(collect(pool, actor).first, collect(in_process(spec, slice_size=None), actor).first)
    assert as_pool(pool, SEED) is pool


def test_noise_is_of_the_environment_its_episode_and_the_step(reference, spec, actor):
    """So a chain does not depend on what was drawn before, or for whom else."""
    rollout, noise = reference.second, EpisodeNoise(SEED, "noise")
    with in_process(spec) as pool:
        pool.restore(reference.state)
        for t in range(DECISIONS):
            state = pool.state()
            drawn = noise.draw(actor.noise_shape, np.arange(N_ENVS), state.episodes, state.lengths)
            rows = slice(2, 4)
            chain = actor.sample(
                torch.from_numpy(rollout.observations[t, rows]), noise=torch.from_numpy(drawn[:, rows])
            )
            np.testing.assert_array_equal(chain.steps.numpy(), rollout.chains[t, rows])
            pool.collect(actor, 1)


def test_double_buffering_changes_nothing(reference, spec, actor):
    pool = InProcessPool(spec, N_ENVS, seed=SEED, slice_size=SLICE, double_buffer=True)
    collected = collect(pool, actor)
    assert_same(collected.first, reference.first)
    assert_same(collected.second, reference.second)
    assert_same_state(collected.state, reference.state)
    assert not [thread for thread in threading.enumerate() if "dprl" in thread.name]


def test_double_buffering_needs_two_halves(spec):
    with pytest.raises(ConfigError, match=r"double_buffer = True: needs an even number of slices: 8 .* / slice_size 8"):
        InProcessPool(spec, 8, slice_size=8, double_buffer=True)


@pytest.fixture(scope="module")
def chunks(spec) -> list[FloatArray]:
    rng = np.random.default_rng(0)
    return list(rng.uniform(-1, 1, (6, N_ENVS, EXECUTED, spec.action_size)).astype(np.float32))


def drive(pool: RolloutPool, chunks: list[FloatArray], actor: DenoisingMDP) -> tuple[list[ChunkStep], Rollout]:
    """A policy that acts elsewhere, and then one that acts in the pool."""
    with pool:
        pool.reset()
        return [pool.step_chunk(chunk) for chunk in chunks], pool.collect(actor, 2)


@pytest.fixture(scope="module")
def driven(spec, chunks, actor) -> tuple[list[ChunkStep], Rollout]:
    return drive(in_process(spec), chunks, actor)


def test_steps_of_a_policy_that_acts_elsewhere_are_the_environments(driven, chunks, spec):
    env = build(spec, env_seeds(SEED, N_ENVS))
    env.reset()
    for step, chunk in zip(driven[0], chunks, strict=True):
        assert_same_steps(step, env.step_chunk(chunk))
    np.testing.assert_array_equal(driven[1].observations[0], driven[0][-1].observation)


def assert_same_steps(one: ChunkStep, other: ChunkStep) -> None:
    for field in fields(ChunkStep):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), field.name)


def test_double_buffered_steps_are_the_same(driven, chunks, spec, actor):
    pool = InProcessPool(spec, N_ENVS, seed=SEED, slice_size=SLICE, double_buffer=True)
    steps, rollout = drive(pool, chunks, actor)
    for one, other in zip(steps, driven[0], strict=True):
        assert_same_steps(one, other)
    assert_same(rollout, driven[1])


def test_ray_steps_are_the_same(driven, chunks, ray, spec, actor):
    from dprl.rollout.ray_pool import RayPool

    pool = RayPool(spec, N_ENVS, num_workers=2, seed=SEED, slice_size=SLICE)
    steps, rollout = drive(pool, chunks, actor)
    for one, other in zip(steps, driven[0], strict=True):
        assert_same_steps(one, other)
    assert_same(rollout, driven[1])


def test_a_chunk_before_the_first_reset_is_refused(spec, chunks):
    with in_process(spec) as pool, pytest.raises(EnvError, match="step_chunk before reset"):
        pool.step_chunk(chunks[0])


def test_chunks_for_another_number_of_environments_are_refused(spec, chunks):
    with in_process(spec) as pool:
        pool.reset()
        for wrong in (chunks[0][:3], chunks[0][:, :0], chunks[0][..., :0], chunks[0][0]):
            with pytest.raises(EnvError, match=r"actions of shape .* expects \(8, executed steps, "):
                pool.step_chunk(wrong)
        pool.step_chunk(chunks[0])  # and nothing has happened


def test_an_evaluation_leaves_the_environments_where_they_are(reference, spec, actor):
    with in_process(spec) as pool:
        assert_same(pool.collect(actor, DECISIONS), reference.first)
        pool.evaluate(actor.policy, 3, 11)
        assert_same_state(pool.state(), reference.state)
        assert_same(pool.collect(actor, DECISIONS), reference.second)


@pytest.mark.full
@pytest.mark.parametrize(("episodes", "num_workers"), [(3, 1), (3, 4), (60, 1), (60, 4)])
def test_ray_evaluates_as_one_process_does(episodes, num_workers, ray, spec, actor):
    """Whatever the number of workers, and without touching the pool's own environments."""
    from dprl.rollout.ray_pool import RayPool

    expected = evaluate(actor.policy, spec, episodes, seed=11)
    with RayPool(spec, N_ENVS, num_workers=num_workers, seed=SEED, slice_size=SLICE) as pool:
        before = pool.collect(actor, 1), pool.state()
        progress: list[int] = []
        result = pool.evaluate(actor.policy, episodes, 11, on_progress=progress.append)
        assert replace(result, policy_latency_ms_p50=0.0) == replace(expected, policy_latency_ms_p50=0.0)
        assert sum(progress) == episodes
        assert_same_state(pool.state(), before[1])


def test_ray_guides_and_chooses_as_one_process_does(ray, spec, actor):
    """By a critic that is no part of the policy."""
    from dprl.rollout.ray_pool import RayPool

    critic = ChunkCritic(actor.policy, CriticConfig(hidden_size=32))
    guide, inference = ValueGuide(critic, 5.0, "through", "noise"), InferenceConfig(candidates=3)
    plain = evaluate(actor.policy, spec, 3, seed=11)
    expected = evaluate(actor.policy, spec, 3, seed=11, inference=inference, guide=guide, scorer=critic)
    assert expected.return_mean != plain.return_mean
    with RayPool(spec, N_ENVS, num_workers=2, seed=SEED, slice_size=SLICE) as pool:
        result = pool.evaluate(actor.policy, 3, 11, inference=inference, guide=guide, scorer=critic)
    assert replace(result, policy_latency_ms_p50=0.0) == replace(expected, policy_latency_ms_p50=0.0)


def test_restore_in_process_goes_on_exactly(reference, spec, actor):
    with in_process(spec) as pool:
        pool.restore(reference.state)
        assert_same_state(pool.state(), reference.state)
        assert_same(pool.collect(actor, DECISIONS), reference.second)


@pytest.mark.full
@pytest.mark.parametrize("make", ["in process", "on Ray"])
def test_a_used_pool_can_be_restored(make, ray, spec, actor, reference):
    """To what was before, and to the beginning; EnvPool's environments cannot go back."""
    from dprl.rollout.ray_pool import RayPool

    on_ray = partial(RayPool, num_workers=2)
    with (on_ray if make == "on Ray" else InProcessPool)(spec, N_ENVS, seed=SEED, slice_size=SLICE) as pool:
        beginning = pool.state()
        pool.collect(actor, DECISIONS)
        before = pool.state()
        pool.collect(actor, DECISIONS)
        pool.restore(before)
        assert_same(pool.collect(actor, DECISIONS), reference.second)
        pool.restore(beginning)
        assert_same_state(pool.state(), beginning)
        assert_same(pool.collect(actor, DECISIONS), reference.first)


def test_restore_of_an_unused_pool_starts_at_the_beginning(reference, spec, actor):
    with in_process(spec) as unused, in_process(spec) as pool:
        pool.restore(unused.state())
        assert_same(pool.collect(actor, DECISIONS), reference.first)


def test_restore_of_another_number_of_environments_is_refused(reference, spec):
    with InProcessPool(spec, 4, seed=SEED, slice_size=2) as pool, pytest.raises((EnvError, ConfigError), match="8"):
        pool.restore(reference.state)


@pytest.mark.parametrize("slice_size", [0, 3, 16, -2, 2.0, "2", True])
def test_slice_size_must_divide_the_environments(spec, slice_size):
    with pytest.raises(ConfigError, match=f"slice_size = {slice_size!r}: must (divide n_envs, which is 8|be a whole)"):
        in_process(spec, slice_size=slice_size)


def test_default_slice_is_the_largest_divisor_up_to_32():
    assert [checked_slice_size(n, None) for n in (1, 8, 32, 48, 64, 37)] == [1, 8, 32, 24, 32, 1]


def test_number_of_environments_must_be_stated(spec):
    with pytest.raises(ConfigError, match="n_envs = None"):
        InProcessPool(spec)


@pytest.mark.parametrize("n_envs", [0, -1, "8", 8.0])
def test_no_environments_are_refused(spec, n_envs):
    with pytest.raises(ConfigError, match=f"n_envs = {n_envs!r}"):
        InProcessPool(spec, n_envs)


def test_a_name_will_do(spec):
    with InProcessPool("Hopper-v5", 2, options=EnvOptions(max_episode_steps=10)) as pool:
        assert pool.spec == replace(spec, n_obs_steps=1)


@pytest.mark.parametrize("n_steps", [0, 2.0, None])
def test_no_decisions_are_refused(spec, actor, n_steps):
    with in_process(spec) as pool, pytest.raises(ConfigError, match=f"n_steps = {n_steps}"):
        pool.collect(actor, n_steps)


def test_a_policy_that_does_not_explore_is_no_actor(spec, actor):
    with in_process(spec) as pool, pytest.raises(ConfigError, match=r"actor = 'DiffusionPolicy': .* as DenoisingMDP"):
        pool.collect(actor.policy, 1)


@pytest.mark.parametrize("num_workers", [2, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 4))])
def test_ray_gives_the_same_rollouts(reference, on_ray, num_workers):
    collected = on_ray(num_workers)
    assert_same(collected.first, reference.first)
    assert_same(collected.second, reference.second)
    assert_same_state(collected.state, reference.state)


@pytest.mark.full
def test_rollouts_from_ray_may_be_changed_like_those_in_process(reference, on_ray):
    for collected in (reference, on_ray(1), on_ray(2)):
        frozen = [f.name for f in ARRAYS if not getattr(collected.first, f.name).flags.writeable]
        assert frozen == []


def test_restore_with_another_number_of_workers_goes_on_exactly(reference, on_ray, spec, actor):
    from dprl.rollout.ray_pool import RayPool

    with in_process(spec) as pool:
        pool.restore(on_ray(2).state)
        assert_same(pool.collect(actor, DECISIONS), reference.second)
    with RayPool(spec, N_ENVS, num_workers=1, seed=SEED, slice_size=SLICE) as pool:
        pool.restore(on_ray(2).state)
        assert_same(pool.collect(actor, DECISIONS), reference.second)


def test_too_many_workers_are_refused_with_the_arithmetic(ray, spec):
    from dprl.rollout.ray_pool import RayPool, WorkerOptions

    message = r"num_workers = 4: 4 workers x 2.5 CPUs each = 10, but Ray has .* CPUs"
    with pytest.raises(ConfigError, match=message):
        RayPool(spec, N_ENVS, num_workers=4, slice_size=SLICE, workers=WorkerOptions(cpus=2.5))
    assert ray.is_initialized(), "a Ray that was running before must go on"


@pytest.mark.parametrize("num_workers", [0, 3, 8, "2", None])
def test_workers_must_divide_the_slices(ray, spec, num_workers):
    from dprl.rollout.ray_pool import RayPool

    with pytest.raises(ConfigError, match=rf"num_workers = {num_workers!r}: .*(slice_size 2 = 4|whole)"):
        RayPool(spec, N_ENVS, num_workers=num_workers, slice_size=SLICE)


def test_what_workers_claim_is_no_dict(ray, spec):
    from dprl.rollout.ray_pool import RayEvaluator, RayPool

    for build_it in (partial(RayPool, spec, N_ENVS, num_workers=1), partial(RayEvaluator, spec)):
        with pytest.raises(ConfigError, match=r"workers = {'cpus': 1}: must be WorkerOptions"):
            build_it(workers={"cpus": 1})


def test_slice_size_must_divide_the_environments_on_ray(ray, spec):
    from dprl.rollout.ray_pool import RayPool

    with pytest.raises(ConfigError, match="slice_size = 3: must divide n_envs, which is 8"):
        RayPool(spec, N_ENVS, num_workers=1, slice_size=3)


@pytest.mark.full
def test_pool_can_follow_another_at_once(ray, spec):
    """A closed pool gives all its CPUs back."""
    from dprl.rollout.ray_pool import RayPool, WorkerOptions

    for _ in range(2):
        RayPool(spec, 2, num_workers=1, slice_size=2, workers=WorkerOptions(cpus=8)).close()
    assert ray.is_initialized(), "a Ray that was running before must go on"


def test_close_leaves_no_actors(ray, on_ray):
    on_ray(2)
    deadline = time.monotonic() + 20  # Ray counts what has ended a moment later
    while ray.available_resources().get("CPU", 0) < 8 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources().get("CPU", 0) == 8


# --- Every backend, and chunks, horizons and ends of all kinds.

BACKENDS: dict[str, Callable[[], EnvSpec]] = {
    "envpool, Meta-World": lambda: resolve(PUSH, EnvOptions(max_episode_steps=10)),
    "gymnasium, one after the other": lambda: resolve("Hopper-v5", EnvOptions(backend="gymnasium")),
    "gymnasium, a process each": lambda: resolve(
        "Hopper-v5", EnvOptions(backend="gymnasium", vectorization="async", max_episode_steps=10)
    ),
    "numpy": lambda: resolve("Avoid-v0", EnvOptions(max_episode_steps=10)),
    "numpy, images": lambda: resolve("AvoidPixels-v0", EnvOptions(max_episode_steps=10)),
    "stable-baselines3": lambda: vec_env.make_spec("tests.envs.test_vec_env:hopper", max_episode_steps=10),
}
PUSH = "metaworld/push-v3"


def random_actor(spec: EnvSpec, horizon: int = HORIZON, executed: int = EXECUTED) -> DenoisingMDP:
    network = MLPConfig(hidden_size=16)
    vision = VisionConfig("vit", vit=ViTConfig(n_layers=1, embedding_size=16, n_heads=2))
    config = DiffusionConfig(
        horizon=horizon, n_action_steps=executed, num_train_timesteps=4, denoiser=network, vision=vision
    )
    features = Features(spec.observation_size, spec.action_size, spec.cameras)
    return DenoisingMDP(DiffusionPolicy(features, config), 2, ExplorationConfig())


QUICK = "gymnasium, a process each"


@pytest.mark.parametrize("backend", [b if b == QUICK else pytest.param(b, marks=pytest.mark.full) for b in BACKENDS])
def test_ray_gives_the_same_on_every_backend(backend, ray):
    """With half the workers' slices elsewhere; the collections go over the ends of episodes."""
    from dprl.rollout.ray_pool import RayPool

    spec = BACKENDS[backend]()
    actor = random_actor(spec)
    expected = collect(InProcessPool(spec, 4, seed=SEED, slice_size=SLICE), actor)
    collected = collect(RayPool(spec, 4, num_workers=2, seed=SEED, slice_size=SLICE), actor)
    assert_same(collected.first, expected.first)
    assert_same(collected.second, expected.second)
    assert_same_state(collected.state, expected.state)


@pytest.mark.parametrize("plan", [(3, 2), *(pytest.param(plan, marks=pytest.mark.full) for plan in ((5, 1), (6, 6)))])
def test_a_share_does_not_depend_on_what_else_a_pool_has(plan):
    """To the bit. The strides of the noise decide how torch rounds: one collection in thirty differed by them."""
    actor, spec = random_actor(reach_spec(), *plan), reach_spec()
    for seed in range(60):
        whole = InProcessPool(spec, N_ENVS, seed=seed, slice_size=SLICE).collect(actor, 1)
        shares = Share(spec, seed, SLICE, 0, N_ENVS, 1).divided(N_ENVS // SLICE, "workers")
        assert_same(Rollout.concatenate([share.build().collect(actor, 1) for share in shares]), whole)


PLANS = st.integers(1, 6).flatmap(lambda horizon: st.tuples(st.just(horizon), st.integers(1, horizon)))


@pytest.mark.timeout(1200)
@pytest.mark.full
def test_workers_do_not_matter_for_any_chunks_and_ends(ray):
    from dprl.rollout.ray_pool import RayPool

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(PLANS, st.integers(1, 9), st.integers(1, 7), st.sampled_from([1, 2, 4]), st.integers(0, 2**20))
    def check(plan: tuple[int, int], limit: int, n_steps: int, num_workers: int, seed: int) -> None:
        spec = replace(reach_spec(), max_episode_steps=limit)
        actor = random_actor(spec, *plan)
        pools = (
            InProcessPool(spec, N_ENVS, seed=seed, slice_size=SLICE),
            RayPool(spec, N_ENVS, num_workers=num_workers, seed=seed, slice_size=SLICE),
        )
        rollouts = []
        for pool in pools:
            with pool:
                rollouts.append([pool.collect(actor, n_steps) for _ in range(2)])
        for ours, theirs in zip(*rollouts, strict=True):
            assert_same(ours, theirs)
            assert ours.n_steps.max() <= plan[1]

    check()

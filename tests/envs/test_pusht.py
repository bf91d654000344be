"""Push-T: exact repetition, gym-pusht's own numbers and images, and an expert that solves it."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from dprl.envs import pusht, pusht_env
from dprl.envs.collect import collect_episodes
from dprl.errors import EnvError, MissingDependencyError
from dprl.observations import STATE, take
from dprl.seeding import numpy_generator
from dprl.spec import EnvOptions, build, env_seeds

pytest.importorskip("gym_pusht", reason="Push-T needs gym-pusht: pip install '.[pusht]'")

KINDS = ("state", "keypoints", "pixels")
REPEATED = 2  # a seed whose coverage gym-pusht itself does not repeat
ACROSS = """
import sys
sys.path.insert(0, "")
from tests.envs.test_pusht import fingerprint
print(fingerprint(int(sys.argv[1])))
"""


def actions(seed: int, n: int) -> np.ndarray:
    """Random targets that often push the block."""
    rng = numpy_generator(seed, "test")
    return np.clip(np.cumsum(rng.normal(0, 60, (n, 2)), axis=0) % 512, 0, 512).astype(np.float32)


def rollout(env, seed: int, n: int = 60) -> list[list[np.ndarray]]:
    """What every step returns, as arrays; the first one is of the reset."""
    observation, info = env.reset(seed=seed)
    steps = [(observation, 0.0, False, info)]
    steps += [(o, r, t, i) for o, r, t, _, i in (env.step(action) for action in actions(seed, n))]
    return [
        [*(np.asarray(part) for part in (o.values() if isinstance(o, dict) else [o])), np.array([r, t, i["coverage"]])]
        for o, r, t, i in steps
    ]


def fingerprint(seed: int) -> str:
    digest = hashlib.sha256()
    for kind in KINDS:
        for step in rollout(pusht_env.make_single(kind), seed):
            for part in step:
                digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def assert_same(one: list[list[np.ndarray]], other: list[list[np.ndarray]]) -> None:
    for a, b in zip(one, other, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def spec(env_id: str = pusht.STATE_ID, **options):
    return pusht.make_spec(env_id, EnvOptions(**options))


def place(env, offset: float) -> float:
    """Put the block beside the goal and let a step pass; return its coverage."""
    env.reset(seed=0)
    env.unwrapped.agent.position = (30, 30)
    env.unwrapped.block.angle = pusht.GOAL_ANGLE
    env.unwrapped.block.position = (256 + offset, 256)
    _, reward, terminated, truncated, info = env.step([30, 30])
    assert info["is_success"] == terminated == (info["coverage"] > 0.95)
    assert reward == pytest.approx(min(info["coverage"] / 0.95, 1.0))
    assert not truncated
    return info["coverage"]


# --- Exactness.


@pytest.mark.parametrize("kind", KINDS)
def test_seed_and_actions_decide_everything(kind):
    """To the bit, rewards and images too, after other episodes and in another environment."""
    env = pusht_env.make_single(kind)
    first = rollout(env, REPEATED)
    for seed in (0, 1, 3):
        rollout(env, seed, 10)
        assert_same(rollout(env, REPEATED), first)
    assert_same(rollout(pusht_env.make_single(kind), REPEATED), first)
    assert not np.array_equal(rollout(env, 0, 0)[0][0], first[0][0])


def test_another_process_gets_the_same():
    run = subprocess.run([sys.executable, "-c", ACROSS, str(REPEATED)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == fingerprint(REPEATED)


@pytest.mark.parametrize("env_id", pusht.IDS)
def test_restored_environments_go_on_as_the_first_did(env_id, assert_same_step):
    seeds, chunk = env_seeds(0, 2), actions(4, 24).reshape(2, 12, 2)
    env = build(spec(env_id), seeds)
    env.reset()
    env.step_chunk(chunk[:, :8])
    state, expected = env.state(), env.step_chunk(chunk[:, 8:])
    other = build(spec(env_id), seeds)
    other.restore(state)
    assert_same_step(other.step_chunk(chunk[:, 8:]), expected)


# --- What gym-pusht says.


def test_it_is_gym_pushts_environment():
    from gym_pusht.envs.pusht import PushTEnv

    theirs, keypoints = PushTEnv("pixels_agent_pos"), PushTEnv("environment_state_agent_pos")
    ours = {kind: pusht_env.make_single(kind) for kind in KINDS}
    for env in (theirs, keypoints, *ours.values()):
        env.reset(seed=5)
    for action in actions(5, 30):
        pixels, reward, terminated, _, info = theirs.step(action)
        corners = keypoints.step(action)[0]
        results = {kind: env.step(action) for kind, env in ours.items()}
        for observation, our_reward, our_terminated, _, our_info in results.values():
            disc = observation[STATE][:2] if isinstance(observation, dict) else observation[:2]
            np.testing.assert_array_equal(disc, pixels["agent_pos"])
            np.testing.assert_array_equal(our_info["block_pose"], info["block_pose"])
            assert our_info["coverage"] == pytest.approx(info["coverage"], abs=1e-12)
            assert our_reward == pytest.approx(reward, abs=1e-12)
            assert our_terminated == terminated
        np.testing.assert_array_equal(results["pixels"][0][pusht.CAMERA.part], pixels["pixels"])
        np.testing.assert_array_equal(results["keypoints"][0][STATE][2:], corners["environment_state"])


def test_success_is_more_than_95_percent_of_the_goal():
    env = pusht_env.make_single("state")
    covered = [place(env, offset) for offset in (0, 1, 2, 3, 5, 40, 200)]
    assert covered == sorted(covered, reverse=True)
    assert covered[0] == pytest.approx(1)
    assert covered[1] > 0.95 > covered[3]
    assert covered[-1] == 0


def test_success_ends_the_episode():
    env = pusht_env.make_single("state")
    assert place(env, 0) > 0.95
    sparse, dense = spec(), spec(reward="dense")
    assert (sparse.reward, sparse.max_episode_steps) == ("sparse", 300)
    assert (dense.reward, dense.has_success) == ("dense", True)


@pytest.mark.parametrize("kind", KINDS)
def test_observations_lie_within_their_space(kind):
    env = pusht_env.make_single(kind)
    for seed in range(3):
        observation, _ = env.reset(seed=seed)
        for action in [*actions(seed, 20), *np.tile([(0, 0), (512, 512)], (5, 1))]:
            assert env.observation_space.contains(observation)
            observation = env.step(action)[0]


def test_spec_fits_the_environment():
    for env_id in pusht.IDS:
        env = build(spec(env_id), [0])
        observation = env.reset()
        state = observation if env_id == pusht.STATE_ID else take(observation, slice(None))
        if env_id == pusht.PIXELS_ID:
            assert state[pusht.CAMERA.part].shape == (1, 1, 96, 96, 3)
            state = state[STATE]
        assert state.shape == (1, 1, env.spec.observation_size)
        env.close()


def test_unknown_kind_is_refused():
    with pytest.raises(EnvError, match="state, keypoints or pixels, not as 'sound'"):
        pusht_env.make_single("sound")


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gym_pusht.envs.pusht", None)
    with pytest.raises(MissingDependencyError, match=r"gym-pusht.*\[pusht\]"):
        pusht_env.make_single("state")


# --- The expert.


@pytest.fixture(scope="module")
def expert():
    return pusht.PushingExpert()


def test_push_is_what_the_physics_does():
    """To 2 pixels and a hundredth of a radian, from any side."""
    env, rng = pusht_env.make_single("state"), np.random.default_rng(0)
    for seed in range(8):
        env.reset(seed=seed)
        block, disc = env.unwrapped.block, env.unwrapped.agent
        block.position, block.angle = (256, 256), rng.uniform(-3, 3)
        frame = pusht._Frame(np.array(block.local_to_world(block.center_of_gravity)), block.angle)
        turn = rng.uniform(0, 2 * np.pi)
        start = 120 * np.array([np.cos(turn), np.sin(turn)])
        aim = rng.uniform(-30, 30, 2) - start
        direction = aim / np.linalg.norm(aim)
        disc.position, disc.velocity = tuple(frame.world(start)), (0, 0)
        for k in range(30):
            env.step(frame.world(start + min(5.0 * (k + 1), 100.0) * direction))
        moved = frame.local(np.array(block.local_to_world(block.center_of_gravity)))
        predicted = pusht.push(start[None], direction[None], 2.0, 50)[0, -1]
        assert np.abs(predicted[:2] - moved).max() < 2
        assert abs(predicted[2] - (block.angle - frame.angle)) < 0.01


def test_expert_brings_the_block_closer(expert):
    """In a fifth of the time there is."""
    for seed in (4, 13):
        env = pusht_env.make_single("state")
        state, info = env.reset(seed=seed)
        most = before = info["coverage"]
        for _ in range(60):
            state, _, terminated, _, info = env.step(expert.act(state[None])[0])
            most = max(most, info["coverage"])
            if terminated:
                break
        assert most > before + 0.5


def test_expert_moves_its_target_smoothly_and_by_the_state_alone(expert):
    states = np.array([(100, 100, 300, 200, 1), (400, 400, 200, 300, 4), (256, 80, 250, 250, 0.9)], np.float32)
    chosen = expert.act(states)
    assert chosen.shape == (3, 2)
    assert chosen.dtype == np.float32
    assert np.linalg.norm(chosen - states[:, :2], axis=1).max() <= pusht.TRAVEL_LEAD + 1e-3
    np.testing.assert_array_equal(expert.act(states[::-1])[::-1], chosen)
    np.testing.assert_array_equal(pusht.scripted(pusht.PIXELS_ID).act(states), chosen)


def test_expert_acts_wherever_disc_and_block_are(expert):
    """In the walls, on top of each other: a finite target on the table."""
    rng = np.random.default_rng(0)
    states = np.column_stack([rng.uniform(0, 512, (30, 2)), rng.uniform(0, 512, (30, 2)), rng.uniform(0, 6.28, 30)])
    states[:5, :2] = states[:5, 2:4]
    chosen = expert.act(states)
    assert ((chosen >= 0) & (chosen <= 512)).all()


def test_demonstrations_are_the_same_whatever_is_observed(expert):
    """Experts see what is privileged, so the observations do not change what is played."""
    played = [collect_episodes(spec(i, max_episode_steps=12), expert, 5.0, 2, 0) for i in pusht.IDS]
    for episodes in played[1:]:
        np.testing.assert_array_equal(episodes.actions, played[0].actions)
        np.testing.assert_array_equal(episodes.observations[:, :2], played[0].observations[:, :2])
    assert played[2].images[pusht.CAMERA.part.rpartition(".")[2]].shape == (24, 96, 96, 3)


@pytest.mark.full
@pytest.mark.parametrize(("noise", "least"), [(0.0, 0.9), (10.0, 0.8)])
def test_expert_solves_the_task(expert, noise, least):
    assert collect_episodes(spec(), expert, noise, 20, seed=0).success_rate >= least

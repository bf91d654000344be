"""Avoid: what ends an episode, what is seen, and an expert that goes either way."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from dprl.data import Episodes
from dprl.envs import avoid
from dprl.envs.collect import collect_episodes
from dprl.envs.experts import make_expert
from dprl.errors import ConfigError
from dprl.observations import STATE, take
from dprl.spec import EnvOptions, build, env_seeds, make, resolve

LOCAL, SCENE = (camera.part for camera in avoid.CAMERAS)


def demonstrations(env_id: str, n: int = 100, noise: float = 0.1, seed: int = 0) -> Episodes:
    return collect_episodes(resolve(env_id), make_expert("scripted", env_id), noise, n, seed)


def paths(data: Episodes) -> list[np.ndarray]:
    return [
        np.concatenate([data.observations[start:end], data.final_observations[i : i + 1]])
        for i, (start, end) in enumerate(zip(data.starts, data.ends, strict=True))
    ]


def obstacles(data: Episodes) -> np.ndarray:
    simulator = avoid.Avoid([int(seed) for seed in data.seeds], pixels=data.env_id == avoid.PIXELS_ID)
    simulator.reset(np.arange(data.n_episodes), np.zeros(data.n_episodes, np.int64))
    return simulator.obstacle


def place(position: tuple[float, float], *, pixels: bool = False) -> avoid.Avoid:
    """One point there; the disc in the middle; with pixels the goal at x = 0.5."""
    simulator = avoid.Avoid([0], pixels=pixels)
    simulator.reset(np.array([0]), np.array([0]))
    simulator.position[0], simulator.obstacle[0] = position, (0.0, 0.0)
    if pixels:
        simulator.goal[0] = 0.5
    return simulator


UP, LEFT, RIGHT = (0.0, 1.0), (-1.0, 0.0), (1.0, 0.0)


@pytest.mark.parametrize(
    ("position", "action", "pixels", "terminated", "success"),
    [
        ((0.0, -0.5), UP, False, False, False),
        ((0.0, -0.34), UP, False, True, False),  # the disc
        ((-0.96, 0.0), LEFT, False, True, False),  # out of the world
        ((0.9, 0.76), UP, False, False, True),  # the line
        ((0.9, 0.76), RIGHT, False, False, False),
        ((0.5, 0.76), UP, True, False, True),  # the goal
        ((0.64, 0.76), UP, True, False, True),
        ((0.66, 0.76), UP, True, True, False),  # the line beside it
    ],
)
def test_what_ends_an_episode(position, action, pixels, terminated, success):
    step = place(position, pixels=pixels).step(np.array([0]), np.array([action], np.float32))
    assert (step.terminated[0], step.success[0]) == (terminated, success)
    assert step.reward[0] == pytest.approx(0.05 * action[1])


def test_specs():
    state, pixels = resolve("Avoid-v0"), resolve("AvoidPixels-v0")
    assert (state.observation_size, state.action_size, state.max_episode_steps) == (2, 2, 100)
    assert (state.reward, state.has_success, state.cameras) == ("sparse", True, ())
    assert pixels.cameras == avoid.CAMERAS
    assert resolve("Avoid-v0", EnvOptions(reward="dense", max_episode_steps=7)).max_episode_steps == 7
    with pytest.raises(ConfigError, match="backend = 'envpool': EnvPool here has no 'Avoid-v0'"):
        resolve("Avoid-v0", EnvOptions(backend="envpool"))


def test_episodes_start_where_they_should_and_each_elsewhere():
    env = make("Avoid-v0", 50)
    first, second = env.reset()[:, -1], env.reset()[:, -1]
    for start in (first, second):
        assert (np.abs(start[:, 0]) <= 0.25).all()
        assert (start[:, 1] == np.float32(-0.8)).all()
    assert len(np.unique(np.concatenate([first, second])[:, 0])) == 100


def test_success_ends_with_reward_one_and_a_crash_with_none():
    env = make("Avoid-v0", 1)
    env.reset()
    crash = env.step_chunk(np.tile(np.float32(UP), (1, 100, 1)), autoreset=False)
    assert (crash.terminated[0], crash.success[0], crash.reward[0]) == (True, False, 0)
    env.reset()
    around = [RIGHT] * 12 + [UP] * 40
    step = env.step_chunk(np.float32([around]), autoreset=False)
    assert (step.terminated[0], step.success[0], step.reward[0]) == (True, True, 1)


@pytest.mark.parametrize("env_id", avoid.IDS)
def test_an_episode_depends_on_its_seed_and_number_alone(env_id, assert_same, assert_same_step):
    spec = resolve(env_id)
    many, few = build(spec, env_seeds(3, 4)), build(spec, env_seeds(3, 2, first=2))
    assert_same(take(many.reset(), [2, 3]), few.reset())
    rng = np.random.default_rng(0)
    for _ in range(8):
        actions = rng.uniform(-1, 1, (4, 5, 2)).astype(np.float32)
        assert_same_step(many.step_chunk(actions), few.step_chunk(actions[2:]), [2, 3])


@pytest.mark.parametrize("env_id", avoid.IDS)
def test_restore_goes_on_exactly(env_id, assert_same, assert_same_step):
    original, restored = make(env_id, 3, n_obs_steps=2), make(env_id, 3, n_obs_steps=2)
    original.reset()
    rng = np.random.default_rng(0)
    for _ in range(6):
        step = original.step_chunk(rng.uniform(-1, 1, (3, 4, 2)).astype(np.float32))
    assert_same(restored.restore(original.state()), step.observation)
    actions = rng.uniform(-1, 1, (3, 4, 2)).astype(np.float32)
    assert_same_step(original.step_chunk(actions), restored.step_chunk(actions))


@pytest.mark.parametrize("env_id", avoid.IDS)
def test_expert_succeeds_on_both_sides(env_id):
    data = demonstrations(env_id)
    assert data.success_rate >= 0.97
    sides = [avoid.mode(path, *obstacle) for path, obstacle in zip(paths(data), obstacles(data), strict=True)]
    assert 35 <= sides.count("left") <= 65  # ± 3 standard errors
    assert sides.count("none") == 0


def test_the_side_does_not_show_before_the_swerve_nor_follow_from_the_start():
    data = demonstrations("Avoid-v0", 300, noise=0.0)
    sides = np.array([avoid.mode(path) == "left" for path in paths(data)])
    before = data.observations[:, 1] < -avoid.DECISION - 1e-3
    np.testing.assert_array_equal(data.actions[before], np.tile(np.float32(UP), (before.sum(), 1)))
    starts = data.observations[data.starts, 0]
    assert abs(np.corrcoef(starts, sides)[0, 1]) < 0.17  # 3 standard errors
    assert abs(sides.mean() - 0.5) < 0.09


def test_expert_keeps_clear_of_the_disc():
    for path in paths(demonstrations("Avoid-v0", 20)):
        assert np.linalg.norm(path, axis=1).min() > avoid.RADIUS + 0.05


def test_mode():
    left = np.array([[0, -0.8], [-0.5, -0.1], [-0.4, 0.1], [0.5, 0.8]])
    assert avoid.mode(left) == "left"
    assert avoid.mode(left * [-1, 1]) == "right"
    assert avoid.mode(left, obstacle_x=-0.45) == "right"
    assert avoid.mode(left, obstacle_y=0.2) == "right", "at y = 0.8, the first place above"
    assert avoid.mode(left[:2]) == "none"


def test_disc_and_goal_are_drawn_anew_and_are_not_in_the_state():
    env = avoid.build(resolve("AvoidPixels-v0"), list(range(200)))
    observation = env.reset()
    assert observation[STATE].shape == (200, 1, 2)
    shown = env.privileged(np.arange(200))
    assert shown.shape == (200, 6)
    np.testing.assert_array_equal(shown[:, :2], observation[STATE][:, -1])
    for column, spread in ((2, 0.25), (3, 0.2), (4, 0.6)):
        assert 0.8 * spread < np.abs(shown[:, column]).max() <= spread
    env.reset()
    assert (env.privileged(np.arange(200))[:, 2:5] != shown[:, 2:5]).all()


def centre_of(channel: np.ndarray) -> tuple[float, float]:
    """(x, y) of what is drawn in a channel of the scene, in the world."""
    pixels = 2 / channel.shape[0] * (np.arange(channel.shape[0]) + 0.5) - 1
    weight = channel.astype(float) * (channel > 150)
    return (weight.sum(0) @ pixels) / weight.sum(), -(weight.sum(1) @ pixels) / weight.sum()


def test_scene_shows_everything_where_it_is():
    position, obstacle = np.array([[-0.52, -0.4]]), np.array([[0.2, 0.1]])
    image = avoid.draw(position, obstacle, np.array([-0.3]))[0]
    assert image.shape == (48, 48, 3)
    np.testing.assert_allclose(centre_of(image[..., 0]), obstacle[0], atol=0.01)
    np.testing.assert_allclose(centre_of(image[..., 1]), (-0.3, avoid.FINISH), atol=0.02)
    np.testing.assert_allclose(centre_of(image[..., 2]), position[0], atol=0.03)
    area = (image[10:, :, 0] / 255).sum() * (2 / 48) ** 2  # below the line
    assert area == pytest.approx(np.pi * avoid.RADIUS**2, rel=0.02), "anti-aliased"


def test_local_image_is_centred_on_the_point():
    for position in ([0.0, -0.8], [0.3, 0.25], [-0.95, 0.7]):
        point = np.array([position])
        image = avoid.draw(point, np.zeros((1, 2)), np.array([np.nan]), centre=point, half_width=0.4)[0]
        assert (image[23:25, 23:25, 2] == 255).all()
    outside = image[:, 0]
    assert (outside > 0).all(), "the world's edge shows"


def test_images_of_an_environment_are_those_of_its_state():
    env = make("AvoidPixels-v0", 2)
    env.reset()
    step = env.step_chunk(np.full((2, 3, 2), 0.5, np.float32))
    shown = env.privileged(np.arange(2)).astype(float)
    expected = avoid.draw(shown[:, :2], shown[:, 2:4], shown[:, 4])
    difference = np.abs(step.observation[SCENE][:, -1].astype(int) - expected)
    assert difference.max() <= 1, "the state is rounded to float32"
    assert step.observation[LOCAL].shape == (2, 1, 48, 48, 3)


@pytest.mark.parametrize("env_id", avoid.IDS)
def test_gymnasium_environment(env_id):
    env = gymnasium.make(f"dprl/{env_id}", render_mode="rgb_array")
    check_env(env.unwrapped)
    env.reset(seed=1)
    assert env.render().shape == (240, 240, 3)
    spec = resolve(f"dprl/{env_id}")
    assert (spec.observation_size, spec.max_episode_steps, spec.has_success) == (2, 100, True)
    assert spec.cameras == resolve(env_id).cameras

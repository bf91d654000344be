"""Point mazes: walls hold, pieces are what is demonstrated, and the task is solved by whoever knows the whole route."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from dprl.envs import maze
from dprl.envs.collect import collect_episodes
from dprl.envs.experts import make_expert
from dprl.spec import EnvOptions, env_seeds, resolve

TASKS = [env_id for env_id in maze.IDS if maze.PIECES not in env_id]
ONLY = np.array([0])


def demonstrations(env_id, n=60, noise=0.3):
    return collect_episodes(resolve(env_id), make_expert("scripted", env_id), noise, n, 0)


def at(place, env_id="PointMaze-Halves-v0"):
    simulator = maze.PointMaze([0], env_id)
    simulator.reset(ONLY, ONLY)
    row, column = simulator.layout.place(place)
    simulator.position[0] = column, row
    return simulator


@pytest.mark.parametrize("env_id", TASKS)
def test_who_knows_the_route_solves_the_task(env_id):
    assert demonstrations(env_id, 20).success_rate == 1


@pytest.mark.parametrize("env_id", TASKS)
def test_no_demonstration_shows_the_whole_route(env_id):
    layout = maze.layout_of(env_id)
    data = demonstrations(env_id.replace("-v0", "-Pieces-v0"), 200)
    begin = np.rint(data.observations[data.starts])[:, ::-1].astype(int)
    from_task = (begin == layout.place(layout.begin)).all(axis=1)
    assert not data.success[from_task].any()
    assert data.terminated.all()  # in a dead end, or at the goal
    shares = {b: share for b, _, share in layout.pieces}
    assert from_task.mean() == pytest.approx(shares[layout.begin], abs=0.12)
    last = [share for _, end, share in layout.pieces if end == layout.goal]
    assert data.success.mean() == pytest.approx(sum(last), abs=0.1)


@pytest.mark.parametrize("env_id", maze.IDS)
def test_walls_hold(env_id):
    """Whatever one does."""
    simulator, rng = maze.PointMaze(env_seeds(0, 4), env_id), np.random.default_rng(0)
    every, free = np.arange(4), simulator.layout.free
    simulator.reset(every, every)
    for _ in range(300):
        simulator.step(every, rng.uniform(-1, 1, (4, 2)).astype(np.float32))
        column, row = np.rint(simulator.position).astype(int).T
        assert free[row, column].all()


@pytest.mark.parametrize(
    ("place", "action", "terminated", "success"),
    [("G", (0, 0), False, True), ("W", (0, 0), True, False), ("S", (1, 0), False, False), ("T", (0, 1), False, False)],
)
def test_what_ends_an_episode(place, action, terminated, success):
    step = at(place).step(ONLY, np.array([action], np.float32))
    assert (bool(step.terminated[0]), bool(step.success[0])) == (terminated, success)


def test_a_step_goes_as_far_as_walls_let_it():
    simulator = at("S")
    for _ in range(20):
        simulator.step(ONLY, np.array([[1.0, -0.5]], np.float32))
    assert simulator.position[0].tolist() == pytest.approx([3.4, 0.6], abs=0.11)


def test_the_dense_reward_sums_to_the_way():
    layout = maze.layout_of("PointMaze-Halves-v0")
    spec = resolve("PointMaze-Halves-v0", EnvOptions(reward="dense"))
    data = collect_episodes(spec, make_expert("scripted", "PointMaze-Halves-v0"), 0.0, 3, 0)
    assert data.returns.tolist() == [len(layout.route(layout.begin, layout.goal)) - 1] * 3


def test_episodes_follow_from_their_seed():
    seeds = env_seeds(0, 3)
    starts = [maze.PointMaze(seeds, "PointMaze-Thirds-Pieces-v0").reset(np.arange(3), np.full(3, e)) for e in (4, 4, 5)]
    assert np.array_equal(starts[0], starts[1])
    assert not np.array_equal(starts[0], starts[2])


@pytest.mark.parametrize("env_id", maze.IDS)
def test_as_a_single_gymnasium_environment(env_id):
    env = gymnasium.make(f"dprl/{env_id}", render_mode="rgb_array")
    check_env(env.unwrapped, skip_render_check=True)
    env.reset(seed=0)
    image = env.render()
    assert image.shape == (*(16 * size for size in maze.layout_of(env_id).free.shape), 3)
    assert env.spec.max_episode_steps == resolve(env_id).max_episode_steps

"""Images through the environment layer: chunks, histories, restoring, collecting, and Gymnasium's nested spaces."""

from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest

from dprl.envs import catalogue, rendering
from dprl.envs.chunked import ChunkedEnv, SimulatorStep
from dprl.envs.collect import collect_episodes
from dprl.envs.experts import make_expert
from dprl.errors import ConfigError, EnvError
from dprl.observations import IMAGES, STATE
from dprl.spec import BatchedEnv, Camera, EnvOptions, EnvSpec, build, env_seeds, resolve

TOP, WRIST = Camera("top", 3, 4), Camera("wrist", 2, 2, channels=1)
SPEC = EnvSpec("fake", "tests.envs.test_images:build_fake", "", 2, (-1.0,), (1.0,), 6, cameras=(TOP, WRIST))
BLIND = replace(SPEC, observation_size=0)


class Fake:
    """Every part says which environment, episode and step it is of; environment 1 ends its first episode at step 2."""

    def __init__(self, n: int, with_state: bool = True) -> None:
        self.with_state = with_state
        self.episode, self.steps = np.full(n, -1), np.zeros(n, int)

    def reset(self, indices, episodes):
        self.episode[indices], self.steps[indices] = episodes, 0
        return self.observe(indices)

    def step(self, indices, actions):
        self.steps[indices] += 1
        no = np.zeros(len(indices), bool)
        ends = (indices == 1) & (self.episode[indices] == 0) & (self.steps[indices] == 2)
        return SimulatorStep(self.observe(indices), np.ones(len(indices)), ends, no, no)

    def observe(self, indices) -> dict[str, np.ndarray]:
        number = 100 * indices + 10 * self.episode[indices] + self.steps[indices]
        images = {c.part: np.broadcast_to(np.uint8(number)[:, None, None, None], (len(indices), *c.shape)).copy()
                  for c in (TOP, WRIST)}  # fmt: skip
        state = np.stack([number, -number], axis=1).astype(np.float64)
        return {STATE: state, **images} if self.with_state else images

    def close(self):
        pass


def build_fake(spec: EnvSpec, seeds: list[int], num_threads: int = 0) -> ChunkedEnv:
    return ChunkedEnv(spec, Fake(len(seeds), with_state=spec.observation_size > 0), seeds)


def make_fake(spec: EnvSpec = SPEC, n: int = 2) -> ChunkedEnv:
    return build_fake(spec, list(range(n)))


def acts(n: int, n_actions: int) -> np.ndarray:
    return np.zeros((n, n_actions, 1), np.float32)


def shown(observation) -> list[list[int]]:
    """What the history of each environment shows, read off its parts, which must agree."""
    top = observation[TOP.part]
    assert top.dtype == np.uint8
    assert top.shape[2:] == TOP.shape
    numbers = top[..., 0, 0, 0]
    for part in observation.values():
        np.testing.assert_array_equal(part.reshape(*numbers.shape, -1)[..., 0].astype(int), numbers)
    return numbers.tolist()


@pytest.mark.parametrize("spec", [SPEC, BLIND], ids=["with state", "images alone"])
def test_history_final_observation_and_reset(spec):
    env = make_fake(replace(spec, n_obs_steps=3))
    first = env.reset()
    assert (STATE in first) == (spec.observation_size > 0)
    assert shown(first) == [[0, 0, 0], [100, 100, 100]]
    step = env.step_chunk(acts(2, 4))
    assert shown(step.final_observation) == [[2, 3, 4], [100, 101, 102]]
    assert shown(step.observation) == [[2, 3, 4], [110, 110, 110]]
    assert shown(env.step_chunk(acts(1, 1), np.array([1])).observation) == [[110, 110, 111]]


def test_chunk_equals_single_steps(step_singly, assert_same_step, assert_same):
    chunked, single = make_fake(), make_fake()
    assert_same(chunked.reset(), single.reset())
    for _ in range(4):
        assert_same_step(chunked.step_chunk(acts(2, 3)), step_singly(single, acts(2, 3)))


def test_restore_goes_on_exactly(assert_same, assert_same_step):
    spec = replace(SPEC, n_obs_steps=2)
    original, restored = make_fake(spec), make_fake(spec)
    original.reset()
    for _ in range(2):
        step = original.step_chunk(acts(2, 2))
    assert_same(restored.restore(original.state()), step.observation)
    assert_same_step(original.step_chunk(acts(2, 3)), restored.step_chunk(acts(2, 3)))


def test_results_do_not_change_when_the_environment_goes_on():
    env = make_fake()
    first = env.reset()
    step = env.step_chunk(acts(2, 1))
    env.step_chunk(acts(2, 1))
    assert shown(first) == [[0], [100]]
    assert shown(step.observation) == [[1], [101]]


@pytest.mark.parametrize(
    ("part", "wrong", "message"),
    [
        (TOP.part, None, "the observation has observation.state, .*wrist, but not observation.images.top"),
        (TOP.part, np.zeros((2, 3, 4, 3)), r"observation.images.top is float64 \(2, 3, 4, 3\); the spec says uint8"),
        (TOP.part, np.zeros((2, 4, 3, 3), np.uint8), r".*top is uint8 \(2, 4, 3, 3\); the spec .* \(2, 3, 4, 3\)"),
        (STATE, np.zeros((2, 3)), r"observation.state is float32 \(2, 3\); the spec says float32 \(2, 2\)"),
        (STATE, np.full((2, 2), np.nan), "observation is not finite in environment 0"),
    ],
)  # fmt: skip
def test_what_the_spec_does_not_say_is_refused(part, wrong, message, monkeypatch):
    fake = Fake(2)
    observe = fake.observe

    def broken(indices):
        parts = observe(indices) | {part: wrong}
        return {name: value for name, value in parts.items() if value is not None}

    monkeypatch.setattr(fake, "observe", broken)
    with pytest.raises(EnvError, match=f"fake: {message}"):
        ChunkedEnv(SPEC, fake, [0, 1]).reset()


@pytest.mark.parametrize("spec", [SPEC, BLIND], ids=["with state", "images alone"])
def test_collected_episodes_have_the_images_that_actions_saw(spec):
    class Expert:
        def act(self, observation):
            assert observation.shape[1] == spec.observation_size
            return np.zeros((len(observation), 1), np.float32)

    data = collect_episodes(spec, Expert(), noise=0.1, n_episodes=2, seed=0)
    assert data.lengths.tolist() == [6, 2]
    assert data.observations.shape == (8, spec.observation_size)
    assert data.images["top"].shape == (8, 3, 4, 3)
    assert data.final_images["wrist"].shape == (2, 2, 2, 1)
    assert data.images["top"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 100, 101]
    assert data.final_images["top"][:, 0, 0, 0].tolist() == [6, 102]
    rows = np.array([[0, 1], [6, 7]])
    assert shown(data.observe(rows)) == [[0, 1], [100, 101]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cameras": (TOP, TOP)}, "cameras = .*'top', 'top'.*different names"),
        ({"cameras": (WRIST, TOP)}, "cameras = .*'wrist', 'top'.*in alphabetical order"),
        ({"cameras": (), "observation_size": 0}, "observation_size = 0: must be at least 1"),
        ({"observation_size": -1}, "observation_size = -1: must be at least 0"),
    ],
)
def test_wrong_specs_are_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        replace(SPEC, **changed)


@pytest.mark.parametrize(
    ("camera", "message"),
    [
        (("a b", 3, 4), "name = 'a b': must be of letters"),
        (("", 3, 4), "name = ''"),
        (("top", 0, 4), "height = 0: must be at least 1"),
        (("top", 3, 4, 4), "channels = 4: must be 1 or 3"),
    ],
)
def test_wrong_cameras_are_refused(camera, message):
    with pytest.raises(ConfigError, match=message):
        Camera(*camera)


def test_zero_observation():
    assert replace(SPEC, cameras=()).zero_observation(5, 2).shape == (5, 2, 2)
    zeros = SPEC.zero_observation(5)
    assert {name: part.shape for name, part in zeros.items()} == {
        STATE: (5, 2), TOP.part: (5, 3, 4, 3), WRIST.part: (5, 2, 2, 1)
    }  # fmt: skip
    assert list(BLIND.zero_observation(1)) == [TOP.part, WRIST.part]


box = gymnasium.spaces.Box
IMAGE, GREY, NUMBERS = (box(0, 255, (3, 4, 3), np.uint8), box(0, 255, (2, 2, 1), np.uint8),
                        box(-1000, 1000, (1, 2), np.float64))  # fmt: skip
SPACES = {
    "Dict": gymnasium.spaces.Dict({"b": NUMBERS, "cam/top": IMAGE, "in": gymnasium.spaces.Dict({"wrist": GREY}),
                                   "a": gymnasium.spaces.Discrete(3)}),
    "Tuple": gymnasium.spaces.Tuple((NUMBERS, IMAGE)),
    "Image": IMAGE,
    "Privileged": gymnasium.spaces.Dict({"seen": NUMBERS, "privileged": box(-1000, 1000, (3,))}),
}  # fmt: skip


class Spaced(gymnasium.Env):
    """Fills every member of its observation space with the number of the step."""

    def __init__(self, kind: str) -> None:
        self.observation_space, self.action_space = SPACES[kind], box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(self.observation_space), {}

    def step(self, action):
        self.steps += 1
        return self.observe(self.observation_space), 0.0, False, False, {}

    def observe(self, space) -> Any:
        if isinstance(space, gymnasium.spaces.Dict):
            return {name: self.observe(member) for name, member in space.items()}
        if isinstance(space, gymnasium.spaces.Tuple):
            return tuple(map(self.observe, space))
        if isinstance(space, gymnasium.spaces.Discrete):
            return self.steps % 3
        return np.full(space.shape, self.steps, space.dtype)


@pytest.fixture(scope="module", autouse=True)
def _registered():
    names = {kind: f"dprl-test/{kind}Images-v0" for kind in SPACES}
    for kind, name in names.items():
        gymnasium.register(name, Spaced, max_episode_steps=5, kwargs={"kind": kind})
    yield
    for name in names.values():
        del gymnasium.registry[name]


def make_spaced(kind: str, **options) -> BatchedEnv:
    return build(resolve(f"dprl-test/{kind}Images-v0", EnvOptions(**options)), env_seeds(0, 2))


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_dict_space_has_cameras_and_a_flat_state(vectorization):
    env = make_spaced("Dict", vectorization=vectorization)
    assert env.spec.cameras == (Camera("cam_top", 3, 4), Camera("in_wrist", 2, 2, 1))
    assert env.spec.observation_size == 5
    env.reset()
    observation = env.step_chunk(acts(2, 1)).observation
    assert observation[STATE][:, -1].tolist() == [[0, 1, 0, 1, 1]] * 2, "a is one of three, b two numbers"
    assert (observation[IMAGES + "cam_top"] == 1).all()
    assert observation[IMAGES + "in_wrist"].shape == (2, 1, 2, 2, 1)
    only = env.step_chunk(acts(1, 2), np.array([1])).observation
    assert (only[IMAGES + "cam_top"] == 3).all()
    assert (env.step_chunk(acts(2, 1)).observation[IMAGES + "cam_top"][:, 0, 0, 0, 0] == [2, 4]).all()
    env.close()


def test_tuple_space():
    env = make_spaced("Tuple")
    assert (env.spec.observation_size, env.spec.cameras) == (2, (Camera("1", 3, 4),))
    assert env.reset()[IMAGES + "1"].shape == (2, 1, 3, 4, 3)


def test_a_plain_image_is_the_camera_pixels():
    env = make_spaced("Image")
    assert (env.spec.observation_size, env.spec.cameras) == (0, (Camera("pixels", 3, 4),))
    assert list(env.reset()) == [IMAGES + "pixels"]
    assert env.privileged(np.arange(2)) is None


def test_a_privileged_member_is_shown_to_experts_alone():
    env = make_spaced("Privileged")
    assert (env.spec.observation_size, env.spec.cameras) == (2, ())
    assert env.reset().shape == (2, 1, 2)
    env.step_chunk(acts(2, 4))
    assert env.privileged(np.array([1])).tolist() == [[4, 4, 4]]


def test_restore_of_a_gymnasium_environment(assert_same):
    original, restored = make_spaced("Dict"), make_spaced("Dict")
    original.reset()
    step = original.step_chunk(acts(2, 3))
    assert_same(restored.restore(original.state()), step.observation)


def test_metaworld_with_pixels_resolves_without_rendering():
    names = catalogue.METAWORLD_PIXELS
    assert len(set(names)) == 50
    spec = resolve("metaworld/push-v3-pixels")
    assert (spec.observation_size, spec.action_size, spec.has_success) == (4, 4, True)
    assert spec.cameras == (Camera("corner2", 84, 84),)
    with pytest.raises(ConfigError, match="EnvPool here has no 'metaworld/push-v3-pixels'"):
        resolve("metaworld/push-v3-pixels", EnvOptions(backend="envpool"))


def test_metaworld_with_pixels():
    pytest.importorskip("metaworld")
    if rendering.find_backend() is None:
        pytest.skip("no GL library")
    spec = resolve("metaworld/push-v3-pixels")
    env = build(spec, env_seeds(0, 1))
    first = env.reset()
    assert first[STATE].shape == (1, 1, 4)
    image = first[IMAGES + "corner2"][0, -1]
    assert image.shape == (84, 84, 3)
    assert image.std() > 20
    wood = (image[..., 0] > image[..., 2].astype(int) + 20) & (image[..., 0] < 200)
    assert wood[50:].mean() > wood[:20].mean(), "the table is below the wall"
    shown = env.privileged(np.array([0]))
    assert shown.shape == (1, 39)
    np.testing.assert_array_equal(shown[:, :4], first[STATE][:, -1])
    action = make_expert("scripted", spec.id).act(shown)
    assert (env.step_chunk(action[:, None]).observation[IMAGES + "corner2"][0, -1] != image).any()
    env.close()

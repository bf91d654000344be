"""Avoid: a point must reach a line behind a disc, to the left of it or to the right. Nothing to install, fast.

The demonstrations go either way with equal chance and nothing tells which beforehand, not even where the point starts:
half of those that start on the left cross over to the right. Where they part, the average of what they do leads into
the disc.

``Avoid-v0`` observes the point (x, y); the disc stands still. In ``AvoidPixels-v0`` disc and goal are elsewhere in
every episode and the state is the point alone, so that they must be seen.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dprl.envs.chunked import ChunkedEnv, SimulatorStep
from dprl.observations import STATE, Camera, Observation
from dprl.seeding import numpy_generator
from dprl.spec import EnvOptions, EnvSpec, FloatArray, IntArray

STATE_ID, PIXELS_ID = IDS = ("Avoid-v0", "AvoidPixels-v0")

# The world is [-1, 1] x [-1, 1].
SPEED = 0.05  # per step and axis
RADIUS = 0.3  # of the disc
START, START_SPREAD = (0.0, -0.8), 0.25
FINISH = 0.8  # y of the line
GOAL_HALF_WIDTH = 0.15
OBSTACLE_SPREAD, GOAL_SPREAD = (0.25, 0.2), 0.6
MAX_EPISODE_STEPS = 100
LIMITS = -1 - SPEED, 1 + SPEED
"""Of x and y."""
PICTURE_SIZE = 240

IMAGE_SIZE = 48
LOCAL_HALF_WIDTH = 0.4
CAMERAS = LOCAL, SCENE = (Camera("local", IMAGE_SIZE, IMAGE_SIZE), Camera("scene", IMAGE_SIZE, IMAGE_SIZE))
POINT_RADIUS, LINE_HALF_HEIGHT, GOAL_HALF_HEIGHT = 0.05, 0.02, 0.05
OUTSIDE_GREY, LINE_GREY = 0.25, 0.5

CLEARANCE = 0.42  # how far the expert keeps from the disc's centre
DECISION = 0.47  # how far below the disc's centre it leaves the straight way
PULL = 5.0  # back to the clearance

Points = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]
Numbers = npt.NDArray[Any]


def make_spec(env_id: str, options: EnvOptions) -> EnvSpec:
    """Return the spec of one of `IDS`."""
    return EnvSpec(
        id=env_id,
        builder="dprl.envs.avoid:build",
        backend_id=env_id,
        observation_size=2,
        action_low=(-1.0, -1.0),
        action_high=(1.0, 1.0),
        max_episode_steps=options.max_episode_steps or MAX_EPISODE_STEPS,
        reward=options.reward or "sparse",
        has_success=True,
        cameras=CAMERAS if env_id == PIXELS_ID else (),
    )


def build(spec: EnvSpec, seeds: list[int], num_threads: int = 0) -> ChunkedEnv:
    """Build one environment per seed; `num_threads` is not used."""
    return ChunkedEnv(spec, Avoid(seeds, pixels=spec.backend_id == PIXELS_ID), seeds)


class Avoid:
    """N points. An episode depends on its environment's seed and its number alone.

    An action (2,) in [-1, 1] moves the point by 0.05 of it. Crossing the line is a success, in ``AvoidPixels-v0`` only
    within the goal; crossing it elsewhere, touching the disc or leaving the world ends the episode without one; where
    it is counts at the end of each step, not between. The dense reward is the progress in y.
    """

    def __init__(self, seeds: list[int], *, pixels: bool) -> None:
        n = len(seeds)
        self._seeds = seeds
        self._pixels = pixels
        self.position: Points = np.zeros((n, 2))
        """(N, 2)."""
        self.obstacle: Points = np.zeros((n, 2))
        """(N, 2) the disc's centre."""
        self.goal: Points = np.full(n, np.nan)
        """(N,) x of the goal's centre; NaN where the whole line is the goal."""
        self.side = np.ones(n)
        """(N,) -1 or 1, drawn anew for every episode: the side on which an expert passes."""

    def reset(self, indices: IntArray, episodes: IntArray) -> Observation:
        """See `Simulator.reset`."""
        for index, episode in zip(indices, episodes, strict=True):
            rng = numpy_generator(self._seeds[index], "avoid", int(episode))
            self.position[index] = START[0] + rng.uniform(-START_SPREAD, START_SPREAD), START[1]
            self.side[index] = rng.choice((-1.0, 1.0))
            if self._pixels:
                self.obstacle[index] = rng.uniform(-1, 1, 2) * OBSTACLE_SPREAD
                self.goal[index] = rng.uniform(-GOAL_SPREAD, GOAL_SPREAD)
        return self._observe(indices)

    def step(self, indices: IntArray, actions: FloatArray) -> SimulatorStep:
        """See `Simulator.step`."""
        self.position[indices] += SPEED * actions
        position, goal = self.position[indices], self.goal[indices]
        crossed = position[:, 1] >= FINISH
        in_goal = np.isnan(goal) | (np.abs(position[:, 0] - goal) <= GOAL_HALF_WIDTH)
        touched = np.linalg.norm(position - self.obstacle[indices], axis=1) <= RADIUS
        failed = touched | (np.abs(position) > 1).any(axis=1) | (crossed & ~in_goal)
        no = np.zeros(len(indices), np.bool_)
        return SimulatorStep(self._observe(indices), SPEED * actions[:, 1], failed, no, crossed & ~failed)

    def privileged(self, indices: IntArray) -> FloatArray:
        """Return (n, 6): the point's x and y, the disc's, x of the goal (or the point's, if all is goal), the side."""
        position, goal = self.position[indices], self.goal[indices]
        aim = np.where(np.isnan(goal), position[:, 0], goal)
        return np.column_stack([position, self.obstacle[indices], aim, self.side[indices]]).astype(np.float32)

    def close(self) -> None:
        """Nothing to free."""

    def picture(self) -> Pixels:
        """Draw the first point's world: (240, 240, 3)."""
        picture: Pixels = draw(self.position[:1], self.obstacle[:1], self.goal[:1], size=PICTURE_SIZE)[0]
        return picture

    def _observe(self, indices: IntArray) -> Observation:
        position = self.position[indices]
        state = position.astype(np.float32)
        if not self._pixels:
            return state
        obstacle, goal = self.obstacle[indices], self.goal[indices]
        return {
            STATE: state,
            LOCAL.part: draw(position, obstacle, goal, centre=position, half_width=LOCAL_HALF_WIDTH),
            SCENE.part: draw(position, obstacle, goal),
        }


def draw(
    position: Points,
    obstacle: Points,
    goal: Points,
    *,
    centre: Points | None = None,
    half_width: float = 1.0,
    size: int = IMAGE_SIZE,
) -> Pixels:
    """Draw n worlds, anti-aliased: the disc red, the goal green, the point blue, the line and the outside grey.

    Args:
        position: (n, 2) of the point.
        obstacle: (n, 2) of the disc.
        goal: (n,) x of the goal's centre; NaN: draw none.
        centre: (n, 2) of the image. Default: the world's.
        half_width: from there to the image's edges.
        size: height and width of the image, pixels.

    Returns:
        (n, size, size, 3) uint8, the top row first.
    """
    pixel = 2 * half_width / size
    offsets = np.linspace(-half_width + pixel / 2, half_width - pixel / 2, size)
    centre = np.zeros_like(position) if centre is None else centre
    x, y = centre[:, :1] + offsets, centre[:, 1:] - offsets  # (n, size) of the columns and of the rows

    def cover(depth: Numbers) -> Numbers:
        """How much is covered of a pixel, 0 to 255, whose centre lies `depth` inside an edge."""
        covered: Numbers = np.clip(depth / pixel + 0.5, 0, 1).astype(np.float32) * 255
        return covered

    def disc(middle: Points, radius: float) -> Numbers:
        dx, dy = ((axis - middle[:, [i]]).astype(np.float32) for i, axis in enumerate((x, y)))
        return cover(np.float32(radius) - np.sqrt((dx**2)[:, None, :] + (dy**2)[:, :, None]))

    in_goal = cover(GOAL_HALF_WIDTH - np.abs(x - np.where(np.isnan(goal), np.inf, goal)[:, None])) / 255
    beside_goal = cover(GOAL_HALF_HEIGHT - np.abs(y - FINISH))
    columns = OUTSIDE_GREY * cover(np.abs(x) - 1)
    rows = np.maximum(OUTSIDE_GREY * cover(np.abs(y) - 1), LINE_GREY * cover(LINE_HALF_HEIGHT - np.abs(y - FINISH)))
    grey = np.maximum(columns.astype(np.uint8)[:, None, :], rows.astype(np.uint8)[:, :, None])
    image = np.empty((len(position), size, size, 3), np.uint8)
    colours = disc(obstacle, RADIUS), in_goal[:, None, :] * beside_goal[:, :, None], disc(position, POINT_RADIUS)
    for channel, colour in enumerate(colours):
        image[..., channel] = np.maximum(colour.astype(np.uint8), grey)
    return image


class ScriptedExpert:
    """Straight up until close below the disc, then round it on the episode's side, then to the line or the goal."""

    def act(self, observation: npt.NDArray[np.float32]) -> FloatArray:
        """Return actions (n, 2) of length 1 for what `Avoid.privileged` shows, (n, 6)."""
        position, obstacle, aim, side = np.split(np.asarray(observation, np.float64), [2, 4, 5], axis=1)
        away = position - obstacle
        distance = np.linalg.norm(away, axis=1, keepdims=True)
        tangent = side * np.column_stack([-away[:, 1], away[:, 0]])
        around = (tangent + PULL * (CLEARANCE - distance) * away) / distance
        onward = np.column_stack([aim, np.full(len(aim), FINISH + SPEED)]) - position
        free = (onward * away).sum(axis=1, keepdims=True) >= 0  # it leads away from the disc
        undecided = away[:, 1:] < -DECISION
        direction = np.where(undecided, (0.0, 1.0), np.where(free, onward, around))
        action: FloatArray = (direction / np.linalg.norm(direction, axis=1, keepdims=True)).astype(np.float32)
        return action


def scripted(env_id: str) -> ScriptedExpert:
    """Build the expert, which is the same for all `IDS`."""
    return ScriptedExpert()


def mode(path: Numbers, obstacle_x: float = 0.0, obstacle_y: float = 0.0) -> Literal["left", "right", "none"]:
    """Return the side on which a trajectory (T, 2) passed the disc: where it was when first at its centre's height."""
    passed = np.flatnonzero(path[:, 1] >= obstacle_y)
    if path[:, 1].max() < obstacle_y + RADIUS:
        return "none"
    return "left" if path[passed[0], 0] < obstacle_x else "right"

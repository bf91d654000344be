"""Episodes of several policies from the same start states, on the `metaworld` package's own environments.

That package's environments render offscreen (EnvPool's do not without a GL context of their own). Where no GL library
can be loaded the episodes are played all the same, without frames.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from dprl.envs import rendering
from dprl.envs.catalogue import METAWORLD
from dprl.errors import EnvError, MissingDependencyError
from dprl.policy import DiffusionPolicy, PredictState
from dprl.seeding import derive_seed, torch_generator
from dprl.spec import EnvSpec, FloatArray

N_STARTS = 3
N_FRAMES = 24
RENDER_SIZE = (400, 300)  # width, height
CROP_CORNER = (100, 95)  # left, top
FRAME_SIZE = (200, 150)
SECONDS_PER_FRAME = 0.15
Frame = npt.NDArray[np.uint8]


@dataclass
class Episode:
    """One episode as it was played."""

    observations: FloatArray
    """(T+1, D)."""
    success: bool
    frames: list[Frame] = field(default_factory=list)
    """(height, width, 3), every few steps; empty without rendering."""


def record(policies: dict[str, DiffusionPolicy], spec: EnvSpec, seed: int, file: Path) -> dict[str, list[Episode]]:
    """Play `N_STARTS` episodes with every policy from the same start states; write them tiled as a GIF.

    Args:
        policies: one row of tiles each, under this name.
        spec: a Meta-World task.
        seed: of the start states.
        file: the GIF to write, where this machine can render.

    Raises:
        EnvError: not a Meta-World task.
        MissingDependencyError: the `metaworld` package or Pillow is not installed.
    """
    if spec.id not in METAWORLD:
        raise EnvError(f"videos are made of Meta-World tasks only so far, not of '{spec.id}'")
    render = rendering.find_backend() is not None
    from dprl.envs import metaworld_env  # needs gymnasium

    camera = metaworld_env.Camera(*RENDER_SIZE) if render else None
    env: Any = metaworld_env.SeededMetaWorld(spec.id.removeprefix("metaworld/"), camera)
    every = max(1, spec.max_episode_steps // N_FRAMES)
    try:
        episodes = {
            name: [_play(policy, env, spec, derive_seed(seed, "video", i), every, render) for i in range(N_STARTS)]
            for name, policy in policies.items()
        }
    finally:
        env.close()
    if render:
        _write_gif(episodes, file)
    return episodes


def _play(policy: DiffusionPolicy, env: Any, spec: EnvSpec, seed: int, every: int, render: bool) -> Episode:
    observation, _ = env.reset(seed=seed & 0x7FFFFFFF)
    observations, frames, success = [observation], [], False
    generator = torch_generator(seed, "video noise")
    state: PredictState | None = None
    for step in range(spec.max_episode_steps):
        if render and step % every == 0:
            frames.append(_frame(env))
        action, state = policy.predict(observation, state, np.array([step == 0]), generator=generator)
        observation, _, _, _, info = env.step(np.clip(action, -1.0, 1.0))
        observations.append(observation)
        if info["success"]:
            success = True
            break
    if render:
        frames.append(_frame(env))
    return Episode(np.asarray(observations, np.float32), success, frames)


def _frame(env: Any) -> Frame:
    """Render, turn upright (this camera hangs upside down) and cut out the part of the table where things happen."""
    left, top = CROP_CORNER
    width, height = FRAME_SIZE
    return cast("Frame", np.flipud(env.render())[top : top + height, left : left + width])


def _write_gif(episodes: dict[str, list[Episode]], file: Path) -> None:
    """One row of tiles per policy; an episode that ended stands still, framed green where it succeeded."""
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise MissingDependencyError("pillow", "plots", "writing a GIF") from error
    width, height = FRAME_SIZE
    images = []
    for i in range(max(len(e.frames) for row in episodes.values() for e in row)):
        canvas = Image.new("RGB", (width * N_STARTS, height * len(episodes)))
        draw = ImageDraw.Draw(canvas)
        for y, (name, row) in enumerate(episodes.items()):
            for x, episode in enumerate(row):
                corner = (x * width, y * height)
                canvas.paste(Image.fromarray(episode.frames[min(i, len(episode.frames) - 1)]), corner)
                if episode.success and i >= len(episode.frames) - 1:
                    box = (corner[0], corner[1], corner[0] + width - 1, corner[1] + height - 1)
                    draw.rectangle(box, outline=(0, 200, 0), width=4)
            draw.text((6, y * height + 4), name, fill=(255, 255, 255))
        images.append(canvas.quantize(64))
    durations = [int(1000 * SECONDS_PER_FRAME)] * (len(images) - 1) + [1500]
    images[0].save(file, save_all=True, append_images=images[1:], duration=durations, loop=0)

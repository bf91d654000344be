"""Anything registered with Gymnasium, through `gymnasium.vector`.

An observation space without images is flattened to one array of numbers. Of one with images (uint8 boxes of height,
width and 1 or 3 channels, alone or in a Dict or Tuple) each image becomes a camera, and all else is flattened to the
state, in the space's order. A member of a Dict that is called ``privileged`` is shown to experts alone.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np

from dprl.envs.chunked import ChunkedEnv, RaisedInsideError, SimulatorStep, episode_seed, succeeded
from dprl.errors import EnvError, MissingDependencyError
from dprl.observations import STATE, Camera, Observation, camera_name, state_of, take
from dprl.spec import EnvSpec, FloatArray, IntArray, load

try:
    import gymnasium
except ImportError as error:
    raise MissingDependencyError("gymnasium", "envs", "running environments") from error

PRIVILEGED = "privileged"
CLOSE_TIMEOUT_S = 5.0
"""What a step that was interrupted may still take when its processes are closed."""

Path = tuple[Any, ...]
Space = gymnasium.Space[Any]


def build(spec: EnvSpec, seeds: list[int], num_threads: int = 0) -> ChunkedEnv:
    """Build one environment per seed; `num_threads` is not used (see `EnvSpec.vectorization`)."""
    return ChunkedEnv(spec, GymnasiumSimulator(spec, seeds), seeds)


def to_carry(spec: EnvSpec) -> Callable[[], object]:
    """Return what registers the environment elsewhere: code that only this process has run may have registered it.

    What has an id like ``module:Name-v0`` registers itself.
    """
    own = {name: known for name, known in gymnasium.registry.items() if name == spec.backend_id}
    return partial(_register, own)


def _register(known: dict[str, Any]) -> None:
    for name, registration in known.items():
        gymnasium.registry.setdefault(name, registration)


def make_single(backend_id: str, max_episode_steps: int | None = None) -> gymnasium.Env[Any, Any]:
    """Build one plain environment: a Gymnasium id, or ``module:function!argument`` that returns one.

    Raises:
        EnvError: Gymnasium cannot build it.
    """
    if "!" in backend_id:
        reference, argument = backend_id.split("!")
        return cast("gymnasium.Env[Any, Any]", load(reference)(argument))
    try:
        return gymnasium.make(backend_id, max_episode_steps=max_episode_steps)
    except Exception as error:  # any package may fail in any way while it builds its environment
        remedy = "" if ":" in backend_id else f"; 'module:{backend_id}' names the module that registers it, too"
        raise EnvError(f"Gymnasium cannot make '{backend_id}': {error}{remedy}") from error


@dataclass(frozen=True)
class Layout:
    """Which members of an observation space are what; a member is a path of keys and the space found there."""

    state: tuple[tuple[Path, Space], ...]
    images: tuple[tuple[Path, Camera], ...]
    privileged: tuple[tuple[Path, Space], ...]

    @staticmethod
    def of(space: Space) -> Layout:
        """Find the images and what is privileged; all else is state."""
        state, images, privileged = [], [], []
        for path, member in _members(space):
            if path[:1] == (PRIVILEGED,):
                privileged.append((path, member))
            elif _is_image(member):
                images.append((path, Camera(camera_name("_".join(map(str, path))), *cast("Any", member.shape))))
            else:
                state.append((path, member))
        return Layout(tuple(state), tuple(sorted(images, key=lambda image: image[1].name)), tuple(privileged))

    @property
    def cameras(self) -> tuple[Camera, ...]:
        """One for each image, in alphabetical order."""
        return tuple(camera for _, camera in self.images)

    @property
    def state_size(self) -> int:
        """D.

        Raises:
            EnvError: a member cannot be flattened to numbers.
        """
        return sum(_flat_size(space) for _, space in self.state)


def _members(space: Space, path: Path = ()) -> Iterator[tuple[Path, Space]]:
    """Every leaf of nested Dict and Tuple spaces."""
    if not isinstance(space, gymnasium.spaces.Dict | gymnasium.spaces.Tuple):
        yield path, space
        return
    items = space.items() if isinstance(space, gymnasium.spaces.Dict) else enumerate(space)
    for key, member in items:
        yield from _members(member, (*path, key))


def _is_image(space: Space) -> bool:
    shape = space.shape or ()
    return (
        isinstance(space, gymnasium.spaces.Box) and space.dtype == np.uint8 and len(shape) == 3 and shape[2] in (1, 3)
    )


def _flat_size(space: Space) -> int:
    flat = gymnasium.spaces.flatten_space(space)
    if not isinstance(flat, gymnasium.spaces.Box) or len(flat.shape) != 1:
        raise EnvError(f"the observation space {space} cannot be flattened to numbers")
    return flat.shape[0]


class Held(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Stands still where the action is NaN, so that a vector environment can step a subset.

    Episode ends travel in the info, where the vector environment does not act on them, and success under one key,
    whatever the environment calls it. What the environment raises says which one it was, by its `index`.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], index: int) -> None:
        super().__init__(env)
        self._index = index
        self._members = [(path, space.shape) for path, space in _members(env.observation_space)]
        self._observation: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset and remember the observation."""
        with self._named():
            observation, _ = self.env.reset(seed=seed, options=options)
            self._observation = self._checked(observation)
        return self._observation, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step, or stand still."""
        if np.isnan(action[0]):
            return self._observation, 0.0, False, False, {}
        space = cast("Any", self.env.action_space)
        with self._named():
            result = self.env.step(np.asarray(action, space.dtype).reshape(space.shape))
            observation, reward, terminated, truncated, info = result
            self._observation, reward = self._checked(observation), float(reward)
            success = succeeded(info)
        ends = {"dprl_terminated": bool(terminated), "dprl_truncated": bool(truncated), "dprl_success": success}
        return self._observation, reward, False, False, ends

    def _checked(self, observation: Any) -> Any:
        """Return it, if all its members have their shapes: of many environments' together one could not tell whose."""
        for path, expected in self._members:
            given = np.shape(_at(observation, path))
            if expected is not None and given != expected:
                where = f" in {list(path)}" if path else ""
                raise ValueError(f"an observation of shape {given}, not {expected}{where}")
        return observation

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise RaisedInsideError(self._index, f"{type(error).__name__}: {error}") from error


class Parted(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Divides observations into the named parts of `dprl.observations`, and what is privileged."""

    def __init__(self, env: gymnasium.Env[Any, Any], layout: Layout) -> None:
        super().__init__(env)
        self._layout = layout
        self._numbers = {STATE: layout.state, PRIVILEGED: layout.privileged}
        spaces: dict[str, Space] = {}
        for name, members in self._numbers.items():
            size = sum(_flat_size(space) for _, space in members)
            if size:
                spaces[name] = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        for camera in layout.cameras:
            spaces[camera.part] = gymnasium.spaces.Box(0, 255, camera.shape, np.uint8)
        self.observation_space = gymnasium.spaces.Dict(spaces)

    def observation(self, observation: Any) -> dict[str, Any]:
        """Return the parts, numbers as float32."""
        parts = {camera.part: _at(observation, path) for path, camera in self._layout.images}
        for name, members in self._numbers.items():
            if name in cast("Any", self.observation_space).spaces:
                flat = [np.ravel(cast("Any", gymnasium.spaces.flatten(s, _at(observation, p)))) for p, s in members]
                parts[name] = np.concatenate(flat).astype(np.float32)
        return parts


def _at(observation: Any, path: Path) -> Any:
    for key in path:
        observation = observation[key]
    return observation


class Flat(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Flattens or divides observations (see the module) and declares a flat float32 action that may be NaN."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        layout = Layout.of(env.observation_space)
        divided = bool(layout.images or layout.privileged)
        super().__init__(Parted(env, layout) if divided else gymnasium.wrappers.FlattenObservation(env))
        size = int(np.prod(cast("Any", env.action_space).shape))
        self.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)


class GymnasiumSimulator:
    """`gymnasium.vector` with automatic resets off: episodes are seeded one by one, so any of them can be replayed."""

    def __init__(self, spec: EnvSpec, seeds: list[int]) -> None:
        builder = os.getpid()

        def make(index: int) -> gymnasium.Env[Any, Any]:
            if os.getpid() != builder:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's interrupt is for the parent
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever the parent does at it
            return Flat(Held(make_single(spec.backend_id, spec.max_episode_steps), index))

        vector = gymnasium.vector.SyncVectorEnv if spec.vectorization == "sync" else gymnasium.vector.AsyncVectorEnv
        mode = gymnasium.vector.AutoresetMode.DISABLED
        self._env: Any = vector([partial(make, index) for index in range(len(seeds))], autoreset_mode=mode)
        self._seeds = seeds
        self._has_cameras = bool(spec.cameras)
        self._started = np.zeros(len(seeds), np.bool_)
        self._latest: Any = None
        self._is_broken = False

    def reset(self, indices: IntArray, episodes: IntArray) -> Observation:
        """Reset each environment with the seed of its episode."""
        seeds: list[int | None] = [None] * len(self._seeds)
        for index, episode in zip(indices, episodes, strict=True):
            seeds[index] = episode_seed(self._seeds[index], int(episode))
        mask = np.zeros(len(seeds), np.bool_)
        mask[indices] = True
        if not self._started.all():  # gymnasium.vector must see every environment once before it takes a mask
            mask[~self._started] = True
            self._started[:] = True
        with self._asking():
            self._latest, _ = self._env.reset(seed=seeds, options={"reset_mask": mask})
        return self._observe(indices)

    def step(self, indices: IntArray, actions: FloatArray) -> SimulatorStep:
        """Step the environments `indices`; the others stand still."""
        padded = np.full((len(self._seeds), actions.shape[1]), np.nan, np.float32)
        padded[indices] = actions
        with self._asking():
            self._latest, reward, _, _, info = self._env.step(padded)
        terminated, truncated, success = (
            np.asarray(info[f"dprl_{key}"], np.bool_)[indices] for key in ("terminated", "truncated", "success")
        )
        return SimulatorStep(self._observe(indices), reward[indices], terminated, truncated, success)

    def privileged(self, indices: IntArray) -> FloatArray | None:
        """Return the part ``privileged`` of the latest observation, if there is one."""
        if not isinstance(self._latest, dict) or PRIVILEGED not in self._latest:
            return None
        return np.asarray(self._latest[PRIVILEGED][indices], np.float32)

    def _observe(self, indices: IntArray) -> Observation:
        parts = take(self._latest, indices)
        observation: Observation = parts if self._has_cameras else state_of(parts)
        return observation

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):  # a process has died; it may take a while until it counts as dead
            self._is_broken = True
            raise

    def close(self) -> None:
        """Close all environments and their processes, also those whose fellow has died."""
        close_processes(self._env, CLOSE_TIMEOUT_S, broken=self._is_broken)


def close_processes(env: Any, timeout_s: float | None = None, *, broken: bool = False) -> None:
    """Close a vector environment; end its processes first where that fails, is interrupted, or cannot go well.

    It cannot where one of them has died: what others have answered, and was read, would be waited for again, for ever.

    Raises:
        EnvError: it could not.
    """
    processes = getattr(env, "processes", ())
    try:
        unwell = broken or not all(process.is_alive() for process in processes)
        if processes and unwell and not getattr(env, "closed", False):
            raise EnvError("its processes were ended: one had died, or was interrupted")
        env.close(**({} if timeout_s is None else {"timeout": timeout_s}))
    except BaseException:
        for process in processes:
            process.kill()
            process.join()
        env.closed = True  # it asks nobody again when it is collected
        raise

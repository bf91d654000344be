"""stable-baselines3's `VecEnv` as a backend.

A `VecEnv` resets an environment by itself when its episode ends; the episodes here begin with resets of their own, each
seeded by its number. It cannot step a subset: while a chunk is executed, an environment whose episode has ended takes
zero actions, and is reset after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import numpy as np

from dprl.envs.chunked import ChunkedEnv, RaisedInsideError, SimulatorStep, episode_seed, succeeded
from dprl.envs.gymnasium import close_processes
from dprl.errors import EnvError, check
from dprl.observations import Observation
from dprl.spec import EnvSpec, FloatArray, IntArray, RewardKind, env_seeds, load

HARMLESS = ("VecMonitor", "VecCheckNan")
"""Wrappers that leave observations and actions as they are."""


class VecEnv(Protocol):
    """What is needed of `stable_baselines3.common.vec_env.VecEnv`."""

    num_envs: int
    observation_space: Any
    action_space: Any

    def step(self, actions: Any) -> tuple[Any, Any, Any, list[dict[str, Any]]]: ...

    def reset(self) -> Any: ...

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]: ...

    def close(self) -> None: ...


def from_vec_env(
    env: VecEnv,
    *,
    max_episode_steps: int,
    name: str = "vec-env",
    reward: RewardKind = "dense",
    has_success: bool = False,
    n_obs_steps: int = 1,
    replayable: bool = True,
    seed: int = 0,
) -> ChunkedEnv:
    """Take a `VecEnv` as a batched environment.

    Args:
        env: e.g. ``make_vec_env("Hopper-v5", n_envs=8)``. Wrappers that change observations, such as `VecNormalize` and
            `VecFrameStack`, are refused: policies normalise by themselves, and see `n_obs_steps` observations.
        max_episode_steps: after which an episode is truncated, if it has not ended before.
        name: for messages and data sets.
        reward: the environment's own (dense), or 1 at the first success (sparse).
        has_success: whether infos have ``is_success`` or ``success``.
        n_obs_steps: how many of the latest observations a policy sees.
        replayable: whether an episode repeats itself from its seed and actions.
        seed: of the episodes.

    Raises:
        ConfigError: it is no `VecEnv`.
        EnvError: spaces that are not flat boxes, or a wrapper that changes observations.
    """
    _require_vec_env("env", env)
    spec = _spec(
        env, "", "", max_episode_steps, name, reward,
        has_success=has_success, n_obs_steps=n_obs_steps, replayable=replayable,
    )  # fmt: skip
    seeds = env_seeds(seed, env.num_envs)
    return ChunkedEnv(spec, VecEnvSimulator(env, seeds), seeds)


def make_spec(
    reference: str,
    *,
    max_episode_steps: int,
    name: str | None = None,
    reward: RewardKind = "dense",
    has_success: bool = False,
    n_obs_steps: int = 1,
    replayable: bool = True,
) -> EnvSpec:
    """Return the spec of what the function `reference` (``module:function``) makes: a `VecEnv` of n environments.

    With a spec, any number of them can be built, and on Ray's workers too. See `from_vec_env`.

    Raises:
        ConfigError: the function cannot be loaded, or makes no `VecEnv`.
    """
    env: VecEnv = load(reference)(1)
    _require_vec_env(reference, env)
    try:
        return _spec(
            env, "dprl.envs.vec_env:build", reference, max_episode_steps, name or reference, reward,
            has_success=has_success, n_obs_steps=n_obs_steps, replayable=replayable,
        )  # fmt: skip
    finally:
        env.close()


def build(spec: EnvSpec, seeds: list[int], num_threads: int = 0) -> ChunkedEnv:
    """Build one environment per seed; `num_threads` is not used."""
    env: VecEnv = load(spec.backend_id)(len(seeds))
    try:
        return ChunkedEnv(spec, VecEnvSimulator(env, seeds), seeds)
    except BaseException:
        with suppress(Exception):
            close_processes(env, broken=True)
        raise


def _require_vec_env(what: str, env: object) -> None:
    needed = ("num_envs", "observation_space", "action_space", "env_method", "step", "reset", "close")
    missing = [name for name in needed if not hasattr(env, name)]
    remedy = f"must be a VecEnv, as make_vec_env('Hopper-v5', n_envs=8) makes one; it lacks {', '.join(missing)}"
    check(not missing, what, type(env).__name__, remedy)


def _spec(
    env: VecEnv,
    builder: str,
    backend_id: str,
    max_episode_steps: int,
    name: str,
    reward: RewardKind,
    *,
    has_success: bool,
    n_obs_steps: int,
    replayable: bool,
) -> EnvSpec:
    outermost: Any = env
    while hasattr(outermost, "venv"):
        kind = type(outermost).__name__
        if kind not in HARMLESS:
            raise EnvError(
                f"{name}: a VecEnv in {kind} is not taken: it stands between the policy and its environments"
            )
        outermost = outermost.venv
    sizes = []
    for what in ("observation_space", "action_space"):
        space = getattr(env, what)
        if len(getattr(space, "shape", None) or ()) != 1 or not np.issubdtype(space.dtype, np.floating):
            raise EnvError(f"{name}: its {what} is {space}; it must be a flat Box of numbers")
        sizes.append(space.shape[0])
    return EnvSpec(
        id=name,
        builder=builder,
        backend_id=backend_id,
        observation_size=sizes[0],
        action_low=tuple(map(float, env.action_space.low)),
        action_high=tuple(map(float, env.action_space.high)),
        max_episode_steps=max_episode_steps,
        reward=reward,
        has_success=has_success,
        n_obs_steps=n_obs_steps,
        serial=True,
        replayable=replayable,
    )


class VecEnvSimulator:
    """Single steps of a `VecEnv`."""

    def __init__(self, env: VecEnv, seeds: list[int]) -> None:
        self._env = env
        self._seeds = seeds
        self._spoiled = np.zeros(len(seeds), np.bool_)  # it took zero actions in a step that was not meant for it
        self._zero = np.zeros((len(seeds), *env.action_space.shape), env.action_space.dtype)
        self._asked = False  # something of which it has not answered yet
        env.reset()  # some step only after it

    def reset(self, indices: IntArray, episodes: IntArray) -> Observation:
        """Reset each environment with the seed of its episode."""
        first = []
        for index, episode in zip(indices, episodes, strict=True):
            seed = episode_seed(self._seeds[index], int(episode))
            try:
                with self._answering():
                    (result,) = self._env.env_method("reset", seed=seed, indices=[int(index)])
            except EnvError:
                raise
            except Exception as error:
                raise RaisedInsideError(int(index), f"{type(error).__name__}: {error}") from error
            first.append(result[0])
        self._spoiled[indices] = False
        observation: Observation = np.stack(first)
        return observation

    def step(self, indices: IntArray, actions: FloatArray) -> SimulatorStep:
        """Step the environments `indices`.

        Raises:
            EnvError: one was left out of an earlier step, in the middle of its episode.
        """
        if self._spoiled[indices].any():
            raise EnvError("a VecEnv steps all its environments at once: one that was left out must be reset")
        idle = np.ones(len(self._seeds), np.bool_)
        idle[indices] = False
        self._spoiled |= idle
        everything = self._zero.copy()
        everything[indices] = actions
        with self._answering():
            observation, reward, ended, infos = self._env.step(everything)
        observation, ended = np.array(observation)[indices], np.asarray(ended, np.bool_)[indices]
        infos = [infos[index] for index in indices]
        for row in np.flatnonzero(ended):
            observation[row] = infos[row]["terminal_observation"]
        cut = np.array([bool(info.get("TimeLimit.truncated", False)) for info in infos])
        success = np.array([succeeded(info) for info in infos])
        return SimulatorStep(observation, np.asarray(reward)[indices], ended & ~cut, ended & cut, success)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Ask one thing at a time: after an interrupt the next answer would be the last question's."""
        if self._asked:
            raise EnvError("a call was interrupted before this VecEnv had answered: make a new one")
        self._asked = True
        yield
        self._asked = False

    def close(self) -> None:
        """Close it, also where one of its processes has died."""
        close_processes(self._env, broken=self._asked)

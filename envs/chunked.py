"""Chunk execution, the same for every simulator: sum, record, stop at an episode's end, never act past it.

A simulator supplies `Simulator`: single steps of any subset of its environments. All bookkeeping is here.
Shapes: n environments stepped, N in all, E executed actions, A action size, O observation steps, D observation size.
What is written (..., D) is a dict of parts where the task has cameras, see `dprl.observations`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from dprl.errors import DprlError, EnvActionError, EnvError, EnvFaultError, LocatedEnvError
from dprl.observations import STATE, Observation, map_parts, put, take
from dprl.seeding import derive_seed
from dprl.spec import BoolArray, ChunkStep, EnvSpec, EnvState, FloatArray, IntArray, check_actions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SimulatorStep:
    """One step of n environments: (n, D) or (n,) arrays."""

    observation: Observation
    reward: npt.NDArray[Any]
    terminated: BoolArray
    truncated: BoolArray
    success: BoolArray


class Simulator(Protocol):
    """Single steps of any subset of environments. Never resets by itself."""

    def reset(self, indices: IntArray, episodes: IntArray) -> Observation:
        """Start episode number `episodes[i]` of environment `indices[i]`; return (n, D)."""
        ...

    def step(self, indices: IntArray, actions: FloatArray) -> SimulatorStep:
        """Step environment `indices[i]` with `actions[i]`."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Privileged(Protocol):
    """Knows more than it observes. A simulator that has this method shows it to experts, and never to a policy."""

    def privileged(self, indices: IntArray) -> FloatArray | None:
        """Return what experts of the task act on (n, P); None: the latest state."""
        ...


SUCCESS_KEYS = ("success", "is_success")


def succeeded(info: Mapping[str, Any]) -> bool:
    """Whether an environment's info says so, by either of the names in use."""
    return any(float(info.get(key) or 0.0) > 0.5 for key in SUCCESS_KEYS)


def episode_seed(seed: int, episode: int) -> int:
    """Return the 31-bit seed that episode number `episode` of the environment seeded `seed` is reset with."""
    return derive_seed(seed, "episode", episode) & 0x7FFFFFFF


class RaisedInsideError(Exception):
    """What a simulator may raise to say which of its environments, by its number, raised what."""

    def __init__(self, index: int | RaisedInsideError, what: str = "") -> None:
        # gymnasium.vector raises a process's error as `type(error)(error)`
        made_of = index.args if isinstance(index, RaisedInsideError) else (index, what)
        self.index, self.what = cast("tuple[int, str]", made_of)
        super().__init__(self.index, self.what)


class ChunkedEnv:
    """A `BatchedEnv` over any `Simulator`."""

    def __init__(self, spec: EnvSpec, simulator: Simulator, seeds: list[int]) -> None:
        n = len(seeds)
        self.spec = spec
        self._simulator = simulator
        self._seeds = seeds
        self._low = np.asarray(spec.action_low, np.float32)
        self._high = np.asarray(spec.action_high, np.float32)
        self._history = spec.zero_observation(n, spec.n_obs_steps)
        self._episode = np.full(n, -1, np.int64)
        self._open = np.zeros(n, np.bool_)
        self._length = np.zeros(n, np.int64)
        self._return = np.zeros(n, np.float32)
        self._actions = np.zeros((n, spec.max_episode_steps, spec.action_size), np.float32)

    @property
    def n_envs(self) -> int:
        """N."""
        return len(self._seeds)

    def reset(self, indices: IntArray | None = None) -> Observation:
        """Start the next episode of `indices` (default: all); return (n, O, D), the first observation O times."""
        indices = np.arange(self.n_envs) if indices is None else np.asarray(indices, np.int64)
        self._begin(indices, self._episode[indices] + 1)
        return self._observation(indices)

    def step_chunk(self, actions: FloatArray, indices: IntArray | None = None, *, autoreset: bool = True) -> ChunkStep:
        """See `BatchedEnv.step_chunk`. Actions are clipped to the action space.

        Raises:
            EnvError: actions of a wrong shape.
            EnvActionError: actions that are not finite, or for an environment whose episode has ended.
            EnvFaultError: an environment raised, or returned a wrong shape or a number that is not finite.
        """
        indices = np.arange(self.n_envs) if indices is None else np.asarray(indices, np.int64)
        actions = self._checked(actions, indices)
        n = len(indices)
        step_rewards = np.zeros(actions.shape[:2], np.float32)
        success, terminated, truncated = (np.zeros(n, np.bool_) for _ in range(3))
        n_steps = np.zeros(n, np.int64)
        for e in range(actions.shape[1]):
            rows = np.flatnonzero(~(terminated | truncated))
            if len(rows) == 0:
                break
            step = self._step(indices[rows], actions[rows, e])
            step_rewards[rows, e] = step.reward
            success[rows], terminated[rows], truncated[rows] = step.success, step.terminated, step.truncated
            n_steps[rows] += 1
        final = self._observation(indices)
        ended = terminated | truncated
        self._open[indices[ended]] = False
        episode_return, episode_length = self._return[indices].copy(), self._length[indices].copy()
        if autoreset and ended.any():
            self.reset(indices[ended])
        return ChunkStep(
            observation=self._observation(indices),
            final_observation=final,
            step_rewards=step_rewards,
            success=success,
            terminated=terminated,
            truncated=truncated,
            n_steps=n_steps,
            episode_return=episode_return,
            episode_length=episode_length,
        )

    def state(self) -> EnvState:
        """Return the episode numbers and the actions executed in the open episodes."""
        lengths = np.where(self._open, self._length, 0)
        actions = [self._actions[i, :length] for i, length in enumerate(lengths)]
        episodes = np.where(self._open, self._episode, self._episode + 1)
        return EnvState(np.where(self._episode < 0, -1, episodes), lengths, np.concatenate(actions))

    def restore(self, state: EnvState) -> Observation:
        """Reset to the episodes of `state` and replay their actions; return the observations (N, O, D).

        Where a replay would be another episode (`EnvSpec.replayable`), the next ones begin.

        Raises:
            EnvError: the state is of another number of environments, or an episode ends in its replay.
        """
        if len(state.episodes) != self.n_envs:
            raise EnvError(f"the saved state is of {len(state.episodes)} environments, here are {self.n_envs}")
        started = np.flatnonzero(state.episodes >= 0)
        self._episode[state.episodes < 0], self._open[state.episodes < 0] = -1, False
        if not self.spec.replayable:
            self._begin(started, (state.episodes + (state.lengths > 0))[started])
            return self._observation(np.arange(self.n_envs))
        offsets = np.concatenate([[0], np.cumsum(state.lengths)])
        longest = int(state.lengths.max(initial=0))
        begins = longest - state.lengths  # all replays end together: some simulators cannot leave an environment out
        for step in range(longest + 1):
            fresh = started[begins[started] == step]
            self._begin(fresh, state.episodes[fresh])
            rows = np.flatnonzero((begins <= step) & (step < longest))
            if len(rows) > 0:
                self._replay(rows, state.actions[offsets[rows] + step - begins[rows]])
        return self._observation(np.arange(self.n_envs))

    def privileged(self, indices: IntArray) -> FloatArray | None:
        """Return what the simulator shows to experts alone (n, P); None: no more than it observes."""
        return self._simulator.privileged(indices) if isinstance(self._simulator, Privileged) else None

    def close(self) -> None:
        """Free the simulator. One that is broken may not close well; that hides no other error."""
        try:
            self._simulator.close()
        except Exception as error:
            log.warning("%s did not close: %s: %s", self.spec.id, type(error).__name__, error)

    def _replay(self, indices: IntArray, actions: FloatArray) -> None:
        step = self._step(indices, actions)
        ended = indices[step.terminated | step.truncated]
        if len(ended) > 0:  # no fault, which would be mended: to build it again would not help
            remedy = "it does not repeat itself, and its spec must say so: replayable=False"
            where = self._where(int(ended[0]))
            raise LocatedEnvError(self.spec.id, "an open episode ends when it is replayed", remedy, *where)

    def _begin(self, indices: IntArray, episodes: IntArray) -> None:
        if len(indices) == 0:
            return
        self._episode[indices] = episodes
        self._open[indices] = True
        self._length[indices] = 0
        self._return[indices] = 0.0
        with self._blamed(indices):
            observation = self._accepted(self._simulator.reset(indices, episodes), indices)
        put(self._history, indices, map_parts(lambda part: part[:, None], observation))

    def _step(self, indices: IntArray, actions: FloatArray) -> SimulatorStep:
        """One step of open environments, with this library's reward, success and time limit."""
        sparse = self.spec.reward == "sparse"
        with self._blamed(indices):
            raw = self._simulator.step(indices, actions)
            observation = self._accepted(raw.observation, indices)
            own_reward = self._column("reward", raw.reward, np.float32, indices)
            self._require_finite("reward", own_reward, indices)
            terminated, truncated, success = (
                self._column(name, getattr(raw, name), np.bool_, indices)
                for name in ("terminated", "truncated", "success")
            )
        success &= self.spec.has_success
        reward = success.astype(np.float32) if sparse else own_reward
        self._actions[indices, self._length[indices]] = actions
        self._length[indices] += 1
        latest = map_parts(lambda part: part[:, None], observation)
        put(self._history, indices, map_parts(_shifted, take(self._history, indices), latest))
        self._return[indices] += reward
        terminated = terminated | (success & sparse)
        out_of_time = self._length[indices] >= self.spec.max_episode_steps
        truncated = (truncated | success | out_of_time) & ~terminated
        return SimulatorStep(observation, reward, terminated, truncated, success)

    def _observation(self, indices: IntArray) -> Observation:
        """(n, O, D), a copy."""
        observation: Observation = take(self._history, indices)
        return observation

    def _accepted(self, observation: Observation, indices: IntArray) -> Observation:
        """Return the simulator's observation with the types of the spec.

        Raises:
            EnvFaultError: a part is missing, has not the type and shape of the spec, or is not finite.
        """
        parts = observation if isinstance(observation, Mapping) else {STATE: observation}
        history = self._history if isinstance(self._history, Mapping) else {STATE: self._history}
        accepted = {name: self._part(name, parts, expected, indices) for name, expected in history.items()}
        return accepted if isinstance(self._history, Mapping) else accepted[STATE]

    def _part(
        self, name: str, parts: Mapping[str, npt.NDArray[Any]], history: npt.NDArray[Any], indices: IntArray
    ) -> npt.NDArray[Any]:
        if name not in parts:
            raise self._fault(f"the observation has {', '.join(parts)}, but not {name}")
        part = np.asarray(parts[name], np.float32 if name == STATE else None)
        shape = (len(indices), *history.shape[2:])
        if part.shape != shape or part.dtype != history.dtype:
            raise self._fault(f"{name} is {part.dtype} {part.shape}; the spec says {history.dtype} {shape}")
        if name == STATE:
            self._require_finite("observation", part, indices)
        return part

    def _column(self, name: str, values: Any, dtype: npt.DTypeLike, indices: IntArray) -> npt.NDArray[Any]:
        """Return one number of each environment, a copy."""
        if np.shape(values) != (len(indices),):
            raise self._fault(f"{name} has the shape {np.shape(values)}, not {(len(indices),)}")
        return np.array(values, dtype)

    def _checked(self, actions: FloatArray, indices: IntArray) -> FloatArray:
        actions = np.asarray(actions, np.float32)
        check_actions(actions, len(indices), self.spec)
        if not self._open[indices].all():
            where = self._where(int(indices[~self._open[indices]][0]))
            raise EnvActionError(self.spec.id, "there is no open episode", "reset it before stepping it", *where)
        if not np.isfinite(actions).all():
            row = int(np.flatnonzero(~np.isfinite(actions).all(axis=(1, 2)))[0])
            where = self._where(int(indices[row]))
            raise EnvActionError(self.spec.id, "action is not finite", str(actions[row]), *where)
        return np.clip(actions, self._low, self._high)

    def _require_finite(self, what: str, values: npt.NDArray[Any], indices: IntArray) -> None:
        if np.isfinite(values).all():
            return
        row = int(np.flatnonzero(~np.isfinite(values.reshape(len(indices), -1)).all(axis=1))[0])
        raise self._fault(f"{what} is not finite", str(values[row]), int(indices[row]))

    def _fault(self, what: str, detail: str = "", index: int | None = None) -> EnvFaultError:
        return EnvFaultError(self.spec.id, what, detail, *(() if index is None else self._where(index)))

    def _where(self, index: int) -> tuple[int, int, int, int]:
        """What a `LocatedEnvError` says: environment, episode, step, seed."""
        return index, int(self._episode[index]), int(self._length[index]), self._seeds[index]

    @contextmanager
    def _blamed(self, indices: IntArray) -> Iterator[None]:
        """Turn whatever a simulator raises into an error that says where it was."""
        try:
            yield
        except DprlError:
            raise
        except RaisedInsideError as error:
            raise self._fault("the environment raised", error.what, error.index) from error
        except Exception as error:
            only = int(indices[0]) if len(indices) == 1 else None
            raise self._fault("the simulator raised", f"{type(error).__name__}: {error}", only) from error


def _shifted(history: npt.NDArray[Any], latest: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Drop the oldest of (n, O, ...) and append (n, 1, ...)."""
    return np.concatenate([history[:, 1:], latest], axis=1)

"""What an environment is to this library: a spec, a batched environment that runs action chunks, and a registry.

A spec is plain data. It names the function that builds its environments as ``module:function``, resolved at run
time, so that a pool on any worker can build one without importing `envs`.

Shapes: N environments, E executed actions of a chunk, A action size, O observation steps, D observation size. What is
written (..., D) is an array for a task without cameras; with cameras it is a dict of parts, see `dprl.observations`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt

from dprl.config import validate
from dprl.errors import ConfigError, EnvError, check, check_count
from dprl.observations import STATE, Camera, Observation, map_parts
from dprl.seeding import derive_seed

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

MAX_EPISODE_STEPS = 1_000_000

RewardKind = Literal["sparse", "dense"]
Backend = Literal["auto", "envpool", "gymnasium"]


@dataclass(frozen=True)
class EnvSpec:
    """One task as data. Everything a policy, a pool or a data set must know of it."""

    id: str
    """The name users type, e.g. ``metaworld/push-v3`` or ``Hopper-v5``."""
    builder: str
    """``module:function`` that builds the simulator's side of it."""
    backend_id: str
    """The name the simulator knows it by."""
    observation_size: int
    """D, numbers in one observation's state; 0 only where there are cameras."""
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    max_episode_steps: int
    """Environment steps after which an episode is truncated."""
    reward: RewardKind = "dense"
    """``sparse``: 1 at the first success, else 0. ``dense``: the simulator's own reward."""
    has_success: bool = False
    """Whether the simulator reports success. If so, an episode ends at the first one: terminated under the sparse
    reward; truncated under the dense one, so that reaching the goal early does not cost the reward to come."""
    n_obs_steps: int = 1
    """O, how many of the latest observations a policy sees."""
    vectorization: Literal["sync", "async"] = "sync"
    """How `gymnasium.vector` runs its environments (EnvPool always uses threads)."""
    serial: bool = False
    """Whether the backend steps its environments one after the other: more processes then step more of them."""
    replayable: bool = True
    """Whether an episode repeats to the bit from its seed and its actions. If not, no lost worker can be made up for,
    and a resumed run goes on with other episodes."""
    cameras: tuple[Camera, ...] = ()
    """What shows images, in alphabetical order; none: observations are plain arrays of numbers."""

    def __post_init__(self) -> None:
        smallest = 0 if self.cameras else 1
        validate(self, at_least={"observation_size": smallest, "max_episode_steps": 1, "n_obs_steps": 1})
        _check_limit(self.max_episode_steps)
        names = [camera.name for camera in self.cameras]
        check(names == sorted(set(names)), "cameras", names, "must have different names, in alphabetical order")
        bounds = list(zip(self.action_low, self.action_high, strict=False))
        paired = len(self.action_low) == len(self.action_high) >= 1 and all(low <= high for low, high in bounds)
        check(paired, "action_low, action_high", bounds, "must be pairs of numbers with low <= high")
        sparse_ok = self.reward == "dense" or self.has_success
        check(sparse_ok, "reward", self.reward, f"{self.id} reports no success, so its reward must be 'dense'")

    @property
    def action_size(self) -> int:
        """A, numbers in one action."""
        return len(self.action_low)

    def zero_observation(self, *leading: int) -> Observation:
        """Return an observation of zeros with the axes `leading`: an array (..., D), or a dict of parts."""
        state = np.zeros((*leading, self.observation_size), np.float32)
        if not self.cameras:
            return state
        images = {camera.part: np.zeros((*leading, *camera.shape), np.uint8) for camera in self.cameras}
        return {STATE: state, **images} if self.observation_size else images


@dataclass(frozen=True)
class EnvOptions:
    """What a user may choose of any environment."""

    reward: RewardKind | None = None
    """Sparse (1 at the first success) or the simulator's dense reward. Default: sparse where it reports success."""
    max_episode_steps: int | None = None
    """Environment steps before an episode is truncated. Default: the task's own."""
    backend: Backend = "auto"
    """EnvPool where it has the task and runs here, else `gymnasium.vector`."""
    vectorization: Literal["sync", "async"] = "sync"
    """How `gymnasium.vector` runs its environments: one after the other, or one process each."""

    def __post_init__(self) -> None:
        validate(self, at_least={"max_episode_steps": 1})
        _check_limit(self.max_episode_steps or 1)


def _check_limit(steps: int) -> None:
    check(steps <= MAX_EPISODE_STEPS, "max_episode_steps", steps, f"must be at most {MAX_EPISODE_STEPS}")


@dataclass(frozen=True)
class ChunkStep:
    """What one action chunk brought to each of n environments."""

    observation: Observation
    """(n, O, D) what the next decision sees: where an episode ended, the first observation of the next one."""
    final_observation: Observation
    """(n, O, D) what the chunk ended in, before any reset."""
    step_rewards: FloatArray
    """(n, E) of each step; 0 where none was executed, since the episode had ended."""
    success: BoolArray
    """(n,) whether the task succeeded during the chunk."""
    terminated: BoolArray
    """(n,) the episode ended and its future is worth nothing."""
    truncated: BoolArray
    """(n,) the episode was cut; its future is worth the value of `final_observation`."""
    n_steps: IntArray
    """(n,) steps executed, at most E; fewer where the episode ended inside the chunk."""
    episode_return: FloatArray
    """(n,) reward of the episode so far, this chunk included."""
    episode_length: IntArray
    """(n,) steps of the episode so far, this chunk included."""

    @property
    def reward(self) -> FloatArray:
        """(n,) summed over the executed steps."""
        summed: FloatArray = self.step_rewards.sum(-1)
        return summed

    @property
    def ended(self) -> BoolArray:
        """(n,) terminated or truncated."""
        return self.terminated | self.truncated

    @staticmethod
    def concatenate(parts: Sequence[ChunkStep]) -> ChunkStep:
        """Join the steps of consecutive environments."""

        def join(name: str) -> Any:
            return map_parts(lambda *arrays: np.concatenate(arrays), *(getattr(p, name) for p in parts))

        return ChunkStep(**{f.name: join(f.name) for f in fields(ChunkStep)})


@dataclass(frozen=True)
class EnvState:
    """All that is needed to bring a batched environment back: it is rebuilt, reset and its open episodes replayed."""

    episodes: IntArray
    """(N,) which episode each environment is in, counted from 0; -1 before the first reset."""
    lengths: IntArray
    """(N,) actions executed in it."""
    actions: FloatArray
    """(sum of lengths, A) these actions, environment after environment."""

    @staticmethod
    def concatenate(parts: Sequence[EnvState]) -> EnvState:
        """Join the states of consecutive environments."""
        return EnvState(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(EnvState)))

    def part(self, first: int, n_envs: int) -> EnvState:
        """Return the state of `n_envs` environments from `first` on."""
        last = first + n_envs
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        return EnvState(self.episodes[first:last], self.lengths[first:last], self.actions[ends[first] : ends[last]])


class BatchedEnv(Protocol):
    """N environments that run action chunks. An environment's k-th episode depends on its seed and k alone."""

    @property
    def spec(self) -> EnvSpec: ...

    @property
    def n_envs(self) -> int: ...

    def reset(self, indices: IntArray | None = None) -> Observation:
        """Start the next episode of the environments `indices` (default: all) and return (n, O, D)."""
        ...

    def step_chunk(self, actions: FloatArray, indices: IntArray | None = None, *, autoreset: bool = True) -> ChunkStep:
        """Run `actions` (n, E, A) in the environments `indices` (default: all), each until its chunk or episode ends.

        With `autoreset` every ended episode is followed by the next one at once; no action of the chunk is
        executed in it. Without, an ended environment must be reset before it is stepped again.
        """
        ...

    def state(self) -> EnvState: ...

    def restore(self, state: EnvState) -> Observation:
        """Bring a freshly built environment to `state`; return the current observations (N, O, D)."""
        ...

    def close(self) -> None: ...


class EnvBuilder(Protocol):
    """The function behind `EnvSpec.builder`."""

    def __call__(self, spec: EnvSpec, seeds: list[int], num_threads: int) -> BatchedEnv: ...


# Where names are looked up, in order: functions `(name, options) -> EnvSpec | None`.
RESOLVERS: list[str] = ["dprl.envs.catalogue:resolve"]


def load(reference: str) -> Any:
    """Return what ``module:name`` refers to.

    Raises:
        ConfigError: it has another form, or refers to nothing that can be called.
    """
    module, _, name = reference.partition(":") if isinstance(reference, str) else ("", "", "")
    check(bool(module and name), "reference", reference, "must be 'module:function'")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"reference = {reference!r}: cannot be loaded: {error}") from error
    check(callable(found), "reference", reference, f"must name a function, not {found!r}")
    return found


def resolve(name: str, options: EnvOptions | None = None) -> EnvSpec:
    """Return the spec of the environment `name`.

    Raises:
        ConfigError: `name` is none, or `options` are none.
        EnvError: no resolver knows it; the message offers the nearest names.
    """
    named = isinstance(name, str)
    check(named, "env", name, "must be the name of an environment, such as 'Hopper-v5', or a spec that makes it")
    fits = options is None or isinstance(options, EnvOptions)
    check(fits, "options", options, "must be EnvOptions(...)")
    for reference in RESOLVERS:
        resolver = cast("Callable[[str, EnvOptions], EnvSpec | None]", load(reference))
        spec = resolver(name, options or EnvOptions())
        if spec is not None:
            return spec
    raise EnvError(f"unknown environment '{name}'. 'dprl list envs' shows the names.")


def spec_of(env: str | EnvSpec, options: EnvOptions | None = None) -> EnvSpec:
    """Return `env` if it is a spec, or that of the environment it names.

    Raises:
        ConfigError: it is neither, or `options` go with a spec, which has settings of its own.
        EnvError: the name is unknown.
    """
    if not isinstance(env, EnvSpec):
        return resolve(env, options)
    own = options is None
    check(own, "options", options, f"are of an environment that is named; {env.id} is a spec: change that, or name it")
    return env


def builder_of(spec: EnvSpec) -> EnvBuilder:
    """Return what builds `spec`.

    Raises:
        EnvError: it is of an environment that was handed in, and says not how to build another.
        ConfigError: there is no such function.
    """
    if not spec.builder:
        raise EnvError(f"{spec.id} was handed in ready-made, and more of them cannot be built: hand in a spec, as "
                       "dprl.envs.vec_env.make_spec returns it")  # fmt: skip
    return cast("EnvBuilder", load(spec.builder))


def build(spec: EnvSpec, seeds: list[int], num_threads: int = 0) -> BatchedEnv:
    """Build one environment per seed; `num_threads` = 0 lets the backend use every core. See `builder_of`."""
    return builder_of(spec)(spec, seeds, num_threads)


def to_carry(spec: EnvSpec) -> Callable[[], object]:
    """Return what another process must call before it can build `spec`, as the builder's module says (`to_carry`)."""
    module = importlib.import_module(spec.builder.split(":", maxsplit=1)[0])
    return cast("Callable[[], object]", module.to_carry(spec)) if hasattr(module, "to_carry") else _nothing


def _nothing() -> None:
    """Most builders need nothing."""


def env_seeds(seed: int, n_envs: int, first: int = 0, *, purpose: str = "training") -> list[int]:
    """Return the 31-bit seeds of environments `first` to `first + n_envs - 1`; each purpose has its own."""
    return [derive_seed(seed, purpose, index) & 0x7FFFFFFF for index in range(first, first + n_envs)]


def make(
    env: str | EnvSpec, n_envs: int = 1, *, seed: int = 0, n_obs_steps: int = 1, options: EnvOptions | None = None
) -> BatchedEnv:
    """Build a batched environment by name: any task of ``dprl list envs`` or any id registered with Gymnasium.

    Args:
        env: its name, or its spec.
        n_envs: how many.
        seed: of all of them; each has a seed of its own that follows from it.
        n_obs_steps: how many of the latest observations the policy sees.
        options: reward, time limit, backend.
    """
    check_count("n_envs", n_envs)
    seeds = env_seeds(seed, n_envs)
    spec = spec_of(env, options)
    return build(with_n_obs_steps(spec, n_obs_steps), seeds)


def check_actions(actions: FloatArray, n_envs: int, spec: EnvSpec) -> None:
    """Raise EnvError unless actions are numbers (N, E, A), of at least one step."""
    try:
        kind = np.asarray(actions).dtype.kind
    except Exception as error:  # a tensor that has a gradient, for one
        raise EnvError(f"actions: {spec.id} expects an array of numbers: {error}") from error
    if kind not in "fiu":
        raise EnvError(f"actions of type {np.asarray(actions).dtype}: {spec.id} expects an array of numbers")
    shape = np.shape(actions)
    if len(shape) != 3 or shape[0] != n_envs or shape[1] < 1 or shape[2] != spec.action_size:
        raise EnvError(
            f"actions of shape {shape}: {spec.id} expects ({n_envs}, executed steps, {spec.action_size}), "
            "with at least one step"
        )


def with_n_obs_steps(spec: EnvSpec, n_obs_steps: int) -> EnvSpec:
    """Return `spec` with the observation history a policy asks for."""
    return replace(spec, n_obs_steps=n_obs_steps)

"""N environments behind reset, step_chunk, collect, evaluate and close.

Environments are grouped in slices of fixed size, and inference runs slice by slice, on one thread: a row's result can
depend on the batch and the threads it is computed with. Noise is drawn for each environment, by its index, its episode
and the step within it. So rollouts are the same however whole slices are spread over workers.

Shapes: T decisions, N environments, K' tuned steps, H actions of a chunk, E executed, A action size, O observation
steps, D observation size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from torch import Tensor

from dprl.errors import EnvError, check, check_count
from dprl.mdp import Chain
from dprl.observations import Camera, Observation, TensorObservation, map_parts
from dprl.policy import Policy
from dprl.spec import BoolArray, ChunkStep, EnvOptions, EnvSpec, EnvState, FloatArray, IntArray, spec_of

if TYPE_CHECKING:
    from dprl.guidance import Guide
    from dprl.policy import InferenceConfig, Scorer
    from dprl.rollout.choice import Choice
    from dprl.rollout.evaluation import Evaluation

MAX_SLICE = 32


class Actor(Protocol):
    """Acts in a pool; a `DenoisingMDP` is one."""

    @property
    def n_action_steps(self) -> int:
        """E, how many actions of a chunk are executed."""
        ...

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """(draws, H, A), the normal draws of one decision."""
        ...

    def sample(self, obs: TensorObservation, *, noise: Tensor) -> Chain:
        """Return a chain for each observation (B, O, D), made of `noise` (draws, B, H, A)."""
        ...

    def cpu(self) -> Self:
        """Return the same on the CPU."""
        ...


@dataclass(frozen=True)
class Rollout:
    """What one collection brought. All arrays are (T, N, ...)."""

    observations: Observation
    """(T, N, O, D) what each decision saw."""
    chains: FloatArray
    """(T, N, K'+1, H, A)."""
    log_probs: FloatArray
    """(T, N, K', H, A) the log-density of each step of the chains, number by number."""
    step_rewards: FloatArray
    """(T, N, E) of each step; 0 where none was executed."""
    terminated: BoolArray
    truncated: BoolArray
    success: BoolArray
    n_steps: IntArray
    """Environment steps executed by each decision."""
    final_observations: Observation
    """(T, N, O, D) what each decision led to, before any reset."""
    episode_returns: FloatArray
    """Reward of the episode up to and including the decision."""
    episode_lengths: IntArray
    """Environment steps of the episode up to and including the decision."""
    environments: IntArray
    """(N,) their indices; fewer than the pool has, where a worker was lost whose episodes cannot be replayed."""
    inference_s: float = field(default=0.0, compare=False)
    """Seconds in which the policy was asked, not the environments; of several workers the longest."""

    @property
    def rewards(self) -> FloatArray:
        """(T, N) summed over the executed steps."""
        summed: FloatArray = self.step_rewards.sum(-1)
        return summed

    @property
    def ended(self) -> BoolArray:
        """(T, N) terminated or truncated."""
        ended: BoolArray = self.terminated | self.truncated
        return ended

    def episode_metrics(self) -> dict[str, float]:
        """Return success rate, mean return and length of the episodes that ended; none, where none did."""
        ended = self.ended
        if not ended.any():
            return {}
        return {
            "rollout/success_rate": float(self.success[ended].mean()),
            "rollout/return_mean": float(self.episode_returns[ended].mean()),
            "rollout/episode_length_mean": float(self.episode_lengths[ended].mean()),
            "rollout/episodes": float(ended.sum()),
        }

    @staticmethod
    def concatenate(parts: Sequence[Rollout]) -> Rollout:
        """Join the rollouts of several groups of environments."""

        def join(name: str) -> Any:
            axis = 0 if name == "environments" else 1
            return map_parts(lambda *arrays: np.concatenate(arrays, axis=axis), *(getattr(p, name) for p in parts))

        arrays = {f.name: join(f.name) for f in fields(Rollout) if f.compare}
        return Rollout(**arrays, inference_s=max(part.inference_s for part in parts))


class RolloutPool(ABC):
    """N environments that a policy acts in. A context manager."""

    spec: EnvSpec
    """The task."""
    n_envs: int
    """N."""
    choice: Choice | None = None
    """What `auto` chose, and why."""

    @staticmethod
    def auto(
        env: str | EnvSpec,
        n_envs: int,
        *,
        seed: int = 0,
        slice_size: int | None = None,
        device: str = "cpu",
        num_workers: int | None = None,
        other_workers: int = 0,
        options: EnvOptions | None = None,
    ) -> RolloutPool:
        """Choose by the simulator, the cores, the nodes of a running Ray and the policy's device; say so in `choice`.

        With a policy on the CPU the rollouts are the same whatever is chosen.

        Args:
            env: the task.
            n_envs: environments.
            seed: of the environments and of the exploration noise.
            slice_size: environments per inference batch; must divide `n_envs`. Default: at most 32.
            device: where the policy is.
            num_workers: Ray workers, in place of the choice; 0: in this process.
            other_workers: Ray workers that something else will want, such as a `RayEvaluator`: the choice leaves room.
            options: of the environment, if it is named.
        """
        from dprl.rollout.choice import auto_pool

        return auto_pool(
            spec_of(env, options), n_envs, seed=seed, slice_size=slice_size, device=device, num_workers=num_workers,
            other_workers=other_workers,
        )  # fmt: skip

    @abstractmethod
    def reset(self) -> Observation:
        """Start the next episode of every environment; return (N, O, D)."""

    @abstractmethod
    def step_chunk(self, actions: FloatArray) -> ChunkStep:
        """Run `actions` (N, E, A); ended episodes are followed by the next ones. For a policy that acts elsewhere.

        Raises:
            EnvError: another shape, no `reset` yet, or what an environment did.
        """

    @abstractmethod
    def collect(self, actor: Actor, n_steps: int) -> Rollout:
        """Let `actor` take `n_steps` decisions in every environment, where the environments are.

        Episodes go on from where the last collection, `reset` or `step_chunk` left them.

        Raises:
            ConfigError: `actor` is none, or `n_steps` below 1.
            EnvError: the policy does not fit the environment, or an environment failed more often than the pool
                forgives. `state` is then what it was before, but for environments that a pool did not build itself:
                those stay where they are.
        """

    @abstractmethod
    def evaluate(
        self,
        policy: Policy,
        episodes: int,
        seed: int,
        *,
        inference: InferenceConfig | None = None,
        guide: Guide | None = None,
        scorer: Scorer | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Evaluation:
        """See `dprl.rollout.evaluate`. It builds environments of its own; the pool's stay as they are."""

    @abstractmethod
    def state(self) -> EnvState:
        """Return all that brings this pool back exactly."""

    @abstractmethod
    def restore(self, state: EnvState) -> None:
        """Take up `state`, whatever was before. Where episodes cannot be replayed, the next ones begin.

        Where it fails, all is as before.

        Raises:
            ConfigError: the state is none of these environments.
            EnvError: an environment failed more often than the pool forgives, or was not built by the pool and is past
                its episode already.
        """

    @abstractmethod
    def close(self) -> None:
        """End the environments and whatever runs them."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def checked_slice_size(n_envs: int, slice_size: int | None) -> int:
    """Return `slice_size`, or the largest divisor of `n_envs` up to 32.

    Raises:
        ConfigError: it does not divide `n_envs`.
    """
    check_count("n_envs", n_envs)
    if slice_size is None:
        return max(size for size in range(1, min(n_envs, MAX_SLICE) + 1) if n_envs % size == 0)
    check_count("slice_size", slice_size)
    check(n_envs % slice_size == 0, "slice_size", slice_size, f"must divide n_envs, which is {n_envs}")
    return slice_size


def check_collection(actor: Any, n_steps: object, spec: EnvSpec) -> None:
    """Raise ConfigError unless `actor` can act `n_steps` times, and EnvError where its policy does not fit `spec`."""
    check_count("n_steps", n_steps)
    acts = not isinstance(actor, type) and all(
        hasattr(actor, name) for name in ("n_action_steps", "noise_shape", "sample", "cpu")
    )
    remedy = "must act by noise that it is given, as DenoisingMDP(policy, tuned_steps, ExplorationConfig()) does"
    check(acts, "actor", actor if isinstance(actor, type) else type(actor).__name__, remedy)
    policy = getattr(actor, "policy", None)
    if isinstance(policy, Policy):
        require_fit(policy, spec)
        seen = policy.config.n_obs_steps
        check(spec.n_obs_steps == seen, "n_obs_steps", spec.n_obs_steps, f"the policy sees {seen}")


def check_state(state: EnvState, n_envs: int, spec: EnvSpec) -> None:
    """Raise ConfigError unless `state` is one of `n_envs` environments of `spec`."""
    check(isinstance(state, EnvState), "state", type(state).__name__, "must be what a pool's state() returned")
    episodes, lengths, actions = map(np.asarray, (state.episodes, state.lengths, state.actions))
    for name, numbers in (("episodes", episodes), ("lengths", lengths)):
        whole = numbers.ndim == 1 and np.issubdtype(numbers.dtype, np.integer)
        check(whole, f"state.{name}", numbers, "must be whole numbers, one for each environment")
    check(len(episodes) == n_envs, "n_envs", n_envs, f"the saved state is of {len(episodes)} environments")
    check(len(lengths) == n_envs, "state.lengths", lengths, f"must be {n_envs} numbers")
    check(bool((episodes >= -1).all()), "state.episodes", episodes, "must be at least -1")
    fits = (lengths >= 0) & (lengths < spec.max_episode_steps) & ((episodes >= 0) | (lengths == 0))
    check(bool(fits.all()), "state.lengths", lengths,
          f"must be from 0 to {spec.max_episode_steps - 1}, and 0 where no episode has begun")  # fmt: skip
    shape = (int(lengths.sum()), spec.action_size)
    check(actions.shape == shape, "state.actions", actions.shape, f"must have the shape {shape}: all that was executed")
    check(bool(np.isfinite(actions).all()), "state.actions", "not finite", "must be finite")


def require_fit(policy: Policy, spec: EnvSpec) -> None:
    """Raise EnvError unless the policy's observation and action sizes, and its cameras, are the environment's."""
    features = policy.features
    for what, ours, theirs in (
        ("observation_size", features.observation_size, spec.observation_size),
        ("action_size", features.action_size, spec.action_size),
        ("cameras", _by_name(features.cameras), _by_name(spec.cameras)),
    ):
        if ours != theirs:
            raise EnvError(
                f"the policy was trained with {what} = {ours}, but {spec.id} has {theirs}; "
                f"choose the environment it was trained for{f' ({features.env_id})' if features.env_id else ''}"
            )


def _by_name(cameras: tuple[Camera, ...]) -> tuple[Camera, ...]:
    return tuple(sorted(cameras, key=lambda camera: camera.name))


def joined(observations: Sequence[Observation]) -> Observation:
    """Join the observations of consecutive environments."""
    whole: Observation = map_parts(lambda *arrays: np.concatenate(arrays), *observations)
    return whole


def cut(actions: FloatArray, sizes: Sequence[int]) -> list[FloatArray]:
    """Divide actions (N, E, A) among groups of environments of these sizes."""
    return np.split(actions, np.cumsum(sizes)[:-1])

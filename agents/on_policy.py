"""What every algorithm shares that tunes a policy on rollouts of its own: collecting, predicting, saving."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch

from dprl import checkpoint
from dprl.diffusion import SolverConfig
from dprl.errors import CheckpointError, check
from dprl.mdp import ExplorationConfig, mdp_of
from dprl.policy import Policy, PredictState
from dprl.rollout import Rollout, RolloutPool, as_pool
from dprl.rollout.pool import require_fit
from dprl.seeding import torch_generator
from dprl.spec import BatchedEnv, EnvState
from dprl.training import Agent, LoopConfig, train


class OnPolicyAgent(Agent[Rollout]):
    """Collects `n_steps` decisions in every environment, exploring; a subclass learns from them."""

    def __init__(
        self,
        policy: Policy,
        env: BatchedEnv | RolloutPool,
        *,
        tuned_steps: int,
        exploration: ExplorationConfig,
        solver: SolverConfig,
        n_steps: int,
        exact: bool,
        seed: int,
    ) -> None:
        """See the subclass.

        Raises:
            ConfigError: the policy cannot be tuned, or so.
            EnvError: the policy does not fit the environment.
        """
        self.policy = policy
        self.pool = as_pool(env, seed)
        require_fit(policy, self.pool.spec)
        matches = self.pool.spec.n_obs_steps == policy.config.n_obs_steps
        check(matches, "n_obs_steps", self.pool.spec.n_obs_steps, f"the policy sees {policy.config.n_obs_steps}")
        self.mdp = mdp_of(policy, tuned_steps, exploration, solver, exact=exact, seed=seed)
        self.seed = seed
        self.timesteps = 0
        self.iteration = 0
        self.generator = torch_generator(seed, "minibatches", device=policy.device)
        self._n_steps = n_steps

    def learn(self, total_timesteps: int, *, progress_bar: bool = False) -> Self:
        """Collect and update for `total_timesteps` more environment steps, as stable-baselines3 does."""
        train(self, LoopConfig(self.timesteps + total_timesteps), progress_bar=progress_bar)
        return self

    def predict(
        self,
        observation: np.ndarray[Any, Any],
        state: tuple[Any, ...] | PredictState | None = None,
        episode_start: np.ndarray[Any, Any] | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray[Any, Any], PredictState]:
        """See `Policy.predict`."""
        return self.policy.predict(observation, state, episode_start, deterministic)

    def collect(self) -> Rollout:
        """Take `n_steps` decisions in every environment, exploring."""
        self.mdp.begin_iteration(self.iteration)
        rollout = self.pool.collect(self.mdp, self._n_steps)
        self.timesteps += int(rollout.n_steps.sum())
        return rollout

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs beside the policy."""
        return {
            "timesteps": self.timesteps,
            "iteration": self.iteration,
            "mdp": self.mdp.state(),
            "generator": self.generator.get_state(),
            "pool": pool_state(self.pool),
        }

    def restore(self, state: checkpoint.StateTree) -> None:
        """Take up what `state` returned; the pool must be freshly built, and the policy loaded."""
        self.timesteps, self.iteration = state["timesteps"], state["iteration"]
        self.mdp.restore(state.get("mdp", {}))
        self.generator.set_state(state["generator"])
        restore_pool(self.pool, state["pool"])


def pool_state(pool: RolloutPool) -> dict[str, torch.Tensor]:
    """Where the environments of a pool are, to be saved."""
    state = pool.state()
    return {name: torch.from_numpy(getattr(state, name)) for name in ("episodes", "lengths", "actions")}


def restore_pool(pool: RolloutPool, state: dict[str, torch.Tensor]) -> None:
    """Bring a freshly built pool to where `pool_state` was.

    Raises:
        CheckpointError: the run was begun by a version whose noise was another.
    """
    if "generators" in state:
        raise CheckpointError("this run was begun by an earlier dprl, whose noise was another: begin it anew")
    pool.restore(EnvState(state["episodes"].numpy(), state["lengths"].numpy(), state["actions"].numpy()))

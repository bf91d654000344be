"""DPPO: PPO over the denoising steps of a diffusion policy (arXiv:2409.00588).

Denoising is a little MDP inside every environment decision. Its state is (obs, x_{k+1}), its action is
x_k ~ N(mean, std²), and only x_0 reaches the environment. So the likelihood of an action, which has no closed form,
becomes a product of Gaussians, and PPO applies to each of its factors. k counts down: K'-1 is the noisiest tuned
step, 0 the one that emits the action.

Shapes: B pairs of (decision, denoising step), T decisions, N environments, K' tuned steps, H actions of a chunk of
which the first E are executed, A action size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dprl import checkpoint
from dprl.config import validate
from dprl.diffusion import SolverConfig
from dprl.errors import CheckpointError, check
from dprl.mdp import DenoisingMDP, ExplorationConfig
from dprl.networks import ValueNet
from dprl.networks.mlp import Activation
from dprl.policy import DiffusionPolicy, PredictState
from dprl.returns import RunningReturnStd, explained_variance, gae
from dprl.rollout import Rollout, RolloutPool, as_pool
from dprl.rollout.pool import require_fit
from dprl.seeding import seeded_init, torch_generator
from dprl.spec import BatchedEnv, EnvState
from dprl.training import Agent, LoopConfig, train

LOG_PROB_RANGE = (-5.0, 2.0)


@dataclass(frozen=True)
class DPPOConfig:
    """The algorithm's numbers."""

    tuned_steps: int = 10
    """K', how many of the last denoising steps are trained."""
    solver: SolverConfig = field(default_factory=SolverConfig)
    """Whose steps: ddpm, ddim (with eta = 1 it explores most like ddpm) or euler. Default: the policy's own way."""
    n_steps: int = 50
    """T, decisions per environment and iteration."""
    n_epochs: int = 5
    """Passes over the pairs of one rollout."""
    batch_size: int = 2_000
    """(decision, denoising step) pairs per gradient step."""
    learning_rate: float = 3e-4
    """The actor's."""
    critic_learning_rate: float = 1e-3
    gamma: float = 0.99
    """Discount per decision."""
    gae_lambda: float = 0.95
    denoising_discount: float = 0.99
    """The advantage of step k is multiplied by this to the power k."""
    clip_range: float = 0.05
    """PPO's clip at the step that emits the action; of the ratio of mean log-probs."""
    clip_range_base: float = 0.005
    """The clip at the noisiest tuned step."""
    clip_range_rate: float = 3.0
    """How steeply the clip grows between the two."""
    vf_coef: float = 0.5
    target_kl: float = 1.0
    """Stop an iteration's updates once a minibatch's approximate KL exceeds this."""
    critic_warmup: int = 0
    """First iterations in which only the critic learns."""
    critic_hidden_size: int = 256
    critic_activation: Activation = "relu"
    normalize_returns: bool = True
    """Divide rewards by the running standard deviation of the return."""
    exploration: ExplorationConfig = field(default_factory=ExplorationConfig)

    def __post_init__(self) -> None:
        counts = ("tuned_steps", "n_steps", "n_epochs", "batch_size", "critic_hidden_size")
        positive = ("learning_rate", "critic_learning_rate", "clip_range", "clip_range_rate", "target_kl")
        validate(
            self,
            at_least={**dict.fromkeys(counts, 1), "critic_warmup": 0, "vf_coef": 0},
            above=dict.fromkeys(positive, 0),
        )
        check(self.clip_range_rate <= 50, "clip_range_rate", self.clip_range_rate, "must be at most 50")
        for name in ("gamma", "gae_lambda", "denoising_discount"):
            check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must be from 0 to 1")
        ordered = 0 < self.clip_range_base <= self.clip_range
        check(ordered, "clip_range_base", self.clip_range_base, f"must be above 0 and at most {self.clip_range}")


# ---------------------------------------------------------------------------------------------- the mathematics


def chunk_log_prob(log_prob: Tensor, executed: int) -> Tensor:
    """Mean of a step's clamped log-densities over the executed actions: (B, H, A) -> (B,)."""
    return log_prob.clamp(*LOG_PROB_RANGE)[:, :executed].mean(dim=(1, 2))


def clip_ranges(config: DPPOConfig) -> Tensor:
    """Clip of each tuned step k: (K',), growing from `clip_range_base` at K'-1 to `clip_range` at 0."""
    k = torch.arange(config.tuned_steps)
    progress = 1 - k / max(config.tuned_steps - 1, 1)
    growth = torch.expm1(config.clip_range_rate * progress) / math.expm1(config.clip_range_rate)
    return config.clip_range_base + (config.clip_range - config.clip_range_base) * growth


class PolicyLoss(NamedTuple):
    """PPO's objective and what people watch."""

    policy_loss: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor
    ratio_mean: Tensor


def policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, discount: Tensor, clip_range: Tensor
) -> PolicyLoss:
    """PPO's clipped objective on pairs, all (B,), with the KL estimate E[(ρ - 1) - log ρ].

    `advantage` is the environment's, one for a decision's whole chain; `discount` and `clip_range` are those of each
    pair's denoising step.
    """
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8) * discount
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    loss = -torch.min(advantage * ratio, advantage * ratio.clamp(1 - clip_range, 1 + clip_range)).mean()
    approx_kl = ((ratio - 1) - log_ratio).mean()
    clip_fraction = ((ratio - 1).abs() > clip_range).float().mean()
    return PolicyLoss(loss, approx_kl, clip_fraction, ratio.mean())


def value_loss(value: Tensor, returns: Tensor) -> Tensor:
    """Half the mean squared error of V, both (B,)."""
    return 0.5 * torch.nn.functional.mse_loss(value, returns)


# ------------------------------------------------------------------------------------------------- the algorithm


class Targets(NamedTuple):
    """A rollout made ready for updates; the rows are its T·N decisions."""

    condition: Tensor
    chains: Tensor
    old_log_prob: Tensor
    advantage: Tensor
    returns: Tensor


class DPPO(Agent[Rollout]):
    """Fine-tunes a diffusion policy with reward."""

    name = "dppo"

    def __init__(
        self,
        policy: DiffusionPolicy,
        env: BatchedEnv | RolloutPool,
        config: DPPOConfig | None = None,
        *,
        tuned_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        """Prepare to fine-tune `policy`, which gains a trainable copy of its network in place.

        Args:
            policy: the pretrained policy, or one that DPPO has tuned before.
            env: where it acts; a batched environment is put in a pool.
            config: the numbers.
            tuned_steps: K', in place of the config's.
            seed: of exploration, critic and minibatches.

        Raises:
            ConfigError: not a diffusion policy, or more tuned than denoising steps.
            EnvError: the policy does not fit the environment.
        """
        known = isinstance(policy, DiffusionPolicy)
        check(known, "policy", type(policy).__name__, "must be a DiffusionPolicy: DPPO tunes denoising steps")
        config = config or DPPOConfig()
        self.config = config if tuned_steps is None else replace(config, tuned_steps=tuned_steps)
        self.policy = policy
        self.pool = as_pool(env, seed)
        require_fit(policy, self.pool.spec)
        cameras = policy.features.cameras
        check(not cameras, "policy", cameras, "sees images; DPPO fine-tunes policies that observe a state only so far")
        matches = self.pool.spec.n_obs_steps == policy.config.n_obs_steps
        check(matches, "n_obs_steps", self.pool.spec.n_obs_steps, f"the policy sees {policy.config.n_obs_steps}")
        n_pairs = self.pool.n_envs * self.config.n_steps * self.config.tuned_steps
        check(n_pairs >= 2, "n_envs * n_steps * tuned_steps", n_pairs, "advantages of one pair cannot be normalised")
        self.seed = seed
        self.timesteps = 0
        self.iteration = 0
        self.mdp = DenoisingMDP(policy, self.config.tuned_steps, self.config.exploration, self.config.solver)
        assert policy.tuned is not None
        with seeded_init(seed, "critic"):
            self.critic = ValueNet(
                policy.config.n_obs_steps,
                policy.features.observation_size,
                self.config.critic_hidden_size,
                self.config.critic_activation,
            ).to(policy.device)
        self._actor_optimizer = torch.optim.AdamW(
            policy.tuned.parameters(), self.config.learning_rate, weight_decay=0.0, fused=True
        )
        self._critic_optimizer = torch.optim.AdamW(
            self.critic.parameters(), self.config.critic_learning_rate, weight_decay=0.0, fused=True
        )
        self._reward_scaler = RunningReturnStd(self.pool.n_envs, self.config.gamma)
        self._generator = torch_generator(seed, "minibatches", device=policy.device)
        self._discounts = (self.config.denoising_discount ** torch.arange(self.config.tuned_steps)).to(policy.device)
        self._clip_ranges = clip_ranges(self.config).to(policy.device)

    def learn(self, total_timesteps: int, *, progress_bar: bool = False) -> DPPO:
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
        """See `DiffusionPolicy.predict`."""
        return self.policy.predict(observation, state, episode_start, deterministic)

    def collect(self) -> Rollout:
        """Take `n_steps` decisions in every environment, exploring."""
        rollout = self.pool.collect(self.mdp, self.config.n_steps)
        self.timesteps += int(rollout.n_steps.sum())
        return rollout

    def update(self, batch: Rollout) -> dict[str, float]:
        """Improve actor and critic on one rollout; return metrics."""
        targets, metrics = self._prepare(batch)
        actor_learns = self.iteration >= self.config.critic_warmup
        figures: list[Tensor] = []
        for decisions, pairs in self._minibatches(len(targets.advantage), targets.old_log_prob.numel()):
            critic_loss = self._update_critic(targets, decisions)
            actor = self._update_actor(targets, pairs) if actor_learns else ()
            figures.append(torch.stack([critic_loss, *actor]))
            if isinstance(actor, PolicyLoss) and actor.approx_kl > self.config.target_kl:
                break
        self.iteration += 1
        names = ("value_loss", *PolicyLoss._fields) if actor_learns else ("value_loss",)
        means = torch.stack(figures).mean(0).tolist()
        metrics |= {f"dppo/{name}": value for name, value in zip(names, means, strict=True)}
        metrics["dppo/gradient_steps"] = float(len(figures))
        return metrics | batch.episode_metrics()

    def _update_critic(self, targets: Targets, decisions: Tensor) -> Tensor:
        """One gradient step. The value is of the state only, so each decision counts once, not once per step."""
        loss = value_loss(self.critic(targets.condition[decisions]), targets.returns[decisions])
        self._critic_optimizer.zero_grad()
        (self.config.vf_coef * loss).backward()
        self._critic_optimizer.step()
        return loss.detach()

    def _update_actor(self, targets: Targets, pairs: Tensor) -> PolicyLoss:
        """One gradient step on pairs (B,): pair p is step p mod K' of decision p div K'."""
        decision, k = pairs // self.config.tuned_steps, pairs % self.config.tuned_steps
        result = policy_loss(
            self._log_prob(targets.condition, targets.chains, decision, k),
            targets.old_log_prob[decision, k],
            targets.advantage[decision],
            self._discounts[k],
            self._clip_ranges[k],
        )
        self._actor_optimizer.zero_grad()
        result.policy_loss.backward()
        self._actor_optimizer.step()
        return PolicyLoss(*(figure.detach() for figure in result))

    def _minibatches(self, n_decisions: int, n_pairs: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every decision (for the critic) and every pair (for the actor) once an epoch, in equal numbers of parts."""
        parts = max(1, min(round(n_pairs / self.config.batch_size), n_pairs // 2, n_decisions))
        for _ in range(self.config.n_epochs):
            decisions, pairs = self._shuffled(n_decisions), self._shuffled(n_pairs)
            yield from zip(decisions.tensor_split(parts), pairs.tensor_split(parts), strict=True)

    def _shuffled(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self._generator, device=self.policy.device)

    def _log_prob(self, condition: Tensor, chains: Tensor, decision: Tensor, k: Tensor) -> Tensor:
        """Log p(x_k | x_{k+1}, obs) of pairs: (B,). Chains hold the noisiest step first."""
        position = self.config.tuned_steps - 1 - k
        x, x_next = chains[decision, position], chains[decision, position + 1]
        log_prob = self.mdp.log_prob(condition[decision], x, x_next, k)
        return chunk_log_prob(log_prob, self.policy.n_action_steps)

    @torch.no_grad()
    def _prepare(self, rollout: Rollout) -> tuple[Targets, dict[str, float]]:
        """Scale rewards, estimate advantages, and recompute the log-probs that the ratio starts from."""
        config, device = self.config, self.policy.device
        tensor = {
            name: torch.as_tensor(getattr(rollout, name), device=device)
            for name in ("observations", "final_observations", "chains", "rewards", "terminated", "ended")
        }
        shape = tensor["rewards"].shape
        reward = tensor["rewards"]
        if config.normalize_returns:
            reward = self._reward_scaler(reward, tensor["ended"], torch.as_tensor(rollout.environments))
        condition = self.policy.condition(tensor["observations"].flatten(0, 1))
        value = self.critic(condition).view(shape)
        next_value = self.critic(self.policy.condition(tensor["final_observations"].flatten(0, 1))).view(shape)
        advantage = gae(
            reward, value, next_value, tensor["terminated"], tensor["ended"], config.gamma, config.gae_lambda
        )
        returns = advantage + value
        chains = tensor["chains"].flatten(0, 1)
        every_pair = torch.arange(len(chains) * config.tuned_steps, device=device)
        old_log_prob = torch.cat([
            self._log_prob(condition, chains, pairs // config.tuned_steps, pairs % config.tuned_steps)
            for pairs in every_pair.split(config.batch_size)
        ]).view(-1, config.tuned_steps)  # fmt: skip
        metrics = {
            "dppo/value_mean": float(value.mean()),
            "dppo/explained_variance": explained_variance(value, returns),
            "dppo/reward_std": self._reward_scaler.std,
        }
        return Targets(condition, chains, old_log_prob, advantage.flatten(), returns.flatten()), metrics

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs beside the policy."""
        pool = self.pool.state()
        return {
            "timesteps": self.timesteps,
            "iteration": self.iteration,
            "critic": self.critic.state_dict(),
            "actor_optimizer": checkpoint.optimizer_state(self._actor_optimizer),
            "critic_optimizer": checkpoint.optimizer_state(self._critic_optimizer),
            "reward_scaler": self._reward_scaler.state(),
            "generator": self._generator.get_state(),
            "pool": {
                "episodes": torch.from_numpy(pool.episodes),
                "lengths": torch.from_numpy(pool.lengths),
                "actions": torch.from_numpy(pool.actions),
            },
        }

    def restore(self, state: checkpoint.StateTree) -> None:
        """Take up what `state` returned; the pool must be freshly built, and the policy loaded."""
        self.timesteps, self.iteration = state["timesteps"], state["iteration"]
        self.critic.load_state_dict(state["critic"])
        checkpoint.load_optimizer_state(self._actor_optimizer, state.get("actor_optimizer", {}))
        checkpoint.load_optimizer_state(self._critic_optimizer, state.get("critic_optimizer", {}))
        self._reward_scaler.restore(state["reward_scaler"])
        self._generator.set_state(state["generator"])
        pool = state["pool"]
        if "generators" in pool:
            raise CheckpointError("this run was begun by an earlier dprl, whose noise was another: begin it anew")
        self.pool.restore(EnvState(pool["episodes"].numpy(), pool["lengths"].numpy(), pool["actions"].numpy()))

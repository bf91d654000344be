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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dprl import checkpoint
from dprl.agents.critic import Critic
from dprl.agents.dppo_config import DPPOConfig
from dprl.agents.objective import (
    LOG_PROB_RANGE,
    MAX_LOG_RATIO,
    chunk_log_prob,
    clip_bounds,
    clip_ranges,
    normalized_advantage,
    policy_loss,
    value_loss,
)
from dprl.agents.on_policy import OnPolicyAgent
from dprl.agents.restraint import Restraint
from dprl.agents.targets import Pairs, Targets, epoch
from dprl.cores import at_most_threads, available_cores
from dprl.cuda_graphs import Replayed
from dprl.errors import check
from dprl.mdp import ActionMDP
from dprl.observations import Observation, TensorObservation, batch_size, map_parts, take
from dprl.policy import Policy
from dprl.returns import RunningReturnStd, explained_variance, gae
from dprl.rollout import Rollout, RolloutPool
from dprl.seeding import seeded_init
from dprl.spec import BatchedEnv
from dprl.training.figures import UpdateFigures
from dprl.training.learner import Learner
from dprl.training.precision import check_precision, computing, multiplying


class DPPO(OnPolicyAgent):
    """Fine-tunes with reward: a diffusion or flow policy, or, as plain PPO, a Gaussian or a mixture of them."""

    name = "dppo"
    config: DPPOConfig

    def __init__(
        self,
        policy: Policy,
        env: BatchedEnv | RolloutPool,
        config: DPPOConfig | None = None,
        *,
        tuned_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        """Prepare to fine-tune `policy`. One that denoises gains a trainable copy of its network, in place.

        Args:
            policy: the pretrained policy, or one that DPPO has tuned before.
            env: where it acts; a batched environment is put in a pool.
            config: the numbers.
            tuned_steps: K', in place of the config's.
            seed: of exploration, critic and minibatches.

        Raises:
            ConfigError: a policy that has no density to tune, more tuned than denoising steps, or settings at odds.
            EnvError: the policy does not fit the environment.
        """
        config = config or DPPOConfig()
        config = config if tuned_steps is None else replace(config, tuned_steps=tuned_steps)
        self.config = config
        super().__init__(
            policy, env, tuned_steps=config.tuned_steps, exploration=config.exploration, solver=config.solver,
            n_steps=config.n_steps, exact=config.likelihood == "exact", seed=seed,
        )  # fmt: skip
        n_pairs = self.pool.n_envs * config.n_steps * config.tuned_steps
        check(n_pairs >= 2, "n_envs * n_steps * tuned_steps", n_pairs, "advantages of one pair cannot be normalised")
        check_precision(config.precision, policy.device)
        denoises = not isinstance(self.mdp, ActionMDP)
        check(config.critic == "state" or denoises, "critic", config.critic, "must be state: there is no noisy action")
        falls_apart = config.log_prob_reduction == "mean" or self.mdp.is_gaussian
        remedy = "must be mean: this policy's chunks have one density as a whole, no numbers to sum"
        check(falls_apart, "log_prob_reduction", config.log_prob_reduction, remedy)
        limits = LOG_PROB_RANGE if self.mdp.is_gaussian else (-math.inf, math.inf)
        self._chunk_log_prob = partial(chunk_log_prob, reduction=config.log_prob_reduction, limits=limits)
        self._restraint = Restraint(self.mdp, config, self._chunk_log_prob, self.generator)
        self.critic, self.baseline = self._critics()
        self._values = nn.ModuleList([self.critic] if self.baseline is None else [self.critic, self.baseline])
        self._actor_learner = Learner(self.mdp.trainable(), config.learning_rate, config.max_grad_norm)
        self._value_learner = Learner(self._values, config.critic_learning_rate, config.max_grad_norm)
        bootstraps = config.bootstrap_truncated
        self._bootstraps = self.pool.spec.reward != "sparse" if bootstraps is None else bootstraps
        per_decision = 1 if config.gamma_per == "decision" else policy.n_action_steps
        self._reward_scaler = RunningReturnStd(self.pool.n_envs, config.gamma**per_decision)
        self._discounts = (config.denoising_discount ** torch.arange(config.tuned_steps)).to(policy.device)
        self._clip_ranges = clip_ranges(config).to(policy.device)
        self._log_prob_of: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = self.mdp.log_prob
        self._compiled = False
        self._targets: Targets | None = None
        self._record()

    def _record(self) -> None:
        """Record gradient steps anew: what they use has moved. See `Replayed`."""
        self._critic_step = self._recorded(self._update_critic)
        self._actor_step = self._recorded(self._update_actor)

    def _recorded(self, update: Callable[..., None]) -> Callable[..., dict[str, Tensor]]:
        """Return one gradient step as a function of a minibatch's indices alone, which returns its figures."""

        def step(*rows: Tensor) -> dict[str, Tensor]:
            assert self._targets is not None
            figures = UpdateFigures(self.config.tuned_steps, self.policy.device)
            update(self._targets, *rows[:-2], Pairs(*rows[-2:]), figures)
            return figures.tensors()

        return Replayed(step, self.generator) if self.mdp.is_replayable else step

    def _critics(self) -> tuple[Critic, Critic | None]:
        """V(s), and where it is asked for the baseline V(s, x_{k+1}, k)."""
        config, policy = self.config, self.policy
        sizes = [0]
        if config.critic == "state_action":
            sizes.append(policy.config.horizon * policy.features.action_size + 1)
        with seeded_init(self.seed, "critic"):
            nets = [Critic(policy, size, config.critic_hidden_size, config.critic_activation) for size in sizes]
        critic, *baseline = (net.to(policy.device) for net in nets)
        return critic, baseline[0] if baseline else None

    def collect(self) -> Rollout:
        """See `OnPolicyAgent.collect`."""
        after = self.config.compile_after
        if after is not None and self.iteration >= after:
            self.compile()
        return super().collect()

    def compile(self) -> None:
        """Let torch.compile make chains and updates faster from now on; see `DPPOConfig.compile_after`.

        Raises:
            ConfigError: the likelihood is exact.
        """
        exact = self.config.likelihood == "exact"
        check(not exact, "likelihood", self.config.likelihood, "must be 'steps' to be compiled")
        if not self._compiled:
            self.mdp.compile()
            self._log_prob_of = torch.compile(self._log_prob_of, dynamic=False)
            self._compiled = True
            self._record()

    def update(self, batch: Rollout) -> dict[str, float]:
        """Improve actor and critic on one rollout; return metrics."""
        config = self.config
        with at_most_threads(available_cores()):
            targets, metrics = self._prepare(batch)
        former, self._targets = self._targets, targets.in_place_of(self._targets)
        if self._targets is not former:
            self._record()
        n_decisions = len(targets.returns)
        del targets  # on a GPU there is a copy
        figures = UpdateFigures(config.tuned_steps, self.policy.device)
        actor_learns = self.iteration >= config.critic_warmup
        self._value_learner.set_rate(config.lr_schedule.at(self.iteration))
        self._actor_learner.set_rate(config.lr_schedule.at(max(0, self.iteration - config.critic_warmup)))
        with multiplying(config.precision), at_most_threads(available_cores()):
            for decisions, pairs in self._minibatches(n_decisions):
                figures.merge(self._critic_step(decisions, *pairs))
                figures.gradient_steps += 1
                if actor_learns:
                    found = self._actor_step(*pairs)
                    figures.merge(found)
                    if config.target_kl is not None and found["approx_kl"] > config.target_kl:
                        break
        if self.policy.device.type != "cuda":
            self._targets = None  # a rollout of images is large
        self.iteration += 1
        return metrics | figures.metrics(self.name) | batch.episode_metrics() | {"time/inference_s": batch.inference_s}

    def _update_critic(self, targets: Targets, decisions: Tensor, pairs: Pairs, figures: UpdateFigures) -> None:
        """One gradient step. V(s) is of the state only, so each decision counts once, not once per denoising step."""
        config = self.config
        self._value_learner.zero_grad()
        for rows, share in self._parts(len(decisions)):
            own = decisions[rows]
            with self._computing():
                value = self.critic(take(targets.observation, own), self._augmentation).float()
            loss = value_loss(value, targets.returns[own], targets.value[own], config.clip_range_vf)
            figures.add("value_loss", loss)
            (share * config.vf_coef * loss).backward()
        for rows, share in self._parts(len(pairs.k)) if self.baseline is not None else ():
            part = pairs.at(rows)
            loss = value_loss(self._baseline(targets, part), targets.returns[part.decision])
            figures.add("baseline_loss", loss)
            (share * config.vf_coef * loss).backward()
        figures.add("critic_grad_norm", self._value_learner.step())

    def _update_actor(self, targets: Targets, pairs: Pairs, figures: UpdateFigures) -> None:
        """One gradient step."""
        advantage = normalized_advantage(targets.advantage[pairs], self.config.advantage_quantiles)
        advantage, bounds = advantage * self._discounts[pairs.k], self._bounds(targets, pairs)
        log_ratios = []
        self._actor_learner.zero_grad()
        for rows, share in self._parts(len(pairs.k)):
            part = pairs.at(rows)
            log_ratio = self._log_prob(targets, part) - targets.old_log_prob[part]
            loss = policy_loss(log_ratio, advantage[rows], bounds[:, rows])
            log_ratios.append(log_ratio.detach())
            figures.add("policy_loss", loss)
            with self._computing():
                loss = loss + self._restraint(targets, part, figures)
            (share * loss).backward()
        figures.add("actor_grad_norm", self._actor_learner.step())
        figures.add_ratio(torch.cat(log_ratios).clamp(max=MAX_LOG_RATIO), bounds, pairs.k)

    def _bounds(self, targets: Targets, pairs: Pairs) -> Tensor:
        """Least and largest ratio of pairs: (2, B)."""
        clip = self._clip_ranges[pairs.k]
        if self.config.log_prob_reduction == "mean":
            return clip_bounds(clip)
        return clip_bounds(clip, targets.executed[pairs.decision] * self.policy.features.action_size)

    def _parts(self, n: int) -> Iterator[tuple[slice, float]]:
        """What of a minibatch goes through the networks at once, in as equal parts as may be, and its share of it."""
        count = math.ceil(n / (self.config.micro_batch_size or n))
        edges = [n * i // count for i in range(count + 1)]
        return ((slice(first, end), (end - first) / n) for first, end in pairwise(edges))

    def _computing(self) -> AbstractContextManager[None]:
        """For what updates compute: in the precision that was asked for."""
        return computing(self.config.precision, self.policy.device)

    def _minibatches(self, n_decisions: int) -> Iterator[tuple[Tensor, Pairs]]:
        """Minibatches of decisions, for the critic, and of pairs, for the actor."""
        config = self.config
        trained = round(config.anneal_tuned_steps.at(self.iteration, config.tuned_steps))
        for _ in range(config.n_epochs):
            yield from epoch(n_decisions, trained, config.batch_size, self.generator)

    @property
    def _augmentation(self) -> torch.Generator | None:
        """What augments images in an update; None where there are none."""
        return self.generator if self.policy.features.cameras else None

    def _log_prob(self, targets: Targets, pairs: Pairs) -> Tensor:
        """Log p(x_k | x_{k+1}, obs) of pairs: (B,)."""
        with self._computing():
            condition = self.mdp.condition(take(targets.observation, pairs.decision), self._augmentation)
            log_prob = self._log_prob_of(condition, targets.x(pairs), targets.x_next(pairs), pairs.k)
        return self._chunk_log_prob(log_prob, targets.executed[pairs.decision])

    def _baseline(self, targets: Targets, pairs: Pairs) -> Tensor:
        """V(s, x_{k+1}, k) of pairs: (B,)."""
        assert self.baseline is not None
        step = torch.cat([targets.x(pairs).flatten(1), pairs.k[:, None] / self.config.tuned_steps], dim=1)
        with self._computing():
            value: Tensor = self.baseline(take(targets.observation, pairs.decision), self._augmentation, step)
        return value.float()

    @torch.no_grad()
    def _prepare(self, rollout: Rollout) -> tuple[Targets, dict[str, float]]:
        """Scale rewards and estimate advantages. The log-probs that the ratio starts from come with the rollout."""
        config, device = self.config, self.policy.device
        reward, terminated, ended = map(torch.as_tensor, (rollout.rewards, rollout.terminated, rollout.ended))
        terminated = terminated if self._bootstraps else ended
        executed = torch.as_tensor(rollout.n_steps)
        if config.normalize_returns:
            reward = self._reward_scaler(reward, ended, torch.as_tensor(rollout.environments))
        observation = self._rows(rollout.observations)
        value = self._value(observation).view(reward.shape)
        next_value = self._value(self._rows(rollout.final_observations)).view(reward.shape)
        discount = torch.tensor(config.gamma) ** (executed if config.gamma_per == "step" else 1)
        advantage = gae(reward, value, next_value, terminated, ended, discount, config.gae_lambda)
        returns = advantage + value
        arrays = rollout.chains, rollout.log_probs
        chains, log_probs = (torch.as_tensor(array, device=device).flatten(0, 1) for array in arrays)
        executed = executed.flatten().to(device)
        old_log_prob = torch.stack(  # stored noisiest first
            [self._chunk_log_prob(p, executed) for p in log_probs.flip(1).unbind(1)], dim=1
        )
        columns = (advantage, value, returns)
        flat_advantage, flat_value, flat_returns = (column.flatten().to(device) for column in columns)
        by_k = flat_advantage[:, None].expand_as(old_log_prob)
        targets = Targets(observation, chains, executed, old_log_prob, by_k, flat_value, flat_returns)
        if self.baseline is not None:
            every, k = torch.arange(by_k.numel(), device=device).split(self._at_once), config.tuned_steps
            parts = [self._baseline(targets, Pairs(p.div(k, rounding_mode="floor"), p % k)) for p in every]
            targets = targets._replace(advantage=flat_returns[:, None] - torch.cat(parts).view_as(by_k))
        return targets, {
            "dppo/value_mean": float(value.mean()),
            "dppo/explained_variance": explained_variance(value, returns),
            "dppo/entropy": -float(log_probs.mean()),  # of one number, estimated from what was drawn
            "dppo/reward_std": self._reward_scaler.std,
        }

    @property
    def _at_once(self) -> int:
        return self.config.micro_batch_size or self.config.batch_size

    def _rows(self, observations: Observation) -> TensorObservation:
        """(T, N, ...) -> (T·N, ...), on the device."""
        rows: TensorObservation = map_parts(
            lambda part: torch.as_tensor(part, device=self.policy.device).flatten(0, 1), observations
        )
        return rows

    def _value(self, observation: TensorObservation) -> Tensor:
        """V of decisions (D,), on the CPU."""
        parts = torch.arange(batch_size(observation), device=self.policy.device).split(self._at_once)
        return torch.cat([self.critic(take(observation, rows)) for rows in parts]).cpu()

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs beside the policy."""
        return super().state() | {
            "actor_optimizer": self._actor_learner.state(),
            "critic": self._values.state_dict(),
            "critic_optimizer": self._value_learner.state(),
            "reward_scaler": self._reward_scaler.state(),
        }

    def restore(self, state: checkpoint.StateTree) -> None:
        """Take up what `state` returned; the pool must be freshly built, and the policy loaded."""
        super().restore(state)
        self._values.load_state_dict(state["critic"])
        self._actor_learner.restore(state.get("actor_optimizer", {}))
        self._value_learner.restore(state.get("critic_optimizer", {}))
        self._reward_scaler.restore(state["reward_scaler"])
        self._targets = None

"""Behaviour cloning of a diffusion policy: the denoising loss on demonstrated chunks (arXiv:2303.04137).

Shapes: B batch, O observation steps, D observation size, H actions of a chunk, A action size.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dprl import checkpoint
from dprl.config import validate
from dprl.data import Episodes
from dprl.errors import DatasetError, check
from dprl.networks import polyak_update
from dprl.policy import DiffusionPolicy
from dprl.seeding import torch_generator
from dprl.training import Agent, LoopConfig, train


@dataclass(frozen=True)
class BCConfig:
    """How to imitate."""

    batch_size: int = 256
    """Chunks per gradient step."""
    learning_rate: float = 1e-3
    """AdamW's, at the start."""
    final_learning_rate: float = 1e-4
    """At the end of a cosine decay over the whole run."""
    weight_decay: float = 1e-6
    """AdamW's."""
    ema_decay: float = 0.995
    """Of the averaged weights, which are what is evaluated and saved."""
    steps_per_iteration: int = 100
    """Gradient steps between two chances to log, evaluate or stop."""

    def __post_init__(self) -> None:
        validate(
            self,
            at_least={"batch_size": 1, "steps_per_iteration": 1, "weight_decay": 0},
            above={"learning_rate": 0, "final_learning_rate": 0},
        )
        check(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "must be at least 0 and below 1")


class BC(Agent[Tensor]):
    """Trains `policy.base` on chunks of demonstrations held in memory on the policy's device."""

    name = "bc"

    def __init__(self, policy: DiffusionPolicy, config: BCConfig | None = None, *, seed: int = 0) -> None:
        check(policy.tuned is None, "tuned_below", policy.tuned_below, "must be 0: cloning trains `base` only")
        self.policy = policy
        self.config = config or BCConfig()
        self.seed = seed
        self.timesteps = 0
        self._total_steps = 1
        self._online = copy.deepcopy(policy)
        self._optimizer = torch.optim.AdamW(
            self._online.base.parameters(),
            self.config.learning_rate,
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        self._generator = torch_generator(seed, "bc", device=policy.device)

    def fit(self, data: Episodes, steps: int, *, progress_bar: bool = False) -> DiffusionPolicy:
        """Take `steps` more gradient steps on `data`; return the policy with its averaged weights.

        Raises:
            DatasetError: the data are of other sizes, or no episode is as long as the policy's horizon.
        """
        total = self.timesteps + steps
        self.set_data(data, total)
        train(self, LoopConfig(total), progress_bar=progress_bar)
        return self.policy

    def set_data(self, data: Episodes, total_steps: int) -> None:
        """Put `data` on the device; `total_steps` shapes the learning rate's decay."""
        config, device = self.policy.config, self.policy.device
        sizes, ours = (data.observations.shape[1], data.actions.shape[1]), (config.observation_size, config.action_size)
        if sizes != ours:
            raise DatasetError(f"the data have {sizes} observation and action numbers, the policy has {ours}")
        obs_index, action_index = data.chunk_indices(config.n_obs_steps, config.horizon)
        self._total_steps = total_steps
        self._obs = torch.as_tensor(data.observations, device=device)[torch.as_tensor(obs_index, device=device)]
        self._actions = torch.as_tensor(data.actions, device=device)[torch.as_tensor(action_index, device=device)]

    def collect(self) -> Tensor:
        """Draw the minibatches of one iteration, with replacement: indices (steps, B)."""
        steps = min(self.config.steps_per_iteration, self._total_steps - self.timesteps)
        shape = (steps, self.config.batch_size)
        return torch.randint(len(self._obs), shape, generator=self._generator, device=self.policy.device)

    def update(self, batch: Tensor) -> dict[str, float]:
        """Take one gradient step for each row of `batch` (steps, B)."""
        start = time.perf_counter()
        losses = torch.zeros(len(batch), device=self.policy.device)
        for i, rows in enumerate(batch):
            self._set_learning_rate()
            loss = self._online.loss(self._obs[rows], self._actions[rows], generator=self._generator)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            polyak_update(self._online.base, self.policy.base, 1 - self.config.ema_decay)
            losses[i] = loss.detach()
            self.timesteps += 1
        return {
            "bc/loss": float(losses.mean()),
            "bc/learning_rate": self._optimizer.param_groups[0]["lr"],
            "time/samples_per_s": batch.numel() / (time.perf_counter() - start),
        }

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs beside the policy."""
        return {
            "timesteps": self.timesteps,
            "online": self._online.base.state_dict(),
            "optimizer": checkpoint.optimizer_state(self._optimizer),
            "generator": self._generator.get_state(),
        }

    def restore(self, state: checkpoint.StateTree) -> None:
        """Take up what `state` returned."""
        self.timesteps = state["timesteps"]
        self._online.base.load_state_dict(state["online"])
        checkpoint.load_optimizer_state(self._optimizer, state.get("optimizer", {}))
        self._generator.set_state(state["generator"])

    def _set_learning_rate(self) -> None:
        config, progress = self.config, self.timesteps / self._total_steps
        rate = config.final_learning_rate + 0.5 * (1 + math.cos(math.pi * progress)) * (
            config.learning_rate - config.final_learning_rate
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate

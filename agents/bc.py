"""Behaviour cloning: a policy's own loss on demonstrated chunks (arXiv:2303.04137, section IV). For every policy.

Shapes: B batch, O observation steps, D observation size, H actions of a chunk, A action size.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from dprl import checkpoint
from dprl.config import validate
from dprl.data import Episodes
from dprl.data.loader import Batch, ChunkBatches
from dprl.errors import DatasetError, check
from dprl.networks import polyak_update, weight_decay_groups
from dprl.policy import DiffusionPolicy, InferenceConfig, Policy, masked_mean
from dprl.seeding import seeded_init, torch_generator
from dprl.spec import FloatArray
from dprl.training import Agent, LoopConfig, train
from dprl.training.precision import check_precision, computing

VALIDATION_CHUNKS = 1_024


@dataclass(frozen=True)
class BCConfig:
    """How to imitate."""

    batch_size: int = 256
    """Chunks per gradient step."""
    learning_rate: float = 1e-3
    """AdamW's, after the warm-up."""
    final_learning_rate: float = 1e-4
    """At the end of a cosine decay over the whole run; at most learning_rate."""
    warmup_steps: int = 0
    """Gradient steps over which the learning rate rises from zero."""
    weight_decay: float = 1e-6
    """AdamW's, on weight matrices only."""
    max_grad_norm: float | None = None
    """Gradients are scaled down to this norm. Default: not."""
    ema_decay: float = 0.995
    """Of the averaged weights, which are what is evaluated and saved."""
    ema_power: float | None = None
    """Warm-up of the averaging: at the n-th step the decay is 1 - n^-power, until it reaches ema_decay (0.75 and 0.9999
    in Diffusion Policy). Default: none."""
    pad_after: int | None = None
    """Chunks may reach this many actions beyond an episode's end; those are masked out of the loss. Default: horizon
    - 1, so that every observation is learned from."""
    validation_share: float = 0.0
    """Share of the episodes that is held out; their loss and action error are logged."""
    validation_every: int = 10
    """Iterations between two looks at them."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the forward and backward pass. On processors without bfloat16 instructions it is many times slower."""
    compile: bool = False
    """Compile the networks with torch.compile."""
    num_workers: int | None = None
    """Processes that read the data, which then stay where they are (on disk, if memory-mapped). 0 holds them on the
    policy's device. Default: 0 for data that fit there, else 2."""
    steps_per_iteration: int = 100
    """Gradient steps between two chances to log, evaluate or stop."""

    def __post_init__(self) -> None:
        counts = ("batch_size", "steps_per_iteration", "validation_every")
        unsigned = ("weight_decay", "warmup_steps", "pad_after", "num_workers")
        validate(
            self,
            at_least={**dict.fromkeys(counts, 1), **dict.fromkeys(unsigned, 0)},
            above={"learning_rate": 0, "final_learning_rate": 0},
        )
        rates = (self.final_learning_rate, self.learning_rate)
        check(rates[0] <= rates[1], "final_learning_rate", rates[0], f"must be at most learning_rate = {rates[1]}")
        check(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "must be at least 0 and below 1")
        share = self.validation_share
        check(0 <= share < 1, "validation_share", share, "must be at least 0 and below 1")
        for name in ("max_grad_norm", "ema_power"):
            value = getattr(self, name)
            check(value is None or value > 0, name, value, "must be above 0")


AnyPolicy = TypeVar("AnyPolicy", bound=Policy)


class BC(Agent[Tensor], Generic[AnyPolicy]):
    """Trains a policy on chunks of demonstrations; of a diffusion policy the base network."""

    name = "bc"
    policy: AnyPolicy
    config: BCConfig

    def __init__(self, policy: AnyPolicy, config: BCConfig | None = None, *, seed: int = 0) -> None:
        if isinstance(policy, DiffusionPolicy):
            check(policy.tuned is None, "tuned_below", policy.tuned_below, "must be 0: cloning trains `base` only")
        self.policy = policy
        self.config = config or BCConfig()
        self.seed = seed
        self.timesteps = 0
        self._total_steps = 1
        check_precision(self.config.precision, policy.device)
        self._online = copy.deepcopy(policy).train()
        if self.config.compile:
            for module in self._online.children():
                module.compile()
        groups = weight_decay_groups(self._online, self.config.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, self.config.learning_rate, fused=True)
        self._generator = torch_generator(seed, "bc", device=policy.device)
        self._validation: ChunkBatches | None = None

    def fit(self, data: Episodes, steps: int, *, progress_bar: bool = False) -> AnyPolicy:
        """Take `steps` more gradient steps on `data`; return the policy with its averaged weights.

        Raises:
            ConfigError: no steps.
            DatasetError: the data are of other sizes, or no episode is as long as a chunk must be.
        """
        check(isinstance(steps, int) and steps >= 1, "steps", steps, "must be a whole number of at least 1")
        total = self.timesteps + steps
        self.set_data(data, total)
        train(self, LoopConfig(total), progress_bar=progress_bar)
        return self.policy

    def set_data(self, data: Episodes, total_steps: int) -> None:
        """Take `data` to learn from; `total_steps` shapes the learning rate's decay."""
        require_like(self.policy, data)
        data = self.policy.chunks_of(data)
        held_out: Episodes | None = None
        if self.config.validation_share:
            data, held_out = data.split(self.config.validation_share, self.seed)
        self._total_steps = total_steps
        self._training = self._batches(data)
        self._validation = None if held_out is None else self._batches(held_out)

    def collect(self) -> Tensor:
        """Draw the minibatches of one iteration, with replacement: indices of chunks (steps, B)."""
        steps = min(self.config.steps_per_iteration, self._total_steps - self.timesteps)
        shape = (steps, self.config.batch_size)
        return torch.randint(len(self._training), shape, generator=self._generator, device=self.policy.device)

    def update(self, batch: Tensor) -> dict[str, float]:
        """Take one gradient step for each row of `batch` (steps, B)."""
        start = time.perf_counter()
        losses = torch.stack([self.step(minibatch) for minibatch in self.read(batch)])
        return self.metrics(losses) | {"time/samples_per_s": batch.numel() / (time.perf_counter() - start)}

    def metrics(self, losses: Tensor) -> dict[str, float]:
        """Figures of an iteration whose steps had these losses; of held-out episodes, too, where they are due."""
        metrics = {"bc/loss": float(losses.mean()), "bc/learning_rate": self._optimizer.param_groups[0]["lr"]}
        iteration = -(-self.timesteps // self.config.steps_per_iteration)
        due = iteration % self.config.validation_every == 0 or self.timesteps >= self._total_steps
        return metrics | (self._validate(self._validation) if self._validation is not None and due else {})

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs beside the policy."""
        return {
            "timesteps": self.timesteps,
            "online": self._online.state_dict(),
            "optimizer": checkpoint.optimizer_state(self._optimizer),
            "generator": self._generator.get_state(),
        }

    def restore(self, state: checkpoint.StateTree) -> None:
        """Take up what `state` returned."""
        self.timesteps = state["timesteps"]
        self._online.load_state_dict(state["online"])
        checkpoint.load_optimizer_state(self._optimizer, state.get("optimizer", {}))
        self._generator.set_state(state["generator"])

    def read(self, picks: Tensor) -> Iterator[Batch]:
        """Yield the minibatches that `collect` drew."""
        return self._training.read(picks)

    def step(
        self, batch: Batch, weight: Tensor | None = None, more: Callable[[AnyPolicy], Tensor] | None = None
    ) -> Tensor:
        """Take one gradient step; return the loss of imitation.

        Args:
            batch: what to imitate.
            weight: (B,) of the samples, up to a factor. Default: all alike.
            more: another term of the loss, of the policy that is trained.
        """
        config, device = self.config, self.policy.device
        valid = batch.valid
        if weight is not None:
            share = weight / weight.mean().clamp(min=torch.finfo(weight.dtype).tiny)
            valid = share[:, None].expand(-1, batch.actions.shape[1]) * (1.0 if valid is None else valid)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        dropout = seeded_init(self.seed, "dropout", self.timesteps, device=device)
        with dropout, computing(config.precision, device):
            told = {} if batch.command is None else {"command": batch.command}
            loss = self._online.loss(batch.obs, batch.actions, valid=valid, generator=self._generator, **told)
            whole = loss if more is None else loss + more(self._online)
        self._optimizer.zero_grad()
        whole.backward()
        if config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._online.parameters(), config.max_grad_norm)
        self._optimizer.step()
        self.timesteps += 1
        polyak_update(self._online, self.policy, 1 - self._ema_decay())
        return loss.detach()

    def _learning_rate(self) -> float:
        """Linear warm-up, then a cosine from the first to the final rate."""
        config, step = self.config, self.timesteps
        if step < config.warmup_steps:
            return config.learning_rate * (step + 1) / config.warmup_steps
        progress = min(1.0, (step - config.warmup_steps) / max(self._total_steps - config.warmup_steps, 1))
        span = config.learning_rate - config.final_learning_rate
        return config.final_learning_rate + 0.5 * (1 + math.cos(math.pi * progress)) * span

    def _ema_decay(self) -> float:
        power, decay = self.config.ema_power, self.config.ema_decay
        return decay if power is None else min(decay, 1 - float(self.timesteps) ** -power)

    @torch.no_grad()
    def _validate(self, held_out: ChunkBatches) -> dict[str, float]:
        """Loss and action error of the averaged weights on held-out episodes, always with the same draws."""
        generator = torch_generator(self.seed, "validation", device=self.policy.device)
        n = min(VALIDATION_CHUNKS, len(held_out))
        picks = torch.randperm(len(held_out), generator=generator, device=self.policy.device)[:n]
        losses, errors = [], []
        for batch in held_out.read(picks[: n - n % 64].view(-1, min(64, n)) if n >= 64 else picks[None]):
            losses.append(self.policy.loss(batch.obs, batch.actions, valid=batch.valid, generator=generator))
            drawn = self.policy.draw(batch.obs, InferenceConfig(), generator)
            normalize = self.policy.chunk_normalizer.normalize
            error = self.policy.act(normalize(drawn) - normalize(batch.actions)) ** 2
            errors.append(masked_mean(error, batch.valid))
        return {
            "validation/loss": float(torch.stack(losses).mean()),
            "validation/action_mse": float(torch.stack(errors).mean()),
        }

    def _batches(self, data: Episodes) -> ChunkBatches:
        config, pad_after = self.policy.config, self.config.pad_after
        pad_after = config.horizon - 1 if pad_after is None else pad_after
        chunks = data.chunks(config.n_obs_steps, config.horizon, pad_after=pad_after)
        workers = self.config.num_workers
        return ChunkBatches(data, chunks, self.policy.device, num_workers=workers, commands=self.commands(data))

    def commands(self, data: Episodes) -> FloatArray | None:
        """Return what the policy is told of each step's chunk (S, C), if it is told anything."""
        return self.policy.commands(data) if isinstance(self.policy, DiffusionPolicy) else None


def require_action_chunks(policy: Policy) -> None:
    """Raise ConfigError where the policy's chunks are of more than actions, which critics of actions cannot judge."""
    fits = policy.chunk_size == policy.features.action_size
    check(fits, "policy", policy.name, "must draw actions: plans are learned by diffuser and decision-diffuser")


def require_like(policy: Policy, data: Episodes) -> None:
    """Raise DatasetError unless observations and actions of `data` have the sizes of the policy's."""
    features = policy.features
    sizes = (data.observations.shape[1], data.actions.shape[1])
    ours = (features.observation_size, features.action_size)
    if sizes != ours:
        raise DatasetError(f"the data have {sizes} observation and action numbers, the policy has {ours}")
    cameras = {name: tuple(images.shape[1:]) for name, images in data.images.items()}
    expected = {camera.name: camera.shape for camera in features.cameras}
    if cameras != expected:
        raise DatasetError(f"the data have the cameras {cameras}, the policy has {expected}")

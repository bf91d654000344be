"""The diffusion policy: normalisers, a denoiser, a noise schedule. One folder goes in and out of everything.

Shapes: B samples, O observation steps, D observation size, H actions of a chunk (horizon), E of them executed
(n_action_steps), A action size.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dprl import checkpoint
from dprl.config import from_json, to_json, validate
from dprl.diffusion import SOLVERS, NoiseSchedule
from dprl.errors import CheckpointError, ConfigError, check, did_you_mean
from dprl.networks import DenoisingMLP, MLPConfig
from dprl.seeding import seeded_init, torch_generator

if TYPE_CHECKING:
    from dprl.data import Episodes

CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"
DENOISERS = {"mlp": MLPConfig}


@dataclass(frozen=True)
class PolicyConfig:
    """Everything that shapes a policy, stored with its weights."""

    observation_size: int
    """D."""
    action_size: int
    """A."""
    horizon: int = 4
    """H, actions in a predicted chunk."""
    n_action_steps: int = 4
    """E, how many of them are executed before the next decision."""
    n_obs_steps: int = 1
    """O, how many of the latest observations it sees."""
    num_train_timesteps: int = 20
    """K, denoising steps."""
    clip_sample: float = 1.0
    """Predicted clean actions are clamped to this, in normalised units."""
    denoiser: MLPConfig = field(default_factory=MLPConfig)
    """The network."""
    env_id: str | None = None
    """The environment of its demonstrations, if known."""

    def __post_init__(self) -> None:
        sizes = ("observation_size", "action_size", "horizon", "n_obs_steps", "num_train_timesteps")
        validate(self, at_least=dict.fromkeys(sizes, 1), above={"clip_sample": 0})
        fits = 1 <= self.n_action_steps <= self.horizon
        check(fits, "n_action_steps", self.n_action_steps, f"must be from 1 to the horizon, which is {self.horizon}")


class MinMaxNormalizer(nn.Module):
    """Maps [low, high] to [-1, 1], number by number; a number that never varied is only shifted."""

    low: Tensor
    high: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("low", -torch.ones(size))
        self.register_buffer("high", torch.ones(size))

    def fit(self, values: Tensor) -> None:
        """Take the range of `values` (n, size)."""
        self.low.copy_(values.amin(0))
        self.high.copy_(values.amax(0))

    def normalize(self, values: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        return (values - self._middle) / self._half

    def unnormalize(self, values: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        return values * self._half + self._middle

    @property
    def _middle(self) -> Tensor:
        return (self.high + self.low) / 2

    @property
    def _half(self) -> Tensor:
        half = (self.high - self.low) / 2
        return torch.where(half < 1e-6, torch.ones_like(half), half)


@dataclass(frozen=True)
class PredictState:
    """What `predict` remembers between environment steps: the open chunks and the latest observations."""

    chunk: Tensor
    """(N, H, A)."""
    next_action: Tensor
    """(N,) index into the chunk."""
    history: Tensor
    """(N, O, D)."""


class DiffusionPolicy(nn.Module):
    """A policy that denoises action chunks.

    `base` is the pretrained denoiser. A fine-tuned policy also has `tuned`, used where the training timestep is
    below `tuned_below`.
    """

    def __init__(self, config: PolicyConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.schedule = NoiseSchedule(config.num_train_timesteps)
        self.observation_normalizer = MinMaxNormalizer(config.observation_size)
        self.action_normalizer = MinMaxNormalizer(config.action_size)
        with seeded_init(seed, "policy"):
            condition_size = config.n_obs_steps * config.observation_size
            self.base = DenoisingMLP(config.horizon, config.action_size, condition_size, config.denoiser)
        self.tuned: DenoisingMLP | None = None
        self.tuned_below = 0

    @classmethod
    def for_dataset(
        cls,
        data: Episodes,
        denoiser: str | MLPConfig = "mlp",
        *,
        horizon: int = 4,
        n_action_steps: int | None = None,
        n_obs_steps: int = 1,
        num_train_timesteps: int = 20,
        seed: int = 0,
    ) -> DiffusionPolicy:
        """Build an untrained policy with the sizes and normalisation ranges of `data`.

        Args:
            data: the demonstrations.
            denoiser: a name in `DENOISERS`, or its config.
            horizon: actions in a predicted chunk.
            n_action_steps: how many of them are executed. Default: all.
            n_obs_steps: how many of the latest observations it sees.
            num_train_timesteps: denoising steps.
            seed: of the initial weights.
        """
        if isinstance(denoiser, str):
            known = denoiser in DENOISERS
            check(known, "denoiser", denoiser, f"must be one of {list(DENOISERS)}.{did_you_mean(denoiser, DENOISERS)}")
            denoiser = DENOISERS[denoiser]()
        config = PolicyConfig(
            observation_size=data.observations.shape[1],
            action_size=data.actions.shape[1],
            horizon=horizon,
            n_action_steps=horizon if n_action_steps is None else n_action_steps,
            n_obs_steps=n_obs_steps,
            num_train_timesteps=num_train_timesteps,
            denoiser=denoiser,
            env_id=data.env_id,
        )
        policy = cls(config, seed=seed)
        policy.observation_normalizer.fit(torch.as_tensor(data.observations))
        policy.action_normalizer.fit(torch.as_tensor(data.actions))
        return policy

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.observation_normalizer.low.device

    def condition(self, obs: Tensor) -> Tensor:
        """Normalise and flatten observations: (B, O, D) -> (B, O·D)."""
        return self.observation_normalizer.normalize(obs).flatten(1)

    def denoiser_at(self, timestep: int) -> nn.Module:
        """Return the network that the training timestep belongs to."""
        return self.tuned if self.tuned is not None and timestep < self.tuned_below else self.base

    def tune_below(self, timestep: int) -> None:
        """Give the steps below `timestep` a network of their own, a copy of `base`; a second call must agree.

        Raises:
            ConfigError: more steps than the policy has, or other steps than those already tuned.
        """
        steps = self.config.num_train_timesteps
        fits = 1 <= timestep <= steps
        check(fits, "tuned_steps", timestep, f"must be from 1 to the policy's denoising steps, which are {steps}")
        agrees = self.tuned is None or self.tuned_below == timestep
        check(agrees, "tuned_steps", timestep, f"this policy is already tuned in its last {self.tuned_below} steps")
        if self.tuned is None:
            self.tuned = copy.deepcopy(self.base)
            self.tuned_below = timestep

    def set_n_action_steps(self, n_action_steps: int) -> None:
        """Execute this many actions of each chunk from now on.

        Raises:
            ConfigError: more than the horizon.
        """
        self.config = replace(self.config, n_action_steps=n_action_steps)

    def loss(self, obs: Tensor, actions: Tensor, *, generator: torch.Generator) -> Tensor:
        """Denoising loss, mean |ε - ε_θ(x_t, t, obs)|² (arXiv:2006.11239 eq. 14), of the base network.

        Args:
            obs: (B, O, D), not normalised.
            actions: (B, H, A), not normalised.
            generator: draws the timesteps and the noise; on the policy's device.

        Returns:
            A scalar.
        """
        timesteps = torch.randint(
            self.config.num_train_timesteps, (len(actions),), device=actions.device, generator=generator
        )
        noise = torch.randn(actions.shape, device=actions.device, generator=generator)
        clean = self.action_normalizer.normalize(actions)
        return denoising_loss(self.base, self.schedule, clean, self.condition(obs), timesteps, noise)

    @torch.no_grad()
    def sample(
        self,
        obs: Tensor,
        *,
        solver: str = "ddpm",
        num_inference_steps: int | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Draw one action chunk for each observation.

        Args:
            obs: (B, O, D), not normalised.
            solver: a name in `dprl.diffusion.SOLVERS`.
            num_inference_steps: denoising steps; default: the solver's.
            noise: (n_draws, B, H, A), every normal draw in the order of its use, the initial noise first; see
                `n_draws`. Replays a sample exactly.
            generator: draws the noise where `noise` is not given. Default: torch's own.
            temperature: scales the noise of every step but the initial one.

        Returns:
            Actions (B, H, A) in the environment's units.

        Raises:
            ConfigError: unknown solver, or a shape that does not fit.
        """
        obs = self._checked_observations(obs)
        draws_shape = (self.n_draws(solver, num_inference_steps), len(obs), *self._chunk_shape)
        if noise is None:
            source = self.device if generator is None else generator.device
            noise = torch.randn(draws_shape, device=source, generator=generator).to(self.device)
        check(noise.shape == draws_shape, "noise", tuple(noise.shape), f"must have the shape {draws_shape}")
        condition = self.condition(obs)

        def predict(noisy: Tensor, timestep: int) -> Tensor:
            t = torch.tensor([timestep], device=noisy.device)
            prediction: Tensor = self.denoiser_at(timestep)(noisy, t, condition)
            return prediction

        clean = SOLVERS[solver].solve(self.schedule, predict, noise, self.config.clip_sample, temperature)
        return self.action_normalizer.unnormalize(clean)

    def n_draws(self, solver: str = "ddpm", num_inference_steps: int | None = None) -> int:
        """Return how many normal draws one sample takes."""
        known = solver in SOLVERS
        check(known, "solver", solver, f"must be one of {list(SOLVERS)}.{did_you_mean(solver, SOLVERS)}")
        return SOLVERS[solver].n_draws(self.schedule, num_inference_steps)

    def predict(
        self,
        observation: np.ndarray[Any, Any],
        state: tuple[Any, ...] | PredictState | None = None,
        episode_start: np.ndarray[Any, Any] | None = None,
        deterministic: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[np.ndarray[Any, Any], PredictState]:
        """Return one environment step's action, as stable-baselines3's `predict` does.

        A chunk is denoised every `n_action_steps` calls, and at once where an episode starts.

        Args:
            observation: (N, D), or (D,) for one environment.
            state: what the last call returned; None at the very start.
            episode_start: (N,) bool, True where `observation` is an episode's first.
            deterministic: draw the same noise for every decision, so that equal observations give equal actions.
            generator: draws the noise otherwise. Default: torch's own.

        Returns:
            Actions (N, A), or (A,), and the state for the next call.
        """
        single = np.ndim(observation) == 1
        rows = np.atleast_2d(np.ascontiguousarray(observation, np.float32))
        size = self.config.observation_size
        fits = rows.ndim == 2 and rows.shape[1] == size
        check(fits, "observation", np.shape(observation), f"must have the shape (N, {size}) or ({size},)")
        obs = torch.as_tensor(rows, device=self.device)
        start = torch.ones(len(obs), dtype=torch.bool, device=self.device)
        config = self.config
        if isinstance(state, PredictState):
            n = len(state.chunk)
            check(len(obs) == n, "observation", np.shape(observation), f"the state is of {n} environments")
            start = torch.as_tensor(np.zeros(len(obs)) if episode_start is None else episode_start).to(start)
            chunk, index = state.chunk.clone(), state.next_action.clone()
            history = torch.cat([state.history[:, 1:], obs[:, None]], dim=1)
        else:
            chunk = torch.zeros(len(obs), *self._chunk_shape, device=self.device)
            index = torch.zeros(len(obs), dtype=torch.long, device=self.device)
            history = torch.zeros(len(obs), config.n_obs_steps, config.observation_size, device=self.device)
        history[start] = obs[start][:, None].expand(-1, config.n_obs_steps, -1)
        due = start | (index >= config.n_action_steps)
        if due.any():
            noise = self._same_noise(int(due.sum())) if deterministic else None
            chunk[due] = self.sample(history[due], noise=noise, generator=generator)
            index[due] = 0
        action = chunk[torch.arange(len(obs)), index].cpu().numpy()
        return (action[0] if single else action), PredictState(chunk, index + 1, history)

    def save_pretrained(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the folder `path`: config.json and model.safetensors, all or nothing.

        Raises:
            RunExistsError: `path` exists and `overwrite` is not set.
        """
        checkpoint.publish(Path(path), self.write, overwrite=overwrite)

    def write(self, folder: Path) -> None:
        """Write config.json and model.safetensors into an existing folder."""
        config = {"type": "diffusion", "tuned_below": self.tuned_below, **to_json(self.config)}
        checkpoint.write_json(folder / CONFIG_FILE, config)
        checkpoint.save_tensors(folder / MODEL_FILE, self.state_dict())

    @classmethod
    def from_pretrained(cls, path: str | Path, *, device: torch.device | str = "cpu") -> DiffusionPolicy:
        """Load a policy folder, or a run folder's best (else last) checkpoint. Nothing is unpickled.

        Raises:
            CheckpointError: missing, damaged, or not a policy; the message names the file.
        """
        folder = find_policy(Path(path))
        checkpoint.verify(folder)
        data = checkpoint.read_json(folder / CONFIG_FILE)
        if not isinstance(data, dict) or data.pop("type", None) != "diffusion":
            raise CheckpointError(f"'{folder / CONFIG_FILE}' does not describe a dprl diffusion policy")
        tuned_below = data.pop("tuned_below", 0)
        try:
            policy = cls(from_json(PolicyConfig, data, str(folder / CONFIG_FILE)))
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
        steps = policy.config.num_train_timesteps
        if type(tuned_below) is not int or not 0 <= tuned_below <= steps:
            raise CheckpointError(f"'{folder / CONFIG_FILE}': tuned_below = {tuned_below!r}: must be 0 to {steps}")
        if tuned_below:
            policy.tune_below(tuned_below)
        try:
            policy.load_state_dict(checkpoint.load_tensors(folder / MODEL_FILE))
        except RuntimeError as error:
            raise CheckpointError(f"'{folder / MODEL_FILE}' does not fit its config.json: {error}") from error
        return policy.to(device)

    @property
    def _chunk_shape(self) -> tuple[int, int]:
        return self.config.horizon, self.config.action_size

    def _same_noise(self, n: int) -> Tensor:
        generator = torch_generator(0, "deterministic")
        noise = torch.randn(self.n_draws(), 1, *self._chunk_shape, generator=generator)
        return noise.to(self.device).expand(-1, n, -1, -1)

    def _checked_observations(self, obs: Tensor) -> Tensor:
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        shape = (self.config.n_obs_steps, self.config.observation_size)
        fits = obs.ndim == 3 and obs.shape[1:] == shape
        check(fits, "obs", tuple(obs.shape), f"must have the shape (batch, {shape[0]}, {shape[1]})")
        return obs


def denoising_loss(
    denoiser: nn.Module, schedule: NoiseSchedule, clean: Tensor, condition: Tensor, timesteps: Tensor, noise: Tensor
) -> Tensor:
    """Mean |ε - ε_θ(x_t, t, s)|² over normalised actions (B, H, A), conditions (B, C), timesteps (B,)."""
    noisy = schedule.add_noise(clean, noise, timesteps)
    return nn.functional.mse_loss(denoiser(noisy, timesteps, condition), noise)


def find_policy(path: Path) -> Path:
    """Return the policy folder that `path` means: itself, or the best or last checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    candidates = [path, path / "checkpoints" / "best", path / "checkpoints" / "last"]
    for folder in candidates:
        if (folder / CONFIG_FILE).is_file() and (folder / MODEL_FILE).is_file():
            return folder
    raise CheckpointError(
        f"'{path}' holds no policy: expected {CONFIG_FILE} and {MODEL_FILE}, or a run folder with checkpoints/"
    )

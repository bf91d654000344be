"""The diffusion policy (arXiv:2303.04137): a denoiser and a noise schedule. Solver and steps are chosen at inference.

Shapes: B samples, O observation steps, D observation size, F features of one observation step, H actions of a chunk
(horizon), A action size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from dprl.config import validate
from dprl.data.transitions import returns_to_go
from dprl.diffusion import (
    NoiseSchedule,
    ScheduleConfig,
    SolverConfig,
    Step,
    n_draws,
    solve,
    solve_guided,
    solver_steps,
)
from dprl.diffusion.solvers import SolverName, Spacing
from dprl.errors import CheckpointError, DatasetError, check, check_count, did_you_mean
from dprl.guidance import Guide, Told, guided
from dprl.networks import (
    DENOISERS,
    CommandedDenoiser,
    Denoiser,
    DenoiserConfig,
    MLPConfig,
    build_denoiser,
    commanded,
)
from dprl.networks.vision import ImageEncoder
from dprl.observations import TensorObservation, batch_size
from dprl.policy.base import Policy, PolicyConfig, masked_mean
from dprl.policy.candidates import Scorer, Selection, best_of
from dprl.policy.control import InferenceConfig, check_temperature
from dprl.policy.normalize import MinMaxNormalizer
from dprl.seeding import draw_normal, draw_uniform, torch_generator
from dprl.spec import FloatArray

if TYPE_CHECKING:
    from dprl.data import Episodes


@dataclass(frozen=True)
class DiffusionConfig(PolicyConfig, ScheduleConfig):
    """A policy that denoises its chunks, by diffusion or rectified flow."""

    clip_sample: float | None = 1.0
    """Predicted clean actions are clamped to ± this, in normalised units; None does not."""
    denoiser: DenoiserConfig = field(default_factory=MLPConfig)
    """The network."""
    sampling: SolverConfig = field(default_factory=SolverConfig)
    """How it samples where nothing else is asked for."""
    command: Literal["return", "goal"] | None = None
    """What it can be told shall come of its chunks, for classifier-free guidance: the return to be earned, as a share
    of the range of those in the data, or the state to end in. Default: nothing."""
    command_dropout: float = 0.25
    """Share of the chunks in training of which it is told nothing."""
    command_gamma: float = 0.99
    """Discount of one environment step in the returns."""

    def __post_init__(self) -> None:
        PolicyConfig.__post_init__(self)
        ScheduleConfig.__post_init__(self)
        if self.clip_sample is not None:
            validate(self, above={"clip_sample": 0})
        dropout = self.command_dropout
        check(0 < dropout < 1, "command_dropout", dropout, "must be between 0 and 1: it learns with and without")
        check(0 <= self.command_gamma <= 1, "command_gamma", self.command_gamma, "must be from 0 to 1")
        for name, told in (("command_dropout", (None,)), ("command_gamma", (None, "goal"))):
            value, idle = getattr(self, name), self.command in told
            check(not idle or value == getattr(DiffusionConfig, name), name, value, "needs a command that has it")
        solver_steps(self.noise, self.sampling)

    @property
    def noise(self) -> ScheduleConfig:
        """The noise schedule alone."""
        return ScheduleConfig(**{f.name: getattr(self, f.name) for f in fields(ScheduleConfig)})


class DiffusionPolicy(Policy):
    """Denoises action chunks.

    `base` is the pretrained denoiser. A fine-tuned policy also has `tuned`, used where the training timestep is
    below `tuned_below`; and where it sees images `tuned_encoder`, through which that network sees them.
    """

    name = "diffusion"
    config_class = DiffusionConfig
    config: DiffusionConfig

    def _build(self, feature_size: int) -> None:
        config = self.config
        self.schedule = NoiseSchedule(config.noise)
        self.command_size = {None: 0, "return": 1, "goal": self.features.observation_size}[config.command]
        told = config.command is not None
        check(not told or self.command_size > 0, "command", config.command, "must be return: there are images alone")
        width = feature_size + (self.command_size + 1 if told else 0)
        self.base = self._network(width)
        if told:
            self.base = CommandedDenoiser(self.base, feature_size, self.command_size)
            self.command_normalizer = MinMaxNormalizer(self.command_size)
        self.tuned: Denoiser | None = None
        self.tuned_encoder: ImageEncoder | None = None
        self.tuned_below = 0

    def _network(self, width: int) -> Denoiser:
        """Make the denoiser for a condition of `width` numbers."""
        config = self.config
        return build_denoiser(config.denoiser, config.horizon, self.denoised_size, config.n_obs_steps, width)

    @classmethod
    def for_dataset(
        cls,
        data: Episodes,
        config: DiffusionConfig | None = None,
        *,
        denoiser: str | DenoiserConfig | None = None,
        seed: int = 0,
    ) -> Self:
        """See `Policy.for_dataset`.

        Args:
            data: the demonstrations.
            config: everything that may be chosen.
            denoiser: a name in `DENOISERS`, or its config, in place of the config's.
            seed: of the initial weights.
        """
        config = config or DiffusionConfig()
        if isinstance(denoiser, str):
            known = denoiser in DENOISERS
            check(known, "denoiser", denoiser, f"must be one of {list(DENOISERS)}.{did_you_mean(denoiser, DENOISERS)}")
            config = replace(config, denoiser=DENOISERS[denoiser].config())
        elif denoiser is not None:
            config = replace(config, denoiser=denoiser)
        return super().for_dataset(data, config, seed=seed)

    def set_sampling(self, sampling: SolverConfig, clip_sample: float | None) -> None:
        """Sample so from now on, where nothing else is asked for.

        Raises:
            ConfigError: the schedule does not have such steps.
        """
        self.config = replace(self.config, sampling=sampling, clip_sample=clip_sample)

    def denoiser_at(self, timestep: int) -> Denoiser:
        """Return the network that the training timestep belongs to."""
        return self.tuned if self.tuned is not None and timestep < self.tuned_below else self.base

    def tune_below(self, timestep: int) -> None:
        """Give the timesteps below `timestep` a network of their own, a copy of `base`; a second call must agree.

        Raises:
            ConfigError: more timesteps than the policy has, or others than those already tuned.
        """
        steps = self.config.num_train_timesteps
        fits = 1 <= timestep <= steps
        check(fits, "timestep", timestep, f"must be from 1 to the policy's training timesteps, which are {steps}")
        agrees = self.tuned is None or self.tuned_below == timestep
        check(agrees, "timestep", timestep, f"this policy is already tuned below timestep {self.tuned_below}")
        if self.tuned is None:
            self.tuned = copy.deepcopy(self.base)
            self.tuned_encoder = copy.deepcopy(self.encoder)
            self.tuned_below = timestep

    def fit_actions(self, data: Episodes, seed: int) -> None:
        """See `Policy.fit_actions`: the range of the commands."""
        if self.config.command == "goal":
            self.command_normalizer.load_state_dict(self.observation_normalizer.state_dict())
        elif self.config.command == "return":
            self.fit_commands(self._outcomes(data))

    def fit_commands(self, outcomes: FloatArray) -> None:
        """Let commands be shares of the range of `outcomes` (S, 1)."""
        self.command_normalizer.fit(torch.as_tensor(np.stack([outcomes.min(0), outcomes.max(0)])))

    def _outcomes(self, data: Episodes) -> FloatArray:
        """What came of every step, in units of the data: (S, C)."""
        if self.config.command == "return":
            return returns_to_go(data, self.config.command_gamma)[:, None]
        return data.final_observations.repeat(data.lengths, axis=0)

    def commands(self, data: Episodes, outcomes: FloatArray | None = None) -> FloatArray:
        """Return what every step of the data would have been commanded: (S, C), or (S, 0) of a policy without.

        Args:
            data: ...
            outcomes: (S, C) what came of every step. Default: what came in the data.

        Raises:
            DatasetError: returns are needed, and the data have no rewards, or the same everywhere.
        """
        if self.config.command is None:
            return np.zeros((int(data.ends[-1]), 0), np.float32)
        came = self._outcomes(data) if outcomes is None else outcomes
        if self.config.command == "return" and came.min() == came.max():
            raise DatasetError(f"every return of the data is {came.flat[0]:g}: there is nothing to command")
        return np.asarray(self.command_normalizer.normalize(torch.as_tensor(came, device=self.device)).cpu())

    def loss(
        self,
        obs: TensorObservation,
        actions: Tensor,
        *,
        valid: Tensor | None = None,
        generator: torch.Generator,
        command: Tensor | None = None,
    ) -> Tensor:
        """Return the squared error of the base network's prediction (arXiv:2006.11239 eq. 14), see `Policy.loss`.

        `command` (B, C), as `commands` has it, is kept from the network for a share of the chunks.
        """
        timesteps = torch.randint(
            self.config.num_train_timesteps, (len(actions),), device=actions.device, generator=generator
        )
        noise = draw_normal((len(actions), *self._chunk_shape), generator, actions.device)
        clean = self._part(self.targets(obs, actions, valid))
        condition = self.condition(obs, generator if self.training else None)
        if command is not None:
            draws = draw_uniform((len(command),), generator, command.device)
            condition = commanded(condition, command, draws >= self.config.command_dropout)
        return denoising_loss(self.base, self.schedule, clean, condition, timesteps, noise, valid, self._weights())

    @torch.no_grad()
    def sample(
        self,
        obs: TensorObservation,
        *,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        solver: SolverName | None = None,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        timestep_spacing: Spacing | None = None,
        noise: Tensor | None = None,
        candidates: int = 1,
        scorer: Scorer | None = None,
        selection: Selection = "argmax",
        guide: Guide | None = None,
    ) -> Tensor:
        """Draw one action chunk for each observation.

        Args:
            obs: (B, O, D), or named parts; not normalised, images uint8.
            generator: draws the noise where `noise` is not given. Default: torch's own.
            temperature: scales the noise of every step but the initial one, so of ddpm, sde-dpmsolver++, and ddim
                with an eta.
            solver: see `SolverConfig`; without any of these four the policy's own way, `config.sampling`.
            num_inference_steps: see `SolverConfig`.
            eta: see `SolverConfig`.
            timestep_spacing: see `SolverConfig`.
            noise: (n_draws, B, H, A), every normal draw in the order of its use, the initial noise first; see
                `n_draws`. Replays a sample exactly. With candidates, (n_draws, B·candidates, H, A).
            candidates: draw so many for each observation and choose among them.
            scorer: what chooses. Default: the policy's own, `scorer`.
            selection: how; see `best_of`.
            guide: moves every denoising step, see `dprl.guidance`; of candidates, each one's.

        Returns:
            Actions (B, H, A) in the environment's units.

        Raises:
            ConfigError: unknown solver, a temperature below 0, a shape that does not fit, or what is not finite.
        """
        check_temperature(temperature)
        obs = self.checked(obs)
        check_count("candidates", candidates)
        self.check_guide(guide)
        if candidates > 1:
            return best_of(
                lambda every: self.sample(
                    every,
                    generator=generator,
                    temperature=temperature,
                    solver=solver,
                    num_inference_steps=num_inference_steps,
                    eta=eta,
                    timestep_spacing=timestep_spacing,
                    noise=noise,
                    guide=guide,
                ),
                obs,
                candidates,
                scorer or self.scorer,
                selection=selection,
                generator=generator,
            )
        own = self.config.sampling.solver if eta else None  # a policy's own solver may be the one that has an eta
        steps = self._steps(_solver_config(solver or own, num_inference_steps, eta, timestep_spacing))
        shape = (n_draws(steps), batch_size(obs), *self._chunk_shape)
        draws = self.drawn(shape, noise, generator)
        return self._denoise(obs, steps, draws[0], draws[1:], temperature, guide)

    def rsample(self, obs: TensorObservation, generator: torch.Generator | None = None) -> Tensor:
        """Draw chunks the policy's own way, through which gradients flow to the weights, as torch.distributions does.

        Args:
            obs: (B, O, D), or named parts; not normalised.
            generator: draws the noise. Default: torch's own.

        Returns:
            Actions (B, H, A) in the environment's units.

        Raises:
            ConfigError: shapes that do not fit.
        """
        self.check_shapes(obs)
        steps = self._steps(SolverConfig())
        draws = draw_normal((n_draws(steps), batch_size(obs), *self._chunk_shape), generator, self.device)
        return self._denoise(obs, steps, draws[0], draws[1:], 1.0)

    def denoise_once(self, obs: TensorObservation, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Predict chunks from noisy ones at random timesteps, by one call of the network (EDP, arXiv:2305.20081).

        Args:
            obs: (B, O, D), or named parts; not normalised.
            actions: (B, H, A) in the environment's units, to which noise is added.
            generator: draws noise and timesteps. Default: torch's own.

        Returns:
            Actions (B, H, A) in the environment's units, through which gradients flow to the weights.

        Raises:
            ConfigError: shapes that do not fit.
        """
        config, schedule = self.config, self.schedule
        timesteps = torch.randint(
            config.num_train_timesteps, (len(actions),), device=actions.device, generator=generator
        )
        noise = draw_normal((len(actions), *self._chunk_shape), generator, actions.device)
        noisy = schedule.add_noise(self._part(self.targets(obs, actions, None)), noise, timesteps)
        prediction = self.base(noisy, timesteps, self.condition(obs))
        return self._whole(schedule.predict_clean(noisy, prediction, timesteps, config.clip_sample))

    def n_draws(self, solver: SolverConfig | None = None) -> int:
        """Return how many normal draws one sample takes."""
        return n_draws(self._steps(solver or SolverConfig()))

    def check_inference(self, inference: InferenceConfig) -> None:
        """See `Policy.check_inference`."""
        n, steps = inference.warm_start_steps, self._steps(inference)
        fits = n is None or n <= len(steps)
        check(fits, "warm_start_steps", n, f"must be at most the solver's steps, which are {len(steps)}")
        draws = inference.temperature == 1 or len(steps) == 1 or n_draws(steps) > 1
        check(draws, "temperature", inference.temperature, "the solver draws no noise after the initial one, which a "
              "temperature leaves as it is; choose ddpm, sde-dpmsolver++, or ddim with an eta above 0")  # fmt: skip

    def check_guide(self, guide: Guide | None) -> None:
        """See `Policy.check_guide`."""
        fits = guide is None or isinstance(guide, Guide)
        check(fits, "guide", type(guide).__name__, "must have a method shift(step)")

    @torch.no_grad()
    def draw(
        self,
        obs: TensorObservation,
        inference: InferenceConfig,
        generator: torch.Generator | None,
        *,
        deterministic: bool = False,
        plan: Tensor | None = None,
        group: int = 1,
        guide: Guide | None = None,
    ) -> Tensor:
        """See `Policy.draw`; a deterministic decision draws the same noise for every observation."""
        obs = self.checked(obs)
        steps, n = self._steps(inference), batch_size(obs)
        if plan is not None and inference.warm_start_steps is not None:
            steps = steps[-inference.warm_start_steps :]
        if deterministic:
            generator = torch_generator(0, "deterministic")
        shape = (n_draws(steps), group if deterministic else n, *self._chunk_shape)
        draws = draw_normal(shape, generator, self.device)
        draws = draws.expand(-1, n, -1, -1) if group == 1 else draws.repeat(1, n // shape[1], 1, 1)
        x = draws[0]
        if plan is not None:
            level = self.schedule.timesteps[steps[0].timestep].expand(n)
            x = self.schedule.add_noise(self._part(self.chunk_normalizer.normalize(plan)), x, level)
        return self._denoise(obs, steps, x, draws[1:], inference.temperature, guide)

    def _denoise(
        self,
        obs: TensorObservation,
        steps: tuple[Step, ...],
        x: Tensor,
        draws: Tensor,
        temperature: float,
        guide: Guide | None = None,
    ) -> Tensor:
        clip, schedule, timesteps = self.config.clip_sample, self.schedule, [step.timestep for step in steps]
        conditions = self.conditions(obs, timesteps)
        known = self.prepare_steps(timesteps, *conditions)
        given = self._given(obs)

        def predict(noisy: Tensor, timestep: int, prepared: Tensor, clip: float | None) -> Tensor:
            prediction = self.denoiser_at(timestep).denoise(noisy, prepared)
            return given(schedule.predict_clean(noisy, prediction, timestep, clip))

        if guide is None:
            clean = solve(steps, lambda noisy, t: predict(noisy, t, next(known), clip), x, draws, temperature)
            return self._whole(clean)

        def allowed(clean: Tensor) -> Tensor:
            return given(clean if clip is None else clean.clamp(-clip, clip))

        def network(timestep: int) -> Callable[[Tensor], Tensor]:
            prepared = next(known)
            return lambda noisy: predict(noisy, timestep, prepared, None)

        told = None if self.config.command is None else self._told(*conditions, given)
        whole = self._whole
        advance = guided(
            guide, steps, schedule, network, obs=obs, to_actions=whole, allowed=allowed, kept=self._kept, told=told
        )
        clean = solve_guided(steps, advance, x, draws, temperature)
        finite = bool(clean.isfinite().all())
        check(finite, "guide", "not finite", "its gradients and commands must be finite numbers")
        return whole(clean)

    def _told(self, tuned: Tensor, base: Tensor, given: Callable[[Tensor], Tensor]) -> Callable[[int], Told]:
        """The network at a timestep as `DenoisingStep.told`, of what `conditions` returned."""

        def at(timestep: int) -> Told:
            denoiser = self.denoiser_at(timestep)
            condition = base if denoiser is self.base else tuned
            time = self.schedule.timesteps[timestep : timestep + 1]

            def predict(noisy: Tensor, command: Tensor) -> Tensor:
                size, what = self.command_size, self.config.command
                fits = tuple(command.shape) in ((size,), (len(noisy), size))
                one = f"must be {size} number{'s' * (size > 1)}, or as many for each observation"
                check(fits, "command", tuple(command.shape), f"{one}: the policy is told its {what}")
                told = self.command_normalizer.normalize(self._in_units(command)).expand(len(noisy), -1)
                prediction = denoiser(noisy, time, commanded(condition, told))
                return given(self.schedule.predict_clean(noisy, prediction, timestep, None))

            return predict

        return at

    def known(self, command: tuple[float, ...]) -> bool:
        """Whether a command (C,) lies in the range of those in the data."""
        told = self.command_normalizer.normalize(self._in_units(torch.tensor(command)))
        return bool((told.abs() <= 1 + 1e-4).all())

    def _in_units(self, command: Tensor) -> Tensor:
        """A command in units of the data: returns are given as shares of their range."""
        command = command.to(self.device, torch.float32)
        return self.command_normalizer.unnormalize(2 * command - 1) if self.config.command == "return" else command

    def conditions(self, obs: TensorObservation, timesteps: list[int]) -> tuple[Tensor, Tensor]:
        """Return what the tuned and the base network see at `timesteps`: (B, O, F) each, the same without images."""
        if self.tuned_encoder is None:
            condition = self.condition(obs)
            return condition, condition
        n_base = sum(self.denoiser_at(t) is self.base for t in timesteps)
        encoders = [self.tuned_encoder, self.encoder]
        if n_base in (0, len(timesteps)):  # one network is all that is used
            condition = self.condition(obs, encoder=encoders[0 if n_base == 0 else 1])
            return condition, condition
        tuned, base = (self.condition(obs, encoder=encoder) for encoder in encoders)
        return tuned, base

    def prepare_steps(
        self, timesteps: list[int], condition: Tensor, base_condition: Tensor, *, pretrained: bool = False
    ) -> Iterator[Tensor]:
        """Let the networks prepare what is the same at every step, for descending `timesteps`: n tensors (B, ...)."""
        n_base = sum(pretrained or self.denoiser_at(t) is self.base for t in timesteps)
        known = torch.compiler.is_compiling()  # then it is a constant
        grid = torch.tensor(timesteps, device=self.device) if known else _on_device(tuple(timesteps), self.device)
        if n_base:
            yield from self.base.prepare_steps(grid[:n_base], base_condition)
        if self.tuned is not None and n_base < len(timesteps):
            yield from self.tuned.prepare_steps(grid[n_base:], condition)

    def _steps(self, solver: SolverConfig) -> tuple[Step, ...]:
        """The solver's steps; the policy's own way where nothing is asked for."""
        return _resolved(self.schedule.config, self.config.sampling, solver)

    @property
    def denoised_size(self) -> int:
        """Numbers in each row of what is denoised: all of a chunk's, unless some follow from others."""
        return self.chunk_size

    def _part(self, chunks: Tensor) -> Tensor:
        """What is denoised of normalised chunks: (B, H, `chunk_size`) -> (B, H, `denoised_size`)."""
        return chunks

    def _whole(self, clean: Tensor) -> Tensor:
        """Chunks in the environment's units of what was denoised: (B, H, `denoised_size`) -> (B, H, `chunk_size`)."""
        return self.chunk_normalizer.unnormalize(clean)

    def _given(self, obs: TensorObservation) -> Callable[[Tensor], Tensor]:
        """What puts in place what is known of clean chunks: (B, H, `denoised_size`) -> the same."""
        return lambda clean: clean

    def _kept(self, noisy: Tensor, moved: Tensor) -> Tensor:
        """x_t before and after a guide's move, (B, H, `denoised_size`) -> it, with what must not be moved as it was."""
        return moved

    def _weights(self) -> Tensor | None:
        """How much the error of each number counts in the loss: (H, `denoised_size`). Default: all alike."""
        return None

    @property
    def _chunk_shape(self) -> tuple[int, int]:
        return self.config.horizon, self.denoised_size

    def _about(self) -> dict[str, Any]:
        return super()._about() | {"tuned_below": self.tuned_below}

    def _prepare_loading(self, about: dict[str, Any], file: Path) -> None:
        tuned_below, steps = about.get("tuned_below", 0), self.config.num_train_timesteps
        if type(tuned_below) is not int or not 0 <= tuned_below <= steps:
            raise CheckpointError(f"'{file}': tuned_below = {tuned_below!r}: must be 0 to {steps}")
        if tuned_below:
            self.tune_below(tuned_below)


# All are cached because a policy decides many times a second.
_solver_config = lru_cache(maxsize=256, typed=True)(SolverConfig)


@lru_cache(maxsize=256)
def _on_device(timesteps: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(timesteps, device=device)


@lru_cache(maxsize=256)
def _resolved(schedule: ScheduleConfig, own: SolverConfig, asked: SolverConfig) -> tuple[Step, ...]:
    return solver_steps(schedule, asked.over(own, schedule))


def denoising_loss(
    denoiser: nn.Module,
    schedule: NoiseSchedule,
    clean: Tensor,
    condition: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    valid: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the prediction: normalised actions (B, H, A), conditions (B, O, F), timesteps (B,).

    `weights` (H, A) say how much the error of each number counts.
    """
    noisy = schedule.add_noise(clean, noise, timesteps)
    error = (denoiser(noisy, timesteps, condition) - schedule.target(clean, noise, timesteps)) ** 2
    return masked_mean(error if weights is None else error * weights, valid)

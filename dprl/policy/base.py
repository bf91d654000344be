"""What every policy is: observations in, an action chunk out, one folder to save and load.

Shapes: B samples, O observation steps, D observation size, F features of one observation step, H actions of a chunk
(horizon), E of them executed (n_action_steps), A action size, N environments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from dprl import checkpoint
from dprl.config import from_json, to_json, validate
from dprl.errors import CheckpointError, ConfigError, check
from dprl.guidance import Guide
from dprl.networks.vision import ImageEncoder, VisionConfig
from dprl.observations import STATE, Camera, Repeated, TensorObservation, batch_size, map_parts, repeated
from dprl.policy.candidates import Scorer
from dprl.policy.chunk_value import ChunkValue
from dprl.policy.control import InferenceConfig, PredictState, RecedingHorizon
from dprl.policy.critic import ChunkCritic
from dprl.policy.normalize import MinMaxNormalizer, Normalizer
from dprl.seeding import draw_normal, seeded_init

if TYPE_CHECKING:
    from dprl.data import Episodes

CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"


@dataclass(frozen=True)
class Features:
    """What a policy observes and does: given by its data or its environment, not chosen."""

    observation_size: int
    """D, numbers of the state; 0 where there are images only."""
    action_size: int
    """A."""
    cameras: tuple[Camera, ...] = ()
    """The images it sees beside the state."""
    env_id: str | None = None
    """The environment of its demonstrations, if known."""

    def __post_init__(self) -> None:
        validate(self, at_least={"observation_size": 0 if self.cameras else 1, "action_size": 1})


@dataclass(frozen=True)
class PolicyConfig:
    """What every policy lets its user choose."""

    horizon: int = 4
    """H, actions in a predicted chunk."""
    n_action_steps: int | None = None
    """E, how many of them are executed before the next decision. Default: all."""
    n_obs_steps: int = 1
    """O, how many of the latest observations it sees."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """How it sees images, where there are any."""

    def __post_init__(self) -> None:
        validate(self, at_least={"horizon": 1, "n_obs_steps": 1})
        executed = self.horizon if self.n_action_steps is None else self.n_action_steps
        fits = 1 <= executed <= self.horizon
        check(fits, "n_action_steps", executed, f"must be from 1 to the horizon, which is {self.horizon}")


class Policy(nn.Module, ABC):
    """Predicts action chunks from observations. A subclass adds a network, `loss` and `sample`.

    It is in evaluation mode when made and when loaded.
    """

    name: ClassVar[str]
    """What config.json and the command line call it."""
    config_class: ClassVar[type[PolicyConfig]]
    weighs_samples: ClassVar[bool] = True
    """Whether `valid` of the loss may hold weights of samples."""
    kinds: ClassVar[dict[str, type[Policy]]] = {}
    """Every kind of policy by name."""
    config: PolicyConfig

    def __init_subclass__(cls) -> None:
        if "config_class" in cls.__dict__:
            Policy.kinds[cls.name] = cls

    def __init__(self, features: Features, config: Any = None, *, seed: int = 0) -> None:
        super().__init__()
        self.features = features
        fits = config is None or isinstance(config, self.config_class)
        check(fits, "config", type(config).__name__, f"must be a {self.config_class.__name__}")
        self.config = self.config_class() if config is None else config
        self.observation_normalizer = MinMaxNormalizer(features.observation_size)
        self.action_normalizer = MinMaxNormalizer(features.action_size)
        self._scorer: list[Scorer] = []
        self.encoder: ImageEncoder | None = None
        with seeded_init(seed, "policy"):
            if features.cameras:
                self.encoder = ImageEncoder(features.cameras, features.observation_size, self.config.vision)
            self.feature_size = features.observation_size + (self.encoder.feature_size if self.encoder else 0)
            self._build(self.feature_size)
        self.eval()

    @abstractmethod
    def _build(self, feature_size: int) -> None:
        """Make the networks for observations of `feature_size` F; initial weights come from torch's generator."""

    @abstractmethod
    def loss(
        self, obs: TensorObservation, actions: Tensor, *, valid: Tensor | None = None, generator: torch.Generator
    ) -> Tensor:
        """Return what behaviour cloning minimises, a scalar.

        Args:
            obs: (B, O, D), or named parts, as the environment gives them.
            actions: (B, H, A) in the environment's units.
            valid: (B, H) False where an action only fills a chunk up; there the policy's error does not count. Where
                the kind `weighs_samples` it may say how much the error counts, 1 on average.
            generator: draws whatever the loss needs and augments images; on the policy's device.
        """

    @abstractmethod
    def sample(
        self, obs: TensorObservation, *, generator: torch.Generator | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Draw one action chunk for each observation.

        Args:
            obs: (B, O, D), or named parts; not normalised, images uint8.
            generator: draws what the policy draws; one of the same seed replays a sample. Default: torch's own.
            temperature: 1 samples the policy's distribution; towards 0 it draws ever closer to its mode.

        Returns:
            Actions (B, H, A) in the environment's units.

        Raises:
            ConfigError: a shape that does not fit, or an observation that is not finite.
        """

    @classmethod
    def for_dataset(cls, data: Episodes, config: Any = None, *, seed: int = 0) -> Self:
        """Build an untrained policy with the sizes and normalisation ranges of `data`.

        Args:
            data: the demonstrations.
            config: its config. Default: the class's.
            seed: of the initial weights.
        """
        cameras = tuple(Camera(name, *images.shape[1:]) for name, images in data.images.items())
        features = Features(data.observations.shape[1], data.actions.shape[1], cameras, data.env_id)
        policy = cls(features, config, seed=seed)
        policy.observation_normalizer.fit(torch.as_tensor(data.limits("observations")))
        policy.action_normalizer.fit(torch.as_tensor(data.limits("actions")))
        policy.fit_actions(data, seed)
        return policy

    def fit_actions(self, data: Episodes, seed: int) -> None:
        """Take from the data whatever else the policy needs before it is trained, such as bins."""

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.action_normalizer.low.device

    @property
    def scorer(self) -> Scorer | None:
        """What chooses among candidates. A critic (`ChunkCritic`) is saved with the policy, but is no part of it."""
        return self._scorer[0] if self._scorer else None

    @scorer.setter
    def scorer(self, value: Scorer | None) -> None:
        fits = value is None or isinstance(value, Scorer)
        check(fits, "scorer", type(value).__name__, "must have a method score(obs, actions)")
        self._scorer = [] if value is None else [value]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a scorer, even if it is a module, does not become one of this module's."""
        if name == "scorer":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move the critic, too, wherever the policy is moved."""
        if isinstance(self.scorer, nn.Module):
            self.scorer._apply(fn, recurse)
        return cast("Self", super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    @property
    def chunk_size(self) -> int:
        """Numbers in each row of a chunk: A, of an action, unless the policy plans more than that."""
        return self.features.action_size

    @property
    def chunk_normalizer(self) -> Normalizer:
        """Of the rows of chunks."""
        return self.action_normalizer

    def chunks_of(self, data: Episodes) -> Episodes:
        """Return `data` with what chunks are made of in place of the actions."""
        return data

    def act(self, chunks: Tensor) -> Tensor:
        """Return the actions of chunks (B, H, `chunk_size`): (B, H, A)."""
        return chunks

    @property
    def n_action_steps(self) -> int:
        """E, how many actions of a chunk are executed."""
        return self.config.horizon if self.config.n_action_steps is None else self.config.n_action_steps

    def set_n_action_steps(self, n_action_steps: int) -> None:
        """Execute this many actions of each chunk from now on.

        Raises:
            ConfigError: more than the horizon.
        """
        self.config = replace(self.config, n_action_steps=n_action_steps)

    def condition(
        self,
        obs: TensorObservation,
        generator: torch.Generator | None = None,
        *,
        encoder: ImageEncoder | None = None,
    ) -> Tensor:
        """Normalise and encode observations: (B, O, D), or named parts, -> (B, O, F).

        A generator, given in training, augments the images; another `encoder` than the policy's may see them. Of
        `Repeated` observations each is encoded once.
        """
        if isinstance(obs, Repeated) and generator is None:
            return self.condition(obs.source, encoder=encoder).repeat_interleave(obs.times, dim=0)
        parts: dict[str, Tensor] = dict(obs) if isinstance(obs, Mapping) else {STATE: obs}
        state = self.observation_normalizer.normalize(parts[STATE]) if self.features.observation_size else None
        encoder = encoder or self.encoder
        if encoder is None:
            assert state is not None
            return state
        images = {camera.name: parts[camera.part] for camera in self.features.cameras}
        batch, steps = next(iter(images.values())).shape[:2]
        flat = {name: image.flatten(0, 1) for name, image in images.items()}
        seen: Tensor = encoder(flat, None if state is None else state.flatten(0, 1), generator, history=steps)
        seen = seen.view(batch, steps, encoder.feature_size)
        return seen if state is None else torch.cat([state, seen], dim=-1)

    def drawn(self, shape: tuple[int, ...], noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Return the noise that a caller gave, or draw it: `shape`, on the device.

        Raises:
            ConfigError: what was given has another shape, or is not finite.
        """
        if noise is None:
            return draw_normal(shape, generator, self.device)
        draws = torch.as_tensor(noise).to(self.device, torch.float32)
        check(draws.shape == shape, "noise", tuple(draws.shape), f"must have the shape {shape}")
        check(bool(draws.isfinite().all()), "noise", "not finite", "must be finite")
        return draws

    def targets(self, obs: TensorObservation, actions: Tensor, valid: Tensor | None) -> Tensor:
        """Normalise the chunks that a loss is of: (B, H, A) -> (B, H, A).

        What fills a chunk up cannot matter: an action that is not valid repeats the last one before it that is, and is
        zero where there is none.

        Raises:
            ConfigError: shapes that do not fit, which might broadcast.
        """
        n, horizon, size = batch_size(obs), self.config.horizon, self.chunk_size
        self.check_shapes(obs)
        for name, tensor, expected in (("actions", actions, (n, horizon, size)), ("valid", valid, (n, horizon))):
            fits = tensor is None or tuple(tensor.shape) == expected
            check(fits, name, tuple(() if tensor is None else tensor.shape), f"must have the shape {expected}")
        if valid is None:
            return self.chunk_normalizer.normalize(actions)
        steps = torch.arange(horizon, device=actions.device)
        last = torch.where(valid.bool(), steps, -1).cummax(1).values[..., None].expand_as(actions)
        clean = self.chunk_normalizer.normalize(actions.gather(1, last.clamp(min=0)))
        return torch.where(last >= 0, clean, 0.0)

    def check_shapes(self, obs: TensorObservation) -> None:
        """Raise ConfigError unless observations are (B, O, D), or named parts of such shapes."""
        parts = dict(obs) if isinstance(obs, Mapping) else {STATE: obs}
        for name, shape in self.part_shapes().items():
            self._check_part(name, parts[name], shape)

    def check_inference(self, inference: InferenceConfig) -> None:
        """Raise ConfigError where a setting is not one that this kind of policy has."""
        for name in ("solver", "num_inference_steps", "timestep_spacing", "warm_start_steps"):
            check(
                getattr(inference, name) is None,
                name,
                getattr(inference, name),
                f"policies of type {self.name} have none",
            )

    def check_guide(self, guide: Guide | None) -> None:
        """Raise ConfigError where there is a guide, and this kind of policy has no denoising steps for it to move."""
        check(guide is None, "guide", type(guide).__name__, f"policies of type {self.name} do not denoise")

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
        """Draw chunks (B, H, A) as `inference` says, one each.

        Args:
            obs: (B, O, D), or named parts.
            inference: how.
            generator: draws what is drawn. Default: torch's own.
            deterministic: make the same decision for equal observations.
            plan: (B, H, A) what a warm start begins from.
            group: so many rows in turn are candidates of one decision; a diffusion policy's differ even if it is
                deterministic.
            guide: moves a diffusion policy's steps.
        """
        assert guide is None, f"a {self.name} policy has nothing to guide"
        assert plan is None, f"a {self.name} policy has no warm start"
        return self.sample(obs, generator=generator, temperature=0.0 if deterministic else inference.temperature)

    def predict(
        self,
        observation: Any,
        state: tuple[Any, ...] | PredictState | None = None,
        episode_start: np.ndarray[Any, Any] | None = None,
        deterministic: bool = False,
        *,
        generator: torch.Generator | None = None,
        inference: InferenceConfig | None = None,
        guide: Guide | None = None,
        scorer: Scorer | None = None,
    ) -> tuple[np.ndarray[Any, Any], PredictState]:
        """Return one environment step's action, as stable-baselines3's `predict` does.

        A chunk is predicted every `n_action_steps` calls, and at once where an episode starts.

        Args:
            observation: (N, D), or (D,) for one environment; or named parts of such shapes.
            state: what the last call returned; None at the very start.
            episode_start: (N,) bool, True where `observation` is an episode's first.
            deterministic: make the same decision for equal observations.
            generator: draws what is drawn otherwise. Default: torch's own.
            inference: how to sample. Default: the policy's way.
            guide: moves its denoising steps.
            scorer: chooses among candidates. Default: the policy's own.

        Returns:
            Actions (N, A), or (A,), and the state for the next call.

        Raises:
            ConfigError: a shape that does not fit.
        """
        parts, single = self._single_step(observation)
        control = RecedingHorizon(self, inference, guide=guide, scorer=scorer)
        n = batch_size(parts)
        start = torch.ones(n, dtype=torch.bool, device=self.device)
        if isinstance(state, PredictState):
            known = len(state.next_action)
            check(n == known, "observation", n, f"the state is of {known} environments")
            self._require_own(state.history, parts)
            if episode_start is not None:
                shape = np.shape(episode_start)
                check(shape == (n,), "episode_start", shape, f"must have the shape ({n},)")
                start = torch.as_tensor(episode_start).to(start)
            else:
                start = torch.zeros_like(start)
            actions, index, memory = state.actions.clone(), state.next_action.clone(), state.memory
            if not control.fits(memory, actions):  # decided in another way so far: decide anew
                actions, index, memory = control.nothing(n)
            history = map_parts(lambda old, new: torch.cat([old[:, 1:], new[:, None]], dim=1), state.history, parts)
        else:
            actions, index, memory = control.nothing(n)
            history = map_parts(lambda new: torch.stack([new] * self.config.n_obs_steps, dim=1), parts)
        history = map_parts(
            lambda old, new: torch.where(start.view(n, *[1] * (old.ndim - 1)), new[:, None], old), history, parts
        )
        memory = memory.forget(start)
        due = start | (index >= control.n_action_steps)
        if due.any():
            seen = map_parts(lambda part: part[due], history)
            actions[due], planned = control.plan(seen, memory.take(due), generator, deterministic=deterministic)
            memory, index[due] = memory.put(due, planned), 0
        action = actions[torch.arange(n), index].cpu().numpy()
        return (action[0] if single else action), PredictState(actions, index + 1, history, memory)

    def _single_step(self, observation: Any) -> tuple[TensorObservation, bool]:
        """One step's observation as tensors (N, ...) on the device, and whether it was of a single environment."""
        parts = dict(observation) if isinstance(observation, Mapping) else {STATE: observation}
        shapes = self.part_shapes()
        self._require_parts(parts, shapes)
        name = next(iter(shapes))
        single = np.ndim(parts[name]) == len(shapes[name])
        tensors = {}
        for key, shape in shapes.items():
            array = np.asarray(parts[key], np.float32 if key == STATE else None)
            check(key == STATE or array.dtype == np.uint8, key, str(array.dtype), "images must be uint8")
            array = array[None] if single else array
            fits = array.ndim == 1 + len(shape) and array.shape[1:] == shape
            label, sizes = ("observation" if key == STATE else key), ", ".join(map(str, shape))
            check(fits, label, np.shape(parts[key]), f"must have the shape (N, {sizes}) or ({sizes},)")
            if key == STATE and not np.isfinite(array).all():
                row, number = np.argwhere(~np.isfinite(array))[0]
                value = float(array[row, number])
                raise ConfigError(f"observation[{row}, {number}] = {value}: observations must be finite")
            tensors[key] = torch.as_tensor(np.ascontiguousarray(array), device=self.device)
        counts = {key: len(part) for key, part in tensors.items()}
        check(len(set(counts.values())) == 1, "observation", counts, "all parts must be of as many environments")
        return (tensors if isinstance(observation, Mapping) else tensors[STATE]), single

    def _require_own(self, history: TensorObservation, parts: TensorObservation) -> None:
        """Raise ConfigError unless the `history` of a state is of this policy and of observations like `parts`."""
        alike = isinstance(parts, Mapping) == isinstance(history, Mapping)
        check(alike, "observation", type(parts).__name__, "must be of the kind that the last call was given")
        held = dict(history) if isinstance(history, Mapping) else {STATE: history}
        shapes = {name: tuple(part.shape[1:]) for name, part in held.items()}
        ours = {name: (self.config.n_obs_steps, *shape) for name, shape in self.part_shapes().items()}
        check(shapes == ours, "state", shapes, f"is of another policy: this one remembers {ours}")

    def part_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of one step's observation: (D,) and (height, width, channels)."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self.features.observation_size:
            shapes[STATE] = (self.features.observation_size,)
        return shapes | {camera.part: camera.shape for camera in self.features.cameras}

    def blank_observation(self, n: int) -> TensorObservation:
        """Return `n` observations that are all zero, of the right shapes: (n, O, D), or named parts."""
        steps = self.config.n_obs_steps
        parts = {
            name: torch.zeros(
                n, steps, *shape, dtype=torch.float32 if name == STATE else torch.uint8, device=self.device
            )
            for name, shape in self.part_shapes().items()
        }
        return parts if self.features.cameras else parts[STATE]

    def checked(self, obs: TensorObservation) -> TensorObservation:
        """Return a batch of observations on the policy's device, the state float32.

        Raises:
            ConfigError: parts, shapes or types that do not fit, or a state that is not finite.
        """
        if isinstance(obs, Repeated):
            return repeated(self.checked(obs.source), obs.times)
        parts = dict(obs) if isinstance(obs, Mapping) else {STATE: obs}
        shapes = self.part_shapes()
        self._require_parts(parts, shapes)
        moved: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            part = torch.as_tensor(parts[name])
            self._check_part(name, part, shape)
            part = part.float() if name == STATE else part
            if name == STATE and not part.isfinite().all():  # before it is moved: a GPU would be waited for
                row = int((~part.isfinite()).flatten(1).any(1).nonzero()[0])
                raise ConfigError(f"obs[{row}] = {part[row].tolist()}: observations must be finite")
            moved[name] = part.to(self.device)
        sizes = {name: len(part) for name, part in moved.items()}
        check(len(set(sizes.values())) == 1, "obs", sizes, "all parts must have the same batch size")
        return moved if isinstance(obs, Mapping) else moved[STATE]

    def _check_part(self, name: str, part: Tensor, shape: tuple[int, ...]) -> None:
        """Raise ConfigError unless a part of a batch of observations is (B, O, *shape), and of the right type."""
        expected = (self.config.n_obs_steps, *shape)
        fits = part.ndim == 1 + len(expected) and tuple(part.shape[1:]) == expected
        label = "obs" if name == STATE else name
        check(fits, label, tuple(part.shape), f"must have the shape (batch, {', '.join(map(str, expected))})")
        check(name == STATE or part.dtype == torch.uint8, label, str(part.dtype), "images must be uint8")

    def _require_parts(self, parts: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
        missing = [name for name in shapes if name not in parts]
        check(not missing, "obs", sorted(parts), f"must have the parts {list(shapes)}")

    def save_pretrained(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the folder `path`: config.json and model.safetensors, all or nothing.

        Raises:
            RunExistsError: `path` exists and `overwrite` is not set.
        """
        checkpoint.publish(Path(path), self.write, overwrite=overwrite)

    def write(self, folder: Path) -> None:
        """Write config.json and model.safetensors into an existing folder."""
        checkpoint.write_json(folder / CONFIG_FILE, self._about())
        checkpoint.save_tensors(folder / MODEL_FILE, self.state_dict())
        if isinstance(self.scorer, ChunkCritic | ChunkValue):
            self.scorer.write(folder)

    def _about(self) -> dict[str, Any]:
        return {"type": self.name, "features": to_json(self.features), "config": to_json(self.config)}

    def _prepare_loading(self, about: dict[str, Any], file: Path) -> None:
        """Shape the networks as config.json, `file`, says beyond the config. Raises CheckpointError."""

    @classmethod
    def from_pretrained(cls, path: str | Path, *, device: torch.device | str = "cpu") -> Self:
        """Load a policy folder, or a run folder's best (else last) checkpoint. Nothing is unpickled.

        `Policy.from_pretrained` loads any kind; a subclass loads its own kind only.

        Raises:
            CheckpointError: missing, damaged, or not such a policy; the message names the file.
        """
        folder = find_policy(Path(path))
        checkpoint.verify(folder)
        file = folder / CONFIG_FILE
        about = checkpoint.read_json(file)
        kind = Policy.kinds.get(str(about.get("type"))) if isinstance(about, dict) else None
        if kind is None or not {"features", "config"} <= about.keys():
            raise CheckpointError(
                f"'{file}' does not describe a dprl policy of a known type: {', '.join(Policy.kinds)}"
            )
        if cls is not kind and "config_class" in cls.__dict__:
            raise CheckpointError(f"'{file}' describes a {kind.name} policy, not one of type {cls.name}")
        try:
            features = from_json(Features, about["features"], str(file))
            policy = kind(features, from_json(kind.config_class, about["config"], str(file)))
            policy._prepare_loading(about, file)
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
        try:
            policy.load_state_dict(checkpoint.load_tensors(folder / MODEL_FILE))
        except RuntimeError as error:
            raise CheckpointError(f"'{folder / MODEL_FILE}' does not fit its config.json: {error}") from error
        policy.scorer = ChunkCritic.load(policy, folder) or ChunkValue.load(policy, folder)
        return cast("Self", policy.to(device))


def masked_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of `values` (B, H, ...) over the actions that are `valid` (B, H); all, where it is None."""
    if valid is None:
        return values.mean()
    per_action = values.flatten(2).mean(-1) if values.ndim > 2 else values
    return (per_action * valid).sum() / valid.sum().clamp(min=1)


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

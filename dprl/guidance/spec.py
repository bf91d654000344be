"""Guides and scorers by name, as the command line and studies say them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dprl.config import validate
from dprl.errors import ConfigError, check
from dprl.guidance.command import CommandGuide
from dprl.guidance.step import Guide, Guides
from dprl.guidance.value import Gradient, NoisyValue, Reward, Scaling, Value, ValueGuide
from dprl.policy import ChunkCritic, ChunkValue, DiffusionPolicy, Policy, Scorer
from dprl.spec import load

OWN = "critic"


@dataclass(frozen=True)
class GuidanceConfig:
    """What steers a policy that stays as it is."""

    guide: str | None = None
    """What denoising is steered by: `critic` (the policy's own), the folder of a run or policy with critics, or a
    function of yours as `module:function`, which takes observations (B, O, D) and actions (B, H, A), of a planner rows
    of action and state (B, H, A + D), and returns (B,) differentiable numbers. Default: nothing."""
    scale: float | None = None
    """How strongly, in units of the value's gradient; 0 does nothing. Default: 1."""
    gradient: Gradient | None = None
    """Of what: `held` (default) of the value of the predicted clean actions, as if the network's prediction moved with
    the noisy actions alone; `through` differentiates the network too; `noisy` of a value of noisy actions."""
    scaling: Scaling | None = None
    """What else the gradient is multiplied by: `variance` (default) of the step, `score`, which is exact for an energy
    of noisy actions, `noise`, `constant`, or `normalized` to the noise."""
    guide_steps: int | None = None
    """Times at each denoising step. Default: 1."""
    skip_last: int | None = None
    """So many last denoising steps are left alone. Default: 0."""
    command: tuple[float, ...] | None = None
    """What a policy that was trained with a `command` is told shall come of its chunks: the return, 0 the least of the
    data's and 1 the largest, or the state to end in. Goes with a guide, or alone. Default: nothing."""
    command_scale: float | None = None
    """How strongly, w of classifier-free guidance; 1 samples what the data did where that came of it. Default: 1.2."""
    scorer: str | None = None
    """What chooses among candidates, named as the guide is. Default: the policy's own critics."""

    def __post_init__(self) -> None:
        validate(self, at_least={"guide_steps": 1, "skip_last": 0})
        for name in ("scale", "gradient", "scaling", "guide_steps", "skip_last"):
            value = getattr(self, name)
            check(self.guide is not None or value is None, name, value, "needs a guide")
        once = self.gradient != "noisy" or self.guide_steps in (None, 1)
        check(once, "guide_steps", self.guide_steps, "must be 1 with gradient = noisy: a larger scale does as much")
        commanded = self.command is not None or self.command_scale is None
        check(commanded, "command_scale", self.command_scale, "needs a command")


class Steering(NamedTuple):
    """What `GuidanceConfig` names."""

    guide: Guide | None
    scorer: Scorer | None


def steering(config: GuidanceConfig, policy: Policy) -> Steering:
    """Return what `config` names, for `policy`.

    Raises:
        ConfigError: it names nothing, or what does not fit.
        CheckpointError: a folder that is damaged, or holds no policy.
    """
    guide: Guide | None = None
    if config.guide is not None:
        gradient = config.gradient or "held"
        noisy = gradient == "noisy"
        value = named(config.guide, policy, "guide", noisy=noisy)
        what, other = ("noisy", "held or through") if noisy else ("clean", "noisy")
        fits = isinstance(value, NoisyValue if noisy else Value)
        check(fits, "guide", config.guide, f"is not of {what} actions: its gradient must be {other}. {KNOWN}")
        guide = ValueGuide(
            value,
            1.0 if config.scale is None else config.scale,
            gradient,
            config.scaling or "variance",
            config.guide_steps or 1,
            config.skip_last or 0,
        )
    if config.command is not None:
        size = policy.command_size if isinstance(policy, DiffusionPolicy) else 0
        check(size > 0, "command", config.command, "the policy was trained without: 'dprl pretrain --policy.command'")
        check(len(config.command) == size, "command", config.command, f"must have {size} number{'s' * (size > 1)}")
        told = CommandGuide(
            config.command, CommandGuide.scale if config.command_scale is None else config.command_scale
        )
        guide = told if guide is None else Guides((told, guide))
    return Steering(guide, None if config.scorer is None else scorer_named(config.scorer, policy))


def scorer_named(spec: str, policy: Policy) -> Scorer:
    """Return the scorer that `spec` names. Raises ConfigError, CheckpointError: see `steering`."""
    scorer = named(spec, policy, "scorer")
    check(isinstance(scorer, Scorer), "scorer", spec, "has no method score(obs, actions)")
    assert isinstance(scorer, Scorer)
    return scorer


def named(spec: str, policy: Policy, field: str, *, noisy: bool = False) -> Any:
    """Return the value that `spec` names: the policy's critics, another policy's, or a user's function."""
    if spec == OWN:
        fits = isinstance(policy.scorer, ChunkCritic | ChunkValue)
        check(fits, field, spec, f"the policy has no critics; {MAKERS}")
        return policy.scorer
    if Path(spec).exists():
        return _critics_in(Path(spec), policy, field, noisy=noisy)
    if ":" not in spec:
        raise ConfigError(f"{field} = {spec!r}: must be '{OWN}', a folder with critics, or 'module:function'")
    found = load(spec)
    try:
        found = found() if isinstance(found, type) else found
    except TypeError as error:
        raise ConfigError(f"{field} = {spec!r}: a class must be made without arguments: {error}") from error
    return found if isinstance(found, Value | NoisyValue | Scorer) else Reward(found)


def _critics_in(folder: Path, policy: Policy, field: str, *, noisy: bool) -> ChunkCritic | ChunkValue:
    """The critics of another policy, which see by that one's normalisation."""
    other = Policy.from_pretrained(folder, device=policy.device)
    critics = other.scorer
    if not isinstance(critics, ChunkCritic | ChunkValue):
        raise ConfigError(f"{field} = '{folder}': holds no critics; {MAKERS}")
    alike: list[tuple[str, object, object]] = [
        ("observations", other.part_shapes(), policy.part_shapes()),
        ("actions", other.features.action_size, policy.features.action_size),
        ("n_obs_steps", other.config.n_obs_steps, policy.config.n_obs_steps),
    ]
    if isinstance(critics, ChunkValue):
        alike.append(("horizon", other.config.horizon, policy.config.horizon))
        alike.append(("numbers in a row of a chunk", other.chunk_size, policy.chunk_size))
    if noisy and isinstance(other, DiffusionPolicy) and isinstance(policy, DiffusionPolicy):
        alike.append(("noise", other.config.noise, policy.config.noise))
        alike.append(("numbers denoised in a row", other.denoised_size, policy.denoised_size))
        alike.append(("range of chunks", _range(other), _range(policy)))
    for name, theirs, ours in alike:
        check(theirs == ours, field, str(folder), f"its critics are of {name} {theirs}, the policy's are {ours}")
    if isinstance(critics, ChunkCritic):
        enough = critics.n_action_steps <= policy.config.horizon
        check(enough, field, str(folder), f"its critics are of {critics.n_action_steps} actions, the policy has "
              f"{policy.config.horizon}")  # fmt: skip
    return critics


def _range(policy: Policy) -> list[list[float]]:
    """The least and the largest of each number in a row of a chunk, in the environment's units."""
    ends = torch.tensor([[-1.0], [1.0]], device=policy.device).expand(2, policy.chunk_size)
    found: list[list[float]] = policy.chunk_normalizer.unnormalize(ends).tolist()
    return found


KNOWN = "Critics of IDQL are of clean actions, those of 'dprl train-critic' of both, functions of clean ones"
MAKERS = "'dprl offline' and 'dprl train-critic' make policies with critics"

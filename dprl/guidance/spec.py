"""Guides and scorers by name, as the command line and studies say them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dprl.config import validate
from dprl.errors import ConfigError, check
from dprl.guidance.step import Guide
from dprl.guidance.value import Gradient, NoisyValue, Reward, Scaling, Value, ValueGuide
from dprl.policy import ChunkCritic, Policy, Scorer
from dprl.spec import load

OWN = "critic"


@dataclass(frozen=True)
class GuidanceConfig:
    """What steers a policy that stays as it is."""

    guide: str | None = None
    """What denoising is steered by: `critic` (the policy's own), the folder of a run or policy with critics, or a
    function of yours as `module:function`, which takes observations (B, O, D) and actions (B, H, A) and returns (B,)
    differentiable numbers. Default: nothing."""
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
    scorer: str | None = None
    """What chooses among candidates, named as the guide is. Default: the policy's own critics."""

    def __post_init__(self) -> None:
        validate(self, at_least={"guide_steps": 1, "skip_last": 0})
        for name in ("scale", "gradient", "scaling", "guide_steps", "skip_last"):
            value = getattr(self, name)
            check(self.guide is not None or value is None, name, value, "needs a guide")


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
    guide, scorer = None, None
    if config.guide is not None:
        guide = ValueGuide(
            named(config.guide, policy, "guide"),
            1.0 if config.scale is None else config.scale,
            config.gradient or "held",
            config.scaling or "variance",
            config.guide_steps or 1,
            config.skip_last or 0,
        )
    if config.scorer is not None:
        scorer = named(config.scorer, policy, "scorer")
        check(isinstance(scorer, Scorer), "scorer", config.scorer, "has no method score(obs, actions)")
    return Steering(guide, scorer)


def named(spec: str, policy: Policy, field: str) -> Any:
    """Return the value that `spec` names: the policy's critics, another policy's, or a user's function."""
    if spec == OWN:
        fits = isinstance(policy.scorer, ChunkCritic)
        check(fits, field, spec, "the policy has no critics; 'dprl offline' makes policies with critics")
        return policy.scorer
    if Path(spec).exists():
        return _critics_in(Path(spec), policy, field)
    if ":" not in spec:
        raise ConfigError(f"{field} = {spec!r}: must be '{OWN}', a folder with critics, or 'module:function'")
    found = load(spec)
    found = found() if isinstance(found, type) else found
    return found if isinstance(found, Value | NoisyValue | Scorer) else Reward(found)


def _critics_in(folder: Path, policy: Policy, field: str) -> ChunkCritic:
    """The critics of another policy, which see by that one's normalisation."""
    other = Policy.from_pretrained(folder, device=policy.device)
    critics = other.scorer
    if not isinstance(critics, ChunkCritic):
        raise ConfigError(f"{field} = '{folder}': holds no critics; 'dprl offline' makes policies with critics")
    for name, theirs, ours in (
        ("observations", other.part_shapes(), policy.part_shapes()),
        ("actions", other.features.action_size, policy.features.action_size),
        ("n_obs_steps", other.config.n_obs_steps, policy.config.n_obs_steps),
    ):
        check(theirs == ours, field, str(folder), f"its critics are of {name} {theirs}, the policy's are {ours}")
    enough = critics.n_action_steps <= policy.config.horizon
    check(enough, field, str(folder), f"its critics are of {critics.n_action_steps} actions, the policy has "
          f"{policy.config.horizon}")  # fmt: skip
    return critics

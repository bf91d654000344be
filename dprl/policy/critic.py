"""Q and V of action chunks, and how they choose among a policy's samples (IDQL, arXiv:2304.10573).

Shapes: B samples, O observation steps, D observation size, F features of an observation step, H actions of a chunk of
which the first E are executed, A action size, n critics.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from dprl import checkpoint
from dprl.config import from_json, to_json, validate
from dprl.errors import CheckpointError, ConfigError, check
from dprl.implicit import ValueObjective
from dprl.networks.ensemble import EnsembleMLP
from dprl.networks.mlp import Activation
from dprl.observations import TensorObservation

if TYPE_CHECKING:
    from dprl.policy.base import Policy

CONFIG_FILE, MODEL_FILE = "critic.json", "critic.safetensors"
TERMS, EXECUTED = "terms", "n_action_steps"


@dataclass(frozen=True)
class CriticConfig:
    """The critics' networks."""

    hidden_size: int = 256
    n_layers: int = 2
    activation: Activation = "relu"
    n_critics: int = 2
    """Q networks; the least of their values counts."""
    minimum_over: int | None = None
    """In what critics learn from, the least of so many of them counts, drawn anew at each step (2 of 10 in RLPD,
    arXiv:2302.02948). Default: of all."""
    layer_norm: bool = False
    """In Q and V, before each activation."""
    objective: ValueObjective = field(default_factory=ValueObjective)
    """How V is learned from Q, and so what the implicit weights are."""

    def __post_init__(self) -> None:
        counts = ("hidden_size", "n_layers", "n_critics", "minimum_over")
        validate(self, at_least=dict.fromkeys(counts, 1))
        over = self.minimum_over
        check(
            over is None or over <= self.n_critics, "minimum_over", over, f"must be at most {self.n_critics}, n_critics"
        )


@dataclass(frozen=True)
class ValueTerms:
    """What Q and V are values of: who goes on learning them in an environment keeps to it."""

    gamma: float
    """Discount of one environment step."""
    reward_scale: float
    """What rewards are multiplied by."""
    bootstrap_truncated: bool
    """Whether something follows where an episode was cut off."""
    return_range: float | None = None
    """What `reward_scale` was asked for by, if it was."""
    reward_kind: str | None = None
    """Sparse or dense, if known."""


class ChunkCritic(nn.Module):
    """Q(s, chunk) by several networks, and V(s), of what a policy observes; with an image encoder of its own.

    It scores chunks as a `Scorer`: by the least of its Q.
    """

    terms: ValueTerms | None = None
    """None: nothing was learned yet."""

    def __init__(self, policy: Policy, config: CriticConfig, n_action_steps: int | None = None) -> None:
        """Make networks for what `policy` observes; Q is of `n_action_steps`, by default as many as it executes."""
        super().__init__()
        features, size = policy.features, policy.config.n_obs_steps * policy.feature_size
        self.config, self.n_action_steps = config, n_action_steps or policy.n_action_steps
        self._action_size = features.action_size
        self._condition, self._normalize = policy.condition, policy.action_normalizer.normalize
        self.encoder = copy.deepcopy(policy.encoder)

        def net(n: int, n_inputs: int) -> EnsembleMLP:
            return EnsembleMLP(
                n, n_inputs, config.hidden_size, config.n_layers, config.activation, normed=config.layer_norm
            )

        self.q_net = net(config.n_critics, size + self.n_action_steps * features.action_size)
        self.v_net = net(1, size)

    @property
    def sees_as(self) -> nn.Module:
        """The policy by whose normalisation it sees."""
        policy: nn.Module = cast("Any", self._condition).__self__
        return policy

    def see(self, obs: TensorObservation, generator: torch.Generator | None = None) -> Tensor:
        """Normalise and encode: (B, O, D), or named parts, -> (B, O·F). A generator augments images."""
        condition = self._condition(obs, generator, encoder=self.encoder)
        return condition.flatten(1)

    def q(self, seen: Tensor, actions: Tensor) -> Tensor:
        """Every network's Q: (B, O·F) of `see`, chunks (B, E or more, A) in the environment's units -> (n, B).

        Of plans, whose rows begin with the actions, it is that of their actions.
        """
        size = (self.n_action_steps, self._action_size)
        executed = actions if actions.shape[1:] == size else actions[:, : size[0], : size[1]]
        value: Tensor = self.q_net(torch.cat([seen, self._normalize(executed).flatten(1)], dim=1))
        return value

    def v(self, seen: Tensor) -> Tensor:
        """(B, O·F) -> (B,)."""
        value: Tensor = self.v_net(seen)
        return value[0]

    def at(self, obs: TensorObservation) -> Callable[[Tensor], Tensor]:
        """The least of the critics' values, differentiable: see `dprl.guidance.Value`."""
        seen = self.see(obs)
        return lambda actions: self.q(seen, actions).min(0).values  # a cheaper gradient than amin's

    @torch.no_grad()
    def score(self, obs: TensorObservation, actions: Tensor) -> Tensor:
        """See `Scorer.score`."""
        return self.at(obs)(actions)

    @torch.no_grad()
    def each(self, obs: TensorObservation, actions: Tensor) -> Tensor:
        """Every network's Q of chunks (B, H, A): (n, B)."""
        return self.q(self.see(obs), actions)

    @torch.no_grad()
    def advantage(self, obs: TensorObservation, actions: Tensor) -> Tensor:
        """The least Q - V of chunks (B, H, A): (B,)."""
        seen = self.see(obs)
        return self.q(seen, actions).amin(0) - self.v(seen)

    def write(self, folder: Path) -> None:
        """Write critic.json and critic.safetensors into an existing folder."""
        about = to_json(self.config) | {EXECUTED: self.n_action_steps}
        about |= {} if self.terms is None else {TERMS: to_json(self.terms)}
        checkpoint.write_json(folder / CONFIG_FILE, about)
        checkpoint.save_tensors(folder / MODEL_FILE, self.state_dict())

    @staticmethod
    def load(policy: Policy, folder: Path) -> ChunkCritic | None:
        """Read what `write` wrote for `policy`; None where there is none.

        Raises:
            CheckpointError: damaged, or of another policy.
        """
        if not (folder / CONFIG_FILE).is_file():
            return None
        try:
            about, file = _about(folder), str(folder / CONFIG_FILE)
            terms, executed = about.pop(TERMS, None), about.pop(EXECUTED, None)
            fits = executed is None or (isinstance(executed, int) and 1 <= executed <= policy.config.horizon)
            check(fits, f"{file}: {EXECUTED}", executed, f"must be from 1 to the horizon, {policy.config.horizon}")
            critic = ChunkCritic(policy, from_json(CriticConfig, about, file), executed)
            critic.terms = None if terms is None else from_json(ValueTerms, terms, file)
            critic.load_state_dict(checkpoint.load_tensors(folder / MODEL_FILE))
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
        except RuntimeError as error:
            raise CheckpointError(f"'{folder / MODEL_FILE}' does not fit its policy and config: {error}") from error
        return critic.eval()


def _about(folder: Path) -> dict[str, Any]:
    about = checkpoint.read_json(folder / CONFIG_FILE)
    if not isinstance(about, dict):
        raise CheckpointError(f"'{folder / CONFIG_FILE}' is no object")
    return about

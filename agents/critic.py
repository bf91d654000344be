"""V of what a policy observes, with an image encoder of its own where there are images."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dprl.networks import ValueNet
from dprl.networks.mlp import Activation
from dprl.observations import TensorObservation
from dprl.policy import Policy


class Critic(nn.Module):
    """V(s), or V(s, more): the policy's normalisation, a copy of its encoder, and a residual MLP."""

    def __init__(self, policy: Policy, n_more: int, hidden_size: int, activation: Activation) -> None:
        super().__init__()
        self._see = policy.condition
        self.encoder = copy.deepcopy(policy.encoder)
        size = policy.config.n_obs_steps * policy.feature_size + n_more
        self.net = ValueNet(1, size, hidden_size, activation)

    def forward(
        self, obs: TensorObservation, generator: torch.Generator | None = None, more: Tensor | None = None
    ) -> Tensor:
        """(B, O, D), or named parts, not normalised, and (B, n_more) -> (B,). A generator augments images."""
        seen = self._see(obs, generator, encoder=self.encoder).flatten(1)
        value: Tensor = self.net(seen if more is None else torch.cat([seen, more], dim=1))
        return value

"""Several perceptrons of one shape at once: twin Q, or a larger ensemble."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from dprl.networks.mlp import ACTIVATIONS, Activation


class EnsembleMLP(nn.Module):
    """n perceptrons that share nothing but their shape; each layer is one batched product. Initialised as nn.Linear."""

    def __init__(
        self, n: int, n_inputs: int, hidden_size: int, n_layers: int, activation: Activation, *, normed: bool = False
    ) -> None:
        """Make them.

        Args:
            n: how many.
            n_inputs: of each.
            hidden_size: width of the hidden layers.
            n_layers: how many hidden layers.
            activation: between them.
            normed: layer norm before each activation (as RLPD's critics, arXiv:2302.02948).
        """
        super().__init__()
        sizes = [n_inputs, *[hidden_size] * n_layers, 1]
        self.act = ACTIVATIONS[activation]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        norms = n_layers if normed else 0
        self.gains = nn.ParameterList(nn.Parameter(torch.ones(n, 1, hidden_size)) for _ in range(norms))
        self.shifts = nn.ParameterList(nn.Parameter(torch.zeros(n, 1, hidden_size)) for _ in range(norms))
        for before, after in pairwise(sizes):
            bound = 1 / math.sqrt(before)
            self.weights.append(nn.Parameter(torch.empty(n, before, after).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(n, 1, after).uniform_(-bound, bound)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, n_inputs) -> (n, B)."""
        n = len(self.weights[0])
        x = x.expand(n, *x.shape)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if i:
                if len(self.gains):
                    x = layer_norm(x, x.shape[-1:]) * self.gains[i - 1] + self.shifts[i - 1]
                x = self.act(x)
            x = torch.baddbmm(bias, x, weight)
        return x.squeeze(-1)

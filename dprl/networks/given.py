"""A denoiser of plans that begin where one is: the present state stands in them, free of noise (arXiv:2205.09991).

Shapes: B samples, F features of a condition, H rows of a plan, R numbers in a row, D of them the state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dprl.networks.denoiser import Denoiser


class GivenState(Denoiser):
    """Any denoiser; the first D numbers of its condition (B, 1, D + F) are the state, which it sees in the first row.

    They are the last D numbers of that row, whatever noise was there. Where F features are fewer than it expects,
    zeros follow.
    """

    def __init__(self, inner: Denoiser, state_size: int, feature_size: int) -> None:
        """Take a denoiser.

        Args:
            inner: the denoiser.
            state_size: D.
            feature_size: what it expects of the rest of the condition.
        """
        super().__init__()
        self.inner, self._size, self._features = inner, state_size, feature_size
        with torch.no_grad():
            self._prepared = inner.prepare(inner.embed(torch.zeros(1)), torch.zeros(1, 1, feature_size)).shape[1:]

    def embed(self, timestep: Tensor) -> Tensor:
        """See `Denoiser.embed`."""
        return self.inner.embed(timestep)

    def prepare(self, time: Tensor, condition: Tensor) -> Tensor:
        """[the state, what the other denoiser prepares]: (B, D + ...)."""
        state, rest = condition[:, 0, : self._size], condition[..., self._size :]
        rest = pad(rest, (0, self._features - rest.shape[-1]))
        return torch.cat([state, self.inner.prepare(time, rest).flatten(1)], dim=1)

    def denoise(self, noisy_actions: Tensor, prepared: Tensor) -> Tensor:
        """See `Denoiser.denoise`; of plans (B, H, R)."""
        state, rest = prepared[:, : self._size], prepared[:, self._size :]
        return self.inner.denoise(with_state(state)(noisy_actions), rest.unflatten(1, self._prepared))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """See `Denoiser.compile`."""
        self.inner.compile(*args, **kwargs)


def with_state(state: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what puts the state (B, D) into the first row of plans (B, H, R)."""

    def put(plans: Tensor) -> Tensor:
        first = torch.cat([plans[:, 0, : plans.shape[2] - state.shape[1]], state], dim=1)
        return torch.cat([first[:, None], plans[:, 1:]], dim=1)

    return put

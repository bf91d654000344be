"""The conditional 1-D temporal U-Net of Diffusion Policy (arXiv:2303.04137), with DPPO's variant (arXiv:2409.00588)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn

from dprl.config import validate
from dprl.errors import check
from dprl.networks.denoiser import Denoiser
from dprl.networks.mish import Mish, mish
from dprl.networks.timestep import TimestepEmbedding, check_time_size


@dataclass(frozen=True)
class UNetConfig:
    """A conditional 1-D U-Net denoiser."""

    down_dims: tuple[int, ...] = (64, 128)
    """Channels of each level; every level after the first halves the horizon."""
    kernel_size: int = 5
    """Width of the convolutions, odd."""
    n_groups: int = 8
    """Groups of each GroupNorm; divides every entry of `down_dims`."""
    time_size: int = 32
    """Size of the timestep embedding."""
    film: Literal["bias", "scale_bias"] = "scale_bias"
    """What the condition does to each channel: shift it, or scale and shift it."""
    condition_encoder: Literal["linear", "mlp"] = "linear"
    """What turns the condition into FiLM's numbers in each block: Mish and one Linear as in Diffusion Policy, or
    DPPO's three Linear layers with Mish between them and no activation before."""

    def __post_init__(self) -> None:
        validate(self, at_least={"n_groups": 1, "kernel_size": 1})
        check(len(self.down_dims) > 0, "down_dims", self.down_dims, "must name at least one level")
        for i, channels in enumerate(self.down_dims):
            fits = channels >= 1 and channels % self.n_groups == 0
            check(fits, f"down_dims[{i}]", channels, f"must be a positive multiple of n_groups = {self.n_groups}")
        check(self.kernel_size % 2 == 1, "kernel_size", self.kernel_size, "must be odd")
        check_time_size("time_size", self.time_size)


class ResidualBlock(nn.Module):
    """Two convolutions around a residual connection, the first modulated by the condition (FiLM, arXiv:1709.07871)."""

    def __init__(self, n_inputs: int, n_outputs: int, condition_size: int, config: UNetConfig) -> None:
        super().__init__()
        padding = config.kernel_size // 2
        self.conv1 = nn.Conv1d(n_inputs, n_outputs, config.kernel_size, padding=padding)
        self.norm1 = nn.GroupNorm(config.n_groups, n_outputs)
        self.conv2 = nn.Conv1d(n_outputs, n_outputs, config.kernel_size, padding=padding)
        self.norm2 = nn.GroupNorm(config.n_groups, n_outputs)
        self.scales = config.film == "scale_bias"
        size = 2 * n_outputs if self.scales else n_outputs
        if config.condition_encoder == "linear":  # the Mish before it is the same in every block: see the U-Net
            self.cond_encoder: nn.Module = nn.Linear(condition_size, size)
        else:
            layers = [nn.Linear(condition_size, size), Mish(), nn.Linear(size, size), Mish()]
            self.cond_encoder = nn.Sequential(*layers, nn.Linear(size, size))
        self.residual_conv = nn.Conv1d(n_inputs, n_outputs, 1) if n_inputs != n_outputs else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, n_inputs, L), (B, condition_size) -> (B, n_outputs, L)."""
        out = mish(self.norm1(self.conv1(x)))
        film = self.cond_encoder(condition)[..., None]
        if self.scales:
            scale, bias = film.chunk(2, dim=1)
            out = torch.addcmul(bias, scale, out)
        else:
            out = out + film
        out = mish(self.norm2(self.conv2(out)))
        return cast("Tensor", out + self.residual_conv(x))


class Level(nn.ModuleList):
    """Two residual blocks at one resolution."""

    def __init__(self, n_inputs: int, n_outputs: int, condition_size: int, config: UNetConfig) -> None:
        sizes = (n_inputs, n_outputs, n_outputs)
        super().__init__(ResidualBlock(a, b, condition_size, config) for a, b in pairwise(sizes))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, n_inputs, L), (B, condition_size) -> (B, n_outputs, L)."""
        for block in self:
            x = block(x, condition)
        return x


class ConditionalUNet1D(Denoiser):
    """Predicts the noise in a chunk with convolutions over time.

    Any horizon works: one that is not a multiple of 2 ** (levels - 1) has its last action repeated up to the next
    multiple, and what comes out there is dropped.

    Args:
        horizon: H, actions in a chunk.
        action_size: A, numbers in an action.
        n_obs_steps: O, observations in the condition.
        feature_size: F, numbers in each of them.
        config: the sizes of the network.

    Raises:
        ConfigError: the horizon is so short that a GroupNorm would normalise single numbers.
    """

    def __init__(self, horizon: int, action_size: int, n_obs_steps: int, feature_size: int, config: UNetConfig) -> None:
        super().__init__()
        dims = config.down_dims
        self.multiple = 2 ** (len(dims) - 1)
        deepest = -(-horizon // self.multiple) * dims[-1] // config.n_groups
        expected = f"with horizon = {horizon} and down_dims = {dims} each group would hold one number: use fewer groups"
        check(deepest > 1, "n_groups", config.n_groups, expected)
        condition_size = config.time_size + n_obs_steps * feature_size
        self.time = TimestepEmbedding(config.time_size, 4 * config.time_size)
        self.activates = config.condition_encoder == "linear"
        self.down = nn.ModuleList(Level(a, b, condition_size, config) for a, b in pairwise((action_size, *dims)))
        halvings = [nn.Conv1d(size, size, 3, stride=2, padding=1) for size in dims[:-1]]
        self.downsample = nn.ModuleList([*halvings, nn.Identity()])
        self.mid = Level(dims[-1], dims[-1], condition_size, config)
        up = list(pairwise(reversed(dims)))
        self.up = nn.ModuleList(Level(2 * deep, size, condition_size, config) for deep, size in up)
        self.upsample = nn.ModuleList(nn.ConvTranspose1d(size, size, 4, stride=2, padding=1) for _, size in up)
        self.final = nn.Sequential(
            nn.Conv1d(dims[0], dims[0], config.kernel_size, padding=config.kernel_size // 2),
            nn.GroupNorm(config.n_groups, dims[0]),
            Mish(),
            nn.Conv1d(dims[0], action_size, 1),
        )

    def embed(self, timestep: Tensor) -> Tensor:
        """See `Denoiser.embed`."""
        return cast("Tensor", self.time(timestep))

    def prepare(self, time: Tensor, condition: Tensor) -> Tensor:
        """[timestep embedding, condition], activated where the blocks expect it: (B, time + O·F)."""
        known = torch.cat([time.expand(len(condition), -1), condition.flatten(1)], dim=1)
        return mish(known) if self.activates else known

    def denoise(self, noisy_actions: Tensor, prepared: Tensor) -> Tensor:
        """See `Denoiser.denoise`."""
        horizon, condition = noisy_actions.shape[1], prepared
        x = pad_to_multiple(noisy_actions.transpose(1, 2), self.multiple)  # (B, A, L)
        skips = []
        for level, downsample in zip(self.down, self.downsample, strict=True):
            x = level(x, condition)
            skips.append(x)
            x = downsample(x)
        x = self.mid(x, condition)
        for level, upsample in zip(self.up, self.upsample, strict=True):  # the first level's skip stays unused
            x = upsample(level(torch.cat([x, skips.pop()], dim=1), condition))
        return cast("Tensor", self.final(x)[..., :horizon].transpose(1, 2).contiguous())


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last column of `x` (B, A, H) until `multiple` divides the length; `x` itself if it does already."""
    missing = -x.shape[-1] % multiple
    return torch.cat([x, x[..., -1:].expand(-1, -1, missing)], dim=-1) if missing else x

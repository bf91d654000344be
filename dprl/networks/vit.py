"""The small vision transformer of DPPO (arXiv:2409.00588, appendix on architectures), first used by IBRL (2311.02198).

Shapes: B images, C channels, height, width, P patches, D embedding size, S state size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dprl.config import validate
from dprl.errors import check

MIN_PIXELS = 24
"""Below, one side has a single patch and attention has nothing to compare."""


@dataclass(frozen=True)
class ViTConfig:
    """Overlapping patches from two convolutions, pre-norm transformer layers, and a spatial embedding."""

    embedding_size: int = 128
    """Size of a patch's embedding."""
    n_layers: int = 1
    """Transformer layers."""
    n_heads: int = 4
    """Attention heads; they share the embedding."""
    spatial_size: int = 128
    """Features per camera."""

    def __post_init__(self) -> None:
        validate(self, at_least={"embedding_size": 1, "n_layers": 1, "n_heads": 1, "spatial_size": 1})
        divides = self.embedding_size % self.n_heads == 0
        check(divides, "n_heads", self.n_heads, f"must divide embedding_size = {self.embedding_size}")

    @property
    def feature_size(self) -> int:
        """Features per image."""
        return self.spatial_size


def n_patches(height: int, width: int) -> int:
    """Return P of an image of `height` x `width` pixels: patches of 16 x 16, 8 apart."""
    return ((height - 8) // 8) * ((width - 8) // 8)


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). arXiv:2010.11929 eq. 2 and 3."""

    def __init__(self, size: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv = nn.Linear(size, 3 * size)
        self.project = nn.Linear(size, size)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, D) -> (B, P, D)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v)  # (B, heads, P, D / heads)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return cast("Tensor", x + self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Patches of 16 x 16 pixels, 8 apart, that attend to each other.

    Raises:
        ConfigError: the image is smaller than 24 x 24 pixels.
    """

    def __init__(self, channels: int, height: int, width: int, config: ViTConfig) -> None:
        super().__init__()
        large_enough = min(height, width) >= MIN_PIXELS
        check(large_enough, "(height, width)", (height, width), f"a ViT needs at least {MIN_PIXELS} pixels each way")
        size = config.embedding_size
        self.patches = nn.Sequential(nn.Conv2d(channels, size, 8, 4), nn.ReLU(), nn.Conv2d(size, size, 3, 2))
        self.position = nn.Parameter(torch.empty(1, n_patches(height, width), size))
        self.layers = nn.Sequential(*(TransformerLayer(size, config.n_heads) for _ in range(config.n_layers)))
        self.norm = nn.LayerNorm(size)
        nn.init.trunc_normal_(self.position, std=0.02)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, height, width) floats -> (B, P, D)."""
        patches = self.patches(images).flatten(2).transpose(1, 2)  # (B, P, D)
        return cast("Tensor", self.norm(self.layers(patches + self.position)))


class SpatialEmbedding(nn.Module):
    """One vector from all patches: each channel's map, seen with the state, is projected; the channels are summed.

    ReLU(LayerNorm(W [map_d, state])) weighted elementwise by a learned vector per channel d, then summed over d.
    """

    def __init__(self, n_patches: int, state_size: int, config: ViTConfig) -> None:
        super().__init__()
        size = config.spatial_size
        self.net = nn.Sequential(nn.Linear(n_patches + state_size, size), nn.LayerNorm(size), nn.ReLU())
        self.weight = nn.Parameter(torch.empty(config.embedding_size, size))
        nn.init.normal_(self.weight)

    def forward(self, patches: Tensor, state: Tensor | None) -> Tensor:
        """(B, P, D), (B, S) or None where S is 0 -> (B, spatial_size)."""
        maps = patches.transpose(1, 2)  # (B, D, P)
        if state is not None:
            maps = torch.cat([maps, state[:, None].expand(-1, maps.shape[1], -1)], dim=-1)  # (B, D, P + S)
        return cast("Tensor", (self.weight * self.net(maps)).sum(1))

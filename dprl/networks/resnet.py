"""ResNet-18 (arXiv:1512.03385) with GroupNorm and spatial softmax: the image encoder of Diffusion Policy and LeRobot.

Parameters carry torchvision's names, so that its weights load as they are. Shapes: B images, C channels, height, width,
h and w of the last feature map, K keypoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dprl.config import validate
from dprl.errors import check

CHANNELS_PER_GROUP = 16
HALVINGS = 5
"""Places where the network may halve the map: conv1, the pooling, layer2, layer3, layer4."""


@dataclass(frozen=True)
class ResNetConfig:
    """A ResNet-18 followed by spatial softmax; each image becomes 2 · `n_keypoints` features."""

    n_keypoints: int = 32
    """Points of interest whose coordinates are the features."""
    max_stride: int = 32
    """Pixels of the image per pixel of the last map: small images need 8 or less, or no map is left to search."""
    base_channels: int = 64
    """Channels of the first stage; the last one has eight times as many."""

    def __post_init__(self) -> None:
        validate(self, at_least={"n_keypoints": 1})
        strides = [2**i for i in range(HALVINGS + 1)]
        check(self.max_stride in strides, "max_stride", self.max_stride, f"must be one of {strides}")
        whole = self.base_channels > 0 and self.base_channels % CHANNELS_PER_GROUP == 0
        check(whole, "base_channels", self.base_channels, f"must be a positive multiple of {CHANNELS_PER_GROUP}")

    @property
    def feature_size(self) -> int:
        """Features per image: x and y of every keypoint."""
        return 2 * self.n_keypoints

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size (h, w) of the last feature map of an image of `height` x `width` pixels."""
        return -(-height // self.max_stride), -(-width // self.max_stride)


class BasicBlock(nn.Module):
    """relu(x + bn2(conv2(relu(bn1(conv1(x))))))."""

    def __init__(self, n_inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_inputs, channels, 3, stride, padding=1, bias=False)
        self.bn1 = _norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = _norm(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or n_inputs != channels:
            self.downsample = nn.Sequential(nn.Conv2d(n_inputs, channels, 1, stride, bias=False), _norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, n_inputs, height, width) -> (B, channels, height / stride, width / stride)."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet18(nn.Module):
    """The convolutional part: no pooling over the image and no classifier at the end."""

    def __init__(self, channels: int, config: ResNetConfig) -> None:
        super().__init__()
        width = config.base_channels
        strides = [2 if 2**i <= config.max_stride else 1 for i in range(1, HALVINGS + 1)]
        self.conv1 = nn.Conv2d(channels, width, 7, strides[0], padding=3, bias=False)
        self.bn1 = _norm(width)
        self.maxpool = nn.MaxPool2d(3, strides[1], padding=1)
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, strides[2])
        self.layer3 = _stage(2 * width, 4 * width, strides[3])
        self.layer4 = _stage(4 * width, 8 * width, strides[4])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, height, width) floats -> (B, 8 · base_channels, h, w)."""
        x = self.maxpool(functional.relu(self.bn1(self.conv1(images))))
        return cast("Tensor", self.layer4(self.layer3(self.layer2(self.layer1(x)))))


def position_grid(h: int, w: int, like: Tensor) -> Tensor:
    """Return the coordinates of every pixel of a map, row by row: (h · w, 2), x to the right and y down, in [-1, 1]."""
    x = torch.linspace(-1, 1, w, dtype=like.dtype, device=like.device)
    y = torch.linspace(-1, 1, h, dtype=like.dtype, device=like.device)
    return torch.stack([x.repeat(h), y.repeat_interleave(w)], dim=-1)


class SpatialSoftmax(nn.Module):
    """Where in the image each keypoint is: the softmax of its map, and the mean position under it. arXiv:1504.00702."""

    def __init__(self, channels: int, n_keypoints: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, n_keypoints, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, K, 2): x and y in [-1, 1], the edge pixels' centres at the ends."""
        logits = self.conv(features)
        weights = logits.flatten(2).softmax(-1)  # (B, K, h · w)
        return cast("Tensor", weights @ position_grid(logits.shape[-2], logits.shape[-1], logits))


class ResNetEncoder(nn.Module):
    """ResNet-18, spatial softmax, Linear, ReLU: one image to 2K features."""

    def __init__(self, channels: int, config: ResNetConfig) -> None:
        super().__init__()
        self.feature_size = config.feature_size
        self.backbone = ResNet18(channels, config)
        self.pool = SpatialSoftmax(8 * config.base_channels, config.n_keypoints)
        self.out = nn.Linear(self.feature_size, self.feature_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, height, width) floats -> (B, 2K)."""
        return functional.relu(self.out(self.pool(self.backbone(images)).flatten(1)))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // CHANNELS_PER_GROUP, channels)


def _stage(n_inputs: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(n_inputs, channels, stride), BasicBlock(channels, channels, 1))

"""From camera images to one feature vector, by ResNet-18 or by a small ViT.

Shapes: B observations, C channels, S state size. Images come channel-last, as Gymnasium's, and stay uint8 until here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from dprl.config import validate
from dprl.errors import ConfigError, check, did_you_mean
from dprl.networks.augment import center_crop, random_crop, random_shift
from dprl.networks.resnet import ResNetConfig, ResNetEncoder
from dprl.networks.vit import MIN_PIXELS, SpatialEmbedding, ViT, ViTConfig, n_patches
from dprl.observations import Camera


@dataclass(frozen=True)
class VisionConfig:
    """How images become features."""

    backbone: Literal["vit", "resnet"] = "vit"
    """The network every image goes through: DPPO's small ViT, or ResNet-18 with spatial softmax."""
    shared: bool = True
    """One backbone for all cameras, or one each. A ViT's spatial embedding is each camera's own in any case."""
    augmentation: Literal["none", "shift", "crop"] = "shift"
    """What training does to images: shifts of DrQ and DPPO, or crops of Diffusion Policy and LeRobot."""
    shift_pixels: int = 4
    """Largest shift in pixels."""
    crop_size: int | None = None
    """Side of the crop in pixels; without a generator it is taken from the middle."""
    vit: ViTConfig = field(default_factory=ViTConfig)
    """Of the ViT, if that is the backbone."""
    resnet: ResNetConfig = field(default_factory=ResNetConfig)
    """Of the ResNet, if that is the backbone."""

    def __post_init__(self) -> None:
        validate(self, at_least={"shift_pixels": 0, "crop_size": 1})
        fits = (self.crop_size is None) == (self.augmentation != "crop")
        check(fits, "crop_size", self.crop_size, "must be set with augmentation 'crop', and only then")

    @property
    def network(self) -> ViTConfig | ResNetConfig:
        """The backbone's config."""
        return self.vit if self.backbone == "vit" else self.resnet

    def input_size(self, camera: Camera) -> tuple[int, int]:
        """Return the height and width in pixels that the backbone sees."""
        return (camera.height, camera.width) if self.crop_size is None else (self.crop_size, self.crop_size)


class ImageEncoder(nn.Module):
    """Encodes every camera's image and concatenates the features, in the order of `cameras`.

    Args:
        cameras: at least one, with different names.
        state_size: S, the numbers that a ViT's spatial embedding sees beside the patches; ResNets ignore them.
        config: backbone and augmentation.

    Attributes:
        feature_size: length of the result.
        encoders: the backbones, one or one per camera: (B, C, height, width) floats to features.
        embeddings: with a ViT, each camera's spatial embedding; else empty.

    Raises:
        ConfigError: no camera, two of one name, an image too small, or cameras too different to share a backbone.
    """

    def __init__(self, cameras: tuple[Camera, ...], state_size: int, config: VisionConfig) -> None:
        super().__init__()
        names = [camera.name for camera in cameras]
        check(len(names) == len(set(names)) > 0, "cameras", names, "must be at least one, with different names")
        check(state_size >= 0, "state_size", state_size, "must be at least 0")
        for camera in cameras:
            _check_camera(camera, cameras[0], config)
        self.cameras, self.state_size, self.config = cameras, state_size, config
        self.encoders = nn.ModuleList(_encoder(camera, config) for camera in cameras[: 1 if config.shared else None])
        self.embeddings = nn.ModuleList()
        if config.backbone == "vit":
            patches = [n_patches(*config.input_size(camera)) for camera in cameras]
            self.embeddings.extend(SpatialEmbedding(n, state_size, config.vit) for n in patches)
        self.feature_size = len(cameras) * config.network.feature_size

    def forward(
        self,
        images: Mapping[str, Tensor],
        state: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        history: int = 1,
    ) -> Tensor:
        """Encode images.

        Args:
            images: camera name -> (B, height, width, C), uint8, or floats in [0, 1].
            state: (B, S) normalised; a ViT needs it where S > 0.
            generator: augments with it (training); None leaves the images as they are, or cropped in the middle.
            history: so many images that follow each other are one history, and are augmented alike.

        Returns:
            (B, feature_size).

        Raises:
            ConfigError: other cameras, shapes or types than the encoder was built for.
        """
        self._check(images, state)
        return self.encode({c.name: self.prepare(images[c.name], generator, history) for c in self.cameras}, state)

    def prepare(self, images: Tensor, generator: torch.Generator | None, history: int = 1) -> Tensor:
        """Augment or crop, and scale to [-0.5, 0.5]: (B, height, width, C) -> (B, C, input height, input width)."""
        config = self.config
        if config.crop_size is not None:
            size = config.crop_size
            images = center_crop(images, size) if generator is None else random_crop(images, size, generator, history)
        elif config.augmentation == "shift" and generator is not None:
            images = random_shift(images, config.shift_pixels, generator, history)
        floats = images.permute(0, 3, 1, 2).to(next(self.parameters()).dtype)
        return (floats if images.is_floating_point() else floats / 255) - 0.5

    def encode(self, images: Mapping[str, Tensor], state: Tensor | None = None) -> Tensor:
        """Encode what `prepare` returned, or what other statistics normalised: (B, C, height, width) -> (B, features).

        The sizes are those after cropping (`VisionConfig.input_size`); nothing is checked.
        """
        features = []
        for i, camera in enumerate(self.cameras):
            encoded = self.encoders[0 if self.config.shared else i](images[camera.name])
            features.append(self.embeddings[i](encoded, state) if self.embeddings else encoded)
        return torch.cat(features, dim=-1)

    def _check(self, images: Mapping[str, Tensor], state: Tensor | None) -> None:
        names = [camera.name for camera in self.cameras]
        for name in images:
            if name not in names:
                raise ConfigError(
                    f"camera '{name}' is unknown: expected {', '.join(names)}.{did_you_mean(name, names)}"
                )
        for camera in self.cameras:
            expected = f"(B, {camera.height}, {camera.width}, {camera.channels})"
            if camera.name not in images:
                raise ConfigError(f"camera '{camera.name}' is missing: expected images {expected}")
            image, first = images[camera.name], images[names[0]]
            shape = tuple(image.shape)
            if shape[1:] != (camera.height, camera.width, camera.channels):
                raise ConfigError(f"camera '{camera.name}' has images {shape}: expected {expected}, channels last")
            if len(image) != len(first):
                raise ConfigError(
                    f"camera '{camera.name}' has images {shape}: expected B = {len(first)} as '{names[0]}'"
                )
            if image.dtype != torch.uint8 and not image.is_floating_point():
                raise ConfigError(f"camera '{camera.name}' has images {shape} of {image.dtype}: expected {expected} of "
                                  "torch.uint8, or floats in [0, 1]")  # fmt: skip
        size = (len(images[names[0]]), self.state_size)
        if self.embeddings and self.state_size and (state is None or state.shape != size):
            found = None if state is None else tuple(state.shape)
            raise ConfigError(f"state = {found}: the ViT's spatial embedding expected a tensor {size}")


def _encoder(camera: Camera, config: VisionConfig) -> nn.Module:
    if config.backbone == "resnet":
        return ResNetEncoder(camera.channels, config.resnet)
    return ViT(camera.channels, *config.input_size(camera), config.vit)


def _check_camera(camera: Camera, first: Camera, config: VisionConfig) -> None:
    """Raise ConfigError where `camera` does not suit `config`; `first` is whose backbone it would share."""
    size, is_vit = config.input_size(camera), config.backbone == "vit"
    shape, first_shape = ((c.height, c.width, c.channels) for c in (camera, first))
    if size[0] > camera.height or size[1] > camera.width:
        raise ConfigError(f"crop_size = {config.crop_size}: camera '{camera.name}' has images {shape} only")
    if is_vit and min(size) < MIN_PIXELS:
        raise ConfigError(f"camera '{camera.name}' gives a ViT {size} pixels: it needs at least {MIN_PIXELS} each way")
    if config.shared and (camera.channels != first.channels or (is_vit and size != config.input_size(first))):
        raise ConfigError(f"camera '{camera.name}' has images {shape}, '{first.name}' {first_shape}: too different to "
                          "share a backbone; set shared = False")  # fmt: skip
    if config.backbone == "resnet" and config.resnet.map_size(*size) == (1, 1):
        message = (
            f"camera '{camera.name}': max_stride = {config.resnet.max_stride} leaves one pixel of {size}, where the "
            "spatial softmax gives the same features for every image; set max_stride = 8 or less"
        )
        warnings.warn(message, stacklevel=3)

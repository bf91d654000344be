"""The image encoder: what it accepts, what it shares, and when it augments."""

import warnings

import pytest
import torch

from dprl.config import from_json, to_json
from dprl.errors import ConfigError
from dprl.networks.resnet import ResNetConfig
from dprl.networks.vision import ImageEncoder, VisionConfig
from dprl.networks.vit import ViTConfig
from dprl.observations import Camera

RESNET = ResNetConfig(n_keypoints=3, max_stride=8, base_channels=16)
VIT = ViTConfig(embedding_size=16, n_layers=1, n_heads=2, spatial_size=6)
BACKBONES = [RESNET, VIT]
FRONT, WRIST = Camera("front", 26, 32), Camera("wrist", 26, 32)
B, S = 5, 4


def vision_config(network, **settings):
    if isinstance(network, ViTConfig):
        return VisionConfig("vit", vit=network, **settings)
    return VisionConfig("resnet", resnet=network, **settings)


def make(backbone, cameras=(FRONT, WRIST), **settings):
    torch.manual_seed(0)
    return ImageEncoder(cameras, S, vision_config(backbone, **settings))


def observe(*cameras, seed=0):
    source = torch.Generator().manual_seed(seed)
    images = {
        c.name: torch.randint(0, 256, (B, c.height, c.width, c.channels), generator=source, dtype=torch.uint8)
        for c in cameras or (FRONT, WRIST)
    }
    return images, torch.randn(B, S, generator=source)


def n_parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("shared", [True, False])
def test_feature_size(backbone, shared):
    encoder = make(backbone, shared=shared)
    assert encoder.feature_size == 12
    assert encoder(*observe()).shape == (B, 12)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_floats_and_bytes_give_the_same(backbone):
    encoder, (images, state) = make(backbone), observe()
    floats = {name: image.float() / 255 for name, image in images.items()}
    torch.testing.assert_close(encoder(images, state), encoder(floats, state))


def test_prepare_scales_and_puts_channels_first():
    images = torch.zeros(2, 26, 32, 3, dtype=torch.uint8)
    images[0, 3, 5, 1] = 255
    prepared = make(RESNET).prepare(images, None)
    assert prepared.shape == (2, 3, 26, 32)
    assert prepared[0, 1, 3, 5] == 0.5
    assert prepared.sum() == 1 - prepared.numel() / 2


@pytest.mark.parametrize("backbone", BACKBONES)
def test_encode_takes_normalised_floats(backbone):
    encoder, (images, state) = make(backbone), observe()
    prepared = {name: encoder.prepare(image, None) for name, image in images.items()}
    assert torch.equal(encoder.encode(prepared, state), encoder(images, state))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("settings", [{"augmentation": "shift"}, {"augmentation": "crop", "crop_size": 24}])
def test_only_a_generator_augments(backbone, settings):
    encoder, (images, state) = make(backbone, **settings), observe()
    plain = encoder(images, state)
    assert torch.equal(plain, encoder(images, state))
    first, again, other = (encoder(images, state, torch.Generator().manual_seed(i)) for i in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, plain)
    assert not torch.equal(first, other)


def test_no_augmentation():
    encoder, (images, state) = make(RESNET, augmentation="none"), observe()
    assert torch.equal(encoder(images, state), encoder(images, state, torch.Generator()))


def test_without_a_generator_the_crop_is_the_middle():
    images, _ = observe()
    prepared = make(RESNET, augmentation="crop", crop_size=24).prepare(images["front"], None)
    whole = make(RESNET).prepare(images["front"], None)
    assert torch.equal(prepared, whole[:, :, 1:25, 4:28])


@pytest.mark.parametrize("shared", [True, False])
def test_resnets_are_shared_whole(shared):
    both, one = make(RESNET, shared=shared), make(RESNET, cameras=(FRONT,))
    assert n_parameters(both) == (1 if shared else 2) * n_parameters(one)


@pytest.mark.parametrize("shared", [True, False])
def test_vits_share_the_backbone_only(shared):
    both, one = make(VIT, shared=shared), make(VIT, cameras=(FRONT,))
    assert len(both.embeddings) == 2
    backbones = 1 if shared else 2
    assert n_parameters(both) == backbones * n_parameters(one.encoders) + 2 * n_parameters(one.embeddings)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_features_stand_in_the_cameras_order(backbone):
    encoder, (images, state) = make(backbone, shared=False), observe()
    before = encoder(images, state)
    changed = encoder(dict(reversed(images.items())) | {"wrist": images["front"]}, state)
    assert torch.equal(before[:, :6], changed[:, :6])
    assert not torch.equal(before[:, 6:], changed[:, 6:])


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("shared", [True, False])
def test_gradient_reaches_every_parameter(backbone, shared):
    encoder = make(backbone, shared=shared)
    encoder(*observe(), torch.Generator()).square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_the_state_reaches_the_vit():
    images, state = observe()
    assert not torch.equal(make(VIT)(images, state), make(VIT)(images, state + 1))
    assert torch.equal(make(RESNET)(images, state), make(RESNET)(images, None))


def test_cameras_of_different_sizes():
    small = Camera("wrist", 24, 24, channels=1)
    for backbone in BACKBONES:
        assert make(backbone, (FRONT, small), shared=False)(*observe(FRONT, small)).shape == (B, 12)
    with pytest.raises(ConfigError, match=r"camera 'wrist' has images \(24, 24, 1\).*shared = False"):
        make(RESNET, (FRONT, small))
    colour = Camera("wrist", 24, 24)
    assert make(RESNET, (FRONT, colour))(*observe(FRONT, colour)).shape == (B, 12)
    with pytest.raises(ConfigError, match=r"camera 'wrist' has images \(24, 24, 3\).*shared = False"):
        make(VIT, (FRONT, colour))
    cropped = make(VIT, (FRONT, colour), augmentation="crop", crop_size=24)
    assert cropped(*observe(FRONT, colour)).shape == (B, 12)


BYTES = torch.zeros(B, 26, 32, 3, dtype=torch.uint8)
EXPECTED = r"expected \(B, 26, 32, 3\)"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({}, r"camera 'front' is missing: expected images \(B, 26, 32, 3\)"),
        ({"front": BYTES}, r"camera 'wrist' is missing: expected images \(B, 26, 32, 3\)"),
        ({"front": BYTES, "wirst": BYTES}, "camera 'wirst' is unknown.* Did you mean wrist"),
        ({"front": BYTES, "wrist": BYTES.permute(0, 3, 1, 2)}, rf"camera 'wrist'.*\(5, 3, 26, 32\): {EXPECTED}"),
        ({"front": BYTES[0], "wrist": BYTES}, rf"camera 'front'.*\(26, 32, 3\): {EXPECTED}"),
        ({"front": BYTES.sum(), "wrist": BYTES}, rf"camera 'front'.*\(\): {EXPECTED}"),
        ({"front": BYTES, "wrist": BYTES[:4]}, r"camera 'wrist'.*\(4, 26, 32, 3\): expected B = 5 as 'front'"),
        ({"front": BYTES.int(), "wrist": BYTES}, rf"camera 'front'.*of torch.int32: {EXPECTED}"),
    ],
)
def test_wrong_images_are_refused(images, message):
    with pytest.raises(ConfigError, match=message):
        make(RESNET)(images, None)


@pytest.mark.parametrize("state", [None, torch.zeros(B, S + 1), torch.zeros(B - 1, S), torch.zeros(S)])
def test_a_wrong_state_is_refused(state):
    images, _ = observe()
    with pytest.raises(ConfigError, match=r"state = .*\(5, 4\)"):
        make(VIT)(images, state)


@pytest.mark.parametrize(
    ("cameras", "settings", "message"),
    [
        ((), {}, "cameras = "),
        ((FRONT, FRONT), {}, "cameras = .'front', 'front'"),
        ((Camera("front", 48, 20),), {}, r"camera 'front' gives a ViT \(48, 20\) pixels"),
        ((FRONT,), {"augmentation": "crop", "crop_size": 20}, r"camera 'front' gives a ViT \(20, 20\) pixels"),
        ((FRONT,), {"augmentation": "crop", "crop_size": 28}, r"crop_size = 28: camera 'front'.*\(26, 32, 3\)"),
    ],
)
def test_cameras_that_do_not_suit_are_refused(cameras, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(VIT, cameras, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augmentation": "crop"}, "crop_size = None"),
        ({"augmentation": "shift", "crop_size": 24}, "crop_size = 24"),
        ({"augmentation": "crop", "crop_size": 0}, "crop_size = 0"),
        ({"augmentation": "blur"}, "augmentation = 'blur'"),
        ({"shift_pixels": -1}, "shift_pixels = -1"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        vision_config(VIT, **settings)


@pytest.mark.parametrize("camera", [{"name": ""}, {"height": 0}, {"width": -1}, {"channels": 0}])
def test_a_wrong_camera_is_refused_by_name(camera):
    with pytest.raises(ConfigError, match=f"{next(iter(camera))} = "):
        Camera(**({"name": "front", "height": 26, "width": 32} | camera))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_config_survives_json(backbone):
    config = vision_config(backbone, shared=False, augmentation="crop", crop_size=24)
    assert from_json(VisionConfig, to_json(config), "test") == config


def test_a_map_of_one_pixel_is_worth_a_warning():
    with pytest.warns(UserWarning, match="camera 'front': max_stride = 32 leaves one pixel"):
        make(ResNetConfig(base_channels=16), (Camera("front", 32, 32),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(RESNET)

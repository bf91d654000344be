"""LeRobot's and torchvision's image encoder weights: the names, and the same features from them."""

import json
import os
import tarfile
import warnings

import pytest
import torch

from dprl.checkpoint import load_tensors
from dprl.errors import CheckpointError
from dprl.interop.lerobot import foreign_rgb_encoder_state, resnet_state, rgb_encoder_state
from dprl.networks.resnet import ResNet18, ResNetConfig, ResNetEncoder
from dprl.networks.vision import ImageEncoder, VisionConfig
from dprl.observations import Camera

# A tar file of a policy that LeRobot saved, `lerobot_image/`, and its `expected.safetensors`: too large for here.
ARCHIVE = os.environ.get("DPRL_LEROBOT_ARCHIVE", "")
SMALL = ResNetConfig(n_keypoints=4, base_channels=16)

# What LeRobot 0.4.4's DiffusionRgbEncoder (torchvision 0.28) gives for the weights and images of `waves`.
LEROBOT_FEATURES = [
    [0.311612, 0.329123, 0.653217, 1.139344, 1.567223, 1.740699, 1.577712, 1.149106],
    [0.324217, 0.320468, 0.627186, 1.107621, 1.544048, 1.736474, 1.594334, 1.179114],
]


def waves(*shape, step, start=0):
    n = torch.Size(shape).numel()
    return torch.sin(torch.arange(n, dtype=torch.float64) * step + start).view(shape)


def foreign_state():
    """A LeRobot state dict with its names and sizes, filled by formula."""
    state = foreign_rgb_encoder_state(ResNetEncoder(3, ResNetConfig(n_keypoints=4)).state_dict(), (2, 3))
    for i, name in enumerate(sorted(state.keys() - {"pool.pos_grid"})):
        tensor = state[name]
        wave = waves(*tensor.shape, step=0.7, start=i)
        scaled = 1 + 0.3 * wave if tensor.ndim == 1 else wave * (2 / tensor[0].numel()) ** 0.5
        state[name] = scaled.float() * (30 if name == "pool.nets.weight" else 1)
    return state


def test_same_features_as_lerobot():
    """In float64, where the processor does not matter: its float32 roundings add up to 2e-5."""
    encoder = ResNetEncoder(3, ResNetConfig(n_keypoints=4)).double()
    encoder.load_state_dict(rgb_encoder_state(foreign_state()))
    with torch.no_grad():
        features = encoder(waves(2, 3, 64, 96, step=0.013).double())
    torch.testing.assert_close(features, torch.tensor(LEROBOT_FEATURES).double(), atol=1.7e-5, rtol=0)


def test_same_condition_as_a_lerobot_policy(tmp_path):
    """The policy's map is one pixel, so this pins names, sizes, order and the last layers; the test above the rest."""
    if not ARCHIVE:
        pytest.skip("DPRL_LEROBOT_ARCHIVE names no file")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "lerobot_image"
    config = json.loads((folder / "config.json").read_text())
    expected = load_tensors(folder / "expected.safetensors")
    channels, height, width = config["input_features"]["observation.image"]["shape"]
    size = config["crop_shape"][0]
    backbone = ResNetConfig(n_keypoints=config["spatial_softmax_num_keypoints"])
    vision = VisionConfig("resnet", augmentation="crop", crop_size=size, resnet=backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        encoder = ImageEncoder((Camera("image", height, width, channels),), 0, vision)
    weights = load_tensors(folder / "model.safetensors")
    encoder.encoders[0].load_state_dict(rgb_encoder_state(weights, "diffusion.rgb_encoder."))

    images = expected["in.observation.images"][:, :, 0]  # (B, O, C, height, width), normalised; one camera
    margin = (height - size) // 2
    cropped = images[..., margin : margin + size, margin : margin + size].flatten(0, 1)
    with torch.no_grad():
        features = encoder.encode({"image": cropped}).unflatten(0, images.shape[:2])  # (B, O, features)
    condition = expected["global_cond"].unflatten(1, (images.shape[1], -1))  # (B, O, state and features)
    state = expected["in.observation.state"]
    assert torch.equal(condition[..., : state.shape[-1]], state)
    target = condition[..., state.shape[-1] :]
    assert (features - target).abs().max() <= 1e-5 * target.abs().max()


def test_lerobot_and_back():
    state = ResNetEncoder(3, SMALL).state_dict()
    theirs = foreign_rgb_encoder_state(state, (2, 3), "diffusion.rgb_encoder.1.")
    assert theirs["diffusion.rgb_encoder.1.pool.pos_grid"].tolist() == [
        [-1, -1], [0, -1], [1, -1], [-1, 1], [0, 1], [1, 1]
    ]  # fmt: skip
    theirs["diffusion.unet.bias"] = torch.zeros(1)  # not the encoder's: ignored
    ours = rgb_encoder_state(theirs, "diffusion.rgb_encoder.1.")
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        ("backbone.0.weight", "backbone.conv1.weight"),
        ("backbone.1.bias", "backbone.bn1.bias"),
        ("backbone.4.0.conv1.weight", "backbone.layer1.0.conv1.weight"),
        ("backbone.7.0.downsample.1.bias", "backbone.layer4.0.downsample.1.bias"),
        ("pool.nets.bias", "pool.conv.bias"),
        ("out.weight", "out.weight"),
    ],
)
def test_names(foreign, ours):
    state = ResNetEncoder(3, SMALL).state_dict()
    assert foreign_rgb_encoder_state(state, (1, 1))[foreign] is state[ours]


def test_torchvision_leaves_out_the_classifier_and_batch_statistics():
    torch.manual_seed(0)
    resnet = ResNet18(3, SMALL)
    theirs = {name: torch.randn_like(tensor) for name, tensor in resnet.state_dict().items()}
    extra = {"fc.weight": torch.zeros(10, 128), "fc.bias": torch.zeros(10)}
    for part in ("running_mean", "running_var", "num_batches_tracked"):
        extra[f"bn1.{part}"] = extra[f"layer2.0.downsample.1.{part}"] = torch.zeros(16)
    resnet.load_state_dict(resnet_state(theirs | extra))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in resnet.state_dict().items())


def test_left_over_and_missing_parameters_are_named():
    theirs = foreign_rgb_encoder_state(ResNetEncoder(3, SMALL).state_dict(), (1, 1), "rgb.")
    with pytest.raises(CheckpointError, match=r"'rgb.backbone.1.running_mean'"):
        rgb_encoder_state(theirs | {"rgb.backbone.1.running_mean": torch.zeros(16)}, "rgb.")
    del theirs["rgb.backbone.5.0.downsample.0.weight"]
    with pytest.raises(CheckpointError, match=r"lacks 'rgb.backbone.5.0.downsample.0.weight'"):
        rgb_encoder_state(theirs, "rgb.")

    resnet = ResNet18(3, SMALL).state_dict()
    with pytest.raises(CheckpointError, match=r"'layer1.2.conv1.weight'"):  # a deeper ResNet
        resnet_state(resnet | {"layer1.2.conv1.weight": torch.zeros(16, 16, 3, 3)})
    del resnet["conv1.weight"]
    with pytest.raises(CheckpointError, match=r"lacks 'conv1.weight'"):
        resnet_state(resnet)

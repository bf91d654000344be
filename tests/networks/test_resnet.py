"""ResNet-18: sizes, torchvision's names, where spatial softmax looks. Parity: tests/interop/test_lerobot.py."""

import pytest
import torch
from torch import nn

from dprl.errors import ConfigError
from dprl.networks.resnet import ResNet18, ResNetConfig, ResNetEncoder, SpatialSoftmax, position_grid

SMALL = {"n_keypoints": 4, "base_channels": 16}


def test_stride_8_leaves_6_x_6_of_48_pixels():
    config = ResNetConfig(max_stride=8, **SMALL)
    assert ResNet18(3, config)(torch.zeros(2, 3, 48, 48)).shape == (2, 128, 6, 6)
    assert config.map_size(48, 48) == (6, 6)


@pytest.mark.parametrize("max_stride", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("size", [(16, 16), (33, 18)])
def test_map_size_is_what_the_network_gives(max_stride, size):
    config = ResNetConfig(max_stride=max_stride, **SMALL)
    assert ResNet18(1, config)(torch.zeros(1, 1, *size)).shape == (1, 128, *config.map_size(*size))


def test_parameters_have_torchvisions_names_and_shapes():
    state = ResNet18(3, ResNetConfig()).state_dict()
    assert len(state) == 60  # 62 of torchvision's are trained; fc has two of them
    assert state["conv1.weight"].shape == (64, 3, 7, 7)
    assert state["layer1.0.bn1.weight"].shape == (64,)
    assert state["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert state["layer2.0.downsample.1.bias"].shape == (128,)
    assert state["layer4.1.conv2.weight"].shape == (512, 512, 3, 3)
    assert not any(name.startswith("layer1.0.downsample") for name in state)


def test_groups_have_16_channels():
    norms = [m for m in ResNet18(3, ResNetConfig()).modules() if isinstance(m, nn.GroupNorm)]
    assert {m.num_channels // m.num_groups for m in norms} == {16}
    assert len(norms) == 20


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 4), (3, 0), (1, 2)])
def test_spatial_softmax_finds_a_bright_pixel(row, column):
    pool = SpatialSoftmax(2, 2)
    with torch.no_grad():
        pool.conv.weight.copy_(100 * torch.eye(2)[:, :, None, None])
    features = torch.zeros(1, 2, 4, 5)
    features[0, 1, row, column] = 1
    nowhere, found = pool(features)[0]
    torch.testing.assert_close(found, torch.tensor([column / 2 - 1, row / 1.5 - 1]))
    torch.testing.assert_close(nowhere, torch.zeros(2), atol=1e-6, rtol=0)  # a flat map: the middle


def test_position_grid_runs_along_rows():
    grid = position_grid(2, 3, like=torch.zeros(()))
    assert grid.tolist() == [[-1, -1], [0, -1], [1, -1], [-1, 1], [0, 1], [1, 1]]


def test_gradient_reaches_every_parameter():
    torch.manual_seed(0)
    encoder = ResNetEncoder(3, ResNetConfig(max_stride=8, **SMALL))
    encoder(torch.randn(4, 3, 24, 24)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        # A softmax does not notice what is added to all of its inputs.
        assert name == "pool.conv.bias" or parameter.grad.abs().max() > 1e-7, name


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_keypoints", 0), ("max_stride", 12), ("max_stride", 64), ("base_channels", 24), ("base_channels", 0)],
)
def test_a_wrong_setting_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"{field} = {value}"):
        ResNetConfig(**{field: value})

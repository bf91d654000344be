"""The small ViT: patches, the transformer layer against torch's own, the spatial embedding by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from dprl.errors import ConfigError
from dprl.networks.vit import SpatialEmbedding, TransformerLayer, ViT, ViTConfig, n_patches

SMALL = ViTConfig(embedding_size=16, n_layers=2, n_heads=2, spatial_size=8)


@pytest.mark.parametrize(("size", "patches"), [((96, 96), 121), ((48, 48), 25), ((24, 24), 4), ((31, 47), 8)])
def test_patches_per_image(size, patches):
    assert n_patches(*size) == patches
    assert ViT(3, *size, SMALL)(torch.zeros(2, 3, *size)).shape == (2, patches, 16)


def test_the_default_is_the_papers():
    vit = ViT(3, 96, 96, ViTConfig())
    assert vit.position.shape == (1, 121, 128)
    assert len(vit.layers) == 1
    assert vit.patches[0].weight.shape == (128, 3, 8, 8)
    assert vit.patches[2].weight.shape == (128, 128, 3, 3)


def test_layer_equals_torchs_pre_norm_encoder_layer():
    torch.manual_seed(0)
    ours = TransformerLayer(16, n_heads=4)
    theirs = nn.TransformerEncoderLayer(
        16, 4, 64, dropout=0, activation=functional.gelu, batch_first=True, norm_first=True
    )
    pairs = {
        "norm1": "norm1",
        "norm2": "norm2",
        "project": "self_attn.out_proj",
        "mlp.0": "linear1",
        "mlp.2": "linear2",
    }
    names = {f"{a}.{part}": f"{b}.{part}" for a, b in pairs.items() for part in ("weight", "bias")}
    names |= {"qkv.weight": "self_attn.in_proj_weight", "qkv.bias": "self_attn.in_proj_bias"}
    theirs.load_state_dict({names[name]: tensor for name, tensor in ours.state_dict().items()})
    x = torch.randn(3, 7, 16)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_position_matters():
    torch.manual_seed(0)
    vit, image = ViT(1, 24, 24, SMALL), torch.ones(1, 1, 24, 24)
    out = vit(image)  # equal patches differ only by where they are
    assert (out[0, 0] - out[0, 3]).abs().max() > 1e-3


def test_spatial_embedding_by_hand():
    torch.manual_seed(0)
    embedding = SpatialEmbedding(4, 3, SMALL)
    patches, state = torch.randn(2, 4, 16), torch.randn(2, 3)
    linear, norm, _ = embedding.net
    expected = torch.zeros(2, 8)
    for channel in range(16):
        projected = norm(linear(torch.cat([patches[:, :, channel], state], dim=-1)))
        expected += embedding.weight[channel] * projected.relu()
    torch.testing.assert_close(embedding(patches, state), expected, atol=1e-5, rtol=1e-5)


def test_spatial_embedding_without_a_state():
    assert SpatialEmbedding(4, 0, SMALL)(torch.zeros(2, 4, 16), None).shape == (2, 8)


def test_gradient_reaches_every_parameter():
    torch.manual_seed(0)
    vit, embedding = ViT(3, 24, 24, SMALL), SpatialEmbedding(4, 3, SMALL)
    embedding(vit(torch.randn(4, 3, 24, 24)), torch.randn(4, 3)).square().sum().backward()
    for name, parameter in [*vit.named_parameters(), *embedding.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("size", [(23, 48), (48, 16), (4, 4)])
def test_a_small_image_is_refused(size):
    with pytest.raises(ConfigError, match="at least 24 pixels"):
        ViT(3, *size, SMALL)


@pytest.mark.parametrize(
    ("field", "value"), [("embedding_size", 0), ("n_layers", 0), ("n_heads", 3), ("spatial_size", 0)]
)
def test_a_wrong_setting_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"{field} = {value}"):
        ViTConfig(**{field: value})

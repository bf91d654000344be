"""IDQL's denoiser, against its equations written out."""

import math

import torch
from torch.nn.functional import layer_norm, mish

from dprl.networks import LNResNetConfig, build_denoiser
from dprl.networks.ln_resnet import LNResNetBlock
from tests.networks.test_noise import shaken

CONFIG = LNResNetConfig(hidden_size=8, n_blocks=2, expansion=3, n_frequencies=4, time_size=6)


def test_it_is_what_the_paper_writes() -> None:
    """Sines and cosines of learned frequencies; blocks x + W2 mish(W1 norm(x)); a mish before the last layer."""
    net = shaken(build_denoiser(CONFIG, 2, 3, 1, 5)).double().eval()
    weights = dict(net.named_parameters())

    def dense(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    noisy, t, condition = torch.randn(4, 2, 3).double(), torch.tensor([0, 1, 2, 4]), torch.randn(4, 1, 5).double()
    blocks = {name.removesuffix(".norm.weight") for name in weights if name.endswith("norm.weight")}
    (time,) = {name.removesuffix(".frequencies") for name in weights if name.endswith("frequencies")}
    angle = 2 * math.pi * t[:, None].double() * weights[f"{time}.frequencies"]
    embedded = dense(mish(dense(torch.cat([angle.cos(), angle.sin()], 1), f"{time}.l1")), f"{time}.l2")
    x = dense(torch.cat([noisy.flatten(1), embedded, condition.flatten(1)], 1), "net.0")
    for block in sorted(blocks):
        normed = layer_norm(x, (8,), weights[f"{block}.norm.weight"], weights[f"{block}.norm.bias"])
        x = x + dense(mish(dense(normed, f"{block}.l1")), f"{block}.l2")
    expected = dense(mish(x), "net.3.linear").view(4, 2, 3)
    torch.testing.assert_close(net(noisy, t, condition), expected)


def test_what_enters_a_block_is_dropped_out_before_it_is_normed() -> None:
    block = LNResNetBlock(LNResNetConfig(hidden_size=64, dropout=0.5)).train()
    seen = []
    block.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.ones(50, 64)
    block(x)
    assert sorted(seen[0].unique().tolist()) == [0.0, 2.0]
    assert abs(float((seen[0] == 0).float().mean()) - 0.5) < 0.05
    block.eval()
    block(x)
    assert seen[1].equal(x)

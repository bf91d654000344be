"""The U-Net equals the authors' (tests/fixtures), and works at every horizon."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from dprl.errors import ConfigError
from dprl.interop import diffusion_policy
from dprl.networks.unet import ConditionalUNet1D, UNetConfig, pad_to_multiple
from dprl.seeding import seeded_init

FIXTURES = Path(__file__).parent.parent / "fixtures"
SETTINGS = json.loads((FIXTURES / "meta.json").read_text())
VARIANTS = list(product(("bias", "scale_bias"), ("linear", "mlp")))
A, N_OBS, F = 3, 2, 5


def build(horizon: int = 8, levels: int = 2, **changes) -> ConditionalUNet1D:
    config = UNetConfig(**{"down_dims": (8, 12, 16)[:levels], "n_groups": 2, "time_size": 8} | changes)
    with seeded_init(0, "unet"):
        return ConditionalUNet1D(horizon, A, N_OBS, F, config)


def inputs(horizon: int, batch: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noisy, condition = (torch.randn(batch, *size, generator=generator) for size in ((horizon, A), (N_OBS, F)))
    return noisy, torch.randint(0, 100, (batch,), generator=generator), condition


@pytest.mark.parametrize("case", ["dp_unet_bias", "dp_unet_scale"])
def test_parity(case: str) -> None:
    data, s = load_file(FIXTURES / f"{case}.safetensors"), SETTINGS[case]
    config = UNetConfig(
        down_dims=tuple(s["down_dims"]),
        kernel_size=s["kernel_size"],
        n_groups=s["n_groups"],
        time_size=s["diffusion_step_embed_dim"],
        film="scale_bias" if s["cond_predict_scale"] else "bias",
    )
    network = ConditionalUNet1D(data["in.sample"].shape[1], s["input_dim"], 2, s["global_cond_dim"] // 2, config)
    theirs = {name: tensor for name, tensor in data.items() if not name.startswith("in.") and name != "out"}
    network.load_state_dict(diffusion_policy.unet_state(theirs))
    out = network(data["in.sample"], data["in.timestep"], data["in.global_cond"].unflatten(1, (2, -1)))
    worst = float((out.detach() - data["out"]).abs().max() / data["out"].abs().max())
    print(f"parity {case:<28} {'out':<26} {worst:.1e}")
    assert worst < 1e-5


@pytest.mark.parametrize(("levels", "horizon"), product((1, 2, 3), range(1, 18)))
def test_any_horizon(levels: int, horizon: int) -> None:
    noisy, timestep, condition = inputs(horizon)
    out = build(horizon, levels)(noisy, timestep, condition)
    assert out.shape == noisy.shape
    assert out.is_contiguous()
    assert out.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(0, 3))
def test_padding_repeats_the_last_action_as_often_as_needed(horizon: int, halvings: int) -> None:
    x, multiple = torch.randn(2, A, horizon), 2**halvings
    padded = pad_to_multiple(x, multiple)
    assert (padded is x) == (horizon % multiple == 0)
    assert padded.shape[-1] % multiple == 0
    assert 0 <= padded.shape[-1] - horizon < multiple
    assert torch.equal(padded[..., :horizon], x)
    assert (padded[..., horizon:] == x[..., -1:]).all()


def test_padding_inside_equals_padding_outside() -> None:
    network = build(horizon=6, levels=3)
    noisy, timestep, condition = inputs(6)
    outside = torch.cat([noisy, noisy[:, -1:], noisy[:, -1:]], dim=1)
    torch.testing.assert_close(network(noisy, timestep, condition), network(outside, timestep, condition)[:, :6])


@pytest.mark.parametrize(("film", "encoder"), VARIANTS)
def test_one_timestep_for_all_equals_it_repeated(film: str, encoder: str) -> None:
    network = build(film=film, condition_encoder=encoder)
    noisy, _, condition = inputs(8)
    one = torch.tensor([17])
    torch.testing.assert_close(network(noisy, one, condition), network(noisy, one.expand(4), condition))
    torch.testing.assert_close(network(noisy, one.float(), condition), network(noisy, one, condition))


@pytest.mark.parametrize(("film", "encoder"), VARIANTS)
def test_gradient_reaches_every_parameter_and_input(film: str, encoder: str) -> None:
    network = build(horizon=5, levels=3, film=film, condition_encoder=encoder)
    noisy, timestep, condition = inputs(5)
    noisy.requires_grad_()
    condition.requires_grad_()
    network(noisy, timestep, condition).square().sum().backward()
    for name, tensor in {**dict(network.named_parameters()), "noisy": noisy, "condition": condition}.items():
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.any(), name


def test_samples_do_not_mix() -> None:
    network = build(horizon=5)
    noisy, timestep, condition = inputs(5)
    alone = network(noisy[:1], timestep[:1], condition[:1])
    torch.testing.assert_close(network(noisy, timestep, condition)[:1], alone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_dims": ()}, r"down_dims = \(\): must name at least one level"),
        ({"down_dims": (64, 100)}, r"down_dims\[1\] = 100: must be a positive multiple of n_groups = 8"),
        ({"down_dims": (0,)}, r"down_dims\[0\] = 0: must be a positive multiple of n_groups = 8"),
        ({"down_dims": (64, 12.5)}, r"down_dims\[1\] = 12.5: must be of type int"),
        ({"down_dims": 64}, "down_dims = 64: must be a list"),
        ({"kernel_size": 4}, "kernel_size = 4: must be odd"),
        ({"kernel_size": -1}, "kernel_size = -1: must be at least 1"),
        ({"n_groups": 0}, "n_groups = 0: must be at least 1"),
        ({"time_size": 7}, "time_size = 7: must be an even number of at least 4"),
        ({"time_size": 2}, "time_size = 2: must be an even number of at least 4"),
        ({"film": "scale"}, "film = 'scale': must be one of bias, scale_bias"),
        ({"condition_encoder": "cnn"}, "condition_encoder = 'cnn': must be one of linear, mlp"),
    ],
)
def test_configs_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UNetConfig(**changes)


def test_groups_of_a_single_number_are_refused() -> None:
    """GroupNorm would turn each of them into zero, and so forget the actions."""
    with pytest.raises(ConfigError, match=r"n_groups = 16: with horizon = 1 .* one number: use fewer groups"):
        build(horizon=1, levels=1, down_dims=(16,), n_groups=16)
    build(horizon=2, levels=1, down_dims=(16,), n_groups=16)(*inputs(2, batch=1))

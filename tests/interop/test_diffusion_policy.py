"""Diffusion Policy's parameters find their places in our networks, all of them, and the way back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dprl.errors import CheckpointError
from dprl.interop import diffusion_policy
from dprl.networks.transformer import DenoisingTransformer, TransformerConfig
from dprl.networks.unet import ConditionalUNet1D, UNetConfig

FIXTURES = Path(__file__).parent.parent / "fixtures"
NOT_WEIGHTS = {"_dummy_variable", "mask", "memory_mask"}


def fixture(case: str) -> dict[str, Tensor]:
    data = load_file(FIXTURES / f"{case}.safetensors")
    return {name: tensor for name, tensor in data.items() if not name.startswith("in.") and name != "out"}


def unet(down_dims: tuple[int, ...] = (8, 8, 16), film: str = "bias") -> ConditionalUNet1D:
    return ConditionalUNet1D(4, 2, 1, 3, UNetConfig(down_dims=down_dims, n_groups=2, time_size=4, film=film))


def transformer(n_layers: int = 2, n_condition_layers: int = 0) -> DenoisingTransformer:
    config = TransformerConfig(n_layers, 2, embedding_size=8, n_condition_layers=n_condition_layers)
    return DenoisingTransformer(5, 2, 3, 4, config)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("case", ["dp_unet_bias", "dp_unet_scale"])
def test_the_authors_unet_there_and_back(case: str) -> None:
    theirs = fixture(case)
    assert same(diffusion_policy.foreign_unet_state(diffusion_policy.unet_state(theirs)), theirs)


def test_the_authors_transformer_there_and_back() -> None:
    theirs = fixture("dp_transformer")
    ours = diffusion_policy.transformer_state(theirs)
    back = diffusion_policy.foreign_transformer_state(ours) | diffusion_policy.transformer_buffers(ours)
    assert same(back | {"_dummy_variable": torch.zeros(0)}, theirs)


def test_a_part_of_a_larger_state() -> None:
    theirs = {f"model.{name}": tensor for name, tensor in fixture("dp_transformer").items()}
    others = {"normalizer.params_dict.obs.scale": torch.ones(7), "mask_generator._dummy_variable": torch.zeros(0)}
    ours = diffusion_policy.transformer_state(theirs | others, "model.")
    assert same(ours, diffusion_policy.transformer_state(fixture("dp_transformer")))


@pytest.mark.parametrize("down_dims", [(8,), (8, 8), (16, 8), (8, 16, 32, 64)])
@pytest.mark.parametrize("film", ["bias", "scale_bias"])
def test_unet_there_and_back(down_dims: tuple[int, ...], film: str) -> None:
    state = unet(down_dims, film).state_dict()
    theirs = diffusion_policy.foreign_unet_state(state, "model.")
    assert same(diffusion_policy.unet_state(theirs, "model."), state)


@pytest.mark.parametrize("n_layers", [1, 2, 12])
@pytest.mark.parametrize("n_condition_layers", [0, 1, 3])
def test_transformer_there_and_back(n_layers: int, n_condition_layers: int) -> None:
    state = transformer(n_layers, n_condition_layers).state_dict()
    theirs = diffusion_policy.foreign_transformer_state(state, "model.")
    assert same(diffusion_policy.transformer_state(theirs, "model."), state)


@pytest.mark.parametrize("n_condition_layers", [0, 2])
def test_any_missing_transformer_parameter_is_named(n_condition_layers: int) -> None:
    state = transformer(1, n_condition_layers).state_dict()
    for missing in state:
        rest = {name: tensor for name, tensor in state.items() if name != missing}
        with pytest.raises(CheckpointError, match=f"Diffusion Policy's transformer: .* lacks .*'{missing}'"):
            diffusion_policy.transformer_state(rest)
        with pytest.raises(CheckpointError, match=f"DenoisingTransformer: .* lacks .*'{missing}'"):
            diffusion_policy.foreign_transformer_state(rest)


def test_any_missing_unet_parameter_is_named() -> None:
    state = diffusion_policy.foreign_unet_state(unet().state_dict(), "model.")
    for missing in state:
        rest = {name: tensor for name, tensor in state.items() if name != missing}
        with pytest.raises(CheckpointError, match=f"Diffusion Policy's U-Net: .* lacks .*'{missing}'"):
            diffusion_policy.unet_state(rest, "model.")


@pytest.mark.parametrize("extra", ["local_cond_encoder.0.conv.weight", "down_modules.2.2.conv.weight", "mask"])
def test_what_is_left_over_of_a_unet_is_named(extra: str) -> None:
    state = diffusion_policy.foreign_unet_state(unet().state_dict())
    with pytest.raises(CheckpointError, match=f"has, unknown to it, '{extra}'$"):
        diffusion_policy.unet_state(state | {extra: torch.zeros(1)})


def test_what_is_left_over_of_a_transformer_is_named() -> None:
    state = diffusion_policy.foreign_transformer_state(transformer().state_dict())
    with pytest.raises(CheckpointError, match=r"has, unknown to it, 'time_mlp\.weight'$"):
        diffusion_policy.transformer_state(state | {"time_mlp.weight": torch.zeros(1)})


@pytest.mark.parametrize("name", ["mask", "memory_mask"])
def test_another_mask_than_ours_is_refused(name: str) -> None:
    theirs = fixture("dp_transformer")
    for wrong in (torch.zeros_like(theirs[name]), theirs[name][:-1]):
        prefixed = {f"model.{key}": tensor for key, tensor in (theirs | {name: wrong}).items()}
        with pytest.raises(CheckpointError, match=f"'model.{name}' is not the causal mask"):
            diffusion_policy.transformer_state(prefixed, "model.")
    without = {key: tensor for key, tensor in theirs.items() if key not in NOT_WEIGHTS}
    assert same(diffusion_policy.transformer_state(without), diffusion_policy.transformer_state(theirs))

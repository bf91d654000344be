"""DPPO's parameters find their places in our networks, all of them, and the way back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dprl.errors import CheckpointError
from dprl.interop import dppo
from dprl.networks.mlp import ResidualMLP
from dprl.networks.timestep import TimestepEmbedding
from dprl.networks.unet import ConditionalUNet1D, UNetConfig

FIXTURES = Path(__file__).parent.parent / "fixtures"
SETTINGS = json.loads((FIXTURES / "meta.json").read_text())
TO_OURS = {"mlp": dppo.mlp_state, "unet": dppo.unet_state, "critic": dppo.critic_state}
TO_THEIRS = {"mlp": dppo.foreign_mlp_state, "unet": dppo.foreign_unet_state, "critic": dppo.foreign_critic_state}


def residual_state(n_blocks: int) -> dict[str, Tensor]:
    """The parameters of `DenoisingMLP` with so many blocks."""
    network = nn.ModuleDict({"time": TimestepEmbedding(4, 8), "net": ResidualMLP(9, 4, 6, n_blocks, "relu")})
    return network.state_dict()


def unet(encoder: str = "mlp", down_dims: tuple[int, ...] = (8, 8, 16)) -> ConditionalUNet1D:
    config = UNetConfig(down_dims=down_dims, n_groups=2, time_size=4, condition_encoder=encoder)
    return ConditionalUNet1D(4, 2, 1, 3, config)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("prefix", ["frozen.", "tuned."])
def test_the_authors_unet_fills_ours(prefix: str) -> None:
    data, s = load_file(FIXTURES / "dppo_unet_ddpm.safetensors"), SETTINGS["dppo_unet_ddpm"]
    sizes = s["network_kwargs"]
    config = UNetConfig(
        down_dims=tuple(sizes["dim"] * factor for factor in sizes["dim_mults"]),
        kernel_size=sizes["kernel_size"],
        n_groups=sizes["n_groups"],
        time_size=sizes["diffusion_step_embed_dim"],
        film="scale_bias" if sizes["cond_predict_scale"] else "bias",
        condition_encoder="linear" if sizes["smaller_encoder"] else "mlp",
    )
    network = ConditionalUNet1D(s["horizon_steps"], s["action_dim"], 1, s["obs_dim"], config)
    network.load_state_dict(dppo.unet_state(data, prefix))
    theirs = {name: tensor for name, tensor in data.items() if name.startswith(prefix)}
    assert same(dppo.foreign_unet_state(network.state_dict(), prefix), theirs)


@pytest.mark.parametrize("prefix", ["frozen.", "tuned."])
def test_the_authors_mlp_and_its_gradients(prefix: str) -> None:
    data = load_file(FIXTURES / "dppo_mlp_ddpm.safetensors")
    ours = dppo.mlp_state(data, prefix)
    expected = nn.ModuleDict({"time": TimestepEmbedding(16, 32), "net": ResidualMLP(35, 12, 64, 1, "relu")})
    expected.load_state_dict(ours)
    assert torch.equal(ours["net.2.weight"], data[f"{prefix}mlp_mean.layers.2.weight"])
    gradients = dppo.mlp_state(data, "grad.tuned.")
    assert gradients.keys() == ours.keys()
    assert torch.equal(gradients["net.1.l2.bias"], data["grad.tuned.mlp_mean.layers.1.l2.bias"])


def test_the_authors_critic() -> None:
    data = load_file(FIXTURES / "dppo_mlp_ddpm.safetensors")
    critic = nn.ModuleDict({"net": ResidualMLP(7, 1, 32, 1, "mish")})
    critic.load_state_dict(dppo.critic_state(data, "critic."))
    theirs = {name: tensor for name, tensor in data.items() if name.startswith("critic.")}
    assert same(dppo.foreign_critic_state(critic.state_dict(), "critic."), theirs)


def test_blocks_are_numbered_on_and_the_output_is_last() -> None:
    names = dppo.foreign_mlp_state(residual_state(3), "network.").keys()
    layers = {name.removeprefix("network.mlp_mean.layers.").removesuffix(".weight") for name in names if "mlp_" in name}
    expected = {"0", "1.l1", "1.l2", "2.l1", "2.l2", "3.l1", "3.l2", "4"}
    assert {layer for layer in layers if not layer.endswith("bias")} == expected


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 12])
def test_mlp_there_and_back(n_blocks: int) -> None:
    state = residual_state(n_blocks)
    assert same(dppo.mlp_state(dppo.foreign_mlp_state(state, "actor_ft."), "actor_ft."), state)
    critic = {name: tensor for name, tensor in state.items() if name.startswith("net.")}
    assert same(dppo.critic_state(dppo.foreign_critic_state(critic, "critic."), "critic."), critic)


@pytest.mark.parametrize("encoder", ["linear", "mlp"])
@pytest.mark.parametrize("down_dims", [(8,), (8, 8), (8, 16, 16), (8, 8, 16, 8)])
def test_unet_there_and_back(encoder: str, down_dims: tuple[int, ...]) -> None:
    state = unet(encoder, down_dims).state_dict()
    assert same(dppo.unet_state(dppo.foreign_unet_state(state, "network."), "network."), state)


CASES = {
    "mlp": (residual_state(2), "mlp_mean.layers.2.l1.bias"),
    "critic": ({name: t for name, t in residual_state(2).items() if name.startswith("net.")}, "Q1.layers.3.weight"),
    "unet": (unet().state_dict(), "up_modules.0.0.residual_conv.weight"),
}


@pytest.mark.parametrize("network", CASES)
def test_any_missing_parameter_is_named(network: str) -> None:
    ours, example = CASES[network]
    theirs = TO_THEIRS[network](ours, "tuned.")
    assert f"tuned.{example}" in theirs
    for missing in theirs:
        rest = {name: tensor for name, tensor in theirs.items() if name != missing}
        with pytest.raises(CheckpointError, match=f"lacks .*'{missing}'"):
            TO_OURS[network](rest, "tuned.")
    for missing in ours:
        with pytest.raises(CheckpointError, match=f"lacks .*'{missing}'"):
            TO_THEIRS[network]({name: tensor for name, tensor in ours.items() if name != missing})


@pytest.mark.parametrize("network", CASES)
@pytest.mark.parametrize("extra", ["cond_mlp.moduleList.0.linear_1.weight", "net.9.weight", "down_modules.7.0.x"])
def test_what_is_left_over_is_named(network: str, extra: str) -> None:
    theirs = TO_THEIRS[network](CASES[network][0], "tuned.")
    with pytest.raises(CheckpointError, match=f"has, unknown to it, .*'tuned.{extra}'"):
        TO_OURS[network](theirs | {f"tuned.{extra}": torch.zeros(1)}, "tuned.")
    TO_OURS[network](theirs | {f"frozen.{extra}": torch.zeros(1)}, "tuned.")


def test_a_prefix_that_nothing_has() -> None:
    with pytest.raises(CheckpointError, match=r"DPPO's residual MLP: no parameter begins with 'actor_ft\.'"):
        dppo.mlp_state({"network.x": torch.zeros(1)}, "actor_ft.")
    with pytest.raises(CheckpointError, match="DPPO's U-Net: no parameters"):
        dppo.unet_state({})


def test_long_lists_are_cut() -> None:
    with pytest.raises(CheckpointError, match=r"lacks 'mlp_mean\.layers\.0\.bias', .* and 5 more$"):
        dppo.mlp_state({"time_embedding.1.bias": torch.zeros(1), "mlp_mean.layers.1.l1.bias": torch.zeros(1)})

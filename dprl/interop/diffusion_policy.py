"""Diffusion Policy's parameter names (arXiv:2303.04137, the authors' code) and ours.

`<network>_state` takes the authors' state and returns one that our network loads with `strict=True`;
`foreign_<network>_state` is the way back. Both also rename anything else that is kept by parameter, such as gradients.
Tensors are passed on, not copied; shapes are left to `load_state_dict`. All raise CheckpointError when a parameter is
missing or left over. Their `prefix` says which part of the state is meant ("model." in a checkpoint of a whole
policy), and what else is in the state is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dprl.errors import CheckpointError
from dprl.interop.names import State, Table, count, inverse, rename, strip, with_parts
from dprl.networks.transformer import causal_mask, memory_mask

_UNET, _TRANSFORMER = "Diffusion Policy's U-Net", "Diffusion Policy's transformer"
_NOT_WEIGHTS = ("_dummy_variable", "mask", "memory_mask")


def unet_state(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """The authors' `ConditionalUnet1D`, conditioned globally only -> ours, for any levels and either FiLM."""
    theirs = strip(state, prefix, _UNET)
    return rename(theirs, unet_table(theirs), _UNET, prefix)


def foreign_unet_state(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """`dprl.networks.unet.ConditionalUNet1D` -> the authors' `ConditionalUnet1D`, with `prefix` before every name."""
    renamed = rename(state, inverse(unet_table(state)), "ConditionalUNet1D")
    return {prefix + name: tensor for name, tensor in renamed.items()}


def unet_table(state: Mapping[str, Tensor], time: str = "diffusion_step_encoder", norm: int = 1) -> Table:
    """Their names -> ours for the network whose `state`, under either's names, is given.

    Args:
        state: parameters by name; shapes tell which blocks change the number of channels and so project their input.
        time: their name of the timestep's network.
        norm: where in their convolution block the GroupNorm stands.
    """
    if any(re.search(r"\.cond_encoder\.[024]\.", name) for name in state):  # DPPO's
        encoder = {f"cond_encoder.{i}": f"cond_encoder.{i}" for i in (0, 2, 4)}
    else:
        encoder = {"cond_encoder.1": "cond_encoder"}
    block = {f"blocks.{i}.block.0": f"conv{i + 1}" for i in (0, 1)}
    block |= {f"blocks.{i}.block.{norm}": f"norm{i + 1}" for i in (0, 1)} | encoder
    levels = count(r"down(?:_modules)?\.(\d+)\.", state)
    paths = {f"mid_modules.{j}": f"mid.{j}" for j in (0, 1)}
    paths |= {f"down_modules.{i}.{j}": f"down.{i}.{j}" for i in range(levels) for j in (0, 1)}
    paths |= {f"up_modules.{i}.{j}": f"up.{i}.{j}" for i in range(levels - 1) for j in (0, 1)}

    layers = {f"{time}.1": "time.net.0", f"{time}.3": "time.net.2"}
    layers |= {"final_conv.0.block.0": "final.0", f"final_conv.0.block.{norm}": "final.1", "final_conv.1": "final.3"}
    for i in range(levels - 1):
        layers |= {f"down_modules.{i}.2.conv": f"downsample.{i}", f"up_modules.{i}.2.conv": f"upsample.{i}"}
    for theirs, ours in paths.items():
        layers |= {f"{theirs}.{a}": f"{ours}.{b}" for a, b in block.items()}
        kernel = state.get(f"{theirs}.blocks.0.block.0.weight", state.get(f"{ours}.conv1.weight"))
        if kernel is not None and kernel.shape[0] != kernel.shape[1]:
            layers[f"{theirs}.residual_conv"] = f"{ours}.residual_conv"
    return with_parts(layers)


def transformer_state(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """The authors' `TransformerForDiffusion` with time and observations as condition -> `DenoisingTransformer`.

    Any number of decoder and condition layers. What the authors store beside the weights may be there or not:
    `_dummy_variable` is ignored; attention masks are compared with those that our network makes for itself, which it
    does when its config says `causal`: `"mask" in state` tells.

    Raises:
        CheckpointError: also when a stored mask is another one.
    """
    theirs = strip(state, prefix, _TRANSFORMER)
    weights = {name: tensor for name, tensor in theirs.items() if name not in _NOT_WEIGHTS}
    ours = rename(weights, _transformer_table(weights), _TRANSFORMER, prefix)
    for name, expected in transformer_buffers(ours).items():
        if not torch.equal(theirs.get(name, expected).cpu(), expected):
            raise CheckpointError(f"{_TRANSFORMER}: '{prefix}{name}' is not the causal mask that dprl's network has")
    return ours


def foreign_transformer_state(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """`DenoisingTransformer` -> the authors' `TransformerForDiffusion`, with `prefix` before every name.

    Their class also stores, and asks for, `transformer_buffers` when its attention is causal, and `_dummy_variable`.
    """
    renamed = rename(state, inverse(_transformer_table(state)), "DenoisingTransformer")
    return {prefix + name: tensor for name, tensor in renamed.items()}


def transformer_buffers(state: Mapping[str, Tensor]) -> State:
    """The masks of a causal transformer, by the authors' names and without prefix, in the sizes of `state`."""
    horizon, n_tokens = state["pos_emb"].shape[1], state["cond_pos_emb"].shape[1]
    return {"mask": causal_mask(horizon), "memory_mask": memory_mask(horizon, n_tokens - 1)}


def _transformer_table(state: Mapping[str, Tensor]) -> Table:
    """The names are the same on both sides, so the table only says which there must be."""
    attention = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    rest = with_parts({name: name for name in ("linear1", "linear2", "norm1", "norm2")})
    encoder_layer = [*(f"self_attn.{name}" for name in attention), *rest]
    decoder_layer = [*encoder_layer, *(f"multihead_attn.{name}" for name in attention), "norm3.weight", "norm3.bias"]
    n_layers, n_condition = (count(rf"{stack}\.layers\.(\d+)\.", state) for stack in ("decoder", "encoder"))
    names = ["pos_emb", "cond_pos_emb"]
    names += [f"decoder.layers.{i}.{name}" for i in range(n_layers) for name in decoder_layer]
    names += [f"encoder.layers.{i}.{name}" for i in range(n_condition) for name in encoder_layer]
    layers = ["cond_obs_emb", "input_emb", "ln_f", "head"]
    layers += [] if n_condition else ["encoder.0", "encoder.2"]
    return {name: name for name in names} | with_parts({name: name for name in layers})

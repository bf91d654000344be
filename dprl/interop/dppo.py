"""DPPO's parameter names (arXiv:2409.00588, the authors' v0.8) and ours.

`<network>_state` takes the authors' state and returns one that our network loads with `strict=True`;
`foreign_<network>_state` is the way back. Both also rename anything else that is kept by parameter, such as gradients.
Tensors are passed on, not copied; shapes are left to `load_state_dict`. All raise CheckpointError when a parameter is
missing or left over.

Their `prefix` says which of the state's networks is meant, and what else is in the state is ignored: "network." before
fine-tuning; after it "actor." (frozen), "actor_ft." (tuned) and, for the critic, "critic.".
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dprl.interop.diffusion_policy import unet_table
from dprl.interop.names import State, Table, count, inverse, rename, strip, with_parts

_MLP, _UNET, _CRITIC = "DPPO's residual MLP", "DPPO's U-Net", "DPPO's residual MLP critic"


def mlp_state(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """The authors' residual `DiffusionMLP` -> `dprl.networks.DenoisingMLP`, for any number of blocks."""
    theirs = strip(state, prefix, _MLP)
    return rename(theirs, _mlp_table(theirs), _MLP, prefix)


def foreign_mlp_state(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """`dprl.networks.DenoisingMLP` -> the authors' residual `DiffusionMLP`, with `prefix` before every name."""
    return _prefixed(rename(state, inverse(_mlp_table(state)), "DenoisingMLP"), prefix)


def unet_state(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """The authors' `Unet1D` -> `ConditionalUNet1D`: any levels, either condition encoder, no extra observation MLP."""
    theirs = strip(state, prefix, _UNET)
    return rename(theirs, _unet_table(theirs), _UNET, prefix)


def foreign_unet_state(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """`ConditionalUNet1D` -> the authors' `Unet1D`, with `prefix` before every name."""
    return _prefixed(rename(state, inverse(_unet_table(state)), "ConditionalUNet1D"), prefix)


def critic_state(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """The authors' residual `CriticObs` -> `dprl.networks.ValueNet`."""
    theirs = strip(state, prefix, _CRITIC)
    return rename(theirs, _residual_table("Q1", theirs), _CRITIC, prefix)


def foreign_critic_state(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """`dprl.networks.ValueNet` -> the authors' residual `CriticObs`, with `prefix` before every name."""
    return _prefixed(rename(state, inverse(_residual_table("Q1", state)), "ValueNet"), prefix)


def _residual_table(theirs: str, state: Mapping[str, Tensor]) -> Table:
    """Their `ResidualMLP`, named `theirs` -> ours, named `net`: Linear, blocks of two layers, Linear."""
    n_blocks = count(r"(?:\w+\.layers|net)\.(\d+)\.l[12]\.", state)
    paths = ["0", *(f"{i}.{layer}" for i in range(1, n_blocks + 1) for layer in ("l1", "l2")), str(n_blocks + 1)]
    return with_parts({f"{theirs}.layers.{path}": f"net.{path}" for path in paths})


def _mlp_table(state: Mapping[str, Tensor]) -> Table:
    time = with_parts({"time_embedding.1": "time.net.0", "time_embedding.3": "time.net.2"})
    return time | _residual_table("mlp_mean", state)


def _unet_table(state: Mapping[str, Tensor]) -> Table:
    """Diffusion Policy's names but for the timestep's, and GroupNorm between two modules that reshape."""
    return unet_table(state, time="time_mlp", norm=2)


def _prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}

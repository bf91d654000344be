"""The denoisers by name. Any of them goes with any algorithm."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from dprl.networks.mlp import DenoisingMLP, MLPConfig
from dprl.networks.transformer import DenoisingTransformer, TransformerConfig
from dprl.networks.unet import ConditionalUNet1D, UNetConfig

DenoiserConfig = MLPConfig | UNetConfig | TransformerConfig


class DenoiserKind(NamedTuple):
    """A denoiser's config and network."""

    config: type[Any]
    network: type[nn.Module]


DENOISERS = {
    "mlp": DenoiserKind(MLPConfig, DenoisingMLP),
    "unet": DenoiserKind(UNetConfig, ConditionalUNet1D),
    "transformer": DenoiserKind(TransformerConfig, DenoisingTransformer),
}


def build_denoiser(
    config: DenoiserConfig, horizon: int, action_size: int, n_obs_steps: int, feature_size: int
) -> nn.Module:
    """Build the network that `config` describes.

    Its forward takes noisy actions (B, H, A), timesteps (B,) or (1,) for one for all, and conditions (B, O, F), and
    returns a prediction (B, H, A).
    """
    network = next(kind.network for kind in DENOISERS.values() if isinstance(config, kind.config))
    return network(horizon, action_size, n_obs_steps, feature_size, config)

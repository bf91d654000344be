"""The denoisers by name. Any of them goes with any algorithm."""

from __future__ import annotations

from typing import Any, NamedTuple

from dprl.networks.denoiser import Denoiser
from dprl.networks.ln_resnet import DenoisingLNResNet, LNResNetConfig
from dprl.networks.mlp import DenoisingMLP, MLPConfig
from dprl.networks.transformer import DenoisingTransformer, TransformerConfig
from dprl.networks.unet import ConditionalUNet1D, UNetConfig

DenoiserConfig = MLPConfig | UNetConfig | TransformerConfig | LNResNetConfig


class DenoiserKind(NamedTuple):
    """A denoiser's config and network."""

    config: type[Any]
    network: type[Denoiser]


DENOISERS = {
    "mlp": DenoiserKind(MLPConfig, DenoisingMLP),
    "unet": DenoiserKind(UNetConfig, ConditionalUNet1D),
    "transformer": DenoiserKind(TransformerConfig, DenoisingTransformer),
    "ln_resnet": DenoiserKind(LNResNetConfig, DenoisingLNResNet),
}


def build_denoiser(
    config: DenoiserConfig, horizon: int, action_size: int, n_obs_steps: int, feature_size: int
) -> Denoiser:
    """Build the network that `config` describes."""
    network = next(kind.network for kind in DENOISERS.values() if isinstance(config, kind.config))
    return network(horizon, action_size, n_obs_steps, feature_size, config)

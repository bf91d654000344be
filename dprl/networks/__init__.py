"""Networks: denoisers, image encoders, critics, and the one Polyak average."""

from dprl.networks.commanded import CommandedDenoiser, commanded
from dprl.networks.denoiser import Denoiser
from dprl.networks.denoisers import DENOISERS, DenoiserConfig, build_denoiser
from dprl.networks.given import GivenState, with_state
from dprl.networks.ln_resnet import DenoisingLNResNet, LNResNetConfig
from dprl.networks.mlp import DenoisingMLP, MLPConfig, ResidualMLP, ValueNet
from dprl.networks.optim import weight_decay_groups
from dprl.networks.polyak import polyak_update
from dprl.networks.transformer import DenoisingTransformer, TransformerConfig
from dprl.networks.unet import ConditionalUNet1D, UNetConfig
from dprl.networks.vision import ImageEncoder, VisionConfig

__all__ = [
    "DENOISERS",
    "CommandedDenoiser",
    "ConditionalUNet1D",
    "Denoiser",
    "DenoiserConfig",
    "DenoisingLNResNet",
    "DenoisingMLP",
    "DenoisingTransformer",
    "GivenState",
    "ImageEncoder",
    "LNResNetConfig",
    "MLPConfig",
    "ResidualMLP",
    "TransformerConfig",
    "UNetConfig",
    "ValueNet",
    "VisionConfig",
    "build_denoiser",
    "commanded",
    "polyak_update",
    "weight_decay_groups",
    "with_state",
]

"""Networks: denoisers, critics, and the one Polyak average."""

from dprl.networks.mlp import DenoisingMLP, MLPConfig, ResidualMLP, ValueNet
from dprl.networks.polyak import polyak_update

__all__ = ["DenoisingMLP", "MLPConfig", "ResidualMLP", "ValueNet", "polyak_update"]

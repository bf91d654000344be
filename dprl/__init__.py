"""dprl: diffusion policies that learn from reward.

Importing this package needs torch, numpy and safetensors only. What lies above (environments, data sets,
Ray) is reached through the lazy names `make`, `load_dataset` and `RayPool`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# A source checkout keeps `agents`, `envs` and `experiments` beside this package; a wheel keeps them inside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").is_file() and (_checkout / "agents").is_dir():
    __path__.append(str(_checkout))

from dprl.mdp import Chain, DenoisingMDP  # noqa: E402
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features, Policy  # noqa: E402

if TYPE_CHECKING:
    from dprl.data import Episodes, load_dataset
    from dprl.rollout.ray_pool import RayPool
    from dprl.spec import make

_LAZY = {
    "Episodes": "dprl.data",
    "load_dataset": "dprl.data",
    "make": "dprl.spec",
    "RayPool": "dprl.rollout.ray_pool",
}

__all__ = [
    "Chain",
    "DenoisingMDP",
    "DiffusionConfig",
    "DiffusionPolicy",
    "Episodes",
    "Features",
    "Policy",
    "RayPool",
    "load_dataset",
    "make",
]


def __getattr__(name: str) -> Any:
    """Import the layers above on first use (PEP 562), so that ``import dprl`` stays light."""
    if name not in _LAZY:
        raise AttributeError(f"module 'dprl' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)

"""LeRobot's names for its diffusion policy's image encoder, torchvision's for ResNet-18, and ours.

`<network>_state` takes their state and returns one that our network loads with `strict=True`; `foreign_<network>_state`
is the way back. Tensors are passed on, not copied; shapes are left to `load_state_dict`. All raise CheckpointError when
a parameter is missing or left over. `prefix` is what stands before every foreign name.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dprl.interop.names import State, Table, inverse, rename, strip, with_parts
from dprl.networks.resnet import position_grid

_RGB, _RESNET = "LeRobot's RgbEncoder", "torchvision's resnet18"
_GRID = "pool.pos_grid"
_BATCH_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# LeRobot keeps torchvision's modules in a Sequential, where 2 and 3 are the ReLU and the pooling.
_SEQUENTIAL = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}


def rgb_encoder_state(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """LeRobot's `DiffusionRgbEncoder` (0.4, ``use_group_norm=True``) -> `dprl.networks.resnet.ResNetEncoder`.

    The encoder needs ``max_stride=32`` and LeRobot's number of keypoints. In a policy the prefix is
    "diffusion.rgb_encoder.", followed by the camera's number and a dot where each camera has an encoder.
    """
    theirs = strip(state, prefix, _RGB)
    theirs.pop(_GRID, None)  # it follows from the image's size
    return rename(theirs, _rgb_table(), _RGB, prefix)


def foreign_rgb_encoder_state(state: Mapping[str, Tensor], map_size: tuple[int, int], prefix: str = "") -> State:
    """`ResNetEncoder` -> LeRobot's `DiffusionRgbEncoder`, which computes the same where ``max_stride`` is 32.

    Args:
        state: the encoder's.
        map_size: (h, w) of the last feature map, from `ResNetConfig.map_size`: LeRobot stores its coordinates too.
        prefix: how to begin every name.
    """
    theirs = rename(state, inverse(_rgb_table()), "ResNetEncoder")
    theirs[_GRID] = position_grid(*map_size, like=theirs["out.weight"])
    return {prefix + name: tensor for name, tensor in theirs.items()}


def resnet_state(state: Mapping[str, Tensor], prefix: str = "") -> State:
    """Torchvision's ``resnet18`` -> `dprl.networks.resnet.ResNet18`, with any `max_stride`.

    Only the convolutions and the norms' weights and biases carry over. The classifier (``fc``) is dropped, and so are
    BatchNorm's running statistics: GroupNorm takes its own from each image, so that the features differ from the
    original network's and need some training.
    """
    theirs = strip(state, prefix, _RESNET)
    kept = {
        n: t for n, t in theirs.items() if not n.startswith("fc.") and n.rpartition(".")[2] not in _BATCH_STATISTICS
    }
    return rename(kept, {name: name for name in _resnet_names()}, _RESNET, prefix)


def _resnet_names() -> list[str]:
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    shortcuts = [f"layer{stage}.0.downsample" for stage in (2, 3, 4)]
    convolutions = ["conv1", *(f"{b}.conv{i}" for b in blocks for i in (1, 2)), *(f"{s}.0" for s in shortcuts)]
    norms = ["bn1", *(f"{b}.bn{i}" for b in blocks for i in (1, 2)), *(f"{s}.1" for s in shortcuts)]
    return [
        *(f"{name}.weight" for name in convolutions),
        *(f"{name}.{p}" for name in norms for p in ("weight", "bias")),
    ]


def _rgb_table() -> Table:
    table = with_parts({"pool.nets": "pool.conv", "out": "out"})
    for name in _resnet_names():
        module, _, rest = name.partition(".")
        table[f"backbone.{_SEQUENTIAL[module]}.{rest}"] = f"backbone.{name}"
    return table

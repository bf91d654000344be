"""The sinusoids against their definition, for every dtype of timestep."""

import math

import pytest
import torch

from dprl.errors import ConfigError
from dprl.networks.timestep import SinusoidalEmbedding, TimestepEmbedding


def test_sinusoids_by_hand() -> None:
    embedding = SinusoidalEmbedding(6)(torch.tensor([0, 7]))
    frequencies = (1.0, 10_000**-0.5, 1e-4)
    at_seven = [math.sin(7 * f) for f in frequencies] + [math.cos(7 * f) for f in frequencies]
    torch.testing.assert_close(embedding, torch.tensor([[0.0, 0, 0, 1, 1, 1], at_seven]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_every_dtype_of_timestep_gives_the_same(dtype: torch.dtype) -> None:
    timestep = torch.tensor([0, 3, 999])
    embedding = TimestepEmbedding(8, 16)
    assert embedding(timestep.to(dtype)).dtype == torch.float32
    assert torch.equal(embedding(timestep.to(dtype)), embedding(timestep))


def test_only_weights_are_stored() -> None:
    names = {f"net.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}
    assert TimestepEmbedding(8, 16).state_dict().keys() == names


@pytest.mark.parametrize("size", [0, 2, 7])
def test_sizes_that_cannot_be(size: int) -> None:
    with pytest.raises(ConfigError, match=f"size = {size}: must be an even number of at least 4"):
        SinusoidalEmbedding(size)

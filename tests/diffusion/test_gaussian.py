"""The Gaussians of every density and divergence are torch's."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dprl.diffusion import normal_kl, normal_log_prob, normal_w2


@pytest.fixture
def two() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    numbers = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return numbers[0], numbers[1].exp(), numbers[2], numbers[3].exp()


def test_log_prob(two) -> None:
    mean, std, x, _ = two
    torch.testing.assert_close(normal_log_prob(x, mean, std), Normal(mean, std).log_prob(x))


def test_kl(two) -> None:
    mean, std, other_mean, other_std = two
    expected = kl_divergence(Normal(mean, std), Normal(other_mean, other_std))
    torch.testing.assert_close(normal_kl(*two), expected)
    assert normal_kl(mean, std, mean, std).abs().max() < 1e-12


def test_w2_is_the_cost_of_moving_quantiles(two) -> None:
    """In one dimension the best plan moves quantile to quantile."""
    q = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    mean, std, other_mean, other_std = (column[:, None] for column in two)
    cost = ((Normal(mean, std).icdf(q) - Normal(other_mean, other_std).icdf(q)) ** 2).mean(1)
    torch.testing.assert_close(normal_w2(*two), cost, rtol=1e-3, atol=1e-4)

"""Mish by one exponential is torch's."""

import pytest
import torch
from torch.nn import functional

from dprl.networks.mish import FEWEST, Mish, mish


@pytest.mark.parametrize(("low", "high"), [(-80, 80), (-3, 3), (-1e-3, 1e-3), (15, 25)])
def test_value_and_derivatives_are_torchs(low, high):  # from 88 on, torch's second derivative is no number
    x = torch.linspace(low, high, 2 * FEWEST, requires_grad=True)
    ours, theirs = mish(x), functional.mish(x)
    assert ours.grad_fn.name() == "_MishBackward"  # it is ours that is compared
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
    weights = torch.linspace(1, 2, x.numel())
    own, other = (torch.autograd.grad(f, x, weights)[0] for f in (ours, theirs))
    torch.testing.assert_close(own, other, rtol=1e-5, atol=2e-6)
    own, other = (torch.autograd.grad(f.sum(), x, create_graph=True)[0] for f in (mish(x), functional.mish(x)))
    torch.testing.assert_close(own, other, rtol=1e-5, atol=2e-6)
    second, other = (torch.autograd.grad(g.sum(), x)[0] for g in (own, other))
    torch.testing.assert_close(second, other, rtol=1e-5, atol=2e-6)


def test_it_is_finite_where_exponentials_are_not_and_shows_what_is_not_a_number():
    x = torch.full((FEWEST,), 3e38)
    x[1], x[2], x[3] = -3e38, torch.nan, torch.inf
    x.requires_grad_()
    y = mish(x)
    y.nansum().backward()
    assert y[0] == x[0]
    assert y[1] == 0
    assert y[2].isnan()
    assert y[3] == torch.inf
    assert x.grad[:2].tolist() == [1, 0]


@pytest.mark.parametrize("x", [torch.ones(3), torch.ones(FEWEST, dtype=torch.float64)], ids=["few", "float64"])
def test_else_it_is_torchs_own(x):
    assert Mish()(x).equal(functional.mish(x))


def test_compiled_it_is_the_same():
    x = torch.linspace(-80, 80, 2 * FEWEST, requires_grad=True)
    ours, theirs = torch.compile(mish, backend="eager", fullgraph=True)(x), functional.mish(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
    own, other = (torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs))
    torch.testing.assert_close(own, other, rtol=1e-5, atol=5e-6)

"""Denoisers in two parts: prepared together or one by one, copied or compiled, they are the same function."""

import copy

import pytest
import torch

from dprl.networks import denoiser as denoiser_module
from tests.test_policy import CONFIG, SMALL_DENOISERS, make_policy, replace

OBS = torch.linspace(-1, 2, 12).view(4, 1, 3)


@pytest.mark.parametrize("name", SMALL_DENOISERS)
@pytest.mark.parametrize("at_once", [1, 4, 6, 100])
def test_steps_are_prepared_in_parts_that_fit_in_memory(name, at_once, monkeypatch):
    policy = make_policy(config=replace(CONFIG, denoiser=SMALL_DENOISERS[name]))
    condition, timesteps = policy.condition(OBS), torch.tensor([3, 2, 0])
    alone = torch.stack([policy.base.prepare(policy.base.embed(t[None]), condition) for t in timesteps])
    monkeypatch.setattr(denoiser_module, "MAX_PREPARED", at_once)
    rows, prepare = [], policy.base.prepare
    monkeypatch.setattr(policy.base, "prepare", lambda t, c: (rows.append(len(t)), prepare(t, c))[1])
    together = torch.stack(list(policy.base.prepare_steps(timesteps, condition)))
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    assert max(rows, default=0) <= max(at_once, len(OBS))  # the MLP has no need of it


def test_a_copy_of_a_compiled_network_has_weights_of_its_own():
    policy = make_policy()
    policy.base.compile(backend="eager")
    copied = copy.deepcopy(policy.base)
    noisy, t, condition = torch.ones(4, 4, 2), torch.tensor([1]), policy.condition(OBS)
    before = policy.base(noisy, t, condition)
    assert copied(noisy, t, condition).equal(before)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1.0)
    assert not copied(noisy, t, condition).allclose(before)
    assert policy.base(noisy, t, condition).equal(before)
    copied(noisy, t, condition).sum().backward()
    assert all(p.grad is not None for p in copied.parameters())
    assert all(p.grad is None for p in policy.base.parameters())


@pytest.mark.parametrize("name", SMALL_DENOISERS)
@pytest.mark.parametrize("shape", [(4, 2, 3), (4, 1, 2), (4, 1, 4)], ids=str)
def test_a_condition_of_another_size_is_no_condition(name, shape):
    policy = make_policy(config=replace(CONFIG, denoiser=SMALL_DENOISERS[name]))
    with pytest.raises((RuntimeError, ValueError)):
        policy.base(torch.ones(4, 4, 2), torch.zeros(4), torch.zeros(shape))

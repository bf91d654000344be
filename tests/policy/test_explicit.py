"""Explicit policies: densities that equal torch's own, and what they make of two ways to do a thing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import distributions

from dprl.data import Episodes
from dprl.errors import ConfigError
from dprl.policy import Features, GaussianConfig, GMMConfig, GMMPolicy, LSTMGMMConfig, LSTMGMMPolicy, MSEConfig
from dprl.policy.explicit import MAX_STD, draw_category
from dprl.seeding import torch_generator
from tests.policy.small import drawn, fit, random_batch, small_policy, trained, ways

MIXTURES = ("gaussian", "gmm", "lstm_gmm")


def test_mse_learns_the_mean_of_two_ways() -> None:
    policy = trained("mse", ways(share=0.7))
    chunks = drawn(policy, 2)
    torch.testing.assert_close(chunks, torch.full_like(chunks, 0.4), atol=0.03, rtol=0)
    assert chunks[0].equal(chunks[1])


def test_mse_loss_by_hand() -> None:
    policy = small_policy("mse")
    obs, actions = random_batch(policy, 7)
    valid = torch.rand(7, 3, generator=torch_generator(3)) < 0.5
    predicted, target = (policy.action_normalizer.normalize(a) for a in (policy.sample(obs), actions))
    error = (predicted - target) ** 2
    generator = torch_generator(0)
    assert policy.loss(obs, actions, generator=generator).item() == pytest.approx(error.mean().item(), rel=1e-5)
    masked = policy.loss(obs, actions, valid=valid, generator=generator).item()
    assert masked == pytest.approx(error[valid].mean().item(), rel=1e-5)


# -------------------------------------------------------------------------------------------------------- densities


def mixture_of(policy: torch.nn.Module, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return policy._mixture(obs)


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_loss_is_the_mixture_density_of_torch(kind: str) -> None:
    policy = small_policy(kind)
    obs, actions = random_batch(policy, 7)
    log_weight, mean, std = mixture_of(policy, obs)
    modes = 1 if kind == "gaussian" else 3
    assert (log_weight.shape, mean.shape, std.shape) == ((7, modes), (7, modes, 3, 2), (7, modes, 3, 2))
    chunks = distributions.Independent(distributions.Normal(mean, std), 2)
    density = distributions.MixtureSameFamily(distributions.Categorical(logits=log_weight), chunks)
    expected = -density.log_prob(policy.action_normalizer.normalize(actions)).mean() / 6
    assert policy.loss(obs, actions, generator=torch_generator(0)).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_loss_of_a_padded_chunk_is_the_density_of_its_beginning(kind: str) -> None:
    """A mixture over the valid actions alone: weights count once, whatever is cut."""
    policy = small_policy(kind)
    obs, actions = random_batch(policy, 3)
    lengths = torch.tensor([3, 1, 2])
    valid = torch.arange(3) < lengths[:, None]
    log_weight, mean, std = mixture_of(policy, obs)
    target = policy.action_normalizer.normalize(actions)
    total = 0.0
    for i, n in enumerate(lengths.tolist()):
        beginning = distributions.Independent(distributions.Normal(mean[i, :, :n], std[i, :, :n]), 2)
        density = distributions.MixtureSameFamily(distributions.Categorical(logits=log_weight[i]), beginning)
        total -= density.log_prob(target[i, :n]).item()
    loss = policy.loss(obs, actions, valid=valid, generator=torch_generator(0))
    assert loss.item() == pytest.approx(total / (6 * 2), rel=1e-5)


@pytest.mark.parametrize("kind", MIXTURES)
def test_standard_deviations_stay_within_their_bounds(kind: str) -> None:
    policy = small_policy(kind, min_std=0.1)
    obs, _ = random_batch(policy, 2)
    policy._outputs = lambda obs, generator=None: torch.stack(
        [torch.full((policy._n_outputs(),), s) for s in (-1e4, 1e4)]
    )
    _, _, std = mixture_of(policy, obs)
    torch.testing.assert_close(std[0], torch.full_like(std[0], 0.1))
    torch.testing.assert_close(std[1], torch.full_like(std[1], MAX_STD))


# --------------------------------------------------------------------------------------------------------- learning


def test_gaussian_learns_mean_and_spread_of_each_observation() -> None:
    """The action of -1 is -0.5 ± 0.4, that of 1 is 1 ± 0.1."""
    rng = np.random.default_rng(0)
    n = 2_000
    seen = rng.choice([-1.0, 1.0], (n, 1))
    actions = np.where(seen < 0, -0.5 + 0.4 * rng.standard_normal((n, 1)), 1 + 0.1 * rng.standard_normal((n, 1)))
    no = np.zeros(n, np.bool_)
    data = Episodes(
        seen.astype(np.float32), actions.astype(np.float32), np.zeros(n, np.float32), seen.astype(np.float32),
        np.arange(1, n + 1), no, no, np.arange(n),
    )  # fmt: skip
    policy = trained("gaussian", data, horizon=1, n_action_steps=1, steps=200)
    for observed, mean, std in ((-1.0, -0.5, 0.4), (1.0, 1.0, 0.1)):
        chunks = policy.sample(torch.full((2_000, 1, 1), observed), generator=torch_generator(0))
        assert chunks.mean().item() == pytest.approx(mean, abs=0.05)
        assert chunks.std().item() == pytest.approx(std, rel=0.1)
        cold = policy.sample(torch.full((2_000, 1, 1), observed), generator=torch_generator(0), temperature=0.5)
        assert cold.std().item() == pytest.approx(std / 2, rel=0.1)


def test_gaussian_covers_two_ways_with_one_spread() -> None:
    chunks = drawn(trained("gaussian", ways()), 1_000)
    assert chunks.mean().item() == pytest.approx(0, abs=0.1)
    assert chunks.std().item() == pytest.approx(1, abs=0.1)
    assert (chunks.abs() < 0.5).float().mean() > 0.3, "between the two, where nobody went"


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("kind", ["gmm", "lstm_gmm"])
def test_mixtures_keep_both_ways_and_their_shares(kind: str, share: float) -> None:
    policy = trained(kind, ways(share))
    chunks = drawn(policy, 1_000)
    found = ((chunks.abs() - 1).abs() < 0.1).all(1)
    assert found.float().mean() > 0.98, "next to nothing between the two"
    assert chunks[:, 0][found].sign().equal(chunks[:, 1][found].sign()), "a chunk goes one way"
    assert (chunks[:, 0] > 0).float().mean().item() == pytest.approx(share, abs=0.06)


def test_low_noise_sampling_returns_means_alone() -> None:
    """As robomimic evaluates. Otherwise the mode's own spread is drawn too, scaled by the temperature."""
    data = ways(noise=0.2)
    policy = trained("gmm", data, n_modes=2, low_noise_sampling=False)
    calm = GMMPolicy(policy.features, replace(policy.config, low_noise_sampling=True))
    calm.load_state_dict(policy.state_dict())
    assert len(drawn(calm, 500).flatten(1).unique(dim=0)) == 2
    for temperature in (1.0, 0.5):
        chunks = drawn(policy, 2_000, temperature=temperature)
        positive = chunks[chunks[:, 0, 0] > 0]
        assert positive.std().item() == pytest.approx(0.2 * temperature, rel=0.15)


@pytest.mark.parametrize("kind", MIXTURES)
def test_temperature_0_is_the_mean_of_the_likeliest_mode(kind: str) -> None:
    options = {} if kind == "gaussian" else {"low_noise_sampling": False}
    policy = small_policy(kind, **options)
    obs, _ = random_batch(policy, 5)
    log_weight, mean, _ = mixture_of(policy, obs)
    expected = policy.action_normalizer.unnormalize(mean[torch.arange(5), log_weight.argmax(-1)])
    for seed in (0, 1):
        cold = policy.sample(obs, generator=torch_generator(seed), temperature=0.0)
        torch.testing.assert_close(cold, expected)


def test_categories_are_drawn_by_their_softmax() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, -torch.inf]).expand(40_000, 4)
    for temperature in (1.0, 0.5, 2.0):
        picked = draw_category(logits, temperature, torch_generator(0))
        shares = torch.bincount(picked, minlength=4) / len(picked)
        torch.testing.assert_close(shares, (logits[0] / temperature).softmax(-1), atol=0.01, rtol=0)
    assert (draw_category(logits, 0.0, None) == 0).all()
    assert draw_category(torch.zeros(2, 3, 4), 1.0, torch_generator(0)).shape == (2, 3)


# -------------------------------------------------------------------------------------------------------------- LSTM


def test_the_lstm_reads_the_history_in_order() -> None:
    policy = small_policy("lstm_gmm", n_obs_steps=4)
    obs, _ = random_batch(policy, 3)
    read, _ = policy.lstm(policy.observation_normalizer.normalize(obs))
    torch.testing.assert_close(policy._outputs(obs), policy.net(read[:, -1]))
    changed = obs.clone()
    changed[:, 0] += 1
    assert not torch.allclose(policy._outputs(changed), policy._outputs(obs)), "the oldest observation is read"
    assert not torch.allclose(policy._outputs(obs.flip(1)), policy._outputs(obs))


def test_the_lstm_can_use_what_only_the_past_shows() -> None:
    """The action is the first of four observations; the later ones say nothing."""
    sign = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)
    obs = torch.zeros(64, 4, 1)
    obs[:, 0, 0] = sign
    policy = LSTMGMMPolicy(Features(1, 1), LSTMGMMConfig(n_obs_steps=4, hidden_size=16, n_layers=1, n_modes=2))
    fit(policy, obs, sign[:, None, None], steps=100, rate=2e-2)
    torch.testing.assert_close(policy.sample(obs, temperature=0.0)[:, 0, 0], sign, atol=0.1, rtol=0)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MSEConfig(hidden_size=0), "hidden_size = 0: must be at least 1"),
        (lambda: MSEConfig(n_blocks=0), "n_blocks = 0"),
        (lambda: MSEConfig(activation="tanh"), "activation = 'tanh': must be one of relu, mish"),
        (lambda: MSEConfig(horizon=2, n_action_steps=3), "n_action_steps = 3.*which is 2"),
        (lambda: GaussianConfig(min_std=0.0), "min_std = 0.0: must be above 0"),
        (lambda: GaussianConfig(min_std=2.0), "min_std = 2.0: must be below 2.0"),
        (lambda: GMMConfig(min_std=3.0), "min_std = 3.0: must be below 2.0"),
        (lambda: GMMConfig(n_modes=0), "n_modes = 0"),
        (lambda: LSTMGMMConfig(n_layers=0), "n_layers = 0"),
    ],
)
def test_a_wrong_config_is_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()

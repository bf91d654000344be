"""Binned policies: which bin holds what, and what a bin cannot say."""

import numpy as np
import pytest
import torch
from torch import distributions

from dprl.errors import ConfigError, DatasetError
from dprl.policy import BeTConfig, BeTPolicy, CategoricalConfig, CategoricalPolicy, Features, MSEPolicy
from dprl.policy.categorical import kmeans
from dprl.seeding import torch_generator
from tests.policy.small import drawn, random_batch, random_episodes, small_config, small_policy, trained, ways


def decided(policy: CategoricalPolicy, bins: torch.Tensor, certainty: float = 50.0) -> CategoricalPolicy:
    """Make the policy choose `bins` (H, A) whatever it sees."""
    logits = certainty * torch.nn.functional.one_hot(bins, policy.config.n_bins).float()
    policy._outputs = lambda obs, generator=None: logits.flatten().expand(len(obs), -1)
    return policy


# ------------------------------------------------------------------------------------------- a softmax for each number


@pytest.mark.parametrize(
    ("action", "holds"),
    [(-1.0, 0), (-0.51, 0), (-0.5, 1), (-0.01, 1), (0.0, 2), (0.49, 2), (0.5, 3), (1.0, 3), (-1.5, 0), (2.0, 3)],
)
def test_the_bin_of_an_action(action: float, holds: int) -> None:
    """Four bins over [-1, 1]; the last one is closed, and what lies outside belongs to the nearest."""
    policy = CategoricalPolicy(Features(1, 1), CategoricalConfig(horizon=1, n_bins=4, hidden_size=8))
    losses = [
        decided(policy, torch.tensor([[b]])).loss(
            torch.zeros(1, 1, 1), torch.full((1, 1, 1), action), generator=torch_generator(0)
        )
        for b in range(4)
    ]
    assert int(torch.stack(losses).argmin()) == holds
    assert losses[holds] < 1e-6
    assert all(loss > 10 for b, loss in enumerate(losses) if b != holds)


def test_samples_are_the_centres_of_bins() -> None:
    policy = small_policy("categorical", n_bins=4)
    bins = torch.tensor([[0, 3], [1, 2], [2, 0]])
    chunk = decided(policy, bins).sample(torch.zeros(1, 2, 3), generator=torch_generator(0))[0]
    low, high = policy.action_normalizer.low, policy.action_normalizer.high
    torch.testing.assert_close(chunk, low + (bins + 0.5) / 4 * (high - low))


def test_a_centre_is_at_most_half_a_bin_from_what_it_stands_for() -> None:
    policy = small_policy("categorical", n_bins=7)
    _, actions = random_batch(policy, 50)
    normalized = policy.action_normalizer.normalize(actions)
    for target in normalized.flatten(0, 1)[:20]:
        bins = ((target + 1) / 2 * 7).long().clamp(0, 6).expand(3, 2)
        chunk = decided(policy, bins).sample(torch.zeros(1, 2, 3))
        assert (policy.action_normalizer.normalize(chunk) - target).abs().max() <= 1 / 7 + 1e-6


@pytest.mark.parametrize("n_bins", [31, 7])
def test_a_number_that_never_varies_is_returned_as_it_is(n_bins: int) -> None:
    """With an odd number of bins, of which the middle one is the constant's."""
    policy = CategoricalPolicy(Features(1, 1), CategoricalConfig(horizon=1, n_bins=n_bins, hidden_size=8))
    policy.action_normalizer.fit(torch.full((5, 1), 0.3))
    obs, action = torch.zeros(1, 1, 1), torch.full((1, 1, 1), 0.3)
    decided(policy, torch.tensor([[n_bins // 2]]))
    assert policy.loss(obs, action, generator=torch_generator(0)) < 1e-6
    torch.testing.assert_close(policy.sample(obs), action)


@pytest.mark.parametrize("masked", [False, True])
def test_categorical_loss_is_torchs_density(masked: bool) -> None:
    policy = small_policy("categorical")
    obs, actions = random_batch(policy, 7)
    valid = torch.arange(3) < torch.tensor([3, 1, 2, 3, 1, 1, 2])[:, None]
    bins = ((policy.action_normalizer.normalize(actions) + 1) / 2 * 5).floor().clamp(0, 4)
    density = distributions.Categorical(logits=policy._outputs(obs).view(7, 3, 2, 5)).log_prob(bins)
    loss = policy.loss(obs, actions, valid=valid if masked else None, generator=torch_generator(0))
    assert loss.item() == pytest.approx(-(density[valid] if masked else density).mean().item(), rel=1e-5)


def test_categorical_draws_each_number_by_its_own_share() -> None:
    """All shares are learned, but nothing ties the numbers of a chunk together: half of the chunks go both ways."""
    policy = trained("categorical", ways(), steps=60)
    chunks = drawn(policy, 2_000)[..., 0]
    assert ((chunks.abs() - 1).abs() < 0.25).all(1).float().mean() > 0.95
    assert (chunks > 0).float().mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.06)
    assert (chunks[:, 0].sign() == chunks[:, 1].sign()).float().mean().item() == pytest.approx(0.5, abs=0.06)
    unequal = drawn(trained("categorical", ways(0.8), steps=60), 2_000, temperature=1.0)
    assert (unequal > 0).float().mean().item() == pytest.approx(0.8, abs=0.06)


# ---------------------------------------------------------------------------------------------------------------- BeT


def test_kmeans_finds_separated_clusters() -> None:
    centers = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0], [-3.0, -3.0]])
    points = centers.repeat(50, 1) + 0.1 * torch.randn(200, 2, generator=torch_generator(0))
    for seed in range(5):
        found = kmeans(points, 4, torch_generator(seed))
        distance = torch.cdist(centers, found)
        assert (distance.amin(1) < 0.1).all(), "a centre for every cluster"
        means = torch.stack([points[i::4].mean(0) for i in range(4)])
        torch.testing.assert_close(found[torch.cdist(means, found).argmin(1)], means)
        assert found.equal(kmeans(points, 4, torch_generator(seed)))


def test_kmeans_of_as_many_points_as_clusters_are_the_points() -> None:
    points = torch.tensor([[0.0], [1.0], [5.0]])
    assert sorted(kmeans(points, 3, torch_generator(0)).flatten().tolist()) == [0, 1, 5]


def test_kmeans_of_fewer_different_points_than_clusters_repeats_some() -> None:
    """A cluster without points stays where it is."""
    found = kmeans(torch.tensor([[2.0], [2.0], [3.0], [3.0]]), 4, torch_generator(0))
    assert set(found.flatten().tolist()) == {2, 3}


def test_centres_are_of_normalised_chunks_of_the_data() -> None:
    data = ways(0.5, n=64, noise=0.0)
    policy = BeTPolicy.for_dataset(data, BeTConfig(horizon=2, n_bins=2, hidden_size=8))
    assert sorted(policy.centers.tolist()) == [[-1, -1], [1, 1]]
    again = BeTPolicy.for_dataset(data, BeTConfig(horizon=2, n_bins=2, hidden_size=8), seed=0)
    assert again.centers.equal(policy.centers)
    assert "centers" in policy.state_dict()


def test_fewer_chunks_than_bins_are_refused() -> None:
    with pytest.raises(DatasetError, match="28 chunks of 3 actions make no 29 bins"):
        BeTPolicy.for_dataset(random_episodes(), small_config("bet", n_bins=29))
    BeTPolicy.for_dataset(random_episodes(), small_config("bet", n_bins=28))


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_bet_loss_and_gradients_by_hand(gamma: float, masked: bool) -> None:
    policy = small_policy("bet", focal_gamma=gamma, offset_loss_scale=10.0)
    obs, actions = random_batch(policy, 6)
    lengths = [3, 1, 2, 3, 2, 1] if masked else [3] * 6
    valid = torch.arange(3) < torch.tensor(lengths)[:, None]
    logits, offsets = policy._heads(obs)
    focal, squared = [], []
    for i, n in enumerate(lengths):
        target = policy.action_normalizer.normalize(actions[i])[:n].flatten()
        distance = ((policy.centers[:, : 2 * n] - target) ** 2).sum(1)
        nearest = int(distance.argmin())
        share = logits[i].softmax(-1)[nearest]
        focal.append(-((1 - share) ** gamma) * share.log())
        squared.append((policy.centers[nearest] + offsets[i, nearest])[: 2 * n] - target)
    expected = torch.stack(focal).mean() + 10 * (torch.cat(squared) ** 2).mean()
    loss = policy.loss(obs, actions, valid=valid if masked else None, generator=torch_generator(0))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    ours, theirs = (torch.autograd.grad(value, list(policy.parameters())) for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_bet_samples_a_drawn_centre_moved_by_its_own_offset() -> None:
    policy = small_policy("bet")
    obs, _ = random_batch(policy, 200)
    logits, offsets = policy._heads(obs)
    every = policy.action_normalizer.unnormalize((policy.centers + offsets).unflatten(-1, (3, 2)))  # (B, C, H, A)
    cold = policy.sample(obs, generator=torch_generator(0), temperature=0.0)
    torch.testing.assert_close(cold, every[torch.arange(200), logits.argmax(-1)])
    chunks = policy.sample(obs, generator=torch_generator(0))
    nearest = (every - chunks[:, None]).flatten(2).norm(dim=-1).min(1)
    assert nearest.values.max() < 1e-5
    assert len(nearest.indices.unique()) == 5, "all are drawn"


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_bet_keeps_both_ways_and_their_shares(share: float) -> None:
    chunks = drawn(trained("bet", ways(share), n_bins=2, focal_gamma=0.0, steps=80), 2_000)
    assert (chunks.abs() - 1).abs().max() < 0.1
    assert chunks[:, 0].sign().equal(chunks[:, 1].sign()), "a chunk goes one way"
    assert (chunks[:, 0] > 0).float().mean().item() == pytest.approx(share, abs=0.06)


def test_offsets_reach_what_lies_off_the_centres() -> None:
    """A single bin is the mean; its offset, which depends on the observation, does all the rest."""
    data = random_episodes(Features(1, 1), (40,))
    data = type(data)(**{**vars(data), "actions": (0.5 * data.observations - 0.2).astype(np.float32)})
    policy = trained("bet", data, horizon=1, n_action_steps=1, n_bins=1, steps=150)
    reference = trained("mse", data, horizon=1, n_action_steps=1, steps=1)
    assert isinstance(reference, MSEPolicy)
    obs = torch.from_numpy(data.observations)[:, None]
    target = torch.from_numpy(data.actions)[:, None]
    assert (policy.sample(obs) - target).abs().max() < 0.05
    assert (policy.action_normalizer.unnormalize(policy.centers) - target.flatten()).abs().max() > 0.3


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CategoricalConfig(n_bins=1), "n_bins = 1: must be at least 2"),
        (lambda: BeTConfig(n_bins=0), "n_bins = 0: must be at least 1"),
        (lambda: BeTConfig(offset_loss_scale=-1.0), "offset_loss_scale = -1.0"),
        (lambda: BeTConfig(focal_gamma=-0.5), "focal_gamma = -0.5"),
        (lambda: BeTConfig(focal_gamma=0.5), "focal_gamma = 0.5: must be 0 or at least 1"),
    ],
)
def test_a_wrong_config_is_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()

"""Implicit behaviour cloning: InfoNCE by hand, and searches on energies whose minimum is known."""

import pytest
import torch

from dprl.errors import ConfigError
from dprl.policy import Features, IBCConfig, IBCPolicy
from dprl.policy.implicit import BOX
from dprl.seeding import torch_generator
from tests.policy.small import drawn, random_batch, small_policy, trained, ways

SEARCHES = ("derivative_free", "langevin")


def bowl(centre: torch.Tensor, steepness: float = 5.0) -> object:
    """An energy with its only minimum at `centre` (H, A), normalised."""
    return lambda condition, chunks: steepness * ((chunks - centre) ** 2).sum((-1, -2))


def searching(search: str, energy: object, **changes: object) -> IBCPolicy:
    """Two actions of one number each; normalised units are the environment's."""
    policy = IBCPolicy(Features(1, 1), IBCConfig(horizon=2, hidden_size=8, inference=search, **changes))
    policy.energy = energy
    return policy


def test_the_loss_is_the_cross_entropy_of_telling_the_demonstration_apart() -> None:
    policy = small_policy("ibc")
    obs, actions = random_batch(policy, 7)
    negatives = BOX * (2 * torch.rand(7, 6, 3, 2, generator=torch_generator(4)) - 1)
    shown = policy.action_normalizer.normalize(actions)[:, None]
    condition = policy.condition(obs).flatten(1)
    energies = torch.stack(
        [
            policy.net(torch.cat([condition, chunk.flatten(1)], dim=-1)).squeeze(-1)
            for chunk in torch.cat([shown, negatives], dim=1).unbind(1)
        ],
        dim=1,
    )
    expected = torch.nn.functional.cross_entropy(-energies, torch.zeros(7, dtype=torch.long))
    assert policy.loss(obs, actions, generator=torch_generator(4)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_fills_a_chunk_up_does_not_tell_the_demonstration_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy("ibc")
    obs, actions = random_batch(policy, 4)
    valid = torch.ones(4, 3, dtype=torch.bool)
    valid[1, 2] = valid[3, 1] = valid[3, 2] = False
    energy, seen = policy.energy, []
    monkeypatch.setattr(policy, "energy", lambda condition, chunks: seen.append(chunks) or energy(condition, chunks))
    policy.loss(obs, actions, valid=valid, generator=torch_generator(0))
    (chunks,) = seen
    alike = (chunks == chunks[:, :1]).all(dim=(1, 3))
    assert alike.equal(~valid)


def test_the_energy_knows_the_observation_and_the_chunk() -> None:
    policy = small_policy("ibc")
    obs, actions = random_batch(policy, 4)
    condition, chunks = policy.condition(obs), actions[:, None].repeat(1, 5, 1, 1)
    energy = policy.energy(condition, chunks)
    assert energy.shape == (4, 5)
    torch.testing.assert_close(energy, energy[:, :1].expand(-1, 5))
    assert not torch.allclose(policy.energy(condition + 1, chunks), energy)
    chunks[:, 3, 2, 1] += 0.5
    changed = (policy.energy(condition, chunks) - energy).abs() > 1e-6
    assert changed.any(0).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_finds_the_minimum(search: str) -> None:
    centre = torch.tensor([[0.6], [-0.3]])
    energy = bowl(centre, 5.0 if search == "langevin" else 20.0)
    found = drawn(searching(search, energy, n_iterations=6), 20, temperature=0.0)
    assert (found - centre).abs().max() < 0.05


def test_a_minimum_outside_the_box_is_met_at_its_edge() -> None:
    for search in SEARCHES:
        found = drawn(searching(search, bowl(torch.full((2, 1), 3.0))), 5, temperature=0.0)
        assert found.max() <= BOX
        assert (found > 0.95).all()


def test_more_rounds_come_closer() -> None:
    centre = torch.tensor([[0.6], [-0.3]])
    errors = [
        (drawn(searching("derivative_free", bowl(centre, 50.0), n_iterations=n, n_candidates=64), 100, temperature=0.0)
         - centre).abs().mean()
        for n in (1, 3, 6)
    ]  # fmt: skip
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.5 * errors[2]


def test_langevin_follows_the_gradient_of_each_candidate_alone() -> None:
    """Without its noise every candidate rolls down by itself, whatever the others do."""
    options = {"langevin_steps": 1, "langevin_step_size": 0.1, "langevin_noise_scale": 0.0}
    start = torch.tensor([[0.8], [-0.4]]).expand(1, 3, 2, 1).clone()
    for clip in (1.0, 0.3):
        policy = searching("langevin", bowl(torch.zeros(2, 1)), langevin_clip=clip, **options)
        moved = policy._langevin(None, start.clone(), None)
        torch.testing.assert_close(moved, start - (0.1 * 0.5 * 10 * start).clamp(-clip, clip))


def test_langevin_leaves_no_gradients_behind() -> None:
    policy = small_policy("ibc", inference="langevin")
    obs, _ = random_batch(policy, 2)
    chunks = policy.sample(obs)
    assert not chunks.requires_grad
    assert all(p.grad is None for p in policy.parameters())


def watched(energy: object, **changes: object) -> tuple[IBCPolicy, list[torch.Tensor]]:
    """A Langevin search, and where its candidates are at the beginning of each step."""
    places: list[torch.Tensor] = []

    def watch(condition: object, chunks: torch.Tensor) -> torch.Tensor:
        places.append(chunks.detach().clone())
        return energy(condition, chunks)

    return searching("langevin", watch, **changes), places


def flat(condition: object, chunks: torch.Tensor) -> torch.Tensor:
    return 0.0 * chunks.sum((-1, -2))


@pytest.mark.parametrize(("changes", "scale"), [({}, 1.0), ({"langevin_noise_scale": 0.3}, 0.3)], ids=str)
def test_langevin_moves_by_noise_of_its_step_size_where_the_energy_is_flat(
    changes: dict[str, float], scale: float
) -> None:
    """Sizes decay quadratically, and the last is no less than a hundred-thousandth."""
    policy, places = watched(flat, langevin_steps=5, langevin_step_size=0.1, langevin_clip=1.0, **changes)
    end = policy._langevin(None, torch.zeros(1, 20_000, 2, 1), torch_generator(0))
    moves = torch.stack([*places, end]).diff(dim=0).flatten(1)
    expected = scale * 0.1 * torch.tensor([1, 9 / 16, 1 / 4, 1 / 16, 1e-5])
    torch.testing.assert_close(moves.std(1), expected, rtol=0.02, atol=0)
    assert (moves.mean(1).abs() < 0.02 * expected).all()


@pytest.mark.parametrize("energy", [flat, bowl(torch.zeros(2, 1), 1e4)], ids=["noise", "gradient"])
@pytest.mark.parametrize(("changes", "limit"), [({}, 0.1), ({"langevin_clip": 0.02}, 0.02)], ids=str)
def test_langevin_goes_no_farther_than_its_limit_in_a_step(
    energy: object, changes: dict[str, float], limit: float
) -> None:
    policy, places = watched(energy, langevin_steps=3, langevin_step_size=2.0, **changes)
    end = policy._langevin(None, 0.5 * torch.ones(1, 100, 2, 1), torch_generator(0))
    moves = torch.stack([*places, end]).diff(dim=0).abs()
    assert moves.max().item() == pytest.approx(limit, rel=1e-4)
    assert (moves[:2] > 0.99 * limit).float().mean() > 0.5


@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_finds_both_of_two_minima(search: str) -> None:
    def energy(condition: object, chunks: torch.Tensor) -> torch.Tensor:
        return -torch.logsumexp(torch.stack([-bowl(s * torch.ones(2, 1))(None, chunks) for s in (-0.7, 0.7)]), 0)

    found = drawn(searching(search, energy), 400)
    assert ((found.abs() - 0.7).abs() < 0.5).all(1).float().mean() > 0.8
    assert (found[:, 0] > 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert (found[:, 0].sign() == found[:, 1].sign()).float().mean() > 0.95


def test_langevin_finds_minima_by_their_shares() -> None:
    def energy(condition: object, chunks: torch.Tensor) -> torch.Tensor:
        ways = [share * (-0.5 * ((chunks[..., 0, 0] - at) / 0.1) ** 2).exp() for at, share in ((-0.6, 0.2), (0.6, 0.8))]
        return -torch.stack(ways).sum(0).clamp(min=1e-30).log()

    found = drawn(searching("langevin", energy), 1_000)[:, 0, 0]
    assert (found > 0).float().mean().item() == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize("search", SEARCHES)
def test_ibc_keeps_both_ways(search: str) -> None:
    options = {"n_negatives": 32, "n_candidates": 128, "langevin_steps": 30}
    policy = trained("ibc", ways(n=128), inference=search, steps=120, **options)
    chunks = drawn(policy, 300)
    assert ((chunks.abs() - 1).abs() < 0.3).all(1).float().mean() > 0.9
    assert (chunks[:, 0].sign() == chunks[:, 1].sign()).float().mean() > 0.95
    # Every round of the derivative-free search weighs by the density again: it takes small differences for large ones.
    slack = 0.4 if search == "derivative_free" else 0.2
    assert (chunks[:, 0] > 0).float().mean().item() == pytest.approx(0.5, abs=slack)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_negatives": 0}, "n_negatives = 0: must be at least 1"),
        ({"n_candidates": 0}, "n_candidates = 0"),
        ({"n_iterations": 0}, "n_iterations = 0"),
        ({"langevin_steps": 0}, "langevin_steps = 0"),
        ({"search_std": 0.0}, "search_std = 0.0: must be above 0"),
        ({"langevin_step_size": -1.0}, "langevin_step_size = -1.0"),
        ({"langevin_noise_scale": -0.1}, "langevin_noise_scale = -0.1: must be at least 0"),
        ({"langevin_clip": 0.0}, "langevin_clip = 0.0: must be above 0"),
        ({"inference": "random"}, "inference = 'random': must be one of derivative_free, langevin"),
    ],
    ids=str,
)
def test_a_wrong_config_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IBCConfig(**changes)

"""How far guides lead away, and what is said of it."""

import math

import pytest
import torch
from torch import Tensor

from dprl.guidance import Reward, ValueGuide
from dprl.guidance.departure import Departure, departure
from dprl.policy import ChunkCritic, CriticConfig, InferenceConfig
from tests.policy.small import small_policy

OBS = torch.linspace(-1, 2, 64 * 6).view(64, 2, 3)


class Two:
    """Differ about chunks by how far they are from 0, in normalised units."""

    def at(self, obs: Tensor):
        return lambda actions: actions.sum((1, 2))

    def each(self, obs: Tensor, actions: Tensor) -> Tensor:
        size = actions.pow(2).mean((1, 2)).sqrt()
        return torch.stack([size, -size])


def test_a_guide_that_does_nothing_leads_nowhere() -> None:
    found = departure(small_policy("diffusion"), OBS, ValueGuide(Two(), 0.0))
    assert (found.distance, found.disagreement) == (0.0, 1.0)
    assert "the guide moves nothing" in found.warning
    skipping = ValueGuide(Two(), 1.0, skip_last=99)
    assert "the guide moves nothing" in departure(small_policy("diffusion"), OBS, skipping).warning


def test_what_networks_add_to_all_chunks_alike_is_no_disagreement() -> None:
    """As an energy's networks do, each of which is known up to a constant of the observation."""
    policy, guide = small_policy("diffusion", prediction_type="sample"), None

    class Apart(Two):
        def each(self, obs: Tensor, actions: Tensor) -> Tensor:
            return super().each(obs, actions) + torch.tensor([[50.0], [-50.0]])

    found = []
    for value in (Two(), Apart()):
        guide = ValueGuide(value, 1.0, scaling="normalized")
        found.append(departure(policy, OBS, guide).disagreement)
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0] > 1.1


def test_a_stronger_guide_leads_farther() -> None:
    policy = small_policy("diffusion", prediction_type="sample", clip_sample=None)
    found = [departure(policy, OBS, ValueGuide(Two(), s, scaling="normalized")) for s in (0.1, 1.0, 20.0)]
    assert [f.distance for f in found] == sorted(f.distance for f in found)
    assert found[0].warning is None
    assert "guided chunks lie" in found[-1].warning
    assert "the critic's networks differ about them" in found[-1].warning


def test_without_an_ensemble_nothing_is_said_of_one_and_the_scorers_is_taken() -> None:
    policy = small_policy("diffusion")
    guide = ValueGuide(Reward(lambda obs, actions: actions.sum((1, 2))), 0.1)
    assert departure(policy, OBS, guide).disagreement is None
    critic = ChunkCritic(policy, CriticConfig(hidden_size=32))
    assert departure(policy, OBS, guide, scorer=critic).disagreement > 0
    policy.scorer = critic
    assert departure(policy, OBS, guide).disagreement == departure(policy, OBS, guide, scorer=critic).disagreement


def test_a_policy_whose_samples_are_all_the_same_has_no_distance() -> None:
    policy = small_policy("diffusion", prediction_type="sample")
    with torch.no_grad():
        for weight in policy.base.parameters():
            weight.zero_()
    found = departure(policy, OBS, ValueGuide(Two(), 1.0), InferenceConfig(temperature=0.0))
    assert math.isnan(found.distance)


@pytest.mark.parametrize(
    ("found", "said"), [(Departure(1.9, 1.9), False), (Departure(2.1, None), True), (Departure(math.nan, 2.1), True)]
)
def test_what_is_told(found: Departure, said: bool) -> None:
    assert (found.warning is not None) == said


def test_the_gain_is_what_the_critic_says() -> None:
    policy = small_policy("diffusion", prediction_type="sample", clip_sample=None)
    policy.scorer = ChunkCritic(policy, CriticConfig(hidden_size=32))
    up, down = (departure(policy, OBS, ValueGuide(policy.scorer, s, scaling="normalized")).gain for s in (0.3, -0.3))
    assert up > 0 > down
    assert departure(policy, OBS, ValueGuide(policy.scorer, 0.0)).gain == 0

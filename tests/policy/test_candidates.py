"""Choosing among samples: the best is taken, weights are followed, and what cannot choose is refused."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dprl.errors import ConfigError
from dprl.observations import Camera, map_parts
from dprl.policy import ChunkCritic, CriticConfig, Features, InferenceConfig, Policy, RecedingHorizon, Scorer, best_of
from dprl.seeding import torch_generator
from tests.policy.small import FEATURES, KINDS, VIT, small_policy

OBS = torch.linspace(-1, 2, 24).view(4, 2, 3)


class FirstNumber:
    """Prefers a large first number of the first action; remembers what it was asked."""

    def __init__(self, sign: float = 1.0) -> None:
        self.sign, self.asked = sign, []

    def score(self, obs: Tensor, actions: Tensor) -> Tensor:
        self.asked.append((tuple(obs.shape), tuple(actions.shape)))
        return self.sign * actions[:, 0, 0]


def with_scorer(kind: str = "diffusion", scorer: object | None = None) -> Policy:
    policy = small_policy(kind)
    policy.scorer = FirstNumber() if scorer is None else scorer
    return policy


def test_images_are_encoded_once_for_all_candidates() -> None:
    features = Features(3, 2, (Camera("top", 24, 24),))
    policy = small_policy("diffusion", features, vision=VIT)
    policy.scorer = ChunkCritic(policy, CriticConfig(hidden_size=8))
    obs = policy.blank_observation(2)
    obs = {name: torch.randint(0, 255, part.shape).to(part.dtype) for name, part in obs.items()}
    rows: list[int] = []
    for encoder in (policy.encoder, policy.scorer.encoder):
        encoder.register_forward_pre_hook(lambda _, inputs: rows.append(len(next(iter(inputs[0].values())))))
    several = policy.sample(obs, candidates=5, generator=torch_generator(0))
    assert rows == [4, 4], "two observations of two steps each"
    noise = torch.randn(policy.n_draws(), 10, 3, 2)
    chosen = policy.sample(obs, candidates=5, noise=noise)
    every = map_parts(lambda part: part.repeat_interleave(5, 0), obs)
    chunks = policy.sample(every, noise=noise)
    best = policy.scorer.score(every, chunks).view(2, 5).argmax(1)
    torch.testing.assert_close(chosen, chunks.view(2, 5, 3, 2)[torch.arange(2), best], atol=1e-5, rtol=1e-5)
    assert several.shape == (2, 3, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_of_the_candidates_is_taken(kind: str) -> None:
    policy = with_scorer(kind)
    control = RecedingHorizon(policy, InferenceConfig(candidates=5))
    chosen, _ = control.plan(OBS, control.start(4), torch_generator(3))
    every = policy.draw(OBS.repeat_interleave(5, 0), InferenceConfig(), torch_generator(3)).view(4, 5, 3, 2)
    assert chosen[:, 0, 0].equal(every[:, :, 0, 0].amax(1))
    assert policy.scorer.asked == [((20, 2, 3), (20, 3, 2))]
    policy.scorer = FirstNumber(-1.0)
    worst, _ = control.plan(OBS, control.start(4), torch_generator(3))
    assert worst[:, 0, 0].equal(every[:, :, 0, 0].amin(1))


def test_sample_takes_them_too() -> None:
    policy, scorer = small_policy("diffusion"), FirstNumber()
    chosen = policy.sample(OBS, generator=torch_generator(3), candidates=5, scorer=scorer)
    every = policy.sample(OBS.repeat_interleave(5, 0), generator=torch_generator(3)).view(4, 5, 3, 2)
    assert chosen[:, 0, 0].equal(every[:, :, 0, 0].amax(1))
    noise = torch.randn(policy.n_draws(), 20, 3, 2, generator=torch_generator(1))
    again = [policy.sample(OBS, noise=noise, candidates=5, scorer=scorer) for _ in range(2)]
    assert again[0].equal(again[1])
    assert policy.sample(OBS, candidates=1, generator=torch_generator(0)).equal(
        policy.sample(OBS, generator=torch_generator(0))
    )


def test_a_deterministic_decision_is_the_same_for_equal_observations_and_has_different_candidates() -> None:
    policy = with_scorer()
    control = RecedingHorizon(policy, InferenceConfig(candidates=8))
    same = OBS[:1].expand(4, -1, -1)
    chosen, _ = control.plan(same, control.start(4), None, deterministic=True)
    again, _ = control.plan(same[:1], control.start(1), None, deterministic=True)
    torch.testing.assert_close(chosen, chosen[:1].expand_as(chosen))
    torch.testing.assert_close(chosen[:1], again)
    policy.scorer = FirstNumber(-1.0)
    worst, _ = control.plan(same, control.start(4), None, deterministic=True)
    assert bool((worst[:, 0, 0] < chosen[:, 0, 0]).all())


@pytest.mark.parametrize("option", [{"temporal_ensembling": 0.1}, {"warm_start_steps": 2}])
def test_other_ways_to_act_go_with_it(option: dict[str, float]) -> None:
    policy = with_scorer()
    control = RecedingHorizon(policy, InferenceConfig(candidates=3, **option))
    memory = control.start(4)
    for _ in range(3):
        actions, memory = control.plan(OBS, memory, torch_generator(0))
        assert bool(actions.isfinite().all())


class Fixed:
    """Scores candidates 0 to N - 1 of each observation as given."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = torch.tensor(scores)

    def score(self, obs: Tensor, actions: Tensor) -> Tensor:
        return self.scores.repeat(len(obs) // len(self.scores))


def chosen_of(scorer: Scorer, n: int, **options: object) -> Counter[int]:
    """How often each of n candidates is chosen, of 4,000 decisions; candidate i is the chunk that is i."""

    def draw(obs: Tensor) -> Tensor:
        return torch.arange(n, dtype=torch.float32).repeat(len(obs) // n).view(-1, 1, 1)

    chunks = best_of(draw, torch.zeros(4_000, 1, 3), n, scorer, generator=torch_generator(0), **options)
    return Counter(chunks.flatten().int().tolist())


def test_softmax_follows_the_scores() -> None:
    counts = chosen_of(Fixed([0.0, 1.0, 2.0]), 3, selection="softmax", scale=0.5)
    expected = np.exp([0.0, 0.5, 1.0]) / np.exp([0.0, 0.5, 1.0]).sum()
    np.testing.assert_allclose([counts[i] / 4_000 for i in range(3)], expected, atol=0.025)
    assert chosen_of(Fixed([0.0, 1.0, 2.0]), 3, selection="softmax", scale=0.0).keys() == {0, 1, 2}
    assert set(chosen_of(Fixed([0.0, 1.0, 2.0]), 3, selection="softmax", scale=1e4)) == {2}


def test_implicit_weights_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy("diffusion")
    critic = ChunkCritic(policy, CriticConfig(hidden_size=4))  # the expectile of 0.7
    monkeypatch.setattr(critic, "advantage", lambda obs, actions: torch.tensor([-1.0, -2.0, 3.0]).repeat(len(obs) // 3))
    counts = chosen_of(critic, 3, selection="implicit")
    np.testing.assert_allclose([counts[i] / 4_000 for i in range(3)], [0.3 / 1.3, 0.3 / 1.3, 0.7 / 1.3], atol=0.025)


def test_where_no_candidate_has_weight_all_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    critic = ChunkCritic(small_policy("diffusion"), CriticConfig(hidden_size=4))
    monkeypatch.setattr("dprl.policy.candidates._scores", lambda *_: torch.zeros(8_000))
    assert chosen_of(critic, 2, selection="implicit").keys() == {0, 1}


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_need_something_that_chooses(kind: str) -> None:
    with pytest.raises(ConfigError, match="candidates = 4: choosing among samples needs a scorer"):
        RecedingHorizon(small_policy(kind), InferenceConfig(candidates=4))
    RecedingHorizon(small_policy(kind), InferenceConfig(candidates=1))


def test_sample_needs_it_too() -> None:
    policy = small_policy("diffusion")
    with pytest.raises(ConfigError, match="candidates = 4: choosing among samples needs a scorer"):
        policy.sample(OBS, candidates=4)
    with pytest.raises(ConfigError, match="candidates = 0"):
        policy.sample(OBS, candidates=0)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(20, 1), r"scorer = \(20, 1\): must return one score for each of 20 chunks"),
        (torch.zeros(4), r"scorer = \(4,\): must return one"),
        (torch.full((20,), torch.nan), "must return finite scores"),
        (torch.zeros(20, dtype=torch.complex64), "must return real numbers"),
    ],
)
def test_scores_that_are_none_are_refused(scores: Tensor, message: str) -> None:
    class Odd:
        def score(self, obs: Tensor, actions: Tensor) -> Tensor:
            return scores

    policy = with_scorer(scorer=Odd())
    control = RecedingHorizon(policy, InferenceConfig(candidates=5))
    with pytest.raises(ConfigError, match=message):
        control.plan(OBS, control.start(4), None)


def test_scores_may_be_yes_and_no() -> None:
    class Positive:
        def score(self, obs: Tensor, actions: Tensor) -> Tensor:
            return actions[:, 0, 0] > 0

    for selection in ("argmax", "softmax"):
        control = RecedingHorizon(with_scorer(scorer=Positive()), InferenceConfig(candidates=5, selection=selection))
        assert control.plan(OBS, control.start(4), torch_generator(0, "t"))[0].shape[0] == 4
    with pytest.raises(ConfigError, match="scorer = 'function': must have a method score"):
        small_policy("diffusion").sample(OBS, candidates=3, scorer=lambda obs, actions: actions.sum((1, 2)))


def test_implicit_weights_are_a_critics() -> None:
    control = RecedingHorizon(with_scorer(), InferenceConfig(candidates=5, selection="implicit"))
    with pytest.raises(ConfigError, match="selection = 'implicit': FirstNumber has no value objective"):
        control.plan(OBS, control.start(4), None)


def test_what_does_not_score_is_no_scorer() -> None:
    with pytest.raises(ConfigError, match="scorer = 'int': must have a method score"):
        small_policy("diffusion").scorer = 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": 0}, "candidates = 0"),
        ({"selection": "implicit"}, "selection = 'implicit': needs candidates, more than 1"),
        ({"candidates": 1, "selection": "argmax"}, "needs candidates"),
        ({"candidates": 2, "selection": "best"}, "selection = 'best'"),
        ({"candidates": 2, "selection_scale": 2.0}, "selection_scale = 2.0: is of the selection softmax only"),
        ({"candidates": 2, "selection": "softmax", "selection_scale": -1.0}, "selection_scale = -1.0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InferenceConfig(**settings)


# ------------------------------------------------------------------------------------------------------------ critics


def test_a_scorer_is_no_part_of_the_policy(tmp_path: Path) -> None:
    policy = small_policy("diffusion")
    names = list(policy.state_dict())
    policy.scorer = ChunkCritic(policy, CriticConfig(hidden_size=4))
    assert list(policy.state_dict()) == names
    policy.save_pretrained(tmp_path / "policy")
    assert isinstance(Policy.from_pretrained(tmp_path / "policy").scorer, ChunkCritic)
    policy.scorer = FirstNumber()
    policy.save_pretrained(tmp_path / "plain")
    assert Policy.from_pretrained(tmp_path / "plain").scorer is None


def test_a_critic_moves_with_its_policy() -> None:
    policy = small_policy("diffusion")
    policy.scorer = critic = ChunkCritic(policy, CriticConfig(hidden_size=4))
    policy.to(torch.float64)
    assert next(critic.parameters()).dtype == torch.float64


@pytest.mark.parametrize("n_critics", [1, 2, 5])
def test_a_critics_score_is_the_least_of_its_q(n_critics: int) -> None:
    policy = small_policy("diffusion")
    critic = ChunkCritic(policy, CriticConfig(hidden_size=4, n_critics=n_critics))
    actions = torch.rand(4, 3, 2)
    q = critic.q(critic.see(OBS), actions)
    assert q.shape == (n_critics, 4)
    assert critic.score(OBS, actions).equal(q.amin(0))
    assert critic.advantage(OBS, actions).equal(q.amin(0) - critic.v(critic.see(OBS)))


def test_only_executed_actions_count() -> None:
    policy = small_policy("diffusion")  # two of three
    critic = ChunkCritic(policy, CriticConfig(hidden_size=64))  # fewer may all be silent
    actions = torch.rand(4, 3, 2)
    other = actions.clone()
    other[:, 2] += 1
    assert critic.score(OBS, actions).equal(critic.score(OBS, other))
    other[:, 1] += 1
    assert not critic.score(OBS, actions).equal(critic.score(OBS, other))


def test_a_critic_sees_images_by_itself() -> None:
    features = Features(3, 2, (Camera("top", 24, 24),))
    policy = small_policy("mse", features, vision=VIT)
    critic = ChunkCritic(policy, CriticConfig(hidden_size=4))
    obs = policy.blank_observation(2)
    assert critic.score(obs, torch.zeros(2, 3, 2)).shape == (2,)
    assert critic.encoder is not policy.encoder
    assert FEATURES.cameras == ()


@pytest.mark.parametrize("scale", [1e38, 3.4e38])
def test_a_softmax_of_an_enormous_scale_takes_the_best(scale: float) -> None:
    policy = small_policy("diffusion")

    class Large(FirstNumber):
        def score(self, obs: Tensor, actions: Tensor) -> Tensor:
            return 100 * actions[:, 0, 0]

    policy.scorer = Large()

    def planned(inference: InferenceConfig) -> Tensor:
        control = RecedingHorizon(policy, inference)
        return control.plan(OBS, control.start(4), torch_generator(3))[0]

    chosen = planned(InferenceConfig(candidates=5, selection="softmax", selection_scale=scale))
    assert chosen[:, 0, 0].equal(planned(InferenceConfig(candidates=5))[:, 0, 0])

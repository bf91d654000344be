"""Plans: they begin with the present state, and their actions lead from state to state."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dprl.agents import IDQL, Energy, Outcome, OutcomeConfig
from dprl.data import Episodes
from dprl.errors import ConfigError
from dprl.guidance import CommandGuide, DenoisingStep, DiffuserGuide, Guide, ValueGuide
from dprl.mdp import DenoisingMDP, ExplorationConfig
from dprl.networks import LNResNetConfig, MLPConfig, TransformerConfig, UNetConfig
from dprl.policy import ChunkValueConfig, Features, InferenceConfig, Planner, PlannerConfig, Policy
from dprl.seeding import torch_generator
from tests.policy.small import CAMERA, FEATURES, random_episodes

H, E = 8, 3
SMALL = PlannerConfig(
    horizon=H, n_action_steps=E, num_train_timesteps=4, denoiser=UNetConfig((8, 16), n_groups=4), command="return"
)
STATES = replace(SMALL, denoised="states", inverse_size=16)
BOTH = pytest.mark.parametrize("config", [SMALL, STATES], ids=["rows", "states"])


def rewarded() -> Episodes:
    data = random_episodes(lengths=(9, 12))
    return replace(data, rewards=data.actions[:, 0].copy())


def a_planner(config: PlannerConfig = SMALL) -> Planner:
    return Planner.for_dataset(rewarded(), config, seed=1)


def observations(n: int = 5) -> Tensor:
    return torch.as_tensor(rewarded().observations[:n])[:, None]


def first_states(plans: Tensor) -> Tensor:
    return plans[:, 0, FEATURES.action_size :]


class Push:
    """A guide that moves everything, the first state too."""

    def shift(self, step: DenoisingStep) -> DenoisingStep:
        assert torch.equal(step.allowed(step.clean), step.clean)
        return step.with_clean(step.clean + 0.7)


@BOTH
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmsolver++"])
@pytest.mark.parametrize("guide", [None, Push(), CommandGuide(0.9)], ids=["plain", "pushed", "told"])
def test_plans_begin_with_the_present_state(config: PlannerConfig, solver: str, guide: Guide | None) -> None:
    policy, obs = a_planner(config), observations()
    plans = policy.sample(obs, solver=solver, guide=guide)
    assert plans.shape == (5, H, FEATURES.action_size + FEATURES.observation_size)
    torch.testing.assert_close(first_states(plans), obs[:, 0])
    normalizers = (policy.action_normalizer, policy.observation_normalizer)
    low, high = torch.cat([n.low for n in normalizers]), torch.cat([n.high for n in normalizers])
    assert ((plans >= low - 1e-5) & (plans <= high + 1e-5)).all(), "in units, and clamped"


def test_values_see_plans_that_begin_so() -> None:
    policy, obs, seen = a_planner(), observations(), []

    class Watched:
        def at(self, obs: Tensor):
            def worth(plans: Tensor) -> Tensor:
                seen.append(first_states(plans).detach())
                return plans.sum((1, 2))

            return worth

    policy.sample(obs, guide=ValueGuide(Watched(), 1.0, scaling="noise"))
    assert len(seen) == 4
    for states in seen:
        torch.testing.assert_close(states, obs[:, 0])


@BOTH
def test_it_acts_by_the_first_actions(config: PlannerConfig) -> None:
    policy, obs = a_planner(config), rewarded().observations[:5]
    plans = policy.sample(torch.as_tensor(obs)[:, None], generator=torch_generator(3))
    assert torch.equal(policy.act(plans), plans[..., : FEATURES.action_size])
    generator, state, actions = torch_generator(3), None, []
    for _ in range(E + 1):
        action, state = policy.predict(obs, state, generator=generator)
        actions.append(action)
    np.testing.assert_array_equal(np.stack(actions[:E], axis=1), policy.act(plans)[:, :E])
    assert not np.array_equal(actions[E], policy.act(plans)[:, E]), "then it plans anew"


@BOTH
def test_it_is_saved_and_loaded(config: PlannerConfig, tmp_path: Path) -> None:
    policy, obs = a_planner(config), observations()
    policy.save_pretrained(tmp_path / "planner")
    loaded = Policy.from_pretrained(tmp_path / "planner")
    assert isinstance(loaded, Planner)
    assert loaded.config == config
    one, other = (p.sample(obs, generator=torch_generator(0)) for p in (policy, loaded))
    assert torch.equal(one, other)


@BOTH
@pytest.mark.parametrize(
    "denoiser",
    [
        UNetConfig((8, 16), n_groups=4),
        MLPConfig(hidden_size=8),
        LNResNetConfig(hidden_size=8, n_blocks=1),
        TransformerConfig(embedding_size=8, n_heads=2, n_layers=1),
    ],
    ids=["unet", "mlp", "ln_resnet", "transformer"],
)
def test_what_is_given_is_no_part_of_the_loss(config: PlannerConfig, denoiser: object) -> None:
    """Nor does the noise in its place matter, which the networks do not see."""
    policy = a_planner(replace(config, denoiser=denoiser))
    weights = policy._weights()
    size = FEATURES.action_size if config.denoised == "rows" else 0
    assert (weights[0, size:] == 0).all()
    assert (weights[1:] == 1).all()
    assert (weights[0, :size] == 10).all()
    noisy, obs = torch.randn(5, H, policy.denoised_size), observations()
    other = noisy.clone()
    other[:, 0, size:] += 1.0
    condition = policy.condition(obs)
    for network in (policy.base.train(), policy.base.eval()):
        said = [network(x, torch.tensor([2]), condition) for x in (noisy, other)]
        assert torch.equal(*said)
        (prepared,) = network.prepare_steps(torch.tensor([2]), condition)
        torch.testing.assert_close(network.denoise(noisy, prepared), said[0])
    moved = policy.base(noisy, torch.tensor([2]), policy.condition(obs + 1.0))
    assert not torch.allclose(moved, said[0]), "the state is seen"


def test_a_denoiser_of_no_condition_at_all() -> None:
    policy = a_planner(replace(SMALL, command=None))
    assert policy.sample(observations()).shape == (5, H, policy.chunk_size)


def test_what_fills_a_plan_up_is_learned() -> None:
    """For it is denoised with the rest; the inverse dynamics knows nothing of it."""
    policy, data = a_planner(), rewarded()
    rows = torch.as_tensor(policy.chunks_of(data).actions)[None, :H]
    valid = torch.arange(H)[None] < 3
    whole, part = (policy.loss(observations(1), rows, valid=v, generator=torch_generator(0)) for v in (None, valid))
    assert whole == part
    states = a_planner(STATES)
    whole, part = (states.inverse_loss(rows, v) for v in (None, valid))
    assert whole != part
    rows[:, 3:] += 1.0
    assert states.inverse_loss(rows, valid) == part


def test_actions_follow_from_states() -> None:
    policy = a_planner(STATES)
    with torch.no_grad():  # a = (s' - s) of the first two numbers, by hand
        for value in policy.inverse.parameters():
            value.zero_()
        first, last = policy.inverse[0], policy.inverse[-1]
        size = FEATURES.observation_size
        for i in range(FEATURES.action_size):
            for j, sign in enumerate((1.0, -1.0)):  # relu(x) - relu(-x) = x would need the block; linear layers do
                first.weight[2 * i + j, i], first.weight[2 * i + j, size + i] = -sign, sign
                last.weight[i, 2 * i + j] = sign / 2
    plans = policy.chunk_normalizer.normalize(policy.sample(observations()))
    states = plans[..., FEATURES.action_size :]
    moved = (states[:, 1:] - states[:, :-1])[..., : FEATURES.action_size].clamp(-1, 1)
    torch.testing.assert_close(plans[:, :-1, : FEATURES.action_size], moved, rtol=1e-4, atol=1e-5)
    rows = policy.chunk_normalizer.unnormalize(torch.cat([torch.cat([moved, moved[:, -1:]], 1), states], -1))
    within = (states[:, 1:] - states[:, :-1]).abs().amax(-1) <= 1
    valid = torch.cat([torch.ones(len(within), 1, dtype=torch.bool), within], dim=1)
    assert policy.inverse_loss(rows, valid) < 1e-9
    rows[:, :-1, 0] += 1.0
    assert policy.inverse_loss(rows, valid) > 1e-3


def test_warm_starts_go_on_from_plans() -> None:
    for config in (SMALL, STATES):
        policy, obs = a_planner(config), rewarded().observations[:5]
        inference, state = InferenceConfig(warm_start_steps=1), None
        for _ in range(2 * E):
            action, state = policy.predict(obs, state, inference=inference, generator=torch_generator(0))
        assert action.shape == (5, FEATURES.action_size)
        plan, other = policy.sample(observations()), policy.sample(observations())
        warm = [policy.draw(observations(), inference, torch_generator(0), plan=p) for p in (plan, other)]
        assert not torch.equal(*warm), "the plan counts"


def test_what_scores_plans_chooses_among_them() -> None:
    policy, obs = a_planner(), observations()
    Outcome(policy, OutcomeConfig(critic=ChunkValueConfig(8, 1))).fit(rewarded(), 3)
    one, best = (policy.sample(obs, candidates=n, generator=torch_generator(0)) for n in (1, 16))
    assert policy.scorer.score(obs, best).mean() > policy.scorer.score(obs, one).mean()
    for guide in (DiffuserGuide(policy.scorer), ValueGuide(policy.scorer, 1.0, "noisy")):
        assert not torch.equal(policy.sample(obs, generator=torch_generator(0), guide=guide), one)


def test_what_does_not_fit_is_refused() -> None:
    for changes, complaint in (
        ({"n_obs_steps": 2}, "n_obs_steps = 2: must be 1"),
        ({"horizon": 1, "n_action_steps": 1}, "horizon = 1: must be at least 2"),
        ({"denoised": "states", "n_action_steps": H, "horizon": H}, "n_action_steps = 8: must be at most 7"),
        ({"denoised": "states", "n_action_steps": None, "horizon": H}, "must be at most 7"),
        ({"inverse_size": 3}, "inverse_size = 3: is of denoised = states"),
        ({"denoised": "states", "first_action_weight": 3.0}, "first_action_weight = 3.0: is of denoised = rows"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            PlannerConfig(**changes)
    with pytest.raises(ConfigError, match=r"cameras = \['top'\]: must be none"):
        Planner(Features(3, 2, (CAMERA,)), SMALL)
    policy = a_planner()
    with pytest.raises(ConfigError, match="temporal_ensembling"):
        policy.predict(rewarded().observations[:5], inference=InferenceConfig(temporal_ensembling=0.1))
    with pytest.raises(ConfigError, match="must draw actions"):
        IDQL(policy)
    with pytest.raises(ConfigError, match="must draw actions"):
        Energy(policy, Push())
    with pytest.raises(ConfigError, match="cannot be tuned by reward"):
        DenoisingMDP(policy, 2, ExplorationConfig())
    with pytest.raises(ConfigError, match=r"critic\.noised = True: must be False"):
        Outcome(a_planner(STATES))

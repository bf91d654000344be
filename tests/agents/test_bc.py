"""Behaviour cloning keeps what a Gaussian would average away."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from dprl.agents import BC, BCConfig
from dprl.data import Episodes
from dprl.errors import ConfigError, DatasetError
from dprl.networks import LNResNetConfig, MLPConfig, TransformerConfig, UNetConfig, polyak_update
from dprl.policy import DiffusionConfig, DiffusionPolicy, denoising_loss
from dprl.seeding import torch_generator

SMALL = DiffusionConfig(horizon=1, denoiser=MLPConfig(hidden_size=8))
DENOISERS = {
    "mlp": SMALL.denoiser,
    "unet": UNetConfig(down_dims=(8, 16), n_groups=4, time_size=4),
    "transformer": TransformerConfig(n_layers=1, n_heads=2, embedding_size=16),
    "ln_resnet": LNResNetConfig(hidden_size=8, n_blocks=1, n_frequencies=2, time_size=4),
}


def two_modes(n: int = 400) -> Episodes:
    """One-step episodes; the action is -1 or 1 with equal chance."""
    rng = np.random.default_rng(0)
    actions = rng.choice([-1.0, 1.0], (n, 1)).astype(np.float32)
    zeros, no = np.zeros((n, 1), np.float32), np.zeros(n, np.bool_)
    return Episodes(zeros, actions, zeros[:, 0], zeros, np.arange(1, n + 1), no, no, np.arange(n))


def walks(lengths: tuple[int, ...] = (3, 7, 5, 6), env_id: str | None = None) -> Episodes:
    """Episodes of several steps: observations count the steps, actions are random."""
    rng = np.random.default_rng(1)
    total, n = sum(lengths), len(lengths)
    observations = np.concatenate([np.arange(length) for length in lengths])[:, None].repeat(2, 1).astype(np.float32)
    actions = rng.uniform(-1, 1, (total, 1)).astype(np.float32)
    no = np.zeros(n, np.bool_)
    ends = np.cumsum(lengths)
    return Episodes(
        observations, actions, np.zeros(total, np.float32), observations[:n], ends, no, no, np.arange(n), env_id
    )


def fit(seed: int, steps: int = 1000, **changes: object) -> DiffusionPolicy:
    config = replace(SMALL, denoiser=MLPConfig(hidden_size=64), **changes)
    policy = DiffusionPolicy.for_dataset(two_modes(), config, seed=seed)
    return BC(policy, BCConfig(batch_size=128), seed=seed).fit(two_modes(), steps)


def make_agent(config: BCConfig, policy_config: DiffusionConfig = SMALL, total_steps: int = 10, seed: int = 0) -> BC:
    data = two_modes() if policy_config.horizon == 1 else walks()
    agent = BC(DiffusionPolicy.for_dataset(data, policy_config, seed=seed), config, seed=seed)
    agent.set_data(data, total_steps)
    return agent


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"prediction_type": "sample"}, marks=pytest.mark.full),
        pytest.param({"prediction_type": "v_prediction"}, marks=pytest.mark.full),
        {"schedule": "rectified_flow", "prediction_type": "velocity"},
    ],
    ids=lambda changes: changes.get("prediction_type", "epsilon"),
)
def test_both_modes_are_kept(changes: dict[str, object]) -> None:
    actions = fit(seed=0, **changes).sample(torch.zeros(500, 1, 1), generator=torch_generator(0))
    positive = float((actions > 0).float().mean())
    assert 0.4 < positive < 0.6
    assert float((actions.abs() > 0.5).float().mean()) > 0.9, "a Gaussian would put 38 % between the modes"


@pytest.mark.parametrize("denoiser", DENOISERS)
def test_same_seed_same_policy(denoiser: str) -> None:
    """Whatever torch's own generator is at."""

    def trained(seed: int) -> list[torch.Tensor]:
        agent = make_agent(
            BCConfig(batch_size=16), replace(SMALL, horizon=4, denoiser=DENOISERS[denoiser]), 20, seed=seed
        )
        agent.update(agent.collect())
        return list(agent.policy.base.parameters())

    torch.manual_seed(5)
    first = trained(0)
    torch.manual_seed(6)
    state = torch.get_rng_state()
    second, other = trained(0), trained(1)
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator was used"
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    if denoiser == "mlp":
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("denoiser", DENOISERS)
def test_resumed_equals_uninterrupted(denoiser: str, tmp_path: Path) -> None:
    """Bit for bit, and with everything that has a schedule of its own."""
    config = BCConfig(
        batch_size=8, steps_per_iteration=5, warmup_steps=7, ema_power=0.75, max_grad_norm=1.0, weight_decay=0.1,
        validation_share=0.25, validation_every=1,
    )  # fmt: skip
    policy_config = replace(SMALL, horizon=4, denoiser=DENOISERS[denoiser])
    whole, first = make_agent(config, policy_config, 15), make_agent(config, policy_config, 15)
    expected = [without_time(whole.update(whole.collect())) for _ in range(3)]
    assert without_time(first.update(first.collect())) == expected[0]
    first.save(tmp_path / "saved")
    resumed = make_agent(config, policy_config, 15)
    resumed.load_state(tmp_path / "saved")
    assert [without_time(resumed.update(resumed.collect())) for _ in range(2)] == expected[1:]
    for ours, theirs in ((resumed.policy, whole.policy), (resumed._online, whole._online)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def without_time(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("time/")}


def test_saved_weights_are_the_averaged_ones() -> None:
    agent = make_agent(BCConfig(steps_per_iteration=1, batch_size=8, ema_decay=0.9))
    policy, trained = agent.policy, agent._online
    before = [p.clone() for p in policy.parameters()]
    agent.update(agent.collect())
    for average, old, online in zip(policy.parameters(), before, trained.parameters(), strict=True):
        torch.testing.assert_close(average, 0.9 * old + 0.1 * online)


def test_averaging_warms_up() -> None:
    """At step n the decay is 1 - n^-power, but at most ema_decay: the first step copies."""
    agent = make_agent(BCConfig(steps_per_iteration=1, batch_size=8, ema_decay=0.5, ema_power=0.75))
    for step in range(1, 6):
        before = [p.clone() for p in agent.policy.parameters()]
        agent.update(agent.collect())
        decay = min(0.5, 1 - step**-0.75)
        for average, old, online in zip(agent.policy.parameters(), before, agent._online.parameters(), strict=True):
            torch.testing.assert_close(average, decay * old + (1 - decay) * online)
    assert 1 - 2**-0.75 < 0.5 < 1 - 3**-0.75, "both branches were taken"


def test_polyak_moves_towards_the_online_network() -> None:
    online, target = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    start = float((online.weight - target.weight).detach().abs().sum())
    polyak_update(online, target, 0.005)
    assert float((online.weight - target.weight).detach().abs().sum()) == pytest.approx(0.995 * start, rel=1e-4)


def test_learning_rate_decays_to_its_end() -> None:
    agent = make_agent(BCConfig(steps_per_iteration=10, learning_rate=1e-2, final_learning_rate=1e-3), total_steps=20)
    rates = [agent.update(agent.collect())["bc/learning_rate"] for _ in range(2)]
    assert 1e-3 < rates[1] < rates[0] < 1e-2
    assert agent.timesteps == 20


def test_learning_rate_warms_up_and_then_decays() -> None:
    config = BCConfig(steps_per_iteration=1, batch_size=4, warmup_steps=4, learning_rate=1e-2, final_learning_rate=1e-3)
    agent = make_agent(config, total_steps=12)
    rates = [agent.update(agent.collect())["bc/learning_rate"] for _ in range(12)]
    assert rates[:5] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2])
    assert rates[8] == pytest.approx(5.5e-3), "half-way down the cosine"
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert rates[-1] > 1e-3
    assert {group["lr"] for group in agent._optimizer.param_groups} == {rates[-1]}


def test_gradients_are_scaled_down_to_the_norm() -> None:
    agent = make_agent(BCConfig(steps_per_iteration=1, batch_size=8, max_grad_norm=1e-3))
    agent.update(agent.collect())
    norms = [float(p.grad.norm()) for p in agent._online.parameters()]
    assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("denoiser", DENOISERS)
def test_weight_decay_is_on_weight_matrices_only(denoiser: str) -> None:
    agent = make_agent(BCConfig(weight_decay=0.1), replace(SMALL, horizon=4, denoiser=DENOISERS[denoiser]))
    names = {id(parameter): name for name, parameter in agent._online.named_parameters()}
    groups = [
        (group["weight_decay"], [names[id(p)] for p in group["params"]]) for group in agent._optimizer.param_groups
    ]
    (first, decaying), (second, others) = groups
    assert (first, second) == (0.1, 0.0)
    assert sorted(decaying + others) == sorted(names.values())
    assert all(name.endswith("weight") for name in decaying)
    assert all(agent._online.get_parameter(name).ndim == 1 or "pos_emb" in name for name in others)


# ------------------------------------------------------------------------------------------------ ends of episodes


def test_every_observation_is_learned_from_by_default() -> None:
    """Chunks reach over the end; what lies beyond is masked. Without padding the last observations are left out."""
    data, config = walks(), replace(SMALL, horizon=4)
    seen = {}
    for pad_after in (None, 0, 1):
        agent = BC(DiffusionPolicy.for_dataset(data, config), BCConfig(pad_after=pad_after))
        agent.set_data(data, 10)
        every = torch.arange(len(agent._training))
        seen[pad_after] = next(agent._training.read(every[None]))
    assert [len(batch.actions) for batch in seen.values()] == [21, 0 + 4 + 2 + 3, 1 + 5 + 3 + 4]
    assert seen[0].valid is None, "nothing is padded"
    lengths = torch.tensor([3, 7, 5, 6])
    left = torch.cat([torch.arange(length, 0, -1) for length in lengths])  # actions left from each observation on
    assert torch.equal(seen[None].valid.sum(1), left.clamp(max=4))
    assert torch.equal(seen[None].obs[:, 0, 0], torch.cat([torch.arange(length) for length in lengths]).float())
    ends = torch.from_numpy(data.ends)
    rows = torch.arange(21)
    end = ends[torch.searchsorted(ends, rows, right=True)]
    expected = torch.from_numpy(data.actions)[torch.minimum(rows[:, None] + torch.arange(4), end[:, None] - 1)]
    assert torch.equal(seen[None].actions, expected), "past the end the last action is repeated"


def test_loss_of_a_minibatch_is_masked() -> None:
    data, config = walks(), replace(SMALL, horizon=4)
    policy = DiffusionPolicy.for_dataset(data, config)
    agent = BC(policy, BCConfig(steps_per_iteration=1, batch_size=32))
    agent.set_data(data, 10)
    picks = agent.collect()
    batch = next(agent._training.read(picks))
    assert not batch.valid.all()
    generator = agent._generator.clone_state()
    timesteps = torch.randint(config.num_train_timesteps, (32,), generator=generator)
    noise = torch.randn(batch.actions.shape, generator=generator)
    clean, condition = policy.action_normalizer.normalize(batch.actions), policy.condition(batch.obs)
    prediction = policy.base(policy.schedule.add_noise(clean, noise, timesteps), timesteps, condition)
    expected = ((prediction - noise) ** 2)[batch.valid].mean()
    assert agent.update(picks)["bc/loss"] == pytest.approx(expected.item(), rel=1e-5)
    whole = denoising_loss(policy.base, policy.schedule, clean, condition, timesteps, noise)
    assert (whole - expected).abs() > 1e-3


def test_data_shorter_than_the_horizon_is_refused() -> None:
    policy = DiffusionPolicy.for_dataset(two_modes(), replace(SMALL, horizon=2))
    with pytest.raises(DatasetError, match="horizon of 2: the longest has 1 steps"):
        BC(policy, BCConfig(pad_after=0)).fit(two_modes(), 10)


def test_no_steps_are_refused() -> None:
    policy = DiffusionPolicy.for_dataset(two_modes(), DiffusionConfig(horizon=1, denoiser=MLPConfig(hidden_size=8)))
    with pytest.raises(ConfigError, match="steps = 0: must be a whole number of at least 1"):
        BC(policy).fit(two_modes(), 0)


def test_data_shorter_than_the_horizon_can_be_padded() -> None:
    policy = DiffusionPolicy.for_dataset(two_modes(), replace(SMALL, horizon=2))
    BC(policy, BCConfig(batch_size=8)).fit(two_modes(), 2)


# ------------------------------------------------------------------------------------------------------ validation


def test_validation_is_on_held_out_episodes_with_the_same_draws() -> None:
    config = BCConfig(
        steps_per_iteration=2, batch_size=8, validation_share=0.25, validation_every=2, learning_rate=1e-12,
        final_learning_rate=1e-12, weight_decay=0.0,
    )  # fmt: skip
    agent = make_agent(config, replace(SMALL, horizon=4), total_steps=10)
    metrics = [agent.update(agent.collect()) for _ in range(5)]
    looked = ["validation/loss" in row for row in metrics]
    assert looked == [False, True, False, True, True], "every second iteration and the last"
    assert metrics[1]["validation/loss"] == pytest.approx(metrics[3]["validation/loss"], rel=1e-4)
    assert metrics[1]["validation/action_mse"] == pytest.approx(metrics[3]["validation/action_mse"], rel=1e-4)
    train, held_out = walks().split(0.25, 0)
    assert len(agent._training) == len(train.actions)
    assert len(agent._validation) == len(held_out.actions)


def test_validation_changes_nothing_of_the_training() -> None:
    """The draws of validation are its own."""
    base = BCConfig(steps_per_iteration=2, batch_size=8, validation_share=0.25, validation_every=1)
    often, seldom = (
        make_agent(config, replace(SMALL, horizon=4), total_steps=20)
        for config in (base, replace(base, validation_every=100))
    )
    for _ in range(3):
        losses = [agent.update(agent.collect())["bc/loss"] for agent in (often, seldom)]
        assert losses[0] == losses[1]


def test_overfitting_shows_in_the_validation() -> None:
    """Actions that nothing predicts: the loss on the training episodes falls, that on the others does not."""
    config = BCConfig(steps_per_iteration=300, batch_size=64, validation_share=0.5, validation_every=1, ema_decay=0.9)
    agent = make_agent(config, replace(SMALL, horizon=4, denoiser=MLPConfig(hidden_size=128)), total_steps=600)
    first = agent.update(agent.collect())
    last = agent.update(agent.collect())
    assert last["bc/loss"] < 0.7 * first["bc/loss"]
    assert last["validation/loss"] > 1.5 * last["bc/loss"]  # 1.9 when this was written


# --------------------------------------------------------------------------------------------------------- refusals


def test_the_policy_takes_sizes_ranges_and_environment_from_the_data() -> None:
    data = walks(env_id="Hopper-v5")
    policy = DiffusionPolicy.for_dataset(data, replace(SMALL, n_obs_steps=2), denoiser="unet")
    assert (policy.features.observation_size, policy.features.action_size) == (2, 1)
    assert (policy.features.cameras, policy.features.env_id) == ((), "Hopper-v5")
    assert policy.config == replace(SMALL, n_obs_steps=2, denoiser=UNetConfig())
    normalized = policy.action_normalizer.normalize(torch.from_numpy(data.actions))
    assert (float(normalized.min()), float(normalized.max())) == pytest.approx((-1, 1))
    assert policy.observation_normalizer.high.tolist() == [6, 6]


def test_an_unknown_denoiser_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"denoiser = 'u-net': must be one of .*Did you mean unet"):
        DiffusionPolicy.for_dataset(walks(), denoiser="u-net")


def test_data_of_other_sizes_are_refused() -> None:
    policy = DiffusionPolicy.for_dataset(two_modes(), SMALL)
    with pytest.raises(DatasetError, match=r"\(2, 1\) observation and action numbers, the policy has \(1, 1\)"):
        BC(policy).fit(walks(), 1)


def test_a_tuned_policy_is_refused() -> None:
    policy = DiffusionPolicy.for_dataset(two_modes(), SMALL)
    policy.tune_below(3)
    with pytest.raises(ConfigError, match=r"tuned_below = 3: must be 0"):
        BC(policy)

"""DPPO's options: each does what it says, resumes exactly, and is refused by name where it cannot be."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dprl.agents import DPPO, DPPOConfig
from dprl.agents.objective import (
    chunk_log_prob,
    clip_bounds,
    clip_ranges,
    normalized_advantage,
    over_chunk,
    policy_loss,
    value_loss,
)
from dprl.agents.targets import Pairs
from dprl.diffusion import SolverConfig, normal_kl
from dprl.errors import ConfigError
from dprl.mdp import ExplorationConfig
from dprl.networks import MLPConfig
from dprl.networks.noise import LearnedNoiseConfig
from dprl.policy import (
    DiffusionConfig,
    DiffusionPolicy,
    Features,
    GaussianConfig,
    GaussianPolicy,
    GMMConfig,
    GMMPolicy,
    Policy,
)
from dprl.returns import RunningReturnStd
from dprl.schedules import Anneal, Warmup
from dprl.training.figures import UpdateFigures
from tests.toys import make_toy, reach_spec, toy_policy

SMALL = DPPOConfig(tuned_steps=3, n_steps=6, n_epochs=2, batch_size=40, critic_hidden_size=16)
FLOW = DiffusionConfig(
    horizon=2, num_train_timesteps=8, denoiser=MLPConfig(hidden_size=16), schedule="rectified_flow",
    prediction_type="velocity", sampling=SolverConfig("euler", 4),
)  # fmt: skip
LEARNED_STD = ExplorationConfig(learned=LearnedNoiseConfig("std", hidden_size=8))
LEARNED_ETA = ExplorationConfig(0.02, 0.06, learned=LearnedNoiseConfig("eta", 0.1, 1.0, hidden_size=8))
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "sum": {"log_prob_reduction": "sum"},
    "micro-batches": {"micro_batch_size": 7},
    "gradient-norm": {"max_grad_norm": 0.1},
    "rates": {"lr_schedule": Warmup(2, 5, 0.1)},
    "gamma-per-step": {"gamma_per": "step"},
    "time-limits": {"bootstrap_truncated": True},
    "quantiles": {"advantage_quantiles": (0.1, 0.9)},
    "value-clip": {"clip_range_vf": 0.1},
    "no-target-kl": {"target_kl": None},
    "bfloat16": {"precision": "bfloat16"},
    "bc": {"regularizer": "bc"},
    "kl": {"regularizer": "kl"},
    "w2": {"regularizer": "w2"},
    "fewer-steps": {"anneal_tuned_steps": Anneal(1, 2)},
    "state-action-critic": {"critic": "state_action"},
    "warm-up": {"critic_warmup": 1},
    "floor-anneals": {"exploration": ExplorationConfig(0.3, anneal=Anneal(0.1, 3))},
    "learned-std": {"exploration": LEARNED_STD, "entropy_coef": 0.01},
    "learned-eta": {"exploration": LEARNED_ETA, "solver": SolverConfig("ddim", 4, 1.0)},
    "flow": {},
    "flow-std": {"exploration": LEARNED_STD},
    "exact": {"tuned_steps": 1, "likelihood": "exact", "solver": SolverConfig("ddim", 3)},
    "gaussian": {"tuned_steps": 1, "regularizer": "kl"},
    "gmm": {"tuned_steps": 1, "regularizer": "bc"},
}


def policy_for(name: str) -> Policy:
    features = Features(2, 1)
    if name.startswith("flow"):
        return DiffusionPolicy(features, FLOW)
    if name == "gaussian":
        return GaussianPolicy(features, GaussianConfig(horizon=2, hidden_size=16, n_blocks=1))
    if name == "gmm":
        return GMMPolicy(features, GMMConfig(horizon=2, hidden_size=16, n_blocks=1, n_modes=3))
    return toy_policy()


def agent(name: str = "default", **changes: Any) -> DPPO:
    return DPPO(policy_for(name), make_toy(reach_spec(), 4), replace(SMALL, **OPTIONS[name] | changes))


def weights(dppo: DPPO) -> list[torch.Tensor]:
    modules = [dppo.policy, dppo.mdp.trainable(), dppo.critic, *([dppo.baseline] if dppo.baseline else [])]
    return [p.detach().clone() for module in modules for p in module.parameters()]


@pytest.mark.filterwarnings("ignore:this processor has no instructions for bfloat16")
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_trains_and_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    whole = agent(name)
    for _ in range(2):
        metrics = whole.update(whole.collect())
    assert all(math.isfinite(value) for key, value in metrics.items() if key.startswith("dppo/"))
    begun = weights(agent(name))
    assert not all(torch.equal(a, b) for a, b in zip(weights(whole), begun, strict=True))
    whole.save(tmp_path / "saved")
    whole.update(whole.collect())

    resumed = agent(name)
    resumed.load_state(tmp_path / "saved")
    resumed.update(resumed.collect())
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(whole), strict=True))
    assert resumed.timesteps == whole.timesteps


@pytest.mark.filterwarnings("ignore:this processor has no instructions for bfloat16")
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "bfloat16"])
def test_the_first_minibatch_has_ratio_one(name: str) -> None:
    dppo = agent(name)
    targets, _ = dppo._prepare(dppo.collect())
    figures = UpdateFigures(dppo.config.tuned_steps, torch.device("cpu"))
    dppo._update_actor(targets, next(dppo._minibatches(len(targets.returns)))[1], figures)
    metrics = figures.metrics("dppo")
    assert abs(metrics["dppo/ratio_mean"] - 1) < 1e-4
    assert metrics["dppo/clip_fraction"] == 0


WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Reads(TorchDispatchMode):
    """Counts what would wait for a GPU: numbers that Python reads out of tensors, and masks that pick rows."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += func in WAITING or masked
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:this processor has no instructions for bfloat16")
@pytest.mark.parametrize("name", OPTIONS)
def test_a_gradient_step_reads_no_number_out_of_a_tensor(name: str) -> None:
    dppo = agent(name)
    targets, _ = dppo._prepare(dppo.collect())
    decisions, pairs = next(dppo._minibatches(len(targets.returns)))
    figures = UpdateFigures(dppo.config.tuned_steps, torch.device("cpu"))
    with Reads() as reads:
        dppo._update_critic(targets, decisions, pairs, figures)
        dppo._update_actor(targets, pairs, figures)
        assert reads.count == 0
        float(pairs.k[0])
        assert reads.count == 1, "it is counted"


def test_micro_batches_give_the_gradient_of_the_whole() -> None:
    after, losses = [], []
    for micro in (None, 7):
        dppo = agent(micro_batch_size=micro, n_epochs=1, batch_size=72)
        metrics = dppo.update(dppo.collect())
        losses.append([metrics[f"dppo/{name}"] for name in ("value_loss", "approx_kl", "ratio_mean")])
        after.append(weights(dppo))
    for a, b in zip(*after, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert losses[0] == pytest.approx(losses[1], abs=1e-2, rel=0.2)  # the parts are of nearly equal size


def test_sum_is_the_mean_times_the_numbers_and_so_is_its_clip() -> None:
    log_prob = torch.randn(5, 4, 3)
    executed = torch.tensor([1, 2, 3, 4, 4])
    mean, total = (chunk_log_prob(log_prob, executed, how) for how in ("mean", "sum"))
    torch.testing.assert_close(total, mean * executed * 3)
    dppo = agent("sum")
    targets, _ = dppo._prepare(dppo.collect())
    targets = targets._replace(executed=torch.arange(24) % 2 + 1)  # of two actions of one number
    pairs, clip = Pairs(torch.arange(24), torch.arange(24) % 3), clip_ranges(dppo.config)[torch.arange(24) % 3]
    expected = torch.stack([(1 - clip) ** targets.executed, (1 + clip) ** targets.executed])
    torch.testing.assert_close(dppo._bounds(targets, pairs), expected)
    torch.testing.assert_close(agent()._bounds(targets, pairs), torch.stack([1 - clip, 1 + clip]))


def test_a_summed_ratio_is_clipped_on_both_sides_however_many_numbers_a_chunk_has() -> None:
    bounds = clip_bounds(torch.tensor([0.1]), 112)
    for advantage, log_ratio in ((-1.0, -20.0), (1.0, 20.0), (1.0, 1_000.0)):
        ratio = torch.tensor([log_ratio], requires_grad=True)
        loss = policy_loss(ratio, torch.tensor([advantage]), bounds)
        loss.backward()
        assert torch.isfinite(loss)
        assert ratio.grad.item() == 0, "too far already"
    assert torch.isfinite(policy_loss(torch.tensor([1_000.0]), torch.tensor([0.0]), bounds))


def test_a_ratio_beyond_all_bounds_is_finite_in_what_is_logged() -> None:
    dppo = agent("sum")
    targets, _ = dppo._prepare(dppo.collect())
    figures = UpdateFigures(3, torch.device("cpu"))
    far = targets._replace(old_log_prob=targets.old_log_prob - 200)
    dppo._update_actor(far, Pairs(torch.arange(24), torch.zeros(24, dtype=torch.long)), figures)
    metrics = figures.metrics("dppo")
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["dppo/clip_fraction"] == 1


def test_a_density_is_clamped_where_it_is_of_one_gaussian_number_by_number() -> None:
    sharp = torch.full((1, 2, 1), 5.0)
    for name, counted in (("default", 2.0), ("gaussian", 2.0), ("exact", 5.0), ("gmm", 5.0)):
        assert float(agent(name)._chunk_log_prob(sharp, torch.tensor([2]))) == counted


def test_figures_of_denoising_steps_are_of_those_that_were_trained() -> None:
    dppo = agent("fewer-steps")
    seen = []
    for _ in range(3):
        metrics = dppo.update(dppo.collect())
        seen.append([k for k in range(3) if f"dppo/clip_fraction_step_{k}" in metrics])
    assert seen == [[0, 1, 2], [0, 1], [0]]


def test_actions_that_were_not_executed_do_not_count() -> None:
    values = torch.tensor([[[1.0], [5.0]], [[1.0], [5.0]]])
    assert over_chunk(values, torch.tensor([1, 2])).tolist() == [1.0, 3.0]
    dppo = agent()
    targets, _ = dppo._prepare(dppo.collect())
    pairs = Pairs(torch.arange(24), torch.zeros(24, dtype=torch.long))
    cut = targets._replace(executed=torch.ones(24, dtype=torch.long))
    chains = targets.chains.clone()
    chains[:, -1, 1] += 0.5  # the second action of every chunk
    other = cut._replace(chains=chains)
    assert torch.equal(dppo._log_prob(cut, pairs), dppo._log_prob(other, pairs))
    assert not torch.equal(dppo._log_prob(targets, pairs), dppo._log_prob(targets._replace(chains=chains), pairs))


def test_advantages_are_clipped_to_their_quantiles() -> None:
    advantage = torch.arange(11.0)
    clipped = normalized_advantage(advantage, (0.2, 0.9))
    plain = normalized_advantage(advantage)
    assert (float(plain.mean()), float(plain.std())) == pytest.approx((0, 1), abs=1e-6)
    assert torch.equal(clipped, plain.clamp(plain[2], plain[9]))


def test_value_clipping_by_hand() -> None:
    """V moved from 0 to 1 with clip 0.2: towards the return 2 the clipped error is larger, away from -1 it is not."""
    value, old = torch.ones(2, requires_grad=True), torch.zeros(2)
    loss = value_loss(value, torch.tensor([2.0, -1.0]), old, 0.2)
    assert loss.item() == pytest.approx(0.5 * (1.8**2 + 2**2) / 2)
    (gradient,) = torch.autograd.grad(loss, value)
    assert gradient[0] == 0, "flat where it has moved far enough"
    assert gradient[1] > 0


def test_the_gradients_norm_is_clipped_and_logged() -> None:
    dppo = agent(max_grad_norm=1e-3, n_epochs=1, batch_size=72)
    before = [p.grad for p in dppo.policy.tuned.parameters()]
    metrics = dppo.update(dppo.collect())
    norm = torch.stack([p.grad.norm() for p in dppo.policy.tuned.parameters()]).norm()
    assert before.count(None) == len(before)
    assert float(norm) == pytest.approx(1e-3, rel=1e-2)
    assert metrics["dppo/actor_grad_norm"] > 1e-3


def test_rates_follow_their_schedule_and_the_actors_waits_for_the_critic() -> None:
    dppo = agent(lr_schedule=Warmup(1, 3, 0.1), critic_warmup=2, n_epochs=1)
    seen = []
    for _ in range(5):
        dppo.update(dppo.collect())
        seen.append([
            learner._optimizer.param_groups[0]["lr"] for learner in (dppo._actor_learner, dppo._value_learner)
        ])  # fmt: skip
    actor, critic = zip(*seen, strict=True)
    assert critic == pytest.approx([1e-3 * f for f in (0.5, 1, 0.55, 0.1, 0.1)])
    assert actor == pytest.approx([3e-4 * f for f in (0.5, 0.5, 0.5, 1, 0.55)])


def test_losses_are_of_what_the_config_asks_for() -> None:
    """The update's own losses, by hand: quantiles of advantages, discounts and clips by step, values that may move."""
    dppo = agent(advantage_quantiles=(0.2, 0.8), denoising_discount=0.5, clip_range=0.3, clip_range_vf=0.1)
    targets, _ = dppo._prepare(dppo.collect())
    targets = targets._replace(
        advantage=torch.randn(24, 3),
        old_log_prob=targets.old_log_prob - torch.randn(24, 3).mul(0.2),
        value=targets.value - 0.3,
        returns=targets.value + torch.randn(24),
    )
    rows, k = torch.arange(24), torch.arange(24) % 3
    figures = UpdateFigures(3, torch.device("cpu"))
    with torch.no_grad():
        ratio = (dppo._log_prob(targets, Pairs(rows, k)) - targets.old_log_prob[rows, k]).exp()
        value = dppo.critic(targets.observation)
    dppo._update_critic(targets, rows, Pairs(rows, k), figures)
    dppo._update_actor(targets, Pairs(rows, k), figures)

    advantage = targets.advantage[rows, k]
    advantage = (advantage - advantage.mean()) / advantage.std()
    low, high = advantage.quantile(0.2), advantage.quantile(0.8)
    steps = (math.e**3 - 1), 0.3 - 0.005
    clip = [0.005 + steps[1] * (math.exp(3 * p) - 1) / steps[0] for p in (1.0, 0.5, 0.0)]
    gained = []
    for a, r, step in zip(advantage.clamp(low, high) * 0.5**k, ratio, k, strict=True):
        gained.append(min(a * r, a * min(max(float(r), 1 - clip[step]), 1 + clip[step])))
    errors = [
        max((v - r) ** 2, (old + min(max(float(v - old), -0.1), 0.1) - r) ** 2)
        for v, r, old in zip(value, targets.returns, targets.value, strict=True)
    ]
    metrics = figures.metrics("dppo")
    assert metrics["dppo/policy_loss"] == pytest.approx(-float(sum(gained)) / 24, rel=1e-4, abs=1e-6)
    assert metrics["dppo/value_loss"] == pytest.approx(float(sum(errors)) / 48, rel=1e-4)


def test_values_are_learned_of_the_scaled_rewards() -> None:
    dppo, rewards = agent(gae_lambda=0.0), np.random.default_rng(0).standard_normal((6, 4), np.float32)
    rollout = replace(dppo.collect(), step_rewards=rewards[..., None])
    with torch.no_grad():
        following = dppo.critic(dppo._rows(rollout.final_observations)).view(6, 4)
    targets, _ = dppo._prepare(rollout)
    scaled = RunningReturnStd(4, 0.99)(torch.as_tensor(rewards), torch.as_tensor(rollout.ended), torch.arange(4))
    assert not torch.allclose(scaled, torch.as_tensor(rewards), rtol=0.05)
    expected = scaled + 0.99 * following * ~torch.as_tensor(rollout.ended)
    torch.testing.assert_close(targets.returns.view(6, 4), expected)


@pytest.mark.filterwarnings("ignore:this processor has no instructions for bfloat16")
def test_in_bfloat16_too_the_first_ratios_are_within_the_clips() -> None:
    """Chains are drawn in float32: what rounding does to the ratio must stay far below what a clip allows."""
    denoiser = MLPConfig(hidden_size=512)
    policy = DiffusionPolicy(Features(2, 1), DiffusionConfig(horizon=4, num_train_timesteps=20, denoiser=denoiser))
    dppo = DPPO(policy, make_toy(reach_spec(), 4), replace(SMALL, tuned_steps=10, precision="bfloat16"))
    targets, _ = dppo._prepare(dppo.collect())
    pairs = Pairs(torch.arange(240) // 10, torch.arange(240) % 10)
    with torch.no_grad():
        ratio = (dppo._log_prob(targets, pairs) - targets.old_log_prob[pairs]).exp()
    assert (ratio - 1).abs().max() < 0.005
    assert abs(float(ratio.mean()) - 1) < 5e-4


def test_gamma_per_step_discounts_what_was_executed() -> None:
    """A chunk of two steps, one that ended after the first: V = r + γ^n V'."""
    dppo = agent(gamma_per="step", gamma=0.5, gae_lambda=0.0, normalize_returns=False)
    rollout = dppo.collect()
    targets, _ = dppo._prepare(rollout)
    with torch.no_grad():
        following = dppo.critic(dppo._rows(rollout.final_observations))
    n = torch.as_tensor(rollout.n_steps).flatten()
    alive = ~torch.as_tensor(rollout.terminated).flatten()
    expected = torch.as_tensor(rollout.rewards).flatten() + 0.5**n * following * alive
    torch.testing.assert_close(targets.returns, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("reward", "asked", "bootstraps"),
    [("sparse", None, False), ("dense", None, True), ("sparse", True, True), ("dense", False, False)],
)
def test_a_time_limit_is_the_end_where_success_is_all_that_counts(
    reward: str, asked: bool | None, bootstraps: bool
) -> None:
    config = replace(SMALL, n_steps=60, gae_lambda=0.0, normalize_returns=False, bootstrap_truncated=asked)
    dppo = DPPO(toy_policy(), make_toy(replace(reach_spec(), reward=reward), 4), config)
    rollout = dppo.collect()
    cut = torch.as_tensor(rollout.truncated).flatten()
    assert cut.any()
    targets, _ = dppo._prepare(rollout)
    with torch.no_grad():
        following = 0.99 * dppo.critic(dppo._rows(rollout.final_observations))
    beyond = targets.returns - torch.as_tensor(rollout.rewards).flatten()
    torch.testing.assert_close(beyond[cut], following[cut] if bootstraps else torch.zeros(int(cut.sum())))
    alive = ~torch.as_tensor(rollout.ended).flatten()
    torch.testing.assert_close(beyond[alive], following[alive])


def test_fewer_steps_are_trained_as_it_goes_on() -> None:
    dppo = agent("fewer-steps")
    targets, _ = dppo._prepare(dppo.collect())
    for iteration, trained in ((0, 3), (1, 2), (2, 1), (9, 1)):
        dppo.iteration = iteration
        k = torch.cat([pairs.k for _, pairs in dppo._minibatches(len(targets.returns))])
        assert sorted(set(k.tolist())) == list(range(trained))


def test_only_with_a_baseline_of_the_action_do_steps_differ_in_advantage() -> None:
    for name, differs in (("default", False), ("state-action-critic", True)):
        dppo = agent(name)
        targets, _ = dppo._prepare(dppo.collect())
        assert (targets.advantage.std(1).max() > 1e-6) == differs
    pairs = Pairs(torch.arange(24), torch.full((24,), 2))
    with torch.no_grad():
        expected = targets.returns - dppo._baseline(targets, pairs)
    torch.testing.assert_close(targets.advantage[:, 2], expected)


def test_a_baseline_sees_what_a_step_starts_from_and_not_what_it_makes() -> None:
    dppo = agent("state-action-critic")
    targets, _ = dppo._prepare(dppo.collect())
    for k, position in ((2, 0), (1, 1), (0, 2)):
        pairs = Pairs(torch.arange(24), torch.full((24,), k))
        usual = dppo._baseline(targets, pairs)
        for other in range(4):
            chains = targets.chains.clone()
            chains[:, other] += 0.5
            same = torch.equal(dppo._baseline(targets._replace(chains=chains), pairs), usual)
            assert same == (other != position)


def test_the_divergence_is_zero_before_the_first_step_and_holds_the_policy_back() -> None:
    dppo = agent("kl")
    targets, _ = dppo._prepare(dppo.collect())
    _, pairs = next(dppo._minibatches(len(targets.returns)))
    figures = UpdateFigures(3, torch.device("cpu"))
    dppo._restraint(targets, pairs, figures)
    assert float(figures._means["kl"][0]) == pytest.approx(0, abs=1e-9)

    def distance(coefficient: float, regularizer: str) -> float:
        tuned = agent(regularizer=regularizer, regularizer_coef=coefficient, n_epochs=50, learning_rate=3e-3)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in tuned.policy.tuned.parameters():  # it has strayed
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        rollout = tuned.collect()
        tuned.update(rollout)
        targets, _ = tuned._prepare(rollout)
        pairs = Pairs(torch.arange(24), torch.zeros(24, dtype=torch.long))
        condition, x = tuned.mdp.condition(targets.observation), targets.x(pairs)
        with torch.no_grad():
            gaussians = [tuned.mdp.gaussian(condition, x, pairs.k, pretrained=p) for p in (False, True)]
        return float(normal_kl(*gaussians[0], *gaussians[1]).mean())

    free = distance(1e-12, "kl")
    distances = {regularizer: distance(100.0, regularizer) for regularizer in ("kl", "w2", "bc")}
    assert all(d < 0.5 * free for d in distances.values()), (free, distances)


@pytest.mark.parametrize("name", ["learned-std", "learned-eta", "flow-std"])
def test_noise_is_really_learned(name: str) -> None:
    dppo = agent(name)
    before = [p.detach().clone() for p in dppo.mdp.noise.parameters()]
    dppo.update(dppo.collect())
    assert before
    assert any(not torch.equal(a, b) for a, b in zip(dppo.mdp.noise.parameters(), before, strict=True))


def test_a_bonus_for_entropy_raises_the_noise() -> None:
    spread = []
    for bonus in (0.0, 1.0):
        dppo = agent("learned-std", entropy_coef=bonus, n_epochs=20, learning_rate=3e-3)
        dppo.update(dppo.collect())
        with torch.no_grad():
            spread.append(float(dppo.mdp.noise.net(torch.zeros(1, 1, 2), torch.tensor([0])).mean()))
    assert spread[1] > spread[0] + 0.005


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("default", {"log_prob_reduction": "max"}, "log_prob_reduction = 'max': must be one of mean, sum"),
        ("default", {"advantage_quantiles": (0.9, 0.1)}, r"advantage_quantiles = .*: must be two numbers"),
        ("default", {"advantage_quantiles": (0.1,)}, r"advantage_quantiles = .*: must be two numbers"),
        ("default", {"precision": "tf32"}, "precision = 'tf32': is of NVIDIA's GPUs; the policy is on cpu"),
        ("default", {"precision": "float16"}, "precision = 'float16': must be one of float32, tf32, bfloat16"),
        ("default", {"micro_batch_size": 0}, "micro_batch_size = 0: must be at least 1"),
        ("default", {"max_grad_norm": 0.0}, r"max_grad_norm = 0.0: must be above 0, or None"),
        ("default", {"clip_range_vf": -1.0}, r"clip_range_vf = -1.0: must be above 0, or None"),
        ("default", {"target_kl": 0.0}, r"target_kl = 0.0: must be above 0, or None"),
        ("default", {"entropy_coef": 0.1}, "entropy_coef = 0.1: must be 0 without exploration.learned"),
        ("default", {"clip_range": 1.0}, "clip_range = 1.0: must be below 1"),
        ("default", {"vf_coef": 0.0}, "vf_coef = 0.0: must be above 0"),
        ("kl", {"regularizer_coef": 0.0}, "regularizer_coef = 0.0: must be above 0 with a regularizer"),
        ("default", {"regularizer_coef": 0.5}, "regularizer_coef = 0.5: must be above 0 with a regularizer, and left"),
        ("exact", {"critic": "state_action"}, "critic = 'state_action': must be state: with the exact likelihood"),
        (
            "exact",
            {"exploration": ExplorationConfig(0.2)},
            r"exploration.min_sampling_std = 0.2: must be left as it is",
        ),
        ("exact", {"log_prob_reduction": "sum"}, "log_prob_reduction = 'sum': must be mean: this policy's chunks"),
        ("gmm", {"log_prob_reduction": "sum"}, "log_prob_reduction = 'sum': must be mean: this policy's chunks"),
        ("state-action-critic", {"clip_range_vf": 0.1}, "clip_range_vf = 0.1: must be None: a baseline of noisy"),
        ("fewer-steps", {"compile_after": 1}, "compile_after = 1: must be None: each number of tuned steps"),
        (
            "learned-std",
            {"tuned_steps": 8, "exploration": replace(LEARNED_STD, anneal=Anneal(0.05, 3))},
            "exploration.anneal.iterations = 3: must be 0: a learned std has no floor",
        ),
        ("default", {"regularizer": "l2"}, "regularizer = 'l2': must be one of none, bc, kl, w2"),
        (
            "default",
            {"anneal_tuned_steps": Anneal(4, 2)},
            "anneal_tuned_steps.final = 4: must be a whole number from",
        ),
        ("default", {"anneal_tuned_steps": Anneal(1.5, 2)}, "anneal_tuned_steps.final = 1.5: must be a whole number"),
        ("learned-eta", {"solver": SolverConfig("ddpm")}, "solver = 'ddpm': has no eta to learn"),
        ("gaussian", {"tuned_steps": 2}, "tuned_steps = 2: must be 1: a gaussian policy does not denoise"),
        ("gaussian", {"critic": "state_action"}, "critic = 'state_action': must be state: there is no noisy action"),
        ("gmm", {"regularizer": "kl"}, "regularizer = 'kl': must be bc or none: what this"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        agent(name, **changes)

"""Behaviour cloning's options, for every kind of policy: what each does, and that runs with it resume bit for bit."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dprl.agents import BC, BCConfig
from dprl.agents.bc import VALIDATION_CHUNKS
from dprl.data import Episodes, load_dataset, save_dataset
from dprl.errors import ConfigError, DatasetError
from dprl.networks import TransformerConfig
from dprl.observations import Camera
from dprl.policy import Features, Policy
from dprl.spec import EnvSpec
from tests.policy.small import KINDS, VIT, random_episodes, small_config

STEPS = 4
BASE = BCConfig(batch_size=8, steps_per_iteration=STEPS)
SEEING = Features(3, 2, (Camera("top", 24, 24),))
DROPPING = TransformerConfig(n_layers=1, n_heads=2, embedding_size=8, attention_dropout=0.5)

every_kind = pytest.mark.parametrize("kind", KINDS)


def make(
    kind: str = "mse",
    config: BCConfig = BASE,
    data: Episodes | None = None,
    total_steps: int = 3 * STEPS,
    seed: int = 0,
    **changes: object,
) -> BC:
    data = random_episodes() if data is None else data
    agent = BC(Policy.kinds[kind].for_dataset(data, small_config(kind, **changes), seed=seed), config, seed=seed)
    agent.set_data(data, total_steps)
    return agent


def iterate(agent: BC, n: int = 1) -> list[dict[str, float]]:
    rows = [agent.update(agent.collect()) for _ in range(n)]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def weights(agent: BC) -> list[torch.Tensor]:
    return [*agent.policy.state_dict().values(), *agent._online.state_dict().values()]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


def assert_resumes(make_agent: object, folder: Path) -> None:
    """Three iterations at once are one, a new agent, and two."""
    whole, first = make_agent(), make_agent()
    expected = iterate(whole, 3)
    assert iterate(first) == expected[:1]
    first.save(folder)
    resumed = make_agent()
    torch.manual_seed(99)
    resumed.load_state(folder)
    assert iterate(resumed, 2) == expected[1:]
    assert same(weights(resumed), weights(whole))


# --------------------------------------------------------------------------------------------------------- every kind


@every_kind
def test_every_kind_learns_and_resumes(kind: str, tmp_path: Path) -> None:
    config = replace(BASE, warmup_steps=5, ema_power=0.75, max_grad_norm=1.0, validation_share=0.25, validation_every=1)
    before = weights(make(kind, config))
    agent = make(kind, config)
    rows = iterate(agent, 2)
    assert agent.timesteps == 2 * STEPS
    assert not same(weights(agent), before)
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert {"bc/loss", "validation/loss", "validation/action_mse"} <= rows[0].keys()
    assert_resumes(lambda: make(kind, config), tmp_path / "saved")


@every_kind
def test_equal_seeds_train_equally_and_touch_no_other_generator(kind: str) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second, other = make(kind), make(kind), make(kind, seed=1)
    for agent in (first, second, other):
        iterate(agent)
    assert torch.get_rng_state().equal(state)
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(other))


@every_kind
def test_every_kind_learns_from_images_and_resumes(kind: str, tmp_path: Path) -> None:
    data = random_episodes(SEEING)
    assert_resumes(lambda: make(kind, data=data, vision=VIT), tmp_path / "saved")


def test_dropout_follows_from_the_seed_and_resumes(tmp_path: Path) -> None:
    denoiser = TransformerConfig(n_layers=1, n_heads=2, embedding_size=8, attention_dropout=0.5, embedding_dropout=0.5)
    first, second = make("diffusion", denoiser=denoiser), make("diffusion", denoiser=denoiser)
    torch.manual_seed(0)
    iterate(first)
    torch.manual_seed(1)
    iterate(second)
    assert same(weights(first), weights(second))
    assert_resumes(lambda: make("diffusion", denoiser=denoiser), tmp_path / "saved")


@pytest.mark.parametrize(
    ("kind", "sees", "off", "on"),
    [
        ("diffusion", Features(3, 2), {"denoiser": replace(DROPPING, attention_dropout=0.0)}, {"denoiser": DROPPING}),
        ("mse", SEEING, {"vision": replace(VIT, augmentation="none")}, {"vision": VIT}),
    ],
    ids=["dropout", "augmentation"],
)
def test_training_drops_out_and_augments_and_the_average_does_not(
    kind: str, sees: Features, off: dict[str, object], on: dict[str, object]
) -> None:
    config = replace(BASE, steps_per_iteration=1)
    without, acting = (make(kind, config, random_episodes(sees), **changes) for changes in (off, on))
    assert same(weights(without), weights(acting)), "they begin as equals"
    for agent in (without, acting):
        iterate(agent)
    assert not same(weights(without), weights(acting))
    assert not acting.policy.training


# ------------------------------------------------------------------------------------------------------- learning rate


def test_learning_rates_by_hand() -> None:
    """Three steps up; then half a cosine over the other nine."""
    config = replace(BASE, steps_per_iteration=1, warmup_steps=3, learning_rate=0.01, final_learning_rate=0.002)
    agent = make(config=config, total_steps=12)
    rates = [row["bc/learning_rate"] for row in iterate(agent, 12)]
    cosine = [0.002 + 0.004 * (1 + math.cos(math.pi * i / 9)) for i in range(9)]
    assert rates == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, *cosine])
    assert cosine[0] == 0.01


def test_the_rate_is_the_optimizers() -> None:
    """AdamW's first step moves every weight by the learning rate, whatever the gradient's size."""
    config = replace(BASE, steps_per_iteration=1, warmup_steps=10, learning_rate=0.1, weight_decay=0.0)
    agent = make(config=config)
    before = [p.clone() for p in agent._online.parameters()]
    iterate(agent)
    moved = torch.cat([(a - b).flatten().abs() for a, b in zip(agent._online.parameters(), before, strict=True)])
    assert moved.max().item() == pytest.approx(0.01, rel=1e-3)


def test_more_steps_make_the_same_warm_up() -> None:
    config = replace(BASE, warmup_steps=4)
    short, long = make(config=config, total_steps=8), make(config=config, total_steps=800)
    for agent in (short, long):
        iterate(agent)
    assert same(weights(short), weights(long))


def test_the_last_iteration_is_as_short_as_it_must_be() -> None:
    agent = make(total_steps=STEPS + 1)
    iterate(agent, 2)
    assert agent.timesteps == STEPS + 1


# ----------------------------------------------------------------------------------------------- averages and gradients


def test_weight_decay_is_decoupled_and_of_matrices_alone() -> None:
    """Where the loss says nothing, every step takes the learning rate times the decay off each matrix (AdamW)."""
    agent = make(config=replace(BASE, learning_rate=0.1, final_learning_rate=0.1, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in agent._online.named_parameters()}
    agent._online.loss = lambda *_, **__: 0.0 * sum(p.sum() for p in agent._online.parameters())
    iterate(agent)
    for name, p in agent._online.named_parameters():
        shrunk = (1 - 0.1 * 0.5) ** STEPS if p.dim() > 1 else 1.0
        torch.testing.assert_close(p.detach(), shrunk * before[name], msg=name)


def test_averaging_that_warms_up_follows_quickly() -> None:
    """A decay of 0.9999 alone would keep the initial weights."""
    slow, warm = (make(config=replace(BASE, ema_decay=0.9999, ema_power=power)) for power in (None, 0.75))
    distance = []
    for agent in (slow, warm):
        start = torch.cat([p.detach().flatten() for p in agent.policy.parameters()])
        iterate(agent, 2)
        now, online = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (agent.policy, agent._online))
        distance.append(float((now - online).norm() / (start - online).norm()))
    assert distance[0] > 0.99
    assert distance[1] < 0.8


@pytest.mark.parametrize("limit", [1e-4, 1e6])
def test_gradients_are_clipped_to_the_norm_of_all_of_them(limit: float) -> None:
    free, clipped = (make(config=replace(BASE, max_grad_norm=norm, steps_per_iteration=1)) for norm in (None, limit))
    for agent in (free, clipped):
        iterate(agent)
    ours, theirs = (torch.cat([p.grad.flatten() for p in agent._online.parameters()]) for agent in (free, clipped))
    torch.testing.assert_close(theirs, ours * min(1.0, limit / float(ours.norm())), rtol=1e-3, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------- validation


def seen_in_training(agent: BC, n: int) -> set[float]:
    """The first number of every observation that the loss of the trained network saw."""
    seen: set[float] = set()
    original = agent._online.loss

    def loss(obs: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        seen.update(obs[..., 0].flatten().tolist())
        return original(obs, *args, **kwargs)

    agent._online.loss = loss
    iterate(agent, n)
    return seen


def test_held_out_episodes_are_never_trained_on() -> None:
    data = random_episodes()
    config = replace(BASE, validation_share=0.25, validation_every=1, batch_size=64)
    train, held_out = data.split(0.25, 0)
    assert held_out is not None
    seen = seen_in_training(make(config=config, data=data), 3)
    assert seen == set(train.observations[:, 0].tolist())
    assert not seen & set(held_out.observations[:, 0].tolist())
    everything = seen_in_training(make(config=replace(BASE, batch_size=64), data=data), 3)
    assert everything == set(data.observations[:, 0].tolist())


def test_validation_by_hand() -> None:
    """Of a policy that draws nothing, over every chunk of the held-out episode, padding left out."""
    data = random_episodes()
    agent = make(config=replace(BASE, validation_share=0.25, validation_every=1), data=data)
    _, held_out = data.split(0.25, 0)
    (row,) = iterate(agent)
    chunks = held_out.chunks(2, 3, pad_after=2)
    predicted = agent.policy.sample(torch.from_numpy(held_out.observations[chunks.observation_rows]))
    normalize = agent.policy.action_normalizer.normalize
    error = normalize(predicted) - normalize(torch.from_numpy(held_out.actions[chunks.action_rows]))
    expected = (error[torch.from_numpy(chunks.valid)] ** 2).mean().item()
    assert row["validation/action_mse"] == pytest.approx(expected, rel=1e-4)
    assert row["validation/loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("length", [100, 600])
def test_validation_is_the_mean_over_all_chunks_up_to_its_limit(length: int) -> None:
    """Of 196 and of 1196; what fills no batch of 64 may be left out. It always looks at the same ones."""
    data = random_episodes(lengths=(length,) * 4)
    agent = make(config=replace(BASE, validation_share=0.5, validation_every=1, pad_after=0), data=data)
    loss, seen = agent.policy.loss, []
    agent.policy.loss = lambda *args, **kwargs: seen.append(args) or loss(*args, **kwargs)
    looks = []
    for _ in range(2):
        (row,) = iterate(agent)
        obs, actions = (torch.cat(parts) for parts in zip(*seen, strict=True))
        n = min(2 * (length - 2), VALIDATION_CHUNKS)
        assert n - 64 < len(obs.unique(dim=0)) == len(obs) <= n
        expected = loss(obs, actions, generator=torch.Generator()).item()
        assert row["validation/loss"] == pytest.approx(expected, rel=1e-4)
        assert row["validation/action_mse"] == pytest.approx(expected, rel=1e-4)
        looks.append(obs)
        seen.clear()
    assert looks[0].equal(looks[1])


@pytest.mark.parametrize("kind", ["gmm", "diffusion", "ibc"])
def test_validation_is_equal_for_equal_seeds_and_has_no_influence(kind: str) -> None:
    config = replace(BASE, validation_share=0.25, validation_every=1)
    first, second = make(kind, config), make(kind, config)
    assert iterate(first, 2) == iterate(second, 2)
    seldom = make(kind, replace(config, validation_every=50))
    iterate(seldom, 2)
    assert same(weights(first), weights(seldom))


def test_a_single_episode_cannot_be_split() -> None:
    with pytest.raises(DatasetError, match="single episode"):
        make(config=replace(BASE, validation_share=0.5), data=random_episodes(lengths=(9,)))


# ------------------------------------------------------------------------------------------------ ends of the episodes


@every_kind
def test_every_observation_is_learned_from_by_default(kind: str) -> None:
    """Also where no episode is as long as a chunk."""
    agent = make(kind)
    assert len(agent._training) == 28
    assert len(make(kind, replace(BASE, pad_after=0))._training) == 20
    short = random_episodes(lengths=(2, 1, 2))
    agent = make(kind, data=short, **({"n_bins": 1} if kind == "bet" else {}))
    iterate(agent)
    assert len(agent._training) == 5


# ---------------------------------------------------------------------------------------------------------------- speed


@pytest.mark.parametrize(("supported", "precision"), [(False, "bfloat16"), (True, "bfloat16"), (False, "float32")])
def test_bfloat16_without_its_instructions_is_warned_of(
    supported: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dprl.training.precision._has_bfloat16", lambda: supported)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(config=replace(BASE, precision=precision))
    slow = precision == "bfloat16" and not supported
    assert ["set precision = 'float32'" in str(w.message) for w in caught] == [True] * slow


@every_kind
def test_bfloat16_runs_and_is_close(kind: str, tmp_path: Path) -> None:
    half, full = (make(kind, replace(BASE, precision=precision)) for precision in ("bfloat16", "float32"))
    losses = [iterate(agent)[0]["bc/loss"] for agent in (half, full)]
    assert losses[0] == pytest.approx(losses[1], rel=0.2, abs=0.05)
    assert all(value.dtype == torch.float32 for value in weights(half) if value.is_floating_point())
    assert not same(weights(half), weights(full)), "the precision does something"
    assert_resumes(lambda: make(kind, replace(BASE, precision="bfloat16")), tmp_path / "saved")


@pytest.mark.full
def test_compiled_it_learns_the_same() -> None:
    compiled, plain = (make(config=replace(BASE, compile=flag)) for flag in (True, False))
    losses = [iterate(agent)[0]["bc/loss"] for agent in (compiled, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    names = [list(agent.policy.state_dict()) for agent in (compiled, plain)]
    assert names[0] == names[1]
    for ours, theirs in zip(weights(compiled), weights(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("images", [False, True])
@every_kind
def test_compiled_every_kind_runs(kind: str, images: bool, tmp_path: Path) -> None:
    data = random_episodes(SEEING) if images else random_episodes()
    agent = make(kind, replace(BASE, compile=True), data=data, **({"vision": VIT} if images else {}))
    reference = make(kind, data=data, **({"vision": VIT} if images else {}))
    losses = [iterate(a)[0]["bc/loss"] for a in (agent, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    agent.save(tmp_path / "saved")
    assert Policy.from_pretrained(tmp_path / "saved").config == agent.policy.config


# -------------------------------------------------------------------------------------------------------------- workers


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("bc") / "data"
    spec = EnvSpec("some/env", "", "", 3, (-1.0,) * 2, (1.0,) * 2, 10, cameras=SEEING.cameras)
    save_dataset(random_episodes(SEEING), folder, spec)
    return folder


def test_workers_train_as_memory_does_and_resume(on_disk: Path, tmp_path: Path) -> None:
    """On images that stay on disk, with a validation split."""
    config = replace(BASE, validation_share=0.25, validation_every=1, num_workers=2)
    changes = {"vision": VIT, "n_obs_steps": 1}

    def reading() -> BC:
        return make("mse", config, load_dataset(on_disk, memory_map=True), **changes)

    assert_resumes(reading, tmp_path / "saved")
    ours, theirs = reading(), make("mse", replace(config, num_workers=0), load_dataset(on_disk), **changes)
    assert iterate(ours) == iterate(theirs)
    assert same(weights(ours), weights(theirs))


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps = -1: must be at least 0"),
        ({"ema_decay": 1.0}, "ema_decay = 1.0: must be at least 0 and below 1"),
        ({"ema_power": 0.0}, "ema_power = 0.0: must be above 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm = 0.0: must be above 0"),
        ({"validation_share": 1.0}, "validation_share = 1.0"),
        ({"validation_every": 0}, "validation_every = 0"),
        ({"pad_after": -1}, "pad_after = -1"),
        ({"num_workers": -1}, "num_workers = -1"),
        ({"precision": "float16"}, "precision = 'float16': must be one of float32, bfloat16"),
        ({"weight_decay": -1.0}, "weight_decay = -1.0"),
        ({"learning_rate": 5e-5}, "final_learning_rate = 0.0001: must be at most learning_rate = 5e-05"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BCConfig(**changes)


def test_data_with_other_cameras_are_refused() -> None:
    agent = make(data=random_episodes(SEEING), vision=VIT)
    with pytest.raises(DatasetError, match=r"the data have the cameras \{\}, the policy has \{'top': \(24, 24, 3\)\}"):
        agent.set_data(random_episodes(), 10)

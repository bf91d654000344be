"""What holds for every kind of policy; one that is registered later is tested too."""

import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dprl import checkpoint
from dprl.config import from_json, to_json
from dprl.errors import CheckpointError, ConfigError
from dprl.experiments.runs import PolicyChoice, PretrainConfig
from dprl.observations import STATE
from dprl.policy import Features, InferenceConfig, Policy, RecedingHorizon
from dprl.rollout import evaluate
from dprl.seeding import torch_generator
from tests.policy.small import (
    CAMERA,
    FEATURES,
    KINDS,
    RESNET,
    VIT,
    random_batch,
    random_episodes,
    small_config,
    small_policy,
)
from tests.toys import reach_spec

SEES = {"state": FEATURES, "state and images": Features(3, 2, (CAMERA,)), "images": Features(0, 2, (CAMERA,))}
EXPLICIT = [kind for kind in KINDS if kind not in ("diffusion", "ibc")]
"""The others start from something drawn, at temperature 0 too."""

every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, sees: str = "state", backbone: str = "vit", **changes: object) -> Policy:
    if sees != "state":
        changes["vision"] = VIT if backbone == "vit" else RESNET
    return small_policy(kind, SEES[sees], **changes)


padded = functools.cache(make)


def test_all_kinds_are_known() -> None:
    assert set(KINDS) >= {"diffusion", "mse", "gaussian", "gmm", "lstm_gmm", "categorical", "bet", "ibc"}
    assert all(Policy.kinds[kind].name == kind for kind in KINDS)


# ---------------------------------------------------------------------------------------------------- loss and sample


@pytest.mark.parametrize("sees", SEES)
@every_kind
def test_loss_and_sample(kind: str, sees: str) -> None:
    """The loss reaches every weight; both follow from the generator alone."""
    policy = make(kind, sees)
    obs, actions = random_batch(policy, 5)
    assert not policy.training
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loss = policy.loss(obs, actions, generator=torch_generator(0))
    loss.backward()
    assert loss.ndim == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())
    assert loss.equal(policy.loss(obs, actions, generator=torch_generator(0)))
    chunks = policy.sample(obs, generator=torch_generator(0))
    assert chunks.shape == (5, 3, 2)
    assert not chunks.requires_grad
    assert chunks.isfinite().all()
    assert chunks.equal(policy.sample(obs, generator=torch_generator(0)))
    if kind != "mse":
        assert not chunks.equal(policy.sample(obs, generator=torch_generator(1)))
    assert torch.get_rng_state().equal(before), "torch's own generator was used"
    assert policy.sample(obs).shape == (5, 3, 2), "which is the default of a sample"


@pytest.mark.parametrize("kind", EXPLICIT)
def test_a_row_does_not_depend_on_the_others(kind: str) -> None:
    policy = make(kind)
    obs, _ = random_batch(policy, 5)
    cold = policy.sample(obs, temperature=0.0)
    torch.testing.assert_close(policy.sample(obs[2:3], temperature=0.0), cold[2:3])


@every_kind
def test_a_few_steps_lower_the_loss(kind: str) -> None:
    policy = make(kind, hidden_size=32) if hasattr(small_config(kind), "hidden_size") else make(kind)
    obs, actions = random_batch(policy, 32)
    optimizer = torch.optim.Adam(policy.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = policy.loss(obs, actions, generator=torch_generator(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05 * abs(losses[0])


@every_kind
def test_only_a_mask_that_hides_something_changes_the_loss(kind: str) -> None:
    policy = make(kind)
    obs, actions = random_batch(policy, 6)
    valid = torch.arange(3) < torch.tensor([3, 1, 2, 3, 1, 2])[:, None]
    whole, everything, masked = (
        policy.loss(obs, actions, valid=mask, generator=torch_generator(0))
        for mask in (None, torch.ones_like(valid), valid)
    )
    torch.testing.assert_close(everything, whole)
    assert not masked.isclose(whole)


@settings(deadline=None, max_examples=20)
@given(
    valid=arrays(np.bool_, (6, 3)).filter(np.any),
    filling=arrays(np.float32, (6, 3, 2), elements=st.floats(-100, 100, width=32)),
)
@every_kind
def test_padding_carries_no_gradient(kind: str, valid: np.ndarray, filling: np.ndarray) -> None:
    """Whatever fills the masked actions, and be it not a number: the same loss and gradients, and none reaches it."""
    policy = padded(kind)
    obs, actions = random_batch(policy, 6)
    mask = torch.from_numpy(valid)

    def found(other: torch.Tensor) -> list[torch.Tensor]:
        """The loss, its gradient for every parameter, and for `other`."""
        other = other.requires_grad_()
        filled = torch.where(mask[..., None], actions, other)
        loss = policy.loss(obs, filled, valid=mask, generator=torch_generator(0))
        gradients = torch.autograd.grad(loss, [*policy.parameters(), other], allow_unused=True)
        return [loss, *(torch.zeros(()) if g is None else g for g in gradients)]

    first = found(torch.zeros(6, 3, 2))
    assert all(value.isfinite().all() for value in first)
    for other in (torch.from_numpy(filling), torch.full((6, 3, 2), torch.nan)):
        second = found(other)
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        assert not second[-1].any()


@every_kind
@pytest.mark.parametrize("temperature", [-1.0, math.nan, math.inf, 1e39, "1"])
def test_a_temperature_is_a_number_of_at_least_0(kind: str, temperature: object) -> None:
    policy = make(kind)
    with pytest.raises(ConfigError, match="temperature = "):
        policy.sample(random_batch(policy, 2)[0], temperature=temperature)


@every_kind
def test_a_config_is_of_its_kind(kind: str) -> None:
    other = "gmm" if kind == "mse" else "mse"
    with pytest.raises(ConfigError, match=rf"config = '.*': must be a {Policy.kinds[kind].config_class.__name__}"):
        Policy.kinds[kind](FEATURES, small_config(other))


def test_parts_of_an_observation_are_of_as_many_environments() -> None:
    policy = small_policy("mse", SEES["state and images"])
    state, image = np.zeros((2, 3), np.float32), np.zeros((1, *CAMERA.shape), np.uint8)
    with pytest.raises(ConfigError, match="all parts must be of as many environments"):
        policy.predict({STATE: state, CAMERA.part: image})


@every_kind
def test_a_loss_refuses_what_would_broadcast(kind: str) -> None:
    policy = make(kind)
    obs, actions = random_batch(policy, 4)
    valid, generator = torch.ones(4, 3, dtype=torch.bool), torch_generator(0)
    for message, wrong in {
        "valid": (obs, actions, valid[:, :1]),
        "valid = ": (obs, actions, valid[0]),
        "actions": (obs[:1], actions, valid),
        "obs": (obs[:, :, :1], actions, valid),
    }.items():
        with pytest.raises(ConfigError, match=message):
            policy.loss(wrong[0], wrong[1], valid=wrong[2], generator=generator)
    with pytest.raises(ConfigError, match="obs"):
        policy.loss(torch.cat([obs, obs], dim=1), actions, generator=generator)


# ------------------------------------------------------------------------------------------------------ temperature 0


@every_kind
def test_a_deterministic_decision_repeats(kind: str) -> None:
    """Whatever torch's own generator is at, and for equal observations in one batch too."""
    policy = make(kind)
    obs, _ = random_batch(policy, 1)
    obs = obs.repeat(3, 1, 1)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(policy.draw(obs, InferenceConfig(), None, deterministic=True))
    assert found[0].equal(found[1])
    torch.testing.assert_close(found[0], found[0][:1].expand(3, -1, -1))


@pytest.mark.parametrize("kind", EXPLICIT)
def test_temperature_0_draws_nothing(kind: str) -> None:
    policy = make(kind)
    obs, _ = random_batch(policy, 5)
    cold = [policy.sample(obs, generator=torch_generator(seed), temperature=0.0) for seed in (0, 1)]
    assert cold[0].equal(cold[1])


# ------------------------------------------------------------------------------------------------------ save and load


@pytest.mark.parametrize("sees", SEES)
@every_kind
def test_saved_and_loaded_it_is_the_same(kind: str, sees: str, tmp_path: Path) -> None:
    policy = make(kind, sees)
    policy.features = replace(policy.features, env_id="Somewhere-v0")
    policy.save_pretrained(tmp_path / "policy")
    for loader in (Policy, type(policy)):
        loaded = loader.from_pretrained(tmp_path / "policy")
        assert type(loaded) is type(policy)
        assert (loaded.features, loaded.config) == (policy.features, policy.config)
        assert not loaded.training
        ours, theirs = policy.state_dict(), loaded.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours)
    obs, actions = random_batch(policy, 3)
    for call in (
        lambda p: p.sample(obs, generator=torch_generator(0)),
        lambda p: p.loss(obs, actions, generator=torch_generator(0)),
    ):
        assert call(policy).equal(call(loaded))


@pytest.mark.parametrize("other", KINDS)
@every_kind
def test_a_class_loads_its_own_kind_only(kind: str, other: str, folders: dict[str, Path]) -> None:
    loader = Policy.kinds[other]
    if kind == other:
        assert type(loader.from_pretrained(folders[kind])) is loader
        return
    with pytest.raises(CheckpointError, match=f"config.json' describes a {kind} policy, not one of type {other}"):
        loader.from_pretrained(folders[kind])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("policies")
    for kind in KINDS:
        make(kind).save_pretrained(folder / kind)
    return {kind: folder / kind for kind in KINDS}


@every_kind
def test_weights_of_other_sizes_are_refused(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    about = json.loads((folders[kind] / "config.json").read_text())
    about["config"]["horizon"] += 1
    tensors = checkpoint.load_tensors(folders[kind] / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(about))
    checkpoint.save_tensors(tmp_path / "model.safetensors", tensors)
    if kind == "diffusion":
        about["config"]["denoiser"]["hidden_size"] += 1
        (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=r"does not fit its config\.json"):
        Policy.from_pretrained(tmp_path)


@pytest.mark.parametrize("about", [{}, {"type": "gnm", "features": {}, "config": {}}, {"type": "gmm"}, [], None])
def test_an_unknown_description_is_refused(about: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(about))
    checkpoint.save_tensors(tmp_path / "model.safetensors", {})
    with pytest.raises(CheckpointError, match=r"known type: .*gmm.*lstm_gmm"):
        Policy.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------------- configs


def choices() -> list[type]:
    """The classes of `PolicyChoice`."""
    plain = [get_args(member)[0] if hasattr(member, "__metadata__") else member for member in get_args(PolicyChoice)]
    return [get_args(member)[0] if hasattr(member, "__metadata__") else member for member in plain]


@every_kind
def test_every_kind_can_be_chosen_and_stored(kind: str) -> None:
    """In the union of all configs the exact class comes back, whether its numbers are the default's or not."""
    config_class = Policy.kinds[kind].config_class
    assert config_class in choices()
    for config in (config_class(), small_config(kind), replace(small_config(kind), vision=RESNET)):
        stored = json.loads(json.dumps(to_json(PretrainConfig("data", policy=config))))
        loaded = from_json(PretrainConfig, stored, "run.json")
        assert type(loaded.policy) is config_class
        assert loaded.policy == config


# ------------------------------------------------------------------------------------------------------------- control


@every_kind
def test_every_kind_is_evaluated(kind: str) -> None:
    policy = small_policy(kind, Features(2, 1))
    results = [evaluate(policy, reach_spec(), 4, seed) for seed in (0, 0, 1)]
    for result in results:
        assert 1 <= result.episode_length_mean <= 40
        assert result.policy_latency_ms_p50 > 0
    same = [replace(result, policy_latency_ms_p50=0.0) for result in results[:2]]
    assert same[0] == same[1]


@pytest.mark.parametrize("sees", SEES)
@every_kind
def test_predict_one_and_many(kind: str, sees: str) -> None:
    policy = make(kind, sees)
    obs, _ = random_batch(policy, 4)
    parts = obs if isinstance(obs, dict) else {STATE: obs}
    step = {name: part[:, -1].numpy() for name, part in parts.items()}
    many = step if isinstance(obs, dict) else step[STATE]
    one = {name: part[1] for name, part in step.items()} if isinstance(obs, dict) else many[1]
    actions, state = policy.predict(many, deterministic=True)
    assert (actions.shape, actions.dtype) == ((4, 2), np.float32)
    action, single = policy.predict(one, deterministic=True)
    assert action.shape == (2,)
    np.testing.assert_allclose(action, actions[1], atol=1e-5)
    torch.manual_seed(7)
    again, _ = policy.predict(many, deterministic=True)
    np.testing.assert_array_equal(again, actions)
    second, state = policy.predict(many, state, deterministic=True)
    third, _ = policy.predict(many, state, deterministic=True)
    np.testing.assert_array_equal(third, actions), "a new decision: two are executed, and it sees the same"
    follow, _ = policy.predict(one, single, deterministic=True)
    np.testing.assert_allclose(follow, second[1], atol=1e-5)
    drawn = [policy.predict(many, generator=torch_generator(seed))[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    if kind != "mse":
        assert not np.array_equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"solver": "ddim"}, "solver = 'ddim'"),
        ({"solver": "ddim", "eta": 1.0}, "solver = 'ddim'"),
        ({"num_inference_steps": 2}, "num_inference_steps = 2"),
        ({"timestep_spacing": "trailing"}, "timestep_spacing = 'trailing'"),
        ({"warm_start_steps": 1}, "warm_start_steps = 1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "diffusion"])
def test_settings_that_a_kind_does_not_have_are_refused(kind: str, changes: dict[str, object], name: str) -> None:
    policy = small_policy(kind, Features(2, 1))
    inference = InferenceConfig(**changes)
    for call in (
        lambda: RecedingHorizon(policy, inference),
        lambda: evaluate(policy, reach_spec(), 1, 0, inference=inference),
        lambda: policy.predict(np.zeros(2, np.float32), inference=inference),
    ):
        with pytest.raises(ConfigError, match=f"{name}: policies of type {kind} have none"):
            call()


@every_kind
def test_every_kind_can_ensemble(kind: str) -> None:
    """The second action is the mean of what the first plan and the second say for it."""
    policy = make(kind)
    inference = InferenceConfig(temporal_ensembling=0.0)
    control = RecedingHorizon(policy, inference)
    obs, _ = random_batch(policy, 2)
    plans = [policy.draw(obs, inference, None, deterministic=True) for obs in (obs, obs + 0.1)]
    _, memory = control.plan(obs, control.start(2), None, deterministic=True)
    second, _ = control.plan(obs + 0.1, memory, None, deterministic=True)
    torch.testing.assert_close(second[:, 0], (plans[0][:, 1] + plans[1][:, 0]) / 2)


# -------------------------------------------------------------------------------------------------------------- shapes


@every_kind
def test_observations_of_a_wrong_shape_are_refused(kind: str) -> None:
    policy = make(kind)
    for obs in (torch.zeros(5, 3), torch.zeros(5, 1, 3), torch.zeros(5, 2, 4), torch.zeros(5, 2, 3, 1)):
        with pytest.raises(ConfigError, match=r"obs = \(.*must have the shape \(batch, 2, 3\)"):
            policy.sample(obs)
    for observation in (np.zeros(4), np.zeros((5, 4)), np.zeros((5, 2, 3))):
        with pytest.raises(ConfigError, match=r"observation = \(.*must have the shape \(N, 3\) or \(3,\)"):
            policy.predict(observation)


@every_kind
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_observations_that_are_not_finite_are_refused(kind: str, value: float) -> None:
    policy = make(kind, "state and images")
    obs, _ = random_batch(policy, 3)
    obs[STATE][2, 0, 1] = value
    with pytest.raises(ConfigError, match=rf"obs\[2\] = .*{value}.*: observations must be finite"):
        policy.sample(obs)


@every_kind
def test_images_of_a_wrong_shape_are_refused(kind: str) -> None:
    policy = make(kind, "state and images")
    obs, _ = random_batch(policy, 2)
    part = CAMERA.part
    for image in (obs[part][:, :1], obs[part][..., :2], obs[part][:, :, :20], obs[part].movedim(-1, 2)):
        with pytest.raises(ConfigError, match=rf"{part} = \(.*must have the shape \(batch, 2, 24, 24, 3\)"):
            policy.sample({**obs, part: image})
    for missing in (STATE, part):
        with pytest.raises(ConfigError, match=r"obs = \[.*must have the parts"):
            policy.sample({name: value for name, value in obs.items() if name != missing})
    with pytest.raises(ConfigError, match="must have the parts"):
        policy.predict(np.zeros(3))
    step = {name: value[:, -1].numpy() for name, value in obs.items()}
    with pytest.raises(ConfigError, match=rf"{part} = \(2, 24, 20, 3\)"):
        policy.predict({**step, part: step[part][:, :, :20]})


def test_images_that_are_not_bytes_are_refused() -> None:
    """Numbers in [0, 1] would become black."""
    policy = make("mse", "images")
    with pytest.raises(ConfigError, match=r"observation.images.top.*uint8"):
        policy.predict({CAMERA.part: np.random.default_rng(0).random((24, 24, 3))})


# -------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("sees", ["state and images", "images"])
@pytest.mark.parametrize("backbone", ["vit", "resnet"])
@pytest.mark.parametrize("kind", ["gmm", "diffusion"])
def test_what_a_policy_does_depends_on_the_image(kind: str, backbone: str, sees: str, tmp_path: Path) -> None:
    policy = make(kind, sees, backbone)
    obs, actions = random_batch(policy, 3)
    draw = [policy.draw(o, InferenceConfig(), None, deterministic=True) for o in (obs, obs)]
    assert draw[0].equal(draw[1])
    for step in range(policy.config.n_obs_steps):
        images = obs[CAMERA.part].clone()
        images[:, step] = 255 - images[:, step]
        changed = policy.draw({**obs, CAMERA.part: images}, InferenceConfig(), None, deterministic=True)
        assert not changed.equal(draw[0]), f"observation step {step} is not seen"
    policy.loss(obs, actions, generator=torch_generator(0)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())
    policy.save_pretrained(tmp_path / "policy")
    loaded = Policy.from_pretrained(tmp_path / "policy")
    assert loaded.draw(obs, InferenceConfig(), None, deterministic=True).equal(draw[0])


@every_kind
def test_images_are_augmented_in_training_only(kind: str) -> None:
    """By shifts that follow from the generator: an image without content stays what it is."""
    policy = make(kind, "images")
    obs, _ = random_batch(policy, 3)
    plain = policy.condition(obs)
    shifted = [policy.condition(obs, torch_generator(seed)) for seed in (0, 0, 1)]
    assert shifted[0].equal(shifted[1])
    assert not shifted[0].equal(shifted[2])
    assert not shifted[0].equal(plain)
    seen = []
    original = policy.condition
    policy.condition = lambda obs, generator=None: seen.append(generator) or original(obs, generator)
    generator = torch_generator(0)
    obs, actions = random_batch(policy, 3)
    policy.loss(obs, actions, generator=generator)
    policy.train()
    policy.loss(obs, actions, generator=generator)
    policy.sample(obs)
    assert seen == [None, generator, None]


@every_kind
def test_sizes_and_cameras_come_from_the_data(kind: str) -> None:
    for features in SEES.values():
        data = random_episodes(features)
        policy = Policy.kinds[kind].for_dataset(data, small_config(kind, vision=VIT), seed=3)
        assert policy.features == features
        normalized = policy.action_normalizer.normalize(torch.from_numpy(data.actions))
        torch.testing.assert_close(normalized.amin(0), -torch.ones(2))
        torch.testing.assert_close(normalized.amax(0), torch.ones(2))
        again = Policy.kinds[kind].for_dataset(data, small_config(kind, vision=VIT), seed=3)
        other = Policy.kinds[kind].for_dataset(data, small_config(kind, vision=VIT), seed=4)
        weights, same, different = (list(p.state_dict().values()) for p in (policy, again, other))
        assert all(a.equal(b) for a, b in zip(weights, same, strict=True))
        assert not all(a.equal(b) for a, b in zip(weights, different, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [(slice(None), slice(1)), (slice(None), slice(None), slice(1))])
def test_actions_that_would_broadcast_are_refused(kind: str, part: tuple[slice, ...]) -> None:
    policy = small_policy(kind, horizon=3)
    obs, actions = random_batch(policy, 4)
    with pytest.raises(ConfigError, match=r"actions = .* must have the shape \(4, 3, 2\)"):
        policy.loss(obs, actions[part], generator=torch_generator(0))

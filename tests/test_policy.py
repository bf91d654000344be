"""The policy: one folder in and out, replayable noise, one action at a time, nothing hidden."""

import json
import os
import pickle
import random
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file, save_file

from dprl.diffusion import SolverConfig
from dprl.errors import CheckpointError, ConfigError, RunExistsError
from dprl.networks import LNResNetConfig, MLPConfig, TransformerConfig, UNetConfig
from dprl.observations import STATE
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features, MinMaxNormalizer, Policy
from dprl.policy.normalize import CONSTANT
from dprl.seeding import torch_generator
from tests.policy.small import CAMERA, VIT, random_batch, small_policy

K = 4
FEATURES = Features(3, 2)
CONFIG = DiffusionConfig(
    horizon=4, n_action_steps=2, num_train_timesteps=K, denoiser=MLPConfig(hidden_size=8, time_size=4)
)
FLOW = replace(CONFIG, schedule="rectified_flow", prediction_type="velocity")
SMALL_DENOISERS = {
    "mlp": CONFIG.denoiser,
    "unet": UNetConfig(down_dims=(8, 16), n_groups=4, time_size=4),
    "transformer": TransformerConfig(n_layers=1, n_heads=2, embedding_size=16),
    "ln_resnet": LNResNetConfig(hidden_size=8, n_blocks=1, n_frequencies=2, time_size=4),
}


def make_policy(tuned_below=0, config=CONFIG, features=FEATURES):
    """Ranges that are not the default, and a tuned network that is not the base."""
    policy = DiffusionPolicy(features, config, seed=1)
    policy.observation_normalizer.fit(torch.tensor([[-2.0, 0.0, 5.0], [3.0, 1.0, 5.0]])[:, : features.observation_size])
    policy.action_normalizer.fit(torch.tensor([[-0.5, 0.0], [1.0, 4.0]])[:, : features.action_size])
    if tuned_below:
        policy.tune_below(tuned_below)
        with torch.no_grad():
            for parameter in policy.tuned.parameters():
                parameter.add_(0.1)
    return policy


OBS = torch.linspace(-1, 1, 15).view(5, 1, 3)


def draws(policy, seed=0, solver=None):
    shape = (policy.n_draws(solver), len(OBS), policy.config.horizon, policy.features.action_size)
    return torch.randn(shape, generator=torch_generator(seed))


# ------------------------------------------------------------------------------------------------------- sampling


SOLVERS = [
    {"solver": "ddpm"},
    {"solver": "ddpm", "num_inference_steps": 2},
    {"solver": "ddim"},
    {"solver": "ddim", "num_inference_steps": 3, "eta": 0.5},
    {"solver": "ddim", "eta": 1.0, "timestep_spacing": "trailing"},
    {"solver": "dpmsolver++", "num_inference_steps": 3},
    {"solver": "sde-dpmsolver++", "num_inference_steps": 3, "timestep_spacing": "leading"},
]


@pytest.mark.parametrize("denoiser", SMALL_DENOISERS)
@pytest.mark.parametrize(
    "options", [*SOLVERS, {"solver": "euler"}, {"solver": "euler", "num_inference_steps": 2}], ids=str
)
def test_noise_replays_a_sample(options, denoiser):
    config = FLOW if options["solver"] == "euler" else CONFIG
    policy = make_policy(config=replace(config, denoiser=SMALL_DENOISERS[denoiser]))
    drawn = policy.sample(OBS, generator=torch_generator(0), **options)
    noise = draws(policy, solver=SolverConfig(**options))
    assert drawn.shape == (5, 4, 2)
    assert policy.sample(OBS, noise=noise, **options).equal(drawn)
    assert policy.sample(OBS, noise=noise, **options).equal(drawn)
    assert not policy.sample(OBS, noise=draws(policy, seed=1, solver=SolverConfig(**options)), **options).equal(drawn)


def test_solvers_are_chosen_at_inference():
    """The policy's own way where nothing is asked for; another solver brings its own settings with it."""
    own = SolverConfig("ddim", 2, 0.5, "trailing")
    policy, plain = make_policy(config=replace(CONFIG, sampling=own)), make_policy()
    asked = {"solver": "ddim", "num_inference_steps": 2, "eta": 0.5, "timestep_spacing": "trailing"}
    noise = draws(policy)
    assert policy.sample(OBS, noise=noise).equal(plain.sample(OBS, noise=noise, **asked))
    assert len(noise) == 1 + 1, "the initial draw and the first of two steps"
    everything = draws(plain)
    assert len(everything) == K, "the initial draw and every step's but the last"
    assert policy.sample(OBS, noise=everything, solver="ddpm").equal(plain.sample(OBS, noise=everything))
    three = policy.sample(OBS, noise=draws(plain, solver=SolverConfig("ddim", 3, 0.5)), num_inference_steps=3)
    expected = plain.sample(
        OBS, noise=draws(plain, solver=SolverConfig("ddim", 3, 0.5)), **asked | {"num_inference_steps": 3}
    )
    assert three.equal(expected), "what is not asked for is the policy's own"


def test_temperature_scales_every_draw_but_the_first():
    policy = make_policy()
    noise, other = draws(policy), draws(policy, seed=1)
    other[0] = noise[0]
    cold = policy.sample(OBS, noise=noise, temperature=0.0)
    assert cold.equal(policy.sample(OBS, noise=other, temperature=0.0))
    assert not cold.equal(policy.sample(OBS, noise=noise, temperature=1.0))
    assert not policy.sample(OBS, noise=noise).equal(policy.sample(OBS, noise=other))
    scaled = torch.cat([noise[:1], 0.5 * noise[1:]])
    torch.testing.assert_close(policy.sample(OBS, noise=noise, temperature=0.5), policy.sample(OBS, noise=scaled))


@pytest.mark.parametrize(
    ("obs", "options", "message"),
    [
        (OBS, {"noise": torch.zeros(K, 4, 4, 2)}, r"noise = \(4, 4, 4, 2\): must have the shape \(4, 5, 4, 2\)"),
        (OBS, {"noise": torch.zeros(K + 1, 5, 4, 2)}, r"noise = \(5, 5, 4, 2\)"),
        (OBS[:, 0], {}, r"obs = \(5, 3\): must have the shape \(batch, 1, 3\)"),
        (OBS[..., :2], {}, r"obs = \(5, 1, 2\)"),
        (OBS.repeat(1, 2, 1), {}, r"obs = \(5, 2, 3\)"),
        (OBS, {"solver": "dpdm"}, r"solver = 'dpdm': must be one of ddpm, ddim"),
        (OBS, {"solver": "euler"}, r"solver = 'euler': must be ddpm, ddim.*squaredcos_cap_v2"),
        (OBS, {"num_inference_steps": K + 1}, rf"num_inference_steps = {K + 1}: must be at most.* {K}"),
        (OBS, {"num_inference_steps": 0}, r"num_inference_steps = 0"),
        (OBS, {"eta": 0.5}, r"eta = 0.5: must be 0: only the solver ddim has it"),
        (OBS, {"solver": "ddim", "eta": 1.5}, r"eta = 1.5: must be from 0 to 1"),
        (OBS, {"solver": "ddim", "timestep_spacing": "even"}, r"timestep_spacing = 'even': must be one of leading"),
        ({"observation.images.top": OBS}, {}, r"obs = .*must have the parts \['observation.state'\]"),
    ],
    ids=[
        "noise-batch",
        "noise-draws",
        "obs-dimensions",
        "obs-size",
        "obs-history",
        "solver",
        "other-family",
        "steps",
        "no-steps",
        "eta-without-ddim",
        "eta",
        "spacing",
        "parts",
    ],
)
def test_wrong_input_is_explained(obs, options, message):
    with pytest.raises(ConfigError, match=message):
        make_policy().sample(obs, **options)


def test_a_flow_refuses_the_solvers_of_diffusion():
    with pytest.raises(ConfigError, match=r"solver = 'ddim': must be euler.*rectified_flow"):
        make_policy(config=FLOW).sample(OBS, solver="ddim")


@pytest.mark.parametrize("options", SOLVERS, ids=str)
def test_named_parts_are_the_same_observation(options):
    policy = make_policy()
    noise = draws(policy, solver=SolverConfig(**options))
    expected = policy.sample(OBS, noise=noise, **options)
    assert policy.sample({"observation.state": OBS}, noise=noise, **options).equal(expected)
    assert policy.condition(OBS).shape == (5, 1, 3)


# --------------------------------------------------------------------------------------------------------- tuning


@pytest.mark.parametrize("tuned", [-1, 0, K + 1])
def test_tuning_no_or_too_many_steps_is_refused(tuned):
    with pytest.raises(ConfigError, match=f"timestep = {tuned}"):
        make_policy().tune_below(tuned)


@pytest.mark.parametrize("tuned", [1, K])
def test_tuned_network_is_used_below_its_timestep_only(tuned):
    policy = make_policy(tuned_below=tuned)
    assert [policy.denoiser_at(t) is policy.tuned for t in range(K)] == [t < tuned for t in range(K)]
    assert not policy.sample(OBS, noise=draws(policy)).equal(make_policy().sample(OBS, noise=draws(policy)))


def test_tuning_starts_from_a_copy_and_a_second_call_must_agree():
    policy = make_policy()
    before = policy.sample(OBS, noise=draws(policy))
    policy.tune_below(2)
    policy.tune_below(2)
    pairs = zip(policy.tuned.named_parameters(), policy.base.named_parameters(), strict=True)
    assert all(name == of and ours.equal(base) and ours is not base for (name, ours), (of, base) in pairs)
    # of how many steps a network prepares at once, the last digits may depend
    torch.testing.assert_close(policy.sample(OBS, noise=draws(policy)), before, rtol=0, atol=2e-6)
    with pytest.raises(ConfigError, match=r"timestep = 3.*already tuned below timestep 2"):
        policy.tune_below(3)


# -------------------------------------------------------------------------------------------------------- predict


@pytest.fixture
def counting(monkeypatch):
    """A policy whose decisions are numbered: action h of decision n is (10 n + h, row of the batch)."""
    policy = make_policy()
    policy.decisions = []

    def draw(obs, *_, **__):
        policy.decisions.append(obs.clone())
        chunk = torch.zeros(len(obs), 4, 2)
        chunk[..., 0] = 10 * len(policy.decisions) + torch.arange(4)
        chunk[..., 1] = torch.arange(len(obs))[:, None]
        return chunk

    monkeypatch.setattr(policy, "draw", draw)
    return policy


def test_a_chunk_is_executed_action_by_action_and_then_replanned(counting):
    state, actions = None, []
    for step in range(5):
        action, state = counting.predict(np.zeros((2, 3)), state, np.full(2, step == 0))
        actions.append(action[:, 0].tolist())
    assert actions == [[10, 10], [11, 11], [20, 20], [21, 21], [30, 30]]


def test_an_environment_that_starts_anew_is_replanned_alone(counting):
    _, state = counting.predict(np.zeros((3, 3)))
    action, state = counting.predict(np.ones((3, 3)), state, np.array([False, True, False]))
    assert action[:, 0].tolist() == [11, 20, 11]
    assert counting.decisions[1].shape == (1, 1, 3)
    action, state = counting.predict(np.ones((3, 3)), state, np.zeros(3, bool))
    assert action[:, 0].tolist() == [30, 21, 30]
    assert action[:, 1].tolist() == [0, 0, 1]


def test_history_repeats_the_first_observation_and_then_slides(counting):
    counting.config = replace(counting.config, n_obs_steps=3, n_action_steps=1)
    state = None
    for step in range(4):
        _, state = counting.predict(np.full((1, 3), step), state, np.array([step in (0, 3)]))
    assert [d[0, :, 0].tolist() for d in counting.decisions] == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [3, 3, 3]]


def test_one_environment_without_a_batch_dimension(counting):
    action, state = counting.predict(np.zeros(3))
    assert action.shape == (2,)
    action, _ = counting.predict(np.zeros(3), state)
    assert action.tolist() == [11, 0]


def test_the_state_passed_in_is_not_changed(counting):
    _, state = counting.predict(np.zeros((1, 3)))
    replanned, _ = counting.predict(np.zeros((1, 3)), state, np.array([True]))
    continued, _ = counting.predict(np.zeros((1, 3)), state, np.array([False]))
    assert (replanned[0, 0], continued[0, 0]) == (20, 11)


def test_deterministic_actions_do_not_depend_on_the_place_in_the_batch():
    policy = make_policy(tuned_below=2)
    obs = np.linspace(-1, 1, 21, dtype=np.float32).reshape(7, 3)
    batch, _ = policy.predict(obs, deterministic=True)
    reverse, _ = policy.predict(obs[::-1].copy(), deterministic=True)
    alone = np.stack([policy.predict(row, deterministic=True)[0] for row in obs])
    np.testing.assert_allclose(reverse[::-1], batch, atol=1e-6)
    np.testing.assert_allclose(alone, batch, atol=1e-6)
    same, _ = policy.predict(np.repeat(obs[:1], 7, axis=0), deterministic=True)
    np.testing.assert_allclose(same, np.repeat(same[:1], 7, axis=0), atol=1e-6)
    assert np.abs(batch[0] - batch[-1]).max() > 1e-3
    assert not np.array_equal(policy.predict(obs)[0], policy.predict(obs)[0])


@pytest.mark.parametrize("obs", [OBS[:, 0].numpy()[::-1], np.ones((2, 6))[:, ::2], np.ones((2, 3), np.float16)])
def test_predict_takes_arrays_of_any_layout(obs):
    policy = make_policy()
    plain = np.array(obs, np.float32, order="C")
    assert np.array_equal(policy.predict(obs, deterministic=True)[0], policy.predict(plain, deterministic=True)[0])


@pytest.mark.parametrize("shape", [(2, 4), (4,), (2, 2), (1, 2, 3)])
def test_predict_refuses_observations_of_another_size(shape):
    with pytest.raises(ConfigError, match="observation"):
        make_policy().predict(np.zeros(shape))


def test_stable_baselines3_evaluates_it():
    evaluation = pytest.importorskip("stable_baselines3.common.evaluation")
    vec_env = pytest.importorskip("stable_baselines3.common.vec_env")
    policy = make_policy(config=replace(CONFIG, num_train_timesteps=2), features=Features(3, 1))

    def make():
        return gymnasium.wrappers.TimeLimit(gymnasium.make("Pendulum-v1"), 20)

    def evaluate():
        env = vec_env.VecMonitor(vec_env.DummyVecEnv([make, make]))
        env.seed(0)
        return evaluation.evaluate_policy(policy, env, 4, deterministic=True, return_episode_rewards=True)

    rewards, lengths = evaluate()
    assert lengths == [20] * 4
    assert all(-20 * 17 < reward < 0 for reward in rewards)
    assert evaluate()[0] == rewards


# -------------------------------------------------------------------------------------------------- saving, loading


@pytest.mark.parametrize("tuned", [0, 1, K])
def test_a_saved_policy_acts_the_same_bit_for_bit(tmp_path, tuned):
    policy = make_policy(tuned_below=tuned)
    policy.save_pretrained(tmp_path / "policy")
    loaded = DiffusionPolicy.from_pretrained(tmp_path / "policy")
    assert (loaded.features, loaded.config, loaded.tuned_below) == (policy.features, policy.config, tuned)
    assert not loaded.training
    assert loaded.sample(OBS, noise=draws(policy)).equal(policy.sample(OBS, noise=draws(policy)))


@pytest.mark.parametrize("denoiser", SMALL_DENOISERS)
def test_every_denoiser_and_setting_is_saved(tmp_path, denoiser):
    config = DiffusionConfig(
        horizon=4, num_train_timesteps=6, schedule="linear", prediction_type="v_prediction", beta_end=0.3,
        clip_sample=None, denoiser=SMALL_DENOISERS[denoiser], sampling=SolverConfig("ddim", 3, 0.5, "linspace"),
    )  # fmt: skip
    policy = make_policy(tuned_below=2, config=config, features=Features(3, 2, env_id="Hopper-v5"))
    policy.save_pretrained(tmp_path / "policy")
    about = json.loads((tmp_path / "policy" / "config.json").read_text())
    assert about.keys() == {"type", "features", "config", "tuned_below"}
    assert (about["type"], about["features"]["env_id"], about["tuned_below"]) == ("diffusion", "Hopper-v5", 2)
    loaded = Policy.from_pretrained(tmp_path / "policy")
    assert isinstance(loaded, DiffusionPolicy)
    assert (loaded.features, loaded.config) == (policy.features, config)
    assert loaded.n_action_steps == 4, "n_action_steps = None executes the whole chunk"
    noise = draws(policy)
    assert loaded.sample(OBS, noise=noise).equal(policy.sample(OBS, noise=noise))


def test_a_policy_of_ones_own_does_not_take_the_place_of_the_librarys():
    """A subclass that gives itself no name is not what config.json means by its parent's."""
    before = Policy.kinds["diffusion"]

    class Mine(DiffusionPolicy):
        pass

    after, Policy.kinds["diffusion"] = Policy.kinds["diffusion"], before
    assert after is before


def test_saving_does_not_overwrite_unless_asked(tmp_path):
    make_policy().save_pretrained(tmp_path / "policy")
    with pytest.raises(RunExistsError):
        make_policy(tuned_below=1).save_pretrained(tmp_path / "policy")
    assert DiffusionPolicy.from_pretrained(tmp_path / "policy").tuned is None
    make_policy(tuned_below=1).save_pretrained(tmp_path / "policy", overwrite=True)
    assert DiffusionPolicy.from_pretrained(tmp_path / "policy").tuned_below == 1


@pytest.fixture
def saved(tmp_path):
    """A policy folder without a manifest, as other tools write it: damage reaches the parsers."""
    folder = tmp_path / "policy"
    make_policy(tuned_below=2).save_pretrained(folder)
    (folder / "manifest.json").unlink()
    return folder


def edited(part=None, **changes):
    def edit(folder):
        about = json.loads((folder / "config.json").read_text())
        target = about if part is None else about[part]
        target |= changes
        for key in [key for key, value in target.items() if value is ...]:
            del target[key]
        (folder / "config.json").write_text(json.dumps(about))

    return edit


def written(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def reshaped(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["base.net.0.weight"] = tensors["base.net.0.weight"][:, 1:].contiguous()
    save_file(tensors, folder / "model.safetensors")


def thinned(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["base.net.0.bias"]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "file", "hint"),
    [
        (edited(type="no-such"), "config.json", "does not describe a dprl policy of a known type: "),
        (edited(type=...), "config.json", "does not describe a dprl policy of a known type: "),
        (edited(type=["diffusion"]), "config.json", "does not describe a dprl policy of a known type: "),
        (edited(features=...), "config.json", "does not describe a dprl policy"),
        (edited(config=...), "config.json", "does not describe a dprl policy"),
        (written("config.json", b'{"architectures": ["Bert"]}'), "config.json", "does not describe"),
        (written("config.json", b"[1]"), "config.json", "does not describe"),
        (written("config.json", b"{"), "config.json", "JSON"),
        (written("config.json", b"\xff\xfe"), "config.json", "JSON"),
        (edited("config", horizn=4), "config.json", "Did you mean horizon"),
        (edited("config", horizon="4"), "config.json", "horizon = '4'"),
        (edited("config", n_action_steps=5), "config.json", "n_action_steps = 5"),
        (edited("config", schedule="cosine"), "config.json", "schedule = 'cosine'"),
        (edited("config", prediction_type="velocity"), "config.json", "prediction_type = 'velocity'"),
        (edited("config", sampling={"solver": "euler"}), "config.json", "solver = 'euler'"),
        (edited("config", denoiser={"down_dims": [12]}), "config.json", "denoiser"),
        (edited("features", action_size=...), "config.json", "action_size"),
        (edited(tuned_below=K + 1), "config.json", "tuned"),
        (edited(tuned_below=-1), "config.json", "tuned"),
        (edited(tuned_below="2"), "config.json", "tuned"),
        (edited(tuned_below=1.5), "config.json", "tuned"),
        (edited(tuned_below=0), "model.safetensors", "tuned"),
        (edited("features", observation_size=7), "model.safetensors", "size mismatch"),
        (reshaped, "model.safetensors", "base.net.0.weight"),
        (thinned, "model.safetensors", "base.net.0.bias"),
        (written("model.safetensors", b""), "model.safetensors", "cannot be read"),
        (written("model.safetensors", b"x" * 100), "model.safetensors", "cannot be read"),
    ],
    ids=[
        "foreign-type", "no-type", "list-type", "no-features", "no-config", "bert", "list", "cut", "utf-16",
        "unknown-key", "wrong-type", "out-of-range", "schedule", "prediction", "solver", "denoiser", "missing-key",
        "tuned-too-many", "tuned-negative", "tuned-text", "tuned-half", "tuned-unexpected", "wrong-size",
        "wrong-shape", "missing-tensor", "empty", "garbage",
    ],
)  # fmt: skip
def test_a_folder_that_is_no_policy_is_explained(saved, damage, file, hint):
    damage(saved)
    with pytest.raises(CheckpointError) as caught:
        DiffusionPolicy.from_pretrained(saved)
    assert str(saved / file) in str(caught.value)
    assert hint in str(caught.value)


def test_a_missing_policy_is_explained(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere.*config\.json"):
        DiffusionPolicy.from_pretrained(tmp_path / "nowhere")


class Malicious:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_a_pickle_is_refused_without_being_run(saved, tmp_path):
    marker = tmp_path / "executed"
    data = pickle.dumps(Malicious(marker))
    (saved / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        DiffusionPolicy.from_pretrained(saved)
    torch.save(Malicious(marker), saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        DiffusionPolicy.from_pretrained(saved)
    assert not marker.exists()
    pickle.loads(data)
    assert marker.exists(), "the pickle does nothing: this test could not fail"


# ----------------------------------------------------------------------------------------------------------- padding

VALID = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
ACTIONS = torch.linspace(-0.5, 1, 40).view(5, 4, 2)


def cloning_loss(policy, actions, valid=VALID):
    return policy.loss(OBS, actions, valid=valid, generator=torch_generator(0))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("denoiser", SMALL_DENOISERS)
def test_predictions_for_padded_actions_are_no_part_of_the_loss(denoiser, prediction_type):
    """Whatever the network predicts there: the loss is the same, and no gradient comes from it."""
    config = replace(CONFIG, denoiser=SMALL_DENOISERS[denoiser], prediction_type=prediction_type)
    policy = make_policy(config=config)
    outputs = []

    def disturb(_, __, output):
        changed = torch.where(VALID[..., None], output, output + 100 * len(outputs)).detach().requires_grad_()
        outputs.append(changed)
        return changed

    policy.base.register_forward_hook(disturb)
    losses = [cloning_loss(policy, ACTIONS) for _ in range(2)]
    assert losses[0].equal(losses[1])
    sum(losses).backward()
    for output in outputs:
        assert output.grad[~VALID].eq(0).all()
        assert output.grad[VALID].ne(0).all()
    assert cloning_loss(policy, ACTIONS, None) != losses[0], "without the mask they count"


@pytest.mark.parametrize("denoiser", SMALL_DENOISERS)
def test_a_network_that_mixes_actions_sees_the_last_one_repeated(denoiser):
    policy = make_policy(config=replace(CONFIG, denoiser=SMALL_DENOISERS[denoiser]))
    last = VALID.sum(1) - 1
    repeated = torch.where(VALID[..., None], ACTIONS, ACTIONS[torch.arange(len(ACTIONS)), last][:, None])
    other = torch.where(VALID[..., None], ACTIONS, 1.0)
    assert not other.equal(repeated)
    assert cloning_loss(policy, other).equal(cloning_loss(policy, repeated))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_padded_actions_have_no_influence_but_as_the_networks_input(prediction_type):
    """Where a prediction depends on no other action than its own, the padding has none at all."""

    class ActionByAction(torch.nn.Module):
        def forward(self, noisy, timestep, condition):
            return 0.3 * noisy.sin() + 0.1 * timestep[:, None, None]

    policy = make_policy(config=replace(CONFIG, prediction_type=prediction_type))
    policy.base = ActionByAction()
    actions = ACTIONS.clone().requires_grad_()
    loss = cloning_loss(policy, actions)
    loss.backward()
    assert actions.grad[~VALID].eq(0).all()
    assert actions.grad[VALID].ne(0).all()
    for filling in (0.0, 1e3, -1.0):
        assert cloning_loss(policy, torch.where(VALID[..., None], ACTIONS, filling)).equal(loss)
    assert cloning_loss(policy, ACTIONS, None) != loss


@pytest.mark.parametrize("denoiser", SMALL_DENOISERS)
def test_loss_is_the_mean_over_valid_actions(denoiser, monkeypatch):
    policy = make_policy(config=replace(CONFIG, denoiser=SMALL_DENOISERS[denoiser]))
    every, target = torch.ones_like(VALID), torch.arange(ACTIONS.numel(), dtype=torch.float32).view_as(ACTIONS)
    torch.testing.assert_close(cloning_loss(policy, ACTIONS, every), cloning_loss(policy, ACTIONS, None))
    monkeypatch.setattr(policy.schedule, "target", lambda clean, noise, t: target)
    policy.base.register_forward_hook(lambda _, __, predicted: 0 * predicted)
    torch.testing.assert_close(cloning_loss(policy, ACTIONS), (target[VALID] ** 2).mean())


# ----------------------------------------------------------------------------------------------------- normalisers

NUMBERS = st.floats(-1e4, 1e4, width=32)


@settings(deadline=None, max_examples=50)
@given(arrays(np.float32, st.tuples(st.integers(1, 6), st.just(3)), elements=NUMBERS), st.data())
def test_unnormalize_is_the_inverse_of_normalize(values, data):
    fitted = torch.from_numpy(values)
    normalizer = MinMaxNormalizer(3)
    normalizer.fit(fitted)
    seen = torch.from_numpy(data.draw(arrays(np.float32, (2, 3), elements=NUMBERS)))
    magnitude = max(float(fitted.abs().max()), float(seen.abs().max()), 1.0)
    back = normalizer.unnormalize(normalizer.normalize(seen))
    assert float((back - seen).abs().max()) <= 1e-5 * magnitude
    inside, spread = normalizer.normalize(fitted), fitted.amax(0) - fitted.amin(0)
    rounding = 4 * torch.finfo(torch.float32).eps * magnitude / spread.clamp(min=CONSTANT)
    assert (inside.abs().amax(0) <= 1 + rounding).all()


def test_the_range_becomes_minus_one_to_one():
    normalizer = MinMaxNormalizer(2)
    normalizer.fit(torch.tensor([[0.0, -3.0], [4.0, 1.0], [1.0, 0.0]]))
    assert normalizer.normalize(torch.tensor([[0.0, -3.0], [4.0, 1.0]])).tolist() == [[-1, -1], [1, 1]]


def test_a_number_that_never_varied_is_only_shifted():
    normalizer = MinMaxNormalizer(2)
    normalizer.fit(torch.tensor([[5.0, 0.0], [5.0, 2.0]]))
    assert normalizer.normalize(torch.tensor([[5.0, 1.0], [5.5, 1.0]])).tolist() == [[0, 0], [0.5, 0]]
    assert normalizer.unnormalize(torch.tensor([[0.0, 0.0]])).tolist() == [[5, 1]]


# ------------------------------------------------------------------------------------------------------ randomness


def test_global_random_state_is_left_alone(tmp_path):
    def states():
        return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002

    before = states()
    policy = make_policy(tuned_below=2)
    policy.sample(OBS, generator=torch_generator(0))
    policy.predict(np.zeros((2, 3)), deterministic=True)
    policy.predict(np.zeros((2, 3)), generator=torch_generator(0))
    policy.loss(OBS, torch.zeros(5, 4, 2), generator=torch_generator(0))
    policy.save_pretrained(tmp_path / "policy")
    DiffusionPolicy.from_pretrained(Path(tmp_path / "policy"))
    assert states() == before


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    first = DiffusionPolicy(FEATURES, CONFIG, seed=3).state_dict()
    torch.manual_seed(6)
    again = DiffusionPolicy(FEATURES, CONFIG, seed=3).state_dict()
    other = DiffusionPolicy(FEATURES, CONFIG, seed=4).state_dict()
    assert all(first[name].equal(again[name]) for name in first)
    assert not first["base.net.0.weight"].equal(other["base.net.0.weight"])


# ----------------------------------------------------------------------------------------------------- bad observations


def seeing():
    return small_policy("diffusion", Features(3, 2, (CAMERA,)), vision=VIT, n_obs_steps=1)


def test_parts_may_be_arrays_of_any_float():
    policy = seeing()
    obs = random_batch(policy, 2)[0]
    loose = {name: part.numpy() for name, part in obs.items()}
    loose[STATE] = loose[STATE].astype(np.float64)
    noise = torch.ones(policy.n_draws(), 2, 3, 2)
    assert policy.sample(loose, noise=noise).equal(policy.sample(obs, noise=noise.double().numpy()))


def test_a_batch_may_be_empty():
    for policy in (make_policy(), seeing()):
        assert len(policy.sample(policy.blank_observation(0))) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda obs: obs | {CAMERA.part: obs[CAMERA.part].float()}, "torch.float32': images must be uint8"),
        (lambda obs: obs | {STATE: obs[STATE][:1]}, "all parts must have the same batch size"),
        (lambda obs: {STATE: obs[STATE]}, "must have the parts"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    policy = seeing()
    with pytest.raises(ConfigError, match=message):
        policy.sample(change(random_batch(policy, 2)[0]))


def test_predict_refuses_what_does_not_fit():
    policy = make_policy()
    _, state = policy.predict(np.zeros((2, 3)))
    with pytest.raises(ConfigError, match=r"episode_start = \(3,\): must have the shape \(2,\)"):
        policy.predict(np.zeros((2, 3)), state, np.zeros(3, bool))
    with pytest.raises(ConfigError, match="must be of the kind that the last call was given"):
        policy.predict({STATE: np.zeros((2, 3))}, state)
    with pytest.raises(ConfigError, match=r"observation\[1, 2\] = nan: observations must be finite"):
        policy.predict(np.array([[0, 0, 0], [0, 0, np.nan]]))


def test_steps_are_integers_however_often_one_asks():
    """A cache takes 4.0 for 4."""
    policy = make_policy()
    policy.sample(torch.zeros(1, 1, 3), num_inference_steps=4)
    with pytest.raises(ConfigError, match=r"num_inference_steps = 4\.0"):
        policy.sample(torch.zeros(1, 1, 3), num_inference_steps=4.0)


def test_eta_alone_is_for_a_policy_whose_own_solver_has_it():
    policy = make_policy(config=replace(CONFIG, sampling=SolverConfig("ddim")))
    obs, noise = torch.zeros(1, 1, 3), torch.ones(4, 1, 4, 2)
    assert policy.sample(obs, eta=0.5, noise=noise).equal(policy.sample(obs, solver="ddim", eta=0.5, noise=noise))
    with pytest.raises(ConfigError, match="only the solver ddim has it"):
        make_policy().sample(obs, eta=0.5)


def test_jitter_is_no_information():
    normalizer = MinMaxNormalizer(2)
    normalizer.fit(torch.tensor([[0.0, 1.0], [9e-5, 1.0002]]))
    assert float(normalizer.normalize(torch.tensor([0.001, 1.0]))[0]) == pytest.approx(0.001, abs=1e-4)
    assert float(normalizer.normalize(torch.tensor([0.0, 1.0002]))[1]) == pytest.approx(1.0, abs=1e-3)

"""Configs: strict JSON, and a message that names field and value for everything out of range."""

import json
import math
from dataclasses import dataclass, replace

import pytest

from dprl.agents import BCConfig, DPPOConfig
from dprl.config import from_json, to_json
from dprl.errors import ConfigError
from dprl.experiments.runs import CollectConfig, FinetuneConfig, PretrainConfig
from dprl.mdp import ExplorationConfig
from dprl.networks import MLPConfig
from dprl.policy import PolicyConfig
from dprl.spec import EnvOptions, EnvSpec
from dprl.training import LoopConfig

NAN = math.nan


@dataclass(frozen=True)
class Sizes:
    bounds: tuple[float, ...] = ()
    limit: int | None = None


POLICY = PolicyConfig(3, 2, horizon=8, n_action_steps=2, denoiser=MLPConfig(activation="mish"), env_id="Hopper-v5")
FINETUNE = FinetuneConfig(
    policy="runs/a",
    env="Hopper-v5",
    slice_size=4,
    dppo=DPPOConfig(tuned_steps=3, exploration=ExplorationConfig(noise_clip=2.0)),
    options=EnvOptions(reward="dense", max_episode_steps=9),
)


@pytest.mark.parametrize("config", [POLICY, FINETUNE, Sizes((0.1, 2.0), 7), Sizes()], ids=lambda c: type(c).__name__)
def test_round_trip_through_json_text(config):
    assert from_json(type(config), json.loads(json.dumps(to_json(config))), "here") == config


@pytest.mark.parametrize(
    ("cls", "data", "message"),
    [
        (MLPConfig, {"hiden_size": 8}, "file.json: unknown key 'hiden_size' for MLPConfig. Did you mean hidden_size"),
        (MLPConfig, {"hidden_size": "8"}, "file.json: hidden_size = '8': must be of type int"),
        (MLPConfig, {"hidden_size": 8.0}, "file.json: hidden_size = 8.0: must be of type int"),
        (MLPConfig, {"hidden_size": True}, "file.json: hidden_size = True: must be of type int"),
        (MLPConfig, {"hidden_size": None}, "file.json: hidden_size = None: must be of type int"),
        (ExplorationConfig, {"noise_clip": True}, "file.json: noise_clip = True: must be of type float"),
        (DPPOConfig, {"normalize_returns": 1}, "file.json: normalize_returns = 1: must be of type bool"),
        (MLPConfig, {"activation": "gelu"}, "file.json: activation = 'gelu': must be one of relu, mish"),
        (MLPConfig, [], "file.json: expected an object with the keys of MLPConfig, found []"),
        (PolicyConfig, {"observation_size": 3}, "file.json: PolicyConfig lacks the key 'action_size'"),
        (PolicyConfig, {"env_id": 3}, "file.json: env_id = 3: must be of type str"),
        (PretrainConfig, {"data": "d", "n_action_steps": "2"}, "file.json: n_action_steps = '2': must be of type int"),
        (
            FinetuneConfig,
            {"policy": "p", "env": "e", "dppo": {"exploration": {"noise_clip": "3"}}},
            "file.json: dppo: exploration: noise_clip = '3': must be of type float",
        ),
        (
            FinetuneConfig,
            {"policy": "p", "env": "e", "dppo": {"tuned_stesp": 3}},
            "file.json: dppo: unknown key 'tuned_stesp' for DPPOConfig. Did you mean tuned_steps",
        ),
        (FinetuneConfig, {"policy": "p", "env": "e", "options": {"reward": "shaped"}}, "options: reward = 'shaped'"),
        (Sizes, {"bounds": 1.0}, "file.json: bounds = 1.0: must be a list"),
        (Sizes, {"bounds": [1.0, "x"]}, "file.json: bounds[1] = 'x': must be of type float"),
        (Sizes, {"limit": 1.5}, "file.json: limit = 1.5: must be of type int"),
    ],
)
def test_wrong_json_is_explained(cls, data, message):
    with pytest.raises(ConfigError) as caught:
        from_json(cls, data, "file.json")
    assert message in str(caught.value)


def test_a_value_out_of_range_is_located_too():
    data = {"policy": "p", "env": "e", "dppo": {"exploration": {"noise_clip": -1.0}}}
    with pytest.raises(ConfigError) as caught:
        from_json(FinetuneConfig, data, "file.json")
    assert "file.json: dppo: exploration: noise_clip = -1.0: must be above 0" in str(caught.value)


def test_whole_numbers_are_taken_for_floats_and_lists_for_tuples():
    loaded = from_json(Sizes, {"bounds": [1, 2]}, "here")
    assert loaded == Sizes((1.0, 2.0))
    assert all(type(bound) is float for bound in loaded.bounds)


def test_none_fits_an_optional_field_only():
    assert from_json(PretrainConfig, {"data": "d", "n_action_steps": None}, "here").n_action_steps is None
    with pytest.raises(ConfigError, match="horizon = None"):
        from_json(PretrainConfig, {"data": "d", "horizon": None}, "here")


OK = {  # what each class needs besides the field under test
    PolicyConfig: {"observation_size": 3, "action_size": 2},
    LoopConfig: {"total_timesteps": 1},
    CollectConfig: {"env": "e"},
    PretrainConfig: {"data": "d"},
    FinetuneConfig: {"policy": "p", "env": "e"},
    EnvSpec: {
        "id": "e", "builder": "m:f", "backend_id": "e", "observation_size": 3, "action_low": (-1.0,),
        "action_high": (1.0,), "max_episode_steps": 5,
    },
}  # fmt: skip

REFUSED = [
    (MLPConfig, {"hidden_size": 0}, "hidden_size"),
    (MLPConfig, {"hidden_size": -8}, "hidden_size"),
    (MLPConfig, {"n_blocks": 0}, "n_blocks"),
    (MLPConfig, {"activation": "gelu"}, "activation"),
    (MLPConfig, {"time_size": 2}, "time_size"),
    (MLPConfig, {"time_size": 5}, "time_size"),
    (MLPConfig, {"time_size": -4}, "time_size"),
    (PolicyConfig, {"observation_size": 0}, "observation_size"),
    (PolicyConfig, {"observation_size": -1}, "observation_size"),
    (PolicyConfig, {"action_size": 0}, "action_size"),
    (PolicyConfig, {"horizon": 0}, "horizon"),
    (PolicyConfig, {"n_obs_steps": 0}, "n_obs_steps"),
    (PolicyConfig, {"num_train_timesteps": 0}, "num_train_timesteps"),
    (PolicyConfig, {"n_action_steps": 0}, "n_action_steps"),
    (PolicyConfig, {"n_action_steps": 5}, "n_action_steps"),
    (PolicyConfig, {"clip_sample": 0.0}, "clip_sample"),
    (PolicyConfig, {"clip_sample": NAN}, "clip_sample"),
    (BCConfig, {"batch_size": 0}, "batch_size"),
    (BCConfig, {"steps_per_iteration": 0}, "steps_per_iteration"),
    (BCConfig, {"learning_rate": 0.0}, "learning_rate"),
    (BCConfig, {"learning_rate": NAN}, "learning_rate"),
    (BCConfig, {"final_learning_rate": -1e-4}, "final_learning_rate"),
    (BCConfig, {"weight_decay": -1e-6}, "weight_decay"),
    (BCConfig, {"ema_decay": 1.0}, "ema_decay"),
    (BCConfig, {"ema_decay": -0.1}, "ema_decay"),
    (BCConfig, {"ema_decay": NAN}, "ema_decay"),
    (DPPOConfig, {"tuned_steps": 0}, "tuned_steps"),
    (DPPOConfig, {"n_steps": 0}, "n_steps"),
    (DPPOConfig, {"n_epochs": 0}, "n_epochs"),
    (DPPOConfig, {"batch_size": -1}, "batch_size"),
    (DPPOConfig, {"critic_hidden_size": 0}, "critic_hidden_size"),
    (DPPOConfig, {"learning_rate": 0.0}, "learning_rate"),
    (DPPOConfig, {"critic_learning_rate": -1.0}, "critic_learning_rate"),
    (DPPOConfig, {"gamma": 1.01}, "gamma"),
    (DPPOConfig, {"gamma": -0.1}, "gamma"),
    (DPPOConfig, {"gamma": NAN}, "gamma"),
    (DPPOConfig, {"gae_lambda": 1.5}, "gae_lambda"),
    (DPPOConfig, {"denoising_discount": -1.0}, "denoising_discount"),
    (DPPOConfig, {"clip_range": 0.0}, "clip_range"),
    (DPPOConfig, {"clip_range_base": 0.0}, "clip_range_base"),
    (DPPOConfig, {"clip_range_base": 0.5}, "clip_range_base"),
    (DPPOConfig, {"clip_range_rate": 0.0}, "clip_range_rate"),
    (DPPOConfig, {"vf_coef": -0.5}, "vf_coef"),
    (DPPOConfig, {"target_kl": 0.0}, "target_kl"),
    (DPPOConfig, {"critic_warmup": -1}, "critic_warmup"),
    (ExplorationConfig, {"min_sampling_std": 0.0}, "min_sampling_std"),
    (ExplorationConfig, {"min_log_prob_std": -0.1}, "min_log_prob_std"),
    (ExplorationConfig, {"noise_clip": 0.0}, "noise_clip"),
    (ExplorationConfig, {"noise_clip": NAN}, "noise_clip"),
    (LoopConfig, {"total_timesteps": 0}, "total_timesteps"),
    (LoopConfig, {"eval_every": -1}, "eval_every"),
    (LoopConfig, {"checkpoint_every": 0}, "checkpoint_every"),
    (CollectConfig, {"noise": -0.1}, "noise"),
    (CollectConfig, {"noise": NAN}, "noise"),
    (CollectConfig, {"episodes": 0}, "episodes"),
    (CollectConfig, {"episodes": -3}, "episodes"),
    (PretrainConfig, {"eval_episodes": 0}, "eval_episodes"),
    (PretrainConfig, {"n_action_steps": 0}, "n_action_steps"),
    (PretrainConfig, {"n_action_steps": 5}, "n_action_steps"),
    (FinetuneConfig, {"n_envs": 0}, "n_envs"),
    (FinetuneConfig, {"eval_episodes": 0}, "eval_episodes"),
    (FinetuneConfig, {"workers": -1}, "workers"),
    (EnvSpec, {"max_episode_steps": 0}, "max_episode_steps"),
    (EnvSpec, {"n_obs_steps": 0}, "n_obs_steps"),
    (EnvSpec, {"reward": "sparse"}, "reward"),
]


@pytest.mark.parametrize(
    ("cls", "values", "field"), REFUSED, ids=[f"{c.__name__}-{k}={v}" for c, kv, _ in REFUSED for k, v in kv.items()]
)
def test_out_of_range_is_refused_by_name(cls, values, field):
    valid = cls(**OK.get(cls, {}))
    with pytest.raises(ConfigError) as caught:
        replace(valid, **values)
    (value,) = values.values()
    assert str(caught.value).startswith(f"{field} = {value!r}: must ") or field == "reward"
    assert f"{field} = {value!r}" in str(caught.value)

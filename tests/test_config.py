"""Configs: strict JSON, and a message that names field and value for everything out of range."""

import json
import math
from dataclasses import dataclass, replace

import pytest

from dprl.agents import BCConfig, DPPOConfig
from dprl.config import from_json, to_json
from dprl.diffusion import ScheduleConfig, SolverConfig
from dprl.errors import ConfigError
from dprl.experiments.runs import CollectConfig, FinetuneConfig, PretrainConfig
from dprl.mdp import ExplorationConfig
from dprl.networks import MLPConfig, TransformerConfig, UNetConfig
from dprl.policy import DiffusionConfig, Features, InferenceConfig, Policy
from dprl.spec import EnvOptions, EnvSpec
from dprl.training import LoopConfig

NAN = math.nan


@dataclass(frozen=True)
class Sizes:
    bounds: tuple[float, ...] = ()
    limit: int | None = None


POLICY = DiffusionConfig(horizon=8, n_action_steps=2, denoiser=MLPConfig(activation="mish"))
VARIED = DiffusionConfig(
    schedule="scaled_linear", prediction_type="sample", beta_end=0.05, clip_sample=None,
    denoiser=UNetConfig(down_dims=(8, 16)), sampling=SolverConfig("ddim", 5, 0.5, "trailing"),
)  # fmt: skip
FLOW = DiffusionConfig(schedule="rectified_flow", prediction_type="velocity", denoiser=TransformerConfig(n_layers=2))
POLICIES = [POLICY, VARIED, FLOW, *(kind.config_class() for kind in Policy.kinds.values())]
FINETUNE = FinetuneConfig(
    policy="runs/a",
    env="Hopper-v5",
    slice_size=4,
    dppo=DPPOConfig(tuned_steps=3, solver=SolverConfig("ddim", 5, 1.0), exploration=ExplorationConfig(noise_clip=2.0)),
    options=EnvOptions(reward="dense", max_episode_steps=9),
)


ROUND_TRIPS = [
    *POLICIES, *(PretrainConfig("d", policy=config) for config in POLICIES), FINETUNE, Sizes((0.1, 2.0), 7), Sizes(),
    Features(3, 2, env_id="Hopper-v5"), InferenceConfig("ddim", 5, 0.5, temperature=0.5, warm_start_steps=2),
    BCConfig(max_grad_norm=1.0, ema_power=0.75),
]  # fmt: skip


@pytest.mark.parametrize("config", ROUND_TRIPS, ids=lambda c: type(c).__name__)
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
        (Features, {"observation_size": 3}, "file.json: Features lacks the key 'action_size'"),
        (Features, {"env_id": 3}, "file.json: env_id = 3: must be of type str"),
        (
            DiffusionConfig,
            {"prediction": "sample"},
            "unknown key 'prediction' for DiffusionConfig. Did you mean predict",
        ),
        (DiffusionConfig, {"sampling": {"solvr": "ddim"}}, "file.json: sampling: unknown key 'solvr' for SolverConfig"),
        (DiffusionConfig, {"schedule": "cosine"}, "file.json: schedule = 'cosine': must be one of squaredcos_cap_v2"),
        (DiffusionConfig, {"prediction_type": "velocity"}, "file.json: prediction_type = 'velocity': must be epsilon"),
        (DiffusionConfig, {"sampling": {"solver": "euler"}}, "file.json: solver = 'euler': must be ddpm, ddim"),
        (PretrainConfig, {"data": "d", "episodes": "2"}, "file.json: episodes = '2': must be of type int"),
        (
            PretrainConfig,
            {"data": "d", "policy": {**to_json(POLICY), "n_action_steps": "2"}},
            "file.json: policy: n_action_steps = '2': must be of type int",
        ),
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
        (
            DiffusionConfig,
            {"denoiser": {"down_dims": [12]}},
            "down_dims[0] = 12: must be a positive multiple",
        ),
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
    assert from_json(DiffusionConfig, {"n_action_steps": None}, "here").n_action_steps is None
    assert from_json(PretrainConfig, {"data": "d", "episodes": None}, "here").episodes is None
    with pytest.raises(ConfigError, match="horizon = None"):
        from_json(DiffusionConfig, {"horizon": None}, "here")
    with pytest.raises(ConfigError, match="steps = None"):
        from_json(PretrainConfig, {"data": "d", "steps": None}, "here")


OK = {  # what each class needs besides the field under test
    Features: {"observation_size": 3, "action_size": 2},
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
    (Features, {"observation_size": 0}, "observation_size"),
    (Features, {"observation_size": -1}, "observation_size"),
    (Features, {"action_size": 0}, "action_size"),
    (DiffusionConfig, {"horizon": 0}, "horizon"),
    (DiffusionConfig, {"n_obs_steps": 0}, "n_obs_steps"),
    (DiffusionConfig, {"num_train_timesteps": 0}, "num_train_timesteps"),
    (DiffusionConfig, {"n_action_steps": 0}, "n_action_steps"),
    (DiffusionConfig, {"n_action_steps": 5}, "n_action_steps"),
    (DiffusionConfig, {"clip_sample": 0.0}, "clip_sample"),
    (DiffusionConfig, {"clip_sample": NAN}, "clip_sample"),
    (DiffusionConfig, {"clip_sample": -1.0}, "clip_sample"),
    (DiffusionConfig, {"beta_start": 0.0}, "beta_start"),
    (DiffusionConfig, {"beta_end": 1.0}, "beta_end"),
    (DiffusionConfig, {"beta_end": 1e-5}, "beta_end"),
    (DiffusionConfig, {"prediction_type": "velocity"}, "prediction_type"),
    (DiffusionConfig, {"prediction_type": "noise"}, "prediction_type"),
    (DiffusionConfig, {"schedule": "cosine"}, "schedule"),
    (ScheduleConfig, {"num_train_timesteps": 0}, "num_train_timesteps"),
    (ScheduleConfig, {"beta_start": NAN}, "beta_start"),
    (SolverConfig, {"solver": "plms"}, "solver"),
    (SolverConfig, {"num_inference_steps": 0}, "num_inference_steps"),
    (SolverConfig, {"eta": -0.1}, "eta"),
    (SolverConfig, {"eta": NAN}, "eta"),
    (SolverConfig, {"timestep_spacing": "karras"}, "timestep_spacing"),
    (InferenceConfig, {"temperature": -0.1}, "temperature"),
    (InferenceConfig, {"temperature": NAN}, "temperature"),
    (InferenceConfig, {"temporal_ensembling": -0.1}, "temporal_ensembling"),
    (InferenceConfig, {"warm_start_steps": 0}, "warm_start_steps"),
    (BCConfig, {"batch_size": 0}, "batch_size"),
    (BCConfig, {"steps_per_iteration": 0}, "steps_per_iteration"),
    (BCConfig, {"learning_rate": 0.0}, "learning_rate"),
    (BCConfig, {"learning_rate": NAN}, "learning_rate"),
    (BCConfig, {"learning_rate": 1e300}, "learning_rate"),
    (BCConfig, {"batch_size": 10**20}, "batch_size"),
    (BCConfig, {"final_learning_rate": -1e-4}, "final_learning_rate"),
    (BCConfig, {"weight_decay": -1e-6}, "weight_decay"),
    (BCConfig, {"ema_decay": 1.0}, "ema_decay"),
    (BCConfig, {"ema_decay": -0.1}, "ema_decay"),
    (BCConfig, {"ema_decay": NAN}, "ema_decay"),
    (BCConfig, {"warmup_steps": -1}, "warmup_steps"),
    (BCConfig, {"pad_after": -1}, "pad_after"),
    (BCConfig, {"num_workers": -1}, "num_workers"),
    (BCConfig, {"validation_every": 0}, "validation_every"),
    (BCConfig, {"validation_share": 1.0}, "validation_share"),
    (BCConfig, {"validation_share": -0.1}, "validation_share"),
    (BCConfig, {"max_grad_norm": 0.0}, "max_grad_norm"),
    (BCConfig, {"ema_power": 0.0}, "ema_power"),
    (BCConfig, {"precision": "float16"}, "precision"),
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
    (ExplorationConfig, {"min_log_prob_std": 0.05}, "min_log_prob_std"),
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
    (PretrainConfig, {"steps": 0}, "steps"),
    (PretrainConfig, {"episodes": 0}, "episodes"),
    (PretrainConfig, {"eval_every": -1}, "eval_every"),
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

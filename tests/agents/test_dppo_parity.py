"""Our numbers equal those the DPPO authors' own code produced (see tests/fixtures): 1e-5 of a tensor's largest."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dprl.agents import DPPO, DPPOConfig
from dprl.agents.targets import Pairs, Targets
from dprl.diffusion import SolverConfig
from dprl.envs.chunked import ChunkedEnv
from dprl.interop import dppo
from dprl.mdp import ExplorationConfig
from dprl.networks import DenoiserConfig, MLPConfig, UNetConfig
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features, denoising_loss
from dprl.spec import EnvSpec
from dprl.training.figures import UpdateFigures
from tests.toys import Reach

FIXTURES = Path(__file__).parent.parent / "fixtures"
SETTINGS = json.loads((FIXTURES / "meta.json").read_text())
CASES = ("dppo_mlp_ddpm", "dppo_mlp_ddpm_all_steps", "dppo_mlp_ddim", "dppo_unet_ddpm")
TOLERANCE = 1e-5


def denoiser_config(settings: dict[str, Any]) -> DenoiserConfig:
    k = settings["network_kwargs"]
    if settings["network"] == "mlp":
        return MLPConfig(hidden_size=k["mlp_dims"][0], n_blocks=1, activation="relu", time_size=k["time_dim"])
    return UNetConfig(
        down_dims=tuple(k["dim"] * m for m in k["dim_mults"]),
        kernel_size=k["kernel_size"],
        n_groups=k["n_groups"],
        time_size=k["diffusion_step_embed_dim"],
        film="scale_bias" if k["cond_predict_scale"] else "bias",
        condition_encoder="linear" if k["smaller_encoder"] else "mlp",
    )


def denoiser_state(network: str, data: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return (dppo.mlp_state if network == "mlp" else dppo.unet_state)(data, prefix)


class Case:
    """One fixture with an agent in its shape and with its weights."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.data, s = load_file(FIXTURES / f"{name}.safetensors"), SETTINGS[name]
        self.settings = s
        policy_config = DiffusionConfig(
            horizon=s["horizon_steps"],
            n_action_steps=s["executed_steps"],
            num_train_timesteps=s["denoising_steps"],
            clip_sample=s["denoised_clip_value"],
            denoiser=denoiser_config(s),
            sampling=SolverConfig("ddim", s["ddim_steps"]) if s.get("use_ddim") else SolverConfig(),
        )
        exploration = ExplorationConfig(
            s["min_sampling_denoising_std"], s["min_logprob_denoising_std"], s["randn_clip_value"]
        )
        self.config = DPPOConfig(
            tuned_steps=s["ft_denoising_steps"],
            denoising_discount=s["gamma_denoising"],
            clip_range=s["clip_ploss_coef"],
            clip_range_base=s["clip_ploss_coef_base"],
            clip_range_rate=s["clip_ploss_coef_rate"],
            vf_coef=s["vf_coef"],
            solver=SolverConfig("ddim", eta=1.0) if s.get("use_ddim") else SolverConfig(),
            exploration=exploration,
            critic_hidden_size=s["critic_mlp_dims"][0],
            critic_activation="mish",
        )
        self.policy = DiffusionPolicy(Features(s["obs_dim"], s["action_dim"]), policy_config)
        low, high = (-1.0,) * s["action_dim"], (1.0,) * s["action_dim"]
        spec = EnvSpec("toy/parity", "", "", s["obs_dim"], low, high, max_episode_steps=8)  # it is never stepped
        self.agent = DPPO(self.policy, ChunkedEnv(spec, Reach([0]), [0]), self.config)
        self.mdp, self.critic = self.agent.mdp, self.agent.critic.net
        self.policy.base.load_state_dict(denoiser_state(s["network"], self.data, "frozen."))
        self.policy.tuned.load_state_dict(denoiser_state(s["network"], self.data, "tuned."))
        self.critic.load_state_dict(dppo.critic_state(self.data, "critic."))

    def double(self) -> "Case":
        """The same in float64."""
        self.policy.double()
        self.critic.double()
        self.data = {name: t.double() if t.is_floating_point() else t for name, t in self.data.items()}
        return self


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.detach() - theirs).abs().max() / theirs.abs().max())


def report(name: str, what: str, value: float) -> None:
    print(f"parity {name:<28} {what:<26} {value:.1e}")


def test_noisy_actions_and_bc_loss() -> None:
    data, s = load_file(FIXTURES / "bc_loss.safetensors"), SETTINGS["bc_loss"]
    policy = DiffusionPolicy(
        Features(s["obs_dim"], s["action_dim"]),
        DiffusionConfig(
            horizon=s["horizon"],
            n_action_steps=s["horizon"],
            num_train_timesteps=s["denoising_steps"],
            denoiser=MLPConfig(hidden_size=64, activation="relu", time_size=16),
        ),
    )
    policy.base.load_state_dict(dppo.mlp_state(data, "net."))
    noisy = policy.schedule.add_noise(data["actions"], data["noise"], data["timesteps"])
    condition = policy.condition(data["obs"])
    loss = denoising_loss(policy.base, policy.schedule, data["actions"], condition, data["timesteps"], data["noise"])
    for what, ours in (("noisy", noisy), ("loss", loss)):
        report("bc_loss", what, relative(ours, data[what]))
        assert relative(ours, data[what]) < TOLERANCE


def test_log_probs_of_chains(case: Case) -> None:
    condition, chains = case.policy.condition(case.data["obs"]), case.data["chains"]
    steps = case.config.tuned_steps
    ours = torch.stack(
        [
            case.mdp.log_prob(condition, chains[:, i], chains[:, i + 1], torch.full((len(chains),), steps - 1 - i))
            for i in range(steps)
        ],
        dim=1,
    )
    report(case.name, "log_probs", relative(ours, case.data["log_probs"]))
    assert relative(ours, case.data["log_probs"]) < TOLERANCE


def test_deterministic_evaluation_actions(case: Case) -> None:
    """The authors clamp every draw but the initial one; their floor of 1e-3 is below every step's std but the last."""
    noise = case.data["eval_noise"][: case.policy.n_draws()].clone()
    noise[1:] = noise[1:].clamp(-case.settings["randn_clip_value"], case.settings["randn_clip_value"])
    ours = case.policy.sample(case.data["obs"], noise=noise)
    report(case.name, "eval_actions", relative(ours, case.data["eval_actions"]))
    assert relative(ours, case.data["eval_actions"]) < TOLERANCE


def update(case: Case) -> dict[str, Tensor]:
    """What the agent's own update of the fixture's minibatch reports; its gradients stay in `case`'s networks."""
    data, config = case.data, case.config
    decision, position = data["batch_index"], data["batch_denoising_index"]
    rows, k = torch.arange(len(decision)), config.tuned_steps - 1 - position
    executed = torch.full((len(rows),), case.settings["executed_steps"])
    old_log_prob = torch.full((len(rows), config.tuned_steps), float("nan"), dtype=data["old_log_probs"].dtype)
    old_log_prob[rows, k] = case.agent._chunk_log_prob(data["old_log_probs"], executed)
    advantage = data["advantages"][:, None].expand_as(old_log_prob)
    chains, obs = data["chains"][decision], data["obs"][decision]
    targets = Targets(obs, chains, executed, old_log_prob, advantage, data["old_values"], data["returns"])
    figures = UpdateFigures(config.tuned_steps, torch.device("cpu"))
    case.agent._update_critic(targets, rows, Pairs(rows, k), figures)
    case.agent._update_actor(targets, Pairs(rows, k), figures)
    return {name: torch.tensor(value) for name, value in figures.metrics("ours").items()}


@pytest.mark.parametrize("name", CASES)
def test_losses(name: str) -> None:
    case = Case(name)
    found = update(case)
    for what in ("policy_loss", "value_loss", "clip_fraction", "ratio_mean"):
        difference = relative(found[f"ours/{what}"], case.data[what])
        report(name, what, difference)
        assert difference < TOLERANCE, what
    kl_difference = float((found["ours/approx_kl"] - case.data["approx_kl"]).abs())
    report(name, "approx_kl (absolute)", kl_difference)
    assert kl_difference < 1e-7


@pytest.mark.parametrize("name", CASES)
def test_every_gradient(name: str) -> None:
    """In float64: a gradient sums so many float32 roundings that the processor's order of them would count."""
    case = Case(name).double()
    data = case.data
    update(case)
    named = {name: p.grad for name, p in case.policy.tuned.named_parameters()}
    theirs = denoiser_state(case.settings["network"], data, "grad.tuned.")
    theirs_critic = dppo.critic_state(data, "grad.critic.")
    assert named.keys() == theirs.keys()
    gradients = [(name, named[name], theirs[name]) for name in named]
    gradients += [(name, p.grad, theirs_critic[name]) for name, p in case.critic.named_parameters()]
    worst = 0.0
    for what, ours, expected in gradients:
        assert relative(ours, expected) < TOLERANCE, what
        worst = max(worst, relative(ours, expected))
    report(case.name, f"worst of {len(gradients)} gradients", worst)
    assert sum(name.startswith("grad.") for name in data) == len(gradients)
    assert all(p.grad is None for p in case.policy.base.parameters()), "the frozen network must get no gradient"

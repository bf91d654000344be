"""The main job, cut down to seconds, end to end."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from dprl.cli import main
from dprl.config import from_json, to_json
from dprl.diffusion import solver_steps
from dprl.diffusion.solvers import SolverName
from dprl.envs import envpool, rendering
from dprl.errors import ConfigError
from dprl.experiments.catalogue import CATALOGUE, find
from dprl.experiments.demo import NETWORKS, with_network, with_solver
from dprl.log import read_metrics
from dprl.mdp import DenoisingMDP
from dprl.policy import DiffusionConfig, DiffusionPolicy, Features
from dprl.seeding import torch_generator
from dprl.training import RunFolder

PUSH = find("push")


@pytest.mark.skipif(not envpool.available(), reason="EnvPool is not installed")
def test_smoke_demo_leaves_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "find_backend", lambda: None)  # drawing frames takes long
    out = tmp_path / "demo"
    assert main(["demo", "smoke", "--out", str(out), "--quiet"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for line in ("demonstrations", "behaviour cloning", "fine-tuned (DPPO)", "apt-get install libegl1"):
        assert line in printed
    results = json.loads((out / "results.json").read_text())
    assert results["before"]["episodes"] == results["after"]["episodes"] == find("smoke").eval_episodes
    assert results["before"]["seed"] == results["after"]["seed"], "the same held-out starts"
    for name in ("learning_curve.png", "trajectories.png", "data/data/main_data.hdf5", "finetune/checkpoints/last"):
        assert (out / name).exists()
    assert main(["demo", "smoke", "--out", str(out), "--quiet"]) == 2, "nothing is overwritten"


@pytest.mark.full
@pytest.mark.skipif(not envpool.available(), reason="EnvPool is not installed")
def test_an_interrupted_demo_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save, seen, out = RunFolder.save, [], tmp_path / "demo"

    def interrupted(self: RunFolder, *args: object, **options: object) -> None:
        save(self, *args, **options)
        seen.append(self.path.name)
        if seen == ["pretrain", "pretrain", "finetune"]:
            os.kill(os.getpid(), signal.SIGINT)

    command = ["demo", "smoke", "--out", str(out), "--quiet", "--no-pictures"]
    monkeypatch.setattr(RunFolder, "save", interrupted)
    assert main(command) == 130
    assert "the same command, with the --out of this folder, goes on" in capsys.readouterr().err
    assert main([*command, "--seed", "1"]) == 2, "that is another demo"
    cloned = (out / "pretrain" / "metrics.jsonl").read_bytes()
    assert main(command) == 0
    assert (out / "pretrain" / "metrics.jsonl").read_bytes() == cloned, "cloned once"
    assert [row["iteration"] for row in read_metrics(out / "finetune")] == list(range(seen.count("finetune")))
    assert len(json.loads((out / "results.json").read_text())["rows"]) == 3


def test_every_experiment_resolves_and_agrees_with_itself() -> None:
    for experiment in CATALOGUE:
        assert experiment.collect.env == experiment.finetune.env
        policy = experiment.pretrain.policy
        assert isinstance(policy, DiffusionConfig)
        assert experiment.finetune.dppo.tuned_steps <= policy.num_train_timesteps


# ------------------------------------------------------------------------------------------------ networks and solvers


@pytest.mark.parametrize("network", NETWORKS)
def test_another_network_changes_nothing_else(network: str) -> None:
    changed = with_network(PUSH, network)
    policy = changed.pretrain.policy
    assert isinstance(policy, DiffusionConfig)
    assert policy.denoiser == NETWORKS[network]
    assert replace(policy, denoiser=PUSH.pretrain.policy.denoiser) == PUSH.pretrain.policy
    assert replace(changed, pretrain=PUSH.pretrain) == PUSH
    assert DiffusionPolicy(Features(39, 4), policy).sample(torch.zeros(2, 1, 39)).shape == (2, 4, 4)


def test_the_default_network_is_the_experiments() -> None:
    assert with_network(PUSH, "mlp") == PUSH


@pytest.mark.parametrize("steps", [None, 5])
@pytest.mark.parametrize("solver", get_args(SolverName))
def test_a_solver_is_sampled_and_tuned_through(solver: SolverName, steps: int | None) -> None:
    """Every config fits the others: the policy can be made, sampled, given to DPPO and stored."""
    experiment = with_solver(with_network(PUSH, "unet"), solver, steps)
    policy_config, dppo = experiment.pretrain.policy, experiment.finetune.dppo
    assert isinstance(policy_config, DiffusionConfig)
    assert policy_config.denoiser == NETWORKS["unet"]
    assert policy_config.sampling.solver == solver
    assert steps is None or policy_config.sampling.num_inference_steps == steps
    assert policy_config.sampling.eta == 0, "evaluations explore no more than the solver does"
    assert (policy_config.schedule == "rectified_flow") == (solver == "euler")
    looks_back = solver.endswith("dpmsolver++")
    assert dppo.solver.solver == ("ddpm" if looks_back else solver)
    assert dppo.solver.eta == (1 if solver == "ddim" else 0)
    tuned = solver_steps(policy_config.noise, dppo.solver.over(policy_config.sampling, policy_config.noise))
    assert dppo.tuned_steps == len(tuned), "all of them"
    if looks_back:
        assert dppo.tuned_steps == policy_config.num_train_timesteps, "whatever timesteps the solver visits"
    elif steps is not None:
        assert dppo.tuned_steps == steps
    policy = DiffusionPolicy(Features(39, 4), policy_config)
    mdp = DenoisingMDP(policy, dppo.tuned_steps, dppo.exploration, dppo.solver)
    chain = mdp.sample(torch.zeros(2, 1, 39), generator=torch_generator(0))
    assert chain.steps.shape == (2, dppo.tuned_steps + 1, 4, 4)
    assert policy.sample(torch.zeros(2, 1, 39)).shape == (2, 4, 4)
    for config in (experiment.pretrain, experiment.finetune):
        assert from_json(type(config), json.loads(json.dumps(to_json(config))), "run.json") == config
    assert experiment.collect == PUSH.collect
    assert experiment.pretrain.steps == PUSH.pretrain.steps


@pytest.mark.parametrize("solver", get_args(SolverName))
def test_a_decision_takes_ten_steps_by_default(solver: SolverName) -> None:
    """As `dprl demo --help` says; fewer where a solver visits no timestep twice."""
    policy = with_solver(PUSH, solver, None).pretrain.policy
    assert isinstance(policy, DiffusionConfig)
    assert 9 <= len(solver_steps(policy.noise, policy.sampling)) <= 10


@pytest.mark.parametrize("solver", get_args(SolverName))
def test_a_solver_keeps_the_policys_chunks(solver: SolverName) -> None:
    policy = replace(PUSH.pretrain.policy, horizon=8, n_action_steps=2, n_obs_steps=3)
    changed = replace(PUSH, pretrain=replace(PUSH.pretrain, policy=policy))
    found = with_solver(changed, solver, None).pretrain.policy
    assert (found.horizon, found.n_action_steps, found.n_obs_steps) == (8, 2, 3)


@pytest.mark.parametrize(("solver", "steps"), [("ddpm", 0), ("ddim", 11), ("dpmsolver++", 11), ("euler", 101)])
def test_a_number_of_steps_that_does_not_fit_is_refused(solver: SolverName, steps: int) -> None:
    with pytest.raises(ConfigError, match=f"num_inference_steps = {steps}"):
        with_solver(PUSH, solver, steps)


@pytest.mark.full
@pytest.mark.skipif(not envpool.available(), reason="EnvPool is not installed")
@pytest.mark.parametrize(
    "options", ["--denoiser unet --solver ddim", "--denoiser transformer --solver dpmsolver++ --num-inference-steps 5",
                "--solver euler --num-inference-steps 5"]
)  # fmt: skip
def test_smoke_demo_with_another_network_and_solver(tmp_path: Path, options: str) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "smoke", "--out", str(out), "--quiet", "--no-pictures", *options.split()]) == 0
    results = json.loads((out / "results.json").read_text())
    assert [row["stage"] for row in results["rows"]] == ["demonstrations", "behaviour cloning", "fine-tuned (DPPO)"]
    tuned = DiffusionPolicy.from_pretrained(out / "finetune")
    assert tuned.tuned is not None

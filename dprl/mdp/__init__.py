"""Policies as Markov decision processes, to be tuned with reward."""

from __future__ import annotations

from dprl.diffusion import SolverConfig
from dprl.errors import check
from dprl.mdp.action import ActionMDP
from dprl.mdp.base import Chain, ExplorationConfig, Gaussian, PolicyMDP
from dprl.mdp.denoising import DenoisingMDP
from dprl.mdp.exact import ExactMDP
from dprl.policy import DiffusionPolicy, GaussianPolicy, GMMPolicy, LSTMGMMPolicy, Policy

__all__ = ["ActionMDP", "Chain", "DenoisingMDP", "ExactMDP", "ExplorationConfig", "Gaussian", "PolicyMDP", "mdp_of"]


def mdp_of(
    policy: Policy,
    tuned_steps: int,
    exploration: ExplorationConfig,
    solver: SolverConfig,
    *,
    exact: bool = False,
    seed: int = 0,
) -> PolicyMDP:
    """Return the decision process of a policy: `DenoisingMDP`, `ActionMDP`, or where it is to be `exact`, `ExactMDP`.

    Raises:
        ConfigError: it has no density to tune, or not so many steps.
    """
    told = policy.config.command if isinstance(policy, DiffusionPolicy) else None
    check(told is None, "policy", f"told its {told}", "must be one without a command: what it does when told would not "
          "be tuned, and no longer be what it was")  # fmt: skip
    if isinstance(policy, DiffusionPolicy) and exact:
        check(tuned_steps == 1, "tuned_steps", tuned_steps, "must be 1: with the exact likelihood a chunk is one step")
        return ExactMDP(policy, exploration, solver)
    if isinstance(policy, DiffusionPolicy):
        return DenoisingMDP(policy, tuned_steps, exploration, solver, seed=seed)
    tunable = isinstance(policy, GaussianPolicy | GMMPolicy | LSTMGMMPolicy)
    check(tunable, "policy", type(policy).__name__, "must be a DiffusionPolicy, or a Gaussian or a mixture of them")
    check(not exact, "likelihood", "exact", f"is the only one a {policy.name} policy has: leave it out")
    assert isinstance(policy, GaussianPolicy | GMMPolicy | LSTMGMMPolicy)
    check(tuned_steps == 1, "tuned_steps", tuned_steps, f"must be 1: a {policy.name} policy does not denoise")
    check(solver == SolverConfig(), "solver", solver, f"must be left out: a {policy.name} policy does not denoise")
    return ActionMDP(policy, exploration)

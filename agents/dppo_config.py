"""DPPO's numbers (arXiv:2409.00588, appendix). Defaults are for two cores and chunks of four actions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dprl.config import validate
from dprl.diffusion import SolverConfig
from dprl.errors import check
from dprl.mdp import ExplorationConfig
from dprl.networks.mlp import Activation
from dprl.schedules import Anneal, Warmup
from dprl.training.precision import Precision


@dataclass(frozen=True)
class DPPOConfig:
    """The algorithm's numbers."""

    tuned_steps: int = 10
    """K', how many of the last denoising steps are tuned; 1 for policies that do not denoise."""
    solver: SolverConfig = field(default_factory=SolverConfig)
    """Whose steps: ddpm, ddim (with eta = 1 it explores most like ddpm) or euler. Default: the policy's own way. A
    policy whose own way visits other timesteps, which are not tuned, samples so from then on (ddim with eta = 0)."""
    likelihood: Literal["steps", "exact"] = "steps"
    """Of each denoising step; or, as an ablation, of whole chunks, followed through the ODE of ddim or euler. Every
    denoising step is then tuned, and `tuned_steps` is 1."""
    n_steps: int = 50
    """T, decisions per environment and iteration."""
    n_epochs: int = 5
    """Passes over the pairs of one rollout."""
    batch_size: int = 2_000
    """(decision, denoising step) pairs per gradient step."""
    micro_batch_size: int | None = None
    """At most so many pairs, or decisions, go through the networks at once; their gradients add up. Default: all of a
    minibatch."""
    precision: Precision = "float32"
    """Of the networks in updates; chains are drawn in float32. tf32 is of GPUs; processors without bfloat16
    instructions are many times slower with it."""
    compile_after: int | None = None
    """Iterations after which torch.compile makes updates, and on a CPU chains, faster; short runs so do not pay for it.
    Each size of a batch takes up to a minute once, and torch stops at eight in a process (so leave it out where the
    tuned steps are annealed). What Ray's workers draw is not compiled. Default: never."""
    learning_rate: float = 3e-4
    """The actor's."""
    critic_learning_rate: float = 1e-3
    lr_schedule: Warmup = field(default_factory=Warmup)
    """Of both; the actor's begins after the critic's warm-up."""
    max_grad_norm: float | None = None
    """Clip the norm of the actor's gradients, and of the critic's, to this."""
    gamma: float = 0.99
    """Discount."""
    gamma_per: Literal["decision", "step"] = "decision"
    """What `gamma` discounts: each decision, or each environment step that a decision executed; rewards within a chunk
    are summed either way."""
    gae_lambda: float = 0.95
    bootstrap_truncated: bool | None = None
    """Whether an episode that its time limit ends is worth what its last observation promises, and not nothing.
    Default: not with the sparse reward, of which a critic that errs would promise ever more; with any other, yes."""
    denoising_discount: float = 0.99
    """The advantage of step k is multiplied by this to the power k."""
    log_prob_reduction: Literal["mean", "sum"] = "mean"
    """Over the numbers of a chunk that were executed. With `sum` the ratio is the true one, and clipped where the
    mean's would be: its bounds are 1 ± clip to the power of how many numbers a chunk has."""
    clip_range: float = 0.05
    """PPO's clip at the step that emits the action; of the ratio of mean log-probs."""
    clip_range_base: float = 0.005
    """The clip at the noisiest tuned step."""
    clip_range_rate: float = 3.0
    """How steeply the clip grows between the two."""
    advantage_quantiles: tuple[float, ...] = (0.0, 1.0)
    """Normalised advantages are clipped to these quantiles of the minibatch."""
    vf_coef: float = 0.5
    """Of the critic's loss. Its own AdamW makes little of it, but for `max_grad_norm`."""
    clip_range_vf: float | None = None
    """How far a value may move from the rollout's before its loss is flat."""
    target_kl: float | None = 1.0
    """Stop an iteration's updates once a minibatch's `approx_kl` exceeds this. That is of the ratios, so with mean
    log-probs far below the policy's own KL: values that stop anything then are of the size of `clip_range` squared."""
    regularizer: Literal["none", "bc", "kl", "w2"] = "none"
    """What keeps the policy near the pretrained one, at the observations of the rollout: the log-prob of chains that
    the pretrained policy draws (`bc`), or the divergence of each step's Gaussian from its own (`kl`, `w2`)."""
    regularizer_coef: float = 0.1
    entropy_coef: float = 0.0
    """Bonus for the entropy of learned noise."""
    anneal_tuned_steps: Anneal = field(default_factory=Anneal)
    """Train fewer of the tuned steps, the last ones, as the run goes on. The others keep the tuned network."""
    critic: Literal["state", "state_action"] = "state"
    """What the baseline sees: the state, or the state and the noisy action that a denoising step starts from."""
    critic_warmup: int = 0
    """First iterations in which only the critic learns."""
    critic_hidden_size: int = 256
    critic_activation: Activation = "relu"
    normalize_returns: bool = True
    """Divide rewards by the running standard deviation of the return."""
    exploration: ExplorationConfig = field(default_factory=ExplorationConfig)

    def __post_init__(self) -> None:
        counts = ("tuned_steps", "n_steps", "n_epochs", "batch_size", "micro_batch_size", "critic_hidden_size")
        positive = ("learning_rate", "critic_learning_rate", "clip_range", "clip_range_rate", "vf_coef")
        validate(
            self,
            at_least={
                **dict.fromkeys(counts, 1), **dict.fromkeys(("critic_warmup", "entropy_coef"), 0),
                "regularizer_coef": 0,
            },
            above=dict.fromkeys(positive, 0),
        )  # fmt: skip
        check(self.clip_range < 1, "clip_range", self.clip_range, "must be below 1: ratios stay in 1 ± clip_range")
        check(self.clip_range_rate <= 50, "clip_range_rate", self.clip_range_rate, "must be at most 50")
        for name in ("gamma", "gae_lambda", "denoising_discount"):
            check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must be from 0 to 1")
        after = self.compile_after
        check(after is None or after >= 0, "compile_after", after, "must be at least 0, or None")
        steps = after is None or self.likelihood == "steps"
        check(steps, "compile_after", after, "must be None: an exact likelihood is not compiled")
        steady = after is None or self.anneal_tuned_steps.iterations == 0
        check(steady, "compile_after", after, "must be None: each number of tuned steps would compile anew")
        for name in ("max_grad_norm", "clip_range_vf", "target_kl"):
            value = getattr(self, name)
            check(value is None or value > 0, name, value, "must be above 0, or None")
        ordered = 0 < self.clip_range_base <= self.clip_range
        check(ordered, "clip_range_base", self.clip_range_base, f"must be above 0 and at most {self.clip_range}")
        low_high = self.advantage_quantiles
        fits = len(low_high) == 2 and 0 <= low_high[0] < low_high[1] <= 1
        check(fits, "advantage_quantiles", low_high, "must be two numbers, 0 <= lower < upper <= 1")
        learned = self.exploration.learned.what != "none"
        check(self.entropy_coef == 0 or learned, "entropy_coef", self.entropy_coef,
              "must be 0 without exploration.learned: it raises noise that denoising steps learn")  # fmt: skip
        coefficient, usual = self.regularizer_coef, DPPOConfig.regularizer_coef
        used = coefficient > 0 if self.regularizer != "none" else coefficient == usual
        check(used, "regularizer_coef", coefficient,
              f"must be above 0 with a regularizer, and left at {usual} without one")  # fmt: skip
        whole = self.likelihood == "exact"
        check(not whole or self.critic == "state", "critic", self.critic,
              "must be state: with the exact likelihood the noise is the action in other words")  # fmt: skip
        one = self.clip_range_vf is None or self.critic == "state"
        check(one, "clip_range_vf", self.clip_range_vf, "must be None: a baseline of noisy actions is not clipped")
        anneal = self.anneal_tuned_steps
        fits = anneal.iterations == 0 or (anneal.final == int(anneal.final) and 1 <= anneal.final <= self.tuned_steps)
        check(fits, "anneal_tuned_steps.final", anneal.final,
              f"must be a whole number from 1 to tuned_steps, which is {self.tuned_steps}")  # fmt: skip

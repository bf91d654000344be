"""Receding-horizon control: predict a chunk, execute its beginning, predict again (arXiv:2303.04137, section IV-C).

Two options. Temporal ensembling (arXiv:2304.13705) decides anew at every step and executes the weighted mean of what
the last H plans say for it. A warm start denoises the next plan from the last one, shifted and noised a little, instead
of from pure noise.

Shapes: N environments, H actions of a plan, E of them executed, A action size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dprl.config import LARGEST_FLOAT, validate
from dprl.diffusion import SolverConfig
from dprl.errors import check
from dprl.guidance import Guide
from dprl.observations import TensorObservation, batch_size, take
from dprl.policy.candidates import Scorer, Selection, best_of

if TYPE_CHECKING:
    from dprl.policy.base import Policy


@dataclass(frozen=True)
class InferenceConfig(SolverConfig):
    """How a policy acts: chosen when it acts, for any checkpoint."""

    temperature: float = 1.0
    """Scales the noise of a diffusion policy's steps but the initial one, or the spread of other policies."""
    temporal_ensembling: float | None = None
    """Decide at every step and average over the plans for it, the i-th oldest weighted exp(-i times this); 0 weights
    all alike. Default: off."""
    warm_start_steps: int | None = None
    """Take only the solver's last so many steps, from the last plan. Default: all, from noise."""
    candidates: int | None = None
    """Draw so many plans and choose among them by the policy's critic, or another scorer. Default: 1."""
    selection: Selection | None = None
    """How: `argmax` (default) takes the best, `implicit` draws by the weights that the critic's value objective
    implies, `softmax` by the exponential of the score."""
    selection_scale: float | None = None
    """What the softmax multiplies scores by. Default: 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        validate(
            self, at_least={"temporal_ensembling": 0, "warm_start_steps": 1, "candidates": 1, "selection_scale": 0}
        )
        many = self.candidates is not None and self.candidates > 1
        check(many or self.selection is None, "selection", self.selection, "needs candidates, more than 1")
        softmax = self.selection == "softmax"
        scale = self.selection_scale
        check(softmax or scale is None, "selection_scale", scale, "is of the selection softmax only")
        check_temperature(self.temperature)
        both = self.temporal_ensembling is not None and self.warm_start_steps is not None
        check(not both, "warm_start_steps", self.warm_start_steps, "cannot be combined with temporal_ensembling")


def check_temperature(temperature: float) -> None:
    """Raise ConfigError unless it is a number of at least 0."""
    fits = isinstance(temperature, int | float) and 0 <= temperature <= LARGEST_FLOAT
    check(fits, "temperature", temperature, "must be a finite number of at least 0")


@dataclass(frozen=True)
class Memory:
    """The latest plans of N environments."""

    plans: Tensor
    """(N, M, H, A), newest first; M is H with temporal ensembling, else 1."""
    n_plans: Tensor
    """(N,) how many of them there are."""

    def forget(self, rows: Tensor) -> Memory:
        """Drop the plans of the environments where `rows` (N,) is True."""
        return Memory(self.plans, torch.where(rows.to(self.n_plans.device), 0, self.n_plans))

    def take(self, rows: Tensor) -> Memory:
        """Return the part of the environments `rows`."""
        return Memory(self.plans[rows], self.n_plans[rows])

    def put(self, rows: Tensor, part: Memory) -> Memory:
        """Return these plans with those of the environments `rows` replaced."""
        plans, n_plans = self.plans.clone(), self.n_plans.clone()
        plans[rows], n_plans[rows] = part.plans, part.n_plans
        return Memory(plans, n_plans)


@dataclass(frozen=True)
class PredictState:
    """What `predict` remembers between environment steps."""

    actions: Tensor
    """(N, E, A) under execution."""
    next_action: Tensor
    """(N,) index into them."""
    history: TensorObservation
    """(N, O, D), or named parts: the latest observations."""
    memory: Memory


class RecedingHorizon:
    """Decides for a batch of environments. Holds no state: memories go in and out."""

    def __init__(
        self,
        policy: Policy,
        inference: InferenceConfig | None = None,
        *,
        guide: Guide | None = None,
        scorer: Scorer | None = None,
    ) -> None:
        """Let `policy` decide.

        Args:
            policy: whose plans they are.
            inference: how it acts. Default: its own way.
            guide: moves its denoising steps, see `dprl.guidance`.
            scorer: chooses among candidates. Default: the policy's own.

        Raises:
            ConfigError: the policy does not have such a way, or nothing chooses among candidates.
        """
        known = inference is None or isinstance(inference, InferenceConfig)
        check(known, "inference", inference, "must be an InferenceConfig")
        self.policy, self.guide = policy, guide
        self.inference = inference or InferenceConfig()
        policy.check_inference(self.inference)
        policy.check_guide(guide)
        fits = scorer is None or isinstance(scorer, Scorer)
        check(fits, "scorer", type(scorer).__name__, "must have a method score(obs, actions)")
        self._scorer = scorer
        n = self.inference.candidates or 1
        check(n == 1 or self.scorer is not None, "candidates", n, "choosing among samples needs a scorer: give one, "
              "set policy.scorer, or take a policy with critics ('dprl offline' makes them)")  # fmt: skip

    @property
    def scorer(self) -> Scorer | None:
        """What chooses among candidates."""
        return self.policy.scorer if self._scorer is None else self._scorer

    @property
    def n_action_steps(self) -> int:
        """E: 1 with temporal ensembling, else the policy's."""
        return self.policy.n_action_steps if self.inference.temporal_ensembling is None else 1

    def start(self, n: int) -> Memory:
        """Return the memory of `n` environments whose episodes begin."""
        horizon, device = self.policy.config.horizon, self.policy.device
        plans = 1 if self.inference.temporal_ensembling is None else horizon
        shape = (n, plans, horizon, self.policy.chunk_size)
        return Memory(torch.zeros(shape, device=device), torch.zeros(n, dtype=torch.long, device=device))

    def nothing(self, n: int) -> tuple[Tensor, Tensor, Memory]:
        """Return what `predict` remembers of `n` environments before it decides: nothing to execute, no plan."""
        actions = torch.zeros(n, self.n_action_steps, self.policy.features.action_size, device=self.policy.device)
        return actions, torch.full((n,), self.n_action_steps, device=self.policy.device), self.start(n)

    def fits(self, memory: Memory, actions: Tensor) -> bool:
        """Whether memory and actions (N, E, A) are of this way to act and of plans of this policy's shape."""
        ours, _, start = self.nothing(1)
        return actions.shape[1:] == ours.shape[1:] and memory.plans.shape[1:] == start.plans.shape[1:]

    def plan(
        self,
        obs: TensorObservation,
        memory: Memory,
        generator: torch.Generator | None,
        *,
        deterministic: bool = False,
    ) -> tuple[Tensor, Memory]:
        """Decide: observations (N, O, D), or named parts, and memory -> actions to execute (N, E, A) and memory."""
        chunk = self._chunks(obs, memory, generator, deterministic=deterministic)
        plans = torch.cat([chunk[:, None], memory.plans[:, :-1]], dim=1)
        memory = Memory(plans, (memory.n_plans + 1).clamp(max=plans.shape[1]))
        if self.inference.temporal_ensembling is None:
            return self.policy.act(chunk)[:, : self.n_action_steps], memory
        return self.policy.act(self._ensemble(memory, self.inference.temporal_ensembling)[:, None]), memory

    def _chunks(
        self, obs: TensorObservation, memory: Memory, generator: torch.Generator | None, *, deterministic: bool
    ) -> Tensor:
        """Draw (N, H, A), from the last plan where there is one and a warm start is asked for."""
        policy, inference = self.policy, self.inference
        obs = policy.checked(obs)
        warm = memory.n_plans > 0
        if inference.warm_start_steps is None or not warm.any():
            return self._draw(obs, generator, deterministic=deterministic)
        chunks = torch.empty(batch_size(obs), *memory.plans.shape[2:], device=policy.device)
        executed = self.n_action_steps
        last = memory.plans[:, 0]
        shifted = torch.cat([last[:, executed:], last[:, -1:].expand(-1, executed, -1)], dim=1)
        for rows, plan in ((~warm, None), (warm, shifted[warm])):
            if rows.any():
                chunks[rows] = self._draw(take(obs, rows), generator, deterministic=deterministic, plan=plan)
        return chunks

    def _draw(
        self,
        obs: TensorObservation,
        generator: torch.Generator | None,
        *,
        deterministic: bool,
        plan: Tensor | None = None,
    ) -> Tensor:
        """Draw (N, H, A), or choose them among candidates; a deterministic decision takes the best."""
        inference, n = self.inference, self.inference.candidates or 1
        if n == 1:
            return self._drawn(obs, generator, deterministic=deterministic, plan=plan)
        plans = None if plan is None else plan.repeat_interleave(n, dim=0)
        return best_of(
            lambda every: self._drawn(every, generator, deterministic=deterministic, plan=plans, group=n),
            obs,
            n,
            self.scorer,
            selection="argmax" if deterministic else inference.selection or "argmax",
            scale=1.0 if inference.selection_scale is None else inference.selection_scale,
            generator=generator,
        )

    def _drawn(
        self,
        obs: TensorObservation,
        generator: torch.Generator | None,
        *,
        deterministic: bool,
        plan: Tensor | None,
        group: int = 1,
    ) -> Tensor:
        return self.policy.draw(
            obs, self.inference, generator, deterministic=deterministic, plan=plan, group=group, guide=self.guide
        )

    @staticmethod
    def _ensemble(memory: Memory, decay: float) -> Tensor:
        """Mean of what each plan says for the present step: (N, A). A plan's age is its position, newest first."""
        age = torch.arange(memory.plans.shape[1], device=memory.plans.device)
        said = memory.plans[:, age, age]  # (N, M, A)
        from_oldest = memory.n_plans[:, None] - 1 - age
        weight = torch.where(from_oldest >= 0, torch.exp(-decay * from_oldest), 0.0)
        return (weight[..., None] * said).sum(1) / weight.sum(1, keepdim=True)

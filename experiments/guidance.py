"""Study `guidance`: what critics make of a cloned policy that stays as it is, by filtering, by steering and by both.

Policy and critics are IDQL's of `offline-metaworld`'s data and of `offline-hopper`'s medium-expert. Ways are compared
at matched compute: those of a group evaluate the denoiser about as often for one decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dprl.experiments import offline, plots, runs
from dprl.experiments.finetuning import GYM, demonstrators_of, score, score_of
from dprl.experiments.offline import References
from dprl.experiments.studies import (
    Cell,
    Look,
    Outcome,
    StudyConfig,
    grouped,
    require_ready_for,
    run_cells,
    write_table,
)
from dprl.guidance.spec import GuidanceConfig

METAWORLD = ("push", "pick-place", "bin-picking")
HOPPER, SCORED = "hopper", "hopper-medium-expert"


@dataclass(frozen=True)
class Way:
    """A way to make more of a policy by its critics."""

    shown: str
    candidates: int = 1
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)

    def look(self, base: Look, scale: float | None) -> Look:
        """`base` acting so, steered by `scale`."""
        guidance = self.guidance if scale is None else replace(self.guidance, scale=scale)
        return replace(base, inference=replace(base.inference, candidates=self.candidates), guidance=guidance)

    def evaluations(self, steps: int) -> tuple[int, int]:
        """How often a decision of `steps` denoising steps evaluates the denoiser, and a critic; gradients count thrice.

        The third is the value that the gradient is of.
        """
        own, n = self.guidance, self.candidates
        sub_steps = 0 if own.guide is None else own.guide_steps or 1
        denoiser = n * steps * (3 * sub_steps if own.gradient == "through" else 1)
        return denoiser, 3 * n * steps * sub_steps + (n if n > 1 else 0)


CLIMB = GuidanceConfig(guide="critic", gradient="held", scaling="noise")
WAYS = {
    "plain": Way("unguided"),
    "guided": Way("value-guided", guidance=CLIMB),
    "best": Way("best of 16", 16),
    "through": Way(
        "value-guided, 5 sub-steps through the network", guidance=replace(CLIMB, gradient="through", guide_steps=5)
    ),
    "both": Way("value-guided, the best of 16", 16, CLIMB),
}
SCALES = {
    "push": {"guided": 10.0, "through": 10.0, "both": 3.0},
    "pick-place": {"guided": 10.0, "through": 10.0, "both": 3.0},
    "bin-picking": {"guided": 10.0, "through": 10.0, "both": 10.0},
    SCORED: {"guided": 0.6, "through": 10.0, "both": 0.03},
}
"""The best of several (`dprl tune-guidance`) on a seed that no study's table has."""


def cells(config: StudyConfig) -> list[Cell]:
    """IDQL on every task and seed, acting in every way."""
    hopper = offline.mujoco(GYM[HOPPER], "medium-expert", (), offline.SMALL[GYM[HOPPER]])
    tasks = {**{task: offline.metaworld(task) for task in METAWORLD}, SCORED: hopper}
    learned = [cell for cell in offline.cells_of(tasks, config) if cell.name.split(".")[1] == "idql"]
    return [replace(cell, looks=_looks(cell)) for cell in learned]


def _looks(cell: Cell) -> tuple[Look, ...]:
    base, scales = cell.looks[0], SCALES[cell.name.split(".")[0]]
    return tuple(way.look(replace(base, name=name), scales.get(name)) for name, way in WAYS.items())


def run(config: StudyConfig, *, progress_bar: bool = True) -> Path:
    """Run the study; write ``guidance.md``, ``.csv`` and ``.png`` and return the first."""
    name, todo, env = "guidance", cells(config), GYM[HOPPER]
    require_ready_for(todo, config)
    hoppers = [cell for cell in todo if cell.name.startswith(SCORED)]
    expert, _ = demonstrators_of(env, hoppers, config, progress_bar=progress_bar)
    references = References(offline.random_return(env), expert.return_mean)
    outcomes = run_cells(todo, config, progress_bar=progress_bar)
    scored = [offline.normalised(o, references) if o.cell.startswith(SCORED) else o for o in outcomes]
    by_task = {task: grouped(own, lambda o: o.look) for task, own in grouped(scored, _task).items()}
    plots.bars(
        {
            task: {way.shown: [score_of(o) for o in found[key]] for key, way in WAYS.items()}
            for task, found in by_task.items()
        },
        config.out / f"{name}.png",
    )
    steps = runs.BEHAVIOUR.num_train_timesteps
    rows = [[task, *_row(way, found[key], steps)] for task, found in by_task.items() for key, way in WAYS.items()]
    columns = ["task", "", "score (95 %)", "each seed", "denoiser", "critic", "ms"]
    return write_table(config, name, "Guidance", columns, rows, [_setting(config, references)], outcomes)


def _row(way: Way, found: Sequence[Outcome], steps: int) -> list[str]:
    each = ", ".join(f"{score_of(o):.2f}" for o in found)
    latency = f"{np.mean([o.latency_ms for o in found]):.1f}"
    return [way.shown, score(found), each, *map(str, way.evaluations(steps)), latency]


def _task(outcome: Outcome) -> str:
    return outcome.cell.split(".")[0]


def _setting(config: StudyConfig, references: References) -> str:
    scales = "; ".join(f"{task} " + ", ".join(f"{scale:g}" for scale in own.values()) for task, own in SCALES.items())
    return (
        f"Seeds {', '.join(map(str, config.seeds))}, of data and learning; {config.episodes} held-out episodes each, "
        "the same for every way. A policy is a clone, its critics IDQL's of the same data: offline-metaworld's, where "
        "the score is success, and Hopper's medium-expert, whose score is the return in percent between that of random "
        f"actions, {references.random:,.0f}, and the expert's, {references.expert:,.0f}. Denoiser and critic: their "
        "evaluations for one decision, a gradient counted as two more; milliseconds are of one decision for one "
        "environment. Gradients are taken at the predicted clean actions and scaled by the noise, with the network "
        "held still but where it says otherwise. Scales, tuned on a seed of their own (guided, through the network, "
        f"guided with candidates): {scales}."
    )

"""Study of planners: Diffuser and Decision Diffuser beside IDQL, whose critics they ask, in mazes shown in pieces.

Those who begin where the task does never reach its goal: returns tell of it only where others cross their way. Plans of
rows are steered and chosen by critics, which judge their first actions; plans of states are told how much better it
gets by them as critics say (`dprl.agents.prospects`). Beside them stands Diffuser as in the paper, of the data's
returns.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from dprl.agents import BCConfig, DiffuserConfig, OutcomeConfig
from dprl.experiments import plots
from dprl.experiments.finetuning import score, score_of
from dprl.experiments.offline import MAZES, cells_of
from dprl.experiments.runs import STATE_PLANNER, OfflineConfig, PretrainConfig
from dprl.experiments.studies import Cell, Look, Outcome, StudyConfig, grouped, run_cells, write_table
from dprl.guidance.spec import GuidanceConfig
from dprl.networks import MLPConfig
from dprl.policy import InferenceConfig, PlannerConfig

MODEL = MLPConfig(hidden_size=512, n_blocks=2)
ROWS, ROWS_STEPS = PlannerConfig(horizon=16, n_action_steps=4, denoiser=MODEL), 10_000
STATES, STATES_STEPS = replace(STATE_PLANNER, horizon=16, denoiser=MODEL), 4_000
BC = BCConfig(batch_size=64, learning_rate=3e-3, final_learning_rate=3e-5)
VALUE = OutcomeConfig(batch_size=128, learning_rate=1e-3)
CLIMB = GuidanceConfig(guide="critic", scale=0.3, gradient="through", scaling="normalized")
RETURNS = replace(CLIMB, gradient="noisy")
TOLD = GuidanceConfig(command=(1.0,), command_scale=1.0)
ONE, SOME, COOL = InferenceConfig(), InferenceConfig(candidates=16), InferenceConfig(temperature=0.5)
METHODS = {
    "idql | 1": "BC",
    "idql | 64": "IDQL, N = 64",
    "diffuser | plain": "plans of rows, not steered",
    "diffuser | returns": "Diffuser: guided by the data's returns, the best of 16",
    "diffuser | best": "plans of rows, the best of 16 by critics",
    "diffuser | guided": "plans of rows, guided by critics",
    "decision-diffuser | plain": "plans of states, told nothing",
    "decision-diffuser | told": "Decision Diffuser: told the most",
}


def cells(config: StudyConfig) -> list[Cell]:
    """IDQL, and planners that ask its critics, on every maze and seed."""
    learned = [cell for cell in cells_of(MAZES, config) if cell.name.split(".")[1] == "idql"]
    return [cell for base in learned for cell in _of_one(base)]


def _of_one(base: Cell) -> tuple[Cell, ...]:
    """IDQL and both planners."""
    task, _, seed = base.name.split(".")

    def look(name: str, inference: InferenceConfig, guidance: GuidanceConfig, *, by_base: bool = False) -> Look:
        return replace(base.looks[0], name=name, inference=inference, guidance=guidance, by_base=by_base)

    rows = PretrainConfig("", ROWS, ROWS_STEPS, bc=BC, seed=base.pretrain.seed)
    diffuser = replace(
        base,
        name=f"{task}.diffuser.{seed}",
        base=base.name,
        pretrain=rows,
        offline=OfflineConfig("", ROWS, agent="diffuser", diffuser=DiffuserConfig(BC, VALUE)),
        looks=(
            look("plain", ONE, GuidanceConfig()),
            look("returns", SOME, RETURNS),
            look("best", SOME, GuidanceConfig(), by_base=True),
            look("guided", ONE, CLIMB, by_base=True),
        ),
    )
    decision = replace(
        base,
        name=f"{task}.decision-diffuser.{seed}",
        base=base.name,
        pretrain=replace(rows, policy=STATES, steps=STATES_STEPS),
        offline=OfflineConfig("", STATES, agent="decision-diffuser", decision_diffuser=BC),
        looks=(look("plain", COOL, GuidanceConfig()), look("told", COOL, TOLD)),
    )
    asked = tuple(look for look in base.looks if f"idql | {look.name}" in METHODS)
    return replace(base, looks=asked), diffuser, decision


def run(config: StudyConfig, *, progress_bar: bool = True) -> Path:
    """Study `planners`."""
    name = "planners"
    outcomes = run_cells(cells(config), config, progress_bar=progress_bar)
    by_task = {task: grouped(own, _method) for task, own in grouped(outcomes, lambda o: o.cell.split(".")[0]).items()}
    rows = [
        [task, shown, score(o), ", ".join(f"{score_of(x):.2f}" for x in o), f"{np.mean([x.latency_ms for x in o]):.0f}"]
        for task, found in by_task.items()
        for method, shown in METHODS.items()
        for o in [found[method]]
    ]
    plots.bars(
        {
            task: {shown: [score_of(o) for o in found[method]] for method, shown in METHODS.items()}
            for task, found in by_task.items()
        },
        config.out / f"{name}.png",
    )
    note = (
        f"Seeds {', '.join(map(str, config.seeds))}, of data and learning; {config.episodes} held-out episodes each, "
        "the same for every method. Critics are IDQL's, which decides chunks of four actions. Plans are of "
        f"{ROWS.horizon} steps, of which {ROWS.n_action_steps} are executed, of states {STATES.n_action_steps}; their "
        f"networks are MLPs and learn for {ROWS_STEPS * config.scale:,.0f} gradient steps, of states "
        f"{STATES_STEPS * config.scale:,.0f}. Milliseconds are of one decision for one environment."
    )
    columns = ["maze", "method", "success (95 %)", "each seed", "ms"]
    return write_table(config, name, "Planning", columns, rows, [note], outcomes)


def _method(outcome: Outcome) -> str:
    return f"{outcome.cell.split('.')[1]} | {outcome.look}"

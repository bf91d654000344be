"""Study of planners: Diffuser and Decision Diffuser beside the IDQL whose critics they share, in mazes shown in pieces.

Those who begin where the task does never reach its goal, so returns of the data say nothing there: plans are judged by
how much better critics take it to get (`dprl.agents.prospects`). Beside it stands Diffuser of the data's own returns.
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

STEPS = 4_000
MODEL = MLPConfig(hidden_size=512, n_blocks=2)
ROWS = PlannerConfig(horizon=16, denoiser=MODEL)
STATES = replace(STATE_PLANNER, horizon=16, denoiser=MODEL)
BC = BCConfig(batch_size=64, learning_rate=3e-3, final_learning_rate=3e-5)
VALUE = OutcomeConfig(batch_size=128, learning_rate=1e-3)
GUIDE = GuidanceConfig(guide="critic", scale=0.3, gradient="noisy", scaling="normalized")
TOLD = GuidanceConfig(command=(1.0,), command_scale=1.0)
ONE, SOME, COOL = InferenceConfig(), InferenceConfig(candidates=16), InferenceConfig(temperature=0.5)
METHODS = {
    "idql | 1": "BC",
    "idql | 64": "IDQL, N = 64",
    "diffuser | plain": "plans of rows, not steered",
    "diffuser | best": "plans of rows, the best of 16",
    "diffuser | guided": "Diffuser: guided",
    "diffuser | both": "Diffuser: guided, the best of 16",
    "returns | both": "the same by the data's own returns",
    "decision-diffuser | plain": "plans of states, told nothing",
    "decision-diffuser | told": "Decision Diffuser: told the most",
}


def cells(config: StudyConfig) -> list[Cell]:
    """IDQL, and planners that ask its critics, on every maze and seed."""
    found = []
    for base in cells_of(MAZES, config):
        task, method, seed = base.name.split(".")
        if method != "idql":
            continue
        found.append(base)

        def look(name: str, inference: InferenceConfig, guidance: GuidanceConfig, base: Cell = base) -> Look:
            return Look(name, inference, episodes=config.episodes, env=base.looks[0].env, guidance=guidance)

        rows = PretrainConfig("", ROWS, STEPS, bc=BC, seed=base.pretrain.seed)
        states = replace(rows, policy=STATES)
        diffuser = OfflineConfig("", ROWS, agent="diffuser", diffuser=DiffuserConfig(BC, VALUE))
        both = look("both", SOME, GUIDE)
        every = (
            look("plain", ONE, GuidanceConfig()),
            look("best", SOME, GuidanceConfig()),
            look("guided", ONE, GUIDE),
            both,
        )
        told = (look("plain", COOL, GuidanceConfig()), look("told", COOL, TOLD))
        decision = OfflineConfig("", STATES, agent="decision-diffuser", decision_diffuser=BC)
        common = replace(base, offline=None, looks=(both,))
        found += [
            replace(
                common, name=f"{task}.diffuser.{seed}", base=base.name, pretrain=rows, looks=every, offline=diffuser
            ),
            replace(common, name=f"{task}.returns.{seed}", pretrain=rows, offline=diffuser),
            replace(
                common,
                name=f"{task}.decision-diffuser.{seed}",
                base=base.name,
                pretrain=states,
                looks=told,
                offline=decision,
            ),
        ]
    return found


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
        f"the same for every method. Plans are of {ROWS.horizon} steps, of which {ROWS.n_action_steps} are executed, "
        f"their networks MLPs and {STEPS * config.scale:,.0f} gradient steps of them; "
        "a plan is judged by how much better IDQL's critics take it to get, but for the row that says "
        "otherwise. "
        "IDQL decides chunks of four actions. Milliseconds are of one decision for one environment."
    )
    columns = ["maze", "method", "success (95 %)", "each seed", "ms"]
    return write_table(config, name, "Planning", columns, rows, [note], outcomes)


def _method(outcome: Outcome) -> str:
    return f"{outcome.cell.split('.')[1]} | {outcome.look}"

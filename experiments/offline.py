"""Studies of offline learning: IDQL and its neighbours beside cloning, from the same data.

Cloning is IDQL with a single candidate: the behaviour policy is trained alike, with the same draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from dprl.agents import DiffusionQLConfig, IDQLConfig
from dprl.experiments import plots
from dprl.experiments.finetuning import MEAN, mean_score, score, score_of
from dprl.experiments.runs import CollectConfig, OfflineConfig, PretrainConfig
from dprl.experiments.studies import Cell, Look, Outcome, StudyConfig, grouped, run_cells, write_table
from dprl.implicit import ValueObjective
from dprl.networks import MLPConfig
from dprl.policy import CriticConfig, DiffusionConfig, GaussianConfig, InferenceConfig

CANDIDATES = (1, 4, 16, 64, 256)
DRAWN = InferenceConfig(candidates=50, selection="softmax")
"""How Diffusion-QL acts in its paper."""
BEST = 0.1
"""Share of the episodes that filtered cloning keeps."""
METHODS = {
    "idql | 1": "BC",
    "filtered": f"BC of the best {BEST:.0%}",
    "iql": "IQL, Gaussian",
    "diffusion-ql": "Diffusion-QL (EDP)",
    "idql | 64": "IDQL, N = 64",
}


@dataclass(frozen=True)
class Recipe:
    """A data set and how it is learned from. Seeds and folders are filled in."""

    collect: CollectConfig
    steps: int
    idql: IDQLConfig
    env: str | None = None
    """Where policies are evaluated. Default: where the data are from."""
    policy: DiffusionConfig = field(
        default_factory=lambda: DiffusionConfig(num_train_timesteps=5, schedule="vp", denoiser=MLPConfig())
    )


def maze(name: str, episodes: int) -> Recipe:
    """A point maze, shown in pieces."""
    critic = CriticConfig(objective=ValueObjective("expectile", 0.9))
    return Recipe(
        CollectConfig(f"{name}-Pieces-v0", noise=0.3, episodes=episodes),
        steps=8_000,
        idql=IDQLConfig(critic=critic),
        env=f"{name}-v0",
    )


GROUPS = {
    "offline-stitch": {
        "halves": maze("PointMaze-Halves", 200),
        "thirds": maze("PointMaze-Thirds", 400),
    },
}


def cells_of(tasks: dict[str, Recipe], config: StudyConfig) -> list[Cell]:
    """Every method on every task and seed."""
    found = []
    for seed in config.seeds:
        for task, recipe in tasks.items():
            collect = replace(recipe.collect, seed=seed)
            idql = recipe.idql
            cloned = PretrainConfig("", recipe.policy, recipe.steps, bc=idql.bc, seed=seed)
            gaussian = replace(cloned, policy=_gaussian(recipe.policy))

            def look(name: str, inference: InferenceConfig, recipe: Recipe = recipe) -> Look:
                return Look(name, inference, episodes=config.episodes, env=recipe.env)

            every = tuple(look(str(n), InferenceConfig(candidates=n)) for n in CANDIDATES)
            ql = DiffusionQLConfig(**vars(idql))
            for method, pretrain, looks, offline in (
                ("idql", cloned, every, OfflineConfig("", idql=idql)),
                ("filtered", replace(cloned, best=BEST), (look("", InferenceConfig()),), None),
                ("iql", gaussian, (look("", MEAN),), OfflineConfig("", agent="iql", idql=idql)),
                ("diffusion-ql", cloned, (look("", DRAWN),), OfflineConfig("", agent="diffusion-ql", diffusion_ql=ql)),
            ):
                found.append(Cell(f"{task}.{method}.seed{seed}", collect, pretrain, looks, offline=offline))
    return found


def _gaussian(policy: DiffusionConfig) -> GaussianConfig:
    """A Gaussian policy of the same chunks and width."""
    assert isinstance(policy.denoiser, MLPConfig)
    own = policy.denoiser
    return GaussianConfig(
        horizon=policy.horizon,
        n_action_steps=policy.n_action_steps,
        hidden_size=own.hidden_size,
        n_blocks=own.n_blocks,
        activation=own.activation,
    )


def run(name: str, config: StudyConfig, *, progress_bar: bool = True) -> Path:
    """Run the study of a group of tasks; write ``NAME.md``, ``.csv`` and ``.png`` and return the first."""
    tasks = GROUPS[name]
    outcomes = run_cells(cells_of(tasks, config), config, progress_bar=progress_bar)
    by_task = {task: grouped(own, _method) for task, own in grouped(outcomes, _task).items()}
    rows = [
        [task, shown, score(found[method]), ", ".join(f"{score_of(o):.2f}" for o in found[method])]
        for task, found in by_task.items()
        for method, shown in METHODS.items()
    ]
    _against_candidates(by_task, config.out / f"{name}.png")
    columns = ["data", "method", "score (95 %)", "each seed"]
    return write_table(config, name, "Offline learning", columns, rows, [_setting(config)], outcomes)


def _against_candidates(by_task: dict[str, dict[str, list[Outcome]]], file: Path) -> None:
    """Draw the score of IDQL against N, every seed thin, and of the other methods as lines."""
    figure = plots.new_figure(figsize=(4.2 * len(by_task), 3.6))
    for axis, (task, found) in zip(figure.subplots(1, len(by_task), squeeze=False).flat, by_task.items(), strict=True):
        groups = [found[f"idql | {n}"] for n in CANDIDATES]
        axis.plot(CANDIDATES, [[score_of(o) for o in group] for group in groups], color="C0", lw=0.6, alpha=0.5)
        axis.plot(CANDIDATES, [mean_score(group) for group in groups], "o-", color="C0", label="IDQL")
        for i, method in enumerate(("filtered", "iql", "diffusion-ql"), start=1):
            axis.axhline(mean_score(found[method]), color=f"C{i}", ls="--", lw=1, label=METHODS[method])
        axis.set_title(task, fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("candidates N (1: BC)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(file, dpi=120)


def _task(outcome: Outcome) -> str:
    return outcome.cell.split(".")[0]


def _method(outcome: Outcome) -> str:
    method = outcome.cell.split(".")[1]
    return f"{method} | {outcome.look}" if method == "idql" else method


def _setting(config: StudyConfig) -> str:
    return (
        f"Seeds {', '.join(map(str, config.seeds))}, of data and learning; {config.episodes} held-out episodes each, "
        "the same for every method. BC is IDQL's behaviour policy: one candidate. IQL's Gaussian acts by its mean; "
        "Diffusion-QL draws among 50 samples by softmax of Q."
    )


on_mazes = partial(run, "offline-stitch")

"""Studies of fine-tuning: what DPPO makes of cloned policies, and plain PPO of Gaussian ones cloned from the same data.

Every task has a size for two cores and, where arXiv:2409.00588 has it, the paper's (`--paper`). The demonstrations are
of scripted experts or of policies that stable-baselines3 has trained, which a study does first where it needs to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from dprl.agents import BCConfig, DPPOConfig
from dprl.errors import check
from dprl.experiments import plots, runs
from dprl.experiments.runs import CollectConfig, ExpertConfig, FinetuneConfig, PolicyChoice, PretrainConfig, Seen
from dprl.experiments.studies import (
    Cell,
    Look,
    Outcome,
    StudyConfig,
    curve_file,
    grouped,
    is_done,
    mean_interval,
    require_ready_for,
    run_cells,
    shown,
    tuned,
    write_table,
)
from dprl.networks import MLPConfig
from dprl.policy import DiffusionConfig, GaussianConfig, InferenceConfig
from dprl.rollout.evaluation import Z95
from dprl.schedules import Warmup

DPPO, PPO = "dppo", "ppo"
NAMES = {DPPO: "DPPO", PPO: "PPO, Gaussian"}
MEDIUM = "experts/{env}/medium.zip"
"""Within a study's folder."""
MEAN = InferenceConfig(temperature=0.0)
"""Gaussian policies are evaluated at their mean, as in the authors' code."""
PAPER_STEPS = 1_000_000
"""Environment steps of a D4RL data set."""


@dataclass(frozen=True)
class Recipe:
    """From demonstrations to a fine-tuned policy. Seeds and folders are filled in."""

    collect: CollectConfig
    pretrain: PretrainConfig
    """Of a diffusion policy; the Gaussian one is cloned in as many steps."""
    finetune: FinetuneConfig


def metaworld(task: str, noise: float, total_timesteps: int) -> Recipe:
    """Meta-World, from a scripted expert disturbed by `noise`."""
    env = f"metaworld/{task}-v3"
    return Recipe(
        CollectConfig(env, noise=noise, episodes=100),
        PretrainConfig("", DiffusionConfig(num_train_timesteps=10)),
        FinetuneConfig("", env, total_timesteps, eval_every=10, eval_episodes=100),
    )


def gym(env: str, total_timesteps: int, dppo: DPPOConfig | None = None, eval_every: int = 10) -> Recipe:
    """Gymnasium's MuJoCo, from a policy of a third of an expert's return."""
    return Recipe(
        CollectConfig(env, expert=MEDIUM.format(env=env), noise=0.1, transitions=200_000),
        PretrainConfig("", DiffusionConfig(num_train_timesteps=10), steps=10_000),
        FinetuneConfig(
            "", env, total_timesteps, n_envs=32, dppo=dppo or DPPOConfig(), eval_every=eval_every, eval_episodes=100
        ),
    )


def paper_gym(env: str) -> Recipe:
    """The same at the paper's size: D4RL's amount of data, 72 million environment steps."""
    network = DiffusionConfig(num_train_timesteps=20, denoiser=MLPConfig(hidden_size=512))
    dppo = DPPOConfig(
        tuned_steps=10, n_steps=500, n_epochs=5, batch_size=50_000, learning_rate=1e-4, lr_schedule=Warmup(10),
        clip_range=0.01, clip_range_base=0.01, critic_activation="mish",
    )  # fmt: skip
    return Recipe(
        CollectConfig(env, expert=MEDIUM.format(env=env), noise=0.1, transitions=PAPER_STEPS),
        PretrainConfig("", network, steps=200 * PAPER_STEPS // 128, bc=BCConfig(batch_size=128)),
        FinetuneConfig("", env, 900 * 40 * 500 * 4, n_envs=40, dppo=dppo, eval_every=10, eval_episodes=100),
    )


def avoid(pretrain: PretrainConfig, dppo: DPPOConfig) -> Recipe:
    """A point that passes a disc on either side, as many steps as in the paper, whose task (D3IL's) has six discs."""
    return Recipe(
        CollectConfig("Avoid-v0", noise=1.2, episodes=100),
        pretrain,
        FinetuneConfig("", "Avoid-v0", 51 * 50 * 25 * 4, n_envs=50, dppo=dppo, eval_every=5, eval_episodes=100),
    )


GYM = {"hopper": "Hopper-v5", "walker2d": "Walker2d-v5", "halfcheetah": "HalfCheetah-v5"}
SMALL = {
    "push": metaworld("push", 0.5, 650_000),
    "pick-place": metaworld("pick-place", 0.5, 650_000),
    "bin-picking": metaworld("bin-picking", 0.5, 600_000),
    "box-close": metaworld("box-close", 0.5, 600_000),
    "hopper": gym("Hopper-v5", 500_000),
    "walker2d": gym("Walker2d-v5", 500_000),
    # A chunk of six joints has twice as many numbers as Hopper's, so that the mean's clip is twice as wide.
    # Episodes are all of one length: shorter rollouts would each see but a part of them.
    "halfcheetah": gym(
        "HalfCheetah-v5",
        1_000_000,
        DPPOConfig(
            n_steps=250, batch_size=5_000, learning_rate=1e-4, gamma=0.95, clip_range=0.02, clip_range_base=0.002
        ),
        eval_every=3,
    ),
    "avoid": avoid(PretrainConfig("", DiffusionConfig(num_train_timesteps=10)), DPPOConfig(n_steps=25)),
}
PAPER = {
    **{name: paper_gym(env) for name, env in GYM.items()},
    "avoid": avoid(
        PretrainConfig(
            "", DiffusionConfig(num_train_timesteps=20, denoiser=MLPConfig(hidden_size=512)), steps=1_000_000,
            bc=BCConfig(batch_size=16),
        ),
        DPPOConfig(
            tuned_steps=10, n_steps=25, n_epochs=10, batch_size=6_250, learning_rate=1e-5, denoising_discount=0.95,
            clip_range=0.1, clip_range_base=0.1, clip_range_rate=1.0, critic_warmup=1, critic_activation="mish",
            lr_schedule=Warmup(10),
        ),
    ),
}  # fmt: skip
GROUPS = {
    "finetune-metaworld": ("push", "pick-place", "bin-picking", "box-close"),
    "finetune-gym": tuple(GYM),
    **{name: (name,) for name in (*GYM, "avoid")},
}


def recipe_of(task: str, config: StudyConfig) -> Recipe:
    """Return how `task` is done.

    Raises:
        ConfigError: the paper does not have it.
    """
    if not config.paper:
        return SMALL[task]
    check(task in PAPER, "paper", True, f"the paper has no '{task}'; it has {', '.join(PAPER)}")
    return PAPER[task]


def cells_of(tasks: Sequence[str], config: StudyConfig) -> list[Cell]:
    """Cloning and fine-tuning, of both kinds of policy, on every task and seed."""
    found = []
    for seed in config.seeds:
        for task in tasks:
            recipe = recipe_of(task, config)
            for name, cloned, finetune in ((DPPO, *_dppo(recipe)), (PPO, *_ppo(recipe))):
                base = Cell(
                    f"{task}.{name}.cloned.seed{seed}",
                    replace(recipe.collect, seed=seed),
                    replace(recipe.pretrain, policy=cloned, seed=seed),
                    (Look("default", finetune.inference, episodes=config.episodes),),
                )
                found += [base, tuned(base, f"{task}.{name}.tuned.seed{seed}", finetune)]
    return found


def _dppo(recipe: Recipe) -> tuple[PolicyChoice, FinetuneConfig]:
    return recipe.pretrain.policy, recipe.finetune


def _ppo(recipe: Recipe) -> tuple[PolicyChoice, FinetuneConfig]:
    """A Gaussian policy of the same chunks and width: as many gradient steps, each on as many decisions."""
    diffusion, dppo = recipe.pretrain.policy, recipe.finetune.dppo
    assert isinstance(diffusion, DiffusionConfig)
    assert isinstance(diffusion.denoiser, MLPConfig)
    cloned = GaussianConfig(
        horizon=diffusion.horizon,
        n_action_steps=diffusion.n_action_steps,
        hidden_size=diffusion.denoiser.hidden_size,
        n_blocks=diffusion.denoiser.n_blocks,
        activation=diffusion.denoiser.activation,
    )
    alone = replace(dppo, tuned_steps=1, batch_size=max(1, dppo.batch_size // dppo.tuned_steps))
    return cloned, replace(recipe.finetune, dppo=alone, inference=MEAN)


def run(name: str, config: StudyConfig, *, progress_bar: bool = True) -> Path:
    """Run the study of a group of tasks; write ``NAME.md``, ``.csv`` and ``.png`` and return the first."""
    tasks = GROUPS[name]
    cells = cells_of(tasks, config)
    shown_by = grouped([c for c in require_ready_for(cells, config) if c.collect.expert.endswith(".zip")], env_of)
    experts = [expert_of(env, own, config, progress_bar=progress_bar) for env, own in shown_by.items()]
    outcomes = run_cells(cells, config, progress_bar=progress_bar)
    cloned, fine_tuned = ([o for o in outcomes if stage in o.cell.split(".")] for stage in ("cloned", "tuned"))
    rows, panels = [], dict[str, dict[str, list[Path]]]()
    for (label, before), after in zip(
        grouped(cloned, label_of).items(), grouped(fine_tuned, label_of).values(), strict=True
    ):
        task, policy = label.split(".")
        rows.append(
            [
                task,
                NAMES[policy],
                score(before),
                score(after),
                f"{mean_score(after) / mean_score(before):.2f}" if mean_score(before) else "",
                ", ".join(f"{score_of(o):{'.2f' if has_success(o) else ',.0f'}}" for o in after),
                f"{np.mean([o.timesteps for o in after]):,.0f}",
                f"{np.mean([o.train_s for o in after]) / 60:.1f}",
            ]
        )
        panels.setdefault(task, {})[NAMES[policy]] = [curve_file(config, o.cell) for o in after]
    plots.over_seeds(panels, config.out / f"{name}.png")
    columns = ["task", "method", "cloned", "fine-tuned", "ratio", "each seed", "environment steps", "minutes"]
    return write_table(config, name, "Fine-tuning", columns, rows, [*experts, _setting(config)], outcomes)


def expert_of(env: str, cells: Sequence[Cell], config: StudyConfig, *, progress_bar: bool = True) -> str:
    """Train what demonstrates `env` where `cells` still need it, or go on with it; return how it did, in words."""
    expert, medium = demonstrators_of(env, cells, config, progress_bar=progress_bar)
    return (
        f"The expert of {env}, the best policy of {minutes_for(config):g} minutes of PPO (stable-baselines3), has a "
        f"return of {expert.return_mean:,.0f} after {expert.timesteps:,} steps; the `medium` one that demonstrates, "
        f"{medium.return_mean:,.0f} after {medium.timesteps:,}."
    )


def demonstrators_of(
    env: str, cells: Sequence[Cell], config: StudyConfig, *, progress_bar: bool = True
) -> tuple[Seen, Seen]:
    """Train what demonstrates `env` where `cells` still need it, or go on with it; return how expert and medium did."""
    folder = expert_folder(env, config)
    train = any(not is_done(cell, config) for cell in cells)
    found = None if train else runs.trained_expert(folder)
    return found or runs.train_expert(ExpertConfig(env, minutes_for(config)), folder, progress_bar=progress_bar)


def expert_folder(env: str, config: StudyConfig) -> Path:
    """Return where a study trains the demonstrators of `env`."""
    return config.out / Path(MEDIUM.format(env=env)).parent


def minutes_for(config: StudyConfig) -> float:
    """Of training an expert."""
    return ExpertConfig.minutes * min(config.scale, 1.0)


def env_of(cell: Cell) -> str:
    """What a cell is trained in."""
    return cell.collect.env


def label_of(outcome: Outcome) -> str:
    """``hopper.dppo`` of the cell ``hopper.dppo.tuned.seed0``."""
    return ".".join(outcome.cell.split(".")[:2])


def has_success(outcome: Outcome) -> bool:
    """Whether its environment reports success."""
    return not math.isnan(outcome.success)


def score_of(outcome: Outcome) -> float:
    """Success where there is one, else return."""
    return outcome.success if has_success(outcome) else outcome.return_mean


def mean_score(outcomes: Sequence[Outcome]) -> float:
    """Over seeds."""
    return float(np.mean([score_of(o) for o in outcomes]))


def score(outcomes: Sequence[Outcome]) -> str:
    """Mean over seeds, with the 95 % interval of all their episodes together."""
    if has_success(outcomes[0]):
        return shown(*mean_interval([o.success for o in outcomes], outcomes[0].episodes))
    mean = mean_score(outcomes)
    half = Z95 * math.hypot(*(o.return_error for o in outcomes)) / len(outcomes)
    return f"{mean:,.0f} ({mean - half:,.0f} to {mean + half:,.0f})"


def _setting(config: StudyConfig) -> str:
    return (
        f"Seeds {', '.join(map(str, config.seeds))}, of demonstrations, cloning and fine-tuning; {config.episodes} "
        "held-out episodes a policy, which is the best of the evaluations during its fine-tuning, 100 episodes each "
        "from other starts: the points of the curves, where bands are Student's 95 % intervals of the mean over seeds. "
        "Gaussian policies are cloned from the same demonstrations in as many gradient steps and fine-tuned with as "
        "many environment and gradient steps; minutes are of the fine-tuning, its evaluations included."
    )


on_metaworld, on_gym = partial(run, "finetune-metaworld"), partial(run, "finetune-gym")
hopper, walker2d, halfcheetah, on_avoid = (partial(run, name) for name in (*GYM, "avoid"))

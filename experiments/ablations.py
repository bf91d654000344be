"""Study `ablations`: what each of DPPO's choices does (arXiv:2409.00588, section 5.4 and appendix), at a small size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dprl.agents import DPPOConfig
from dprl.diffusion import SolverConfig
from dprl.experiments import plots
from dprl.experiments.policies import slug
from dprl.experiments.runs import CollectConfig, FinetuneConfig, PretrainConfig
from dprl.experiments.studies import (
    Cell,
    Look,
    StudyConfig,
    curve_file,
    grouped,
    mean_interval,
    run_cells,
    shown,
    tuned,
    write_table,
)
from dprl.log import read_rows
from dprl.policy import DiffusionConfig

TASK, NOISE, DEMONSTRATIONS = "pick-place", 0.5, 100
TIMESTEPS = 300_000
CHUNK = 4
DECISIONS = 50
"""Per environment and iteration, with chunks of `CHUNK` actions; shorter chunks take more, for as many steps."""
USUAL = "usual"


@dataclass(frozen=True)
class Variant:
    """One choice made otherwise."""

    choice: str
    value: str
    """In words; `USUAL` is drawn beside the others of every choice."""
    dppo: DPPOConfig
    chunk: int = CHUNK

    @property
    def label(self) -> str:
        """Part of the cells' names."""
        return slug(f"{self.choice} {self.value}")


def variants() -> list[Variant]:
    """Return all, the usual one first."""
    usual = DPPOConfig(tuned_steps=10, n_steps=DECISIONS)
    explore = usual.exploration
    found = [Variant(USUAL, "", usual)]
    found += [Variant("tuned steps K'", str(k), replace(usual, tuned_steps=k, batch_size=200 * k)) for k in (1, 3, 5)]
    found += [Variant("denoising discount", f"{d:g}", replace(usual, denoising_discount=d)) for d in (1.0, 0.9, 0.5)]
    found += [
        Variant(
            "std floor",
            f"{std:g}",
            replace(usual, exploration=replace(explore, min_sampling_std=std, min_log_prob_std=std)),
        )
        for std in (0.055, 0.2, 0.4)
    ]
    found += [
        Variant(
            "executed actions", str(n), replace(usual, n_steps=DECISIONS * CHUNK // n, batch_size=2_000 * CHUNK // n), n
        )
        for n in (1, 2, 8)
    ]
    found.append(Variant("critic", "state and noisy action", replace(usual, critic="state_action")))
    ddim = replace(usual, solver=SolverConfig("ddim", 5, eta=1.0), tuned_steps=5, batch_size=1_000)
    found.append(Variant("solver", "ddim, 5 steps", ddim))
    found.append(Variant("time limits", "bootstrapped", replace(usual, bootstrap_truncated=True)))
    found.append(Variant("precision of updates", "bfloat16", replace(usual, precision="bfloat16")))
    return found


USUAL_VALUES = {
    "tuned steps K'": "10",
    "denoising discount": "0.99",
    "std floor": "0.1",
    "executed actions": "4",
    "critic": "state",
    "solver": "ddpm, 10 steps",
    "time limits": "the end",
    "precision of updates": "float32",
}


def cells(config: StudyConfig) -> list[Cell]:
    """The cloned policies, one for each length of chunks, and every variant of fine-tuning them."""
    return list(_cells(config))


def _cells(config: StudyConfig) -> Iterator[Cell]:
    env = f"metaworld/{TASK}-v3"
    for seed in config.seeds:
        bases = {
            chunk: Cell(
                f"cloned-{chunk}.seed{seed}",
                CollectConfig(env, noise=NOISE, episodes=DEMONSTRATIONS, seed=seed),
                PretrainConfig(
                    "", DiffusionConfig(num_train_timesteps=10, horizon=chunk, n_action_steps=chunk), seed=seed
                ),
                (Look("default", episodes=config.episodes),),
            )
            for chunk in dict.fromkeys(variant.chunk for variant in variants())
        }
        yield from bases.values()
        for variant in variants():
            finetune = FinetuneConfig("", env, TIMESTEPS, dppo=variant.dppo, eval_every=4, eval_episodes=100)
            yield tuned(bases[variant.chunk], f"{variant.label}.seed{seed}", finetune)


def run(config: StudyConfig, *, progress_bar: bool = True) -> Path:
    """Run the study; write ``ablations.md``, ``.csv`` and ``.png`` and return the first."""
    outcomes = run_cells(cells(config), config, progress_bar=progress_bar)
    by_label = grouped(outcomes, lambda o: o.cell.rsplit(".", 1)[0])
    rows, panels = [], dict[str, dict[str, list[Path]]]()
    for choice, usual in USUAL_VALUES.items():
        own = [variant for variant in variants() if variant.choice in (USUAL, choice)]
        for variant in sorted(own, key=lambda v: v.choice == USUAL):
            group = by_label[variant.label]
            before = by_label[f"cloned-{variant.chunk}"]
            curves = [curve_file(config, o.cell) for o in group]
            value = usual if variant.choice == USUAL else variant.value
            rows.append(
                [
                    choice,
                    f"{value} (usual)" if variant.choice == USUAL else value,
                    shown(*mean_interval([o.success for o in before], config.episodes)),
                    shown(*mean_interval([o.success for o in group], config.episodes)),
                    f"{np.mean([_mean_success(curve) for curve in curves]):.2f}",
                    f"{np.mean([o.train_s for o in group]) / 60:.1f}",
                ]
            )
            panels.setdefault(choice, {})[value] = curves
    plots.over_seeds(panels, config.out / "ablations.png", n_columns=3)
    columns = ["choice", "value", "cloned", "fine-tuned", "mean over training", "minutes"]
    return write_table(config, "ablations", "Ablations of DPPO", columns, rows, [_setting(config)], outcomes)


def _mean_success(curve: Path) -> float:
    """Success averaged over a run's evaluations: how fast it learned."""
    return float(np.mean([row[plots.SUCCESS] for row in read_rows(curve) if plots.SUCCESS in row]))


def _setting(config: StudyConfig) -> str:
    return (
        f"Meta-World's {TASK}, {DEMONSTRATIONS} demonstrations with action noise {NOISE}, "
        f"{TIMESTEPS * config.scale:,.0f} environment steps; one choice at a time differs from the usual ones. Seeds "
        f"{', '.join(map(str, config.seeds))}, {config.episodes} held-out episodes of the best policy; the curves' "
        "points are 100 episodes each. γ and λ are of decisions, whatever a decision executes; with other numbers of "
        "executed actions another policy is cloned."
    )

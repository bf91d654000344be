"""Studies `vision` and `vision-metaworld`: policies that must see disc and goal, puck and goal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from dprl.agents import BCConfig
from dprl.envs import avoid
from dprl.experiments import plots
from dprl.experiments.policies import MLP, slug
from dprl.experiments.runs import CollectConfig, PretrainConfig
from dprl.experiments.studies import Cell, Look, StudyConfig, grouped, mean_interval, run_cells, shown, write_table
from dprl.networks import VisionConfig
from dprl.networks.resnet import ResNetConfig

DEMONSTRATIONS = 400
VIT = VisionConfig("vit", shift_pixels=2)
RESNET = VisionConfig("resnet", shift_pixels=2, resnet=ResNetConfig(max_stride=8, base_channels=16))
ENCODERS = {
    "ViT, shared": VIT,
    "ViT, one per camera": replace(VIT, shared=False),
    "ResNet-18, shared": RESNET,
    "ResNet-18, one per camera": replace(RESNET, shared=False),
}
STEPS = 8_000

METAWORLD = CollectConfig("metaworld/push-v3-pixels", noise=0.5, episodes=100)
METAWORLD_ENCODERS = {"ViT": VisionConfig("vit"), "ResNet-18": VisionConfig("resnet")}
METAWORLD_STEPS = 40_000


def cells(config: StudyConfig) -> list[Cell]:
    """Every encoder on every seed, looked at as it is and with black images."""
    collect = CollectConfig(avoid.PIXELS_ID, noise=0.1, episodes=DEMONSTRATIONS)
    return _cells(config, collect, ENCODERS, STEPS, precision="bfloat16")


def metaworld_cells(config: StudyConfig) -> list[Cell]:
    """The same of Meta-World; a scale below 1 also takes fewer demonstrations, whose every frame is rendered."""
    episodes = max(2, round(METAWORLD.episodes * min(1.0, config.scale)))
    collect = replace(METAWORLD, episodes=episodes)
    return _cells(config, collect, METAWORLD_ENCODERS, METAWORLD_STEPS, precision="float32")


def run(config: StudyConfig, *, progress_bar: bool = True) -> Path:
    """Run the study; write ``vision.md``, ``.csv`` and ``.png`` and return the first."""
    setting = (
        f"`{avoid.PIXELS_ID}`: two images of 48 pixels and the point's position; {DEMONSTRATIONS} demonstrations with "
        f"action noise 0.1; {STEPS * config.scale:,.0f} gradient steps of 64 chunks in bfloat16, images shifted by at "
        "most 2 pixels; the ResNet has 16 base channels and a stride of 8. "
    )
    return _run("vision", cells(config), ENCODERS, setting, config, progress_bar=progress_bar)


def run_metaworld(config: StudyConfig, *, progress_bar: bool = True) -> Path:
    """Run it with Meta-World's camera; write ``vision-metaworld.md``, ``.csv`` and ``.png`` and return the first."""
    todo = metaworld_cells(config)
    setting = (
        f"`{METAWORLD.env}`: an image of 84 pixels, and a state without the goal; {todo[0].collect.episodes} "
        f"demonstrations with action noise {METAWORLD.noise}; {METAWORLD_STEPS * config.scale:,.0f} gradient steps of "
        "64 chunks, images shifted by at most 4 pixels. "
    )
    return _run("vision-metaworld", todo, METAWORLD_ENCODERS, setting, config, progress_bar=progress_bar)


def _cells(
    config: StudyConfig,
    collect: CollectConfig,
    encoders: dict[str, VisionConfig],
    steps: int,
    *,
    precision: Literal["float32", "bfloat16"],
) -> list[Cell]:
    return [
        Cell(
            f"{slug(name)}.seed{seed}",
            replace(collect, seed=seed),
            PretrainConfig(
                "",
                policy=replace(MLP, horizon=8, n_action_steps=4, vision=vision),
                steps=steps,
                bc=BCConfig(batch_size=64, learning_rate=5e-4, precision=precision),
                seed=seed,
            ),
            (Look("sees", episodes=config.episodes), Look("black images", episodes=config.episodes, blind=True)),
        )
        for seed in config.seeds
        for name, vision in encoders.items()
    ]


def _run(
    study: str,
    todo: list[Cell],
    encoders: dict[str, VisionConfig],
    setting: str,
    config: StudyConfig,
    *,
    progress_bar: bool,
) -> Path:
    outcomes = run_cells(todo, config, progress_bar=progress_bar)
    slugs = {slug(name): name for name in encoders}
    rows, bars = [], []
    for key, group in grouped(outcomes, lambda o: o.cell.split(".")[0]).items():
        rates = {
            look: mean_interval([o.success for o in group if o.look == look], config.episodes)
            for look in ("sees", "black images")
        }
        bars.append((slugs[key], rates))
        rows.append(
            [
                slugs[key],
                *(shown(*rate) for rate in rates.values()),
                f"{group[0].parameters / 1e6:.2f}",
                f"{np.mean([o.train_s for o in group]) / 60:.0f}",
                f"{np.mean([o.latency_ms for o in group]):.1f}",
            ]
        )
    figure = plots.new_figure(figsize=(7, 3.6))
    axis = figure.subplots()
    for shift, look in ((-0.2, "sees"), (0.2, "black images")):
        means = [rates[look] for _, rates in bars]
        errors = [[max(m - low, 0) for m, low, _ in means], [max(high - m, 0) for m, _, high in means]]
        axis.bar(np.arange(len(bars)) + shift, [m for m, _, _ in means], 0.4, yerr=errors, capsize=3, label=look)
    axis.set_xticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axis.set_ylabel("success (95 % interval)")
    axis.set_ylim(0, 1)
    axis.legend(loc="center right", fontsize=8)
    figure.savefig(config.out / f"{study}.png", dpi=120)
    setting += (
        f"Seeds {', '.join(map(str, config.seeds))}, {config.episodes} held-out episodes each; one core. Black images "
        "blindfold the same trained policy."
    )
    columns = ["encoder", "success (95 %)", "with black images", "million weights", "minutes of training",
               "ms per decision"]  # fmt: skip
    return write_table(config, study, "Seeing", columns, rows, [setting], outcomes)

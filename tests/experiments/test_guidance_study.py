"""What the ways of the guidance study cost, and its table."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dprl.experiments import guidance, offline, plots, studies
from dprl.experiments.runs import Seen
from dprl.experiments.studies import Look, Outcome, StudyConfig
from dprl.guidance.spec import steering
from dprl.policy import ChunkCritic, CriticConfig, DiffusionConfig, DiffusionPolicy, Features
from tests.experiments.test_finetuning import outcome


@pytest.mark.parametrize("name", guidance.WAYS)
def test_evaluations_are_those_that_are_made(name: str) -> None:
    way, steps = guidance.WAYS[name], 5
    policy = DiffusionPolicy(Features(3, 2), DiffusionConfig(num_train_timesteps=steps))
    policy.scorer = ChunkCritic(policy, CriticConfig())
    look = way.look(Look(""), None if way.guidance.guide is None else 1.0)
    guide, scorer = steering(look.guidance, policy)
    forward, backward = {"denoiser": 0, "critic": 0}, {"denoiser": 0, "critic": 0}

    def counting(kind: str, rows_at: int):
        def hook(module, inputs, output):
            rows = output.shape[rows_at]
            forward[kind] += rows
            if output.requires_grad:
                output.register_hook(lambda _: backward.__setitem__(kind, backward[kind] + rows))

        return hook

    policy.requires_grad_(False)
    policy.base.register_forward_hook(counting("denoiser", 0))
    policy.scorer.q_net.register_forward_hook(counting("critic", 1))
    denoise = policy.base.denoise

    def denoised(noisy, prepared):
        output = denoise(noisy, prepared)
        counting("denoiser", 0)(None, None, output)
        return output

    policy.base.denoise = denoised
    policy.sample(torch.zeros(1, 1, 3), candidates=look.inference.candidates, guide=guide, scorer=scorer)
    made = tuple(forward[kind] + 2 * backward[kind] for kind in ("denoiser", "critic"))
    assert made == way.evaluations(steps)


def test_ways_of_a_group_cost_alike() -> None:
    costs = {name: way.evaluations(5)[0] for name, way in guidance.WAYS.items()}
    assert costs["plain"] == costs["guided"] == 5
    assert costs["best"] == costs["both"] == 80
    assert costs["through"] == pytest.approx(80, rel=0.1)


def test_every_task_has_its_scales() -> None:
    config = StudyConfig(Path("x"), seeds=(0,))
    cells = guidance.cells(config)
    assert [cell.name.split(".")[0] for cell in cells] == list(guidance.SCALES)
    for cell in cells:
        for look in cell.looks:
            assert (look.guidance.scale is None) == (look.guidance.guide is None)


def test_it_is_tabled_with_what_it_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without training anything."""
    seen = (Seen(9, 1.0, 3_000.0, 1.0), Seen(3, 0.5, 1_000.0, 1.0))
    monkeypatch.setattr(guidance, "demonstrators_of", lambda *a, **k: seen)
    monkeypatch.setattr(offline, "random_return", lambda env: 0.0)

    def pretend(cells: list[studies.Cell], config: StudyConfig, *, progress_bar: bool) -> list[Outcome]:
        return [pretended(cell, look) for cell in cells for look in cell.looks]

    def pretended(cell: studies.Cell, look: Look) -> Outcome:
        success = math.nan if cell.name.startswith("hopper") else 0.5
        return replace(
            outcome(cell.name), look=look.name, success=success, episodes=200, return_mean=1_500.0, return_error=30.0
        )

    monkeypatch.setattr(guidance, "run_cells", pretend)
    text = guidance.run(StudyConfig(tmp_path, seeds=(0, 1), episodes=200), progress_bar=False).read_text()
    assert "| push | best of 16 | 0.50 (0.45 to 0.55) | 0.50, 0.50 | 80 | 16 |" in text
    assert "| hopper-medium-expert | value-guided | 50 (" in text
    assert (tmp_path / "guidance.png").exists()


def test_bars_are_drawn(tmp_path: Path) -> None:
    plots.bars({"a": {"one": [0.1, 0.2], "two": [0.5]}, "b": {"one": [3.0], "two": [4.0]}}, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000

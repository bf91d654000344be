"""`dprl inspect` and `dprl convert`."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dprl.cli import main
from dprl.data import Summary, load_dataset, open_dataset, save_dataset, summarize
from dprl.experiments import inspection
from tests.data.test_minari import SPEC, toy_episodes

pytest.importorskip("h5py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_dataset(toy_episodes(), tmp_path / "demos", SPEC)
    return tmp_path / "demos"


@pytest.fixture
def summary(folder: Path) -> Summary:
    with open_dataset(folder) as source:
        return summarize(source)


def text(summary: Summary) -> str:
    console = Console(width=120, record=True)
    console.print(inspection.report(summary))
    return re.sub(r" +", " ", console.export_text())


def test_a_summary_has_what_is_in_the_data(summary: Summary) -> None:
    data = toy_episodes()
    np.testing.assert_array_equal(summary.lengths, data.lengths)
    assert summary.returns is not None
    assert summary.success is not None
    ends = np.split(np.asarray(data.rewards), data.ends[:-1])
    np.testing.assert_allclose(summary.returns, [part.sum() for part in ends], rtol=1e-6)
    np.testing.assert_array_equal(summary.success, data.success)
    np.testing.assert_array_equal(summary.terminated, data.terminated)
    np.testing.assert_array_equal(summary.observation_limits, data.limits("observations"))
    np.testing.assert_array_equal(summary.action_limits, data.limits("actions"))
    np.testing.assert_array_equal(summary.actions, data.actions)


def test_few_actions_are_kept_of_many(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dprl.data.summary.SAMPLED", 4)
    with open_dataset(folder) as source:
        kept = summarize(source).actions
    np.testing.assert_array_equal(kept, toy_episodes().actions[::3])


def test_means_are_of_the_actions_alone(folder: Path) -> None:
    data = toy_episodes()
    data.actions[:] = 0
    data.actions[0] = 1
    save_dataset(data, folder.parent / "zeros", SPEC)
    with open_dataset(folder.parent / "zeros") as source:
        assert "action 0 0 0.1111 1 " in text(summarize(source))


@pytest.mark.filterwarnings("error")
def test_histograms_of_enormous_numbers(folder: Path) -> None:
    data = toy_episodes()
    data.actions[:] = np.float32(3e38)
    data.actions[0] = np.float32(-3e38)
    save_dataset(data, folder.parent / "large", SPEC)
    with open_dataset(folder.parent / "large") as source:
        assert "3e+38" in text(summarize(source))


def test_the_report_says_what_is_there(summary: Summary) -> None:
    shown = text(summary)
    lines = ["environment toy/line", "episodes 3, 9 steps", "observation 2 numbers", "action 1 numbers"]
    lines += ["rewards in the data", "success 0.33 of the episodes", "terminated 2 of 3", "return ", "action 0"]
    for line in lines:
        assert line in shown
    assert "last outcome" not in shown


def test_what_is_not_known_is_said(folder: Path) -> None:
    known = np.array([True, False, False])
    data = replace(toy_episodes(), rewards_from="none", env_id=None, final_known=known, rewards=np.zeros(9, np.float32))
    save_dataset(data, folder.parent / "bare", SPEC)
    with open_dataset(folder.parent / "bare") as source:
        shown = text(summarize(source))
    for line in (
        "rewards none, nor success: for imitation alone",
        "success not known",
        "last outcome not kept in 2 of 3",
    ):
        assert line in shown
    assert "return " not in shown


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (np.array([0.0, 1.0]), "█" + " " * 22 + "█"),
        (np.array([0.0] * 8 + [1.0]), "█" + " " * 22 + "▁"),
        (np.array([3.0]), " " * 12 + "█" + " " * 11),
    ],
)
def test_bars(values: np.ndarray, shown: str) -> None:
    assert inspection.bars(values, np.array([values.min(), values.max()])) == shown


def test_histograms_are_drawn(summary: Summary, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    inspection.draw(summary, tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> int:
        return main(list(words))

    copy = folder.parent / "copy"
    assert run("inspect", str(folder), "--quiet") == 0
    assert "3, 9 steps" in capsys.readouterr().out
    assert run("convert", str(folder), str(copy), "--quiet") == 0
    assert "3 episodes of a Minari data set" in capsys.readouterr().out
    np.testing.assert_array_equal(load_dataset(copy).actions, toy_episodes().actions)
    assert run("convert", str(folder), str(copy), "--quiet") == 2
    assert "already exists" in capsys.readouterr().err
    assert run("inspect", str(folder.parent), "--quiet") == 2
    assert "holds no data set" in capsys.readouterr().err
    assert run("list", "formats") == 0
    assert "robomimic" in capsys.readouterr().out

"""`dprl inspect` and `dprl convert`."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dprl.cli import main
from dprl.data import Episodes, Summary, load_dataset, open_dataset, save_dataset, summarize
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
        few = summarize(source)
    data = toy_episodes()
    assert 0 < len(few.actions) < len(data.actions)
    assert set(few.actions.ravel()) <= set(data.actions.ravel())
    np.testing.assert_allclose(few.action_mean, data.actions.mean(axis=0), rtol=1e-6)


def test_actions_that_alternate_are_not_sampled_in_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = toy_episodes()
    every = Episodes.concatenate([data] * 20)
    every.actions[:, 0] = np.arange(len(every.actions)) % 2
    save_dataset(every, folder.parent / "alternating", SPEC)
    monkeypatch.setattr("dprl.data.summary.SAMPLED", len(every.actions) // 2)
    with open_dataset(folder.parent / "alternating") as source:
        summary = summarize(source)
    assert 0.4 < summary.actions.mean() < 0.6
    assert summary.action_mean == pytest.approx(0.5)


@pytest.mark.filterwarnings("error")
def test_numbers_that_are_all_the_same_enormous_one(folder: Path) -> None:
    data = toy_episodes()
    data.actions[:] = np.float32(1e30)
    data.rewards[:] = np.float32(3e38)
    save_dataset(data, folder.parent / "same", SPEC)
    with open_dataset(folder.parent / "same") as source:
        summary = summarize(source)
    assert "action 0 1e+30 1e+30 1e+30" in text(summary)
    inspection.draw(summary, folder.parent / "same.png")


def test_every_number_of_an_action_is_shown(summary: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "MOST_PANELS", 3)
    wide = replace(
        summary,
        action_size=5,
        action_limits=np.zeros((2, 5), np.float32),
        action_mean=np.zeros(5, np.float32),
        actions=np.zeros((9, 5), np.float32),
    )
    assert "action 4 0 0 0" in text(wide)
    inspection.draw(wide, tmp_path / "wide.png")
    assert (tmp_path / "wide.png").is_file()


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

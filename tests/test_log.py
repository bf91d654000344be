"""Metrics: rows that survive a crash and a resume, and loggers that fail without stopping anything."""

import json
import sys
import warnings

import pytest

from dprl.errors import CheckpointError
from dprl.log import MetricsLog, read_metrics


def boom(*_, **__):
    raise RuntimeError("boom")


@pytest.fixture
def no_tensorboard(monkeypatch):
    """As if it were not installed: it takes seconds to import."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


@pytest.fixture
def recorded():
    """Every warning, each time it is given."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def messages(recorded, word):
    return [str(w.message) for w in recorded if word in str(w.message)]


def write_rows(folder, *iterations, keep=0, **options):
    log = MetricsLog(folder, keep_iterations=keep, **options)
    for i in iterations:
        log.write({"loss": i / 4}, i, 100 * i)
    log.close()


@pytest.mark.usefixtures("no_tensorboard")
class TestRows:
    def test_each_row_is_a_line_of_json(self, tmp_path):
        write_rows(tmp_path, 0, 1)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [
            {"iteration": 0, "timesteps": 0, "loss": 0.0},
            {"iteration": 1, "timesteps": 100, "loss": 0.25},
        ]
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]

    def test_a_row_can_be_read_before_the_log_is_closed(self, tmp_path):
        log = MetricsLog(tmp_path)
        log.write({"loss": 1.0}, 0, 0)
        assert len(read_metrics(tmp_path)) == 1
        log.close()

    def test_resuming_drops_the_rows_of_later_iterations(self, tmp_path):
        write_rows(tmp_path, 0, 1, 2, 3)
        write_rows(tmp_path, 2, keep=1)
        assert [row["iteration"] for row in read_metrics(tmp_path)] == [0, 1, 2]

    @pytest.mark.parametrize("cut", [1, 10, 35])
    def test_a_last_line_that_was_cut_off_is_dropped(self, tmp_path, cut):
        write_rows(tmp_path, 0, 1, 2)
        file = tmp_path / "metrics.jsonl"
        file.write_bytes(file.read_bytes()[: -1 - cut])
        assert [row["iteration"] for row in read_metrics(tmp_path)] == [0, 1]
        write_rows(tmp_path, 2, keep=2)
        assert [row["iteration"] for row in read_metrics(tmp_path)] == [0, 1, 2]
        assert all(json.loads(line) for line in file.read_text().splitlines())

    @pytest.mark.parametrize("damage", [b"[1]", b"{", b'{"loss": 1}', b"\xff\xfe"])
    def test_a_damaged_line_within_is_refused_and_nothing_is_lost(self, tmp_path, damage):
        write_rows(tmp_path, 0, 1, 2)
        file = tmp_path / "metrics.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)
        damaged = lines[0] + damage + b"\n" + b"".join(lines[2:])
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"metrics.jsonl', line 2 is damaged"):
            write_rows(tmp_path, 3, keep=2)
        assert file.read_bytes() == damaged

    def test_a_new_run_starts_empty_and_no_file_is_no_rows(self, tmp_path):
        assert read_metrics(tmp_path) == []
        write_rows(tmp_path, 1, 2)
        write_rows(tmp_path)
        assert read_metrics(tmp_path) == []


def test_a_missing_tensorboard_is_no_matter(tmp_path, no_tensorboard, recorded):
    write_rows(tmp_path, 0, 1)
    assert len(read_metrics(tmp_path)) == 2
    assert recorded == []


def failing_sink(where):
    """A logger that fails when opened, at each row, or when closed."""

    def opener(*_):
        return (boom if where == "row" else lambda *_: None, boom if where == "close" else lambda: None)

    return boom if where == "open" else opener


@pytest.mark.parametrize("where", ["open", "row", "close"])
@pytest.mark.parametrize(("method", "name"), [("_tensorboard", "TensorBoard"), ("_wandb", "W&B")])
def test_a_failing_logger_warns_once_and_stops_nothing(
    tmp_path, monkeypatch, no_tensorboard, recorded, method, name, where
):
    monkeypatch.setattr(MetricsLog, method, staticmethod(failing_sink(where)))
    write_rows(tmp_path, 0, 1, 2, wandb_project="p" if method == "_wandb" else None)
    assert len(read_metrics(tmp_path)) == 3
    assert messages(recorded, name) == [f"logging to {name} is off: RuntimeError: boom"]


def test_one_failing_logger_leaves_the_other_on(tmp_path, monkeypatch, recorded):
    rows = []
    monkeypatch.setattr(MetricsLog, "_tensorboard", staticmethod(lambda *_: (lambda m, t: rows.append(t), boom)))
    monkeypatch.setattr(MetricsLog, "_wandb", staticmethod(failing_sink("row")))
    write_rows(tmp_path, 0, 1, wandb_project="p")
    assert rows == [0, 100]
    assert len(messages(recorded, "W&B")) == len(messages(recorded, "TensorBoard")) == 1


def test_an_absent_wandb_warns_once_and_stops_nothing(tmp_path, monkeypatch, no_tensorboard, recorded):
    monkeypatch.setitem(sys.modules, "wandb", None)
    write_rows(tmp_path, 0, 1, wandb_project="p")
    assert len(read_metrics(tmp_path)) == 2
    assert len(messages(recorded, "W&B is off")) == 1


def test_wandb_is_not_touched_unless_asked(tmp_path, monkeypatch, no_tensorboard, recorded):
    monkeypatch.setattr(MetricsLog, "_wandb", staticmethod(boom))
    write_rows(tmp_path, 0)
    assert recorded == []


def test_tensorboard_gets_every_row(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_rows(tmp_path, 0, 1, 2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0.0), (100, 0.25), (200, 0.5)]


@pytest.mark.parametrize("mode", [None, "offline"])
def test_wandb_without_a_login_logs_offline(tmp_path, monkeypatch, no_tensorboard, recorded, mode):
    wandb = pytest.importorskip("wandb")
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    (tmp_path / "run").mkdir()
    write_rows(tmp_path / "run", 0, 1, wandb_project="p")
    wandb.teardown()
    (run,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
    assert len(messages(recorded, "W&B logs offline")) == 1
    assert messages(recorded, "is off") == []
    assert len(read_metrics(tmp_path / "run")) == 2

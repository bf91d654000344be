"""The scaling benchmark: what it measures, and the whole command, small."""

import json

import numpy as np
import pytest

pytest.importorskip("ray")
from dprl.errors import ConfigError
from dprl.experiments.benchmarks import scaling
from dprl.experiments.benchmarks.cluster_model import PARTS
from dprl.observations import map_parts
from tests.toys import ARRAYS


def test_what_sleeps_is_as_large_as_what_it_stands_for():
    pytest.importorskip("envpool")
    config = scaling.ScalingBenchmark(envs_per_worker=2, n_steps=2, repeats=2)
    for name, case in scaling.cases(config).items():
        real, asleep = (scaling.measured_load(name, c, config) for c in (case, scaling.sleeping(case)))
        for field in ARRAYS:
            ours, theirs = (getattr(reply.result, field.name) for _, reply in (real, asleep))
            map_parts(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), ours, theirs)
        assert asleep[0].weights_bytes == pytest.approx(real[0].weights_bytes, rel=0.01)


@pytest.mark.full
def test_the_command(tmp_path, capsys):
    pytest.importorskip("envpool")
    file, figure = tmp_path / "figures.json", tmp_path / "figure.png"
    config = scaling.ScalingBenchmark(
        envs_per_worker=2, n_steps=2, largest=6, checked=(1, 3), repeats=2, json=file, figure=figure
    )
    scaling.main(config)
    found = json.loads(file.read_text())
    ran = [(c["load"], c["workers"]) for c in found["checked"]]
    assert ran == [("state", 1), ("state", 3), ("images", 1), ("images", 3)]
    assert [s["workers"] for s in found["simulated"]] == [1, 2, 4, 6] * 2
    assert all(min(m["costs"].values()) >= 0 and m["costs"]["put"] > 0 for m in found["measured"])
    assert figure.stat().st_size > 10_000
    assert {s["limited_by"] for s in found["simulated"]} <= set(PARTS)
    assert "Simulated" in capsys.readouterr().out


def test_refusals():
    with pytest.raises(ConfigError, match="gbit_per_s = 0"):
        scaling.ScalingBenchmark(gbit_per_s=0)
    with pytest.raises(ConfigError, match="checked = "):
        scaling.ScalingBenchmark(checked=())
    with pytest.raises(ConfigError, match="nodes = 1"):
        scaling.ScalingBenchmark(nodes=1)

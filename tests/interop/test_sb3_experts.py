"""Experts of stable-baselines3: trained, chosen, continued, and playing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("stable_baselines3")

from dprl import checkpoint
from dprl.cli import main
from dprl.data import load_dataset
from dprl.envs.experts import make_expert
from dprl.errors import ConfigError, EnvError
from dprl.experiments.runs import ExpertConfig, Seen, train_expert
from dprl.interop import sb3_experts
from dprl.interop.sb3_experts import RETURNS_FILE, choose

TINY = ExpertConfig("Hopper-v5", minutes=0.02, n_envs=2, n_steps=16, batch_size=16, n_epochs=1, eval_every=32,
                    eval_episodes=2)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("experts") / "hopper"
    train_expert(TINY, out, progress_bar=False)
    return out


def seen(out: Path) -> list[Seen]:
    return [Seen(**row) for row in checkpoint.read_json(out / RETURNS_FILE)]


def test_leaves_the_best_and_a_medium_one(trained: Path) -> None:
    rows = seen(trained)
    assert rows[-1].minutes >= TINY.minutes
    best = max(rows, key=lambda row: row.return_mean)
    kept = trained / "checkpoints" / f"{best.name}.zip"
    assert (trained / "expert.zip").read_bytes() == kept.read_bytes()
    assert (trained / "medium.zip").is_file()


def test_medium_is_nearest_a_third_of_the_best_and_not_later(tmp_path: Path) -> None:
    rows = [Seen(step, 0.0, value, 0.0) for step, value in ((1, 10), (2, 95), (3, 130), (4, 300), (5, 100))]
    (tmp_path / "checkpoints").mkdir()
    for row in rows:
        for end in (".zip", "_vecnormalize.pkl"):
            (tmp_path / "checkpoints" / f"{row.name}{end}").write_text(f"{row.timesteps}{end}")
    best, medium = choose(tmp_path, rows)
    assert (best.timesteps, medium.timesteps) == (4, 2)
    assert (tmp_path / "expert.zip").read_text() == "4.zip"
    assert (tmp_path / "medium_vecnormalize.pkl").read_text() == "2_vecnormalize.pkl"


def test_goes_on_where_it_stopped(trained: Path) -> None:
    before = seen(trained)
    train_expert(replace(TINY, minutes=before[-1].minutes + 0.01), trained, progress_bar=False)
    after = seen(trained)
    assert after[: len(before)] == before
    assert after[-1].timesteps > before[-1].timesteps
    assert after[-1].minutes >= before[-1].minutes + 0.01


def test_one_that_was_stopped_before_it_was_ever_evaluated_goes_on(tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dprl.interop.sb3_experts._Watch._on_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train_expert(TINY, tmp_path / "expert", progress_bar=False)
    train_expert(TINY, tmp_path / "expert", progress_bar=False)
    assert (tmp_path / "expert/medium.zip").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": "Walker2d-v5"}, "env = 'Walker2d-v5': must be 'Hopper-v5', as"),
        ({"seed": 1}, "seed = 1: must be 0, as"),
    ],
)
def test_other_settings_do_not_go_on_in_a_folder(trained: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_expert(replace(TINY, **changes), trained, progress_bar=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 2.0}, "gamma = 2.0: must be from 0 to 1"),
        ({"clip_range": -1.0}, "clip_range = -1.0: must be above 0"),
        ({"batch_size": 1}, "batch_size = 1: must be at least 2"),
        ({"n_envs": 1, "n_steps": 1}, r"n_envs \* n_steps = 1: must be at least 2"),
        ({"env": "AvoidPixels-v0"}, "env = 'AvoidPixels-v0': must be seen by its state"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train_expert(replace(TINY, **changes), tmp_path / "expert", progress_bar=False)
    assert not (tmp_path / "expert").exists()


def test_a_third_of_the_way_where_returns_are_negative(tmp_path: Path) -> None:
    rows = [Seen(step, 0.0, value, 0.0) for step, value in ((1, -1500), (2, -1100), (3, -450), (4, -150))]
    (tmp_path / "checkpoints").mkdir()
    for row in rows:
        for end in (".zip", "_vecnormalize.pkl"):
            (tmp_path / "checkpoints" / f"{row.name}{end}").write_text("")
    best, medium = choose(tmp_path, rows)
    assert (best.timesteps, medium.timesteps) == (4, 2)


def test_a_policy_of_a_class_of_its_own_is_named(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own: ...

    Own.__module__ = "mine"
    monkeypatch.setattr(sb3_experts, "load_from_zip_file", lambda *_, **__: ({"policy_class": Own}, None, None))
    with pytest.raises(EnvError, match=r"holds a policy of a class of its own, .*Own"):
        make_expert(str(trained / "expert.zip"), "Hopper-v5")


def test_a_finished_training_stays_as_it_is(trained: Path) -> None:
    before = seen(trained)
    train_expert(TINY, trained, progress_bar=False)
    assert seen(trained) == before


def test_demonstrates_as_it_was_normalised(trained: Path) -> None:
    expert = make_expert(str(trained / "expert.zip"), "Hopper-v5")
    states = np.random.default_rng(0).standard_normal((3, 11)).astype(np.float32)
    before = states.copy()
    actions = expert.act(states)
    assert actions.shape == (3, 3)
    assert actions.dtype == np.float32
    np.testing.assert_array_equal(states, before)
    (trained / "bare.zip").write_bytes((trained / "expert.zip").read_bytes())
    assert not np.allclose(make_expert(str(trained / "bare.zip"), "Hopper-v5").act(states), actions)


@pytest.mark.parametrize("algorithm", ["SAC", "TD3", "A2C"])
def test_models_of_other_algorithms_demonstrate_too(algorithm: str, tmp_path: Path) -> None:
    import stable_baselines3

    model = getattr(stable_baselines3, algorithm)("MlpPolicy", "Pendulum-v1", device="cpu", seed=0)
    model.save(tmp_path / "own.zip")
    states = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    expected, _ = model.predict(states, deterministic=True)
    np.testing.assert_array_equal(make_expert(str(tmp_path / "own.zip"), "Pendulum-v1").act(states), expected)


def test_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    with pytest.raises(EnvError, match=r"nowhere\.zip.*does not exist"):
        make_expert(str(tmp_path / "nowhere.zip"), "Hopper-v5")
    (tmp_path / "bad.zip").write_text("no zip")
    with pytest.raises(EnvError, match=r"bad\.zip.*holds no model"):
        make_expert(str(tmp_path / "bad.zip"), "Hopper-v5")


def test_an_expert_of_another_environment_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["collect", "HalfCheetah-v5", "--expert", str(trained / "expert.zip"), "--out", str(tmp_path / "data")]
    assert main(asked) == 2
    assert "maps (11,) to (3,), but 'HalfCheetah-v5' (17,) to (6,)" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_the_command_line_trains_and_collects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = [
        "--minutes", "0.02", "--n-envs", "2", "--n-steps", "16", "--batch-size", "16", "--eval-every", "1000",
        "--eval-episodes", "1",
    ]  # fmt: skip
    out = tmp_path / "expert"
    assert main(["train-expert", "Hopper-v5", *tiny, "--out", str(out), "--quiet"]) == 0
    assert "medium.zip: return" in capsys.readouterr().out
    asked = ["collect", "Hopper-v5", "--expert", str(out / "medium.zip"), "--transitions", "300", "--out"]
    assert main([*asked, str(tmp_path / "data"), "--quiet"]) == 0
    data = load_dataset(tmp_path / "data")
    assert data.ends[-1] >= 300
    assert data.ends[-2] < 300

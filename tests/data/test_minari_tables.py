"""Minari's Arrow and Parquet layouts, written by Minari: what is read, and damage that is named."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest

from dprl.data import Episodes, convert, load_dataset, open_dataset
from dprl.errors import DatasetError, MissingDependencyError

minari = pytest.importorskip("minari")
pytest.importorskip("pyarrow")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")

LENGTHS = (3, 5)
RNG = np.random.default_rng(0)
EPISODES = [
    {
        "observations": RNG.normal(size=(n + 1, 2)).astype(np.float32),
        "actions": RNG.uniform(-1, 1, (n, 1)).astype(np.float32),
        "rewards": RNG.normal(size=n),
        "terminations": np.arange(n) == n - 1 if i == 0 else np.zeros(n, bool),
        "truncations": np.arange(n) == n - 1 if i == 1 else np.zeros(n, bool),
        "infos": {"success": np.arange(n + 1) == n if i == 0 else np.zeros(n + 1, bool)},
    }
    for i, n in enumerate(LENGTHS)
]


def write(root: Path, monkeypatch: pytest.MonkeyPatch, data_format: str, *, images: bool = False) -> Path:
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    buffers = []
    for i, episode in enumerate(EPISODES):
        observations = episode["observations"]
        if images:
            pixels = RNG.integers(0, 256, (len(observations), 40, 36, 3), np.uint8)
            observations = {"state": observations, "top": pixels}
        buffers.append(EpisodeBuffer(id=i, seed=10 + i, **{**episode, "observations": observations}))
    if images:
        space = gymnasium.spaces.Dict({"state": space, "top": gymnasium.spaces.Box(0, 255, (40, 36, 3), np.uint8)})
    minari.create_dataset_from_buffers(
        "toy/line-v0", buffers, "Hopper-v5", observation_space=space,
        action_space=gymnasium.spaces.Box(-1, 1, (1,), np.float32), data_format=data_format,
    )  # fmt: skip
    return root / "toy" / "line-v0"


@pytest.fixture(params=["arrow", "parquet"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write(tmp_path, monkeypatch, request.param)


def check(data: Episodes) -> None:
    assert data.lengths.tolist() == list(LENGTHS)
    joined = {name: np.concatenate([e[name] for e in EPISODES]) for name in ("actions", "rewards")}
    np.testing.assert_allclose(data.actions, joined["actions"])
    np.testing.assert_allclose(data.rewards, joined["rewards"], rtol=1e-6)
    np.testing.assert_allclose(data.observations, np.concatenate([e["observations"][:-1] for e in EPISODES]))
    np.testing.assert_allclose(data.final_observations, [e["observations"][-1] for e in EPISODES])
    assert data.terminated.tolist() == [True, False]
    assert data.success.tolist() == [True, False]
    assert data.seeds.tolist() == [10, 11]
    assert data.env_id == "Hopper-v5"


def test_what_is_read(folder: Path) -> None:
    check(load_dataset(folder))


def test_it_becomes_a_data_set_of_ours(folder: Path, tmp_path: Path) -> None:
    with open_dataset(folder) as source:
        convert(source, tmp_path / "ours")
    check(load_dataset(tmp_path / "ours"))


def test_images_are_cameras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_dataset(write(tmp_path, monkeypatch, "arrow", images=True))
    assert data.images["top"].shape == (sum(LENGTHS), 40, 36, 3)
    assert data.observations.shape == (sum(LENGTHS), 2)
    assert np.asarray(data.images["top"]).std() > 40


def test_damage_is_named(folder: Path) -> None:
    table = next(file for file in sorted((folder / "data" / "1").iterdir()) if file.name != "metadata.json")
    table.write_bytes(table.read_bytes()[: table.stat().st_size // 2])
    with open_dataset(folder) as source, pytest.raises(DatasetError, match=r"data/1' is damaged or not of a Minari"):
        list(source)


def test_numbers_that_are_none_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EPISODES[1]["rewards"].copy()
    broken[3] = np.nan
    monkeypatch.setitem(EPISODES[1], "rewards", broken)
    with pytest.raises(DatasetError, match=r"data/1', step 3: rewards is not finite"):
        load_dataset(write(tmp_path, monkeypatch, "arrow"))


def test_without_minari_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "minari.dataset.minari_storage", None)
    with pytest.raises(MissingDependencyError, match="minari"):
        load_dataset(folder)

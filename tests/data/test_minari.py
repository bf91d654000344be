"""Minari's format: what we write comes back, the `minari` package reads it, and damage is named."""

import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from dprl.data import Episodes, load_dataset, save_dataset
from dprl.errors import DatasetError, RunExistsError
from dprl.spec import EnvSpec

h5py = pytest.importorskip("h5py")

SPEC = EnvSpec("toy/line", "", "", 2, (-1.0,), (2.0,), max_episode_steps=4)
LENGTHS = (2, 4, 3)


def toy_episodes() -> Episodes:
    rng = np.random.default_rng(0)
    steps, n = sum(LENGTHS), len(LENGTHS)
    return Episodes(
        observations=rng.normal(size=(steps, 2)).astype(np.float32),
        actions=rng.uniform(-1, 2, (steps, 1)).astype(np.float32),
        rewards=rng.normal(size=steps).astype(np.float32),
        final_observations=rng.normal(size=(n, 2)).astype(np.float32),
        ends=np.cumsum(LENGTHS),
        terminated=np.array([True, False, True]),
        success=np.array([True, False, False]),
        seeds=np.array([5, 6, 2**31 - 1]),
        env_id=SPEC.id,
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "line-demos"
    save_dataset(toy_episodes(), path, SPEC, description="made up")
    return path


def data_file(folder: Path) -> Path:
    return folder / "data" / "main_data.hdf5"


def damage(folder: Path, edit: Callable[["h5py.File"], None]) -> None:
    """Edit the numbers, and remove the manifest that would give it away."""
    with h5py.File(data_file(folder), "r+") as h5:
        edit(h5)
    (folder / "manifest.json").unlink()


def replace(folder: Path, name: str, values: np.ndarray | None) -> None:
    def edit(h5):
        del h5[name]
        if values is not None:
            h5[name] = values

    damage(folder, edit)


def refused(folder: Path, *words: str) -> None:
    """Loading must fail with a message that has the words, in this order."""
    with pytest.raises(DatasetError, match="(?s)" + ".*".join(map(re.escape, words))):
        load_dataset(folder)


def test_round_trip(folder):
    data, loaded = toy_episodes(), load_dataset(folder)
    for field in fields(Episodes):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(data, field.name), field.name)
    assert loaded.observations.dtype == loaded.actions.dtype == loaded.rewards.dtype == np.float32


def test_the_minari_package_reads_it(folder, monkeypatch):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder.parent))
    dataset = minari.load_dataset(folder.name)
    data = toy_episodes()
    assert dataset.total_episodes == 3
    assert dataset.total_steps == sum(LENGTHS)
    assert dataset.observation_space.shape == (2,)
    assert (dataset.action_space.low, dataset.action_space.high) == (np.float32(-1), np.float32(2))
    episodes = list(dataset.iterate_episodes())
    assert len(episodes) == 3
    for i, (episode, start, end) in enumerate(zip(episodes, data.starts, data.ends, strict=True)):
        observations = np.concatenate([data.observations[start:end], data.final_observations[i : i + 1]])
        np.testing.assert_array_equal(episode.observations, observations)
        np.testing.assert_array_equal(episode.actions, data.actions[start:end])
        np.testing.assert_array_equal(episode.rewards, data.rewards[start:end])
        assert episode.terminations.tolist() == [False] * (end - start - 1) + [bool(data.terminated[i])]
        assert episode.truncations.tolist() == [False] * (end - start - 1) + [not data.terminated[i]]
        assert bool(episode.infos["success"][-1]) == data.success[i]


def test_episodes_need_no_success_seed_or_manifest(folder):
    """Nor does their order follow from their names: it is that of their numbers."""

    def edit(h5):
        for i in range(3):
            del h5[f"episode_{i}"]["infos"]
            del h5[f"episode_{i}"].attrs["seed"]
            h5[f"episode_{i}"].attrs["success"] = i == 2
        h5.move("episode_1", "episode_10")
        h5.move("episode_0", "episode_9")

    damage(folder, edit)
    loaded = load_dataset(folder)
    assert loaded.lengths.tolist() == [LENGTHS[2], LENGTHS[0], LENGTHS[1]]
    assert loaded.success.tolist() == [True, False, False]
    assert loaded.seeds.tolist() == [-1, -1, -1]


def test_existing_folder_is_not_overwritten(folder):
    with pytest.raises(RunExistsError, match="line-demos"):
        save_dataset(toy_episodes(), folder, SPEC)
    load_dataset(folder)


def test_missing_folder(tmp_path):
    refused(tmp_path / "nothing", "nothing", "holds no data set: it does not exist")


def test_flipped_byte_is_found_through_the_manifest(folder):
    raw = bytearray(data_file(folder).read_bytes())
    raw[raw.index(toy_episodes().actions[:2].tobytes())] ^= 1
    data_file(folder).write_bytes(raw)
    refused(folder, "main_data.hdf5' is damaged")


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_truncated_file(folder, kept, with_manifest):
    raw = data_file(folder).read_bytes()
    data_file(folder).write_bytes(raw[: int(kept * len(raw))])
    if not with_manifest:
        (folder / "manifest.json").unlink()
    refused(folder, "main_data.hdf5' is damaged")


def test_file_that_is_not_hdf5(folder):
    data_file(folder).write_text("episodes")
    (folder / "manifest.json").unlink()
    refused(folder, "main_data.hdf5' is damaged or not of a Minari data set")


@pytest.mark.parametrize(
    ("found", "offset"),
    [(b"episode_1", 0), (b"\x17\x08\x00\x17\x7f\x00\x00\x00", 3)],
    ids=["name of an episode", "description of float32"],
)
def test_flipped_byte_in_the_structure(folder, found, offset):
    raw = bytearray(data_file(folder).read_bytes())
    raw[raw.index(found) + offset] ^= 0xFF
    data_file(folder).write_bytes(raw)
    (folder / "manifest.json").unlink()
    refused(folder, "main_data.hdf5")


def test_no_episodes(folder):
    damage(folder, lambda h5: h5.clear())
    refused(folder, "main_data.hdf5' has no episodes")


def test_episode_without_steps(folder):
    replace(folder, "episode_1/actions", np.zeros((0, 1), np.float32))
    refused(folder, "main_data.hdf5', episode_1", "no steps")


@pytest.mark.parametrize("name", ["observations", "actions", "rewards"])
def test_number_that_is_not_finite(folder, name):
    def edit(h5):
        values = h5["episode_1"][name]
        values[2] = np.nan if name != "actions" else np.inf

    damage(folder, edit)
    refused(folder, "main_data.hdf5', episode_1, step 2: ", name)


def test_number_too_large_for_float32(folder):
    replace(folder, "episode_1/rewards", np.array([0, 0, 1e39, 0]))
    refused(folder, "main_data.hdf5', episode_1, step 2: rewards")


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "terminations", "truncations"])
def test_missing_array(folder, name):
    replace(folder, f"episode_1/{name}", None)
    refused(folder, "main_data.hdf5", "episode_1", name)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("observations", (4, 2)),
        ("observations", (5,)),
        ("actions", (4,)),
        ("rewards", (3,)),
        ("rewards", (4, 2)),
        ("terminations", (5,)),
        ("truncations", (3,)),
    ],
)
def test_wrong_shape(folder, name, shape):
    replace(folder, f"episode_1/{name}", np.zeros(shape, np.float32))
    refused(folder, "main_data.hdf5', episode_1", f"{name} has the shape {shape}")


def test_array_of_words(folder):
    replace(folder, "episode_1/rewards", np.array([b"a", b"b", b"c", b"d"]))
    refused(folder, "main_data.hdf5', episode_1", "rewards has the type")


def test_episodes_of_other_sizes(folder):
    replace(folder, "episode_1/observations", np.zeros((5, 3), np.float32))
    refused(folder, "main_data.hdf5", "differ in observation and action size", "(3, 1), the first has (2, 1)")


def test_dictionary_observations_are_flattened_in_gymnasiums_order(folder):
    def edit(h5):
        for i, length in enumerate(LENGTHS):
            state = np.asarray(h5[f"episode_{i}/observations"])
            del h5[f"episode_{i}/observations"]
            h5[f"episode_{i}/observations/hand"] = state[:, 1]
            h5[f"episode_{i}/observations/arm/angle"] = state[:, :1].reshape(length + 1, 1, 1)

    damage(folder, edit)
    np.testing.assert_array_equal(load_dataset(folder).observations, toy_episodes().observations)
    np.testing.assert_array_equal(load_dataset(folder).final_observations, toy_episodes().final_observations)


def test_dictionary_actions_are_refused(folder):
    def edit(h5):
        del h5["episode_1/actions"]
        h5["episode_1/actions/hand"] = np.zeros((4, 1))

    damage(folder, edit)
    refused(folder, "main_data.hdf5', episode_1", "actions has named parts; only observations may")


def test_episode_that_is_an_array(folder):
    replace(folder, "episode_1", np.zeros(3))
    refused(folder, "main_data.hdf5", "episode_1")


def test_episode_without_a_number(folder):
    damage(folder, lambda h5: h5.move("episode_1", "episode_one"))
    refused(folder, "main_data.hdf5", "one")


@pytest.mark.parametrize("text", ["{", "[]", '{"env_spec": "{"}', '{"env_spec": "[]"}'])
def test_damaged_metadata(folder, text):
    (folder / "data" / "metadata.json").write_text(text)
    (folder / "manifest.json").unlink()
    refused(folder, "metadata.json")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format_version": 99, "sha256": {}}'])
def test_damaged_manifest(folder, text):
    (folder / "manifest.json").write_text(text)
    refused(folder, "line-demos")


def test_environment_is_that_of_gymnasium_where_ours_is_not_named(folder):
    file = folder / "data" / "metadata.json"
    metadata = json.loads(file.read_text())
    del metadata["dprl_env_id"]
    (folder / "manifest.json").unlink()
    file.write_text(json.dumps(metadata))
    assert load_dataset(folder).env_id is None
    file.write_text(json.dumps({**metadata, "env_spec": json.dumps({"id": "Hopper-v5"})}))
    assert load_dataset(folder).env_id == "Hopper-v5"

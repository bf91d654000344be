"""Images in Minari's format: nothing is lost, the `minari` package reads them, they can stay on disk."""

import io
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from dprl.data import Episodes, OnDisk, load_dataset, save_dataset
from dprl.errors import DatasetError
from dprl.spec import Camera, EnvSpec

h5py = pytest.importorskip("h5py")
Image = pytest.importorskip("PIL.Image")

LENGTHS = (2, 4, 3)
LARGE, SMALL, GREY = Camera("large", 32, 40), Camera("small", 4, 6), Camera("grey", 33, 32, channels=1)
SPEC = EnvSpec("toy/seen", "", "", 2, (-1.0,), (2.0,), max_episode_steps=4, cameras=(GREY, LARGE, SMALL))


def toy_episodes(spec: EnvSpec = SPEC) -> Episodes:
    rng = np.random.default_rng(0)
    steps, n, size = sum(LENGTHS), len(LENGTHS), spec.observation_size

    def images(rows: int) -> dict[str, np.ndarray]:
        return {c.name: rng.integers(0, 256, (rows, *c.shape), np.uint8) for c in spec.cameras}

    return Episodes(
        observations=rng.normal(size=(steps, size)).astype(np.float32),
        actions=rng.uniform(-1, 2, (steps, 1)).astype(np.float32),
        rewards=rng.normal(size=steps).astype(np.float32),
        final_observations=rng.normal(size=(n, size)).astype(np.float32),
        ends=np.cumsum(LENGTHS),
        terminated=np.array([True, False, True]),
        success=np.array([True, False, False]),
        seeds=np.array([5, 6, 7]),
        env_id=spec.id,
        images=images(steps),
        final_images=images(n),
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "seen-demos"
    save_dataset(toy_episodes(), path, SPEC)
    return path


def assert_same(one: Episodes, other: Episodes) -> None:
    for field in fields(Episodes):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            for name in a:
                np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), f"{field.name} {name}")
        else:
            np.testing.assert_array_equal(a, b, field.name)


def edit(folder: Path, change: Callable[["h5py.File"], None]) -> None:
    with h5py.File(folder / "data" / "main_data.hdf5", "r+") as h5:
        change(h5)
    (folder / "manifest.json").unlink()


def put(folder: Path, name: str, values, dtype=None) -> None:
    def change(h5):
        del h5[name]
        h5.create_dataset(name, data=values, dtype=dtype)

    edit(folder, change)


def refused(folder: Path, *words: str, memory_map: bool = False) -> None:
    with pytest.raises(DatasetError, match="(?s)" + ".*".join(map(re.escape, words))):
        load_dataset(folder, memory_map=memory_map)


def encoded(frames: np.ndarray, kind: str = "PNG") -> list[np.ndarray]:
    files = []
    for frame in frames:
        stream = io.BytesIO()
        Image.fromarray(frame).save(stream, kind)
        files.append(np.frombuffer(stream.getvalue(), np.uint8))
    return files


@pytest.mark.parametrize("memory_map", [False, True])
@pytest.mark.parametrize("size", [2, 0], ids=["with state", "images alone"])
def test_round_trip(tmp_path, size, memory_map):
    spec = replace(SPEC, observation_size=size)
    save_dataset(toy_episodes(spec), tmp_path / "new", spec)
    loaded = load_dataset(tmp_path / "new", memory_map=memory_map)
    assert_same(loaded, toy_episodes(spec))
    for array in (loaded.observations, loaded.actions, loaded.rewards, *loaded.images.values()):
        assert isinstance(array, OnDisk) == memory_map


def test_the_minari_package_reads_it(folder, monkeypatch):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder.parent))
    load_dataset(folder, memory_map=True)  # its cache should not disturb
    dataset, data = minari.load_dataset(folder.name), toy_episodes()
    assert dataset.observation_space["observation.images.large"].shape == (32, 40, 3)
    for i, (episode, start, end) in enumerate(zip(dataset.iterate_episodes(), data.starts, data.ends, strict=True)):
        seen = episode.observations
        assert (seen["observation.state"][:-1] == data.observations[start:end]).all()
        for name in ("large", "small", "grey"):
            frames = np.concatenate([data.images[name][start:end], data.final_images[name][i : i + 1]])
            read = seen[f"observation.images.{name}"]
            np.testing.assert_array_equal(read, frames[..., 0] if name == "grey" else frames)


def test_foreign_images_are_read(folder):
    """Minari's own JPEG, its array of encoded files of one length, and a single image that is the whole observation."""
    flat = np.full((5, 32, 40, 3), 77, np.uint8)

    def change(h5):
        for i in range(3):
            del h5[f"episode_{i}/observations"]
            frames = encoded(flat[: LENGTHS[i] + 1], "JPEG")
            assert len({len(frame) for frame in frames}) == 1
            h5[f"episode_{i}/observations"] = np.stack(frames)

    edit(folder, change)
    loaded = load_dataset(folder)
    assert loaded.observations.shape == (9, 0)
    assert (loaded.images["pixels"] == 77).all()
    assert loaded.final_images["pixels"].shape == (3, 32, 40, 3)


def test_foreign_names_become_cameras_and_state(folder):
    def change(h5):
        for i in range(3):
            group = h5[f"episode_{i}/observations"]
            group.move("observation.images.small", "robot/left camera")
            group["angle"] = np.full((LENGTHS[i] + 1, 1, 2), 9.0)

    edit(folder, change)
    loaded = load_dataset(folder)
    assert list(loaded.images) == ["grey", "large", "robot_left_camera"]
    np.testing.assert_array_equal(loaded.observations[:, :2], 9)
    np.testing.assert_array_equal(loaded.observations[:, 2:], toy_episodes().observations)


def test_images_on_disk_stay_there_through_select_and_split(folder):
    loaded, data = load_dataset(folder, memory_map=True), toy_episodes()
    train, validation = loaded.select([2, 0, 1]).split(0.3, seed=1)
    for part in (train, validation):
        assert all(isinstance(images, OnDisk) for images in part.images.values())
        images = part.images["large"]
        assert isinstance(images, OnDisk)
        assert images.file == loaded.images["large"].file
        expected = data.select([int(seed) - 5 for seed in part.seeds])
        assert_same(part, expected)
        rows = np.array([[1, 0], [0, 1]])
        np.testing.assert_array_equal(images[rows], expected.images["large"][rows])
        np.testing.assert_array_equal(part.observe(rows)["observation.images.small"], expected.images["small"][rows])
        assert (len(images), images.shape, images.dtype) == (part.ends[-1], (part.ends[-1], 32, 40, 3), np.uint8)
    save_dataset(validation, folder.parent / "part", SPEC)
    assert_same(load_dataset(folder.parent / "part"), validation)


def test_the_cache_is_made_once(folder, monkeypatch):
    first = load_dataset(folder, memory_map=True)
    monkeypatch.setattr("dprl.data.load._fill", None)
    assert_same(load_dataset(folder, memory_map=True), first)


@pytest.mark.parametrize("with_manifest", [True, False])
def test_the_cache_is_of_the_file_it_was_made_from(folder, with_manifest):
    other = toy_episodes()
    other.images["small"][:] = 7
    if not with_manifest:
        (folder / "manifest.json").unlink()
    load_dataset(folder, memory_map=True)
    save_dataset(other, folder.parent / "other", SPEC)
    for name in ("data/main_data.hdf5", "data/metadata.json", "manifest.json"):
        if (folder / name).exists():
            (folder / name).write_bytes((folder.parent / "other" / name).read_bytes())
    assert_same(load_dataset(folder, memory_map=True), other)


def test_damaged_cache(folder):
    load_dataset(folder, memory_map=True)
    (file,) = folder.rglob("images.large.npy")
    file.write_bytes(file.read_bytes()[:-1])
    refused(folder, ".cache", "is damaged: delete it", memory_map=True)
    load_dataset(folder)


def test_folder_that_cannot_be_written(folder, monkeypatch):
    def deny(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr("dprl.checkpoint.publish", deny)
    refused(folder, "cannot be written to", ".cache", "memory_map=False", memory_map=True)


def test_a_damaged_image_leaves_no_cache(folder):
    def change(h5):
        h5["episode_1/observations/observation.images.large"][2] = np.arange(9, dtype=np.uint8)

    edit(folder, change)
    for memory_map in (True, False):
        words = "main_data.hdf5', episode_1: observations/observation.images.large, step 2", "cannot be decoded"
        refused(folder, *words, memory_map=memory_map)
    assert not list(folder.rglob("*.npy"))


LARGE_1, SMALL_1 = (f"episode_1/observations/observation.images.{name}" for name in ("large", "small"))


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        (SMALL_1, np.zeros((5, 4, 6, 3), np.float32), ["is float32 (5, 4, 6, 3); images are uint8 (5, height, width"]),
        (SMALL_1, np.zeros((5, 4, 6, 2), np.uint8), ["is uint8 (5, 4, 6, 2); images are uint8"]),
        (SMALL_1, np.zeros((4, 4, 6, 3), np.uint8), ["has 4 images; 4 actions need 5"]),
        (SMALL_1, np.zeros((5, 6, 4, 3), np.uint8), ["images of (6, 4, 3); those of the first episode are (4, 6, 3)"]),
        ("episode_1/observations/observation.state", np.zeros((4, 2)), ["observation.state has the shape (4, 2)"]),
        ("episode_1/observations/observation.state", np.full((5, 2), np.nan), ["step 0", "is not finite"]),
        ("episode_1/observations/observation.state", np.zeros((5, 3)), []),
    ],
)
def test_wrong_parts_are_refused(folder, name, values, words):
    put(folder, name, values)
    refused(folder, "main_data.hdf5'", *(["episode_1"] if words else ["differ in observation"]), *words)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([np.zeros((32, 40, 3), np.uint8)] * 4, "has 4 images; 4 actions need 5"),
        ([np.zeros((32, 40, 3), np.uint8)] * 4 + [np.zeros((32, 41, 3), np.uint8)], "images differ in shape"),
        ([np.zeros((32, 40, 4), np.uint8)] * 5, "step 0: the image is uint8 (32, 40, 4); it must be uint8 with 1 or 3"),
    ],
)
def test_wrong_encoded_images_are_refused(folder, frames, words):
    def change(h5):
        del h5[LARGE_1]
        dataset = h5.create_dataset(LARGE_1, (len(frames),), h5py.vlen_dtype(np.uint8))
        for i, file in enumerate(encoded(frames)):
            dataset[i] = file

    edit(folder, change)
    refused(folder, "main_data.hdf5', episode_1: observations/observation.images.large", words)


def test_episodes_with_other_cameras_are_refused(folder):
    put(folder, "episode_2/observations/observation.images.grey", np.zeros((4, 2)))
    refused(folder, "episode_2", "observation.images.grey is float64 (4, 2)")

    def change(h5):
        del h5["episode_2/observations/observation.images.grey"]

    (folder / "manifest.json").write_text("")
    edit(folder, change)
    refused(folder, "main_data.hdf5', episode_2: episodes differ in cameras")


def test_parts_that_are_the_same_camera_are_refused(folder):
    edit(folder, lambda h5: h5["episode_0/observations"].copy("observation.images.small", "small"))
    refused(folder, "episode_0", "different parts are the same camera")


def test_saving_needs_the_cameras_of_the_spec(tmp_path):
    with pytest.raises(DatasetError, match=r"cameras .*grey.*, but toy/seen has \{'large'"):
        save_dataset(toy_episodes(), tmp_path / "new", replace(SPEC, cameras=(LARGE,)))
    assert not (tmp_path / "new").exists()


FRAMES, FINAL = np.zeros((9, 2, 2, 3), np.uint8), np.zeros((3, 2, 2, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "final_images", "message"),
    [
        ({"a": FRAMES}, {}, r"cameras \['a'\], but final_images of \[\]"),
        ({"a": FRAMES[1:]}, {"a": FINAL}, r"'a' are uint8 \(8, 2, 2, 3\); they must be uint8 \(9, height"),
        ({"a": FRAMES}, {"a": FRAMES}, r"'a' are uint8 \(9, 2, 2, 3\); they must be uint8 \(3, height"),
        ({"a": FRAMES.astype(float)}, {"a": FINAL}, r"float64 .* must be uint8 \(9, height"),
    ],
)
def test_episodes_check_their_images(images, final_images, message):
    with pytest.raises(DatasetError, match=message):
        replace(toy_episodes(), images=images, final_images=final_images)

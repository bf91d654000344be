"""Other people's formats: what is read, what is made of what they lack, and damage that is named."""

import io
import json
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dprl.data import DataOptions, Episodes, OnDisk, convert, load_dataset, open_dataset, save_dataset
from dprl.data.summary import summarize
from dprl.errors import DatasetError, RunExistsError
from dprl.experiments.runs import wilson_of
from dprl.spec import EnvSpec

h5py = pytest.importorskip("h5py")

LENGTHS = (3, 5, 2)
ENDS = np.cumsum(LENGTHS)
S, D, A = sum(LENGTHS), 4, 2
RNG = np.random.default_rng(0)
OBSERVATIONS = RNG.normal(size=(S, D)).astype(np.float32)
FINAL = RNG.normal(size=(len(LENGTHS), D)).astype(np.float32)
ACTIONS = RNG.uniform(-1, 1, (S, A)).astype(np.float32)
REWARDS = RNG.normal(size=S).astype(np.float32)
IMAGES = RNG.integers(0, 256, (S, 8, 6, 3), np.uint8)
FINAL_IMAGES = RNG.integers(0, 256, (len(LENGTHS), 8, 6, 3), np.uint8)
LAST = np.isin(np.arange(S), ENDS - 1)
STARTS = ENDS - LENGTHS


def parts(array: np.ndarray) -> list[np.ndarray]:
    return np.split(array, ENDS[:-1])


def led_to(array: np.ndarray, final: np.ndarray) -> np.ndarray:
    """What each action led to."""
    return np.concatenate([np.concatenate([part[1:], final[i : i + 1]]) for i, part in enumerate(parts(array))])


# ------------------------------------------------------------------------------------------------- files of each format


def d4rl(path: Path, *, next_observations: bool = True, timeouts: bool = True) -> Path:
    file = path / "hopper.hdf5"
    with h5py.File(file, "w") as h5:
        h5["observations"], h5["actions"], h5["rewards"] = OBSERVATIONS, ACTIONS, REWARDS
        h5["terminals"] = np.arange(S) == ENDS[0] - 1
        if timeouts:
            h5["timeouts"] = np.arange(S) == ENDS[1] - 1
        if next_observations:
            h5["next_observations"] = led_to(OBSERVATIONS, FINAL)
        h5["infos/qpos"] = np.zeros((S, 3))
    return file


ROBOT = {"robot0_eef_pos": slice(0, 1), "robot0_eef_quat": slice(1, 2), "robot0_gripper_qpos": slice(2, 4)}

QUAT = "robot0_eef_quat"
FIRST = np.zeros((LENGTHS[0] + 1, 3, 8, 6), np.uint8)
"""Of the first episode, images whose channels come first."""


def robomimic(path: Path, *, shaped: bool = False, next_obs: bool = True) -> Path:
    file = path / "low_dim.hdf5"
    with h5py.File(file, "w") as h5:
        kwargs = {"robots": ["Panda"], "reward_shaping": shaped}
        h5.create_group("data").attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": kwargs})
        for i in (2, 0, 1):
            demo = h5.create_group(f"data/demo_{i}")
            demo["actions"] = parts(ACTIONS)[i]
            demo["rewards"] = (np.arange(LENGTHS[i]) == LENGTHS[i] - 1) * float(i != 1)
            demo["dones"] = np.arange(LENGTHS[i]) == LENGTHS[i] - 1
            demo.attrs["num_samples"] = LENGTHS[i]
            groups = {"obs": (OBSERVATIONS, IMAGES)}
            if next_obs:
                groups["next_obs"] = led_to(OBSERVATIONS, FINAL), led_to(IMAGES, FINAL_IMAGES)
            for group, (state, images) in groups.items():
                for name, columns in ROBOT.items():
                    demo[f"{group}/{name}"] = parts(state)[i][:, columns]
                demo[f"{group}/object"] = parts(state)[i][:, 3:]
                demo[f"{group}/robot0_joint_pos"] = np.zeros((LENGTHS[i], 7))
                demo[f"{group}/agentview_image"] = parts(images)[i]
        h5["mask/train"] = np.array([b"demo_2", b"demo_0"])
        h5["mask/empty"] = np.array([], "S6")
        h5["mask/stray"] = np.array([b"demo_9"])
    return file


def maniskill(path: Path, *, grouped: bool = True, rewards: bool = True) -> Path:
    file = path / "trajectory.state.pd_ee_delta_pose.h5"
    with h5py.File(file, "w") as h5:
        for i in range(len(LENGTHS)):
            trajectory = h5.create_group(f"traj_{i}")
            state = np.concatenate([parts(OBSERVATIONS)[i], FINAL[i : i + 1]])
            if grouped:
                trajectory["obs/agent/qpos"], trajectory["obs/extra/goal"] = state[:, :3], state[:, 3:]
                frames = np.concatenate([parts(IMAGES)[i], FINAL_IMAGES[i : i + 1]])
                trajectory["obs/sensor_data/hand/rgb"] = frames
                trajectory["obs/sensor_param/hand/intrinsic_cv"] = np.zeros((LENGTHS[i] + 1, 3, 3))
            else:
                trajectory["obs"] = state
            trajectory["actions"] = parts(ACTIONS)[i]
            last = np.arange(LENGTHS[i]) == LENGTHS[i] - 1
            trajectory["terminated"], trajectory["truncated"] = last & (i == 0), last & (i != 0)
            trajectory["success"] = last & (i != 1)
            if rewards:
                trajectory["rewards"] = parts(REWARDS)[i]
    described = {
        "env_info": {"env_id": "PickCube-v1"},
        "episodes": [{"episode_id": i, "episode_seed": 10 + i} for i in range(len(LENGTHS))],
    }
    file.with_suffix(".json").write_text(json.dumps(described))
    return file


def zarr_buffer(path: Path, *, zipped: bool = False, floats: bool = False) -> Path:
    zarr = pytest.importorskip("zarr")
    folder = path / "pusht.zarr"
    root = zarr.open_group(str(folder), mode="w", zarr_format=2)
    arrays = {"action": ACTIONS, "state": OBSERVATIONS, "keypoint": np.zeros((S, 9, 2), np.float32)}
    arrays["img"] = IMAGES.astype(np.float32) if floats else IMAGES
    for name, array in arrays.items():
        root.create_array(f"data/{name}", data=array, chunks=(4, *array.shape[1:]))
    root.create_array("meta/episode_ends", data=ENDS.astype(np.int64))
    if not zipped:
        return folder
    archive = path / "pusht.zarr.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as stream:
        for file in sorted(folder.rglob("*")):
            stream.write(file, file.relative_to(folder).as_posix())
    return archive


LOW, HIGH = np.array([-2.0, -3, -4, -5], np.float32), np.array([3.0, 4, 5, 6], np.float32)


def npz(path: Path, *, scaled: bool = True, images: bool = True, compressed: bool = True) -> Path:
    file = path / "train.npz"
    states = 2 * (OBSERVATIONS - LOW) / (HIGH - LOW + 1e-6) - 1 if scaled else OBSERVATIONS
    arrays = {
        "states": states,
        "actions": ACTIONS,
        "rewards": REWARDS,
        "terminals": np.arange(S) == ENDS[0] - 1,
        "traj_lengths": np.array(LENGTHS),
    }
    if images:
        arrays["images"] = np.moveaxis(IMAGES, 3, 1)
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    if scaled:
        ones = np.ones(A, np.float32)
        np.savez(path / "normalization.npz", obs_min=LOW, obs_max=HIGH, action_min=-ones, action_max=ones)
    return file


SIDE = 32
"""Of videos, whose encoders want even sizes."""
SMOOTH = np.broadcast_to(20 * np.arange(S, dtype=np.uint8)[:, None, None, None], (S, SIDE, SIDE, 3))
"""One grey a step, which survives encoding."""


def video(file: Path, frames: np.ndarray) -> None:
    writer = pytest.importorskip("imageio_ffmpeg").write_frames(
        str(file), (SIDE, SIDE), fps=10, codec="libx264", macro_block_size=1, output_params=["-crf", "0"]
    )
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


def png(frame: np.ndarray) -> bytes:
    stream = io.BytesIO()
    pytest.importorskip("PIL.Image").fromarray(frame).save(stream, "PNG")
    return stream.getvalue()


def lerobot(path: Path, version: str, *, visual: str = "video", rewards: bool = True) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = path / "pusht"
    (folder / "meta").mkdir(parents=True)
    v3 = version == "v3.0"
    numeric = {"dtype": "float32", "names": None}
    features: dict[str, Any] = {
        "observation.environment_state": {**numeric, "shape": [1]},
        "observation.state": {**numeric, "shape": [3]},
        "action": {**numeric, "shape": [A]},
        "observation.images.top": {"dtype": visual, "shape": [SIDE, SIDE, 3], "names": ["height", "width", "channels"]},
    }
    data = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    movie = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    if not v3:
        data = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        movie = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    info = {"codebase_version": version, "fps": 10, "features": features, "data_path": data, "video_path": movie}
    (folder / "meta/info.json").write_text(json.dumps({**info, "chunks_size": 1000}))
    tables, episodes = [], []
    for i in range(len(LENGTHS)):
        state = parts(OBSERVATIONS)[i]
        columns: dict[str, Any] = {
            "observation.state": state[:, :3].tolist(),
            "observation.environment_state": state[:, 3].tolist(),
            "action": parts(ACTIONS)[i].tolist(),
            "episode_index": [i] * LENGTHS[i],
            "frame_index": list(range(LENGTHS[i])),
            "next.done": (np.arange(LENGTHS[i]) == LENGTHS[i] - 1).tolist(),
        }
        if rewards:
            columns["next.reward"] = parts(REWARDS)[i].tolist()
            columns["next.success"] = ((np.arange(LENGTHS[i]) == LENGTHS[i] - 1) & (i != 1)).tolist()
        if visual == "image":
            columns["observation.images.top"] = [{"bytes": png(f), "path": None} for f in parts(SMOOTH)[i]]
        tables.append(pyarrow.table(columns))
        # episodes 0 and 1 share a file
        at = {"chunk_index": 0, "file_index": i // 2}
        row = {"episode_index": i, "length": LENGTHS[i], **{f"data/{key}": value for key, value in at.items()}}
        row |= {f"videos/observation.images.top/{key}": value for key, value in at.items()}
        row["videos/observation.images.top/from_timestamp"] = LENGTHS[0] / 10 if i == 1 else 0.0
        episodes.append(row)
    groups = [(0, 1), (2,)] if v3 else [(0,), (1,), (2,)]
    for number, group in enumerate(groups):
        at = {"chunk_index": 0, "file_index": number, "episode_chunk": 0, "episode_index": number}
        file = folder / data.format(**at)
        file.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.concat_tables([tables[i] for i in group]), file)
        if visual == "video":
            clip = folder / movie.format(video_key="observation.images.top", **at)
            clip.parent.mkdir(parents=True, exist_ok=True)
            video(clip, np.concatenate([parts(SMOOTH)[i] for i in group]))
    if v3:
        (folder / "meta/episodes/chunk-000").mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist(episodes), folder / "meta/episodes/chunk-000/file-000.parquet")
    else:
        lines = [json.dumps({"episode_index": i, "length": LENGTHS[i], "tasks": ["push"]}) for i in range(len(LENGTHS))]
        (folder / "meta/episodes.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@dataclass(frozen=True)
class Case:
    """A file, and what must come of it."""

    write: Callable[[Path], Path]
    env_id: str | None = None
    rewards: np.ndarray | None = None
    rewards_from: str = "data"
    terminated: tuple[bool, ...] = (False, False, False)
    success: tuple[bool, ...] = (False, False, False)
    final_known: bool = False
    images: np.ndarray | None = None
    camera: str = ""
    final_images: np.ndarray | None = None
    seeds: tuple[int, ...] = (-1, -1, -1)


SPARSE = (LAST & (np.arange(S) != ENDS[1] - 1)).astype(np.float32)
"""1 at the end of episodes 0 and 2."""
WON = (True, False, True)
CASES = {
    "d4rl": Case(d4rl, rewards=REWARDS, terminated=(True, False, False), final_known=True),
    "d4rl, nothing follows": Case(
        lambda p: d4rl(p, next_observations=False), rewards=REWARDS, terminated=(True, False, False)
    ),
    "d4rl, no timeouts": Case(
        lambda p: d4rl(p, timeouts=False), rewards=REWARDS, terminated=(True, False, False), final_known=True
    ),
    "robomimic": Case(
        robomimic, "robosuite/Lift", SPARSE, "data", (True, True, True), WON, True, IMAGES, "agentview", FINAL_IMAGES
    ),
    "robomimic, nothing follows": Case(
        lambda p: robomimic(p, next_obs=False), "robosuite/Lift", SPARSE, "data", (True, True, True), WON, False,
        IMAGES, "agentview",
    ),
    "maniskill": Case(
        maniskill, "PickCube-v1", REWARDS, "data", (True, False, False), WON, True, IMAGES, "hand", FINAL_IMAGES,
        (10, 11, 12),
    ),
    "maniskill, flat, no rewards": Case(
        lambda p: maniskill(p, grouped=False, rewards=False), "PickCube-v1", SPARSE, "success", (True, False, False),
        WON, True, seeds=(10, 11, 12),
    ),
    "zarr": Case(zarr_buffer, rewards=np.zeros(S), rewards_from="none", images=IMAGES, camera="img"),
    "zarr, zipped, float images": Case(
        lambda p: zarr_buffer(p, zipped=True, floats=True), rewards=np.zeros(S), rewards_from="none", images=IMAGES,
        camera="img",
    ),
    "npz": Case(npz, rewards=REWARDS, terminated=(True, False, False), images=IMAGES, camera="image"),
    "npz, plain": Case(
        lambda p: npz(p, scaled=False, images=False, compressed=False), rewards=REWARDS, terminated=(True, False, False)
    ),
    "lerobot v2.1": Case(
        lambda p: lerobot(p, "v2.1"), rewards=REWARDS, terminated=WON, success=WON, images=SMOOTH, camera="top"
    ),
    "lerobot v3.0": Case(
        lambda p: lerobot(p, "v3.0"), rewards=REWARDS, terminated=WON, success=WON, images=SMOOTH, camera="top"
    ),
    "lerobot v3.0, images": Case(
        lambda p: lerobot(p, "v3.0", visual="image", rewards=False), rewards=np.zeros(S), rewards_from="none",
        terminated=(True, True, True), images=SMOOTH, camera="top",
    ),
}  # fmt: skip


def check_data(data: Episodes, case: Case) -> None:
    np.testing.assert_allclose(data.observations, OBSERVATIONS, atol=2e-6)
    np.testing.assert_allclose(data.actions, ACTIONS, atol=1e-6)
    np.testing.assert_array_equal(data.rewards, case.rewards)
    np.testing.assert_array_equal(data.ends, ENDS)
    assert (tuple(data.terminated), tuple(data.success)) == (case.terminated, case.success)
    assert (data.env_id, data.rewards_from, tuple(data.seeds)) == (case.env_id, case.rewards_from, case.seeds)
    assert (data.final_known is None) == case.final_known
    if case.final_known:
        np.testing.assert_array_equal(data.final_observations, FINAL)
    else:
        assert data.final_known is not None
        assert not data.final_known.any()
        np.testing.assert_array_equal(data.final_observations, np.asarray(data.observations)[ENDS - 1])
    assert list(data.images) == ([case.camera] if case.images is not None else [])
    if case.images is not None:
        slack = 3 if case.images is SMOOTH else 0
        final = case.images[ENDS - 1] if case.final_images is None else case.final_images
        np.testing.assert_allclose(np.asarray(data.images[case.camera], int), case.images, atol=slack)
        np.testing.assert_allclose(np.asarray(data.final_images[case.camera], int), final, atol=slack)


@pytest.mark.parametrize("memory_map", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_read(case: Case, memory_map: bool, tmp_path: Path) -> None:
    data = load_dataset(case.write(tmp_path), memory_map=memory_map)
    check_data(data, case)
    assert isinstance(data.observations, OnDisk) == memory_map


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_converted_it_is_the_same(case: Case, tmp_path: Path) -> None:
    told = []
    with open_dataset(case.write(tmp_path)) as source:
        convert(source, tmp_path / "new", on_progress=told.append)
        with pytest.raises(RunExistsError, match="new"):
            convert(source, tmp_path / "new")
    check_data(load_dataset(tmp_path / "new"), case)
    assert sum(told) == len(LENGTHS)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_episodes_in_any_order(case: Case, tmp_path: Path) -> None:
    with open_dataset(case.write(tmp_path)) as source:
        for i in (2, 0, 1, 1):
            np.testing.assert_allclose(source.read(i).actions, parts(ACTIONS)[i], atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- damage


def refused(path: Path, *words: str, **options: Any) -> None:
    """Loading and converting must fail with a message that has the words, in this order."""
    with pytest.raises(DatasetError, match="(?s)" + ".*".join(map(re.escape, words))):
        load_dataset(path, **options)
    with (
        pytest.raises(DatasetError, match="(?s)" + ".*".join(map(re.escape, words))),
        open_dataset(path, DataOptions(**options)) as source,
    ):
        convert(source, path.parent / "converted")
    assert not (path.parent / "converted").exists()


@pytest.fixture
def nan_in_episode_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its third step."""
    actions = ACTIONS.copy()
    actions[STARTS[1] + 2, 1] = np.nan
    monkeypatch.setattr("tests.data.test_formats.ACTIONS", actions)


@pytest.mark.parametrize(
    ("write", "episode"),
    [
        (d4rl, "episode 1 (from row 3)"),
        (robomimic, "demo_1"),
        (maniskill, "traj_1"),
        (zarr_buffer, "episode 1"),
        (lambda p: zarr_buffer(p, zipped=True), "episode 1"),
        (npz, "episode 1"),
        (lambda p: lerobot(p, "v2.1"), "episode 1"),
        (lambda p: lerobot(p, "v3.0"), "episode 1"),
    ],
)
@pytest.mark.usefixtures("nan_in_episode_1")
def test_a_number_that_is_none_is_named(write: Callable[[Path], Path], episode: str, tmp_path: Path) -> None:
    path = write(tmp_path)
    refused(path, path.name, episode, "step 2: ", "is not finite")


@pytest.mark.parametrize("write", [d4rl, robomimic, maniskill, lambda p: zarr_buffer(p, zipped=True), npz])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_a_file_that_is_cut_is_refused(write: Callable[[Path], Path], kept: float, tmp_path: Path) -> None:
    path = write(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    refused(path, path.name)


@pytest.mark.parametrize("write", [npz, lambda p: zarr_buffer(p, zipped=True)])
def test_bytes_that_changed_are_noticed_where_the_format_can(write: Callable[[Path], Path], tmp_path: Path) -> None:
    """Archives have checksums."""
    path = write(tmp_path)
    name = "actions.npy" if path.suffix == ".npz" else "data/action/1.0"
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(name).header_offset + 30 + len(name)
    content = bytearray(path.read_bytes())
    for i in range(start + 20, start + 60):
        content[i] ^= 0xFF
    path.write_bytes(content)
    refused(path, path.name)


def edited(file: Path, edit: Callable[[Any], None]) -> Path:
    with h5py.File(file, "r+") as h5:
        edit(h5)
    return file


def put(name: str, values: Any) -> Callable[[Any], None]:
    def edit(h5: Any) -> None:
        if name in h5:
            del h5[name]
        if values is not None:
            h5[name] = values

    return edit


@pytest.mark.parametrize(
    ("write", "edit", "words"),
    [
        (d4rl, put("rewards", REWARDS[:-1]), ["hopper.hdf5", "rewards has 9 rows, actions have 10"]),
        (d4rl, put("timeouts", REWARDS[:-1] > 0), ["hopper.hdf5", "timeouts has 9 rows, actions have 10"]),
        (d4rl, put("actions", np.full((S, A), "x", "S1")), ["hopper.hdf5", "episode 0", "actions has the type |S1"]),
        (robomimic, put("data/demo_1/actions", None), ["low_dim.hdf5", "demo_1", "actions is missing"]),
        (robomimic, put("data/demo_1/obs", None), ["demo_1", "has no observations", "dataset_states_to_obs"]),
        (robomimic, put("data/demo_1/rewards", np.zeros(4)), ["demo_1", "rewards has the shape (4,)"]),
        (robomimic, put(f"data/demo_1/obs/{QUAT}", np.zeros((4, 1))), ["demo_1", f"{QUAT} has the shape (4, 1)"]),
        (robomimic, put(f"data/demo_1/obs/{QUAT}", np.zeros((5, 2))), ["demo_1", f"no '{QUAT}' of the shape (5, 2)"]),
        (robomimic, put(f"data/demo_1/next_obs/{QUAT}", None), ["demo_1", f"next_obs has no '{QUAT}'"]),
        (maniskill, put("traj_0/obs/extra/map", FIRST), ["traj_0: extra/map is uint8 (4, 3, 8, 6); images are uint8"]),
        (robomimic, put("data/demo_x", np.zeros(1)), ["demo_x", "demo_ and a number"]),
        (maniskill, put("traj_1/obs", None), ["traj_1", "has no observations", "replay_trajectory"]),
        (maniskill, put("traj_1/terminated", None), ["trajectory", "traj_1: terminated is missing"]),
        (maniskill, put("traj_1/obs/agent/qpos", np.zeros((5, 3))), ["agent/qpos has the shape (5, 3); 5 actions ne"]),
        (maniskill, put("traj_1/obs/sensor_data/hand/rgb", None), ["traj_1", "differ in cameras: []", "['hand']"]),
        (maniskill, put("traj_1/obs/sensor_data/hand/rgb", np.zeros((6, 8, 7, 3), np.uint8)), ["traj_1", "(8, 7, 3)"]),
        (maniskill, put("traj_1/rewards", None), ["traj_1", "has no rewards, unlike the first"]),
        (maniskill, put("traj_0/rewards", None), ["traj_1", "has rewards, unlike the first"]),
        (maniskill, put("traj_1/success", None), ["traj_1", "has no word of success, unlike the first"]),
        (d4rl, put("rewards", np.zeros((S, 2))), ["hopper.hdf5', episode 0", "rewards has the shape (3, 2)"]),
        (d4rl, put("terminals", np.full(S, np.nan)), ["hopper.hdf5', row 0: terminals is not finite"]),
        (d4rl, put("timeouts", np.full(S, 2.0)), ["hopper.hdf5', row 0: timeouts is 2.0; it must be 0 or 1"]),
        (d4rl, put("terminals", np.zeros((S, 2))), ["terminals has the shape (10, 2); 10 actions need one each"]),
        (
            lambda p: d4rl(p, next_observations=False),
            put("timeouts", None),  # the last step is no terminal
            ["hopper.hdf5' has neither timeouts nor next_observations: nothing says where an episode was cut off"],
        ),
        (d4rl, put("terminals", None), ["holds no data set", "It would be a D4RL file with terminals"]),
        (robomimic, put("data/demo_1/dones", np.full(5, np.nan)), ["demo_1, step 0: dones is not finite"]),
        (robomimic, put("data/demo_1/actions", np.zeros((0, A))), ["low_dim.hdf5', demo_1: has no steps"]),
        (robomimic, put("data/demo_1/obs", np.zeros((5, 4))), ["demo_1: the observations have no named parts"]),
        (robomimic, put("data/demo_1/actions", np.full((5, A), 1e300)), ["demo_1, step 0: actions is too large for "]),
        (
            robomimic,
            lambda h5: [h5[f"data/demo_1/{group}"].move(QUAT, "other") for group in ("obs", "next_obs")],
            ["demo_1: there is no 'robot0_eef_quat' among the observations"],
        ),
        (maniskill, put("traj_1/obs/agent/qvel", np.zeros((6, 1))), ["traj_1: episodes differ in observation and act"]),
        (
            maniskill,
            lambda h5: h5["traj_1/obs"].move("extra/goal", "extra/place"),
            ["traj_1: episodes differ in what is observed: agent/qpos 3, extra/place 1; the first has agent"],
        ),
        (maniskill, put("traj_1/actions", np.float32(1)), ["traj_1: actions have the shape ()"]),
        (maniskill, put("traj_1", np.zeros(3)), ["traj_1: is not a group of arrays"]),
        (
            maniskill,
            lambda h5: [put(f"traj_{i}/actions", np.zeros((n, 0)))(h5) for i, n in enumerate(LENGTHS)],
            ["traj_0: actions have no numbers"],
        ),
        (d4rl, put("observations", np.full((S, D), "x", "S1")), ["hopper.hdf5': observations are |S1 (10, 4); they "]),
        (d4rl, put("next_observations", np.zeros((S, D + 1))), ["hopper.hdf5': next_observations are float64 (10, 5)"]),
        (maniskill, put("traj_1/actions", None), ["traj_1: actions is missing"]),
        (maniskill, put("traj_1/actions", np.zeros((0, A))), ["traj_1: has no steps"]),
        (maniskill, put("traj_1/terminated", np.full(5, -1)), ["traj_1, step 0: terminated is -1.0; it must be 0 or"]),
    ],
)  # fmt: skip
def test_damage_in_hdf5_files(
    write: Callable[[Path], Path], edit: Callable[[Any], None], words: list[str], tmp_path: Path
) -> None:
    refused(edited(write(tmp_path), edit), *words)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"traj_lengths": np.array([3, 5, 3])}, ["traj_lengths", "11 steps in all; there are 10 actions"]),
        ({"traj_lengths": np.array([3, 0, 7])}, ["episode 1: traj_lengths has 0 steps"]),
        ({"traj_lengths": np.array([3, 5])}, ["traj_lengths", "8 steps in all; there are 10 actions"]),
        ({"terminals": np.ones(S)}, ["episode 0, step 0: terminals says that the episode ended, but 2 more steps fol"]),
        ({"terminals": np.full(S, 0.5)}, ["episode 0, step 0: terminals is 0.5; it must be 0 or 1"]),
        ({"rewards": REWARDS[:-1]}, ["rewards has 9 rows, actions have 10"]),
        ({"states": OBSERVATIONS[:, :3]}, ["episode 0: there are 3 numbers, but normalization.npz has 4 of obs_min"]),
        ({"images": IMAGES}, ["images are uint8 (10, 8, 6, 3)", "(steps, 1 or 3 for each camera, height, width)"]),
        ({"images": REWARDS}, ["images are float32 (10,)"]),
        ({"traj_lengths": np.array([3, 7.5])}, ["episode 1: traj_lengths has 7.5 steps"]),
        ({"traj_lengths": np.array([3, np.nan])}, ["episode 1: traj_lengths has nan steps"]),
        ({"actions": np.array([[None, 1]] * S)}, ["Python objects"]),
        ({"traj_lengths": np.array([[3, 5, 2]])}, ["traj_lengths have the shape (1, 3)"]),
        ({"rewards": np.zeros((S, 2))}, ["episode 0: rewards has the shape (3, 2)"]),
    ],
)
def test_damage_in_npz_files(arrays: dict[str, np.ndarray], words: list[str], tmp_path: Path) -> None:
    file = npz(tmp_path)
    with np.load(file) as before:
        np.savez(file, **{**before, **arrays})
    refused(file, "train.npz", *words)


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ([3, 8, 11], "episode_ends is [3, 8, 11]...; it must rise to the 10 steps"),
        ([3, 3, 10], "episode 1: meta/episode_ends does not rise"),
        ([], "must rise"),
        ([-1, 10], "episode 0: meta/episode_ends does not rise"),
    ],
)
def test_damage_in_replay_buffers(ends: list[int], words: str, tmp_path: Path) -> None:
    folder = zarr_buffer(tmp_path)
    zarr = pytest.importorskip("zarr")
    zarr.open_group(str(folder)).create_array("meta/episode_ends", data=np.array(ends, np.int64), overwrite=True)
    refused(folder, "pusht.zarr", words)


def test_a_chunk_of_a_replay_buffer_that_is_damaged(tmp_path: Path) -> None:
    folder = zarr_buffer(tmp_path)
    (folder / "data/img/1.0.0.0").write_bytes(b"nonsense")
    refused(folder, "pusht.zarr", "episode 1: camera img cannot be read")


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("data/**/*.parquet", ["parquet", "damaged or not of a LeRobotDataset"]),
        ("videos/**/*.mp4", ["episode 0: observation.images.top", ".mp4' cannot be decoded"]),
        ("meta/info.json", ["info.json", "damaged"]),
        ("meta/episodes*", ["meta", "damaged"]),
    ],
)
def test_damage_in_lerobot_datasets(version: str, pattern: str, words: list[str], tmp_path: Path) -> None:
    folder = lerobot(tmp_path, version)
    matching = [file for found in folder.glob(pattern) for file in (found.rglob("*") if found.is_dir() else [found])]
    for file in matching:
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    refused(folder, *words)


def test_a_video_that_ends_early(tmp_path: Path) -> None:
    folder = lerobot(tmp_path, "v2.1")
    video(folder / "videos/chunk-000/observation.images.top/episode_000001.mp4", parts(SMOOTH)[1][:3])
    refused(folder, "episode 1: observation.images.top", "episode_000001.mp4' ends at step 3 of 5")


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_rows_that_are_missing(version: str, tmp_path: Path) -> None:
    folder = lerobot(tmp_path, version)
    parquet = pytest.importorskip("pyarrow.parquet")
    for file in (folder / "data").rglob("*.parquet"):
        table = parquet.read_table(file)
        column = [7 if episode == 1 else episode for episode in table["episode_index"].to_pylist()]
        place = table.schema.get_field_index("episode_index")
        parquet.write_table(table.set_column(place, "episode_index", [column]), file)
    refused(folder, "parquet", "episode 1 has 0 rows, but 5 in meta")


def test_an_unknown_version(tmp_path: Path) -> None:
    folder = lerobot(tmp_path, "v3.0")
    info = json.loads((folder / "meta/info.json").read_text())
    (folder / "meta/info.json").write_text(json.dumps({**info, "codebase_version": "v9"}))
    refused(folder, "info.json", "codebase_version is v9", "v2.1")


def test_what_is_no_data_set_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no data")
    for path in (tmp_path / "notes.txt", tmp_path):
        refused(path, path.name, "holds no data set", "a Minari data set", "a data set of DPPO's code")


@pytest.mark.parametrize("name", ["train.npz", "buffer.zarr.zip", "low_dim.hdf5", "demos.h5"])
def test_a_file_that_is_empty_or_not_what_its_name_says(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.touch()
    refused(file, name, "is empty")
    file.write_text("<html>404: not found</html>")
    refused(file, name, "is damaged", "HDF5" if file.suffix in (".hdf5", ".h5") else "is no whole")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = npz(tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    refused(file, "train.npz' may not be read")


# ------------------------------------------------------------------------------------------- images that do not fit


@pytest.mark.parametrize(
    ("write", "edit", "words"),
    [
        (robomimic, put("data/demo_1/obs/agentview_image", IMAGES[:4]), ["agentview_image is uint8 (5, 8, 6, 3)"]),
        (robomimic, put("data/demo_1/obs/agentview_image", IMAGES[:9]), ["agentview_image is uint8 (10, 8, 6, 3)"]),
        (robomimic, put("data/demo_1/next_obs/agentview_image", IMAGES[:4]), ["agentview_image has 4 images"]),
        (maniskill, put("traj_1/obs/sensor_data/hand/rgb", IMAGES[:5]), ["rgb is uint8 (5, 8, 6, 3)", "(6, 8, 6, 3)"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("memory_map", [False, True])
def test_as_many_images_as_steps(
    write: Callable[[Path], Path], edit: Callable[[Any], None], words: list[str], memory_map: bool, tmp_path: Path
) -> None:
    file = edited(write(tmp_path), edit)
    refused(file, *words)
    with pytest.raises(DatasetError, match=re.escape(words[0])):
        load_dataset(file, memory_map=memory_map)
    assert not list(tmp_path.rglob("*.npy"))


def test_damaged_images_in_hdf5(tmp_path: Path) -> None:
    def compress(h5: Any) -> None:
        images = h5["data/demo_1/obs/agentview_image"][()]
        del h5["data/demo_1/obs/agentview_image"]
        options = {"chunks": (1, 8, 6, 3), "compression": "gzip", "shuffle": False}
        h5.create_dataset("data/demo_1/obs/agentview_image", data=images, **options)
        places.append(h5["data/demo_1/obs/agentview_image"].id.get_chunk_info(2).byte_offset)

    places: list[int] = []
    file = edited(robomimic(tmp_path), compress)
    content = bytearray(file.read_bytes())
    content[places[0] : places[0] + 40] = bytes(40)
    file.write_bytes(content)
    refused(file, "demo_1: agentview_image cannot be read")


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("visual", ["image", "video"])
def test_images_of_another_size_than_was_said(version: str, visual: str, tmp_path: Path) -> None:
    folder = lerobot(tmp_path, version, visual=visual)
    info = json.loads((folder / "meta/info.json").read_text())
    info["features"]["observation.images.top"]["shape"] = [SIDE, SIDE + 2, 3]
    (folder / "meta/info.json").write_text(json.dumps(info))
    refused(folder, "episode 0: observation.images.top", "32, 34, 3")


def test_channels_may_be_described_first(tmp_path: Path) -> None:
    folder = lerobot(tmp_path, "v3.0")
    info = json.loads((folder / "meta/info.json").read_text())
    for shape, names in (([3, SIDE, SIDE], ["channels", "height", "width"]), ([3, SIDE, SIDE], None)):
        info["features"]["observation.images.top"] = {"dtype": "video", "shape": shape, "names": names}
        (folder / "meta/info.json").write_text(json.dumps(info))
        check_data(load_dataset(folder), CASES["lerobot v3.0"])


def test_one_camera_is_named_without_its_plural(tmp_path: Path) -> None:
    folder = lerobot(tmp_path, "v3.0", visual="image")
    text = (folder / "meta/info.json").read_text()
    (folder / "meta/info.json").write_text(text.replace("observation.images.top", "observation.image"))
    parquet = pytest.importorskip("pyarrow.parquet")
    for file in (folder / "data").rglob("*.parquet"):
        table = parquet.read_table(file)
        names = [n.replace("observation.images.top", "observation.image") for n in table.column_names]
        parquet.write_table(table.rename_columns(names), file)
    assert list(load_dataset(folder).images) == ["image"]


def rewrite(folder: Path, name: str, rows: list[Any]) -> None:
    """Put other values into a column of the first table."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = min((folder / "data").rglob("*.parquet"))
    table = parquet.read_table(file)
    place = table.schema.get_field_index(name)
    parquet.write_table(table.set_column(place, name, pyarrow.array(rows)), file)


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("observation.state", [[1.0], [2.0, 3.0, 4.0], [5.0, 6.0]], "step 1: observation.state has no"),
        ("observation.state", [[1.0, 2.0], None, [3.0, 4.0]], "step 1: observation.state has no"),
        ("observation.state", [[1.0, 2.0], [1.0, 2.0], [3.0, None]], "step 2: observation.state has no number"),
        ("observation.environment_state", [1.0, None, 2.0], "step 1: observation.environment_state has no"),
        ("frame_index", [0, 2, 1], "step 1: frame_index is 2 after 0"),
        ("next.done", [0.0, 0.5, 1.0], "step 1: next.done is 0.5; it must be 0 or 1"),
        ("next.reward", ["a", "b", "c"], "next.reward has the type"),
        ("observation.images.top", [None, None, None], "step 0: there is no image"),
    ],
)
def test_rows_that_do_not_fit(name: str, rows: list[Any], words: str, tmp_path: Path) -> None:
    folder = lerobot(tmp_path, "v2.1", visual="image")
    rewrite(folder, name, rows)
    refused(folder, "episode_000000.parquet', episode 0", words)


def test_a_column_that_is_described_and_not_there_is_named(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = lerobot(tmp_path, "v2.1", visual="image")
    file = next(folder.rglob("episode_000000.parquet"))
    table: pyarrow.Table = parquet.read_table(file)
    parquet.write_table(table.drop_columns(["observation.state"]), file)
    refused(folder, "episode_000000.parquet', episode 0: the column observation.state is missing")


def test_parts_of_a_state_that_is_there_are_not_read_twice(tmp_path: Path) -> None:
    folder = lerobot(tmp_path, "v2.1", visual="image")
    info = json.loads((folder / "meta/info.json").read_text())
    info["features"]["observation.state.gripper"] = {"dtype": "float32", "shape": [1], "names": None}
    (folder / "meta/info.json").write_text(json.dumps(info))
    assert load_dataset(folder).observations.shape[1] == D


@pytest.mark.parametrize("seed", ["x", [3], None])
def test_a_seed_that_is_no_number_is_not_known(seed: object, tmp_path: Path) -> None:
    file = maniskill(tmp_path)
    described = {"episodes": [{"episode_id": 0, "episode_seed": seed}, {"episode_seed": 4}]}
    file.with_suffix(".json").write_text(json.dumps(described))
    assert load_dataset(file).seeds.tolist() == [-1, -1, -1]


def test_point_clouds_are_not_the_state(tmp_path: Path) -> None:
    file = edited(maniskill(tmp_path), put("traj_0/obs/pointcloud/xyzw", np.zeros((4, 16, 4))))
    assert load_dataset(file).observations.shape[1] == D


@pytest.mark.parametrize("write", [d4rl, lambda p: robomimic(p, shaped=True), npz], ids=["d4rl", "robomimic", "npz"])
def test_success_that_nobody_knows_stays_unknown(write: Callable[[Path], Path], tmp_path: Path) -> None:
    data = load_dataset(write(tmp_path))
    assert not data.success_known
    assert np.isnan(wilson_of(data)).all()
    assert np.isnan(data.success_rate)
    for other in (data.select([0, 2]), Episodes.concatenate([data, data])):
        assert not other.success_known
    spec = EnvSpec("some", "", "", D, (-1.0,) * A, (1.0,) * A, max_episode_steps=9)
    save_dataset(replace(data, images={}, final_images={}), tmp_path / "saved", spec)
    with open_dataset(tmp_path / "saved") as source:
        assert summarize(source).success is None
    assert not load_dataset(tmp_path / "saved", memory_map=True).success_known


def test_a_renamed_npz_is_scaled_back_as_well(tmp_path: Path) -> None:
    file = npz(tmp_path)
    other = file.rename(tmp_path / "hopper.npz")
    np.testing.assert_allclose(load_dataset(other).observations, OBSERVATIONS, atol=2e-6)
    npz(tmp_path)  # whose normalization.npz it is then
    scaled = 2 * (OBSERVATIONS - LOW) / (HIGH - LOW + 1e-6) - 1
    np.testing.assert_allclose(load_dataset(other).observations, scaled, atol=2e-6)
    other = other.rename(tmp_path / "ph_train.npz")
    with pytest.warns(UserWarning, match="there is no normalization.npz beside it to scale them back"):
        np.testing.assert_allclose(load_dataset(other).observations, scaled, atol=2e-6)


def test_terminals_alone_will_do_where_the_last_step_is_one(tmp_path: Path) -> None:
    file = edited(d4rl(tmp_path, next_observations=False, timeouts=False), put("terminals", LAST))
    np.testing.assert_array_equal(load_dataset(file).ends, ENDS)


def test_a_chunk_that_is_not_there_is_told(tmp_path: Path) -> None:
    folder = zarr_buffer(tmp_path)
    (folder / "data/action/1.0").unlink()
    with pytest.warns(UserWarning, match=r"pusht.zarr': 1 of 3 chunks of data/action are not there and read as 0"):
        load_dataset(folder)


def test_a_codec_that_is_not_installed_is_no_damage(tmp_path: Path) -> None:
    folder = zarr_buffer(tmp_path)
    about = json.loads((folder / "data/img/.zarray").read_text())
    about["compressor"] = {"id": "imagecodecs_jpegxl"}
    (folder / "data/img/.zarray").write_text(json.dumps(about))
    refused(folder, "pusht.zarr", "compressed by a codec that is not installed", "imagecodecs_jpegxl")


def test_an_archive_of_a_folder_is_read_as_well(tmp_path: Path) -> None:
    folder, archive = zarr_buffer(tmp_path), tmp_path / "pusht.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as stream:
        for file in sorted(folder.rglob("*")):
            stream.write(file, f"pusht/{file.relative_to(tmp_path).as_posix()}")
            stream.writestr(f"__MACOSX/{file.relative_to(tmp_path).as_posix()}", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no chunk is missed
        np.testing.assert_array_equal(load_dataset(archive, keys=("state", "img")).observations, OBSERVATIONS)
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_STORED) as stream:
        stream.writestr("pusht/other.zarr/meta/episode_ends/.zarray", "{}")
    refused(archive, "several replay buffers: pusht/other.zarr, pusht/pusht.zarr")


def test_a_black_episode_of_floats_is_black(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    folder = zarr_buffer(tmp_path, floats=True)
    frames = IMAGES.astype(np.float32)
    frames[: ENDS[0]] = 0
    zarr.open_group(str(folder)).create_array("data/img", data=frames, overwrite=True)
    assert not np.asarray(load_dataset(folder).images["img"])[: ENDS[0]].any()


def test_the_path_that_was_meant_is_named(tmp_path: Path) -> None:
    file = npz(tmp_path)
    refused(tmp_path, "holds no data set", f"There is one in '{file}'")
    folder = zarr_buffer(tmp_path)
    refused(folder / "data", "holds no data set", f"There is one in '{folder}'")
    with np.load(file) as before:
        (tmp_path / "alone").mkdir()
        np.savez(tmp_path / "alone" / "train.npz", states=before["states"], actions=before["actions"])
    refused(tmp_path / "alone" / "train.npz", "It would be a data set of DPPO's code with traj_lengths")


def test_success_on_the_way_is_no_termination(tmp_path: Path) -> None:
    folder = lerobot(tmp_path, "v2.1", visual="image")
    rewrite(folder, "next.success", [False, True, False])
    data = load_dataset(folder)
    assert (bool(data.success[0]), bool(data.terminated[0])) == (True, False)


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("img", np.moveaxis(IMAGES, 3, 1), "data/img has the shape (10, 3, 8, 6); images are"),
        ("img", IMAGES / 255, "float64 from 0.00784314 to 0.996078; images are uint8"),
        ("img", IMAGES.astype(np.float32) * 2, "images are uint8, or floats from 0 to 255"),
    ],
)
def test_images_of_replay_buffers(name: str, array: np.ndarray, words: str, tmp_path: Path) -> None:
    folder = zarr_buffer(tmp_path)
    root = pytest.importorskip("zarr").open_group(str(folder))
    del root[f"data/{name}"]
    root.create_array(f"data/{name}", data=array)
    refused(folder, "pusht.zarr", words)


def test_without_a_state_it_is_all_numbers_but_the_time(tmp_path: Path) -> None:
    folder = zarr_buffer(tmp_path)
    root = pytest.importorskip("zarr").open_group(str(folder))
    del root["data/state"]
    root.create_array("data/timestamp", data=np.full(S, 1.67e9))
    assert load_dataset(folder).observations.shape == (S, 18)


def test_images_of_two_cameras_in_one_array(tmp_path: Path) -> None:
    file = npz(tmp_path, scaled=False, compressed=False)
    with np.load(file) as before:
        both = np.concatenate([before["images"], 255 - before["images"]], axis=1)
        np.savez(tmp_path / "val.npz", **{**before, "images": both})
    data = load_dataset(tmp_path / "val.npz")
    np.testing.assert_array_equal(data.images["image_0"], IMAGES)
    np.testing.assert_array_equal(data.images["image_1"], 255 - IMAGES)


# -------------------------------------------------------------------------------------------------------------- caches


def test_the_cache_follows_the_files_beside(tmp_path: Path) -> None:
    file = npz(tmp_path)
    scales = (tmp_path / "normalization.npz").rename(tmp_path / "aside.npz")
    assert not np.allclose(load_dataset(file, memory_map=True).observations, OBSERVATIONS)
    scales.rename(tmp_path / "normalization.npz")
    np.testing.assert_allclose(load_dataset(file, memory_map=True).observations, OBSERVATIONS, atol=2e-6)
    trajectories = maniskill(tmp_path)
    load_dataset(trajectories, memory_map=True)
    described = trajectories.with_suffix(".json")
    described.write_text(described.read_text().replace('"episode_seed": 1', '"episode_seed": 2'))
    assert load_dataset(trajectories, memory_map=True).seeds.tolist() == [20, 21, 22]


def test_the_cache_follows_names_within_a_folder(tmp_path: Path) -> None:
    folder = zarr_buffer(tmp_path)
    (folder / "data/state").rename(folder / "data/pose")
    first = load_dataset(folder, memory_map=True)
    (folder / "data/pose").rename(folder / "data/state")
    (folder / "data/keypoint").rename(folder / "data/zzz")
    np.testing.assert_array_equal(load_dataset(folder, memory_map=True).observations, OBSERVATIONS)
    assert first.observations.shape == (S, 22)


def test_the_cache_follows_the_version_of_the_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = d4rl(tmp_path)
    first = load_dataset(file, memory_map=True).observations
    monkeypatch.setattr("dprl.data.load.CACHE_VERSION", 99)
    second = load_dataset(file, memory_map=True).observations
    assert isinstance(first, OnDisk)
    assert isinstance(second, OnDisk)
    assert first.file != second.file


def test_data_on_disk_are_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    d4rl(tmp_path)
    monkeypatch.chdir(tmp_path)
    data = load_dataset("hopper.hdf5", memory_map=True)
    monkeypatch.chdir(tmp_path.parent)
    np.testing.assert_array_equal(data.observations[:3], OBSERVATIONS[:3])


@pytest.mark.parametrize("write", [d4rl, robomimic, maniskill, npz, lambda p: zarr_buffer(p, zipped=True)])
@pytest.mark.parametrize("damaged", [False, True])
def test_files_are_closed(write: Callable[[Path], Path], damaged: bool, tmp_path: Path) -> None:
    path = write(tmp_path)

    def opened() -> list[str]:
        links = [file for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
        return [str(file.readlink()) for file in links if str(tmp_path) in str(file.readlink())]

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    if damaged:
        with pytest.raises(DatasetError) as error:
            open_dataset(path, DataOptions(keys=("nothing",)) if path.suffix in (".zip",) else None).read(10**6)
        assert error.value
        return
    with open_dataset(path) as source:
        source.read(0)
        assert opened()
    assert not opened()


@pytest.mark.parametrize("dones", [np.zeros(0), np.float32(1), np.zeros((5, 2))])
def test_flags_of_odd_shapes(dones: np.ndarray, tmp_path: Path) -> None:
    refused(edited(robomimic(tmp_path), put("data/demo_1/dones", dones)), "demo_1", "dones has the shape")


@pytest.mark.parametrize("described", [{"env_info": None}, {"episodes": [1]}])
def test_odd_descriptions_of_trajectories(described: dict[str, Any], tmp_path: Path) -> None:
    file = maniskill(tmp_path)
    file.with_suffix(".json").write_text(json.dumps(described))
    refused(file, file.name, "is damaged or not of a ManiSkill file")


@pytest.mark.parametrize("change", [{"fps": 0}, {"chunks_size": 0}, {"features": {"action": {}}}, {"data_path": "{}"}])
def test_odd_descriptions_of_lerobot_datasets(change: dict[str, Any], tmp_path: Path) -> None:
    folder = lerobot(tmp_path, "v2.1")
    info = json.loads((folder / "meta/info.json").read_text())
    (folder / "meta/info.json").write_text(json.dumps(info | change))
    refused(folder, "pusht")


# -------------------------------------------------------------------------------------------------------------- options


def test_a_filter_key_picks_episodes(tmp_path: Path) -> None:
    file = robomimic(tmp_path)
    data = load_dataset(file, filter_key="train")
    np.testing.assert_array_equal(data.lengths, (LENGTHS[0], LENGTHS[2]))
    np.testing.assert_array_equal(data.actions, np.concatenate([parts(ACTIONS)[0], parts(ACTIONS)[2]]))
    refused(file, "no filter key 'trian'", "empty, stray, train", "Did you mean train", filter_key="trian")
    refused(file, "the filter key 'stray' names demo_9, which is not there", filter_key="stray")
    refused(file, "the filter key 'empty' names no episodes", filter_key="empty")


@pytest.mark.parametrize(
    ("write", "keys", "columns", "camera"),
    [
        (robomimic, ("object", "robot0_eef_pos"), [3, 0], None),
        (robomimic, ("agentview_image",), [], "agentview"),
        (maniskill, ("extra/goal", "sensor_data/hand/rgb"), [3], "hand"),
        (zarr_buffer, ("state",), [0, 1, 2, 3], None),
        (lambda p: lerobot(p, "v3.0"), ("observation.environment_state",), [3], None),
    ],
)
def test_keys_pick_parts_in_their_order(
    write: Callable[[Path], Path], keys: tuple[str, ...], columns: list[int], camera: str | None, tmp_path: Path
) -> None:
    path = write(tmp_path)
    data = load_dataset(path, keys=keys)
    np.testing.assert_array_equal(data.observations, OBSERVATIONS[:, columns])
    assert list(data.images) == ([camera] if camera else [])
    mapped = load_dataset(path, keys=keys, memory_map=True)
    load_dataset(path, memory_map=True)  # whose cache is another
    np.testing.assert_array_equal(mapped.observations, OBSERVATIONS[:, columns])
    refused(path, "there is no", "nothing", keys=("nothing",))


def test_flat_observations_have_no_parts(tmp_path: Path) -> None:
    refused(maniskill(tmp_path, grouped=False), "traj_0: there is no 'nonsense'", keys=("nonsense",))


def test_depth_is_not_of_the_state(tmp_path: Path) -> None:
    def edit(h5: Any) -> None:
        for demo in h5["data"].values():
            for group in ("obs", "next_obs"):
                for name in ROBOT:
                    demo.move(f"{group}/{name}", f"{group}/x_{name}")
                del demo[f"{group}/object"]
                del demo[f"{group}/robot0_joint_pos"]
                demo[f"{group}/depth"] = np.zeros((len(demo["actions"]), 8, 6, 1), np.float32)

    data = load_dataset(edited(robomimic(tmp_path), edit))
    np.testing.assert_array_equal(data.observations, OBSERVATIONS)


def test_the_object_is_of_the_state_where_there_are_no_images(tmp_path: Path) -> None:
    def edit(h5: Any) -> None:
        for demo in h5["data"].values():
            for group in ("obs", "next_obs"):
                del demo[f"{group}/agentview_image"]

    seeing = robomimic(tmp_path)
    assert load_dataset(seeing).observations.shape[1] == 4
    blind = load_dataset(edited(seeing, edit))
    np.testing.assert_array_equal(blind.observations, OBSERVATIONS[:, [0, 1, 2, 3, 3]])


def test_images_with_channels_first_are_refused(tmp_path: Path) -> None:
    def edit(h5: Any) -> None:
        for demo in h5["data"].values():
            for group in ("obs", "next_obs"):
                images = demo[f"{group}/agentview_image"][()]
                del demo[f"{group}/agentview_image"]
                demo[f"{group}/agentview_image"] = np.moveaxis(images, 3, 1)

    refused(edited(robomimic(tmp_path), edit), "demo_0: agentview_image is uint8 (3, 3, 8, 6); images are uint8 (rows")


def test_maniskill_2s_cameras(tmp_path: Path) -> None:
    """Their colours become images; depth and parameters are not of the state."""

    def edit(h5: Any) -> None:
        for trajectory in h5.values():
            rows = len(trajectory["actions"]) + 1
            trajectory.move("obs/sensor_data/hand/rgb", "obs/image/hand/rgb")
            trajectory["obs/image/hand/depth"] = np.zeros((rows, 8, 6, 1), np.float32)
            trajectory["obs/camera_param/hand/extrinsic_cv"] = np.zeros((rows, 4, 4), np.float32)

    data = load_dataset(edited(maniskill(tmp_path), edit))
    np.testing.assert_array_equal(data.observations, OBSERVATIONS)
    assert set(data.images) == {"hand"}


@pytest.mark.parametrize("off", [1e-6, -1e-6])
def test_what_is_nearly_the_next_observation_breaks_no_episode(off: float, tmp_path: Path) -> None:
    file = edited(d4rl(tmp_path, timeouts=False), put("next_observations", led_to(OBSERVATIONS, FINAL) + off))
    np.testing.assert_array_equal(load_dataset(file).ends, ENDS)


def test_an_episode_ends_where_the_next_observation_says_so_too(tmp_path: Path) -> None:
    """A time-out that nobody wrote down."""
    file = edited(d4rl(tmp_path), put("timeouts", np.zeros(S, np.bool_)))
    np.testing.assert_array_equal(load_dataset(file).ends, ENDS)


def test_observations_of_another_precision_still_tell_where_episodes_end(tmp_path: Path) -> None:
    doubled = led_to(OBSERVATIONS, FINAL).astype(np.float64) + 1e-12
    file = edited(d4rl(tmp_path, timeouts=False), put("next_observations", doubled))
    np.testing.assert_array_equal(load_dataset(file).ends, ENDS)


@pytest.mark.parametrize("options", [{"filter_key": "train"}, {"keys": ("state",)}])
def test_formats_without_an_option_refuse_it(options: dict[str, Any], tmp_path: Path) -> None:
    refused(d4rl(tmp_path), next(iter(options)), "hopper.hdf5", "no such choice", **options)


def test_robomimics_shaped_rewards_are_no_success(tmp_path: Path) -> None:
    file = edited(robomimic(tmp_path, shaped=True), put("data/demo_0/dones", np.zeros(3)))
    data = load_dataset(file)
    assert tuple(data.success) == (False, False, False)
    assert tuple(data.terminated) == (False, True, True)


def test_robomimics_files_of_other_simulators_say_nothing_of_success(tmp_path: Path) -> None:
    args = json.dumps({"env_name": "Hopper-v2", "type": 2, "env_kwargs": {}})
    file = edited(robomimic(tmp_path), lambda h5: h5["data"].attrs.update(env_args=args))
    data = load_dataset(file)
    assert data.env_id == "Hopper-v2"
    assert not data.success.any()
    with open_dataset(file) as source:
        assert source.read(0).success is None


def test_maniskill_without_its_json(tmp_path: Path) -> None:
    file = maniskill(tmp_path)
    file.with_suffix(".json").unlink()
    assert load_dataset(file).env_id is None
    file.with_suffix(".json").write_text("{")
    refused(file, ".json' is not valid JSON")


def test_selected_episodes_keep_what_is_not_known_of_them(tmp_path: Path) -> None:
    data = load_dataset(zarr_buffer(tmp_path)).select([1])
    assert data.final_known is not None
    assert not data.final_known.any()
    assert data.rewards_from == "none"
    known = replace(data, final_known=np.array([True]))
    assert next(known.episodes()).final_known

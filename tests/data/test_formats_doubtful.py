"""Files that can be read, and are not what they seem: told, or read as they are meant."""

import io
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dprl.data import load_dataset, save_dataset
from dprl.data.images import decode
from dprl.data.source import seed_of
from dprl.data.transitions import decisions
from dprl.errors import DatasetError
from tests.data.test_formats import (
    ENDS,
    FINAL,
    IMAGES,
    OBSERVATIONS,
    ROBOT,
    D,
    S,
    d4rl,
    edited,
    led_to,
    lerobot,
    maniskill,
    npz,
    png,
    put,
    refused,
    rewrite,
    robomimic,
    zarr_buffer,
)
from tests.data.test_minari import SPEC, toy_episodes

h5py = pytest.importorskip("h5py")


def renamed(prefix: str, names: list[str]) -> Callable[[Any], None]:
    def edit(h5: Any) -> None:
        for demo in h5["data"].values():
            for group in ("obs", "next_obs"):
                for name in names:
                    demo.move(f"{group}/{name}", f"{group}/{prefix}{name}")

    return edit


@pytest.mark.parametrize("names", [list(ROBOT), ["robot0_eef_pos"]])
def test_robots_under_other_names_are_not_left_out(names: list[str], tmp_path: Path) -> None:
    """All numbers: four of the robot and seven of its joints; the images show the object."""
    file = edited(robomimic(tmp_path), renamed("right_", names))
    assert load_dataset(file).observations.shape[1] == D + 7


def test_a_demonstration_of_another_length_than_it_says(tmp_path: Path) -> None:
    file = edited(robomimic(tmp_path), lambda h5: h5["data/demo_1"].attrs.update(num_samples=9))
    refused(file, "low_dim.hdf5', demo_1: there are 5 actions, but num_samples is 9")


def test_an_array_called_data_is_no_robomimic_file(tmp_path: Path) -> None:
    file = tmp_path / "other.hdf5"
    with h5py.File(file, "w") as h5:
        h5["data"] = np.zeros(3)
    refused(file, "other.hdf5' holds no data set: it is none of these")


@pytest.mark.parametrize("change", [lambda x: x.astype(np.float32), lambda x: x.repeat(2, 3)[..., :4]])
def test_images_that_are_not_read_are_refused_and_not_left_out(
    change: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    def of_robomimic(h5: Any) -> None:
        for demo in h5["data"].values():
            for group in ("obs", "next_obs"):
                put("agentview_image", change(demo[f"{group}/agentview_image"][()]))(demo[group])

    def of_maniskill(h5: Any) -> None:
        for trajectory in h5.values():
            put("rgb", change(trajectory["obs/sensor_data/hand/rgb"][()]))(trajectory["obs/sensor_data/hand"])

    refused(edited(robomimic(tmp_path), of_robomimic), "demo_0: agentview_image is", "images are uint8", "keys can")
    refused(edited(maniskill(tmp_path), of_maniskill), "traj_0: sensor_data/hand/rgb is", "images are uint8")


def test_maniskill_2_writes_no_terminations(tmp_path: Path) -> None:
    def edit(h5: Any) -> None:
        for trajectory in h5.values():
            del trajectory["terminated"]
            del trajectory["truncated"]

    data = load_dataset(edited(maniskill(tmp_path), edit))
    assert data.terminated.tolist() == data.success.tolist() == [True, False, True]


def test_actions_of_several_agents(tmp_path: Path) -> None:
    def edit(h5: Any) -> None:
        actions = h5["traj_0/actions"][()]
        del h5["traj_0/actions"]
        h5["traj_0/actions/panda-0"] = h5["traj_0/actions/panda-1"] = actions

    refused(edited(maniskill(tmp_path), edit), "traj_0: actions have named parts")


@pytest.mark.parametrize(("seed", "read"), [(7, 7), (np.uint64(2**63), -1), (2**70, -1), ("None", -1), (-5, -1)])
def test_seeds_are_numbers_that_int64_has(seed: Any, read: int) -> None:
    assert seed_of(seed) == read


def test_a_seed_beyond_all_numbers_is_not_known(tmp_path: Path) -> None:
    file = maniskill(tmp_path)
    file.with_suffix(".json").write_text(json.dumps({"episodes": [{"episode_id": 0, "episode_seed": 2**70}]}))
    assert load_dataset(file).seeds.tolist() == [-1, -1, -1]


# -------------------------------------------------------------------------------------------------------------- D4RL


def test_next_observations_of_half_precision_still_tell_where_episodes_end(tmp_path: Path) -> None:
    file = edited(d4rl(tmp_path, timeouts=False), put("next_observations", led_to(OBSERVATIONS, FINAL).astype("f2")))
    np.testing.assert_array_equal(load_dataset(file).ends, ENDS)


def test_next_observations_that_hardly_ever_fit_are_refused(tmp_path: Path) -> None:
    file = edited(d4rl(tmp_path), put("next_observations", led_to(OBSERVATIONS, FINAL) * 1.01))
    refused(file, "hopper.hdf5': in 7 of 10 rows next_observations is not the observation that follows (first in row 0")


def test_timeouts_in_another_row_than_the_break_are_told(tmp_path: Path) -> None:
    file = edited(d4rl(tmp_path), put("timeouts", np.arange(S) == ENDS[1] - 2))
    with pytest.warns(UserWarning, match=r"1 episodes end where next_observations say so.*first at row 7"):
        load_dataset(file)


def test_a_next_observation_that_is_no_number_is_named_where_it_is(tmp_path: Path) -> None:
    after = led_to(OBSERVATIONS, FINAL)
    after[ENDS[0] + 2] = np.nan
    refused(
        edited(d4rl(tmp_path), put("next_observations", after)), "episode 1 (from row 3), step 2: next_observations"
    )


# ------------------------------------------------------------------------------------------------------------- Minari


@pytest.fixture
def minari(tmp_path: Path) -> Path:
    """Without the manifest of ours."""

    save_dataset(toy_episodes(), tmp_path / "demos", SPEC)
    (tmp_path / "demos/manifest.json").unlink()
    return tmp_path / "demos"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0, np.nan, 0, 0], "step 1: infos/success is not finite"),
        ([0, 0.5, 0, 0], "step 1: infos/success is 0.5; it must be 0 or 1"),
        ([0] * 11, "infos/success has the shape (11,)"),
    ],
)
def test_success_that_is_no_flag(values: list[float], words: str, minari: Path) -> None:
    name = "episode_0"
    with h5py.File(minari / "data/main_data.hdf5", "r+") as h5:
        rows = len(h5[name]["actions"]) + 1
        put("success", np.resize(values, rows) if len(values) == 4 else values)(h5[name]["infos"])
    refused(minari, name, words)


def test_an_episode_that_is_gone(minari: Path) -> None:
    with h5py.File(minari / "data/main_data.hdf5", "r+") as h5:
        del h5["episode_1"]
    refused(minari, "total_episodes is 3 in metadata.json, here are 2")


def test_an_episode_of_another_length_than_it_says(minari: Path) -> None:
    with h5py.File(minari / "data/main_data.hdf5", "r+") as h5:
        h5["episode_1"].attrs["total_steps"] = 77
    refused(minari, "episode_1: there are", "total_steps is 77")


def test_a_picture_with_a_palette_is_its_colours() -> None:
    image = pytest.importorskip("PIL.Image")
    frame = np.zeros((4, 4, 3), np.uint8)
    frame[:2, :, 0], frame[2:, :, 2] = 255, 255

    stream = io.BytesIO()
    image.fromarray(frame).convert("P", palette=image.Palette.ADAPTIVE).save(stream, "PNG")
    np.testing.assert_array_equal(decode(stream.getvalue(), "here"), frame)
    np.testing.assert_array_equal(decode(png(frame), "here"), frame)


# ------------------------------------------------------------------------------------------------------ zarr and .npz


def test_a_stray_file_hides_no_chunk_that_is_gone(tmp_path: Path) -> None:
    folder = zarr_buffer(tmp_path)
    (folder / "data/action/1.0").rename(folder / "data/action/._1.0")
    with pytest.warns(UserWarning, match="1 of 3 chunks of data/action are not there"):
        load_dataset(folder)


def test_episode_ends_that_are_no_whole_numbers(tmp_path: Path) -> None:
    folder, zarr = zarr_buffer(tmp_path), pytest.importorskip("zarr")
    zarr.open_group(str(folder)).create_array("meta/episode_ends", data=np.array([3.7, 8, 10]), overwrite=True)
    refused(folder, "episode 0: meta/episode_ends is 3.7, no whole number")


def test_images_with_channels_last_are_no_cameras_of_an_npz(tmp_path: Path) -> None:
    file = npz(tmp_path)
    with np.load(file) as before:
        np.savez(file, **{**before, "images": np.resize(IMAGES, (S, 24, 24, 3))})
    refused(file, "images are uint8 (10, 24, 24, 3)", "1 or 3 for each camera, height, width")


# ------------------------------------------------------------------------------------------------------------ LeRobot


def described(folder: Path, **changes: Any) -> Path:
    file = folder / "meta/info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def list_again(folder: Path, version: str, keep: list[int]) -> None:
    """Let only these rows be listed, in this order."""
    if version == "v2.1":
        file = folder / "meta/episodes.jsonl"
        lines = file.read_text().splitlines()
        file.write_text("\n".join(lines[i] for i in keep) + "\n")
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        file = folder / "meta/episodes/chunk-000/file-000.parquet"
        parquet.write_table(parquet.read_table(file).take(keep), file)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_episodes_that_are_not_listed_or_twice(version: str, tmp_path: Path) -> None:
    folder = described(lerobot(tmp_path, version, visual="image"), total_episodes=3, total_frames=S)
    assert load_dataset(folder).n_episodes == 3
    list_again(folder, version, [0, 1, 1, 2])
    refused(folder, "meta': episode 1 is listed twice")
    list_again(folder, version, [0, 1])
    refused(folder, "info.json': total_episodes is 3, but meta's list of episodes has 2")
    refused(described(folder, total_episodes=2), "info.json': total_frames is 10, but meta's list of episodes has 8")


@pytest.mark.parametrize("name", ["next.success", "next.reward", "next.done"])
def test_an_outcome_that_is_described_and_not_there_is_named(name: str, tmp_path: Path) -> None:
    folder = lerobot(tmp_path, "v2.1", visual="image", rewards=False)
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    described(folder, features=features | {name: {"dtype": "bool", "shape": [1], "names": None}})
    if name == "next.done":
        assert load_dataset(folder).n_episodes == 3
    else:
        refused(folder, "episode_000000.parquet', episode 0", f"the column {name} is missing")


def test_rows_that_do_not_begin_with_the_first_frame(tmp_path: Path) -> None:
    folder = lerobot(tmp_path, "v2.1")
    rewrite(folder, "frame_index", [3, 4, 5])
    refused(folder, "episode 0, step 0: frame_index is 3; it must begin with 0")


def test_several_rewards_a_step(tmp_path: Path) -> None:
    folder = lerobot(tmp_path, "v2.1", visual="image")
    rewrite(folder, "next.reward", [[1.0, 2.0]] * 3)
    refused(folder, "episode 0: next.reward has the shape (3, 2); 3 actions need one each")


def test_a_video_of_another_rate(tmp_path: Path) -> None:
    folder = described(lerobot(tmp_path, "v2.1"), fps=30)
    refused(folder, "observation.images.top", "has 10 frames a second, not the 30 of")


def test_a_video_of_distances_is_no_camera(tmp_path: Path) -> None:
    folder = lerobot(tmp_path, "v2.1")
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    features["observation.images.top"]["info"] = {"video.is_depth_map": True}
    assert load_dataset(described(folder, features=features)).images == {}


def test_a_video_that_cannot_be_decoded_is_one_line(tmp_path: Path) -> None:
    folder = lerobot(tmp_path, "v2.1")
    file = folder / "videos/chunk-000/observation.images.top/episode_000001.mp4"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(Exception, match="cannot be decoded") as error:
        load_dataset(folder)
    assert "\n" not in str(error.value)


def test_a_line_of_the_list_that_is_none(tmp_path: Path) -> None:
    folder = lerobot(tmp_path, "v2.1")
    file = folder / "meta/episodes.jsonl"
    file.write_text(file.read_text().replace('"length": 5', '"length": "x"'))
    refused(folder, "episodes.jsonl', line 2 is damaged")


def test_the_first_demonstrations_parts_are_all_demonstrations_parts(tmp_path: Path) -> None:
    """Also where one lacks none of them and has more."""
    file = edited(robomimic(tmp_path), put("data/demo_0/obs/robot0_gripper_qvel", np.zeros((3, 2))))
    assert load_dataset(file).observations.shape[1] == D


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda h5: h5["data"].attrs.update(total=29), "there are 10 steps, but total says 29"),
        (lambda h5: h5["data"].attrs.update(total=10), None),
    ],
)
def test_a_robomimic_file_of_other_episodes_than_it_counts(
    edit: Callable[[Any], None], told: str | None, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    load_dataset(edited(robomimic(tmp_path), edit), filter_key="train")
    assert [told in str(w.message) for w in recwarn] == ([] if told is None else [True])


def test_trajectories_that_the_json_file_has_and_the_other_has_not(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="traj_1: is not here, but in its JSON file: wrong if a copy"):
        load_dataset(edited(maniskill(tmp_path), put("traj_1", None)))
    about = tmp_path / "trajectory.state.pd_ee_delta_pose.json"
    described = json.loads(about.read_text())
    described["episodes"] = [{"episode_id": i, "elapsed_steps": 9} for i in (0, 2)]
    about.write_text(json.dumps(described))
    with pytest.warns(UserWarning, match="traj_0: has another number of steps here .*, and so for 1 more"):
        load_dataset(tmp_path / "trajectory.state.pd_ee_delta_pose.h5")


@pytest.mark.parametrize("description", [None, "{}"])
def test_a_buffers_array_that_nothing_describes(description: str | None, tmp_path: Path) -> None:
    folder = zarr_buffer(tmp_path)
    about = folder / "data" / "state" / ".zarray"
    about.unlink() if description is None else about.write_text(description)
    (folder / "data" / ".ipynb_checkpoints").mkdir()
    refused(folder, "data/state holds files, but no array")
    assert load_dataset(folder, keys=("keypoint",)).observations.shape == (S, 18)


def test_depth_and_text_of_a_buffer_are_left_out(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    folder = zarr_buffer(tmp_path)
    root = zarr.open_group(str(folder), mode="a", zarr_format=2)
    root.create_array("data/depth", data=np.ones((S, 8, 6, 1), np.float32))
    root.create_array("data/point_cloud", data=np.ones((S, 5, 3), np.float32))
    root.create_array("data/instruction", data=np.full(S, "push", "S4"))
    data = load_dataset(folder)
    assert list(data.images) == ["img"]
    assert np.array_equal(data.observations, OBSERVATIONS)


def test_lists_of_ends_that_are_none(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    for array in (ENDS.astype(np.int64)[None], np.array(10), np.array(["3", "8", "10"], "S2")):
        folder = zarr_buffer(tmp_path)
        root = zarr.open_group(str(folder), mode="a", zarr_format=2)
        del root["meta/episode_ends"]
        root.create_array("meta/episode_ends", data=array)
        refused(folder, "meta/episode_ends is ", "it must be a number for each episode")


def test_an_image_that_is_not_finite(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    folder = zarr_buffer(tmp_path, floats=True)
    root = zarr.open_group(str(folder), mode="a", zarr_format=2)
    root["data/img"][4, 0, 0, 0] = np.nan
    refused(folder, "episode 1: camera img, step 1: the image is not finite")


def test_arrays_by_columns_are_read(tmp_path: Path) -> None:
    file = npz(tmp_path)
    before = load_dataset(file)
    arrays = dict(np.load(file))
    np.savez(file, **{**arrays, "states": np.asfortranarray(arrays["states"]), "rewards": arrays["rewards"][:, None]})
    after = load_dataset(file)
    assert np.array_equal(before.observations, after.observations)
    assert np.array_equal(before.rewards, after.rewards)


def test_ranges_the_wrong_way_round(tmp_path: Path) -> None:
    file = npz(tmp_path)
    scales = dict(np.load(tmp_path / "normalization.npz"))
    np.savez(tmp_path / "normalization.npz", **{**scales, "obs_min": scales["obs_max"], "obs_max": scales["obs_min"]})
    refused(file, "normalization.npz': obs_min[0] = 3 is above obs_max, -2")


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_features_of_other_sizes_than_said(version: str, tmp_path: Path) -> None:
    folder = lerobot(tmp_path, version, visual="image")
    info = json.loads((folder / "meta/info.json").read_text())
    info["features"]["action"]["shape"] = [7]
    (folder / "meta/info.json").write_text(json.dumps(info))
    refused(folder, "episode 0: action has 2 numbers a step; meta/info.json says 7")


def test_text_and_depth_of_a_lerobot_data_set_are_left_out(tmp_path: Path) -> None:
    folder = lerobot(tmp_path, "v2.1", visual="image")
    info = json.loads((folder / "meta/info.json").read_text())
    info["features"]["observation.language"] = {"dtype": "string", "shape": [1]}
    info["features"]["observation.images.depth"] = {"dtype": "image", "shape": [32, 32, 1]}
    (folder / "meta/info.json").write_text(json.dumps(info))
    data = load_dataset(folder)
    assert list(data.images) == ["top"]
    assert data.observations.shape == (S, D)


def test_a_table_without_episodes(tmp_path: Path) -> None:
    folder = lerobot(tmp_path, "v2.1", visual="image")
    parquet, file = pytest.importorskip("pyarrow.parquet"), folder / "data/chunk-000/episode_000000.parquet"
    parquet.write_table(parquet.read_table(file).drop_columns(["episode_index"]), file)
    refused(folder, "episode_000000.parquet': the column episode_index is missing")


def test_a_video_that_goes_on_after_its_episode(tmp_path: Path) -> None:
    folder = lerobot(tmp_path, "v2.1")
    videos = folder / "videos/chunk-000/observation.images.top"
    (videos / "episode_000000.mp4").write_bytes((videos / "episode_000001.mp4").read_bytes())
    refused(folder, "episode_000000.mp4' goes on after the episode's 3 steps")


def test_a_penalty_that_is_left_out_is_told(tmp_path: Path) -> None:
    """The last step's, of which nobody knows what followed; steps that earn alike are left out without a word."""
    data = load_dataset(lerobot(tmp_path, "v2.1", visual="image", rewards=False))
    small = replace(data, rewards=np.ones(S, np.float32), rewards_from="data", terminated=np.zeros(3, np.bool_))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decisions(small, 1, 1, 0.99)
    falls = np.where(np.isin(np.arange(S), ENDS - 1), -4.0, 1.0).astype(np.float32)
    with pytest.warns(UserWarning, match="of the rewards are in decisions that are left out"):
        decisions(replace(small, rewards=falls), 1, 1, 0.99)


@pytest.mark.parametrize("keys", [None, ("goal",), ("speed", "goal"), ("place",)])
def test_parts_of_a_minari_data_set(keys: tuple[str, ...] | None, tmp_path: Path) -> None:
    save_dataset(toy_episodes(), tmp_path / "data", SPEC)
    with h5py.File(tmp_path / "data" / "data" / "main_data.hdf5", "a") as h5:
        for episode in h5.values():
            seen = episode["observations"][()]
            del episode["observations"]
            for i, name in enumerate(("goal", "speed")):
                episode[f"observations/{name}"] = seen[:, i : i + 1]
            episode["observations/words"] = np.full(len(seen), b"go")
    (tmp_path / "data" / "manifest.json").unlink()
    if keys == ("place",):
        with pytest.raises(DatasetError, match="there is no 'place' among the observations: goal, speed, words"):
            load_dataset(tmp_path / "data", keys=keys)
        return
    columns = [("goal", "speed").index(name) for name in keys or ("goal", "speed")]
    found = load_dataset(tmp_path / "data", keys=keys).observations
    assert np.array_equal(found, np.asarray(toy_episodes().observations)[:, columns])

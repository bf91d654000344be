"""Minibatches: the same chunks from the device's memory and from workers, on disk or not, in the order asked for."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dprl.data import Episodes, load, load_dataset, save_dataset
from dprl.data.episodes import OnDisk
from dprl.data.loader import Batch, ChunkBatches, DecisionBatches
from dprl.data.transitions import decisions
from dprl.observations import IMAGES, STATE, Camera, map_parts
from dprl.policy import Features
from dprl.spec import EnvSpec
from tests.policy.small import random_episodes

CPU = torch.device("cpu")
CAMERAS = (Camera("side", 8, 10, 1), Camera("top", 6, 6))
SEES = {"state": Features(3, 2), "state and images": Features(3, 2, CAMERAS), "images": Features(0, 2, CAMERAS)}
PICKS = torch.tensor([[0, 1, 2, 3], [27, 4, 4, 0], [13, 12, 8, 5]])


def read(data: Episodes, picks: torch.Tensor = PICKS, pad_after: int = 2, num_workers: int = 0) -> list[Batch]:
    chunks = data.chunks(2, 3, pad_after=pad_after)
    return list(ChunkBatches(data, chunks, CPU, num_workers=num_workers).read(picks))


def by_hand(data: Episodes, row: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The chunk of one step: O = 2, H = 3, padded by as much as there must be."""
    episode = int(np.searchsorted(data.ends, row, side="right"))
    start, end = int(data.starts[episode]), int(data.ends[episode])
    seen = [max(row - 1, start), row]
    done = [min(row + i, end - 1) for i in range(3)]
    parts = {IMAGES + name: np.asarray(images)[seen] for name, images in data.images.items()}
    if data.observations.shape[1]:
        parts[STATE] = data.observations[seen]
    return parts, data.actions[done], np.array([row + i < end for i in range(3)])


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        map_parts(lambda x, y: torch.testing.assert_close(x, y, rtol=0, atol=0), a.obs, b.obs)
        torch.testing.assert_close(a.actions, b.actions, rtol=0, atol=0)
        assert (a.valid is None) == (b.valid is None)
        assert a.valid is None or a.valid.equal(b.valid)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("sees", SEES)
def test_chunks_are_those_that_were_asked_for_in_that_order(sees: str, num_workers: int) -> None:
    data = random_episodes(SEES[sees])
    assert len(data.chunks(2, 3, pad_after=2)) == len(data.actions) == 28, "chunk i begins at step i"
    batches = read(data, num_workers=num_workers)
    assert len(batches) == len(PICKS)
    for picks, batch in zip(PICKS.tolist(), batches, strict=True):
        assert isinstance(batch.obs, dict) == (sees != "state")
        parts = batch.obs if isinstance(batch.obs, dict) else {STATE: batch.obs}
        for i, row in enumerate(picks):
            seen, actions, valid = by_hand(data, row)
            assert parts.keys() == seen.keys()
            for name, part in parts.items():
                assert part.dtype == (torch.float32 if name == STATE else torch.uint8)
                np.testing.assert_array_equal(part[i].numpy(), seen[name])
            np.testing.assert_array_equal(batch.actions[i].numpy(), actions)
            assert batch.valid is not None
            np.testing.assert_array_equal(batch.valid[i].numpy(), valid)


@pytest.mark.parametrize("sees", SEES)
def test_workers_read_what_memory_holds(sees: str) -> None:
    data = random_episodes(SEES[sees])
    assert_same(read(data), read(data, num_workers=2))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_there_is_no_mask_where_nothing_is_padded(num_workers: int) -> None:
    for batch in read(random_episodes(), PICKS[:1], pad_after=0, num_workers=num_workers):
        assert batch.valid is None
    padded = read(random_episodes(), PICKS[:1], pad_after=1, num_workers=num_workers)
    assert padded[0].valid is not None
    assert padded[0].valid.all(1).tolist() == [True, True, True, False]


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loader") / "data"
    spec = EnvSpec("some/env", "", "", 3, (-1.0,) * 2, (1.0,) * 2, 10, cameras=CAMERAS)
    save_dataset(random_episodes(SEES["state and images"]), folder, spec)
    return folder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_on_disk_are_read_from_there(on_disk: Path, num_workers: int) -> None:
    data = load_dataset(on_disk, memory_map=True)
    assert all(isinstance(images, OnDisk) for images in data.images.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(read(data, num_workers=num_workers), read(load_dataset(on_disk)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_selected_episodes_stay_on_disk(on_disk: Path, num_workers: int) -> None:
    mapped = load_dataset(on_disk, memory_map=True).select([2, 0])
    assert all(isinstance(images, OnDisk) for images in mapped.images.values())
    picks = torch.tensor([[0, 5, 6, 10]])
    assert_same(read(mapped, picks, num_workers=num_workers), read(load_dataset(on_disk).select([2, 0]), picks))


def test_workers_leave_torchs_own_generator_alone() -> None:
    """What else a run draws must not depend on how its data are read."""
    state = torch.get_rng_state()
    read(random_episodes(), PICKS[:1], num_workers=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_may_be_changed_without_changing_the_data() -> None:
    data = random_episodes()
    before = replace(data, observations=data.observations.copy(), actions=data.actions.copy())
    for batch in read(data):
        batch.obs.zero_()
        batch.actions.zero_()
    np.testing.assert_array_equal(data.observations, before.observations)
    np.testing.assert_array_equal(data.actions, before.actions)


def test_data_in_memory_are_not_held_twice() -> None:
    data = random_episodes(SEES["state and images"])
    batches = ChunkBatches(data, data.chunks(2, 3), CPU, num_workers=0)
    held = {STATE: data.observations, **{IMAGES + name: images for name, images in data.images.items()}}
    assert {name: part.data_ptr() for name, part in batches._obs.items()} == {
        name: array.ctypes.data for name, array in held.items()
    }


def test_its_length_is_the_number_of_chunks() -> None:
    data = random_episodes()
    for pad_after, n in ((0, 20), (1, 24), (2, 28), (9, 28)):
        chunks = data.chunks(2, 3, pad_after=pad_after)
        assert len(ChunkBatches(data, chunks, CPU)) == len(ChunkBatches(data, chunks, CPU, num_workers=2)) == n


def test_what_does_not_fit_stays_on_disk_and_is_read_by_workers(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = load_dataset(on_disk, memory_map=False)
    size = sum(a.nbytes for a in (held.observations, held.actions, held.rewards, *held.images.values()))
    for memory, workers in ((3 * size, 0), (3 * size - 3, 2)):
        monkeypatch.setattr(load, "physical_memory", lambda memory=memory: memory)
        data = load_dataset(on_disk)
        batches = ChunkBatches(data, data.chunks(2, 3, pad_after=2), CPU)
        assert batches.num_workers == workers
        assert all(isinstance(images, OnDisk) == (workers > 0) for images in data.images.values())
        assert_same(list(batches.read(PICKS)), read(load_dataset(on_disk, memory_map=False)))


# ----------------------------------------------------------------------------------------------------------- decisions


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("sees", SEES)
def test_decisions_come_with_what_they_led_to(sees: str, num_workers: int) -> None:
    data = random_episodes(SEES[sees])
    cut = decisions(data, 2, 3, 0.9)
    batches = DecisionBatches(data, cut, CPU, num_workers=num_workers)
    assert len(batches) == len(cut)
    rows = np.arange(len(cut))
    (batch,) = batches.read(torch.as_tensor(rows)[None])
    expected = {
        "obs": data.observe(cut.observation_rows),
        "next_obs": data.observe_outcomes(cut.next_rows),
    }
    for name, observation in expected.items():
        ours, theirs = (o if isinstance(o, dict) else {STATE: o} for o in (getattr(batch, name), observation))
        assert ours.keys() == theirs.keys()
        for part, values in theirs.items():
            np.testing.assert_array_equal(ours[part], values)
    np.testing.assert_array_equal(batch.actions, data.actions[cut.action_rows])
    np.testing.assert_array_equal(batch.reward, cut.rewards)
    np.testing.assert_array_equal(batch.discount, cut.discounts)


def test_what_an_episode_led_to_is_its_own(on_disk: Path) -> None:
    """Rows beyond the last step are final observations, in memory or on disk."""
    held, mapped = load_dataset(on_disk), load_dataset(on_disk, memory_map=True)
    rows = np.array([[0, int(held.ends[-1]) + 2], [int(held.ends[-1]), 3]])
    for data in (held, mapped):
        seen = data.observe_outcomes(rows)
        np.testing.assert_array_equal(seen[STATE][0, 1], held.final_observations[2])
        np.testing.assert_array_equal(seen[STATE][1], [held.final_observations[0], held.observations[3]])
        for camera, final in held.final_images.items():
            np.testing.assert_array_equal(seen[IMAGES + camera][0, 1], final[2])

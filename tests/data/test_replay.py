"""The replay buffer: what goes in comes out, the oldest makes room, and it is saved and restored."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dprl.data.load import physical_memory
from dprl.data.loader import DecisionBatch
from dprl.data.replay import ReplayBuffer
from dprl.errors import ConfigError, DatasetError
from dprl.observations import IMAGES, STATE
from dprl.seeding import torch_generator

CPU = torch.device("cpu")
BLANK = torch.zeros(1, 2, 3)
SEEN = {STATE: BLANK, IMAGES + "top": torch.zeros(1, 2, 4, 5, 3, dtype=torch.uint8)}


def numbered(first: int, n: int) -> DecisionBatch:
    """Decisions that say which they are, everywhere."""
    which = torch.arange(first, first + n, dtype=torch.float32)
    obs = which.view(-1, 1, 1).expand(n, 2, 3)
    return DecisionBatch(obs, which.view(-1, 1, 1).expand(n, 2, 1), obs + 0.5, which, which / 100, which.long())


@given(st.lists(st.integers(1, 7), min_size=1, max_size=8))
def test_it_holds_the_latest(sizes: list[int]) -> None:
    buffer, total = ReplayBuffer(7, BLANK, 2, 1, CPU), 0
    for n in sizes:
        buffer.add(numbered(total, n))
        total += n
    assert len(buffer) == min(total, 7)
    drawn = buffer.sample(400, torch_generator(0))
    assert set(drawn.reward.int().tolist()) == set(range(max(0, total - 7), total))
    for row in range(400):
        which = drawn.reward[row]
        assert bool((drawn.obs[row] == which).all())
        assert bool((drawn.next_obs[row] == which + 0.5).all())
        assert bool((drawn.actions[row] == which).all())
        assert drawn.discount[row] == which / 100
        assert drawn.n_steps[row] == which


def test_images_go_in_and_out() -> None:
    buffer = ReplayBuffer(5, SEEN, 2, 1, CPU)
    batch = numbered(3, 2)
    images = torch.randint(0, 256, (2, 2, 4, 5, 3), dtype=torch.uint8, generator=torch_generator(0))
    seen = {STATE: batch.obs, IMAGES + "top": images}
    buffer.add(batch._replace(obs=seen, next_obs=seen))
    drawn = buffer.sample(20, torch_generator(0))
    for row in range(20):
        assert drawn.obs[IMAGES + "top"][row].equal(images[int(drawn.reward[row]) - 3])
    restored = ReplayBuffer(5, SEEN, 2, 1, CPU)
    restored.restore(buffer.state())
    again = restored.sample(20, torch_generator(0))
    assert again.next_obs[IMAGES + "top"].equal(drawn.next_obs[IMAGES + "top"])


@pytest.mark.parametrize("sizes", [[3], [5, 4]])
def test_restored_it_goes_on_the_same(sizes: list[int]) -> None:
    buffer, restored = (ReplayBuffer(7, BLANK, 2, 1, CPU) for _ in range(2))
    for i, n in enumerate(sizes):
        buffer.add(numbered(10 * i, n))
    restored.restore(buffer.state())
    for one in (buffer, restored):
        one.add(numbered(50, 3))
    ours, theirs = (one.sample(30, torch_generator(1)) for one in (buffer, restored))
    assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


def test_bad_use_is_refused() -> None:
    with pytest.raises(ConfigError, match="capacity = 0"):
        ReplayBuffer(0, BLANK, 2, 1, CPU)
    buffer = ReplayBuffer(3, BLANK, 2, 1, CPU)
    with pytest.raises(DatasetError, match="the replay buffer is empty"):
        buffer.sample(1, torch_generator(0))
    with pytest.raises(ConfigError, match="capacity = 3: must be at least the 4 decisions"):
        buffer.add(numbered(0, 4))


def test_a_buffer_that_would_not_fit_is_refused() -> None:
    row = 2 * (4 * 6 + 2 * 4 * 5 * 3) + 8
    most = physical_memory() // 2 // row
    with pytest.raises(
        ConfigError, match=rf"capacity = {most + 1}: must be at most {most:,}: decisions of {row} bytes"
    ):
        ReplayBuffer(most + 1, SEEN, 2, 1, CPU)


def test_what_an_earlier_version_kept_goes_on() -> None:
    buffer, other = ReplayBuffer(5, BLANK, 2, 1, CPU), ReplayBuffer(5, BLANK, 2, 1, CPU)
    buffer.add(numbered(1, 3))
    state = buffer.state()
    del state["rows"]["n_steps"]
    other.restore(state)
    assert other.sample(4, torch_generator(0)).n_steps.tolist() == [2] * 4

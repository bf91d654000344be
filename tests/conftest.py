"""One thread: these networks are tiny, and threads that wait for each other on busy cores take many times as long."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; processes that tests start inherit it

os.environ.setdefault("RAY_worker_niceness", "0")  # else a busy machine leaves Ray's workers no time
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

settings.register_profile("dprl", deadline=None)  # a busy machine is no failure
settings.load_profile("dprl")

LONG = ("rollout", "training", "experiments", "interop", "test_packaging.py", "test_cli.py")
"""What starts processes."""


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    """Let what draws from torch's own generator, such as initial weights, draw the same each time."""
    import torch  # here, because what it finds in the environment counts

    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest files come first, so that none of them runs alone at the end."""
    folder = Path(__file__).parent
    items.sort(key=lambda item: item.path.relative_to(folder).parts[0] not in LONG)

"""What an algorithm is to the loop, and how it is saved: a policy folder with the training state beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from dprl import checkpoint
from dprl.config import to_json
from dprl.errors import CheckpointError
from dprl.policy import Policy

Batch = TypeVar("Batch")

AGENT_FILE = "agent.json"
STATE_NAME = "training"


class Agent(ABC, Generic[Batch]):
    """One algorithm. The loop owns time, the agent owns the mathematics."""

    name: str
    policy: Policy
    """What is evaluated and saved."""
    config: Any
    """Its frozen config dataclass."""
    seed: int
    timesteps: int
    """How far it is: environment steps, or gradient steps where no environment is involved."""

    @abstractmethod
    def collect(self) -> Batch:
        """Gather what one update needs."""

    @abstractmethod
    def update(self, batch: Batch) -> dict[str, float]:
        """Learn from it; return metrics."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs beside the policy."""

    @abstractmethod
    def restore(self, state: checkpoint.StateTree) -> None:
        """Take up what `state` returned."""

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the folder `path`: the policy as `save_pretrained` does, and the training state beside it.

        Raises:
            RunExistsError: `path` exists and `overwrite` is not set.
        """
        checkpoint.publish(Path(path), lambda folder: write_agent(self, folder), overwrite=overwrite)

    def load_state(self, path: str | Path) -> None:
        """Take up policy and training state from a folder that `save` wrote.

        The agent must be newly made, on environments that have not been stepped: their episodes are replayed.

        Raises:
            CheckpointError: missing, damaged, or of another kind of agent.
        """
        load_agent_state(self, Path(path))


def write_agent(agent: Agent[Any], folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Write policy, training state and `extra` facts into an existing folder."""
    agent.policy.write(folder)
    about = {"agent": agent.name, "seed": agent.seed, "config": to_json(agent.config), **(extra or {})}
    checkpoint.write_json(folder / AGENT_FILE, about)
    checkpoint.save_state(folder, STATE_NAME, agent.state())


def load_agent_state(agent: Agent[Any], folder: Path) -> dict[str, Any]:
    """Bring `agent` to where the folder's was; return the folder's agent.json."""
    checkpoint.verify(folder)
    about: dict[str, Any] = checkpoint.read_json(folder / AGENT_FILE)
    if about["agent"] != agent.name:
        raise CheckpointError(f"'{folder}' is a checkpoint of {about['agent']}, not of {agent.name}")
    saved = Policy.from_pretrained(folder)
    if (saved.config, saved.features) != (agent.policy.config, agent.policy.features):
        raise CheckpointError(
            f"'{folder}' holds a policy of other settings than this agent's: {saved.config} of {saved.features}, "
            f"not {agent.policy.config} of {agent.policy.features}"
        )
    with torch.no_grad():
        try:
            agent.policy.load_state_dict(saved.state_dict())
        except RuntimeError as error:
            raise CheckpointError(f"the policy in '{folder}' is not of this agent's shape: {error}") from error
    agent.restore(checkpoint.load_state(folder, STATE_NAME))
    return about

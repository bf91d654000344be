"""The one training loop, and the run folder it writes."""

from dprl.training.agent import Agent, load_agent_state, write_agent
from dprl.training.loop import Evaluate, LoopConfig, train
from dprl.training.run import RunFolder

__all__ = ["Agent", "Evaluate", "LoopConfig", "RunFolder", "load_agent_state", "train", "write_agent"]

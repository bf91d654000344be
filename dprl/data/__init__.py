"""Episodes on disk and in memory."""

from dprl.data.episodes import Episodes
from dprl.data.minari import load_dataset, save_dataset

__all__ = ["Episodes", "load_dataset", "save_dataset"]

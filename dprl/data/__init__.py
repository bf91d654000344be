"""Episodes on disk and in memory."""

from dprl.data.episodes import Chunks, Episodes, ImageRows
from dprl.data.minari import load_dataset, save_dataset

__all__ = ["Chunks", "Episodes", "ImageRows", "load_dataset", "save_dataset"]

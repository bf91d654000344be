"""Episodes on disk and in memory."""

from dprl.data.episodes import Chunks, Episodes, OnDisk
from dprl.data.formats.minari import save_dataset
from dprl.data.load import convert, load_dataset, open_dataset
from dprl.data.source import DataOptions, Episode, Source
from dprl.data.summary import Summary, summarize

__all__ = [
    "Chunks",
    "DataOptions",
    "Episode",
    "Episodes",
    "OnDisk",
    "Source",
    "Summary",
    "convert",
    "load_dataset",
    "open_dataset",
    "save_dataset",
    "summarize",
]

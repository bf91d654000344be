"""Minari's other layouts, Arrow and Parquet, with pyarrow and what Minari says of them.

<folder>/data/metadata.json             `data_format` is arrow or parquet
<folder>/data/<episode>/metadata.json   seed, total_steps
<folder>/data/<episode>/                a row for each step and one more: observations, actions, rewards, ...
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dprl.data.formats.minari import DATA_FILE, METADATA_FILE, env_id_of, episode_of, read_metadata
from dprl.data.images import decode, stack
from dprl.data.source import Episode, Source, damage_named
from dprl.errors import DatasetError, MissingDependencyError

LAYOUTS = ("arrow", "parquet")


class MinariTables(Source):
    """A data set's folder."""

    format: ClassVar[str] = "a Minari data set in Arrow or Parquet files"
    takes: ClassVar[tuple[str, ...]] = ("keys",)

    @property
    def files(self) -> list[Path]:
        """See `Source.files`."""
        return sorted(file for file in (self.path / "data").rglob("*") if file.is_file())

    @staticmethod
    def detects(path: Path) -> bool:
        """See `Source.detects`."""
        if not path.is_dir() or (path / DATA_FILE).exists():
            return False
        return read_metadata(path / METADATA_FILE).get("data_format") in LAYOUTS

    def open(self) -> None:
        """See `Source.open`."""
        file = self.path / METADATA_FILE
        metadata = read_metadata(file)
        self.env_id = env_id_of(metadata, file)
        with damage_named(f"'{file}'", self.format):
            self._storage = _minari_storage().read(self.path / "data")
            self._about = list(self._storage.get_episode_metadata(range(self._storage.total_episodes)))
            self.lengths = [int(about["total_steps"]) for about in self._about]
        if not self.lengths:
            raise DatasetError(f"'{file}': there are no episodes")

    def _read(self, index: int) -> Episode:
        where = f"'{self.path / 'data' / str(index)}'"
        with damage_named(where, self.format):
            storage, steps = self._storage, self.lengths[index]
            table = self._rows(index)
            parts = {
                "observations": _decoded(storage.observation_space, table["observations"], where),
                "actions": _decoded(storage.action_space, table["actions"], where)[:steps],
                **{name: np.asarray(table[name])[:steps] for name in ("rewards", "terminations", "truncations")},
            }
            infos = table.get("infos")
            if infos is not None and infos.type.get_field_index("success") >= 0:
                parts["infos"] = {"success": np.asarray(infos.field("success").to_pylist())}
            return episode_of(parts, self._about[index], steps, where, "data", self.options.keys)

    def _rows(self, index: int) -> dict[str, Any]:
        """The columns of an episode, a row for each step and one more."""
        from pyarrow import dataset

        ignored = ["_", ".", "metadata.json"]
        folder = self.path / "data" / str(index)
        batch = dataset.dataset(folder, format=self._storage.FORMAT, ignore_prefixes=ignored).to_table()
        return {name: batch[name].combine_chunks() for name in batch.column_names}


def _decoded(space: Any, column: Any, where: str) -> Any:
    """Arrays (T+1, ...), of named parts too; Minari flattens what is no image, and encodes what is."""
    if hasattr(space, "spaces"):
        named = hasattr(space.spaces, "items")  # those of a tuple are called as in Minari's HDF5 files
        parts = space.spaces.items() if named else ((str(i), part) for i, part in enumerate(space.spaces))
        return {
            name if named else f"_index_{name}": _decoded(part, column.field(name), f"{where}: {name}")
            for name, part in parts
        }
    if str(column.type) == "binary":
        return stack([decode(row, f"{where}, step {step}") for step, row in enumerate(column.to_pylist())], where)
    if space.shape is None:  # text, which is in no state
        return np.asarray(column.to_pylist())
    rows = column.flatten() if hasattr(column.type, "list_size") else column
    return np.asarray(rows).astype(space.dtype).reshape(len(column), *space.shape)


def _minari_storage() -> Any:
    """Return what opens a data set's folder, or raise MissingDependencyError."""
    try:
        from minari.dataset.minari_storage import MinariStorage
    except ImportError as error:
        raise MissingDependencyError("minari", "data", "reading Minari's Arrow and Parquet files") from error
    return MinariStorage

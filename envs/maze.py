"""Point mazes: a point must reach the goal, on a route that nobody has shown as a whole. Nothing to install, fast.

Each task, ``PointMaze-Halves-v0`` or ``PointMaze-Thirds-v0``, always begins in the same place. Its demonstrations are
of ``...-Pieces-v0``, the same maze in which episodes begin in several places: those that begin where the task does lead
into a dead end; others come from elsewhere, cross their way, and of these the last reach the goal. So the route to the
goal has to be stitched of two or three pieces, as in D4RL's mazes (arXiv:2004.07219, section 5).

Lengths are in cells; x points right, y down.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dprl.envs.chunked import ChunkedEnv, SimulatorStep
from dprl.seeding import numpy_generator
from dprl.spec import BoolArray, EnvOptions, EnvSpec, FloatArray, IntArray

SPEED = 0.2
"""Cells per step and axis."""
START_SPREAD = 0.3
REACHED = 0.3
"""How near the expert comes to the middle of a cell before it goes on to the next."""
PIECES = "-Pieces"
WALL_GREY, PIXELS_PER_CELL = 90, 16

Points = npt.NDArray[np.float64]
Cell = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """A maze: walls are ``#``, letters name places."""

    rows: tuple[str, ...]
    begin: str
    goal: str
    pieces: tuple[tuple[str, str, float], ...]
    """What is demonstrated: from where, to where, and which share of the episodes. All ends but the goal are dead."""
    max_episode_steps: int

    @cached_property
    def free(self) -> BoolArray:
        """(height, width)."""
        return np.array([[cell != "#" for cell in row] for row in self.rows])

    def place(self, letter: str) -> Cell:
        """Return row and column."""
        return next((r, row.index(letter)) for r, row in enumerate(self.rows) if letter in row)

    @cached_property
    def ends(self) -> BoolArray:
        """(height, width) of dead ends."""
        ends = np.zeros_like(self.free)
        for _, end, _ in self.pieces:
            ends[self.place(end)] = end != self.goal
        return ends

    def distances(self, to: Cell) -> IntArray:
        """Cells to go from each cell, (height, width); -1 in walls."""
        distances = np.full(self.free.shape, -1, np.int64)
        distances[to], waiting = 0, deque([to])
        while waiting:
            row, column = waiting.popleft()
            for cell in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if self.free[cell] and distances[cell] < 0:
                    distances[cell] = distances[row, column] + 1
                    waiting.append(cell)
        return distances

    def route(self, begin: str, end: str) -> list[Cell]:
        """Return the cells of the shortest way, both ends included."""
        distances, route = self.distances(self.place(end)), [self.place(begin)]
        while route[-1] != self.place(end):
            row, column = route[-1]
            near = ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1))
            route.append(next(cell for cell in near if distances[cell] == distances[row, column] - 1))
        return route


LAYOUTS = {
    "PointMaze-Halves": Layout(
        rows=(
            "###########",
            "#..S###..G#",
            "#.#####.###",
            "#.......###",
            "#####.#####",
            "###.....###",
            "###.###.###",
            "#W..###..T#",
            "###########",
        ),
        begin="S",
        goal="G",
        pieces=(("S", "W", 0.85), ("T", "G", 0.15)),
        max_episode_steps=150,
    ),
    "PointMaze-Thirds": Layout(
        rows=(
            "###################",
            "#S..###.....###..G#",
            "###.###.###.###.###",
            "###.....###.....###",
            "#####.#######.#####",
            "###.....###.....###",
            "###.###.###.###.###",
            "#W..###T.#V.###..U#",
            "###################",
        ),
        begin="S",
        goal="G",
        pieces=(("S", "W", 0.5), ("T", "V", 0.35), ("U", "G", 0.15)),
        max_episode_steps=250,
    ),
}
IDS = tuple(f"{name}{pieces}-v0" for name in LAYOUTS for pieces in ("", PIECES))


def layout_of(env_id: str) -> Layout:
    """Return the maze of one of `IDS`."""
    return LAYOUTS[env_id.removesuffix("-v0").removesuffix(PIECES)]


def limits(env_id: str) -> tuple[float, float]:
    """Return the least and the largest number of an observation."""
    return 0.0, float(max(layout_of(env_id).free.shape))


def make_spec(env_id: str, options: EnvOptions) -> EnvSpec:
    """Return the spec of one of `IDS`."""
    return EnvSpec(
        id=env_id,
        builder="dprl.envs.maze:build",
        backend_id=env_id,
        observation_size=2,
        action_low=(-1.0, -1.0),
        action_high=(1.0, 1.0),
        max_episode_steps=options.max_episode_steps or layout_of(env_id).max_episode_steps,
        reward=options.reward or "sparse",
        has_success=True,
    )


def build(spec: EnvSpec, seeds: list[int], num_threads: int = 0) -> ChunkedEnv:
    """Build one environment per seed; `num_threads` is not used."""
    return ChunkedEnv(spec, PointMaze(seeds, spec.backend_id), seeds)


class PointMaze:
    """N points. An episode depends on its environment's seed and its number alone.

    An action (2,) in [-1, 1] moves the point by 0.2 of it, along each axis unless a wall is there. The goal's cell is a
    success; a dead end ends the episode without one. The dense reward is the progress toward the goal in cells.
    """

    def __init__(self, seeds: list[int], env_id: str) -> None:
        n, layout = len(seeds), layout_of(env_id)
        whole = ((layout.begin, layout.goal, 1.0),)
        pieces = layout.pieces if PIECES in env_id else whole
        routes = [layout.route(begin, end) for begin, end, _ in pieces]
        longest = max(map(len, routes))
        self.layout, self._seeds = layout, seeds
        self._shares = [share for *_, share in pieces]
        self._routes: Points = np.array(  # (pieces, longest, 2)
            [[(column, row) for row, column in route + route[-1:] * (longest - len(route))] for route in routes], float
        )
        self._to_go = layout.distances(layout.place(layout.goal))
        self.position: Points = np.zeros((n, 2))
        """(N, 2)."""
        self.piece = np.zeros(n, np.int64)
        """(N,) which of the routes an expert takes."""
        self._passed = np.zeros(n, np.int64)  # cells of it

    def reset(self, indices: IntArray, episodes: IntArray) -> FloatArray:
        """See `Simulator.reset`."""
        for index, episode in zip(indices, episodes, strict=True):
            rng = numpy_generator(self._seeds[index], "maze", int(episode))
            self.piece[index] = piece = rng.choice(len(self._shares), p=self._shares)
            self.position[index] = self._routes[piece, 0] + rng.uniform(-START_SPREAD, START_SPREAD, 2)
            self._passed[index] = 1
        return self._observe(indices)

    def step(self, indices: IntArray, actions: FloatArray) -> SimulatorStep:
        """See `Simulator.step`."""
        before = self._to_go[self._cells(indices)]
        for axis in (0, 1):
            there = self.position[indices]
            there[:, axis] += SPEED * actions[:, axis]
            fits = self.layout.free[_cells(there)]
            self.position[indices[fits]] = there[fits]
        reached = np.linalg.norm(self.position[indices] - self._ahead(indices), axis=1) < REACHED
        self._passed[indices] = np.minimum(self._passed[indices] + reached, self._routes.shape[1] - 1)
        cells = self._cells(indices)
        after, no = self._to_go[cells], np.zeros(len(indices), np.bool_)
        progress = (before - after).astype(np.float32)
        return SimulatorStep(self._observe(indices), progress, self.layout.ends[cells], no, after == 0)

    def privileged(self, indices: IntArray) -> FloatArray:
        """Return (n, 4): the point's x and y, and those of the cell ahead on its route."""
        shown: FloatArray = np.concatenate([self.position[indices], self._ahead(indices)], axis=1).astype(np.float32)
        return shown

    def close(self) -> None:
        """Nothing to free."""

    def picture(self) -> npt.NDArray[np.uint8]:
        """Draw the first point in its maze: (height, width, 3), 16 pixels a cell."""
        layout, scale = self.layout, PIXELS_PER_CELL
        image = np.where(layout.free[..., None], 255, WALL_GREY).astype(np.uint8).repeat(3, axis=2)
        image[layout.place(layout.goal)] = (120, 200, 120)
        image[layout.ends] = (220, 150, 150)
        image = image.repeat(scale, axis=0).repeat(scale, axis=1)
        row, column = (np.arange(size) for size in image.shape[:2])
        x, y = (self.position[0] + 0.5) * scale
        image[(row[:, None] - y) ** 2 + (column - x) ** 2 <= (scale / 4) ** 2] = (40, 80, 220)
        return image

    def _observe(self, indices: IntArray) -> FloatArray:
        position: FloatArray = self.position[indices].astype(np.float32)
        return position

    def _ahead(self, indices: IntArray) -> Points:
        ahead: Points = self._routes[self.piece[indices], self._passed[indices]]
        return ahead

    def _cells(self, indices: IntArray) -> tuple[IntArray, IntArray]:
        return _cells(self.position[indices])


def _cells(position: Points) -> tuple[IntArray, IntArray]:
    """Rows and columns of points (n, 2)."""
    column, row = np.rint(position).astype(np.int64).T
    return row, column


class ScriptedExpert:
    """From cell to cell along the episode's route."""

    def act(self, observation: npt.NDArray[np.float32]) -> FloatArray:
        """Return actions (n, 2), of length 1 until the last step to a cell, for what `PointMaze.privileged` shows."""
        way = observation[:, 2:] - observation[:, :2]
        length = np.linalg.norm(way, axis=1, keepdims=True)
        action: FloatArray = (way / np.maximum(length, SPEED)).astype(np.float32)
        return action


def scripted(env_id: str) -> ScriptedExpert:
    """Build the expert, which is the same for all `IDS`."""
    return ScriptedExpert()

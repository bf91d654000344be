"""Push-T, by the package gym-pusht: a disc must push a T-shaped block onto a T drawn on the table.

An action is the point (x, y) that the disc makes for, in pixels from 0 to 512, as in the published data sets; an
environment step is 0.1 s. Success is a block that covers more than 95% of the drawn T. What is observed:

    pusht/state      the disc's x and y, the block's x and y and its angle in [0, 2 pi)
    pusht/keypoints  the disc's x and y, x and y of 8 corners of the block, as LeRobot's ``pusht_keypoints``
    pusht/pixels     the disc's x and y, and the image that gym-pusht draws, 96 x 96

The goal's angle is pi / 4, and the block's jumps by 2 pi where it passes 0: the keypoints have no such jump. The same
seed and actions give the same observations, rewards and images to the bit (see `PushT`).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from dprl.observations import Camera
from dprl.spec import EnvOptions, EnvSpec, FloatArray

STATE_ID, KEYPOINTS_ID, PIXELS_ID = IDS = ("pusht/state", "pusht/keypoints", "pusht/pixels")
OBSERVATION_SIZES = {STATE_ID: 5, KEYPOINTS_ID: 18, PIXELS_ID: 2}
CAMERA = Camera("top", 96, 96)
MAX_EPISODE_STEPS = 300

# Lengths are in pixels, angles in radians.
TABLE = 512.0
DISC_RADIUS = 15.0
GOAL_POSITION, GOAL_ANGLE = np.array([256.0, 256.0]), np.pi / 4
CENTRE = np.array([0.0, 45.0])  # the block's centre of gravity, from the point that is its position
GYRATION = 3000.0**0.5  # its radius of gyration
# The block around its centre of gravity: two rectangles (left, top, right, bottom), and its outline.
RECTANGLES = np.array([(-60.0, -45.0, 60.0, -15.0), (-15.0, -15.0, 15.0, 75.0)])
OUTLINE = np.array(
    [(-60, -45), (60, -45), (60, -15), (15, -15), (15, 75), (-15, 75), (-15, -15), (-60, -15)], np.float64
)

Array = npt.NDArray[np.float64]


def make_spec(env_id: str, options: EnvOptions) -> EnvSpec:
    """Return the spec of one of `IDS`."""
    return EnvSpec(
        id=env_id,
        builder="dprl.envs.gymnasium:build",
        backend_id=f"dprl.envs.pusht_env:make_single!{env_id.removeprefix('pusht/')}",
        observation_size=OBSERVATION_SIZES[env_id],
        action_low=(0.0, 0.0),
        action_high=(TABLE, TABLE),
        max_episode_steps=options.max_episode_steps or MAX_EPISODE_STEPS,
        reward=options.reward or "sparse",
        has_success=True,
        vectorization=options.vectorization,
        serial=options.vectorization == "sync",
        cameras=(CAMERA,) if env_id == PIXELS_ID else (),
    )


def coverage(position: Array, angle: float) -> float:
    """Return how much of the drawn T a block at `position` (2,) covers, in [0, 1]."""
    import shapely

    goal = _goal()
    block = shapely.Polygon(_rotated(OUTLINE + CENTRE, angle) + position)
    return float(block.intersection(goal).area / goal.area)


@functools.cache
def _goal() -> Any:
    import shapely

    return shapely.Polygon(_rotated(OUTLINE + CENTRE, GOAL_ANGLE) + GOAL_POSITION)


def scripted(env_id: str) -> PushingExpert:
    """Build the expert, which is the same for all `IDS`."""
    return PushingExpert()


# --- The expert.
#
# The table damps every motion at once and contacts have no friction, so how a straight push moves the block depends on
# where the disc touches it and in which direction it goes, and on nothing else. In the block's own frame these motions
# are a table, computed once. The block's frame has its origin in the centre of gravity; P pushes, L lengths.

GAP = 5.0  # between disc and block where a push begins
PUSH_STEP, PUSH_STEPS, PUSH_EVERY = 2.0, 70, 2
SPACING = 7.0  # between the points of the outline where pushes begin
ANGLES = np.radians(np.arange(-60, 61, 15))  # of their directions, from the outline's normal
SLOP, RECOVERY = 0.1, 0.0612  # Chipmunk pushes overlapping bodies apart by 6.12% of what exceeds 0.1 a step

FOLLOWING, FOLLOWING_LENGTHS = 60, 4  # second pushes that are looked at after each first one
KEPT = 150  # first pushes that are looked at
FAN, FAN_ANGLE, FAN_EVERY = 24, 1.3, 4  # pushes from where the disc is now, and how far from the block they turn
FAN_REACH = 14.0  # how near the block it must be
AIMS = 7.5, 20.0  # distance and spacing of the points around the block for which more of them make

ROUTE_DISTANCE = 24.0  # of the way around the block from its outline
MARGIN = 3.0  # that the disc keeps on its way
EDGE = 4.0  # that its centre keeps from the table's edge
WALL = 7.0  # how far inside the table the walls end

# Costs, in pixels of the disc's way.
PER_ERROR, PER_HALVING, TOLERANCE = 3.0, 100.0, 2.0
PER_APPROACH, PER_PUSH, PER_WALL = 25.0, 30.0, 20.0
CLOSE, CLOSER, NOT_CLOSER = 30.0, 0.8, 300.0

TRAVEL_LEAD, PUSH_LEAD = 40.0, 24.0  # how far ahead of the disc its target is, at most: twice its way in a step


class PushingExpert:
    """Plans at every step the push, and the push after it, that bring the block to its goal by the shortest way.

    It acts on (disc x, y, block x, y, angle) alone, keeps nothing in mind and draws no numbers: its action is a
    function of the state, and its target is never more than 40 pixels ahead of the disc. On the 60 episodes of the
    seeds 2000 to 2059 it succeeded 59 times (95 % interval 0.91 to 1.00), at about two seconds of one core each.
    """

    def __init__(self) -> None:
        touching, normal = _offset_outline(DISC_RADIUS, SPACING)
        direction = np.concatenate([_rotated(-normal, angle) for angle in ANGLES])
        start = np.tile(touching, (len(ANGLES), 1)) - GAP * direction
        free = _clearance(start) >= DISC_RADIUS + 1.5
        motion = push(start[free], direction[free], PUSH_STEP, PUSH_STEPS)[:, PUSH_EVERY - 1 :: PUSH_EVERY]
        works = np.abs(motion[:, -1]).sum(axis=1) > 1
        self._start, self._direction, self._motion = start[free][works], direction[free][works], motion[works]
        self._length = PUSH_STEP * PUSH_EVERY * np.arange(1, motion.shape[1] + 1)

        self._corner = _offset_outline(ROUTE_DISTANCE, np.inf)[0]  # (W, 2) the disc goes from one to the next
        self._between = _ways(self._corner, self._corner)  # (W, W)
        self._to_start = _ways(self._corner, self._start)  # (W, P)

        self._aims = _offset_outline(*AIMS)[0]
        second = np.arange(FOLLOWING) * len(self._start) // FOLLOWING
        stops = np.geomspace(3, len(self._length), FOLLOWING_LENGTHS).astype(np.int64) - 1
        scaled = self._motion[second][:, stops] * (1, 1, GYRATION)
        self._second_start = self._start[second]
        self._second_motion = scaled.reshape(-1, 3).T.astype(np.float32)  # (3, FOLLOWING x FOLLOWING_LENGTHS)
        self._second_length = np.tile(self._length[stops], FOLLOWING).astype(np.float32)
        around = _shortest(self._between)
        to_second = (around[:, :, None] + self._to_start[None, :, second]).min(axis=1)
        over_corners = (_ways(self._start, self._corner)[:, :, None] + to_second).min(axis=1)
        self._to_second = np.minimum(_ways(self._start, self._second_start), over_corners).astype(np.float32)

    def act(self, observation: npt.NDArray[Any]) -> FloatArray:
        """Return actions (n, 2) for states (n, 5)."""
        return np.stack([self._act(row) for row in np.asarray(observation, np.float64)]).astype(np.float32)

    def _act(self, state: Array) -> Array:
        disc, angle = state[:2], float(state[4])
        target, lead = self._plan(_Frame(state[2:4] + _rotated(CENTRE, angle), angle), disc)
        way = target - disc
        action: Array = np.clip(disc + way * min(1.0, lead / (np.linalg.norm(way) + 1e-9)), 0, TABLE)
        return action

    def _plan(self, frame: _Frame, disc: Array) -> tuple[Array, float]:
        """Return the point to make for and how far ahead the target may be."""
        disc = frame.local(disc)
        goal = np.append(frame.local(GOAL_POSITION + _rotated(CENTRE, GOAL_ANGLE)), _wrapped(GOAL_ANGLE - frame.angle))
        error = float(_size(goal))
        smallest = min(6.0, 0.25 * error)

        # Pushes that begin elsewhere: every push and length has a cost; the best are kept, and the best of few lengths.
        travel, via = self._routes(frame, disc)
        approach = travel + PER_APPROACH * np.minimum(travel / 8, 1)
        cost = (approach[:, None] + self._length).ravel()
        rough = cost + _cost_to_go(_size(self._motion - goal)).ravel()
        rough[_size(self._motion).ravel() < smallest] = np.inf
        few = np.arange(rough.size).reshape(self._motion.shape[:2])[:, 3::6].ravel()
        kept = np.union1d(_smallest(rough, KEPT // 2), few[_smallest(rough[few], KEPT)])
        kept = kept[np.isfinite(rough[kept])]
        motions, costs = [self._motion.reshape(-1, 3)[kept]], [cost[kept]]
        near = [kept // len(self._length)]

        # Pushes from where the disc is.
        ends = self._start[:0]
        if _clearance(disc) < DISC_RADIUS + FAN_REACH:
            motion, way, ends = _fan(disc, self._aims, goal, far=error > CLOSE, smallest=min(smallest, 1.0))
            motions.append(motion)
            costs.append(way)
            near.append(np.full(len(way), ((self._start - disc) ** 2).sum(axis=1).argmin()))

        motion, total, nearest = np.concatenate(motions), np.concatenate(costs), np.concatenate(near)
        if len(motion) == 0:
            return frame.world(disc - _to_block(disc)), PUSH_LEAD
        remaining = _size(motion - goal)
        total += np.minimum(_cost_to_go(remaining), self._cost_of_second(frame, motion, goal, nearest))
        total += PER_WALL * np.maximum(_beyond_walls(frame, motion) - _beyond_walls(frame, np.zeros((1, 3))) - 0.5, 0)
        if error < CLOSE:  # every push must bring it closer, or it would for ever put off the one that is far
            total += NOT_CLOSER * (remaining > CLOSER * error)
        best = int(total.argmin())
        if best >= len(kept):
            return frame.world(ends[best - len(kept)]), PUSH_LEAD
        chosen, length = divmod(int(kept[best]), len(self._length))
        if travel[chosen] > 3:
            return frame.world(via[chosen]), TRAVEL_LEAD
        return frame.world(disc + self._direction[chosen] * self._length[length]), PUSH_LEAD

    def _routes(self, frame: _Frame, disc: Array) -> tuple[Array, Array]:
        """Return the way (P,) from the disc to where each push begins, around the block, and its first point (P, 2)."""
        usable = frame.on_table(self._corner)
        between = np.where(usable[:, None] & usable, self._between, np.inf)
        way = np.where(usable, _ways(disc[None], self._corner)[0], np.inf)
        first = np.arange(len(way))
        while True:
            over = way[:, None] + between
            previous = over.argmin(axis=0)
            shorter = over.min(axis=0) < way - 1e-9
            if not shorter.any():
                break
            first = np.where(shorter, first[previous], first)
            way = np.where(shorter, over.min(axis=0), way)
        direct = _ways(disc[None], self._start)[0]
        over = way[:, None] + self._to_start
        around = over.min(axis=0)
        straight = direct <= around
        via = np.where(straight[:, None], self._start, self._corner[first[over.argmin(axis=0)]])
        return np.where(frame.on_table(self._start), np.minimum(direct, around), np.inf), via

    def _cost_of_second(self, frame: _Frame, motion: Array, goal: Array, nearest: npt.NDArray[np.int64]) -> Array:
        """Return the cost (M,) of the best second push after `motion` (M, 3), from near the pushes `nearest` (M,)."""
        left = goal - motion
        shift = _rotated(left[:, :2], -motion[:, 2])
        aim = np.column_stack([shift, GYRATION * _wrapped(left[:, 2])]).astype(np.float32)
        square = (aim**2).sum(axis=1)[:, None] + (self._second_motion**2).sum(axis=0) - 2 * aim @ self._second_motion
        cost = _cost_to_go(np.sqrt(np.maximum(square, 0))) + self._second_length
        cost = cost.reshape(len(motion), FOLLOWING, FOLLOWING_LENGTHS).min(axis=2)
        moved = _rotated(self._second_start[None], motion[:, 2:]) + motion[:, None, :2]
        cost = np.where(frame.on_table(moved), cost + self._to_second[nearest], np.inf)
        best: Array = cost.min(axis=1) + PER_PUSH
        return best


class _Frame:
    """Where the block is."""

    def __init__(self, centre: Array, angle: float) -> None:
        self.centre, self.angle = centre, angle

    def local(self, point: Array) -> Array:
        return _rotated(point - self.centre, -self.angle)

    def world(self, point: Array) -> Array:
        return self.centre + _rotated(point, self.angle)

    def on_table(self, point: Array) -> npt.NDArray[np.bool_]:
        inside: npt.NDArray[np.bool_] = (np.abs(self.world(point) - TABLE / 2) < TABLE / 2 - EDGE).all(axis=-1)
        return inside


def push(start: Array, direction: Array, step: float, n: int) -> Array:
    """Return how the block moves when the disc moves straight: Chipmunk's contacts without friction, at full damping.

    Args:
        start: (M, 2) where the disc begins.
        direction: (M, 2) of length 1.
        step: how far it moves at a time.
        n: how often.

    Returns:
        (M, n, 3) x, y and angle of the block after each step. All in the block's frame at the beginning.
    """
    disc_x, disc_y = start.T.copy()
    step_x, step_y = step * direction.T
    x, y, angle = np.zeros((3, len(start)))
    left, top, right, bottom = RECTANGLES.T[:, :, None]
    motion = np.zeros((n, 3, len(start)))
    for k in range(n):
        cos, sin = np.cos(angle), np.sin(angle)
        dx, dy = disc_x - x, disc_y - y
        in_x, in_y = cos * dx + sin * dy, cos * dy - sin * dx
        at_x, at_y = np.clip(in_x, left, right), np.clip(in_y, top, bottom)  # (2, M): of each rectangle
        normal_x, normal_y = at_x - in_x, at_y - in_y
        gap = np.sqrt(normal_x**2 + normal_y**2) + 1e-9
        touching = gap < DISC_RADIUS
        if touching.any():
            normal_x, normal_y = normal_x / gap, normal_y / gap
            arm = (at_x * normal_y - at_y * normal_x) / GYRATION
            onward = (cos * step_x + sin * step_y) * normal_x + (cos * step_y - sin * step_x) * normal_y
            wanted = np.where(touching, onward + RECOVERY * np.maximum(DISC_RADIUS - gap - SLOP, 0), 0)
            impulse = np.maximum(wanted / (1 + arm**2), 0)
            if touching.all(axis=0).any():
                coupling = (normal_x[0] * normal_x[1] + normal_y[0] * normal_y[1] + arm[0] * arm[1]) * touching.all(0)
                for i in (0, 1) * 4:
                    impulse[i] = np.maximum((wanted[i] - coupling * impulse[1 - i]) / (1 + arm[i] ** 2), 0)
            impulse *= touching
            moved_x, moved_y = (impulse * normal_x).sum(axis=0), (impulse * normal_y).sum(axis=0)
            x, y = x + cos * moved_x - sin * moved_y, y + sin * moved_x + cos * moved_y
            angle = angle + (impulse * arm).sum(axis=0) / GYRATION
        disc_x, disc_y = disc_x + step_x, disc_y + step_y
        motion[k] = x, y, angle
    return motion.transpose(2, 0, 1)


def _fan(disc: Array, aims: Array, goal: Array, *, far: bool, smallest: float) -> tuple[Array, Array, Array]:
    """Return motions (M, 3), ways (M,) and ends (M, 2) of pushes from `disc`, of few lengths and of the best.

    Directions that are regular around the disc are others after its next step; those to points that stand still, `aims`
    (n, 2), let it go on as it began.
    """
    step, n = (3.0, 40) if far else (2.0, 24)
    x, y = _to_block(disc)
    around = np.arctan2(y, x) + np.linspace(-FAN_ANGLE, FAN_ANGLE, FAN)
    angle = np.concatenate([around, np.arctan2(*(aims - disc).T[::-1])])
    direction = np.column_stack([np.cos(angle), np.sin(angle)])
    motion = push(np.tile(disc, (len(angle), 1)), direction, step, n)
    way = np.broadcast_to(step * np.arange(1, n + 1), motion.shape[:2])
    wanted = np.zeros(motion.shape[:2], np.bool_)
    wanted[:, FAN_EVERY - 1 :: FAN_EVERY] = True
    wanted[np.arange(len(angle)), (way + _cost_to_go(_size(motion - goal))).argmin(axis=1)] = True
    wanted &= _size(motion) >= smallest
    ends = disc + direction[:, None] * way[..., None]
    return motion[wanted], way[wanted], ends[wanted]


def _size(motion: Array) -> Array:
    """Return how large motions or errors (..., 3) are, (...): the root mean square of the block's way, by mass."""
    size: Array = np.sqrt(motion[..., 0] ** 2 + motion[..., 1] ** 2 + (GYRATION * _wrapped(motion[..., 2])) ** 2)
    return size


def _cost_to_go(error: Array) -> Array:
    """Return about how long a way errors (...) still take: a large one must be moved, a small one halved and halved."""
    cost: Array = PER_ERROR * error + PER_HALVING / 2 * np.log1p((error / TOLERANCE) ** 2)
    return cost


def _beyond_walls(frame: _Frame, motion: Array) -> Array:
    """Return how far (M,) the block sticks out of the walls after motions (M, 3)."""
    corners = frame.world(_rotated(OUTLINE[None], motion[:, 2:]) + motion[:, None, :2])
    beyond: Array = np.maximum(np.abs(corners - TABLE / 2) - (TABLE / 2 - WALL), 0).max(axis=(1, 2))
    return beyond


def _offset_outline(distance: float, spacing: float) -> tuple[Array, Array]:
    """Return points (n, 2) around the block at `distance` from it, at least two a side, and their normals (n, 2)."""
    points, normals = [], []
    for before, corner, after in zip(OUTLINE, np.roll(OUTLINE, -1, 0), np.roll(OUTLINE, -2, 0), strict=True):
        length = float(np.linalg.norm(corner - before))
        along, turned = (corner - before) / length, (after - corner) / np.linalg.norm(after - corner)
        normal = np.array([along[1], -along[0]])
        n = max(int(length / spacing), 2)
        places = before + (np.arange(n)[:, None] + 0.5) / n * (corner - before)
        if along[0] * turned[1] > along[1] * turned[0]:
            directions = [_rotated(normal, part * np.pi / 2) for part in (0.25, 0.5, 0.75)]
            points.append(corner + distance * np.array(directions))
        else:  # into the corner between bar and stem
            inward = normal - along
            directions = [inward / np.sqrt(2)]
            points.append(corner + distance * inward[None])
        points.append(places + distance * normal)
        normals += [*directions, *([normal] * n)]
    point, normal = np.concatenate(points), np.array(normals)
    apart = _clearance(point) >= distance - 1e-6
    return point[apart], normal[apart]


def _clearance(point: Array) -> Array:
    """Return the distance (...) of points (..., 2) from the block."""
    clearance: Array = np.sqrt((_to_rectangles(point) ** 2).sum(axis=-1)).min(axis=0)
    return clearance


def _to_rectangles(point: Array) -> Array:
    """Return the shortest ways (2, ..., 2) from points (..., 2) to the block's rectangles."""
    return np.stack([np.clip(point, rectangle[:2], rectangle[2:]) - point for rectangle in RECTANGLES])


def _to_block(point: Array) -> Array:
    """Return the shortest way (2,) from a point to the block; from within, to its centre."""
    ways = _to_rectangles(point)
    way: Array = ways[(ways**2).sum(axis=1).argmin()]
    return way if way.any() else -point


def _ways(start: Array, end: Array) -> Array:
    """Return the distances (n, m) of points (n, 2) and (m, 2); infinite where the block is in the disc's way.

    A disc that touches the block at the beginning or at the end may be as near as it is there, if it goes away from it.
    """
    way = end - start[:, None]
    length = np.sqrt((way**2).sum(axis=-1))
    part = np.linspace(0.02, 1, 24)
    points = start[:, None, None] + way[:, :, None] * part[:, None]
    gone, left = 0.2 * length[..., None] * part, 0.2 * length[..., None] * (1 - part)
    needed = np.minimum(_clearance(start)[:, None, None] - 0.3 + gone, _clearance(end)[:, None] - 0.3 + left)
    free = (_clearance(points) >= np.minimum(needed, DISC_RADIUS + MARGIN)).all(axis=-1)
    return np.where(free, length, np.inf)


def _shortest(way: Array) -> Array:
    """Return the shortest ways (n, n) over any points, from the direct ones (Floyd and Warshall)."""
    for k in range(len(way)):
        way = np.minimum(way, way[:, k : k + 1] + way[k])
    return way


def _smallest(values: Array, n: int) -> npt.NDArray[np.int64]:
    """Return where the `n` smallest of (m,) are, in no order."""
    return np.argpartition(values, n)[:n]


def _rotated(vector: Array, angle: Array | float) -> Array:
    """Rotate vectors (..., 2) by angles (...)."""
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = vector[..., 0], vector[..., 1]
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)


def _wrapped(angle: Any) -> Any:
    """Return angles in [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi

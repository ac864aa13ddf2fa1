"""Refinement: render the objects at their estimated poses, compare, solve, and look again.

In every round all hypotheses that are left of all segments go through one pass of `refine_step`. Half of a
segment's hypotheses drop out each round: those whose rendering agrees least with the image. A hypothesis is
done when a step is smaller than its own uncertainty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from picopose_ros.errors import PicoPoseError
from picopose_ros.estimation.evidence import Weights
from picopose_ros.estimation.passes import Network
from picopose_ros.estimation.refine_step import RIM, Look, Step, refine_step
from picopose_ros.geometry.crops import CropBox
from picopose_ros.geometry.depth import reliable_depth
from picopose_ros.geometry.poses import rotation_angle_deg
from picopose_ros.model.fast import Prepared
from picopose_ros.templates.posed import PosedViews

_FURTHEST_DEG = 40.0
"""A step that turns the object further is a jump to another pose and isn't taken."""


_LEAST_OVERLAP = 0.1
"""Share of a segment that the object's silhouette covers, below which the two have nothing to do with each
other."""


@dataclass(frozen=True)
class Start:
    """A pose that refinement begins from.

    Attributes:
        T_cam_obj: (4, 4). value: how good it seems, to be compared within a segment.
    """

    T_cam_obj: np.ndarray
    value: float


@dataclass(frozen=True)
class Task:
    """What is to be refined of a segment.

    Attributes:
        class_id: of a bank.
        mask: (H, W) bool, the segment in the undistorted image; None: the object's silhouette is taken.
        starts: poses, at least one.
        features: of the segment's crop, where it was encoded before.
        box: of that crop, where it is not the one around the mask.
    """

    class_id: str
    mask: np.ndarray | None
    starts: tuple[Start, ...]
    features: Prepared | None = None
    box: CropBox | None = None


@dataclass(frozen=True)
class Refined:
    """The pose of a segment after refinement.

    Attributes:
        start: index of the start that it came from.
        step: the last one, with pose and covariance.
        rounds: that it took.
    """

    start: int
    step: Step
    rounds: int


def quality(step: Step) -> float:
    """How well a pose explains its segment, 0..1: what of the segment and of the silhouette has
    correspondences that agree, and how alike image and rendering are there."""
    return step.agreement * np.sqrt(step.covered * step.explained) * step.inlier_ratio


def refine_poses(
    network: Network,
    views: PosedViews,
    rgb: np.ndarray,
    K: np.ndarray,
    tasks: Sequence[Task],
    rounds: int,
    blacken: bool = True,
    weights: Weights | None = None,
    depth: np.ndarray | None = None,
) -> list[Refined | str]:
    """Refine poses in an image.

    In the first round the segment's mask is shown to the network, afterwards the object's silhouette.

    Args:
        network, views: of the same banks.
        rgb: (H, W, 3) uint8 of an undistorted camera. K: (3, 3).
        tasks: one per segment.
        rounds: most of them.
        blacken, weights: as of `refine_step`.
        depth: (H, W) m, of the same undistorted camera; 0 where there is none.

    Returns:
        Per task the result, or why there is none.
    """
    states = [_State(task) for task in tasks]
    depths = _Depths(depth)
    steps: dict[tuple[int, bytes], Step | str] = {}
    for number in range(rounds):
        wanted: dict[tuple[int, bytes], tuple[Task, np.ndarray]] = {}
        for state in states:
            for candidate in state.open(number):
                wanted[candidate.key] = state.task, candidate.T_cam_obj
        if not wanted:
            break
        wanted = {key: one for key, one in wanted.items() if key not in steps}
        steps.update(_steps(network, views, rgb, K, wanted, number, blacken, weights, depths))
        for state in states:
            state.take(steps, number)
    return [state.result() for state in states]


def _steps(
    network: Network,
    views: PosedViews,
    rgb: np.ndarray,
    K: np.ndarray,
    wanted: dict[tuple[int, bytes], tuple[Task, np.ndarray]],
    number: int,
    blacken: bool,
    weights: Weights | None,
    depths: _Depths,
) -> dict[tuple[int, bytes], Step | str]:
    """One round: a step for each pose, or why there is none."""
    found: dict[tuple[int, bytes], Step | str] = {}
    looks: dict[tuple[int, bytes], Look] = {}
    rendered = views.render([(task.class_id, T) for task, T in wanted.values()])
    height, width = rgb.shape[:2]
    for (key, (task, T)), view in zip(wanted.items(), rendered):
        mask = task.mask
        if isinstance(view, PicoPoseError):
            found[key] = str(view)
            continue
        silhouette = view.silhouette(K, height, width)
        if mask is not None and (mask & silhouette).sum() < _LEAST_OVERLAP * mask.sum():
            found[key] = "the segment is in another place than the object at its pose"
            continue
        given = mask is not None and number == 0
        shown = mask if given else silhouette
        looks[key] = Look(
            view,
            T,
            shown,
            mask,
            depth=depths.of(mask),
            features=task.features if given else None,
            box=task.box if given else None,
            rim=0.0 if given else RIM,
        )
    for key, step in zip(looks, refine_step(network, rgb, K, list(looks.values()), blacken, weights)):
        if step is None:
            found[key] = "rendering and image have no correspondences that fix a pose"
        elif rotation_angle_deg(step.T_cam_obj[:3, :3], looks[key].T_cam_obj[:3, :3]) > _FURTHEST_DEG:
            found[key] = "the step would turn the object to another pose"
        else:
            found[key] = step
    return found


class _Depths:
    """What of a depth image is believed of each mask, worked out once."""

    def __init__(self, depth: np.ndarray | None) -> None:
        self._depth = depth
        self._made: dict[int, np.ndarray] = {}

    def of(self, mask: np.ndarray | None) -> np.ndarray | None:
        """See `reliable_depth`; None without a depth image."""
        if self._depth is None:
            return None
        if id(mask) not in self._made:
            self._made[id(mask)] = reliable_depth(self._depth, mask)
        return self._made[id(mask)]


@dataclass(frozen=True)
class _Candidate:
    start: int
    T_cam_obj: np.ndarray
    mask: int
    step: Step | None = None
    rounds: int = 0
    done: bool = False

    @property
    def key(self) -> tuple[int, bytes]:
        """Of a step from here: the same for the same mask and pose."""
        return self.mask, self.T_cam_obj.tobytes()


class _State:
    """The hypotheses of a task that are left."""

    def __init__(self, task: Task) -> None:
        self.task = task
        order = sorted(range(len(task.starts)), key=lambda i: -task.starts[i].value)
        self._left = [_Candidate(i, task.starts[i].T_cam_obj, id(task.mask)) for i in order]
        self._begun = len(order)
        self._reason = "there is no pose to refine"

    def open(self, number: int) -> list[_Candidate]:
        """Those that a round is for."""
        keep = max(-(-self._begun // 2 ** (number + 1)), 1)
        self._left = self._left[:keep]
        return [one for one in self._left if not one.done]

    def take(self, steps: dict[tuple[int, bytes], Step | str], number: int) -> None:
        """Go where the steps lead; the best first."""
        after = []
        for one in self._left:
            step = None if one.done else steps[one.key]
            if isinstance(step, Step):
                done = step.moved < 1.0
                after.append(_Candidate(one.start, step.T_cam_obj, one.mask, step, number + 1, done))
            elif one.step is not None:  # what it has is kept
                after.append(_Candidate(one.start, one.T_cam_obj, one.mask, one.step, one.rounds, True))
            elif step is not None:
                self._reason = step
        self._left = sorted(after, key=lambda one: -quality(one.step))

    def result(self) -> Refined | str:
        """The best of those left, or why there is none."""
        if not self._left or self._left[0].step is None:
            return self._reason
        best = self._left[0]
        return Refined(best.start, best.step, best.rounds)

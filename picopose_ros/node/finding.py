"""The action ``~/find_object``: waits until an object is seen well enough."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.action.server import ServerGoalHandle
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.node import Node
from std_msgs.msg import Header

from picopose_ros.action import FindObject
from picopose_ros.geometry.poses import rotation_angle_deg
from picopose_ros.instances import NamedPose
from picopose_ros.node.conversions import detections_message

MOST_GOALS = 2
"""Goals at once: each takes a thread of the executor."""

_AGREE_DEG = 10.0
_AGREE_SHARE = 0.1
"""Poses in a row agree up to this turn, and this share of the longest side of the object's box."""

_GLANCE = 0.1
"""Seconds between looks at whether a goal was cancelled or its time is over."""


@dataclass(frozen=True)
class Seen:
    """What a search has seen so far.

    Attributes:
        answers: of the node. candidates: of the last answer. best: highest score among these.
        agreeing: answers in a row in which the leader's poses agreed; 0 without one.
        leader: the candidate that agreed in the most answers, then that of the best score; or None.
        header: of the last answer.
    """

    answers: int = 0
    candidates: int = 0
    best: float = 0.0
    agreeing: int = 0
    leader: NamedPose | None = None
    header: Header | None = None


class Search:
    """Looks for an object in the node's answers.

    Args:
        class_id: of the object. min_score: of poses that count. frames: that must agree in a row.
    """

    def __init__(self, class_id: str, min_score: float, frames: int) -> None:
        self.class_id, self.min_score, self.frames = class_id, min_score, max(frames, 1)
        self._changed = threading.Condition()
        self._fresh = False
        self._seen = Seen()
        self._rows: dict[str, tuple[int, NamedPose, np.ndarray]] = {}

    def see(
        self, named: Sequence[NamedPose], header: Header, T_fixed_cam: np.ndarray | None = None
    ) -> None:
        """Take an answer of the node; for any thread.

        Args:
            named: the poses. header: of the image.
            T_fixed_cam: (4, 4) camera -> a frame that stands still, where that is known.
        """
        own = [one for one in named if one.pose.class_id == self.class_id]
        with self._changed:
            before, self._rows = self._rows, {}
            for one in own:
                if one.pose.confidence < self.min_score:
                    continue
                T = one.pose.T_cam_obj if T_fixed_cam is None else T_fixed_cam @ one.pose.T_cam_obj
                count, _, last = before.get(one.name, (0, one, T))
                self._rows[one.name] = (count + 1 if _agree(last, T, one) else 1), one, T
            rows = self._rows.values()
            leader = max(rows, key=lambda row: (row[0], row[1].pose.confidence), default=None)
            self._seen = Seen(
                self._seen.answers + 1,
                len(own),
                max((one.pose.confidence for one in own), default=0.0),
                leader[0] if leader else 0,
                leader[1] if leader else None,
                header,
            )
            self._fresh = True
            self._changed.notify_all()

    def look(self, seconds: float) -> tuple[Seen, bool]:
        """What was seen so far, and whether that is news; waits for news for some seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._fresh, seconds)
            fresh, self._fresh = self._fresh, False
            return self._seen, fresh

    def found(self, seen: Seen) -> bool:
        """Whether that is enough."""
        return seen.agreeing >= self.frames


def _agree(before: np.ndarray, now: np.ndarray, one: NamedPose) -> bool:
    middle = np.r_[one.pose.bbox_centre, 1.0]
    near = np.linalg.norm((now - before) @ middle) <= _AGREE_SHARE * one.pose.bbox_size.max()
    return bool(near and rotation_angle_deg(before[:3, :3], now[:3, :3]) <= _AGREE_DEG)


class Finding:
    """Serves ``~/find_object`` from what the node publishes.

    Args:
        node: owner of the action; its executor needs `MOST_GOALS` more threads.
        class_of: class of an object by that or an alias; None for what is not loaded.
        state: label of the life cycle's state.
    """

    def __init__(self, node: Node, class_of: Callable[[str], str | None], state: Callable[[], str]) -> None:
        self._node, self._class_of, self._state = node, class_of, state
        self._lock = threading.Lock()
        self._accepted = 0
        self._searches: list[Search] = []
        self._server = ActionServer(
            node,
            FindObject,
            "~/find_object",
            self._execute,
            callback_group=ReentrantCallbackGroup(),
            goal_callback=self._judge_goal,
            cancel_callback=lambda goal: CancelResponse.ACCEPT,
        )

    @property
    def busy(self) -> bool:
        """Whether a search is under way."""
        with self._lock:
            return bool(self._searches)

    def see(
        self, named: Sequence[NamedPose], header: Header, T_fixed_cam: np.ndarray | None = None
    ) -> None:
        """Told of every answer, see `Search.see`; for any thread."""
        with self._lock:
            searches = list(self._searches)
        for search in searches:
            search.see(named, header, T_fixed_cam)

    def close(self) -> None:
        """Serve no more."""
        self._server.destroy()

    def _judge_goal(self, goal: FindObject.Goal) -> GoalResponse:
        with self._lock:
            reason = self._refusal(goal)
            if not reason:
                self._accepted += 1
                return GoalResponse.ACCEPT
        self._node.get_logger().warning(f"find_object: a goal is refused: {reason}")
        return GoalResponse.REJECT

    def _refusal(self, goal: FindObject.Goal) -> str:
        """Why a goal is not taken; empty if it is."""
        if self._state() != "active":
            return f"the node is {self._state()}, not active"
        if self._class_of(goal.class_id) is None:
            return f"no object is called '{goal.class_id}'"
        if not 0.0 <= goal.min_score <= 1.0:
            return f"min_score is {goal.min_score:g}: give 0 to 1"
        if goal.timeout.sec < 0:
            return f"timeout is {goal.timeout.sec} s: give 0 for no end, or more"
        if self._accepted >= MOST_GOALS:
            return f"{MOST_GOALS} searches are under way already: cancel one"
        return ""

    def _execute(self, handle: ServerGoalHandle) -> FindObject.Result:
        goal = handle.request
        search = Search(self._class_of(goal.class_id) or goal.class_id, goal.min_score, goal.frames)
        with self._lock:
            self._searches.append(search)
        try:
            return self._search(handle, search, goal.timeout.sec + 1e-9 * goal.timeout.nanosec)
        finally:
            with self._lock:
                self._searches.remove(search)
                self._accepted -= 1

    def _search(self, handle: ServerGoalHandle, search: Search, timeout: float) -> FindObject.Result:
        deadline = time.monotonic() + timeout if timeout > 0 else np.inf
        while True:
            seen, fresh = search.look(_GLANCE)
            if handle.is_cancel_requested:
                handle.canceled()
                return FindObject.Result(status=f"cancelled: {_told(search, seen)}")
            if fresh:
                handle.publish_feedback(
                    FindObject.Feedback(
                        candidates=seen.candidates, score=float(seen.best), agreeing=seen.agreeing
                    )
                )
            if search.found(seen):
                handle.succeed()
                return _result(seen)
            over = ""
            if self._state() != "active":
                over = f"the node is {self._state()}"
            elif time.monotonic() > deadline:
                over = f"not found in {timeout:g} s"
            if over:
                handle.abort()
                return FindObject.Result(status=f"{over}: {_told(search, seen)}")


def _told(search: Search, seen: Seen) -> str:
    if not seen.answers:
        return "the node answered no image meanwhile: are there images and masks?"
    return (
        f"the last of {seen.answers} answers has {seen.candidates} of '{search.class_id}', the best score is "
        f"{seen.best:.2f} (least: {search.min_score:.2f}), {seen.agreeing} of {search.frames} agree"
    )


def _result(seen: Seen) -> FindObject.Result:
    one = seen.leader
    (detection,) = detections_message([one.pose], [one.name], seen.header).detections
    return FindObject.Result(
        success=True,
        status=f"found {one.name}: {seen.agreeing} answers agree",
        id=one.name,
        score=float(one.pose.confidence),
        header=seen.header,
        pose=detection.results[0].pose,
    )

"""Where a moving camera is at a stamp that nobody has told of: its last known motion goes on."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from picopose_ros.geometry.poses import invert_transform, make_transform

_HORIZON = 5.0
"""For how many times its length a motion is believed to go on."""


class CameraMotion:
    """The two newest known poses of a camera, and the motion between them.

    Stamps are seconds. T_fixed_cam (4, 4) is the camera's pose in a frame that stands still.
    """

    def __init__(self) -> None:
        self._known: list[tuple[float, np.ndarray]] = []

    def clear(self) -> None:
        """Forget everything."""
        self._known = []

    def know(self, stamp: float, T_fixed_cam: np.ndarray) -> None:
        """Take a known pose; one that is older than the newest changes nothing."""
        if not self._known or stamp > self._known[-1][0]:
            self._known = [*self._known[-1:], (stamp, T_fixed_cam)]

    def at(self, stamp: float) -> np.ndarray | None:
        """T_fixed_cam at a stamp: the newest known, moved on at constant velocity; None if none is known.

        It is moved on for no longer than five times what the two newest are apart: the motion may have ended.
        """
        if not self._known:
            return None
        newest, T = self._known[-1]
        if len(self._known) < 2:
            return T
        before, T_before = self._known[0]
        share = float(np.clip((stamp - newest) / (newest - before), -_HORIZON, _HORIZON))
        step = invert_transform(T_before) @ T
        turn = Rotation.from_rotvec(share * Rotation.from_matrix(step[:3, :3]).as_rotvec())
        return T @ make_transform(turn.as_matrix(), share * step[:3, 3])

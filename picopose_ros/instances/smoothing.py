"""Steadier poses without waiting for later frames: a filter that follows a steady motion without lag."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from scipy.spatial.transform import Rotation

from picopose_ros.errors import ConfigError
from picopose_ros.geometry.poses import make_transform


@dataclass(frozen=True)
class SmoothingSettings:
    """How much the poses of an instance are smoothed over time.

    Attributes:
        translation, rotation: seconds over which they are averaged; 0 leaves them as they are.
        jump_distance: a pose this far (m) from where the filter expects it starts the filter anew.
        jump_deg: the same for the rotation, degrees.

    Raises:
        ConfigError: a value that isn't a number, negative, or a jump of 0.
    """

    translation: float = 0.0
    rotation: float = 0.0
    jump_distance: float = 0.05
    jump_deg: float = 20.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, zero_allowed = getattr(self, field.name), not field.name.startswith("jump")
            if not (value > 0 or (zero_allowed and value == 0)):
                need = "0 or more" if zero_allowed else "more than 0"
                raise ConfigError(f"smoothing: {field.name} is {value}, it must be {need}")

    @property
    def enabled(self) -> bool:
        """Whether anything is smoothed."""
        return self.translation > 0 or self.rotation > 0


class PoseFilter:
    """The state of one instance's filter: pose and velocity, both with a fading memory of the past.

    It is the fading-memory filter of first order (Morrison 1969; a critically damped alpha-beta filter) for
    the object's centre and, in the tangent space, for its rotation. Every pose is answered at once, and a
    steady velocity is followed without lag. After a start the memory grows from nothing, so the first poses
    come out as they are.

    Args:
        centre: (3,) point in the object's frame whose path is smoothed. The origin of a mesh may lie far off
            and swing with every error of the rotation; the middle of the object doesn't.
    """

    def __init__(self, centre: np.ndarray) -> None:
        self._centre = np.asarray(centre, np.float64)
        self._count = 0
        self._stamp = 0.0
        self._position = np.zeros(3)
        self._velocity = np.zeros(3)  # m/s
        self._rotation = np.eye(3)
        self._spin = np.zeros(3)  # rad/s about the camera's axes

    def update(self, stamp: float, T_cam_obj: np.ndarray, settings: SmoothingSettings) -> np.ndarray:
        """The smoothed pose (4, 4) for a pose (4, 4) seen at ``stamp`` (s).

        What isn't newer than the last pose comes back as it is and changes nothing.
        """
        T = np.asarray(T_cam_obj, np.float64)
        position, rotation = T[:3, :3] @ self._centre + T[:3, 3], T[:3, :3]
        step = stamp - self._stamp
        if self._count and step <= 0:
            return T
        if self._count:
            expected = self._position + step * self._velocity
            turned = Rotation.from_rotvec(step * self._spin).as_matrix() @ self._rotation
            off = position - expected
            twist = Rotation.from_matrix(rotation @ turned.T).as_rotvec()
            jumped = (settings.translation > 0 and np.linalg.norm(off) > settings.jump_distance) or (
                settings.rotation > 0 and np.linalg.norm(twist) > np.radians(settings.jump_deg)
            )
        if not self._count or jumped:
            self._count = 1
            self._position, self._rotation = position, rotation
            self._velocity, self._spin = np.zeros(3), np.zeros(3)
        else:
            self._count += 1
            gain, follow = _gains(self._count, step, settings.translation)
            self._position = expected + gain * off
            self._velocity = self._velocity + follow / step * off
            gain, follow = _gains(self._count, step, settings.rotation)
            self._rotation = Rotation.from_rotvec(gain * twist).as_matrix() @ turned
            self._spin = self._spin + follow / step * twist
        self._stamp = stamp
        return make_transform(self._rotation, self._position - self._rotation @ self._centre)

    def move(self, T_new_old: np.ndarray) -> None:
        """Go over to another camera frame: (4, 4) old camera -> new camera."""
        R = T_new_old[:3, :3]
        self._position = R @ self._position + T_new_old[:3, 3]
        self._rotation = R @ self._rotation
        self._velocity, self._spin = R @ self._velocity, R @ self._spin


def _gains(count: int, step: float, memory: float) -> tuple[float, float]:
    """Shares of the surprise that go into the value and, times the step, into its velocity."""
    theta = np.exp(-step / memory) if memory > 0 else 0.0
    # A memory that isn't full yet: least squares over the poses since the start.
    growing = 2 * (2 * count - 1) / (count * (count + 1)), 6 / (count * (count + 1))
    return max(1 - theta**2, growing[0]), max((1 - theta) ** 2, growing[1])

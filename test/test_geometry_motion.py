"""The motion of a camera where TF is late, and the names of instances that hang on it."""

from __future__ import annotations

import numpy as np
import trimesh

from picopose_ros.geometry.motion import CameraMotion


def swing(stamp: float) -> np.ndarray:
    """A camera that turns at 2 rad/s about its own y axis and moves along x at 1 m/s."""
    T = trimesh.transformations.rotation_matrix(2.0 * stamp, [0, 1, 0])
    T[:3, 3] = stamp, 0.0, 0.0
    return T


def test_nothing_is_known_of_a_camera_that_was_never_told_of() -> None:
    motion = CameraMotion()
    assert motion.at(1.0) is None
    motion.know(1.0, swing(1.0))
    np.testing.assert_array_equal(motion.at(5.0), swing(1.0))
    motion.clear()
    assert motion.at(1.0) is None


def test_a_steady_motion_goes_on_for_a_while() -> None:
    straight = [np.eye(4) for _ in range(3)]
    for index, T in enumerate(straight):
        T[:3, 3] = 0.1 * index, 0.0, 0.0
    motion = CameraMotion()
    motion.know(0.0, straight[0])
    motion.know(0.1, straight[1])
    motion.know(0.05, straight[2])  # late: older than the newest
    np.testing.assert_allclose(motion.at(0.1), straight[1], atol=1e-12)
    np.testing.assert_allclose(motion.at(0.2), straight[2], atol=1e-12)
    np.testing.assert_allclose(motion.at(0.35)[:3, 3], [0.35, 0, 0], atol=1e-12)
    np.testing.assert_allclose(motion.at(9.0)[:3, 3], [0.6, 0, 0], atol=1e-12)

    turning = CameraMotion()
    turning.know(0.0, swing(0.0))
    turning.know(0.1, swing(0.1))
    np.testing.assert_allclose(turning.at(0.2)[:3, :3], swing(0.2)[:3, :3], atol=1e-9)
    assert np.linalg.norm(turning.at(0.2)[:3, 3] - swing(0.2)[:3, 3]) < 0.03

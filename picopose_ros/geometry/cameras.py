"""Pinhole cameras with the lens distortion models of ROS's CameraInfo."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from picopose_ros.errors import CameraError

# Number of coefficients each model of CameraInfo may come with; "" is a rectified image. plumb_bob and
# rational_polynomial are one formula, whose missing coefficients are zero: like image_geometry, this takes
# either name with any of OpenCV's lengths.
_OPENCV_LENGTHS = (4, 5, 8, 12, 14)
_COEFFICIENTS = {
    "": (),
    "plumb_bob": _OPENCV_LENGTHS,
    "rational_polynomial": _OPENCV_LENGTHS,
    "equidistant": (4,),
}

_RECTIFIED_NAME = re.compile(r"(^|_)(rect|rectified)(_|$)")
_TRANSPORTS = frozenset({"compressed", "compressedDepth", "theora", "zstd", "ffmpeg"})

_NEWTON_STEPS = 30
_EXACT_PX = 1e-7
_CONVERGED_PX = 1e-3


def is_rectified_topic(topic: str) -> bool:
    """Whether the name of an image topic says that its images are rectified.

    image_proc and the camera drivers that follow it say so by ``rect`` in the last part of the name
    (``image_rect``, ``image_rect_color``, ``image_rect_raw``, ``image_rectified``); a transport behind it
    (``image_rect/compressed``) changes nothing.
    """
    parts = [part for part in topic.split("/") if part]
    if len(parts) > 1 and parts[-1] in _TRANSPORTS:
        parts.pop()
    return bool(parts) and _RECTIFIED_NAME.search(parts[-1]) is not None


@dataclass(frozen=True)
class CameraModel:
    """Intrinsics of one camera.

    Attributes:
        K: (3, 3) float64 intrinsic matrix in pixels; pixel centres at whole numbers.
        width: image width in pixels.
        height: image height in pixels.
        distortion_model: "" (none), "plumb_bob", "rational_polynomial" or "equidistant", as in CameraInfo.
        D: its coefficients in OpenCV's order; empty or all zero means no distortion.
    """

    K: np.ndarray
    width: int
    height: int
    distortion_model: str = ""
    D: tuple[float, ...] = field(default=())

    def __post_init__(self) -> None:
        try:
            K = np.array(self.K, np.float64).reshape(3, 3)
            D = tuple(float(d) for d in self.D)
        except (TypeError, ValueError) as error:
            raise CameraError(f"camera: K must hold 9 numbers and D a list of numbers ({error})") from error
        K.flags.writeable = False
        object.__setattr__(self, "K", K)
        object.__setattr__(self, "D", D)

    @property
    def distorted(self) -> bool:
        """Whether pixels must be undistorted before K alone describes them."""
        return any(self.D)

    def validate(self) -> None:
        """Check that poses can be computed with this camera.

        Raises:
            CameraError: K or D holds NaN or infinity, a focal length isn't positive (an uncalibrated camera
                sends zeros), the image has no size, or the distortion model is unknown or has a wrong number
                of coefficients.
        """
        K = self.K
        if not np.isfinite(K).all():
            raise CameraError(f"camera: K holds NaN or infinity ({K.ravel().tolist()}); calibrate the camera")
        if K[0, 0] <= 0 or K[1, 1] <= 0:
            raise CameraError(
                f"camera: focal lengths are {K[0, 0]:g} and {K[1, 1]:g} px, they must be positive; "
                "an uncalibrated driver sends zeros: calibrate the camera or load its calibration file"
            )
        if K[0, 1] != 0 or K[1, 0] != 0 or not np.array_equal(K[2], [0, 0, 1]):
            raise CameraError(f"camera: K must look like [fx 0 cx; 0 fy cy; 0 0 1], got {K.ravel().tolist()}")
        if self.width <= 0 or self.height <= 0:
            raise CameraError(f"camera: the image size is {self.width}x{self.height}")
        if not np.isfinite(self.D).all():
            raise CameraError(f"camera: D holds NaN or infinity ({list(self.D)}); calibrate the camera")
        if not self.distorted:
            return
        if self.distortion_model not in _COEFFICIENTS:
            known = ", ".join(name for name in _COEFFICIENTS if name)
            raise CameraError(
                f"camera: distortion model {self.distortion_model!r} is unknown "
                f"(known: {known}); rectify the images"
            )
        if len(self.D) not in _COEFFICIENTS[self.distortion_model]:
            counts = " or ".join(map(str, _COEFFICIENTS[self.distortion_model])) or "none"
            name = self.distortion_model or "no distortion model"
            raise CameraError(f"camera: {name} with {len(self.D)} coefficients; it takes {counts}")

    def project(self, xyz: np.ndarray) -> np.ndarray:
        """Camera-frame points (n, 3) in metres -> pixels (n, 2) of the image as it is, lens included."""
        xyz = np.asarray(xyz, np.float64).reshape(-1, 3)
        return self._distort(xyz[:, :2] / xyz[:, 2:])

    def undistort_points(self, uv: np.ndarray) -> np.ndarray:
        """Pixels (n, 2) of the image as it is -> pixels (n, 2) float64 that K alone describes.

        Rows where the distortion model can't be inverted (far outside the calibrated image) become NaN.
        """
        uv = np.asarray(uv, np.float64).reshape(-1, 2)
        if not self.distorted or len(uv) == 0:
            return uv.copy()
        inverse = np.linalg.inv(self.K)
        # Newton on the forward model: OpenCV's own inverse stops after a few fixed-point steps, which strong
        # lenses don't converge in, and its interface differs between OpenCV 4 and 5.
        xy = uv @ inverse[:2, :2].T + inverse[:2, 2]
        if self.distortion_model == "equidistant":
            # The image radius is about the angle, which is what the start must undo for wide angles.
            angle = np.linalg.norm(xy, axis=1, keepdims=True)
            xy = xy * np.where(angle > 1e-9, np.tan(np.minimum(angle, 1.5)) / np.maximum(angle, 1e-9), 1.0)
        active = np.arange(len(uv))
        with np.errstate(all="ignore"):
            for _ in range(_NEWTON_STEPS):
                error = self._distort(xy[active]) - uv[active]
                far = np.abs(error).max(1) > _EXACT_PX
                active, error = active[far], error[far]
                if not len(active):
                    break
                dx, dy, det = self._derivatives(xy[active])
                step = [
                    dy[:, 1] * error[:, 0] - dy[:, 0] * error[:, 1],
                    dx[:, 0] * error[:, 1] - dx[:, 1] * error[:, 0],
                ]
                xy[active] -= np.stack(step, -1) / det[:, None]
            _, _, det = self._derivatives(xy)
            # A polynomial folds back outside the calibrated image: a solution there, or on the far side of
            # the axis, reproduces the pixel but isn't where the light came from.
            same_side = (xy * (uv - [self.K[0, 2], self.K[1, 2]])).sum(1) > -0.1
            good = (np.abs(self._distort(xy) - uv).max(1) < _CONVERGED_PX) & (det > 0) & same_side
        xy[~good] = np.nan
        return xy @ self.K[:2, :2].T + self.K[:2, 2]

    def _derivatives(self, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """d pixel / dx, d pixel / dy (n, 2) and their determinant (n,) at normalised points (n, 2)."""
        step = 1e-6
        dx = (self._distort(xy + [step, 0]) - self._distort(xy - [step, 0])) / (2 * step)
        dy = (self._distort(xy + [0, step]) - self._distort(xy - [0, step])) / (2 * step)
        return dx, dy, dx[:, 0] * dy[:, 1] - dy[:, 0] * dx[:, 1]

    def _distort(self, xy: np.ndarray) -> np.ndarray:
        """Normalised image points (n, 2) at depth 1 -> pixels (n, 2)."""
        if not self.distorted or len(xy) == 0:
            return xy @ self.K[:2, :2].T + self.K[:2, 2]
        x, y = xy.T
        r2 = x * x + y * y
        if self.distortion_model == "equidistant":
            r = np.sqrt(r2)
            theta = np.arctan(r)
            k1, k2, k3, k4 = self.D
            t2 = theta * theta
            bent = theta * (1 + t2 * (k1 + t2 * (k2 + t2 * (k3 + t2 * k4))))
            factor = np.where(r > 1e-8, bent / np.maximum(r, 1e-8), 1.0)
            distorted = xy * factor[:, None]
        elif len(self.D) == 14 and any(self.D[12:]):  # a tilted sensor: rare enough to leave to OpenCV
            points = np.concatenate([xy, np.ones((len(xy), 1))], 1)
            return cv2.projectPoints(points, np.zeros(3), np.zeros(3), self.K, np.array(self.D))[0][:, 0]
        else:
            k1, k2, p1, p2, k3, k4, k5, k6, s1, s2, s3, s4 = (*self.D, *(0.0,) * 12)[:12]
            radial = (1 + r2 * (k1 + r2 * (k2 + r2 * k3))) / (1 + r2 * (k4 + r2 * (k5 + r2 * k6)))
            distorted = np.stack(
                [
                    x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x) + r2 * (s1 + r2 * s2),
                    y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y + r2 * (s3 + r2 * s4),
                ],
                -1,
            )
        return distorted @ self.K[:2, :2].T + self.K[:2, 2]

    @classmethod
    def from_camera_info(cls, info: Any, rectified: bool = False) -> CameraModel:
        """The camera of the image that a ``sensor_msgs/CameraInfo`` came with, and check it.

        K and P of a CameraInfo are of the full resolution; the image may be a part of it (``roi``) and
        binned. As in ROS's image_geometry the principal point is moved by the offset first and then all is
        divided by the binning, without half a pixel of correction; no ``roi`` (all zero) is the whole image,
        no binning (0) is 1.

        Args:
            info: of rclpy, of rosbags, or anything else with the fields of the message.
            rectified: the image is rectified (see `is_rectified_topic`). Then P describes it, and D and R do
                not: points are those of the rectified camera's frame, whose origin is the optical centre of
                this camera. The fourth column of P, which puts the second camera of a stereo pair into the
                frame of the first, is not used.

        Raises:
            CameraError: it can't be used: no calibration, an unknown distortion model, a roi outside the
                image.
        """
        width, height = int(info.width), int(info.height)
        K, D = np.array(info.k, np.float64).reshape(3, 3), tuple(float(value) for value in info.d)
        model = str(info.distortion_model)
        if rectified:
            P = np.array(info.p, np.float64).reshape(3, 4)
            if P.any():
                K = P[:, :3].copy()
            elif any(D):
                raise CameraError(
                    "camera: the images are rectified, but P is zero: let the driver fill in P, or take the "
                    "raw images"
                )
            model, D = "", ()
        left, top, part_width, part_height = (
            int(value) for value in (info.roi.x_offset, info.roi.y_offset, info.roi.width, info.roi.height)
        )
        if not (left or top or part_width or part_height):
            part_width, part_height = width, height
        elif part_width == 0 or part_height == 0 or left + part_width > width or top + part_height > height:
            raise CameraError(
                f"camera: its roi ({left}, {top}, {part_width}x{part_height}) is empty or leaves the image "
                f"of {width}x{height} pixels; roi, width and height must be of the full resolution"
            )
        bins = np.array([max(int(info.binning_x), 1), max(int(info.binning_y), 1)])
        K[:2, 2] -= left, top
        K[:2] /= bins[:, None]
        camera = cls(K, part_width // int(bins[0]), part_height // int(bins[1]), model, D)
        camera.validate()
        return camera

    def to_dict(self) -> dict[str, Any]:
        """In plain types, as ``picopose estimate --camera`` reads it from a JSON file."""
        return {
            "K": self.K.ravel().tolist(),
            "width": self.width,
            "height": self.height,
            "distortion_model": self.distortion_model,
            "D": list(self.D),
        }

"""``sensor_msgs/Image`` and ``CompressedImage`` to NumPy. Needs no ROS: any object with the message's fields
will do."""

from __future__ import annotations

import importlib
import re
from typing import Any

import cv2
import numpy as np

from picopose_ros.errors import ImageError

_CHANNELS = {
    "rgb8": 3,
    "bgr8": 3,
    "rgba8": 4,
    "bgra8": 4,
    "mono8": 1,
    "bayer_rggb8": 1,
    "bayer_bggr8": 1,
    "bayer_gbrg8": 1,
    "bayer_grbg8": 1,
}
_WIDE_CHANNELS = {
    name.removesuffix("8") + "16": count for name, count in _CHANNELS.items()
}  # 16 bits per value

# ROS names a Bayer pattern by its first row's first two pixels; OpenCV by the second row's second and third.
_BAYER_CODES = {
    "bayer_rggb": cv2.COLOR_BayerBG2RGB,
    "bayer_bggr": cv2.COLOR_BayerRG2RGB,
    "bayer_gbrg": cv2.COLOR_BayerGR2RGB,
    "bayer_grbg": cv2.COLOR_BayerGB2RGB,
}

NATIVE_ENCODINGS = (*_CHANNELS, *_WIDE_CHANNELS)
"""Encodings that are converted here; anything else goes through cv_bridge where it is installed."""

_DEPTHS = (8, 10, 12, 14, 16)


class BitDepth:
    """How many bits of 16 a camera uses: sensors of 10, 12 or 14 bits mostly leave the highest ones zero.

    That is known from the values alone, so it is the smallest usual depth that holds all that were seen. One
    such object is shared by the images of one camera, so that their brightness doesn't depend on the scene.

    Attributes:
        bits: 8, 10, 12, 14 or 16.
    """

    def __init__(self) -> None:
        self.bits = _DEPTHS[0]

    def to_8_bits(self, pixels: np.ndarray) -> np.ndarray:
        """16-bit pixels of any shape as uint8, scaled by the depth that these and earlier ones have."""
        needed = int(pixels.max(initial=0)).bit_length()
        self.bits = max(self.bits, next(depth for depth in _DEPTHS if depth >= needed))
        return (pixels >> (self.bits - 8)).astype(np.uint8)


def image_to_rgb(message: Any, topic: str, depth: BitDepth | None = None) -> np.ndarray:
    """Pixels of an Image message as RGB.

    Encodings of 8 bits, but for the Bayer ones, give a view of the message's data, possibly with strides;
    nothing is copied.

    Args:
        message: a ``sensor_msgs/Image``.
        topic: where it came from, for the error messages.
        depth: of the camera's 16-bit images so far; None to know of this image alone.

    Returns:
        (H, W, 3) uint8, not writeable where it is a view of the message.

    Raises:
        ImageError: no pixels, fewer bytes than height and step promise, or an encoding nobody here can read.
    """
    encoding, height, width = message.encoding, int(message.height), int(message.width)
    if height == 0 or width == 0:
        raise ImageError(f"image on {topic} has {width}x{height} pixels: check the camera driver")
    if encoding in _WIDE_CHANNELS:
        channels = _WIDE_CHANNELS[encoding]
        rows = np.ascontiguousarray(_rows(message, topic, 2 * channels))
        wide = rows.view(">u2" if message.is_bigendian else "<u2")
        pixels = (depth or BitDepth()).to_8_bits(wide).reshape(height, width, channels)
    elif encoding in _CHANNELS:
        channels = _CHANNELS[encoding]
        pixels = _rows(message, topic, channels).reshape(height, width, channels)
    else:
        return _through_cv_bridge(message, topic)

    if encoding.startswith("bayer"):
        if height < 2 or width < 2:
            raise ImageError(f"image on {topic} has {width}x{height} pixels, too few for a Bayer pattern")
        return cv2.cvtColor(np.ascontiguousarray(pixels[:, :, 0]), _bayer_code(encoding))
    if channels == 1:
        return np.broadcast_to(pixels, (height, width, 3))
    if encoding.startswith("bgr"):
        return pixels[:, :, 2::-1]
    return pixels[:, :, :3]


def compressed_to_rgb(message: Any, topic: str, depth: BitDepth | None = None) -> np.ndarray:
    """Pixels of a CompressedImage message as RGB.

    Args:
        message: a ``sensor_msgs/CompressedImage``: JPEG, PNG or whatever else OpenCV reads. What ``format``
            says before its semicolon is the encoding of the pixels; without it, a Bayer pattern is grey.
        topic: where it came from, for the error messages.
        depth: as for :func:`image_to_rgb`.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ImageError: the data is no image, or one of depth: of another type than 8-bit or 16-bit colours, or
            16-bit grey that ``format`` doesn't call a colour encoding.
    """
    encoding = message.format.split(";")[0].strip()
    said = encoding in _CHANNELS or encoding in _WIDE_CHANNELS
    if "compressedDepth" in message.format or _DEPTH_ENCODING.fullmatch(encoding):
        raise ImageError(f"image on {topic} has format '{message.format}': depth; give the colour image")
    data = np.frombuffer(message.data, dtype=np.uint8)
    try:
        # As it is, whatever EXIF says: camera_info and masks know nothing of that.
        pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
        reason = "it is no whole image of a known kind"
    except cv2.error as error:
        pixels, reason = None, error.err or str(error)
    if pixels is None:
        raise ImageError(
            f"compressed image on {topic} (format '{message.format}', {data.size} bytes) can't be decoded "
            f"({reason}): check the camera driver or the transport"
        )
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    if pixels.dtype == np.uint16 and (said or channels >= 3):
        pixels = (depth or BitDepth()).to_8_bits(pixels)
    if pixels.dtype != np.uint8:
        raise ImageError(
            f"compressed image on {topic} (format '{message.format}') holds {channels} channel"
            f"{'s' * (channels > 1)} of {pixels.dtype}: that is depth; give the colour image, or if it "
            "is one, name its encoding in the format, as in 'mono16; png compressed'"
        )
    if encoding.startswith("bayer") and said and channels == 1:
        return cv2.cvtColor(pixels, _bayer_code(encoding))
    if channels <= 2:
        return cv2.cvtColor(
            np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], -1)[:, :, 0]), cv2.COLOR_GRAY2RGB
        )
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB if channels == 3 else cv2.COLOR_BGRA2RGB)


_DEPTH_ENCODING = re.compile(r"(16|32|64)[USF]C\d+|8SC\d+")
"""OpenCV's names of types that no colour image has."""


def _bayer_code(encoding: str) -> int:
    return _BAYER_CODES[encoding.rstrip("0123456789")]


def depth_to_metres(message: Any, topic: str) -> np.ndarray:
    """Pixels of a depth Image message in metres.

    Args:
        message: a ``sensor_msgs/Image``, 16UC1 or mono16 (millimetres) or 32FC1 (metres).
        topic: where it came from, for the error messages.

    Returns:
        (H, W) float32, 0 where nothing was measured.

    Raises:
        ImageError: another encoding, or fewer bytes than height and step promise.
    """
    kinds = {"16UC1": ("u2", 1e-3), "mono16": ("u2", 1e-3), "32FC1": ("f4", 1.0)}
    if message.encoding not in kinds:
        raise ImageError(
            f"depth on {topic} has encoding '{message.encoding}': use 16UC1 (millimetres) or 32FC1 (metres)"
        )
    kind, scale = kinds[message.encoding]
    dtype = np.dtype((">" if message.is_bigendian else "<") + kind)
    rows = np.ascontiguousarray(_rows(message, topic, dtype.itemsize))
    depth = rows.view(dtype).astype(np.float32) * np.float32(scale)
    return np.nan_to_num(depth, nan=0.0, posinf=0.0, neginf=0.0)


def _rows(message: Any, topic: str, bytes_per_pixel: int) -> np.ndarray:
    """(H, W * bytes_per_pixel) uint8 view of the data without the padding at the end of each row."""
    height, width, step = int(message.height), int(message.width), int(message.step)
    row = width * bytes_per_pixel
    if step < row:
        raise ImageError(
            f"image on {topic} has step {step}, but a row of {width} {message.encoding} pixels takes {row} "
            "bytes: "
            "check the camera driver"
        )
    data = np.frombuffer(message.data, dtype=np.uint8)
    if data.size < step * height:
        raise ImageError(
            f"image on {topic} is truncated: {data.size} bytes, but {height} rows of {step} bytes make "
            f"{step * height}: check the camera driver or the transport"
        )
    return data[: step * height].reshape(height, step)[:, :row]


def _through_cv_bridge(message: Any, topic: str) -> np.ndarray:
    try:
        bridge = importlib.import_module("cv_bridge").CvBridge()
    except Exception as error:  # a cv_bridge that is built for another NumPy or OpenCV fails in many ways
        raise ImageError(
            f"image on {topic} has encoding '{message.encoding}': not one of {', '.join(NATIVE_ENCODINGS)}, "
            "and "
            f"cv_bridge can't be used here ({error}); install cv_bridge or change the camera's encoding"
        ) from error
    try:
        return np.asarray(bridge.imgmsg_to_cv2(message, desired_encoding="rgb8"))
    except Exception as error:  # CvBridgeError, KeyError of an unknown OpenCV type, cv2.error
        raise ImageError(
            f"image on {topic} has encoding '{message.encoding}', which cv_bridge can't turn into rgb8: "
            f"{error}"
        ) from error

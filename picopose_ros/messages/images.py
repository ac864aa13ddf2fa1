"""``sensor_msgs/Image`` and ``CompressedImage`` to NumPy. Needs no ROS: any object with the message's fields
will do."""

from __future__ import annotations

import importlib
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

# ROS names a Bayer pattern by its first row's first two pixels; OpenCV by the second row's second and third.
_BAYER_CODES = {
    "bayer_rggb8": cv2.COLOR_BayerBG2RGB,
    "bayer_bggr8": cv2.COLOR_BayerRG2RGB,
    "bayer_gbrg8": cv2.COLOR_BayerGR2RGB,
    "bayer_grbg8": cv2.COLOR_BayerGB2RGB,
}

NATIVE_ENCODINGS = (*_CHANNELS, "mono16")
"""Encodings that are converted here; anything else goes through cv_bridge where it is installed."""


def image_to_rgb(message: Any, topic: str) -> np.ndarray:
    """Pixels of an Image message as RGB.

    Every encoding but the Bayer ones gives a view of the message's data, possibly with strides; nothing is
    copied.

    Args:
        message: a ``sensor_msgs/Image``.
        topic: where it came from, for the error messages.

    Returns:
        (H, W, 3) uint8, not writeable where it is a view of the message.

    Raises:
        ImageError: no pixels, fewer bytes than height and step promise, or an encoding nobody here can read.
    """
    encoding, height, width = message.encoding, int(message.height), int(message.width)
    if height == 0 or width == 0:
        raise ImageError(f"image on {topic} has {width}x{height} pixels: check the camera driver")
    if encoding == "mono16":
        pairs = _rows(message, topic, 2).reshape(height, width, 2)
        high_byte = pairs[:, :, 0 if message.is_bigendian else 1]
        return np.broadcast_to(high_byte[:, :, None], (height, width, 3))
    if encoding not in _CHANNELS:
        return _through_cv_bridge(message, topic)

    channels = _CHANNELS[encoding]
    pixels = _rows(message, topic, channels).reshape(height, width, channels)
    if encoding in _BAYER_CODES:
        if height < 2 or width < 2:
            raise ImageError(f"image on {topic} has {width}x{height} pixels, too few for a Bayer pattern")
        return cv2.cvtColor(np.ascontiguousarray(pixels[:, :, 0]), _BAYER_CODES[encoding])
    if encoding == "mono8":
        return np.broadcast_to(pixels, (height, width, 3))
    if encoding.startswith("bgr"):
        return pixels[:, :, 2::-1]
    return pixels[:, :, :3]


def compressed_to_rgb(message: Any, topic: str) -> np.ndarray:
    """Pixels of a CompressedImage message as RGB.

    Args:
        message: a ``sensor_msgs/CompressedImage``: JPEG, PNG or whatever else OpenCV reads. ``format`` isn't
            needed, but that the pixels are a Bayer pattern is known only from it.
        topic: where it came from, for the error messages.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ImageError: the data is no image, or one of depth.
    """
    if "compressedDepth" in message.format:
        raise ImageError(f"image on {topic} has format '{message.format}': depth; give the colour image")
    bayer = _BAYER_CODES.get(message.format.split(";")[0].strip())
    data = np.frombuffer(message.data, dtype=np.uint8)
    # As the camera saw it, whatever EXIF says: camera_info and masks know nothing of that.
    flags = cv2.IMREAD_COLOR if bayer is None else cv2.IMREAD_GRAYSCALE
    try:
        pixels = cv2.imdecode(data, flags | cv2.IMREAD_IGNORE_ORIENTATION) if data.size else None
        if pixels is not None:
            return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB if bayer is None else bayer)
        reason = "it is no whole image of a known kind"
    except cv2.error as error:
        reason = error.err or str(error)
    raise ImageError(
        f"compressed image on {topic} (format '{message.format}', {data.size} bytes) can't be decoded "
        f"({reason}): check the camera driver or the transport"
    )


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

"""Pixels of image messages, under the name by which other packages import them."""

from picopose_ros.messages.images import BitDepth, compressed_to_rgb, image_to_rgb

__all__ = ["BitDepth", "compressed_to_rgb", "image_to_rgb"]

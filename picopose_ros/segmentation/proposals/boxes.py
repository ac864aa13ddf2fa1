"""Proposals from another detector's boxes, whatever it calls what is in them."""

from __future__ import annotations

import numpy as np

from picopose_ros.segmentation.boxes import cut_out
from picopose_ros.segmentation.proposals import Picture


def propose(picture: Picture) -> list[np.ndarray]:
    """Masks (H, W) bool of what in each box looks unlike its surroundings, and the boxes themselves."""
    return [mask for box in picture.boxes for mask in (cut_out(picture.rgb, box), box)]

"""Where masks without a class come from: proposal sources, each a function of a picture to masks.

A source of your own is such a function in any module that Python can import::

    def propose(picture):                       # picture.rgb: (height, width, 3) uint8
        masks, scores = my_network(picture.rgb)
        return [mask > 0 for mask in masks]     # each (height, width)

and is named ``my_package.my_module:propose`` where the packaged sources are named ``builtin``, ``boxes``,
``sam``, ``sam2`` and ``fastsam``. One that needs weights is a class that is made with `SourceOptions` and
called with the picture: ``my_package.my_module:MySource``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from picopose_ros.errors import ConfigError, SegmentError

SOURCES: dict[str, str] = {
    "builtin": "picopose_ros.segmentation.proposals.builtin:propose",
    "boxes": "picopose_ros.segmentation.proposals.boxes:propose",
    "sam": "picopose_ros.segmentation.proposals.sam:SamSource",
    "sam2": "picopose_ros.segmentation.proposals.sam2:Sam2Source",
    "fastsam": "picopose_ros.segmentation.proposals.fastsam:FastSamSource",
}
"""The packaged sources by name: module and function, or class."""


@dataclass(frozen=True)
class Picture:
    """What a proposal source may look at.

    Attributes:
        rgb: (H, W, 3) uint8.
        depth: (H, W) float32 metres, 0 or NaN where nothing was measured; None without a depth camera.
        boxes: masks (H, W) bool of the boxes of another detector, for the source ``boxes``.
    """

    rgb: np.ndarray
    depth: np.ndarray | None = None
    boxes: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class SourceOptions:
    """How a source is set up.

    Attributes:
        weights: file of the source's network; None where it has none.
        model: which of its networks the weights are of, e.g. ``vit_b``; "" for the usual one.
        device: torch device of the network.
    """

    weights: Path | None = None
    model: str = ""
    device: str = "cpu"


SAME = 0.85
"""Overlap (IoU) from which on two proposals are one."""

_COARSE = 40  # samples of the shorter side that it is looked at in

Propose = Callable[[Picture], Sequence[np.ndarray]]
"""A proposal source: masks (H, W) bool of whatever looks like one thing, in any order."""


def proposal_source(name: str, options: SourceOptions | None = None) -> Propose:
    """The source of that name.

    Args:
        name: one of `SOURCES`, or ``module:function`` or ``module:Class`` of your own.
        options: for sources with a network.

    Raises:
        ConfigError: there is no such source, its package is not installed, or its weights can't be used.
    """
    place = SOURCES.get(name, name)
    module, _, attribute = place.partition(":")
    if not attribute:
        raise ConfigError(
            f"there is no proposal source '{name}': choose one of {', '.join(SOURCES)}, or name your own as "
            "module:function"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the proposal source '{name}' can't be imported: {error}") from error
    return found(options or SourceOptions()) if inspect.isclass(found) else found


def need_weights(options: SourceOptions, source: str, example: str) -> Path:
    """The file with the source's weights.

    Raises:
        ConfigError: none is named, or it is not there.
    """
    if options.weights is None:
        raise ConfigError(f"proposals '{source}' need weights: name the file, e.g. {example}")
    path = options.weights.expanduser()
    if not path.is_file():
        raise ConfigError(f"the weights {path} of proposals '{source}' are not there")
    return path


def check_proposals(masks: Sequence[np.ndarray], rgb: np.ndarray) -> tuple[list[np.ndarray], str]:
    """What of a source's masks can be used.

    Args:
        masks: of the source. rgb: (H, W, 3) they were made of.

    Returns:
        The masks that can be used, (H, W) bool; what is wrong with the others, "" if nothing is.

    Raises:
        SegmentError: it gave no sequence of masks.
    """
    try:
        arrays = [np.asarray(mask) for mask in masks]
    except TypeError as error:
        raise SegmentError(f"the proposal source gave no list of masks ({error})") from error
    good, wrong = [], ""
    for index, mask in enumerate(arrays):
        if mask.shape != rgb.shape[:2]:
            wrong = f"proposal {index} has shape {mask.shape}, the image {rgb.shape[:2]}"
        elif mask.any():
            good.append(mask if mask.dtype == bool else mask != 0)
    return good, wrong


def without_doubles(masks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Masks (H, W) bool without those that are nearly the same as an earlier one."""
    kept: list[np.ndarray] = []
    seen: list[np.ndarray] = []
    for mask in masks:
        step = max(min(mask.shape) // _COARSE, 1)
        coarse = mask[::step, ::step]
        common = (np.count_nonzero(coarse & one) / max(np.count_nonzero(coarse | one), 1) for one in seen)
        if not any(share > SAME for share in common):
            kept.append(mask)
            seen.append(coarse)
    return kept

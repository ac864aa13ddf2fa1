"""Proposals from the banks themselves: where an image looks like the surface of an object."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from picopose_ros.geometry.crops import CropBox, crop_rgb
from picopose_ros.model.config import GRIDS
from picopose_ros.segmentation.matching import TemplateMatcher
from picopose_ros.segmentation.proposals import Picture, without_doubles
from picopose_ros.segmentation.proposals.builtin import find_cells
from picopose_ros.templates.bank import TemplateBank

WINDOW = 0.42
"""Side of the windows that are encoded, in the image's shorter side."""

PATCH = 8
"""Side (px) of a patch of the map."""

SURFACE = 384
"""Descriptors of an object that are compared with each patch."""

COLOUR = 1.5
"""Weight of the colours; a colour that is e times as frequent counts as half a standard deviation."""

CHROMA = 24
"""Bins of a chromaticity."""

LEVELS = (0.75, 1.25, 2.0)
"""Regions are cut out where the map is this many standard deviations above its mean."""

MOST = 2
"""Regions per object where it leads, and at every level; the largest ones."""

KEPT = 5
"""Regions per object that are proposed: those that stand out most from what is around them."""

_SMALLEST = 0.001  # of the image
_AROUND = 7  # side (px of the map) of what a region's surroundings are found with
_LEAD = 0.5  # standard deviations that an object leads by where it is told from the others


class BankSearch:
    """Finds regions of an image that look like the surface of an object.

    The image is encoded in windows. A patch is as alike to an object as to the most alike of a sample of its
    templates' patches; what all objects are alike to (a plain table) is taken off. To that comes how much
    more frequent a colour is on the object than in the image (Swain and Ballard 1991). The borders are those
    of the picture's cells. One set of regions is of where an object is more alike than all others, one for
    every level of where it is alike at all; those are proposed that stand out from what is around them.

    Args:
        matcher: with the banks.
    """

    def __init__(self, matcher: TemplateMatcher) -> None:
        self._matcher = matcher
        self._colours = {name: _surface_colours(matcher.bank(name)) for name in matcher.classes}
        with torch.inference_mode():
            self._surfaces = [matcher.sample(name, SURFACE) for name in matcher.classes]

    def __call__(self, picture: Picture) -> list[np.ndarray]:
        """Masks (H, W) bool."""
        height, width = picture.rgb.shape[:2]
        labels = find_cells(picture).labels
        maps = _standard(self._alike(picture.rgb, labels)) + COLOUR * self._coloured(picture.rgb, labels)
        maps = _standard(maps)
        first = maps.argmax(0)
        masks = []
        for number, one in enumerate(maps):
            regions = _regions((first == number) & (one > _LEAD), MOST)
            for level in LEVELS:
                regions += _regions(one > level, MOST)
            regions = without_doubles(regions)
            regions.sort(key=lambda region: -_contrast(one, region))
            masks += regions[:KEPT]
        size = width, height
        return [cv2.resize(m.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0 for m in masks]

    def _alike(self, rgb: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """(objects, h, w) how alike the cells are to the objects, by the network."""
        boxes = _windows(*rgb.shape[:2])
        crops = np.stack([crop_rgb(rgb, box) for box in boxes]).astype(np.float32)
        rows = self._matcher.encode(crops).transpose(1, 2).flatten(0, 1)  # (windows * 256, C)
        with torch.inference_mode():
            alike = torch.stack([(rows @ surface).amax(1) for surface in self._surfaces])
        patches = alike.cpu().numpy().reshape(len(alike), len(boxes), GRIDS[0], GRIDS[0])
        maps = np.stack([_by_cell(one, labels) for one in _on_image(patches, boxes, rgb.shape)])
        return maps - 0.5 * maps.mean(0, keepdims=True) if len(maps) > 1 else maps

    def _coloured(self, rgb: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """(objects, h, w) log of how much more frequent the cells' colours are on the objects, -1..1."""
        small = cv2.resize(rgb, labels.shape[::-1], interpolation=cv2.INTER_AREA)
        bins = _colour_bins(small.reshape(-1, 3))
        image = _histogram(bins)
        ratios = [np.log((self._colours[name] + 1e-4) / (image + 1e-4)) for name in self._matcher.classes]
        return np.stack([_by_cell(np.clip(r[bins], -3, 3).reshape(labels.shape) / 3, labels) for r in ratios])


def _standard(maps: np.ndarray) -> np.ndarray:
    """Maps (objects, h, w) in standard deviations from their mean."""
    return (maps - maps.mean((1, 2), keepdims=True)) / np.maximum(maps.std((1, 2), keepdims=True), 1e-6)


def _colour_bins(rgb: np.ndarray) -> np.ndarray:
    """(n,) number of the bin of colours (n, 3): chromaticity, whatever the light, and coarse brightness."""
    total = rgb.astype(np.float32).sum(1)
    shares = (rgb[:, :2] + 8.0) / (total[:, None] + 24.0)
    red, green = (shares * CHROMA).astype(np.int64).clip(0, CHROMA - 1).T
    bright = (total > 180).astype(np.int64) + (total > 480)
    return (bright * CHROMA + red) * CHROMA + green


def _histogram(bins: np.ndarray) -> np.ndarray:
    """(3 * CHROMA ** 2,) frequencies, smoothed over neighbouring colours and brightnesses."""
    counts = np.bincount(bins, minlength=3 * CHROMA**2).astype(np.float32).reshape(3, CHROMA, CHROMA)
    counts = np.stack([cv2.GaussianBlur(level, (0, 0), 0.8) for level in counts])
    counts = counts + 0.4 * (np.roll(counts, 1, 0) * [[[0]], [[1]], [[1]]])
    counts = counts + 0.4 * (np.roll(counts, -1, 0) * [[[1]], [[1]], [[0]]])
    return counts.ravel() / counts.sum()


def _surface_colours(bank: TemplateBank) -> np.ndarray:
    """`_histogram` of an object's templates."""
    pixels = bank.images[:, ::4, ::4].reshape(-1, 3)
    return _histogram(_colour_bins(pixels[pixels.any(1)]))  # the background is black


def _windows(height: int, width: int) -> list[CropBox]:
    """Squares that cover the whole image."""
    side = max(int(WINDOW * min(height, width)) // 2 * 2, 2)

    def starts(length: int) -> np.ndarray:
        count = int(np.ceil(length / side))
        return np.unique(np.linspace(0, length - side, max(count, 1)).round().astype(int))

    return [CropBox(int(left), int(top), side) for top in starts(height) for left in starts(width)]


def _on_image(alike: np.ndarray, boxes: list[CropBox], shape: tuple[int, ...]) -> np.ndarray:
    """(objects, h, w) mean over the windows of the patches' values, on a map of the image."""
    height, width = -(-shape[0] // PATCH), -(-shape[1] // PATCH)
    total = np.zeros((len(alike), height, width), np.float32)
    seen = np.zeros((height, width), np.float32)
    for number, box in enumerate(boxes):
        left, top = box.left // PATCH, box.top // PATCH
        side = max(round(box.side / PATCH), 1)
        part = slice(top, min(top + side, height)), slice(left, min(left + side, width))
        rows, columns = part[0].stop - part[0].start, part[1].stop - part[1].start
        for k in range(len(alike)):
            value = cv2.resize(alike[k, number], (side, side), interpolation=cv2.INTER_LINEAR)
            total[k][part] += value[:rows, :columns]
        seen[part] += 1
    return total / np.maximum(seen, 1)


def _by_cell(value: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(h, w) of the labels: the mean of a map over each cell."""
    value = cv2.resize(value, labels.shape[::-1], interpolation=cv2.INTER_LINEAR)
    total = np.bincount(labels.ravel(), value.ravel())
    return (total / np.maximum(np.bincount(labels.ravel()), 1))[labels].astype(np.float32)


def _regions(high: np.ndarray, most: int) -> list[np.ndarray]:
    """The ``most`` largest connected parts of (h, w) bool, with their holes filled."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(high.astype(np.uint8), connectivity=4)
    order = 1 + np.argsort(-stats[1:, cv2.CC_STAT_AREA], kind="stable")[:most]
    masks = []
    for label in order:
        region = (labels == label).astype(np.uint8)
        if region.mean() >= _SMALLEST:
            outlines, _ = cv2.findContours(region, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            masks.append(cv2.drawContours(np.zeros_like(region), outlines, -1, 1, cv2.FILLED) > 0)
    return masks


def _contrast(value: np.ndarray, region: np.ndarray) -> float:
    """How far the mean of a map in a region is above that close around it."""
    around = (cv2.dilate(region.astype(np.uint8), np.ones((_AROUND, _AROUND), np.uint8)) > 0) & ~region
    return float(value[region].mean() - value[around].mean()) if around.any() else 0.0

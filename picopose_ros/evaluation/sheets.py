"""Pictures of an evaluation: outlines of poses, a sheet of cases, the reliability curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from picopose_ros.evaluation.report import write_atomically
from picopose_ros.geometry.crops import CROP_SIZE, CropBox
from picopose_ros.templates.bank import TemplateBank
from picopose_ros.templates.meshes import ObjectMesh
from picopose_ros.templates.renderer import MeshRenderer

TRUE_COLOUR = (60, 220, 60)
ESTIMATED_COLOUR = (255, 60, 60)

_TEXT_LINE = 16
_MARGIN = 6


def outline(
    rgb: np.ndarray,
    K: np.ndarray,
    mesh: ObjectMesh,
    T_cam_obj: np.ndarray,
    colour: tuple[int, int, int],
    renderer: MeshRenderer,
) -> None:
    """Draw the silhouette's outline of a pose (4, 4) into an image (H, W, 3) of a pinhole camera K (3, 3)."""
    height, width = rgb.shape[:2]
    mask = renderer.render(mesh, T_cam_obj, K, width, height).mask.astype(np.uint8)
    lines, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.polylines(rgb, lines, True, colour, 1, cv2.LINE_AA)


def scene_overlay(
    rgb: np.ndarray,
    K: np.ndarray,
    poses: Sequence[tuple[ObjectMesh, np.ndarray, np.ndarray | None]],
    renderer: MeshRenderer,
    path: Path,
) -> None:
    """Write an image with true (green) and estimated (red) outlines.

    Args:
        rgb: (H, W, 3) uint8. K: (3, 3). poses: mesh, true and estimated T_cam_obj (4, 4) or None. path: .jpg.
    """
    picture = np.ascontiguousarray(rgb)
    if picture is rgb:
        picture = rgb.copy()
    for mesh, truth, estimate in poses:
        outline(picture, K, mesh, truth, TRUE_COLOUR, renderer)
        if estimate is not None:
            outline(picture, K, mesh, estimate, ESTIMATED_COLOUR, renderer)
    write_picture(path, picture)


@dataclass(frozen=True)
class Shot:
    """One query for a sheet, small enough to keep them all.

    Attributes:
        crop: JPEG of the crop. template: (b, b, 3) uint8. K: (3, 3) of the crop.
        class_id: its mesh. truth, estimate: T_cam_obj (4, 4). lines: what to write below.
    """

    crop: np.ndarray
    template: np.ndarray
    K: np.ndarray
    class_id: str
    truth: np.ndarray
    estimate: np.ndarray | None
    lines: list[str]

    @staticmethod
    def take(
        rgb: np.ndarray,
        box: CropBox,
        K: np.ndarray,
        class_id: str,
        bank: TemplateBank,
        template: int,
        truth: np.ndarray,
        estimate: np.ndarray | None,
        lines: list[str],
    ) -> Shot:
        """Of an image (H, W, 3) with intrinsics K (3, 3), cropped to a box."""
        crop = cv2.resize(rgb[box.slices], (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_LINEAR)
        coded = cv2.imencode(".jpg", crop[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
        # cv2.resize puts pixel p of the crop at (p + .5) / s - .5 of the box.
        s = CROP_SIZE / box.side
        M = np.array([[s, 0, (0.5 - box.left) * s - 0.5], [0, s, (0.5 - box.top) * s - 0.5], [0, 0, 1]])
        side = int(bank.sides[template])
        return Shot(coded, bank.images[template, :side, :side], M @ K, class_id, truth, estimate, lines)

    def draw(self, mesh: ObjectMesh, renderer: MeshRenderer) -> np.ndarray:
        """Crop, template and crop with outlines side by side, the lines below; (h, w, 3) uint8."""
        crop = np.ascontiguousarray(cv2.imdecode(self.crop, cv2.IMREAD_COLOR)[..., ::-1])
        template = cv2.resize(self.template, (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_AREA)
        drawn = crop.copy()
        outline(drawn, self.K, mesh, self.truth, TRUE_COLOUR, renderer)
        if self.estimate is not None:
            outline(drawn, self.K, mesh, self.estimate, ESTIMATED_COLOUR, renderer)
        text = np.full((_TEXT_LINE * len(self.lines) + _MARGIN, 3 * CROP_SIZE, 3), 255, np.uint8)
        for number, line in enumerate(self.lines):
            _write(text, line, (4, _TEXT_LINE * (number + 1) - 3))
        return np.vstack([np.hstack([crop, template, drawn]), text])


def contact_sheet(
    shots: Mapping[str, Sequence[Shot]],
    meshes: Mapping[str, ObjectMesh],
    renderer: MeshRenderer,
    path: Path,
    columns: int = 2,
) -> None:
    """Write a sheet with a block of cases per name: crop, template, outlines (true green, found red)."""
    blocks = []
    for name, cases in shots.items():
        if not cases:
            continue
        pictures = [shot.draw(meshes[shot.class_id], renderer) for shot in cases]
        pictures = [
            cv2.copyMakeBorder(p, 0, _MARGIN, 0, _MARGIN, cv2.BORDER_CONSTANT, value=(255, 255, 255))
            for p in pictures
        ]
        pictures += [np.full_like(pictures[0], 255)] * (-len(pictures) % columns)
        rows = [np.hstack(pictures[i : i + columns]) for i in range(0, len(pictures), columns)]
        head = np.full((28, rows[0].shape[1], 3), 225, np.uint8)
        _write(head, name, (6, 20), 0.6)
        blocks += [head, *rows]
    write_picture(path, np.vstack(blocks))


def reliability_picture(figures: Mapping[str, Any], path: Path) -> None:
    """Write the curve of confidence against the share of right poses, with the number of poses as bars.

    Args:
        figures: ``reliability`` (bins) and ``calibration_error`` of a report. path: .png.
    """
    side, left, top = 400, 60, 40
    canvas = np.full((side + 110, side + 100, 3), 255, np.uint8)

    def at(x: float, y: float) -> tuple[int, int]:
        return left + round(x * side), top + round((1 - y) * side)

    bins = figures["reliability"]
    most = max((entry["queries"] for entry in bins), default=0) or 1
    for entry in bins:
        corner, opposite = at(entry["from"], 0.3 * entry["queries"] / most), at(entry["to"], 0)
        cv2.rectangle(canvas, corner, opposite, (215, 225, 240), -1)
        cv2.rectangle(canvas, corner, opposite, (190, 205, 225), 1)
    for tick in np.linspace(0, 1, 6):
        for start, end in (((tick, 0), (tick, 1)), ((0, tick), (1, tick))):
            cv2.line(canvas, at(*start), at(*end), (225, 225, 225), 1)
        x, y = at(tick, 0)
        _write(canvas, f"{tick:.1f}", (x - 11, y + 18))
        x, y = at(0, tick)
        _write(canvas, f"{tick:.1f}", (x - 32, y + 5))
    cv2.line(canvas, at(0, 0), at(1, 1), (150, 150, 150), 1, cv2.LINE_AA)
    filled = [entry for entry in bins if entry["queries"]]
    points = [at(entry["confidence"], entry["correct"]) for entry in filled]
    for first, second in zip(points, points[1:]):
        cv2.line(canvas, first, second, (30, 90, 180), 2, cv2.LINE_AA)
    for entry, point in zip(filled, points):
        cv2.circle(canvas, point, 4, (30, 90, 180), -1, cv2.LINE_AA)
        _write(canvas, str(entry["queries"]), (point[0] - 10, point[1] - 9), 0.36)
    cv2.rectangle(canvas, at(0, 1), at(1, 0), (0, 0, 0), 1)
    _write(canvas, "share of poses with ADD(-S) < 0.1 diameter", (8, 22), 0.48)
    _write(canvas, "published confidence", (left + side // 2 - 75, top + side + 40), 0.48)
    note = f"numbers: poses per bin; calibration error {figures['calibration_error'] or 0:.3f}"
    _write(canvas, note, (left, top + side + 60), 0.4)
    write_picture(path, canvas)


def write_picture(path: Path, rgb: np.ndarray) -> None:
    """Write (H, W, 3) uint8 as the kind of file that the name says, whole or not at all.

    Raises:
        ConfigError: the file can't be written.
    """
    write_atomically(path, cv2.imencode(path.suffix, rgb[..., ::-1])[1].tobytes())


def _write(image: np.ndarray, text: str, at: tuple[int, int], size: float = 0.42) -> None:
    cv2.putText(image, text, at, cv2.FONT_HERSHEY_SIMPLEX, size, (0, 0, 0), 1, cv2.LINE_AA)

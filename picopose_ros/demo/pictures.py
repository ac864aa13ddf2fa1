"""Pictures of a recording's poses: mesh outlines on the images, and a contact sheet of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from picopose_ros import bags
from picopose_ros.demo.evaluate import Detected, Recording
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.node.images import image_to_rgb
from picopose_ros.templates.meshes import ObjectMesh
from picopose_ros.templates.renderer import MeshRenderer

SHEET_COLUMNS = 4
SHEET_ROWS = 3


def _colour(index: int) -> tuple[int, int, int]:
    hue = np.uint8([[[(index * 67) % 180, 230, 255]]])
    return tuple(int(v) for v in cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0])


def draw(
    rgb: np.ndarray,
    camera: CameraModel,
    detections: Sequence[Detected],
    meshes: Mapping[str, ObjectMesh],
    renderer: MeshRenderer,
) -> np.ndarray:
    """A copy of an undistorted image (H, W, 3) with every pose's outline, axes, name and score."""
    image = np.ascontiguousarray(rgb).copy()
    order = {class_id: index for index, class_id in enumerate(sorted(meshes))}
    for detection in detections:
        mesh = meshes[detection.class_id]
        T, colour = detection.T_cam_obj, _colour(order[detection.class_id])
        mask = renderer.render(mesh, T, camera.K, camera.width, camera.height).mask.astype(np.uint8)
        outlines, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(image, outlines, -1, (0, 0, 0), 3, cv2.LINE_AA)
        cv2.drawContours(image, outlines, -1, colour, 2, cv2.LINE_AA)
        ends = np.concatenate([[mesh.centre], mesh.centre + 0.3 * mesh.diameter * np.eye(3)])
        seen = ends @ T[:3, :3].T + T[:3, 3]
        if seen[:, 2].min() <= 0:
            continue
        pixels = np.rint(np.clip(camera.project(seen), -10_000, 10_000)).astype(int)
        for end, axis in zip(pixels[1:], ((255, 60, 60), (60, 255, 60), (90, 90, 255)), strict=True):
            cv2.line(image, tuple(pixels[0]), tuple(end), axis, 2, cv2.LINE_AA)
        text = f"{detection.name} {detection.score:.2f}"
        at = (int(pixels[0, 0]) - 40, int(pixels[0, 1]) - 8)
        cv2.putText(image, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 3, cv2.LINE_AA)
        cv2.putText(image, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.42, (255, 255, 255), 1, cv2.LINE_AA)
    return image


def write_pictures(
    bag: str | Path,
    recording: Recording,
    meshes: Mapping[str, ObjectMesh],
    folder: str | Path,
    image_topic: str,
    camera: CameraModel,
    every: int = 5,
) -> list[Path]:
    """Write ``overlay_<frame>.png`` of every n-th frame and ``contact_sheet.png``.

    Args:
        bag: holds the images.
        recording: the poses.
        meshes: by class id.
        folder: made if needed.
        image_topic: of the images.
        camera: of the images.
        every: n.

    Returns:
        The files, the contact sheet last.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("overlay_*.png"):
        old.unlink()
    files: list[Path] = []
    pictures: list[np.ndarray] = []
    with bags.BagReader(bag) as reader, MeshRenderer() as renderer:
        for index, (_, _, message) in enumerate(reader.messages([image_topic])):
            if index % every:
                continue
            found = recording.detections.get(bags.stamp_of(message), [])
            picture = draw(image_to_rgb(message, image_topic), camera, found, meshes, renderer)
            files.append(folder / f"overlay_{index:03d}.png")
            cv2.imwrite(str(files[-1]), picture[..., ::-1])
            pictures.append(picture)
    sheet = contact_sheet(pictures)
    files.append(folder / "contact_sheet.png")
    cv2.imwrite(str(files[-1]), sheet[..., ::-1])
    return files


def contact_sheet(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Up to twelve of the pictures (H, W, 3), evenly chosen, at half size in one."""
    count = min(len(pictures), SHEET_COLUMNS * SHEET_ROWS)
    chosen = [pictures[i] for i in np.linspace(0, len(pictures) - 1, count).astype(int)]
    small = [cv2.resize(p, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for p in chosen]
    small += [np.zeros_like(small[0])] * (-count % SHEET_COLUMNS)
    rows = [np.hstack(small[i : i + SHEET_COLUMNS]) for i in range(0, len(small), SHEET_COLUMNS)]
    return np.vstack(rows)

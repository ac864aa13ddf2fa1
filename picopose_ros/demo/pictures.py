"""Pictures of a recording's poses: mesh outlines on the images, and a contact sheet of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from picopose_ros.demo.evaluate import Recording
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.instances.overlay import Drawn, draw_poses, palette
from picopose_ros.messages import bags
from picopose_ros.messages.images import image_to_rgb
from picopose_ros.templates.meshes import ObjectMesh
from picopose_ros.templates.renderer import MeshRenderer

SHEET_COLUMNS = 4
SHEET_ROWS = 3


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
    order = {class_id: index for index, class_id in enumerate(sorted(meshes))}
    with bags.BagReader(bag) as reader, MeshRenderer() as renderer:
        for index, (_, _, message) in enumerate(reader.messages([image_topic])):
            if index % every:
                continue
            found = recording.detections.get(bags.stamp_of(message), [])
            drawn = [
                Drawn(
                    meshes[pose.class_id],
                    pose.T_cam_obj,
                    f"{pose.name} {pose.score:.2f}",
                    palette(order[pose.class_id]),
                )
                for pose in found
            ]
            picture = draw_poses(image_to_rgb(message, image_topic), camera, drawn, renderer)
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

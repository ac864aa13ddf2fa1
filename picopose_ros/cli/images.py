"""``picopose images-from-bag BAG FOLDER``: a recording's images as a BOP scene, for what wants files."""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from picopose_ros.errors import BagError, CameraError, ImageError
from picopose_ros.geometry.cameras import CameraModel, is_rectified_topic
from picopose_ros.messages import bags
from picopose_ros.messages.frames import camera_from_message
from picopose_ros.messages.images import image_to_rgb
from picopose_ros.progress import progress_bar

STAMPS = "stamps.csv"
"""Name of the table that tells which stamp an image has."""


def write_scene(
    recording: str | Path,
    folder: str | Path,
    image_topic: str | None = None,
    camera_info_topic: str | None = None,
    scene_id: int = 1,
) -> tuple[int, list[str]]:
    """Write the images as ``rgb/000000.png`` and on, ``scene_camera.json`` and the table ``stamps.csv``.

    Image ids follow the order of the stamps, so that they are those of `Timeline.from_bag`.

    Args:
        recording: rosbag2 folder.
        folder: to make; it must not exist.
        image_topic, camera_info_topic: needed only where the recording has several.
        scene_id: for the table.

    Returns:
        Number of images written, and why others were not.

    Raises:
        BagError: the recording can't be read or has no such topic, or the folder exists or can't be written.
    """
    folder, problems = Path(folder), []
    if folder.exists():
        raise BagError(f"{folder} exists already: give a folder that doesn't")
    partial = folder.with_name(f".{folder.name}.partial")  # nothing half-written is taken for whole
    with bags.BagReader(recording) as reader:
        image_topic = reader.topic(bags.IMAGE, image_topic)
        camera_info_topic = reader.topic(bags.CAMERA_INFO, camera_info_topic)
        infos = {bags.stamp_of(info): info for _, _, info in reader.messages([camera_info_topic])}
        ids = _numbers(reader, image_topic)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "rgb").mkdir(parents=True)
            cameras: dict[int, dict[str, Any]] = {}
            written: dict[int, int] = {}
            for _, _, image in progress_bar(reader.messages([image_topic]), len(ids), unit="image"):
                stamp = bags.stamp_of(image)
                try:
                    rgb = image_to_rgb(image, image_topic)
                    camera = _camera(infos, stamp, camera_info_topic, is_rectified_topic(image_topic))
                except (ImageError, CameraError) as error:
                    problems.append(f"image {ids[stamp]} (stamp {stamp} ns): {error}")
                    continue
                path = partial / "rgb" / f"{ids[stamp]:06d}.png"
                if not cv2.imwrite(str(path), np.ascontiguousarray(rgb[..., ::-1])):
                    raise OSError(f"{path.name} could not be written")
                cameras[ids[stamp]] = {"cam_K": camera.K.ravel().tolist(), "depth_scale": 1.0}
                written[ids[stamp]] = stamp
            (partial / "scene_camera.json").write_text(json.dumps(dict(sorted(cameras.items()))))
            with (partial / STAMPS).open("w", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(["scene_id", "image_id", "stamp"])
                rows.writerows([scene_id, index, stamp] for index, stamp in sorted(written.items()))
            os.replace(partial, folder)
        except OSError as error:
            raise BagError(f"the folder {folder} can't be written ({error})") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return len(written), problems


def _numbers(reader: bags.BagReader, topic: str) -> dict[int, int]:
    """Image id of every stamp (ns), in the order of the stamps."""
    stamps = sorted({bags.stamp_of(image) for _, _, image in reader.messages([topic])})
    return {stamp: index for index, stamp in enumerate(stamps)}


def _camera(infos: dict[int, Any], stamp: int, topic: str, rectified: bool) -> CameraModel:
    info = infos.get(stamp, next(iter(infos.values()), None))
    if info is None:
        raise CameraError(f"no camera_info was recorded on {topic}")
    return camera_from_message(info, topic, rectified)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``picopose images-from-bag``."""
    parser.add_argument("bag", metavar="BAG", type=Path, help="rosbag2 folder, mcap or sqlite3")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="to make, e.g. DATASET/test/000001")
    parser.add_argument("--image", metavar="TOPIC", help="needed only if the bag has several images")
    parser.add_argument("--camera-info", metavar="TOPIC", help="needed only if the bag has several")
    parser.add_argument("--scene-id", type=int, default=1, help=f"for {STAMPS} (1)")


def run(args: argparse.Namespace) -> int:
    """Run ``picopose images-from-bag``; returns 0, or 1 if an image could not be written.

    Raises:
        PicoPoseError: input that can't be used.
    """
    written, problems = write_scene(args.bag, args.folder, args.image, args.camera_info, args.scene_id)
    print(f"{args.folder}: {written} images, scene_camera.json, {STAMPS}")
    for problem in problems[:5]:
        print(problem)
    if len(problems) > 5:
        print(f"and {len(problems) - 5} more")
    return 1 if problems or not written else 0

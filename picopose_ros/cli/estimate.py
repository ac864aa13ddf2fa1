"""``picopose estimate IMAGE``: poses of the segments of one image. No ROS needed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picopose_ros.cli.options import add_onboarding_arguments, load_estimator, positive

if TYPE_CHECKING:
    import numpy as np

    from picopose_ros.estimator import EstimateResult, ObjectPose


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""

    def required(name: str, metavar: str, text: str) -> None:
        parser.add_argument(name, required=True, type=Path, metavar=metavar, help=text)

    parser.add_argument("image", metavar="IMAGE", type=Path, help="image file, as the camera took it")
    required("--camera", "K.json", "{K: [9 numbers], width, height, distortion_model, D}")
    required("--segments", "SEG.json", "[{class_id, score, size: [h, w], counts: [run lengths]}] or CNOS")
    required("--meshes", "DIR", "folder with one mesh per object")
    add_onboarding_arguments(parser)
    parser.add_argument("--hypotheses", type=positive, default=5, help="templates tried per segment (5)")
    parser.add_argument(
        "--overlay", type=Path, metavar="OUT.png", help="write the image with the poses in it"
    )
    parser.add_argument("--json", action="store_true", help="print JSON with matrices instead of a table")


def run(args: argparse.Namespace) -> int:
    """Estimate and print; 1 if no segment got a pose."""
    from picopose_ros.geometry.cameras import CameraModel
    from picopose_ros.segmentation import segments_from_json

    # What is quick to check comes before what takes seconds to import and minutes to onboard.
    camera = CameraModel.from_json(args.camera)
    segments = segments_from_json(args.segments)
    rgb = read_rgb(args.image)

    estimator = load_estimator(args)
    result = estimator.estimate(rgb, camera, segments)
    if args.json:
        print(json.dumps(as_json(result), indent=2))
    else:
        print("\n".join(as_table(result)))
    for index, reason in result.skipped:
        print(f"segment {index} ('{segments[index].class_id}') has no pose: {reason}", file=sys.stderr)
    if args.overlay:
        write_overlay(args, rgb, camera, result)
    return 0 if result.poses else 1


def read_rgb(path: Path) -> np.ndarray:
    """Image file -> RGB (H, W, 3) uint8, rows and columns as stored.

    Raises:
        ImageError: the file can't be read or is no image.
    """
    import cv2
    import numpy as np

    from picopose_ros.errors import ImageError

    try:
        data = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from error
    # Intrinsics and masks belong to the stored pixels, whatever way up a viewer would show them.
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    bgr = cv2.imdecode(data, flags) if data.size else None
    if bgr is None:
        raise ImageError(f"{path}: is no image file that OpenCV can read")
    return np.ascontiguousarray(bgr[..., ::-1])


def as_json(result: EstimateResult) -> dict[str, Any]:
    """The result in plain types: metres, radians, row-major matrices."""
    return {
        "poses": [_pose_as_json(pose) for pose in result.poses],
        "skipped": [{"segment": index, "reason": reason} for index, reason in result.skipped],
        "milliseconds": {stage: round(value, 2) for stage, value in result.timings.items()},
    }


def _pose_as_json(pose: ObjectPose) -> dict[str, Any]:
    return {
        "segment": pose.segment,
        "class_id": pose.class_id,
        "confidence": pose.confidence,
        "source": pose.source,
        "T_cam_obj": pose.T_cam_obj.tolist(),
        "covariance": pose.covariance.tolist(),
        "inliers": pose.inliers,
        "inlier_ratio": pose.inlier_ratio,
        "template": pose.template,
        "match_score": pose.match_score,
        "segment_score": pose.segment_score,
        "bbox_centre": pose.bbox_centre.tolist(),
        "bbox_size": pose.bbox_size.tolist(),
    }


def as_table(result: EstimateResult) -> list[str]:
    """One line per pose: position in metres, rotation as a unit quaternion."""
    from scipy.spatial.transform import Rotation

    width = max([len(pose.class_id) for pose in result.poses], default=0)
    width = max(width, len("object"))
    head = f"{'segment':>7}  {'object':<{width}}  {'x':>8} {'y':>8} {'z':>8}"
    lines = [head + f"  {'qx':>7} {'qy':>7} {'qz':>7} {'qw':>7}  confidence  source"]
    for pose in result.poses:
        position = " ".join(f"{value:8.4f}" for value in pose.T_cam_obj[:3, 3])
        rotation = Rotation.from_matrix(pose.T_cam_obj[:3, :3]).as_quat()
        quaternion = " ".join(f"{value:7.4f}" for value in rotation)
        lines.append(
            f"{pose.segment:>7}  {pose.class_id:<{width}}  {position}  {quaternion}  {pose.confidence:>10.2f}"
            f"  {pose.source}"
        )
    return lines


def write_overlay(args: argparse.Namespace, rgb: np.ndarray, camera: Any, result: EstimateResult) -> None:
    """Draw the poses and write the picture.

    Raises:
        ImageError: the file can't be written.
    """
    import cv2

    from picopose_ros.errors import ImageError
    from picopose_ros.overlay import Drawn, draw_poses, palette
    from picopose_ros.templates.meshes import discover_objects, load_object
    from picopose_ros.templates.renderer import MeshRenderer

    classes = sorted({pose.class_id for pose in result.poses})
    meshes = {
        spec.class_id: load_object(spec)
        for spec in discover_objects(args.meshes, args.unit)
        if spec.class_id in classes
    }
    objects = [
        Drawn(
            meshes[pose.class_id],
            pose.T_cam_obj,
            f"{pose.class_id} {pose.confidence:.2f}",
            palette(classes.index(pose.class_id)),
        )
        for pose in result.poses
    ]
    with MeshRenderer() as renderer:
        picture = draw_poses(rgb, camera, objects, renderer)
    try:
        written = cv2.imwrite(str(args.overlay), picture[..., ::-1])
    except cv2.error as error:
        raise ImageError(f"{args.overlay}: is no image file name that OpenCV can write") from error
    if not written:
        raise ImageError(f"{args.overlay}: could not be written; does its folder exist?")

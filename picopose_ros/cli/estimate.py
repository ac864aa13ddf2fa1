"""``picopose estimate IMAGE``: poses of the segments of one image. No ROS needed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picopose_ros.arguments import (
    CLASS_HELP,
    add_backend_arguments,
    add_onboarding_arguments,
    add_refinements,
    blaming,
    check_output,
    join_numbers,
    known_classes,
    load_estimator,
    positive,
)
from picopose_ros.errors import ConfigError, SegmentError

if TYPE_CHECKING:
    import numpy as np

    from picopose_ros.estimator import EstimateResult, ObjectPose
    from picopose_ros.segmentation import Segment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("image", metavar="IMAGE", type=Path, help="image file, as the camera took it")
    parser.add_argument(
        "--camera",
        required=True,
        metavar="FILE|FX FY CX CY",
        help="intrinsics: four numbers in pixels; JSON (K, width, height, distortion_model, D; BOP's "
        "camera.json or scene_camera.json; MegaPose's camera_data.json); YAML of a ROS camera_info",
    )
    parser.add_argument(
        "--segments",
        required=True,
        type=Path,
        action="append",
        metavar="SEG",
        help="a mask (PNG) per object, given as often as there are objects; a label image; a JSON of "
        "segments ([{class_id, score, size: [h, w], counts: [run lengths]}]) or of CNOS",
    )
    parser.add_argument("--class", dest="classes", metavar="NAME", action="append", help=CLASS_HELP)
    parser.add_argument(
        "--meshes", required=True, type=Path, metavar="DIR", help="folder with one mesh per object"
    )
    add_onboarding_arguments(parser)
    add_backend_arguments(parser)
    parser.add_argument("--hypotheses", type=positive, default=2, help="templates tried per segment (2)")
    add_refinements(parser)
    parser.add_argument(
        "--overlay", type=Path, metavar="OUT.png", help="write the image with the poses in it"
    )
    parser.add_argument("--json", action="store_true", help="print JSON with matrices instead of a table")


def run(args: argparse.Namespace) -> int:
    """Estimate and print; 1 if no segment got a pose."""
    from picopose_ros.cli.cameras import read_camera

    # What is quick to check comes before what takes seconds to import and minutes to onboard.
    if args.overlay is not None:
        check_overlay(args.overlay)
    rgb = read_rgb(args.image)
    with blaming("--camera"):
        camera = read_camera(args.camera, rgb.shape[:2], args.image)
    segments = read_segments(args, rgb.shape[:2])

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


def arrange(argv: Sequence[str]) -> list[str]:
    """The command line as argparse needs it: ``--camera`` takes four numbers or a file."""
    return join_numbers(argv, "--camera", 4)


def check_overlay(path: Path) -> None:
    """Check before the work that the picture can be written.

    Raises:
        ConfigError: its folder doesn't exist or can't be written to, or the name has no known ending.
    """
    import cv2

    check_output(path, "--overlay")
    try:
        known = cv2.haveImageWriter(str(path))
    except cv2.error:
        known = False
    if not known:
        raise ConfigError(f"--overlay: {path} has no ending that OpenCV can write; use .png or .jpg")


def read_segments(args: argparse.Namespace, size: tuple[int, int]) -> list[Segment]:
    """The segments that ``--segments`` and ``--class`` give, for an image of ``size`` (height, width).

    Raises:
        SegmentError: a file can't be used, a class is unknown, or a mask is of another size than the image.
        MeshError: the mesh folder, which knows the classes, can't be used.
    """
    from picopose_ros.cli.masks import is_picture, segments_from_pictures
    from picopose_ros.segmentation import segments_from_json

    pictures = [path for path in args.segments if is_picture(path)]
    if args.classes and not pictures:
        raise SegmentError("--class is for masks; a JSON of segments names their classes itself")
    segments: list[Segment] = []
    for path in args.segments:
        if path not in pictures:
            with blaming("--segments"):
                segments += segments_from_json(path)
    if not pictures:
        return segments
    known = known_classes(args)
    with blaming("--segments"):
        masks, notes = segments_from_pictures(pictures, args.classes, known)
        for segment in masks:
            if segment.mask.shape != tuple(size):
                height, width = segment.mask.shape
                raise SegmentError(
                    f"the mask of '{segment.class_id}' has {width}x{height} pixels, the image "
                    f"{size[1]}x{size[0]}: give the masks of this image, not resized"
                )
    for note in notes:
        print(note, file=sys.stderr)
    return segments + masks


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
    from picopose_ros.instances.overlay import Drawn, draw_poses, palette
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
        raise ImageError(f"--overlay: {args.overlay} is no image file name that OpenCV can write") from error
    if not written:
        raise ImageError(f"--overlay: {args.overlay} could not be written")

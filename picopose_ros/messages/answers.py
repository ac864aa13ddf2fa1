"""From an estimate to what is published: poses that are good enough, names of TF frames, messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from picopose_ros.messages import build
from picopose_ros.messages.reasons import DropReason, Problem
from picopose_ros.segmentation import Segment
from picopose_ros.tf_names import refusal

if TYPE_CHECKING:
    from picopose_ros.estimator import EstimateResult, ObjectPose
    from picopose_ros.instances import NamedPose
    from picopose_ros.templates.meshes import ObjectSpec

MIN_SCORE = 0.6
"""Poses with a lower score are not published, if nothing else is asked for. On cluttered tables one in ten
of the others is off by more than a fifth of the diameter (docs/accuracy.md)."""


@dataclass(frozen=True)
class Judged:
    """What is to be published of an estimate, and what not.

    Attributes:
        poses: in the order of the segments.
        dropped: of each segment without one, and of each pose that could not be refined.
    """

    poses: list[ObjectPose]
    dropped: list[Problem]


def judge(
    result: EstimateResult,
    segments: Sequence[Segment],
    min_score: float,
    min_mask_pixels: int,
    known: Callable[[str], bool],
) -> Judged:
    """Sort out what is good enough to be published.

    Args:
        result: of the estimator. segments: those that it was asked about.
        min_score: lowest score that is published.
        min_mask_pixels: the estimator's setting; a smaller mask is skipped by it.
        known: whether the estimator knows a class id.
    """
    dropped = []
    for index, why in result.skipped:
        segment = segments[index]
        if np.count_nonzero(segment.mask) < min_mask_pixels:
            reason = DropReason.SMALL_MASK
        else:
            reason = DropReason.NO_POSE if known(segment.class_id) else DropReason.UNKNOWN_CLASS
        dropped.append(Problem(reason, f"segment '{segment.class_id}' gave no pose: {why}"))
    poses = []
    unrefined = dict(result.unrefined)
    for pose in result.poses:
        if pose.confidence >= min_score:
            poses.append(pose)
            if pose.segment in unrefined:
                dropped.append(
                    Problem(
                        DropReason.UNREFINED,
                        f"the pose of '{pose.class_id}' could not be refined and is published as it was: "
                        f"{unrefined[pose.segment]}",
                    )
                )
        elif pose.source == "affine":
            dropped.append(
                Problem(
                    DropReason.NO_POSE,
                    f"PnP found no pose of '{pose.class_id}' that enough correspondences agree with; the "
                    f"coarse one has score {pose.confidence:.2f}, below min_score {min_score:g}",
                )
            )
        else:
            dropped.append(
                Problem(
                    DropReason.LOW_SCORE,
                    f"a pose of '{pose.class_id}' has score {pose.confidence:.2f}, below min_score "
                    f"{min_score:g}",
                )
            )
    return Judged(poses, dropped)


def image_frame_problem(frame_id: str, topic: str) -> Problem | None:
    """Why the frame of an image can't be one of TF's; None if it can.

    Args:
        frame_id: of the image. topic: where it came from, for the message.
    """
    reason = refusal(frame_id)
    if not reason:
        return None
    return Problem(
        DropReason.BAD_FRAME_ID,
        f"images on {topic} have frame_id {frame_id!r}, which can't be a TF parent ({reason}): set it in the "
        "camera driver",
    )


def tf_frame(one: NamedPose, spec: ObjectSpec | None, prefix: str) -> str:
    """TF frame of an instance: ``<prefix><frame_id or class>_<number>``."""
    class_id = one.pose.class_id
    return prefix + (class_id if spec is None else spec.tf_base) + one.name.removeprefix(class_id)


def transforms(
    make: build.Make,
    named: Sequence[NamedPose],
    header: Any,
    topic: str,
    specs: Mapping[str, ObjectSpec],
    prefix: str,
) -> tuple[list[Any], list[Problem]]:
    """TF of the instances of an image, and what of it can't be.

    Args:
        make: makes messages.
        named: the instances. header: of their image. topic: of the image.
        specs: of the objects, by class id. prefix: put before the names.
    """
    if not named:
        return [], []
    problem = image_frame_problem(header.frame_id, topic)
    if problem is not None:
        return [], [problem]
    made, problems = [], []
    for one in named:
        frame = tf_frame(one, specs.get(one.pose.class_id), prefix)
        reason = refusal(frame)
        if frame == header.frame_id:
            reason = f"images on {topic} have it as their own: set tf_prefix"
        if reason:
            message = f"instance {one.name} can't have the TF frame {frame!r}: {reason}"
            problems.append(Problem(DropReason.BAD_FRAME_ID, message))
            continue
        made.append(build.transform_message(make, one.pose.T_cam_obj, header, frame))
    return made, problems

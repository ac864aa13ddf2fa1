"""``picopose eval bop``: the poses that a BOP dataset asks for, as the csv of the BOP Challenge.

Each image is estimated by itself, all its segments in one batch, and kept in a journal before the next one. A
run that was stopped or killed goes on with the next image when it is started again. Several processes,
started by ``torchrun``, divide the images among them; the process that finishes last writes the csv.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from picopose_ros.arguments import positive
from picopose_ros.errors import CameraError, ConfigError, DatasetError, ImageError
from picopose_ros.estimator import PoseEstimator
from picopose_ros.evaluation.bop.dataset import BopDataset
from picopose_ros.evaluation.bop.detections import NO_SCORE, NOTHING_DETECTED, BopDetections
from picopose_ros.evaluation.bop.journal import ImageRecord, Journal
from picopose_ros.evaluation.bop.results import BopRow, write_results
from picopose_ros.evaluation.bop.setup import BopRun, add_estimation_arguments
from picopose_ros.evaluation.report import plain, table, write_atomically
from picopose_ros.segmentation import Problems

NO_POSE = "segment without a pose"

_ORDINARY = {NOTHING_DETECTED, NO_SCORE, NO_POSE}
"""Problems that every dataset has; they do not make the run fail."""


def estimate_image(
    estimator: PoseEstimator,
    dataset: BopDataset,
    detections: BopDetections,
    scene_id: int,
    image_id: int,
    score: str = "detection",
    cap: int | None = None,
) -> ImageRecord:
    """The rows of one image. An image or camera that can't be used is a failed record.

    Args:
        score: ``detection`` or ``pose``, whose score the rows get.
        cap: at most so many estimates per object.
    """
    record = ImageRecord(scene_id, image_id)
    problems = Problems()
    try:
        rgb = dataset.image(scene_id, image_id)
        camera = dataset.camera(scene_id, image_id)
        selection = detections.select(dataset.targets_of(scene_id, image_id), rgb.shape[:2], cap)
        result = estimator.estimate(rgb, camera, selection.segments)
    except (DatasetError, ImageError, CameraError) as error:
        problems.add("image that can't be used", str(error))
        return ImageRecord(scene_id, image_id, problems=problems.entries, failed=True)
    problems.entries += selection.problems.entries
    for index, reason in result.skipped:
        name = f"scene {scene_id} image {image_id} object {selection.obj_ids[index]}: {reason}"
        problems.add(NO_POSE, name)
    seconds = result.timings["total"] / 1000.0 + selection.time
    for pose in result.poses:
        value = pose.segment_score if score == "detection" else pose.confidence
        obj_id = selection.obj_ids[pose.segment]
        row = BopRow.of_pose(scene_id, image_id, obj_id, value, pose.T_cam_obj, seconds)
        record.lines.append(row.line())
    if selection.segments:
        record.timings = {**result.timings, "detection": 1000.0 * selection.time}
    record.problems = problems.entries
    return record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``picopose eval bop``."""
    add_estimation_arguments(parser)
    parser.add_argument(
        "--score",
        choices=("detection", "pose"),
        default="detection",
        help="the rows' score: the detection's, as the released code has it (default), or the pose's",
    )
    parser.add_argument(
        "--cap", type=positive, metavar="N", help="at most N poses per object and image; else all asked for"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the csv and of what is done so far"
    )


def run(args: argparse.Namespace) -> int:
    """Estimate what isn't estimated yet; 1 if something could not be used.

    Raises:
        PicoPoseError: input that can't be used, or a folder with another run.
    """
    rank, world, device = this_process(args.device)
    bop = BopRun.prepare(args, device)
    about = {**bop.about, "score": args.score, "cap": args.cap}
    journal = Journal(args.out, about, rank)

    def measure_with(estimator: PoseEstimator) -> Callable[[int, int], ImageRecord]:
        return partial(estimate_image, estimator, bop.dataset, bop.detections, score=args.score, cap=args.cap)

    try:
        bop.complete(journal, bop.images[rank::world], measure_with, quiet=rank != 0)
        with journal.merging():
            records = journal.read()
            left = sum(key not in records for key in bop.images)
            if left:
                print(f"process {rank}: done; the others still have {left} images")
                return 0
            return _finish(args, bop, about, [records[key] for key in bop.images])
    finally:
        journal.close()


def this_process(device: str) -> tuple[int, int, str]:
    """(rank, number of processes, device) of a process that ``torchrun`` may have started.

    Raises:
        ConfigError: the environment variables that it sets make no sense.
    """
    try:
        rank, world, local = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK are not what torchrun sets ({error})") from error
    return rank, world, f"cuda:{local}" if device == "cuda" and world > 1 else device


def _finish(
    args: argparse.Namespace, bop: BopRun, about: Mapping[str, Any], records: Sequence[ImageRecord]
) -> int:
    """Write csv and report, print a summary."""
    rows = [row for record in records for row in record.rows]
    dataset = bop.dataset
    problems = Problems([*bop.detections.problems.entries, *(e for r in records for e in r.problems)])
    failed = [record for record in records if record.failed]
    if len(failed) == len(records):
        details = "".join(f"\n{line}" for line in problems.lines())
        raise DatasetError(f"none of the {len(records)} images could be used:{details}")
    path = args.out / f"picopose-{args.hypotheses}hyp_{dataset.name}-{dataset.split_dir.name}.csv"
    write_results(path, rows)
    times = stage_times(records)
    report = {
        "settings": about,
        "images": len(records),
        "failed_images": [[record.scene_id, record.image_id] for record in failed],
        "rows": len(rows),
        "problems": problems.counts,
        "milliseconds_per_image": times,
    }
    write_atomically(args.out / "report.json", plain(report))
    asked = sum(t.inst_count for r in records for t in dataset.targets_of(r.scene_id, r.image_id))
    print(f"{path}: {len(rows)} poses for {asked} instances in {len(records)} images")
    if times:
        print("\nMilliseconds per image with detections.\n\n" + times_table(times))
    for line in problems.lines():
        print(line, file=sys.stderr)
    return 1 if set(problems.counts) - _ORDINARY else 0


def stage_times(records: Sequence[ImageRecord]) -> dict[str, dict[str, float]]:
    """Stage -> mean, median and largest of its milliseconds over the images that have any."""
    timed = [record.timings for record in records if record.timings]
    return {
        stage: {
            "mean": float(np.mean(values)),
            "median": float(np.median(values)),
            "largest": float(np.max(values)),
        }
        for stage in (timed[0] if timed else ())
        for values in [[one[stage] for one in timed]]
    }


def times_table(times: Mapping[str, Mapping[str, float]]) -> str:
    """`stage_times` as a Markdown table."""
    columns = next(iter(times.values()))
    rows = [[stage, *(f"{value:.1f}" for value in one.values())] for stage, one in times.items()]
    return table(["stage", *columns], rows)

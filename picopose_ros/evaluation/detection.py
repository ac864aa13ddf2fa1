"""``picopose eval detection``: how many instances a segmentation finds, and how many poses survive it.

On the benchmark's scenes (tables by default) the same images go through the estimator with the true masks,
with their boxes and with this package's segmenter. On a BOP dataset the segments are a detector's file or the
segmenter's own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from picopose_ros.arguments import add_onboarding_arguments, positive
from picopose_ros.errors import ConfigError
from picopose_ros.estimation.settings import resolve_precision
from picopose_ros.estimator import PoseEstimator, torch_device
from picopose_ros.evaluation.bop.dataset import BopDataset
from picopose_ros.evaluation.found import (
    ASKED_VISIBLE,
    CocoPrecision,
    FoundCounts,
    TrueInstance,
    count_found,
)
from picopose_ros.evaluation.metrics import evaluation_points, match_by_position, pose_errors
from picopose_ros.evaluation.report import write_atomically
from picopose_ros.evaluation.scenes import Kind, make_scenes
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.model import load_model
from picopose_ros.segmentation import Detection, Segment, bop_class_name, mask_roi, read_cnos
from picopose_ros.segmentation.boxes import box_mask
from picopose_ros.segmentation.matching import MatchSettings
from picopose_ros.segmentation.proposals import SOURCES, Picture, SourceOptions, proposal_source
from picopose_ros.segmentation.segmenter import Segmenter
from picopose_ros.templates.bank import TemplateBank, onboard
from picopose_ros.templates.meshes import ObjectMesh, ObjectSpec, load_object

INPUTS = ("masks", "boxes", "own")
"""True masks, their boxes, and the segmenter of this package."""


@dataclass(frozen=True)
class Image:
    """An image with the truth. ``poses``: T_cam_obj (4, 4) of each instance."""

    rgb: np.ndarray
    camera: CameraModel
    truth: list[TrueInstance]
    poses: list[np.ndarray]
    given: list[Segment]  # of a detector's file


@dataclass
class Tally:
    """What became of the instances with one kind of segmentation."""

    counts: FoundCounts
    precision: CocoPrecision
    right: int = 0  # instances that were asked for, whose ADD(-S) is below a tenth of the diameter
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        poses = self.right / max(self.counts.asked, 1)
        per_image = 1e3 * self.seconds / max(self.counts.images, 1)
        figures = {"poses_right": round(poses, 4), "segmenter_ms": round(per_image, 1)}
        return {**self.counts.as_dict(), **self.precision.as_dict(), **figures}


def box_segments(segments: Sequence[Segment]) -> list[Segment]:
    """The same as a detector of boxes would have it."""
    boxes = []
    for segment in segments:
        x, y, w, h = mask_roi(segment.mask)
        mask = box_mask((x + w / 2, y + h / 2), (w, h), 0.0, *segment.mask.shape)
        boxes.append(Segment(segment.class_id, segment.score, mask, is_box=True))
    return boxes


def benchmark_images(meshes: Sequence[ObjectMesh], count: int, seed: int, kind: Kind) -> Iterator[Image]:
    """The benchmark's scenes."""
    for scene in make_scenes(meshes, count, seed, kind):
        truth = [TrueInstance(one.class_id, one.visible, one.visib_fract) for one in scene.instances]
        yield Image(scene.rgb, scene.camera, truth, [one.T_cam_obj for one in scene.instances], [])


def bop_images(
    dataset: BopDataset, detections: Mapping[tuple[int, int], Sequence[Detection]], limit: int
) -> Iterator[Image]:
    """The images of a BOP dataset's targets."""
    for scene_id, image_id in dataset.images[:limit]:
        truth, poses = [], []
        for k, one in enumerate(dataset.ground_truth(scene_id, image_id)):
            mask = dataset.mask(scene_id, image_id, k)
            share = 1.0 if one.visib_fract is None else one.visib_fract
            truth.append(TrueInstance(bop_class_name(one.obj_id), mask, share))
            poses.append(one.T_cam_obj)
        rgb = dataset.image(scene_id, image_id)
        given = [one.segment() for one in detections.get((scene_id, image_id), ())]
        given = [segment for segment in given if segment.mask.shape == rgb.shape[:2]]
        yield Image(rgb, dataset.camera(scene_id, image_id), truth, poses, given)


def measure(
    images: Iterator[Image],
    inputs: Sequence[str],
    segmenter: Segmenter,
    estimator: PoseEstimator | None,
    meshes: Mapping[str, ObjectMesh],
    total: int,
) -> dict[str, Tally]:
    """Figures by kind of segmentation.

    Args:
        images: with the truth. inputs: of `INPUTS`, or ``file`` for the segments that come with the images.
        segmenter: for ``own``. estimator: None: no poses are estimated.
        meshes: by class id. total: number of images, for the bar.
    """
    tallies = {name: Tally(FoundCounts(), CocoPrecision()) for name in inputs}
    points = {name: evaluation_points(mesh).surface for name, mesh in meshes.items()}
    for image in tqdm(images, total=total, unit="image", disable=None):
        true = [Segment(one.class_id, 1.0, one.mask) for one in image.truth if one.mask.any()]
        for name, tally in tallies.items():
            if name == "own":
                found = segmenter.segment(Picture(image.rgb))
                segments, seconds = found.segments, found.timings["total"] / 1e3
                tally.seconds += seconds
            else:
                segments = {"masks": true, "boxes": box_segments(true), "file": image.given}[name]
            tally.counts += count_found(segments, image.truth)[0]
            tally.precision.add(segments, image.truth)
            if estimator is not None:
                tally.right += _right_poses(estimator, image, segments, meshes, points)
    return tallies


def _right_poses(
    estimator: PoseEstimator,
    image: Image,
    segments: Sequence[Segment],
    meshes: Mapping[str, ObjectMesh],
    points: Mapping[str, np.ndarray],
) -> int:
    """Instances that were asked for and have a right pose of their class."""
    poses = estimator.estimate(image.rgb, image.camera, segments).poses
    right = 0
    for class_id in {one.class_id for one in image.truth}:
        rows = [k for k, one in enumerate(image.truth) if one.class_id == class_id]
        own = [pose.T_cam_obj for pose in poses if pose.class_id == class_id]
        matched = match_by_position(own, [image.poses[k] for k in rows])
        mesh = meshes[class_id]
        for k, which in zip(rows, matched):
            if which is None or image.truth[k].visible < ASKED_VISIBLE:
                continue
            symmetries = mesh.spec.symmetries.transforms()
            errors = pose_errors(points[class_id], mesh.diameter, own[which], image.poses[k], symmetries)
            right += bool(errors.correct)
    return right


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--meshes", type=Path, help="folder with one mesh per object: the benchmark's scenes")
    parser.add_argument("--scenes", type=positive, default=20, help="scenes, or images of a dataset (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (0)")
    parser.add_argument(
        "--kind", choices=("single", "cluttered"), default="cluttered", help="of scenes (cluttered: tables)"
    )
    parser.add_argument("--root", type=Path, help="folder of BOP datasets")
    parser.add_argument("--dataset", help="a BOP dataset instead of scenes: lmo, tless, ...")
    parser.add_argument("--split", default="test", help="of the dataset (test)")
    parser.add_argument("--detections", type=Path, metavar="FILE.json", help="as CNOS writes it")
    parser.add_argument(
        "--inputs", nargs="+", choices=INPUTS, default=list(INPUTS), help="kinds of segmentation (all)"
    )
    parser.add_argument("--no-poses", action="store_true", help="count what is found, estimate no poses")
    parser.add_argument("--hypotheses", type=positive, default=5, help="templates tried per segment (5)")
    parser.add_argument("--out", type=Path, required=True, metavar="REPORT.json", help="report to write")
    parser.add_argument(
        "--proposals",
        default="builtin",
        metavar="SOURCE",
        help=f"{', '.join(name for name in SOURCES if name != 'boxes')}, or module:function (builtin)",
    )
    parser.add_argument("--proposal-weights", metavar="FILE", type=Path, help="for sam, sam2 and fastsam")
    parser.add_argument("--min-score", type=float, default=MatchSettings().min_score, help="of own segments")
    parser.add_argument("--per-class", type=positive, default=MatchSettings().per_class, help="likewise")
    add_onboarding_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print and write the report.

    Raises:
        ConfigError: neither or both of ``--meshes`` and ``--dataset``, or a detector's file for scenes.
    """
    if (args.meshes is None) == (args.dataset is None):
        raise ConfigError("give either --meshes, for rendered scenes, or --root and --dataset")
    if args.dataset is not None and args.root is None:
        raise ConfigError("--dataset needs --root, the folder that the dataset lies in")
    if args.detections is not None and args.dataset is None:
        raise ConfigError("--detections belong to a --dataset")
    device = torch_device(args.device)
    model = load_model(args.preset, args.weights, device)
    folder, unit = (args.meshes, args.unit or "m") if args.dataset is None else (None, "mm")
    dataset = None
    if args.dataset is not None:
        dataset = BopDataset(args.root, args.dataset, args.split)
        folder = dataset.models_dir
    onboarding = onboard(folder, model, args.viewpoints, unit, args.cache_dir, device, True, args.shading)
    meshes = _meshes(onboarding.banks, onboarding.specs)
    inputs = list(args.inputs)
    if dataset is None:
        images = benchmark_images(list(meshes.values()), args.scenes, args.seed, args.kind)
        total = args.scenes
    else:
        detections = {} if args.detections is None else read_cnos(args.detections)
        inputs += ["file"] * (args.detections is not None)
        total = min(args.scenes, len(dataset.images))
        images = bop_images(dataset, detections, total)
    settings = MatchSettings(min_score=args.min_score, per_class=args.per_class)
    propose = proposal_source(args.proposals, SourceOptions(args.proposal_weights, device=str(device)))
    search = args.proposals == "builtin"
    dtype = resolve_precision("auto", torch_device(device))
    segmenter = Segmenter(model, onboarding.banks, propose, search, settings, device, dtype)
    estimator = None
    if not args.no_poses:
        estimator = PoseEstimator(model, onboarding.banks, device=device)
        estimator.settings = type(estimator.settings)(hypotheses=args.hypotheses)
    tallies = measure(images, inputs, segmenter, estimator, meshes, total)
    report = {name: tally.as_dict() for name, tally in tallies.items()}
    write_atomically(args.out, json.dumps(report, indent=2) + "\n")
    print("\n".join(table(report)))
    return 0


def table(report: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line per kind of segmentation."""
    names = ("asked", "recall", "false_per_image", "AP", "AP50", "poses_right", "segmenter_ms")
    lines = [f"{'input':<8}" + "".join(f"{name:>17}" for name in names)]
    for name, figures in report.items():
        lines.append(f"{name:<8}" + "".join(f"{figures[key]:>17.4g}" for key in names))
    return lines


def _meshes(banks: Mapping[str, TemplateBank], specs: Mapping[str, ObjectSpec]) -> dict[str, ObjectMesh]:
    return {name: load_object(specs[name]) for name in banks}

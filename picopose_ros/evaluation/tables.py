"""``picopose eval tables``: the tables of the PicoPose paper, for a BOP dataset.

Table I (one and five hypotheses), IV (the poses and end points of the three stages), VI (what stage 3 starts
from), VII (how many of its blocks) and VIII (how many templates). One pass over the images: what the network
says of a segment is traced, and the other variants are answered from the trace where they can be. Every
variant is scored as ``picopose eval score`` scores a csv.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy.ndimage import map_coordinates

from picopose_ros import __version__
from picopose_ros.cnos import Problems
from picopose_ros.errors import CameraError, ConfigError, DatasetError, ImageError
from picopose_ros.estimator import (
    EstimatorSettings,
    Hypothesis,
    ObjectPose,
    PoseEstimator,
    SegmentTrace,
    torch_device,
)
from picopose_ros.evaluation.bop.dataset import BopDataset, GroundTruth
from picopose_ros.evaluation.bop.detections import BopDetections, Selection
from picopose_ros.evaluation.bop.journal import ImageRecord, Journal
from picopose_ros.evaluation.bop.results import BopRow, parse_row, write_results
from picopose_ros.evaluation.bop.run import (
    MIN_MASK_PIXELS,
    add_estimation_arguments,
    check_objects,
    load_bop_estimator,
)
from picopose_ros.evaluation.metrics import bop_symmetries
from picopose_ros.evaluation.report import number, plain, share, table, write_atomically
from picopose_ros.evaluation.score import IMPLEMENTATIONS, Scorer, implementation
from picopose_ros.evaluation.stages import endpoint_errors, true_map, viewpoints
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.correspondences import fit_similarity
from picopose_ros.geometry.crops import CROP_SIZE, GRID
from picopose_ros.model import load_model, model_fingerprint
from picopose_ros.model.checkpoint import preset_of
from picopose_ros.progress import progress_bar
from picopose_ros.templates.meshes import ObjectMesh, load_object
from picopose_ros.templates.renderer import MeshRenderer
from picopose_ros.templates.viewpoints import spread_viewpoints

TEMPLATE_COUNTS = (2, 6, 42, 162)
"""Of Table VIII."""

MATCH_TOLERANCE_PX = 14.0
"""A patch match this near to a similarity agrees with it: one patch."""

LEAST_OVERLAP = 0.3
"""Of a segment and what is visible of an instance (intersection over union), for its end points to be
measured against that instance."""

PATCH = 14
"""Side of a patch, crop px."""

EPE_STAGES = ("1", "2", "3")


def stage(which: int) -> str:
    """Name of a stage's pose."""
    return f"stage {which}"


def start(what: str) -> str:
    """Name of the pose that stage 3 gives from another start."""
    return f"start: {what}"


def blocks(count: int) -> str:
    """Name of the pose from so many offset blocks."""
    return f"{count} block{'s' if count > 1 else ''}"


def templates(count: int) -> str:
    """Name of the pose with so many templates."""
    return f"{count} templates"


def answer(hypotheses: int) -> str:
    """Name of the published pose with so many hypotheses."""
    return f"{hypotheses} hypothes{'i' if hypotheses == 1 else 'e'}s"


def matched_affine(hypothesis: Hypothesis, mask: np.ndarray) -> np.ndarray:
    """The similarity (3, 3), template crop px -> query crop px, that most of stage 1's matches agree on.

    Args:
        hypothesis: traced. mask: (224, 224) of the template.
    """
    side = CROP_SIZE // PATCH
    inside = mask.reshape(side, PATCH, side, PATCH).mean((1, 3)) >= 0.5
    y, x = np.nonzero(inside)
    source = np.stack([x, y], 1) * PATCH + (PATCH - 1) / 2
    target = hypothesis.matches[:, y, x].T.astype(np.float64)
    if len(source) < 3:
        return np.eye(3)
    found, _ = cv2.estimateAffinePartial2D(
        source, target, method=cv2.RANSAC, ransacReprojThreshold=MATCH_TOLERANCE_PX, maxIters=500
    )
    if found is None or not np.linalg.norm(found[:, 0]) > 1e-3:
        return fit_similarity(source, target)
    return np.vstack([found, [0, 0, 1]])


def after_block(hypothesis: Hypothesis, index: int) -> Hypothesis:
    """A traced hypothesis with the flow and certainty of an earlier block, brought to the last one's grid.

    Args:
        index: of the block: 0 for the coarsest.
    """
    flow, certainty = hypothesis.coarse[index]
    side = flow.shape[-1]
    # Cell i of a grid stands where cell i * GRID / side of the last one does, as its labels do.
    at = np.arange(GRID) * side / GRID
    where = np.stack(np.meshgrid(at, at, indexing="ij"))

    def finer(values: np.ndarray) -> np.ndarray:
        return map_coordinates(values.astype(np.float64), where, order=1, mode="nearest")

    return replace(
        hypothesis,
        flow=np.stack([finer(part) for part in flow]) * (GRID / side),
        certainty=finer(certainty),
        coarse=(),
    )


@dataclass(frozen=True, eq=False)
class _Image:
    """What is known of the image being measured."""

    scene_id: int
    image_id: int
    rgb: np.ndarray
    camera: CameraModel
    selection: Selection


class Tables:
    """Measures the variants image by image.

    Args:
        estimator: of the dataset's objects. dataset, detections: what to estimate. renderer: of this thread.
        counts: of Table VIII, below the number of templates that there are.
    """

    def __init__(
        self,
        estimator: PoseEstimator,
        dataset: BopDataset,
        detections: BopDetections,
        renderer: MeshRenderer,
        counts: Sequence[int] = TEMPLATE_COUNTS,
    ) -> None:
        self.estimator, self.dataset, self.detections = estimator, dataset, detections
        self._renderer = renderer
        self._meshes: dict[int, ObjectMesh] = {}
        self._symmetries: dict[int, np.ndarray] = {}
        size = len(next(iter(estimator.banks.values())))
        self._fewer = {
            count: PoseEstimator(
                estimator.model,
                {name: b.select(spread_viewpoints(count, size)) for name, b in estimator.banks.items()},
                estimator.settings,
                estimator.device,
            )
            for count in counts
            if count < size
        }

    def measure(self, scene_id: int, image_id: int) -> ImageRecord:
        """Rows of all variants, as csv lines in the record's ``extra``, and end-point errors."""
        problems = Problems()
        try:
            rgb = self.dataset.image(scene_id, image_id)
            camera = self.dataset.camera(scene_id, image_id)
        except (DatasetError, ImageError, CameraError) as error:
            problems.add("image that can't be used", str(error))
            return ImageRecord(scene_id, image_id, problems=problems.entries, failed=True)
        selection = self.detections.select(self.dataset.targets_of(scene_id, image_id), rgb.shape[:2])
        problems.entries += selection.problems.entries
        image = _Image(scene_id, image_id, rgb, camera, selection)
        lines: dict[str, list[str]] = {}
        errors: dict[str, list[float]] = {name: [] for name in EPE_STAGES}
        if selection.segments:
            for name, index, T in self._poses(image, errors):
                segment = selection.segments[index]
                row = BopRow.of_pose(scene_id, image_id, selection.obj_ids[index], segment.score, T, -1.0)
                lines.setdefault(name, []).append(row.line())
        extra = {"rows": lines, "epe": errors}
        return ImageRecord(scene_id, image_id, problems=problems.entries, extra=extra)

    def _poses(self, image: _Image, errors: dict[str, list[float]]) -> Iterator[tuple[str, int, np.ndarray]]:
        """(variant, index of the segment, T_cam_obj) of everything that gives a pose."""
        segments = image.selection.segments
        result = self.estimator.estimate(image.rgb, image.camera, segments, trace=True)
        truths = self.dataset.ground_truth(image.scene_id, image.image_id)
        visible = [self.dataset.mask(image.scene_id, image.image_id, k) for k in range(len(truths))]
        given: list[list[int]] = [[] for _ in segments]
        affines: list[list[np.ndarray]] = [[] for _ in segments]
        for trace in result.traces:
            index, first = trace.query.index, trace.hypotheses[0]
            poses: dict[str, np.ndarray | ObjectPose | None] = {
                answer(1): trace.answers[0],
                answer(self.estimator.settings.hypotheses): trace.answers[-1],
                stage(1): first.T_match,
                stage(2): first.T_affine,
            }
            for k in range(len(first.hypothesis.coarse)):
                earlier = after_block(first.hypothesis, k)
                poses[blocks(k + 1)] = self.estimator.answer(trace.query, earlier, image.camera)
            yield from _given(poses, index)
            template = first.hypothesis.template
            given[index] = [template, template]
            affines[index] = [np.eye(3), matched_affine(first.hypothesis, trace.query.bank.masks[template])]
            for name, error in self._endpoints(image, trace, truths, visible).items():
                errors[name].append(error)
        started = self.estimator.examine(image.rgb, image.camera, segments, given, affines)
        for index, trace in enumerate(started):
            if trace is not None and trace.hypotheses:
                names = start("identity"), start("stage 1")
                yield from _given(dict(zip(names, (one.answer for one in trace.hypotheses))), index)
        for count, estimator in self._fewer.items():
            for pose in estimator.estimate(image.rgb, image.camera, segments).poses:
                yield templates(count), pose.segment, pose.T_cam_obj

    def _endpoints(
        self,
        image: _Image,
        trace: SegmentTrace,
        truths: Sequence[GroundTruth],
        visible: Sequence[np.ndarray],
    ) -> dict[str, float]:
        """Mean end-point error of each stage over the cells that are visible, crop px, for the best match."""
        obj_id = image.selection.obj_ids[trace.query.index]
        mask = trace.query.segment.mask
        overlaps = {
            k: (mask & seen).sum() / max((mask | seen).sum(), 1)
            for k, (truth, seen) in enumerate(zip(truths, visible))
            if truth.obj_id == obj_id
        }
        best = max(overlaps, key=overlaps.__getitem__, default=None)
        if best is None or overlaps[best] < LEAST_OVERLAP:
            return {}
        bank, hypothesis = trace.query.bank, trace.hypotheses[0].hypothesis
        if obj_id not in self._meshes:
            self._meshes[obj_id] = load_object(self.dataset.models[obj_id])
            self._symmetries[obj_id] = bop_symmetries(self.dataset.symmetries(obj_id))
        T = truths[best].T_cam_obj
        camera = image.camera
        # Rendered, not measured: a sensor's depth is too coarse to say which cells are visible.
        depth = self._renderer.render(self._meshes[obj_id], T, camera.K, camera.width, camera.height).depth
        views = viewpoints(bank, T, self._symmetries[obj_id])
        true = true_map(
            bank,
            hypothesis.template,
            views.truths[hypothesis.template],
            camera.K,
            trace.query.M_crop_img,
            depth,
            visible[best],
        )
        found = endpoint_errors(hypothesis, true)
        return {name: float(found[name].mean()) for name in EPE_STAGES if len(found.get(name, ()))}


def _given(
    poses: Mapping[str, np.ndarray | ObjectPose | None], index: int
) -> Iterator[tuple[str, int, np.ndarray]]:
    for name, pose in poses.items():
        if pose is not None:
            yield name, index, pose.T_cam_obj if isinstance(pose, ObjectPose) else pose


# -- report ------------------------------------------------------------------------------------------------


def _paper(values: Mapping[str, Any], dataset: str, row: str, column: str) -> str:
    value = values.get(dataset, {}).get(row, {}).get(column)
    return "n/a" if value is None else share(value, 3) if column != "epe" else number(value, 1)


def read_paper(path: Path | None) -> dict[str, Any]:
    """The paper's values, typed off by who has the paper: dataset -> row -> column -> value.

    Raises:
        ConfigError: the file isn't of that form.
    """
    if path is None:
        return {}
    try:
        values = json.loads(path.read_text())
        for rows in values.values():
            for columns in rows.values():
                for value in columns.values():
                    float(value)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f'{path} can\'t be used ({error}): give JSON like {{"lmo": {{"stage 1": {{"ar": 0.1}}}}}}'
        ) from error
    return values


def markdown(report: Mapping[str, Any], paper: Mapping[str, Any] | None = None) -> str:
    """The tables of a report, beside the paper's values."""
    about, variants = report["tables"], report["variants"]
    values = paper or {}
    name, hypotheses = about["dataset"], about["hypotheses"]

    def cells(row: str, key: str, columns: Sequence[str]) -> list[str]:
        """Ours and the paper's, column by column; ``row`` is the paper's name for it, ``key`` ours."""
        result = []
        for column in columns:
            if column == "epe":
                error = report["epe"].get(row.removeprefix("stage "))
                own = "–" if error is None else number(error["mean"], 1)
            else:
                own = share(variants[key][column], 3) if key in variants else "–"
            result += [own, _paper(values, name, row, column)]
        return result

    def section(title: str, note: str, rows: Sequence[tuple[str, str]], columns: Mapping[str, str]) -> str:
        head = ["", *(part for words in columns.values() for part in (words, "paper"))]
        lines = [[row, *cells(row, key, list(columns))] for row, key in rows]
        return f"### {title}\n\n{note}\n\n" + table(head, lines)

    all_recalls = {"vsd": "AR VSD", "mssd": "AR MSSD", "mspd": "AR MSPD", "ar": "AR"}
    ar = {"ar": "AR"}
    counted = sorted({1, hypotheses})
    first = answer(1)
    known = [count for count in TEMPLATE_COUNTS if templates(count) in variants]
    parts = [
        f"`{name}`, {about['images']} images, {variants[first]['targets']} instances; preset "
        f"`{about['preset']}`, weights `{about['weights'][:16]}`, {about['viewpoints']} templates, "
        f"{about['estimator']['decode']} decode, scored by: {about['implementation']}. Recalls are "
        "shares of all instances; what got no pose counts as wrong.",
        section(
            "Table I: hypotheses",
            "What `picopose eval bop` writes with so many hypotheses.",
            [(answer(count), answer(count)) for count in counted],
            all_recalls,
        ),
        section(
            "Table IV: stages",
            "One hypothesis. The template as it is, put where the segment is; turned and placed by the "
            "affine; from PnP on the offsets. EPE: mean over the segments of the mean over the visible cells "
            "of the best template, crop px.",
            [(stage(1), stage(1)), (stage(2), stage(2)), (stage(3), first)],
            {"ar": "AR", "translation_5cm": "translation < 5 cm", "epe": "EPE, px"},
        ),
        section(
            "Table VI: what stage 3 starts from",
            "One hypothesis. No motion between the crops; the similarity that most of stage 1's matches "
            "agree on; stage 2's affine. The same weights, which were trained to start near stage 2's.",
            [
                ("identity", start("identity")),
                ("stage 1's matches", start("stage 1")),
                ("stage 2's affine", first),
            ],
            ar,
        ),
        section(
            "Table VII: offset blocks",
            "One hypothesis, the flow of the first blocks of the same network alone. (Whoever trains a "
            "network of fewer blocks gets another figure.)",
            [
                *((blocks(k), blocks(k)) for k in range(1, about["blocks"])),
                (blocks(about["blocks"]), first),
            ],
            ar,
        ),
        section(
            "Table VIII: templates",
            f"{answer(hypotheses).capitalize()}, of views spread evenly over the sphere.",
            [
                *((templates(count), templates(count)) for count in known),
                (templates(about["viewpoints"]), answer(hypotheses)),
            ],
            ar,
        ),
    ]
    if not values:
        parts.append(
            "The paper's values are not part of this package: type them into a JSON file for `--paper`."
        )
    return "\n\n".join(parts) + "\n"


# -- command -----------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_estimation_arguments(parser)
    parser.add_argument(
        "--implementation",
        choices=IMPLEMENTATIONS,
        default="auto",
        help="of the scores: the BOP toolkit where it is installed (auto), or our own",
    )
    parser.add_argument(
        "--paper",
        type=Path,
        metavar="VALUES.json",
        help='the paper\'s values to show beside: {"lmo": {"stage 1": {"ar": ...}}}',
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the tables, a csv of each variant, and what is done so far",
    )


def run(args: argparse.Namespace) -> int:
    """Measure what isn't measured yet and write the tables; 1 if an image could not be used.

    Raises:
        PicoPoseError: input that can't be used, or a folder with another run.
    """
    paper = read_paper(args.paper)
    chosen = implementation(args.implementation)
    dataset = BopDataset(args.root, args.dataset, args.split)
    detections = BopDetections(args.detections)
    images = dataset.images[: args.limit]
    if not images:
        raise DatasetError(f"{dataset.targets_path}: asks for nothing")
    check_objects(dataset)
    settings = EstimatorSettings(
        args.hypotheses, args.decode, min_mask_pixels=MIN_MASK_PIXELS, precision=args.precision
    )
    preset = args.preset or preset_of(args.weights)
    model = load_model(preset, args.weights, torch_device(args.device))
    about: dict[str, Any] = {
        "version": __version__,
        "dataset": dataset.name,
        "split": dataset.split_dir.name,
        "detections": hashlib.sha256(args.detections.read_bytes()).hexdigest()[:16],
        "preset": preset,
        "weights": model_fingerprint(model),
        "viewpoints": args.viewpoints,
        "hypotheses": args.hypotheses,
        "estimator": asdict(settings),
    }
    journal = Journal(args.out, about)
    try:
        records = {key: record for key, record in journal.read().items() if not record.failed}
        missing = [key for key in images if key not in records]
        if missing:
            estimator = load_bop_estimator(
                dataset, model, settings, args.device, args.viewpoints, args.cache_dir
            )
            bar = progress_bar(None, len(images), unit="image", initial=len(images) - len(missing))
            with MeshRenderer() as renderer, bar:
                measured = Tables(estimator, dataset, detections, renderer)
                for key in missing:
                    records[key] = measured.measure(*key)
                    journal.add(records[key])
                    bar.update()
    finally:
        journal.close()
    failed = [key for key in images if records[key].failed]
    if len(failed) == len(images):
        reason = records[images[0]].problems[0][1]
        raise DatasetError(f"none of the {len(images)} images could be used: {reason}")
    report = _report(args, about, dataset, [records[key] for key in images], images, chosen)
    write_atomically(args.out / "tables.json", report)
    text = markdown(report, paper)
    write_atomically(args.out / "tables.md", text)
    print(text)
    problems = Problems([*detections.problems.entries, *(e for k in images for e in records[k].problems)])
    for line in problems.lines():
        print(line, file=sys.stderr)
    return 1 if failed else 0


def _report(
    args: argparse.Namespace,
    about: Mapping[str, Any],
    dataset: BopDataset,
    records: Sequence[ImageRecord],
    images: Sequence[tuple[int, int]],
    chosen: Any,
) -> dict[str, Any]:
    """Score every variant; the csv of each stays in the folder."""
    rows: dict[str, list[BopRow]] = {answer(1): [], answer(args.hypotheses): []}
    errors: dict[str, list[float]] = {name: [] for name in EPE_STAGES}
    for record in records:
        for name, lines in record.extra.get("rows", {}).items():
            where = f"journal, scene {record.scene_id} image {record.image_id}"
            rows.setdefault(name, []).extend(parse_row(line, where) for line in lines)
        for name, values in record.extra.get("epe", {}).items():
            errors[name] += values
    variants = {}
    with Scorer(dataset, chosen) as scorer:
        for name, own in progress_bar(rows.items(), unit="variant"):
            variants[name] = scorer.score(own, images)["overall"]
            file = name.replace(": ", "-").replace(" ", "_")
            write_results(args.out / f"{file}_{dataset.name}-{dataset.split_dir.name}.csv", own)
    epe = {
        name: {"segments": len(values), "mean": float(np.mean(values)), "median": float(np.median(values))}
        for name, values in errors.items()
        if values
    }
    counts = [name for name in rows if name.endswith((" block", " blocks"))]
    return plain(
        {
            "tables": {
                **about,
                "images": len(images),
                "failed_images": [list(key) for key, r in zip(images, records) if r.failed],
                "blocks": len(counts) + 1,
                "implementation": chosen.name,
            },
            "variants": variants,
            "epe": epe,
        }
    )

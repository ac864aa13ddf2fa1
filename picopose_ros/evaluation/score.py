"""``picopose eval score``: how good the poses of a results csv are, as the BOP Challenge 2019 measures it.

The 6D localisation task: an image, an object and how many instances of it are asked for. That
many estimates with the highest scores count. That many of the most visible true instances are to be found;
an estimate finds a free instance if its error is below a threshold. A recall is the share that is found,
an average recall the mean over all thresholds, AR the mean of those of VSD, MSSD and MSPD.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from picopose_ros import __version__
from picopose_ros.errors import DatasetError
from picopose_ros.evaluation.bop.dataset import BopDataset, GroundTruth
from picopose_ros.evaluation.bop.errors import (
    IMPLEMENTATIONS,
    THRESHOLDS,
    VSD_DELTAS,
    Implementation,
    Model,
    Own,
    View,
    implementation,
)
from picopose_ros.evaluation.bop.results import BopRow, read_results
from picopose_ros.evaluation.bop.setup import add_dataset_arguments
from picopose_ros.evaluation.metrics import ADD_SHARES, VSD_DELTA, VSD_TAUS
from picopose_ros.evaluation.report import check_writable, number, plain, share, table, write_atomically
from picopose_ros.progress import progress_bar
from picopose_ros.templates.renderer import MeshRenderer


@dataclass(frozen=True, eq=False)
class Group:
    """What is asked for of one object in one image, and what was answered.

    Attributes:
        estimates: those that count, highest score first. truths: the instances that are to be found.
    """

    scene_id: int
    image_id: int
    obj_id: int
    estimates: list[BopRow]
    truths: list[GroundTruth]


def make_group(
    scene_id: int,
    image_id: int,
    obj_id: int,
    count: int,
    rows: Sequence[BopRow],
    truths: Sequence[GroundTruth],
) -> Group:
    """Choose what counts.

    Args:
        count: instances that are asked for. rows: all estimates of the object in the image.
        truths: all true instances in the image.

    Raises:
        DatasetError: it isn't known which instances are the most visible ones.
    """
    best = sorted(rows, key=lambda row: row.score, reverse=True)[:count]
    own = [truth for truth in truths if truth.obj_id == obj_id]
    if len(own) > count:
        if any(truth.visib_fract is None for truth in own):
            raise DatasetError(
                f"scene {scene_id}, image {image_id} shows object {obj_id} {len(own)} times and {count} are "
                "asked for, the most visible ones; give the scene its scene_gt_info.json"
            )
        chosen = sorted(range(len(own)), key=lambda k: own[k].visib_fract, reverse=True)[:count]
        own = [own[k] for k in sorted(chosen)]
    return Group(scene_id, image_id, obj_id, best, own)


def groups(
    dataset: BopDataset, rows: Sequence[BopRow], images: Sequence[tuple[int, int]] | None = None
) -> Iterator[Group]:
    """Of all targets of a dataset, or of some images (scene, image) only; scene by scene.

    Raises:
        DatasetError: a file of the dataset can't be used.
    """
    by_key: dict[tuple[int, int, int], list[BopRow]] = {}
    for row in rows:
        by_key.setdefault((row.scene_id, row.im_id, row.obj_id), []).append(row)
    for scene_id, image_id in dataset.images if images is None else images:
        truths = dataset.ground_truth(scene_id, image_id)
        for target in dataset.targets_of(scene_id, image_id):
            own = by_key.get((scene_id, image_id, target.obj_id), [])
            yield make_group(scene_id, image_id, target.obj_id, target.inst_count, own, truths)


@dataclass
class Tally:
    """How many instances were to be found, and how many were at each threshold."""

    targets: int = 0
    hits: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, targets: int, hits: Mapping[str, np.ndarray]) -> None:
        """Count the hits of so many more targets."""
        self.targets += targets
        for name, counts in hits.items():
            self.hits[name] = self.hits.get(name, 0) + counts

    def recalls(self) -> dict[str, Any]:
        """The figures, in plain types; NaN without targets."""
        means = {
            name: float(np.mean(self.hits[name]) / self.targets) if self.targets else float("nan")
            for name in THRESHOLDS
        }
        return {
            "targets": self.targets,
            **{name: means[name] for name in ("vsd", "mssd", "mspd")},
            "ar": float(np.mean([means["vsd"], means["mssd"], means["mspd"]])),
            **dict(zip(ADD_SHARES, self.hits["add"] / self.targets if self.targets else [float("nan")] * 3)),
            "translation_5cm": means["translation"],
        }


def hits_of(
    implementation: Implementation, errors: Mapping[str, np.ndarray], scores: Sequence[float]
) -> dict[str, np.ndarray]:
    """How many instances of a group are found: (t,) per error, for VSD (tolerances, t)."""
    hits = {
        name: implementation.found(errors[name], scores, thresholds)
        for name, thresholds in THRESHOLDS.items()
        if name != "vsd"
    }
    vsd = errors["vsd"]
    hits["vsd"] = np.stack(
        [implementation.found(vsd[..., k], scores, THRESHOLDS["vsd"]) for k in range(len(VSD_TAUS))]
    )
    return hits


class Scorer:
    """Scores rows against a dataset. To be closed, as its renderer is.

    Args:
        dataset: with depth images. implementation: of errors and matching.
    """

    def __init__(self, dataset: BopDataset, implementation: Implementation | None = None) -> None:
        self.dataset = dataset
        self.implementation: Implementation = implementation or Own()
        self._models: dict[int, Model] = {}
        self._renderer = MeshRenderer()
        self._view: tuple[tuple[int, int], View] | None = None

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *reason: object) -> None:
        self._renderer.close()

    def model(self, obj_id: int) -> Model:
        """What errors of an object are measured with.

        Raises:
            DatasetError, MeshError: there is no such object, or its model can't be used.
        """
        if obj_id not in self._models:
            self._models[obj_id] = Model(self.dataset, obj_id)
        return self._models[obj_id]

    def view(self, scene_id: int, image_id: int) -> View:
        """The image; the last one is kept.

        Raises:
            DatasetError: the camera or the depth image can't be used.
        """
        key = scene_id, image_id
        if self._view is None or self._view[0] != key:
            view = View(
                self.dataset.camera(*key),
                self.dataset.depth(*key),
                self._renderer,
                VSD_DELTAS.get(self.dataset.name, VSD_DELTA),
            )
            self._view = key, view
        return self._view[1]

    def hits(self, group: Group) -> dict[str, np.ndarray]:
        """How many instances of a group are found, per error and threshold."""
        estimates = [row.T_cam_obj for row in group.estimates]
        truths = [truth.T_cam_obj for truth in group.truths]
        if not estimates or not truths:
            shape = len(estimates), len(truths)
            errors = {name: np.full(shape, np.inf) for name in THRESHOLDS}
            errors["vsd"] = np.ones((*shape, len(VSD_TAUS)))
        else:
            view = self.view(group.scene_id, group.image_id)
            errors = self.implementation.errors(self.model(group.obj_id), view, estimates, truths)
        return hits_of(self.implementation, errors, [row.score for row in group.estimates])

    def score(
        self,
        rows: Sequence[BopRow],
        images: Sequence[tuple[int, int]] | None = None,
        progress: bool = False,
    ) -> dict[str, Any]:
        """All figures of the rows, over all targets, or those of some images (scene, image), and by object.

        Raises:
            DatasetError, MeshError, RenderError: a file of the dataset can't be used, or nothing rendered.
        """
        total, by_object = Tally(), dict[int, Tally]()
        used = 0
        bar = progress_bar(groups(self.dataset, rows, images), unit="target", hidden=not progress)
        for group in bar:
            hits = self.hits(group)
            used += len(group.estimates)
            total.add(len(group.truths), hits)
            by_object.setdefault(group.obj_id, Tally()).add(len(group.truths), hits)
        return {
            "overall": total.recalls(),
            "objects": {str(obj_id): tally.recalls() for obj_id, tally in sorted(by_object.items())},
            "recall_by_threshold": {
                name: (hits / max(total.targets, 1)).tolist() for name, hits in sorted(total.hits.items())
            },
            "rows": {"given": len(rows), "counted": used, "not asked for": len(rows) - used},
        }


def time_per_image(rows: Sequence[BopRow]) -> tuple[float | None, str | None]:
    """The mean time of an image in seconds, None where it is not given; what is wrong with the times."""
    times: dict[tuple[int, int], float] = {}
    for row in rows:
        if row.time < 0:
            return None, None
        before = times.setdefault((row.scene_id, row.im_id), row.time)
        if abs(before - row.time) > 0.001:
            return None, (
                f"the rows of scene {row.scene_id}, image {row.im_id} have several times; BOP wants one per "
                "image and its server refuses the file"
            )
    return (float(np.mean(list(times.values()))) if times else None), None


def recall_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Figures of `Tally.recalls`, one line each with its name, as Markdown."""
    head = ["", "targets", "AR VSD", "AR MSSD", "AR MSPD", "AR"]
    head += [*(f"ADD(-S) < {s:g} d" for s in ADD_SHARES.values()), "translation < 5 cm"]
    keys = ("vsd", "mssd", "mspd", "ar", *ADD_SHARES, "translation_5cm")
    return table(
        head,
        [[name, str(cut["targets"]), *(share(_given(cut[key]), 3) for key in keys)] for name, cut in rows],
    )


def _given(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else value


def markdown(report: Mapping[str, Any]) -> str:
    """The table of a report."""
    rows = [(f"object {name}", cut) for name, cut in report["objects"].items()]
    rows.append(("**all**", report["overall"]))
    about = report["score"]
    seconds = about["seconds_per_image"]
    note = (
        f"`{about['results']}` on `{about['dataset']}`, {report['rows']['counted']} of "
        f"{report['rows']['given']} rows counted, implementation: {about['implementation']}"
    )
    note += "." if seconds is None else f"; {number(seconds, 3)} s per image."
    return note + "\n\n" + recall_table(rows) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("results", type=Path, metavar="RESULTS.csv", help="poses in the challenge's form")
    add_dataset_arguments(parser)
    parser.add_argument(
        "--implementation",
        choices=IMPLEMENTATIONS,
        default="auto",
        help="the BOP toolkit where it is installed (auto), it and nothing else, or our own",
    )
    parser.add_argument(
        "--out", type=Path, metavar="SCORES.json", help="report to write; beside the results by default"
    )


def run(args: argparse.Namespace) -> int:
    """Score a results file.

    Raises:
        PicoPoseError: input that can't be used, or a report that can't be written.
    """
    out = args.out or args.results.with_suffix(".scores.json")
    check_writable(out)
    chosen = implementation(args.implementation)
    rows = read_results(args.results)
    dataset = BopDataset(args.root, args.dataset, args.split)
    seconds, problem = time_per_image(rows)
    with Scorer(dataset, chosen) as scorer:
        report = {
            "score": {
                "version": __version__,
                "results": args.results.name,
                "dataset": dataset.name,
                "implementation": chosen.name,
                "seconds_per_image": seconds,
            },
            **scorer.score(rows, progress=True),
        }
    report = plain(report)
    write_atomically(out, report)
    print(markdown(report))
    ignored = report["rows"]["not asked for"]
    if ignored:
        print(
            f"{ignored} rows are of images or objects that aren't asked for, or more than are asked for",
            file=sys.stderr,
        )
    if problem:
        print(problem, file=sys.stderr)
    return 0

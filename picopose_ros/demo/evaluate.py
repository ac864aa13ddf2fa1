"""Compare the poses in a recording with the true ones beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from picopose_ros.demo.world import TRUTH_PREFIX
from picopose_ros.errors import BagError
from picopose_ros.evaluation.consistency import Consistency, consistency
from picopose_ros.evaluation.metrics import ADD_SHARES, PoseErrors, match_by_position, pose_errors
from picopose_ros.messages import bags
from picopose_ros.templates.meshes import ObjectMesh

MOST_POINTS = 2000
LEAST_VISIBLE = 0.1
"""An instance that is hidden more than this leaves is not asked for, as in BOP."""


@dataclass(frozen=True)
class Detected:
    """One pose of a recording."""

    class_id: str
    name: str  # of the instance
    score: float
    T_cam_obj: np.ndarray  # (4, 4)
    covariance: np.ndarray | None = None  # (6, 6) in ROS's order


@dataclass(frozen=True)
class Recording:
    """Poses of a recording by image stamp (ns)."""

    truth: dict[int, dict[str, np.ndarray]]  # instance name -> T_cam_obj (4, 4)
    detections: dict[int, list[Detected]]
    transforms: dict[int, set[str]]  # TF frames that were published beside the truth's


@dataclass(frozen=True)
class Row:
    """Figures of one class, or of several together."""

    name: str
    instances: int  # instance-frames that were visible
    detected: int  # of them with a pose of their class
    recall: float  # share with ADD(-S) below a tenth of the diameter; a missing pose counts as wrong
    recall_05d: float  # below a twentieth
    recall_02d: float  # below a fiftieth
    rotation_deg: float | None  # median over the detected
    translation_mm: float | None  # median over the detected
    visible: float  # mean visible share
    seen_in_training: bool | None = None  # None for rows over several classes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass
class _Tally:
    visible: list[float] = field(default_factory=list)
    errors: list[PoseErrors | None] = field(default_factory=list)

    def row(self, name: str, seen: bool | None = None) -> Row:
        found = [error for error in self.errors if error is not None]

        def share(of_diameter: float) -> float:
            return sum(error.within(of_diameter) for error in found) / max(len(self.errors), 1)

        return Row(
            name=name,
            instances=len(self.errors),
            detected=len(found),
            recall=share(ADD_SHARES["add"]),
            recall_05d=share(ADD_SHARES["add_05d"]),
            recall_02d=share(ADD_SHARES["add_02d"]),
            rotation_deg=float(np.median([error.rotation_deg for error in found])) if found else None,
            translation_mm=float(1e3 * np.median([error.translation for error in found])) if found else None,
            visible=float(np.mean(self.visible)) if self.visible else 0.0,
            seen_in_training=seen,
        )


def read_recording(path: str | Path, detections_topic: str = "/detections") -> Recording:
    """Read truth and answers from a bag.

    Raises:
        BagError: the bag can't be read or holds no true poses.
    """
    recording = Recording({}, {}, {})
    with bags.BagReader(path) as reader:
        for connection, _, message in reader.messages(["/tf", detections_topic]):
            if connection.topic == "/tf":
                for transform in message.transforms:
                    stamp, child = bags.stamp_of(transform), transform.child_frame_id
                    if child.startswith(TRUTH_PREFIX):
                        T = bags.matrix_from(transform.transform.translation, transform.transform.rotation)
                        recording.truth.setdefault(stamp, {})[child.removeprefix(TRUTH_PREFIX)] = T
                    else:
                        recording.transforms.setdefault(stamp, set()).add(child)
                continue
            recording.detections[bags.stamp_of(message)] = [
                Detected(
                    detection.results[0].hypothesis.class_id,
                    detection.id,
                    detection.results[0].hypothesis.score,
                    bags.matrix_from(
                        detection.results[0].pose.pose.position, detection.results[0].pose.pose.orientation
                    ),
                    np.asarray(detection.results[0].pose.covariance, np.float64).reshape(6, 6),
                )
                for detection in message.detections
            ]
    if not recording.truth:
        raise BagError(f"bag {path} holds no true poses: /tf has no frame under {TRUTH_PREFIX}")
    return recording


def class_of(instance: str) -> str:
    """Class of an instance's name ``<class>_<n>``."""
    return instance.rsplit("_", 1)[0]


def compare(
    recording: Recording,
    meshes: Mapping[str, ObjectMesh],
    visible: Sequence[Mapping[str, float]] | None = None,
    seen: Mapping[str, bool] | None = None,
) -> list[Row]:
    """Figures per class, then over what training saw, what it did not see, and all.

    Args:
        recording: see :func:`read_recording`.
        meshes: by class id.
        visible: per frame in stamp order: instance name -> visible share; all are asked for if None.
        seen: class id -> whether training may have seen it; leaves out the rows over groups if None.
    """
    tallies = {class_id: _Tally() for class_id in sorted(meshes)}
    points = {name: _surface_points(mesh) for name, mesh in meshes.items()}
    symmetries = {name: mesh.spec.symmetries.transforms() for name, mesh in meshes.items()}
    for name, share, truth, found in _asked_for(recording, visible):
        class_id = class_of(name)
        if class_id not in tallies:
            continue
        tallies[class_id].visible.append(share)
        tallies[class_id].errors.append(
            None
            if found is None
            else pose_errors(
                points[class_id], meshes[class_id].diameter, found.T_cam_obj, truth, symmetries[class_id]
            )
        )
    rows = [tally.row(name, None if seen is None else seen.get(name)) for name, tally in tallies.items()]
    groups = {"all objects": lambda name: True}
    if seen is not None:
        groups = {
            "seen in training": lambda name: bool(seen.get(name)),
            "never seen": lambda name: not seen.get(name),
            **groups,
        }
    for title, belongs in groups.items():
        total = _Tally()
        for name, tally in tallies.items():
            if belongs(name):
                total.visible += tally.visible
                total.errors += tally.errors
        rows.append(total.row(title))
    return rows


def honesty(
    recording: Recording,
    meshes: Mapping[str, ObjectMesh],
    visible: Sequence[Mapping[str, float]] | None = None,
) -> Consistency | None:
    """Whether the poses are as uncertain as their covariances say; None where nothing can be compared.

    Arguments as for :func:`compare`. Poses that are altogether wrong are left out and counted.
    """
    estimates, covariances, truths, symmetries = [], [], [], []
    for name, _, truth, found in _asked_for(recording, visible):
        mesh = meshes.get(class_of(name))
        if mesh is not None and found is not None and found.covariance is not None:
            estimates.append(found.T_cam_obj)
            covariances.append(found.covariance)
            truths.append(truth)
            symmetries.append(mesh.spec.symmetries)
    if not estimates:
        return None
    try:
        return consistency(np.stack(estimates), np.stack(covariances), np.stack(truths), symmetries)
    except ValueError:  # all of them are altogether wrong
        return None


def names_kept(
    recording: Recording, visible: Sequence[Mapping[str, float]] | None = None
) -> dict[str, list[str]]:
    """For every true instance the names that it was published under, in order of appearance.

    One name is how it should be. Arguments as for :func:`compare`.
    """
    return {name: list(dict.fromkeys(had)) for name, had in names_in_turn(recording, visible).items()}


def names_in_turn(
    recording: Recording, visible: Sequence[Mapping[str, float]] | None = None
) -> dict[str, list[str]]:
    """For every true instance the name in each image in which it was published, in the images' order.

    Arguments as for :func:`compare`.
    """
    names: dict[str, list[str]] = {}
    for name, _, _, found in _asked_for(recording, visible):
        had = names.setdefault(name, [])
        if found is not None:
            had.append(found.name)
    return names


def _asked_for(
    recording: Recording, visible: Sequence[Mapping[str, float]] | None
) -> Iterator[tuple[str, float, np.ndarray, Detected | None]]:
    """Name, visible share, true pose and the answer, if there is one, of every instance in every frame that
    is not too hidden."""
    for index, (stamp, truth) in enumerate(sorted(recording.truth.items())):
        for class_id in sorted({class_of(name) for name in truth}):
            names = [name for name in truth if class_of(name) == class_id]
            found = [d for d in recording.detections.get(stamp, []) if d.class_id == class_id]
            matched = match_by_position([d.T_cam_obj for d in found], [truth[name] for name in names])
            for name, k in zip(names, matched, strict=True):
                share = 1.0 if visible is None else visible[index].get(name, 0.0)
                if share >= LEAST_VISIBLE:
                    yield name, share, truth[name], None if k is None else found[k]


def _surface_points(mesh: ObjectMesh) -> np.ndarray:
    vertices = np.unique(np.round(mesh.vertices, 7), axis=0)
    if len(vertices) <= MOST_POINTS:
        return vertices
    return vertices[np.random.default_rng(0).choice(len(vertices), MOST_POINTS, replace=False)]


def table(rows: Sequence[Row]) -> str:
    """The rows as text for a terminal."""
    head = f"{'object':<18}{'seen':>6}{'frames':>8}{'found':>7}{'visible':>9}"
    head += f"{'ADD<0.1d':>10}{'<.05d':>7}{'<.02d':>7}{'rot deg':>9}{'trans mm':>10}"
    lines, rule = [head], "-" * len(head)
    for row in rows:
        if row.seen_in_training is None and rule not in lines:
            lines.append(rule)
        seen = {True: "yes", False: "no", None: ""}[row.seen_in_training]
        rotation = "-" if row.rotation_deg is None else f"{row.rotation_deg:.1f}"
        translation = "-" if row.translation_mm is None else f"{row.translation_mm:.1f}"
        lines.append(
            f"{row.name:<18}{seen:>6}{row.instances:>8}{row.detected:>7}{row.visible:>9.2f}{row.recall:>10.2f}"
            f"{row.recall_05d:>7.2f}{row.recall_02d:>7.2f}"
            f"{rotation:>9}{translation:>10}"
        )
    return "\n".join(lines)

"""The benchmark's images: rendered scenes whose poses, masks and depth are known exactly.

Three kinds. ``single`` (:mod:`picopose_ros.evaluation.single`) shows one object with the disturbances of
training in a full-size image, from anywhere and at any turn. ``cluttered``
(:mod:`picopose_ros.evaluation.tabletop`) is a table with several objects of the folder and strange ones
between them, with lamps, shadows and highlights that training never renders. ``cut``
(:mod:`picopose_ros.evaluation.cut`) is ``single`` with an image that ends within the object.

How hard they are is fixed by the constants of those modules. It was fixed before any network was measured and
is never tuned to one: figures of different :data:`BENCHMARK_VERSION` cannot be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from picopose_ros.errors import ConfigError
from picopose_ros.evaluation.cut import CutScenes
from picopose_ros.evaluation.report import write_atomically
from picopose_ros.evaluation.single import SingleScenes
from picopose_ros.evaluation.tabletop import TableScenes
from picopose_ros.synthetic.studio import Scene, SceneInstance
from picopose_ros.templates.meshes import ObjectMesh
from picopose_ros.templates.renderer import MeshRenderer

__all__ = [
    "BENCHMARK_VERSION",
    "KINDS",
    "Difficulty",
    "Scene",
    "SceneInstance",
    "difficulty",
    "difficulty_figure",
    "make_scenes",
]

BENCHMARK_VERSION = 1
"""Changes with everything that changes the images of a seed."""

Kind = Literal["single", "cluttered", "cut"]
KINDS: tuple[Kind, ...] = ("single", "cluttered", "cut")


def make_scenes(
    objects: Sequence[ObjectMesh],
    count: int,
    seed: int,
    kind: Kind = "single",
    background: bool = True,
    start: int = 0,
) -> Iterator[Scene]:
    """Render scenes ``start`` to ``start + count - 1`` of a seed.

    Scene ``i`` depends on the objects, the seed and ``i`` only, so a run can be split. Objects are dealt
    evenly: ``single`` and ``cut`` show object ``i % n``; ``cluttered`` deals all objects out before it shows
    one again.

    Args:
        objects: as the mesh reader gives them.
        count: number of scenes.
        seed: of everything random.
        kind: "single", "cluttered" or "cut".
        background: False leaves everything black that is no object (a table stays a table).
        start: number of the first scene.
    Raises:
        ConfigError: no objects, another kind, or a negative number.
        RenderError: there is no OpenGL.
    """
    if kind not in KINDS:
        raise ConfigError(f"scenes of kind {kind!r} do not exist: use one of {', '.join(KINDS)}")
    if not objects or min(count, start, seed) < 0:
        raise ConfigError(
            f"cannot make {count} scenes from number {start} on of seed {seed} with {len(objects)} objects: "
            "numbers must not be negative, and there must be an object"
        )
    return _rendered(objects, range(start, start + count), seed, kind, background)


def _rendered(
    objects: Sequence[ObjectMesh], numbers: range, seed: int, kind: Kind, background: bool
) -> Iterator[Scene]:
    with MeshRenderer() as renderer:
        if kind == "single":
            maker: SingleScenes | TableScenes | CutScenes = SingleScenes(renderer, objects, background)
        elif kind == "cut":
            maker = CutScenes(renderer, objects, background)
        else:
            maker = TableScenes(renderer, objects)
        for index in numbers:
            yield maker.scene(seed, index)


@dataclass(frozen=True)
class Difficulty:
    """How hard one instance is to see."""

    visible: float
    """Share of its silhouette that is visible."""
    distance: float
    """Of its bounding-box centre from the camera, in its diameters."""
    pixels: float
    """Longer side of the visible part's bounding box."""


def difficulty(scene: Scene, objects: Mapping[str, ObjectMesh]) -> list[Difficulty]:
    """How hard the instances of a scene are; ``objects`` by class id."""
    found = []
    for instance in scene.instances:
        mesh = objects[instance.class_id]
        centre = instance.T_cam_obj[:3, :3] @ mesh.centre + instance.T_cam_obj[:3, 3]
        rows, columns = np.nonzero(instance.visible)
        side = max(np.ptp(rows), np.ptp(columns)) + 1
        found.append(
            Difficulty(instance.visib_fract, float(np.linalg.norm(centre)) / mesh.diameter, float(side))
        )
    return found


def difficulty_figure(instances: Sequence[Difficulty], path: str | Path) -> None:
    """Draw histograms of visibility, distance and size into a PNG.

    Raises:
        ConfigError: there are no instances, or the file can't be written.
    """
    if not instances:
        raise ConfigError("no instances to draw: make more scenes")
    panels = (
        ("visible share", [one.visible for one in instances], np.linspace(0, 1, 11), "{:.1f}"),
        ("distance / diameter", [one.distance for one in instances], np.linspace(0, 12, 13), "{:.0f}"),
        ("longer side, px", [one.pixels for one in instances], np.linspace(0, 480, 13), "{:.0f}"),
    )
    picture = np.hstack([_histogram(*panel) for panel in panels])
    _, coded = cv2.imencode(".png", picture)
    write_atomically(Path(path), coded.tobytes())


def _histogram(title: str, values: Sequence[float], edges: np.ndarray, form: str) -> np.ndarray:
    """(300, 400, 3) uint8; what lies beyond the last edge counts in the last bar."""
    width, height, left, base, top = 400, 300, 44, 250, 44
    picture = np.full((height, width, 3), 255, np.uint8)
    ink, font = (60, 60, 60), cv2.FONT_HERSHEY_SIMPLEX
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    step = (width - left - 16) / len(counts)
    for number, count in enumerate(counts):
        x0, x1 = round(left + number * step), round(left + (number + 1) * step) - 2
        y = base - round((base - top) * count / max(counts.max(), 1))
        cv2.rectangle(picture, (x0, y), (x1, base), (170, 120, 60), -1)
    for number, edge in enumerate(edges):
        if number % 2 == 0:
            at = (round(left + number * step) - 10, base + 18)
            cv2.putText(picture, form.format(edge), at, font, 0.4, ink, 1, cv2.LINE_AA)
    cv2.line(picture, (left, base), (width - 14, base), ink, 1)
    cv2.putText(picture, str(counts.max()), (6, top + 6), font, 0.4, ink, 1, cv2.LINE_AA)
    title = f"{title} (n = {len(values)}, median {np.median(values):.3g})"
    cv2.putText(picture, title, (left, 24), font, 0.42, ink, 1, cv2.LINE_AA)
    return picture

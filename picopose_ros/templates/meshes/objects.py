"""What a mesh directory is read into: the objects, their meshes in metres, their symmetries."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import trimesh

from picopose_ros.templates.meshes.diameter import diameter
from picopose_ros.templates.meshes.units import metres_per_unit


@dataclass(frozen=True, eq=False)
class Symmetries:
    """Motions that leave an object looking the same, in its own frame, in metres."""

    discrete: tuple[np.ndarray, ...] = ()
    """(4, 4) float64 transforms without the identity."""
    continuous: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    """Rotations by any angle: (axis (3,) unit vector, offset (3,) a point on the axis)."""

    def transforms(self, step_deg: float = 5.0) -> np.ndarray:
        """All symmetries (S, 4, 4) float64, identity first; continuous ones every ``step_deg`` degrees."""
        result = [np.eye(4), *self.discrete]
        for axis, offset in self.continuous:
            turns = []
            for angle in np.arange(0.0, 360.0, step_deg)[1:]:
                turn = trimesh.transformations.rotation_matrix(np.deg2rad(angle), axis, offset)
                turns.append(turn)
            result += [turn @ other for other in list(result) for turn in turns]
        return np.stack(result)


@dataclass(frozen=True)
class ObjectSpec:
    """One object of a mesh directory: where its mesh is and how to read it."""

    class_id: str
    """Name of the mesh file without suffix, or of the folder that holds it."""
    path: Path
    unit: str = "m"
    """Of the numbers in the file: a key of `UNITS`, or what the file states ("0.3048 m")."""
    symmetries: Symmetries = field(default_factory=Symmetries, compare=False)
    frame_id: str | None = None
    """TF frame to publish; None: made from the class."""
    aliases: tuple[str, ...] = ()
    """Further class ids under which a segmenter may send this object."""

    @property
    def tf_base(self) -> str:
        """What the names of its instances' TF frames begin with; a number follows."""
        return self.frame_id or self.class_id

    @property
    def metres_per_unit(self) -> float:
        """What the numbers in the file are multiplied with."""
        return metres_per_unit(self.unit)


@dataclass(frozen=True, eq=False)
class ObjectMesh:
    """A mesh in metres, in the frame of its file."""

    spec: ObjectSpec
    parts: list[trimesh.Trimesh]
    """Its geometries, transforms applied; each with its own vertex colours, face colours or material."""
    warnings: list[str] = field(default_factory=list)
    """What looks wrong but can be used, one sentence each."""

    @cached_property
    def vertices(self) -> np.ndarray:
        """(V, 3) float64, all parts."""
        return np.concatenate([np.asarray(part.vertices, dtype=np.float64) for part in self.parts])

    @cached_property
    def faces(self) -> np.ndarray:
        """(F, 3) int64 indices into `vertices`."""
        starts = np.cumsum([0] + [len(part.vertices) for part in self.parts[:-1]])
        return np.concatenate([part.faces + start for part, start in zip(self.parts, starts, strict=True)])

    @cached_property
    def bounds(self) -> np.ndarray:
        """(2, 3) lowest and highest corner of the axis-aligned bounding box."""
        return np.stack([self.vertices.min(axis=0), self.vertices.max(axis=0)])

    @property
    def centre(self) -> np.ndarray:
        """(3,) centre of the bounding box."""
        return self.bounds.mean(axis=0)

    @property
    def extents(self) -> np.ndarray:
        """(3,) sides of the bounding box."""
        return self.bounds[1] - self.bounds[0]

    @property
    def diagonal(self) -> float:
        """Length of the bounding box's diagonal."""
        return float(np.linalg.norm(self.extents))

    @cached_property
    def diameter(self) -> float:
        """Largest distance between two vertices, see `diameter.diameter`."""
        return diameter(self.vertices)

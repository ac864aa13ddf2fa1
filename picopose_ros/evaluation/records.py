"""What the synthetic benchmark keeps of each query."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from picopose_ros.evaluation.metrics import BopErrors, PoseErrors
from picopose_ros.evaluation.sheets import Shot

SUBSTITUTIONS = (
    "nothing",
    "template",
    "affine",
    "flow",
    "certainty",
    "template and affine",
    "template, affine and flow",
    "everything",
)
"""What is replaced by the truth, with one hypothesis. The affine is the one that fits the true
correspondences best; the flow is replaced where the surface is visible; the certainty says exactly that."""


@dataclass(frozen=True)
class PoseFigures:
    """All errors of one pose."""

    errors: PoseErrors
    bop: BopErrors
    source: str  # "offsets" or "affine"; of stages 1 and 2 their own


@dataclass(frozen=True)
class PairFigures:
    """What stages 2 and 3 made of one template."""

    endpoints: dict[str, np.ndarray]  # stage -> errors of the visible cells, crop px
    certainty: dict[str, int]


@dataclass
class Record:
    """Everything that is measured on one query; a figure that does not exist is None or absent."""

    scene: str
    class_id: str
    visible: float
    template_deg: float | None = None  # viewpoint error of the best match
    best_of_five_deg: float | None = None
    poses: dict[str, PoseFigures | None] = field(default_factory=dict)
    retrieved: PairFigures | None = None  # with the best match
    given: PairFigures | None = None  # with the template nearest to the truth
    confidence: float = 0.0  # of the published pose
    right_scores: list[float] = field(default_factory=list)
    far_scores: list[float] = field(default_factory=list)
    other_scores: list[float] = field(default_factory=list)
    substituted: dict[str, bool] = field(default_factory=dict)
    shot: Shot | None = None

    def correct(self, pose: str) -> bool:
        """Whether a pose has an ADD(-S) below a tenth of the diameter."""
        figures = self.poses.get(pose)
        return figures is not None and figures.errors.correct

    def from_offsets(self, pose: str) -> bool:
        """Whether a pose is stage 3's and not the fallback to stage 2's."""
        figures = self.poses.get(pose)
        return figures is not None and figures.source == "offsets"


def answer_name(hypotheses: int) -> str:
    """What the published pose with so many hypotheses is called in the report."""
    return f"stage 3, {hypotheses} hypothes{'i' if hypotheses == 1 else 'e'}s"

"""Overlays: every instance with its outline and its name, where it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import trimesh

from picopose_ros.estimator import ObjectPose
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.poses import make_transform
from picopose_ros.instances import NamedPose
from picopose_ros.instances.overlay import OverlayPainter, palette
from picopose_ros.templates.meshes import ObjectSpec, discover_objects

CAMERA = CameraModel(np.array([[300.0, 0, 159.5], [0, 300, 119.5], [0, 0, 1]]), 320, 240)
GREY = np.full((240, 320, 3), 128, np.uint8)


def named(class_id: str, name: str, x: float = 0.0, y: float = 0.0, z: float = 0.6) -> NamedPose:
    pose = ObjectPose(
        class_id=class_id,
        T_cam_obj=make_transform(cv2.Rodrigues(np.array([0.3, -0.4, 0.2]))[0], [x, y, z]),
        confidence=0.75,
        covariance=np.eye(6),
        source="offsets",
        segment=0,
        segment_score=0.9,
        template=3,
        inliers=40,
        inlier_ratio=0.5,
        match_score=0.8,
        bbox_centre=np.zeros(3),
        bbox_size=np.full(3, 0.1),
    )
    return NamedPose(pose, name, False)


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ObjectSpec]:
    folder = tmp_path_factory.mktemp("meshes")
    trimesh.creation.box((0.1, 0.1, 0.1)).export(folder / "box.ply")
    trimesh.creation.icosphere(radius=0.05).export(folder / "ball.ply")
    return {spec.class_id: spec for spec in discover_objects(folder)}


@pytest.fixture(scope="module")
def painter(specs: dict[str, ObjectSpec]) -> Iterator[OverlayPainter]:
    painter = OverlayPainter(specs)
    yield painter
    painter.close()
    painter.close()


def near(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.linalg.norm(picture.astype(float) - colour, axis=-1) < 60


def test_each_class_is_outlined_where_it_is(painter: OverlayPainter) -> None:
    picture = painter.paint(GREY, CAMERA, [named("ball", "", -0.12), named("box", "", 0.12)])
    assert (GREY == 128).all(), "the input was drawn into"
    ball, box = near(picture, palette(0)), near(picture, palette(1))
    # A ball of 5 cm at 60 cm and 300 px: a circle of 25 px around (100, 119.5), a little wider off the axis.
    rows, cols = np.nonzero(ball)
    radius = np.hypot(rows - 119.5, cols - 99.5)
    assert len(rows) > 100
    assert radius.min() > 21 and radius.max() < 30
    rows, cols = np.nonzero(box)
    assert len(rows) > 100
    assert 170 < cols.min() < 195 and 240 < cols.max() < 270
    # The axes of the box are there too.
    assert near(picture, (255, 60, 60)).any() and near(picture, (60, 220, 60)).any()


def test_labels_stand_over_their_objects_and_apart(painter: OverlayPainter) -> None:
    """Two of them at one place: the second label is moved, and each can be read."""
    alone = painter.paint(GREY, CAMERA, [named("box", "box_0")])
    both = painter.paint(GREY, CAMERA, [named("box", "box_0"), named("box", "box_1")])
    white = [(picture >= 250).all(-1) for picture in (alone, both)]
    lines = [np.flatnonzero(mask.any(1)) for mask in white]
    assert lines[0].max() < 100, "the label stands above the object"
    assert white[1].sum() > 1.8 * white[0].sum()
    heights = [line.max() - line.min() for line in lines]
    assert heights[1] > 1.8 * heights[0]


def test_what_cannot_be_drawn_is_left_out(painter: OverlayPainter, specs: dict[str, ObjectSpec]) -> None:
    assert (painter.paint(GREY, CAMERA, []) == GREY).all()
    behind = [named("box", "box_0", z=-0.6), named("spoon", "spoon_0")]
    assert (painter.paint(GREY, CAMERA, behind) == GREY).all()
    outside = [named("ball", "ball_0", x=5.0)]
    assert (painter.paint(GREY, CAMERA, outside) == GREY).all()


def test_a_mesh_that_went_away_does_not_stop_the_others(
    specs: dict[str, ObjectSpec], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost = specs | {"box": replace(specs["box"], path=tmp_path / "gone.ply")}
    painter = OverlayPainter(lost)
    for _ in range(2):
        picture = painter.paint(
            GREY, CAMERA, [named("box", "box_0", 0.12), named("ball", "ball_0", -0.12)]
        )
        assert near(picture, palette(0)).any() and not near(picture, palette(1)).any()
    painter.close()
    assert caplog.text.count("gone.ply does not exist") == 1


def test_nothing_is_loaded_before_it_is_drawn(specs: dict[str, ObjectSpec], tmp_path: Path) -> None:
    painter = OverlayPainter({"box": replace(specs["box"], path=tmp_path / "gone.ply")})
    assert (painter.paint(GREY, CAMERA, []) == GREY).all()
    painter.close()

"""Boxes and polygons of detectors as segments."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
from vision_msgs.msg import Detection2D, Detection2DArray, ObjectHypothesisWithPose

from picopose_ros.errors import ConfigError, SegmentError
from picopose_ros.messages import detections as module
from picopose_ros.messages.detections import segments_from_boxes, segments_from_yolo, yolo_message_type
from picopose_ros.messages.reasons import DropReason
from picopose_ros.segmentation.boxes import box_mask, cut_out, polygon_mask

HEIGHT, WIDTH = 40, 60


def filled(rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[rows, columns] = True
    return mask


@pytest.mark.parametrize(
    ("centre", "size", "rows", "columns"),
    [
        ((20, 10), (8, 6), slice(7, 13), slice(16, 24)),
        ((WIDTH / 2, HEIGHT / 2), (WIDTH, HEIGHT), slice(None), slice(None)),  # the whole image
        ((WIDTH / 2, HEIGHT / 2), (1e9, 1e9), slice(None), slice(None)),
        ((0, 0), (8, 6), slice(0, 3), slice(0, 4)),  # over the border
        ((WIDTH, HEIGHT), (8, 6), slice(-3, None), slice(-4, None)),
        ((10.5, 20.5), (1, 1), slice(20, 21), slice(10, 11)),  # one pixel
        ((10.2, 20.9), (0.1, 0.1), slice(20, 21), slice(10, 11)),  # less than one
        ((-30, 10), (8, 6), slice(0, 0), slice(0, 0)),  # outside
    ],
)
def test_upright_boxes(
    centre: tuple[float, float], size: tuple[float, float], rows: slice, columns: slice
) -> None:
    np.testing.assert_array_equal(box_mask(centre, size, 0.0, HEIGHT, WIDTH), filled(rows, columns))


def test_turned_boxes() -> None:
    upright = box_mask((30, 20), (12, 6), 0.0, HEIGHT, WIDTH)
    quarter = box_mask((30, 20), (6, 12), np.pi / 2 + 1e-9, HEIGHT, WIDTH)
    assert (upright != quarter).mean() < 0.01
    turned = box_mask((30, 20), (24, 6), np.pi / 6, HEIGHT, WIDTH)
    assert turned.sum() == pytest.approx(24 * 6, rel=0.05)
    rows, columns = np.nonzero(turned)
    assert np.corrcoef(columns, rows)[0, 1] > 0.5, "theta turns from x to y, which points down"
    # The upright box around it is wider and higher.
    assert np.ptp(columns) + 1 == pytest.approx(24 * np.cos(np.pi / 6) + 6 * np.sin(np.pi / 6), abs=1.5)


def test_boxes_that_are_none() -> None:
    for centre, size, theta in (((np.nan, 0), (4, 4), 0), ((0, 0), (np.inf, 4), 0), ((0, 0), (4, 4), np.nan)):
        with pytest.raises(SegmentError, match="not finite"):
            box_mask(centre, size, theta, HEIGHT, WIDTH)
    for size in ((0, 4), (4, -1)):
        with pytest.raises(SegmentError, match="has no area"):
            box_mask((5, 5), size, 0.0, HEIGHT, WIDTH)


def test_what_is_cut_out_of_a_box_is_what_is_unlike_its_surroundings() -> None:
    rng = np.random.default_rng(2)
    size = 120, 160
    rows, columns = np.ogrid[: size[0], : size[1]]
    disc = np.hypot(rows - 60, columns - 80) < 30
    rgb = np.where(disc[..., None], (200, 60, 40), (90, 110, 100)) + rng.normal(0, 6, (*size, 3))
    rgb = np.clip(rgb, 0, 255).astype(np.uint8)
    box = box_mask((80.5, 60.5), (60, 60), 0.0, *size)
    found = cut_out(rgb, box)
    assert np.count_nonzero(found & disc) > 0.9 * np.count_nonzero(found | disc)
    np.testing.assert_array_equal(found, cut_out(rgb, box))
    assert not (found & ~box).any()
    # Nothing to tell it from, nothing in it, too little of it: the box stays.
    for mask in (np.ones(size, bool), box_mask((10.5, 10.5), (1, 1), 0.0, *size), np.zeros(size, bool)):
        np.testing.assert_array_equal(cut_out(rgb, mask), mask)
    np.testing.assert_array_equal(cut_out(np.full_like(rgb, 90), box), box)


def test_polygons_are_scaled_from_their_own_resolution() -> None:
    corners = np.array([(10, 8), (30, 8), (30, 28), (10, 28)])
    mask = polygon_mask(corners, (HEIGHT, WIDTH), HEIGHT, WIDTH)
    inside = filled(slice(8, 28), slice(10, 30))
    assert (mask != inside).sum() <= 2 * (20 + 20)  # OpenCV counts the pixels of the outline, too
    assert mask[inside].all()
    double = polygon_mask(2 * corners, (2 * HEIGHT, 2 * WIDTH), HEIGHT, WIDTH)
    np.testing.assert_array_equal(double, mask)
    over = polygon_mask(corners - [20, 0], (HEIGHT, WIDTH), HEIGHT, WIDTH)
    assert over[8:28, :10].all() and not over[:, 12:].any()
    assert not polygon_mask(corners + [1e7, 0], (HEIGHT, WIDTH), HEIGHT, WIDTH).any()


@pytest.mark.parametrize(
    ("corners", "size", "says"),
    [
        ([(1, 1), (20, 20)], (HEIGHT, WIDTH), "polygon has 2 points"),
        ([(1, 1), (20, 20), (1, np.nan)], (HEIGHT, WIDTH), "not finite"),
        ([(1, 1), (20, 20), (1, 20)], (0, 0), "say the polygon's resolution"),
        ([(1, 1), (20, 20), (1, 20)], (WIDTH, WIDTH), "padded or cut"),
    ],
)
def test_polygons_that_are_none(corners: list[tuple[float, float]], size: tuple[int, int], says: str) -> None:
    with pytest.raises(SegmentError, match=says):
        polygon_mask(corners, size, HEIGHT, WIDTH)


def detection(class_id: str | None, centre: tuple[float, float], size: tuple[float, float]) -> Detection2D:
    message = Detection2D(id="7")
    for name, score in () if class_id is None else ((class_id, 0.8), ("other", 0.1)):
        result = ObjectHypothesisWithPose()
        result.hypothesis.class_id, result.hypothesis.score = name, score
        message.results.append(result)
    message.bbox.center.position.x, message.bbox.center.position.y = map(float, centre)
    message.bbox.size_x, message.bbox.size_y = map(float, size)
    return message


def test_boxes_of_vision_msgs_are_judged_one_by_one() -> None:
    message = Detection2DArray(
        detections=[
            detection("cup", (20, 10), (8, 6)),
            detection(None, (20, 10), (8, 6)),
            detection("flat", (20, 10), (8, 0)),
            detection("gone", (-20, 10), (8, 6)),
            detection("nan", (float("nan"), 10), (8, 6)),
            detection("pixel", (3.5, 3.5), (1, 1)),
        ]
    )
    good, bad = segments_from_boxes(message, HEIGHT, WIDTH, "/boxes")
    assert [(s.class_id, s.score, s.is_box, s.tracked_id) for s in good] == [
        ("cup", 0.8, True, ""),
        ("pixel", 0.8, True, ""),
    ]
    np.testing.assert_array_equal(good[0].mask, filled(slice(7, 13), slice(16, 24)))
    assert [(b.index, b.reason) for b in bad] == [
        (1, DropReason.BAD_SEGMENT),
        (2, DropReason.BAD_SEGMENT),
        (3, DropReason.EMPTY_MASK),
        (4, DropReason.BAD_SEGMENT),
    ]
    for problem, says in zip(bad, ("no class", "no area", "outside the image of 60x40", "finite")):
        assert says in problem.message and f"detection {problem.index} (" in problem.message
        assert "on /boxes" in problem.message


def yolo(
    name: str = "cup",
    number: int = 41,
    tracked: str = "",
    polygon: list[tuple[float, float]] | None = None,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    score: float = 0.7,
) -> Any:
    """A ``yolo_msgs/Detection`` of a box of 8x6 pixels, for a machine without yolo_msgs too."""
    new = types.SimpleNamespace
    centre = new(position=new(x=20.0, y=10.0), theta=0.0)
    points = [new(x=float(x), y=float(y)) for x, y in polygon or ()]
    return new(
        class_name=name,
        class_id=number,
        score=score,
        id=tracked,
        bbox=new(center=centre, size=new(x=8.0, y=6.0)),
        mask=new(height=size[0], width=size[1], data=points),
    )


def test_yolo_detections_are_polygons_or_boxes_with_tracked_ids() -> None:
    square = [(20, 16), (60, 16), (60, 56), (20, 56)]
    message = types.SimpleNamespace(
        detections=[
            yolo(polygon=square, size=(2 * HEIGHT, 2 * WIDTH), tracked="5"),
            yolo(name="", tracked="6"),
            yolo(name="twin", tracked="8"),
            yolo(name="twin", tracked="8"),
            yolo(name="line", polygon=[(1, 1), (5, 5)]),
            yolo(name="padded", polygon=square, size=(WIDTH, WIDTH)),
            yolo(name="unsure", score=float("nan")),
            yolo(name="gone", polygon=[(-9, 1), (-5, 1), (-5, 5)]),
        ]
    )
    good, bad = segments_from_yolo(message, HEIGHT, WIDTH, "/yolo")
    assert [(s.class_id, s.is_box, s.tracked_id) for s in good] == [
        ("cup", False, "5"),
        ("41", True, "6"),
        ("twin", True, ""),
        ("twin", True, ""),
    ]
    assert good[0].mask[8:28, 10:30].all() and good[0].mask.sum() < 22 * 22
    np.testing.assert_array_equal(good[1].mask, filled(slice(7, 13), slice(16, 24)))
    assert [b.index for b in bad] == [4, 5, 6, 7] and bad[3].reason == DropReason.EMPTY_MASK
    for problem, says in zip(bad, ("2 points", "padded or cut", "score is nan", "polygon lies outside")):
        assert says in problem.message and "on /yolo" in problem.message


def test_without_yolo_msgs_the_parameter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(module.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="yolo_msgs is not there .*source the workspace"):
        yolo_message_type()

"""Segments and the forms they arrive in, against pycocotools where that is the judge."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pycocotools import mask as coco

from picopose_ros.errors import SegmentError
from picopose_ros.segmentation import (
    Segment,
    mask_roi,
    rle_decode,
    rle_decode_compressed,
    rle_encode,
    segments_from_cnos,
    segments_from_json,
    segments_from_label_image,
    segments_to_json,
)


def random_masks() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    masks = [rng.random((h, w)) < p for h, w, p in [(1, 1, 0.5), (7, 5, 0.3), (48, 64, 0.02), (31, 77, 0.9)]]
    blob = np.zeros((120, 160), bool)
    blob[20:90, 30:140] = True
    blob[40:50, 60:70] = False
    return [*masks, blob, np.zeros((6, 9), bool), np.ones((6, 9), bool), np.ones((1, 300), bool)]


@pytest.mark.parametrize("mask", random_masks(), ids=lambda m: f"{m.shape}-{m.sum()}")
def test_rle_round_trip_agrees_with_coco(mask):
    counts = rle_encode(mask)
    np.testing.assert_array_equal(rle_decode(counts, *mask.shape), mask)
    theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    ours = coco.frPyObjects({"size": list(mask.shape), "counts": counts}, *mask.shape)
    assert ours["counts"] == theirs["counts"]
    np.testing.assert_array_equal(rle_decode_compressed(theirs["counts"], *mask.shape), mask)


def test_rle_starts_with_zeros_and_runs_down_columns():
    mask = np.array([[1, 0, 0], [1, 1, 0]], bool)
    assert rle_encode(mask) == [0, 2, 1, 1, 2]
    assert rle_encode(~mask) == [2, 1, 1, 2]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([3, 2], "add up to 5 pixels, but a mask of 3x2 has 6"),
        ([7, -1], "non-negative"),
        ([1.5, 4.5], "whole numbers"),
    ],
)
def test_broken_run_lengths_are_refused(counts, message):
    with pytest.raises(SegmentError, match=message):
        rle_decode(counts, 2, 3)


def test_a_broken_compressed_string_is_refused():
    good = coco.encode(np.asfortranarray(random_masks()[4].astype(np.uint8)))["counts"]
    with pytest.raises(SegmentError):
        rle_decode_compressed(good[:-3], 120, 160)
    with pytest.raises(SegmentError, match="character 0"):
        rle_decode_compressed("\x01" + good.decode(), 120, 160)


def test_roi_is_tight():
    mask = np.zeros((50, 60), bool)
    assert mask_roi(mask) is None
    mask[49, 0] = mask[10, 59] = True
    assert mask_roi(mask) == (0, 10, 60, 40)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_label_image(dtype):
    labels = np.zeros((10, 12), dtype)
    labels[2:5, 3:6] = 2
    labels[7:9, 0:4] = 100
    segments = segments_from_label_image(labels, {100: ("cup", 0.5), 2: ("box", 0.9), 3: ("gone", 0.4)})
    assert [(s.class_id, s.score, int(s.mask.sum())) for s in segments] == [
        ("cup", 0.5, 8),
        ("box", 0.9, 9),
        ("gone", 0.4, 0),
    ]


def test_label_image_refuses_what_it_cannot_mean():
    with pytest.raises(SegmentError, match="integers"):
        segments_from_label_image(np.zeros((4, 4), np.float32), {1: ("a", 1.0)})
    with pytest.raises(SegmentError, match="background"):
        segments_from_label_image(np.zeros((4, 4), np.uint8), {0: ("a", 1.0)})


def cnos_entry(mask: np.ndarray, category: int, image: int, compressed: bool) -> dict:
    counts = rle_encode(mask)
    if compressed:
        counts = coco.frPyObjects({"size": list(mask.shape), "counts": counts}, *mask.shape)[
            "counts"
        ].decode()
    segmentation = {"size": list(mask.shape), "counts": counts}
    return {
        "scene_id": 1,
        "image_id": image,
        "category_id": category,
        "score": 0.25,
        "bbox": [0, 0, 1, 1],
        "time": 0.1,
        "segmentation": segmentation,
    }


@pytest.mark.parametrize("compressed", [False, True])
def test_cnos_detections(tmp_path, compressed):
    mask = random_masks()[4]
    entries = [cnos_entry(mask, 5, 7, compressed), cnos_entry(~mask, 12, 8, compressed)]
    path = tmp_path / "cnos.json"
    path.write_text(json.dumps(entries))
    (segment,) = segments_from_cnos(path, scene_id=1, image_id=7)
    assert (segment.class_id, segment.score) == ("obj_000005", 0.25)
    np.testing.assert_array_equal(segment.mask, mask)
    names = [s.class_id for s in segments_from_cnos(entries, class_names={5: "can", 12: "duck"})]
    assert names == ["can", "duck"]
    assert segments_from_cnos(entries, image_id=99) == []
    with pytest.raises(SegmentError, match="2 images"):
        segments_from_json(path)
    path.write_text(json.dumps(entries[:1]))
    assert segments_from_json(path, class_names=lambda c: f"c{c}")[0].class_id == "c5"


def test_segments_file_round_trip(tmp_path):
    segments = [Segment("mug", 0.75, random_masks()[4]), Segment("mug", 1.0, np.zeros((3, 4), bool))]
    segments_to_json(segments, tmp_path / "s.json")
    back = segments_from_json(tmp_path / "s.json")
    assert [(s.class_id, s.score) for s in back] == [("mug", 0.75), ("mug", 1.0)]
    for a, b in zip(segments, back):
        np.testing.assert_array_equal(a.mask, b.mask)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("{}", "list"),
        ("[3]", "entry 0"),
        ('[{"class_id": "a", "size": [2, 2]}]', "counts"),
        ('[{"class_id": "a", "size": [2, 2], "counts": [3]}]', "entry 0.*add up to 3"),
        ('[{"class_id": "a", "score": "x", "size": [2, 2], "counts": [4]}]', "score"),
        ('[{"class_id": "a", "size": [2, 2], "counts": {"a": 1}}]', "entry 0"),
        ('[{"category_id": 1, "segmentation": {"size": [2, 2], "counts": [4]}}]', "'score' is missing"),
    ],
)
def test_broken_segment_files_are_explained(tmp_path, text, message):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(SegmentError, match=message) as caught:
        segments_from_json(path)
    assert "broken.json" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SegmentError, match="nowhere.json.*No such file"):
        segments_from_json(tmp_path / "nowhere.json")


def test_segment_checks_its_mask():
    with pytest.raises(SegmentError, match=r"\(2, 2, 1\)"):
        Segment("a", 1.0, np.zeros((2, 2, 1)))
    with pytest.raises(SegmentError, match="score"):
        Segment("a", float("nan"), np.zeros((2, 2)))
    assert Segment("a", 1.0, np.array([[0, 255]], np.uint8)).mask.tolist() == [[False, True]]

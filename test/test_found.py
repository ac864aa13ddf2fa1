"""Found, missed and false instances; average precision against pycocotools."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from picopose_ros.cli.main import main
from picopose_ros.evaluation.bop.dataset import BopDataset
from picopose_ros.evaluation.detection import INPUTS, Image, bop_images, measure, table
from picopose_ros.evaluation.found import CocoPrecision, FoundCounts, TrueInstance, count_found
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.segmentation import Segment
from picopose_ros.segmentation.proposals import Picture
from picopose_ros.segmentation.segmenter import Segmentation

SIZE = 40, 60


def box(left: int, top: int, width: int, height: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def test_found_missed_and_false() -> None:
    truth = [
        TrueInstance("cup", box(0, 0, 10, 10), 1.0),
        TrueInstance("cup", box(20, 0, 10, 10), 0.5),
        TrueInstance("cup", box(40, 0, 10, 10), 0.2),  # not asked for
        TrueInstance("box", box(0, 20, 10, 10), 1.0),
    ]
    segments = [
        Segment("cup", 0.9, box(1, 0, 10, 10)),  # found
        Segment("cup", 0.8, box(0, 0, 9, 10)),  # found already
        Segment("box", 0.8, box(20, 0, 10, 10)),  # another class
        Segment("cup", 0.8, box(40, 0, 10, 10)),  # not asked for, not false
        Segment("box", 0.7, box(7, 20, 10, 10)),  # too far
    ]
    counts, pairs = count_found(segments, truth)
    assert counts == FoundCounts(images=1, asked=3, found=1, false=3)
    assert set(pairs.values()) == {0, 2} and counts.missed == 2
    assert counts.recall == pytest.approx(1 / 3)
    both = counts + count_found([], truth)[0]
    assert both == FoundCounts(2, 6, 1, 3) and both.false_per_image == 1.5
    assert count_found([], [])[0].recall == 0.0


class ToolkitEval(COCOeval):
    """COCO's evaluation as the BOP toolkit's fork has it: what an annotation says of being ignored holds."""

    def _prepare(self) -> None:
        super()._prepare()
        for truths in self._gts.values():
            for truth in truths:
                truth["ignore"] = truth["skip"]


def encoded(mask: np.ndarray) -> dict:
    run_lengths = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {**run_lengths, "counts": run_lengths["counts"].decode()}


def reference(images: list[tuple[list[Segment], list[TrueInstance]]]) -> list[float]:
    """AP, AP50 and AP75 of pycocotools."""
    names = sorted({s.class_id for found, truth in images for s in (*found, *truth)})
    truths, results = [], []
    for number, (found, truth) in enumerate(images):
        for one in truth:
            truths.append(
                {
                    "id": len(truths) + 1,
                    "image_id": number,
                    "category_id": names.index(one.class_id),
                    "segmentation": encoded(one.mask),
                    "area": int(one.mask.sum()),
                    "bbox": [0, 0, 1, 1],
                    "iscrowd": 0,
                    "skip": one.visible < 0.1,
                }
            )
        for one in found:
            kind = names.index(one.class_id)
            entry = {"image_id": number, "category_id": kind, "score": one.score}
            results.append({**entry, "segmentation": encoded(one.mask)})
    truth_api = COCO()
    truth_api.dataset = {
        "info": {},
        "images": [{"id": k, "height": SIZE[0], "width": SIZE[1]} for k in range(len(images))],
        "annotations": truths,
        "categories": [{"id": k, "name": name} for k, name in enumerate(names)],
    }
    truth_api.createIndex()
    evaluation = ToolkitEval(truth_api, truth_api.loadRes(results), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return list(evaluation.stats[:3])


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_the_toolkit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, own = [], CocoPrecision()
    for _ in range(12):
        truth, found = [], []
        for _ in range(int(rng.integers(0, 6))):
            left, top = int(rng.integers(0, 45)), int(rng.integers(0, 25))
            width, height = (int(v) for v in rng.integers(6, 15, 2))
            name = str(rng.choice(["cup", "box", "can"]))
            truth.append(TrueInstance(name, box(left, top, width, height), float(rng.uniform(0, 0.5))))
            for _ in range(int(rng.integers(0, 3))):
                dx, dy = (int(v) for v in rng.integers(-3, 4, 2))
                said = name if rng.uniform() < 0.8 else "can"
                mask = box(max(left + dx, 0), max(top + dy, 0), width, height)
                found.append(Segment(said, float(np.round(rng.uniform(), 1)), mask))  # with equal scores
        images.append((found, truth))
        own.add(found, truth)
    expected = reference(images)
    got = own.as_dict()
    np.testing.assert_allclose([got["AP"], got["AP50"], got["AP75"]], expected, atol=1e-9)


def test_average_precision_of_what_is_known() -> None:
    mask, other = box(0, 0, 10, 10), box(30, 0, 10, 10)
    truth = [TrueInstance("cup", mask, 1.0)]
    perfect, half, nothing = CocoPrecision(), CocoPrecision(), CocoPrecision()
    perfect.add([Segment("cup", 0.5, mask)], truth)
    assert perfect.as_dict() == {"AP": 1.0, "AP50": 1.0, "AP75": 1.0}
    half.add([Segment("cup", 0.9, other), Segment("cup", 0.5, mask)], truth)
    assert half.as_dict() == {"AP": 0.5, "AP50": 0.5, "AP75": 0.5}
    nothing.add([Segment("cup", 0.9, other)], [])
    assert nothing.as_dict()["AP"] == -1.0


# The measurement.


class Finder:
    """Stands for a segmenter: finds the first true instance of an image, and something else."""

    def __init__(self, images: list[Image]) -> None:
        self._images = iter(images)

    def segment(self, picture: Picture) -> Segmentation:
        truth = next(self._images).truth
        found = [Segment(truth[0].class_id, 0.9, truth[0].mask), Segment("ghost", 0.8, box(50, 30, 8, 8))]
        return Segmentation(found, 2, timings={"total": 40.0})


def test_masks_boxes_and_own_segments_are_measured_on_the_same_images() -> None:
    disc = np.hypot(*np.ogrid[-20:20, -10:50]) < 8
    truth = [TrueInstance("cup", disc, 1.0), TrueInstance("box", box(40, 0, 10, 10), 0.9)]
    rgb = np.zeros((*SIZE, 3), np.uint8)
    camera = CameraModel(np.eye(3), SIZE[1], SIZE[0])
    images = [Image(rgb, camera, truth, [np.eye(4)] * 2, []) for _ in range(3)]
    tallies = measure(iter(images), INPUTS, Finder(images), None, {}, len(images))
    figures = {name: tally.as_dict() for name, tally in tallies.items()}
    assert figures["masks"]["recall"] == figures["masks"]["AP"] == 1.0
    assert figures["boxes"]["recall"] == 1.0 and 0.5 < figures["boxes"]["AP"] < 1.0
    assert figures["own"]["recall"] == 0.5 and figures["own"]["false_per_image"] == 1.0
    assert figures["own"]["segmenter_ms"] == 40.0 and figures["own"]["images"] == 3
    lines = table(figures)
    assert len(lines) == 4 and lines[0].split()[:2] == ["input", "asked"]


def test_the_truth_of_a_bop_dataset_finds_itself(mini_bop: Any) -> None:
    dataset = BopDataset(mini_bop.root, mini_bop.name)
    found = bop_images(dataset, {}, 3)
    own = CocoPrecision()
    for image in found:
        assert len(image.truth) == len(image.poses) > 0 and image.given == []
        own.add([Segment(t.class_id, 1.0, t.mask) for t in image.truth if t.mask.any()], image.truth)
    assert own.as_dict()["AP"] == pytest.approx(1.0)


def test_what_eval_detection_is_asked_must_fit_together(capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", "report.json"]
    for argv, says in (
        ([], "give either --meshes"),
        (["--meshes", "a", "--dataset", "lmo"], "give either --meshes"),
        (["--dataset", "lmo"], "--dataset needs --root"),
        (["--meshes", "a", "--detections", "d.json"], "--detections belong to a --dataset"),
    ):
        assert main(["eval", "detection", *argv, *out]) == 2
        assert says in capsys.readouterr().err

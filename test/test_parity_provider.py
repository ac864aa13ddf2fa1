"""From a BOP folder to a row of the csv, step by step as the released code does it, on the parity fixture.

The fixture's scene is written as a dataset and its masks as CNOS's detections; what is read, cropped,
compared and decoded must be what the released code had at that place. Its network has made-up weights, so its
poses are no poses; the row of a pose with a known answer comes from the fixture's perfect flow.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from parity import Parity, load_parity, parity_model

from picopose_ros.estimator import EstimatorSettings, PoseEstimator, SegmentTrace
from picopose_ros.evaluation.bop.dataset import BopDataset
from picopose_ros.evaluation.bop.detections import BopDetections, Selection
from picopose_ros.evaluation.bop.results import BopRow
from picopose_ros.evaluation.bop.run import estimate_image
from picopose_ros.evaluation.bop.setup import MIN_MASK_PIXELS
from picopose_ros.geometry.correspondences import cell_centres_in_image, decode_correspondences
from picopose_ros.geometry.crops import (
    crop_box_from_mask,
    crop_mask,
    crop_points_consistent,
    crop_points_nearest,
)
from picopose_ros.geometry.poses import rotation_angle_deg
from picopose_ros.model import PicoPose
from picopose_ros.segmentation import Detection, mask_roi, rle_encode
from picopose_ros.templates.bank import TemplateBank

SCENE, IMAGE, OBJ = 2, 7, 1
RTOL_DEEP = 1e-4


@pytest.fixture(scope="module")
def parity() -> Parity:
    return load_parity()


@pytest.fixture(scope="module")
def root(parity: Parity, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture's scene as a dataset `fixture`, and `cnos.json` beside it."""
    root = tmp_path_factory.mktemp("bop")
    scene = root / "fixture" / "test" / f"{SCENE:06d}"
    (scene / "rgb").mkdir(parents=True)
    assert cv2.imwrite(str(scene / "rgb" / f"{IMAGE:06d}.png"), parity.tensor("raw/query_rgb")[..., ::-1])
    camera = {"cam_K": parity.tensor("raw/query_K").ravel().tolist(), "depth_scale": 1.0}
    (scene / "scene_camera.json").write_text(json.dumps({str(IMAGE): camera}))
    targets = [{"scene_id": SCENE, "im_id": IMAGE, "obj_id": OBJ, "inst_count": parity.detections}]
    (root / "fixture" / "test_targets_bop19.json").write_text(json.dumps(targets))
    entries = [
        {
            "scene_id": SCENE,
            "image_id": IMAGE,
            "category_id": OBJ,
            "bbox": list(mask_roi(mask)),
            "score": float(score),
            "time": 0.25,
            "segmentation": {"counts": rle_encode(mask), "size": list(mask.shape)},
        }
        for mask, score in zip(parity.tensor("raw/query_mask"), parity.tensor("raw/det_score"))
    ]
    (root / "cnos.json").write_text(json.dumps(entries[::-1]))  # the order is the scores', not the file's
    return root


@pytest.fixture(scope="module")
def dataset(root: Path) -> BopDataset:
    return BopDataset(root, "fixture")


@pytest.fixture(scope="module")
def detections(root: Path) -> BopDetections:
    return BopDetections(root / "cnos.json")


@pytest.fixture(scope="module")
def selection(dataset: BopDataset, detections: BopDetections) -> Selection:
    return detections.select(dataset.targets, dataset.image(SCENE, IMAGE).shape[:2])


@pytest.fixture(scope="module")
def model() -> PicoPose:
    return parity_model()


def make_bank(parity: Parity, model: PicoPose) -> TemplateBank:
    """The bank of the fixture's templates, made from their pixels, depth and poses."""
    rgba, K = parity.tensor("raw/template_rgba"), parity.tensor("raw/template_K")
    depths = parity.tensor("raw/template_depth_mm") / 1000.0
    boxes = [crop_box_from_mask(view[..., 3]) for view in rgba]
    images = np.zeros((len(rgba), *(max(box.side for box in boxes),) * 2, 3), np.uint8)
    for image, view, box in zip(images, rgba, boxes):
        image[: box.side, : box.side] = view[box.slices][..., :3]
    T_cam_ctr = parity.tensor("raw/template_pose_mm").astype(np.float32)
    T_cam_ctr[:, :3, 3] /= 1000.0
    bank = TemplateBank(
        class_id=f"obj_{OBJ:06d}",
        images=images,
        boxes=np.array([(box.left, box.top, box.side) for box in boxes], np.int32),
        masks=np.stack([crop_mask(view[..., 3] == 255, box) for view, box in zip(rgba, boxes)]).astype(bool),
        points_nearest=np.stack([crop_points_nearest(d, K, box) for d, box in zip(depths, boxes)]),
        points_consistent=np.stack([crop_points_consistent(d, K, box) for d, box in zip(depths, boxes)]),
        T_cam_ctr=T_cam_ctr,
        centre=np.zeros(3),
        M_crop_img=np.stack([box.affine() for box in boxes]),
        K=K,
        descriptors=np.zeros(0, np.float16),
        extents=np.ones(3),
        diameter=1.0,
    )
    with torch.no_grad():
        descriptors = model.encode(bank.crops(range(len(bank)))).descriptors
    return dataclasses.replace(bank, descriptors=descriptors.half().numpy())


@pytest.fixture(scope="module")
def estimator(parity: Parity, model: PicoPose) -> PoseEstimator:
    bank = make_bank(parity, model)
    settings = EstimatorSettings(
        parity.hypotheses, "reference", min_mask_pixels=MIN_MASK_PIXELS, refinements=0, precision="fp32"
    )
    return PoseEstimator(model, {bank.class_id: bank}, settings)


@pytest.fixture(scope="module")
def traces(dataset: BopDataset, selection: Selection, estimator: PoseEstimator) -> list[SegmentTrace]:
    rgb, camera = dataset.image(SCENE, IMAGE), dataset.camera(SCENE, IMAGE)
    return estimator.estimate(rgb, camera, selection.segments, trace=True).traces


def test_what_is_read(parity: Parity, dataset: BopDataset, selection: Selection) -> None:
    np.testing.assert_array_equal(dataset.image(SCENE, IMAGE), parity.tensor("raw/query_rgb"))
    camera = dataset.camera(SCENE, IMAGE)
    np.testing.assert_array_equal(np.float32(camera.K), parity.tensor("provider/real_K")[0])
    assert selection.obj_ids == parity.tensor("provider/obj_id")[:, 0].tolist()
    scores = np.float32([segment.score for segment in selection.segments])
    np.testing.assert_array_equal(scores, parity.tensor("provider/score")[:, 0])
    masks = np.stack([segment.mask for segment in selection.segments])
    np.testing.assert_array_equal(masks, parity.tensor("raw/query_mask") > 0)
    assert selection.time == 0.25 and not selection.problems


def test_compressed_run_lengths_are_the_same_mask(parity: Parity, selection: Selection) -> None:
    from pycocotools import mask as coco

    (mask, *_) = parity.tensor("raw/query_mask")
    packed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    entry = {"counts": packed["counts"].decode(), "size": list(mask.shape)}
    segment = Detection(OBJ, 0.5, 0.0, "here", entry).segment()
    np.testing.assert_array_equal(segment.mask, selection.segments[0].mask)


def test_query_crops(parity: Parity, traces: list[SegmentTrace]) -> None:
    queries = [trace.query for trace in traces]
    assert [query.index for query in queries] == list(range(parity.detections))
    parity.assert_matches("provider/real_rgb", np.stack([query.crop for query in queries]), 1e-6)
    np.testing.assert_array_equal(np.stack([q.mask for q in queries]), parity.tensor("provider/real_mask"))
    # float32: the last bits depend on the processor.
    parity.assert_matches("provider/real_M", np.stack([q.M_crop_img for q in queries]), 1e-6)
    points = np.stack([cell_centres_in_image(query.M_crop_img) for query in queries])
    parity.assert_matches("provider/real_pts2d", points.transpose(0, 2, 1, 3), 1e-6)


def test_templates(parity: Parity, estimator: PoseEstimator) -> None:
    (bank,) = estimator.banks.values()
    parity.assert_matches("provider/tem_rgb", bank.crops(range(len(bank))), 1e-6)
    parity.assert_matches("provider/tem_mask", bank.masks.astype(np.float32), 0)
    parity.assert_matches("provider/tem_M", bank.M_crop_img, 1e-6)
    np.testing.assert_allclose(bank.T_cam_ctr, parity.tensor("provider/tem_pose"), rtol=1e-6, atol=1e-9)
    parity.assert_matches("provider/tem_pts3d", bank.points_nearest, 1e-6)


def test_hypotheses(parity: Parity, traces: list[SegmentTrace]) -> None:
    chosen = [[one.hypothesis.template for one in trace.hypotheses] for trace in traces]
    np.testing.assert_array_equal(chosen, parity.tensor("stage1/topk_id"))
    for k in range(parity.hypotheses):
        hypotheses = [trace.hypotheses[k].hypothesis for trace in traces]
        parity.assert_matches(f"hyp{k}/affine_M", np.stack([h.affine for h in hypotheses]), RTOL_DEEP)
        parity.assert_matches(f"hyp{k}/flow_2", np.stack([h.flow for h in hypotheses]), RTOL_DEEP)
        logits = np.stack([h.certainty for h in hypotheses])[:, None]
        parity.assert_matches(f"hyp{k}/certainty_2", logits, RTOL_DEEP)
        stage_two = np.stack([trace.hypotheses[k].T_affine for trace in traces])
        parity.assert_matches(f"hyp{k}/pose_stage2", stage_two.astype(np.float32), RTOL_DEEP)


def test_pairs(parity: Parity, traces: list[SegmentTrace]) -> None:
    """A position on the border of two cells may fall into the other one: a thousandth of them, no more."""
    for b, trace in enumerate(traces):
        query = trace.query
        for k, one in enumerate(trace.hypotheses):
            h, bank = one.hypothesis, query.bank
            pairs = decode_correspondences(
                h.flow,
                h.certainty,
                query.M_crop_img,
                bank.points_nearest[h.template],
                bank.T_cam_ctr[h.template],
                "reference",
                query.mask,
            )
            found, stored = (
                {tuple(row) for row in np.round(np.hstack([uv, 1e3 * xyz]), 2).tolist()}
                for uv, xyz in (
                    (pairs.uv, pairs.xyz),
                    (parity.tensor(f"hyp{k}/pairs2d_{b}"), parity.tensor(f"hyp{k}/pairs3d_{b}")),
                )
            )
            assert len(found & stored) >= 0.999 * len(stored) - 1


def test_rows(
    parity: Parity,
    dataset: BopDataset,
    detections: BopDetections,
    estimator: PoseEstimator,
    traces: list[SegmentTrace],
) -> None:
    record = estimate_image(estimator, dataset, detections, SCENE, IMAGE)
    assert not record.failed and not record.problems
    lines = [line.split(",") for line in record.lines]
    for line, score in zip(lines, parity.tensor("raw/det_score"), strict=True):
        assert line[:4] == [str(SCENE), str(IMAGE), str(OBJ), repr(float(score))]
    assert [len(field.split(" ")) for field in lines[0]] == [1, 1, 1, 1, 9, 3, 1]
    (seconds,) = {float(line[6]) for line in lines}
    assert seconds == pytest.approx(0.25 + record.timings["total"] / 1000.0)
    best = parity.tensor("final/best_hypothesis")
    for b, (row, trace) in enumerate(zip(record.rows, traces)):
        chosen = trace.answers[-1]
        assert chosen.template == parity.tensor("stage1/topk_id")[b, best[b]]
        # OpenCV's draws among meaningless pairs depend on the last bits; how many agree does not.
        assert chosen.inlier_ratio == pytest.approx(parity.tensor(f"hyp{best[b]}/pnp_{b}")[12], abs=0.06)
        np.testing.assert_allclose(row.T_cam_obj, chosen.T_cam_obj, rtol=1e-12, atol=1e-15)


def test_the_row_of_a_known_pose(
    parity: Parity, dataset: BopDataset, estimator: PoseEstimator, traces: list[SegmentTrace]
) -> None:
    camera = dataset.camera(SCENE, IMAGE)
    for b, trace in enumerate(traces):
        perfect = dataclasses.replace(
            trace.hypotheses[0].hypothesis,
            template=int(parity.tensor("raw/near_template")[b]),
            flow=parity.tensor("oracle/flow64")[b],
            certainty=np.ones((64, 64), np.float32),
        )
        pose = estimator.answer(trace.query, perfect, camera)
        row = BopRow.of_pose(SCENE, IMAGE, OBJ, 0.5, pose.T_cam_obj, 1.0)
        R, t = (np.array(row.line().split(",")[k].split(" "), np.float64) for k in (4, 5))
        stored, report = parity.tensor(f"oracle/pnp_{b}"), parity.meta["oracle_report"][b]
        assert rotation_angle_deg(R.reshape(3, 3), stored[:9].reshape(3, 3)) < 1.0
        np.testing.assert_allclose(t, 1000.0 * stored[9:12], atol=10.0)
        off = rotation_angle_deg(R.reshape(3, 3), parity.tensor("raw/gt_R")[b])
        assert off < report["official_rot_deg"] + 1.0
        np.testing.assert_allclose(t, parity.tensor("raw/gt_t_mm")[b], atol=10.0)
        exact = BopRow.of_pose(SCENE, IMAGE, OBJ, 0.5, parity.tensor("oracle/gt_pose")[b], 1.0)
        np.testing.assert_allclose(exact.t_mm, parity.tensor("raw/gt_t_mm")[b], rtol=1e-5)

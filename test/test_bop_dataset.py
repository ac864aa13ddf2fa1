"""A BOP dataset on disk, the detections that stand for its targets, and the challenge's csv."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from mini_bop import BOX, CAN, DRILL, HEIGHT, TWICE, UNDETECTED, UNSEEN, WIDTH, K, MiniBop

from picopose_ros.errors import DatasetError, SegmentError
from picopose_ros.evaluation.bop.dataset import BopDataset, Target
from picopose_ros.evaluation.bop.detections import NO_SCORE, NOTHING_DETECTED, BopDetections
from picopose_ros.evaluation.bop.results import HEADER, BopRow, read_results, write_results
from picopose_ros.segmentation import mask_roi, rle_encode
from picopose_ros.templates.meshes import load_object
from picopose_ros.templates.renderer import MeshRenderer

SIZE = HEIGHT, WIDTH


@pytest.fixture
def dataset(mini_bop: MiniBop) -> BopDataset:
    return BopDataset(mini_bop.root, mini_bop.name)


@pytest.fixture
def copy(mini_bop: MiniBop, tmp_path: Path) -> MiniBop:
    """The dataset, to be broken."""
    shutil.copytree(mini_bop.root, tmp_path / "bop")
    return MiniBop(tmp_path / "bop", tmp_path / "bop" / mini_bop.detections.name)


def opened(copy: MiniBop) -> BopDataset:
    return BopDataset(copy.root, copy.name)


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """Change what a JSON file holds."""
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))


def test_what_is_read_is_what_was_rendered(dataset: BopDataset) -> None:
    """Models, poses, camera, depth and masks agree: rendering them again gives the depth image."""
    with MeshRenderer() as renderer:
        meshes = {number: load_object(spec) for number, spec in dataset.models.items()}
        for scene, image in dataset.images:
            camera = dataset.camera(scene, image)
            assert (camera.width, camera.height) == (WIDTH, HEIGHT)
            np.testing.assert_array_equal(camera.K, K)
            truths = dataset.ground_truth(scene, image)
            items = [(meshes[truth.obj_id], truth.T_cam_obj) for truth in truths]
            again = renderer.render_scene(items, camera.K, WIDTH, HEIGHT)
            depth = dataset.depth(scene, image)
            assert depth.dtype == np.float32
            np.testing.assert_allclose(depth, again.depth, atol=6e-5)  # half a step of the file
            visible = [dataset.mask(scene, image, k) for k in range(len(truths))]
            np.testing.assert_array_equal(np.any(visible, axis=0), depth > 0)
            for k, truth in enumerate(truths):
                assert truth.px_count_visib == visible[k].sum()
                assert truth.bbox_visib == mask_roi(visible[k])
                whole = dataset.mask(scene, image, k, visible=False)
                assert truth.visib_fract == pytest.approx(visible[k].sum() / whole.sum())
            rgb = dataset.image(scene, image)
            assert rgb.shape == (HEIGHT, WIDTH, 3) and rgb.dtype == np.uint8
            gray = (rgb[..., 0] == rgb[..., 2]).all()
            assert gray == (scene == 48)
            if not gray and dataset.image_path(scene, image).suffix == ".png":
                inside = again.mask
                np.testing.assert_array_equal(rgb[inside], again.rgb[inside])
    suffixes = {dataset.image_path(*place).suffix for place in dataset.images}
    assert suffixes == {".png", ".jpg", ".tif"}


def test_models_and_their_symmetries(dataset: BopDataset) -> None:
    assert sorted(dataset.models) == sorted(dataset.eval_models) == [CAN, BOX, DRILL]
    assert dataset.models[DRILL].path.parent.name == "models"
    assert dataset.eval_models[DRILL].path.parent.name == "models_eval"
    ((axis, _),) = dataset.symmetries(CAN).continuous
    np.testing.assert_array_equal(axis, [0, 0, 1])
    assert len(dataset.symmetries(BOX).discrete) == 1
    assert len(dataset.symmetries(DRILL).transforms()) == 1
    for number in dataset.models:
        measured = load_object(dataset.models[number]).diameter
        assert dataset.diameter(number) == pytest.approx(measured, rel=1e-3)


def test_other_layouts(copy: MiniBop) -> None:
    """T-LESS's folder names, no evaluation models, 16-bit gray, no scene_gt_info."""
    folder = copy.root / "tless"
    copy.folder.rename(folder)
    shutil.copytree(folder / "models", folder / "models_cad")
    (folder / "models_cad" / "obj_000008.ply").unlink()
    (folder / "test").rename(folder / "test_primesense")
    tless = BopDataset(copy.root, "tless")
    assert sorted(tless.models) == [CAN, BOX] and tless.models[CAN].path.parent.name == "models_cad"
    assert tless.split_dir.name == "test_primesense"
    shutil.rmtree(folder / "models_eval")
    assert tless.eval_models[DRILL].path.parent.name == "models"
    (folder / "models" / "models_info.json").unlink()
    bare = BopDataset(copy.root, "tless")
    assert bare.diameter(DRILL) == pytest.approx(load_object(bare.eval_models[DRILL]).diameter)

    path = tless.image_path(48, 0)
    before = tless.image(48, 0)
    assert cv2.imwrite(str(path), before[..., 0].astype(np.uint16) * 257)
    np.testing.assert_array_equal(tless.image(48, 0), before)
    (tless.split_dir / "000048" / "scene_gt_info.json").unlink()
    (truth, *_) = BopDataset(copy.root, "tless").ground_truth(48, 0)
    assert truth.visib_fract is None and truth.T_cam_obj[2, 3] > 0.5
    (folder / "test_kinect").mkdir()
    with pytest.raises(DatasetError, match="test_kinect, test_primesense.*--split"):
        BopDataset(copy.root, "tless")
    assert BopDataset(copy.root, "tless", "test_primesense").images == tless.images


def test_what_cannot_be_read_is_named(copy: MiniBop) -> None:
    scene = copy.folder / "test" / "000002"

    def says(read: Callable[[BopDataset], Any], *words: str) -> None:
        with pytest.raises(DatasetError) as error:
            read(opened(copy))
        for word in words:
            assert word in str(error.value)

    rewrite(scene / "scene_camera.json", lambda c: c.pop("7") and None)
    says(lambda d: d.camera(2, 7), "000002/scene_camera.json", "no entry of image 7")
    rewrite(scene / "scene_camera.json", lambda c: c["3"].update(cam_K=[1, 2, 3]))
    says(lambda d: d.camera(2, 3), "scene_camera.json, image 3", "BOP's form")
    rewrite(scene / "scene_camera.json", lambda c: c["11"].pop("depth_scale") and None)
    says(lambda d: d.depth(2, 11), "scene_camera.json, image 11", "lacks 'depth_scale'")
    (scene / "scene_camera.json").write_text("{")
    says(lambda d: d.camera(2, 11), "scene_camera.json is no JSON file")
    rewrite(scene / "scene_gt.json", lambda c: c["3"][1].pop("cam_t_m2c") and None)
    says(lambda d: d.ground_truth(2, 3), "scene_gt.json, image 3, instance 1", "cam_t_m2c")
    rewrite(scene / "scene_gt_info.json", lambda c: c["7"].pop() and None)
    says(lambda d: d.ground_truth(2, 7), "scene_gt_info.json, image 7", "1 instances, scene_gt.json has 2")
    (scene / "scene_gt.json").write_text("[]")
    says(lambda d: d.ground_truth(2, 7), "scene_gt.json", "got list")
    (scene / "rgb" / "000003.png").write_bytes(b"\x89PNG broken")
    says(lambda d: d.image(2, 3), "000003.png", "damaged")
    says(lambda d: d.image(2, 4), "no image 4", "000002/rgb")
    says(lambda d: d.image(3, 4), "000003", "not complete")
    (scene / "depth" / "000003.png").unlink()
    says(lambda d: d.depth(2, 3), "no depth image 3")
    says(lambda d: d.mask(2, 3, 9), "000003_000009.png can't be read")
    says(lambda d: d.symmetries(99), "no object 99", "1, 5, 8")
    targets = copy.folder / "test_targets_bop19.json"
    rewrite(targets, lambda entries: entries[4].pop("inst_count") and None)
    says(lambda d: d.targets, "test_targets_bop19.json, entry 4", "inst_count")
    targets.unlink()
    says(lambda d: d.targets, "test_targets_bop19.json can't be read")
    shutil.rmtree(copy.folder / "models")
    says(lambda d: d.models, "models", "not complete")
    with pytest.raises(DatasetError, match="no folder .*/other"):
        BopDataset(copy.root, "other")


def named(selection: Any) -> list[tuple[str, float]]:
    return [(segment.class_id, segment.score) for segment in selection.segments]


def test_targets_get_their_surest_detections(mini_bop: MiniBop, dataset: BopDataset) -> None:
    detections = BopDetections(mini_bop.detections)
    assert detections.images == set(dataset.images) - {UNSEEN}

    found = detections.select(dataset.targets_of(2, 3), SIZE)
    # The can's weaker double and the detection without a score are more than is asked for.
    assert named(found) == [("obj_000001", 0.9), ("obj_000005", 0.8), ("obj_000008", 0.7)]
    assert found.obj_ids == [CAN, BOX, DRILL]
    assert found.time == 0.2 and not found.problems
    for k, segment in enumerate(found.segments):
        np.testing.assert_array_equal(segment.mask, dataset.mask(2, 3, k))

    found = detections.select(dataset.targets_of(*TWICE[:2]), SIZE)
    assert named(found) == [("obj_000001", 0.9), ("obj_000008", 0.8), ("obj_000008", 0.7)]
    capped = detections.select(dataset.targets_of(*TWICE[:2]), SIZE, cap=1)
    assert named(capped) == [("obj_000001", 0.9), ("obj_000008", 0.8)]


def test_an_object_that_was_not_detected_gets_what_was(mini_bop: MiniBop, dataset: BopDataset) -> None:
    scene, image, missing = UNDETECTED
    found = BopDetections(mini_bop.detections).select(dataset.targets_of(scene, image), SIZE)
    assert named(found) == [("obj_000001", 0.9), ("obj_000005", 0.8), ("obj_000008", 0.9)]
    np.testing.assert_array_equal(found.segments[2].mask, found.segments[0].mask)
    many = [Target(scene, image, missing, 9)]
    found = BopDetections(mini_bop.detections).select(many, SIZE)
    assert named(found) == [("obj_000008", score) for score in (0.9, 0.8, 0.3)]
    assert found.problems.counts == {NO_SCORE: 1}


def test_nothing_detected_is_counted(mini_bop: MiniBop, dataset: BopDataset) -> None:
    found = BopDetections(mini_bop.detections).select(dataset.targets_of(*UNSEEN), SIZE)
    assert (found.segments, found.time) == ([], 0.0)
    assert found.problems.counts == {NOTHING_DETECTED: 1}
    assert "scene 48 image 1" in found.problems.lines()[0]


def test_bad_detections_are_counted_and_the_others_used(copy: MiniBop) -> None:
    def spoil(entries: list[dict[str, Any]]) -> None:
        of = [k for k, e in enumerate(entries) if (e["scene_id"], e["image_id"]) == (2, 3)]
        entries[of[0]]["segmentation"] = {"counts": rle_encode(np.ones((8, 8))), "size": [8, 8]}
        entries[of[1]]["segmentation"]["counts"][-1] += 1
        entries[of[2]]["score"] = 0.0
        entries[of[3]]["score"] = float("nan")
        entries[of[4]].pop("category_id")

    rewrite(copy.detections, spoil)
    detections = BopDetections(copy.detections)
    assert detections.problems.counts == {"bad entry": 2}
    assert "entry 3" in detections.problems.lines()[0]
    found = detections.select(opened(copy).targets_of(2, 3), SIZE)
    assert found.segments == []
    assert found.problems.counts == {"mask of another size": 1, "broken mask": 1, NO_SCORE: 1}
    assert all(f"{copy.detections}, entry {k}" in text for k, (_, text) in enumerate(found.problems.entries))
    assert len(detections.select(opened(copy).targets_of(48, 0), SIZE).segments) == 3

    for content in ("[]", "{}", "[1, 2]", "nonsense"):
        copy.detections.write_text(content)
        with pytest.raises(SegmentError, match="cnos_mini.json"):
            BopDetections(copy.detections)


def row(seed: int, **changes: Any) -> BopRow:
    rng = np.random.default_rng(seed)
    R = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    fields = {"scene_id": 2, "im_id": seed, "obj_id": 5, "score": 1 / 3, "R": R, "t_mm": rng.normal(size=3)}
    return BopRow(**{**fields, **changes})


def test_a_csv_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, rows = tmp_path / "picopose_mini-test.csv", [row(seed, time=seed / 7) for seed in range(4)]
    write_results(path, rows)
    lines = path.read_text().splitlines()
    assert lines[0] == HEADER == "scene_id,im_id,obj_id,score,R,t,time"
    assert lines[1].count(",") == 6 and lines[1].split(",")[4].count(" ") == 8
    bare = tmp_path / "bare.csv"
    bare.write_text("\n".join(lines[1:]) + "\n\n")
    for file in (path, bare):
        for read, written in zip(read_results(file), rows, strict=True):
            assert (read.scene_id, read.im_id, read.obj_id) == (2, written.im_id, 5)
            assert (read.score, read.time) == (written.score, written.time)
            np.testing.assert_array_equal(read.R, written.R)
            np.testing.assert_array_equal(read.t_mm, written.t_mm)
    T = rows[0].T_cam_obj
    np.testing.assert_allclose(BopRow.of_pose(2, 0, 5, 0.5, T, -1.0).t_mm, rows[0].t_mm)
    np.testing.assert_allclose(1000 * T[:3, 3], rows[0].t_mm)


@pytest.mark.parametrize(
    "broken",
    ["1,2,3", "a,2,5,1,{R},1 2 3,0", "1,2,5,1,1 2 3,1 2 3,0", "1,2,5,1,{R},1 2,0", "1,2,5,nan,{R},1 2 3,0"],
)
def test_a_broken_line_is_named(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "results.csv"
    path.write_text("\n".join([HEADER, row(0).line(), broken.format(R="1 0 0 0 1 0 0 0 1"), row(1).line()]))
    with pytest.raises(DatasetError, match=r"results\.csv, line 3: is no row"):
        read_results(path)
    with pytest.raises(DatasetError, match=r"none\.csv can't be read"):
        read_results(tmp_path / "none.csv")

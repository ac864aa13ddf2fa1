"""Scores of the BOP Challenge: against the toolkit's own numbers, and of a results file on a dataset.

``data/bop_numbers.npz`` was computed with the BOP toolkit; the script that did it is its entry ``meta``.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mini_bop import BOX, CAN, DRILL, TWICE, MiniBop

from picopose_ros.cli.main import main
from picopose_ros.evaluation.bop.dataset import BopDataset, GroundTruth
from picopose_ros.evaluation.bop.errors import Own
from picopose_ros.evaluation.bop.results import HEADER, BopRow, write_results
from picopose_ros.evaluation.metrics import (
    RECALL_THRESHOLDS,
    add,
    add_s,
    bop_symmetries,
    matched,
    mspd,
    mssd,
    ray_lengths,
    sphere_projections_overlap,
    translation_error,
    vsd_of_distances,
)
from picopose_ros.evaluation.score import hits_of, make_group
from picopose_ros.templates.meshes import Symmetries

KINDS = ("plain", "discrete", "continuous", "both")


@pytest.fixture(scope="module")
def toolkit() -> dict[str, Any]:
    path = Path(__file__).parent / "data" / "bop_numbers.npz"
    with np.load(path) as data:
        numbers = dict(data)
    return {**numbers, **json.loads(str(numbers["meta"]))}


def symmetries_of(info: dict[str, Any]) -> Symmetries:
    return Symmetries(
        discrete=tuple(np.reshape(T, (4, 4)) for T in info.get("symmetries_discrete", ())),
        continuous=tuple(
            (np.array(s["axis"]), np.array(s["offset"])) for s in info.get("symmetries_continuous", ())
        ),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_the_toolkits(toolkit: dict[str, Any], kind: str) -> None:
    """Random poses, near and far, the same one, a symmetric form of the truth, one behind the camera."""
    symmetries = bop_symmetries(symmetries_of(toolkit["infos"][kind]))
    assert len(symmetries) == toolkit[f"symmetry_count_{kind}"]
    np.testing.assert_allclose(symmetries[::37, :3], toolkit[f"symmetries_{kind}"], atol=1e-9)
    points, K = toolkit["points"], toolkit["K"]
    ours = [
        [
            mssd(points, estimate, truth, symmetries),
            mspd(points, estimate, truth, symmetries, K),
            add(points, estimate, truth),
            add_s(points, estimate, truth),
            translation_error(estimate, truth),
        ]
        for estimate, truth in zip(toolkit["estimates"], toolkit["truths"])
    ]
    np.testing.assert_allclose(ours, toolkit[f"errors_{kind}"], rtol=1e-9, atol=1e-7)
    assert toolkit[f"errors_{kind}"][-1, 0] > 1000, "behind the camera"
    if kind in ("discrete", "both"):
        assert toolkit[f"errors_{kind}"][8, :2].max() < 1e-9, "the same by symmetry"


def test_what_is_far_apart_is_what_the_toolkit_says(toolkit: dict[str, Any]) -> None:
    ours = [
        [sphere_projections_overlap(estimate, truth, 120.0) for truth in toolkit["truths"]]
        for estimate in toolkit["estimates"]
    ]
    np.testing.assert_array_equal(ours, toolkit["projections_overlap"])
    assert 0 < np.mean(ours) < 1


def test_vsd_is_the_toolkits(toolkit: dict[str, Any]) -> None:
    """Occluded, unmeasured, nothing rendered, nothing visible, nothing at all."""
    rays = ray_lengths(24, 32, toolkit["K_vsd"])
    ours = [
        vsd_of_distances(estimate * rays, truth * rays, scene * rays, 120.0, delta=15.0)
        for estimate, truth, scene in toolkit["vsd_cases"]
    ]
    np.testing.assert_allclose(ours, toolkit["vsd_errors"], atol=1e-12)


def test_recalls_are_the_toolkits(toolkit: dict[str, Any]) -> None:
    """Which estimates and instances count, who finds which: duplicates, swapped instances, none."""
    found = np.zeros((len(RECALL_THRESHOLDS), 6))
    column = {1: 0, 2: 1, 5: 2}
    for one in toolkit["scenes"]:
        # The place of an instance stands in its translation, so that it is known again in the group.
        truths = [
            GroundTruth(obj, np.diag([1.0, 1, 1, 1]) + np.pad([[k]], ((0, 3), (3, 0))), visible)
            for k, (obj, visible) in enumerate(zip(one["gts"], one["visib"]))
        ]
        for obj_id, count in one["targets"].items():
            told = [e for e in one["ests"] if e["obj_id"] == int(obj_id)]
            rows = [
                BopRow(0, 0, int(obj_id), e["score"], np.eye(3), np.array([k, 0, 0.0]))
                for k, e in enumerate(told)
            ]
            group = make_group(0, 0, int(obj_id), count, rows, truths)
            errors = np.array(
                [
                    [told[int(r.t_mm[0])]["errors"][str(int(t.T_cam_obj[0, 3]))] for t in group.truths]
                    for r in group.estimates
                ]
            ).reshape(len(group.estimates), len(group.truths))
            scores = [row.score for row in group.estimates]
            found[:, column[int(obj_id)]] += Own().found(errors, scores, RECALL_THRESHOLDS)
            found[:, 3 + column[int(obj_id)]] += len(group.truths)
    hits, targets = found[:, :3], found[:, 3:]
    theirs = toolkit["recalls"]
    np.testing.assert_array_equal(targets.sum(1), theirs[:, 4])
    np.testing.assert_allclose(hits.sum(1) / targets.sum(1), theirs[:, 0])
    np.testing.assert_allclose(hits / targets, theirs[:, 1:4])


def test_matching_by_hand() -> None:
    # The surer estimate takes the instance it is nearest to, though the other one needs that.
    errors = np.array([[0.10, 0.11], [0.20, 0.60]])
    np.testing.assert_array_equal(
        matched(errors, [0.05, 0.15, 0.30, 0.70]), [[-1, -1], [0, -1], [0, -1], [0, 1]]
    )
    np.testing.assert_array_equal(matched(np.array([[0.3, 0.1], [0.1, 0.3]]), [0.2]), [[1, 0]])
    np.testing.assert_array_equal(matched(np.array([[0.2]]), [0.2]), [[-1]])
    np.testing.assert_array_equal(matched(np.array([[np.nan, np.inf]]), [9.0]), [[-1, -1]])
    assert matched(np.zeros((0, 2)), [0.1]).tolist() == [[-1, -1]]
    assert matched(np.zeros((2, 0)), [0.1]).shape == (1, 0)
    nothing = {name: np.zeros((0, 1)) for name in ("mssd", "mspd", "add", "translation")}
    assert not np.concatenate(
        [np.ravel(h) for h in hits_of(Own(), {**nothing, "vsd": np.zeros((0, 1, 10))}, []).values()]
    ).any()


# -- the command ------------------------------------------------------------------------------------


def truth_rows(dataset: BopDataset) -> list[BopRow]:
    return [
        BopRow.of_pose(scene, image, truth.obj_id, 0.5, truth.T_cam_obj, 0.25)
        for scene, image in dataset.images
        for truth in dataset.ground_truth(scene, image)
    ]


def score(mini: MiniBop, path: Path, *options: str) -> dict[str, Any]:
    code = main(["eval", "score", str(path), "--root", str(mini.root), "--dataset", mini.name, *options])
    assert code == 0
    return json.loads(path.with_suffix(".scores.json").read_text())


@pytest.fixture(scope="module")
def dataset(mini_bop: MiniBop) -> BopDataset:
    return BopDataset(mini_bop.root, mini_bop.name)


def test_a_results_file_is_scored(
    mini_bop: MiniBop, dataset: BopDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """True poses but for one object, missing in one image and off in another; and what counts not."""
    path = tmp_path / "results.csv"
    rows = [row for row in truth_rows(dataset) if (row.scene_id, row.im_id, row.obj_id) != (2, 3, BOX)]
    boxes = [k for k, row in enumerate(rows) if row.obj_id == BOX]
    off = rows[boxes[0]]
    moved = BopRow(off.scene_id, off.im_id, BOX, 0.9, off.R, off.t_mm + [0, 0, 60.0], off.time)
    rows[boxes[0]] = BopRow(off.scene_id, off.im_id, BOX, 0.8, off.R, off.t_mm, off.time)
    flipped = [row for row in rows if row.obj_id == BOX][1]
    T = flipped.T_cam_obj @ bop_symmetries(dataset.symmetries(BOX))[1]
    rows[rows.index(flipped)] = BopRow.of_pose(flipped.scene_id, flipped.im_id, BOX, 0.5, T, flipped.time)
    rows += [moved, BopRow(2, 3, 77, 1.0, np.eye(3), np.ones(3), off.time)]
    write_results(path, rows)
    report = score(mini_bop, path, "--implementation", "own")

    objects = report["objects"]
    assert set(objects) == {str(CAN), str(BOX), str(DRILL)}
    for name in (str(CAN), str(DRILL)):
        assert all(objects[name][key] == 1 for key in ("vsd", "mssd", "mspd", "ar", "add", "translation_5cm"))
    box = objects[str(BOX)]
    assert box["targets"] == 5 and box["add"] == box["translation_5cm"] == pytest.approx(3 / 5)
    # Of the worse estimate, which is the surer one, six centimetres are a share of the diameter.
    share = 0.06 / dataset.diameter(BOX)
    assert box["mssd"] == pytest.approx((3 + np.mean(share < RECALL_THRESHOLDS)) / 5, abs=1e-6)
    assert 3 / 5 <= box["vsd"] < 1 and 3 / 5 < box["mspd"] < 1
    overall = report["overall"]
    assert overall["targets"] == len(truth_rows(dataset))
    assert overall["ar"] == pytest.approx(
        np.mean([overall[key] for key in ("vsd", "mssd", "mspd")]), abs=1e-5
    )
    assert report["rows"] == {"given": len(rows), "counted": len(rows) - 2, "not asked for": 2}
    assert report["score"]["seconds_per_image"] == 0.25
    said = capsys.readouterr()
    assert "**all**" in said.out and "object 5" in said.out and "2 rows" in said.err

    # The toolkit's functions on the same rows, where there is a toolkit.
    if importlib.util.find_spec("bop_toolkit_lib") is None:
        command = ["eval", "score", str(path), "--root", str(mini_bop.root), "--dataset", mini_bop.name]
        assert main([*command, "--implementation", "toolkit"]) != 0
        assert "--implementation own" in capsys.readouterr().err
        assert score(mini_bop, path)["score"]["implementation"] == "own"
    else:
        theirs = score(mini_bop, path)
        assert theirs["score"].pop("implementation") == "toolkit" and report["score"].pop("implementation")
        assert theirs == report


def test_instances_count_by_how_visible_they_are(
    dataset: BopDataset, mini_bop: MiniBop, tmp_path: Path
) -> None:
    scene, image, obj = TWICE
    truths = [truth for truth in dataset.ground_truth(scene, image) if truth.obj_id == obj]
    assert len(truths) == 2
    rows = [
        BopRow.of_pose(scene, image, obj, 0.1 * k, truth.T_cam_obj, 1.0) for k, truth in enumerate(truths)
    ]
    best = max(truths, key=lambda truth: truth.visib_fract)
    group = make_group(scene, image, obj, 1, rows, truths)
    assert group.estimates == [rows[1]] and group.truths == [best]
    assert len(make_group(scene, image, obj, 2, rows, truths).truths) == 2


def test_what_cannot_be_scored_is_named(
    mini_bop: MiniBop, dataset: BopDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.csv"
    rows = truth_rows(dataset)
    command = ["eval", "score", str(path), "--root", str(mini_bop.root), "--dataset", mini_bop.name]
    path.write_text("\n".join([HEADER, rows[0].line(), rows[1].line().rsplit(",", 2)[0]]))
    assert main(command) != 0
    assert f"{path}, line 3" in capsys.readouterr().err
    assert not path.with_suffix(".scores.json").exists()
    write_results(path, rows[:2])
    assert main([*command[:-1], "lmo"]) != 0
    assert "lmo" in capsys.readouterr().err
    # Several times for one image: scored, but said.
    write_results(path, [rows[0], BopRow(*(*vars(rows[1]).values(),)[:-1], 9.0)])
    report = score(mini_bop, path, "--implementation", "own")
    assert report["score"]["seconds_per_image"] is None
    assert "several times" in capsys.readouterr().err

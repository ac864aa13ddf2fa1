"""The synthetic benchmark: what it measures, with a network that knows the answer and one that does not."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import trimesh
from oracle import OracleModel, Placed
from test_docs import load_script

from picopose_ros.cli.main import main
from picopose_ros.estimator import EstimatorSettings, Hypothesis, PoseEstimator
from picopose_ros.evaluation.benchmark import Benchmark
from picopose_ros.evaluation.detection import benchmark_images
from picopose_ros.evaluation.figures import bottleneck, figures, summarise
from picopose_ros.evaluation.metrics import BopErrors, PoseErrors
from picopose_ros.evaluation.records import PoseFigures, Record
from picopose_ros.evaluation.scenes import KINDS, Kind, make_scenes
from picopose_ros.evaluation.stages import (
    TrueMap,
    certainty_counts,
    certainty_figures,
    endpoint_errors,
    true_affine,
    true_map,
    viewpoints,
)
from picopose_ros.model import PRESETS, PicoPose, load_model, save_model
from picopose_ros.model.affine import initial_flow
from picopose_ros.segmentation import Segment
from picopose_ros.templates.bank import TemplateBank, build_bank
from picopose_ros.templates.meshes import ObjectMesh, ObjectSpec, load_object
from picopose_ros.templates.renderer import MeshRenderer
from picopose_ros.training.pairs import Difficulty, make_query, pair_labels
from picopose_ros.training.pool import PoolReader, build_pool


def textured_box(path: Path, seed: int) -> None:
    """A box whose vertices have colours, so that no two of its sides look alike."""
    mesh = trimesh.creation.box((0.10, 0.07, 0.04)).subdivide()
    colours = np.random.default_rng(seed).integers(30, 255, (len(mesh.vertices), 3))
    mesh.visual.vertex_colors = np.column_stack([colours, np.full(len(colours), 255)]).astype(np.uint8)
    mesh.export(path)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> ObjectMesh:
    path = tmp_path_factory.mktemp("meshes") / "box.ply"
    textured_box(path, 0)
    return load_object(ObjectSpec("box", path))


@pytest.fixture(scope="module")
def bank(box: ObjectMesh) -> TemplateBank:
    return build_bank(box, OracleModel(), 42)


@dataclass(frozen=True)
class Facts:
    group: str = "seen families"
    ambiguous: bool = False
    symmetric: bool = False


@pytest.mark.parametrize("kind", KINDS)
def test_eval_detection_measures_on_the_same_scenes(box: ObjectMesh, kind: Kind) -> None:
    images = list(benchmark_images([box], 2, 4, kind))
    for image, scene in zip(images, make_scenes([box], 2, 4, kind), strict=True):
        np.testing.assert_array_equal(image.rgb, scene.rgb)
        assert len(image.truth) == len(image.poses) == len(scene.instances) > 0
        np.testing.assert_array_equal(image.truth[0].mask, scene.instances[0].visible)


def test_a_perfect_network_has_perfect_figures(box: ObjectMesh, bank: TemplateBank) -> None:
    model = OracleModel()
    model.know(bank)
    estimator = PoseEstimator(model, {"box": bank}, EstimatorSettings(hypotheses=5, refinements=0))
    facts = {"box": Facts()}
    with MeshRenderer() as renderer:
        benchmark = Benchmark(estimator, {"box": box}, facts, 0, renderer)
        for index, scene in enumerate(make_scenes([box], 3, seed=4)):
            truths = [
                Placed(bank, one.T_cam_obj, Segment("box", 1.0, one.visible)) for one in scene.instances
            ]
            model.show(scene.rgb, scene.camera, truths)
            benchmark.add(index, scene)
    report = summarise(benchmark.records, facts, benchmark.stages)
    assert benchmark.stages == ["stage 1", "stage 2", "stage 3, 1 hypothesis", "stage 3, 5 hypotheses"]
    overall = report["overall"]["unambiguous"]
    assert overall["queries"] == 3 and "ambiguous" not in report["overall"]
    for stage in benchmark.stages[2:]:
        pose = overall["pose"][stage]
        assert pose["add_recall"] == 1 and pose["mspd_10px"] == 1 and pose["answered"] == 3
        assert pose["rotation_deg"] < 0.2 and pose["translation_diameters"] < 0.01
        assert pose["ar"] > 0.95 and pose["vsd"] > 0.95
    # Its affine knows the place but no turn, and stage 1 not even the size.
    assert overall["pose"]["stage 2"]["translation_diameters"] < 0.05
    assert overall["pose"]["stage 2"]["rotation_deg"] > 5
    ends = overall["endpoints_px"]["right template given"]
    assert ends["3"]["median"] < 0.01 and ends["2"]["median"] > 5
    certainty = overall["certainty"]["right template given"]
    assert certainty["recall"] == 1 and certainty["recall_good"] == 1
    assert set(report["bottleneck"]["all"].values()) == {1.0}
    assert report["groups"]["seen families"]["all"]["queries"] == 3
    assert sum(cut["all"]["queries"] for cut in report["visibility"].values() if cut) == 3


# -- labels ----------------------------------------------------------------------------------------


def test_labels_are_those_of_training(tmp_path: Path) -> None:
    """The same template and query, as a training pair and as a scene."""
    build_pool(tmp_path, objects=1, first_seed=41, clusters=1, queries=2)
    item = PoolReader(tmp_path).at(0, 0)
    plain = Difficulty(occlusion=0, keep_background=0, degrade=0, photometric=0, turn=0)
    rng = np.random.default_rng(0)
    for view in item.queries:
        query = make_query(view, rng, plain, item.template.rgb)
        labels = pair_labels(item.template, query, item.diagonal)
        stand_in = SimpleNamespace(
            points_consistent=item.template.points_consistent[None],
            T_cam_ctr=item.template.T_cam_ctr[None],
            extents=np.array([item.diagonal, 0, 0]),
        )
        shown = query.shown > 0
        depth = cv2.warpAffine(view.depth, query.turn, shown.shape, flags=cv2.INTER_NEAREST)
        found = true_map(stand_in, 0, query.T_cam_ctr, query.K, query.M_crop_img, depth, shown)
        assert labels.valid.sum() > 200
        np.testing.assert_array_equal(found.visible, labels.valid > 0)
        np.testing.assert_allclose(
            found.position[:, found.visible], labels.position[:, found.visible], atol=0.01
        )


def moved_by(affine: np.ndarray) -> TrueMap:
    """A truth that is an affine, visible in the middle."""
    grid = np.stack(np.meshgrid(np.arange(64), np.arange(64)))
    pixels = np.floor((grid + 0.5) * 3.5)
    position = np.tensordot(affine[:2, :2], pixels, 1) + affine[:2, 2, None, None]
    middle = np.zeros((64, 64), bool)
    middle[16:48, 16:48] = True
    return TrueMap(position, middle, middle)


def test_the_true_affine_is_the_one_that_moves_the_cells() -> None:
    angle, scale = 0.7, 1.2
    affine = np.eye(3)
    affine[:2] = scale * np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]])
    affine[:2, 2] = 30, -20
    truth = moved_by(affine)
    np.testing.assert_allclose(true_affine(truth, np.array([100.0, 120.0])), affine, atol=1e-6)
    hidden = replace(truth, visible=truth.visible & False)
    assert true_affine(hidden, np.zeros(2)) is None


def test_end_points_by_hand() -> None:
    truth = moved_by(np.eye(3))
    exact = truth.flow
    off = exact + np.array([6.0, 8.0])[:, None, None] / 3.5
    affine = np.eye(3)
    affine[0, 2] = 2.0
    coarse = initial_flow(torch.eye(3)[None], None)[0].numpy()
    matches = np.full((2, 16, 16), 0.0)
    hypothesis = Hypothesis(0, 1.0, affine, off, exact[0], ((coarse, exact[0]),), matches)
    errors = endpoint_errors(hypothesis, truth)
    assert list(errors) == ["1", "2", "3 at 16", "3"]
    np.testing.assert_allclose(errors["3"], 10.0)
    np.testing.assert_allclose(errors["2"], 2.0)
    assert len(errors["3"]) == 32 * 32 and len(errors["1"]) == 8 * 8
    # A label at a patch's middle is that of its middle cells, pixels 5 and 8; the flow points to 7.5.
    np.testing.assert_allclose(errors["3 at 16"], np.hypot(1, 1), rtol=1e-6)
    certainty = np.where(np.arange(64) < 32, 1.0, -1.0) * np.ones((64, 64))
    off[:, :32] = exact[:, :32]  # the upper half is right
    counts = certainty_counts(replace(hypothesis, certainty=certainty), truth)
    assert counts == {
        "claimed": 512,
        "claimed_visible": 512,
        "claimed_good": 256,
        "visible": 1024,
        "good": 512,
    }
    shares = certainty_figures([counts])
    assert shares == {"precision": 1.0, "recall": 0.5, "precision_good": 0.5, "recall_good": 0.5}


def test_viewpoints_ignore_the_turn_in_the_image_and_know_symmetries(bank: TemplateBank) -> None:
    chosen = 17
    turn = trimesh.transformations.rotation_matrix(1.1, [0, 0, 1])
    T = turn @ bank.T_cam_ctr[chosen].astype(float) @ bank.T_ctr_obj
    T[:3, 3] *= 1.5
    views = viewpoints(bank, T, np.eye(4)[None])
    assert views.nearest == chosen and views.errors_deg[chosen] < 0.1
    # The next template of an icosahedron's 42 lies 31 to 36 degrees away.
    assert 30 < np.sort(views.errors_deg)[1] < 40
    flip = trimesh.transformations.rotation_matrix(np.pi, [0, 0, 1])
    both = viewpoints(bank, T @ flip, np.stack([np.eye(4), flip]))
    assert both.errors_deg[chosen] < 0.1
    np.testing.assert_allclose(both.truths[chosen], T @ np.linalg.inv(bank.T_ctr_obj), atol=1e-6)
    assert viewpoints(bank, T @ flip, np.eye(4)[None]).errors_deg[chosen] > 10


# -- figures ---------------------------------------------------------------------------------------


def pose_figures(add: float, degrees: float) -> PoseFigures:
    bop = BopErrors(np.full(10, 0.12), 0.12, 12.0)
    return PoseFigures(PoseErrors(degrees, 0.01, add, 1.0), bop, "offsets")


def test_a_missing_pose_is_wrong_everywhere() -> None:
    found = Record("s", "a", 0.7, 3.0, 2.0, {"stage 3": pose_figures(0.05, 2.0)}, confidence=0.8)
    far = Record("s", "a", 0.9, 40.0, 12.0, {"stage 3": pose_figures(0.2, 6.0)}, confidence=0.4)
    missing = Record("s", "b", 0.3)
    for record, right in ((found, True), (far, False), (missing, False)):
        record.substituted = dict.fromkeys(bottleneck([]), right)
    result = figures([found, far, missing], ["stage 3"])
    assert result["queries"] == 3 and result["objects"] == 2
    assert result["viewpoint"]["best template"]["within_15_deg"] == pytest.approx(1 / 3)
    assert result["viewpoint"]["best of five"]["within_15_deg"] == pytest.approx(2 / 3)
    pose = result["pose"]["stage 3"]
    assert pose["answered"] == 2 and pose["add_recall"] == pytest.approx(1 / 3)
    assert pose["rotation_deg"] == 6.0  # of 2, 6 and none
    assert pose["mssd"] == pytest.approx(0.8 * 2 / 3) and pose["mspd"] == pytest.approx(0.8 * 2 / 3)
    assert pose["mspd_10px"] == 0
    facts = {"a": Facts(), "b": Facts("unseen both", True)}
    report = summarise([found, far, missing], facts, ["stage 3"])
    assert report["overall"]["unambiguous"]["pose"]["stage 3"]["add_recall"] == 0.5
    assert list(report["groups"]["unseen both"]) == ["all", "ambiguous"]
    cuts = {name: cut["all"]["queries"] for name, cut in report["visibility"].items() if cut}
    assert cuts == {"0% to 40%": 1, "60% to 80%": 1, "80% to 100%": 1}
    assert set(report["bottleneck"]["unambiguous"].values()) == {0.5}
    assert report["confidence"]["all"]["auc_correct_pose"] == 1.0


# -- command ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two objects, one file that is no mesh, and an untrained network."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "meshes").mkdir()
    for seed, name in enumerate(("one", "two")):
        textured_box(folder / "meshes" / f"{name}.ply", seed)
    (folder / "meshes" / "broken.ply").write_text("no mesh")
    torch.manual_seed(0)
    save_model(PicoPose(PRESETS["tiny"]), folder / "weights.safetensors")
    return folder


def words(desk: Path, out: Path, *more: str, meshes: str = "meshes") -> list[str]:
    given = [
        "eval",
        "synthetic",
        "--meshes",
        str(desk / meshes),
        "--weights",
        str(desk / "weights.safetensors"),
    ]
    given += ["--cache-dir", str(desk / "cache"), "--viewpoints", "42", "--out", str(out)]
    return [*given, "--scenes", "2", "--seed", "5", *more]


def test_a_report_is_the_same_every_time_and_names_what_is_left_out(desk, tmp_path, capsys) -> None:
    first, second = tmp_path / "first.json", tmp_path / "new" / "second.json"
    pictures, tables = tmp_path / "pictures", tmp_path / "tables.md"
    more = ["--mask-noise", "--hypotheses", "2"]
    assert main(words(desk, first, *more, "--overlays", str(pictures), "--markdown", str(tables))) == 1
    assert "object 'broken' is left out" in capsys.readouterr().err
    report = json.loads(first.read_text())
    assert list(report["unreadable"]) == ["broken"] and report["benchmark"]["mask_noise"] is True
    assert report["figures"]["overall"]["all"]["queries"] == 2 == len(report["queries"])
    assert report["stages"][2:] == ["stage 3, 1 hypothesis", "stage 3, 2 hypotheses"]
    assert report["times"]["milliseconds_per_query"]["regress"] > 0
    text = tables.read_text()
    assert "`broken`" in text and "| **all** | 2 |" in text and "degraded masks" in text
    names = {path.name for path in pictures.iterdir()}
    assert report["difficulty"]["visible"]["5%"] <= report["difficulty"]["visible"]["95%"] <= 1
    assert {
        "contact_sheet.png",
        "reliability.png",
        "difficulty.png",
        "single-5-00000.jpg",
        "single-5-00001.jpg",
    } <= names
    assert all(cv2.imread(str(path)) is not None for path in pictures.iterdir())

    # docs/accuracy.md takes its figures from such a report.
    script = load_script(Path(__file__).resolve().parent.parent / "scripts" / "accuracy.py")
    summary = script.summarise(report, "the command")
    assert summary["queries"] == 2 and [row["min_score"] for row in summary["min_score"]][:2] == [0, 0.6]
    page = script.page({"runs": {"main": summary}, "tables": {"refinement": [{"note": "none yet"}]}})
    assert "| true masks | 2 |" in page and "none yet" in page and "the command" in page

    assert main(words(desk, second, *more, "--calibrate")) == 1
    one, two = (path.read_text().split('"times"')[0] for path in (first, second))
    assert one == two and len(one) > 1000
    assert [path.name for path in second.parent.iterdir()] == ["second.json"]
    mapping = report["figures"]["confidence"]["all"]["mapping"]
    assert load_model("tiny", desk / "weights.safetensors").calibration == pytest.approx(
        (mapping["slope"], mapping["offset"]), rel=1e-4
    )


def test_what_cannot_work_is_said_before_the_work(desk, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert main(words(desk, tmp_path / "file" / "report.json")) == 2
    assert "report.json cannot be written" in capsys.readouterr().err
    assert main(words(desk, tmp_path)) == 2
    assert f"{tmp_path} cannot be written" in capsys.readouterr().err
    assert main(words(desk, tmp_path / "r.json", "--overlays", str(tmp_path / "file"))) == 2
    assert "cannot be written" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(words(desk, tmp_path / "r.json", meshes=str(tmp_path / "empty"))) == 2
    assert "holds no mesh" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()

"""``scripts/photograph_stages.py``: the truth in place of each stage, on views with reference poses."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
from test_docs import load_script
from test_eval_synthetic import textured_box

from picopose_ros.templates.meshes import ObjectSpec, load_object
from picopose_ros.templates.renderer import MeshRenderer

K = np.array([[600.0, 0, 319.5], [0, 600, 239.5], [0, 0, 1]])
POSE = np.array([[0.36, 0.48, -0.8, 0.01], [-0.8, 0.6, 0, -0.02], [0.48, 0.64, 0.6, 0.4], [0, 0, 0, 1]])
SMALL = cv2.imencode(".png", np.eye(4, dtype=np.uint8) * 255)[1].tobytes()
NO_CAMERA = b'[{"image": "", "mask": "", "unit": "m", "K": [1], "T_cam_obj_gt": [[1]]}]'


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(Path(__file__).parents[1] / "scripts/photograph_stages.py")


@pytest.fixture
def views(tmp_path: Path) -> Path:
    """Two views of a box, one of them without a reference pose."""
    (tmp_path / "a" / "meshes").mkdir(parents=True)
    textured_box(tmp_path / "a" / "meshes" / "box.ply", 0)
    mesh = load_object(ObjectSpec("box", tmp_path / "a" / "meshes" / "box.ply"))
    with MeshRenderer() as renderer:
        drawn = renderer.render(mesh, POSE, K, 640, 480)
    cv2.imwrite(str(tmp_path / "a" / "image.png"), drawn.rgb[..., ::-1])
    cv2.imwrite(str(tmp_path / "a" / "mask.png"), drawn.mask.astype(np.uint8) * 255)
    view = {"image": "image.png", "mask": "mask.png", "unit": "m", "object": "box", "K": K.tolist()}
    known = [{**view, "T_cam_obj_gt": POSE.tolist()}, {**view, "T_cam_obj_gt": None}]
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(known))
    return tmp_path


def test_with_the_truth_in_place_of_everything_a_view_is_right(
    script: ModuleType, views: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(views), "--viewpoints", "42", "--cache-dir", str(views / "cache")]) == 0
    rows = dict(
        [cell.strip() for cell in line.split("|")[1:3]] for line in capsys.readouterr().out.splitlines()
    )
    assert rows["the truth in place of"] == "meshes: 1 views"
    assert rows["everything"] == "1.00"
    assert 0 < float(rows["end-point error of stage 3, median, px"]) < 112


def test_depth_of_a_view_is_that_of_the_reference_pose(script: ModuleType, views: Path) -> None:
    ((folder, unit), found) = next(iter(script.read_views(views).items()))
    assert unit == "m" and len(found) == 1
    mesh = load_object(ObjectSpec("box", folder / "box.ply"))
    with MeshRenderer() as renderer:
        scene = script.scene_of(found[0], mesh, renderer)
    assert scene.instances[0].visib_fract == 1 and np.array_equal(scene.depth > 0, scene.instances[0].visible)
    assert 0.3 < scene.depth[scene.depth > 0].mean() < 0.4


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("manifest.json", b"{", "manifest.json: not a list of views"),
        ("manifest.json", b'[{"image": "image.png"}]', "no view with a reference pose"),
        ("manifest.json", b"[]", "no view with a reference pose"),
        ("manifest.json", NO_CAMERA, "manifest.json: not a list of views"),
        ("image.png", b"", "image.png: is no image file"),
        ("mask.png", b"", "mask.png"),
        ("mask.png", SMALL, "not of the size"),
        ("meshes/box.ply", b"", "box.ply cannot be read"),
    ],
)
def test_input_that_cannot_be_used_is_named(
    script: ModuleType, views: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, said: str
) -> None:
    (views / "a" / name).write_bytes(content)
    assert script.main([str(views), "--viewpoints", "42"]) == 2
    assert said in capsys.readouterr().err


def test_a_view_of_an_object_without_a_mesh_is_named(
    script: ModuleType, views: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = views / "a" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"box"', '"cup"'))
    assert script.main([str(views), "--viewpoints", "42"]) == 2
    assert "no usable mesh of cup" in capsys.readouterr().err

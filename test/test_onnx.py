"""The network as ONNX files, and poses by ONNX Runtime: the same as PyTorch's."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import trimesh

from picopose_ros.cli.main import main
from picopose_ros.errors import ConfigError, ExportError
from picopose_ros.estimation import backends, passes
from picopose_ros.estimator import EstimatorSettings, PoseEstimator, encode_by
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.poses import make_transform, rotation_angle_deg
from picopose_ros.model import load_model
from picopose_ros.model.export import export_onnx, read_manifest
from picopose_ros.model.onnx_stages import FASTER, OnnxParts, OnnxStages
from picopose_ros.segmentation import Segment
from picopose_ros.templates.bank import build_bank
from picopose_ros.templates.meshes import ObjectSpec, load_object
from picopose_ros.templates.renderer import MeshRenderer

SIZE = (640, 480)
K = np.array([[600.0, 0, 325], [0, 605, 238], [0, 0, 1]])
EXPORTED = ("descriptors", "encoder", "affine", "offsets32")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of the packaged network, exported by the command; all of them would take minutes."""
    folder = tmp_path_factory.mktemp("export") / "tiny"
    assert main(["export", str(folder), *(word for part in EXPORTED for word in ("--part", part))]) == 0
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    """A network, a bank and an image with three segments of its object."""
    model = load_model("tiny")
    mesh = trimesh.creation.box((0.06, 0.08, 0.11)).subdivide().subdivide()
    colours = np.random.default_rng(5).integers(0, 255, (len(mesh.vertices), 3))
    mesh.visual.vertex_colors = np.c_[colours, np.full(len(colours), 255)].astype(np.uint8)
    path = tmp_path_factory.mktemp("mesh") / "brick.ply"
    mesh.export(path)
    loaded = load_object(ObjectSpec("brick", path))
    bank = build_bank(loaded, model, 42)
    placed = [
        make_transform(cv2.Rodrigues(np.array(turn))[0], place)
        for turn, place in [
            ((0.4, -0.8, 0.5), (-0.12, 0.02, 0.5)),
            ((-1.2, 0.3, 0.1), (0.02, -0.06, 0.5)),
            ((2.0, 0.5, -0.7), (0.15, 0.06, 0.6)),
        ]
    ]
    with MeshRenderer() as renderer:
        rgb = renderer.render_scene([(loaded, T) for T in placed], K, *SIZE).rgb
        segments = [Segment("brick", 1.0, renderer.render(loaded, T, K, *SIZE).mask) for T in placed]
    return model, {"brick": bank}, rgb, segments


def estimate(world, **settings):
    model, banks, rgb, segments = world
    estimator = PoseEstimator(model, banks, EstimatorSettings(precision="fp32", refinements=0, **settings))
    return estimator.estimate(rgb, CameraModel(K, *SIZE), segments).poses


def assert_near(a, b) -> None:
    """At the median within .05 degrees and .1 mm."""
    assert [p.segment for p in a] == [p.segment for p in b] == [0, 1, 2]
    turns = [rotation_angle_deg(x.T_cam_obj[:3, :3], y.T_cam_obj[:3, :3]) for x, y in zip(a, b)]
    shifts = [np.linalg.norm(x.T_cam_obj[:3, 3] - y.T_cam_obj[:3, 3]) for x, y in zip(a, b)]
    assert np.median(turns) < 0.05 and np.median(shifts) < 1e-4


def test_the_manifest_says_what_was_exported_from_what(exported):
    manifest = read_manifest(exported)
    assert tuple(manifest["parts"]) == EXPORTED and manifest["preset"] == "tiny"
    assert manifest["precision"] == "fp32" and {"torch", "onnx"} <= set(manifest["versions"])
    for part in manifest["parts"].values():
        assert (exported / part["file"]).is_file()
        assert all(shape[0] == "batch" for shape in part["inputs"].values())
        assert all(difference < 0.05 for difference in part["largest_difference"].values())
    assert sorted(p.name for p in exported.iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize("parts", [FASTER["cpu"], EXPORTED[1:]])
def test_poses_of_both_backends_agree(world, exported, parts, monkeypatch):
    used = []

    def stages(model, device, backend, onnx_dir, precision, schedule):
        assert (backend, onnx_dir) == ("onnxruntime", str(exported))
        opened = OnnxParts(model, Path(onnx_dir), parts, device)
        run = opened.run
        monkeypatch.setattr(opened, "run", lambda part, *inputs: (used.append(part), run(part, *inputs))[1])
        return OnnxStages(model, opened, schedule)

    plain = estimate(world)
    monkeypatch.setattr(passes, "make_stages", stages)
    assert_near(plain, estimate(world, backend="onnxruntime", onnx_dir=str(exported)))
    assert set(used) == set(parts)


def test_what_is_not_there_is_exported_into_the_cache_once(world, exported, tmp_path, monkeypatch):
    asked = []

    def export(model, folder, precision, parts):
        asked.append((folder, precision, tuple(parts)))
        shutil.copytree(exported, folder)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(backends, "export_onnx", export)
    plain = estimate(world)
    for _ in range(2):
        assert_near(plain, estimate(world, backend="onnxruntime"))
    ((folder, precision, parts),) = asked
    assert folder.is_relative_to(tmp_path) and precision == "fp32"
    assert parts == ("descriptors", "encoder")


def test_banks_of_both_backends_agree(world, exported):
    model, banks, *_ = world
    crops = banks["brick"].crops(range(3))
    try:
        encode_by(model, torch.device("cpu"), "onnxruntime", str(exported))
        by_onnx = model.describer()(crops)
    finally:
        encode_by(model, torch.device("cpu"))
    with torch.inference_mode():
        torch.testing.assert_close(by_onnx, model.describer()(crops), atol=1e-4, rtol=0)
    assert model.encoder is None


def test_an_export_of_other_weights_is_refused(world, exported):
    changed = load_model("tiny")
    with torch.no_grad():
        next(changed.parameters()).add_(1e-3)
    with pytest.raises(ExportError, match="other weights.*picopose export again"):
        OnnxParts(changed, exported, FASTER["cpu"], torch.device("cpu"))


def test_a_broken_export_says_what_to_do(world, exported, tmp_path):
    with pytest.raises(ExportError, match="manifest.*picopose export"):
        estimate(world, backend="onnxruntime", onnx_dir=str(tmp_path))
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    (broken / "encoder.onnx").write_bytes(b"nothing")
    with pytest.raises(ExportError, match="encoder.onnx can't be opened"):
        estimate(world, backend="onnxruntime", onnx_dir=str(broken))
    manifest = json.loads((broken / "manifest.json").read_text())
    del manifest["parts"]["encoder"]
    (broken / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match="lacks encoder"):
        estimate(world, backend="onnxruntime", onnx_dir=str(broken))


def test_without_onnx_runtime_it_says_what_to_install(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install onnxruntime onnx onnxscript"):
        estimate(world, backend="onnxruntime")
    with pytest.raises(ExportError, match="pip install onnx onnxscript onnxruntime"):
        export_onnx(world[0], tmp_path / "out")
    assert main(["export", str(tmp_path / "out")]) == 2
    assert "pip install" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_part_that_does_not_exist_is_refused(tmp_path, capsys):
    assert main(["export", str(tmp_path / "out"), "--part", "head"]) == 2
    assert "no part 'head'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_settings_name_a_backend():
    with pytest.raises(ConfigError, match="backend is 'tensorflow', choose one of torch, onnxruntime"):
        EstimatorSettings(backend="tensorflow")
    with pytest.raises(ConfigError, match="compile.*torch"):
        EstimatorSettings(backend="onnxruntime", compile="inductor")

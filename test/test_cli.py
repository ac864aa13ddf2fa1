"""The command line, with an untrained network: what it prints, writes and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import trimesh

from picopose_ros import __version__
from picopose_ros.cli.main import COMMANDS, main
from picopose_ros.geometry.poses import make_transform
from picopose_ros.model import PRESETS, PicoPose, save_model
from picopose_ros.segmentation import Segment, segments_to_json

ROOT = Path(__file__).resolve().parent.parent


class Desk:
    """A folder with all that ``picopose estimate`` needs, and the words of its command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "meshes").mkdir()
        trimesh.creation.box((0.08, 0.05, 0.03)).export(folder / "meshes" / "box.ply")
        trimesh.creation.cylinder(0.03, 0.07).export(folder / "meshes" / "can.stl")
        torch.manual_seed(0)
        save_model(PicoPose(PRESETS["tiny"]), folder / "weights.safetensors")
        picture = np.random.default_rng(0).integers(0, 255, (240, 320, 3), np.uint8)
        cv2.imwrite(str(folder / "image.png"), picture)
        self.camera = {"K": [300, 0, 160, 0, 300, 120, 0, 0, 1], "width": 320, "height": 240}
        self.write("camera.json", self.camera)
        mask = np.zeros((240, 320), bool)
        mask[80:160, 100:200] = True
        self.segments = [
            Segment("box", 0.9, mask),
            Segment("can", 0.8, np.roll(mask, 60, 1)),
            Segment("box", 0.7, mask & False),
        ]
        segments_to_json(self.segments, folder / "segments.json")

    def write(self, name: str, content: object) -> None:
        (self.folder / name).write_text(json.dumps(content))

    def estimate(self, *more: str, **instead: str) -> list[str]:
        """Arguments of the command; ``instead`` names other files."""
        at = {"image": "image.png", "camera": "camera.json", "segments": "segments.json", "meshes": "meshes"}
        at = {**at, "weights": "weights.safetensors", "cache_dir": "cache", **instead}
        words = ["estimate", str(self.folder / at.pop("image"))]
        for option, name in at.items():
            words += [f"--{option.replace('_', '-')}", str(self.folder / name)]
        return [*words, "--viewpoints", "42", "--hypotheses", "2", "--refinements", "0", *more]


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"))


def test_onboard_then_estimate_prints_poses_and_draws_them(desk, capsys):
    options = ["--weights", str(desk.folder / "weights.safetensors"), "--viewpoints", "42"]
    options += ["--cache-dir", str(desk.folder / "cache")]
    assert main(["onboard", str(desk.folder / "meshes"), *options]) == 0
    printed = capsys.readouterr().out
    assert "box  42 templates  80.0 x 50.0 x 30.0 mm" in printed and "can  42 templates" in printed
    assert len(list((desk.folder / "cache").glob("*.safetensors"))) == 2

    overlay = desk.folder / "overlay.png"
    assert main(desk.estimate("--json", "--overlay", str(overlay))) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert [(pose["segment"], pose["class_id"]) for pose in answer["poses"]] == [(0, "box"), (1, "can")]
    for pose in answer["poses"]:
        R = np.array(pose["T_cam_obj"])[:3, :3]
        np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-6)
        assert 0 <= pose["confidence"] <= 1 and np.shape(pose["covariance"]) == (6, 6)
    assert answer["skipped"] == [{"segment": 2, "reason": "its mask is empty"}]
    assert "segment 2 ('box') has no pose: its mask is empty" in captured.err
    assert answer["milliseconds"]["total"] > 0
    drawn, before = cv2.imread(str(overlay)), cv2.imread(str(desk.folder / "image.png"))
    assert drawn.shape == before.shape and (drawn != before).any()

    assert main(desk.estimate()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].split()[:5] == ["segment", "object", "x", "y", "z"]
    fields = lines[1].split()
    assert fields[:2] == ["0", "box"] and fields[-1] in ("offsets", "affine")
    position = [float(value) for value in fields[2:5]]
    np.testing.assert_allclose(position, np.array(answer["poses"][0]["T_cam_obj"])[:3, 3], atol=1e-3)
    assert np.linalg.norm([float(value) for value in fields[5:9]]) == pytest.approx(1, abs=1e-3)


def test_no_pose_at_all_is_told_by_the_status(desk, capsys):
    segments_to_json(desk.segments[2:], desk.folder / "empty.json")
    assert main(desk.estimate(segments="empty.json")) == 1
    assert "its mask is empty" in capsys.readouterr().err


def broken(desk: Desk, name: str) -> tuple[list[str], str]:
    """Arguments that can't work, and what the error must name."""
    if name == "no image":
        return desk.estimate(image="nowhere.png"), "nowhere.png: No such file"
    if name == "image is text":
        return desk.estimate(image="camera.json"), "camera.json: is no image"
    if name == "empty image":
        (desk.folder / "nothing.png").touch()
        return desk.estimate(image="nothing.png"), "nothing.png: is no image"
    if name == "camera of zeros":
        desk.write("zeros.json", {**desk.camera, "K": [0] * 9})
        return desk.estimate(camera="zeros.json"), "zeros.json: camera: focal lengths are 0"
    if name == "camera of another size":
        desk.write("big.json", {**desk.camera, "width": 640})
        return desk.estimate(camera="big.json"), "big.json: the camera is of 640x240 pixels"
    if name == "segments are no list":
        return desk.estimate(segments="camera.json"), "camera.json: expected a JSON list"
    if name == "no meshes":
        (desk.folder / "none").mkdir(exist_ok=True)
        return desk.estimate(meshes="none"), "--meshes: mesh directory"
    if name == "weights are text":
        return desk.estimate(weights="camera.json"), "--weights: "
    if name == "unknown preset":
        return desk.estimate("--preset", "huge"), "--preset: preset 'huge'"
    if name == "unknown device":
        return desk.estimate("--device", "abacus"), "--device: device 'abacus'"
    if name == "overlay nowhere":
        return desk.estimate("--overlay", str(desk.folder / "no" / "folder.png")), "--overlay: the folder"
    if name == "overlay of no kind":
        return desk.estimate("--overlay", str(desk.folder / "overlay.doc")), "--overlay: "
    raise KeyError(name)


@pytest.mark.parametrize(
    "name",
    [
        "no image",
        "image is text",
        "empty image",
        "camera of zeros",
        "camera of another size",
        "segments are no list",
        "no meshes",
        "weights are text",
        "unknown preset",
        "unknown device",
        "overlay nowhere",
        "overlay of no kind",
    ],
)
def test_what_cannot_work_is_one_line_and_status_2(desk, capsys, name):
    words, named = broken(desk, name)
    assert main(words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("picopose")]
    assert len(errors) == 1 and errors[0].startswith("picopose estimate: ") and named in errors[0]


@pytest.mark.parametrize(
    "words", [["onboard"], ["estimate", "--hypotheses", "0"], ["fly"], ["estimate", "a.png"]]
)
def test_wrong_arguments_are_status_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: picopose" in capsys.readouterr().err


def test_help_lists_every_command_and_version_is_told(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text and command.summary in text for name, command in COMMANDS.items())
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    assert main([]) == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: picopose {name}" in capsys.readouterr().out


def test_as_a_process_it_is_quick_to_say_no_and_says_it_plainly(desk):
    """One line, no traceback; and nothing heavy is imported for a look at the help."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "picopose_ros.cli.main", *desk.estimate(camera="nowhere.json")]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.strip()
        == f"picopose estimate: --camera: {desk.folder / 'nowhere.json'}: No such file or directory"
    )
    code = (
        "import sys; from picopose_ros.cli.main import main\n"
        "try: main(['estimate', '--help'])\n"
        "except SystemExit: pass\n"
        "print(*{'torch', 'cv2', 'numpy', 'trimesh'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0 and done.stderr.strip() == ""


def test_overlay_outline_lies_on_the_object(desk):
    from picopose_ros.geometry.cameras import CameraModel
    from picopose_ros.instances.overlay import Drawn, draw_poses, palette
    from picopose_ros.templates.meshes import discover_objects, load_object
    from picopose_ros.templates.renderer import MeshRenderer

    K = np.array([[300.0, 0, 160], [0, 300, 120], [0, 0, 1]])
    box = load_object(discover_objects(desk.folder / "meshes", "m")[0])
    T = make_transform(cv2.Rodrigues(np.array([0.3, -0.4, 0.2]))[0], [0.03, -0.02, 0.3])
    grey = np.full((240, 320, 3), 128, np.uint8)
    lens = CameraModel(K, 320, 240, "plumb_bob", (-0.3, 0.1, 0.0, 0.0))
    with MeshRenderer() as renderer:
        mask = renderer.render(box, T, K, 320, 240).mask
        colour = palette(1)
        for camera in (CameraModel(K, 320, 240), lens):
            picture = draw_poses(grey, camera, [Drawn(box, T, "", colour)], renderer)
            assert (grey == 128).all(), "the input was drawn into"
            ys, xs = np.nonzero(np.linalg.norm(picture.astype(float) - colour, axis=-1) < 90)
            assert len(ys) > 100
            straight = camera.undistort_points(np.stack([xs, ys], -1))
            distance = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 3)
            outside = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 3)
            x, y = np.rint(straight).astype(int).T
            assert np.maximum(distance[y, x], outside[y, x]).max() < 3.5
        # Behind the camera there is nothing to draw, and nothing breaks.
        behind = draw_poses(
            grey, lens, [Drawn(box, make_transform(np.eye(3), [0, 0, -1]), "a", colour)], renderer
        )
        assert (behind == grey).all()

"""What a user has at hand, in every form that the command line takes, and what is refused before the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import trimesh
from PIL import Image

from picopose_ros import progress
from picopose_ros.cli.cameras import read_camera
from picopose_ros.cli.estimate import arrange
from picopose_ros.cli.main import main
from picopose_ros.cli.masks import read_labels, segments_from_pictures
from picopose_ros.errors import CameraError, SegmentError
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.segmentation import segments_from_json

SIZE = (48, 64)
K = [60.5, 0.0, 31.0, 0.0, 61.5, 23.0, 0.0, 0.0, 1.0]
ROWS = [K[0:3], K[3:6], K[6:9]]
LENS = [-0.1, 1e-05, 0.0, 0.0, 0.0]

CALIBRATION = """
image_width: 64
image_height: 48
camera_name: narrow_stereo
camera_matrix:
  rows: 3
  cols: 3
  data: [60.5, 0., 31., 0., 61.5, 23., 0., 0., 1.]
distortion_model: plumb_bob
distortion_coefficients: {rows: 1, cols: 5, data: [-0.1, 1e-05, 0., 0., 0.]}
rectification_matrix: {rows: 3, cols: 3, data: [1., 0., 0., 0., 1., 0., 0., 0., 1.]}
projection_matrix: {rows: 3, cols: 4, data: [9., 0., 9., 0., 0., 9., 9., 0., 0., 0., 1., 0.]}
"""
CAMERA_INFO = """\
header: {stamp: {sec: 1, nanosec: 2}, frame_id: camera}
height: 48
width: 64
distortion_model: plumb_bob
d: [-0.1, 1.0e-05, 0.0, 0.0, 0.0]
k: [60.5, 0.0, 31.0, 0.0, 61.5, 23.0, 0.0, 0.0, 1.0]
r: [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
p: [70.0, 0.0, 30.0, 0.0, 0.0, 70.0, 20.0, 0.0, 0.0, 0.0, 1.0, 0.0]
binning_x: 0
binning_y: 0
roi: {x_offset: 0, y_offset: 0, height: 0, width: 0, do_rectify: false}
---
"""


def scene(*focal_lengths: float) -> dict[str, Any]:
    return {
        str(i): {"cam_K": [fx, *K[1:]], "cam_R_w2c": [1.0] * 9, "depth_scale": 0.1}
        for i, fx in enumerate(focal_lengths)
    }


CAMERAS: dict[str, tuple[str, Any]] = {
    "own": ("camera.json", {"K": K, "width": 64, "height": 48, "distortion_model": "plumb_bob", "D": LENS}),
    "own without a size": ("camera.json", {"K": ROWS, "D": LENS, "distortion_model": "plumb_bob"}),
    "BOP's camera.json": (
        "camera.json",
        {"cx": 31, "cy": 23, "fx": 60.5, "fy": 61.5, "depth_scale": 0.1, "width": 64, "height": 48},
    ),
    "one entry of BOP": ("camera.json", {"cam_K": K, "depth_scale": 1.0}),
    "scene_camera.json, by number": ("scene_camera.json", scene(1, 2, 60.5, 3)),
    "scene_camera.json, all the same": (
        "scene_camera.json",
        {"41": scene(60.5)["0"], "42": scene(60.5)["0"]},
    ),
    "MegaPose": ("camera_data.json", {"K": ROWS, "resolution": [48, 64]}),
    "a matrix alone": ("k.json", ROWS),
    "ROS calibration": ("ost.yaml", CALIBRATION),
    "ROS camera_info": ("info.yaml", CAMERA_INFO),
    "ROS 1 camera_info": (
        "info.yaml",
        CAMERA_INFO.replace("\nd:", "\nD:")
        .replace("\nk:", "\nK:")
        .replace("\nr:", "\nR:")
        .replace("\np:", "\nP:"),
    ),
}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("name", CAMERAS)
def test_a_camera_is_read_in_every_form_that_is_in_use(tmp_path, name):
    file, content = CAMERAS[name]
    camera = read_camera(str(write(tmp_path / file, content)), SIZE, Path("000002.png"))
    np.testing.assert_array_equal(camera.K, ROWS)
    assert (camera.height, camera.width) == SIZE
    lens = name.startswith(("own", "ROS"))
    assert camera.D == (tuple(LENS) if lens else ())
    assert camera.distortion_model == ("plumb_bob" if lens else "")


@pytest.mark.parametrize("text", ["60.5 61.5 31 23", "60.5,61.5,31,23"])
def test_four_numbers_are_a_camera(text):
    camera = read_camera(text, SIZE, Path("a.png"))
    np.testing.assert_array_equal(camera.K, ROWS)
    assert (camera.height, camera.width) == SIZE


def test_numbers_on_the_command_line_are_one_argument():
    assert arrange(["a.png", "--camera", "60", "61", "-31", "2e1", "--json"]) == [
        "a.png",
        "--camera",
        "60 61 -31 2e1",
        "--json",
    ]
    assert arrange(["--camera", "k.json", "a.png"]) == ["--camera", "k.json", "a.png"]
    assert arrange(["--camera", "60", "61", "31"]) == ["--camera", "60", "61", "31"]


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("camera.json", "{", "is no JSON file"),
        ("camera.json", "[1, 2]", "holds no intrinsics"),
        ("camera.json", {"depth_scale": 1}, r"holds no intrinsics \(its keys: depth_scale\)"),
        ("camera.json", {"K": K[:8]}, "K must hold 9 numbers"),
        ("camera.json", {"K": ["a"] * 9}, "can't be used as a camera"),
        ("camera.json", {"K": [0] * 9}, "focal lengths are 0"),
        ("camera.json", {"K": K, "width": 48, "height": 64}, "of 48x64 pixels, the image has 64x48"),
        ("camera.json", {"K": ROWS, "resolution": [64, 48]}, "of 48x64 pixels, the image has 64x48"),
        ("camera.json", {"K": ROWS, "resolution": 64}, "can't be used as a camera"),
        ("scene_camera.json", scene(1, 2), "2 images with 2 different cameras.* 000007.png"),
        ("scene_camera.json", {"0": 5}, "can't be used as a camera"),
        ("ost.yaml", CALIBRATION.replace("64", "640"), "of 640x48 pixels"),
        ("ost.yaml", CALIBRATION.replace("plumb_bob", "fisheye_of_mine"), "is unknown"),
        ("ost.yaml", "%YAML:1.0\n---\nK: !!opencv-matrix\n  rows: 3\n", "is no YAML or JSON file"),
        ("info.yaml", "", "holds no intrinsics"),
    ],
)  # fmt: skip
def test_a_camera_that_cannot_be_used_is_named(tmp_path, file, content, named):
    path = write(tmp_path / file, content)
    with pytest.raises(CameraError, match=named) as caught:
        read_camera(str(path), SIZE, Path("000007.png"))
    assert str(caught.value).startswith(f"{path}: ")


def test_a_camera_is_read_as_it_was_written(tmp_path):
    camera = CameraModel(np.array(ROWS), 64, 48, "equidistant", (0.1, 0.2, 0.0, -0.1))
    back = read_camera(str(write(tmp_path / "k.json", camera.to_dict())), SIZE, Path("a.png"))
    assert back.to_dict() == camera.to_dict()


def test_numbers_that_are_not_four_and_files_that_are_none(tmp_path):
    with pytest.raises(CameraError, match="has 3 numbers; give four, fx fy cx cy"):
        read_camera("60 61 31", SIZE, Path("a.png"))
    with pytest.raises(CameraError, match="No such file"):
        read_camera(str(tmp_path / "nowhere.yaml"), SIZE, Path("a.png"))
    picture = tmp_path / "picture.png"
    cv2.imwrite(str(picture), np.zeros((4, 4), np.uint8))
    with pytest.raises(CameraError, match="is no text file"):
        read_camera(str(picture), SIZE, Path("a.png"))


# Masks.

MUG = np.zeros(SIZE, bool)
MUG[10:30, 8:24] = True
BOX = np.zeros(SIZE, bool)
BOX[5:20, 40:60] = True
LABELS = (3 * MUG + 7 * BOX).astype(np.uint8)


def palette_picture(labels: np.ndarray) -> Image.Image:
    picture = Image.fromarray(labels)
    picture = picture.convert("L")
    picture.putpalette([7 * i % 256 for i in range(768)])
    return picture


PICTURES: dict[str, Any] = {
    "0 and 255": lambda: Image.fromarray(MUG.astype(np.uint8) * 255),
    "0 and 1": lambda: Image.fromarray(MUG.astype(np.uint8)),
    "one bit": lambda: Image.fromarray(MUG),
    "16 bits": lambda: Image.fromarray(MUG.astype(np.uint16) * 65535),
    "three channels": lambda: Image.fromarray(np.repeat(MUG[..., None], 3, 2).astype(np.uint8) * 255),
    "opaque": lambda: Image.fromarray(np.dstack([*[MUG * 255] * 3, MUG | True]).astype(np.uint8)),
    "alpha": lambda: Image.fromarray(np.dstack([MUG * 9, MUG * 99, MUG * 0, MUG * 255]).astype(np.uint8)),
    "palette": lambda: palette_picture(MUG.astype(np.uint8)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_mask_is_read_from_every_kind_of_picture(tmp_path, name):
    PICTURES[name]().save(tmp_path / "mug.png")
    (segment,), notes = segments_from_pictures([tmp_path / "mug.png"], None)
    assert (segment.class_id, segment.score, notes) == ("mug", 1.0, [])
    np.testing.assert_array_equal(segment.mask, MUG)


def test_label_images_keep_their_values(tmp_path):
    Image.fromarray(LABELS).save(tmp_path / "grey.png")
    palette_picture(LABELS).save(tmp_path / "palette.png")
    Image.fromarray(LABELS.astype(np.uint16) * 100).save(tmp_path / "deep.png")
    for name, factor in (("grey", 1), ("palette", 1), ("deep", 100)):
        path = tmp_path / f"{name}.png"
        np.testing.assert_array_equal(read_labels(path), factor * LABELS.astype(int))
        classes = [f"{7 * factor}=box", f"{3 * factor}=mug"]
        segments, notes = segments_from_pictures([path], classes)
        assert [segment.class_id for segment in segments] == ["box", "mug"] and not notes
        np.testing.assert_array_equal(segments[0].mask, BOX)
        np.testing.assert_array_equal(segments[1].mask, MUG)
    (segment,), (note,) = segments_from_pictures([tmp_path / "grey.png"], ["3=mug"])
    np.testing.assert_array_equal(segment.mask, MUG)
    assert note.endswith("no --class for the values 7: left out")


def test_the_class_comes_from_the_option_the_name_or_the_only_object(tmp_path):
    path = tmp_path / "mask_000.png"
    Image.fromarray(MUG).save(path)
    known = ["mug", "box"]
    assert segments_from_pictures([path, path], ["box", "mug"], known)[0][0].class_id == "box"
    assert segments_from_pictures([path], None, ["mug"])[0][0].class_id == "mug"
    with pytest.raises(SegmentError, match=r"of which object is it\? Say it by --class NAME \(box, mug\)"):
        segments_from_pictures([path], None, known)


@pytest.mark.parametrize(
    ("pixels", "classes", "named"),
    [
        (MUG & False, ["mug"], "is 0 everywhere: it shows no object"),
        ((MUG & False).astype(np.uint8), ["mug"], "is 0 everywhere: it shows no object"),
        ((MUG | True).astype(np.uint8), ["mug"], "is 1 everywhere"),
        (LABELS, ["mug"], r"holds 3 values \(0, 3, 7\), a mask has two.*--class 1=NAME"),
        (MUG + np.uint8(1), ["mug"], "holds 1 and 2; a mask is 0 outside"),
        (np.dstack([MUG, BOX, MUG]).astype(np.uint8), ["mug"], "is coloured"),
        (LABELS, ["cup"], "--class cup: there is no such object; there are box, mug"),
        (LABELS, ["3=cup"], "--class cup: there is no such object"),
        (LABELS, ["mug", "box"], "--class is given 2 times for 1 masks"),
        (LABELS, ["3=mug", "box"], "--class box: write VALUE=NAME"),
        (LABELS, ["x=mug"], "--class x=mug: write VALUE=NAME"),
        (LABELS, ["3=mug", "3=box"], "value 3 is given twice"),
        (LABELS, ["4=mug"], r"has no pixel of value 4 \(mug\); it holds 3, 7"),
        (LABELS, ["0=mug"], "label 0 is the background"),
    ],
)  # fmt: skip
def test_a_mask_that_cannot_be_used_is_named(tmp_path, pixels, classes, named):
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    with pytest.raises(SegmentError, match=named):
        segments_from_pictures([tmp_path / "mask.png"], classes, ["mug", "box"])


def test_a_file_that_is_no_picture_is_named(tmp_path):
    (tmp_path / "mug.png").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(SegmentError, match="mug.png: is no picture that can be read"):
        segments_from_pictures([tmp_path / "mug.png"], None)
    with pytest.raises(SegmentError, match="nowhere.png: No such file"):
        segments_from_pictures([tmp_path / "nowhere.png"], None)
    with pytest.raises(SegmentError, match="but there are 2 pictures"):
        segments_from_pictures([tmp_path / "a.png", tmp_path / "b.png"], ["1=mug"])


# Commands.


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A folder with an image, masks and meshes in millimetres; the current one."""
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("image.png", np.full((*SIZE, 3), 90, np.uint8))
    Image.fromarray(MUG).save("mug.png")
    Image.fromarray(BOX).save("box.png")
    Image.fromarray(LABELS).save("labels.png")
    Image.fromarray(MUG).resize((32, 24)).save("small.png")
    Path("meshes").mkdir()
    trimesh.creation.box((80.0, 50.0, 30.0)).export("meshes/box.ply")
    trimesh.creation.cylinder(40.0, 90.0).export("meshes/mug.stl")
    return tmp_path


def test_masks_become_the_json_that_estimate_reads(desk, capsys):
    assert main(["segments-from-masks", "mug.png", "box.png", "--out", "both.json"]) == 0
    assert "mug  320 pixels of 64x48" in capsys.readouterr().out
    words = [
        "segments-from-masks",
        "labels.png",
        "--class",
        "3=mug",
        "--class",
        "7=box",
        "--out",
        "labels.json",
    ]
    assert main(words) == 0
    for name in ("both.json", "labels.json"):
        mug, box = segments_from_json(name)
        assert (mug.class_id, box.class_id) == ("mug", "box")
        np.testing.assert_array_equal(mug.mask, MUG)
        np.testing.assert_array_equal(box.mask, BOX)
    assert not list(desk.glob(".*"))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["mug.png", "--out", "no/seg.json"], "--out: the folder {0}/no does not exist"),
        (["mug.png", "--out", "meshes"], "--out: meshes is a folder"),
        (["mug.png", "small.png", "--out", "seg.json"], "masks are of 32x24 and 64x48 pixels"),
        (["image.png", "--out", "seg.json"], "image.png: is 90 everywhere"),
    ],
)
def test_masks_that_cannot_become_segments(desk, capsys, words, named):
    assert main(["segments-from-masks", *words]) == 2
    assert named.format(desk) in capsys.readouterr().err
    assert not Path("seg.json").exists()


ESTIMATE = ["estimate", "image.png", "--meshes", "meshes", "--camera", "60", "60", "31", "23"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            ["--segments", "mug.png"],
            "--unit is not given, and meshes/box.ply: read in m, object 'box' is 99 m",
        ),
        (["--segments", "mug.png"], "unit mm would make it 0.099 m (and 1 more like it): say which"),
        (
            ["--segments", "small.png", "--class", "mug"],
            "--segments: the mask of 'mug' has 32x24 pixels, the image",
        ),
        (["--segments", "mug.png", "--class", "cup"], "--segments: --class cup: there is no such object"),
        (["--segments", "both.json", "--class", "mug"], "--class is for masks"),
        (["--segments", "mug.png", "--meshes", "nowhere"], "--meshes: mesh directory nowhere does not exist"),
        (["--segments", "mug.png", "--overlay", "no/out.png"], "--overlay: the folder {0}/no does not exist"),
        (["--segments", "mug.png", "--overlay", "out.xyz"], "--overlay: out.xyz has no ending"),
        (["--segments", "mug.png", "--camera", "nan", "1", "1", "1"], "--camera: camera: K holds NaN"),
        (["--segments", "mug.png", "--unit", "mm", "--weights", "no.safetensors"], "--weights: "),
    ],
)
def test_estimate_refuses_before_the_work_and_names_the_option(desk, capsys, words, named):
    assert main([*ESTIMATE, *words]) == 2
    captured = capsys.readouterr()
    assert named.format(desk) in captured.err and "onboarding" not in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_onboard_asks_for_the_unit_and_takes_what_is_stated(desk, capsys):
    assert main(["onboard", "meshes"]) == 2
    assert "picopose onboard: --unit is not given, and meshes/box.ply" in capsys.readouterr().err
    assert main(["onboard", "nowhere"]) == 2
    assert "MESH_DIR: mesh directory nowhere does not exist" in capsys.readouterr().err
    # objects.yaml states the unit of one; the other is still asked for.
    Path("meshes/objects.yaml").write_text("box: {unit: mm}\n")
    assert main(["onboard", "meshes"]) == 2
    assert "--unit is not given, and meshes/mug.stl" in capsys.readouterr().err


def test_progress_without_a_terminal_is_plain_lines(capsys):
    with progress.progress_bar(None, 4, "onboarding a", "view"), progress.progress_bar(None, 2, "b") as bar:
        bar.update(2)
    for _ in progress.progress_bar(range(3), description="scenes", unit="scene"):
        pass
    with progress.progress_bar(None, 4, "nothing", hidden=True) as bar:
        bar.update(4)
    said = capsys.readouterr().err
    assert "\r" not in said and "\x1b" not in said and "nothing" not in said
    lines = said.splitlines()
    assert all(line.strip() for line in lines)
    assert any(line.startswith("b: 100% 2/2") for line in lines)
    assert any(line.startswith("scenes: 100% 3/3") for line in lines)


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    written: list[str] = []

    class Terminal:
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

        def flush(self) -> None:
            pass

        def fileno(self) -> int:
            raise OSError("no file")

    monkeypatch.setattr("sys.stderr", Terminal())
    with progress.progress_bar(None, 4, "onboarding a", "view") as bar:
        bar.update(4)
    assert any(text.startswith("\r") and "4/4" in text for text in written)

"""The demo: its world, its comparison with the truth, and the whole path over DDS."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from node_harness import next_domain

from picopose_ros.demo import world as world_module
from picopose_ros.demo.__main__ import main
from picopose_ros.demo.evaluate import (
    Detected,
    Recording,
    class_of,
    compare,
    honesty,
    names_kept,
    read_recording,
    table,
)
from picopose_ros.demo.objects import OBJECTS
from picopose_ros.demo.pictures import write_pictures
from picopose_ros.demo.world import (
    CAMERA,
    CAMERA_FRAME,
    CAMERA_INFO_TOPIC,
    IMAGE_TOPIC,
    SEGMENTATION_TOPIC,
    TRUTH_PREFIX,
    DemoFiles,
    build_world,
)
from picopose_ros.errors import BagError
from picopose_ros.messages import bags
from picopose_ros.messages.frames import camera_from_message
from picopose_ros.messages.segmentations import segments_from_message
from picopose_ros.templates.meshes import ObjectMesh, discover_objects, load_object
from picopose_ros.templates.renderer import MeshRenderer

FRAMES = 4
"""Of the whole path of the camera: objects move as fast as ten times in `make demo`."""
LATE_FRAMES = 13
"""1.2 s of the recording: the second segmentation that is played late is of the eleventh image."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def files(folder: Path) -> DemoFiles:
    return build_world(folder, FRAMES)


@pytest.fixture(scope="module")
def meshes(files: DemoFiles) -> dict[str, ObjectMesh]:
    return {spec.class_id: load_object(spec) for spec in discover_objects(files.meshes)}


@pytest.fixture(scope="module")
def truth(files: DemoFiles) -> Recording:
    return read_recording(files.bag)


def with_truth_as_answer(recording: Recording) -> Recording:
    answers = {
        stamp: [Detected(class_of(name), name, 1.0, T) for name, T in poses.items()]
        for stamp, poses in recording.truth.items()
    }
    return Recording(recording.truth, answers, {})


def test_the_objects_are_what_the_demo_promises(meshes: dict[str, ObjectMesh]) -> None:
    assert set(meshes) == set(OBJECTS) and len(meshes) >= 5
    assert sum(made.seen_in_training for made in OBJECTS.values()) >= 2
    assert sum(not made.seen_in_training for made in OBJECTS.values()) >= 2
    for class_id, mesh in meshes.items():
        parts = OBJECTS[class_id].make()
        bounds = np.array([np.min([p.bounds[0] for p in parts], 0), np.max([p.bounds[1] for p in parts], 0)])
        np.testing.assert_allclose(mesh.bounds, bounds, atol=1e-6)
        assert not mesh.warnings
        for part in mesh.parts:
            assert part.visual.kind == "texture"
    names = [place[0] for place in world_module._PLACES]
    assert any(names.count(name) == 2 for name in names)


def test_the_recording_is_as_a_robot_would_make_it(files: DemoFiles, truth: Recording) -> None:
    images, infos, masks = {}, {}, {}
    with bags.BagReader(files.bag) as reader:
        order = [recorded for _, recorded, _ in reader.raw()]
        for store, topic in ((images, IMAGE_TOPIC), (infos, CAMERA_INFO_TOPIC), (masks, SEGMENTATION_TOPIC)):
            for _, recorded, message in reader.messages([topic]):
                store[bags.stamp_of(message)] = (recorded, message)
    assert order == sorted(order)
    assert len(images) == FRAMES and set(images) == set(infos) == set(masks) == set(truth.truth)
    stamps = sorted(images)
    assert set(np.diff(stamps)) == {100_000_000}
    for stamp in stamps:
        recorded, image = images[stamp]
        assert recorded == stamp and (image.width, image.height, image.encoding) == (640, 480, "rgb8")
        assert image.header.frame_id == CAMERA_FRAME
        recorded, message = masks[stamp]
        assert recorded == stamp + 300_000_000
        assert len(bags.typestore().serialize_cdr(message, bags.SEGMENTS)) < 50_000
        np.testing.assert_array_equal(camera_from_message(infos[stamp][1], "").K, CAMERA.K)


def test_masks_and_true_poses_belong_together(
    files: DemoFiles, truth: Recording, meshes: dict[str, ObjectMesh]
) -> None:
    """What the bag says of an instance is where the mesh file, at the true pose, really is."""
    compared = 0
    with bags.BagReader(files.bag) as reader, MeshRenderer() as renderer:
        for index, (_, _, message) in enumerate(reader.messages([SEGMENTATION_TOPIC])):
            poses = truth.truth[bags.stamp_of(message)]
            whole = {
                name: renderer.render(meshes[class_of(name)], T, CAMERA.K, 640, 480).mask
                for name, T in poses.items()
            }
            segments, _ = segments_from_message(message, 480, 640, SEGMENTATION_TOPIC)
            for name, mask in whole.items():
                if files.visible[index][name] < 0.95:
                    continue
                scores = [
                    (s.mask & mask).sum() / (s.mask | mask).sum()
                    for s in segments
                    if s.class_id == class_of(name)
                ]
                assert max(scores) > 0.85, name  # a pixel of erosion costs a thin part some of its area
                compared += 1
    assert compared > 2 * len(meshes)


def test_something_is_partly_hidden_and_the_light_is_not_the_templates(
    files: DemoFiles, truth: Recording, meshes: dict[str, ObjectMesh]
) -> None:
    assert any(0.2 < share < 0.9 for frame in files.visible for share in frame.values())
    with bags.BagReader(files.bag) as reader, MeshRenderer() as renderer:
        _, _, message = next(reader.messages([IMAGE_TOPIC]))
        stamp = bags.stamp_of(message)
        image = np.asarray(message.data).reshape(480, 640, 3).astype(float)
        name = next(n for n, share in files.visible[0].items() if share > 0.97)
        view = renderer.render(meshes[class_of(name)], truth.truth[stamp][name], CAMERA.K, 640, 480)
    inside = cv2.erode(view.mask.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    albedo, seen = view.rgb[inside].astype(float), image[inside]
    assert np.abs(albedo - seen).mean() > 5
    # but it is the same surface: light apart, the picture is there
    assert np.corrcoef(albedo.ravel(), seen.ravel())[0, 1] > 0.8


def test_the_world_is_a_function_of_its_seed() -> None:
    with world_module.World(3) as one, world_module.World(3) as again, world_module.World(4) as other:
        pose = one.camera_pose(0.4)
        frames = [each.look(pose) for each in (one, again, other)]
    np.testing.assert_array_equal(frames[0].rgb, frames[1].rgb)
    assert (frames[0].rgb != frames[2].rgb).any()


def test_a_finished_world_is_used_again_and_an_unfinished_one_is_not(
    files: DemoFiles, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def fake(
        world: object, path: Path, frames: int, storage: str, progress: object
    ) -> list[dict[str, float]]:
        calls.append(frames)
        raise KeyboardInterrupt

    monkeypatch.setattr(world_module, "record", fake)
    assert build_world(folder, FRAMES).visible == files.visible and not calls
    other = folder.parent / "unfinished"
    for attempt in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            build_world(other, 1)
        assert len(calls) == attempt


def test_the_truth_compared_with_itself_is_perfect(
    files: DemoFiles, truth: Recording, meshes: dict[str, ObjectMesh]
) -> None:
    seen = {name: made.seen_in_training for name, made in OBJECTS.items()}
    rows = compare(with_truth_as_answer(truth), meshes, files.visible, seen)
    assert [row.name for row in rows[-3:]] == ["seen in training", "never seen", "all objects"]
    assert all(row.recall == 1.0 and row.rotation_deg < 1e-3 for row in rows)
    assert rows[-1].instances == sum(row.instances for row in rows[:-3])
    hidden = sum(share < 0.1 for frame in files.visible for share in frame.values())
    assert rows[-1].instances == 7 * FRAMES - hidden
    assert "cereal_box" in table(rows) and "never seen" in table(rows)


def test_wrong_and_missing_poses_cost_recall(truth: Recording, meshes: dict[str, ObjectMesh]) -> None:
    first, second, third = sorted(truth.truth)[:3]
    truth = replace(truth, truth={stamp: truth.truth[stamp] for stamp in (first, second, third)})
    answers = with_truth_as_answer(truth)
    moved = np.eye(4)
    moved[0, 3] = 0.5
    answers.detections[first] = [
        Detected(d.class_id, d.name, d.score, moved @ d.T_cam_obj if d.class_id == "drill" else d.T_cam_obj)
        for d in answers.detections[first]
    ]
    answers.detections[second] = [d for d in answers.detections[second] if d.name != "parcel_1"]
    del answers.detections[third]
    rows = {row.name: row for row in compare(answers, meshes)}
    assert rows["drill"].recall == pytest.approx(1 / 3) and rows["drill"].detected == 2
    assert rows["drill"].translation_mm == pytest.approx(250)  # the median of 0 and 500
    assert rows["parcel"].recall == pytest.approx(3 / 6) and rows["parcel"].detected == 3
    assert rows["cereal_box"].recall == pytest.approx(2 / 3)


def test_a_name_that_changes_is_told(truth: Recording) -> None:
    answers = with_truth_as_answer(truth)
    assert names_kept(answers) == {name: [name] for name in sorted(next(iter(truth.truth.values())))}
    *_, last = sorted(truth.truth)
    swapped = {"parcel_0": "parcel_1", "parcel_1": "parcel_0"}
    answers.detections[last] = [
        replace(d, name=swapped.get(d.name, d.name)) for d in answers.detections[last] if d.name != "drill_0"
    ]
    names = names_kept(answers)
    assert names["parcel_0"] == ["parcel_0", "parcel_1"] and names["parcel_1"] == ["parcel_1", "parcel_0"]
    assert names["drill_0"] == ["drill_0"]


def test_covariances_are_held_against_the_truth(truth: Recording, meshes: dict[str, ObjectMesh]) -> None:
    """Answers of 2 cm too far: within covariances of 2 cm, far outside of those of 2 mm."""
    assert honesty(with_truth_as_answer(truth), meshes) is None, "there are no covariances"
    for sigma, inside in ((0.02, 1.0), (0.002, 0.0)):
        answers = with_truth_as_answer(truth)
        for stamp, found in answers.detections.items():
            farther = np.eye(4)
            farther[2, 3] = 0.02
            covariance = np.diag(np.array([sigma, sigma, sigma, 0.1, 0.1, 0.1]) ** 2)
            answers.detections[stamp] = [
                replace(d, T_cam_obj=farther @ d.T_cam_obj, covariance=covariance) for d in found
            ]
        found = honesty(answers, meshes)
        assert found.count == 7 * FRAMES and found.gross == 0
        assert found.position.inside == inside
        assert found.bias[2] == pytest.approx(-0.02 / sigma, rel=1e-6)


def test_pictures_show_the_outlines(
    files: DemoFiles, truth: Recording, meshes: dict[str, ObjectMesh], tmp_path: Path
) -> None:
    written = write_pictures(
        files.bag, with_truth_as_answer(truth), meshes, tmp_path, IMAGE_TOPIC, CAMERA, every=3
    )
    assert [path.name for path in written] == ["overlay_000.png", "overlay_003.png", "contact_sheet.png"]
    with bags.BagReader(files.bag) as reader:
        _, _, message = next(reader.messages([IMAGE_TOPIC]))
    plain = np.asarray(message.data).reshape(480, 640, 3)[..., ::-1]
    changed = (cv2.imread(str(written[0])) != plain).any(axis=-1)
    assert 0.005 < changed.mean() < 0.2
    assert cv2.imread(str(written[-1])).shape == (240, 1280, 3)


@dataclass(frozen=True)
class Run:
    """The demo, and what a grasp planner heard meanwhile."""

    out: str  # what the demo printed
    report: dict[str, Any]
    recording: Recording  # the demo's own
    planner: Path  # bag of everything that came on /tf and /detections


@pytest.fixture(scope="module")
def run(files: DemoFiles, folder: Path) -> Run:
    """Mesh folder -> node process -> bag played by another process -> detections and TF received by two more,
    the demo's and a grasp planner's."""
    domain = next_domain()
    environment = {
        **os.environ,
        "ROS_DOMAIN_ID": str(domain),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
    }
    program = Path(__file__).with_name("grasp_planner.py")
    planner = subprocess.Popen([sys.executable, str(program), str(folder / "planner")], env=environment)
    try:
        options = ["--out", folder, "--frames", FRAMES, "--hypotheses", 2, "--viewpoints", 42]
        options += ["--domain", domain]
        command = [sys.executable, "-m", "picopose_ros.demo", *map(str, options)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        planner.terminate()
        assert planner.wait(60) == 0
    report = json.loads((folder / "report.json").read_text())
    return Run(done.stdout, report, read_recording(folder / "output"), folder / "planner")


def test_the_whole_path_over_dds(files: DemoFiles, folder: Path, run: Run) -> None:
    report, recording = run.report, run.recording
    assert "cereal_box" in run.out and f"{FRAMES} of {FRAMES} frames answered" in run.out
    assert report["frames_answered"] == FRAMES
    assert report["covariance"]["count"] > 0 and "covariances: " in run.out
    assert {"encode", "match", "regress", "pnp", "total"} <= set(report["latency_ms"])
    assert sorted(recording.detections) == sorted(recording.truth)
    found = 0
    for stamp, detections in recording.detections.items():
        found += len({d.class_id for d in detections} & {"cereal_box", "drill", "parcel", "cluster"})
        assert {d.name for d in detections} == recording.transforms[stamp]
    # With 42 viewpoints the rounding of a processor decides over a pose or two.
    assert found >= 4 * FRAMES - 2
    assert report["tf_frames_received"] == sum(len(d) for d in recording.detections.values())
    with bags.BagReader(files.bag) as before, bags.BagReader(folder / "output") as after:
        assert after.message_count == before.message_count + 2 * FRAMES
    assert (folder / "pictures" / "contact_sheet.png").exists()

    # The packaged weights see where the objects are, those that training never saw too.
    rows = {row["name"]: row for row in report["objects"]}
    for name in ("seen in training", "never seen"):
        assert rows[name]["rotation_deg"] < 20, rows[name]
    assert rows["all objects"]["recall"] > 0.3, rows["all objects"]


# What a grasp planner sees: another process, which listens to /tf and /detections and knows nothing else.


def test_a_planner_gets_one_frame_per_instance_where_its_detection_says(run: Run) -> None:
    frames: dict[int, dict[str, Any]] = {}
    detections: dict[int, Any] = {}
    with bags.BagReader(run.planner) as reader:
        for _, _, message in reader.messages(["/tf"]):
            for transform in message.transforms:
                if not transform.child_frame_id.startswith(TRUTH_PREFIX):
                    of_image = frames.setdefault(bags.stamp_of(transform), {})
                    assert transform.child_frame_id not in of_image, "one frame was sent twice"
                    of_image[transform.child_frame_id] = transform
        for _, _, message in reader.messages(["/detections"]):
            assert bags.stamp_of(message) not in detections
            detections[bags.stamp_of(message)] = message
    assert sorted(frames) == sorted(detections) == sorted(run.recording.truth)
    for stamp, message in detections.items():
        assert {detection.id for detection in message.detections} == set(frames[stamp])
        assert message.header.frame_id == CAMERA_FRAME
        for detection in message.detections:
            transform = frames[stamp][detection.id]
            assert transform.header.frame_id == CAMERA_FRAME
            pose = detection.results[0].pose.pose
            np.testing.assert_array_equal(
                bags.matrix_from(transform.transform.translation, transform.transform.rotation),
                bags.matrix_from(pose.position, pose.orientation),
            )


def test_a_planner_sees_every_instance_under_one_name_all_the_time(files: DemoFiles, run: Run) -> None:
    heard = replace(run.recording, detections=read_recording(run.planner).detections)
    names = names_kept(heard, files.visible)
    assert all(len(had) == 1 for had in names.values()), names
    assert len({had[0] for had in names.values()}) == len(names) == len(next(iter(heard.truth.values())))
    assert run.report["names"] == names
    assert f"{len(names)} of {len(names)} instances had one name all the time" in run.out


def test_a_planners_poses_are_as_good_as_the_demo_reports(
    files: DemoFiles, meshes: dict[str, ObjectMesh], run: Run
) -> None:
    heard = replace(run.recording, detections=read_recording(run.planner).detections)
    seen = {name: made.seen_in_training for name, made in OBJECTS.items()}
    rows = compare(heard, meshes, files.visible, seen)
    assert [row.as_dict() for row in rows] == run.report["objects"]
    honest = honesty(heard, meshes, files.visible)
    assert honest is not None and honest.as_dict() == run.report["covariance"]


def test_images_whose_masks_never_come_are_answered_over_dds(folder: Path, run: Run, tmp_path: Path) -> None:
    """Two segmentations are played; images whose masks weren't are answered all the same, in order."""
    (tmp_path / "cache").symlink_to(folder / "cache")  # the same objects
    files = build_world(tmp_path, LATE_FRAMES)
    options = ["--out", tmp_path, "--frames", LATE_FRAMES, "--hypotheses", 2, "--viewpoints", 42]
    options += ["--domain", next_domain(), "--masks", "late", "--speed", 0.05, "--follow-rate", 20]
    command = [sys.executable, "-m", "picopose_ros.demo", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    late, heard = report["late"], read_recording(tmp_path / "output")
    with bags.BagReader(files.bag) as reader:
        stamps = [bags.stamp_of(message) for _, _, message in reader.messages([SEGMENTATION_TOPIC])]
    answered = [stamp for stamp in stamps[3:] if heard.detections.get(stamp)]
    assert (late["images"], late["allowed"], late["answered"]) == (*[LATE_FRAMES - 3] * 2, len(answered))
    assert set(answered) - {stamps[0], stamps[10]}, "none but images with masks were answered"
    assert "poses" in done.stdout and "are right to .1, .05 and .02" in done.stdout
    assert late["went_back"] == 0 and "0 transforms back in time" in done.stdout
    assert max(row["instances"] for row in report["objects"]) <= 7 * (len(answered) + 1)


def test_a_node_that_cannot_start_ends_the_demo_with_its_reason(folder: Path, files: DemoFiles) -> None:
    options = ["--out", folder, "--frames", FRAMES, "--weights", folder / "missing.safetensors"]
    command = [sys.executable, "-m", "picopose_ros.demo", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "missing.safetensors" in done.stderr and "does not exist" in done.stderr


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file" / "demo")]) == 2
    assert f"--out {tmp_path / 'file' / 'demo'} can't be made: Not a directory" in capsys.readouterr().err


def test_a_bag_without_truth_is_no_recording_of_the_demo(tmp_path: Path) -> None:
    with bags.BagWriter(tmp_path / "bag") as writer:
        writer.add_topic("/tf", bags.TF)
    with pytest.raises(BagError, match="no true poses"):
        read_recording(tmp_path / "bag")

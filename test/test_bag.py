"""Bags without ROS: types, conversions, and ``picopose bag`` on recordings of both storages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import trimesh
from picopose_ros.msg import SegmentArray
from rclpy.serialization import deserialize_message, serialize_message
from rosbags.typesys import get_types_from_msg
from std_msgs.msg import Header
from vision_msgs.msg import Detection3D

from picopose_ros.cli.bag import BagOptions, BagReport, process_bag
from picopose_ros.cli.main import main
from picopose_ros.demo.evaluate import read_recording
from picopose_ros.demo.objects import cereal_box, drill
from picopose_ros.errors import BagError, ConfigError
from picopose_ros.estimator import ObjectPose, PoseEstimator
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.messages import bags, build
from picopose_ros.messages.frames import camera_from_message
from picopose_ros.messages.reasons import DropReason
from picopose_ros.messages.segmentations import segments_from_message
from picopose_ros.model import PicoPose
from picopose_ros.model.checkpoint import save_model
from picopose_ros.model.config import preset
from picopose_ros.node import conversions
from picopose_ros.segmentation import Segment
from picopose_ros.templates.meshes import ObjectSpec, discover_objects, load_object
from picopose_ros.templates.renderer import MeshRenderer

ROOT = Path(__file__).parent.parent
CAMERA = CameraModel(np.array([[300.0, 0, 159.5], [0, 300.0, 119.5], [0, 0, 1]]), 320, 240)
FRAME = "camera"
STEP = 100_000_000
START = 1_700_000_000_000_000_123  # needs all of a 64-bit integer: a float would lose nanoseconds
DELAY = 250_000_000
CLASSES = ("cereal_box", "drill")


@pytest.fixture(scope="module")
def meshes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("meshes")
    for name, parts in (("cereal_box", cereal_box()), ("drill", drill())):
        (folder / f"{name}.glb").write_bytes(trimesh.Scene(parts).export(file_type="glb"))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained: what the poses are does not matter here, and no packaged weights are needed."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_model(PicoPose(preset("tiny")).eval(), path)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def estimator(meshes: Path, weights: Path, cache: Path) -> PoseEstimator:
    return PoseEstimator.from_mesh_dir(
        meshes, weights=weights, viewpoints=42, cache_dir=cache, hypotheses=1, refinements=0
    )


@pytest.fixture(scope="module")
def scenes(meshes: Path) -> list[tuple[np.ndarray, list[Segment]]]:
    """Three images of both objects with their masks."""
    objects = {spec.class_id: load_object(spec) for spec in discover_objects(meshes)}
    images = []
    with MeshRenderer() as renderer:
        for index in range(3):
            poses = {}
            for name, x in (("cereal_box", -0.15), ("drill", 0.2)):
                T = trimesh.transformations.euler_matrix(1.9, 0.2, 0.4 + 0.2 * index)
                T[:3, 3] = x, -0.05, 0.9
                poses[name] = T
            items = [(objects[name], T) for name, T in poses.items()]
            rgb = renderer.render_scene(items, CAMERA.K, CAMERA.width, CAMERA.height).rgb
            segments = [
                Segment(
                    name, 0.8, renderer.render(objects[name], T, CAMERA.K, CAMERA.width, CAMERA.height).mask
                )
                for name, T in poses.items()
            ]
            images.append((rgb, segments))
    return images


def write_bag(
    path: Path, scenes: list[tuple[np.ndarray, list[Segment]]], storage: str, damaged: int | None = None
) -> None:
    """Images at 10 Hz, masks later; one further segmentation whose image was never recorded."""
    with bags.BagWriter(path, storage) as writer:
        late = []
        for index, (rgb, segments) in enumerate(scenes):
            stamp = START + index * STEP
            head = bags.header(stamp, FRAME)
            image = bags.image_message(rgb, head)
            if index == damaged:
                image.data = image.data[:1000]
            writer.write("/cam/image", bags.IMAGE, stamp, image)
            writer.write("/cam/info", bags.CAMERA_INFO, stamp, bags.camera_message(CAMERA, head))
            world = bags.transform_message(np.eye(4), bags.header(stamp, "world"), FRAME)
            writer.write("/tf", bags.TF, stamp, bags.message(bags.TF, transforms=[world]))
            late.append((stamp + DELAY, bags.segments_message(segments, head, *rgb.shape[:2])))
        head = bags.header(START - STEP, FRAME)
        late.append((START + 9 * STEP, bags.segments_message(scenes[0][1], head, *scenes[0][0].shape[:2])))
        for recorded, message in late:
            writer.write("/masks", bags.SEGMENTS, recorded, message)


def pose_of(
    class_id: str, T: np.ndarray, covariance: np.ndarray, centre: np.ndarray, size: np.ndarray
) -> ObjectPose:
    return ObjectPose(class_id, T, 0.6, covariance, "offsets", 0, 0.9, 3, 40, 0.7, 0.6, centre, size)


def test_definitions_are_those_of_the_interface_files() -> None:
    for name, definition in bags.INTERFACES.items():
        package, _, short = name.split("/")
        folder = ROOT / "msg" if package == "picopose_ros" else ROOT / "plain_ros" / package / "msg"
        original = get_types_from_msg((folder / f"{short}.msg").read_text(), name)
        embedded = get_types_from_msg("\n".join(line.strip() for line in definition.splitlines()), name)
        assert embedded == original, f"{name} in picopose_ros/messages/bags.py differs from {folder}"


def test_segments_survive_a_bag_message() -> None:
    rng = np.random.default_rng(0)
    solid = np.zeros((60, 80), bool)
    solid[10:40, 20:70] = True
    ragged = rng.uniform(size=(60, 80)) < 0.5
    corner = np.zeros((60, 80), bool)
    corner[59, 79] = True
    segments = [
        Segment(f"c{i}", 0.5, m) for i, m in enumerate((solid, ragged, corner, np.zeros((60, 80), bool)))
    ]
    message = bags.segments_message(segments, bags.header(START, FRAME), 60, 80)
    assert [entry.encoding for entry in message.segments[:2]] == [0, 1]
    raw = bags.typestore().serialize_cdr(message, bags.SEGMENTS)
    received = bags.typestore().deserialize_cdr(raw, bags.SEGMENTS)
    back, bad = segments_from_message(received, 60, 80, "/masks")
    assert bags.stamp_of(message) == START
    assert [problem.reason for problem in bad] == [DropReason.EMPTY_MASK]
    for before, after in zip(segments[:3], back, strict=True):
        assert after.class_id == before.class_id
        np.testing.assert_array_equal(after.mask, before.mask)


def test_ros_reads_what_the_bag_code_writes_and_the_other_way_round() -> None:

    mask = np.random.default_rng(1).uniform(size=(30, 50)) < 0.3
    segments = [Segment("a", 0.25, mask), Segment("b", 0.75, np.ones((30, 50), bool))]
    raw = bags.typestore().serialize_cdr(
        bags.segments_message(segments, bags.header(START, FRAME), 30, 50), bags.SEGMENTS
    )
    received = deserialize_message(bytes(raw), SegmentArray)
    good, bad = segments_from_message(received, 30, 50, "/masks")
    assert not bad and received.header.frame_id == FRAME
    sent = serialize_message(conversions.segments_to_message(segments, Header(frame_id="x"), 30, 50))
    back, bad = segments_from_message(bags.typestore().deserialize_cdr(sent, bags.SEGMENTS), 30, 50, "/masks")
    assert not bad
    for found in (good, back):
        for before, after in zip(segments, found, strict=True):
            assert (after.class_id, after.score) == (before.class_id, before.score)
            np.testing.assert_array_equal(after.mask, before.mask)

    T = trimesh.transformations.euler_matrix(0.3, -1.0, 2.5)
    T[:3, 3] = 0.1, -0.2, 0.7
    covariance = np.arange(36.0).reshape(6, 6)
    centre, size = np.array([0.01, 0.02, 0.03]), np.array([0.1, 0.2, 0.3])
    pose = pose_of("mug", T, covariance, centre, size)
    detection = build.detection_message(bags.message, pose, "mug_1", bags.header(START, FRAME))
    raw = bags.typestore().serialize_cdr(detection, "vision_msgs/msg/Detection3D")
    received = deserialize_message(bytes(raw), Detection3D)
    assert (received.id, received.results[0].hypothesis.class_id) == ("mug_1", "mug")
    result = received.results[0].pose
    np.testing.assert_allclose(bags.matrix_from(result.pose.position, result.pose.orientation), T, atol=1e-12)
    np.testing.assert_array_equal(result.covariance, np.arange(36.0))
    box = bags.matrix_from(received.bbox.center.position, received.bbox.center.orientation)
    np.testing.assert_allclose(box[:3, 3], T[:3, :3] @ centre + T[:3, 3], atol=1e-12)


def test_a_camera_survives_a_bag_message() -> None:
    lens = CameraModel(CAMERA.K, 320, 240, "rational_polynomial", (0.1, 0.2, 0, 0, 0.1, 0.3, 0, 0.01))
    for camera in (CAMERA, lens):
        back = camera_from_message(bags.camera_message(camera, bags.header(START, FRAME)), "/cam/info")
        np.testing.assert_array_equal(back.K, camera.K)
        assert back.distorted == camera.distorted and (back.width, back.height) == (320, 240)
        assert not camera.distorted or back.D == camera.D


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_recording_comes_back_whole_with_poses(
    storage: str, estimator: PoseEstimator, scenes: list[tuple[np.ndarray, list[Segment]]], tmp_path: Path
) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write_bag(source, scenes, storage)
    report = process_bag(estimator, source, target, BagOptions(tf_prefix="seen/", min_score=0.0))
    assert report.frames == 3 and report.poses == 6
    assert report.problems == {"no_image": 1} and str(START - STEP) in report.examples["no_image"]
    assert report.milliseconds["total"] > 0

    with bags.BagReader(source) as before, bags.BagReader(target) as after:
        assert after.storage == storage
        old = [(c.topic, t, bytes(raw)) for c, t, raw in before.raw()]
        new = [(c.topic, t, bytes(raw)) for c, t, raw in after.raw()]
        assert [t for _, t, _ in new] == sorted(t for _, t, _ in new)
        added = list(new)
        for entry in old:
            added.remove(entry)
        assert sorted({topic for topic, _, _ in added}) == ["/detections", "/tf"] and len(added) == 6
        answers = [(t, m) for c, t, m in after.messages(["/detections"])]
    for index, (recorded, message) in enumerate(answers):
        assert bags.stamp_of(message) == START + index * STEP and message.header.frame_id == FRAME
        assert recorded == START + index * STEP + DELAY
        assert [d.results[0].hypothesis.class_id for d in message.detections] == list(CLASSES)
        assert [d.id for d in message.detections] == ["cereal_box_0", "drill_0"]
        assert all(np.isfinite(d.results[0].pose.covariance).all() for d in message.detections)
    transforms = {}
    with bags.BagReader(target) as after:
        for _, _, message in after.messages(["/tf"]):
            for transform in message.transforms:
                transforms.setdefault(transform.child_frame_id, []).append(bags.stamp_of(transform))
                T = bags.matrix_from(transform.transform.translation, transform.transform.rotation)
                if transform.child_frame_id == "seen/drill_0":
                    index = (bags.stamp_of(transform) - START) // STEP
                    pose = answers[index][1].detections[1].results[0].pose.pose
                    np.testing.assert_allclose(
                        T, bags.matrix_from(pose.position, pose.orientation), atol=1e-12
                    )
    assert sorted(transforms) == [FRAME, "seen/cereal_box_0", "seen/drill_0"]
    assert all(stamps == [START + n * STEP for n in range(3)] for stamps in transforms.values())


def test_a_damaged_image_costs_only_its_own_frame(
    estimator: PoseEstimator, scenes: list[tuple[np.ndarray, list[Segment]]], tmp_path: Path
) -> None:
    write_bag(tmp_path / "in", scenes, "mcap", damaged=1)
    report = process_bag(estimator, tmp_path / "in", tmp_path / "out")
    assert report.frames == 2 and report.problems["bad_image"] == 1
    assert "truncated" in report.examples["bad_image"]


def test_the_command_line(
    meshes: Path,
    weights: Path,
    cache: Path,
    scenes: list[tuple[np.ndarray, list[Segment]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_bag(tmp_path / "in", scenes, "mcap")
    options = [
        "--meshes",
        meshes,
        "--weights",
        weights,
        "--cache-dir",
        cache,
        "--viewpoints",
        42,
        "--hypotheses",
        1,
        "--refinements",
        0,
        "--min-score",
        0,
    ]
    command = ["bag", *map(str, (tmp_path / "in", tmp_path / "out", *options, "--storage", "sqlite3"))]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "6 poses in 3 frames" in printed.out and "1 x no_image" in printed.err
    assert list((tmp_path / "out").glob("*.db3"))
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["bag", str(tmp_path / "nothing"), str(tmp_path / "out2"), *map(str, options)]) == 2
    assert "metadata.yaml" in capsys.readouterr().err


def test_bags_that_cannot_be_used(scenes: list[tuple[np.ndarray, list[Segment]]], tmp_path: Path) -> None:
    write_bag(tmp_path / "in", scenes, "mcap")
    with bags.BagReader(tmp_path / "in") as reader:
        assert reader.topic(bags.IMAGE) == "/cam/image"
        with pytest.raises(BagError, match="no topic /other"):
            reader.topic(bags.IMAGE, "/other")
        with pytest.raises(BagError, match="record it"):
            reader.topic(bags.DETECTIONS)
    with pytest.raises(BagError, match="no true poses"):
        read_recording(tmp_path / "in")
    with bags.BagWriter(tmp_path / "two") as writer:
        for topic in ("/left", "/right"):
            writer.add_topic(topic, bags.IMAGE)
        with pytest.raises(BagError, match="already holds"):
            writer.add_topic("/left", bags.TF)
    with bags.BagReader(tmp_path / "two") as reader, pytest.raises(BagError, match="/left, /right"):
        reader.topic(bags.IMAGE)
    with pytest.raises(BagError, match="doesn't exist"):
        bags.BagWriter(tmp_path / "two")
    with pytest.raises(BagError, match="mcap, sqlite3"):
        bags.BagWriter(tmp_path / "three", "zip")


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_bag_cut_short_is_an_error_with_its_name(
    storage: str, scenes: list[tuple[np.ndarray, list[Segment]]], tmp_path: Path
) -> None:
    write_bag(tmp_path / "in", scenes, storage)
    (data,) = [path for path in (tmp_path / "in").iterdir() if path.suffix in (".mcap", ".db3")]
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(BagError, match=str(tmp_path / "in")):
        with bags.BagReader(tmp_path / "in") as reader:
            for connection, _, raw in reader.raw():
                reader.decode(raw, connection)


# What the node refuses, names and publishes is refused, named and written here, too.


def spoilt(
    path: Path,
    scenes: list[tuple[np.ndarray, list[Segment]]],
    change: Callable[[dict[str, Any], int], None],
    storage: str = "mcap",
    extra: Callable[[bags.BagWriter], None] = lambda writer: None,
) -> Path:
    """A recording whose messages (image, info, masks) are changed, frame by frame."""
    kinds = {"image": bags.IMAGE, "info": bags.CAMERA_INFO, "masks": bags.SEGMENTS}
    with bags.BagWriter(path, storage) as writer:
        extra(writer)
        for index, (rgb, segments) in enumerate(scenes):
            head = bags.header(START + index * STEP, FRAME)
            messages: dict[str, Any] = {
                "image": bags.image_message(rgb, head),
                "info": bags.camera_message(CAMERA, head),
                "masks": bags.segments_message(segments, head, *rgb.shape[:2]),
            }
            change(messages, index)
            for name, message in messages.items():
                kind = getattr(message, "__msgtype__", kinds.get(name))
                writer.write(f"/cam/{name}", kind, START + index * STEP, message)
    return path


def answers(path: Path) -> tuple[list[list[str]], list[list[str]]]:
    """Names of the detections of each frame, and children of each TF message."""
    found: dict[str, list[list[str]]] = {"/detections": [], "/tf": []}
    with bags.BagReader(path) as reader:
        for connection, _, message in reader.messages(["/detections", "/tf"]):
            if connection.topic == "/tf":
                found["/tf"].append([transform.child_frame_id for transform in message.transforms])
            else:
                found["/detections"].append([detection.id for detection in message.detections])
    return found["/detections"], found["/tf"]


def run(
    estimator: PoseEstimator, source: Path, specs: dict[str, ObjectSpec] | None = None, **options: Any
) -> tuple[BagReport, list[list[str]], list[list[str]]]:
    target = source.with_name("out")
    report = process_bag(estimator, source, target, BagOptions(**{"min_score": 0.0, **options}), specs)
    return report, *answers(target)


def head_of(messages: dict[str, Any], **changes: Any) -> None:
    for message in messages.values():
        message.header = replace(message.header, **changes)


def set_frame(frame: str) -> Callable[[dict[str, Any], int], None]:
    return lambda messages, _: head_of(messages, frame_id=frame)


def zero_stamp(*names: str) -> Callable[[dict[str, Any], int], None]:
    return lambda messages, _: head_of({n: messages[n] for n in names}, stamp=bags.header(0, "").stamp)


def break_first_segment(messages: dict[str, Any], index: int) -> None:
    messages["masks"].segments[0].roi.width = 10_000


def compress(messages: dict[str, Any], index: int) -> None:
    image = messages["image"]
    rgb = image.data.reshape(image.height, image.width, 3)
    suffix, kind = ((".jpg", "rgb8; jpeg compressed bgr8"), (".png", "png"))[index % 2]
    messages["image"] = bags.message(
        bags.COMPRESSED_IMAGE,
        header=image.header,
        format=kind,
        data=cv2.imencode(suffix, rgb[:, :, ::-1])[1].reshape(-1),
    )


@pytest.mark.parametrize(
    ("change", "problems", "poses", "transforms"),
    [
        (set_frame(""), {"bad_frame_id": 2}, 2, 0),
        (set_frame("/camera"), {"bad_frame_id": 2}, 2, 0),
        (break_first_segment, {"bad_segment": 2}, 1, 1),
        (compress, {}, 2, 2),
        (zero_stamp("image", "masks"), {"no_stamp": 4}, None, 0),
        (zero_stamp("masks"), {"no_stamp": 2}, None, 0),
        (zero_stamp("info"), {}, 2, 2),
    ],
)
def test_a_recording_is_judged_as_by_the_node(
    estimator: PoseEstimator,
    scenes: list[tuple[np.ndarray, list[Segment]]],
    tmp_path: Path,
    change: Callable[[dict[str, Any], int], None],
    problems: dict[str, int],
    poses: int | None,
    transforms: int,
) -> None:
    source = spoilt(tmp_path / "in", scenes[:2], change)
    report, detections, tf = run(estimator, source)
    assert report.problems == problems
    assert [len(names) for names in detections] == ([] if poses is None else [poses] * 2)
    assert [len(names) for names in tf] == ([transforms] * 2 if transforms else [])


def test_names_and_scores_are_those_of_the_node(
    estimator: PoseEstimator, meshes: Path, scenes: list[tuple[np.ndarray, list[Segment]]], tmp_path: Path
) -> None:
    specs = {spec.class_id: spec for spec in discover_objects(meshes)}
    specs["drill"] = replace(specs["drill"], frame_id="tool", aliases=("borer",))

    def as_borer(messages: dict[str, Any], _: int) -> None:
        messages["masks"].segments[1].class_id = "fork"

    source = spoilt(tmp_path / "in", scenes[:1], as_borer)
    report, detections, tf = run(estimator, source, specs, tf_prefix="left/")
    assert report.problems == {"unknown_class": 1} and tf == [["left/cereal_box_0"]]
    (tmp_path / "out").rename(tmp_path / "first")

    source = spoilt(tmp_path / "in2", scenes[:1], lambda *_: None)
    report, detections, tf = run(estimator, source, specs)
    assert detections == [["cereal_box_0", "drill_0"]] and tf == [["cereal_box_0", "tool_0"]]
    (tmp_path / "out").rename(tmp_path / "second")
    report, detections, tf = run(estimator, source, specs, min_score=1.0)
    assert detections == [[]] and sum(report.problems.values()) == 2 and report.frames == 1

    with pytest.raises(BagError, match="already has the TF frame 'cereal_box_0' on /tf.*--tf-prefix"):
        run(estimator, tmp_path / "second", specs, detections="/again")
    with pytest.raises(ConfigError, match="no leading slash"):
        run(estimator, source, specs, tf_prefix="/left/")


def test_a_frame_that_would_be_its_own_parent_is_left_out(
    estimator: PoseEstimator, scenes: list[tuple[np.ndarray, list[Segment]]], tmp_path: Path
) -> None:
    report, detections, tf = run(estimator, spoilt(tmp_path / "in", scenes[:1], set_frame("drill_0")))
    assert detections == [["cereal_box_0", "drill_0"]] and tf == [["cereal_box_0"]]
    assert report.problems == {"bad_frame_id": 1}


def test_boxes_with_labels_and_masks_are_read_too(
    estimator: PoseEstimator, scenes: list[tuple[np.ndarray, list[Segment]]], tmp_path: Path
) -> None:
    def grey(labels: np.ndarray, head: Any) -> Any:
        image = bags.image_message(np.repeat(labels[:, :, None], 3, 2), head)
        return replace(image, encoding="mono8", step=labels.shape[1], data=labels.reshape(-1))

    def boxes(messages: dict[str, Any], index: int) -> None:
        head, segments = messages["image"].header, scenes[index][1]
        labels = sum((n * s.mask.astype(np.uint8) for n, s in enumerate(segments, 1)), np.uint8(0))
        detections = []
        for number, segment in enumerate(segments, 1):
            pose = pose_of(segment.class_id, np.eye(4), np.eye(6), np.zeros(3), np.ones(3))
            result = build.detection_message(bags.message, pose, "", head).results[0]
            point = bags.message("vision_msgs/msg/Point2D", x=0.0, y=0.0)
            centre = bags.message("vision_msgs/msg/Pose2D", position=point, theta=0.0)
            box = bags.message("vision_msgs/msg/BoundingBox2D", center=centre, size_x=1.0, size_y=1.0)
            detections.append(
                bags.message(
                    "vision_msgs/msg/Detection2D", header=head, results=[result], bbox=box, id=str(number)
                )
            )
        messages["boxes"] = bags.message(bags.BOXES, header=head, detections=detections)
        messages["labels"] = grey(labels, head)
        messages["mask"] = grey(labels * np.uint8(labels == 2), head)
        if index == 1:
            head_of({"labels": messages["labels"]}, stamp=bags.header(START + 5, "").stamp)

    source = spoilt(tmp_path / "in", scenes[:2], boxes)
    options = {"segmentation_input": "detections", "image": "/cam/image", "labels": "/cam/labels"}
    report, detections, _ = run(estimator, source, **options)
    assert detections == [["cereal_box_0", "drill_0"]]
    assert report.problems == {"incomplete_segmentation": 2}
    (tmp_path / "out").rename(tmp_path / "first")
    options = {"segmentation_input": "mask", "mask_class": "drill", "segmentation": "/cam/mask"}
    report, detections, _ = run(estimator, source, image="/cam/image", **options)
    assert detections == [["drill_0"]] * 2 and not report.problems
    with pytest.raises(ConfigError, match="--mask-class"):
        run(estimator, source, segmentation_input="mask")


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_topics_of_unknown_type_are_copied_where_the_storage_can(
    estimator: PoseEstimator,
    scenes: list[tuple[np.ndarray, list[Segment]]],
    tmp_path: Path,
    storage: str,
) -> None:
    raw = b"\x00\x01\x00\x00whatever"

    def unknown(writer: bags.BagWriter) -> None:
        writer._writer.added_types.add("robot_msgs/msg/Battery")
        connection = writer._writer.add_connection(
            "/battery", "robot_msgs/msg/Battery", msgdef="", rihs01="RIHS01_" + 64 * "1"
        )
        writer._writer.write(connection, START, raw)

    source = spoilt(tmp_path / "in", scenes[:1], lambda *_: None, "sqlite3", unknown)
    report, detections, _ = run(estimator, source, storage=storage)
    assert len(detections) == 1 and report.frames == 1
    with bags.BagReader(tmp_path / "out") as reader:
        kept = [bytes(data) for connection, _, data in reader.raw(["/battery"])]
        if storage == "sqlite3":
            (connection,) = [c for c in reader.connections if c.topic == "/battery"]
            assert kept == [raw] and connection.msgtype == "robot_msgs/msg/Battery" and not report.notes
            with pytest.raises(BagError, match="nothing says what a robot_msgs/msg/Battery is made of"):
                reader.decode(raw, connection)
        else:
            assert kept == []
            assert "topic /battery is left out" in report.notes[0] and "--storage sqlite3" in report.notes[0]


def test_a_definition_that_can_not_be_read_costs_its_topic_alone(
    estimator: PoseEstimator, scenes: list[tuple[np.ndarray, list[Segment]]], tmp_path: Path
) -> None:
    def broken(writer: bags.BagWriter) -> None:
        connection = writer._writer.add_connection(
            "/odd", "robot_msgs/msg/Odd", msgdef="float64[[ nothing", rihs01="RIHS01_" + 64 * "1"
        )
        writer._writer.write(connection, START, b"\x00\x01\x00\x00abcd")

    source = spoilt(tmp_path / "in", scenes[:1], lambda *_: None, "mcap", broken)
    report, detections, _ = run(estimator, source)
    assert len(detections) == 1 and not report.problems
    with bags.BagReader(tmp_path / "out") as reader:
        assert [bytes(data) for _, _, data in reader.raw(["/odd"])] == [b"\x00\x01\x00\x00abcd"]


def test_with_follow_images_without_masks_are_answered_too(
    estimator: PoseEstimator, scenes: list[tuple[np.ndarray, list[Segment]]], tmp_path: Path
) -> None:
    """Poses of an untrained network may be lost at once: then their image is answered with none."""

    def masks_of_the_first_only(messages: dict[str, Any], index: int) -> None:
        if index:
            del messages["masks"]

    source = spoilt(tmp_path / "in", scenes, masks_of_the_first_only)
    report, detections, _ = run(estimator, source)
    assert report.frames == len(detections) == 1
    (tmp_path / "out").rename(tmp_path / "first")
    report, detections, _ = run(estimator, source, follow=True)
    assert report.frames == len(detections) == 3
    assert detections[0] == ["cereal_box_0", "drill_0"] and not report.problems
    assert all(set(names) <= set(detections[0]) for names in detections)

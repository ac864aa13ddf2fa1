"""CNOS's file to SegmentArray: what belongs to which image, what is left out, into a bag and over DDS."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import rclpy
from picopose_ros.msg import SegmentArray
from pycocotools import mask as coco
from rclpy.context import Context
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image

from picopose_ros.cli.images import write_scene
from picopose_ros.cli.main import main
from picopose_ros.cli.segments import SegmentSource, Timeline, read_class_names, write_bag
from picopose_ros.errors import BagError, SegmentError
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.messages import bags
from picopose_ros.messages.segmentations import segments_from_message
from picopose_ros.node.conversions import stamp_to_nanoseconds
from picopose_ros.segmentation import CnosDetections, Problems

HEIGHT, WIDTH = 48, 64
START = 1_700_000_000_000_000_123
STEP = 100_000_000
STAMPS = [START + STEP * index for index in range(4)]
WAIT = 120.0
"""Seconds that something may take on a loaded machine; never slept through."""


def disc(x: float, y: float = 24.0) -> np.ndarray:
    rows, cols = np.mgrid[:HEIGHT, :WIDTH]
    return (rows - y) ** 2 + (cols - x) ** 2 < 9**2


def cnos_rle(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed run lengths, from pycocotools' compressed ones: CNOS writes the former."""
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    flat = coco.decode(encoded).ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return {"counts": runs if not flat[0] else [0, *runs], "size": list(mask.shape)}


def entry(image: int, category: int, mask: np.ndarray, score: float = 0.6, scene: int = 1) -> dict[str, Any]:
    """What CNOS writes of one detection."""
    x, y, w, h = coco.toBbox(coco.encode(np.asfortranarray(mask.astype(np.uint8)))).tolist()
    return {
        "scene_id": scene,
        "image_id": image,
        "category_id": category,
        "bbox": [int(x), int(y), int(w), int(h)],
        "score": score,
        "time": 0.31,
        "segmentation": cnos_rle(mask),
    }


DETECTIONS = [entry(0, 1, disc(20)), entry(0, 2, disc(45), 0.4), entry(2, 1, disc(30)), entry(3, 2, disc(10))]
"""Of four images; nothing was seen in image 1."""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    def to_file(content: Any) -> Path:
        path = tmp_path / "cnos.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return to_file


# Reading.


def test_entries_are_found_by_image_and_masks_are_those_of_coco(write):
    detections = CnosDetections(write(DETECTIONS))
    assert detections.image_ids == [0, 2, 3]
    assert len(detections) == 4
    first, second = detections.segments(0, (HEIGHT, WIDTH))
    assert (first.class_id, first.score) == ("obj_000001", 0.6)
    assert second.class_id == "obj_000002"
    for segment, content in zip((first, second), DETECTIONS):
        size = content["segmentation"]["size"]
        theirs = coco.decode(coco.frPyObjects(content["segmentation"], *size))
        np.testing.assert_array_equal(segment.mask, theirs)
    assert detections.segments(1) == []
    assert not detections.problems


def test_compressed_run_lengths_are_read_too(write):
    mask = disc(33)
    content = entry(0, 7, mask)
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    content["segmentation"]["counts"] = encoded["counts"].decode()
    (segment,) = CnosDetections(write([content])).segments(0)
    np.testing.assert_array_equal(segment.mask, mask)


def test_class_names_and_the_lowest_score(write, tmp_path):
    names = tmp_path / "names.json"
    names.write_text('{"1": "mug", "2": "box"}')
    detections = CnosDetections(write(DETECTIONS), class_names=read_class_names(names), min_score=0.5)
    assert [s.class_id for s in detections.segments(0)] == ["mug"]
    assert [s.class_id for s in detections.segments(3)] == ["box"]


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": "mug"}', '{"1": 5}', '{"1": ""}'])
def test_class_names_that_are_no_table(tmp_path, text):
    path = tmp_path / "names.json"
    path.write_text(text)
    with pytest.raises(SegmentError, match="names.json.*must be a JSON object"):
        read_class_names(path)
    with pytest.raises(SegmentError, match="can't be read"):
        read_class_names(tmp_path / "none.json")


def broken(**changes: Any) -> dict[str, Any]:
    return {**entry(0, 1, disc(20)), **changes}


def without(name: str) -> dict[str, Any]:
    content = entry(0, 1, disc(20))
    del content[name]
    return content


BROKEN = {
    "no object": 5,
    "no scene": without("scene_id"),
    "no image": without("image_id"),
    "image that is no number": broken(image_id="seven"),
    "image that is true": broken(image_id=True),
    "no category": without("category_id"),
    "no score": without("score"),
    "score that is no number": broken(score="high"),
    "score that is NaN": broken(score=float("nan")),
    "no mask": without("segmentation"),
    "mask without size": broken(segmentation={"counts": [5]}),
    "run lengths that don't add up": broken(segmentation={"counts": [5, 6], "size": [HEIGHT, WIDTH]}),
    "run lengths below zero": broken(segmentation={"counts": [-5, 5], "size": [HEIGHT, WIDTH]}),
    "run lengths without end": broken(segmentation={"counts": [10**15], "size": [10**5, 10**10]}),
    "compressed run lengths cut": broken(segmentation={"counts": "o", "size": [HEIGHT, WIDTH]}),
}


def test_a_bad_entry_is_counted_and_named_and_takes_no_other_with_it(write):
    content = [*BROKEN.values(), *DETECTIONS]
    detections = CnosDetections(write(content))
    assert len(detections) == len(DETECTIONS)
    assert detections.problems.counts == {"bad entry": len(BROKEN)}
    (line,) = detections.problems.lines()
    assert line.startswith(f"{len(BROKEN)} x bad entry: ")
    assert "cnos.json, entry 0: is a int, expected an object" in line
    assert f"and {len(BROKEN) - 5} more" in line


@pytest.mark.parametrize("kind", BROKEN)
def test_every_bad_entry_has_its_place_in_the_message(write, kind):
    detections = CnosDetections(write([DETECTIONS[0], BROKEN[kind]]))
    (line,) = detections.problems.lines()
    assert line.startswith("1 x bad entry: ")
    assert line.count("entry 1: ") == 1 and "entry 0" not in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON file"),
        ({}, "expected the JSON list that CNOS writes, got dict"),
        ([], "holds no usable entry"),
        ([BROKEN["no mask"]], "holds no usable entry.*\n1 x bad entry"),
        ([entry(0, 1, disc(20), scene=1), entry(0, 1, disc(20), scene=48)], "holds scenes 1, 48: name one"),
    ],
)
def test_files_that_are_of_no_use_are_refused(write, content, message):
    with pytest.raises(SegmentError, match=message) as caught:
        CnosDetections(write(content))
    assert "cnos.json" in str(caught.value)


def test_one_of_several_scenes_can_be_named(write):
    path = write([entry(0, 1, disc(20)), entry(5, 2, disc(20), scene=48)])
    assert CnosDetections(path, scene_id=48).image_ids == [5]
    with pytest.raises(SegmentError, match="no usable entry of scene 3"):
        CnosDetections(path, scene_id=3)
    with pytest.raises(SegmentError, match="No such file"):
        CnosDetections(path.with_name("other.json"))


def test_masks_of_another_size_than_the_image_are_left_out_and_named(write):
    detections = CnosDetections(write(DETECTIONS))
    assert detections.segments(0, (480, 640)) == []
    (line,) = detections.problems.lines()
    assert line.startswith("2 x mask of another size: ")
    assert "entry 0 has a mask of 64x48, but its image has 640x480 pixels" in line


# Which image.


def test_images_are_counted_where_nothing_else_is_known(write):
    source = SegmentSource(CnosDetections(write(DETECTIONS)))
    assert [len(source.answer(stamp)) for stamp in STAMPS] == [2, 0, 1, 1]
    assert source.answer(STAMPS[-1] + STEP) is None
    assert source.problems.counts == {"image after the last one": 1}
    # A recording that is played again starts with its first image.
    assert len(source.answer(STAMPS[0])) == 2
    assert (source.answered, source.empty, source.segments) == (5, 1, 6)


def test_numbers_may_start_at_one(write):
    source = SegmentSource(CnosDetections(write(DETECTIONS)), first=2)
    assert [len(source.answer(stamp)) for stamp in STAMPS[:2]] == [1, 1]


def test_nothing_moves(write):
    detections = CnosDetections(write(DETECTIONS))
    source = SegmentSource(detections, still=2)
    for stamp in (STAMPS[3], STAMPS[0], 5):
        np.testing.assert_array_equal(source.answer(stamp)[0].mask, disc(30))
    with pytest.raises(SegmentError, match=r"speaks of no image 1 \(first it has: 0, 2, 3\)"):
        SegmentSource(detections, still=1)


def test_a_table_of_stamps_says_it(write, tmp_path):
    table = tmp_path / "stamps.csv"
    rows = [(1, 3, STAMPS[0]), (1, 0, STAMPS[2]), (2, 2, STAMPS[3])]
    table.write_text("scene_id, image_id, stamp\n" + "\n".join(f"{a}, {b}, {c}" for a, b, c in rows))
    source = SegmentSource(CnosDetections(write(DETECTIONS)), Timeline.from_csv(table, scene_id=1))
    answers = [source.answer(stamp) for stamp in STAMPS]
    assert [None if answer is None else len(answer) for answer in answers] == [1, None, 2, None]
    assert source.problems.counts == {"image without a number": 2}
    assert str(STAMPS[1]) in source.problems.lines()[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column image_id and stamp"),
        ("image_id,time\n1,2\n", "has no column stamp"),
        ("image_id,stamp\n0,1\n1,1.5\n", "line 3: image_id and stamp must be whole numbers"),
        ("image_id,stamp\n0\n", "line 2"),
        ("image_id,stamp\n", "holds no stamp"),
        ("scene_id,image_id,stamp\n3,0,1\n", "holds no stamp of scene 1"),
    ],
)
def test_tables_that_can_not_be_used_are_explained(tmp_path, text, message):
    table = tmp_path / "stamps.csv"
    table.write_text(text)
    with pytest.raises(SegmentError, match=message):
        Timeline.from_csv(table, scene_id=1)
    with pytest.raises(SegmentError, match="can't be read"):
        Timeline.from_csv(tmp_path / "none.csv")


# Bags.


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images, recorded out of order, with their camera_info; one image of another topic."""
    path = tmp_path_factory.mktemp("recording") / "bag"
    lens = CameraModel(np.array([[60.0, 0, 32], [0, 60, 24], [0, 0, 1]]), WIDTH, HEIGHT)
    with bags.BagWriter(path) as writer:
        for order, index in enumerate((0, 2, 1, 3)):
            head = bags.header(STAMPS[index], "camera")
            rgb = np.full((HEIGHT, WIDTH, 3), (10 * index, 0, 200), np.uint8)
            recorded = START + STEP * order + 5
            writer.write("/camera/image", bags.IMAGE, recorded, bags.image_message(rgb, head))
            writer.write("/camera/camera_info", bags.CAMERA_INFO, recorded, bags.camera_message(lens, head))
        other = bags.image_message(np.zeros((8, 8, 3), np.uint8), bags.header(START, "other"))
        writer.write("/other/image", bags.IMAGE, START, other)
    return path


def written_segments(path: Path) -> dict[int, list[tuple[str, float, np.ndarray]]]:
    """By stamp: class, score, mask of every segment in a bag."""
    found = {}
    with bags.BagReader(path) as reader:
        for _, _, message in reader.messages(["/segmentation"]):
            assert message.header.frame_id == "camera"
            segments = segments_from_message(message, HEIGHT, WIDTH, "/segmentation")[0]
            found[bags.stamp_of(message)] = [(s.class_id, s.score, s.mask) for s in segments]
    return found


def test_a_bag_with_the_segments_in_it(write, recording, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["segments-from-cnos", str(write(DETECTIONS)), "--bag", str(recording), "--out", str(out)]
    assert main([*words, "--image", "/camera/image"]) == 0
    printed = capsys.readouterr()
    assert "4 masks of 3 images" in printed.out
    assert "4 segments for 4 images, 1 of them with nothing seen" in printed.out
    found = written_segments(out)
    assert sorted(found) == STAMPS
    assert [len(found[stamp]) for stamp in STAMPS] == [2, 0, 1, 1]
    np.testing.assert_array_equal(found[STAMPS[2]][0][2], disc(30))
    with bags.BagReader(out) as reader, bags.BagReader(recording) as source:
        assert reader.message_count == source.message_count + 4
        times = {bags.stamp_of(m): t for _, t, m in reader.messages(["/camera/image"])}
        assert {bags.stamp_of(m): t for _, t, m in reader.messages(["/segmentation"])} == times
    # And nothing of it is there twice.
    assert main([*words[:3], str(out), "--out", str(tmp_path / "again"), "--image", "/camera/image"]) == 2
    assert "already has a topic /segmentation" in capsys.readouterr().err


def test_what_could_not_be_used_is_said_and_seen_in_the_exit_status(write, recording, tmp_path, capsys):
    small = entry(1, 3, np.ones((10, 10), bool))
    path = write([*DETECTIONS, small, BROKEN["no score"]])
    words = ["segments-from-cnos", str(path), "--bag", str(recording), "--out", str(tmp_path / "out")]
    assert main([*words, "--image", "/camera/image", "--storage", "sqlite3"]) == 1
    said = capsys.readouterr().err
    assert "1 x bad entry: " in said and "entry 5: 'score' is missing" in said
    assert "1 x mask of another size: " in said and "entry 4 has a mask of 10x10" in said
    assert [len(segments) for _, segments in sorted(written_segments(tmp_path / "out").items())] == [
        2,
        0,
        1,
        1,
    ]


def test_words_that_can_not_be_meant(write, recording, tmp_path, capsys):
    path = str(write(DETECTIONS))
    assert main(["segments-from-cnos", path, "--out", str(tmp_path / "out")]) == 2
    assert "--out needs --bag" in capsys.readouterr().err
    assert main(["segments-from-cnos", path, "--bag", str(recording), "--out", str(tmp_path / "out")]) == 2
    assert "several topics of type sensor_msgs/msg/Image" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["segments-from-cnos", path, "--still", "0", "--stamps", "table.csv"])


def test_a_recording_becomes_files_and_back(write, recording, tmp_path, capsys):
    """images-from-bag, a segmenter, segments-from-cnos: every mask arrives at the image it was made from."""
    scene = tmp_path / "set" / "test" / "000001"
    assert main(["images-from-bag", str(recording), str(scene), "--image", "/camera/image"]) == 0
    names = sorted(path.name for path in (scene / "rgb").iterdir())
    assert names == ["000000.png", "000001.png", "000002.png", "000003.png"]
    cameras = json.loads((scene / "scene_camera.json").read_text())
    assert cameras["3"]["cam_K"] == [60, 0, 32, 0, 60, 24, 0, 0, 1]
    # The segmenter finds what the pictures show: red says which of them it is.
    found = []
    for index, name in enumerate(names):
        red = cv2.imread(str(scene / "rgb" / name))[0, 0, 2] // 10
        found.append(entry(index, int(red) + 1, disc(20 + 3 * red)))
    for number, options in enumerate((["--stamps", str(scene / "stamps.csv")], [])):
        out = tmp_path / f"out{number}"
        words = [
            "segments-from-cnos",
            str(write(found)),
            "--bag",
            str(recording),
            "--out",
            str(out),
            *options,
        ]
        assert main([*words, "--image", "/camera/image", "--segmentation", "/segmentation"]) == 0
        for index, stamp in enumerate(STAMPS):
            ((class_id, _, mask),) = written_segments(out)[stamp]
            assert class_id == f"obj_{index + 1:06d}"
            np.testing.assert_array_equal(mask, disc(20 + 3 * index))
    with pytest.raises(BagError, match="exists already"):
        write_scene(recording, scene, "/camera/image")
    assert not list(scene.parent.glob(".*"))


def test_images_that_can_not_be_written_are_named(tmp_path):
    path = tmp_path / "bag"
    with bags.BagWriter(path) as writer:
        for index, encoding in enumerate(("rgb8", "snow8")):
            image = bags.image_message(
                np.zeros((HEIGHT, WIDTH, 3), np.uint8), bags.header(START + index, "c")
            )
            image.encoding = encoding
            writer.write("/image", bags.IMAGE, START + index, image)
        info = bags.camera_message(
            CameraModel(np.diag([60.0, 60, 1]), WIDTH, HEIGHT), bags.header(START, "c")
        )
        writer.write("/camera_info", bags.CAMERA_INFO, START, info)
    written, problems = write_scene(path, tmp_path / "scene")
    assert written == 1
    assert len(problems) == 1 and "image 1" in problems[0] and "snow8" in problems[0]
    assert (tmp_path / "scene" / "stamps.csv").read_text().split() == [
        "scene_id,image_id,stamp",
        f"1,0,{START}",
    ]


def test_a_damaged_image_costs_only_itself(write, recording, tmp_path):
    broken_bag = tmp_path / "broken"
    with bags.BagReader(recording) as reader, bags.BagWriter(broken_bag) as writer:
        for connection in reader.connections:
            writer.add_like(connection)
        for index, (connection, recorded, raw) in enumerate(reader.raw(["/camera/image"])):
            writer.write_raw(connection.topic, recorded, raw[:30] if index == 1 else raw)
    source = SegmentSource(CnosDetections(write(DETECTIONS), problems=Problems()))
    write_bag(source, broken_bag, tmp_path / "out", "/camera/image")
    assert source.problems.counts == {"damaged image": 1}
    assert source.answered == 3


# Over DDS: the command as a process of its own.


class Camera:
    """Publishes images and listens to segments, on a domain of its own."""

    def __init__(self, domain: int) -> None:
        self._context = Context()
        rclpy.init(context=self._context, domain_id=domain)
        self._node = rclpy.create_node("camera", context=self._context)
        self.changed = threading.Condition()
        self.received: dict[str, dict[int, Any]] = {}
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def _spin(self) -> None:
        try:
            self._executor.spin()
        except ExternalShutdownException:
            pass

    def close(self) -> None:
        self._context.try_shutdown()
        self._thread.join(10)
        self._node.destroy_node()

    def listen(self, topic: str) -> dict[int, Any]:
        """What arrives on a topic, by stamp."""
        arrived = self.received.setdefault(topic, {})

        def on_message(message: SegmentArray) -> None:
            with self.changed:
                arrived[stamp_to_nanoseconds(message.header.stamp)] = message
                self.changed.notify_all()

        self._node.create_subscription(SegmentArray, topic, on_message, 50)
        return arrived

    def publisher(self, kind: type, topic: str, reliability: ReliabilityPolicy) -> Any:
        return self._node.create_publisher(kind, topic, QoSProfile(depth=50, reliability=reliability))

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + WAIT
        with self.changed:
            while not condition():
                assert time.monotonic() < end, f"waited {WAIT:g} s for {what}"
                self.changed.wait(0.1)


def header_of(message: Any, stamp: int) -> Any:
    message.header.frame_id = "camera_optical"
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp, 1_000_000_000)
    return message


def image(stamp: int) -> Image:
    message = header_of(Image(height=HEIGHT, width=WIDTH, encoding="mono8", step=WIDTH), stamp)
    message.data = bytes(HEIGHT * WIDTH)
    return message


def test_the_stream_of_a_camera_gets_its_segments(write, recording, tmp_path):
    """Two streams at once: a reliable raw one, numbered by the recording that is played, and a best-effort
    compressed one of a scene that stands still."""
    domain = 1 + (os.getpid() * 13 + 7) % 100
    environment = {
        **os.environ,
        "ROS_DOMAIN_ID": str(domain),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "OMP_NUM_THREADS": "1",
    }
    path = str(write([*DETECTIONS, BROKEN["no mask"]]))
    commands = [
        [path, "--image", "/camera/image", "--segmentation", "/moving/segments", "--bag", str(recording)],
        [path, "--image", "/still/image", "--segmentation", "/still/segments", "--still", "2"],
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "picopose_ros.cli.main", "segments-from-cnos", *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for words in commands
    ]
    camera = Camera(domain)
    try:
        moving, still = camera.listen("/moving/segments"), camera.listen("/still/segments")
        raw = camera.publisher(Image, "/camera/image", ReliabilityPolicy.RELIABLE)
        compressed = camera.publisher(CompressedImage, "/still/image", ReliabilityPolicy.BEST_EFFORT)

        def all_subscribed() -> bool:
            assert all(process.poll() is None for process in processes)
            return bool(raw.get_subscription_count() and compressed.get_subscription_count())

        camera.wait_for(all_subscribed, "the commands' subscriptions")
        for stamp in (STAMPS[2], STAMPS[0], STAMPS[0] + 1, STAMPS[1]):  # as it comes; one that nobody knows
            raw.publish(image(stamp))
        camera.wait_for(lambda: STAMPS[1] in moving, "segments of the moving scene")
        assert sorted(moving) == STAMPS[:3]
        assert [len(moving[stamp].segments) for stamp in STAMPS[:3]] == [2, 0, 1]
        answer = moving[STAMPS[2]]
        assert answer.header.frame_id == "camera_optical"
        (segment,), bad = segments_from_message(answer, HEIGHT, WIDTH, "/moving/segments")
        assert not bad and segment.class_id == "obj_000001"
        np.testing.assert_array_equal(segment.mask, disc(30))

        def still_answered() -> bool:  # best effort: one may be lost
            compressed.publish(header_of(CompressedImage(format="jpeg", data=b"\xff\xd8"), time.time_ns()))
            return bool(still)

        camera.wait_for(still_answered, "segments of the still scene")
        (segment,), _ = segments_from_message(next(iter(still.values())), HEIGHT, WIDTH, "/still/segments")
        np.testing.assert_array_equal(segment.mask, disc(30))
    finally:
        for process in processes:
            process.send_signal(signal.SIGINT)
        said = [process.communicate(timeout=WAIT)[0] for process in processes]
        camera.close()
    assert [process.returncode for process in processes] == [1, 1]  # for the entry without a mask
    assert "3 segments for 3 images, 1 of them with nothing seen" in said[0]
    assert "1 x image without a number: stamp" in said[0]
    assert all("1 x bad entry" in text and "Traceback" not in text for text in said)

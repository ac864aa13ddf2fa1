"""`make soak` in short: all that it does, on a small recording, seconds each. No figure is judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from node_harness import (
    HEIGHT,
    WIDTH,
    K,
    camera_message,
    image_message,
    make_scene,
    next_domain,
    segments_message,
    write_meshes,
    write_weights,
)

from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.messages import bags
from picopose_ros.segmentation import Segment

ROOT = Path(__file__).resolve().parent.parent
PROFILES = sorted((ROOT / "config").glob("fastdds_*.xml"))
WAIT = 1800.0
"""Seconds on a machine that has a lot else to do."""


def soak(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A run of the script on two images of two objects."""
    meshes, weights = write_meshes(folder / "meshes"), write_weights(folder / "tiny.safetensors")
    scene = make_scene(meshes)
    segments = [*scene.segments, scene.segments[0]]
    with bags.BagWriter(folder / "recording") as writer:
        for index in range(2):
            head = bags.header(1_700_000_000_000_000_000 + index, "camera_optical")
            lens = CameraModel(K, WIDTH, HEIGHT)
            writer.write("/image", bags.IMAGE, index, bags.image_message(scene.rgb, head))
            writer.write("/camera_info", bags.CAMERA_INFO, index, bags.camera_message(lens, head))
            masks = bags.segments_message(segments, head, HEIGHT, WIDTH)
            writer.write("/segmentation", bags.SEGMENTS, index, masks)
    (folder / "soak.md").write_text(
        "# Soak\n\nWords before.\n\n<!-- soak: begin -->\noutworn\n<!-- soak: end -->\n\nafter\n"
    )
    command = [sys.executable, str(ROOT / "scripts" / "soak"), "--folder", str(folder / "run")]
    command += ["--meshes", str(meshes), "--recording", str(folder / "recording")]
    command += ["--duration", "3", *options, "--domain", str(next_domain())]
    command += ["--report", str(folder / "soak.md"), "--json", str(folder / "soak.json")]
    quick = ("viewpoints:=42", "hypotheses:=1", "refinements:=0", "min_score:=0.0")
    for word in (f"weights:={weights}", *quick):
        command += ["--parameter", word]
    return subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=WAIT
    )


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("soak")
    return soak(folder, "--malformed", "20", "--asks", "2"), folder


def found(folder: Path) -> dict[str, dict[str, object]]:
    checks = json.loads((folder / "soak.json").read_text())["checks"]
    return {check["what"]: check for check in checks}


def test_the_short_run_goes_through_every_phase(short_run) -> None:
    done, folder = short_run
    assert done.returncode in (0, 1), done.stdout + done.stderr  # a slow machine may not hold the latency
    assert "Traceback" not in done.stderr, done.stderr
    assert "the soak ended early" not in done.stdout, done.stdout
    assert "latency added by the ROS layer, median" in found(folder)


@pytest.mark.parametrize(
    "what",
    [
        "segmentations answered + counted of those sent",
        "answered twice",
        "kill -9 of the publisher, another one starts",
        "kill -9 of a subscriber, another one starts",
        "a subscriber stops reading: frames answered meanwhile",
        "malformed messages",
        "good frames among them answered",
        "exceptions",
        "kill -9 of the node, started again",
        "exit code after SIGINT",
    ],
)
def test_nothing_is_lost_and_nothing_dies(short_run, what: str) -> None:
    done, folder = short_run
    check = found(folder)[what]
    assert check["passed"] is True, f"{check}\n{done.stdout}\n{(folder / 'run' / 'node.log').read_text()}"


def test_the_table_takes_the_place_of_the_old_one(short_run) -> None:
    _, folder = short_run
    text = (folder / "soak.md").read_text()
    assert text.startswith("# Soak\n\nWords before.\n") and text.endswith("\n\nafter\n")
    assert "outworn" not in text
    assert text.count("| good frames among them answered | 2 of 2 | all | yes |") == 1
    assert "- machine: " in text and "--malformed 20" in text
    assert not list(folder.glob(".*partial"))


def test_the_node_is_watched_while_it_follows(tmp_path: Path) -> None:
    """Images of which every fourth has masks are answered, and nothing goes wrong."""
    done = soak(tmp_path, "--follow", "--image-rate", "4", "--segmentation-rate", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    checks = found(tmp_path)
    assert float(checks["images answered"]["found"].split(",")[0]) > 0
    assert checks["exceptions"]["passed"] is True and checks["exit code after SIGINT"]["passed"] is True
    assert "malformed messages" not in checks
    memory = checks["resident memory of each minute, median"]["found"]
    assert float(memory.removesuffix(" MiB")) > 100


def test_malformed_messages_can_be_sent_and_follow_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case becomes bytes on the wire; the same seed gives the same ones."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "soak"))
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from malformed import Case, cases
    from rclpy.serialization import serialize_message
    from sensor_msgs.msg import Image
    from world import View

    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[50:90, 60:120] = True
    masks = segments_message([Segment("block", 0.9, mask)] * 4, 1)
    view = View(image_message(pixels, 1), camera_message(1), masks)

    def told(message: Any) -> str:
        """All of a message but pixels and padding, which is whatever was in memory."""
        if isinstance(message, bytes):
            return str(len(message))
        serialize_message(message)
        if isinstance(message, Image):
            return (
                f"{message.header} {message.encoding!r} {message.height} {message.width} {len(message.data)}"
            )
        return repr(message)

    def run(number: int) -> tuple[list[str], list[str]]:
        kinds: list[str] = []
        content: list[str] = []

        @seed(number)
        @settings(
            max_examples=150,
            phases=[Phase.generate],
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(cases())
        def collect(case: Case) -> None:
            kinds.append(case.kind)
            content.extend(told(message) for _, message in case.messages(view, 5))

        collect()
        return kinds, content

    first = run(1)
    assert len(first[0]) == 150 and len(set(first[0])) >= 20
    assert run(1) == first
    assert run(2) != first


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_fast_dds_takes_the_profiles(path: Path) -> None:
    """A participant comes up with them and hears another one; Fast DDS would say what it does not like."""
    root = ElementTree.parse(path).getroot()
    name = "{http://www.eprosima.com}"
    assert {element.text for element in root.iter(f"{name}type")} == {"SHM", "UDPv4"}
    program = (
        "import time, rclpy\n"
        "from std_msgs.msg import String\n"
        "rclpy.init()\n"
        "nodes = [rclpy.create_node(name) for name in ('a', 'b')]\n"
        "heard = []\n"
        "nodes[1].create_subscription(String, 'words', heard.append, 10)\n"
        "publisher = nodes[0].create_publisher(String, 'words', 10)\n"
        "end = time.monotonic() + 60\n"
        "while not heard and time.monotonic() < end:\n"
        "    publisher.publish(String(data='x'))\n"
        "    rclpy.spin_once(nodes[1], timeout_sec=0.1)\n"
        "print('heard', bool(heard))\n"
    )
    environment = {
        **os.environ,
        "FASTDDS_DEFAULT_PROFILES_FILE": str(path),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "ROS_DOMAIN_ID": str(next_domain()),
    }
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT)
    assert done.stdout.strip() == "heard True", done.stderr
    assert "XML" not in done.stderr and "rror" not in done.stderr, done.stderr


def test_profiles_hold_an_image(short_run) -> None:
    """The shared memory of each is larger than ten images of 1920x1080 in colour."""
    assert len(PROFILES) == 2
    for path in PROFILES:
        (size,) = ElementTree.parse(path).getroot().iter("{http://www.eprosima.com}segment_size")
        assert int(size.text) > 10 * np.prod((1920, 1080, 3))

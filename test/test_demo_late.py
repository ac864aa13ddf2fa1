"""The demo with masks once a second and late: what is measured, and the path over DDS."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from node_harness import next_domain

from picopose_ros.demo.__main__ import main
from picopose_ros.demo.evaluate import Detected, Recording, class_of, read_recording
from picopose_ros.demo.late import answered_part, measure_late
from picopose_ros.demo.world import SEGMENTATION_TOPIC, build_world
from picopose_ros.messages import bags

STEP = 100_000_000
NAMES = ("mug_0", "parcel_0", "parcel_1")
FRAMES = 13
"""1.2 s of the recording: the second segmentation that is played is of the eleventh image."""


@pytest.fixture
def recording() -> Recording:
    """Twenty images of three instances that stand side by side, every one answered rightly."""
    truth = {}
    for n in range(20):
        poses = {name: np.eye(4) for name in NAMES}
        for i, T in enumerate(poses.values()):
            T[:3, 3] = 0.2 * i, 0, 1
        truth[n * STEP] = poses
    answers = {
        stamp: [Detected(class_of(name), name, 1.0, T) for name, T in poses.items()]
        for stamp, poses in truth.items()
    }
    return Recording(truth, answers, {})


VISIBLE = [{name: 1.0 for name in NAMES}] * 20


def test_images_are_counted_from_when_the_first_masks_came(recording: Recording) -> None:
    """Of the seventeen from .3 s on a rate of 5 Hz allows every second one."""
    for stamp in recording.truth:
        if stamp // STEP % 2 or stamp > 1.2e9:
            del recording.detections[stamp]
    at = {stamp: 100.0 + 4 * stamp * 1e-9 for stamp in recording.detections}
    found = measure_late(recording, VISIBLE, [], at, 0.25, 5.0)
    assert (found.images, found.allowed, found.answered) == (17, 9, 5)
    assert found.share == pytest.approx(5 / 9)
    assert found.images_per_second == pytest.approx(1.25)
    assert found.longest_wait == pytest.approx(0.2)
    assert measure_late(recording, VISIBLE, [], at, 0.25, 10.0).allowed == 17
    assert found.as_dict()["share"] == found.share and "5 of 17 images answered, 0.56 of the 9" in str(found)

    empty = {stamp: [] for stamp in recording.truth}
    none = measure_late(replace(recording, detections=empty), VISIBLE, [], at, 1.0, 5.0)
    assert (none.answered, none.share, none.images_per_second) == (0, 0.0, 0.0)


def test_a_name_that_changes_and_comes_back_is_two_switches(recording: Recording) -> None:
    at = {stamp: stamp * 1e-9 for stamp in recording.truth}
    assert measure_late(recording, VISIBLE, [], at, 1.0, 10.0).switches == 0
    found = recording.detections[10 * STEP]
    recording.detections[10 * STEP] = [replace(d, name="x") if d.name == "mug_0" else d for d in found]
    assert measure_late(recording, VISIBLE, [], at, 1.0, 10.0).switches == 2


def test_transforms_back_in_time_are_counted_per_frame(recording: Recording) -> None:
    at = {stamp: stamp * 1e-9 for stamp in recording.truth}
    came = [(1, ["a", "b"]), (3, ["a"]), (2, ["b"]), (2, ["a", "b"]), (3, ["a"])]
    assert measure_late(recording, VISIBLE, came, at, 1.0, 10.0).went_back == 1


def test_the_table_is_of_the_images_that_were_answered(recording: Recording) -> None:
    recording.detections[3 * STEP] = []
    del recording.detections[5 * STEP]
    shares = [{**VISIBLE[0], "mug_0": n / 100} for n in range(20)]
    part, visible = answered_part(recording, shares)
    assert set(recording.truth) - set(part.truth) == {3 * STEP, 5 * STEP}
    assert [round(100 * one["mug_0"]) for one in visible] == [n for n in range(20) if n not in (3, 5)]


@pytest.mark.parametrize("option", ["--speed", "--follow-rate"])
def test_a_speed_of_nothing_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--masks", "late", option, "0"])
    assert "must be more than 0" in capsys.readouterr().err


def test_images_whose_masks_never_come_are_answered_over_dds(tmp_path: Path) -> None:
    """Two segmentations are played; images whose masks weren't are answered all the same, in order."""
    files = build_world(tmp_path, FRAMES)
    options = ["--out", tmp_path, "--frames", FRAMES, "--hypotheses", 2, "--viewpoints", 42]
    options += ["--domain", next_domain(), "--masks", "late", "--speed", 0.05, "--follow-rate", 20]
    command = [sys.executable, "-m", "picopose_ros.demo", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    late, heard = report["late"], read_recording(tmp_path / "output")
    with bags.BagReader(files.bag) as reader:
        stamps = [bags.stamp_of(message) for _, _, message in reader.messages([SEGMENTATION_TOPIC])]
    answered = [stamp for stamp in stamps[3:] if heard.detections.get(stamp)]
    assert (late["images"], late["allowed"], late["answered"]) == (FRAMES - 3, FRAMES - 3, len(answered))
    assert set(answered) - {stamps[0], stamps[10]}, "none but images with masks were answered"
    assert "poses" in done.stdout and "are right to .1, .05 and .02" in done.stdout
    assert late["went_back"] == 0 and "0 transforms back in time" in done.stdout
    assert max(row["instances"] for row in report["objects"]) <= 7 * (len(answered) + 1)

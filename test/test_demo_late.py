"""What is measured of the demo with masks once a second and late; test_demo.py has the path over DDS."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from picopose_ros.demo.__main__ import main
from picopose_ros.demo.evaluate import Detected, Recording, class_of
from picopose_ros.demo.late import answered_part, measure_late

STEP = 100_000_000
NAMES = ("mug_0", "parcel_0", "parcel_1")


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

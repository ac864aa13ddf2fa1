"""The node's ROS-free parts: pairing by stamp, the newest-wins worker, counted drops, instance names."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from picopose_ros.instances import InstanceNamer
from picopose_ros.node.drops import DropLog, DropReason
from picopose_ros.node.pairing import INFO_PATIENCE, MAX_PENDING, StampPairing, format_stamp
from picopose_ros.node.worker import NewestWorker

FRAME = 33_333_333  # ns between images at 30 Hz


class Reports(list):
    """Collects what a pairing reports."""

    def __call__(self, reason: DropReason, message: str) -> None:
        self.append((reason, message))

    @property
    def reasons(self) -> list[DropReason]:
        return [reason for reason, _ in self]


@pytest.fixture
def reports() -> Reports:
    return Reports()


def stream(pairing: StampPairing, count: int, start: float = 0.0) -> None:
    """``count`` images with camera_info at 30 Hz; image i: stamp i * FRAME, arrives at start + i / 30."""
    for i in range(count):
        pairing.add_image(i * FRAME, f"image {i}", start + i / 30)
        pairing.add_camera_info(i * FRAME, f"info {i}", start + i / 30)


def test_late_segmentation_finds_its_own_image(reports: Reports) -> None:
    pairing = StampPairing(5.0, 150, reports)
    stream(pairing, 60)
    (pair,) = pairing.add_segmentation(17 * FRAME, "masks 17", 2.0)
    assert (pair.image, pair.camera_info, pair.segmentation) == ("image 17", "info 17", "masks 17")
    assert pair.received == 2.0
    assert reports == []
    assert (pairing.counts.images, pairing.counts.segmentations, pairing.counts.pairs) == (60, 1, 1)


def test_a_stamp_one_nanosecond_off_is_another_image(reports: Reports) -> None:
    pairing = StampPairing(5.0, 150, reports)
    stream(pairing, 10)
    assert pairing.add_segmentation(5 * FRAME + 1, "masks", 0.5) == []
    pairing.expire(3.0)
    assert reports.reasons == [DropReason.NO_IMAGE]
    assert "0.000 ms away" in reports[0][1]


def test_segmentation_may_come_before_its_image_and_camera_info(reports: Reports) -> None:
    pairing = StampPairing(5.0, 150, reports)
    assert pairing.add_segmentation(FRAME, "masks", 0.0) == []
    assert pairing.add_image(FRAME, "image", 0.1) == []
    (pair,) = pairing.add_camera_info(FRAME, "info", 0.2)
    assert (pair.image, pair.camera_info, pair.segmentation) == ("image", "info", "masks")
    pairing.expire(10.0)
    assert reports == []


def test_camera_info_of_the_image_is_waited_for_and_the_newest_is_good_enough(reports: Reports) -> None:
    pairing = StampPairing(5.0, 150, reports)
    pairing.add_image(1, "image 1", 0.0)
    pairing.add_camera_info(1, "info 1", 0.0)
    assert pairing.add_segmentation(1, "masks", 0.0)[0].camera_info == "info 1"
    # Of the next two the images and masks come first: another frame's camera_info may be a wrong one.
    for stamp in (2, 3):
        pairing.add_image(stamp, f"image {stamp}", 0.1)
        assert pairing.add_segmentation(stamp, "masks", 0.1) == []
    assert pairing.add_camera_info(3, "info 3", 0.15)[0].camera_info == "info 3"
    assert pairing.expire(0.1 + INFO_PATIENCE - 0.01) == []
    assert pairing.expire(0.1 + INFO_PATIENCE + 0.01)[0].camera_info == "info 3"
    assert reports == []


def test_a_latched_camera_info_of_another_stamp_costs_no_time(reports: Reports) -> None:
    pairing = StampPairing(5.0, 150, reports)
    pairing.add_camera_info(0, "latched", 0.0)
    pairing.add_image(7, "image", 0.1)
    assert pairing.add_segmentation(7, "masks", 0.1)[0].camera_info == "latched"


def test_image_that_left_the_buffer_is_told_from_one_that_never_came(reports: Reports) -> None:
    pairing = StampPairing(1.0, 150, reports)
    stream(pairing, 90)
    assert len(pairing) <= 31
    assert pairing.add_segmentation(3 * FRAME, "masks", 3.0) == []
    assert reports.reasons == [DropReason.IMAGE_LEFT_BUFFER]
    pairing.add_segmentation(4 * FRAME + 7, "masks", 3.0)
    pairing.expire(4.5)
    assert reports.reasons == [DropReason.IMAGE_LEFT_BUFFER, DropReason.NO_IMAGE]


def test_capacity_bounds_the_buffer_whatever_the_age(reports: Reports) -> None:
    pairing = StampPairing(1000.0, 8, reports)
    stream(pairing, 100)
    assert len(pairing) == 8
    assert pairing.add_segmentation(99 * FRAME, "masks", 4.0)[0].image == "image 99"
    pairing.add_segmentation(91 * FRAME, "masks", 4.0)
    assert reports.reasons == [DropReason.IMAGE_LEFT_BUFFER]


def test_missing_camera_info_is_named(reports: Reports) -> None:
    pairing = StampPairing(5.0, 150, reports, patience=1.0)
    pairing.add_image(1, "image", 0.0)
    pairing.add_segmentation(1, "masks", 0.1)
    pairing.expire(1.05)
    assert reports == []
    pairing.expire(1.15)
    assert reports.reasons == [DropReason.NO_CAMERA_INFO]


def test_segmentations_without_any_image_do_not_pile_up(reports: Reports) -> None:
    pairing = StampPairing(5.0, 150, reports)
    for i in range(MAX_PENDING + 10):
        pairing.add_segmentation(i, "masks", 0.0)
    assert reports.reasons == [DropReason.NO_IMAGE] * 10
    pairing.expire(100.0)
    assert len(reports) == MAX_PENDING + 10


def test_a_bag_that_loops_pairs_again(reports: Reports) -> None:
    pairing = StampPairing(1.0, 150, reports)
    stream(pairing, 90)
    stream(pairing, 30, start=10.0)  # the same stamps again, later
    (pair,) = pairing.add_segmentation(5 * FRAME, "masks", 11.0)
    assert pair.image == "image 5"
    assert reports == []


def test_silent_camera_leaves_no_stale_images(reports: Reports) -> None:
    pairing = StampPairing(1.0, 150, reports)
    stream(pairing, 30)
    pairing.expire(60.0)
    assert len(pairing) == 0


def test_stamps_print_like_ros() -> None:
    assert format_stamp(12_000_000_034) == "12.000000034"


# The worker.


def test_worker_handles_the_newest_and_hands_back_what_it_replaced() -> None:
    started, go_on, finished = threading.Event(), threading.Event(), threading.Event()
    handled: list[int] = []

    def handle(item: int) -> None:
        handled.append(item)
        started.set()
        go_on.wait(10)
        if item == 4:
            finished.set()

    worker: NewestWorker[int] = NewestWorker(lambda: None, handle, lambda error: None)
    worker.start()
    assert worker.submit(1) is None
    assert started.wait(10)
    assert [worker.submit(n) for n in (2, 3, 4)] == [None, 2, 3]
    go_on.set()
    assert finished.wait(10)
    assert worker.close(10)
    assert handled == [1, 4]


def test_worker_survives_what_an_item_raises() -> None:
    errors: list[Exception] = []
    done = threading.Event()

    def handle(item: str) -> None:
        if item == "bad":
            raise ValueError("broken")
        done.set()

    worker: NewestWorker[str] = NewestWorker(lambda: None, handle, errors.append)
    worker.start()
    worker.ready.wait(10)
    worker.submit("bad")
    while not errors and worker.alive:
        done.wait(0.01)
    worker.submit("good")
    assert done.wait(10)
    assert [str(error) for error in errors] == ["broken"]
    assert worker.close(10)


def test_worker_keeps_what_set_up_raised() -> None:
    def setup() -> None:
        raise RuntimeError("no weights")

    worker: NewestWorker[int] = NewestWorker(setup, lambda item: None, lambda error: None)
    worker.start()
    assert worker.close(10)
    assert str(worker.failure) == "no weights"
    assert not worker.ready.is_set()


# Counted drops.


def test_a_hundred_drops_make_one_line_and_a_count() -> None:
    now = [0.0]
    lines: list[str] = []
    log = DropLog(lines.append, interval=10.0, clock=lambda: now[0])
    for _ in range(100):
        log.record(DropReason.UNKNOWN_CLASS, "class 'fork' has no mesh")
        now[0] += 0.05
    log.record(DropReason.BUSY, "too fast")
    assert lines == ["[unknown_class] class 'fork' has no mesh", "[busy] too fast"]
    now[0] = 10.5
    log.record(DropReason.UNKNOWN_CLASS, "class 'spoon' has no mesh")
    assert lines[2] == "[unknown_class] class 'spoon' has no mesh (99 more like it since the last line)"
    now[0] = 12.0
    counts = log.snapshot()
    assert counts[DropReason.UNKNOWN_CLASS].count == 101
    assert counts[DropReason.UNKNOWN_CLASS].last_message == "class 'spoon' has no mesh"
    assert counts[DropReason.UNKNOWN_CLASS].age == pytest.approx(1.5)
    assert log.total() == 102


# Names.


def at(x: float) -> np.ndarray:
    return np.array([x, 0.0, 1.0])


def test_names_follow_positions_not_the_order_of_segments() -> None:
    namer = InstanceNamer()
    assert namer.assign(["cup", "cup", "box"], [at(0.0), at(0.5), at(0.1)]) == ["cup_0", "cup_1", "box_0"]
    assert namer.assign(["cup", "box", "cup"], [at(0.52), at(0.1), at(0.03)]) == ["cup_1", "box_0", "cup_0"]


def test_a_new_instance_takes_the_smallest_free_number() -> None:
    namer = InstanceNamer()
    namer.assign(["cup", "cup"], [at(0.0), at(0.5)])
    assert namer.assign(["cup"], [at(0.49)]) == ["cup_1"]
    assert namer.assign(["cup", "cup"], [at(0.9), at(0.5)]) == ["cup_0", "cup_1"]


def test_equal_distances_are_settled_the_same_way_every_time() -> None:
    for _ in range(3):
        namer = InstanceNamer()
        namer.assign(["cup", "cup"], [at(-1.0), at(1.0)])
        assert namer.assign(["cup", "cup"], [at(0.0), at(0.0)]) == ["cup_0", "cup_1"]

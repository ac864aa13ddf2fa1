"""The node's ROS-free parts: pairing by stamp, the newest-wins worker, counted drops."""

from __future__ import annotations

import threading

import pytest

from picopose_ros.messages.reasons import DropReason
from picopose_ros.node.drops import DropLog
from picopose_ros.node.pairing import (
    INFO_PATIENCE,
    JUMP_BACK,
    MAX_HALVES,
    MAX_PENDING,
    HalfJoin,
    Pair,
    StampPairing,
    format_stamp,
)
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
    assert (pair.received, pair.made) == (0.0, 0.2)
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


def test_a_bag_that_loops_is_noticed_once_and_pairs_again(reports: Reports) -> None:
    jumps: list[str] = []
    pairing = StampPairing(5.0, 150, reports, on_jump=jumps.append)
    stream(pairing, 90)
    (old,) = pairing.add_segmentation(80 * FRAME, "masks", 3.0)
    pairing.add_segmentation(89 * FRAME + 1, "masks", 3.0)
    stream(pairing, 30, start=3.01)  # the same stamps again, at once
    assert len(pairing) == 30
    assert reports.reasons == [DropReason.CLEARED]
    (message,) = jumps
    assert "from 2.966666637 to 0.000000000" in message and "90 images" in message
    (pair,) = pairing.add_segmentation(5 * FRAME, "masks", 4.1)
    assert pair.image == "image 5"
    assert pairing.expire(10.0) == []
    assert len(reports) == 1
    assert (old.epoch, pair.epoch) == (0, 1)
    assert pair.order > old.order


def test_images_in_a_wrong_order_are_no_jump(reports: Reports) -> None:
    pairing = StampPairing(5.0, 150, reports, on_jump=pytest.fail)
    for stamp in (5 * JUMP_BACK, 4 * JUMP_BACK, 5 * JUMP_BACK + 1, 9 * JUMP_BACK, 8 * JUMP_BACK):
        pairing.add_image(stamp, "image", 0.0)
    assert len(pairing) == 5


def test_what_overtook_the_first_image_after_a_jump_is_kept(reports: Reports) -> None:
    pairing = StampPairing(5.0, 150, reports)
    stream(pairing, 90)
    pairing.add_camera_info(3 * FRAME + 1, "info", 3.2)
    pairing.add_segmentation(3 * FRAME + 1, "masks", 3.2)
    (pair,) = pairing.add_image(3 * FRAME + 1, "image", 3.21)
    assert (pair.image, pair.camera_info, pair.epoch) == ("image", "info", 1)
    assert reports == []


def test_a_latched_camera_info_survives_a_jump(reports: Reports) -> None:
    pairing = StampPairing(5.0, 150, reports)
    pairing.add_camera_info(0, "latched", 0.0)
    for stamp in (1000 * FRAME, 7):
        pairing.add_image(stamp, f"image {stamp}", 1.0)
    assert pairing.epoch == 1
    assert pairing.add_segmentation(7, "masks", 1.1)[0].camera_info == "latched"


def test_a_camera_that_stalls_for_a_minute_comes_back(reports: Reports) -> None:
    pairing = StampPairing(5.0, 150, reports, on_jump=pytest.fail)
    stream(pairing, 60)
    for second in range(2, 62):
        pairing.expire(float(second))
    for i in range(60 * 30, 61 * 30):  # and all it had to say comes at once
        pairing.add_image(i * FRAME, f"image {i}", 62.0)
        pairing.add_camera_info(i * FRAME, f"info {i}", 62.0)
    (pair,) = pairing.add_segmentation(1829 * FRAME, "masks", 62.1)
    assert (pair.image, pair.camera_info) == ("image 1829", "info 1829")
    assert reports == []


@pytest.mark.parametrize(("images", "segmentations"), [(30, 10), (10, 30), (60, 20)])
def test_every_segmentation_at_any_rate_is_paired_or_counted(
    images: int, segmentations: int, reports: Reports
) -> None:
    pairing = StampPairing(5.0, 150, reports)
    pairs = []
    for tick in range(420 * 3):  # of both rates' common multiple
        now, stamp = tick / 420, round(tick * 1e9 / 420)
        if tick % (420 // images) == 0:
            pairing.add_image(stamp, tick, now)
            pairing.add_camera_info(stamp, tick, now)
        if tick % (420 // segmentations) == 0:
            pairs += pairing.add_segmentation(stamp, tick, now)
    pairs += pairing.expire(10.0)
    assert all(pair.image == pair.segmentation == pair.camera_info for pair in pairs)
    assert pairing.counts.segmentations == len(pairs) + len(reports)
    assert len(pairs) == 3 * min(images, segmentations)
    assert set(reports.reasons) <= {DropReason.NO_IMAGE}


def test_clearing_counts_what_waited(reports: Reports) -> None:
    pairing = StampPairing(5.0, 150, reports)
    stream(pairing, 10)
    pairing.add_segmentation(3, "masks", 0.3)
    pairing.clear("the node was deactivated")
    assert len(pairing) == 0
    assert reports.reasons == [DropReason.CLEARED]
    assert "the node was deactivated" in reports[0][1]
    pairing.add_image(0, "image", 1.0)
    assert pairing.epoch == 0


# Segmentations in two halves.


def test_halves_are_joined_in_their_order_whichever_comes_first(reports: Reports) -> None:
    join = HalfJoin(("/boxes", "/labels"), reports)
    assert join.add(0, 1, "boxes 1", 0.0) is None
    assert join.add(1, 2, "labels 2", 0.0) is None
    assert join.add(1, 1, "labels 1", 0.1) == ("boxes 1", "labels 1")
    assert join.add(0, 2, "boxes 2", 0.1) == ("boxes 2", "labels 2")
    join.expire(10.0)
    assert reports == []


def test_a_half_that_stays_alone_is_reported_and_does_not_pile_up(reports: Reports) -> None:
    join = HalfJoin(("/boxes", "/labels"), reports)
    for stamp in range(MAX_HALVES + 2):
        join.add(0, stamp, "boxes", 0.0)
    assert reports.reasons == [DropReason.INCOMPLETE_SEGMENTATION] * 2
    assert "/boxes has a message with stamp 0.000000000, but /labels has none" in reports[0][1]
    join.expire(0.5)
    assert len(reports) == 2
    join.expire(1.5)
    assert len(reports) == MAX_HALVES + 2
    join.add(1, 5, "labels", 2.0)
    join.clear()
    assert "/labels has a message" in reports[-1][1]


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


def test_worker_keeps_the_newer_of_two_that_wait_whichever_came_later() -> None:
    """A pair that waited in vain for its camera_info comes after newer ones, and must not push them out."""
    seen = ((9, 0), (5, 0), (1, 1))
    pairs = [Pair(stamp, "image", "info", "masks", 0.0, 0.0, epoch) for stamp, epoch in seen]
    worker: NewestWorker[Pair] = NewestWorker(
        lambda: None, lambda pair: None, lambda error: None, order=lambda pair: pair.order
    )  # never started: nothing takes the item away
    newer, older, after_jump = pairs
    assert worker.submit(newer) is None
    assert worker.submit(older) is older
    assert worker.submit(after_jump) is newer
    assert worker.submit(newer) is newer


class SlowWorker:
    """A worker whose items end only when they are told to."""

    def __init__(self) -> None:
        self.started, self.go_on = threading.Event(), threading.Event()
        self.done: list[str] = []
        self.worker: NewestWorker[str] = NewestWorker(lambda: None, self._handle, lambda error: None)
        self.worker.start()

    def _handle(self, item: str) -> None:
        self.started.set()
        self.go_on.wait(10)
        self.done.append(item)


def test_calls_and_items_take_turns() -> None:
    slow = SlowWorker()
    slow.worker.submit("first")
    assert slow.started.wait(10)
    futures = [slow.worker.call(lambda n=n: slow.done.append(f"call {n}")) for n in range(3)]
    slow.worker.submit("second")
    slow.go_on.set()
    for future in futures:
        future.result(10)
    assert slow.worker.close(10)
    assert slow.done == ["first", "call 0", "second", "call 1", "call 2"]


def test_a_call_gives_its_result_or_what_it_raised() -> None:
    slow = SlowWorker()

    def fail() -> None:
        raise ValueError("no")

    assert slow.worker.call(lambda: threading.current_thread().name).result(10) == "picopose_worker"
    with pytest.raises(ValueError, match="no"):
        slow.worker.call(fail).result(10)
    assert slow.worker.close(10)
    assert slow.worker.call(fail).cancelled()


def test_draining_waits_for_the_item_in_hand_and_drops_the_one_behind() -> None:
    slow = SlowWorker()
    slow.worker.submit("first")
    assert slow.started.wait(10)
    slow.worker.submit("second")
    waiting = slow.worker.call(lambda: "still answered")
    assert slow.worker.drain(0.01) == ("second", False)
    slow.go_on.set()
    assert slow.worker.drain(10) == (None, True)
    assert slow.done == ["first"]
    assert waiting.result(10) == "still answered"
    assert slow.worker.close(10)


def test_closing_cancels_calls_that_wait_and_tears_down_on_the_thread() -> None:
    torn_down: list[str] = []
    started, go_on = threading.Event(), threading.Event()

    def handle(item: int) -> None:
        started.set()
        go_on.wait(10)

    worker: NewestWorker[int] = NewestWorker(
        lambda: None,
        handle,
        lambda error: None,
        teardown=lambda: torn_down.append(threading.current_thread().name),
    )
    worker.start()
    assert worker.settled.wait(10) and worker.ready.is_set()
    worker.submit(1)
    assert started.wait(10)
    call = worker.call(lambda: None)
    assert not worker.close(0.01)
    assert call.cancelled()
    go_on.set()
    assert worker.close(10)
    assert torn_down == ["picopose_worker"]


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
    assert worker.settled.wait(10)
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

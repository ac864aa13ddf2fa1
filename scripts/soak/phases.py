"""The parts of the soak: steady load, peers that die or stall, malformed messages, a killed node, latency."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from hypothesis import HealthCheck, Phase, given, seed, settings
from malformed import Case, cases
from node_harness import Client, NodeProcess
from peer import Peer
from report import Check
from world import View, stamped

PATIENCE = 180.0
"""Seconds that an answer, a start or the news in the diagnostics may take; never slept through."""

WARM_UP = 60.0
"""Seconds of load after which memory must not grow."""

GROWTH_BAR = 0.01
LATENCY_BAR_MS = 10.0
LAYER = ("receive", "pair", "queue", "decode", "publish")
"""What the ROS layer adds: executor, the wait for the image, hand-over, decoding; messages and their
publication."""

AHEAD_SECONDS = 0.1
"""A segmenter publishes when it has looked at the image, which the node has by then."""

PER_GOOD = 10
"""Malformed messages around one good frame."""


class SoakError(Exception):
    """The soak can't go on: the node is gone, or does not come up."""


@dataclass
class Soak:
    """What all phases share.

    Attributes:
        folder: for logs.
        recording: what the publisher sends.
        views: the same, for what is sent from here.
        node: under test.
        client: this process's place on the graph.
        checks: what was found so far.
    """

    folder: Path
    recording: Path
    views: list[View]
    node: NodeProcess
    client: Client
    image_rate: float
    segmentation_rate: float
    checks: list[Check] = field(default_factory=list)
    peers: list[Peer] = field(default_factory=list)
    _next_view: Iterator[View] | None = None

    def tell(
        self, what: str, found: str, bar: str = "", passed: bool | None = None, value: float | None = None
    ) -> None:
        """Note a finding and print it."""
        self.checks.append(Check(what, found, bar, passed, value))
        verdict = {None: "", True: "  ok", False: "  FAILED"}[passed]
        print(f"  {what}: {found}{f' (bar: {bar})' if bar else ''}{verdict}", flush=True)

    def view(self) -> View:
        """The next good frame."""
        if self._next_view is None:
            self._next_view = itertools.cycle(self.views)
        return next(self._next_view)

    def ask(self, ahead: float = 0.0) -> float | None:
        """Milliseconds from a good frame's segmentation to its answer, or None if it was not in time.

        Args:
            ahead: seconds that image and camera_info are sent before the segmentation.
        """
        view, stamp = self.view(), time.time_ns()
        self.client.image.publish(stamped(view.image, stamp))
        self.client.camera_info.publish(stamped(view.camera_info, stamp))
        time.sleep(ahead)
        started = time.monotonic()
        self.client.segmentation.publish(stamped(view.segmentation, stamp))
        if not self.client.wait(lambda: stamp in self.client.answers, PATIENCE):
            return None
        return 1e3 * (time.monotonic() - started)

    def publisher(self, log: str = "sent.log", segmentation_rate: float | None = None) -> Peer:
        """A camera with its segmenter."""
        rate = self.segmentation_rate if segmentation_rate is None else segmentation_rate
        path = self.folder / log
        options = ("--image-rate", self.image_rate, "--segmentation-rate", rate)
        self.peers.append(Peer(path, "publisher", self.recording, path, *options))
        return self.peers[-1]

    def listener(self, log: str = "heard.log") -> Peer:
        """A process that listens to the detections."""
        path = self.folder / log
        self.peers.append(Peer(path, "listener", path))
        return self.peers[-1]

    def close(self) -> int:
        """End everything that runs; returns the node's exit code."""
        for peer in self.peers:
            peer.kill()
        code = self.node.stop(PATIENCE)
        self.client.close()
        return code

    def start_node(self) -> float:
        """Start the node; returns the seconds until it was ready.

        Raises:
            SoakError: it ended, can't be configured, or took too long.
        """
        started = time.monotonic()
        self.client.forget_diagnostics()
        self.node.start()

        def refused() -> bool:
            return not self.node.alive or "stays unconfigured" in self.node.log

        if not self.client.wait(lambda: self.client.ready() or refused(), 10 * PATIENCE):
            raise SoakError(f"the node was not ready after {10 * PATIENCE:g} s; see {self.node.log_path}")
        if refused():
            what = "can't be configured" if self.node.alive else "ended"
            raise SoakError(f"the node {what}; see {self.node.log_path}")
        return time.monotonic() - started

    def memory_over(self, duration: float) -> list[tuple[float, int]]:
        """Wait for so many seconds; what the node's memory was meanwhile: seconds, bytes, one a second."""
        memory: list[tuple[float, int]] = []
        started = time.monotonic()
        while (now := time.monotonic() - started) < duration:
            if not self.node.alive:
                raise SoakError(f"the node ended under load; see {self.node.log_path}")
            memory.append((now, self.node.resident_bytes()))
            self.client.wait(lambda: False, min(1.0, max(duration - now, 0.05)))
        return memory

    def news(self) -> None:
        """Wait for diagnostics that were sent from now on."""
        self.client.forget_diagnostics()
        if not self.client.wait(lambda: self.client.values, PATIENCE):
            raise SoakError(f"no diagnostics came in {PATIENCE:g} s; see {self.node.log_path}")


def load(soak: Soak, duration: float) -> None:
    """Images and segmentations at a steady rate: memory, and what becomes of every segmentation."""
    soak.news()
    client = soak.client
    before_dropped, before_answered = sum(client.dropped().values()), len(client.answers)
    publisher = soak.publisher()
    if not client.wait(lambda: publisher.new_stamps, PATIENCE):
        raise SoakError("the publisher sent nothing")
    memory = soak.memory_over(duration)
    soak.news()
    busy = {stage: client.latency(stage) for stage in LAYER}
    publisher.stop()
    sent = publisher.new_stamps

    def unaccounted() -> int:
        dropped = sum(client.dropped().values()) - before_dropped
        return len(sent) - (len(client.answers) - before_answered) - dropped

    client.wait(lambda: client.values and unaccounted() == 0, PATIENCE)
    dropped = sum(client.dropped().values()) - before_dropped
    answered = sum(stamp in client.answers for stamp in sent)
    seconds = (sent[-1] - sent[0]) / 1e9 if len(sent) > 1 else duration
    image = soak.views[0].image
    soak.tell("load", f"{soak.image_rate:g} Hz images of {image.width}x{image.height} for {seconds:.0f} s")
    rates = f"{len(sent) / seconds:.1f} Hz sent, {answered / seconds:.2f} Hz answered"
    soak.tell("segmentations of four segments", rates)
    soak.tell(
        "segmentations answered + counted of those sent",
        f"{answered} + {dropped} of {len(sent)}",
        "all",
        answered + dropped == len(sent),
    )
    soak.tell("answered twice", str(sum(n > 1 for n in client.answers.values())), "0", _once(client))
    memory_checks(soak, memory)
    waits = ", ".join(f"{stage} {value:.1f}" for stage, value in busy.items() if value is not None)
    soak.tell("median ms under load, waiting for the busy estimator included", waits)


def _once(client: Client) -> bool:
    return all(count == 1 for count in client.answers.values())


def memory_checks(soak: Soak, memory: list[tuple[float, int]]) -> None:
    """Growth after the warm-up: medians of equal windows there and at the end; all goes into ``memory.csv``.

    In a run of minutes a window is longer than the 30 s between two times the node gives memory back, so that
    the median does not depend on where in between it falls.
    """
    lines = ["seconds,bytes", *(f"{moment:.1f},{size}" for moment, size in memory)]
    (soak.folder / "memory.csv").write_text("\n".join(lines) + "\n")
    last = memory[-1][0]
    peak = f"{max(size for _, size in memory) / 2**20:.0f} MiB"
    if last < WARM_UP + 60:
        soak.tell("resident memory", f"{peak}; too short a run to say whether it grows")
        return
    window = min(120.0, (last - WARM_UP) / 2)
    early = median(size for moment, size in memory if WARM_UP <= moment < WARM_UP + window)
    late = median(size for moment, size in memory if moment > last - window)
    growth = late / early - 1
    soak.tell(
        "resident memory after the first minute and at the end",
        f"{early / 2**20:.1f} and {late / 2**20:.1f} MiB",
    )
    soak.tell(
        "growth after the first minute",
        f"{100 * growth:+.2f} %",
        f"< {100 * GROWTH_BAR:g} %",
        growth < GROWTH_BAR,
    )


def publisher_dies(soak: Soak) -> None:
    """The camera and its segmenter are killed and come again."""
    client = soak.client

    def answers(publisher: Peer) -> int:
        return sum(stamp in client.answers for stamp in publisher.new_stamps)

    first = soak.publisher("killed.log")
    alive = client.wait(lambda: answers(first) >= 2, PATIENCE)
    first.kill()
    second = soak.publisher("killed.log")
    again = client.wait(lambda: answers(second) >= 2, PATIENCE)
    second.stop()
    soak.tell(
        "kill -9 of the publisher, another one starts",
        _answered(alive and again),
        "answered",
        alive and again,
    )


def listener_dies(soak: Soak) -> None:
    """Somebody who listens to the detections is killed and comes again."""

    def heard(listener: Peer) -> bool:
        end = time.monotonic() + PATIENCE
        while not listener.new_stamps and time.monotonic() < end:
            soak.ask()
        return bool(listener.new_stamps)

    first = soak.listener()
    alive = heard(first)
    first.kill()
    between = soak.ask() is not None
    second = soak.listener()
    again = heard(second)
    second.stop()
    fine = alive and between and again
    soak.tell("kill -9 of a subscriber, another one starts", _answered(fine), "answered", fine)


def reader_stalls(soak: Soak, asks: int) -> None:
    """A reliable subscriber that stops reading must hold up nobody else."""
    listener = soak.listener("stalled.log")
    end = time.monotonic() + PATIENCE
    while not listener.new_stamps and time.monotonic() < end:
        soak.ask()
    before = [soak.ask() for _ in range(asks)]
    listener.freeze()
    during = [soak.ask() for _ in range(asks)]
    listener.thaw()
    seen = len(listener.new_stamps)
    end = time.monotonic() + PATIENCE
    while len(listener.new_stamps) <= seen and time.monotonic() < end:
        soak.ask()
    listener.stop()
    fine = None not in during and len(listener.new_stamps) > seen
    times = f", median {median(before):.0f} ms before, {median(during):.0f} ms meanwhile" if fine else ""
    soak.tell(
        "a subscriber stops reading: frames answered meanwhile",
        f"{sum(t is not None for t in during)} of {asks}{times}",
        "all, and it reads on after",
        fine,
    )


def malformed(soak: Soak, count: int, number: int) -> None:
    """Malformed messages around good frames, every one of which must be answered.

    Args:
        soak: see there.
        count: malformed messages.
        number: seed of hypothesis and of the order.
    """
    rng = random.Random(number)
    waiting: list[Case] = []
    kinds: Counter[str] = Counter()
    good = answered = 0

    def around_a_good_frame() -> None:
        nonlocal good, answered
        view, batch = soak.view(), list(waiting)
        waiting.clear()
        stamp = time.time_ns()
        # The malformed are older than the good one, which is the newest and so the one to be answered.
        places = sorted(rng.randrange(3) for _ in batch)
        frames = [case.messages(view, stamp - 1000 * (len(batch) - i)) for i, case in enumerate(batch)]
        good_messages = [(topic, getattr(view, topic)) for topic in soak.client.publishers]
        for place, (topic, message) in enumerate(good_messages):
            for where, messages in zip(places, frames):
                if where == place:
                    for name, spoilt in messages:
                        soak.client.publishers[name].publish(spoilt)
            soak.client.publishers[topic].publish(stamped(message, stamp))
        good += 1
        answered += bool(soak.client.wait(lambda: stamp in soak.client.answers, PATIENCE))
        if not soak.node.alive:
            raise SoakError(f"the node ended after {[case.kind for case in batch]}; see {soak.node.log_path}")

    @seed(number)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def send(case: Case) -> None:
        if sum(kinds.values()) >= count:
            return
        kinds[case.kind] += 1
        waiting.append(case)
        if len(waiting) >= PER_GOOD:
            around_a_good_frame()

    send()
    if waiting:
        around_a_good_frame()
    soak.tell(
        "malformed messages",
        f"{sum(kinds.values())} of {len(kinds)} kinds",
        str(count),
        sum(kinds.values()) == count,
    )
    soak.tell("good frames among them answered", f"{answered} of {good}", "all", answered == good)


def node_dies(soak: Soak) -> None:
    """The node is killed while images and segmentations come, and started again."""
    client, publisher = soak.client, soak.publisher("through.log")
    client.wait(lambda: publisher.new_stamps, PATIENCE)
    soak.node.kill()
    seconds, before = soak.start_node(), set(client.answers)
    fine = client.wait(lambda: set(publisher.new_stamps) & set(client.answers) - before, PATIENCE)
    publisher.stop()
    found = f"{_answered(fine)}, ready after {seconds:.1f} s"
    soak.tell("kill -9 of the node, started again", found, "answered", bool(fine))


def latency(soak: Soak, asks: int) -> None:
    """What the ROS layer adds where the estimator is free: one segmentation at a time, images at their rate.

    The node tells it over its last hundred segmentations, so this wants a fresh one.
    """
    publisher = soak.publisher("images.log", segmentation_rate=0.0)
    times = [soak.ask(AHEAD_SECONDS) for _ in range(asks)]
    soak.news()
    publisher.stop()
    client = soak.client
    stages = {stage: client.latency(stage) for stage in LAYER}
    if None in stages.values() or None in times:
        soak.tell(
            "latency added by the ROS layer", "not told by the diagnostics", f"< {LATENCY_BAR_MS:g} ms", False
        )
        return
    added = sum(stages.values())
    before, after = added - stages["publish"], stages["publish"]
    parts = ", ".join(f"{stage} {stages[stage]:.1f}" for stage in LAYER[:-1])
    start, end = f"{before:.1f} ms ({parts})", f"{after:.1f} ms"
    soak.tell("receipt of a segmentation to start of inference, median", start, value=before)
    soak.tell("end of inference to publication, median", end, value=after)
    soak.tell(
        "latency added by the ROS layer, median",
        f"{added:.1f} ms",
        f"< {LATENCY_BAR_MS:g} ms",
        added < LATENCY_BAR_MS,
        added,
    )
    soak.tell("segmentation sent to answer received, median", f"{median(times):.0f} ms over {asks} frames")


def exceptions(soak: Soak) -> None:
    """No exception came to the surface, in any node of the run."""
    internal = soak.client.count("dropped_internal_error")
    traces = soak.node.log.count("Traceback (most recent call last)")
    found = f"{traces} in the log, {internal} counted"
    soak.tell("exceptions", found, "0", traces == 0 and internal == 0)


def _answered(fine: bool) -> str:
    return "answered again" if fine else "not answered"

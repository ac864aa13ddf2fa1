"""Messages that no camera and no segmenter should send, drawn by hypothesis.

Each case is a frame of which one thing is wrong: a field, an array, the bytes on the wire. The other messages
of the frame are good, so that the node gets as far as the wrong one.
"""

from __future__ import annotations

import array
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from rclpy.serialization import serialize_message
from sensor_msgs.msg import RegionOfInterest
from world import View, stamped

Message = tuple[str, Any]
"""A topic, and what is published on it: a message, or the bytes of one."""


@dataclass(frozen=True)
class Case:
    """One malformed message.

    Attributes:
        kind: what is wrong.
        messages: the frame that it is part of, for a good frame and a stamp (ns), in order.
    """

    kind: str
    messages: Callable[[View, int], list[Message]]


_UINT32 = st.sampled_from([0, 1, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1)
_BYTE = st.integers(0, 255)
_ROI = st.builds(RegionOfInterest, x_offset=_UINT32, y_offset=_UINT32, height=_UINT32, width=_UINT32)
_FLOAT = st.floats() | st.sampled_from([0.0, float("nan"), float("inf"), -float("inf"), 1e300, 1e-300, -1.0])
_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)


def _frame(
    view: View,
    stamp: int,
    change: Callable[[View], None] = lambda view: None,
    leave_out: tuple[str, ...] = (),
) -> list[Message]:
    spoilt = copy.deepcopy(view)
    change(spoilt)
    named = (
        ("image", spoilt.image),
        ("camera_info", spoilt.camera_info),
        ("segmentation", spoilt.segmentation),
    )
    return [(name, stamped(message, stamp)) for name, message in named if name not in leave_out]


def _case(kind: str, change: Callable[[View], None]) -> Case:
    return Case(kind, lambda view, stamp: _frame(view, stamp, change))


def _set(of: str, **fields: Any) -> Callable[[View], None]:
    def change(view: View) -> None:
        for name, value in fields.items():
            setattr(getattr(view, of), name, value)

    return change


# Images.

_ENCODINGS = ["", "rgb16", "bgra16", "32FC1", "8UC3", "yuv422_yuy2", "bayer_rggb16", "nv12", "RGB8", "rgb8 "]


@st.composite
def _image(draw: st.DrawFn) -> Case:
    kind = draw(
        st.sampled_from(["encoding", "height", "width", "step", "short data", "long data", "frame_id"])
    )
    if kind == "encoding":
        return _case("image encoding", _set("image", encoding=draw(st.sampled_from(_ENCODINGS) | _TEXT)))
    if kind == "frame_id":
        name = draw(st.sampled_from(["", "/camera", "a b"]) | _TEXT)
        return _case("image frame_id", lambda view: setattr(view.image.header, "frame_id", name))
    if kind in ("height", "width", "step"):
        return _case(f"image {kind}", _set("image", **{kind: draw(_UINT32)}))
    share = draw(st.floats(0, 0.999))
    extra = draw(st.binary(max_size=100))

    def change(view: View) -> None:
        data = view.image.data
        view.image.data = (
            data[: int(share * len(data))] if kind == "short data" else data + array.array("B", extra)
        )

    return _case(f"image with {kind}", change)


# camera_infos.

_MODELS = ["", "plumb_bob", "rational_polynomial", "equidistant", "kannala_brandt", "PLUMB_BOB"]


@st.composite
def _camera_info(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(["k", "some of k", "d", "p", "size", "binning", "roi"]))
    if kind == "k":
        return _case("camera_info K", _set("camera_info", k=draw(st.lists(_FLOAT, min_size=9, max_size=9))))
    if kind == "some of k":
        changes = draw(st.dictionaries(st.integers(0, 8), _FLOAT, min_size=1, max_size=3))

        def change(view: View) -> None:
            for index, value in changes.items():
                view.camera_info.k[index] = value

        return _case("camera_info K", change)
    if kind == "d":
        lens = draw(st.lists(_FLOAT, max_size=20))
        model = draw(st.sampled_from(_MODELS) | _TEXT)
        return _case("camera_info distortion", _set("camera_info", d=lens, distortion_model=model))
    if kind == "p":
        return _case("camera_info P", _set("camera_info", p=draw(st.lists(_FLOAT, min_size=12, max_size=12))))
    if kind == "size":
        size = {"height": draw(_UINT32), "width": draw(_UINT32)}
        return _case("camera_info size", _set("camera_info", **size))
    if kind == "binning":
        bins = {"binning_x": draw(_UINT32), "binning_y": draw(_UINT32)}
        return _case("camera_info binning", _set("camera_info", **bins))
    return _case("camera_info roi", _set("camera_info", roi=draw(_ROI)))


# Segmentations.

_SEGMENT_FIELDS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "class": {"class_id": _TEXT},
    "score": {"score": st.floats(width=32) | st.just(float("nan"))},
    "roi": {"roi": _ROI},
    "encoding": {"encoding": _BYTE},
    "rle": {"encoding": st.just(0), "rle": st.lists(_UINT32, max_size=60).map(lambda n: array.array("I", n))},
    "bitmap": {"encoding": st.just(1), "bitmap": st.binary(max_size=200).map(lambda b: array.array("B", b))},
}
"""What a spoilt segment gets instead, by kind."""


@st.composite
def _segmentation(draw: st.DrawFn) -> Case:
    kind = draw(
        st.sampled_from(
            ["size", "class", "score", "roi", "encoding", "rle", "bitmap", "nothing", "many empty"]
        )
    )
    if kind == "size":
        size = {"height": draw(_UINT32), "width": draw(_UINT32)}
        return _case("segmentation size", _set("segmentation", **size))
    if kind == "nothing":
        return _case("segmentation without segments", _set("segmentation", segments=[]))
    if kind == "many empty":
        count = draw(st.integers(1, 300))

        def empty(view: View) -> None:
            first = view.segmentation.segments[0]
            first.roi = RegionOfInterest()
            view.segmentation.segments = [first] * count

        return _case("segmentation with empty masks", empty)
    which = draw(st.sets(st.integers(0, 3), min_size=1))
    fields: dict[str, Any] = draw(st.fixed_dictionaries(_SEGMENT_FIELDS[kind]))

    def change(view: View) -> None:
        for index in which:
            for name, value in fields.items():
                setattr(view.segmentation.segments[index], name, value)

    return _case(f"segment {kind}", change)


# Frames that are no frames.


@st.composite
def _incomplete(draw: st.DrawFn) -> Case:
    missing = draw(st.sampled_from(["image", "camera_info"]))
    return Case(f"no {missing}", lambda view, stamp: _frame(view, stamp, leave_out=(missing,)))


@st.composite
def _wrong_stamp(draw: st.DrawFn) -> Case:
    """A segmentation or camera_info of a time that never was."""
    name = draw(st.sampled_from(["segmentation", "camera_info"]))
    seconds, nanoseconds = draw(st.integers(-(2**31), 2**31 - 1)), draw(_UINT32)

    def messages(view: View, stamp: int) -> list[Message]:
        message = copy.deepcopy(getattr(view, name))
        message.header.stamp.sec, message.header.stamp.nanosec = seconds, nanoseconds
        return [(name, message)]

    return Case(f"{name} of another time", messages)


@st.composite
def _bytes(draw: st.DrawFn) -> Case:
    """What a sender with other message definitions puts on the wire: cut, or bytes that mean nothing."""
    name = draw(st.sampled_from(["image", "camera_info", "segmentation"]))
    cut = draw(st.none() | st.integers(4, 120))
    noise = draw(st.binary(max_size=200))

    def messages(view: View, stamp: int) -> list[Message]:
        good = serialize_message(stamped(copy.deepcopy(getattr(view, name)), stamp))
        return [(name, good[: min(cut, len(good) - 1)] if cut is not None else good[:4] + noise)]

    return Case(f"{name} of broken bytes", messages)


def cases() -> st.SearchStrategy[Case]:
    """Anything malformed."""
    return st.one_of(
        _image(), _camera_info(), _segmentation(), _segmentation(), _incomplete(), _wrong_stamp(), _bytes()
    )

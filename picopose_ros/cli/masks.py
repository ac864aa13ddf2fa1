"""``picopose segments-from-masks MASK.png ...``: pictures of masks as segments, and the JSON that holds them.

A mask is a picture of the image's size: one object's mask (0 outside, another value on the object), or a
label image (a value for each instance).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from picopose_ros.arguments import CLASS_HELP, check_output
from picopose_ros.errors import ConfigError, SegmentError
from picopose_ros.segmentation import Segment, segments_from_label_image, segments_to_json

PICTURE_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".pgm", ".pbm", ".jpg", ".jpeg", ".webp", ".gif")


def is_picture(path: Path) -> bool:
    """Whether the name of a file is that of a picture."""
    return path.suffix.lower() in PICTURE_SUFFIXES


def read_labels(path: Path) -> np.ndarray:
    """The picture of a mask as labels (H, W) of integers, 0 outside of all objects.

    Palette pictures give their indices. An alpha channel that is not the same everywhere is the mask; other
    pictures must be grey.

    Raises:
        SegmentError: the file can't be read, is no picture, or a coloured one.
    """
    try:
        with Image.open(path) as picture:
            mode, pixels = picture.mode, np.asarray(picture)
    except FileNotFoundError as error:
        raise SegmentError(f"{path}: No such file or directory") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SegmentError(f"{path}: is no picture that can be read ({error})") from error
    if mode in ("RGBA", "LA", "PA"):
        alpha = pixels[..., -1]
        pixels = alpha if alpha.min() != alpha.max() else pixels[..., :-1]
    if pixels.ndim == 3:
        if (pixels != pixels[..., :1]).any():
            raise SegmentError(
                f"{path}: is coloured; a mask is a grey picture, 0 outside and another value on the object, "
                "and a label image has a number for each instance"
            )
        pixels = pixels[..., 0]
    if pixels.dtype.kind == "f":
        if not np.array_equal(pixels, np.rint(pixels)):
            raise SegmentError(f"{path}: holds fractions; a mask holds whole numbers")
        pixels = pixels.astype(np.int64)
    return pixels.astype(np.int64)


def segments_from_pictures(
    paths: Sequence[Path], classes: Sequence[str] | None, known: Sequence[str] | None = None
) -> tuple[list[Segment], list[str]]:
    """Pictures of masks -> segments with a score of 1.

    Args:
        paths: several masks, or one label image.
        classes: ``["mug", "box"]``, one per mask; or ``["1=mug", "2=box"]`` for the values of one label
            image. None: a mask is of the class that its file is named after, or of the only one known.
        known: class ids that there are, if that is known.

    Returns:
        The segments, and notes on what was left out.

    Raises:
        SegmentError: a picture can't be used, a class is missing or unknown, or a mask is empty.
    """
    labelled = [name for name in classes or () if "=" in name]
    if labelled:
        return _from_label_image(paths, classes or (), known)
    if classes and len(classes) != len(paths):
        raise SegmentError(
            f"--class is given {len(classes)} times for {len(paths)} masks: give one for each, in their order"
        )
    names = list(classes) if classes else [_class_of(path, known) for path in paths]
    _check_known(names, known)
    return [_from_mask(path, name) for path, name in zip(paths, names)], []


def _from_mask(path: Path, name: str) -> Segment:
    labels = read_labels(path)
    values = np.unique(labels)
    if len(values) > 2:
        listed = ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
        raise SegmentError(
            f"{path}: holds {len(values)} values ({listed}), a mask has two. For a label image say what "
            "each value is: --class 1=NAME --class 2=NAME. If its edges were smoothed or it was saved as "
            "JPEG, save it as PNG with 0 outside and 255 on the object"
        )
    if len(values) == 1:
        raise SegmentError(f"{path}: is {values[0]} everywhere: it shows no object")
    if values[0] != 0:
        raise SegmentError(f"{path}: holds {values[0]} and {values[1]}; a mask is 0 outside of the object")
    return Segment(name, 1.0, labels != 0)


def _from_label_image(
    paths: Sequence[Path], classes: Sequence[str], known: Sequence[str] | None
) -> tuple[list[Segment], list[str]]:
    if len(paths) != 1:
        raise SegmentError(f"--class VALUE=NAME is for one label image, but there are {len(paths)} pictures")
    meaning: dict[int, tuple[str, float]] = {}
    for text in classes:
        value, equals, name = text.partition("=")
        if not (equals and name and value.strip().isdigit()):
            raise SegmentError(
                f"--class {text}: write VALUE=NAME, like 1=mug, for every value of a label image"
            )
        if int(value) in meaning:
            raise SegmentError(f"--class {text}: value {int(value)} is given twice")
        meaning[int(value)] = (name, 1.0)
    _check_known([name for name, _ in meaning.values()], known)
    labels = read_labels(paths[0])
    present = [int(value) for value in np.unique(labels) if value]
    for value, (name, _) in meaning.items():
        if value and value not in present:
            listed = ", ".join(map(str, present[:12])) or "nothing but 0"
            raise SegmentError(f"{paths[0]}: has no pixel of value {value} ({name}); it holds {listed}")
    rest = [value for value in present if value not in meaning]
    notes = [f"{paths[0]}: no --class for the values {', '.join(map(str, rest))}: left out"] if rest else []
    return segments_from_label_image(labels, meaning), notes


def _class_of(path: Path, known: Sequence[str] | None) -> str:
    if known is None or path.stem in known:
        return path.stem
    if len(known) == 1:
        return known[0]
    raise SegmentError(f"{path}: of which object is it? Say it by --class NAME ({', '.join(sorted(known))})")


def _check_known(names: Sequence[str], known: Sequence[str] | None) -> None:
    for name in names:
        if known is not None and name not in known:
            raise SegmentError(
                f"--class {name}: there is no such object; there are {', '.join(sorted(known))}"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``picopose segments-from-masks``."""
    parser.add_argument("masks", metavar="MASK.png", type=Path, nargs="+", help="masks, or one label image")
    parser.add_argument("--class", dest="classes", metavar="NAME", action="append", help=CLASS_HELP)
    parser.add_argument("--out", metavar="SEG.json", type=Path, required=True, help="the file to write")


def run(args: argparse.Namespace) -> int:
    """Read the masks and write the JSON; returns 0.

    Raises:
        PicoPoseError: a mask can't be used, or the file can't be written.
    """
    check_output(args.out, "--out")
    segments, notes = segments_from_pictures(args.masks, args.classes)
    sizes = {segment.mask.shape for segment in segments}
    if len(sizes) > 1:
        listed = " and ".join(f"{width}x{height}" for height, width in sorted(sizes))
        raise SegmentError(f"the masks are of {listed} pixels: they belong to different images")
    for note in notes:
        print(note, file=sys.stderr)
    partial = args.out.with_name(f".{args.out.name}.{os.getpid()}.partial")
    try:
        segments_to_json(segments, partial)
        os.replace(partial, args.out)
    except OSError as error:
        raise ConfigError(f"--out: {args.out} can't be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    for segment in segments:
        height, width = segment.mask.shape
        print(f"{segment.class_id}  {int(segment.mask.sum())} pixels of {width}x{height}")
    return 0

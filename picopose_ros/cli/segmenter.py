"""``picopose segmenter IMAGE``: the masks of the objects of a mesh folder in one image. No ROS needed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from picopose_ros.arguments import add_backend_arguments, add_onboarding_arguments, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("image", metavar="IMAGE", type=Path, help="image file, as the camera took it")
    parser.add_argument(
        "--meshes", metavar="DIR", required=True, type=Path, help="folder with one mesh per object"
    )
    parser.add_argument(
        "--out",
        metavar="SEG.json",
        type=Path,
        help="write the masks, as `picopose estimate --segments` reads",
    )
    parser.add_argument(
        "--overlay", metavar="OUT.png", type=Path, help="write the image with the masks in it"
    )
    add_proposal_arguments(parser)
    add_onboarding_arguments(parser)
    add_backend_arguments(parser)


def add_proposal_arguments(parser: argparse.ArgumentParser) -> None:
    """Which proposals, and how they are judged."""
    from picopose_ros.segmentation.matching import MatchSettings
    from picopose_ros.segmentation.proposals import SOURCES

    defaults = MatchSettings()
    parser.add_argument(
        "--proposals",
        default="builtin",
        metavar="SOURCE",
        help=f"{', '.join(name for name in SOURCES if name != 'boxes')}, or module:function (builtin)",
    )
    parser.add_argument("--proposal-weights", metavar="FILE", type=Path, help="for sam, sam2 and fastsam")
    parser.add_argument("--proposal-model", metavar="NAME", default="", help="which of its networks that is")
    parser.add_argument(
        "--per-class",
        type=positive,
        default=defaults.per_class,
        help=f"at most so many instances of an object ({defaults.per_class})",
    )
    parser.add_argument(
        "--min-score",
        type=float,
        default=defaults.min_score,
        help=f"leave out segments below this score ({defaults.min_score:g})",
    )


def run(args: argparse.Namespace) -> int:
    """Segment and print; 1 if nothing was found."""
    from picopose_ros.cli.estimate import read_rgb
    from picopose_ros.estimation.settings import resolve_precision
    from picopose_ros.estimator import encode_by, torch_device
    from picopose_ros.model import load_model
    from picopose_ros.segmentation import segments_to_json
    from picopose_ros.segmentation.matching import MatchSettings
    from picopose_ros.segmentation.proposals import Picture, SourceOptions, proposal_source
    from picopose_ros.segmentation.segmenter import Segmenter
    from picopose_ros.templates.bank import onboard

    rgb = read_rgb(args.image)
    device = torch_device(args.device)
    options = SourceOptions(args.proposal_weights, args.proposal_model, str(device))
    propose = proposal_source(args.proposals, options)
    model = load_model(args.preset, args.weights, device)
    encode_by(model, device, args.backend, str(args.onnx_dir or ""))
    folder = args.meshes, model, args.viewpoints, args.unit, args.cache_dir
    banks = onboard(*folder, device, True, args.shading).banks
    settings = MatchSettings(min_score=args.min_score, per_class=args.per_class)
    search, dtype = args.proposals == "builtin", resolve_precision("auto", device)
    segmenter = Segmenter(model, banks, propose, search, settings, device, dtype)
    found = segmenter.segment(Picture(rgb))
    if found.problem:
        print(f"some proposals can't be used: {found.problem}", file=sys.stderr)
    width = max([len(segment.class_id) for segment in found.segments] + [len("object")])
    print(
        f"{'object':<{width}}  score  pixels  ({found.proposals} proposals, {found.timings['total']:.0f} ms)"
    )
    for segment in found.segments:
        print(f"{segment.class_id:<{width}}  {segment.score:5.2f}  {segment.mask.sum():6d}")
    if args.out:
        segments_to_json(found.segments, args.out)
    if args.overlay:
        _write_overlay(args.overlay, rgb, found.segments)
    return 0 if found.segments else 1


def _write_overlay(path: Path, rgb: object, segments: list) -> None:
    """Draw the masks' outlines and names and write the picture.

    Raises:
        ImageError: the file can't be written.
    """
    import cv2
    import numpy as np

    from picopose_ros.errors import ImageError
    from picopose_ros.instances.overlay import palette

    picture = np.ascontiguousarray(rgb[..., ::-1])
    classes = sorted({segment.class_id for segment in segments})
    for segment in segments:
        colour = tuple(int(v) for v in palette(classes.index(segment.class_id)))[::-1]
        outlines, _ = cv2.findContours(
            segment.mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
        )
        cv2.drawContours(picture, outlines, -1, colour, 2)
        y, x = np.argwhere(segment.mask)[0]
        text = f"{segment.class_id} {segment.score:.2f}"
        cv2.putText(picture, text, (int(x), max(int(y) - 4, 12)), cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, 1)
    try:
        written = cv2.imwrite(str(path), picture)
    except cv2.error as error:
        raise ImageError(f"{path}: is no image file name that OpenCV can write") from error
    if not written:
        raise ImageError(f"{path}: could not be written; does its folder exist?")

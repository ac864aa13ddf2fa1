"""``picopose eval tables``: the tables of the PicoPose paper, for a BOP dataset.

Table I (one and five hypotheses), IV (the poses and end points of the three stages), VI (what stage 3 starts
from), VII (how many of its blocks) and VIII (how many templates), with the paper's values.
One pass over the images: the estimator is traced, and the other variants are computed from the trace where
they can be. Every variant is scored as ``picopose eval score`` scores a csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from picopose_ros.errors import DatasetError
from picopose_ros.evaluation.bop.comparison import markdown
from picopose_ros.evaluation.bop.errors import Implementation
from picopose_ros.evaluation.bop.journal import ImageRecord, Journal
from picopose_ros.evaluation.bop.results import BopRow, parse_row, write_results
from picopose_ros.evaluation.bop.setup import BopRun, add_estimation_arguments
from picopose_ros.evaluation.bop.variants import EPE_STAGES, Variants, answer
from picopose_ros.evaluation.report import plain, write_atomically
from picopose_ros.evaluation.score import IMPLEMENTATIONS, Scorer, implementation
from picopose_ros.progress import progress_bar
from picopose_ros.segmentation import Problems
from picopose_ros.templates.renderer import MeshRenderer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_estimation_arguments(parser)
    parser.add_argument(
        "--implementation",
        choices=IMPLEMENTATIONS,
        default="auto",
        help="of the scores: the BOP toolkit where it is installed (auto), or our own",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the tables, a csv of each variant, and what is done so far",
    )


def run(args: argparse.Namespace) -> int:
    """Measure what isn't measured yet and write the tables; 1 if an image could not be used.

    Raises:
        PicoPoseError: input that can't be used, or a folder with another run.
    """
    chosen = implementation(args.implementation)
    bop = BopRun.prepare(args)
    images = bop.images
    journal = Journal(args.out, bop.about)
    try:
        with MeshRenderer() as renderer:
            bop.complete(
                journal, images, lambda e: Variants(e, bop.dataset, bop.detections, renderer).measure
            )
        records = journal.read()
    finally:
        journal.close()
    failed = [key for key in images if records[key].failed]
    if len(failed) == len(images):
        reason = records[images[0]].problems[0][1]
        raise DatasetError(f"none of the {len(images)} images could be used: {reason}")
    report = _report(args, bop, [records[key] for key in images], chosen)
    write_atomically(args.out / "tables.json", report)
    text = markdown(report)
    write_atomically(args.out / "tables.md", text)
    print(text)
    problems = Problems([*bop.detections.problems.entries, *(e for k in images for e in records[k].problems)])
    for line in problems.lines():
        print(line, file=sys.stderr)
    return 1 if failed else 0


def _report(
    args: argparse.Namespace, bop: BopRun, records: Sequence[ImageRecord], chosen: Implementation
) -> dict[str, Any]:
    """Score every variant; the csv of each stays in the folder."""
    rows: dict[str, list[BopRow]] = {answer(1): [], answer(args.hypotheses): []}
    errors: dict[str, list[float]] = {name: [] for name in EPE_STAGES}
    for record in records:
        for name, lines in record.extra.get("rows", {}).items():
            where = f"journal, scene {record.scene_id} image {record.image_id}"
            rows.setdefault(name, []).extend(parse_row(line, where) for line in lines)
        for name, values in record.extra.get("epe", {}).items():
            errors[name] += values
    variants = {}
    with Scorer(bop.dataset, chosen) as scorer:
        for name, own in progress_bar(rows.items(), unit="variant"):
            variants[name] = scorer.score(own, bop.images)["overall"]
            file = name.replace(": ", "-").replace(" ", "_")
            write_results(args.out / f"{file}_{bop.dataset.name}-{bop.dataset.split_dir.name}.csv", own)
    epe = {
        name: {"segments": len(values), "mean": float(np.mean(values)), "median": float(np.median(values))}
        for name, values in errors.items()
        if values
    }
    counts = [name for name in rows if name.endswith((" block", " blocks"))]
    return plain(
        {
            "tables": {
                **bop.about,
                "images": len(records),
                "failed_images": [[r.scene_id, r.image_id] for r in records if r.failed],
                "blocks": len(counts) + 1,
                "implementation": chosen.name,
            },
            "variants": variants,
            "epe": epe,
        }
    )

"""The tables of ``picopose eval tables``, with the values of the PicoPose paper beside the measured ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from picopose_ros.evaluation.bop.variants import (
    TEMPLATE_COUNTS,
    answer,
    blocks,
    refined,
    stage,
    start,
    templates,
)
from picopose_ros.evaluation.metrics import ADD_SHARES
from picopose_ros.evaluation.report import number, share, table

_NONE = "–"


@cache
def paper() -> dict[str, Any]:
    """The paper's tables I to VIII: ``table_1`` and so on, each a list of rows.

    A row has its keys (method, hypotheses, stage, ...) and, per figure, values by the dataset's folder name
    (``lmo``, ``tless``, ...) and ``mean``; recalls in percent, as printed.
    """
    return json.loads(Path(__file__).with_name("paper.json").read_text())


def paper_value(dataset: str, which: int, figure: str = "ar", **keys: object) -> float | None:
    """A value of the paper, recalls as shares; None if it gives none.

    Args:
        dataset: name of its folder. which: number of the table. figure: ar, translation_5cm or epe_px.
        keys: that pick the row, e.g. ``hypotheses=5``; of the rows of several methods PicoPose's is taken.
    """
    keys = {"method": "PicoPose", **keys}
    for row in paper()[f"table_{which}"]:
        if all(row[key] == value for key, value in keys.items() if key in row or key != "method"):
            value = row.get(figure, {}).get(dataset)
            return value if value is None or figure == "epe_px" else value / 100
    return None


def markdown(report: Mapping[str, Any]) -> str:
    """The tables of a report, beside the paper's values."""
    about, variants, epe = report["tables"], report["variants"], report["epe"]
    dataset, hypotheses = about["dataset"], about["hypotheses"]
    first = answer(1)

    def ours(key: str, figure: str = "ar") -> str:
        return share(variants[key][figure], 3) if key in variants else _NONE

    def theirs(which: int, figure: str = "ar", **keys: object) -> str:
        value = paper_value(dataset, which, figure, **keys)
        return number(value, 1) if figure == "epe_px" else share(value, 3)

    def section(title: str, note: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        return f"### {title}\n\n{note}\n\n" + table(["", *head], rows)

    ar = ("AR", "paper")
    counted = sorted({1, hypotheses})
    known = [count for count in TEMPLATE_COUNTS if templates(count) in variants]
    parts = [
        f"`{dataset}`, {about['images']} images, {variants[first]['targets']} instances; preset "
        f"`{about['preset']}`, weights `{about['weights'][:16]}`, {about['viewpoints']} templates, "
        f"{about['decode']} decode, scored by: {about['implementation']}. Recalls are shares of all "
        "instances; an instance without a pose counts as wrong.",
        section(
            "Table I: hypotheses and refinement",
            f"Refined: {about['refinements']} rounds of this package's refinement; the paper's values beside "
            "these rows are with MegaPose's refiner.",
            ["AR VSD", "AR MSSD", "AR MSPD", "ADD(-S) < .1 d", "< .05 d", "< .02 d", *ar],
            [
                [
                    name(count),
                    *(ours(name(count), k) for k in ("vsd", "mssd", "mspd", *reversed(ADD_SHARES), "ar")),
                    theirs(1, hypotheses=count, refiner=refiner),
                ]
                for name, refiner in ((answer, None), (refined, "MegaPose"))
                for count in counted
            ],
        ),
        section(
            "Table IV: stages",
            "One hypothesis. Stage 1: the best template's pose, moved to the segment. Stage 2: rotated and "
            "placed by the affine. Stage 3: PnP on the offsets. EPE: end-point error, mean over the segments "
            "of the mean over the visible cells of the best template, crop px.",
            [*ar, "translation < 5 cm", "paper", "EPE, px", "paper"],
            [
                [
                    stage(which),
                    ours(key),
                    theirs(4, stage=which),
                    ours(key, "translation_5cm"),
                    theirs(4, "translation_5cm", stage=which),
                    number(epe[str(which)]["mean"], 1) if str(which) in epe else _NONE,
                    theirs(4, "epe_px", stage=which),
                ]
                for which, key in ((1, stage(1)), (2, stage(2)), (3, first))
            ],
        ),
        section(
            "Table VI: what stage 3 starts from",
            "One hypothesis. Identity: no motion between the crops. Similarity: the one that most matches of "
            "stage 1 agree on. The weights are the same; they were trained to start near stage 2's affine.",
            ar,
            [
                ["identity", ours(start("identity")), _NONE],
                ["similarity of stage 1's matches", ours(start("stage 1")), _NONE],
                ["the paper's matching of stage 1", _NONE, theirs(6, start="matching of stage 1")],
                ["the paper's pose of stage 1, by PnP", _NONE, theirs(6, start="pose of stage 1")],
                ["stage 2's affine", ours(first), theirs(6, start="stage 2")],
            ],
        ),
        section(
            "Table VII: offset blocks",
            "One hypothesis, the flow after the first blocks of the same network. (A network trained with "
            "fewer blocks would differ.)",
            ar,
            [
                [
                    blocks(count),
                    ours(first if count == about["blocks"] else blocks(count)),
                    theirs(7, blocks=count),
                ]
                for count in range(1, about["blocks"] + 1)
            ],
        ),
        section(
            "Table VIII: templates",
            "One hypothesis, views spread evenly over the sphere.",
            ar,
            [
                [templates(count), ours(key), theirs(8, templates=count)]
                for count, key in (*((c, templates(c)) for c in known), (about["viewpoints"], first))
            ],
        ),
    ]
    if dataset in paper()["datasets"]:
        parts.append(_others(dataset))
    else:
        parts.append("The paper has no values of this dataset.")
    return "\n\n".join(parts) + "\n"


def _others(dataset: str) -> str:
    """The paper's Table I, all methods, of one dataset."""
    rows = [
        [
            row["method"],
            _NONE if row["hypotheses"] is None else str(row["hypotheses"]),
            row["refiner"] or "none",
            share(row["ar"][dataset] / 100, 3),
        ]
        for row in paper()["table_1"]
    ]
    title = f"### The paper's Table I on {paper()['datasets'][dataset]}"
    return title + "\n\n" + table(["method", "hypotheses", "refiner", "AR"], rows)

"""Reports of an evaluation: plain numbers as JSON, and the same as tables in Markdown."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from picopose_ros.errors import ConfigError

_DIGITS = 6

ADD_RECALLS = ("add_recall", "add_recall_05d", "add_recall_02d")
"""ADD(-S) below .1, .05 and .02 of the diameter, as the figures of ``picopose eval synthetic`` call them."""


def plain(value: Any) -> Any:
    """The same in types that JSON knows; floats to six digits, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(entry) for entry in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None
    if value is None or isinstance(value, str):
        return value
    return str(value)


def write_atomically(path: Path, content: Mapping[str, Any] | str | bytes) -> None:
    """Write a dict as JSON, a text or bytes; readers see the old file or the whole new one.

    Raises:
        ConfigError: the file can't be written.
    """
    if isinstance(content, Mapping):
        content = json.dumps(content, indent=1) + "\n"
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def check_writable(path: Path) -> None:
    """Find out before long work whether a file can be written; makes its folder.

    Raises:
        ConfigError: it can't.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if path.is_dir():
            raise IsADirectoryError("is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path} cannot be written: {error.strerror or error}; name a file in another folder")


def markdown(report: Mapping[str, Any]) -> str:
    """All tables of a report of ``picopose eval synthetic``."""
    about, figures = report["benchmark"], report["figures"]
    overall = figures["overall"]
    first, last = report["stages"][2], report["stages"][-1]
    scene = f"{about['scenes']} {about['kind']} scenes (seed {about['seed']})"
    masks = "degraded masks" if about["mask_noise"] else "true masks"
    kept = "background visible" if about["background"] else "background masked"
    kept += ", reference decode" if about["decode"] == "reference" else ""
    kept += "" if about["rerank"] else ", templates by the match alone"
    kept += "" if about["precision"] == "auto" else f", {about['precision']}"
    kept += f", {about['prune']} hypotheses kept for the last grid" if about["prune"] else ""
    kept += f", refined {about['refinements']} times" if about["refinements"] else ""
    sections = [
        f"{overall['all']['queries']} queries of {overall['all']['objects']} objects in {scene}, {masks}, "
        f"{kept}; {about['viewpoints']} templates, preset `{about['preset']}`, weights `{about['weights']}`. "
        "Shares are of all queries: one without a pose counts as wrong.",
    ]
    if report["difficulty"]:
        names = {"visible": "visible share", "distance": "distance / diameter", "pixels": "longer side, px"}
        rows = [
            [names[key], *(number(value, 0 if key == "pixels" else 2) for value in quantiles.values())]
            for key, quantiles in report["difficulty"].items()
        ]
        sections.append(table(["queries", "5 %", "median", "95 %"], rows))
    if report["unreadable"]:
        names = ", ".join(f"`{name}`" for name in report["unreadable"])
        sections.append(f"Left out, because the mesh can't be used: {names}.")
    sections.append("### Poses\n\n" + _pose_table(figures, first, last))
    sections.append("### Stage by stage\n\n" + _stage_table(overall, report["stages"]))
    sections.append("### End-point errors in crop pixels\n\n" + _endpoint_table(overall))
    sections.append(
        "### The truth in place of a stage's answer\n\n" + _bottleneck_table(figures["bottleneck"])
    )
    sections.append("### Confidence\n\n" + _confidence_tables(figures["confidence"]))
    sections.append("### Objects\n\n" + _object_table(figures["objects"], report["facts"], first, last))
    sections.append("### Time\n\n" + _time_table(report["times"]))
    return "\n\n".join(sections) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    """As it stands in a table."""
    return "–" if value is None else f"{value:.{digits}f}"


def share(value: float | None, digits: int = 2) -> str:
    """.93 rather than 0.93, as recalls are written."""
    text = number(value, digits)
    return text.removeprefix("0") if value is not None and value < 1 else text


def _pose_table(figures: Mapping[str, Any], first: str, last: str) -> str:
    rows = []

    def add(name: str, cut: Mapping[str, Any]) -> None:
        pose, one = cut["pose"][last], cut["pose"][first]
        views = cut["viewpoint"]
        rows.append(
            [
                name,
                str(cut["queries"]),
                share(one["add_recall"]),
                *(share(pose[key]) for key in ADD_RECALLS),
                number(pose["rotation_deg"], 1),
                number(pose["translation_mm"], 1),
                share(pose["mspd_10px"]),
                share(pose["vsd"]),
                share(pose["mssd"]),
                share(pose["mspd"]),
                share(pose["ar"]),
                share(views["best template"]["within_15_deg"]),
                share(views["best of five"]["within_15_deg"]),
            ]
        )

    for name, title in (("unambiguous", "unambiguous"), ("ambiguous", "ambiguous"), ("all", "**all**")):
        if name in figures["overall"]:
            add(title, figures["overall"][name])
    for part in ("groups", "visibility"):
        for name, cuts in figures[part].items():
            for kind in ("unambiguous", "all"):
                if kind in cuts and (kind == "unambiguous" or cuts[kind]["queries"] > _queries(cuts)):
                    title = f"{name} visible" if part == "visibility" else name
                    add(f"{title}, {kind}", cuts[kind])
    hypotheses = last.removeprefix("stage 3, ")
    head = [
        "",
        "queries",
        "ADD(-S) < 0.1 d, 1 hypothesis",
        f"ADD(-S) < 0.1 d, {hypotheses}",
        "< 0.05 d",
        "< 0.02 d",
        "rotation, median deg",
        "translation, median mm",
        "MSPD < 10 px",
        "AR VSD",
        "AR MSSD",
        "AR MSPD",
        "AR",
        "template within 15 deg",
        "best of five",
    ]
    note = f"Errors and recalls from the fourth column on are those of {hypotheses}."
    return note + "\n\n" + table(head, rows)


def _queries(cuts: Mapping[str, Any]) -> int:
    return cuts["unambiguous"]["queries"] if "unambiguous" in cuts else 0


def _stage_table(overall: Mapping[str, Any], stages: Sequence[str]) -> str:
    rows = []
    for name in ("unambiguous", "all"):
        if name not in overall:
            continue
        for stage in stages:
            pose = overall[name]["pose"][stage]
            rows.append(
                [
                    f"{name}: {stage}",
                    *(share(pose[key]) for key in ADD_RECALLS),
                    number(pose["rotation_deg"], 1),
                    number(pose["translation_mm"], 1),
                    share(pose["mspd_10px"]),
                    *(share(pose[key]) for key in ("vsd", "mssd", "mspd", "ar")),
                    str(pose["answered"]),
                    str(pose["from_affine"]) if stage.startswith("stage 3") else "",
                ]
            )
    head = [
        "",
        "ADD(-S) < 0.1 d",
        "< 0.05 d",
        "< 0.02 d",
        "rotation, median deg",
        "translation, median mm",
        "MSPD < 10 px",
        "AR VSD",
        "AR MSSD",
        "AR MSPD",
        "AR",
        "answered",
        "of them from stage 2",
    ]
    note = (
        "Stage 1 is the best template's pose, moved to the segment; its rotation in the image plane is "
        "unknown. Stage 2 rotates and places it by the affine."
    )
    return note + "\n\n" + table(head, rows)


def _endpoint_table(overall: Mapping[str, Any]) -> str:
    rows = []
    for name in ("unambiguous", "all"):
        if name not in overall:
            continue
        for given in ("right template given", "retrieved template"):
            ends = overall[name]["endpoints_px"][given]
            certain = overall[name]["certainty"][given]
            stages = [ends.get(stage) for stage in ("1", "2", "3 at 16", "3 at 32", "3")]
            rows.append(
                [
                    f"{name}, {given}",
                    *(
                        "–" if s is None else f"{s['median']:.1f} / {s['median_of_means']:.1f}"
                        for s in stages
                    ),
                    share(certain["precision"]),
                    share(certain["recall"]),
                    share(certain["precision_good"]),
                    share(certain["recall_good"]),
                ]
            )
    head = [
        "",
        "stage 1",
        "stage 2",
        "stage 3, 16 cells",
        "32 cells",
        "64 cells",
        "precision",
        "recall",
        "precision < 5 px",
        "recall < 5 px",
    ]
    note = (
        "Median over all visible cells / median over the queries of their mean. Precision and recall are the "
        "certainty's: of the visible cells, and of those whose end point is less than 5 px off."
    )
    return note + "\n\n" + table(head, rows)


def _bottleneck_table(parts: Mapping[str, Any]) -> str:
    names = list(next(iter(parts.values())))
    rows = [[name, *(share(part[name]) for part in parts.values())] for name in names]
    note = "ADD(-S) < 0.1 d with one hypothesis and the truth in place of:"
    return note + "\n\n" + table(["", *parts], rows)


def _confidence_tables(parts: Mapping[str, Any]) -> str:
    keys = {
        "right against wrong template, AUC": "auc",
        "right template against a far view of the object, AUC": "auc_far_view",
        "right template against another object's, AUC": "auc_other_object",
        "correct against wrong published pose, AUC": "auc_correct_pose",
        "calibration error": "calibration_error",
    }
    rows = [[title, *(share(part[key]) for part in parts.values())] for title, key in keys.items()]
    mapped = [part["mapping"] for part in parts.values()]
    rows.append(
        ["calibration error after the mapping below", *(share(m["calibration_error"]) for m in mapped)]
    )
    rows.append(
        [
            "mapping: logit(c) becomes a logit(c) + b",
            *(f"a = {m['slope']:.2f}, b = {m['offset']:.2f}" for m in mapped),
        ]
    )
    curve = next(iter(parts.values()))["reliability"]
    bins = [
        [
            f"{entry['from']:.1f} to {entry['to']:.1f}",
            str(entry["queries"]),
            share(entry["confidence"]),
            share(entry["correct"]),
        ]
        for entry in curve
    ]
    return (
        table(["", *parts], rows)
        + "\n\n"
        + table(["confidence", "queries", "mean confidence", "ADD(-S) < 0.1 d"], bins)
    )


def _object_table(objects: Mapping[str, Any], facts: Mapping[str, Any], first: str, last: str) -> str:
    rows = []
    for name, cut in objects.items():
        fact, pose = facts[name], cut["pose"][last]
        ends = cut["endpoints_px"]["right template given"].get("3")
        rows.append(
            [
                name,
                fact["group"],
                "yes" if fact["ambiguous"] else "",
                str(cut["queries"]),
                share(cut["pose"][first]["add_recall"]),
                share(pose["add_recall"]),
                number(pose["rotation_deg"], 1),
                share(pose["ar"]),
                share(cut["viewpoint"]["best template"]["within_15_deg"]),
                "–" if ends is None else number(ends["median"], 1),
            ]
        )
    head = [
        "object",
        "group",
        "ambiguous",
        "queries",
        "ADD, 1 hypothesis",
        f"ADD, {last.removeprefix('stage 3, ')}",
        "rotation, median deg",
        "AR",
        "template within 15 deg",
        "EPE of stage 3, px",
    ]
    return table(head, rows)


def _time_table(times: Mapping[str, Any]) -> str:
    stages = times["milliseconds_per_query"]
    note = f"Milliseconds per query, median over the scenes; {times['device']}, {times['threads']} threads."
    return note + "\n\n" + table(["", *stages], [["", *(number(value, 0) for value in stages.values())]])

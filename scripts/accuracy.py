#!/usr/bin/env python3
"""Measure the packaged weights and write docs/accuracy.md: `make accuracy`.

Every run is one `picopose` command. Its full report, with a table per object, stays in build/accuracy/; what
the page shows of it goes into docs/accuracy.json, from which `--page-only` writes the page again. A run whose
report is there already, of the same weights, is not repeated: an interrupted measurement goes on.

docs/accuracy.json also holds the tables that this script doesn't measure (`tables`: photographs,
refinement, decode, and `aims` with their figures): edit them there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picopose_ros.evaluation.report import ADD_RECALLS, number, plain, share, table, write_atomically

HELDOUT = "data/heldout"
DEMO = "build/demo/meshes"
DOCS = Path("docs")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PICTURES = (
    ("main/contact_sheet.png", "accuracy_cases.jpg"),
    ("main/reliability.png", "reliability.png"),
    ("main/difficulty.png", "difficulty_single.png"),
    ("clutter/contact_sheet.png", "accuracy_clutter.jpg"),
    ("clutter/difficulty.png", "difficulty_cluttered.png"),
)
"""Pictures of the runs, and what they are called in the documents' folder."""

HYPOTHESES = (1, 5)
FAR = 0.2
"""A pose whose ADD(-S) is a larger share of the diameter is far off."""

SCORES = (0.0, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Between these scores the page says how many poses are right."""

THRESHOLDS = (0.0, 0.6, 0.8)
"""Values of min_score that the page compares."""


@dataclass(frozen=True)
class Run:
    """One run of the benchmark.

    Attributes:
        title: as the page calls it. meshes: folder of the objects.
        options: of `picopose eval synthetic`. overlays: whether its pictures go into the page.
    """

    title: str
    meshes: str
    options: tuple[str, ...]
    overlays: bool = False

    def command(self, name: str, folder: Path) -> list[str]:
        """What is typed to get it."""
        places = ["--out", str(folder / f"{name}.json"), "--markdown", str(folder / f"{name}.md")]
        if self.overlays:
            places += ["--overlays", str(folder / name)]
        return ["picopose", "eval", "synthetic", "--meshes", self.meshes, *self.options, *places]


RUNS = {
    "main": Run("true masks", HELDOUT, ("--scenes", "240"), overlays=True),
    "masks": Run("masks as a segmenter makes them", HELDOUT, ("--scenes", "144", "--mask-noise")),
    "background": Run("background not masked", HELDOUT, ("--scenes", "96", "--background")),
    "clutter": Run("cluttered tables", HELDOUT, ("--scenes", "96", "--kind", "cluttered"), overlays=True),
    "cut": Run("cut by the image's border", HELDOUT, ("--scenes", "96", "--kind", "cut")),
    "cutmasks": Run(
        "the same, masks as a segmenter makes them",
        HELDOUT,
        ("--scenes", "96", "--kind", "cut", "--mask-noise"),
    ),
    "match": Run(
        "templates by the match alone", HELDOUT, ("--scenes", "96", "--rerank", "0", "--refinements", "0")
    ),
    "unrefined": Run("without refinement", HELDOUT, ("--scenes", "96", "--refinements", "0")),
    "demo": Run("the demo's objects", DEMO, ("--scenes", "60")),
}

Summary = Mapping[str, Any]

_SCORE = (
    "The score is meant to be the probability that a pose is right (on photographs it is not, see there). "
    "That of refined poses was fitted on 176 poses of 12 other objects, with the weights before (slope .98, "
    "offset 1.78, used as 1 and 1.8). With the default `min_score`, 0.6, 6 % of the published poses are off "
    "by more than .2 d on tables."
)

_MAIN = ("overall", "unambiguous", "5")
AIMS: tuple[tuple[str, str, tuple[str, ...], float, bool], ...] = (
    ("ADD < .1 d, 1 hypothesis", "main", ("overall", "unambiguous", "1", "add_recall"), 0.93, False),
    ("ADD < .1 d", "main", (*_MAIN, "add_recall"), 0.95, False),
    ("ADD < .05 d", "main", (*_MAIN, "add_recall_05d"), 0.85, False),
    ("ADD < .02 d", "main", (*_MAIN, "add_recall_02d"), 0.50, False),
    ("rotation error, median, degrees", "main", (*_MAIN, "rotation_deg"), 0.8, True),
    ("translation error, median, mm", "main", (*_MAIN, "translation_mm"), 2.2, True),
    ("EPE of stage 3, median, px", "main", ("endpoints_px", "3"), 1.4, True),
    ("template within 15 degrees", "main", ("overall", "unambiguous", "template"), 0.95, False),
    ("ADD < .1 d, background not masked", "background", (*_MAIN, "add_recall"), 0.87, False),
    ("ADD < .1 d, masks as a segmenter makes them", "masks", (*_MAIN, "add_recall"), 0.85, False),
    ("ADD < .1 d, cluttered tables", "clutter", (*_MAIN, "add_recall"), 0.84, False),
    ("right against wrong hypotheses by score, AUC", "main", ("confidence", "auc"), 0.85, False),
)
"""Aims: text, run, where its summary has the figure, the aim, whether that is the most allowed."""


# -- from a report to what the page shows --------------------------------------------------------------------


def summarise(report: Mapping[str, Any], command: str) -> dict[str, Any]:
    """What the page shows of a report of `picopose eval synthetic`."""
    figures = report["figures"]
    overall = figures["overall"]
    part = "unambiguous" if "unambiguous" in overall else "all"
    one = overall[part]

    def cuts(named: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _cut(cut["unambiguous"]) for name, cut in named.items() if "unambiguous" in cut}

    confidence = figures["confidence"]["all"]
    return plain(
        {
            "command": command,
            "weights": report["benchmark"]["weights"],
            "queries": overall["all"]["queries"],
            "objects": overall["all"]["objects"],
            "overall": {name: _cut(cut) for name, cut in overall.items()},
            "groups": cuts(figures["groups"]),
            "visibility": cuts(figures["visibility"]),
            "stages": {name: one["pose"][name] for name in report["stages"]},
            "endpoints_px": {
                stage: value["median"]
                for stage, value in one["endpoints_px"]["right template given"].items()
                if stage != "pairs"
            },
            "bottleneck": figures["bottleneck"][part],
            "confidence": {name: value for name, value in confidence.items() if name != "hypotheses"},
            "min_score": _thresholds(report),
            "milliseconds": report["times"]["milliseconds_per_query"],
        }
    )


def _name(hypotheses: int) -> str:
    return f"stage 3, {hypotheses} hypothes{'i' if hypotheses == 1 else 'e'}s"


def _cut(cut: Mapping[str, Any]) -> dict[str, Any]:
    views = cut["viewpoint"]
    return {
        "queries": cut["queries"],
        **{str(count): cut["pose"][_name(count)] for count in HYPOTHESES if _name(count) in cut["pose"]},
        "template": views["best template"]["within_15_deg"],
        "best of five": views["best of five"]["within_15_deg"],
    }


def _thresholds(report: Mapping[str, Any]) -> list[dict[str, float | None]]:
    """Per min_score: share of the queries that are published, and of those right and far off."""
    last, queries = report["stages"][-1], report["queries"]
    rows = []
    for least in THRESHOLDS:
        kept = [q[last]["add_diameters"] for q in queries if q[last] and q["confidence"] >= least]
        rows.append(
            {
                "min_score": least,
                "published": len(kept) / len(queries),
                "right": sum(error < 0.1 for error in kept) / len(kept) if kept else None,
                "far": sum(error > FAR for error in kept) / len(kept) if kept else None,
            }
        )
    return rows


# -- the page ----------------------------------------------------------------------------------------------


def _pose_cells(cut: Mapping[str, Any]) -> list[str]:
    one, five = cut.get("1", {}), cut.get("5", {})
    return [
        str(cut["queries"]),
        share(one.get(ADD_RECALLS[0])),
        *(share(five.get(name)) for name in ADD_RECALLS),
        number(five.get("rotation_deg"), 1),
        number(five.get("translation_mm"), 1),
        share(five.get("mspd_10px")),
        share(five.get("ar")),
        share(cut["template"]),
    ]


_POSE_HEAD = (
    "queries",
    "ADD < .1 d, 1 hyp.",
    "5 hyp.",
    "< .05 d",
    "< .02 d",
    "rotation, deg",
    "translation, mm",
    "MSPD < 10 px",
    "AR",
    "template within 15 deg",
)


def _against(aim: float, value: float | None, upper: bool) -> list[str]:
    met = value is not None and (value <= aim if upper else value >= aim)
    verdict = "not measured" if value is None else "reached" if met else "not reached"
    return [f"{'<=' if upper else '>='} {aim:g}", number(value), verdict]


def _bars(runs: Mapping[str, Summary], others: Sequence[tuple[str, float, float, bool]]) -> str:
    """Aims against what was measured; `others`: text, aim, value, whether the aim is the most allowed."""
    rows = []
    for text, run, path, aim, upper in AIMS:
        value: Any = runs.get(run)
        for key in path:
            value = None if value is None else value.get(key)
        rows.append([text, *_against(aim, value, upper)])
    rows += [[text, *_against(aim, value, upper)] for text, aim, value, upper in others]
    return table(["figure", "aim", "measured", ""], rows)


def _conditions(runs: Mapping[str, Summary]) -> str:
    rows = []
    for name, run in runs.items():
        for part in ("unambiguous", "ambiguous") if name == "main" else ("unambiguous",):
            if part in run["overall"]:
                words = RUNS[name].title + (", ambiguous objects" if part == "ambiguous" else "")
                rows.append([words, *_pose_cells(run["overall"][part])])
    return table(["", *_POSE_HEAD], rows)


def _cuts(main: Summary) -> str:
    rows = [[name, *_pose_cells(cut)] for name, cut in main["groups"].items()]
    rows += [[f"{name} visible", *_pose_cells(cut)] for name, cut in main["visibility"].items()]
    return table(["", *_POSE_HEAD], rows)


def _stages(main: Summary) -> str:
    ends = main["endpoints_px"]
    rows = []
    for name, pose in main["stages"].items():
        end = ends.get(name.split(",")[0].removeprefix("stage "))
        rows.append(
            [
                name,
                *(share(pose.get(key)) for key in ADD_RECALLS),
                number(pose["rotation_deg"], 1),
                number(pose["translation_mm"], 1),
                share(pose["ar"]),
                number(end, 2),
            ]
        )
    head = ["", "ADD < .1 d", "< .05 d", "< .02 d", "rotation, deg", "translation, mm", "AR", "EPE, px"]
    return table(head, rows)


def _bottleneck(main: Summary) -> str:
    return table(
        ["the truth in place of", "ADD < .1 d"], [[k, share(v)] for k, v in main["bottleneck"].items()]
    )


def _score(runs: Mapping[str, Summary]) -> str:
    shown = {RUNS[name].title: runs[name] for name in ("main", "masks", "clutter") if name in runs}
    found = [run["confidence"] for run in shown.values()]
    facts = [
        [what, *(share(one[key]) for one in found)]
        for what, key in (
            ("right against wrong hypotheses, AUC", "auc"),
            ("right against wrong published poses, AUC", "auc_correct_pose"),
            ("calibration error", "calibration_error"),
        )
    ]
    curve = [
        [f"{low:.1f} to {high:.1f}", *(_right(one["reliability"], low, high) for one in found)]
        for low, high in zip(SCORES, SCORES[1:])
    ]
    rows = [
        [title, f"{row['min_score']:g}", share(row["published"]), share(row["right"]), share(row["far"])]
        for title, run in shown.items()
        for row in run["min_score"]
        if row["min_score"] in THRESHOLDS
    ]
    least = ["", "min_score", "published", "of those right", f"of those off by > {FAR:g} d"]
    parts = [
        table(["", *shown], facts),
        table(["score: share right (ADD < .1 d), of so many queries", *shown], curve),
        table(least, rows),
    ]
    return "\n\n".join(parts)


def _right(bins: Sequence[Mapping[str, Any]], low: float, high: float) -> str:
    """Share of the right ones among the queries with a score from ``low`` to ``high``."""
    inside = [one for one in bins if low - 1e-9 < one["from"] < high - 1e-9 and one["queries"]]
    count = sum(one["queries"] for one in inside)
    right = sum(one["correct"] * one["queries"] for one in inside)
    return f"{share(right / count)} of {count}" if count else "-"


def _by_hand(tables: Mapping[str, Any], section: str) -> str:
    """The tables of a section that are not measured here: note, head and rows, of docs/accuracy.json."""
    parts = []
    for one in tables.get(section, ()):
        if one.get("note"):
            parts.append(one["note"])
        if one.get("rows"):
            parts.append(table(one["head"], one["rows"]))
    return "\n\n".join(parts)


def _times(runs: Mapping[str, Summary]) -> str:
    stages = runs["main"]["milliseconds"]
    return table(["", *stages], [["ms per query", *(number(value, 0) for value in stages.values())]])


def page(data: Mapping[str, Any]) -> str:
    """The part of docs/accuracy.md that is written by this script, Markdown."""
    runs = {name: data["runs"][name] for name in RUNS if name in data["runs"]}
    tables = data["tables"]
    sections: list[tuple[str, str, Callable[[], str]]] = [
        (
            "At a glance",
            "Five hypotheses (photographs: two), unambiguous objects where nothing else is said.",
            lambda: _bars(runs, tables.get("aims", ())),
        ),
        ("Photographs", "", lambda: _by_hand(tables, "photographs")),
        (
            "Rendered objects, under several conditions",
            "Unambiguous objects where nothing else is said. From the third column on with five hypotheses; "
            "errors are medians.",
            lambda: _conditions(runs),
        ),
        (
            "By kind of object and visible share",
            "True masks, unambiguous objects.",
            lambda: _cuts(runs["main"]),
        ),
        (
            "Stage by stage",
            "True masks, unambiguous objects. Stage 1 is the best template's pose, moved to the segment; its "
            "rotation in the image plane is unknown. Stage 2 rotates and places it by the affine. EPE: "
            "median end-point error with the right template given, crop px.",
            lambda: _stages(runs["main"]),
        ),
        (
            "What limits it",
            "One hypothesis, with the truth in place of a stage's answer.",
            lambda: _bottleneck(runs["main"]),
        ),
        ("Refinement", "", lambda: _by_hand(tables, "refinement")),
        (
            "Score",
            _SCORE,
            lambda: _score(runs),
        ),
        (
            "Time",
            "This benchmark's process, one thread; see [performance.md](performance.md).",
            lambda: _times(runs),
        ),
    ]
    lines = [BEGIN, ""]
    for title, note, content in sections:
        lines += [f"## {title}", ""]
        if note:
            lines += [note, ""]
        lines += [content(), ""]
    weights = {run["weights"] for run in runs.values()}
    lines += ["## Commands", "", f"Weights {', '.join(f'`{w}`' for w in sorted(weights))}.", "", "```bash"]
    lines += [run["command"] for run in runs.values()]
    return "\n".join([*lines, "```", "", END])


def write_page(data: Mapping[str, Any], path: Path) -> None:
    """Replace what stands between the marks of the page.

    Raises:
        ConfigError: it can't be written.
    """
    before, rest = path.read_text().split(BEGIN)
    write_atomically(path, before + page(data) + rest.split(END)[1])


def measure(folder: Path, only: Sequence[str]) -> dict[str, Summary]:
    """Make the reports that are missing; what the page shows of those that are there."""
    from picopose_ros.model import load_model, model_fingerprint  # slow; writing the page needs no torch

    folder.mkdir(parents=True, exist_ok=True)
    weights = model_fingerprint(load_model("tiny"))[:16]
    picopose = Path(sys.executable).with_name("picopose")
    if not (Path(HELDOUT) / "benchmark.json").is_file():
        subprocess.run([picopose, "eval", "objects", "--out", HELDOUT], check=True)
    found = {}
    for name, run in RUNS.items():
        path = folder / f"{name}.json"
        command = run.command(name, folder)
        report = json.loads(path.read_text()) if path.is_file() else None
        stale = report is None or report["benchmark"]["weights"] != weights
        if stale and name in only:
            print(" ".join(command), flush=True)
            subprocess.run([picopose, *command[1:]], check=True)
            report, stale = json.loads(path.read_text()), False
        if not stale:
            found[name] = summarise(report, " ".join(command))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=Path("build/accuracy"), help="for reports and pictures"
    )
    parser.add_argument(
        "--docs", type=Path, default=DOCS, help="folder of accuracy.json and accuracy.md (docs)"
    )
    parser.add_argument(
        "--only", nargs="*", choices=tuple(RUNS), default=tuple(RUNS), help="these runs (all)"
    )
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write the page again")
    args = parser.parse_args(argv)
    place = args.docs / "accuracy.json"
    data = json.loads(place.read_text())
    if not args.page_only:
        data["runs"] |= measure(args.folder, args.only)
        write_atomically(place, data)
        import cv2

        for source, target in PICTURES:
            picture = cv2.imread(str(args.folder / source))
            if picture is not None:
                coded = cv2.imencode(Path(target).suffix, picture, [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
                write_atomically(args.docs / target, coded.tobytes())
    write_page(data, args.docs / "accuracy.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

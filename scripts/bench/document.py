"""The measured part of docs/performance.md, made of all parts that have been measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import Curve, Plot
from plots import write_sheet

from picopose_ros.errors import ConfigError
from picopose_ros.evaluation.report import table, write_atomically

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
DECIDING = ("Backends", "Accuracy against time")
"""Titles of the tables that a reader chooses settings by: they stand in the document, the report has all."""
REPORT = "report.md"


@dataclass(frozen=True)
class Target:
    """What is aimed at.

    Attributes:
        key: under which a part tells its value. device: that it is measured on. what: in words.
        bar: the least value, or the largest if ``upper``. form: of a value.
    """

    key: str
    device: str
    what: str
    bar: float
    form: str
    upper: bool = False

    def met(self, value: float) -> bool:
        return value <= self.bar if self.upper else value >= self.bar


TARGETS = (
    Target(
        "large_5", "cpu", "vitl, CPU, 1 segment, 5 hypotheses, 162 templates: released / ours", 4.0, "{:.2f}"
    ),
    Target("large_1", "cpu", "the same with 1 hypothesis", 1.5, "{:.2f}"),
    Target(
        "large_8",
        "cuda",
        "vitl, one GPU, 8 segments, 5 hypotheses, half precision: released (fp32) / ours",
        10.0,
        "{:.2f}",
    ),
    Target(
        "vit_share", "cpu", "share of the CPU's matrix-product peak that the ViT pass reaches", 0.5, "{:.0%}"
    ),
    Target("vit_share", "cuda", "the same on a GPU, half precision", 0.5, "{:.0%}"),
    Target(
        "tiny_rate", "cpu", "tiny, CPU, 1 segment, 5 hypotheses, not refined", 5.0, "{:.1f} per s"
    ),
    Target("onboard_cold", "cpu", "162 templates of one object, tiny, cold", 20.0, "{:.1f} s", True),
    Target("onboard_cached", "cpu", "the same from the cache", 0.5, "{:.2f} s", True),
    Target(
        "object_mb",
        "cpu",
        "resident device memory per object, vitl, without the cache",
        90.0,
        "{:.1f} MB",
        True,
    ),
    Target("ros_layer", "cpu", "time in the ROS layer per frame at 640x480, median", 5.0, "{:.1f} ms", True),
)


def read_parts(folder: Path) -> dict[str, dict[str, Any]]:
    """All parts measured so far, by ``device/part``.

    Raises:
        ConfigError: a file is not one that a part has written.
    """
    parts = {}
    for path in sorted(folder.glob("*/*.json")):
        try:
            part = json.loads(path.read_text())
            if not {"about", "targets", "tables", "plots"} <= set(part):
                raise ValueError("something is missing in it")
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{path} is no result of a part ({error}); delete it and measure again"
            ) from error
        parts[f"{path.parent.name}/{path.stem}"] = part
    return parts


def target_rows(parts: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Per target: what, target, value, met or not, and where the value comes from."""
    rows = []
    for target in TARGETS:
        sign = "<=" if target.upper else ">="
        row = [target.what, f"{sign} {target.form.format(target.bar)}"]
        for name, part in parts.items():
            value = part["targets"].get(target.key)
            if name.startswith(f"{target.device}/") and value is not None:
                verdict = "yes" if target.met(value) else "**no**"
                row += [target.form.format(value), verdict, f"`{part['about']['command']}`"]
        rows.append(row if len(row) > 2 else [*row, "not measured", "", ""])
    return rows


def say_targets(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Target and value for the terminal, loud where a target is missed."""
    lines = []
    for what, bar, value, verdict, _ in target_rows(parts):
        mark = {"yes": "met   ", "**no**": "MISSED", "": "      "}[verdict]
        lines.append(f"{mark}  {value:>14}  (target {bar})  {what}")
    missed = sum(line.startswith("MISSED") for line in lines)
    lines.append(f"{missed} TARGETS MISSED" if missed else "no measured target is missed")
    return "\n".join(lines)


def section(
    parts: Mapping[str, Mapping[str, Any]],
    pictures: Mapping[str, str] | None = None,
    titles: Sequence[str] | None = None,
) -> str:
    """Targets, tables, pictures and circumstances, Markdown.

    Args:
        parts: what was measured. pictures: title -> file. titles: only these tables; None: all.
    """
    lines = [BEGIN, ""]
    if any(part["about"]["quick"] for part in parts.values()):
        lines += ["**Made with --quick: these figures mean nothing.**", ""]
    lines += [
        "## Targets",
        "",
        table(["what", "target", "measured", "met", "command"], target_rows(parts)),
        "",
    ]
    for part in parts.values():
        for one in part["tables"]:
            if titles is not None and one["title"] not in titles:
                continue
            lines += [f"## {one['title']}", ""]
            if one["note"]:
                lines += [one["note"], ""]
            lines += [table(one["head"], one["rows"]), ""]
    for title, name in (pictures or {}).items():
        lines += [f"## {title}", "", f"![{title}]({name})", ""]
    lines += ["## How it was measured", "", _circumstances(parts), "", END]
    return "\n".join(lines)


def _circumstances(parts: Mapping[str, Mapping[str, Any]]) -> str:
    setups: dict[str, str] = {}
    rows = []
    for about in (part["about"] for part in parts.values()):
        setup = (
            f"{about['machine']}; on {about['device']}; torch {about['torch']}, {about['threads']} threads"
        )
        mark = setups.setdefault(setup, chr(ord("A") + len(setups)))
        rows.append([about["part"], mark, about["date"], about["commit"], f"{about['seconds']:.0f} s"])
    lines = [f"- {mark}: {setup}" for setup, mark in setups.items()]
    return "\n".join([*lines, "", table(["part", "on", "measured", "commit", "took"], rows)])


def write_document(parts: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Replace the measured section of a document: targets, and the tables that settings are chosen by.

    Raises:
        ConfigError: the document has no place for it, or can't be written.
    """
    text = path.read_text() if path.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ConfigError(f"{path} has no measured section: put {BEGIN} and {END} into it, once each")
    before, rest = text.split(BEGIN)
    write_atomically(path, before + section(parts, titles=DECIDING) + rest.split(END)[1])


def write_report(parts: Mapping[str, Mapping[str, Any]], folder: Path) -> Path:
    """Everything that was measured, and pictures beside it; the report's path."""
    pictures = {}
    for name, part in parts.items():
        if part["plots"]:
            device, kind = name.split("/")
            file = f"{device}_{kind}.png".replace("curves_", "")
            write_sheet([_plot(one) for one in part["plots"]], folder / file)
            pictures[part["about"]["part"].replace("curves_", "Scaling, ")] = file
    path = folder / REPORT
    write_atomically(path, f"# Performance: all tables\n\n{section(parts, pictures)}\n")
    return path


def _plot(plain: Mapping[str, Any]) -> Plot:
    curves: Sequence[Curve] = [Curve(one["name"], one["points"]) for one in plain["curves"]]
    return Plot(**{**plain, "curves": curves})

"""What the soak found, as a table in docs/soak.md and as JSON."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

BEGIN, END = "<!-- soak: begin -->", "<!-- soak: end -->"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        what: in words.
        found: the figure.
        bar: what it should be; empty where it is only told.
        passed: None where nothing is judged.
        value: the figure for programs, in the unit that ``found`` names; None where it is not one number.
    """

    what: str
    found: str
    bar: str = ""
    passed: bool | None = None
    value: float | None = None


def machine() -> str:
    """Processor, cores, memory, system, Python."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    cores = len(os.sched_getaffinity(0))
    return (
        f"{model[1] if model else platform.machine()}, {cores} cores, {memory:.0f} GiB, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    )


def version(package: str) -> str:
    """Version of an installed package; a ROS installation tells none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return os.environ.get("ROS_DISTRO", "unknown")


def table(checks: Sequence[Check]) -> str:
    """Markdown."""
    verdict = {None: "", True: "yes", False: "**no**"}
    rows = [f"| {c.what} | {c.found} | {c.bar} | {verdict[c.passed]} |" for c in checks]
    return "\n".join(["| | found | bar | held |", "|---|---|---|---|", *rows])


def write(path: Path, checks: Sequence[Check], about: Mapping[str, str]) -> None:
    """Put the table between the marks of a document (or at the end of it); whole or not at all."""
    lines = [f"- {name}: {value}" for name, value in about.items()]
    content = "\n".join([BEGIN, "", *lines, "", table(checks), "", END])
    text = path.read_text() if path.exists() else "# Soak\n"
    if BEGIN in text and END in text:
        before, rest = text.split(BEGIN, 1)
        text = before + content + rest.split(END, 1)[1]
    else:
        text = f"{text.rstrip()}\n\n{content}\n"
    _replace(path, text)


def write_json(path: Path, checks: Sequence[Check], about: Mapping[str, str]) -> None:
    """The same for programs."""
    _replace(
        path, json.dumps({"about": dict(about), "checks": [asdict(check) for check in checks]}, indent=2)
    )


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)

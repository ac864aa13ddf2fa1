"""The pages: docs/node.md says what the node is, links lead somewhere, and the short pages are short."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "node_page.py"
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
LONGEST = {"README.md": 1500, "accuracy.md": 3000}
"""Words, tables included."""


def load_script(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def node_page() -> ModuleType:
    return load_script(SCRIPT)


def test_the_page_of_the_node_is_up_to_date(tmp_path: Path) -> None:
    """Topics and services of a real node, parameters, reasons and diagnostics against docs/node.md."""
    from node_harness import next_domain  # not for the other tests: it imports ROS and torch

    page = tmp_path / "node.md"
    text = (ROOT / "docs" / "node.md").read_text()
    without = re.sub(r"\n\| `overlay` .*|\n\| `min_score` .*|\n\| `busy` .*", "", text)
    page.write_text(without.replace("`std_srvs/srv/Trigger`", "`std_srvs/srv/Empty`"))
    environment = {**os.environ, "ROS_DOMAIN_ID": str(next_domain()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--page", str(page)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    written = page.read_text()
    assert done.returncode == 1 and "run `python scripts/node_page.py`" in done.stderr, done.stderr
    assert "not described: | `busy` |" in done.stderr and "not described: | `overlay` |" in done.stderr
    # What was taken out is written again, in other places and without its description; all else is as before.
    lines = [line for line in text.splitlines() if not line.startswith(("| `overlay`", "| `busy`"))]
    undescribed = [line for line in written.splitlines() if "describe it here" in line]
    assert len(undescribed) == 2
    differing = set(written.splitlines()) ^ {*lines, *undescribed}
    assert not differing, (
        f"docs/node.md differs from the node, run `python scripts/node_page.py`: {differing}"
    )


def test_a_table_keeps_what_was_written(node_page: ModuleType) -> None:
    lines = [
        "| name | type | |",
        "| --- | --- | --- |",
        "| b | int | kept |",
        "| a | int | changed type |",
        "| c | x | gone |",
    ]
    assert node_page.merge(lines, [("a", "float"), ("b", "int"), ("d", "")]) == [
        *lines[:3],
        "| a | float | changed type |",
        f"| d |  | {node_page.TODO} |",
    ]
    assert node_page.merge(lines, [("b", "int")], lambda row: row[0] == "c")[2:] == [lines[2], lines[4]]
    with pytest.raises(ValueError, match="topics: begin"):
        node_page.page_with("# no marks\n", "topics", list)
    found = node_page.problems("a\nold\n", f"a\nnew\n{node_page.TODO}\n")
    assert found == ["missing: new", f"missing: {node_page.TODO}", "no longer so: old"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in anchors, f"{page.name} links to {target}; {file.name} has {sorted(anchors)}"


@pytest.mark.parametrize("name", LONGEST)
def test_short_pages_are_short(name: str) -> None:
    (page,) = [page for page in PAGES if page.name == name]
    assert len(page.read_text().split()) <= LONGEST[name]


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    missing = [
        page.name
        for page in PAGES
        if f"({page.name})" not in index and page.name not in ("index.md", "README.md")
    ]
    assert not missing, f"docs/index.md leads to no {missing}"


def test_the_page_of_the_accuracy_is_made_of_its_figures(tmp_path: Path) -> None:
    script = load_script(ROOT / "scripts" / "accuracy.py")
    for name in ("accuracy.json", "accuracy.md"):
        (tmp_path / name).write_bytes((ROOT / "docs" / name).read_bytes())
    assert script.main(["--page-only", "--docs", str(tmp_path)]) == 0
    same = (tmp_path / "accuracy.md").read_text() == (ROOT / "docs" / "accuracy.md").read_text()
    assert same, "docs/accuracy.json was changed: run `python scripts/accuracy.py --page-only`"
    assert (tmp_path / "accuracy.json").read_bytes() == (ROOT / "docs" / "accuracy.json").read_bytes()

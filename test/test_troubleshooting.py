"""docs/troubleshooting.md speaks of every reason, every kind of error and every message of this package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from picopose_ros import errors
from picopose_ros.messages.reasons import DropReason

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
KINDS = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
GAP = "\0"
NOT_FOR_ROBOTS = ("training", "evaluation", "cli/eval.py")
"""Rooms whose messages are for those who train and measure."""


def skeleton(node: ast.expr) -> str:
    """A message with a gap for everything that is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(skeleton(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return skeleton(node.left) + skeleton(node.right)
    return GAP


def messages() -> list[tuple[str, str]]:
    """(where, message with gaps) of every error that the package raises with words of its own."""
    found = []
    for path in sorted((ROOT / "picopose_ros").rglob("*.py")):
        place = path.relative_to(ROOT / "picopose_ros").as_posix()
        if place.startswith(NOT_FOR_ROBOTS):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                kind = node.exc.func.id if isinstance(node.exc.func, ast.Name) else ""
                text = skeleton(node.exc.args[0])
                if kind in KINDS and len(re.findall("[a-z]{3}", text)) > 3:  # not those of another error
                    found.append((f"{place}:{node.lineno}", text))
    return found


def quoted() -> list[list[str]]:
    """What the page says in code type, split at its gaps."""
    lines = [line for line in PAGE.splitlines() if not line.startswith("```")]
    return [re.split("…", words) for line in lines for words in re.findall(r"`([^`]+)`", line)]


def says(text: str, pieces: list[str]) -> bool:
    """Whether the pieces stand in the text, in order; a lone word or number proves nothing."""
    pieces = [piece.strip("'()x ") for piece in pieces]
    if not any(len(piece) >= 8 for piece in pieces):
        return False
    position = 0
    for piece in pieces:
        position = text.find(piece, position)
        if position < 0:
            return False
        position += len(piece)
    return True


@pytest.mark.parametrize("reason", [reason.value for reason in DropReason])
def test_every_reason_has_its_line(reason: str) -> None:
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{reason}` |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert len(cells) == 3 and all(len(cell) > 5 for cell in cells[1:])


@pytest.mark.parametrize("kind", sorted(KINDS - {"PicoPoseError", "BagError"}))
def test_every_kind_of_error_is_named(kind: str) -> None:
    assert kind in PAGE


def test_every_message_is_spoken_of() -> None:
    quotes = quoted()
    every = messages()
    assert len(every) > 80, "the sources were not read"
    missing = [
        f"{where}: {text.replace(GAP, '…')}"
        for where, text in every
        if not any(says(text, pieces) for pieces in quotes)
    ]
    assert not missing, "docs/troubleshooting.md says nothing of:\n" + "\n".join(missing)


def test_no_link_leads_nowhere() -> None:
    for name, anchor in re.findall(r"\]\(([\w.]*)(?:#([\w-]+))?\)", PAGE):
        page = ROOT / "docs" / name if name else ROOT / "docs" / "troubleshooting.md"
        assert page.exists(), name
        if anchor:
            heads = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
            anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in anchors, (name, anchor)

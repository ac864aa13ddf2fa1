"""Reading of files that others wrote, with errors that say what is wrong with which file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from picopose_ros.errors import PicoPoseError

_T = TypeVar("_T")


def read_json(
    path: Path | str, kind: type[_T], error: type[PicoPoseError], expected: str | None = None
) -> _T:
    """The content of a JSON file.

    Args:
        path: of the file.
        kind: ``dict`` or ``list``, what the file must hold.
        error: type of the error that is raised.
        expected: what the file should hold, for the message.

    Raises:
        error: the file can't be read, is no JSON file or holds something else.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
    except OSError as reason:
        raise error(f"{path} can't be read: {reason.strerror or reason}") from reason
    except ValueError as reason:
        raise error(f"{path} is no JSON file ({reason})") from reason
    if not isinstance(content, kind):
        expected = expected or f"a JSON {kind.__name__}"
        raise error(f"{path}: expected {expected}, got {type(content).__name__}")
    return content

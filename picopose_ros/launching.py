"""What the launch files check before they start anything. Neither ROS nor PyTorch is needed here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from picopose_ros.errors import ConfigError

NODE_NAME = "picopose_node"


def unknown_arguments(argv: Sequence[str], declared: Iterable[str]) -> list[str]:
    """What is to be said of launch arguments on the command line that no launch file declares.

    Args:
        argv: words of the command line; ``name:=value`` are arguments.
        declared: names of those that there are.
    """
    known = list(declared)
    said = []
    for word in argv:
        name, given, _ = word.partition(":=")
        if not given or name in known:
            continue
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "--show-args lists those there are"
        said.append(f"there is no launch argument {name}, so it is not used: {hint}")
    return said


def check_parameter_file(path: Path, argument: str = "params_file") -> list[str]:
    """Check a file of parameters before the node is given it.

    Args:
        path: of the file. argument: what it was given as, for the messages.

    Returns:
        What looks wrong but may be meant, one sentence each.

    Raises:
        ConfigError: there is no such file, or it is no YAML.
    """
    try:
        content = yaml.safe_load(path.expanduser().read_text())
    except OSError as error:
        raise ConfigError(
            f"{argument}: the parameter file {path} can't be read ({error.strerror})"
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{argument}: the parameter file {path} is not valid YAML: {error}") from error
    sections = list(_sections(content))
    if any(section[-1:] == (NODE_NAME,) or "*" in "".join(section[-1:]) for section in sections):
        return []
    found = ", ".join("/".join(section).lstrip("/") for section in sections) or "none"
    return [
        f"{argument}: the parameter file {path} has no section for {NODE_NAME} (it has: {found}), so nothing "
        f"of it is used: call the section {NODE_NAME} or /**"
    ]


def _sections(content: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[str, ...]]:
    """Names of the nodes that a parameter file speaks of, as the words of their path."""
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if key == "ros__parameters":
            yield path
        else:
            yield from _sections(value, (*path, *str(key).strip("/").split("/")))

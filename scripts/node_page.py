#!/usr/bin/env python3
"""Write the tables of docs/node.md from the node: ``python scripts/node_page.py``; ``--check`` compares only.

Parameters come from their declarations, drop reasons from their enumeration. Topics, services and keys of the
diagnostics are those of a real node, which is configured once for every value of a parameter that may change
them. The last column of a table is written by hand and kept; that of a new row says that it is to be written.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.context import Context
from rclpy.executors import MultiThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter

from picopose_ros.messages.reasons import DropReason
from picopose_ros.node.engine import Engine
from picopose_ros.node.node import PicoPoseNode
from picopose_ros.node.parameters import PARAMETERS, SPECS, Changeable, ParameterSpec

PAGE = Path(__file__).resolve().parent.parent / "docs" / "node.md"

TODO = "(describe it here)"
"""The last cell of a row that nobody has described yet."""

_ACTION = "/_action/"

SAME_TOPICS = ("unit", "preset", "viewpoints", "precision", "image_reliability", "image_rectified")
"""Parameters with choices that change no topic; the node is configured for each value of the others."""

ROS_OWN = re.compile(
    r"/rosout|/parameter_events|/clock|~/transition_event|~/get_type_description|"
    r"~/(describe|get|list|set)_parameters(_atomically)?|~/get_parameter_types|"
    r"~/(change_state|get_state|get_available_states|get_available_transitions|get_transition_graph)"
)
"""Topics and services that every (managed) node has."""

KEYS: tuple[tuple[str, str], ...] = (
    (r"dropped_.*", "dropped_<reason>"),
    (r"last_.*", "last_<reason>"),
    (r"latency_.*_ms", "latency_<stage>_ms"),
    (r"publishers_.*", "publishers_<topic>"),
    (r"problem_\d+", "problem_<n>"),
    (r".*_hz", "<count>_hz"),
)
"""Keys of the diagnostics that come in many forms, and what the page calls them."""

SET = {Changeable.AT_START: "start", Changeable.UNCONFIGURED: "unconf.", Changeable.ALWAYS: "dynamic"}

Row = tuple[str, ...]


# -- what the node is --------------------------------------------------------------------------------------


def parameter_rows() -> list[Row]:
    """Name, default, range, when it may be set, description."""
    return [(f"`{s.name}`", _default(s), _range(s), SET[s.changeable], s.description) for s in PARAMETERS]


def _default(spec: ParameterSpec) -> str:
    value = spec.default
    text = (
        str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value
    )
    return "" if text == "" else f"`{text}`"


def _range(spec: ParameterSpec) -> str:
    if spec.choices:
        return "`" + " ".join(map(str, spec.choices)) + "`"
    return "" if spec.minimum is None else f"{spec.minimum:g}-{spec.maximum:g}"


def configurations() -> list[dict[str, str]]:
    """The node's default, and one for each other value of a parameter that may change topics."""
    varied = [s for s in PARAMETERS if s.choices and s.name not in SAME_TOPICS]
    others = [{s.name: value} for s in varied for value in s.choices if value != s.default]
    missing = [{"segmentation_input": "yolo"}] if importlib.util.find_spec("yolo_msgs") is None else []
    return [{}, *(one for one in others if one not in missing)]


@contextmanager
def local_node(folder: Path) -> Iterator[PicoPoseNode]:
    """A node in this process, not configured; its topics depend on no network or object, so it loads none."""
    meshes = folder / "meshes"
    meshes.mkdir()
    values: dict[str, Any] = {
        "autostart": False,
        "mesh_dir": str(meshes),
        "mask_class": "box",
        "device": "cpu",
    }
    context = Context()
    rclpy.init(context=context)
    try:
        overrides = [Parameter(name, value=value) for name, value in values.items()]
        with patch.object(Engine, "load", lambda self, tell: None):
            node = PicoPoseNode(context=context, parameter_overrides=overrides)
            try:
                yield node
            finally:
                node.close(60.0)
                node.destroy_node()
    finally:
        context.shutdown()


def topics_of(node: Node) -> set[Row]:
    """(topic, type, in or out) of a node now, without those that every node has."""
    name, namespace = node.get_name(), node.get_namespace()
    found = set()
    for way, of_node in (
        ("in", node.get_subscriber_names_and_types_by_node),
        ("out", node.get_publisher_names_and_types_by_node),
    ):
        for topic, types in of_node(name, namespace):
            short = _short(topic, name)
            if not ROS_OWN.fullmatch(short) and _ACTION not in short:
                found.add((f"`{short}`", f"`{types[0].replace('/msg/', '/')}`", way))
    return found


def services_of(node: Node) -> set[Row]:
    """(service or action, type) of a node, without those that every managed node has."""
    name = node.get_name()
    services = node.get_service_names_and_types_by_node(name, node.get_namespace())
    shortened = {(_short(service, name), types[0]) for service, types in services}
    # An action is several services and topics; it is told of by the first of these.
    shortened = {
        (service.removesuffix(f"{_ACTION}send_goal"), kind.removesuffix("_SendGoal"))
        for service, kind in shortened
        if _ACTION not in service or service.endswith("send_goal")
    }
    return {(f"`{short}`", f"`{kind}`") for short, kind in shortened if not ROS_OWN.fullmatch(short)}


def _short(topic: str, node: str) -> str:
    """As the code names it: of topics in the root namespace only the well-known keep their slash."""
    if topic.startswith(f"/{node}/"):
        return "~" + topic.removeprefix(f"/{node}")
    known = ("/tf", "/tf_static", "/diagnostics", "/rosout", "/parameter_events", "/clock")
    return topic if topic in known else topic.removeprefix("/")


def diagnostic_keys(node: PicoPoseNode) -> set[Row]:
    """Keys of the node's next diagnostics, as the page calls them."""
    keys: set[str] = set()
    listener = rclpy.create_node("node_page", context=node.context)

    def on_message(message: DiagnosticArray) -> None:
        for status in message.status:
            if node.get_name() in status.name:
                keys.update(pair.key for pair in status.values)

    listener.create_subscription(DiagnosticArray, "/diagnostics", on_message, 10)
    executor = MultiThreadedExecutor(num_threads=4, context=node.context)
    for one in (node, listener):
        executor.add_node(one)
    for _ in range(600):
        if keys:
            break
        executor.spin_once(timeout_sec=0.1)
    executor.shutdown()
    listener.destroy_node()
    return {(f"`{_pattern(key)}`",) for key in keys}


def _pattern(key: str) -> str:
    return next((name for pattern, name in KEYS if re.fullmatch(pattern, key)), key)


def observe() -> tuple[list[Row], list[Row], list[Row]]:
    """Rows (without descriptions) of topics, with their condition, of services and of diagnostics.

    Raises:
        RuntimeError: the node can't be configured or activated.
    """
    seen: dict[Row, list[Mapping[str, str]]] = {}
    with tempfile.TemporaryDirectory() as folder, local_node(Path(folder)) as node:
        all_configurations = configurations()
        for configuration in all_configurations:
            values = {name: SPECS[name].default for one in all_configurations for name in one} | configuration
            node.set_parameters([Parameter(name, value=value) for name, value in values.items()])
            for change in (node.trigger_configure, node.trigger_activate):
                change()
            if node.state != "active":
                raise RuntimeError(
                    f"with {configuration or 'its defaults'} the node stays {node.state}: {node.failure}"
                )
            for topic in topics_of(node):
                seen.setdefault(topic, []).append(configuration)
            if configuration == all_configurations[-1]:
                services, keys = services_of(node), diagnostic_keys(node)
            for change in (node.trigger_deactivate, node.trigger_cleanup):
                change()
    topics = [(*topic, _condition(where, all_configurations)) for topic, where in seen.items()]
    return topics, sorted(services), sorted(keys)


def _condition(where: Sequence[Mapping[str, str]], everywhere: Sequence[Mapping[str, str]]) -> str:
    """Which value of which parameter makes the node have something: "" for any."""
    if len(where) == len(everywhere):
        return ""
    for name in {name: None for one in everywhere for name in one}:
        values = {one.get(name, SPECS[name].default) for one in where}
        if len(where) == sum(one.get(name, SPECS[name].default) in values for one in everywhere):
            ordered = [str(value) for value in SPECS[name].choices if value in values]
            return f"`{name}: {ordered[0]}`" + "".join(f" or `{value}`" for value in ordered[1:])
    return "some settings"


# -- the page ----------------------------------------------------------------------------------------------


def merge(
    lines: Sequence[str], rows: Sequence[Row], kept: Callable[[Row], bool] = lambda row: False
) -> list[str]:
    """A table's lines with these rows, in the page's order, new ones last.

    Args:
        lines: head, rule and rows as they are. rows: without the last cell, which is the page's.
        kept: whether a row of the page stays although it isn't among ``rows``.
    """
    head, old = (
        lines[:2],
        [tuple(cell.strip() for cell in line.strip("| \n").split(" | ")) for line in lines[2:]],
    )
    wanted = dict.fromkeys(rows)
    told = {row[:-1]: row[-1] for row in old}
    order = [row for row in told if row in wanted or kept(row)]
    order += [row for row in wanted if row not in told]
    result = list(head)
    for row in order:
        # A row of which another cell changed keeps its description, too.
        text = told.get(row) or next((told[o] for o in told if o[0] == row[0] and o not in wanted), TODO)
        result.append("| " + " | ".join((*row, text)) + " |")
    return result


def page_with(text: str, name: str, change: Callable[[list[str]], list[str]]) -> str:
    """The page with the table between the marks of that name changed.

    Raises:
        ValueError: the page has no such marks.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    if begin not in text or end not in text:
        raise ValueError(
            f"{PAGE} has no lines '{begin.strip()}' and '{end}': put them around the table of {name}"
        )
    before, rest = text.split(begin, 1)
    table, after = rest.split(end, 1)
    return before + begin + "\n".join(change(table.strip().splitlines())) + "\n" + end + after


def generate(text: str) -> str:
    """The page as it should be."""
    topics, services, keys = observe()
    parameters = parameter_rows()
    every = configurations()
    varied = {name for one in every for name in one}
    met = {f"`{name}: {one.get(name, SPECS[name].default)}`" for name in varied for one in every}

    def conditional(row: Row) -> bool:
        """A row under a condition that no configuration of this script meets."""
        return bool(row[3]) and row[3].split(" or ")[0] not in met

    text = page_with(text, "topics", lambda lines: merge(lines, topics, conditional))
    text = page_with(text, "services", lambda lines: merge(lines, services))
    text = page_with(text, "diagnostics", lambda lines: merge(lines, keys, lambda row: True))
    reasons = [(f"`{reason.value}`",) for reason in DropReason]
    text = page_with(text, "reasons", lambda lines: merge(lines, reasons))
    return page_with(
        text, "parameters", lambda lines: [*lines[:2], *("| " + " | ".join(row) + " |" for row in parameters)]
    )


def problems(now: str, wanted: str) -> list[str]:
    """What is wrong with a page, line by line."""
    old, new = now.splitlines(), wanted.splitlines()
    found = [f"missing: {line}" for line in new if line not in old]
    found += [f"no longer so: {line}" for line in old if line not in new]
    found += [f"not described: {line}" for line in new if TODO in line and line in old]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or look at it; 1 if it has to be changed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; 1 and the differences if there are any"
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="the page (docs/node.md)")
    args = parser.parse_args(argv)
    now = args.page.read_text()
    wanted = generate(now)
    if not args.check:
        args.page.write_text(wanted)
        now = wanted
    found = problems(now, wanted)
    if found:
        print(f"{args.page} differs from the node:", *found, sep="\n  ", file=sys.stderr)
        print(
            f"run `python scripts/node_page.py`, then describe the rows that say {TODO!r} in the page",
            file=sys.stderr,
        )
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())

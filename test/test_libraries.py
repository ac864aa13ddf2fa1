"""How a process loads its libraries, and what the numerical ones do with its processors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run(program: str, **environment: str) -> str:
    """What a program of Python prints in a process of its own, with these variables and none of a maker's."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=inherited | environment)
    return done.stdout.strip()


SETTLE = """
import os
from picopose_ros.libraries import settle_threads
os.cpu_count = lambda: {processors}
settle_threads()
"""

COUNT = """
import numpy as np
np.ones((600, 600)) @ np.ones((600, 600))
print(len(os.listdir("/proc/self/task")))
"""

TELL = 'print(os.environ["OPENBLAS_NUM_THREADS"], os.environ.get("OMP_WAIT_POLICY"))'


def test_numpy_has_no_thread_that_waits() -> None:
    assert run(SETTLE.format(processors=2) + COUNT) == "1"


def test_idle_threads_sleep_where_processors_are_few() -> None:
    assert run(SETTLE.format(processors=2) + TELL) == "1 PASSIVE"
    assert run(SETTLE.format(processors=16) + TELL) == "1 None"


def test_the_environment_decides() -> None:
    chosen = {"OPENBLAS_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE"}
    assert run(SETTLE.format(processors=2) + TELL, **chosen) == "3 ACTIVE"


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("picopose_ros.node.__main__", ["--ros-args", "-p", "no parameter"]), ("picopose_ros.cli.main", [])],
)
def test_it_comes_before_numpy(module: str, arguments: list[str]) -> None:
    """A library reads the variables when it is loaded; both programs end at once with these arguments."""
    start = f"""
import os, sys
from contextlib import suppress
from {module} import main
assert "numpy" not in sys.modules
with suppress(SystemExit):
    main({arguments})
"""
    assert run(start + TELL).splitlines()[-1].startswith("1 ")


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("picopose_ros.node.__main__", ["--ros-args", "-p", "no parameter"]),
        ("picopose_ros.cli.main", ["bag", "--help"]),
        ("picopose_ros.demo.__main__", ["--out", "/dev/null/nothing"]),
    ],
)
def test_what_they_import_is_left_out_of_garbage_collection(module: str, arguments: list[str]) -> None:
    start = f"""
import gc
from contextlib import suppress
from {module} import main
with suppress(SystemExit):
    main({arguments})
print(gc.isenabled(), gc.get_freeze_count() > 10_000)
"""
    assert run(start).splitlines()[-1] == "True True"


@pytest.mark.parametrize("name", ["picopose_node", "segmenter_node"])
def test_so_is_what_a_node_imports(name: str) -> None:
    """Without rclpy's start a node can't be made; all that it needs is imported by then."""
    start = f"""
import gc, sys
from contextlib import suppress
from picopose_ros.node.__main__ import _make
with suppress(Exception):
    _make("{name}")
print(gc.isenabled(), "torch" in sys.modules and gc.get_freeze_count() > 100_000)
"""
    assert run(start).splitlines()[-1] == "True True"


def test_nothing_is_collected_while_it_imports() -> None:
    """Also where one import is inside another, or fails; who has switched collection off finds it off."""
    tell = """
import gc
from picopose_ros.libraries import importing
with importing():
    try:
        with importing():
            raise ImportError
    except ImportError:
        print(gc.isenabled())
print(gc.isenabled())
gc.disable()
with importing():
    pass
print(gc.isenabled())
"""
    assert run(tell).split() == ["False", "True", "False"]

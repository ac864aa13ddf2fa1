"""Fixtures that several modules share: a miniature BOP dataset, and what the tests of the node start.

Those have one world for all of them, and one node for each module.

A module says in ``NODE`` with which parameters its node is started, in ``NAMESPACE`` where, and in
``CONNECTED`` whether it listens by itself.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from picopose_ros.libraries import importing

if TYPE_CHECKING:  # everything else is tested without ROS
    from mini_bop import MiniBop
    from node_harness import Client, NodeProcess, Scene


LONG = "soak demo onnx training_loop node_managed bop_run bop_tables fast node_bad_input".split()
"""Files that take longest, so that none of them begins when the other workers have nothing left to do."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Garbage collection leaves out what the test modules import."""
    with importing():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first; within a file the order stays."""
    rank = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the whole run, for what its processes make once, and change no more."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, filled by whichever process comes first, while the others wait."""
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            half = folder.with_suffix(".half")
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir()
            make(half)
            half.rename(folder)
    return folder


@pytest.fixture(scope="session")
def assets(shared: Path) -> dict[str, Path]:
    """Meshes (one of them broken, one with an alias), weights and a cache; parameters of a node."""
    from node_harness import write_meshes, write_weights

    def make(folder: Path) -> None:
        meshes = write_meshes(folder / "meshes")
        (meshes / "crumpled.ply").write_text("ply\nthis is no mesh\n")
        (meshes / "objects.yaml").write_text("can: {class_ids: [tin, '41'], frame_id: tin_can}\n")
        write_weights(folder / "tiny.safetensors")

    folder = made_once(shared / "assets", make)
    return {
        "mesh_dir": folder / "meshes",
        "weights": folder / "tiny.safetensors",
        "cache_dir": folder / "cache",
    }


@pytest.fixture(scope="session")
def scene(assets: dict[str, Path]) -> Scene:
    """A block, a can and another block."""
    from node_harness import make_scene

    return make_scene(assets["mesh_dir"])


@pytest.fixture(scope="module")
def node(
    request: pytest.FixtureRequest, assets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NodeProcess]:
    """The module's node, a process of its own, which must end well."""
    from node_harness import QUICK, next_domain, running_node

    namespace, parameters = request.module.NAMESPACE, request.module.NODE
    folder = tmp_path_factory.mktemp("node")
    with running_node(folder, next_domain(), namespace, **{**QUICK, **assets, **parameters}) as process:
        yield process
        assert process.stop() == 0
        assert "Traceback" not in process.log


@pytest.fixture(scope="module")
def client(request: pytest.FixtureRequest, node: NodeProcess) -> Iterator[Client]:
    """A camera, a segmenter and a listener, connected to the module's node once that is active."""
    from node_harness import Client

    client = Client(node.domain, request.module.NAMESPACE)
    if getattr(request.module, "CONNECTED", True):
        client.wait_until_connected(node)
    yield client
    client.close()


@pytest.fixture(scope="session")
def mini_bop(shared: Path) -> MiniBop:
    """The miniature BOP dataset. Copy what you break."""
    from mini_bop import DETECTIONS, MiniBop, make_mini_bop

    root = made_once(shared / "bop", make_mini_bop)
    return MiniBop(root, root / DETECTIONS)


@pytest.fixture(scope="session")
def mini_cache(shared: Path) -> Path:
    """Where the banks of the miniature dataset's models are kept."""
    return shared / "mini_banks"

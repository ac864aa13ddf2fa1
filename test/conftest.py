"""Fixtures that several modules share: a miniature BOP dataset, and what the tests of the node start.

Those have one world for all of them, and one node for each module.

A module says in ``NODE`` with which parameters its node is started, in ``NAMESPACE`` where, and in
``CONNECTED`` whether it listens by itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from picopose_ros.libraries import importing

if TYPE_CHECKING:  # everything else is tested without ROS
    from mini_bop import MiniBop
    from node_harness import Client, NodeProcess, Scene


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Garbage collection leaves out what the test modules import."""
    with importing():
        return (yield)


@pytest.fixture(scope="session")
def banks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of the whole run: what one of its processes has onboarded the others read."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "banks"


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory, banks: Path) -> dict[str, Path]:
    """Meshes (one of them broken, one with an alias), weights and a cache; parameters of a node."""
    from node_harness import write_meshes, write_weights

    folder = tmp_path_factory.mktemp("assets")
    meshes = write_meshes(folder / "meshes")
    (meshes / "crumpled.ply").write_text("ply\nthis is no mesh\n")
    (meshes / "objects.yaml").write_text("can: {class_ids: [tin, '41'], frame_id: tin_can}\n")
    return {
        "mesh_dir": meshes,
        "weights": write_weights(folder / "tiny.safetensors"),
        "cache_dir": banks / "assets",
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
def mini_bop(tmp_path_factory: pytest.TempPathFactory) -> MiniBop:
    """The miniature BOP dataset. Copy what you break."""
    from mini_bop import make_mini_bop

    return make_mini_bop(tmp_path_factory.mktemp("bop"))


@pytest.fixture(scope="session")
def mini_cache(banks: Path) -> Path:
    """Where the banks of the miniature dataset's models are kept."""
    return banks / "mini"

"""Several cameras: what the launch file starts, and two such nodes on one cache, at once.

PyPI has no launch packages, so recorders stand for them, as in test_launch.py; the nodes are real.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from node_harness import (
    Client,
    NodeProcess,
    Scene,
    make_scene,
    next_domain,
    running_node,
    write_meshes,
    write_weights,
)

from picopose_ros.node.parameters import PARAMETERS
from picopose_ros.node.segmenter_parameters import SEGMENTER_PARAMETERS

ROOT = Path(__file__).resolve().parent.parent
CAMERAS = ("left", "right")


class Recorder:
    """Stands for any class of the launch packages: keeps what it was made with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs

    @property
    def name(self) -> str:
        """Of a DeclareLaunchArgument."""
        return self.args[0]

    def perform(self, context: dict[str, str]) -> str:
        """Of a LaunchConfiguration."""
        return context[self.args[0]]


class Context(dict):
    """Values of the launch arguments, and the words of the command line."""

    argv: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def launch_file() -> Iterator[types.ModuleType]:
    kinds = {
        name: type(name, (Recorder,), {})
        for name in ("Argument", "Function", "Log", "Value", "Node", "Other")
    }
    names = {
        "launch": {"LaunchContext": dict, "LaunchDescription": list},
        "launch.actions": {
            "DeclareLaunchArgument": kinds["Argument"],
            "OpaqueFunction": kinds["Function"],
            "LogInfo": kinds["Log"],
        },
        "launch.substitutions": {"LaunchConfiguration": kinds["Other"]},
        "launch_ros": {},
        "launch_ros.actions": {"Node": kinds["Node"]},
        "launch_ros.parameter_descriptions": {"ParameterValue": kinds["Value"]},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, contents in names.items():
            stand_in = types.ModuleType(name)
            stand_in.__dict__.update(contents)
            patch.setitem(sys.modules, name, stand_in)
        patch.setenv("AMENT_PREFIX_PATH", os.environ.get("AMENT_PREFIX_PATH", sys.prefix))
        path = ROOT / "launch" / "multi_camera.launch.py"
        spec = importlib.util.spec_from_file_location("multi_camera_launch", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def start(module: types.ModuleType, **given: str) -> list[dict[str, Any]]:
    """What each node is given for a command line: namespace, remappings, params_file, parameters."""
    *arguments, function = module.generate_launch_description()
    declared = {a.args[0]: a.kwargs.get("default_value") for a in arguments}
    assert set(given) <= set(declared), "an argument that is not declared"
    context = Context({**declared, **given})

    def value_of(value: Any) -> Any:
        if not isinstance(value, Recorder):
            return value
        text = value.args[0].perform(context) if "value_type" in value.kwargs else value.perform(context)
        return {"true": True, "false": False}[text] if value.kwargs.get("value_type") is bool else text

    nodes = []
    for node in function.kwargs["function"](context, *function.kwargs["args"]):
        assert (node.kwargs["package"], node.kwargs["executable"]) == ("picopose_ros", "picopose_node")
        params_file, parameters = node.kwargs["parameters"]
        nodes.append(
            {
                "namespace": node.kwargs["namespace"],
                "topics": dict(node.kwargs["remappings"]),
                "params_file": value_of(params_file),
                "parameters": {name: value_of(value) for name, value in parameters.items()},
            }
        )
    return nodes


def test_every_camera_has_its_namespace_its_topics_and_its_frames(launch_file) -> None:
    left, right = start(launch_file, cameras="left, right", mesh_dir="2024", use_sim_time="true")
    assert (left["namespace"], right["namespace"]) == ("left", "right")
    assert left["parameters"] == {"mesh_dir": "2024", "use_sim_time": True, "tf_prefix": "left/"}
    assert right["parameters"]["tf_prefix"] == "right/"
    # Relative names: the camera's namespace is before them.
    assert left["topics"] == right["topics"]
    assert left["topics"]["image"] == "image_raw"
    assert not any(topic.startswith("/") for topic in left["topics"].values())
    assert Path(left["params_file"]).name == "picopose.yaml"


def test_topics_elsewhere_are_named_by_a_pattern(launch_file) -> None:
    nodes = start(launch_file, cameras="arm/wrist top", image="/rig/{camera}/color/image_raw")
    images = [node["topics"]["image"] for node in nodes]
    assert images == ["/rig/arm/wrist/color/image_raw", "/rig/top/color/image_raw"]


@pytest.mark.parametrize(
    ("cameras", "message"),
    [
        ("", "is empty"),
        ("left,1", "'1' can't be a namespace"),
        ("a,b,a", "'a' is there twice"),
        ("ä", "can't be"),
    ],
)
def test_names_that_would_not_do_are_refused(launch_file, cameras: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start(launch_file, cameras=cameras)


def test_parameters_exist_in_the_node_and_arguments_are_described(launch_file) -> None:
    known = {spec.name for spec in (*PARAMETERS, *SEGMENTER_PARAMETERS)} | {"use_sim_time"}  # rclpy's own
    assert set(launch_file.PARAMETERS) | {"tf_prefix"} <= known
    (node,) = start(launch_file, cameras="one")
    assert set(yaml.safe_load(Path(node["params_file"]).read_text())["/**"]["ros__parameters"]) <= known
    *arguments, _ = launch_file.generate_launch_description()
    assert all(len(argument.kwargs["description"]) > 10 for argument in arguments)


# Two nodes for real.


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Scene]:
    """Meshes, weights, and a picture of them."""
    folder = tmp_path_factory.mktemp("cell")
    meshes = write_meshes(folder / "meshes")
    return meshes, write_weights(folder / "tiny.safetensors"), make_scene(meshes)


def test_two_nodes_onboard_at_once_into_one_cache_and_do_not_clash_on_tf(
    launch_file, cell: tuple[Path, Path, Scene], tmp_path: Path
) -> None:
    meshes, weights, scene = cell
    cache = tmp_path / "cache"
    decided = start(
        launch_file,
        cameras=",".join(CAMERAS),
        mesh_dir=str(meshes),
        weights=str(weights),
        cache_dir=str(cache),
        device="cpu",
    )
    domain = next_domain()
    with ExitStack() as stack:
        nodes: list[NodeProcess] = [
            stack.enter_context(
                running_node(
                    tmp_path / node["namespace"],
                    domain,
                    f"/{node['namespace']}",
                    viewpoints=42,
                    hypotheses=1,
                    **node["parameters"],
                )
            )
            for node in decided
        ]
        clients = [Client(domain, node.namespace) for node in nodes]
        for client in clients:
            stack.callback(client.close)
        for client, node in zip(clients, nodes):
            client.wait_until_connected(node)

        # Either built an object and kept it, or waited and read it; none is half-written.
        assert len(list(cache.glob("*.safetensors"))) == 2
        assert not list(cache.glob(".*.partial"))
        for node in nodes:
            assert "damaged" not in node.log and "cannot be" not in node.log

        frames = []
        for client in clients:
            answer = client.ask(scene)
            assert [d.id for d in answer.detections] == ["block_0", "can_0", "block_1"]
            frames.append({t.child_frame_id for t in client.transforms(client.stamp_of(answer), 3)})
        assert frames == [
            {f"{camera}/{name}" for name in ("block_0", "can_0", "block_1")} for camera in CAMERAS
        ]
        assert [node.stop() for node in nodes] == [0, 0]

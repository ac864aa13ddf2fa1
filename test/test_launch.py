"""The launch file, without the launch packages (PyPI has none): they are replaced by recorders.

What is checked is what this package decides: which arguments there are, what they turn into, and that every
name in them exists in the node.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from picopose_ros.errors import ConfigError
from picopose_ros.launching import check_parameter_file
from picopose_ros.node.parameters import PARAMETERS
from picopose_ros.node.segmenter_parameters import SEGMENTER_PARAMETERS

ROOT = Path(__file__).resolve().parent.parent


class Recorder:
    """Stands for any class of the launch packages: keeps what it was made with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs


class LaunchConfiguration(Recorder):
    def perform(self, context: dict[str, str]) -> str:
        return context[self.args[0]]


class DeclareLaunchArgument(Recorder):
    @property
    def name(self) -> str:
        return self.args[0]


class LogInfo(Recorder):
    pass


class Context(dict):
    """Values of the launch arguments, and the words of the command line."""

    argv: tuple[str, ...] = ()


class OpaqueFunction(Recorder):
    pass


class ParameterValue(Recorder):
    pass


class Node(Recorder):
    pass


@pytest.fixture
def launch_file(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    names = {
        "launch": {"LaunchContext": dict, "LaunchDescription": list},
        "launch.actions": {
            "DeclareLaunchArgument": DeclareLaunchArgument,
            "OpaqueFunction": OpaqueFunction,
            "LogInfo": LogInfo,
        },
        "launch.conditions": {"IfCondition": Recorder},
        "launch.substitutions": {"LaunchConfiguration": LaunchConfiguration},
        "launch_ros": {},
        "launch_ros.actions": {"Node": Node},
        "launch_ros.parameter_descriptions": {"ParameterValue": ParameterValue},
    }
    for name, contents in names.items():
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("AMENT_PREFIX_PATH", sys.prefix)
    spec = importlib.util.spec_from_file_location("picopose_launch", ROOT / "launch" / "picopose.launch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def resolve(value: Any, context: dict[str, str]) -> Any:
    """What a recorded value stands for once the arguments have values."""
    if isinstance(value, LaunchConfiguration):
        return value.perform(context)
    if isinstance(value, ParameterValue):
        text = resolve(value.args[0], context)
        return {"true": True, "false": False}[text] if value.kwargs["value_type"] is bool else text
    if isinstance(value, Recorder):
        return [resolve(v, context) for v in value.args]
    if isinstance(value, dict):
        return {key: resolve(v, context) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [resolve(v, context) for v in value]
    return value


def actions(module: types.ModuleType, argv: tuple[str, ...] = (), **given: str) -> tuple[list[Any], Context]:
    """What a command line starts, and the values of its arguments."""
    description = module.generate_launch_description()
    declared = [a for a in description if isinstance(a, DeclareLaunchArgument)]
    context = Context({a.args[0]: a.kwargs["default_value"] for a in declared})
    context.argv = argv
    assert set(given) <= set(context), "an argument that is not declared"
    context.update(given)
    (opaque,) = [a for a in description if isinstance(a, OpaqueFunction)]
    return opaque.kwargs["function"](context, *opaque.kwargs["args"]), context


def start(module: types.ModuleType, **given: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments of the two nodes, picopose_node's and rviz2's, for a command line."""
    nodes, context = actions(module, **given)
    picopose, rviz = [resolve(node.kwargs, context) for node in nodes]
    return picopose, rviz


def test_every_argument_is_declared_and_described(launch_file: types.ModuleType) -> None:
    declared = [a for a in launch_file.generate_launch_description() if isinstance(a, DeclareLaunchArgument)]
    assert {a.args[0] for a in declared} == {
        "mesh_dir", "weights", "preset", "device", "namespace", "cache_dir", "respawn",
        "image", "camera_info", "segmentation", "labels",
        "params_file", "use_sim_time", "rviz", "segmentation_input", "mask_class", "image_transport",
        "tf_prefix", "target_frame", "autostart",
        "segmenter", "proposals", "proposal_weights", "proposal_model", "boxes", "depth",
    }  # fmt: skip
    for argument in declared:
        assert len(argument.kwargs["description"]) > 10, argument.args


def test_without_arguments_the_parameter_file_decides(launch_file: types.ModuleType) -> None:
    node, rviz = start(launch_file)
    assert node["package"] == "picopose_ros" and node["executable"] == "picopose_node"
    params_file, overrides = node["parameters"]
    assert overrides == {}
    # Of this source tree, not of whatever is installed.
    source = ROOT / "config" / Path(params_file).name
    parameters = yaml.safe_load(source.read_text())["/**"]["ros__parameters"]
    assert set(parameters) == {spec.name for spec in (*PARAMETERS, *SEGMENTER_PARAMETERS)}
    for spec in SEGMENTER_PARAMETERS:
        assert parameters[spec.name] == spec.default, spec.name
    assert node["namespace"] == ""
    assert all(inner == outer for inner, outer in node["remappings"])
    assert rviz["condition"] == ["false"]


def test_arguments_override_the_parameter_file(
    launch_file: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("picopose_node:\n  ros__parameters:\n    hypotheses: 3\n")
    monkeypatch.setattr(launch_file, "get_package_prefix", lambda name: f"/opt/{name}")
    node, rviz = start(
        launch_file,
        mesh_dir="2024",
        weights="w.safetensors",
        preset="vitl",
        device="cuda:1",
        use_sim_time="true",
        params_file=str(mine),
        namespace="left",
        cache_dir="/cache",
        respawn="true",
        rviz="true",
    )
    params_file, overrides = node["parameters"]
    assert params_file == str(mine)
    assert overrides == {
        "mesh_dir": "2024",  # a string, though YAML would read a number
        "weights": "w.safetensors",
        "preset": "vitl",
        "device": "cuda:1",
        "cache_dir": "/cache",
        "use_sim_time": True,
    }
    assert node["respawn"] == "true"
    assert node["namespace"] == rviz["namespace"] == "left"
    assert rviz["parameters"] == [{"use_sim_time": True}]
    assert rviz["condition"] == ["true"]


def test_rviz_is_looked_for_before_anything_is_started(launch_file: types.ModuleType) -> None:
    # PyPI has no rviz2.
    with pytest.raises(RuntimeError, match="rviz2 isn't installed: sudo apt install ros-"):
        actions(launch_file, rviz="true")


def test_arguments_that_there_are_not_are_named(launch_file: types.ModuleType) -> None:
    nodes, _ = actions(launch_file, ("mesh_dri:=/meshes", "device:=cpu", "colour:=blue", "--noninteractive"))
    said = [one.kwargs["msg"] for one in nodes if isinstance(one, LogInfo)]
    assert len(said) == 2
    assert "no launch argument mesh_dri" in said[0] and "did you mean mesh_dir?" in said[0]
    assert "no launch argument colour" in said[1] and "--show-args" in said[1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("/**:\n  ros__parameters: {unit: mm}\n", None),
        ("/left/picopose_node:\n  ros__parameters: {unit: mm}\n", None),
        ("left:\n  picopose_node:\n    ros__parameters: {unit: mm}\n", None),
        ("picopose:\n  ros__parameters: {unit: mm}\n", "has no section for picopose_node (it has: picopose)"),
        ("unit: mm\n", "has no section for picopose_node (it has: none)"),
    ],
)
def test_a_parameter_file_for_another_node_is_named(tmp_path: Path, text: str, says: str | None) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    said = check_parameter_file(path)
    assert [says in sentence for sentence in said] == ([] if says is None else [True])


def test_a_parameter_file_that_can_not_be_read_starts_nothing(
    launch_file: types.ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="nowhere.yaml can't be read"):
        actions(launch_file, params_file=str(tmp_path / "nowhere.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="broken.yaml is not valid YAML"):
        actions(launch_file, params_file=str(tmp_path / "broken.yaml"))


def test_a_segmenter_beside_the_node(launch_file: types.ModuleType) -> None:
    given = {"mesh_dir": "meshes", "target_frame": "base", "proposals": "sam", "image": "/cam"}
    nodes, context = actions(launch_file, segmenter="true", **given)
    node, segmenter, _ = [resolve(one.kwargs, context) for one in nodes]
    assert (node["executable"], segmenter["executable"]) == ("picopose_node", "segmenter_node")
    assert node["parameters"][1] == {"mesh_dir": "meshes", "target_frame": "base"}
    assert segmenter["parameters"][1] == {"mesh_dir": "meshes", "segmenter.proposals": "sam"}
    assert node["parameters"][0] == segmenter["parameters"][0]
    remapped = dict(segmenter["remappings"])
    assert remapped["image"] == "/cam" and {"boxes", "depth", "segmentation"} <= set(remapped)
    known = {spec.name for spec in SEGMENTER_PARAMETERS}
    assert {parameter for parameter, _ in launch_file.SEGMENTER.values()} <= known
    assert set(launch_file.SHARED) - {"use_sim_time"} <= known & {spec.name for spec in PARAMETERS}

    nodes, context = actions(launch_file, segmenter="same_process", **given)
    both, _ = [resolve(one.kwargs, context) for one in nodes]
    assert both["executable"] == "picopose_with_segmenter" and "name" not in both
    assert both["parameters"][1]["segmenter.proposals"] == "sam"
    with pytest.raises(RuntimeError, match="segmenter:=yes: use one of false, true, same_process"):
        actions(launch_file, segmenter="yes")


def test_parameters_exist_in_the_node(launch_file: types.ModuleType) -> None:
    # rclpy itself declares use_sim_time.
    assert set(launch_file.PARAMETERS) - {"use_sim_time"} <= {spec.name for spec in PARAMETERS}


def test_topics_are_remapped_for_the_node_and_for_rviz(launch_file: types.ModuleType) -> None:
    topics = {"image": "/cam/image_raw", "camera_info": "/cam/camera_info", "segmentation": "/masks"}
    node, rviz = start(launch_file, **topics)
    assert {inner: outer for inner, outer in node["remappings"]} == {
        **topics,
        "labels": "labels",
        "depth": "depth",
    }
    assert node["remappings"] == rviz["remappings"]


def test_rviz_shows_what_the_node_takes_and_sends(launch_file: types.ModuleType) -> None:
    _, rviz = start(launch_file)
    flag, config = rviz["arguments"]
    assert flag == "-d"
    displays = yaml.safe_load(Path(config).read_text())["Visualization Manager"]["Displays"]
    topics = {display["Topic"]["Value"] for display in displays if "Topic" in display}
    assert topics == {"image", "overlay", "markers", "detections"}
    assert "rviz_default_plugins/TF" in {display["Class"] for display in displays}

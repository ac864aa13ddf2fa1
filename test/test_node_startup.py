"""How the node starts, or refuses to, and how it stops."""

from __future__ import annotations

import gc
import logging
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import rclpy
from node_harness import (
    DEADLINE,
    QUICK,
    Client,
    NodeProcess,
    Scene,
    camera_message,
    image_message,
    local_node,
    next_domain,
    running_node,
)
from rclpy.context import Context
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter

from picopose_ros.errors import ConfigError
from picopose_ros.model import PicoPose, preset, save_model
from picopose_ros.node import transforms
from picopose_ros.node.parameters import (
    PARAMETERS,
    Changeable,
    NodeParameters,
    declare_parameters,
    read_parameters,
)
from picopose_ros.node.segmenter_parameters import SEGMENTER_PARAMETERS

# Parameters, on a node of this process.


def declare(**values: object) -> NodeParameters:
    context = Context()
    rclpy.init(context=context, domain_id=next_domain())
    try:
        node = rclpy.create_node(
            "parameters",
            context=context,
            parameter_overrides=[Parameter(name, value=value) for name, value in values.items()],
        )
        declare_parameters(node)
        return read_parameters(node)
    finally:
        context.shutdown()


def test_defaults_are_usable_once_there_is_a_mesh_dir() -> None:
    parameters = declare(mesh_dir="~/meshes")
    parameters.check()
    assert parameters.mesh_dir == Path.home() / "meshes"
    assert parameters.weights is None
    assert parameters.cache_dir is None
    assert parameters.viewpoints == 162
    assert not parameters.smoothing.enabled


def test_the_configuration_is_told_with_what_is_not_the_default() -> None:
    lines = declare(mesh_dir="/meshes", publish_tf=False).text().splitlines()
    assert len(lines) == len(PARAMETERS)
    assert [line for line in lines if line.endswith("(set)")] == [
        "  mesh_dir: /meshes  (set)",
        "  publish_tf: false  (set)",
    ]


def test_the_yaml_file_holds_every_parameter_with_its_default() -> None:
    import yaml

    path = Path(__file__).parents[1] / "config" / "picopose.yaml"
    values = yaml.safe_load(path.read_text())["/**"]["ros__parameters"]
    assert values == {spec.name: spec.default for spec in (*PARAMETERS, *SEGMENTER_PARAMETERS)}


def test_every_parameter_says_what_it_is_and_when_it_may_be_set() -> None:
    for spec in PARAMETERS:
        descriptor = spec.descriptor()
        assert len(descriptor.description) > 10, spec.name
        assert spec.changeable.value in descriptor.additional_constraints, spec.name
        assert descriptor.read_only == (spec.changeable is Changeable.AT_START), spec.name
        number = not isinstance(spec.default, str | bool)
        ranged = bool(descriptor.integer_range or descriptor.floating_point_range)
        assert not number or ranged or spec.choices, spec.name


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"unit": "furlong"}, "unit is 'furlong': it must be one of m, mm, cm, in"),
        ({"preset": "huge"}, "preset is 'huge'"),
        ({"viewpoints": 100}, "viewpoints is 100: it must be one of 42, 162, 642"),
        ({"hypotheses": 0}, "hypotheses"),
        ({"min_score": 1.5}, "min_score"),
        ({"min_score": float("nan")}, "min_score"),
        ({"buffer_seconds": "long"}, "buffer_seconds"),
        ({"image_reliability": "perfect"}, "image_reliability is 'perfect'"),
        ({"segmentation_input": "colours"}, "it must be one of segments, detections, boxes, yolo, mask"),
        ({"tf_prefix": "/left"}, "tf_prefix is '/left': TF frames have no leading slash"),
        ({"target_frame": "/base"}, "target_frame is '/base'"),
    ],
)
def test_bad_values_name_the_parameter(values: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        declare(mesh_dir="/m", **values)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({}, "mesh_dir is empty"),
        ({"mesh_dir": "/m", "segmentation_input": "mask"}, "mask_class is empty"),
        ({"mesh_dir": "/m", "fuse_views": 5}, "fuse_views is 5, which needs target_frame"),
    ],
)
def test_what_is_missing_is_named(values: dict[str, object], match: str) -> None:
    parameters = declare(**values)
    with pytest.raises(ConfigError, match=match):
        parameters.check()


# Configurations that are refused, by a node of this process.


def refusal(**parameters: object) -> str:
    """Why a node can't be configured; it must be unconfigured after that."""
    with local_node(**parameters) as node:
        assert node.trigger_configure() == TransitionCallbackReturn.FAILURE
        assert node.state == "unconfigured"
        assert node.failure.startswith("configure failed: ")
        assert "Traceback" not in node.failure
        return node.failure


def test_an_empty_mesh_dir_is_refused(tmp_path: Path, assets: dict[str, Path]) -> None:
    reason = refusal(**{**assets, "mesh_dir": tmp_path})
    assert f"mesh directory {tmp_path} holds no mesh" in reason


def truncated(weights: Path, path: Path) -> None:
    content = weights.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def pickled(_: Path, path: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": {"weight": Path("/")}}))


def of_another_preset(_: Path, path: Path) -> None:
    save_model(PicoPose(preset("tiny")), path, metadata={"preset": "vitl"})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (truncated, "is not a complete .safetensors file"),
        (pickled, "is not a torch checkpoint that can be used"),
        (of_another_preset, "was made for preset 'vitl', not for 'tiny'"),
    ],
)
def test_weights_that_can_not_be_used_are_refused(
    tmp_path: Path, assets: dict[str, Path], spoil: Callable[[Path, Path], None], says: str
) -> None:
    bad = tmp_path / "bad.safetensors"
    spoil(assets["weights"], bad)
    reason = refusal(**{**assets, "weights": bad})
    assert str(bad) in reason
    assert says in reason


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"device": "warp:7"}, "parameter device is 'warp:7'"),
        ({"compile": "warp"}, "compile is 'warp', choose one of"),
        (
            {"segmentation_input": "mask", "mask_class": "fork"},
            "no object is called that; onboarded are 41, block, can, tin",
        ),
    ],
)
def test_configurations_that_can_not_work_are_refused(
    assets: dict[str, Path], parameters: dict[str, object], says: str
) -> None:
    assert says in refusal(**{**assets, **parameters})


def test_a_target_frame_without_tf2_ros_is_refused(
    assets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transforms, "tf2_ros", None)  # as where it isn't installed
    reason = refusal(**assets, target_frame="base_link")
    assert "target_frame is 'base_link', but the Python package tf2_ros isn't installed here" in reason


# What the life cycle does to a node of this process.


def test_what_is_loaded_is_gone_after_cleanup_and_can_be_loaded_again(assets: dict[str, Path]) -> None:
    with local_node(**assets) as node:
        for _ in range(2):
            assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
            model = weakref.ref(node._engine._model)
            bank = weakref.ref(node._engine.objects.banks["block"])
            worker = node._worker
            assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
            assert node.trigger_deactivate() == TransitionCallbackReturn.SUCCESS
            assert model() is not None and bank() is not None and worker.alive
            assert node.trigger_cleanup() == TransitionCallbackReturn.SUCCESS
            assert node.state == "unconfigured"
            gc.collect()
            assert model() is None and bank() is None and not worker.alive


def test_what_the_package_says_is_in_the_nodes_log(
    assets: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Also what is neither warning nor error, such as how many threads the network has."""
    with local_node(**assets):
        logging.getLogger("picopose_ros.somewhere").info("2 of them")
        logging.getLogger("picopose_ros.somewhere").debug("every one of them")
    logging.getLogger("picopose_ros.somewhere").info("nobody listens")
    told = capfd.readouterr().err
    assert "[INFO]" in told and "[picopose_node]: 2 of them" in told
    assert "every one of them" not in told and "nobody listens" not in told


@pytest.mark.parametrize(
    "transitions", [[], ["configure"], ["configure", "activate"], ["configure", "shutdown"]]
)
def test_it_can_be_closed_in_every_state(assets: dict[str, Path], transitions: list[str]) -> None:
    with local_node(**assets) as node:
        for transition in transitions:
            assert getattr(node, f"trigger_{transition}")() == TransitionCallbackReturn.SUCCESS
        assert node.close(DEADLINE)
        assert node.state == "finalized"


def test_closing_interrupts_a_configuration(assets: dict[str, Path], tmp_path: Path) -> None:
    with local_node(**{**assets, "cache_dir": tmp_path}) as node:  # nothing is onboarded
        results: list[TransitionCallbackReturn] = []
        thread = threading.Thread(target=lambda: results.append(node.trigger_configure()))
        thread.start()
        while node.state != "configuring" or node._worker is None:
            assert thread.is_alive()
            time.sleep(0.001)
        assert node.close(DEADLINE)
        thread.join(DEADLINE)
        assert results == [TransitionCallbackReturn.FAILURE]
        assert node.state == "finalized"


def test_an_error_halfway_leaves_it_unconfigured_with_the_reason(
    assets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with local_node(**assets) as node:
        node.trigger_configure()
        node.trigger_activate()

        def fail(_: float) -> None:
            raise RuntimeError("the worker has gone astray")

        worker = node._worker
        monkeypatch.setattr(worker, "drain", fail)
        assert node.trigger_deactivate() == TransitionCallbackReturn.ERROR
        assert node.state == "unconfigured"
        assert "the worker has gone astray" in node.failure
        assert not worker.alive


def test_a_qos_override_that_can_not_be_used_keeps_it_inactive(assets: dict[str, Path]) -> None:
    override = {"qos_overrides./image.subscription.reliability": "perfect"}
    with local_node(**assets, **override) as node:
        assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
        assert node.trigger_activate() == TransitionCallbackReturn.FAILURE
        assert node.state == "inactive"
        assert "qos_overrides./image" in node.failure
        assert node.count_subscribers("/camera_info") == 0


# Stopping.


def start(folder: Path, assets: dict[str, Path], domain: int) -> AbstractContextManager[NodeProcess]:
    return running_node(
        folder / "node", domain, "/cell", **QUICK, **{**assets, "cache_dir": folder / "cache"}
    )


def test_no_camera_info_then_one_then_sigint_twice(
    tmp_path: Path, assets: dict[str, Path], scene: Scene
) -> None:
    domain = next_domain()
    with start(tmp_path, assets, domain) as node:
        client = Client(domain, "/cell")
        try:
            client.wait_until_connected(node)
            stamp = client.next_stamp()
            for _ in range(30):
                client.image.publish(image_message(scene.rgb, stamp))
                client.send_segments(scene.segments, stamp)
            values = client.diagnostic_values(
                lambda v: int(v["dropped_no_camera_info"]), "the missing camera_info"
            )
            assert "no camera_info has come" in values["last_no_camera_info"]
            client.camera_info.publish(camera_message(stamp))
            assert len(client.ask(scene).detections) == 3
            assert node.lines("no_camera_info") == 1

            # While it is at work, and again while it cleans up.
            client.send_segments(scene.segments, client.send_frame(scene))
            node.process.send_signal(signal.SIGINT)
            node.process.send_signal(signal.SIGINT)
            assert node.wait() == 0
            assert "Traceback" not in node.log
        finally:
            client.close()


def test_sigint_while_unconfigured_is_a_clean_stop(tmp_path: Path) -> None:
    with running_node(tmp_path / "node", next_domain(), "/cell", autostart=False, min_scor=0.5) as node:
        node.wait_for_log("waiting for `ros2 lifecycle set /cell/picopose_node configure`")
        assert "there is no parameter min_scor" in node.log and "did you mean min_score?" in node.log
        node.process.send_signal(signal.SIGINT)
        assert node.wait() == 0
        assert "Traceback" not in node.log


def test_whole_numbers_are_taken_for_real_ones(assets: dict[str, Path]) -> None:
    with local_node(**assets, min_score=0, instance_distance=2) as node:
        assert node.get_parameter("min_score").value == 0.0
        (result,) = node.set_parameters([Parameter("min_score", value=1)])
        assert result.successful and node.get_parameter("min_score").value == 1.0
        (result,) = node.set_parameters([Parameter("hypotheses", value=2.0)])
        assert not result.successful


def test_a_parameter_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "picopose_ros.node", "--ros-args"]
    command += ["--params-file", str(tmp_path / "nowhere.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 1
    assert "nowhere.yaml" in done.stderr and "Traceback" not in done.stderr


def test_sigterm_while_loading_is_a_clean_stop(tmp_path: Path, assets: dict[str, Path]) -> None:
    with start(tmp_path, assets, next_domain()) as node:
        node.wait_for_log("loading tiny on cpu")
        node.process.send_signal(signal.SIGTERM)
        assert node.wait() == 0
        assert "ready" not in node.log
        assert "Traceback" not in node.log

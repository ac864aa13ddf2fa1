"""How the node starts, or refuses to, and how it stops."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import rclpy
from node_harness import (
    Client,
    NodeProcess,
    Scene,
    camera_message,
    image_message,
    make_scene,
    next_domain,
    running_node,
    write_meshes,
    write_weights,
)
from rclpy.context import Context
from rclpy.parameter import Parameter

from picopose_ros.errors import ConfigError
from picopose_ros.model import PicoPose, preset, save_model
from picopose_ros.node.parameters import PARAMETERS, declare_parameters


@pytest.fixture(scope="module")
def meshes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_meshes(tmp_path_factory.mktemp("meshes"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def scene(meshes: Path) -> Scene:
    return make_scene(meshes)


# Parameters, on a node of this process.


def declare(**values: object) -> object:
    context = Context()
    rclpy.init(context=context, domain_id=next_domain())
    try:
        node = rclpy.create_node(
            "parameters",
            context=context,
            parameter_overrides=[Parameter(name, value=value) for name, value in values.items()],
        )
        return declare_parameters(node)
    finally:
        context.shutdown()


def test_defaults_are_usable_once_there_is_a_mesh_dir() -> None:
    parameters = declare(mesh_dir="~/meshes")
    assert parameters.mesh_dir == Path.home() / "meshes"
    assert parameters.weights is None
    assert parameters.cache_dir is None
    assert parameters.viewpoints == 162


def test_the_yaml_file_holds_every_parameter_with_its_default() -> None:
    import yaml

    path = Path(__file__).parents[1] / "config" / "picopose.yaml"
    values = yaml.safe_load(path.read_text())["/**"]["ros__parameters"]
    assert values == {spec.name: spec.default for spec in PARAMETERS}


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({}, "mesh_dir is empty"),
        ({"mesh_dir": "/m", "unit": "furlong"}, "unit is 'furlong': it must be one of m, mm, cm, in"),
        ({"mesh_dir": "/m", "preset": "huge"}, "preset is 'huge'"),
        ({"mesh_dir": "/m", "viewpoints": 100}, "viewpoints is 100: it must be one of 42, 162, 642"),
        ({"mesh_dir": "/m", "hypotheses": 0}, "hypotheses"),
        ({"mesh_dir": "/m", "min_score": 1.5}, "min_score"),
        ({"mesh_dir": "/m", "buffer_seconds": "long"}, "buffer_seconds"),
        ({"mesh_dir": "/m", "image_reliability": "perfect"}, "image_reliability is 'perfect'"),
    ],
)
def test_bad_values_name_the_parameter(values: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        declare(**values)


# Refusals of the whole node.


def refused(folder: Path, **parameters: object) -> str:
    """The log of a node that does not start."""
    with running_node(
        folder / "node", next_domain(), "/cell", device="cpu", viewpoints=42, **parameters
    ) as node:
        assert node.wait() == 1
        assert "Traceback" not in node.log
        assert "ready" not in node.log
        assert node.log.count("[FATAL]") == 1
        return node.log


def test_an_empty_mesh_dir_is_fatal(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "meshes").mkdir()
    log = refused(tmp_path, mesh_dir=tmp_path / "meshes", weights=weights)
    assert f"mesh directory {tmp_path / 'meshes'} holds no mesh" in log


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
        (pickled, "is not unpickled for safety"),
        (of_another_preset, "was made for preset 'vitl', not for 'tiny'"),
    ],
)
def test_weights_that_can_not_be_used_are_fatal(
    tmp_path: Path, meshes: Path, weights: Path, spoil: Callable[[Path, Path], None], says: str
) -> None:
    bad = tmp_path / "bad.safetensors"
    spoil(weights, bad)
    log = refused(tmp_path, mesh_dir=meshes, weights=bad)
    assert str(bad) in log
    assert says in log


def test_a_device_that_is_not_there_is_fatal(tmp_path: Path, meshes: Path, weights: Path) -> None:
    with running_node(tmp_path / "node", next_domain(), "/cell", mesh_dir=meshes, device="warp:7") as node:
        assert node.wait() == 1
        assert "parameter device is 'warp:7'" in node.log
        assert "Traceback" not in node.log


# Stopping.


def start(folder: Path, meshes: Path, weights: Path, domain: int) -> NodeProcess:
    return running_node(
        folder / "node",
        domain,
        "/cell",
        mesh_dir=meshes,
        weights=weights,
        cache_dir=folder / "cache",
        device="cpu",
        viewpoints=42,
        hypotheses=1,
    )


def test_no_camera_info_then_one_then_sigint_twice(
    tmp_path: Path, meshes: Path, weights: Path, scene: Scene
) -> None:
    domain = next_domain()
    with start(tmp_path, meshes, weights, domain) as node:
        client = Client(domain, "/cell")
        try:
            client.wait_until_connected(node)
            stamp = client.next_stamp()
            for _ in range(30):
                client.image.publish(image_message(scene.rgb, stamp))
                client.send_segments(scene.segments, stamp)
            values = client.diagnostic_values(
                lambda v: "dropped_no_camera_info" in v, "the missing camera_info"
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


def test_sigterm_while_loading_is_a_clean_stop(tmp_path: Path, meshes: Path, weights: Path) -> None:
    with start(tmp_path, meshes, weights, next_domain()) as node:
        node.wait_for_log("loading tiny on cpu")
        node.process.send_signal(signal.SIGTERM)
        assert node.wait() == 0
        assert "ready" not in node.log
        assert "Traceback" not in node.log

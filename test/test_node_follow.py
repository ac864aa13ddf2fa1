"""Following over DDS: images without masks are answered, late masks, loss, recovery and reset."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trimesh
from node_harness import (
    HEIGHT,
    WIDTH,
    Client,
    K,
    NodeProcess,
    Scene,
    next_domain,
    running_node,
)
from std_srvs.srv import Trigger
from vision_msgs.msg import Detection3DArray

from picopose_ros.segmentation import Segment
from picopose_ros.templates.meshes import discover_objects, load_object
from picopose_ros.templates.renderer import MeshRenderer

NAMESPACE = "/follow"


class Film:
    """Blocks that move in front of a wall."""

    def __init__(self, mesh_dir: Path) -> None:
        self._mesh = next(load_object(s) for s in discover_objects(mesh_dir) if s.class_id == "block")
        self._wall = np.random.default_rng(6).integers(60, 120, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        self._renderer = MeshRenderer()

    def scene(self, *xs: float) -> Scene:
        """Blocks with their middles at these places, 0.45 m away."""
        rgb, segments = self._wall.copy(), []
        for x in xs:
            T_cam_obj = trimesh.transformations.rotation_matrix(0.7, [1, 2, 0.5])
            T_cam_obj[:3, 3] = [x, 0.0, 0.45]
            view = self._renderer.render(self._mesh, T_cam_obj, K, WIDTH, HEIGHT)
            rgb[view.mask] = view.rgb[view.mask]
            segments.append(Segment("block", 0.9, view.mask))
        return Scene(rgb, segments)


@pytest.fixture(scope="module")
def film(assets: dict[str, Path]) -> Film:
    return Film(assets["mesh_dir"])


@pytest.fixture(scope="module")
def node(assets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    folder = tmp_path_factory.mktemp("follow")
    (folder / "meshes").mkdir()
    shutil.copy(assets["mesh_dir"] / "block.ply", folder / "meshes")
    parameters = {
        "device": "cpu",
        "viewpoints": 42,
        "hypotheses": 3,
        "mesh_dir": folder / "meshes",
        "cache_dir": folder / "cache",
        "follow": True,
        "instance_timeout": 5.0,
    }
    with running_node(folder, next_domain(), NAMESPACE, **parameters) as process:
        yield process
        assert process.stop() == 0
        assert "Traceback" not in process.log


def positions(answer: Detection3DArray) -> dict[str, float]:
    """By id, x in metres."""
    return {one.id: one.results[0].pose.pose.position.x for one in answer.detections}


def test_images_without_masks_are_answered(client: Client, film: Film) -> None:
    first = client.ask(film.scene(-0.05, 0.08))
    names = list(positions(first))
    assert names == ["block_0", "block_1"]
    for n in range(1, 4):
        stamp = client.send_frame(film.scene(-0.05 + 0.004 * n, 0.08))
        answer = client.detections(stamp)
        assert list(positions(answer)) == names
        moved = positions(answer)["block_0"] - positions(first)["block_0"]
        assert moved == pytest.approx(0.004 * n, abs=0.008)
        assert [t.child_frame_id for t in client.transforms(stamp, 2)] == names
    values = client.diagnostic_values(lambda v: "block_1: " in v["following"], "what is followed")
    assert values["following"].startswith("block_0: followed since ")


def test_a_late_mask_names_and_adds_and_tf_never_goes_back(client: Client, film: Film) -> None:
    """Of an image before those that were answered meanwhile; a third block is new in it."""
    known = client.ask(film.scene(-0.05, 0.08))
    late = client.send_frame(film.scene(-0.05, 0.08))
    client.detections(late)
    newest = client.send_frame(film.scene(-0.05, 0.08))
    client.detections(newest)
    client.send_segments(film.scene(-0.05, 0.08).segments[::-1], late)
    client.diagnostic_values(lambda v: v["following"].count(f"mask {late * 1e-9:.3f}") == 2, "the masks")
    after = client.send_frame(film.scene(-0.05, 0.08))
    answer = client.detections(after)
    assert positions(answer).keys() == positions(known).keys()
    for name, x in positions(answer).items():
        assert x == pytest.approx(positions(known)[name], abs=0.02)
    assert client.answers[late] == client.answers[newest] == 1
    assert not [one for stamp in (late, newest) for one in client.transforms(stamp, 2)[2:]]


def test_what_is_gone_is_not_published_and_found_again(client: Client, film: Film) -> None:
    client.ask(film.scene(0.0))
    # Two tries: the second image comes after the first was answered.
    for _ in range(2):
        client.detections(client.send_frame(film.scene(0.0)))
    lost = client.detections(client.send_frame(film.scene()))
    client.diagnostic_values(lambda v: "lost since" in v["following"], "the loss")
    assert not lost.detections
    back = client.detections(client.send_frame(film.scene(0.0)))
    assert len(back.detections) >= 1


def test_reset_forgets_all(client: Client, film: Film) -> None:
    client.ask(film.scene(0.0))
    response = client.call("reset", Trigger)
    assert response.success and "block_0" in response.message
    silent = client.send_frame(film.scene(0.0))
    assert list(positions(client.ask(film.scene(-0.05, 0.08)))) == ["block_0", "block_1"]
    assert not client.answered(silent)


def test_switched_off_images_without_masks_are_not_answered(client: Client, film: Film) -> None:
    client.ask(film.scene(0.0))
    assert client.set_parameter("follow", False) == (True, "")
    silent = client.send_frame(film.scene(0.0))
    client.ask(film.scene(0.0))
    assert not client.answered(silent)
    assert client.set_parameter("follow", True) == (True, "")

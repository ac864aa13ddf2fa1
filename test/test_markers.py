"""Markers for RViz: of the real meshes, in metres, and gone with their instances."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trimesh
import yaml
from rclpy.serialization import deserialize_message, serialize_message
from std_msgs.msg import Header
from visualization_msgs.msg import Marker, MarkerArray

from picopose_ros.estimator import ObjectPose
from picopose_ros.instances import InstanceNamer
from picopose_ros.instances.overlay import palette
from picopose_ros.node.markers import clearing_markers, marker_array, mesh_resources
from picopose_ros.templates.meshes import ObjectSpec, discover_objects

HEADER = Header(frame_id="camera_optical")


def pose(class_id: str, x: float = 0.0) -> ObjectPose:
    T = np.eye(4)
    T[:3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    T[:3, 3] = [x, -0.2, 0.9]
    return ObjectPose(
        class_id=class_id,
        T_cam_obj=T,
        confidence=0.75,
        covariance=np.eye(6),
        source="offsets",
        segment=0,
        segment_score=0.9,
        template=3,
        inliers=40,
        inlier_ratio=0.5,
        match_score=0.8,
        bbox_centre=np.array([0.05, 0.0, 0.0]),
        bbox_size=np.array([0.3, 0.4, 0.0]),
    )


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ObjectSpec]:
    folder = tmp_path_factory.mktemp("a folder")  # with a space
    box = trimesh.creation.box((60, 80, 100))
    box.export(folder / "plain.stl")
    box.export(folder / "red mug.glb")
    box.export(folder / "grey.ply")
    box.export(folder / "bare.obj")
    (folder / "part").mkdir()
    plain = (folder / "bare.obj").read_text()
    (folder / "part" / "any_name.obj").write_text("mtllib paint.mtl\n" + plain)
    (folder / "part" / "paint.mtl").write_text("newmtl red\nKd 1 0 0\n")
    (folder / "lost.obj").write_text("mtllib nowhere.mtl\n" + plain)
    (folder / "objects.yaml").write_text("red mug: {unit: mm}\npart: {unit: in}\nplain: {unit: cm}\n")
    return {spec.class_id: spec for spec in discover_objects(folder)}


def over_the_wire(message: MarkerArray) -> list[Marker]:
    return deserialize_message(serialize_message(message), MarkerArray).markers


def test_each_instance_is_its_mesh_and_its_name(specs: dict[str, ObjectSpec]) -> None:
    named = InstanceNamer().update(0.0, [pose("red mug"), pose("red mug", 0.4), pose("plain")])
    markers = over_the_wire(marker_array(named, [], HEADER, mesh_resources(specs)))
    meshes = [marker for marker in markers if marker.type == Marker.MESH_RESOURCE]
    assert [(marker.ns, marker.id) for marker in meshes] == [("red mug", 0), ("red mug", 1), ("plain", 0)]
    mug, _, plain = meshes
    assert mug.header == HEADER
    assert mug.action == Marker.ADD
    assert mug.mesh_resource == specs["red mug"].path.as_uri()
    assert mug.mesh_resource.startswith("file:///") and "red%20mug.glb" in mug.mesh_resource
    assert (mug.scale.x, mug.scale.y, mug.scale.z) == (0.001,) * 3
    p, q = mug.pose.position, mug.pose.orientation
    assert (p.x, p.y, p.z) == (0.0, -0.2, 0.9)
    np.testing.assert_allclose([q.x, q.y, q.z, q.w], [0, 0, 0.5**0.5, 0.5**0.5])
    # Its own colours, untinted; STL has none, and black would come of a colour of zeros.
    assert mug.mesh_use_embedded_materials and mug.color.a == 0
    assert not plain.mesh_use_embedded_materials
    red, green, blue = palette(sorted(specs).index("plain"))
    np.testing.assert_allclose(
        [plain.color.r, plain.color.g, plain.color.b, plain.color.a],
        [red / 255, green / 255, blue / 255, 1],
        atol=1e-6,
    )
    labels = [marker for marker in markers if marker.type == Marker.TEXT_VIEW_FACING]
    assert [label.text for label in labels] == ["red mug_0 0.75", "red mug_1 0.75", "plain_0 0.75"]
    # Over the box's middle: 5 cm along the object's x, which is the camera's y; 25 cm is half its diagonal.
    at = labels[0].pose.position
    np.testing.assert_allclose([at.x, at.y, at.z], [0, -0.15 - 0.25 - labels[0].scale.z, 0.9])
    assert len({(marker.ns, marker.id) for marker in markers}) == len(markers)


def test_what_rviz_can_colour_keeps_its_colours(specs: dict[str, ObjectSpec]) -> None:
    resources = mesh_resources(specs)
    assert {name: one.materials for name, one in resources.items()} == {
        "plain": False,
        "red mug": True,
        "grey": False,
        "bare": False,
        "lost": False,
        "part": True,
    }
    assert {name: one.scale for name, one in resources.items()} == {
        "plain": 0.01,
        "red mug": 0.001,
        "grey": 1.0,
        "bare": 1.0,
        "lost": 1.0,
        "part": 0.0254,
    }


@pytest.mark.parametrize(
    ("asset", "scale"),
    [
        ('<unit name="centimeter" meter="0.01"/>', 0.1),
        ("<unit meter='0.001' name='mm'/>", 1.0),
        ("", 0.001),
        ('<unit name="odd" meter="x"/>', 0.001),
    ],
)
def test_collada_brings_a_unit_that_rviz_applies_itself(tmp_path: Path, asset: str, scale: float) -> None:
    path = tmp_path / "thing.dae"
    path.write_text(f'<?xml version="1.0"?><COLLADA><asset>{asset}<up_axis>Z_UP</up_axis></asset></COLLADA>')
    (resource,) = mesh_resources({"thing": ObjectSpec("thing", path, "mm")}).values()
    assert resource.scale == pytest.approx(scale)


def test_markers_go_with_their_instances(specs: dict[str, ObjectSpec]) -> None:
    namer, resources = InstanceNamer(timeout=1.0), mesh_resources(specs)
    namer.update(0.0, [pose("plain"), pose("red mug", 0.4), pose("part", 0.8)])
    # The first is gone, the second was replaced by another one of the same name, the third is there.
    named = namer.update(1.5, [pose("part", 0.8), pose("red mug", -0.4)])
    retired = namer.retired()
    assert sorted(retired) == ["plain_0", "red mug_0"]
    markers = over_the_wire(marker_array(named, retired, HEADER, resources))
    deleted = {(marker.ns, marker.id) for marker in markers if marker.action == Marker.DELETE}
    added = {(marker.ns, marker.id) for marker in markers if marker.action == Marker.ADD}
    assert deleted == {("plain", 0), ("labels/plain", 0)}
    assert added == {("part", 0), ("labels/part", 0), ("red mug", 0), ("labels/red mug", 0)}


def test_a_class_without_mesh_has_its_name_alone() -> None:
    (marker,) = marker_array(InstanceNamer().update(0.0, [pose("box")]), [], HEADER, {}).markers
    assert marker.type == Marker.TEXT_VIEW_FACING


def test_all_can_be_deleted_at_once() -> None:
    (marker,) = over_the_wire(clearing_markers(HEADER))
    assert marker.action == Marker.DELETEALL and marker.ns == ""


def test_the_rviz_file_shows_image_overlay_frames_and_markers() -> None:
    config = yaml.safe_load((Path(__file__).parents[1] / "config" / "picopose.rviz").read_text())
    shown = {
        (display["Class"].split("/")[1], display.get("Topic", {}).get("Value"))
        for display in config["Visualization Manager"]["Displays"]
        if display["Enabled"]
    }
    assert shown == {("TF", None), ("MarkerArray", "markers"), ("Image", "overlay"), ("Image", "image")}

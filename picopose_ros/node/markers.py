"""Instances as RViz markers: the mesh that the poses are of, and a name beside it. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from std_msgs.msg import ColorRGBA, Header
from visualization_msgs.msg import Marker, MarkerArray

from picopose_ros.instances import NamedPose
from picopose_ros.instances.overlay import palette
from picopose_ros.node.conversions import pose_to_message
from picopose_ros.templates.meshes import ObjectSpec, collada_unit, referenced_files

LABELS = "labels/"
"""Namespace of the names is this and the class; that of the meshes is the class alone."""

_WITH_MATERIALS = (".glb", ".gltf", ".dae")
_LETTERS = (0.015, 0.06)


@dataclass(frozen=True)
class MeshResource:
    """How RViz gets at a mesh.

    Attributes:
        uri: ``file://`` and the path, percent-encoded.
        scale: metres per unit in which RViz shows the file.
        materials: the file brings colours that RViz can show; else ``colour`` is taken.
        colour: RGB 0..255, as in the overlay.
    """

    uri: str
    scale: float
    materials: bool
    colour: tuple[int, int, int]


def mesh_resources(specs: Mapping[str, ObjectSpec]) -> dict[str, MeshResource]:
    """The meshes of objects by class id.

    RViz reads files by assimp, in the units of their numbers except for COLLADA, whose own unit it applies.
    It shows materials and textures, but no colours of vertices (PLY, OFF), and none at all of STL.

    Raises:
        MeshError: a mesh can't be read.
    """
    resources = {}
    for index, class_id in enumerate(sorted(specs)):
        spec = specs[class_id]
        suffix = spec.path.suffix.lower()
        scale = spec.metres_per_unit
        if suffix == ".dae":
            scale /= collada_unit(spec.path)
        materials = suffix in _WITH_MATERIALS or any(file.is_file() for file in referenced_files(spec.path))
        resources[class_id] = MeshResource(spec.path.absolute().as_uri(), scale, materials, palette(index))
    return resources


def marker_array(
    named: Sequence[NamedPose],
    retired: Sequence[str],
    header: Header,
    mesh_resources: Mapping[str, MeshResource],
) -> MarkerArray:
    """Markers of one image's instances; those of retired ones are deleted.

    Args:
        named: all instances of the image.
        retired: names of instances that are gone.
        header: the image's.
        mesh_resources: by class id; an instance of another class has its name alone.
    """
    here = {one.name for one in named}
    markers = []
    for name in retired:
        if name in here:  # it is somebody else's already: one message must not hold two of the same marker
            continue
        for namespace in ("", LABELS):
            marker = _marker(header, name, namespace)
            marker.action = Marker.DELETE
            markers.append(marker)
    for one in named:
        if one.pose.class_id in mesh_resources:
            markers.append(_mesh(one, header, mesh_resources[one.pose.class_id]))
        markers.append(_label(one, header))
    return MarkerArray(markers=markers)


def clearing_markers(header: Header) -> MarkerArray:
    """Deletes every marker of the topic, also those of a node that was killed before this one started."""
    return MarkerArray(markers=[Marker(header=header, action=Marker.DELETEALL)])


def _marker(header: Header, name: str, namespace: str) -> Marker:
    class_id, number = name.rsplit("_", 1)
    return Marker(header=header, ns=namespace + class_id, id=int(number))


def _mesh(one: NamedPose, header: Header, resource: MeshResource) -> Marker:
    marker = _marker(header, one.name, "")
    marker.type, marker.action = Marker.MESH_RESOURCE, Marker.ADD
    marker.mesh_resource = resource.uri
    marker.mesh_use_embedded_materials = resource.materials
    marker.pose = pose_to_message(one.pose.T_cam_obj)
    marker.scale.x = marker.scale.y = marker.scale.z = resource.scale
    if not resource.materials:  # with them a colour of zeros means: as they are
        red, green, blue = (value / 255 for value in resource.colour)
        marker.color = ColorRGBA(r=red, g=green, b=blue, a=1.0)
    return marker


def _label(one: NamedPose, header: Header) -> Marker:
    marker = _marker(header, one.name, LABELS)
    marker.type, marker.action = Marker.TEXT_VIEW_FACING, Marker.ADD
    marker.text = f"{one.name} {one.pose.confidence:.2f}"
    size = float(np.linalg.norm(one.pose.bbox_size))
    marker.scale.z = float(np.clip(0.2 * size, *_LETTERS))
    T = np.eye(4)
    T[:3, 3] = one.pose.T_cam_obj[:3, :3] @ one.pose.bbox_centre + one.pose.T_cam_obj[:3, 3]
    T[1, 3] -= size / 2 + marker.scale.z  # up in the image
    marker.pose = pose_to_message(T)
    marker.color = ColorRGBA(r=1.0, g=1.0, b=1.0, a=1.0)
    return marker

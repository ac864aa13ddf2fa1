"""Objects and images that several parts measure on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from measure import Options

from picopose_ros.demo.objects import write_meshes
from picopose_ros.evaluation.scenes import Scene, make_scenes
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.model import PicoPose
from picopose_ros.segmentation import Segment
from picopose_ros.templates.bank import Onboarding, onboard
from picopose_ros.templates.meshes import ObjectMesh, load_object

Image = tuple[np.ndarray, CameraModel, Sequence[Segment]]


def demo_meshes(options: Options) -> Path:
    """The demo's objects as mesh files."""
    folder = options.folder / "meshes"
    if not (folder / "objects.yaml").is_file():  # written last
        write_meshes(folder)
    return folder


def onboarded(options: Options, model: PicoPose) -> Onboarding:
    """The banks of the demo's objects."""
    views = 42 if options.quick else 162
    return onboard(
        demo_meshes(options), model, views, cache_dir=options.folder / "cache", device=options.device
    )


def load_scenes(options: Options, found: Onboarding, count: int) -> tuple[dict[str, ObjectMesh], list[Scene]]:
    """The objects' meshes by class, and rendered scenes of one object each."""
    meshes = {name: load_object(found.specs[name]) for name in sorted(found.banks)}
    return meshes, [s for s in make_scenes(list(meshes.values()), count, 11) if s.instances]


def image_of(scene: Scene) -> Image:
    """A scene as the estimator's arguments, with the true masks."""
    return scene.rgb, scene.camera, [Segment(one.class_id, 1.0, one.visible) for one in scene.instances]


def hypotheses_text(count: int) -> str:
    """1 hypothesis, 5 hypotheses."""
    return f"{count} hypothes{'i' if count == 1 else 'e'}s"

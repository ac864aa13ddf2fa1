"""Scenes in which the image's border cuts the object: those of `SingleScenes`, made smaller on one side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from picopose_ros.evaluation.single import SingleScenes
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.synthetic.studio import Scene
from picopose_ros.templates.meshes import ObjectMesh
from picopose_ros.templates.renderer import MeshRenderer

CUT = (0.05, 0.65)
"""Share of what is seen of the object, along the image's axis, that is cut off."""

_CUTS = 20_261
"""Keeps these random numbers apart from all others of a scene."""


class CutScenes:
    """Makes the scenes; arguments as those of `SingleScenes`."""

    def __init__(
        self, renderer: MeshRenderer, objects: Sequence[ObjectMesh], background: bool = True
    ) -> None:
        self._singles = SingleScenes(renderer, objects, background)

    def scene(self, seed: int, index: int) -> Scene:
        """The scene ``index`` of a seed."""
        whole = self._singles.scene(seed, index)
        name = f"cut-{seed}-{index:05d}"
        if not whole.instances:
            return replace(whole, name=name)
        rng = np.random.default_rng([seed, index, _CUTS])
        share, axis, far = rng.uniform(*CUT), int(rng.integers(2)), bool(rng.integers(2))
        seen = np.flatnonzero(whole.instances[0].visible.any(1 - axis))
        first, last = int(seen[0]), int(seen[-1]) + 1
        kept = [slice(0, size) for size in whole.depth.shape]
        if far:
            kept[axis] = slice(0, last - round(share * (last - first)))
        else:
            kept[axis] = slice(first + round(share * (last - first)), kept[axis].stop)
        rows, columns = kept
        K = whole.camera.K.copy()
        K[:2, 2] -= columns.start, rows.start
        camera = CameraModel(K, columns.stop - columns.start, rows.stop - rows.start)
        instances = []
        for one in whole.instances:
            visible = np.ascontiguousarray(one.visible[rows, columns])
            left = visible.sum() / one.visible.sum()
            instances.append(replace(one, visible=visible, visib_fract=float(one.visib_fract * left)))
        rgb, depth = (np.ascontiguousarray(image[rows, columns]) for image in (whole.rgb, whole.depth))
        return Scene(name, rgb, depth, camera, tuple(instances))

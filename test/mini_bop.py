"""A miniature BOP dataset of rendered scenes, laid out as the real ones are.

Three objects whose numbers have gaps as LM-O's have: a can (turns about its axis look the same), a cereal box
(half a turn counts as the same) and a drill. Scene 2 is in colour (PNG and JPEG), scene 48 gray (TIFF).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import trimesh
from scipy.spatial.distance import pdist

from picopose_ros.demo.objects import OBJECTS, can
from picopose_ros.segmentation import mask_roi, rle_encode
from picopose_ros.templates.renderer import MeshRenderer

NAME = "mini"
DETECTIONS = "cnos_mini.json"
WIDTH, HEIGHT = 320, 240
K = np.array([[360.0, 0.0, 158.5], [0.0, 360.0, 121.5], [0.0, 0.0, 1.0]])
DEPTH_SCALE = 0.1
"""Millimetres per step of the depth images."""

CAN, BOX, DRILL = 1, 5, 8
SCENES = {2: (3, 7, 11), 48: (0, 1, 2)}
"""Scene -> images."""
SUFFIXES = {(2, 3): "rgb/{:06d}.png", (2, 7): "rgb/{:06d}.jpg", (2, 11): "rgb/{:06d}.png"}
UNSEEN = (48, 1)
"""The image in which nothing was detected."""
UNDETECTED = (2, 11, DRILL)
"""Scene, image and object that is asked for, but of whose class nothing was detected."""
TWICE = (48, 2, DRILL)
"""Scene, image and object of which two instances are asked for."""

_GAPS = 6.0  # edges of the meshes, mm: colours are per vertex


@dataclass(frozen=True)
class MiniBop:
    """Where the dataset lies.

    Attributes:
        root: holds the dataset's folder `NAME`. detections: CNOS's file for it.
    """

    root: Path
    detections: Path
    name: str = NAME

    @property
    def folder(self) -> Path:
        """The dataset's own folder."""
        return self.root / self.name


def make_mini_bop(root: Path) -> MiniBop:
    """Write the dataset and its detections; the same ones every time."""
    folder = root / NAME
    models = {CAN: can(), BOX: OBJECTS["cereal_box"].make(), DRILL: OBJECTS["drill"].make()}
    meshes = {number: _coloured(parts) for number, parts in models.items()}
    shapes = {number: trimesh.util.concatenate([_bare(part) for part in p]) for number, p in models.items()}
    _write_models(folder, meshes, shapes)
    detections: list[dict[str, Any]] = []
    targets: list[dict[str, int]] = []
    with MeshRenderer() as renderer:
        for scene, images in SCENES.items():
            files: dict[str, dict[str, Any]] = {
                name: {} for name in ("scene_camera", "scene_gt", "scene_gt_info")
            }
            for image in images:
                truths = _poses(scene, image)
                found = _write_image(folder / "test" / f"{scene:06d}", scene, image, truths, meshes, renderer)
                for name, content in zip(files, found[:3]):
                    files[name][str(image)] = content
                detections += _detections(scene, image, truths, found[3])
                numbers = [number for number, _ in truths]
                targets += [
                    {
                        "im_id": image,
                        "inst_count": numbers.count(number),
                        "obj_id": number,
                        "scene_id": scene,
                    }
                    for number in sorted(set(numbers))
                ]
            for name, content in files.items():
                (folder / "test" / f"{scene:06d}" / f"{name}.json").write_text(json.dumps(content))
    (folder / "test_targets_bop19.json").write_text(json.dumps(targets))
    made = MiniBop(root, root / DETECTIONS)
    made.detections.write_text(json.dumps(detections))
    return made


def _coloured(parts: list[trimesh.Trimesh]) -> trimesh.Trimesh:
    """One mesh in metres with a colour per vertex."""
    fine = []
    for part in parts:
        while part.edges_unique_length.max() > _GAPS / 1000.0:
            part = part.subdivide(np.flatnonzero(_longest(part) > _GAPS / 1000.0))
        fine.append(_bare(part))
        fine[-1].visual.vertex_colors = part.visual.to_color().vertex_colors
    return trimesh.util.concatenate(fine)


def _bare(part: trimesh.Trimesh) -> trimesh.Trimesh:
    return trimesh.Trimesh(part.vertices, part.faces, process=False)


def _longest(mesh: trimesh.Trimesh) -> np.ndarray:
    return mesh.edges_unique_length[mesh.faces_unique_edges].max(axis=1)


def _write_models(
    folder: Path, meshes: dict[int, trimesh.Trimesh], shapes: dict[int, trimesh.Trimesh]
) -> None:
    """The evaluation models have the shape only, and few vertices, as BOP's."""
    infos = {}
    for number, mesh in meshes.items():
        scaled = mesh.copy()
        scaled.apply_scale(1000.0)
        low, high = scaled.bounds
        corners = scaled.convex_hull.vertices
        infos[str(number)] = {
            "diameter": float(pdist(corners).max()),
            **{f"min_{axis}": float(value) for axis, value in zip("xyz", low)},
            **{f"size_{axis}": float(value) for axis, value in zip("xyz", high - low)},
        }
        shape = shapes[number].copy()
        shape.apply_scale(1000.0)
        for name, kept in (("models", scaled), ("models_eval", shape)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            kept.export(folder / name / f"obj_{number:06d}.ply")
    infos[str(CAN)]["symmetries_continuous"] = [{"axis": [0, 0, 1], "offset": [0, 0, 0]}]
    low, high = meshes[BOX].bounds * 1000.0
    half_turn = np.diag([-1.0, -1.0, 1.0, 1.0])
    half_turn[:2, 3] = (low + high)[:2]
    infos[str(BOX)]["symmetries_discrete"] = [half_turn.ravel().tolist()]
    for name in ("models", "models_eval"):
        (folder / name / "models_info.json").write_text(json.dumps(infos))


def _poses(scene: int, image: int) -> list[tuple[int, np.ndarray]]:
    """(object, T_cam_obj in metres) of every instance; neighbours overlap a little."""
    rng = np.random.default_rng([scene, image])
    numbers = [CAN, BOX, DRILL] if (scene, image) != TWICE[:2] else [CAN, DRILL, DRILL]
    if (scene, image) == (2, 7):
        numbers = [BOX, CAN]
    poses = []
    for place, number in enumerate(numbers):
        T = trimesh.transformations.random_rotation_matrix(rng.uniform(size=3))
        distance = rng.uniform(0.75, 0.95)
        T[:3, 3] = distance * np.array([0.25 * (place - 1), rng.uniform(-0.05, 0.05), 1.0])
        poses.append((number, T))
    return poses


def _write_image(
    folder: Path,
    scene: int,
    image: int,
    truths: list[tuple[int, np.ndarray]],
    meshes: dict[int, trimesh.Trimesh],
    renderer: MeshRenderer,
) -> tuple[Any, Any, Any, list[np.ndarray]]:
    """Write an image, its depth and masks; its entries of the JSON files and what is visible of each."""
    view = renderer.render_scene([([meshes[number]], T) for number, T in truths], K, WIDTH, HEIGHT)
    rng = np.random.default_rng([scene, image, 1])
    coarse = rng.uniform(0, 255, (8, 10, 3)).astype(np.float32)
    back = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC).clip(0, 255)
    picture = np.where(view.mask[..., None], view.rgb, back.astype(np.uint8))
    form = SUFFIXES.get((scene, image), "gray/{:06d}.tif")
    coded = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY if form.startswith("gray") else cv2.COLOR_RGB2BGR)
    _imwrite(folder / form.format(image), coded)
    steps = np.round(view.depth * 1000.0 / DEPTH_SCALE).astype(np.uint16)
    _imwrite(folder / "depth" / f"{image:06d}.png", steps)
    poses, infos, visibles = [], [], []
    for k, (number, T) in enumerate(truths):
        alone = renderer.render([meshes[number]], T, K, WIDTH, HEIGHT)
        visible = alone.mask & (view.depth >= alone.depth - 1e-4)
        for name, mask in (("mask", alone.mask), ("mask_visib", visible)):
            _imwrite(folder / name / f"{image:06d}_{k:06d}.png", mask.astype(np.uint8) * 255)
        poses.append(
            {
                "obj_id": number,
                "cam_R_m2c": T[:3, :3].ravel().tolist(),
                "cam_t_m2c": (1000.0 * T[:3, 3]).tolist(),
            }
        )
        infos.append(
            {
                "bbox_obj": list(mask_roi(alone.mask) or (-1, -1, -1, -1)),
                "bbox_visib": list(mask_roi(visible) or (-1, -1, -1, -1)),
                "px_count_all": int(alone.mask.sum()),
                "px_count_valid": int(alone.mask.sum()),
                "px_count_visib": int(visible.sum()),
                "visib_fract": float(visible.sum() / alone.mask.sum()),
            }
        )
        visibles.append(visible)
    camera = {"cam_K": K.ravel().tolist(), "depth_scale": DEPTH_SCALE}
    return camera, poses, infos, visibles


def _imwrite(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


def _detections(
    scene: int, image: int, truths: list[tuple[int, np.ndarray]], visibles: list[np.ndarray]
) -> list[dict[str, Any]]:
    """As CNOS writes them, the true masks: with a weaker double of the first, and one without a score."""
    if (scene, image) == UNSEEN:
        return []
    entries = []
    for k, ((number, _), visible) in enumerate(zip(truths, visibles)):
        if (scene, image, number) != UNDETECTED:
            entries.append(_detection(scene, image, number, 0.9 - 0.1 * k, visible))
    first = visibles[0].copy()
    first[: HEIGHT // 2] = False
    entries.append(_detection(scene, image, truths[0][0], 0.3, first))
    entries.append(_detection(scene, image, truths[0][0], 0.0, visibles[-1]))
    return entries


def _detection(scene: int, image: int, number: int, score: float, mask: np.ndarray) -> dict[str, Any]:
    return {
        "scene_id": scene,
        "image_id": image,
        "category_id": number,
        "bbox": list(mask_roi(mask) or (0, 0, 0, 0)),
        "score": score,
        "time": 0.2,
        "segmentation": {"counts": rle_encode(mask), "size": [HEIGHT, WIDTH]},
    }

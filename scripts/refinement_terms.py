#!/usr/bin/env python3
"""What each term of refinement brings, one left out at a time, and how large its errors are.

    scripts/refinement_terms.py MESHES [--scenes 48] [--rounds 2] [--seed 5] [--weights FILE]

Poses near the truth (3 degrees, 2 % of the depth) of rendered scenes are refined: with true masks, with masks
as a segmenter makes them, and with a depth image as of a stereo camera. Prints a table in Markdown, what all
measurements of a term are off by at the true poses, and the factor that
`picopose_ros.estimation.evidence.Weights.covariance` should have. No templates are needed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import torch
from scipy.spatial.transform import Rotation
from scipy.stats import chi2

from picopose_ros.estimation.evidence import Weights
from picopose_ros.estimation.passes import Network
from picopose_ros.estimation.refine_step import RIM, Look, Step, refine_step
from picopose_ros.evaluation.metrics import ADD_SHARES, pose_errors
from picopose_ros.evaluation.report import table
from picopose_ros.evaluation.scenes import Scene, SceneInstance, make_scenes
from picopose_ros.geometry.covariance import pose_error
from picopose_ros.geometry.depth import reliable_depth
from picopose_ros.geometry.least_squares import Edges, Prior, Reprojections, moved, solve
from picopose_ros.model import load_model
from picopose_ros.synthetic.disturbances import degrade_mask
from picopose_ros.templates.meshes import ObjectMesh, discover_objects, load_object
from picopose_ros.templates.posed import PosedView, PosedViews

_NOTHING = 1e12
"""So many measurements count as one: the term says nothing."""

VARIANTS: dict[str, Weights] = {
    "all terms": Weights(),
    "without contour": replace(Weights(), edges_together=_NOTHING),
    "without regions": replace(Weights(), regions_together=_NOTHING),
    "correspondences only": replace(Weights(), edges_together=_NOTHING, regions_together=_NOTHING),
    "without correspondences": replace(Weights(), pairs_together=_NOTHING),
}


def start_pose(T_cam_obj: np.ndarray, mesh: ObjectMesh, rng: np.random.Generator) -> np.ndarray:
    """A pose near the true one."""
    turn = rng.normal(size=3)
    turn *= np.radians(3 * abs(rng.normal())) / np.linalg.norm(turn)
    centre = T_cam_obj[:3, :3] @ mesh.centre + T_cam_obj[:3, 3]
    # About the object's centre, not about the mesh's origin.
    arm = centre - T_cam_obj[:3, 3]
    swing = arm - Rotation.from_rotvec(turn).apply(arm)
    return moved(T_cam_obj, np.concatenate([swing + 0.02 * rng.normal() * centre, turn]))


def sensed(depth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A depth image (H, W), m, as a stereo camera gives it of a true one; 0 where it finds nothing.

    Noise that grows with the squared distance and is alike over some pixels (RealSense D435: about 2 mm at
    1 m), one error of scale for the whole image, and holes: at edges and in patches.
    """

    def smooth(sigma: float) -> np.ndarray:
        noise = cv2.GaussianBlur(rng.normal(size=depth.shape), (0, 0), sigma)
        return noise / noise.std()

    found = depth * (1 + 0.002 * rng.normal()) + (0.001 + 0.002 * depth**2) * smooth(1.5)
    step = cv2.morphologyEx(depth, cv2.MORPH_GRADIENT, np.ones((5, 5), np.uint8)) > 0.02
    return np.where((depth > 0) & ~step & (smooth(8.0) < 1.3), found, 0).astype(np.float32)


def refined(
    network: Network,
    views: PosedViews,
    scene: Scene,
    one: SceneInstance,
    start: np.ndarray,
    mask: np.ndarray,
    depth: np.ndarray | None,
    weights: Weights,
    rounds: int,
) -> Step | None:
    """The last of some rounds; None where one fails."""
    T, step, K = start, None, scene.camera.K
    for number in range(rounds):
        (view,) = views.render([(one.class_id, T)])
        if not isinstance(view, PosedView):
            return None
        shown = view.silhouette(K, *mask.shape) if number else mask
        look = Look(view, T, shown, mask, depth=depth, rim=RIM if number else 0.0)
        (step,) = refine_step(network, scene.rgb, K, [look], True, weights)
        if step is None:
            return None
        T = step.T_cam_obj
    return step


def common_errors(step: Step, truth: np.ndarray) -> dict[str, float]:
    """Per term what all its measurements are off by at the true pose (4, 4): px, or the flow's share.

    The term's common unknown is solved for with next to nothing known of it, and the pose held.
    """
    held = Prior(truth, 1e-12 * np.eye(6))
    found = {}
    for name, term in step.terms.items():
        if isinstance(term, Reprojections):
            unit, free = 1.0, replace(term, scale_sigma=1.0, scale_freedom=np.inf)
        elif isinstance(term, Edges):
            unit, free = 100.0, replace(term, growth_sigma=100.0, growth_freedom=np.inf)
        else:
            continue
        solution = solve(truth, {"held": held, name: free})
        if solution is not None:
            found[name] = unit * float(solution.modes[name][0])
    return found


def row(name: str, found: list[tuple[float, float, float] | None]) -> list[str]:
    """Recalls, of all poses, and medians, of those that were refined."""
    there = np.array([one for one in found if one is not None])
    shares = (f"{(there[:, 0] < most).sum() / len(found):.2f}" for most in reversed(ADD_SHARES.values()))
    rotation, depth = np.median(there[:, 1]), np.median(there[:, 2])
    return [name, str(len(found)), *shares, f"{rotation:.2f}", f"{100 * depth:.2f} %"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("meshes", type=Path, help="folder with meshes that the network was not trained on")
    parser.add_argument("--scenes", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--weights", type=Path)
    args = parser.parse_args()
    meshes = {spec.class_id: load_object(spec) for spec in discover_objects(args.meshes)}
    model = load_model(args.preset, args.weights)
    shading = model.config.template_shading
    views = PosedViews({n: SimpleNamespace(spec=m.spec, shading=shading) for n, m in meshes.items()})
    network = Network(model, {}, torch.device("cpu"))
    runs = [(masks, name) for masks in ("true masks", "degraded masks") for name in VARIANTS]
    runs += [(masks, "with a depth image") for masks in ("true masks", "degraded masks")]
    found: dict[tuple[str, str], list] = {run: [] for run in [("", "as they start"), *runs]}
    whitened: list[float] = []
    commons: dict[tuple[str, str], list[float]] = {}
    for index, scene in enumerate(make_scenes(list(meshes.values()), args.scenes, args.seed)):
        for one in scene.instances:
            mesh, truth = meshes[one.class_id], one.T_cam_obj
            rng = np.random.default_rng([args.seed, index])
            start = start_pose(truth, mesh, rng)
            loose = degrade_mask(one.visible.astype(np.uint8), rng).astype(bool)
            measured = sensed(scene.depth, rng)

            def errors(T: np.ndarray, truth: np.ndarray = truth, mesh: ObjectMesh = mesh) -> tuple:
                off = pose_errors(mesh.vertices, mesh.diameter, T, truth)
                centre = np.append(mesh.centre, 1.0)
                depth = float((T @ centre)[2] / (truth @ centre)[2])
                return off.add / off.diameter, off.rotation_deg, abs(depth - 1)

            found["", "as they start"].append(errors(start))
            for masks, name in runs:
                mask = one.visible if masks == "true masks" else loose
                depth = reliable_depth(measured, mask) if name == "with a depth image" else None
                weights = VARIANTS.get(name, Weights())
                step = refined(network, views, scene, one, start, mask, depth, weights, args.rounds)
                found[masks, name].append(None if step is None else errors(step.T_cam_obj))
                if step is not None and name == "all terms" and found[masks, name][-1][0] < 0.2:
                    off = pose_error(step.T_cam_obj, truth)
                    whitened.append(off @ np.linalg.solve(step.covariance / weights.covariance, off))
                    for term, common in common_errors(step, truth).items():
                        commons.setdefault((masks, term), []).append(common)
    head = ["", "poses", "ADD < .1 d", "< .05 d", "< .02 d", "rotation, median deg", "depth off, median"]
    print(table(head, [row(", ".join(filter(None, run)), some) for run, some in found.items()]))
    head = ["off at the true pose", "poses", "median", "of its size: median", "90 %"]
    rows = []
    for (masks, term), some in commons.items():
        unit, times = (" %", 100) if term == "pairs" else (" px", 1)
        sizes = [np.median(some), *np.quantile(np.abs(some), [0.5, 0.9])]
        rows.append([f"{masks}, {term}", str(len(some)), *(f"{times * v:.2f}{unit}" for v in sizes)])
    print("\n" + table(head, rows))
    factor = np.quantile(whitened, 0.95) / chi2.ppf(0.95, 6)
    print(f"covariance {factor:.1f} (now {Weights().covariance}): 95 % of {len(whitened)} poses lie inside")


if __name__ == "__main__":
    main()

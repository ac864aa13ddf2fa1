"""What settings cost in accuracy and bring in time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from inputs import hypotheses_text, image_of, load_scenes, onboarded
from measure import Found, Options, Table, Times

from picopose_ros.estimator import EstimatorSettings, PoseEstimator
from picopose_ros.evaluation.metrics import (
    MISSING,
    VsdScorer,
    bop_errors,
    bop_recalls,
    bop_symmetries,
    evaluation_points,
    pose_errors,
)
from picopose_ros.model import load_model
from picopose_ros.templates.renderer import MeshRenderer


def accuracy(options: Options) -> Found:
    """What hypotheses, refinement, precision and pruning cost and bring."""
    model = load_model("tiny", device=options.device)
    found = onboarded(options, model)
    meshes, scenes = load_scenes(options, found, 2 if options.quick else 36)
    normal = EstimatorSettings()
    raw = replace(normal, refinements=0)
    variants = {
        f"the default: {hypotheses_text(normal.hypotheses)}, {normal.refinements} rounds": normal,
        "1 hypothesis": replace(normal, hypotheses=1),
        "3 hypotheses": replace(normal, hypotheses=3),
        "5 hypotheses": replace(normal, hypotheses=5),
        "1 round": replace(normal, refinements=1),
        "fp32": replace(normal, precision="fp32"),
        "bf16": replace(normal, precision="bf16"),
        "not refined": raw,
        "5 hypotheses, not refined": replace(raw, hypotheses=5),
        "5 hypotheses, not refined, prune 1": replace(raw, hypotheses=5, prune=1),
    }
    if options.device != "cpu":
        variants["fp16"] = replace(normal, precision="fp16")
    if options.quick:
        variants = dict(list(variants.items())[:2])
    estimators = {name: PoseEstimator(model, found.banks, s, options.device) for name, s in variants.items()}
    errors: dict[str, list] = {name: [] for name in variants}
    off: dict[str, list[float]] = {name: [] for name in variants}  # ADD in diameters
    taken: dict[str, list[float]] = {name: [] for name in variants}
    points = {name: evaluation_points(mesh) for name, mesh in meshes.items()}
    with MeshRenderer() as renderer:
        for scene in scenes:
            (one,) = scene.instances
            mesh = meshes[one.class_id]
            symmetries = bop_symmetries(mesh.spec.symmetries)
            scorer = VsdScorer(renderer, mesh, one.T_cam_obj, scene.depth, scene.camera.K)
            own = points[one.class_id]
            for name, estimator in estimators.items():
                poses = estimator.estimate(*image_of(scene)).poses
                result = estimator.estimate(*image_of(scene))  # with known templates
                taken[name].append(result.timings["total"])
                if not poses:
                    errors[name].append(MISSING)
                    off[name].append(np.inf)
                    continue
                T = poses[0].T_cam_obj
                truth, K, width = one.T_cam_obj, scene.camera.K, scene.camera.width
                errors[name].append(
                    bop_errors(own.extreme, mesh.diameter, T, truth, symmetries, K, width, scorer)
                )
                add = pose_errors(own.surface, mesh.diameter, T, truth, symmetries).add
                off[name].append(add / mesh.diameter)
    base = next(iter(variants))
    median = {name: Times(tuple(times)).median for name, times in taken.items()}
    recall = {name: bop_recalls(found_errors)["ar"] for name, found_errors in errors.items()}
    rows = [
        [
            name,
            f"{100 * recall[name]:.1f}",
            f"{100 * (recall[name] - recall[base]):+.1f}",
            *(f"{100 * np.mean(np.less(off[name], share)):.1f}" for share in (0.1, 0.05, 0.02)),
            f"{median[name]:.0f}",
            f"{median[base] / median[name]:.2f}",
        ]
        for name in variants
    ]
    note = (
        f"`tiny`, packaged weights, {len(scenes)} rendered scenes of the demo's objects, true masks; AR is "
        "the mean of BOP's three average recalls. Every scene goes through all settings one after the other. "
        f"A pose more or less is {100 / max(len(scenes), 1):.1f} points of ADD. docs/accuracy.md has more."
    )
    head = ["", "AR", "less the first", "ADD(-S) < .1 d", "< .05 d", "< .02 d", "ms, median", "times as fast"]
    return Found({}, [Table("Accuracy against time", head, rows, note)])

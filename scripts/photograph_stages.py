#!/usr/bin/env python3
"""What each stage costs on photographs: the truth in the place of one stage's answer, or of several.

    scripts/photograph_stages.py DIR [--mask-noise] [--weights FILE] [--cache-dir DIR] [--viewpoints N]

Every ``manifest.json`` below DIR is a list of views: ``image`` and ``mask`` (files beside the manifest),
``meshes`` (a folder there, "meshes" if not said), ``unit`` of the meshes, ``object`` (the name of its mesh),
``K`` (3, 3), ``T_cam_obj_gt`` (4, 4, metres; a view without one is left out) and ``symmetric`` (ADD-S instead
of ADD). One hypothesis, not refined, as in *What limits it* of docs/accuracy.md. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from picopose_ros.errors import ConfigError, PicoPoseError
from picopose_ros.estimator import EstimatorSettings, PoseEstimator
from picopose_ros.evaluation.benchmark import Benchmark
from picopose_ros.evaluation.figures import bottleneck
from picopose_ros.evaluation.objects import OTHER_MESHES, ObjectFacts
from picopose_ros.evaluation.records import Record
from picopose_ros.evaluation.report import table
from picopose_ros.evaluation.scenes import Scene, SceneInstance
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.model import load_model
from picopose_ros.model.checkpoint import weights_path
from picopose_ros.templates.bank import onboard
from picopose_ros.templates.meshes import ObjectMesh, load_object
from picopose_ros.templates.renderer import MeshRenderer


def read_views(root: Path) -> dict[tuple[Path, str], list[dict[str, Any]]]:
    """The views below a folder that have a reference pose, by folder of meshes and their unit.

    Raises:
        ConfigError: no view, or a manifest that can't be read; names the file.
    """
    found = defaultdict(list)
    for manifest in sorted(root.rglob("manifest.json")):
        try:
            for view in json.loads(manifest.read_text()):
                if view["T_cam_obj_gt"] is not None:
                    place = manifest.parent / view.get("meshes", "meshes")
                    files = {name: manifest.parent / view[name] for name in ("image", "mask")}
                    found[place, view["unit"]].append({**view, **files})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{manifest}: not a list of views ({error!r})") from error
    if not found:
        raise ConfigError(f"no view with a reference pose in a manifest.json below {root}")
    return dict(found)


def scene_of(view: dict[str, Any], mesh: ObjectMesh, renderer: MeshRenderer) -> Scene:
    """A photograph as the benchmark wants it: the mesh, rendered at the reference pose, gives the depth.

    Raises:
        ConfigError: an image or a mask that can't be read, or two of different size.
    """
    bgr, mask = cv2.imread(str(view["image"])), cv2.imread(str(view["mask"]), cv2.IMREAD_GRAYSCALE)
    if bgr is None or mask is None or mask.shape != bgr.shape[:2]:
        raise ConfigError(f"{view['image']}, {view['mask']}: not an image and a mask of its size")
    rgb = np.ascontiguousarray(bgr[..., ::-1])
    height, width = mask.shape
    T_cam_obj, camera = np.array(view["T_cam_obj_gt"], float), CameraModel(np.array(view["K"]), width, height)
    drawn = renderer.render(mesh, T_cam_obj, camera.K, width, height)
    share = float((drawn.mask & (mask > 0)).sum() / max(drawn.mask.sum(), 1))
    instance = SceneInstance(view["object"], T_cam_obj, mask > 0, share)
    return Scene(str(view["image"]), rgb, np.where(mask > 0, drawn.depth, 0), camera, (instance,))


def measured(root: Path, args: argparse.Namespace) -> tuple[list[Record], list[Record]]:
    """Records of views whose mesh has colours, and of those of folders called ``grey``."""
    model = load_model("tiny", weights_path("tiny", args.weights))
    coloured, grey = [], []
    with MeshRenderer() as renderer:
        for (folder, unit), views in read_views(root).items():
            onboarding = onboard(
                folder, model, args.viewpoints, unit, args.cache_dir, torch.device("cpu"), False, None
            )
            names = sorted({view["object"] for view in views} & set(onboarding.banks))
            meshes = {name: load_object(onboarding.specs[name]) for name in names}
            symmetric = {view["object"] for view in views if view.get("symmetric")}
            facts = {
                name: ObjectFacts(name, OTHER_MESHES, False, 1.0, mesh.diameter, name in symmetric)
                for name, mesh in meshes.items()
            }
            settings = replace(EstimatorSettings(), hypotheses=1, refinements=0)
            estimator = PoseEstimator(model, onboarding.banks, settings, torch.device("cpu"))
            benchmark = Benchmark(estimator, meshes, facts, 0, renderer, args.mask_noise)
            for index, view in enumerate(views):
                if view["object"] in meshes:
                    benchmark.add(index, scene_of(view, meshes[view["object"]], renderer))
            (grey if folder.name == "grey" else coloured).extend(benchmark.records)
    return coloured, grey


def report(groups: dict[str, Sequence[Record]]) -> str:
    """The tables: truth in place of stages, and end-point errors of the template nearest to the truth."""
    groups = {name: records for name, records in groups.items() if records}
    shares = {name: bottleneck(records) for name, records in groups.items()}
    rows = [[what, *(f"{shares[name][what]:.2f}" for name in groups)] for what in next(iter(shares.values()))]
    for stage in ("1", "2", "3"):
        rows.append([f"end-point error of stage {stage}, median, px"])
        for records in groups.values():
            errors = [r.given.endpoints[stage] for r in records if r.given and stage in r.given.endpoints]
            rows[-1].append(f"{np.median(np.concatenate(errors)):.2f}" if errors else "-")
    titles = [f"{name} ({len(records)} views)" for name, records in groups.items()]
    return table(["the truth in place of", *titles], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 2 if the input can't be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DIR")
    parser.add_argument("--mask-noise", action="store_true", help="masks as a segmenter makes them")
    parser.add_argument("--weights", default=None, help="other weights than the package's")
    parser.add_argument("--cache-dir", default=None, help="where banks are kept")
    parser.add_argument("--viewpoints", type=int, default=162, help="templates per object (162)")
    args = parser.parse_args(argv)
    try:
        coloured, grey = measured(args.root, args)
    except PicoPoseError as error:
        print(error, file=sys.stderr)
        return 2
    print(report({"with colours": coloured, "grey": grey}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""What each stage costs on photographs: the truth in the place of one stage's answer, or of several.

    scripts/photograph_stages.py DIR [--mask-noise] [--weights FILE] [--cache-dir DIR] ...

Every ``manifest.json`` below DIR is a list of views: ``image`` and ``mask`` (files beside the manifest),
``meshes`` (a folder there, "meshes" if not said), ``unit`` of the meshes, ``object`` (the name of its mesh),
``K`` (3, 3), ``T_cam_obj_gt`` (4, 4, metres; a view without one is left out) and ``symmetric`` (ADD-S instead
of ADD). One hypothesis, not refined, as in *What limits it* of docs/accuracy.md. Prints a table in Markdown,
with a column for each name of a folder of meshes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from picopose_ros.arguments import add_network_arguments, load_network
from picopose_ros.cli.estimate import read_rgb
from picopose_ros.cli.masks import segments_from_pictures
from picopose_ros.errors import ConfigError, PicoPoseError
from picopose_ros.estimator import EstimatorSettings, PoseEstimator
from picopose_ros.evaluation.benchmark import Benchmark
from picopose_ros.evaluation.figures import bottleneck, figures
from picopose_ros.evaluation.objects import OTHER_MESHES, ObjectFacts
from picopose_ros.evaluation.records import Record
from picopose_ros.evaluation.report import number, share, table
from picopose_ros.evaluation.scenes import Scene, SceneInstance
from picopose_ros.geometry.cameras import CameraModel
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
                if view.get("T_cam_obj_gt") is not None:
                    place = manifest.parent / view.get("meshes", "meshes")
                    files = {name: manifest.parent / view[name] for name in ("image", "mask")}
                    sizes = {"K": (3, 3), "T_cam_obj_gt": (4, 4)}
                    matrices = {name: np.array(view[name], float).reshape(n) for name, n in sizes.items()}
                    found[place, view["unit"]].append({**view, **files, **matrices})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{manifest}: not a list of views ({error!r})") from error
    if not found:
        raise ConfigError(f"no view with a reference pose in a manifest.json below {root}")
    return dict(found)


def scene_of(view: Mapping[str, Any], mesh: ObjectMesh, renderer: MeshRenderer) -> Scene:
    """A photograph as the benchmark wants it: the mesh, rendered at the reference pose, gives the depth.

    Raises:
        PicoPoseError: an image, a mask or intrinsics that can't be used, or two sizes; names the file.
    """
    rgb, name = read_rgb(view["image"]), view["object"]
    mask = segments_from_pictures([view["mask"]], [name], [name])[0][0].mask
    if mask.shape != rgb.shape[:2]:
        raise ConfigError(f"{view['mask']} is not of the size of {view['image']}")
    height, width = mask.shape
    T_cam_obj, camera = view["T_cam_obj_gt"], CameraModel(view["K"], width, height)
    drawn = renderer.render(mesh, T_cam_obj, camera.K, width, height)
    visible = float((drawn.mask & mask).sum() / max(drawn.mask.sum(), 1))
    instance = SceneInstance(name, T_cam_obj, mask, visible)
    return Scene(str(view["image"]), rgb, np.where(mask, drawn.depth, 0), camera, (instance,))


def measured(args: argparse.Namespace) -> dict[str, list[Record]]:
    """Records of all views, by the name of their folder of meshes.

    Raises:
        PicoPoseError: input that can't be used.
    """
    views_of = read_views(args.root)
    model, device = load_network(args)
    settings = EstimatorSettings(hypotheses=1, refinements=0)
    found = defaultdict(list)
    with MeshRenderer() as renderer:
        for (folder, unit), views in views_of.items():
            onboarding = onboard(
                folder, model, args.viewpoints, unit, args.cache_dir, device, True, args.shading
            )
            names = {view["object"] for view in views}
            if missing := sorted(names - set(onboarding.banks)):
                raise ConfigError(f"{folder}: no usable mesh of {', '.join(missing)}")
            meshes = {name: load_object(onboarding.specs[name]) for name in sorted(names)}
            symmetric = {view["object"] for view in views if view.get("symmetric")}
            facts = {
                name: ObjectFacts(name, OTHER_MESHES, False, 1.0, mesh.diameter, name in symmetric)
                for name, mesh in meshes.items()
            }
            estimator = PoseEstimator(model, onboarding.banks, settings, device)
            benchmark = Benchmark(estimator, meshes, facts, 0, renderer, args.mask_noise)
            for index, view in enumerate(views):
                benchmark.add(index, scene_of(view, meshes[view["object"]], renderer))
            found[folder.name] += benchmark.records
    return found


def report(groups: Mapping[str, Sequence[Record]]) -> str:
    """Truth in place of stages, and end-point errors of the template nearest to the truth."""
    shares = [bottleneck(records) for records in groups.values()]
    ends = [figures(records, ())["endpoints_px"]["right template given"] for records in groups.values()]
    rows = [[what, *(share(one[what]) for one in shares)] for what in shares[0]]
    rows += [
        [f"end-point error of stage {stage}, median, px"]
        + [number(end[stage]["median"] if stage in end else None) for end in ends]
        for stage in ("1", "2", "3")
    ]
    return table(["the truth in place of", *(f"{n}: {len(r)} views" for n, r in groups.items())], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 2 if the input can't be used."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, metavar="DIR", help="folder with manifests, images and meshes")
    parser.add_argument("--mask-noise", action="store_true", help="masks as a segmenter makes them")
    parser.add_argument("--preset", default="tiny", help="size of the network: tiny (default) or vitl")
    add_network_arguments(parser)
    args = parser.parse_args(argv)
    try:
        print(report(measured(args)))
    except PicoPoseError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``picopose eval synthetic``: how good the poses of rendered objects are, stage by stage.

Every query is the segment of one object in a rendered scene whose true poses are known. All figures come
from one pass: the estimator traces what each stage did, and the answer with one hypothesis is a part of that
with five. A query without a pose counts as wrong everywhere.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from picopose_ros import __version__
from picopose_ros.arguments import (
    add_onboarding_arguments,
    add_refinements,
    load_network,
    positive,
    refinements,
    settle_unit,
)
from picopose_ros.errors import ConfigError
from picopose_ros.estimation.confidence import Calibration
from picopose_ros.estimator import EstimatorSettings, ObjectPose, PoseEstimator, Precision
from picopose_ros.evaluation.benchmark import Benchmark
from picopose_ros.evaluation.figures import calibration, quantiles, query_rows, summarise, times
from picopose_ros.evaluation.records import Record
from picopose_ros.evaluation.report import check_writable, markdown, plain, write_atomically
from picopose_ros.evaluation.sheets import contact_sheet, reliability_picture, scene_overlay
from picopose_ros.model import model_fingerprint
from picopose_ros.model.checkpoint import save_calibration, weights_path
from picopose_ros.progress import progress_bar
from picopose_ros.templates.bank import onboard
from picopose_ros.templates.meshes import ObjectMesh, load_object
from picopose_ros.templates.renderer import MeshRenderer

if TYPE_CHECKING:
    from picopose_ros.evaluation.scenes import Difficulty, Scene, SceneInstance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--meshes", type=Path, required=True, help="folder with one mesh per object")
    parser.add_argument("--scenes", type=positive, default=480, help="scenes to render (480)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes, masks and wrong hypotheses (0)")
    parser.add_argument(
        "--kind", choices=("single", "cluttered", "cut"), default="single", help="of scenes (single)"
    )
    parser.add_argument("--hypotheses", type=positive, default=5, help="templates tried per segment (5)")
    parser.add_argument("--out", type=Path, required=True, metavar="REPORT.json", help="report to write")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="write the report's tables as well")
    parser.add_argument("--overlays", type=Path, metavar="DIR", help="write pictures of scenes and cases")
    parser.add_argument("--mask-noise", action="store_true", help="masks as a segmenter makes them")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="keep in the weights file what makes the confidence the share of right poses",
    )
    parser.add_argument(
        "--background", action="store_true", help="show the network what lies around the segment"
    )
    parser.add_argument(
        "--decode",
        choices=("subpixel", "reference"),
        default="subpixel",
        help="how pairs are read (subpixel)",
    )
    parser.add_argument(
        "--rerank",
        type=int,
        default=EstimatorSettings().rerank,
        metavar="N",
        help="templates that are put in order by how well their matches agree (%(default)s); 0: none",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default=EstimatorSettings().precision,
        help="what the network computes in (%(default)s)",
    )
    parser.add_argument(
        "--prune",
        type=int,
        default=EstimatorSettings().prune,
        metavar="N",
        help="the N best hypotheses after the coarse grids go through the last one (%(default)s); 0: all",
    )
    add_refinements(parser)
    add_onboarding_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and write the report; 1 if a mesh could not be used.

    Raises:
        PicoPoseError: input that can't be used, or a report that can't be written.
    """
    from picopose_ros.evaluation.objects import object_facts
    from picopose_ros.evaluation.scenes import BENCHMARK_VERSION, difficulty, difficulty_figure, make_scenes

    begin = time.perf_counter()
    _check_places(args)
    settle_unit(args)
    model, device = load_network(args)
    onboarding = onboard(
        args.meshes, model, args.viewpoints, args.unit, args.cache_dir, device, True, args.shading
    )
    meshes = {name: load_object(onboarding.specs[name]) for name in sorted(onboarding.banks)}
    facts = object_facts(args.meshes, [mesh.spec for mesh in meshes.values()])
    settings = EstimatorSettings(
        hypotheses=args.hypotheses,
        decode=args.decode,
        rerank=args.rerank,
        precision=args.precision,
        prune=args.prune,
        **refinements(args),
        keep_background=args.background,
    )
    estimator = PoseEstimator(model, onboarding.banks, settings, device)
    onboarded = time.perf_counter()
    with MeshRenderer() as renderer:
        pictures = None
        if args.overlays is not None:

            def pictures(
                index: int, scene: Scene, answers: list[tuple[SceneInstance, ObjectPose | None]]
            ) -> None:
                poses = [
                    (meshes[one.class_id], one.T_cam_obj, None if pose is None else pose.T_cam_obj)
                    for one, pose in answers
                ]
                scene_overlay(scene.rgb, scene.camera.K, poses, renderer, args.overlays / f"{scene.name}.jpg")

        benchmark = Benchmark(estimator, meshes, facts, args.seed, renderer, args.mask_noise, pictures)
        scenes = make_scenes(list(meshes.values()), args.scenes, args.seed, args.kind)
        hardness: list[Difficulty] = []
        for index, scene in enumerate(progress_bar(scenes, args.scenes, unit="scene")):
            hardness += difficulty(scene, meshes)
            benchmark.add(index, scene)
        if not benchmark.records:
            raise ConfigError(f"none of {args.scenes} scenes shows an object; make more scenes")
        report = {
            "benchmark": {
                "version": __version__,
                "scenes_version": BENCHMARK_VERSION,
                "meshes": args.meshes.name,
                "scenes": args.scenes,
                "seed": args.seed,
                "kind": args.kind,
                "hypotheses": args.hypotheses,
                "mask_noise": args.mask_noise,
                "background": args.background,
                "decode": args.decode,
                "rerank": args.rerank,
                "precision": args.precision,
                "prune": args.prune,
                "refinements": settings.refinements,
                "viewpoints": args.viewpoints,
                "preset": args.preset,
                "weights": model_fingerprint(model)[:16],
            },
            "unreadable": onboarding.failed,
            "difficulty": quantiles(hardness),
            "stages": benchmark.stages,
            "facts": {name: vars(fact) for name, fact in sorted(facts.items()) if name in meshes},
            "figures": summarise(benchmark.records, facts, benchmark.stages),
            "queries": query_rows(benchmark.records),
        }
        # Last, and the only part that differs from run to run.
        report["times"] = times(benchmark, onboarded - begin, time.perf_counter() - begin)
        report = plain(report)
        if args.overlays is not None:
            difficulty_figure(hardness, args.overlays / "difficulty.png")
            _write_cases(benchmark, meshes, renderer, args.overlays)
            reliability_picture(report["figures"]["confidence"]["all"], args.overlays / "reliability.png")
    write_atomically(args.out, report)
    text = markdown(report)
    if args.markdown is not None:
        write_atomically(args.markdown, text)
    if args.calibrate:
        fitted = Calibration(*model.calibration).then(calibration(benchmark.records, benchmark.stages[-1]))
        save_calibration(weights_path(args.preset, args.weights), fitted.slope, fitted.offset)
    print(text)
    for name, reason in sorted(onboarding.failed.items()):
        print(f"object '{name}' is left out: {reason}", file=sys.stderr)
    return 1 if onboarding.failed else 0


def _check_places(args: argparse.Namespace) -> None:
    """Say before the long work that a file can't be written.

    Raises:
        ConfigError: names the place.
    """
    for place in (args.out, args.markdown, args.overlays and args.overlays / "contact_sheet.png"):
        if place is not None:
            check_writable(place)


def _write_cases(
    benchmark: Benchmark, meshes: Mapping[str, ObjectMesh], renderer: MeshRenderer, folder: Path
) -> None:
    """The contact sheet: best, median and worst cases by ADD(-S) over the diameter."""
    stage = benchmark.stages[-1]

    def badness(record: Record) -> float:
        pose = record.poses.get(stage)
        return float("inf") if pose is None else pose.errors.add / pose.errors.diameter

    ordered = sorted((r for r in benchmark.records if r.shot is not None), key=badness)
    if not ordered:
        return
    count = min(6, len(ordered))
    middle = (len(ordered) - count) // 2
    cases = {
        "best": ordered[:count],
        "median": ordered[middle : middle + count],
        "worst": ordered[::-1][:count],
    }
    shots = {name: [record.shot for record in records] for name, records in cases.items()}
    contact_sheet(shots, meshes, renderer, folder / "contact_sheet.png")

"""The figures of the synthetic benchmark: recalls, errors, confidence and times from its records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from picopose_ros.estimation.confidence import Calibration, fit_calibration
from picopose_ros.evaluation.benchmark import Benchmark
from picopose_ros.evaluation.metrics import ADD_SHARES, MISSING, area_under_roc, bop_recalls, reliability
from picopose_ros.evaluation.records import SUBSTITUTIONS, PairFigures, PoseFigures, Record
from picopose_ros.evaluation.stages import STAGES, certainty_figures

if TYPE_CHECKING:
    from picopose_ros.evaluation.objects import ObjectFacts
    from picopose_ros.evaluation.scenes import Difficulty


VISIBILITY_BINS = ((0.0, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0))
"""Bins of the visible share."""

NEAR_DEG = 15.0
"""A template within this angle of the true viewpoint is a good one: about the spacing of 162 templates."""

MSPD_PX = 10.0
"""A pose whose MSPD is smaller is good, in pixels of an image 640 wide."""


def figures(records: Sequence[Record], stages: Sequence[str]) -> dict[str, Any]:
    """The figures of some records, in plain types."""
    asked = [record for record in records if record.template_deg is not None]
    return {
        "queries": len(records),
        "objects": len({record.class_id for record in records}),
        "viewpoint": {
            name: {
                "median_deg": _median([getattr(record, key) for record in asked]),
                "within_15_deg": _share([getattr(r, key) for r in asked], NEAR_DEG, len(records)),
            }
            for name, key in (("best template", "template_deg"), ("best of five", "best_of_five_deg"))
        },
        "endpoints_px": {
            "retrieved template": _endpoint_figures([r.retrieved for r in asked]),
            "right template given": _endpoint_figures([r.given for r in asked]),
        },
        "certainty": {
            "retrieved template": certainty_figures([r.retrieved.certainty for r in asked if r.retrieved]),
            "right template given": certainty_figures([r.given.certainty for r in asked if r.given]),
        },
        "pose": {stage: _pose_figures([record.poses.get(stage) for record in records]) for stage in stages},
    }


def _endpoint_figures(pairs: Sequence[PairFigures | None]) -> dict[str, Any]:
    """Over the pairs that have a visible cell in common: median of all cells, and of the pairs' means."""
    result: dict[str, Any] = {"pairs": sum(1 for p in pairs if p is not None and len(p.endpoints["3"]))}
    for stage in STAGES:
        errors = [p.endpoints[stage] for p in pairs if p is not None and stage in p.endpoints]
        errors = [e for e in errors if len(e)]
        if errors:
            result[stage] = {
                "median": float(np.median(np.concatenate(errors))),
                "median_of_means": float(np.median([e.mean(dtype=np.float64) for e in errors])),
            }
    return result


def _pose_figures(poses: Sequence[PoseFigures | None]) -> dict[str, Any]:
    """Shares are of all queries; medians count a missing pose as infinitely far off."""
    found = [pose for pose in poses if pose is not None]
    bop = [MISSING if pose is None else pose.bop for pose in poses]
    missing = [np.inf] * (len(poses) - len(found))
    return {
        "answered": len(found),
        "from_affine": sum(pose.source == "affine" for pose in found),
        **{
            name.replace("add", "add_recall"): _mean([p is not None and p.errors.within(s) for p in poses])
            for name, s in ADD_SHARES.items()
        },
        "rotation_deg": _median([pose.errors.rotation_deg for pose in found] + missing),
        "translation_mm": _median([1e3 * pose.errors.translation for pose in found] + missing),
        "translation_diameters": _median(
            [pose.errors.translation / pose.errors.diameter for pose in found] + missing
        ),
        "mspd_10px": _mean([error.mspd < MSPD_PX for error in bop]),
        **bop_recalls(bop),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if len(values) else float("nan")


def _share(values: Sequence[float], below: float, count: int) -> float:
    return sum(value <= below for value in values) / count if count else float("nan")


def confidence_figures(records: Sequence[Record], stage: str) -> dict[str, Any]:
    """How well the published confidence separates right from wrong poses."""
    scores = {
        name: [score for record in records for score in getattr(record, f"{name}_scores")]
        for name in ("right", "far", "other")
    }
    wrong = scores["far"] + scores["other"]
    confidence = np.array([record.confidence for record in records])
    correct = np.array([record.correct(stage) for record in records], bool)
    curve = reliability(confidence, correct)
    return {
        "auc": area_under_roc(scores["right"], wrong),
        "auc_far_view": area_under_roc(scores["right"], scores["far"]),
        "auc_other_object": area_under_roc(scores["right"], scores["other"]),
        "hypotheses": {name: len(values) for name, values in scores.items()},
        "auc_correct_pose": area_under_roc(confidence[correct], confidence[~correct]),
        "calibration_error": curve.error,
        "reliability": [
            {"from": low, "to": high, "queries": int(n), "confidence": c, "correct": r}
            for low, high, n, c, r in zip(
                curve.edges, curve.edges[1:], curve.counts, curve.confidence, curve.correct
            )
        ],
        "mapping": {
            **asdict(calibration(records, stage)),
            "calibration_error": _left_by_calibration(records, stage),
        },
    }


def calibration(records: Sequence[Record], stage: str) -> Calibration:
    """The mapping of confidences, fitted on poses from offsets, the only ones that it is applied to."""
    used = [r for r in records if r.from_offsets(stage)]
    confidence, correct = [r.confidence for r in used], [r.correct(stage) for r in used]
    return fit_calibration(np.array(confidence), np.array(correct))


def _left_by_calibration(records: Sequence[Record], stage: str) -> float:
    """The calibration error that a mapping fitted on one half of the objects leaves on the other half."""
    names = sorted({record.class_id for record in records})
    halves = [[r for r in records if names.index(r.class_id) % 2 == which] for which in (0, 1)]
    mapped, correct = [], []
    for own, other in (halves, halves[::-1]):
        fitted = calibration(other, stage)
        for record in own:
            meant = record.from_offsets(stage)
            mapped.append(float(fitted.apply(record.confidence)) if meant else record.confidence)
            correct.append(record.correct(stage))
    return reliability(np.array(mapped), np.array(correct)).error


def bottleneck(records: Sequence[Record]) -> dict[str, float]:
    """ADD(-S) recall with one hypothesis and the truth in place of one stage's answer, or of several."""
    return {name: _mean([record.substituted[name] for record in records]) for name in SUBSTITUTIONS}


def summarise(
    records: Sequence[Record], facts: Mapping[str, ObjectFacts], stages: Sequence[str]
) -> dict[str, Any]:
    """All figures: overall, per group, per visibility, per object, confidence and bottleneck."""

    def cut(chosen: Iterable[Record]) -> dict[str, Any]:
        chosen = list(chosen)
        parts = {
            "all": chosen,
            "unambiguous": [r for r in chosen if not facts[r.class_id].ambiguous],
            "ambiguous": [r for r in chosen if facts[r.class_id].ambiguous],
        }
        return {name: figures(part, stages) for name, part in parts.items() if part}

    groups = dict.fromkeys(facts[record.class_id].group for record in records)
    unambiguous = [record for record in records if not facts[record.class_id].ambiguous]
    parts = {"all": list(records), "unambiguous": unambiguous}
    return {
        "overall": cut(records),
        "groups": {name: cut(r for r in records if facts[r.class_id].group == name) for name in groups},
        "visibility": {
            f"{low:.0%} to {high:.0%}": cut(
                r for r in records if low <= r.visible < high or (high == 1.0 and r.visible >= 1.0)
            )
            for low, high in VISIBILITY_BINS
        },
        "objects": {
            name: figures([r for r in records if r.class_id == name], stages)
            for name in sorted({record.class_id for record in records})
        },
        "confidence": {n: confidence_figures(part, stages[-1]) for n, part in parts.items() if part},
        "bottleneck": {n: bottleneck(part) for n, part in parts.items() if part},
    }


def query_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per query: errors and confidence."""
    rows = []
    for record in records:
        row: dict[str, Any] = {
            "scene": record.scene,
            "class_id": record.class_id,
            "visible": record.visible,
            "template_deg": record.template_deg,
            "best_of_five_deg": record.best_of_five_deg,
            "confidence": record.confidence,
        }
        for stage, pose in record.poses.items():
            row[stage] = pose and {
                "add_diameters": pose.errors.add / pose.errors.diameter,
                "rotation_deg": pose.errors.rotation_deg,
                "mspd_px": pose.bop.mspd,
                "source": pose.source,
            }
        rows.append(row)
    return rows


def times(benchmark: Benchmark, onboarding_s: float, total_s: float) -> dict[str, Any]:
    """What the estimator took per query and stage, and the benchmark as a whole."""
    import torch

    stages: dict[str, float] = {}
    for name in benchmark.milliseconds[0][1] if benchmark.milliseconds else ():
        stages[name] = _median([timings[name] / count for count, timings in benchmark.milliseconds])
    return {
        "milliseconds_per_query": stages,
        "device": str(benchmark.estimator.device),
        "threads": torch.get_num_threads(),
        "onboarding_s": onboarding_s,
        "total_s": total_s,
    }


def quantiles(instances: Sequence[Difficulty]) -> dict[str, dict[str, float]]:
    """Difficulty of the queries: the 5th, 50th and 95th percentile of each measure."""
    return {
        name: dict(zip(("5%", "50%", "95%"), np.percentile([vars(i)[name] for i in instances], (5, 50, 95))))
        for name in (vars(instances[0]) if instances else ())
    }

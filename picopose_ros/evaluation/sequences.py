"""``picopose eval sequences``: how well objects are followed in rendered films whose poses are known.

Each film shows an object in front of a wall. Its pose is estimated with the true mask in the first image
(and once per ``--masks`` seconds, where that is given); from then on it is followed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from picopose_ros.arguments import add_onboarding_arguments, add_refinements, load_estimator, positive
from picopose_ros.errors import ConfigError
from picopose_ros.estimation.follow import Follower, FollowSettings, Verdict
from picopose_ros.estimator import ObjectPose, PoseEstimator
from picopose_ros.evaluation.films import FILMS, HEIGHT, WIDTH, K, Shot, make_film
from picopose_ros.evaluation.metrics import add_or_add_s, evaluation_points
from picopose_ros.evaluation.report import check_writable, write_atomically
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.poses import rotation_angle_deg
from picopose_ros.instances import NamedPose, SymmetryGroup
from picopose_ros.instances.overlay import OverlayPainter
from picopose_ros.segmentation import Segment
from picopose_ros.templates.meshes import ObjectMesh, ObjectSpec, load_object
from picopose_ros.templates.renderer import MeshRenderer

CLOSE, FALSE = 0.1, 0.2
"""ADD, in diameters, up to which a pose is right, and beyond which one called followed is false."""

LEAST = (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.83, 0.86, 0.9, 0.95)
"""Scores that are compared as the least one of a pose that is followed."""


@dataclass(frozen=True)
class _Row:
    """An object in an image: its errors are ADD in diameters, infinite without a pose."""

    shot: Shot
    i: int
    verdict: Verdict | None
    error: float
    T: np.ndarray | None
    masked: float | None

    @property
    def seen(self) -> bool:
        return self.shot.masks[self.i].sum() > 200


@dataclass(frozen=True)
class Figures:
    """What came of a film.

    Attributes:
        film, class_id: which. frames: object images in which it could be seen.
        answered: share of these with a pose. recall: share with ADD < .1 d. false: share of those followed
            that are off by more than .2 d. right: share of those followed with ADD < .1 d.
        masked: recall with the true mask in every image; None: not measured.
        turn, shift: error in the last image, degrees and share of the distance; None: no pose then.
        switches: times that an object had another one's name.
        lost_after, found_after: s, from when it was covered on, until it was lost, and from when it could be
            seen again until it was followed.
        jitter_deg, jitter: standard deviation of the pose, degrees and share of the distance.
        milliseconds: of the processor, mean per image that is followed.
        steps: of every pose its verdict, its score and its ADD in diameters; what thresholds are chosen by.
    """

    film: str
    class_id: str
    frames: int
    answered: float
    recall: float
    false: float
    right: float
    masked: float | None
    turn: float | None
    shift: float | None
    switches: int
    lost_after: float | None
    found_after: float | None
    jitter_deg: float | None
    jitter: float | None
    milliseconds: float
    steps: list[tuple[str, float, float]]


def measure(
    estimator: PoseEstimator,
    mesh: ObjectMesh,
    name: str,
    shots: Iterator[Shot],
    know_camera: bool = False,
    masks: float = 0.0,
    show: Callable[[Shot, Sequence[ObjectPose]], None] | None = None,
    every: bool = False,
    settings: FollowSettings | None = None,
) -> Figures:
    """Follow through a film.

    Args:
        know_camera: tell where the camera is. masks: seconds between two masks; 0: only the first image.
        show: told of every image and its poses. every: also estimate each image with its true masks, without
            following, to compare. settings: of the follower.
    """
    class_id, points = mesh.spec.class_id, evaluation_points(mesh, 500).surface
    group = SymmetryGroup(mesh.spec.symmetries)
    camera = CameraModel(K, WIDTH, HEIGHT)
    follower = Follower(estimator, settings, nearest=lambda c, T, R: group.nearest(T, R))
    owner: dict[str, int] = {}
    rows: list[_Row] = []
    steps: list[tuple[str, float, float]] = []
    switches, spent, due = 0, [], 0.0

    def add(pose: ObjectPose, true: np.ndarray) -> float:
        return add_or_add_s(points, pose.T_cam_obj, true, not group.trivial) / mesh.diameter

    for shot in shots:
        T_fixed_cam = shot.T_fixed_cam if know_camera else None
        started, poses = time.process_time(), {}
        keys: list[str] = []
        if shot.t >= due - 1e-6 and not shot.covered:
            due = shot.t + masks if masks else np.inf
            segments = [Segment(class_id, 1.0, mask) for mask in shot.masks if mask.any()]
            found = estimator.estimate(shot.rgb, camera, segments).poses
            keys = follower.see_all(found, shot.t, 0.3, T_fixed_cam, (shot.rgb, camera))
            poses = {key: (Verdict.FOLLOWED, pose) for key, pose in zip(keys, found)}
            started = time.process_time()
        others = [key for key in follower.status if key not in keys]
        for one in follower.step(shot.rgb, camera, shot.t, T_fixed_cam, others):
            poses[one.key] = one.verdict, one.pose
        if not keys:
            spent.append(1e3 * (time.process_time() - started))
        if show is not None:
            show(shot, [pose for verdict, pose in poses.values() if verdict is not Verdict.LOST])
        for key, (verdict, pose) in poses.items():
            errors = [add(pose, true) for true in shot.truth]
            if key not in keys and verdict is not Verdict.LOST:
                steps.append((verdict.value, pose.confidence, min(errors)))
            best = int(np.argmin(errors))
            owner.setdefault(key, best)
            if best != owner[key] and errors[best] < 0.3 < errors[owner[key]]:
                switches, owner[key] = switches + 1, best
        masked: dict[int, ObjectPose] = {}
        if every:
            there = [i for i, mask in enumerate(shot.masks) if mask.any()]
            segments = [Segment(class_id, 1.0, shot.masks[i]) for i in there]
            masked = {there[p.segment]: p for p in estimator.estimate(shot.rgb, camera, segments).poses}
        for i, true in enumerate(shot.truth):
            mine = [(v, p) for key, (v, p) in poses.items() if owner.get(key) == i and v is not Verdict.LOST]
            verdict, pose = mine[0] if mine else (None, None)
            error, alone = (np.inf if p is None else add(p, true) for p in (pose, masked.get(i)))
            T = None if pose is None else pose.T_cam_obj
            rows.append(_Row(shot, i, verdict, error, T, alone if every else None))
    return _figures(name, class_id, rows, group, switches, spent, steps)


def _figures(
    name: str,
    class_id: str,
    rows: Sequence[_Row],
    group: SymmetryGroup,
    switches: int,
    spent: Sequence[float],
    steps: list[tuple[str, float, float]],
) -> Figures:
    seen = [row for row in rows if row.seen]
    followed = [row for row in rows if row.verdict is Verdict.FOLLOWED]
    shot, i, T = rows[-1].shot, rows[-1].i, rows[-1].T
    turn = shift = lost_after = found_after = jitter_deg = jitter = None
    if T is not None:
        near = group.nearest(T, shot.truth[i][:3, :3])
        turn = rotation_angle_deg(near[:3, :3], shot.truth[i][:3, :3])
        shift = float(np.linalg.norm(near[:3, 3] - shot.truth[i][:3, 3]) / shot.truth[i][2, 3])
    if name == "occlusion":
        begin = next(row.shot.t for row in rows if row.shot.covered)
        end = next(row.shot.t for row in rows if row.shot.t > begin and not row.shot.covered)
        lost_after = next((r.shot.t - begin for r in rows if r.shot.t >= begin and r.verdict is None), None)
        found_after = next((r.shot.t - end for r in followed if r.shot.t >= end), None)
    if name == "still" and len(followed) > 2:
        poses = [group.nearest(row.T, followed[0].T[:3, :3]) for row in followed]
        spin = [Rotation.from_matrix(P[:3, :3] @ poses[0][:3, :3].T).as_rotvec(degrees=True) for P in poses]
        jitter_deg = float(np.linalg.norm(np.std(spin, axis=0)))
        places = np.std([P[:3, 3] for P in poses], axis=0)
        jitter = float(np.linalg.norm(places) / poses[0][2, 3])
    return Figures(
        name,
        class_id,
        len(seen),
        _mean([row.verdict is not None for row in seen]),
        _mean([row.error < CLOSE for row in seen]),
        _mean([row.error > FALSE for row in followed]),
        _mean([row.error < CLOSE for row in followed]),
        None if rows[0].masked is None else _mean([row.masked < CLOSE for row in seen]),
        turn,
        shift,
        switches,
        lost_after,
        found_after,
        jitter_deg,
        jitter,
        float(np.mean(spent)) if spent else 0.0,
        steps,
    )


def _mean(values: Sequence[bool]) -> float:
    return float(np.mean(values)) if values else 0.0


def summary(films: Sequence[Figures]) -> str:
    """A table of means over the films of each kind; the drift is a median, the rest of the last row is over
    all poses."""
    head = "film,films,answered,recall,right,masked,false,turn,shift,switches,lost,found,jitter deg,jitter,ms"
    head = head.split(",")
    rows = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]

    def cell(values: Sequence[float | None], digits: int, mean: Callable[..., float] = np.mean) -> str:
        known = [value for value in values if value is not None]
        return f"{mean(known):.{digits}f}" if known else "-"

    for name in [*dict.fromkeys(one.film for one in films), "all"]:
        own = [one for one in films if name in (one.film, "all")]
        cells = [name, str(len(own)), cell([o.answered for o in own], 3), cell([o.recall for o in own], 3)]
        cells += [cell([o.right for o in own], 3), cell([o.masked for o in own], 3)]
        cells += [f"{false_share([step for o in own for step in o.steps]):.4f}"]
        cells += [cell([o.turn for o in own], 2, np.median), cell([o.shift for o in own], 4, np.median)]
        cells += [str(sum(o.switches for o in own)), cell([o.lost_after for o in own], 1)]
        cells += [cell([o.found_after for o in own], 1), cell([o.jitter_deg for o in own], 3)]
        cells += [cell([o.jitter for o in own], 5), cell([o.milliseconds for o in own], 0)]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def false_share(steps: Sequence[tuple[str, float, float]], least: float | None = None) -> float:
    """Share of the followed poses that are false.

    Args:
        least: count those with at least this score as followed, whatever they were called.
    """
    if least is None:
        errors = [error for verdict, _, error in steps if verdict == Verdict.FOLLOWED.value]
    else:
        errors = [error for _, score, error in steps if score >= least]
    return float(np.mean(np.array(errors) > FALSE)) if errors else 0.0


def thresholds(steps: Sequence[tuple[str, float, float]]) -> str:
    """A table: what a pose must score at least, how many do, and how many of these are right and false.

    Args:
        steps: see `Figures`. Followed with low thresholds, they tell what higher ones would have left out.
    """
    rows = ["| least score | poses | share | right | false |", "|" + " --- |" * 5]
    for least in LEAST:
        errors = [error for _, score, error in steps if score >= least]
        right, share = _mean([error < CLOSE for error in errors]), len(errors) / max(len(steps), 1)
        false = false_share(steps, least)
        rows.append(f"| {least:.2f} | {len(errors)} | {share:.3f} | {right:.3f} | {false:.4f} |")
    return "\n".join(rows)


class Strip:
    """A picture of some images of each film, a row per film, with the outlines of the poses.

    Args:
        specs: of the objects. columns: images per film.
    """

    def __init__(self, specs: Mapping[str, ObjectSpec], columns: int = 6) -> None:
        self._painter, self._columns = OverlayPainter(specs), columns
        self._rows: list[np.ndarray] = []
        self._images: list[np.ndarray] = []

    def show(self, shot: Shot, poses: Sequence[ObjectPose]) -> None:
        """An image of the film, and what was said of it."""
        named = [NamedPose(pose, pose.class_id, False) for pose in poses]
        picture = self._painter.paint(shot.rgb, CameraModel(K, WIDTH, HEIGHT), named)
        self._images.append(cv2.resize(picture, (WIDTH // 4, HEIGHT // 4), interpolation=cv2.INTER_AREA))

    def next_film(self) -> None:
        """The film is over."""
        chosen = np.linspace(0, len(self._images) - 1, self._columns).round().astype(int)
        self._rows.append(np.concatenate([self._images[i] for i in chosen], 1))
        self._images = []

    def write(self, path: Path) -> None:
        """Write the picture."""
        self._painter.close()
        cv2.imwrite(str(path), np.concatenate(self._rows)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--meshes", type=Path, required=True, help="folder with one mesh per object")
    parser.add_argument("--out", type=Path, required=True, metavar="REPORT.json", help="report to write")
    parser.add_argument("--films", nargs="+", choices=tuple(FILMS), default=tuple(FILMS), help="which (all)")
    parser.add_argument("--count", type=positive, default=3, help="films of each kind (3)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a film (10)")
    parser.add_argument("--rate", type=float, default=10.0, help="images per second (10)")
    parser.add_argument("--masks", type=float, default=0.0, help="seconds between masks; 0: the first image")
    parser.add_argument("--camera", action="store_true", help="tell where the camera is, as TF would")
    parser.add_argument(
        "--every", action="store_true", help="also measure the true mask in every image, without following"
    )
    parser.add_argument(
        "--thresholds",
        type=float,
        nargs=2,
        metavar=("FOLLOWED", "UNCERTAIN"),
        help="least scores instead of the measured ones",
    )
    parser.add_argument("--hypotheses", type=positive, default=5, help="templates tried per segment (5)")
    parser.add_argument("--strip", type=Path, metavar="STRIP.jpg", help="picture with a row per kind of film")
    parser.add_argument("--seed", type=int, default=0, help="of the films (0)")
    add_refinements(parser)
    add_onboarding_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and write the report.

    Raises:
        PicoPoseError: input that can't be used, or a report that can't be written.
    """
    if not (args.seconds > 0 and args.rate > 0 and args.masks >= 0):
        raise ConfigError("--seconds and --rate must be more than 0, --masks not less")
    for path in filter(None, (args.out, args.strip)):
        check_writable(path)
    estimator = load_estimator(args)
    names = sorted(estimator.banks)
    settings = FollowSettings()
    if args.thresholds:
        settings = replace(settings, followed=args.thresholds[0], uncertain=args.thresholds[1])
    chosen = ("seconds", "rate", "masks", "camera", "seed", "count", "thresholds")
    options = {name: getattr(args, name) for name in chosen}
    found: list[Figures] = []
    strip = Strip({name: bank.spec for name, bank in estimator.banks.items()}) if args.strip else None
    with MeshRenderer(antialias=True) as renderer:
        for film in args.films:
            for n in range(args.count):
                mesh = load_object(estimator.banks[names[n % len(names)]].spec)
                shots = make_film(renderer, mesh, film, args.seed + n, args.seconds, args.rate)
                show = strip.show if strip is not None and n == 0 else None
                one = measure(
                    estimator, mesh, film, shots, args.camera, args.masks, show, args.every, settings
                )
                found.append(one)
                write_atomically(args.out, {"options": options, "films": [asdict(one) for one in found]})
                if show is not None:
                    strip.next_film()
                print(
                    f"{film} {one.class_id}: answered {one.answered:.2f}, recall {one.recall:.2f}, false "
                    f"{one.false:.3f}, {one.milliseconds:.0f} ms",
                    flush=True,
                )
    if strip is not None:
        strip.write(args.strip)
    print(summary(found))
    print(f"\n{thresholds([step for one in found for step in one.steps])}")
    return 0

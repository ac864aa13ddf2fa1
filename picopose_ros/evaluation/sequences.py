"""``picopose eval sequences``: how well objects are followed in rendered films whose poses are known.

Each film shows an object in front of a wall. Its pose is estimated with the true mask in the first image
(and once per ``--masks`` seconds, where that is given); from then on it is followed. How the films move is
fixed by the functions of this module and never tuned to a network.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from picopose_ros.arguments import add_onboarding_arguments, add_refinements, load_estimator, positive
from picopose_ros.errors import ConfigError
from picopose_ros.estimation.follow import Follower, Verdict
from picopose_ros.estimator import ObjectPose, PoseEstimator
from picopose_ros.evaluation.metrics import add_or_add_s, evaluation_points
from picopose_ros.evaluation.report import check_writable, write_atomically
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.poses import invert_transform, make_transform, rotation_angle_deg
from picopose_ros.instances import NamedPose, SymmetryGroup
from picopose_ros.instances.overlay import OverlayPainter
from picopose_ros.segmentation import Segment
from picopose_ros.synthetic.studio import random_rotation
from picopose_ros.synthetic.textures import value_noise
from picopose_ros.templates.meshes import ObjectMesh, ObjectSpec, load_object
from picopose_ros.templates.renderer import MeshRenderer

WIDTH, HEIGHT = 640, 480
K = np.array([[600.0, 0, 320], [0, 600.0, 240], [0, 0, 1]])
NOISE = 3.0
"""Standard deviation of a pixel's value, of 255."""

CLOSE, FALSE = 0.1, 0.2
"""ADD, in diameters, up to which a pose is right, and beyond which one called followed is false."""

_SEVERAL = 2.5
"""Distance of the camera from the objects, in diameters."""

_ARM = 0.5
"""Metres between a camera and what it looks at, for which motions of the camera are given: a film of a small
object is one of a large object, only smaller."""


def _turn(x: float, y: float, z: float) -> np.ndarray:
    return Rotation.from_rotvec(np.radians([x, y, z])).as_matrix()


def _still(t: float, d: float) -> tuple[np.ndarray, list[np.ndarray]]:
    return np.eye(4), [np.eye(4)]


def _hand_held(t: float, d: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """A camera in a hand, half a metre away: 5 cm and 4 degrees to either side, once in two seconds."""
    w = 2 * np.pi * t
    shift = 0.05 / _ARM * _SEVERAL * d * np.array([np.sin(0.5 * w), np.sin(0.4 * w), 0.5 * np.sin(0.3 * w)])
    return make_transform(_turn(2 * np.sin(0.6 * w), 3 * np.sin(0.5 * w), 4 * np.sin(0.4 * w)), shift), [
        np.eye(4)
    ]


def _turntable(t: float, d: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """36 degrees a second about the image's vertical."""
    return np.eye(4), [make_transform(_turn(0, 36 * t, 0), np.zeros(3))]


def _carried(t: float, d: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """An object in a hand: up to 0.9 of its diameter and 60 degrees a second."""
    w = 2 * np.pi * t
    shift = 0.3 * d * np.array([np.sin(0.25 * w), np.sin(0.35 * w), np.sin(0.2 * w)])
    return np.eye(4), [make_transform(_turn(25 * np.sin(0.3 * w), 30 * np.sin(0.2 * w), 0), shift)]


def _fast(t: float, d: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """A camera that is shaken, half a metre away: 8 cm to either side, one and a half times a second."""
    w = 2 * np.pi * t
    shift = 0.08 / _ARM * _SEVERAL * d * np.sin(1.5 * w)
    return make_transform(_turn(0, 3 * np.sin(1.2 * w), 0), [shift, 0, 0]), [np.eye(4)]


def _crossing(t: float, d: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """Two equal objects: one passes before the other, back and forth in 8 seconds."""
    x = 1.2 * d * np.cos(2 * np.pi * t / 8)
    return np.eye(4), [
        make_transform(np.eye(3), [x, 0, -0.8 * d]),
        make_transform(_turn(0, 90, 0), [-x, 0, 0.5 * d]),
    ]


FILMS: dict[str, Callable[[float, float], tuple[np.ndarray, list[np.ndarray]]]] = {
    "still": _still,
    "hand-held": _hand_held,
    "turntable": _turntable,
    "carried": _carried,
    "occlusion": _still,
    "fast": _fast,
    "crossing": _crossing,
}
"""By name: time (s) and diameter (m) -> T_fixed_cam (4, 4), and per object its motion (4, 4) there."""


@dataclass(frozen=True)
class Shot:
    """One image of a film.

    Attributes:
        t: seconds. rgb: (H, W, 3) uint8. T_fixed_cam: (4, 4). truth: T_cam_obj (4, 4) of each object.
        masks: (H, W) bool of each. covered: something stands before the objects.
    """

    t: float
    rgb: np.ndarray
    T_fixed_cam: np.ndarray
    truth: list[np.ndarray]
    masks: list[np.ndarray]
    covered: bool


@dataclass(frozen=True)
class Figures:
    """What came of a film.

    Attributes:
        film, class_id: which. frames: object images in which it could be seen.
        answered: share of these with a pose. recall: share with ADD < .1 d. false: share of those followed
            that are off by more than .2 d.
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
    turn: float | None
    shift: float | None
    switches: int
    lost_after: float | None
    found_after: float | None
    jitter_deg: float | None
    jitter: float | None
    milliseconds: float
    steps: list[tuple[str, float, float]]


def make_film(
    renderer: MeshRenderer, mesh: ObjectMesh, name: str, seed: int, seconds: float, rate: float
) -> Iterator[Shot]:
    """Render a film of an object, the same for the same arguments."""
    rng = np.random.default_rng(seed)
    d = mesh.diameter
    wall = np.stack([value_noise(rng, WIDTH, 6, 4) for _ in range(3)], -1)[:HEIGHT]
    R = random_rotation(rng)
    turned = make_transform(R, -R @ mesh.centre)
    place = make_transform(np.eye(3), [0, 0, _SEVERAL * d * (1.6 if name == "crossing" else 1.0)])
    plate = rng.integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    for n in range(round(seconds * rate) + 1):
        t = n / rate
        T_fixed_cam, motions = FILMS[name](t, d)
        truth = [invert_transform(T_fixed_cam) @ place @ motion @ turned for motion in motions]
        view = renderer.render_scene([(mesh, T) for T in truth], K, WIDTH, HEIGHT)
        alone = [renderer.render(mesh, T, K, WIDTH, HEIGHT) for T in truth]
        nearest = np.stack([np.where(one.mask, one.depth, np.inf) for one in alone])
        masks = [one.mask & (nearest.argmin(0) == i) for i, one in enumerate(alone)]
        rgb = np.where(view.mask[..., None], view.rgb, (60 + 140 * wall).astype(np.uint8))
        covered = name == "occlusion" and 0.35 * seconds <= t < 0.65 * seconds
        if name == "occlusion":  # a plate comes from the left, stays, and goes
            edge = np.interp(t / seconds, [0.2, 0.35, 0.65, 0.8], [0, WIDTH, WIDTH, 0])
            rgb[:, : int(edge)] = plate[:, : int(edge)]
            masks = [mask & (np.arange(WIDTH) >= int(edge)) for mask in masks]
        noisy = rgb + rng.normal(0, NOISE, rgb.shape)
        yield Shot(t, noisy.clip(0, 255).astype(np.uint8), T_fixed_cam, truth, masks, covered)


def measure(
    estimator: PoseEstimator,
    mesh: ObjectMesh,
    name: str,
    shots: Iterator[Shot],
    know_camera: bool = False,
    masks: float = 0.0,
    show: Callable[[Shot, Sequence[ObjectPose]], None] | None = None,
) -> Figures:
    """Follow through a film.

    Args:
        know_camera: tell where the camera is. masks: seconds between two masks; 0: only the first image.
        show: told of every image and its poses.
    """
    class_id, points = mesh.spec.class_id, evaluation_points(mesh, 500).surface
    group = SymmetryGroup(mesh.spec.symmetries)
    camera = CameraModel(K, WIDTH, HEIGHT)
    follower = Follower(estimator, nearest=lambda c, T, R: group.nearest(T, R))
    owner: dict[str, int] = {}
    rows: list[tuple[Shot, int, Verdict | None, float, np.ndarray | None]] = []
    steps: list[tuple[str, float, float]] = []
    switches, spent, due = 0, [], 0.0
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
            errors = [add_or_add_s(points, pose.T_cam_obj, true, not group.trivial) for true in shot.truth]
            if key not in keys and verdict is not Verdict.LOST:
                steps.append((verdict.value, pose.confidence, min(errors) / mesh.diameter))
            best = int(np.argmin(errors))
            owner.setdefault(key, best)
            if best != owner[key] and errors[best] < 0.3 * mesh.diameter < errors[owner[key]]:
                switches, owner[key] = switches + 1, best
        for i, true in enumerate(shot.truth):
            mine = [(v, p) for key, (v, p) in poses.items() if owner.get(key) == i and v is not Verdict.LOST]
            verdict, T = (mine[0][0], mine[0][1].T_cam_obj) if mine else (None, None)
            error = np.inf if T is None else add_or_add_s(points, T, true, not group.trivial)
            rows.append((shot, i, verdict, error / mesh.diameter, T))
    return _figures(name, class_id, rows, group, switches, spent, steps)


def _figures(
    name: str,
    class_id: str,
    rows: Sequence[tuple[Shot, int, Verdict | None, float, np.ndarray | None]],
    group: SymmetryGroup,
    switches: int,
    spent: Sequence[float],
    steps: list[tuple[str, float, float]],
) -> Figures:
    seen = [row for row in rows if row[0].masks[row[1]].sum() > 200]
    errors = np.array([row[3] for row in seen])
    followed = [row for row in rows if row[2] is Verdict.FOLLOWED]
    shot, i, _, _, T = rows[-1]
    turn = shift = lost_after = found_after = jitter_deg = jitter = None
    if T is not None:
        near = group.nearest(T, shot.truth[i][:3, :3])
        turn = rotation_angle_deg(near[:3, :3], shot.truth[i][:3, :3])
        shift = float(np.linalg.norm(near[:3, 3] - shot.truth[i][:3, 3]) / shot.truth[i][2, 3])
    if name == "occlusion":
        begin = next(row[0].t for row in rows if row[0].covered)
        end = next(row[0].t for row in rows if row[0].t > begin and not row[0].covered)
        lost_after = next((row[0].t - begin for row in rows if row[0].t >= begin and row[2] is None), None)
        found_after = next((r[0].t - end for r in rows if r[0].t >= end and r[2] is Verdict.FOLLOWED), None)
    if name == "still" and len(followed) > 2:
        poses = [group.nearest(row[4], followed[0][4][:3, :3]) for row in followed]
        spin = [Rotation.from_matrix(P[:3, :3] @ poses[0][:3, :3].T).as_rotvec(degrees=True) for P in poses]
        jitter_deg = float(np.linalg.norm(np.std(spin, axis=0)))
        places = np.std([P[:3, 3] for P in poses], axis=0)
        jitter = float(np.linalg.norm(places) / poses[0][2, 3])
    return Figures(
        name,
        class_id,
        len(seen),
        float(np.mean([row[2] is not None for row in seen])),
        float((errors < CLOSE).mean()),
        float(np.mean([row[3] > FALSE for row in followed])) if followed else 0.0,
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


def summary(films: Sequence[Figures]) -> str:
    """A table of means over the films of each kind; the drift is a median, the rest of the last row is over
    all poses."""
    head = "film,films,answered,recall,false,turn,shift,switches,lost,found,jitter deg,jitter,ms".split(",")
    rows = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]

    def cell(values: Sequence[float | None], digits: int, mean: Callable[..., float] = np.mean) -> str:
        known = [value for value in values if value is not None]
        return f"{mean(known):.{digits}f}" if known else "-"

    for name in [*dict.fromkeys(one.film for one in films), "all"]:
        own = [one for one in films if name in (one.film, "all")]
        cells = [name, str(len(own)), cell([o.answered for o in own], 3), cell([o.recall for o in own], 3)]
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
    options = {name: getattr(args, name) for name in ("seconds", "rate", "masks", "camera", "seed", "count")}
    found: list[Figures] = []
    strip = Strip({name: bank.spec for name, bank in estimator.banks.items()}) if args.strip else None
    with MeshRenderer(antialias=True) as renderer:
        for film in args.films:
            for n in range(args.count):
                mesh = load_object(estimator.banks[names[n % len(names)]].spec)
                shots = make_film(renderer, mesh, film, args.seed + n, args.seconds, args.rate)
                show = strip.show if strip is not None and n == 0 else None
                one = measure(estimator, mesh, film, shots, args.camera, args.masks, show)
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
    return 0

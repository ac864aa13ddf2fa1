"""``picopose eval sequences``: the films, and what is measured with an estimator that knows the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import trimesh

from picopose_ros.cli.main import main
from picopose_ros.estimation.refine_step import Look, Step
from picopose_ros.estimator import ObjectPose
from picopose_ros.evaluation.films import FILMS, HEIGHT, WIDTH, K, Shot, make_film
from picopose_ros.evaluation.sequences import false_share, measure, summary, thresholds
from picopose_ros.geometry.least_squares import moved
from picopose_ros.segmentation import Segment
from picopose_ros.templates.meshes import ObjectMesh, ObjectSpec, load_object
from picopose_ros.templates.posed import render_posed
from picopose_ros.templates.renderer import MeshRenderer

TIGHT = np.diag([1e-8] * 3 + [1e-6] * 3)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> ObjectMesh:
    path = tmp_path_factory.mktemp("meshes") / "box.ply"
    box = trimesh.creation.box((0.10, 0.07, 0.04)).subdivide()
    colours = np.random.default_rng(0).integers(30, 255, (len(box.vertices), 3))
    box.visual.vertex_colors = np.column_stack([colours, np.full(len(colours), 255)]).astype(np.uint8)
    box.export(path)
    return load_object(ObjectSpec("box", path))


@pytest.fixture(scope="module")
def renderer() -> Iterator[MeshRenderer]:
    with MeshRenderer(antialias=True) as renderer:
        yield renderer


class Oracle:
    """An estimator that knows the true poses of the film, and is off by as much as it is told to.

    Args:
        shots: the film. error: (6,) by image, motion from the true pose. score: of every step, by image.
    """

    def __init__(
        self, renderer: MeshRenderer, mesh: ObjectMesh, shots: Sequence[Shot], error, score=lambda n: 0.9
    ):
        self._renderer, self._mesh, self._shots = renderer, mesh, shots
        self._error, self._score, self._now = error, score, 0

    def _number(self, rgb: np.ndarray) -> int:
        return next(n for n, shot in enumerate(self._shots) if np.array_equal(shot.rgb, rgb))

    def estimate(self, rgb: np.ndarray, camera: object, segments: Sequence[Segment]) -> SimpleNamespace:
        shot = self._shots[self._number(rgb)]
        poses = []
        for i, segment in enumerate(segments):
            true = next(T for T, mask in zip(shot.truth, shot.masks) if np.array_equal(mask, segment.mask))
            size = np.ptp(self._mesh.bounds, axis=0)
            poses.append(
                ObjectPose(
                    "box", true, 0.9, TIGHT, "offsets", i, 1.0, 0, 50, 0.9, 0.8, self._mesh.centre, size
                )
            )
        return SimpleNamespace(poses=poses)

    def render(self, wanted):
        return [render_posed(self._renderer, self._mesh, T) for _, T in wanted]

    def compare(self, rgb: np.ndarray, K: np.ndarray, looks: Sequence[Look]) -> list[Step]:
        self._now = self._number(rgb)
        truth = self._shots[self._now].truth
        steps = []
        for look in looks:
            true = min(truth, key=lambda T: np.linalg.norm(T[:3, 3] - look.T_cam_obj[:3, 3]))
            T = moved(true, self._error(self._now))
            steps.append(Step(T, TIGHT, 0.9, 1.0, 1.0, 100, 1.0, 1.0, {}))
        return steps

    def score(self, step: Step) -> float:
        return self._score(self._now)


def film(renderer: MeshRenderer, mesh: ObjectMesh, name: str, seconds: float = 0.6) -> list[Shot]:
    return list(make_film(renderer, mesh, name, 3, seconds, 10))


def exact(_: int) -> np.ndarray:
    return np.zeros(6)


@pytest.mark.parametrize("name", FILMS)
def test_films_show_the_objects_where_they_say(renderer: MeshRenderer, mesh: ObjectMesh, name: str) -> None:
    shots = film(renderer, mesh, name, 0.2)
    assert [round(shot.t, 6) for shot in shots] == [0, 0.1, 0.2]
    again = film(renderer, mesh, name, 0.2)
    for shot, same in zip(shots, again):
        np.testing.assert_array_equal(shot.rgb, same.rgb)
        for T, mask in zip(shot.truth, shot.masks):
            uv = K @ (T @ np.r_[mesh.centre, 1.0])[:3]
            rows, columns = np.nonzero(mask)
            if len(rows) and name != "occlusion":
                apart = np.array([columns.mean(), rows.mean()]) - uv[:2] / uv[2]
                assert np.linalg.norm(apart) < 0.3 * np.sqrt(mask.sum())
    assert shots[0].rgb.shape == (HEIGHT, WIDTH, 3)


def test_an_estimator_that_knows_the_answer_has_no_errors(renderer: MeshRenderer, mesh: ObjectMesh) -> None:
    shots = film(renderer, mesh, "turntable")
    found = measure(Oracle(renderer, mesh, shots, exact), mesh, "turntable", iter(shots))
    assert (found.frames, found.answered, found.recall, found.false) == (7, 1.0, 1.0, 0.0)
    assert found.turn < 1e-3 and found.shift < 1e-6 and found.switches == 0
    assert len(found.steps) == 6 and all(step[0] == "followed" for step in found.steps)
    still = film(renderer, mesh, "still")
    found = measure(Oracle(renderer, mesh, still, exact), mesh, "still", iter(still))
    assert found.jitter_deg < 1e-3 and found.jitter < 1e-6
    crossing = film(renderer, mesh, "crossing", 0.3)
    assert measure(Oracle(renderer, mesh, crossing, exact), mesh, "crossing", iter(crossing)).answered == 1


def test_errors_are_counted(renderer: MeshRenderer, mesh: ObjectMesh) -> None:
    """From the third image on it is off by .3 d, from the fifth on it is uncertain."""
    shots = film(renderer, mesh, "still")
    far = np.r_[0.3 * mesh.diameter, 0, 0, 0, 0, 0]
    oracle = Oracle(renderer, mesh, shots, lambda n: far * (n >= 2), lambda n: 0.9 if n < 4 else 0.78)
    found = measure(oracle, mesh, "still", iter(shots))
    assert found.answered == 1.0 and found.recall == pytest.approx(2 / 7)
    assert [step[0] for step in found.steps] == ["followed"] * 3 + ["uncertain"] * 3
    assert [round(step[2], 3) for step in found.steps] == [0.0, 0.3, 0.3, 0.3, 0.3, 0.3]
    assert false_share(found.steps) == pytest.approx(2 / 3)
    assert false_share(found.steps, 0.3) == pytest.approx(5 / 6) and false_share(found.steps, 0.95) == 0
    assert found.shift > 0.05 and found.jitter > 0.01
    table = summary([found]).splitlines()
    assert table[2].startswith("| still | 1 | 1.000 | 0.286 | 0.500 | - | 0.6667 |") and table[-1].startswith(
        "| all | 1 |"
    )


def test_following_is_compared_with_masks_in_every_image(renderer: MeshRenderer, mesh: ObjectMesh) -> None:
    """Following is off by .3 d from the third image on, masks never are; it is lost from the sixth on."""
    shots = film(renderer, mesh, "still")
    far = np.r_[0.3 * mesh.diameter, 0, 0, 0, 0, 0]
    oracle = Oracle(renderer, mesh, shots, lambda n: far * (n >= 2), lambda n: 0.9 if n < 5 else 0.1)
    found = measure(oracle, mesh, "still", iter(shots), every=True)
    assert (found.recall, found.masked) == (pytest.approx(2 / 7), 1.0)
    assert found.right == pytest.approx(2 / 5)
    assert measure(oracle, mesh, "still", iter(shots)).masked is None
    assert "| 0.400 | 1.000 |" in summary([found])


def test_thresholds_of_the_score_are_compared() -> None:
    steps = [("followed", 0.9, 0.01), ("followed", 0.62, 0.15), ("uncertain", 0.5, 0.02)]
    rows = thresholds([*steps, ("uncertain", 0.52, 0.3)]).splitlines()
    assert "| 0.50 | 4 | 1.000 | 0.500 | 0.2500 |" in rows
    assert "| 0.60 | 2 | 0.500 | 0.500 | 0.0000 |" in rows
    assert "| 0.70 | 1 | 0.250 | 1.000 | 0.0000 |" in rows


def test_what_is_covered_is_lost_and_found_again(renderer: MeshRenderer, mesh: ObjectMesh) -> None:
    shots = list(make_film(renderer, mesh, "occlusion", 3, 6.0, 2))
    covered = [shot.covered for shot in shots]
    assert any(covered) and not covered[-1]
    oracle = Oracle(renderer, mesh, shots, exact, lambda n: 0.1 if covered[n] else 0.9)
    found = measure(oracle, mesh, "occlusion", iter(shots))
    assert found.lost_after == 0 and found.found_after == 0


@pytest.mark.parametrize("option", ["--seconds", "--rate"])
def test_a_film_without_images_is_refused(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "sequences", "--meshes", str(tmp_path), "--out", str(tmp_path / "r.json"), option, "0"]
    assert main(words) != 0
    assert "must be more than 0" in capsys.readouterr().err

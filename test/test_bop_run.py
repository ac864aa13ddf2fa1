"""`picopose eval bop` on the miniature dataset: whole, killed and gone on, by several processes, broken."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mini_bop import UNSEEN, MiniBop

from picopose_ros.cli.main import main
from picopose_ros.errors import ConfigError
from picopose_ros.evaluation.bop.dataset import BopDataset
from picopose_ros.evaluation.bop.journal import ImageRecord, Journal
from picopose_ros.evaluation.bop.results import BopRow, read_results
from picopose_ros.evaluation.bop.run import this_process

CSV = "picopose-1hyp_mini-test.csv"
WAIT = 120.0
"""Seconds that something may take on a loaded machine; never slept through."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So that this process rounds as those that it starts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arguments(data: MiniBop, cache: Path, out: Path, *more: str) -> list[str]:
    """One hypothesis and few templates: it is not the poses that are tested here."""
    where = ["--root", str(data.root), "--dataset", data.name, "--detections", str(data.detections)]
    cheap = ["--hypotheses", "1", "--viewpoints", "42", "--refinements", "0"]
    cheap += ["--cache-dir", str(cache), "--out", str(out)]
    return ["eval", "bop", *where, *cheap, *more]


@pytest.fixture(scope="module")
def finished(mini_bop: MiniBop, mini_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("run") / "whole"
    assert main(arguments(mini_bop, mini_cache, out)) == 0
    return out


@pytest.fixture
def copy(mini_bop: MiniBop, tmp_path: Path) -> MiniBop:
    """The dataset, to be broken, all but its models: so their banks are known."""
    shutil.copytree(mini_bop.root, tmp_path / "bop", ignore=shutil.ignore_patterns("models"))
    made = MiniBop(tmp_path / "bop", tmp_path / "bop" / mini_bop.detections.name)
    (made.folder / "models").symlink_to(mini_bop.folder / "models")
    return made


def poses(out: Path) -> list[str]:
    """The csv's lines without the times."""
    return [line.rsplit(",", 1)[0] for line in (out / CSV).read_text().splitlines()]


def start(argv: list[str], *launcher: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "picopose_ros.cli.main", *argv]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_row_for_every_target_that_was_seen(finished: Path, mini_bop: MiniBop) -> None:
    dataset, rows = BopDataset(mini_bop.root, mini_bop.name), read_results(finished / CSV)
    asked = Counter(
        {
            (target.scene_id, target.image_id, target.obj_id): target.inst_count
            for target in dataset.targets
            if (target.scene_id, target.image_id) != UNSEEN
        }
    )
    assert Counter((row.scene_id, row.im_id, row.obj_id) for row in rows) == asked
    assert [(row.scene_id, row.im_id) for row in rows] == sorted((row.scene_id, row.im_id) for row in rows)
    near = []
    for place in {(row.scene_id, row.im_id) for row in rows}:
        own = [row for row in rows if (row.scene_id, row.im_id) == place]
        assert len({row.time for row in own}) == 1 and own[0].time > 0.2  # with the detections' own
        for row in own:
            np.testing.assert_allclose(row.R @ row.R.T, np.eye(3), atol=1e-6)
            truths = [t.T_cam_obj[:3, 3] for t in dataset.ground_truth(*place) if t.obj_id == row.obj_id]
            near.append(min(np.linalg.norm(row.T_cam_obj[:3, 3] - truth) for truth in truths) < 0.15)
    assert np.mean(near) > 0.7
    # Detection scores, as the released code writes them.
    assert {row.score for row in rows} <= {0.9, 0.8, 0.7}


def test_the_report_of_a_run(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert report["images"] == 6 and report["rows"] == len(read_results(finished / CSV))
    assert report["problems"] == {"image without detections": 1} and report["failed_images"] == []
    assert report["settings"]["hypotheses"] == 1 and report["settings"]["preset"] == "tiny"
    times = report["milliseconds_per_image"]
    assert {"crop", "encode", "match", "regress", "pnp", "total", "detection"} <= set(times)
    assert times["detection"]["mean"] == 200.0
    assert 0 < times["total"]["median"] <= times["total"]["largest"]


def test_other_scores_and_limits(
    mini_bop: MiniBop, mini_cache: Path, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(mini_bop, mini_cache, tmp_path, "--score", "pose", "--cap", "1", "--limit", "1")
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "3 poses for 3 instances in 1 images" in said and "| regress |" in said
    rows, before = read_results(tmp_path / CSV), read_results(finished / CSV)[:3]
    for row, other in zip(rows, before, strict=True):
        np.testing.assert_array_equal(row.R, other.R)
        assert row.score != other.score and 0 <= row.score <= 1
    # The same run on more images goes on with those that are missing.
    (line,) = (tmp_path / "journal-0.jsonl").read_text().splitlines()[1:]
    assert main([*argv[:-1], "2"]) == 0
    kept = (tmp_path / "journal-0.jsonl").read_text().splitlines()[1:]
    assert len(kept) == 2 and kept[0] == line
    assert len(read_results(tmp_path / CSV)) == 5


def test_a_killed_run_goes_on(mini_bop: MiniBop, mini_cache: Path, tmp_path: Path, finished: Path) -> None:
    journal = tmp_path / "journal-0.jsonl"
    argv = arguments(mini_bop, mini_cache, tmp_path)
    process = start(argv)
    until = time.monotonic() + WAIT
    while not (journal.is_file() and journal.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / CSV).exists()
    kept = journal.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    with journal.open("ab") as file:  # the half line of a process that was killed while it wrote
        file.write(b'{"scene_id": 48, "image_')
    assert main(argv) == 0
    assert journal.read_bytes().startswith(kept)
    assert poses(tmp_path) == poses(finished)
    times = {(row.scene_id, row.im_id): row.time for row in read_results(tmp_path / CSV)}
    first = ImageRecord(**json.loads(kept.splitlines()[1])).rows[0]
    assert times[first.scene_id, first.im_id] == first.time  # not estimated again


def test_several_processes_make_the_same_csv(
    mini_bop: MiniBop, mini_cache: Path, tmp_path: Path, finished: Path
) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start(arguments(mini_bop, mini_cache, tmp_path), *launcher)
    said, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 0, said
    assert poses(tmp_path) == poses(finished)
    shares = [path.read_text().count('"scene_id"') for path in sorted(tmp_path.glob("journal-*.jsonl"))]
    assert shares == [3, 3]
    assert said.count("poses for") in (1, 2)  # both, where both see that all is done


def test_a_process_knows_its_share_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert this_process("cuda") == (0, 1, "cuda")
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert this_process("cuda") == (3, 4, "cuda:1")
    assert this_process("cpu") == (3, 4, "cpu")
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ConfigError, match="torchrun"):
        this_process("cpu")


def test_another_run_in_the_same_folder_is_refused(
    mini_bop: MiniBop, mini_cache: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "journal-0.jsonl").read_bytes()
    assert main(arguments(mini_bop, mini_cache, finished, "--hypotheses", "2", "--score", "pose")) == 2
    said = capsys.readouterr().err
    for words in ("score: detection there, pose now", "hypotheses: 1 there, 2 now", "--out"):
        assert words in said
    assert (finished / "journal-0.jsonl").read_bytes() == before
    # The same again has nothing to do.
    assert main(arguments(mini_bop, mini_cache, finished)) == 0
    assert (finished / "journal-0.jsonl").read_bytes() == before


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_broken_images_are_counted_and_tried_again(
    copy: MiniBop,
    mini_bop: MiniBop,
    mini_cache: Path,
    tmp_path: Path,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    broken = [
        copy.folder / "test" / "000002" / "rgb" / "000003.png",
        copy.folder / "test" / "000048" / "scene_camera.json",
    ]
    whole = [path.read_bytes() for path in broken]
    broken[0].write_bytes(whole[0][:300])
    rewrite(broken[1], lambda cameras: cameras.pop("2"))
    assert main(arguments(copy, mini_cache, out, "--limit", "1")) == 2
    said = capsys.readouterr().err
    assert "none of the 1 images could be used" in said and "000003.png" in said
    assert not (out / CSV).exists()
    assert main(arguments(copy, mini_cache, out)) == 1
    said = capsys.readouterr().err
    assert "2 x image that can't be used" in said and "000003.png" in said
    assert "scene_camera.json: has no entry of image 2" in said
    report = json.loads((out / "report.json").read_text())
    assert report["failed_images"] == [[2, 3], [48, 2]]
    expected = [line for line in poses(finished) if not line.startswith(("2,3,", "48,2,"))]
    assert poses(out) == expected
    for path, content in zip(broken, whole):
        path.write_bytes(content)
    assert main(arguments(copy, mini_cache, out)) == 0
    assert poses(out) == poses(finished)


def test_input_that_no_run_can_use(
    copy: MiniBop, mini_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def refused(*words: str, more: tuple[str, ...] = ()) -> None:
        assert main(arguments(copy, mini_cache, out, *more)) == 2
        said = capsys.readouterr().err
        assert said.startswith("picopose eval bop: ") and "Traceback" not in said
        for word in words:
            assert word in said
        assert not out.exists()

    refused("no folder", "other", more=("--dataset", "other"))
    refused("no folder train", more=("--split", "train"))
    refused("none.json", more=("--detections", str(tmp_path / "none.json")))
    refused("none.safetensors", more=("--weights", str(tmp_path / "none.safetensors")))
    if not torch.cuda.is_available():
        refused("isn't there", more=("--device", "cuda"))
    rewrite(copy.folder / "test_targets_bop19.json", lambda targets: targets[2].update(obj_id=99))
    refused("test_targets_bop19.json, entry 2: asks for object 99", "1, 5, 8")
    rewrite(copy.folder / "test_targets_bop19.json", lambda targets: targets.clear())
    refused("asks for nothing")
    (tmp_path / "file").touch()
    shutil.rmtree(copy.folder / "test")
    refused("no folder test")


def test_a_journal_is_one_process_and_one_run(tmp_path: Path) -> None:
    pose = BopRow.of_pose(2, 3, 5, 0.5, np.eye(4), 0.1)
    journal = Journal(tmp_path, {"a": 1}, rank=1)
    journal.add(ImageRecord(2, 3, problems=[("kind", "what")], failed=True))
    journal.add(ImageRecord(2, 3, [pose.line()]))
    other = Journal(tmp_path, {"a": 1}, rank=0)
    other.add(ImageRecord(2, 7))
    (record, empty) = (other.read()[key] for key in ((2, 3), (2, 7)))
    assert record.rows[0].time == 0.1 and not record.failed and empty.rows == []
    with pytest.raises(ConfigError, match="another process writes"):
        Journal(tmp_path, {"a": 1}, rank=1)
    journal.close()
    other.close()
    with pytest.raises(ConfigError, match="a: 1 there, 2 now; b: None there, 3 now"):
        Journal(tmp_path, {"a": 2, "b": 3}, rank=2)
    assert not (tmp_path / "journal-2.jsonl").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="can't be written"):
        Journal(tmp_path / "file", {})

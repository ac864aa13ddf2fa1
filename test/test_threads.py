"""How many threads the network gets: by a clock that the passes themselves move on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from picopose_ros.estimation import threads
from picopose_ros.estimation.threads import choose_threads


@pytest.fixture(autouse=True)
def _threads_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield
    torch.set_num_threads(before)


class Clock:
    """Passes that take as long as a function of the number of threads says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int, seconds: Callable[[int], float]) -> None:
        self.now, self._seconds = 0.0, seconds
        self.passes: list[int] = []
        monkeypatch.setattr(threads, "_ALL", most)
        monkeypatch.setattr(threads.time, "perf_counter", lambda: self.now)

    def run(self) -> None:
        self.passes.append(torch.get_num_threads())
        self.now += self._seconds(self.passes[-1])


@pytest.mark.parametrize(
    ("seconds", "most", "chosen", "measured"),
    [
        (lambda n: 0.1 / n, 6, 6, {1, 2, 4, 6}),
        (lambda n: 0.1, 4, 1, {1, 2, 4}),
        (lambda n: 0.1 + 0.05 * n, 2, 1, {1, 2}),
        (lambda n: 0.1 if n == 1 else 0.097, 2, 1, {1, 2}),  # not worth a core
        (lambda n: 0.1 / min(n, 2), 8, 2, {1, 2, 4, 8}),
    ],
)
def test_the_fewest_threads_that_are_about_fastest_are_taken(
    monkeypatch: pytest.MonkeyPatch,
    seconds: Callable[[int], float],
    most: int,
    chosen: int,
    measured: set[int],
) -> None:
    clock = Clock(monkeypatch, most, seconds)
    for _ in range(2):  # the second time is not bound by what the first one chose
        clock.passes = []
        choose_threads(clock.run)
        assert torch.get_num_threads() == chosen
        assert set(clock.passes) == measured


def test_a_long_pass_keeps_all_threads_and_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 2, lambda n: 5.0 / n)
    choose_threads(clock.run)
    assert clock.passes == [2, 2] and torch.get_num_threads() == 2


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    clock = Clock(monkeypatch, 2, lambda n: 1.0 * n)
    choose_threads(clock.run)
    assert clock.passes == [] and torch.get_num_threads() == 2

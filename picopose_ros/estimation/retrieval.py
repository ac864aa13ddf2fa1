"""Stage 1: the templates that are tried for each query."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from picopose_ros.estimation.results import Choice


def best_crops(segments: Sequence[int], scores: Sequence[Tensor]) -> list[int]:
    """Of the queries of each segment the one whose best template matches best; the first of equals.

    Args:
        segments: per query the index of its segment.
        scores: per query (N,) stage 1's score of every template.
    """
    best: dict[int, tuple[float, int]] = {}
    for row, (segment, own) in enumerate(zip(segments, scores)):
        value = float(own.max())
        if segment not in best or value > best[segment][0]:
            best[segment] = value, row
    return [row for _, row in best.values()]


def choose_templates(
    scores: Sequence[Tensor],
    count: int,
    rerank: int = 0,
    agreement: Callable[[int, Tensor], Tensor] | None = None,
) -> list[Choice]:
    """The best templates of every query, best first within a query.

    Args:
        scores: per query (N,) stage 1's score of every template of its bank.
        count: templates per query.
        rerank: this many of the best are ordered by ``agreement`` first; 0: by the score alone.
        agreement: of a query's index and templates (n,): (n,) how well their matches agree on one motion.
    """
    chosen: list[Choice] = []
    for row, own in enumerate(scores):
        best = own.topk(min(max(count, rerank), len(own))).indices
        if rerank:
            best = best[agreement(row, best).argsort(descending=True, stable=True)]
        best = best[:count]
        chosen += [Choice(row, *choice) for choice in zip(best.tolist(), own[best].tolist())]
    return chosen

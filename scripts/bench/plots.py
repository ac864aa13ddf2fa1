"""Line plots as PNG, drawn with OpenCV."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from measure import Plot

from picopose_ros.evaluation.sheets import write_picture

COLOURS = ((30, 90, 180), (200, 80, 30), (40, 140, 60), (140, 50, 150), (120, 120, 40), (60, 60, 60))
WIDTH, HEIGHT = 520, 340
LEFT, RIGHT, TOP, BOTTOM = 74, 18, 40, 52


def panel(plot: Plot) -> np.ndarray:
    """(340, 520, 3) uint8 of one plot.

    Raises:
        ValueError: nothing is to be drawn, or a value that is no positive number on a logarithmic axis.
    """
    points = [point for curve in plot.curves for point in curve.points]
    if not points or not all(math.isfinite(v) and (v > 0 or not plot.logarithmic) for p in points for v in p):
        raise ValueError(f"plot {plot.name}: values must be finite, and positive on logarithmic axes")
    canvas = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    ticks = [_ticks([p[axis] for p in points], plot.logarithmic) for axis in (0, 1)]
    if plot.logarithmic:  # along x the values that were measured, where they don't crowd
        ticks[0] = _spaced(sorted({p[0] for p in points}))
    spans = [_span([*(p[axis] for p in points), *ticks[axis]], plot.logarithmic) for axis in (0, 1)]

    def at(x: float, y: float) -> tuple[int, int]:
        place = []
        for value, (low, high) in zip((x, y), spans):
            value = math.log(value) if plot.logarithmic else value
            place.append((value - low) / (high - low))
        return (
            round(LEFT + place[0] * (WIDTH - LEFT - RIGHT)),
            round(HEIGHT - BOTTOM - place[1] * (HEIGHT - TOP - BOTTOM)),
        )

    for x in ticks[0]:
        column = at(x, points[0][1])[0]
        cv2.line(canvas, (column, TOP), (column, HEIGHT - BOTTOM), (228, 228, 228), 1)
        _centred(canvas, _number(x), (column, HEIGHT - BOTTOM + 16))
    for y in ticks[1]:
        row = at(points[0][0], y)[1]
        cv2.line(canvas, (LEFT, row), (WIDTH - RIGHT, row), (228, 228, 228), 1)
        text = _number(y)
        _text(canvas, text, (LEFT - 6 - _width(text), row + 4))
    for index, curve in enumerate(plot.curves):
        colour = COLOURS[index % len(COLOURS)]
        places = [at(*point) for point in sorted(curve.points)]
        for first, second in zip(places, places[1:]):
            cv2.line(canvas, first, second, colour, 2, cv2.LINE_AA)
        for place in places:
            cv2.circle(canvas, place, 3, colour, -1, cv2.LINE_AA)
        if len(plot.curves) > 1:
            row = TOP + 16 + 16 * index
            cv2.line(canvas, (LEFT + 8, row - 4), (LEFT + 28, row - 4), colour, 2, cv2.LINE_AA)
            _text(canvas, curve.name, (LEFT + 34, row))
    cv2.rectangle(canvas, (LEFT, TOP), (WIDTH - RIGHT, HEIGHT - BOTTOM), (0, 0, 0), 1)
    _text(canvas, plot.title, (10, 18), 0.5)
    _text(canvas, plot.y, (10, 34), 0.4)
    _centred(canvas, plot.x, ((LEFT + WIDTH - RIGHT) // 2, HEIGHT - 14))
    return canvas


def write_sheet(plots: Sequence[Plot], path: Path, columns: int = 2) -> None:
    """Write the plots side by side as one picture."""
    panels = [panel(plot) for plot in plots]
    panels += [np.full_like(panels[0], 255)] * (-len(panels) % min(columns, len(panels)))
    columns = min(columns, len(panels))
    rows = [np.hstack(panels[i : i + columns]) for i in range(0, len(panels), columns)]
    write_picture(path, np.vstack(rows))


def _span(values: Sequence[float], logarithmic: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if logarithmic:
        low, high = math.log(low), math.log(high)
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin


def _ticks(values: Sequence[float], logarithmic: bool) -> list[float]:
    low, high = min(values), max(values)
    if not logarithmic:
        step = 10.0 ** math.floor(math.log10((high - low) or 1.0))
        step *= next(f for f in (0.2, 0.5, 1.0, 2.0, 5.0) if (high - low) / (step * f) <= 6)
        return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [f * 10.0**d for d in decades for f in (1, 2, 5)]
    # From the last one below to the first one above.
    first = max((i for i, t in enumerate(fine) if t <= low), default=0)
    last = min((i for i, t in enumerate(fine) if t >= high), default=len(fine) - 1)
    chosen = fine[first : last + 1]
    coarse = [t for t in chosen if f"{t:e}".startswith("1.0")]
    return coarse if len(chosen) > 7 and len(coarse) > 2 else chosen


def _spaced(values: Sequence[float]) -> list[float]:
    kept = [values[0]]
    reach = math.log(values[-1] / values[0]) or 1.0
    for value in values[1:]:
        if math.log(value / kept[-1]) > 0.08 * reach:
            kept.append(value)
    return kept


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 or value == round(value) else f"{value:.2g}"


def _width(text: str, size: float = 0.4) -> int:
    return cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, 1)[0][0]


def _centred(canvas: np.ndarray, text: str, at: tuple[int, int]) -> None:
    _text(canvas, text, (at[0] - _width(text) // 2, at[1]))


def _text(canvas: np.ndarray, text: str, at: tuple[int, int], size: float = 0.4) -> None:
    cv2.putText(canvas, text, at, cv2.FONT_HERSHEY_SIMPLEX, size, (0, 0, 0), 1, cv2.LINE_AA)

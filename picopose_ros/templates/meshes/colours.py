"""sRGB and linear light. Files hold one or the other; templates are sRGB, as photographs are."""

from __future__ import annotations

import numpy as np


def srgb_from_linear(linear: np.ndarray) -> np.ndarray:
    """sRGB 0..1 of linear light 0..1 (IEC 61966-2-1), any shape, clipped."""
    linear = np.clip(np.asarray(linear, np.float64), 0.0, 1.0)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def linear_from_srgb(srgb: np.ndarray) -> np.ndarray:
    """Linear light 0..1 of sRGB 0..1, any shape, clipped."""
    srgb = np.clip(np.asarray(srgb, np.float64), 0.0, 1.0)
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def to_bytes(srgb: np.ndarray) -> np.ndarray:
    """uint8 0..255 of sRGB 0..1."""
    return np.round(255.0 * np.clip(srgb, 0.0, 1.0)).astype(np.uint8)


def unit_range(values: np.ndarray) -> np.ndarray:
    """Colours 0..1 (n, 3 or 4) float64 of what files hold: integers of any width, floats 0..1 or 0..255."""
    values = np.asarray(values)
    if values.dtype.kind in "ui":
        return values / float(np.iinfo(values.dtype).max)
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=1.0, neginf=0.0)
    # 1.0 and a little more is a float colour; nobody writes 0..255 with no channel above 2.
    return np.clip(values / 255.0 if values.size and values[:, :3].max() > 2.0 else values, 0.0, 1.0)

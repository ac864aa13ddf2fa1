"""Units of meshes: names, what a file states of itself, and sizes that speak for another one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from picopose_ros.errors import MeshError

UNITS: dict[str, float] = {"m": 1.0, "cm": 0.01, "mm": 0.001, "in": 0.0254}
"""Metres per unit."""

USUAL_DIAMETER: tuple[float, float] = (0.01, 3.0)
"""An object outside this range (metres) is almost certainly in another unit than it was read in."""


def metres_per_unit(unit: str) -> float:
    """Of a name in `UNITS`, or of what a file states ("0.3048 m").

    Raises:
        MeshError: it is neither.
    """
    if unit in UNITS:
        return UNITS[unit]
    match = re.fullmatch(r"([\d.eE+-]+) m", unit)
    if match is None:
        raise MeshError(f"unit is {unit!r}; use one of {', '.join(UNITS)}")
    return float(match[1])


def unit_name(metres: float) -> str:
    """The inverse of `metres_per_unit`."""
    for name, value in UNITS.items():
        if abs(metres - value) <= 1e-6 * value:
            return name
    return f"{metres:.9g} m"


def stated_unit(path: Path) -> str | None:
    """The unit that a mesh file says its numbers are in; None if it says nothing.

    COLLADA has a ``<unit>`` and means metres without one; glTF is in metres.
    """
    suffix = path.suffix.lower()
    if suffix in (".glb", ".gltf"):
        return "m"
    if suffix != ".dae":
        return None
    return unit_name(collada_unit(path))


def collada_unit(path: Path) -> float:
    """Metres per unit that a COLLADA file says of itself; 1 if it says nothing that makes sense."""
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
    except OSError:
        return 1.0
    found = re.search(rb"<unit\b[^>]*\bmeter\s*=\s*[\"']([^\"']+)[\"']", head)
    try:
        unit = float(found[1]) if found else 1.0
    except ValueError:
        unit = 1.0
    return unit if np.isfinite(unit) and unit > 0 else 1.0


def fitting_units(size: float) -> list[str]:
    """Units in which a length in the file's numbers would be an object's, the likeliest first."""
    low, high = USUAL_DIAMETER
    fitting = [unit for unit, metres in UNITS.items() if low <= size * metres <= high]
    # Of several, the one nearest to the size of something a robot handles.
    return sorted(fitting, key=lambda unit: abs(np.log(size * UNITS[unit] / 0.2)))

"""Names of object instances: ``<class>_<n>``, kept from frame to frame by position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class InstanceNamer:
    """Gives each pose of a frame a name, the one of the nearest pose of the same class in the frame before.

    Deterministic: pairs are made from the smallest distance up (ties by name, then by order of input); what
    is left over takes the smallest free number in order of input.
    """

    def __init__(self) -> None:
        self._previous: dict[str, dict[int, np.ndarray]] = {}

    def assign(self, class_ids: Sequence[str], positions: Sequence[np.ndarray]) -> list[str]:
        """Names for poses of ``class_ids`` at ``positions`` ((3,) each, camera frame, m), in input order."""
        names = [""] * len(class_ids)
        for class_id in dict.fromkeys(class_ids):
            indices = [i for i, other in enumerate(class_ids) if other == class_id]
            numbers = self._numbers(self._previous.get(class_id, {}), [positions[i] for i in indices])
            self._previous[class_id] = {
                n: np.asarray(positions[i]) for n, i in zip(numbers, indices, strict=True)
            }
            for number, index in zip(numbers, indices, strict=True):
                names[index] = f"{class_id}_{number}"
        return names

    @staticmethod
    def _numbers(previous: dict[int, np.ndarray], positions: list[np.ndarray]) -> list[int]:
        candidates = sorted(
            (float(np.linalg.norm(position - old)), number, index)
            for index, position in enumerate(positions)
            for number, old in previous.items()
        )
        chosen: dict[int, int] = {}
        taken: set[int] = set()
        for _, number, index in candidates:
            if index not in chosen and number not in taken:
                chosen[index] = number
                taken.add(number)
        for index in range(len(positions)):
            if index not in chosen:
                number = next(n for n in range(len(positions) + len(taken) + 1) if n not in taken)
                chosen[index] = number
                taken.add(number)
        return [chosen[index] for index in range(len(positions))]

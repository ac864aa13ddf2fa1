"""What is declared of one parameter: default, description, range, and when it may be set."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor


class Changeable(Enum):
    """When a parameter may be set; the value is what ``ros2 param describe`` says of it."""

    AT_START = "read once, when the node starts"
    UNCONFIGURED = "can be set while the node is unconfigured"
    ALWAYS = "dynamic"


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter.

    Attributes:
        default: also says its type.
        minimum, maximum: of a number. choices: all that it may be.
        changeable: when it may be set.
        check: gives the reason why a value can't be used, or "".
    """

    name: str
    default: str | int | float | bool
    description: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[Any, ...] = ()
    changeable: Changeable = Changeable.UNCONFIGURED
    check: Callable[[Any], str] = lambda value: ""

    def descriptor(self) -> ParameterDescriptor:
        """What ``ros2 param describe`` shows."""
        constraints = [f"one of {', '.join(map(str, self.choices))}"] if self.choices else []
        descriptor = ParameterDescriptor(
            name=self.name,
            description=self.description,
            read_only=self.changeable is Changeable.AT_START,
            additional_constraints="; ".join([*constraints, self.changeable.value]),
        )
        if self.minimum is not None and self.maximum is not None:
            if isinstance(self.default, int):
                whole = IntegerRange(from_value=int(self.minimum), to_value=int(self.maximum), step=1)
                descriptor.integer_range = [whole]
            else:
                span = FloatingPointRange(from_value=float(self.minimum), to_value=float(self.maximum))
                descriptor.floating_point_range = [span]
        return descriptor

    def refusal(self, value: Any) -> str:
        """Why the parameter can't have this value; empty if it can."""
        if self.choices and value not in self.choices:
            known = ", ".join(map(str, self.choices))
            return f"parameter {self.name} is {value!r}: it must be one of {known}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"parameter {self.name} is {value}: it must be a finite number"
        reason = self.check(value)
        return f"parameter {self.name} is {value!r}: {reason}" if reason else ""

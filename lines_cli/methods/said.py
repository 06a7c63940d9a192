"""What a recipe says of a method's parameters, and what the method has to say of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lines_cli.methods.parameters import Parameter, values_of

Values = Mapping[str, Any]
"""A method's parameters for one tensor: a tuple with one value per model, or one value."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a recipe says of a method's parameters.

    Attributes:
        parameters: the method's own.
        top: those said of all models, checked.
        settings: for each parameter every setting of it, of all models or of one.
        first: their values at the first layer, where no filter counts.
        models: how many are merged.
    """

    parameters: Mapping[str, Parameter]
    top: Mapping[str, Any]
    settings: Mapping[str, Sequence[Any]]
    first: Values
    models: int

    def values(self, key: str) -> tuple[Any, ...]:
        """Every value that is said of a parameter; its default, if none is."""
        said = tuple(value for setting in self.settings[key] for value in values_of(setting))
        return said or (self.parameters[key].default,)

    def varies(self, key: str) -> bool:
        """Whether a parameter differs by tensor."""
        return any(isinstance(setting, list) for setting in self.settings[key])


@dataclass(frozen=True, slots=True)
class Conflict:
    """Values that contradict each other: why, and the parameter at fault, if it is one."""

    text: str
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Note:
    """What a person should know of how parameters were read."""

    text: str


@dataclass(frozen=True, slots=True)
class Settled:
    """A value that follows from the others, of a parameter that the recipe leaves open."""

    key: str
    value: Any


Remark = Conflict | Note | Settled

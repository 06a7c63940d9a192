"""Arithmetic over metrics, as objectives say it: parsed and carried out here, and never given to Python to run.

A value is a number, a list of numbers, or numbers by name. Operators work element by element; a number goes with each
element of the other side. `mean`, `min` and `max` make one number of a list.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from lines_cli.errors import RecipeError, printable

Value = float | list[float] | dict[str, float]

_LONGEST = 2000  # characters
_OPERATORS: dict[type[ast.operator], tuple[str, Callable[[float, float], float]]] = {
    ast.Add: ("+", lambda a, b: a + b),
    ast.Sub: ("-", lambda a, b: a - b),
    ast.Mult: ("*", lambda a, b: a * b),
    ast.Div: ("/", lambda a, b: a / b),
    ast.Pow: ("**", lambda a, b: a**b),
}
_SIGNS: dict[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: lambda a: a, ast.USub: lambda a: -a}
_EACH: dict[str, Callable[[float], float]] = {"abs": abs, "sqrt": math.sqrt}
_OF_ALL: dict[str, Callable[[list[float]], float]] = {
    "mean": lambda numbers: math.fsum(numbers) / len(numbers),
    "min": min,
    "max": max,
}
FUNCTIONS = (*sorted(_OF_ALL), *sorted(_EACH))


class ExpressionError(ValueError):
    """Why an expression has no value."""


@dataclass(frozen=True, slots=True)
class Expression:
    """An expression that was parsed.

    Attributes:
        text: as it was written.
        names: that it asks for, each once, in their order.
    """

    text: str
    names: tuple[str, ...]
    _tree: ast.expr

    def value(self, known: Mapping[str, Value]) -> Value:
        """What it comes to.

        Args:
            known: the value of each name.

        Raises:
            ExpressionError: a name is not known, sides do not go together, or there is no such number.
        """
        try:
            return _value(self._tree, known)
        except ZeroDivisionError:
            raise ExpressionError(f"{self.text}: division by zero") from None
        except (OverflowError, ValueError, TypeError) as error:
            if isinstance(error, ExpressionError):
                raise
            raise ExpressionError(f"{self.text}: no such number ({error})") from error

    def number(self, known: Mapping[str, Value]) -> float:
        """The same, where it has to be one finite number.

        Raises:
            ExpressionError: as `value`; or it is a list, NaN or Inf.
        """
        found = self.value(known)
        if not isinstance(found, float):
            raise ExpressionError(f"{self.text}: {_called(found)}, not one number; say mean(...), min(...) or max(...)")
        if not math.isfinite(found):
            raise ExpressionError(f"{self.text}: it is {found}")
        return found


def parse(text: Any, *, where: str) -> Expression:
    """Parse an expression.

    Args:
        text: it.
        where: what a message calls the place that it stands in.

    Raises:
        RecipeError: it is no arithmetic over names.
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        text = repr(text)
    if not isinstance(text, str) or not text.strip():
        raise RecipeError(f"{where}: expected arithmetic over metrics, as in 2 * target / target_ft + mean(control)")
    if len(text) > _LONGEST:
        raise RecipeError(f"{where}: more than {_LONGEST:,} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        names: dict[str, None] = {}
        _check(tree, names)
    except RecursionError:
        raise RecipeError(f"{where}: nested too deeply") from None
    except MemoryError:
        raise RecipeError(f"{where}: nested too deeply") from None
    except (SyntaxError, ValueError, OverflowError) as error:
        what = error.msg if isinstance(error, SyntaxError) else str(error)
        raise RecipeError(
            f"{where}: {printable(text)!r} does not parse: {what}",
            hint=f"It is arithmetic over metric names (+ - * / **), with {', '.join(FUNCTIONS)}. Quote a name with "
            "other signs in it.",
        ) from None
    return Expression(text.strip(), tuple(names), tree)


def _check(tree: ast.expr, names: dict[str, None]) -> None:
    """Refuse what is no arithmetic; collect the names."""
    match tree:
        case ast.Constant(value=bool() as flag):
            raise ValueError(f"{flag} is no number")
        case ast.Constant(value=int() | float() as number):
            if not math.isfinite(float(number)):
                raise ValueError("a number that is not finite")
        case ast.Constant(value=str() as name):  # a name with other signs in it
            names[name] = None
        case ast.Name() | ast.Attribute():
            names[_dotted(tree)] = None
        case ast.BinOp(left=left, op=op, right=right):
            if type(op) not in _OPERATORS:
                raise ValueError("the operators are + - * / **")
            _check(left, names)
            _check(right, names)
        case ast.UnaryOp(op=op, operand=operand):
            if type(op) not in _SIGNS:
                raise ValueError("the operators are + - * / **")
            _check(operand, names)
        case ast.Call(func=ast.Name(id=function), args=args, keywords=[]) if function in FUNCTIONS:
            if len(args) != 1 and not (args and function in ("min", "max")):
                raise ValueError(f"{function} takes one value")
            for argument in args:
                _check(argument, names)
        case ast.Call(func=ast.Name(id=function)):
            near = get_close_matches(function, FUNCTIONS, n=1)
            raise ValueError(f"there is no function {function}{f'; did you mean {near[0]}?' if near else ''}")
        case _:
            raise ValueError("expected numbers, metric names, + - * / **, brackets and functions")


def _dotted(tree: ast.expr) -> str:
    match tree:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=inner, attr=name):
            return f"{_dotted(inner)}.{name}"
    raise ValueError("a point stands between the parts of a name only")


def _value(tree: ast.expr, known: Mapping[str, Value]) -> Value:
    match tree:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Constant(value=str() as name):
            return _named(name, known)
        case ast.Name() | ast.Attribute():
            return _named(_dotted(tree), known)
        case ast.BinOp(left=left, op=op, right=right):
            return _together(*_OPERATORS[type(op)], _value(left, known), _value(right, known))
        case ast.UnaryOp(op=op, operand=operand):
            return _each(_SIGNS[type(op)], _value(operand, known))
        case ast.Call(func=ast.Name(id=function), args=args):
            values = [_value(argument, known) for argument in args]
            if function in _EACH:
                return _each(_EACH[function], values[0])
            numbers = [number for value in values for number in _numbers(value)]
            if not numbers:
                raise ExpressionError(f"{function} of an empty list")
            return _OF_ALL[function](numbers)
    raise AssertionError(ast.dump(tree))


def _named(name: str, known: Mapping[str, Value]) -> Value:
    if name in known:
        return known[name]
    whole, _, part = name.rpartition(".")
    value = known.get(whole)
    if isinstance(value, dict) and part in value:
        return value[part]
    near = get_close_matches(name, known, n=1)
    has = f"there is {', '.join(map(printable, sorted(known)))}" if known else "there is none"
    raise ExpressionError(
        f"no metric is called {printable(name)}{f'; did you mean {near[0]}?' if near else ''} ({has})"
    )


def _numbers(value: Value) -> list[float]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else [value]


def _each(function: Callable[[float], float], value: Value) -> Value:
    if isinstance(value, dict):
        return {name: function(number) for name, number in value.items()}
    return [function(number) for number in value] if isinstance(value, list) else function(value)


def _together(sign: str, function: Callable[[float, float], Any], left: Value, right: Value) -> Value:
    def one(a: float, b: float) -> float:
        found = function(a, b)
        if isinstance(found, complex):
            raise ExpressionError(f"{a} {sign} {b} is no real number")
        return float(found)

    if isinstance(left, float):
        return _each(lambda number: one(left, number), right)
    if isinstance(right, float):
        return _each(lambda number: one(number, right), left)
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return {name: one(number, right[name]) for name, number in left.items()}
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        return [one(a, b) for a, b in zip(left, right, strict=True)]
    raise ExpressionError(f"{_called(left)} {sign} {_called(right)}: the two do not have the same elements")


def _called(value: Value) -> str:
    if isinstance(value, dict):
        names = [printable(name) for name in value]
        return f"numbers by name ({', '.join(names[:6])}{', ...' if len(names) > 6 else ''})"
    return f"a list of {len(value)}" if isinstance(value, list) else f"{value:g}"

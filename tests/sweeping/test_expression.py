"""Objectives: arithmetic over metrics that is parsed, and never run as Python."""

import math

import pytest

from lines_cli.errors import RecipeError
from lines_cli.sweeping.expression import ExpressionError, parse

KNOWN = {"t": 0.9, "t_ft": 0.95, "c": [0.4, 0.5], "c_pre": [0.5, 0.5], "by": {"a": 2.0, "b": 4.0}, "acc,none": 0.5}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 * t / t_ft + mean(c / c_pre)", 2 * 0.9 / 0.95 + 0.9),
        ("c - c_pre", [0.4 - 0.5, 0.0]),
        ("by / by", {"a": 1.0, "b": 1.0}),
        ("-by + 1", {"a": -1.0, "b": -3.0}),
        ("by.a + 1", 3.0),
        ('"acc,none" * 2', 1.0),
        ("max(by) - min(c, t)", 4.0 - 0.4),
        ("sqrt(abs(-by.b)) ** 2", 4.0),
        ("1 - 2 ** -1", 0.5),
    ],
)
def test_values(text: str, value: object) -> None:
    """Operators work element by element; a number goes with each element."""
    found = parse(text, where="objective").value(KNOWN)
    assert found == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    "text",
    [
        "", "1 +", "__import__('os').system('true')", "a if b else c", "x[0]", "(lambda: 0)()", "a.b()", "f'{x}'",
        "True", "1j", "a, b", "[1]", "a and b", "a < b", "a @ b", "a // b", "a % b", "~a", "not a", "x := 1",
        "abs(1, 2)", "mean()", "mena(a)", "abs(x=1)", "*a", "1e999", "(" * 400 + "1" + ")" * 400, "-" * 1990 + "1",
        "x" * 3000, None, ["t"], b"t",
    ],
)  # fmt: skip
def test_no_arithmetic(text: object) -> None:
    """Whatever else it is, it is refused by the place that it stands in."""
    with pytest.raises(RecipeError, match=r"^objective"):
        parse(text, where="objective")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tt", "no metric is called tt; did you mean t"),
        ("c + by", "do not have the same elements"),
        ("t / 0", "division by zero"),
        ("9 ** 9 ** 9 ** 9", "no such number"),
        ("sqrt(-t)", "no such number"),
        ("(-t) ** 0.5", "no real number"),
        ("c", "a list of 2, not one number"),
        ("by", r"numbers by name \(a, b\), not one number"),
    ],
)
def test_without_a_value(text: str, said: str) -> None:
    """It says what is wrong, with both sides."""
    with pytest.raises(ExpressionError, match=said):
        parse(text, where="objective").number(KNOWN)


def test_what_is_not_finite() -> None:
    """An objective that is NaN or Inf judges nothing."""
    with pytest.raises(ExpressionError, match="it is inf"):
        parse("t", where="objective").number({"t": math.inf})

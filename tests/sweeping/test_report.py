"""What is said of families, and what stands in a sweep's page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lines_cli.sweeping.config import Objective, Sweep
from lines_cli.sweeping.expression import parse
from lines_cli.sweeping.report import Judged, front, standard_error, verdict
from lines_cli.sweeping.trials import Trial


def judged(family: str, value: float, error: float | None = None) -> Judged:
    """A trial with an objective."""
    return Judged(Trial(family, {"lines.alpha": value}), {"target": value}, (value,), (error,))


def asked(*, minimize: bool = False) -> Any:
    """As much of a sweep as a verdict asks for."""
    return Sweep(
        where="sweep.yaml", recipe=None, of_an_edit=True, grid={}, evaluate="x",  # type: ignore[arg-type]
        objectives=(Objective(parse("target", where="objective"), minimize),), controls=("constant", "reversed"),
        repeats=1, timeout=None, tasks={}, search=None, model=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "won", "said"),
    [
        ([("lines", 3.0, None), ("constant", 2.0, None)], "lines", "LiNeS did best: by 1 better than constant scaling"),
        (
            [("lines", 2.0, None), ("constant", 3.0, None)],
            "constant",
            "LiNeS did not help here: constant scaling did better",
        ),
        ([("lines", 3.0, 0.1), ("constant", 2.0, 0.1)], "lines", "which exceeds the noise"),
        ([("lines", 3.0, 1.0), ("constant", 2.0, 1.0)], "undecided", "which is within the noise"),
        ([("lines", 2.0, 1.0), ("reversed", 3.0, 1.0)], "undecided", "LiNeS did not help here"),
        ([("lines", 2.0, None), ("constant", 2.0, None)], "undecided", "did equally well"),
        ([("lines", 2.0, None)], "lines", "of the controls none has a result"),
    ],
)
def test_verdicts(values: list[tuple[str, float, float | None]], won: str, said: str) -> None:
    """It says plainly which family did best, and whether that is more than noise."""
    found = verdict(asked(), [judged(*value) for value in values])
    assert (found["won"], said in found["said"]) == (won, True), found["said"]


@pytest.mark.parametrize(
    ("least", "ft", "pre", "said"),
    [
        (False, 3.0, 1.0, "; the fine-tune itself does as well"),
        (False, 3.5, 1.0, "; the fine-tune itself does better"),
        (True, 2.5, 1.0, "; the base itself does better"),
        (False, 2.5, 1.0, None),
    ],
)
def test_an_input_that_does_no_worse(*, least: bool, ft: float, pre: float, said: str | None) -> None:
    """What nothing has to be made for is said, such as a fine-tune that the best coefficients leave as it is."""
    trials = [judged("pre", pre), judged("ft", ft), judged("lines", 3.0), judged("constant", 2.0)]
    found = verdict(asked(minimize=least), trials)["said"]
    assert "itself" not in found if said is None else found.endswith(said), found


def test_trials_that_failed_are_told() -> None:
    """Those of some; where all did, there is nothing else to say."""
    broken = Judged(Trial("lines", {"lines.alpha": 0.5}), failure="it ended with 1")
    found = verdict(asked(), [judged("lines", 3.0), broken, judged("constant", 2.0)])
    assert found["said"].endswith("; 1 of 3 trials failed")
    assert "1 of" not in verdict(asked(), [broken])["said"]


def test_the_least_wins_where_it_is_asked_for() -> None:
    """`minimize:` turns it round."""
    found = verdict(asked(minimize=True), [judged("lines", 2.0), judged("constant", 3.0)])
    assert found["won"] == "lines"


def test_the_standard_error_of_a_mean() -> None:
    """The sample's standard deviation over the root of the number; of one alone it is not known."""
    assert standard_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx((5 / 3) ** 0.5 / 2)
    assert standard_error([1.0]) is None


def test_the_front() -> None:
    """Those that no other beats in every objective; of equals both."""
    objectives = [Objective(parse("a", where="x"), False), Objective(parse("b", where="x"), True)]
    points = [(1.0, 1.0), (2.0, 2.0), (1.0, 2.0), (2.0, 2.0), (3.0, 9.0)]
    trials = [Judged(Trial("lines", {"n": n}), {}, point, (None, None)) for n, point in enumerate(points)]
    assert [one.trial.settings["n"] for one in front(trials, objectives)] == [0, 1, 3, 4]


def test_hostile_names_do_no_harm_in_the_page(tmp_path: Path) -> None:
    """Whatever metrics and keys are called, the page has no element of theirs."""
    from lines_cli.sweeping.page import page
    from lines_cli.sweeping.run import Found

    name = "<script>alert(1)</script>"
    one = Judged(
        Trial("lines", {f"lines.{name}": 0.1, "lines.alpha": 0.2}), {name: 1.0, "target": 2.0}, (1.0,), (None,)
    )
    other = Judged(Trial("constant", {"lines.alpha": 0.3}), {name: 2.0, "target": 1.0}, (2.0,), (0.1,))
    failed = Judged(Trial("reversed", {}), failure=name)
    found = Found(asked(), (one, other, failed), one, (), {"said": name}, tmp_path, {"layers": []}, (name,))
    text = page(found)
    assert "<script" not in text
    assert "Content-Security-Policy" in text
    assert text.count("<svg") == 1

"""Outputs are what they were, to the bit: recipes of every kind against the digests in `digests.json`.

Where a number is meant to change, the golden line changes in the same commit and the message says why:
`python tests/golden/record.py` writes the file anew. See `recipes.py`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import lines_cli as lines
from golden.recipes import CASES, DIGESTS, MERGES, Case, input_digests, trigonometry, write_inputs
from lines_cli.methods import METHODS
from lines_cli.plan.coefficients import to_float32
from support.method_cases import TABLE

RECORDED = json.loads(DIGESTS.read_text(encoding="utf-8"))
QUICK = lines.Resources(workers=2, device="cpu", chunk=64 * 1024)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors are not worth dividing among cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power failure would leave is not asked here."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All inputs."""
    made = tmp_path_factory.mktemp("golden")
    write_inputs(made)
    return made


def recorded(name: str) -> dict[str, str]:
    """File -> digest."""
    outputs = RECORDED["outputs"].items()
    return {line.removeprefix(f"{name}/"): digest for line, digest in outputs if line.startswith(f"{name}/")}


def test_inputs_are_what_they_were() -> None:
    """If this fails, look here first: what the results rest on is not what it was."""
    found, known = input_digests(), RECORDED["inputs"]
    assert found.keys() == known.keys()
    changed = sorted(name for name in found if found[name] != known[name] and name != "the C library")
    assert not changed


@pytest.mark.some(14)
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_what_they_were(name: str, folder: Path, tmp_path: Path) -> None:
    """The weight files, the index, the config and what else stands beside them."""
    if CASES[name].libm and trigonometry() != RECORDED["inputs"]["the C library"]:
        pytest.skip("sin, acos or pow of this C library differ in their last bits, which float64 shows")
    assert CASES[name].digests(folder, tmp_path, QUICK) == recorded(name)


def test_every_line_has_its_case() -> None:
    """Nothing is left in the file of a recipe that is no more."""
    assert {line.partition("/")[0] for line in RECORDED["outputs"]} == CASES.keys()


def said_of(case: Case) -> Iterator[tuple[str, Any]]:
    """The parameters that a recipe says something of, and what."""
    for place in (case.recipe, *case.recipe["models"]):
        yield from place.get("parameters", {}).items()


@pytest.mark.parametrize("method", [method for method in METHODS if TABLE[method].golden])
def test_every_method_has_cases(method: str) -> None:
    """One with each of its parameters at least, and with everything that a parameter may be but a number."""
    said = [pair for case in MERGES.values() if case.method == method for pair in said_of(case)]
    assert any(case.method == method for case in MERGES.values())
    for key, parameter in METHODS[method].parameters.items():
        values = [value for name, value in said if name == key]
        assert values, f"no case says {key}"
        meant = {parameter.choices[value] for value in values if parameter.choices}
        assert meant == set(parameter.choices.values()), f"not all that {key} may be is said"


LARGE = ("edit-wide", "ties-wide", "dare-wide", "slerp-wide")


@pytest.mark.parametrize(
    "resources",
    [
        {"workers": 1},
        {"workers": 2, "chunk": 10_007},
        pytest.param(
            {"device": "cuda", "chunk": 100_003},
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ),
    ],
    ids=str,
)
def test_nothing_depends_on_resources(resources: Mapping[str, Any], folder: Path, tmp_path: Path) -> None:
    """The recorded digests hold for any number of workers and any size of chunks."""
    cases = CASES if "device" in resources else LARGE
    own = lines.Resources(**{"device": "cpu", **resources})
    found = {name: CASES[name].digests(folder, tmp_path / name, own) for name in cases}
    assert found == {name: recorded(name) for name in cases}


@pytest.mark.slow
@pytest.mark.parametrize("places", [-4, 4])
def test_the_last_places_of_trigonometry_do_not_show(
    places: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The C standard leaves them open: with others the bytes are the same, but for float64 (`Case.libm`)."""
    asked = []

    def nudged(name: str) -> None:
        function = getattr(math, name)

        def other(x: float) -> float:
            asked.append(name)
            return function(x) and beside(function(x), places)  # what is 0 is so exactly

        monkeypatch.setattr(math, name, other)

    for name in ("sin", "acos"):
        nudged(name)
    for name in ("slerp", "slerp-wide", "slerp-scaled"):
        assert CASES[name].digests(folder, tmp_path / name, QUICK) == recorded(name)
    assert {"sin", "acos"} == set(asked)


@pytest.mark.parametrize("name", [name for name in CASES if "power" in name and not CASES[name].libm])
def test_the_last_places_of_powers_do_not_show(name: str, folder: Path, tmp_path: Path) -> None:
    """Nor do those of `pow`: the coefficients are rounded to float32."""
    coefficients = {tensor.coefficient for tensor in CASES[name].plan(folder, tmp_path).tensors}
    assert len(coefficients) > 2
    for coefficient in coefficients:
        nearby = {to_float32(beside(coefficient, places)) for places in range(-4, 5)}
        assert len(nearby) == 1


def beside(x: float, places: int) -> float:
    """The float64 that lies so many places from another."""
    for _ in range(abs(places)):
        x = math.nextafter(x, math.copysign(math.inf, places))
    return x

"""The JSON of `lines inspect` is documented, key by key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from support.files import write_checkpoint
from support.inspecting import llama, told, tuned
from support.run import run_lines

DOCS = Path(__file__).parents[2] / "docs" / "inspecting.md"


def documented() -> dict[str, tuple[str, str]]:
    """Key -> when it is there, and what is said of it."""
    page = DOCS.read_text(encoding="utf-8")
    section = page[page.index("## What `--json` prints") :].split("\n## ")[0]
    found = {}
    for keys, when, value in re.findall(r"^\| (`.+?) \| (.+?) \| (.+?) \|$", section, re.MULTILINE):
        found.update(dict.fromkeys(re.findall(r"`(\w+)`", keys), (when, value)))
    return found


@pytest.fixture(scope="module")
def modes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What --json prints, in every mode."""
    tmp = tmp_path_factory.mktemp("modes")
    model = llama()
    base = write_checkpoint(tmp / "base", model, config={"tie_word_embeddings": True})
    a, b = (write_checkpoint(tmp / f"ft{at}", tuned(model, at)) for at in range(2))
    out = tmp / "out"
    assert run_lines("edit", base, a, "-o", out).code == 0
    return {
        "always": told(a),
        "--tensors": told(a, "--tensors"),
        "--base": told(a, "--base", base, "--tensors"),
        "several": told(a, b, "--base", base, "--tensors"),
        "--check": told(a, "--check"),
        "an output of `lines`": told(out),
    }


@pytest.mark.slow
def test_json_is_documented(modes: dict[str, Any]) -> None:
    """docs/inspecting.md names every key that --json prints, no other, and says when it is there."""
    described = documented()
    assert described.keys() == set().union(*modes.values())
    for mode, report in modes.items():
        for key, (when, _) in described.items():
            asked = {"always", "--tensors"} if mode == "--tensors" else {"always", "--base", "--tensors"}
            asked = {"always", "--check"} if mode == "--check" else {"always"} if mode == "always" else asked
            asked = {"always", mode} if mode.startswith("an output") else asked
            assert (key in report) == any(word in when for word in asked), (mode, key)


def test_nested_keys_are_documented(modes: dict[str, Any]) -> None:
    """The keys within each value are those that docs/inspecting.md lists, in every mode that has it."""
    described = documented()
    numbers = re.search(
        r"The numbers of an update are (.+?)(?:, all null|\.|;)", DOCS.read_text(encoding="utf-8"), re.DOTALL
    )
    update = set(re.findall(r"`(\w+)`", numbers[1]))
    assert len(update) == 9
    pair = {"cosine", "opposed", "disagreement", "norm_of_sum", "sum_of_norms"}
    pair |= {"scaled_cosine", "scaled_norm_of_sum", "scaled_sum_of_norms"}
    extra = {"fine_tunes": update, "together": pair}
    for mode, report in modes.items():
        for key, value in report.items():
            listed = re.search(r"`\{(.+?)\}`", described[key][1])
            item = (value[0] if isinstance(value, list) else value) if value else None
            if listed is None or not isinstance(item, dict):
                continue
            expected = set(listed[1].split(", ")) | extra.get(key, set())
            if key in ("stacks", "layers", "kinds", "outside", "map") and mode == "--base":
                expected |= update
            if key == "dtypes":
                item = next(iter(item.values()))
            assert item.keys() == expected, (mode, key)
    report = modes["--base"]
    for side in ("before", "after"):
        assert report["outside"][side].keys() == {"coefficient", "tensors", "parameters", "bytes"} | update
    (tune,) = report["fine_tunes"]
    assert tune["compared"].keys() == {"tensors", "parameters", "left_out"}
    for group in ("stacks", "layers", "kinds"):
        assert all(row.keys() >= update for row in tune[group])
    together = modes["several"]["together"]
    assert together["auto"].keys() == {"method", "alpha", "sum", "merged"}
    assert all(row.keys() >= pair for group in ("stacks", "layers", "kinds") for row in together[group])

"""`lines inspect --check` holds the files of an output against the record in its recipe."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

from support.inspecting import CONTROL, DAMAGED, ok, refused, told
from support.run import run_lines


@pytest.fixture
def output(outputs: Path, tmp_path: Path) -> Path:
    """An output of lines edit, to be damaged."""
    return Path(shutil.copytree(outputs / "edit", tmp_path / "edit"))


def changed(path: Path) -> dict[str, str]:
    """The files that --check finds to be others, of a checkpoint that is whole otherwise."""
    ran = run_lines("inspect", path, "--check", "--json")
    (health,) = ran.json["health"]
    assert (ran.code, ran.trace) == (5 if health["changed_files"] else 0, "")
    assert not any(health[key] for key in ("nonfinite", "beyond", "zero", "same"))
    table = run_lines("inspect", path, "--check")
    assert (table.code, table.err) == (ran.code, ran.err)
    for name, how in health["changed_files"].items():
        assert re.search(rf"^(changed| {{7}})   {name}: {re.escape(how)[:40]}", table.out, re.MULTILINE)
    number = len(health["changed_files"])
    if number:
        assert f"{path}: files that are not as lines wrote them: {number}\n" in ran.err
        assert "nothing wrong" not in table.out
    return dict(health["changed_files"])


SHARDS = [f"model-0000{at}-of-00002.safetensors" for at in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["edit", "out"])
def test_an_untouched_output_passes(which: str, outputs: Path) -> None:
    """All files of an output of edit and of merge are as the recipe recorded them; --check says how many that are."""
    (health,) = told(outputs / which, "--check")["health"]
    assert (health["recorded_files"], health["changed_files"]) == (5, {})
    names = {file.name for file in (outputs / which).iterdir()}
    assert names == {*SHARDS, "model.safetensors.index.json", "config.json", "tokenizer.json"} | {
        "README.md",
        "lines_recipe.yaml",
    }
    assert "15 float tensors and 5 files, nothing wrong in them\n" in ok(outputs / which, "--check").out
    sides = told(outputs / which, "--base", outputs / "base", "--check")["health"]
    assert [(side["recorded_files"], side["changed_files"]) for side in sides] == [(None, {}), (5, {})]


def test_without_check_no_file_is_held_against_its_record(output: Path, outputs: Path) -> None:
    """Without --check nothing is told of files, also where all weights are read."""
    (output / "tokenizer.json").unlink()
    for side in told(output, "--base", outputs / "base")["health"]:
        assert (side["recorded_files"], side["changed_files"]) == (None, {})
    ok(output)


@pytest.mark.parametrize("shard", SHARDS)
def test_a_flipped_bit(shard: str, output: Path) -> None:
    """One bit of a weight that is another is told, and the file it is in; the report is printed."""
    content = bytearray((output / shard).read_bytes())
    content[-5] ^= 1
    (output / shard).write_bytes(content)
    found = changed(output)
    assert list(found) == [shard]
    assert re.fullmatch(r"holds sha256-tree-4MiB:\w{64}, sha256-tree-4MiB:\w{64} was written", found[shard])


@pytest.mark.slow
def test_every_file_is_told(output: Path, outputs: Path) -> None:
    """An edited config, a tokenizer that is gone, and an index that is a folder: each is told, with how it differs."""
    (output / "config.json").write_text('{"model_type": "llama"}')
    (output / "tokenizer.json").unlink()
    found = changed(output)
    assert set(found) == {"config.json", "tokenizer.json"}
    assert re.fullmatch(r"holds 23 bytes, but [\d,]+ were written", found["config.json"])
    assert found["tokenizer.json"] == "is missing"
    (output / "tokenizer.json").mkdir()
    assert changed(output)["tokenizer.json"] == "is not a file"
    ran = run_lines("inspect", output, "--base", outputs / "base", "--check", "--json")
    assert (ran.code, ran.trace) == (5, "")
    assert [set(side["changed_files"]) for side in ran.json["health"]] == [set(), {"config.json", "tokenizer.json"}]
    ran = run_lines("inspect", outputs / "a", "--base", output, "--check", "--json")
    assert [set(side["changed_files"]) for side in ran.json["health"]] == [{"config.json", "tokenizer.json"}, set()]


def test_the_same_size_and_another_content(output: Path) -> None:
    """A file that is as long as it was and holds something else is told."""
    (output / "tokenizer.json").write_text("[]")
    assert list(changed(output)) == ["tokenizer.json"]


@pytest.mark.parametrize("shard", SHARDS)
def test_a_shard_cut_short(shard: str, output: Path) -> None:
    """A shard that ends early is no checkpoint, with or without --check."""
    os.truncate(output / shard, (output / shard).stat().st_size - 4)
    for flags in ([], ["--check"]):
        refused(3, output, *flags, words=(shard, "ends at"))
    os.truncate(output / shard, 20)
    refused(3, output, "--check", words=(shard,))
    (output / shard).unlink()
    refused(3, output, "--check", words=(shard,))


def test_what_people_may_do(output: Path) -> None:
    """A file more, an edited model card, another place, and a link for a file: none of it is told."""
    (output / "extra.txt").write_text("x")
    (output / "README.md").write_text("Mine.")
    (output / "tokenizer.json").rename(output.parent / "elsewhere.json")
    (output / "tokenizer.json").symlink_to("../elsewhere.json")
    assert changed(output) == {}
    moved = output.rename(output.parent / "another name")
    assert changed(moved) == {}
    (moved / "README.md").unlink()
    assert changed(moved) == {}


@pytest.mark.parametrize("what", [what for what in DAMAGED if what != "deep"])
def test_a_damaged_record(what: str, output: Path) -> None:
    """A recipe that cannot be read holds no record: that is told of it, and no traceback."""
    (output / "lines_recipe.yaml").write_text(DAMAGED[what], encoding="utf-8", errors="surrogateescape")
    ran = run_lines("inspect", output, "--check", "--json")
    assert (ran.code, ran.trace) == (5, "")
    (health,) = ran.json["health"]
    assert list(health["changed_files"]) == ["lines_recipe.yaml"]
    assert health["changed_files"]["lines_recipe.yaml"].startswith("cannot be read: ")
    table = run_lines("inspect", output, "--check")
    assert re.search(r"^changed +lines_recipe.yaml: cannot be read: ", table.out, re.MULTILINE)
    assert not CONTROL.search(table.out + table.err)


def test_a_recipe_without_a_record(output: Path) -> None:
    """A recipe of an older lines recorded nothing, and one that is gone says nothing; both pass."""
    recipe = output / "lines_recipe.yaml"
    recipe.write_text(recipe.read_text().split("# What was read")[0])
    for _ in range(2):
        (health,) = told(output, "--check")["health"]
        assert not health["recorded_files"]
        assert health["changed_files"] == {}
        assert "15 float tensors, nothing wrong in them\n" in ok(output, "--check").out
        recipe.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "name", ["../a/tokenizer.json", "/etc/passwd", "x/../../a/tokenizer.json", "..", "\x1b[31m/../.."]
)
def test_a_record_that_leads_out(name: str, output: Path) -> None:
    """A stranger's recipe whose file names lead out of the folder is refused, and nothing out there is told."""
    recipe = output / "lines_recipe.yaml"
    text = recipe.read_text().replace("  tokenizer.json:\n", f"  {json.dumps(name)}:\n")
    recipe.write_text(text)
    ran = refused(3, output, "--check", words=("outside the folder", str(output)))
    assert "sha256" not in ran.err
    assert not CONTROL.search(ran.err)
    ok(output)  # nobody looks


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("sha256-tree-4MiB:", "md5:", "cannot be compared"),
        ("sha256-tree-4MiB:", "sha256-tree-4MiB:\x1b[31m\n", "holds sha256"),
        ("sha256-tree-4MiB:", "", "cannot be compared"),
    ],
)
def test_hostile_digests(old: str, new: str, words: str, output: Path) -> None:
    """A digest is a stranger's text: another kind is told as such, and it steers no terminal."""
    recipe = yaml.safe_load((output / "lines_recipe.yaml").read_text())
    record = recipe["files"]["tokenizer.json"]
    record["digest"] = record["digest"].replace(old, new)
    (output / "lines_recipe.yaml").write_text(yaml.safe_dump(recipe))
    ran = run_lines("inspect", output, "--check")
    assert (ran.code, ran.trace) == (5, "")
    assert re.search(rf"^changed +tokenizer.json: {words}.*$", ran.out, re.MULTILINE)
    assert not CONTROL.search(ran.out + ran.err)


@pytest.mark.parametrize(
    "record", ["{bytes: -1, digest: x}", "{bytes: 1}", "{digest: x}", "[]", "1", "{bytes: x, digest: y}"]
)
def test_records_that_are_none(record: str, output: Path) -> None:
    """A record that lines would not write is a recipe that cannot be read."""
    recipe = output / "lines_recipe.yaml"
    head = recipe.read_text().split("files:\n")[0]
    recipe.write_text(f"{head}files:\n  tokenizer.json: {record}\n")
    ran = run_lines("inspect", output, "--check", "--json")
    assert (ran.code, ran.trace) == (5, "")
    assert list(ran.json["health"][0]["changed_files"]) == ["lines_recipe.yaml"]

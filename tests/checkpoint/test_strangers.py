"""Folders from strangers, as `edit`, `merge` and `inspect` meet them: links that leave the folder, recipes and JSON of
any shape, files that are none, expressions that never end; and no message shows a credential.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lines_cli.errors import CheckpointError, LinesError, RecipeError, without_secrets
from lines_cli.recipe.plain_yaml import YamlError, dump_yaml, read_yaml
from lines_cli.recipe.yaml_file import load_recipe, load_record
from lines_cli.scaling.find_depth import find_depth
from lines_cli.storage.beside import read_json, refuse_link_out
from lines_cli.storage.files import read_small
from support import forked
from support.files import snapshot, write_checkpoint
from support.run import Ran, run_lines

SECRET = "hf_thisIsSecretAndStaysAtHome"
CONFIG = {"model_type": "llama", "num_hidden_layers": 2}


def tensors(seed: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    made = {f"model.layers.{n}.w": torch.full((2, 2), float(n + seed)) for n in range(2)}
    return made | {"model.embed_tokens.weight": torch.full((rows, 2), float(seed))}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A base, a fine-tune, and beside them what is nobody's business."""
    write_checkpoint(tmp_path / "base", tensors(), config=CONFIG)
    write_checkpoint(tmp_path / "ft", tensors(1), config=CONFIG)
    (tmp_path / "secret_token").write_text(SECRET)
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "config.json").write_text(json.dumps({"secret": SECRET}))
    (tmp_path / "private" / "x.jinja").write_text(SECRET)
    return tmp_path


def edit(at: Path, *flags: object) -> Ran:
    return run_lines("edit", at / "base", at / "ft", "-o", at / "out", *flags)


def refused(ran: Ran, code: int, *words: object) -> None:
    assert (ran.code, ran.trace) == (code, ""), ran.trace or ran.err or ran.out
    assert ran.err.startswith("error: ")
    assert not [word for word in words if str(word) not in ran.err], ran.err
    assert SECRET not in ran.out + ran.err


# --- links ---

LINKS = {
    "a licence": ("LICENSE", "../secret_token"),
    "a vocabulary": ("vocab.txt", "/etc/passwd"),
    "the config": ("config.json", "../private/config.json"),
    "a tokenizer": ("tokenizer.json", "../secret_token"),
    "a chat template": ("chat_template.jinja", "../private/x.jinja"),
    "a generation config": ("generation_config.json", "../private/config.json"),
    "code": ("modeling_own.py", "../secret_token"),
    "a subfolder": ("1_Pooling", "../private"),
    "a subfolder of templates": ("additional_chat_templates", "../private"),
    "a subfolder that leads far": ("1_Pooling", "/etc"),
    "a link to a link": ("LICENSE", "inner"),
    "a link through the folder's own name": ("NOTICE", "../ft/../secret_token"),
    "a process's own files": ("LICENSE", "/proc/self/environ"),
    "a device": ("vocab.json", "/dev/zero"),
    "nothing yet": ("LICENSE", "../not_there_yet"),
    "another input": ("LICENSE", "../base/config.json"),
}


@pytest.mark.parametrize("what", LINKS)
def test_a_link_that_leaves_the_folder(what: str, folders: Path) -> None:
    """It is refused by name and target before anything is written, with and without --dry-run."""
    name, target = LINKS[what]
    (folders / "ft" / name).unlink(missing_ok=True)
    (folders / "ft" / name).symlink_to(target)
    (folders / "ft" / "inner").symlink_to("../secret_token")
    before = snapshot(folders)
    for flags in ((), ("--dry-run",)):
        ran = edit(folders, *flags)
        end = os.path.basename(os.path.realpath(folders / "ft" / name))
        refused(ran, 3, f"ft/{name}", "link", end, "copy of the file")
        assert snapshot(folders) == before


@pytest.mark.parametrize("first", ["config.json", "LICENSE"])
def test_all_links_that_leave_are_named(first: str, folders: Path) -> None:
    """A folder of links is told at once, with a command; not those of weights, nor those that stay."""
    ft = folders / "ft"
    (ft / "config.json").unlink()
    shutil.move(ft / "model.safetensors", folders / "model.safetensors")
    (ft / "model.safetensors").symlink_to("../model.safetensors")
    for name in (first, "tokenizer.json", "vocab.txt"):
        (ft / name).symlink_to("../secret_token")
    (ft / "text").write_text("MIT")
    (ft / "NOTICE").symlink_to("text")
    ran = edit(folders)
    refused(ran, 3, f"ft/{first} is a link", "so are others:\n", "tokenizer.json", "vocab.txt", f"cp -rL {ft} COPY")
    assert "NOTICE" not in ran.err
    assert run_lines("edit", folders / "base", ft, "-o", folders / "out").code == 3


@pytest.mark.parametrize("key", ["tokenizer_source", "chat_template"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_link_in_what_an_input_is_named_for(key: str, name: str, folders: Path) -> None:
    """The tokenizer or chat template of another input is looked up as carefully."""
    (folders / "base" / name).symlink_to("../private/config.json")
    recipe = {"base_model": "base", "models": [{"model": "ft"}], key: "base", "lines": {"alpha": 0.1, "beta": 0.9}}
    (folders / "merge.yaml").write_text(yaml.safe_dump(recipe | {"like": "ft"}))
    ran = run_lines("merge", "--config", folders / "merge.yaml", "-o", folders / "out")
    refused(ran, 3, f"base/{name}", "private/config.json")
    assert not (folders / "out").exists()


def test_a_link_where_only_the_ids_are_taken(folders: Path) -> None:
    """So is a generation config of which only the ids of special tokens are read."""
    shutil.rmtree(folders / "base")
    write_checkpoint(folders / "base", tensors(rows=6), config=CONFIG)
    (folders / "base" / "generation_config.json").symlink_to("../private/config.json")
    (folders / "ft" / "generation_config.json").write_text("{}")
    refused(edit(folders, "--resize", "base"), 3, "base/generation_config.json")


@pytest.mark.parametrize("name", ["config.json", "lines_recipe.yaml"])
def test_inspect_follows_no_link_either(name: str, folders: Path) -> None:
    """What `inspect` reads of itself is no link that leaves the folder."""
    (folders / "ft" / name).unlink(missing_ok=True)
    (folders / "ft" / name).symlink_to("../secret_token")
    refused(run_lines("inspect", folders / "ft"), 3, f"ft/{name}", "secret_token")
    refused(run_lines("inspect", folders / "ft", "--json"), 3, f"ft/{name}")


def test_links_that_stay(folders: Path) -> None:
    """A link to a neighbour, in either spelling, a folder that is a link, and one that ends nowhere inside are fine."""
    ft = folders / "ft"
    (ft / "text").write_text("MIT")
    (ft / "LICENSE").symlink_to("text")
    (ft / "NOTICE").symlink_to(ft / "text")
    (ft / "LICENCE").symlink_to("../ft/text")
    (ft / "1_Pooling").mkdir()
    (ft / "1_Pooling" / "config.json").symlink_to("../config.json")
    (ft / "2_Pooling").symlink_to("1_Pooling")
    (ft / "vocab.txt").symlink_to("nowhere")
    (ft / "vocab.json").symlink_to("vocab.json")
    (ft / "data").symlink_to("../private")  # of no interest
    ft.rename(folders / "really")
    ft.symlink_to("really")
    assert edit(folders).code == 0
    there = {path.relative_to(folders / "out").as_posix() for path in (folders / "out").rglob("*") if path.is_file()}
    assert {"LICENSE", "NOTICE", "LICENCE", "1_Pooling/config.json", "2_Pooling/config.json"} <= there
    assert not {"vocab.txt", "vocab.json", "data/config.json"} & there
    assert not any(path.is_symlink() for path in (folders / "out").rglob("*"))


def test_weights_may_lie_elsewhere(folders: Path) -> None:
    """Safetensors files and their index may be links to another disk; nothing of them is copied as it is."""
    shutil.rmtree(folders / "ft")
    write_checkpoint(folders / "disk", tensors(1), shards=2, config=CONFIG)
    (folders / "ft").mkdir()
    for file in (folders / "disk").glob("model*"):
        (folders / "ft" / file.name).symlink_to(file)
    shutil.copy(folders / "disk" / "config.json", folders / "ft")
    assert edit(folders).code == 0
    (folders / "ft" / "model.safetensors.index.json").unlink()
    (folders / "ft" / "model.safetensors.index.json").symlink_to("../private/config.json")
    refused(edit(folders, "--force"), 3, "no weight_map")


def cached(folders: Path, *, shared: bool = False) -> Path:
    """The fine-tune as the Hub's client keeps it: every file of the snapshot is a link to a blob."""
    repository = folders / "hub" / "models--org--name"
    snapshot_folder = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    (folders / "ft" / "1_Pooling").mkdir()
    (folders / "ft" / "1_Pooling" / "config.json").write_text("{}")
    (folders / "ft" / "LICENSE").write_text("MIT")
    for number, file in enumerate(sorted(path for path in (folders / "ft").rglob("*") if path.is_file())):
        blob, link = repository / "blobs" / f"{number:064x}", snapshot_folder / file.relative_to(folders / "ft")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        if shared:
            store = folders / "hub" / "blobs" / "ab" / f"ab{number:062x}"
            store.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(file, store)
            blob.symlink_to(os.path.relpath(store, blob.parent))
        else:
            shutil.move(file, blob)
    shutil.rmtree(folders / "ft")
    return snapshot_folder


@pytest.mark.parametrize("shared", [False, True])
def test_the_hubs_cache(shared: bool, folders: Path) -> None:
    """Its links to blobs are followed: of a repository's own, and of those that repositories share."""
    at = cached(folders, shared=shared)
    (folders / "ft").symlink_to(at)
    assert edit(folders).code == 0
    assert (folders / "out" / "LICENSE").read_text() == "MIT"
    assert (folders / "out" / "1_Pooling" / "config.json").is_file()
    refuse_link_out(at / "1_Pooling", "config.json")  # a subfolder of a snapshot by itself, as of a pipeline


@pytest.mark.parametrize("how", ["a blob that leads on", "blobs that are elsewhere", "beside the blobs", "another's"])
def test_what_only_looks_like_the_hubs_cache(how: str, folders: Path) -> None:
    """A blob counts where it really lies, in the blobs of its own repository."""
    at = cached(folders)
    blobs, link = at.parent.parent / "blobs", at / "LICENSE"
    link.unlink()
    if how == "a blob that leads on":
        (blobs / ("f" * 64)).symlink_to("../../../secret_token")
        link.symlink_to(f"../../blobs/{'f' * 64}")
    elif how == "blobs that are elsewhere":
        shutil.move(blobs, folders / "moved")
        blobs.symlink_to(folders / "moved")
        (folders / "moved" / "secret").write_text(SECRET)
        link.symlink_to("../../blobs/secret")
    elif how == "beside the blobs":
        (at.parent.parent / "refs").mkdir()
        (at.parent.parent / "refs" / "main").write_text(SECRET)
        link.symlink_to("../../refs/main")
    else:
        (folders / "hub" / "models--org--private" / "blobs").mkdir(parents=True)
        (folders / "hub" / "models--org--private" / "blobs" / "0").write_text(SECRET)
        link.symlink_to("../../../models--org--private/blobs/0")
    (folders / "ft").symlink_to(at)
    refused(edit(folders), 3, "link")
    assert not (folders / "out").exists()


def test_a_recorded_file_elsewhere_is_not_told_of(folders: Path) -> None:
    """--check says that a recorded file is a link to something else, and nothing of what that holds."""
    (folders / "ft" / "LICENSE").write_text("MIT")
    assert edit(folders).code == 0
    (folders / "out" / "LICENSE").unlink()
    (folders / "out" / "LICENSE").symlink_to("../secret_token")
    ran = run_lines("inspect", folders / "out", "--check", "--json")
    assert ran.json["health"][0]["changed_files"] == {"LICENSE": "is a link that leaves the folder, to something else"}


# --- recipes that are found, and recipes that are given ---

LEVELS = "abcdefghijklmnopqrstuvwxyz"
MODELS = "base_model: ../base\nmodels: [{model: ../a}]\nlines: {alpha: 0.1, beta: 0.9}\n"


def doubling(line: str) -> str:
    """A few hundred bytes in which every line holds the line before twice."""
    lines = ["a: &a {x: 1, y: 2}"]
    lines += [line.format(this=this, before=before) for before, this in pairwise(LEVELS)]
    return "\n".join(lines) + "\n"


BOMBS = {
    "merge keys": doubling(
        "{this}: &{this} {{<<: [*{before}, *{before}, *{before}, *{before}, *{before}, *{before}]}}"
    ),
    "merge keys that grow": doubling("{this}: &{this} {{<<: *{before}, {this}1: *{before}, {this}2: *{before}}}"),
    "lists": doubling("{this}: &{this} [*{before}, *{before}, *{before}]"),
    "pairs": "models: !!pairs [" + ", ".join(["a: 1"] * 100) + "]",
    "pairs of aliases": doubling("{this}: &{this} !!pairs [x: *{before}, y: *{before}, z: *{before}]"),
    "omap": "models: !!omap [a: 1]",
    "a set": "models: !!set {a, b}",
    "bytes": "base_model: !!binary YQ==",
    "a timestamp": "base_model: !!timestamp 2024-01-01",
    "a tag of its own": "models: !evil [a]",
    "a tag on a key": "!!python/name:os.system x: 1",
    "a container's tag on text": "models: !!seq a",
    "6 MB": "a: b\n" * 1_300_000,
    "1 MB of keys": "".join(f"k{n}: 1\n" for n in range(110_000)),
    "keys that are none": MODELS + "".join(f"k{n}: 1\n" for n in range(10_000)),
    "a long key": MODELS + "k" * 100_000 + ": 1\n",
    "models without end": "base_model: .\nmodels:\n" + "- {model: .}\n" * 7_000,
    "filters without end": MODELS.replace("0.9}", "0.9, filter: {")
    + ", ".join(f"f{n}: 1" for n in range(7_000))
    + "}}",
    "a number of 5,000 digits": "base_model: a\nmodels: " + "9" * 5000,
    "5,000 hexadecimal digits": MODELS + "gamma: 0x" + "f" * 5000,
    "base 60": MODELS + "gamma: 1" + ":1" * 100_000,
    "base 60 with a point": MODELS + "gamma: 1" + ":1" * 400 + ".5",
    "no number": "base_model: !!int abc",
    "no truth": "base_model: !!bool abc",
    "no digits": "models: !!int ''",
    "half a character": 'base_model: "\\ud800"\n',
    "half a character in a key": '"\\udfff": 1\n',
    "NUL": 'base_model: "a\\0b"\n',
    "a NUL byte": "base_model: a\0b\n",
    "deep in brackets": "[" * 100_000,
    "deep in braces": "{a: " * 50_000,
    "deep in dashes": "- " * 50_000,
    "deep in aliases": "".join(f"- &a{n} [*a{n - 1}]\n" if n else "- &a0 []\n" for n in range(400)),
    "one key twice": MODELS + "models: []\n",
    "one merge key twice": "a: &a {x: 1}\nb: {<<: *a, <<: *a}\n",
    "an anchor within itself": "models: &m [*m]\n",
    "a merge of itself": "models: &m {<<: *m}\n",
    "an anchor twice": "a: &a 1\nb: &a 2\n",
    "no anchor": "a: *b\n",
    "a merge of a number": "<<: 3\n",
    "a key that is a list": "? [a]\n: 1\n",
    "two documents": MODELS + "---\n" + MODELS,
    "a directive": "%YAML 9.9\n---\na: 1\n",
    "a list": "- a\n",
    "nothing": "",
}
BYTES = {
    "UTF-16": MODELS.encode("utf-16"),
    "UTF-16 without its mark": MODELS.encode("utf-16-le"),
    "Latin-1": "base_model: café\n".encode("latin-1"),
    "random": bytes(range(256)),
}
LIMITED = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (400 * 2**20, 400 * 2**20))
from pathlib import Path
from lines_cli.errors import RecipeError
from lines_cli.recipe.yaml_file import load_recipe, load_record
for load in (load_recipe, load_record):
    for path in sys.argv[1:]:
        began = time.process_time()
        try:
            load(Path(path))
        except RecipeError as error:
            assert Path(path).name in error.message, error.message
            assert len(error.message) < 9000
        else:
            raise SystemExit(f"{path} was read")
        took = time.process_time() - began
        if took > 5:
            raise SystemExit(f"{path} took {took:.1f} s")
"""


@pytest.mark.slow
def test_recipes_that_ask_for_too_much(tmp_path: Path) -> None:
    """Each is a RecipeError with the file's name, in little time and memory, whoever reads it."""
    for number, content in enumerate([*(text.encode() for text in BOMBS.values()), *BYTES.values()]):
        (tmp_path / f"{number}.yaml").write_bytes(content)
    files = sorted(tmp_path.iterdir())
    ran = subprocess.run([sys.executable, "-c", LIMITED, *files], capture_output=True, text=True, check=False)
    names = dict(enumerate([*BOMBS, *BYTES]))
    assert ran.returncode == 0, f"{ran.stderr[-3000:]}\n{names}"


@pytest.mark.parametrize("what", ["merge keys", "pairs", "half a character", "a number of 5,000 digits", "6 MB"])
def test_inspect_survives_what_it_finds(what: str, folders: Path) -> None:
    """A record that cannot be read is a note, and the weights are told of all the same."""
    (folders / "ft" / "lines_recipe.yaml").write_text(BOMBS[what])
    began = time.process_time()
    ran = run_lines("inspect", folders / "ft")
    assert (ran.code, ran.trace) == (0, "")
    assert "its recipe cannot be read" in ran.err
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: !!binary YQ==\n", 2),
        ("a: 1\n\nb: {c: 1, c: 2}\n", 3),
        ('a: 1\nb: "\\ud800"\n', 2),
        ("a: 1\nb: *c\n", 2),
        ("a: 1\nb: " + "9" * 5000, 2),
        ("a: 1\nb: [\n", 3),
        ("a: 1\nb: !!int x\n", 2),
        ("a: [1,\n 2, \x07]\n", 2),
    ],
)
def test_a_problem_has_a_line(text: str, line: int) -> None:
    with pytest.raises(YamlError, match=f"^line {line}\\b"):
        read_yaml(text)


SAMPLES = """
text: plain
quoted: "é\\n\\t\\x41"
date: 2024-01-01
moment: 2001-12-14t21:59:43.10-05:00
whole: [1, 0, -7, 0b101, 017, 0x1F, 1_000, "1", 1:30]
floats: [1.5, -2.5e+3, .inf, -.5, 1e5, 190:20:30.15]
truths: [yes, No, on, OFF, true, False, "yes"]
nothing: [~, null, "", ]
on: key
5: number
~: nothing
2024-01-01: day
folded: >
  a
  b
kept: |
  a
  b
tagged: [!!str 5, !!int "7", !!float 3, ! 5]
base: &b {x: 1, y: [1, 2]}
same: *b
more: {<<: *b, x: 2, z: 3}
both: {<<: [{x: 7}, *b], w: 0}
inline: {<<: {q: 1}, "<": 2}
"""


def test_plain_values_are_what_they_were() -> None:
    """Values, merge keys and their order are the library's; only dates are text, and all keys."""

    class Reference(yaml.SafeLoader):
        pass

    Reference.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if not tag.endswith("timestamp")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    text = SAMPLES.replace(", ! 5]", "]")
    expected = yaml.load(text, Loader=Reference)
    names = {True: "on", 5: "5", None: "~"}
    expected = {names.get(key, key): value for key, value in expected.items()}
    values, at = read_yaml(text)
    assert values == expected
    assert [*values["both"]] == [*expected["both"]]
    assert values["date"] == "2024-01-01"
    assert at["text",] == "line 2"
    assert at["whole", 1] == "line 6"
    assert read_yaml("") == (None, {})
    assert read_yaml("\ufeffa: 1")[0] == {"a": 1}


def test_nothing_is_shared() -> None:
    """An alias is a copy: changing one changes no other."""
    values, _ = read_yaml("a: &a {x: [1]}\nb: *a\nc: {<<: *a}\n")
    values["a"]["x"].append(2)
    assert values["b"] == values["c"] == {"x": [1]}


_WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\udc80\udcff"), max_size=12)
_WORDS |= st.sampled_from(
    ["word " * 300, " word\n " * 300, "w" * 2000, "- a", "a: b", "1e3", "null", "'", "...", "---", "\t"]
)
_PLAIN = st.recursive(
    _WORDS | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS, inner, max_size=3),
    max_leaves=10,
)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.dictionaries(_WORDS, _PLAIN, max_size=3), st.sampled_from([False, None, True]), st.booleans())
def test_yaml_is_read_as_it_was_written(values: dict[str, Any], flow: bool | None, slow: bool) -> None:
    """Names of files that are not UTF-8 stay, too, whichever of the library's writers there is."""
    with pytest.MonkeyPatch.context() as patch:
        if slow:
            patch.delattr(yaml, "CSafeDumper", raising=False)
        text = dump_yaml(values, flow=flow)
    assert read_yaml(text)[0] == values


def test_both_readers_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library's slow reader, which is all that some builds have, the values are the same."""
    fast = read_yaml(SAMPLES.replace(", ! 5]", "]"))
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    assert read_yaml(SAMPLES.replace(", ! 5]", "]")) == fast
    for text in BOMBS.values():
        if len(text) < 10_000:
            with suppress(YamlError):
                read_yaml(text)


@pytest.mark.parametrize(
    "text", ["!!binary YQ==", "[" * 1000, "9" * 5000, '"\\ud800"', "*a", "!!pairs [a: 1]", "\ud800"]
)
def test_set_reads_as_carefully(text: str, folders: Path) -> None:
    """--set is YAML by the same reader."""
    (folders / "merge.yaml").write_text(MODELS)
    with pytest.raises(RecipeError, match="--set"):
        load_recipe(folders / "merge.yaml", [f"parameters.weight={text}"])


@pytest.mark.parametrize("key", ["models." + "9" * 5000, ".".join("a" * 500), "models.-1", "models.٣"])
def test_set_with_keys_that_are_none(key: str, folders: Path) -> None:
    (folders / "merge.yaml").write_text(MODELS)
    with pytest.raises(RecipeError, match="--set"):
        load_recipe(folders / "merge.yaml", [f"{key}=1"])


def test_a_record_is_not_looked_up(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a record's paths nothing is asked of the disk."""
    path = folders / "ft" / "lines_recipe.yaml"
    path.write_text(MODELS.replace("../a", "/net/stranger/share"))
    load_record(path)
    asked: list[str] = []
    for name in ("stat", "lstat"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda at, *a, real=real, **k: asked.append(str(at)) or real(at, *a, **k))
    recipe = load_record(path)
    assert recipe.models[0].model == "/net/stranger/share"
    assert recipe.base_model == f"{folders}/ft/../base"
    assert not [at for at in asked if "stranger" in at or "base" in at]


# --- expressions ---

ENDLESS = r"(.*a){25}(?P<index>\d)$"
ODD_EXPRESSIONS = [
    "(", "[", "(?P<index>", "(?P<index>\\d)(?P=nope)", "(" * 500 + ")" * 500, "a{99999999999}(?P<index>b)",
    "(?V1)(?P<index>a)",
    r"\L<x>(?P<index>a)", r"(?P<index>\p{nope})", "(?P<index>a)" * 200, "*", "(?<=a+)(?P<index>b", "x" * 100_000,
]  # fmt: skip


@pytest.mark.slow
def test_an_expression_that_never_ends(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own ends after a while, with a next step; by --layers and by a recipe."""
    monkeypatch.setattr("lines_cli.scaling.by_hand.SECONDS_TO_MATCH", 0.5)
    for side, seed in (("base", 0), ("ft", 1)):
        shutil.rmtree(folders / side)
        write_checkpoint(folders / side, {f"{'a' * 300}.{n}.w!": torch.full((2,), float(seed)) for n in range(3)})
    refused(edit(folders, "--layers", ENDLESS), 2, "--layers", "more than 0.5 s", "avoid repeats")
    recipe = {"base_model": "base", "models": [{"model": "ft"}], "lines": {"alpha": 0.1, "beta": 1, "layers": ENDLESS}}
    (folders / "merge.yaml").write_text(yaml.safe_dump(recipe))
    refused(run_lines("inspect", "--config", folders / "merge.yaml"), 2, "more than 0.5 s")


@pytest.mark.parametrize("pattern", ODD_EXPRESSIONS, ids=range(len(ODD_EXPRESSIONS)))
def test_odd_expressions(pattern: str) -> None:
    """What is no expression, or one that Python's own errors come of, is a RecipeError, or finds nothing."""
    with pytest.raises(LinesError) as error:
        find_depth(["layers.0.w", "layers.1.w"], layers=pattern)
    assert "--layers" in error.value.message


@pytest.mark.parametrize(
    "pattern",
    [
        r"layers\.(?P<index>\d+)\.",
        r"^(?P<stack>\w+)\.(?P<index>[0-9]+)\.(?!x).*$",
        r"(?i)LAYERS\.(?P<index>\d+)(?=\.w)",
        r"(?P<stack>(?:enc|dec))oder\.h(?P<index>\d{1,2})|layers\.(\d+)",
        r"(?x) layers \. (?P<index> \d+ )  # the number",
    ],
)
def test_normal_expressions_find_what_re_finds(pattern: str) -> None:
    import re

    names = [f"{at}.{n}.w" for at in ("layers", "model.layers", "blocks") for n in range(12)]
    names += [f"{at}coder.h{n}.x" for at in ("en", "de") for n in range(3)]
    depth = find_depth(names, layers=pattern)
    for name in names:
        match = re.search(pattern, name)
        assert (match is not None and match["index"] is not None) == (name in depth.places)


def test_a_strangers_expression_is_not_run(folders: Path) -> None:
    """Depth is found by the general rule, and a note says so."""
    (folders / "ft" / "lines_recipe.yaml").write_text(MODELS.replace("0.9}", f"0.9, layers: '{ENDLESS}'}}"))
    ran = run_lines("inspect", folders / "ft", "--json")
    assert (ran.code, ran.trace) == (0, "")
    assert [stack["name"] for stack in ran.json["stacks"]] == ["model.layers"]
    assert ran.json["recipe"]["lines"]["layers"] == ENDLESS
    assert ran.json["scaling"]["of"] == "output"
    assert any("is not run" in note for note in ran.json["notes"])


@pytest.mark.parametrize(
    "name", ["0." * 50_000 + "w", "expert" * 20_000 + "\n", "embed_" * 20_000 + "\n", "layers." * 20_000 + "1.w"]
)
def test_names_that_would_take_for_ever(name: str) -> None:
    """A name of 100,000 characters costs no more than a long name should."""
    began = time.process_time()
    depth = find_depth([name, *(f"layers.{n}.w" for n in range(3))])
    depth.side_of(name)
    assert time.process_time() - began < 2


# --- files that are none ---


def fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # its path may be short only
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("kind", [fifo, a_socket, zeros, folder], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "--config"])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_is_no_file_is_not_waited_for(name: str, kind: Callable[[Path], None], folders: Path) -> None:
    """A pipe, a socket, a device or a folder in a file's place is refused at once."""
    if name == "--config":
        kind(folders / "merge.yaml")
        refused(
            run_lines("merge", "--config", folders / "merge.yaml", "-o", folders / "out"), 2, "merge.yaml", "regular"
        )
    else:
        (folders / "ft" / "model.safetensors").unlink()
        kind(folders / "ft" / name)
        refused(edit(folders), 3, f"ft/{name}", "file")
        refused(run_lines("inspect", folders / "ft"), 3, f"ft/{name}")


@pytest.mark.parametrize("kind", [fifo, a_socket, folder], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "lines_recipe.yaml", "LICENSE"])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_is_no_file_beside_the_weights(name: str, kind: Callable[[Path], None], folders: Path) -> None:
    """It is no such file, and nobody waits for it."""
    (folders / "ft" / name).unlink(missing_ok=True)
    kind(folders / "ft" / name)
    assert run_lines("inspect", folders / "ft").code == 0
    ran = edit(folders)
    assert (ran.code, ran.trace) == (0, "")
    assert not (folders / "out" / "LICENSE").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "merge.yaml"])
def test_small_files_are_small(name: str, folders: Path) -> None:
    """A file of 100 GB that takes no room is not read."""
    (folders / "ft" / name).unlink(missing_ok=True)
    path = folders / name if name == "merge.yaml" else folders / "ft" / name
    path.touch()
    os.truncate(path, 100 * 2**30)
    if name == "merge.yaml":
        refused(run_lines("inspect", "--config", path), 2, name, "at most")
    else:
        refused(edit(folders), 3, name, "at most")


def test_a_small_file_takes_its_size(tmp_path: Path) -> None:
    """There is one copy of it in memory, not two."""
    (tmp_path / "x").touch()
    os.truncate(tmp_path / "x", nbytes := 64 * 2**20)
    tracemalloc.start()
    try:
        assert len(read_small(tmp_path / "x", nbytes)) == nbytes
        assert tracemalloc.get_traced_memory()[1] < 1.1 * nbytes
    finally:
        tracemalloc.stop()


def test_weights_that_are_links_tell_nothing(folders: Path) -> None:
    """Neither a file of /proc, which has no size, nor the first bytes of another's file."""
    (folders / "ft" / "model.safetensors").unlink()
    (folders / "ft" / "model.safetensors").symlink_to("/proc/self/environ")
    refused(edit(folders), 3, "the file holds 0 bytes")
    (folders / "ft" / "model.safetensors").unlink()
    (folders / "ft" / "model.safetensors").symlink_to("../secret_token")
    number = int.from_bytes(SECRET.encode()[:8], "little")
    ran = edit(folders)
    refused(ran, 3, "more than 100,000,000 bytes")
    assert not [form for form in (f"{number:,}", str(number), f"{number:x}") if form in ran.err]


# --- JSON of any shape ---

SHAPES = {
    "a list": "[]",
    "text": '"x"',
    "a number": "7",
    "null": "null",
    "no JSON": "{",
    "empty": "",
    "deep": "[" * 900 + "]" * 900,
    "deeper": "[" * 100_000,
    "deep in objects": '{"a":' * 600 + "1" + "}" * 600,
    "half a character": '{"a": "\\ud800", "\\udfff": 1, "eos_token_id": "\\ud800", "chat_template": "\\ud800"}',
    "not finite": '{"a": NaN, "vocab_size": Infinity, "eos_token_id": -Infinity, "num_hidden_layers": 1e999}',
    "5,000 digits": '{"vocab_size": ' + "9" * 5000 + "}",
    "4,000 digits": '{"vocab_size": N, "num_hidden_layers": N, "eos_token_id": N}'.replace("N", "9" * 4000),
    "twice": '{"vocab_size": 1, "vocab_size": 2}',
    "a template that is a number": '{"chat_template": 5}',
    "templates": '{"chat_template": [1, {}, null]}',
    "wrong types": json.dumps(
        {
            "vocab_size": "x", "quantization_config": [], "text_config": [1], "model_type": 5,
            "tie_word_embeddings": {}, "vision_config": {"text_config": {"num_hidden_layers": "2"}},
            "num_hidden_layers": [2], "transformers_version": "9" * 5000, "torch_dtype": [1], "auto_map": 3,
            "eos_token_id": {"a": []}, "_diffusers_version": 0,
        }
    ),
    "quantised by a list": '{"quantization_config": [1, 2]}',
    "quantised by depth": '{"quantization_config": {"quant_method": {"a": [[[[]]]]}}}',
    "Latin-1": "é",
    "a mark": "\ufeff{}",
}  # fmt: skip
FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "model.safetensors.index.json",
]


def tried(at: Path) -> list[Ran]:
    """Whatever reads JSON beside the weights."""
    recipe = {"base_model": "base", "models": [{"model": "ft"}], "lines": {"alpha": 0.1, "beta": 0.9}, "like": "ft"}
    runs = [run_lines("inspect", at / "ft"), run_lines("inspect", at / "ft", "--base", at / "base", "--json")]
    runs.append(edit(at, "--force", "--dtype", "bfloat16"))
    for more in ({"tokenizer_source": "base"}, {"chat_template": "base"}, {"tokenizer_source": "ft"}):
        (at / "merge.yaml").write_text(yaml.safe_dump(recipe | more))
        runs.append(run_lines("merge", "--config", at / "merge.yaml", "-o", at / "out", "--force", "--dry-run"))
    return runs


def put(at: Path, name: str, content: bytes, side: str) -> None:
    if name.endswith(".index.json") and (at / side / "model.safetensors").exists():
        (at / side / "model.safetensors").unlink()
    (at / side / name).write_bytes(content)


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2))])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.slow
def test_json_of_any_shape(name: str, part: int, folders: Path) -> None:
    """It is refused with the file's name, or carried as it is; nothing else happens.

    By default every shape in every third file, and every file in every third shape.
    """
    for what, text in list(SHAPES.items())[(part + FILES.index(name)) % 3 :: 3]:
        for side in ("base", "ft"):
            put(folders, name, text.encode("latin-1" if what == "Latin-1" else "utf-8"), side)
        for ran in tried(folders):
            assert (ran.trace, what) == ("", what)
            assert ran.code in (0, 3, 4), (what, ran.err)
            # A template or a tokenizer may not be there; or the config counts other layers than there are.
            named = (name, "quantised", " has no ", "num_hidden_layers")
            assert ran.code == 0 or any(word in ran.err for word in named), (what, ran.err)


VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(categories=["L", "N", "Cs", "Cc"]), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [
        "vocab_size", "torch_dtype", "dtype", "model_type", "quantization_config", "text_config", "num_hidden_layers",
        "tie_word_embeddings", "transformers_version", "eos_token_id", "chat_template", "weight_map", "metadata",
    ]
)  # fmt: skip


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.dictionaries(KEYS | st.text(max_size=4), VALUE, max_size=6) | VALUE, name=st.sampled_from(FILES[:4]))
@pytest.mark.slow
def test_any_json_beside_the_weights(content: Any, name: str, folders: Path) -> None:
    for side in ("base", "ft"):
        shutil.rmtree(folders / side, ignore_errors=True)
        write_checkpoint(folders / side, tensors(side == "ft"), config=CONFIG)
    (folders / "ft" / name).write_text(json.dumps(content))
    for ran in tried(folders):
        assert ran.trace == ""
        assert ran.code in (0, 3, 4), ran.err


def test_json_that_is_written_again(folders: Path) -> None:
    """What is rewritten with the new dtype keeps what is no text, and what is no number, as it came."""
    odd = '{"model_type": "llama", "dtype": "float32", "a": "\\ud800", "b": NaN, "n": ' + "9" * 4000 + "}"
    (folders / "ft" / "config.json").write_text(odd)
    assert edit(folders, "--dtype", "bfloat16").code == 0
    written = read_json(folders / "out" / "config.json")
    assert written["dtype"] == "bfloat16"
    assert written["a"] == "\ud800"
    assert written["n"] == int("9" * 4000)


def test_json_is_as_deep_as_json_is(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[" * 100 + "]" * 100)
    assert read_json(path)
    path.write_text("[" * 102 + "]" * 102)
    with pytest.raises(CheckpointError, match=r"x\.json: JSON nested more than 100"):
        read_json(path)


SHORT = {
    "empty lists": '{"a":[' + "[]," * 5_000_000 + "[]]}",
    "empty objects": "[" + "{}," * 5_000_000 + "{}]",
    "numbers": "[" + "1," * 7_000_000 + "1]",
    "objects in a row": '{"a":{"b":' * 1_000_000 + "1" + "}}" * 1_000_000,
}


@pytest.mark.parametrize("what", SHORT)
def test_json_of_too_many_values(what: str, tmp_path: Path) -> None:
    """It is refused by what it would become in memory, before it is parsed."""
    (tmp_path / "x.json").write_text(SHORT[what])
    started = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"x\.json"):
            read_json(tmp_path / "x.json")
        assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 10


def test_json_with_as_many_values_as_it_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lines_cli.storage.beside.MOST_VALUES", 20_000)
    (tmp_path / "x.json").write_text("[" + "[]," * 9_990 + "[]]")
    assert len(read_json(tmp_path / "x.json")) == 9_991
    (tmp_path / "x.json").write_text("[" + "[]," * 10_010 + "[]]")
    with pytest.raises(CheckpointError, match="more than 20,000 values"):
        read_json(tmp_path / "x.json")


@pytest.mark.slow
def test_an_index_of_too_many_shards(folders: Path) -> None:
    """Its size is bounded, and so is the number of files that it may name."""
    index = {"weight_map": {f"t{n}": f"{n}.safetensors" for n in range(100_001)}}
    put(folders, "model.safetensors.index.json", json.dumps(index).encode(), "ft")
    refused(edit(folders), 3, "more than 100,000 shards")
    os.truncate(folders / "ft" / "model.safetensors.index.json", 64 * 2**20 + 1)
    refused(edit(folders), 3, "at most 67,108,864")


# --- credentials ---

SAID = [
    "http://user:s3cr3t@host:80/x cannot be reached",
    "https://s3cr3t@host/x",
    "https://user:s3c@r3t-s3cr3t@host/x",
    "GET https://host/x?token=s3cr3t&a=b failed",
    "https://host/x?a=b&X-Amz-Signature=s3cr3t&Policy=s3cr3t",
    "{'authorization': 'Bearer s3cr3t', 'a': 'b'}",
    "[(b'Authorization', b'Bearer s3cr3t')]",
    "Authorization: Basic s3cr3t==",
    "Proxy-Authorization: Basic s3cr3t==",
    "authorization: s3cr3t",
    "sent Bearer s3cr3ts3cr3t",
    "?proxy=http%3A%2F%2Fuser%3As3cr3t%40host",
    "Set-Cookie: session=s3cr3t; path=/",
    "login(token='s3cr3t')",
]


@pytest.mark.parametrize("text", SAID)
def test_what_a_library_says_is_shown_without_secrets(text: str) -> None:
    assert "s3cr3t" not in without_secrets(text)
    assert "s3cr3t" not in LinesError(text, hint=text).message
    assert "s3cr3t" not in (LinesError(text, hint=text).hint or "")


@pytest.mark.parametrize(
    "text",
    [
        "org/name@main: no such file", "https://huggingface.co/org/name@rev", "/data/hf_cache/model", "a//b@c",
        "tokenizer_source: 'x' is neither base nor one of the models", "user@host", "hf_transfer",
        "models.0.parameters.weight: expected",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"HF_ENDPOINT": "http://user:s3cr3t@127.0.0.1:1"}, marks=pytest.mark.slow),
        {"HF_ENDPOINT": "http://user:s3/cr3t-s3cr3t@127.0.0.1:1"},
        pytest.param({"HF_ENDPOINT": "http://s3cr3t@127.0.0.1:1"}, marks=pytest.mark.slow),
        {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_TOKEN": "hf_s3cr3t"},
        pytest.param({"HF_ENDPOINT": "http://127.0.0.1:1?token=s3cr3t"}, marks=pytest.mark.slow),
        {"HF_ENDPOINT": "https://hub.invalid", "HTTPS_PROXY": "http://user:s3cr3t@127.0.0.1:1"},
        {"HF_ENDPOINT": "https://hub.invalid", "ALL_PROXY": "s3cr3t://user:s3cr3t@[bad"},
        {"HF_ENDPOINT": "http://user:s3cr3t@[bad"},
    ],
    ids=range(8),
)
@pytest.mark.parametrize("flags", [(), pytest.param(("--json",), marks=pytest.mark.slow)])
@pytest.mark.some(2)
def test_no_run_shows_a_credential(flags: tuple[str, ...], environment: dict[str, str], tmp_path: Path) -> None:
    """Whatever endpoint, proxy or token it is given, and whatever the client makes of it."""
    own = {
        key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HTTP", "ALL_P", "NO_P"))
    }
    own |= {"HF_HOME": str(tmp_path), "HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DISABLE_XET": "1"}
    anew = ["huggingface_hub", "httpx", "httpx2"]
    ran = forked.run(forked.command("inspect", "org/name", *flags), env=own | environment, fresh=anew)
    assert ran.returncode == 3, ran.stderr
    assert "Traceback" not in ran.stderr
    assert "org/name" in ran.stderr
    assert "s3cr3t" not in ran.stdout + ran.stderr
    assert "s3/cr3t" not in ran.stdout + ran.stderr

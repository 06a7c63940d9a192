"""What strangers' files are fed to: one function for each kind of file, and the rules that none of them may break.

`check` is called by the tests with mutated files, and by `fuzz.py` with what a coverage-guided fuzzer thinks of. A
file is either read or refused with a `LinesError`; nothing else may be raised, nothing be opened but what lies in the
folder, nothing written, and memory and time are bounded by the process that runs it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lines_cli
from lines_cli.checkpoint.reader import open_checkpoint
from lines_cli.errors import LinesError, RecipeError
from lines_cli.inspection.open import open_inspection
from lines_cli.inspection.report import make_report
from lines_cli.methods.registry import find_method
from lines_cli.plan.build import make_plan
from lines_cli.plan.inputs import open_inputs
from lines_cli.recipe.validate import edit_recipe
from lines_cli.recipe.yaml_file import load_recipe
from lines_cli.scaling import depth_rules
from lines_cli.scaling.find_depth import find_depth
from lines_cli.storage.names import RECIPE

CORPUS = Path(__file__).parent / "corpus"


def header(folder: Path, content: bytes) -> None:
    """A safetensors file."""
    (folder / "model.safetensors").write_bytes(content)
    with watched(folder):
        checkpoint = open_checkpoint(folder / "model.safetensors", to_look_at=True)
    end = len(content)
    for stored in checkpoint.tensors.values():
        info = stored.info
        assert 8 <= info.offset <= info.offset + info.nbytes <= end, "a tensor outside its file"


def pickle(folder: Path, content: bytes) -> None:
    """The pickle in a file that torch.save wrote, with two storages of 64 bytes."""
    with zipfile.ZipFile(folder / "m.pt", "w") as file:
        for name, of in (("m/data.pkl", content), ("m/data/0", bytes(64)), ("m/data/1", bytes(64))):
            file.writestr(name, of)
    torch_file(folder, (folder / "m.pt").read_bytes())


def torch_file(folder: Path, content: bytes) -> None:
    """A file that torch.save wrote."""
    (folder / "m.pt").write_bytes(content)
    with watched(folder):
        checkpoint = open_checkpoint(folder / "m.pt", to_look_at=True)
    end = len(content)
    views = checkpoint.views[0] if checkpoint.views else {}
    for stored in checkpoint.tensors.values():
        info, view = stored.info, views.get(stored.info.offset)
        if view is not None:
            last = sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
            assert end <= info.offset
            assert info.nbytes == view.nbytes
            info = info._replace(offset=view.offset, nbytes=(last + 1) * view.itemsize)
        assert 0 <= info.offset <= info.offset + info.nbytes <= end, "a tensor outside its file"


def index(folder: Path, content: bytes) -> None:
    """The index of a folder with two shards."""
    (folder / "model.safetensors.index.json").write_bytes(content)
    with watched(folder):
        open_checkpoint(folder, to_look_at=True)


def config(folder: Path, content: bytes) -> None:
    """The `config.json` of a model with four layers."""
    (folder / "config.json").write_bytes(content)
    with watched(folder):
        checkpoint = open_checkpoint(folder)
        find_depth(checkpoint.tensors, config=checkpoint.config)


def recipe(folder: Path, content: bytes) -> None:
    """A recipe for a merge."""
    (folder / "merge.yaml").write_bytes(content)
    with watched(folder):
        load_recipe(folder / "merge.yaml")


def record(folder: Path, content: bytes) -> None:
    """The recipe that `lines inspect` finds beside the weights of a model with four layers."""
    (folder / RECIPE).write_bytes(content)
    with watched(folder):
        inspection = open_inspection(folder)
        json.dumps(make_report(inspection), allow_nan=False)
    if inspection.made_by is None:
        raise RecipeError(next(note for note in inspection.notes if "recipe" in note))


def sidecar(folder: Path, content: bytes) -> None:
    """Any JSON beside the weights of an edit that follows the tokenizer, the ids and the chat template."""
    base, ft = folder / "base", folder / "ft"
    sources = {"tokenizer_source": str(ft), "chat_template": "base", "dtype": "bfloat16"}
    recipe = edit_recipe(str(base), str(ft), **sources)
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        for side in (base, ft):
            (side / name).write_bytes(content)
        try:
            with watched(folder):
                plan = make_plan(recipe, open_inputs(recipe), folder / "out")
                for beside in plan.sidecars:
                    beside.read()
        finally:
            for side in (base, ft):
                (side / name).write_bytes(b'{"chat_template": "{{ a }}", "model_type": "llama"}')


KINDS: dict[str, Callable[[Path, bytes], None]] = {
    "header": header,
    "pickle": pickle,
    "torch_file": torch_file,
    "index": index,
    "config": config,
    "recipe": recipe,
    "record": record,
    "sidecar": sidecar,
}


def prepare(folder: Path, kind: str) -> None:
    """What stands beside the file in question."""
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    if kind == "index":
        for number, names in enumerate((["a", "b"], ["c"]), 1):
            text = json.dumps(dict.fromkeys(names, empty)).encode()
            (folder / f"model-0000{number}-of-00002.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    if kind == "sidecar":
        for side in ("base", "ft"):
            (folder / side).mkdir()
            prepare(folder / side, "config")
            for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
                (folder / side / name).write_bytes(b'{"chat_template": "{{ a }}", "model_type": "llama"}')
    if kind in ("config", "record"):
        text = json.dumps({f"model.layers.{n}.w": empty for n in range(4)}).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


def check(kind: str, folder: Path, content: bytes) -> bool:
    """Feed a file to what reads it; whether it was read. Whatever breaks a rule is raised."""
    try:
        KINDS[kind](folder, content)
    except LinesError as refused:
        message = refused.message
    else:
        return True
    assert message
    assert len(message) < 10_000, "a file can make a message very long"
    return False


class watched:  # noqa: N801 - reads as what it is
    """Within it nothing may be opened outside a folder and our package, or to be written. (Audit hooks stay.)"""

    folder: Path | None = None
    _hooked = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def __enter__(self) -> None:
        if not watched._hooked:
            sys.addaudithook(watched._seen)
            watched._hooked = True
        watched.folder = self._folder

    def __exit__(self, *_: object) -> None:
        watched.folder = None

    @staticmethod
    def _seen(event: str, arguments: tuple[Any, ...]) -> None:
        folder = watched.folder
        if folder is None:
            return
        if event in _NEVER:
            raise AssertionError(f"{event} {arguments}")
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, int) or str(path).endswith((".py", ".pyc")):
                return
            writes = isinstance(mode, str) and any(letter in mode for letter in "wax+")
            writes = writes or bool(isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            full = Path(os.path.abspath(os.fsdecode(path)))
            inside = full.is_relative_to(folder) or full.is_relative_to(_OURS)
            if writes or not inside:
                raise AssertionError(f"opened {path!r}, {'to be written' if writes else 'outside the folder'}")


_OURS = Path(lines_cli.__file__).parent  # its data may be read
_NEVER = {
    "os.exec", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.system", "os.truncate",
    "pickle.find_class", "shutil.rmtree", "socket.connect", "subprocess.Popen", "urllib.Request",
}  # fmt: skip


# --- mutation ---

_TOKENS = [
    b"-1", b"0", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b"18446744073709551616",
    b"9223372036854775807",
    b'"../x"', b'"/etc/passwd"', b'"\\u0000"', b'"\\ud800"', b'"\\u001b[2J"', b'"a\\nb"', b"[[[[[[[[", b'{"a":{"a":',
    b"__metadata__", b'"F4"', b'"BOOL"', b"&a *a", b"!!python/object/apply:os.system [id]", b"<<: *a", b"? ",
    b"!!pairs ", b"!!binary ", b"1:1:1:1", b'"\\ud800"', b"9" * 5000, b"0x" + b"f" * 5000, b"[" * 900,
    b'{"chat_template":',
    b"\xff\xfe", b"model-00001-of-00002.safetensors", b"99999999999999999999999999", b"- - - -", b"%YAML 9.9\n",
    b"\x00", b"...\n---\n",
]  # fmt: skip


def mutated(content: bytes, chance: random.Random) -> bytes:
    """The same file with one to six things wrong with it: bytes, numbers, words, pieces; a header's length is mostly
    made to fit again, so that what follows is looked at.
    """
    framed = len(content) > 8 and content[8:9] == b"{" and chance.random() < 0.8
    data = bytearray(content[8:] if framed else content)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(8):
            case 0:
                data[at : at + 1] = chance.randbytes(1)
            case 1:
                data[at:at] = chance.choice(_TOKENS)
            case 2:
                data[at : at + chance.randint(1, 20)] = b""
            case 3:
                other = chance.randrange(len(data) + 1)
                data[at:at] = data[other : other + chance.randint(1, 60)]
            case 4:
                numbers = list(re.finditer(rb"-?\d+", data))
                if numbers:
                    number = chance.choice(numbers)
                    near = int(number[0][:18]) + chance.choice([-8, -1, 1, 8, 2**31, 2**63, -(2**40)])
                    data[number.start() : number.end()] = str(near).encode()
            case 5:
                words = list(re.finditer(rb'"[^"]*"', data))
                if words:
                    word = chance.choice(words)
                    data[word.start() : word.end()] = chance.choice([*_TOKENS, chance.choice(words)[0]])
            case 6:
                del data[at:]
            case _:
                data[at:at] = data[at : at + 10] * chance.choice([2, 50, 2000])
    return struct.pack("<Q", len(data)) + data if framed else bytes(data)


def look_among_the_installed() -> None:
    """A method or a depth rule that is none of ours is looked for among the installed packages, once in a process."""
    depth_rules.installed_names()
    with contextlib.suppress(ValueError):
        find_method("no method")


def run(kind: str, folder: Path, number: int, seed: int) -> tuple[int, int]:
    """Mutate the corpus so many times; how many files were read, and how many refused."""
    look_among_the_installed()
    chance = random.Random(f"{kind} {seed}")
    prepare(folder, kind)
    seeds = [path.read_bytes() for path in sorted((CORPUS / kind).iterdir())]
    for content in seeds:
        check(kind, folder, content)
    read = 0
    for _ in range(number):
        content = mutated(chance.choice(seeds), chance)
        try:
            read += check(kind, folder, content)
        except BaseException:
            (folder / "found").write_bytes(content)
            print(f"{kind}: breaks a rule: {content[:2000]!r}", file=sys.stderr)
            raise
    return read, number - read

"""`lines inspect --plot`: files that open, show what the report tells, and harm nobody; figures that can be read."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from base64 import b64encode
from collections.abc import Iterator, Mapping
from hashlib import sha256
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import matplotlib as mpl
import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lines_cli.inspection import compare as comparison
from lines_cli.inspection import plot, series
from lines_cli.inspection.html import page as page_of
from lines_cli.inspection.tables import Bar, sections
from support.files import snapshot, write_checkpoint, write_raw
from support.run import Ran, run_lines

FORMS = ["svg", "png", "html"]


def draw(path: Path, *args: object) -> Ran:
    """`lines inspect ARGS --plot PATH`, which succeeds."""
    ran = run_lines("inspect", *args, "--plot", path)
    assert (ran.code, ran.trace) == (0, ""), ran.trace or ran.err
    return ran


def decoder(layers: int, seed: int = 0) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    model = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(6, 6, generator=made) for i in range(layers)}
    model |= {f"model.layers.{i}.self_attn.q_proj.weight": torch.randn(6, 6, generator=made) for i in range(layers)}
    return model | {"model.embed_tokens.weight": torch.randn(9, 6, generator=made), "model.norm.weight": torch.ones(6)}


def towers() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(3)
    depths = {"text_model": 12, "vision_model": 24}
    return {
        f"{tower}.encoder.layers.{i}.mlp.fc1.weight": torch.randn(6, 6, generator=made)
        for tower, layers in depths.items()
        for i in range(layers)
    }


def stacks() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(4)
    depths = {"audio.layers": 4, "text.layers": 8, "vision.layers": 12, "fusion.blocks": 2}
    return {
        f"{name}.{i}.w": torch.randn(5, 5, generator=made) for name, layers in depths.items() for i in range(layers)
    }


def tuned(model: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(100 + seed)
    return {name: value + 0.01 * torch.randn(value.shape, generator=made) for name, value in model.items()}


def with_nan(model: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    bad = {name: value.clone() for name, value in model.items()}
    bad["model.layers.1.mlp.up_proj.weight"].fill_(math.nan)
    bad["model.layers.1.self_attn.q_proj.weight"].fill_(math.nan)
    return bad


LONG = "Llama-3.1-8B-Instruct-finetuned-on-a-task-called-{at}-with-a-long-name"
CASES: dict[str, tuple[dict[str, torch.Tensor], int, str]] = {
    # the base, how many fine-tunes, how they are called
    "one checkpoint": (decoder(32), 0, ""),
    "one fine-tune": (decoder(32), 1, "ft{at}"),
    "three": (decoder(16), 3, "ft{at}"),
    "eight, long names": (decoder(16), 8, LONG),
    "towers": (towers(), 0, ""),
    "towers, one": (towers(), 1, "ft{at}"),
    "towers, three": (towers(), 3, "ft{at}"),
    "80 layers": (decoder(80), 1, "ft{at}"),
    "twenty": (decoder(8), 20, "ft{at}"),
    "twenty-four": (decoder(3), 24, "ft{at}"),
    "four stacks": (stacks(), 2, "ft{at}"),
    "unknown depth": ({"a.w": torch.ones(3, 3), "b.w": torch.ones(3, 3)}, 0, ""),
    "unknown depth, two": ({"a.w": torch.ones(3, 3), "b.w": torch.ones(3, 3)}, 2, "ft{at}"),
    "one layer": (decoder(1), 0, ""),
    "one layer, two": (decoder(1), 2, "ft{at}"),
}


def made(case: str, tmp: Path) -> list[object]:
    """The arguments that inspect a case, its files written."""
    model, tunes, name = CASES[case]
    base = write_checkpoint(tmp / "base", model)
    fts = [write_checkpoint(tmp / name.format(at=at), tuned(model, at)) for at in range(tunes)]
    return [*fts, "--base", base] if fts else [base]


class Page(HTMLParser):
    """What a page holds: every tag with its attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.cells: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "input"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open[-1:] in (["td"], ["th"]):
            self.cells[-1] += data


def check_file(path: Path) -> None:
    """The file is what its name says, and whole."""
    content = path.read_bytes()
    if path.suffix == ".png":
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        height, width, _ = matplotlib.image.imread(path).shape
        assert width == 1350
        assert 100 < height < 20_000
        return
    if path.suffix == ".svg":
        root = ET.fromstring(content)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        hrefs = [v for node in root.iter() for k, v in node.attrib.items() if k.rpartition("}")[2] in ("href", "src")]
        assert all(href.startswith(("#", "data:image/png;base64,")) for href in hrefs)
        return
    check_page(Page(path))


def check_page(page: Page) -> None:
    """It needs no network, runs nothing but its own script, and is closed as it was opened."""
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "form", "base", "a", "img", "image", "use"), tag
        assert not [
            key for key in attributes if key.startswith("on") or key.endswith(("href", "srcset", "src", "style"))
        ]
    assert not re.search(r"url\(|@import", page.source)
    (policy,) = (told["content"] for tag, told in page.tags if tag == "meta" and "http-equiv" in told)
    allowed = dict(part.strip().split(" ", 1) for part in str(policy).split(";"))
    assert allowed.pop("default-src") == allowed.pop("base-uri") == allowed.pop("form-action") == "'none'"
    assert allowed.keys() == {"script-src", "style-src"}
    for tag, name in (("script", "page.js"), ("style", "page.css")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page.source, re.DOTALL)
        assert content == (Path(plot.__file__).parent / name).read_text(encoding="utf-8").strip()
        digest = b64encode(sha256(content.encode()).digest()).decode()
        assert allowed[f"{tag}-src"] == f"'sha256-{digest}'"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Draws a case once in each form that is asked for: (case, form) -> arguments and file."""
    known: dict[str, tuple[list[object], Path]] = {}

    def get(case: str, form: str) -> tuple[list[object], Path]:
        if case not in known:
            folder = tmp_path_factory.mktemp("case")
            known[case] = (made(case, folder), folder)
        arguments, folder = known[case]
        if form and not (folder / f"out.{form}").exists():
            draw(folder / f"out.{form}", *arguments)
        return arguments, folder / f"out.{form}"

    return get


REDUNDANT = (
    "eight, long names",
    "three",
    "towers, one",
    "80 layers",
    "four stacks",
    "towers, three",
    "twenty",
    "twenty-four",
    "one layer, two",
)  # whose figures other tests draw
QUICK: list[Any] = [pytest.param(case, "png", marks=pytest.mark.slow if case in REDUNDANT else ()) for case in CASES]
QUICK += [("one fine-tune", "svg"), pytest.param("unknown depth", "svg", marks=pytest.mark.slow)]
QUICK += [(case, "html") for case in ("one fine-tune", "unknown depth")]


@pytest.mark.parametrize(("case", "form"), QUICK)
@pytest.mark.slow
def test_files_are_whole(case: str, form: str, drawn: Any) -> None:
    """Every case in every form gives a file that opens, with no folder strewn beside it."""
    _, path = drawn(case, form)
    check_file(path)
    assert not list(path.parent.glob(".*"))


def test_what_is_not_finite(tmp_path: Path) -> None:
    """A layer of NaN, or a fine-tune that is its base, leaves a gap in the figures and nothing else."""
    model = decoder(3)
    base = write_checkpoint(tmp_path / "base", model)
    same, bad = write_checkpoint(tmp_path / "same", model), write_checkpoint(tmp_path / "bad", with_nan(model))
    for number, fts in enumerate([[bad], [same, bad]]):
        path = tmp_path / f"{number}.html"
        draw(path, *fts, "--base", base)
        check_file(path)


@pytest.mark.parametrize(
    ("form", "compared"),
    [
        ("svg", False),
        *(pytest.param(form, False, marks=pytest.mark.slow) for form in ("html", "png")),
        pytest.param("svg", True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_the_same_twice(form: str, compared: bool, tmp_path: Path) -> None:
    """The same command gives the same bytes, run after run; and drawing what headers tell needs no torch."""
    model = decoder(4)
    arguments: list[object] = [write_checkpoint(tmp_path / "base", model)]
    if compared:
        arguments = [write_checkpoint(tmp_path / "ft", tuned(model, 1)), "--base", *arguments]
    draw(tmp_path / f"a.{form}", *arguments)
    program = (
        "import sys\nfrom lines_cli.cli.app import app\napp(standalone_mode=False)\n"
        f"assert ('torch' in sys.modules) == {compared}"
    )
    command = [sys.executable, "-c", program, "inspect", *arguments, "--plot", tmp_path / f"b.{form}"]
    environment = os.environ | {"PYTHONHASHSEED": "98"}
    subprocess.run(list(map(str, command)), check=True, capture_output=True, env=environment)
    assert (tmp_path / f"a.{form}").read_bytes() == (tmp_path / f"b.{form}").read_bytes()


@pytest.mark.slow
def test_the_same_twice_in_a_process(drawn: Any) -> None:
    """The same report gives the same bytes, whatever was drawn before it."""
    arguments, _ = drawn("one layer, two", "")
    told = run_lines("inspect", *arguments, "--json").json
    with mpl.rc_context(plot.STYLE):
        assert len({plot.render(plot.panels(told), "svg") for _ in range(2)}) == 1
    assert len({plot.picture(told, "svg") for _ in range(2)}) == 1
    assert len({page_of(told) for _ in range(2)}) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        *("one fine-tune", "towers", "one layer, two"),
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("one checkpoint", "towers, three")),
    ],
)
def test_the_page_holds_every_number(case: str, drawn: Any) -> None:
    """The page has every cell of every table, unfolded, the facts, the figures, and the recipe."""
    arguments, path = drawn(case, "html")
    page = Page(path)
    told = run_lines("inspect", *arguments, "--json").json
    expected = [
        cell
        for section in sections(told, full=True)
        for _, table in section.tables
        for row in (table.headings, *table.rows)
        for cell in row
        if not isinstance(cell, Bar)
    ]
    assert sorted(filter(None, page.cells)) == sorted(filter(None, expected))
    for section in sections(told, full=True):
        for _, lines in section.facts:
            assert all(line in page.text for line in lines)
    assert "(--full" not in page.text
    if told.get("fine_tunes"):
        assert "merge_method: task_arithmetic" in page.text
        assert all(f"model: {tune['model']}" in page.text for tune in told["fine_tunes"])


@pytest.mark.slow
def test_the_recipe_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe that a page shows is one that lines merge takes."""
    model = decoder(3)
    base = write_checkpoint(tmp_path / "base", model)
    fts = [write_checkpoint(tmp_path / f"ft{at}", tuned(model, at)) for at in range(2)]
    for number in (1, 2):
        options = ["--alpha", "0.3", "--filter", "norm=keep", "--stack", "layers=0.1,0.2"]
        draw(tmp_path / "p.html", *fts[:number], "--base", base, *options)
        recipe = re.search(r"<pre>(.*?)</pre>", (tmp_path / "p.html").read_text(), re.DOTALL)
        (tmp_path / "r.yaml").write_text(recipe[1].replace("&#x27;", "'").replace("&quot;", '"').replace("&amp;", "&"))
        ran = run_lines("merge", "--config", tmp_path / "r.yaml", "-o", tmp_path / f"out{number}")
        assert (ran.code, ran.trace) == (0, ""), ran.err
        lines = run_lines("inspect", tmp_path / f"out{number}", "--json").json["scaling"]["lines"]
        assert lines["alpha"] == 0.3
        assert lines["filter"] == {"norm": "keep"}


def test_the_page_of_an_output(tmp_path: Path) -> None:
    """The page of an output of lines has the recipe that made it."""
    model = decoder(3)
    base, ft = write_checkpoint(tmp_path / "base", model), write_checkpoint(tmp_path / "ft", tuned(model, 1))
    assert run_lines("edit", base, ft, "-o", tmp_path / "out", "--alpha", "0.3").code == 0
    draw(tmp_path / "p.html", tmp_path / "out")
    page = Page(tmp_path / "p.html")
    assert "The recipe that made it" in page.text
    assert "alpha: 0.3" in page.text


def test_the_page_of_a_planned_merge(tmp_path: Path) -> None:
    """The page of a merge that is planned has its recipe, its alpha, and the figures of several fine-tunes."""
    model = decoder(3)
    write_checkpoint(tmp_path / "base", model)
    for at in range(2):
        write_checkpoint(tmp_path / f"ft{at}", tuned(model, at))
    (tmp_path / "r.yaml").write_text(
        "merge_method: ties\nbase_model: base\nmodels: [{model: ft0}, {model: ft1}]\nlines: {alpha: auto, beta: 0.5}\n"
    )
    ran = draw(tmp_path / "p.html", "--config", tmp_path / "r.yaml", "--json")
    page = Page(tmp_path / "p.html")
    check_page(page)
    assert "merge_method: ties" in page.text
    assert "alpha: auto" in page.text
    assert f"auto is {ran.json['together']['auto']['alpha']:.4g}" in page.text
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page.source)
    assert sum("osine" in title for title in titles) == 2
    assert "The same after LiNeS: model.layers" in titles


# --- names from strangers ---

EVIL = {
    "script": "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;",
    "math": r"$\frac{1}{0}$ $x_",
    "escapes": "\x1b[31mred\x07\r\x9b\x7f\0",
    "right to left": "\u202eabc\u2066",
    "lines": "a\nb\n\nc",
    "markup": "[red]x[/red]",
    "long": "x" * 2000,
    "glyphs": "模型-🎉-ﷺ",
    "legend": "_hidden",
    "percent": "%s%(x)d{0}",
    "CDATA": "]]><!-- -->",
}


WITHIN = {"svg": ("script", "escapes", "right to left", "CDATA", "math"), "png": ("math", "lines", "long", "glyphs")}


SINGLY = [(what, form) for form in ("html", "svg", "png") for what in EVIL if form == "html" or what in WITHIN[form]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "form"),
    [
        *(("all", form) for form in ("html", "svg")),
        pytest.param("all", "png", marks=pytest.mark.slow),
        *(pytest.param(what, form, marks=pytest.mark.slow) for what, form in SINGLY),
    ],
)
def test_hostile_names(what: str, form: str, tmp_path: Path) -> None:
    """Whatever tensors and stacks are called, the file opens, runs nothing, and holds no control characters."""
    known = [one for one, of in SINGLY if of == form] if what == "all" else [what]
    names = [name for one in known for name in (*(f"{EVIL[one]}.layers.{i}.w" for i in range(3)), EVIL[one])]
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i, name in enumerate(names)}
    path = write_raw(tmp_path / "m.safetensors", header, bytes(8 * len(names)))
    draw(tmp_path / f"p.{form}", path, "--tensors")
    check_file(tmp_path / f"p.{form}")
    if form == "html":
        text = Page(tmp_path / "p.html").text
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
        for one in {"script", "math", "markup", "glyphs", "percent", "CDATA"} & set(known):
            assert EVIL[one] in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    ["script", "math", "legend", *(pytest.param(what, marks=pytest.mark.slow) for what in ("escapes", "glyphs"))],
)
def test_hostile_model_names(what: str, tmp_path: Path) -> None:
    """A fine-tune's own name is drawn as it is, and stands in the legend."""
    model = {f"h.{i}.w": torch.ones(2) * i for i in range(2)}
    base = write_checkpoint(tmp_path / "base", model)
    name = EVIL[what].replace("/", "|").replace("\0", "")[:200]
    fts = [write_checkpoint(tmp_path / f"{name}{at}", tuned(model, at)) for at in range(2)]
    if what in ("script", "escapes"):
        draw(tmp_path / "p.html", fts[0], "--base", base)
        check_file(tmp_path / "p.html")
    for tunes in (fts[:1], fts):
        told = run_lines("inspect", *tunes, "--base", base, "--json").json
        (legend,) = next(iter(figures(told))).legends
        assert len(legend.get_texts()) == len(tunes) + 1


def test_a_hostile_recipe(tmp_path: Path) -> None:
    """A recipe beside the weights is text in the page."""
    path = write_checkpoint(tmp_path / "m", decoder(2))
    (path / "lines_recipe.yaml").write_text(
        'base_model: "/<script>alert(1)</script>"\nmodels: [{model: "/</pre><script>x</script>"}]\n'
    )
    draw(tmp_path / "p.html", path)
    page = Page(tmp_path / "p.html")
    check_page(page)
    assert "</pre><script>" in page.text


# --- where it goes ---


@pytest.mark.slow
def test_an_older_file_is_replaced(tmp_path: Path) -> None:
    """A file of that name is replaced, a link by the file, and its target stays."""
    path = write_checkpoint(tmp_path / "m", decoder(2))
    for form in FORMS:
        (tmp_path / f"p.{form}").write_text("old" * 100_000)
        draw(tmp_path / f"p.{form}", path)
        check_file(tmp_path / f"p.{form}")
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link.svg").symlink_to("precious")
    draw(tmp_path / "link.svg", path)
    assert (tmp_path / "precious").read_text() == "precious"


REFUSED = {
    "another format": ("p.pdf", 2),
    "no suffix": ("p", 2),
    "no folder": ("absent/p.svg", 6),
    "a file for a folder": ("file/p.svg", 6),
    "a folder": ("folder.svg", 6),
    "an input": ("weights.svg", 6),
    "a base": ("base.svg", 6),
    "a folder that takes no files": ("/proc/p.svg", 6),
}


@pytest.mark.parametrize(
    "what",
    [
        *REFUSED,
        "nothing",
        "this folder",
        "the root",
        "a name too long",
    ],
)
def test_where_nothing_can_be_drawn(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be drawn there is refused before any weight is read, and nothing is left behind."""
    model = decoder(2)
    base, ft = write_checkpoint(tmp_path / "base", model), write_checkpoint(tmp_path / "ft", tuned(model, 1))
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "weights.svg").symlink_to("ft/model.safetensors")
    os.link(tmp_path / "base" / "model.safetensors", tmp_path / "base.svg")
    named = {
        "nothing": ("", 2),
        "this folder": (".", 2),
        "the root": ("/", 2),
        "a name too long": ("x" * 260 + ".svg", 6),
    }
    name, code = (REFUSED | named)[what]
    monkeypatch.setattr(comparison, "compare", lambda *_, **__: pytest.fail("the weights were read"))
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    ran = run_lines("inspect", ft, "--base", base, "--plot", name)
    assert (ran.code, ran.out, ran.trace) == (code, "", ""), ran.trace or ran.err
    assert "--plot" in ran.err
    assert "hint: " in ran.err
    assert snapshot(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("form", ["Svg", *(pytest.param(form, marks=pytest.mark.slow) for form in ("PNG", "HTML"))])
def test_suffixes_in_capitals(form: str, tmp_path: Path) -> None:
    """A suffix says the same in capitals."""
    path = write_checkpoint(tmp_path / "m", decoder(2))
    draw(tmp_path / f"p.{form}", path)
    (tmp_path / f"p.{form}").rename(tmp_path / f"p.{form.lower()}")
    check_file(tmp_path / f"p.{form.lower()}")


@pytest.mark.slow
def test_a_name_as_long_as_names_may_be(tmp_path: Path) -> None:
    """A name of 255 bytes is drawn into, although nothing could be added to it."""
    path = write_checkpoint(tmp_path / "m", decoder(2))
    draw(tmp_path / ("x" * 251 + ".svg"), path)


@pytest.mark.slow
def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the file cannot be written the older one stands, nothing is beside it, and the exit code says so."""
    path = write_checkpoint(tmp_path / "m", decoder(2))
    (tmp_path / "p.svg").write_text("old")
    before = snapshot(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    ran = run_lines("inspect", path, "--plot", tmp_path / "p.svg")
    assert (ran.code, ran.trace) == (6, "")
    assert "No space left" in ran.err
    assert snapshot(tmp_path) == before


@pytest.mark.skipif(not hasattr(os, "setresuid") or os.getuid() != 0, reason="no other user to be")
@pytest.mark.parametrize(
    "mode",
    [
        0o555,
        0o000,
    ],
)
def test_a_folder_of_others(mode: int) -> None:
    """A folder that an ordinary user may not write into is refused by name."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    path = write_checkpoint(folder / "m", decoder(2))
    draw(folder / "warm.html", path)  # imports all it needs, which an ordinary user may not read
    (folder / "theirs").mkdir()
    (folder / "theirs").chmod(mode)
    for readable in (path, *path.iterdir()):
        readable.chmod(0o777)
    try:
        os.setresuid(65534, 65534, 0)
        ran = run_lines("inspect", path, "--plot", folder / "theirs" / "p.svg")
    finally:
        os.setresuid(0, 0, 0)
        left = list((folder / "theirs").iterdir())
        shutil.rmtree(folder)
    assert (ran.code, ran.trace, left) == (6, "", [])
    assert "theirs" in ran.err


def test_a_finding_is_drawn_first(tmp_path: Path) -> None:
    """--check with a finding still draws, prints, and ends with 5."""
    path = write_checkpoint(tmp_path / "m", with_nan(decoder(2)))
    ran = run_lines("inspect", path, "--check", "--plot", tmp_path / "p.html", "--json")
    assert ran.code == 5
    assert ran.json["health"][0]["nonfinite"]
    check_file(tmp_path / "p.html")


NO_MATPLOTLIB = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from lines_cli.cli.app import main; main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", [".svg", pytest.param(".png", marks=pytest.mark.slow)])
def test_without_matplotlib(form: str, tmp_path: Path) -> None:
    """Without matplotlib --plot says what to install, before it reads; a page, and all else, works."""
    path = write_checkpoint(tmp_path / "m", decoder(2))
    command = [sys.executable, "-c", NO_MATPLOTLIB, "inspect", str(path)]
    ran = subprocess.run([*command, "--plot", f"p{form}"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "pip install matplotlib" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
    subprocess.run([*command, "--plot", "p.html"], cwd=tmp_path, capture_output=True, check=True)
    check_file(tmp_path / "p.html")
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_a_user_s_own_style(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a matplotlibrc of the user's says does not matter: the file is the same."""
    model = decoder(2)
    write_checkpoint(tmp_path / "m", model)
    (tmp_path / "matplotlibrc").write_text(
        "text.usetex: True\nbackend: TkAgg\nsvg.fonttype: none\n"
        "font.size: 30\naxes.grid: True\nimage.cmap: jet\nsavefig.dpi: 20\naxes.prop_cycle: cycler('color', 'rgb')\n"
    )
    command = [sys.executable, "-m", "lines_cli", "inspect", "m", "--plot", "p.png"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, "Traceback" in ran.stderr) == (0, False), ran.stderr[-600:]
    check_file(tmp_path / "p.png")
    monkeypatch.chdir(tmp_path)
    draw(Path("q.png"), "m")
    assert (tmp_path / "p.png").read_bytes() == (tmp_path / "q.png").read_bytes()
    assert mpl.rcParams["svg.hashsalt"] is None  # nor does lines change what others draw


# --- what the figures look like ---


def parts(figure: Any) -> list[Any]:
    """A figure and all figures in it."""
    return [figure, *(inner for sub in figure.subfigs for inner in parts(sub))]


def figures(told: Any) -> Iterator[Figure]:
    """Each panel as a figure of its own, laid out as it is in a page."""
    with mpl.rc_context(plot.STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for panel in plot.panels(told):
            figure = Figure(figsize=(plot.WIDTH, panel.height), layout="constrained")
            FigureCanvasAgg(figure)
            figure.suptitle(panel.title)
            panel.draw(figure)
            figure.draw_without_rendering()
            yield figure


def texts(figure: Figure) -> list[tuple[str, Any]]:
    """Every text that is seen, with its box in pixels."""
    renderer = figure.canvas.get_renderer()
    found: list[Any] = []
    for part in parts(figure):
        found += [part._suptitle] if part._suptitle else []
        for axes in part.axes:
            if not axes.get_visible():
                continue
            found += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
            for axis, ends in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
                low, high = sorted(ends)
                span = 1e-9 * (high - low)
                for tick in axis.get_major_ticks():
                    if low - span <= tick.get_loc() <= high + span:
                        found += [tick.label1, tick.label2]
        for legend in part.legends:
            found += legend.get_texts()
    shown = [text for text in found if text.get_visible() and text.get_text()]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in shown]


CROWDED = ("one fine-tune", "eight, long names", "80 layers")
LAID_OUT = [
    pytest.param(case, marks=() if case in CROWDED else pytest.mark.slow)
    for case in CASES
    if not case.startswith("unknown")
]


@pytest.mark.slow
@pytest.mark.parametrize("case", LAID_OUT)
def test_text_keeps_its_distance(case: str, drawn: Any) -> None:
    """No text of a figure lies on another, or reaches over the edge."""
    arguments, _ = drawn(case, "")
    told = run_lines("inspect", *arguments, "--json").json
    for figure in figures(told):
        canvas = figure.bbox
        boxes = texts(figure)
        assert boxes
        for at, (text, box) in enumerate(boxes):
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= canvas.x1 + 1 and box.y1 <= canvas.y1 + 1
            assert inside, (text, box)
            for other, beside in boxes[at + 1 :]:
                wide = min(box.x1, beside.x1) - max(box.x0, beside.x0)
                high = min(box.y1, beside.y1) - max(box.y0, beside.y0)
                assert not (wide > 1 and high > 1), (text, other)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["three", pytest.param("four stacks", marks=pytest.mark.slow)])
def test_labels_are_clear_of_colour_bars(case: str, drawn: Any) -> None:
    """Between a colour bar with its numbers and any other axes with its labels there is room to see."""
    arguments, _ = drawn(case, "")
    told = run_lines("inspect", *arguments, "--json").json
    bars = 0
    for figure in figures(told):
        everything = [axes for part in parts(figure) for axes in part.axes if axes.get_visible()]
        boxes = {axes: axes.get_tightbbox(figure.canvas.get_renderer()) for axes in everything}
        for bar in (axes for axes in everything if axes.get_label() == "<colorbar>"):
            bars += 1
            padded = boxes[bar].padded(4)
            assert not [axes for axes in everything if axes is not bar and padded.overlaps(boxes[axes])]
    assert bars == 2


def test_pictures_name_base_and_settings(drawn: Any) -> None:
    """Above a picture stands what it is of: the fine-tune, its base, and where the coefficients come from."""
    arguments, _ = drawn("one layer", "")
    ft = write_checkpoint(Path(str(arguments[-1])).parent / ("long" * 40), tuned(decoder(1), 1))
    told = run_lines("inspect", ft, "--base", arguments[-1], "--alpha", "0.3", "--json").json
    with mpl.rc_context(plot.STYLE):
        panel = plot.about(told)
        figure = Figure(figsize=(plot.WIDTH, panel.height))
        canvas = FigureCanvasAgg(figure)
        panel.draw(figure)
        said = [text.get_text() for text in figure.texts]
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in figure.texts]
    assert said[0].endswith("longlong")
    assert "…" in said[0]
    assert said[1].startswith("base: ")
    assert said[2] == "LiNeS: alpha 0.3, beta 0.7, gamma 1, schedule linear, outside alpha"
    for above, below in pairwise(boxes):
        assert above.y0 >= below.y1
    assert all(box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """How well one colour is seen on another, by the rule of WCAG 2."""

    def luminance(colour: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.slow
def test_numbers_on_colours_can_be_read() -> None:
    """A number in a matrix stands out from its cell, whatever its value is."""
    pairs = list(combinations(range(8), 2))
    together: dict[str, Any] = {"layers": [{"cosine": [[1.0, -1.0], [-1.0, 1.0]]}]}  # the scale is -1 to 1
    for key, low, same in (("cosine", -1.0, 1.0), ("opposed", 0.0, 0.0)):
        together[key] = [[same] * 8 for _ in range(8)]
        for at, (a, b) in enumerate(pairs):
            together[key][a][b] = together[key][b][a] = low + (1 - low) * at / (len(pairs) - 1)
    figure = Figure()
    with mpl.rc_context(plot.STYLE):
        plot.matrices(figure, together, [f"{at} x" for at in range(8)])
    for axes in figure.axes[:2]:
        image = axes.images[0]
        assert len(axes.texts) >= len(pairs)
        for text in axes.texts:
            x, y = map(int, text.get_position())
            value = image.get_array()[y, x]
            cell = image.cmap(float(image.norm(value)))
            assert contrast(mpl.colors.to_rgba(text.get_color()), cell) > 3, value


# How a person with deuteranopia or protanopia sees linear RGB: Machado, Oliveira and Fernandes (2009), severity 1.
BLIND = {
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "none": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
}


@pytest.mark.parametrize("vision", BLIND)
def test_colours_are_told_apart(vision: str) -> None:
    """No two lines of a figure have colours that are alike, whatever one's colour vision; nor the same marker."""
    assert len(set(plot.MARKERS)) == len(plot.COLOURS) == 8

    def seen(colour: str) -> tuple[float, float, float]:
        linear = torch.tensor([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb(colour)])
        r, g, b = (torch.tensor(BLIND[vision]) @ linear).clamp(0, 1).tolist()
        x, y, z = (
            0.4124 * r + 0.3576 * g + 0.1805 * b,
            0.2126 * r + 0.7152 * g + 0.0722 * b,
            0.0193 * r + 0.1192 * g + 0.9505 * b,
        )
        fx, fy, fz = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x / 0.9505, y, z / 1.089))
        return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)

    def rgb(colour: str) -> tuple[float, ...]:
        return mpl.colors.to_rgb(colour)

    colours = [*plot.COLOURS, plot.GREY]
    close = {(a, b): math.dist(seen(a), seen(b)) for at, a in enumerate(colours) for b in colours[at + 1 :]}
    assert min(close.values()) > 10, min(close, key=lambda pair: close[pair])


@pytest.mark.slow
def test_the_legend_names_each_model(drawn: Any) -> None:
    """Every model stands in a legend, and no two read alike."""
    arguments, _ = drawn("eight, long names", "")
    told = run_lines("inspect", *arguments, "--json").json
    figure = next(iter(figures(told)))
    labels = [text.get_text() for part in parts(figure) for legend in part.legends for text in legend.get_texts()]
    assert len(labels) == len(set(labels)) == 9


@pytest.mark.slow
@pytest.mark.parametrize("case", ["three", "one layer, two", pytest.param("towers, three", marks=pytest.mark.slow)])
def test_one_scale_for_all_cosines(case: str, drawn: Any) -> None:
    """Every cosine of a file is drawn on one scale, no finer than +-0.25; opposed signs on 0 to 100 %."""
    arguments, _ = drawn(case, "")
    told = run_lines("inspect", *arguments, "--json").json
    images = [
        image for figure in figures(told) for part in parts(figure) for axes in part.axes for image in axes.images
    ]
    scales = {(image.cmap.name, *image.get_clim()) for image in images}
    (cosine,) = (ends for name, *ends in scales if name == "PuOr_r")
    together = told["together"]
    found = [
        abs(row["cosine"][a][b])
        for row in (together, *together["layers"])
        for a in range(len(together["models"]))
        for b in range(a)
    ]
    assert cosine == pytest.approx([-max(0.25, *found), max(0.25, *found)])
    assert scales == {("PuOr_r", *cosine), ("Blues", 0, 100)}


@pytest.mark.slow
def test_more_than_eight(drawn: Any) -> None:
    """Of more than 8 fine-tunes strips of means are drawn; lines, before and after, and matrices of all."""
    arguments, _ = drawn("twenty", "")
    told = run_lines("inspect", *arguments, "--json").json
    lines, scaled, kinds, whole, strips = figures(told)
    assert len(lines.axes[0].lines) == 20
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines.axes[0].lines}
    assert len(styles) == 20
    marks = {(line.get_color(), line.get_marker(), line.get_fillstyle()) for line in kinds.axes[0].lines}
    assert len(marks) == 20
    for tune, before, after in zip(told["fine_tunes"], lines.axes[0].lines, scaled.axes[0].lines, strict=True):
        assert list(before.get_ydata()) == pytest.approx([layer["update_norm"] for layer in tune["layers"]])
        assert list(after.get_ydata()) == pytest.approx([layer["scaled_norm"] for layer in tune["layers"]])
    assert lines.axes[0].get_ylim() == scaled.axes[0].get_ylim()
    assert [image.get_array().shape for axes in whole.axes for image in axes.images] == [(20, 20)] * 2
    cosine, opposed = (image.get_array() for axes in strips.axes[:2] for image in axes.images)
    assert (cosine.shape, opposed.shape) == ((20, 8), (21, 8))
    layer = told["together"]["layers"][3]
    mean = sum(value for to, value in enumerate(layer["cosine"][5]) if to != 5) / 19
    assert cosine[5, 3] == pytest.approx(mean)
    assert opposed[20, 3] == pytest.approx(100 * layer["disagreement"])
    assert strips.axes[0].get_title() == "mean cosine"


def test_names_that_differ_at_the_end() -> None:
    """Of names that differ at their ends what is drawn differs, too."""
    names = series.short_names(
        [f"/models/Llama-3.1-8B-Instruct-finetuned-on-{task}" for task in ("code", "math", "law")]
    )
    assert len({name.partition(" ")[2] for name in names}) == 3
    assert all(len(name) <= series.LONGEST + 2 and "…" in name for name in names)
    assert series.short_names(["/a/short", "b/"]) == ["1 short", "2 b"]
    assert series.short_names(["x" * series.LONGEST]) == ["x" * series.LONGEST]


def test_every_layer_is_drawn(drawn: Any) -> None:
    """The bars and lines are the numbers of the report, one for each layer."""
    arguments, _ = drawn("one fine-tune", "")
    told = run_lines("inspect", *arguments, "--json").json
    line, bars, rounded, kinds = list(figures(told))
    (drawn_line,) = line.axes[0].lines
    norms = [layer["update_norm"] for layer in told["layers"]]
    assert list(drawn_line.get_ydata()) == pytest.approx(norms)
    heights = [patch.get_height() for patch in bars.axes[0].patches]
    assert heights == pytest.approx(norms + [layer["scaled_norm"] for layer in told["layers"]])
    (coefficients,) = line.axes[1].lines
    assert list(coefficients.get_ydata()) == pytest.approx([layer["coefficient"] for layer in told["layers"]])
    asked, realised = rounded.axes[0].lines
    assert list(asked.get_ydata()) == pytest.approx([layer["coefficient"] for layer in told["layers"]])
    assert list(realised.get_ydata()) == pytest.approx([layer["realised"] for layer in told["layers"]])
    shares = [patch.get_width() for patch in kinds.axes[0].patches]
    assert shares == pytest.approx([100 * kind["relative_norm"] for kind in told["kinds"]])
    assert [tick.get_text() for tick in kinds.axes[0].get_yticklabels()] == [kind["kind"] for kind in told["kinds"]]


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--alpha=-1", "--beta", "3"], ["--alpha", "0", "--beta", "0"], ["--gamma=-2"]])
def test_odd_coefficients(options: list[str], tmp_path: Path) -> None:
    """Negative coefficients, and none but zeros, are within what is drawn."""
    path = write_checkpoint(tmp_path / "m", decoder(4))
    told = run_lines("inspect", path, "--json", *options).json
    (figure,) = figures(told)
    right = figure.axes[1]
    low, high = right.get_ylim()
    assert low <= min(layer["coefficient"] for layer in told["layers"])
    assert high >= max(layer["coefficient"] for layer in told["layers"])
    assert low < high


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        *("one fine-tune", "towers, one", "one layer"),
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("one checkpoint", "one layer, two")),
    ],
)
def test_coefficients_are_seen(case: str, drawn: Any) -> None:
    """The line of the coefficients can be seen at every layer that has one."""
    arguments, _ = drawn(case, "")
    told = run_lines("inspect", *arguments, "--json").json
    figure = next(iter(figures(told)))

    def pixels() -> Any:
        figure.canvas.draw()
        return torch.from_numpy(np.asarray(figure.canvas.buffer_rgba()).copy()).int()

    figure.set_layout_engine("none")
    shown = pixels()
    lines = [line for axes in figure.axes for line in axes.lines if line.get_label() == "coefficient"]
    assert lines
    for line in lines:
        line.set_visible(False)
    differs = (shown - pixels()).abs().sum(-1) > 20
    for line in lines:
        for x, y in line.axes.transData.transform(line.get_xydata()):
            column, row = round(x), differs.shape[0] - round(y)
            assert differs[row - 5 : row + 6, column - 3 : column + 4].any(), (case, x, y)

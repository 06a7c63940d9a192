"""The page of `lines inspect --plot FILE.html`: the numbers of `--json`, whole without a script; and in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lines_cli.inspection import plot
from lines_cli.inspection.html import page
from support import browser
from support.files import write_checkpoint
from support.inspecting import llama, ok, told, tuned


def towers(seed: int = 0) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    depths = {"text_model": 12, "vision_model": 3}
    return {
        f"{tower}.encoder.layers.{i}.mlp.fc1.weight": torch.randn(6, 6, generator=made)
        for tower, layers in depths.items()
        for i in range(layers)
    }


def models(tmp: Path, tunes: int) -> list[object]:
    """Arguments that inspect fine-tunes of two stacks."""
    base = write_checkpoint(tmp / "base", towers())
    return [*(write_checkpoint(tmp / f"ft{at}", tuned(towers(), at)) for at in range(tunes)), "--base", base]


def titles(source: str, figure: str) -> list[list[str]]:
    """The lines of each place of a figure that says values."""
    (drawn,) = re.findall(rf"<figcaption>{re.escape(figure)}</figcaption>(.*?)</figure>", source, re.DOTALL)
    return [html.unescape(text).split("\n") for text in re.findall("<title>(.*?)</title>", drawn, re.DOTALL)]


# --- what stands in it ---


def test_figures_say_the_numbers(tmp_path: Path) -> None:
    """Without any script, each layer of a figure says the values of the report, of each fine-tune."""
    report = told(*models(tmp_path, 3))
    source = page(report)
    names = [f"{at} ft{at - 1}" for at in (1, 2, 3)]
    for key, title in (("update_norm", "Norm of the update"), ("scaled_norm", "The same after LiNeS")):
        for stack in ("text_model.encoder.layers", "vision_model.encoder.layers"):
            tunes = [[row for row in tune["layers"] if row["stack"] == stack] for tune in report["fine_tunes"]]
            expected = [
                [f"layer {at}", *(f"{name}: {rows[at][key]:.4g}" for name, rows in zip(names, tunes, strict=True))]
                for at in range(len(tunes[0]))
            ]
            assert titles(source, f"{title}: {stack}") == expected
    cosines = report["together"]["cosine"]
    said = dict(titles(source, "Cosine similarity of the updates"))
    assert said["1 ft0 and 3 ft2"] == f"cosine {cosines[0][2]:.3f}"
    assert len(said) == 6


def test_coefficients_as_asked_and_realised(tmp_path: Path) -> None:
    """For one fine-tune, and of an output, the page has the coefficients as asked and as rounding leaves them."""
    base = write_checkpoint(tmp_path / "base", {n: v.bfloat16() for n, v in llama().items()})
    ft = write_checkpoint(tmp_path / "ft", {n: v.bfloat16() for n, v in tuned(llama(), 1).items()})
    ok(ft, "--base", base, "--plot", tmp_path / "p.html")
    report = told(ft, "--base", base)
    found = titles((tmp_path / "p.html").read_text(), "Coefficients, forecast for bfloat16: model.layers")
    assert found == [
        [f"layer {at}", f"asked: {row['coefficient']:.4g}", f"realised: {row['realised']:.4g}"]
        for at, row in enumerate(report["layers"])
    ]


@pytest.mark.slow
def test_digests_of_an_output(outputs: Path, tmp_path: Path) -> None:
    """The page of an output has the digests of its record; and none is made up where nothing is recorded."""
    import yaml

    ok(outputs / "edit", "--plot", tmp_path / "p.html")
    source = (tmp_path / "p.html").read_text()
    record = yaml.safe_load((outputs / "edit" / "lines_recipe.yaml").read_text())
    digests = told(outputs / "edit")["digests"]
    assert digests["run"] == record["run"]
    assert {row["file"]: (row["bytes"], row["digest"]) for row in digests["written"]} == {
        name: (file["bytes"], file["digest"]) for name, file in record["files"].items()
    }
    assert [row["header"] for row in digests["read"]] == [file["header"] for file in record["inputs"].values()]
    for row in (*digests["read"], *digests["written"]):
        assert (row["digest"] or row["header"]) in source
    assert "digests" not in told(outputs / "base")
    assert "Digests" not in page(told(outputs / "base"))


HOSTILE = {
    "not a mapping": "a/model.safetensors: 7",
    "a list": "a/model.safetensors: [1, 2]",
    "markup": "'<script>alert(1)</script>': {bytes: 1, digest: '</td><script>x</script>', header: \"\\e[31m\"}",
    "other types": "a: {bytes: -1, digest: [1], header: {x: 1}}",
    "truth": "a: {bytes: true, digest: null}",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_record_of_a_stranger(what: str, tmp_path: Path) -> None:
    """Whatever a recipe records of its inputs, the page shows text, and JSON has texts, sizes or null."""
    path = write_checkpoint(tmp_path / "m", llama(2))
    (path / "lines_recipe.yaml").write_text(f"base_model: b\nmodels: [{{model: a}}]\ninputs:\n  {HOSTILE[what]}\n")
    ok(path, "--plot", tmp_path / "p.html")
    source = (tmp_path / "p.html").read_text()
    assert source.count("<script>") == 1
    assert "\x1b" not in source
    for row in told(path)["digests"]["read"]:
        assert row["bytes"] is None or (type(row["bytes"]) is int and row["bytes"] >= 0)
        assert all(row[key] is None or isinstance(row[key], str) for key in ("digest", "header"))


@pytest.mark.parametrize("extreme", [0.0, 5e-324, 1e-300, 1e150, 1.7e308])
def test_extreme_numbers(extreme: float, tmp_path: Path) -> None:
    """Numbers at the ends of float64 are drawn within the figure, or not at all."""
    report = told(*models(tmp_path, 2))
    for tune in report["fine_tunes"]:
        for row in (*tune["layers"], *tune["kinds"]):
            row |= {"update_norm": extreme, "scaled_norm": -extreme, "relative_norm": extreme}
    source = page(report)
    for path in re.findall(r' d="([^"]*)"', source):
        assert not re.search("nan|inf|e", path), path
    for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", source):
        assert -10 <= float(x) <= 450
        assert -10 <= float(y) <= 460


def test_the_package_holds_the_page_s_files() -> None:
    """What the page needs beside Python is said to be part of the package, all of it."""
    import lines_cli

    folder = Path(lines_cli.__file__).parent
    text = (folder.parent / "pyproject.toml").read_text()
    (said,) = re.findall(r"^lines_cli = (\[.*\])$", text, re.MULTILINE)
    others = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(json.loads(said)) == {name for name in others if "__pycache__" not in name and not name.endswith(".py")}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["html", "svg"])
def test_what_was_written_is_said(form: str, tmp_path: Path) -> None:
    """--plot names its file on stderr, unless --quiet; stdout has the report alone."""
    path, file = write_checkpoint(tmp_path / "m", llama(2)), tmp_path / f"p.{form}"
    ran = ok(path, "--plot", file, "--json")
    assert ran.err == f"wrote {file}\n"
    json.loads(ran.out)
    assert ok(path, "--plot", file, "--json", "--quiet").err == ""
    assert ok(path, "--json").err == ""


# --- colours ---


def palettes() -> list[dict[str, str]]:
    """The colours by name: light, dark as the system says, dark by the button."""
    style = (Path(plot.__file__).parent / "page.css").read_text()
    blocks = re.findall(r":root[^{]*\{([^}]*)\}", style)
    return [dict(re.findall(r"--(\w+): (#\w+);", block)) for block in blocks]


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2), 0 to 1."""
    short = colour[1:]
    parts = [int(part * (3 - len(short) // 3), 16) / 255 for part in re.findall("." * (len(short) // 3), short)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_both_themes_can_be_read() -> None:
    """Text stands out from what it lies on, lines from the paper; dark is the same however it is chosen."""
    light, by_system, by_button = palettes()
    assert by_system == by_button
    assert light.keys() == by_system.keys() > {f"c{at}" for at in range(8)}
    assert [light[f"c{at}"].upper() for at in range(6)] == list(plot.COLOURS[:6])  # as in the pictures
    for theme in (light, by_system):
        assert all(
            contrast(theme[text], theme[ground]) >= 4.5 for text in ("ink", "soft") for ground in ("paper", "row")
        )
        assert all(contrast(theme[f"c{at}"], theme["paper"]) >= 2 for at in range(8))
        assert len({theme[f"c{at}"] for at in range(8)}) == 8


# --- in a browser ---


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    program = browser.found()
    if program is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    try:
        started = browser.Browser(program).__enter__()
    except browser.NotStartedError as error:
        pytest.skip(f"{program} does not run here: {error}")
    yield started
    started.__exit__(None, None, None)


ROWS = """[...document.querySelectorAll('table')].map(t => [...t.rows].map(r => [...r.cells].filter(c => !c.matches(
  '.bar-cell')).map(c => ({text: c.textContent, value: c.dataset.value ?? null, shown: c.offsetParent !== null}))))"""


@pytest.fixture(scope="module")
def opened(chromium: browser.Browser, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Opens the page of three fine-tunes of two stacks: options -> the browser; and its report."""
    tmp = tmp_path_factory.mktemp("page")
    ran = ok(*models(tmp, 3), "--json", "--plot", tmp / "p.html")

    def get(**options: Any) -> browser.Browser:
        chromium.complaints.clear()
        chromium.open(tmp / "p.html", **{"width": 1366} | options)
        return chromium

    return get, ran.json


def table_of(at: browser.Browser, title: str) -> list[list[dict[str, Any]]]:
    """The cells of the table below a heading, its own first."""
    found = at.run("[...document.querySelectorAll('.table')].map(t => t.querySelector('h3')?.textContent ?? '')")
    rows: list[list[dict[str, Any]]] = at.run(ROWS)[found.index(title)]
    return rows


LAYERS = "update relative to the weights, text_model.encoder.layers"


@pytest.mark.slow
@pytest.mark.xdist_group("chromium")
class TestInABrowser:
    def test_it_says_what_json_says(self, opened: Any) -> None:
        """Each number of a table is, to the last bit, that of --json, and its text is that number."""
        get, report = opened
        at = get()
        _, *rows, total = table_of(at, LAYERS)
        assert len(rows) == 12
        for index, row in enumerate(rows):
            expected = [
                next(r for r in tune["layers"] if (r["stack"], r["index"]) == ("text_model.encoder.layers", index))
                for tune in report["fine_tunes"]
            ]
            coefficient = expected[0]["coefficient"]
            shares = [each["relative_norm"] for each in expected]
            assert [float(cell["value"]) for cell in row] == [index, coefficient, *shares]
            assert float(row[1]["text"]) == pytest.approx(coefficient, rel=1e-3)
            for cell, share in zip(row[2:], shares, strict=True):
                assert float(cell["text"].rstrip("%")) / 100 == pytest.approx(share, rel=1e-2)
        assert total[0]["text"] == "all"
        assert at.complaints == []

    def test_tables_sort(self, opened: Any) -> None:
        """By a click and by the keyboard, as numbers, down and back; and the row of all stays last."""
        get, _ = opened
        at = get()
        found = f"[...document.querySelectorAll('.table')].find(t => t.textContent.startsWith({json.dumps(LAYERS)}))"
        buttons = at.run(f"(t => {{ t.id = 'sorted'; return t.querySelectorAll('th button').length }})({found})")
        assert buttons == 5

        def column(cell: int) -> list[float]:
            return [float(row[cell]["value"]) for row in table_of(at, LAYERS)[1:-1]]

        as_it_was = column(2)
        at.click("#sorted th button", 2)
        assert column(2) == sorted(as_it_was) != as_it_was
        heading = "document.querySelectorAll('#sorted th')[2].getAttribute('aria-sort')"
        assert at.run(heading) == "ascending"
        at.press("Enter")
        assert column(2) == sorted(as_it_was, reverse=True)
        assert at.run(heading) == "descending"
        at.click("#sorted th button", 0)
        at.click("#sorted th button", 0)
        assert column(0) == list(range(11, -1, -1))  # as numbers: 11 before 9
        assert at.run(heading) == "none"
        at.click("#sorted th button", 0)
        assert column(2) == as_it_was
        assert table_of(at, LAYERS)[-1][0]["text"] == "all"
        assert at.complaints == []

    def test_numbers_sort_as_numbers(self, opened: Any) -> None:
        """Whatever they read: 432 B comes before 1.73 kB, and what has no number comes last, both ways."""
        get, _ = opened
        at = get()
        at.run("document.querySelector('.table').id = 'first'")
        read = "[...document.querySelectorAll('#first tbody tr')].map(r => r.cells[{}].textContent)"
        assert at.run(read.format(4)) == ["1.73 kB", "432 B"]
        at.click("#first th button", 4)
        assert at.run(read.format(4)) == ["432 B", "1.73 kB"]
        at.run("delete document.querySelectorAll('#first tbody tr')[0].cells[4].dataset.value")
        for _ in ("descending", "not sorted", "ascending"):
            at.click("#first th button", 4)
            assert at.run(read.format(4)) == ["1.73 kB", "432 B"]

    def test_fine_tunes_and_stacks_switch(self, opened: Any) -> None:
        """A box hides a fine-tune's lines, rows, columns and cells, or a stack's figures and tables; and shows them."""
        get, _ = opened
        at = get()
        seen = "[...document.querySelectorAll('{}')].filter(e => e.getClientRects().length).length"
        of_second, of_vision = '[data-model~="1"]', '[data-stack="1"]'
        before = {what: at.run(seen.format(what)) for what in (of_second, of_vision, '[data-model~="0"]', "figure")}
        assert all(before.values())
        at.click('input[data-switch="model"]', 1)
        assert at.run(seen.format(of_second)) == 0
        assert at.run(seen.format("figure")) == before["figure"]
        shown = [cell["shown"] for cell in table_of(at, LAYERS)[0]]
        assert shown == [True, True, True, False, True]
        at.hover("figure .hit", 3)
        lines = at.run("[...document.querySelectorAll('.say:not([hidden]) span')].map(s => s.textContent)")
        assert [line.split(":")[0] for line in lines] == ["layer 3", "1 ft0", "3 ft2"]
        at.click('input[data-switch="stack"]', 1)
        assert at.run(seen.format(of_vision)) == 0
        assert at.run(seen.format("figure")) < before["figure"]
        at.click('input[data-switch="model"]', 1)
        at.click('input[data-switch="stack"]', 1)
        assert {what: at.run(seen.format(what)) for what in before} == before
        assert at.complaints == []

    def test_figures_say_their_values(self, opened: Any) -> None:
        """Under the pointer, at a touch, and by the arrow keys: what the report says of the layer."""
        get, report = opened
        layers = [
            [row for row in tune["layers"] if row["stack"] == "text_model.encoder.layers"]
            for tune in report["fine_tunes"]
        ]
        said = "[...document.querySelectorAll('.say:not([hidden]) span')].map(s => s.textContent)"

        def expected(layer: int) -> list[str]:
            each = (f"{at} ft{at - 1}: {rows[layer]['update_norm']:.4g}" for at, rows in enumerate(layers, 1))
            return [f"layer {layer}", *each]

        at = get()
        assert at.run(said) == []
        at.hover("figure .hit", 5)
        assert at.run(said) == expected(5)
        at.run("document.querySelector('.plot').focus()")
        for key, layer in (("ArrowRight", 6), ("End", 11), ("ArrowRight", 11), ("ArrowLeft", 10), ("Home", 0)):
            at.press(key)
            assert at.run(said) == expected(layer), key
        at.press("Escape")
        assert at.run(said) == []
        assert at.complaints == []
        at = get(width=390)
        at.tap("figure .hit", 7)
        assert at.run(said) == expected(7)
        assert at.complaints == []

    @pytest.mark.parametrize("dark", [False, True])
    def test_light_and_dark(self, opened: Any, dark: bool) -> None:
        """As the system says, until the button is clicked; and paper is white."""
        get, _ = opened
        at = get(dark=dark)
        colour = "getComputedStyle(document.body).backgroundColor"
        light, black = "rgb(255, 255, 255)", "rgb(21, 23, 27)"
        assert at.run(colour) == (black if dark else light)
        at.click("#theme")
        assert at.run(colour) == (light if dark else black)
        at.call("Emulation.setEmulatedMedia", media="print", features=[])
        assert at.run(colour) == light
        assert at.complaints == []

    @pytest.mark.parametrize("width", [320, 390, 768, 1366])
    def test_nothing_sticks_out(self, opened: Any, width: int) -> None:
        """No page is wider than its window; wide tables scroll by themselves."""
        get, _ = opened
        at = get(width=width)
        assert at.run("document.documentElement.scrollWidth") <= width
        assert at.complaints == []

    @pytest.mark.parametrize("scripts", [True, False])
    def test_headings_on_every_sheet(self, chromium: browser.Browser, scripts: bool, tmp_path: Path) -> None:
        """A table that goes on behind a page break has its headings there again."""
        reader = shutil.which("pdftotext")
        if reader is None:
            pytest.skip("pdftotext is not installed (Debian: apt-get install poppler-utils)")
        base = write_checkpoint(tmp_path / "base", llama(100))
        ok(write_checkpoint(tmp_path / "ft", tuned(llama(100), 1)), "--base", base, "--plot", tmp_path / "p.html")
        chromium.open(tmp_path / "p.html", width=1366, scripts=scripts)
        chromium.pdf(tmp_path / "p.pdf")
        told = subprocess.run([reader, "-layout", tmp_path / "p.pdf", "-"], capture_output=True, text=True, check=True)
        sheets = [sheet.strip().splitlines()[0].split() for sheet in told.stdout.split("\f") if sheet.strip()]
        assert not [first for first in sheets if first[0].isdecimal()]
        assert ["layer", "update", "relative", "unchanged", "largest", "c", "scaled"] in sheets

    def test_names_are_whole_on_a_phone(self, chromium: browser.Browser, tmp_path: Path) -> None:
        """A name that fits beside numbers is not broken in its middle."""
        ok(write_checkpoint(tmp_path / "m", llama(3)), "--plot", tmp_path / "p.html")
        chromium.open(tmp_path / "p.html", width=390)
        lines = (
            "[...document.querySelectorAll('td')].map(cell => { const range = document.createRange();"
            "range.selectNodeContents(cell); return [cell.textContent, range.getClientRects().length]; })"
        )
        assert dict(chromium.run(lines))["model.layers"] == 1

    def test_without_javascript(self, opened: Any) -> None:
        """Tables, figures, and values on hover all stand there, and no control that does nothing."""
        get, _ = opened
        at = get(scripts=False)
        at.call("Emulation.setScriptExecutionDisabled", value=False)  # or this test could not ask, either
        assert at.run("document.querySelectorAll('button').length") == 0
        assert at.run("[...document.querySelectorAll('input')].filter(e => e.getClientRects().length).length") == 0
        assert at.run("document.querySelectorAll('.hit title').length") == at.run(
            "document.querySelectorAll('.hit').length"
        )
        assert [row[0]["text"] for row in table_of(at, LAYERS)[1:4]] == ["0", "1", "2"]
        assert at.run("[...document.querySelectorAll('figure')].every(f => f.getClientRects().length)")
        assert at.complaints == []

    @pytest.mark.parametrize("width", [320, 1366])
    def test_names_of_strangers(self, chromium: browser.Browser, width: int, tmp_path: Path) -> None:
        """Whatever tensors and stacks are called: nothing runs, sticks out, or is logged, and all is shown as text."""
        evil = ["<script>document.title=1</script>", "'\"><img src=x onerror=alert(1)>", "x" * 2000, "</title>", "a\nb"]
        tensors = {f"{name}.layers.{i}.w": torch.ones(2) * i for name in evil for i in range(3)}
        path = write_checkpoint(tmp_path / "m", tensors)
        ok(path, "--tensors", "--plot", tmp_path / "p.html")
        chromium.complaints.clear()
        chromium.open(tmp_path / "p.html", width=width)
        assert chromium.run("document.title") == str(path)
        assert chromium.run("document.documentElement.scrollWidth") <= width
        assert chromium.run("document.querySelectorAll('script, img').length") == 1
        assert f"{evil[0]}.layers" in chromium.run("document.querySelector('fieldset').textContent")
        chromium.hover(".hit")
        assert chromium.run("document.querySelector('.say:not([hidden]) span').textContent") == "layer 0"
        assert chromium.complaints == []

    def test_the_policy_holds(self, opened: Any, tmp_path: Path) -> None:
        """If markup of a stranger got through after all, it would neither run nor load anything."""
        get, _ = opened
        source = Path(get().run("decodeURI(location.pathname)")).read_text()
        evil = "<script>document.title = 'owned'</script><img src='https://127.0.0.1:9/x' onerror='document.title=1'>"
        (tmp_path / "evil.html").write_text(source.replace("<main>", f"<main>{evil}"))
        at = get()
        at.complaints.clear()
        at.open(tmp_path / "evil.html", width=1366)
        assert at.run("document.title") == "3 fine-tunes of " + at.run("document.querySelector('h1').textContent")[16:]
        assert at.run("document.querySelectorAll('th button').length") > 5  # the page's own script runs
        assert any("Content Security Policy" in complaint for complaint in at.complaints)

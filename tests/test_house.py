"""What is promised of the code itself: imports point down, dependencies stay where they belong, docs are fresh."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch

from support import crossed
from support.files import write_checkpoint
from support.run import run_lines

pytestmark = pytest.mark.some(1000)  # all of them: they are quick

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lines_cli"

# From the top down: a module may import from folders below its own, and from its own; never from one above.
FOLDERS = ["", *"cli sweeping api inspection engine plan recipe hub checkpoint storage methods scaling".split()]
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py" or path.parent.name == "methods"
}


def folder_of(module: str) -> str:
    """The folder that a module lies in; "" for those at the top."""
    return module if module in FOLDERS else module.rpartition(".")[0]


@cache
def parsed(path: Path) -> ast.Module:
    """A file's syntax, which nobody changes."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> set[str]:
    """Every module that a file imports at run time, wherever in it."""
    found: set[str] = set()
    left: list[ast.AST] = [parsed(path)]
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            left += node.orelse
            continue
        left += (child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def imported_from(module: str) -> set[str]:
    """The modules of the package that one imports."""
    below = {name.removeprefix("lines_cli.") for name in imports(MODULES[module]) if name.startswith("lines_cli.")}
    return below & MODULES.keys()


def test_no_test_imports_another() -> None:
    """What two test modules need lies in `tests/support/`; and the folders of the tests are those of the package."""
    paths = list((ROOT / "tests").rglob("*.py"))
    modules = {path.stem for path in paths if path.name.startswith("test_")} | {"conftest"}
    lines = {path.name: re.findall(r"^\s*(?:from|import)\b.*", path.read_text("utf-8"), re.MULTILINE) for path in paths}
    taken = {
        name: {word for line in found for word in re.findall(r"\w+", line)} & modules for name, found in lines.items()
    }
    assert not {name: of for name, of in taken.items() if of}
    folders = {path.parent.name for path in paths} - {"tests"}
    assert folders == set(FOLDERS[1:]) | {"support", "golden"}


@pytest.mark.parametrize("sizes", [[1], [3, 2], [4, 4, 5], [2, 3, 1, 4]], ids=str)
def test_what_stands_for_a_product_covers_it(sizes: list[int]) -> None:
    """Of a product of parameters the default suite has every pair of values, or every value."""

    def pairs(cases: Iterable[tuple[int, ...]]) -> set[tuple[tuple[int, int], ...]]:
        return {pair for case in cases for pair in combinations(enumerate(case), min(2, len(sizes)))}

    assert pairs(crossed.pairwise(sizes)) == pairs(product(*map(range, sizes)))
    turns = crossed.in_turn(sizes)
    assert len(turns) == max(sizes)
    assert [{case[at] for case in turns} for at in range(len(sizes))] == [set(range(size)) for size in sizes]


def test_every_folder_has_a_place() -> None:
    """A new folder is given its rank, and says in a line what it is."""
    assert {folder_of(module) for module in MODULES} == set(FOLDERS)
    for folder in FOLDERS[1:]:
        text = (PACKAGE / folder / "__init__.py").read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), f"{folder}/__init__.py does not say what the folder is"


def test_imports_point_down() -> None:
    """No module knows one in a folder above its own; all know the errors, the version, and what packages add."""
    rank = {module: FOLDERS.index(folder_of(module)) for module in MODULES}
    up = {
        f"{module} imports {name}"
        for module in MODULES
        for name in imported_from(module) - {"errors", "version", "installed"}
        if rank[name] < rank[module]
    }
    assert not up


def test_no_module_imports_itself_in_a_circle() -> None:
    """Within a folder, too, imports point one way."""
    above: list[str] = []

    def visit(module: str, seen: set[str]) -> None:
        assert module not in above, f"{' -> '.join([*above, module])}"
        if module in seen:
            return
        above.append(module)
        for name in sorted(imported_from(module) - {module}):
            visit(name, seen)
        above.pop()
        seen.add(module)

    seen: set[str] = set()
    for module in sorted(MODULES):
        visit(module, seen)


@pytest.mark.parametrize(
    ("dependency", "homes"),
    [
        ("rich", {"cli.console"}),
        ("matplotlib", {"inspection.plot"}),
        ("typer", {"cli.app", "cli.options", "cli.parser"}),
        ("huggingface_hub", {"hub.client", "hub.download", "hub.heads", "hub.upload"}),
        ("torch", {"api.in_memory", "inspection.compare", "scaling.spectra", "sweeping.bench", "sweeping.live"}),
        ("pydantic", {"recipe.schema", "recipe.validate"}),
        (
            "yaml",
            {"checkpoint.model_card", "inspection.html", "recipe.plain_yaml", "recipe.yaml_file", "sweeping.config"},
        ),
        ("regex", {"scaling.by_hand"}),
        ("safetensors", {"checkpoint.crosscheck"}),
        ("ray", {"api.on_ray"}),
        ("obstore", {"storage.object_store"}),
        ("numba", {"methods.kernels"}),
        ("numpy", {"methods.kernels"}),
    ],
)
def test_each_dependency_has_one_home(dependency: str, homes: set[str]) -> None:
    """Of what is imported from outside, each package is known to few modules (torch to engine and methods)."""
    users = {module for module, path in MODULES.items() if any(n.split(".")[0] == dependency for n in imports(path))}
    users -= {module for module in users if module.startswith(("engine.", "methods.")) and dependency == "torch"}
    assert users == homes


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["edit", "--help"],
        ["merge", "--help"],
        ["inspect", "--help"],
        ["verify", "--help"],
        ["push", "--help"],
        ["--version"],
    ],
)
def test_help_loads_no_torch(arguments: list[str]) -> None:
    """`lines --help` answers at once: it loads neither torch nor anything else that is slow."""
    program = (
        "import sys\n"
        "from lines_cli.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert run.stdout
    assert not {"torch", "numpy", "numba", "huggingface_hub", "yaml", "regex", "rich"} & set(run.stderr.split())


def from_docs(name: str) -> Any:
    """A module that lies in docs/."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        return import_module(name)
    finally:
        sys.path.remove(str(ROOT / "docs"))


@pytest.mark.slow
def test_the_references_are_fresh() -> None:
    """docs/cli.md says what --help says, docs/merge-methods.md what the table says, README.md and docs/tour.md what
    their commands print; `make docs` writes them anew.
    """
    generate = from_docs("generate")
    for page, text in generate.PAGES.items():
        assert page.read_text(encoding="utf-8") == text()
    assert all(f"lines {name}" in (ROOT / "README.md").read_text(encoding="utf-8") for name in generate.app_commands())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "shown"),
    [
        ("$ lines edit base ft -o base\n", "ended with 6"),
        ("$ lines edit base ft -o base\nold\n$ echo $?\n", "would replace an input, base\nhint"),
        ("$ echo a b c; echo 2; echo 3; echo 4\n...\n2\nx\n...\n", "...\n2\n3\n...\n```"),
        ("$ echo a b c; echo 2\na b x\n...\n", "echo 2\na b c\n...\n```"),
        ("$ echo 1; echo 2\n...\nold\n", "no line begins with 'old' now"),
        ("$ rm nothing\n", "ended with 1"),
    ],
)
def test_what_a_page_shows_is_run(block: str, shown: str, tmp_path: Path) -> None:
    """Beneath a command stands what it prints, or the part that stood there; what fails or is gone is an error."""
    rerun = from_docs("rerun").rerun
    (tmp_path / "page.md").write_text(f"Before.\n\n```console\n{block}```\n\nBehind.\n", encoding="utf-8")
    if re.match("ended|no line", shown):
        with pytest.raises(RuntimeError, match=re.escape(shown)):
            rerun(tmp_path / "page.md")
    else:
        text = rerun(tmp_path / "page.md")
        assert shown in text
        assert text.startswith("Before.")
        assert text.endswith("Behind.\n")


@pytest.mark.slow
def test_figures_are_the_demo_s_and_the_cases() -> None:
    """README's picture is the demo's as it was drawn, and pages count as many cases of depth as there are."""
    import yaml

    readme, depth = (ROOT / name for name in ("README.md", "docs/finding-depth.md"))
    cases = [
        yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / "tests/scaling/depth_cases").glob("*")
    ]
    counts = [re.findall(r"(\d+)\s+models and name", page.read_text(encoding="utf-8")) for page in (readme, depth)]
    assert counts == [[str(sum(map(len, cases)))]] * 2
    curves = re.findall(r"(?:task|before) ((?:[\d.]+(?:, )?){3})", (ROOT / "docs" / "demo.svg").read_text("utf-8"))
    (task, known) = ([float(value) for value in curve.split(", ")] for curve in curves)
    assert 0.75 < (known[2] - known[1]) / (known[0] - known[1]) < 0.85, "four fifths came back"
    assert 0.28 < (task[1] - task[2]) / (task[1] - task[0]) < 0.38, "a third was lost"


def anchors(page: Path) -> set[str]:
    """What `#...` may name in a page: its headings, as GitHub spells them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_pages_link_to_what_exists() -> None:
    """No link between the project's own pages is broken, and each anchor is a heading."""
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / ".github").rglob("*.md")]:
        for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name} links to {path}"
            assert not anchor or anchor in anchors(target), f"{page.name} links to {path}#{anchor}"


def test_nothing_unpublished_is_to_be_installed() -> None:
    """No page and no message says to install this package by its name: none is published, and anybody could take it."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *PACKAGE.rglob("*.py"), *(ROOT / "demo").rglob("*.py")]
    advice = re.compile(r"(?:pip|pipx|uv|uvx)\s[^\n`]*\blines[-_]cli\b")
    assert not [page.name for page in pages if advice.search(page.read_text(encoding="utf-8"))]
    assert advice.search('pip install "lines-cli[plot]"')


def test_the_citation_is_of_this_version() -> None:
    """CITATION.cff names the version that `lines --version` prints."""
    import yaml

    import lines_cli

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == lines_cli.__version__


@pytest.mark.slow
def test_json_is_documented(tmp_path: Path) -> None:
    """docs/json.md names every key that --json prints, and no other, each command's in its own section."""
    for side in ("base", "ft"):
        write_checkpoint(tmp_path / side, {f"h.{i}.w": torch.ones(2) for i in range(2)})
    arguments = ["edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out", "--json"]
    printed = run_lines(*arguments, "--dry-run").json.keys() | run_lines(*arguments).json.keys()
    _, making, adapting, verifying, pushing, _ = (ROOT / "docs" / "json.md").read_text(encoding="utf-8").split("\n## ")
    keys = re.compile(r"^\| `(\w+)`", re.MULTILINE)
    assert set(keys.findall(making)) == printed
    assert set(keys.findall(pushing)) == {"schema", "lines", "dry_run", "output", "pushed"}  # tests/hub runs it
    told = run_lines("verify", tmp_path / "out", "--json").json
    assert set(keys.findall(verifying)) == told.keys()
    sides = {side: {f"h.{i}.w.weight": torch.ones(2, 3) * n for i in range(2)} for n, side in enumerate(("b", "f"))}
    b, f = (write_checkpoint(tmp_path / side, tensors) for side, tensors in sides.items())
    arguments = ["extract", f, "--base", b, "--rank", 1, "-o", tmp_path / "adapter", "--json"]
    printed = run_lines(*arguments, "--dry-run").json.keys() | run_lines(*arguments).json.keys()
    assert set(keys.findall(adapting)) == printed
    assert all(re.search(rf"\b{key}\b", verifying) for name in ("inputs", "files") for key in told[name][0])


def test_the_python_api_is_what_it_is() -> None:
    """Every public name is the same thing each time it is asked for, and no module stands in its way."""
    import types

    import lines_cli

    for name in lines_cli.__all__:
        assert getattr(lines_cli, name) is getattr(lines_cli, name)
        assert not isinstance(getattr(lines_cli, name), types.ModuleType)


# Names of methods' parameters that mean something else where they stand.
OTHER_MEANINGS = {
    "api.in_memory": {"task_arithmetic"},  # which is the default
    "scaling.find_depth": {"weight"},  # the last part of tensor names
    "plan.same_names": {"weight"},
    "inspection.kinds": {"weight", "scale"},
    "plan.tied_weights": {"weight"},
    "checkpoint.contents": {"weight"},
    "plan.extraction": {"weight"},
    "recipe.validate": {"rank"},
    "checkpoint.quantised": {"scale", "weight"},
    "plan.fp8": {"scale"},
    "checkpoint.adapter": {"weight", "t"},  # a factor of LoHa
    "engine.formulas": {"t"},
    "engine.adapter_norms": {"t"},
    "inspection.adapters": {"weight", "scale"},
    "checkpoint.adapter_names": {"weight"},
    "checkpoint.adapter_config": {"r"},  # PEFT's word for a rank
    "checkpoint.adapter_output": {"r"},
    "plan.adapted": {"weight"},
    "recipe.yaml_file": {"weight"},
    "plan.weights": {"weight"},  # the parameter for which a rule may stand
    "plan.flux_names": {"weight"},
    "sweeping.config": {"seed"},  # of a search, and of repeated evaluations
    "sweeping.live": {"seed"},
    "sweeping.store": {"seed"},
    "inspection.report": {"lambda"},  # a key of the report
    "inspection.tables": {"lambda", "scale"},
    "recipe.schema": {"task_arithmetic"},  # what a recipe is that says no method
}
OF_THE_SCALING = {"alpha", "gamma", "linear"}  # keys of `lines:`, and a schedule
SAID_OF_METHODS = {
    "about", "chosen", "counting", "counts_by", "elect", "fused", "ignored", "keywords", "merge", "models", "needs",
    "given_base", "norm_of_kept", "one_is_itself", "parameters", "plain_sum", "review", "scale", "scale_of",
    "sees", "sees_whole", "may_be_a_sum", "shares", "space_for", "sparsifier", "sums", "takes", "temporaries", "wrong",
}  # fmt: skip


def test_methods_alone_know_methods() -> None:
    """No other module names a method, or a parameter of one; and of what a method says none asks for what is private
    to the package.
    """
    from lines_cli.methods import METHODS, Method

    names = {name for method in METHODS.values() for name in method.parameters} | METHODS.keys()
    wrong: list[tuple[str, set[str]]] = []
    for module, path in MODULES.items():
        if module.startswith("methods"):
            continue
        texts, asked = set(), set()
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
            elif isinstance(node, ast.Attribute) and "method" in (vars(node.value).get(key) for key in ("id", "attr")):
                asked.add(node.attr)
        wrong.append((module, (texts & names) - OF_THE_SCALING - OTHER_MEANINGS.get(module, set())))
        wrong.append((module, (asked & set(dir(Method))) - SAID_OF_METHODS))
    assert not [(module, found) for module, found in wrong if found]


def test_the_architecture_page_names_every_module() -> None:
    """docs/architecture.md has a row for each module, and none for what is not there."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set()
    for folder, body in re.findall(r"^### `lines_cli/([a-z]*)/?`.*?\n(.*?)(?=^##)", page, re.MULTILINE | re.DOTALL):
        for row in re.findall(r"^\| (`.*?) \|", body, re.MULTILINE):
            named |= {".".join(filter(None, (folder, module))) for module in re.findall(r"`(\w+)`", row)}
    assert named - {"__init__", "methods.__init__"} == MODULES.keys() - {"methods"}

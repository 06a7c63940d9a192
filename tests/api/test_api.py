"""`lines.edit`, `lines.merge` and `lines.inspect` are the commands; what is computed in memory is what files hold."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lines_cli as lines
from golden.recipes import CASES, OF_MODELS, Case, inputs, llama, llama_config, model, write_inputs
from lines_cli import errors
from lines_cli.api import arguments
from lines_cli.checkpoint import crosscheck
from lines_cli.cli import edit, extract, merge, push, sweep
from lines_cli.cli import inspect as inspect_command
from lines_cli.errors import LinesError, OutputError
from lines_cli.recipe.schema import Scaling
from support.files import snapshot, write_checkpoint
from support.run import run_lines

ROOT = Path(__file__).parents[2]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power failure would leave is not asked here."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs of the golden recipes."""
    made = tmp_path_factory.mktemp("inputs")
    write_inputs(made)
    return made


RECIPE = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "ft"}, {"model": "ft2", "parameters": {"weight": 0.5}}],
    "parameters": {"density": 0.4},
    "lines": {"alpha": "auto", "beta": 0.5},
}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`base`, `ft`, `ft2` and `merge.yaml`, in the current folder."""
    shapes, config = llama(3, 8, 20, 12), llama_config(3, 20)
    base = model("api/base", shapes)
    write_checkpoint(tmp_path / "base", base, config=config)
    for name in ("ft", "ft2"):
        write_checkpoint(tmp_path / name, model(f"api/{name}", shapes, base=base), config=config, shards=2)
    (tmp_path / "merge.yaml").write_text(json.dumps(RECIPE), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- one call each ---


ON_CONSOLES = {"json", "quiet", "full", "log_json"}
"""Options that say what is shown, and how."""
OF_ADAPTERS = {"adapter", "base_of_adapter", "num_layers"}
ON_THE_HUB = {"push_to", "private", "revision", "cache"}
OF_FILES = {"output", "variant", "component", "max_shard_size", "force", "resume", "verify", "verify_inputs", "dry_run"}
OF_FILES |= ON_THE_HUB | {"on"}


def keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """Its parameters and their defaults."""
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize(
    ("function", "command"),
    [
        (lines.edit, edit.edit),
        (lines.merge, merge.merge),
        (lines.extract, extract.extract),
        (lines.inspect, inspect_command.inspect),
        (lines.push, push.push),
    ],
)
def test_keywords_are_the_options(function: Callable[..., Any], command: Callable[..., None]) -> None:
    """Name for name, default for default; beside them there is only `track`. What `edit` has for adapters is
    `edit_adapter`'s.
    """
    own, options = keywords(function), keywords(command)
    assert own.pop("track") is None
    wanted = {name: default for name, default in options.items() if name not in ON_CONSOLES}
    if function is lines.edit:
        wanted = {name: default for name, default in wanted.items() if name not in OF_ADAPTERS}
        own |= {"base": None, "ft": None}  # which the command needs where there is no adapter
    assert own == wanted


def test_keywords_of_a_sweep_are_the_options() -> None:
    """Beside them there is what gets the lines that the command prints."""
    own = keywords(lines.sweep)
    assert own.pop("say") is None
    assert own == {name: default for name, default in keywords(sweep.sweep).items() if name not in ON_CONSOLES}


def test_keywords_of_an_adapter_are_those_of_an_edit() -> None:
    """But for those that speak of whole models."""
    own, options = keywords(lines.edit_adapter), keywords(lines.edit)
    of_whole_models = {"ft", "prefix", "missing", "missing_in_blocks", "resize", "rounding", "rounding_seed"}
    of_whole_models |= {"max_shard_size", "component", "on"}
    assert own.keys() - {"adapter", "num_layers"} == options.keys() - of_whole_models
    assert all(own[name] == options[name] for name in own.keys() & options.keys() - {"base"})


def test_keywords_in_memory_are_those_of_an_edit() -> None:
    """But for those that speak of files; and `config`, which a folder would hold."""
    options = {name: default for name, default in keywords(lines.edit).items() if name not in OF_FILES}
    own = keywords(lines.edit_state_dict)
    assert own.pop("config") is None
    assert own == options
    scaling = keywords(lines.coefficients)
    assert scaling.keys() - {"names", "config"} == {*Scaling.model_fields, "stack"} - {"stacks"}


def test_a_merge_in_memory_takes_what_a_recipe_takes() -> None:
    """Every key of a recipe that does not speak of files is a keyword, under its own name or a plainer one."""
    renamed = {"merge_method": "method", "base_model": "base"}
    files = {
        "slices",
        "tokenizer_source",
        "chat_template",
        "max_shard_size",
        "output",
        "run",
        "inputs",
        "files",
        "card",
        "notes",
        "layers",
    }
    files |= {"tokenizer", "variant", "components", "as_adapter", "num_layers", "rank", "energy", "save_rest"}
    keys = {renamed.get(key, key) for key in lines.Recipe.model_fields.keys() - files}
    resources = {"workers", "device", "gpu_memory", "track"}
    assert keywords(lines.merge_state_dicts).keys() == keys | resources | {"config", "model_parameters"}


def alike(value: Any) -> Any:
    """A summary but for how long it took."""
    return {key: inner for key, inner in json.loads(json.dumps(value)).items() if key != "seconds"}


def in_turn(command: Callable[[], Any], call: Callable[[], Any]) -> tuple[Any, Any]:
    """What the command prints as JSON, and what the call returns, into the same destination."""
    ran = command()
    assert ran.code == 0, ran.err
    written = snapshot(Path("out")) if Path("out").exists() else {}
    for path in sorted(Path("out").rglob("*"), reverse=True):
        path.unlink()
    if Path("out").exists():
        Path("out").rmdir()
    returned = call()
    assert (snapshot(Path("out")) if Path("out").exists() else {}) == written
    return alike(ran.json), alike(returned)


EDITS: list[tuple[list[str], dict[str, Any]]] = [
    ([], {}),
    (["--dry-run"], {"dry_run": True}),
    (
        ["--alpha=0.3", "--beta=0.2", "--gamma=0.9", "--outside=position", "--verify", "--verify-inputs"],
        {"alpha": 0.3, "beta": 0.2, "gamma": 0.9, "outside": "position", "verify": True, "verify_inputs": True},
    ),
    (
        ["--schedule=0.1,0.6,1", "--filter=norm=keep", "--filter=lm_head=0.5", "--dtype=float32", "--workers=1"],
        {"schedule": [0.1, 0.6, 1], "filter": {"norm": "keep", "lm_head": 0.5}, "dtype": "float32", "workers": 1},
    ),
    (
        ["--stack=layers=0.2,0.5", "--max-shard-size=1KB", "--device=cpu"],
        {"stack": ["layers=0.2,0.5"], "max_shard_size": 1000, "device": "cpu"},
    ),
    (["--layers=layers.(?P<index>\\d+)."], {"layers": "layers.(?P<index>\\d+)."}),
]


@pytest.mark.parametrize(("options", "said"), EDITS)
def test_an_edit_is_the_command(options: list[str], said: dict[str, Any], models: Path) -> None:
    """The same files, and what `--json` prints; a path may be a `Path`."""
    printed, returned = in_turn(
        lambda: run_lines("edit", "base", "ft", "-o", "out", "--json", *options),
        lambda: lines.edit("base", Path("ft"), "out", **said),
    )
    assert returned == printed


@pytest.mark.parametrize(
    ("options", "said"), [([], {}), (["--set", "lines.beta=0.25"], {"sets": {"lines.beta": 0.25}})]
)
def test_a_merge_is_the_command(options: list[str], said: dict[str, Any], models: Path) -> None:
    """The recipe is a file, or a mapping whose paths count from the current folder."""
    for config in ("merge.yaml", Path("merge.yaml"), {**RECIPE, "base_model": Path("base")}):
        printed, returned = in_turn(
            lambda: run_lines("merge", "--config", "merge.yaml", "-o", "out", "--json", *options),
            lambda config=config: lines.merge(config, "out", **said),
        )
        assert returned == printed
        for path in Path("out").iterdir():
            path.unlink()
        Path("out").rmdir()


@pytest.mark.slow
def test_a_recipe_names_its_output(models: Path) -> None:
    """As in YAML; a `Recipe` that is one already is taken as it is, and cannot be overruled."""
    told = lines.merge({**RECIPE, "output": "out"})
    assert Path(told["output"]).is_dir()
    recipe = lines.load_recipe(Path("merge.yaml"))
    assert lines.merge(recipe, "again", sets=None)["stacks"] == told["stacks"]
    with pytest.raises(LinesError, match="this is a Recipe already"):
        lines.merge(recipe, "more", sets={"lines.beta": 0.1})
    with pytest.raises(LinesError, match="the recipe names no output"):
        lines.merge(RECIPE)


def test_finished_before(models: Path) -> None:
    """What `resume` finds finished is not made again, and the summary says so."""
    lines.edit("base", "ft", "out")
    told = lines.edit("base", "ft", "out", resume=True)
    assert told["done_before"]
    assert alike(told) == alike(run_lines("edit", "base", "ft", "-o", "out", "--resume", "--json").json)
    assert not lines.edit("base", "ft", "out", force=True)["done_before"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["ft"], {"checkpoints": "ft"}),
        (["ft", "--tensors", "--alpha=0.4"], {"checkpoints": Path("ft"), "tensors": True, "alpha": 0.4}),
        (["ft", "--base", "base"], {"checkpoints": ["ft"], "base": "base"}),
        (["ft", "ft2", "--base", "base", "--check"], {"checkpoints": ["ft", "ft2"], "base": "base", "check": True}),
        (["--config", "merge.yaml"], {"config": RECIPE}),
    ],
)
def test_an_inspection_is_the_command(options: list[str], said: dict[str, Any], models: Path) -> None:
    """Report for report."""
    printed = run_lines("inspect", *options, "--json").out
    assert alike(lines.inspect(**said)) == alike(json.loads(printed))


def test_check_raises_and_keeps_the_report(models: Path) -> None:
    """A notebook wants both: the message of the command, and what it rests on."""
    write_checkpoint(models / "zeros", {f"layers.{i}.w": torch.zeros(3, 3) for i in range(2)})
    with pytest.raises(errors.DataError, match="--check found") as raised:
        lines.inspect("zeros", check=True)
    assert raised.value.report is not None
    assert lines.problems(raised.value.report)


@pytest.mark.slow
def test_an_inspection_is_drawn(models: Path) -> None:
    """`plot` as the option."""
    lines.inspect("ft", base="base", plot=models / "drawn.svg")
    assert (models / "drawn.svg").read_text(encoding="utf-8").startswith("<?xml")


@pytest.mark.slow
def test_home_is_expanded(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python expands no `~`, nor does a shell inside a string."""
    monkeypatch.setenv("HOME", str(models))
    monkeypatch.chdir("/")
    assert lines.edit("~/base", Path("~/ft"), Path("~/out"))["output"] == str(models / "out")
    assert (models / "out" / "model.safetensors").is_file()
    assert lines.merge("~/merge.yaml", "~/merged")["output"] == str(models / "merged")
    assert lines.coefficients("~/ft") == lines.coefficients(models / "ft")


def test_nothing_is_printed(models: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Not even of what an earlier run left, or of the Hub's client."""
    lines.edit("base", "ft", "out")
    lines.merge("merge.yaml", "merged", dry_run=True)
    lines.inspect("ft", base="base")
    with pytest.raises(LinesError):
        lines.edit("base", "ft", "out")
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_progress(models: Path) -> None:
    """`track` sees every pass: its title, its total, and as many bytes."""
    seen: dict[str, list[int]] = {}

    def track(title: str, total: int, done: Any) -> Iterator[int]:
        seen[title] = [total, 0]
        for nbytes in done:
            seen[title][1] += nbytes
            yield nbytes

    lines.merge("merge.yaml", "out", track=track)
    lines.inspect("ft", base="base", track=track)
    tensors = [load_all(models / name) for name in ("base", "ft")]
    lines.edit_state_dict(*tensors, track=track)
    assert {title.partition(" ")[0] for title in seen} == {"measuring", "writing", "comparing", "computing"}
    assert all(total == done for total, done in seen.values())


def load_all(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file or a folder."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--alpha=inf"], {"alpha": float("inf")}),
        (["--stack=nowhere=keep"], {"stack": {"nowhere": "keep"}}),
        (["--stack=layers"], {"stack": ["layers"]}),
        (["--gpu-memory=much"], {"gpu_memory": "much"}),
        (["--device=abacus"], {"device": "abacus"}),
        (["--filter=nothing=1"], {"filter": {"nothing": 1}}),
        (["--max-shard-size=0"], {"max_shard_size": "0"}),
        (["--layers=("], {"layers": "("}),
    ],
)
def test_refusals_are_the_commands(options: list[str], said: dict[str, Any], models: Path) -> None:
    """The same messages, hints and kinds."""
    ran = run_lines("edit", "base", "ft", "-o", "out", *options)
    with pytest.raises(LinesError) as raised:
        lines.edit("base", "ft", "out", **said)
    assert raised.value.exit_code == ran.code
    assert raised.value.message.split() == ran.err.removeprefix("error: ").partition("\nhint:")[0].split()
    assert not (models / "out").exists()


@pytest.mark.parametrize(
    "call",
    ["edit", "merge", "inspect", "coefficients('ft')", "edit('base', 'ft', 'out', dry_run=True)", "inspect('ft')"],
)
@pytest.mark.slow
def test_headers_load_no_torch(call: str, models: Path) -> None:
    """Nor does importing `lines_cli`, or asking for a function, load anything else that is slow."""
    program = f"import sys, lines_cli\nlines_cli.{call}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {"torch", "numpy", "rich", "typer"} | (set() if "(" in call else {"yaml", "pydantic", "huggingface_hub"})
    assert not loaded & set(run.stdout.split())


# --- what safetensors reads ---


def test_a_header_that_says_something_else_is_caught(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is published; the message names the file, the tensor and both sides."""
    from lines_cli.storage.files import NewFile

    write = NewFile.write

    def wrong(self: NewFile, view: memoryview, offset: int) -> None:
        content = bytes(view)
        shape = b'"lm_head.weight":{"dtype":"BF16","shape":[20,8]'
        if offset == 0:
            assert shape in content
            content = content.replace(shape, shape.replace(b"[20,8]", b"[8,20]"))
        write(self, memoryview(bytearray(content)), offset)

    monkeypatch.setattr(NewFile, "write", wrong)
    with pytest.raises(OutputError) as raised:
        lines.edit("base", "ft", "out")
    assert "out: model.safetensors: the safetensors package does not read what was planned, in 1 tensor" in str(
        raised.value
    )
    assert "lm_head.weight is BF16 [8, 20] there, and BF16 [20, 8] in the plan" in str(raised.value)
    assert not (models / "out").exists()


def test_a_file_that_is_none_is_caught(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the package cannot open is not published, either."""
    from lines_cli.storage.files import NewFile

    write = NewFile.write

    def wrong(self: NewFile, view: memoryview, offset: int) -> None:
        content = bytearray(view)
        content[:1] = b"\xff" if offset == 0 else content[:1]
        write(self, memoryview(content), offset)

    monkeypatch.setattr(NewFile, "write", wrong)
    with pytest.raises(OutputError, match=r"model\.safetensors: the safetensors package cannot open it"):
        lines.edit("base", "ft", "out")
    assert not (models / "out").exists()


def test_every_weight_file_is_opened(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard, before it is published, and a lone file."""
    opened = []
    read = crosscheck._read

    def noted(path: Path) -> Any:
        assert not (models / path.name).exists()
        opened.append(path.name)
        return read(path)

    monkeypatch.setattr(crosscheck, "_read", noted)
    told = lines.edit("base", "ft", "out", max_shard_size=1000)
    assert sorted(opened) == sorted(told["files"])
    assert len(opened) > 1
    lines.edit("base", "ft", "one.safetensors")
    assert opened[-1] == "one.safetensors"


# --- coefficients ---


@pytest.mark.slow
def test_coefficients_are_those_of_the_plan(models: Path) -> None:
    """Of a checkpoint, of its names, of its tensors: what `--dry-run` lists."""
    for said in ({}, {"alpha": 0.3, "beta": 0.1, "gamma": 2.0}, {"filter": {"norm": 0.7}, "outside": "position"}):
        planned = lines.edit("base", "ft", "out", dry_run=True, **said)["map"]
        expected = {tensor["name"]: tensor["coefficient"] for tensor in planned}
        tensors = load_all(models / "ft")
        for names in ("ft", Path("ft"), tensors, list(tensors), iter(tensors)):
            assert lines.coefficients(names, **said) == expected
        assert list(lines.coefficients(tensors)) == list(tensors)


def test_coefficients_by_position() -> None:
    """alpha and beta come first; the formula is the paper's."""
    found = lines.coefficients([f"h.{layer}.w" for layer in range(5)] + ["wte.weight"], 0.2, 0.4)
    assert [found[f"h.{layer}.w"] for layer in range(5)] == [0.2 + 0.4 * layer / 4 for layer in range(4)] + [0.2 + 0.4]
    assert found["wte.weight"] == 0.2


def test_coefficients_of_a_tied_head() -> None:
    """With a config that ties it, the head has the embedding's; behind the blocks it would have the last one."""
    names = ["model.embed_tokens.weight", "model.layers.0.w", "model.layers.1.w", "lm_head.weight"]
    free = lines.coefficients(names, outside="position")
    tied = lines.coefficients(names, outside="position", config={"tie_word_embeddings": True})
    assert (free["lm_head.weight"], tied["lm_head.weight"]) == (1.0, 0.1)


def test_coefficients_where_depth_is_unknown() -> None:
    """An error, as for an edit; `layers` says it."""
    names = ["a.left0.w", "a.left1.w"]
    with pytest.raises(errors.DepthError):
        lines.coefficients(names)
    assert lines.coefficients(names, layers=r"left(?P<index>\d)") == {"a.left0.w": 0.1, "a.left1.w": 1.0}


# --- in memory ---


@dataclass
class Module:
    """What has tensors and a config, as models of transformers do."""

    tensors: Mapping[str, torch.Tensor]
    config: Any = None

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        return self.tensors


AS_STORED: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor


def scattered(tensor: torch.Tensor) -> torch.Tensor:
    """The same entries in another order in memory, with others between them."""
    if tensor.dim() == 0:
        return torch.stack([tensor, tensor])[1]
    wide = torch.stack([tensor, tensor.roll(1, 0)], -1).transpose(0, -2).contiguous().transpose(0, -2)[..., 0]
    assert wide.is_contiguous() is (wide.numel() < 2)
    return wide


def in_memory(case: Case, laid_out: Callable[[torch.Tensor], torch.Tensor] = AS_STORED) -> dict[str, torch.Tensor]:
    """A golden recipe on tensors."""
    held: dict[str, Module] = {}

    def of(name: str) -> Module:
        if name not in held:
            stored = inputs()[name]
            config = None if name.endswith(".safetensors") else stored.config
            held[name] = Module({key: laid_out(tensor) for key, tensor in stored.tensors.items()}, config)
        return held[name]

    said: dict[str, Any] = {key: value for key, value in case.recipe.items() if key not in ELSEWHERE}
    if case.edit and "like" not in said:
        base, ft = of(said.pop("base")), of(said.pop("ft"))
        return lines.edit_state_dict(base, ft, stack=said.pop("stacks", None), **said)
    if case.edit:
        scaling = {"alpha": said.pop("alpha"), "beta": 1.0}
        return lines.merge_state_dicts(of(said.pop("base")), [of(said.pop("ft"))], lines=scaling, **said)
    sources = said.pop("models")
    said["method"] = said.pop("merge_method")
    if "out_dtype" in said:
        said["dtype"] = said.pop("out_dtype")
    base_model = said.pop("base_model", None)
    return lines.merge_state_dicts(
        None if base_model is None else of(base_model),
        [of(source["model"]) for source in sources],
        model_parameters=[source.get("parameters") for source in sources],
        **said,
    )


ELSEWHERE = {"tokenizer_source", "max_shard_size"}


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if at % 2 else ()) for at, name in enumerate(OF_MODELS)]
)
@pytest.mark.some(6)
def test_tensors_are_those_of_the_files(name: str, folder: Path, tmp_path: Path) -> None:
    """Every method, dtype and mixture, tied heads, integers, scalars, empty tensors, alpha auto, thresholds, draws."""
    plan = CASES[name].plan(folder, tmp_path)
    lines.run(plan)
    assert_same(in_memory(CASES[name]), load_all(plan.output))


@pytest.fixture(scope="module", autouse=True)
def untouched() -> Iterator[None]:
    """No test of this module changes the inputs that all share."""
    before = {name: checkpoint.digest for name, checkpoint in inputs().items()}
    yield
    assert before == {name: checkpoint.digest for name, checkpoint in inputs().items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["edit-mixed", "ties-mixed", "dare-wide", "edit-resize-ft", "slerp-wide", "edit-towers"]
)
def test_how_tensors_lie_in_memory_does_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do chunks that end within rows."""
    expected = in_memory(CASES[name])
    few = lines.Resources(workers=3, device="cpu", chunk=1009)
    monkeypatch.setattr(arguments, "resources", lambda *_: few)
    assert_same(in_memory(CASES[name], scattered), expected)


@pytest.mark.slow
def test_the_command_line_writes_the_same(models: Path) -> None:
    """The whole way, once."""
    base, ft, ft2 = (load_all(models / name) for name in ("base", "ft", "ft2"))
    assert run_lines("edit", "base", "ft", "-o", "edited").code == 0
    assert_same(lines.edit_state_dict(base, ft, config=llama_config(3, 20)), load_all(models / "edited"))
    assert run_lines("merge", "--config", "merge.yaml", "-o", "merged").code == 0
    found = lines.merge_state_dicts(
        base,
        [ft, ft2],
        "ties",
        parameters={"density": 0.4},
        model_parameters=[None, {"weight": 0.5}],
        lines={"alpha": "auto", "beta": 0.5},
    )
    assert_same(found, load_all(models / "merged"))


def test_what_is_shared() -> None:
    """What comes to what an input holds is its own tensor; all else is new, and inputs are not changed."""
    base = {"embed.ids": torch.arange(3), **{f"h.{layer}.w": torch.randn(3, 3) for layer in range(3)}}
    ft = {name: tensor + 1 for name, tensor in base.items()}
    ft["h.0.w"] = ft["h.0.w"].t()
    found = lines.edit_state_dict(base, ft, alpha=0.0)
    assert found["h.0.w"] is base["h.0.w"]
    assert found["h.2.w"] is ft["h.2.w"]
    assert found["embed.ids"] is base["embed.ids"]  # outside the blocks the coefficient is 0, too
    assert found["h.1.w"].data_ptr() not in {tensor.data_ptr() for tensor in (*base.values(), *ft.values())}
    assert list(found) == list(ft)
    cast = lines.edit_state_dict(base, ft, alpha=0.0, dtype="float16")
    assert cast["h.2.w"].dtype == torch.float16
    assert torch.equal(cast["h.2.w"], ft["h.2.w"].half())


def test_parameters_and_modules() -> None:
    """What requires a gradient is read all the same, and the result requires none."""
    torch.manual_seed(0)
    base, ft = (torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))) for _ in range(2))
    layers = r"^(?P<index>\d+)\."
    expected = lines.edit_state_dict(base.state_dict(), ft.state_dict(), layers=layers)
    assert_same(lines.edit_state_dict(base, ft, layers=layers), expected)
    found = lines.edit_state_dict(dict(base.named_parameters()), dict(ft.named_parameters()), layers=layers)
    assert_same(found, expected)
    assert not any(tensor.requires_grad for tensor in found.values())
    base.load_state_dict(found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["edit-mixed", "edit-defaults", "ties-wide", "dare-wide", "slerp-scaled"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tensors_on_cuda(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay there, and hold the same, wherever it is computed."""
    expected = in_memory(CASES[name])
    own = lines.Resources(device=device)
    monkeypatch.setattr(arguments, "resources", lambda *_: own)
    found = in_memory(CASES[name], lambda tensor: scattered(tensor.cuda()))
    assert {tensor.device.type for tensor in found.values()} == {"cuda"}
    assert_same(found, expected)


def two(**changed: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A base and a fine-tune of it, in which something is changed."""
    base = {f"h.{layer}.w": torch.full((2, 3), 1.0 + layer) for layer in range(3)}
    return base, {**{name: tensor + 0.5 for name, tensor in base.items()}, **changed}


NAN = torch.tensor([[0.0, 1.0, 2.0], [3.0, float("nan"), 5.0]])
REFUSED: dict[str, tuple[dict[str, Any], type[LinesError], str]] = {
    "nan": ({"h.1.w": NAN}, errors.DataError, "ft: tensor h.1.w holds NaN, first at entry 4"),
    "nan in a copy": ({"h.2.w": NAN}, errors.DataError, "ft: tensor h.2.w holds NaN, first at entry 4"),
    "shape": ({"h.1.w": torch.zeros(3, 3)}, errors.MismatchError, "1 tensor(s) do not fit between base and ft"),
    "more": ({"head.w": torch.zeros(2)}, errors.MismatchError, "1 of 4 in ft that base lacks"),
    "dtype": ({"h.1.w": torch.zeros(2, 3).int()}, errors.MismatchError, "F32 and I32"),
    "quantised": ({"h.1.w": torch.zeros(2, 3).to(torch.float8_e4m3fn)}, errors.UnsupportedError, "ft is quantised"),
    "complex": ({"h.1.w": torch.zeros(2, 3).cfloat()}, errors.MismatchError, "h.1.w: F32 and C64"),
    "wide complex": ({"h.1.w": torch.zeros(2).cdouble()}, errors.UnsupportedError, "h.1.w is torch.complex128"),
    "sparse": ({"h.1.w": torch.eye(3).to_sparse()}, errors.UnsupportedError, "ft: tensor h.1.w has the layout"),
    "meta": ({"h.1.w": torch.zeros(2, 3, device="meta")}, errors.UnsupportedError, "is on the meta device"),
    "no tensor": ({"h.1.w": [1.0]}, errors.UnsupportedError, "ft: h.1.w is a list, not a tensor"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_in_memory(what: str) -> None:
    """The errors are those of files, and call the sides base and ft."""
    changed, kind, message = REFUSED[what]
    base, ft = two(**changed)
    with pytest.raises(kind, match=re.escape(message)):
        lines.edit_state_dict(base, ft)


def test_nonfinite_that_is_allowed() -> None:
    """Goes through, to the bit as in files."""
    base, ft = two(**{"h.1.w": NAN})
    assert bool(lines.edit_state_dict(base, ft, allow_nonfinite=True)["h.1.w"][1, 1].isnan())


def test_models_are_called_by_their_numbers() -> None:
    """And a base that stands among them is the base."""
    base, bad = two(**{"h.1.w": NAN})
    with pytest.raises(errors.DataError, match=re.escape("models[1]: tensor h.1.w holds NaN")):
        lines.merge_state_dicts(base, [two()[1], bad])
    with pytest.raises(errors.MismatchError, match=re.escape("models[0]")):
        lines.merge_state_dicts(base, [{"h.0.w": base["h.0.w"]}])
    with pytest.raises(errors.RecipeError, match="model_parameters: there are 2, for 1 models"):
        lines.merge_state_dicts(base, [base], model_parameters=[{}, {}])
    with pytest.raises(errors.RecipeError, match="no method is called 'tise'"):
        lines.merge_state_dicts(base, [base], "tise")
    ft = two()[1]
    halfway = lines.merge_state_dicts(base, [base, ft], "slerp", parameters={"t": 0.5})
    assert_same(halfway, lines.merge_state_dicts(base, [ft], "slerp", parameters={"t": 0.5}))


def test_entries_of_a_tensor_that_is_not_contiguous() -> None:
    """From within a row to within a row, and whole rows between, without a copy of the tensor."""
    from lines_cli.api.in_memory import _copy_entries

    rows = torch.randn(50, 30, 7).transpose(0, 1)
    flat = rows.reshape(-1)
    for first, numel in ((0, 10500), (3, 1), (340, 720), (350, 700), (10400, 100), (7, 0)):
        into = torch.empty(numel)
        _copy_entries(rows, first, into)
        assert torch.equal(into, flat[first : first + numel])


# --- the page ---


BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_the_page_runs(models: Path) -> None:
    """Every block of docs/notebooks.md, one after the other, as in a notebook."""
    assert len(BLOCKS) > 5
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, "docs/notebooks.md", "exec"), names)


@pytest.mark.slow
def test_the_readme_runs(models: Path) -> None:
    """And what README.md shows of Python."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {"base": load_all(models / "base"), "ft": load_all(models / "ft")}
    exec(compile(block, "README.md", "exec"), names)

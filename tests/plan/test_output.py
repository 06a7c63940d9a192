"""What an edit leaves on the disk: weights that load, what belongs beside them, and a recipe that repeats it."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.crossed import by_turns
from support.files import snapshot, write_checkpoint
from support.run import run_lines


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Three layers of 4, 8 and 2 bytes an entry, and something outside."""
    torch.manual_seed(seed)
    model = {f"layers.{i}.w": torch.randn(5, 7).to(d) for i, d in enumerate([torch.float32, torch.float64, torch.half])}
    return model | {
        "embed": torch.randn(11, 3).bfloat16(),
        "steps": torch.tensor([seed, 2]),
        "big": torch.randn(40, 10),
    }


def two(tmp: Path, **kw: Any) -> tuple[Path, Path]:
    return write_checkpoint(tmp / "base", tensors(0), **kw), write_checkpoint(tmp / "ft", tensors(1), **kw)


def edit(*args: object) -> None:
    ran = run_lines("merge" if "--config" in args else "edit", *args)
    assert (ran.code, ran.trace) == (0, ""), ran.err or ran.trace


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- files ---


@pytest.mark.slow
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(mask: int, tmp_path: Path) -> None:
    """Every file is 0666 and every folder 0777 less the umask, whatever the inputs' modes are."""
    base, ft = two(tmp_path, config={"model_type": "tiny"})
    (ft / "tokenizer.json").write_text("{}")
    for path in ft.iterdir():
        path.chmod(0o700)
    with umask(mask):
        edit(base, ft, "-o", tmp_path / "new" / "out", "--max-shard-size", "500")
        edit(base, ft, "-o", tmp_path / "out.safetensors")
        edit(base, ft, "-o", tmp_path / "out.safetensors", "--force")
    files = [*(tmp_path / "new" / "out").iterdir(), tmp_path / "out.safetensors"]
    assert {oct(mode(path)) for path in files} == {oct(0o666 & ~mask)}
    assert {oct(mode(path)) for path in (tmp_path / "new", tmp_path / "new" / "out")} == {oct(0o777 & ~mask)}


@pytest.mark.durable
def test_a_file_is_all_there_is(tmp_path: Path) -> None:
    """-o x.safetensors writes that one file, however small the shards should be, and nothing beside it."""
    base, ft = two(tmp_path, config={"model_type": "tiny"})
    edit(base, ft, "-o", tmp_path / "new" / "x.safetensors", "--max-shard-size", "1")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.safetensors"]
    assert load_file(tmp_path / "new" / "x.safetensors").keys() == tensors().keys()


@pytest.mark.parametrize("output", ["out.safetensors", "out"])
def test_metadata(output: str, tmp_path: Path) -> None:
    """The only metadata is {"format": "pt"}, whatever the inputs say of themselves."""
    base, ft = (tmp_path / f"{side}.safetensors" for side in ("base", "ft"))
    save_file(tensors(), base, metadata={"format": "tf", "secret": "yes"})
    save_file(tensors(1), ft)
    edit(base, ft, "-o", tmp_path / output)
    for path in tmp_path.glob("out*/*.safetensors") if output == "out" else [tmp_path / output]:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}


@by_turns(limit=[1, 300, 400, 1000, 1600, 2000, 10**9], stem=["model", "diffusion_pytorch_model", "open_clip_model"])
def test_shards(limit: int, stem: str, tmp_path: Path) -> None:
    """Shards hold at most the size asked for, or one tensor; the index is right; the library opens all of them."""
    base, ft = two(tmp_path, stem=stem, shards=2)
    out = tmp_path / "out"
    edit(base, ft, "-o", out, "--max-shard-size", limit, "--alpha", "1", "--beta", "0")
    files = sorted(path.name for path in out.glob("*.safetensors"))
    held: dict[str, torch.Tensor] = {}
    for file in files:
        part = load_file(out / file)
        assert not held.keys() & part.keys()
        assert len(part) == 1 or sum(t.numel() * t.element_size() for t in part.values()) <= limit
        held |= part
    assert held.keys() == tensors().keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in tensors(1).items())

    index = out / f"{stem}.safetensors.index.json"
    if len(files) == 1:
        assert files == [f"{stem}.safetensors"]
        assert not index.exists()
        return
    assert files == [f"{stem}-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    content = json.loads(index.read_text())
    assert content["metadata"] == {
        "total_size": sum(t.numel() * t.element_size() for t in held.values()),
        "total_parameters": sum(t.numel() for t in held.values()),
    }
    assert content["weight_map"] == {name: file for file in files for name in load_file(out / file)}


def test_limits_that_force_several_shards() -> None:
    """Guard for the test above: its limits cover one shard, one shard per tensor, and what lies between."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors().values()]
    assert max(sizes) == 1600
    assert sum(sizes) > 2000


def test_a_name_with_a_very_long_number(tmp_path: Path) -> None:
    """A number in a name may have more digits than Python turns into an int."""
    long = {f"layers.{i}.w{'9' * 5000}": torch.ones(2) for i in range(2)}
    path = write_checkpoint(tmp_path / "x.safetensors", long)
    edit(path, path, "-o", tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors").keys() == long.keys()


def test_a_lone_input_gets_the_usual_name(tmp_path: Path) -> None:
    """A folder made from lone files holds model.safetensors, whatever they were called."""
    base, ft = (write_checkpoint(tmp_path / f"{side}.safetensors", tensors()) for side in ("base", "ft"))
    edit(base, ft, "-o", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "lines_recipe.yaml",
        "model.safetensors",
    ]


@pytest.mark.parametrize("target", ["real.safetensors", "blob"])
def test_a_link_to_a_file(target: str, tmp_path: Path) -> None:
    """--force on a link replaces the file it points to, by a file, and nothing else."""
    base, ft = two(tmp_path)
    write_checkpoint(tmp_path / "real.safetensors", tensors(2)).rename(tmp_path / target)
    (tmp_path / "out.safetensors").symlink_to(target)
    before = snapshot(tmp_path)
    edit(base, ft, "-o", tmp_path / "plain.safetensors")
    edit(base, ft, "-o", tmp_path / "out.safetensors", "--force")
    after = snapshot(tmp_path)
    plain = after.pop("plain.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == plain
    assert after.keys() == before.keys()


@pytest.mark.durable
def test_a_link_to_a_folder(tmp_path: Path) -> None:
    """--force on a link replaces the folder it points to; the link stays."""
    base, ft = two(tmp_path)
    write_checkpoint(tmp_path / "deep" / "old", tensors(2))
    (tmp_path / "out").symlink_to("deep/old")
    edit(base, ft, "-o", tmp_path / "out", "--force")
    assert (tmp_path / "out").is_symlink()
    assert load_file(tmp_path / "deep" / "old" / "model.safetensors")["steps"][0] == 1
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["old"]


@pytest.mark.durable
def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    """A folder without anything in it is a destination like any other."""
    base, ft = two(tmp_path)
    (tmp_path / "out").mkdir()
    edit(base, ft, "-o", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "ft", "out"]


@pytest.mark.durable
def test_force_leaves_nothing_of_the_old(tmp_path: Path) -> None:
    """What is replaced is gone: no stale shard, index or config is left for a loader to find."""
    base, ft = two(tmp_path)
    edit(base, ft, "-o", tmp_path / "out", "--max-shard-size", "400")
    edit(base, ft, "-o", tmp_path / "out", "--force")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "lines_recipe.yaml",
        "model.safetensors",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "ft", "out"]


@pytest.mark.durable
def test_into_an_input_s_folder(tmp_path: Path) -> None:
    """A new folder within an input's is no replacement of it."""
    base, ft = two(tmp_path)
    before = snapshot(ft)
    edit(base, ft, "-o", ft / "edited")
    assert {name: content for name, content in snapshot(ft).items() if not name.startswith("edited")} == before


# --- what stands beside the weights ---

CARRIED = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "normalizer.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "open_clip_config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "modules.json",
    "1_Pooling/config.json",
    "configuration_tiny.py",
    "modeling_tiny.py",
    "tokenization_tiny.py",
    "processing_tiny.py",
    "image_processing_tiny.py",
    "LICENSE",
    "NOTICE.txt",
]
LEFT = [
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "flax_model.msgpack",
    "model.onnx",
    "model.gguf",
    "consolidated.00.pth",
    "consolidated.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_0.pth",
    "random_states_0.pkl",
    "trainer_state.json",
    "training_args.bin",
    "training_config.json.bin",
    "zero_to_fp32.py",
    "latest",
    "all_results.json",
    "eval_results.json",
    "checkpoint-10/config.json",
    "checkpoint-10/model.safetensors",
    "checkpoint-10/optimizer.pt",
    "global_step10/mp_rank_00_model_states.pt",
    "runs/events.out.tfevents.1",
    "original/params.json",
    ".git/config",
    ".gitattributes",
    "config.json.bak",
    "LICENSE.bin",
    "model.safetensors.index.json",
]


def litter(folder: Path, mark: str) -> None:
    """Every file named above, holding its own name."""
    for name in [*CARRIED, *LEFT]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"mark": mark, "name": name}))
    save_file(tensors(1 if mark == "ft" else 0), folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()


@pytest.mark.slow
def test_what_is_carried_over(tmp_path: Path) -> None:
    """Of a training folder with everything in it, what a loader needs comes along, byte for byte, and no more."""
    for side in ("base", "ft"):
        litter(tmp_path / side, side)
    edit(tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out")
    out = {name: content for name, content in snapshot(tmp_path / "out").items() if content is not None}
    ours = {"model.safetensors", "README.md", "lines_recipe.yaml"}
    assert sorted(out.keys() - ours) == sorted(CARRIED)
    assert all(json.loads(out[name] or "") == {"mark": "ft", "name": name} for name in CARRIED)


def test_the_base_s_config_where_the_fine_tune_has_none(tmp_path: Path) -> None:
    """A fine-tune that is a lone file gets config and tokenizer of the base, and a note says so."""
    litter(tmp_path / "base", "base")
    ft = write_checkpoint(tmp_path / "ft.safetensors", tensors(1))
    ran = run_lines("edit", tmp_path / "base", ft, "-o", tmp_path / "out")
    assert ran.code == 0
    assert "config" in ran.err
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["mark"] == "base"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mark"] == "base"


DTYPES = {
    "as it was": ({"model_type": "t", "dtype": "float32", "x": 1.0}, None, None),
    "new key": ({"model_type": "t", "dtype": "float32"}, "bfloat16", {"model_type": "t", "dtype": "bfloat16"}),
    "old key": ({"torch_dtype": "float32", "x": []}, "float16", {"torch_dtype": "float16", "x": []}),
    "both keys": (
        {"torch_dtype": "float32", "dtype": "float32"},
        "float64",
        {"torch_dtype": "float64", "dtype": "float64"},
    ),
    "nested": (
        {"dtype": "float32", "text_config": {"dtype": "float32", "a": {"dtype": 3}}, "vision_config": {"depth": 2}},
        "bfloat16",
        {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "a": {"dtype": 3}}, "vision_config": {"depth": 2}},
    ),
    "the same dtype": ({"dtype": "bfloat16", "é": "重"}, "bfloat16", None),
    "half a character": (
        {"dtype": "float32", "bos": "\ud83d"},
        "bfloat16",
        {"dtype": "bfloat16", "bos": "\ud83d"},
    ),
}


@pytest.mark.parametrize(("config", "dtype", "expected"), DTYPES.values(), ids=DTYPES)
def test_config_follows_the_dtype(
    config: dict[str, Any], dtype: str | None, expected: dict[str, Any] | None, tmp_path: Path
) -> None:
    """With --dtype the config's own statements of dtype follow, nested ones too; else it is carried over as it is."""
    base, ft = two(tmp_path, config=config)
    edit(base, ft, "-o", tmp_path / "out", *(["--dtype", dtype] if dtype else []))
    written = tmp_path / "out" / "config.json"
    if expected is None:
        assert written.read_bytes() == (ft / "config.json").read_bytes()
    else:
        assert json.loads(written.read_text()) == expected
    if dtype:
        floats = {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} - {torch.int64}
        assert floats == {getattr(torch, dtype)}


@pytest.mark.slow
@pytest.mark.zoo
def test_transformers_loads_it(tmp_path: Path) -> None:
    """A model, its tokenizer and its generation config load from the output as they are, the weights as written."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2
    )
    for seed, side in enumerate(("base", "ft")):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
        model.generation_config.max_new_tokens = 3 + seed
        model.save_pretrained(tmp_path / side)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"hello": 0, "[UNK]": 1}, unk_token="[UNK]")), unk_token="[UNK]"
    )
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "ft")

    out = tmp_path / "out"
    edit(tmp_path / "base", tmp_path / "ft", "-o", out, "--dtype", "bfloat16", "--max-shard-size", "1KB")
    model, info = transformers.LlamaForCausalLM.from_pretrained(out, output_loading_info=True, dtype="auto")
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    assert model.generation_config.max_new_tokens == 4
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    assert (loaded("hello")["input_ids"], loaded.chat_template) == ([0], "{{ messages }}")
    written = {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in written.items())


# --- the model card ---


def card(out: Path) -> tuple[dict[str, Any], str]:
    """The front matter as the Hub's own client reads it, and the text behind it."""
    from huggingface_hub import ModelCard

    loaded = ModelCard((out / "README.md").read_text(encoding="utf-8"))
    return loaded.data.to_dict(), loaded.text


def test_model_card(tmp_path: Path) -> None:
    """The card says what it was made of and how, for the Hub and for people, and nothing of this machine."""
    base, ft = two(tmp_path, config={"model_type": "llama"})
    edit(base, ft, "-o", tmp_path / "my-model", "--alpha", "0.25", "--gamma", "0.5")
    front, text = card(tmp_path / "my-model")
    assert front["tags"] == ["lines"]
    assert {"base_model", "base_model_relation"}.isdisjoint(front)  # local names are no Hub ids
    assert "| fine-tune | `ft` |" in text
    assert front["library_name"] == "transformers"
    assert "# my-model\n" in text
    assert "| `layers` | 3 | 0.125 | 0.5 |" in text
    assert str(tmp_path) not in (tmp_path / "my-model" / "README.md").read_text()
    assert os.path.expanduser("~") not in text


@pytest.mark.parametrize(
    "name", ["a: b", "---", "x\n---\nlicense: mit", "`x` | y", "[a](javascript:x)", "- 'q\"", "重み", "<b>", "123"]
)
def test_model_card_of_odd_names(name: str, tmp_path: Path) -> None:
    """No name of a folder or a stack breaks the front matter or the table."""
    base = write_checkpoint(tmp_path / "base", {f"{name}.layers.{i}.w": torch.ones(2) for i in range(2)})
    ft = write_checkpoint(tmp_path / name, {f"{name}.layers.{i}.w": torch.zeros(2) for i in range(2)})
    edit(base, ft, "-o", tmp_path / f"{name}.out")
    front, text = card(tmp_path / f"{name}.out")
    assert front == {"tags": ["lines"]}
    assert "\n---" not in text
    rows = [line for line in text.splitlines() if line.startswith("|") and "layers`" in line]
    assert len(rows) == 1


# --- the recipe that repeats it ---

FLAGS = ["--alpha", "0.3", "--beta", "0.6", "--gamma", "0.9", "--dtype", "float32", "--max-shard-size", "900"]


def weights(out: Path) -> dict[str, bytes | str | None]:
    """Everything but the card and the recipe, which name where they stand."""
    return {name: text for name, text in snapshot(out).items() if name not in ("README.md", "lines_recipe.yaml")}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["relative", "absolute"])
def test_the_recipe_repeats_the_run(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lines merge --config out/lines_recipe.yaml` gives the same bytes, from another working directory too."""
    work = tmp_path / "desk"
    two(work, config={"model_type": "tiny", "dtype": "bfloat16"})
    monkeypatch.chdir(work)
    here = Path() if form == "relative" else work
    edit(here / "base", here / "ft", "-o", here / "sub" / "out", *FLAGS)
    first = weights(Path("sub/out"))
    assert len(first) > 3

    (tmp_path / "far" / "away").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "far")
    edit("--config", "../desk/sub/out/lines_recipe.yaml", "-o", "away/again")
    assert weights(Path("away/again")) == first
    edit("--config", "away/again/lines_recipe.yaml", "-o", tmp_path / "third")
    assert weights(tmp_path / "third") == first
    edit("--config", "away/again/lines_recipe.yaml", "-o", "away/again", "--force")
    assert weights(Path("away/again")) == first


def test_inputs_and_output_can_move_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the inputs were given by relative paths, the recipe holds after all of it was moved elsewhere."""
    work = tmp_path / "desk"
    two(work)
    monkeypatch.chdir(work)
    edit("base", "./ft", "-o", "runs/1/out", *FLAGS)
    first = weights(Path("runs/1/out"))
    assert str(tmp_path) not in Path("runs/1/out/lines_recipe.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    shutil.move(work, tmp_path / "moved" / "here")
    edit("--config", "moved/here/runs/1/out/lines_recipe.yaml", "-o", "again")
    assert weights(tmp_path / "again") == first


def test_the_recipe_of_an_output_behind_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output below a linked folder names its inputs by a way that leads to them."""
    work = tmp_path / "desk"
    two(work)
    (tmp_path / "disk2" / "deep" / "er").mkdir(parents=True)
    (work / "linked").symlink_to(tmp_path / "disk2" / "deep" / "er")
    monkeypatch.chdir(work)
    edit("base", "ft", "-o", "linked/out", *FLAGS)
    monkeypatch.chdir(tmp_path)
    edit("--config", "desk/linked/out/lines_recipe.yaml", "-o", "again")
    assert weights(tmp_path / "again") == weights(work / "linked" / "out")


@pytest.mark.parametrize("name", ["a b", "重み", "it's: #1", os.fsdecode(b"latin-\xe9"), "org/name", "~x", "x@y"])
def test_the_recipe_of_odd_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the inputs are called, the run succeeds, prints its JSON, and its recipe repeats it."""
    write_checkpoint(tmp_path / "base", tensors())
    write_checkpoint(tmp_path / name, tensors(1))
    monkeypatch.chdir(tmp_path)
    ran = run_lines("edit", "base", name, "-o", "out", "--json")
    assert (ran.code, ran.trace) == (0, "")
    assert ran.json["recipe"]["models"] == [{"model": name}]
    edit("--config", "out/lines_recipe.yaml", "-o", "again")
    assert weights(tmp_path / "again") == weights(tmp_path / "out")


# --- what is printed ---


def test_json(tmp_path: Path) -> None:
    """--json is one JSON document on stdout: what was done or, with --dry-run, what would be, nothing written."""
    base, ft = two(tmp_path)
    before = snapshot(tmp_path)
    dry = run_lines("edit", base, ft, "-o", tmp_path / "out", "--json", "--dry-run", "--max-shard-size", "900")
    assert (dry.code, dry.trace) == (0, "")
    assert snapshot(tmp_path) == before
    wet = run_lines("edit", base, ft, "-o", tmp_path / "out", "--json", "--max-shard-size", "900")
    assert (dry.json["dry_run"], wet.json["dry_run"]) == (True, False)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    for key in ("files", "stacks", "outside", "edited", "copied", "bytes"):
        assert dry.json[key] == wet.json[key]
    assert wet.json["files"] == files
    assert wet.json["bytes"]["written"] == sum((tmp_path / "out" / file).stat().st_size for file in files)
    assert wet.json["edited"]["tensors"] + wet.json["copied"]["tensors"] == len(tensors())
    counted = wet.json["edited"]["parameters"] + wet.json["copied"]["parameters"]
    assert counted == sum(tensor.numel() for tensor in tensors().values())


def test_quiet(tmp_path: Path) -> None:
    """--quiet prints nothing where nothing is wrong; without it, nothing but the summary, and no progress bar."""
    base, ft = two(tmp_path, config={"model_type": "tiny"})
    ran = run_lines("edit", base, ft, "-o", tmp_path / "out", "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    ran = run_lines("edit", base, ft, "-o", tmp_path / "out", "--force")
    small = "note: the stacks hold only 21% of the parameters, embeddings and heads apart\n"  # as in no real model
    assert (ran.code, ran.err) == (0, small)
    assert str(tmp_path / "out") in ran.out


def test_a_borrowed_config_follows_the_weights(tmp_path: Path) -> None:
    """A lone fine-tune in bfloat16 takes the base's config, which then says bfloat16."""
    config = {"model_type": "tiny", "torch_dtype": "float32"}
    base = write_checkpoint(tmp_path / "base", {"layers.0.w": torch.zeros(4)}, config=config)
    ft = write_checkpoint(tmp_path / "ft.safetensors", {"layers.0.w": torch.ones(4).bfloat16()})
    edit(base, ft, "-o", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"

"""The pages for what a person comes with: every command on them ends as the page says, and gives what it promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from support.adapters import factors, layers_of, updates, write_adapter
from support.files import write_checkpoint
from support.fp8 import FORMATS, LAYERS, near, plain
from support.gguf import write_gguf
from support.pages import DOCS, blocks, run_page
from support.pipelines import loaded, write_everything, write_modules, write_pipeline
from support.run import run_lines
from support.tokenizers import ids_in, write_tokenizer
from support.torch_files import write_folder

GUIDES = {
    "adapters",
    "adapters-out",
    "quantised",
    "pickles",
    "diffusion",
    "mergekit",
    "forgetting",
    "sweeping",
    "at-scale",
    "jobs",
    "notebooks",
    "vocabularies",
    "scale",
}
WIDTH = 64


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tensors(names: list[str], seed: int) -> dict[str, torch.Tensor]:
    """A model [WIDTH] per name; those of seed 1 and more are fine-tunes of that of seed 0."""
    chance = np.random.default_rng(0)
    made = {name: chance.normal(size=WIDTH) for name in names}
    if seed:
        chance = np.random.default_rng(seed)
        made = {name: of + 0.1 * chance.normal(size=WIDTH) for name, of in made.items()}
    return {name: torch.from_numpy(of.astype(np.float32)) for name, of in made.items()}


LLM = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.weight" for i in range(4)), "model.norm.weight"]


def pair(*sides: str) -> None:
    """A base and as many fine-tunes of it."""
    for seed, side in enumerate(sides):
        write_checkpoint(Path(side), tensors(LLM, seed), config={"model_type": "tiny", "num_hidden_layers": 4})


def assert_scaled(out: dict[str, Any], base: dict[str, Any], ft: dict[str, Any], alphas: list[float]) -> None:
    """The blocks of LLM have these coefficients."""
    for layer, alpha in enumerate(alphas):
        name = f"model.layers.{layer}.mlp.weight"
        expected = base[name].double() + alpha * (ft[name].double() - base[name].double())
        torch.testing.assert_close(out[name].double(), expected, rtol=0, atol=1e-6)


DEFAULTS = [0.1, 0.4, 0.7, 1.0]


def test_readme_names_every_guide() -> None:
    """Who comes to README finds the page for what they have."""
    links = set(re.findall(r"\]\(docs/([\w-]+\.md)", (DOCS.parent / "README.md").read_text(encoding="utf-8")))
    assert links >= {f"{guide}.md" for guide in GUIDES | {"tour"}}


@pytest.mark.slow
def test_a_merge_in_parts(here: Path) -> None:
    """docs/scale.md: the parts make what one run makes, and the table counts as many."""
    pair("base", "ft-math", "ft-code")
    run_page("scale.md")
    (here / "out").rename(here / "parts")
    assert run_lines("merge", "--config", "merge.yaml", "-o", "out").code == 0
    whole, parts = ({path.name: path.read_bytes() for path in (here / of).iterdir()} for of in ("out", "parts"))
    assert parts == whole


@pytest.mark.slow
def test_it_forgot_too_much(here: Path) -> None:
    """docs/forgetting.md: at alpha 0 the first block is the base's, to the byte; a constant is the same for all."""
    pair("base", "ft")
    run_page("forgetting.md")
    base, ft = (load_file(here / side / "model.safetensors") for side in ("base", "ft"))
    first = "model.layers.0.mlp.weight"
    assert torch.equal(load_file(here / "lines-0" / "model.safetensors")[first], base[first])
    assert_scaled(load_file(here / "constant" / "model.safetensors"), base, ft, [0.5] * 4)
    assert_scaled(load_file(here / "constant-0.7" / "model.safetensors"), base, ft, [0.7] * 4)
    assert_scaled(load_file(here / "out" / "model.safetensors"), base, ft, [0.3, 0.3 + 0.7 / 3, 0.3 + 1.4 / 3, 1])


def python_first(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs `python` runs this one, which looks for no packages and so starts sooner."""
    (here / "bin").mkdir()
    (here / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    (here / "bin" / "python").chmod(0o755)
    monkeypatch.setenv("PATH", f"{here / 'bin'}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.slow
def test_an_evaluation_that_decides(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/sweeping.md: seven candidates, as many of each control, and the winner's folder beside the report."""
    pair("base", "ft")
    python_first(here, monkeypatch)
    (here / "evaluate.py").write_text(
        "import json, sys, zlib\n"
        "seen = zlib.crc32(open(sys.argv[1] + '/model.safetensors', 'rb').read()) / 2**32\n"
        "print(json.dumps({'target': 1 + seen, 'control': {'a': 2 - seen, 'b': 1.5}}))\n"
    )
    run_page("sweeping.md")
    trials = [json.loads(line) for line in (here / "best.sweep" / "trials.jsonl").read_text().splitlines()[1:]]
    families = [trial["family"] for trial in trials]
    assert families == ["pre", "ft", *["lines"] * 7, *["constant"] * 7, *["reversed"] * 7]
    assert (here / "best" / "lines_recipe.yaml").is_file()


FAKE_HARNESS = """#!/bin/sh
exec "{python}" -S - "$@" <<'END'
import datetime, json, os, sys, zlib
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
model = dict(pair.split("=", 1) for pair in words["--model_args"].split(","))["pretrained"]
assert (words["--model"], words["--tasks"]) == ("hf", "gsm8k,hellaswag,arc_easy"), words
seen = zlib.crc32(open(model + "/model.safetensors", "rb").read()) / 2**32
results = {{
    "gsm8k": {{"alias": "gsm8k", "exact_match,strict-match": seen, "exact_match_stderr,strict-match": 0.01}},
    "hellaswag": {{"alias": "hellaswag", "acc,none": 0.5, "acc_norm,none": 1 - seen}},
    "arc_easy": {{"alias": "arc_easy", "acc,none": 0.5, "acc_norm,none": 0.75}},
}}
folder = os.path.join(words["--output_path"], model.replace("/", "__"))
os.makedirs(folder, exist_ok=True)
date = datetime.datetime.now().isoformat().replace(":", "-")
with open(os.path.join(folder, f"results_{{date}}.json"), "w") as file:
    json.dump({{"results": results, "configs": {{}}, "n-shot": {{}}}}, file, indent=2)
print("hf (pretrained=...), gen_kwargs: (None), limit: None, num_fewshot: None, batch_size: auto")
print("|  Tasks  |Version|     Filter     |n-shot|")
END
"""


@pytest.mark.slow
@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_lm_evaluation_harness(few: bool, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/sweeping.md: its line for lm_eval, with a program in its place that writes the files that lm_eval writes."""
    pair("base", "ft")
    python_first(here, monkeypatch)
    (here / "bin" / "lm_eval").write_text(FAKE_HARNESS.format(python=sys.executable))
    (here / "bin" / "lm_eval").chmod(0o755)
    page = (DOCS / "sweeping.md").read_text()
    for name in ("scores.py", "harness.yaml"):
        (text,) = re.findall(rf"^`{re.escape(name)}`:\n\n```\w+\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        (here / name).write_text(text)
    (command,) = re.findall(r"^    lines (sweep --config harness.yaml .*)$", page, re.MULTILINE)
    config = (here / "harness.yaml").read_text()
    (here / "harness.yaml").write_text(f"{config}repeats: 2\n{'controls: false' if few else ''}\n")
    ran = run_lines(*command.split(), "--json")
    assert ran.code == 0, ran.err
    assert len(ran.json["trials"]) == 2 + (1 if few else 3) * 4
    for trial in ran.json["trials"]:
        metrics = trial["metrics"]
        assert metrics["control"] == {"hellaswag": 1 - metrics["target"], "arc_easy": 0.75}
    assert "|  Tasks  |Version|" in next(iter((here / "best.sweep" / "logs").iterdir())).read_text()


class ImageEncoder(torch.nn.Module):
    """A small one, called as the paper's code calls its own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        blocks = (torch.nn.Sequential(OrderedDict(mlp=torch.nn.Linear(8, 8))) for _ in range(4))
        self.model = torch.nn.Module()
        self.model.visual = torch.nn.Module()
        self.model.visual.conv1 = torch.nn.Conv2d(3, 8, 2)
        self.model.visual.transformer = torch.nn.Module()
        self.model.visual.transformer.resblocks = torch.nn.Sequential(*blocks)


@pytest.mark.slow
def test_on_large_models(here: Path) -> None:
    """docs/at-scale.md: its sweeps can be planned, on stand-ins of the same names, and its evaluations are valid."""
    pair("base", "ft")
    for seed, name in enumerate(("zeroshot", "cars", "dtd", "svhn")):
        torch.save(ImageEncoder(seed).state_dict(), f"{name}.pt")
    run_page("at-scale.md")
    compile((here / "evaluate_clip.py").read_text(), "evaluate_clip.py", "exec")
    assert subprocess.run(["sh", "-n", "evaluate_lm.sh"], check=False).returncode == 0
    planned = run_lines("sweep", "--config", "clip.yaml", "--dry-run", "--json").json
    assert planned["trials"] == dict.fromkeys(("lines", "constant", "reversed"), 11)
    assert planned["evaluations"] == 35
    inner = (here / "evaluate_lm.sh").read_text().partition("<<'END'\n")[2].removesuffix("END\n")
    results = {name: {"acc,none": 0.5} for name in ("hellaswag", "arc_challenge", "mmlu")}
    results["gsm8k"] = {"exact_match,strict-match": 0.25}
    (here / "out" / "results" / "model").mkdir(parents=True)
    (here / "out" / "results" / "model" / "results.json").write_text(json.dumps({"results": results}))
    ran = subprocess.run([sys.executable, "-", "out"], input=inner, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == {
        "target": 0.25,
        "control": {"hellaswag": 0.5, "arc_challenge": 0.5, "mmlu": 0.5},
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_pickles(here: Path) -> None:
    """docs/pickles.md: file and memory give the same, with views and parts; a module becomes one again."""
    base, ft = tensors(LLM, 0), tensors(LLM, 1)
    for model in (base, ft):
        model["lm_head.weight"] = model["model.embed_tokens.weight"].view(8, -1)[:, 1:].T
    torch.save(base, here / "base.pt")
    torch.save({"state_dict": ft, "epoch": 3, "optimizer": {"lr": 0.1}}, here / "ft.ckpt")
    torch.save({"model": base, "ema": ft}, here / "two.pth")
    encoders = ImageEncoder(0), ImageEncoder(1)
    for encoder, name in zip(encoders, ("zeroshot", "finetuned"), strict=True):
        torch.save(encoder, here / f"{name}.pt")
    for side, of in (("old-base", base), ("old-ft", ft)):
        write_folder(here / side, of, config={"model_type": "tiny", "num_hidden_layers": 4})
    names = run_page("pickles.md")
    out = torch.load(here / "out.pt", weights_only=True)
    assert out.keys() == names["edited"].keys() == ft.keys()
    assert all(torch.equal(out[name], tensor) for name, tensor in names["edited"].items())
    assert_scaled(out, base, ft, DEFAULTS)
    for folder in ("out-ema", "new"):
        assert (here / folder / "model.safetensors").read_bytes() == (here / "out" / "model.safetensors").read_bytes()
    assert (here / "new" / "config.json").is_file()
    before, after, edited = (
        encoder.state_dict()["model.visual.transformer.resblocks.1.mlp.weight"]
        for encoder in (*encoders, torch.load(here / "edited.pt", weights_only=False))
    )
    torch.testing.assert_close(edited, before + 0.4 * (after - before), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_diffusion(here: Path) -> None:
    """docs/diffusion.md: a whole pipeline is written, one file with everything, and one of sentence-transformers."""
    for seed, side in enumerate(("base", "ft")):
        write_pipeline(here / side, seed)
        write_everything(here / f"{side}.safetensors", seed)
        write_modules(here / f"st-{side}", seed)
    module = "unet.mid_block.resnets.0.conv1.lora"
    factors = {f"{module}_A.weight": torch.ones(2, 3), f"{module}_B.weight": torch.ones(4, 2)}
    write_checkpoint(here / "lora/pytorch_lora_weights.safetensors", factors)
    run_page("diffusion.md")
    base, ft, out, unet = (loaded(here / side) for side in ("base", "ft", "out", "unet"))
    middle, last = "mid_block.resnets.0.conv1.weight", "up_blocks.2.resnets.0.conv1.weight"
    assert torch.equal(unet["."][last], ft["unet"][last])
    assert not torch.equal(unet["."][middle], ft["unet"][middle])
    for component in ("vae", "text_encoder"):  # the last that wrote it put the LoRA onto the U-Net
        assert all(torch.equal(tensor, base[component][name]) for name, tensor in out[component].items())
    changed = {name for name, tensor in out["unet"].items() if not torch.equal(tensor, base["unet"][name])}
    assert changed == {middle}
    assert (here / "out/model_index.json").read_bytes() == (here / "base/model_index.json").read_bytes()
    single, theirs = load_file(here / "out.safetensors"), load_file(here / "ft.safetensors")
    changed = {name.partition(".")[0] for name in single if not torch.equal(single[name], theirs[name])}
    assert changed == {"model"}
    assert torch.equal(
        loaded(here / "st")["2_Dense"]["linear.weight"], loaded(here / "st-ft")["2_Dense"]["linear.weight"]
    )
    assert base.keys() == ft.keys()


@pytest.mark.slow
def test_quantised(here: Path) -> None:
    """docs/quantised.md: what is in FP8 is edited as the numbers that it stands for."""
    whole = {}
    for side, model in (("base", plain()), ("ft", near(plain(), 1))):
        stored = FORMATS["blocks"](model)
        whole[side], whole[f"{side}-fp8"] = model, stored.whole
        write_checkpoint(here / side, model, config={"num_hidden_layers": LAYERS})
        write_checkpoint(here / f"{side}-fp8", stored.tensors, config=stored.config)
    write_gguf(here / "model.gguf", {f"blk.{i}.ffn_up.weight": ("Q8_0", [8, 32]) for i in range(3)})
    run_page("quantised.md")
    name = "model.layers.0.q_proj.weight"
    for out, base, ft in (("out", "base-fp8", "ft"), ("out2", "base", "ft-fp8")):
        b, f = whole[base][name].float(), whole[ft][name].float()
        wanted = b + torch.tensor(0.1) * (f - b)
        assert torch.equal(load_file(here / out / "model.safetensors")[name], wanted.bfloat16())


def test_a_mergekit_file(here: Path) -> None:
    """docs/mergekit.md: the recipe that an output holds makes its weights again (the page compares them)."""
    pair("base", "ft-math", "ft-code")
    run_page("mergekit.md")
    assert (here / "merged" / "config.json").exists()
    assert json.loads((here / "stack/config.json").read_text())["num_hidden_layers"] == 6
    files = [here / f"{out}/model.safetensors" for out in ("merged", "scaled", "beta-0.3", "beta-0.6", "beta-0.9")]
    assert len({file.read_bytes() for file in files}) == len(files)


@pytest.mark.slow
def test_vocabularies(here: Path) -> None:
    """docs/vocabularies.md: the union has every token's row; renumbered rows are edited by token."""
    words = [f"w{number}" for number in range(12)]
    order = words[::-1]
    vocabularies = {"base": (words, ()), "ft-chat": (words, ("<|im_end|>",)), "ft-tools": (words, ("<tool>",))}
    sides: dict[str, tuple[dict[str, torch.Tensor], dict[str, int]]] = {}
    for seed, (side, (own, extra)) in enumerate({**vocabularies, "ft-renumbered": (order, ())}.items()):
        ids = write_tokenizer(here / side, own, extra)
        chance = torch.Generator().manual_seed(seed)
        model = tensors(LLM, seed) | {LLM[0]: torch.randn(len(ids), WIDTH, generator=chance)}
        write_checkpoint(
            here / side, model, config={"model_type": "tiny", "num_hidden_layers": 4, "vocab_size": len(ids)}
        )
        sides[side] = model, ids
    run_page("vocabularies.md")
    merged = load_file(here / "merged" / "model.safetensors")[LLM[0]]
    for token, side in (("<|im_end|>", "ft-chat"), ("<tool>", "ft-tools")):
        model, ids = sides[side]
        assert torch.equal(merged[ids_in(here / "merged")[token]], model[LLM[0]][ids[token]])
    base, ft, out = (
        sides["base"][0][LLM[0]],
        sides["ft-renumbered"][0][LLM[0]],
        load_file(here / "out" / "model.safetensors"),
    )
    torch.testing.assert_close(out[LLM[0]], base.flip(0) + 0.1 * (ft - base.flip(0)))


def test_the_tour_from_python(here: Path) -> None:
    """docs/tour.md: the call gives what the command gives, whose output the page shows."""
    pair("base", "ft", "ft-code")
    (code,) = (text for kind, text in blocks("tour.md") if kind == "python")
    names: dict[str, Any] = {}
    exec(compile(code, "docs/tour.md", "exec"), names)
    assert names["summary"]["stacks"][0]["coefficients"] == pytest.approx([0.3, 0.3 + 0.7 / 3, 0.3 + 1.4 / 3, 1])


@pytest.mark.slow
def test_adapters_out(here: Path) -> None:
    """docs/adapters-out.md: of an adapter that is scaled each layer has its coefficient, and a sum is the dense one."""
    sizes = {"self_attn.q_proj": (12, 8), "mlp.up_proj": (16, 8)}
    modules = layers_of(4, sizes)
    for seed, side in enumerate(("base", "ft")):
        chance = torch.Generator().manual_seed(seed)
        weights = {f"{module}.weight": torch.randn(*size, generator=chance) for module, size in modules.items()}
        weights["model.norm.weight"] = torch.ones(8)
        write_checkpoint(here / side, weights, config={"model_type": "tiny", "num_hidden_layers": 4})
    for seed, name in enumerate(("adapter", "adapter2")):
        write_adapter(here / name, factors(modules, 4, seed))
    run_page("adapters-out.md")
    before, scaled, other, merged = (updates(here / name) for name in ("adapter", "scaled", "adapter2", "merged"))
    for name, tau in before.items():
        layer = int(name.split(".")[2])
        torch.testing.assert_close(scaled[name], DEFAULTS[layer] * tau, rtol=1e-5, atol=1e-5)
        coefficient = 0.5 + 0.5 * layer / 3
        wanted = coefficient * (0.6 * tau + 0.5 * other[name])
        torch.testing.assert_close(merged[name], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_adapters(here: Path) -> None:
    """docs/adapters.md: each layer has the share of B A that its coefficient says; to fold is to scale by 1."""
    sizes = {"self_attn.q_proj": (12, 8), "mlp.up_proj": (16, 8)}
    modules = layers_of(4, sizes)
    for seed, side in enumerate(("base", "ft")):
        chance = torch.Generator().manual_seed(seed)
        weights = {f"{module}.weight": torch.randn(*size, generator=chance) for module, size in modules.items()}
        weights["model.norm.weight"] = torch.ones(8)
        write_checkpoint(here / side, weights, config={"model_type": "tiny", "num_hidden_layers": 4})
    for seed, name in enumerate(("adapter", "adapter2", "adapter3")):
        write_adapter(here / name, factors(modules, 4, seed))
    names = run_page("adapters.md")
    base, out, folded = (load_file(here / side / "model.safetensors") for side in ("base", "out", "folded"))
    for name, update in updates(here / "adapter").items():
        moved = out[name].double() - base[name].double()
        torch.testing.assert_close(moved, DEFAULTS[int(name.split(".")[2])] * update, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(folded[name].double(), base[name].double() + update, rtol=1e-6, atol=1e-6)
    assert torch.equal(out["model.norm.weight"], base["model.norm.weight"])
    assert callable(names["fold"])


@pytest.mark.slow
def test_what_peft_folds(here: Path) -> None:
    """docs/adapters.md: the function there folds as `--alpha 1 --beta 0` does, on a real model in bfloat16."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 64}
        config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
        transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(here / "base")
        model = transformers.LlamaForCausalLM.from_pretrained(here / "base", dtype="bfloat16")
        lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(model, lora).save_pretrained(here / "adapter")
        (code,) = (text for kind, text in blocks("adapters.md") if kind == "python")
        names: dict[str, Any] = {}
        exec(code, names)
        names["fold"]("adapter", "ft")
    run_lines("edit", "base", "adapter", "-o", "folded", "--alpha", "1", "--beta", "0", "--dtype", "float32")
    theirs, ours = (load_file(here / side / "model.safetensors") for side in ("ft", "folded"))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-7)
    assert run_lines("inspect", "adapter").code == 0

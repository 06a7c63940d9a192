"""What an adapter's config and tensors must say; each kind that is no update of its base is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lines_cli.checkpoint import adapter_config
from lines_cli.checkpoint.adapter import Adapter, open_adapter
from lines_cli.errors import CheckpointError, LinesError, UnsupportedError
from support.adapters import PREFIX, factors, layers_of, write_adapter

MODULES = {"layers.0.q_proj": (12, 8), "layers.1.q_proj": (12, 8)}


def opened(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Adapter:
    return open_adapter(write_adapter(folder / "adapter", tensors or factors(MODULES, 4, 1), **config))


def refused(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> LinesError:
    with pytest.raises((CheckpointError, UnsupportedError)) as found:
        opened(folder, tensors, **config)
    assert "adapter" in found.value.message
    return found.value


@pytest.mark.parametrize(
    "kind",
    "ADALORA IA3 VERA PREFIX_TUNING PROMPT_TUNING P_TUNING OFT BOFT LN_TUNING XLORA POLY HRA FOURIERFT OTHER".split(),
)
def test_other_kinds_of_adapters(kind: str, tmp_path: Path) -> None:
    """They are refused by their names, with the way out."""
    error = refused(tmp_path, peft_type=kind)
    assert kind in error.message
    assert "merge_and_unload" in str(error.hint)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 0.1}),
        ("enable_lora", [True, False, True]),
    ],
)
def test_variants_that_are_no_update(key: str, value: Any, tmp_path: Path) -> None:
    """Each is refused by the key that turns it on; off it is nothing."""
    assert key in refused(tmp_path, **{key: value}).message
    assert len(opened(tmp_path, **{key: None}).changes) == 2


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_a_base_that_was_changed(value: str, tmp_path: Path) -> None:
    """What took its product from the base is no update of it: refused, with the way to convert it."""
    error = refused(tmp_path, init_lora_weights=value)
    assert value in error.message
    assert "path_initial_model_for_weight_conversion" in str(error.hint)


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_a_base_that_was_not_changed(value: Any, tmp_path: Path) -> None:
    """Other beginnings leave plain LoRA."""
    assert len(opened(tmp_path, init_lora_weights=value).changes) == 2


def test_an_unknown_beginning(tmp_path: Path) -> None:
    assert "'svd' is not known" in refused(tmp_path, init_lora_weights="svd").message


@pytest.mark.parametrize("value", [True, 1, 0.5, "yes", [1], {"a": None}])
def test_an_unknown_key_that_is_on(value: Any, tmp_path: Path) -> None:
    """It may change what the adapter does, and is refused by its name."""
    assert "use_something" in refused(tmp_path, use_something=value).message


@pytest.mark.parametrize("value", [None, False, "", [], {}, 0])
def test_an_unknown_key_that_is_off(value: Any, tmp_path: Path) -> None:
    """As a newer PEFT writes it: it is let through, and said."""
    adapter = opened(tmp_path, use_something=value)
    assert any("use_something" in note for note in adapter.notes)


@pytest.mark.parametrize("key", ["r", "lora_alpha", "peft_type"])
def test_a_key_that_is_missing(key: str, tmp_path: Path) -> None:
    """It is named, and so is the file."""
    folder = write_adapter(tmp_path / "adapter", factors(MODULES, 4, 1))
    config = json.loads((folder / "adapter_config.json").read_text())
    del config[key]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: no {key}\b"):
        open_adapter(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("r", value) for value in (0, -1, True, 4.0, "4", None, [4])),
        *(("lora_alpha", value) for value in (True, "8", None, float("nan"), float("inf"), [])),
        *(("peft_type", value) for value in (["LORA"], {"LORA": 1}, 3)),
        *((key, 10**400) for key in ("r", "lora_alpha")),
        *((key, {"q_proj": -(10**400)}) for key in ("rank_pattern", "alpha_pattern")),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": True}),
        ("rank_pattern", {"(": 4}),
        ("alpha_pattern", {"q_proj": "a"}),
        ("alpha_pattern", {"q_proj": float("nan")}),
        ("use_rslora", "true"),
        ("use_dora", 1),
        ("bias", "some"),
        ("target_parameters", "experts.gate_up_proj"),
        ("modules_to_save", "lm_head"),
        ("trainable_token_indices", [1, -1]),
        ("trainable_token_indices", [1, 1]),
        ("trainable_token_indices", {"embed_tokens": [1.5]}),
    ],
)
def test_values_that_make_no_sense(key: str, value: Any, tmp_path: Path) -> None:
    """Each is refused by its key; nothing is taken for something else."""
    assert key in refused(tmp_path, **{key: value}).message


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"null", b'{"peft_type": "LORA", "r": 4' + b" " * 100])
def test_a_config_that_is_no_mapping(content: bytes, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", factors(MODULES, 4, 1))
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        open_adapter(folder)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [r"(?:a|aa)+_proj", r"(a|a)+_proj", r"(?:\w|\w\w)+q_proj"])
def test_a_pattern_of_a_stranger_s_ends(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that would search for ever is given up, and named; many of them have no more time than one."""
    monkeypatch.setattr(adapter_config, "SECONDS_TO_MATCH", 0.2)
    names = {f"layers.{i}.{'a' * 60}.q_proj": (12, 8) for i in range(20)}
    patterns = {f"{pattern}{n}?": 4 for n in range(1000)}
    assert "rank_pattern" in refused(tmp_path, factors(names, 4, 1), rank_pattern=patterns).message


@pytest.mark.parametrize(
    ("key", "value", "rank"),
    [
        ("q_proj", "layers.1.q_proj", True),
        ("1.q_proj", "layers.1.q_proj", True),
        ("^layers.1.q_proj", "layers.1.q_proj", True),
        ("^q_proj", "layers.1.q_proj", False),
        ("_proj", "layers.1.q_proj", False),
        ("q_pro", "layers.1.q_proj", False),
        (r".*\.1\..*", "layers.1.q_proj", True),
        (r"layers\.(1|3)\.q_proj", "layers.1.q_proj", True),
        (r"[qk]_proj", "layers.1.q_proj", True),
        (r"[qk]_pro", "layers.1.q_proj", False),
    ],
)
def test_patterns_fit_as_peft_s(key: str, value: str, rank: bool, tmp_path: Path) -> None:
    """A pattern is of a module whose name ends with it, behind a dot."""
    tensors = factors({value: (12, 8)}, 2 if rank else 4, 1)
    (change,) = opened(tmp_path, tensors, rank_pattern={key: 2}, alpha_pattern={key: 6}).changes
    assert (change.rank, change.scale) == ((2, 3.0) if rank else (4, 2.0))


def test_the_first_pattern_that_fits(tmp_path: Path) -> None:
    (change,) = opened(tmp_path, factors({"a.b": (4, 4)}, 2, 1), rank_pattern={"b": 2, "a.b": 3, ".*": 5}).changes
    assert change.rank == 2


# --- tensors ---


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{PREFIX}layers.1.q_proj.lora_B.weight"), "layers.1.q_proj has lora_A, and no lora_B"),
        (lambda t: t.pop(f"{PREFIX}layers.1.q_proj.lora_A.weight"), "layers.1.q_proj has lora_B, and no lora_A"),
        (lambda t: t.update({"lora_A.weight": torch.ones(4, 8)}), "lora_A.weight"),
        (lambda t: t.update({f"{PREFIX}layers.1.q_proj.lora_C.weight": torch.ones(4, 8)}), "lora_C"),
        (lambda t: t.update({f"{PREFIX}layers.1.q_proj.lora_B.weight": torch.ones(12, 3)}), "have no product"),
        (lambda t: t.update({f"{PREFIX}layers.1.q_proj.lora_B.weight": torch.ones(0)}), "have no product"),
        (lambda t: t.update({f"{PREFIX}layers.1.q_proj.lora_A.weight": torch.ones(4, 8).int()}), "I32"),
        (lambda t: t.update({f"{PREFIX}layers.1.q_proj.lora_magnitude_vector": torch.ones(12)}), "use_dora: false"),
        (lambda t: t.update({f"{PREFIX}layers.1.q_proj.lora_B.bias": torch.ones(12)}), "lora_bias: false"),
        (lambda t: t.update({f"{PREFIX}layers.1.q_proj.hada_w1_a": torch.ones(12, 4)}), "lacks|no hada|of LOHA"),
        (lambda t: t.update({f"{PREFIX}layers.1.q_proj.lora_E": torch.ones(4, 1)}), "lora_E"),
        (lambda t: t.update({f"{PREFIX}layers.1.q_proj.dora_scale": torch.ones(4, 1)}), "dora_scale"),
        (lambda t: t.update({f"{PREFIX}e.token_adapter.trainable_tokens_delta": torch.ones(4, 1)}), "says which"),
        (lambda t: t.update({"layers.1.q_proj.lora_B.weight": torch.ones(12, 4)}), "two tensors are the B"),
    ],
)
def test_tensors_that_do_not_go_together(change: Any, said: str, tmp_path: Path) -> None:
    """Each is refused with the file, the module and what is wrong."""
    tensors = factors(MODULES, 4, 1)
    change(tensors)
    with pytest.raises((CheckpointError, UnsupportedError), match=said):
        opened(tmp_path, tensors)


def test_ranks_that_disagree(tmp_path: Path) -> None:
    """The file's and the config's are both in the message."""
    error = refused(tmp_path, factors(MODULES, 5, 1))
    assert "rank 5" in error.message
    assert "rank 4" in error.message
    assert "[5, 8]" in error.message


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        ({}, {"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({}, {"trainable_token_indices": {"embed_tokens": [1, 2]}}, "embed_tokens"),
        ({"wte": 2}, {"trainable_token_indices": {"wte": [1, 2], "wpe": [3, 4]}}, "wpe"),
        ({}, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({}, {"modules_to_save": ["classifier", "score"]}, "classifier, score"),
    ],
)
def test_tensors_that_the_config_names_are_missing(
    tensors: dict[str, int], config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """As with factors: an adapter is refused of which a part is missing."""
    own = {f"{PREFIX}{name}.token_adapter.trainable_tokens_delta": torch.ones(n, 8) for name, n in tensors.items()}
    error = refused(tmp_path, factors(MODULES, 4, 1) | own, **config)
    assert said in error.message
    assert "incomplete" in str(error.hint)


def test_what_the_config_names_beside_what_is_there(tmp_path: Path) -> None:
    """A head that is tied has its embedding's rows; of names for heads a model has one."""
    own = {
        f"{PREFIX}wte.token_adapter.trainable_tokens_delta": torch.ones(2, 8),
        f"{PREFIX}score.weight": torch.ones(3, 8),
    }
    adapter = opened(
        tmp_path,
        factors(MODULES, 4, 1) | own,
        trainable_token_indices={"wte": [1, 2], "lm_head": [1, 2]},
        modules_to_save=["classifier", "score"],
    )
    assert len(adapter.changes) == 4


def test_no_tensors(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", {})
    with pytest.raises(CheckpointError, match="changes nothing"):
        open_adapter(tmp_path / "adapter")


def test_several_adapters_in_one_file(tmp_path: Path) -> None:
    """They are listed."""
    one, two = (
        {name.replace(".weight", f".{adapter}.weight"): tensor for name, tensor in factors(MODULES, 4, 1).items()}
        for adapter in ("first", "second")
    )
    error = refused(tmp_path, one | two)
    assert "first" in error.message
    assert "second" in error.message


def test_dora_without_magnitudes(tmp_path: Path) -> None:
    assert "no lora_magnitude_vector" in refused(tmp_path, use_dora=True).message


def test_a_module_that_is_saved_whole_and_no_config_says_so(tmp_path: Path) -> None:
    """What a file without a config holds beside factors has to be known."""
    folder = write_adapter(tmp_path / "adapter", factors(MODULES, 4, 1) | {"something": torch.ones(3)})
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UnsupportedError, match="something"):
        open_adapter(folder)


def test_a_file_of_peft_s_without_its_config(tmp_path: Path) -> None:
    """Nothing says how it is scaled, and the error says that."""
    folder = write_adapter(tmp_path / "adapter", factors(MODULES, 4, 1))
    (folder / "adapter_config.json").unlink()
    for path in (folder, folder / "adapter_model.safetensors"):
        with pytest.raises(UnsupportedError, match="nothing says how it is scaled"):
            open_adapter(path)


def test_a_link_out_of_the_folder(tmp_path: Path) -> None:
    """A config that lies elsewhere in truth is not followed."""
    folder = write_adapter(tmp_path / "adapter", factors(MODULES, 4, 1))
    (folder / "adapter_config.json").rename(tmp_path / "elsewhere.json")
    (folder / "adapter_config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match="leaves its folder"):
        open_adapter(folder)


# --- modules that a config does not name ---


TARGETED: dict[str, tuple[dict[str, Any], list[str]]] = {  # what a config says -> modules that PEFT loads no factors of
    "all": ({"target_modules": ["q_proj", "up_proj"]}, []),
    "no word of it": ({"target_modules": None}, []),
    "every linear layer": ({"target_modules": "all-linear"}, []),
    "whole names": ({"target_modules": [f"model.layers.{i}.{m}" for i in range(3) for m in ("q_proj", "up_proj")]}, []),
    "one kind": ({"target_modules": ["q_proj"]}, [f"model.layers.{i}.up_proj" for i in range(3)]),
    "the end of a name": ({"target_modules": ["proj", "q_proj"]}, [f"model.layers.{i}.up_proj" for i in range(3)]),
    "an expression": ({"target_modules": r".*layers\.[01]\..*"}, ["model.layers.2.q_proj", "model.layers.2.up_proj"]),
    "as Unsloth writes it": (
        {
            "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
            r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
            r"(?:(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.)?(?:(?:q_proj|k_proj|v_proj|o_proj|up_proj)))"
        },
        [],
    ),
    "an expression for other names": ({"target_modules": r"transformer\.h\..*"}, []),
    "other names": (
        {"target_modules": ["c_attn"]},
        [f"model.layers.{i}.{m}" for i in range(3) for m in ("q_proj", "up_proj")],
    ),
    "layers": ({"layers_to_transform": [0, 2]}, ["model.layers.1.q_proj", "model.layers.1.up_proj"]),
    "one layer": (
        {"layers_to_transform": 1, "target_modules": ["q_proj", "model.layers.0.up_proj", "up_proj"]},
        [f"model.layers.{i}.{m}" for i, m in ((0, "q_proj"), (2, "q_proj"), (2, "up_proj"))],
    ),
    "layers of a list": ({"layers_to_transform": [0, 1, 2], "layers_pattern": "layers"}, []),
    "layers of no list": (
        {"layers_to_transform": [0, 1, 2], "layers_pattern": ["h"]},
        [f"model.layers.{i}.{m}" for i in range(3) for m in ("q_proj", "up_proj")],
    ),
    "left out": ({"exclude_modules": ["layers.1.q_proj"]}, ["model.layers.1.q_proj"]),
    "left out by an expression": ({"exclude_modules": r".*2\.up_proj"}, ["model.layers.2.up_proj"]),
}


@pytest.mark.parametrize("name", TARGETED)
def test_modules_that_a_config_does_not_name(name: str, tmp_path: Path) -> None:
    """Refused by name, as PEFT would not load them; not folded in silently."""
    said, left = TARGETED[name]
    modules = layers_of(3, {"q_proj": (8, 8), "up_proj": (12, 8)})
    write_adapter(tmp_path / "adapter", factors(modules, 4, 0), **said)
    if not left:
        assert len(open_adapter(tmp_path / "adapter").changes) == 6
        return
    with pytest.raises(
        CheckpointError, match=rf"has factors of {len(left)} modules .* does not name, of 6 in all"
    ) as error:
        open_adapter(tmp_path / "adapter")
    assert all(f"\n  {module}\n" in error.value.message for module in left[:3])
    assert "target_modules" in str(error.value.hint)


UNKNOWN = {"no word of it", "every linear layer", "an expression for other names", "other names", "layers of no list"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted(TARGETED.keys() - UNKNOWN)
)  # of which it adapts none at all, or asks transformers
def test_peft_loads_none_of_what_a_config_does_not_name(name: str, tmp_path: Path) -> None:
    """The same table, by peft itself."""
    peft = pytest.importorskip("peft")
    said, left = TARGETED[name]
    modules = layers_of(3, {"q_proj": (8, 8), "up_proj": (12, 8)})
    write_adapter(tmp_path / "adapter", factors(modules, 4, 0), **said)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.up_proj = torch.nn.Linear(8, 8), torch.nn.Linear(8, 12)

    class Inner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer() for _ in range(3)])

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Inner()

    adapted = peft.PeftModel.from_pretrained(Model(), tmp_path / "adapter")
    found = {n.removeprefix(PREFIX) for n, m in adapted.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert found == modules.keys() - set(left)

"""`lines sweep` on the demo's fine-tune: the winner is what a loop in plain torch picks over the same grid."""

from __future__ import annotations

import importlib
import shlex
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from support.run import run_lines

ROOT = Path(__file__).resolve().parents[2]
ALPHAS = [1.0, 0.6, 0.3, 0.0]
TARGET = "inverted"
JUDGE = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import digits
torch.set_num_threads(1)
state = torch.load("judge.pt", weights_only=True)
domains = digits.make_domains()
shuffle = state["shuffle"]
domains["shuffled"] = lambda x: x.flatten(1)[:, shuffle].view_as(x)
judge = digits.Judge("inverted", domains, state["heads"], {"validation": tuple(state["split"])})
found = judge.accuracies(Path(sys.argv[1]).resolve(), "validation")
print(json.dumps({"target": found.pop("inverted"), "control": found}))
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The demo's encoders, trained as it trains them; and what judges them."""
    pytest.importorskip("sklearn")
    sys.path.insert(0, str(ROOT / "demo"))
    try:
        digits = importlib.import_module("digits")
    finally:
        sys.path.remove(str(ROOT / "demo"))
    folder = tmp_path_factory.mktemp("digits")
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    splits, shuffle_state = digits.load_splits(), torch.get_rng_state()
    domains = digits.make_domains()
    torch.set_rng_state(shuffle_state)
    shuffle = torch.randperm(digits.SIDE * digits.SIDE)
    encoder = digits.pretrain(domains, splits["pretrain"])
    digits.ROOT = folder
    digits.save_encoder(encoder, Path("base"))
    heads = {name: digits.one_shot_head(encoder, domains[name], splits["pretrain"]) for name in domains}
    digits.finetune(encoder, domains[TARGET], heads[TARGET], splits["finetune"])
    digits.save_encoder(encoder, Path("ft"))
    torch.save({"shuffle": shuffle, "heads": heads, "split": list(splits["validation"])}, folder / "judge.pt")
    (folder / "judge.py").write_text(JUDGE)
    yield digits, folder, digits.Judge(TARGET, domains, heads, splits)
    torch.set_num_threads(threads)


def by_hand(demo: Any, coefficients: dict[int, float]) -> dict[str, float]:
    """Accuracies of base + c(layer) * task vector, in plain torch; c(0) for what lies outside the blocks."""
    digits, folder, judge = demo
    base, ft = (load_file(folder / name / "model.safetensors") for name in ("base", "ft"))
    made = {}
    for name, tensor in base.items():
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
        c = coefficients[0] if layer is None else coefficients[layer]
        made[name] = tensor + torch.tensor(c, dtype=torch.float32) * (ft[name] - tensor)
    encoder = digits.Encoder()
    encoder.load_state_dict(made)
    images, labels = judge.splits["validation"]
    found = {}
    with torch.no_grad():
        for name, domain in judge.domains.items():
            logits = encoder(domain(images)) @ judge.heads[name].mT
            found[name] = 100 * (logits.argmax(-1) == labels).float().mean().item()
    return found


@pytest.mark.slow
def test_the_winner_is_that_of_a_loop_in_plain_torch(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the same grid, with the paper's rule; so are the best of both controls, and the verdict."""
    digits, folder, _ = demo
    monkeypatch.chdir(folder)
    sweep = {
        "recipe": {"base": "base", "ft": "ft"},
        "grid": {"lines.alpha": ALPHAS},
        "evaluate": f"{shlex.quote(sys.executable)} judge.py {{checkpoint}} {shlex.quote(str(ROOT / 'demo'))}",
        "objective": "2 * target / target_ft + mean(control / control_pre)",
    }
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep))
    ran = run_lines("sweep", "--config", "sweep.yaml", "-o", "best", "--json")
    assert ran.code == 0, ran.err
    last = digits.DEPTH - 1
    pre, tuned = by_hand(demo, dict.fromkeys(range(digits.DEPTH), 0.0)), by_hand(demo, dict.fromkeys(range(12), 1.0))

    def score(coefficients: dict[int, float]) -> float:
        found = by_hand(demo, coefficients)
        kept = [found[name] / pre[name] for name in found if name != TARGET]
        return 2 * found[TARGET] / tuned[TARGET] + mean(kept)

    families = {
        "lines": {a: score({n: a + (1 - a) * n / last for n in range(digits.DEPTH)}) for a in ALPHAS},
        "constant": {a: score(dict.fromkeys(range(digits.DEPTH), a)) for a in ALPHAS},
    }
    for family, expected in families.items():
        trials = {
            trial["settings"]["lines.alpha"]: trial["objective"]
            for trial in ran.json["trials"]
            if trial["family"] == family
        }
        assert trials == pytest.approx(expected, rel=1e-6), family
    best = {family: max(of, key=of.__getitem__) for family, of in families.items()}
    assert ran.json["winner"]["lines.alpha"] == best["lines"]
    assert ran.json["families"]["constant"]["best"]["settings"]["lines.alpha"] == best["constant"]
    assert ran.json["objective"] == pytest.approx(families["lines"][best["lines"]])

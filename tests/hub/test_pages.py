"""What docs/hub.md and the workflow of docs/jobs.md say to type, run against a Hub on loopback."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save

from support import pages
from support.hub_server import HubServer, User
from support.run import Ran, run_lines

NAMES = ["model.embed_tokens.weight", *(f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3))]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    config = json.dumps({"model_type": "llama", "num_hidden_layers": 3}).encode()
    with HubServer() as server:
        for seed, name in enumerate(("org/base", "org/ft")):
            made = np.random.default_rng(seed)
            weights = save({name: made.standard_normal((8, 8)).astype(np.float32) for name in NAMES})
            server.push(name, {"config.json": config, "model.safetensors": weights})
        yield server


@pytest.fixture
def user(hub: HubServer, tmp_path: Path) -> User:
    return User(hub, tmp_path / "home")


def run_shell(user: User, *blocks: str, **env: str) -> list[Ran]:
    """Run blocks of shell, which all end with 0: a command of `lines` in this process, where `> FILE` takes what it
    prints, and anything else in a shell.
    """

    def program() -> None:
        ran = []
        for block in blocks:
            if not block.startswith("lines "):
                subprocess.run(["sh", "-ec", block], check=True, stdout=subprocess.DEVNULL)
                continue
            for line in pages.commands(block):
                words = shlex.split(line, comments=True)
                to = words[words.index(">") + 1] if ">" in words else None
                ran.append(run_lines(*words[1 : words.index(">") if to else None]))
                if to:
                    Path(to).write_text(ran[-1].out)
        print(json.dumps([asdict(one) for one in ran]))

    done = user.runs(program, **env)
    assert done.returncode == 0, done.stderr
    found = [Ran(**one) for one in json.loads(done.stdout)]
    for one in found:
        assert (one.code, one.trace) == (0, ""), one.err
    return found


@pytest.mark.slow
def test_the_page_of_the_hub(hub: HubServer, user: User) -> None:
    """Its commands, in their order; and what they leave."""
    blocks = [text for kind, text in pages.blocks("hub.md") if kind == "sh"]
    assert len(run_shell(user, *blocks, HF_TOKEN=hub.token)) == sum(len(list(pages.commands(text))) for text in blocks)
    repository = hub.repositories["org/ft-lines"]
    assert repository.private
    assert repository.refs.keys() == {"main", "smaller"}
    assert "lines_recipe.yaml" in hub.holds("org/ft-lines", "smaller")
    assert "lines_recipe.yaml" in hub.holds("org/ft-0.3")


@pytest.mark.slow
def test_the_workflow(hub: HubServer, user: User) -> None:
    """Every step of it but the install runs as it stands, with its environment; stderr is lines of JSON, and what was
    pushed is what was edited.
    """
    (text,) = (text for kind, text in pages.blocks("jobs.md") if kind == "edit.yaml")
    # `on:` is a boolean to YAML 1.1; GitHub reads it as the word.
    (job,) = yaml.safe_load(text)["jobs"].values()
    steps = {step["name"]: step["run"] for step in job["steps"] if "run" in step}
    assert list(steps) == ["Install", "Edit", "Check", "Read", "Push"]
    del steps["Install"]
    env = {key: re.sub(r"\$\{\{ secrets\.HF_TOKEN \}\}", hub.token, value) for key, value in job["env"].items()}
    found = run_shell(user, *steps.values(), **env)
    folder = user.home.parent
    summary, pushed = (json.loads((folder / name).read_text()) for name in ("summary.json", "pushed.json"))
    assert summary["output"] == pushed["output"] == "out"
    assert pushed["pushed"]["commit"] == hub.repositories["org/ft-lines"].refs["main"]
    assert hub.holds("org/ft-lines")["model.safetensors"] == (folder / "out" / "model.safetensors").read_bytes()
    assert (folder / "hub" / "models--org--base").is_dir()
    for ran in found:
        for line in ran.err.splitlines():
            assert json.loads(line)["schema"] == 1


def test_the_variables_are_those_of_the_options() -> None:
    """The page names each variable with the option that it sets, and the help of an edit names all of them."""
    from lines_cli.cli.options import VARIABLES

    page = (pages.DOCS / "jobs.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `(LINES_\w+)` \| `(--[\w-]+)`", page, re.MULTILINE)) == {
        variable: flag for flag, variable in VARIABLES.items()
    }
    text = " ".join(run_lines("edit", "--help").out.split())
    for flag, variable in VARIABLES.items():
        assert f"env var: {variable}" in text, flag

"""What is measured. A case is a handful of contenders over the same inputs, which run in turn.

The commands are shell lines, run in benchmarks/models, so that each can be repeated by hand there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

from models import Model
from timing import Contender

IMPORT, FLOOR, DIGESTS, MERGEKIT = "import torch", "floor", "floor + digests", "mergekit, best flags"
TEN, ON_DISK, LIVE = "ten times lines edit", "ten on the disk", "ten in a live module"
UNMEASURED, OF_ADAPTER = "lines edit, nothing measured", "lines edit, adapter"

# The fastest and the smallest in memory of those tried on a CPU, with models of 0.5 and 1.7 GB. Asynchronous writing,
# more or fewer threads and the lazy unpickler gain nothing beside small shards; `--multi-gpu` fails without a GPU.
BEST_FLAGS = "--no-copy-tokenizer --no-write-model-card --quiet --out-shard-size 50M"
PEERS = "../.venv-peers/bin"


@dataclass(frozen=True)
class Sizes:
    """How large the models are, and how often each case runs."""

    edit: str = "llama-28-2048"  # 3.3 GB of bf16
    three: str = "llama-24-1536"  # 1.7 GB
    eight: str = "llama-7-1536"  # 0.6 GB
    slow: str = "llama-6-1024"  # 0.3 GB, where mergekit needs half a minute
    huge: str = "huge-4000"
    candidates: str = "llama-28-2048"  # as `edit`
    scaling: tuple[str, ...] = ("llama-7-1024", "llama-14-1536", "llama-56-2048")  # 0.3, 1 and 6 GB, beside `edit`
    rounds: int = 5
    fewer: int = 3
    best_peer: int = 2
    warm_up: bool = True


QUICK = Sizes(
    edit="llama-12-1024",  # 0.5 GB
    three="llama-7-1024",  # 0.3 GB
    eight="llama-4-512",  # 0.1 GB
    slow="llama-2-256",  # 0.04 GB
    huge="huge-400",
    candidates="llama-7-1024",  # 0.3 GB
    scaling=("llama-4-512", "llama-7-1024"),
    rounds=1,
    fewer=1,
    best_peer=1,
    warm_up=False,
)


@dataclass(frozen=True)
class Case:
    """Contenders over the same inputs.

    Args:
        name: what `--only` takes.
        title: its heading in RESULTS.md, with {size} for the bytes of one input.
        models: the inputs.
        contenders: what runs, in turn.
        writes: bytes of tensors in what a contender makes.
        rounds: how often, warm-up apart.
        reference: the contender that all are compared with, beside the floors.
        about: what to know before reading its table.
        recipes: the YAML files that commands name.
        cold: with the inputs dropped from the page cache before every run.
    """

    name: str
    title: str
    models: list[Model]
    contenders: list[Contender]
    writes: int
    rounds: int
    reference: str = ""
    about: str = ""
    recipes: dict[str, str] = field(default_factory=dict)
    cold: bool = False


@dataclass(frozen=True)
class Suite:
    """All cases.

    Args:
        sizes: of models and rounds.
        device: what `--device` of lines is to be.
        peers: whether benchmarks/.venv-peers is there.
    """

    sizes: Sizes
    device: str
    peers: bool

    def cases(self) -> list[Case]:
        """In the order they run: those that read the same models stand together."""
        sizes = self.sizes
        edit, three = self.edit(), self.three()
        eight = [Model("base", sizes.eight), *(Model(f"ft{number}", sizes.eight) for number in range(1, 9))]
        return [
            edit,
            self.realised(),
            self.cold(edit),
            *(self.scaling(shape) for shape in sizes.scaling),
            self.huge(),
            self.edit_fp32(),
            self.adapter(),
            self.pickles(),
            self.fp8(),
            self.fp8_out(),
            self.verify(),
            self.candidates(),
            three,
            self.cold(three),
            self.methods("three-methods", three.models),
            self.kernels(three.models),
            self.inspect_base(three.models[:2]),
            self.inspect_base(three.models),
            self.methods("eight-methods", eight),
            self.ties_peers(),
            self.dare_peers(),
            self.set_peers(),
            self.inspect_headers(),
            self.tiny(),
            self.tensors(),
            self.planning(),
        ]

    # --- lines edit ---

    def edit(self) -> Case:
        models = [Model("base", self.sizes.edit), Model("ft1", self.sizes.edit)]
        return Case(
            "edit",
            "`lines edit`, {size} of bf16",
            models,
            [
                *_floors(models),
                self._lines("lines edit", f"edit {_names(models)} -o out"),
                *self._mergekit("edit.yaml"),
                *self._sd_mecha("sum out 0.1 1.0", models),
                Contender("plain script", f"python ../plain.py {_names(models)} out", rounds=1),
            ],
            writes=models[0].nbytes,
            rounds=self.sizes.rounds,
            reference="lines edit",
            about="mergekit does task arithmetic with one model and a gradient of weights, sd-mecha the same with a "
            "weight for each tensor; `mergekit --help` is what mergekit takes to start. The plain script loads both "
            "models, loops over the tensors and saves.",
            recipes={"edit.yaml": _recipe("task_arithmetic", models, "weight: [0.1, 1.0]")},
        )

    def realised(self) -> Case:
        models = [Model("base", self.sizes.edit), Model("ft1", self.sizes.edit)]
        words = f"edit {_names(models)} -o out"
        return Case(
            "realised",
            "`lines edit` and what rounding leaves, {size} of bf16",
            models,
            [
                *_floors(models),
                Contender(UNMEASURED, f"python ../unmeasured.py {words} --device {self.device} --quiet"),
                self._lines("lines edit", words),
                self._lines("lines edit --rounding stochastic", f"{words} --rounding stochastic"),
            ],
            writes=models[0].nbytes,
            rounds=self.sizes.rounds,
            reference=UNMEASURED,
            about="What it costs to measure the realised coefficient of every layer on the way to the disk, and to "
            "round by a draw.",
        )

    def edit_fp32(self) -> Case:
        models = [Model("base", self.sizes.three, "fp32"), Model("ft1", self.sizes.three, "fp32")]
        return Case(
            "edit-fp32",
            "`lines edit --dtype bfloat16`, from {size} of fp32",
            models,
            [
                *_floors(models, halved=True),
                self._lines("lines edit", f"edit {_names(models)} --dtype bfloat16 -o out"),
            ],
            writes=models[0].nbytes // 2,
            rounds=self.sizes.fewer,
            about="The floor reads both models, and writes half of the bytes of one.",
        )

    def adapter(self) -> Case:
        base, tuned = Model("base", self.sizes.edit), Model("ft1", self.sizes.edit)
        adapter = Model("ft1", self.sizes.edit, "fp32", form="lora")
        peft = f"{PEERS}/python ../peft_merge.py {base.name} {adapter.name} out && sync out/*"
        return Case(
            "adapter",
            "`lines edit` of an adapter, {size} of bf16",
            [base, tuned, adapter],
            [
                *_floors([base, tuned]),
                self._lines("lines edit", f"edit {base.name} {tuned.name} -o out"),
                self._lines(OF_ADAPTER, f"edit {base.name} {adapter.name} -o out"),
                *([Contender("PEFT", peft, rounds=1)] if self.peers else []),
            ],
            writes=base.nbytes,
            rounds=self.sizes.rounds,
            reference="lines edit",
            about="An adapter of rank 16 on every matrix of the layers, in float32, beside a fine-tune of full size; "
            "each edit reads its own two inputs, and the floors read those of the latter. PEFT loads model and "
            "adapter, merges and saves, with no coefficient for the layers.",
        )

    def pickles(self) -> Case:
        models = [Model("base", self.sizes.three), Model("ft1", self.sizes.three)]
        pickles = [replace(model, form="bin") for model in models]
        return Case(
            "pickles",
            "`lines edit`, from {size} of `pytorch_model.bin`",
            [*models, *pickles],
            [
                *_floors(models),
                self._lines("lines edit", f"edit {_names(models)} -o out"),
                self._lines("lines edit, from .bin", f"edit {_names(pickles)} -o out"),
            ],
            writes=models[0].nbytes,
            rounds=self.sizes.fewer,
            reference="lines edit",
            about="The same tensors as safetensors, and as torch.save wrote them; the outputs are the same bytes.",
        )

    def fp8(self) -> Case:
        models = [Model("base", self.sizes.edit), Model("ft1", self.sizes.edit)]
        codes = [Model(model.role, model.shape, "fp8") for model in models]
        return Case(
            "fp8",
            "`lines edit` of FP8, beside {size} of bf16",
            [*models, *codes],
            [
                *_floors(models),
                self._lines("lines edit", f"edit {_names(models)} -o out"),
                self._lines("lines edit, an FP8 base", f"edit {codes[0].name} {models[1].name} -o out"),
                self._lines("lines edit, both in FP8", f"edit {_names(codes)} -o out"),
            ],
            writes=models[0].nbytes,
            rounds=self.sizes.fewer,
            reference="lines edit",
            about="The same numbers in bf16, and as codes with a scale for each block. The output is bf16.",
        )

    def fp8_out(self) -> Case:
        codes = [Model("base", self.sizes.edit, "fp8"), Model("ft1", self.sizes.edit, "fp8")]
        return Case(
            "fp8-out",
            "`lines edit --dtype fp8`, {size} of FP8",
            codes,
            [
                *_floors(codes),
                self._lines("lines edit --dtype fp8", f"edit {_names(codes)} --dtype fp8 -o out"),
            ],
            writes=codes[0].nbytes,
            rounds=self.sizes.fewer,
            about="Scales are measured in a pass of their own: the inputs are read and computed with twice.",
        )

    def verify(self) -> Case:
        models = [Model("base", self.sizes.edit), Model("ft1", self.sizes.edit)]
        edit = self._lines("lines edit", f"edit {_names(models)} -o out")
        return Case(
            "verify",
            "`lines verify`, beside the edit that made it, {size} of bf16",
            models,
            [
                *_floors(models),
                edit,
                Contender(
                    "lines edit, then lines verify",
                    f"{edit.command} && lines verify out --device {self.device} --quiet",
                ),
            ],
            writes=models[0].nbytes,
            rounds=self.sizes.fewer,
            reference="lines edit",
            about="Verifying reads both inputs and the output, computes and takes digests as the edit does, and writes "
            "nothing. Each row begins with nothing there: the last one holds both commands, and imports torch twice.",
        )

    def candidates(self) -> Case:
        models = [Model("base", self.sizes.candidates), Model("ft1", self.sizes.candidates)]
        alphas = [number / 10 for number in range(10, 0, -1)]
        words = f"{_names(models)} --alpha $alpha -o out --device {self.device} --quiet"
        program = f"python ../candidates.py {_names(models)} --device {self.device}"
        sweep = {
            "recipe": {"base": models[0].name, "ft": models[1].name},
            "grid": {"lines.alpha": alphas},
            "evaluate": "echo '{\"said\": 1}' # {checkpoint}",
            "objective": "said",
            "controls": False,
        }
        return Case(
            "candidates",
            "Ten candidates of an edit, {size} of bf16",
            models,
            [
                *_floors(models),
                Contender(
                    TEN,
                    f"for alpha in {' '.join(map(str, alphas))}; do rm -rf out; lines edit {words}; done",
                    imports_torch=False,
                ),
                Contender(ON_DISK, f"{program} --disk out", imports_torch=False),
                Contender(LIVE, program, imports_torch=False, writes=False),
                Contender(
                    "lines sweep",
                    f"rm -rf out.sweep; lines sweep --config candidates.yaml -o out --device {self.device} --quiet",
                    imports_torch=False,
                ),
            ],
            writes=models[0].nbytes,
            rounds=self.sizes.fewer,
            reference=TEN,
            about="The floor reads both models and writes one. Candidates are for an evaluation: no digests are taken "
            "of them, and they are not flushed to the disk. Importing torch counts, ten times for ten edits; in a live "
            "module loading the base into it counts, and putting that back at the end. `lines sweep` evaluates with "
            "`echo`, and writes its winner as an edit does.",
            recipes={"candidates.yaml": json.dumps(sweep)},
        )

    def scaling(self, shape: str) -> Case:
        models = [Model("base", shape), Model("ft1", shape)]
        return Case(
            f"scaling-{models[0].nbytes / 1e9:.1f}",
            "`lines edit`, {size} of bf16",
            models,
            [*_floors(models), self._lines("lines edit", f"edit {_names(models)} -o out")],
            writes=models[0].nbytes,
            rounds=self.sizes.fewer,
        )

    def huge(self) -> Case:
        models = [Model("base", self.sizes.huge), Model("ft1", self.sizes.huge)]
        return Case(
            "huge",
            "`lines edit`: a single tensor of {size}",
            models,
            [*_floors(models), self._lines("lines edit", f"edit {_names(models)} --alpha 0.5 --beta 0 -o out")],
            writes=models[0].nbytes,
            rounds=self.sizes.fewer,
        )

    def tiny(self) -> Case:
        models = [Model("base", "tiny-100000"), Model("ft1", "tiny-100000")]
        plan_only = f"lines edit {_names(models)} -o out --dry-run"
        return Case(
            "tiny",
            "`lines edit`: 100,000 tiny tensors in one file",
            models,
            [
                *_floors(models),
                self._lines("lines edit", f"edit {_names(models)} -o out"),
                Contender("lines edit --dry-run", plan_only, imports_torch=False, writes=False),
            ],
            writes=models[0].nbytes,
            rounds=self.sizes.fewer,
            about="64 entries each, so that names are all there is to it. `--dry-run` only plans.",
        )

    def tensors(self) -> Case:
        models = [Model("base", "moe-60-384"), Model("ft1", "moe-60-384")]
        plan_only = f"lines edit {_names(models)} -o out --dry-run"
        return Case(
            "tensors",
            "`lines edit`: the 46,503 tensors of 384 experts in 60 layers",
            models,
            [
                *_floors(models),
                self._lines("lines edit", f"edit {_names(models)} -o out"),
                Contender("lines edit --dry-run", plan_only, imports_torch=False, writes=False),
            ],
            writes=models[0].nbytes,
            rounds=self.sizes.fewer,
            about="64 entries each: what a tensor takes above its bytes is what `lines edit` takes beside `--dry-run` "
            "and importing torch, divided by their number.",
        )

    # --- lines merge ---

    def three(self) -> Case:
        models = [Model(role, self.sizes.three) for role in ("base", "ft1", "ft2", "ft3")]
        return Case(
            "three",
            "`lines merge`: task arithmetic of three, {size} each",
            models,
            [
                *_floors(models),
                self._merge("lines task_arithmetic", "three.yaml"),
                *self._mergekit("three.yaml"),
                *self._sd_mecha("sum out 0.3 0.8", models),
            ],
            writes=models[0].nbytes,
            rounds=self.sizes.rounds,
            reference="lines task_arithmetic",
            about="lines and mergekit read the same file: the weight grows over the layers.",
            recipes={"three.yaml": _recipe("task_arithmetic", models, "weight: [0.3, 0.8]")},
        )

    def methods(self, name: str, models: list[Model]) -> Case:
        """Every method, with LiNeS on top."""
        settings = {
            "task_arithmetic": ("task_arithmetic", "", 0.3),
            "average": ("average", "", 0.3),
            "consensus": ("consensus", "", 0.3),
            "dare_linear": ("dare_linear", "density: 0.2", 0.3),
            "ties by tensor": ("ties", "density: 0.2, trim: tensor", 0.3),
            "ties": ("ties", "density: 0.2", 0.3),
            "ties, alpha auto": ("ties", "density: 0.2", "auto"),
        }
        recipes = {
            f"{name}-{label.replace(',', '').replace(' ', '-')}.yaml": _recipe(
                method, models, parameters, f"lines: {{alpha: {alpha}, beta: 0.5}}"
            )
            for label, (method, parameters, alpha) in settings.items()
        }
        word = {4: "three", 9: "eight"}[len(models)]
        return Case(
            name,
            f"`lines merge`: every method, {word} fine-tunes, {{size}} each",
            models,
            [
                *_floors(models),
                *(self._merge(f"lines {label}", file) for label, file in zip(settings, recipes, strict=True)),
            ],
            writes=models[0].nbytes,
            rounds=self.sizes.fewer,
            reference="lines task_arithmetic",
            about="Density 0.2 where a method has one; LiNeS on top, alpha 0.3 where it is not `auto`, beta 0.5.",
            recipes=recipes,
        )

    def kernels(self, models: list[Model]) -> Case:
        recipes = {
            "kernels-task-arithmetic.yaml": _recipe("task_arithmetic", models, "", "lines: {alpha: 0.3, beta: 0.5}"),
            "kernels-ties.yaml": _recipe("ties", models, "density: 0.2", "lines: {alpha: 0.3, beta: 0.5}"),
            "kernels-consensus.yaml": _recipe("consensus", models, "", "lines: {alpha: 0.3, beta: 0.5}"),
        }

        def by_turns(method: str) -> list[Contender]:
            command = f"lines merge --config kernels-{method}.yaml -o out --device {self.device}"
            return [
                Contender(f"lines {method}, {what}", f"env LINES_FAST={number} {command}")
                for number, what in enumerate(("plain", "kernels"))
            ]

        return Case(
            "kernels",
            "`lines merge` with compiled kernels and without, three fine-tunes, {size} each",
            models,
            [
                self._merge("lines task_arithmetic", "kernels-task-arithmetic.yaml"),
                *by_turns("ties"),
                *by_turns("consensus"),
            ],
            writes=models[0].nbytes,
            rounds=self.sizes.fewer,
            reference="lines task_arithmetic",
            about="Loading numba and the kernels is part of the seconds, and so is compiling them where nobody has.",
            recipes=recipes,
        )

    def ties_peers(self) -> Case:
        models = [Model(role, self.sizes.slow) for role in ("base", "ft1", "ft2", "ft3")]
        return Case(
            "ties-peers",
            "TIES of three beside its peers, {size} each",
            models,
            [
                *_floors(models),
                self._merge("lines ties by tensor", "ties.yaml --set parameters.trim=tensor"),
                self._merge("lines ties", "ties.yaml"),
                *self._mergekit("ties.yaml"),
                *self._sd_mecha("ties out 0.3 0.3", models),
            ],
            writes=models[0].nbytes,
            rounds=self.sizes.fewer,
            reference="lines ties by tensor",
            about="Small models, because mergekit sorts every tensor. The peers trim each tensor by itself, as `trim: "
            "tensor` does; plain `ties` trims over the whole model, which neither of them can. sd-mecha elects by the "
            "number of signs: its work is alike, its result is not.",
            recipes={"ties.yaml": _recipe("ties", models, "density: 0.2, weight: 0.3, normalize: false")},
        )

    def dare_peers(self) -> Case:
        models = [Model(role, self.sizes.slow) for role in ("base", "ft1", "ft2", "ft3")]
        return Case(
            "dare-peers",
            "DARE of three beside mergekit, {size} each",
            models,
            [
                *_floors(models),
                self._merge("lines dare_linear", "dare.yaml"),
                *self._mergekit("dare.yaml"),
            ],
            writes=models[0].nbytes,
            rounds=self.sizes.fewer,
            reference="lines dare_linear",
            recipes={"dare.yaml": _recipe("dare_linear", models, "density: 0.2, weight: 0.3")},
        )

    def set_peers(self) -> Case:
        """What else mergekit has, each once, beside it; and halves of two models stacked."""
        models = [Model(role, self.sizes.slow) for role in ("base", "ft1", "ft2", "ft3")]
        layers = int(self.sizes.slow.split("-")[1])
        methods = {
            "nuslerp": (2, "weight: 0.5"),
            "multislerp": (3, "weight: 0.3"),
            "karcher": (3, ""),
            "model_stock": (3, ""),
            "della_linear": (3, "weight: 0.3, density: 0.5"),
            "sce": (3, "select_topk: 0.5"),
            "ram": (3, ""),
            "nearswap": (1, "t: 0.001"),
            "arcee_fusion": (1, ""),
        }
        bf16 = "dtype: bfloat16\nout_dtype: bfloat16"  # without the second mergekit's arcee_fusion writes float32
        recipes = {f"{name}.yaml": _recipe(name, models[: 1 + n], said, bf16) for name, (n, said) in methods.items()}
        parts = ((models[1].name, 0, layers // 2), (models[2].name, layers // 2, layers))
        slices = "".join(f"  - sources: [{{model: {m}, layer_range: [{a}, {b}]}}]\n" for m, a, b in parts)
        recipes["stack.yaml"] = f"merge_method: passthrough\nslices:\n{slices}dtype: bfloat16\n"
        contenders = []
        for file in recipes:
            name = file.removesuffix(".yaml")
            contenders.append(self._merge(f"lines {name}", file))
            if self.peers:
                program = f"{PEERS}/mergekit-yaml {file} out {BEST_FLAGS} && sync out/*"
                contenders.append(Contender(f"mergekit {name}, best flags", program, rounds=1))
        return Case(
            "set-peers",
            "mergekit's other methods beside it, {size} each",
            models,
            [*_floors(models), *contenders],
            writes=models[0].nbytes,
            rounds=self.sizes.fewer,
            reference="lines model_stock",
            about="One file for both. Three fine-tunes; nuslerp has two, nearswap and arcee_fusion one. `stack` is the "
            "first half of one model's layers and the second half of another's, by passthrough.",
            recipes=recipes,
        )

    # --- lines inspect, and planning ---

    def inspect_headers(self) -> Case:
        model = Model("base", "headers-1000")
        return Case(
            "inspect-headers",
            "`lines inspect`: headers of 1,000 tensors in 50 shards",
            [model],
            [
                Contender("python, doing nothing", "python -c pass", imports_torch=False, writes=False),
                Contender("lines inspect", f"lines inspect {model.name}", imports_torch=False, writes=False),
            ],
            writes=0,
            rounds=self.sizes.rounds,
            about="The tensors have no entries: nothing but headers is there to be read. torch is not imported.",
        )

    def inspect_base(self, models: list[Model]) -> Case:
        base, *tuned = models
        cat = f"cat {_files(models)} > /dev/null"
        return Case(
            f"inspect-base-{len(tuned)}",
            f"`lines inspect --base`, fine-tunes: {len(tuned)}, {{size}} each",
            models,
            [
                Contender(IMPORT, "python -c 'import torch'", reads=False, writes=False),
                Contender(FLOOR, cat, imports_torch=False, writes=False),
                replace(self._lines("lines inspect", f"inspect {_names(tuned)} --base {base.name}"), writes=False),
            ],
            writes=0,
            rounds=self.sizes.fewer,
            about="The floor is `cat` of the same files to /dev/null.",
        )

    def planning(self) -> Case:
        program = f"python ../plan.py --rounds {self.sizes.rounds}"
        return Case(
            "planning",
            "Planning, 100,000 tensor names",
            [],
            [Contender("plan.py", program, reads=False, writes=False, prints=True)],
            writes=0,
            rounds=1,
            about="In one process, step by step; `open_inputs` reads the headers.",
        )

    # --- what they are made of ---

    def cold(self, case: Case) -> Case:
        """The floors and lines once more, from the disk."""
        return replace(
            case,
            name=f"{case.name}-cold",
            title=f"{case.title}, cold",
            contenders=[c for c in case.contenders if c.name in (IMPORT, FLOOR, DIGESTS) or c.name.startswith("lines")],
            rounds=self.sizes.fewer,
            about="Before every run the inputs were dropped from the page cache, and mincore told that they were gone; "
            "Python and torch stayed in it. A virtual machine's host may still have held them.",
            cold=True,
        )

    def _lines(self, name: str, words: str) -> Contender:
        return Contender(name, f"lines {words} --device {self.device} --quiet")

    def _merge(self, name: str, recipe: str) -> Contender:
        return self._lines(name, f"merge --config {recipe} -o out")

    def _mergekit(self, recipe: str) -> list[Contender]:
        """The same by mergekit: doing nothing, at its best, and with its defaults.

        Its defaults but for the model card, for which it asks the network whether the models are on the Hub.
        """
        program = f"{PEERS}/mergekit-yaml {recipe} out"
        peers = [
            Contender("mergekit --help", f"{PEERS}/mergekit-yaml --help", rounds=1, reads=False, writes=False),
            Contender(MERGEKIT, f"{program} {BEST_FLAGS} && sync out/*", rounds=self.sizes.best_peer),
            Contender("mergekit, defaults", f"{program} --no-write-model-card && sync out/*", rounds=1),
        ]
        return peers if self.peers else []

    def _sd_mecha(self, words: str, models: list[Model]) -> list[Contender]:
        program = f"{PEERS}/python ../sd_mecha_merge.py {words} {_names(models)}"
        return [Contender("sd-mecha", f"{program} && sync out/*", rounds=1)] if self.peers else []


def _floors(models: list[Model], *, halved: bool = False) -> list[Contender]:
    """What importing torch takes; and what the disk takes, without digests and with them.

    All inputs but one are read, that one is copied (or half of it, and the rest read), and the copy is made durable.
    Digests are taken of a file while it is being flushed and the next one is being copied, because that was faster
    than one after the other.
    """
    *others, last = models
    shard, out = '"$f"', '"out/${f##*/}"'
    copy = f"cp {shard} {out}"
    if halved:
        dd = f"dd status=none bs=1M if={shard}"
        copy = f"n=$(($(wc -c < {shard}) / 2097152)); {dd} of={out} count=$n; {dd} of=/dev/null skip=$n"
    begin = f"cat {_files(others)} > /dev/null; mkdir out; for f in {last.name}/*.safetensors; do {copy};"
    digests = f"{begin} python -ISE ../tree_digest.py {out} & sync {out} & done; wait"
    return [
        Contender(IMPORT, "python -c 'import torch'", reads=False, writes=False),
        Contender(FLOOR, f"{begin} done; sync out/*", imports_torch=False, writes=not halved),
        Contender(DIGESTS, digests, imports_torch=False, writes=not halved),
    ]


def _recipe(method: str, models: list[Model], parameters: str = "", last_line: str = "dtype: bfloat16") -> str:
    """The YAML of a merge; mergekit reads it, too, where it says nothing of `lines`."""
    base, *tuned = models
    listed = "".join(f"  - model: {model.name}\n" for model in tuned)
    given = f"parameters: {{{parameters}}}\n" if parameters else ""
    return f"merge_method: {method}\nbase_model: {base.name}\nmodels:\n{listed}{given}{last_line}\n"


def _names(models: list[Model]) -> str:
    return " ".join(model.name for model in models)


def _files(models: list[Model]) -> str:
    return " ".join(f"{model.name}/*.safetensors" for model in models)

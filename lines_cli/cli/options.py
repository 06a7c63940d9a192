"""Options that commands share, each declared once: its flag, its help, its panel. An option that is not given is
None.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

INSPECTING, RECIPE, ADAPTER, SCALING = "Inspecting", "Recipe", "Adapter", "Scaling"
DISAGREE, OUTPUT, HUB, RECOVERY, MACHINE = "When the inputs disagree", "Output", "The Hub", "Recovery", "Machine"
PANELS = (INSPECTING, RECIPE, ADAPTER, SCALING, DISAGREE, OUTPUT, HUB, RECOVERY, MACHINE)
"""What options are shown under, in this order."""

VARIABLES = {
    flag: f"LINES_{flag[2:].replace('-', '_').upper()}"
    for flag in ("--workers", "--device", "--gpu-memory", "--cache", "--quiet", "--log-json")
}
"""Options whose default a variable in the environment sets: those that change no byte of any output."""


def _starting(*words: str) -> Callable[[str], list[str]]:
    """What a shell offers, where not only these words can be said."""

    def starting(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return starting


Base = Annotated[
    str | None,
    typer.Argument(
        metavar="BASE",
        show_default=False,
        help="The pre-trained checkpoint: a file (.safetensors, .pt, .bin, ...), a folder, or a Hub id (org/name, "
        "org/name@revision).",
    ),
]
FineTune = Annotated[
    str | None,
    typer.Argument(
        metavar="FT",
        show_default=False,
        help="The fine-tuned checkpoint, in any of the same forms; it may be sharded differently.",
    ),
]
WholeFineTune = Annotated[
    str,
    typer.Argument(
        metavar="FT",
        help="The fine-tuned checkpoint: a .safetensors file, a folder, or a Hub id (org/name, org/name@revision).",
    ),
]
OfBase = Annotated[
    str,
    typer.Option(
        "--base",
        metavar="BASE",
        help="What it was fine-tuned from, in any of the same forms.",
        rich_help_panel=ADAPTER,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="ADAPTER",
        show_default=False,
        help="In place of BASE and FT: a PEFT adapter, which is scaled as it is. OUT is an adapter, too.",
        rich_help_panel=ADAPTER,
    ),
]
BaseOfAdapter = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="BASE",
        show_default="the folder that the adapter's config names, if it is here",
        help="Of --adapter: what it was trained on. Its headers are read, no weights (but of tensors that the adapter "
        "holds whole).",
        rich_help_panel=ADAPTER,
    ),
]
NumLayers = Annotated[
    list[str] | None,
    typer.Option(
        "--num-layers",
        metavar="L",
        show_default=False,
        help="How many layers the base has, where it is not named; NAME=L for each stack of several. Repeatable.",
        rich_help_panel=ADAPTER,
    ),
]
AsAdapter = Annotated[
    bool,
    typer.Option(
        "--as-adapter",
        help="Merge adapters into an adapter: a weighted sum exactly, their ranks side by side. No base is read.",
        rich_help_panel=ADAPTER,
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        "--rank",
        metavar="R",
        min=1,
        show_default=False,
        help="The rank of every module at most: the nearest of that rank is taken.",
        rich_help_panel=ADAPTER,
    ),
]
Energy = Annotated[
    float | None,
    typer.Option(
        "--energy",
        metavar="SHARE",
        show_default=False,
        help="In place of --rank: each module gets the smallest rank that keeps this share of its squared update, as "
        "0.95.",
        rich_help_panel=ADAPTER,
    ),
]
SaveRest = Annotated[
    bool,
    typer.Option(
        "--save-rest",
        help="Also store, whole, what changed and is no matrix: embeddings, norms, biases (PEFT's modules_to_save).",
        rich_help_panel=ADAPTER,
    ),
]
Checkpoints = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CHECKPOINT",
        show_default=False,
        help="What to inspect, in any of the forms that lines edit takes; with --base one fine-tune or several.",
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="BASE",
        show_default=False,
        help="What they were fine-tuned from: reads all weights and shows what changed.",
        rich_help_panel=INSPECTING,
    ),
]
MergeToInspect = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        show_default=False,
        help="Inspect the models of this recipe against its base, with its coefficients; and measure what alpha: auto "
        "is with its method.",
        rich_help_panel=INSPECTING,
    ),
]
AlphaOrAuto = Annotated[
    str | None,
    typer.Option(
        "--alpha",
        metavar="FLOAT",
        show_default="0.1; of several fine-tunes auto, which is 1/N",
        help="Coefficient of the first block, and of everything outside the blocks.",
        rich_help_panel=SCALING,
    ),
]
JsonReport = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print everything as one JSON object on stdout.",
        rich_help_panel=OUTPUT,
    ),
]
NoProgress = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="No progress.",
        envvar=VARIABLES["--quiet"],
        rich_help_panel=OUTPUT,
    ),
]
Tensors = Annotated[
    bool,
    typer.Option(
        "--tensors",
        help="List every tensor.",
        rich_help_panel=INSPECTING,
    ),
]
Full = Annotated[
    bool,
    typer.Option(
        "--full",
        help="Show every layer of a deep model, and every name of a long list.",
        rich_help_panel=INSPECTING,
    ),
]
Check = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Read all weights, and fail (exit code 5) on NaN, Inf, values that a narrower dtype cannot hold, tensors "
        "of zeros or of size 0, duplicates, and files of an output of lines that are not as it wrote them.",
        rich_help_panel=INSPECTING,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE",
        show_default=False,
        help="Also draw it: FILE ends in .html, for a page with figures and tables; or in .svg or .png, which needs "
        "matplotlib.",
        rich_help_panel=INSPECTING,
    ),
]

Config = Annotated[
    Path,
    typer.Option(
        "--config",
        metavar="FILE",
        help="The recipe, in YAML. Relative paths in it count from its own folder.",
        rich_help_panel=RECIPE,
    ),
]
SweepConfig = Annotated[
    Path,
    typer.Option(
        "--config",
        metavar="FILE",
        help="The sweep, in YAML: recipe, grid, evaluate, objective. Relative paths in it count from its own folder.",
        rich_help_panel=RECIPE,
    ),
]
OutputOfSweep = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="OUT",
        show_default=False,
        help="A folder for the winner. Trials, logs and report stand beside it, in OUT.sweep. --dry-run needs none.",
        rich_help_panel=OUTPUT,
    ),
]
Parallel = Annotated[
    int | None,
    typer.Option(
        "--parallel",
        min=1,
        max=1000,
        metavar="N",
        show_default="1; on Ray, of a grid, as many as there is room for",
        help="How many evaluations run at a time; where there are CUDA devices, each is given one of them.",
        rich_help_panel=MACHINE,
    ),
]
Retry = Annotated[
    bool,
    typer.Option(
        "--retry",
        help="Evaluate once more what failed before.",
        rich_help_panel=RECOVERY,
    ),
]
ForceSweep = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace an existing output, once the new one is whole; discard the trials of another sweep.",
        rich_help_panel=OUTPUT,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        show_default=False,
        help="Overrule the recipe, as in --set lines.beta=0.4 or --set models.0.parameters.weight=0.3. Repeatable.",
        rich_help_panel=RECIPE,
    ),
]

Alpha = Annotated[
    float | None,
    typer.Option(
        "--alpha",
        show_default="0.1",
        help="Coefficient of the first block, and of everything outside the blocks.",
        rich_help_panel=SCALING,
    ),
]
AlphaIfAsked = Annotated[
    float | None,
    typer.Option(
        "--alpha",
        show_default="0.1 where another of these is given; else nothing is scaled",
        help="Coefficient of the first block, and of everything outside the blocks.",
        rich_help_panel=SCALING,
    ),
]
Beta = Annotated[
    float | None,
    typer.Option(
        "--beta",
        show_default="1 - alpha",
        help="What depth adds: the last block's coefficient is alpha + beta.",
        rich_help_panel=SCALING,
    ),
]
Gamma = Annotated[
    float | None,
    typer.Option(
        "--gamma",
        show_default="1",
        help="Multiplies the coefficients that alpha and beta give (WiSE-FT's mixing weight).",
        rich_help_panel=SCALING,
    ),
]
Schedule = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        autocompletion=_starting(
            "linear", "power:", "constant", "reversed", "unet", "cosine", "sigmoid", "esm", "larv", "larv-tanh"
        ),
        metavar="RULE",
        show_default="linear",
        help="How the coefficient grows with depth: linear, power:P, cosine, sigmoid, constant, reversed (it falls: "
        "the control for linear), unet (up to the middle, down again); by what is measured of the weights: esm, larv, "
        "larv-tanh; or the coefficients themselves, first layer to last, as in 0.1,0.6,1.0.",
        rich_help_panel=SCALING,
    ),
]
Outside = Annotated[
    Literal["alpha", "position", "base", "keep"] | None,
    typer.Option(
        "--outside",
        show_default="alpha",
        help="What lies outside the blocks gets alpha; alpha before them and alpha + beta behind them (position); "
        "0 (base); or 1 (keep).",
        rich_help_panel=SCALING,
    ),
]
Stack = Annotated[
    list[str] | None,
    typer.Option(
        "--stack",
        metavar="NAME=RULE",
        show_default=False,
        help="One stack's own alpha,beta; or keep (coefficient 1), or base (0). NAME is any dotted part of its name "
        "that no other has. Repeatable.",
        rich_help_panel=SCALING,
    ),
]
Filter = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        metavar="PATTERN=VALUE",
        show_default=False,
        help="The coefficient of every tensor whose name contains PATTERN: a number, keep or base. The last word over "
        "all; of several, the first that matches. Repeatable.",
        rich_help_panel=SCALING,
    ),
]
Component = Annotated[
    list[str] | None,
    typer.Option(
        "--component",
        metavar="NAME[=RULE]",
        show_default="all but codecs and filters",
        help="Of a pipeline, edit this component and no other that is not named, too; its own alpha,beta may follow. "
        "NAME=keep or NAME=base takes it as the fine-tune or the base has it. Repeatable.",
        rich_help_panel=SCALING,
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        "--layers",
        metavar="REGEX",
        show_default=False,
        help="Where a name holds its layer's number, if that cannot be found: "
        "group `index` (and `index2`, for blocks in stages), and group `stack` for more than one stack.",
        rich_help_panel=SCALING,
    ),
]
Series = Annotated[
    list[str] | None,
    typer.Option(
        "--series",
        metavar="A,B,C",
        show_default=False,
        help="Stacks that run one after the other, in this order, as one; reversed(NAME) runs against its numbers. "
        "A NAME may also be any numbered list, or a module that is one layer. Repeatable.",
        rich_help_panel=SCALING,
    ),
]
NotLayers = Annotated[
    str | None,
    typer.Option(
        "--not-layers",
        metavar="REGEX",
        show_default=False,
        help="Names in which it is found lie outside the blocks.",
        rich_help_panel=SCALING,
    ),
]

Prefix = Annotated[
    str | None,
    typer.Option(
        "--prefix",
        metavar="PREFIX",
        show_default="found",
        help="What the names of one side begin with, and those of the other do not, as vision_model. where a "
        "vision tower was saved by itself; A=B if the names of the other side begin with B instead; empty for nothing.",
        rich_help_panel=DISAGREE,
    ),
]
Missing = Annotated[
    Literal["ft", "copy", "skip"] | None,
    typer.Option(
        "--missing",
        show_default="an error",
        help="A tensor that one side lacks: keep the fine-tune's set of tensors, as for a new head (ft); copy it from "
        "the side that has it; or skip it.",
        rich_help_panel=DISAGREE,
    ),
]
MissingInBlocks = Annotated[
    int | None,
    typer.Option(
        "--missing-in-blocks",
        metavar="N",
        min=0,
        show_default="an error",
        help="So many of the tensors that one side lacks lie inside blocks, and are really its own: --missing alone "
        "does not settle these.",
        rich_help_panel=DISAGREE,
    ),
]
Resize = Annotated[
    Literal["ft", "base"] | None,
    typer.Option(
        "--resize",
        show_default="an error",
        help="Token embeddings and heads with different numbers of rows, or of other tokens: keep the rows of ft or of "
        "base. Shared rows are edited, rows that only the kept side has are copied, all others dropped. Where the "
        "tokenizers number tokens differently, rows are paired by token.",
        rich_help_panel=DISAGREE,
    ),
]
Variant = Annotated[
    str | None,
    typer.Option(
        "--variant",
        metavar="NAME",
        show_default="the weights without one",
        help="Of a folder with several sets of weights the one of this name, as fp16 in model.fp16.safetensors.",
        rich_help_panel=DISAGREE,
    ),
]
AllowNonfinite = Annotated[
    bool,
    typer.Option(
        "--allow-nonfinite",
        show_default="an error",
        help="Let NaN, Inf and overflow through, and say where they are.",
        rich_help_panel=DISAGREE,
    ),
]

Output = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="OUT",
        show_default=False,
        help="A folder that loads as it is, with config and tokenizer; or one file, if it ends in .safetensors. Either "
        "may be a URL (s3://, gs://, az://). --dry-run needs none.",
        rich_help_panel=OUTPUT,
    ),
]
OutputAdapter = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="ADAPTER",
        show_default=False,
        help="A folder, as PEFT loads it. --dry-run needs none.",
        rich_help_panel=OUTPUT,
    ),
]
Cleaned = Annotated[str, typer.Argument(metavar="OUT", help="The destination that the run was to write.")]
Verified = Annotated[
    str,
    typer.Argument(
        metavar="OUT",
        help="What lines wrote: a folder, a .safetensors file, a Hub id (org/name, org/name@revision), or a URL (s3://).",
    ),
]
RecipeOf = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        show_default="OUT/lines_recipe.yaml",
        help="The recipe that made it. A single .safetensors file needs this: it holds no recipe.",
        rich_help_panel=RECIPE,
    ),
]
Elsewhere = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="NAME=PATH",
        show_default=False,
        help="Where an input is, if it is not where the recipe says. NAME is its name in the recipe, or the last "
        "part of that. Repeatable.",
        rich_help_panel=RECIPE,
    ),
]
ResumeVerify = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Keep the progress in a hidden file beside OUT, and continue from it.",
        rich_help_panel=RECOVERY,
    ),
]
JsonVerified = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print what was found as JSON on stdout.",
        rich_help_panel=OUTPUT,
    ),
]
MaybeOutput = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="OUT",
        show_default="the recipe's output",
        help="A folder that loads as it is, with config and tokenizer; or one file, if it ends in .safetensors. Either "
        "may be a URL (s3://, gs://, az://). --dry-run needs none.",
        rich_help_panel=OUTPUT,
    ),
]
PlannedOutput = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="OUT",
        show_default="the recipe's output",
        help="The destination: a folder, or one file, if it ends in .safetensors; or a folder in an object store "
        "(s3://, gs://, az://).",
        rich_help_panel=OUTPUT,
    ),
]
PlanFile = Annotated[
    str,
    typer.Option(
        "--plan",
        metavar="FILE",
        help="Where to write the plan: a file, or a URL in an object store. Relative paths in it count from its own "
        "folder.",
        rich_help_panel=OUTPUT,
    ),
]
Parts = Annotated[
    int | None,
    typer.Option(
        "--parts",
        metavar="N",
        show_default="one for each 4 GiB of the output",
        help="Into how many parts each stage is cut, or fewer, where there is less to cut.",
        rich_help_panel=MACHINE,
    ),
]
ForceAtLast = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace an existing output, when lines finish has the new one whole.",
        rich_help_panel=OUTPUT,
    ),
]
JsonPlan = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print what plan.json says on stdout, too.",
        rich_help_panel=OUTPUT,
    ),
]
On = Annotated[
    str | None,
    typer.Option(
        "--on",
        metavar="ray[://HOST:PORT]",
        show_default="this process",
        help="Do it in parts, as tasks of a Ray cluster that sees the same disk or store: the one at this address, or "
        "that RAY_ADDRESS names, or that runs here. --workers is then how many CPUs each part takes (1).",
        rich_help_panel=MACHINE,
    ),
]
OnForSweep = Annotated[
    str | None,
    typer.Option(
        "--on",
        metavar="ray[://HOST:PORT]",
        show_default="this machine",
        help="Run trials as tasks of a Ray cluster that sees the same disk: the one at this address, or that "
        "RAY_ADDRESS names, or that runs here. --workers is then how many CPUs each takes (1); with --device cuda it "
        "takes a GPU.",
        rich_help_panel=MACHINE,
    ),
]
ThePlan = Annotated[str, typer.Argument(metavar="PLAN", help="What lines plan wrote: a file, or its URL.")]
PartOfPlan = Annotated[
    str | None,
    typer.Option(
        "--part",
        metavar="I/N",
        show_default="all that are not done",
        help="Which part, of how many: 3/16; or several: 3-5/16 or 1,4/16.",
        rich_help_panel=MACHINE,
    ),
]
DtypeOfFactors = Annotated[
    Literal["float64", "float32", "float16", "bfloat16"] | None,
    typer.Option(
        "--dtype",
        show_default="float32; what is stored whole as the fine-tune has it",
        help="Write every float tensor as this.",
        rich_help_panel=OUTPUT,
    ),
]
Dtype = Annotated[
    Literal["float64", "float32", "float16", "bfloat16", "fp8"] | None,
    typer.Option(
        "--dtype",
        show_default="the fine-tune's, tensor by tensor",
        help="Write every float tensor as this; fp8: those that an input stores in 8 bits, as it does.",
        rich_help_panel=OUTPUT,
    ),
]
DtypeToForesee = Annotated[
    Literal["float64", "float32", "float16", "bfloat16"] | None,
    typer.Option(
        "--dtype",
        show_default="the fine-tune's, tensor by tensor",
        help="Of what an edit would write: say what rounding to this leaves of the coefficients.",
        rich_help_panel=OUTPUT,
    ),
]
Rounding = Annotated[
    Literal["nearest", "stochastic"] | None,
    typer.Option(
        "--rounding",
        show_default="nearest",
        help="How a result is rounded to the output's dtype: to the nearest number; or stochastic, up or down by a "
        "seeded draw, so that small updates keep, on average, the scale that is asked for.",
        rich_help_panel=OUTPUT,
    ),
]
RoundingSeed = Annotated[
    int | None,
    typer.Option(
        "--rounding-seed",
        metavar="N",
        min=0,
        show_default="0",
        help="Seed of the draws of --rounding stochastic.",
        rich_help_panel=OUTPUT,
    ),
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        "--max-shard-size",
        metavar="SIZE",
        show_default="5GB",
        help="Most bytes of tensors per file of a folder: 500MB, 5GB (decimal), 2GiB.",
        rich_help_panel=OUTPUT,
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace an existing output, once the new one is whole.",
        rich_help_panel=OUTPUT,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue what the same run had finished when it was killed or interrupted.",
        rich_help_panel=RECOVERY,
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Read the output back before it is put into place.",
        rich_help_panel=RECOVERY,
    ),
]
VerifyInputs = Annotated[
    bool,
    typer.Option(
        "--verify-inputs",
        help="Take digests of the inputs, whole, before they are used: to record them, and, with --resume, to see that "
        "they are those that the other run read.",
        rich_help_panel=RECOVERY,
    ),
]

Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        max=64,
        show_default="one per core, up to 4; 4 per GPU",
        help="Threads that read, compute and write.",
        envvar=VARIABLES["--workers"],
        rich_help_panel=MACHINE,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        autocompletion=_starting("auto", "cpu", "cuda", "cuda:0"),
        metavar="auto|cpu|cuda[:N],...",
        help="Where to compute; auto is the first GPU where there is one, cuda:0,cuda:1 shares the work out. The bytes "
        "are the same.",
        envvar=VARIABLES["--device"],
        rich_help_panel=MACHINE,
    ),
]
GpuMemory = Annotated[
    str | None,
    typer.Option(
        "--gpu-memory",
        metavar="SIZE",
        show_default="an eighth of it, up to 2GiB",
        help="Most memory to take of each GPU.",
        envvar=VARIABLES["--gpu-memory"],
        rich_help_panel=MACHINE,
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="DIR",
        show_default="the Hub's own",
        help="The folder in which what is fetched from the Hub is kept.",
        envvar=VARIABLES["--cache"],
        rich_help_panel=MACHINE,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the plan, its bytes and its peak memory; write nothing.",
        rich_help_panel=OUTPUT,
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the summary (or the plan) as JSON on stdout.",
        rich_help_panel=OUTPUT,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="No progress and no summary; errors, a --dry-run's plan and --json are still printed.",
        envvar=VARIABLES["--quiet"],
        rich_help_panel=OUTPUT,
    ),
]
LogJson = Annotated[
    bool,
    typer.Option(
        "--log-json",
        help="Have every line on stderr be a JSON object: progress, notes, warnings, errors.",
        envvar=VARIABLES["--log-json"],
        rich_help_panel=OUTPUT,
    ),
]

JsonPushed = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print what was pushed as JSON on stdout.",
        rich_help_panel=OUTPUT,
    ),
]
Pushed = Annotated[str, typer.Argument(metavar="OUT", help="A folder that lines wrote.")]
Repository = Annotated[
    str,
    typer.Argument(
        metavar="REPO", help="Where to on the Hub: org/name, which is made if it is not there; or s3://bucket/folder."
    ),
]
PushTo = Annotated[
    str | None,
    typer.Option(
        "--push-to",
        metavar="REPO",
        show_default=False,
        help="Put the output, once it is in place and read back, on the Hub as org/name. Implies --verify.",
        rich_help_panel=HUB,
    ),
]
Private = Annotated[
    bool,
    typer.Option(
        "--private",
        help="Make the repository that is pushed to a private one; refuse one that is there and public.",
        rich_help_panel=HUB,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="BRANCH",
        show_default="main",
        help="The branch that is pushed to; a new one begins empty. Or a pull request, refs/pr/1.",
        rich_help_panel=HUB,
    ),
]
DryPush = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check the files and ask the Hub, say what would be pushed, and send nothing.",
        rich_help_panel=HUB,
    ),
]

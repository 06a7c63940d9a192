"""`lines merge`: many task vectors into one model, from one YAML."""

from __future__ import annotations

from lines_cli.api import arguments
from lines_cli.api.calls import RunOptions, destination_of, read_recipe, with_adapter_keys
from lines_cli.cli import options as opt
from lines_cli.cli.run import carry_out
from lines_cli.methods import METHODS


def merge(
    *,
    config: opt.Config,
    output: opt.MaybeOutput = None,
    sets: opt.Set = None,
    as_adapter: opt.AsAdapter = False,
    rank: opt.Rank = None,
    energy: opt.Energy = None,
    num_layers: opt.NumLayers = None,
    force: opt.Force = False,
    resume: opt.Resume = False,
    verify: opt.Verify = False,
    verify_inputs: opt.VerifyInputs = False,
    push_to: opt.PushTo = None,
    private: opt.Private = False,
    revision: opt.Revision = None,
    workers: opt.Workers = None,
    device: opt.Device = "auto",
    gpu_memory: opt.GpuMemory = None,
    on: opt.On = None,
    cache: opt.Cache = None,
    dry_run: opt.DryRun = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    log_json: opt.LogJson = False,  # noqa: ARG001 - heeded before the command line is parsed
) -> None:
    """Merge models, and scale what they learnt together over depth (LiNeS).

    \b
      lines merge --config merge.yaml -o OUT
      lines merge --config merge.yaml -o OUT --set lines.beta=0.4
      lines merge --config merge.yaml -o OUT --as-adapter    # adapters into one

    \b
    The recipe says how, in mergekit's keys where mergekit has them:

    \b
      merge_method: ties
      base_model: base
      models:
        - {model: ft-math, parameters: {weight: 1.0}}
        - {model: ft-code, parameters: {weight: 1.0}}
      parameters: {density: 0.2}
      lines: {alpha: auto, beta: 0.5}

    Methods: METHODS; docs/merge-methods.md has their parameters.

    An output's lines_recipe.yaml is such a recipe, too: it makes the same files again.
    """
    recipe = read_recipe(config, with_adapter_keys(sets or (), as_adapter, rank, energy, num_layers))
    destination = destination_of(recipe, output, called=config, dry_run=dry_run)
    resources = arguments.resources(workers, device, gpu_memory)
    how = RunOptions(force=force, resume=resume, verify=verify, verify_inputs=verify_inputs)
    arguments.use_cache(cache)
    target = arguments.target(push_to, private=private, revision=revision, destination=destination)
    carry_out(recipe, destination, resources, how, on=on, target=target, dry_run=dry_run, json=json, quiet=quiet)


merge.__doc__ = (merge.__doc__ or "").replace("METHODS", ", ".join(METHODS))

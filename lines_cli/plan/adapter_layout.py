"""Ranks in: from what was measured follows which tensors an adapter has, where each goes, and what stands beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lines_cli.checkpoint.adapter import WEIGHTS
from lines_cli.checkpoint.adapter_output import PREFIX
from lines_cli.plan.adapter_plan import AdapterPlan, AdapterTensor, Entries, FactorOf, Found, Rest
from lines_cli.plan.adapter_sidecars import with_sidecars
from lines_cli.plan.layout import FILE_METADATA, lay_out_files, metadata_like
from lines_cli.storage.destination import is_one_file

_UNBOUNDED = 2**63
Made = Entries | FactorOf


def settled(plan: AdapterPlan, found: Mapping[str, Found]) -> AdapterPlan:
    """The plan with the ranks that were measured. Modules without an update are left out, and so is of the rest what
    did not change.

    Args:
        plan: one that needs them.
        found: by the names of modules and of tensors of the rest.
    """
    modules = [replace(module, rank=found[module.name].rank) for module in plan.modules if found[module.name].rank]
    left = [module.name for module in plan.modules if not found[module.name].rank]
    plan = replace(plan, modules=tuple(modules), found=dict(found), needs=False)
    if left and plan.how == "extracted":
        note = f"{len(left):,} module(s) have no update, or a coefficient of 0, and are left out"
        plan = replace(plan, notes=(*plan.notes, note))
    return laid_out(plan)


def laid_out(plan: AdapterPlan) -> AdapterPlan:
    """The plan with every tensor in its place, and all that stands beside them."""
    saved = _saved(plan)
    wanted: dict[str, tuple[str, tuple[int, ...], Made]] = {**plan.entries}
    for number, module in enumerate(plan.modules):
        if module.made is not None:
            for role, name, shape in module.tensors:
                wanted[name] = (module.dtype, shape, FactorOf(number, role))
    for rest in saved:
        names = (str(rest.saved_as), *(f"{PREFIX}{module}.weight" for module in rest.copies))
        wanted |= dict.fromkeys(names, (rest.dtype, rest.shape, rest.entries))
    files, placed = lay_out_files(
        {name: (dtype, shape) for name, (dtype, shape, _) in wanted.items()},
        stem="adapter_model",
        one_file=_file_name(plan),
        max_shard_size=_UNBOUNDED,
        metadata=metadata_like(plan.inputs.leading.metadata) if plan.how == "scaled" else FILE_METADATA,
    )
    tensors = tuple(AdapterTensor(name, number, info, wanted[name][2]) for name, number, info in placed)
    if plan.how == "extracted":
        of_targets = any(rest.of_target for rest in saved)
        whole = [rest for rest in saved if not rest.of_target]
        modules = tuple(dict.fromkeys(module for rest in whole for module in (rest.module, *rest.copies)))
        plan = replace(plan, saved=modules, bias="lora_only" if of_targets else "none")
    plan = replace(plan, outputs=tuple(files), tensors=tensors)
    return plan if is_one_file(plan.output) else with_sidecars(plan)


def _file_name(plan: AdapterPlan) -> str:
    """What the file with the tensors is called: in a folder as PEFT finds it; of an adapter without PEFT's config, as
    others find it, by its own name.
    """
    if is_one_file(plan.output):
        return plan.output.name
    if plan.of_peft:
        return WEIGHTS
    return plan.inputs.models[0].files[0].with_suffix(".safetensors").name


def _saved(plan: AdapterPlan) -> list[Rest]:
    """What is stored whole of what is not taken apart: all of a module of which anything changed."""
    if not plan.recipe.save_rest:
        return []
    savable = [rest for rest in plan.rest if rest.saved_as is not None]
    if plan.needs:
        return savable
    changed = {rest.module for rest in savable if plan.found[rest.name].norm != 0}
    return [rest for rest in savable if rest.module in changed]

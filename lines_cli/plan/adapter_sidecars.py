"""What an output that is an adapter has beside its tensors: its config, the tokenizer's files, the recipe, the model
card.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lines_cli.checkpoint.adapter import CONFIG
from lines_cli.checkpoint.adapter_output import as_json, config_of, targets_of
from lines_cli.checkpoint.model_card import AdapterCard, adapter_card
from lines_cli.checkpoint.sidecars import TOKENIZER_FILES, Sidecar, carried_files
from lines_cli.plan.adapter_plan import AdapterPlan
from lines_cli.plan.identity import named_inputs
from lines_cli.plan.sidecars import front_of
from lines_cli.recipe.yaml_file import dump_recipe
from lines_cli.storage.beside import beside
from lines_cli.storage.names import RECIPE


def with_sidecars(plan: AdapterPlan) -> AdapterPlan:
    """The plan with the files that stand beside its tensors."""
    inputs = plan.inputs
    lead = inputs.leading
    patterns = TOKENIZER_FILES if plan.how == "extracted" else None
    files: dict[str, Path] = {}
    if lead.folder is not None:
        files = carried_files(lead.folder, patterns) if patterns else carried_files(lead.folder)
    sidecars = [Sidecar(name, source=path) for name, path in files.items()]
    if plan.of_peft and plan.how != "scaled":
        sidecars.append(Sidecar(CONFIG, content=as_json(_config(plan))))
    elif plan.of_peft:
        own = lead.folder if lead.folder is not None else lead.files[0].parent
        sidecars.append(Sidecar(CONFIG, source=beside(own, CONFIG)))
    text = dump_recipe(plan.recipe, named=named_inputs(plan, seen_from=plan.output))
    return replace(plan, sidecars=(*sidecars, _card(plan), Sidecar(RECIPE, content=text.encode())))


def _config(plan: AdapterPlan) -> dict[str, Any]:
    """`adapter_config.json` of what is merged or extracted."""
    ranks = {module.name: module.rank for module in plan.modules}
    parameters = [module.name for module in plan.modules if module.of_parameter]
    targets = plan.targets
    if targets is None:
        targets = targets_of([name for name in ranks if name not in parameters], plan.every)
        targets |= {"target_parameters": parameters} if parameters else {}
    if {module.rpartition(".")[2] for module in plan.saved} >= {"embed_tokens", "lm_head"} and plan.like.get("tied"):
        targets = {**targets, "ensure_weight_tying": not any(module.endswith("shared") for module in plan.saved)}
    return config_of(
        ranks,
        targets=targets,
        like=plan.like,
        bias=plan.bias,
        lora_bias=plan.lora_bias,
        modules_to_save=plan.saved,
    )


def _card(plan: AdapterPlan) -> Sidecar:
    output, inputs = plan.output, plan.inputs
    said = plan.like.get("base_model_name_or_path")
    return adapter_card(
        AdapterCard(
            title=output.name if output.name not in ("", "..") else output.resolve().name,
            how=plan.how,
            base=inputs.checkpoints[0] if inputs.has_base else None,
            base_said=said if isinstance(said, str) else None,
            models=inputs.models,
            scaled=plan.recipe.lines is not None,
            ranks=[module.rank for module in plan.modules],
            coefficients=plan.coefficients(),
            outside=plan.outside(),
            filters=plan.filters(),
            front=front_of(inputs.leading),
            of_peft=plan.of_peft,
        )
    )

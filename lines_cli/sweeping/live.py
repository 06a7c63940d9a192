"""Candidates in a live module: put into it in place, evaluated by a Python function, and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lines_cli.errors import RecipeError
from lines_cli.plan.plan import Plan
from lines_cli.sweeping.evaluate import Result, call
from lines_cli.sweeping.trials import Trial


class Live:
    """A module that candidates are put into.

    Args:
        function: `evaluate`: given the module and the trial, gives metrics.
        make: makes the module; None for transformers' class for the checkpoint.
        plan: of any candidate.
        timeout: cannot be kept in this process; a sweep that has one is refused.

    Raises:
        RecipeError: the module cannot be made, or there is a timeout.
    """

    def __init__(
        self, function: Callable[..., Any], make: Callable[..., Any] | None, plan: Plan, timeout: float | None
    ) -> None:
        if timeout is not None:
            raise RecipeError(
                "timeout: a Python function in this process cannot be stopped", hint="Let evaluate be a command."
            )
        self._function = function
        self._module = make() if make is not None else _from_transformers(plan)
        if not isinstance(self._module, torch.nn.Module):
            raise RecipeError(f"model: gives a {type(self._module).__name__}, not a torch.nn.Module")
        self._module.eval()

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Where a candidate is put."""
        return tensors_of(self._module)

    def evaluate(self, trial: Trial, task: str | None, seed: int, log: Path) -> Result:
        """Evaluate what the module holds."""
        told = {"id": trial.id, "family": trial.family, "settings": dict(trial.settings), "task": task, "seed": seed}
        with torch.no_grad():
            return call(self._function, self._module, told, log=log)


def tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of a module's state by name, to be written into; tied ones under each of their names."""
    return {name: tensor.detach() for name, tensor in module.state_dict(keep_vars=True).items()}


@contextmanager
def restored(module: torch.nn.Module) -> Iterator[None]:
    """Have a module hold at the end what it held at the beginning."""
    before = {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in tensors_of(module).items():
                tensor.copy_(before[name])


def _from_transformers(plan: Plan) -> torch.nn.Module:
    """The module that a checkpoint's config names, made by transformers from the base.

    Raises:
        RecipeError: it is not installed, or the config names none.
    """
    try:
        import transformers
    except ImportError as error:
        raise RecipeError(
            "evaluate is a Python function, and transformers, which would make the model, is not installed",
            hint="Say model: module:function, which makes the torch module; or let evaluate be a command.",
        ) from error
    leading = plan.inputs.leading
    names = leading.config.get("architectures")
    known = getattr(transformers, names[0], None) if isinstance(names, list) and names else None
    if known is None or leading.folder is None:
        raise RecipeError(
            f"{leading.name} does not say which class of transformers it is (architectures in config.json)",
            hint="Say model: module:function, which makes the torch module.",
        )
    module: torch.nn.Module = known.from_pretrained(leading.folder, dtype="auto")
    return module

"""A second judge of what was written: the safetensors package, which reads a file as everybody else will."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lines_cli.checkpoint.header import TensorInfo
from lines_cli.errors import OutputError, printable, some


def refuse_misread(path: Path, planned: Mapping[str, TensorInfo], *, called: str) -> None:
    """Open a weight file with the safetensors package, and hold names, dtypes and shapes against the plan. Only the
    header is read.

    Args:
        path: where the file stands now.
        planned: its tensors by name.
        called: what a message calls the file.

    Raises:
        OutputError: the package refuses the file, or reads something else in it.
    """
    try:
        found = _read(path)
    except Exception as error:  # of the package, which documents none
        raise OutputError(f"{called}: the safetensors package cannot open it: {error}", hint=_REPORT) from error
    expected: dict[str, _Described] = {name: (info.dtype, info.shape) for name, info in planned.items()}
    if found == expected:
        return
    differing = [
        f"{printable(name)} is {_said(found.get(name))} there, and {_said(expected.get(name))} in the plan"
        for name in dict.fromkeys([*expected, *found])
        if found.get(name) != expected.get(name)
    ]
    raise OutputError(
        f"{called}: the safetensors package does not read what was planned, in {len(differing):,} tensor(s):\n"
        f"{some(differing)}",
        hint=_REPORT,
    )


_REPORT = "Nothing was published. Either the disk does not hold what was written, or it is a bug in lines: report it."

_Described = tuple[str, tuple[int, ...]]
"""dtype and shape."""


def _read(path: Path) -> dict[str, _Described]:
    """Every tensor as the package describes it."""
    from safetensors import safe_open

    # No tensor is made. Of the package's frameworks torch is the one that is loaded by now; numpy may not be there.
    with safe_open(path, framework="pt") as file:
        slices = ((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118 - it is no mapping
        return {name: (found.get_dtype(), tuple(found.get_shape())) for name, found in slices}


def _said(tensor: _Described | None) -> str:
    return f"{tensor[0]} {list(tensor[1])}" if tensor is not None else "missing"

"""Loops over entries that numba compiles: what `fused` asks of them, and nothing else imports them.

Each makes the bits that torch's operations make one after the other: the same float32 operations in the same order,
each rounded. No flag lets the compiler contract or reorder them. Entries are gone through a block at a time, model
after model, so that what is computed of them stays in a core's first cache; every inner loop is one that the compiler
makes vectors of. None holds the interpreter's lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numba
import numpy as np
from numba.extending import intrinsic

from lines_cli.methods.sums import NEGLIGIBLE

_types: Any = numba.types
carray: Any = numba.carray  # type: ignore[attr-defined,unused-ignore]

_BLOCK = 1024  # entries: 4 KiB of each model
_LOOK = 64  # entries that are looked at before those in the window are picked out
_INF = np.int32(0x7F80_0000)
_NOT_SIGN = np.int32(0x7FFF_FFFF)
_ZERO, _ONE, _I0, _I1 = np.float32(0), np.float32(1), np.int32(0), np.int32(1)


def _pointer_to(kind: Any) -> Any:
    """What makes a pointer of an address: tensors are given by theirs, as many as there are models."""

    def at(_: Any, address: Any) -> Any:  # noqa: ARG001 - numba looks at the names
        signature = _types.CPointer(kind)(_types.intp)

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return signature, code

    return intrinsic(at)


_floats, _integers = _pointer_to(_types.float32), _pointer_to(_types.int32)


def _look(models: Any, numel: int, lows: Any, lasts: Any, inside: Any, found: Any) -> None:
    for model in range(len(models)):
        low, last, into = lows[model], lasts[model], inside[model]
        above, got, most = 0, 0, _I0
        for first in range(0, numel, _LOOK):
            size = min(_LOOK, numel - first)
            entries = carray(_integers(models[model] + 4 * first), size)
            over, reach = _I0, _I0
            for i in range(size):
                bits = np.int32(entries[i] & _NOT_SIGN)
                over = np.int32(over + (_I1 if bits > last else _I0))
                reach = np.int32(reach + (_I1 if bits >= low else _I0))
                most = max(most, bits)
            above += over
            if reach > over:
                for i in range(size):
                    bits = np.int32(entries[i] & _NOT_SIGN)
                    if low <= bits <= last:
                        into[got] = bits - low
                        got += 1
        found[model, 0] = got
        found[model, 1] = above
        found[model, 2] = most >= _INF


def _signs(models: Any, numel: int, factor: Any, weight: Any, waiting: bool) -> tuple[int, bool]:
    total = np.empty(_BLOCK, np.float32)
    balance, waits = 0, False
    for first in range(0, numel, _BLOCK):
        size = min(_BLOCK, numel - first)
        for model in range(len(models)):
            tau = carray(_floats(models[model] + 4 * first), size)
            f, w = factor[model], weight[model]
            if model == 0:
                for i in range(size):
                    total[i] = tau[i] * f * w
            else:
                for i in range(size):
                    total[i] += tau[i] * f * w
        plus = _I0
        for i in range(size):
            plus = np.int32(plus + (_I1 if total[i] > _ZERO else _I0) - (_I1 if total[i] < _ZERO else _I0))
        balance += plus
        if waiting and not waits:
            for i in range(size):
                total[i] = _ZERO if total[i] > _ZERO or total[i] < _ZERO else _ONE
            for model in range(len(models)):
                tau = carray(_floats(models[model] + 4 * first), size)
                f, w = factor[model], weight[model]
                for i in range(size):
                    if tau[i] * f * w * total[i] != _ZERO:
                        waits = True
    return balance, waits


def _ties(
    models: Any, numel: int, factor: Any, weight: Any, mean: bool, plus: bool, least: Any, negligible: Any
) -> None:
    elected, divisor = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    for first in range(0, numel, _BLOCK):
        size = min(_BLOCK, numel - first)
        for model in range(len(models)):
            tau = carray(_floats(models[model] + 4 * first), size)
            f, w = factor[model], weight[model]
            if f != _ONE or w != _ONE:
                for i in range(size):
                    tau[i] = tau[i] * f * w
            if model == 0:
                for i in range(size):
                    elected[i] = tau[i]
            else:
                for i in range(size):
                    elected[i] += tau[i]
        if plus:
            for i in range(size):
                elected[i] = _ONE if elected[i] >= _ZERO else -_ONE
        else:
            for i in range(size):
                elected[i] = _ONE if elected[i] > _ZERO else -_ONE
        merged, w = carray(_floats(models[0] + 4 * first), size), weight[0]
        for i in range(size):
            agrees = _ONE if merged[i] * elected[i] > _ZERO else _ZERO
            merged[i] *= agrees
            divisor[i] = agrees * w
        for model in range(1, len(models)):
            tau, w = carray(_floats(models[model] + 4 * first), size), weight[model]
            for i in range(size):
                agrees = _ONE if tau[i] * elected[i] > _ZERO else _ZERO
                merged[i] += tau[i] * agrees
                divisor[i] += agrees * w
        if mean and least > _ZERO:
            for i in range(size):
                merged[i] /= max(divisor[i], least)
        elif mean:
            for i in range(size):
                nothing = _ONE if abs(divisor[i]) < negligible else _ZERO
                merged[i] /= divisor[i] * (_ONE - nothing) + nothing


def _votes(merged: int, models: Any, numel: int, scale: Any, k: Any) -> None:
    votes = np.empty(_BLOCK, np.float32)
    for first in range(0, numel, _BLOCK):
        size = min(_BLOCK, numel - first)
        total = carray(_floats(merged + 4 * first), size)
        votes[:] = _ZERO
        for model in range(len(models)):
            tau, s = carray(_floats(models[model] + 4 * first), size), scale[model]
            for i in range(size):
                votes[i] += _ONE if abs(tau[i]) > abs(total[i] - tau[i]) * s else _ZERO
        for i in range(size):
            total[i] *= _ONE if votes[i] >= k else _ZERO


_ADDRESSES, _NUMBERS, _FLAG = _types.intp[::1], _types.float32[::1], _types.boolean
_SIGNATURES: dict[Any, tuple[Any, ...]] = {
    _look: (_ADDRESSES, _types.intp, _types.int32[::1], _types.int32[::1], _types.int32[:, ::1], _types.int64[:, ::1]),
    _signs: (_ADDRESSES, _types.intp, _NUMBERS, _NUMBERS, _FLAG),
    _ties: (_ADDRESSES, _types.intp, _NUMBERS, _NUMBERS, _FLAG, _FLAG, _types.float32, _types.float32),
    _votes: (_types.intp, _ADDRESSES, _types.intp, _NUMBERS, _types.float32),
}
_compiled = numba.njit(nogil=True, fastmath=False, error_model="numpy", cache=True)
_COMPILING = Lock()
if numba.config.DISABLE_JIT:  # type: ignore[attr-defined,unused-ignore]
    raise ImportError("NUMBA_DISABLE_JIT is set, so that it compiles nothing")
_KERNELS: dict[Any, Any] = {loop: _compiled(loop) for loop in _SIGNATURES}


def are_cached() -> bool:
    """Whether the kernels were compiled before, as far as the names and times of files tell."""
    stem, written = Path(__file__).stem, Path(__file__).stat().st_mtime

    def is_cached(loop: Any, kernel: Any) -> bool:
        found = Path(kernel.stats.cache_path).glob(f"{stem}.{loop.__name__}-*.nbi")
        return any(index.stat().st_mtime >= written for index in found)

    return all(is_cached(loop, kernel) for loop, kernel in _KERNELS.items())


def compile_all() -> None:
    """Compile the kernels, or load what was compiled before.

    Raises:
        RuntimeError: they cannot be compiled, or what was kept is damaged; or this compiler rounds a product and a sum
            once where two roundings are due.
    """
    with _COMPILING:
        for loop, kernel in _KERNELS.items():
            if not kernel.signatures:
                try:
                    kernel.compile(_SIGNATURES[loop])
                except Exception as error:
                    kept = Path(kernel.stats.cache_path) / f"{Path(__file__).stem}.{loop.__name__}-*"
                    why = f"{type(error).__name__}: {error}".strip().splitlines()[0]
                    raise RuntimeError(f"{why}; what it keeps may be damaged: remove {kept}") from error
                kernel.disable_compile()
    third, numbers = np.float32(1 / 3), np.arange(1, 1000, dtype=np.float32)
    numbers = numbers[numbers * np.float64(third) > numbers * third]  # a product that is not rounded leaves something
    rounded = -(numbers * third)
    balance, _ = signs([rounded.ctypes.data, numbers.ctypes.data], len(numbers), [1, 1], [1, third], waiting=False)
    if balance:
        raise RuntimeError("its compiler rounds a product and a sum in one step")


def look(models: Sequence[int], numel: int, windows: Sequence[tuple[int, int]]) -> tuple[list[tuple[Any, int]], bool]:
    """What lies of each model's magnitudes between two numbers of bits.

    Args:
        models: N addresses of `numel` float32 entries.
        numel: 1 or more.
        windows: N; the first number in it, and the first above it.

    Returns:
        N; the entries within, as numbers from the window's first on ([n], int32), and how many lie above; and whether
        all entries are finite.
    """
    lows = np.array([low for low, _ in windows], np.int32)
    lasts = np.array([high - 1 for _, high in windows], np.int32)
    inside = np.empty((len(models), numel), np.int32)
    found = np.empty((len(models), 3), np.int64)
    _KERNELS[_look](np.array(models, np.intp), numel, lows, lasts, inside, found)
    numbers = found.tolist()
    seen = [(row[:got].copy(), above) for row, (got, above, _) in zip(inside, numbers, strict=True)]
    return seen, not any(bad for _, _, bad in numbers)


def signs(
    models: Sequence[int], numel: int, factor: Sequence[float], weight: Sequence[float], *, waiting: bool
) -> tuple[int, bool]:
    """By how many the entries with a positive sum outnumber those with a negative one; and whether a model that is not
    zero waits for the decision of a zero sum, if that is asked.
    """
    numbers = np.array(models, np.intp), numel, _float32(factor), _float32(weight)
    balance, waits = _KERNELS[_signs](*numbers, waiting)
    return int(balance), bool(waits)


def ties(
    models: Sequence[int],
    numel: int,
    factor: Sequence[float],
    weight: Sequence[float],
    *,
    mean: bool,
    plus: bool,
) -> None:
    """Merge what agrees with the elected signs, into the first model; overwrites all."""
    least = min(weight)
    numbers = _float32([least if least >= NEGLIGIBLE else -1, NEGLIGIBLE])
    _KERNELS[_ties](np.array(models, np.intp), numel, _float32(factor), _float32(weight), mean, plus, *numbers)


def votes(merged: int, models: Sequence[int], numel: int, scale: Sequence[float], k: float) -> None:
    """Keep in `merged` what at least `k` models' masks select."""
    _KERNELS[_votes](merged, np.array(models, np.intp), numel, _float32(scale), *_float32([k]))


def _float32(numbers: Sequence[float]) -> Any:
    """Rounded as torch rounds a number that a tensor is multiplied by."""
    with np.errstate(over="ignore"):
        return np.array(numbers, np.float64).astype(np.float32)

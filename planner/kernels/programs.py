"""What rules of every device write programs with: sizes of tensors, and arithmetic as C++ does it."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from planner.lifetimes import OUTPUTS_ONLY, Scratch

Program = tuple[int, ...]

HALF_TYPES = (torch.float16, torch.bfloat16)

# Operators that are neither pointwise, views nor factories, and take nothing on any device: they write their result.
_WRITERS = frozenset(
    (
        "_is_all_true", "_linalg_check_errors", "_local_scalar_dense", "_unsafe_view", "arange", "constant_pad_nd",
        "empty_like", "eye", "fill_", "flip", "full_like", "index_select", "linspace", "max_pool2d_with_indices",
        "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros", "ones_like", "polar", "roll", "stack",
        "zero_", "zeros_like",
    )
)  # fmt: skip


@functools.cache
def takes_nothing(func: Any, known: frozenset[str]) -> bool:
    """Tell whether an operator for which there is no rule is known to take nothing beside its outputs.

    Pointwise operators, views and factories are, by their tags and schemas; others by name, those of `known` on the
    device that asks. Every other operator is not modelled, and is named as such.
    """
    if torch.Tag.pointwise in func.tags or func.namespace == "prim":
        return True
    if func.namespace != "aten":
        return False
    name = func._schema.name.partition("::")[2]
    if name in _WRITERS or name in known:
        return True
    if any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns):
        return True
    return not any("Tensor" in str(argument.type) for argument in func._schema.arguments)


def made(*program: int) -> Scratch:
    """Return a program; allocations of nothing are left out, as the caching allocator does."""
    kept = tuple(step for i, step in enumerate(program) if step != 0 or i == program.index(0))
    return OUTPUTS_ONLY if kept == (0,) else Scratch(program=kept)


def nbytes(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of a tensor's elements, of those of another type where `dtype` says so."""
    return tensor.numel() * (dtype or tensor.dtype).itemsize


def compares_directly(elements: torch.Tensor, tests: torch.Tensor) -> bool:
    """Tell whether isin compares each element with each test, instead of sorting (TensorCompare.cpp, isin)."""
    return tests.numel() < int(10.0 * elements.numel() ** 0.145)


def ceil_div(number: int, unit: int) -> int:
    """Return the number of units that hold `number`."""
    return -(-number // unit)


def single(number: float) -> float:
    """Return `number` rounded to single precision."""
    return ctypes.c_float(number).value

"""What rules of every device write programs with: sizes of tensors, and arithmetic as C++ does it."""

from __future__ import annotations

import ctypes

import torch

from planner.lifetimes import OUTPUTS_ONLY, Scratch

Program = tuple[int, ...]

HALF_TYPES = (torch.float16, torch.bfloat16)


def made(*program: int) -> Scratch:
    """Return a program; allocations of nothing are left out, as the caching allocator does."""
    kept = tuple(step for i, step in enumerate(program) if step != 0 or i == program.index(0))
    return OUTPUTS_ONLY if kept == (0,) else Scratch(program=kept)


def nbytes(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of a tensor's elements, of those of another type where `dtype` says so."""
    return tensor.numel() * (dtype or tensor.dtype).itemsize


def ceil_div(number: int, unit: int) -> int:
    """Return the number of units that hold `number`."""
    return -(-number // unit)


def single(number: float) -> float:
    """Return `number` rounded to single precision."""
    return ctypes.c_float(number).value

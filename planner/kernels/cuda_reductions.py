"""Buffers of CUDA's reductions, in bytes requested: aten/src/ATen/native/cuda/Reduce.cuh.

Where a row is long and there are few of them, several blocks work on one output and meet in a buffer in global memory,
with a semaphore of 4 B for each block of outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from planner.kernels.programs import HALF_TYPES, Program, ceil_div, made
from planner.lifetimes import OUTPUTS_ONLY, Scratch


class Gpu(Protocol):
    """What splits a reduction into blocks."""

    @property
    def multiprocessors(self) -> int: ...

    @property
    def threads_per_multiprocessor(self) -> int: ...


Reduction = Callable[[Gpu, Any, Any, list[torch.Tensor]], Scratch | None]


def _accumulated(dtype: torch.dtype) -> int:
    """Return the bytes of what values of `dtype` are accumulated in (aten/src/ATen/AccumulateType.h)."""
    return 8 if not dtype.is_floating_point or dtype is torch.float64 else 4


def _with_index(dtype: torch.dtype) -> int:
    """Return the bytes of a value and where it is."""
    return 16


def _moments(dtype: torch.dtype) -> int:
    """Return the bytes of a mean, a sum of squares and two counts (aten/src/ATen/native/SharedReduceOps.h)."""
    return 32 if dtype is torch.float64 else 16


def _itself(dtype: torch.dtype) -> int:
    return dtype.itemsize


def _pair(dtype: torch.dtype) -> int:
    return 2 * dtype.itemsize


# By operator: bytes of the accumulator.
ACCUMULATORS: dict[str, Callable[[torch.dtype], int]] = {
    "sum": _accumulated,
    "nansum": _accumulated,
    "mean": _accumulated,
    "prod": _accumulated,
    "amax": _itself,
    "amin": _itself,
    "linalg_vector_norm": _accumulated,
    "aminmax": _pair,
    "argmax": _with_index,
    "argmin": _with_index,
    "any": _itself,
    "all": _itself,
    "var": _moments,
    "std": _moments,
    "var_mean": _moments,
    "std_mean": _moments,
}
# Converted to the output's type before, but for half types that are summed in float32 (native/ReduceOpsUtils.h).
_CONVERTS = ("sum", "nansum", "prod", "mean")


def reduction(name: str, position: int | None) -> Reduction:
    """Reductions by TensorIterator; `position` is where the operator takes its dimensions, None where it takes all."""
    by_dim = position is not None
    accumulator = ACCUMULATORS.get(name) or (_with_index if by_dim else _itself)  # max and min are not in there

    def rule(gpu: Gpu, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Scratch | None:
        source = args[0]
        if source.numel() <= 1:
            return OUTPUTS_ONLY
        dims = None if position is None else args[position] if len(args) > position else kwargs.get("dim")
        dims = (dims,) if isinstance(dims, int) else dims
        dtype, converted = source.dtype, 0
        out = outputs[0].dtype
        if name in _CONVERTS and dtype is not out and not (dtype in HALF_TYPES and out is torch.float32):
            dtype, converted = out, source.numel() * out.itemsize
        reduced = tuple(dim % source.dim() for dim in dims) if dims else tuple(range(source.dim()))
        buffers = global_buffers(gpu, source, reduced, arg_bytes=accumulator(dtype))
        return made(0, converted, *buffers) if converted or buffers else OUTPUTS_ONLY

    return rule


def global_buffers(gpu: Gpu, source: torch.Tensor, reduced: Sequence[int], *, arg_bytes: int) -> Program:
    """Return the bytes of the buffer where blocks meet and of their semaphores, or nothing.

    arg_bytes: of one accumulator. Source: aten/src/ATen/native/cuda/Reduce.cuh (setReduceConfig).
    """
    lengths, strides, outer = _iterator(source, frozenset(reduced))
    counts = math.prod(lengths)
    outputs = math.prod(length for length, out in zip(lengths, outer, strict=True) if out)
    inputs = counts // outputs
    # Nothing below puts fewer than 256 values on each of at most 512 threads of several blocks.
    if inputs < 256:
        return ()
    reduced_dims = outer.count(0)
    fastest = reduced_dims == len(lengths) or strides[0] < strides[reduced_dims]
    wide = 1
    if fastest:
        across, down = inputs, outputs
        if strides[0] == 1 and inputs >= 128 and reduced_dims == 1:
            across //= 4
    else:
        across, down = outputs, inputs
        if strides[reduced_dims] == 1:
            wide = _output_vector(lengths, strides, reduced_dims)
            across //= wide
    most = 512 // wide
    width_limit = min(most, _last_power(across))
    height = min(min(most, _last_power(down)), most // min(width_limit, 32))
    width = min(width_limit, most // height)
    threads = width * height
    values = ceil_div(inputs, width) if fastest else inputs
    if values < min(height * 16, 256):
        return ()
    values = ceil_div(values, height)
    grid = ceil_div(outputs // wide, 1 if fastest else width)
    target = gpu.multiprocessors * (gpu.threads_per_multiprocessor // threads)
    if values < 256 or grid > target:
        return ()
    blocks = max(min(ceil_div(target, grid), ceil_div(values, 16)), ceil_div(values, 256))
    if blocks <= 1:
        return ()
    size = arg_bytes * outputs * blocks * (1 if fastest else width * wide)
    return size, 4 * grid


def _last_power(n: int) -> int:
    return 1 << (max(1, n).bit_length() - 1)


def _output_vector(lengths: list[int], strides: list[int], output: int) -> int:
    wide = 4
    for n in (lengths[output], *(stride for i, stride in enumerate(strides) if i != output)):
        while n % wide:
            wide //= 2
    return wide


def _iterator(source: torch.Tensor, reduced: frozenset[int]) -> tuple[list[int], list[int], list[int]]:
    """Return lengths, input strides and output strides (0 where reduced) as TensorIterator orders and merges them.

    Source: aten/src/ATen/TensorIterator.cpp (reorder_dimensions, coalesce_dimensions). In elements, fastest first.
    """
    lengths, strides = list(source.shape), list(source.stride())
    outer, step = [0] * len(lengths), 1
    for dim in reversed(range(len(lengths))):
        if dim not in reduced:
            outer[dim], step = step, step * lengths[dim]

    def order(a: int, b: int) -> int:
        if (outer[a] == 0) != (outer[b] == 0):
            return 1 if outer[b] == 0 else -1
        for operand in (outer, strides):
            if operand[a] == 0 or operand[b] == 0:
                continue
            if operand[a] != operand[b]:
                return -1 if operand[a] < operand[b] else 1
            if lengths[a] > lengths[b]:
                return 1
        return 0

    dims = list(reversed(range(len(lengths))))
    for i in range(1, len(dims)):
        later = i
        for earlier in reversed(range(i)):
            found = order(dims[earlier], dims[later])
            if found > 0:
                dims[earlier], dims[later] = dims[later], dims[earlier]
                later = earlier
            elif found < 0:
                break
    merged: list[list[int]] = []
    for dim in dims:
        length, into, out = lengths[dim], strides[dim], outer[dim]
        last = merged[-1] if merged else [0, 0, 0]
        follows = last[0] * last[1] == into and last[0] * last[2] == out
        if merged and (last[0] == 1 or length == 1 or follows):
            merged[-1] = [last[0] * length, *((into, out) if last[0] == 1 else last[1:])]
        else:
            merged.append([length, into, out])
    lengths, strides, outer = (list(column) for column in zip(*merged, strict=True))
    return lengths, strides, outer

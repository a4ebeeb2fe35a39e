"""What oneDNN 3.12 takes on AVX-512 for products and convolutions, in bytes: scratchpads, and tensors in its layouts.

Paths are in oneDNN. Whether torch calls it is decided elsewhere, in `planner.kernels.cpu_products`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from planner.kernels.programs import ceil_div, single
from planner.units import round_up

# Matrix products.


@functools.cache
def product_bytes(
    batch: int, rows: int, inner: int, columns: int, threads: int, turned: bool, most: bool
) -> int | None:
    """Return the scratchpad of a bf16 product on AVX512-BF16, in bytes.

    src/cpu/x64/matmul/brgemm_matmul_utils.cpp, init_scratchpad: for each thread 16 batch elements of 40 bytes
    (brgemm_types.hpp), a block of the right matrix packed in pairs of rows, a block of fp32 sums (always: its
    condition reads K_chunk_elems before that is set), and a block of the left matrix if that is copied: when `turned`
    (its columns contiguous), or with a power of two of at least 4,096 columns and 1,024 rows. Every booking adds 128
    bytes to align by (src/common/memory_tracking.hpp). A single row counts as turned, but is not copied. `most`: take
    blocks of `rows` rather than choosing.
    """
    by_columns = turned or rows == 1
    copies_left = turned or (inner >= 4096 and inner & (inner - 1) == 0 and rows >= 1024)
    row_block, column_blocks, inner_threads = rows, 1, 1
    if not most:
        blocking = _blocking(batch, rows, inner, columns, threads, by_columns, copies_left)
        if blocking is None:
            return None
        row_block, column_blocks, inner_threads = blocking
    inner_block = min(inner, 1024 if inner > 1024 and not by_columns else 512)
    sizes = [16 * 40, 2 * 64 * round_up(inner_block, 32)]
    if inner_threads > 1:
        sizes.append(4 * columns * rows)
    else:
        sizes.append(4 * min(64, columns) * row_block * (1 if inner_block >= inner else column_blocks))
    if copies_left:
        across = round_up(inner_block, 32)
        across += 32 if across >= 512 and across & (across - 1) == 0 else 0
        sizes.append(2 * row_block * across)
    return sum(threads * size + 128 for size in sizes)


def _blocking(
    batch: int, rows: int, inner: int, columns: int, threads: int, by_columns: bool, copies_left: bool
) -> tuple[int, int, int] | None:
    """Return (rows in a block, blocks of columns in a chunk, threads along the inner dimension).

    The same file, compute_blocking_heuristic_avx512 and get_imbalance: of all candidates the first with the least
    imbalance, in single precision. None where it finds none and another implementation is used.
    """
    column_block = min(64, columns)
    column_count = ceil_div(columns, column_block)
    inner_block = min(inner, 1024 if inner > 1024 and not by_columns else 512)
    least, start = min(32, rows), 1
    if threads > batch * column_count:
        least = min(16, rows)
        if batch == 1 and by_columns and inner >= 2048 and inner & (inner - 1) == 0:
            start = min(threads, 4)
    best, chosen = 1.0, None
    for inner_threads in range(start, 0, -1):
        others = threads // inner_threads
        idle = single((threads - others * inner_threads) / threads)
        along = _disbalance(inner, inner_threads * inner_block)

        def score(chunk: int, block: int, others: int = others, idle: float = idle, along: float = along) -> float:
            blocks, chunks = ceil_div(rows, block), ceil_div(column_count, chunk)
            work = batch * blocks * ceil_div(columns, column_block * chunk)
            uneven = single(single(chunks * chunk - column_count) / column_count)
            total = 0.0
            for part in (_disbalance(work, others), single(block * blocks % rows / rows), uneven, idle, along):
                total = single(total + part)
            return single(total / 5)

        found = False
        for chunk in range(min(16 if copies_left else 1, column_count), 0, -1):
            for block in range(min(256, rows), least - 1, -1):
                work = batch * ceil_div(rows, block) * ceil_div(columns, column_block * chunk)
                if work < others * 3 and work % others and start == 1:
                    continue
                if (value := score(chunk, block)) < best:
                    best, chosen, found = value, (block, chunk, inner_threads), True
        if not found and (value := score(1, least)) < best:
            best, chosen = value, (least, 1, inner_threads)
    return chosen


def _disbalance(work: int, block: int) -> float:
    rest = work % block
    return single((block - rest if work < block else min(block - rest, rest)) / block)


# Convolution.


@dataclass(frozen=True, slots=True, kw_only=True)
class Convolution:
    """A convolution: sizes without batch and channels are tuples, and a 1-D one is a 2-D one of height 1."""

    batch: int
    inner: int
    outer: int
    groups: int
    image: tuple[int, ...]
    result: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    biased: bool
    dtype: torch.dtype

    @property
    def depthwise(self) -> bool:
        return 1 < self.groups == self.inner == self.outer

    @property
    def strided(self) -> bool:
        return any(step != 1 for step in self.stride)


class ConvolutionBytes(NamedTuple):
    """What a convolution takes besides its output: oneDNN's scratchpad, and image, weights and result in its layout."""

    scratchpad: int
    image: int
    weights: int
    result: int


def convolution_bytes(shape: Convolution, threads: int, l2_bytes: int) -> ConvolutionBytes | None:
    """Return what a convolution on AVX-512 takes with layouts of 16 channels a block; None where that is not modelled.

    In src/cpu/x64: jit_avx512_common_conv_kernel.cpp and jit_avx512_core_bf16_conv_kernel.cpp, init_conf
    (channels are padded to 16; an image of fewer than 16 channels stays as it is), the same for `1x1` and `dw`.
    """
    size, channels = shape.dtype.itemsize, round_up(shape.outer, 16)
    area = math.prod(shape.kernel)
    pointwise = _is_pointwise(shape)
    if shape.depthwise and len(shape.image) == 3:
        return None
    if shape.depthwise:
        image, weights = round_up(shape.inner, 16), channels * area
    elif shape.groups > 1:
        if shape.inner // shape.groups % 16 or shape.outer // shape.groups % 16:
            return None
        image, weights = shape.inner, shape.outer * (shape.inner // shape.groups) * area
    elif shape.inner < 16 and not pointwise:
        image, weights = 0, channels * round_up(shape.inner, 4 // size) * area
    else:
        image, weights = round_up(shape.inner, 16), channels * round_up(shape.inner, 16) * area
    return ConvolutionBytes(
        scratchpad=sum(booked + 128 for booked in _bookings(shape, pointwise, threads, l2_bytes)),
        image=shape.batch * image * math.prod(shape.image) * size,
        weights=weights * size,
        result=shape.batch * channels * math.prod(shape.result) * size,
    )


def _is_pointwise(shape: Convolution) -> bool:
    """Return whether oneDNN's kernels for single points apply: strides must divide (jit_uni_1x1_conv_utils.hpp)."""
    if math.prod(shape.kernel) != 1 or shape.groups != 1 or any(shape.padding):
        return False
    if not shape.strided:
        return True
    exact = all(n * step == whole for n, step, whole in zip(shape.result, shape.stride, shape.image, strict=True))
    return exact and len(shape.image) == 2


def _bookings(shape: Convolution, pointwise: bool, threads: int, l2_bytes: int) -> list[int]:
    """Return the parts of the scratchpad: a padded bias, an image without its strides, sums in fp32.

    A bf16 bias is kept in fp32 by depthwise kernels. src/cpu/x64: jit_uni_1x1_conv_utils.hpp
    (rtus_prepare_space_info), jit_avx512_core_bf16_1x1_conv_kernel.cpp (init_scratchpad), the `init_scratchpad` of
    the others.
    """
    size, channels = shape.dtype.itemsize, round_up(shape.outer, 16)
    parts = []
    if shape.biased and shape.depthwise and shape.dtype is torch.bfloat16:
        parts.append(4 * channels)
    elif shape.biased and shape.outer % 16:
        parts.append(size * channels)
    if not pointwise:
        return parts
    points = math.prod(shape.result)
    if shape.strided:
        parts.append(threads * round_up(shape.inner, 16) * points * size)
    if shape.dtype is torch.bfloat16:
        block, groups = _pointwise_blocking(shape, threads, l2_bytes)
        share = ceil_div(threads, ceil_div(threads, groups))
        parts.append(threads * round_up(points, block) * round_up(ceil_div(channels, share), 16) * 4)
    return parts


def _pointwise_blocking(shape: Convolution, threads: int, l2_bytes: int) -> tuple[int, int]:
    """Return (points in a block, groups of threads over output channels): the same file, init_conf."""
    batch = shape.batch
    inner, outer, points = round_up(shape.inner, 16), round_up(shape.outer, 16), math.prod(shape.result)
    lines = math.prod(shape.result[:-1])
    broadcasts = 8 * batch >= threads
    most, least = (9, 6) if broadcasts else (30, 9)
    if broadcasts and 128 < outer < 256 and 10 < lines < 28:
        most, least = 6, 5
    whole = lines if lines >= 14 else points
    block = next((width for width in range(most, least - 1, -1) if whole % width == 0), 0)
    if not block:
        block, tail = min(most, points), points % most
        for width in range(most, least - 1, -1):
            if points % width > tail or points % width == 0:
                block, tail = width, points % width
                if tail == 0:
                    break
    blocks, loads = ceil_div(points, block), outer // 16
    if threads <= 28 and batch < threads and loads * blocks > threads:
        groups = _load_groups(threads, batch, blocks, loads, block, inner, outer * inner > batch * points * inner)
    else:
        lowest = ceil_div(threads, batch * blocks)
        groups = _divider(threads, lowest, 2 * lowest)
    if broadcasts and points <= 64 and outer * inner >= l2_bytes // shape.dtype.itemsize:
        groups = max(groups, 4)
    elif points <= 49 and batch <= threads and outer > 512 and outer // inner >= 4:
        groups = max(groups, 2)
    return block, groups


def _load_groups(threads: int, batch: int, blocks: int, loads: int, block: int, inner: int, heavy: bool) -> int:
    """Return the number of groups that costs least; ties go to the first, from many if weights outweigh the image."""

    def cost(load: int, sharing: int, memory: float) -> float:
        points = batch * ceil_div(blocks, sharing) * block
        return 0.01 * points * load * 16 * inner + memory * (points + load * 16) * inner

    best, chosen = math.inf, threads if heavy else 1
    for groups in range(threads, 0, -1) if heavy else range(1, threads + 1):
        fewest, most = loads // groups, ceil_div(loads, groups)
        few, many = threads // groups, ceil_div(threads, groups)
        memory = 1.0 if many == 1 else 1.3
        if threads % groups < loads % groups:
            value = cost(most, few, memory)
        else:
            value = max(cost(most, many, memory), cost(fewest, few, memory))
        if value < best:
            best, chosen = value, groups
    return chosen


def _divider(value: int, lowest: int, highest: int) -> int:
    """Return the smallest best divider in the range (src/common/utils or jit_utils: best_divider)."""
    lowest, best, chosen = max(1, lowest), -1.0, lowest
    for divider in range(lowest, min(highest, value) + 1):
        ratio = value / round_up(value, divider)
        if ratio > best:
            best, chosen = ratio, divider
    return chosen

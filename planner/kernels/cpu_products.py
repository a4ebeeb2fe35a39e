"""Rules of CPU kernels that multiply: matrix products, convolutions, attention.

They say which library torch calls and what is copied for it; `planner.kernels.onednn` says what oneDNN takes. Paths
without a project are under `aten/src/ATen/native` of pytorch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from planner.kernels.cpu_rules import BFLOAT16, DOUBLE, FLOAT, HALF, Call, Cpu, Rules, Steps, argument, channels_last
from planner.kernels.onednn import Convolution, convolution_bytes, product_bytes
from planner.kernels.programs import HALF_TYPES
from planner.lifetimes import OUTPUTS_ONLY, Scratch

RULES = Rules()
_rule = RULES.enter


# Matrix products.


def _gemm_ready(matrix: torch.Tensor) -> bool:
    """Return whether BLAS takes these strides (LinearAlgebra.cpp, addmm_impl_cpu_)."""
    (rows, columns), (down, across) = matrix.shape, matrix.stride()
    return (across == 1 and down >= max(1, columns)) or (down == 1 and across >= max(1, rows))


def _is_turned(matrix: torch.Tensor) -> bool:
    """Return whether a matrix is read through its columns."""
    return matrix.stride(-1) != 1 and matrix.stride(-2) == 1


@_rule("mm", "addmm", "addmm_", "_addmm_activation")
def _addmm(call: Call) -> Scratch | None:
    """Copy matrices whose strides BLAS does not take, then oneDNN's scratchpad for 16-bit types.

    LinearAlgebra.cpp, addmm_impl_cpu_; CPUBlas.cpp, gemm; mkldnn/Matmul.cpp, mkldnn_gemm. The addend is copied into
    the output, and fp32 goes to MKL, whose own memory the allocator does not see.
    """
    left, right = call.args[-2:]
    steps = Steps()
    steps.outputs()
    if left.numel() and right.numel():
        for matrix in (left, right):
            if not _gemm_ready(matrix):
                steps.copy(matrix)
    rows, inner, columns = left.size(0), left.size(1), right.size(1)
    if columns == 1:
        # A single column counts as column-major, and then BLAS multiplies the transposes.
        rows, columns, left = columns, rows, right.t()
    # A single row with gaps passes for a column-major matrix.
    turned = _is_turned(left) if rows > 1 else _gemm_ready(left) and left.stride(1) != 1
    return _product(call.cpu, steps, (1, rows, inner, columns), left.dtype, turned, call.kwargs.get("alpha", 1))


@_rule("bmm", "baddbmm", "baddbmm_")
def _bmm(call: Call) -> Scratch | None:
    """Use plain loops below 400 multiplications an item; otherwise oneDNN for 16-bit types and MKL for others.

    LinearAlgebra.cpp, bmm_out_or_baddbmm_; mkldnn/Matmul.cpp, mkldnn_matmul, which copies an operand unless it or its
    transpose is contiguous. Where MKL does not take the strides, items are multiplied one by one as `mm` would.
    """
    left, right = call.args[-2:]
    batch, rows, inner, columns = left.size(0), left.size(1), left.size(2), right.size(2)
    if rows * inner * columns < 400:
        return OUTPUTS_ONLY
    steps = Steps()
    steps.outputs()
    turned = _is_turned(left) and not left.is_contiguous()
    if _through_onednn(call.cpu, left.dtype, batch * rows * inner * columns):
        for operand in (left, right):
            if not (operand.is_contiguous() or operand.transpose(1, 2).is_contiguous()):
                steps.copy(operand)
    return _product(call.cpu, steps, (batch, rows, inner, columns), left.dtype, turned, call.kwargs.get("alpha", 1))


@_rule("_grouped_mm")
def _grouped_mm(call: Call) -> Scratch | None:
    """Multiply group by group, each as `mm` would (GroupedMMUtils.h, _grouped_mm_fallback).

    Groups' sizes are data. Where their ends are fake the program is that of the routing that takes most: a block of
    all rows, up to the 256 that a block can have.
    """
    cpu, left, right = call.cpu, call.args[0], call.args[1]
    if not _through_onednn(cpu, left.dtype, 16**3 + 1):
        return OUTPUTS_ONLY
    if not cpu.brgemm_bf16 or left.dim() != 2 or right.dim() != 3:
        return None
    inner, columns = left.size(1), right.size(2)
    ends = argument(call.args, call.kwargs, 2, "offs")
    steps = Steps()
    steps.outputs()
    if type(ends) is not torch.Tensor or ends.is_meta:
        steps.take(product_bytes(1, min(256, left.size(0)), inner, columns, cpu.threads, False, True) or 0)
        return steps.done()
    for start, end in pairwise([0, *ends.tolist()]):
        if _through_onednn(cpu, left.dtype, (end - start) * inner * columns):
            taken = product_bytes(1, end - start, inner, columns, cpu.threads, False, False)
            if taken is None:
                return None
            steps.give(steps.take(taken))
    return steps.done()


def _through_onednn(cpu: Cpu, dtype: torch.dtype, multiplications: int) -> bool:
    """Return whether oneDNN multiplies: 16-bit types it knows, above 16³ (mkldnn/Matmul.cpp, checksize)."""
    if multiplications <= 16**3:
        return False
    return (dtype is BFLOAT16 and cpu.onednn_bf16) or (dtype is HALF and cpu.onednn_fp16)


def _product(
    cpu: Cpu,
    steps: Steps,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    turned: bool,
    alpha: float,
) -> Scratch | None:
    """Finish the program of a product of `shape`: (batch, rows, inner, columns)."""
    if not _through_onednn(cpu, dtype, math.prod(shape)) or alpha == 0:
        return steps.done()
    if dtype is not BFLOAT16 or not cpu.brgemm_bf16:
        return None
    taken = product_bytes(*shape, cpu.threads, turned, False)
    if taken is None:
        return None
    # A factor is handed to oneDNN as a tensor of one fp32 number (ideep operators/matmul.hpp, do_prepare).
    steps.take(4 if alpha != 1 else 0)
    steps.take(taken)
    return steps.done()


# Convolution.


@_rule("convolution", "_convolution")
def _convolution(call: Call) -> Scratch | None:
    """Go to oneDNN or unfold the image (Convolution.cpp, use_mkldnn and _select_conv_backend).

    fp32 goes to oneDNN unless it is small: a 1 by 1 kernel on one thread, or one image of at most 20,480 numbers.
    """
    x, weight, bias, stride, padding, dilation, transposed, _, groups = call.args[:9]
    if transposed or x.dim() < 3 or weight.dim() != x.dim() or not weight.is_contiguous() or not x.numel():
        return None
    spatial = x.dim() - 2
    flat = spatial == 1
    lift = (1,) if flat else ()

    def over(given: Sequence[int]) -> tuple[int, ...]:
        return tuple(given) if len(given) == spatial else tuple(given) * spatial

    if not flat and not x.is_contiguous() and channels_last(x):
        return None
    shape = Convolution(
        batch=x.size(0), inner=x.size(1), outer=weight.size(0), groups=groups, image=(*lift, *x.shape[2:]),
        result=(*lift, *call.outputs[0].shape[2:]), kernel=(*lift, *weight.shape[2:]), stride=(*lift, *over(stride)),
        padding=((0,) if flat else ()) + over(padding), biased=bias is not None, dtype=x.dtype,
    )  # fmt: skip
    dilated = any(step != 1 for step in dilation)
    steps = Steps()
    if not x.is_contiguous():
        steps.copy(x)
    if x.dtype is FLOAT:
        heavy = shape.strided or dilated or shape.batch >= 16 or call.cpu.threads > 1 or shape.kernel[-2:] != (1, 1)
        large = shape.batch * shape.inner * shape.image[0] * shape.image[1] > 20480
        wide = min(shape.kernel[-2:]) > 3
        through = heavy and (groups > 1 or wide or shape.batch > 1 or large)
    else:
        through = _through_onednn(call.cpu, x.dtype, 16**3 + 1)
    if not through:
        return None if dilated else _unfolded(steps, shape)
    if not call.cpu.isa.startswith("AVX512") or (x.dtype is not FLOAT and not call.cpu.brgemm_bf16) or x.dtype is HALF:
        return None
    return _blocked_convolution(call.cpu, steps, shape)


def _unfolded(steps: Steps, shape: Convolution) -> Scratch:
    """Take every patch of the image as a column, unless the kernel is a single point (ConvolutionMM2d.cpp).

    ConvolutionMM3d.cpp does the same, for all groups at once. Groups of a 2-D one are convolved one by one, from a
    copy of their channels if several images interleave these, and their results joined (Convolution.cpp,
    _convolution).
    """
    point = math.prod(shape.kernel) == 1 and not shape.strided and not any(shape.padding)
    size = shape.dtype.itemsize
    columns = shape.batch * shape.inner * math.prod(shape.kernel) * math.prod(shape.result) * size
    if shape.groups == 1 or len(shape.image) == 3:
        taken = steps.take(0 if point and shape.groups == 1 else columns)
        steps.outputs()
        steps.give(taken)
        return steps.done()
    image = shape.batch * shape.inner * math.prod(shape.image) * size
    result = shape.batch * shape.outer * math.prod(shape.result) * size
    for _ in range(shape.groups):
        copied = steps.take(image // shape.groups if shape.batch > 1 else 0)
        taken = steps.take(0 if point else columns // shape.groups)
        steps.take(result // shape.groups)
        steps.give(taken, copied)
    steps.outputs()
    return steps.done()


def _blocked_convolution(cpu: Cpu, steps: Steps, shape: Convolution) -> Scratch | None:
    """Take oneDNN's scratchpad, then image, weights and result in its layout.

    mkldnn/Conv.cpp, mkldnn_convolution; ideep include/ideep/operators/conv.hpp, do_compute: image and weights are
    reordered, the result is made in blocks, all but it is given back, and it is copied into the output.
    """
    needed = convolution_bytes(shape, cpu.threads, cpu.l2_bytes)
    if needed is None:
        return None
    scratchpad = steps.take(needed.scratchpad)
    source = steps.take(needed.image)
    packed = steps.take(needed.weights)
    steps.take(needed.result)
    steps.give(packed, source, scratchpad)
    steps.outputs()
    return steps.done()


# Attention.


@_rule("_scaled_dot_product_flash_attention_for_cpu")
def _flash(call: Call) -> Scratch | None:
    """Take scores, two rows of statistics and a result for each thread (cpu/FlashAttentionKernel.cpp).

    Queries go in blocks of 256, 64 or 32 for at least 768, 192 and fewer of them, keys in blocks of 512. 16-bit
    types add scores in their own type. Packing for AMX rounds blocks up to 64 and is not modelled for fp16 there.
    """
    query, key = call.args[0], call.args[1]
    if query.dtype is HALF and "amx_tile" in call.cpu.flags:
        return None
    return _flash_buffers(query.size(2), key.size(2), query.size(3), query.dtype, call.cpu.threads)


@functools.cache
def _flash_buffers(queries: int, keys: int, width: int, dtype: torch.dtype, threads: int) -> Scratch:
    query_block = min(queries, 256 if queries >= 768 else 64 if queries >= 192 else 32)
    key_block = min(keys, 512)
    sums = query_block * (key_block + 2 + width)
    steps = Steps()
    steps.outputs()
    steps.take(threads * sums * (8 if dtype is DOUBLE else 4))
    if dtype in HALF_TYPES:
        steps.take(threads * query_block * key_block * 2)
    return steps.done()

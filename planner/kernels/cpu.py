"""Memory that the CPU's kernels take beside their outputs, by operator, type, threads and instruction set.

A dispatch mode sees the tensors that an operator returns. Kernels also take memory from the same allocator and give
it back before they return: copies in another type or layout, buffers for each thread, oneDNN's scratchpads. Each rule
below restates what torch 2.13 (with oneDNN 3.12) does, and names the file that says so: paths without a project are
under `aten/src/ATen/native` of pytorch, `ideep` and `oneDNN` name the others. No number was fitted to a measurement.

Not modelled (`CpuKernels.scratch` returns None): convolution through oneDNN that is transposed, channels-last, grouped
by other than 16 channels or depthwise in 3-D, and all of it without AVX-512 or, in bf16, without AVX512-BF16 or with
AMX; bf16 products through oneDNN without AVX512-BF16 or with AMX; fp16 attention with AMX; oneDNN's recurrent layers;
concatenation of mixed types; several masks in one index; batch normalisation while training and dropout; Fourier
transforms, distances, unfolding, unique values, antialiased resizing; torch's fused encoder layers and multi-head
attention; decompositions and other linear algebra, medians, bags of embeddings.

Known limitations: oneDNN gives a bf16 convolution of single points over some ten pixels fewer threads than there are,
and it then takes less than said. Memory that kernels take from elsewhere (`new`, MKL's buffers, stacks) is never
counted, nor are tensors that `torch.tensor(number)` makes, which are no operator's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from planner.kernels import cpu_products
from planner.kernels.cpu_rules import (
    DOUBLE,
    FLOAT,
    Call,
    Cpu,
    Rule,
    Rules,
    Steps,
    argument,
    channels_last,
    transpose_block,
)
from planner.kernels.programs import HALF_TYPES, compares_directly, nbytes, takes_nothing
from planner.lifetimes import OUTPUTS_ONLY, Scratch

_FLAGS = ("avx512_bf16", "avx512_fp16", "avx_ne_convert", "amx_tile")


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuKernels(Cpu):
    """The kernels of one CPU."""

    @classmethod
    def local(cls) -> CpuKernels:
        """Return this machine's CPU, with the threads that torch is set to."""
        found = torch.cpu.get_capabilities()
        return cls(
            threads=torch.get_num_threads(),
            isa=torch.backends.cpu.get_cpu_capability(),
            flags=frozenset(flag for flag in _FLAGS if found.get(flag)),
            l2_bytes=int(found.get("l2_cache_size") or 1 << 20),
        )

    def scratch(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any] | None, outputs: Sequence[torch.Tensor]
    ) -> Scratch | None:
        """Return what `func` takes beside `outputs`, or None where that is not known.

        Reads shapes, types and strides only, and where a grouped product's rows end if that is real. The program
        counts allocations (steps > 0) from 1.
        """
        rule = _RULES.get(func)
        if rule is not None:
            return rule(Call(self, args, kwargs or {}, outputs))
        return OUTPUTS_ONLY if takes_nothing(func, _WRITERS) else None


# Operators without a rule that take nothing on the CPU: tests hold them against the profiler, most within whole models.
_WRITERS = frozenset(
    (
        "all", "amax", "amin", "any", "argmax", "argmin", "avg_pool2d", "index_put_", "linalg_vector_norm",
        "masked_scatter", "max", "min", "native_group_norm", "std", "topk", "tril", "triu", "unique_consecutive", "var",
    )
)  # fmt: skip
_RULES = Rules(cpu_products.RULES)
_rule = _RULES.enter


# Element by element.


def _number_type(number: Any) -> torch.dtype:
    if isinstance(number, bool):
        return torch.bool
    return torch.int64 if isinstance(number, int) else torch.complex128 if isinstance(number, complex) else DOUBLE


def _category(dtype: torch.dtype) -> int:
    if dtype is torch.bool:
        return 0
    return 3 if dtype.is_complex else 2 if dtype.is_floating_point else 1


def common_type(operands: Sequence[Any]) -> torch.dtype:
    """Return the type in which an element-wise kernel computes (TypeProperties.cpp, result_type).

    Tensors with dimensions decide, unless a tensor without any, then a number, is of a higher category.
    """
    result: torch.dtype | None = None
    for group in (
        [x.dtype for x in operands if isinstance(x, torch.Tensor) and x.dim()],
        [x.dtype for x in operands if isinstance(x, torch.Tensor) and not x.dim()],
        [
            torch.get_default_dtype() if isinstance(x, float) else _number_type(x)
            for x in operands
            if not isinstance(x, torch.Tensor)
        ],
    ):
        for dtype in group[1:]:
            group[0] = torch.promote_types(group[0], dtype)
        if group and (result is None or _category(group[0]) > _category(result)):
            result = group[0]
    assert result is not None
    return result


def _casts(steps: Steps, operands: Sequence[Any], common: torch.dtype) -> None:
    """Take what a TensorIterator takes for its inputs on a CPU (TensorIterator.cpp, compute_types).

    An input of another type is converted whole beforehand. A Python number is first a tensor without dimensions of
    8 bytes (a double or a 64-bit integer), which the argument parser or `wrapped_scalar_tensor` makes.
    """
    for x in operands:
        if not isinstance(x, torch.Tensor):
            steps.take(_number_type(x).itemsize)
    for x in operands:
        if isinstance(x, torch.Tensor):
            if x.dtype is not common:
                steps.take(nbytes(x, common))
        elif _number_type(x) is not common:
            steps.take(common.itemsize)


@functools.cache
def _with_number(dtype: torch.dtype, kind: type, divides: bool) -> Scratch | None:
    """Return the program for a tensor of `dtype` and a number, or None if the tensor is converted too."""
    number = _number_type(kind())
    if _category(number) > _category(dtype) or (divides and _category(dtype) < 2):
        return None
    return Scratch(program=(number.itemsize, 0) if number is dtype else (number.itemsize, dtype.itemsize, 0))


def _pointwise(operands: int, *, divides: bool = False, changes: bool = False, first: int = 0) -> Rule:
    """Make the rule of an element-wise operator; BinaryOps.cpp, PointwiseOps.cpp, TensorCompare.cpp.

    divides: integers become floats. changes: in place, so that a result in another type needs a temporary too.
    first: position of the first operand.
    """

    def rule(call: Call) -> Scratch | None:
        args = call.args
        if operands == 2 and isinstance(args[first], torch.Tensor):
            left, right = args[first], args[first + 1]
            if not isinstance(right, torch.Tensor):
                plain = _with_number(left.dtype, right.__class__, divides)
                if plain is not None:
                    return plain
            elif left.dtype is right.dtype and not divides:
                return OUTPUTS_ONLY
        given = [x for x in args[first : first + operands] if x is not None]
        if not divides and len({x.dtype if isinstance(x, torch.Tensor) else None for x in given}) == 1:
            return OUTPUTS_ONLY
        common = common_type(given)
        if divides and _category(common) < 2:
            common = torch.get_default_dtype()
        steps = Steps()
        if changes and given[0].dtype is not common:
            steps.take(nbytes(given[0], common))
        _casts(steps, given, common)
        steps.outputs()
        return steps.done()

    return rule


def _both(name: str) -> list[str]:
    return [f"{name}.Tensor", f"{name}.Scalar"]


_BINARY = ("add", "sub", "mul", "rsub", "remainder", "fmod", "bitwise_and", "bitwise_or", "bitwise_xor")
_rule(*(name for kind in _BINARY for name in _both(kind)))(_pointwise(2))
_rule(*(name for kind in ("eq", "ne", "lt", "le", "gt", "ge") for name in _both(kind)))(_pointwise(2))
_rule(*_both("__lshift__"), *_both("__rshift__"), *_both("bitwise_left_shift"), *_both("bitwise_right_shift"))(
    _pointwise(2)
)
_rule("floor_divide", "floor_divide.Scalar", "div.Tensor_mode", "div.Scalar_mode", "xlogy.Tensor")(_pointwise(2))
_rule("maximum", "minimum", "fmax", "fmin", "pow.Tensor_Tensor", "clamp_min.Tensor", "clamp_max.Tensor")(_pointwise(2))
_rule("div.Tensor", "div.Scalar", "atan2")(_pointwise(2, divides=True))
_rule(*(name for kind in _BINARY for name in _both(f"{kind}_")))(_pointwise(2, changes=True))
_rule("div_.Tensor", "div_.Scalar", "floor_divide_.Tensor")(_pointwise(2, changes=True))
_rule("addcmul", "addcdiv", "lerp.Tensor", "clamp.Tensor")(_pointwise(3))
_rule("where.self")(_pointwise(2, first=1))

_FLOATING = (
    "acos asin atan ceil_ cos cosh digamma erf erfc erfinv exp exp2 expm1 lgamma log log10 log1p log2 logit "
    "reciprocal rsqrt sigmoid sin sinc sinh sqrt tan tanh"
)


@_rule(*_FLOATING.split())
def _unary(call: Call) -> Scratch | None:
    """Convert integers to floats beforehand (TensorIterator.h, build_borrowing_unary_float_op)."""
    if call.args[0].dtype is call.outputs[0].dtype:
        return OUTPUTS_ONLY
    return Scratch(program=(nbytes(call.args[0], call.outputs[0].dtype), 0))


@_rule("pow.Scalar")
def _pow_of_number(call: Call) -> Scratch | None:
    """Make the number a tensor after the output (Pow.cpp, pow_Scalar_out); 1 to any power only fills."""
    if call.args[0] == 1:
        return OUTPUTS_ONLY
    steps = Steps()
    steps.outputs()
    _casts(steps, call.args[:2], common_type(call.args[:2]))
    return steps.done()


@_rule("isin.Tensor_Tensor")
def _isin(call: Call) -> Scratch | None:
    """Compare in place, unless there are many tests (cpu/TensorCompareKernel.cpp, isin_default_kernel_cpu)."""
    elements, tests = call.args[:2]
    are_tensors = isinstance(elements, torch.Tensor) and isinstance(tests, torch.Tensor)
    return OUTPUTS_ONLY if are_tensors and compares_directly(elements, tests) else None


@_rule("isinf")
def _isinf(call: Call) -> Scratch | None:
    """Compare an absolute copy with a number (TensorCompare.cpp, isinf)."""
    x = call.args[0]
    if not x.dtype.is_floating_point:
        return OUTPUTS_ONLY
    steps = Steps()
    steps.take(nbytes(x))
    _casts(steps, [math.inf], x.dtype)
    steps.outputs()
    return steps.done()


# Copies.


@_rule("clone", "_to_copy", "copy_")
def _copied(call: Call) -> Scratch | None:
    """Take the block of a transposed copy; other copies, conversions of type among them, take nothing (Copy.cpp)."""
    target, source = (
        call.outputs[0],
        call.args[-1] if len(call.args) > 1 and isinstance(call.args[1], torch.Tensor) else call.args[0],
    )
    if source.dim() != 2 or target.dtype is not source.dtype or target.shape != source.shape:
        return OUTPUTS_ONLY
    block = transpose_block(source) if target.is_contiguous() else 0
    return Scratch(program=(0, block)) if block else OUTPUTS_ONLY


@_rule("embedding")
def _embedding(call: Call) -> Scratch | None:
    """Flatten the indices first, by a copy unless a view does (Embedding.cpp, embedding: indices.reshape(-1))."""
    indices = call.args[1]
    if indices.dim() < 2 or _flattens(indices):
        return OUTPUTS_ONLY
    return Scratch(program=(nbytes(indices), 0))


def _flattens(tensor: torch.Tensor) -> bool:
    """Return whether all dimensions merge into one view (TensorUtils.cpp, computeStride)."""
    dims = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(dims))


@_rule("repeat")
def _repeat(call: Call) -> Scratch | None:
    """Take the shapes that the result's unfolded view is made of, 8 bytes an entry (TensorShape.cpp, repeat)."""
    size = 8 * call.outputs[0].dim()
    return Scratch(program=(0, size, 8, size, -2, 2 * size)) if call.outputs[0].numel() else None


# Reductions.


@_rule("sum", "sum.dim_IntList", "prod", "prod.dim_int", "nansum")
def _sum(call: Call) -> Scratch | None:
    """Convert the input to the output's type, after the output (ReduceOpsUtils.h, make_reduction)."""
    x, out = call.args[0], call.outputs[0]
    return OUTPUTS_ONLY if x.dtype is out.dtype else Scratch(program=(0, nbytes(x, out.dtype)))


@_rule("cumsum", "cumprod")
def _cumulative(call: Call) -> Scratch | None:
    """Convert the input to the output's type (ReduceOps.cpp, impl_func_cum_ops)."""
    return _sum(call)


@_rule("mean", "mean.dim")
def _mean(call: Call) -> Scratch | None:
    """Sum, then divide in place by a number (ReduceOps.cpp, mean_out).

    The sum of a 16-bit type is made in fp32, from an fp32 copy of the whole input.
    """
    x, out = call.args[0], call.outputs[0]
    steps = Steps()
    steps.outputs()
    summed = FLOAT if out.dtype in HALF_TYPES else out.dtype
    if summed is not out.dtype:
        steps.take(nbytes(out, summed))
    if x.dtype is not summed:
        steps.give(steps.take(nbytes(x, summed)))
    _casts(steps, [x.numel()], summed)
    return steps.done()


@_rule("logsumexp")
def _logsumexp(call: Call) -> Scratch | None:
    """Take the maxima, where they are infinite, and the exponentials (ReduceOps.cpp, logsumexp_out_impl)."""
    x, out = call.args[0], call.outputs[0]
    if x.dtype is not out.dtype or not x.numel():
        return None
    steps = Steps()
    steps.outputs()
    maxima = steps.take(nbytes(out))
    number = [steps.take(8), steps.take(0 if out.dtype is DOUBLE else out.dtype.itemsize), steps.take(out.numel())]
    steps.give(*number, maxima)
    steps.take(nbytes(x))
    steps.take(nbytes(out))
    return steps.done()


@_rule("sort", "sort.stable", "argsort.stable")
def _sort(call: Call) -> Scratch | None:
    """Take the indices 0, 1, ... of one row, to be copied into every row (Sorting.cpp, sort_stable_out)."""
    x = call.args[0]
    position = call.kwargs.get("dim", next((a for a in call.args[1:] if type(a) is int), -1))
    return Scratch(program=(0, 8 * x.size(position))) if x.dim() and x.numel() > 1 else OUTPUTS_ONLY


@_rule("kthvalue")
def _kthvalue(call: Call) -> Scratch | None:
    """Partition a copy of the values and their 64-bit positions (Sorting.cpp, kthvalue_out_impl_cpu)."""
    return Scratch(program=(0, nbytes(call.args[0]), 8 * call.args[0].numel()))


@_rule("histc")
def _histc(call: Call) -> Scratch | None:
    """Take the edges, and counts for each thread (Histogram.cpp, histc; cpu/HistogramKernel.cpp)."""
    out = call.outputs[0]
    return Scratch(program=(nbytes(out) + out.dtype.itemsize, 0, call.cpu.threads * nbytes(out)))


@_rule("multinomial")
def _multinomial(call: Call) -> Scratch | None:
    """Check the weights, then divide them by exponential noise as large as they are (Distributions.cpp, multinomial).

    With replacement and more than one draw, a row of cumulative sums instead (cpu/MultinomialKernel.cpp).
    """
    x, count = call.args[0], call.args[1]
    steps = Steps()
    steps.outputs()
    if count != 1 and argument(call.args, call.kwargs, 2, "replacement", False):
        steps.take(x.size(-1) * max(4, x.dtype.itemsize))
        return steps.done()
    size = x.dtype.itemsize
    steps.take(size)
    steps.take(size)
    valid = [_compared(steps, 1, size), _compared(steps, 1, size)]
    steps.take(1)
    steps.give(*valid)
    rows = x.numel() // x.size(-1)
    sums = steps.take(rows * size)
    zero = _compared(steps, rows, size)
    steps.take(1)
    steps.give(zero, sums)
    steps.give(steps.take(1))
    steps.take(nbytes(x))
    steps.take(call.outputs[0].numel() * size if count > 1 else 0)
    return steps.done()


def _compared(steps: Steps, count: int, size: int) -> int:
    """Take `count` truths of a comparison with a number, of a type of `size` bytes."""
    number = [steps.take(8), steps.take(size)]
    truths = steps.take(count)
    steps.give(*number)
    return truths


# Normalisation.


def _contiguous_first(call: Call) -> Scratch | None:
    """Copy an input that is not contiguous (layer_norm.cpp: expect_contiguous), before any output."""
    if call.args[0].is_contiguous():
        return OUTPUTS_ONLY
    steps = Steps()
    steps.copy(call.args[0])
    steps.outputs()
    return steps.done()


_rule("native_layer_norm")(_contiguous_first)


@_rule("_softmax", "_log_softmax")
def _softmax(call: Call) -> Scratch | None:
    """Copy an input that is not contiguous, after the output (SoftMax.cpp, softmax_cpu_out)."""
    if call.args[0].is_contiguous():
        return OUTPUTS_ONLY
    steps = Steps()
    steps.outputs()
    steps.copy(call.args[0])
    return steps.done()


@_rule("native_batch_norm", "_native_batch_norm_legit_no_training")
def _batch_norm(call: Call) -> Scratch | None:
    """Fold mean, variance, weight and bias into two rows (cpu/batch_norm_kernel.cpp, batch_norm_cpu_kernel_impl)."""
    x = call.args[0]
    if len(call.args) > 5 and isinstance(call.args[5], bool) and call.args[5]:
        return None
    formats = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
    if not any(x.is_contiguous(memory_format=f) for f in formats if f is torch.contiguous_format or _fits(x, f)):
        return None
    row = x.size(1) * (8 if x.dtype is DOUBLE else 4)
    return Scratch(program=(0, row, row))


def _fits(x: torch.Tensor, layout: torch.memory_format) -> bool:
    return x.dim() == (4 if layout is torch.channels_last else 5)


# Resizing.


def _upsample(taps: int) -> Rule:
    """Make the rule of a resizing operator (cpu/UpSampleKernel.cpp).

    Small two-dimensional outputs, and inputs with channels last, go through channels-last copies of both
    (_use_vectorized_kernel_cond_2d and the like); others take for each dimension and tap a 64-bit index and a weight
    for every output coordinate (upsample_generic_Nd_kernel_impl, HelperInterpBase).
    """

    def rule(call: Call) -> Scratch | None:
        x, out = call.args[0], call.outputs[0]
        steps = Steps()
        steps.outputs()
        last = channels_last(x) and x.size(1) > 3
        if x.dim() == 4 and taps < 4 and (last or out.size(-1) + out.size(-2) <= 128):
            steps.take(0 if channels_last(x) else nbytes(x))
            steps.take(0 if channels_last(out) else nbytes(out))
            return steps.done()
        if x.dim() == 5 and last:
            return OUTPUTS_ONLY if channels_last(out) else None
        for size in out.shape[2:]:
            for _ in range(taps):
                steps.take(8 * size)
                steps.take(x.dtype.itemsize * size)
        return steps.done()

    return rule


_rule(*(f"upsample_nearest{n}d{o}" for n in (1, 2, 3) for o in ("", ".vec")))(_upsample(1))
_rule(*(f"upsample_{n}{o}" for n in ("linear1d", "bilinear2d", "trilinear3d") for o in ("", ".vec")))(_upsample(2))
_rule("upsample_bicubic2d", "upsample_bicubic2d.vec")(_upsample(4))


# Indexing.


@_rule("index.Tensor")
def _index(call: Call) -> Scratch | None:
    """Turn masks into 64-bit coordinates of what they choose, before the output (IndexingUtils.h, expandTensors)."""
    x, indices = call.args[0], call.args[1]
    masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
    if not masks:
        return OUTPUTS_ONLY
    if len(masks) > 1 or len([i for i in indices if i is not None]) > 1:
        return None
    mask = masks[0]
    before = list(indices).index(mask) if len(indices) > 1 else 0
    rest = math.prod(x.shape[:before]) * math.prod(x.shape[before + mask.dim() :])
    chosen = call.outputs[0].numel() // rest if rest else 0
    steps = Steps()
    steps.take(8 * mask.dim() * chosen)
    steps.outputs()
    return steps.done()


@_rule("gather", "scatter.src", "scatter.value", "scatter_.src", "scatter_.value", "scatter_add", "scatter_add_")
def _scatter(call: Call) -> Scratch | None:
    """Work in an fp32 copy of the result, for 16-bit types (cpu/ScatterGatherKernel.cpp, create_acc_buffer)."""
    out = call.outputs[0]
    return Scratch(program=(0, nbytes(out, FLOAT))) if out.dtype in HALF_TYPES else OUTPUTS_ONLY


@_rule("index_add", "index_add_")
def _index_add(call: Call) -> Scratch | None:
    """Add 16-bit numbers in fp32 (cpu/ScatterGatherKernel.cpp).

    Along the first or last dimension this is a scatter (TensorAdvancedIndexing.cpp, index_add_cpu_out), in an fp32
    copy of the result; or in one fp32 row for each thread, if it is rows of at least 16 elements of contiguous
    tensors (can_use_expanded_index_path). Along others, and with a factor, slices are added one by one.
    """
    out, position, index, source = call.outputs[0], call.args[1], call.args[2], call.args[3]
    if out.dtype not in HALF_TYPES or out.dim() < 2 or not source.numel() or not out.numel():
        return OUTPUTS_ONLY
    position %= out.dim()
    if position not in (0, out.dim() - 1) or index.dtype is not torch.int64 or call.kwargs.get("alpha", 1) != 1:
        return OUTPUTS_ONLY
    row = out.numel() // out.size(0)
    by_rows = position == 0 and row >= 16 and out.is_contiguous() and source.is_contiguous()
    return Scratch(program=(0, call.cpu.threads * row * 4 if by_rows else nbytes(out, FLOAT)))


# Known to take something that is not modelled.


@_rule(
    "mkldnn_rnn_layer",
    "native_dropout",
    "_fft_r2c",
    "_fft_c2r",
    "_fft_c2c",
    "_euclidean_dist",
    "_cdist_forward",
    "mode",
    "unique_dim",
    "_unique2",
    "bincount",
    "repeat_interleave.Tensor",
    "im2col",
    "_upsample_bicubic2d_aa",
    "_upsample_bilinear2d_aa",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
    "linalg_matrix_exp",
    "median",
    "nanmedian",
    "linalg_inv_ex",
    "_linalg_solve_ex",
    "_linalg_eigh",
    "_linalg_svd",
    "linalg_qr",
    "_linalg_det",
    "_linalg_slogdet",
    "linalg_lu_factor_ex",
    "linalg_lu",
    "linalg_cholesky_ex",
    "linalg_eig",
    "linalg_lstsq",
    "triangular_solve",
    "_trilinear",
    "_embedding_bag",
    "_embedding_bag_forward_only",
    "_ctc_loss",
)
def _unknown(call: Call) -> Scratch | None:
    return None


@_rule("median.dim", "nanmedian.dim")
def _median(call: Call) -> Scratch | None:
    """Take nothing along the last dimension of a contiguous tensor; how others are brought there is not modelled."""
    x, dim = call.args[0], call.args[1]
    return OUTPUTS_ONLY if x.is_contiguous() and dim % max(x.dim(), 1) == x.dim() - 1 else None


@_rule("cat")
def _cat(call: Call) -> Scratch | None:
    """Take nothing unless types differ (TensorShape.cpp, cat_out)."""
    types = {tensor.dtype for tensor in call.args[0]}
    return OUTPUTS_ONLY if len(types) == 1 else None

"""Memory that the CPU's kernels take beside their outputs, by operator, type, threads and instruction set.

A dispatch mode sees the tensors that an operator returns. Kernels also take memory from the same allocator and give
it back before they return: copies in another type or layout, buffers for each thread, oneDNN's scratchpads. Each rule
below restates what torch 2.13 (with oneDNN 3.12) does, and names the file that says so: paths without a project are
under `aten/src/ATen/native` of pytorch, `ideep` and `oneDNN` name the others. No number was fitted to a measurement.

Not modelled (`CpuKernels.scratch` returns None): convolution through oneDNN that is transposed, channels-last, grouped
by other than 16 channels or depthwise in 3-D, and all of it without AVX-512 or, in bf16, without AVX512-BF16 or with
AMX; bf16 products through oneDNN without AVX512-BF16 or with AMX; fp16 attention with AMX; oneDNN's recurrent layers;
concatenation of mixed types; several masks in one index; batch normalisation while training and dropout; Fourier
transforms, distances, unfolding, unique values, antialiased resizing.

Known limitations: oneDNN gives a bf16 convolution of single points over some ten pixels fewer threads than there are,
and it then takes less than said. Memory that kernels take from elsewhere (`new`, MKL's buffers, stacks) is never
counted, nor are tensors that `torch.tensor(number)` makes, which are no operator's.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from planner.lifetimes import OUTPUTS_ONLY, Scratch

aten = torch.ops.aten

FLOAT, DOUBLE, HALF, BFLOAT16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
_REDUCED = (HALF, BFLOAT16)
_FLAGS = ("avx512_bf16", "avx512_fp16", "avx_ne_convert", "amx_tile")


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuKernels:
    """The CPU that kernels will run on.

    isa: what torch calls it ("AVX512", "AVX2", "DEFAULT", ...).
    flags: of avx512_bf16, avx512_fp16, avx_ne_convert and amx_tile, those that it has: they choose kernels.
    l2_bytes: of one core; oneDNN splits work by it.
    """

    threads: int
    isa: str
    flags: frozenset[str] = frozenset()
    l2_bytes: int = 1 << 20

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
        """Return what `func` takes beside `outputs`, or None where that is known to be something and not what.

        Reads shapes, types and strides only, and where a grouped product's rows end if that is real. The program
        counts allocations (steps > 0) from 1.
        """
        rule = _RULES.get(func)
        return OUTPUTS_ONLY if rule is None else rule(_Call(self, args, kwargs or {}, outputs))

    @property
    def onednn_bf16(self) -> bool:
        """Whether bf16 products go to oneDNN (mkldnn/Utils.h, mkldnn_bf16_device_check)."""
        return self.isa.startswith("AVX512") or "avx_ne_convert" in self.flags

    @property
    def onednn_fp16(self) -> bool:
        """Whether fp16 products go to oneDNN (mkldnn/Utils.h, mkldnn_fp16_device_check)."""
        return bool({"avx512_fp16", "avx_ne_convert"} & self.flags)

    @property
    def brgemm_bf16(self) -> bool:
        """Whether oneDNN's bf16 kernels are those modelled here, for AVX512-BF16 without AMX."""
        return self.isa.startswith("AVX512") and "avx512_bf16" in self.flags and "amx_tile" not in self.flags


class _Call(NamedTuple):
    """An operator as it is called, and on what."""

    cpu: CpuKernels
    args: Sequence[Any]
    kwargs: dict[str, Any]
    outputs: Sequence[torch.Tensor]


Rule = Callable[[_Call], Scratch | None]
_RULES: dict[Any, Rule] = {}


class _Steps:
    """Writes a program; `take` returns the number by which `give` frees."""

    def __init__(self) -> None:
        self.program: list[int] = []
        self.taken = 0

    def take(self, nbytes: int) -> int:
        """Allocate, unless there is nothing to hold: the allocator is not asked for 0 bytes."""
        if nbytes == 0:
            return 0
        self.program.append(nbytes)
        self.taken += 1
        return self.taken

    def give(self, *taken: int) -> None:
        self.program += [-which for which in taken if which]

    def outputs(self) -> None:
        self.program.append(0)

    def copy(self, source: torch.Tensor) -> int:
        """Take a contiguous copy of `source`, and for as long as copying lasts the block that transposing takes."""
        taken = self.take(_nbytes(source))
        self.give(self.take(_transpose_block(source)))
        return taken

    def done(self) -> Scratch:
        return OUTPUTS_ONLY if self.program == [0] else Scratch(program=tuple(self.program))


def _ceil(number: int, unit: int) -> int:
    return -(-number // unit)


def _up(number: int, unit: int) -> int:
    return _ceil(number, unit) * unit


def _nbytes(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> int:
    return tensor.numel() * (dtype or tensor.dtype).itemsize


def _argument(args: Sequence[Any], kwargs: dict[str, Any], position: int, name: str, default: Any = None) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def _rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule under operators such as "mul.Tensor"; names that this torch lacks are passed over."""

    def enter(rule: Rule) -> Rule:
        for name in names:
            packet, _, overload = name.partition(".")
            found = getattr(getattr(aten, packet, None), overload or "default", None)
            if found is not None:
                _RULES[found] = rule
        return rule

    return enter


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


def _casts(steps: _Steps, operands: Sequence[Any], common: torch.dtype) -> None:
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
                steps.take(_nbytes(x, common))
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

    def rule(call: _Call) -> Scratch | None:
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
        steps = _Steps()
        if changes and given[0].dtype is not common:
            steps.take(_nbytes(given[0], common))
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
def _unary(call: _Call) -> Scratch | None:
    """Convert integers to floats beforehand (TensorIterator.h, build_borrowing_unary_float_op)."""
    if call.args[0].dtype is call.outputs[0].dtype:
        return OUTPUTS_ONLY
    return Scratch(program=(_nbytes(call.args[0], call.outputs[0].dtype), 0))


@_rule("pow.Scalar")
def _pow_of_number(call: _Call) -> Scratch | None:
    """Make the number a tensor after the output (Pow.cpp, pow_Scalar_out); 1 to any power only fills."""
    if call.args[0] == 1:
        return OUTPUTS_ONLY
    steps = _Steps()
    steps.outputs()
    _casts(steps, call.args[:2], common_type(call.args[:2]))
    return steps.done()


@_rule("isinf")
def _isinf(call: _Call) -> Scratch | None:
    """Compare an absolute copy with a number (TensorCompare.cpp, isinf)."""
    x = call.args[0]
    if not x.dtype.is_floating_point:
        return OUTPUTS_ONLY
    steps = _Steps()
    steps.take(_nbytes(x))
    _casts(steps, [math.inf], x.dtype)
    steps.outputs()
    return steps.done()


# Copies.

_TRANSPOSE_SIDE = 60


def _transpose_block(source: torch.Tensor) -> int:
    """Return the bytes of the block through which a transposed matrix is copied (Copy.cpp, copy_transpose_valid)."""
    if source.dim() != 2 or source.numel() < _TRANSPOSE_SIDE**2:
        return 0
    if source.stride(0) != 1 or source.stride(1) != source.size(0):
        return 0
    # One row of side `numel` is contiguous as well, and is then copied plainly by what calls this.
    side = 2 * _TRANSPOSE_SIDE if source.dtype is torch.uint8 else _TRANSPOSE_SIDE
    return side * side * source.dtype.itemsize


@_rule("clone", "_to_copy", "copy_")
def _copied(call: _Call) -> Scratch | None:
    """Take the block of a transposed copy; other copies, conversions of type among them, take nothing (Copy.cpp)."""
    target, source = (
        call.outputs[0],
        call.args[-1] if len(call.args) > 1 and isinstance(call.args[1], torch.Tensor) else call.args[0],
    )
    if source.dim() != 2 or target.dtype is not source.dtype or target.shape != source.shape:
        return OUTPUTS_ONLY
    block = _transpose_block(source) if target.is_contiguous() else 0
    return Scratch(program=(0, block)) if block else OUTPUTS_ONLY


@_rule("embedding")
def _embedding(call: _Call) -> Scratch | None:
    """Flatten the indices first, by a copy unless a view does (Embedding.cpp, embedding: indices.reshape(-1))."""
    indices = call.args[1]
    if indices.dim() < 2 or _flattens(indices):
        return OUTPUTS_ONLY
    return Scratch(program=(_nbytes(indices), 0))


def _flattens(tensor: torch.Tensor) -> bool:
    """Return whether all dimensions merge into one view (TensorUtils.cpp, computeStride)."""
    dims = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(dims))


@_rule("repeat")
def _repeat(call: _Call) -> Scratch | None:
    """Take the shapes that the result's unfolded view is made of, 8 bytes an entry (TensorShape.cpp, repeat)."""
    size = 8 * call.outputs[0].dim()
    return Scratch(program=(0, size, 8, size, -2, 2 * size)) if call.outputs[0].numel() else None


# Reductions.


@_rule("sum", "sum.dim_IntList", "prod", "prod.dim_int", "nansum")
def _sum(call: _Call) -> Scratch | None:
    """Convert the input to the output's type, after the output (ReduceOpsUtils.h, make_reduction)."""
    x, out = call.args[0], call.outputs[0]
    return OUTPUTS_ONLY if x.dtype is out.dtype else Scratch(program=(0, _nbytes(x, out.dtype)))


@_rule("cumsum", "cumprod")
def _cumulative(call: _Call) -> Scratch | None:
    """Convert the input to the output's type (ReduceOps.cpp, impl_func_cum_ops)."""
    return _sum(call)


@_rule("mean", "mean.dim")
def _mean(call: _Call) -> Scratch | None:
    """Sum, then divide in place by a number (ReduceOps.cpp, mean_out).

    The sum of a 16-bit type is made in fp32, from an fp32 copy of the whole input.
    """
    x, out = call.args[0], call.outputs[0]
    steps = _Steps()
    steps.outputs()
    summed = FLOAT if out.dtype in _REDUCED else out.dtype
    if summed is not out.dtype:
        steps.take(_nbytes(out, summed))
    if x.dtype is not summed:
        steps.give(steps.take(_nbytes(x, summed)))
    _casts(steps, [x.numel()], summed)
    return steps.done()


@_rule("logsumexp")
def _logsumexp(call: _Call) -> Scratch | None:
    """Take the maxima, where they are infinite, and the exponentials (ReduceOps.cpp, logsumexp_out_impl)."""
    x, out = call.args[0], call.outputs[0]
    if x.dtype is not out.dtype or not x.numel():
        return None
    steps = _Steps()
    steps.outputs()
    maxima = steps.take(_nbytes(out))
    number = [steps.take(8), steps.take(0 if out.dtype is DOUBLE else out.dtype.itemsize), steps.take(out.numel())]
    steps.give(*number, maxima)
    steps.take(_nbytes(x))
    steps.take(_nbytes(out))
    return steps.done()


@_rule("sort", "sort.stable", "argsort.stable")
def _sort(call: _Call) -> Scratch | None:
    """Take the indices 0, 1, ... of one row, to be copied into every row (Sorting.cpp, sort_stable_out)."""
    x = call.args[0]
    position = call.kwargs.get("dim", next((a for a in call.args[1:] if type(a) is int), -1))
    return Scratch(program=(0, 8 * x.size(position))) if x.dim() and x.numel() > 1 else OUTPUTS_ONLY


@_rule("kthvalue")
def _kthvalue(call: _Call) -> Scratch | None:
    """Partition a copy of the values and their 64-bit positions (Sorting.cpp, kthvalue_out_impl_cpu)."""
    return Scratch(program=(0, _nbytes(call.args[0]), 8 * call.args[0].numel()))


@_rule("histc")
def _histc(call: _Call) -> Scratch | None:
    """Take the edges, and counts for each thread (Histogram.cpp, histc; cpu/HistogramKernel.cpp)."""
    out = call.outputs[0]
    return Scratch(program=(_nbytes(out) + out.dtype.itemsize, 0, call.cpu.threads * _nbytes(out)))


@_rule("multinomial")
def _multinomial(call: _Call) -> Scratch | None:
    """Check the weights, then divide them by exponential noise as large as they are (Distributions.cpp, multinomial).

    With replacement and more than one draw, a row of cumulative sums instead (cpu/MultinomialKernel.cpp).
    """
    x, count = call.args[0], call.args[1]
    steps = _Steps()
    steps.outputs()
    if count != 1 and _argument(call.args, call.kwargs, 2, "replacement", False):
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
    steps.take(_nbytes(x))
    steps.take(call.outputs[0].numel() * size if count > 1 else 0)
    return steps.done()


def _compared(steps: _Steps, count: int, size: int) -> int:
    """Take `count` truths of a comparison with a number, of a type of `size` bytes."""
    number = [steps.take(8), steps.take(size)]
    truths = steps.take(count)
    steps.give(*number)
    return truths


# Normalisation.


def _contiguous_first(call: _Call) -> Scratch | None:
    """Copy an input that is not contiguous (layer_norm.cpp: expect_contiguous), before any output."""
    if call.args[0].is_contiguous():
        return OUTPUTS_ONLY
    steps = _Steps()
    steps.copy(call.args[0])
    steps.outputs()
    return steps.done()


_rule("native_layer_norm")(_contiguous_first)


@_rule("_softmax", "_log_softmax")
def _softmax(call: _Call) -> Scratch | None:
    """Copy an input that is not contiguous, after the output (SoftMax.cpp, softmax_cpu_out)."""
    if call.args[0].is_contiguous():
        return OUTPUTS_ONLY
    steps = _Steps()
    steps.outputs()
    steps.copy(call.args[0])
    return steps.done()


@_rule("native_batch_norm", "_native_batch_norm_legit_no_training")
def _batch_norm(call: _Call) -> Scratch | None:
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


def _channels_last(x: torch.Tensor) -> bool:
    layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return x.dim() in (4, 5) and x.is_contiguous(memory_format=layout)


def _upsample(taps: int) -> Rule:
    """Make the rule of a resizing operator (cpu/UpSampleKernel.cpp).

    Small two-dimensional outputs, and inputs with channels last, go through channels-last copies of both
    (_use_vectorized_kernel_cond_2d and the like); others take for each dimension and tap a 64-bit index and a weight
    for every output coordinate (upsample_generic_Nd_kernel_impl, HelperInterpBase).
    """

    def rule(call: _Call) -> Scratch | None:
        x, out = call.args[0], call.outputs[0]
        steps = _Steps()
        steps.outputs()
        last = _channels_last(x) and x.size(1) > 3
        if x.dim() == 4 and taps < 4 and (last or out.size(-1) + out.size(-2) <= 128):
            steps.take(0 if _channels_last(x) else _nbytes(x))
            steps.take(0 if _channels_last(out) else _nbytes(out))
            return steps.done()
        if x.dim() == 5 and last:
            return OUTPUTS_ONLY if _channels_last(out) else None
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
def _index(call: _Call) -> Scratch | None:
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
    steps = _Steps()
    steps.take(8 * mask.dim() * chosen)
    steps.outputs()
    return steps.done()


@_rule("gather", "scatter.src", "scatter.value", "scatter_.src", "scatter_.value", "scatter_add", "scatter_add_")
def _scatter(call: _Call) -> Scratch | None:
    """Work in an fp32 copy of the result, for 16-bit types (cpu/ScatterGatherKernel.cpp, create_acc_buffer)."""
    out = call.outputs[0]
    return Scratch(program=(0, _nbytes(out, FLOAT))) if out.dtype in _REDUCED else OUTPUTS_ONLY


@_rule("index_add", "index_add_")
def _index_add(call: _Call) -> Scratch | None:
    """Add 16-bit numbers in fp32 (cpu/ScatterGatherKernel.cpp).

    Along the first or last dimension this is a scatter (TensorAdvancedIndexing.cpp, index_add_cpu_out), in an fp32
    copy of the result; or in one fp32 row for each thread, if it is rows of at least 16 elements of contiguous
    tensors (can_use_expanded_index_path). Along others, and with a factor, slices are added one by one.
    """
    out, position, index, source = call.outputs[0], call.args[1], call.args[2], call.args[3]
    if out.dtype not in _REDUCED or out.dim() < 2 or not source.numel() or not out.numel():
        return OUTPUTS_ONLY
    position %= out.dim()
    if position not in (0, out.dim() - 1) or index.dtype is not torch.int64 or call.kwargs.get("alpha", 1) != 1:
        return OUTPUTS_ONLY
    row = out.numel() // out.size(0)
    by_rows = position == 0 and row >= 16 and out.is_contiguous() and source.is_contiguous()
    return Scratch(program=(0, call.cpu.threads * row * 4 if by_rows else _nbytes(out, FLOAT)))


# Attention.


@_rule("_scaled_dot_product_flash_attention_for_cpu")
def _flash(call: _Call) -> Scratch | None:
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
    steps = _Steps()
    steps.outputs()
    steps.take(threads * sums * (8 if dtype is DOUBLE else 4))
    if dtype in _REDUCED:
        steps.take(threads * query_block * key_block * 2)
    return steps.done()


# Matrix products.


def _gemm_ready(matrix: torch.Tensor) -> bool:
    """Return whether BLAS takes these strides (LinearAlgebra.cpp, addmm_impl_cpu_)."""
    (rows, columns), (down, across) = matrix.shape, matrix.stride()
    return (across == 1 and down >= max(1, columns)) or (down == 1 and across >= max(1, rows))


def _is_turned(matrix: torch.Tensor) -> bool:
    """Return whether a matrix is read through its columns."""
    return matrix.stride(-1) != 1 and matrix.stride(-2) == 1


@_rule("mm", "addmm", "addmm_", "_addmm_activation")
def _addmm(call: _Call) -> Scratch | None:
    """Copy matrices whose strides BLAS does not take, then oneDNN's scratchpad for 16-bit types.

    LinearAlgebra.cpp, addmm_impl_cpu_; CPUBlas.cpp, gemm; mkldnn/Matmul.cpp, mkldnn_gemm. The addend is copied into
    the output, and fp32 goes to MKL, whose own memory the allocator does not see.
    """
    left, right = call.args[-2:]
    steps = _Steps()
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
def _bmm(call: _Call) -> Scratch | None:
    """Use plain loops below 400 multiplications an item; otherwise oneDNN for 16-bit types and MKL for others.

    LinearAlgebra.cpp, bmm_out_or_baddbmm_; mkldnn/Matmul.cpp, mkldnn_matmul, which copies an operand unless it or its
    transpose is contiguous. Where MKL does not take the strides, items are multiplied one by one as `mm` would.
    """
    left, right = call.args[-2:]
    batch, rows, inner, columns = left.size(0), left.size(1), left.size(2), right.size(2)
    if rows * inner * columns < 400:
        return OUTPUTS_ONLY
    steps = _Steps()
    steps.outputs()
    turned = _is_turned(left) and not left.is_contiguous()
    if _through_onednn(call.cpu, left.dtype, batch * rows * inner * columns):
        for operand in (left, right):
            if not (operand.is_contiguous() or operand.transpose(1, 2).is_contiguous()):
                steps.copy(operand)
    return _product(call.cpu, steps, (batch, rows, inner, columns), left.dtype, turned, call.kwargs.get("alpha", 1))


@_rule("_grouped_mm")
def _grouped_mm(call: _Call) -> Scratch | None:
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
    ends = _argument(call.args, call.kwargs, 2, "offs")
    steps = _Steps()
    steps.outputs()
    if type(ends) is not torch.Tensor or ends.is_meta:
        steps.take(_scratchpad(1, min(256, left.size(0)), inner, columns, cpu.threads, False, True) or 0)
        return steps.done()
    for start, end in pairwise([0, *ends.tolist()]):
        if _through_onednn(cpu, left.dtype, (end - start) * inner * columns):
            taken = _scratchpad(1, end - start, inner, columns, cpu.threads, False, False)
            if taken is None:
                return None
            steps.give(steps.take(taken))
    return steps.done()


def _through_onednn(cpu: CpuKernels, dtype: torch.dtype, multiplications: int) -> bool:
    """Return whether oneDNN multiplies: 16-bit types it knows, above 16³ (mkldnn/Matmul.cpp, checksize)."""
    if multiplications <= 16**3:
        return False
    return (dtype is BFLOAT16 and cpu.onednn_bf16) or (dtype is HALF and cpu.onednn_fp16)


def _product(
    cpu: CpuKernels,
    steps: _Steps,
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
    taken = _scratchpad(*shape, cpu.threads, turned, False)
    if taken is None:
        return None
    # A factor is handed to oneDNN as a tensor of one fp32 number (ideep operators/matmul.hpp, do_prepare).
    steps.take(4 if alpha != 1 else 0)
    steps.take(taken)
    return steps.done()


@functools.cache
def _scratchpad(batch: int, rows: int, inner: int, columns: int, threads: int, turned: bool, most: bool) -> int | None:
    """Return the scratchpad of a bf16 product on AVX512-BF16, in bytes.

    oneDNN src/cpu/x64/matmul/brgemm_matmul_utils.cpp, init_scratchpad: for each thread 16 batch elements of 40 bytes
    (brgemm_types.hpp), a block of the right matrix packed in pairs of rows, a block of fp32 sums (always: its
    condition reads K_chunk_elems before that is set), and a block of the left matrix if that is copied: when `turned`
    (its columns contiguous), or with a power of two of at least 4,096 columns and 1,024 rows. Every booking adds 128
    bytes to align by (src/common/memory_tracking.hpp). A single row counts as turned, but is
    not copied. `most`: take blocks of `rows` rather than choosing.
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
    sizes = [16 * 40, 2 * 64 * _up(inner_block, 32)]
    if inner_threads > 1:
        sizes.append(4 * columns * rows)
    else:
        sizes.append(4 * min(64, columns) * row_block * (1 if inner_block >= inner else column_blocks))
    if copies_left:
        across = _up(inner_block, 32)
        across += 32 if across >= 512 and across & (across - 1) == 0 else 0
        sizes.append(2 * row_block * across)
    return sum(threads * size + 128 for size in sizes)


def _blocking(
    batch: int, rows: int, inner: int, columns: int, threads: int, by_columns: bool, copies_left: bool
) -> tuple[int, int, int] | None:
    """Return (rows in a block, blocks of columns in a chunk, threads along the inner dimension).

    oneDNN, same file, compute_blocking_heuristic_avx512 and get_imbalance: of all candidates the first with the least
    imbalance, in single precision. None where it finds none and another implementation is used.
    """
    column_block = min(64, columns)
    column_count = _ceil(columns, column_block)
    inner_block = min(inner, 1024 if inner > 1024 and not by_columns else 512)
    least, start = min(32, rows), 1
    if threads > batch * column_count:
        least = min(16, rows)
        if batch == 1 and by_columns and inner >= 2048 and inner & (inner - 1) == 0:
            start = min(threads, 4)
    best, chosen = 1.0, None
    for inner_threads in range(start, 0, -1):
        others = threads // inner_threads
        idle = _single((threads - others * inner_threads) / threads)
        along = _disbalance(inner, inner_threads * inner_block)

        def score(chunk: int, block: int, others: int = others, idle: float = idle, along: float = along) -> float:
            blocks, chunks = _ceil(rows, block), _ceil(column_count, chunk)
            work = batch * blocks * _ceil(columns, column_block * chunk)
            uneven = _single(_single(chunks * chunk - column_count) / column_count)
            total = 0.0
            for part in (_disbalance(work, others), _single(block * blocks % rows / rows), uneven, idle, along):
                total = _single(total + part)
            return _single(total / 5)

        found = False
        for chunk in range(min(16 if copies_left else 1, column_count), 0, -1):
            for block in range(min(256, rows), least - 1, -1):
                work = batch * _ceil(rows, block) * _ceil(columns, column_block * chunk)
                if work < others * 3 and work % others and start == 1:
                    continue
                if (value := score(chunk, block)) < best:
                    best, chosen, found = value, (block, chunk, inner_threads), True
        if not found and (value := score(1, least)) < best:
            best, chosen = value, (least, 1, inner_threads)
    return chosen


def _disbalance(work: int, block: int) -> float:
    rest = work % block
    return _single((block - rest if work < block else min(block - rest, rest)) / block)


def _single(number: float) -> float:
    return ctypes.c_float(number).value


# Convolution.


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
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


@_rule("convolution", "_convolution")
def _convolution(call: _Call) -> Scratch | None:
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

    if not flat and not x.is_contiguous() and _channels_last(x):
        return None
    shape = _Shape(
        batch=x.size(0), inner=x.size(1), outer=weight.size(0), groups=groups, image=(*lift, *x.shape[2:]),
        result=(*lift, *call.outputs[0].shape[2:]), kernel=(*lift, *weight.shape[2:]), stride=(*lift, *over(stride)),
        padding=((0,) if flat else ()) + over(padding), biased=bias is not None, dtype=x.dtype,
    )  # fmt: skip
    dilated = any(step != 1 for step in dilation)
    steps = _Steps()
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


def _unfolded(steps: _Steps, shape: _Shape) -> Scratch:
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


def _blocked_convolution(cpu: CpuKernels, steps: _Steps, shape: _Shape) -> Scratch | None:
    """Take oneDNN's scratchpad, then image, weights and result in its layout of 16 channels a block.

    mkldnn/Conv.cpp, mkldnn_convolution; ideep include/ideep/operators/conv.hpp, do_compute: image and weights are
    reordered, the result is made in blocks, all but it is given back, and it is copied into the output. In oneDNN's
    src/cpu/x64: jit_avx512_common_conv_kernel.cpp and jit_avx512_core_bf16_conv_kernel.cpp, init_conf (channels are
    padded to 16; an image of fewer than 16 channels stays as it is), the same for `1x1` and `dw`.
    """
    size, channels = shape.dtype.itemsize, _up(shape.outer, 16)
    area = math.prod(shape.kernel)
    pointwise = _is_pointwise(shape)
    if shape.depthwise and len(shape.image) == 3:
        return None
    if shape.depthwise:
        image, weights = _up(shape.inner, 16), channels * area
    elif shape.groups > 1:
        if shape.inner // shape.groups % 16 or shape.outer // shape.groups % 16:
            return None
        image, weights = shape.inner, shape.outer * (shape.inner // shape.groups) * area
    elif shape.inner < 16 and not pointwise:
        image, weights = 0, channels * _up(shape.inner, 4 // size) * area
    else:
        image, weights = _up(shape.inner, 16), channels * _up(shape.inner, 16) * area
    scratchpad = steps.take(sum(booked + 128 for booked in _bookings(cpu, shape, pointwise)))
    source = steps.take(shape.batch * image * math.prod(shape.image) * size)
    packed = steps.take(weights * size)
    steps.take(shape.batch * channels * math.prod(shape.result) * size)
    steps.give(packed, source, scratchpad)
    steps.outputs()
    return steps.done()


def _is_pointwise(shape: _Shape) -> bool:
    """Return whether oneDNN's kernels for single points apply: strides must divide (jit_uni_1x1_conv_utils.hpp)."""
    if math.prod(shape.kernel) != 1 or shape.groups != 1 or any(shape.padding):
        return False
    if not shape.strided:
        return True
    exact = all(n * step == whole for n, step, whole in zip(shape.result, shape.stride, shape.image, strict=True))
    return exact and len(shape.image) == 2


def _bookings(cpu: CpuKernels, shape: _Shape, pointwise: bool) -> list[int]:
    """Return the parts of the scratchpad: a padded bias, an image without its strides, sums in fp32.

    A bf16 bias is kept in fp32 by depthwise kernels. oneDNN src/cpu/x64: jit_uni_1x1_conv_utils.hpp
    (rtus_prepare_space_info), jit_avx512_core_bf16_1x1_conv_kernel.cpp (init_scratchpad), the `init_scratchpad` of
    the others.
    """
    size, channels = shape.dtype.itemsize, _up(shape.outer, 16)
    parts = []
    if shape.biased and shape.depthwise and shape.dtype is BFLOAT16:
        parts.append(4 * channels)
    elif shape.biased and shape.outer % 16:
        parts.append(size * channels)
    if not pointwise:
        return parts
    points = math.prod(shape.result)
    if shape.strided:
        parts.append(cpu.threads * _up(shape.inner, 16) * points * size)
    if shape.dtype is BFLOAT16:
        block, groups = _pointwise_blocking(cpu, shape)
        share = _ceil(cpu.threads, _ceil(cpu.threads, groups))
        parts.append(cpu.threads * _up(points, block) * _up(_ceil(channels, share), 16) * 4)
    return parts


def _pointwise_blocking(cpu: CpuKernels, shape: _Shape) -> tuple[int, int]:
    """Return (points in a block, groups of threads over output channels): the same file, init_conf."""
    threads, batch = cpu.threads, shape.batch
    inner, outer, points = _up(shape.inner, 16), _up(shape.outer, 16), math.prod(shape.result)
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
    blocks, loads = _ceil(points, block), outer // 16
    if threads <= 28 and batch < threads and loads * blocks > threads:
        groups = _load_groups(threads, batch, blocks, loads, block, inner, outer * inner > batch * points * inner)
    else:
        lowest = _ceil(threads, batch * blocks)
        groups = _divider(threads, lowest, 2 * lowest)
    if broadcasts and points <= 64 and outer * inner >= cpu.l2_bytes // shape.dtype.itemsize:
        groups = max(groups, 4)
    elif points <= 49 and batch <= threads and outer > 512 and outer // inner >= 4:
        groups = max(groups, 2)
    return block, groups


def _load_groups(threads: int, batch: int, blocks: int, loads: int, block: int, inner: int, heavy: bool) -> int:
    """Return the number of groups that costs least; ties go to the first, from many if weights outweigh the image."""

    def cost(load: int, sharing: int, memory: float) -> float:
        points = batch * _ceil(blocks, sharing) * block
        return 0.01 * points * load * 16 * inner + memory * (points + load * 16) * inner

    best, chosen = math.inf, threads if heavy else 1
    for groups in range(threads, 0, -1) if heavy else range(1, threads + 1):
        fewest, most = loads // groups, _ceil(loads, groups)
        few, many = threads // groups, _ceil(threads, groups)
        memory = 1.0 if many == 1 else 1.3
        if threads % groups < loads % groups:
            value = cost(most, few, memory)
        else:
            value = max(cost(most, many, memory), cost(fewest, few, memory))
        if value < best:
            best, chosen = value, groups
    return chosen


def _divider(value: int, lowest: int, highest: int) -> int:
    """Return the smallest best divider in the range (oneDNN src/common/utils or jit_utils: best_divider)."""
    lowest, best, chosen = max(1, lowest), -1.0, lowest
    for divider in range(lowest, min(highest, value) + 1):
        ratio = value / _up(value, divider)
        if ratio > best:
            best, chosen = ratio, divider
    return chosen


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
)
def _unknown(call: _Call) -> Scratch | None:
    return None


@_rule("cat")
def _cat(call: _Call) -> Scratch | None:
    """Take nothing unless types differ (TensorShape.cpp, cat_out)."""
    types = {tensor.dtype for tensor in call.args[0]}
    return OUTPUTS_ONLY if len(types) == 1 else None

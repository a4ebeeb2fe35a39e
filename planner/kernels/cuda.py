"""What CUDA kernels of torch take through the caching allocator beside their outputs, in bytes requested.

Read in torch 2.13 (paths below are in pytorch/pytorch unless said) and never copied. Where a rule rests on something
that only a GPU can settle, `UNMEASURED` says so. Pointwise operators, views, copies, factories, gathers and the like
take nothing: CUDA's TensorIterator converts types inside its kernel, and a Python number never becomes device memory
(aten/src/ATen/native/cuda/Loops.cuh). Whatever is neither of these nor named by a rule is not modelled.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from planner.kernels.cuda_reductions import ACCUMULATORS, global_buffers, reduction
from planner.kernels.programs import (
    HALF_TYPES,
    Program,
    ceil_div,
    compares_directly,
    made,
    nbytes,
    single,
    takes_nothing,
)
from planner.lifetimes import OUTPUTS_ONLY, Scratch
from planner.units import round_up

aten = torch.ops.aten

# What a GPU must settle, most uncertain first.
UNMEASURED = (
    "cuDNN attention (default on capability 9 and 10): its graph's workspace is cuDNN's secret; None is returned",
    "convolution: cuDNN's workspace depends on the algorithm that its heuristics choose; None is returned",
    "_grouped_mm on capability 9 and 10: CUTLASS's workspace taken as four tensor maps of 128 B for each SM",
    "sort of more than 4,096 elements: tile sizes of CUB's one-sweep radix sort (the lookback term, under 3 %)",
    "cumsum of one row, topk over many blocks: CUB's temporary storage, under 2 KiB unless rows are very long",
    "cuBLAS workspace in torch other than 2.13: 2.11 may hold 1 MiB more for cublasLt and 8,519,680 B on capability "
    "10 and 12; from 2.15 a workspace lives only inside one operator",
    "histc of integers between given bounds: taken to count in shared memory alone",
    "philox seeds: fake efficient and cuDNN attention return two of 8 B that CUDA keeps on the host",
    "reductions of more than 2**31 bytes are cut into pieces, and each piece is taken as if it were whole",
)

# aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize: 32 MiB, or ":4096:2:16:8" in KiB.
_LARGE_WORKSPACE_BYTES = 32 * 2**20
_SMALL_WORKSPACE_BYTES = 4096 * 1024 * 2 + 16 * 1024 * 8
_LARGE_WORKSPACE_MAJORS = (9, 10, 12)

_MASKS = (torch.bool, torch.uint8)
# cudaDeviceProp.maxThreadsPerMultiProcessor (CUDA C++ Programming Guide, table of compute capabilities).
_THREADS_PER_MULTIPROCESSOR = {(7, 5): 1024, (8, 6): 1536, (8, 7): 1536, (8, 9): 1536, (12, 0): 1536, (12, 1): 1536}

# Operators without a rule that take nothing on CUDA: they write their result and no more.
_WRITERS = frozenset(
    (
        "_to_copy", "cat", "clone", "copy_", "embedding", "floor_divide", "gather", "histc", "index_add", "index_add_",
        "repeat", "scatter", "scatter_", "scatter_add", "scatter_add_", "tril", "triu",
    )
)  # fmt: skip
Rule = Callable[["CudaKernels", Any, Any, list[torch.Tensor]], Scratch | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaKernels:
    """The CUDA kernels of one GPU: `capability` as (major, minor), and its count of streaming multiprocessors."""

    capability: tuple[int, int]
    multiprocessors: int

    @classmethod
    def of_product(cls, key: str | None) -> CudaKernels:
        """Return the kernels of a product of `products.json`; an RTX 4090's where it is None or not known."""
        table = _gpus()
        facts = table["gpus"].get(key) or table["gpus"][table["default"]]
        major, minor = facts["capability"]
        return cls(capability=(major, minor), multiprocessors=facts["multiprocessors"])

    @property
    def workspace_bytes(self) -> int:
        """Return the bytes of the workspace that cuBLAS and cublasLt share and keep, for one handle and stream.

        Source: aten/src/ATen/cuda/CublasHandlePool.cpp (setWorkspaceForHandle, getCUDABlasLtWorkspace); the two are one
        allocation by default (TORCH_CUBLASLT_UNIFIED_WORKSPACE).
        """
        large = self.capability[0] in _LARGE_WORKSPACE_MAJORS
        return _LARGE_WORKSPACE_BYTES if large else _SMALL_WORKSPACE_BYTES

    @property
    def threads_per_multiprocessor(self) -> int:
        return _THREADS_PER_MULTIPROCESSOR.get(self.capability, 2048)

    def scratch(self, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Scratch | None:
        """Return what `func` takes beside its `outputs`, or None where that is not known.

        Reads shapes, strides and dtypes only. A dictionary look-up where there is no rule (0.2 µs); else 1 to 20 µs.
        """
        rule = _RULES.get(func)
        if rule is not None:
            return rule(self, args, kwargs, outputs)
        return OUTPUTS_ONLY if takes_nothing(func, _WRITERS) else None


@functools.cache
def _gpus() -> dict[str, Any]:
    text = importlib.resources.files("planner.kernels").joinpath("gpus.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


# Matrix products.


@functools.cache
def _with_cublas(nbytes: int, copies: Program = ()) -> Scratch:
    return Scratch(program=(0, *copies), keeps=(("cublas", nbytes),))


def _matrix_copy(matrix: torch.Tensor) -> Program:
    """Return the copy that a 2-D operand needs: none where one stride is 1 and the other spans the rows.

    Source: aten/src/ATen/native/cuda/cuBlasCommonArgs.h (prepare_matrix_for_cublas).
    """
    (rows, columns), (down, across) = matrix.shape, matrix.stride()
    if across == 1 and (down >= columns or rows == 1):
        return ()
    if down == 1 and (across >= rows or columns == 1):
        return ()
    return () if rows == columns == 1 else (nbytes(matrix),)


def _batch_copy(batch: torch.Tensor, *, transposed: bool, m: int, n: int) -> Program:
    """Return the copy that a 3-D operand needs.

    Source: aten/src/ATen/native/cuda/Blas.cpp (prepare_batch_matrix_for_cublas).
    """
    strides = batch.stride()
    fast, leading = (strides[2], strides[1]) if transposed else (strides[1], strides[2])
    if (fast == 1 and leading >= max(1, m)) or (leading == 1 and fast >= max(1, n)):
        return ()
    if batch.is_contiguous() and fast != 0 and leading != 0:
        return ()
    return (nbytes(batch),)


def _mm(first: int) -> Rule:
    """mm and addmm: the workspace, and copies of operands that cuBLAS cannot read.

    A bias is added in cublasLt's epilogue or copied into the output first: neither takes memory. Source:
    aten/src/ATen/native/cuda/Blas.cpp (addmm_out_cuda_impl).
    """

    def rule(kernels: CudaKernels, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Scratch | None:
        if not outputs or outputs[0].numel() == 0:
            return OUTPUTS_ONLY
        left, right = args[first], args[first + 1]
        return _with_cublas(kernels.workspace_bytes, _matrix_copy(right) + _matrix_copy(left))

    return rule


def _bmm(first: int) -> Rule:
    """bmm and baddbmm. Source: aten/src/ATen/native/cuda/Blas.cpp (bmm_out_cuda_impl)."""

    def rule(kernels: CudaKernels, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Scratch | None:
        if not outputs or outputs[0].numel() == 0:
            return OUTPUTS_ONLY
        left, right = args[first], args[first + 1]
        (_, rows, inner), columns = left.shape, right.shape[2]
        if columns == 1:  # the output is then column-major as it lies
            copies = _batch_copy(left, transposed=False, m=rows, n=inner) + _batch_copy(
                right, transposed=False, m=inner, n=columns
            )
        else:
            copies = _batch_copy(right, transposed=True, m=columns, n=inner) + _batch_copy(
                left, transposed=True, m=inner, n=rows
            )
        return _with_cublas(kernels.workspace_bytes, copies)

    return rule


def _cublas(kernels: CudaKernels, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Scratch | None:
    """mv, dot and scaled products: the workspace alone (aten/src/ATen/cuda/CUDABlas.cpp)."""
    return _with_cublas(kernels.workspace_bytes)


def _grouped_mm(kernels: CudaKernels, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Scratch | None:
    """_grouped_mm: on capability 9 and 10 in bf16 CUTLASS's argument arrays and workspace; else a loop over cuBLAS.

    Arrays: three pointers (8 B, an even count of groups), three strides (8 B) and one problem shape (12 B) a group.
    Source: aten/src/ATen/native/cuda/GroupedBlas.cpp (_grouped_mm_cuda), GroupMM.cu, GroupedMMUtils.h.
    """
    left, right = args[0], args[1]
    if kernels.capability[0] not in (9, 10) or left.dtype is not torch.bfloat16:
        return _with_cublas(kernels.workspace_bytes)
    batched = next((matrix for matrix in (left, right) if matrix.dim() == 3), args[2])
    groups = batched.shape[0]
    arguments = 3 * 8 * round_up(groups, 2) + 12 * groups + 3 * 8 * groups
    return made(0, arguments, 4 * 128 * kernels.multiprocessors)


# Attention.


@functools.lru_cache(maxsize=4096)
def flash_splits(blocks: int, multiprocessors: int, key_blocks: int) -> int:
    """Return into how many parts flash attention cuts the keys, so that all multiprocessors have work.

    blocks: batch x heads x blocks of 64 queries. The fewest parts within 85 % of the best occupancy, in single
    precision as there. Source: aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp
    (num_splits_heuristic; from Dao-AILab/flash-attention csrc/flash_attn/flash_api.cpp).
    """
    slots = 2 * multiprocessors
    if blocks >= single(single(0.8) * slots):
        return 1
    candidates = [
        parts
        for parts in range(1, min(128, slots, key_blocks) + 1)
        if parts == 1 or ceil_div(key_blocks, parts) != ceil_div(key_blocks, parts - 1)
    ]
    occupancy = {}
    for parts in candidates:
        waves = single(blocks * parts / slots)
        occupancy[parts] = single(waves / math.ceil(waves))
    best = max(occupancy.values(), default=0.0)
    return next((parts for parts in candidates if occupancy[parts] >= 0.85 * best), 1)


def _flash(kernels: CudaKernels, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Scratch | None:
    """Flash attention: float32 log-sums and partial outputs of every part, where the keys are cut into parts.

    One query token of grouped heads is turned into as many queries as heads share a key. Source:
    aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp (mha_fwd, set_params_splitkv).
    """
    batch, heads, queries, width = args[0].shape
    if args[0].numel() == 0 or args[1].numel() == 0:
        return OUTPUTS_ONLY
    key_heads, keys = args[1].shape[1], args[1].shape[2]
    if queries == 1 and heads > key_heads:
        queries, heads = heads // key_heads, key_heads
    key_block = 256 if width <= 64 else 128 if width <= 128 else 64
    parts = flash_splits(batch * heads * ceil_div(queries, 64), kernels.multiprocessors, ceil_div(keys, key_block))
    if parts == 1:
        return OUTPUTS_ONLY
    sums = 4 * parts * batch * heads * queries
    return made(0, sums, sums * round_up(width, 32 if width <= 128 else 64))


def _efficient(kernels: CudaKernels, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Scratch | None:
    """Efficient attention: a float32 accumulator of the output's shape for half types wider than 128.

    Narrower heads accumulate in registers, float32 in the output. Source: aten/src/ATen/native/transformers/cuda/
    attention.cu (_efficient_attention_forward), mem_eff_attention/kernel_forward.h (kNeedsOutputAccumulatorBuffer),
    mem_eff_attention/kernels/cutlassF.h.
    """
    query, value = args[0], args[2]
    if query.dtype not in HALF_TYPES or max(query.shape[3], value.shape[3]) <= 128:
        return OUTPUTS_ONLY
    return made(0, 4 * outputs[0].numel())


# Normalisation, softmax, sampling.


def _contiguous_copy(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_contiguous() else nbytes(tensor)


def _layer_norm(kernels: CudaKernels, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Scratch | None:
    """native_layer_norm: mean and rstd are float32, also where fake CPU tensors of half types have them halved.

    Source: aten/src/ATen/native/cuda/layer_norm_kernel.cu (layer_norm_cuda).
    """
    copy = _contiguous_copy(args[0])
    _, mean, rstd = outputs
    missing = 4 - mean.element_size() if args[0].dtype in HALF_TYPES else 0
    if not copy and not missing:
        return OUTPUTS_ONLY
    steps = (0, missing * mean.numel(), missing * rstd.numel())
    return made(copy, *steps) if copy else made(*steps)


def _group_norm(kernels: CudaKernels, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Scratch | None:
    """native_group_norm: a scale and a shift for every channel of every sample.

    Source: aten/src/ATen/native/cuda/group_norm_kernel.cu (GroupNormKernelImplInternal).
    """
    weight, bias, samples, channels, pixels = args[1:6]
    if pixels <= 1 or (weight is None and bias is None):
        return OUTPUTS_ONLY
    size = samples * channels * max(4, args[0].element_size())
    return made(0, size, size)


def _softmax(kernels: CudaKernels, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Scratch | None:
    """_softmax and _log_softmax: a copy of an input that is not contiguous (aten/src/ATen/native/cuda/SoftMax.cu)."""
    return made(0, _contiguous_copy(args[0]))


def _safe_softmax(kernels: CudaKernels, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Scratch | None:
    """_safe_softmax: a mask of -inf, one of rows that are all -inf, and a zero to put there.

    Source: aten/src/ATen/native/transformers/attention.cpp (_safe_softmax), the same on every device.
    """
    scores, dim = args[0], args[1]
    rows = scores.numel() // max(1, scores.shape[dim])
    copy = _contiguous_copy(scores)
    rest = (scores.numel(), rows, outputs[0].element_size())
    return made(0, copy, -1, *rest) if copy else made(0, *rest)


def _multinomial(kernels: CudaKernels, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Scratch | None:
    """multinomial of one sample: checks of the probabilities, then as many exponential draws, then argmax.

    Source: aten/src/ATen/native/Distributions.cpp (multinomial_out), the same on every device.
    """
    weights = args[0]
    if args[1] != 1:
        return None
    item, rows = weights.element_size(), weights.numel() // weights.shape[-1]
    # The least, the greatest, two comparisons and both of them; row sums, which are zero, any of them, none of them.
    checks = (item, item, 1, 1, 1, -4, -3, rows * item, rows, 1, -7, -6, 1, -9)
    pick = global_buffers(kernels, weights, (weights.dim() - 1,), arg_bytes=16)
    return made(0, *checks, nbytes(weights), *pick)


# Scans, sorts, selections. CUB rounds each of its arrays up to 256 B and adds 255 B for alignment (NVIDIA/cccl
# cub/cub/util_temporary_storage / detail alias_temporaries).


def _cub_bytes(*arrays: int) -> int:
    return sum(round_up(size, 256) for size in arrays) + 255


def _cumsum(kernels: CudaKernels, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Scratch | None:
    """cumsum and cumprod: the input in the output's type and contiguous; CUB's tile states where there is one row.

    Sources: aten/src/ATen/native/ReduceOps.cpp (impl_func_cum_ops), cuda/ScanUtils.cuh (scan_dim), NVIDIA/cccl
    cub/cub/agent/single_pass_scan_operators.cuh (32 more tile states than tiles, of a status and a value).
    """
    source, (result,) = args[0], outputs
    if source.numel() == 0:
        return OUTPUTS_ONLY
    converted = nbytes(result) if source.dtype is not result.dtype else 0
    copy = converted or _contiguous_copy(source)
    if source.dim() and source.numel() != source.shape[args[1]]:
        return made(0, copy)
    item = result.element_size()
    tiles = ceil_div(source.numel(), 128 * max(1, 15 * 4 // max(4, item)))
    return made(0, copy, _cub_bytes((tiles + 32) * 2 * max(item, 4)))


def _isin(kernels: CudaKernels, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Scratch | None:
    """isin: every element compared with every test, and whether any is equal (cuda/TensorCompare.cu)."""
    elements, tests = args[:2]
    are_tensors = isinstance(elements, torch.Tensor) and isinstance(tests, torch.Tensor)
    if not are_tensors or not compares_directly(elements, tests):
        return None
    return made(0, elements.numel() * tests.numel(), elements.numel())


def _sort(kernels: CudaKernels, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Scratch | None:
    """sort: in place up to 4,096 elements a row; else indices to permute, and CUB's second copy of both.

    Sources: aten/src/ATen/native/cuda/Sort.cpp (sort_cuda_kernel), SortStable.cu (launch_stable_sort_kernel),
    NVIDIA/cccl cub/cub/device/dispatch/dispatch_radix_sort.cuh (InvokeOnesweep) and tuning.
    """
    source = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
    if source.dim() == 0 or source.shape[dim] <= 4096:
        return OUTPUTS_ONLY
    length = source.shape[dim]
    rows, key = source.numel() // length, source.element_size()
    if source.stride(dim) != 1 or not source.is_contiguous() or source.numel() >= 2**31:
        return None
    if rows == 1 or length >= 1_000_000:
        temporary = _radix_bytes(kernels, length, key)
        return None if temporary is None else made(0, length * 8, temporary)
    count = source.numel()
    if rows >= 128:
        return made(0, count * 8, _cub_bytes(count * key, count * 8))
    # All rows at once by value, then by row: pairs of (row, index) before and after, and the sorted values.
    by_value, by_row = _radix_bytes(kernels, count, key), _radix_bytes(kernels, count, 8, passes=1)
    if by_value is None or by_row is None:
        return None
    return made(0, count * 8, count * 8, count * key, by_value, -4, -3, by_row)


def _radix_bytes(kernels: CudaKernels, count: int, key: int, *, passes: int | None = None) -> int | None:
    """Return CUB's temporary storage for sorting keys with 8-byte values, a byte of the key in a pass."""
    items = _sweep_items(kernels, key)
    if items is None:
        return None
    passes = passes or key
    buffers = (count * key, count * 8) if passes > 1 else (0, 0)
    return _cub_bytes(passes * 256 * 8, ceil_div(count, items) * 256 * 4, *buffers, passes * 4)


def _sweep_items(kernels: CudaKernels, key: int) -> int | None:
    """Return how many (key, 8-byte index) pairs one block sweeps, or None where another algorithm sorts."""
    major = kernels.capability[0]
    if key < 4 and major < 9:
        return None
    if major < 8:
        return 256 * (23 * 4 // 8)
    if major == 8:
        return 384 * ((17 if key == 4 else 21) * 4 // 8)
    return 384 * ((29 if key == 4 else 24) * 4 // 8)


# aten/src/ATen/native/cuda/TensorTopK.cu (should_use_multiblock): (rows up to, elements of a row from).
_MANY_BLOCKS = ((20, 20_000), (40, 10_000), (80, 8_000), (199, 5_000), (799, 3_000), (4_000, 800))


def _topk(kernels: CudaKernels, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Scratch | None:
    """topk: nothing in one block a row; over many blocks, counts of digits for each row and each block.

    Source: aten/src/ATen/native/cuda/TensorTopK.cu (mbtopk::launch, get_items_per_thread).
    """
    source = args[0]
    if source.dim() == 0 or source.numel() == 0:
        return OUTPUTS_ONLY
    if args[1] > 4096:
        return None
    length = source.shape[args[2] if len(args) > 2 else -1]
    rows, copy = source.numel() // length, _contiguous_copy(source)
    if length < next((least for most, least in _MANY_BLOCKS if rows <= most), 400):
        return made(0, copy)
    resident = 6 * 256  # six blocks of 256 threads, of 40 registers each, fit the 65,536 of a multiprocessor
    items = min(max(ceil_div(length * rows, kernels.multiprocessors * resident), 4), 64)
    blocks = rows * ceil_div(length, items * 256)
    digit = max(4, source.element_size())
    by_row = (rows * source.element_size(), 2 * rows * 4, 2 * rows * digit)
    held = (*by_row, blocks * 256 * 2, rows * 256 * 4, blocks * 4, blocks * 4)
    scan = _cub_bytes((ceil_div(blocks, 128 * 6) + 32) * 16, 4 * ceil_div(blocks, 128 * 6))
    taken = len(held) + (1 if copy else 0)
    return made(0, copy, *held, scan, -(taken + 1), scan)


def _index(kernels: CudaKernels, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Scratch | None:
    """index: 64-bit copies of other indices; masks go through nonzero, which is not modelled.

    Source: aten/src/ATen/native/TensorAdvancedIndexing.cpp (make_info), IndexingUtils.h (expandTensors).
    """
    indices = [index for index in args[1] if index is not None]
    if any(index.dtype in _MASKS for index in indices):
        return None
    copies = tuple(index.numel() * 8 for index in indices if index.dtype is not torch.int64)
    return Scratch(program=(*copies, 0)) if any(copies) else OUTPUTS_ONLY


def _index_put(kernels: CudaKernels, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Scratch | None:
    """index_put_: nothing, but for sums (sorted first) and masks with more than one value: not modelled.

    Source: aten/src/ATen/native/TensorAdvancedIndexing.cpp (_index_put_impl_), cuda/Indexing.cu.
    """
    indices = [index for index in args[1] if index is not None]
    accumulate = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
    masked = any(index.dtype in _MASKS for index in indices)
    if accumulate or (masked and not (len(indices) == 1 and args[2].numel() == 1)):
        return None
    return OUTPUTS_ONLY


def _unmodelled(kernels: CudaKernels, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Scratch | None:
    return None


_NAMED: dict[str, Rule] = {
    "mm": _mm(0),
    "addmm": _mm(1),
    "addmm_": _mm(1),
    "_addmm_activation": _mm(1),
    "bmm": _bmm(0),
    "baddbmm": _bmm(1),
    "baddbmm_": _bmm(1),
    "mv": _cublas,
    "addmv": _cublas,
    "dot": _cublas,
    "_scaled_mm": _cublas,
    "_int_mm": _cublas,
    "_grouped_mm": _grouped_mm,
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_efficient_attention": _efficient,
    "_scaled_dot_product_cudnn_attention": _unmodelled,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "_softmax": _softmax,
    "_log_softmax": _softmax,
    "_safe_softmax": _safe_softmax,
    "multinomial": _multinomial,
    "cumsum": _cumsum,
    "cumprod": _cumsum,
    "isin": _isin,
    "sort": _sort,
    "topk": _topk,
    "index": _index,
    "index_put": _index_put,
    "index_put_": _index_put,
    "_index_put_impl_": _index_put,
    "_unsafe_index": _index,
}
# Known to take scratch: nonzero, selections by mask, hashes and statistics of sorted values (CUB), convolutions,
# recurrent nets and batch norm (cuDNN), transforms (cuFFT) and decompositions (cuSOLVER).
_UNMODELLED = (
    "convolution",
    "_convolution",
    "cudnn_convolution",
    "cudnn_convolution_transpose",
    "cudnn_convolution_relu",
    "_cudnn_rnn",
    "cudnn_batch_norm",
    "native_batch_norm",
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit",
    "_batch_norm_with_update",
    "nonzero",
    "masked_select",
    "masked_scatter",
    "masked_scatter_",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "bincount",
    "count_nonzero",
    "kthvalue",
    "median",
    "nanmedian",
    "mode",
    "repeat_interleave",
    "logcumsumexp",
    "_embedding_bag",
    "_thnn_fused_lstm_cell",
    "_fft_r2c",
    "_fft_c2r",
    "_fft_c2c",
    "linalg_inv_ex",
    "linalg_lu_factor_ex",
    "linalg_cholesky_ex",
    "linalg_solve_ex",
    "linalg_qr",
    "_linalg_svd",
    "_linalg_eigh",
    "_scaled_grouped_mm",
    "randperm",
)


def _rules() -> dict[Any, Rule]:
    rules: dict[Any, Rule] = {}

    for name in (*ACCUMULATORS, "max", "min"):
        for func in _overloads(name):
            arguments = [argument.name for argument in func._schema.arguments]
            if arguments[:1] == ["self"] and "other" not in arguments:
                rules[func] = reduction(name, arguments.index("dim") if "dim" in arguments else None)
    for name, rule in (*_NAMED.items(), *((name, _unmodelled) for name in _UNMODELLED)):
        rules.update((func, rule) for func in _overloads(name))
    return rules


def _overloads(name: str) -> list[Any]:
    packet = getattr(aten, name, None)  # an older torch may lack an operator
    return [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]


_RULES = _rules()

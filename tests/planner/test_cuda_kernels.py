"""What CUDA kernels take, against figures worked out by hand from torch's sources, and the attention they would run."""

from __future__ import annotations

import itertools
import timeit
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as torch's own documentation names it
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from planner.hardware import products
from planner.kernels import cuda, cuda_attention
from planner.kernels.cuda import CudaKernels, flash_splits
from planner.kernels.cuda_attention import CudaAttention, attention_backend
from planner.lifetimes import OUTPUTS_ONLY, Scratch

aten = torch.ops.aten

T4 = CudaKernels.of_product("t4")
V100 = CudaKernels.of_product("v100-16gb")
A100 = CudaKernels.of_product("a100-80gb")
RTX4090 = CudaKernels.of_product("rtx4090")
RTX5090 = CudaKernels.of_product("rtx5090")
H100 = CudaKernels.of_product("h100")

SMALL_WORKSPACE, LARGE_WORKSPACE = 8_519_680, 33_554_432


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def scratch(kernels: CudaKernels, func: Any, *args: Any, **kwargs: Any) -> Scratch | None:
    """Return what `func` takes on meta tensors, after a check that the program makes sense."""
    out = func(*args, **kwargs)
    outputs = [value for value in (out if isinstance(out, tuple) else (out,)) if isinstance(value, torch.Tensor)]
    found = kernels.scratch(func, args, kwargs, outputs)
    if found is not None:
        check_program(found.program)
    return found


def check_program(program: tuple[int, ...]) -> None:
    assert program.count(0) == 1
    alive: dict[int, int] = {}
    for step in program:
        if step > 0:
            alive[len(alive) + 1] = step
        elif step < 0:
            assert alive[-step] > 0, (program, step)
            alive[-step] = 0


def program(kernels: CudaKernels, func: Any, *args: Any, **kwargs: Any) -> tuple[int, ...]:
    found = scratch(kernels, func, *args, **kwargs)
    assert found is not None
    return found.program


def test_products_are_covered() -> None:
    assert set(cuda._gpus()["gpus"]) == set(products()["products"])
    for key, facts in products()["products"].items():
        large = CudaKernels.of_product(key).workspace_bytes == LARGE_WORKSPACE
        assert large == (facts["workspace"] == "large")


@pytest.mark.parametrize("key", [None, "abacus"])
def test_unknown_product_is_an_rtx_4090(key: str | None) -> None:
    assert CudaKernels.of_product(key) == CudaKernels(capability=(8, 9), multiprocessors=128)


@pytest.mark.parametrize(
    ("kernels", "nbytes"),
    [
        (T4, SMALL_WORKSPACE),
        (A100, SMALL_WORKSPACE),
        (RTX4090, SMALL_WORKSPACE),
        (H100, LARGE_WORKSPACE),
        (RTX5090, LARGE_WORKSPACE),
    ],
)
def test_matmul_keeps_the_cublas_workspace(kernels: CudaKernels, nbytes: int) -> None:
    bias, left, right = empty(5), empty(3, 4), empty(4, 5)
    expected = Scratch(program=(0,), keeps=(("cublas", nbytes),))
    assert scratch(kernels, aten.mm.default, left, right) == expected
    assert scratch(kernels, aten.addmm.default, bias, left, right) == expected
    assert scratch(kernels, aten.bmm.default, left[None], right[None]) == expected
    assert scratch(kernels, aten.mv.default, left, empty(4)) == expected


def test_matmul_of_nothing_takes_nothing() -> None:
    assert scratch(A100, aten.mm.default, empty(0, 4), empty(4, 5)) is OUTPUTS_ONLY


@pytest.mark.parametrize(
    ("left", "copied"),
    [
        (empty(6, 8), 0),
        (empty(8, 6).t(), 0),
        (empty(6, 32)[:, :8], 0),  # rows apart, elements together
        (empty(6, 16)[:, ::2], 6 * 8 * 4),  # elements apart
        (empty(1, 16)[:, ::2], 0 + 8 * 4),
        (empty(6, 1).expand(6, 8), 6 * 8 * 4),
        (empty(1, 8).expand(6, 8), 6 * 8 * 4),
        (empty(12, 8)[::2], 0),
    ],
)
def test_operands_that_cublas_cannot_read_are_copied(left: torch.Tensor, copied: int) -> None:
    expected = (0, copied) if copied else (0,)
    assert program(A100, aten.mm.default, left, empty(8, 5)) == expected
    assert program(A100, aten.mm.default, empty(5, 8), left.t()) == expected
    assert program(A100, aten.addmm.default, empty(5), left, empty(8, 5)) == expected


@pytest.mark.parametrize(
    ("left", "right", "copies"),
    [
        (empty(2, 3, 4), empty(2, 4, 5), ()),
        (empty(2, 3, 4), empty(2, 5, 4).mT, ()),
        (empty(2, 4, 3).mT, empty(2, 4, 5), ()),
        (empty(3, 2, 4).transpose(0, 1), empty(2, 4, 5), ()),  # heads between tokens
        (empty(2, 3, 8)[..., ::2], empty(2, 4, 5), (2 * 3 * 4 * 4,)),
        (empty(2, 3, 8)[..., ::2], empty(2, 4, 10)[..., ::2], (2 * 4 * 5 * 4, 2 * 3 * 4 * 4)),
        (empty(2, 3, 4), empty(2, 4, 1), ()),
        (empty(1, 3, 4).expand(2, 3, 4), empty(2, 4, 5), ()),  # a batch stride of nothing is fine
        (empty(2, 1, 4).expand(2, 3, 4), empty(2, 4, 5), (2 * 3 * 4 * 4,)),  # a row stride of nothing is not
    ],
)
def test_batched_operands_that_cublas_cannot_read_are_copied(
    left: torch.Tensor, right: torch.Tensor, copies: tuple[int, ...]
) -> None:
    assert program(A100, aten.bmm.default, left, right) == (0, *copies)
    bias = empty(1, 1, right.shape[2]).expand(2, 3, right.shape[2])
    assert program(A100, aten.baddbmm.default, bias, left, right) == (0, *copies)


def splits_by_numpy(blocks: int, multiprocessors: int, key_blocks: int) -> int:
    """Count the parts with arrays of single precision."""
    slots = np.int64(2 * multiprocessors)
    if np.float32(blocks) >= np.float32(0.8) * np.float32(slots):
        return 1
    parts = np.arange(1, min(128, int(slots), key_blocks) + 1)
    each = -(-key_blocks // parts)
    usable = np.concatenate(([True], each[1:] != each[:-1]))
    waves = np.float32(blocks * parts) / np.float32(slots)
    occupancy = np.where(usable, waves / np.ceil(waves), np.float32(0))
    good = usable & (occupancy.astype(np.float64) >= 0.85 * float(occupancy.max(initial=0)))
    return int(parts[np.argmax(good)]) if good.any() else 1


def test_splits_agree_with_arrays() -> None:
    for blocks, multiprocessors, key_blocks in itertools.product(
        (1, 2, 7, 8, 16, 31, 32, 64, 100, 128, 172, 173, 204, 205, 300), (24, 58, 82, 108, 128, 132, 170), range(1, 70)
    ):
        expected = splits_by_numpy(blocks, multiprocessors, key_blocks)
        assert flash_splits(blocks, multiprocessors, key_blocks) == expected, (blocks, multiprocessors, key_blocks)


def attention_inputs(
    queries: int, keys: int, *, heads: int = 32, key_heads: int = 8, width: int = 128, batch: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query = empty(batch, heads, queries, width, dtype=torch.bfloat16)
    key = empty(batch, key_heads, keys, width, dtype=torch.bfloat16)
    return query, key, key


def test_flash_decode_is_cut_into_parts() -> None:
    # One token of Llama 3 8B at 4,096 keys on 108 multiprocessors: 4 queries for each of 8 key heads, 8 blocks, 32
    # blocks of keys. 16 parts fill 128 of 216 slots (0.593), which 32 do not better; 11 fill 88 (0.407).
    flash = aten._scaled_dot_product_flash_attention.default
    assert program(A100, flash, *attention_inputs(1, 4096)) == (0, 4 * 16 * 8 * 4, 4 * 16 * 8 * 4 * 128)
    # 4,096 queries of 32 heads are 2,048 blocks.
    assert scratch(A100, flash, *attention_inputs(4096, 4096)) is OUTPUTS_ONLY
    # 64 keys are one block: nothing to cut.
    assert scratch(A100, flash, *attention_inputs(1, 64)) is OUTPUTS_ONLY
    # A width of 160 is stored as 192, its keys in blocks of 64: 8 blocks of queries, 4 of keys, so 4 parts.
    wide = attention_inputs(8, 256, heads=8, key_heads=8, width=160)
    assert program(A100, flash, *wide) == (0, 4 * 4 * 8 * 8, 4 * 4 * 8 * 8 * 192)


def test_efficient_attention_accumulates_wide_heads_in_memory() -> None:
    efficient = aten._scaled_dot_product_efficient_attention.default

    def taken(width: int, dtype: torch.dtype) -> Scratch | None:
        query = empty(2, 3, 5, width, dtype=dtype)
        return scratch(A100, efficient, query, query, query, None, False)

    assert taken(256, torch.bfloat16) == Scratch(program=(0, 2 * 3 * 5 * 256 * 4))
    assert taken(136, torch.float16) == Scratch(program=(0, 2 * 3 * 5 * 136 * 4))
    assert taken(128, torch.bfloat16) is OUTPUTS_ONLY
    assert taken(256, torch.float32) is OUTPUTS_ONLY


def test_cudnn_attention_is_named_as_not_modelled() -> None:
    query = empty(2, 3, 5, 64, dtype=torch.bfloat16)
    assert scratch(H100, aten._scaled_dot_product_cudnn_attention.default, query, query, query, None, False) is None


def test_layer_norm_keeps_its_statistics_in_float32() -> None:
    layer_norm = aten.native_layer_norm.default
    with FakeTensorMode():
        source, weight = torch.empty(2, 7, 16, dtype=torch.bfloat16), torch.empty(16, dtype=torch.bfloat16)
        assert program(A100, layer_norm, source, [16], weight, weight, 1e-5) == (0, 2 * 14, 2 * 14)
        apart = torch.empty(2, 7, 32, dtype=torch.bfloat16)[..., ::2]
        assert program(A100, layer_norm, apart, [16], weight, weight, 1e-5) == (2 * 7 * 16 * 2, 0, 2 * 14, 2 * 14)
        single = torch.empty(2, 7, 16)
        assert scratch(A100, layer_norm, single, [16], None, None, 1e-5) is OUTPUTS_ONLY


def test_group_norm_scales_every_channel() -> None:
    source, weight = empty(2, 6, 4, 4), empty(6)
    group_norm = aten.native_group_norm.default
    assert program(A100, group_norm, source, weight, weight, 2, 6, 16, 3, 1e-5) == (0, 48, 48)
    assert scratch(A100, group_norm, source, None, None, 2, 6, 16, 3, 1e-5) is OUTPUTS_ONLY


def test_softmax_copies_what_is_not_contiguous() -> None:
    scores = empty(2, 3, 8)
    assert scratch(A100, aten._softmax.default, scores, -1, False) is OUTPUTS_ONLY
    assert program(A100, aten._softmax.default, scores.mT, -1, False) == (0, 2 * 3 * 8 * 4)


def cpu_events(call: Callable[[], Any]) -> list[int]:
    """Return what the CPU's allocator gives (> 0) and takes back (< 0) during `call`, whose result stays alive."""
    call()
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    del kept
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def test_safe_softmax_takes_what_it_takes_on_the_cpu() -> None:
    scores = torch.zeros(2, 3, 5)
    output, *rest = [nbytes for nbytes in cpu_events(lambda: aten._safe_softmax(scores, -1)) if nbytes > 0]
    assert output == 120
    assert program(A100, aten._safe_softmax.default, scores.to("meta"), -1) == (0, *rest)


def test_multinomial_takes_what_it_takes_on_the_cpu() -> None:
    weights = torch.ones(2, 1000)
    events = cpu_events(lambda: torch.multinomial(weights, 1))
    output, *rest = [nbytes for nbytes in events if nbytes > 0]
    assert output == 16
    predicted = [step for step in program(A100, aten.multinomial.default, weights.to("meta"), 1) if step > 0]
    numbers = [8, 4]  # Python numbers become tensors on the CPU, and live nowhere on a GPU
    assert [nbytes for nbytes in predicted if nbytes not in numbers] == [n for n in rest if n not in numbers]
    assert predicted.count(4) == 2
    assert scratch(A100, aten.multinomial.default, weights.to("meta"), 2) is None


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        # One tile and 32 more, of 16 B: 528, rounded to 768, and 255.
        (empty(100, dtype=torch.int64), (0, 1023)),
        (empty(1, 100, dtype=torch.int64), (0, 1023)),
        (empty(1, 100, dtype=torch.bool), (0, 800, 1023)),
        (empty(2, 100, dtype=torch.int64), (0,)),
        (empty(2, 100, dtype=torch.int32), (0, 1600)),
        (empty(2, 200)[:, ::2], (0, 800)),
    ],
)
def test_cumsum(source: torch.Tensor, expected: tuple[int, ...]) -> None:
    assert program(A100, aten.cumsum.default, source, -1) == expected


def test_sort() -> None:
    assert scratch(H100, aten.sort.default, empty(50, 4096)) is OUTPUTS_ONLY
    ids = empty(16_384, dtype=torch.int64)
    # Bins of 8 passes, 4 blocks of 4,608, keys and indices again, counters.
    radix = 8 * 256 * 8 + 4 * 256 * 4 + 16_384 * 8 + 16_384 * 8 + 256 + 255
    assert program(H100, aten.sort.default, ids) == (0, 16_384 * 8, radix)
    assert program(H100, aten.sort.stable, ids, stable=True) == (0, 16_384 * 8, radix)
    logits = empty(200, 5000)
    assert program(A100, aten.sort.default, logits) == (0, 8_000_000, 4_000_000 + 8_000_000 + 255)
    few = program(A100, aten.sort.default, empty(2, 5120))
    assert few[:4] == (0, 81_920, 81_920, 40_960)
    # A half-precision key is sorted by another algorithm before capability 9.
    assert scratch(A100, aten.sort.default, empty(16_384, dtype=torch.bfloat16)) is None


def test_topk() -> None:
    assert scratch(A100, aten.topk.default, empty(64, 128), 2) is OUTPUTS_ONLY
    # 126 blocks of 256 threads with 4 elements each; 256 digits of 2 B a block and of 4 B a row.
    scan = 768 + 256 + 255
    held = (4, 8, 8, 126 * 512, 1024, 126 * 4, 126 * 4)
    assert program(A100, aten.topk.default, empty(1, 128_256), 50) == (0, *held, scan, -8, scan)
    apart = program(A100, aten.topk.default, empty(1, 256_512)[:, ::2], 50)
    assert apart == (0, 128_256 * 4, *held, scan, -9, scan)


@pytest.mark.parametrize(
    ("kernels", "func", "args", "expected"),
    [
        # 512 threads take 297 values each; 3 such blocks fit 1,536 threads, so 384 are wanted; 19 of 16 values do.
        (RTX4090, aten.argmax.default, (empty(1, 151_936), -1), (0, 19 * 16, 4)),
        (RTX4090, aten.argmax.default, (empty(1, 151_936, dtype=torch.bfloat16), -1), (0, 19 * 16, 4)),
        # 250 values a thread are few enough for one block.
        (RTX4090, aten.argmax.default, (empty(1, 128_000), -1), (0,)),
        (A100, aten.max.dim, (empty(1, 151_936), -1), (0, 19 * 16, 4)),
        # 8,192 rows of 64 columns: blocks of 16 threads of 4 columns by 8; 1,024 rows each, so 64 blocks.
        (A100, aten.sum.dim_IntList, (empty(8192, 64), [0]), (0, 4 * 64 * 64 * 16 * 4, 4)),
        (A100, aten.sum.dim_IntList, (empty(8192, 64), [1]), (0,)),
        # All of a million: 512 threads with 2,048 values each; 128 blocks of 16 values, where 432 are wanted.
        (A100, aten.sum.default, (empty(1024, 1024),), (0, 4 * 128, 4)),
        (A100, aten.any.default, (empty(1024, 1024, dtype=torch.bool),), (0, 128, 4)),
        (A100, aten.sum.default, (empty(4, 8, dtype=torch.bool),), (0, 4 * 8 * 8)),
        (A100, aten.max.default, (empty(1024, 1024, dtype=torch.bfloat16),), (0, 2 * 128, 4)),
        (A100, aten.amax.default, (empty(1024, 1024, dtype=torch.bfloat16),), (0, 2 * 128, 4)),
        (A100, aten.aminmax.default, (empty(1024, 1024),), (0, 8 * 128, 4)),
        (A100, aten.mean.dim, (empty(4, 4096, dtype=torch.bfloat16), [-1], True), (0,)),
        (A100, aten.var_mean.correction, (empty(1024, 1024),), (0, 16 * 128, 4)),
        (A100, aten.linalg_vector_norm.default, (empty(1024, 1024),), (0, 4 * 128, 4)),
    ],
)
def test_reductions(kernels: CudaKernels, func: Any, args: tuple[Any, ...], expected: tuple[int, ...]) -> None:
    assert program(kernels, func, *args) == expected


def test_reduction_merges_dimensions() -> None:
    whole = program(A100, aten.sum.default, empty(1024, 1024))
    assert program(A100, aten.sum.dim_IntList, empty(16, 64, 1, 1024), [0, 1, 2, 3]) == whole
    assert program(A100, aten.sum.default, empty(1024, 1024).t()) == whole
    columns = program(A100, aten.sum.dim_IntList, empty(8192, 64), [0])
    assert program(A100, aten.sum.dim_IntList, empty(64, 8192).t(), [0]) != columns
    assert program(A100, aten.sum.dim_IntList, empty(64, 128, 64), [0, 1]) == columns


def test_grouped_matmul() -> None:
    tokens, experts = empty(16, 32, dtype=torch.bfloat16), empty(8, 32, 64, dtype=torch.bfloat16)
    offsets = torch.empty(8, dtype=torch.int32, device="meta")
    out = [empty(16, 64, dtype=torch.bfloat16)]
    grouped = aten._grouped_mm.default
    found = H100.scratch(grouped, (tokens, experts, offsets), {}, out)
    assert found == Scratch(program=(0, 3 * 8 * 8 + 8 * 12 + 3 * 8 * 8, 132 * 4 * 128))
    for kernels in (A100, RTX5090):
        found = kernels.scratch(grouped, (tokens, experts, offsets), {}, out)
        assert found == Scratch(keeps=(("cublas", kernels.workspace_bytes),))


def test_indexing() -> None:
    source, rows, mask = empty(6, 4), empty(3, dtype=torch.int64), empty(6, dtype=torch.bool)
    assert A100.scratch(aten.index.Tensor, (source, [rows]), {}, [empty(3, 4)]) is OUTPUTS_ONLY
    assert A100.scratch(aten.index.Tensor, (source, [rows.int()]), {}, [empty(3, 4)]) == Scratch(program=(24, 0))
    assert A100.scratch(aten.index.Tensor, (source, [mask]), {}, [empty(3, 4)]) is None
    put = aten.index_put_.default
    assert A100.scratch(put, (source, [None, rows], empty(6, 3)), {}, [source]) is OUTPUTS_ONLY
    assert A100.scratch(put, (source, [rows], empty(3, 4), True), {}, [source]) is None
    assert A100.scratch(put, (source, [mask], empty()), {}, [source]) is OUTPUTS_ONLY
    assert A100.scratch(put, (source, [mask], empty(3, 4)), {}, [source]) is None


@pytest.mark.parametrize("func", [aten.convolution.default, aten.nonzero.default, aten.masked_scatter.default])
def test_operators_known_but_not_modelled(func: Any) -> None:
    assert A100.scratch(func, (), {}, []) is None


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.add.Tensor, (empty(2, 3), empty(2, 3, dtype=torch.bfloat16))),
        (aten.pow.Tensor_Scalar, (empty(2, 3), 2.0)),
        (aten._to_copy.default, (empty(2, 3),)),
        (aten.cat.default, ([empty(2, 3)] * 200,)),
        (aten.embedding.default, (empty(10, 3), empty(2, dtype=torch.int64))),
        (aten.gather.default, (empty(2, 3), 1, empty(2, 1, dtype=torch.int64))),
        (aten.maximum.default, (empty(2, 3), empty(2, 3))),
        (aten.max.other, (empty(2, 3), empty(2, 3))),
    ],
)
def test_most_operators_take_nothing(func: Any, args: Any) -> None:
    assert scratch(A100, func, *args) is OUTPUTS_ONLY


def test_deciding_is_quick() -> None:
    source = empty(2, 3)
    outputs = [source]

    def best(func: Any, args: Any) -> float:
        return min(timeit.repeat(lambda: A100.scratch(func, args, {}, outputs), number=1000, repeat=5)) / 1000

    assert best(aten.add.Tensor, (source, source)) < 2e-6
    assert best(aten.mm.default, (source, source.t())) < 2e-5


# Attention.

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MASK = "mask"


@pytest.mark.parametrize(
    ("kernels", "dtype", "width", "options", "expected"),
    [
        (A100, BF16, 128, {}, "flash"),
        (A100, BF16, 128, {"is_causal": True}, "flash"),
        (A100, BF16, 128, {"is_causal": True, "queries": 3}, "efficient"),  # flash aligns a causal mask elsewhere
        (A100, BF16, 128, {MASK: torch.bool}, "efficient"),
        (A100, BF16, 128, {MASK: BF16}, "efficient"),
        (A100, FP32, 128, {}, "efficient"),
        (A100, torch.float64, 128, {}, "math"),
        (A100, BF16, 80, {}, "flash"),
        (A100, BF16, 100, {}, "flash"),  # padded to 104
        (A100, BF16, 100, {MASK: torch.bool}, "math"),  # not in eights
        (A100, FP32, 100, {}, "efficient"),  # in fours
        (A100, FP32, 98, {}, "math"),
        (A100, BF16, 256, {}, "flash"),
        (A100, BF16, 320, {}, "efficient"),
        (A100, BF16, 128, {"key_heads": 2, "enable_gqa": True}, "flash"),
        (A100, BF16, 128, {"key_heads": 2}, "math"),
        (A100, BF16, 128, {"key_heads": 2, "enable_gqa": True, MASK: BF16}, "math"),
        (A100, FP32, 128, {"key_heads": 2, "enable_gqa": True}, "math"),
        (A100, BF16, 128, {"key_heads": 3, "enable_gqa": True}, "math"),
        (A100, BF16, 128, {"value_width": 64}, "efficient"),
        (RTX4090, BF16, 128, {}, "flash"),
        (RTX5090, BF16, 128, {}, "flash"),
        (RTX5090, BF16, 128, {MASK: BF16}, "efficient"),
        (H100, BF16, 128, {}, "cudnn"),
        (H100, BF16, 128, {MASK: BF16}, "cudnn"),
        (H100, BF16, 128, {"key_heads": 2, "enable_gqa": True, MASK: BF16}, "cudnn"),
        (H100, BF16, 256, {}, "cudnn"),
        (H100, BF16, 100, {}, "flash"),
        (H100, BF16, 128, {"keys": 1, "queries": 1}, "flash"),
        (H100, FP32, 128, {}, "efficient"),
        (H100, BF16, 128, {"cudnn_version": 91002}, "flash"),
        (H100, BF16, 128, {"cudnn_version": 91002, MASK: BF16}, "efficient"),
        (T4, FP16, 64, {}, "efficient"),
        (T4, FP16, 64, {MASK: torch.bool}, "efficient"),
        (T4, BF16, 64, {}, "math"),
        (T4, FP32, 63, {}, "efficient"),
        (T4, FP16, 60, {}, "math"),
        (V100, FP16, 64, {}, "efficient"),
        (A100, BF16, 128, {"keys": 0, "queries": 4}, "math"),
    ],
)
def test_backend_choice(
    kernels: CudaKernels, dtype: torch.dtype, width: int, options: dict[str, Any], expected: str
) -> None:
    options = dict(options)
    heads, queries, keys = 4, options.pop("queries", 6), options.pop("keys", 6)
    key_heads, value_width = options.pop("key_heads", heads), options.pop("value_width", width)
    mask_dtype = options.pop(MASK, None)
    query = empty(2, heads, queries, width, dtype=dtype)
    key = empty(2, key_heads, keys, width, dtype=dtype)
    value = empty(2, key_heads, keys, value_width, dtype=dtype)
    mask = None if mask_dtype is None else empty(2, 1, queries, keys, dtype=mask_dtype)
    assert attention_backend(kernels, query, key, value, mask, **options) == expected


def test_backend_looks_at_strides_and_dimensions() -> None:
    query = empty(2, 4, 6, 64, dtype=BF16)
    apart = empty(2, 4, 6, 128, dtype=BF16)[..., ::2]
    assert attention_backend(A100, query, apart, query) == "math"
    assert attention_backend(A100, query[0], query[0], query[0]) == "math"
    spread = empty(2, 1, 6, 1, dtype=BF16).expand(2, 1, 6, 6)
    assert attention_backend(A100, query, query, query, spread) == "math"
    assert attention_backend(H100, query, query, query, empty(2, 6, 6, dtype=BF16)) == "efficient"


class Log(TorchDispatchMode):
    """Notes the names of operators, and the bytes that each makes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(func._schema.name.removeprefix("aten::"))
        if isinstance(out, torch.Tensor) and not any(out is arg for arg in args):
            self.made.append(out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize(
    ("kernels", "operator"),
    [
        (A100, "_scaled_dot_product_flash_attention"),
        (T4, "_scaled_dot_product_efficient_attention"),
        (H100, "_scaled_dot_product_cudnn_attention"),
    ],
)
def test_llama_style_call(kernels: CudaKernels, operator: str) -> None:
    with FakeTensorMode(), torch.no_grad(), Log() as log, CudaAttention(kernels):
        # As transformers hands them over: heads split off a projection, (batch, tokens, heads, width) in memory.
        query = torch.empty(2, 7, 4, 64, dtype=FP16).transpose(1, 2)
        key = torch.empty(2, 7, 4, 64, dtype=FP16).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, key, key, is_causal=True)
    assert operator in log.names
    assert (out.shape, out.dtype) == ((2, 4, 7, 64), FP16)
    assert out.stride() == (7 * 4 * 64, 64, 4 * 64, 1)
    assert out.transpose(1, 2).is_contiguous()


def test_flash_follows_the_layout_of_the_query_and_efficient_does_not() -> None:
    with FakeTensorMode(), torch.no_grad():
        query = torch.empty(2, 4, 7, 64, dtype=BF16)
        mask = torch.zeros(2, 1, 7, 7, dtype=BF16)
        with CudaAttention(A100):
            assert F.scaled_dot_product_attention(query, query, query).is_contiguous()
            assert F.scaled_dot_product_attention(query, query, query, mask).transpose(1, 2).is_contiguous()


def test_flash_pads_narrow_heads() -> None:
    with FakeTensorMode(), torch.no_grad(), Log() as log, CudaAttention(A100):
        query = torch.empty(2, 4, 7, 100, dtype=BF16)
        out = F.scaled_dot_product_attention(query, query, query)
    assert log.names.count("constant_pad_nd") == 3
    assert log.made.count(2 * 4 * 7 * 104 * 2) >= 3
    assert out.shape == (2, 4, 7, 100)
    assert out.untyped_storage().nbytes() == 2 * 4 * 7 * 104 * 2


@pytest.mark.parametrize(("keys", "padded"), [(16, None), (12, 16), (13, 16)])
def test_masks_are_made_numbers_and_aligned(keys: int, padded: int | None) -> None:
    with FakeTensorMode(), torch.no_grad(), Log() as log, CudaAttention(A100):
        query, key = torch.empty(2, 4, 5, 64, dtype=BF16), torch.empty(2, 4, keys, 64, dtype=BF16)
        mask = torch.ones(2, 1, 5, keys, dtype=torch.bool)
        out = F.scaled_dot_product_attention(query, key, key, mask)
    assert out.shape == (2, 4, 5, 64)
    assert 2 * 5 * keys * 2 in log.made
    assert ("constant_pad_nd" in log.names) == (padded is not None)
    if padded is not None:
        assert 2 * 5 * padded * 2 in log.made


def test_a_mask_cut_out_of_a_wider_one_is_padded_by_eight() -> None:
    with FakeTensorMode(), torch.no_grad(), Log() as log, CudaAttention(A100):
        query = torch.empty(2, 4, 16, 64, dtype=BF16)
        F.scaled_dot_product_attention(query, query, query, torch.empty(2, 1, 16, 17, dtype=BF16)[..., :16])
    assert 2 * 16 * 24 * 2 in log.made


def test_boolean_masks_become_numbers_as_in_torch() -> None:
    query, mask = torch.zeros(1, 2, 3, 8, dtype=BF16), torch.ones(1, 1, 3, 5, dtype=torch.bool)
    key = torch.zeros(1, 2, 5, 8, dtype=BF16)
    ours = cpu_events(lambda: cuda_attention._float_mask(mask, BF16))
    theirs = cpu_events(lambda: F.scaled_dot_product_attention(query, key, key, mask))
    assert ours == theirs[: len(ours)]
    assert len(ours) == 5


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("kind", ["plain", "causal", "mask", "grouped", "scaled"])
def test_math_takes_what_torch_takes_on_the_cpu(dtype: torch.dtype, kind: str) -> None:
    query = torch.randn(2, 4, 3, 8).to(dtype)
    key, value = torch.randn(2, 2, 6, 5, 8).to(dtype).unbind(1)
    key, value = (part[:, : 2 if kind == "grouped" else 4] for part in (key, value))
    mask = torch.randn(2, 1, 3, 5).to(dtype) if kind == "mask" else None
    causal, grouped, scale = kind == "causal", kind == "grouped", -0.3 if kind == "scaled" else None
    real = aten._scaled_dot_product_attention_math.default

    def theirs() -> torch.Tensor:
        return real(query, key, value, mask, 0.0, causal, None, scale=scale, enable_gqa=grouped)[0]

    def ours() -> torch.Tensor:
        return cuda_attention._math(query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=grouped)

    assert torch.equal(ours(), theirs())
    taken, real_taken = cpu_events(ours), cpu_events(theirs)
    assert [n for n in taken if n > 0] == [n for n in real_taken if n > 0]
    assert peak(taken) == peak(real_taken)


def peak(events: list[int]) -> int:
    return max(itertools.accumulate(events))


def test_math_adds_a_mask_in_place() -> None:
    with FakeTensorMode(), torch.no_grad(), Log() as log, CudaAttention(T4):
        query = torch.empty(1, 2, 3, 64, dtype=BF16)
        F.scaled_dot_product_attention(query, query, query, torch.zeros(1, 1, 3, 3, dtype=BF16))
    assert "add_" in log.names
    assert "add" not in log.names


def test_the_math_path_refuses_a_mask_with_a_causal_flag_as_torch_does() -> None:
    real, mask = torch.zeros(1, 2, 3, 8), torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match="is_causal=True"):
        aten._scaled_dot_product_attention_math(real, real, real, mask, 0.0, True)
    with FakeTensorMode(), CudaAttention(T4):
        query = torch.empty(1, 2, 3, 64, dtype=BF16)
        with pytest.raises(RuntimeError, match="is_causal=True"):
            F.scaled_dot_product_attention(query, query, query, torch.zeros(3, 3), is_causal=True)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_half_softmax_to_float32_is_one_operator(name: str) -> None:
    with FakeTensorMode(), torch.no_grad():
        for dtype, operators in ((FP16, ["_" + name]), (BF16, ["_to_copy", "_" + name])):
            scores = torch.empty(2, 3, dtype=dtype)
            for function in (getattr(F, name), getattr(torch, name), getattr(torch.Tensor, name)):
                with Log() as log, CudaAttention(A100):
                    out = function(scores, -1, dtype=FP32)
                assert [n for n in log.names if n != "prim::device"] == operators
                assert (out.dtype, out.shape) == (FP32, (2, 3))


def test_attention_inside_torch_modules() -> None:
    function = F.scaled_dot_product_attention
    with FakeTensorMode(), torch.no_grad():
        attention = torch.nn.MultiheadAttention(64, 4, batch_first=True, dtype=BF16).train()
        source = torch.empty(2, 7, 64, dtype=BF16)
        with Log() as log, CudaAttention(A100):
            out, _ = attention(source, source, source, need_weights=False)
    assert out.shape == (2, 7, 64)
    assert "_scaled_dot_product_flash_attention" in log.names
    assert F.scaled_dot_product_attention is function


def test_real_tensors_and_what_comes_after_are_left_alone() -> None:
    query = torch.randn(1, 2, 3, 8)
    expected = F.scaled_dot_product_attention(query, query, query)
    function = F.scaled_dot_product_attention
    with CudaAttention(A100):
        assert torch.equal(F.scaled_dot_product_attention(query, query, query), expected)
    assert F.scaled_dot_product_attention is function
    with FakeTensorMode(), torch.no_grad():
        fake = torch.empty(1, 2, 3, 8, dtype=BF16)
        with pytest.raises(ZeroDivisionError), CudaAttention(A100):
            _ = 1 / 0
        with Log() as log:
            F.scaled_dot_product_attention(fake, fake, fake)
    assert "_scaled_dot_product_flash_attention_for_cpu" in log.names
    assert torch.overrides._get_current_function_mode_stack() == []


@pytest.mark.parametrize(
    ("kernels", "operator"),
    [
        (A100, "_scaled_dot_product_flash_attention"),
        (H100, "_scaled_dot_product_cudnn_attention"),
        (T4, "_safe_softmax"),
    ],
)
def test_a_whole_llama(kernels: CudaKernels, operator: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        dtype=BF16,
    )
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model = LlamaForCausalLM._from_config(config, dtype=BF16).eval()
    ids = torch.ones(2, 9, dtype=torch.long)
    with fake, torch.no_grad(), Log() as log, CudaAttention(kernels):
        out = model(input_ids=ids, use_cache=True)
        step = model(input_ids=ids[:, :1], past_key_values=out.past_key_values)
    assert log.names.count(operator) == 4
    assert out.logits.shape == (2, 9, 128)
    assert step.logits.shape == (2, 1, 128)
    assert out.logits.dtype is BF16
    assert not any("for_cpu" in name for name in log.names)

"""Compares what CUDA kernels ask of the caching allocator with what `planner.kernels.cuda` says they would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as torch's own documentation names it
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from planner.kernels.cuda import CudaKernels
from planner.kernels.cuda_attention import CUDNN_VERSION, CudaAttention, attention_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

aten = torch.ops.aten
BF16, FP32, INT64 = torch.bfloat16, torch.float32, torch.int64
# CUB's tile sizes and CUTLASS's workspace are not known to the byte (`planner.kernels.cuda.UNMEASURED`).
EXACT, NEAR = 0, 1024


@pytest.fixture(scope="module")
def kernels() -> CudaKernels:
    properties = torch.cuda.get_device_properties(0)
    return CudaKernels(
        capability=(properties.major, properties.minor), multiprocessors=properties.multi_processor_count
    )


def made(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.rand(shape, device="cuda").to(dtype)
    return torch.randint(0, 2, shape, device="cuda").to(dtype)


def requests_of(call: Callable[[], Any]) -> tuple[list[int], Any]:
    """Return the bytes of every request that the caching allocator gets during `call`, in order, and its result."""
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(max_entries=100_000)
    try:
        out = call()
        torch.cuda.synchronize()
        (trace, *_) = torch.cuda.memory._snapshot()["device_traces"]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    return [entry["size"] for entry in trace if entry["action"] == "alloc"], out


def outputs_of(out: Any) -> list[torch.Tensor]:
    values = out if isinstance(out, (tuple, list)) else (out,)
    return [value for value in values if isinstance(value, torch.Tensor)]


def predicted(kernels: CudaKernels, func: Any, args: Any, kwargs: Any, out: Any) -> list[int] | None:
    outputs = outputs_of(out)
    found = kernels.scratch(func, args, kwargs, outputs)
    if found is None:
        return None
    given = {tensor.untyped_storage()._cdata for tensor in outputs_of(list(args))}
    storages = [tensor.untyped_storage() for tensor in outputs if tensor.device.type == "cuda"]
    sizes = [storage.nbytes() for storage in storages if storage._cdata not in given and storage.nbytes()]
    return sizes + [step for step in found.program if step > 0]


def heads(batch: int, count: int, tokens: int, width: int) -> torch.Tensor:
    return made(batch, tokens, count, width, dtype=BF16).transpose(1, 2)


FLASH = aten._scaled_dot_product_flash_attention.default
EFFICIENT = aten._scaled_dot_product_efficient_attention.default
CASES: dict[str, tuple[Callable[[], tuple[Any, ...]], int]] = {
    "mm": (lambda: (aten.mm.default, made(64, 128), made(128, 32)), EXACT),
    "mm of spread columns": (lambda: (aten.mm.default, made(64, 256)[:, ::2], made(128, 32)), EXACT),
    "addmm": (
        lambda: (aten.addmm.default, made(32, dtype=BF16), made(64, 128, dtype=BF16), made(128, 32, dtype=BF16)),
        0,
    ),
    "bmm": (lambda: (aten.bmm.default, made(4, 64, 128), made(4, 128, 32)), EXACT),
    "bmm of spread columns": (lambda: (aten.bmm.default, made(4, 64, 256)[..., ::2], made(4, 128, 32)), EXACT),
    "flash prefill": (lambda: (FLASH, *(heads(2, 32, 512, 128) for _ in range(3)), 0.0, True), EXACT),
    "flash decode": (lambda: (FLASH, heads(1, 32, 1, 128), heads(1, 8, 4096, 128), heads(1, 8, 4096, 128)), EXACT),
    "flash wide": (lambda: (FLASH, heads(1, 8, 8, 160), heads(1, 8, 256, 160), heads(1, 8, 256, 160)), EXACT),
    "efficient": (lambda: (EFFICIENT, *(heads(2, 4, 64, 64) for _ in range(3)), None, False), EXACT),
    "efficient wide": (lambda: (EFFICIENT, *(heads(2, 4, 64, 256) for _ in range(3)), None, False), EXACT),
    "layer norm": (lambda: (aten.native_layer_norm.default, made(64, 256, dtype=BF16), [256], None, None, 1e-5), EXACT),
    "softmax": (lambda: (aten._softmax.default, made(4, 64, 64), -1, False), EXACT),
    "safe softmax": (lambda: (aten._safe_softmax.default, made(4, 64, 64), -1), EXACT),
    "multinomial": (lambda: (aten.multinomial.default, made(2, 32_000), 1), EXACT),
    "cumsum of a row": (lambda: (aten.cumsum.default, made(1, 500, dtype=INT64), -1), NEAR),
    "cumsum of rows": (lambda: (aten.cumsum.default, made(3, 500, dtype=torch.bool), -1), EXACT),
    "sort short": (lambda: (aten.sort.default, made(2, 4096)), EXACT),
    "sort a row": (lambda: (aten.sort.default, made(128_256)), 32 * NEAR),
    "sort ids": (lambda: (aten.sort.default, made(16_384, dtype=INT64)), 32 * NEAR),
    "sort few rows": (lambda: (aten.sort.default, made(4, 32_000)), 32 * NEAR),
    "sort many rows": (lambda: (aten.sort.default, made(200, 5000)), NEAR),
    "topk of experts": (lambda: (aten.topk.default, made(64, 128), 8), EXACT),
    "topk of a vocabulary": (lambda: (aten.topk.default, made(1, 128_256), 50), 2 * NEAR),
    "argmax": (lambda: (aten.argmax.default, made(1, 151_936), -1), EXACT),
    "argmax of a short row": (lambda: (aten.argmax.default, made(1, 32_000), -1), EXACT),
    "sum of columns": (lambda: (aten.sum.dim_IntList, made(8192, 64), [0]), EXACT),
    "sum of all": (lambda: (aten.sum.default, made(1024, 1024)), EXACT),
    "sum of booleans": (lambda: (aten.sum.default, made(64, 64, dtype=torch.bool)), EXACT),
    "any": (lambda: (aten.any.default, made(1024, 1024, dtype=torch.bool)), EXACT),
    "mean": (lambda: (aten.mean.dim, made(64, 4096, dtype=BF16), [-1], True), EXACT),
    "var": (lambda: (aten.var_mean.correction, made(1024, 1024)), EXACT),
    "index": (lambda: (aten.index.Tensor, made(64, 8), [made(5, dtype=INT64)]), EXACT),
    "embedding": (lambda: (aten.embedding.default, made(64, 8), made(5, dtype=INT64)), EXACT),
    "cat of many": (lambda: (aten.cat.default, [made(4, 8) for _ in range(200)]), EXACT),
    "mixed types": (lambda: (aten.add.Tensor, made(64, 8), made(64, 8, dtype=BF16)), EXACT),
    "conversion": (lambda: (aten._to_copy.default, made(64, 8, dtype=BF16)), EXACT),
}


@pytest.mark.parametrize("name", CASES)
def test_requests(kernels: CudaKernels, name: str) -> None:
    build, tolerance = CASES[name]
    func, *args = build()
    if func is FLASH and kernels.capability < (8, 0):
        pytest.skip("flash attention needs capability 8.0")
    with torch.no_grad():
        func(*args)  # the libraries' workspaces are taken now
        measured, out = requests_of(lambda: func(*args))
    expected = predicted(kernels, func, tuple(args), {}, out)
    assert expected is not None
    if tolerance == EXACT:
        assert Counter(measured) == Counter(expected)
    else:
        assert len(measured) == len(expected)
        assert abs(sum(measured) - sum(expected)) <= tolerance, (measured, expected)


def test_grouped_matmul(kernels: CudaKernels) -> None:
    tokens, experts = made(256, 128, dtype=BF16), made(8, 128, 64, dtype=BF16)
    offsets = torch.arange(32, 257, 32, device="cuda", dtype=torch.int32)
    grouped = aten._grouped_mm.default
    with torch.no_grad():
        grouped(tokens, experts, offsets)
        measured, out = requests_of(lambda: grouped(tokens, experts, offsets))
    expected = predicted(kernels, grouped, (tokens, experts, offsets), {}, out)
    assert Counter(measured) == Counter(expected)


def test_the_workspace_is_taken_once_and_kept(kernels: CudaKernels) -> None:
    torch._C._cuda_clearCublasWorkspaces()
    left, right, bias = made(64, 128, dtype=BF16), made(128, 32, dtype=BF16), made(32, dtype=BF16)
    first, out = requests_of(lambda: torch.mm(left, right))
    assert Counter(first) == Counter([out.untyped_storage().nbytes(), kernels.workspace_bytes])
    # cublasLt, which adds the bias, shares it.
    second, out = requests_of(lambda: torch.addmm(bias, left, right))
    assert second == [out.untyped_storage().nbytes()]


def test_cudnn_workspace_is_shown(kernels: CudaKernels, record_property: Any) -> None:
    """Not a prediction yet: what cuDNN attention takes beside its output, which is seen, goes into the report."""
    if kernels.capability[0] not in (9, 10):
        pytest.skip("cuDNN attention is not the default here")
    for queries, keys in ((512, 512), (1, 512), (1, 4096), (4096, 4096)):
        query, key = heads(1, 32, queries, 128), heads(1, 8, keys, 128)
        call = lambda q=query, k=key: F.scaled_dot_product_attention(q, k, k, enable_gqa=True)  # noqa: E731
        call()
        measured, out = requests_of(call)
        assert out.untyped_storage().nbytes() in measured
        record_property(f"cudnn {queries}x{keys}", measured)


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


_OPERATORS = {
    "flash": "aten::_scaled_dot_product_flash_attention",
    "efficient": "aten::_scaled_dot_product_efficient_attention",
    "cudnn": "aten::_scaled_dot_product_cudnn_attention",
    "math": "aten::_safe_softmax",
}


@pytest.mark.parametrize("dtype", [torch.float16, BF16, FP32])
@pytest.mark.parametrize("width", [64, 100, 128, 192, 256, 320])
@pytest.mark.parametrize("mask", [None, torch.bool])
@pytest.mark.parametrize(("queries", "key_heads"), [(64, 8), (64, 2), (1, 2), (1, 8)])
def test_backend(
    kernels: CudaKernels, dtype: torch.dtype, width: int, mask: torch.dtype | None, queries: int, key_heads: int
) -> None:
    query, key = made(2, 8, queries, width, dtype=dtype), made(2, key_heads, 64, width, dtype=dtype)
    allowed = None if mask is None else torch.ones(2, 1, queries, 64, dtype=mask, device="cuda")
    version = torch.backends.cudnn.version() or CUDNN_VERSION
    expected = attention_backend(kernels, query, key, key, allowed, enable_gqa=key_heads < 8, cudnn_version=version)
    with torch.no_grad(), _Names() as log:
        out = F.scaled_dot_product_attention(query, key, key, allowed, enable_gqa=key_heads < 8)
    assert _OPERATORS[expected] in log.names
    fake = FakeTensorMode()
    with fake, torch.no_grad(), CudaAttention(kernels, cudnn_version=version):
        parts = [
            None if part is None else torch.empty(part.shape, dtype=part.dtype) for part in (query, key, key, allowed)
        ]
        pretended = F.scaled_dot_product_attention(*parts, enable_gqa=key_heads < 8)
    assert (pretended.shape, pretended.stride()) == (out.shape, out.stride())

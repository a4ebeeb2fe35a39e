"""Predicted scratch of CPU kernels against what the profiler sees this machine's allocator hand out."""

from __future__ import annotations

import os
import random
import secrets
import timeit
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # its usual name
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, LlamaConfig, ViTConfig

from kernel_scratch import Ran, operators_of, peak_of, threads
from planner import predict_memory
from planner.kernels.cpu import CpuKernels, common_type
from planner.lifetimes import OUTPUTS_ONLY, Scratch

aten = torch.ops.aten
Draw = Callable[[random.Random, torch.dtype], Callable[[], Any]]

FLOAT, HALF, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (FLOAT, BFLOAT16, HALF)
LENGTHS = (1, 2, 7, 16, 17, 32, 33, 64, 65, 100, 128, 197, 256, 300, 512)
DRAWS = 4


@pytest.fixture
def numbers() -> random.Random:
    """Return random numbers of a seed that a failure shows, and that LOADPLAN_SEED repeats."""
    seed = int(os.environ.get("LOADPLAN_SEED", secrets.randbelow(2**32)))
    print(f"LOADPLAN_SEED={seed}")
    return random.Random(seed)


def expanded(scratch: Scratch, made: tuple[int, ...]) -> list[int]:
    """Return a program's events, with `made` where the outputs are; what it does not free is freed last first."""
    events: list[int] = []
    live: dict[int, int] = {}
    taken = 0
    for step in scratch.program:
        if step > 0:
            taken += 1
            live[taken] = step
            events.append(step)
        elif step < 0:
            events.append(-live.pop(-step))
        else:
            events += [nbytes for nbytes in made if nbytes]
    return events + [-live[key] for key in sorted(live, reverse=True)]


def predicting(cpu: CpuKernels) -> Callable[[Any, Any, Any, Any], Any]:
    def note(func: Any, args: Any, kwargs: Any, outputs: Any) -> tuple[Scratch | None, str]:
        shapes = [(a.dtype, list(a.shape), a.stride()) if isinstance(a, torch.Tensor) else a for a in args]
        return cpu.scratch(func, args, kwargs, outputs), str(shapes)

    return note


def wrong(ran: list[Ran], unknown: set[str]) -> list[str]:
    """Return what differs between prediction and profiler; operators of `unknown` may be declared unknown."""
    found = []
    for one in ran:
        scratch, inputs = one.note
        if scratch is None:
            if one.name not in unknown:
                found.append(f"{one.name} {inputs}: not modelled, and took {one.events}")
            continue
        events = expanded(scratch, one.made)
        if sorted(events) != sorted(one.events) or peak_of(events) != peak_of(one.events):
            found.append(f"{one.name} {inputs}: predicted {events}, saw {list(one.events)}")
    return found


def check(call: Callable[[], Any], count: int, unknown: frozenset[str] = frozenset()) -> None:
    with threads(count), torch.no_grad():
        call()
        found = wrong(operators_of(call, predicting(CpuKernels.local())), set(unknown))
    assert not found, f"{count} threads: " + "\n".join(found)


def matrix(numbers: random.Random, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a matrix in one of the layouts that views give."""
    match numbers.randrange(5):
        case 0:
            return torch.randn(rows, columns).to(dtype)
        case 1:
            return torch.randn(columns, rows).to(dtype).t()
        case 2:
            return torch.randn(rows, columns + 5).to(dtype)[:, :columns]
        case 3:
            return torch.randn(columns, rows + 3).to(dtype)[:, :rows].t()
        case _:
            return torch.randn(rows, columns * 2).to(dtype)[:, ::2]


def batch(numbers: random.Random, items: int, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    match numbers.randrange(5):
        case 0:
            return torch.randn(items, rows, columns).to(dtype)
        case 1:
            return torch.randn(items, columns, rows).to(dtype).transpose(1, 2)
        case 2:
            return torch.randn(items, rows, columns + 3).to(dtype)[:, :, :columns]
        case 3:
            return torch.randn(rows, items, columns).to(dtype).transpose(0, 1)
        case _:
            return torch.randn(1, rows, columns).to(dtype).expand(items, rows, columns)


def sides(numbers: random.Random, most: int = 512) -> tuple[int, int, int]:
    rows, inner, columns = (min(most, numbers.choice(LENGTHS)) for _ in range(3))
    if numbers.random() < 0.3:
        rows = 1
    if numbers.random() < 0.3 and most >= 512:
        inner = numbers.choice((1024, 1100, 2048, 3000, 4096))
    return rows, inner, columns


def draw_mm(numbers: random.Random, dtype: torch.dtype) -> Callable[[], Any]:
    rows, inner, columns = sides(numbers)
    left, right = matrix(numbers, rows, inner, dtype), matrix(numbers, inner, columns, dtype)
    return lambda: aten.mm(left, right)


def draw_addmm(numbers: random.Random, dtype: torch.dtype) -> Callable[[], Any]:
    rows, inner, columns = sides(numbers)
    left, right = matrix(numbers, rows, inner, dtype), matrix(numbers, inner, columns, dtype)
    bias, alpha = torch.randn(columns).to(dtype), numbers.choice((1, 1, 0.5))
    return lambda: aten.addmm(bias, left, right, alpha=alpha)


def draw_tall(numbers: random.Random, dtype: torch.dtype) -> Callable[[], Any]:
    """Rows and inner dimension for which oneDNN copies the left matrix."""
    left = torch.randn(numbers.choice((1024, 1500)), 4096).to(dtype)
    right = torch.randn(numbers.choice((64, 100, 200)), 4096).to(dtype).t()
    return lambda: aten.mm(left, right)


def draw_bmm(numbers: random.Random, dtype: torch.dtype) -> Callable[[], Any]:
    items, (rows, inner, columns) = numbers.choice((1, 2, 3, 8)), sides(numbers, 200)
    left, right = batch(numbers, items, rows, inner, dtype), batch(numbers, items, inner, columns, dtype)
    return lambda: aten.bmm(left, right)


def draw_baddbmm(numbers: random.Random, dtype: torch.dtype) -> Callable[[], Any]:
    items, (rows, inner, columns) = numbers.choice((1, 2, 3, 8)), sides(numbers, 200)
    left, right = batch(numbers, items, rows, inner, dtype), batch(numbers, items, inner, columns, dtype)
    added, alpha = torch.randn(items, rows, columns).to(dtype), numbers.choice((1, 0.5))
    return lambda: aten.baddbmm(added, left, right, alpha=alpha)


def draw_attention(numbers: random.Random, dtype: torch.dtype) -> Callable[[], Any]:
    heads, width = numbers.choice((1, 2, 4, 8)), numbers.choice((8, 16, 33, 64, 80, 128))
    asked, known = numbers.choice((1, 5, 31, 33, 191, 192, 300, 767, 768)), numbers.choice((1, 7, 64, 511, 513, 900))
    query = torch.randn(2, asked, heads, width).to(dtype).transpose(1, 2)
    key = torch.randn(2, heads, known, width).to(dtype)
    mask = torch.zeros(2, 1, asked, known).to(dtype) if numbers.random() < 0.5 else None
    return lambda: aten._scaled_dot_product_flash_attention_for_cpu(query, key, key, attn_mask=mask)


def draw_convolution(numbers: random.Random, dtype: torch.dtype) -> Callable[[], Any]:
    """Any that is modelled; enough pixels that oneDNN gives every thread some."""
    dims = numbers.choice((1, 2, 2, 2, 3))
    inner, outer = numbers.choice((1, 3, 4, 8, 12, 16, 20, 64, 80)), numbers.choice((3, 8, 16, 30, 64, 128, 256))
    groups = 1
    if dims < 3 and numbers.random() < 0.3:
        inner, outer, groups = numbers.choice(((64, 64, 4), (64, 64, 64), (40, 40, 40)))
    side, step = numbers.choice((1, 1, 2, 3, 5, 7)), numbers.choice((1, 1, 2))
    spatial = [max(side, numbers.choice((14, 16, 28, 56) if dims == 2 else (8, 9)))] * dims
    if dims == 1:
        spatial = [numbers.choice((100, 300))]
    image = torch.randn(numbers.choice((2, 4)), inner, *spatial).to(dtype)
    if numbers.random() < 0.3:
        image = image.transpose(1, -1).contiguous().transpose(1, -1)
        image = image if dims == 1 else image.contiguous()
    weight = torch.randn(outer, inner // groups, *([side] * dims)).to(dtype)
    bias = torch.randn(outer).to(dtype) if numbers.random() < 0.5 else None
    pads = [numbers.choice((0, side // 2))] * dims
    return lambda: aten.convolution(image, weight, bias, [step] * dims, pads, [1] * dims, False, [0] * dims, groups)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "draw", [draw_mm, draw_addmm, draw_tall, draw_bmm, draw_baddbmm, draw_attention, draw_convolution]
)
def test_products_attention_and_convolution(draw: Draw, dtype: torch.dtype, count: int, numbers: random.Random) -> None:
    here = CpuKernels.local()
    known = here.isa == "AVX512" and here.brgemm_bf16
    if not known and (dtype is not FLOAT or draw is draw_convolution):
        compare_with_a_bound(draw(numbers, dtype), count)
        pytest.skip(f"{here}: oneDNN's blocks are not modelled there; compared with a bound")
    for _ in range(1 if draw is draw_tall else 2 * DRAWS):
        check(draw(numbers, dtype), count)


@pytest.mark.parametrize(
    ("items", "rows", "inner", "columns", "count"),
    [
        (1, 33, 1024, 164, 2),
        (1, 40, 64, 163, 2),
        (1, 55, 512, 257, 3),
        (2, 29, 1024, 36, 3),
        (2, 65, 1024, 106, 3),
        (1, 48, 512, 8, 3),
        (1, 89, 64, 51, 3),
    ],
)
def test_blocks_where_threads_divide_badly(items: int, rows: int, inner: int, columns: int, count: int) -> None:
    if not CpuKernels.local().brgemm_bf16:
        pytest.skip("oneDNN's blocks are not modelled here")
    left, right = torch.randn(items, rows, inner).bfloat16(), torch.randn(items, inner, columns).bfloat16()
    check(lambda: torch.bmm(left, right) if items > 1 else torch.mm(left[0], right[0]), count)


def test_grouped_products_follow_their_rows() -> None:
    """With real ends, group by group; with fake ones, at least what any ends take."""
    unmodelled = frozenset() if CpuKernels.local().brgemm_bf16 else frozenset({"aten._grouped_mm.default"})
    left, right = torch.randn(90, 64).bfloat16(), torch.randn(4, 64, 96).bfloat16()
    for ends in ([20, 21, 70, 90], [90, 90, 90, 90], [0, 0, 45, 90]):
        given = torch.tensor(ends, dtype=torch.int32)
        check(lambda given=given: aten._grouped_mm(left, right, given), 2, unmodelled)  # type: ignore[misc]
        real = CPU.scratch(aten._grouped_mm.default, (left, right, given), {}, [])
        with FakeTensorMode() as fake:
            most = CPU.scratch(aten._grouped_mm.default, (left, right, fake.from_tensor(given)), {}, [])
        assert real is not None
        assert most is not None
        assert max(real.program) <= max(most.program)


def compare_with_a_bound(call: Callable[[], Any], count: int) -> None:
    """Where blocks are unknown: what is known to be taken is there, and 4 MiB a thread and 4 times the rest suffice."""
    with threads(count), torch.no_grad():
        call()
        for one in operators_of(call, predicting(CpuKernels.local())):
            scratch, _ = one.note
            taken = peak_of(one.events)
            if scratch is not None:
                assert taken == peak_of(expanded(scratch, one.made)), one
            assert taken <= count * 4 * 2**20 + 64 * sum(one.made), one


def pointwise_calls(numbers: random.Random, dtype: torch.dtype) -> list[Callable[[], Any]]:
    """Return calls of element-wise operators, with numbers, with tensors without dimensions, and of mixed types."""
    rows, columns = numbers.randint(1, 90), numbers.randint(2, 90)
    x, y = torch.randn(rows, columns).to(dtype), torch.randn(rows, columns)
    whole, scalar = torch.arange(rows * columns).view(rows, columns), torch.tensor(1.5)
    narrow, flags, row = whole.int(), whole % 2 == 0, torch.ones(columns, dtype=torch.int64)
    return [
        lambda: (x * 2.0, x * 2, 1 - x, x / 3, x > 0.5, x == 1, x % 3.0, x // 3.0, x**2, x**0.5, 2.0**x, 1 / x),
        lambda: (whole * 2, whole + 1.5, whole / 3, whole // 3, whole % 3, whole > 0, 1 - whole, whole & 1, whole**2),
        lambda: (x * scalar, x * y, x + flags, x * row, x > y, y - x, torch.maximum(x, scalar), scalar * whole),
        lambda: (narrow + 1, narrow + whole, whole / whole, torch.pow(scalar, narrow), flags & flags, narrow * 0.5),
        lambda: (whole.cos(), whole.sqrt(), whole.sigmoid(), x.exp(), x.rsqrt(), x.isinf(), whole.isinf(), x.abs()),
        lambda: (x.clone().add_(1.0), x.clone().mul_(y), y.clone().add_(x), x.clone().div_(3), x.clone().sub_(scalar)),
        lambda: (torch.where(flags, x, y), torch.where(flags, x, scalar), y.masked_fill(flags, 0)),
        lambda: torch.where(flags, x, 0.0),
        lambda: (torch.addcmul(x, x, x), torch.lerp(x, x, 0.5), x.clamp(min=0), torch.clamp(x, min=scalar, max=scalar)),
        lambda: (F.gelu(x), F.silu(x), F.softplus(x), F.relu(x), x.tanh(), -x, x.erf(), x.log(), ~flags),
    ]  # fmt: skip


def reduction_calls(numbers: random.Random, dtype: torch.dtype) -> list[Callable[[], Any]]:
    x = torch.randn(3, numbers.randint(2, 90), numbers.randint(2, 90)).to(dtype)
    whole, flags = torch.arange(240).view(3, 80), x > 0
    weights, bins = torch.rand(numbers.randint(1, 4), numbers.randint(2, 500)), numbers.randint(2, 40)
    return [
        lambda: (x.mean(-1), x.mean(), x.mean((-1, -2)), x.mean(-1, dtype=torch.float32), x.mean(0, keepdim=True)),
        lambda: (x.sum(-1), x.sum(), x.sum(-1, dtype=torch.float32), flags.sum(), flags.sum(-1), whole.sum()),
        lambda: (x.cumsum(-1), flags.cumsum(-1), whole.cumsum(-1), x.prod(-1), x.var(-1), x.std(0)),
        lambda: (x.amax(-1), x.argmax(-1), x.max(), x.max(-1), flags.any(), flags.all(-1), x.logsumexp(-1)),
        lambda: (x.topk(2), x.sort(), x.sort(0), whole.sort(descending=True), whole.argsort()),
        lambda: x[0, 0].sort(stable=True),
        lambda: (torch.linalg.vector_norm(x, dim=-1), x.kthvalue(2), x.median(-1), torch.isin(x, x.flatten()[:3])),
        lambda: (torch.histc(weights, bins, 0, 1), torch.multinomial(weights, 1)),
        lambda: (torch.multinomial(weights, 2, replacement=True), torch.multinomial(weights, 2)),
        lambda: (aten._softmax(x, -1, False), aten._softmax(x, 0, False), aten._log_softmax(x, -1, False)),
    ]  # fmt: skip


def layout_calls(numbers: random.Random, dtype: torch.dtype) -> list[Callable[[], Any]]:
    rows, columns = numbers.randint(1, 130), numbers.randint(1, 130)
    x, turned = torch.randn(rows, columns).to(dtype), torch.randn(columns, rows).to(dtype).t()
    channels = numbers.choice((2, 8, 17))
    side, target = numbers.choice((8, 16, 30)), numbers.choice((20, 64, 65, 90))
    image = torch.randn(2, channels, side, side).to(dtype)
    last, ones = image.contiguous(memory_format=torch.channels_last), torch.ones(channels).to(dtype)
    size = (target, target)
    flags, places = torch.randn(rows, columns) > 0, torch.randint(0, rows, (7,))
    moved = torch.randint(0, rows, (3, 5))
    return [
        lambda: (x.clone(), turned.clone(), turned.contiguous(), turned.reshape(-1), x.t().contiguous(), x.double()),
        lambda: (torch.empty(rows, columns, dtype=dtype).copy_(turned), turned.to(torch.float64), x.to(torch.bfloat16)),
        lambda: (aten._softmax(turned, -1, False), F.layer_norm(turned, (columns,)), F.layer_norm(x, (columns,))),
        lambda: (F.embedding(moved, x), F.embedding(moved.t(), x), F.embedding(places.expand(2, 7), x)),
        lambda: (x.repeat(2, 2), x.repeat(2, 1, 3), torch.cat([x, x]), torch.stack([x, x]), turned.repeat(1, 2)),
        lambda: (F.batch_norm(image, ones, ones), F.batch_norm(last, ones, ones), F.group_norm(image, 1)),
        lambda: (F.interpolate(image, size), F.interpolate(last, size), F.interpolate(image, size, mode="bilinear")),
        lambda: (F.interpolate(image[0], target), F.interpolate(image, size, mode="bicubic")),
        lambda: (F.max_pool2d(image, 2), F.avg_pool2d(image, 2), F.adaptive_avg_pool2d(image, 1)),
        lambda: (x[places], x[flags], x[flags[:, 0]], x.index_select(0, places), x.gather(0, moved[:1, :1])),
        lambda: (x.index_add(0, places, x[places]), x.index_add(1, places[:1] * 0, x[:, :1])),
        lambda: (x.scatter(0, moved[:1, :1], 1.0), x.clone().index_put_((places,), x[places]), x.masked_fill(flags, 0)),
    ]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("calls", [pointwise_calls, reduction_calls, layout_calls])
def test_other_operators(
    calls: Callable[[random.Random, torch.dtype], list[Callable[[], Any]]],
    dtype: torch.dtype,
    count: int,
    numbers: random.Random,
) -> None:
    for _ in range(DRAWS // 2):
        for call in calls(numbers, dtype):
            check(call, count)


SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
TOKENS: dict[str, Any] = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": None}
MODELS: dict[str, Callable[[torch.dtype], Callable[[], Any]]] = {}


def _decoder(config: Any) -> Callable[[torch.dtype], Callable[[], Any]]:
    def make(dtype: torch.dtype) -> Callable[[], Any]:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        ids = torch.randint(3, 320, (2, 17))
        return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)

    return make


def _images(dtype: torch.dtype) -> Callable[[], Any]:
    model: Any = AutoModel.from_config(ViTConfig(**SHAPE, image_size=64, patch_size=16), dtype=dtype).eval()
    pixels = torch.randn(2, 3, 64, 64).to(dtype)
    return lambda: model(pixel_values=pixels)


MODELS["llama"] = _decoder(LlamaConfig(**SHAPE, **TOKENS, num_key_value_heads=2))
MODELS["gpt2"] = _decoder(GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=None))
MODELS["vit"] = _images


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT16])
@pytest.mark.parametrize("name", MODELS)
def test_every_operator_of_a_model(name: str, dtype: torch.dtype, count: int) -> None:
    here = CpuKernels.local()
    unknown = frozenset() if here.brgemm_bf16 else frozenset({"aten.mm.default", "aten.convolution.default"})
    torch.manual_seed(0)
    check(MODELS[name](dtype), count, unknown)


CPU = CpuKernels(threads=2, isa="AVX512", flags=frozenset({"avx512_bf16"}))


def test_shapes_alone_are_read() -> None:
    with FakeTensorMode():
        left, right = torch.empty(300, 4096, dtype=BFLOAT16), torch.empty(64, 4096, dtype=BFLOAT16)
        product = torch.mm(left, right.t())
        assert CPU.scratch(aten.mm.default, (left, right.t()), {}, [product]) != OUTPUTS_ONLY
        assert CPU.scratch(aten.mul.Tensor, (left, 2.0), {}, [left]) == Scratch(program=(8, 2, 0))
        assert CPU.scratch(aten.mul.Tensor, (left, left), None, [left]) is OUTPUTS_ONLY


def test_what_is_not_known_is_declared() -> None:
    left = torch.empty(64, 64, dtype=BFLOAT16)
    amx = CpuKernels(threads=2, isa="AVX512", flags=frozenset({"avx512_bf16", "amx_tile"}))
    plain = CpuKernels(threads=2, isa="AVX512")
    older = CpuKernels(threads=2, isa="AVX2")
    call: tuple[Any, ...] = (aten.mm.default, (left, left), {}, [left])
    assert CPU.scratch(*call) == Scratch(program=(0, 2 * (640 + 8192 + 4 * 64 * 32) + 3 * 128))
    assert amx.scratch(*call) is None
    assert plain.scratch(*call) is None
    assert older.scratch(*call) is OUTPUTS_ONLY
    image, kernel = torch.empty(2, 8, 16, 16), torch.empty(8, 8, 2, 2)
    args = (image, kernel, None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1)
    assert CPU.scratch(aten.convolution.default, args, {}, [image]) is None


def test_common_type_is_torchs() -> None:
    kinds = [torch.bool, torch.uint8, torch.int32, torch.int64, HALF, BFLOAT16, FLOAT, torch.float64]
    tensors = [torch.ones(shape, dtype=kind) for kind in kinds for shape in ((2,), ())]
    operands: list[Any] = [*tensors, True, 3, 1.5]
    for left in operands:
        for right in operands:
            assert common_type([left, right]) == torch.result_type(left, right), (left, right)


def test_an_operator_without_scratch_is_decided_at_once() -> None:
    x = torch.empty(4, 4)
    once = min(timeit.repeat(lambda: CPU.scratch(aten.silu.default, (x,), {}, [x]), number=1000, repeat=5)) / 1000
    assert once < 10e-6


class Decomposes(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(x) + x.median(1)[0].unsqueeze(1)


def test_what_is_not_modelled_is_named() -> None:
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    assert predict_memory(attention, (x, x, x)).unmodelled == ("aten._native_multi_head_attention.default",)
    found = predict_memory(Decomposes(), (torch.randn(2, 8, 8),)).unmodelled
    assert found == ("aten.linalg_inv_ex.default", "aten.median.dim")
    assert predict_memory(torch.nn.Linear(16, 3), (x,)).unmodelled == ()

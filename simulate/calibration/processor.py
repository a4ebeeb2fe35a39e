"""Products with weights that are read from memory, attention, and memory itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn import functional

from planner.hardware import MatmulRate
from simulate.calibration.figures import Figure, Meter

DTYPES = (torch.float32, torch.bfloat16)
ROWS = (1, 4, 16, 64, 256, 1024)
# Outputs of the products, whose inputs are as many as the one in the middle.
WIDTHS = (512, 2048, 8192)
INPUTS = 2048
# Outputs and inputs of the last token's: small and large vocabularies, and widths that are powers of two or not, for
# which rearranging weights is slower.
SLICE_WIDTHS = (16384, 49152)
SLICE_INPUTS = (768, 1024, 2048)
# Rows of attention; one row looks at a context as long as the longest.
ATTENTION_ROWS = (1, 64, 256, 1024)
_HEADS, _HEAD_DIM, _CONTEXT = 16, 64, 1024
# Where the operating system does not tell of caches.
_ASSUMED_CACHE_BYTES = 64 * 2**20
_MOST_ROTATED_BYTES = 2**30


def cache_bytes(root: Path = Path("/")) -> int:
    """Return the size of the largest cache of the CPU, or an assumed one."""
    sizes = []
    for path in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        unit = {"K": 2**10, "M": 2**20}.get(text[-1:], 0)
        if unit and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes, default=_ASSUMED_CACHE_BYTES)


def rotated(shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Iterator[torch.Tensor]:
    """Return weights without end, so many of them that none is in a cache when its turn comes again."""
    one = shape[0] * shape[1] * dtype.itemsize
    count = max(2, min(4 * cache_bytes(), _MOST_ROTATED_BYTES) // one)
    return itertools.cycle([torch.randn(shape, device=device).to(dtype) for _ in range(count)])


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


Measured = list[tuple[MatmulRate, Figure]]


def matmuls(
    meter: Meter,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    widths: tuple[int, ...] = WIDTHS,
    rows: tuple[int, ...] = ROWS,
    kinds: tuple[str, ...] = ("linear", "conv1d"),
    after: Callable[[], object] | None = None,
) -> Measured:
    """Return what products of `rows` with weights of `widths` outputs reach, by how the weights are kept."""
    found: Measured = []
    for kind, width in itertools.product(kinds, widths):
        weights = rotated((width, INPUTS) if kind == "linear" else (INPUTS, width), dtype, device)
        bias = torch.zeros(width, dtype=dtype, device=device)
        for count in rows:
            states = torch.randn(1, count, INPUTS, device=device).to(dtype)
            figure = meter.rate(
                f"{kind}, {name_of(dtype)}", f"{count} x {INPUTS} x {width}", "FLOP/s",
                _product(kind, states, weights, bias), 2.0 * count * INPUTS * width, after=after,
            )  # fmt: skip
            rate = MatmulRate(
                dtype=name_of(dtype), rows=count, flops_per_s=figure.value,
                kind="linear" if kind == "linear" else "conv1d", width=width,
            )  # fmt: skip
            found.append((rate, figure))
    return found


def _product(
    kind: str, states: torch.Tensor, weights: Iterator[torch.Tensor], bias: torch.Tensor
) -> Callable[[], torch.Tensor]:
    if kind == "linear":
        return lambda: functional.linear(states, next(weights))
    return lambda: torch.addmm(bias, states[0], next(weights))


def slices(
    meter: Meter, dtype: torch.dtype, *, widths: tuple[int, ...] = SLICE_WIDTHS, inputs: tuple[int, ...] = SLICE_INPUTS
) -> Measured:
    """Return what the product of a prompt's last token with a vocabulary's weights reaches."""
    found: Measured = []
    for width, each in itertools.product(widths, inputs):
        weights = torch.randn(width, each).to(dtype)
        states = torch.randn(1, 16, each).to(dtype)
        figure = meter.rate(
            f"last token, {name_of(dtype)}", f"1 x {each} x {width}", "FLOP/s",
            _product("linear", states[:, -1:], itertools.repeat(weights), weights), 2.0 * weights.numel(),
        )  # fmt: skip
        rate = MatmulRate(
            dtype=name_of(dtype), rows=1, flops_per_s=figure.value, kind="slice", width=width, inputs=each
        )
        found.append((rate, figure))
    return found


def attention(
    meter: Meter,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    rows: tuple[int, ...] = ATTENTION_ROWS,
    after: Callable[[], object] | None = None,
) -> Measured:
    """Return what attention reaches: of a prompt of so many rows, or of one row with a context."""
    found: Measured = []
    for count in rows:
        context = _CONTEXT if count == 1 else count
        query, key, value = (
            torch.randn(1, _HEADS, length, _HEAD_DIM, device=device).to(dtype) for length in (count, context, context)
        )

        def call(q: torch.Tensor = query, k: torch.Tensor = key, v: torch.Tensor = value) -> torch.Tensor:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)

        work = 4.0 * count * context * _HEADS * _HEAD_DIM
        figure = meter.rate(
            f"attention, {name_of(dtype)}", f"{count} rows, context {context}", "FLOP/s", call, work, after=after
        )
        rate = MatmulRate(dtype=name_of(dtype), rows=count, flops_per_s=figure.value, kind="attention")
        found.append((rate, figure))
    return found


def memory_read(meter: Meter) -> Figure:
    """Return what all cores read from memory: a matrix times a vector in float32."""
    weights = rotated((8192, INPUTS), torch.float32)
    vector = torch.randn(1, 1, INPUTS)
    return meter.rate("memory", "read", "B/s", lambda: functional.linear(vector, next(weights)), 8192.0 * INPUTS * 4)


def memory_copy(meter: Meter) -> Figure:
    """Return what copies from memory to memory reach, each byte counted once."""
    nbytes = max(64 * 2**20, 2 * cache_bytes())
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8)
    return meter.rate("memory", "copy", "B/s", lambda: target.copy_(source), float(nbytes))

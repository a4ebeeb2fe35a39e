"""Lower precisions that a weight group may be stored in: how many bytes it then has, and what quality that may cost."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import replace

from planner.errors import InputError
from planner.graph import LayerGraph, WeightGroup
from planner.rules import Sensitivity

# Bits of an element, and (elements, bytes) of what each scale serves; 0 elements: a row. As bitsandbytes stores them:
# LLM.int8() has one float32 for a row, NF4 one float32 for 64 elements (no double quantisation).
_FORMATS: dict[str, tuple[int, int, int]] = {"int8": (8, 0, 4), "nf4": (4, 64, 4)}
PRECISIONS = tuple(_FORMATS)
_FLOATS = ("bfloat16", "float16", "float32")

# Losses in percent of perplexity where all weights of the kind are stored so. Of the size that is published for
# models of 7 to 70 billion parameters (LLM.int8(): none that can be measured; 4-bit NormalFloat: 1 to 3 % in all);
# a table measured on the model itself replaces it (--sensitivity).
DEFAULT_SENSITIVITY = (
    Sensitivity(groups=r".*(expert).*", dtype="int8", loss=0.05),
    Sensitivity(groups=r".*(expert).*", dtype="nf4", loss=1.0),
    Sensitivity(groups=r".*(attn|attention).*", dtype="int8", loss=0.05),
    Sensitivity(groups=r".*(attn|attention).*", dtype="nf4", loss=0.8),
    Sensitivity(groups=r".*", dtype="int8", loss=0.1),
    Sensitivity(groups=r".*", dtype="nf4", loss=1.5),
)


@functools.lru_cache(maxsize=4096)
def stored_as(group: WeightGroup, dtype: str | None) -> WeightGroup:
    """Return the group with the bytes that it has in a precision; matrices are converted, and nothing else.

    Raises:
        InputError: no such precision.
    """
    if dtype is None:
        return group
    if dtype not in _FORMATS:
        raise InputError(f"no precision is called {dtype!r}; there are {', '.join(PRECISIONS)}")
    bits, block, scale_bytes = _FORMATS[dtype]
    tensors = []
    for tensor in group.tensors:
        shape = tensor.shape[1:] if group.slices > 1 else tensor.shape
        if tensor.buffer or tensor.dtype not in _FLOATS or len(shape) < 2:
            tensors.append(tensor)
            continue
        elements = tensor.elements // group.slices
        scales = -(-elements // block) if block else shape[0]
        nbytes = group.slices * (-(-elements * bits // 8) + scales * scale_bytes)
        tensors.append(replace(tensor, dtype=dtype, nbytes=nbytes, stored=None))
    return replace(group, tensors=tuple(tensors))


def can_be(group: WeightGroup, dtype: str) -> bool:
    """Tell whether anything of a group is smaller in a precision; only what may be streamed is converted at all."""
    return group.streamable and stored_as(group, dtype).nbytes < group.nbytes


def losses(graph: LayerGraph, dtype: str, table: Sequence[Sensitivity]) -> dict[tuple[int, str], float]:
    """Return {(kind, group): loss of storing the group of one layer of that kind in `dtype`}.

    A group belongs to the first row that matches "kind name.group name"; a row's loss is shared by parameters. Tied
    tensors are one storage, which keeps the model's own precision.
    """
    rows = [row for row in (table or DEFAULT_SENSITIVITY) if row.dtype == dtype]
    counts = [0] * len(graph.kinds)
    for layer in graph.layers:
        counts[layer.kind] += 1
    tied = {name for names in graph.ties for name in names}
    is_tied = {(graph.layers[index].kind, group.name) for index, group, name, _ in graph.tensors() if name in tied}
    row_of: dict[tuple[int, str], int] = {}
    elements: dict[tuple[int, str], int] = {}
    totals = [0] * len(rows)
    for index, kind in enumerate(graph.kinds):
        for group in kind.groups:
            name = f"{kind.name}.{group.name}"
            number = next((i for i, row in enumerate(rows) if re.fullmatch(row.groups, name)), None)
            if number is None or not counts[index] or (index, group.name) in is_tied or not can_be(group, dtype):
                continue
            row_of[index, group.name] = number
            elements[index, group.name] = sum(tensor.elements for tensor in group.tensors)
            totals[number] += elements[index, group.name] * counts[index]
    return {key: rows[number].loss * elements[key] / totals[number] for key, number in row_of.items()}

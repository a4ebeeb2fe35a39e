"""Measured rates (`Device.matmuls`) → the time that a layer computes on a calibrated device.

On a CPU operators run one after another, so a layer takes the sum of: its products with weights, each at the rate
measured for its rows and width; its attention; what its operators on activations read and write; and what the framework
takes for each operator. On a GPU the host runs ahead, so the framework's share is hidden behind the rest, or hides it.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence
from typing import Any

from planner.graph import LayerKind, Span, Tensor, WeightGroup
from planner.hardware import Device, MatmulRate


def measured_ns(kind: LayerKind, span: Span, device: Device, *, tokens: int, dtype: str) -> int:
    """Return the time one layer computes on a device whose `matmuls` were measured, in ns.

    tokens: of the whole batch in this pass. Rows of a product follow from the layer's FLOPs: fewer than `tokens` where
    only each prompt's last one is looked at.
    """
    rate = functools.partial(flops_per_s, device, dtype=dtype)
    matrices = [tensor for group in kind.groups if group.slices == 1 for tensor in group.tensors if _is_matrix(tensor)]
    elements = sum(tensor.elements for tensor in matrices)
    experts = [group for group in kind.groups if group.slices > 1]
    routed = sum(_expert_flops(group, tokens) for group in experts)
    dense = max(0, span.flops - routed)
    rows = min(tokens, dense // (2 * elements)) if elements else 0
    seconds = 0.0
    operators = float(span.operators)
    if rows and len(matrices) == 1 and rows < tokens:
        outputs, inputs = matrices[0].shape
        seconds += 2 * elements * rows / rate("slice", rows=rows, width=outputs, inputs=inputs)
    elif rows:
        layout = "conv1d" if _is_transposed(kind) else "linear"
        second = -1 if layout == "conv1d" else 0
        seconds += sum(2 * m.elements * rows / rate(layout, rows=rows, width=m.shape[second]) for m in matrices)
    for group in experts:
        used = group.expected_slices(tokens)
        each = tokens * group.used_slices / used
        stacked = [tensor for tensor in group.tensors if len(tensor.shape) == 3]
        seconds += sum(
            2 * tensor.elements / group.slices * used * each / rate("linear", rows=each, width=tensor.shape[1])
            for tensor in stacked
        )
        # One operator that the trace sees runs a product for each expert, also for those that have no rows.
        operators += len(stacked) * (group.slices - 1)
    attention = dense - 2 * rows * elements
    if attention:
        seconds += attention / rate("attention", rows=tokens, width=None)
    weights = sum(tensor.nbytes for group in kind.groups if group.slices == 1 for tensor in group.tensors)
    others = span.moved_bytes - (weights if dense else 0) - (span.kv_after_bytes if attention else 0)
    seconds += max(0, others) / (device.activation_bytes_per_s or device.bytes_per_s)
    overhead = operators * device.operator_ns
    if device.kind == "cpu":
        return int(seconds * 1e9 + overhead)
    return int(max(seconds * 1e9, overhead))


def flops_per_s(
    device: Device, kind: str, *, dtype: str, rows: float, width: int | None, inputs: int | None = None
) -> float:
    """Return the rate measured, between measured rows, widths and inputs interpolated in their logarithms.

    Beyond the first and last it stays as it is there. What was not measured of a kind is a "linear"; of a dtype, the
    device's `flops_per_s`.
    """
    return _rates_of(device).flops_per_s(kind, dtype, rows, width, inputs) or device.flops_for(dtype)


class _Rates:
    """The measured rates of one device as nested tables, {log inputs: {log width: {log rows: log rate}}}."""

    def __init__(self, matmuls: tuple[MatmulRate, ...]):
        self.matmuls = matmuls
        self.tables: dict[tuple[str, str], dict[float, Any]] = {}
        self.known: dict[tuple[Any, ...], float] = {}
        for each in matmuls:
            sizes = [math.log(each.inputs or 1), math.log(each.width or 1), math.log(each.rows)]
            by_width = self.tables.setdefault((each.kind, each.dtype), {}).setdefault(sizes[0], {})
            by_width.setdefault(sizes[1], {})[sizes[2]] = math.log(each.flops_per_s)

    def flops_per_s(self, kind: str, dtype: str, rows: float, width: int | None, inputs: int | None) -> float | None:
        """Return the rate of a kind, or of a linear; None where the dtype was not measured."""
        key = kind, dtype, rows, width, inputs
        if key not in self.known:
            table = self.tables.get((kind, dtype)) or self.tables.get(("linear", dtype))
            if table is None:
                return None
            at = [math.log(max(size or 1, 1)) for size in (inputs, width, rows)]
            self.known[key] = math.exp(_interpolated(table, at))
        return self.known[key]


# By identity: to hash a hundred rates takes longer than to look one up. They hold what they are of, so that no other
# can have its number.
_known: dict[int, _Rates] = {}
_MOST_KNOWN = 64


def _rates_of(device: Device) -> _Rates:
    number = id(device.matmuls)
    if number not in _known:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[number] = _Rates(device.matmuls)
    return _known[number]


def _interpolated(table: dict[float, Any], at: Sequence[float]) -> float:
    """Return the value of nested tables at so many coordinates, linear between the entries of each."""
    first, *others = at
    points = [(x, _interpolated(y, others) if others else y) for x, y in sorted(table.items())]
    return _between(points, first)


def _between(points: Sequence[tuple[float, float]], at: float) -> float:
    """Return the value at `at` of the line through `points`, which are in order; flat before and after them."""
    after = bisect.bisect_left([x for x, _ in points], at)
    if after == 0 or after == len(points):
        return points[min(after, len(points) - 1)][1]
    (x, y), (end_x, end_y) = points[after - 1], points[after]
    return y + (end_y - y) * (at - x) / (end_x - x)


def _expert_flops(group: WeightGroup, tokens: int) -> int:
    elements = sum(tensor.elements for tensor in group.tensors if len(tensor.shape) == 3)
    return 2 * tokens * group.used_slices * elements // group.slices


def _is_matrix(tensor: Tensor) -> bool:
    return len(tensor.shape) == 2 and not tensor.buffer


def _is_transposed(kind: LayerKind) -> bool:
    """Tell whether the layer's matrices are (inputs, outputs): their biases are as long as the second dimension."""
    tensors = {tensor.name: tensor for group in kind.groups for tensor in group.tensors}
    return any(_ends_with(tensor, -1, tensors) and not _ends_with(tensor, 0, tensors) for tensor in tensors.values())


def _ends_with(matrix: Tensor, dimension: int, tensors: dict[str, Tensor]) -> bool:
    bias = tensors.get(f"{matrix.name.removesuffix('weight')}bias")
    return (
        _is_matrix(matrix) and matrix.name.endswith("weight") and bias is not None
        and bias.shape == (matrix.shape[dimension],)
    )  # fmt: skip

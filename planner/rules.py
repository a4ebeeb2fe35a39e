"""What the user asks of a placement beyond the capacities of the memories: what it must do, and what it may choose."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field
from typing import Literal

from planner.errors import InputError
from planner.graph import LayerGraph
from planner.hardware import Hardware
from planner.serial import OMITTED

# Precisions that weights may wait in besides the model's own.
DTYPES = ("int8", "nf4")
# What may be lost where a choice of precisions is allowed and nothing else is said, in the unit of the bundled table.
DEFAULT_QUALITY_BUDGET = 1.0
# Names of layers that a message lists.
_LISTED = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Layers whose whole name `layers` (a regular expression) matches run on `device`."""

    layers: str
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What is lost when all weights whose group's path `groups` (a regular expression) matches are stored in `dtype`.

    loss: in the unit of the table; of some of those weights, in proportion to their parameters.
    """

    groups: str
    dtype: str
    loss: float

    def __post_init__(self) -> None:
        try:
            re.compile(self.groups)
        except re.error as exc:
            raise InputError(f"a sensitivity of {self.groups!r}: not a regular expression ({exc})") from exc
        _check_dtype(self.dtype)
        if not (self.loss >= 0 and math.isfinite(self.loss)):
            raise InputError(f"a sensitivity of {self.groups!r}: a loss of {self.loss}; it must be a number from 0 up")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Constraints, and permissions to choose.

    pins: layers that must run on a device.
    never_on_disk: nothing waits on disk. never_across_nodes: all layers run in one node.
    contiguous: each device runs one stretch of the layers' order.
    cpu_experts: experts that wait in host memory may be computed there, where that is faster than copying them.
    dtypes: precisions that weight groups may be stored in besides the model's own ("int8", "nf4"); none: no choice.
    caches: KV caches that may be taken instead of the workload's own; none: no choice.
    prefill_chunks: chunks of the prompt that may be taken instead of the workload's own (None: all at once).
    quality_budget: the most that the chosen precisions may lose, in the unit of the sensitivity table.
    sensitivity: replaces the bundled table, where any is given.
    time_limit_s: the search ends after so long with the best it has; None: only by its own deterministic limits.
    """

    pins: tuple[Pin, ...] = ()
    never_on_disk: bool = False
    never_across_nodes: bool = False
    contiguous: bool = False
    cpu_experts: bool = True
    dtypes: tuple[str, ...] = ()
    caches: tuple[Literal["dynamic", "static", "fp8", "offloaded"], ...] = ()
    prefill_chunks: tuple[int | None, ...] = field(default=(), metadata=OMITTED)
    quality_budget: float = 0.0
    sensitivity: tuple[Sensitivity, ...] = ()
    time_limit_s: float | None = None

    def __post_init__(self) -> None:
        for pin in self.pins:
            try:
                re.compile(pin.layers)
            except re.error as exc:
                raise InputError(f"--pin {pin.layers}={pin.device}: not a regular expression ({exc})") from exc
        for dtype in self.dtypes:
            _check_dtype(dtype)
        if self.time_limit_s is not None and not self.time_limit_s > 0:
            raise InputError(f"a time limit of {self.time_limit_s} s: it must be more than nothing")
        if not (self.quality_budget >= 0 and math.isfinite(self.quality_budget)):
            raise InputError(f"a quality budget of {self.quality_budget}: it must be a number, and not negative")

    def pinned_to(self, layer: str) -> str | None:
        """Return the device that a layer is pinned to; of several pins that match, the last."""
        return next((pin.device for pin in reversed(self.pins) if re.fullmatch(pin.layers, layer)), None)

    def check(self, graph: LayerGraph, hardware: Hardware) -> None:
        """Raise InputError where a pin names no device of `hardware`, or no layer of `graph`, or pins to two nodes."""
        layers = [layer.name for layer in graph.layers]
        devices = [device.name for device in hardware.devices]
        for pin in self.pins:
            said = f"--pin {pin.layers}={pin.device}"
            if pin.device not in devices:
                raise InputError(f"{said}: no layer can run on {pin.device!r}; there are {', '.join(devices)}")
            if not any(re.fullmatch(pin.layers, name) for name in layers):
                raise InputError(f"{said}: no layer's whole name matches; {_examples(pin.layers, layers)}")
        nodes = sorted({hardware.node(device) for name in layers if (device := self.pinned_to(name)) is not None})
        if self.never_across_nodes and len(nodes) > 1:
            raise InputError(f"--one-node, and --pin to {' and '.join(nodes)}: all layers can run in one node only")


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise InputError(f"weights stored in {dtype!r} are not carried; there are {', '.join(DTYPES)}")


def _examples(wanted: str, names: list[str]) -> str:
    """Return names of layers in words: the likest first, and the last, since ends are called otherwise."""
    close = difflib.get_close_matches(wanted.replace("\\", ""), names, n=3, cutoff=0.6)
    listed = list(dict.fromkeys([*close, *names[: _LISTED - 1 - len(close)], names[-1]]))
    more = f" (of {len(names)})" if len(names) > len(listed) else ""
    return f"there are {', '.join(repr(name) for name in listed)}{more}"


NO_RULES = Rules()

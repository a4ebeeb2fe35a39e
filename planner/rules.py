"""What the user asks of a placement beyond the capacities of the memories: what it must do, and what it may choose."""

from __future__ import annotations

import re
from dataclasses import dataclass

from planner.errors import InputError


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Constraints, and permissions to choose.

    pins: layers that must run on a device.
    never_on_disk: nothing waits on disk. never_across_nodes: all layers run in one node.
    contiguous: each device runs one stretch of the layers' order.
    cpu_experts: experts that wait in host memory may be computed there, where that is faster than copying them.
    dtypes: precisions that weight groups may be stored in besides the model's own ("int8", "nf4"); none: no choice.
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
    quality_budget: float = 0.0
    sensitivity: tuple[Sensitivity, ...] = ()
    time_limit_s: float | None = None

    def __post_init__(self) -> None:
        for pin in self.pins:
            try:
                re.compile(pin.layers)
            except re.error as exc:
                raise InputError(f"--pin {pin.layers}={pin.device}: not a regular expression ({exc})") from exc
        if self.time_limit_s is not None and not self.time_limit_s > 0:
            raise InputError(f"a time limit of {self.time_limit_s} s: it must be more than nothing")
        if self.quality_budget < 0:
            raise InputError(f"a quality budget of {self.quality_budget}: it must not be negative")

    def pinned_to(self, layer: str) -> str | None:
        """Return the device that a layer is pinned to; of several pins that match, the last."""
        return next((pin.device for pin in reversed(self.pins) if re.fullmatch(pin.layers, layer)), None)


NO_RULES = Rules()

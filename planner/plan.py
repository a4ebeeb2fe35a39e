"""The Plan: where every weight waits, where every layer runs, and what that will cost. The one artefact that crosses
machines; its canonical JSON has no times of day in it, and the same finished question gives the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from planner.errors import PlanFormatError
from planner.graph import LayerGraph
from planner.hardware import Hardware
from planner.rules import Rules
from planner.serial import OMITTED, canonical, decode, encode, read_text, write_text
from planner.workload import Workload

if TYPE_CHECKING:
    from planner.check import Check
    from planner.coarse_map import CoarseMap
    from planner.measurement import Measurement

SCHEMA_VERSION = 2
KINDS_OF_MEMORY = ("weights", "kv_cache", "activations", "slots", "workspace", "context")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Which model the Plan is for, and what built it.

    config_digest: SHA-256 of the canonical JSON of its config; None for a module given as such.
    loaded: it was given with its weights in memory, and not on meta; loading is predicted for that.
    stored_bytes: of the checkpoint's tensors, as its headers say; None where these were not read.
    """

    id: str
    source: Literal["local", "hub", "catalogue", "config", "module", "graph"]
    note: str
    revision: str | None
    config_digest: str | None
    weight_dtype: str
    num_parameters: int
    weight_bytes: int
    versions: dict[str, str]
    loaded: bool = False
    stored_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """The implementations that were traced; dispatch enforces them. None for models that have no choice of one.

    unmodelled: operators whose kernels' scratch is not modelled.
    """

    attention: str | None
    experts: str | None
    unmodelled: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One weight group of one layer.

    home: where it waits; run_on: where its layer computes. Equal: resident. Else it is streamed through a slot.
    memory: what kind of memory the home is.
    nbytes: of the group in the precision it has here.
    resident_slices: of a group with slices (experts), how many stay on `run_on`: the first of its layer's ranking in
        the graph, or without one those of the lowest numbers; the rest wait at `home`. None without slices.
    cpu_up_to_tokens: slices that wait in host memory are computed there, by the CPU, in passes of at most so many
        tokens over all rows, and copied in longer ones; 0: always copied.
    dtype: the precision that the group is stored in ("int8", "nf4"); None: the model's own.
    """

    layer: str
    group: str
    home: str
    memory: Literal["device", "pinned", "pageable", "disk"]
    run_on: str
    nbytes: int
    resident_slices: int | None
    cpu_up_to_tokens: int = 0
    dtype: Literal["int8", "nf4"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """Static buffers on `device` that streamed weights pass through, each of `slot_bytes`.

    holds: whole groups, which are prefetched in their known order, or single experts, which a router asks for.
    """

    device: str
    count: int
    slot_bytes: int
    holds: Literal["groups", "experts"] = "groups"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the run will take.

    peak_bytes: per memory, device-used bytes: everything below, context included.
    peak_breakdown: the same by kind of memory; each kind at its own greatest, so their sum is the peak.
    counters: per device, predictions named by the counter they are tested against. "operator_outputs": bytes of tensors
        that operators made (cache and activations), the caller's own inputs apart; "requested_by_operators": these with
        kernels' scratch, an upper bound on several devices; on GPUs "tensors": with weights and slots, "reserved" by
        the caching allocator, and "device_used" with the context.
    load_peak_bytes: per memory but the disk, the most while `dispatch.apply` loads (see `planner.loading`): bytes
        requested on the host, device-used on GPUs.
    prefill_ns_range, decode_ns_range: from and to, where rates were measured with a spread: all of them higher by it,
        and all lower.
    """

    peak_bytes: dict[str, int]
    peak_breakdown: dict[str, dict[str, int]]
    counters: dict[str, dict[str, int]]
    prefill_ns: int
    decode_ns_per_token: int
    total_ns: int
    tokens_per_s: float
    load_ns: int
    load_peak_bytes: dict[str, int]
    prefill_ns_range: tuple[int, ...] = field(default=(), metadata=OMITTED)
    decode_ns_range: tuple[int, ...] = field(default=(), metadata=OMITTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Solver:
    """What is proven. `bound_ns` is a lower bound on the cost of any placement under the cost model named.

    objective_bytes, bound_bytes: of memory, where the objective is to need the least ("fit").
    cut_short: what ended the search before its own limits did.
    """

    status: Literal["optimal", "feasible"]
    objective_ns: int
    bound_ns: int
    cost_model: str
    objective_bytes: int | None = None
    bound_bytes: int | None = None
    cut_short: Literal["no", "time limit", "interrupt"] = "no"

    @property
    def gap(self) -> float:
        """Return how far the objective may be above the best, as a fraction of it."""
        if self.objective_bytes is not None and self.bound_bytes is not None:
            return (self.objective_bytes - self.bound_bytes) / self.objective_bytes if self.objective_bytes else 0.0
        return (self.objective_ns - self.bound_ns) / self.objective_ns if self.objective_ns else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    schema_version: int
    model: ModelInfo
    graph: LayerGraph
    hardware: Hardware
    workload: Workload
    rules: Rules
    execution: Execution
    assumptions: tuple[str, ...]
    placements: tuple[Placement, ...]
    slots: tuple[Slots, ...]
    prediction: Prediction | None
    solver: Solver | None

    def run_on(self) -> tuple[str, ...]:
        """Return the device of every layer of the graph, in order."""
        devices = {placement.layer: placement.run_on for placement in self.placements}
        return tuple(devices[layer.name] for layer in self.graph.layers)

    def slots_on(self, device: str, holds: str) -> Slots | None:
        return next((slots for slots in self.slots if (slots.device, slots.holds) == (device, holds)), None)

    def check(self, measurement: Measurement) -> Check:
        """Return what was predicted beside what `dispatch.measure` found: which prediction is off, and by how much."""
        # What compares plans with measurements imports this module.
        from planner.check import compare

        return compare(self, measurement)

    def device_map(self) -> CoarseMap:
        """Return the nearest device map that Accelerate can run under the same capacities, for
        `from_pretrained(device_map=...)`; its `.lost` says what of this plan it cannot.

        Raises:
            InputError: no such map has room, or the machine has several nodes.
        """
        # What coarsens plans imports this module.
        from planner.coarse_map import coarsened

        return coarsened(self)

    def to_json(self) -> str:
        """Return the canonical JSON of this plan, ending in a newline."""
        return canonical(self)

    def save(self, path: str | Path) -> None:
        """Write the plan to `path`, all or nothing.

        Raises:
            InputError: the path cannot be written; what was there before is still there.
        """
        write_text(path, self.to_json())

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan back.

        Raises:
            PlanFormatError: not JSON, not a plan, or of a schema version that is not known.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as exc:
            raise PlanFormatError(f"not a plan: line {exc.lineno} is not JSON ({exc.msg})") from exc
        except RecursionError as exc:
            raise PlanFormatError("not a plan: brackets are nested too deeply") from exc
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise PlanFormatError(f"schema_version is {version!r}; this release reads {SCHEMA_VERSION}: plan again")
        plan = decode(cls, data)
        plan.graph.check()
        known = {layer.name for layer in plan.graph.layers}
        placed = {placement.layer for placement in plan.placements}
        if placed != known:
            odd = sorted(placed ^ known)[0]
            raise PlanFormatError(f"placements and graph disagree about layer {odd!r}")
        return plan

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a file.

        Raises:
            InputError: the file cannot be read. PlanFormatError: it is not a plan.
        """
        return cls.from_json(read_text(path, what="plan"))

    def as_dict(self) -> dict[str, Any]:
        return dict(encode(self))

"""How many bytes a placement takes on every device: the sum that the planner constrains, and the peak over time.

`planned_bytes` is separable (each kind at its own greatest), so that it can be a linear constraint; it is never
below `peak`, which follows the passes layer by layer. Both count device-used bytes, in whole allocations.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from planner.graph import SLAB_ALIGNMENT_BYTES, LayerGraph, Span, WeightGroup
from planner.hardware import Device, Hardware
from planner.holdings import most_held
from planner.host_cache import host_bytes, is_on_host
from planner.plan import Placement, Slots
from planner.precision import stored_as
from planner.units import MIB, round_up

Memory = Literal["device", "pinned", "pageable", "disk"]

# c10/core/AllocatorConfig.h: an allocation of 10 MiB or more gets a segment of its own, rounded up to 2 MiB.
_OWN_SEGMENT_BYTES = 10 * MIB
_SEGMENT_BYTES = 2 * MIB
_ROUND_BYTES = 512
# Smaller ones share segments of 20 MiB (above 1 MiB) and 2 MiB: of weights, one of each kind is begun and not full.
ALLOCATOR_BYTES = 22 * MIB
# One slot is computed with while the next group is copied into the other.
SLOT_COUNT = 2
# Slots of whole groups that the planner may choose from; a single one lets nothing overlap, and takes half the memory.
# A third would hide one more copy of a pass; the memory saves as much by keeping one more group.
SLOT_COUNTS = (1, 2)


def allocation_bytes(nbytes: int, device: Device) -> int:
    """Return what one allocation of `nbytes` takes on `device`; on the CPU, exactly that."""
    if device.kind == "cpu" or nbytes == 0:
        return nbytes
    return round_up(nbytes, _SEGMENT_BYTES if nbytes >= _OWN_SEGMENT_BYTES else _ROUND_BYTES)


def fixed_bytes(graph: LayerGraph, device: Device) -> tuple[int, int]:
    """Return (context, workspace) bytes that a device takes as soon as anything runs on it.

    The workspace is the matmul library's, and what the caching allocator holds beyond what is asked of it.
    """
    extra = max(graph.allocator_bytes, ALLOCATOR_BYTES) if device.kind != "cpu" else 0
    return device.context_bytes, device.workspace_bytes + extra


def resident_bytes(group: WeightGroup, slices: int, device: Device) -> int:
    """Return what `slices` of a group's slices take on `device`, each in a slab of its own."""
    return slices * allocation_bytes(group.slice_slab_bytes, device)


def activation_bytes(graph: LayerGraph) -> tuple[int, ...]:
    """Return for every layer the most bytes of activations around any layer of its kind, in any pass.

    A model's first block may hold less than the others; counting them alike keeps alike layers exchangeable.
    """
    most = [0] * len(graph.kinds)
    for entry in graph.passes:
        for layer, span in zip(graph.layers, entry.per_layer(), strict=True):
            most[layer.kind] = max(most[layer.kind], span.requested_bytes)
    return tuple(most[layer.kind] for layer in graph.layers)


def kv_bytes(spans: Sequence[Span]) -> int:
    """Return a layer's cache at the longest context, from its spans in the order of passes."""
    return max(span.kv_after_bytes for span in spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Bytes of one device or pool by kind of memory."""

    weights: int = 0
    kv_cache: int = 0
    activations: int = 0
    slots: int = 0
    workspace: int = 0
    context: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations + self.slots + self.workspace + self.context

    def by_kind(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


def needed_slots(
    graph: LayerGraph,
    hardware: Hardware,
    placements: Sequence[Placement],
    *,
    single: Collection[str] = (),
) -> tuple[Slots, ...]:
    """Return the slots that a placement needs: on each device that streams, two of its largest streamed group, and
    two of its largest streamed expert.

    single: devices that make do with one slot for whole groups.
    """
    largest: dict[tuple[str, Literal["groups", "experts"]], int] = {}
    # A graph that was not traced has no passes, and no experts by themselves.
    longest = max((entry.tokens * graph.batch_size for entry in graph.passes), default=1)
    for placement, group in with_groups(graph, placements):
        until = placement.cpu_up_to_tokens
        if waiting_slices(placement, group) and through_slot(
            hardware, group, placement.run_on, placement.memory, tokens=longest, cpu_up_to_tokens=until
        ):
            key = (placement.run_on, slot_kind(group))
            largest[key] = max(largest.get(key, 0), group.slice_slab_bytes)
    return tuple(
        Slots(
            device=device.name,
            count=1 if holds == "groups" and device.name in single else SLOT_COUNT,
            slot_bytes=nbytes,
            holds=holds,
        )
        for device in hardware.devices
        for (name, holds), nbytes in sorted(largest.items(), reverse=True)
        if name == device.name
    )


def through_slot(
    hardware: Hardware, group: WeightGroup, device: str, memory: Memory, *, tokens: int, cpu_up_to_tokens: int = 0
) -> bool:
    """Tell whether slices of a group that wait in a memory pass through a slot of the device that runs them, in a pass
    of so many tokens over all rows: not what is mapped, nor experts that the CPU computes where they wait.
    """
    if is_mapped(hardware, group, device, memory):
        return False
    return memory == "disk" or tokens > cpu_up_to_tokens


def is_mapped(hardware: Hardware, group: WeightGroup, device: str, memory: Memory) -> bool:
    """Tell whether a device computes with waiting slices straight from the mapped file: the CPU with whole groups, and
    with experts that the file holds as they are used.
    """
    on_cpu = device == hardware.host(device)
    return on_cpu and memory == "disk" and (group.slices == 1 or group.is_mappable)


def slot_kind(group: WeightGroup) -> Literal["groups", "experts"]:
    """Return which slots of a device a group passes through."""
    return "experts" if group.slices > 1 else "groups"


def with_groups(graph: LayerGraph, placements: Iterable[Placement]) -> Iterable[tuple[Placement, WeightGroup]]:
    """Yield each placement with the group of the graph that it places, in the precision it has there."""
    kinds = {layer.name: {group.name: group for group in graph.kinds[layer.kind].groups} for layer in graph.layers}
    for placement in placements:
        yield placement, stored_as(kinds[placement.layer][placement.group], placement.dtype)


def waiting_slices(placement: Placement, group: WeightGroup) -> int:
    """Return how many slices wait at `home`, away from the device that computes."""
    if placement.home == placement.run_on:
        return 0
    return group.slices - (placement.resident_slices or 0)


def static_usage(
    graph: LayerGraph, hardware: Hardware, placements: Sequence[Placement], slots: Sequence[Slots]
) -> dict[str, Usage]:
    """Return what each memory ("disk" too) holds through the whole run: weights, slots, workspace, context."""
    weights: dict[str, int] = {pool.name: 0 for pool in hardware.pools}
    tied = _tied_bytes(graph, hardware, placements)
    staged: set[tuple[str, str]] = set()
    for placement, group in with_groups(graph, placements):
        device = hardware.device(placement.run_on)
        waiting = waiting_slices(placement, group)
        weights[placement.run_on] += resident_bytes(group, group.slices - waiting, device)
        is_on_disk = placement.home == hardware.disk(placement.run_on)
        each = group.slice_stored_bytes if is_on_disk else group.slice_slab_bytes
        weights[placement.home] += each * waiting
        if is_on_disk and waiting and device.kind != "cpu":
            staged.add((device.name, slot_kind(group)))
    for name, saved in tied.items():
        weights[name] -= saved
    slot_bytes: dict[str, int] = {}
    for entry in slots:
        nbytes = entry.count * allocation_bytes(entry.slot_bytes, hardware.device(entry.device))
        slot_bytes[entry.device] = slot_bytes.get(entry.device, 0) + nbytes
        if (entry.device, entry.holds) in staged:
            host = hardware.host(entry.device)
            slot_bytes[host] = slot_bytes.get(host, 0) + nbytes
    used = {placement.run_on for placement in placements}
    result = {}
    for name, nbytes in weights.items():
        context, workspace = fixed_bytes(graph, hardware.device(name)) if name in used else (0, 0)
        result[name] = Usage(
            weights=nbytes,
            slots=slot_bytes.get(name, 0),
            context=context,
            workspace=workspace,
        )
    first = placements[0].run_on
    loose = sum(tensor.nbytes for tensor in graph.loose)
    result[first] = _with(result[first], weights=result[first].weights + loose)
    return result


def pinned_bytes(
    graph: LayerGraph, hardware: Hardware, placements: Sequence[Placement], slots: Sequence[Slots]
) -> dict[str, int]:
    """Return the memory of each host that is pinned: what waits there for GPUs, and what comes from disk through it."""
    pinned = {device.name: 0 for device in hardware.hosts}
    staged: set[tuple[str, str]] = set()
    for placement, group in with_groups(graph, placements):
        slices = waiting_slices(placement, group)
        if slices == 0 or hardware.device(placement.run_on).kind == "cpu":
            continue
        if placement.memory == "pinned":
            pinned[placement.home] += slices * group.slice_slab_bytes
        elif placement.memory == "disk":
            staged.add((placement.run_on, slot_kind(group)))
    if is_on_host(graph):
        spans = zip(*(entry.per_layer() for entry in graph.passes), strict=True)
        for device, found in zip(_devices(graph, placements), spans, strict=True):
            pinned[hardware.host(device)] += host_bytes(found)
    for entry in slots:
        if (entry.device, entry.holds) in staged:
            nbytes = entry.count * allocation_bytes(entry.slot_bytes, hardware.device(entry.device))
            pinned[hardware.host(entry.device)] += nbytes
    return pinned


def planned_bytes(
    graph: LayerGraph, hardware: Hardware, placements: Sequence[Placement], slots: Sequence[Slots]
) -> dict[str, Usage]:
    """Return the bytes that are planned for on every memory: static ones, every layer's longest cache, and the most
    activations around any layer of a kind that runs there. This is what must not exceed the usable capacity.
    """
    result = static_usage(graph, hardware, placements, slots)
    per_pass = [entry.per_layer() for entry in graph.passes]
    held = activation_bytes(graph)
    for index, device in enumerate(_devices(graph, placements)):
        spans = [spans[index] for spans in per_pass]
        usage = result[device]
        result[device] = _with(
            usage,
            kv_cache=usage.kv_cache + kv_bytes(spans),
            activations=max(usage.activations, held[index]),
        )
        host = hardware.host(device)
        result[host] = _with(result[host], kv_cache=result[host].kv_cache + host_bytes(spans))
    return result


def peak(
    graph: LayerGraph, hardware: Hardware, placements: Sequence[Placement], slots: Sequence[Slots]
) -> dict[str, Usage]:
    """Return each memory's use at the instant when it is greatest, following every pass layer by layer.

    A layer's activations are counted where it runs while it runs; what the caller holds is counted there too, which
    is exact with one device and an upper bound with several.
    """
    static = static_usage(graph, hardware, placements, slots)
    best = dict(static)
    devices = _devices(graph, placements)
    for entry in graph.passes:
        spans = entry.per_layer()
        cached: dict[str, int] = dict.fromkeys(static, 0)
        for device, span in zip(devices, spans, strict=True):
            cached[device] += span.kv_before_bytes
            cached[hardware.host(device)] += span.kv_host_bytes
        for host in {hardware.host(device) for device in devices if cached[hardware.host(device)]}:
            usage = _with(static[host], kv_cache=cached[host])
            best[host] = max(best[host], usage, key=lambda each: each.total)
        for device, span in zip(devices, spans, strict=True):
            usage = _with(static[device], kv_cache=cached[device], activations=span.requested_bytes)
            if usage.total > best[device].total:
                best[device] = usage
            cached[device] += span.kv_after_bytes - span.kv_before_bytes
    return best


def operator_outputs(
    graph: LayerGraph, placements: Sequence[Placement], *, with_scratch: bool = False
) -> dict[str, int]:
    """Return per device the most bytes alive in tensors that operators made (cache and activations, no weights).

    with_scratch: count what kernels take beside them too; over several devices, an upper bound.
    """
    devices = _devices(graph, placements)
    best: dict[str, int] = dict.fromkeys(devices, 0)
    for entry in graph.passes:
        spans = entry.per_layer()
        if entry.holdings and not with_scratch:
            cached_bytes = [(span.kv_before_bytes, span.kv_after_bytes) for span in spans]
            for device, nbytes in most_held(entry.holdings, entry.lasting, devices, cached_bytes).items():
                best[device] = max(best[device], nbytes)
            continue
        cached = dict.fromkeys(devices, 0)
        for device, span in zip(devices, spans, strict=True):
            cached[device] += span.kv_before_bytes
        for device, span in zip(devices, spans, strict=True):
            scratch = span.scratch_bytes if with_scratch else 0
            best[device] = max(best[device], cached[device] + span.held_bytes + span.peak_bytes + scratch)
            cached[device] += span.kv_after_bytes - span.kv_before_bytes
    return best


def _devices(graph: LayerGraph, placements: Sequence[Placement]) -> list[str]:
    by_layer = {placement.layer: placement.run_on for placement in placements}
    return [by_layer[layer.name] for layer in graph.layers]


def _tied_bytes(graph: LayerGraph, hardware: Hardware, placements: Sequence[Placement]) -> dict[str, int]:
    """Return the bytes to take off each memory because tied tensors that wait there are stored once."""
    if not graph.ties:
        return {}
    homes = {(placement.layer, placement.group): placement.home for placement in placements}
    sizes: dict[str, tuple[str, int]] = {}
    for index, group, name, tensor in graph.tensors():
        home, nbytes = homes[graph.layers[index].name, group.name], round_up(tensor.nbytes, SLAB_ALIGNMENT_BYTES)
        is_stored = tensor.stored is not None and home == hardware.disk(home)
        sizes[name] = (home, tensor.stored_bytes if is_stored else nbytes)
    saved: dict[str, int] = {}
    for names in graph.ties:
        seen: set[str] = set()
        for name in names:
            if name not in sizes:
                continue
            home, nbytes = sizes[name]
            if home in seen:
                saved[home] = saved.get(home, 0) + nbytes
            seen.add(home)
    return saved


def _with(usage: Usage, **changes: int) -> Usage:
    return Usage(**{**usage.by_kind(), **changes})

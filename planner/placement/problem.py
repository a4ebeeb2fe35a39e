"""The placement problem as numbers: units of layers, what each takes and costs on each device.

Layers come in a chain: what stands before the first block (embeddings) is one unit, "front"; what stands after the
last (final norm and head) is another, "tail"; the blocks between are counted by class. Blocks are of one class when
they have the same weights and cost the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner import cost, memory
from planner.graph import SLAB_ALIGNMENT_BYTES, LayerGraph, WeightGroup
from planner.hardware import Device, Hardware
from planner.units import round_up
from planner.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCost:
    """One weight group of a class, or of one layer of the front or tail, on one device.

    layer: whose group it is; the first of a class stands for all.

    Of each slice that waits elsewhere: freed_bytes on the device, slab_bytes at its home, and by home and step
    copy_ns. prefetched: whether copies overlap with computing; needs_slot: whether they pass through slots.
    """

    layer: int
    group: WeightGroup
    freed_bytes: int
    slab_bytes: int
    copy_ns: dict[tuple[str, str], int]
    prefetched: bool
    needs_slot: bool

    @property
    def key(self) -> str:
        return f"{self.layer} {self.group.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitCost:
    """One layer of a class, or the front or tail, on one device. compute_ns: by step name."""

    compute_ns: dict[str, int]
    kv_bytes: int
    activation_bytes: int
    resident_bytes: int
    groups: tuple[GroupCost, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Layers that are decided together: indices of the front, of the tail, or of one class of blocks."""

    name: str
    layers: tuple[int, ...]
    on: dict[str, UnitCost]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """A tensor of the front that is one of the tail too; stored once where both of their groups wait in one place."""

    front_key: str
    tail_key: str
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """front and tail are placed whole; blocks are counted. times: how often each step happens.

    ties: what front and tail share.
    """

    graph: LayerGraph
    hardware: Hardware
    front: Unit | None
    tail: Unit | None
    blocks: tuple[Unit, ...]
    times: dict[str, int]
    hop_ns: dict[str, int]
    ties: tuple[Tie, ...]
    loose_bytes: int


def build(graph: LayerGraph, hardware: Hardware, workload: Workload) -> Problem:
    """Return the problem's numbers."""
    is_block = [any(group.streamable for group in graph.kind_of(i).groups) for i in range(len(graph.layers))]
    if True in is_block:
        first = is_block.index(True)
        last = len(is_block) - 1 - is_block[::-1].index(True)
    else:
        first, last = len(is_block), len(is_block) - 1
    steps = cost.steps_of(graph, workload)
    dtype = cost.weight_dtype(graph)
    maker = _Maker(graph, hardware, steps, dtype)
    front, tail = tuple(range(first)), tuple(range(last + 1, len(is_block)))
    classes: dict[object, list[int]] = {}
    for index in range(first, last + 1):
        classes.setdefault(maker.signature(index), []).append(index)
    return Problem(
        graph=graph,
        hardware=hardware,
        front=maker.end("front", front) if front else None,
        tail=maker.end("tail", tail) if tail else None,
        blocks=tuple(
            maker.block(f"{graph.kind_of(members[0]).name}#{number}", tuple(members))
            for number, members in enumerate(classes.values())
        ),
        times={step.name: step.times for step in steps},
        hop_ns={step.name: cost.step_hop_ns(graph, hardware, step) for step in steps},
        ties=_ties(graph, set(front), set(tail)),
        loose_bytes=sum(tensor.nbytes for tensor in graph.loose),
    )


def _ties(graph: LayerGraph, front: set[int], tail: set[int]) -> tuple[Tie, ...]:
    tied = graph.tied_to_earlier()
    where = {name: (index, group.name, tensor.nbytes) for index, group, name, tensor in graph.tensors()}
    found = []
    for later, earlier in tied.items():
        (index, group, nbytes), (first, first_group, _) = where[later], where[earlier]
        if first in front and index in tail:
            size = round_up(nbytes, SLAB_ALIGNMENT_BYTES)
            found.append(Tie(front_key=f"{first} {first_group}", tail_key=f"{index} {group}", nbytes=size))
    return tuple(found)


def likeness(hardware: Hardware, device: Device) -> object:
    """Return what makes two devices exchangeable: equal rates, capacity, and links to everything."""
    links = [(link.target if link.source == device.name else link.source, link.source == device.name, link)
             for link in hardware.links if device.name in (link.source, link.target)]  # fmt: skip
    kinds = {other.name: other.kind for other in hardware.devices}
    return (
        device.kind, device.product, tuple(sorted(device.flops_per_s.items())), device.bytes_per_s, device.operator_ns,
        device.context_bytes, device.workspace_bytes, hardware.pool(device.pool).usable_bytes,
        tuple(sorted((kinds.get(other, other), out, link.bytes_per_s, link.latency_ns) for other, out, link in links)),
    )  # fmt: skip


class _Maker:
    def __init__(self, graph: LayerGraph, hardware: Hardware, steps: tuple[cost.Step, ...], dtype: str):
        self.graph, self.hardware, self.steps, self.dtype = graph, hardware, steps, dtype
        self.held = memory.activation_bytes(graph)
        self.spans = [[entry.per_layer()[index] for entry in graph.passes] for index in range(len(graph.layers))]

    def signature(self, index: int) -> object:
        """Return what decides a block's class: its kind, and everything about its spans but what others hold."""
        return (
            self.graph.layers[index].kind,
            tuple(
                (
                    s.peak_bytes,
                    s.scratch_bytes,
                    s.kv_before_bytes,
                    s.kv_after_bytes,
                    s.flops,
                    s.moved_bytes,
                    s.operators,
                )
                for s in self.spans[index]
            ),
        )

    def block(self, name: str, members: tuple[int, ...]) -> Unit:
        on = {device.name: self._cost(members[:1], members, device, streams=True) for device in self.hardware.devices}
        return Unit(name=name, layers=members, on=on)

    def end(self, name: str, members: tuple[int, ...]) -> Unit:
        on = {
            device.name: self._cost(members, members, device, streams=device.kind == "cpu")
            for device in self.hardware.devices
        }
        return Unit(name=name, layers=members, on=on)

    def _cost(self, counted: tuple[int, ...], members: tuple[int, ...], device: Device, *, streams: bool) -> UnitCost:
        groups = [(index, group) for index in counted for group in self.graph.kind_of(index).groups]
        return UnitCost(
            compute_ns={
                step.name: sum(cost.step_compute_ns(self.graph, step, index, device, self.dtype) for index in counted)
                for step in self.steps
            },
            kv_bytes=sum(memory.kv_bytes(self.spans[index]) for index in counted),
            activation_bytes=max(self.held[index] for index in members),
            resident_bytes=sum(memory.resident_bytes(group, group.slices, device) for _, group in groups),
            groups=tuple(
                self._group(index, group, device)
                for index, group in groups
                if streams and self._may_wait(group, device)
            ),
        )

    def _may_wait(self, group: WeightGroup, device: Device) -> bool:
        """Tell whether a group may wait elsewhere; whole ones the CPU uses straight from the file, or not at all."""
        if device.kind == "cpu":
            return group.slices > 1 or group.is_mappable
        return group.streamable

    def _group(self, layer: int, group: WeightGroup, device: Device) -> GroupCost:
        homes = ["disk"] if device.kind == "cpu" else ["cpu", "disk"]
        return GroupCost(
            layer=layer,
            group=group,
            freed_bytes=memory.resident_bytes(group, 1, device),
            slab_bytes=group.slice_slab_bytes,
            copy_ns={
                (home, step.name): cost.slice_copy_ns(
                    self.hardware, group, home, device.name, tokens=step.tokens * self.graph.batch_size
                )
                for home in homes
                for step in self.steps
            },
            prefetched=cost.is_prefetched(group, device.name),
            needs_slot=device.kind != "cpu" or group.slices > 1,
        )

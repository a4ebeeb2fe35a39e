"""The placement problem as numbers: units of layers, what each takes and costs on each device.

Layers come in a chain: what stands before the first block (embeddings) is one unit, "front"; what stands after the
last (final norm and head) is another, "tail"; the blocks between are counted by class. Blocks are of one class when
they have the same weights and cost the same everywhere. A graph that is no chain has every layer named: a class of its
own, and neither front nor tail.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from planner import cost, memory, precision
from planner.errors import InputError
from planner.graph import SLAB_ALIGNMENT_BYTES, Bucket, LayerGraph, WeightGroup
from planner.hardware import Device, Hardware
from planner.host_cache import host_bytes, host_layers, is_on_host, is_prefetched
from planner.memory import Memory
from planner.rules import Rules
from planner.units import round_up
from planner.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What each of so many slices of one layer's group costs where it waits.

    serial_ns, lane_ns: by step, what it adds to the device's own time, and to its link's.
    beside_ns: by step, of a whole group's copy what it takes from a CPU that computes experts all the while; of such an
        expert what it takes longer where copies go on all the while. The device's own time and its link's
        grow by the lesser sum.
    """

    slices: int
    serial_ns: dict[str, int]
    lane_ns: dict[str, int]
    beside_ns: dict[str, int]

    @property
    def times(self) -> tuple[dict[str, int], ...]:
        return self.serial_ns, self.lane_ns, self.beside_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """One memory that slices of a group may wait in, for one device.

    nbytes: of a slice there. prices: of all slices, the least popular first, which are the cheapest in every step and
    wait first. needs_slot: they are copied, in some step, through a slot. cpu_up_to_tokens: see Placement.
    """

    place: str
    memory: Memory
    nbytes: int
    prices: tuple[Price, ...]
    needs_slot: bool
    cpu_up_to_tokens: int = 0

    @property
    def slices(self) -> int:
        return sum(price.slices for price in self.prices)

    @property
    def is_copied(self) -> bool:
        """Whether slices that wait there are copied or read, and not just computed with where they are."""
        return self.needs_slot or any(any(price.lane_ns.values()) for price in self.prices)

    @property
    def lane_ns(self) -> dict[str, int]:
        """Return what the first slice to wait adds to the link's time: of a whole group, all of it."""
        return self.prices[0].lane_ns

    def levels(self) -> list[tuple[int, Price]]:
        """Return how many slices of one layer have each price, the cheapest first; alike prices are one."""
        found: list[tuple[int, Price]] = []
        for price in self.prices:
            count, last = found[-1] if found else (0, None)
            if last is not None and last.times == price.times:
                found[-1] = (count + price.slices, last)
            else:
                found.append((price.slices, price))
        return found

    def serial_ns(self, step: str, waiting: int) -> int:
        """Return what so many waiting slices of one layer add to the device's own time."""
        total = 0
        for price in self.prices:
            total += min(waiting, price.slices) * price.serial_ns[step]
            waiting -= min(waiting, price.slices)
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One weight group of a class, or of one layer of the front or tail, in one precision on one device.

    layer: whose group it is; the first of a class stands for all. group: in that precision.
    freed_bytes: on the device, for each slice that waits elsewhere. prefetched: copies overlap with computing, and
    smallest_ns is the least such a copy takes. loss: of quality, for each layer's group in this precision.
    """

    layer: int
    group: WeightGroup
    dtype: str | None
    freed_bytes: int
    homes: tuple[Home, ...]
    prefetched: bool
    smallest_ns: int
    loss: int = 0

    @property
    def key(self) -> str:
        return f"{self.layer} {self.group.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitCost:
    """One layer of a class, or the front or tail, on one device. compute_ns: by step name; cache_ns: of the link, by
    copies of a cache from host memory, where it takes host_bytes.

    resident_bytes: of the groups that have no options; options: by group, its precisions.
    """

    compute_ns: dict[str, int]
    kv_bytes: int
    activation_bytes: int
    resident_bytes: int
    options: dict[str, tuple[Option, ...]]
    cache_ns: dict[str, int]
    host_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Layers that are decided together: indices of the front, of the tail, or of one class of blocks.

    on: its costs by device; devices that it may not run on are left out. is_whole: placed as one.
    """

    name: str
    layers: tuple[int, ...]
    on: dict[str, UnitCost]
    is_whole: bool

    @property
    def count(self) -> int:
        return 1 if self.is_whole else len(self.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """One tensor that several whole groups, each of a unit with one layer or placed as one, have under other names.

    members: (unit, group key); nbytes, stored_bytes: in memory and on disk.
    """

    members: tuple[tuple[str, str], ...]
    nbytes: int
    stored_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """named: every layer is a unit of its own, and edges are priced one by one. ties: between those units.

    alike: devices with the same number are exchangeable. broadcasts: (source, tensor) → bytes in prefill and in decode
    of what the front hands to every block; front_to_tail: of what it hands to the tail and to nothing else.
    """

    graph: LayerGraph
    hardware: Hardware
    workload: Workload
    rules: Rules
    dtype: str
    steps: tuple[cost.Step, ...]
    units: tuple[Unit, ...]
    named: bool
    ties: tuple[Tie, ...]
    loose_bytes: int
    quality_budget: int
    alike: dict[str, int]
    broadcasts: dict[tuple[int, str], tuple[int, int]]
    front_to_tail: dict[tuple[int, str], tuple[int, int]]
    _by_name: dict[str, Unit] = field(default_factory=dict)
    _by_layer: dict[int, Unit] = field(default_factory=dict)

    def interchangeable(self) -> list[list[str]]:
        """Return the devices in sets: to swap any two of one set changes nothing, links to each other device included.

        Layers that are counted are priced by classes of links: there, alike is enough, in one node.
        """
        sets: list[list[str]] = []
        for device in self.hardware.devices:
            for known in sets:
                if all(self._may_swap(device.name, other) for other in known):
                    known.append(device.name)
                    break
            else:
                sets.append([device.name])
        return sets

    def _may_swap(self, one: str, other: str) -> bool:
        if self.alike[one] != self.alike[other] or self.hardware.node(one) != self.hardware.node(other):
            return False
        if not self.named:
            return True
        if any(time.device in (one, other) for time in self.graph.measured):
            return False
        others = [device.name for device in self.hardware.devices if device.name not in (one, other)]
        ways = [((one, other), (other, one))]
        ways += [((one, name), (other, name)) for name in others] + [((name, one), (name, other)) for name in others]
        found = [(self.hardware.link(*first), self.hardware.link(*second)) for first, second in ways]
        return all((a.bytes_per_s, a.latency_ns) == (b.bytes_per_s, b.latency_ns) for a, b in found)

    @property
    def on_host(self) -> bool:
        """Whether caches wait in host memory."""
        return is_on_host(self.graph)

    @property
    def blocks(self) -> tuple[Unit, ...]:
        return tuple(unit for unit in self.units if not unit.is_whole)

    def unit(self, name: str) -> Unit | None:
        if not self._by_name:
            self._by_name.update({unit.name: unit for unit in self.units})
        return self._by_name.get(name)

    def has_blocks(self, unit: Unit) -> bool:
        """Tell whether a unit's layers may have something to stream."""
        return not unit.is_whole and cost.is_block(self.graph, unit.layers[0])

    def blocks_on(self, device: str, layers: Mapping[tuple[str, str], int]) -> int:
        """Return how many layers of those shared out to a device may have something to stream."""
        return sum(layers.get((unit.name, device), 0) for unit in self.units if self.has_blocks(unit))

    def apart_ns(self, device: str, step: str, layers: Mapping[tuple[str, str], int]) -> int:
        """Return what the others of them compute there."""
        return sum(
            unit.on[device].compute_ns[step] * layers.get((unit.name, device), 0)
            for unit in self.units
            if device in unit.on and not self.has_blocks(unit)
        )

    def cache_ns(self, device: str, step: str, layers: Mapping[tuple[str, str], int]) -> int:
        """Return how long copies of caches from host memory to a device keep its link busy."""
        return sum(
            unit.on[device].cache_ns[step] * layers.get((unit.name, device), 0)
            for unit in self.units
            if device in unit.on
        )

    def unit_of(self, index: int) -> Unit:
        """Return the unit of a layer."""
        if not self._by_layer:
            self._by_layer.update({layer: unit for unit in self.units for layer in unit.layers})
        return self._by_layer[index]

    def hop_bytes(self, *, prefill: bool) -> int | None:
        """Return what is handed on at least wherever the chain is cut; None where some cut hands on nothing."""
        count = len(self.graph.layers)
        first = len(self.front.layers) if self.front is not None else 0
        last = count - (len(self.tail.layers) if self.tail is not None else 0)
        handed = dict.fromkeys(range(max(first - 1, 0), min(last, count - 1)), -1)
        for edge in self.graph.edges:
            is_next = edge.target == edge.source + 1 and edge.source in handed
            if is_next and (edge.source, edge.tensor) not in self.broadcasts:
                nbytes = edge.prefill_bytes if prefill else edge.decode_bytes
                handed[edge.source] = max(handed[edge.source], nbytes)
        least = min(handed.values(), default=-1)
        return least if least >= 0 else None

    @property
    def front(self) -> Unit | None:
        return self.unit("front")

    @property
    def tail(self) -> Unit | None:
        return self.unit("tail")


# A chain of so many pieces is a chain still.
MOST_BREAKS = 3
# Losses of quality are counted in whole parts of so many to one.
LOSS_UNIT = 10**9


def build(
    graph: LayerGraph,
    hardware: Hardware,
    workload: Workload,
    rules: Rules,
    *,
    named: bool,
    devices: Sequence[str] | None = None,
) -> Problem:
    """Return the problem's numbers; `named`: every layer a unit of its own; `devices`: those that layers may run on.

    Raises:
        InputError: a rule names a device that does not exist, or no device is left for a layer.
    """
    maker = _Maker(graph, hardware, workload, rules, devices)
    first, last = (0, len(graph.layers) - 1) if named else _blocks(graph)
    front, tail = tuple(range(first)), tuple(range(last + 1, len(graph.layers)))
    classes: dict[object, list[int]] = {}
    for index in range(first, last + 1):
        classes.setdefault(index if named else maker.signature(index), []).append(index)
    units = [maker.unit("front", front, is_whole=True)] if front else []
    units += [
        maker.unit(f"{graph.kind_of(members[0]).name}#{number}", tuple(members), is_whole=False)
        for number, members in enumerate(classes.values())
    ]
    units += [maker.unit("tail", tail, is_whole=True)] if tail else []
    return Problem(
        graph=graph,
        hardware=hardware,
        workload=workload,
        rules=rules,
        dtype=maker.dtype,
        steps=maker.steps,
        units=tuple(units),
        named=named,
        ties=tuple(_ties(graph, units)),
        loose_bytes=sum(tensor.nbytes for tensor in graph.loose),
        quality_budget=int(rules.quality_budget * LOSS_UNIT),
        alike=_alike(graph, hardware, rules),
        broadcasts=_broadcasts(graph, front, range(first, last + 1)),
        front_to_tail=_front_to_tail(graph, front, tail),
    )


def _blocks(graph: LayerGraph) -> tuple[int, int]:
    """Return the first and the last layer that has weights which may wait elsewhere."""
    is_block = [cost.is_block(graph, index) for index in range(len(graph.layers))]
    if True not in is_block:
        return len(is_block), len(is_block) - 1
    return is_block.index(True), len(is_block) - 1 - is_block[::-1].index(True)


def is_chain(graph: LayerGraph) -> bool:
    """Tell whether layers follow each other, so that alike ones may be counted: each takes from the one before, but
    where a decoder begins, or the like.

    What skips layers besides must come from before the first block, or be small beside what is handed on; and no two
    blocks are tied.
    """
    first, last = _blocks(graph)
    if first > last:
        # Nothing may wait elsewhere: there are no blocks to count.
        return len(graph.layers) == 1
    tied = _tied_layers(graph)
    if len(tied & set(range(first, last + 1))) > 1:
        return False
    steps: dict[int, int] = {}
    for edge in graph.edges:
        if edge.target == edge.source + 1:
            steps[edge.source] = max(steps.get(edge.source, 0), edge.decode_bytes + edge.prefill_bytes)
    cuts = range(max(0, first - 1), min(last + 1, len(graph.layers) - 1))
    if sum(index not in steps for index in cuts) > MOST_BREAKS:
        return False
    least = min((steps[index] for index in cuts if index in steps), default=0)
    crossing: dict[int, int] = {}
    for edge in graph.edges:
        if edge.target > edge.source + 1 and edge.source >= first:
            crossing[edge.source] = max(crossing.get(edge.source, 0), edge.decode_bytes + edge.prefill_bytes)
        if not edge.may_cut and not (edge.target < first or edge.source > last):
            return False
    # One such tensor (an encoder's output) is paid once for each device; many are skips that bind layers together.
    return sum(crossing.values()) <= 2 * least


def _tied_layers(graph: LayerGraph) -> set[int]:
    names = {name for names in graph.ties for name in names}
    return {index for index, _, name, _ in graph.tensors() if name in names} if names else set()


def _ties(graph: LayerGraph, units: Sequence[Unit]) -> Iterable[Tie]:
    unit_of = {index: unit for unit in units for index in unit.layers if unit.is_whole or len(unit.layers) == 1}
    where = {name: (index, group, tensor) for index, group, name, tensor in graph.tensors()}
    for names in graph.ties:
        members = []
        for name in names:
            if name in where:
                index, group, tensor = where[name]
                if index in unit_of and group.slices == 1:
                    members.append((unit_of[index].name, f"{index} {group.name}"))
        if len(members) > 1:
            # One layer of a class has its group under one key: the first layer's.
            size = round_up(tensor.nbytes, SLAB_ALIGNMENT_BYTES)
            stored = tensor.stored_bytes if tensor.stored is not None else size
            yield Tie(members=tuple(members), nbytes=size, stored_bytes=stored)


def likeness(hardware: Hardware, device: Device, rules: Rules) -> object:
    """Return what makes two devices exchangeable: equal rates, capacity, and links to everything, and no pin."""
    links = [(link.target if link.source == device.name else link.source, link.source == device.name, link)
             for link in hardware.links if device.name in (link.source, link.target)]  # fmt: skip
    kinds = {other.name: other.kind for other in hardware.devices}
    pinned = device.name if any(pin.device == device.name for pin in rules.pins) else ""
    return (
        device.kind, device.product, tuple(sorted(device.flops_per_s.items())), device.bytes_per_s, device.operator_ns,
        device.context_bytes, device.workspace_bytes, hardware.pool(device.pool).usable_bytes, pinned,
        device.matmuls, device.activation_bytes_per_s,
        tuple(sorted((kinds.get(other, "disk"), out, link.bytes_per_s, link.latency_ns, link.lane or "")
                     for other, out, link in links)),
    )  # fmt: skip


def _alike(graph: LayerGraph, hardware: Hardware, rules: Rules) -> dict[str, int]:
    """Number the devices so that exchangeable ones, on which as much was measured, have the same."""
    measured: dict[str, list[tuple[int, int, int]]] = {}
    for time in graph.measured:
        measured.setdefault(time.device, []).append((time.layer, time.prefill_ns, time.decode_ns))
    numbers: dict[object, int] = {}
    found = {}
    for device in hardware.devices:
        # A cache in host memory comes up to one GPU beside its computing, and to the others in turn.
        apart = is_on_host(graph) and is_prefetched(hardware, device.name)
        key = (likeness(hardware, device, rules), tuple(sorted(measured.get(device.name, ()))), apart)
        found[device.name] = numbers.setdefault(key, len(numbers))
    return found


def _broadcasts(
    graph: LayerGraph, front: Sequence[int], blocks: Sequence[int]
) -> dict[tuple[int, str], tuple[int, int]]:
    targets: dict[tuple[int, str], dict[int, tuple[int, int]]] = {}
    for edge in graph.edges:
        if edge.source in front:
            to = targets.setdefault((edge.source, edge.tensor), {})
            to[edge.target] = (edge.prefill_bytes, edge.decode_bytes)
    return {
        key: (min(to[index][0] for index in blocks), min(to[index][1] for index in blocks))
        for key, to in targets.items()
        if len(blocks) > 1 and set(blocks) <= to.keys()
    }


def _front_to_tail(
    graph: LayerGraph, front: Sequence[int], tail: Sequence[int]
) -> dict[tuple[int, str], tuple[int, int]]:
    sizes: dict[tuple[int, str], tuple[int, int]] = {}
    others = set()
    for edge in graph.edges:
        if edge.source in front and edge.target not in front:
            key = (edge.source, edge.tensor)
            prefill, decode = sizes.get(key, (0, 0))
            sizes[key] = (max(prefill, edge.prefill_bytes), max(decode, edge.decode_bytes))
            if edge.target not in tail:
                others.add(key)
    chain = {(edge.source, edge.tensor) for edge in graph.edges if edge.target == edge.source + 1}
    return {key: nbytes for key, nbytes in sizes.items() if key not in others | chain}


class _Maker:
    def __init__(
        self,
        graph: LayerGraph,
        hardware: Hardware,
        workload: Workload,
        rules: Rules,
        devices: Sequence[str] | None = None,
    ):
        self.graph, self.hardware, self.rules = graph, hardware, rules
        self.devices = [device for device in hardware.devices if devices is None or device.name in devices]
        self.steps, self.dtype = cost.steps_of(graph, workload), cost.weight_dtype(graph)
        self.held = memory.activation_bytes(graph)
        self.on_host = host_layers(graph)
        self.tied = _tied_layers(graph)
        self.spans = list(zip(*(entry.per_layer() for entry in graph.passes), strict=True))
        self.losses = {dtype: precision.losses(graph, dtype, rules.sensitivity) for dtype in rules.dtypes}
        names = [device.name for device in hardware.devices]
        for pin in rules.pins:
            if pin.device not in names:
                raise InputError(
                    f"--pin {pin.layers}={pin.device}: there is no {pin.device}; there are {', '.join(names)}"
                )

    def signature(self, index: int) -> object:
        """Return what decides a block's class: its kind, and everything about its spans but what others hold."""
        spans = tuple(
            (
                s.peak_bytes,
                s.scratch_bytes,
                s.kv_before_bytes,
                s.kv_after_bytes,
                s.flops,
                s.moved_bytes,
                s.operators,
                s.kv_host_bytes,
                s.kv_down_bytes,
                s.kv_up_bytes,
            )
            for s in self.spans[index]
        )
        layer = self.graph.layers[index]
        measured = tuple(
            (time.device, time.prefill_ns, time.decode_ns) for time in self.graph.measured if time.layer == index
        )
        # A tie joins these very layers: one that has any is like no other.
        own = index if index in self.tied else None
        return layer.kind, spans, self.rules.pinned_to(layer.name), measured, own

    def unit(self, name: str, members: tuple[int, ...], *, is_whole: bool) -> Unit:
        pins = {self.rules.pinned_to(self.graph.layers[index].name) for index in members} - {None}
        if len(pins) > 1:
            names = ", ".join(self.graph.layers[index].name for index in members)
            raise InputError(f"{names} run on one device, and are pinned to {' and '.join(sorted(map(str, pins)))}")
        counted = members if is_whole else members[:1]
        on = {
            device.name: self._cost(counted, members, device, streams=not is_whole or device.kind == "cpu")
            for device in self.devices
            if (not pins or device.name in pins) and (device.kind != "cpu" or not self.on_host.intersection(members))
        }
        return Unit(name=name, layers=members, on=on, is_whole=is_whole)

    def _cost(self, counted: tuple[int, ...], members: tuple[int, ...], device: Device, *, streams: bool) -> UnitCost:
        options: dict[str, tuple[Option, ...]] = {}
        resident = 0
        for index in counted:
            for group in self.graph.kind_of(index).groups:
                found = self._choices(index, group, device) if streams else ()
                if found:
                    options[found[0].key] = found
                else:
                    resident += memory.resident_bytes(group, group.slices, device)
        copies = {
            step.name: [
                cost.cache_ns(self.hardware, step, index, device.name) if self.on_host else (0, 0) for index in counted
            ]
            for step in self.steps
        }
        return UnitCost(
            compute_ns={
                step.name: sum(cost.step_compute_ns(self.graph, step, index, device, self.dtype) for index in counted)
                + sum(waited for waited, _ in copies[step.name])
                for step in self.steps
            },
            cache_ns={name: sum(busy for _, busy in found) for name, found in copies.items()},
            host_bytes=sum(host_bytes(self.spans[index]) for index in counted),
            kv_bytes=sum(memory.kv_bytes(self.spans[index]) for index in counted),
            activation_bytes=max(self.held[index] for index in members),
            resident_bytes=resident,
            options=options,
        )

    def _choices(self, index: int, group: WeightGroup, device: Device) -> tuple[Option, ...]:
        """Return the precisions that a group may have on a device; none where it just stays there as it is."""
        found = []
        for dtype in (None, *self.rules.dtypes):
            loss = 0 if dtype is None else self.losses[dtype].get((self.graph.layers[index].kind, group.name))
            if loss is None:
                continue
            stored = precision.stored_as(group, dtype)
            homes = self._homes(stored, device, dtype)
            found.append(
                Option(
                    layer=index,
                    group=stored,
                    dtype=dtype,
                    freed_bytes=memory.resident_bytes(stored, 1, device),
                    homes=homes,
                    prefetched=cost.is_prefetched(group),
                    smallest_ns=cost.smallest_copy_ns(self.hardware, stored, device.name) if homes else 0,
                    loss=math.ceil(loss * LOSS_UNIT),
                )
            )
        return tuple(found) if len(found) > 1 or found[0].homes else ()

    def _homes(self, group: WeightGroup, device: Device, dtype: str | None) -> tuple[Home, ...]:
        """Return where slices of a group may wait; whole ones the CPU uses straight from the file, or not at all."""
        on_cpu = device.kind == "cpu"
        if not (group.slices > 1 or group.is_mappable if on_cpu else group.streamable):
            return ()
        host, found = self.hardware.host(device.name), []
        if not on_cpu:
            found.append(self._home(group, device, host, "pinned"))
            if self.hardware.pinned_limit_bytes is not None:
                found.append(self._home(group, device, host, "pageable"))
        # What is converted while it is loaded is not in the checkpoint's files.
        if not self.rules.never_on_disk and dtype is None:
            found.append(self._home(group, device, self.hardware.disk(device.name), "disk"))
        return tuple(found)

    def _home(self, group: WeightGroup, device: Device, place: str, kind: Memory) -> Home:
        tokens = {step.name: step.tokens * self.graph.batch_size for step in self.steps}
        until = 0
        if kind != "disk" and group.slices > 1 and self.rules.cpu_experts:
            until = self._cpu_up_to(group, device, place, kind, tokens)
        prefetched = cost.is_prefetched(group)
        by_rows = cost.reads_rows(self.hardware, group, device.name, kind)
        prices = []
        for bucket in group.from_least:
            serial, lane, beside = {}, {}, {}
            for name, now in tokens.items():
                beside[name] = cost.slows_ns(self.hardware, group, device.name) if prefetched else 0
                if now <= until:
                    lane[name], serial[name] = 0, self._computed(group, bucket, device, place, now)
                    beside[name] = self._computed(group, bucket, device, place, now, beside_copies=True) - serial[name]
                else:
                    taken = self._copied(group, bucket, device, place, kind, now)
                    lane[name], serial[name] = 0 if by_rows else taken, 0 if prefetched else taken
            prices.append(Price(slices=bucket.slices, serial_ns=serial, lane_ns=lane, beside_ns=beside))
        return Home(
            place=place,
            memory=kind,
            nbytes=cost.waiting_bytes(group, kind),
            prices=tuple(prices),
            needs_slot=memory.through_slot(
                self.hardware, group, device.name, kind, tokens=max(tokens.values()), cpu_up_to_tokens=until
            ),
            cpu_up_to_tokens=until,
        )

    def _copied(self, group: WeightGroup, bucket: Bucket, device: Device, place: str, kind: Memory, tokens: int) -> int:
        return cost.slice_copy_ns(self.hardware, group, bucket, place, device.name, kind, tokens=tokens)

    def _computed(
        self,
        group: WeightGroup,
        bucket: Bucket,
        device: Device,
        place: str,
        tokens: int,
        *,
        beside_copies: bool = False,
    ) -> int:
        return cost.slice_cpu_ns(
            self.hardware,
            group,
            bucket,
            place,
            device.name,
            tokens=tokens,
            dtype=self.dtype,
            beside_copies=beside_copies,
        )

    def _cpu_up_to(self, group: WeightGroup, device: Device, place: str, kind: Memory, tokens: dict[str, int]) -> int:
        """Return the number of tokens up to which computing on the CPU costs least, of 0 and each step's, all slices of
        the group taken together.
        """

        def total(until: int) -> int:
            return sum(
                step.weight
                * bucket.slices
                * (
                    self._computed(group, bucket, device, place, tokens[step.name])
                    if tokens[step.name] <= until
                    else self._copied(group, bucket, device, place, kind, tokens[step.name])
                )
                for step in self.steps
                for bucket in group.from_least
            )

        return min(sorted({0, *tokens.values()}), key=total)

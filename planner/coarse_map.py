"""A Plan → the device map nearest to it that Accelerate can run on the same machine, and what of the plan it loses.

Accelerate runs what waits on one device, the first GPU of its map, and brings it there module by module, unpinned and
without prefetching. So a layer on another GPU is there as a whole or waits as a whole; on the first one single groups
may wait. Each device has room for what stays there, the cache and the activations of the layers that run there, the
libraries' workspace, and on the first one the largest module that is brought.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from planner.device_map import merged
from planner.errors import InputError
from planner.graph import WeightGroup
from planner.hardware import Device
from planner.host_cache import is_on_host
from planner.memory import activation_bytes, allocation_bytes, fixed_bytes, kv_bytes, waiting_slices, with_groups
from planner.plan import Placement, Plan
from planner.units import format_bytes

Key = tuple[int, str]


class CoarseMap(dict[str, "int | str"]):
    """A device map as `from_pretrained(device_map=...)` takes it. lost: what of the plan is not in it, in words."""

    def __init__(self, places: Mapping[str, int | str], lost: Iterable[str] = ()):
        super().__init__(places)
        self.lost = tuple(lost)


def coarsened(plan: Plan) -> CoarseMap:
    """Return the device map of a plan: module → number of a GPU, "cpu" or "disk".

    Raises:
        InputError: the machine has several nodes, which Accelerate does not know; or no memory takes what waits.
    """
    if len(plan.hardware.nodes) > 1:
        raise InputError("a device map is for one machine, and this plan's has several nodes")
    gpus = [gpu.name for gpu in plan.hardware.gpus]
    used = set(plan.run_on())
    for main in (*(gpu for gpu in gpus if gpu in used), plan.hardware.hosts[0].name):
        state = _Coarse(plan, main)
        if state.settle():
            break
    else:
        raise InputError("no device map of this plan fits as Accelerate runs it: neither host memory nor disk has room")
    numbers = {name: number for number, name in enumerate(gpus)}
    places = merged({name: numbers.get(place, place) for name, place in state.tensor_places().items()})
    return CoarseMap(places, _lost(plan, state))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """A group of a layer as Accelerate sees it, in the model's own precision.

    bytes_on: what it takes on the main device ("device"), in host memory and on disk. largest_bytes: what the largest
    of its modules is brought of when it waits; left_bytes: buffers, which do not wait.
    """

    entry: Placement
    streamable: bool
    nbytes: int
    bytes_on: dict[str, int]
    largest_bytes: int
    left_bytes: int

    @classmethod
    def of(cls, entry: Placement, group: WeightGroup, device: Device) -> _Group:
        modules: dict[str, int] = {}
        for tensor in group.tensors:
            if not tensor.buffer:
                path = tensor.name.rpartition(".")[0]
                modules[path] = modules.get(path, 0) + allocation_bytes(tensor.nbytes, device)
        return cls(
            entry=entry,
            streamable=group.streamable,
            nbytes=group.nbytes,
            bytes_on={
                "device": sum(allocation_bytes(tensor.nbytes, device) for tensor in group.tensors),
                "host": group.nbytes,
                "disk": sum(tensor.stored_bytes for tensor in group.tensors),
            },
            largest_bytes=max(modules.values(), default=0),
            left_bytes=sum(allocation_bytes(tensor.nbytes, device) for tensor in group.tensors if tensor.buffer),
        )


class _Coarse:
    """Where each group is, changed until every memory has room. main: the device that runs what waits.

    units: layers that are on one GPU or wait together, by their first: one, or several that share a tensor.
    """

    def __init__(self, plan: Plan, main: str):
        self.plan, self.main, self.hardware = plan, main, plan.hardware
        self.host, self.disk = plan.hardware.host(main), plan.hardware.disk(main)
        gpus = [gpu.name for gpu in plan.hardware.gpus]
        self.gpus = gpus[gpus.index(main) :] if main in gpus else []
        self.waits = self.disk if main == self.host else self.host
        self.groups: dict[Key, _Group] = {}
        numbers = {layer.name: index for index, layer in enumerate(plan.graph.layers)}
        device = plan.hardware.device(main)
        for entry in plan.placements:
            layer = numbers[entry.layer]
            group = plan.graph.kind_of(layer).group(entry.group)
            self.groups[layer, entry.group] = _Group.of(entry, group, device)
        spans = [entry.per_layer() for entry in plan.graph.passes]
        self.kv = [kv_bytes([each[layer] for each in spans]) if spans else 0 for layer in range(len(numbers))]
        self.held = activation_bytes(plan.graph)
        self.ties = self._ties()
        self.unit_of = self._joined(len(numbers))
        self.units: dict[int, list[Key]] = {}
        for key in self.groups:
            self.units.setdefault(self.unit_of[key[0]], []).append(key)
        self.sources: dict[int, set[int]] = {unit: set() for unit in self.units}
        for edge in plan.graph.edges:
            self.sources[self.unit_of[edge.target]].add(self.unit_of[edge.source])
        self.place = {key: self._wished(group.entry) for key, group in self.groups.items()}
        self._repair()

    def settle(self) -> bool:
        """Make everything fit; tell whether it does, with the main device the first that keeps anything."""
        others = [gpu for gpu in self.gpus if gpu != self.main]
        for gpu in others:
            while self._is_over(gpu) and self._demote(gpu):
                pass
        self._relieve()
        for unit in self.units:
            self._promote(unit)
        self._repair()
        for unit in self.units:
            self._keep_on_main(unit)
        self._relieve()
        while self._is_over(self.host) and self._sink():
            pass
        first = next((gpu for gpu in self.gpus if gpu in self.place.values()), self.host)
        return first == self.main and not any(map(self._is_over, (*self.gpus, self.host, self.disk)))

    def run_on(self, layer: int) -> str:
        """Return the device of a layer: the GPU that keeps any of it, else the main one."""
        keys = self.units[self.unit_of[layer]]
        return next((self.place[key] for key in keys if self.place[key] in self.gpus), self.main)

    def tensor_places(self) -> dict[str, str]:
        graph = self.plan.graph
        found = {name: self.place[index, group.name] for index, group, name, _ in graph.tensors()}
        return found | {tensor.name: self.main for tensor in graph.loose}

    def waiting(self) -> list[Key]:
        return [key for key, place in self.place.items() if place != self.main and place not in self.gpus]

    def _ties(self) -> list[list[tuple[Key, int]]]:
        """Return of every tie between groups (key, bytes on the main device)."""
        graph = self.plan.graph
        device = self.hardware.device(self.main)
        found = {
            name: ((index, group.name), allocation_bytes(tensor.nbytes, device))
            for index, group, name, tensor in graph.tensors()
        }
        return [[found[name] for name in names if name in found] for names in graph.ties]

    def _joined(self, layers: int) -> list[int]:
        """Return the first layer that each shares a tensor with: itself, mostly."""
        first = list(range(layers))
        for tied in self.ties:
            together = {first[key[0]] for key, _ in tied}
            first = [min(together) if each in together else each for each in first]
        return first

    def _wished(self, entry: Placement) -> str:
        if entry.home == entry.run_on and entry.run_on in self.gpus:
            return entry.run_on
        return self.disk if entry.home == self.disk else self.host

    def _may_split(self, unit: int) -> bool:
        """Tell whether groups may wait while others stay: what a layer is given has to be on the main device before,
        for no hook moves it there; a tensor that several layers share is where both are.
        """
        keys = self.units[unit]
        return len({key[0] for key in keys}) == 1 and all(
            self.run_on(source) == self.main for source in self.sources[unit] - {unit}
        )

    def _repair(self) -> None:
        """Make units whole that may not be split: on the GPU of the first if none of them waits, else waiting."""
        for unit, keys in self.units.items():
            places = {self.place[key] for key in keys}
            if len(places & {self.host, self.disk}) == len(places):
                continue
            if len(places) > 1 and not (places <= {self.main, self.host, self.disk} and self._may_split(unit)):
                stays = places <= set(self.gpus)
                self._put(unit, self.place[keys[0]] if stays else self.waits)

    def _put(self, unit: int, place: str) -> None:
        for key in self.units[unit]:
            self.place[key] = place

    def _is_over(self, name: str) -> bool:
        pool = name if name == self.disk else self.hardware.device(name).pool
        return self._needed(name) > self.hardware.pool(pool).usable_bytes

    def _needed(self, name: str) -> int:
        """Return the bytes that a device, host memory or the disk needs; a tied tensor once."""
        kind = "disk" if name == self.disk else "host" if name == self.host else "device"
        total = sum(self.groups[key].bytes_on[kind] for key, place in self.place.items() if place == name)
        for tied in self.ties:
            there = [nbytes for key, nbytes in tied if self.place[key] == name]
            total -= sum(there) - max(there, default=0)
        if kind == "disk":
            return total
        runs = [key[0] for key in self.groups if self.run_on(key[0]) == name]
        if runs:
            total += sum(self.kv[layer] for layer in set(runs)) + max(self.held[layer] for layer in runs)
            total += sum(fixed_bytes(self.plan.graph, self.hardware.device(name)))
        if name == self.main:
            wait = [self.groups[key] for key in self.waiting()]
            total += sum(tensor.nbytes for tensor in self.plan.graph.loose) + sum(group.left_bytes for group in wait)
            total += max((group.largest_bytes for group in wait), default=0)
        return total

    def _demote(self, gpu: str) -> bool:
        """Let the last unit of a GPU wait."""
        unit = next((unit for unit in reversed(self.units) if self.run_on(unit) == gpu), None)
        if unit is not None:
            self._put(unit, self.waits)
        return unit is not None

    def _relieve(self) -> None:
        """Let groups of the main device wait until it has room: the last of those that could be streamed, and first
        those that are brought into no more room than others.
        """
        while self._is_over(self.main):
            kept = [key for key, place in self.place.items() if place == self.main and self.groups[key].nbytes]
            if not kept:
                return
            most = max((self.groups[key].largest_bytes for key in self.waiting()), default=0)
            last = max(kept, key=lambda key: (
                self.groups[key].streamable, self.groups[key].largest_bytes <= most, key[0], self.groups[key].nbytes,
            ))  # fmt: skip
            self.place[last] = self.waits
            if not self._may_split(self.unit_of[last[0]]):
                self._put(self.unit_of[last[0]], self.waits)

    def _promote(self, unit: int) -> None:
        """Keep a unit that waits on the plan's own GPU, where that is not the main one and has room."""
        keys = self.units[unit]
        before = {key: self.place[key] for key in keys}
        gpu = self.groups[keys[0]].entry.run_on
        if gpu in self.gpus and gpu != self.main and set(before.values()) <= {self.host, self.disk}:
            self._put(unit, gpu)
            if self._is_over(gpu):
                self.place |= before

    def _keep_on_main(self, unit: int) -> None:
        """Keep what waits of a unit on the main device where that fits: all of it, else group by group."""
        keys = [key for key in self.units[unit] if key in self.waiting()]
        before = {key: self.place[key] for key in keys}
        if not keys or self.run_on(unit) != self.main:
            return
        for tried in [keys, *([key] for key in keys if self._may_split(unit))]:
            self.place |= dict.fromkeys(tried, self.main)
            if not self._is_over(self.main):
                if tried is keys:
                    return
                continue
            self.place |= {key: before[key] for key in tried}

    def _sink(self) -> bool:
        """Let the last group in host memory wait on disk."""
        last = next((key for key in reversed(self.place) if self.place[key] == self.host), None)
        if last is not None:
            self.place[last] = self.disk
        return last is not None


def _lost(plan: Plan, state: _Coarse) -> list[str]:
    """Say what the plan has and the map has not."""
    groups = [(group.entry, state.place[key], group) for key, group in state.groups.items()]
    gpus = {gpu.name for gpu in plan.hardware.gpus}
    waiting = set(state.waiting())
    experts = [
        (entry, group, state.place[key] in (state.host, state.disk))
        for key, (entry, group) in zip(state.groups, with_groups(plan.graph, plan.placements), strict=True)
        if group.slices > 1
    ]
    split = sum(
        len({entry.home == entry.run_on for entry in (state.groups[key].entry for key in keys)}) > 1
        and len({state.place[key] for key in keys}) == 1
        for keys in state.units.values()
    )
    ran = {layer: state.groups[keys[0]].entry.run_on for layer, keys in state.units.items()}
    moved = [
        layer for layer, device in ran.items() if device in gpus and state.run_on(layer) not in (device, state.host)
    ]
    brought = {entry.layer for entry, _, _ in groups if entry.run_on not in gpus} if state.main in gpus else set()
    demoted = sum(
        group.nbytes for key, group in state.groups.items()
        if group.entry.home == group.entry.run_on and group.entry.run_on in gpus and key in waiting
    )  # fmt: skip
    parts = sum(entry.resident_slices or 0 for entry, _, waits in experts if entry.home != entry.run_on and waits)
    routed = sum(waiting_slices(entry, group) > 0 and waits for entry, group, waits in experts)
    told = (
        (parts, f"partial residency: {parts:,} experts stay on a GPU while others of their layer wait; here all wait"),
        (split, f"split layers: {split:,} layers keep a part and let a part wait; here each is wholly in one place"),
        (demoted, f"residency: {format_bytes(demoted)} that stay on GPUs wait here"),
        (routed, f"routing: where experts wait, in {routed:,} layers, all are brought, and not only those routed to"),
        (
            sum(entry.cpu_up_to_tokens > 0 for entry, _, _ in groups),
            f"experts on the CPU: short passes are computed where experts wait; here {state.main} computes all",
        ),
        (len(brought), f"layers on the CPU: {len(brought):,}; here their weights are brought to {state.main}"),
        (
            state.main not in gpus and set(ran.values()) & gpus,
            "GPUs: none has room for what Accelerate brings it; everything runs on the CPU here",
        ),
        (len(moved), f"other devices: {len(moved):,} layers run on {state.main} here, through its link alone"),
        (
            waiting and plan.slots,
            "prefetch: nothing is copied ahead; a module's tensors come when it runs, and are freed after it",
        ),
        (
            state.main in gpus and state.host in {place for _, place, _ in groups},
            "pinned memory: what waits in host memory is pageable, and copied more slowly",
        ),
        (
            any(entry.dtype is not None for entry, _, _ in groups),
            "precision: weights in int8 or nf4 are in the model's own precision here",
        ),
        (
            is_on_host(plan.graph),
            "cache: generate has to be told that it waits in host memory (cache_implementation='offloaded')",
        ),
        (
            plan.execution.experts is not None,
            "experts: dispatch's own way to compute them; transformers' may take memory that is not planned for",
        ),
    )
    return [text for is_so, text in told if is_so]

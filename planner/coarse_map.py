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
    """Where each group is, changed until every memory has room. main: the device that runs what waits."""

    def __init__(self, plan: Plan, main: str):
        self.plan, self.main, self.hardware = plan, main, plan.hardware
        self.host, self.disk = plan.hardware.host(main), plan.hardware.disk(main)
        gpus = [gpu.name for gpu in plan.hardware.gpus]
        self.gpus = gpus[gpus.index(main) :] if main in gpus else []
        self.waits = self.disk if main == self.host else self.host
        self.groups: dict[Key, _Group] = {}
        self.by_layer: dict[int, list[Key]] = {}
        numbers = {layer.name: index for index, layer in enumerate(plan.graph.layers)}
        device = plan.hardware.device(main)
        for entry in plan.placements:
            layer = numbers[entry.layer]
            key = layer, entry.group
            self.groups[key] = _Group.of(entry, plan.graph.kind_of(layer).group(entry.group), device)
            self.by_layer.setdefault(layer, []).append(key)
        spans = [entry.per_layer() for entry in plan.graph.passes]
        self.kv = [kv_bytes([each[layer] for each in spans]) if spans else 0 for layer in range(len(numbers))]
        self.held = activation_bytes(plan.graph)
        self.ties = self._ties()
        self.place = {key: self._wished(group.entry) for key, group in self.groups.items()}
        for layer in self.by_layer:
            self._together(layer)

    def settle(self) -> bool:
        """Make everything fit; tell whether it does, with the main device the first that keeps anything."""
        for gpu in (gpu for gpu in self.gpus if gpu != self.main):
            while self._is_over(gpu) and self._demote_layer(gpu):
                pass
        while self._is_over(self.main) and self._demote_group():
            pass
        for layer in self.by_layer:
            self._promote(layer)
        while self._is_over(self.host) and self._sink():
            pass
        first = next((gpu for gpu in self.gpus if gpu in self.place.values()), self.host)
        return first == self.main and not any(map(self._is_over, (*self.gpus, self.host, self.disk)))

    def run_on(self, layer: int) -> str:
        """Return the device of a layer: the GPU that keeps any of it, else the main one."""
        return next((self.place[key] for key in self.by_layer[layer] if self.place[key] in self.gpus), self.main)

    def tensor_places(self) -> dict[str, str]:
        graph = self.plan.graph
        found = {name: self.place[index, group.name] for index, group, name, _ in graph.tensors()}
        return found | {tensor.name: self.main for tensor in graph.loose}

    def waiting(self) -> list[Key]:
        return [key for key, place in self.place.items() if place != self.main and place not in self.gpus]

    def _ties(self) -> list[list[tuple[Key, int]]]:
        graph = self.plan.graph
        device = self.hardware.device(self.main)
        found = {
            name: ((index, group.name), allocation_bytes(tensor.nbytes, device))
            for index, group, name, tensor in graph.tensors()
        }
        return [[found[name] for name in names if name in found] for names in graph.ties]

    def _wished(self, entry: Placement) -> str:
        if entry.home == entry.run_on and entry.run_on in self.gpus:
            return entry.run_on
        return self.disk if entry.home == self.disk else self.host

    def _together(self, layer: int) -> None:
        """Let a layer wait as a whole where another GPU than the main one would keep only a part of it."""
        places = {self.place[key] for key in self.by_layer[layer]}
        if len(places) > 1 and not places <= {self.main, self.host, self.disk}:
            self._put(layer, self.waits)

    def _put(self, layer: int, place: str) -> None:
        for key in self.by_layer[layer]:
            self.place[key] = place

    def _is_over(self, name: str) -> bool:
        pool = name if name == self.disk else self.hardware.device(name).pool
        return self._needed(name) > self.hardware.pool(pool).usable_bytes

    def _needed(self, name: str) -> int:
        """Return the bytes that a device, host memory or the disk needs; a tied tensor once."""
        kind = "disk" if name == self.disk else "host" if name == self.host else "device"
        total = sum(self.groups[key].bytes_on[kind] for key, place in self.place.items() if place == name)
        for tied in self.ties:
            total -= sum(nbytes for key, nbytes in tied if self.place[key] == name) - max(
                (nbytes for key, nbytes in tied if self.place[key] == name), default=0
            )
        if kind == "disk":
            return total
        runs = [layer for layer in self.by_layer if self.run_on(layer) == name]
        if runs:
            total += sum(self.kv[layer] for layer in runs) + max(self.held[layer] for layer in runs)
            total += sum(fixed_bytes(self.plan.graph, self.hardware.device(name)))
        if name == self.main:
            there = [self.groups[key] for key in self.waiting()]
            total += sum(tensor.nbytes for tensor in self.plan.graph.loose) + sum(group.left_bytes for group in there)
            total += max((group.largest_bytes for group in there), default=0)
        return total

    def _demote_layer(self, gpu: str) -> bool:
        layer = next((layer for layer in reversed(self.by_layer) if self.run_on(layer) == gpu), None)
        if layer is not None:
            self._put(layer, self.waits)
        return layer is not None

    def _demote_group(self) -> bool:
        """Let a group of the main device wait: the last that could be streamed and needs no more room than others."""
        most = max((self.groups[key].largest_bytes for key in self.waiting()), default=0)
        kept = [key for key, place in self.place.items() if place == self.main and self.groups[key].nbytes]
        if not kept:
            return False
        last = max(kept, key=lambda key: (
            self.groups[key].streamable, self.groups[key].largest_bytes <= most, key[0], self.groups[key].nbytes,
        ))  # fmt: skip
        self.place[last] = self.waits
        return True

    def _promote(self, layer: int) -> None:
        """Keep what waits of a layer, where that fits: all of it on the GPU of the plan, or any group on the main one."""
        keys = self.by_layer[layer]
        before = {key: self.place[key] for key in keys}
        gpu = self.groups[keys[0]].entry.run_on
        if all(key in self.waiting() for key in keys) and gpu in self.gpus and gpu != self.main:
            self._put(layer, gpu)
            if not self._is_over(gpu):
                return
            self.place |= before
        for key in keys:
            if key in self.waiting() and self.run_on(layer) == self.main:
                self.place[key] = self.main
                if self._is_over(self.main):
                    self.place[key] = before[key]

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
        for keys in state.by_layer.values()
    )
    ran = {layer: state.groups[keys[0]].entry.run_on for layer, keys in state.by_layer.items()}
    moved = [layer for layer, device in ran.items() if device in gpus and state.run_on(layer) != device]
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

"""How Accelerate itself runs a device map: its hooks copy what waits, tensor by tensor, and nothing overlaps.

As its code has it (accelerate 1.15: hooks.py, big_modeling.py, utils/offload.py):

- Every module with weights below it has a hook. Before a module with weights of its own runs, each parameter that
  waits is brought to the main device by itself and synchronously, into memory allocated for it, and given up when the
  module ends: so all experts of a fused layer come, however few are used. Buffers do not wait.
- On "cpu" a parameter lies in pageable memory. On "disk" it is read from a mapped file into such memory first. With no
  GPU in the map, what is on "cpu" runs where it is. What is tied to a tensor that is there already is not brought.
- What waits runs on the main device, the first GPU of the map. A layer's inputs are sent from where they were made to
  each layer that takes them elsewhere, again for each.

Hooks take time of the host: 6.6 us a module, and beside its copy 70 us a tensor that waits in host memory and 149 us
one on disk (on two CPU cores with accelerate 1.15; `benchmarks/hook_costs.py` measures them again). Beside resident
weights that is time to call operators in, which the device may hide. Rates are the hardware's: `pageable_fraction` of a
link, and the disk's. A layer's own time is that of `planner.cost`, shared among its modules by weight bytes.

Not modelled: logits on their way back to the device of the inputs, and a page cache that holds what is on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from planner import cost
from planner.chunks import chunks_of
from planner.device_map import DeviceMap
from planner.errors import InputError
from planner.graph import Edge, Pass, Span, Tensor, WeightGroup
from planner.host_cache import is_on_host
from planner.memory import allocation_bytes, fixed_bytes
from planner.plan import Plan
from simulate.simulator import passes_of
from simulate.timeline import Interval, MemorySample, Timeline

MODULE_NS = 6_600
HOST_TENSOR_NS = 70_000
DISK_TENSOR_NS = 149_000


def run_accelerate(plan: Plan, device_map: Mapping[str, int | str] | None = None) -> Timeline:
    """Simulate the plan's workload as Accelerate's hooks would run it on the plan's hardware.

    device_map: where the weights are; where it is left out, each group's home in the plan (of experts of which some
        wait, all do). Slots of the timeline's memory are what the running module has been brought.

    Raises:
        InputError: the map cannot be followed, or the cache waits in host memory, which is not modelled.
        PlanFormatError: the plan's graph has no pass for its workload.
    """
    return _Run(plan, _homes(plan) if device_map is None else device_map).timeline()


def _homes(plan: Plan) -> dict[str, int | str]:
    homes = {(entry.layer, entry.group): entry.home for entry in plan.placements}
    layers = plan.graph.layers
    found: dict[str, int | str] = {
        name: homes[layers[index].name, group.name] for index, group, name, _ in plan.graph.tensors()
    }
    return {**found, **{tensor.name: plan.placements[0].run_on for tensor in plan.graph.loose}}


@dataclass(frozen=True, slots=True)
class _Module:
    """A module with weights of its own. share: of its layer's computing time; waiting: (tensor, place) of each."""

    name: str
    device: str
    share: float
    waiting: tuple[tuple[Tensor, str], ...]


@dataclass(frozen=True, slots=True)
class _Layer:
    """modules: in the order of registration. hooks: modules with weights at or below them."""

    name: str
    device: str
    modules: tuple[_Module, ...]
    hooks: int


class _Run:
    def __init__(self, plan: Plan, device_map: Mapping[str, int | str]):
        self.passes = passes_of(plan)
        if is_on_host(plan.graph):
            raise InputError("a cache in host memory is not modelled beside Accelerate's hooks; take a dynamic one")
        self.plan, self.graph, self.hardware = plan, plan.graph, plan.hardware
        self.mapped = DeviceMap.read(device_map, plan.hardware)
        self.places = self.mapped.places(plan.graph)
        self.dtype = cost.weight_dtype(plan.graph)
        self.twins = {name: names for names in plan.graph.ties for name in names}
        self.layers = self._layers()
        self.takes: dict[int, list[Edge]] = {}
        for edge in plan.graph.edges:
            self.takes.setdefault(edge.target, []).append(edge)
        self.spans = {entry.name: entry.per_layer() for entry in plan.graph.passes}
        self.weights = self._weights()
        self.now = 0
        # Of each call: when it began, and the intervals and samples until then, one call after another; and when it
        # begins among all steps.
        self.calls: list[tuple[int, int, int]] = []
        self.begins: list[int] = []
        self.intervals: list[Interval] = []
        self.samples: list[MemorySample] = []

    def timeline(self) -> Timeline:
        passes = self.passes
        for pool in self.hardware.pools:
            self._sample(pool.name)
        step_ns = [self._prefill(passes)]
        steps = self.plan.workload.decode_steps
        if steps:
            first = self._call(passes["decode_first"], 1)
            self.begins.append(step_ns[0])
            step_ns.append(first)
        if steps > 1:
            last = self._call(passes.get("decode_last", passes["decode_first"]), steps)
            # Each step reads a little more cache than the one before.
            step_ns += [first + (last - first) * step // (steps - 1) for step in range(1, steps)]
            self.begins.append(sum(step_ns) - last)
        return self._placed(tuple(step_ns), tuple(sorted({0, min(1, steps), steps})))

    def _prefill(self, passes: Mapping[str, Pass]) -> int:
        """Simulate the calls that the graph holds of the prompt; return what all of them take, in ns."""
        chunks = chunks_of(self.graph, self.plan.workload)
        total = self._call(passes["prefill"], 0)
        self.begins.append(0)
        if chunks.whole > 1:
            ends = [self._call(passes[name], 0) for name in ("prefill_next", "prefill_last") if name in passes]
            self.begins.append(total)
            total += sum(ends) * (chunks.whole - 1) // len(ends)
            self.begins += [total - ends[-1]] * (len(ends) - 1)
        if chunks.rest:
            self.begins.append(total)
            total += self._call(passes["prefill_rest"], 0)
        return total

    def _placed(self, step_ns: tuple[int, ...], simulated: tuple[int, ...]) -> Timeline:
        """Return the timeline with every call that was simulated at its own time."""
        intervals: list[Interval] = []
        samples: list[MemorySample] = []
        stretches = []
        for call, begins, until in zip(
            self.calls, self.begins, [*self.calls[1:], (self.now, len(self.intervals), len(self.samples))], strict=True
        ):
            later = begins - call[0]
            stretches.append((begins, until[0] + later))
            intervals += [
                replace(each, start_ns=each.start_ns + later, end_ns=each.end_ns + later)
                for each in self.intervals[call[1] : until[1]]
            ]
            samples += [replace(each, time_ns=each.time_ns + later) for each in self.samples[call[2] : until[2]]]
        return Timeline(
            intervals=tuple(intervals),
            memory=(*self.samples[: self.calls[0][2]], *samples),
            simulated_steps=simulated,
            step_ns=step_ns,
            kept_ns=tuple(stretches),
        )

    def _call(self, entry: Pass, step: int) -> int:
        """Simulate one forward call and return its duration, in ns."""
        begun = self.now
        self.calls.append((begun, len(self.intervals), len(self.samples)))
        spans = self.spans[entry.name]
        cached = dict.fromkeys(self.weights, 0)
        for layer, span in zip(self.layers, spans, strict=True):
            cached[layer.device] += span.kv_before_bytes
        for index, (layer, span) in enumerate(zip(self.layers, spans, strict=True)):
            self._take(index, prefill=step == 0, step=step)
            brought = {module.device: 0 for module in layer.modules}
            for module in layer.modules:
                device = self.hardware.device(module.device)
                nbytes = sum(allocation_bytes(tensor.nbytes, device) for tensor, _ in module.waiting)
                brought[module.device] = max(brought[module.device], nbytes)
            for name, nbytes in brought.items():
                held = span.requested_bytes if name == layer.device else 0
                self._sample(name, cached[name], held, nbytes)
            self._layer(index, layer, span, entry, step)
            cached[layer.device] += span.kv_after_bytes - span.kv_before_bytes
            for name in dict.fromkeys((layer.device, *brought)):
                self._sample(name, cached[name])
        return self.now - begun

    def _layer(self, index: int, layer: _Layer, span: Span, entry: Pass, step: int) -> None:
        device = self.hardware.device(layer.device)
        computing = cost.layer_ns(
            self.graph, index, span, device, tokens=entry.tokens * self.graph.batch_size, dtype=self.dtype,
            prefill=step == 0,
        )  # fmt: skip
        hooks = layer.hooks * MODULE_NS
        if not any(module.waiting for module in layer.modules):
            whole = max(computing, span.operators * device.operator_ns + hooks)
            self._spend(f"{layer.device} compute", "run", layer.name, whole, step)
            return
        self._spend("hooks", "run", f"{layer.name} hooks", hooks, step)
        done = 0
        for module in layer.modules:
            label = f"{layer.name} {module.name}".strip()
            for tensor, place in module.waiting:
                self._bring(f"{layer.name} {tensor.name}", tensor, place, module.device, step)
            part = round(computing * module.share)
            done += part
            self._spend(f"{module.device} compute", "run", label, part, step)
        self._spend(f"{layer.device} compute", "run", layer.name, max(0, computing - done), step)

    def _bring(self, label: str, tensor: Tensor, place: str, device: str, step: int) -> None:
        """Bring one tensor to the main device: read it where it is on disk, then copy it from pageable memory."""
        host = self.hardware.host(device)
        is_read = place == self.hardware.disk(device)
        self._spend("hooks", "run", f"{label} hook", DISK_TENSOR_NS if is_read else HOST_TENSOR_NS, step)
        if is_read:
            taken = cost.copy_ns(self.hardware, place, host, "disk", tensor.stored_bytes)
            self._spend(f"{place}→{host} read", "read", label, taken, step)
        if device != host:
            taken = cost.copy_ns(self.hardware, host, device, "pageable", tensor.nbytes)
            lane = self.hardware.link(host, device).lane or f"{host}→{device} copy"
            self._spend(lane, "copy", label, taken, step)

    def _take(self, index: int, *, prefill: bool, step: int) -> None:
        """Send a layer what it takes from layers on other devices."""
        device = self.layers[index].device
        for edge in self.takes.get(index, ()):
            origin = self.layers[edge.source].device
            if origin == device:
                continue
            link = self.hardware.link(origin, device)
            nbytes = edge.prefill_bytes if prefill else edge.decode_bytes
            lane = link.lane or f"{origin}→{device} copy"
            taken = link.latency_ns + nbytes * 10**9 // link.bytes_per_s
            self._spend(lane, "hop", f"→ {self.layers[index].name}", taken, step)

    def _spend(
        self, lane: str, action: Literal["run", "copy", "read", "hop"], label: str, duration: int, step: int
    ) -> None:
        end = self.now + duration
        if duration:
            self.intervals.append(
                Interval(lane=lane, start_ns=self.now, end_ns=end, action=action, label=label, step=step)
            )
        self.now = end

    def _sample(self, name: str, kv_cache: int = 0, activations: int = 0, brought: int = 0) -> None:
        used = {layer.device for layer in self.layers}
        context, workspace = fixed_bytes(self.graph, self.hardware.device(name)) if name in used else (0, 0)
        self.samples.append(
            MemorySample(
                time_ns=self.now,
                device=name,
                weights=self.weights[name],
                kv_cache=kv_cache,
                activations=activations,
                slots=brought,
                workspace=workspace,
                context=context,
            )
        )

    def _layers(self) -> list[_Layer]:
        found = []
        for index, layer in enumerate(self.graph.layers):
            tensors: dict[str, list[tuple[WeightGroup, Tensor]]] = {}
            for group in self.graph.kind_of(index).groups:
                for tensor in group.tensors:
                    tensors.setdefault(tensor.name.rpartition(".")[0], []).append((group, tensor))
            read = {path: sum(_read_bytes(*each) for each in own) for path, own in tensors.items()}
            total = sum(read.values())
            modules = tuple(
                self._module(layer.name, path, own, read[path] / total if total else 1 / len(tensors))
                for path, own in tensors.items()
            )
            above = {""}
            for path in tensors:
                while path:
                    above.add(path)
                    path = path.rpartition(".")[0]
            device = modules[0].device if modules else self.mapped.place_of(layer.name) or self.mapped.main
            device = device if device in {each.name for each in self.hardware.gpus} else self.mapped.main
            found.append(_Layer(layer.name, device, modules, len(above)))
        return found

    def _module(self, layer: str, path: str, own: Sequence[tuple[WeightGroup, Tensor]], share: float) -> _Module:
        places = {tensor.name: self.places[_full(layer, tensor.name)] for _, tensor in own}
        gpus = [gpu.name for gpu in self.hardware.gpus if gpu.name in places.values()]
        device = gpus[0] if gpus else self.mapped.main
        waiting = tuple(
            (tensor, places[tensor.name])
            for _, tensor in own
            if not tensor.buffer and self._waits(_full(layer, tensor.name), places[tensor.name], device)
        )
        return _Module(path, device, share, waiting)

    def _waits(self, name: str, place: str, device: str) -> bool:
        """Tell whether a tensor is brought to a device; one in host memory is not where its tied twin is there."""
        if place == device or place == self.hardware.disk(device):
            return place != device
        return all(self.places.get(twin) != device for twin in self.twins.get(name, ()))

    def _weights(self) -> dict[str, int]:
        """Return the bytes of weights that each memory holds throughout, a tied tensor once in each."""
        held = {pool.name: 0 for pool in self.hardware.pools}
        run_on = {layer.name: layer.device for layer in self.layers}
        seen: set[tuple[str, str]] = set()
        every = [(self.graph.layers[i].name, name, tensor) for i, _, name, tensor in self.graph.tensors()]
        every += [(self.graph.layers[0].name, tensor.name, tensor) for tensor in self.graph.loose]
        for layer, name, tensor in every:
            place = run_on[layer] if tensor.buffer else self.places[name]
            first = self.twins.get(name, (name,))[0]
            if (place, first) in seen:
                continue
            seen.add((place, first))
            is_on_disk = place == self.hardware.disk(place)
            nbytes = tensor.stored_bytes if is_on_disk else tensor.nbytes
            held[place] += nbytes if is_on_disk else allocation_bytes(nbytes, self.hardware.device(place))
        return held


def _full(layer: str, tensor: str) -> str:
    return f"{layer}.{tensor}" if layer else tensor


def _read_bytes(group: WeightGroup, tensor: Tensor) -> int:
    """Return the bytes of a tensor that one token's pass reads: of experts, of those that it uses."""
    return tensor.nbytes * group.used_slices // group.slices

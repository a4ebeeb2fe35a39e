"""Bytes and FLOPs → time. The cost model that plans are optimal for, and the pieces that the simulator shares.

A layer takes the longest of: its FLOPs at the device's matmul rate, its bytes at the device's memory rate (the
roofline of Williams, Waterman and Patterson, CACM 2009), and its operators at the host's price of each. Weights that
must come from elsewhere take their bytes over the narrowest link of the way, and a latency.

Over one pass, a device takes the greater of (computing + copies that can only start when a router or a page fault
asks for them) and (all of its copies): whole groups are prefetched, because their order is known. Every change of
device from one layer to the next costs one hop, the same for all pairs. The price of a decode step is the mean of the
first and the last.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from planner.graph import LayerGraph, LayerKind, Pass, Span, WeightGroup
from planner.hardware import Device, Hardware
from planner.memory import waiting_slices, with_groups
from planner.plan import Placement
from planner.workload import Workload

COST_MODEL = "roofline layers, prefetched groups, uniform hops (planner/cost.py, version 1)"


def weight_dtype(graph: LayerGraph) -> str:
    """Return the dtype that most weight bytes have; matmuls are priced at its rate."""
    totals: dict[str, int] = {}
    for kind in graph.kinds:
        for group in kind.groups:
            for tensor in group.tensors:
                totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.nbytes
    return max(sorted(totals), key=totals.__getitem__)


def compute_ns(kind: LayerKind, span: Span, device: Device, *, tokens: int, dtype: str) -> int:
    """Return the time one layer computes on `device`, its weights being at hand.

    tokens: of the whole batch in this pass; it decides how many distinct experts are expected to be read.
    """
    experts = sum(
        int(group.expected_slices(tokens) * group.nbytes / group.slices) for group in kind.groups if group.slices > 1
    )
    arithmetic = span.flops * 10**9 // device.flops_for(dtype)
    memory = (span.moved_bytes + experts) * 10**9 // device.bytes_per_s
    return max(arithmetic, memory, span.operators * device.operator_ns)


def path_rate(hardware: Hardware, home: str, device: str) -> tuple[int, int]:
    """Return (bytes per second, latency in ns) of the way from a home to a device, through host memory if need be."""
    if home == "disk" and device != "cpu":
        disk, link = hardware.link("disk", "cpu"), hardware.link("cpu", device)
        return min(disk.bytes_per_s, link.bytes_per_s), disk.latency_ns + link.latency_ns
    link = hardware.link(home, device)
    return link.bytes_per_s, link.latency_ns


def copy_ns(hardware: Hardware, home: str, device: str, nbytes: int) -> int:
    """Return the time of one copy of `nbytes` from a home to a device."""
    rate, latency = path_rate(hardware, home, device)
    return latency + nbytes * 10**9 // rate


def waiting_bytes(group: WeightGroup, home: str) -> int:
    """Return what one slice takes where it waits: in a slab, or as the checkpoint stores it."""
    return group.slice_stored_bytes if home == "disk" else group.slice_slab_bytes


def slice_copy_ns(hardware: Hardware, group: WeightGroup, home: str, device: str, *, tokens: int) -> int:
    """Return the expected time per pass that one waiting slice costs: its copy, times the chance that it is used."""
    whole = copy_ns(hardware, home, device, waiting_bytes(group, home))
    return int(whole * group.expected_slices(tokens) / group.slices)


def is_prefetched(group: WeightGroup, device: str) -> bool:
    """Tell whether copies of this group start before they are asked for: whole groups on their way to a GPU."""
    return group.slices == 1 and device != "cpu"


def hop_ns(hardware: Hardware, nbytes: int) -> int:
    """Return the price of handing `nbytes` to another device: the slowest link between devices."""
    names = {device.name for device in hardware.devices}
    links = [link for link in hardware.links if link.source in names and link.target in names]
    if not links:
        return 0
    return max(link.latency_ns for link in links) + nbytes * 10**9 // min(link.bytes_per_s for link in links)


@dataclass(frozen=True, slots=True)
class Step:
    """A pass as it is priced: how often it happens, and the traced passes whose mean it costs."""

    name: str
    times: int
    passes: tuple[Pass, ...]

    @property
    def tokens(self) -> int:
        return self.passes[0].tokens


def steps_of(graph: LayerGraph, workload: Workload) -> tuple[Step, ...]:
    """Return the prefill and, where there is one, the mean decode step."""
    steps = [Step("prefill", 1, (graph.passes[0],))]
    if len(graph.passes) > 1:
        steps.append(Step("decode", workload.decode_steps, graph.passes[1:]))
    return tuple(steps)


def step_compute_ns(graph: LayerGraph, step: Step, index: int, device: Device, dtype: str) -> int:
    """Return the mean time of layer `index` over a step's passes, in ns."""
    kind = graph.kind_of(index)
    tokens = step.tokens * graph.batch_size
    times = [compute_ns(kind, entry.per_layer()[index], device, tokens=tokens, dtype=dtype) for entry in step.passes]
    return sum(times) // len(times)


def step_hop_ns(graph: LayerGraph, hardware: Hardware, step: Step) -> int:
    """Return the price of one hop in a step: its largest edge."""
    sizes = [edge.prefill_bytes if step.name == "prefill" else edge.decode_bytes for edge in graph.edges]
    return hop_ns(hardware, max(sizes, default=0))


def objective_ns(graph: LayerGraph, hardware: Hardware, workload: Workload, placements: Sequence[Placement]) -> int:
    """Return the cost of a placement under the cost model, in ns: what the planner makes least."""
    dtype = weight_dtype(graph)
    run_on = {placement.layer: placement.run_on for placement in placements}
    path = [run_on[layer.name] for layer in graph.layers]
    hops = sum(one != other for one, other in itertools.pairwise(path))
    total = 0
    for step in steps_of(graph, workload):
        serial = dict.fromkeys(path, 0)
        copies = dict.fromkeys(path, 0)
        for index, name in enumerate(path):
            serial[name] += step_compute_ns(graph, step, index, hardware.device(name), dtype)
        tokens = step.tokens * graph.batch_size
        for placement, group in with_groups(graph, placements):
            waiting = waiting_slices(placement, group)
            if waiting == 0:
                continue
            each = slice_copy_ns(hardware, group, placement.home, placement.run_on, tokens=tokens)
            copies[placement.run_on] += waiting * each
            if not is_prefetched(group, placement.run_on):
                serial[placement.run_on] += waiting * each
        once = sum(max(serial[name], copies[name]) for name in serial) + hops * step_hop_ns(graph, hardware, step)
        total += step.times * once
    return total

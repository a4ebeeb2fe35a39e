"""Bytes and FLOPs → time. The cost model that plans are optimal for, and the pieces that the simulator shares.

A layer takes the longest of: its FLOPs at the device's matmul rate, its bytes at the device's memory rate (the roofline
of Williams, Waterman and Patterson, CACM 2009), and its operators at the host's price of each; or what it was measured
to take. On a calibrated device its time follows from rates measured by rows instead (planner/rates.py). Weights that
must come from elsewhere take their bytes over the narrowest link of the way, and a latency. Of an embedding in a mapped
file only rows are read, a window (WINDOW_BYTES) around each, and waited for. Experts that the CPU computes where they
wait take the longer of their bytes at its memory rate and their FLOPs at its matmul rate, and two latencies of the link
to hand the hidden states over and back. The experts that wait are the least popular ones of a layer, and each counts as
often as it is expected to be used.

In one pass, layers run one after another, so the times of the devices add up. A device takes

    max(C + E + F, X + Y)    where it has two slots for groups, or none (a CPU), and copies no experts, or no groups
    C + E + X                where copies and computing do not overlap: one slot, or experts that queue as well

with C its computing, and what that takes longer because copies read from the memory that a CPU computes experts from:
the lesser of what the copies take from it, and what experts take longer with copies going on all the while. E are
copies that start when a router asks for them, and X = max(0, G - H) of the copies G of whole groups, whose order is
known: H are done while other devices compute, as many as there are slots, in every pass but the first, each taken to be
the smallest. Y runs before the first copy or after the last: layers that have nothing to stream (embeddings, head), and
one of the others, which are taken to be alike; those whose groups are streamed are spread from its first layer to its
last. A CPU has no slots: whole groups that wait on disk are read ahead of it as mapped files, from the beginning of
each pass. So H = 0, and F, the smallest of them, is waited for before there is anything to compute with; elsewhere F =
0. Experts that files hold as they are used are read as mapped files too, when a router asks for them. Experts and
groups from one disk take turns, and so do devices, whose times add up. No pass is shorter than one link is busy. What
moves between devices takes its bytes and latency on the link between them, once for each device that takes it
(`planner.steps.transfers`). The price of a decode step is the mean of the first and the last. A prefill in chunks is a
pass for each, which streams what waits again: the first, the others at the mean of the second and the last whole one,
and the rest, whose moves between devices are priced as a whole chunk's.

A cache that waits in host memory is copied down by what computes, which is part of C, and up beside it: that is hidden
behind the copy down of the layer before, but where whole groups come over the same link it adds to X.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.chunks import chunks_of
from planner.graph import Bucket, LayerGraph, LayerKind, Pass, Span, WeightGroup
from planner.hardware import Device, Hardware
from planner.host_cache import is_on_host, up_ns, waited_ns
from planner.memory import SLOT_COUNT, Memory, is_mapped, waiting_slices, with_groups
from planner.plan import Placement, Slots
from planner.rates import measured_ns
from planner.steps import transfers
from planner.workload import Workload

# mm/filemap.c, do_sync_mmap_readahead: what Linux reads around a page that is touched and not there
# (VM_READAHEAD_PAGES, include/linux/mm.h).
WINDOW_BYTES = 128 * 1024
COST_MODEL = "roofline layers, prefetched groups, transfers by link (planner/cost.py, version 6)"


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
    if device.matmuls:
        return measured_ns(kind, span, device, tokens=tokens, dtype=dtype)
    return max(roofs_ns(kind, span, device, tokens=tokens, dtype=dtype))


def roofs_ns(kind: LayerKind, span: Span, device: Device, *, tokens: int, dtype: str) -> tuple[int, int, int]:
    """Return the times of a layer's arithmetic, of its bytes, and of its operators, each by itself."""
    experts = sum(
        int(group.expected_slices(tokens) * group.nbytes / group.slices) for group in kind.groups if group.slices > 1
    )
    arithmetic = span.flops * 10**9 // device.flops_for(dtype)
    memory = (span.moved_bytes + experts) * 10**9 // device.bytes_per_s
    return arithmetic, memory, span.operators * device.operator_ns


def layer_ns(
    graph: LayerGraph, index: int, span: Span, device: Device, *, tokens: int, dtype: str, prefill: bool
) -> int:
    """Return the time that layer `index` computes in one pass: as measured, or as estimated."""
    measured = graph.measured_ns(index, device.name, prefill=prefill)
    if measured is not None:
        return measured
    return compute_ns(graph.kind_of(index), span, device, tokens=tokens, dtype=dtype)


def path_rate(hardware: Hardware, home: str, device: str, memory: Memory) -> tuple[int, int]:
    """Return (bytes per second, latency in ns) of the way from a home to a device, through host memory if need be."""
    if memory == "disk" and device != hardware.host(device):
        host = hardware.host(device)
        disk, link = hardware.link(home, host), hardware.link(host, device)
        return min(disk.bytes_per_s, link.bytes_per_s), disk.latency_ns + link.latency_ns
    link = hardware.link(home, device)
    rate = int(link.bytes_per_s * hardware.pageable_fraction) if memory == "pageable" else link.bytes_per_s
    return rate, link.latency_ns


def copy_ns(hardware: Hardware, home: str, device: str, memory: Memory, nbytes: int) -> int:
    """Return the time of one copy of `nbytes` from a home to a device."""
    rate, latency = path_rate(hardware, home, device, memory)
    return latency + nbytes * 10**9 // rate


def waiting_bytes(group: WeightGroup, memory: Memory) -> int:
    """Return what one slice takes where it waits: in a slab, or as the checkpoint stores it."""
    return group.slice_stored_bytes if memory == "disk" else group.slice_slab_bytes


def slice_copy_ns(
    hardware: Hardware, group: WeightGroup, bucket: Bucket, home: str, device: str, memory: Memory, *, tokens: int
) -> int:
    """Return the expected time per pass that one waiting slice of a bucket costs: to copy or to read it, times the
    chance that it is used.
    """
    if reads_rows(hardware, group, device, memory):
        return rows_ns(hardware, group, home, device, tokens=tokens)
    return int(once_ns(hardware, group, home, device, memory) * group.used(bucket, tokens))


def reads_rows(hardware: Hardware, group: WeightGroup, device: str, memory: Memory) -> bool:
    """Tell whether a group stays in its mapped file but for the rows that a pass looks up."""
    return group.by_rows and is_mapped(hardware, group, device, memory)


def rows_ns(hardware: Hardware, group: WeightGroup, home: str, device: str, *, tokens: int) -> int:
    """Return the expected time in which the rows of `tokens` tokens are read from a mapped file: of W windows that are
    equally likely, W * (1 - (1 - 1/W)^T) are touched.
    """
    link, nbytes = hardware.link(home, device), waiting_bytes(group, "disk")
    windows = max(1, nbytes // WINDOW_BYTES)
    each = link.latency_ns + min(nbytes, WINDOW_BYTES) * 10**9 // link.bytes_per_s
    return int(windows * (1.0 - (1.0 - 1.0 / windows) ** tokens) * each)


def once_ns(hardware: Hardware, group: WeightGroup, home: str, device: str, memory: Memory) -> int:
    """Return the time in which one waiting slice is copied, or read where the CPU computes with mapped files."""
    nbytes = waiting_bytes(group, memory)
    if not is_mapped(hardware, group, device, memory):
        return copy_ns(hardware, home, device, memory, nbytes)
    link = hardware.link(home, device)
    return link.latency_ns + nbytes * 10**9 // (link.mapped_bytes_per_s or link.bytes_per_s)


def waiting_copy_ns(
    hardware: Hardware, group: WeightGroup, home: str, device: str, memory: Memory, *, waiting: int, tokens: int
) -> int:
    """Return the expected time per pass that the waiting slices of a layer's group cost: the least popular ones."""
    return sum(
        count * slice_copy_ns(hardware, group, bucket, home, device, memory, tokens=tokens)
        for count, bucket in group.waiting(waiting)
    )


def slice_cpu_ns(
    hardware: Hardware,
    group: WeightGroup,
    bucket: Bucket,
    home: str,
    device: str,
    *,
    tokens: int,
    dtype: str,
    beside_copies: bool = False,
) -> int:
    """Return the expected time per pass in which the CPU `home` computes one expert that waits there for `device`.

    A multiply-add of each weight for each token that is routed to it; hidden states go there and back. beside_copies:
    weights are copied to the device from the same memory all the while.
    """
    host = hardware.device(home)
    used = group.used(bucket, tokens)
    elements = sum(tensor.elements for tensor in group.tensors) // group.slices
    routed = tokens * bucket.chance
    rate = hardware.cpu_bytes_per_s(device) if beside_copies else host.bytes_per_s
    memory = used * group.slice_slab_bytes * 1e9 / rate
    arithmetic = 2.0 * routed * elements * 1e9 / host.flops_for(dtype)
    latencies = hardware.link(home, device).latency_ns + hardware.link(device, home).latency_ns
    return int(max(memory, arithmetic) + used * latencies)


def waiting_cpu_ns(
    hardware: Hardware,
    group: WeightGroup,
    home: str,
    device: str,
    *,
    waiting: int,
    tokens: int,
    dtype: str,
    beside_copies: bool = False,
) -> int:
    """Return the expected time per pass in which the CPU computes the waiting experts of a layer's group."""
    return sum(
        count
        * slice_cpu_ns(hardware, group, bucket, home, device, tokens=tokens, dtype=dtype, beside_copies=beside_copies)
        for count, bucket in group.waiting(waiting)
    )


def slows_ns(hardware: Hardware, group: WeightGroup, device: str) -> int:
    """Return what the copy of a whole group takes from a CPU that reads from the same memory all the while, in ns.

    With a share s of what each asks for, the copy lasts t / s, of which the CPU loses 1 - s: t (1 - s) / s. What comes
    from disk passes through that memory too, and is taken to slow as much.
    """
    host = hardware.host(device)
    if device == host:
        return 0
    alone, together = hardware.device(host).bytes_per_s, hardware.cpu_bytes_per_s(device)
    return group.slice_slab_bytes * 10**9 * (alone - together) // (hardware.link(host, device).bytes_per_s * together)


def is_prefetched(group: WeightGroup) -> bool:
    """Tell whether copies of this group start before they are asked for: of whole groups, whose order is known."""
    return group.slices == 1 and not group.by_rows


def slot_count(device: Device, slots: int) -> int:
    """Return how many copies of whole groups are begun before a pass: none for a CPU, else as many as it has slots."""
    return 0 if device.kind == "cpu" else slots


@dataclass(frozen=True, slots=True)
class Step:
    """A pass as it is priced: how often it counts, how often it happens, and the traced passes whose mean it costs."""

    name: str
    weight: int
    times: int
    passes: tuple[Pass, ...]

    @property
    def tokens(self) -> int:
        return self.passes[0].tokens

    @property
    def is_prefill(self) -> bool:
        """Whether it handles tokens of the prompt: the first chunk of it, or a later one."""
        return self.name.startswith("prefill")

    @property
    def is_first(self) -> bool:
        """Whether nothing was copied for it before: the call begins with it."""
        return self.name == "prefill"


def steps_of(graph: LayerGraph, workload: Workload) -> tuple[Step, ...]:
    """Return the prefill and, where there is one, the mean decode step, as much of each as the objective counts.

    Of a prefill in chunks the first is a step, the mean of the other whole ones, and what is left of the prompt.
    """
    steps = workload.decode_steps if graph.decode_passes else 0
    prefill, decode = 1, steps
    if workload.objective == "ttft" or (workload.objective == "tpot" and not steps):
        prefill, decode = 1, 0
    elif workload.objective == "tpot":
        prefill, decode = 0, 1
    found = [Step("prefill", prefill, 1, graph.prefill_passes[:1])]
    later = graph.prefill_passes[1:]
    if whole := tuple(entry for entry in later if entry.name != "prefill_rest"):
        count = max(1, chunks_of(graph, workload).whole - 1)
        found.append(Step("prefill_next", prefill * count, count, whole))
    if rest := tuple(entry for entry in later if entry.name == "prefill_rest"):
        found.append(Step("prefill_rest", prefill, 1, rest))
    if steps:
        found.append(Step("decode", decode, steps, graph.decode_passes))
    return tuple(found)


def step_compute_ns(graph: LayerGraph, step: Step, index: int, device: Device, dtype: str) -> int:
    """Return the mean time of layer `index` over a step's passes, in ns."""
    tokens = step.tokens * graph.batch_size
    times = [
        layer_ns(graph, index, entry.per_layer()[index], device, tokens=tokens, dtype=dtype, prefill=step.is_prefill)
        for entry in step.passes
    ]
    return sum(times) // len(times)


def cache_ns(hardware: Hardware, step: Step, index: int, device: str) -> tuple[int, int]:
    """Return the mean time over a step's passes of copies of a layer's cache from and to host memory, in ns: what its
    computing waits for, and what its link is busy with on the way to the device.
    """
    spans = [entry.per_layer()[index] for entry in step.passes]
    waited = sum(waited_ns(hardware, span, device) for span in spans)
    return waited // len(spans), sum(up_ns(hardware, span, device) for span in spans) // len(spans)


@dataclass(slots=True)
class Lane:
    """What one device does in one step, in ns.

    blocks: how many of its layers may have something to stream; apart: what the others compute, of `computing`.
    smallest: the least copy of a whole group, from host memory, or to a CPU from disk. cache: copies of keys and values
    from host memory. slows: what copies of whole groups take from a CPU that reads all the while; slowed: what the
    CPU's experts take longer where copies go on all the while.
    """

    blocks: int = 0
    apart: int = 0
    computing: int = 0
    on_demand: int = 0
    groups: int = 0
    smallest: int = 0
    cache: int = 0
    slows: int = 0
    slowed: int = 0

    @property
    def contention(self) -> int:
        """What copies and the CPU's experts each take longer for as long as both go on."""
        return min(self.slows, self.slowed)

    def busy_ns(self, slots: int, *, first: bool) -> int:
        """Return how long the pass stands at this device. first: no copy was begun before it.

        slots: 0 where mapped files are read ahead and nothing is begun before the pass.
        """
        hidden = 0 if first else slots * self.smallest
        exposed = max(0, self.groups + self.contention - hidden)
        serial = self.computing + self.on_demand + self.contention
        if slots != 1 and not (self.on_demand and self.groups):
            beside = self.apart - (-(serial - self.apart) // max(self.blocks, 1))
            begins = serial if slots else serial + self.smallest
            return max(begins, exposed + self.cache + beside) if exposed else serial
        return serial + exposed

    def least_ns(self, slots: int) -> int:
        """Return what no pass is shorter than because of this device's link."""
        copies = self.groups + self.contention + self.on_demand + self.cache
        return copies + self.computing if slots == 1 and self.groups else copies


def lanes_of(
    graph: LayerGraph, hardware: Hardware, step: Step, placements: Sequence[Placement], dtype: str
) -> dict[str, Lane]:
    """Return what every device does in one step."""
    run_on = {placement.layer: placement.run_on for placement in placements}
    offloads = is_on_host(graph)
    lanes: dict[str, Lane] = {}
    for index, layer in enumerate(graph.layers):
        lane = lanes.setdefault(run_on[layer.name], Lane())
        taken = step_compute_ns(graph, step, index, hardware.device(run_on[layer.name]), dtype)
        if offloads:
            waited, busy = cache_ns(hardware, step, index, run_on[layer.name])
            taken += waited
            lane.cache += busy
        lane.computing += taken
        if is_block(graph, index):
            lane.blocks += 1
        else:
            lane.apart += taken
    tokens = step.tokens * graph.batch_size
    for placement, group in with_groups(graph, placements):
        waiting = waiting_slices(placement, group)
        if waiting == 0:
            continue
        home, name, memory = placement.home, placement.run_on, placement.memory
        lane = lanes[name]
        if memory != "disk" and tokens <= placement.cpu_up_to_tokens:
            alone, beside = (
                waiting_cpu_ns(
                    hardware, group, home, name, waiting=waiting, tokens=tokens, dtype=dtype, beside_copies=copies
                )
                for copies in (False, True)
            )
            lane.computing += alone
            lane.slowed += beside - alone
            continue
        copies = waiting_copy_ns(hardware, group, home, name, memory, waiting=waiting, tokens=tokens)
        if reads_rows(hardware, group, name, memory):
            lane.computing += copies
        elif is_prefetched(group):
            lane.groups += copies
            lane.slows += slows_ns(hardware, group, name)
            smallest = smallest_copy_ns(hardware, group, name)
            lane.smallest = min(smallest, lane.smallest) if lane.smallest else smallest
        else:
            lane.on_demand += copies
    return lanes


def is_block(graph: LayerGraph, index: int) -> bool:
    """Tell whether a layer has weights that may wait elsewhere."""
    return any(group.streamable for group in graph.kind_of(index).groups)


def smallest_copy_ns(hardware: Hardware, group: WeightGroup, device: str) -> int:
    """Return the time of a whole group's copy from host memory, the least that hiding it behind others can save; to a
    CPU from disk.
    """
    host = hardware.host(device)
    if device == host:
        return once_ns(hardware, group, hardware.disk(device), device, "disk")
    return copy_ns(hardware, host, device, "pinned", group.slice_slab_bytes)


def step_ns(
    graph: LayerGraph,
    hardware: Hardware,
    step: Step,
    placements: Sequence[Placement],
    slots: Sequence[Slots],
    dtype: str,
) -> int:
    """Return the time of one pass, in ns."""
    given = {entry.device: entry.count for entry in slots if entry.holds == "groups"}
    lanes = lanes_of(graph, hardware, step, placements, dtype)
    counts = {name: slot_count(hardware.device(name), given.get(name, SLOT_COUNT)) for name in lanes}
    run_on = {placement.layer: placement.run_on for placement in placements}
    moves = transfers(graph, [run_on[layer.name] for layer in graph.layers])
    total = sum(move.ns(hardware, prefill=step.is_prefill) for move in moves)
    total += sum(lane.busy_ns(counts[name], first=step.is_first) for name, lane in lanes.items())
    return max([total, *(lane.least_ns(counts[name]) for name, lane in lanes.items())])


def objective_ns(
    graph: LayerGraph,
    hardware: Hardware,
    workload: Workload,
    placements: Sequence[Placement],
    slots: Sequence[Slots],
) -> int:
    """Return the cost of a placement under the cost model, in ns: what the planner makes least."""
    dtype = weight_dtype(graph)
    return sum(
        step.weight * step_ns(graph, hardware, step, placements, slots, dtype)
        for step in steps_of(graph, workload)
        if step.weight
    )

"""The most memory that loading takes: what stays, what it is read through, and what the model already held.

`dispatch.apply` allocates, in this order: slots and staging; a buffer for each reader, where bytes cannot be read to
where they belong; everything that stays; and it frees the buffers when all is read. No other memory is taken, so the
peak is their sum, whatever the readers do at once. `dispatch` reads the constants here; nothing here reads `dispatch`.
"""

from __future__ import annotations

from collections.abc import Iterator

from planner.graph import SLAB_ALIGNMENT_BYTES, LayerGraph, Tensor, WeightGroup, full_name
from planner.memory import (
    ALLOCATOR_BYTES,
    Usage,
    allocation_bytes,
    slot_kind,
    waiting_slices,
    with_groups,
)
from planner.plan import Placement, Plan
from planner.units import KIB, MIB, format_bytes, round_up

# Reads of the checkpoint in flight at once.
READERS = 4
# The most that one reader holds of what it cannot read to where it belongs: bytes for a GPU, or of another dtype.
BUFFER_BYTES = 8 * MIB
# What comparing stored bytes takes.
COMPARE_BYTES = 128 * KIB
# Parts of a buffer start at multiples of this: the itemsize of the widest dtype that is converted.
BUFFER_ALIGNMENT_BYTES = 8


def buffer_bytes(elements: int, stored_item_bytes: int, item_bytes: int | None) -> int:
    """Return the buffer that reading so many elements wants, in bytes; it gets no more than BUFFER_BYTES.

    item_bytes: of what they are converted to inside the buffer, on their way to a GPU; None where they are not.
    """
    read = elements * stored_item_bytes
    whole = read if item_bytes is None else round_up(read, BUFFER_ALIGNMENT_BYTES) + elements * item_bytes
    return min(whole, BUFFER_BYTES)


def load_peak(plan: Plan) -> dict[str, Usage]:
    """Return the most that every memory but the disk holds while `dispatch.apply` runs.

    Hosts ("cpu"): bytes requested, exactly; buffers are its `workspace`, staging counts as slots, and a model that was
    given with its weights in memory counts whole, for it stays until all is copied. GPUs: device-used bytes (context,
    allocations rounded, begun segments), without the matmul library's workspace, which comes with the first matmul.
    Not counted: headers and other Python objects, the page cache of mapped files, and COMPARE_BYTES before anything is
    loaded, where tied weights are stored twice or a loaded model is compared with the files that it is to wait in.
    """
    hardware = plan.hardware
    kept: dict[str, int] = {pool.name: 0 for pool in hardware.pools if pool.name != hardware.disk(pool.name)}
    slots = dict(kept)
    for name, nbytes in _kept(plan):
        kept[name] += allocation_bytes(nbytes, plan.hardware.device(name))
    for name, nbytes in _slots(plan):
        slots[name] += allocation_bytes(nbytes, plan.hardware.device(name))
    used = {placement.run_on for placement in plan.placements}
    result = {}
    for name in kept:
        device = plan.hardware.device(name)
        on_gpu = device.kind != "cpu" and name in used
        result[name] = Usage(
            weights=kept[name],
            slots=slots[name],
            workspace=ALLOCATOR_BYTES if on_gpu else 0,
            context=device.context_bytes if on_gpu else 0,
        )
    buffers = max(_preparing_bytes(plan), _prefetching_bytes(plan))
    for name in {plan.hardware.host(device) for device in used}:
        host = result[name]
        result[name] = Usage(weights=host.weights, slots=host.slots, workspace=buffers)
    return result


def kept_bytes(plan: Plan) -> dict[str, int]:
    """Return what loading asks of every memory and keeps, slots included, in bytes; of GPUs that is all of tensors
    before a call.
    """
    result: dict[str, int] = {}
    for name, nbytes in (*_kept(plan), *_slots(plan)):
        result[name] = result.get(name, 0) + nbytes
    return result


def load_peak_bytes(plan: Plan) -> dict[str, int]:
    """Return the totals of `load_peak` by memory, in bytes."""
    return {name: usage.total for name, usage in sorted(load_peak(plan).items())}


def read_bytes(plan: Plan) -> int:
    """Return what loading reads from the checkpoint's files, in bytes as they are stored; what stays there is not."""
    tied = plan.graph.tied_to_earlier()
    total = 0
    for placement, group in with_groups(plan.graph, plan.placements):
        waiting = waiting_slices(placement, group) if placement.memory == "disk" else 0
        for tensor in group.tensors:
            if tensor.persistent and full_name(placement.layer, tensor.name) not in tied:
                total += tensor.stored_bytes * (group.slices - waiting) // group.slices
    return total + sum(tensor.stored_bytes for tensor in plan.graph.loose if tensor.persistent)


def read_ns(plan: Plan) -> int:
    """Return the time that reading takes at the disk's rate; of several nodes, as if the first one read it all."""
    first = plan.run_on()[0]
    disk = plan.hardware.link(plan.hardware.disk(first), plan.hardware.host(first))
    return read_bytes(plan) * 10**9 // disk.bytes_per_s


def shortage(plan: Plan) -> str | None:
    """Return in words that loading needs more host memory than there is, or None."""
    peaks = load_peak(plan)
    over = {
        host.name: peaks[host.name].total - plan.hardware.pool(host.name).usable_bytes for host in plan.hardware.hosts
    }
    name = max(over, key=over.__getitem__)
    if over[name] <= 0:
        return None
    needed, usable = peaks[name].total, plan.hardware.pool(name).usable_bytes
    advice = "dispatch a model on meta, from its checkpoint" if plan.model.loaded else "give more --ram"
    return (
        f"LOADING DOES NOT FIT: it needs {format_bytes(needed)} of host memory at its peak and has "
        f"{format_bytes(usable)}, {format_bytes(needed - usable)} too little; {advice}"
    )


def _on_host(placement: Placement) -> bool:
    """Tell whether a group is computed with on its node's CPU."""
    return placement.run_on.endswith("cpu")


def _target(device: str) -> str:
    """Return the GPU that bytes are read for, or "" for a host."""
    return "" if device.endswith("cpu") else device


def resident_ties(graph: LayerGraph, placements: tuple[Placement, ...]) -> dict[str, str]:
    """Return {tensor: the earlier one that it shares memory with} of tied tensors that stay on one device: these are
    loaded once.
    """
    stays = {
        full_name(placement.layer, tensor.name): placement.run_on
        for placement, group in with_groups(graph, placements)
        if waiting_slices(placement, group) == 0
        for tensor in group.tensors
    }
    result: dict[str, str] = {}
    for names in graph.ties:
        first: dict[str, str] = {}
        for _, _, name, _ in graph.tensors():
            if name in names and name in stays and first.setdefault(stays[name], name) != name:
                result[name] = first[stays[name]]
    return result


def _kept(plan: Plan) -> Iterator[tuple[str, int]]:
    """Yield (memory, bytes) of every allocation that lasts beyond loading, slots apart, and of what was given."""
    shared = resident_ties(plan.graph, plan.placements)
    loaded = plan.model.loaded
    for placement, group in with_groups(plan.graph, plan.placements):
        on_cpu = _on_host(placement)
        waiting = waiting_slices(placement, group)
        tensors = [t for t in group.tensors if f"{placement.layer}.{t.name}" not in shared]
        if waiting == 0 and on_cpu:
            # Of a loaded model they stay where they are.
            yield from ((placement.run_on, tensor.nbytes) for tensor in tensors if not loaded)
        elif waiting == 0:
            yield placement.run_on, _slab_bytes(tensors, 1)
        elif on_cpu and group.slices == 1:
            continue  # used from the mapped file
        else:
            moved = [tensor for tensor in tensors if not tensor.buffer] if group.slices == 1 else tensors
            each = _slab_bytes(moved, group.slices)
            yield from ((placement.run_on, each) for _ in range(group.slices - waiting))
            if placement.memory in ("pinned", "pageable"):
                yield from ((placement.home, each) for _ in range(waiting))
            if group.slices == 1 and not (on_cpu and loaded):
                yield from ((placement.run_on, tensor.nbytes) for tensor in tensors if tensor.buffer)
    first = plan.run_on()[0]
    host = plan.hardware.host(first)
    if first != host or not loaded:
        yield from ((first, tensor.nbytes) for tensor in plan.graph.loose)
    if loaded:
        yield host, plan.graph.weight_bytes
    else:
        # What no checkpoint holds is computed on the host, and kept there.
        for placement, group in with_groups(plan.graph, plan.placements):
            if not _on_host(placement):
                yield from (
                    (plan.hardware.host(placement.run_on), tensor.nbytes)
                    for tensor in group.tensors
                    if not tensor.persistent
                )
        if first != host:
            yield from ((host, tensor.nbytes) for tensor in plan.graph.loose if not tensor.persistent)


def _slots(plan: Plan) -> Iterator[tuple[str, int]]:
    """Yield (memory, bytes) of every slot, and of the host memory that reads from disk pass through to a GPU."""
    staged = {
        (placement.run_on, slot_kind(group))
        for placement, group in with_groups(plan.graph, plan.placements)
        if placement.memory == "disk" and not _on_host(placement)
    }
    for entry in plan.slots:
        yield from ((entry.device, entry.slot_bytes) for _ in range(entry.count))
        if (entry.device, entry.holds) in staged:
            yield from ((plan.hardware.host(entry.device), entry.slot_bytes) for _ in range(entry.count))


def _slab_bytes(tensors: list[Tensor], slices: int) -> int:
    return sum(round_up(tensor.nbytes // slices, SLAB_ALIGNMENT_BYTES) for tensor in tensors)


def _preparing_bytes(plan: Plan) -> int:
    """Return the buffers of all readers while what stays is loaded: as large as the largest read that needs one."""
    if plan.model.loaded:
        return 0
    most = 0
    for placement, group in with_groups(plan.graph, plan.placements):
        waiting = waiting_slices(placement, group)
        sliced = waiting > 0 and group.slices > 1
        for tensor in group.tensors:
            if waiting < group.slices or (tensor.buffer and not _on_host(placement)):
                most = max(most, _buffer_bytes(tensor, group, _target(placement.run_on), sliced=sliced))
            if waiting and placement.memory in ("pinned", "pageable"):
                most = max(most, _buffer_bytes(tensor, group, "", sliced=sliced))
    first = plan.run_on()[0]
    for tensor in plan.graph.loose:
        most = max(most, _buffer_bytes(tensor, None, _target(first), sliced=False))
    return READERS * most


def _prefetching_bytes(plan: Plan) -> int:
    """Return the buffer of the first reads from disk into slots: one at a time, and only of what is converted."""
    return max(
        (
            _buffer_bytes(tensor, group, "", sliced=group.slices > 1)
            for placement, group in with_groups(plan.graph, plan.placements)
            if placement.memory == "disk" and waiting_slices(placement, group) and group.slices == 1
            if not _on_host(placement)
            for tensor in group.tensors
        ),
        default=0,
    )


def _buffer_bytes(tensor: Tensor, group: WeightGroup | None, target: str, *, sliced: bool) -> int:
    """Return the buffer that reading a tensor (or one slice of it) into a memory takes; 0 where it needs none."""
    if not tensor.persistent or tensor.nbytes == 0:
        return 0
    elements, stored_item = _largest_read(tensor, group, sliced=sliced)
    if target:
        return buffer_bytes(elements, stored_item, _item_bytes(tensor) if tensor.is_converted else None)
    if tensor.is_converted or (tensor.stored is not None and not tensor.stored.in_place):
        return buffer_bytes(elements, stored_item, None)
    return 0


def _largest_read(tensor: Tensor, group: WeightGroup | None, *, sliced: bool) -> tuple[int, int]:
    """Return (elements, bytes of a stored element) of the largest piece that is read at once."""
    if tensor.stored is None:
        slices = group.slices if group is not None and sliced else 1
        return tensor.elements // slices, _item_bytes(tensor)
    stored = tensor.stored
    item = stored.item_bytes
    elements = stored.largest_bytes // item
    if sliced and group is not None and stored.pieces < group.slices:
        elements = elements * stored.pieces // group.slices
    return elements, item


def _item_bytes(tensor: Tensor) -> int:
    return tensor.nbytes // max(1, tensor.elements)

"""What torch.cuda.memory._snapshot() recorded, as steps that our model of the allocator can take and be held against.

Pure Python: a recording made on a GPU machine is replayed anywhere. Every step is checked by its address. The driver's
choices are the one input: the address of each new segment is taken from the recording.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, cast

from planner.cuda_allocator import (
    BlockView,
    CachingAllocator,
    Options,
    OutOfDeviceMemory,
    PoolName,
    SegmentView,
)

Action: TypeAlias = Literal["alloc", "free", "empty_cache", "oom"]

# Our counter: the name in torch.cuda.memory_stats().
STATS = {
    **{f"{name}_bytes": f"{name}_bytes.all.current" for name in ("requested", "allocated", "reserved")},
    **{f"peak_{name}_bytes": f"{name}_bytes.all.peak" for name in ("requested", "allocated", "reserved")},
    "inactive_split_bytes": "inactive_split_bytes.all.current",
    "peak_inactive_split_bytes": "inactive_split_bytes.all.peak",
    "retries": "num_alloc_retries",
}


class UnsupportedSnapshot(Exception):  # noqa: N818  a statement about the snapshot, which is no error in itself
    """The snapshot shows something that the model leaves out: private pools, or frees delayed by `record_stream`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One call of the allocator.

    address: what "alloc" returned or "free" was given; 0 for the others.
    nbytes: what was asked for, in "alloc"; the rounded size, in "oom"; else 0.
    placed: where the driver put the memory that was taken on the way.
    """

    action: Action
    address: int = 0
    nbytes: int = 0
    stream: int = 0
    placed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One process's allocations from its first on, and the state that they led to.

    stats: counters by our names.
    """

    name: str
    options: Options
    steps: tuple[Step, ...]
    segments: tuple[SegmentView, ...]
    stats: Mapping[str, int]


def steps_of(trace: Iterable[Mapping[str, Any]]) -> tuple[Step, ...]:
    """Return the steps in one device's list under "device_traces".

    Freed segments show as one "empty_cache", whether the program called it or a full device did.

    Raises:
        UnsupportedSnapshot: private pools, or a free that was delayed.
    """
    return tuple(_steps(trace))


def _steps(trace: Iterable[Mapping[str, Any]]) -> Iterator[Step]:
    placed: list[int] = []
    freeing: int | None = None
    emptying = False
    for entry in trace:
        action = entry["action"]
        if tuple(entry.get("pool_id", (0, 0))) != (0, 0):
            raise UnsupportedSnapshot(f"{action} in the private pool {entry['pool_id']}")
        if freeing is not None and (action != "free_completed" or entry["addr"] != freeing):
            raise UnsupportedSnapshot(f"the free of {freeing:#x} was delayed")
        if action in ("segment_free", "segment_unmap"):
            if not emptying:
                yield Step(action="empty_cache")
            emptying = True
            continue
        emptying = False
        if action == "alloc":
            yield _alloc(entry, tuple(placed))
            placed = []
        elif action == "free_requested":
            freeing = entry["addr"]
        elif action == "free_completed":
            if freeing is None:
                raise UnsupportedSnapshot(f"the free of {entry['addr']:#x} was delayed")
            yield Step(action="free", address=entry["addr"])
            freeing = None
        elif action in ("segment_alloc", "segment_map"):
            placed.append(entry["addr"])
        elif action == "oom":
            yield Step(action="oom", nbytes=entry["size"], stream=entry["stream"], placed=tuple(placed))
            placed = []


def _alloc(entry: Mapping[str, Any], placed: tuple[int, ...]) -> Step:
    return Step(action="alloc", address=entry["addr"], nbytes=entry["size"], stream=entry["stream"], placed=placed)


def segments_of(segments: Iterable[Mapping[str, Any]]) -> tuple[SegmentView, ...]:
    """Return the list under "segments", of one device, by address.

    Raises:
        UnsupportedSnapshot: private pools, or blocks whose free was delayed.
    """
    found = []
    for segment in segments:
        if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0):
            raise UnsupportedSnapshot(f"a segment of the private pool {segment['segment_pool_id']}")
        found.append(
            SegmentView(
                address=segment["address"],
                size=segment["total_size"],
                stream=segment["stream"],
                pool=cast(PoolName, segment["segment_type"]),
                expandable=segment.get("is_expandable", False),
                blocks=tuple(_block_of(block) for block in segment["blocks"]),
            )
        )
        if found[-1].allocated_bytes != segment["allocated_size"]:
            raise UnsupportedSnapshot(f"the blocks of segment {segment['address']:#x} do not make up its sums")
    return tuple(sorted(found, key=lambda segment: segment.address))


def _block_of(block: Mapping[str, Any]) -> BlockView:
    state = block["state"]
    if state not in ("active_allocated", "inactive"):
        raise UnsupportedSnapshot(f"block {block['address']:#x} is {state}")
    requested = block["requested_size"] if state == "active_allocated" else None
    return BlockView(address=block["address"], size=block["size"], requested_bytes=requested)


def recording_of(
    snapshot: Mapping[str, Any],
    stats: Mapping[str, int],
    *,
    name: str,
    options: Options,
    device: int = 0,
) -> Recording:
    """Return what `_snapshot()` and `memory_stats()` hold of a process that recorded from its first allocation on.

    Raises:
        UnsupportedSnapshot: private pools, or frees delayed by `record_stream`.
    """
    return Recording(
        name=name,
        options=options,
        steps=steps_of(snapshot["device_traces"][device]),
        segments=segments_of(s for s in snapshot["segments"] if s.get("device", device) == device),
        stats={ours: stats.get(theirs, 0) for ours, theirs in STATS.items()},
    )


def differences(recording: Recording, *, most: int = 10) -> list[str]:
    """Return where our allocator parts from the recording, in words; empty where it does not.

    Stops at the first step that differs, for all after it would.
    """
    placed: list[int] = []

    def place(_: int) -> int:
        return placed.pop(0)

    allocator = CachingAllocator(recording.options, place=place)
    for number, step in enumerate(recording.steps):
        placed[:] = step.placed
        fault = _take(allocator, step, full_device=recording.options.capacity_bytes is not None)
        if not fault and placed and not recording.options.expandable_segments:
            fault = "took cached memory where torch took a segment"
        if fault:
            return [f"step {number}, {step}: {fault}"]
    found = []
    ours = {segment.address: segment for segment in allocator.segments()}
    theirs = {segment.address: segment for segment in recording.segments}
    found += [
        f"segment {address:#x}: {ours.get(address)} here, {theirs.get(address)} there"
        for address in sorted(ours.keys() | theirs.keys())
        if ours.get(address) != theirs.get(address)
    ]
    counted = asdict(allocator.counters())
    found += [
        f"{name}: {counted[name]} here, {value} there"
        for name, value in recording.stats.items()
        if counted[name] != value
    ]
    return found[:most]


def _take(allocator: CachingAllocator, step: Step, *, full_device: bool) -> str | None:
    """Take one step, and return what is wrong with its outcome."""
    try:
        if step.action in ("alloc", "oom"):
            address = allocator.allocate(step.nbytes, step.stream)
            if step.action == "oom":
                return "took cached memory where torch found none"
            return None if address == step.address else f"returned {address:#x}" if address else "returned nothing"
        if step.action == "free":
            allocator.free(step.address)
        elif not full_device:
            # With a capacity the model gives back by itself; a recording with one never empties the cache by a call.
            allocator.empty_cache()
    except OutOfDeviceMemory as error:
        return None if step.action == "oom" else str(error)
    except IndexError:
        theirs = "found none" if step.action == "oom" else "took cached memory"
        return f"took a segment where torch {theirs}"
    except ValueError as error:
        return str(error)
    return None


def to_json(recording: Recording) -> dict[str, Any]:
    """Return a compact form for `json.dump`; `from_json` reads it."""
    return {
        "name": recording.name,
        "options": asdict(recording.options),
        "stats": dict(recording.stats),
        "steps": [[s.action, s.address, s.nbytes, s.stream, list(s.placed)] for s in recording.steps],
        "segments": [
            [s.address, s.size, s.stream, s.pool, s.expandable, [[b.size, b.requested_bytes] for b in s.blocks]]
            for s in recording.segments
        ],
    }


def from_json(data: Mapping[str, Any]) -> Recording:
    """Return the recording that `to_json` wrote."""
    segments = []
    for address, size, stream, pool, expandable, blocks in data["segments"]:
        views, at = [], address
        for length, requested in blocks:
            views.append(BlockView(address=at, size=length, requested_bytes=requested))
            at += length
        segments.append(
            SegmentView(
                address=address, size=size, stream=stream, pool=pool, expandable=expandable, blocks=tuple(views)
            )
        )
    return Recording(
        name=data["name"],
        options=Options(**data["options"]),
        steps=tuple(
            Step(action=action, address=address, nbytes=nbytes, stream=stream, placed=tuple(placed))
            for action, address, nbytes, stream, placed in data["steps"]
        ),
        segments=tuple(segments),
        stats=data["stats"],
    )

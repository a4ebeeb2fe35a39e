"""What one model takes on one device, before it runs: every counter, for the prefill, each decode step and the peak."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

from planner.cuda_allocator import CachingAllocator
from planner.lifetimes import Event
from planner.recorder import Run
from planner.trace import TracedPass, Tracing

# Decode steps that are traced at most to find where memory does not grow evenly; between them it is interpolated.
_MOST_TRACED_STEPS = 16
# Events that are replayed at most by the allocator's model; of a longer answer, steps are left out evenly.
_MOST_EVENTS = 400_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Bytes requested at the instant when most are, by what they are for; they add up to that most.

    scratch: taken and given back by kernels. library: workspaces that libraries take once and keep.
    """

    weights: int
    kv_cache: int
    activations: int
    scratch: int
    library: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations + self.scratch + self.library


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseMemory:
    """The most bytes at once in one phase, by counter. The caller's own inputs are in none of them.

    operator_output_bytes: tensors that operators made, cache included; without weights, scratch and workspaces.
    requested_bytes: what was asked for, with weights, scratch and workspaces; `parts` says what for.
    allocated_bytes: after the allocator's rounding and splitting (`torch.cuda.max_memory_allocated`); None on the CPU.
    reserved_bytes: taken from the driver (`torch.cuda.max_memory_reserved`); None on the CPU.
    """

    operator_output_bytes: int
    requested_bytes: int
    allocated_bytes: int | None
    reserved_bytes: int | None
    parts: Parts


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPrediction:
    """What a model takes on one device.

    weight_bytes: parameters and buffers, ties once; part of every requested, allocated and reserved figure.
    decode: one entry for each further token. peak: each counter's greatest, with the parts of the greatest request.
    device_used_bytes: reserved at the peak, and the CUDA context; None on the CPU.
    expected_peak: the mean over drawn routings, where memory depends on the routing (the others are at the worst).
    traced_steps: decode steps that were traced; those between are interpolated.
    unmodelled: operators whose scratch is not modelled. assumptions: in words.
    """

    model: str
    device: str
    attention: str | None
    experts: str | None
    weight_bytes: int
    prefill: PhaseMemory
    decode: tuple[PhaseMemory, ...]
    peak: PhaseMemory
    device_used_bytes: int | None
    expected_peak: PhaseMemory | None
    traced_steps: tuple[int, ...]
    unmodelled: tuple[str, ...]
    assumptions: tuple[str, ...]


def phase_of(entry: TracedPass, weight_bytes: int) -> PhaseMemory:
    """Return what one pass holds at most, by playing its events."""
    cache = entry.run.cache_blocks
    held = {
        "kv_cache": entry.cached_bytes,
        "activations": entry.held_bytes,
        "scratch": entry.scratch_bytes,
        "library": entry.library_bytes,
    }
    made = most_made = entry.cached_bytes + entry.held_bytes
    asked = most_asked = made + entry.scratch_bytes + entry.library_bytes
    at_most = dict(held)
    for event in entry.events:
        kind = event.kind if event.kind != "activations" or event.block not in cache else "kv_cache"
        held[kind] += event.nbytes
        asked += event.nbytes
        if kind in ("kv_cache", "activations"):
            made += event.nbytes
            most_made = max(most_made, made)
        if asked > most_asked:
            most_asked, at_most = asked, dict(held)
    return PhaseMemory(
        operator_output_bytes=most_made,
        requested_bytes=most_asked + weight_bytes,
        allocated_bytes=None,
        reserved_bytes=None,
        parts=Parts(weights=weight_bytes, **at_most),
    )


def phases(tracing: Tracing, weight_bytes: int) -> tuple[list[PhaseMemory], tuple[int, ...]]:
    """Return every phase of a workload, prefill first, and which of them were traced.

    Of a prefill in chunks each counter's greatest. Steps between two traced ones are interpolated once a step traced in
    their middle lies on the line.
    """
    chunks = tracing.inputs.chunks
    last = chunks.count - 1
    count = tracing.inputs.steps - last
    prefill = [phase_of(tracing.step(n), weight_bytes) for n in chunks.numbers() if n is not None]
    recorded = range(1, len(tracing.first.passes) - len(chunks.sizes()) + 1)
    known = {0: peak_of(prefill), **{n: phase_of(tracing.step(last + n), weight_bytes) for n in recorded}}
    budget = _MOST_TRACED_STEPS

    def traced(number: int) -> PhaseMemory:
        nonlocal budget
        if number not in known:
            budget -= 1
            known[number] = phase_of(tracing.step(last + number), weight_bytes)
        return known[number]

    open_spans = []
    if count > len(known):
        start = len(known) - 1
        traced(count - 1)
        open_spans.append((start, count - 1))
    while open_spans and budget > 0:
        low, high = open_spans.pop(0)
        if high - low < 2:
            continue
        middle = (low + high) // 2
        if traced(middle) != _between(known[low], known[high], middle - low, high - low):
            open_spans += [(low, middle), (middle, high)]
    steps = sorted(known)
    result = [known[0]]
    for low, high in itertools.pairwise(steps):
        result += [_between(known[low], known[high], n, high - low) for n in range(1, high - low)]
        result.append(known[high])
    return result, tuple(steps[1:])


def _between(low: PhaseMemory, high: PhaseMemory, part: int, of: int) -> PhaseMemory:
    def mix(one: int, two: int) -> int:
        return one + (two - one) * part // of

    parts = Parts(**{f.name: mix(getattr(low.parts, f.name), getattr(high.parts, f.name)) for f in fields(Parts)})
    return PhaseMemory(
        operator_output_bytes=mix(low.operator_output_bytes, high.operator_output_bytes),
        requested_bytes=mix(low.requested_bytes, high.requested_bytes),
        allocated_bytes=None,
        reserved_bytes=None,
        parts=parts,
    )


def peak_of(entries: Sequence[PhaseMemory]) -> PhaseMemory:
    """Return each counter's greatest, with the parts of the greatest request."""
    most = max(entries, key=lambda entry: entry.requested_bytes)
    allocated = [entry.allocated_bytes for entry in entries if entry.allocated_bytes is not None]
    reserved = [entry.reserved_bytes for entry in entries if entry.reserved_bytes is not None]
    return replace(
        most,
        operator_output_bytes=max(entry.operator_output_bytes for entry in entries),
        allocated_bytes=max(allocated, default=None),
        reserved_bytes=max(reserved, default=None),
    )


def mean_of(entries: Sequence[PhaseMemory]) -> PhaseMemory:
    """Return the mean of every figure, rounded up."""

    def mean(values: Iterable[int]) -> int:
        listed = list(values)
        return -(-sum(listed) // len(listed))

    return PhaseMemory(
        operator_output_bytes=mean(entry.operator_output_bytes for entry in entries),
        requested_bytes=mean(entry.requested_bytes for entry in entries),
        allocated_bytes=None,
        reserved_bytes=None,
        parts=Parts(**{f.name: mean(getattr(entry.parts, f.name) for entry in entries) for f in fields(Parts)}),
    )


def on_cuda(tracing: Tracing, entries: Sequence[PhaseMemory], weights: Iterable[int]) -> list[PhaseMemory]:
    """Return the phases with what torch's caching allocator makes of them: allocated and reserved bytes.

    weights: bytes of every weight, in the order in which they are put on the device, each an allocation of its own.
    """
    allocator = CachingAllocator()
    for nbytes in weights:
        allocator.allocate(nbytes)
    addresses: dict[int, int] = {}
    result = list(entries)
    last = (0, 0)
    for number, events in stream(tracing):
        allocator.reset_peaks()
        for event in events:
            if event.nbytes > 0:
                address = allocator.allocate(event.nbytes)
                assert address is not None
                addresses[event.block] = address
            elif event.block in addresses:
                allocator.free(addresses.pop(event.block))
        counters = allocator.counters()
        before = last if number == 0 else (0, 0)
        last = (max(before[0], counters.peak_allocated_bytes), max(before[1], counters.peak_reserved_bytes))
        result[number] = replace(entries[number], allocated_bytes=last[0], reserved_bytes=last[1])
    for number in reversed(range(len(result))):
        # A step that was left out is no larger than the next one that was not.
        entry = result[number]
        if entry.allocated_bytes is None:
            result[number] = replace(entry, allocated_bytes=last[0], reserved_bytes=last[1])
        else:
            last = (entry.allocated_bytes, entry.reserved_bytes or 0)
    return result


def stream(tracing: Tracing, *, most_events: int = _MOST_EVENTS) -> Iterator[tuple[int, list[Event]]]:
    """Yield (phase, events of a forward call) of a whole workload, as one stream whose blocks live on.

    Phase 0 is the prefill, of one call or of several chunks; each further one a decode step. After the first calls each
    does what the one before did, with blocks that grow evenly up to the last one traced; so do chunks in the middle.
    """
    run, chunks = tracing.first, tracing.inputs.chunks
    last, recorded = chunks.count - 1, len(chunks.sizes()) - 1
    fresh = itertools.count(-1, -1)
    calls = [_labelled(run, run.events[entry.start : entry.end]) for entry in run.passes]
    for index, events in enumerate(calls):
        number = max(0, index - recorded)
        if index <= recorded and chunks.numbers()[index] is None:
            # One call that stands for many chunks: they come one by one, and the last of them has its blocks.
            for between in _middle(calls[index - 3 : index + 1], chunks.count - recorded, fresh, most_events):
                yield number, between
        else:
            yield number, events
    done = len(run.passes) - recorded
    count = tracing.inputs.steps - last
    if count <= done:
        return
    before, after = calls[-2:]
    if not _alike(before, after):
        return
    end = tracing.step(last + count - 1)
    final = _labelled(end.run, end.events)
    ahead = count - done
    if _alike(after, final):
        growth = [(late.nbytes - early.nbytes) / ahead for early, late in zip(after, final, strict=True)]
    else:
        growth = [float(two.nbytes - one.nbytes) for one, two in zip(before, after, strict=True)]
    stride = max(1, ahead * len(after) // most_events)
    numbers = [*range(done, count - 1, stride), count - 1]
    onward = _onward(before, after, growth, [number - done + 1 for number in numbers], fresh)
    yield from zip(numbers, onward, strict=True)


def _middle(
    calls: Sequence[Sequence[Event]], count: int, fresh: Iterator[int], most_events: int
) -> Iterator[list[Event]]:
    """Yield the events of `count` chunks that follow three recorded ones; the fourth of `calls` stands for all of them.

    The third hands over to a longer one, so that only its blocks count. Where the fourth does not do what the others
    do, it is taken for one chunk as it is.
    """
    before, after, since, standing = calls
    if not (_alike(before, after) and _alike(after, since) and _alike(after, standing)):
        yield list(standing)
        return
    growth = [float(two.nbytes - one.nbytes) for one, two in zip(before, after, strict=True)]
    stride = max(1, count * len(after) // most_events)
    aheads = [*range(2, count + 1, stride), count + 1]
    yield from _onward(before, after, growth, aheads, fresh, since=since, into=standing)


def _onward(
    before: Sequence[Event],
    after: Sequence[Event],
    growth: Sequence[float],
    aheads: Sequence[int],
    fresh: Iterator[int],
    *,
    since: Sequence[Event] | None = None,
    into: Sequence[Event] | None = None,
) -> Iterator[list[Event]]:
    """Yield calls that go on as `after` followed `before`, every block grown so many times as `aheads` say.

    since: the call just before them, where that is not `after`. into: whose blocks the last of them has; the others'
    are `fresh`.
    """
    place = {event.block: at for at, event in enumerate(after) if event.nbytes > 0}
    place_before = {event.block: at for at, event in enumerate(before) if event.nbytes > 0}
    previous = {at: (event.block, event.nbytes) for at, event in enumerate(since or after) if event.nbytes > 0}
    for number, ahead in enumerate(aheads):
        named = into if number == len(aheads) - 1 else None
        current: dict[int, tuple[int, int]] = {}
        events = []
        for at, event in enumerate(after):
            if event.nbytes > 0:
                block = next(fresh) if named is None else named[at].block
                current[at] = block, event.nbytes + round(growth[at] * ahead)
                events.append(Event(*current[at], event.kind))
                continue
            if event.block in place:
                block, nbytes = current[place[event.block]]
            elif event.block in place_before:
                block, nbytes = previous[place_before[event.block]]
            else:
                continue
            events.append(Event(block, -nbytes, event.kind))
        previous = current
        yield events


def _labelled(run: Run, events: Sequence[Event]) -> list[Event]:
    """Return events with those of blocks that were part of a cache called so."""
    blocks = run.cache_blocks
    return [
        event._replace(kind="kv_cache") if event.block in blocks and event.kind == "activations" else event
        for event in events
    ]


def _alike(one: Sequence[Event], other: Sequence[Event]) -> bool:
    return [(e.nbytes > 0, e.kind) for e in one] == [(e.nbytes > 0, e.kind) for e in other]

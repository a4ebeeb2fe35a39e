"""The model of the caching allocator against its rules, a second writing of them, and what a GPU recorded."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_snapshot import (
    Recording,
    Step,
    UnsupportedSnapshot,
    differences,
    from_json,
    recording_of,
    steps_of,
    to_json,
)
from planner.cuda_allocator import (
    BlockView,
    CachingAllocator,
    Counters,
    Options,
    OutOfDeviceMemory,
    SegmentView,
    replay,
    round_size,
    segment_size,
)
from planner.errors import InputError
from planner.lifetimes import Event

RECORDED = Path(__file__).parents[1] / "cases" / "cuda_snapshot.json"
KIB, MIB = 2**10, 2**20
PLAIN, EXPANDABLE = Options(), Options(expandable_segments=True)


def reserved(allocator: CachingAllocator) -> int:
    return allocator.counters().reserved_bytes


def taken(allocator: CachingAllocator, nbytes: int, stream: int = 0) -> int:
    address = allocator.allocate(nbytes, stream)
    assert address is not None
    return address


# By hand, from the rules


@pytest.mark.parametrize(
    ("nbytes", "allocated", "reserved_bytes"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB - 1, MIB, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB, 10 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        # The rest of a segment stays with the block up to 1 MiB, and is split off above.
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),
        (19 * MIB + 1, 20 * MIB, 20 * MIB),
        (20 * MIB + 1, 20 * MIB + 512, 22 * MIB),
        (1000 * MIB, 1000 * MIB, 1000 * MIB),
    ],
)
def test_one_allocation(nbytes: int, allocated: int, reserved_bytes: int) -> None:
    counters = replay([Event(0, nbytes, "weights")])
    assert counters.requested_bytes == nbytes
    assert (counters.allocated_bytes, counters.reserved_bytes) == (allocated, reserved_bytes)
    assert (counters.peak_allocated_bytes, counters.peak_reserved_bytes) == (allocated, reserved_bytes)


@pytest.mark.parametrize(
    ("nbytes", "reserved_bytes"),
    [(1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB + 1, 20 * MIB), (20 * MIB + 1, 40 * MIB)],
)
def test_one_allocation_in_pages(nbytes: int, reserved_bytes: int) -> None:
    counters = replay([Event(0, nbytes, "weights")], options=EXPANDABLE)
    assert (counters.allocated_bytes, counters.reserved_bytes) == (round_size(nbytes), reserved_bytes)


def test_large_segments_take_several_requests_of_1_to_10_mib() -> None:
    allocator = CachingAllocator()
    for _ in range(4):
        allocator.allocate(5 * MIB)
    assert reserved(allocator) == 20 * MIB
    allocator.allocate(5 * MIB)
    assert reserved(allocator) == 40 * MIB


def test_a_rest_of_exactly_1_mib_is_not_split_off_a_cached_block() -> None:
    allocator = CachingAllocator()
    allocator.free(taken(allocator, 12 * MIB))
    whole = taken(allocator, 11 * MIB)
    assert allocator.counters().allocated_bytes == 12 * MIB
    allocator.free(whole)
    allocator.allocate(11 * MIB - 512)
    assert allocator.counters().allocated_bytes == 11 * MIB - 512


def test_a_rest_of_512_bytes_is_split_off_in_the_small_pool() -> None:
    allocator = CachingAllocator()
    first = taken(allocator, 1024)
    allocator.allocate(MIB)
    allocator.free(first)
    assert taken(allocator, 512) == first
    assert taken(allocator, 512) == first + 512


def test_the_smallest_block_that_is_enough_serves_and_of_equal_ones_the_lowest() -> None:
    allocator = CachingAllocator()
    blocks = [taken(allocator, size) for size in (40 * MIB, 30 * MIB, 30 * MIB, 50 * MIB)]
    for address in reversed(blocks):
        allocator.free(address)
    assert taken(allocator, 29 * MIB + 1) == blocks[1]
    assert taken(allocator, 29 * MIB + 1) == blocks[2]
    assert taken(allocator, 29 * MIB + 1) == blocks[0]


def test_pools_and_streams_do_not_share() -> None:
    allocator = CachingAllocator()
    allocator.free(taken(allocator, 4 * MIB, stream=0))
    allocator.allocate(4 * MIB, stream=7)
    assert reserved(allocator) == 40 * MIB
    allocator.allocate(1, stream=0)
    assert reserved(allocator) == 42 * MIB
    assert [(s.stream, s.pool) for s in allocator.segments()] == [(0, "large"), (7, "large"), (0, "small")]


def test_a_zero_byte_allocation_takes_nothing() -> None:
    allocator = CachingAllocator()
    assert allocator.allocate(0) is None
    assert allocator.segments() == ()
    assert replay([Event(0, 0, "scratch"), Event(1, 8, "scratch")]) == replay([Event(1, 8, "scratch")])


def test_the_cache_keeps_a_segment_with_anything_in_it() -> None:
    allocator = CachingAllocator()
    kept, gone = taken(allocator, 5 * MIB), taken(allocator, 30 * MIB)
    allocator.free(gone)
    assert reserved(allocator) == 50 * MIB
    allocator.empty_cache()
    assert reserved(allocator) == 20 * MIB
    assert allocator.counters().inactive_split_bytes == 15 * MIB
    allocator.free(kept)
    assert allocator.counters().inactive_split_bytes == 0
    allocator.empty_cache()
    assert (reserved(allocator), allocator.counters().peak_reserved_bytes) == (0, 50 * MIB)


def test_pages_around_an_allocation_are_given_back() -> None:
    allocator = CachingAllocator(EXPANDABLE)
    below, kept, above = (taken(allocator, size) for size in (50 * MIB, 20 * MIB, 70 * MIB))
    assert reserved(allocator) == 140 * MIB
    assert len(allocator.segments()) == 1
    allocator.free(below)
    allocator.free(above)
    allocator.empty_cache()
    # Pages 0 and 1 are free, 2 and 3 hold some of the 20 MiB from 50 MiB on, and 4 to 6 are free.
    assert reserved(allocator) == 40 * MIB
    assert [(s.address - below, s.size) for s in allocator.segments()] == [(40 * MIB, 40 * MIB)]
    # What is mapped again are the lowest addresses that are enough, joined with the 10 MiB that stayed before `kept`.
    assert taken(allocator, 45 * MIB) == below
    assert reserved(allocator) == 80 * MIB
    assert kept == below + 50 * MIB
    assert len(allocator.segments()) == 1


def test_an_expandable_segment_grows_where_ordinary_ones_leave_holes() -> None:
    def grow(options: Options) -> int:
        allocator = CachingAllocator(options)
        last: int | None = None
        for size in range(40, 140, 20):
            new = allocator.allocate(size * MIB)
            if last is not None:
                allocator.free(last)
            last = new
        return reserved(allocator)

    assert grow(PLAIN) == (40 + 60 + 80 + 100 + 120) * MIB
    # The range holds 40, 60 and 80, then 100 where the first two were, then 120 from the 80's place on.
    assert grow(EXPANDABLE) == (40 + 60 + 120) * MIB


def test_a_split_limit_keeps_large_blocks_whole_and_for_requests_near_their_size() -> None:
    allocator = CachingAllocator(Options(max_split_bytes=64 * MIB))
    big = taken(allocator, 100 * MIB)
    allocator.free(big)
    allocator.allocate(40 * MIB)  # must not have the large one
    assert reserved(allocator) == 140 * MIB
    allocator.allocate(80 * MIB)  # is smaller by 20 MiB, which is too much
    assert reserved(allocator) == 220 * MIB
    assert taken(allocator, 81 * MIB) == big
    assert allocator.counters().allocated_bytes == (40 + 80 + 100) * MIB


@pytest.mark.parametrize(
    ("nbytes", "divisions", "size"),
    [(1200, 4, 1536), (2049, 4, 2560), (1200 * MIB, 4, 1280 * MIB), (1024 * MIB, 4, 1024 * MIB), (5000, 8, 5120),
     (4096, 8, 4096), (4097, 8, 4608), (300, 4, 512), (5000, 1, 5120)],
)  # fmt: skip
def test_divisions_between_powers_of_two(nbytes: int, divisions: int, size: int) -> None:
    assert round_size(nbytes, divisions) == size


def test_a_full_device_gives_back_its_cache_and_then_fails_with_the_figures() -> None:
    allocator = CachingAllocator(Options(capacity_bytes=100 * MIB))
    allocator.free(taken(allocator, 60 * MIB))
    held = taken(allocator, 70 * MIB)
    assert (reserved(allocator), allocator.counters().retries) == (70 * MIB, 1)
    allocator.allocate(5 * MIB)
    with pytest.raises(OutOfDeviceMemory) as caught:
        allocator.allocate(30 * MIB + 1)
    error = caught.value
    assert (error.request_bytes, error.capacity_bytes) == (30 * MIB + 1, 100 * MIB)
    assert (error.allocated_bytes, error.reserved_bytes) == (75 * MIB, 90 * MIB)
    assert "31.46 MB more do not fit" in str(error)
    allocator.free(held)
    allocator.allocate(70 * MIB)
    assert allocator.counters().allocated_bytes == 75 * MIB


def test_oversize_blocks_are_given_back_first_and_no_more_than_needed() -> None:
    options = Options(capacity_bytes=400 * MIB, max_split_bytes=64 * MIB)
    allocator = CachingAllocator(options)
    blocks = [taken(allocator, size * MIB) for size in (130, 90, 70, 30, 60)]
    for address in blocks[:4]:
        allocator.free(address)
    allocator.allocate(40 * MIB)  # the smallest that may not be split: 70
    assert [s.size // MIB for s in allocator.segments()] == [130, 90, 30, 60, 40]
    assert allocator.counters().retries == 0
    allocator.allocate(200 * MIB)  # the largest ones together: 130 and 90
    assert [s.size // MIB for s in allocator.segments()] == [30, 60, 40, 200]
    assert allocator.counters().retries == 0
    allocator.allocate(80 * MIB)
    assert [s.size // MIB for s in allocator.segments()] == [60, 40, 200, 80]
    assert allocator.counters().retries == 1


def test_peaks_start_again() -> None:
    allocator = CachingAllocator()
    allocator.free(taken(allocator, 30 * MIB))
    kept = taken(allocator, 1000)
    allocator.empty_cache()
    allocator.reset_peaks()
    counters = allocator.counters()
    assert (counters.peak_requested_bytes, counters.peak_allocated_bytes) == (1000, 1024)
    assert (counters.peak_reserved_bytes, counters.peak_inactive_split_bytes) == (2 * MIB, 2 * MIB - 1024)
    allocator.free(kept)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([(0, 8), (0, 8)], "taken while it is held"),
        ([(0, -8)], "holds 0 B"),
        ([(0, 8), (0, -9)], "holds 8 B"),
        ([(0, 8), (0, -8), (0, -8)], "holds 0 B"),
    ],
)
def test_a_stream_that_contradicts_itself_is_refused(events: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replay(Event(block, nbytes, "scratch") for block, nbytes in events)


def test_wrong_calls_are_refused() -> None:
    allocator = CachingAllocator()
    address = taken(allocator, 8)
    with pytest.raises(ValueError, match="nothing is allocated"):
        allocator.free(address + 512)
    allocator.free(address)
    with pytest.raises(ValueError, match="nothing is allocated"):
        allocator.free(address)
    with pytest.raises(ValueError, match="-1 B"):
        allocator.allocate(-1)


# torch itself says which options it takes; its CPU build parses them, too.
SETTINGS: dict[str, dict[str, Any]] = {
    "large_segment_size_mb:10": {"large_segment_bytes": 10 * MIB},
    "large_segment_size_mb:11": {"large_segment_bytes": 11 * MIB},
    "max_split_size_mb:19": {"max_split_bytes": 19 * MIB},
    "max_split_size_mb:20": {"max_split_bytes": 20 * MIB},
    "large_segment_size_mb:30,max_split_size_mb:21": {"large_segment_bytes": 30 * MIB, "max_split_bytes": 21 * MIB},
    "large_segment_size_mb:30,max_split_size_mb:30": {"large_segment_bytes": 30 * MIB, "max_split_bytes": 30 * MIB},
    "max_non_split_rounding_mb:19": {"max_non_split_rounding_bytes": 19 * MIB},
    "max_non_split_rounding_mb:20": {"max_non_split_rounding_bytes": 20 * MIB},
    "roundup_power2_divisions:3": {"roundup_power2_divisions": 3},
    "roundup_power2_divisions:1": {"roundup_power2_divisions": 1},
    "roundup_power2_divisions:8": {"roundup_power2_divisions": 8},
}


def test_options_are_refused_where_torch_refuses_them() -> None:
    code = (
        "import json, sys, torch\n"
        "def accepted(text):\n"
        "    try:\n"
        "        torch._C._accelerator_setAllocatorSettings(text)\n"
        "    except (ValueError, RuntimeError):\n"
        "        return False\n"
        "    finally:\n"
        "        torch._C._accelerator_setAllocatorSettings('large_segment_size_mb:20')\n"
        "    return True\n"
        "print(json.dumps([accepted(text) for text in json.loads(sys.argv[1])]))"
    )
    command = [sys.executable, "-c", code, json.dumps(list(SETTINGS))]
    torchs = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    def accepted(options: dict[str, Any]) -> bool:
        try:
            Options(**options)
        except InputError:
            return False
        return True

    assert dict(zip(SETTINGS, torchs, strict=True)) == {text: accepted(made) for text, made in SETTINGS.items()}


def test_other_options_that_cannot_be() -> None:
    with pytest.raises(InputError, match="negative"):
        Options(capacity_bytes=-1)
    with pytest.raises(InputError, match="multiples of 2 MiB"):
        Options(large_segment_bytes=21 * MIB, expandable_segments=True)


# The rules again, written to be read and not to be fast


@dataclass
class NaiveSegment:
    """base to base + size are its addresses; pages: which of them are backed, or None for all; held: by address."""

    base: int
    size: int
    stream: int
    pool: str
    pages: set[int] | None
    held: dict[int, tuple[int, int]] = field(default_factory=dict)


@dataclass
class Naive:
    """A list of segments, scanned from end to end for everything. Free ranges are never stored, but derived."""

    options: Options
    segments: list[NaiveSegment] = field(default_factory=list)
    next_base: int = 2**40
    retries: int = 0
    peaks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("requested", "allocated", "reserved"), 0))

    def rounded(self, nbytes: int) -> int:
        steps = self.options.roundup_power2_divisions
        if steps > 1 and nbytes > 512 * steps:
            power = 1
            while power * 2 <= nbytes:
                power *= 2
            return next(power + k * power // steps for k in range(steps + 1) if power + k * power // steps >= nbytes)
        return max(1, (nbytes + 511) // 512) * 512

    def page(self, pool: str) -> int:
        return 2 * MIB if pool == "small" else self.options.large_segment_bytes

    def backed(self, segment: NaiveSegment, at: int) -> bool:
        return segment.pages is None or (at - segment.base) // self.page(segment.pool) in segment.pages

    def edges(self, segment: NaiveSegment) -> list[int]:
        """Every address where something may begin or end, in order."""
        found = {segment.base, segment.base + segment.size}
        found |= {edge for address, (size, _) in segment.held.items() for edge in (address, address + size)}
        page = self.page(segment.pool)
        for number in segment.pages or ():
            found |= {segment.base + number * page, segment.base + (number + 1) * page}
        return sorted(found)

    def ranges(self, segment: NaiveSegment) -> list[tuple[int, int, str]]:
        """The segment as (from, to, "held" | "free" | "unmapped"), neighbours of a kind joined except held ones."""
        parts: list[tuple[int, int, str]] = []
        owner = {}
        for address, (size, _) in segment.held.items():
            owner[address] = address + size
        inside = 0
        for low, high in itertools.pairwise(self.edges(segment)):
            if low in owner:
                inside = owner[low]
            kind = "held" if low < inside else "free" if self.backed(segment, low) else "unmapped"
            joins = parts and parts[-1][2] == kind and not (kind == "held" and low in owner)
            if joins:
                parts[-1] = (parts[-1][0], high, kind)
            else:
                parts.append((low, high, kind))
        return parts

    def reserved(self) -> int:
        return sum(s.size if s.pages is None else len(s.pages) * self.page(s.pool) for s in self.segments)

    def fits(self, nbytes: int) -> bool:
        capacity = self.options.capacity_bytes
        return capacity is None or self.reserved() + nbytes <= capacity

    def note(self) -> None:
        held = [entry for s in self.segments for entry in s.held.values()]
        now = {
            "requested": sum(asked for _, asked in held),
            "allocated": sum(size for size, _ in held),
            "reserved": self.reserved(),
        }
        self.peaks = {name: max(value, now[name]) for name, value in self.peaks.items()}

    def allocate(self, nbytes: int, stream: int) -> int | None:
        size = self.rounded(nbytes)
        pool = "small" if size <= MIB else "large"
        mine = [s for s in self.segments if (s.stream, s.pool) == (stream, pool)]
        place = self.best(mine, size)
        if place is None:
            place = self.fresh(mine, size, stream, pool)
        if place is None:
            return None
        segment, low, high = place
        rest = high - low - size
        if pool == "small" or self.options.expandable_segments:
            whole = rest < 512
        else:
            whole = rest <= MIB or size >= (self.options.max_split_bytes or 2**80)
        segment.held[low] = (high - low if whole else size, nbytes)
        self.note()
        return low

    def best(self, segments: list[NaiveSegment], size: int) -> tuple[NaiveSegment, int, int] | None:
        options = []
        for segment in segments:
            parts = self.ranges(segment)
            for number, (low, high, kind) in enumerate(parts):
                if kind == "free" and high - low >= size:
                    after = parts[number + 1] if number + 1 < len(parts) else (0, 0, "held")
                    room = high - low + (after[1] - after[0] if after[2] == "unmapped" else 0)
                    options.append((high - low, low, high, room, segment))
        options.sort(key=lambda option: option[:2])
        if not options:
            return None
        chosen = options[0]
        if self.options.expandable_segments:
            for other in options[1:]:
                if other[3] >= chosen[3]:
                    break
                chosen = other
        length, low, high, _, segment = chosen
        limit = self.options.max_split_bytes
        if limit is not None:
            slack = self.options.max_non_split_rounding_bytes or self.options.large_segment_bytes
            if size < limit and length >= limit:
                return None
            if size >= limit and length >= size + slack:
                return None
        return segment, low, high

    def fresh(
        self, mine: list[NaiveSegment], size: int, stream: int, pool: str
    ) -> tuple[NaiveSegment, int, int] | None:
        found = self.take(size, stream, pool)
        if found is None and self.give_back_oversize(mine, size):
            found = self.take(size, stream, pool)
        if found is None:
            self.empty_cache()
            self.retries += 1
            found = self.take(size, stream, pool)
        return found

    def take(self, size: int, stream: int, pool: str) -> tuple[NaiveSegment, int, int] | None:
        if self.options.expandable_segments:
            return self.expand(size, stream, pool)
        if pool == "small":
            length = 2 * MIB
        elif size < 10 * MIB:
            length = self.options.large_segment_bytes
        else:
            length = -(-size // (2 * MIB)) * 2 * MIB
        if not self.fits(length):
            return None
        segment = NaiveSegment(self.next_base, length, stream, pool, None)
        self.next_base += length
        self.segments.append(segment)
        return segment, segment.base, segment.base + length

    def give_back_oversize(self, mine: list[NaiveSegment], size: int) -> bool:
        limit = self.options.max_split_bytes
        if limit is None or self.options.expandable_segments:
            return False
        cached = sorted((s.size, s.base) for s in mine if not s.held and s.size >= limit)
        wanted = max(size, limit)
        enough = [entry for entry in cached if entry[0] >= wanted]
        gone = enough[:1]
        while not enough and cached and sum(length for length, _ in gone) < wanted:
            gone.append(cached.pop())
        self.segments = [s for s in self.segments if (s.size, s.base) not in gone]
        return sum(length for length, _ in gone) >= wanted

    def expand(self, size: int, stream: int, pool: str) -> tuple[NaiveSegment, int, int] | None:
        page = self.page(pool)
        spot = self.lowest(size, stream, pool)
        if spot is None:
            capacity = self.options.capacity_bytes
            span = 2**46 if capacity is None else max(capacity + capacity // 8, size)
            segment = NaiveSegment(self.next_base, -(-span // page) * page, stream, pool, set())
            self.next_base += segment.size
            self.segments.append(segment)
            spot = segment, segment.base
        segment, low = spot
        assert segment.pages is not None
        for begin, end, kind in self.ranges(segment):
            if kind == "unmapped" and end > low and begin < low + size:
                wanted = range((begin - segment.base) // page, -(-(min(end, low + size) - segment.base) // page))
                if not self.fits(len(wanted) * page):
                    self.note()
                    return None
                segment.pages |= set(wanted)
                self.note()
        (found,) = [part for part in self.ranges(segment) if part[0] == low and part[2] == "free"]
        return segment, low, found[1]

    def lowest(self, size: int, stream: int, pool: str) -> tuple[NaiveSegment, int] | None:
        for segment in sorted(self.segments, key=lambda s: s.base):
            if (segment.stream, segment.pool) != (stream, pool):
                continue
            parts = self.ranges(segment)
            for number, (begin, _, kind) in enumerate(parts):
                if kind != "unmapped":
                    continue
                low = parts[number - 1][0] if number and parts[number - 1][2] == "free" else begin
                first_held = next((p[0] for p in parts if p[2] == "held" and p[0] >= low), segment.base + segment.size)
                if first_held - low >= size:
                    return segment, low
        return None

    def free(self, address: int) -> None:
        (segment,) = [s for s in self.segments if address in s.held]
        del segment.held[address]

    def empty_cache(self) -> None:
        kept = []
        for segment in self.segments:
            if segment.pages is None:
                if segment.held:
                    kept.append(segment)
                continue
            page, before = self.page(segment.pool), set(segment.pages)
            for low, high, kind in self.ranges(segment):
                if kind == "free":
                    inside = range(-(-(low - segment.base) // page), (high - segment.base) // page)
                    segment.pages -= set(inside)
            if segment.pages or not before:
                kept.append(segment)
        self.segments = kept

    def views(self) -> list[SegmentView]:
        found = []
        for segment in self.segments:
            runs: list[list[BlockView]] = [[]]
            for low, high, kind in self.ranges(segment):
                if kind == "unmapped":
                    runs.append([])
                else:
                    asked = segment.held[low][1] if kind == "held" else None
                    runs[-1].append(BlockView(address=low, size=high - low, requested_bytes=asked))
            found += [
                SegmentView(
                    address=run[0].address,
                    size=run[-1].address + run[-1].size - run[0].address,
                    stream=segment.stream,
                    pool="small" if segment.pool == "small" else "large",
                    expandable=segment.pages is not None,
                    blocks=tuple(run),
                )
                for run in runs
                if run
            ]
        return sorted(found, key=lambda view: view.address)


# Streams of calls

EDGES = [512, KIB, MIB, 2 * MIB, 10 * MIB, 11 * MIB, 20 * MIB, 22 * MIB, 32 * MIB, 40 * MIB]
SIZES = st.one_of(
    st.builds(lambda edge, off: max(1, edge + off), st.sampled_from(EDGES), st.sampled_from([-512, -1, 0, 1, 512])),
    st.integers(1, 64 * KIB),
    st.integers(1, 50 * MIB),
)
# (bytes, stream) allocates; a number frees that allocation, counted among those held; None empties the cache.
Call = tuple[int, int] | int | None
ALLOCATE = st.tuples(SIZES, st.sampled_from([0, 0, 0, 5]))
FREE = st.integers(0, 1000)
# Lists without a least length have five elements on average, in which little can meet.
CALLS = st.lists(st.one_of(ALLOCATE, ALLOCATE, FREE, FREE, st.sampled_from([0, None])), min_size=20, max_size=100)
OPTIONS = st.builds(
    Options,
    capacity_bytes=st.sampled_from([None, None, 64 * MIB, 150 * MIB, 301 * MIB]),
    max_split_bytes=st.sampled_from([None, None, 20 * MIB, 30 * MIB]),
    roundup_power2_divisions=st.sampled_from([0, 0, 4]),
    large_segment_bytes=st.sampled_from([20 * MIB, 20 * MIB, 12 * MIB]),
    expandable_segments=st.booleans(),
)


def run(allocator: CachingAllocator, calls: Iterable[Call]) -> Iterator[None]:
    """Make the calls one by one; failures for want of memory are passed over."""
    held: list[int] = []
    for call in calls:
        if call is None:
            allocator.empty_cache()
        elif isinstance(call, int):
            if held:
                allocator.free(held.pop(call % len(held)))
        else:
            with contextlib.suppress(OutOfDeviceMemory):
                held.append(taken(allocator, *call))
        yield
    for address in held:
        allocator.free(address)


def assert_sound(allocator: CachingAllocator, options: Options) -> None:
    segments, counters = allocator.segments(), allocator.counters()
    for segment in segments:
        at = segment.address
        for block in segment.blocks:
            assert block.address == at
            assert block.size > 0
            assert block.size % 512 == 0
            assert block.requested_bytes is None or 0 < block.requested_bytes <= block.size
            at += block.size
        assert at == segment.address + segment.size
        assert segment.expandable == options.expandable_segments
        free = [not block.allocated for block in segment.blocks]
        assert not any(a and b for a, b in itertools.pairwise(free)), "free neighbours are one block"
    for low, high in itertools.pairwise(segments):
        assert low.address + low.size <= high.address
    blocks = [block for segment in segments for block in segment.blocks]
    assert counters.requested_bytes == sum(block.requested_bytes or 0 for block in blocks)
    assert counters.allocated_bytes == sum(block.size for block in blocks if block.allocated)
    assert counters.reserved_bytes == sum(segment.size for segment in segments)
    assert counters.inactive_split_bytes == sum(
        block.size
        for segment in segments
        for block in segment.blocks
        if not block.allocated and not segment.expandable and len(segment.blocks) > 1
    )
    assert counters.requested_bytes <= counters.allocated_bytes <= counters.reserved_bytes
    assert options.capacity_bytes is None or counters.reserved_bytes <= options.capacity_bytes
    for name in ("requested", "allocated", "reserved", "inactive_split"):
        assert getattr(counters, f"peak_{name}_bytes") >= getattr(counters, f"{name}_bytes")


@given(CALLS, OPTIONS)
@settings(max_examples=150, deadline=None)
def test_blocks_tile_their_segments_and_counters_are_their_sums(calls: list[Call], options: Options) -> None:
    allocator = CachingAllocator(options)
    for _ in run(allocator, calls):
        assert_sound(allocator, options)
    assert_sound(allocator, options)
    counters = allocator.counters()
    assert (counters.requested_bytes, counters.allocated_bytes, counters.inactive_split_bytes) == (0, 0, 0)
    assert all(len(segment.blocks) == 1 for segment in allocator.segments())
    allocator.empty_cache()
    assert (allocator.segments(), reserved(allocator)) == ((), 0)


def same_as_naive(calls: Iterable[Call], options: Options) -> None:
    allocator, naive = CachingAllocator(options), Naive(options)
    held: list[int] = []
    for call in calls:
        if call is None:
            allocator.empty_cache()
            naive.empty_cache()
        elif isinstance(call, int):
            if held:
                address = held.pop(call % len(held))
                allocator.free(address)
                naive.free(address)
        else:
            try:
                ours = allocator.allocate(*call)
            except OutOfDeviceMemory:
                ours = None
            assert ours == naive.allocate(*call)
            if ours is not None:
                held.append(ours)
        assert list(allocator.segments()) == naive.views()
    counters = allocator.counters()
    assert counters.retries == naive.retries
    assert {name: getattr(counters, f"peak_{name}_bytes") for name in naive.peaks} == naive.peaks


@given(CALLS, OPTIONS)
@settings(max_examples=150, deadline=None)
def test_every_call_leaves_what_a_naive_allocator_leaves(calls: list[Call], options: Options) -> None:
    same_as_naive(calls, options)


def long_stream(seed: int, calls: int, live: int) -> Iterator[Call]:
    choice, held = random.Random(seed), 0
    for _ in range(calls):
        if held and (held >= live or choice.random() < 0.45):
            held -= 1
            yield choice.randrange(1000)
        elif choice.random() < 0.02:
            yield None
        else:
            held += 1
            edge = choice.choice(EDGES) + choice.choice([-512, -1, 0, 1, 512])
            size = max(1, edge) if choice.random() < 0.4 else int(2 ** choice.uniform(0, 25.5))
            yield size, choice.choice([0, 0, 0, 5])


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("limits", [(None, None), (None, 32 * MIB), (400 * MIB, None), (250 * MIB, 20 * MIB)])
def test_long_streams_leave_what_a_naive_allocator_leaves(
    expandable: bool, limits: tuple[int | None, int | None]
) -> None:
    capacity, split = limits
    options = Options(capacity_bytes=capacity, max_split_bytes=split, expandable_segments=expandable)
    for seed in range(6):
        same_as_naive(long_stream(seed, 500, 40), options)


# Streams of events


def events_of(seed: int, count: int) -> list[Event]:
    choice, held = random.Random(seed), list[tuple[int, int]]()
    found: list[Event] = []
    for number in range(count):
        if held and (len(held) > 500 or choice.random() < 0.45):
            block, nbytes = held.pop(choice.randrange(len(held)))
            found.append(Event(block, -nbytes, "activations"))
        else:
            held.append((number, int(2 ** choice.uniform(0, 25))))
            found.append(Event(*held[-1], "activations"))
    return found


@pytest.mark.parametrize("options", [PLAIN, EXPANDABLE])
def test_a_replay_is_what_the_calls_give_and_the_same_each_time(options: Options) -> None:
    events = events_of(0, 5000)
    allocator, addresses = CachingAllocator(options), dict[int, int]()
    for block, nbytes, _ in events:
        if nbytes > 0:
            addresses[block] = taken(allocator, nbytes)
        else:
            allocator.free(addresses[block])
    assert replay(events, options=options) == replay(iter(events), options=options) == allocator.counters()
    assert replay(events, options=options, stream=3) == allocator.counters()


def test_requested_bytes_are_those_of_the_stream() -> None:
    events = events_of(1, 2000)
    held = list(itertools.accumulate(event.nbytes for event in events))
    counters = replay(events)
    assert (counters.requested_bytes, counters.peak_requested_bytes) == (held[-1], max(held))


def test_no_stream_is_no_bytes() -> None:
    assert replay([]) == Counters(
        requested_bytes=0, allocated_bytes=0, reserved_bytes=0, inactive_split_bytes=0,
        peak_requested_bytes=0, peak_allocated_bytes=0, peak_reserved_bytes=0, peak_inactive_split_bytes=0, retries=0,
    )  # fmt: skip


@pytest.mark.parametrize("options", [PLAIN, EXPANDABLE])
def test_a_replay_fits_up_to_the_last_byte_and_says_where_it_does_not(options: Options) -> None:
    events = [Event(0, 15 * MIB, "weights"), Event(1, 5 * MIB + 512, "weights")]
    assert replay(events[:1], options=replace(options, capacity_bytes=20 * MIB)).allocated_bytes >= 15 * MIB
    with pytest.raises(OutOfDeviceMemory):
        replay(events, options=replace(options, capacity_bytes=35 * MIB))
    full = 36 * MIB if options is PLAIN else 40 * MIB
    assert replay(events, options=replace(options, capacity_bytes=full)).reserved_bytes == full


def test_segment_sizes_follow_the_large_segment_option() -> None:
    assert [segment_size(size, 32 * MIB) // MIB for size in (MIB, MIB + 512, 10 * MIB, 33 * MIB)] == [2, 32, 10, 34]
    assert reserved_by(Options(large_segment_bytes=32 * MIB), 2 * MIB) == 32 * MIB


def reserved_by(options: Options, nbytes: int) -> int:
    return replay([Event(0, nbytes, "weights")], options=options).reserved_bytes


# Recordings

BASE, SECOND = 0x7F0000000000, 0x7F0000A00000


def entry(action: str, address: int, size: int, stream: int = 0) -> dict[str, Any]:
    return {"action": action, "addr": address, "size": size, "stream": stream, "frames": [], "pool_id": (0, 0)}


def miniature() -> dict[str, Any]:
    """A snapshot as torch makes it: two allocations, one freed, a cached segment given back, one failure."""
    block = {"frames": [], "requested_size": 1000, "size": 1024, "address": BASE, "state": "active_allocated"}
    rest = {"frames": [], "requested_size": 7, "size": 2 * MIB - 1024, "address": BASE + 1024, "state": "inactive"}
    segment = {
        "device": 0, "address": BASE, "total_size": 2 * MIB, "allocated_size": 1024, "active_size": 1024,
        "requested_size": 1000, "stream": 0, "segment_type": "small", "segment_pool_id": (0, 0), "is_expandable": False,
        "frames": [], "blocks": [block, rest],
    }  # fmt: skip
    trace = [
        entry("segment_alloc", BASE, 2 * MIB),
        entry("alloc", BASE, 1000),
        entry("segment_alloc", SECOND, 20 * MIB),
        entry("alloc", SECOND, 3 * MIB),
        entry("free_requested", SECOND, 3 * MIB),
        entry("free_completed", SECOND, 3 * MIB),
        entry("segment_free", SECOND, 20 * MIB),
        entry("snapshot", 0, 1024),
    ]
    return {"segments": [segment], "device_traces": [trace, []]}


MINIATURE_STATS = {
    "requested_bytes.all.current": 1000, "requested_bytes.all.peak": 3 * MIB + 1000,
    "allocated_bytes.all.current": 1024, "allocated_bytes.all.peak": 3 * MIB + 1024,
    "reserved_bytes.all.current": 2 * MIB, "reserved_bytes.all.peak": 22 * MIB,
    "inactive_split_bytes.all.current": 2 * MIB - 1024, "inactive_split_bytes.all.peak": 19 * MIB - 1024,
    "num_alloc_retries": 0,
}  # fmt: skip


def recorded(snapshot: dict[str, Any], **options: Any) -> Recording:
    return recording_of(snapshot, MINIATURE_STATS, name="miniature", options=Options(**options))


def test_a_snapshot_becomes_steps() -> None:
    assert recorded(miniature()).steps == (
        Step(action="alloc", address=BASE, nbytes=1000, placed=(BASE,)),
        Step(action="alloc", address=SECOND, nbytes=3 * MIB, placed=(SECOND,)),
        Step(action="free", address=SECOND),
        Step(action="empty_cache"),
    )


def test_a_snapshot_that_follows_the_rules_shows_no_difference() -> None:
    recording = recorded(miniature())
    assert differences(recording) == []
    again = from_json(json.loads(json.dumps(to_json(recording))))
    assert again == recording


def test_a_failure_in_the_snapshot_must_be_one_here() -> None:
    snapshot = miniature()
    oom = entry("oom", 0, 90 * MIB)
    del oom["addr"]
    snapshot["device_traces"][0].append(oom)
    stats = {**MINIATURE_STATS, "num_alloc_retries": 1}
    made = recording_of(snapshot, stats, name="full", options=Options(capacity_bytes=80 * MIB))
    assert made.steps[-1] == Step(action="oom", nbytes=90 * MIB)
    assert differences(made) == []
    (found,) = differences(replace(made, options=Options(capacity_bytes=100 * MIB)))
    assert "took a segment where torch found none" in found


def test_differences_are_told() -> None:
    recording = recorded(miniature())
    moved = (replace(recording.steps[0], address=BASE + 512), *recording.steps[1:])
    assert "returned 0x7f0000000000" in differences(replace(recording, steps=moved))[0]
    cached = (*recording.steps, Step(action="alloc", address=BASE + 1024, nbytes=1, placed=(SECOND,)))
    assert "took cached memory" in differences(replace(recording, steps=cached))[0]
    fresh = (*recording.steps, Step(action="alloc", address=SECOND, nbytes=30 * MIB))
    assert "took a segment" in differences(replace(recording, steps=fresh))[0]
    unknown = (*recording.steps, Step(action="free", address=SECOND))
    assert "nothing is allocated" in differences(replace(recording, steps=unknown))[0]
    full = replace(recording, options=Options(capacity_bytes=MIB))
    assert "do not fit" in differences(full)[0]
    stats = {**recording.stats, "peak_reserved_bytes": 1}
    assert differences(replace(recording, stats=stats)) == [f"peak_reserved_bytes: {22 * MIB} here, 1 there"]
    (segment,) = recording.segments
    assert "there" in differences(replace(recording, segments=(replace(segment, size=4 * MIB),)))[0]


def test_what_the_model_leaves_out_is_refused() -> None:
    delayed = [entry("free_requested", BASE, 1), entry("alloc", SECOND, 1)]
    with pytest.raises(UnsupportedSnapshot, match="delayed"):
        steps_of(delayed)
    with pytest.raises(UnsupportedSnapshot, match="delayed"):
        steps_of([entry("free_completed", BASE, 1)])
    with pytest.raises(UnsupportedSnapshot, match="private pool"):
        steps_of([{**entry("alloc", BASE, 1), "pool_id": (0, 1)}])
    waiting = miniature()
    waiting["segments"][0]["blocks"][0]["state"] = "active_awaiting_free"
    with pytest.raises(UnsupportedSnapshot, match="active_awaiting_free"):
        recorded(waiting)
    private = miniature()
    private["segments"][0]["segment_pool_id"] = (0, 1)
    with pytest.raises(UnsupportedSnapshot, match="private pool"):
        recorded(private)


def own_recording(options: Options, seed: int) -> dict[str, Any]:
    """Return, in torch's shape, a trace made by our allocator: what the converter must carry through unharmed."""
    placed: list[dict[str, Any]] = []
    next_base = itertools.count(BASE, 2**47)

    def place(size: int) -> int:
        address = next(next_base)
        placed.append(entry("segment_map" if options.expandable_segments else "segment_alloc", address, size))
        return address

    allocator, trace, held = CachingAllocator(options, place=place), list[dict[str, Any]](), list[int]()
    for call in long_stream(seed, 300, 30):
        if call is None:
            before = reserved(allocator)
            allocator.empty_cache()
            gone = before - reserved(allocator)
            trace += [entry("segment_free", 0, gone)] * (2 if gone else 0)
        elif isinstance(call, int):
            address = held.pop(call % len(held))
            allocator.free(address)
            trace += [entry("free_requested", address, 0), entry("free_completed", address, 0)]
        else:
            held.append(taken(allocator, *call))
            trace += [*placed, entry("alloc", held[-1], *call)]
            placed.clear()
    counters = allocator.counters()
    segments = [
        {
            "address": s.address, "total_size": s.size, "stream": s.stream, "segment_type": s.pool,
            "is_expandable": s.expandable, "allocated_size": s.allocated_bytes,
            "blocks": [
                {"address": b.address, "size": b.size, "requested_size": b.requested_bytes or 0,
                 "state": "active_allocated" if b.allocated else "inactive"}
                for b in s.blocks
            ],
        }
        for s in allocator.segments()
    ]  # fmt: skip
    return {"trace": trace, "segments": segments, "counters": counters}


@pytest.mark.parametrize("options", [PLAIN, EXPANDABLE, Options(max_split_bytes=32 * MIB)])
def test_a_recorded_stream_is_replayed_at_its_own_addresses(options: Options) -> None:
    made = own_recording(options, seed=1)
    snapshot = {"segments": made["segments"], "device_traces": [made["trace"]]}
    recording = recording_of(snapshot, {}, name="own", options=options)
    stats = {name: getattr(made["counters"], name) for name in recording.stats}
    assert differences(replace(recording, stats=stats)) == []


@pytest.mark.skipif(
    not RECORDED.exists(), reason="tests/cases/cuda_snapshot.json was not recorded yet, on a GPU machine"
)
def test_the_allocator_does_what_a_gpu_recorded() -> None:
    document = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert document["recordings"]
    for data in document["recordings"]:
        recording = from_json(data)
        assert differences(recording) == [], recording.name

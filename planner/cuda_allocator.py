"""What PyTorch's caching allocator takes from a GPU for a stream of allocations and frees, in bytes.

Three quantities are counted, each with its peak: *requested*, what the program asked for; *allocated*, the blocks that
hold it, rounded up and with whatever was too small to split off; *reserved*, what was taken from the driver, free
cached blocks included. Only reserved bytes are gone for others on the device.

Modelled, from torch 2.11 to 2.13 (c10/cuda/CUDACachingAllocator.cpp, and the constants and options in
c10/core/AllocatorConfig.h; names in brackets are functions there):

- rounding to 512 B, or to divisions between powers of two [round_size, roundup_power2_next_division];
- a small pool (blocks of up to 1 MiB) and a large one, each for every stream by itself [get_pool];
- segments: 2 MiB; 20 MiB for requests under 10 MiB; else the size rounded up to 2 MiB [get_allocation_size];
- best fit by size, then address, and the limits for blocks that must not be split [get_free_block];
- splitting and merging [should_split, alloc_found_block, try_merge_blocks, free_block];
- what happens when the device is full: oversize blocks first, where there is a split limit, then every cached block
  that is not split, then an error [malloc, release_available_cached_blocks, release_cached_blocks];
- expandable segments: one range of addresses per pool and stream, backed page by page, 2 MiB in the small pool and
  20 MiB in the large one [find_expandable_block, map_block, try_allocate_expandable_block, unmap_block].

Not modelled: the cudaMallocAsync backend; private pools (CUDA graphs, torch.cuda.MemPool); `record_stream`, which
delays frees until another stream is done; garbage_collection_threshold; `set_per_process_memory_fraction` with
expandable segments, where a request fails by the size that an ordinary segment would have; different divisions for
different sizes; options that change during a run; memory that the driver, the context or a library takes by itself.

One thing is unknowable: where the driver puts segments. Free blocks of equal size are told apart by address, so a run
can choose another of them than this model does. `place` takes recorded addresses for an exact replay.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from planner.errors import InputError
from planner.lifetimes import Event
from planner.units import MIB, format_bytes, round_up

# c10/core/AllocatorConfig.h
MIN_BLOCK = 512  # kMinBlockSize
SMALL_SIZE = 1 * MIB  # kSmallSize: the largest block of the small pool
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT = 20 * MIB  # large_segment_size, kLargeBuffer before it became an option
MIN_LARGE_SEGMENT_OF_ITS_OWN = 10 * MIB  # kMinLargeAlloc
ROUND_LARGE = 2 * MIB  # kRoundLarge

PoolName: TypeAlias = Literal["small", "large"]

# Addresses start away from 0, and stand for a device of unknown size where no capacity is given.
_FIRST_ADDRESS = 2**40
_ADDRESSES_WITHOUT_CAPACITY = 2**46


class OutOfDeviceMemory(Exception):  # noqa: N818  an answer, as often as an error
    """An allocation did not fit, also after every cached block that can be was given back.

    The allocator stays usable, and holds what it held before, less its cache.

    Attributes:
        request_bytes: what the allocation asked for, before rounding.
        allocated_bytes: bytes in use when it failed.
        reserved_bytes: bytes still taken from the device when it failed.
        capacity_bytes: the limit that `reserved_bytes` may not pass.
    """

    def __init__(self, *, request_bytes: int, allocated_bytes: int, reserved_bytes: int, capacity_bytes: int):
        super().__init__(
            f"{format_bytes(request_bytes)} more do not fit: of {format_bytes(capacity_bytes)}, "
            f"{format_bytes(allocated_bytes)} are in use and {format_bytes(reserved_bytes - allocated_bytes)} are "
            "reserved in pieces that do not serve"
        )
        self.request_bytes = request_bytes
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes
        self.capacity_bytes = capacity_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How the allocator is set up; the defaults are torch's own. Sizes in bytes, where PYTORCH_ALLOC_CONF has MiB.

    capacity_bytes: what the allocator may take from the device; None for no limit.
    max_split_bytes: blocks of this size and more are never split (`max_split_size_mb`); None for no limit.
    max_non_split_rounding_bytes: how much smaller than such a block a request may be (`max_non_split_rounding_mb`);
        None for `large_segment_bytes`.
    roundup_power2_divisions: steps between one power of two and the next that requests round up to; 0 for none.
    large_segment_bytes: what a request of 1 to 10 MiB takes from the driver (`large_segment_size_mb`), and the page of
        an expandable large segment.
    expandable_segments: grow one range of addresses for each pool and stream instead of taking separate segments.

    Raises:
        InputError: a negative capacity, or a value that torch (c10/core/AllocatorConfig.cpp) or the driver refuses.
    """

    capacity_bytes: int | None = None
    max_split_bytes: int | None = None
    max_non_split_rounding_bytes: int | None = None
    roundup_power2_divisions: int = 0
    large_segment_bytes: int = LARGE_SEGMENT
    expandable_segments: bool = False

    def __post_init__(self) -> None:
        if self.capacity_bytes is not None and self.capacity_bytes < 0:
            raise InputError(f"a capacity must not be negative, and is {self.capacity_bytes}")
        if self.large_segment_bytes <= MIN_LARGE_SEGMENT_OF_ITS_OWN:
            raise InputError(f"large segments must be above 10 MiB, not {self.large_segment_bytes} B")
        if self.expandable_segments and self.large_segment_bytes % SMALL_SEGMENT:
            raise InputError(f"pages must be multiples of 2 MiB, as the driver's are, not {self.large_segment_bytes} B")
        for name, value in (
            ("the split limit", self.max_split_bytes),
            ("the rounding of blocks that are not split", self.max_non_split_rounding_bytes),
        ):
            if value is not None and value < self.large_segment_bytes:
                raise InputError(
                    f"{name} must be at least a large segment, {self.large_segment_bytes} B, not {value} B"
                )
        if self.roundup_power2_divisions < 0 or self.roundup_power2_divisions.bit_count() > 1:
            raise InputError(f"divisions must be a power of two, or 0, not {self.roundup_power2_divisions}")


DEFAULT_OPTIONS = Options()


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Bytes at one moment, and their peaks since the start or the last `reset_peaks`.

    requested_bytes: what the program asked for and holds.
    allocated_bytes: the blocks that hold it.
    reserved_bytes: what was taken from the device.
    inactive_split_bytes: free blocks beside others in their segment, which cannot be given back. Expandable segments
        are left out, as torch does.
    retries: how often every cached block was given back because the device was full.
    """

    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    inactive_split_bytes: int
    peak_requested_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_inactive_split_bytes: int
    retries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockView:
    """A piece of a segment. requested_bytes: what is held in it was asked for with this size; None where it is free."""

    address: int
    size: int
    requested_bytes: int | None

    @property
    def allocated(self) -> bool:
        return self.requested_bytes is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentView:
    """Memory of the device in one piece, as an entry under "segments" of `torch.cuda.memory._snapshot()` shows it.

    Of an expandable segment, each contiguous range that is backed by memory is one. `blocks` tile it, in order.
    """

    address: int
    size: int
    stream: int
    pool: PoolName
    expandable: bool
    blocks: tuple[BlockView, ...]

    @property
    def allocated_bytes(self) -> int:
        return sum(block.size for block in self.blocks if block.allocated)

    @property
    def requested_bytes(self) -> int:
        return sum(block.requested_bytes for block in self.blocks if block.requested_bytes is not None)


def replay(events: Iterable[Event], *, options: Options = DEFAULT_OPTIONS, stream: int = 0) -> Counters:
    """Return the bytes that an empty allocator counts after `events`, and their peaks on the way.

    200,000 events take 0.3 to 0.5 s on an idle core. Events of no bytes take nothing.

    Raises:
        OutOfDeviceMemory: an allocation does not fit `options.capacity_bytes`.
        ValueError: a block is taken twice, given back while it is not held, or with another size than it was taken.
    """
    allocator = CachingAllocator(options)
    held: dict[int, tuple[int, int]] = {}
    for block, nbytes, _ in events:
        if nbytes > 0:
            if block in held:
                raise ValueError(f"block {block} is taken while it is held")
            address = allocator.allocate(nbytes, stream)
            assert address is not None
            held[block] = (address, nbytes)
        elif nbytes < 0:
            address, taken = held.pop(block, (0, 0))
            if taken != -nbytes:
                raise ValueError(f"block {block} is given back with {-nbytes} B, and holds {taken} B")
            allocator.free(address)
    return allocator.counters()


def round_size(nbytes: int, divisions: int = 0) -> int:
    """Return the bytes of the block that a request of `nbytes` is given, before any surplus that is not split off.

    Source: round_size and roundup_power2_next_division in CUDACachingAllocator.cpp.
    """
    if divisions > 1 and nbytes > MIN_BLOCK * divisions:
        step = (1 << (nbytes.bit_length() - 1)) // divisions
        return round_up(nbytes, step)
    return max(MIN_BLOCK, round_up(nbytes, MIN_BLOCK))


def segment_size(size: int, large_segment_bytes: int = LARGE_SEGMENT) -> int:
    """Return the bytes that are taken from the driver for a block of `size`, where none is cached.

    Source: get_allocation_size in CUDACachingAllocator.cpp.
    """
    if size <= SMALL_SIZE:
        return SMALL_SEGMENT
    if size < MIN_LARGE_SEGMENT_OF_ITS_OWN:
        return large_segment_bytes
    return round_up(size, ROUND_LARGE)


class _Block:
    """A range of addresses in a segment, linked to its neighbours there.

    base: where its expandable segment begins; None in an ordinary one.
    mapped: memory stands behind the range; always so in an ordinary segment.
    """

    __slots__ = ("address", "allocated", "base", "mapped", "next", "pool", "previous", "requested", "size")

    def __init__(self, address: int, size: int, pool: _Pool, *, base: int | None, mapped: bool) -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.base = base
        self.mapped = mapped
        self.allocated = False
        self.requested = 0
        self.previous: _Block | None = None
        self.next: _Block | None = None

    def cut(self, size: int) -> _Block:
        """Keep the first `size` bytes and return the rest as a block of its own, in no list yet."""
        rest = _Block(self.address + size, self.size - size, self.pool, base=self.base, mapped=self.mapped)
        rest.previous, rest.next = self, self.next
        if self.next is not None:
            self.next.previous = rest
        self.next = rest
        self.size = size
        return rest

    def absorb_next(self) -> None:
        """Take over the next block's range. Of two that merge the lower stays, so a segment's first block does."""
        gone = self.next
        assert gone is not None
        self.size += gone.size
        self.next = gone.next
        if gone.next is not None:
            gone.next.previous = self


class _Pool:
    """Free blocks of one size class on one stream.

    free: (size, address, block) of what is free and backed by memory, sorted; as no address is there twice, blocks are
        never compared.
    unmapped: (address, block) of the ranges of expandable segments without memory, sorted.
    """

    __slots__ = ("free", "name", "page", "stream", "unmapped")

    def __init__(self, name: PoolName, stream: int, page: int) -> None:
        self.name: PoolName = name
        self.stream = stream
        self.page = page
        self.free: list[tuple[int, int, _Block]] = []
        self.unmapped: list[tuple[int, _Block]] = []

    def put(self, block: _Block) -> None:
        insort(self.free, (block.size, block.address, block))

    def drop(self, block: _Block) -> None:
        del self.free[bisect_left(self.free, (block.size, block.address))]

    def put_unmapped(self, block: _Block) -> None:
        insort(self.unmapped, (block.address, block))

    def drop_unmapped(self, block: _Block) -> None:
        del self.unmapped[bisect_left(self.unmapped, (block.address,))]


class CachingAllocator:
    """One device's allocator. Allocating and freeing cost O(log free blocks), and a shift in a list of them.

    place: called with a size, returns the address of a new segment (or range of an expandable one); by default each
        lies behind the last.
    """

    def __init__(self, options: Options = DEFAULT_OPTIONS, *, place: Callable[[int], int] | None = None) -> None:
        self.options = options
        self._place = place or self._place_behind
        self._next_address = _FIRST_ADDRESS
        self._pools: dict[tuple[PoolName, int], _Pool] = {}
        self._active: dict[int, _Block] = {}
        self._first_blocks: dict[int, _Block] = {}
        self._requested = self._allocated = self._reserved = self._inactive_split = 0
        self._peak_requested = self._peak_allocated = self._peak_reserved = self._peak_inactive_split = 0
        self._retries = 0

    def allocate(self, nbytes: int, stream: int = 0) -> int | None:
        """Take `nbytes` on `stream` and return their address; None for 0 bytes, which take nothing.

        Raises:
            OutOfDeviceMemory: they do not fit the capacity, also with nothing cached.
            ValueError: `nbytes` is negative.
        """
        if nbytes <= 0:
            if nbytes < 0:
                raise ValueError(f"cannot allocate {nbytes} B")
            return None
        options = self.options
        size = round_size(nbytes, options.roundup_power2_divisions)
        pool = self._pool(size, stream)
        block = self._cached(pool, size)
        if block is None:
            block = self._fresh(pool, size, nbytes)
        was_split = block.previous is not None or block.next is not None
        surplus = block.size - size
        if pool.name == "small" or options.expandable_segments:
            split = surplus >= MIN_BLOCK
        else:
            split = surplus > SMALL_SIZE and (options.max_split_bytes is None or size < options.max_split_bytes)
        if split:
            pool.put(block.cut(size))
        if block.base is None:
            if was_split:
                self._inactive_split -= block.size
            elif split:
                self._inactive_split += surplus
                self._peak_inactive_split = max(self._peak_inactive_split, self._inactive_split)
        block.allocated = True
        block.requested = nbytes
        self._active[block.address] = block
        self._requested += nbytes
        self._allocated += block.size
        if self._requested > self._peak_requested:
            self._peak_requested = self._requested
        if self._allocated > self._peak_allocated:
            self._peak_allocated = self._allocated
        return block.address

    def free(self, address: int) -> None:
        """Give back the allocation at `address`; its memory stays reserved, in the cache.

        Raises:
            ValueError: nothing is allocated there.
        """
        block = self._active.pop(address, None)
        if block is None:
            raise ValueError(f"nothing is allocated at {address:#x}")
        self._requested -= block.requested
        self._allocated -= block.size
        block.allocated = False
        pool = block.pool
        change = 0
        after = block.next
        if after is not None and not after.allocated and after.mapped:
            change -= after.size
            pool.drop(after)
            block.absorb_next()
        before = block.previous
        if before is not None and not before.allocated and before.mapped:
            change -= before.size
            pool.drop(before)
            before.absorb_next()
            block = before
        pool.put(block)
        if block.base is None:
            if block.previous is not None or block.next is not None:
                change += block.size
            self._inactive_split += change
            self._peak_inactive_split = max(self._peak_inactive_split, self._inactive_split)

    def empty_cache(self) -> None:
        """Give back to the device every segment without an allocation in it, and every such page of expandable ones.

        Source: release_cached_blocks, release_blocks, unmap_block.
        """
        for pool in self._pools.values():
            for _, _, block in tuple(pool.free):
                if block.base is not None:
                    self._unmap(pool, block, block.base)
                elif block.previous is None and block.next is None:
                    self._release(pool, block)

    def reset_peaks(self) -> None:
        """Let every peak start again from what is held now."""
        self._peak_requested = self._requested
        self._peak_allocated = self._allocated
        self._peak_reserved = self._reserved
        self._peak_inactive_split = self._inactive_split

    def counters(self) -> Counters:
        """Return the bytes now and their peaks."""
        return Counters(
            requested_bytes=self._requested,
            allocated_bytes=self._allocated,
            reserved_bytes=self._reserved,
            inactive_split_bytes=self._inactive_split,
            peak_requested_bytes=self._peak_requested,
            peak_allocated_bytes=self._peak_allocated,
            peak_reserved_bytes=self._peak_reserved,
            peak_inactive_split_bytes=self._peak_inactive_split,
            retries=self._retries,
        )

    def segments(self) -> tuple[SegmentView, ...]:
        """Return what is reserved, by address, as `torch.cuda.memory._snapshot()["segments"]` lists it."""
        found: list[SegmentView] = []
        for first in self._first_blocks.values():
            run: list[BlockView] = []
            block: _Block | None = first
            while block is not None:
                if block.mapped:
                    requested = block.requested if block.allocated else None
                    run.append(BlockView(address=block.address, size=block.size, requested_bytes=requested))
                if run and (block.next is None or not block.next.mapped):
                    found.append(_view(first, tuple(run)))
                    run = []
                block = block.next
        return tuple(sorted(found, key=lambda segment: segment.address))

    def _pool(self, size: int, stream: int) -> _Pool:
        name: PoolName = "small" if size <= SMALL_SIZE else "large"
        pool = self._pools.get((name, stream))
        if pool is None:
            page = SMALL_SEGMENT if name == "small" else self.options.large_segment_bytes
            pool = self._pools[name, stream] = _Pool(name, stream, page)
        return pool

    def _cached(self, pool: _Pool, size: int) -> _Block | None:
        """Take out of `pool` the free block that serves `size` bytes best; None where none does [get_free_block]."""
        free = pool.free
        at = bisect_left(free, (size,))
        if at == len(free):
            return None
        if self.options.expandable_segments:
            # A block before unmapped addresses counts with these, for it could grow into them.
            while at + 1 < len(free) and _growable_size(free[at + 1][2]) < _growable_size(free[at][2]):
                at += 1
        block = free[at][2]
        limit = self.options.max_split_bytes
        if limit is not None:
            if size < limit <= block.size:
                return None
            rounding = self.options.max_non_split_rounding_bytes or self.options.large_segment_bytes
            if size >= limit and block.size >= size + rounding:
                return None
        del free[at]
        return block

    def _fresh(self, pool: _Pool, size: int, request_bytes: int) -> _Block:
        """Return a block of at least `size` bytes of new memory, giving back cached memory where needed [malloc]."""
        block = self._from_device(pool, size)
        if block is None and self._release_oversize(pool, size):
            block = self._from_device(pool, size)
        if block is None:
            self.empty_cache()
            self._retries += 1
            block = self._from_device(pool, size)
        if block is None:
            assert self.options.capacity_bytes is not None
            raise OutOfDeviceMemory(
                request_bytes=request_bytes,
                allocated_bytes=self._allocated,
                reserved_bytes=self._reserved,
                capacity_bytes=self.options.capacity_bytes,
            )
        return block

    def _from_device(self, pool: _Pool, size: int) -> _Block | None:
        if self.options.expandable_segments:
            return self._expand(pool, size)
        wanted = segment_size(size, self.options.large_segment_bytes)
        if not self._reserve(wanted):
            return None
        block = _Block(self._place(wanted), wanted, pool, base=None, mapped=True)
        self._first_blocks[block.address] = block
        return block

    def _reserve(self, nbytes: int) -> bool:
        """Take memory from the device; False where it has not that much left."""
        capacity = self.options.capacity_bytes
        if capacity is not None and self._reserved + nbytes > capacity:
            return False
        self._reserved += nbytes
        self._peak_reserved = max(self._peak_reserved, self._reserved)
        return True

    def _release(self, pool: _Pool, block: _Block) -> None:
        pool.drop(block)
        del self._first_blocks[block.address]
        self._reserved -= block.size

    def _release_oversize(self, pool: _Pool, size: int) -> bool:
        """Give back cached blocks that may not be split, for `size` bytes; False where they are too few.

        The smallest that is large enough, or else the largest ones, until they are enough together. Those of
        expandable segments do not count. Source: release_available_cached_blocks.
        """
        limit = self.options.max_split_bytes
        if limit is None or self.options.expandable_segments:
            return False
        wanted = max(size, limit)
        at = bisect_left(pool.free, (wanted,))
        if at < len(pool.free):
            self._release(pool, pool.free[at][2])
            return True
        released = 0
        while released < wanted and pool.free and pool.free[-1][0] >= limit:
            released += pool.free[-1][0]
            self._release(pool, pool.free[-1][2])
        return released >= wanted

    def _expand(self, pool: _Pool, size: int) -> _Block | None:
        """Back addresses of an expandable segment with memory until a free block there has `size` bytes.

        None where the device is full; what was backed by then stays in the pool, free. Source:
        try_allocate_expandable_block.
        """
        block = self._lowest_room(pool, size)
        if not block.mapped:
            mapped = self._map(pool, block, min(size, block.size))
            if mapped is None:
                return None
            block = mapped
        while block.size < size:
            after = block.next
            assert after is not None
            mapped = self._map(pool, after, min(size - block.size, after.size))
            if mapped is None:
                return None
            block = mapped
        pool.drop(block)
        return block

    def _lowest_room(self, pool: _Pool, size: int) -> _Block:
        """Return where the lowest addresses of `size` bytes begin that are free, with memory or without.

        Usually one of them at least is without, or the block would have been found cached; not so where a split limit
        kept it from being used. Source: find_expandable_block.
        """
        for _, unmapped in pool.unmapped:
            before = unmapped.previous
            first = unmapped if before is None or before.allocated else before
            room = 0
            block: _Block | None = first
            while room < size and block is not None and not block.allocated:
                room += block.size
                block = block.next
            if room >= size:
                return first
        capacity = self.options.capacity_bytes
        # An eighth more than the device has, so that pages given back in between can be used at the end.
        span = _ADDRESSES_WITHOUT_CAPACITY if capacity is None else capacity + capacity // 8
        # Never too few for this request, which then fails for want of memory and not of addresses.
        span = round_up(max(span, size), pool.page)
        base = self._place(span)
        fresh = _Block(base, span, pool, base=base, mapped=False)
        self._first_blocks[base] = fresh
        pool.put_unmapped(fresh)
        return fresh

    def _map(self, pool: _Pool, block: _Block, nbytes: int) -> _Block | None:
        """Back the first `nbytes` of an unmapped block, in whole pages, and return the free block that they are in.

        None, and nothing done, where the device has too little. Source: map_block, ExpandableSegment::map.
        """
        nbytes = round_up(nbytes, pool.page)
        if not self._reserve(nbytes):
            return None
        pool.drop_unmapped(block)
        if nbytes < block.size:
            pool.put_unmapped(block.cut(nbytes))
        block.mapped = True
        after, before = block.next, block.previous
        if after is not None and after.mapped and not after.allocated:
            pool.drop(after)
            block.absorb_next()
        if before is not None and before.mapped and not before.allocated:
            pool.drop(before)
            before.absorb_next()
            block = before
        pool.put(block)
        return block

    def _unmap(self, pool: _Pool, block: _Block, base: int) -> None:
        """Give back the whole pages inside a free block, and its segment's addresses once no page is left.

        Source: unmap_block, ExpandableSegment::unmap, release_expandable_segment.
        """
        begin = base + round_up(block.address - base, pool.page)
        end = block.address + block.size - (block.address + block.size - base) % pool.page
        if begin >= end:
            return
        pool.drop(block)
        if block.address + block.size > end:
            pool.put(block.cut(end - block.address))
        if block.address < begin:
            head = block
            block = head.cut(begin - head.address)
            pool.put(head)
        block.mapped = False
        self._reserved -= end - begin
        if block.next is not None and not block.next.mapped:
            pool.drop_unmapped(block.next)
            block.absorb_next()
        before = block.previous
        if before is not None and not before.mapped:
            pool.drop_unmapped(before)
            before.absorb_next()
            block = before
        if block.previous is None and block.next is None:
            del self._first_blocks[base]
        else:
            pool.put_unmapped(block)

    def _place_behind(self, size: int) -> int:
        address = self._next_address
        self._next_address += size
        return address


def _growable_size(block: _Block) -> int:
    after = block.next
    return block.size if after is None or after.mapped else block.size + after.size


def _view(first: _Block, blocks: tuple[BlockView, ...]) -> SegmentView:
    return SegmentView(
        address=blocks[0].address,
        size=sum(block.size for block in blocks),
        stream=first.pool.stream,
        pool=first.pool.name,
        expandable=first.base is not None,
        blocks=blocks,
    )

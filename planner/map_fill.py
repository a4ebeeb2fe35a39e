"""Units in a row → what of them each GPU keeps: as many bytes as can be. Numbers alone; no module is known here.

What no GPU keeps waits, and runs on the main device, the first GPU that keeps anything: beside its own units that
has room for the largest that waits, and for the buffers of all that wait.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

# Sums of a set of units that are followed; beyond them the largest that fits is taken first.
_SUMS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What has one place.

    names: keys of a device map; several where they share a tensor. tensors: all names below these.
    left_bytes: of it, what stays on the main device where it waits.
    brought_bytes: what it is brought to the main device of when it runs.
    need: 0, or 1 where it cannot wait, or 2 where it must be on the main device.
    """

    names: tuple[str, ...]
    tensors: tuple[str, ...]
    nbytes: int
    left_bytes: int = 0
    brought_bytes: int = 0
    need: int = 0


Places = tuple[int | None, ...]
_Chain = Any


def kept(units: Sequence[Unit], caps: Sequence[int]) -> Places:
    """Return which GPU keeps each unit, by its number; None where it waits.

    In order where everything fits so. Else the best of these: the longest row from the start that fits in order, and
    for each unit that may be the largest that waits, what the first GPU keeps by exact sums and the others in order;
    then whatever still fits anywhere.
    """
    order = sorted(range(len(units)), key=lambda i: -units[i].need)
    row = [units[i] for i in order]
    best: Places = (None,) * len(units)
    for found in _candidates(row, caps):
        if is_kept(row, caps, found) and kept_bytes(row, found) > kept_bytes(row, best):
            best = found
        if None not in best:
            break
    places = dict(zip(order, best, strict=True))
    return tuple(places[index] for index in range(len(units)))


def in_order(units: Sequence[Unit], caps: Sequence[int]) -> Places | None:
    """Return a place for every unit, each on the GPU of the one before or a later one; None where that cannot be."""
    places: list[int | None] = []
    gpu, free = 0, caps[0] if caps else -1
    for unit in units:
        while unit.nbytes > free:
            gpu += 1
            if gpu >= len(caps):
                return None
            free = caps[gpu]
        free -= unit.nbytes
        places.append(gpu)
    return tuple(places)


def is_kept(units: Sequence[Unit], caps: Sequence[int], places: Sequence[int | None]) -> bool:
    """Tell whether no GPU keeps more than it may, the main one has room for what waits, and needs are met."""
    main = main_of(places)
    if main is None:
        return True
    free = list(caps)
    waiting = []
    for unit, place in zip(units, places, strict=True):
        if place is None:
            waiting.append(unit)
        else:
            free[place] -= unit.nbytes
        if unit.need and (place is None or (unit.need == 2 and place != main)):
            return False
    free[main] -= sum(unit.left_bytes for unit in waiting) + max((unit.brought_bytes for unit in waiting), default=0)
    return min(free) >= 0


def kept_bytes(units: Sequence[Unit], places: Sequence[int | None]) -> int:
    """Return the bytes that GPUs keep."""
    return sum(unit.nbytes for unit, place in zip(units, places, strict=True) if place is not None)


def main_of(places: Sequence[int | None]) -> int | None:
    """Return the number of the first GPU that keeps anything."""
    return min((place for place in places if place is not None), default=None)


def _candidates(units: Sequence[Unit], caps: Sequence[int]) -> Iterator[Places]:
    total = sum(unit.nbytes for unit in units)
    if total <= sum(caps):
        by_size = sorted(range(len(units)), key=lambda i: -units[i].nbytes)
        whole = (in_order(units, caps), _first_fit(units, caps, range(len(units))), _first_fit(units, caps, by_size))
        yield from (found for found in whole if found is not None)
    most = 0
    for main in range(len(caps)):
        if min(total, sum(caps[main:])) <= most:
            break
        for found in (_longest_row(units, caps, main), *_with_room(units, caps, main, most)):
            if found is not None:
                filled = _filled(units, caps, found)
                most = max(most, kept_bytes(units, filled))
                yield filled


def _longest_row(units: Sequence[Unit], caps: Sequence[int], main: int) -> Places | None:
    """Return the most units from the start that fit in order from `main` on, with room for all others to wait."""
    sums = [0, *accumulate(unit.nbytes for unit in units)]
    left = [0, *accumulate(unit.left_bytes for unit in reversed(units))][::-1]
    brought = [0, *accumulate((unit.brought_bytes for unit in reversed(units)), max)][::-1]
    for count in range(len(units) - 1, 0, -1):
        free = [caps[main] - left[count] - brought[count], *caps[main + 1 :]]
        ends = [0]
        for cap in free:
            ends.append(max(ends[-1], bisect_right(sums, sums[ends[-1]] + cap) - 1))
        if ends[1] and ends[-1] >= count:
            row = [main + gpu for gpu, (begin, end) in enumerate(pairwise(ends)) for _ in range(begin, end)]
            return (*row[:count], *[None] * (len(units) - count))
    return None


def _with_room(units: Sequence[Unit], caps: Sequence[int], main: int, most: int) -> Iterator[Places]:
    """Yield what GPUs keep for each room that may be left for a unit that waits: all that is larger, to begin with."""
    left = sum(unit.left_bytes for unit in units)
    whole = sum(caps[main:])
    for room in sorted({unit.brought_bytes for unit in units}):
        must = [i for i, unit in enumerate(units) if unit.need or unit.brought_bytes > room]
        if sum(units[i].nbytes for i in must) > whole - room or whole - room <= most:
            continue
        # What the first GPU need not run may leave it to what is left out of the others.
        for gpus in (range(main, len(caps)), range(len(caps) - 1, main - 1, -1))[: len(caps) - main]:
            places: list[int | None] = [None] * len(units)
            free = list(caps)
            free[main] -= room + left
            for i in must:
                allowed = (main,) if units[i].need == 2 else gpus
                places[i] = gpu = next((g for g in allowed if _cost(units[i], g == main) <= free[g]), None)
                if gpu is None:
                    break
                free[gpu] -= _cost(units[i], gpu == main)
            else:
                for i in _subset(units, [i for i, place in enumerate(places) if place is None], free[main]):
                    places[i] = main
                if main_of(places) == main:
                    yield tuple(places)


def _cost(unit: Unit, on_main: bool) -> int:
    """Return what a GPU has less of when it keeps a unit; the main one has what it left there already."""
    return unit.nbytes - unit.left_bytes if on_main else unit.nbytes


def _subset(units: Sequence[Unit], rest: Sequence[int], budget: int) -> list[int]:
    """Return of `rest` what keeps the most bytes within the main device's budget; exactly so while sums are few."""
    # What it takes → the most bytes kept for that, and the chain of those chosen.
    reached: dict[int, tuple[int, _Chain]] = {0: (0, None)}
    for i in rest:
        cost = _cost(units[i], True)
        for taken, (nbytes, chain) in list(reached.items()):
            more = nbytes + units[i].nbytes
            if taken + cost <= budget and more > reached.get(taken + cost, (0, None))[0]:
                reached[taken + cost] = more, (i, chain)
        if len(reached) > _SUMS:
            break
    else:
        chosen, chain = [], max(reached.values(), key=lambda each: each[0])[1]
        while chain is not None:
            i, chain = chain
            chosen.append(i)
        return chosen
    chosen = []
    for i in sorted(rest, key=lambda i: -units[i].nbytes):
        if _cost(units[i], True) <= budget:
            chosen.append(i)
            budget -= _cost(units[i], True)
    return chosen


def _first_fit(units: Sequence[Unit], caps: Sequence[int], order: Sequence[int]) -> Places | None:
    places: list[int | None] = [None] * len(units)
    free = list(caps)
    for i in order:
        gpu = next((gpu for gpu, room in enumerate(free) if units[i].nbytes <= room), None)
        if gpu is None:
            return None
        places[i] = gpu
        free[gpu] -= units[i].nbytes
    return tuple(places)


def _filled(units: Sequence[Unit], caps: Sequence[int], places: Places) -> Places:
    """Return the same with units that still fit where something has room, until none does."""
    main = main_of(places)
    if main is None:
        return places
    now = list(places)
    free = list(caps)
    for unit, place in zip(units, places, strict=True):
        if place is None:
            free[main] -= unit.left_bytes
        else:
            free[place] -= unit.nbytes
    largest = sorted(range(len(units)), key=lambda i: units[i].brought_bytes)
    changed = True
    while changed:
        changed = False
        for i, unit in enumerate(units):
            if now[i] is not None:
                continue
            while now[largest[-1]] is not None:
                largest.pop()
            others = (j for j in reversed(largest) if j != i and now[j] is None)
            brought = next((units[j].brought_bytes for j in others), 0)
            for gpu in range(main, len(caps)):
                cost = _cost(unit, gpu == main)
                if cost + (brought if gpu == main else 0) <= free[gpu]:
                    now[i] = gpu
                    free[gpu] -= cost
                    free[main] += unit.left_bytes if gpu != main else 0
                    changed = True
                    break
    return tuple(now)

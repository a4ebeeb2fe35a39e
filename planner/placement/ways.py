"""The ways to have so many layers on one device where host memory has its price: all in host memory, whole groups on
disk, or experts on disk (see `planner.placement.rent`).

A way's cost is the least over how many whole groups of each size are streamed, all counts of them, with experts taking
what memory is then still missing, in parts of experts; what is on disk is taken in parts as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from planner import memory
from planner.hardware import Device
from planner.placement.problem import Home, Option, Price, Problem, Unit
from planner.placement.tables import INFINITE, MOST_COMBINATIONS, Beside, hidden_ns, needs, weighted
from planner.units import MIB


@dataclass(frozen=True, slots=True)
class Kind:
    """Slices of one size and price that a device may have elsewhere.

    near, far: by step, what one adds in host memory and on disk (None where it may not be there): to the link's time,
    of a whole group, or else to the device's own. beside: see `Price`. nbytes: in host memory. near_slot, far_slot:
    what its copies need. copied: the steps in which it is copied from host memory; queues: it is copied in every step
    from disk.
    """

    freed: int
    is_whole: bool
    near: Mapping[str, int]
    far: Mapping[str, int] | None
    beside: Mapping[str, int]
    nbytes: int
    near_slot: int
    far_slot: int
    copied: frozenset[str]
    queues: bool


def kinds_of(problem: Problem, device: Device, option: Option) -> Iterator[Kind]:
    """Return the kinds of an option's slices, one for each price; of a CPU, what stays there costs nothing near."""
    size = memory.allocation_bytes(option.group.slice_slab_bytes, device)
    hosts = [home for home in option.homes if home.memory != "disk"]
    disk = next((home for home in option.homes if home.memory == "disk"), None)
    names = [step.name for step in problem.steps]
    for at in range(len(option.homes[0].prices) if option.homes else 0):
        near = [home.prices[at] for home in hosts]
        far = _ns(disk.prices[at], option) if disk is not None else None
        yield Kind(
            freed=option.freed_bytes,
            is_whole=option.prefetched,
            near={name: min((_ns(price, option)[name] for price in near), default=0) for name in names},
            far=far,
            beside={
                name: min((_ns(price, option)[name] + price.beside_ns[name] for price in near), default=0)
                - min((_ns(price, option)[name] for price in near), default=0)
                for name in names
            },
            nbytes=min((home.nbytes for home in hosts), default=option.freed_bytes),
            near_slot=_slot(hosts, size),
            far_slot=_slot([disk] if disk is not None else [], size),
            copied=frozenset(name for name in names if near and all(price.lane_ns[name] > 0 for price in near)),
            queues=disk is not None and all(disk.prices[at].lane_ns[s.name] > 0 for s in problem.steps if s.weight),
        )


def _ns(price: Price, option: Option) -> Mapping[str, int]:
    return price.lane_ns if option.prefetched else price.serial_ns


def _slot(homes: Sequence[Home], size: int) -> int:
    return size if homes and all(home.needs_slot for home in homes) else 0


@dataclass(frozen=True, slots=True)
class Pick:
    """What attains a way's cost: slots, which combination of whole groups, how many bytes of these are on disk (with
    is_far on a CPU: of experts too), how many bytes experts free, and whether some of them are on disk. nbytes: in host
    memory, less experts that may be on disk.
    """

    slots: int = memory.SLOT_COUNT
    combination: int | None = None
    away: int = 0
    wanted: int = 0
    is_far: bool = False
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Way:
    """One way to have so many layers on a device: its least cost with its rent at each rent, in ns, and the host memory
    that it surely takes, in bytes. picks: what attains the costs.
    """

    costs: Any
    nbytes: int
    picks: tuple[Pick, ...]

    def with_cache(self, rents: Any, nbytes: int) -> Way:
        """Return the way with so many more bytes of host memory, which pay rent, for keys and values."""
        picks = tuple(replace(pick, nbytes=pick.nbytes + nbytes) for pick in self.picks)
        return Way(self.costs + rents, self.nbytes + nbytes, picks)


@dataclass(frozen=True, slots=True)
class Streamed:
    """Combinations of counts of whole groups that are streamed, each an element.

    number: of the combination. freed, waits: bytes on the device and in host memory; lane: copies from there; largest,
    smallest: slot and copy; slows: what copies take from a CPU that computes experts.
    """

    number: Any
    freed: Any
    waits: Any
    lane: Any
    largest: Any
    smallest: Any
    slows: Any

    def only(self, chosen: Any) -> Streamed:
        parts = (self.number, self.freed, self.waits, self.lane, self.largest, self.smallest, self.slows)
        return Streamed(*(part[chosen] for part in parts))


class Entries:
    """The ways to have so many layers on one device, at some rents.

    room: ways without experts on disk take no more bytes of host memory; where they must, their cost is infinite.
    """

    def __init__(
        self, problem: Problem, device: Device, units: list[Unit], rents: Sequence[int], room: int | None = None
    ):
        self.problem, self.device, self.units = problem, device, units
        self.rents, self.room = rents, room
        self.kinds: dict[tuple[object, ...], tuple[Kind, dict[tuple[str, str], int]]] = {}
        for unit in units:
            for option, *_ in unit.on[device.name].options.values() if device.name in unit.on else ():
                prices = option.homes[0].prices if option.homes else ()
                for kind, price in zip(kinds_of(problem, device, option), prices, strict=True):
                    far = None if kind.far is None else tuple(kind.far.items())
                    key = (kind.freed, kind.is_whole, tuple(kind.near.items()), far, tuple(kind.beside.items()),
                           kind.nbytes, kind.near_slot, kind.far_slot, kind.copied, kind.queues)  # fmt: skip
                    counts = self.kinds.setdefault(key, (kind, {}))[1]
                    counts[unit.name, option.key] = counts.get((unit.name, option.key), 0) + price.slices

    def ways(self, counts: dict[str, int]) -> list[Way]:
        computing, missing = self.needed(counts)
        there = self.there(counts)
        if sum(kind.freed * most for kind, most in there) < missing:
            return []
        if self.device.kind == "cpu":
            return list(self._on_host(computing, missing, there, Beside.of(self.problem, self.device, counts)))
        cached = sum(
            unit.on[self.device.name].host_bytes * counts[unit.name] for unit in self.units if counts[unit.name]
        )
        whole, left_out = enumerated(there)
        sliced = [entry for entry in there if not entry[0].is_whole]
        # What is too much to go through is taken to be free.
        missing -= sum(kind.freed * most for kind, most in left_out)
        if missing <= 0:
            costs = np.full(len(self.rents), weighted(self.problem, computing), np.int64)
            ways = [Way(costs, 0, (Pick(),) * len(self.rents))]
        else:
            ways = list(self._streaming(computing, missing, streamed_of(whole), whole, sliced, counts))
        return [way.with_cache(self._rent(cached), cached) for way in ways] if cached else ways

    def needed(self, counts: dict[str, int]) -> tuple[dict[str, int], int]:
        """See `tables.needs`."""
        return needs(self.problem, self.device, self.units, counts)

    def parts(self, kind: Kind, counts: Mapping[str, int], amount: int) -> Iterator[tuple[tuple[str, str], int]]:
        """Yield how many of some slices of a kind each (unit, group) has, one after another."""
        slices = next(slices for known, slices in self.kinds.values() if known == kind)
        for place, n in slices.items():
            taken = min(amount, counts[place[0]] * n)
            amount -= taken
            if taken:
                yield place, taken

    def there(self, counts: Mapping[str, int]) -> list[tuple[Kind, int]]:
        """Return the kinds that so many layers have, and how many slices of each."""
        found = [
            (kind, sum(counts[name] * n for (name, _), n in slices.items())) for kind, slices in self.kinds.values()
        ]
        return [(kind, most) for kind, most in found if most]

    def _rent(self, nbytes: int) -> Any:
        return np.array([rent * nbytes // MIB for rent in self.rents], np.int64)

    def _on_host(
        self, computing: Mapping[str, int], missing: int, there: Sequence[tuple[Kind, int]], beside: Beside
    ) -> Iterator[Way]:
        """Yield what the CPU's layers cost where they wait in its memory, which has its rent, or on disk: with experts
        there, or whole groups, which are read beside computing, and no experts that are asked for in every step.
        """
        capacity = self.problem.hardware.pool(self.device.pool).usable_bytes
        kept = missing + capacity - sum(kind.freed * most for kind, most in there)
        costs, here = weighted(self.problem, computing) + self._rent(kept), np.full(len(self.rents), kept)
        for kind, most in there:
            assert kind.far is not None
            paid, on_disk = self._rent(kind.freed), weighted(self.problem, kind.far)
            costs = costs + np.minimum(paid, on_disk) * most
            here += np.where(paid <= on_disk, kind.freed * most, 0)
        most_here = kept + sum(kind.freed * most for kind, most in there)
        picks = tuple(Pick(away=most_here - int(n), is_far=True, nbytes=max(0, int(n))) for n in here)
        yield Way(costs, max(0, kept), picks)
        whole = [(kind, most) for kind, most in there if kind.is_whole]
        if not whole:
            return
        kept += sum(kind.freed * most for kind, most in there if not kind.is_whole and kind.queues)
        size = sum(kind.freed * most for kind, most in whole)
        reads = [(min(kind.far.values()), kind.freed) for kind, _ in whole if kind.far is not None]
        each, begins = min(ns / nbytes for ns, nbytes in reads), min(ns for ns, _ in reads)
        least = min(nbytes for _, nbytes in reads)
        steps = [
            (s.weight, computing[s.name] + begins, beside.outside_ns(s.name, computing[s.name]))
            for s in self.problem.steps
        ]
        # The time is convex in the bytes on disk, but for the first group: with the rent of the others, it is least at
        # an end or where some step's reading is just as long as what it is beside.
        kinks = [min(max(least, (computes - beyond) / each), size) for _, computes, beyond in steps]
        aways = [0, least, size, *kinks]
        times = [
            sum(weight * max(computes, beyond + int(away * each)) for weight, computes, beyond in steps)
            for away in aways[1:]
        ]
        times = [weighted(self.problem, computing), *times]
        found = [
            min((ns + int(rent * (kept + size - away) / MIB) - 1, away) for ns, away in zip(times, aways, strict=True))
            for rent in self.rents
        ]
        picks = tuple(Pick(away=int(away), nbytes=max(0, kept + size - int(away))) for _, away in found)
        yield Way(np.array([ns for ns, _ in found], np.int64), max(0, kept), picks)

    def _way(self, choices: Sequence[_Choices], surely: int, slots: int) -> Way:
        """Return the way with the least cost of some choices."""
        parts = (np.concatenate([getattr(entry, name) for entry in choices]) for name in _Choices.__slots__)
        ns, nbytes, number, away, wanted = parts
        costs, picks = [], []
        for rent in self.rents:
            paid = ns + np.floor(nbytes * (rent / MIB)).astype(np.int64) - 1
            if self.room is not None:
                paid = np.where(nbytes <= self.room, paid, INFINITE)
            at = int(paid.argmin())
            costs.append(int(paid[at]))
            picks.append(Pick(slots, int(number[at]), int(away[at]), int(wanted[at]), nbytes=int(nbytes[at])))
        return Way(np.array(costs, np.int64), surely, tuple(picks))

    def _streaming(
        self,
        computing: dict[str, int],
        missing: int,
        streamed: Streamed,
        whole: Sequence[tuple[Kind, int]],
        sliced: Sequence[tuple[Kind, int]],
        counts: dict[str, int],
    ) -> Iterator[Way]:
        beside = Beside.of(self.problem, self.device, counts)
        room = sum(kind.freed * most for kind, most in sliced)
        disk = _Disk.of([kind for kind, _ in whole])
        for slots in memory.SLOT_COUNTS:
            rest = missing + slots * streamed.largest - streamed.freed
            slot = min((kind.near_slot for kind, _ in sliced), default=0)
            wanted = np.where(rest > 0, rest + memory.SLOT_COUNT * slot, 0)
            if (fits := wanted <= room).any():
                yield from self._near(computing, streamed.only(fits), slots, beside, wanted[fits], sliced, disk)
            if not sliced or any(kind.far is None for kind, _ in sliced):
                continue
            wanted = np.maximum(rest + memory.SLOT_COUNT * min(kind.far_slot for kind, _ in sliced), 1)
            if (fits := wanted <= room).any():
                yield self._far(computing, streamed.only(fits), slots, wanted[fits], sliced, disk)

    def _near(
        self,
        computing: Mapping[str, int],
        streamed: Streamed,
        slots: int,
        beside: Beside,
        wanted: Any,
        sliced: Sequence[tuple[Kind, int]],
        disk: _Disk | None,
    ) -> Iterator[Way]:
        """Yield the ways without experts on disk."""
        steps = self.problem.steps
        contention = {
            s.name: np.minimum(streamed.slows, cover(wanted, sliced, [kind.beside[s.name] for kind, _ in sliced]))
            for s in steps
        }
        serial = {
            s.name: computing[s.name]
            + cover(wanted, sliced, [kind.near[s.name] for kind, _ in sliced])
            + contention[s.name]
            for s in steps
        }
        copied = {s.name: (wanted > 0) & all(s.name in kind.copied for kind, _ in sliced) for s in steps}
        # Copies last longer too: less of them is hidden.
        hidden = {s.name: hidden_ns(s, slots, streamed.lane, streamed.smallest) - contention[s.name] for s in steps}
        experts = cover(wanted, sliced, [kind.nbytes for kind, _ in sliced])

        # With two slots, copies overlap with computing but for what runs before the first or after the last.
        beyond = {s.name: beside.cached[s.name] + beside.outside_ns(s.name, serial[s.name]) for s in steps}

        def total_ns(lane: Any, at: Any) -> Any:
            total = np.zeros_like(lane)
            for s in steps:
                exposed, computes = np.maximum(lane - hidden[s.name][at], 0), serial[s.name][at]
                taken = computes + exposed
                if slots > 1:
                    together = np.maximum(computes, np.where(exposed > 0, exposed + beyond[s.name][at], 0))
                    taken = np.where(copied[s.name][at] & (lane > 0), taken, together) if has_copies else together
                total += s.weight * taken
            return total

        has_copies = any(held.any() for held in copied.values())
        every, resident = slice(None), np.zeros_like(wanted)
        choices = _Choices(total_ns(streamed.lane, every), streamed.waits + experts, streamed.number, resident, wanted)
        yield self._way([choices], int(choices.nbytes.min()), slots)
        if disk is None or not (chosen := np.flatnonzero(streamed.waits)).size:
            return
        # The time is convex in the bytes on disk, but for where the first copy is waited for: it is least, with the
        # rent of the others, at an end or where copies are just hidden or just as long as what they hide behind.
        kinks = [hidden[s.name][chosen] for s in steps]
        if slots > 1:
            kinks += [(hidden[s.name] + serial[s.name] - beyond[s.name])[chosen] for s in steps]
        those = streamed.only(chosen)
        fixed = experts[chosen] + those.waits
        if self.room is not None:
            kinks.append(those.lane + disk.longer_ns(np.maximum(fixed - self.room, 0)) + 1)
        found = []
        for away in disk.choices(those, kinks):
            ns = total_ns(those.lane + disk.longer_ns(away), chosen)
            found.append(_Choices(ns, fixed - away, those.number, away, wanted[chosen]))
        yield self._way(found, int(experts[chosen].min()), slots)

    def _far(
        self,
        computing: dict[str, int],
        streamed: Streamed,
        slots: int,
        wanted: Any,
        sliced: Sequence[tuple[Kind, int]],
        disk: _Disk | None,
    ) -> Way:
        """Return the way with experts on disk: what they take adds to all else, where every step asks for them."""
        problem = self.problem
        adds = slots == 1 or all(kind.queues for kind, _ in sliced)
        each = [
            cover(wanted, sliced, [paid_ns(problem, kind, rent, far=True) for kind, _ in sliced]) for rent in self.rents
        ]
        hidden = [(s.weight, hidden_ns(s, slots, streamed.lane, streamed.smallest)) for s in problem.steps]
        exposed = sum(weight * np.maximum(streamed.lane - more, 0) for weight, more in hidden)
        if adds:
            # Copies of whole groups from disk take no less: most combinations are worse than another.
            may_be_best = np.zeros(wanted.shape, np.bool_)
            for rent, experts in zip(self.rents, each, strict=True):
                least = exposed + experts
                may_be_best |= least <= (least + np.ceil(streamed.waits * (rent / MIB))).min()
            streamed, wanted, exposed = streamed.only(may_be_best), wanted[may_be_best], exposed[may_be_best]
            each = [experts[may_be_best] for experts in each]
            hidden = [(weight, more[may_be_best]) for weight, more in hidden]
        aways = [np.zeros_like(wanted)]
        times = [exposed if adds else aways[0]]
        longest = [more for _, more in hidden]
        for away in disk.choices(streamed, longest) if disk is not None and adds else ():
            assert disk is not None
            lane = streamed.lane + disk.longer_ns(away)
            longer = sum(weight * np.maximum(lane - more, 0) for weight, more in hidden)
            times.append(np.where(streamed.waits > 0, longer, exposed))
            aways.append(away)
        costs, picks = [], []
        for rent, experts in zip(self.rents, each, strict=True):
            paying = [streamed.waits - away if adds else aways[0] for away in aways]
            groups = np.array([ns + np.floor(n * (rent / MIB)) - 1 for ns, n in zip(times, paying, strict=True)])
            total = groups.min(0) + experts
            at = int(total.argmin())
            costs.append(weighted(problem, computing) + int(total[at]))
            away = int(aways[int(groups[:, at].argmin())][at])
            waits = int(streamed.waits[at]) - away
            picks.append(Pick(slots, int(streamed.number[at]), away, int(wanted[at]), is_far=True, nbytes=waits))
        return Way(np.array(costs, np.int64), 0, tuple(picks))


def paid_ns(problem: Problem, kind: Kind, rent: int, *, far: bool) -> int:
    """Return what a slice takes of all steps with its rent; with `far`, or on disk where that is less."""
    near = weighted(problem, kind.near) + kind.nbytes * rent // MIB
    return min(near, weighted(problem, kind.far)) if far and kind.far is not None else near


@dataclass(frozen=True, slots=True)
class _Choices:
    """Elements of one way: time and bytes that pay rent, and what they are (see `Pick`)."""

    ns: Any
    nbytes: Any
    number: Any
    away: Any
    wanted: Any


@dataclass(frozen=True, slots=True)
class _Disk:
    """What whole groups on disk take longer than in host memory, at least: for each byte, and the first of them.

    ns_per_byte: of host memory that is not taken; least_ns, least_bytes: of one group.
    """

    ns_per_byte: float
    least_ns: int
    least_bytes: int

    @staticmethod
    def of(whole: Sequence[Kind]) -> _Disk | None:
        longer = [(min(k.far.values()) - min(k.near.values()), k.nbytes) for k in whole if k.far is not None]
        if not longer:
            return None
        return _Disk(min(ns / size for ns, size in longer), min(ns for ns, _ in longer), min(n for _, n in longer))

    def longer_ns(self, away: Any) -> Any:
        return np.maximum(np.floor(away * self.ns_per_byte).astype(np.int64), self.least_ns)

    def choices(self, streamed: Streamed, kinks: Sequence[Any]) -> Iterator[Any]:
        """Yield bytes on disk: of one group, of all, and those with which copies take as long as each of `kinks`."""
        least = np.minimum(self.least_bytes, streamed.waits)
        yield least
        yield streamed.waits
        for lane in kinks:
            away = np.ceil((lane - streamed.lane) / max(self.ns_per_byte, 1e-9))
            yield np.clip(away, least, streamed.waits).astype(np.int64)


def enumerated(there: Sequence[tuple[Kind, int]]) -> tuple[list[tuple[Kind, int]], list[tuple[Kind, int]]]:
    """Return the whole groups whose counts are gone through, and the others."""
    whole = sorted((entry for entry in there if entry[0].is_whole), key=lambda entry: -entry[0].freed * entry[1])
    left_out = []
    while math.prod(most + 1 for _, most in whole) > MOST_COMBINATIONS:
        left_out.append(whole.pop())
    return whole, left_out


def amounts(whole: Sequence[tuple[Kind, int]], pick: Pick) -> list[tuple[Kind, int]]:
    """Return how many whole groups of each kind a pick streams."""
    if pick.combination is None or not whole:
        return []
    found = np.unravel_index(pick.combination, [most + 1 for _, most in whole])
    return [(kind, int(n)) for (kind, _), n in zip(whole, found, strict=True)]


def streamed_of(whole: Sequence[tuple[Kind, int]]) -> Streamed:
    """Return all combinations."""
    grid = np.meshgrid(*(np.arange(most + 1) for _, most in whole), indexing="ij") if whole else [np.zeros(1, np.int64)]
    size = grid[0].size
    freed, waits, lane, largest, slows = (np.zeros(size, np.int64) for _ in range(5))
    smallest = np.full(size, INFINITE)
    for (kind, _), axis in zip(whole, grid, strict=False):
        amount, copy = axis.ravel(), min(kind.near.values())
        freed += kind.freed * amount
        waits += kind.nbytes * amount
        lane += copy * amount
        slows += min(kind.beside.values()) * amount
        largest = np.where(amount > 0, np.maximum(largest, kind.near_slot), largest)
        smallest = np.where(amount > 0, np.minimum(smallest, copy), smallest)
    return Streamed(np.arange(size), freed, waits, lane, largest, smallest, slows)


def cover(wanted: Any, kinds: Sequence[tuple[Kind, int]], prices: Sequence[int]) -> Any:
    """Return the least price of slices, taken in parts, that free what is wanted: the cheapest for each byte first."""
    total, left = np.zeros(wanted.shape), wanted
    by_byte = [(price / kind.freed, kind.freed * most) for (kind, most), price in zip(kinds, prices, strict=True)]
    for price, room in sorted(by_byte):
        taken = np.minimum(left, room)
        left = left - taken
        total += taken * price
    return np.maximum(np.floor(total).astype(np.int64) - 1, 0)

"""What waits where, given the layers of each device and the way it has them: picks → counts of what is away.

Host memory goes first to what the picks say is there. Of experts that may be on disk, as many are brought in from there
as it still has room for: whole layers of them, since the experts of one layer wait in one memory, then part of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from planner import memory
from planner.hardware import Device
from planner.placement.problem import Home, Option, Problem
from planner.placement.tables import FAR, Share, units_of, weighted
from planner.placement.ways import Entries, Kind, Pick, amounts, enumerated, paid_ns

# What was chosen is made smaller at most so often.
MOST_TRIED = 4

_Key = tuple[str, str, str, str | None]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The layers of one device by unit, and what attains the cost of the way it has them."""

    device: Device
    counts: dict[str, int]
    pick: Pick


@dataclass(frozen=True, slots=True)
class _Experts:
    """So many experts of one group, in so many layers, that wait in host memory or on disk."""

    key: _Key
    option: Option
    layers: int
    amount: int

    def most_near(self, room: int) -> int:
        """Return the most of them that fit in so many bytes of host memory, no layer's being in both."""
        each, slices = _home(self.option, "host").nbytes, self.option.group.slices
        near = min(self.amount, max(0, room) // each)
        if -(-near // slices) + -(-(self.amount - near) // slices) <= self.layers:
            return near
        # Part of a layer is left there whose other experts stay on the device, where enough do.
        return near // slices * slices


def shared_out(problem: Problem, chosen: Sequence[Chosen], rent: int) -> Share | None:
    """Return the share of what was chosen with all that waits somewhere; None where host memory is too small.

    Where it is so by little, the device that has most of it is given less.
    """
    chosen = list(chosen)
    for _ in range(MOST_TRIED):
        filler = _Filler(problem, rent)
        for entry in chosen:
            filler.place(entry)
        host, room = min(filler.room.items(), key=lambda item: item[1])
        if room >= 0:
            break
        there = [entry for entry in chosen if problem.hardware.host(entry.device.name) == host]
        most = max(there, key=lambda entry: entry.pick.nbytes)
        pick = _less(problem, most, rent, most.pick.nbytes + room)
        if pick is None:
            return None
        chosen[chosen.index(most)] = Chosen(most.device, most.counts, pick)
    else:
        return None
    filler.bring_in()
    return Share(
        bound_ns=0,
        layers={(unit, entry.device.name): n for entry in chosen for unit, n in entry.counts.items() if n},
        away={key: n for key, n in filler.away.items() if n},
        at=filler.at,
        single=frozenset(entry.device.name for entry in chosen if entry.pick.slots == 1),
    )


def _less(problem: Problem, chosen: Chosen, rent: int, room: int) -> Pick | None:
    """Return the best pick without experts on disk that takes no more than so many bytes of host memory; of a CPU the
    same one with more on disk.
    """
    if chosen.device.kind == "cpu":
        return replace(chosen.pick, away=chosen.pick.away + chosen.pick.nbytes - room, nbytes=room)
    ways = Entries(problem, chosen.device, units_of(problem), [rent], room).ways(chosen.counts)
    found = [(int(way.costs[0]), way.picks[0]) for way in ways if not way.picks[0].is_far and way.costs[0] < FAR]
    return min(found, key=lambda entry: entry[0])[1] if found else None


class _Filler:
    def __init__(self, problem: Problem, rent: int):
        self.problem, self.rent = problem, rent
        hardware = problem.hardware
        self.room = {
            hardware.host(name): hardware.pool(hardware.device(hardware.host(name)).pool).usable_bytes
            for unit in problem.units
            for name in unit.on
        }
        self.away: dict[tuple[_Key, str], int] = {}
        self.at: dict[tuple[_Key, str], int] = {}
        self.far: list[_Experts] = []

    def place(self, chosen: Chosen) -> None:
        """Note what a device has in host memory; experts that may be on disk are kept for later."""
        problem, device, counts, pick = self.problem, chosen.device, chosen.counts, chosen.pick
        entries = Entries(problem, device, units_of(problem), [self.rent])
        there = entries.there(counts)
        host = problem.hardware.host(device.name)
        if device.kind == "cpu":
            self._on_host(entries, chosen, there)
            return
        self.room[host] -= sum(unit.on[device.name].host_bytes * counts[unit.name] for unit in problem.units
                               if counts[unit.name])  # fmt: skip
        whole, _ = enumerated(there)
        left = pick.away
        largest = 0
        for kind, amount in sorted(amounts(whole, pick), key=lambda entry: -entry[0].nbytes):
            on_disk = min(amount, left // kind.nbytes) if kind.far is not None else 0
            left -= on_disk * kind.nbytes
            largest = max(largest, kind.far_slot if on_disk else 0)
            self._wait(entries, chosen, kind, on_disk, "disk")
            self._wait(entries, chosen, kind, amount - on_disk, "host", skip=on_disk)
        self.room[host] -= pick.slots * largest
        sliced = [entry for entry in there if not entry[0].is_whole]
        missing, staged = pick.wanted, 0
        for kind, most in sorted(sliced, key=lambda e: paid_ns(problem, e[0], self.rent, far=pick.is_far) / e[0].freed):
            amount = min(most, -(-max(0, missing) // kind.freed))
            missing -= amount * kind.freed
            if not pick.is_far:
                self._wait(entries, chosen, kind, amount, "host")
            elif amount:
                staged = max(staged, kind.far_slot)
                for (unit, key), taken in entries.parts(kind, counts, amount):
                    option = self.option(unit, device.name, key)
                    self.far.append(_Experts((unit, device.name, key, None), option, counts[unit], taken))
        self.room[host] -= memory.SLOT_COUNT * staged

    def bring_in(self) -> None:
        """Let experts that may be on disk wait in host memory while there is room."""
        near = dict.fromkeys((entry.key for entry in self.far), 0)
        for whole in (True, False):
            for entry in self.far:
                host, slices = self.problem.hardware.host(entry.key[1]), entry.option.group.slices
                each = _home(entry.option, "host").nbytes
                room = self.room[host] + near[entry.key] * each
                most = entry.most_near(room)
                most = most // slices * slices if whole and most < entry.amount else most
                self.room[host] = room - most * each
                near[entry.key] = most
        for entry in self.far:
            memories = ((_home(entry.option, "host").memory, near[entry.key]), ("disk", entry.amount - near[entry.key]))
            for where, amount in memories:
                if amount:
                    self.away[entry.key, where] = amount
                    self.at[entry.key, where] = -(-amount // entry.option.group.slices)

    def option(self, unit: str, device: str, key: str) -> Option:
        found = self.problem.unit(unit)
        assert found is not None
        return found.on[device].options[key][0]

    def _on_host(self, entries: Entries, chosen: Chosen, there: Sequence[tuple[Kind, int]]) -> None:
        """Keep what the CPU uses where that costs less: in its memory, with its rent, or on disk."""
        name = chosen.device.name
        _, missing = entries.needed(chosen.counts)
        capacity = self.problem.hardware.pool(chosen.device.pool).usable_bytes
        self.room[name] -= missing + capacity
        left = chosen.pick.away
        those = [entry for entry in there if entry[0].is_whole or chosen.pick.is_far]
        for kind, most in sorted(those, key=lambda entry: _far_ns(self.problem, entry[0]) / entry[0].freed):
            amount = min(most, -(-left // kind.freed))
            left = max(0, left - amount * kind.freed)
            if amount:
                self.room[name] += kind.freed * amount - memory.SLOT_COUNT * kind.far_slot
                self._wait(entries, chosen, kind, amount, "disk")

    def _wait(self, entries: Entries, chosen: Chosen, kind: Kind, amount: int, where: str, *, skip: int = 0) -> None:
        """Note that so many slices of a kind wait somewhere. skip: the first so many of them wait elsewhere."""
        name = chosen.device.name
        taken = dict(entries.parts(kind, chosen.counts, skip))
        for place, slices in entries.parts(kind, chosen.counts, skip + amount):
            unit, key = place
            option = self.option(unit, name, key)
            home = _home(option, where)
            more = slices - taken.get(place, 0)
            at = (unit, name, key, None), home.memory
            self.away[at] = self.away.get(at, 0) + more
            if home.memory != "disk":
                self.room[home.place] -= more * home.nbytes


def _far_ns(problem: Problem, kind: Kind) -> int:
    """Return what a slice takes on disk over the weighted steps."""
    assert kind.far is not None
    return weighted(problem, kind.far)


def _home(option: Option, where: str) -> Home:
    """Return the home of an option on disk, or the first in host memory."""
    return next(home for home in option.homes if (home.memory == "disk") == (where == "disk"))

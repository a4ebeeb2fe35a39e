"""What host memory is worth where it binds: a lower bound on the cost, and proposals, by tables that pay rent for it.

Each MiB of host memory is given a price, a rent. What a placement costs with the rent of all it keeps there is at most
its cost and the rent of all there is; so the least of the former less the latter is a lower bound on the cost
(Lagrangian relaxation: Geoffrion, Mathematical Programming Study 2, 1974). It is concave in the rent; the rents worth
trying are those at which something costs the same on disk as in host memory.

A rent alone is too weak, since what a device costs jumps with its first expert on disk: copies on demand then keep
those of whole groups from hiding behind computing. So each entry is one of three ways,

    all in host memory      as many bytes of it as wait
    whole groups on disk    experts take host memory, and groups as much of it as is not slower than the disk
    experts on disk         in place of each, and of each group, the cheaper of its rent and the disk

and the dynamic programme over the devices keeps account of how many bytes the first two surely take, in so many parts
of all there is: together they have no more than that, whatever the rent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from planner.hardware import Device
from planner.placement.problem import Problem
from planner.placement.tables import FAR, INFINITE, Moves, Share, shape_of, units_of, weighted
from planner.placement.waiting import Chosen, shared_out
from planner.placement.ways import Entries, Pick, Way, kinds_of
from planner.units import MIB

# Host memory is kept account of in so many parts, rounded down for every device.
PARTS = 64
# So many rents are tried at most.
MOST_RENTS = 4


def with_rent(problem: Problem) -> tuple[int, list[Share]]:
    """Return a lower bound on the cost, in ns, and shares to choose from with all that waits somewhere; 0 and none
    where tables that pay rent are not for this problem.
    """
    rents = _break_even(problem)[:MOST_RENTS]
    if not rents:
        return 0, []
    tables = _Tables(problem, rents)
    known: dict[int, tuple[int, list[Chosen]] | None] = {}

    def bound_ns(at: int) -> int:
        if at not in known:
            known[at] = tables.share_out(at)
        found = known[at]
        return 0 if found is None else found[0]

    low, high = 0, len(rents) - 1
    while low < high and bound_ns(low) <= bound_ns(low + 1):
        low += 1
    best = max(known, key=bound_ns, default=low)
    bound = bound_ns(best)
    proposals = [known[best], *(tables.share_out(best, rounded=rounded) for rounded in ("down", "up"))]
    found = [shared_out(problem, proposal[1], rents[best]) for proposal in proposals if proposal is not None]
    return max(0, bound), [share for share in found if share is not None]


def _break_even(problem: Problem) -> list[int]:
    """Return the rents, in ns for each MiB, at which experts cost as much in host memory as on disk."""
    found = set()
    for unit in problem.units:
        for name, costs in unit.on.items():
            for option in (options[0] for options in costs.options.values() if options[0].group.slices > 1):
                for kind in kinds_of(problem, problem.hardware.device(name), option):
                    if kind.far is not None:
                        saved = weighted(problem, kind.far) - weighted(problem, kind.near)
                        found.add(saved * MIB // kind.nbytes)
    return sorted(rent for rent in found if rent > 0)


class _Tables:
    """The ways of every kind of device, for every count of layers, at some rents (ns per MiB)."""

    def __init__(self, problem: Problem, rents: Sequence[int]):
        self.problem, self.rents = problem, rents
        self.units, self.shape, self.moves = units_of(problem), shape_of(problem), Moves(problem)
        hardware = problem.hardware
        hosts = {hardware.host(name) for unit in problem.units for name in unit.on}
        # Each host's memory is its own: all of it together is no less than what there is for anyone.
        self.there = sum(max(0, hardware.pool(hardware.device(name).pool).usable_bytes) for name in hosts)
        # What is tied is paid for once, and is said to be more.
        self.there += sum(tie.nbytes * (len(tie.members) - 1) for tie in problem.ties)
        known: dict[object, dict[tuple[int, ...], list[Way]]] = {}
        self.by_device = []
        for device in hardware.devices:
            key = (problem.alike[device.name], *(device.name in unit.on for unit in self.units))
            if key not in known:
                known[key] = self._ways(device)
            self.by_device.append(known[key])

    def _ways(self, device: Device) -> dict[tuple[int, ...], list[Way]]:
        found = {}
        entries = Entries(self.problem, device, self.units, self.rents)
        for here in np.ndindex(*self.shape):
            if not any(here):
                found[here] = [Way(np.zeros(len(self.rents), np.int64), 0, (Pick(),) * len(self.rents))]
            elif all(not count or device.name in unit.on for unit, count in zip(self.units, here, strict=True)):
                moved = self.moves.entry_ns(device, self.units, here)
                ways = entries.ways(dict(zip((unit.name for unit in self.units), here, strict=True)))
                found[here] = [
                    Way(way.costs + moved, way.nbytes, way.picks) for way in ways if way.nbytes <= self.there
                ]
        return found

    def share_out(self, at: int, *, rounded: Literal["down", "up"] | None = None) -> tuple[int, list[Chosen]] | None:
        """Return (bound, in ns, and what every device has) of the best way to share layers out at one of the rents;
        None where nothing fits.

        rounded: it takes the host memory that its picks do, in parts rounded down, or up so that it is there, and not
        what they take at least; then it is no bound.
        """
        side = self.there // _part(self.there) + 1
        best = np.full((*self.shape, side), INFINITE)
        best.reshape(-1, side)[0] = 0
        stages, entries = [best], []
        for ways in self.by_device:
            following = np.full(best.shape, INFINITE)
            entries.append(_undominated(ways, at, self.there, rounded))
            for here, parts, ns, _ in entries[-1]:
                low = (*(slice(n, None) for n in here), slice(parts, None))
                rest = tuple(slice(0, n - m) for n, m in zip(best.shape, (*here, parts), strict=True))
                np.minimum(following[low], best[rest] + ns, out=following[low])
            # What an entry takes off must not make the unreachable look reached.
            best = np.where(following >= FAR, INFINITE, following)
            stages.append(best)
        state = (*(n - 1 for n in self.shape), side - 1)
        if best[state] >= FAR:
            return None
        bound = int(best[state]) - self.moves.begin_ns() - -(-self.rents[at] * self.there // MIB)
        chosen = []
        for number in range(len(entries) - 1, -1, -1):
            here, state, pick = _taken(entries[number], stages[number], state, int(stages[number + 1][state]))
            counts = {unit.name: n for unit, n in zip(self.units, here, strict=True)}
            chosen.append(Chosen(self.problem.hardware.devices[number], counts, pick))
        return bound, [entry for entry in chosen if any(entry.counts.values())]


# Layers, parts of host memory, cost, and what attains it.
_Entry = tuple[tuple[int, ...], int, int, Pick]


def _undominated(
    ways: Mapping[tuple[int, ...], Sequence[Way]], at: int, there: int, rounded: Literal["down", "up"] | None
) -> list[_Entry]:
    """Return the ways that are cheaper than all that take no more of the host memory there is."""
    found = []
    part = _part(there)
    for here, those in ways.items():
        taken = [(way.nbytes if rounded is None else way.picks[at].nbytes, way) for way in those]
        entries = [
            (-(-nbytes // part) if rounded == "up" else nbytes // part, int(way.costs[at]), way.picks[at])
            for nbytes, way in taken
            if nbytes <= there
        ]
        least = int(INFINITE)
        for parts, ns, pick in sorted(entries, key=lambda entry: entry[:2]):
            if ns < least and parts <= there // part:
                least = ns
                found.append((here, parts, ns, pick))
    return found


def _part(there: int) -> int:
    return max(1, -(-there // PARTS))


def _taken(
    entries: Sequence[_Entry], before: Any, state: tuple[int, ...], ns: int
) -> tuple[tuple[int, ...], tuple[int, ...], Pick]:
    """Return the layers and the pick that led to a state, and the state before."""
    for here, parts, taken, pick in entries:
        earlier = tuple(n - m for n, m in zip(state, (*here, parts), strict=True))
        if min(earlier) >= 0 and before[earlier] < FAR and before[earlier] + taken == ns:
            return here, earlier, pick
    raise AssertionError("no way leads to the best cost")

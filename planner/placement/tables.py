"""Tables of what each device costs with so many layers of each class, and the best way to share layers out by them.

Devices only meet in the layers they share out, in host memory and disk, and in what moves between them. With each
device's least cost in a table, over how many layers of each class it runs, layers are shared out by dynamic programming
over the devices, in whole numbers. Memory that is shared is taken to be there for everyone, which no placement can
better: the result is a lower bound on the cost, and a proposal of layer counts for the counting model to fill in.

A table's entry is the least over how many whole groups of each size are streamed, all counts of them, with experts
taking what memory is then still missing. Where the counts are too many, what the rarest groups could free is taken to
be free, which stays a lower bound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from planner import memory
from planner.cost import Step
from planner.hardware import Device
from planner.placement.problem import Problem, Unit
from planner.steps import link_ns

# States of the dynamic programme, and counts of streamed groups for one entry, beyond which there are no tables.
MOST_STATES = 6_000
MOST_COMBINATIONS = 20_000
INFINITE = np.int64(2**61)
FAR = np.int64(2**60)


@dataclass(slots=True)
class _Kind:
    """Slices of one size and price that a device may stream: (unit, group) → how many of each layer.

    beside: see `Price`. memory: of the home that costs least; is_exact: it does so in every step.
    """

    freed: int
    slot: int
    lane: int
    serial: dict[str, int]
    beside: dict[str, int]
    copied: dict[str, bool]
    units: dict[tuple[str, str], int]
    is_whole: bool
    memory: str
    is_exact: bool

    def most(self, counts: dict[str, int]) -> int:
        return sum(counts[name] * slices for (name, _), slices in self.units.items())


@dataclass(frozen=True, slots=True)
class Share:
    """A lower bound on the cost, in ns, and the layers of each (unit, device) that attain it.

    away, at, single: what waits elsewhere, and which devices have one slot, as `Counts` has them; None where entries
    are bounds and no choices.
    """

    bound_ns: int
    layers: dict[tuple[str, str], int]
    away: dict[tuple[tuple[str, str, str, str | None], str], int] | None
    single: frozenset[str]
    at: dict[tuple[tuple[str, str, str, str | None], str], int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Choice:
    """The least cost of an entry, and what attains it: slots, and how many slices of each kind are streamed."""

    ns: int
    slots: int
    streamed: tuple[tuple[_Kind, int], ...]
    is_exact: bool


def applies(problem: Problem) -> bool:
    """Tell whether a problem is one that tables are for, and small enough for them."""
    rules = problem.rules
    is_timed = problem.workload.objective != "fit"
    return not problem.named and not rules.dtypes and is_timed and math.prod(shape_of(problem)) <= MOST_STATES


def shape_of(problem: Problem) -> tuple[int, ...]:
    """Return the sides of a table: one for each end, and one for each class of blocks."""
    ends = sum(unit is not None for unit in (problem.front, problem.tail))
    return (*([2] * ends), *(unit.count + 1 for unit in problem.blocks))


def units_of(problem: Problem) -> list[Unit]:
    """Return the units in the order of a table's sides."""
    return [*(unit for unit in (problem.front, problem.tail) if unit is not None), *problem.blocks]


def share_out(problem: Problem) -> Share | None:
    """Return the best way to share layers out; None where nothing fits, however much host memory there is."""
    shape = shape_of(problem)
    units = units_of(problem)
    moves = Moves(problem)
    tables: dict[object, Any] = {}
    order = []
    for device in problem.hardware.devices:
        key = (problem.alike[device.name], *(device.name in unit.on for unit in units))
        if key not in tables:
            tables[key] = _table(problem, device, units, shape, moves)
        order.append(tables[key])
    return _share(problem, units, shape, order, moves.begin_ns())


def _share(
    problem: Problem, units: list[Unit], shape: tuple[int, ...], tables: list[Any], begin_ns: int
) -> Share | None:
    """Share layers out over the devices, one after another."""
    best = np.full(shape, INFINITE)
    best[(0,) * len(shape)] = 0
    stages = [best]
    for table in tables:
        following = np.full(shape, INFINITE)
        for counts in np.argwhere(table < INFINITE).tolist():
            low = tuple(slice(n, None) for n in counts)
            rest = tuple(slice(0, side - n) for n, side in zip(counts, shape, strict=True))
            np.minimum(following[low], best[rest] + table[tuple(counts)], out=following[low])
        # What an entry takes off must not make the unreachable look reached.
        best = np.where(following >= FAR, INFINITE, following)
        stages.append(best)
    goal: tuple[int, ...] = tuple(side - 1 for side in shape)
    if best[goal] >= FAR:
        return None
    layers: dict[tuple[str, str], int] = {}
    at = goal
    for number in range(len(tables) - 1, -1, -1):
        table, before = tables[number], stages[number]
        # Of equal costs, the fewest layers on the CPU.
        is_host = problem.hardware.devices[number].kind == "cpu"
        ranges = [range(n + 1) if is_host else range(n, -1, -1) for n in at]
        here: tuple[int, ...] = next(
            chosen
            for chosen in itertools.product(*ranges)
            if table[chosen] < FAR
            and before[tuple(n - m for n, m in zip(at, chosen, strict=True))] + table[chosen] == stages[number + 1][at]
        )
        for unit, count in zip(units, here, strict=True):
            if count:
                layers[unit.name, problem.hardware.devices[number].name] = count
        at = tuple(int(n) - int(m) for n, m in zip(at, here, strict=True))
    away, single = _filled_in(problem, units, layers)
    return Share(bound_ns=max(0, int(best[goal]) - begin_ns), layers=layers, away=away, single=single)


def _filled_in(
    problem: Problem, units: list[Unit], layers: dict[tuple[str, str], int]
) -> tuple[dict[tuple[tuple[str, str, str, str | None], str], int] | None, frozenset[str]]:
    """Return what waits where on every device, given the layers it runs."""
    away: dict[tuple[tuple[str, str, str, str | None], str], int] = {}
    single = set()
    for name in dict.fromkeys(name for _, name in layers):
        device = problem.hardware.device(name)
        counts = {unit.name: layers.get((unit.name, name), 0) for unit in units}
        choice = _least(problem, device, units, counts, _kinds(problem, device, units))
        if choice is None or not choice.is_exact:
            return None, frozenset()
        if choice.slots == 1:
            single.add(name)
        for kind, amount in choice.streamed:
            for (unit, key), slices in kind.units.items():
                taken = min(amount, counts[unit] * slices)
                if taken:
                    at = (unit, name, key, None), kind.memory
                    away[at] = away.get(at, 0) + taken
                    amount -= taken
    return away, frozenset(single)


class Moves:
    """Lower bounds, in ns over the weighted steps, on what moves to one device because of what it runs.

    Between GPUs, unless the CPU hands it on: that can happen only as often as the walk visits the CPU, whose own entry
    takes the difference off.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        names = {device.name: device.kind for device in problem.hardware.devices}
        self.arrival: dict[str, int] = {}
        self.broadcast: dict[str, int] = {}
        self.last: dict[str, int] = {}
        sooner: dict[str, tuple[int, int, int]] = {}
        for name in names:
            gpus = [other for other, kind in names.items() if kind != "cpu" and other != name]
            hosts = [other for other, kind in names.items() if kind == "cpu" and other != name]
            hop = [self._least(group, name, self._hop) for group in (gpus, hosts)]
            cast = [self._least(group, name, self._cast) for group in (gpus, hosts)]
            last = [self._least(group, name, self._last) for group in (gpus, hosts)]
            self.arrival[name] = hop[0] if hop[0] is not None else hop[1] or 0
            self.broadcast[name] = cast[0] if cast[0] is not None else cast[1] or 0
            self.last[name] = last[0] if last[0] is not None else last[1] or 0
            sooner[name] = (
                max(0, self.arrival[name] - (hop[1] if hop[1] is not None else self.arrival[name])),
                max(0, self.broadcast[name] - (cast[1] if cast[1] is not None else self.broadcast[name])),
                max(0, self.last[name] - (last[1] if last[1] is not None else self.last[name])),
            )
        self.sooner_hop = max((entry[0] for entry in sooner.values()), default=0)
        self.sooner_cast = sum(entry[1] for entry in sooner.values())
        self.sooner_last = max((entry[2] for entry in sooner.values()), default=0)

    def entry_ns(self, device: Device, units: list[Unit], here: tuple[int, ...]) -> int:
        """Return what a device pays for what it takes from others, given how many layers of each unit it runs."""
        counts = {unit.name: count for unit, count in zip(units, here, strict=True)}
        front, tail = self.problem.front is not None and counts["front"], counts.get("tail", 0)
        is_all = all(count == unit.count for unit, count in zip(units, here, strict=True))
        # The walk begins where the front is, and comes back where the tail is there too.
        arrivals = int(not front) + int(bool(front and tail and not is_all))
        total = arrivals * self.arrival[device.name]
        if not front and any(counts[unit.name] for unit in self.problem.blocks):
            total += self.broadcast[device.name]
        if tail and not front:
            total += self.last[device.name]
        if device.kind == "cpu" and not is_all:
            # It leaves the CPU after every visit but one that it ends with.
            total -= (1 + int(bool(front and tail)) - int(bool(tail))) * self.sooner_hop
            total -= self.sooner_cast + self.sooner_last if front else 0
        return total

    def begin_ns(self) -> int:
        """Return what is to be taken off the sum of all devices: where there is no front, nothing arrives first."""
        return 0 if self.problem.front is not None else max(self.arrival.values())

    def _least(self, origins: list[str], name: str, price: Any) -> int | None:
        return min((price(origin, name) for origin in origins), default=None)

    def _hop(self, origin: str, name: str) -> int:
        link, total = self.problem.hardware.link(origin, name), 0
        for step in self.problem.steps:
            nbytes = self.problem.hop_bytes(prefill=step.is_prefill)
            if nbytes is not None:
                total += step.weight * (link.latency_ns + link_ns(link, nbytes))
        return total

    def _cast(self, origin: str, name: str) -> int:
        return self._handed(origin, name, self.problem.broadcasts)

    def _last(self, origin: str, name: str) -> int:
        return self._handed(origin, name, self.problem.front_to_tail)

    def _handed(self, origin: str, name: str, tensors: dict[tuple[int, str], tuple[int, int]]) -> int:
        link = self.problem.hardware.link(origin, name)
        return sum(
            step.weight * link_ns(link, nbytes[0 if step.is_prefill else 1])
            for step in self.problem.steps
            for nbytes in tensors.values()
        )


def _table(problem: Problem, device: Device, units: list[Unit], shape: tuple[int, ...], moves: Moves) -> Any:
    """Return the least cost of a device for each count of each unit; infinite where that does not fit."""
    table = np.full(shape, INFINITE)
    ends = sum(unit.is_whole for unit in units)
    kinds = _kinds(problem, device, units)
    blocks = itertools.product(*(range(side) for side in shape[ends:]))
    for counts in blocks:
        for chosen in itertools.product((0, 1), repeat=ends):
            here = (*chosen, *counts)
            named = {unit.name: count for unit, count in zip(units, here, strict=True)}
            if not any(here):
                table[here] = 0
            elif all(not count or device.name in unit.on for unit, count in zip(units, here, strict=True)):
                found = _least(problem, device, units, named, kinds)
                if found is not None:
                    table[here] = found.ns + moves.entry_ns(device, units, here)
    return table


def _kinds(problem: Problem, device: Device, units: list[Unit]) -> list[_Kind]:
    """Return what a device may stream, alike groups of different units together, from where that costs least."""
    found: dict[object, _Kind] = {}
    for unit in units:
        for options in unit.on[device.name].options.values() if device.name in unit.on else ():
            option = options[0]
            if not option.homes:
                continue
            names = [step.name for step in problem.steps]
            needs_slot = all(home.needs_slot for home in option.homes)
            size = memory.allocation_bytes(option.group.slice_slab_bytes, device) if needs_slot else 0
            for prices in zip(*(home.prices for home in option.homes), strict=True):
                serial = {name: min(price.serial_ns[name] for price in prices) for name in names}
                lane = {name: min(price.lane_ns[name] for price in prices) for name in names}
                beside = {
                    name: min(price.serial_ns[name] + price.beside_ns[name] for price in prices) - serial[name]
                    for name in names
                }
                # A home that computes where it waits copies nothing, so no copy holds others up.
                copied = {name: lane[name] > 0 for name in names}
                kind = _Kind(
                    freed=option.freed_bytes,
                    slot=size,
                    lane=min(lane.values()) if option.prefetched else 0,
                    serial=serial,
                    beside=beside,
                    copied=copied,
                    units={},
                    is_whole=option.prefetched,
                    memory=option.homes[0].memory,
                    is_exact=prices[0].times == (serial, lane, beside) and option.homes[0].needs_slot == needs_slot,
                )
                key = (
                    kind.freed, kind.slot, kind.lane, tuple(serial.values()), tuple(beside.values()),
                    tuple(copied.values()), kind.is_whole, kind.memory, kind.is_exact,
                )  # fmt: skip
                kind = found.setdefault(key, kind)
                here = (unit.name, option.key)
                kind.units[here] = kind.units.get(here, 0) + prices[0].slices
    return list(found.values())


def _least(
    problem: Problem, device: Device, units: list[Unit], counts: dict[str, int], kinds: list[_Kind]
) -> _Choice | None:
    """Return the least weighted time of a device that runs so many layers, or None where they cannot fit."""
    computing, missing = needs(problem, device, units, counts)
    if missing <= 0:
        return _Choice(weighted(problem, computing), memory.SLOT_COUNT, (), is_exact=True)
    there = [(kind, kind.most(counts)) for kind in kinds]
    whole = [(kind, most) for kind, most in there if kind.is_whole and most]
    sliced = [(kind, most) for kind, most in there if not kind.is_whole and most]
    if sum(kind.freed * most for kind, most in (*whole, *sliced)) < missing:
        return None
    return _stream(problem, computing, missing, whole, sliced, Beside.of(problem, device, counts))


def needs(problem: Problem, device: Device, units: list[Unit], counts: dict[str, int]) -> tuple[dict[str, int], int]:
    """Return what so many layers compute in each step, in ns, and how many bytes the device lacks for all of them."""
    computing = {step.name: 0 for step in problem.steps}
    held = sum(memory.fixed_bytes(problem.graph, device))
    activations = 0
    for unit in units:
        count = counts[unit.name]
        if not count:
            continue
        costs = unit.on[device.name]
        for name, ns in costs.compute_ns.items():
            computing[name] += ns * count
        kept = sum(options[0].freed_bytes * options[0].group.slices for options in costs.options.values())
        held += count * (costs.resident_bytes + costs.kv_bytes + kept)
        activations = max(activations, costs.activation_bytes)
        if unit.is_whole and 0 in unit.layers:
            held += problem.loose_bytes
    for tie in problem.ties:
        held -= tie.nbytes * max(0, sum(counts.get(name, 0) for name, _ in tie.members) - 1)
    return computing, held + activations - problem.hardware.pool(device.pool).usable_bytes


@dataclass(frozen=True, slots=True)
class Beside:
    """What goes on beside a device's copies of whole groups, by step, in ns: see `planner.cost`.

    reads_ahead: it is a CPU, whose copies begin anew with each pass.
    """

    blocks: int
    apart: dict[str, int]
    cached: dict[str, int]
    reads_ahead: bool

    @staticmethod
    def of(problem: Problem, device: Device, counts: dict[str, int]) -> Beside:
        shared = {(name, device.name): count for name, count in counts.items()}
        return Beside(
            max(problem.blocks_on(device.name, shared), 1),
            {step.name: problem.apart_ns(device.name, step.name, shared) for step in problem.steps},
            {step.name: problem.cache_ns(device.name, step.name, shared) for step in problem.steps},
            device.kind == "cpu",
        )

    def outside_ns(self, step: str, serial: Any) -> Any:
        """Return what runs before the first copy or after the last."""
        return self.apart[step] - (-(serial - self.apart[step]) // self.blocks)

    def busy_ns(self, step: Step, serial: Any, exposed: Any, slots: int, queued: Any, begins: Any = 0) -> Any:
        """Return how long a step stands at the device. queued: copies on demand keep whole groups from overlapping.

        begins: what is waited for before there is anything to compute with, where anything is exposed.
        """
        if slots == 1:
            return serial + exposed
        longest = np.maximum(serial + begins, exposed + self.cached[step.name] + self.outside_ns(step.name, serial))
        return np.where(queued, serial + exposed, np.where(exposed > 0, longest, serial))


def hidden_ns(step: Step, slots: int, lane: Any, smallest: Any) -> Any:
    """Return what copies of whole groups are done while other devices compute."""
    return np.where(lane > 0, slots * np.where(lane > 0, smallest, 0), 0) if not step.is_first else np.zeros_like(lane)


def weighted(problem: Problem, taken: Mapping[str, int]) -> int:
    """Return what the objective makes of times by step, in ns."""
    return sum(step.weight * taken[step.name] for step in problem.steps)


def _stream(
    problem: Problem,
    computing: dict[str, int],
    missing: int,
    whole: list[tuple[_Kind, int]],
    sliced: list[tuple[_Kind, int]],
    beside: Beside,
) -> _Choice | None:
    """Return the least weighted time with enough streamed to free what is missing."""
    sliced.sort(key=lambda entry: tuple(entry[0].serial.values()))
    is_exact = _is_ladder(sliced) and all(kind.is_exact for kind, _ in (*whole, *sliced))
    whole.sort(key=lambda entry: -entry[0].freed * entry[1])
    least_lane = INFINITE
    while math.prod(most + 1 for _, most in whole) > MOST_COMBINATIONS * (1 if sliced else whole[0][1] + 1):
        kind, most = whole.pop()
        missing -= kind.freed * most
        is_exact = False
        if beside.reads_ahead:
            # It may be what is read first.
            least_lane = np.minimum(least_lane, kind.lane)
    if missing <= 0:
        return _Choice(weighted(problem, computing), memory.SLOT_COUNT, (), is_exact=is_exact)
    # Without experts, the largest kind of group takes what the others leave, at least one of it.
    residual = None if sliced or not whole else whole[0]
    enumerated = whole if residual is None else whole[1:]
    grid = np.meshgrid(*(np.arange(most + 1) for _, most in enumerated), indexing="ij") if enumerated else []
    taken = [axis.ravel() for axis in grid]
    size = taken[0].size if taken else 1
    freed, lane = np.zeros(size, np.int64), np.zeros(size, np.int64)
    largest, smallest = np.zeros(size, np.int64), np.full(size, least_lane)
    # A copy takes as much from a CPU in every step.
    slows = np.zeros(size, np.int64)
    for (kind, _), amount in zip(enumerated, taken, strict=True):
        freed += kind.freed * amount
        lane += kind.lane * amount
        slows += min(kind.beside.values()) * amount
        largest = np.where(amount > 0, np.maximum(largest, kind.slot), largest)
        smallest = np.where(amount > 0, np.minimum(smallest, kind.lane), smallest)
    best: _Choice | None = None
    more_slots = (count for count in memory.SLOT_COUNTS if count != memory.SLOT_COUNT)
    for slots in (0,) if beside.reads_ahead else (memory.SLOT_COUNT, *more_slots):
        for more in (None, residual) if residual is not None else (None,):
            rest, copies, least, extra = _filled(missing, slots, freed, lane, largest, smallest, more)
            found = _price(problem, computing, slots, rest, copies, least, slows, sliced, beside)
            if found is not None and (best is None or found[0] < best.ns):
                at, experts = found[1:]
                streamed = [(kind, int(amount[at])) for (kind, _), amount in zip(enumerated, taken, strict=True)]
                streamed += [(more[0], int(extra[at]))] if more is not None else []
                streamed += _taken(experts, sliced)
                best = _Choice(found[0], slots, tuple(entry for entry in streamed if entry[1]), is_exact=is_exact)
    return best


def _filled(
    missing: int,
    slots: int,
    freed: Any,
    lane: Any,
    largest: Any,
    smallest: Any,
    residual: tuple[_Kind, int] | None,
) -> tuple[Any, Any, Any, Any]:
    """Return (bytes still missing, copies, the least copy, how many of it) with a residual kind taking all it can."""
    if residual is None:
        return missing + slots * largest - freed, lane, smallest, None
    kind, most = residual
    rest = missing + slots * np.maximum(largest, kind.slot) - freed
    amount = np.clip(-(-rest // kind.freed), 1, most)
    return rest - amount * kind.freed, lane + amount * kind.lane, np.minimum(smallest, kind.lane), amount


def _is_ladder(sliced: list[tuple[_Kind, int]]) -> bool:
    """Tell whether of two kinds of experts, in order, the first is as large and costs no more in any step: then it is
    never worse to stream all of the first before any of the next.
    """
    return all(
        (one.freed, one.slot) == (other.freed, other.slot)
        and all(one.serial[step] <= ns for step, ns in other.serial.items())
        and all(one.beside[step] <= ns for step, ns in other.beside.items())
        and all(one.copied[step] <= copied for step, copied in other.copied.items())
        for (one, _), (other, _) in itertools.pairwise(sliced)
    )


def _taken(experts: int, sliced: list[tuple[_Kind, int]]) -> list[tuple[_Kind, int]]:
    """Return how many of each kind are streamed where so many experts are, the first kinds first."""
    found = []
    for kind, most in sliced:
        found.append((kind, min(experts, most)))
        experts -= found[-1][1]
    return found


def _price(
    problem: Problem,
    computing: dict[str, int],
    slots: int,
    rest: Any,
    lane: Any,
    smallest: Any,
    slows: Any,
    sliced: list[tuple[_Kind, int]],
    beside: Beside,
) -> tuple[int, int, int] | None:
    """Return (least weighted time, combination, slices of experts), experts freeing the bytes still missing."""
    amount = np.zeros(rest.size, np.int64)
    experts = {step.name: np.zeros(rest.size, np.int64) for step in problem.steps}
    slowed = {step.name: np.zeros(rest.size, np.int64) for step in problem.steps}
    queued = {step.name: np.zeros(rest.size, np.bool_) for step in problem.steps}
    streams = rest > 0
    if sliced:
        # Several kinds of experts: each step at the price of the cheapest, which is no more than any mixture costs.
        slot = min(kind.slot for kind, _ in sliced)
        room = sum(kind.freed * most for kind, most in sliced)
        wanted = np.where(streams, rest + memory.SLOT_COUNT * slot, 0)
        fits = wanted <= room
        if _is_ladder(sliced):
            amount = -(-wanted // sliced[0][0].freed)
            left = amount
            for kind, most in sliced:
                taken = np.minimum(left, most)
                left = left - taken
                for step in problem.steps:
                    experts[step.name] += taken * kind.serial[step.name]
                    slowed[step.name] += taken * kind.beside[step.name]
                    queued[step.name] |= (taken > 0) & kind.copied[step.name]
        else:
            for step in problem.steps:
                each = min(kind.serial[step.name] / kind.freed for kind, _ in sliced)
                experts[step.name] = np.floor(wanted * each).astype(np.int64)
                least = min(kind.beside[step.name] / kind.freed for kind, _ in sliced)
                slowed[step.name] = np.floor(wanted * least).astype(np.int64)
                queued[step.name] = streams & all(kind.copied[step.name] for kind, _ in sliced)
    else:
        fits = ~streams
    if not fits.any():
        return None
    total = np.zeros(rest.size, np.int64)
    for step in problem.steps:
        contention = np.minimum(slows, slowed[step.name])
        serial = computing[step.name] + experts[step.name] + contention
        exposed = np.maximum(lane + contention - hidden_ns(step, slots, lane, smallest), 0)
        held_up = queued[step.name] & (lane > 0)
        begins = np.where(lane > 0, smallest, 0) if beside.reads_ahead else 0
        total += step.weight * beside.busy_ns(step, serial, exposed, slots, held_up, begins)
    at = int(np.where(fits, total, INFINITE).argmin())
    return int(total[at]), at, int(amount[at])

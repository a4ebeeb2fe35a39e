"""A first answer for graphs whose layers are named: which device runs each, by simulated annealing.

Layers that may not be cut apart move together. A state costs what the cost model says of its devices and of what moves
between them, with what does not fit streamed, the smallest groups that free enough; bytes that nothing can free, or
that the host lacks, cost a fine. Ties and experts are not looked at: the counting model fills the answer in exactly.
The same problem gives the same answer (Kirkpatrick, Gelatt and Vecchi, Science 1983, for the method).
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from planner import cost, memory
from planner.placement.counts import Clock
from planner.placement.problem import Problem, Unit
from planner.steps import awaited, link_ns

# Moves tried for each layer and device, at most so many in all.
MOVES_EACH = 800
MOST_MOVES = 1_200_000
# How much the temperature falls in one search.
FALL = 300.0
# Layers that one move takes along at most.
MOST_TOGETHER = 24
# As many times the search begins anew: where it ends varies by several percent.
ROUNDS = 3
# A byte that does not fit costs as much as so many copies of it from the disk.
FINE = 4


@dataclass(frozen=True, slots=True)
class _Thing:
    """What one layer makes: (taker, prefill bytes, decode bytes, whether it waits) for each layer that takes it."""

    source: int
    takers: tuple[tuple[int, int, int, bool], ...]


@dataclass(slots=True)
class _Load:
    """What runs on one device. held: bytes but for activations; items: (bytes freed, copy ns) of what may stream."""

    held: int = 0
    computing: list[int] = field(default_factory=list)
    apart: list[int] = field(default_factory=list)
    blocks: int = 0
    layers: int = 0
    activations: list[int] = field(default_factory=list)
    items: list[tuple[int, int]] = field(default_factory=list)

    def copy(self) -> _Load:
        return _Load(
            self.held, self.computing[:], self.apart[:], self.blocks, self.layers, self.activations[:], self.items[:]
        )


def share_out(problem: Problem, clock: Clock) -> dict[tuple[str, str], int]:
    """Return a good share of the layers as the counting model takes it: (unit, device) → 1."""
    search = _Search(problem)
    search.start()
    try:
        search.anneal(clock)
    except KeyboardInterrupt:
        clock.interrupted = True
    names = dict(enumerate(search.names))
    for alike in problem.interchangeable():
        # As the counting model orders them: the first has most layers.
        numbers = [search.names.index(name) for name in alike]
        numbers.sort(key=lambda d: -search.best.count(d))
        names.update(zip(numbers, alike, strict=True))
    return {(unit.name, names[d]): 1 for unit, d in zip(search.units, search.best, strict=True)}


class _Search:
    def __init__(self, problem: Problem):
        self.problem, self.hardware = problem, problem.hardware
        self.names = [device.name for device in self.hardware.devices]
        self.rng = random.Random(0)
        self.weights = [step.weight for step in problem.steps]
        self.units: list[Unit] = sorted(problem.units, key=lambda unit: unit.layers[0])
        assert all(len(unit.layers) == 1 for unit in self.units)
        self.is_block = [cost.is_block(problem.graph, index) for index in range(len(self.units))]
        self.things = _things(problem)
        self.touching: list[list[int]] = [[] for _ in self.units]
        self.neighbours: list[list[int]] = [[] for _ in self.units]
        for number, thing in enumerate(self.things):
            for index in {thing.source, *(taker[0] for taker in thing.takers)}:
                self.touching[index].append(number)
            for taker, *_ in thing.takers:
                self.neighbours[taker].append(thing.source)
                self.neighbours[thing.source].append(taker)
        self.clusters = _clusters(problem)
        self.cluster_of = {index: number for number, members in enumerate(self.clusters) for index in members}
        self.allowed = [
            [d for d, name in enumerate(self.names) if all(name in self.units[i].on for i in members)]
            for members in self.clusters
        ]
        self.capacity = [self.hardware.pool(device.pool).usable_bytes for device in self.hardware.devices]
        self.fixed = [sum(memory.fixed_bytes(problem.graph, device)) for device in self.hardware.devices]
        self.is_cpu = [device.kind == "cpu" for device in self.hardware.devices]
        self.hosts = [self.names.index(self.hardware.host(name)) for name in self.names]
        self.guests: dict[int, list[int]] = {}
        for d, host in enumerate(self.hosts):
            self.guests.setdefault(host, []).append(d)
        self.nodes = [self.hardware.node(name) for name in self.names]
        self.numbers = [self._numbers(d) for d in range(len(self.names))]
        rates = [self.hardware.link(self.hardware.disk(name), self.hardware.host(name)) for name in self.names]
        self.fine = FINE * sum(self.weights) * max(10**9 / link.bytes_per_s for link in rates)
        self.prices: dict[tuple[int, int, int, int, bool], int] = {}
        # [device][layer] → weighted ns of computing alone; where one layer takes a thing: [from][to] → what that costs
        self.computing = [
            [0 if entry is None else sum(w * ns for w, ns in zip(self.weights, entry[1], strict=True)) for entry in on]
            for on in self.numbers
        ]
        self.tables = [self._table(thing) for thing in self.things]
        self.at: list[int] = []
        self.best: list[int] = []

    def _numbers(self, d: int) -> list[tuple[int, list[int], int, list[tuple[int, int]]] | None]:
        """Return of every layer there: bytes held, ns by step, activations, and what may stream."""
        found: list[tuple[int, list[int], int, list[tuple[int, int]]] | None] = []
        for unit in self.units:
            costs = unit.on.get(self.names[d])
            if costs is None:
                found.append(None)
                continue
            items, held = [], costs.resident_bytes + costs.kv_bytes
            held += self.problem.loose_bytes if 0 in unit.layers else 0
            for options in costs.options.values():
                option = options[0]
                held += option.freed_bytes * option.group.slices
                if option.prefetched and option.homes:
                    items.append((option.freed_bytes, min(max(home.lane_ns.values()) for home in option.homes)))
            computing = [costs.compute_ns[step.name] for step in self.problem.steps]
            found.append((held, computing, costs.activation_bytes, items))
        return found

    def _table(self, thing: _Thing) -> list[list[int]] | None:
        if len(thing.takers) > 1:
            return None
        ((_, prefill, decode, waits),) = thing.takers
        every = range(len(self.names))
        return [[0 if one == d else self._price(one, d, prefill, decode, waits) for d in every] for one in every]

    def start(self) -> None:
        """Fill devices in their order with layers in theirs, each up to its share of what there is to hold."""
        steps = len(self.weights)
        self.loads = [_Load(computing=[0] * steps, apart=[0] * steps) for _ in self.names]
        self.at = [-1] * len(self.units)
        order = [d for d in range(len(self.names)) if not self.is_cpu[d]]
        order += [d for d in range(len(self.names)) if self.is_cpu[d]]
        position = 0
        for number, members in enumerate(self.clusters):
            if self.at[members[0]] >= 0:
                continue
            choices = self.allowed[number]
            while position < len(order) - 1:
                d = order[position]
                size = sum(entry[0] for i in members if (entry := self.numbers[d][i]) is not None)
                room = self.capacity[d] - self.fixed[d] - self.loads[d].held
                worst = max((entry[2] for entry in self.numbers[d] if entry is not None), default=0)
                if d in choices and size + worst <= room:
                    break
                if d not in choices:
                    break
                position += 1
            d = order[position] if order[position] in choices else choices[0]
            for index in members:
                self._add(index, d)
        self.costs = [self._device_ns(d) for d in range(len(self.names))]
        self.paid = [self._thing_ns(number) for number in range(len(self.things))]
        self.least_ns = [self._computing_ns(d) for d in range(len(self.names))]
        self.over = self._over_ns()
        self.total = sum(entry[0] for entry in self.costs) + sum(self.paid) + self.over
        self.best, self.least = self.at[:], self.total

    def _over_ns(self) -> int:
        """Return the fine for what the hosts lack, and for more nodes than one where that is forbidden."""
        over = 0
        for host, members in self.guests.items():
            over += max(0, sum(self.costs[d][1] for d in members) - self.capacity[host])
        fine = int(self.fine * over)
        if self.problem.rules.never_across_nodes:
            used = {self.nodes[d] for d, load in enumerate(self.loads) if load.layers}
            fine += (len(used) - 1) * 10**15
        return fine

    def _add(self, index: int, d: int) -> None:
        entry, load = self.numbers[d][index], self.loads[d]
        assert entry is not None
        held, computing, activations, items = entry
        load.held += held
        load.layers += 1
        for step, ns in enumerate(computing):
            load.computing[step] += ns
            if not self.is_block[index]:
                load.apart[step] += ns
        load.blocks += self.is_block[index]
        bisect.insort(load.activations, activations)
        for item in items:
            bisect.insort(load.items, item)
        self.at[index] = d

    def _remove(self, index: int, d: int) -> None:
        entry, load = self.numbers[d][index], self.loads[d]
        assert entry is not None
        held, computing, activations, items = entry
        load.held -= held
        load.layers -= 1
        for step, ns in enumerate(computing):
            load.computing[step] -= ns
            if not self.is_block[index]:
                load.apart[step] -= ns
        load.blocks -= self.is_block[index]
        del load.activations[bisect.bisect_left(load.activations, activations)]
        for item in items:
            del load.items[bisect.bisect_left(load.items, item)]

    def _computing_ns(self, d: int) -> int:
        return sum(w * ns for w, ns in zip(self.weights, self.loads[d].computing, strict=True))

    def _device_ns(self, d: int) -> tuple[int, int]:
        """Return (weighted time and fine, bytes of host memory) of what runs on a device."""
        load = self.loads[d]
        if not load.layers:
            return 0, 0
        held = load.held + self.fixed[d] + load.activations[-1]
        computing = self._computing_ns(d)
        if self.is_cpu[d]:
            return computing, held
        missing = held - self.capacity[d]
        if missing <= 0:
            return computing, 0
        freed, copies, count = 0, 0, 0
        for size, ns in load.items:
            freed += size
            copies += ns
            count += 1
            if freed >= missing + memory.SLOT_COUNT * size:
                break
        over = 0
        if count and freed < missing + memory.SLOT_COUNT * load.items[count - 1][0]:
            over = missing + memory.SLOT_COUNT * load.items[count - 1][0] - freed
        elif not count:
            over = missing
        else:
            spare = freed - missing - memory.SLOT_COUNT * load.items[count - 1][0]
            # Of the small ones before, what turned out not to be needed.
            for size, ns in reversed(load.items[: count - 1]):
                if size <= spare:
                    spare -= size
                    freed -= size
                    copies -= ns
        total = int(self.fine * over)
        for number, step in enumerate(self.problem.steps):
            hidden = 0 if step.is_first or not count else memory.SLOT_COUNT * load.items[0][1]
            exposed = max(0, copies - hidden)
            serial, apart = load.computing[number], load.apart[number]
            beside = apart - (-(serial - apart) // max(load.blocks, 1))
            total += step.weight * (max(serial, exposed + beside) if exposed else serial)
        return total, freed

    def _thing_ns(self, number: int) -> int:
        thing, table = self.things[number], self.tables[number]
        origin = self.at[thing.source]
        if table is not None:
            return table[origin][self.at[thing.takers[0][0]]]
        found: dict[int, tuple[int, int, bool]] = {}
        for taker, prefill, decode, waits in thing.takers:
            d = self.at[taker]
            if d != origin:
                known = found.get(d)
                if known is not None:
                    prefill, decode, waits = max(prefill, known[0]), max(decode, known[1]), waits or known[2]
                found[d] = prefill, decode, waits
        return sum(self._price(origin, d, *sizes) for d, sizes in found.items())

    def _price(self, origin: int, d: int, prefill: int, decode: int, waits: bool) -> int:
        key = origin, d, prefill, decode, waits
        price = self.prices.get(key)
        if price is None:
            link = self.hardware.link(self.names[origin], self.names[d])
            price = sum(
                step.weight
                * ((link.latency_ns if waits else 0) + link_ns(link, prefill if step.is_prefill else decode))
                for step in self.problem.steps
            )
            self.prices[key] = price
        return price

    def anneal(self, clock: Clock) -> None:
        """Try moves at falling temperatures, several times from the start, and keep the best state that was met."""
        if len(self.names) == 1:
            return
        moves = min(MOST_MOVES, MOVES_EACH * len(self.clusters) * len(self.names)) // ROUNDS
        found: list[tuple[int, list[int]]] = []
        try:
            for _ in range(ROUNDS):
                self.start()
                self._cool(moves, clock)
                found.append((self.least, self.best))
        finally:
            self.least, self.best = min([*found, (self.least, self.best)])

    def _cool(self, moves: int, clock: Clock) -> None:
        hottest = self.least / len(self.clusters) / 4
        for done in range(moves):
            if done % 256 == 0 and clock.is_half_over():
                break
            wanted = self._proposal()
            if wanted:
                self._try(wanted, hottest * FALL ** (-done / moves))

    def _proposal(self) -> list[tuple[int, int]]:
        """Return layers and the devices that they should go to."""
        at, draw = self.at, self.rng.random
        first = int(draw() * len(at))
        here = at[first]
        near = [at[other] for other in self.neighbours[first] if at[other] != here]
        target = near[int(draw() * len(near))] if near and draw() < 0.6 else int(draw() * len(self.names))
        if target == here:
            return []
        chosen = [self.cluster_of[first]]
        if draw() < 0.3:
            chosen = self._together(first, 2 + int(draw() * (MOST_TOGETHER - 1)))
        wanted = [(cluster, target) for cluster in chosen]
        if draw() < 0.4:
            # In exchange, something goes the other way.
            other = int(draw() * len(at))
            if self.at[other] == target:
                back = [self.cluster_of[other]]
                if len(chosen) > 1:
                    back = self._together(other, len(chosen))
                wanted += [(cluster, here) for cluster in back]
        if any(target not in self.allowed[cluster] for cluster, target in wanted):
            return []
        return [(index, target) for cluster, target in wanted for index in self.clusters[cluster]]

    def _together(self, first: int, most: int) -> list[int]:
        """Return clusters on one device that hang together, from the one of a layer."""
        here = self.at[first]
        found = [self.cluster_of[first]]
        seen = set(found)
        for cluster in found:
            for index in self.clusters[cluster]:
                for other in self.neighbours[index]:
                    near = self.cluster_of[other]
                    if self.at[other] == here and near not in seen and len(found) < most:
                        seen.add(near)
                        found.append(near)
        return found

    def _try(self, wanted: Sequence[tuple[int, int]], temperature: float) -> None:
        allowed = -temperature * math.log(1.0 - self.rng.random())
        at, computing, paid = self.at, self.computing, self.paid
        before = [(index, at[index]) for index, _ in wanted]
        devices = {d for _, d in wanted}.union(d for _, d in before)
        # A device takes at least what it computes: most moves need no closer look.
        least = -self.over
        for index, d in wanted:
            least += computing[d][index] - computing[at[index]][index]
            at[index] = d
        for d in devices:
            least += self.least_ns[d] - self.costs[d][0]
        new: dict[int, int] = {}
        for index, _ in wanted:
            for number in self.touching[index]:
                if number not in new:
                    new[number] = ns = self._thing_ns(number)
                    least += ns - paid[number]
        if least > allowed:
            for index, d in before:
                at[index] = d
            return
        loads = {d: self.loads[d] for d in devices}
        costs = {d: self.costs[d] for d in devices}
        for d in devices:
            self.loads[d] = loads[d].copy()
        for index, d in before:
            self._remove(index, d)
        for index, d in wanted:
            self._add(index, d)
        for d in devices:
            self.costs[d] = self._device_ns(d)
        over = self._over_ns()
        more = over - self.over
        more += sum(self.costs[d][0] - known[0] for d, known in costs.items())
        more += sum(ns - paid[number] for number, ns in new.items())
        if more <= allowed:
            self.total, self.over = self.total + more, over
            for number, ns in new.items():
                paid[number] = ns
            for d in devices:
                self.least_ns[d] = self._computing_ns(d)
            if self.total < self.least:
                self.least, self.best = self.total, at[:]
            return
        for index, d in before:
            at[index] = d
        for d in devices:
            self.loads[d], self.costs[d] = loads[d], costs[d]


def _things(problem: Problem) -> list[_Thing]:
    latest = awaited(problem.graph)
    found: dict[tuple[int, str], list[tuple[int, int, int, bool]]] = {}
    for edge in problem.graph.edges:
        key = (edge.source, edge.tensor)
        taker = (edge.target, edge.prefill_bytes, edge.decode_bytes, latest[edge.target] == key)
        found.setdefault(key, []).append(taker)
    return [_Thing(source, tuple(takers)) for (source, _), takers in found.items()]


def _clusters(problem: Problem) -> list[list[int]]:
    """Return the layers in sets that run on one device, in the order of their first."""
    root = list(range(len(problem.graph.layers)))

    def find(index: int) -> int:
        while root[index] != index:
            index = root[index]
        return index

    for one, other in _bound(problem):
        low, high = sorted((find(one), find(other)))
        root[high] = low
    members: dict[int, list[int]] = {}
    for index in range(len(root)):
        members.setdefault(find(index), []).append(index)
    return list(members.values())


def _bound(problem: Problem) -> Iterable[tuple[int, int]]:
    return ((edge.source, edge.target) for edge in problem.graph.edges if not edge.may_cut)

"""The counting model: how many layers of each class run on each device, and how many slices wait where (CP-SAT).

Variables, for a unit u, a device d, a group g in a precision p and a memory m of a home:
    layers[u, d]            how many layers of the unit run there (0 or 1 of one that is placed whole)
    stored[u, d, g, p]      how many of them have the group in that precision
    away[u, d, g, p, m]     how many slices of the group, over those layers, wait in that memory
    at[u, d, g, p, m]       in how many of those layers the waiting slices are in that memory
    dearer[u, d, g, p, m]   of the slices away, how many are above each price, where experts are not equally popular
    used[d], two[d]         whether anything runs there; whether whole groups have two slots and not one
    time[s, d], total[s]    what step s takes on d, and in all
The model counts and does not name, so alike layers give it no symmetry; alike devices are ordered by their layers. What
moves between devices is priced in `planner.placement.moves`.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ortools.sat.python import cp_model

from planner import memory
from planner.cost import Step
from planner.errors import NoSolutionInTimeError
from planner.placement import moves
from planner.placement.problem import Home, Option, Price, Problem, Tie, Unit, UnitCost

# (linearization level, limit) tried in turn: most instances are proven at once at one level or the other, and which
# one is not known before. Limits are on CP-SAT's own deterministic clock, so that a search is cut off at the same
# place everywhere.
SEARCHES = ((1, 0.3), (2, 0.3), (1, 10.0))
# Every layer named: the bound comes from the linear relaxation, and there is much of it.
NAMED_SEARCHES = ((2, 20.0),)
BOUND_SEARCHES = ((2, 2.0),)
# Where every layer runs is given: what waits where is left to find.
FILLING_SEARCHES = ((1, 0.3), (2, 1.0))
# After the first two searches an answer this near to its bound is taken.
NEAR = 1e-3
# With more numbers of blocks than this, over all devices, the last one of a stream is left out of the bound.
MOST_BLOCK_LITERALS = 400
# A shortfall need not be proven the least: it is said to a person.
SHORTFALL_SEARCHES = ((1, 0.3), (2, 0.3), (1, 1.0))
# That clock can all but stand still while a search goes in circles. Only then does a wall clock end it.
LONGEST_SEARCH_S = 30.0
LONGEST_SHORTFALL_S = 2.0
# When the user's time ends before anything is found, a first answer is looked for all the same, for so long.
LONGEST_FIRST_ANSWER_S = 5.0
MOST_OBJECTIVE = 2**60
# More than what moves between devices in one step takes: a quarter of an hour.
MOST_MOVING_NS = 2**40

# Unit, device, group, precision.
Stored = tuple[str, str, str, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """A solution. The keys are those of the model's variables; what is 0 is left out."""

    is_optimal: bool
    objective: int
    bound: int
    layers: dict[tuple[str, str], int]
    stored: dict[Stored, int]
    away: dict[tuple[Stored, str], int]
    at: dict[tuple[Stored, str], int]
    single: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortfall:
    """How many bytes one memory lacks, when only that one may grow."""

    pool: str
    missing_bytes: int


@dataclass(slots=True)
class Clock:
    """What is left of the user's time; an interrupt ends it."""

    limit_s: float | None = None
    started: float = field(default_factory=time.monotonic)
    interrupted: bool = False

    def is_over(self) -> bool:
        """Tell whether the user's time is up."""
        return self.limit_s is not None and time.monotonic() - self.started >= self.limit_s

    def is_half_over(self) -> bool:
        """Tell whether a first answer has to do, since the proof needs time too."""
        return self.limit_s is not None and time.monotonic() - self.started >= self.limit_s / 2

    def left_s(self, most: float) -> float:
        if self.interrupted:
            return 0.0
        return most if self.limit_s is None else max(0.0, min(most, self.limit_s - (time.monotonic() - self.started)))


def solve(
    problem: Problem,
    clock: Clock,
    *,
    order: Sequence[str] | None = None,
    hint: Counts | None = None,
    layers: dict[tuple[str, str], int] | None = None,
    searches: Sequence[tuple[int, float]] | None = None,
) -> Counts | None:
    """Return the best counts, or None when nothing fits; with `order`, of chains that visit devices in that order, with
    `layers` of those that share layers out so.

    Raises:
        NoSolutionInTimeError: the search was cut off before it found a placement.
    """
    model = _Model(problem, grow=None, ordered=order is not None, shared=layers)
    if order is not None:
        model.follow(order)
    model.minimise()
    if hint is not None:
        model.hint(hint)
        if problem.named and layers is None:
            # What is no better is known.
            model.model.add(model.goal <= hint.objective)
    return model.solve(clock, searches, known=hint if problem.named else None)


def shortfall(problem: Problem, pool: str, clock: Clock) -> Shortfall | None:
    """Return the least growth of one memory with which everything fits; None where that alone cannot help."""
    model = _Model(problem, grow=pool)
    model.model.minimize(model.growth)
    solver, status = model.run(SHORTFALL_SEARCHES, clock, longest_s=LONGEST_SHORTFALL_S)
    if solver is None or status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    entry = problem.hardware.pool(pool)
    overdrawn = max(0, entry.reserved_bytes - entry.capacity_bytes)
    return Shortfall(pool=pool, missing_bytes=solver.value(model.growth) + overdrawn)


class _Model:
    def __init__(
        self,
        problem: Problem,
        *,
        grow: str | None,
        ordered: bool = False,
        shared: dict[tuple[str, str], int] | None = None,
    ):
        self.shared = shared
        self.problem, self.hardware, self.rules = problem, problem.hardware, problem.rules
        self.model = cp_model.CpModel()
        self.devices = [device.name for device in self.hardware.devices]
        self.layers: dict[tuple[str, str], Any] = {}
        self.stored: dict[Stored, Any] = {}
        self.away: dict[tuple[Stored, str], Any] = {}
        self.at: dict[tuple[Stored, str], Any] = {}
        self.dearer: dict[tuple[Stored, str], list[tuple[int, Price, Any]]] = {}
        self.options: dict[Stored, Option] = {}
        self.held: dict[str, list[Any]] = {pool.name: [] for pool in self.hardware.pools}
        self.pinned: dict[str, list[Any]] = {device.name: [] for device in self.hardware.hosts}
        # (bytes, literal) that a device's activations and slots must be as large as; literals of what comes from disk
        self.activations: dict[str, list[tuple[int, Any]]] = {name: [] for name in self.devices}
        self.slots: dict[tuple[str, str], list[tuple[int, Any]]] = {}
        self.staged: dict[tuple[str, str], list[Any]] = {}
        # (the least copy, literal) of whole groups that are streamed; by step, literals of what is copied on demand
        self.streams: dict[str, list[tuple[int, Any]]] = {name: [] for name in self.devices}
        self.demands: dict[tuple[str, str], list[Any]] = {}
        self.used = {name: self.model.new_bool_var(f"used {name}") for name in self.devices}
        self.two = {name: self.model.new_bool_var(f"two slots {name}") for name in self.devices}
        self.growth = self.model.new_int_var(0, self._most_growth() if grow else 0, "growth")
        self._variables()
        self._buffers()
        self._memory(grow)
        if problem.named:
            self._edges()
        if not ordered and shared is None:
            self._order_alike_devices(grow)

    # Where layers run and slices wait.
    def _variables(self) -> None:
        model, problem = self.model, self.problem
        for name in self.devices:
            context, workspace = memory.fixed_bytes(problem.graph, self.hardware.device(name))
            # What stands outside every layer lives with the first one: with its unit, or where that may be.
            loose = problem.loose_bytes if self._first() is None else 0
            self.held[name].append((context + workspace + loose) * self.used[name])
        for unit in problem.units:
            for name, costs in unit.on.items():
                self.layers[unit.name, name] = (
                    model.new_bool_var(f"layers {unit.name} {name}")
                    if unit.count == 1
                    else model.new_int_var(0, unit.count, f"layers {unit.name} {name}")
                )
                self._unit_on(unit, name, costs)
                if self.shared is not None:
                    model.add(self.layers[unit.name, name] == self.shared.get((unit.name, name), 0))
            # [Constraint] every layer of a unit runs somewhere
            here = [self.layers[unit.name, name] for name in unit.on]
            if unit.count == 1:
                model.add_exactly_one(here)
            else:
                model.add(sum(here) == unit.count)
        for tie in problem.ties:
            self._tie(tie)
        if self.rules.dtypes:
            # [Constraint] the chosen precisions lose no more quality than the budget
            lost = [option.loss * self.stored[key] for key, option in self.options.items() if option.loss]
            model.add(sum(lost) <= problem.quality_budget)

    def _first(self) -> Unit | None:
        """Return the unit of the first layer where that is placed as one."""
        return next((unit for unit in self.problem.units if unit.count == 1 and 0 in unit.layers), None)

    def _unit_on(self, unit: Unit, name: str, costs: UnitCost) -> None:
        model, here = self.model, self.layers[unit.name, name]
        active = here
        if unit.count > 1:
            active = model.new_bool_var(f"active {unit.name} {name}")
            model.add(here <= unit.count * active)
        model.add_implication(active, self.used[name])
        self.activations[name].append((costs.activation_bytes, active))
        loose = self.problem.loose_bytes if unit is self._first() else 0
        self.held[name].append((costs.resident_bytes + costs.kv_bytes + loose) * here)
        if costs.host_bytes:
            self.held[self.hardware.host(name)].append(costs.host_bytes * here)
            self.pinned[self.hardware.host(name)].append(costs.host_bytes * here)
        for key, choices in costs.options.items():
            keys = [(unit.name, name, key, option.dtype) for option in choices]
            if len(choices) == 1:
                self.stored[keys[0]] = here
            else:
                for each in keys:
                    self.stored[each] = model.new_int_var(0, unit.count, f"stored {each}")
                # [Constraint] every layer has the group in one precision
                model.add(sum(self.stored[each] for each in keys) == here)
            for each, option in zip(keys, choices, strict=True):
                self.options[each] = option
                self._group(unit, each, option)

    def _group(self, unit: Unit, key: Stored, option: Option) -> None:
        model, group, name = self.model, option.group, key[1]
        here = self.stored[key]
        most = unit.count * group.slices
        self.held[name].append(option.freed_bytes * group.slices * here)
        total, spread = [], []
        for home in option.homes:
            slices = (
                model.new_bool_var(f"away {key} {home.memory}")
                if most == 1
                else model.new_int_var(0, most, f"away {key} {home.memory}")
            )
            self.away[key, home.memory] = slices
            total.append(slices)
            self.held[home.place].append(home.nbytes * slices)
            self.held[name].append(-option.freed_bytes * slices)
            if home.memory == "pinned":
                self.pinned[home.place].append(home.nbytes * slices)
            layers = here
            if len(option.homes) > 1 and group.slices > 1:
                layers = model.new_int_var(0, unit.count, f"at {key} {home.memory}")
                self.at[key, home.memory] = layers
                spread.append(layers)
                # [Constraint] the waiting slices of one layer's group have one home
                model.add(slices <= group.slices * layers)
            self._dearer(unit, key, home, slices, layers)
            self._copied(unit, key, option, home, slices, most)
        if spread:
            model.add(sum(spread) <= here)
        if total:
            model.add(sum(total) <= group.slices * here)

    def _dearer(self, unit: Unit, key: Stored, home: Home, slices: Any, layers: Any) -> None:
        """Say how many of the slices in a home are above each price: those beyond the cheaper ones of each layer there.

        What the slices cost is then a sum over the rises in price, convex as it is.
        """
        before = 0
        self.dearer[key, home.memory] = found = []
        for count, price in home.levels():
            beyond = slices
            if before:
                beyond = self.model.new_int_var(0, unit.count * (home.slices - before), f"{key} {home.memory} {before}")
                # [Constraint] the slices that are dear are at least those that are not cheap
                self.model.add(beyond >= slices - before * layers)
            found.append((before, price, beyond))
            before += count

    def _copied(self, unit: Unit, key: Stored, option: Option, home: Home, slices: Any, most: int) -> None:
        """Note what a home's copies need: slots, staging memory for what is on disk, and time that is not hidden."""
        if not home.is_copied:
            return
        model, name = self.model, key[1]
        device = self.hardware.device(name)
        waits = slices
        if most > 1:
            waits = model.new_bool_var(f"waits {key} {home.memory}")
            model.add(slices <= most * waits)
            if device.kind == "cpu":
                # What the CPU reads first is the smallest that does wait.
                model.add(slices >= waits)
        if home.needs_slot:
            kind = (name, memory.slot_kind(option.group))
            size = memory.allocation_bytes(option.group.slice_slab_bytes, device)
            self.slots.setdefault(kind, []).append((size, waits))
            if home.memory == "disk" and device.kind != "cpu":
                self.staged.setdefault(kind, []).append(waits)
        if option.prefetched:
            self.streams[name].append((option.smallest_ns, waits))
        else:
            for step in home.lane_ns:
                # Slices that are never used ask for nothing.
                copied = next((entry for entry in self.dearer[key, home.memory] if entry[1].lane_ns[step]), None)
                if copied is None:
                    continue
                literal = waits
                if copied[0]:
                    literal = model.new_bool_var(f"copies {key} {home.memory} {step}")
                    model.add(copied[2] <= most * literal)
                self.demands.setdefault((step, name), []).append(literal)

    def _tie(self, tie: Tie) -> None:
        """Take a tied tensor off each memory as often as it waits there beyond once."""
        waiting: dict[str, list[Any]] = {}
        disks: dict[str, list[Any]] = {}
        for unit_name, key in tie.members:
            unit = self.problem.unit(unit_name)
            assert unit is not None
            for name in unit.on:
                here = self.layers[unit_name, name]
                elsewhere = []
                for (stored, memory_kind), slices in self.away.items():
                    if stored[:3] == (unit_name, name, key):
                        elsewhere.append(slices)
                        if memory_kind == "disk":
                            disks.setdefault(self.hardware.disk(name), []).append(slices)
                        else:
                            waiting.setdefault(self.hardware.host(name), []).append(slices)
                waiting.setdefault(name, []).append(here - sum(elsewhere) if elsewhere else here)
        for places, nbytes in ((waiting, tie.nbytes), (disks, tie.stored_bytes)):
            for place, members in places.items():
                if len(members) < 2:
                    continue
                anything = self.model.new_bool_var(f"tied {tie.members} {place}")
                for member in members:
                    self.model.add(member <= anything)
                self.held[place].append(nbytes * anything - nbytes * sum(members))

    # [Constraint] a device holds its greatest activations and slots; disk → GPU goes through host memory, in pieces
    # as large as that GPU's slots
    def _buffers(self) -> None:
        model = self.model
        for name, needs in self.activations.items():
            self.held[name] += [nbytes * level for nbytes, level in self._greatest(needs, f"activations {name}")]
        for (name, holds), needs in self.slots.items():
            on_disk = self.staged.get((name, holds), [])
            from_disk = model.new_bool_var(f"from disk {name} {holds}")
            for literal in on_disk:
                model.add_implication(literal, from_disk)
            for nbytes, level in self._greatest(needs, f"slots {name} {holds}"):
                second = level
                if holds == "groups":
                    second = model.new_bool_var(f"second slot {name} {nbytes}")
                    model.add_bool_or(second, ~level, ~self.two[name])
                self.held[name].append(nbytes * (level + second))
                if not on_disk:
                    continue
                for which, literal in (("first", level), ("second", second)):
                    staging = model.new_bool_var(f"{which} staging {name} {holds} {nbytes}")
                    model.add_bool_or(staging, ~literal, ~from_disk)
                    host = self.hardware.host(name)
                    self.held[host].append(nbytes * staging)
                    self.pinned[host].append(nbytes * staging)
        for name in self.devices:
            if not self.streams[name] or self.hardware.device(name).kind == "cpu":
                model.add(self.two[name] == 1)

    def _greatest(self, needs: list[tuple[int, Any]], what: str) -> list[tuple[int, Any]]:
        """Return (bytes, bool) whose sum is the greatest that `needs` (bytes, literal) asks for: a step for each size.

        An integer variable for the bytes instead sends CP-SAT into searches that its own clock hardly counts.
        """
        steps: list[tuple[int, Any]] = []
        literals: dict[int, list[Any]] = {}
        for nbytes, wanted in needs:
            literals.setdefault(nbytes, []).append(wanted)
        before = 0
        for size in sorted(size for size in literals if size):
            level = self.model.new_bool_var(f"{what} above {before}")
            for wanted in literals[size]:
                self.model.add_implication(wanted, level)
            if steps:
                self.model.add_implication(level, steps[-1][1])
            steps.append((size - before, level))
            before = size
        return steps

    def _most_growth(self) -> int:
        """Return more bytes than any one memory can lack: everything there, and waiting there, at once."""
        total = self.problem.loose_bytes
        for name in self.devices:
            device = self.hardware.device(name)
            total += sum(memory.fixed_bytes(self.problem.graph, device))
            for unit in self.problem.units:
                if name not in unit.on:
                    continue
                costs = unit.on[name]
                total += costs.activation_bytes + unit.count * (costs.resident_bytes + costs.kv_bytes)
                for option in itertools.chain.from_iterable(costs.options.values()):
                    slab = memory.allocation_bytes(option.group.slice_slab_bytes, device)
                    total += 4 * slab + unit.count * option.group.slices * (slab + option.group.slice_stored_bytes)
        return total

    # [Constraint] no memory holds more than is usable
    def _memory(self, grow: str | None) -> None:
        for pool in self.hardware.pools:
            more = self.growth if pool.name == grow else 0
            self.model.add(sum(self.held[pool.name]) <= pool.usable_bytes + more)
        limit = self.hardware.pinned_limit_bytes
        for name, pinned in self.pinned.items():
            if limit is not None and pinned:
                # [Constraint] no more host memory is pinned than may be
                more = self.growth if name == grow and limit >= self.hardware.pool(name).usable_bytes else 0
                self.model.add(sum(pinned) <= limit + more)

    def _edges(self) -> None:
        """Keep layers together that must be, and with `contiguous` the layers of each device in one stretch."""
        unit_of = {index: unit.name for unit in self.problem.units for index in unit.layers}
        count = len(self.problem.graph.layers)
        for name in self.devices:
            here = [self.layers.get((unit_of[index], name), 0) for index in range(count)]
            for edge in self.problem.graph.edges:
                if not edge.may_cut:
                    # [Constraint] an edge that must not be cut has both its ends on one device
                    self.model.add(here[edge.source] - here[edge.target] == 0)
            if self.rules.contiguous:
                # [Constraint] a device begins at most once to run layers
                begins = [self.model.new_bool_var(f"begins {name} {index}") for index in range(count)]
                for index, begin in enumerate(begins):
                    self.model.add(begin >= here[index] - (here[index - 1] if index else 0))
                self.model.add_at_most_one(begins)

    # [Constraint] of alike devices of a node, an earlier one runs at least as many layers; of alike nodes too
    def _order_alike_devices(self, grow: str | None) -> None:
        """Order them but for the memory that grows, which makes its device and its node like no other."""
        alike = self.problem.alike
        by_device = {
            name: sum(self.layers[unit.name, name] for unit in self.problem.blocks if name in unit.on)
            for name in self.devices
        }
        for names in self.problem.interchangeable():
            for one, other in itertools.pairwise(name for name in names if name != grow):
                self.model.add(by_device[one] >= by_device[other])
        if self.problem.named:
            return
        nodes: dict[str, list[str]] = {}
        for name in self.devices:
            nodes.setdefault(self.hardware.node(name), []).append(name)
        kinds: dict[object, str] = {}
        for node, names in nodes.items():
            if grow is not None and node == self.hardware.node(grow):
                continue
            disk = self.hardware.pool(self.hardware.disk(names[0])).usable_bytes
            kind = (disk, tuple(sorted(alike[name] for name in names)))
            if kind in kinds:
                earlier = nodes[kinds[kind]]
                self.model.add(sum(by_device[name] for name in earlier) >= sum(by_device[name] for name in names))
            kinds[kind] = node

    # [Constraint] each device runs one stretch of the chain, the devices following each other in `order`
    def follow(self, order: Sequence[str]) -> None:
        """Restrict the model to chains that visit devices in the given order, each once (front and tail apart)."""
        chain = sorted(
            ((index, unit) for unit in self.problem.blocks for index in unit.layers), key=lambda pair: pair[0]
        )
        if self.problem.named:
            self._staircase([unit for _, unit in chain], order)
            return
        ends = [self.model.new_int_var(0, len(chain), f"end {name}") for name in order]
        self.model.add(ends[-1] == len(chain))
        before: dict[str, Any] = dict.fromkeys((unit.name for unit in self.problem.blocks), 0)
        for position, (name, end) in enumerate(zip(order, ends, strict=True)):
            if position:
                self.model.add(end >= ends[position - 1])
            for unit in self.problem.blocks:
                prefix = list(itertools.accumulate((other is unit for _, other in chain), initial=0))
                so_far = self.model.new_int_var(0, len(unit.layers), f"before {name} {unit.name}")
                self.model.add_element(end, prefix, so_far)
                self.model.add(self.layers.get((unit.name, name), 0) == so_far - before[unit.name])
                before[unit.name] = so_far
        if self.rules.contiguous:
            self._no_return(order, ends, len(chain))

    def _no_return(self, order: Sequence[str], ends: list[Any], count: int) -> None:
        """[Constraint] a device that has blocks has the front only if it has the first of them, the tail the last."""
        begins = [0, *ends[:-1]]
        for name, begin, end in zip(order, begins, ends, strict=True):
            has = self.model.new_bool_var(f"has {name}")
            self.model.add(end - begin <= count * has)
            front, tail = self.layers.get(("front", name)), self.layers.get(("tail", name))
            if front is not None:
                self.model.add(begin <= 0).only_enforce_if(front, has)
            if tail is not None:
                self.model.add(end >= count).only_enforce_if(tail, has)
            if front is not None and tail is not None and count:
                # Both of them elsewhere than all blocks would be two stretches.
                self.model.add(end - begin >= count).only_enforce_if(front, tail)

    def _staircase(self, chain: Sequence[Unit], order: Sequence[str]) -> None:
        """Let a layer run on one of the first devices of an order only if the layer before it does."""
        last: list[Any] = [0] * len(chain)
        for name in order:
            among = [self.model.new_bool_var(f"{unit.name} as far as {name}") for unit in chain]
            for one, other in itertools.pairwise(among):
                self.model.add_implication(other, one)
            for unit, here, before in zip(chain, among, last, strict=True):
                self.model.add(self.layers.get((unit.name, name), 0) == here - before)
            last = among

    def minimise(self) -> None:
        """Make the objective the cost model's time, or bytes of memory.

        Of equal costs, the one with the fewest layers on the CPU and slices that wait (those on disk twice) is taken;
        of equal memory the fastest.
        """
        problem = self.problem
        self._longest = {
            step.name: sum(self._longest_ns(step.name, name) for name in self.devices) for step in problem.steps
        }
        totals = {step.name: self._total(step) for step in problem.steps}
        times = sum(step.weight * totals[step.name] for step in problem.steps if step.weight)
        longest = sum(step.weight * (2 * self._longest[step.name] + MOST_MOVING_NS) for step in problem.steps)
        if problem.workload.objective == "fit":
            disks = {self.hardware.disk(name) for name in self.devices}
            self.goal = sum(
                itertools.chain.from_iterable(held for name, held in self.held.items() if name not in disks)
            )
            self.weight = 1
            self.model.minimize(self.goal)
            return
        self.goal = times
        on_cpu = [var for (_, name), var in self.layers.items() if self.hardware.device(name).kind == "cpu"]
        on_disk = [slices for (_, kind), slices in self.away.items() if kind == "disk"]
        # Layers on the CPU, slices that wait, and again those on disk; none is more often than it exists.
        graph = problem.graph
        every = sum(1 + 2 * group.slices for layer in graph.layers for group in graph.kinds[layer.kind].groups)
        self.weight = 1 + len(graph.layers) + every + len(self.devices)
        second = sum([*on_cpu, *self.away.values(), *on_disk, *(1 - two for two in self.two.values())])
        if self.weight * (longest + 1) > MOST_OBJECTIVE:
            # Too long a time to leave room for a second thought in 64 bits.
            self.weight, second = 1, 0
        self.model.minimize(self.weight * self.goal + second)

    def _total(self, priced: Step) -> Any:
        """Return what a step takes: the devices' times and what moves between them, or one link's time if longer."""
        model, problem, parts, floors = self.model, self.problem, [], []
        step = priced.name
        for name in self.devices:
            computing, demand, groups = self._work(step, name)
            if not computing:
                continue
            most = self._longest_ns(step, name)
            contention = self._contention(step, name, most)
            serial = sum(computing) + sum(demand) + contention
            taken = model.new_int_var(0, most, f"time {step} {name}")
            model.add(taken >= serial)
            parts.append(taken)
            cache = self._cache(step, name)
            lane = sum(groups) + contention + sum(demand) + cache
            if groups:
                exposed = model.new_int_var(0, most, f"exposed {step} {name}")
                is_cpu = self.hardware.device(name).kind == "cpu"
                model.add(
                    exposed >= sum(groups) + contention - (0 if priced.is_first or is_cpu else self._hidden(name))
                )
                if is_cpu and self.streams[name]:
                    model.add(taken >= serial + self._begins(name))
                overlaps = self.two[name]
                if self.demands.get((step, name)):
                    overlaps = model.new_bool_var(f"overlaps {step} {name}")
                    model.add_implication(overlaps, self.two[name])
                    for literal in self.demands[step, name]:
                        some = self._some_stream(name)
                        model.add_bool_or(~overlaps, ~literal, ~some)
                model.add(taken >= exposed)
                if self.shared is None:
                    self._last_block(step, name, taken, exposed, cache, serial)
                if self.shared is not None:
                    blocks = max(problem.blocks_on(name, self.shared), 1)
                    # What has nothing to stream, and one block, run before the first copy or after the last.
                    apart = problem.apart_ns(name, step, self.shared)
                    streams = model.new_bool_var(f"copies last {step} {name}")
                    model.add(exposed <= 0).only_enforce_if(~streams)
                    beside = serial + (blocks - 1) * apart
                    model.add(blocks * taken >= blocks * (exposed + cache) + beside).only_enforce_if(streams)
                model.add(taken >= serial + exposed).only_enforce_if(~overlaps)
                floors.append((name, lane, sum(computing)))
            elif demand or problem.on_host:
                floors.append((name, lane, None))
        total = model.new_int_var(0, 2 * self._longest[step] + MOST_MOVING_NS, f"total {step}")
        model.add(total >= sum(parts) + moves.price(self, step, prefill=priced.is_prefill))
        if not priced.is_first:
            for name, lane, computing in floors:
                model.add(total >= lane)
                if computing is not None:
                    model.add(total >= lane + computing).only_enforce_if(~self.two[name])
        return total

    def _last_block(self, step: str, name: str, taken: Any, exposed: Any, cache: Any, serial: Any) -> None:
        """[Constraint] what has nothing to stream, and one block, run before the first copy or after the last.

        How long one block is depends on how many there are: a literal for each number, where these are few.
        """
        model = self.model
        blocks = [
            (unit, self.layers[unit.name, name])
            for unit in self.problem.units
            if name in unit.on and self.problem.has_blocks(unit)
        ]
        most = sum(unit.count for unit, _ in blocks)
        if most * len(self.devices) > MOST_BLOCK_LITERALS:
            return
        known: dict[str, list[Any]] = self.__dict__.setdefault("_numbers", {})
        if name not in known:
            known[name] = [model.new_bool_var(f"{count} blocks on {name}") for count in range(most + 1)]
            model.add_exactly_one(known[name])
            number = sum(count * literal for count, literal in enumerate(known[name]))
            model.add(number == sum(here for _, here in blocks))
        apart = sum(
            unit.on[name].compute_ns[step] * self.layers[unit.name, name]
            for unit in self.problem.units
            if name in unit.on and not self.problem.has_blocks(unit)
        )
        copies = model.new_bool_var(f"copies last {step} {name}")
        model.add(exposed <= 0).only_enforce_if(~copies)
        for number, literal in enumerate(known[name]):
            # A CPU without blocks may read what only it lets wait.
            count = max(number, 1)
            model.add(count * taken >= count * (exposed + cache) + serial + (count - 1) * apart).only_enforce_if(
                literal, copies
            )

    def _cache(self, step: str, name: str) -> Any:
        """Return what copies of caches from host memory keep a device's link busy with."""
        return sum(
            unit.on[name].cache_ns[step] * self.layers[unit.name, name]
            for unit in self.problem.units
            if name in unit.on and unit.on[name].cache_ns[step]
        )

    def _some_stream(self, name: str) -> Any:
        """Return a literal that holds where any whole group is streamed to a device."""
        known: dict[str, Any] = self.__dict__.setdefault("_some", {})
        if name not in known:
            known[name] = self.model.new_bool_var(f"streams {name}")
            for _, literal in self.streams[name]:
                self.model.add_implication(literal, known[name])
        return known[name]

    def _hidden(self, name: str) -> Any:
        """Return what copies of whole groups a device does while others compute: as many as slots, of the smallest."""
        known: dict[str, Any] = self.__dict__.setdefault("_hides", {})
        if name not in known:
            most = max(smallest for smallest, _ in self.streams[name])
            hidden = self.model.new_int_var(0, memory.SLOT_COUNT * most, f"hidden {name}")
            for smallest, literal in self.streams[name]:
                self.model.add(hidden <= memory.SLOT_COUNT * smallest).only_enforce_if(literal)
                self.model.add(hidden <= smallest).only_enforce_if(literal, ~self.two[name])
            known[name] = hidden
        return known[name]

    def _begins(self, name: str) -> Any:
        """Return what a CPU waits for before it has anything to compute with: the least of what is read for it."""
        known: dict[str, Any] = self.__dict__.setdefault("_reads", {})
        if name not in known:
            by_size: dict[int, list[Any]] = {}
            for smallest, literal in self.streams[name]:
                by_size.setdefault(smallest, []).append(literal)
            known[name] = self.model.new_int_var(0, max(by_size), f"begins {name}")
            smaller: list[Any] = []
            for size, literals in sorted(by_size.items()):
                is_less = self.model.new_bool_var(f"reads less than {size} {name}")
                # [Constraint] something is as small only where it waits
                self.model.add_bool_or(*smaller, ~is_less)
                for literal in literals:
                    self.model.add(known[name] >= size).only_enforce_if(literal, ~is_less)
                smaller = [is_less, *literals]
        return known[name]

    def _work(self, step: str, name: str) -> tuple[list[Any], list[Any], list[Any]]:
        """Return what a device computes, what it copies on demand, and its copies of whole groups."""
        computing: list[Any] = []
        demand: list[Any] = []
        groups: list[Any] = []
        for unit in self.problem.units:
            if name in unit.on:
                computing.append(unit.on[name].compute_ns[step] * self.layers[unit.name, name])
                for key, choices in unit.on[name].options.items():
                    for option in choices:
                        stored = (unit.name, name, key, option.dtype)
                        for home in option.homes:
                            below = 0
                            for _, price, slices in self.dearer[stored, home.memory]:
                                ns = price.lane_ns[step] if option.prefetched else price.serial_ns[step]
                                kind = groups if option.prefetched else demand if price.lane_ns[step] else computing
                                kind.append((ns - below) * slices)
                                below = ns
        return computing, demand, groups

    def _contention(self, step: str, name: str, most: int) -> Any:
        """Return what copies and a CPU's experts each take longer where they read from one memory: the lesser of what
        all the ones and all the others would.
        """
        sums: tuple[list[Any], list[Any]] = ([], [])
        for unit in self.problem.units:
            for key, choices in unit.on[name].options.items() if name in unit.on else ():
                for option in choices:
                    stored = (unit.name, name, key, option.dtype)
                    for home in option.homes:
                        below = 0
                        for _, price, slices in self.dearer[stored, home.memory]:
                            if price.beside_ns[step] != below:
                                sums[option.prefetched].append((price.beside_ns[step] - below) * slices)
                            below = price.beside_ns[step]
        if not all(sums):
            return 0
        longer = self.model.new_int_var(0, most, f"beside copies {step} {name}")
        by_experts = self.model.new_bool_var(f"copies take more {step} {name}")
        self.model.add(longer >= sum(sums[False])).only_enforce_if(by_experts)
        self.model.add(longer >= sum(sums[True])).only_enforce_if(~by_experts)
        return longer

    def _longest_ns(self, step: str, name: str) -> int:
        """Return a time that no choice exceeds: every layer there, and every slice fetched from its slowest home."""
        total = 0
        for unit in self.problem.units:
            if name not in unit.on:
                continue
            costs = unit.on[name]
            total += (costs.compute_ns[step] + costs.cache_ns[step]) * unit.count
            for choices in costs.options.values():
                slowest = [
                    sum(
                        (max(price.lane_ns[step], price.serial_ns[step]) + price.beside_ns[step]) * price.slices
                        for price in home.prices
                    )
                    for option in choices
                    for home in option.homes
                ]
                total += max(slowest, default=0) * unit.count
        return total

    def hint(self, counts: Counts) -> None:
        """Start the search from an answer."""
        pairs: list[tuple[dict[Any, Any], dict[Any, int]]] = [
            (self.layers, counts.layers), (self.stored, counts.stored), (self.away, counts.away), (self.at, counts.at),
        ]  # fmt: skip
        seen: set[int] = set()
        for known, found in pairs:
            for key, variable in known.items():
                if variable.index not in seen:
                    seen.add(variable.index)
                    self.model.add_hint(variable, found.get(key, 0))
        for at, parts in self.dearer.items():
            layers = counts.at.get(at, 0) if at in self.at else counts.stored.get(at[0], 0)
            for before, _, beyond in parts[1:]:
                self.model.add_hint(beyond, max(0, counts.away.get(at, 0) - before * layers))

    def run(
        self, searches: Sequence[tuple[int, float]], clock: Clock, *, longest_s: float = LONGEST_SEARCH_S
    ) -> tuple[cp_model.CpSolver | None, Any]:
        """Search until something is proven or the last limit is reached; each search starts from the last's answer."""
        best: cp_model.CpSolver | None = None
        status: Any = cp_model.UNKNOWN
        for number, (level, limit) in enumerate(searches):
            left = clock.left_s(longest_s)
            if left <= 0 and best is not None:
                break
            solver = _solver(level, limit, max(left, 0.01))
            found = _solve(solver, self.model, clock)
            if found != cp_model.UNKNOWN or best is None:
                best, status = solver, found
            if found not in (cp_model.FEASIBLE, cp_model.UNKNOWN):
                break
            if found == cp_model.FEASIBLE:
                near = solver.objective_value - solver.best_objective_bound <= NEAR * solver.objective_value
                if number > 0 and near:
                    break
                self.model.clear_hints()
                for index in range(len(self.model.proto.variables)):
                    variable = self.model.get_int_var_from_proto_index(index)
                    self.model.add_hint(variable, solver.value(variable))
        if status == cp_model.UNKNOWN and clock.is_over() and not clock.interrupted:
            best = _solver(*searches[0], LONGEST_FIRST_ANSWER_S)
            best.parameters.stop_after_first_solution = True
            status = _solve(best, self.model, clock)
        return best, status

    def solve(
        self, clock: Clock, searches: Sequence[tuple[int, float]] | None = None, *, known: Counts | None = None
    ) -> Counts | None:
        """Return the best counts, None where there are none; `known` where the search found nothing, and its bound."""
        solver, status = self.run(searches or (NAMED_SEARCHES if self.problem.named else SEARCHES), clock)
        assert status != cp_model.MODEL_INVALID, self.model.validate()
        if status == cp_model.INFEASIBLE:
            return None
        if known is not None and solver is not None and status == cp_model.UNKNOWN:
            bound = max(0, int(solver.best_objective_bound / self.weight) - 1)
            return replace(known, is_optimal=False, bound=min(bound, known.objective))
        if solver is None or status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            raise NoSolutionInTimeError(
                "the search was cut off before it found a placement; give it more time, fewer kinds of GPUs, or more "
                "memory"
            )
        optimal, objective = status == cp_model.OPTIMAL, int(solver.value(self.goal))

        def values(variables: dict[Any, Any]) -> dict[Any, int]:
            return {key: solver.value(var) for key, var in variables.items() if solver.value(var)}

        return Counts(
            is_optimal=optimal,
            objective=objective,
            # The solver's bound is a float: one unit covers its rounding.
            bound=objective if optimal else max(0, int(solver.best_objective_bound / self.weight) - 1),
            layers=values(self.layers),
            stored=values(self.stored),
            away=values(self.away),
            at=values(self.at),
            single=frozenset(name for name, two in self.two.items() if not solver.value(two)),
        )


def _solver(level: int, limit: float, seconds: float) -> cp_model.CpSolver:
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.linearization_level = level
    solver.parameters.max_deterministic_time = limit
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.catch_sigint_signal = False
    return solver


def _solve(solver: cp_model.CpSolver, model: cp_model.CpModel, clock: Clock) -> Any:
    """Search in a thread, so that Ctrl-C is noticed here: it ends the search with the best it has."""
    found: list[Any] = []
    ended = threading.Event()

    def search() -> None:
        try:
            found.append(solver.solve(model))
        finally:
            ended.set()

    threading.Thread(target=search, daemon=True).start()
    # Not the thread itself is waited for: a join that is interrupted takes a thread for ended that is not.
    while not ended.is_set():
        try:
            ended.wait()
        except KeyboardInterrupt:
            clock.interrupted = True
            solver.stop_search()
    return found[0]

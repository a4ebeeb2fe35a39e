"""The counting model: how many layers of each class run on each device, and how many slices wait where (CP-SAT).

Variables, for a class c, a device d, a group g and a home h:
    layers[c, d]      how many layers of the class run there
    away[c, d, g, h]  how many slices of the group, over those layers, wait at h
    on_disk[c, d, g]  in how many of those layers the waiting slices of the group are on disk
    ends[u, d]        whether the front (embeddings) or tail (head) runs there
    used[d]           whether anything does
    time[s, d]        what step s takes on d
The model counts and does not name, so alike layers give it no symmetry; alike devices are ordered by their layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ortools.sat.python import cp_model

from planner import memory
from planner.errors import NoSolutionInTimeError
from planner.placement.problem import GroupCost, Problem, Tie, Unit, UnitCost, likeness

# (linearization level, limit) tried in turn: most instances are proven at once at one level or the other, and which
# one is not known before. Limits are on CP-SAT's own deterministic clock, so that a search is cut off at the same
# place everywhere.
SEARCHES = ((1, 0.3), (2, 0.3), (1, 10.0))
# A shortfall need not be proven the least: it is said to a person.
SHORTFALL_SEARCHES = ((1, 0.3), (2, 0.3), (1, 1.0))
# That clock can all but stand still while a search goes in circles. Only then does a wall clock end it.
LONGEST_SEARCH_S = 30.0
LONGEST_SHORTFALL_S = 2.0
MOST_OBJECTIVE = 2**60


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """A solution. `away`: (class, device, group, home) → slices; `on_disk`: (class, device, group) → layers."""

    optimal: bool
    objective_ns: int
    bound_ns: int
    ends: dict[str, str]
    layers: dict[tuple[str, str], int]
    away: dict[tuple[str, str, str, str], int]
    on_disk: dict[tuple[str, str, str], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortfall:
    """How many bytes one memory lacks, when only that one may grow."""

    pool: str
    missing_bytes: int


def solve(problem: Problem, *, order: Sequence[str] | None = None) -> Counts | None:
    """Return the best counts, or None when nothing fits; with `order`, of chains that visit devices in that order.

    Raises:
        NoSolutionInTimeError: the search was cut off before it found a placement.
    """
    model = _Model(problem, grow=None, ordered=order is not None)
    if order is not None:
        model.follow(order)
    model.minimise_time()
    return model.solve()


def shortfall(problem: Problem, pool: str) -> Shortfall | None:
    """Return the least growth of one memory with which everything fits; None where that alone cannot help."""
    model = _Model(problem, grow=pool)
    model.model.minimize(model.growth)
    solver, status = model.run(SHORTFALL_SEARCHES, longest_s=LONGEST_SHORTFALL_S)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    entry = problem.hardware.pool(pool)
    overdrawn = max(0, entry.reserved_bytes - entry.capacity_bytes)
    return Shortfall(pool=pool, missing_bytes=solver.value(model.growth) + overdrawn)


class _Model:
    def __init__(self, problem: Problem, *, grow: str | None, ordered: bool = False):
        self.problem = problem
        self.model = cp_model.CpModel()
        self.devices = [device.name for device in problem.hardware.devices]
        self.layers: dict[tuple[str, str], Any] = {}
        self.away: dict[tuple[str, str, str, str], Any] = {}
        self.on_disk: dict[tuple[str, str, str], Any] = {}
        self.ends: dict[tuple[str, str], Any] = {}
        self.held: dict[str, list[Any]] = {pool.name: [] for pool in problem.hardware.pools}
        self.pinned: list[Any] = []
        # (bytes, literal) that a device's activations and slots must be as large as; literals of what comes from disk
        self.activations: dict[str, list[tuple[int, Any]]] = {name: [] for name in self.devices}
        self.slots: dict[tuple[str, str], list[tuple[int, Any]]] = {}
        self.staged: dict[tuple[str, str], list[Any]] = {}
        self.used = {name: self.model.new_bool_var(f"used {name}") for name in self.devices}
        self.growth = self.model.new_int_var(0, self._most_growth() if grow else 0, "growth")
        self._variables()
        self._buffers()
        self._memory(grow)
        if not ordered:
            self._order_alike_devices()

    # Where layers run and slices wait.
    def _variables(self) -> None:
        model, problem = self.model, self.problem
        self._device_buffers()
        for unit in problem.blocks:
            for name in self.devices:
                self.layers[unit.name, name] = model.new_int_var(0, len(unit.layers), f"layers {unit.name} {name}")
                self._block_on(unit, name, unit.on[name])
            # [Constraint] every layer of a class runs somewhere
            model.add(sum(self.layers[unit.name, name] for name in self.devices) == len(unit.layers))
        for end in (problem.front, problem.tail):
            if end is None:
                continue
            for name in self.devices:
                self.ends[end.name, name] = model.new_bool_var(f"{end.name} {name}")
                self._end_on(end, name, end.on[name])
            # [Constraint] front and tail run on one device each
            model.add_exactly_one(self.ends[end.name, name] for name in self.devices)
        for tie in problem.ties:
            for name in self.devices:
                self._tie(tie, name)

    def _tie(self, tie: Tie, name: str) -> None:
        """Take a tied tensor off a memory where both of its groups wait there: on the device, or on disk."""
        keys = (("front", tie.front_key), ("tail", tie.tail_key))
        found = [self.away.get((end, name, key, "disk")) for end, key in keys]
        disks = [disk for disk in found if disk is not None]
        together = self.model.new_bool_var(f"tied {name}")
        for end in ("front", "tail"):
            self.model.add_implication(together, self.ends[end, name])
        for disk in disks:
            self.model.add_implication(together, ~disk)
        self.held[name].append(-tie.nbytes * together)
        if len(disks) == len(keys):
            on_disk = self.model.new_bool_var(f"tied on disk {name}")
            for disk in disks:
                self.model.add_implication(on_disk, disk)
            self.held["disk"].append(-tie.nbytes * on_disk)

    def _device_buffers(self) -> None:
        for name in self.devices:
            context, workspace = memory.fixed_bytes(self.problem.graph, self.problem.hardware.device(name))
            # What stands outside every layer lives with the first one: with the front, or where that may be.
            loose = self.problem.loose_bytes if self.problem.front is None else 0
            self.held[name].append((context + workspace + loose) * self.used[name])

    # [Constraint] a device holds its greatest activations and slots; disk → GPU goes through host memory, in pieces
    # as large as that GPU's slots
    def _buffers(self) -> None:
        for name, needs in self.activations.items():
            self.held[name] += [nbytes * level for nbytes, level in self._greatest(needs, f"activations {name}")]
        for (name, holds), needs in self.slots.items():
            for nbytes, level in self._greatest(needs, f"slots {name} {holds}"):
                self.held[name].append(nbytes * level)
                if not self.staged.get((name, holds)):
                    continue
                staging = self.model.new_bool_var(f"staging {name} {holds} {nbytes}")
                for from_disk in self.staged[name, holds]:
                    self.model.add_bool_or(staging, ~level, ~from_disk)
                self.held["cpu"].append(nbytes * staging)
                self.pinned.append(nbytes * staging)

    def _greatest(self, needs: list[tuple[int, Any]], what: str) -> list[tuple[int, Any]]:
        """Return (bytes, bool) whose sum is the greatest that `needs` (bytes, literal) asks for: a step for each size.

        An integer variable for the bytes instead sends CP-SAT into searches that its own clock hardly counts.
        """
        steps: list[tuple[int, Any]] = []
        before = 0
        for size in sorted({nbytes for nbytes, _ in needs if nbytes}):
            level = self.model.new_bool_var(f"{what} above {before}")
            for nbytes, wanted in needs:
                if nbytes >= size:
                    self.model.add_implication(wanted, level)
            steps.append((size - before, level))
            before = size
        return steps

    def _slot_bytes(self, entry: GroupCost, name: str) -> int:
        device = self.problem.hardware.device(name)
        return memory.SLOT_COUNT * memory.allocation_bytes(entry.slab_bytes, device)

    def _units(self) -> list[Unit]:
        ends = (self.problem.front, self.problem.tail)
        return [*self.problem.blocks, *(end for end in ends if end is not None)]

    def _most_growth(self) -> int:
        """Return more bytes than any one memory can lack: everything there, and waiting there, at once."""
        total = self.problem.loose_bytes
        for name in self.devices:
            total += sum(memory.fixed_bytes(self.problem.graph, self.problem.hardware.device(name)))
            for unit in self._units():
                costs = unit.on[name]
                count = len(unit.layers) if unit in self.problem.blocks else 1
                total += costs.activation_bytes + count * (costs.resident_bytes + costs.kv_bytes)
                total += sum(
                    2 * self._slot_bytes(g, name) + count * g.group.slices * g.slab_bytes for g in costs.groups
                )
        return total

    def _block_on(self, unit: Unit, name: str, costs: UnitCost) -> None:
        model, here = self.model, self.layers[unit.name, name]
        active = model.new_bool_var(f"active {unit.name} {name}")
        model.add(here <= len(unit.layers) * active)
        model.add_implication(active, self.used[name])
        self.activations[name].append((costs.activation_bytes, active))
        self.held[name].append((costs.resident_bytes + costs.kv_bytes) * here)
        for entry in costs.groups:
            self._waiting(unit, name, entry, here)

    def _waiting(self, unit: Unit, name: str, entry: GroupCost, here: Any) -> None:
        model, group = self.model, entry.group
        most = len(unit.layers) * group.slices
        disk_layers = model.new_int_var(0, len(unit.layers), f"on disk {unit.name} {name} {group.name}")
        self.on_disk[unit.name, name, entry.key] = disk_layers
        model.add(disk_layers <= here)
        streams = model.new_bool_var(f"streams {unit.name} {name} {group.name}")
        from_disk = model.new_bool_var(f"from disk {unit.name} {name} {group.name}")
        homes = {home for home, _ in entry.copy_ns}
        total = []
        for home in sorted(homes):
            slices = model.new_int_var(0, most, f"away {unit.name} {name} {group.name} {home}")
            self.away[unit.name, name, entry.key, home] = slices
            total.append(slices)
            each = group.slice_stored_bytes if home == "disk" else entry.slab_bytes
            self.held[home].append(each * slices)
            if home == "cpu":
                self.pinned.append(entry.slab_bytes * slices)
            # [Constraint] the waiting slices of one layer's group have one home
            model.add(slices <= group.slices * (disk_layers if home == "disk" else here - disk_layers))
            self.held[name].append(-entry.freed_bytes * slices)
        model.add(sum(total) <= most * streams)
        model.add(disk_layers <= len(unit.layers) * from_disk)
        if entry.needs_slot:
            device = self.problem.hardware.device(name)
            size = self._slot_bytes(entry, name)
            key = (name, memory.slot_kind(group))
            self.slots.setdefault(key, []).append((size, streams))
            if device.kind != "cpu":
                self.staged.setdefault(key, []).append(from_disk)

    def _end_on(self, end: Unit, name: str, costs: UnitCost) -> None:
        here = self.ends[end.name, name]
        self.model.add_implication(here, self.used[name])
        self.activations[name].append((costs.activation_bytes, here))
        loose = self.problem.loose_bytes if end is self.problem.front else 0
        self.held[name].append((costs.resident_bytes + costs.kv_bytes + loose) * here)
        for entry in costs.groups:
            disk = self.model.new_bool_var(f"disk {end.name} {name} {entry.group.name}")
            self.away[end.name, name, entry.key, "disk"] = disk
            self.model.add_implication(disk, here)
            self.held[name].append(-entry.freed_bytes * disk)
            self.held["disk"].append(entry.group.slice_stored_bytes * disk)

    # [Constraint] no memory holds more than is usable
    def _memory(self, grow: str | None) -> None:
        for pool in self.problem.hardware.pools:
            more = self.growth if pool.name == grow else 0
            self.model.add(sum(self.held[pool.name]) <= pool.usable_bytes + more)
        limit = self.problem.hardware.pinned_limit_bytes
        if limit is not None and self.pinned:
            # [Constraint] no more host memory is pinned than may be
            self.model.add(sum(self.pinned) <= limit)

    # [Constraint] of alike devices, an earlier one runs at least as many layers
    def _order_alike_devices(self) -> None:
        hardware = self.problem.hardware
        for one, other in zip(hardware.devices, hardware.devices[1:], strict=False):
            alike = likeness(hardware, one) == likeness(hardware, other)
            if alike:
                blocks = self.problem.blocks
                here = sum(self.layers[unit.name, one.name] for unit in blocks)
                there = sum(self.layers[unit.name, other.name] for unit in blocks)
                self.model.add(here >= there)

    # [Constraint] each device runs one stretch of the chain, the devices following each other in `order`
    def follow(self, order: Sequence[str]) -> None:
        """Restrict the model to chains that visit devices in the given order, each once (front and tail apart)."""
        chain = sorted(
            ((index, unit) for unit in self.problem.blocks for index in unit.layers), key=lambda pair: pair[0]
        )
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
                self.model.add(self.layers[unit.name, name] == so_far - before[unit.name])
                before[unit.name] = so_far

    def minimise_time(self) -> None:
        """Make the objective the cost model's: the longest lane of every device in every step, and the hops.

        Of equal costs, the one with the fewest layers on the CPU and slices that wait (those on disk twice) is taken.
        """
        problem, total = self.problem, []
        for step, times in problem.times.items():
            for name in self.devices:
                serial, copies = self._work(step, name)
                if not serial:
                    continue
                time = self.model.new_int_var(0, self._longest_ns(step, name), f"time {step} {name}")
                self.model.add(time >= sum(serial))
                if copies:
                    self.model.add(time >= sum(copies))
                total.append(times * time)
            total.append(times * problem.hop_ns[step] * self._hops())
        self.time_ns = sum(total)
        on_cpu = [var for (_, name), var in (*self.layers.items(), *self.ends.items()) if name == "cpu"]
        on_disk = [slices for (*_, home), slices in self.away.items() if home == "disk"]
        # Layers on the CPU, slices that wait, and again those on disk; none is more often than it exists.
        graph = problem.graph
        every = sum(1 + 2 * group.slices for layer in graph.layers for group in graph.kinds[layer.kind].groups)
        self.weight = 1 + len(graph.layers) + every
        second = sum([*on_cpu, *self.away.values(), *on_disk])
        longest = sum(
            times * (self._longest_ns(step, name) + 2 * problem.hop_ns[step])
            for step, times in problem.times.items()
            for name in self.devices
        )
        if self.weight * (longest + 1) > MOST_OBJECTIVE:
            # Too long a time to leave room for a second thought in 64 bits.
            self.weight, second = 1, 0
        self.model.minimize(self.weight * self.time_ns + second)

    def _work(self, step: str, name: str) -> tuple[list[Any], list[Any]]:
        serial: list[Any] = []
        copies: list[Any] = []
        for unit in self._units():
            costs = unit.on[name]
            here = self.layers[unit.name, name] if (unit.name, name) in self.layers else self.ends[unit.name, name]
            serial.append(costs.compute_ns[step] * here)
            for entry in costs.groups:
                for home in ("cpu", "disk"):
                    slices = self.away.get((unit.name, name, entry.key, home))
                    if slices is None:
                        continue
                    copies.append(entry.copy_ns[home, step] * slices)
                    if not entry.prefetched:
                        serial.append(entry.copy_ns[home, step] * slices)
        return serial, copies

    def _longest_ns(self, step: str, name: str) -> int:
        """Return a time that no choice exceeds: every layer there, and every slice fetched from its slowest home."""
        total = 0
        for unit in self._units():
            costs, count = unit.on[name], len(unit.layers) if unit in self.problem.blocks else 1
            total += costs.compute_ns[step] * count
            for entry in costs.groups:
                slowest = max(ns for (_, of), ns in entry.copy_ns.items() if of == step)
                total += slowest * entry.group.slices * count
        return total

    def _hops(self) -> Any:
        """Return the fewest changes of device: one less than devices used, one more if the walk ends where it began."""
        if not hasattr(self, "_hop_count"):
            model, problem = self.model, self.problem
            hops = model.new_int_var(0, 2 * len(self.devices), "hops")
            model.add(hops >= sum(self.used.values()) - 1)
            if problem.front is not None and problem.tail is not None:
                several = model.new_bool_var("several")
                model.add(sum(self.used.values()) <= 1 + len(self.devices) * several)
                for name in self.devices:
                    back = [self.ends["front", name], self.ends["tail", name], several]
                    model.add(hops >= sum(self.used.values()) - 3 * len(self.devices) * (3 - sum(back)))
            self._hop_count = hops
        return self._hop_count

    def run(
        self, searches: Sequence[tuple[int, float]] = SEARCHES, *, longest_s: float = LONGEST_SEARCH_S
    ) -> tuple[cp_model.CpSolver, Any]:
        """Search until something is proven or the last limit is reached; each search starts from the last's answer."""
        for level, limit in searches:
            solver = cp_model.CpSolver()
            solver.parameters.num_workers = 1
            solver.parameters.random_seed = 0
            solver.parameters.linearization_level = level
            solver.parameters.max_deterministic_time = limit
            solver.parameters.max_time_in_seconds = longest_s
            status = solver.solve(self.model)
            if status not in (cp_model.FEASIBLE, cp_model.UNKNOWN):
                break
            if status == cp_model.FEASIBLE:
                self.model.clear_hints()
                for index in range(len(self.model.proto.variables)):
                    variable = self.model.get_int_var_from_proto_index(index)
                    self.model.add_hint(variable, solver.value(variable))
        return solver, status

    def solve(self) -> Counts | None:
        solver, status = self.run()
        assert status != cp_model.MODEL_INVALID, self.model.validate()
        if status == cp_model.INFEASIBLE:
            return None
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            raise NoSolutionInTimeError(
                "the search was cut off before it found a placement; give fewer kinds of GPUs, or more memory"
            )
        optimal, objective = status == cp_model.OPTIMAL, int(solver.value(self.time_ns))
        return Counts(
            optimal=optimal,
            objective_ns=objective,
            # The solver's bound is a float: one nanosecond covers its rounding.
            bound_ns=objective if optimal else max(0, int(solver.best_objective_bound / self.weight) - 1),
            ends={unit: name for (unit, name), var in self.ends.items() if solver.value(var)},
            layers={key: solver.value(var) for key, var in self.layers.items()},
            away={key: solver.value(var) for key, var in self.away.items()},
            on_disk={key: solver.value(var) for key, var in self.on_disk.items()},
        )

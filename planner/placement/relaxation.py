"""A bound for graphs whose layers are named: layers in fractions, on devices whose buffers are whole (HiGHS and SCIP).

A linear relaxation takes the same fraction of every layer on every device, and pays contexts, slots and activations in
fractions too. Here these are decided: whether a device is used, and in steps how large its slots and activations are at
least. Where layers run, what is streamed and what moves stay fractions, so what is proven holds for every placement.

What moves from o to d is priced by clusters: two devices are in one where a chain of links joins them whose prices are
below a level. A thing pays each level once for each device that takes it in a cluster that does not make it.

Host memory, disks, ties and what two phases share on one link are left out, which only makes the bound lower.
"""

from __future__ import annotations

import bisect
import itertools
import math
import threading
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

from ortools.math_opt.python import mathopt

from planner import memory
from planner.cost import slot_count
from planner.graph import Edge
from planner.placement.counts import Clock
from planner.placement.problem import Option, Problem
from planner.steps import awaited, link_ns

# Sizes of slots, and of activations, that are told apart on each device.
LEVELS = 8
# Which of them is ahead after a minute is not known before: at 200 layers, by 1 to 2 % of the bound.
FIRST, SECOND = mathopt.SolverType.HIGHS, mathopt.SolverType.GSCIP
# Nodes of the search: where it ends is the same everywhere.
MOST_NODES = 10_000
# Only where nodes take too long does a wall clock end it.
LONGEST_S = 54.0
# Of the bound, for the rounding of a solver that computes with floats and takes 1e-6 for nothing.
ROUNDING = 1e-5
# ns and bytes in one unit of the model.
_MS, _MB = 1e6, 1e6


def applies(problem: Problem) -> bool:
    """Tell whether the relaxation knows all that may save time or memory in a problem."""
    return (
        problem.named
        and problem.workload.objective != "fit"
        and not problem.ties
        and not problem.on_host
        and not problem.rules.dtypes
        and all(unit.on for unit in problem.units)
        and all(group.slices == 1 for kind in problem.graph.kinds for group in kind.groups)
    )


class Search:
    """Searches for the bound, one by each solver, that go on beside another."""

    def __init__(self, problem: Problem, clock: Clock):
        self._relaxation = _Relaxation(problem)
        self._clock = clock
        self._own = Clock(LONGEST_S)
        self._found: list[int] = []
        self._ended: list[threading.Event] = []

    def start(self, solver: mathopt.SolverType) -> None:
        """Let one more solver search."""
        ended = threading.Event()
        self._ended.append(ended)
        threading.Thread(target=self._run, args=(solver, ended), daemon=True).start()

    def _run(self, solver: mathopt.SolverType, ended: threading.Event) -> None:
        try:
            left_s = self._clock.left_s(self._own.left_s(LONGEST_S))
            self._found.append(self._relaxation.bound_ns(left_s, solver))
        finally:
            ended.set()

    def bound_ns(self) -> int:
        """Wait for what no placement costs less than; after an interrupt no longer."""
        try:
            for ended in self._ended:
                if not self._clock.interrupted:
                    ended.wait()
        except KeyboardInterrupt:
            self._clock.interrupted = True
        return max(self._found, default=0)


class _Relaxation:
    def __init__(self, problem: Problem):
        self.problem, self.hardware = problem, problem.hardware
        self.model = mathopt.Model()
        self.units = sorted(problem.units, key=lambda unit: unit.layers[0])
        self.devices = [device.name for device in self.hardware.devices if any(device.name in u.on for u in self.units)]
        self.here: dict[tuple[int, str], Any] = {}
        self.away: dict[tuple[int, str], list[Any]] = {}
        self.used = {name: self.model.add_binary_variable() for name in self.devices}
        self.cost: list[Any] = []
        for name in self.devices:
            self._device(name)
        for unit in self.units:
            # [Constraint] every layer runs somewhere
            self.model.add_linear_constraint(sum(self.here[unit.layers[0], name] for name in unit.on) == 1)
        for alike in problem.interchangeable():
            for one, other in itertools.pairwise(alike):
                if one in self.used and other in self.used:
                    # [Constraint] of devices that may be exchanged, the earlier are used
                    self.model.add_linear_constraint(self.used[one] >= self.used[other])
        for edge in problem.graph.edges:
            ends = edge.source, edge.target
            for name in () if edge.may_cut else self.devices:
                if any((end, name) in self.here for end in ends):
                    # [Constraint] an edge that must not be cut has both its ends on one device
                    self.model.add_linear_constraint(self._at(ends[0], name) - self._at(ends[1], name) == 0)
        self._moves()
        self.model.minimize(mathopt.fast_sum(self.cost))

    def _at(self, layer: int, name: str) -> Any:
        return self.here.get((layer, name), 0)

    def _fraction(self) -> Any:
        return self.model.add_variable(lb=0.0, ub=1.0)

    def _steps(self, sizes: Iterable[int]) -> tuple[list[int], list[Any]]:
        """Return LEVELS of the sizes, and for each whether it is reached: each only where the one below it is."""
        known = sorted(set(sizes))
        levels = sorted({known[number * len(known) // LEVELS] for number in range(LEVELS)}) if known else []
        reached = [self.model.add_binary_variable() for _ in levels]
        for below, above in itertools.pairwise(reached):
            self.model.add_linear_constraint(above <= below)
        return levels, reached

    def _device(self, name: str) -> None:
        model, problem, device = self.model, self.problem, self.hardware.device(name)
        units = [(unit, unit.on[name]) for unit in self.units if name in unit.on]
        works, working = self._steps(costs.activation_bytes for _, costs in units)
        slots = {
            (unit.name, key): memory.allocation_bytes(options[0].group.slice_slab_bytes, device)
            for unit, costs in units
            for key, options in costs.options.items()
            if all(home.needs_slot for home in options[0].homes) and options[0].homes
        }
        sizes, sized = self._steps(slots.values())
        slot = mathopt.fast_sum(
            (size - below) / _MB * level for size, below, level in zip(sizes, [0, *sizes], sized, strict=False)
        )
        # Of two slots the second may be saved, but then copies do not overlap: that of the largest group least of all.
        saved, least_ns = model.add_variable(lb=0.0), math.inf
        model.add_linear_constraint(saved <= slot)
        held: list[Any] = [sum(memory.fixed_bytes(problem.graph, device)) / _MB * self.used[name]]
        held += [(size - below) / _MB * level for size, below, level in zip(works, [0, *works], working, strict=False)]
        held.append(memory.SLOT_COUNT * slot - saved)
        computing: dict[str, list[Any]] = {step.name: [] for step in problem.steps}
        copying: dict[str, list[Any]] = {step.name: [] for step in problem.steps}
        most_hidden = 0
        for unit, costs in units:
            here = self.here[unit.layers[0], name] = self._fraction()
            model.add_linear_constraint(here <= working[bisect.bisect_right(works, costs.activation_bytes) - 1])
            model.add_linear_constraint(here <= self.used[name])
            loose = problem.loose_bytes if 0 in unit.layers else 0
            held.append((costs.resident_bytes + costs.kv_bytes + loose) / _MB * here)
            for step in problem.steps:
                computing[step.name].append(costs.compute_ns[step.name] / _MS * here)
            for key, (option,) in costs.options.items():
                held.append(option.freed_bytes / _MB * here)
                if not option.homes:
                    continue
                away = self._fraction()
                self.away.setdefault((unit.layers[0], name), []).append(away)
                model.add_linear_constraint(away <= here)
                if (unit.name, key) in slots:
                    model.add_linear_constraint(away <= sized[bisect.bisect_right(sizes, slots[unit.name, key]) - 1])
                held.append(-option.freed_bytes / _MB * away)
                most_hidden = max(most_hidden, slot_count(device, memory.SLOT_COUNT) * option.smallest_ns)
                if (unit.name, key) in slots and option.prefetched:
                    first = min(_waiting_ns(option, step.name) for step in problem.steps if step.is_first)
                    least_ns = min(least_ns, first / slots[unit.name, key])
                for step in problem.steps:
                    ns, where = _waiting_ns(option, step.name), copying if option.prefetched else computing
                    where[step.name].append(ns / _MS * away)
        # [Constraint] no memory holds more than is usable
        model.add_linear_constraint(mathopt.fast_sum(held) <= self.hardware.pool(device.pool).usable_bytes / _MB)
        for step in problem.steps:
            if not step.weight:
                continue
            taken = model.add_variable(lb=0.0)
            alone, copies = mathopt.fast_sum(computing[step.name]), mathopt.fast_sum(copying[step.name])
            hidden = 0 if step.is_first else most_hidden / _MS
            model.add_linear_constraint(taken >= alone)
            if copying[step.name]:
                model.add_linear_constraint(taken >= copies - hidden)
            if step.is_first and least_ns < math.inf:
                model.add_linear_constraint(taken >= alone + least_ns * _MB / _MS * saved)
            self.cost.append(step.weight * taken)

    def _moves(self) -> None:
        """Price what moves, once for each device that takes it."""
        latest = awaited(self.problem.graph)
        things: dict[tuple[int, str], list[Edge]] = {}
        for edge in self.problem.graph.edges:
            things.setdefault((edge.source, edge.tensor), []).append(edge)
        links = {(a, b): self.hardware.link(a, b) for a in self.devices for b in self.devices if a != b}
        steps = self.problem.steps
        waited = {pair: sum(step.weight for step in steps) * link.latency_ns for pair, link in links.items()}
        for (source, tensor), edges in things.items():
            takers = sorted({edge.target for edge in edges})
            prefill = min(edge.prefill_bytes for edge in edges)
            decode = min(edge.decode_bytes for edge in edges)
            carried = {
                pair: sum(step.weight * link_ns(link, prefill if step.is_prefill else decode) for step in steps)
                for pair, link in links.items()
            }
            waiting = [taker for taker in takers if latest[taker] == (source, tensor)]
            if waiting == takers:
                self._thing(source, takers, {pair: ns + waited[pair] for pair, ns in carried.items()})
                continue
            self._thing(source, takers, carried)
            self._thing(source, waiting, waited)

    def _thing(
        self,
        source: int,
        takers: list[int],
        prices: Mapping[tuple[str, str], int],
    ) -> None:
        """Price what one layer makes for its takers: it arrives once on a device, at the level of each cluster."""
        if not takers:
            return
        for rise, clusters in _levels(self.devices, prices):
            for cluster in clusters:
                made = sum(self._at(source, name) for name in cluster)
                arriving = []
                for name in sorted(cluster):
                    moved = self._fraction()
                    arriving.append(moved)
                    self.cost.append(rise / _MS * moved)
                    if len(cluster) > 1 and len(takers) > 1:
                        for taker in takers:
                            self.model.add_linear_constraint(moved >= self._at(taker, name) - made)
                for taker in takers:
                    self.model.add_linear_constraint(
                        sum(arriving) >= sum(self._at(taker, name) for name in cluster) - made
                    )

    def bound_ns(self, seconds: float, solver: mathopt.SolverType = FIRST) -> int:
        """Return the bound, in ns; 0 where the search ended before it had one."""
        found = mathopt.solve(
            self.model,
            solver,
            params=mathopt.SolveParameters(node_limit=MOST_NODES, time_limit=timedelta(seconds=max(seconds, 0.01))),
        )
        bound = found.termination.objective_bounds.dual_bound
        return max(0, int(bound * _MS * (1 - ROUNDING))) if abs(bound) < 1e15 else 0


def _waiting_ns(option: Option, step: str) -> int:
    """Return the least that a waiting group costs in a step, of the homes that it may have."""
    return min((home.lane_ns if option.prefetched else home.prices[0].serial_ns)[step] for home in option.homes)


def _levels(devices: list[str], prices: Mapping[tuple[str, str], int]) -> list[tuple[int, list[frozenset[str]]]]:
    """Return (rise in price, clusters that are at least the price so far apart) for each price at which some join."""
    apart = {frozenset(pair): min(prices[pair], prices[pair[::-1]]) for pair in prices}
    cluster = {name: frozenset([name]) for name in devices}
    found, before = [], 0
    for level in sorted(set(apart.values())):
        clusters = sorted(set(cluster.values()), key=sorted)
        if len(clusters) == 1:
            break
        if level > before:
            found.append((level - before, clusters))
        before = level
        for pair, price in apart.items():
            one, other = pair
            if price <= level and cluster[one] != cluster[other]:
                joined = cluster[one] | cluster[other]
                cluster.update(dict.fromkeys(joined, joined))
    return found

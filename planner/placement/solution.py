"""Finds the best placement and says what is proven of it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from planner import cost, memory
from planner.errors import InfeasibleError, InputError, NoSolutionInTimeError
from planner.graph import LayerGraph
from planner.hardware import Hardware
from planner.placement import annealing
from planner.placement import counts as counting
from planner.placement.problem import Problem, build, is_chain
from planner.placement.realise import chain_order, realise
from planner.placement.rent import with_rent
from planner.placement.tables import Share, applies, share_out
from planner.plan import Placement, Slots, Solver
from planner.rules import NO_RULES, Rules
from planner.units import GB, MB, format_bytes
from planner.workload import Workload

# Layers times devices: more are only ever counted.
MOST_NAMED = 4_000
# A chain's placement that is further than this above its bound is looked for again with every layer named.
NAMED_ABOVE = 0.01
# Layers times devices: so few are named wherever something is left unproven.
FEW_NAMED = 60
# Where host memory binds, an answer this near to the bound of the tables is taken.
RENTED_ABOVE = 0.01
# With less of the user's time left than this, in seconds, those tables are not made.
LONGEST_RENTED_S = 5.0
# So few are left to CP-SAT alone; of more than so many it proves little itself.
FEW_RELAXED = 150
MOST_SEARCHED = 600
# With more devices than this, what is near the bound of the tables is not searched any further.
FEW_DEVICES = 4


def find(
    graph: LayerGraph, hardware: Hardware, workload: Workload, rules: Rules = NO_RULES
) -> tuple[tuple[Placement, ...], tuple[Slots, ...], Solver]:
    """Return the placement of least cost with its slots, and its proof.

    Layers of a chain are counted, which ignores their order: the bound holds for every placement, contiguous or not.
    Where blocks are of several classes its counts may need more hops than it counted: then chains that visit the
    devices in natural orders are searched as well, and what is left between the best of them and the bound is the gap.
    Layers of any other graph are named.

    Raises:
        InfeasibleError: nothing fits. NoSolutionInTimeError: cut off before anything was found.
        InputError: a rule cannot be followed on this machine.
    """
    shared = next((device for device in hardware.devices if device.pool != device.name), None)
    if shared is not None:
        raise InputError(f"{shared.name} draws on the memory of {shared.pool}; shared memory is not planned for yet")
    clock = counting.Clock(rules.time_limit_s)
    nodes = hardware.nodes if rules.never_across_nodes else (None,)
    answers, short = [], []
    for node in nodes:
        devices = [device.name for device in hardware.devices if node in (None, hardware.node(device.name))]
        answer = _answer(graph, hardware, workload, rules, devices, clock)
        answers += [answer] if isinstance(answer, _Answer) else []
        short += [answer] if isinstance(answer, Problem) else []
    if not answers:
        raise _infeasible(short, clock)
    best = min(answers, key=lambda answer: answer.objective)
    placements, slots, objective = best.placements, best.slots, best.objective
    bound = min(answer.bound for answer in answers)
    in_bytes = workload.objective == "fit"
    time_ns = cost.objective_ns(graph, hardware, workload, placements, slots)
    solver = Solver(
        status="optimal" if objective <= bound else "feasible",
        objective_ns=time_ns,
        bound_ns=0 if in_bytes else min(bound, objective),
        objective_bytes=objective if in_bytes else None,
        bound_bytes=min(bound, objective) if in_bytes else None,
        cost_model=cost.COST_MODEL,
        cut_short="interrupt" if clock.interrupted else "time limit" if clock.is_over() and objective > bound else "no",
    )
    return placements, slots, solver


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    placements: tuple[Placement, ...]
    slots: tuple[Slots, ...]
    objective: int
    bound: int


def _answer(
    graph: LayerGraph,
    hardware: Hardware,
    workload: Workload,
    rules: Rules,
    devices: Sequence[str],
    clock: counting.Clock,
) -> _Answer | Problem:
    """Return the best placement on some of the devices, or the problem where nothing fits there."""
    size = len(graph.layers) * len(devices)
    named = size <= MOST_NAMED and not is_chain(graph)
    problem = build(graph, hardware, workload, rules, named=named, devices=devices)
    counted, bound, is_rented = _counted(problem, clock)
    if not counted:
        # What one stretch for each device needs beyond all else is known only with every layer named.
        names_help = rules.contiguous and not named and size <= MOST_NAMED
        return build(graph, hardware, workload, rules, named=True, devices=devices) if names_help else problem
    found = [realise(problem, counts) for counts in counted]
    if len(hardware.nodes) > 1:
        found += [entry for each in list(found) if (entry := _gathered(problem, *each)) is not None]
    best = _best(problem, found)
    near = 0.0 if size <= FEW_NAMED else RENTED_ABOVE if is_rented else counting.NEAR
    if not named and (best is None or best[0] - bound > near * bound):
        found += list(_chains(problem, counted[0], clock))
        best = _best(problem, found)
    above = 0 if size <= FEW_NAMED else NAMED_ABOVE
    if not named and size <= MOST_NAMED and (best is None or best[0] - bound > above * best[0]):
        named_problem = build(graph, hardware, workload, rules, named=True, devices=devices)
        again = counting.solve(named_problem, clock)
        if again is not None:
            found.append(realise(named_problem, again))
            bound = max(bound, again.bound)
            best = _best(problem, found)
        elif best is None:
            return named_problem
    if best is None:
        raise NoSolutionInTimeError("no contiguous placement was found in time; allow others, or give it more time")
    placements, slots = found[best[1]]
    bound = max(bound, _computing_ns(problem))
    return _Answer(placements=placements, slots=slots, objective=best[0], bound=min(bound, best[0]))


def _computing_ns(problem: Problem) -> int:
    """Return a bound that is there when a search is cut off before its own: every layer computes somewhere."""
    if problem.workload.objective == "fit":
        return 0
    return sum(
        step.weight * unit.count * min(costs.compute_ns[step.name] for costs in unit.on.values())
        for step in problem.steps
        for unit in problem.units
    )


def _best(problem: Problem, found: Sequence[tuple[tuple[Placement, ...], tuple[Slots, ...]]]) -> tuple[int, int] | None:
    """Return (objective, which one) of the best placement that keeps the rules; None where there is none."""
    scored = [
        (_score(problem, *entry), number)
        for number, entry in enumerate(found)
        if not problem.rules.contiguous or is_contiguous(problem.graph, entry[0])
    ]
    return min(scored, default=None)


def _counted(problem: Problem, clock: counting.Clock) -> tuple[list[counting.Counts], int, bool]:
    """Return counts that may be best, and a lower bound: by tables where these prove it, else by search as well.

    Also whether host memory binds and its rent has brought both near each other.
    """
    if problem.named and len(problem.units) * len(problem.hardware.devices) > FEW_NAMED:
        return *_searched(problem, clock), False
    if not applies(problem):
        counts = counting.solve(problem, clock)
        return ([], 0, False) if counts is None else ([counts], counts.bound, False)
    share = share_out(problem)
    if share is None:
        return [], 0, False
    filled, bound = _by_tables(problem, share), share.bound_ns
    if filled is None:
        # Memory that the devices share is not there for all of them.
        in_time = clock.limit_s is None or clock.left_s(LONGEST_RENTED_S) >= LONGEST_RENTED_S
        rented, proposals = with_rent(problem) if in_time else (0, [])
        bound = max(bound, rented)
        found = [counts for proposal in proposals if (counts := _by_tables(problem, proposal)) is not None]
        filled = min(found, key=lambda counts: counts.objective, default=None)
        if filled is not None and filled.objective - bound <= RENTED_ABOVE * bound and not _is_small(problem):
            return [filled], bound, True
        filled = filled or counting.solve(problem, clock, layers=share.layers)
    gap = 1.0 if filled is None else (filled.objective - bound) / max(filled.objective, 1)
    few = len(problem.hardware.devices) <= FEW_DEVICES
    if filled is not None and gap <= (0 if few else counting.NEAR):
        return [filled], bound, False
    searches = counting.SEARCHES[:2] if gap <= counting.NEAR else None
    counts = counting.solve(problem, clock, hint=filled, searches=searches)
    if counts is None:
        return [], 0, False
    return [counts, *([] if filled is None else [filled])], max(bound, counts.bound), False


def _is_small(problem: Problem) -> bool:
    """Tell whether whatever is left unproven is searched for."""
    return len(problem.graph.layers) * len(problem.hardware.devices) <= FEW_NAMED


def _searched(problem: Problem, clock: counting.Clock) -> tuple[list[counting.Counts], int]:
    """Return counts and a lower bound where layers are named: an annealed answer, what CP-SAT makes of it, and beside
    both the bound of a relaxation.
    """
    # What solves it takes time to load, and chains do without.
    from planner.placement import relaxation

    size = len(problem.units) * len(problem.hardware.devices)
    is_bounded = size > FEW_RELAXED and not problem.rules.contiguous and relaxation.applies(problem)
    beside = relaxation.Search(problem, clock) if is_bounded else None
    if beside is not None:
        beside.start(relaxation.FIRST)
    found = []
    layers = annealing.share_out(problem, clock)
    if beside is not None:
        # Only now, since annealing has a processor to itself.
        beside.start(relaxation.SECOND)
    with contextlib.suppress(NoSolutionInTimeError):
        # The user's time is for the search: to fill in an answer takes little, and there is none without.
        first = counting.solve(problem, counting.Clock(), layers=layers, searches=counting.FILLING_SEARCHES)
        found += [first] if first is not None else []
    bound = 0
    try:
        # Chains are searched after this, and need most of the time: here, it is for their bound. Of many layers little
        # more is found, and the relaxation needs the time.
        is_short = problem.rules.contiguous or (beside is not None and size > MOST_SEARCHED)
        searches = counting.BOUND_SEARCHES if is_short else None
        counts = counting.solve(problem, clock, hint=found[0] if found else None, searches=searches)
        if counts is not None:
            found.append(counts)
            bound = counts.bound
    except NoSolutionInTimeError:
        if not found:
            raise
    if beside is not None and not any(counts.is_optimal for counts in found[1:]):
        bound = max(bound, beside.bound_ns())
    return found, bound


def _by_tables(problem: Problem, share: Share) -> counting.Counts | None:
    """Return what the tables chose, where they chose exactly and the memory that they took to be there is."""
    if share.away is None:
        return None
    stored = {
        (unit.name, name, key, option.dtype): share.layers.get((unit.name, name), 0)
        for unit in problem.units
        for name, costs in unit.on.items()
        for key, options in costs.options.items()
        for option in options
    }
    counts = counting.Counts(
        is_optimal=True,
        objective=share.bound_ns,
        bound=share.bound_ns,
        layers=share.layers,
        stored=stored,
        away=share.away,
        at=share.at,
        single=share.single,
    )
    graph, hardware = problem.graph, problem.hardware
    placements, slots = realise(problem, counts)
    planned = memory.planned_bytes(graph, hardware, placements, slots)
    if any(planned[pool.name].total > pool.usable_bytes for pool in hardware.pools):
        return None
    limit = hardware.pinned_limit_bytes
    pinned = memory.pinned_bytes(graph, hardware, placements, slots)
    if limit is not None and any(nbytes > limit for nbytes in pinned.values()):
        return None
    cost_ns = cost.objective_ns(graph, hardware, problem.workload, placements, slots)
    return replace(counts, objective=max(cost_ns, share.bound_ns))


def _score(problem: Problem, placements: tuple[Placement, ...], slots: tuple[Slots, ...]) -> int:
    """Return what the objective makes least: ns, or bytes of memory."""
    graph, hardware = problem.graph, problem.hardware
    if problem.workload.objective != "fit":
        return cost.objective_ns(graph, hardware, problem.workload, placements, slots)
    planned = memory.planned_bytes(graph, hardware, placements, slots)
    return sum(usage.total for name, usage in planned.items() if name != hardware.disk(name))


def _gathered(
    problem: Problem, placements: tuple[Placement, ...], slots: tuple[Slots, ...]
) -> tuple[tuple[Placement, ...], tuple[Slots, ...]] | None:
    """Return the placement with alike devices exchanged between nodes, so that the walk stays in a node while it can;
    None where memory that was there is not.
    """
    graph, hardware = problem.graph, problem.hardware
    run_on = {placement.layer: placement.run_on for placement in placements}
    met = list(dict.fromkeys(run_on[layer.name] for layer in graph.layers))
    free = {device.name for device in hardware.devices}
    names: dict[str, str] = {}
    node = hardware.node(met[0])
    for position, name in enumerate(met):
        alike = [other for other in free if problem.alike[other] == problem.alike[name]]
        inside = [other for other in alike if hardware.node(other) == node]
        if not inside:
            # On to the node that can take most of what is still to come.
            wanted = [problem.alike[later] for later in met[position:]]
            room = {
                other: sum(
                    problem.alike[each] in wanted for each in free if hardware.node(each) == hardware.node(other)
                )
                for other in alike
            }
            inside = [max(sorted(alike), key=room.__getitem__)]
        names[name] = min(inside)
        node = hardware.node(names[name])
        free.discard(names[name])
    moved = []
    for placement in placements:
        device = names[placement.run_on]
        home = {
            placement.run_on: device,
            hardware.host(placement.run_on): hardware.host(device),
            hardware.disk(placement.run_on): hardware.disk(device),
        }[placement.home]
        moved.append(replace(placement, run_on=device, home=home))
    entry = tuple(moved), tuple(replace(slot, device=names[slot.device]) for slot in slots)
    planned = memory.planned_bytes(graph, hardware, *entry)
    pinned = memory.pinned_bytes(graph, hardware, *entry)
    limit = hardware.pinned_limit_bytes
    fits = all(planned[pool.name].total <= pool.usable_bytes for pool in hardware.pools)
    return entry if fits and (limit is None or max(pinned.values()) <= limit) else None


def _chains(
    problem: Problem, counts: counting.Counts, clock: counting.Clock
) -> Iterator[tuple[tuple[Placement, ...], tuple[Slots, ...]]]:
    names = [device.name for device in problem.hardware.devices]
    orders = [names, names[-1:] + names[:-1]]
    cheapest = chain_order(problem, counts)
    orders += [cheapest] if sorted(cheapest) == sorted(names) and cheapest not in orders else []
    for order in orders:
        found = None
        with contextlib.suppress(NoSolutionInTimeError):
            found = counting.solve(problem, clock, order=order, searches=counting.SEARCHES[:2])
        if found is not None:
            yield realise(problem, found, order=order)


def is_contiguous(graph: LayerGraph, placements: Sequence[Placement]) -> bool:
    """Tell whether every device runs one stretch of the layers' order."""
    run_on = {placement.layer: placement.run_on for placement in placements}
    walk = [name for name, _ in itertools.groupby(run_on[layer.name] for layer in graph.layers)]
    return len(walk) == len(set(walk))


def _infeasible(problems: Sequence[Problem], clock: counting.Clock) -> InfeasibleError:
    """Return the error that names the memory whose growth alone would help most cheaply, and by how much.

    problems: one for each set of devices that everything might have run on.
    """
    problem = problems[0]
    short: dict[str, counting.Shortfall | None] = {}
    for each in problems:
        for name, entry in _shortfalls(each, clock).items():
            before = short.get(name)
            if entry is not None and (before is None or entry.missing_bytes < before.missing_bytes):
                short[name] = entry
    found = list(short.values())
    known = [entry for entry in found if entry is not None]
    if not known:
        total = sum(pool.usable_bytes for pool in problem.hardware.pools)
        need = problem.graph.weight_bytes
        return InfeasibleError(
            device="cpu",
            needed_bytes=need,
            available_bytes=total,
            smallest_fix="add memory to more than one device, or shorten the prompt",
            message=f"the model ({format_bytes(need)} of weights) fits nowhere, and more of any one memory alone does "
            "not help: add memory to more than one device, or shorten the prompt",
        )
    known.sort(key=lambda entry: (entry.missing_bytes, entry.pool))
    best = known[0]
    pool = problem.hardware.pool(best.pool)
    needed = pool.capacity_bytes + best.missing_bytes
    return InfeasibleError(
        device=best.pool,
        needed_bytes=needed,
        available_bytes=pool.capacity_bytes,
        smallest_fix=_addition(best),
        shortfalls={name: entry.missing_bytes for name, entry in short.items() if entry is not None},
        message=f"nothing fits: {best.pool} has {format_bytes(pool.capacity_bytes)} and would need "
        f"{format_bytes(needed)}: {_addition(best)} would do" + _stored_otherwise(problem),
    )


def _shortfalls(problem: Problem, clock: counting.Clock) -> dict[str, counting.Shortfall | None]:
    """Return what every memory lacks if only it may grow, alike ones asked once."""
    found: dict[str, counting.Shortfall | None] = {}
    known: dict[object, counting.Shortfall | None] = {}
    for pool in problem.hardware.pools:
        key = (problem.hardware.node(pool.name), problem.alike.get(pool.name, pool.name))
        if key not in known:
            known[key] = counting.shortfall(problem, pool.name, clock)
        entry = known[key]
        found[pool.name] = entry and replace(entry, pool=pool.name)
    return found


def _stored_otherwise(problem: Problem) -> str:
    """Return the hint that weights which are converted cannot be used from the disk, where there are such."""
    stored = {
        tensor.stored.dtype
        for kind in problem.graph.kinds
        for group in kind.groups
        if not group.is_mappable
        for tensor in group.tensors
        if tensor.stored is not None and tensor.is_converted
    }
    if not stored & {"bfloat16", "float16", "float32"}:
        return ""
    return f"; or the dtype that the weights are stored in ({', '.join(sorted(stored))}), so that some can stay on disk"


def _addition(entry: counting.Shortfall) -> str:
    """Return in words what to give more of, rounded up so that doing as told is enough."""
    size = _rounded_up(entry.missing_bytes)
    if entry.pool == "cpu":
        return f"{size} more host memory (--ram)"
    if entry.pool == "disk":
        return f"{size} more disk (--disk)"
    return f"{size} more on {entry.pool} (a larger GPU, or its --max-memory if that is set)"


def _rounded_up(nbytes: int) -> str:
    for unit, name in ((GB, "GB"), (MB, "MB")):
        if nbytes >= unit:
            return f"{-(-nbytes * 100 // unit) / 100:.2f} {name}"
    return f"{nbytes} bytes"

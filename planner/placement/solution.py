"""Finds the best placement and says what is proven of it."""

from __future__ import annotations

from planner import cost, memory
from planner.errors import InfeasibleError
from planner.graph import LayerGraph
from planner.hardware import Hardware
from planner.placement import counts as counting
from planner.placement.problem import Problem, build
from planner.placement.realise import realise
from planner.plan import Placement, Slots, Solver
from planner.rules import NO_RULES, Rules
from planner.units import GB, MB, format_bytes
from planner.workload import Workload


def find(
    graph: LayerGraph, hardware: Hardware, workload: Workload, rules: Rules = NO_RULES
) -> tuple[tuple[Placement, ...], tuple[Slots, ...], Solver]:
    """Return the placement of least cost with its slots, and its proof.

    The count model ignores the order of layers, so its bound holds for every placement, contiguous or not. Where
    blocks are of several classes its counts may need more hops than it counted: then chains that visit the devices
    in two natural orders are searched as well, and what is left between the best of them and the bound is the gap.

    Raises:
        InfeasibleError: nothing fits. NoSolutionInTimeError: cut off before anything was found.
    """
    problem = build(graph, hardware, workload)
    counts = counting.solve(problem)
    if counts is None:
        raise _infeasible(problem)
    candidates = [realise(problem, counts)]
    best = min(cost.objective_ns(graph, hardware, workload, entry) for entry in candidates)
    if best > counts.bound_ns and len(problem.blocks) > 1:
        names = [device.name for device in hardware.devices]
        for order in (names, names[-1:] + names[:-1]):
            found = counting.solve(problem, order=order)
            if found is not None:
                candidates.append(realise(problem, found, order=order))
    scored = sorted((cost.objective_ns(graph, hardware, workload, entry), i) for i, entry in enumerate(candidates))
    objective, index = scored[0]
    placements = candidates[index]
    slots = memory.needed_slots(graph, hardware, placements)
    solver = Solver(
        status="optimal" if objective <= counts.bound_ns else "feasible",
        objective_ns=objective,
        bound_ns=min(counts.bound_ns, objective),
        cost_model=cost.COST_MODEL,
    )
    return placements, slots, solver


def _infeasible(problem: Problem) -> InfeasibleError:
    """Return the error that names the memory whose growth alone would help most cheaply, and by how much."""
    found = [counting.shortfall(problem, pool.name) for pool in problem.hardware.pools]
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
    fix = "any one of these would do: " + "; ".join(_addition(entry) for entry in known)
    return InfeasibleError(
        device=best.pool,
        needed_bytes=needed,
        available_bytes=pool.capacity_bytes,
        smallest_fix=_addition(best),
        message=f"nothing fits: {best.pool} has {format_bytes(pool.capacity_bytes)} and would need "
        f"{format_bytes(needed)}; {fix}; or a shorter prompt, or a smaller batch" + _stored_otherwise(problem),
    )


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

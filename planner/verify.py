"""Checks any Plan against its constraints, with no solver."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from planner import loading, memory
from planner.errors import PlanFormatError
from planner.host_cache import host_layers
from planner.plan import Placement, Plan
from planner.precision import losses, stored_as
from planner.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One constraint that a plan breaks, in words."""

    rule: str
    message: str


def verify_plan(plan: Plan) -> tuple[Violation, ...]:
    """Return every constraint that the plan breaks; empty when it holds.

    Checked: the graph's parts agree, rankings of experts among them; every group of every layer is placed once, on
    devices and homes that exist and can be reached; a layer runs on one device; groups that must not wait elsewhere do
    not; the user's rules and the quality budget are kept; slots are large enough; no memory holds more than its usable
    capacity; the prediction's peaks, those of loading too, are the placement's.
    """
    try:
        plan.graph.check()
    except PlanFormatError as error:
        return (Violation(rule="graph", message=str(error)),)
    found = _check_placements(plan)
    if found:
        return tuple(found)
    return tuple(_check_rules(plan) + _check_slots(plan) + _check_memory(plan) + _check_prediction(plan))


def _check_placements(plan: Plan) -> list[Violation]:
    found: list[Violation] = []
    devices = {device.name for device in plan.hardware.devices}
    places = devices | {pool.name for pool in plan.hardware.pools}
    expected = {
        (layer.name, group.name): group for layer in plan.graph.layers for group in plan.graph.kinds[layer.kind].groups
    }
    seen: set[tuple[str, str]] = set()
    run_on: dict[str, str] = {}
    for entry in plan.placements:
        key = (entry.layer, entry.group)
        where = f"{entry.layer} {entry.group}"
        group = expected.get(key)
        if group is None or key in seen:
            found.append(Violation(rule="placed once", message=f"{where} is placed twice or is not in the graph"))
            continue
        seen.add(key)
        if entry.run_on not in devices or entry.home not in places:
            found.append(Violation(rule="places", message=f"{where}: {entry.run_on} or {entry.home} does not exist"))
            continue
        if run_on.setdefault(entry.layer, entry.run_on) != entry.run_on:
            found.append(Violation(rule="no_split", message=f"{entry.layer} runs on two devices"))
        host, disk = plan.hardware.host(entry.run_on), plan.hardware.disk(entry.run_on)
        if entry.home not in (entry.run_on, host, disk):
            found.append(
                Violation(rule="homes", message=f"{where} waits on {entry.home}, which nothing is copied from")
            )
        if entry.home != entry.run_on and not group.streamable and entry.run_on != host:
            found.append(Violation(rule="homes", message=f"{where} must wait where it runs, on {entry.run_on}"))
        kept = entry.resident_slices
        if (kept is None) != (group.slices == 1) or (kept is not None and not 0 <= kept <= group.slices):
            found.append(Violation(rule="slices", message=f"{where}: {kept} of {group.slices} slices stay"))
        if entry.home == entry.run_on and kept not in (None, group.slices):
            found.append(Violation(rule="slices", message=f"{where} waits nowhere, yet only {kept} slices stay"))
        nbytes = stored_as(group, entry.dtype).nbytes
        if entry.nbytes != nbytes:
            found.append(Violation(rule="sizes", message=f"{where} has {nbytes} bytes, not {entry.nbytes}"))
        found += _check_memory_kind(plan, entry, where)
    missing = [f"{layer} {group}" for layer, group in expected if (layer, group) not in seen]
    if missing:
        found.append(Violation(rule="placed once", message=f"{missing[0]} is not placed ({len(missing)} in all)"))
    return found


def _check_slots(plan: Plan) -> list[Violation]:
    found = []
    # One slot for whole groups is enough to run: what a second one is worth is the planner's business.
    single = [device.name for device in plan.hardware.devices]
    for needed in memory.needed_slots(plan.graph, plan.hardware, plan.placements, single=single):
        have = plan.slots_on(needed.device, needed.holds)
        if have is None or have.slot_bytes < needed.slot_bytes or have.count < needed.count:
            found.append(
                Violation(
                    rule="slots",
                    message=f"{needed.device} needs {needed.count} slots of {format_bytes(needed.slot_bytes)}",
                )
            )
    return found


def _check_memory(plan: Plan) -> list[Violation]:
    found = []
    planned = memory.planned_bytes(plan.graph, plan.hardware, plan.placements, plan.slots)
    for pool in plan.hardware.pools:
        total = planned[pool.name].total
        if total > pool.usable_bytes:
            found.append(
                Violation(
                    rule="capacity",
                    message=f"{pool.name} would hold {format_bytes(total)} and has {format_bytes(pool.usable_bytes)}, "
                    f"{format_bytes(total - pool.usable_bytes)} too much",
                )
            )
    limit = plan.hardware.pinned_limit_bytes
    for name, pinned in memory.pinned_bytes(plan.graph, plan.hardware, plan.placements, plan.slots).items():
        if limit is not None and pinned > limit:
            message = f"{format_bytes(pinned)} of {name}'s memory would be pinned, and {format_bytes(limit)} may be"
            found.append(Violation(rule="capacity", message=message))
    return found


def _check_memory_kind(plan: Plan, entry: Placement, where: str) -> Iterator[Violation]:
    """Yield what is wrong with the kind of memory that is said of a home, and with experts computed there."""
    hardware = plan.hardware
    host, disk = hardware.host(entry.run_on), hardware.disk(entry.run_on)
    if entry.home == entry.run_on:
        fits: tuple[str, ...] = ("pageable",) if entry.home == host else ("device",)
    else:
        fits = ("disk",) if entry.home == disk else ("pinned", "pageable")
    if entry.memory not in fits:
        yield Violation(rule="homes", message=f"{where} on {entry.home} is called {entry.memory}")
    if entry.cpu_up_to_tokens and (entry.resident_slices is None or entry.home != host or entry.run_on == host):
        yield Violation(rule="homes", message=f"{where} cannot be computed by the CPU where it waits: {entry.home}")


def _check_rules(plan: Plan) -> list[Violation]:
    """Return what the user's rules and the graph's edges forbid."""
    rules, hardware, graph = plan.rules, plan.hardware, plan.graph
    run_on = {entry.layer: entry.run_on for entry in plan.placements}
    found = []
    for name, device in run_on.items():
        pinned = rules.pinned_to(name)
        if pinned is not None and device != pinned:
            found.append(Violation(rule="pins", message=f"{name} is pinned to {pinned}, and runs on {device}"))
    if rules.never_on_disk:
        found += [
            Violation(rule="never on disk", message=f"{entry.layer} {entry.group} waits there")
            for entry in plan.placements
            if entry.home == hardware.disk(entry.run_on)
        ]
    if rules.never_across_nodes and len({hardware.node(device) for device in run_on.values()}) > 1:
        found.append(Violation(rule="never across nodes", message="layers run in more than one node"))
    if rules.contiguous:
        walk = [device for device, _ in itertools.groupby(run_on[layer.name] for layer in graph.layers)]
        if len(walk) != len(set(walk)):
            found.append(Violation(rule="contiguous", message=f"devices follow each other as {' → '.join(walk)}"))
    for index in sorted(host_layers(graph)):
        name = graph.layers[index].name
        if hardware.device(run_on[name]).kind == "cpu":
            message = f"{name} runs on {run_on[name]}, and its keys and values come from host memory to a GPU"
            found.append(Violation(rule="offloaded cache", message=message))
    for edge in graph.edges:
        one, other = graph.layers[edge.source].name, graph.layers[edge.target].name
        if not edge.may_cut and run_on[one] != run_on[other]:
            found.append(Violation(rule="edges", message=f"{one} and {other} may not run on different devices"))
    return found + _check_precisions(plan)


def _check_precisions(plan: Plan) -> list[Violation]:
    found, lost = [], 0.0
    kinds = {layer.name: layer.kind for layer in plan.graph.layers}
    tables = {dtype: losses(plan.graph, dtype, plan.rules.sensitivity) for dtype in plan.rules.dtypes}
    for entry in plan.placements:
        if entry.dtype is None:
            continue
        loss = tables.get(entry.dtype, {}).get((kinds[entry.layer], entry.group))
        if loss is None:
            message = f"{entry.layer} {entry.group} may not be stored as {entry.dtype}"
            found.append(Violation(rule="precision", message=message))
        lost += loss or 0.0
    if lost > plan.rules.quality_budget * (1 + 1e-9):
        message = f"precisions lose {lost:.6g}, and the budget is {plan.rules.quality_budget:.6g}"
        found.append(Violation(rule="precision", message=message))
    return found


def _check_prediction(plan: Plan) -> list[Violation]:
    if plan.prediction is None:
        return []
    peaks = memory.peak(plan.graph, plan.hardware, plan.placements, plan.slots)
    totals = {name: usage.total for name, usage in peaks.items()}
    compared = (
        ("peak", plan.prediction.peak_bytes, totals),
        ("peak while loading", plan.prediction.load_peak_bytes, loading.load_peak_bytes(plan)),
    )
    return [
        Violation(
            rule="prediction", message=f"{name}: predicted {what} {stated.get(name)}, recomputed {found.get(name)}"
        )
        for what, stated, found in compared
        for name in sorted({*stated, *found})
        if stated.get(name) != found.get(name)
    ]

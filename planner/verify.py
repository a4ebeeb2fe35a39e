"""Checks any Plan against its constraints, with no solver."""

from __future__ import annotations

from dataclasses import dataclass

from planner import loading, memory
from planner.plan import Plan
from planner.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One constraint that a plan breaks, in words."""

    rule: str
    message: str


def verify_plan(plan: Plan) -> tuple[Violation, ...]:
    """Return every constraint that the plan breaks; empty when it holds.

    Checked: every group of every layer is placed once, on devices and homes that exist and can be reached; a layer
    runs on one device; groups that must not wait elsewhere do not; slots are large enough and no fewer than the rule;
    no memory holds more than its usable capacity; the prediction's peaks, those of loading too, are the placement's.
    """
    found = _check_placements(plan)
    if found:
        return tuple(found)
    return tuple(_check_slots(plan) + _check_memory(plan) + _check_prediction(plan))


def _check_placements(plan: Plan) -> list[Violation]:
    found: list[Violation] = []
    devices = {device.name for device in plan.hardware.devices}
    places = devices | {"disk"}
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
        if entry.home not in (entry.run_on, "cpu", "disk"):
            found.append(
                Violation(rule="homes", message=f"{where} waits on {entry.home}, which nothing is copied from")
            )
        if entry.home != entry.run_on and not group.streamable and entry.run_on != "cpu":
            found.append(Violation(rule="homes", message=f"{where} must wait where it runs, on {entry.run_on}"))
        kept = entry.resident_slices
        if (kept is None) != (group.slices == 1) or (kept is not None and not 0 <= kept <= group.slices):
            found.append(Violation(rule="slices", message=f"{where}: {kept} of {group.slices} slices stay"))
        if entry.home == entry.run_on and kept not in (None, group.slices):
            found.append(Violation(rule="slices", message=f"{where} waits nowhere, yet only {kept} slices stay"))
        if entry.nbytes != group.nbytes:
            found.append(Violation(rule="sizes", message=f"{where} has {group.nbytes} bytes, not {entry.nbytes}"))
    missing = [f"{layer} {group}" for layer, group in expected if (layer, group) not in seen]
    if missing:
        found.append(Violation(rule="placed once", message=f"{missing[0]} is not placed ({len(missing)} in all)"))
    return found


def _check_slots(plan: Plan) -> list[Violation]:
    found = []
    for needed in memory.needed_slots(plan.graph, plan.hardware, plan.placements):
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
    pinned = memory.pinned_bytes(plan.graph, plan.hardware, plan.placements, plan.slots)
    if limit is not None and pinned > limit:
        message = f"{format_bytes(pinned)} of host memory would be pinned, and {format_bytes(limit)} may be"
        found.append(Violation(rule="capacity", message=message))
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

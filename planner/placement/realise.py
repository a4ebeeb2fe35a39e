"""Counts → placements: which layer runs where, and which slices of it wait elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from planner.hardware import Hardware
from planner.placement.counts import Counts
from planner.placement.problem import Problem, Unit, likeness
from planner.plan import Placement


def realise(problem: Problem, counts: Counts, *, order: Sequence[str] | None = None) -> tuple[Placement, ...]:
    """Return one placement per layer and group, in order of layers.

    Devices follow each other along the chain: first the front's, last the tail's, others in between as in `order`
    (the machine's, unless given). Layers whose weights wait elsewhere are spread evenly among the rest.
    """
    hardware = problem.hardware
    order = list(order) if order is not None else _chain_order(hardware, counts)
    run_on = _run_on(problem, counts, order)
    homes: dict[tuple[int, str], tuple[str, int]] = {}
    for unit in problem.blocks:
        for name in order:
            members = [index for index in unit.layers if run_on[index] == name]
            assert len(members) == counts.layers[unit.name, name]
            _spread_block(unit, name, members, counts, homes)
    for end in (problem.front, problem.tail):
        if end is not None:
            _end_homes(end, counts, homes)
    names = _alike_in_order(hardware, run_on)
    placements = []
    for index, layer in enumerate(problem.graph.layers):
        device = names[run_on[index]]
        for group in problem.graph.kind_of(index).groups:
            home, waiting = homes.get((index, group.name), (device, 0))
            if waiting == 0:
                home = device
            placements.append(
                Placement(
                    layer=layer.name,
                    group=group.name,
                    home=home,
                    memory=_memory(home, device),
                    run_on=device,
                    nbytes=group.nbytes,
                    resident_slices=group.slices - waiting if group.slices > 1 else None,
                )
            )
    return tuple(placements)


def _chain_order(hardware: Hardware, counts: Counts) -> list[str]:
    names = [device.name for device in hardware.devices]
    front, tail = counts.ends.get("front"), counts.ends.get("tail")
    middle = [name for name in names if name not in (front, tail)]
    first = [front] if front is not None else []
    last = [tail] if tail is not None and tail != front else []
    return first + middle + last


def _run_on(problem: Problem, counts: Counts, order: Sequence[str]) -> list[str]:
    run_on = [""] * len(problem.graph.layers)
    for end in (problem.front, problem.tail):
        if end is not None:
            for index in end.layers:
                run_on[index] = counts.ends[end.name]
    left = {key: value for key, value in counts.layers.items() if value}
    unit_of = {index: unit.name for unit in problem.blocks for index in unit.layers}
    position = 0
    for index in sorted(unit_of):
        unit = unit_of[index]
        # Stay on the current device while it still takes layers of this class.
        while not left.get((unit, order[position % len(order)])):
            position += 1
        name = order[position % len(order)]
        run_on[index] = name
        left[unit, name] -= 1
    return run_on


def spread(total: int, places: int) -> list[int]:
    """Return `total` things over `places`, as evenly as they go: each place gets the floor or the ceiling."""
    return [(position + 1) * total // places - position * total // places for position in range(places)]


def _spread_block(
    unit: Unit, name: str, members: list[int], counts: Counts, homes: dict[tuple[int, str], tuple[str, int]]
) -> None:
    for entry in unit.on[name].groups:
        group = entry.group
        on_disk = counts.on_disk.get((unit.name, name, entry.key), 0)
        chosen = [bool(mark) for mark in spread(on_disk, len(members))] if members else []
        for home in ("cpu", "disk"):
            slices = counts.away.get((unit.name, name, entry.key, home), 0)
            here = [index for index, disk in zip(members, chosen, strict=True) if disk == (home == "disk")]
            if not slices:
                continue
            for index, waiting in zip(here, spread(slices, len(here)), strict=True):
                if waiting:
                    homes[index, group.name] = (home, waiting)


def _end_homes(end: Unit, counts: Counts, homes: dict[tuple[int, str], tuple[str, int]]) -> None:
    device = counts.ends[end.name]
    for entry in end.on[device].groups:
        if counts.away.get((end.name, device, entry.key, "disk")):
            homes[entry.layer, entry.group.name] = ("disk", entry.group.slices)


def _alike_in_order(hardware: Hardware, run_on: Sequence[str]) -> dict[str, str]:
    """Return new names for devices, so that alike ones are first met in the order of their names."""
    met = list(dict.fromkeys(run_on))
    met += [device.name for device in hardware.devices if device.name not in met]
    sets: dict[object, list[str]] = {}
    for device in hardware.devices:
        sets.setdefault(likeness(hardware, device), []).append(device.name)
    names: dict[str, str] = {}
    for alike in sets.values():
        names.update(zip(sorted(alike, key=met.index), alike, strict=True))
    return names


def _memory(home: str, run_on: str) -> Literal["device", "pinned", "pageable", "disk"]:
    if home == "disk":
        return "disk"
    if home != "cpu":
        return "device"
    return "pageable" if run_on == "cpu" else "pinned"

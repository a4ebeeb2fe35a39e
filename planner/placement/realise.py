"""Counts → placements: which layer runs where, and which slices of it wait elsewhere."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from planner import memory
from planner.hardware import Hardware
from planner.placement.counts import Counts, Stored
from planner.placement.problem import Home, Option, Problem, Unit
from planner.plan import Placement, Slots

# The best order of so many devices is found by going through all of them; of more, each is followed by the nearest.
_MOST_ORDERED = 9


@dataclass(slots=True)
class _Kept:
    """How a group of one layer is kept: its precision, and the slices that wait in a home."""

    option: Option
    home: Home | None = None
    waiting: int = 0


def realise(
    problem: Problem, counts: Counts, *, order: Sequence[str] | None = None
) -> tuple[tuple[Placement, ...], tuple[Slots, ...]]:
    """Return one placement per layer and group, in order of layers, and the slots that they need.

    Devices follow each other along the chain: first the front's, last the tail's, others in between as in `order`
    (the cheapest one, unless given). Layers whose weights wait elsewhere are spread evenly among the rest.
    """
    hardware = problem.hardware
    order = list(order) if order is not None else chain_order(problem, counts)
    run_on = _run_on(problem, counts, order)
    kept: dict[tuple[int, str], _Kept] = {}
    for unit in problem.units:
        for name, costs in unit.on.items():
            if unit.is_whole:
                members = list(unit.layers[:1]) if counts.layers.get((unit.name, name)) else []
            else:
                members = [index for index in unit.layers if run_on[index] == name]
            assert len(members) == counts.layers.get((unit.name, name), 0)
            for key, options in costs.options.items():
                keys = [(unit.name, name, key, option.dtype) for option in options]
                _spread(unit, members, list(zip(keys, options, strict=True)), counts, kept)
    for used in dict.fromkeys(run_on):
        _space_out(problem, run_on, used, kept)
    names = _alike_in_order(problem, run_on)
    placements = []
    for index, layer in enumerate(problem.graph.layers):
        device = names[run_on[index]]
        for group in problem.graph.kind_of(index).groups:
            found = kept.get((index, group.name))
            home = found.home if found is not None and found.waiting else None
            stored = found.option.group if found is not None else group
            placements.append(
                Placement(
                    layer=layer.name,
                    group=group.name,
                    home=device if home is None else home.place,
                    memory=_own_memory(hardware, device) if home is None else home.memory,
                    run_on=device,
                    nbytes=stored.nbytes,
                    resident_slices=group.slices - (found.waiting if found else 0) if group.slices > 1 else None,
                    cpu_up_to_tokens=0 if home is None else home.cpu_up_to_tokens,
                    dtype=None if found is None else found.option.dtype,  # type: ignore[arg-type]
                )
            )
    single = {names[name] for name in counts.single}
    return tuple(placements), memory.needed_slots(problem.graph, hardware, placements, single=single)


def _own_memory(hardware: Hardware, device: str) -> Literal["device", "pageable"]:
    return "pageable" if hardware.device(device).kind == "cpu" else "device"


def chain_order(problem: Problem, counts: Counts) -> list[str]:
    """Return the devices in the order in which a chain visits them most cheaply."""
    hardware = problem.hardware
    names = [device.name for device in hardware.devices]
    front, tail = (
        next((name for (unit, name), here in counts.layers.items() if unit == end and here), None)
        for end in ("front", "tail")
    )
    with_blocks = {name for (unit, name), here in counts.layers.items() if here and unit not in ("front", "tail")}
    # A front's device that has blocks as well begins with them, and a tail's ends.
    middle = [name for name in names if name in with_blocks and name not in (front, tail)]
    first = [front] if front is not None else []
    last = [tail] if tail is not None and tail != front else []
    nbytes = max((edge.decode_bytes for edge in problem.graph.edges if edge.target == edge.source + 1), default=0)

    def price(one: str, other: str) -> int:
        link = hardware.link(one, other)
        return link.latency_ns + nbytes * 10**9 // link.bytes_per_s

    return first + _shortest(middle, front, tail, price) + last + [name for name in names if name not in with_blocks]


def _shortest(middle: list[str], start: str | None, end: str | None, price: Callable[[str, str], int]) -> list[str]:
    """Return `middle` in the order in which going from `start` through all of it to `end` costs least."""
    if len(middle) > _MOST_ORDERED:
        order: list[str] = []
        left, at = list(middle), start
        while left:
            nearest = left[0] if at is None else min(left, key=functools.partial(price, at))
            order.append(nearest)
            left.remove(nearest)
            at = nearest
        return order
    # Held and Karp's dynamic programme: the cheapest way through each set of devices to each of its members.
    best: dict[tuple[frozenset[str], str], tuple[int, tuple[str, ...]]] = {
        (frozenset((name,)), name): (0 if start is None else price(start, name), (name,)) for name in middle
    }
    for size in range(2, len(middle) + 1):
        for chosen in itertools.combinations(middle, size):
            for name in chosen:
                rest = frozenset(chosen) - {name}
                ways = [(best[rest, of][0] + price(of, name), best[rest, of][1]) for of in chosen if of != name]
                cost, way = min(ways, key=lambda entry: entry[0])
                best[frozenset(chosen), name] = (cost, (*way, name))
    whole = [(cost + (0 if end is None else price(name, end)), way) for (of, name), (cost, way) in best.items()
             if len(of) == len(middle)]  # fmt: skip
    return list(min(whole, key=lambda entry: entry[0])[1]) if whole else []


def _run_on(problem: Problem, counts: Counts, order: Sequence[str]) -> list[str]:
    run_on = [""] * len(problem.graph.layers)
    for unit in problem.units:
        if unit.is_whole:
            name = next(name for name in unit.on if counts.layers.get((unit.name, name)))
            for index in unit.layers:
                run_on[index] = name
    left = {key: value for key, value in counts.layers.items() if value}
    unit_of = {index: unit.name for unit in problem.blocks for index in unit.layers}
    position = 0
    for index in sorted(unit_of):
        unit_name = unit_of[index]
        # Stay on the current device while it still takes layers of this class.
        while not left.get((unit_name, order[position % len(order)])):
            position += 1
        name = order[position % len(order)]
        run_on[index] = name
        left[unit_name, name] -= 1
    return run_on


def spread(total: int, places: int) -> list[int]:
    """Return `total` things over `places`, as evenly as they go: each place gets the floor or the ceiling.

    Those that get one more lie evenly from the first place to the last.
    """
    if places == 0:
        return []
    each, more = divmod(total, places)
    chosen = {(2 * number * (places - 1) + more - 1) // (2 * (more - 1)) for number in range(more)} if more > 1 else {0}
    return [each + (place in chosen and more > 0) for place in range(places)]


def _spread(
    unit: Unit,
    members: list[int],
    options: list[tuple[Stored, Option]],
    counts: Counts,
    kept: dict[tuple[int, str], _Kept],
) -> None:
    """Say how a group is kept in every layer of a unit that runs on one device."""
    left = list(members)
    for number, (key, option) in enumerate(options):
        wanted = counts.stored.get(key, 0)
        if number == len(options) - 1:
            chosen = left
        else:
            marks = spread(wanted, len(left))
            chosen = [index for index, mark in zip(left, marks, strict=True) if mark]
            left = [index for index, mark in zip(left, marks, strict=True) if not mark]
        assert len(chosen) == wanted or not members
        for index in chosen:
            kept[index if not unit.is_whole else option.layer, option.group.name] = _Kept(option)
        _wait(unit, chosen, key, option, counts, kept)


def _wait(
    unit: Unit,
    members: list[int],
    key: Stored,
    option: Option,
    counts: Counts,
    kept: dict[tuple[int, str], _Kept],
) -> None:
    """Let the slices that are away wait in the homes that were counted, spread among the layers."""
    waiting = [(home, counts.away.get((key, home.memory), 0)) for home in option.homes]
    waiting = [(home, slices) for home, slices in waiting if slices]
    free = list(members)
    for number, (home, slices) in enumerate(waiting):
        layers = counts.at.get((key, home.memory), slices if option.group.slices == 1 else len(free))
        if number == len(waiting) - 1 and option.group.slices > 1:
            # The last home has the layers that are left: the more of them, the more even.
            layers = len(free)
        marks = [bool(mark) for mark in spread(layers, len(free))]
        here = [index for index, mark in zip(free, marks, strict=True) if mark]
        free = [index for index, mark in zip(free, marks, strict=True) if not mark]
        for index, count in zip(here, spread(slices, len(here)), strict=True):
            if count:
                kept[index if not unit.is_whole else option.layer, option.group.name] = _Kept(option, home, count)


def _space_out(problem: Problem, run_on: Sequence[str], name: str, kept: dict[tuple[int, str], _Kept]) -> None:
    """Let whole groups that cost the same wait in layers that lie evenly in time, from a device's first to its last.

    Those with a tie are like no others: where they wait decides how often it is stored.
    """
    tied = {member for tie in problem.ties for member in tie.members}
    alike: dict[object, list[tuple[int, str]]] = {}
    for (index, group), found in kept.items():
        is_tied = (problem.unit_of(index).name, found.option.key) in tied
        if run_on[index] == name and found.option.prefetched and not is_tied:
            prices = tuple((home.memory, home.nbytes, *home.lane_ns.values()) for home in found.option.homes)
            alike.setdefault((group, found.option.freed_bytes, prices), []).append((index, group))
    lasts = [_lasts_ns(problem, index, on, kept) for index, on in enumerate(run_on)]
    begins = list(itertools.accumulate(lasts, initial=0))
    for members in alike.values():
        members.sort()
        waiting = [kept[member] for member in members if kept[member].waiting]
        used = {found.home.memory for found in waiting if found.home is not None}
        if len(used) != 1 or len(waiting) == len(members):
            continue
        chosen = _evenly([begins[index] for index, _ in members], len(waiting))
        for number, member in enumerate(members):
            option = kept[member].option
            home = next(home for home in option.homes if home.memory in used)
            kept[member] = _Kept(option, home, 1) if number in chosen else _Kept(option)


def _lasts_ns(problem: Problem, index: int, name: str, kept: dict[tuple[int, str], _Kept]) -> int:
    """Return how long a layer runs in the last kind of step, with what it asks for while it does."""
    step = problem.steps[-1].name
    unit = problem.unit_of(index)
    total = unit.on[name].compute_ns[step] // (len(unit.layers) if unit.is_whole else 1)
    for group in problem.graph.kind_of(index).groups:
        found = kept.get((index, group.name))
        if found is not None and found.home is not None:
            total += found.home.serial_ns(step, found.waiting)
    return total


def _evenly(begins: Sequence[int], count: int) -> set[int]:
    """Return `count` positions whose times lie as evenly as they go between the first and the last."""
    if count == 0:
        return set()
    first, last = begins[0], begins[-1]
    chosen: list[int] = []
    for number in range(count):
        target = first + (last - first) * number // max(count - 1, 1)
        lowest = chosen[-1] + 1 if chosen else 0
        highest = len(begins) - (count - number)
        nearest = bisect.bisect_left(begins, target, lowest, highest + 1)
        if nearest > lowest and (nearest > highest or target - begins[nearest - 1] <= begins[nearest] - target):
            nearest -= 1
        chosen.append(nearest)
    return set(chosen)


def _alike_in_order(problem: Problem, run_on: Sequence[str]) -> dict[str, str]:
    """Return new names for devices, so that interchangeable ones are first met in the order of their names."""
    met = list(dict.fromkeys(run_on))
    met += [device.name for device in problem.hardware.devices if device.name not in met]
    names: dict[str, str] = {}
    for alike in problem.interchangeable():
        names.update(zip(sorted(alike, key=met.index), alike, strict=True))
    return names

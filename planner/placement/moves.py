"""What moves between devices, as terms of the counting model.

A chain is priced by its hops. Devices that are alike in one node are one class, and a walk over the classes is counted:
arcs[A, B] is how often it goes from a device of A to one of B. It visits every device that is used once, and the
front's once more where the tail runs there too. That is what a contiguous placement pays, and no placement pays less:
an arc costs no more than any way between the two classes. What the front hands to every layer is paid by each device.

Where layers are named, each thing that moves is a literal of its own.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from planner.steps import awaited, link_ns

if TYPE_CHECKING:
    from planner.graph import Edge
    from planner.placement.counts import _Model

# With more classes than this their subsets are not all forbidden to be visited in circles apart, only whole nodes.
_MOST_CLASSES = 6


def price(model: _Model, step: str, *, prefill: bool) -> Any:
    """Return the time of what moves in one step, in ns."""
    if model.problem.named:
        return _named(model, prefill=prefill)
    return _hops(model, prefill=prefill) + _broadcast(model, prefill=prefill)


def _hops(model: _Model, *, prefill: bool) -> Any:
    hardware = model.hardware
    classes = _classes(model)
    if len(model.devices) == 1:
        return 0
    arcs = _walk(model, classes)
    nbytes = model.problem.hop_bytes(prefill=prefill)
    if nbytes is None:
        return 0
    direct = {
        (one, other): min(
            hardware.link(a, b).latency_ns + link_ns(hardware.link(a, b), nbytes)
            for a in classes[one]
            for b in classes[other]
            if a != b
        )
        for one, other in arcs
    }
    for between in range(len(classes)):
        for one, other in direct:
            if (one, between) in direct and (between, other) in direct:
                direct[one, other] = min(direct[one, other], direct[one, between] + direct[between, other])
    return sum(direct[pair] * count for pair, count in arcs.items())


def _classes(model: _Model) -> list[list[str]]:
    found: dict[object, list[str]] = {}
    for name in model.devices:
        key = (model.hardware.node(name), model.problem.alike[name])
        found.setdefault(key, []).append(name)
    return list(found.values())


def _walk(model: _Model, classes: list[list[str]]) -> dict[tuple[int, int], Any]:
    """Return arcs between classes, constrained to be a walk as contiguous placements make it."""
    known: dict[tuple[int, int], Any] | None = getattr(model, "_arcs", None)
    if known is not None:
        return known
    cp, count = model.model, len(model.devices)
    arcs = {
        (one, other): cp.new_int_var(0, count + 1, f"arcs {one} {other}")
        for one in range(len(classes))
        for other in range(len(classes))
        if one != other or len(classes[one]) > 1
    }
    several = cp.new_bool_var("several devices")
    cp.add(sum(model.used.values()) <= 1 + count * several)
    front, tail = model.problem.front, model.problem.tail
    starts: list[Any] = []
    stops: list[Any] = []
    visits, entered = [], []
    for number, names in enumerate(classes):
        again = []
        if front is not None and tail is not None:
            for name in names:
                if name in front.on and name in tail.on:
                    back = cp.new_bool_var(f"back to {name}")
                    cp.add_bool_or(back, ~model.layers["front", name], ~model.layers["tail", name], ~several)
                    again.append(back)
        here = [model.used[name] for name in names]
        visits.append(sum(here) + sum(again))
        some = cp.new_bool_var(f"class {number} is used")
        for literal in here:
            cp.add_implication(literal, some)
        cp.add(sum(here) >= some)
        entered.append(some)
        for unit, ends in ((front, starts), (tail, stops)):
            if unit is None:
                ends.append(cp.new_bool_var(f"end {number} {len(ends)}"))
            else:
                ends.append(sum(model.layers[unit.name, name] for name in names if name in unit.on))
    for number in range(len(classes)):
        cp.add(sum(n for (_, to), n in arcs.items() if to == number) + starts[number] == visits[number])
        cp.add(sum(n for (of, _), n in arcs.items() if of == number) + stops[number] == visits[number])
    for ends, unit in ((starts, front), (stops, tail)):
        if unit is None:
            cp.add(sum(ends) == 1)
    for subset in _subsets(model, classes):
        into = sum(n for (of, to), n in arcs.items() if to in subset and of not in subset)
        begins = sum(starts[number] for number in subset)
        for number in subset:
            # [Constraint] no circle apart: a set of classes that is visited is entered, or the walk begins there
            cp.add(into + begins >= entered[number])
    model._arcs = arcs  # type: ignore[attr-defined]
    return arcs


def _subsets(model: _Model, classes: list[list[str]]) -> list[tuple[int, ...]]:
    numbers = range(len(classes))
    if len(classes) <= _MOST_CLASSES:
        sizes = range(1, len(classes))
        return [subset for size in sizes for subset in itertools.combinations(numbers, size)] or [(0,)]
    nodes: dict[str, list[int]] = {}
    for number in numbers:
        nodes.setdefault(model.hardware.node(classes[number][0]), []).append(number)
    return [*((number,) for number in numbers), *(tuple(found) for found in nodes.values() if len(nodes) > 1)]


def _broadcast(model: _Model, *, prefill: bool) -> Any:
    """Return what the front hands over several layers: to every device with blocks, and to the tail's."""
    to_blocks, to_tail = model.problem.broadcasts.values(), model.problem.front_to_tail.values()
    if not (to_blocks or to_tail) or len(model.devices) == 1:
        return 0
    cp, hardware = model.model, model.hardware
    front, tail = model.problem.front, model.problem.tail
    assert front is not None
    which = 0 if prefill else 1
    blocks = _block_literals(model)
    paid: dict[str, Any] = {}
    most = 0
    for origin in front.on:
        terms = []
        for name in model.devices:
            if name == origin:
                continue
            link = hardware.link(origin, name)
            if name in blocks:
                terms.append((sum(link_ns(link, nbytes[which]) for nbytes in to_blocks), blocks[name]))
            if tail is not None and name in tail.on:
                ns = sum(link_ns(link, nbytes[which]) for nbytes in to_tail)
                terms.append((ns, model.layers["tail", name]))
        paid[origin] = sum(ns * literal for ns, literal in terms)
        most = max(most, sum(ns for ns, _ in terms))
    total = cp.new_int_var(0, most, "broadcasts")
    for origin, price in paid.items():
        cp.add(total >= price).only_enforce_if(model.layers["front", origin])
    return total


def _block_literals(model: _Model) -> dict[str, Any]:
    """Return for each device a literal that holds exactly where blocks run there."""
    known: dict[str, Any] | None = getattr(model, "_with_blocks", None)
    if known is not None:
        return known
    found = {}
    for name in model.devices:
        here = [(unit, model.layers[unit.name, name]) for unit in model.problem.blocks if name in unit.on]
        if here:
            found[name] = model.model.new_bool_var(f"blocks on {name}")
            for unit, variable in here:
                model.model.add(variable <= unit.count * found[name])
    model._with_blocks = found  # type: ignore[attr-defined]
    return found


def _named(model: _Model, *, prefill: bool) -> Any:
    """Return the time of every thing that moves, where every layer is a unit of its own."""
    hardware, graph = model.hardware, model.problem.graph
    at = _by_layer(model)
    latest = awaited(graph)
    things: dict[tuple[int, str], list[Edge]] = {}
    for edge in graph.edges:
        things.setdefault((edge.source, edge.tensor), []).append(edge)
    terms: list[Any] = []
    for (source, tensor), edges in things.items():
        for name in model.devices:
            takers = {edge.target: at[edge.target, name] for edge in edges if (edge.target, name) in at}
            links = {
                other: hardware.link(other, name) for other in model.devices if other != name and (source, other) in at
            }
            if not takers or not links:
                continue
            # What is taken, as a price for each device it may come from: its bytes, step by step, and its latency.
            prices: dict[frozenset[int], dict[str, int]] = {}
            nbytes: dict[int, int] = {}
            for edge in edges:
                size = edge.prefill_bytes if prefill else edge.decode_bytes
                nbytes[edge.target] = max(nbytes.get(edge.target, 0), size)
            before = 0
            for size in sorted(set(nbytes.values())):
                these = frozenset(target for target in takers if nbytes[target] >= size)
                for origin, link in links.items():
                    price = prices.setdefault(these, dict.fromkeys(links, 0))
                    price[origin] += link_ns(link, size) - link_ns(link, before)
                before = size
            waiting = frozenset(target for target in takers if latest[target] == (source, tensor))
            for origin, link in links.items():
                price = prices.setdefault(waiting, dict.fromkeys(links, 0))
                price[origin] += link.latency_ns
            for these, price in prices.items():
                if these:
                    key = (source, tensor, name, these)
                    terms += _priced(model, key, [takers[target] for target in sorted(these)], price)
    return sum(terms)


def _priced(model: _Model, key: tuple[Any, ...], takers: list[Any], price: dict[str, int]) -> list[Any]:
    """Return the price of a move: where any taker is on the device and the maker is not, one literal holds, that of the
    links with the price of the maker's.
    """
    source, _, name, _ = key
    at = _by_layer(model)
    kinds: dict[int, list[str]] = {}
    for origin, ns in price.items():
        kinds.setdefault(ns, []).append(origin)
    known: dict[Any, Any] = model.__dict__.setdefault("_moves", {})
    terms = []
    ways = []
    for ns, origins in sorted(kinds.items()):
        # The same literal in every step whose links have the same prices.
        over = (*key, tuple(origins))
        if over not in known:
            known[over] = model.model.new_bool_var(f"moved {over}")
            model.model.add_bool_or(~known[over], *(at[source, origin] for origin in origins))
        ways.append(known[over])
        terms.append(ns * known[over])
    once = (*key, tuple(sorted(tuple(origins) for origins in kinds.values())))
    if once not in known:
        known[once] = True
        local = [at[source, name]] if (source, name) in at else []
        for taker in takers:
            model.model.add_bool_or(~taker, *local, *ways)
    return terms


def _by_layer(model: _Model) -> dict[tuple[int, str], Any]:
    known: dict[tuple[int, str], Any] | None = getattr(model, "_at", None)
    if known is None:
        known = {
            (index, name): model.layers[unit.name, name]
            for unit in model.problem.units
            for name in unit.on
            for index in unit.layers
        }
        model._at = known  # type: ignore[attr-defined]
    return known

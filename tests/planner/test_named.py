"""Graphs that are no chains: enumeration of small ones, bounds that hold, and answers wherever a peer has one."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

import random_graphs
from peers import Task, scores
from planner import cost, memory
from planner.errors import InfeasibleError
from planner.graph import LayerGraph
from planner.hardware import Hardware, Link
from planner.placement import annealing, relaxation
from planner.placement import counts as counting
from planner.placement.problem import build
from planner.placement.solution import _computing_ns, find, is_contiguous
from planner.plan import Placement, Slots
from planner.rules import NO_RULES, Pin, Rules

WORKLOAD = random_graphs.WORKLOAD


def case(seed: int, nodes: int, gpus: int, *, spare: float = 1.0) -> tuple[LayerGraph, Hardware]:
    """Return a graph that may not stream, and a machine with `spare` times the memory for it."""
    graph = random_graphs.random_graph(seed, nodes)
    hardware = random_graphs.random_machine(seed, graph, gpus)
    pools = tuple(
        dataclasses.replace(pool, capacity_bytes=int(pool.capacity_bytes * spare)) if "cuda" in pool.name else pool
        for pool in hardware.pools
    )
    return graph, dataclasses.replace(hardware, pools=pools)


def resident(graph: LayerGraph) -> LayerGraph:
    """Return the graph with nothing that may wait elsewhere."""
    kinds = tuple(
        dataclasses.replace(kind, groups=tuple(dataclasses.replace(group, streamable=False) for group in kind.groups))
        for kind in graph.kinds
    )
    return dataclasses.replace(graph, kinds=kinds)


def placed(graph: LayerGraph, hardware: Hardware, devices: tuple[str, ...]) -> tuple[Placement, ...]:
    """Return every layer where it is said to be, with its weights."""
    return tuple(
        Placement(
            layer=layer.name, group=group.name, home=device, memory="pageable" if device == "cpu" else "device",
            run_on=device, nbytes=group.nbytes, resident_slices=None,
        )
        for layer, device in zip(graph.layers, devices, strict=True)
        for group in graph.kinds[layer.kind].groups
    )  # fmt: skip


def fits(graph: LayerGraph, hardware: Hardware, placements: tuple[Placement, ...], slots: tuple[Slots, ...]) -> bool:
    planned = memory.planned_bytes(graph, hardware, placements, slots)
    return all(planned[pool.name].total <= pool.usable_bytes for pool in hardware.pools)


def enumerated(graph: LayerGraph, hardware: Hardware, rules: Rules = NO_RULES) -> int | None:
    """Return the least cost of any placement that keeps the rules, going through all."""
    names = [device.name for device in hardware.devices]
    best: int | None = None
    for devices in itertools.product(names, repeat=len(graph.layers)):
        if any(
            (pinned := rules.pinned_to(layer.name)) is not None and pinned != device
            for layer, device in zip(graph.layers, devices, strict=True)
        ):
            continue
        if any(not edge.may_cut and devices[edge.source] != devices[edge.target] for edge in graph.edges):
            continue
        placements = placed(graph, hardware, devices)
        if rules.contiguous and not is_contiguous(graph, placements):
            continue
        if fits(graph, hardware, placements, ()):
            ns = cost.objective_ns(graph, hardware, WORKLOAD, placements, ())
            best = ns if best is None else min(best, ns)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_small_graphs_are_placed_as_well_as_enumeration_does(seed: int) -> None:
    graph, hardware = case(seed, 6, 2)
    graph = resident(graph)
    rng = random.Random(seed)
    if seed % 3 == 1:
        edges = [dataclasses.replace(edge, may_cut=rng.random() < 0.7) for edge in graph.edges]
        graph = dataclasses.replace(graph, edges=tuple(edges))
    rules = Rules(pins=(Pin(layers="node2", device="cuda:1"),)) if seed % 3 == 2 else NO_RULES
    best = enumerated(graph, hardware, rules)
    assert best is not None
    _, _, solver = find(graph, hardware, WORKLOAD, rules)
    assert (solver.objective_ns, solver.bound_ns, solver.status) == (best, best, "optimal")


@pytest.mark.parametrize("seed", range(4))
def test_contiguous_graphs_are_placed_as_well_as_enumeration_does(seed: int) -> None:
    graph, hardware = case(seed, 6, 2)
    graph = resident(graph)
    rules = Rules(contiguous=True)
    best = enumerated(graph, hardware, rules)
    placements, _, solver = find(graph, hardware, WORKLOAD, rules)
    assert best is not None
    assert is_contiguous(graph, placements)
    assert solver.bound_ns <= best <= solver.objective_ns


def test_identical_gpus_in_linked_pairs_are_told_apart() -> None:
    # To swap one of a pair with one of another pair is no symmetry, though the four are alike.
    for seed in range(3):
        graph = resident(random_graphs.random_graph(seed, 5))
        hardware = random_graphs.random_machine(seed, graph, 4)
        first = hardware.device("cuda:0")
        largest = max(pool.capacity_bytes for pool in hardware.pools if "cuda" in pool.name)
        devices = tuple(
            dataclasses.replace(first, name=device.name, pool=device.pool) if device.kind == "cuda" else device
            for device in hardware.devices
        )
        pools = tuple(
            dataclasses.replace(pool, capacity_bytes=largest) if "cuda" in pool.name else pool
            for pool in hardware.pools
        )
        links = tuple(_alike(link) for link in hardware.links)
        hardware = dataclasses.replace(hardware, devices=devices, pools=pools, links=links)
        best = enumerated(graph, hardware)
        _, _, solver = find(graph, hardware, WORKLOAD)
        assert (solver.objective_ns, solver.bound_ns) == (best, best)


def _alike(link: Link) -> Link:
    if "cpu" in (link.source, link.target) or "disk" in (link.source, link.target):
        return dataclasses.replace(link, bytes_per_s=3 * 10**9)
    is_pair = int(link.source[-1]) ^ 1 == int(link.target[-1])
    return dataclasses.replace(link, bytes_per_s=10**11 if is_pair else 6 * 10**9, latency_ns=5000)


@pytest.mark.parametrize("seed", range(6))
def test_no_placement_costs_less_than_the_bound(seed: int) -> None:
    graph, hardware = case(seed, 14, 3, spare=0.93)
    problem = build(graph, hardware, WORKLOAD, NO_RULES, named=True)
    found = counting.solve(problem, counting.Clock(), searches=((2, 0.3),))
    assert found is not None
    rng = random.Random(seed)
    names = [device.name for device in hardware.devices]
    met = 0
    for _ in range(300):
        cuts = sorted(rng.sample(range(len(graph.layers) + 1), 3))
        order = rng.sample(names, len(names))
        devices = tuple(order[sum(cut <= index for cut in cuts)] for index in range(len(graph.layers)))
        placements = tuple(
            dataclasses.replace(entry, home="cpu", memory="pinned")
            if entry.run_on != "cpu" and rng.random() < 0.3
            else entry
            for entry in placed(graph, hardware, devices)
        )
        single = rng.sample(names, 1)
        slots = memory.needed_slots(graph, hardware, placements, single=single)
        if fits(graph, hardware, placements, slots):
            met += 1
            assert cost.objective_ns(graph, hardware, WORKLOAD, placements, slots) >= found.bound
    assert met > 10


@pytest.mark.parametrize("seed", range(3))
def test_the_annealed_answer_is_what_it_is_said_to_cost(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annealing, "MOST_MOVES", 20_000)
    graph, hardware = case(seed, 30, 3)
    problem = build(graph, hardware, WORKLOAD, NO_RULES, named=True)
    search = annealing._Search(problem)
    search.start()
    search.anneal(counting.Clock())
    # Kept up by differences, the total is that of the state seen afresh.
    again = annealing._Search(problem)
    again.start()
    again._try([(index, d) for index, d in enumerate(search.at) if again.at[index] != d], 1e30)
    assert again.total == pytest.approx(search.total)
    filled = counting.solve(
        problem, counting.Clock(), layers=annealing.share_out(problem, counting.Clock()),
        searches=counting.FILLING_SEARCHES,
    )  # fmt: skip
    assert filled is not None
    assert filled.objective <= search.least


def test_the_same_graph_is_shared_out_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annealing, "MOST_MOVES", 20_000)
    graph, hardware = case(3, 40, 4)
    problem = build(graph, hardware, WORKLOAD, NO_RULES, named=True)
    first, second = (annealing.share_out(problem, counting.Clock()) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("seed", range(4))
def test_there_is_a_plan_wherever_a_peer_has_one(seed: int) -> None:
    graph, hardware = case(seed, 16, 3, spare=(1.0, 0.9, 0.8, 0.75)[seed])
    task = Task(graph=graph, hardware=hardware, workload=WORKLOAD)
    found = any(score.simulated_ns is not None for score in scores(task).values())
    rules = Rules(time_limit_s=4)
    try:
        placements, slots, solver = find(graph, hardware, WORKLOAD, rules)
    except InfeasibleError:
        assert not found
        return
    assert fits(graph, hardware, placements, slots)
    assert solver.bound_ns <= solver.objective_ns


def best_with_streaming(graph: LayerGraph, hardware: Hardware) -> int | None:
    """Return the least cost of any placement, going through all: where layers run, which wait on the host, one slot or
    two.
    """
    names = [device.name for device in hardware.devices]
    ways = [(name, waits) for name in names for waits in (False, True) if name != "cpu" or not waits]
    best: int | None = None
    for chosen in itertools.product(ways, repeat=len(graph.layers)):
        devices = tuple(name for name, _ in chosen)
        if any(not edge.may_cut and devices[edge.source] != devices[edge.target] for edge in graph.edges):
            continue
        placements = tuple(
            dataclasses.replace(entry, home="cpu", memory="pinned") if waits else entry
            for entry, (_, waits) in zip(placed(graph, hardware, devices), chosen, strict=True)
        )
        streams = sorted({name for name, waits in chosen if waits})
        for single in itertools.chain.from_iterable(
            itertools.combinations(streams, count) for count in range(len(streams) + 1)
        ):
            slots = memory.needed_slots(graph, hardware, placements, single=single)
            if fits(graph, hardware, placements, slots):
                ns = cost.objective_ns(graph, hardware, WORKLOAD, placements, slots)
                best = ns if best is None else min(best, ns)
    return best


@pytest.mark.parametrize("seed", range(8))
def test_the_relaxation_is_below_every_placement_of_a_small_graph(seed: int) -> None:
    graph, hardware = case(seed, 4, 2, spare=(1.0, 0.93, 0.9, 0.87)[seed % 4])
    if seed % 3 == 2:
        edges = [
            dataclasses.replace(edge, may_cut=edge.target != 2, prefill_bytes=edge.prefill_bytes // edge.target)
            for edge in graph.edges
        ]
        graph = dataclasses.replace(graph, edges=tuple(edges))
    problem = build(graph, hardware, WORKLOAD, NO_RULES, named=True)
    assert relaxation.applies(problem)
    best = best_with_streaming(graph, hardware)
    assert best is not None
    assert _computing_ns(problem) * 0.999 <= relaxation._Relaxation(problem).bound_ns(10.0) <= best


def uneven(graph: LayerGraph) -> LayerGraph:
    """Return the graph with every tensor taken in several sizes."""
    edges = [
        dataclasses.replace(edge, prefill_bytes=edge.prefill_bytes // (1 + edge.target % 3)) for edge in graph.edges
    ]
    return dataclasses.replace(graph, edges=tuple(edges))


@pytest.mark.parametrize("seed", range(6))
def test_the_relaxation_with_a_placement_fixed_is_below_what_that_costs(seed: int) -> None:
    graph, hardware = case(seed, 14, 4, spare=1.7 if seed % 3 else 1.0)
    graph = uneven(graph) if seed % 2 else graph
    links = tuple(
        dataclasses.replace(link, bytes_per_s=link.bytes_per_s // 50)
        if link.source < link.target or seed % 3 == 1
        else link
        for link in hardware.links
    )
    hardware = dataclasses.replace(hardware, links=links)
    problem = build(graph, hardware, WORKLOAD, NO_RULES, named=True)
    rng = random.Random(seed)
    names = [device.name for device in hardware.devices]
    met = near = 0
    for _ in range(40):
        few = rng.sample(names, rng.choice((2, 3)))
        devices = tuple(rng.choice(few) for _ in graph.layers)
        waits = [name != "cpu" and rng.random() < 0.6 for name in devices]
        placements = tuple(
            dataclasses.replace(entry, home="cpu", memory="pinned") if away else entry
            for entry, away in zip(placed(graph, hardware, devices), waits, strict=True)
        )
        slots = memory.needed_slots(graph, hardware, placements, single=rng.sample(names, 2))
        if not fits(graph, hardware, placements, slots):
            continue
        relaxed = relaxation._Relaxation(problem)
        for (index, name), variable in relaxed.here.items():
            variable.lower_bound = variable.upper_bound = float(devices[index] == name)
        for (index, name), variables in relaxed.away.items():
            for variable in variables:
                variable.lower_bound = variable.upper_bound = float(devices[index] == name and waits[index])
        bound = relaxed.bound_ns(10.0)
        ns = cost.objective_ns(graph, hardware, WORKLOAD, placements, slots)
        assert 0 < bound <= ns
        met += 1
        near += bound > 0.9 * ns
    assert met > 3
    assert near > 0


def test_where_nothing_moves_and_all_fits_the_relaxation_is_exact() -> None:
    graph, hardware = case(1, 8, 1, spare=1.4)
    graph = resident(graph)
    best = enumerated(graph, hardware)
    assert best is not None
    bound = relaxation._Relaxation(build(graph, hardware, WORKLOAD, NO_RULES, named=True)).bound_ns(10.0)
    assert best * (1 - 1e-3) <= bound <= best


def test_the_higher_of_two_bounds_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, hardware = case(2, 40, 4)
    _, _, solver = find(graph, hardware, WORKLOAD, Rules(time_limit_s=2))
    assert solver.status == "feasible"
    monkeypatch.setattr(relaxation._Relaxation, "bound_ns", lambda *_: 10**18)
    _, _, solver = find(graph, hardware, WORKLOAD, Rules(time_limit_s=2))
    assert solver.status == "optimal"

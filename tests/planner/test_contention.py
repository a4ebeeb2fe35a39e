"""Experts that the CPU computes, and weights that are copied from the same memory beside it, slow each other."""

from __future__ import annotations

import random

import pytest

import simulate
from brute_force import MOST_COLUMNS, Ledger
from drawn_cases import check_against_brute_force
from planner import cost
from planner.graph import LayerKind
from planner.placement import counts as counting
from planner.placement import rent
from planner.placement.problem import build
from planner.placement.tables import share_out, units_of
from planner.placement.ways import Entries
from planner.rules import Pin, Rules
from planner.workload import Workload
from small_cases import MIB, Case, build_graph, end_kind, gpu, group, machine, plan_of, span

SEEDS = range(24)


def case(seed: int, *, blocks: int) -> Case:
    """Return blocks whose attention is small and whose experts are large, on a GPU that has no room for both."""
    rng = random.Random(seed)
    attn, expert = rng.choice([2, 3, 5]) * MIB, 12 * MIB
    kinds = [end_kind("Embedding", MIB), end_kind("Head", MIB)]
    kinds.append(LayerKind(name="Block", groups=(group("attn", attn), group("experts", expert, slices=2))))
    ends = [span(held=100, peak=MIB, flops=10**6, moved=10**6)] * 3
    work = [span(held=100, peak=MIB, kv=(0, 4096), flops=10**6, moved=10**6)] * 3
    order = [("embed", 0), *[(f"block.{number}", 2) for number in range(blocks)], ("head", 1)]
    graph = build_graph(kinds, [ends, ends, work], order, tokens=(64, 65))
    device = gpu(0, product="big", flops=10**14, rate=10**12)
    fixed = device.context_bytes + device.workspace_bytes + 26 * MIB + 2 * expert
    room = blocks * attn + rng.uniform(0.1, 0.6) * 2 * blocks * expert
    hardware = machine(
        [device], {"cuda:0": fixed + int(room), "cpu": 2**30, "disk": 2**40},
        link=rng.choice([11, 12, 14, 20, 40]) * 10**9,
    )  # fmt: skip
    rules = Rules(pins=(Pin(layers=".*", device="cuda:0"),), never_on_disk=seed % 2 == 0)
    return Case(graph, hardware, Workload(prompt_tokens=64, new_tokens=200, objective="tpot"), rules)


@pytest.mark.parametrize("seed", SEEDS)
def test_placements_are_as_good_as_brute_force_finds(seed: int) -> None:
    found = case(seed, blocks=4 if seed % 2 else 6)
    assert Ledger(found).size <= MOST_COLUMNS
    check_against_brute_force(found)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_way_to_solve_prices_it_alike(seed: int) -> None:
    found = case(seed, blocks=4 if seed % 2 else 6)
    best = Ledger(found).best()
    problem = build(found.graph, found.hardware, found.workload, found.rules, named=False)
    counts, share = counting.solve(problem, counting.Clock()), share_out(problem)
    assert best is not None
    assert counts is not None
    assert share is not None
    assert counts.objective == best
    # Tables leave open that a pass may be no shorter than its copies, and what waits on disk.
    attn = found.graph.kinds[2].groups[0]
    copies = 6 * cost.copy_ns(found.hardware, "cpu", "cuda:0", "pinned", attn.nbytes)
    is_exact = found.rules.never_on_disk and copies < 0.8 * best
    assert share.bound_ns == best if is_exact else share.bound_ns <= best
    assert rent.with_rent(problem)[0] <= best


@pytest.mark.parametrize("seed", SEEDS)
def test_ways_without_rent_cost_what_tables_say_but_for_parts_of_experts(seed: int) -> None:
    found = case(seed, blocks=40)
    problem = build(found.graph, found.hardware, found.workload, found.rules, named=False)
    share, units = share_out(problem), units_of(problem)
    assert share is not None
    entries = Entries(problem, found.hardware.device("cuda:0"), units, [0])
    least = min(int(way.costs[0]) for way in entries.ways({unit.name: unit.count for unit in units}))
    assert 0.97 * share.bound_ns <= least <= share.bound_ns


@pytest.mark.parametrize("seed", SEEDS)
def test_events_take_what_the_cost_says(seed: int) -> None:
    plan = plan_of(case(seed, blocks=40))
    assert plan.solver is not None
    assert 0.97 <= simulate.run(plan).decode_ns_per_token / plan.solver.objective_ns <= 1.03

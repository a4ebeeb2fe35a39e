"""Tables that pay rent for host memory against brute force: their bound where it binds, and what they choose then."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brute_force import MOST_COLUMNS, Ledger
from drawn_cases import chains, examples
from planner import cost
from planner.graph import Bucket, LayerKind
from planner.host_cache import on_host
from planner.placement import counts as counting
from planner.placement import rent, solution
from planner.placement.problem import Problem, build
from planner.placement.realise import realise
from planner.placement.tables import applies, share_out
from planner.rules import Pin, Rules
from planner.workload import Workload
from small_cases import MIB, Case, build_graph, end_kind, gpu, group, machine, span

SEEDS = range(30)
# Of the larger cases, those that CP-SAT proves quickly.
PROVEN = (1, 7, 10, 13, 14)


def moe_case(rng: random.Random, count: int, slices: int, expert: int, *, room: float, host: float) -> Case:
    """Return blocks of experts on two GPUs too small for them, beside a host that is too small for the rest.

    room, host: blocks that fit on a GPU and on the host, besides slots.
    """
    attn = rng.choice([2, 4, 8]) * MIB
    used = rng.choice([1, 2])
    experts = group("experts", expert, slices=slices, used=used)
    if rng.random() < 0.3:
        most = rng.choice([1.0, 0.8])
        rest = Bucket(slices=slices - 1, chance=(used - most) / (slices - 1))
        experts = dataclasses.replace(experts, buckets=(Bucket(slices=1, chance=most), rest))
    kinds = [end_kind("Embedding", MIB), end_kind("Head", MIB)]
    kinds.append(LayerKind(name="Block", groups=(group("attn", attn), experts)))
    ends = [span(held=100, peak=MIB, flops=10**6, moved=10**6)] * 3
    work = [span(held=100, peak=MIB, kv=(0, 4096), flops=rng.choice([10**8, 10**10, 10**12]), moved=10**6)] * 3
    order = [("embed", 0), *[(f"block.{number}", 2) for number in range(count)], ("head", 1)]
    graph = build_graph(kinds, [ends, ends, work], order)
    gpus = [gpu(number, product="big", flops=10**14, rate=10**12) for number in range(2)]
    block, fixed = attn + slices * expert, gpus[0].context_bytes + gpus[0].workspace_bytes + 8 * MIB
    capacity = fixed + 2 * (attn + expert) + int(room * block)
    sizes = {"cuda:0": capacity, "cuda:1": capacity, "cpu": 4 * (attn + expert) + int(host * block), "disk": 2**40}
    rules = Rules(pins=(Pin(layers="embed|head", device="cuda:0"),), cpu_experts=rng.random() < 0.7)
    return Case(graph, machine(gpus, sizes), Workload(prompt_tokens=8, new_tokens=20), rules)


def scarce_case(seed: int) -> Case:
    """Return two or three blocks: brute force goes through all placements."""
    rng = random.Random(seed)
    count, slices = rng.choice([(2, 3), (2, 5), (3, 2)])
    room, host = rng.uniform(0, count / 4), rng.uniform(0, 0.3)
    return moe_case(rng, count, slices, rng.choice([4, 6, 9]) * MIB, room=room, host=host)


def larger_case(seed: int) -> Case:
    """Return some ten blocks, of which the host has room for less than half."""
    rng = random.Random(seed)
    count, slices = rng.choice([8, 10, 12]), rng.choice([6, 8])
    room, host = rng.uniform(0.2, 2), rng.uniform(1, count / 2)
    return moe_case(rng, count, slices, rng.choice([2, 3, 4]) * MIB, room=room, host=host)


def problem_of(case: Case) -> Problem:
    return build(case.graph, case.hardware, case.workload, case.rules, named=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_placement_is_below_the_bound_and_the_answers_fit(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every other case with so few parts of host memory that what they are rounded by matters.
    monkeypatch.setattr(rent, "PARTS", 64 if seed % 2 else 2)
    case = scarce_case(seed)
    best = Ledger(case).best()
    problem = problem_of(case)
    bound, shares = rent.with_rent(problem)
    assert best is None or bound <= best
    for share in shares:
        filled = solution._by_tables(problem, share)
        if filled is not None:
            placements, slots = realise(problem, filled)
            price = cost.objective_ns(case.graph, case.hardware, case.workload, placements, slots)
            assert best is not None
            assert best <= price
            assert filled.objective == price


@pytest.mark.parametrize("seed", [9, 16, 29])
def test_whole_groups_on_disk_hide_behind_experts_in_host_memory(seed: int) -> None:
    """Cases in which that is best: a bound without this way would be too high."""
    rng = random.Random(seed)
    problem = problem_of(moe_case(rng, 6, 4, 4 * MIB, room=0.2, host=rng.uniform(3, 4.8)))
    proven = counting.solve(problem, counting.Clock())
    assert proven is not None
    assert proven.is_optimal
    away = {(stored[2].split()[1], memory) for (stored, memory), slices in proven.away.items() if slices}
    assert {("attn", "disk"), ("experts", "pinned")} <= away
    assert ("experts", "disk") not in away
    assert rent.with_rent(problem)[0] <= proven.objective


@pytest.mark.parametrize("seed", PROVEN)
def test_the_bound_is_near_what_a_search_proves(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(larger_case(seed))
    share = share_out(problem)
    bound, shares = rent.with_rent(problem)
    proven = counting.solve(problem, counting.Clock())
    assert share is not None
    assert proven is not None
    assert proven.is_optimal
    # What is missing are parts of experts, and slots.
    assert max(1.05 * share.bound_ns, 0.85 * proven.objective) < bound <= proven.objective
    found = [filled for entry in shares if (filled := solution._by_tables(problem, entry)) is not None]
    assert proven.objective <= min(filled.objective for filled in found) <= 1.2 * proven.objective
    for parts in (1, 2, 3, 5):
        monkeypatch.setattr(rent, "PARTS", parts)
        assert rent.with_rent(problem)[0] <= proven.objective


@examples(20)
@given(case=chains(), seed=st.integers(0, 10**6))
def test_the_bound_holds_for_chains_of_any_kind(case: Case, seed: int) -> None:
    """Ties, several kinds of GPUs, caches on the host, small hosts and large."""
    if seed % 2:
        case = dataclasses.replace(case, graph=on_host(case.graph))
    problem = problem_of(case)
    ledger = Ledger(case)
    if applies(problem) and ledger.size <= MOST_COLUMNS:
        best = ledger.best()
        bound, _ = rent.with_rent(problem)
        assert best is None or bound <= best

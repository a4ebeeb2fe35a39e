"""The tables by themselves against brute force: their bound, and what they choose, with no search behind them."""

from __future__ import annotations

import dataclasses
import random

import pytest

from brute_force import Ledger
from planner import cost
from planner.graph import LayerKind
from planner.placement import solution
from planner.placement.problem import build
from planner.placement.realise import realise
from planner.placement.tables import applies, share_out
from planner.rules import Rules
from planner.workload import Workload
from small_cases import MIB, Case, build_graph, end_kind, gpu, group, machine, span

SEEDS = range(40)


def streaming_case(seed: int) -> Case:
    """Return four blocks on two GPUs too small for them, beside a host too slow to compute them."""
    rng = random.Random(seed)
    sizes = [rng.choice([11, 14, 16, 22]) * MIB for _ in range(2)]
    kinds = [end_kind("Embedding", MIB), end_kind("Head", MIB)]
    kinds.append(LayerKind(name="Block", groups=(group("attn", sizes[0]), group("mlp", sizes[1]))))
    ends = [span(held=100, peak=MIB, flops=10**6, moved=10**6)] * 3
    flops = rng.choice([10**9, 10**11, 4 * 10**11])
    work = [span(held=100, peak=MIB, kv=(0, 4096), flops=flops, moved=10**6)] * 3
    order = [("embed", 0), *[(f"block.{number}", 2) for number in range(4)], ("head", 1)]
    graph = build_graph(kinds, [ends, ends, work], order)
    gpus = [gpu(number, product="big", flops=10**14, rate=10**12) for number in range(2)]
    capacity = rng.randint(62, 100) * MIB
    hardware = machine(gpus, {"cuda:0": capacity, "cuda:1": capacity, "cpu": 4096 * MIB, "disk": 0})
    slow = [
        dataclasses.replace(device, flops_per_s={"default": 10**9}, bytes_per_s=10**8)
        if device.kind == "cpu"
        else device
        for device in hardware.devices
    ]
    rules = Rules(never_on_disk=True)
    hardware = dataclasses.replace(hardware, devices=tuple(slow))
    return Case(graph, hardware, Workload(prompt_tokens=8, new_tokens=20), rules)


@pytest.mark.parametrize("seed", SEEDS)
def test_tables_prove_and_choose_what_brute_force_finds(seed: int) -> None:
    case = streaming_case(seed)
    best = Ledger(case).best()
    problem = build(case.graph, case.hardware, case.workload, case.rules, named=False)
    assert applies(problem)
    share = share_out(problem)
    if best is None:
        assert share is None
        return
    assert share is not None
    filled = solution._by_tables(problem, share)
    assert filled is not None
    placements, slots = realise(problem, filled)
    price = cost.objective_ns(case.graph, case.hardware, case.workload, placements, slots)
    # What the tables leave out is that no pass is shorter than one link is busy.
    assert share.bound_ns <= best <= price
    solver = solution.find(case.graph, case.hardware, case.workload, case.rules)[2]
    assert (solver.status, solver.objective_ns) == ("optimal", best)


def test_most_answers_are_the_tables_own_and_many_stream_on_both_gpus() -> None:
    """Else the cases would say little of the tables, and nothing of copies that hide behind the other GPU's time."""
    exact, both = 0, 0
    for seed in SEEDS:
        case = streaming_case(seed)
        problem = build(case.graph, case.hardware, case.workload, case.rules, named=False)
        share = share_out(problem)
        filled = share and solution._by_tables(problem, share)
        if share and filled and filled.objective == share.bound_ns:
            exact += 1
            both += len({key[1] for (key, _), slices in filled.away.items() if slices}) > 1
    assert exact > len(SEEDS) // 2
    assert both > len(SEEDS) // 8

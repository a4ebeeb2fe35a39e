"""The solver against brute force: every placement of small cases, priced and weighed by formulas of the tests' own."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest
from brute_force import Ledger, options_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_cases import MIB, Case, build_graph, end_kind, gpu, group, machine, plan_of, span

from planner import cost, memory
from planner.errors import InfeasibleError
from planner.graph import LayerKind, Span
from planner.hardware import Hardware
from planner.placement.realise import spread
from planner.placement.solution import find
from planner.plan import Placement, Plan, Slots
from planner.verify import verify_plan
from planner.workload import Workload

MOST_PLACEMENTS = 60_000
EXAMPLES = settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)


@st.composite
def block_kinds(draw: st.DrawFn, name: str) -> tuple[LayerKind, list[Span]]:
    size = st.sampled_from([MIB // 2, 3 * MIB + 77 * 2, 8 * MIB, 11 * MIB, 16 * MIB + 6])
    groups = [group("attn", draw(size))]
    second = draw(st.sampled_from(["none", "mlp", "experts"]))
    if second == "mlp":
        groups.append(group("mlp", draw(size)))
    elif second == "experts":
        slices = draw(st.integers(2, 3))
        groups.append(group("experts", draw(size), slices=slices, used=draw(st.integers(1, slices))))
    if draw(st.booleans()):
        groups.append(group("rest", draw(st.sampled_from([1024, MIB])), streamable=False))
    flops = draw(st.sampled_from([10**6, 10**9, 10**11]))
    moved = draw(st.sampled_from([10**4, 10**7]))
    cached = draw(st.sampled_from([0, 4096, 2 * MIB]))
    held = draw(st.sampled_from([0, 1000, MIB]))
    peaks = [draw(st.sampled_from([100, MIB, 5 * MIB])) for _ in range(3)]
    passes = [
        span(held=held, peak=peaks[0], kv=(0, cached), flops=flops, moved=moved, operators=10),
        span(held=held, peak=peaks[1], kv=(cached, cached + 64), flops=flops // 8, moved=moved, operators=10),
        span(held=held, peak=peaks[2], kv=(cached + 64, cached + 640), flops=flops // 7, moved=moved, operators=10),
    ]
    return LayerKind(name=name, groups=tuple(groups)), passes


@st.composite
def cases(draw: st.DrawFn, *, alternating: bool = False) -> Case:
    """Draw a graph of two to four blocks and a machine; half of the machines are as large as some placement needs."""
    gpus = [gpu(0, product="big", flops=10**14, rate=10**12)]
    devices = draw(st.sampled_from(["one", "one", "alike", "different"]))
    if devices == "alike":
        gpus.append(gpu(1, product="big", flops=10**14, rate=10**12))
    elif devices == "different":
        gpus.append(gpu(1, product="small", flops=10**13, rate=2 * 10**11, context=MIB))
    first, second = draw(block_kinds("First")), draw(block_kinds("Second"))
    size = st.sampled_from([MIB, 6 * MIB, 20 * MIB])
    kinds = [end_kind("Embedding", draw(size)), end_kind("Norm", 64 * 1024), end_kind("Head", draw(size))]
    tie = (("embed.weights.weight", "head.weights.weight"),) if draw(st.integers(0, 3)) == 0 else ()
    if tie:
        kinds[2] = end_kind("Head", kinds[0].nbytes)
    still = [span(held=500, peak=draw(st.sampled_from([0, 3 * MIB])), flops=10**6, moved=10**6) for _ in range(3)]
    tail = [("norm", 1), ("head", 2)] if draw(st.booleans()) else [("head", 2)]
    count = draw(st.integers(2, 4))
    while True:
        blocks = [(f"block.{i}", 4 if alternating and i % 2 else 3) for i in range(count)]
        graph = build_graph(
            [*kinds, first[0], second[0]], [still, still, still, first[1], second[1]],
            [("embed", 0), *blocks, *tail], ties=tie, loose_bytes=draw(st.sampled_from([0, 512])),
            hop_bytes=(draw(st.sampled_from([64, 10**6, 10**8])), 256), batch_size=draw(st.sampled_from([1, 4])),
        )  # fmt: skip
        if math.prod(len(options) for options in options_of(graph, [d.name for d in gpus])) <= MOST_PLACEMENTS:
            break
        count -= 1
    workload = Workload(batch_size=graph.batch_size, prompt_tokens=8, new_tokens=draw(st.sampled_from([3, 20])))
    whole = graph.weight_bytes + 10 * MIB
    part = st.sampled_from([0, 15, 30, 45, 60, 80, 100, 130])
    capacities = {device.name: 28 * MIB + whole * draw(part) // 100 + draw(st.integers(0, 3)) for device in gpus}
    capacities["cpu"] = 4 * MIB + whole * draw(part) // 100
    capacities["disk"] = whole * draw(st.sampled_from([0, 30, 200])) // 100
    reserved = draw(st.sampled_from([0, MIB]))
    if draw(st.booleans()):
        held = Ledger(Case(graph, machine(gpus, capacities), workload)).held
        column = draw(st.integers(0, len(held["cpu"]) - 1))
        lacking = draw(st.sampled_from([None, None, *held]))
        capacities = {name: max(0, int(held[name][column]) - (name == lacking)) for name in capacities}
        capacities["cpu"] += reserved
    return Case(graph, machine(gpus, capacities, reserved=reserved), workload)


def check_against_brute_force(case: Case, *, always_optimal: bool) -> None:
    ledger = Ledger(case)
    best = ledger.best()
    if best is None:
        with pytest.raises(InfeasibleError) as caught:
            find(case.graph, case.hardware, case.workload)
        missing = ledger.missing()
        if missing:
            least = min(missing, key=lambda name: (missing[name], name))
            grown = caught.value.needed_bytes - caught.value.available_bytes
            assert (caught.value.device, grown) == (least, missing[least])
        return
    plan = plan_of(case)
    assert plan.solver is not None
    assert verify_plan(plan) == ()
    assert plan.solver.bound_ns <= best <= plan.solver.objective_ns
    if plan.solver.status == "optimal":
        assert plan.solver.objective_ns == best
    if always_optimal:
        assert plan.solver.status == "optimal"


# The solver's answers


@EXAMPLES
@given(case=cases())
def test_alike_blocks_are_placed_as_well_as_brute_force_does(case: Case) -> None:
    check_against_brute_force(case, always_optimal=True)


@EXAMPLES
@given(case=cases(alternating=True))
def test_alternating_blocks_are_never_worse_than_claimed(case: Case) -> None:
    check_against_brute_force(case, always_optimal=False)


@EXAMPLES
@given(case=cases(alternating=True), seed=st.integers(0, 10**6))
def test_cost_and_memory_equal_those_of_independent_formulas(case: Case, seed: int) -> None:
    ledger = Ledger(case)
    for column in random.Random(seed).sample(range(len(ledger.cost)), k=10):
        placements = ledger.placements(column)
        slots = memory.needed_slots(case.graph, case.hardware, placements)
        assert cost.objective_ns(case.graph, case.hardware, case.workload, placements) == ledger.cost[column]
        planned = memory.planned_bytes(case.graph, case.hardware, placements, slots)
        assert {name: usage.total for name, usage in planned.items()} == {
            name: held[column] for name, held in ledger.held.items()
        }
        peaks = memory.peak(case.graph, case.hardware, placements, slots)
        assert all(peaks[name].total <= planned[name].total for name in planned)

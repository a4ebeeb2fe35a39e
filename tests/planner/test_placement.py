"""The solver against brute force: every placement of small cases, priced and weighed by formulas of the tests' own."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from brute_force import Ledger, options_of
from planner import cost, memory
from planner.errors import InfeasibleError
from planner.graph import LayerKind, Span
from planner.hardware import Hardware
from planner.placement.realise import spread
from planner.placement.solution import find
from planner.plan import Plan, Slots
from planner.verify import verify_plan
from planner.workload import Workload
from small_cases import MIB, Case, build_graph, end_kind, gpu, group, machine, plan_of, span

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


def test_groups_of_an_end_wait_each_by_themselves() -> None:
    """Norm and head are two layers of one unit with groups of one name: what the model counts is what is placed."""
    kinds = [end_kind("Embedding", MIB), end_kind("Norm", 64 * 1024), end_kind("Head", MIB)]
    kinds.append(LayerKind(name="Block", groups=(group("attn", 4 * MIB),)))
    graph = build_graph(kinds, [[span()]] * 4, [("embed", 0), ("block.0", 3), ("norm", 1), ("head", 2)])
    whole = 6 * MIB + 64 * 1024
    case = Case(graph, machine([], {"cpu": whole - 1, "disk": whole}), Workload(new_tokens=1))
    plan = plan_of(case)
    assert verify_plan(plan) == ()
    assert [p.home for p in plan.placements] == ["cpu", "cpu", "disk", "cpu"]


def test_reserved_memory_counts_in_what_is_needed() -> None:
    """The stated need, given, is enough, also where less is there than is reserved for others."""
    kinds = [end_kind("Embedding", MIB), LayerKind(name="Block", groups=(group("attn", 4 * MIB),))]
    graph = build_graph(kinds, [[span(peak=MIB)]] * 2, [("embed", 0), ("block.0", 1)])
    small = Case(graph, machine([], {"cpu": MIB, "disk": 0}, reserved=3 * MIB), Workload(new_tokens=1))
    with pytest.raises(InfeasibleError) as caught:
        find(small.graph, small.hardware, small.workload)
    assert (caught.value.device, caught.value.needed_bytes, caught.value.available_bytes) == (
        "cpu",
        9 * MIB + MIB // 5,
        MIB,
    )
    enough = machine([], {"cpu": caught.value.needed_bytes, "disk": 0}, reserved=3 * MIB)
    assert find(graph, enough, small.workload)[2].status == "optimal"


def test_memory_is_preferred_to_disk_where_both_cost_the_same() -> None:
    """Computing hides the copies from either, and memory has room for all: nothing waits on disk."""
    kinds = [end_kind("Embedding", MIB), end_kind("Head", MIB)]
    kinds.append(LayerKind(name="Block", groups=(group("attn", 4 * MIB), group("mlp", 8 * MIB))))
    ends = [span(held=100, peak=MIB, flops=10**6, moved=10**6)] * 3
    work = [span(held=100, peak=2 * MIB, kv=(0, 4096), flops=10**12, moved=10**6)] * 3
    graph = build_graph(kinds, [ends, ends, work], [("embed", 0), *[(f"b{i}", 2) for i in range(8)], ("head", 1)])
    gpus = [gpu(0, product="big", flops=10**14, rate=10**12)]
    for size, any_waits in ((100, True), (200, False)):
        sizes = {"cuda:0": size * MIB, "cpu": 400 * MIB, "disk": 2**31}
        placements, _, solver = find(graph, machine(gpus, sizes), Workload(prompt_tokens=8, new_tokens=12))
        assert solver.status == "optimal"
        assert {p.home for p in placements if p.home != p.run_on} == ({"cpu"} if any_waits else set())


SEARCH = """
import json, sys
from planner.errors import InfeasibleError
from planner.graph import LayerGraph
from planner.hardware import Hardware
from planner.placement.solution import find
from planner.serial import decode
from planner.workload import Workload

data = json.load(open(sys.argv[1], encoding="utf-8"))
try:
    find(LayerGraph.from_dict(data["graph"]), decode(Hardware, data["hardware"]), decode(Workload, data["workload"]))
except InfeasibleError as error:
    print(error.device, error.needed_bytes - error.available_bytes)
"""


def test_a_search_that_once_did_not_end() -> None:
    """Three layers, and one byte too little: the search went in circles, faster than its own clock ran."""
    path = Path(__file__).parents[1] / "cases" / "search_that_took_long.json"
    done = subprocess.run([sys.executable, "-c", SEARCH, str(path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["cpu", "1"], done.stderr


# Order and repetition do not matter


@settings(EXAMPLES, max_examples=25)
@given(case=cases(alternating=True), seed=st.integers(0, 99))
def test_order_of_pools_and_links_changes_nothing(case: Case, seed: int) -> None:
    links = random.Random(seed).sample(case.hardware.links, len(case.hardware.links))
    pools = random.Random(seed).sample(case.hardware.pools, len(case.hardware.pools))
    other = dataclasses.replace(case.hardware, links=tuple(links), pools=tuple(pools))
    try:
        first = find(case.graph, case.hardware, case.workload)
    except InfeasibleError as error:
        with pytest.raises(InfeasibleError, match=f"^{re.escape(str(error))}$"):
            find(case.graph, other, case.workload)
        return
    assert find(case.graph, other, case.workload) == first
    assert find(case.graph, case.hardware, case.workload) == first


def test_order_of_max_memory_changes_nothing() -> None:
    caps: dict[str, str | int] = {"cuda:0": "20GiB", "cuda:1": "21GiB", "cpu": "64GB"}
    machines = {
        Hardware.from_options("2x24GB", max_memory=dict(order)).pools for order in itertools.permutations(caps.items())
    }
    notes = {
        Hardware.from_options("2x24GB", max_memory=dict(order)).assumptions
        for order in itertools.permutations(caps.items())
    }
    assert len(machines) == len(notes) == 1


# spread


@given(total=st.integers(0, 500), places=st.integers(1, 60))
def test_spread_is_even_everywhere(total: int, places: int) -> None:
    counts = spread(total, places)
    assert sum(counts) == total
    assert len(counts) == places
    for start in range(places):
        for end in range(start + 1, places + 1):
            assert abs(sum(counts[start:end]) * places - total * (end - start)) < places


# verify_plan sees planted faults


def streaming_case() -> Case:
    kinds = [end_kind("Embedding", MIB), end_kind("Head", MIB)]
    groups = (group("attn", 8 * MIB), group("experts", 2 * MIB, slices=3), group("rest", 1024, streamable=False))
    kinds.append(LayerKind(name="Block", groups=groups))
    work = [span(held=100, peak=MIB, kv=(0, 4096), flops=10**11, moved=10**6)] * 3
    blocks = [(f"block.{i}", 2) for i in range(4)]
    graph = build_graph(kinds, [work] * 3, [("embed", 0), *blocks, ("head", 1)])
    gpus = [gpu(0, product="big", flops=10**14, rate=10**12), gpu(1, product="big", flops=10**14, rate=10**12)]
    sizes = {"cuda:0": 55 * MIB, "cuda:1": 55 * MIB, "cpu": 64 * MIB, "disk": 2**30}
    return Case(graph, machine(gpus, sizes), Workload(prompt_tokens=8, new_tokens=8))


@pytest.fixture(scope="module")
def plan() -> Plan:
    made = plan_of(streaming_case())
    assert any(p.home != p.run_on for p in made.placements)
    return made


def with_placement(plan: Plan, index: int, **changes: object) -> Plan:
    changed = dataclasses.replace(plan.placements[index], **changes)  # type: ignore[arg-type]
    return dataclasses.replace(plan, placements=(*plan.placements[:index], changed, *plan.placements[index + 1 :]))


def rules(plan: Plan) -> set[str]:
    return {violation.rule for violation in verify_plan(plan)}


def streamed(plan: Plan) -> int:
    return next(i for i, p in enumerate(plan.placements) if p.home != p.run_on)


def test_a_sound_plan_breaks_no_rule(plan: Plan) -> None:
    assert verify_plan(plan) == ()


def test_a_dropped_placement_is_seen(plan: Plan) -> None:
    for index in range(len(plan.placements)):
        rest = plan.placements[:index] + plan.placements[index + 1 :]
        assert rules(dataclasses.replace(plan, placements=rest)) == {"placed once"}


def test_a_repeated_placement_is_seen(plan: Plan) -> None:
    assert rules(dataclasses.replace(plan, placements=(*plan.placements, plan.placements[0]))) == {"placed once"}


def test_a_group_moved_elsewhere_is_seen(plan: Plan) -> None:
    index = streamed(plan)
    device = plan.placements[index].run_on
    moved = with_placement(plan, index, home=device, memory="device", resident_slices=None)
    if plan.placements[index].resident_slices is not None:
        moved = with_placement(plan, index, home=device, memory="device", resident_slices=3)
    assert rules(moved) & {"capacity", "prediction"}


def test_a_layer_split_over_two_devices_is_seen(plan: Plan) -> None:
    index = next(i for i, p in enumerate(plan.placements) if p.group == "attn")
    other = {"cuda:0": "cuda:1", "cuda:1": "cuda:0", "cpu": "cuda:0"}[plan.placements[index].run_on]
    assert "no_split" in rules(with_placement(plan, index, run_on=other, home=other))


def test_homes_that_cannot_be_are_seen(plan: Plan) -> None:
    index = next(i for i, p in enumerate(plan.placements) if p.run_on == "cuda:0" and p.group == "rest")
    assert rules(with_placement(plan, index, home="cpu")) == {"homes"}
    index = next(i for i, p in enumerate(plan.placements) if p.run_on == "cuda:0" and p.group == "attn")
    assert rules(with_placement(plan, index, home="cuda:1")) == {"homes"}
    assert rules(with_placement(plan, index, home="cuda:7")) == {"places"}
    assert rules(with_placement(plan, index, home="moon")) == {"places"}


@pytest.mark.parametrize("kept", [-1, 4, None])
def test_slices_that_cannot_be_are_seen(plan: Plan, kept: int | None) -> None:
    index = next(i for i, p in enumerate(plan.placements) if p.group == "experts")
    assert "slices" in rules(with_placement(plan, index, resident_slices=kept))


def test_a_wrong_size_is_seen(plan: Plan) -> None:
    assert rules(with_placement(plan, 0, nbytes=plan.placements[0].nbytes - 1)) == {"sizes"}


def test_capacity_one_byte_below_what_is_planned_is_seen(plan: Plan) -> None:
    planned = memory.planned_bytes(plan.graph, plan.hardware, plan.placements, plan.slots)
    for name, usage in planned.items():
        if usage.total == 0:
            continue
        for lacking, expected in ((0, set()), (1, {"capacity"})):
            pools = tuple(
                dataclasses.replace(pool, capacity_bytes=usage.total - lacking + pool.reserved_bytes)
                if pool.name == name
                else pool
                for pool in plan.hardware.pools
            )
            assert (
                rules(dataclasses.replace(plan, hardware=dataclasses.replace(plan.hardware, pools=pools))) == expected
            )


def test_slots_too_small_or_too_few_are_seen(plan: Plan) -> None:
    for index, slots in enumerate(plan.slots):
        for wrong in (
            dataclasses.replace(slots, slot_bytes=slots.slot_bytes - 1),
            dataclasses.replace(slots, count=slots.count - 1),
            None,
        ):
            rest: list[Slots] = [s for i, s in enumerate(plan.slots) if i != index]
            given_slots = (*rest, wrong) if wrong is not None else tuple(rest)
            assert "slots" in rules(dataclasses.replace(plan, slots=given_slots))


def test_a_wrong_prediction_is_seen(plan: Plan) -> None:
    assert plan.prediction is not None
    for name, nbytes in plan.prediction.peak_bytes.items():
        wrong = dataclasses.replace(plan.prediction, peak_bytes={**plan.prediction.peak_bytes, name: nbytes + 1})
        assert rules(dataclasses.replace(plan, prediction=wrong)) == {"prediction"}


def test_a_missing_prediction_of_a_memory_is_seen(plan: Plan) -> None:
    assert plan.prediction is not None
    less = {name: size for name, size in plan.prediction.peak_bytes.items() if name != "cuda:0"}
    wrong = dataclasses.replace(plan.prediction, peak_bytes=less)
    assert rules(dataclasses.replace(plan, prediction=wrong)) == {"prediction"}


# Pinned memory has a limit of its own


def test_no_more_host_memory_is_pinned_than_may_be() -> None:
    case = streaming_case()
    free, slots, _ = find(case.graph, case.hardware, case.workload)
    wanted = memory.pinned_bytes(case.graph, case.hardware, free, slots)
    assert wanted > 0
    for limit in (wanted, wanted - 1, wanted // 2, 0):
        hardware = case.hardware.with_max_memory({"pinned": limit})
        assert hardware.pinned_limit_bytes == limit
        plan = plan_of(Case(case.graph, hardware, case.workload))
        assert verify_plan(plan) == ()
        assert memory.pinned_bytes(case.graph, hardware, plan.placements, plan.slots) <= limit
        kept = dataclasses.replace(plan, placements=free, slots=slots, prediction=None)
        assert [v.rule for v in verify_plan(kept)] == ([] if limit == wanted else ["capacity"])

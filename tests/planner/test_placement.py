"""The solver against brute force: every placement of small cases, priced and weighed by formulas of the tests' own."""

from __future__ import annotations

import dataclasses
import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brute_force import MOST_COLUMNS, Ledger
from drawn_cases import answer, chains, check_against_brute_force, examples, networks
from planner import cost, memory
from planner.errors import InfeasibleError
from planner.graph import LayerKind
from planner.hardware import Hardware
from planner.placement.realise import spread
from planner.placement.solution import find
from planner.plan import Plan, Slots
from planner.verify import verify_plan
from planner.workload import Workload
from small_cases import MIB, Case, build_graph, end_kind, gpu, group, machine, plan_of, span

# The solver's answers: chains are counted, other graphs named


@examples(300)
@given(case=chains())
def test_alike_blocks_are_placed_as_well_as_brute_force_does(case: Case) -> None:
    check_against_brute_force(case)


@examples(200)
@given(case=chains(alternating=True))
def test_alternating_blocks_are_never_worse_than_claimed(case: Case) -> None:
    check_against_brute_force(case, always_optimal=False)


@examples(150)
@given(case=chains(gpus=("alike", "different", "three"), own_links=True, most_groups=1))
def test_chains_over_links_that_all_differ(case: Case) -> None:
    check_against_brute_force(case, always_optimal=False)


@examples(100)
@given(case=chains(gpus=("one",), own_links=None, nodes=2, most_groups=1))
def test_chains_over_two_nodes(case: Case) -> None:
    check_against_brute_force(case, always_optimal=False)


@examples(300)
@given(case=networks())
def test_graphs_with_skips_and_branches(case: Case) -> None:
    check_against_brute_force(case, named=True)


@examples(100)
@given(case=networks(gpus=("three",), own_links=True))
def test_graphs_over_three_devices_whose_links_all_differ(case: Case) -> None:
    check_against_brute_force(case, named=True)


@examples(100)
@given(case=networks(gpus=("one",), nodes=2))
def test_graphs_over_two_nodes(case: Case) -> None:
    check_against_brute_force(case, named=True)


@examples(100)
@given(case=chains(alternating=True, own_links=None), seed=st.integers(0, 10**6))
def test_cost_and_memory_of_chains_equal_those_of_independent_formulas(case: Case, seed: int) -> None:
    check_formulas(case, Ledger(case), seed)


@examples(100)
@given(case=st.one_of(networks(), networks(gpus=("one",), nodes=2)), seed=st.integers(0, 10**6))
def test_cost_and_memory_of_graphs_equal_those_of_independent_formulas(case: Case, seed: int) -> None:
    check_formulas(case, Ledger(case, named=True), seed)


def check_formulas(case: Case, ledger: Ledger, seed: int) -> None:
    """Hold cost and memory of some placements against the ledger's."""
    assert ledger.size <= MOST_COLUMNS
    random_numbers = random.Random(seed)
    graph, hardware = case.graph, case.hardware
    for column in random_numbers.sample(range(ledger.size), k=min(ledger.size, 10)):
        single = random_numbers.choice(ledger.singles)
        placements = ledger.placements(column)
        slots = memory.needed_slots(graph, hardware, placements, single=single)
        if case.workload.objective != "fit":
            found = cost.objective_ns(graph, hardware, case.workload, placements, slots)
            assert found == ledger.cost[single][column]
        planned = memory.planned_bytes(graph, hardware, placements, slots)
        assert {name: usage.total for name, usage in planned.items()} == {
            name: held[column] for name, held in ledger.held[single].items()
        }
        pinned = memory.pinned_bytes(graph, hardware, placements, slots)
        assert pinned == {name: held[column] for name, held in ledger.pinned[single].items()}
        peaks = memory.peak(graph, hardware, placements, slots)
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
    graph = LayerGraph.from_json(json.dumps(data["graph"]))
    hardware = decode(Hardware, data["hardware"], defaults=True)
    find(graph, hardware, decode(Workload, data["workload"], defaults=True))
except InfeasibleError as error:
    print(error.device, error.needed_bytes - error.available_bytes)
"""


def test_a_search_that_once_did_not_end() -> None:
    """Three layers, and one byte too little: the search went in circles, faster than its own clock ran."""
    path = Path(__file__).parents[1] / "cases" / "search_that_took_long.json"
    done = subprocess.run([sys.executable, "-c", SEARCH, str(path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["cpu", "1"], done.stderr


# Order and repetition do not matter


@examples(50)
@given(case=st.one_of(chains(alternating=True, own_links=None), networks()), seed=st.integers(0, 99))
def test_order_of_pools_links_and_edges_changes_nothing(case: Case, seed: int) -> None:
    shuffled = random.Random(seed)
    links = shuffled.sample(case.hardware.links, len(case.hardware.links))
    pools = shuffled.sample(case.hardware.pools, len(case.hardware.pools))
    edges = shuffled.sample(case.graph.edges, len(case.graph.edges))
    measured = shuffled.sample(case.graph.measured, len(case.graph.measured))
    graph = dataclasses.replace(case.graph, edges=tuple(edges), measured=tuple(measured))
    hardware = dataclasses.replace(case.hardware, links=tuple(links), pools=tuple(pools))
    first = answer(case)
    again = [answer(case), answer(dataclasses.replace(case, graph=graph, hardware=hardware))]
    if isinstance(first, str):
        assert again == [first, first]
        return
    for other in again:
        assert isinstance(other, Plan)
        assert (other.placements, other.slots, other.solver) == (first.placements, first.slots, first.solver)


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
    assert max(counts) - min(counts) <= 1
    more = [place for place, count in enumerate(counts) if count > min(counts)]
    if len(more) > 1:
        gaps = [other - one for one, other in itertools.pairwise(more)]
        assert (more[0], more[-1]) == (0, places - 1)
        assert max(gaps) - min(gaps) <= 1


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
    moved = with_placement(plan, index, home=device, memory="device", resident_slices=None, cpu_up_to_tokens=0)
    if plan.placements[index].resident_slices is not None:
        moved = with_placement(plan, index, home=device, memory="device", resident_slices=3, cpu_up_to_tokens=0)
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
    wanted = memory.pinned_bytes(case.graph, case.hardware, free, slots)["cpu"]
    assert wanted > 0
    for limit in (wanted, wanted - 1, wanted // 2, 0):
        hardware = case.hardware.with_max_memory({"pinned": limit})
        assert hardware.pinned_limit_bytes == limit
        plan = plan_of(Case(case.graph, hardware, case.workload))
        assert verify_plan(plan) == ()
        assert memory.pinned_bytes(case.graph, hardware, plan.placements, plan.slots)["cpu"] <= limit
        kept = dataclasses.replace(plan, placements=free, slots=slots, prediction=None)
        assert [v.rule for v in verify_plan(kept)] == ([] if limit == wanted else ["capacity"])

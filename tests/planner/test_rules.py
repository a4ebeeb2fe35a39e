"""Rules: what the user forbids or fixes is kept, and what is then best is what brute force finds."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given

from drawn_cases import chains, check_against_brute_force, constraints, examples, networks
from planner.errors import InputError
from planner.graph import Edge, LayerKind
from planner.placement.solution import find
from planner.rules import NO_RULES, Pin, Rules
from planner.verify import verify_plan
from planner.workload import Workload
from small_cases import MIB, Case, build_graph, end_kind, gpu, group, machine, plan_of, span, with_nodes


@examples(150)
@given(case=chains(rules=constraints()))
def test_rules_for_chains(case: Case) -> None:
    check_against_brute_force(case, always_optimal=False)


@examples(150)
@given(case=networks(rules=constraints()))
def test_rules_for_graphs(case: Case) -> None:
    check_against_brute_force(case, named=True)


@examples(60)
@given(case=networks(gpus=("one",), nodes=2, rules=constraints(names=("node1/cuda:0", "node0/cpu"))))
def test_rules_for_graphs_over_two_nodes(case: Case) -> None:
    check_against_brute_force(case, named=True)


def case(rules: Rules = NO_RULES, *, blocks: int = 4, nodes: int = 1) -> Case:
    kinds = [end_kind("Embedding", MIB), end_kind("Head", MIB)]
    kinds.append(LayerKind(name="Block", groups=(group("attn", 8 * MIB),)))
    work = [span(held=100, peak=MIB, kv=(0, 4096), flops=10**9, moved=10**6)] * 3
    graph = build_graph(kinds, [work] * 3, [("embed", 0), *[(f"block.{i}", 2) for i in range(blocks)], ("head", 1)])
    gpus = [gpu(i, product="big", flops=10**14, rate=10**12) for i in range(2)]
    hardware = machine(gpus, {"cuda:0": 60 * MIB, "cuda:1": 60 * MIB, "cpu": 400 * MIB, "disk": 400 * MIB})
    hardware = hardware if nodes == 1 else with_nodes(hardware, nodes)
    return Case(graph, hardware, Workload(prompt_tokens=8, new_tokens=8), rules)


def test_of_several_pins_the_last_holds() -> None:
    rules = Rules(pins=(Pin(layers=r"block\..*", device="cuda:1"), Pin(layers=r"block\.2", device="cpu")))
    run_on = {p.layer: p.run_on for p in plan_of(case(rules)).placements}
    assert [run_on[f"block.{i}"] for i in range(4)] == ["cuda:1", "cuda:1", "cpu", "cuda:1"]


def test_a_pin_to_no_device_is_refused() -> None:
    with pytest.raises(InputError, match=r"cuda:7.*cuda:0, cuda:1, cpu"):
        plan_of(case(Rules(pins=(Pin(layers="head", device="cuda:7"),))))


@pytest.mark.parametrize(
    "wrong",
    [{"pins": (Pin(layers="(", device="cpu"),)}, {"time_limit_s": 0.0}, {"quality_budget": -1.0}],
    ids=["pattern", "time", "budget"],
)
def test_rules_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Rules(**wrong)  # type: ignore[arg-type]


def test_broken_rules_are_seen() -> None:
    """A plan made without a rule, held against it."""
    plan = plan_of(case(Rules(pins=(Pin(layers=r"block\.1", device="cpu"),))))
    one = Edge(source=1, target=2, prefill_bytes=1, decode_bytes=1, tensor="tie", may_cut=False)
    graph = dataclasses.replace(plan.graph, edges=(*plan.graph.edges, one))
    for changes, rule in (
        ({"rules": Rules(pins=(Pin(layers=r"block\.1", device="cuda:0"),))}, "pins"),
        ({"rules": Rules(contiguous=True)}, "contiguous"),
        ({"graph": graph}, "edges"),
    ):
        assert rule in {violation.rule for violation in verify_plan(dataclasses.replace(plan, **changes))}  # type: ignore[arg-type]


def test_one_node_is_kept_to() -> None:
    apart = plan_of(case(blocks=16, nodes=2), predicted=False)
    assert len({p.run_on.split("/")[0] for p in apart.placements}) == 2
    kept = plan_of(case(Rules(never_across_nodes=True), blocks=16, nodes=2), predicted=False)
    assert len({p.run_on.split("/")[0] for p in kept.placements}) == 1
    assert "never across nodes" in {v.rule for v in verify_plan(dataclasses.replace(apart, rules=kept.rules))}


# Searches that are cut off. Skips of every length between layers that all differ are not solved for a long time.

LONG = """
import dataclasses, json, random, sys
sys.path.insert(0, "tests/support")
from planner.graph import Edge, LayerKind
from planner.placement.solution import find
from planner.rules import Rules
from planner.workload import Workload
from small_cases import MIB, build_graph, gpu, group, machine, span

draw = random.Random(0)
kinds = [LayerKind(name=f"K{i}", groups=(group("attn", draw.randrange(1, 9) * MIB),)) for i in range(40)]
spans = [[span(peak=MIB, flops=draw.randrange(10**8, 10**10), moved=10**6)] * 3 for _ in kinds]
graph = build_graph(kinds, spans, [(f"layer.{i}", i) for i in range(40)])
edges = [Edge(source=i, target=j, prefill_bytes=draw.randrange(10**7), decode_bytes=draw.randrange(10**6))
         for i in range(40) for j in draw.sample(range(i + 1, 40), min(3, 39 - i))]
graph = dataclasses.replace(graph, edges=tuple(edges))
gpus = [gpu(i, product=str(i), flops=10**14 + i, rate=10**12 - i) for i in range(4)]
hardware = machine(gpus, {**{g.name: (52 + 3 * i) * MIB for i, g in enumerate(gpus)}, "cpu": 2**30, "disk": 0})
print("ready", flush=True)
limit = float(sys.argv[1]) if len(sys.argv) > 1 else None
placements, slots, solver = find(graph, hardware, Workload(prompt_tokens=8, new_tokens=8), Rules(time_limit_s=limit))
print(json.dumps({"layers": len({p.layer for p in placements}), "status": solver.status, "gap": solver.gap}))
"""


def test_an_interrupt_gives_the_best_that_was_found() -> None:
    with subprocess.Popen([sys.executable, "-c", LONG], stdout=subprocess.PIPE, text=True) as search:
        assert search.stdout is not None
        assert search.stdout.readline() == "ready\n"
        time.sleep(4)
        assert search.poll() is None
        search.send_signal(signal.SIGINT)
        found = json.loads(search.stdout.readline())
        assert search.wait(timeout=30) == 0
    assert found["layers"] == 40
    assert found["status"] == "feasible"
    assert 0 < found["gap"] < 1


@pytest.mark.parametrize("limit", ["3", "0.001"])
def test_a_time_limit_gives_the_best_that_was_found(limit: str) -> None:
    done = subprocess.run([sys.executable, "-c", LONG, limit], capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["layers"], found["status"]) == (40, "feasible")
    assert 0 < found["gap"] < 1


def test_a_time_limit_that_is_not_reached_changes_nothing() -> None:
    small = case()
    limited = find(small.graph, small.hardware, small.workload, Rules(time_limit_s=600.0))
    assert limited == find(small.graph, small.hardware, small.workload)

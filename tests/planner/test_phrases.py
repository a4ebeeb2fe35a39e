"""What is said of a plan: gaps that are never said too small, names that lose none, passes on the CPU."""

# ruff: noqa: RUF001 - ranges are written with an en dash
from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import memory, phrases
from planner.graph import Layer, LayerGraph, LayerKind, Pass, Tensor, WeightGroup
from planner.hardware import Hardware
from planner.plan import Execution, ModelInfo, Placement, Plan, Prediction, Solver
from planner.rules import Rules
from planner.units import MB
from planner.workload import Workload

PREDICTION = Prediction(
    peak_bytes={}, peak_breakdown={}, counters={}, prefill_ns=30, decode_ns_per_token=7, total_ns=100, tokens_per_s=1.0,
    load_ns=1, load_peak_bytes={"node0/cpu": 5, "node1/cpu": 9, "node1/cuda:0": 50},
)  # fmt: skip


def solver(objective: int, bound: int, *, in_bytes: bool = False, **more: object) -> Solver:
    values = {"status": "optimal" if objective == bound else "feasible", "cost_model": "made up", **more}
    sizes = {"objective_bytes": objective, "bound_bytes": bound} if in_bytes else {}
    return Solver(objective_ns=1 if in_bytes else objective, bound_ns=0 if in_bytes else bound, **sizes, **values)  # type: ignore[arg-type]


def plan_of(*, sizes: Sequence[int] = (64, 1, 1), **changes: object) -> Plan:
    """Return a plan of two layers with four experts each; two of each wait in host memory."""
    tensor = Tensor(name="w", shape=(4, 100, 100), dtype="bfloat16", nbytes=80_000)
    group = WeightGroup(name="experts", slices=4, used_slices=2, streamable=True, tensors=(tensor,))
    graph = LayerGraph(
        model="made up", batch_size=2, kinds=(LayerKind(name="Block", groups=(group,)),),
        layers=(Layer(name="a.0", kind=0), Layer(name="a.1", kind=0)), edges=(), ties=(), loose=(), allocator_bytes=0,
        passes=tuple(Pass(name=f"pass {n}", tokens=size, context_tokens=64, spans=()) for n, size in enumerate(sizes)),
    )  # fmt: skip
    placements = tuple(
        Placement(layer=layer.name, group="experts", home="cpu", memory="pinned", run_on="cuda:0", nbytes=80_000,
                  resident_slices=2) for layer in graph.layers
    )  # fmt: skip
    info = ModelInfo(
        id="made up", source="graph", note="", revision=None, config_digest=None, weight_dtype="bfloat16",
        num_parameters=80_000, weight_bytes=160_000, versions={},
    )  # fmt: skip
    plan = Plan(
        schema_version=2, model=info, graph=graph, hardware=Hardware.from_options("24GB"), workload=Workload(),
        rules=Rules(), execution=Execution(attention=None, experts=None), assumptions=(), placements=placements,
        slots=(), prediction=PREDICTION, solver=None,
    )  # fmt: skip
    return dataclasses.replace(plan, **changes)  # type: ignore[arg-type]


def waiting(plan: Plan, *limits: int) -> Plan:
    pairs = zip(plan.placements, limits, strict=True)
    return dataclasses.replace(plan, placements=tuple(dataclasses.replace(p, cpu_up_to_tokens=n) for p, n in pairs))


# Gaps


@given(st.integers(1, 10**15), st.integers(0, 10**15), st.booleans())
def test_a_gap_is_never_said_smaller_than_it_is(objective: int, bound: int, in_bytes: bool) -> None:
    bound = min(bound, objective)
    said = Fraction(phrases.gap(solver(objective, bound, in_bytes=in_bytes)).removesuffix("%")) / 100
    true = Fraction(objective - bound, objective)
    assert true <= said
    assert said - true <= max(true / 10, Fraction(1, 10**8))


@pytest.mark.parametrize(
    ("bound", "said"),
    [(10**6, "0%"), (900_000, "10.0%"), (998_500, "0.15%"), (999_951, "0.0049%"), (0, "100.0%")],
)
def test_gaps(bound: int, said: str) -> None:
    assert phrases.gap(solver(10**6, bound)) == said


# Names


def spelled(text: str) -> set[str]:
    """Return the names that a list stands for, read back without the code that wrote it."""
    names = set()
    for word in re.split(r", | and ", text):
        parts = [
            [str(n) for n in range(int(a), int(b) + 1)] if b else [a] for a, b in re.findall(r"(\d+)(?:–(\d+))?", word)
        ]
        form = re.sub(r"\d+(?:–\d+)?", "{}", word)
        names |= {form.format(*numbers) for numbers in itertools.product(*parts)}
    return names


NAMES = st.one_of(
    st.builds("node{}/cuda:{}".format, st.integers(0, 4), st.integers(0, 4)),
    st.builds("node{}/cpu".format, st.integers(0, 6)),
    st.builds("cuda:{}".format, st.integers(0, 11)),
    st.sampled_from(("cpu", "disk")),
)


@given(st.lists(NAMES, unique=True, min_size=1))
def test_a_list_of_devices_stands_for_each_of_them_and_no_other(names: list[str]) -> None:
    assert spelled(phrases.device_list(names)) == set(names)


def test_lists_of_devices() -> None:
    gpus = [f"node{node}/cuda:{number}" for node in range(8) for number in range(8)]
    assert phrases.device_list(gpus) == "node0–7/cuda:0–7"
    assert phrases.device_list(["node1/cpu", "node0/cuda:0", "node2/cpu"]) == "node1/cpu, node0/cuda:0 and node2/cpu"
    assert phrases.device_list([]) == "nothing"


# Experts on the CPU: two rows, so that decode steps have 2 tokens and the prefill 128


@pytest.mark.parametrize(
    ("limits", "there", "not_there"),
    [
        ((0, 0), None, ""),
        ((2, 2), "up to 2 tokens over all rows, as decode steps are; in the longer prefill they are copied", "every"),
        ((2, 8), "up to 2 to 8 tokens, by layer, over all rows, as decode steps are", "every"),
        ((128, 128), "as every pass of this call is", "copied"),
        ((1, 1), "up to 1 token over all rows, and copied in longer ones", "decode"),
        ((1, 128), "and copied in longer ones", "every"),
    ],
)
def test_passes_in_which_the_cpu_computes_experts(limits: tuple[int, int], there: str | None, not_there: str) -> None:
    said = phrases.cpu_experts(waiting(plan_of(), *limits))
    if there is None:
        assert said is None
    else:
        assert said is not None
        assert there in said
        assert not_there not in said


def test_experts_that_stay_are_not_said_to_run_on_the_cpu() -> None:
    plan = waiting(plan_of(), 8, 8)
    stay = tuple(dataclasses.replace(p, home="cuda:0", memory="device") for p in plan.placements)
    assert all(not memory.waiting_slices(p, g) for p, g in memory.with_groups(plan.graph, stay))
    assert phrases.cpu_experts(dataclasses.replace(plan, placements=stay)) is None


# Proof, precisions, nodes


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("latency", ("the whole call", 20, 100)), ("max-batch", ("the whole call", 20, 100)),
        ("ttft", ("the prefill", 20, 30)), ("tpot", ("a decode step", 20, 7)),
    ],
)  # fmt: skip
def test_a_bound_stands_beside_what_the_objective_counts(objective: str, expected: tuple[str, int, int]) -> None:
    plan = plan_of(workload=Workload(objective=objective), solver=solver(25, 20))  # type: ignore[arg-type]
    assert phrases.bound(plan) == expected


def test_memory_is_proven_in_bytes() -> None:
    plan = plan_of(workload=Workload(objective="fit"), solver=solver(200 * MB, 150 * MB, in_bytes=True))
    assert phrases.bound(plan) is None
    assert phrases.objective(plan) == "200.0 MB, bound 150.0 MB"
    assert phrases.proof(plan) == "Not proven: another placement may take less memory, by at most 25.0%"


def test_a_search_cut_short_says_what_ended_it() -> None:
    assert phrases.cut_short(solver(2, 1)) is None
    assert "time limit" in str(phrases.cut_short(solver(2, 1, cut_short="time limit")))
    assert "interrupt" in str(phrases.cut_short(solver(2, 1, cut_short="interrupt")))


def test_precisions_are_told_with_their_bytes() -> None:
    plan = plan_of()
    assert phrases.precisions(plan) is None
    stored = (dataclasses.replace(plan.placements[0], dtype="nf4", nbytes=3 * MB), plan.placements[1])
    assert "3.00 MB in nf4, the others in bfloat16" in str(phrases.precisions(plan_of(placements=stored)))


def test_several_nodes_are_told_and_the_fullest_host_while_loading() -> None:
    hardware = Hardware.from_options("24GB/24GB")
    plan = plan_of(hardware=hardware)
    placed = tuple(dataclasses.replace(p, run_on=f"node{n}/cuda:0") for n, p in enumerate(plan.placements))
    assert "2 nodes" in str(phrases.over_nodes(dataclasses.replace(plan, placements=placed)))
    one = tuple(dataclasses.replace(p, run_on="node1/cuda:0") for p in plan.placements)
    assert phrases.over_nodes(dataclasses.replace(plan, placements=one)) is None
    assert phrases.load_peak_bytes(plan) == 9

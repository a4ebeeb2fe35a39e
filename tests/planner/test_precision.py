"""Lower precisions: bytes by formulas of the tests' own, losses, and the solver's choice against brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brute_force import Ledger
from drawn_cases import chains, check_against_brute_force, choices_of_precision, examples, networks
from planner.errors import InputError
from planner.graph import LayerKind, Tensor, WeightGroup
from planner.precision import DEFAULT_SENSITIVITY, PRECISIONS, losses, stored_as
from planner.rules import NO_RULES, Rules, Sensitivity
from planner.workload import Workload
from small_cases import MIB, Case, build_graph, end_kind, gpu, group, machine, plan_of, span


@examples(150)
@given(case=chains(rules=choices_of_precision(), gpus=("one", "alike"), most_groups=2))
def test_precisions_in_chains_are_chosen_as_well_as_brute_force_does(case: Case) -> None:
    check_against_brute_force(case)


@examples(150)
@given(case=networks(rules=choices_of_precision(), gpus=("one", "alike")))
def test_precisions_in_graphs_are_chosen_as_well_as_brute_force_does(case: Case) -> None:
    check_against_brute_force(case, named=True)


@given(slices=st.integers(1, 4), rows=st.integers(1, 9), columns=st.integers(1, 200))
def test_bytes_are_those_of_elements_and_scales(slices: int, rows: int, columns: int) -> None:
    shape = (slices, rows, columns) if slices > 1 else (rows, columns)
    elements = rows * columns
    matrix = Tensor(name="w", shape=shape, dtype="bfloat16", nbytes=2 * slices * elements)
    bias = Tensor(name="b", shape=(slices, rows) if slices > 1 else (rows,), dtype="bfloat16", nbytes=2 * slices * rows)
    one = WeightGroup(name="g", slices=slices, used_slices=1, streamable=True, tensors=(matrix, bias))
    blocks = (elements + 63) // 64
    wanted = {"int8": elements + 4 * rows, "nf4": (elements + 1) // 2 + 4 * blocks}
    assert set(wanted) == set(PRECISIONS)
    for dtype, nbytes in wanted.items():
        assert [tensor.nbytes for tensor in stored_as(one, dtype).tensors] == [slices * nbytes, bias.nbytes]
    assert stored_as(one, None) is one


def test_what_is_no_matrix_of_floats_stays_as_it_is() -> None:
    vector = Tensor(name="norm", shape=(4096,), dtype="bfloat16", nbytes=8192)
    whole = Tensor(name="ids", shape=(64, 64), dtype="int64", nbytes=64 * 64 * 8)
    buffer = Tensor(name="mask", shape=(64, 64), dtype="float32", nbytes=64 * 64 * 4, buffer=True)
    kept = WeightGroup(name="g", slices=1, used_slices=1, streamable=True, tensors=(vector, whole, buffer))
    for dtype in PRECISIONS:
        assert stored_as(kept, dtype).tensors == kept.tensors


def test_a_precision_that_is_not_known_is_refused() -> None:
    with pytest.raises(InputError, match="int8, nf4"):
        stored_as(group("attn", 1024), "int3")


def model(*, tied: bool = False, gpu_mib: int = 48, rules: Rules = NO_RULES) -> Case:
    kinds = [end_kind("Embedding", MIB), end_kind("Head", MIB)]
    kinds.append(LayerKind(name="Block", groups=(group("attn", 4 * MIB), group("mlp", 8 * MIB))))
    work = [span(held=100, peak=MIB, kv=(0, 4096), flops=10**9, moved=10**6)] * 3
    ties = (("block.0.attn.weight", "block.1.attn.weight"),) if tied else ()
    graph = build_graph(
        kinds, [work] * 3, [("embed", 0), *[(f"block.{i}", 2) for i in range(2)], ("head", 1)], ties=ties
    )
    gpus = [gpu(0, product="big", flops=10**14, rate=10**12)]
    sizes = {"cuda:0": gpu_mib * MIB, "cpu": 400 * MIB, "disk": 0}
    return Case(graph, machine(gpus, sizes), Workload(prompt_tokens=8, new_tokens=8), rules)


def test_all_of_a_rows_weights_lose_what_the_row_says() -> None:
    graph = model().graph
    table = (Sensitivity(groups=".*attn", dtype="int8", loss=0.3), Sensitivity(groups=".*", dtype="int8", loss=1.0))
    found = losses(graph, "int8", table)
    assert set(found) == {(2, "attn"), (2, "mlp")}
    assert 2 * found[2, "attn"] == pytest.approx(0.3)
    assert 2 * found[2, "mlp"] == pytest.approx(1.0)
    assert losses(graph, "nf4", table) == {}
    assert all(losses(graph, dtype, ()) for dtype in PRECISIONS)
    assert {row.dtype for row in DEFAULT_SENSITIVITY} == set(PRECISIONS)


def test_tied_weights_keep_their_precision() -> None:
    """One storage cannot be had in two precisions; of every layer of that kind, none is converted."""
    table = (Sensitivity(groups=".*", dtype="int8", loss=0.1),)
    assert set(losses(model(tied=True).graph, "int8", table)) == {(2, "mlp")}


def test_nothing_is_lost_beyond_the_budget() -> None:
    table = (Sensitivity(groups=".*", dtype="int8", loss=1.0),)
    converted = []
    for budget in (0.0, 0.1701, 0.5001, 1.0001):
        case = model(rules=Rules(dtypes=("int8",), quality_budget=budget, sensitivity=table))
        plan = plan_of(case)
        each = losses(case.graph, "int8", table)
        lost = sum(each[2, p.group] for p in plan.placements if p.dtype is not None)
        assert lost <= budget
        converted.append(lost)
        assert plan.solver is not None
        ledger = Ledger(case)
        assert plan.solver.objective_ns == ledger.best()
    assert converted[0] == 0.0
    assert max(converted) > 0.0

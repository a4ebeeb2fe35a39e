"""Layer graphs written by hand: the example of docs/layer-graph.md is read and planned, and every key stands there."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from pathlib import Path

import pytest

from brute_force import Ledger
from planner.errors import PlanFormatError
from planner.graph import (
    Bucket,
    Edge,
    Layer,
    LayerGraph,
    LayerKind,
    MeasuredTime,
    Pass,
    Span,
    Stored,
    Tensor,
    WeightGroup,
)
from planner.holdings import Handed, Holding, Lasting, Moment, Share, Takers
from planner.verify import verify_plan
from planner.workload import Workload
from small_cases import MIB, Case, gpu, machine, plan_of

PAGE = (Path(__file__).parents[2] / "docs" / "layer-graph.md").read_text(encoding="utf-8")
EXAMPLE = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)[0]
VALUES = (
    LayerGraph, LayerKind, WeightGroup, Bucket, Tensor, Stored, Layer, Edge, Pass, Span, MeasuredTime,
    Holding, Moment, Share, Handed, Lasting, Takers,
)  # fmt: skip


def case(graph: LayerGraph, *, gpu_mib: int) -> Case:
    gpus = [gpu(i, product="big", flops=10**14, rate=10**12) for i in range(2)]
    sizes = {"cuda:0": gpu_mib * MIB, "cuda:1": gpu_mib * MIB, "cpu": 64 * MIB, "disk": 64 * MIB}
    return Case(graph, machine(gpus, sizes), Workload(prompt_tokens=8, new_tokens=8))


@pytest.mark.parametrize("gpu_mib", [34, 64])
def test_the_example_is_read_and_planned(gpu_mib: int) -> None:
    graph = LayerGraph.from_json(EXAMPLE)
    small = case(graph, gpu_mib=gpu_mib)
    plan = plan_of(small)
    assert verify_plan(plan) == ()
    assert plan.solver is not None
    assert plan.solver.status == "optimal"
    assert plan.solver.objective_ns == Ledger(small, named=True).best()
    run_on = dict(zip((layer.name for layer in graph.layers), plan.run_on(), strict=True))
    assert run_on["left"] == run_on["join"]


def test_the_example_comes_back_from_its_own_json() -> None:
    graph = LayerGraph.from_json(EXAMPLE)
    assert LayerGraph.from_json(graph.to_json()) == graph
    assert LayerGraph.from_dict(json.loads(graph.to_json())) == graph


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value.__name__)
def test_every_key_is_described(value: type) -> None:
    for field in dataclasses.fields(value):
        assert f"`{field.name}`" in PAGE, f"docs/layer-graph.md says nothing of {value.__name__}.{field.name}"


def changed(path: tuple[str | int, ...], value: object) -> str:
    data = json.loads(EXAMPLE)
    at: typing.Any = data
    for key in path[:-1]:
        at = at[key]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("layers", 0, "kind"), 9, "kind 9"),
        (("layers", 1, "name"), "embed", "twice"),
        (("edges", 0, "target"), 0, "forward"),
        (("edges", 0, "prefill_bytes"), -1, "less than nothing"),
        (("passes", 0, "spans", 0, "count"), 2, "spans"),
        (("measured", 0, "layer"), 40, "cannot be"),
        (("kinds", 1, "groups", 0, "slices"), 3, "slices"),
        (("kinds", 0, "name"), None, "lacks name"),
        (("speed",), 1, "unknown speed"),
        (("batch_size",), "two", "batch_size"),
    ],
)
def test_what_contradicts_itself_is_refused(path: tuple[str | int, ...], value: object, message: str) -> None:
    with pytest.raises(PlanFormatError, match=message):
        LayerGraph.from_json(changed(path, value))


WHERE = Moment(shares=(Share(back=0, nbytes=5),), handed=(Handed(maker=None, taker=0, nbytes=7),), lasting=(0,))
TENSOR = Lasting(maker=None, nbytes=9, takers=(Takers(first=0, count=1, step=1),))


def holding(**changes: typing.Any) -> Holding:
    return Holding(**{"layer": 1, "count": 1, "moments": (WHERE,), **changes})


@pytest.mark.parametrize(
    ("held", "tensor", "says"),
    [
        (holding(count=9), TENSOR, "holdings name layers 1 to 9 of"),
        (holding(count=0), TENSOR, "holdings name layers 1 to 0 of"),
        (holding(moments=(dataclasses.replace(WHERE, lasting=(1,)),)), TENSOR, "not among `lasting`"),
        (holding(moments=(dataclasses.replace(WHERE, shares=(Share(back=2, nbytes=1),)),)), TENSOR, "is not there"),
        (holding(), dataclasses.replace(TENSOR, maker=99), "names a layer that is not there"),
        (holding(), dataclasses.replace(TENSOR, takers=(Takers(first=0, count=1, step=0),)), "go nowhere"),
    ],
)
def test_what_is_held_must_be_of_layers_that_are_there(held: Holding, tensor: Lasting, says: str) -> None:
    graph = LayerGraph.from_json(EXAMPLE)

    def with_holdings(holdings: tuple[Holding, ...], lasting: tuple[Lasting, ...]) -> LayerGraph:
        first = dataclasses.replace(graph.passes[0], holdings=holdings, lasting=lasting)
        return dataclasses.replace(graph, passes=(first, *graph.passes[1:]))

    good = with_holdings((holding(),), (TENSOR,))
    assert LayerGraph.from_json(good.to_json()) == good
    with pytest.raises(PlanFormatError, match=says):
        LayerGraph.from_json(with_holdings((held,), (tensor,)).to_json())

"""The benchmark of predictions against measurements: its files, its arithmetic, and what it makes of single rows."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import types
from typing import Any

import pytest

import planner
import simulate
import validation
from planner.graph import LayerGraph, LayerKind
from planner.hardware import Hardware
from planner.models import resolve_model
from planner.units import GIB
from small_cases import MIB, build_graph, end_kind, gpu, group, machine, span
from validation import Row


def entry(name: str) -> dict[str, str]:
    (found,) = [each for each in validation._entries() if each["id"] == name]
    return found


def made(name: str, predicted: float, measured: float, *, unit: str = "s", **more: Any) -> Row:
    options: dict[str, Any] = {
        "kind": "published", "metric": "decode", "inputs": "assumed", "note": "", "error": predicted / measured - 1,
    }  # fmt: skip
    return Row(id=name, predicted=predicted, measured=measured, unit=unit, **{**options, **more})


def test_every_row_names_its_source_a_known_model_and_a_known_machine() -> None:
    entries = validation._entries()
    assert len({each["id"] for each in entries}) == len(entries) >= 60
    for each in entries:
        assert each["source"]
        assert float(each["value"]) > 0
        assert Hardware.from_options(validation.GPUS[each["gpus"]]).gpus
        if each["metric"] not in ("gemm", "device copy"):
            assert resolve_model(each["model"]).source == "catalogue"
    assert set(validation.HELD) <= {each["id"] for each in entries}


def test_rates_that_the_catalogue_was_made_of_and_engines_that_are_not_modelled_are_not_scored() -> None:
    (h200,) = Hardware.from_options("1xh200").gpus
    gemm = validation._of(entry("e-gemm-a100"))
    assert gemm.predicted == round(h200.flops_for("bfloat16") / 1e12, 5)
    assert gemm.error == round(h200.flops_for("bfloat16") / 1e12 / 788 - 1, 4)
    # The catalogue's fractions were taken from these rows, which prove nothing of them.
    rates = [gemm, validation._of(entry("copy-h200"))]
    assert {each.inputs for each in rates} == {"none"}
    assert validation.summary(rates) == []
    for name in ("flexgen-opt30-deepspeed", "flexgen-opt30-flexgen", "moeinf-mixtral", "flexgen-opt67-accelerate"):
        found = validation._of(entry(name))
        assert (found.predicted, found.error, found.inputs) == (None, None, "none")
        assert found.note


def test_a_sources_gb_are_gib_where_its_figure_is_less_than_the_weights() -> None:
    # GPT-J: 6,050,882,784 parameters of two bytes, and 11.7 is told.
    found = validation._of(entry("acc-gptj-fp16-mem"))
    assert found.inputs == "stated"
    assert found.predicted is not None
    # Buffers: the causal masks and tables of positions that this version of transformers has.
    assert 0 <= found.predicted * GIB - 2 * 6_050_882_784 < 0.02 * GIB


def test_errors_are_summed_up_by_what_is_known_of_the_inputs() -> None:
    rows = [
        made("a", 1.1, 1.0), made("b", 1.5, 2.0), made("c", 3.0, 4.0), made("d", 2.0, 1.0, inputs="stated"),
        made("e", 5.0, 5.0, unit="GB"), made("f", 9.0, 3.0, decided_by="host"),
        dataclasses.replace(made("g", 1.0, 1.0), predicted=None, error=None),
    ]  # fmt: skip
    told = {(each["family"], each["inputs"]): each for each in validation.summary(rows)}
    assert set(told) == {("time", "assumed"), ("time", "stated"), ("memory", "assumed"), ("host time", "assumed")}
    time = told["time", "assumed"]
    assert (time["rows"], time["median_error"], time["worst_error"]) == (3, 0.25, 0.25)
    assert time["rank_correlation"] == 1.0
    assert told["time", "stated"]["rank_correlation"] is None


def test_rank_correlation_is_spearmans() -> None:
    for order in itertools.permutations(range(4)):
        rows = [made(str(place), 10.0 ** (1 + place), 5.0 + rank) for place, rank in enumerate(order)]
        squares = sum((place - rank) ** 2 for place, rank in enumerate(order))
        assert validation._rank_correlation(rows) == round(1 - 6 * squares / (4 * 15), 3)
        # Tokens a second count the other way round, so that they may stand beside seconds.
        mixed = [*rows[:3], made("3", 1e-4, 1 / (5.0 + order[3]), unit="tokens/s")]
        assert validation._rank_correlation(mixed) == validation._rank_correlation(rows)


def small() -> tuple[LayerGraph, Hardware]:
    kinds = [end_kind("Embedding", GIB), LayerKind(name="Block", groups=(group("attn", 2 * GIB),))]
    spans = [[span(held=100, peak=MIB, flops=10**6, moved=10**6, operators=40)] * 3 for _ in kinds]
    layers = [("embed", 0), *[(f"layers.{i}", 1) for i in range(8)]]
    devices = [gpu(i, product="big", flops=10**14, rate=10**12) for i in range(2)]
    sizes = {"cuda:0": 64 * GIB, "cuda:1": 64 * GIB, "cpu": 64 * GIB, "disk": 64 * GIB}
    return build_graph(kinds, spans, layers), machine(devices, sizes)


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ((20.0, 0.0, 0.0), [0] * 9),
        ((5.1, 4.5, 8.0), [0, 0, 0, 1, 1, "cpu", "cpu", "cpu", "cpu"]),
        ((5.1, 4.5, 4.0), [0, 0, 0, 1, 1, "cpu", "cpu", "disk", "disk"]),
        # A tenth more than what was told of all: nothing goes to a disk that nobody speaks of.
        ((5.9, 4.9, 6.9), [0, 0, 0, 1, 1, "cpu", "cpu", "cpu", "cpu"]),
    ],
)
def test_a_map_is_filled_in_order_with_what_is_told(held: tuple[float, float, float], expected: list[Any]) -> None:
    graph, hardware = small()
    work = planner.Workload(prompt_tokens=8, new_tokens=3)
    plan = planner.plan_from_device_map(graph, {"": "cpu"}, hardware=hardware, workload=work)
    found = validation._in_order(plan, held)
    assert [found[layer.name] for layer in graph.layers] == expected


def test_the_implied_price_of_an_operator_is_the_one_that_would_be_right() -> None:
    graph, hardware = small()
    work = planner.Workload(prompt_tokens=8, new_tokens=3)
    price = 23_400
    dear = tuple(dataclasses.replace(device, operator_ns=price) for device in hardware.devices)
    right = planner.plan_from_device_map(
        graph, {"": 0}, hardware=dataclasses.replace(hardware, devices=dear), workload=work
    )
    plan = planner.plan_from_device_map(graph, {"": 0}, hardware=hardware, workload=work)
    for metric, unit in (("decode", "s/token"), ("throughput", "tokens/s")):
        told = {**entry("acc-gptj-fp16"), "metric": metric, "unit": unit}
        told["value"] = str(validation._value(told, right, simulate.run(right)))
        found = validation._timed(told, plan, simulate.run, ["x"])
        assert found.implied_operator_us == pytest.approx(price / 1000, abs=0.1)
        assert found.note == "x; 2 us of host an operator"
        assert (found.inputs, found.decided_by) == ("assumed", "host")
        free = tuple(dataclasses.replace(device, operator_ns=0) for device in hardware.devices)
        for places, decided in (({"": 0}, "device"), ({"": 0, "layers.3": "cpu"}, "copies")):
            on = dataclasses.replace(hardware, devices=free)
            without = planner.plan_from_device_map(graph, places, hardware=on, workload=work)
            assert validation._timed(told, without, simulate.run, []).decided_by == decided


def test_calibrated_rows_stand_beside_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "validation_calibrated", None)
    assert validation.calibrated("") == []
    module = types.ModuleType("validation_calibrated")
    module.rows = lambda: [{"id": "llama-disk", "metric": "decode", "predicted": 1.2, "measured": 1.0}]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "validation_calibrated", module)
    (found,) = validation.calibrated("")
    assert (found.kind, found.error, found.inputs) == ("calibrated", 0.2, "stated")
    assert validation.calibrated("mixtral") == []


def test_the_table_is_as_wide_as_a_terminal() -> None:
    rows = [
        made("qwen25-0.5b-30720-mem", 1.1, 1.0, note="an assumption " * 12), made("b", 1.5, 2.0, inputs="stated"),
        dataclasses.replace(made("c" * 40, 1.0, 1.0), predicted=None, error=None, inputs="none", note="why"),
    ]  # fmt: skip
    text = validation.table(rows, validation.summary(rows))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "+10.0%" in text

"""Timelines: how busy lanes are, tables, traces, and energy; against sums by hand."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

import simulate
from planner.hardware import Hardware
from planner.products import catalogue
from planner.workload import Workload
from simulate import Interval, MemorySample, Timeline
from simulate.energy import watts_of
from small_cases import MIB, Case, build_graph, end_kind, gpu, machine, plan_of, span


def interval(lane: str, start: int, end: int, step: int) -> Interval:
    return Interval(lane=lane, start_ns=start, end_ns=end, action="run", label="x", step=step)


def sample(time: int, device: str, kv: int) -> MemorySample:
    return MemorySample(
        time_ns=time, device=device, weights=100, kv_cache=kv, activations=5, slots=1, workspace=2, context=3
    )


# A prefill of 100 ns and four decode steps of 10, 10, 20 and 20, of which the second and third were not kept.
TIMELINE = Timeline(
    intervals=(
        interval("a", 0, 50, 0), interval("b", 60, 104, 0), interval("a", 102, 108, 1), interval("a", 140, 160, 4),
        interval("b", 150, 170, 4),
    ),
    memory=(sample(0, "a", 0), sample(40, "a", 10), sample(41, "b", 0)),
    simulated_steps=(0, 1, 4),
    step_ns=(100, 10, 10, 20, 20),
)  # fmt: skip


def test_a_lane_is_as_busy_as_it_is_in_what_was_kept() -> None:
    uses = {use.lane: (use.prefill, use.decode) for use in TIMELINE.utilisation()}
    # Kept of the decode steps are 100 to 110 and 140 to 160; what goes on after the call does not count.
    assert uses == {"a": (0.5, (6 + 20) / 30), "b": (0.4, (4 + 10) / 30)}
    assert TIMELINE.bottleneck() == "a"
    assert TIMELINE.bottleneck(prefill=True) == "a"
    assert TIMELINE.step_starts() == (0, 100, 110, 120, 140, 160)


def test_stretches_that_were_kept_are_what_counts() -> None:
    kept = dataclasses.replace(TIMELINE, kept_ns=((0, 20), (80, 100), (140, 160)))
    uses = {use.lane: (use.prefill, use.decode) for use in kept.utilisation()}
    assert uses == {"a": (0.5, 1.0), "b": (0.5, 0.5)}


def test_nothing_busy_has_no_bottleneck() -> None:
    empty = Timeline(intervals=(), memory=(), simulated_steps=(0,), step_ns=(7,))
    assert empty.utilisation() == ()
    assert empty.bottleneck() is None


def test_memory_is_a_table_by_kind() -> None:
    table = TIMELINE.memory_frame()
    assert list(table["time_ns"]) == [0, 40, 41]
    assert list(table["kv_cache"]) == [0, 10, 0]
    assert list(table["total"]) == [each.total_bytes for each in TIMELINE.memory]


def test_a_trace_has_memory_by_kind() -> None:
    events: list[dict[str, Any]] = json.loads(TIMELINE.to_chrome_trace())["traceEvents"]
    counters = [event for event in events if event["ph"] == "C"]
    assert [(event["name"], event["ts"]) for event in counters] == [
        ("a bytes", 0),
        ("a bytes", 0.04),
        ("b bytes", 0.041),
    ]
    assert counters[1]["args"] == {
        "weights": 100, "kv_cache": 10, "activations": 5, "slots": 1, "workspace": 2, "context": 3,
    }  # fmt: skip


def case(product: str) -> Case:
    kinds = [end_kind("Embedding", MIB), end_kind("Head", MIB)]
    works = [span(flops=10**11, moved=10**6), span(flops=10**10, moved=10**6), span(flops=10**10, moved=10**6)]
    graph = build_graph(kinds, [works, works], [("embed", 0), ("head", 1)])
    device = gpu(0, product=product, flops=10**14, rate=10**12)
    return Case(graph, machine([device], {"cuda:0": 2**30, "cpu": 2**32, "disk": 0}), Workload(new_tokens=5))


def test_energy_is_power_times_time() -> None:
    plan = plan_of(case("rtx4090"))
    timeline = simulate.run(plan)
    # 450 W at most; two layers of 1 ms in the prefill and of 0.1 ms in each step, with hardly a gap.
    found = simulate.energy_joules(plan, timeline)
    assert timeline.total_ns == pytest.approx(2.8e6, rel=0.01)
    assert found["cuda:0"] == pytest.approx(450 * 2.8e-3, rel=0.01)
    assert found["cpu"] == pytest.approx(125 * 0.1 * 2.8e-3, rel=0.01)
    named = plan_of(case("NVIDIA GeForce RTX 4090 24GB"))
    assert simulate.energy_joules(named, simulate.run(named)) == found
    unknown = plan_of(case("a card of one's own"))
    assert "cuda:0" not in simulate.energy_joules(unknown, simulate.run(unknown))


def test_every_product_that_is_planned_for_has_a_power() -> None:
    for product in catalogue().values():
        if product.refused is None:
            (device,) = Hardware.from_options(f"1x{product.key}").gpus
            watts = watts_of(device)
            assert watts is not None
            assert 50 < watts < 2000

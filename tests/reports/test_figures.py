"""The figures show the plan's and the timeline's own numbers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest
from plotly.offline import get_plotlyjs

from planner.hardware import Hardware
from planner.phrases import unused
from planner.plan import Plan
from planner.units import GB
from reports.figures import memory_by_device, placement_map, placement_words
from reports.page import page_html
from reports.placement_rows import layer_ranges, placement_rows
from reports.style import CPU_COLOUR, GPU_COLOURS, ink_on, place_colours
from reports.time_figures import (
    MAX_BARS,
    MAX_SAMPLES,
    lane_colour,
    memory_over_time,
    merged,
    ordered_lanes,
    step_lanes,
    thinned,
)
from simulate.timeline import Interval, MemorySample, Timeline


def test_bars_are_the_predicted_bytes(plan: Plan) -> None:
    assert plan.prediction is not None
    figure = memory_by_device(plan)
    for pool in plan.hardware.pools:
        bars = [trace for trace in figure.data if trace.meta == pool.name]
        assert sum(bar.x[0] for bar in bars) == plan.prediction.peak_bytes[pool.name]
        shown = {bar.name.replace("KV cache", "kv_cache"): bar.x[0] for bar in bars}
        assert shown == {kind: n for kind, n in plan.prediction.peak_breakdown[pool.name].items() if n}
    assert figure.layout.barmode == "stack"


def test_capacity_lines_stand_at_capacity(plan: Plan, timeline: Timeline) -> None:
    limits = [shape for shape in memory_by_device(plan).layout.shapes if shape.name == "capacity"]
    assert [shape.x0 for shape in limits] == [pool.capacity_bytes for pool in plan.hardware.pools]
    assert [shape.x1 for shape in limits] == [pool.capacity_bytes for pool in plan.hardware.pools]
    limits = [shape for shape in memory_over_time(plan, timeline).layout.shapes if shape.name == "capacity"]
    over_time = ("cuda:0", "cuda:1", "cpu")
    assert [shape.y0 for shape in limits] == [plan.hardware.pool(name).capacity_bytes for name in over_time]


def test_the_map_covers_every_group_in_proportion(plan: Plan) -> None:
    figure = placement_map(plan)
    names = [layer.name for layer in plan.graph.layers]
    covered: dict[tuple[str, str], dict[str, float]] = {}
    for trace in figure.data:
        for position, height, words in zip(trace.x, trace.y, trace.customdata or (), strict=bool(trace.customdata)):
            assert names[int(position)] == words[0]
            covered.setdefault((words[0], words[1]), {})[trace.name] = height
    assert set(covered) == {(placement.layer, placement.group) for placement in plan.placements}
    assert covered["model.layers.0", "mlp.experts"] == pytest.approx({"cuda:0": 0.6 * 6 / 8, "cpu": 0.6 * 2 / 8})
    assert covered["model.layers.11", "mlp.experts"] == pytest.approx({"disk": 0.6})
    assert covered["lm_head", "weights"] == pytest.approx({"cuda:1": 0.6})
    strips = [trace for trace in figure.data if trace.text]
    assert [(trace.text[0], round(trace.width[0] + 0.1)) for trace in strips] == [
        ("cuda:0", 7),
        ("cuda:1", 7),
    ]


def test_rows_hold_every_placement_once(plan: Plan) -> None:
    rows = placement_rows(plan)
    assert sum(row.nbytes for row in rows) == sum(placement.nbytes for placement in plan.placements)
    assert sorted((name, row.group) for row in rows for name in row.names) == sorted(
        (placement.layer, placement.group) for placement in plan.placements
    )
    words = [row.words() for row in rows]
    assert "model.layers.0\N{EN DASH}5 · self_attn · cuda:0" in words
    assert "model.layers.0\N{EN DASH}5 · mlp.experts · cpu (pinned) → cuda:0, 6 of 8 stay" in words
    assert "model.layers.11 · mlp.experts · disk → cuda:1" in words


def test_ranges() -> None:
    names = ["embed", "m.0", "m.1", "m.2", "m.4", "m.6", "m.7", "d.0", "d.1", "head", ""]
    assert layer_ranges(names) == [
        "embed", "m.0\N{EN DASH}2", "4", "6\N{EN DASH}7", "d.0\N{EN DASH}1", "head", "(the model itself)"
    ]  # fmt: skip
    assert layer_ranges([]) == []


def test_memory_over_time_follows_the_samples(plan: Plan, timeline: Timeline) -> None:
    figure = memory_over_time(plan, timeline)
    held = [trace for trace in figure.data if trace.name == "held"]
    for device, trace in zip(("cuda:0", "cuda:1", "cpu"), held, strict=True):
        assert trace.line.shape == "hv"
        assert max(y for y in trace.y if y is not None) == timeline.peak_bytes(device)
        assert max(x for x in trace.x if x is not None) == pytest.approx(timeline.total_ns / 1e9)
    # Between steps 1 and 63 nothing was simulated: cuda:0 is drawn dotted there, from one to the other.
    gap = next(trace for trace in figure.data if trace.name == "not simulated")
    assert gap.line.dash == "dot"
    assert gap.x[:2] == pytest.approx((1.05, 1.0 + 62 * 0.05))


def test_lanes_show_each_step_from_its_start(plan: Plan, timeline: Timeline) -> None:
    figure = step_lanes(plan, timeline)
    lanes = ["cpu→cuda:0 copy", "cuda:0 compute", "cpu→cuda:1 copy", "cuda:1 compute"]
    assert list(reversed(figure.layout.yaxis.categoryarray)) == lanes
    for step, traces in ((0, figure.data[:4]), (1, figure.data[4:])):
        for lane, trace in zip(lanes, traces, strict=True):
            assert trace.name == lane
            assert sum(trace.x) == pytest.approx(timeline.busy_ns(lane, step) / 1e9)
            assert min(trace.base) >= 0
            assert max(trace.base) < timeline.step_ns[step] / 1e9
    last = step_lanes(plan, timeline, steps=(63,))
    assert len(last.data) == 4


def test_many_intervals_become_few_bars(plan: Plan, sample: Callable[..., MemorySample]) -> None:
    count = 40_000
    intervals = tuple(
        Interval(lane=f"cuda:{n % 2} compute", start_ns=100 * n, end_ns=100 * n + 90, action="run",
                 label=f"run {n}", step=0)
        for n in range(count)
    )  # fmt: skip
    bars = merged(intervals, MAX_BARS)
    assert 2 <= len(bars) <= MAX_BARS
    assert sum(bar.count for bar in bars) == count
    assert sum(bar.busy_ns for bar in bars) == 90 * count
    assert all(bar.busy_ns <= bar.end_ns - bar.start_ns for bar in bars)
    samples = tuple(sample(100 * n, "cuda:0", activations=7 * GB if n == 12_345 else n % 7) for n in range(count))
    kept = thinned(samples, MAX_SAMPLES)
    assert len(kept) <= MAX_SAMPLES + 2
    assert max(entry.total_bytes for entry in kept) == 7 * GB
    timeline = Timeline(intervals=intervals, memory=samples, simulated_steps=(0,), step_ns=(100 * count,))
    assert len(page_html(plan, timeline)) - len(get_plotlyjs()) < 1_000_000


def test_few_intervals_are_left_alone(timeline: Timeline) -> None:
    bars = merged(timeline.intervals, MAX_BARS)
    assert sorted((bar.lane, bar.start_ns, bar.end_ns) for bar in bars) == sorted(
        (interval.lane, interval.start_ns, interval.end_ns) for interval in timeline.intervals
    )


def test_each_place_has_one_colour(plan: Plan, timeline: Timeline) -> None:
    colours = place_colours(plan.hardware)
    assert len(set(colours.values())) == 4
    for trace in placement_map(plan).data:
        place = trace.text[0] if trace.text else trace.name
        assert trace.marker.color == colours[place]
    for trace in step_lanes(plan, timeline).data:
        assert trace.marker.color == colours[re.split("→| ", trace.name)[0]]
    eight = place_colours(Hardware.from_options("8x80GB"))
    assert len(set(eight.values())) == 10
    assert set(place_colours(Hardware.from_options("64x80GB")).values()) == set(eight.values())
    assert ink_on("#ffffff") != ink_on("#000000")
    assert set(GPU_COLOURS) < set(eight.values())


def test_a_machine_of_several_nodes_shows_the_memories_that_hold_something(plan: Plan) -> None:
    assert plan.prediction is not None
    hardware = Hardware.from_options("24GB/2x24GB")
    peaks = {"node0/cuda:0": GB, "node1/cpu": 2 * GB}
    parts = {name: {"weights": nbytes} for name, nbytes in peaks.items()}
    prediction = dataclasses.replace(plan.prediction, peak_bytes=peaks, peak_breakdown=parts)
    spread = dataclasses.replace(plan, hardware=hardware, prediction=prediction)
    assert {trace.meta for trace in memory_by_device(spread).data} == set(peaks)
    assert len(memory_by_device(spread).layout.annotations) == len(peaks)
    assert set(unused(spread)) == {pool.name for pool in hardware.pools} - set(peaks)
    assert unused(plan) == []
    assert len(memory_by_device(dataclasses.replace(spread, prediction=None)).layout.annotations) == len(hardware.pools)


def test_lanes_that_links_share_stand_by_what_they_lead_to(plan: Plan) -> None:
    switched = dataclasses.replace(plan, hardware=Hardware.from_options("2x24GB", gpus_per_switch=2))
    copied = switched.hardware.link("cpu", "cuda:0").lane
    assert copied is not None
    lanes = ["cuda:1 compute", "cuda:0 compute", copied, "cpu compute"]
    assert ordered_lanes(switched, lanes) == ["cpu compute", copied, "cuda:0 compute", "cuda:1 compute"]
    assert lane_colour(switched, copied) == CPU_COLOUR


def test_what_leaves_a_node_has_its_hosts_colour(plan: Plan) -> None:
    nodes = dataclasses.replace(plan, hardware=Hardware.from_options("24GB/24GB"))
    sent = nodes.hardware.link("node0/cpu", "node1/cpu").lane
    assert sent is not None
    assert lane_colour(nodes, sent) == CPU_COLOUR
    assert lane_colour(nodes, "node1/cuda:0→node1/cpu copy") == place_colours(nodes.hardware)["node1/cuda:0"]


def test_rows_and_cells_say_where_experts_compute_and_in_which_precision(plan: Plan) -> None:
    placed = tuple(
        dataclasses.replace(p, cpu_up_to_tokens=4, dtype="int8") if p.memory == "pinned" else p for p in plan.placements
    )
    changed = dataclasses.replace(plan, placements=placed)
    experts = [row for row in placement_rows(changed) if row.memory == "pinned"]
    assert experts
    assert all(row.place().endswith("stay, computed there up to 4 tokens, in int8") for row in experts)
    assert all("computed" not in row.place() for row in placement_rows(changed) if row.memory != "pinned")
    words = [placement_words(p, 8) for p in placed if p.memory == "pinned"]
    assert all(text.endswith("wait in cpu (pinned), computed there up to 4 tokens, in int8") for text in words)

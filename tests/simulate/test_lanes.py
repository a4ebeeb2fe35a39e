"""What each lane of a simulation does, held to the spans of its graph: caches that grow, hosts that wait, memory that
is read.
"""

from __future__ import annotations

import dataclasses

import pytest

import simulate
from planner import host_cache
from planner.graph import LayerGraph, LayerKind, Span
from planner.hardware import Shared
from planner.plan import Plan
from planner.workload import Workload
from simulate import Interval, Timeline
from small_cases import MIB, Case, build_graph, end_kind, gpu, group, machine, plan_of, span

BLOCKS, NEW_TOKENS = 4, 12
CACHED = 8192


def graph_of(*, experts: int = 0, moved: int = 10**6) -> LayerGraph:
    """Return embed, blocks whose caches grow by 512 bytes a step, and head."""
    second = group("experts", 2 * MIB, slices=experts, used=1) if experts else group("mlp", 8 * MIB)
    kinds = [end_kind("Embedding", MIB), end_kind("Head", MIB)]
    kinds.append(LayerKind(name="Block", groups=(group("attn", 4 * MIB), second)))
    ends = [span(peak=MIB, moved=10**6)] * 3
    last = CACHED + 512 * (NEW_TOKENS - 2)
    work = [
        span(peak=MIB, kv=(0, CACHED), flops=10**6, moved=moved),
        span(peak=MIB, kv=(CACHED, CACHED + 512), flops=10**6, moved=moved),
        span(peak=MIB, kv=(last, last + 512), flops=10**6, moved=moved),
    ]
    layers = [("embed", 0), *[(f"block.{i}", 2) for i in range(BLOCKS)], ("head", 1)]
    return build_graph(kinds, [ends, ends, work], layers)


def planned(graph: LayerGraph, *, gpu_mib: int | None, cache: str = "dynamic") -> Plan:
    devices = [] if gpu_mib is None else [gpu(0, product="big", flops=10**14, rate=10**12)]
    sizes = {device.name: (gpu_mib or 0) * MIB for device in devices} | {"cpu": 4000 * MIB, "disk": 0}
    work = Workload(prompt_tokens=8, new_tokens=NEW_TOKENS, cache=cache)  # type: ignore[arg-type]
    return plan_of(Case(graph, machine(devices, sizes), work))


def on_lane(timeline: Timeline, lane: str) -> list[Interval]:
    return [interval for interval in timeline.intervals if interval.lane == lane]


def test_the_cache_of_a_device_grows_with_every_step() -> None:
    plan = planned(graph_of(), gpu_mib=300)
    timeline = simulate.run(plan)
    starts = timeline.step_starts()
    for step in timeline.simulated_steps:
        until = [s for s in timeline.memory if s.device == "cuda:0" and s.time_ns <= starts[step + 1]]
        assert until[-1].kv_cache == BLOCKS * (CACHED + 512 * step)


def test_the_host_launches_nothing_while_it_computes_experts() -> None:
    plan = planned(graph_of(experts=8), gpu_mib=46)
    assert any(entry.cpu_up_to_tokens for entry in plan.placements)
    timeline = simulate.run(plan)
    computed, launched = on_lane(timeline, "cpu compute"), on_lane(timeline, "cpu launches")
    assert any(entry.label.endswith("experts") for entry in computed)
    for entry in computed:
        assert all(launch.end_ns <= entry.start_ns or entry.end_ns <= launch.start_ns for launch in launched)


@pytest.mark.parametrize("experts", [0, 8])
def test_what_the_cpu_computes_reads_weights_and_experts_from_memory(experts: int) -> None:
    plan = planned(graph_of(experts=experts), gpu_mib=None)
    host = plan.hardware.device("cpu")
    # Multiplied in no time, a layer takes as long as what it reads.
    fast = dataclasses.replace(host, flops_per_s={"default": 10**18}, operator_ns=0)
    times = []
    for part in (1, 2):
        memory = Shared(name="cpu memory", bytes_per_s=host.bytes_per_s // part, users=("cpu",))
        hardware = dataclasses.replace(plan.hardware, devices=(fast,), shared=(memory,))
        times.append(simulate.run(dataclasses.replace(plan, hardware=hardware)).total_ns)
    assert times[1] == pytest.approx(2 * times[0], rel=1e-4)


def test_a_cache_in_host_memory_is_copied_as_it_grows_and_waited_for() -> None:
    plan = planned(host_cache.on_host(graph_of()), gpu_mib=300, cache="offloaded")
    timeline = simulate.run(plan)
    up, down = on_lane(timeline, "cpu→cuda:0 copy"), on_lane(timeline, "cuda:0→cpu copy")
    computing = {(entry.start_ns, entry.end_ns, entry.label) for entry in on_lane(timeline, "cuda:0 compute")}
    for step in range(1, 4):
        copies = [entry for entry in down if entry.step == step and entry.label.endswith("cache")]
        assert len(copies) == BLOCKS
        assert {(entry.start_ns, entry.end_ns, entry.label) for entry in copies} <= computing
        # The first layer's cache for the next step is begun in this one, and is as long as this one left it.
        ahead = [entry for entry in up if (entry.step, entry.label) == (step, "block.0 cache")]
        assert [entry.duration_ns for entry in ahead] == [copies[0].duration_ns]
        left: list[Span] = [each.per_layer()[1] for each in plan.graph.decode_passes]
        assert left[0].kv_down_bytes <= CACHED + 512 * step <= left[-1].kv_down_bytes
        others = [entry for entry in up if entry.step == step and entry.label == "block.1 cache"]
        assert [entry.duration_ns for entry in others] != [copies[0].duration_ns]

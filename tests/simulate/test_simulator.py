"""The simulator: what must hold of every timeline, and that it agrees with the cost that plans are best for."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

import planner
import simulate
from planner import cost
from planner.graph import LayerKind
from planner.hardware import Shared
from planner.plan import Plan
from planner.rules import NO_RULES, Rules
from planner.steps import READ_AHEAD
from planner.workload import Workload
from simulate import Interval, Timeline, series
from small_cases import MIB, Case, build_graph, end_kind, gpu, group, machine, plan_of, span, with_nodes

GPU = "cuda:0 compute"
LINK = "cpu→cuda:0 copy"


def case(
    *, gpu_mib: int, cpu_mib: int = 400, gpus: int = 1, blocks: int = 8, experts: int = 0, new_tokens: int = 12,
    flops: int = 10**11, hop_bytes: int = 4096, disk_mib: int = 0, rules: Rules = NO_RULES,
) -> Case:  # fmt: skip
    """Return embed, blocks of attn (4 MiB) and mlp (8 MiB) or experts (2 MiB each), and head."""
    kinds = [end_kind("Embedding", MIB), end_kind("Head", MIB)]
    second = group("experts", 2 * MIB, slices=experts, used=1) if experts else group("mlp", 8 * MIB)
    kinds.append(LayerKind(name="Block", groups=(group("attn", 4 * MIB), second)))
    ends = [span(held=100, peak=MIB, flops=10**6, moved=10**6)] * 3
    work = [
        span(held=100, peak=2 * MIB, kv=(0, 4096), flops=flops, moved=10**6),
        span(held=200, peak=MIB, kv=(4096, 4608), flops=flops // 8, moved=10**6),
        span(held=300, peak=2 * MIB, kv=(9216, 9728), flops=flops // 4, moved=2 * 10**6),
    ]
    layers = [("embed", 0), *[(f"block.{i}", 2) for i in range(blocks)], ("head", 1)]
    passes = min(3, new_tokens)
    graph = build_graph(kinds, [ends[:passes], ends[:passes], work[:passes]], layers, hop_bytes=(hop_bytes, 256))
    devices = [gpu(i, product="big", flops=10**14, rate=10**12) for i in range(gpus)]
    sizes = {device.name: gpu_mib * MIB for device in devices} | {"cpu": cpu_mib * MIB, "disk": disk_mib * MIB}
    return Case(graph, machine(devices, sizes), Workload(prompt_tokens=8, new_tokens=new_tokens), rules)


CASES = {
    "resident": case(gpu_mib=200),
    "resident on two": case(gpu_mib=90, gpus=2),
    "streamed": case(gpu_mib=60),
    "mostly copies": case(gpu_mib=60, flops=10**10),
    "mostly compute": case(gpu_mib=100, flops=10**12),
    "from disk": case(gpu_mib=60, cpu_mib=60, disk_mib=400),
    "streamed on two": case(gpu_mib=50, gpus=2),
    "experts": case(gpu_mib=70, experts=8, rules=Rules(cpu_experts=False)),
    "experts alone": case(gpu_mib=90, experts=8, rules=Rules(cpu_experts=False)),
    "experts on the cpu": case(gpu_mib=90, experts=8),
    "no gpu": case(gpu_mib=0, gpus=0),
    "no gpu, from disk": case(gpu_mib=0, gpus=0, cpu_mib=60, disk_mib=400),
    "one token": case(gpu_mib=60, new_tokens=1),
    "two tokens": case(gpu_mib=60, new_tokens=2),
    "many tokens": case(gpu_mib=60, new_tokens=300),
}


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {name: plan_of(entry) for name, entry in CASES.items()}


@pytest.fixture(params=CASES)
def plan(request: pytest.FixtureRequest, plans: dict[str, Plan]) -> Plan:
    return plans[request.param]


def on_lane(timeline: Timeline, lane: str) -> list[Interval]:
    return [interval for interval in timeline.intervals if interval.lane == lane]


def streamed(plan: Plan, device: str) -> list[tuple[str, str]]:
    """Return (layer, group) of the whole groups that are copied to a GPU, in execution order."""
    return [
        (p.layer, p.group)
        for p in plan.placements
        if p.run_on == device != "cpu" and p.home != device and p.resident_slices is None
    ]


def copies_to(timeline: Timeline, device: str, wanted: list[tuple[str, str]]) -> list[Interval]:
    """Return the copies of whole groups on the last lane to `device`, in order."""
    labels = {f"{layer} {group}" for layer, group in wanted}
    return [i for i in on_lane(timeline, f"cpu→{device} copy") if i.action == "copy" and i.label in labels]


# What holds of every timeline


def test_a_lane_does_one_thing_at_a_time(plan: Plan) -> None:
    timeline = simulate.run(plan)
    for lane in timeline.lanes():
        assert all(one.end_ns <= other.start_ns for one, other in pairwise(on_lane(timeline, lane)))


def test_the_same_plan_gives_the_same_timeline(plan: Plan) -> None:
    assert simulate.run(plan) == simulate.run(plan)
    assert simulate.run(Plan.from_json(plan.to_json())) == simulate.run(plan)


# What a step of a few small layers adds that the cost leaves out: filling the stream, once, and turning it around; and
# on two GPUs, what one of them copies while the other computes. With experts on the CPU the first steps compute for
# less time than copies take and the last ones for more: the mean of the longer is more than the longer of the means.
TOLERANCE = {
    "experts on the cpu": 0.06,
    "from disk": 0.03,
    "streamed on two": 0.03,
    "one token": 0.15,
    "two tokens": 0.06,
}


HIDDEN = pytest.mark.xfail(
    strict=True, reason="of two kinds of groups, the cost takes each hidden copy for the smaller"
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[HIDDEN] if name == "streamed on two" else []) for name in CASES]
)
def test_it_is_close_to_the_cost_that_was_made_least(name: str, plans: dict[str, Plan]) -> None:
    plan = plans[name]
    assert plan.solver is not None
    assert simulate.run(plan).total_ns == pytest.approx(plan.solver.objective_ns, rel=TOLERANCE.get(name, 0.02))


def drawn(seed: int, *, experts: int, gpus: int = 1) -> Case:
    """Return a chain whose decode steps are alike and many."""
    draw = random.Random(f"{seed} {experts} {gpus}")
    blocks = draw.randrange(6, 21)
    kinds = [end_kind("Embedding", MIB), end_kind("Head", MIB)]
    second = group("experts", draw.randrange(2, 8) * MIB, slices=experts, used=2) if experts else group("mlp", 8 * MIB)
    kinds.append(LayerKind(name="Block", groups=(group("attn", draw.randrange(2, 9) * MIB), second)))
    end = span(held=100, peak=MIB, flops=10**6, moved=10**6)
    work = span(held=100, peak=MIB, kv=(4096, 4096), flops=draw.randrange(10**9, 10**11), moved=10**6)
    layers = [("embed", 0), *[(f"block.{i}", 2) for i in range(blocks)], ("head", 1)]
    graph = build_graph(kinds, [[end] * 3, [end] * 3, [work] * 3], layers)
    devices = [gpu(i, product="big", flops=10**14, rate=10**12) for i in range(gpus)]
    share = draw.randrange(30, 90)
    sizes = {device.name: 45 * MIB + graph.weight_bytes * share // 100 // gpus for device in devices}
    hardware = machine(devices, {**sizes, "cpu": 2**32, "disk": 0})
    return Case(graph, hardware, Workload(prompt_tokens=8, new_tokens=400))


@pytest.mark.parametrize("experts", [0, 8], ids=["whole groups", "experts"])
@pytest.mark.parametrize("seed", range(12))
def test_random_chains_take_what_their_cost_says(seed: int, experts: int) -> None:
    """Within 2 %, but where copying and computing take about as long: then two slots do not hide all of either."""
    plan = plan_of(drawn(seed, experts=experts))
    assert plan.solver is not None
    found = simulate.run(plan).total_ns / plan.solver.objective_ns
    decode = cost.steps_of(plan.graph, plan.workload)[1]
    lanes = cost.lanes_of(plan.graph, plan.hardware, decode, plan.placements, "bfloat16")
    lane = lanes.get("cuda:0", cost.Lane())
    if plan.slots_on("cuda:0", "groups") and 0.8 < lane.groups / lane.computing < 1.25:
        assert 0.98 <= found <= 1.08
    else:
        # The cost has the CPU read experts as slowly as beside copies, also where there are few.
        by_cpu = any(placement.cpu_up_to_tokens for placement in plan.placements)
        assert (0.97 if by_cpu else 0.98) <= found <= 1.02


def test_no_step_is_faster_than_its_busiest_lane(plan: Plan) -> None:
    timeline = simulate.run(plan)
    for step in timeline.simulated_steps:
        compute = [lane for lane in timeline.lanes() if lane.endswith("compute")]
        assert sum(timeline.busy_ns(lane, step) for lane in compute) <= timeline.step_ns[step]


def test_memory_never_exceeds_the_prediction(plan: Plan) -> None:
    timeline = simulate.run(plan)
    assert plan.prediction is not None
    for name, nbytes in plan.prediction.peak_bytes.items():
        assert timeline.peak_bytes(name) <= nbytes
        if plan.workload.new_tokens <= 9 or name == "disk":
            assert timeline.peak_bytes(name) == nbytes
    with pytest.raises(KeyError, match="moon"):
        timeline.peak_bytes("moon")


def test_the_prediction_is_the_timelines(plan: Plan) -> None:
    timeline = simulate.run(plan)
    assert plan.prediction is not None
    assert (plan.prediction.total_ns, plan.prediction.prefill_ns) == (timeline.total_ns, timeline.prefill_ns)
    assert plan.prediction.decode_ns_per_token == timeline.decode_ns_per_token


def test_there_is_one_duration_for_each_step(plan: Plan) -> None:
    timeline = simulate.run(plan)
    assert len(timeline.step_ns) == plan.workload.new_tokens
    assert timeline.total_ns == sum(timeline.step_ns)
    assert timeline.simulated_steps[0] == 0
    assert timeline.simulated_steps[-1] == plan.workload.decode_steps


def test_a_part_never_runs_before_its_copy_has_ended(plan: Plan) -> None:
    timeline = simulate.run(plan)
    for device in [d.name for d in plan.hardware.gpus]:
        wanted = streamed(plan, device)
        copies = copies_to(timeline, device, wanted)
        labels = [f"{layer} {name}" for layer, name in wanted]
        runs = [i for i in on_lane(timeline, f"{device} compute") if i.label in labels]
        assert len(runs) == len(labels) * len(timeline.simulated_steps)
        for number, run in enumerate(runs):
            assert copies[number].label == run.label == labels[number % len(labels)]
            assert copies[number].end_ns <= run.start_ns


def test_a_slot_is_not_overwritten_before_its_user_has_ended(plan: Plan) -> None:
    timeline = simulate.run(plan)
    for device in [d.name for d in plan.hardware.gpus]:
        wanted = streamed(plan, device)
        slots = plan.slots_on(device, "groups")
        if not wanted or slots is None:
            continue
        copies = copies_to(timeline, device, wanted)
        labels = {f"{layer} {name}" for layer, name in wanted}
        runs = [i for i in on_lane(timeline, f"{device} compute") if i.label in labels]
        for number in range(slots.count, len(copies)):
            assert copies[number].start_ns >= runs[number - slots.count].end_ns


def test_every_streamed_group_is_copied_once_a_step(plan: Plan) -> None:
    timeline = simulate.run(plan)
    for device in [d.name for d in plan.hardware.gpus]:
        wanted = streamed(plan, device)
        slots = plan.slots_on(device, "groups")
        ahead = slots.count if slots is not None and wanted else 0
        times = Counter(i.label for i in copies_to(timeline, device, wanted))
        assert sum(times.values()) == len(wanted) * len(timeline.simulated_steps) + ahead
        assert all(count - len(timeline.simulated_steps) in range(ahead + 1) for count in times.values())


# Cases with answers that can be worked out


def layer_ns(plan: Plan, step: int) -> int:
    """Return what all layers take on cuda:0 in a step, by the roofline; the host launches them ahead."""
    device = plan.hardware.device("cuda:0")
    passes = plan.graph.passes
    first = passes[0] if step == 0 else passes[1]
    last = passes[0] if step == 0 else passes[-1]
    steps = plan.workload.decode_steps
    weight = (step - 1) / (steps - 1) if step and steps > 1 else 0.0
    computed = launched = 0
    for one, other in zip(first.per_layer(), last.per_layer(), strict=True):
        times = [max(s.flops * 10**9 // 10**14, s.moved_bytes * 10**9 // 10**12) for s in (one, other)]
        # It begins when its first operator is launched, and does not end before its last one is.
        computed = max(computed, launched) + times[0] + round((times[1] - times[0]) * weight)
        launched += one.operators * device.operator_ns
    return max(computed, launched)


def test_a_resident_plan_takes_the_sum_of_its_layers(plans: dict[str, Plan]) -> None:
    plan = plans["resident"]
    assert all(p.home == p.run_on == "cuda:0" for p in plan.placements)
    timeline = simulate.run(plan)
    assert set(timeline.lanes()) == {GPU, "cpu launches"}
    for step in timeline.simulated_steps:
        assert abs(timeline.step_ns[step] - layer_ns(plan, step)) <= 2 * len(plan.graph.layers)


def test_a_stream_bound_by_copies_takes_its_copies(plans: dict[str, Plan]) -> None:
    plan = plans["mostly copies"]
    timeline = simulate.run(plan)
    wanted = streamed(plan, "cuda:0")
    assert wanted
    sizes = {"attn": 4 * MIB, "mlp": 8 * MIB}
    once = sum(10_000 + sizes[name] * 10**9 // (20 * 10**9) for _, name in wanted)
    slots = plan.slots_on("cuda:0", "groups")
    assert slots is not None
    # With one slot nothing is copied while it is computed with.
    apart = layer_ns(plan, 5) if slots.count == 1 else 0
    assert timeline.step_ns[5] == pytest.approx(once + apart, rel=0.01)


def test_a_stream_bound_by_computing_takes_its_layers(plans: dict[str, Plan]) -> None:
    plan = plans["mostly compute"]
    assert streamed(plan, "cuda:0")
    timeline = simulate.run(plan)
    assert timeline.step_ns[5] == pytest.approx(layer_ns(plan, 5), rel=0.02)


def test_hops_are_one_for_each_change_of_device(plans: dict[str, Plan]) -> None:
    plan = plans["resident on two"]
    devices = plan.run_on()
    changes = sum(one != other for one, other in pairwise(devices))
    assert changes == 1
    hops = [i for i in simulate.run(plan).intervals if i.action == "hop" and i.step == 1]
    assert [(i.lane, i.duration_ns) for i in hops] == [("cuda:0→cuda:1 copy", 20_000 + math.ceil(256 / 10))]


def test_disk_and_link_are_busy_together(plans: dict[str, Plan]) -> None:
    timeline = simulate.run(plans["from disk"])
    reads = on_lane(timeline, "disk→cpu read")
    assert reads
    pairs = {(i.start_ns, i.end_ns, i.label) for i in on_lane(timeline, LINK)}
    prefetched = [i for i in reads if i.action == "copy"]
    assert all((i.start_ns, i.end_ns, i.label) in pairs for i in prefetched)


def test_experts_are_fetched_when_their_layer_runs(plans: dict[str, Plan]) -> None:
    plan = plans["experts"]
    waiting = {p.layer: 8 - (p.resident_slices or 0) for p in plan.placements if p.resident_slices not in (None, 8)}
    assert waiting
    timeline = simulate.run(plan)
    fetches = [i for i in on_lane(timeline, LINK) if i.label.endswith("experts") and i.step == 1]
    assert {i.label.split()[0] for i in fetches} == set(waiting)
    whole = 10_000 + 2 * MIB * 10**9 // (20 * 10**9)
    for fetch in fetches:
        # One of eight experts for one token: each waiting slice is used with a chance of 1/8.
        assert fetch.duration_ns == waiting[fetch.label.split()[0]] * int(whole / 8)
        before = [i for i in on_lane(timeline, GPU) if i.step == 1 and i.end_ns <= fetch.start_ns]
        assert before
        assert not [i for i in on_lane(timeline, GPU) if i.start_ns < fetch.end_ns and i.end_ns > fetch.start_ns]


@pytest.mark.parametrize("name", ["many tokens", "experts", "experts on the cpu", "from disk", "streamed on two"])
def test_steps_that_are_left_out_take_what_they_would_have(
    name: str, plans: dict[str, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = CASES[name]
    # Copies and computing change places somewhere on the way: not all steps lie on one line.
    long = dataclasses.replace(entry, workload=Workload(prompt_tokens=8, new_tokens=300))
    plan = dataclasses.replace(plans[name], workload=long.workload)
    timeline = simulate.run(plan)
    assert timeline.simulated_steps == (*range(5), *range(296, 300))
    monkeypatch.setattr(series, "STEPS_AT_EACH_END", 200)
    whole = simulate.run(plan)
    assert whole.simulated_steps == tuple(range(300))
    assert timeline.step_ns == pytest.approx(whole.step_ns, rel=1e-2)
    assert timeline.total_ns == pytest.approx(whole.total_ns, rel=2e-4)


def test_what_is_kept_stands_where_it_happens(plans: dict[str, Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = simulate.run(plans["many tokens"])
    monkeypatch.setattr(series, "STEPS_AT_EACH_END", 200)
    whole = simulate.run(plans["many tokens"])
    for step in (0, 1, 4, 297, 299):
        mine, all_of_it = ([i for i in on_lane(t, GPU) if i.step == step] for t in (timeline, whole))
        assert [i.label for i in mine] == [i.label for i in all_of_it]
        assert mine[0].start_ns == pytest.approx(all_of_it[0].start_ns, rel=2e-4)
    last = max(sample.time_ns for sample in timeline.memory)
    assert last == pytest.approx(timeline.total_ns, rel=1e-3)


def test_a_longer_context_never_takes_less(plans: dict[str, Plan]) -> None:
    timeline = simulate.run(plans["resident"])
    assert all(one <= other for one, other in pairwise(timeline.step_ns[1:]))


def test_a_plan_without_passes_is_refused(plans: dict[str, Plan]) -> None:
    graph = dataclasses.replace(plans["resident"].graph, passes=())
    with pytest.raises(planner.PlanFormatError, match="pass"):
        simulate.run(dataclasses.replace(plans["resident"], graph=graph))


@pytest.mark.parametrize("run", [simulate.run, simulate.run_accelerate])
def test_a_plan_that_lacks_a_pass_of_its_work_is_refused(run: Any, plans: dict[str, Plan]) -> None:
    graph = plans["resident"].graph
    prefill = dataclasses.replace(plans["resident"], graph=dataclasses.replace(graph, passes=graph.passes[:1]))
    with pytest.raises(planner.PlanFormatError, match=r"no pass 'decode_first', .* 12 out"):
        run(prefill)
    assert run(dataclasses.replace(prefill, workload=Workload(prompt_tokens=8, new_tokens=1))).prefill_ns > 0
    later = dataclasses.replace(graph.passes[1], name="prefill_next", tokens=3)
    chunked = dataclasses.replace(graph, passes=(graph.passes[0], later))
    work = Workload(prompt_tokens=8, new_tokens=1, prefill_chunk=3)
    with pytest.raises(planner.PlanFormatError, match="no pass 'prefill_rest'"):
        run(dataclasses.replace(plans["resident"], graph=chunked, workload=work))


@pytest.mark.parametrize("options", [{"gpus": "24GB"}, {"model": "gpt2"}, {"workload": Workload()}])
def test_a_plan_has_what_a_map_is_given(options: dict[str, Any], plans: dict[str, Plan]) -> None:
    with pytest.raises(planner.InputError, match=f"leave out {next(iter(options))}"):
        simulate.run(plans["resident"], **options)


@pytest.mark.parametrize("placed", ["plan.json", None, 3])
def test_what_is_neither_plan_nor_map_is_refused(placed: Any) -> None:
    with pytest.raises(planner.InputError, match="neither a Plan nor a device map"):
        simulate.run(placed, model="gpt2")


# Experts that are drawn


def test_drawn_experts_take_what_is_expected_of_them(plans: dict[str, Plan]) -> None:
    plan = dataclasses.replace(plans["experts"], workload=Workload(prompt_tokens=8, new_tokens=200))
    expected = simulate.run(plan)
    drawn = [simulate.run(plan, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0].step_ns)) > 20
    for timeline in drawn:
        assert timeline.total_ns == pytest.approx(expected.total_ns, rel=0.03)
        for step in timeline.simulated_steps[1:]:
            fetches = [i for i in on_lane(timeline, LINK) if i.label.endswith("experts") and i.step == step]
            whole = 10_000 + 2 * MIB * 10**9 // (20 * 10**9)
            # One of eight for one token: a layer fetches one expert, or has it.
            assert {i.duration_ns for i in fetches} <= {whole}
            assert len({i.label for i in fetches}) == len(fetches)


def test_where_nothing_is_routed_a_seed_changes_nothing(plans: dict[str, Plan]) -> None:
    assert simulate.run(plans["streamed"], seed=1) == simulate.run(plans["streamed"])


# What is shared


def test_copies_beside_the_cpu_share_its_memory(plans: dict[str, Plan]) -> None:
    plan = plans["experts on the cpu"]
    assert any(p.cpu_up_to_tokens for p in plan.placements)
    memory = plan.hardware.memory_of("cpu")
    assert (memory.name, memory.bytes_per_s) == ("cpu memory", 60 * 10**9)
    assert {"cpu", "cpu→cuda:0", "disk→cpu"} <= set(memory.users)
    ample = dataclasses.replace(memory, bytes_per_s=10**12)
    free = dataclasses.replace(plan.hardware, shared=(ample,))
    scarce = dataclasses.replace(plan.hardware, shared=(dataclasses.replace(memory, bytes_per_s=50 * 10**9),))
    times = [
        simulate.run(dataclasses.replace(plan, hardware=hardware)).decode_ns_per_token
        for hardware in (free, plan.hardware, scarce)
    ]
    assert times == sorted(times)
    # The CPU reads at 50 GB/s and the link at 20: together 70 of 60, and of 50.
    assert times[0] < times[1] <= times[0] * 7 / 6
    assert times[1] < times[2] <= times[0] * 7 / 5


@pytest.mark.parametrize("seed", [None, 0])
def test_a_cpu_that_multiplies_slowly_leaves_the_memory_to_copies(seed: int | None, plans: dict[str, Plan]) -> None:
    plan = plans["experts on the cpu"]
    *gpus, host = plan.hardware.devices
    slow = dataclasses.replace(host, flops_per_s={"default": host.flops_per_s["default"] // 1000})
    hardware = dataclasses.replace(plan.hardware, devices=(*gpus, slow))
    found = simulate.run(dataclasses.replace(plan, hardware=hardware), seed=seed)
    ample = (dataclasses.replace(hardware.memory_of("cpu"), bytes_per_s=10**12),)
    alone = simulate.run(dataclasses.replace(plan, hardware=dataclasses.replace(hardware, shared=ample)), seed=seed)
    assert on_lane(found, LINK)
    assert [i.duration_ns for i in on_lane(found, "cpu compute")] == [
        i.duration_ns for i in on_lane(alone, "cpu compute")
    ]
    assert found.step_ns == alone.step_ns


def test_mapped_files_are_read_as_slowly_as_they_are_mapped(plans: dict[str, Plan]) -> None:
    plan = plans["no gpu, from disk"]
    (disk,) = plan.hardware.links
    memory = Shared(name="cpu memory", bytes_per_s=disk.bytes_per_s // 2, users=("disk→cpu",))
    mapped = dataclasses.replace(disk, mapped_bytes_per_s=disk.bytes_per_s // 4)
    times = []
    for shared in ((), (memory,)):
        hardware = dataclasses.replace(plan.hardware, links=(mapped,), shared=shared)
        times.append(simulate.run(dataclasses.replace(plan, hardware=hardware)).step_ns)
    assert times[0] == times[1]


def test_what_comes_from_disk_goes_through_memory_twice(plans: dict[str, Plan]) -> None:
    plan = plans["from disk"]
    memory = dataclasses.replace(plan.hardware.memory_of("cpu"), bytes_per_s=4 * 10**9)
    timelines = [
        simulate.run(dataclasses.replace(plan, hardware=dataclasses.replace(plan.hardware, shared=shared)))
        for shared in ((), (memory,))
    ]
    # Written and read at the disk's 3 GB/s each: 6 of 4.
    free, scarce = (min(i.duration_ns for i in on_lane(timeline, "disk→cpu read")) for timeline in timelines)
    assert scarce == pytest.approx(free * 3 / 2, rel=0.01)


def test_the_host_waits_for_the_router(plans: dict[str, Plan]) -> None:
    timeline = simulate.run(plans["experts"])
    launches = [i for i in on_lane(timeline, "cpu launches") if i.label.endswith("experts")]
    assert launches
    for launch in launches:
        label = launch.label.removesuffix(" experts")
        assert launch.start_ns >= max(
            i.end_ns for i in on_lane(timeline, GPU) if (i.label, i.step) == (label, launch.step)
        )


def test_mapped_files_are_read_ahead_of_the_cpu(plans: dict[str, Plan]) -> None:
    plan = plans["no gpu, from disk"]
    timeline = simulate.run(plan)
    mapped = [f"{p.layer} {p.group}" for p in plan.placements if p.memory == "disk"]
    assert len(mapped) > READ_AHEAD
    for step in (0, 3):
        begins = timeline.step_starts()[step]
        reads = [i for i in on_lane(timeline, "disk→cpu read") if i.step == step]
        runs = {i.label: i for i in on_lane(timeline, "cpu compute") if i.step == step}
        assert [i.label for i in reads] == mapped
        # Nothing is on its way before a pass begins, and the first reads wait for nobody.
        assert reads[0].start_ns == begins
        for number, read in enumerate(reads):
            assert read.end_ns <= runs[read.label].start_ns
            if number > READ_AHEAD:
                # The group that it runs ahead of is asked for when the one before has been computed with.
                assert read.start_ns >= runs[reads[number - READ_AHEAD - 1].label].end_ns
        reading, computing = (sum(i.duration_ns for i in found) for found in (reads, runs.values()))
        longest = max(i.duration_ns for i in (*reads, *runs.values()))
        assert timeline.step_ns[step] <= max(reading, computing) + 2 * longest


def test_two_links_of_one_root_slow_each_other() -> None:
    entry = CASES["streamed on two"]
    root = Shared(name="root", bytes_per_s=10**10, users=("cpu→cuda:0", "cpu→cuda:1"))
    plan = plan_of(entry)
    apart = simulate.run(plan)
    together = simulate.run(dataclasses.replace(plan, hardware=dataclasses.replace(plan.hardware, shared=(root,))))
    # Each link asks for twice what the root has.
    longest = max(i.duration_ns for i in on_lane(apart, LINK))
    assert max(i.duration_ns for i in on_lane(together, LINK)) >= 2 * longest
    assert together.total_ns > 1.5 * apart.total_ns


@pytest.mark.parametrize("nodes", [1, 2])
def test_what_hops_draws_on_the_roots_of_its_way(nodes: int) -> None:
    entry = CASES["resident on two"]
    if nodes > 1:
        entry = dataclasses.replace(entry, hardware=with_nodes(case(gpu_mib=90).hardware, nodes))
    plan = plan_of(entry)
    apart = [i for i in simulate.run(plan).intervals if i.action == "hop" and i.step == 0]
    source, target = apart[0].lane.removesuffix(" copy").split("→")
    way = plan.hardware.way(source, target)
    assert len(way) == (3 if nodes > 1 else 1)
    for link in way:
        root = Shared(
            name="root",
            bytes_per_s=plan.hardware.link(source, target).bytes_per_s // 4,
            users=(f"{link.source}→{link.target}",),
        )
        shared = dataclasses.replace(plan, hardware=dataclasses.replace(plan.hardware, shared=(root,)))
        slowed = [i for i in simulate.run(shared).intervals if i.action == "hop" and i.step == 0]
        assert [i.duration_ns for i in slowed] == pytest.approx([4 * i.duration_ns for i in apart], rel=0.01)


def test_a_disk_on_the_lane_of_its_link_reads_and_copies_in_turn() -> None:
    plan = plan_of(CASES["from disk"])
    disk, up = plan.hardware.link("disk", "cpu"), plan.hardware.link("cpu", "cuda:0")
    links = [dataclasses.replace(link, lane="root") if link in (disk, up) else link for link in plan.hardware.links]
    told = dataclasses.replace(plan, hardware=dataclasses.replace(plan.hardware, links=tuple(links)))
    apart, together = simulate.run(plan), simulate.run(told)
    both = {(i.label, i.step) for i in apart.intervals if i.action in ("copy", "read")}
    assert {(i.label, i.step) for i in on_lane(together, "root")} == both
    assert "disk→cpu read" in apart.lanes()
    assert "disk→cpu read" not in together.lanes()


# Views


def test_the_table_has_every_interval(plan: Plan) -> None:
    timeline = simulate.run(plan)
    frame = timeline.frame()
    assert list(frame.columns) == ["lane", "start_ns", "end_ns", "action", "label", "step"]
    assert len(frame) == len(timeline.intervals)
    assert int(frame["end_ns"].max()) == max(i.end_ns for i in timeline.intervals)


def test_the_trace_is_valid_for_perfetto(plan: Plan) -> None:
    timeline = simulate.run(plan)
    data = json.loads(timeline.to_chrome_trace())
    events: list[dict[str, Any]] = data["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    whole = [e for e in events if e["ph"] == "X"]
    assert tuple(names.values()) == timeline.lanes()
    assert len(whole) == len(timeline.intervals)
    for event, interval in zip(whole, timeline.intervals, strict=True):
        assert names[event["tid"]] == interval.lane
        assert (event["ts"], event["dur"]) == (interval.start_ns / 1e3, interval.duration_ns / 1e3)
        assert event["pid"] == 0


# Models of the catalogue


@pytest.mark.parametrize(
    ("gpus", "options"),
    [("2GB", {}), (0, {}), ("650MB", {"prompt_tokens": 64, "new_tokens": 16})],
    ids=["resident", "no gpu", "streamed"],
)
def test_gpt2_takes_what_its_cost_says(gpus: str | int, options: dict[str, int]) -> None:
    plan = planner.plan_model("gpt2", gpus=gpus, use_cache=False, **options)  # type: ignore[arg-type]
    assert planner.verify_plan(plan) == ()
    assert plan.solver is not None
    assert plan.prediction is not None
    assert 0.97 <= plan.prediction.total_ns / plan.solver.objective_ns <= 1.03
    assert plan.solver.objective_ns == cost.objective_ns(
        plan.graph, plan.hardware, plan.workload, plan.placements, plan.slots
    )

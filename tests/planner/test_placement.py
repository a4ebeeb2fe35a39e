"""The solver against brute force: every placement of small cases, priced and weighed by formulas of this file's own."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner import api, cost, memory
from planner.errors import InfeasibleError
from planner.graph import Edge, Layer, LayerGraph, LayerKind, Pass, Span, Tensor, WeightGroup
from planner.hardware import Device, Hardware, Link, MemoryPool
from planner.placement.realise import spread
from planner.placement.solution import find
from planner.plan import Execution, ModelInfo, Placement, Plan
from planner.verify import verify_plan
from planner.workload import Workload

MIB = 2**20
MOST_PLACEMENTS = 60_000
EXAMPLES = settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@dataclass(frozen=True)
class Case:
    graph: LayerGraph
    hardware: Hardware
    workload: Workload


# Building cases


def group(name: str, nbytes: int, *, slices: int = 1, used: int = 1, streamable: bool = True) -> WeightGroup:
    size = nbytes * slices
    tensor = Tensor(name=f"{name}.weight", shape=(slices, nbytes // 2), dtype="bfloat16", nbytes=size)
    return WeightGroup(name=name, slices=slices, used_slices=used, streamable=streamable, tensors=(tensor,))


def end_kind(name: str, nbytes: int) -> LayerKind:
    return LayerKind(name=name, groups=(group("weights", nbytes, streamable=False),))


def build_graph(
    kinds: list[LayerKind],
    spans: list[list[Span]],
    order: list[tuple[str, int]],
    *,
    ties: tuple[tuple[str, ...], ...] = (),
    loose_bytes: int = 0,
    hop_bytes: tuple[int, int] = (4096, 256),
    tokens: tuple[int, int] = (8, 9),
    batch_size: int = 1,
) -> LayerGraph:
    """Return a graph of layers (name, kind); `spans[kind]` holds the kind's span for every pass."""
    names = ("prefill", "decode_first", "decode_last")
    passes = tuple(
        Pass(
            name=names[number],
            tokens=tokens[0] if number == 0 else 1,
            context_tokens=tokens[0] + number,
            spans=tuple(spans[kind][number] for _, kind in order),
        )
        for number in range(len(spans[0]))
    )
    loose = (Tensor(name="rotary.inv_freq", shape=(loose_bytes,), dtype="uint8", nbytes=loose_bytes, buffer=True),)
    graph = LayerGraph(
        model="Small",
        batch_size=batch_size,
        kinds=tuple(kinds),
        layers=tuple(Layer(name=name, kind=kind) for name, kind in order),
        edges=tuple(
            Edge(source=i, target=i + 1, prefill_bytes=hop_bytes[0], decode_bytes=hop_bytes[1])
            for i in range(len(order) - 1)
        ),
        ties=ties,
        loose=loose if loose_bytes else (),
        passes=passes,
    )
    graph.check()
    return graph


def span(
    *, held: int = 0, peak: int = 0, kv: tuple[int, int] = (0, 0), flops: int = 0, moved: int = 0, operators: int = 1
) -> Span:
    return Span(
        count=1, held_bytes=held, peak_bytes=peak, kv_before_bytes=kv[0], kv_after_bytes=kv[1], input_bytes=64,
        flops=flops, moved_bytes=moved, operators=operators,
    )  # fmt: skip


def gpu(index: int, *, product: str, flops: int, rate: int, context: int = 3 * MIB) -> Device:
    return Device(
        name=f"cuda:{index}", kind="cuda", product=product, pool=f"cuda:{index}",
        flops_per_s={"bfloat16": flops, "default": flops // 2}, bytes_per_s=rate, operator_ns=2000,
        context_bytes=context, workspace_bytes=MIB,
    )  # fmt: skip


def machine(gpus: list[Device], capacities: dict[str, int], *, reserved: int = 0, link: int = 20 * 10**9) -> Hardware:
    host = Device(
        name="cpu", kind="cpu", product="host", pool="cpu", flops_per_s={"default": 10**12},
        bytes_per_s=50 * 10**9, operator_ns=2000, context_bytes=0, workspace_bytes=0,
    )  # fmt: skip
    links = [Link(source="disk", target="cpu", bytes_per_s=3 * 10**9, latency_ns=100_000)]
    for device in gpus:
        links.append(Link(source="cpu", target=device.name, bytes_per_s=link, latency_ns=10_000))
        links.append(Link(source=device.name, target="cpu", bytes_per_s=link, latency_ns=10_000))
        links += [
            Link(source=device.name, target=other.name, bytes_per_s=link // 2, latency_ns=20_000)
            for other in gpus
            if other is not device
        ]
    pools = [
        MemoryPool(name=name, capacity_bytes=size, reserved_bytes=reserved if name == "cpu" else 0)
        for name, size in capacities.items()
    ]
    return Hardware(devices=(*gpus, host), pools=tuple(pools), links=tuple(links))


@st.composite
def block_kinds(draw: st.DrawFn, name: str) -> tuple[LayerKind, list[Span]]:
    size = st.sampled_from([MIB // 2, 3 * MIB + 77 * 2, 8 * MIB, 11 * MIB, 16 * MIB + 6])
    groups = [group("attn", draw(size))]
    second = draw(st.sampled_from(["none", "mlp", "experts"]))
    if second == "mlp":
        groups.append(group("mlp", draw(size)))
    elif second == "experts":
        slices = draw(st.integers(2, 3))
        groups.append(group("experts", draw(size), slices=slices, used=draw(st.integers(1, slices))))
    if draw(st.booleans()):
        groups.append(group("rest", draw(st.sampled_from([1024, MIB])), streamable=False))
    flops = draw(st.sampled_from([10**6, 10**9, 10**11]))
    moved = draw(st.sampled_from([10**4, 10**7]))
    cached = draw(st.sampled_from([0, 4096, 2 * MIB]))
    held = draw(st.sampled_from([0, 1000, MIB]))
    peaks = [draw(st.sampled_from([100, MIB, 5 * MIB])) for _ in range(3)]
    passes = [
        span(held=held, peak=peaks[0], kv=(0, cached), flops=flops, moved=moved, operators=10),
        span(held=held, peak=peaks[1], kv=(cached, cached + 64), flops=flops // 8, moved=moved, operators=10),
        span(held=held, peak=peaks[2], kv=(cached + 64, cached + 640), flops=flops // 7, moved=moved, operators=10),
    ]
    return LayerKind(name=name, groups=tuple(groups)), passes


@st.composite
def cases(draw: st.DrawFn, *, alternating: bool = False) -> Case:
    devices = draw(st.sampled_from(["one", "one", "alike", "different"]))
    gpus = [gpu(0, product="big", flops=10**14, rate=10**12)]
    if devices == "alike":
        gpus.append(gpu(1, product="big", flops=10**14, rate=10**12))
    elif devices == "different":
        gpus.append(gpu(1, product="small", flops=10**13, rate=2 * 10**11, context=MIB))
    first, second = draw(block_kinds("First")), draw(block_kinds("Second"))
    size = st.sampled_from([MIB, 6 * MIB, 20 * MIB])
    kinds = [end_kind("Embedding", draw(size)), end_kind("Norm", 2048), end_kind("Head", draw(size)), first[0], second[0]]
    still = [span(held=500, peak=draw(st.sampled_from([0, 3 * MIB])), flops=10**6, moved=10**6) for _ in range(3)]
    spans = [still, still, still, first[1], second[1]]
    with_norm = draw(st.booleans())
    tail = [("norm", 1), ("head", 2)] if with_norm else [("head", 2)]
    tie = (("embed.weights.weight", "head.weights.weight"),) if draw(st.integers(0, 3)) == 0 else ()
    if tie:
        kinds[2] = end_kind("Head", kinds[0].nbytes)
    count = draw(st.integers(2, 4))
    while True:
        blocks = [(f"block.{i}", 4 if alternating and i % 2 else 3) for i in range(count)]
        graph = build_graph(
            kinds, spans, [("embed", 0), *blocks, *tail], ties=tie, loose_bytes=draw(st.sampled_from([0, 512])),
            hop_bytes=(draw(st.sampled_from([64, 10**6, 10**8])), 256), batch_size=draw(st.sampled_from([1, 4])),
        )  # fmt: skip
        if math.prod(len(options) for options in _options(graph, [d.name for d in gpus])) <= MOST_PLACEMENTS:
            break
        count -= 1
    whole = graph.weight_bytes + 10 * MIB
    part = st.sampled_from([0, 15, 30, 45, 60, 80, 100, 130])
    capacities = {device.name: 28 * MIB + whole * draw(part) // 100 + draw(st.integers(0, 3)) for device in gpus}
    capacities["cpu"] = 4 * MIB + whole * draw(part) // 100
    capacities["disk"] = whole * draw(st.sampled_from([0, 30, 200])) // 100
    reserved = draw(st.sampled_from([0, MIB]))
    new_tokens = draw(st.sampled_from([3, 20]))
    workload = Workload(batch_size=graph.batch_size, prompt_tokens=8, new_tokens=new_tokens)
    return Case(graph, machine(gpus, capacities, reserved=reserved), workload)


# Brute force. Nothing below calls planner.cost, planner.memory or planner.placement.


@dataclass(frozen=True)
class Option:
    """One unit on one device: for every layer of it, for every group, where it waits and how many slices stay."""

    device: str
    homes: tuple[tuple[tuple[str, int], ...], ...]


def _units(graph: LayerGraph) -> list[list[int]]:
    """Return the layers that are decided together: all before the first streamable one, each block, all after."""
    blocks = [i for i in range(len(graph.layers)) if any(g.streamable for g in graph.kind_of(i).groups)]
    front = list(range(blocks[0]))
    tail = list(range(blocks[-1] + 1, len(graph.layers)))
    return [unit for unit in (front, *([i] for i in range(blocks[0], blocks[-1] + 1)), tail) if unit]


def _options(graph: LayerGraph, gpus: list[str]) -> list[list[Option]]:
    result = []
    for unit in _units(graph):
        options = []
        for device in (*gpus, "cpu"):
            choices = []
            for index in unit:
                for entry in graph.kind_of(index).groups:
                    stay = [(device, entry.slices)]
                    elsewhere = ["disk"] if device == "cpu" else ["cpu", "disk"] if entry.streamable else []
                    choices.append(stay + [(home, kept) for home in elsewhere for kept in range(entry.slices)])
            for picked in itertools.product(*choices):
                rest = iter(picked)
                homes = tuple(tuple(next(rest) for _ in graph.kind_of(index).groups) for index in unit)
                options.append(Option(device, homes))
        result.append(options)
    return result


def _slab(entry: WeightGroup) -> int:
    return sum(math.ceil(tensor.nbytes // entry.slices / 256) * 256 for tensor in entry.tensors)


def _allocated(nbytes: int, device: str) -> int:
    if device in ("cpu", "disk"):
        return nbytes
    unit = 2 * MIB if nbytes >= 10 * MIB else 512
    return math.ceil(nbytes / unit) * unit


class Ledger:
    """Weighs and prices every placement of a case at once; one column of each array is one placement."""

    def __init__(self, case: Case):
        self.case = case
        self.graph, self.hardware = case.graph, case.hardware
        self.devices = [device.name for device in self.hardware.devices]
        self.places = [*self.devices, "disk"]
        self.units = _units(self.graph)
        self.options = _options(self.graph, [name for name in self.devices if name != "cpu"])
        self.steps = [("prefill", 1, self.graph.passes[:1]), ("decode", case.workload.new_tokens - 1, self.graph.passes[1:])]
        self._enumerate()

    def _enumerate(self) -> None:
        sums = highest = last = None
        hops = np.zeros(1, dtype=np.int64)
        for number, options in enumerate(self.options):
            rows = [self._rows(number, option) for option in options]
            added = np.array([row[0] for row in rows], dtype=np.int64).T
            most = np.array([row[1] for row in rows], dtype=np.int64).T
            device = np.array([self.devices.index(option.device) for option in options])
            if sums is None or highest is None or last is None:
                sums, highest, last = added, most, device
                hops = np.zeros(len(options), dtype=np.int64)
                continue
            hops = (hops[:, None] + (last[:, None] != device[None, :])).ravel()
            last = np.broadcast_to(device, (len(last), len(device))).ravel()
            sums = (sums[:, :, None] + added[:, None, :]).reshape(len(sums), -1)
            highest = np.maximum(highest[:, :, None], most[:, None, :]).reshape(len(highest), -1)
        assert sums is not None
        assert highest is not None
        self._weigh(sums, highest)
        self._price(sums, hops)

    def _rows(self, number: int, option: Option) -> tuple[list[int], list[int]]:
        """Return what adds up (bytes by place, serial and copy times, homes of tied weights) and what is a maximum."""
        held = dict.fromkeys(self.places, 0)
        most = {(kind, name): 0 for kind in ("activations", "slots", "staged", "used") for name in self.devices}
        times = {(lane, step, name): 0 for lane in ("serial", "copies") for step, _, _ in self.steps for name in self.devices}
        tied = [0, 0]
        device = option.device
        most["used", device] = 1
        if number == 0:
            held[device] += sum(tensor.nbytes for tensor in self.graph.loose)
        for index, homes in zip(self.units[number], option.homes, strict=True):
            spans = [entry.per_layer()[index] for entry in self.graph.passes]
            held[device] += max(s.kv_after_bytes for s in spans)
            most["activations", device] = max(
                most["activations", device], max(s.held_bytes + s.peak_bytes for s in spans)
            )
            for step, _, passes in self.steps:
                times["serial", step, device] += self._compute(index, passes, device)
            for entry, (home, kept) in zip(self.graph.kind_of(index).groups, homes, strict=True):
                slab, waiting = _slab(entry), entry.slices - kept
                held[device] += kept * _allocated(slab, device)
                held[home] += waiting * slab
                for position, name in enumerate(("embed", "head")):
                    if self.graph.ties and self.graph.layers[index].name == name:
                        tied[position] = 1 + self.places.index(home)
                if not waiting:
                    continue
                if device != "cpu" or entry.slices > 1:
                    most["slots", device] = max(most["slots", device], 2 * _allocated(slab, device))
                if device != "cpu" and home == "disk":
                    most["staged", device] = 1
                for step, _, passes in self.steps:
                    spent = waiting * self._copy(entry, home, device, passes[0].tokens * self.graph.batch_size)
                    times["copies", step, device] += spent
                    if device == "cpu" or entry.slices > 1:
                        times["serial", step, device] += spent
        return [*held.values(), *times.values(), *tied], list(most.values())

    def _compute(self, index: int, passes: tuple[Pass, ...], device: str) -> int:
        facts = self.hardware.device(device)
        total = 0
        for entry in passes:
            work, tokens = entry.per_layer()[index], entry.tokens * self.graph.batch_size
            read = work.moved_bytes
            for part in self.graph.kind_of(index).groups:
                if part.slices > 1:
                    distinct = part.slices * (1.0 - (1.0 - part.used_slices / part.slices) ** tokens)
                    read += int(distinct * part.nbytes / part.slices)
            rate = facts.flops_per_s.get("bfloat16", facts.flops_per_s["default"])
            total += max(
                work.flops * 10**9 // rate, read * 10**9 // facts.bytes_per_s, work.operators * facts.operator_ns
            )
        return total // len(passes)

    def _copy(self, entry: WeightGroup, home: str, device: str, tokens: int) -> int:
        way = [(home, device)] if device == "cpu" or home == "cpu" else [("disk", "cpu"), ("cpu", device)]
        links = [link for link in self.hardware.links if (link.source, link.target) in way]
        whole = sum(link.latency_ns for link in links) + _slab(entry) * 10**9 // min(link.bytes_per_s for link in links)
        distinct = entry.slices * (1.0 - (1.0 - entry.used_slices / entry.slices) ** tokens) if entry.slices > 1 else 1.0
        return int(whole * distinct / entry.slices)

    def _weigh(self, sums: Any, highest: Any) -> None:
        count = len(self.devices)
        activations, slots, staged, used = (highest[i * count : (i + 1) * count] for i in range(4))
        self.held = {}
        for number, name in enumerate(self.places):
            total = sums[number].copy()
            if name != "disk":
                facts = self.hardware.device(name)
                fixed = facts.context_bytes + facts.workspace_bytes + (22 * MIB if name != "cpu" else 0)
                total += activations[number] + slots[number] + used[number] * fixed
            if name == "cpu":
                total += (staged * slots).sum(axis=0)
            self.held[name] = total
        if self.graph.ties:
            size = math.ceil(self.graph.kinds[0].nbytes / 256) * 256
            front, tail = sums[-2], sums[-1]
            for number, name in enumerate(self.places):
                self.held[name] = self.held[name] - size * ((front == tail) & (front == 1 + number))

    def _price(self, sums: Any, hops: Any) -> None:
        self.cost = np.zeros(sums.shape[1], dtype=np.int64)
        names = set(self.devices)
        between = [link for link in self.hardware.links if link.source in names and link.target in names]
        lanes = len(self.steps) * len(self.devices)
        serial = sums[len(self.places) : len(self.places) + lanes]
        copies = sums[len(self.places) + lanes : len(self.places) + 2 * lanes]
        for number, (step, times, _) in enumerate(self.steps):
            rows = slice(number * len(self.devices), (number + 1) * len(self.devices))
            busy = np.maximum(serial[rows], copies[rows]).sum(axis=0)
            edge = self.graph.edges[0]
            nbytes = edge.prefill_bytes if step == "prefill" else edge.decode_bytes
            each = max(link.latency_ns for link in between) + nbytes * 10**9 // min(link.bytes_per_s for link in between)
            self.cost += times * (busy + hops * each)

    def _usable(self, name: str) -> int:
        pool = self.hardware.pool(name)
        return max(0, pool.capacity_bytes - pool.reserved_bytes)

    def best(self) -> int | None:
        """Return the least cost of a placement that fits, or None where none does."""
        fits = np.ones(len(self.cost), dtype=bool)
        for name in self.places:
            fits &= self.held[name] <= self._usable(name)
        return int(self.cost[fits].min()) if fits.any() else None

    def missing(self) -> dict[str, int]:
        """Return for each place the least growth with which something fits, where growing it alone helps."""
        found = {}
        for name in self.places:
            fits = np.ones(len(self.cost), dtype=bool)
            for other in self.places:
                if other != name:
                    fits &= self.held[other] <= self._usable(other)
            if fits.any():
                found[name] = int(self.held[name][fits].min()) - self._usable(name)
        return found

    def placements(self, column: int) -> tuple[Placement, ...]:
        """Return one enumerated placement in the planner's words."""
        picked = []
        for options in reversed(self.options):
            column, choice = divmod(column, len(options))
            picked.append(options[choice])
        result = []
        for unit, option in zip(self.units, reversed(picked), strict=True):
            for index, homes in zip(unit, option.homes, strict=True):
                for entry, (home, kept) in zip(self.graph.kind_of(index).groups, homes, strict=True):
                    kind = "disk" if home == "disk" else "device" if home == option.device else "pinned"
                    result.append(
                        Placement(
                            layer=self.graph.layers[index].name, group=entry.name, home=home, memory=kind,
                            run_on=option.device, nbytes=entry.nbytes,
                            resident_slices=kept if entry.slices > 1 else None,
                        )
                    )  # fmt: skip
        return tuple(result)


def plan_of(case: Case) -> Plan:
    placements, slots, solver = find(case.graph, case.hardware, case.workload)
    plan = Plan(
        schema_version=1,
        model=ModelInfo(
            id="small", source="config", note="", revision=None, config_digest=None, weight_dtype="bfloat16",
            num_parameters=case.graph.num_parameters, weight_bytes=case.graph.weight_bytes, versions={},
        ),
        graph=case.graph, hardware=case.hardware, workload=case.workload,
        execution=Execution(attention="sdpa", experts=None), assumptions=(), placements=placements, slots=slots,
        prediction=None, solver=solver,
    )  # fmt: skip
    return dataclasses.replace(plan, prediction=api.predict(plan))


def check_against_brute_force(case: Case, *, always_optimal: bool) -> None:
    ledger = Ledger(case)
    best = ledger.best()
    if best is None:
        with pytest.raises(InfeasibleError) as caught:
            find(case.graph, case.hardware, case.workload)
        missing = ledger.missing()
        if missing and always_optimal:
            least = min(missing, key=lambda name: (missing[name], name))
            assert (caught.value.device, caught.value.needed_bytes - caught.value.available_bytes) == (
                least,
                missing[least],
            )
        return
    plan = plan_of(case)
    assert plan.solver is not None
    assert verify_plan(plan) == ()
    assert plan.solver.bound_ns <= best <= plan.solver.objective_ns
    if plan.solver.status == "optimal":
        assert plan.solver.objective_ns == best
    if always_optimal:
        assert plan.solver.status == "optimal"


# The solver's answers


@EXAMPLES
@given(case=cases())
def test_alike_blocks_are_placed_as_well_as_brute_force_does(case: Case) -> None:
    check_against_brute_force(case, always_optimal=True)


@EXAMPLES
@given(case=cases(alternating=True))
def test_alternating_blocks_are_never_worse_than_claimed(case: Case) -> None:
    check_against_brute_force(case, always_optimal=False)


@EXAMPLES
@given(case=cases(alternating=True), seed=st.integers(0, 10**6))
def test_cost_and_memory_equal_those_of_independent_formulas(case: Case, seed: int) -> None:
    ledger = Ledger(case)
    for column in random.Random(seed).sample(range(len(ledger.cost)), k=10):
        placements = ledger.placements(column)
        slots = memory.needed_slots(case.graph, case.hardware, placements)
        assert cost.objective_ns(case.graph, case.hardware, case.workload, placements) == ledger.cost[column]
        planned = memory.planned_bytes(case.graph, case.hardware, placements, slots)
        assert {name: usage.total for name, usage in planned.items()} == {
            name: held[column] for name, held in ledger.held.items()
        }
        peaks = memory.peak(case.graph, case.hardware, placements, slots)
        assert all(peaks[name].total <= planned[name].total for name in planned)

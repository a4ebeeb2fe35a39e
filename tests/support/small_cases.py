"""Small graphs and machines made by hand, and a plan for them, for tests that need no model."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from planner import api
from planner.graph import Edge, Layer, LayerGraph, LayerKind, Pass, Span, Tensor, WeightGroup
from planner.hardware import Device, Hardware, Link, MemoryPool
from planner.placement.solution import find
from planner.plan import Execution, ModelInfo, Plan
from planner.rules import NO_RULES, Rules
from planner.workload import Workload

MIB = 2**20


@dataclass(frozen=True)
class Case:
    graph: LayerGraph
    hardware: Hardware
    workload: Workload
    rules: Rules = NO_RULES


def group(name: str, nbytes: int, *, slices: int = 1, used: int = 1, streamable: bool = True) -> WeightGroup:
    shape = (slices, 1, nbytes // 2) if slices > 1 else (1, nbytes // 2)
    tensor = Tensor(name=f"{name}.weight", shape=shape, dtype="bfloat16", nbytes=nbytes * slices)
    return WeightGroup(name=name, slices=slices, used_slices=used, streamable=streamable, tensors=(tensor,))


def end_kind(name: str, nbytes: int, *, by_rows: bool = False) -> LayerKind:
    weights = dataclasses.replace(group("weights", nbytes, streamable=False), by_rows=by_rows)
    return LayerKind(name=name, groups=(weights,))


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
        allocator_bytes=22 * 2**20,
        passes=passes,
    )
    graph.check()
    return graph


def span(
    *, held: int = 0, peak: int = 0, kv: tuple[int, int] = (0, 0), flops: int = 0, moved: int = 0, operators: int = 1
) -> Span:
    return Span(
        count=1, held_bytes=held, peak_bytes=peak, scratch_bytes=peak // 5, kv_before_bytes=kv[0],
        kv_after_bytes=kv[1], input_bytes=64, flops=flops, moved_bytes=moved, operators=operators,
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


def with_nodes(hardware: Hardware, nodes: int, *, network: int = 10**9) -> Hardware:
    """Return a machine of several nodes, each like `hardware`, whose hosts are joined."""

    def renamed(node: int, value: Any) -> Any:
        names = {
            field.name: f"node{node}/{getattr(value, field.name)}"
            for field in dataclasses.fields(value)
            if field.name in ("name", "pool", "source", "target")
        }
        return dataclasses.replace(value, **names)

    numbers = range(nodes)
    between = [
        Link(source=f"node{one}/cpu", target=f"node{other}/cpu", bytes_per_s=network, latency_ns=30_000)
        for one, other in itertools.permutations(numbers, 2)
    ]
    found = Hardware(
        devices=tuple(renamed(node, device) for node in numbers for device in hardware.devices),
        pools=tuple(renamed(node, pool) for node in numbers for pool in hardware.pools),
        links=(*(renamed(node, link) for node in numbers for link in hardware.links), *between),
        pinned_limit_bytes=hardware.pinned_limit_bytes,
    )
    found.check()
    return found


def plan_of(case: Case, *, predicted: bool = True) -> Plan:
    placements, slots, solver = find(case.graph, case.hardware, case.workload, case.rules)
    plan = Plan(
        schema_version=2,
        model=ModelInfo(
            id="small", source="config", note="", revision=None, config_digest=None, weight_dtype="bfloat16",
            num_parameters=case.graph.num_parameters, weight_bytes=case.graph.weight_bytes, versions={},
        ),
        graph=case.graph, hardware=case.hardware, workload=case.workload, rules=case.rules,
        execution=Execution(attention="sdpa", experts=None), assumptions=(), placements=placements, slots=slots,
        prediction=None, solver=solver,
    )  # fmt: skip
    return dataclasses.replace(plan, prediction=api.predict(plan)) if predicted else plan

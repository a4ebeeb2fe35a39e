"""Small random cases, and the solver's answers to them held against brute force.

LOADPLAN_SEED draws others than those that are always tried, and LOADPLAN_FULL=1 ten times as many.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from brute_force import MOST_COLUMNS, Ledger
from planner.errors import InfeasibleError
from planner.graph import Edge, LayerKind, MeasuredTime, Span, Stored, WeightGroup
from planner.hardware import Device, Hardware, Link
from planner.placement.counts import NEAR
from planner.placement.solution import find
from planner.plan import Plan
from planner.rules import Pin, Rules, Sensitivity
from planner.verify import verify_plan
from planner.workload import Workload
from small_cases import MIB, Case, build_graph, end_kind, gpu, group, machine, plan_of, span, with_nodes

SEED = os.environ.get("LOADPLAN_SEED")
FULL = os.environ.get("LOADPLAN_FULL") == "1"
SIZES = [MIB // 2, 3 * MIB + 77 * 2, 8 * MIB, 11 * MIB, 16 * MIB + 6]


def examples(count: int) -> Callable[[Any], Any]:
    """Return a decorator that tries so many cases, the same ones each time unless LOADPLAN_SEED is set; LOADPLAN_FULL=1
    tries ten times as many.
    """
    chosen = settings(
        max_examples=count * (10 if FULL else 1), derandomize=SEED is None, deadline=None, database=None,
        # Cases are small as they are drawn: shrinking takes minutes, and says little more.
        phases=(Phase.explicit, Phase.generate), print_blob=False, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    return lambda test: chosen(test if SEED is None else hypothesis.seed(int(SEED))(test))


# Layers


@st.composite
def groups(draw: st.DrawFn, name: str) -> WeightGroup:
    """Draw a whole group; one in eight is stored in twice the bytes and converted when it is loaded."""
    found = group(name, draw(st.sampled_from(SIZES)))
    if draw(st.integers(0, 7)):
        return found
    (tensor,) = found.tensors
    stored = Stored(
        dtype="float32", item_bytes=4, nbytes=2 * tensor.nbytes, pieces=1, largest_bytes=2 * tensor.nbytes,
        in_place=False,
    )  # fmt: skip
    return dataclasses.replace(found, tensors=(dataclasses.replace(tensor, stored=stored),))


@st.composite
def stored_experts(draw: st.DrawFn, found: WeightGroup) -> WeightGroup:
    """Draw how a checkpoint holds experts: unknown, in one tensor as they are used, or each apart."""
    pieces = draw(st.sampled_from([None, 1, found.slices]))
    if pieces is None:
        return found
    (tensor,) = found.tensors
    stored = Stored(
        dtype=tensor.dtype, item_bytes=2, nbytes=tensor.nbytes, pieces=pieces, largest_bytes=tensor.nbytes // pieces,
        in_place=True,
    )  # fmt: skip
    return dataclasses.replace(found, tensors=(dataclasses.replace(tensor, stored=stored),))


@st.composite
def block_kinds(draw: st.DrawFn, name: str, *, most_groups: int = 3) -> tuple[LayerKind, list[Span]]:
    """Draw a kind of layer with something that may wait elsewhere, and its spans."""
    found = []
    second = draw(st.sampled_from(["none", "mlp", "experts"])) if most_groups > 1 else "none"
    # An MoE's layer may have nothing but experts that can be streamed.
    if second != "experts" or draw(st.booleans()):
        found.append(draw(groups("attn")))
    if second == "mlp":
        found.append(draw(groups("mlp")))
    elif second == "experts":
        slices = draw(st.integers(2, 3))
        used = draw(st.integers(1, slices))
        found.append(draw(stored_experts(group("experts", draw(st.sampled_from(SIZES)), slices=slices, used=used))))
    if draw(st.booleans()):
        found.append(group("rest", draw(st.sampled_from([1024, MIB])), streamable=False))
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
    return LayerKind(name=name, groups=tuple(found)), passes


# Machines


@st.composite
def gpu_sets(draw: st.DrawFn, sets: tuple[str, ...] = ("one", "alike", "different")) -> list[Device]:
    found = [gpu(0, product="big", flops=10**14, rate=10**12)]
    which = draw(st.sampled_from(sets))
    if which in ("alike", "three"):
        found.append(gpu(1, product="big", flops=10**14, rate=10**12))
    elif which == "different":
        found.append(gpu(1, product="small", flops=10**13, rate=2 * 10**11, context=MIB))
    if which == "three":
        found.append(gpu(2, product="big", flops=10**14, rate=10**12))
    return found


@st.composite
def links_of(draw: st.DrawFn, hardware: Hardware) -> Hardware:
    """Draw another rate and latency for every link."""
    rates, latencies = st.sampled_from([10**8, 2 * 10**9, 10**10, 10**11]), st.sampled_from([0, 5_000, 200_000])
    links = [dataclasses.replace(link, bytes_per_s=draw(rates), latency_ns=draw(latencies)) for link in hardware.links]
    return dataclasses.replace(hardware, links=tuple(links))


@st.composite
def fitted(draw: st.DrawFn, case: Case, *, named: bool) -> Case:
    """Draw capacities: parts of the whole, or in half of the cases what some placement needs, or a byte less."""
    hardware = case.hardware
    whole = case.graph.weight_bytes + 10 * MIB
    part = st.sampled_from([0, 15, 30, 45, 60, 80, 100, 130])
    sizes = {}
    for pool in hardware.pools:
        if pool.name.endswith("disk"):
            sizes[pool.name] = whole * draw(st.sampled_from([0, 30, 200])) // 100
        else:
            fixed = 4 * MIB if pool.name.endswith("cpu") else 28 * MIB
            sizes[pool.name] = fixed + whole * draw(part) // 100 + draw(st.integers(0, 3))
    limit = hardware.pinned_limit_bytes
    if draw(st.booleans()):
        ledger = Ledger(case, named=named)
        single = draw(st.sampled_from(ledger.singles))
        column = draw(st.integers(0, ledger.size - 1))
        lacking = draw(st.sampled_from([None, None, *ledger.places]))
        sizes = {n: max(0, int(held[column]) - (n == lacking)) for n, held in ledger.held[single].items()}
        if limit is not None:
            limit = max(int(pinned[column]) for pinned in ledger.pinned[single].values())
    reserved = draw(st.sampled_from([0, MIB]))
    pools = tuple(
        dataclasses.replace(pool, capacity_bytes=sizes[pool.name] + reserved, reserved_bytes=reserved)
        if pool.name.endswith("cpu")
        else dataclasses.replace(pool, capacity_bytes=sizes[pool.name])
        for pool in hardware.pools
    )
    return dataclasses.replace(case, hardware=dataclasses.replace(hardware, pools=pools, pinned_limit_bytes=limit))


def replaced(link: Link, mapped: int) -> Link:
    """Return a link, with a rate of mapped files where it is a disk's."""
    return dataclasses.replace(link, mapped_bytes_per_s=mapped) if link.source == "disk" else link


@st.composite
def machines(draw: st.DrawFn, gpus: tuple[str, ...], *, own_links: bool | None = None, nodes: int = 1) -> Hardware:
    """Draw a machine without capacities: whole ones of one rate, or links that all differ, and a limit of pinning."""
    found = machine(draw(gpu_sets(gpus)), {})
    names = [*(device.name for device in found.devices), "disk"]
    sizes = dict.fromkeys(names, 0)
    found = machine(list(found.gpus), sizes)
    if draw(st.booleans()):
        # A host so slow that streaming to GPUs is worth it.
        slow = [dataclasses.replace(d, bytes_per_s=10**9, flops_per_s={"default": 10**10}) for d in found.hosts]
        found = dataclasses.replace(found, devices=(*found.gpus, *slow))
    if mapped := draw(st.sampled_from([0, 10**9])):
        links = [replaced(link, mapped) for link in found.links]
        found = dataclasses.replace(found, links=tuple(links))
    if draw(st.integers(0, 3)) == 0:
        found = dataclasses.replace(found, pinned_limit_bytes=draw(st.sampled_from([0, 4 * MIB, 20 * MIB])))
    if nodes > 1:
        found = with_nodes(found, nodes, network=draw(st.sampled_from([10**8, 10**10])))
    return draw(links_of(found)) if draw(st.booleans() if own_links is None else st.just(own_links)) else found


# Cases

OBJECTIVES = ["latency", "latency", "latency", "ttft", "tpot", "fit"]


@st.composite
def chains(
    draw: st.DrawFn,
    *,
    alternating: bool = False,
    gpus: tuple[str, ...] = ("one", "one", "alike", "different"),
    own_links: bool | None = False,
    nodes: int = 1,
    rules: st.SearchStrategy[Rules] | None = None,
    most_groups: int = 3,
) -> Case:
    """Draw embeddings, two to five blocks and a head on a machine."""
    first = draw(block_kinds("First", most_groups=most_groups))
    second = draw(block_kinds("Second", most_groups=most_groups))
    size = st.sampled_from([MIB, 6 * MIB, 20 * MIB])
    kinds = [end_kind("Embedding", draw(size)), end_kind("Norm", 64 * 1024), end_kind("Head", draw(size))]
    tie = (("embed.weights.weight", "head.weights.weight"),) if draw(st.integers(0, 3)) == 0 else ()
    if tie:
        kinds[2] = end_kind("Head", kinds[0].nbytes)
    still = [span(held=500, peak=draw(st.sampled_from([0, 3 * MIB])), flops=10**6, moved=10**6) for _ in range(3)]
    tail = [("norm", 1), ("head", 2)] if rules is None and draw(st.booleans()) else [("head", 2)]
    hop = draw(st.sampled_from([64, 10**6, 10**8]))
    batch, loose = draw(st.sampled_from([1, 4])), draw(st.sampled_from([0, 512]))
    broadcast = draw(st.sampled_from([0, 0, 128, 10**7]))
    hardware = draw(machines(gpus, own_links=own_links, nodes=nodes))
    tokens = draw(st.sampled_from([1, 3, 20]))
    work = Workload(batch_size=batch, prompt_tokens=8, new_tokens=tokens, objective=draw(st.sampled_from(OBJECTIVES)))
    asked = Rules() if rules is None else draw(rules)
    for count in range(draw(st.integers(2, 5)), 0, -1):
        blocks = [(f"block.{i}", 4 if alternating and i % 2 else 3) for i in range(count)]
        passes = min(3, tokens)
        graph = build_graph(
            [*kinds, first[0], second[0]], [part[:passes] for part in (still, still, still, first[1], second[1])],
            [("embed", 0), *blocks, *tail], ties=tie, loose_bytes=loose, hop_bytes=(hop, 256), batch_size=batch,
        )  # fmt: skip
        if broadcast:
            given = [
                Edge(source=0, target=i, prefill_bytes=broadcast, decode_bytes=32, tensor="table")
                for i in range(1, count + 1)
            ]
            graph = dataclasses.replace(graph, edges=graph.edges + tuple(given))
        case = Case(graph, hardware, work, asked)
        if Ledger(case).size <= MOST_COLUMNS:
            return draw(fitted(case, named=False))
    return hypothesis.reject()


@st.composite
def networks(
    draw: st.DrawFn,
    *,
    gpus: tuple[str, ...] = ("one", "alike", "different"),
    own_links: bool | None = None,
    nodes: int = 1,
    rules: st.SearchStrategy[Rules] | None = None,
) -> Case:
    """Draw layers with skips and branches between them: some edges must not be cut, some layers have measured times."""
    kinds = [draw(block_kinds(name, most_groups=2 if i else 1)) for i, name in enumerate(("First", "Second"))]
    count = draw(st.integers(3, 5))
    order = [(f"layer.{i}", draw(st.sampled_from([0, 0, 1]))) for i in range(count)]
    hardware = draw(machines(gpus, own_links=own_links, nodes=nodes))
    tokens = draw(st.sampled_from([1, 2, 20]))
    work = Workload(prompt_tokens=8, new_tokens=tokens, objective=draw(st.sampled_from(OBJECTIVES)))
    asked = Rules() if rules is None else draw(rules)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    edges = [
        Edge(
            source=source, target=target, prefill_bytes=draw(st.sampled_from([0, 64, 10**6, 10**8])),
            decode_bytes=draw(st.sampled_from([0, 256, 10**6])), tensor=draw(st.sampled_from(["", "other"])),
            may_cut=draw(st.integers(0, 7)) > 0,
        )
        for source, target in draw(st.lists(st.sampled_from(pairs), min_size=1, max_size=7, unique=True))
    ]  # fmt: skip
    measured = [
        MeasuredTime(layer=i, device=device.name, prefill_ns=draw(st.integers(0, 10**6)), decode_ns=1000 * i)
        for i in range(count)
        for device in hardware.devices
        if draw(st.integers(0, 9)) == 0
    ]
    tie = ()
    whole = [name for name, kind in order if kind == order[0][1] and kinds[kind][0].groups[0].slices == 1]
    if len(whole) > 1 and draw(st.integers(0, 2)) == 0:
        tensor = kinds[order[0][1]][0].groups[0].tensors[0].name
        tie = (tuple(f"{name}.{tensor}" for name in whole[:3]),)
    while count > 1:
        graph = build_graph(
            [kind for kind, _ in kinds], [passes[: min(3, tokens)] for _, passes in kinds], order[:count], ties=()
        )
        names = {name for name, _ in order[:count]}
        kept = tuple(tuple(n for n in names_ if n.rsplit(".", 2)[0] in names) for names_ in tie)
        graph = dataclasses.replace(
            graph,
            edges=tuple(edge for edge in edges if edge.target < count),
            measured=tuple(time for time in measured if time.layer < count),
            ties=tuple(entry for entry in kept if len(entry) > 1),
        )
        graph.check()
        case = Case(graph, hardware, work, asked)
        if Ledger(case, named=True).size <= MOST_COLUMNS:
            return draw(fitted(case, named=True))
        count -= 1
    return hypothesis.reject()


@st.composite
def choices_of_precision(draw: st.DrawFn) -> Rules:
    dtypes = draw(st.sampled_from([("int8",), ("nf4",), ("int8", "nf4"), ("nf4", "int8")]))
    table = (
        Sensitivity(groups=r"First\.attn", dtype="int8", loss=0.25),
        Sensitivity(groups=r".*\.(attn|experts)", dtype="int8", loss=0.5),
        Sensitivity(groups=r".*\.attn", dtype="nf4", loss=2.0),
        Sensitivity(groups=r".*", dtype="nf4", loss=1.0),
    )
    budget = draw(st.sampled_from([0.0, 0.1101, 0.3001, 0.7501, 1.2001, 9.0]))
    return Rules(dtypes=dtypes, quality_budget=budget, sensitivity=table)


@st.composite
def constraints(draw: st.DrawFn, *, names: tuple[str, ...] = ("cuda:0", "cpu")) -> Rules:
    pins = [
        Pin(layers=draw(st.sampled_from([r".*\.0", r".*\.[12]", r"block\.3", r"head|norm", r"embed"])), device=device)
        for device in draw(st.lists(st.sampled_from(names), max_size=2))
    ]
    return Rules(
        pins=tuple(pins), never_on_disk=draw(st.booleans()), contiguous=draw(st.booleans()),
        cpu_experts=draw(st.booleans()), never_across_nodes=draw(st.booleans()),
    )  # fmt: skip


# The oracle


def check_against_brute_force(case: Case, *, named: bool = False, always_optimal: bool = True) -> None:
    """Hold everything the solver says of a case against all of its placements."""
    ledger = Ledger(case, named=named)
    best = ledger.best()
    if best is None:
        with pytest.raises(InfeasibleError) as caught:
            find(case.graph, case.hardware, case.workload, case.rules)
        missing = ledger.missing()
        if missing and case.hardware.pinned_limit_bytes is None:
            least = min(missing, key=lambda name: (missing[name], name))
            grown = caught.value.needed_bytes - caught.value.available_bytes
            assert (caught.value.device, grown) == (least, missing[least])
        return
    plan = plan_of(case, predicted=len(case.hardware.nodes) == 1)
    solver = plan.solver
    assert solver is not None
    assert verify_plan(plan) == ()
    in_bytes = case.workload.objective == "fit"
    objective, bound = solver.objective_ns, solver.bound_ns
    if in_bytes:
        assert solver.objective_bytes is not None
        assert solver.bound_bytes is not None
        objective, bound = solver.objective_bytes, solver.bound_bytes
    assert bound <= objective
    assert (solver.status == "optimal") == (bound == objective)
    assert (solver.gap == 0.0) == (bound == objective)
    if objective < best and not named:
        # Layers before the first block and after the last may be apart in what was found with every layer named.
        best = apart(case) if Ledger(case, named=True).size <= MOST_COLUMNS else objective
    assert bound <= best <= objective
    if always_optimal:
        assert solver.gap <= NEAR, (objective, bound, best)


def apart(case: Case) -> int:
    best = Ledger(case, named=True).best()
    assert best is not None
    return best


def answer(case: Case) -> Plan | str:
    """Return the plan, or why there is none."""
    try:
        return plan_of(case, predicted=len(case.hardware.nodes) == 1)
    except InfeasibleError as error:
        return str(error)

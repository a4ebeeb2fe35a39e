"""Experts that the CPU computes straight from files that hold them as they are used: no slots, the rate of mapping."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

import planner
import simulate
from brute_force import MOST_COLUMNS, Ledger
from drawn_cases import check_against_brute_force
from planner import memory
from planner.graph import LayerGraph, LayerKind, Stored, WeightGroup
from planner.placement import rent
from planner.placement.problem import build
from planner.plan import Plan
from planner.rules import Rules
from planner.verify import verify_plan
from planner.workload import Workload
from small_cases import MIB, Case, build_graph, end_kind, gpu, group, machine, plan_of, span

SEEDS = range(20)
MAPPED = 2 * 10**9


def stored_in(entry: WeightGroup, pieces: int, dtype: str = "bfloat16") -> WeightGroup:
    """Return the group as a checkpoint holds it: in so many tensors."""
    tensors = tuple(
        dataclasses.replace(
            tensor,
            stored=Stored(
                dtype=dtype, item_bytes=2, nbytes=tensor.nbytes, pieces=pieces, in_place=True,
                largest_bytes=tensor.nbytes // pieces,
            ),
        )
        for tensor in entry.tensors
    )  # fmt: skip
    return dataclasses.replace(entry, tensors=tensors)


def graph_of(experts: WeightGroup, *, blocks: int, attn: int = 2 * MIB) -> LayerGraph:
    kinds = [end_kind("Embedding", MIB), end_kind("Head", MIB)]
    kinds.append(LayerKind(name="Block", groups=(group("attn", attn, streamable=False), experts)))
    ends = [span(held=100, peak=MIB, flops=10**6, moved=10**6)] * 3
    work = [span(held=100, peak=MIB, kv=(0, 4096), flops=10**9, moved=10**6)] * 3
    order = [("embed", 0), *[(f"block.{number}", 2) for number in range(blocks)], ("head", 1)]
    return build_graph(kinds, [ends, ends, work], order)


def case_of(graph: LayerGraph, cpu: int, *, gpus: int = 0) -> Case:
    devices = [gpu(number, product="big", flops=10**14, rate=10**12) for number in range(gpus)]
    hardware = machine(
        devices, {"cuda:0": 42 * MIB} | {"cpu": cpu, "disk": 2**40} if gpus else {"cpu": cpu, "disk": 2**40}
    )
    links = tuple(
        dataclasses.replace(link, mapped_bytes_per_s=MAPPED) if link.source == "disk" else link
        for link in hardware.links
    )
    return Case(graph, dataclasses.replace(hardware, links=links), Workload(prompt_tokens=8, new_tokens=20))


EXPERTS = group("experts", 2 * MIB, slices=4, used=1)
# Everything but the experts of two blocks, and one of each of these.
REST = 2 * MIB + 2 * 2 * MIB + 2 * 2 * MIB + 2 * MIB


@pytest.mark.parametrize(
    ("experts", "is_mapped"),
    [
        (EXPERTS, False),
        (stored_in(EXPERTS, 1), True),
        (stored_in(EXPERTS, 4), False),
        (stored_in(EXPERTS, 1, "float16"), False),
    ],
    ids=["unknown", "fused", "apart", "converted"],
)
def test_what_is_mapped_needs_no_slots_and_is_read_as_fast_as_it_is_mapped(
    experts: WeightGroup, is_mapped: bool
) -> None:
    assert experts.is_mappable is is_mapped
    case = case_of(graph_of(experts, blocks=2), REST if is_mapped else REST + 4 * MIB)
    plan = plan_of(case)
    assert verify_plan(plan) == ()
    placed = [(p, g) for p, g in memory.with_groups(plan.graph, plan.placements) if p.resident_slices is not None]
    assert [p.memory for p, _ in placed] == ["disk", "disk"]
    assert {memory.is_mapped(plan.hardware, g, p.run_on, p.memory) for p, g in placed} == {is_mapped}
    wanted = () if is_mapped else ((2, 2 * MIB, "experts"),)
    assert tuple((s.count, s.slot_bytes, s.holds) for s in plan.slots) == wanted
    assert memory.static_usage(plan.graph, plan.hardware, plan.placements, plan.slots)["cpu"].slots == (
        0 if is_mapped else 4 * MIB
    )
    # One of four is used by a token: of those that wait as many are read, one step like another.
    waiting = sum(4 - (p.resident_slices or 0) for p, _ in placed)
    assert waiting == 6
    rate = MAPPED if is_mapped else 3 * 10**9
    each = 100_000 + 2 * MIB * 10**9 // rate
    simulated = simulate.run(plan)
    reads = [i.duration_ns for i in simulated.intervals if i.action == "read" and i.step == 1]
    assert sum(reads) == pytest.approx(waiting * each / 4, abs=10)
    assert plan.solver is not None
    assert simulated.total_ns == pytest.approx(plan.solver.objective_ns, rel=1e-3)
    drawn = simulate.run(plan, seed=0)
    found = {i.duration_ns for i in drawn.intervals if i.action == "read"}
    assert found == {each}


@pytest.mark.parametrize("pieces", [1, 4])
def test_slots_are_asked_for_only_where_slices_are_copied(pieces: int) -> None:
    plan = plan_of(case_of(graph_of(stored_in(EXPERTS, pieces), blocks=2), REST + 4 * MIB))
    bare = dataclasses.replace(plan, slots=(), prediction=None)
    assert [violation.rule for violation in verify_plan(bare)] == ([] if pieces == 1 else ["slots"])


def test_a_gpu_copies_what_the_cpu_would_map() -> None:
    experts = stored_in(EXPERTS, 1)
    graph = graph_of(experts, blocks=2)
    hardware = case_of(graph, 10 * MIB, gpus=1).hardware
    for name, kind, expected in (
        ("cpu", "disk", False), ("cuda:0", "disk", True), ("cuda:0", "pinned", True),
    ):  # fmt: skip
        assert memory.through_slot(hardware, experts, name, kind, tokens=8) is expected  # type: ignore[arg-type]
    assert not memory.through_slot(hardware, experts, "cuda:0", "pinned", tokens=8, cpu_up_to_tokens=8)
    assert memory.through_slot(hardware, experts, "cuda:0", "pinned", tokens=9, cpu_up_to_tokens=8)


def small_case(seed: int) -> Case:
    """Return blocks of experts, fused or apart, and groups that may wait, on a CPU too small, and maybe a GPU."""
    rng = random.Random(seed)
    slices, gpus = rng.choice([2, 3]), seed % 2
    experts = group("experts", rng.choice([1, 4, 9]) * MIB, slices=slices, used=rng.choice([1, 2]))
    graph = graph_of(stored_in(experts, rng.choice([1, 1, slices])), blocks=2, attn=rng.choice([1, 6]) * MIB)
    if seed % 4 < 2:
        kinds = [
            dataclasses.replace(kind, groups=tuple(dataclasses.replace(g, streamable=True) for g in kind.groups))
            if kind.name == "Block"
            else kind
            for kind in graph.kinds
        ]
        graph = dataclasses.replace(graph, kinds=tuple(kinds))
    found = case_of(graph, 3 * MIB + int(graph.weight_bytes * rng.uniform(0.15, 0.9)), gpus=gpus)
    return dataclasses.replace(found, rules=Rules(cpu_experts=rng.random() < 0.5))


@pytest.mark.parametrize("seed", SEEDS)
def test_mapped_experts_are_placed_as_well_as_brute_force_does(seed: int) -> None:
    case = small_case(seed)
    ledger = Ledger(case)
    assert ledger.size <= MOST_COLUMNS
    check_against_brute_force(case)
    best = ledger.best()
    bound, _ = rent.with_rent(build(case.graph, case.hardware, case.workload, case.rules, named=False))
    assert best is None or bound <= best


# Checkpoints


def plan_from(folder: Path, **options: Any) -> Plan:
    config = MixtralConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, **options)
    return planner.plan_model(
        str(folder), gpus=0, batch_size=1, prompt_tokens=9, new_tokens=3, max_memory={"cpu": "200kB"}
    )


def test_experts_that_a_checkpoint_holds_fused_are_mapped_and_others_are_not(tmp_path: Path) -> None:
    for name, options in (("apart", {}), ("fused", {"save_original_format": False})):
        plan = plan_from(tmp_path / name, **options)
        away = [
            g
            for p, g in memory.with_groups(plan.graph, plan.placements)
            if p.memory == "disk" and p.resident_slices is not None
        ]
        assert away
        assert {g.is_mappable for g in away} == {name == "fused"}
        assert {entry.holds for entry in plan.slots} == (set() if name == "fused" else {"experts"})
        assert verify_plan(plan) == ()
        assert Plan.from_json(plan.to_json()) == plan

"""Keys and values in host memory: what transformers' offloaded cache holds, what it costs by brute force, and plans."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM, cache_utils

import planner
from brute_force import MOST_COLUMNS, Ledger
from drawn_cases import chains, check_against_brute_force, examples, networks
from live_storages import live_passes
from planner import cost, host_cache, memory
from planner.errors import InfeasibleError, InputError, TraceError
from planner.graph import LayerKind
from planner.rules import Pin, Rules
from planner.trace import Tracing
from planner.workload import Workload
from small_cases import MIB, Case, build_graph, end_kind, gpu, group, machine, plan_of, span
from tiny_models import CONFIGS

# What it holds


class Stream:
    """Stands for a stream of CUDA."""

    def __enter__(self) -> None: ...

    def __exit__(self, *raised: object) -> None: ...

    def wait_stream(self, other: Any) -> None: ...


@pytest.fixture
def _host_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' own offloading run on the CPU: what it moves to the host is no longer counted."""
    away: set[int] = set()

    def offload(layer: Any) -> None:
        with _disable_current_modes():
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        away.add(id(layer))

    def prefetch(layer: Any) -> None:
        if layer.is_initialized and id(layer) in away:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
            away.discard(id(layer))

    monkeypatch.setattr(cache_utils.CacheLayerMixin, "offload", offload)
    monkeypatch.setattr(cache_utils.CacheLayerMixin, "prefetch", prefetch)
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: Stream())
    return


@pytest.mark.usefixtures("_host_apart")
@pytest.mark.parametrize(("name", "batch", "chunk"), [("mixtral", 1, None), ("llama", 3, 5)])
def test_every_layer_holds_what_transformers_own_cache_leaves_there(name: str, batch: int, chunk: int | None) -> None:
    """Never less than is held, and at most one layer's keys and values more: they are freed before the layer ends."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.eos_token_id = None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if name == "mixtral":
        model.set_experts_implementation("grouped_mm")
    work = Workload(batch_size=batch, prompt_tokens=13, new_tokens=5, prefill_chunk=chunk)
    tracing = Tracing(model, work, experts="grouped_mm" if name == "mixtral" else None)
    graph = host_cache.on_host(tracing.graph())
    ids = torch.randint(3, 300, (batch, 13))
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": 5, "do_sample": False}
    options |= {"prefill_chunk_size": chunk} if chunk else {}

    def call() -> Any:
        return model.generate(ids, attention_mask=mask, cache_implementation="offloaded", **options)

    real = live_passes(model, [path for path, _ in tracing.layers], call)
    calls = tracing.inputs.chunks.count
    assert len(real) == calls + 4
    numbers = {**tracing.inputs.chunks.named(), calls: "decode_first", len(real) - 1: "decode_last"}
    for number, title in numbers.items():
        entry = next(entry for entry in graph.passes if entry.name == title)
        order = {layer.name: index for index, layer in enumerate(graph.layers)}
        for found in real[number]:
            said = entry.per_layer()[order[found.layer]]
            # Options that the workload has no word for are the caller's own, and small.
            slack = said.kv_down_bytes
            most = said.held_bytes + said.peak_bytes
            assert found.most_bytes <= most <= found.most_bytes + slack, (title, found.layer, found, said)
            assert abs(said.held_bytes - found.held_bytes) <= 64, (title, found.layer)


def test_what_is_pinned_is_a_power_of_two_for_each_that_was_gone_through() -> None:
    for first, now in itertools.product((0, 2, 6, 2000, 2**21), (2, 8, 10, 4096, 2**21, 2**22 + 2)):
        if first > now:
            continue
        blocks, size = set(), max(first, 1) if first else now
        while size <= now:
            blocks.add(next(2**n for n in range(64) if 2**n >= size / 2))
            size += 1 if size < 64 else max(1, size // 64)
        blocks.add(next(2**n for n in range(64) if 2**n >= now / 2))
        assert host_cache._pinned_bytes(first, now) == 2 * sum(blocks)


# Cost and placement


def on_host(case: Case, seed: int) -> Case:
    """Return a case whose caches, of sizes drawn, wait in host memory."""
    rng = random.Random(seed)
    sizes = [rng.choice([0, MIB // 8, MIB, 3 * MIB]) for _ in case.graph.kinds]
    passes = []
    for number, entry in enumerate(case.graph.passes):
        spans = tuple(
            dataclasses.replace(
                one, kv_before_bytes=number * sizes[layer.kind], kv_after_bytes=(number + 1) * sizes[layer.kind]
            )
            for one, layer in zip(entry.per_layer(), case.graph.layers, strict=True)
        )
        passes.append(dataclasses.replace(entry, spans=spans))
    graph = host_cache.on_host(dataclasses.replace(case.graph, passes=tuple(passes)))
    return dataclasses.replace(case, graph=graph)


@examples(12)
@given(case=chains(), seed=st.integers(0, 10**6))
def test_chains_are_placed_as_well_as_brute_force_does(case: Case, seed: int) -> None:
    check_against_brute_force(on_host(case, seed))


@examples(8)
@given(case=networks(gpus=("one", "alike")), seed=st.integers(0, 10**6))
def test_graphs_are_placed_as_well_as_brute_force_does(case: Case, seed: int) -> None:
    check_against_brute_force(on_host(case, seed), named=True)


@examples(15)
@given(case=chains(alternating=True, own_links=None), seed=st.integers(0, 10**6))
def test_cost_and_memory_equal_those_of_independent_formulas(case: Case, seed: int) -> None:
    case = on_host(case, seed)
    ledger, rng = Ledger(case), random.Random(seed)
    assert ledger.size <= MOST_COLUMNS
    for column in rng.sample(range(ledger.size), k=min(ledger.size, 10)):
        single, placements = rng.choice(ledger.singles), ledger.placements(column)
        slots = memory.needed_slots(case.graph, case.hardware, placements, single=single)
        if case.workload.objective != "fit":
            found = cost.objective_ns(case.graph, case.hardware, case.workload, placements, slots)
            assert found == ledger.cost[single][column]
        planned = memory.planned_bytes(case.graph, case.hardware, placements, slots)
        held = ledger.held[single]
        assert {name: usage.total for name, usage in planned.items()} == {name: held[name][column] for name in held}
        pinned = memory.pinned_bytes(case.graph, case.hardware, placements, slots)
        assert pinned == {name: held[column] for name, held in ledger.pinned[single].items()}
        peaks = memory.peak(case.graph, case.hardware, placements, slots)
        assert all(peaks[name].total <= planned[name].total for name in planned)


def cached_case(*, kv: int, gpu_mib: int, gpus: int = 1, flops: int = 10**10) -> Case:
    """Return blocks whose caches wait on the host; of little memory, their weights do too."""
    kinds = [end_kind("Embedding", MIB), end_kind("Head", MIB)]
    kinds.append(LayerKind(name="Block", groups=(group("attn", 4 * MIB), group("mlp", 8 * MIB))))
    ends = [span(held=100, peak=MIB, flops=10**6, moved=10**6)] * 3
    work = [
        span(held=100, peak=MIB, kv=(0, kv), flops=8 * flops, moved=10**6),
        span(held=100, peak=MIB, kv=(kv, kv + 512), flops=flops, moved=10**6),
        span(held=100, peak=MIB, kv=(kv + 5120, kv + 5632), flops=flops, moved=10**6),
    ]
    layers = [("embed", 0), *[(f"block.{i}", 2) for i in range(8)], ("head", 1)]
    graph = host_cache.on_host(build_graph(kinds, [ends, ends, work], layers))
    devices = [gpu(i, product="big", flops=10**14, rate=10**12) for i in range(gpus)]
    sizes = {device.name: gpu_mib * MIB for device in devices} | {"cpu": 4000 * MIB, "disk": 0}
    rules = Rules(pins=(Pin(layers="embed|head", device="cuda:0"),))
    return Case(graph, machine(devices, sizes), Workload(prompt_tokens=8, new_tokens=12, cache="offloaded"), rules)


@pytest.mark.parametrize("flops", [10**9, 10**11])
@pytest.mark.parametrize(
    ("kv", "gpu_mib", "gpus"),
    [(MIB, 300, 1), (16 * MIB, 300, 1), (4 * MIB, 60, 1), (16 * MIB, 120, 1), (4 * MIB, 90, 2), (4 * MIB, 60, 2)],
)
def test_the_simulator_takes_what_a_cache_on_the_host_costs(kv: int, gpu_mib: int, gpus: int, flops: int) -> None:
    case = cached_case(kv=kv, gpu_mib=gpu_mib, gpus=gpus, flops=flops)
    plan = plan_of(case)
    assert plan.solver is not None
    assert plan.prediction is not None
    assert planner.verify_plan(plan) == ()
    # A chain this short is begun and ended with copies that nothing hides; so it is without a cache.
    assert plan.prediction.total_ns == pytest.approx(plan.solver.objective_ns, rel=0.08 if gpus == 1 else 0.12)
    assert plan.prediction.peak_breakdown["cpu"]["kv_cache"] == sum(
        host_cache.host_bytes([entry.per_layer()[index] for entry in case.graph.passes]) for index in range(10)
    )
    assert plan.prediction.peak_breakdown["cuda:0"]["kv_cache"] == 0


def test_layers_with_a_cache_on_the_host_run_on_gpus_only() -> None:
    case = cached_case(kv=MIB, gpu_mib=300)
    on_cpu = dataclasses.replace(case, rules=Rules(pins=(Pin(layers="block.3", device="cpu"),)))
    with pytest.raises(InfeasibleError):
        plan_of(on_cpu)
    plan = plan_of(case)
    moved = tuple(
        dataclasses.replace(p, run_on="cpu", home="cpu", memory="pageable") if p.layer == "block.3" else p
        for p in plan.placements
    )
    broken = planner.verify_plan(dataclasses.replace(plan, placements=moved, prediction=None))
    assert "offloaded cache" in {violation.rule for violation in broken}


def test_pinned_memory_holds_the_cache_too() -> None:
    case = cached_case(kv=16 * MIB, gpu_mib=300)
    plan = plan_of(case)
    need = memory.pinned_bytes(plan.graph, plan.hardware, plan.placements, plan.slots)["cpu"]
    assert need >= 8 * 16 * MIB
    short = dataclasses.replace(case.hardware, pinned_limit_bytes=need - 1)
    with pytest.raises(InfeasibleError):
        plan_of(dataclasses.replace(case, hardware=short))
    assert plan_of(dataclasses.replace(case, hardware=dataclasses.replace(short, pinned_limit_bytes=need)))


# Plans of models


def test_the_longest_prompt_is_longer_with_a_cache_on_the_host() -> None:
    config = CONFIGS["llama"]()
    config.max_position_embeddings, config.num_hidden_layers, config.num_key_value_heads = 1024, 24, 4
    found = []
    for caches in ((), ("offloaded",)):
        plan = planner.plan_model(
            config, gpus="1x24GB", max_memory={"cuda:0": "360MB"}, objective="max-context", new_tokens=3,
            prompt_tokens=64, batch_size=4, use_cache=False,
            rules=Rules(caches=caches, pins=(Pin(layers=".*", device="cuda:0"),)), # type: ignore[arg-type]
        )  # fmt: skip
        assert planner.verify_plan(plan) == ()
        found.append(plan)
    assert found[1].workload.cache == "offloaded"
    assert found[1].workload.prompt_tokens > found[0].workload.prompt_tokens
    prediction = found[1].prediction
    assert prediction is not None
    assert prediction.peak_breakdown["cpu"]["kv_cache"] > 0
    assert any("pinned" in note and "offloaded" in note for note in found[1].assumptions)


def test_models_whose_cache_cannot_be_offloaded_are_named() -> None:
    with pytest.raises(TraceError, match="no GPU"):
        planner.plan_model(CONFIGS["llama"](), gpus=0, cache="offloaded", use_cache=False, prompt_tokens=8)
    with pytest.raises(TraceError, match="encoder-decoder"):
        planner.plan_model("t5-small", gpus="24GB", cache="offloaded", use_cache=False, prompt_tokens=8)
    with pytest.raises(InputError, match="--cache offloaded"):
        planner.predict_memory(CONFIGS["llama"](), Workload(cache="offloaded"), device="cpu")


def test_the_trace_of_an_offloaded_cache_leaves_nothing_on_the_device() -> None:
    plan = planner.plan_model(
        CONFIGS["llama"](), gpus="24GB", cache="offloaded", use_cache=False, prompt_tokens=40, new_tokens=4
    )
    per_token = 2 * 2 * 16 * 2
    last = plan.graph.passes[-1].per_layer()
    assert {one.kv_after_bytes for one in last} == {0}
    assert {one.kv_down_bytes for one in last} == {0, 43 * per_token}
    assert {one.kv_up_bytes for one in last} == {0, 42 * per_token}

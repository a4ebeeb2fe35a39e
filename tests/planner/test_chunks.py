"""Prompts in chunks: how they are cut, what they cost by brute force, and that the simulator agrees."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import planner
import simulate
from brute_force import Ledger
from drawn_cases import chains, check_against_brute_force, examples, networks
from planner import chunks as cuts
from planner import cost, footprint, memory
from planner.chunks import chunks
from planner.errors import InputError, TraceError
from planner.graph import LayerKind, Pass
from planner.plan import Placement
from planner.rules import Pin, Rules
from planner.tracer import tracing_for
from planner.workload import Workload
from simulate import series
from small_cases import MIB, Case, build_graph, end_kind, gpu, group, machine, plan_of, span
from tiny_models import CONFIGS

LENGTHS = [(prompt, chunk) for prompt in (1, 7, 16, 25, 40) for chunk in (1, 2, 5, 8, 50)]


@pytest.mark.parametrize(("prompt", "chunk"), LENGTHS)
def test_a_prompt_is_cut_as_torch_cuts_it(prompt: int, chunk: int) -> None:
    real = [len(part) for part in torch.arange(prompt).split(chunk)]
    cut = chunks(prompt, chunk)
    assert [cut.tokens_of(number) for number in range(cut.count)] == real
    assert [cut.ends_at(number) for number in range(cut.count)] == [sum(real[: n + 1]) for n in range(len(real))]
    sizes, numbers = cut.sizes(), cut.numbers()
    assert sum(sizes) == prompt
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    for size, number, end in zip(sizes, numbers, ends, strict=True):
        if number is not None:
            assert (size, end) == (real[number], cut.ends_at(number))
    assert set(cut.named()) <= set(numbers), "what a graph holds is traced"


def test_what_a_workload_refuses() -> None:
    for wrong in (0, -1, True, 2.5):
        with pytest.raises(InputError, match="prefill_chunk"):
            Workload(prefill_chunk=wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="generate"):
        Workload(prefill_chunk=4, caller="forward")


# Cost and placement


def in_chunks(case: Case, chunk: int, seed: int) -> Case:
    """Return a case whose prompt comes in chunks, each costing its own; none takes more memory than the prefill did."""
    rng = random.Random(seed)
    prompt = case.workload.prompt_tokens
    whole, rest = divmod(prompt, chunk)
    names = [
        "prefill",
        *["prefill_next"] * (whole > 1),
        *["prefill_last"] * (whole > 2),
        *["prefill_rest"] * (rest > 0),
    ]
    first = case.graph.passes[0]
    passes = []
    for name in names:
        spans = tuple(
            dataclasses.replace(s, flops=int(s.flops * part), moved_bytes=int(s.moved_bytes * part))
            for s, part in ((s, rng.choice([0.25, 0.5, 1.0])) for s in first.per_layer())
        )
        tokens = rest if name == "prefill_rest" else chunk
        passes.append(Pass(name=name, tokens=tokens, context_tokens=prompt, spans=spans))
    graph = dataclasses.replace(case.graph, passes=(*passes, *case.graph.passes[1:]))
    return dataclasses.replace(case, graph=graph, workload=dataclasses.replace(case.workload, prefill_chunk=chunk))


@examples(10)
@given(case=chains(alternating=False), chunk=st.sampled_from([1, 2, 3, 4, 5]), seed=st.integers(0, 10**6))
def test_chains_in_chunks_are_placed_as_well_as_brute_force_does(case: Case, chunk: int, seed: int) -> None:
    check_against_brute_force(in_chunks(case, chunk, seed))


@examples(10)
@given(case=networks(gpus=("one", "alike")), chunk=st.sampled_from([2, 3, 5]), seed=st.integers(0, 10**6))
def test_graphs_in_chunks_are_placed_as_well_as_brute_force_does(case: Case, chunk: int, seed: int) -> None:
    check_against_brute_force(in_chunks(case, chunk, seed), named=True)


@examples(12)
@given(case=chains(alternating=True, own_links=None), chunk=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_cost_of_chunks_equals_that_of_independent_formulas(case: Case, chunk: int, seed: int) -> None:
    case = in_chunks(case, chunk, seed)
    if case.workload.objective == "fit":
        case = dataclasses.replace(case, workload=dataclasses.replace(case.workload, objective="latency"))
    ledger, rng = Ledger(case), random.Random(seed)
    for column in rng.sample(range(ledger.size), k=min(ledger.size, 10)):
        single, placements = rng.choice(ledger.singles), ledger.placements(column)
        slots = memory.needed_slots(case.graph, case.hardware, placements, single=single)
        found = cost.objective_ns(case.graph, case.hardware, case.workload, placements, slots)
        assert found == ledger.cost[single][column]


def streamed_case(*, prompt: int, chunk: int | None, experts: int = 0, flops: int = 10**12) -> Case:
    """Return blocks that mostly wait, whose passes are affine in the context."""
    kinds = [end_kind("Embedding", MIB), end_kind("Head", MIB)]
    second = group("experts", 2 * MIB, slices=experts, used=1) if experts else group("mlp", 8 * MIB)
    kinds.append(LayerKind(name="Block", groups=(group("attn", 4 * MIB), second)))
    layers = [("embed", 0), *[(f"block.{i}", 2) for i in range(8)], ("head", 1)]
    cut = chunks(prompt, chunk)
    named = cut.named()

    def work(tokens: int, context: int) -> Any:
        return span(held=100, peak=MIB, kv=(0, 4096), flops=tokens * (flops + context * flops // 100), moved=10**6)

    numbers = sorted(named)
    first = build_graph(kinds, [[span(held=1, peak=MIB, flops=10**6, moved=10**6)]] * 2 + [[work(1, 1)]], layers)
    ends = first.passes[0].spans[0]
    passes = [
        Pass(
            name=named[number], tokens=cut.tokens_of(number), context_tokens=cut.ends_at(number),
            spans=(ends, *[work(cut.tokens_of(number), cut.ends_at(number))] * 8, ends),
        )
        for number in numbers
    ]  # fmt: skip
    decode = [
        Pass(name=name, tokens=1, context_tokens=at, spans=(ends, *[work(1, at)] * 8, ends))
        for name, at in (("decode_first", prompt + 1), ("decode_last", prompt + 11))
    ]
    graph = dataclasses.replace(first, passes=(*passes, *decode))
    device = gpu(0, product="big", flops=10**14, rate=10**12)
    hardware = machine([device], {"cuda:0": 60 * MIB, "cpu": 4000 * MIB, "disk": 0})
    workload = Workload(prompt_tokens=prompt, new_tokens=12, prefill_chunk=chunk)
    return Case(graph, hardware, workload, Rules(pins=(Pin(layers=".*", device="cuda:0"),)))


@pytest.mark.parametrize("flops", [10**8, 10**12])
@pytest.mark.parametrize(("prompt", "chunk"), [(8, None), (8, 4), (25, 4), (203, 4)])
def test_the_simulator_takes_what_chunks_cost(prompt: int, chunk: int | None, flops: int) -> None:
    plan = plan_of(streamed_case(prompt=prompt, chunk=chunk, flops=flops))
    assert plan.solver is not None
    assert plan.prediction is not None
    assert planner.verify_plan(plan) == ()
    assert any(p.home == "cpu" and p.run_on == "cuda:0" for p in plan.placements)
    assert plan.prediction.total_ns == pytest.approx(plan.solver.objective_ns, rel=0.02)


def test_experts_are_expected_by_the_tokens_of_a_chunk() -> None:
    """What waits of them is copied as often as a chunk's tokens are expected to use it, in each chunk again."""
    case = streamed_case(prompt=11, chunk=4, experts=8)
    (block,) = (kind for kind in case.graph.kinds if kind.name == "Block")
    each, last = (
        cost.waiting_copy_ns(case.hardware, block.group("experts"), "cpu", "cuda:0", "pinned", waiting=1, tokens=tokens)
        for tokens in (4, 3)
    )
    whole = 10_000 + 2 * MIB * 10**9 // (20 * 10**9)
    assert (each, last) == (int(whole * (1 - (7 / 8) ** 4)), int(whole * (1 - (7 / 8) ** 3)))
    placements = tuple(
        Placement(
            layer=layer.name, group=entry.name, home="cpu" if entry.slices > 1 else "cuda:0",
            memory="pinned" if entry.slices > 1 else "device", run_on="cuda:0", nbytes=entry.nbytes,
            resident_slices=0 if entry.slices > 1 else None,
        )
        for layer in case.graph.layers
        for entry in case.graph.kinds[layer.kind].groups
    )  # fmt: skip
    steps = {step.name: step for step in cost.steps_of(case.graph, case.workload)}
    assert {name: step.times for name, step in steps.items() if "prefill" in name} == {
        "prefill": 1, "prefill_next": 1, "prefill_rest": 1,
    }  # fmt: skip
    for name, slice_ns in (("prefill", each), ("prefill_next", each), ("prefill_rest", last)):
        lane = cost.lanes_of(case.graph, case.hardware, steps[name], placements, "bfloat16")["cuda:0"]
        assert lane.on_demand == 8 * 8 * slice_ns


def test_chunks_that_are_left_out_lie_on_the_line_of_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(streamed_case(prompt=203, chunk=4))
    shortened = simulate.run(plan)
    monkeypatch.setattr(series, "STEPS_AT_EACH_END", 100)
    whole = simulate.run(plan)
    assert shortened.prefill_ns == pytest.approx(whole.prefill_ns, rel=1e-3)
    assert len(shortened.intervals) < len(whole.intervals) / 2
    # With everything simulated, the prefill is as long as its intervals say.
    assert whole.prefill_ns == max(i.end_ns for i in whole.intervals if i.step == 0 and "compute" in i.lane)


def test_each_chunk_streams_what_waits_again() -> None:
    plan = plan_of(streamed_case(prompt=24, chunk=4))
    away = [p for p in plan.placements if p.home != p.run_on]
    copies = [i for i in simulate.run(plan).intervals if i.action == "copy" and i.step == 0]
    assert 6 * len(away) <= len(copies) <= 6 * len(away) + 2


# Traces


def llama(**options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIGS["llama"](**options))


def test_chunks_that_are_not_traced_one_by_one_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator's figures too: the stream of a long prefill is made up of the chunks at its ends."""
    work = Workload(prompt_tokens=100, new_tokens=7, prefill_chunk=9)

    def traced() -> Any:
        tracing = tracing_for(llama(), work, gpu="rtx4090")
        entries, _ = footprint.phases(tracing, 0)
        graph = tracing.graph()
        return [entry.name for entry in graph.passes], graph, footprint.on_cuda(tracing, entries, [])

    short = traced()
    assert short[0] == ["prefill", "prefill_next", "prefill_last", "prefill_rest", "decode_first", "decode_last"]
    monkeypatch.setattr(cuts, "_AT_EACH_END", (50, 50))
    assert traced() == short


def test_a_chunk_as_long_as_the_prompt_is_one_pass() -> None:
    tracing = tracing_for(llama(), Workload(prompt_tokens=9, new_tokens=1, prefill_chunk=50), gpu=None)
    assert [(entry.name, entry.tokens) for entry in tracing.graph().passes] == [("prefill", 9)]


def test_chunks_that_the_model_itself_sets_are_named() -> None:
    model = llama()
    model.generation_config.prefill_chunk_size = 64
    with pytest.raises(TraceError, match="--prefill-chunk 64"):
        tracing_for(model, Workload(prompt_tokens=9), gpu=None)
    assert tracing_for(model, Workload(prompt_tokens=9, prefill_chunk=4), gpu=None).inputs.steps


# Choices


def test_the_best_chunk_is_chosen_and_ties_go_to_the_first() -> None:
    options: dict[str, Any] = {"prompt_tokens": 300, "new_tokens": 2, "use_cache": False}
    config = CONFIGS["llama"]()
    roomy = planner.plan_model(config, gpus="24GB", rules=Rules(prefill_chunks=(None, 64, 128)), **options)
    assert roomy.workload.prefill_chunk is None
    assert "of the chunks of the prompt allowed, the prompt at once is best" in roomy.assumptions[-1]
    assert "chunks of 64" in roomy.assumptions[-1]
    same = planner.plan_model(config, gpus="24GB", prefill_chunk=500, rules=Rules(prefill_chunks=(400,)), **options)
    assert same.workload.prefill_chunk == 500


def test_the_longest_prompt_is_longer_in_chunks() -> None:
    config = CONFIGS["llama"]()
    config.max_position_embeddings = 512
    config.intermediate_size = 4096
    found = []
    for rules in (Rules(), Rules(prefill_chunks=(64,))):
        pinned = dataclasses.replace(rules, pins=(Pin(layers=".*", device="cuda:0"),))
        plan = planner.plan_model(
            config, gpus="1x24GB", max_memory={"cuda:0": "400MB"}, objective="max-context", new_tokens=4, batch_size=8,
            prompt_tokens=64, rules=pinned, use_cache=False,
        )  # fmt: skip
        assert planner.verify_plan(plan) == ()
        found.append(plan.workload)
    assert found[1].prompt_tokens > found[0].prompt_tokens
    assert found[1].prefill_chunk == 64

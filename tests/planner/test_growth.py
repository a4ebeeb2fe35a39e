"""What a plan takes in a larger call, beside a plan that was traced for that call and placed alike."""

from __future__ import annotations

import dataclasses
import functools

import pytest
from tight_cases import CONFIGS, machine

import planner
from planner import memory
from planner.growth import Size, grown_bytes
from planner.plan import Plan
from planner.units import GB
from planner.workload import Workload


@functools.cache
def plan_for(name: str, rows: int, prompt: int, new: int, cache: str = "dynamic") -> Plan:
    work = {"batch_size": rows, "prompt_tokens": prompt, "new_tokens": new, "cache": cache}
    return planner.plan_model(CONFIGS[name](), hardware=machine(1, GB), weight_dtype="float32", **work)


def parts(plan: Plan) -> dict[str, int]:
    usage = memory.planned_bytes(plan.graph, plan.hardware, plan.placements, plan.slots)["cuda:0"]
    return {"all": usage.total, "apart": usage.total - usage.kv_cache - usage.activations}


@pytest.mark.parametrize(
    ("name", "cache", "rows", "prompt"),
    [("gpt2", "dynamic", 4, 60), ("gpt2", "static", 2, 48), ("llama", "dynamic", 6, 24)],
)
def test_more_rows_and_a_longer_prompt_take_what_a_new_trace_says(
    name: str, cache: str, rows: int, prompt: int
) -> None:
    plan = plan_for(name, 2, 24, 6, cache)
    real = plan_for(name, rows, prompt, 6, cache)
    found = grown_bytes(plan, Size.of(real))["cuda:0"] - parts(plan)["apart"]
    assert found == pytest.approx(parts(real)["all"] - parts(real)["apart"], rel=0.01)


def test_where_scores_are_held_it_is_the_least() -> None:
    """Attention of this model, with fewer keys than queries in float32, has no fused kernel on a GPU."""
    plan, real = plan_for("llama", 2, 24, 6), plan_for("llama", 2, 96, 6)
    found = grown_bytes(plan, Size.of(real))["cuda:0"] - parts(plan)["apart"]
    wanted = parts(real)["all"] - parts(real)["apart"]
    assert 0.5 * wanted < found < wanted


def test_more_tokens_onward_take_their_cache_and_no_more() -> None:
    """Further steps are on the line: 2 rows of keys and values, 2 heads of 16 in float32, in 3 layers."""
    plan = plan_for("llama", 2, 24, 6)
    size = Size.of(plan)
    assert size == Size(rows=2, tokens=24, context_tokens=29)
    planned = memory.planned_bytes(plan.graph, plan.hardware, plan.placements, plan.slots)
    assert grown_bytes(plan, size) == {name: usage.total for name, usage in planned.items()}
    longer = grown_bytes(plan, dataclasses.replace(size, context_tokens=29 + 20))["cuda:0"]
    assert longer - planned["cuda:0"].total == 20 * 2 * 2 * 2 * 16 * 4 * 3
    less = Size(rows=1, tokens=3, context_tokens=9)
    assert grown_bytes(plan, less) == grown_bytes(plan, size), "nothing shrinks"
    assert size.holds(less)
    assert not less.holds(size)


def test_the_size_of_a_prompt_in_chunks_is_its_longest_call() -> None:
    plan = planner.plan_model(
        CONFIGS["llama"](), hardware=machine(1, GB), workload=None, batch_size=1, prompt_tokens=20, new_tokens=2,
        prefill_chunk=8, weight_dtype="float32",
    )  # fmt: skip
    assert Size.of(plan).tokens == 8
    assert plan.workload == Workload(prompt_tokens=20, new_tokens=2, prefill_chunk=8)

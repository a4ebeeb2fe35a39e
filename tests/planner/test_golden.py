"""The Mixtral command's plan, byte for byte. After a meant change: pytest --update-golden, and read the diff."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import planner

GOLDEN = Path(__file__).parent.parent / "golden" / "mixtral-8x7b-2x24GB.json"


def test_mixtral_on_two_24_gb_cards(request: pytest.FixtureRequest) -> None:
    plan = planner.plan_model("mistralai/Mixtral-8x7B", gpus="2x24GB", use_cache=False)
    # Builds of torch differ in their version's suffix, and nothing else of the plan depends on it.
    plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, versions={}))
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(plan.to_json(), encoding="utf-8")
    assert plan.to_json() == GOLDEN.read_text(encoding="utf-8")
    assert planner.verify_plan(plan) == ()


def test_the_golden_plan_is_what_published_figures_say() -> None:
    """Facts that no code of ours made: the published parameter count, and bytes that follow from the architecture."""
    plan = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert plan["model"]["num_parameters"] == 46_702_792_704
    experts = 8 * 3 * 4096 * 14336 * 2
    assert {p["nbytes"] for p in plan["placements"] if p["group"] == "mlp.experts"} == {experts}
    kv_per_token = 2 * 8 * 128 * 2
    decode = plan["graph"]["passes"][-1]
    assert decode["context_tokens"] == 512 + 128 - 1
    assert decode["spans"][1]["kv_after_bytes"] == decode["context_tokens"] * kv_per_token
    assert plan["solver"]["status"] == "optimal"


def test_the_graph_is_a_networkx_view_that_weighs_what_the_model_does() -> None:
    graph = planner.Plan.load(GOLDEN).graph
    view = graph.to_networkx()
    assert [view.nodes[node]["name"] for node in view] == [layer.name for layer in graph.layers]
    # Each layer takes what the one before made; blocks and the head also take what the first makes (rotary tables).
    chain = {(index, index + 1) for index in range(len(graph.layers) - 1)}
    assert chain <= set(view.edges) <= chain | {(0, index) for index in range(len(graph.layers))}
    inside = sum(view.nodes[node]["nbytes"] for node in view)
    assert inside + sum(tensor.nbytes for tensor in graph.loose) == graph.weight_bytes
    # Hidden states of 512 tokens, 4096 wide, and two rotary tables of 128 columns, all in bfloat16.
    assert view.edges[1, 2]["prefill_bytes"] == 512 * 4096 * 2
    assert view.edges[0, 2]["prefill_bytes"] == 512 * 2 * 128 * 2

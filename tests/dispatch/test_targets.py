"""What a plan asks for that cannot be carried out is refused in one message, and the model is left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dispatch
from planner.errors import InputError
from planner.plan import Placement, Plan
from tiny_models import Case, on_cpu, streamed


def changed(plan: Plan, which: Callable[[Placement], bool], **changes: Any) -> Plan:
    """Return the plan with the first placement of a kind changed."""
    first = next(p for p in plan.placements if which(p))
    placements = tuple(dataclasses.replace(p, **changes) if p is first else p for p in plan.placements)
    return dataclasses.replace(plan, placements=placements)


def in_node(plan: Plan, node: str) -> Plan:
    """Return the plan as it would be for the same machine among others."""

    def name(plain: str) -> str:
        return f"{node}/{plain}"

    hardware = dataclasses.replace(
        plan.hardware,
        devices=tuple(dataclasses.replace(d, name=name(d.name), pool=name(d.pool)) for d in plan.hardware.devices),
        pools=tuple(dataclasses.replace(pool, name=name(pool.name)) for pool in plan.hardware.pools),
        links=tuple(
            dataclasses.replace(link, source=name(link.source), target=name(link.target))
            for link in plan.hardware.links
        ),
    )
    return dataclasses.replace(
        plan,
        hardware=hardware,
        placements=tuple(dataclasses.replace(p, home=name(p.home), run_on=name(p.run_on)) for p in plan.placements),
        slots=tuple(dataclasses.replace(entry, device=name(entry.device)) for entry in plan.slots),
        prediction=None,
    )


def refused(case: Case, plan: Plan, match: str, **options: Any) -> None:
    model = case.meta()
    before = dict(model.named_parameters())
    with pytest.raises(InputError, match=match):
        dispatch.apply(model, plan, checkpoint=case.folder, **{"devices": on_cpu(plan), **options})
    assert dict(model.named_parameters()) == before
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_offloaded_cache_needs_cuda(make_case: Any) -> None:
    case = make_case("llama")
    plan = case.plan(gpus="1x24GB", cache="offloaded")
    with pytest.raises(InputError, match="offloaded cache copies them with CUDA's streams"):
        dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices={"cuda:0": "cpu"})


def test_quantised_groups_are_refused(make_case: Any) -> None:
    case = make_case("llama")
    plan = changed(case.plan(gpus=0), lambda p: p.group == "mlp", dtype="nf4")
    refused(case, plan, r"model\.layers\.0 mlp in nf4.*not built yet; plan without --dtype")


def test_plans_over_several_nodes_are_refused(make_case: Any) -> None:
    case = make_case("llama")
    plan = in_node(case.plan(gpus="1x24GB"), "node0")
    away = changed(plan, lambda p: p.group == "mlp", home="node1/cpu")
    refused(case, away, r"2 nodes \(node0, node1\).*plan for the machine of one node")
    refused(case, plan, r'node0/cuda:0: say which device.*"node0/cuda:0": "cuda:0"', devices={})


@pytest.mark.parametrize("mode", ["gpu from cpu", "gpu from disk", "cpu", "cpu from disk"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_plan_that_lies_in_one_node_runs(make_case: Any, name: str, mode: str) -> None:
    case = make_case(name)
    if mode.startswith("gpu"):
        plan = streamed(case.plan(gpus="1x24GB"), mode.rpartition(" ")[2])
    else:
        plan = case.plan(gpus=0)
        if mode == "cpu from disk":
            plan = streamed(plan, "disk")
    plan = in_node(plan, "node3")
    case.run_like(plan)
    devices = {"node3/cuda:0": "cpu"} if mode.startswith("gpu") else {}
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=devices)
    assert torch.equal(case.generate(model), case.generate(case.reference))
    state = model._loadplan_dispatch.has
    assert bool(state.mapped) == (mode == "cpu from disk")
    assert state.reads_files == ("disk" in mode)
    assert torch.equal(case.generate(dispatch.remove(model)), case.generate(case.reference))


def test_slots_that_are_missing_or_too_small_are_refused(make_case: Any) -> None:
    case = make_case("mixtral")
    plan = streamed(case.plan(gpus="1x24GB"), "cpu")
    groups, experts = (plan.slots_on("cuda:0", holds) for holds in ("groups", "experts"))
    assert groups is not None
    assert experts is not None
    for slots, match in (
        ((experts,), "self_attn passes through slots of .* on cuda:0, where the plan has none"),
        ((groups,), "experts passes through slots of .* on cuda:0, where the plan has none"),
        ((groups, dataclasses.replace(experts, count=0)), "the plan has 0 of"),
        ((dataclasses.replace(groups, slot_bytes=groups.slot_bytes - 1), experts), "where the plan has 2 of"),
    ):
        refused(case, dataclasses.replace(plan, slots=slots), match)


def test_the_cpu_computes_only_what_waits_in_its_memory(make_case: Any) -> None:
    case = make_case("mixtral")
    plan = streamed(case.plan(gpus="1x24GB"), "disk")
    refused(case, changed(plan, lambda p: "experts" in p.group, cpu_up_to_tokens=4), "waits on disk.*its own memory")
    plan = streamed(case.plan(gpus="1x24GB"), "cpu")
    refused(case, changed(plan, lambda p: p.group == "self_attn", cpu_up_to_tokens=4), "self_attn.*only experts")

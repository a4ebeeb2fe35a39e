"""Experts that are modules of their own: each is a group that waits by itself, and only those called are copied."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from separate_experts import WIDTH, Expert, SeparateExperts

import dispatch
import planner
import simulate
from planner.errors import InputError
from planner.plan import Plan
from planner.workload import Workload
from simulate.virtual_machine import Machine
from tiny_models import on_cpu, spread_over_two, streamed, with_slots

pytestmark = pytest.mark.usefixtures("one_thread")


def plan_of(model: torch.nn.Module, gpus: str = "1x24GB") -> Plan:
    work = Workload(caller="forward", new_tokens=1)
    example = (torch.zeros(2, WIDTH),)
    return planner.plan_model(model, gpus=gpus, workload=work, example_inputs=example, use_cache=False)


def build() -> SeparateExperts:
    torch.manual_seed(0)
    return SeparateExperts().eval()


def called(model: SeparateExperts, states: torch.Tensor) -> set[str]:
    """Return the paths of the experts that the plain model calls."""
    found: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda module, args, path=path: found.add(path))
        for path, module in model.named_modules()
        if isinstance(module, Expert)
    ]
    model(states)
    for handle in handles:
        handle.remove()
    return found


def test_each_expert_is_a_group_and_the_router_stays() -> None:
    graph = plan_of(build()).graph
    names = {group.name: group.streamable for group in graph.kind_of(0).groups}
    assert names == {"mix": True, **{f"moe.experts.{number}": True for number in range(6)}, "rest": False}


@torch.no_grad()
@pytest.mark.parametrize("count", [2, 3])
def test_only_experts_that_are_called_are_copied(count: int) -> None:
    model = build()
    plan = with_slots(streamed(plan_of(model), "cpu"), count)
    sizes = {
        f"{layer.name}.{group.name}": group.slice_slab_bytes
        for layer in plan.graph.layers
        for group in plan.graph.kinds[layer.kind].groups
    }
    always = sum(nbytes for name, nbytes in sizes.items() if name.endswith("mix"))
    inputs = [torch.randn(1, WIDTH) for _ in range(24)]
    simulate.virtual("1x1GB")
    with Machine({"cuda:0": 10**9}) as box:
        there = dispatch.apply(copy.deepcopy(model), plan, devices=box.devices)
        routed = torch.randn(200, WIDTH)
        assert len(called(model, routed)) == 18
        assert torch.equal(there(box.inputs(routed, "cuda:0")).cpu(), model(routed))
        excess = []
        for states in inputs:
            here = box.inputs(states, "cuda:0")
            before = box.copied_bytes["cpu", "cuda:0"]
            assert torch.equal(there(here).cpu(), model(states))
            wanted = sum(sizes[path] for path in called(model, states))
            excess.append(box.copied_bytes["cpu", "cuda:0"] - before - always - wanted)
    assert sum(excess[:16]) <= 2 * 18 * max(sizes.values()), "each expert may be passed over once"
    assert excess[16:] == [0] * 8


@torch.no_grad()
@pytest.mark.parametrize("mode", ["one", "two", "disk", "one slot"])
def test_same_bits(mode: str, tmp_path: Any) -> None:
    model = build()
    plan = streamed(plan_of(model, "2x24GB" if mode == "two" else "1x24GB"), "disk" if mode == "disk" else "cpu")
    plan = spread_over_two(plan) if mode == "two" else with_slots(plan, 1) if mode == "one slot" else plan
    there = dispatch.apply(copy.deepcopy(model), plan, devices=on_cpu(plan), offload_dir=tmp_path / "offload")
    for tokens in (1, 30, 1, 1, 2, 1, 1):
        states = torch.randn(tokens, WIDTH)
        assert torch.equal(there(states), model(states))
    states = torch.randn(3, WIDTH)
    assert torch.equal(dispatch.remove(there)(states), model(states))


@torch.no_grad()
@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_the_state_of_the_plain_model(home: str, tmp_path: Any) -> None:
    model, other = build(), build()
    plan = with_slots(streamed(plan_of(model), home), 3)
    there = dispatch.apply(copy.deepcopy(model), plan, devices=on_cpu(plan), offload_dir=tmp_path / "offload")
    states = torch.randn(9, WIDTH)
    for parameter in other.parameters():
        parameter.copy_(parameter.flip(0) * 1.5)
    for _ in range(2):
        assert torch.equal(there(states), model(states))
        found = there.state_dict()
        assert list(found) == list(model.state_dict())
        assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
        if home == "disk":
            with pytest.raises(InputError, match="wait in files"):
                there.load_state_dict(other.state_dict())
        else:
            there.load_state_dict(other.state_dict())
            model = other

"""Layers whose inputs never move have no hook, and the others' do, on two pretend GPUs that refuse to mix devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import dispatch
import planner
import simulate
from dispatch.mover import handed_over
from planner.plan import Plan
from planner.workload import Workload
from simulate.virtual_machine import Machine
from tiny_models import with_placements

pytestmark = pytest.mark.usefixtures("one_thread")
CAPACITY = {"cuda:0": 10**9, "cuda:1": 10**9}


@pytest.fixture
def box() -> Any:
    simulate.virtual("1x1GB")
    with Machine(CAPACITY) as machine:
        yield machine


def on(plan: Plan, devices: list[int]) -> Plan:
    """Return the plan with its layers, all resident, on the GPUs of these numbers."""
    where = {layer.name: f"cuda:{number}" for layer, number in zip(plan.graph.layers, devices, strict=True)}
    return with_placements(
        plan,
        lambda p, group: dataclasses.replace(
            p, run_on=where[p.layer], home=where[p.layer], memory="device",
            resident_slices=None if p.resident_slices is None else group.slices,
        ),
    )  # fmt: skip


def hooked(model: nn.Module, plan: Plan) -> list[int]:
    layers = [model.get_submodule(layer.name) for layer in plan.graph.layers]
    return [index for index, layer in enumerate(layers) if "forward" in vars(layer)]


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.weight)


class Scaled(Step):
    def forward(self, x: torch.Tensor, scale: Any = 1) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) * scale


class PassedOn(nn.Module):
    """Steps one after another, and again from the second where asked."""

    _no_split_modules = ("Step", "Scaled")

    def __init__(self, kinds: list[type[Step]], *, twice: bool = False):
        super().__init__()
        self.steps = nn.ModuleList([kind() for kind in kinds])
        self.twice = twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in (*self.steps, *(self.steps[1:] if self.twice else ())):
            x = step(x)
        return x


# Kinds of steps, whether they are called twice, where each runs, and which have a hook.
ROWS: list[tuple[list[type[Step]], bool, list[int], list[int]]] = [
    ([Step] * 6, False, [0, 0, 0, 1, 1, 1], [0, 3]),
    ([Step] * 6, False, [0, 1, 1, 0, 0, 1], [0, 1, 3, 5]),
    ([Step] * 4, False, [0, 1, 0, 1], [0, 1, 2, 3]),
    ([Scaled] * 6, False, [0, 0, 0, 1, 1, 1], [0, 3, 4, 5]),
    ([Step] * 4, True, [0, 0, 1, 1], [0, 1, 2, 3]),
]


@pytest.mark.parametrize(("kinds", "twice", "devices", "want"), ROWS)
def test_only_where_inputs_move(
    box: Machine, kinds: list[type[Step]], twice: bool, devices: list[int], want: list[int]
) -> None:
    torch.manual_seed(0)
    model, x = PassedOn(kinds, twice=twice).eval(), torch.randn(3, 8)
    with torch.no_grad():
        expected = model(x)
        work = Workload(caller="forward", batch_size=3, prompt_tokens=1, new_tokens=1)
        plan = planner.plan_model(model, gpus="2x24GB", workload=work, example_inputs=(x,), use_cache=False)
        plan = on(plan, devices)
        dispatched = dispatch.apply(model, plan, devices=box.devices)
        assert hooked(dispatched, plan) == want
        for _ in range(2):
            assert torch.equal(dispatched(x.to(box.devices["cuda:0"])).cpu(), expected)
        assert hooked(dispatched, plan) == want
        # The caller's own tensors are elsewhere: from now on every layer looks.
        assert torch.equal(dispatched(x.to(box.devices["cuda:1"])).cpu(), expected)
        assert hooked(dispatched, plan) == list(range(len(devices)))
        assert torch.equal(dispatched(x.to(box.devices["cuda:0"])).cpu(), expected)
        plain = dispatch.remove(dispatched)
        assert hooked(plain, plan) == []
        assert torch.equal(plain(x), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_decoder_in_two_halves(make_case: Any, box: Machine, name: str) -> None:
    case = make_case(name)
    plan = case.plan(gpus="2x24GB")
    count = len(plan.graph.layers)
    plan = on(plan, [0] * (count // 2) + [1] * (count - count // 2))
    case.run_like(plan)
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=box.devices)
    found = hooked(model, plan)
    assert not set(range(1, count // 2)) & set(found)
    assert set(range(count // 2, count - 2)) <= set(found)
    case.ids, ids = case.ids.to(box.devices["cuda:0"]), case.ids
    tokens = case.generate(model).cpu()
    assert hooked(model, plan) == found
    case.ids = ids
    assert torch.equal(tokens, case.generate(case.reference))


def test_what_a_layer_passes_on_is_where_that_layer_runs() -> None:
    """The graph says only who made it: 0 → 2, with a layer between that may hand on what it was handed."""
    work = Workload(caller="forward", batch_size=3, prompt_tokens=1, new_tokens=1)
    model = PassedOn([Step] * 3).eval()
    graph = planner.plan_model(
        model, gpus="2x24GB", workload=work, example_inputs=(torch.randn(3, 8),), use_cache=False
    ).graph
    edge = dataclasses.replace(graph.edges[0], source=0, target=2)
    graph = dataclasses.replace(graph, edges=(edge,))
    here, there = torch.device("cuda:0"), torch.device("cuda:1")
    forwards = [step.forward for step in model.steps]
    assert handed_over(graph, [here, here, here], forwards) == (0, 1)
    assert handed_over(graph, [here, there, here], forwards) == (0, 1, 2)
    assert handed_over(graph, [there, here, there], forwards) == (0, 1, 2)

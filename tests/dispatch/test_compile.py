"""torch.compile of dispatched models: whole where nothing moves, else what lies between the hooks; the same bits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dispatch
from tiny_models import on_cpu, streamed

pytestmark = pytest.mark.usefixtures("one_thread")


class Counting:
    """A backend that compiles nothing, and counts the products in each graph that it is given."""

    def __init__(self) -> None:
        self.products: list[int] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Any:
        self.products.append(sum("linear" in str(node.target) for node in module.graph.nodes))
        return module.forward


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_a_resident_model_is_one_graph(make_case: Any) -> None:
    case = make_case("llama")
    backend = Counting()
    model = dispatch.apply(case.meta(), case.plan(gpus=0), checkpoint=case.folder)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.equal(case.logits(compiled), case.logits(case.reference))
    assert backend.products == [5 * 7 + 1]


@pytest.mark.parametrize(("name", "how"), [("llama", "whole"), ("mixtral", "layers")])
def test_a_streamed_model_is_compiled_between_its_hooks(make_case: Any, name: str, how: str) -> None:
    case = make_case(name)
    plan = streamed(case.plan(gpus="1x24GB"), "cpu")
    case.run_like(plan)
    want = case.logits(case.reference)
    backend = Counting()
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    compiled = torch.compile(model, backend=backend) if how == "whole" else model
    if how == "layers":
        for layer in model.model.layers:
            layer.compile(backend=backend)
    assert torch.equal(case.logits(compiled), want)
    attention = [count for count in backend.products if count == 4]
    assert len(attention) >= 3, "the products of attention are in graphs, though its weights come and go"
    before = len(backend.products)
    for _ in range(2):
        assert torch.equal(case.logits(compiled), want)
    assert len(backend.products) == before, "other slots need no other graph"
    assert torch.equal(case.logits(dispatch.remove(model)), want)


def test_signatures_are_kept_by_every_hooked_module(make_case: Any) -> None:
    case = make_case("mixtral")
    plan = streamed(case.plan(gpus="1x24GB"), "cpu")
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    hooked = {path: module for path, module in model.named_modules() if "forward" in vars(module)}
    assert {"", "model.layers.0.self_attn"} <= hooked.keys()
    for path, module in hooked.items():
        assert inspect.signature(module.forward) == inspect.signature(case.reference.get_submodule(path).forward)

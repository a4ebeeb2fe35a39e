"""Models of every kind that is traced run as planned and give the same bits, the CPU playing the GPUs."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import nn

import dispatch
import planner
from architectures import ARCHITECTURES, Architecture
from planner.workload import Workload
from tiny_models import on_cpu, spread_over_two, streamed

NAMES = ("t5", "bart", "whisper", "bert", "vit", "mamba", "llava", "gemma3", "deepseek-v3", "resnet", "unet", "mlp")
BATCH, TOKENS, NEW = 2, 9, 4


pytestmark = pytest.mark.usefixtures("one_thread")


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


def answer(entry: Architecture, model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        if entry.generates:
            return [model.generate(**inputs, max_new_tokens=NEW, do_sample=False)]
        return tensors_in(model(**inputs))


@pytest.mark.parametrize("mode", ["resident", "two devices", "streamed"])
@pytest.mark.parametrize("name", NAMES)
def test_same_bits(name: str, mode: str) -> None:
    entry = next(entry for entry in ARCHITECTURES if entry.name == name)
    torch.manual_seed(0)
    reference = entry.build(torch.float32, random.Random(7))
    inputs = entry.inputs(reference, BATCH, TOKENS)
    model = copy.deepcopy(reference)
    work = Workload(caller="forward", batch_size=BATCH, prompt_tokens=TOKENS, new_tokens=1)
    if entry.generates:
        work = Workload(batch_size=BATCH, prompt_tokens=TOKENS, new_tokens=NEW)
    given = inputs if entry.examples else None
    plan = planner.plan_model(model, gpus="2x24GB", workload=work, example_inputs=given, use_cache=False)
    if mode == "two devices":
        plan = spread_over_two(plan)
    elif mode == "streamed":
        plan = streamed(plan, "cpu")
    if plan.execution.experts is not None:
        reference.set_experts_implementation(plan.execution.experts)
    expected = answer(entry, reference, inputs)
    dispatched = dispatch.apply(model, plan, devices=on_cpu(plan))
    for _ in range(2):
        found = answer(entry, dispatched, inputs)
        assert len(found) == len(expected) > 0
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(answer(entry, dispatch.remove(model), inputs), expected, strict=True))


class Aliased(nn.Module):
    """One linear layer under two names, and one buffer under two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.norm = nn.BatchNorm1d(8)
        self.other = nn.BatchNorm1d(8)
        self.other.running_mean = self.norm.running_mean

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.other(self.again(self.norm(self.first(x))))
        return out


def test_one_tensor_under_several_names() -> None:
    torch.manual_seed(0)
    model, x = Aliased().eval(), torch.randn(3, 8)
    with torch.no_grad():
        expected = model(x)
        work = Workload(caller="forward", new_tokens=1)
        plan = planner.plan_model(model, gpus="1x24GB", workload=work, example_inputs=(x,))
        dispatched = dispatch.apply(model, plan, devices=on_cpu(plan))
        assert torch.equal(dispatched(x), expected)
    assert model.other.running_mean is model.norm.running_mean
    assert model.again.weight is model.first.weight

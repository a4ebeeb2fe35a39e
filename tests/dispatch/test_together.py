"""Where parts of dispatching meet: copies, orders of memory, training, gathered states, larger plans."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dispatch
from dispatch.dispatched import state_of
from planner.errors import InputError
from tiny_models import experts_away, on_cpu, streamed

pytestmark = pytest.mark.usefixtures("one_thread")
ON_CPU = {"cuda:0": "cpu"}


def transposed() -> nn.Module:
    module = nn.Linear(6, 9)
    module.weight = nn.Parameter(module.weight.detach().T.contiguous().T)
    return nn.Sequential(module)


def channels_last() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3)).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(("build", "shape"), [(transposed, (2, 6)), (channels_last, (1, 3, 6, 6))])
@pytest.mark.parametrize("device", ["cpu", 0])
def test_copies_of_what_waits_on_disk_keep_its_order(build: Any, shape: Any, device: Any, tmp_path: Path) -> None:
    plain, x = build(), torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)
    expected, strides = plain(x), [parameter.stride() for parameter in plain.parameters()]
    devices = None if device == "cpu" else ON_CPU
    model: Any = dispatch.disk_offload(copy.deepcopy(plain), tmp_path, device, devices=devices)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(made(x), expected)
        assert [tensor.stride() for tensor in made.state_dict().values()] == strides


@pytest.mark.parametrize("limit", [0, 10**6])
def test_a_copied_state_has_the_values_of_each_tensor(limit: int, make_case: Any) -> None:
    """Of experts that wait one by one they are gathered one after another, into memory that may be the same."""
    case = make_case("mixtral")
    plan = experts_away(case.plan(gpus="1x24GB"), limit=limit, count=0 if limit else 2)
    case.run_like(plan)
    model: Any = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    expected = case.reference.state_dict()
    for _ in range(5):
        found = copy.deepcopy(model.state_dict())
        assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
    with dispatch.weights_at_home(model):
        layers = copy.deepcopy(model.model.layers)
    for name, parameter in layers.named_parameters():
        assert torch.equal(parameter, expected[f"model.layers.{name}"])


class Written(nn.Module):
    """Uses a weight or a buffer, and writes to it afterwards."""

    def __init__(self, *, is_buffer: bool):
        super().__init__()
        weight = torch.eye(8) * 3
        if is_buffer:
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight
        with torch.no_grad():
            self.weight.mul_(0.5)
        return y


@pytest.mark.parametrize("is_buffer", [False, True])
def test_gradients_of_weights_that_were_written_to_are_refused_as_in_a_plain_model(is_buffer: bool) -> None:
    plain = nn.Sequential(Written(is_buffer=is_buffer))
    model = dispatch.cpu_offload(copy.deepcopy(plain), 0, offload_buffers=True, devices=ON_CPU)
    for each in (plain, model):
        x = torch.ones(1, 8, requires_grad=True)
        made = each(x).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            made.backward()


def longer(case: Any) -> torch.Tensor:
    return torch.randint(3, 320, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("how", ["itself", "copied", "pickled"])
@torch.no_grad()
def test_a_larger_plan_keeps_what_was_written_to_what_stays(how: str, make_case: Any) -> None:
    case = make_case("llama")
    plan, plain = streamed(case.plan(gpus="1x24GB"), "cpu"), case.loaded()
    model: Any = dispatch.apply(case.meta(), plan, case.folder, devices=on_cpu(plan), on_exceed="replan")
    for each in (model, plain):
        each.model.norm.weight.mul_(2)
    made = {"itself": lambda m: m, "copied": copy.deepcopy, "pickled": lambda m: pickle.loads(pickle.dumps(m))}[how](
        model
    )
    assert torch.equal(made(longer(case)).logits, plain(longer(case)).logits)
    assert state_of(made).plan.workload.prompt_tokens == 40


@torch.no_grad()
def test_what_a_larger_plan_would_lose_is_refused_and_the_model_goes_on(make_case: Any) -> None:
    case = make_case("llama")
    plan = streamed(case.plan(gpus="1x24GB"), "cpu")

    def dispatched() -> Any:
        return dispatch.apply(case.meta(), plan, case.folder, devices=on_cpu(plan), on_exceed="replan")

    trained = dispatched()
    trained.model.norm.weight.requires_grad_()
    trained.model.norm.weight.mul_(1)
    with pytest.raises(InputError, match=r"model.norm.weight and 0 more are trained"):
        trained(longer(case))
    wrapped = dispatched()
    wrapped.model.norm = nn.Sequential(wrapped.model.norm)
    with pytest.raises(InputError, match=r"the model was changed after dispatch\.apply"):
        wrapped(longer(case))
    for each in (trained, wrapped):
        assert torch.equal(case.logits(each), case.logits(case.reference))
        assert torch.equal(case.logits(dispatch.remove(each)), case.logits(case.reference))

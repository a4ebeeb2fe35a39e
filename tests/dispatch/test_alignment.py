"""Weights that are brought for a while, and whole models that wait until they are called."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_modules import WIDTH, ZOO, rows
from torch import nn

import dispatch
import simulate
from simulate.virtual_machine import Machine

PLAYED = {"cuda:0": "cpu"}


@pytest.fixture
def box() -> Iterator[Machine]:
    simulate.virtual("1x1GB")  # lets PyTorch know the devices
    with Machine({"cuda:0": 10**6, "cuda:1": 10**6}) as made:
        yield made


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_weights_that_wait_are_there_inside_the_block(home: str, box: Machine, tmp_path: Path) -> None:
    reference = ZOO["rooted"].build()
    model = dispatch.dispatch_model(
        ZOO["rooted"].build(), {"": home}, main_device=box.devices["cuda:1"], offload_dir=tmp_path
    )
    first: Any = model.get_submodule("first")
    assert dispatch.has_offloaded_params(first)
    for given, expected in ((None, "cuda:1"), (box.devices["cuda:0"], "cuda:0"), ("cpu", "cpu")):
        assert first.weight.is_meta
        with dispatch.align_module_device(first, given):
            assert first.weight.device == box.devices.get(expected, torch.device("cpu"))
            assert torch.equal(first.weight.cpu(), reference.get_parameter("first.weight"))
            assert isinstance(first.weight, nn.Parameter)
            assert first.weight.requires_grad
        assert first.weight.is_meta
    with pytest.raises(ZeroDivisionError), dispatch.align_module_device(first):
        _ = 1 / 0
    assert first.weight.is_meta
    with torch.no_grad():
        assert torch.equal(model(x=rows())["out"], reference(x=rows())["out"])


def test_what_a_block_on_the_cpu_changes_is_used_by_the_next_call() -> None:
    model, reference = ZOO["shuffled"].build(), ZOO["shuffled"].build()
    dispatch.cpu_offload(model, 0, devices=PLAYED)
    with torch.no_grad():
        for _ in range(2):
            # The next pass begins with layer 3, which was copied ahead when the last one ended.
            model(rows())
        for each, brought in ((model, True), (reference, False)):
            layer: Any = each.get_submodule("layers.3")
            if brought:
                with dispatch.align_module_device(layer, "cpu"):
                    layer.weight.mul_(2)
            else:
                layer.weight.mul_(2)
        assert torch.equal(model(rows()), reference(rows()))


def test_weights_that_do_not_wait_are_moved_and_put_back(box: Machine) -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    weight, before = layer.weight, layer.weight.detach().clone()
    assert not dispatch.has_offloaded_params(layer)
    with dispatch.align_module_device(layer):
        assert layer.weight is weight
    with dispatch.align_module_device(layer, box.devices["cuda:0"]), torch.no_grad():
        assert layer.weight.device == box.devices["cuda:0"]
        layer.weight.mul_(2)
    assert layer.weight is weight
    assert torch.equal(weight, before * 2)


def test_whole_models_take_turns_on_a_device(box: Machine) -> None:
    device = box.devices["cuda:0"]
    models = [nn.Linear(WIDTH, WIDTH) for _ in range(3)]
    plain = copy.deepcopy(models)
    hooks: list[Any] = [None]
    for model in models:
        same, hook = dispatch.cpu_offload_with_hook(model, device, prev_module_hook=hooks[-1])
        assert same is model
        hooks.append(hook)

    def homes() -> list[str]:
        return [model.weight.device.type for model in models]

    assert homes() == ["cpu"] * 3
    x = rows()
    with torch.no_grad():
        expected = plain[1](plain[1](plain[0](x)))
        first = models[0](x)
        assert homes() == ["virtual", "cpu", "cpu"]
        # A second call too takes what is on the CPU, and what is on the device.
        assert torch.equal(models[0](x).cpu(), first.cpu())
        second = models[1](first)
        second = models[1](second)
        assert homes() == ["cpu", "virtual", "cpu"]
        assert torch.equal(second.cpu(), expected)
        models[2](second)
        assert homes() == ["cpu", "cpu", "virtual"]
    hooks[3].offload()
    assert homes() == ["cpu"] * 3
    assert box.live_bytes("cuda:0") == sum(t.nbytes for t in (first, second))
    hooks[1].remove()
    assert "forward" not in vars(models[0])
    dispatch.remove_hook_from_module(models[1])
    assert "forward" not in vars(models[1])
    with torch.no_grad():
        assert torch.equal(models[0](x), plain[0](x))


def test_a_second_hook_takes_the_place_of_the_first() -> None:
    model = nn.Linear(WIDTH, WIDTH)
    dispatch.cpu_offload_with_hook(model, "cpu")
    dispatch.cpu_offload_with_hook(model, "cpu")[1].remove()
    assert "forward" not in vars(model)


def test_copies_of_whole_models_have_hooks_and_chains_of_their_own(box: Machine) -> None:
    device, x = box.devices["cuda:0"], rows()
    with torch.no_grad():
        first, hook = dispatch.cpu_offload_with_hook(nn.Linear(WIDTH, WIDTH), device)
        second, last = dispatch.cpu_offload_with_hook(nn.Linear(WIDTH, WIDTH), device, prev_module_hook=hook)
        expected = second(first(x)).cpu()
        alone = copy.deepcopy(second)
        # In host memory, with what is before it in its chain, and on its device when it is called.
        assert second.weight.device == device
        assert alone.weight.device.type == "cpu"
        assert torch.equal(alone(first(x)).cpu(), expected)
        assert [one.weight.device.type for one in (alone, second, first)] == ["virtual"] * 3
        hook.offload()
        last.offload()
        models, hooks = copy.deepcopy(([second, first], [hook, last]))
        assert hooks[1].model is models[0] is not second
        assert torch.equal(models[0](models[1](x)).cpu(), expected)
        assert [one.weight.device.type for one in (*models, first, second)] == ["virtual", "cpu", "cpu", "cpu"]
        hooks[1].offload()
        assert models[0].weight.device.type == "cpu"
        hooks[1].remove()
        assert "forward" not in vars(models[0])
        assert "__deepcopy__" not in vars(models[0])
        assert "forward" in vars(second)
        assert copy.deepcopy(hooks[1]).model is not models[0]


def test_pickled_whole_models() -> None:
    first, hook = dispatch.cpu_offload_with_hook(nn.Linear(WIDTH, WIDTH), "cpu")
    second, last = dispatch.cpu_offload_with_hook(nn.Linear(WIDTH, WIDTH), "cpu", prev_module_hook=hook)
    expected = second(first(rows()))
    read = pickle.loads(pickle.dumps((first, second, last)))
    assert torch.equal(read[1](read[0](rows())), expected)
    assert read[2].model is read[1]
    with torch.no_grad():
        read[0].weight.zero_()
    assert torch.equal(second(first(rows())), expected)
    read[2].remove()
    assert "forward" not in vars(read[1])
    assert "forward" in vars(read[0])

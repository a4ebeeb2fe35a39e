"""Weights that wait are never computed with in silence, and keep their places whatever is put around them."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_modules import WIDTH, ZOO, rows
from torch import nn
from torch.nn import functional

import dispatch
from planner.errors import InputError

PLAYED = {"cuda:0": "cpu"}
pytestmark = pytest.mark.usefixtures("one_thread")


class Borrowing(nn.Module):
    """Computes with a child's weight, in one of several ways."""

    def __init__(self, how: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.child, self.how = nn.Linear(WIDTH, WIDTH, bias=False), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.how(x, self.child.weight)


@pytest.mark.parametrize(
    "how",
    [
        functional.linear,
        lambda x, w: x @ w,
        lambda x, w: functional.linear(x, w.chunk(2)[0]),
        lambda x, w: functional.linear(x, torch._weight_norm(w, w[:, :1], 0)),
        lambda x, w: functional.conv1d(x[None, :, None], w[:3, :, None].transpose(0, 1)[:, :, :1].repeat(1, 1, 1)),
        lambda x, w: torch.cat([x, w]),
        lambda x, w: functional.embedding(torch.arange(2), w),
    ],
)
def test_weights_that_wait_are_not_computed_with(how: Any) -> None:
    model = dispatch.cpu_offload(Borrowing(how), 0, devices=PLAYED)
    with pytest.raises(InputError, match="preload_module_classes"), torch.no_grad():
        model(rows())
    preloaded = dispatch.cpu_offload(Borrowing(how), 0, preload_module_classes=["Borrowing"], devices=PLAYED)
    if how is functional.linear:
        with torch.no_grad():
            assert preloaded(rows()).shape == (3, WIDTH)


def test_what_looks_at_weights_that_wait_still_may() -> None:
    weight: Any = dispatch.cpu_offload(nn.Linear(WIDTH, 3), 0, devices=PLAYED).weight
    assert (weight.shape, weight.dtype, weight.is_meta, weight.numel()) == ((3, WIDTH), torch.float32, True, 3 * WIDTH)
    assert isinstance(weight, nn.Parameter)
    assert not weight.requires_grad
    assert weight.half().dtype is torch.float16
    assert "Parameter" in repr(weight)
    assert rows().to(weight.dtype).dtype is torch.float32


def test_values_given_to_what_waits_are_not_lost_in_silence() -> None:
    model: Any = dispatch.cpu_offload(nn.Sequential(nn.Linear(WIDTH, WIDTH)), 0, devices=PLAYED)
    ones = torch.ones(WIDTH, WIDTH)
    with pytest.raises(InputError, match="wait elsewhere"):
        model[0].weight.data += ones
    with pytest.raises(InputError, match="wait elsewhere"), torch.no_grad():
        model[0].weight.copy_(ones)


def test_a_module_whose_hook_makes_its_weight() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        normed = nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))  # type: ignore[no-untyped-call]
        return nn.ModuleDict({"block": nn.Sequential(normed, nn.Linear(WIDTH, WIDTH))})["block"]

    with pytest.warns(FutureWarning, match="weight_norm"):
        reference, one, other = build(), build(), build()
    dispatch.cpu_offload(one, 0, devices=PLAYED)
    with pytest.raises(InputError, match="hook"), torch.no_grad():
        one(rows())
    dispatch.cpu_offload(other, 0, preload_module_classes=["Sequential"], devices=PLAYED)
    with torch.no_grad():
        assert torch.equal(other(rows()), reference(rows()))


class Adapted(nn.Module):
    """A layer with an adapter around it, as PEFT puts one in its place."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.adapter = base, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base_layer(x) + self.adapter(x)
        return out


@pytest.mark.parametrize("main", ["cpu", 0])
@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_layers_that_are_wrapped_while_they_wait(home: str, main: Any, tmp_path: Path) -> None:
    model: Any = ZOO["shuffled"].build()
    reference: Any = ZOO["shuffled"].build()
    dispatch.dispatch_model(model, {"": home}, main_device=main, offload_dir=tmp_path, devices=PLAYED)
    for each in (model, reference):
        torch.manual_seed(1)
        each.layers[1] = Adapted(each.layers[1])
        each(rows()).square().sum().backward()
    found, expected = (each.layers[1].adapter.weight.grad for each in (model, reference))
    assert torch.equal(found, expected)
    assert list(model.state_dict()) == list(reference.state_dict())
    dispatch.remove_hook_from_submodules(model)
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in reference.state_dict().items())
    assert torch.equal(model(rows()), reference(rows()))


def test_threads_that_call_a_part_take_turns() -> None:
    model: Any = nn.ModuleDict({"encoder": nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(12)))})
    with torch.no_grad():
        expected = model["encoder"](rows())
    dispatch.cpu_offload(model, 0, devices=PLAYED)
    found: list[bool] = []

    def call() -> None:
        with torch.no_grad():
            found.extend(torch.equal(model["encoder"](rows()), expected) for _ in range(15))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 60


def test_a_part_that_fails_lets_other_threads_in() -> None:
    model: Any = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))})
    dispatch.cpu_offload(model, 0, devices=PLAYED)
    with pytest.raises(RuntimeError):
        model["encoder"](torch.ones(3, WIDTH + 1))
    waiting = model["encoder"][1].weight
    model["encoder"][1].weight = nn.Parameter(torch.ones(WIDTH, WIDTH))
    with pytest.raises(InputError, match="was replaced"):
        model["encoder"](rows())
    model["encoder"][1].weight = waiting
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(model["encoder"](rows())), daemon=True)
    thread.start()
    thread.join(20)
    assert len(found) == 1


def test_what_is_dispatched_in_part_or_by_others_is_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    whole: Any = ZOO["rooted"].build()
    dispatch.cpu_offload(whole.first, 0, devices=PLAYED)
    with pytest.raises(InputError, match="first is dispatched already"):
        dispatch.cpu_offload(whole, 0, devices=PLAYED)
    dispatch.remove_hook_from_submodules(whole)
    dispatch.cpu_offload(whole, 0, devices=PLAYED)
    with pytest.raises(InputError, match="as a part"):
        dispatch.cpu_offload(whole.first, 0, devices=PLAYED)
    theirs = ZOO["rooted"].build()
    accelerate.cpu_offload(theirs, "cpu")
    with pytest.raises(InputError, match="offloaded by Accelerate"):
        dispatch.cpu_offload(theirs, 0, devices=PLAYED)
    hooked, hook = dispatch.cpu_offload_with_hook(ZOO["rooted"].build(), "cpu")
    with pytest.raises(InputError, match="cpu_offload_with_hook"):
        dispatch.cpu_offload(hooked, 0, devices=PLAYED)
    hook.remove()
    assert pickle.loads(pickle.dumps(hooked)) is not hooked
    with pytest.warns(DeprecationWarning, match="script"):
        script = torch.jit.script(nn.Linear(1, 1))  # type: ignore[no-untyped-call]
    for given in ("gpt2", script):
        with pytest.raises(InputError, match="cannot be dispatched"):
            dispatch.dispatch_model(given, {"": "cpu"})  # type: ignore[arg-type]


def test_a_removed_model_says_of_no_map() -> None:
    model = dispatch.dispatch_model(nn.Linear(1, 1), {"": "cpu"}, main_device=0, devices=PLAYED)
    assert hasattr(dispatch.remove(model), "forward")
    assert not hasattr(model, "hf_device_map")


def test_devices_that_this_machine_has_not() -> None:
    for device in ("cuda:7", 7, "mps", "xpu", "hpu"):
        for call in (dispatch.cpu_offload, dispatch.cpu_offload_with_hook):
            if device == torch.accelerator.current_accelerator():
                continue
            with pytest.raises(InputError, match="this machine has no"):
                call(nn.Linear(1, 1), device)
    with pytest.raises(InputError, match="names 0; it takes the names"):
        dispatch.dispatch_model(nn.Sequential(nn.Linear(1, 1)), {0: "cpu"})  # type: ignore[dict-item]

"""Weights that wait keep the order in which their dimensions lie in memory, as channels-last models have them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_modules import WIDTH
from safetensors.torch import save_file
from torch import nn

import dispatch
import simulate
from dispatch import place
from planner.errors import InputError
from simulate.virtual_machine import Machine

PLAYED = {"cuda:0": "cpu"}
pytestmark = pytest.mark.usefixtures("one_thread")


class Mixed(nn.Module):
    """Convolutions of several kinds, one of them by a kernel of one pixel, and weights in orders of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.volume = nn.Conv3d(4, 4, 2)
        self.turned = nn.Parameter(torch.rand(4, 6).T)
        self.spread = nn.Parameter(torch.rand(5, 1).expand(5, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.up(torch.relu(self.point(self.first(x)))))
        x = self.volume(x[:, :, None].repeat(1, 1, 2, 1, 1)).mean((2, 3, 4))
        return x @ self.turned.T * self.spread[0]


def build() -> Any:
    torch.manual_seed(0)
    model = Mixed().eval()
    for flat in (model.first, model.point, model.up, model.norm):
        flat.to(memory_format=torch.channels_last)
    model.volume.to(memory_format=torch.channels_last_3d)
    return model


def picture() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.rand(2, 3, WIDTH, WIDTH).to(memory_format=torch.channels_last)


def strides(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return what each weight's strides are, but for the one that has gaps in memory."""
    return {name: tensor.stride() for name, tensor in place.named_tensors(model) if name != "spread"}


class Seen:
    """What strides weights have while their modules run."""

    def __init__(self, model: nn.Module) -> None:
        self.found: dict[str, tuple[int, ...]] = {}
        for path, module in model.named_modules():
            if path:
                module.register_forward_hook(self._look(path))

    def _look(self, path: str) -> Any:
        # Hooks come after weights have left: a kernel's own call is looked at instead.
        return lambda module, args, out: self.found.update({path: out.stride()})


@pytest.mark.parametrize("main", [0, "cpu"])
@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_strides_and_bits_wherever_weights_wait(home: str, main: Any, tmp_path: Path) -> None:
    reference = build()
    seen_plain = Seen(reference)
    with torch.no_grad():
        expected = reference(picture())
    for attempt in ("written", "found"):
        model = build()
        before = strides(model)
        dispatch.dispatch_model(model, {"": home}, main, offload_dir=tmp_path, devices=PLAYED)
        assert strides(model) == before, attempt
        seen = Seen(model)
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(model(picture()), expected)
        # Which order a convolution answers in is told by its weight's.
        assert seen.found == seen_plain.found
        state = model.state_dict()
        assert {name: state[name].stride() for name in state if name != "spread"} == {
            name: before[name] for name in state if name != "spread"
        }
        assert all(torch.equal(state[name], tensor) for name, tensor in build().state_dict().items())
        with dispatch.align_module_device(model.first):
            assert model.first.weight.stride() == before["first.weight"]
        dispatch.remove_hook_from_submodules(model)
        assert strides(model) == before
        assert all(torch.equal(one, other) for one, other in zip(model.parameters(), build().parameters(), strict=True))


def test_weights_in_a_slot_have_their_strides(tmp_path: Path) -> None:
    model = build()
    before, found = strides(model), {}
    for path, module in model.named_children():

        def noting(x: torch.Tensor, path: str = path, module: Any = module, own: Any = module.forward) -> Any:
            found[f"{path}.weight"] = module.weight.stride()
            return own(x)

        module.forward = noting
    dispatch.disk_offload(model, tmp_path, 0, devices=PLAYED)
    with torch.no_grad():
        model(picture())
    assert found == {name: before[name] for name in found}
    assert len(found) == 5


@pytest.fixture
def box() -> Iterator[Machine]:
    simulate.virtual("1x1GB")  # lets PyTorch know the devices
    with Machine({"cuda:0": 10**6}) as made:
        yield made


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_another_device(home: str, box: Machine, tmp_path: Path) -> None:
    model, before = build(), strides(build())
    dispatch.dispatch_model(model, {"": home}, box.devices["cuda:0"], offload_dir=tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(picture()), build()(picture()), rtol=1e-6, atol=1e-6)
    assert strides(model) == before
    dispatch.remove_hook_from_submodules(model)
    assert strides(model) == before


@pytest.mark.parametrize("main", [0, "cpu"])
@pytest.mark.parametrize("home", ["cpu", "disk", 0])
def test_checkpoints_hold_dimensions_in_their_own_order(home: Any, main: Any, tmp_path: Path) -> None:
    save_file({name: t.contiguous() for name, t in build().state_dict().items()}, tmp_path / "model.safetensors")
    model, before = build().to("meta"), strides(build())
    places = {"": home} if main == 0 else {"": home, "norm": "cpu"}
    places = {key: "cpu" if main == "cpu" and where == 0 else where for key, where in places.items()}
    places |= {"norm": 0} if main == 0 else {}
    dispatch.load_checkpoint_and_dispatch(
        model, tmp_path / "model.safetensors", places, offload_folder=tmp_path / "apart", devices=PLAYED
    )
    assert strides(model) == before
    with torch.no_grad():
        assert torch.equal(model(picture()), build()(picture()))
    dispatch.remove_hook_from_submodules(model)
    assert strides(model) == before


def test_pickled_values_take_the_models_order(tmp_path: Path) -> None:
    torch.save({name: t.contiguous() for name, t in build().state_dict().items()}, tmp_path / "model.bin")
    model = build().to("meta")
    dispatch.load_checkpoint_and_dispatch(model, tmp_path / "model.bin", {"": "cpu"})
    assert strides(model) == strides(build())
    with torch.no_grad():
        assert torch.equal(model(picture()), build()(picture()))


def test_an_index_is_accelerates_too(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    save_file({name: t.contiguous() for name, t in build().state_dict().items()}, tmp_path / "model.safetensors")
    model = build().to("meta")
    dispatch.load_checkpoint_in_model(model, tmp_path / "model.safetensors", {"": "disk"}, tmp_path / "apart")
    model.norm.load_state_dict(build().norm.state_dict(), assign=True)
    accelerate.dispatch_model(model, {"": "disk"}, main_device="cpu", offload_dir=tmp_path / "apart")
    with torch.no_grad():
        torch.testing.assert_close(model(picture()), build()(picture()))


def test_values_that_are_given_take_the_models_order() -> None:
    model, before = build(), strides(build())
    given = {name: tensor.contiguous() + 1 for name, tensor in build().state_dict().items()}
    dispatch.cpu_offload(model, 0, state_dict=given, devices=PLAYED)
    dispatch.remove_hook_from_submodules(model)
    assert strides(model) == before
    assert torch.equal(model.first.weight, given["first.weight"])


def test_folders_of_another_order_are_told_from_ones_own(tmp_path: Path) -> None:
    dispatch.remove_hook_from_submodules(dispatch.disk_offload(build(), tmp_path, 0, devices=PLAYED))
    contiguous = Mixed().eval()
    with pytest.raises(InputError, match="lacks"):
        dispatch.disk_offload(contiguous, tmp_path, 0, devices=PLAYED)


def test_the_order_of_a_tensors_dimensions() -> None:
    kernel = torch.empty(4, 3, 2, 2)
    assert place.order_of(kernel) is place.strides_of(kernel) is None
    assert place.order_of(kernel.to(memory_format=torch.channels_last)) == (0, 2, 3, 1)
    assert place.order_of(torch.empty(4, 6).T) == (1, 0)
    assert place.order_of(torch.empty(4, 1).expand(4, 6)) is None
    assert place.order_of(torch.empty(4, 6)[:, :3]) is None
    assert place.strides_of(torch.empty(4, 6)[:, :3]) is None
    point = torch.empty(4, 3, 1, 1).to(memory_format=torch.channels_last)
    assert (place.order_of(point), place.strides_of(point)) == (None, (3, 1, 3, 3))
    for shape in ((), (0, 3), (1, 0, 1), (2, 1, 3)):
        assert place.strides_of(torch.empty(shape)) is None

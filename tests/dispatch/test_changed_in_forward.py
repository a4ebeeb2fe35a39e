"""What a forward changes of weights that wait, as a BatchNorm in training does, is kept where they wait or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_modules import WIDTH, rows
from torch import nn

import dispatch
import simulate
from planner.errors import InputError
from simulate.virtual_machine import Machine

PLAYED = {"cuda:0": "cpu"}
pytestmark = pytest.mark.usefixtures("one_thread")


class Counting(nn.Module):
    """Changes a buffer or a parameter of its own whenever it runs."""

    def __init__(self, change: Callable[[Any], None]) -> None:
        super().__init__()
        self.change, self.linear = change, nn.Linear(WIDTH, WIDTH)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.full((WIDTH,), float("nan")))
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.change(self)
        out: torch.Tensor = self.linear(x) * self.scale * self.steps
        return out


class Aliased(nn.Module):
    """Two layers with one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH)
        self.other.running_mean = self.norm.running_mean

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.other(self.norm(x))
        return out


def counting(change: Callable[[Any], None]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), Counting(change))


def with_one_data_written(module: Any) -> None:
    module.steps.data.add_(1)


def assigned(module: Any) -> None:
    module.steps = module.steps + 1


def scaled(module: Any) -> None:
    module.scale.mul_(2)


def scale_assigned(module: Any) -> None:
    module.scale = nn.Parameter(module.scale * 2)


def scale_given_data(module: Any) -> None:
    module.scale.data = module.scale * 2


CHANGING: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)),
    "one buffer of two": Aliased,
    "in place": counting(lambda module: module.steps.add_(1)),
    "data in place": counting(with_one_data_written),
    "assigned": counting(assigned),
    "parameter": counting(scaled),
    "parameter assigned": counting(scale_assigned),
    "parameter's data": counting(scale_given_data),
}


def assert_same_state(model: nn.Module, reference: nn.Module) -> None:
    state, expected = model.state_dict(), reference.state_dict()
    assert list(state) == list(expected)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor.cpu(), expected[name], rtol=0, atol=0, equal_nan=True)


def seeded(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CHANGING[name]()


def run(model: nn.Module, *, grad: bool) -> list[torch.Tensor]:
    """Return the answers of three calls in training, and of one after them."""
    with torch.set_grad_enabled(grad):
        found = [model.train()(rows() * step) for step in (1, 2, 3)]
        return [*found, model.eval()(rows())]


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", CHANGING)
def test_changes_are_kept_in_host_memory(name: str, grad: bool, waits: bool) -> None:
    model, reference = seeded(name), seeded(name)
    dispatch.cpu_offload(model, 0, offload_buffers=waits, devices=PLAYED)
    for found, expected in zip(run(model, grad=grad), run(reference, grad=grad), strict=True):
        assert torch.equal(found, expected)
    assert_same_state(model, reference)
    dispatch.remove_hook_from_submodules(model)
    assert_same_state(model, reference)


@pytest.fixture
def box() -> Iterator[Machine]:
    simulate.virtual("1x1GB")  # lets PyTorch know the devices
    with Machine({"cuda:0": 10**6}) as made:
        yield made


@pytest.mark.parametrize("name", ["batch norm", "in place", "data in place", "assigned", "parameter"])
def test_changes_on_another_device_come_back(name: str, box: Machine) -> None:
    model, reference = seeded(name), seeded(name)
    dispatch.cpu_offload(model, box.devices["cuda:0"], offload_buffers=True)
    for found, expected in zip(run(model, grad=False), run(reference, grad=False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    state, expected_state = model.state_dict(), reference.state_dict()
    for key, tensor in state.items():
        torch.testing.assert_close(tensor, expected_state[key], rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", CHANGING)
def test_changes_of_what_waits_on_disk_are_refused(name: str, tmp_path: Path) -> None:
    model = dispatch.disk_offload(seeded(name), tmp_path, 0, offload_buffers=True, devices=PLAYED)
    for _ in range(2):
        with pytest.raises(InputError, match="was changed by the forward"):
            model(rows())
    if name == "one buffer of two":
        # What has two names stays where it is used, and is changed there.
        return
    assert_same_state(model, seeded(name))
    if name == "batch norm":
        assert torch.equal(model.eval()(rows()), seeded(name).eval()(rows()))


@pytest.mark.parametrize("name", CHANGING)
def test_what_the_cpu_runs_from_files_keeps_changes_in_memory(name: str, tmp_path: Path) -> None:
    model, reference = seeded(name), seeded(name)
    dispatch.disk_offload(model, tmp_path, "cpu", offload_buffers=True)
    for found, expected in zip(run(model, grad=False), run(reference, grad=False), strict=True):
        assert torch.equal(found, expected)
    dispatch.remove_hook_from_submodules(model)
    assert_same_state(model, reference)


def grown(module: Any) -> None:
    module.mean = torch.cat([module.mean, module.mean])


def gone(module: Any) -> None:
    module.mean = None


def narrowed(module: Any) -> None:
    module.mean = module.mean.half()


@pytest.mark.parametrize("change", [grown, gone, narrowed])
def test_what_does_not_fit_where_it_waits(change: Callable[[Any], None]) -> None:
    model = dispatch.cpu_offload(counting(change)(), 0, offload_buffers=True, devices=PLAYED)
    for _ in range(2):
        with pytest.raises(InputError, match=r"1\.mean was changed by the forward"):
            model(rows())


def test_an_embedding_with_a_largest_norm() -> None:
    def build() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(11, WIDTH, max_norm=0.5), nn.Linear(WIDTH, 3))

    model, reference, ids = build(), build(), torch.tensor([1, 4])
    dispatch.cpu_offload(model, 0, devices=PLAYED)
    with torch.no_grad():
        assert torch.equal(model(ids), reference(ids))
    assert_same_state(model, reference)
    tied: Any = nn.Sequential(nn.Embedding(11, WIDTH, max_norm=0.5), nn.Linear(WIDTH, 11, bias=False))
    tied[1].weight = tied[0].weight
    dispatch.cpu_offload(tied, 0, devices=PLAYED)
    with pytest.raises(InputError, match="waits under several names"), torch.no_grad():
        tied(ids)


class TiedAndCounting(nn.Module):
    """Has weights that wait under two names beside a buffer that it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        out: torch.Tensor = self.head(self.embed(ids)) * self.steps
        return out


def test_a_buffer_that_changes_beside_tied_weights() -> None:
    model = TiedAndCounting()
    dispatch.cpu_offload(model, 0, offload_buffers=True, preload_module_classes=["TiedAndCounting"], devices=PLAYED)
    with torch.no_grad():
        one, other = (model(torch.tensor([1, 4])) for _ in range(2))
    assert torch.equal(one * 2, other)


def test_a_forward_that_fails_has_changed_what_it_changed() -> None:
    def failing(module: Any) -> None:
        module.steps.add_(1)
        raise RuntimeError("on purpose")

    model: Any = dispatch.cpu_offload(counting(failing)(), 0, offload_buffers=True, devices=PLAYED)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="on purpose"):
            model(rows())
    assert model.state_dict()["1.steps"] == 2

"""Accelerate's functions on our engine: any module, any map, the bits of the plain module, and what is refused."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_modules import WIDTH, ZOO, Shuffled, rows, tensors_in
from torch import nn

import dispatch
import simulate
from dispatch.structure import plan_of
from planner.errors import InputError
from simulate.virtual_machine import Machine

PLAYED = {"cuda:0": "cpu"}
pytestmark = pytest.mark.usefixtures("one_thread")


def same(found: Any, expected: Any) -> bool:
    one, other = tensors_in(found), tensors_in(expected)
    return len(one) == len(other) > 0 and all(
        a.device == b.device and torch.equal(a.cpu(), b) for a, b in zip(one, other, strict=True)
    )


def plain_call(name: str) -> Any:
    with torch.no_grad():
        return ZOO[name].call(ZOO[name].build(), torch.device("cpu"))


# Every kind of module, wherever its weights wait


@pytest.mark.parametrize("home", ["cpu", "disk", "mapped", "mixed"])
@pytest.mark.parametrize("name", ZOO)
def test_the_bits_of_the_plain_module(name: str, home: str, tmp_path: Path) -> None:
    entry, expected = ZOO[name], plain_call(name)
    homes = {"cpu": ["cpu"], "disk": ["disk"], "mapped": ["disk", "cpu"], "mixed": ["cpu", 0, "disk"]}[home]
    main = "cpu" if home == "mapped" else 0
    places = {block: homes[index % len(homes)] for index, block in enumerate(entry.blocks)}
    model, reference = entry.build(), entry.build()
    dispatched = dispatch.dispatch_model(
        model, places, main_device=main, offload_dir=tmp_path, preload_module_classes=entry.preload, devices=PLAYED
    )
    assert dispatched is model
    assert model.hf_device_map == places
    for _ in range(3):
        with torch.no_grad():
            assert same(entry.call(model, torch.device("cpu")), expected)
    # What the CPU computes with from mapped files is there at any time.
    assert any(dispatch.has_offloaded_params(module) for module in model.modules()) is (home != "mapped")
    dispatch.remove_hook_from_submodules(model)
    assert not any(dispatch.has_offloaded_params(module) for module in model.modules())
    assert not hasattr(model, "hf_device_map")
    with torch.no_grad():
        assert same(entry.call(model, torch.device("cpu")), expected)
    for (name, one), (other_name, other) in zip(
        model.state_dict().items(), reference.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(one, other)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in reference.parameters()]


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.in_accelerate])
def test_what_accelerate_gives(name: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    entry = ZOO[name]
    modules = dict(entry.build().named_modules())
    blocks = [block for block in entry.blocks if block in modules]
    places = {"": "cpu", **{block: ("disk", "cpu")[index % 2] for index, block in enumerate(blocks)}}
    theirs = accelerate.dispatch_model(
        entry.build(), places, offload_dir=tmp_path / "theirs", preload_module_classes=list(entry.preload)
    )
    ours = dispatch.dispatch_model(
        entry.build(), places, offload_dir=tmp_path / "ours", preload_module_classes=entry.preload
    )
    with torch.no_grad():
        expected = entry.call(theirs, torch.device("cpu"))
        assert same(entry.call(ours, torch.device("cpu")), expected)
    # A folder that Accelerate wrote is used as it is.
    again = dispatch.dispatch_model(
        entry.build(), places, main_device=0, offload_dir=tmp_path / "theirs", preload_module_classes=entry.preload,
        devices=PLAYED,
    )  # fmt: skip
    assert not (tmp_path / "theirs" / "loadplan-offload.safetensors").exists()
    with torch.no_grad():
        assert same(entry.call(again, torch.device("cpu")), expected)


def test_maps_that_need_no_hooks() -> None:
    for places in ({"": "cpu"}, {"first": "cpu", "second": "cpu", "scale": "cpu", "shift": "cpu", "passing": "cpu"}):
        model = ZOO["rooted"].build()
        before = dict(model.named_parameters())
        dispatch.dispatch_model(model, places)
        assert all("forward" not in vars(module) for module in model.modules())
        assert all(parameter is before[name] for name, parameter in model.named_parameters())
        model.to(torch.float64)
        copy.deepcopy(model)
    # Another map may follow.
    dispatch.dispatch_model(model, {"": "cpu"}, main_device=0, devices=PLAYED)
    assert dispatch.has_offloaded_params(model.get_submodule("first"))


# Several devices that do not mix


@pytest.fixture
def box() -> Iterator[Machine]:
    simulate.virtual("1x1GB")  # lets PyTorch know the devices
    with Machine({"cuda:0": 10**6, "cuda:1": 10**6}) as made:
        yield made


@pytest.mark.parametrize("caller", ["cpu", "cuda:0", "cuda:1"])
@pytest.mark.parametrize("name", ["tied", "uncalled", "shuffled", "convolved", "attention"])
def test_two_devices_and_answers_where_the_caller_is(name: str, caller: str, box: Machine, tmp_path: Path) -> None:
    entry, expected = ZOO[name], plain_call(name)
    homes = [box.devices["cuda:0"], "cpu", box.devices["cuda:1"], "disk"]
    places = {block: homes[index % 4] for index, block in enumerate(entry.blocks)}
    if name == "attention":
        places = {"layers.0": box.devices["cuda:0"], "layers.1": box.devices["cuda:1"]}
    model = dispatch.dispatch_model(entry.build(), places, offload_dir=tmp_path, preload_module_classes=entry.preload)
    here = box.devices.get(caller, torch.device("cpu"))
    for _ in range(2):
        with torch.no_grad():
            found = tensors_in(entry.call(model, here))
        assert {tensor.device for tensor in found} == {here}
        # Attention has another kernel on the CPU than on other devices.
        close = 1e-6 if name == "attention" else 0
        for one, other in zip(found, tensors_in(expected), strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=close, atol=close)


def test_what_waits_takes_two_slots_of_its_device(box: Machine) -> None:
    model = nn.Sequential(*(nn.Linear(100, 100) for _ in range(6)))
    each = 100 * 100 * 4 + 512
    dispatch.cpu_offload(model, box.devices["cuda:1"])
    with torch.no_grad():
        model(torch.rand(1, 100))
    assert box.peak_bytes("cuda:0") == 0
    assert 2 * each - 200 <= box.peak_bytes("cuda:1") < 2 * each + 3000
    assert model.get_submodule("0").weight.is_meta


def test_buffers_stay_unless_they_are_told_to_wait(box: Machine) -> None:
    for waits in (False, True):
        model = dispatch.cpu_offload(ZOO["rooted"].build(), box.devices["cuda:0"], offload_buffers=waits)
        assert model.get_buffer("shift").is_meta is waits
        # No checkpoint holds it, so it stays in any case.
        assert model.get_buffer("passing").device == box.devices["cuda:0"]
        with torch.no_grad():
            assert same(model(x=rows()), plain_call("rooted"))


class Keyed(nn.Module):
    """Gives back one of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, cache: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"x": self.linear(x), "cache": cache["cache"]}


def test_skip_keys(box: Machine) -> None:
    x, cache = rows(), {"cache": torch.arange(3)}
    for skip in (None, "cache", ["cache"]):
        model = dispatch.dispatch_model(Keyed(), {"": box.devices["cuda:0"]}, skip_keys=skip, force_hooks=True)
        with torch.no_grad():
            found = model(x, cache=cache)
        assert found["x"].device.type == found["cache"].device.type == "cpu"
        # What is skipped is not brought back either: it is the very tensor that was given.
        assert (found["cache"] is cache["cache"]) is (skip is not None)


def test_force_hooks_brings_inputs_to_one_device_and_answers_back(box: Machine) -> None:
    device = box.devices["cuda:0"]
    plain = dispatch.dispatch_model(ZOO["convolved"].build(), {"": device})
    with pytest.raises(RuntimeError):
        plain(rows())
    hooked = dispatch.dispatch_model(ZOO["convolved"].build(), {"": device}, force_hooks=True)
    with torch.no_grad():
        assert same(hooked(rows()), plain_call("convolved"))


# Gradients


def gradients(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    out = model(x)
    out = out if isinstance(out, torch.Tensor) else sum(tensor.sum() for tensor in tensors_in(out))
    out.square().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("home", ["cpu", "disk"])
@pytest.mark.parametrize("name", ["shuffled", "uncalled", "nested", "parametrized", "recurrent"])
def test_gradients_flow_through_what_waits(name: str, home: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    expected = gradients(entry.build(), rows())
    model = dispatch.dispatch_model(
        entry.build(), {"": home}, main_device=0, offload_dir=tmp_path, preload_module_classes=entry.preload,
        devices=PLAYED,
    )  # fmt: skip
    for _ in range(2):
        assert torch.equal(gradients(model, rows()), expected)


def test_what_stays_is_trained_beside_what_waits() -> None:
    reference, model = ZOO["shuffled"].build(), ZOO["shuffled"].build()
    places = {"": "cpu", "layers.1": 0}
    dispatch.dispatch_model(model, places, devices=PLAYED)
    for each in (reference, model):
        each(rows()).square().sum().backward()
    assert torch.equal(model.layers[1].weight.grad, reference.layers[1].weight.grad)  # type: ignore[union-attr, index]


# The order of copies is learned


def copies_of(model: nn.Module, *args: Any) -> tuple[int, int]:
    """Return how many groups were copied in one call, and how many of them only when they were asked for."""
    count, late = 0, 0
    stream = next(pair[0] for module in model.modules() if (pair := vars(module).get("_loadplan_group")) is not None)
    copy_one, make_room = stream.ring.copy, stream._make_room

    def copied(slot: int, store: Any) -> None:
        nonlocal count
        count += 1
        copy_one(slot, store)

    def made(group: Any) -> None:
        nonlocal late
        late += 1
        make_room(group)

    stream.ring.copy, stream._make_room = copied, made
    with torch.no_grad():
        model(rows(), *args)
    stream.ring.copy, stream._make_room = copy_one, make_room
    return count, late


def test_modules_in_another_order_are_copied_once_a_call_and_ahead() -> None:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(7)))
    ordered = [model[index] for index in (4, 0, 6, 2, 5, 1, 3)]
    model.forward = lambda x: nn.Sequential(*ordered)(x)  # type: ignore[method-assign, assignment]
    dispatch.cpu_offload(model, 0, devices=PLAYED)
    found = [copies_of(model) for _ in range(5)]
    assert found[0][1] > 0
    assert found[3:] == [(7, 0), (7, 0)]


class Routed(nn.Module):
    """Calls one of its experts, another one each time."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        out: torch.Tensor = self.after(self.experts[choice](self.before(x)))
        return out


def test_what_follows_nothing_in_particular_is_not_copied_ahead() -> None:
    model = dispatch.cpu_offload(Routed(), 0, devices=PLAYED)
    found = [copies_of(model, call % 4) for call in range(16)]
    # The expert comes when it is asked for; what is before and after it comes ahead, and nothing in vain.
    assert found[-4:] == [(3, 1)] * 4


# What is refused


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({}, "is empty"),
        ({"first": 0}, "says nothing of scale"),
        ({"": 0, "frist": "cpu"}, "names 'frist'; the model has no such module; try first"),
        ({"": "gpu"}, "has 'gpu' for a device"),
        ({"": -1}, "has -1 for a device"),
        ({"": "meta"}, '"meta", where they have no values'),
        ({"": True}, "has True for a device"),
        ({"": "cuda:9"}, "this machine has no cuda:9"),
        ({"": "disk"}, "give an offload_dir"),
        ("auto", "must say where each module goes"),
    ],
)
def test_maps_that_cannot_be_run(places: Any, said: str) -> None:
    model = ZOO["rooted"].build()
    before = dict(model.named_parameters())
    with pytest.raises(InputError, match=re.escape(said)):
        dispatch.dispatch_model(model, places)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert not hasattr(model, "hf_device_map")


class Packed(nn.Parameter):
    """A parameter of a kind of its own, as those of quantisers are."""


def test_parameters_that_cannot_be_copied_as_plain_ones() -> None:
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(InputError, match="no shape until its model is called"):
        dispatch.cpu_offload(lazy, 0, devices=PLAYED)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    model[0].weight = Packed(model[0].weight.detach())
    with pytest.raises(InputError, match=r"0\.weight is a Packed"):
        dispatch.cpu_offload(model, 0, devices=PLAYED)
    dispatch.dispatch_model(model, {"0": 0, "1": "cpu"}, devices=PLAYED)
    assert isinstance(model[0].weight, Packed)


def test_a_module_split_between_devices_is_refused() -> None:
    with pytest.raises(InputError, match="splits first between"):
        dispatch.dispatch_model(
            ZOO["rooted"].build(), {"": "cpu", "first.weight": 0, "first.bias": 1}, devices={"cuda:0": "cpu"}
        )


def test_what_a_dispatched_model_refuses() -> None:
    model = dispatch.cpu_offload(ZOO["rooted"].build(), 0, devices=PLAYED)
    for attempt in (
        lambda: model.to("cpu"),
        lambda: model.half(),
        lambda: dispatch.dispatch_model(model, {"": "cpu"}),
        lambda: dispatch.remove_hook_from_module(model.get_submodule("first")),
    ):
        with pytest.raises(InputError, match=r"dispatch\.remove|remove_hook_from_submodules"):
            attempt()
    dispatch.remove_hook_from_module(model)
    with torch.no_grad():
        assert same(copy.deepcopy(model)(x=rows()), plain_call("rooted"))
        assert same(pickle.loads(pickle.dumps(model))(x=rows()), plain_call("rooted"))


def test_weights_that_are_used_without_a_call_are_told_of() -> None:
    model = dispatch.cpu_offload(ZOO["uncalled"].build(), 0, devices=PLAYED)
    with pytest.raises(InputError, match="preload_module_classes"):
        model(rows())


def test_offload_folders(tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.write_text("")
    with pytest.raises(InputError, match="cannot"):
        dispatch.disk_offload(ZOO["tied"].build(), file / "folder")
    ours = tmp_path / "ours"
    first = dispatch.disk_offload(ZOO["tied"].build(), ours, 0, devices=PLAYED)
    written = ours / "loadplan-offload.safetensors"
    # Tied weights are written once.
    assert written.stat().st_size < (11 * WIDTH + WIDTH * WIDTH + WIDTH) * 4 + 600
    inode = written.stat().st_ino
    dispatch.disk_offload(ZOO["tied"].build(), ours, 0, devices=PLAYED)
    assert written.stat().st_ino == inode
    other = ZOO["tied"].build()
    with torch.no_grad():
        other.get_parameter("body.bias")[0] += 1
    with pytest.raises(InputError, match=r"holds other values of body\.bias"):
        dispatch.disk_offload(other, ours, 0, devices=PLAYED)
    with pytest.raises(InputError, match="lacks"):
        dispatch.disk_offload(ZOO["shuffled"].build(), ours, 0, devices=PLAYED)
    written.write_bytes(written.read_bytes()[:-4])
    with pytest.raises(InputError, match="shrank"):
        first(torch.tensor([[1]]))


# Given values


def test_values_come_from_a_state_dict(tmp_path: Path) -> None:
    expected = plain_call("shuffled")
    state = ZOO["shuffled"].build().state_dict()
    with torch.device("meta"):
        empty = Shuffled().eval()
    dispatch.dispatch_model(empty, {"": "cpu"}, main_device=0, state_dict=state, devices=PLAYED)
    with torch.no_grad():
        assert same(empty(rows()), expected)
    other = Shuffled().eval()
    dispatch.cpu_offload(other, 0, state_dict=state, devices=PLAYED)
    with torch.no_grad():
        assert same(other(rows()), expected)
    with torch.device("meta"):
        empty = Shuffled()
    short = {name: tensor for name, tensor in state.items() if name != "layers.5.bias"}
    with pytest.raises(InputError, match=r"layers\.5\.bias and 0 more tensors have no values"):
        dispatch.dispatch_model(empty, {"": "cpu"}, main_device=0, state_dict=short, devices=PLAYED)
    with pytest.raises(InputError, match="has the shape"):
        dispatch.dispatch_model(
            empty, {"": "cpu"}, main_device=0, state_dict={**state, "layers.0.bias": torch.ones(1)}, devices=PLAYED
        )


def test_an_index_of_safetensors_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    expected = plain_call("shuffled")
    state = ZOO["shuffled"].build().state_dict()
    save_file({f"stored.{name}": tensor for name, tensor in state.items()}, tmp_path / "weights.safetensors")
    index = {
        name: {
            "safetensors_file": str(tmp_path / "weights.safetensors"), "weight_name": f"stored.{name}",
            "dtype": "float32",
        }
        for name in state
    }  # fmt: skip
    with torch.device("meta"):
        empty = Shuffled().eval()
    dispatch.dispatch_model(empty, {"": "disk"}, main_device=0, offload_index=index, devices=PLAYED)
    with torch.no_grad():
        assert same(empty(rows()), expected)
    del index["layers.0.bias"]
    with torch.device("meta"):
        empty = Shuffled().eval()
    with pytest.raises(InputError, match="lacks 1 of the 12 tensors"):
        dispatch.dispatch_model(empty, {"": "disk"}, main_device=0, offload_index=index, devices=PLAYED)


# Graphs of torch.fx, torch.compile aside


def test_a_graph_module_may_be_changed_while_it_is_dispatched() -> None:
    model: Any = dispatch.cpu_offload(ZOO["graph"].build(), 0, devices=PLAYED)
    x = rows()
    with torch.no_grad():
        before = model(x)
        for node in model.graph.nodes:
            if node.op == "output":
                with model.graph.inserting_before(node):
                    doubled = model.graph.call_function(torch.mul, (node.args[0], 2.0))
                node.args = (doubled,)
        model.recompile()
        assert torch.equal(model(x), before * 2)
        dispatch.remove_hook_from_submodules(model)
        assert "forward" not in vars(model)
        assert torch.equal(model(x), before * 2)


# The structure


def test_a_plan_of_a_map_names_each_tensor_once() -> None:
    for name, entry in ZOO.items():
        model = entry.build()
        plan = plan_of(model, {"": "cpu"}, main_device=0, whole=entry.preload)
        found = [tensor for _, _, tensor, _ in plan.graph.tensors()]
        assert len(set(found)) == len(found)
        others = {each for names in plan.graph.ties for each in names}
        known = {each for each, _ in model.named_parameters()} | {each for each, _ in model.named_buffers()}
        assert known <= {*found} <= known | others, name
        assert plan.graph.num_parameters == sum(p.numel() for p in model.parameters())
        plan.graph.check()


# What the documentation says


def test_the_snippet_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "familiar.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, "familiar.md", "exec"), names)
    assert list(names["state"]) == list(names["model"].state_dict())
    assert not any("forward" in vars(module) for module in names["model"].modules())
    known = {name for name in dispatch.__all__ if f"`{name}`" in text}
    assert {name for name in dispatch.__all__ if callable(getattr(dispatch, name))} - known <= {
        "CacheStatistics", "Checkpoint", "Measurement", "Recording", "apply", "cache_statistics", "measure", "remove",
    }  # fmt: skip


def test_names_and_order_of_arguments_are_accelerates() -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate import hooks, utils

    for name in dispatch.__all__:
        theirs = next((getattr(each, name) for each in (accelerate, utils, hooks) if hasattr(each, name)), None)
        if theirs is None or not inspect.isfunction(theirs):
            continue
        asked = inspect.signature(theirs).parameters.values()
        wanted = [(each.name, each.default) for each in asked if each.kind is not inspect.Parameter.VAR_KEYWORD]
        ours = inspect.signature(getattr(dispatch, name)).parameters.values()
        found = [(each.name, each.default) for each in ours if each.kind is not inspect.Parameter.KEYWORD_ONLY]
        assert found == wanted, name
        assert {each.name for each in ours if each.kind is inspect.Parameter.KEYWORD_ONLY} <= {"devices"}

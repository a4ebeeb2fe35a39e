"""Copies of dispatched models, which are dispatched as they are, and of their parts, which are plain modules."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from held_things import memories, movable
from load_meter import live_everywhere
from plain_modules import WIDTH, ZOO, rows
from torch import nn

import dispatch
import planner
import simulate
from dispatch import page_cache
from dispatch.dispatched import state_of
from dispatched_zoo import CPU, PLAYED, answers, dispatched, hooked, same
from planner.errors import InputError, PlanMismatchError
from simulate.virtual_machine import Machine
from tiny_models import WORK, experts_away, on_cpu, spread_over_two, streamed

HOMES = [("cpu", 0), ("disk", 0), ("cpu", 0, "disk"), ("mapped",)]
pytestmark = [pytest.mark.usefixtures("one_thread")]


def places(module: nn.Module) -> dict[str, tuple[torch.device, bool]]:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: (tensor.device, tensor.requires_grad) for name, tensor in named}


@pytest.mark.parametrize("homes", HOMES)
@pytest.mark.parametrize("name", [name for name in ZOO if name not in ("attention", "convolved")])
def test_a_copy_is_another_model_dispatched_alike(name: str, homes: tuple[Any, ...], tmp_path: Path) -> None:
    plain = ZOO[name].build()
    expected, state = answers(name, plain), plain.state_dict()
    model = dispatched(name, tmp_path, *homes)
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    made = copy.deepcopy(model)
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == before
    assert type(made).__name__ == type(copy.deepcopy(plain)).__name__
    assert hooked(made) == hooked(model)
    assert places(made) == places(model)
    assert made.hf_device_map == model.hf_device_map
    assert made.hf_device_map is not model.hf_device_map
    assert not set(movable(made)) & set(movable(model)), "something is in both"
    assert not set(memories(made)) & set(memories(model)), "both have one memory"
    for _ in range(2):
        assert same(answers(name, made), expected)
        assert same(answers(name, model), expected)
    assert same(list(made.state_dict().values()), list(state.values()))

    # What is done to one is not done to the other.
    dispatch.remove_hook_from_submodules(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-3)
    assert same(answers(name, made), expected)
    assert hooked(made)
    again = copy.deepcopy(made)
    dispatch.remove_hook_from_submodules(made)
    assert same(list(made.state_dict().values()), list(state.values()))
    assert [p.requires_grad for p in made.parameters()] == [p.requires_grad for p in plain.parameters()]
    assert not hooked(made)
    del made, model
    assert same(answers(name, again), expected)


def test_values_and_ties_are_each_models_own(tmp_path: Path) -> None:
    model = dispatched("tied", tmp_path, "cpu")
    made = copy.deepcopy(model)
    expected = answers("tied", model)
    made.load_state_dict({name: tensor * -2 for name, tensor in made.state_dict().items()})
    assert same(answers("tied", model), expected)
    changed = ZOO["tied"].build()
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(-2)
    assert same(answers("tied", made), answers("tied", changed))
    state = made.state_dict()
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    dispatch.remove_hook_from_submodules(made)
    assert made.head.weight is made.embed.weight
    assert made.again is made.body


class Counted(nn.Module):
    """Answers with an attribute of its own, as a model that a user has named."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 3)
        self.label: Any = {"names": ["one"]}

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return self.last(self.norm(self.first(x))), self.label["names"][0]


def test_attributes_are_copied_as_in_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    plain = Counted().eval()
    ours, theirs = copy.deepcopy(plain), copy.deepcopy(plain)
    dispatch.dispatch_model(ours, {"first": 0, "norm": "cpu", "last": 0}, devices=PLAYED)
    accelerate.dispatch_model(theirs, {"first": "cpu", "norm": "cpu", "last": "cpu"}, force_hooks=True)
    found = []
    for model in (ours, theirs):
        made = copy.deepcopy(model)
        made.label["names"][0] = "two"
        with torch.no_grad():
            found.append((made(rows()), model(rows())))
        assert made.first.forward is not model.first.forward
    for mine, other in zip(*found, strict=True):
        assert mine[1] == other[1]
        assert torch.equal(mine[0], other[0])


def test_training_a_copy_leaves_the_other(tmp_path: Path) -> None:
    model = dispatched("shuffled", tmp_path, 0, "cpu")
    made = copy.deepcopy(model)
    expected, reference = answers("shuffled", model), ZOO["shuffled"].build()
    waits = {name for name, p in made.named_parameters() if p.is_meta}
    assert waits
    optimizers = [torch.optim.SGD([p for p in each.parameters() if not p.is_meta], lr=0.5) for each in (made,)]
    frozen = torch.optim.SGD([p for n, p in reference.named_parameters() if n not in waits], lr=0.5)
    for each, optimizer in ((made, optimizers[0]), (reference, frozen)):
        each(rows()).sum().backward()
        optimizer.step()
    assert same(answers("shuffled", made), answers("shuffled", reference))
    assert same(answers("shuffled", model), expected)
    assert all(p.grad is None for p in model.parameters())


# Memory


@pytest.mark.parametrize("home", ["cpu", "disk", "mapped"])
def test_a_copy_takes_its_own_bytes_and_reads_no_more_than_its_slots(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    width, count = 256, 6
    layer = 4 * (width * width + width)
    network = nn.Sequential(*(nn.Linear(width, width) for _ in range(count)), nn.Linear(width, width)).eval()
    placed = {str(index): "disk" if home == "mapped" else home for index in range(count)} | {str(count): 0}
    if home == "mapped":
        placed = {"": "disk"}
    model = dispatch.dispatch_model(
        network, placed, main_device="cpu" if home == "mapped" else 0, offload_dir=tmp_path, devices=PLAYED
    )
    read: list[int] = []
    plain_read = dispatch.Checkpoint.read_into

    def counted(self: Any, entry: Any, destination: torch.Tensor, **kwargs: Any) -> None:
        read.append(destination.nbytes)
        plain_read(self, entry, destination, **kwargs)

    monkeypatch.setattr(dispatch.Checkpoint, "read_into", counted)
    with live_everywhere() as counts:
        made = copy.deepcopy(model)
    slots = 0 if home == "mapped" else 2 * layer
    stays = {"cpu": (count + 1) * layer, "disk": layer, "mapped": 0}[home]
    assert counts.peak.get("cpu", 0) == counts.live.get("cpu", 0) == slots + stays
    assert sum(read) <= (slots if home == "disk" else 0)
    x = torch.ones(1, width)
    with torch.no_grad():
        assert torch.equal(made(x), model(x))


def test_pages_that_were_written_are_copied_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    width = 64
    network = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(5)))
    model = dispatch.disk_offload(network, tmp_path, "cpu")
    with torch.no_grad(), dispatch.weights_at_home(model):
        model[2].weight.mul_(2)
    for known in (True, False):
        if not known:
            # Another kernel does not say which pages were written to: they are compared with the file.
            monkeypatch.setattr("dispatch.page_cache._PAGE_MAP", tmp_path / "none")
        with live_everywhere() as counts:
            made = copy.deepcopy(model)
        assert counts.live["cpu"] == 4 * width * width
        assert all(torch.equal(a, b) for a, b in zip(made.parameters(), model.parameters(), strict=True))
    with torch.no_grad():
        made[1].weight.mul_(3)
        made[2].weight.mul_(3)
    assert torch.equal(model[1].weight * 3, made[1].weight)
    assert torch.equal(model[2].weight * 3, made[2].weight)
    dispatch.remove_hook_from_submodules(made)
    assert torch.equal(model[2].weight * 3, made[2].weight)


# Parts


@pytest.mark.parametrize("homes", HOMES)
def test_a_part_is_a_plain_module_in_host_memory(homes: tuple[Any, ...], tmp_path: Path) -> None:
    plain: Any = ZOO["nested"].build()
    model = dispatched("nested", tmp_path, *homes)
    for path in ("inner", "inner.inner.after", "after"):
        expected, part = plain.get_submodule(path), model.get_submodule(path)
        made = copy.deepcopy(part)
        assert not hooked(made)
        assert not [name for each in made.modules() for name in vars(each) if "loadplan" in name or "deepcopy" in name]
        assert all(type(p) is nn.Parameter and p.requires_grad and p.device == CPU for p in made.parameters())
        assert torch.equal(made(rows()), expected(rows()))
        assert not set(memories(made)) & set(memories(model))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.zero_()
    assert same(answers("nested", model), answers("nested", plain))


def test_parts_of_parts_and_ties_inside(tmp_path: Path) -> None:
    tied: Any = nn.Sequential()
    tied.add_module("body", ZOO["tied"].build())
    model = dispatch.cpu_offload(tied, 0, devices=PLAYED)
    made = copy.deepcopy(model.body)
    assert made.head.weight is made.embed.weight
    assert made.again is made.body
    # A module that is never called: its parent's group has its weights.
    whole = dispatched("attention", tmp_path, "cpu")
    inside = copy.deepcopy(whole.layers[0].self_attn.out_proj)
    assert torch.equal(inside.weight, ZOO["attention"].build().layers[0].self_attn.out_proj.weight)  # type: ignore[index, union-attr]
    listed = copy.deepcopy(whole.layers)
    assert same([listed[1](listed[0](rows()[None]))], [ZOO["attention"].build()(rows()[None])])


def test_parts_are_copied_where_weights_are_at_home_and_in_the_middle_of_a_call(tmp_path: Path) -> None:
    model = dispatched("nested", tmp_path, "cpu")
    plain = ZOO["nested"].build()
    with dispatch.weights_at_home(model):
        made = copy.deepcopy(model.inner)
        with pytest.raises(InputError, match="at home"):
            copy.deepcopy(model)
    assert torch.equal(made(rows()), plain.inner(rows()))  # type: ignore[operator]
    found: list[Any] = []

    def ask(module: Any, *_: Any) -> None:
        found.append(copy.deepcopy(module))
        with pytest.raises(InputError, match="in the middle of a call"):
            copy.deepcopy(model)

    handle = model.inner.inner.register_forward_hook(ask)
    assert same(answers("nested", model), answers("nested", plain))
    handle.remove()
    found[0]._forward_hooks.clear()
    assert torch.equal(found[0](rows()), plain.inner.inner(rows()))  # type: ignore[operator, union-attr]
    assert same(answers("nested", copy.deepcopy(model)), answers("nested", plain))


# Bigger objects


class Holder:
    """Something that trains: it has a model twice, an optimizer, and a part."""

    def __init__(self, model: Any, *, part_first: bool):
        if part_first:
            self.part = model.layers[3]
        self.model, self.other = model, [model]
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.part = model.layers[3]


@pytest.mark.parametrize("part_first", [True, False])
def test_a_model_inside_of_something_else(part_first: bool, tmp_path: Path) -> None:
    holder = Holder(dispatched("shuffled", tmp_path, 0, "cpu"), part_first=part_first)
    made = copy.deepcopy(holder)
    assert made.other[0] is made.model is not holder.model
    assert same(answers("shuffled", made.model), answers("shuffled", holder.model))
    # A part is the copy's own where the copy came first, else a plain one.
    assert (made.part is made.model.layers[3]) == (not part_first)
    assert torch.equal(copy.deepcopy(made.part)(rows()), ZOO["shuffled"].build().layers[3](rows()))  # type: ignore[index, operator]
    has, trained = made.model.parameters(), made.optimizer.param_groups[0]["params"]
    assert all(one is other for one, other in zip(has, trained, strict=True))
    assert not {id(p) for p in trained} & {id(p) for p in holder.model.parameters()}


class Child(nn.Module):
    """Knows its parent, as modules do that look things up there."""

    def __init__(self, parent: nn.Module):
        super().__init__()
        self.linear, self.known = nn.Linear(WIDTH, WIDTH), [parent]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(x) * self.known[0].factor
        return found


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor, self.child = 3.0, Child(self)
        self.forward = self.own  # type: ignore[method-assign]

    def own(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.child(x)
        return found


def test_modules_that_know_each_other() -> None:
    torch.manual_seed(0)
    plain = Parent()
    expected = plain(rows())
    model: Any = dispatch.cpu_offload(plain, 0, devices=PLAYED)
    made = copy.deepcopy(model)
    assert made.child.known[0] is made
    assert torch.equal(made(rows()), expected)
    made.factor = 6.0
    assert torch.equal(made(rows()), expected * 2)
    assert torch.equal(model(rows()), expected)


class Fragile(nn.Module):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.lock = nn.Linear(WIDTH, WIDTH), threading.Lock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear(x)
        return found


def test_a_copy_that_fails_leaves_the_model(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(WIDTH, WIDTH), Fragile())
    expected = network(rows())
    model = dispatch.dispatch_model(network, {"0": "cpu", "1": "disk"}, 0, offload_dir=tmp_path, devices=PLAYED)
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    for one in (model, model[1]):
        with pytest.raises(TypeError, match="lock"):
            copy.deepcopy(one)
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == before
    assert torch.equal(model(rows()), expected)
    model[0].weight = nn.Parameter(torch.ones(WIDTH, WIDTH))
    with pytest.raises(InputError, match="replaced"):
        copy.deepcopy(model)


def test_copies_while_others_call(tmp_path: Path) -> None:
    model = dispatched("nested", tmp_path, "cpu", "disk")
    expected, wrong, stop = answers("nested", model), [], threading.Event()

    def call(part: str) -> None:
        inside = model.get_submodule(part)
        first = inside(rows())
        while not stop.is_set():
            if not torch.equal(inside(rows()), first):
                wrong.append(part)

    threads = [threading.Thread(target=call, args=(part,), daemon=True) for part in ("", "inner")]
    for thread in threads:
        thread.start()
    made = [copy.deepcopy(model) for _ in range(10)]
    parts = [copy.deepcopy(model.inner) for _ in range(10)]
    stop.set()
    for thread in threads:
        thread.join(20)
    assert not wrong
    assert all(same(answers("nested", each), expected) for each in made)
    assert all(torch.equal(each(rows()), parts[0](rows())) for each in parts)


def test_a_shallow_copy_is_refused(tmp_path: Path) -> None:
    model = dispatched("shuffled", tmp_path, "cpu", 0)
    whole, hook = dispatch.cpu_offload_with_hook(nn.Linear(WIDTH, WIDTH), "cpu")
    for one in (model, model.layers, model.layers[2], whole):
        with pytest.raises(InputError, match=r"copy\.deepcopy"):
            copy.copy(one)
    assert same(answers("shuffled", model), answers("shuffled", ZOO["shuffled"].build()))
    hook.remove()
    assert copy.copy(whole).weight is whole.weight


# Devices that do not mix


def test_copies_on_two_devices() -> None:
    simulate.virtual("1x1GB")  # lets PyTorch know the devices
    plain = ZOO["shuffled"].build()
    with Machine({"cuda:0": 10**6, "cuda:1": 10**6}) as box, torch.no_grad():
        homes = {f"layers.{index}": ("cpu", 0, 1)[index % 3] for index in range(6)}
        model = dispatch.dispatch_model(ZOO["shuffled"].build(), homes, devices=box.devices)
        before = {name: box.live_bytes(name) for name in box.devices}
        made = copy.deepcopy(model)
        # What stays needs no padding in a copy.
        assert all(3 * b // 2 < box.live_bytes(name) <= 2 * b for name, b in before.items())
        assert places(made) == places(model)
        for each in (made, model):
            assert torch.equal(each(rows()), plain(rows()))
        part = copy.deepcopy(made.layers[0])
        assert torch.equal(part(rows()), plain.layers[0](rows()))  # type: ignore[index, operator]
        dispatch.remove_hook_from_submodules(model)
        del model, part
        assert torch.equal(made(rows()), plain(rows()))


# Models that run by a plan


@pytest.mark.parametrize("kind", ["cpu", "disk", "two devices", "mapped"])
def test_models_that_run_by_a_plan(kind: str, make_case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("tied-llama" if kind == "cpu" else "llama")
    options = {"gpus": "2x24GB"} if kind == "two devices" else {"gpus": 0} if kind == "mapped" else {"gpus": "1x24GB"}
    plan = case.plan(**options)
    plan = streamed(spread_over_two(plan) if kind == "two devices" else plan, "disk" if kind == "mapped" else "cpu")
    plan = streamed(plan, "disk") if kind == "disk" else plan
    case.run_like(plan)
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    made: Any = copy.deepcopy(model)
    assert not set(memories(made)) & set(memories(model))
    assert made.device == model.device
    assert type(made) is not type(model) or type(made) is type(case.reference)
    assert isinstance(made, type(case.reference))
    assert made.config is not model.config
    for each in (made, model, copy.deepcopy(made)):
        assert torch.equal(case.logits(each), case.logits(case.reference))
        assert torch.equal(case.generate(each), case.generate(case.reference))
    with dispatch.measure(made) as run:
        case.generate(made)
    assert run.measurement.counters
    part = copy.deepcopy(made.model.layers[1].mlp)
    state = torch.rand(1, 3, 64)
    assert torch.equal(part(state), case.reference.model.layers[1].mlp(state))
    dispatch.remove(model)
    with pytest.warns(UserWarning, match="32 new tokens"), torch.no_grad():
        made(torch.ones(2, 32, dtype=torch.long))
    plain = dispatch.remove(made)
    assert torch.equal(case.logits(plain), case.logits(case.reference))
    assert plain.config._attn_implementation == case.reference.config._attn_implementation


@pytest.mark.parametrize("limit", [0, 10**6])
def test_experts_that_wait_one_by_one(limit: int, make_case: Any) -> None:
    case = make_case("mixtral")
    plan = experts_away(case.plan(gpus="1x24GB"), limit=limit, count=0 if limit else 2)
    case.run_like(plan)
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    made: Any = copy.deepcopy(model)
    assert not set(memories(made)) & set(memories(model))
    assert not set(movable(made)) & set(movable(model))
    assert torch.equal(case.logits(made), case.logits(case.reference))
    assert torch.equal(case.logits(model), case.logits(case.reference))
    if not limit:
        assert dispatch.cache_statistics(made) == dispatch.cache_statistics(model)
    experts = copy.deepcopy(made.model.layers[0].mlp.experts)
    expected = case.reference.model.layers[0].mlp.experts
    assert all(torch.equal(a, b) for a, b in zip(experts.parameters(), expected.parameters(), strict=True))
    for each in (made, model):
        plain: Any = dispatch.remove(each)
        assert plain.get_experts_implementation() == case.meta().get_experts_implementation()
    assert torch.equal(case.logits(made), case.logits(case.reference))


@pytest.mark.skipif(not page_cache.SUPPORTED, reason="the kernel does not bring pages on demand")
def test_experts_in_mapped_files(make_case: Any, tmp_path: Path) -> None:
    case = make_case("mixtral")
    case.reference.save_pretrained(tmp_path / "fused", save_original_format=False)
    plan = streamed(planner.plan_model(str(tmp_path / "fused"), gpus=0, **WORK), "disk", resident_slices=2)
    case.run_like(plan)
    model = dispatch.apply(str(tmp_path / "fused"), plan)
    made: Any = copy.deepcopy(model)
    assert not set(memories(made)) & set(memories(model))
    assert torch.equal(case.logits(made), case.logits(case.reference))
    dispatch.remove(model)
    assert torch.equal(case.logits(made), case.logits(case.reference))
    assert torch.equal(case.logits(dispatch.remove(made)), case.logits(case.reference))


@pytest.mark.parametrize("first", ["model", "copy"])
def test_a_copy_keeps_the_limits_and_replans_by_itself(first: str, make_case: Any, tmp_path: Path) -> None:
    case = make_case("llama")
    plan = streamed(case.plan(gpus="1x24GB"), "disk")
    options: Any = {"devices": on_cpu(plan), "offload_dir": tmp_path / "away"}
    model = dispatch.apply(case.loaded(), plan, on_exceed="replan", **options)
    made = copy.deepcopy(model)
    one, other = (model, made) if first == "model" else (made, model)
    longer = torch.randint(3, 320, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = case.reference(longer).logits
        assert torch.equal(one(longer).logits, expected)
        assert state_of(one).plan.workload.prompt_tokens == 40
        assert state_of(other).plan.workload.prompt_tokens == 13
        # What the other reads from its file is still there.
        assert torch.equal(case.logits(other), case.logits(case.reference))
        assert torch.equal(other(longer).logits, expected)
    assert state_of(other).plan.workload.prompt_tokens == 40
    strict = dispatch.apply(case.loaded(), case.plan(gpus="1x24GB"), devices=on_cpu(plan), on_exceed="refuse")
    with pytest.raises(PlanMismatchError), torch.no_grad():
        copy.deepcopy(strict)(longer)


def test_a_model_that_is_wholly_there(make_case: Any) -> None:
    case = make_case("llama")
    plan = case.plan(gpus="1x24GB")
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    made = copy.deepcopy(model)
    assert not set(memories(made)) & set(memories(model))
    assert torch.equal(case.logits(dispatch.remove(made)), case.logits(model))
    assert "__deepcopy__" not in vars(made)

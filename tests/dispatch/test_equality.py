"""The matrix: every home, cache of experts, way to generate and odd module, on the CPU and on one and two devices."""

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dispatch
import planner
import simulate
from planner import loading
from planner.errors import InputError
from planner.plan import Placement, Plan
from planner.workload import Workload
from simulate.virtual_machine import Machine
from tiny_models import Case, build_case, on_cpu, spread_over_two, streamed, with_placements, with_slots

pytestmark = pytest.mark.usefixtures("one_thread")

WHERE = ("cpu", "one", "two")
HOMES = ("resident", "pinned", "pageable", "disk", "mixed", "partial")


@functools.cache
def case_of(name: str) -> Case:
    return build_case(name, Path(tempfile.mkdtemp()) / "checkpoint")


@functools.cache
def whole_plan(name: str, gpus: str) -> Plan:
    return case_of(name).plan(gpus=gpus, num_beams=2)


def with_homes(plan: Plan, homes: str) -> Plan:
    """Return the plan with its groups in the homes of that name; mixed: each group of a layer in another."""
    kinds: dict[str, Any] = {"pinned": "pinned", "pageable": "pageable", "disk": "disk", "partial": "pinned"}
    mixed = ("resident", "pinned", "pageable", "disk")
    number = 0

    def change(p: Placement, group: Any) -> Placement:
        nonlocal number
        if not group.streamable:
            return p
        number += 1
        memory = mixed[number % 4] if homes == "mixed" else homes
        kept = None if p.resident_slices is None else number % 3 + 1 if homes in ("mixed", "partial") else 0
        if memory == "resident" or (homes == "partial" and group.slices == 1 and number % 2):
            return p
        home = "disk" if memory == "disk" else "cpu"
        return dataclasses.replace(p, home=home, memory=kinds[memory], resident_slices=kept)

    return with_placements(plan, change)


def plan_for(name: str, where: str, homes: str) -> Plan:
    plan = whole_plan(name, "2x24GB" if where == "two" else "1x24GB")
    return with_homes(spread_over_two(plan) if where == "two" else plan, homes)


class Room:
    """A dispatched model with its devices: the CPU plays them, or they are virtual."""

    def __init__(self, where: str, plan: Plan, model: Any, **options: Any) -> None:
        self.machine = None
        if where != "cpu":
            simulate.virtual("1x1GB")
            self.machine = Machine(dict.fromkeys((device.name for device in plan.hardware.gpus), 10**9))
        self.plan, self.model, self.options = plan, model, options

    def __enter__(self) -> Room:
        devices: Any = on_cpu(self.plan)
        if self.machine is not None:
            devices = self.machine.__enter__().devices
        self.model = dispatch.apply(self.model, self.plan, devices=devices, **self.options)
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.machine is not None:
            self.machine.__exit__(*exc)

    def inputs(self, value: Any) -> Any:
        return value if self.machine is None else self.machine.inputs(value, self.plan.run_on()[0])


def dispatched(name: str, where: str, plan: Plan) -> Room:
    case = case_of(name)
    case.reference.set_experts_implementation("eager")
    case.run_like(plan)
    return Room(where, plan, case.meta(), checkpoint=case.folder)


def padded(case: Case) -> dict[str, torch.Tensor]:
    """Return a batch whose second row is shorter, padded on the left."""
    ids, mask = case.ids.clone(), torch.ones_like(case.ids)
    ids[1, :5], mask[1, :5] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("homes", HOMES)
@pytest.mark.parametrize("where", WHERE)
@torch.no_grad()
def test_logits(where: str, homes: str) -> None:
    case = case_of("mixtral")
    with dispatched("mixtral", where, plan_for("mixtral", where, homes)) as room:
        want = case.reference(**padded(case)).logits
        for _ in range(2):
            assert torch.equal(room.model(**room.inputs(padded(case))).logits.cpu(), want)


@pytest.mark.parametrize("homes", HOMES)
@pytest.mark.parametrize("where", WHERE)
@torch.no_grad()
def test_the_state_and_other_values(where: str, homes: str) -> None:
    case = case_of("mixtral")
    expected = case.reference.state_dict()
    with dispatched("mixtral", where, plan_for("mixtral", where, homes)) as room:
        room.model(room.inputs(case.ids))
        found = room.model.state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[name].cpu(), tensor) for name, tensor in expected.items())
        other = case.loaded()
        other.set_experts_implementation(case.reference.get_experts_implementation())
        for number, parameter in enumerate(other.parameters()):
            parameter.mul_(-1).add_(number / 1000)
        if homes in ("disk", "mixed"):
            with pytest.raises(InputError, match="wait in files"):
                room.model.load_state_dict(other.state_dict())
            other = case.reference
        else:
            room.model.load_state_dict(other.state_dict())
            assert all(torch.equal(found[name].cpu(), tensor) for name, tensor in other.state_dict().items())
        found = room.model.state_dict()
        assert all(torch.equal(found[name].cpu(), tensor) for name, tensor in other.state_dict().items())
        assert torch.equal(room.model(room.inputs(case.ids)).logits.cpu(), other(case.ids).logits)
        plain = dispatch.remove(room.model).state_dict()
        assert all(torch.equal(plain[name].cpu(), tensor) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 24])
@torch.no_grad()
def test_any_size_of_the_cache_of_experts(count: int) -> None:
    """What is copied is what the statistics say and what passes over the link, and nothing when all fit."""
    case = case_of("mixtral")

    def change(p: Placement, group: Any) -> Placement:
        return p if group.slices == 1 else dataclasses.replace(p, home="cpu", memory="pinned", resident_slices=0)

    plan = with_slots(with_placements(whole_plan("mixtral", "1x24GB"), change), count)
    assert count == 1 or planner.verify_plan(plan) == ()
    with dispatched("mixtral", "one", plan) as room:
        assert room.machine is not None
        assert room.machine.live_bytes("cuda:0") == loading.kept_bytes(plan)["cuda:0"]
        ids = room.inputs(case.ids)
        for _ in range(3):
            room.machine.copied_bytes.clear()
            before = dispatch.cache_statistics(room.model)[0]
            assert torch.equal(room.model(ids).logits.cpu(), case.reference(case.ids).logits)
            (after,) = dispatch.cache_statistics(room.model)
            copied = after.copied_bytes - before.copied_bytes
            assert room.machine.copied_bytes.get(("cpu", "cuda:0"), 0) == copied
    assert (after.device, after.slots) == ("cuda:0", count)
    assert (copied == 0) == (count == 24)


GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "beams": {"num_beams": 2},
    "static": {"cache_implementation": "static"},
}


def answer(case: Case, model: Any, inputs: dict[str, torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(3)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    result: torch.Tensor = model.generate(**inputs, **settings)
    return result.cpu()


@pytest.mark.parametrize("way", GENERATE)
@pytest.mark.parametrize("where", WHERE)
def test_generate_of_a_padded_batch(where: str, way: str) -> None:
    case = case_of("mixtral")
    plan = plan_for("mixtral", where, "mixed")
    with dispatched("mixtral", where, plan) as room:
        want = answer(case, case.reference, padded(case), GENERATE[way])
        assert torch.equal(answer(case, room.model, room.inputs(padded(case)), GENERATE[way]), want)


# Odd modules


class Part(nn.Module):
    """A block with a buffer that all share."""

    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.norm, self.mix, self.out = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + self.out(torch.relu(self.mix(self.norm(states)))) * self.scale  # type: ignore[no-any-return]


class Odd(nn.Module):
    """Tied weights, a shared buffer, a block that is called twice, one that many rows alone reach, one never called."""

    _no_split_modules = ("Part",)

    def __init__(self) -> None:
        super().__init__()
        scale = torch.full((8,), 0.7)
        self.first, self.second, self.seldom, self.never = (Part(scale) for _ in range(4))
        self.second.out.weight = self.first.out.weight
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.first.out.weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = self.first(self.second(self.first(states)))
        if states.shape[0] > 3:
            states = self.seldom(states)
        return self.head(states)  # type: ignore[no-any-return]


@functools.cache
def odd_plan(gpus: str) -> Plan:
    work = Workload(caller="forward", new_tokens=1)
    return planner.plan_model(
        Odd().eval(), gpus=gpus, workload=work, example_inputs=(torch.zeros(2, 8),), use_cache=False
    )


def odd(where: str, homes: str, folder: Path) -> tuple[nn.Module, Room]:
    torch.manual_seed(0)
    model = Odd().eval()
    plan = odd_plan("2x24GB" if where == "two" else "1x24GB")
    plan = spread_over_two(plan) if where == "two" else plan
    plan = plan if homes == "resident" else streamed(plan, homes)
    return model, Room(where, plan, copy.deepcopy(model), offload_dir=folder / "offload")


@pytest.mark.parametrize("homes", ["resident", "cpu", "disk"])
@pytest.mark.parametrize("where", WHERE)
@torch.no_grad()
def test_odd_modules(where: str, homes: str, tmp_path: Path) -> None:
    model, there = odd(where, homes, tmp_path)
    with there as room:
        for rows in (2, 5, 5, 2, 1, 5):
            states = torch.randn(rows, 8)
            assert torch.equal(room.model(room.inputs(states)).cpu(), model(states))
        plain: Any = dispatch.remove(room.model)
        assert plain.first.out.weight is plain.second.out.weight is plain.head.weight
        assert plain.first.scale is plain.never.scale
        assert torch.equal(plain.cpu()(states), model(states))


def hooked(model: nn.Module, seen: list[str]) -> None:
    """Register hooks that look, that change arguments, and that change results."""

    def after(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        seen.append("after")
        return out * 1.5

    def before(module: nn.Module, args: Any) -> Any:
        seen.append("before")
        return (args[0] + 1, *args[1:])

    for name in ("first", "second.mix"):
        model.get_submodule(name).register_forward_pre_hook(before)
        model.get_submodule(name).register_forward_hook(after)


@pytest.mark.parametrize("when", ["before apply", "after apply"])
@pytest.mark.parametrize("where", ["cpu", "two"])
@torch.no_grad()
def test_hooks_of_the_users_own(where: str, when: str, tmp_path: Path) -> None:
    model, there = odd(where, "cpu", tmp_path)
    wanted: list[str] = []
    found: list[str] = []
    hooked(model, wanted)
    if when == "before apply":
        hooked(there.model, found)
    with there as room:
        if when == "after apply":
            hooked(room.model, found)
        states = torch.randn(5, 8)
        assert torch.equal(room.model(room.inputs(states)).cpu(), model(states))
        assert found == wanted != []
        assert torch.equal(dispatch.remove(room.model).cpu()(states), model(states))


@torch.no_grad()
def test_a_resident_parameter_that_is_replaced_is_followed(tmp_path: Path) -> None:
    model, there = odd("cpu", "cpu", tmp_path)
    with there as room:
        states, other = torch.randn(5, 8), torch.full((8,), 0.3)
        assert not room.model.first.norm.weight.is_meta
        for each in (model, room.model):
            each.first.norm.weight = nn.Parameter(other)
        assert torch.equal(room.model(states), model(states))


@pytest.mark.parametrize("path", ["self_attn.o_proj.weight", "mlp.experts.down_proj"])
def test_a_streamed_parameter_that_is_replaced_is_refused(path: str) -> None:
    case = case_of("mixtral")
    with dispatched("mixtral", "cpu", plan_for("mixtral", "cpu", "pinned")) as room:
        want = case.logits(case.reference)
        assert torch.equal(case.logits(room.model), want)
        owner, _, leaf = path.rpartition(".")
        module = room.model.model.layers[1].get_submodule(owner)
        plain: Any = case.loaded()
        plain.set_experts_implementation(case.reference.get_experts_implementation())
        for each in (module, plain.model.layers[1].get_submodule(owner)):
            setattr(each, leaf, nn.Parameter(torch.ones(getattr(each, leaf).shape)))
        for _ in range(2):
            with pytest.raises(InputError, match=rf"{leaf} was replaced .* dispatch.remove"):
                case.logits(room.model)
        assert torch.equal(case.logits(dispatch.remove(room.model)), case.logits(plain))

"""What goes wrong in a call leaves a dispatched model usable; threads wait for each other, and models do not meet."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import dispatch
import planner
from dispatch.stream import StreamedGroup
from interrupts import interrupt
from planner.plan import Plan
from tiny_models import Case, on_cpu, spread_over_two, streamed


def plan_for(case: Case, where: str) -> Plan:
    if where == "two gpus":
        return spread_over_two(streamed(case.plan(gpus="2x24GB"), "cpu"))
    return streamed(case.plan(gpus="1x24GB"), {"gpu from host": "cpu", "gpu from disk": "disk"}[where])


def applied(case: Case, where: str = "gpu from host") -> Any:
    plan = plan_for(case, where)
    case.run_like(plan)
    return dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))


class RaisedError(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "where"),
    [("llama", "gpu from host"), ("llama", "two gpus"), ("mixtral", "gpu from disk")],
)
def test_an_error_anywhere_in_a_call_leaves_the_model_usable(make_case: Any, name: str, where: str) -> None:
    """A hook of the user's own raises in every module in turn, before it and after it."""
    case = make_case(name)
    model = applied(case, where)
    want = case.logits(case.reference)

    def fails(*args: Any) -> None:
        raise kind("the user's own")

    last = f"model.layers.{len(model.model.layers) - 1}"
    # Of the last layer, and what is outside of layers.
    modules = [
        module
        for path, module in model.named_modules()
        if not path.endswith(("rotary_emb", "act_fn")) and (".layers." not in path or path.startswith(last))
    ]
    called = 0
    for number, module in enumerate(modules):
        kind = KeyboardInterrupt if number % 2 else RaisedError
        for attach in (module.register_forward_pre_hook, module.register_forward_hook):
            hook = attach(fails)
            try:
                case.logits(model)
            except kind:
                called += 1
            finally:
                hook.remove()
    assert called > len(modules)
    assert torch.equal(case.logits(model), want)
    assert torch.equal(case.generate(model), case.generate(case.reference))
    state = dispatch.remove(model).state_dict()
    assert all(torch.equal(state[key], value) for key, value in case.reference.state_dict().items())


# Python reports, and cannot raise, what interrupts a callback of the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_at_any_moment_leaves_the_model_usable(make_case: Any) -> None:
    case = make_case("llama")
    model = applied(case, "gpu from disk")
    want = case.logits(case.reference)
    interrupt(lambda: case.logits(model), times=25)
    assert torch.equal(case.logits(model), want)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(case.logits, model).result(timeout=20), want), "no lock is held"


def test_calls_of_threads_come_one_after_another(make_case: Any) -> None:
    case = make_case("llama")
    model = applied(case)
    inside, most = 0, 0
    guard = threading.Lock()

    def enters(*args: Any) -> None:
        nonlocal inside, most
        with guard:
            inside += 1
            most = max(most, inside)

    def leaves(*args: Any) -> None:
        nonlocal inside
        with guard:
            inside -= 1

    # Inside of what is serialised: the first layer's and the last's own hooks.
    model.model.layers[0].register_forward_pre_hook(enters)
    model.model.layers[-1].register_forward_hook(leaves)
    want = case.logits(case.reference)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, want) for found in pool.map(lambda _: case.logits(model), range(16)))
    assert most == 1


def test_two_models_share_a_process(make_case: Any) -> None:
    one = make_case("mixtral")
    models = [applied(one), applied(one, "gpu from disk")]
    want, tokens = one.logits(one.reference), one.generate(one.reference)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda number: one.logits(models[number % 2]), range(12)))
    assert all(torch.equal(result, want) for result in results)
    plain = dispatch.remove(models[0])
    assert torch.equal(one.generate(models[1]), tokens)
    assert torch.equal(one.logits(plain), want)


class Reading(torch.nn.Module):
    """As transformers tells the device of a model: that of its first parameter. That of `body` waits elsewhere."""

    _no_split_modules = ("Body",)

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.ModuleList([Body() for _ in range(2)])

    @property
    def device(self) -> torch.device:
        return next(parameter.device for parameter in self.parameters())

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        for layer in self.body:
            states = layer(states)
        return states


class Body(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 64, bias=False), torch.nn.Linear(64, 16, bias=False)

    @property
    def device(self) -> torch.device:
        return self.up.weight.device

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down(torch.relu(self.up(states))) + states
        return found


def test_the_device_is_where_it_runs_and_never_meta() -> None:
    model = Reading().eval().requires_grad_(False)
    states = torch.rand(2, 16)
    want = model(states)
    plan = planner.plan_model(model, gpus="1x24GB", example_inputs=(states,))
    plan = streamed(plan, "cpu")
    model = dispatch.apply(model, plan, devices=on_cpu(plan))  # type: ignore[assignment]
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.device == torch.device("cpu")
    assert all(layer.device == torch.device("cpu") for layer in model.body)
    assert isinstance(model, Reading)
    assert torch.equal(model(states), want)
    dispatch.remove(model)
    assert type(model) is Reading
    assert all(type(layer) is Body for layer in model.body)


def test_slots_that_no_hook_gave_back_are_free_in_the_next_call(make_case: Any) -> None:
    """As an interrupt leaves them that comes between a hook that acquires and the module that it is for."""
    case = make_case("llama")
    model = applied(case)
    (stream,) = model._loadplan_dispatch.streams
    for group in stream.groups[:2]:
        stream.acquire(group)
    assert torch.equal(case.logits(model), case.logits(case.reference))
    assert torch.equal(case.logits(model), case.logits(case.reference))
    for group in stream.groups:
        assert all(parameter.is_meta for parameter in model.get_submodule(group.name).parameters())


def test_an_interrupt_while_a_group_leaves(make_case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its parameters are back on meta, and after."""
    case = make_case("llama")
    model = applied(case)
    inner = StreamedGroup.leave
    for number, first in itertools.product((1, 4, 9), (False, True)):
        left = []

        def leave(group: StreamedGroup, left: list[str] = left, number: int = number, first: bool = first) -> None:
            left.append(group.name)
            if len(left) == number and first:
                raise KeyboardInterrupt
            inner(group)
            if len(left) == number:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(StreamedGroup, "leave", leave)
            with pytest.raises(KeyboardInterrupt):
                case.logits(model)
        assert torch.equal(case.logits(model), case.logits(case.reference))

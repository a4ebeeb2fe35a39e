"""Experts that the CPU computes where they wait: the bits of the plain model, and no copies in short passes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
from typing import Any

import pytest
import torch

import dispatch
import planner
from architectures import ARCHITECTURES, Architecture
from dispatch.experts import StreamedExperts
from late_ring import LateRing
from planner import execution
from planner.plan import Plan
from planner.workload import Workload
from tiny_models import experts_away, on_cpu

NAMES = ("mixtral", "qwen3-moe", "gpt-oss", "deepseek-v2", "deepseek-v3")
BATCH, TOKENS, NEW = 2, 9, 4
PREFILL = BATCH * TOKENS


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def rings(monkeypatch: pytest.MonkeyPatch) -> list[LateRing]:
    """Return the slots that `apply` makes, which deliver as late as they may."""
    made: list[LateRing] = []

    def make(*args: Any, **kwargs: Any) -> LateRing:
        made.append(LateRing(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr("dispatch.preparation.SlotRing", make)
    return made


@dataclasses.dataclass(frozen=True)
class Model:
    """A reference whose experts run by route, its inputs, and a plan with all of it on one GPU."""

    reference: Any
    inputs: dict[str, torch.Tensor]
    plan: Plan

    def routed(self) -> list[tuple[int, set[int]]]:
        """Return (tokens, experts chosen) of every call of experts while the reference answers."""
        calls: list[tuple[int, set[int]]] = []
        handles = [
            module.register_forward_pre_hook(
                lambda module, args: calls.append((args[0].shape[0], set(args[1].flatten().tolist())))
            )
            for module in execution.experts_modules(self.reference).values()
        ]
        self.answer(self.reference)
        for handle in handles:
            handle.remove()
        return calls

    def answer(self, model: Any) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = model.generate(
                **self.inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        return torch.stack(result.logits)  # type: ignore[attr-defined]


@functools.cache
def model_of(name: str, dtype: torch.dtype = torch.float32) -> Model:
    entry: Architecture = next(entry for entry in ARCHITECTURES if entry.name == name)
    torch.manual_seed(0)
    reference = entry.build(dtype, random.Random(7))
    inputs = entry.inputs(reference, BATCH, TOKENS)
    work = Workload(batch_size=BATCH, prompt_tokens=TOKENS, new_tokens=NEW)
    plan = planner.plan_model(copy.deepcopy(reference), gpus="1x24GB", workload=work, use_cache=False)
    execution.register()
    reference.set_experts_implementation(execution.ROUTED_EXPERTS)
    return Model(reference, inputs, plan)


def dispatched(model: Model, plan: Plan) -> Any:
    return dispatch.apply(copy.deepcopy(model.reference), plan, devices=on_cpu(plan))


def asked_of_slots(model: Any, rings: list[LateRing]) -> tuple[int, int]:
    """Return how many of the experts asked for were in the slots still, and how many were copied."""
    found = dispatch.cache_statistics(model)
    assert sum(ring.copies for ring in rings) == sum(each.copies for each in found)
    return sum(each.hits for each in found), sum(each.copies for each in found)


@pytest.mark.parametrize("limit", [0, 1, BATCH, PREFILL - 1, PREFILL, 1000])
@pytest.mark.parametrize("kept", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_short_calls_copy_nothing_and_long_ones_stream(name: str, kept: int, limit: int, rings: list[LateRing]) -> None:
    model = model_of(name)
    want, calls = model.answer(model.reference), model.routed()
    assert {tokens for tokens, _ in calls} == {PREFILL, BATCH}
    there = dispatched(model, experts_away(model.plan, limit=limit, kept=kept))
    assert torch.equal(model.answer(there), want)
    copied = sum(sum(expert >= kept for expert in experts) for tokens, experts in calls if tokens > limit)
    assert sum(asked_of_slots(there, rings)) == copied
    assert (copied > 0) == (limit < PREFILL)
    assert torch.equal(model.answer(there), want), "a second call must see the same weights"
    assert torch.equal(model.answer(dispatch.remove(there)), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = model_of("mixtral", dtype)
    for limit in (BATCH, 1000):
        there = dispatched(model, experts_away(model.plan, limit=limit))
        assert torch.equal(model.answer(there), model.answer(model.reference))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_slots(count: int, rings: list[LateRing]) -> None:
    model = model_of("qwen3-moe")
    there = dispatched(model, experts_away(model.plan, limit=BATCH, count=count))
    assert torch.equal(model.answer(there), model.answer(model.reference))
    assert [len(ring) for ring in rings] == [count]
    assert rings[0].most == count - 1


@pytest.mark.parametrize("limit", [BATCH, 1000])
def test_without_slots_the_cpu_computes_calls_of_any_length(limit: int, rings: list[LateRing]) -> None:
    model = model_of("mixtral")
    there = dispatched(model, experts_away(model.plan, limit=limit, count=0))
    assert rings == []
    assert torch.equal(model.answer(there), model.answer(model.reference))
    assert torch.equal(model.answer(dispatch.remove(there)), model.answer(model.reference))


def sources(model: Any) -> list[StreamedExperts]:
    return [source for _, source in model._loadplan_dispatch.has.experts]


def test_the_cpu_computes_with_the_waiting_memory_itself() -> None:
    model = model_of("mixtral")
    there = dispatched(model, experts_away(model.plan, limit=1000, kept=1))
    for source in sources(there):
        assert list(source._waiting) == list(range(1, 1 + len(source._waiting)))
        for expert, store in source._waiting.items():
            begin = store.slab.data_ptr()  # type: ignore[attr-defined]
            places = [view.data_ptr() - begin for view in source.on_host(expert).values()]
            assert all(0 <= place < store.layout.nbytes for place in places)


def test_the_device_is_given_its_experts_before_the_cpu_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("mixtral")
    there = dispatched(model, experts_away(model.plan, limit=1000, kept=2))
    asked: list[tuple[str, int]] = []
    for name in ("fetch", "on_host"):
        method = getattr(StreamedExperts, name)

        def record(self: Any, expert: int, name: str = name, method: Any = method) -> Any:
            asked.append((name, expert))
            return method(self, expert)

        monkeypatch.setattr(StreamedExperts, name, record)
    monkeypatch.setattr(StreamedExperts, "begin", lambda self, module, experts: asked.append(("begin", len(experts))))
    with torch.no_grad():
        there(**model.inputs)
    calls: list[list[tuple[str, int]]] = []
    for entry in asked:
        if entry[0] == "begin":
            calls.append([])
        calls[-1].append(entry)
    assert len(calls) == len(sources(there))
    for (_, announced), *experts in calls:
        assert [expert for _, expert in experts] == sorted(expert for _, expert in experts)
        assert [name for name, _ in experts] == ["fetch"] * announced + ["on_host"] * (len(experts) - announced)
        assert all((name == "on_host") == (expert >= 2) for name, expert in experts)


class OnHost(torch.Tensor):
    """A tensor that meets only its like, as those of the CPU do where a GPU is a GPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        assert all(isinstance(value, OnHost) for value in values if isinstance(value, torch.Tensor)), func
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("name", NAMES)
def test_host_and_device_meet_only_where_they_are_moved(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    there = dispatched(model, experts_away(model.plan, limit=1000, kept=2))
    trips = {"to host": 0, "to device": 0}

    def to_host(tensor: torch.Tensor) -> torch.Tensor:
        trips["to host"] += 1
        return tensor.as_subclass(OnHost)

    def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        assert isinstance(tensor, OnHost)
        trips["to device"] += 1
        return tensor.as_subclass(torch.Tensor)

    on_host = StreamedExperts.on_host
    monkeypatch.setattr(execution, "_to_host", to_host)
    monkeypatch.setattr(execution, "_to_device", to_device)
    monkeypatch.setattr(
        StreamedExperts,
        "on_host",
        lambda self, expert: {name: view.as_subclass(OnHost) for name, view in on_host(self, expert).items()},
    )
    calls = model.routed()
    assert torch.equal(model.answer(there), model.answer(model.reference))
    assert trips["to device"] == sum(sum(expert >= 2 for expert in experts) for _, experts in calls)
    assert trips["to host"] == 2 * len(calls), "the tokens and their order, once a layer"


def test_an_exception_in_the_cpus_part_leaves_the_model_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("mixtral")
    there = dispatched(model, experts_away(model.plan, limit=BATCH))

    def interrupt(self: Any, expert: int) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StreamedExperts, "on_host", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.answer(there)
    assert torch.equal(model.answer(there), model.answer(model.reference))


# Experts that are not equally popular


@pytest.mark.parametrize("limit", [0, BATCH, 1000])
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_the_popular_experts_stay_and_the_others_wait(name: str, limit: int, rings: list[LateRing]) -> None:
    model = model_of(name)
    want, calls = model.answer(model.reference), model.routed()
    plan = ranked(model.plan, seed=3)
    rankings = list(plan.graph.rankings().values())
    assert any(ranking[:3] != (0, 1, 2) for ranking in rankings)
    there = dispatched(model, experts_away(plan, limit=limit, kept=3))
    assert [list(source._resident) for source in sources(there)] == [sorted(ranking[:3]) for ranking in rankings]
    assert [list(source._waiting) for source in sources(there)] == [sorted(ranking[3:]) for ranking in rankings]
    assert torch.equal(model.answer(there), want)
    copied = sum(
        sum(expert not in rankings[number % len(rankings)][:3] for expert in experts)
        for number, (tokens, experts) in enumerate(calls)
        if tokens > limit
    )
    assert sum(asked_of_slots(there, rings)) == copied
    assert torch.equal(model.answer(there), want), "a second call must see the same weights"
    assert torch.equal(model.answer(dispatch.remove(there)), want)


def ranked(plan: Plan, *, seed: int) -> Plan:
    """Return the plan with experts of every layer popular in an order of its own."""
    rng = random.Random(seed)
    counts = {
        layer.name: tuple(rng.sample(range(1, 1 + group.slices), k=group.slices))
        for layer in plan.graph.layers
        for group in plan.graph.kinds[layer.kind].groups
        if group.slices > 1
    }
    popularity = planner.Popularity.of(counts)
    assert popularity is not None
    return dataclasses.replace(plan, graph=popularity.on(plan.graph))

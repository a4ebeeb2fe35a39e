"""Calls larger than planned, and memory that runs out: what is said, refused, or planned again."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tight_cases import prompt, reference, settings
from transformers import LogitsProcessor

import dispatch
import planner
import simulate
from dispatch.calls import Call
from dispatch.limits import Limits
from planner.errors import InputError, PlanMismatchError
from planner.growth import Size, grown_bytes
from planner.plan import Plan
from simulate.virtual_machine import Machine
from tiny_models import Case, on_cpu, streamed

DEVICES = {"cuda:0": torch.device("cpu")}


def half_on_disk(case: Case) -> Plan:
    whole = case.plan(gpus=0)
    return case.plan(gpus=0, max_memory={"cpu": whole.prediction.peak_bytes["cpu"] - whole.model.weight_bytes // 2})


def roomy(plan: Plan, more_bytes: int) -> Plan:
    """Return the plan as it is, on a GPU that has so much more."""
    pools = tuple(
        dataclasses.replace(pool, capacity_bytes=pool.capacity_bytes + more_bytes) if pool.name == "cuda:0" else pool
        for pool in plan.hardware.pools
    )
    return dataclasses.replace(plan, hardware=dataclasses.replace(plan.hardware, pools=pools))


def forward(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits
    return result


@pytest.mark.usefixtures("one_thread")
def test_memory_that_runs_out_is_set_beside_the_plan() -> None:
    plan = roomy(settings("llama")[1].plan, 10**8)
    simulate.virtual("1x1GB")
    with Machine({"cuda:0": plan.prediction.counters["cuda:0"]["tensors"] + 1000}) as machine:  # type: ignore[union-attr]
        model = dispatch.apply(reference("llama", None), plan, devices=machine.devices)
        ids = machine.inputs(prompt())
        want = forward(model, ids).cpu()
        with (
            pytest.raises(torch.OutOfMemoryError) as caught,
            pytest.warns(UserWarning, match="may run out"),
            torch.no_grad(),
        ):
            model(ids.repeat(16, 2)[:, :14])
        told = str(caught.value)
        assert caught.type is torch.OutOfMemoryError
        for words in (
            "cuda:0 ran out of memory in a call of 32 rows, 14 new tokens", "was predicted to hold", "in this call",
            "The plan is for 2 rows, 9 new tokens", "batch_size=32", "What was raised: cuda:0 is out of memory",
        ):  # fmt: skip
            assert words in told, words
        del caught
        assert torch.equal(forward(model, ids).cpu(), want), "usable afterwards"


@pytest.mark.usefixtures("one_thread")
def test_a_planned_call_that_runs_out_is_said_to_be_one() -> None:
    plan = settings("llama")[1].plan
    simulate.virtual("1x1GB")
    with Machine({"cuda:0": plan.prediction.counters["cuda:0"]["tensors"] * 95 // 100}) as machine:  # type: ignore[union-attr]
        model = dispatch.apply(reference("llama", None), plan, devices=machine.devices)
        with pytest.raises(torch.OutOfMemoryError, match=r"no larger than planned.*dispatch\.measure"):
            forward(model, machine.inputs(prompt()))


def test_a_gpu_is_known_by_its_number() -> None:
    plan = settings("llama")[4].plan
    limits = Limits(plan, {"cuda:0": torch.device("cuda:3"), "cuda:1": torch.device("cuda:1")}, "warn")
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU {} has a total capacity of 79.19 GiB"
    assert limits._short_of(text.format(3)) == ["cuda:0"]
    assert limits._short_of(text.format(1)) == ["cuda:1"]
    assert limits._short_of("there is no more") == ["cuda:0", "cuda:1"]
    assert limits._short_of("cuda:1 is out of memory") == ["cuda:1"]


def test_what_fits_is_warned_of_once_and_what_cannot_is_refused() -> None:
    plan = roomy(settings("llama")[1].plan, 10**6)
    room = plan.hardware.pool("cuda:0").usable_bytes
    limits = Limits(plan, DEVICES, "warn")
    assert not limits.begin(Call(2, 9, 0))
    assert not limits.begin(Call(2, 1, 10))
    fitting = next(
        rows for rows in range(2, 10**4)
        if grown_bytes(plan, Size(rows=rows + 1, tokens=9, context_tokens=9))["cuda:0"] > room
    )  # fmt: skip
    assert fitting > 2
    with pytest.warns(UserWarning, match=f"{fitting} rows, 9 new tokens.*cuda:0 would hold .* which fits"):
        assert not limits.begin(Call(fitting, 9, 0))
    assert not limits.begin(Call(fitting, 9, 0))
    with pytest.raises(PlanMismatchError, match=r"cuda:0 would hold .* too much.*batch_size="):
        limits.begin(Call(fitting + 1, 9, 0))
    with pytest.raises(PlanMismatchError, match="the plan is for 2 rows, 9 new tokens"):
        Limits(plan, DEVICES, "refuse").begin(Call(2, 10, 0))
    with pytest.raises(InputError, match="warn, refuse, replan"):
        Limits(plan, DEVICES, "ignore")  # type: ignore[arg-type]


def test_a_context_that_grows_is_refused_at_the_token_that_does_not_fit() -> None:
    plan = settings("llama")[1].plan
    size = Size.of(plan)
    at = grown_bytes(plan, dataclasses.replace(size, context_tokens=700))["cuda:0"]
    plan = roomy(plan, at - plan.hardware.pool("cuda:0").usable_bytes)
    limits = Limits(plan, DEVICES, "warn")
    with pytest.warns(UserWarning, match="may run out"):
        limits.begin(Call(2, 1, size.context_tokens))
    for past in range(size.context_tokens, 700):
        limits.begin(Call(2, 1, past))
    with pytest.raises(PlanMismatchError, match="701 tokens of context"):
        limits.begin(Call(2, 1, 700))


def test_a_resident_model_has_no_hook_unless_it_is_asked_for(make_case: Any) -> None:
    case = make_case("llama")
    model = dispatch.apply(case.meta(), case.plan(gpus=0), checkpoint=case.folder)
    assert "forward" not in vars(model)
    dispatch.remove(model)
    model = dispatch.apply(case.meta(), case.plan(gpus=0), checkpoint=case.folder, on_exceed="refuse")
    case.logits(model)
    with pytest.raises(PlanMismatchError, match="3 rows"):
        forward(model, torch.ones(3, 13, dtype=torch.long))
    assert "forward" not in vars(dispatch.remove(model))


@pytest.mark.parametrize("given", ["meta", "loaded"])
def test_a_larger_call_is_planned_again(make_case: Any, tmp_path: Path, given: str) -> None:
    case = make_case("llama")
    plan = half_on_disk(case)
    ids = torch.randint(3, 320, (3, 40))
    want = forward(case.reference, ids)
    source = {"meta": {"checkpoint": case.folder}, "loaded": {"offload_dir": tmp_path / "offload"}}[given]
    model = getattr(case, given)()
    model = dispatch.apply(model, plan, on_exceed="replan", **source)
    case.logits(model)
    assert torch.equal(forward(model, ids), want)
    state = model._loadplan_dispatch
    assert (state.plan.workload.batch_size, state.plan.workload.prompt_tokens) == (3, 40)
    assert planner.verify_plan(state.plan) == ()
    assert any(placement.home == "disk" for placement in state.plan.placements)
    if given == "meta":
        assert state.weights.on_meta, "weights came from the checkpoint again"
    assert torch.equal(forward(model, ids), want)
    assert torch.equal(case.logits(model), case.logits(case.reference))
    assert state is model._loadplan_dispatch
    assert torch.equal(forward(dispatch.remove(model), ids), want)


def test_what_cannot_be_planned_again_leaves_the_model_as_it_was(
    make_case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case("llama")
    plan = streamed(case.plan(gpus="1x24GB"), "cpu")
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan), on_exceed="replan")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "planner.api", None)
        with pytest.raises(InputError, match="needs what plans"):
            forward(model, torch.ones(3, 40, dtype=torch.long))
    want = case.logits(case.reference)
    assert torch.equal(case.logits(model), want)
    monkeypatch.setattr("dispatch.replan.Size.holds", lambda self, other: False)
    with pytest.raises(InputError, match="in chunks"):
        forward(model, torch.ones(3, 40, dtype=torch.long))


# Memory that runs out in generate


class Hungry(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
    """Runs out of memory in what generate does after so many calls of the model."""

    def __init__(self, calls: int):
        self.calls = calls

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls -= 1
        if self.calls == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. GPU 0 has a total capacity of 7 bytes")
        return scores


def generate(case: Case, model: Any, **options: Any) -> torch.Tensor:
    mask = torch.ones_like(case.ids)
    result: torch.Tensor = model.generate(
        case.ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **options
    )
    return result


@pytest.mark.parametrize(("calls", "said"), [(1, "13 new tokens in each and 13"), (3, "1 new tokens in each and 15")])
def test_memory_that_runs_out_between_calls_is_explained(make_case: Any, calls: int, said: str) -> None:
    case = make_case("llama")
    plan = streamed(case.plan(gpus="1x24GB"), "cpu")
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    with pytest.raises(
        torch.OutOfMemoryError,
        match=rf"^cuda:0 .*ran out of memory in generate, after a call of 2 rows, {said}.*What was raised: CUDA out",
    ) as caught:
        generate(case, model, logits_processor=[Hungry(calls)])
    assert str(caught.value).count("ran out of memory") == 1
    assert torch.equal(generate(case, model), generate(case, case.reference))
    plain = dispatch.remove(model)
    assert "generate" not in vars(plain)
    assert torch.equal(generate(case, plain), generate(case, case.reference))


def test_memory_that_runs_out_in_a_call_is_explained_once(make_case: Any) -> None:
    case = make_case("llama")
    plan = streamed(case.plan(gpus="1x24GB"), "cpu")
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))

    def fails(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. GPU 0 has 7 bytes")

    model.model.layers[1].register_forward_hook(fails)
    with pytest.raises(torch.OutOfMemoryError, match="ran out of memory in a call of 2 rows") as caught:
        generate(case, model)
    assert str(caught.value).count("ran out of memory") == 1


def test_a_generate_of_the_users_own_is_kept(make_case: Any) -> None:
    case = make_case("llama")
    plan = streamed(case.plan(gpus="1x24GB"), "cpu")
    model = case.meta()
    model.generate = own = lambda *args, **kwargs: "own"
    model = dispatch.apply(model, plan, checkpoint=case.folder, devices=on_cpu(plan))
    assert model.generate() == "own"
    assert dispatch.remove(model).generate is own


def test_after_planning_again_the_new_plan_explains(make_case: Any) -> None:
    case = make_case("llama")
    model = dispatch.apply(case.meta(), half_on_disk(case), checkpoint=case.folder, on_exceed="replan")
    case.ids = torch.randint(3, 320, (3, 40))
    with pytest.raises(torch.OutOfMemoryError, match=r"no larger than planned"):
        generate(case, model, logits_processor=[Hungry(1)])
    assert torch.equal(generate(case, model), generate(case, case.reference))

"""What `dispatch.measure` records while the user's code runs, and what a plan's check makes of it."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tight_cases import generate as generate_tight
from tight_cases import prompt, reference, settings

import dispatch
import planner
import simulate
from dispatch.measure import layer_of
from planner.errors import InputError, PlanFormatError
from planner.measurement import Measurement, PhaseTimes
from tiny_models import Case, on_cpu, streamed

BYTES_OF_INPUTS = 2 * prompt().numel() * 8


def half_on_disk(case: Case) -> planner.Plan:
    whole = case.plan(gpus=0)
    return case.plan(gpus=0, max_memory={"cpu": whole.prediction.peak_bytes["cpu"] - whole.model.weight_bytes // 2})


def test_bytes_of_operators_are_the_predicted_ones(make_case: Any) -> None:
    for name, dtype in (("llama", torch.float32), ("mixtral", torch.bfloat16)):
        case = make_case(name, dtype)
        for plan in (case.plan(gpus=0), half_on_disk(case) if name == "llama" else case.plan(gpus=0)):
            model = dispatch.apply(case.meta(), plan, checkpoint=case.folder)
            with dispatch.measure(model) as run:
                case.generate(model)
            found = run.measurement
            assert plan.prediction is not None
            # The mask is made by `case.generate`, at the very first.
            assert found.counters["cpu"]["operator_outputs"] - plan.prediction.counters["cpu"]["operator_outputs"] in (
                0, case.ids.numel() * 8,
            )  # fmt: skip
            assert (found.rows, found.prompt_tokens, found.context_tokens) == (2, 13, 18)
            assert found.prefill is not None
            assert found.decode is not None
            assert (found.prefill.passes, found.decode.passes) == (1, 5)
            assert 0 < found.decode.least_ns <= found.decode.median_ns <= found.decode.most_ns
            assert found.prefill.mean_ns + 5 * found.decode.mean_ns <= found.total_ns
            assert plan.check(found).holds


def test_measuring_leaves_nothing_behind(make_case: Any) -> None:
    case = make_case("mixtral")
    model = case.loaded()
    before = [(path, sorted(vars(module))) for path, module in model.named_modules()]
    run = dispatch.measure(model)

    def fails() -> None:
        with run:
            case.logits(model)
            model.layers_that_are_not_there()

    with pytest.raises(AttributeError):
        fails()
    assert run.measurement.prefill is not None
    assert [(path, sorted(vars(module))) for path, module in model.named_modules()] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(InputError, match="takes the model"):
        dispatch.measure(lambda: case.logits(model))  # type: ignore[arg-type]


def test_phases_are_told_apart_by_a_clock_of_ones_own(make_case: Any) -> None:
    """Every reading is one tick later, so each call takes one."""
    case = make_case("llama")
    model = case.loaded()
    ticks = itertools.count()
    mask = torch.ones_like(case.ids)
    with dispatch.measure(model, memory=False, clock=lambda: next(ticks)) as run:
        for _ in range(2):
            model.generate(
                case.ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0, prefill_chunk_size=5
            )
        with pytest.raises(IndexError), torch.no_grad():
            model(torch.full((1, 4), 10**6))
    found = run.measurement
    assert found.counters == {}
    assert not found.metered
    assert found.prefill is not None
    assert found.decode is not None
    # Three chunks of 5, 5 and 3 tokens are one prefill; the call that failed began one reading, and counts in nothing.
    assert (found.prefill.passes, found.prefill.median_ns, found.prompt_tokens) == (2, 3, 13)
    assert (found.decode.passes, found.decode.median_ns) == (6, 1)
    assert found.total_ns == 2 * (2 * 6) + 1 + 1


def test_a_plain_module_has_passes_and_no_steps() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
    with torch.no_grad(), dispatch.measure(model) as run:
        model(torch.ones(3, 4))
        model(torch.ones(3, 4))
    assert run.measurement.prefill is not None
    assert run.measurement.prefill.passes == 2
    assert run.measurement.decode is None
    # The caller's ones beside both layers' outputs, 3 x 4, 3 x 8 and 3 x 4 of 4 bytes.
    assert run.measurement.counters["cpu"]["operator_outputs"] == 3 * (4 + 8 + 4) * 4
    with pytest.raises(InputError, match="no routing"):
        run.measurement.popularity()


@pytest.mark.parametrize("dispatched", [False, True])
def test_routing_is_counted_and_given_to_the_next_plan(make_case: Any, tmp_path: Path, dispatched: bool) -> None:
    """The oracle is the router's own choice, read where it is made."""
    case = make_case("mixtral")
    model = case.loaded()
    plan = streamed(case.plan(gpus="1x24GB"), "cpu")
    if dispatched:
        model = dispatch.apply(model, plan, devices=on_cpu(plan))
    wanted = torch.zeros(3, 8, dtype=torch.long)

    def chosen(at: int) -> Any:
        def hook(module: Any, args: Any, out: Any) -> None:
            wanted[at] += torch.bincount(out[2].flatten(), minlength=8)

        return hook

    hooks = [layer.mlp.gate.register_forward_hook(chosen(at)) for at, layer in enumerate(model.model.layers)]
    with dispatch.measure(model, memory=False) as run:
        case.generate(model)
    for hook in hooks:
        hook.remove()
    names = [f"model.layers.{at}" for at in range(3)]
    assert run.measurement.routed == {name: tuple(row.tolist()) for name, row in zip(names, wanted, strict=True)}
    assert sum(run.measurement.routed[names[0]]) == 2 * 2 * (13 + 5)

    run.measurement.popularity().save(tmp_path / "counts.json")
    again = case.plan(gpus="1x24GB", popularity=str(tmp_path / "counts.json"))
    for layer, counts in run.measurement.routed.items():
        ranking = again.graph.rankings().get(layer, tuple(range(8)))
        assert list(ranking) == sorted(range(8), key=lambda expert: (-counts[expert], expert))
    with dispatch.measure(model, memory=False, routing=False) as run:
        case.logits(model)
    assert run.measurement.routed == {}


def test_layers_are_named_by_their_number() -> None:
    assert layer_of("model.layers.3.mlp.experts") == "model.layers.3"
    assert layer_of("moe.experts") == "moe.experts"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("index", [1, 4])
def test_on_virtual_devices_bytes_are_exact_and_time_is_the_machines(index: int) -> None:
    setting = settings("llama")[index]
    plan = setting.plan
    with simulate.virtual(plan.hardware) as machine:
        model = dispatch.apply(reference("llama", None), plan, devices=machine.devices)
        ids = machine.inputs(prompt(), plan.run_on()[0])
        with dispatch.measure(model, meter=machine, clock=machine.synchronize) as run:
            generate_tight(model, ids)
    found, predicted = run.measurement, plan.prediction
    assert predicted is not None
    assert not found.metered
    first = plan.run_on()[0]
    for name in set(plan.run_on()) - {"cpu"}:
        inputs = BYTES_OF_INPUTS if name == first else 0
        assert found.counters[name]["tensors"] == predicted.counters[name]["tensors"] + inputs
    assert found.decode is not None
    assert 0.5 < found.decode.median_ns / predicted.decode_ns_per_token < 2
    check = plan.check(found)
    assert check.holds
    worse = dataclasses.replace(found, counters={first: {"tensors": found.counters[first]["tensors"] + 1}})
    assert not plan.check(worse).holds


def test_a_measurement_is_saved_and_read_back(tmp_path: Path) -> None:
    times = PhaseTimes.of([5, 3, 10])
    assert times == PhaseTimes(passes=3, median_ns=5, mean_ns=6, least_ns=3, most_ns=10)
    found = Measurement(
        model="M", counters={"cpu": {"operator_outputs": 5}}, prefill=times, decode=None, total_ns=20, metered=False,
        rows=1, prompt_tokens=2, context_tokens=3, routed={"layers.0": (1, 0, 4)},
    )  # fmt: skip
    found.save(tmp_path / "run.json")
    assert Measurement.load(tmp_path / "run.json") == found
    text = found.to_json()
    for wrong in ("{", "[]", text.replace('"schema_version": 1', '"schema_version": 9'), text.replace('"rows"', '"r"')):
        with pytest.raises(PlanFormatError):
            Measurement.from_json(wrong)
    with pytest.raises(InputError, match="cannot read"):
        Measurement.load(tmp_path / "none.json")

"""Twelve tiny models on six tight machines each: planned, dispatched, and run on virtual devices in predicted bytes."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
import torch
from tight_cases import CONFIGS, SETTINGS, generate, plain, prompt, reference, resident, settings
from transformers.utils import logging

import dispatch
import simulate
from planner import loading, memory
from planner.plan import Plan
from planner.units import GB
from simulate.virtual_machine import Machine

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    simulate.virtual("1x1GB")  # lets PyTorch know the devices


def predicted(plan: Plan) -> dict[str, int]:
    """Return the bytes of tensors on each GPU, with the caller's ids and mask on the first device."""
    made, kept = memory.operator_outputs(plan.graph, plan.placements), loading.kept_bytes(plan)
    found = {device.name: kept.get(device.name, 0) + made.get(device.name, 0) for device in plan.hardware.gpus}
    if plan.prediction is not None:
        assert all(plan.prediction.counters[name]["tensors"] == found[name] for name in plan.run_on())
    found[plan.run_on()[0]] += 2 * prompt().numel() * 8
    return found


def run(
    name: str, plan: Plan, capacities: Mapping[str, int]
) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, int]]:
    """Return (tokens, logits) and each device's peak."""
    with Machine(capacities) as box:
        model = dispatch.apply(reference(name, None), plan, devices=box.devices)
        out = generate(model, box.inputs(prompt(), plan.run_on()[0]))
        return out, {name: box.peak_bytes(name) for name in box.devices}


@pytest.mark.parametrize("index", range(len(SETTINGS)))
@pytest.mark.parametrize("name", CONFIGS)
def test_a_plan_takes_its_bytes_and_no_fewer(name: str, index: int) -> None:
    setting = settings(name)[index]
    wanted = predicted(setting.plan)
    inputs = 2 * prompt().numel() * 8
    assert all(nbytes <= setting.room_bytes + inputs for nbytes in wanted.values())
    found, peaks = run(name, setting.plan, wanted)
    assert peaks == wanted
    tokens, logits = plain(name, setting.plan.execution.experts)
    assert torch.equal(found[0], tokens)
    assert torch.equal(found[1], logits)
    fullest = max(wanted, key=lambda device: wanted[device])
    with pytest.raises(torch.OutOfMemoryError, match=fullest):
        run(name, setting.plan, {**wanted, fullest: wanted[fullest] * 99 // 100})


# Bloom brings its mask to the device of its second layer and keeps it, and where there is one device no operator tells.
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "bloom"])
def test_layers_may_run_anywhere(name: str) -> None:
    draw = random.Random(name)
    plan = resident(name, lambda layer: draw.randrange(3))
    found, peaks = run(name, plan, dict.fromkeys((device.name for device in plan.hardware.gpus), GB))
    assert peaks == predicted(plan)
    tokens, logits = plain(name, plan.execution.experts)
    assert torch.equal(found[0], tokens)
    # A slice that was copied lies otherwise, and is multiplied by another kernel.
    assert torch.allclose(found[1], logits, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_what_is_brought_to_another_device_between_layers_is_counted(name: str) -> None:
    """The embeddings of positions are added where those of tokens are, which is the most that is held there."""
    plan = resident(name, lambda layer: min(layer, 1))
    _, peaks = run(name, plan, dict.fromkeys((device.name for device in plan.hardware.gpus), GB))
    assert peaks == predicted(plan)
    hidden = prompt().numel() * 64 * 4
    assert memory.operator_outputs(plan.graph, plan.placements)["cuda:0"] > 3 * hidden


def test_the_machines_are_tight_and_of_both_kinds() -> None:
    """Weights wait, layers are spread, and both at once."""
    plans = [setting.plan for name in CONFIGS for setting in settings(name)]
    waits = [any(p.home != p.run_on for p in plan.placements) for plan in plans]
    spread = [len(set(plan.run_on())) > 1 for plan in plans]
    assert sum(waits) >= len(plans) // 2
    assert sum(spread) >= len(plans) // 4
    assert any(one and other for one, other in zip(waits, spread, strict=True))

"""Twelve tiny models on six tight machines each: planned, dispatched, and run on virtual devices in predicted bytes."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from tight_cases import CONFIGS, SETTINGS, Setting, generate, plain, prompt, reference, settings
from transformers.utils import logging

import dispatch
import simulate
from planner.plan import Plan
from simulate.virtual_machine import Machine

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    simulate.virtual("1x1GB")  # lets PyTorch know the devices


def predicted(plan: Plan) -> dict[str, int]:
    """Return the bytes of tensors on each GPU, with the caller's ids and mask on the first device."""
    assert plan.prediction is not None
    found = {device.name: 0 for device in plan.hardware.gpus}
    found |= {name: plan.prediction.counters[name]["tensors"] for name in plan.run_on()}
    found[plan.run_on()[0]] += 2 * prompt().numel() * 8
    return found


def run(setting: Setting, capacities: Mapping[str, int]) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, int]]:
    """Return (tokens, logits) and each device's peak."""
    with Machine(capacities) as box:
        model = dispatch.apply(reference(setting.name, None), setting.plan, devices=box.devices)
        out = generate(model, box.inputs(prompt(), setting.plan.run_on()[0]))
        return out, {name: box.peak_bytes(name) for name in box.devices}


@pytest.mark.parametrize("index", range(len(SETTINGS)))
@pytest.mark.parametrize("name", CONFIGS)
def test_a_plan_takes_its_bytes_and_no_fewer(name: str, index: int) -> None:
    setting = settings(name)[index]
    wanted = predicted(setting.plan)
    inputs = 2 * prompt().numel() * 8
    assert all(nbytes <= setting.room_bytes + inputs for nbytes in wanted.values())
    found, peaks = run(setting, wanted)
    assert peaks == wanted
    tokens, logits = plain(name, setting.plan.execution.experts)
    assert torch.equal(found[0], tokens)
    assert torch.equal(found[1], logits)
    fullest = max(wanted, key=lambda device: wanted[device])
    with pytest.raises(torch.OutOfMemoryError, match=fullest):
        run(setting, {**wanted, fullest: wanted[fullest] * 99 // 100})


def test_the_machines_are_tight_and_of_both_kinds() -> None:
    """Weights wait, layers are spread, and both at once."""
    plans = [setting.plan for name in CONFIGS for setting in settings(name)]
    waits = [any(p.home != p.run_on for p in plan.placements) for plan in plans]
    spread = [len(set(plan.run_on())) > 1 for plan in plans]
    assert sum(waits) >= len(plans) // 2
    assert sum(spread) >= len(plans) // 4
    assert any(one and other for one, other in zip(waits, spread, strict=True))

"""Predicted peaks of loading against what `dispatch.apply` really holds. A GPU is played by the meta device: the same
code as for CUDA but for pinning and streams, and a memory of its own that is counted apart.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from load_meter import live_everywhere

import dispatch
from planner import loading
from planner.plan import Plan
from tiny_models import WORK, Case, streamed

BF16, F32 = torch.bfloat16, torch.float32


def plan_of(case: Case, **options: Any) -> Plan:
    """Return the plan for a checkpoint's folder: its headers are read."""
    dtype = str(case.dtype).removeprefix("torch.")
    return planner.plan_model(str(case.folder), weight_dtype=dtype, use_cache=False, **WORK, **options)


def half_on_disk(case: Case) -> Plan:
    whole = plan_of(case, gpus=0)
    assert whole.prediction is not None
    cap = whole.prediction.peak_bytes["cpu"] - whole.model.weight_bytes // 2
    plan = plan_of(case, gpus=0, max_memory={"cpu": cap})
    assert any(p.home == "disk" for p in plan.placements)
    return plan


def make_plan(case: Case, mode: str) -> Plan:
    if mode == "cpu":
        return plan_of(case, gpus=0)
    if mode == "disk":
        return half_on_disk(case)
    one = plan_of(case, gpus="1x24GB")
    return one if mode == "gpu" else streamed(one, {"from host": "cpu", "from disk": "disk"}[mode])


def as_meta(plan: Plan) -> dict[str, str]:
    return {device.name: "meta" for device in plan.hardware.gpus}


def requested(plan: Plan) -> dict[str, int]:
    """Return the predicted bytes of "cpu" and "meta" as the program asks for them: nothing rounded, no context."""
    plain = [
        dataclasses.replace(device, kind="cpu", context_bytes=0, workspace_bytes=0) for device in plan.hardware.devices
    ]
    exact = dataclasses.replace(plan, hardware=dataclasses.replace(plan.hardware, devices=tuple(plain)))
    peaks = {name: usage.total for name, usage in loading.load_peak(exact).items()}
    return {"cpu": peaks["cpu"], "meta": sum(nbytes for name, nbytes in peaks.items() if name != "cpu")}


def held(model: Any, plan: Plan, *, loaded: bool = False, **options: Any) -> dict[str, int]:
    """Return the most bytes that `apply` held at once on the host and on the pretended GPUs."""
    with live_everywhere(model if loaded else None) as counts:
        dispatch.apply(model, plan, devices=as_meta(plan), **options)
    return {"cpu": counts.peak.get("cpu", 0), "meta": counts.peak.get("meta", 0)}


MODES = ["cpu", "gpu", "from host", "from disk", "disk"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "tied-llama", "mixtral", "qwen3-moe", "gpt2"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_same_dtype(make_case: Any, name: str, mode: str, dtype: torch.dtype) -> None:
    case = make_case(name, dtype)
    plan = make_plan(case, mode)
    assert held(case.meta(), plan, checkpoint=case.folder) == requested(plan)

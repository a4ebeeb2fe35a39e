"""Counters of a real GPU in a measurement, and memory of a real GPU that runs out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dispatch
import planner
from tiny_models import build_case


def test_counters_are_the_allocators_and_within_what_is_predicted(tmp_path: Path) -> None:
    case = build_case("llama", tmp_path, torch.bfloat16)
    plan = case.plan(hardware=planner.Hardware.local())
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder)
    case.ids = case.ids.to("cuda:0")
    with dispatch.measure(model) as run:
        case.generate(model)
    found = run.measurement
    assert not found.metered
    assert found.counters["cuda:0"]["reserved"] == torch.cuda.max_memory_reserved(0)
    assert found.counters["cuda:0"]["device_used"] >= found.counters["cuda:0"]["reserved"]
    assert found.decode is not None
    assert found.decode.passes == 5
    assert plan.prediction is not None
    assert found.counters["cuda:0"]["reserved"] <= plan.prediction.counters["cuda:0"]["reserved"]


def test_memory_that_runs_out_is_set_beside_the_plan(tmp_path: Path) -> None:
    case = build_case("llama", tmp_path, torch.bfloat16)
    plan = case.plan(hardware=planner.Hardware.local())
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, on_exceed="warn")
    held = torch.cuda.mem_get_info(0)[0] - 2**28
    taken = torch.empty(held, dtype=torch.uint8, device="cuda:0")
    ids = torch.ones(4000, 400, dtype=torch.long, device="cuda:0")
    with (
        pytest.raises(torch.OutOfMemoryError, match=r"cuda:0 ran out of memory in a call of 4000 rows.*torch holds"),
        pytest.warns(UserWarning, match="may run out"),
        torch.no_grad(),
    ):
        model(ids)
    del taken

"""The flow of the benchmark for GPUs, with a small model and the CPU in a GPU's place: all but CUDA itself."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")

import offload_cuda
from offload_cuda import Card, Run
from planner.memory import waiting_slices, with_groups
from planner.plan import Plan

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = argparse.Namespace(gpus="1x24GB", ram="64GB", cap=None, batches="1", pretend=True)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    for name, less in {"POOL": 2**18, "PROMPT_TOKENS": 16, "NEW_TOKENS": 3, "FEWER_TOKENS": 2, "RUNS": 1}.items():
        monkeypatch.setattr(offload_cuda, name, less)
    offload_cuda.make_plans(tmp_path, ["small-llama"], OPTIONS)
    return Plan.load(tmp_path / "small-llama-1.json")


def test_every_row_is_there_without_what_plans(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ortools", "pandas", "plotly", "planner.placement", "planner.search"):
        monkeypatch.setitem(sys.modules, name, None)
    prefill, decode = offload_cuda.rows(tmp_path, ["small-llama"], OPTIONS)
    assert (prefill["phase"], decode["phase"]) == ("prefill", "decode")
    groups = sum(p.nbytes for p, group in with_groups(plan.graph, plan.placements) if waiting_slices(p, group))
    for row in (prefill, decode):
        assert row["outputs_equal"] is row["accelerate_outputs_equal"] is row["ours_equal_accelerate"] is True
        assert row["failures"] == {}
        assert min(row[key] for key in ("ours_s", "accelerate_s", "resident_s", "predicted_s")) > 0
        assert row["predicted_peak_bytes"] == plan.prediction.peak_bytes["cuda:0"]  # type: ignore[union-attr]
        assert row["copied_bytes"] == groups > 0, "each group that waits, once a pass"
        assert row["limit_s"] == groups / row["link_bytes_per_s"]


def test_other_weights_are_found_out(plan: Plan) -> None:
    def run(engine: Any) -> Run:
        return offload_cuda.attempt(engine, "small-llama", plan, Card(pretended=True))

    want = run(offload_cuda.ours)
    with pytest.MonkeyPatch.context() as patch:
        into = offload_cuda.Drawn.into
        patch.setattr(
            offload_cuda.Drawn, "into",
            lambda self, name, where, **how: into(self, name.replace("layers.7", "layers.6"), where, **how),
        )  # fmt: skip
        assert offload_cuda.same(want, run(offload_cuda.resident)) is False


def test_what_does_not_run_is_said(plan: Plan) -> None:
    def fails(*args: Any) -> Run:
        raise torch.OutOfMemoryError("no memory")

    run = offload_cuda.attempt(fails, "small-llama", plan, Card(pretended=True))
    assert "no memory" in str(run.failure)
    assert offload_cuda.same(run, run) is None

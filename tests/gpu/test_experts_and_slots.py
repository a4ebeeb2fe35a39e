"""Experts on the CPU, any number of slots and pageable homes, with a GPU that is one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import dispatch
from planner.plan import Plan
from tiny_models import Case, build_case, experts_away, streamed


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return build_case("mixtral", tmp_path / "checkpoint")


def steps(case: Case, plan: Plan) -> list[torch.Tensor]:
    """Return the logits of a prefill and of three steps after it, run as the plan says; the tokens are given."""
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder)
    cache: Any = None
    found = []
    with torch.no_grad():
        for ids in (case.ids, case.ids[:, :1], case.ids[:, 1:2], case.ids[:, 2:3]):
            out = model(ids.to("cuda:0"), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits.cpu())
    return found


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_cpu_computes_what_the_gpu_would(case: Case, count: int) -> None:
    plan = case.plan(gpus="1x24GB")
    want = steps(case, experts_away(plan, limit=0))
    found = steps(case, experts_away(plan, limit=case.ids.shape[0] if count else 1000, count=count))
    for there, here in zip(want, found, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("home", ["cpu", "disk"])
@pytest.mark.parametrize("memory", ["pinned", "pageable"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_slots_and_pinning_do_not_change_the_bits(case: Case, count: int, memory: Any, home: str) -> None:
    plan = streamed(case.plan(gpus="1x24GB"), home)
    want = steps(case, plan)
    placements = tuple(
        dataclasses.replace(p, memory=memory) if p.home == "cpu" != p.run_on else p for p in plan.placements
    )
    slots = tuple(dataclasses.replace(entry, count=count) for entry in plan.slots)
    found = steps(case, dataclasses.replace(plan, placements=placements, slots=slots))
    assert all(torch.equal(there, here) for there, here in zip(want, found, strict=True))


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_the_state_of_experts_some_of_which_are_on_the_gpu(case: Case, home: str, tmp_path: Path) -> None:
    model: Any = dispatch.apply(case.meta(), streamed(case.plan(gpus="1x24GB"), home), checkpoint=case.folder)
    expected = case.reference.state_dict()
    assert all(torch.equal(tensor.cpu(), expected[name]) for name, tensor in model.state_dict().items())
    for name, each in (("plain", case.reference), ("dispatched", model)):
        each.save_pretrained(tmp_path / name, max_shard_size="200KB")
    saved = [path.name for path in (tmp_path / "plain").glob("model*")]
    assert len(saved) > 4
    assert all((tmp_path / "plain" / n).read_bytes() == (tmp_path / "dispatched" / n).read_bytes() for n in saved)
    if home == "cpu":
        other = {name: tensor.flip(0) for name, tensor in expected.items()}
        model.load_state_dict(other)
        assert all(torch.equal(tensor.cpu(), other[name]) for name, tensor in model.state_dict().items())

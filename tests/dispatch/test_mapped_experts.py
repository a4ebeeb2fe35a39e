"""Experts that the CPU computes straight from a mapped file: the same bits, and nothing read but what was routed to."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dispatch
import planner
from dispatch import page_cache, readahead
from dispatch.experts import MappedExperts
from planner.errors import InputError
from planner.plan import Plan
from tiny_models import WORK, Case, build_case, streamed

KEPT = 2
pytestmark = pytest.mark.skipif(not page_cache.SUPPORTED, reason="the kernel does not bring pages on demand")


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A tiny Mixtral whose checkpoint holds all experts of a layer in one tensor, as they are computed with."""
    case = build_case("mixtral", tmp_path_factory.mktemp("apart"))
    folder = tmp_path_factory.mktemp("fused")
    case.reference.save_pretrained(folder, save_original_format=False)
    return dataclasses.replace(case, folder=folder)


@pytest.fixture(scope="module")
def plan(fused: Case) -> Plan:
    plan = streamed(planner.plan_model(str(fused.folder), gpus=0, **WORK), "disk", resident_slices=KEPT)
    fused.run_like(plan)
    return plan


def sources(model: Any) -> list[MappedExperts]:
    return [source for _, source in model._loadplan_dispatch.has.experts]


def test_same_bits_and_the_weights_are_pages_of_the_file(fused: Case, plan: Plan) -> None:
    model = dispatch.apply(str(fused.folder), plan)
    assert [type(source) for source in sources(model)] == [MappedExperts] * 3
    files = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(fused.folder) in line]
    spans = [[int(part, 16) for part in line.split(" ")[0].split("-")] for line in files]
    for source in sources(model):
        for expert in range(8):
            inside = [
                any(start <= tensor.data_ptr() < end for start, end in spans)
                for tensor in source.fetch(expert).values()
            ]
            assert inside == [expert >= KEPT] * 2
    assert torch.equal(fused.logits(model), fused.logits(fused.reference))
    assert torch.equal(fused.generate(model), fused.generate(fused.reference))
    plain = dispatch.remove(model).state_dict()
    for name, tensor in fused.reference.state_dict().items():
        assert torch.equal(plain[name], tensor)


def test_experts_stored_apart_are_not_mapped(make_case: Callable[..., Case]) -> None:
    case = make_case("mixtral")
    apart = streamed(planner.plan_model(str(case.folder), gpus=0, **WORK), "disk")
    case.run_like(apart)
    model = dispatch.apply(str(case.folder), apart)
    assert not any(isinstance(source, MappedExperts) for source in sources(model))
    assert torch.equal(case.logits(model), case.logits(case.reference))


def test_those_routed_to_are_read_ahead_and_no_others(fused: Case, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dispatch.apply(str(fused.folder), plan)
    routed: list[set[str]] = []
    read: list[str] = []
    monkeypatch.setattr(page_cache, "present", lambda address, nbytes: False)
    inner = readahead._bring
    monkeypatch.setattr(readahead, "_bring", lambda name, *place: (read.append(name), inner(name, *place)))
    model._loadplan_dispatch.has.ahead = None
    for source in sources(model):
        begin = source.begin

        def note(module: Any, experts: list[int], begin: Any = begin, source: Any = source) -> None:
            routed.append({source._pages[expert][0] for expert in experts if expert >= KEPT})
            begin(module, experts)

        monkeypatch.setattr(source, "begin", note)
    with torch.no_grad():
        out = model(fused.ids[:1, :1]).logits
    experts = [name for name in read if name.rpartition(" ")[2].isdigit()]
    assert len(routed) == 3
    assert sorted(set(experts)) == sorted(set().union(*routed))
    assert 0 < len(set(experts)) <= 6
    assert torch.equal(out, fused.reference(fused.ids[:1, :1]).logits)


def test_pages_that_cannot_be_read_are_an_error_and_the_model_stays_usable(
    fused: Case, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dispatch.apply(str(fused.folder), plan)
    expected = fused.logits(fused.reference)

    def broken(address: int, nbytes: int) -> None:
        raise OSError(14, "Bad address")

    with monkeypatch.context() as patch:
        patch.setattr(page_cache, "present", lambda address, nbytes: False)
        patch.setattr(page_cache, "bring", broken)
        with pytest.raises(InputError, match="can no longer be read"):
            fused.logits(model)
    assert torch.equal(fused.logits(model), expected)
    assert not [thread for thread in threading.enumerate() if thread.name == "loadplan read-ahead"]


def test_a_replaced_parameter_is_refused(fused: Case, plan: Plan) -> None:
    model = dispatch.apply(str(fused.folder), plan)
    experts: Any = model.get_submodule("model.layers.1.mlp.experts")
    experts.down_proj = torch.nn.Parameter(torch.zeros_like(experts.down_proj, device="cpu"))
    with pytest.raises(InputError, match="replaced"):
        fused.logits(model)

"""The clock of virtual machines: lanes, waits and rates by hand, and whole calls beside what plans predict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.utils import logging

import dispatch
import planner
import simulate
from planner.errors import InputError
from planner.given import build_on_meta, describe
from planner.hardware import Hardware
from planner.rules import Pin, Rules
from simulate.virtual_machine import Machine
from small_cases import gpu, machine

FLOPS, RATE, LINK, OPERATOR_NS, LATENCY_NS = 10**12, 10**11, 20 * 10**9, 2000, 10_000
CPU_RATE = 50 * 10**9


def hardware() -> Hardware:
    gpus = [gpu(index, product="big", flops=2 * FLOPS, rate=RATE) for index in range(2)]
    return machine(gpus, {"cuda:0": 10**9, "cuda:1": 10**9, "cpu": 10**9, "disk": 10**9}, link=LINK)


@pytest.fixture
def box() -> Iterator[Machine]:
    simulate.virtual("1x1GB")  # lets PyTorch know the devices
    with Machine({"cuda:0": 10**9, "cuda:1": 10**9}, numbers=False, hardware=hardware()) as made:
        yield made


def took(box: Machine, call: Any) -> int:
    """Return what `call` takes when nothing else is under way, in ns."""
    before = box.synchronize()
    call()
    return box.clock_ns - before


def test_an_operator_takes_the_longer_of_its_arithmetic_and_its_bytes(box: Machine) -> None:
    device = box.devices["cuda:0"]
    one, two = torch.empty(1000, 2000, device=device), torch.empty(2000, 3000, device=device)
    arithmetic = 2 * 1000 * 2000 * 3000 * 10**9 // FLOPS
    assert took(box, lambda: one @ two) == OPERATOR_NS + arithmetic
    assert took(box, lambda: one.exp()) == OPERATOR_NS + 2 * 8_000_000 * 10**9 // RATE
    assert took(box, lambda: one.mul_(2.0)) == OPERATOR_NS + 8_000_000 * 10**9 // RATE
    assert took(box, lambda: (one.t(), one.view(-1), one[3:])) == 0
    rows = torch.zeros(50, dtype=torch.long, device=device)
    assert took(box, lambda: one[rows]) == OPERATOR_NS + 2 * 50 * 2000 * 4 * 10**9 // RATE


def test_the_host_runs_ahead_until_it_looks(box: Machine) -> None:
    value = torch.empty(10**6, device=box.devices["cuda:0"])
    each = 2 * 4 * 10**6 * 10**9 // RATE

    def many() -> torch.Tensor:
        out = value
        for _ in range(5):
            out = out.exp()
        return out

    assert took(box, many) == OPERATOR_NS + 5 * each
    # Beside it another device: its operators are issued while the first computes.
    other = torch.empty(10**6, device=box.devices["cuda:1"])
    assert took(box, lambda: (value.exp(), other.exp())) == 2 * OPERATOR_NS + each
    # After a look, the host has waited; what is issued then begins then.
    assert took(box, lambda: (many()[0].item(), other.exp())) == OPERATOR_NS + 5 * each + OPERATOR_NS + each
    assert took(box, lambda: (many()[:1].tolist(), other.exp())) == OPERATOR_NS + 5 * each + OPERATOR_NS + each


def test_copies_run_beside_computing_and_wait_for_what_they_need(box: Machine) -> None:
    device, nbytes = box.devices["cuda:0"], 4 * 10**6
    host, busy = torch.empty(10**6), torch.empty(10**6, device=device)
    copy, each = LATENCY_NS + nbytes * 10**9 // LINK, 2 * nbytes * 10**9 // RATE
    assert took(box, lambda: host.to(device)) == OPERATOR_NS + copy
    # The copy hides behind computing, then what needs it waits.
    assert took(box, lambda: (host.to(device), busy.exp())) == OPERATOR_NS + copy
    assert took(box, lambda: host.to(device).exp()) == OPERATOR_NS + copy + each
    # A slot that is still read is not written to.
    assert took(box, lambda: (busy.exp(), busy.copy_(host))) == OPERATOR_NS + each + copy
    # The host waits for what comes to it.
    assert took(box, lambda: (busy.cpu(), busy.exp())) == OPERATOR_NS + copy + OPERATOR_NS + each
    across = 20_000 + nbytes * 10**9 // (LINK // 2)
    assert took(box, lambda: busy.to(box.devices["cuda:1"])) == OPERATOR_NS + across


def test_operators_of_the_cpu_are_the_hosts_time(box: Machine) -> None:
    value = torch.ones(10**6)
    assert took(box, lambda: value + value) == 3 * 4 * 10**6 * 10**9 // CPU_RATE
    assert took(box, lambda: value[:1] * 2) == OPERATOR_NS


def test_a_machine_without_hardware_has_no_clock() -> None:
    with pytest.raises(InputError, match="has no clock"):
        _ = Machine({"cuda:0": 1000}).clock_ns


def test_inputs_are_put_where_they_are_asked_for(box: Machine) -> None:
    given = {"ids": torch.ones(1, 3, dtype=torch.long), "more": [torch.ones(2)], "flag": True}
    first = box.inputs(given)
    assert first["flag"] is True
    assert {first["ids"].device, first["more"][0].device} == {box.devices["cuda:0"]}
    assert box.inputs(given, "cuda:1")["ids"].device == box.devices["cuda:1"]
    assert box.inputs(given, "cpu") is given
    with pytest.raises(InputError, match=r"no virtual device 'cuda:7'"):
        box.inputs(given, "cuda:7")


# Eight layers of 101 MB, in bfloat16.
CONFIG = LlamaConfig(
    vocab_size=8000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16,
    num_key_value_heads=16, dtype="bfloat16",
)  # fmt: skip
RULES = Rules(pins=(Pin(layers="model.embed_tokens|lm_head", device="cuda:0"),))
# How far the clock may be from the plan: it takes the longer of arithmetic and bytes by operator, the plan by layer.
FACTOR = 1.3


@pytest.mark.parametrize(
    ("gpus", "capacity", "waits", "devices"),
    [("24GB", "24GB", False, 1), ("24GB", "750MB", True, 1), ("2x24GB", "900MB", False, 2)],
)
def test_a_whole_call_takes_about_what_the_plan_says(gpus: str, capacity: str, waits: bool, devices: int) -> None:
    logging.set_verbosity_error()
    caps = {f"cuda:{index}": capacity for index in range(devices)}
    plan = planner.plan_model(
        CONFIG, gpus=gpus, max_memory=caps, prompt_tokens=256, new_tokens=4, rules=RULES, weight_dtype="bfloat16"
    )
    assert any(p.home != p.run_on for p in plan.placements) == waits
    assert len(set(plan.run_on())) == devices
    assert plan.prediction is not None
    with simulate.virtual(plan.hardware, numbers=False) as box:
        model = box.blank(build_on_meta(describe(CONFIG), "bfloat16").eval())
        model = dispatch.apply(model, plan, devices=box.devices)
        ids = box.inputs(torch.ones(1, 256, dtype=torch.long))
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
        prefill = took(box, lambda: model.generate(ids, max_new_tokens=1, **options))
        whole = took(box, lambda: model.generate(ids, max_new_tokens=4, **options))
    for measured, predicted in (
        (prefill, plan.prediction.prefill_ns), ((whole - prefill) // 3, plan.prediction.decode_ns_per_token)
    ):  # fmt: skip
        assert predicted / FACTOR < measured < predicted * FACTOR

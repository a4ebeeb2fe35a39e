"""A plan beside a measurement; and the machine corrected by it, judged by simulating on the machine that it was."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tight_cases import settings

import planner
import simulate
from planner.commands.main import main
from planner.errors import InputError
from planner.hardware import Hardware
from planner.measurement import Measurement, PhaseTimes
from planner.plan import Plan
from tiny_models import streamed


@functools.cache
def big_plan(gpus: str = "1x24GB", prompt: int = 512) -> Plan:
    return planner.plan_model("meta-llama/Llama-3-8B", gpus=gpus, prompt_tokens=prompt, new_tokens=20)


def measurement(plan: Plan, *, hardware: Hardware | None = None, **changes: Any) -> Measurement:
    """Return what the simulator says of the plan on a machine, as if it had been measured; all bytes as predicted."""
    timeline = simulate.run(dataclasses.replace(plan, hardware=hardware or plan.hardware))
    assert plan.prediction is not None
    work = plan.workload
    found = Measurement(
        model="M", counters=plan.prediction.counters, prefill=PhaseTimes.of([timeline.prefill_ns]),
        decode=PhaseTimes.of([timeline.decode_ns_per_token]), total_ns=timeline.total_ns, metered=False,
        rows=work.rows, prompt_tokens=work.prompt_tokens, context_tokens=work.prompt_tokens + work.decode_steps,
        routed={},
    )  # fmt: skip
    return dataclasses.replace(found, **changes)


def on(change: Callable[[Any], Any], hardware: Hardware) -> Hardware:
    return dataclasses.replace(hardware, devices=tuple(change(device) for device in hardware.devices))


def test_what_was_predicted_holds_and_a_byte_more_does_not() -> None:
    plan = settings("llama")[2].plan
    found = measurement(plan)
    check = plan.check(found)
    assert check.holds
    assert {entry.what for entry in check.deviations} >= {"cuda:0 tensors", "cuda:0 reserved", "prefill", "decode step"}
    inputs = 2 * 8 * plan.workload.rows * plan.workload.prompt_tokens
    for counter, nbytes in found.counters["cuda:0"].items():
        exact = counter in ("operator_outputs", "requested_by_operators", "tensors")
        for change, holds in ((inputs, True), (inputs + 1, False), (-1, not exact)):
            other = dataclasses.replace(found, counters={"cuda:0": {counter: nbytes + change}})
            assert plan.check(other).holds is holds, (counter, change)
            deviation = plan.check(other).deviations[0]
            assert deviation.measured - deviation.predicted == change
            assert bool(deviation.advice) is not holds


def test_times_are_judged_where_rates_have_a_spread() -> None:
    plan = settings("llama")[1].plan
    assert plan.prediction is not None
    ranged = dataclasses.replace(
        plan, prediction=dataclasses.replace(plan.prediction, prefill_ns_range=(90, 110), decode_ns_range=(9, 11))
    )
    for took, holds in ((90, True), (110, True), (89, False), (111, False)):
        found = measurement(plan, prefill=PhaseTimes.of([took]), decode=PhaseTimes.of([10]))
        assert ranged.check(found).holds is holds
        assert ranged.check(dataclasses.replace(found, metered=True)).holds
        assert plan.check(found).holds, "without a range nothing is judged"


def test_other_work_than_planned_is_said() -> None:
    plan = settings("llama")[2].plan
    more = plan.check(measurement(plan, rows=9, counters={"cuda:0": {"tensors": 10**9}}))
    assert not more.holds
    assert any("MORE THAN PLANNED: 9 rows" in note for note in more.notes)
    assert "plan with the batch and context" in more.deviations[0].advice
    less = plan.check(measurement(plan, context_tokens=10, counters={"cuda:0": {"tensors": 10}}))
    assert less.holds
    assert any("less than planned: 10 tokens" in note for note in less.notes)
    assert plan.check(measurement(plan, counters={})).notes == ("nothing was measured of cuda:0",)


def test_it_is_printed_in_80_columns() -> None:
    plan = settings("llama")[2].plan
    found = measurement(plan, rows=9, metered=True, counters={"cuda:0": {"tensors": 10**9}})
    text = str(dataclasses.replace(plan.check(found), model="a name\x1b[2J " * 20))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "\x1b" not in text
    assert "OFF" in text


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.3])
@pytest.mark.parametrize("rate", ["link", "memory", "arithmetic"])
def test_the_rate_that_was_other_is_found(rate: str, factor: float) -> None:
    if rate == "link":
        plan = streamed(big_plan(), "cpu")
        plan = dataclasses.replace(plan, prediction=planner.predict(plan))
        links = tuple(
            link.times(factor) if (link.source, link.target) == ("cpu", "cuda:0") else link
            for link in plan.hardware.links
        )
        was = dataclasses.replace(plan.hardware, links=links)
        found = measurement(plan, hardware=was)
    else:
        plan = big_plan(prompt=4096)
        device = plan.hardware.device("cuda:0")
        if rate == "memory":
            other = dataclasses.replace(device, bytes_per_s=int(device.bytes_per_s * factor))
        else:
            key = "bfloat16" if "bfloat16" in device.flops_per_s else "default"
            rates = {**device.flops_per_s, key: int(device.flops_per_s[key] * factor)}
            other = dataclasses.replace(device, flops_per_s=rates)
        was = on(lambda each: other if each.name == "cuda:0" else each, plan.hardware)
        found = measurement(plan, hardware=was)
        found = dataclasses.replace(found, **{"memory": {"prefill": None}, "arithmetic": {"decode": None}}[rate])
    made = planner.corrected_hardware(plan, found)
    made.check()
    if rate == "link":
        assert made.link("cpu", "cuda:0").bytes_per_s == pytest.approx(was.link("cpu", "cuda:0").bytes_per_s, rel=0.02)
        assert made.devices == plan.hardware.devices
    else:
        assert made.links == plan.hardware.links
        assert made.device("cuda:0").bytes_per_s == pytest.approx(was.device("cuda:0").bytes_per_s, rel=0.03)
        for key, wanted in was.device("cuda:0").flops_per_s.items():
            assert made.device("cuda:0").flops_per_s[key] == pytest.approx(wanted, rel=0.03)
    again = simulate.run(dataclasses.replace(plan, hardware=made))
    if found.decode is not None:
        assert again.decode_ns_per_token == pytest.approx(found.decode.median_ns, rel=0.02)
    assert "times" in made.assumptions[-1]


def test_what_no_rate_accounts_for_is_refused() -> None:
    plan = big_plan()
    with pytest.raises(InputError, match="no rate accounts"):
        planner.corrected_hardware(plan, measurement(plan, decode=PhaseTimes.of([1])))
    with pytest.raises(InputError, match="memory=False"):
        planner.corrected_hardware(plan, measurement(plan, metered=True))
    with pytest.raises(InputError, match="measure the planned work"):
        planner.corrected_hardware(plan, measurement(plan, rows=3))
    with pytest.raises(InputError, match="nothing to correct by"):
        planner.corrected_hardware(plan, measurement(plan, prefill=None, decode=None))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = settings("llama")[1].plan
    plan.save(tmp_path / "plan.json")
    slow = PhaseTimes.of([simulate.run(plan).decode_ns_per_token * 2])
    measurement(plan, decode=slow).save(tmp_path / "run.json")
    words = ["check", str(tmp_path / "plan.json"), str(tmp_path / "run.json")]
    assert main([*words, "--correct", str(tmp_path / "here.json")]) == 0
    assert "+100.0%" in capsys.readouterr().out
    assert Hardware.load(tmp_path / "here.json") == planner.corrected_hardware(plan, measurement(plan, decode=slow))
    measurement(plan, counters={"cuda:0": {"tensors": 1}}).save(tmp_path / "run.json")
    assert main([*words, "--json"]) == 5
    told = json.loads(capsys.readouterr().out)
    assert told["holds"] is False
    assert told["deviations"][0]["measured"] == 1
    assert main(["check", str(tmp_path / "run.json"), str(tmp_path / "run.json")]) == 5

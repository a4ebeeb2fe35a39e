"""Why a plan is as it is: every figure against the best of every placement, enumerated with the change made."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brute_force import Ledger
from planner import changes, memory
from planner.commands.explain import render
from planner.commands.main import main
from planner.errors import InfeasibleError, InputError
from planner.explanation import Answer, Explanation, explain
from planner.graph import LayerGraph, LayerKind
from planner.hardware import Hardware
from planner.placement import solution
from planner.plan import Placement, Plan, Slots, Solver
from planner.rules import NO_RULES, Pin, Rules
from planner.units import GIB
from planner.workload import Workload
from small_cases import MIB, Case, build_graph, end_kind, gpu, group, machine, plan_of, span

FIND = solution.find


def case_of(name: str) -> Case:
    """Return two blocks with experts, which partly wait, and partly run on the host, on machines of several kinds."""
    kinds = [end_kind("Embedding", MIB), end_kind("Head", MIB)]
    kinds.append(LayerKind(name="Block", groups=(group("attn", 8 * MIB), group("experts", 6 * MIB, slices=2))))
    flops = 10**11 if name != "host" else 10**7
    ends = [span(held=100, peak=MIB, flops=10**6, moved=10**6)] * 3
    work = [span(held=100, peak=MIB, kv=(0, 4096), flops=flops, moved=10**6)] * 3
    graph = build_graph(kinds, [ends, ends, work], [("embed", 0), ("block.0", 2), ("block.1", 2), ("head", 1)])
    gpus = [gpu(0, product="big", flops=10**14, rate=10**12)]
    if name == "alike":
        gpus.append(gpu(1, product="big", flops=10**14, rate=10**12))
    elif name == "different":
        gpus.append(gpu(1, product="small", flops=10**13, rate=2 * 10**11))
    sizes = {device.name: size * MIB for device, size in zip(gpus, (50, 50 if name == "alike" else 44), strict=False)}
    if name == "one":
        sizes["cuda:0"] = 62 * MIB
    if name == "tight":
        sizes["cuda:0"] = 58 * MIB
    sizes |= {"cpu": (200 if name != "tight" else 20) * MIB, "disk": 2**30}
    return Case(graph, machine(gpus, sizes), Workload(prompt_tokens=8, new_tokens=8))


NAMES = ("one", "tight", "host", "alike", "different")


class Table:
    """Every placement of a case, and the best of those that are allowed."""

    def __init__(self, case: Case):
        self.case, self.ledger = case, Ledger(case)
        self.column = np.arange(self.ledger.size)
        fits = np.array([self.ledger.fits(single) for single in self.ledger.singles])
        costs = np.array([self.ledger.cost[single] for single in self.ledger.singles])
        self.fits = fits.any(axis=0)
        never = np.iinfo(np.int64).max
        self.costs = np.where(fits, costs, never).min(axis=0)
        self.single = np.where(fits, costs, never).argmin(axis=0)

    def where(self, layer: str, *, device: str, kept: str | None = None) -> Any:
        """Tell of every placement whether a layer runs on a device, with one of its groups whole there."""
        index = [entry.name for entry in self.case.graph.layers].index(layer)
        unit = next(number for number, members in enumerate(self.ledger.units) if index in members)
        options = self.ledger.options[unit]
        groups = self.case.graph.kind_of(index).groups
        chosen = np.zeros(len(options), dtype=bool)
        for number, option in enumerate(options):
            homes = dict(zip(groups, option.kept[self.ledger.units[unit].index(index)], strict=True))
            whole = [
                (homes[entry].home, homes[entry].stay) == (device, entry.slices)
                for entry in groups
                if entry.name == kept
            ]
            chosen[number] = option.device == device and all(whole)
        later = math.prod(len(entry) for entry in self.ledger.options[unit + 1 :])
        return chosen[self.column // later % len(options)]

    def best(self, allowed: Any = True) -> int | None:
        """Return the column of the cheapest placement that fits and is allowed."""
        usable = self.fits & allowed
        if not usable.any():
            return None
        columns = self.column[usable]
        return int(columns[self.costs[columns].argmin()])

    def cost(self, allowed: Any = True) -> int | None:
        best = self.best(allowed)
        return None if best is None else int(self.costs[best])


def enumerated(
    graph: LayerGraph, hardware: Hardware, workload: Workload, rules: Rules = NO_RULES
) -> tuple[tuple[Placement, ...], tuple[Slots, ...], Solver]:
    """Answer as `find` does, by looking at every placement; pins are kept."""
    table = Table(Case(graph, hardware, workload))
    allowed: Any = True
    for layer in graph.layers:
        device = rules.pinned_to(layer.name)
        if device is not None:
            allowed = allowed & table.where(layer.name, device=device)
    best = table.best(allowed)
    if best is None:
        raise InfeasibleError(
            device="cpu", needed_bytes=2, available_bytes=1, smallest_fix="", message="nothing fits: cpu; add to it"
        )
    placements = table.ledger.placements(best)
    cost = int(table.costs[best])
    solver = Solver(status="optimal", objective_ns=cost, bound_ns=cost, cost_model="enumerated")
    single = table.ledger.singles[int(table.single[best])]
    return placements, memory.needed_slots(graph, hardware, placements, single=single), solver


def check_machine(case: Case, plan: Plan, told: Explanation) -> None:
    """Hold what binds and what more would buy against every placement on the changed machine."""
    assert plan.solver is not None

    def saved(hardware: Hardware) -> int:
        cost = Table(Case(case.graph, hardware, case.workload)).cost()
        assert cost is not None
        assert plan.solver is not None
        return plan.solver.objective_ns - cost

    assert [use.name for use in told.memories] == [pool.name for pool in case.hardware.pools]
    planned = memory.planned_bytes(plan.graph, plan.hardware, plan.placements, plan.slots)
    for use in told.memories:
        expected = saved(changes.with_memory(case.hardware, (use.name,), 2 * GIB))
        assert use.unbounded == answer_of(plan, expected)
        assert use.binds == (expected > 0)
        assert use.used_bytes == sum(use.by_kind.values()) == planned[use.name].total
        assert use.largest_kind is None or use.by_kind[use.largest_kind] == max(use.by_kind.values())
    for change in told.changes:
        assert change.answer == answer_of(plan, saved(changed(case.hardware, change.what, change.where)))


def changed(hardware: Hardware, what: str, where: tuple[str, ...]) -> Hardware:
    if what == "memory":
        return changes.with_memory(hardware, where[:1], GIB)
    links = []
    for link in hardware.links:
        ends = {link.source, link.target}
        fast = {
            "disk": "disk" in ends,
            "host link": "cpu" in ends and bool(ends & set(where)),
            "device link": ends <= set(where),
        }[what]
        links.append(dataclasses.replace(link, bytes_per_s=link.bytes_per_s * (2 if fast else 1)))
    return dataclasses.replace(hardware, links=tuple(links))


def answer_of(plan: Plan, saved_ns: int | None) -> Answer:
    assert plan.solver is not None
    if saved_ns is None:
        return Answer(status="infeasible", reason="nothing fits: cpu")
    percent = round(100 * saved_ns / plan.solver.objective_ns, 3)
    return Answer(status="optimal", saved_ns=saved_ns, saved_percent=percent)


def layer_answers(case: Case, plan: Plan, told: Explanation) -> Iterator[tuple[Answer, Answer]]:
    """Yield what was told of a layer beside what every placement says."""
    assert told.layer is not None
    assert plan.solver is not None
    table = Table(case)
    layer = told.layer.layer

    def saved(cost: int | None) -> int | None:
        assert plan.solver is not None
        return None if cost is None else plan.solver.objective_ns - cost

    for entry in told.layer.alternatives:
        for device in entry.where:
            yield entry.answer, answer_of(plan, saved(table.cost(table.where(layer, device=device))))
    for group_ in told.layer.groups:
        if group_.kept is not None:
            allowed = table.where(layer, device=group_.run_on, kept=group_.group)
            yield group_.kept, answer_of(plan, saved(table.cost(allowed)))


@pytest.mark.parametrize("name", NAMES)
def test_what_binds_and_what_more_would_buy(name: str) -> None:
    case = case_of(name)
    plan = plan_of(case)
    assert plan.solver is not None
    assert plan.solver.status == "optimal"
    told = explain(plan)
    assert told.layer is None
    assert (told.objective_ns, told.bound_ns) == (plan.solver.objective_ns, plan.solver.bound_ns)
    check_machine(case, plan, told)


@pytest.mark.parametrize("layer", ["embed", "block.1"])
@pytest.mark.parametrize("name", NAMES)
def test_why_a_layer_is_where_it_is(name: str, layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every placement enumerated in the solver's stead: what is asked, and what is made of the answers."""
    case = case_of(name)
    monkeypatch.setattr(solution, "find", enumerated)
    placements, slots, solver = enumerated(case.graph, case.hardware, case.workload)
    plan = dataclasses.replace(plan_of(case), placements=placements, slots=slots, solver=solver)
    told = explain(plan, layer)
    assert told.layer is not None
    others = {device.name for device in case.hardware.devices} - {told.layer.run_on}
    assert {device for entry in told.layer.alternatives for device in entry.where} == others
    for found, expected in layer_answers(case, plan, told):
        assert found == expected


@pytest.mark.parametrize("layer", ["embed", "block.0"])
@pytest.mark.parametrize("name", NAMES)
def test_the_solver_says_of_a_layer_what_every_placement_says(name: str, layer: str) -> None:
    """Holds wherever the solver kept the pin and proved its answer; one that it did not keep is told as unknown."""
    case = case_of(name)
    plan = plan_of(case)
    told = explain(plan, layer)
    for found, expected in layer_answers(case, plan, told):
        if found.status == "optimal":
            assert found == expected
        elif found.status == "feasible":
            assert found.saved_ns is not None
            assert expected.saved_ns is not None
            assert found.saved_ns <= expected.saved_ns
        else:
            assert found.saved_ns is None
            assert found.reason


def test_the_cases_have_something_to_explain() -> None:
    """Weights wait in host memory and on disk, layers run on the host, and slices are kept in part."""
    seen = set()
    for name in NAMES:
        plan = plan_of(case_of(name))
        for placement, group_ in memory.with_groups(plan.graph, plan.placements):
            waiting = memory.waiting_slices(placement, group_)
            seen.add(("waits", placement.home) if waiting else ("runs", placement.run_on))
            if 0 < waiting < group_.slices:
                seen.add(("in part", group_.name))
    assert seen >= {("waits", "cpu"), ("runs", "cpu"), ("runs", "cuda:0"), ("runs", "cuda:1"), ("in part", "experts")}


def test_what_is_alike_is_asked_once() -> None:
    asked: list[str] = []
    told = explain(plan_of(case_of("alike")), report=asked.append)
    assert [(change.what, change.where) for change in told.changes] == [
        ("memory", ("cuda:0", "cuda:1")), ("memory", ("cpu",)), ("host link", ("cuda:0", "cuda:1")),
        ("device link", ("cuda:0", "cuda:1")), ("disk", ("disk",)),
    ]  # fmt: skip
    assert len(asked) == len(set(asked)) == len(told.changes) + 3
    pinned = dataclasses.replace(plan_of(case_of("alike")), rules=Rules(pins=(Pin(layers="embed", device="cuda:0"),)))
    apart = [change.where for change in explain(pinned).changes if change.what == "memory"]
    assert apart == [("cuda:0",), ("cuda:1",), ("cpu",)]


def test_a_layer_is_pinned_by_its_own_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Rules] = []

    def noted(graph: Any, hardware: Any, workload: Any, rules: Rules = NO_RULES) -> Any:
        asked.append(rules)
        return FIND(graph, hardware, workload, rules)

    plan = plan_of(case_of("alike"))
    monkeypatch.setattr(solution, "find", noted)
    explain(plan, "block.1", time_limit_s=9.0)
    assert {rules.time_limit_s for rules in asked} == {9.0}
    pins = [pin for rules in asked for pin in rules.pins]
    assert pins
    for pin in pins:
        assert re.fullmatch(pin.layers, "block.1")
        assert not re.fullmatch(pin.layers, "block-1")


def test_a_layer_that_is_not_there(tmp_path: Path) -> None:
    plan = plan_of(case_of("one"))
    with pytest.raises(InputError, match=r"no layer 'block'; there are block\.0, block\.1$"):
        explain(plan, "block")
    with pytest.raises(InputError, match="embed, block"):
        explain(plan, "nowhere")
    with pytest.raises(InputError, match="given, not found"):
        explain(dataclasses.replace(plan, solver=None))


# The command


def test_the_command_tells_it_in_80_columns_and_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        path = tmp_path / "plan.json"
        plan_of(case_of(name)).save(path)
        for words in ((), ("block.1",), ("head",)):
            assert main(["explain", str(path), *words]) == 0
            out = capsys.readouterr().out
            assert max(map(len, out.splitlines())) <= 80
            assert "…" not in out
            assert ("Why" in out) == bool(words)
            assert main(["explain", str(path), *words, "--json"]) == 0
            data = json.loads(capsys.readouterr().out)
            assert (data["layer"] or {}).get("layer") == (words[0] if words else None)
    assert main(["explain", str(path), "nowhere"]) == InputError.exit_code
    assert "no layer 'nowhere'" in capsys.readouterr().err


def test_experts_that_the_cpu_computes_are_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    plan = plan_of(case_of("one"))
    group = next(p for p in plan.placements if p.group == "experts" and p.home != p.run_on)
    for tokens in (0, 1):
        placements = (dataclasses.replace(p, cpu_up_to_tokens=tokens) if p is group else p for p in plan.placements)
        dataclasses.replace(plan, placements=tuple(placements)).save(path)
        assert main(["explain", str(path), group.layer]) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert ("computed there up to 1 token" in told) == bool(tokens)


def test_figures_are_said_with_their_proof() -> None:
    told = explain(plan_of(case_of("one")))
    first = told.changes[0]
    for answer, words in (
        (Answer(status="optimal", saved_ns=0, saved_percent=0.0), "cuda:0 +nothing\n"),
        (Answer(status="optimal", saved_ns=1_500_000, saved_percent=12.5), r"cuda:0 +1\.50 ms \(12\.5%\)\n"),
        (
            Answer(status="feasible", saved_ns=-1_500_000, saved_percent=-12.5),
            r"cuda:0 +-1\.50 ms \(-12\.5%\) +not pro",
        ),
        (Answer(status="unknown", reason="cut off"), "cuda:0 +not known +cut off\n"),
    ):
        text = render(dataclasses.replace(told, changes=(dataclasses.replace(first, answer=answer),)))
        assert re.search(f"1 GiB more on {words}", text), text

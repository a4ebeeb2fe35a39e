"""Why a plan is as it is: what binds, what more of something would buy, and why a layer is where it is.

Every figure is the difference between the plan's cost and that of the question solved again with one thing changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from planner import changes, memory
from planner.errors import InfeasibleError, InputError, NoSolutionInTimeError
from planner.graph import LayerGraph, WeightGroup
from planner.hardware import Hardware, Link
from planner.plan import Placement, Plan, Solver
from planner.popularity import described
from planner.rules import Pin, Rules
from planner.units import GIB
from planner.workload import Objective

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a question solved again came to, beside the plan.

    status: "optimal" or "feasible" as the solver says of the new answer, "infeasible" where nothing fits, "unknown"
        where the search was cut off.
    saved_ns: by how much the new answer's cost is below the plan's, negative where it is above; None without one. Where
        either is not proven optimal, it is the difference of two answers, not of two best ones.
    saved_percent: of the plan's cost.
    reason: why there is no answer.
    """

    status: Literal["optimal", "feasible", "infeasible", "unknown"]
    saved_ns: int | None = None
    saved_percent: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """How full one memory is planned to be, and whether that costs time.

    by_kind: planned bytes by kind of memory; their sum is `used_bytes`.
    largest_kind: what takes most; None where nothing is held.
    unbounded: the answer if this memory, or one alike, had room for everything.
    binds: whether that saves time: the plan would be another with more of it.
    """

    name: str
    used_bytes: int
    usable_bytes: int
    by_kind: dict[str, int]
    largest_kind: str | None
    unbounded: Answer
    binds: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What more of something would buy.

    what: "memory": one GiB more in the first memory of `where`, all of which are alike; "host link" and "device link":
        twice the rate of all links of that kind, between the places in `where`; "disk": twice the disk's rate.
    """

    what: Literal["memory", "host link", "device link", "disk"]
    where: tuple[str, ...]
    answer: Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupReason:
    """Where one weight group of a layer waits.

    waiting_bytes: of it, away from the device that computes. cpu_up_to_tokens: as in `Placement`. kept: the answer if
        all of it had to stay on a device that computes with it; None where nothing of it waits, or it waits for the
        host to compute with.
    """

    group: str
    home: str
    run_on: str
    nbytes: int
    waiting_bytes: int
    cpu_up_to_tokens: int
    kept: Answer | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """The answer if a layer had to run on the first device of `where`, all of which are alike."""

    where: tuple[str, ...]
    answer: Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReason:
    """Why a layer is where it is: what each other place, or keeping its groups at hand, would cost."""

    layer: str
    kind: str
    run_on: str
    pinned: bool
    groups: tuple[GroupReason, ...]
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why a plan is as it is. All costs are those of the cost model named, for the objective named.

    popularity: how popular experts are, in words, where that was given.
    """

    model: str
    objective: Objective
    status: Literal["optimal", "feasible"]
    objective_ns: int
    bound_ns: int
    cost_model: str
    memories: tuple[MemoryUse, ...]
    changes: tuple[Change, ...]
    layer: LayerReason | None
    popularity: str | None = None


def explain(
    plan: Plan, layer: str | None = None, *, time_limit_s: float | None = None, report: Report = lambda text: None
) -> Explanation:
    """Return what binds a plan and what more memory or faster links would buy; of a layer, why it is where it is.

    Solves the plan's question once for each change; devices and links that are alike are asked about once. Each
    search ends after `time_limit_s`, where given, or the plan's own limit, with the best it has.

    Raises:
        InputError: the plan was given, not found, or has no layer of that name.
    """
    if plan.solver is None:
        raise InputError("this plan was given, not found by the planner: there is no choice to explain; plan anew")
    known = [entry.name for entry in plan.graph.layers]
    if layer is not None and layer not in known:
        near = [name for name in known if layer in name] or known
        more = f" and {len(near) - 5} more" if len(near) > 5 else ""
        raise InputError(f"the plan has no layer {layer!r}; there are {', '.join(near[:5])}{more}")
    found = plan.solver
    if time_limit_s is not None:
        plan = replace(plan, rules=replace(plan.rules, time_limit_s=time_limit_s))
    solver = _Solver(plan, solver=found, report=report)
    return Explanation(
        model=plan.model.id,
        objective=plan.workload.objective,
        status=found.status,
        objective_ns=found.objective_ns,
        bound_ns=found.bound_ns,
        cost_model=found.cost_model,
        popularity=described(plan.graph),
        memories=_memories(plan, solver),
        changes=(*_more_memory(plan, solver), *_faster_links(plan, solver)),
        layer=None if layer is None else _layer(plan, solver, layer),
    )


class _Solver:
    """Solves a plan's question with something changed, each question once."""

    def __init__(self, plan: Plan, *, solver: Solver, report: Report):
        self.plan, self.found, self.report = plan, solver, report
        self.workload = plan.workload
        if self.workload.objective in ("throughput", "max-context", "max-batch"):
            # The work that these choose is chosen: it is the plan's.
            self.workload = replace(self.workload, objective="latency")

    def ask(
        self, words: str, *, hardware: Hardware | None = None, graph: LayerGraph | None = None,
        rules: Rules | None = None, holds: Callable[[tuple[Placement, ...]], bool] = lambda placements: True,
    ) -> Answer:  # fmt: skip
        """Return what the changed question comes to; an answer of which `holds` is not true is none."""
        from planner.placement.solution import find

        self.report(f"asking again {words}")
        plan = self.plan
        try:
            placements, _, solver = find(
                graph or plan.graph, hardware or plan.hardware, self.workload, rules or plan.rules
            )
        except InfeasibleError as error:
            return Answer(status="infeasible", reason=str(error).partition(";")[0])
        except NoSolutionInTimeError as error:
            return Answer(status="unknown", reason=str(error))
        if not holds(placements):
            return Answer(status="unknown", reason="the solver did not do as it was asked")
        saved = self.found.objective_ns - solver.objective_ns
        percent = 100 * saved / self.found.objective_ns if self.found.objective_ns else 0.0
        return Answer(status=solver.status, saved_ns=saved, saved_percent=round(percent, 3))


def _memories(plan: Plan, solver: _Solver) -> tuple[MemoryUse, ...]:
    planned = memory.planned_bytes(plan.graph, plan.hardware, plan.placements, plan.slots)
    enough = sum(usage.total for usage in planned.values())
    answers: dict[str, Answer] = {}
    for names in changes.alike(plan.hardware, plan.rules):
        grown = changes.with_memory(plan.hardware, names[:1], enough)
        answers |= dict.fromkeys(names, solver.ask(f"with no limit on {names[0]}", hardware=grown))
    found = []
    for pool in plan.hardware.pools:
        usage = planned[pool.name]
        kinds = usage.by_kind()
        answer = answers[pool.name]
        found.append(
            MemoryUse(
                name=pool.name,
                used_bytes=usage.total,
                usable_bytes=pool.usable_bytes,
                by_kind=kinds,
                largest_kind=max(kinds, key=kinds.__getitem__) if usage.total else None,
                unbounded=answer,
                binds=(answer.saved_ns or 0) > 0,
            )
        )
    return tuple(found)


def _more_memory(plan: Plan, solver: _Solver) -> list[Change]:
    disks = {plan.hardware.disk(pool.name) for pool in plan.hardware.pools}
    found = []
    for names in changes.alike(plan.hardware, plan.rules):
        if disks.issuperset(names):
            continue
        grown = changes.with_memory(plan.hardware, names[:1], GIB)
        answer = solver.ask(f"with 1 GiB more on {names[0]}", hardware=grown)
        found.append(Change(what="memory", where=names, answer=answer))
    return found


def _faster_links(plan: Plan, solver: _Solver) -> list[Change]:
    hardware = plan.hardware
    hosts = {device.name for device in hardware.hosts}
    gpus = [device.name for device in hardware.gpus]
    asked: list[tuple[Literal["host link", "device link", "disk"], tuple[str, ...], list[Link]]] = []
    for names in changes.alike(hardware, plan.rules):
        alike = [device.name for device in hardware.gpus if device.pool in names]
        links = [link for link in hardware.links if _joins(link, hosts, alike)]
        asked.append(("host link", tuple(alike), links))
    asked.append(("device link", tuple(gpus), [link for link in hardware.links if _joins(link, gpus, gpus)]))
    disks = {hardware.disk(pool.name) for pool in hardware.pools}
    reads = [link for link in hardware.links if link.source in disks or link.target in disks]
    asked.append(("disk", tuple(sorted({link.source for link in reads} & disks)), reads))
    found = []
    for what, where, links in asked:
        if not links:
            continue
        words = f"with twice the {what}{'' if what == 'disk' else f' of {where[0]}'}"
        answer = solver.ask(words, hardware=changes.with_faster_links(hardware, links, 2))
        found.append(Change(what=what, where=where, answer=answer))
    return found


def _joins(link: Link, ones: list[str] | set[str], others: list[str]) -> bool:
    return (link.source in ones and link.target in others) or (link.source in others and link.target in ones)


def _layer(plan: Plan, solver: _Solver, layer: str) -> LayerReason:
    index = [entry.name for entry in plan.graph.layers].index(layer)
    placed = [p for p in plan.placements if p.layer == layer]
    run_on = placed[0].run_on
    groups = []
    for placement in placed:
        group = plan.graph.kind_of(index).group(placement.group)
        waiting = memory.waiting_slices(placement, group)
        kept = None
        if waiting and plan.hardware.device(run_on).kind != "cpu":
            kept = solver.ask(
                f"with {layer} {group.name} kept",
                graph=_kept(plan.graph, index, group),
                rules=_pinned(plan.rules, layer, run_on),
                holds=lambda found, name=group.name: _stays(found, layer, name, run_on),  # type: ignore[misc]
            )
        waiting_bytes = placement.nbytes * waiting // group.slices
        groups.append(
            GroupReason(
                group=placement.group, home=placement.home, run_on=run_on, nbytes=placement.nbytes,
                waiting_bytes=waiting_bytes, cpu_up_to_tokens=placement.cpu_up_to_tokens, kept=kept,
            )
        )  # fmt: skip
    return LayerReason(
        layer=layer,
        kind=plan.graph.kind_of(index).name,
        run_on=run_on,
        pinned=plan.rules.pinned_to(layer) is not None,
        groups=tuple(groups),
        alternatives=_alternatives(plan, solver, layer, run_on),
    )


def _alternatives(plan: Plan, solver: _Solver, layer: str, run_on: str) -> tuple[Alternative, ...]:
    """Return the layer's price on every other device, alike ones asked once; another like its own counts as other."""
    found = []
    for names in changes.alike(plan.hardware, plan.rules):
        where = tuple(device.name for device in plan.hardware.devices if device.pool in names and device.name != run_on)
        if where:
            answer = solver.ask(
                f"with {layer} on {where[0]}",
                rules=_pinned(plan.rules, layer, where[0]),
                holds=lambda placed, device=where[0]: _runs_on(placed, layer, device),  # type: ignore[misc]
            )
            found.append(Alternative(where=where, answer=answer))
    return tuple(found)


def _pinned(rules: Rules, layer: str, device: str) -> Rules:
    return replace(rules, pins=(*rules.pins, Pin(layers=re.escape(layer), device=device)))


def _runs_on(placements: tuple[Placement, ...], layer: str, device: str) -> bool:
    return all(placement.run_on == device for placement in placements if placement.layer == layer)


def _stays(placements: tuple[Placement, ...], layer: str, group: str, device: str) -> bool:
    return all(p.home == p.run_on == device for p in placements if (p.layer, p.group) == (layer, group))


def _kept(graph: LayerGraph, index: int, group: WeightGroup) -> LayerGraph:
    """Return the graph with one group of one layer that may not wait elsewhere: the layer is of a kind of its own."""
    kind = graph.kind_of(index)
    groups = tuple(replace(entry, streamable=False) if entry.name == group.name else entry for entry in kind.groups)
    layers = list(graph.layers)
    layers[index] = replace(layers[index], kind=len(graph.kinds))
    return replace(graph, kinds=(*graph.kinds, replace(kind, groups=groups)), layers=tuple(layers))

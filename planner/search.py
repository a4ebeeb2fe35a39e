"""Searches around the solver: the batch, the longest prompt, a choice of caches and chunks, and memory traded for time.

The solver places one trace under one machine. Here it is asked again and again, and every answer says what was tried.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from planner.errors import InfeasibleError, InputError, NoSolutionInTimeError, PlanError, TraceError
from planner.graph import LayerGraph
from planner.hardware import Hardware
from planner.interpolation import alike, between
from planner.plan import Plan, Prediction
from planner.rules import Rules
from planner.units import format_ns
from planner.workload import MOST_TOKENS, Workload

# Prompts that are tried for the longest are multiples of this.
CONTEXT_STEP_TOKENS = 64
# Caps of a frontier: so many even shares of every GPU's memory.
FRONTIER_SHARES = 12
# A second size to trace is so many times the first, and what two traces tell is trusted to so many times the larger.
_SECOND_TIMES, _TRUSTED_TIMES = 8, 16
# The growing batch stops after so many doublings that brought nothing.
_FRUITLESS_DOUBLINGS = 3
# The best batch is searched to within its size over this, small ones to within one.
_BATCH_FINENESS = 32
# What the solver itself makes least while a search varies the work around it.
_SOLVED_AS_LATENCY = ("throughput", "max-context", "max-batch")
_FRONTIER_OBJECTIVES = ("latency", "ttft", "tpot")

Predict = Callable[[Plan], Prediction]


class Planner(Protocol):
    """What answers single questions: `planner.question.Question`."""

    def plan(self, hardware: Hardware, workload: Workload, rules: Rules) -> Plan: ...

    def graph(self, hardware: Hardware, workload: Workload) -> LayerGraph: ...

    def positions(self) -> int | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best plan, with its prediction. finished: no limit or interrupt cut the search around it off."""

    plan: Plan
    finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    """A plan than which none that was found takes less memory of GPUs, and no more time.

    memory_bytes: device-used at the peak, all GPUs together. time_ns: what the objective makes least, as simulated.
    """

    memory_bytes: int
    time_ns: int
    plan: Plan


def best(question: Planner, hardware: Hardware, workload: Workload, rules: Rules, predict: Predict) -> Found:
    """Return the best plan under the workload's objective; the workload's batch and prompt are floors where these are
    searched for.

    Raises:
        InfeasibleError: nothing fits, with the least that is searched. Others as `Question.plan`.
    """
    return _Search(question, hardware, rules, predict).best(workload)


def frontier(
    question: Planner, hardware: Hardware, workload: Workload, rules: Rules, predict: Predict
) -> tuple[FrontierPoint, ...]:
    """Return plans of ever more memory on the GPUs and ever less time, none of which another one dominates.

    Every GPU is held to shares of its memory, from none to all in steps of a twelfth, and each time solved again. So
    each point is the best under its caps, and between two of them others may lie.

    Raises:
        InfeasibleError: nothing fits even with all memory. InputError: there is nothing to trade.
    """
    if workload.objective not in _FRONTIER_OBJECTIVES:
        raise InputError(
            f"a frontier of memory against time is for the objectives {', '.join(_FRONTIER_OBJECTIVES)}, "
            f"not {workload.objective}"
        )
    hosts = {device.pool for device in hardware.hosts}
    pools = [name for name in dict.fromkeys(gpu.pool for gpu in hardware.gpus) if name not in hosts]
    if not pools:
        raise InputError("no GPU with memory of its own to trade for time; name GPUs with --gpus")
    found: list[FrontierPoint] = []
    # From all memory downwards: what fits nowhere is told for the machine as it is.
    for share in range(FRONTIER_SHARES, -1, -1):
        capped = _capped(hardware, pools, share)
        try:
            plan = _Search(question, capped, rules, predict).best(workload).plan
        except InfeasibleError:
            if share == FRONTIER_SHARES:
                raise
            break
        used = sum(_predicted(plan).peak_bytes[name] for name in pools)
        found.append(FrontierPoint(memory_bytes=used, time_ns=_time_ns(plan), plan=plan))
    kept: list[FrontierPoint] = []
    for point in sorted(found, key=lambda point: (point.memory_bytes, point.time_ns)):
        if not kept or point.time_ns < kept[-1].time_ns:
            kept.append(point)
    return tuple(kept)


class _CutOffError(Exception):
    """The time is up, or the solver was cut off before it found anything."""


class _Search:
    """One question on one machine, asked with varied work; the time limit is for all of it together."""

    def __init__(self, question: Planner, hardware: Hardware, rules: Rules, predict: Predict):
        self.question, self.hardware, self.rules, self.predict = question, hardware, rules, predict
        self._end_s = None if rules.time_limit_s is None else time.monotonic() + rules.time_limit_s
        self._answered = self._interrupted = False
        self._finished = True

    def best(self, workload: Workload) -> Found:
        """Return the best plan over the caches and the chunks of the prompt that are allowed."""
        rules = self.rules
        if (rules.caches or rules.prefill_chunks) and workload.caller == "forward":
            raise InputError(
                "a choice of KV caches, or of chunks of the prompt, is for generate(), not for plain forward calls"
            )
        caches = dict.fromkeys((workload.cache, *rules.caches))
        cuts = dict.fromkeys((workload.prefill_chunk, *rules.prefill_chunks))
        works = [replace(workload, cache=cache, prefill_chunk=cut) for cache in caches for cut in cuts]

        def called(work: Workload) -> str:
            names = [work.cache] * (len(caches) > 1) + [_cut_words(work.prefill_chunk)] * (len(cuts) > 1)
            return " and ".join(names)

        plans: list[Plan] = []
        told: list[str] = []
        failed: list[PlanError] = []
        try:
            for work in works:
                try:
                    plans.append(self._sized(work))
                    told.append(f"{called(work)} ({_achieved(plans[-1])})")
                except (InfeasibleError, TraceError) as exc:
                    failed.append(exc)
                    told.append(f"{called(work)} ({'does not fit' if isinstance(exc, InfeasibleError) else exc})")
        except (_CutOffError, KeyboardInterrupt):
            self._finished = False
            if not plans:
                raise
        if not plans:
            raise failed[0]
        plan = min(plans, key=_score)
        if len(cuts) > 1:
            what = "KV caches and chunks of the prompt" if len(caches) > 1 else "chunks of the prompt"
            plan = _noted(plan, f"of the {what} allowed, {called(plan.workload)} is best: {', '.join(told)}")
        elif len(caches) > 1:
            plan = _noted(plan, f"of the KV caches allowed, the {plan.workload.cache} one is best: {', '.join(told)}")
        if not self._finished:
            plan = _noted(plan, "the search was cut off: this is the best that was found until then")
        return Found(plan=plan, finished=self._finished)

    def _sized(self, workload: Workload) -> Plan:
        """Return the best plan with this cache, its batch and prompt chosen where the objective says so."""
        if workload.objective == "throughput":
            return self._throughput(workload)
        if workload.objective == "max-batch":
            most = MOST_TOKENS // (workload.prompt_tokens + workload.new_tokens)
            end = f"{most:,}, which is what can be traced"
            return self._largest(
                range(workload.batch_size, most + 1), lambda size: replace(workload, batch_size=size), what="batch",
                end=end,
            )  # fmt: skip
        if workload.objective == "max-context":
            most = MOST_TOKENS // workload.batch_size - workload.new_tokens
            end = f"{most:,} tokens, which is what can be traced"
            positions = self.question.positions()
            if positions is not None and positions - workload.new_tokens < most:
                most = positions - workload.new_tokens
                end = (
                    f"{most:,} tokens: the model knows {positions:,} positions, {workload.new_tokens:,} for the answer"
                )
            return self._largest(
                _prompts(workload.prompt_tokens, most), lambda size: replace(workload, prompt_tokens=size),
                what="prompt", end=end,
            )  # fmt: skip
        return self._plan(workload)

    def _plan(self, workload: Workload) -> Plan:
        """Return the plan for one piece of work, with its prediction.

        Raises:
            InfeasibleError: it does not fit. _CutOffError: the time is up, and there is an answer already.
        """
        rules = self.rules
        if self._interrupted:
            raise _CutOffError
        if self._end_s is not None:
            left_s = self._end_s - time.monotonic()
            if left_s <= 0 and self._answered:
                raise _CutOffError
            rules = replace(rules, time_limit_s=max(left_s, 0.1))
        try:
            plan = self.question.plan(self.hardware, _solved(workload), rules)
        except NoSolutionInTimeError:
            if self._answered:
                raise _CutOffError from None
            raise
        self._answered = True
        if plan.solver is not None and plan.solver.cut_short != "no":
            self._finished = False
            self._interrupted = plan.solver.cut_short == "interrupt"
        work = replace(plan.workload, objective=workload.objective)
        return replace(plan, workload=work, rules=self.rules, prediction=self.predict(plan))

    def _fitting(self, workload: Workload) -> Plan | None:
        try:
            return self._plan(workload)
        except InfeasibleError:
            return None

    def _largest(self, sizes: Sequence[int], at: Callable[[int], Workload], *, what: str, end: str) -> Plan:
        """Return the plan for the largest of the ascending `sizes` that fits, of which the first must.

        Two traces tell roughly where memory ends: between them every size's bytes are taken to lie on a line, and such
        made-up graphs are solved, which is cheaper than to trace. What they say is then tried with traces, until a size
        fits and the next one does not.
        """
        best = self._plan(at(sizes[0]))
        low, high, tried, slow = 0, len(sizes), [0], 0
        graphs = {0: best.graph}
        try:
            while high - low > 1:
                width, least = high - low, 2 * sizes[low]
                if slow <= 2:
                    probe = self._guess(sizes, low, high, graphs, at)
                else:
                    probe = (low + high) // 2 if high in graphs else _first_from(sizes, least, low + 1, high - 1)
                plan = self._fitting(at(sizes[probe]))
                tried.append(probe)
                work = _solved(at(sizes[probe]))
                graphs[probe] = self.question.graph(self.hardware, work) if plan is None else plan.graph
                if [entry.spans for entry in graphs[probe].passes] == [entry.spans for entry in graphs[0].passes]:
                    raise InputError(f"what this model takes does not depend on its {what}, so there is no largest one")
                low, high = (low, probe) if plan is None else (probe, high)
                best = best if plan is None else plan
                is_slow = 2 * (high - low) > width if high in graphs else sizes[low] < least
                slow = slow + 1 if is_slow and slow <= 2 else 0
        except (_CutOffError, KeyboardInterrupt):
            self._finished = False
        return _noted(best, _largest_note(sizes, low, high, tried, what, end) + _left_to_cpu(best))

    def _guess(
        self,
        sizes: Sequence[int],
        low: int,
        high: int,
        graphs: dict[int, LayerGraph],
        at: Callable[[int], Workload],
    ) -> int:
        """Return the index to try next, between `low`, which fits, and `high`, which does not or is past the end."""
        if len(graphs) == 1:
            return _first_from(sizes, _SECOND_TIMES * sizes[low], low + 1, high - 1)
        other = high
        if high not in graphs:
            high = 1 + _first_from(sizes, _TRUSTED_TIMES * sizes[low], low + 1, high - 1)
            far = [index for index in graphs if 2 * sizes[index] <= sizes[low]]
            other = max(far) if far else min(graphs)
        if other == low or not alike(graphs[low], graphs[other]):
            return (low + high) // 2
        fits, beyond = low, high
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            part = (sizes[middle] - sizes[low], sizes[other] - sizes[low])
            if self._would_fit(between(graphs[low], graphs[other], part), at(sizes[middle])):
                fits = middle
            else:
                beyond = middle
        return max(fits, low + 1)

    def _would_fit(self, graph: LayerGraph, workload: Workload) -> bool:
        from planner.placement.solution import find

        try:
            find(graph, self.hardware, _solved(workload), self.rules)
        except (InfeasibleError, NoSolutionInTimeError):
            return False
        return True

    def _throughput(self, workload: Workload) -> Plan:
        """Return the plan of the batch with the most tokens a second: doubled while that pays, then closed in upon."""
        floor = workload.batch_size
        most = MOST_TOKENS // (workload.prompt_tokens + workload.new_tokens)
        best = self._plan(workload)
        rates = {floor: tokens_per_s(best)}

        def tries(batch: int) -> bool:
            """Tell whether a batch is the best so far."""
            nonlocal best
            plan = self._fitting(replace(workload, batch_size=batch))
            rates[batch] = 0.0 if plan is None else tokens_per_s(plan)
            if plan is None or rates[batch] <= tokens_per_s(best):
                return False
            best = plan
            return True

        try:
            batch, fruitless = 2 * floor, 0
            while batch <= most and fruitless < _FRUITLESS_DOUBLINGS:
                fruitless = 0 if tries(batch) else fruitless + 1
                if not rates[batch]:
                    break
                batch *= 2
            middle = best.workload.batch_size
            below = max((size for size in rates if size < middle), default=middle)
            above = min((size for size in rates if size > middle), default=most + 1)
            while max(middle - below, above - middle) > max(1, middle // _BATCH_FINENESS):
                up = above - middle >= middle - below
                batch = (middle + above) // 2 if up else (below + middle + 1) // 2
                if tries(batch):
                    below, above = (middle, above) if up else (below, middle)
                    middle = batch
                elif up:
                    above = batch
                else:
                    below = batch
        except (_CutOffError, KeyboardInterrupt):
            self._finished = False
        told = ", ".join(f"{size:,}{'' if rates[size] else ' (does not fit)'}" for size in sorted(rates))
        return _noted(
            best,
            f"throughput: the batch of {best.workload.batch_size:,} gave the most tokens a second of those tried, "
            f"{told}; the proof is for the placement at that batch, not for the choice of it",
        )


def _solved(workload: Workload) -> Workload:
    """Return the work with what the solver itself makes least while a search varies the sizes."""
    return replace(workload, objective="latency") if workload.objective in _SOLVED_AS_LATENCY else workload


def tokens_per_s(plan: Plan) -> float:
    """Return new tokens a second over the whole call, prefill included, as simulated."""
    total_ns = _predicted(plan).total_ns
    return plan.workload.rows * plan.workload.new_tokens * 1e9 / total_ns if total_ns else 0.0


def _predicted(plan: Plan) -> Prediction:
    assert plan.prediction is not None
    return plan.prediction


def _time_ns(plan: Plan) -> int:
    """Return the simulated time that the plan's objective is about, in ns."""
    prediction = _predicted(plan)
    if plan.workload.objective == "ttft":
        return prediction.prefill_ns
    if plan.workload.objective == "tpot":
        return prediction.decode_ns_per_token
    return prediction.total_ns


def _score(plan: Plan) -> tuple[float, ...]:
    """Return by what plans for different work are compared: the least is best, and of equals the fastest."""
    work, total_ns = plan.workload, _predicted(plan).total_ns
    if work.objective == "throughput":
        return -tokens_per_s(plan), total_ns
    if work.objective == "max-batch":
        return -work.batch_size, total_ns
    if work.objective == "max-context":
        return -work.prompt_tokens, total_ns
    if work.objective == "fit":
        return _held_bytes(plan), total_ns
    return _time_ns(plan), total_ns


def _achieved(plan: Plan) -> str:
    """Return in words what a plan's score is."""
    if plan.workload.objective == "throughput":
        return f"{tokens_per_s(plan):.4g} tokens/s at a batch of {plan.workload.batch_size:,}"
    if plan.workload.objective == "max-batch":
        return f"a batch of {plan.workload.batch_size:,}"
    if plan.workload.objective == "max-context":
        return f"a prompt of {plan.workload.prompt_tokens:,} tokens"
    if plan.workload.objective == "fit":
        return f"{_held_bytes(plan):,} bytes"
    return format_ns(_time_ns(plan))


def _cut_words(chunk_tokens: int | None) -> str:
    """Return in words how the prompt is cut."""
    return "the prompt at once" if chunk_tokens is None else f"chunks of {chunk_tokens:,}"


def _held_bytes(plan: Plan) -> int:
    """Return the bytes of all memories but disks at their peaks."""
    disks = {plan.hardware.disk(pool.name) for pool in plan.hardware.pools}
    return sum(nbytes for name, nbytes in _predicted(plan).peak_bytes.items() if name not in disks)


def _noted(plan: Plan, note: str) -> Plan:
    return replace(plan, assumptions=(*plan.assumptions, note))


def _largest_note(sizes: Sequence[int], low: int, high: int, tried: Sequence[int], what: str, end: str) -> str:
    unit = " tokens" if what == "prompt" else ""
    words = f"{'longest prompt' if what == 'prompt' else 'largest batch'} that fits: {sizes[low]:,}{unit}"
    if high == low + 1 and high < len(sizes):
        words += f"; the next one tried, {sizes[high]:,}, is proven not to fit"
    elif high == len(sizes) and low == len(sizes) - 1:
        words += f"; nothing beyond was tried (the end is {end})"
    else:
        words += "; whether more fits was not settled"
    step = f" in steps of {CONTEXT_STEP_TOKENS}" if what == "prompt" and len(sizes) > 1 else ""
    traced = ", ".join(f"{sizes[index]:,}" for index in sorted(tried))
    return f"{words}; searched from {sizes[0]:,} to {sizes[-1]:,}{step}, by planning {traced}"


def _left_to_cpu(plan: Plan) -> str:
    """Return in words that what fits does so with the CPU's help, where there are GPUs."""
    hosts = {device.name for device in plan.hardware.hosts}
    number = sum(device in hosts for device in plan.run_on())
    if not plan.hardware.gpus or not number:
        return ""
    return f"; {number} of {len(plan.graph.layers)} layers run on the CPU there (--pin keeps layers on a GPU)"


def _prompts(floor: int, most: int) -> Sequence[int]:
    """Return the prompts to choose from: the floor, multiples of the step above it, and the most that there can be."""
    first = floor - floor % CONTEXT_STEP_TOKENS + CONTEXT_STEP_TOKENS
    between = range(first, most, CONTEXT_STEP_TOKENS)
    return [floor, *between, most] if most > floor else [floor]


def _first_from(sizes: Sequence[int], least: int, start: int, stop: int) -> int:
    """Return the first index from `start` whose size is at least `least`; at most `stop`."""
    while start < stop:
        middle = (start + stop) // 2
        if sizes[middle] < least:
            start = middle + 1
        else:
            stop = middle
    return stop


def _capped(hardware: Hardware, pools: Sequence[str], share: int) -> Hardware:
    """Return the machine with some pools held to so many parts of all."""
    if share == FRONTIER_SHARES:
        return hardware
    held = tuple(
        replace(pool, capacity_bytes=pool.capacity_bytes * share // FRONTIER_SHARES) if pool.name in pools else pool
        for pool in hardware.pools
    )
    note = f"GPUs held to {share}/{FRONTIER_SHARES} of their memory, to trade it for time"
    return replace(hardware, pools=held, assumptions=(*hardware.assumptions, note))

"""The frontier of the GPUs' memory against time, as a table of 80 columns and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

from planner import phrases
from planner.commands import rules_options
from planner.commands.layout import Page, parameters_words
from planner.search import FrontierPoint
from planner.serial import encode
from planner.units import format_bytes, format_ns

_TIMES = {"latency": "whole call", "ttft": "first token", "tpot": "each token"}
_COLUMNS = (12, 13, 13, 11, 14, 12)


def as_json(points: Sequence[FrontierPoint]) -> str:
    """Return the points with their plans as one JSON document."""
    return json.dumps({"frontier": [encode(point) for point in points]}, indent=1, ensure_ascii=False)


def render(points: Sequence[FrontierPoint], *, color: bool = False) -> str:
    """Return the points as text, no line wider than 80 columns."""
    page = Page(color=color)
    plan = points[-1].plan
    work = plan.workload
    page.paragraph(plan.model.id, style="bold")
    page.paragraph(
        f"{parameters_words(plan.model.num_parameters)} parameters in {plan.model.weight_dtype}, "
        f"batch {work.batch_size:,}, prompt {work.prompt_tokens:,} tokens, {work.new_tokens:,} new; "
        f"the aim is {rules_options.aim(work)}"
    )
    if rules := rules_options.words(plan):
        page.paragraph(f"rules: {rules}")
    page.heading("Memory of the GPUs against time")
    page.line(_line(("GPU memory", "largest GPU", _TIMES[work.objective], "tokens/s", "not on GPUs", "proof")), "dim")
    for point in points:
        page.line(_line(_cells(point)))
    page.line()
    page.paragraph(
        "Memory is device-used at the peak: all GPUs together, and the fullest of them. Each line is the best plan "
        "with every GPU held to a share of its memory (from none to all, in twelfths); lines that take more memory and "
        "no less time are left out. For one of them, ask again with --max-memory.",
        style="dim",
    )
    return page.text()


def _cells(point: FrontierPoint) -> tuple[str, ...]:
    plan = point.plan
    assert plan.prediction is not None
    gpus = {gpu.name for gpu in plan.hardware.gpus}
    fullest = max(plan.prediction.peak_bytes[gpu.pool] for gpu in plan.hardware.gpus)
    outside = sum(
        nbytes["weights"]
        for name, nbytes in plan.prediction.peak_breakdown.items()
        if name not in {gpu.pool for gpu in plan.hardware.gpus} | gpus
    )
    proof = "none"
    if plan.solver is not None:
        proof = "optimal" if plan.solver.status == "optimal" else f"gap {phrases.gap(plan.solver)}"
    rate = plan.prediction.tokens_per_s
    return (
        format_bytes(point.memory_bytes),
        format_bytes(fullest),
        format_ns(point.time_ns),
        f"{rate:,.0f}" if rate >= 1000 else f"{rate:.3g}",
        format_bytes(outside),
        proof,
    )


def _line(cells: Sequence[str]) -> str:
    return "".join(cell.rjust(width) for cell, width in zip(cells, _COLUMNS, strict=True))

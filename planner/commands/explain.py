"""`plan explain plan.json [LAYER]`: why a plan is as it is, what binds, and what more of something would buy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from planner.commands import options
from planner.commands.layout import WIDTH, Page, column_widths, fold
from planner.commands.progress import Progress
from planner.phrases import cpu_words, device_list
from planner.plan import Plan
from planner.serial import encode
from planner.units import format_bytes, format_ns

if TYPE_CHECKING:
    from planner.explanation import Answer, Change, Explanation, GroupReason, LayerReason, MemoryUse

_OBJECTIVES = {
    "latency": "the whole call's time", "ttft": "the prefill's time", "tpot": "a decode step's time", "fit": "memory",
}  # fmt: skip


def run(argv: Sequence[str]) -> int:
    """Solve the plan's question again with one thing changed at a time, then print what came of it."""
    parser = options.Parser(
        prog="plan explain",
        description="Tell why a saved plan is as it is. Every figure is from solving again.",
    )
    parser.add_argument("plan", metavar="PLAN.json", help="a plan that plan --out wrote")
    parser.add_argument("layer", metavar="LAYER", nargs="?", help="also tell why this layer is where it is")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="let each search take at most so long")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    options.add_color_option(parser)
    options.add_output_options(parser)
    args = parser.parse_args(argv)
    plan = Plan.load(args.plan)
    with Progress(quiet=args.quiet) as progress:
        from planner.explanation import explain

        explanation = explain(plan, args.layer, time_limit_s=args.time_limit, report=progress.report)
    if args.json:
        options.say_json(json.dumps(encode(explanation), indent=1, ensure_ascii=False))
        return 0
    options.say(render(explanation, color=options.wants_color(args.color)))
    return 0


def render(explanation: Explanation, *, color: bool = False) -> str:
    """Return the explanation as text of at most 80 columns."""
    page = Page(color=color)
    page.paragraph(explanation.model, style="bold")
    what = _OBJECTIVES.get(explanation.objective, "the whole call's time")
    proof = "proven optimal" if explanation.status == "optimal" else "not proven optimal: figures may be off by the gap"
    page.paragraph(
        f"Planned for the least of {what}: {_cost(explanation, explanation.objective_ns)}, {proof}. "
        "Each figure below is the cost of the same question solved again with one thing changed, against that."
    )
    if explanation.layer is not None:
        _layer(page, explanation, explanation.layer)
    _binding(page, explanation)
    page.heading("What more would buy")
    _table(page, [(_words(change), *_bought(explanation, change.answer)) for change in explanation.changes])
    page.line()
    page.paragraph(f"Costs are those of the model {explanation.cost_model}.", style="dim")
    if explanation.popularity is not None:
        page.paragraph(f"{explanation.popularity[:1].upper()}{explanation.popularity[1:]}.", style="dim")
    return page.text()


def _binding(page: Page, explanation: Explanation) -> None:
    page.heading("What binds")
    rows = []
    for cells, same in groupby(explanation.memories, key=lambda use: _use_cells(use, explanation)):
        names = [use.name for use in same]
        rows.append((device_list(names) + (" each" if len(names) > 1 else ""), *cells))
    _table(page, [row for row in rows if row[1]])


def _use_cells(use: MemoryUse, explanation: Explanation) -> tuple[str, str, str]:
    if use.largest_kind is None and not use.binds:
        return "", "", ""
    percent = f" ({100 * use.used_bytes // use.usable_bytes}%)" if use.usable_bytes else ""
    full = f"{format_bytes(use.used_bytes)} of {format_bytes(use.usable_bytes)}{percent}"
    kind = use.largest_kind
    held = "unused" if kind is None else f"{kind.replace('_', ' ')} {format_bytes(use.by_kind[kind])}"
    if not use.binds:
        return full, held, "does not bind"
    return full, held, f"binds: with no limit {_bought(explanation, use.unbounded)[0]} less"


def _words(change: Change) -> str:
    where = device_list(change.where)
    several = "one of " if len(change.where) > 1 else ""
    return {
        "memory": f"1 GiB more on {several}{where}",
        "host link": f"twice the host link of {where}",
        "device link": f"twice the links among {where}",
        "disk": "twice the disk's speed",
    }[change.what]


def _layer(page: Page, explanation: Explanation, reason: LayerReason) -> None:
    page.heading(f"Why {reason.layer or '(the model itself)'} runs on {reason.run_on}")
    if reason.pinned:
        page.paragraph("A rule of the plan pins it there.", first="  ")
    if reason.alternatives:
        _table(
            page,
            [(f"on {device_list(entry.where)}", *_price(explanation, entry.answer)) for entry in reason.alternatives],
        )
    else:
        page.paragraph("There is no other device.", first="  ")
    page.heading("Where its weights wait")
    _table(page, [(group.group, *_group(explanation, group)) for group in reason.groups])


def _group(explanation: Explanation, group: GroupReason) -> tuple[str, str]:
    size = format_bytes(group.nbytes)
    if group.waiting_bytes == 0:
        return size, f"stays on {group.run_on}"
    part = "" if group.waiting_bytes == group.nbytes else f"{format_bytes(group.waiting_bytes)} "
    waits = (
        f"{part}waits {'in' if group.home.endswith('cpu') else 'on'} {group.home}{cpu_words(group.cpu_up_to_tokens)}"
    )
    if group.kept is None:
        return size, f"{waits}, where the host reads it"
    if group.kept.saved_ns is None:
        return size, f"{waits}; keeping it at hand: {_price(explanation, group.kept)[0]}"
    price = _price(explanation, group.kept)
    told = "costs nothing: others would wait instead" if group.kept.saved_ns == 0 else f"is {' '.join(price)}"
    return size, f"{waits}; keeping it at hand {told}"


def _bought(explanation: Explanation, answer: Answer) -> tuple[str, str]:
    """Return what an answer saves, and how sure that is."""
    if answer.saved_ns is None:
        return "not known", answer.reason or ""
    if answer.saved_ns == 0:
        return "nothing", _proof(answer)
    sign = "-" if answer.saved_ns < 0 else ""
    told = f"{sign}{_cost(explanation, abs(answer.saved_ns))} ({sign}{_percent(answer)})"
    return told, _proof(answer)


def _price(explanation: Explanation, answer: Answer) -> tuple[str, str]:
    """Return by how much an answer is slower, and how sure that is."""
    if answer.saved_ns is None:
        told = "does not fit" if answer.status == "infeasible" else "not known"
        return told, (answer.reason or "").removeprefix("nothing fits: ")
    if answer.saved_ns == 0:
        return "as good", _proof(answer)
    word = ("slower" if answer.saved_ns < 0 else "faster") if explanation.objective != "fit" else "away"
    return f"{_cost(explanation, abs(answer.saved_ns))} {word} ({_percent(answer)})", _proof(answer)


def _percent(answer: Answer) -> str:
    percent = abs(answer.saved_percent or 0.0)
    return f"{percent:,.0f}%" if percent >= 100 else f"{percent:.3g}%" if percent >= 0.001 else "<0.001%"


def _proof(answer: Answer) -> str:
    return "" if answer.status == "optimal" else "not proven"


def _cost(explanation: Explanation, cost: int) -> str:
    return format_bytes(cost) if explanation.objective == "fit" else format_ns(cost)


def _table(page: Page, rows: Sequence[tuple[str, ...]]) -> None:
    """Add rows of cells in columns; the last column is folded where it does not fit."""
    if not rows:
        return
    last = len(rows[0]) - 1
    widths = column_widths(rows, least={last: 20, 0: 20}, total=WIDTH - 2, gap=2)
    for row in rows:
        folded = [fold(cell, max(1, width)) or [""] for cell, width in zip(row, widths, strict=True)]
        for number in range(max(len(parts) for parts in folded)):
            cells = [parts[number] if number < len(parts) else "" for parts in folded]
            page.line("  " + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)))

"""Plan → text for a terminal of 80 columns: the answer, then where, how much, how fast, and why."""

# ruff: noqa: RUF001 - the dash of an empty cell and the sign of multiplication are meant
from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from planner import phrases
from planner.commands import rules_options
from planner.commands.layout import WIDTH, Page, column_widths, fold, parameters_words
from planner.commands.placement_table import placement_rows, table_lines
from planner.memory import waiting_slices, with_groups
from planner.phrases import device_list
from planner.plan import KINDS_OF_MEMORY, Plan, Prediction
from planner.units import GB, MB, format_bytes, format_ns

_LABEL = 9
_HEADINGS = {
    "kv_cache": ("kv", "cache"),
    "activations": ("activ-", "ations"),
    "workspace": ("work-", "space"),
}


def render(plan: Plan, *, color: bool = False) -> str:
    """Return the plan as text, no line wider than 80 columns."""
    page = Page(color=color)
    _head(page, plan)
    _placement(page, plan)
    if plan.prediction is None:
        page.heading("Prediction")
        page.paragraph("None: these placements were given, not found by the planner.", first="  ")
    else:
        _memory(page, plan, plan.prediction)
        _time(page, plan, plan.prediction)
    _proof(page, plan)
    page.heading("Assumptions")
    for note in plan.assumptions:
        page.paragraph(note, first="  - ", style="dim")
    return page.text()


def _head(page: Page, plan: Plan) -> None:
    model = plan.model
    page.paragraph(model.id, style="bold")
    parameters = f"{parameters_words(model.num_parameters)} parameters in {model.weight_dtype}"
    _labelled(page, "model", f"{parameters}, {format_bytes(model.weight_bytes)}")
    _labelled(page, "", model.note)
    _labelled(page, "machine", _machine(plan))
    _labelled(page, "work", phrases.work(plan))
    _labelled(page, "aim", rules_options.aim(plan.workload))
    if rules := rules_options.words(plan):
        _labelled(page, "rules", rules)
    text, style = _answer(plan)
    _labelled(page, "answer", text, style)


def _labelled(page: Page, label: str, text: str, style: str | None = None) -> None:
    page.paragraph(text, first=label.ljust(_LABEL), style=style)


def _machine(plan: Plan) -> str:
    """Return GPUs and hosts, alike nodes together."""
    hardware = plan.hardware
    if len(hardware.nodes) == 1:
        return _node(plan, hardware.nodes[0])
    alike: dict[str, list[str]] = {}
    for node in hardware.nodes:
        alike.setdefault(_node(plan, node), []).append(node)
    return "; ".join(
        f"{device_list(nodes)}{' each' if len(nodes) > 1 else ''}: {text}" for text, nodes in alike.items()
    )


def _node(plan: Plan, node: str) -> str:
    hardware = plan.hardware
    gpus = [gpu for gpu in hardware.gpus if hardware.node(gpu.name) == node]
    words = []
    for (product, nbytes), same in groupby(gpus, key=lambda g: (g.product, hardware.pool(g.pool).usable_bytes)):
        number = len(list(same))
        words.append(f"{number} × {product} ({format_bytes(nbytes)} usable{' each' if number > 1 else ''})")
    words = words or ["no GPU"]
    for host in hardware.hosts:
        if hardware.node(host.name) == node:
            words.append(f"host RAM {format_bytes(hardware.pool(host.pool).capacity_bytes)}")
            words.append(f"disk {format_bytes(hardware.pool(hardware.disk(host.name)).capacity_bytes)}")
    return ", ".join(words)


def _answer(plan: Plan) -> tuple[str, str]:
    used = {p.run_on for p in plan.placements}
    hosts = {host.name for host in plan.hardware.hosts}
    waiting = [p for p, group in with_groups(plan.graph, plan.placements) if waiting_slices(p, group)]
    where = f"runs on {device_list([device.name for device in plan.hardware.devices if device.name in used])}"
    if any(p.home in hosts for p in waiting):
        where += ", some weights wait in host RAM"
    if any(p.cpu_up_to_tokens for p in waiting):
        where += ", where the CPU computes experts"
    if any(p.memory == "disk" for p in plan.placements):
        where += ", some weights stay on disk"
    prediction = plan.prediction
    if prediction is None:
        return f"{where}; nothing is predicted", "bold"
    over = {name: nbytes - _usable_bytes(plan, name) for name, nbytes in prediction.peak_bytes.items()}
    worst = max(over, key=lambda name: over[name])
    if over[worst] > 0:
        return f"DOES NOT FIT: {worst} would hold {format_bytes(over[worst])} too much", "bad"
    return f"fits: {where}; {_speed(plan, prediction)}", "good"


def _speed(plan: Plan, prediction: Prediction) -> str:
    if not prediction.decode_ns_per_token:
        return f"the prompt takes {format_ns(prediction.prefill_ns)}"
    return f"{_rate(plan, prediction)}, the first after {format_ns(prediction.prefill_ns)}"


def _rate(plan: Plan, prediction: Prediction) -> str:
    rate = prediction.tokens_per_s
    text = f"{rate:,.0f}" if rate >= 1000 else f"{rate:.3g}"
    batch = f" (the batch of {plan.workload.batch_size:,} together)" if plan.workload.batch_size > 1 else ""
    return f"{text} tokens/s{batch}"


def _placement(page: Page, plan: Plan) -> None:
    page.heading("Where every layer goes")
    rows = placement_rows(plan)
    head, *lines = table_lines(rows, WIDTH - 2)
    page.line(f"  {head}", "dim")
    for line in lines:
        page.line(f"  {line}")
    if any(row.only_counted for row in rows):
        page.paragraph("Layers that are only counted here are named in the plan (--json, --out).", first="  ")
    for sentence in (phrases.cpu_experts(plan), _copies(plan), phrases.precisions(plan), phrases.over_nodes(plan)):
        if sentence is not None:
            page.paragraph(f"{sentence}.", first="  ")
    for names in plan.graph.ties:
        page.paragraph(f"Shared, and stored once in each place: {', '.join(names)}.", first="  ")


def _copies(plan: Plan) -> str | None:
    """Return how what waits comes to where it runs, and through which slots; None where nothing is copied."""
    waiting = [p for p, group in with_groups(plan.graph, plan.placements) if waiting_slices(p, group)]
    if not waiting:
        return None
    alike: dict[str, list[str]] = {}
    for entry in plan.slots:
        what = f"{entry.count} slots of" if entry.count != 1 else "one slot of"
        what += f" {format_bytes(entry.slot_bytes)}" + (" for single experts" if entry.holds == "experts" else "")
        alike.setdefault(what, []).append(entry.device)
    slots = [f"{what} on {device_list(names)}{' each' if len(names) > 1 else ''}" for what, names in alike.items()]
    through = f", through {'; '.join(slots)}" if slots else ""
    copied = [p for p in waiting if not p.cpu_up_to_tokens]
    if not copied:
        return f"Copies go through {'; '.join(slots)}" if slots else None
    other = "What else" if len(copied) < len(waiting) else "What"
    return f"{other} is kept elsewhere than it runs is copied there each time it is needed{through}"


def _usable_bytes(plan: Plan, name: str) -> int:
    pools = {device.name: device.pool for device in plan.hardware.devices}
    return plan.hardware.pool(pools.get(name, name)).usable_bytes


def _memory(page: Page, plan: Plan, prediction: Prediction) -> None:
    """Add a table of every memory's peak, alike neighbours in one row; kinds found nowhere are left out."""
    names = [name for name in _memory_order(plan) if name in prediction.peak_bytes]
    disks = {plan.hardware.disk(host.name) for host in plan.hardware.hosts}
    empty = phrases.unused(plan)
    names = [name for name in names if name not in empty and (name not in disks or prediction.peak_bytes[name])]
    kinds = [k for k in KINDS_OF_MEMORY if any(prediction.peak_breakdown.get(n, {}).get(k) for n in names)]
    largest = max((prediction.peak_bytes[name] for name in names), default=0)
    unit, word = (GB, "GB") if largest >= GB else (MB, "MB")
    rows = []
    for cells, same in groupby(names, key=lambda name: _memory_cells(plan, prediction, name, kinds, unit)):
        alike = list(same)
        rows.append((device_list(alike) + (" each" if len(alike) > 1 else ""), *cells))
    heads = [("", ""), ("", "peak"), ("", "usable"), ("", "used"), ("", "free")]
    heads += [_HEADINGS.get(kind, ("", kind.replace("_", " "))) for kind in kinds]
    page.heading(f"Memory at the peak, in {word} ({'10^9' if unit == GB else '10^6'} bytes)")
    top, bottom = zip(*heads, strict=True)
    widths = column_widths([top, bottom, *rows], least={0: 8}, total=WIDTH - 2, gap=1)
    spare = WIDTH - 2 - sum(widths) - (len(widths) - 1)
    gap = " " * (2 if spare >= len(widths) - 1 else 1)
    for number, row in enumerate((top, bottom, *rows)):
        first, *others = fold(row[0], widths[0]) or [""]
        cells_text = [first.ljust(widths[0])]
        cells_text += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        page.line(f"  {gap.join(cells_text)}", "dim" if number < 2 else None)
        for other in others:
            page.line(f"  {other}")
    if empty:
        page.paragraph(f"Nothing is held on {device_list(empty)}.", first="  ")
    reserved: dict[tuple[int, int], list[str]] = {}
    for pool in plan.hardware.pools:
        if pool.reserved_bytes and pool.name in names:
            reserved.setdefault((pool.capacity_bytes, pool.reserved_bytes), []).append(pool.name)
    for (capacity, kept), pools in reserved.items():
        each = " each" if len(pools) > 1 else ""
        page.paragraph(
            f"{device_list(pools)}: {format_bytes(capacity)}{each}, of which {format_bytes(kept)} is not planned for.",
            first="  ",
        )


def _memory_order(plan: Plan) -> list[str]:
    """Return the memories' names: GPUs of all nodes, then hosts, then disks."""
    devices = [device.name for device in (*plan.hardware.gpus, *plan.hardware.hosts)]
    return [*devices, *(pool.name for pool in plan.hardware.pools if pool.name not in devices)]


def _memory_cells(plan: Plan, prediction: Prediction, name: str, kinds: Sequence[str], unit: int) -> tuple[str, ...]:
    peak, usable = prediction.peak_bytes[name], _usable_bytes(plan, name)
    used = f"{100 * peak // usable}%" if usable else "–"
    breakdown = prediction.peak_breakdown.get(name, {})
    numbers = [_number(breakdown.get(kind, 0), unit) for kind in kinds]
    return _number(peak, unit), _number(usable, unit), used, _number(usable - peak, unit), *numbers


def _number(nbytes: int, unit: int) -> str:
    value = nbytes / unit
    if nbytes == 0:
        return "–"
    if 0 < value < 0.005:
        return "<0.01"
    return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def _time(page: Page, plan: Plan, prediction: Prediction) -> None:
    work = plan.workload
    page.heading("Time, simulated")
    cut = "" if work.prefill_chunk is None else f", in chunks of {work.prefill_chunk:,}"
    rows = [
        (
            "prefill",
            format_ns(prediction.prefill_ns),
            f"for {work.prompt_tokens:,} tokens of prompt{cut}{_range(prediction.prefill_ns_range)}",
        )
    ]
    if prediction.decode_ns_per_token:
        rows.append(
            (
                "decode",
                format_ns(prediction.decode_ns_per_token),
                f"per token, which is {_rate(plan, prediction)}{_range(prediction.decode_ns_range)}",
            )
        )
    elif work.caller == "generate":
        rows.append(("decode", "none", "the one new token comes with the prefill"))
    made = f"all {work.new_tokens:,} new tokens" if work.caller == "generate" else "one forward pass"
    minutes = f", {prediction.total_ns / 60e9:,.0f} minutes" if prediction.total_ns >= 120 * 10**9 else ""
    rows.append(("whole call", format_ns(prediction.total_ns), f"for {made}{minutes}"))
    held = format_bytes(phrases.load_peak_bytes(plan))
    where = "host RAM" if len(plan.hardware.hosts) == 1 else "a host's RAM"
    words = f"once, from disk; takes at most {held} of {where}"
    rows.append(("loading", format_ns(prediction.load_ns), words))
    for name, duration, words in rows:
        page.paragraph(words, first=f"  {name:<10}  {duration:>9}  ")


def _range(ends: Sequence[int]) -> str:
    """Return from what to what a time lies by the spread of what was measured, if any was."""
    return f"; {format_ns(ends[0])} to {format_ns(ends[1])} by the spread of the rates" if ends else ""


def _proof(page: Page, plan: Plan) -> None:
    page.heading("Proof")
    solver = plan.solver
    if solver is None:
        page.paragraph(f"{phrases.proof(plan)}.", first="  ")
        return
    style = "good" if solver.status == "optimal" else "bold"
    page.paragraph(f"{phrases.proof(plan)}; objective {phrases.objective(plan)}.", first="  ", style=style)
    if (ended := phrases.cut_short(solver)) is not None:
        page.paragraph(f"{ended}.", first="  ", style="bold")
    if plan.workload.objective in ("throughput", "max-batch", "max-context"):
        page.paragraph("That is for the batch and prompt chosen; the assumptions say how they were.", first="  ")
    if (found := phrases.bound(plan)) is not None:
        what, bound_ns, simulated_ns = found
        apart = simulated_ns / bound_ns - 1
        words = f" ({abs(apart):.1%} {'more' if apart > 0 else 'less'})" if abs(apart) >= 0.0005 else ""
        page.paragraph(
            f"By the cost model {what} takes at least {format_ns(bound_ns)}; the simulator, which times every copy and "
            f"layer in turn, gives {format_ns(simulated_ns)}{words}.",
            first="  ",
        )
    page.paragraph(f"Cost model: {solver.cost_model}.", first="  ", style="dim")

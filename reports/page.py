"""Plan, Timeline → one HTML file that opens offline: the answer first, then figures, then tables."""

# ruff: noqa: RUF001 - the dash of an empty cell and the sign before a GPU's name are meant
from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from planner import phrases
from planner.plan import KINDS_OF_MEMORY, Plan
from planner.serial import write_text
from planner.units import format_bytes, format_ns
from reports import figures, time_figures
from reports.placement_rows import placement_rows
from reports.style import (
    CSS,
    GPU_COLOURS,
    LIMIT_COLOUR,
    SCRIPT,
    kind_colour,
    kind_words,
    place_colours,
)
from simulate.energy import energy_joules
from simulate.timeline import Timeline

# Nothing may be fetched: the browser itself refuses what this policy does not name.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_NO_PREDICTION = "This plan carries no prediction: its placements were given, not found by the planner."
_NO_SOLVER = "No solver was run for this plan, so nothing is proven about how good it is."
_NO_TIMELINE = "The timeline is empty: the call was not simulated."


def write_report(plan: Plan, timeline: Timeline, path: str | Path) -> None:
    """Write the report on `plan` to `path`, all or nothing.

    Raises:
        InputError: the path cannot be written; what was there before is still there.
    """
    write_text(path, page_html(plan, timeline))


def page_html(plan: Plan, timeline: Timeline) -> str:
    """Return the report as the text of one HTML file, about 5 MB, nearly all of it plotly.js."""
    drawn = _figures(plan, timeline)
    title = f"Load plan of {plan.model.id}"
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title><style>{CSS}</style></head><body><main>",
        _headline(plan),
        _numbers(plan, timeline),
        *(_figure_section(plan, key, drawn.get(key)) for key in _FIGURES),
        _lane_table(plan, timeline),
        _device_table(plan),
        _placement_table(plan),
        _assumptions(plan),
        _solver(plan),
        _versions(plan),
        "</main>",
        f"<script>{get_plotlyjs()}</script>",
        f"<script>const FIGURES = {_figures_json(drawn)};{SCRIPT}</script></body></html>\n",
    ]
    # A name from the command line may hold bytes that are no UTF-8; the report shows them as "?".
    return "\n".join(parts).encode("utf-8", "replace").decode("utf-8")


def _text(value: object) -> str:
    return html.escape(str(value))


# key: (heading, what it shows, what is said where there is nothing to draw)
_FIGURES = {
    "placement": (
        "Where every weight waits and every layer runs",
        "Colour is where the weights wait. A cell that has not the colour of its layer in the top row is "
        "streamed; of experts that are partly resident, the lower part of the cell stays. Point at or tap a "
        "cell for its bytes.",
        "",
    ),
    "peaks": (
        "Memory at the predicted peak",
        "Every bar has its own scale; the dashed line is the capacity, and what is grey before it belongs to "
        "others. Shades of a place's colour are the kinds of memory there.",
        _NO_PREDICTION,
    ),
    "memory": (
        "Memory over time",
        "The darker part is what never changes (weights, slots, workspace, context); above it KV cache and "
        "activations. Dotted: between steps that were simulated.",
        _NO_TIMELINE,
    ),
    "lanes": (
        "What every lane does",
        "Lanes work at the same time. A copy has the colour of the place that it copies from; where the CPU "
        "computes experts, its own lane is busy and the GPU waits. Drag to look closer, double-click to go back.",
        _NO_TIMELINE,
    ),
}


def _figures(plan: Plan, timeline: Timeline) -> dict[str, Any]:
    drawn = {"placement": figures.placement_map(plan)}
    if plan.prediction is not None:
        drawn["peaks"] = figures.memory_by_device(plan)
    if timeline.memory and timeline.step_ns:
        drawn["memory"] = time_figures.memory_over_time(plan, timeline)
    if timeline.intervals and timeline.step_ns:
        drawn["lanes"] = time_figures.step_lanes(plan, timeline)
    return drawn


def _figures_json(drawn: dict[str, Any]) -> str:
    """Return the figures as a script's JSON, with nothing in it that could end the script."""
    data = {}
    for key, figure in drawn.items():
        content = figure.to_plotly_json()
        content["layout"].pop("template", None)
        data[f"plot-{key}"] = {"data": content["data"], "layout": content["layout"]}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return (
        text.replace("<", "\\u003c").replace(">", "\\u003e").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    )


def _headline(plan: Plan) -> str:
    model = plan.model
    gpus = [gpu.product for gpu in plan.hardware.gpus]
    counted = [f"{gpus.count(name)} × {name}" for name in dict.fromkeys(gpus)] or ["no GPU"]
    if len(plan.hardware.nodes) > 1:
        counted[-1] += f" in {len(plan.hardware.nodes)} nodes"
    alike: dict[tuple[str, int], list[str]] = {}
    for pool in plan.hardware.pools:
        alike.setdefault((_last(pool.name), pool.capacity_bytes), []).append(pool.name)
    memories = [
        f"{phrases.device_list(names)} {format_bytes(capacity_bytes)}{' each' if len(names) > 1 else ''}"
        for (_, capacity_bytes), names in alike.items()
    ]
    return (
        f"<header><h1>{_text(model.id)}</h1>"
        f"<p>{model.num_parameters / 1e9:,.2f} billion parameters in {_text(model.weight_dtype)}, "
        f"{format_bytes(model.weight_bytes)} · {_text(', '.join(counted))} · {_text(phrases.work(plan))}</p>"
        f'<p class="soft">{_text(", ".join(memories))}</p></header>'
    )


def _last(name: str) -> str:
    """Return what kind of memory a name is of: "cuda" for "node0/cuda:1"."""
    return name.rpartition("/")[2].partition(":")[0]


def _numbers(plan: Plan, timeline: Timeline) -> str:
    """Return the answer in a few big numbers: does it fit, how fast, and what is proven."""
    cards = [_fit_card(plan), *_time_cards(plan, timeline), _proof_card(plan)]
    items = "".join(
        f'<div><dt>{_text(name)}</dt><dd class="{tone}">{_text(value)}<small>{_text(note)}</small></dd></div>'
        for name, value, note, tone in cards
    )
    notes = "" if plan.prediction else f'<p class="bad" role="note">{_NO_PREDICTION}</p>'
    return f'<dl class="numbers" aria-label="The answer">{items}</dl>{notes}'


_Card = tuple[str, str, str, str]


def _fit_card(plan: Plan) -> _Card:
    if plan.prediction is None:
        return ("fits", "not predicted", "no prediction in the plan", "")
    peaks = plan.prediction.peak_bytes
    over = [(peaks.get(pool.name, 0) - pool.usable_bytes, pool.name) for pool in plan.hardware.pools]
    short = [(lacking, name) for lacking, name in over if lacking > 0]
    if short:
        lacking, name = max(short)
        return (
            "fits",
            "no",
            f"{len(short)} of {len(over)} too small; {name} lacks {format_bytes(lacking)}",
            "bad",
        )
    gpus = {gpu.pool for gpu in plan.hardware.gpus} or {pool.name for pool in plan.hardware.pools}
    spare, name = min((-lacking, name) for lacking, name in over if name in gpus)
    return ("fits", "yes", f"least room: {format_bytes(spare)} on {name}", "good")


def _time_cards(plan: Plan, timeline: Timeline) -> list[_Card]:
    """Return prefill, decode, rate and load cards; without a prediction, those that the timeline knows."""
    work = plan.workload
    whole = f"{work.batch_size * work.prompt_tokens:,} tokens"
    if plan.prediction is not None:
        seen = plan.prediction
        cards = [("prefill", format_ns(seen.prefill_ns), whole, "")]
        if seen.decode_ns_per_token:
            cards.append(("decode", f"{format_ns(seen.decode_ns_per_token)}", "per token, mean of all steps", ""))
        rate = seen.tokens_per_s
        digits = 0 if rate >= 100 else 1 if rate >= 10 else 2
        cards.append(("tokens/s", f"{rate:,.{digits}f}", f"whole call {format_ns(seen.total_ns)}", ""))
        held = format_bytes(phrases.load_peak_bytes(plan))
        cards.append(("loading", format_ns(seen.load_ns), f"once, before; {held} of a host's RAM at most", ""))
        return cards
    if not timeline.step_ns:
        return [("prefill", "not predicted", "nothing was simulated", "")]
    cards = [("prefill, simulated", format_ns(timeline.prefill_ns), whole, "")]
    if timeline.decode_ns_per_token:
        cards.append(("decode, simulated", format_ns(timeline.decode_ns_per_token), "per token, mean of all steps", ""))
    return cards


def _proof_card(plan: Plan) -> _Card:
    if plan.solver is None:
        return ("proof", "none", "no solver was run", "")
    if plan.solver.status == "optimal":
        return ("proof", "optimal", "none considered costs less under the cost model named below", "good")
    note = "at most this far above the best under the cost model named below"
    if plan.solver.cut_short != "no":
        note = f"{note}; the search was cut short"
    return ("proof", f"gap {phrases.gap(plan.solver)}", note, "")


def _figure_section(plan: Plan, key: str, figure: Any | None) -> str:
    heading, caption, absent = _FIGURES[key]
    if key == "peaks" and (empty := phrases.unused(plan)):
        caption = f"{caption} Nothing is held on {_text(phrases.device_list(empty))}."
    if figure is None:
        return f'<section aria-labelledby="h-{key}"><h2 id="h-{key}">{heading}</h2><p>{absent}</p></section>'
    return (
        f'<section aria-labelledby="h-{key}"><h2 id="h-{key}">{heading}</h2><figure>'
        f"<figcaption>{caption}</figcaption>{_key(plan, key)}"
        f'<div class="plot" id="plot-{key}" role="img" aria-label="{_text(_in_words(plan, key, heading))}" '
        f'style="min-height:{figure.layout.height}px"></div></figure></section>'
    )


def _in_words(plan: Plan, key: str, heading: str) -> str:
    """Return what a figure shows, for readers who cannot see it."""
    if key == "placement":
        return f"{heading}. " + "; ".join(row.words() for row in placement_rows(plan))
    if key == "peaks" and plan.prediction is not None:
        peaks = plan.prediction.peak_bytes
        return f"{heading}. " + "; ".join(
            f"{pool.name}: {format_bytes(peaks.get(pool.name, 0))} of {format_bytes(pool.capacity_bytes)}"
            for pool in plan.hardware.pools
        )
    return f"{heading}. The numbers are in the tables below."


def _key(plan: Plan, key: str) -> str:
    """Return the legend of a figure: places by colour, or kinds of memory by shade."""
    limit = f'<li><i class="dash" style="border-color:{LIMIT_COLOUR}"></i>capacity</li>'
    if key == "peaks":
        items = [(kind_words(kind), kind_colour(kind, GPU_COLOURS[0])) for kind in KINDS_OF_MEMORY]
    else:
        used = {name for placement in plan.placements for name in (placement.home, placement.run_on)}
        colours = place_colours(plan.hardware)
        alike: dict[str, list[str]] = {}
        for name in colours:
            if name in used:
                alike.setdefault(colours[name], []).append(name)
        items = [(phrases.device_list(names), colour) for colour, names in alike.items()]
    swatches = "".join(f'<li><i style="background:{colour}"></i>{_text(name)}</li>' for name, colour in items)
    return f'<ul class="key" aria-label="Key">{swatches}{limit if key in ("peaks", "memory") else ""}</ul>'


def _table(heads: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]], caption: str) -> str:
    """Return a table that scrolls by itself. `heads` are (words, class); cells are HTML."""
    top = "".join(f'<th scope="col" class="{name}">{_text(words)}</th>' for words, name in heads)
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row" class="{heads[0][1]}">{cell}</th>'
            if number == 0
            else f'<td class="{heads[number][1]}">{cell}</td>'
            for number, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<p class="soft">{_text(caption)}</p><div class="wide" tabindex="0" role="region" '
        f'aria-label="{_text(caption)}"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _lane_table(plan: Plan, timeline: Timeline) -> str:
    """Return how busy each lane is, and the energy of the call; nothing where nothing was simulated."""
    uses = {use.lane: use for use in timeline.utilisation()}
    if not uses:
        return ""
    most = {"prefill": timeline.bottleneck(prefill=True), "decode": timeline.bottleneck()}
    rows = []
    for lane in time_figures.ordered_lanes(plan, timeline.lanes()):
        bounds = " and ".join(phase for phase in most if most[phase] == lane)
        rows.append([_text(lane), f"{uses[lane].prefill:.1%}", f"{uses[lane].decode:.1%}", bounds])
    heads = [("lane", ""), ("prefill", "n"), ("decode", "n"), ("busiest in", "place")]
    caption = (
        "The part of the time in which each lane is busy; the busiest is what to make faster, or to give less to do"
    )
    joules = energy_joules(plan, timeline)
    energy = (
        f"<p>Energy of the call: about {sum(joules.values()):,.0f} J ("
        + _text(", ".join(f"{name} {value:,.0f}" for name, value in joules.items()))
        + "), an estimate: the largest power of each product while it computes, a tenth of it else.</p>"
        if joules
        else ""
    )
    return f"<section><h2>How busy every lane is</h2>{_table(heads, rows, caption)}{energy}</section>"


def _device_table(plan: Plan) -> str:
    heads = [("memory", ""), ("fits", "place"), ("peak", "n"), ("usable", "n"), ("room left", "n")]
    heads += [(kind_words(kind), "n") for kind in KINDS_OF_MEMORY] + [("device", "place")]
    rows = []
    for pool in plan.hardware.pools:
        products = ", ".join(device.product for device in plan.hardware.devices if device.pool == pool.name)
        parts = plan.prediction.peak_breakdown.get(pool.name, {}) if plan.prediction else {}
        if plan.prediction is None:
            cells = ["not predicted", "–", format_bytes(pool.usable_bytes), "–"] + ["–"] * len(KINDS_OF_MEMORY)
        else:
            peak = plan.prediction.peak_bytes.get(pool.name, 0)
            fits = '<span class="good">yes</span>' if peak <= pool.usable_bytes else '<b class="bad">no</b>'
            cells = [
                fits,
                format_bytes(peak),
                format_bytes(pool.usable_bytes),
                format_bytes(pool.usable_bytes - peak),
            ]
            cells += [format_bytes(parts[kind]) if parts.get(kind) else "–" for kind in KINDS_OF_MEMORY]
        rows.append([_text(pool.name), *cells, _text(products)])
    caption = "Predicted peak of device-used bytes, context included, against what may be used; GB = 10⁹ bytes"
    return f"<section><h2>Devices</h2>{_table(heads, rows, caption)}</section>"


def _placement_table(plan: Plan) -> str:
    heads = [("layers", "layers"), ("group", ""), ("place", ""), ("bytes", "n")]
    rows = [
        [_text(row.layers()), _text(row.group), _text(row.place()), format_bytes(row.nbytes)]
        for row in placement_rows(plan)
    ]
    caption = (
        "Alike placements in one row, in the order of execution, with their bytes together; "
        "an arrow goes from where weights wait to where they are used"
    )
    told = [phrases.cpu_experts(plan), phrases.precisions(plan), phrases.over_nodes(plan)]
    notes = "".join(f"<p>{_text(sentence)}.</p>" for sentence in told if sentence is not None)
    return f"<section><h2>Placements</h2>{notes}{_table(heads, rows, caption)}</section>"


def _assumptions(plan: Plan) -> str:
    listed = dict.fromkeys((*plan.assumptions, *plan.hardware.assumptions))
    items = "".join(f"<li>{_text(assumption)}</li>" for assumption in listed)
    body = f'<ul class="plain">{items}</ul>' if items else "<p>None were made.</p>"
    return f"<section><h2>Assumptions</h2>{body}</section>"


def _facts(pairs: Iterable[tuple[str, str]]) -> str:
    items = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in pairs)
    return f'<dl class="facts">{items}</dl>'


def _solver(plan: Plan) -> str:
    solver = plan.solver
    if solver is None:
        return f"<section><h2>Solver</h2><p>{_NO_SOLVER}</p></section>"
    pairs = [
        ("status", f"{solver.status} ({phrases.proof(plan)})"),
        ("objective", f"{plan.workload.objective}: {phrases.objective(plan)}"),
    ]
    if (found := phrases.bound(plan)) is not None:
        what, bound_ns, simulated_ns = found
        pairs.append(
            ("simulated", f"{format_ns(simulated_ns)} for {what}; at least {format_ns(bound_ns)} by the cost model")
        )
    if (ended := phrases.cut_short(solver)) is not None:
        pairs.append(("cut short", ended))
    pairs.append(("cost model", solver.cost_model))
    return f"<section><h2>Solver</h2>{_facts(pairs)}</section>"


def _versions(plan: Plan) -> str:
    model = plan.model
    pairs = [
        (
            "model",
            f"{model.id} ({model.source}: {model.note})" if model.note else f"{model.id} ({model.source})",
        ),
        ("revision", model.revision or "not known"),
        ("config", model.config_digest or "given as a module"),
        ("attention", plan.execution.attention or "the model's own"),
        ("experts", plan.execution.experts or "none"),
        *sorted(model.versions.items()),
        ("plan schema", str(plan.schema_version)),
    ]
    return f"<section><h2>Model and versions</h2>{_facts(pairs)}</section>"

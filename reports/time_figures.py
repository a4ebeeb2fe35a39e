"""Plan, Timeline → Plotly figures of time: what each memory holds during the call, what each lane does."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from planner.plan import Plan
from planner.units import format_bytes, format_ns
from reports.figures import base_layout, label, plain
from reports.style import LIMIT_COLOUR, NEUTRAL_COLOUR, mixed, place_colours
from simulate.timeline import Interval, MemorySample, Timeline

# A screen is about this many pixels wide: more points or bars than that cannot be seen.
MAX_SAMPLES = 1500
MAX_BARS = 1200
# On a lane with more bars than this their edges would be all that is seen.
BARS_WITH_EDGES = 80


def memory_over_time(plan: Plan, timeline: Timeline) -> Any:
    """Return one panel for each memory that is ever used: bytes held against capacity, over the call.

    Steps that were not simulated are drawn dotted, straight from the last one before to the first one after.
    """
    colours = place_colours(plan.hardware)
    pools = {device.name: device.pool for device in plan.hardware.devices}
    capacity = {pool.name: pool.capacity_bytes for pool in plan.hardware.pools}
    # A memory that never holds anything (a disk that nothing waits on) would be an empty panel.
    used = {sample.device for sample in timeline.memory if sample.total_bytes}
    devices = [name for name in colours if name in used]
    rows = max(len(devices), 1)
    height = 56 + 112 * rows
    figure = make_subplots(rows=rows, cols=1, shared_xaxes=True, vertical_spacing=38 / height if rows > 1 else 0)
    labels: list[dict[str, Any]] = []
    shapes: list[dict[str, Any]] = []
    for row, device in enumerate(devices, start=1):
        axis = "" if row == 1 else str(row)
        limit = capacity[pools.get(device, device)]
        samples = thinned([sample for sample in timeline.memory if sample.device == device], MAX_SAMPLES)
        peak = max(sample.total_bytes for sample in samples)
        _add_memory(figure, row, timeline, samples, colours[device])
        shapes.append({"type": "line", "xref": f"x{axis} domain", "yref": f"y{axis}", "x0": 0, "x1": 1,
                       "y0": limit, "y1": limit, "name": "capacity",
                       "line": {"color": LIMIT_COLOUR, "width": 1.5, "dash": "dash"}})  # fmt: skip
        words = f"<b>{plain(device)}</b> · at most {format_bytes(peak)} of {format_bytes(limit)}"
        labels.append(label(words, yref=f"y{axis} domain", y=1.03))
        figure.update_yaxes(range=[0, 1.06 * max(limit, peak, 1)], row=row, col=1)
    figure.update_yaxes(nticks=4, tickformat="~s", ticksuffix="B", fixedrange=True, zeroline=False, automargin=True)
    figure.update_xaxes(tickformat="~s", ticksuffix="s", zeroline=False, nticks=4, tickangle=0)
    figure.update_xaxes(title={"text": "time since the call began", "standoff": 4}, row=rows, col=1)
    menus = _zoom_menu(timeline, rows)
    layout = base_layout(height + (36 if menus else 0), annotations=labels, shapes=shapes, hovermode="closest")
    layout["margin"] = {"l": 8, "r": 8, "t": 62 if menus else 26, "b": 44}
    figure.update_layout(layout, updatemenus=menus)
    return figure


def thinned(samples: Sequence[MemorySample], limit: int) -> list[MemorySample]:
    """Return about `limit` of the samples: the least and most of every stretch, so that no peak is lost."""
    if len(samples) <= limit:
        return list(samples)
    size = -(-len(samples) * 2 // limit)
    kept: list[MemorySample] = []
    for start in range(0, len(samples), size):
        part = range(start, min(start + size, len(samples)))
        ends = {
            min(part, key=lambda i: samples[i].total_bytes),
            max(part, key=lambda i: samples[i].total_bytes),
        }
        kept += [samples[i] for i in sorted(ends)]
    if kept[-1] is not samples[-1]:
        kept.append(samples[-1])
    return kept


def _add_memory(figure: Any, row: int, timeline: Timeline, samples: list[MemorySample], colour: str) -> None:
    """Draw one device: all that it holds, below it what never changes, and dotted what was not simulated."""
    blocks = _blocks(timeline, samples)
    common = {"mode": "lines", "showlegend": False}
    gaps_x, gaps_y = [], []
    for (block, end), (after, _) in pairwise(blocks):
        gaps_x += [end / 1e9, after[0].time_ns / 1e9, None]
        gaps_y += [block[-1].total_bytes, after[0].total_bytes, None]
    if gaps_x:
        figure.add_scatter(
            x=gaps_x, y=gaps_y, fill="tozeroy", fillcolor=mixed(colour, "#ffffff", 0.65) + "80",
            line={"color": colour, "width": 1.5, "dash": "dot"}, name="not simulated", hoverinfo="skip",
            row=row, col=1, **common,
        )  # fmt: skip
    for name, value, fill in (("held", _total, 0.75), ("fixed", _fixed, 0.4)):
        xs, ys, words = [], [], []
        for block, end in blocks:
            xs += [sample.time_ns / 1e9 for sample in block] + [end / 1e9, None]
            ys += [value(sample) for sample in block] + [value(block[-1]), None]
            words += [_sample_words(sample) for sample in block] + [_sample_words(block[-1]), None]
        figure.add_scatter(
            x=xs,
            y=ys,
            fill="tozeroy",
            fillcolor=mixed(colour, "#ffffff", fill),
            line={"shape": "hv", "color": colour, "width": 1.2 if name == "held" else 0},
            name=name,
            text=words if name == "held" else None,
            hovertemplate="%{x}<br>%{text}<extra></extra>" if name == "held" else None,
            hoverinfo=None if name == "held" else "skip",
            row=row,
            col=1,
            **common,
        )


def _total(sample: MemorySample) -> int:
    return sample.total_bytes


def _fixed(sample: MemorySample) -> int:
    return sample.weights + sample.slots + sample.workspace + sample.context


def _sample_words(sample: MemorySample) -> str:
    return (
        f"{format_bytes(sample.total_bytes)}: KV cache {format_bytes(sample.kv_cache)}, "
        f"activations {format_bytes(sample.activations)}"
    )


def _blocks(timeline: Timeline, samples: list[MemorySample]) -> list[tuple[list[MemorySample], int]]:
    """Return the samples in stretches of neighbouring simulated steps, each with its end in ns.

    The last sample of a device holds to the end of the call.
    """
    starts = timeline.step_starts()
    steps = sorted(timeline.simulated_steps) or [0]
    openings = [step for step in steps if step == steps[0] or step - 1 not in timeline.simulated_steps]
    begins = [starts[min(step, len(starts) - 1)] for step in openings]
    ends = [
        starts[min(max(step for step in steps if step < after) + 1, len(starts) - 1)]
        for after in [*openings[1:], steps[-1] + 1]
    ]
    parts: list[list[MemorySample]] = [[] for _ in openings]
    for sample in samples:
        parts[max(0, bisect_right(begins, sample.time_ns) - 1)].append(sample)
    blocks = [(part, max(end, part[-1].time_ns)) for part, end in zip(parts, ends, strict=True) if part]
    blocks[-1] = (blocks[-1][0], max(blocks[-1][1], starts[-1]))
    return blocks


def _zoom_menu(timeline: Timeline, rows: int) -> list[dict[str, Any]]:
    """Return buttons that show the whole call, the prefill or one decode step; none for one step."""
    starts = timeline.step_starts()
    if len(timeline.step_ns) < 2:
        return []
    views = [("whole call", 0, starts[-1])]
    views += [(step_words(step), starts[step], starts[step + 1]) for step in drawn_steps(timeline)]
    axes = ["xaxis" if row == 1 else f"xaxis{row}" for row in range(1, rows + 1)]
    buttons = [
        {"label": name, "method": "relayout",
         "args": [{f"{axis}.range": [start / 1e9, end / 1e9] for axis in axes}]}
        for name, start, end in views
    ]  # fmt: skip
    return [
        {"type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom",
         "pad": {"b": 24, "l": 0}, "buttons": buttons, "showactive": True,
         "font": {"color": "#1c232b", "size": 11}}
    ]  # fmt: skip


def drawn_steps(timeline: Timeline) -> tuple[int, ...]:
    """Return the steps that are drawn: the prefill and the first decode step, where they were simulated."""
    known = sorted({interval.step for interval in timeline.intervals})
    return tuple([step for step in known if step == 0] + [step for step in known if step > 0][:1])


def step_words(step: int) -> str:
    return "prefill" if step == 0 else f"decode step {step}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """Neighbouring intervals of a lane, drawn as one. `busy_ns` excludes what was idle between them."""

    lane: str
    start_ns: int
    end_ns: int
    busy_ns: int
    count: int
    label: str


def step_lanes(plan: Plan, timeline: Timeline, steps: Sequence[int] | None = None) -> Any:
    """Return a panel for each step of `steps` (else `drawn_steps`): what every lane does, from its start.

    Where a step has more than `MAX_BARS` intervals, those with hardly a gap between them are one bar.
    """
    chosen = tuple(drawn_steps(timeline) if steps is None else steps)
    lanes = ordered_lanes(plan, timeline.lanes())
    starts = timeline.step_starts()
    rows = max(len(chosen), 1)
    panel = 24 * len(lanes) + 12
    height = rows * (panel + 58) + 30
    figure = make_subplots(rows=rows, cols=1, vertical_spacing=58 / height if rows > 1 else 0)
    labels = []
    for row, step in enumerate(chosen, start=1):
        axis = "" if row == 1 else str(row)
        bars = merged([interval for interval in timeline.intervals if interval.step == step], MAX_BARS)
        for lane in lanes:
            colour = lane_colour(plan, lane)
            _add_lane(figure, row, lane, [bar for bar in bars if bar.lane == lane], colour, starts[step])
        words = f"<b>{step_words(step)}</b> · {format_ns(timeline.step_ns[step])}"
        if any(bar.count > 1 for bar in bars):
            words += " · close neighbours drawn as one"
        labels.append(label(words, yref=f"y{axis} domain", y=1, yshift=3))
    figure.update_yaxes(
        categoryorder="array", categoryarray=[plain(lane) for lane in reversed(lanes)], automargin=True,
        fixedrange=True, tickfont={"size": 11}, range=[-0.6, len(lanes) - 0.4], showgrid=False,
    )  # fmt: skip
    figure.update_xaxes(tickformat="~s", ticksuffix="s", zeroline=False, nticks=4, tickangle=0)
    figure.update_xaxes(title={"text": "time since the step began", "standoff": 4}, row=rows, col=1)
    layout = base_layout(height, annotations=labels, barmode="overlay", bargap=0.25)
    layout["margin"] = {"l": 8, "r": 12, "t": 28, "b": 44}
    figure.update_layout(layout)
    return figure


def merged(intervals: Sequence[Interval], limit: int) -> list[Bar]:
    """Return the intervals of one step as bars, at most `limit` of them unless there are more lanes.

    Neighbours of a lane are merged where the gap between them is below a resolution, which starts at a
    thousandth of the step and doubles until the bars are few enough.
    """
    bars = [
        Bar(lane=i.lane, start_ns=i.start_ns, end_ns=i.end_ns, busy_ns=i.duration_ns, count=1, label=i.label)
        for i in intervals
    ]
    bars.sort(key=lambda bar: (bar.lane, bar.start_ns))
    if not bars:
        return bars
    whole = max(bar.end_ns for bar in bars) - min(bar.start_ns for bar in bars)
    resolution = max(1, whole // 1000)
    while len(bars) > limit and resolution <= 2 * whole:
        bars = _joined(bars, resolution)
        resolution *= 2
    return bars


def _joined(bars: list[Bar], resolution_ns: int) -> list[Bar]:
    """Return the bars, neighbours joined where their gap and the shorter one are below the resolution."""
    result: list[Bar] = []
    for bar in bars:
        last = result[-1] if result else None
        if (
            last is None
            or last.lane != bar.lane
            or bar.start_ns - last.end_ns > resolution_ns
            or min(bar.end_ns - bar.start_ns, last.end_ns - last.start_ns) > resolution_ns
        ):
            result.append(bar)
            continue
        first = last.label.split(" … ")[0]
        result[-1] = Bar(
            lane=bar.lane,
            start_ns=last.start_ns,
            end_ns=max(last.end_ns, bar.end_ns),
            busy_ns=last.busy_ns + bar.busy_ns,
            count=last.count + bar.count,
            label=f"{first} … {bar.label.split(' … ')[-1]}",
        )
    return result


def _ends(lane: str) -> tuple[str, str]:
    """Return where a lane starts and ends: "cpu→cuda:0 copy" is ("cpu", "cuda:0")."""
    source, _, target = lane.rsplit(" ", 1)[0].partition("→")
    return source, target or source


def ordered_lanes(plan: Plan, lanes: Sequence[str]) -> list[str]:
    """Return the lanes as data flow: what ends on the CPU, then GPU by GPU, copies before compute.

    A lane that several links share stands where the first of them ends.
    """
    places = [
        *(name for name in place_colours(plan.hardware) if name not in _gpu_names(plan)),
        *_gpu_names(plan),
    ]
    known = {place: position for position, place in enumerate(places)}
    shared: dict[str, int] = {}
    for link in plan.hardware.links:
        if link.lane is not None and link.target in known:
            shared[link.lane] = min(known[link.target], shared.get(link.lane, len(known)))

    def key(lane: str) -> tuple[int, bool, str]:
        source, target = _ends(lane)
        return shared.get(lane, known.get(target, len(known))), source == target, lane

    return sorted(lanes, key=key)


def lane_colour(plan: Plan, lane: str) -> str:
    """Return a lane's colour: that of the place it starts from; of a node, its host's."""
    colours = place_colours(plan.hardware)
    source = _ends(lane)[0]
    hosts = {plan.hardware.node(host.name): host.name for host in plan.hardware.hosts}
    return colours.get(hosts.get(source, source), NEUTRAL_COLOUR)


def _gpu_names(plan: Plan) -> list[str]:
    return [gpu.name for gpu in plan.hardware.gpus]


def _add_lane(figure: Any, row: int, lane: str, bars: list[Bar], colour: str, origin_ns: int) -> None:
    """Draw the bars of one lane; an empty lane keeps its row, so that panels can be compared."""
    edge = mixed(colour, "#000000", 0.4)
    figure.add_trace(
        go.Bar(
            x=[(bar.end_ns - bar.start_ns) / 1e9 for bar in bars],
            base=[(bar.start_ns - origin_ns) / 1e9 for bar in bars],
            y=[plain(lane)] * len(bars),
            orientation="h",
            name=plain(lane),
            showlegend=False,
            text=[_bar_words(bar) for bar in bars],
            textposition="none",
            marker={
                "color": colour,
                "line": {"width": 0.6 if len(bars) < BARS_WITH_EDGES else 0, "color": edge},
            },
            hovertemplate=f"{plain(lane)}<br>%{{text}}<extra></extra>",
        ),
        row=row,
        col=1,
    )


def _bar_words(bar: Bar) -> str:
    words = f"{plain(bar.label)}<br>{format_ns(bar.end_ns - bar.start_ns)}"
    return words if bar.count == 1 else f"{words}, busy {format_ns(bar.busy_ns)} with {bar.count} actions"

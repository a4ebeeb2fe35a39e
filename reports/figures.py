"""Plan, Timeline → Plotly figures of places: where weights wait, and what each memory holds at its peak.

Every figure gives a place the same colour. Labels stand above what they name, so that a phone's width is all
drawing.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from planner.hardware import MemoryPool
from planner.memory import waiting_slices, with_groups
from planner.phrases import cpu_words, home, unused
from planner.plan import KINDS_OF_MEMORY, Placement, Plan
from planner.units import format_bytes
from reports.style import LIMIT_COLOUR, NEUTRAL_COLOUR, ink_on, kind_colour, kind_words, place_colours

FONT_FAMILY = 'system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif'
LAYERS_WITH_GAPS = 60


def base_layout(height: int, **more: Any) -> dict[str, Any]:
    """Return what every figure's layout shares: `height` in pixels, clear backgrounds, margins for labels."""
    return {
        "height": height,
        "margin": {"l": 8, "r": 8, "t": 30, "b": 40},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT_FAMILY, "size": 12},
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        **more,
    }


def label(text: str, **where: Any) -> dict[str, Any]:
    """Return an annotation whose text starts at x = 0 of the paper and stands on `y`."""
    left = {
        "x": 0,
        "xref": "paper",
        "xanchor": "left",
        "yanchor": "bottom",
        "align": "left",
        "showarrow": False,
    }
    return {**left, "text": text, **where}


def plain(text: str) -> str:
    """Return `text` so that Plotly shows it as it is: its labels understand tags."""
    return html.escape(text, quote=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cell:
    """A rectangle of the placement map: part of one group of one layer, in one place."""

    place: str
    layer: int
    bottom: float
    height: float
    words: tuple[str, ...]


def placement_map(plan: Plan) -> Any:
    """Return the map of every layer (x, in order) by weight group (rows): colour is where the group waits.

    The top row shows where layers run. Of a group that is partly resident, the lower part of the cell, in
    proportion, has the colour of the device that it stays on.
    """
    rows = group_rows(plan)
    tops = {name: len(rows) - 1 - number for number, name in enumerate(rows)}
    colours = place_colours(plan.hardware)
    figure = go.Figure()
    cells = _cells(plan, tops)
    width = 1.0 if len(plan.graph.layers) > LAYERS_WITH_GAPS else 0.9
    for place in colours:
        mine = [cell for cell in cells if cell.place == place]
        if mine:
            figure.add_bar(
                x=[cell.layer for cell in mine],
                y=[cell.height for cell in mine],
                base=[cell.bottom for cell in mine],
                width=width,
                customdata=[cell.words for cell in mine],
                name=plain(place),
                marker={"color": colours[place], "line": {"width": 0}},
                hovertemplate="%{customdata[0]}<br>%{customdata[1]}: %{customdata[2]}<br>"
                "%{customdata[3]}<extra></extra>",
            )
    _add_run_strip(figure, plan, len(rows), colours)
    labels = [label("runs on", y=len(rows) + 0.62)]
    labels += [label(_row_words(plan, name), y=top + 0.62) for name, top in tops.items()]
    positions, words = _layer_ticks(plan)
    figure.update_layout(
        base_layout(
            96 + 52 * (len(rows) + 1),
            barmode="overlay",
            bargap=0,
            annotations=labels,
            margin={"l": 8, "r": 8, "t": 8, "b": 48},
            uniformtext={"mode": "hide", "minsize": 9},
        )
    )
    figure.update_xaxes(
        title={"text": "layer, in the order of execution", "standoff": 6}, tickvals=positions, ticktext=words,
        range=[-0.6, len(plan.graph.layers) - 0.4], showgrid=False, zeroline=False, ticks="outside",
        tickangle=0,
    )  # fmt: skip
    figure.update_yaxes(visible=False, range=[-0.05, len(rows) + 1.05], fixedrange=True)
    return figure


def group_rows(plan: Plan) -> list[str]:
    """Return the rows of the placement map, top first: groups as they appear, leaves' and rest last."""
    names = list(dict.fromkeys(placement.group for placement in plan.placements))
    last = [name for name in ("rest", "weights") if name in names]
    rows = [name for name in names if name not in last]
    # A layer is either one group "weights" or has a "rest", never both, so one row serves the two.
    return rows + ([" / ".join(last)] if last else [])


def _row_of(group: str, rows: Sequence[str]) -> str:
    return group if group in rows else rows[-1]


def _row_words(plan: Plan, row: str) -> str:
    """Return a row's label: the group, and of sliced groups how many slices stay on the devices."""
    partial = [
        (placement.resident_slices or 0 if waiting_slices(placement, group) else group.slices, group.slices)
        for placement, group in with_groups(plan.graph, plan.placements)
        if placement.group == row and group.slices > 1
    ]
    if not partial:
        return plain(row)
    fewest, most, slices = min(partial)[0], max(partial)[0], max(total for _, total in partial)
    count = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return f"{plain(row)} · {count} of {slices} in a layer stay where it runs"


def _cells(plan: Plan, tops: dict[str, int]) -> list[_Cell]:
    """Return the rectangles of every placement, 0.6 of a row high in all."""
    index = {layer.name: number for number, layer in enumerate(plan.graph.layers)}
    rows = list(tops)
    result = []
    for placement, group in with_groups(plan.graph, plan.placements):
        bottom = tops[_row_of(placement.group, rows)]
        waiting = waiting_slices(placement, group) / group.slices
        words = (plain(placement.layer), plain(placement.group), format_bytes(placement.nbytes),
                 plain(placement_words(placement, group.slices)))  # fmt: skip
        layer = index[placement.layer]
        if waiting < 1:
            result.append(
                _Cell(
                    place=placement.run_on,
                    layer=layer,
                    bottom=bottom,
                    height=0.6 * (1 - waiting),
                    words=words,
                )
            )
        if waiting > 0:
            start = bottom + 0.6 * (1 - waiting)
            result.append(_Cell(place=placement.home, layer=layer, bottom=start, height=0.6 * waiting, words=words))
    return result


def placement_words(placement: Placement, slices: int) -> str:
    """Return in words where a group waits and where it is computed with."""
    stored = f", in {placement.dtype}" if placement.dtype is not None else ""
    if placement.home == placement.run_on:
        return f"resident on {placement.run_on}{stored}"
    kept = placement.resident_slices or 0
    after = cpu_words(placement.cpu_up_to_tokens) + stored
    if kept:
        return f"{kept} of {slices} resident on {placement.run_on}, {slices - kept} wait in {home(placement)}{after}"
    return f"waits in {home(placement)}, runs on {placement.run_on}{after}"


def _add_run_strip(figure: Any, plan: Plan, row: int, colours: dict[str, str]) -> None:
    """Draw where layers run: one bar for each stretch of neighbours on one device, which bears its name."""
    start = 0
    for device, stretch in groupby(plan.run_on()):
        count = len(list(stretch))
        first, last = plan.graph.layers[start].name, plan.graph.layers[start + count - 1].name
        figure.add_bar(
            x=[start + (count - 1) / 2],
            y=[0.6],
            base=[row],
            width=[count - 0.1],
            text=[plain(device)],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            insidetextfont={"color": ink_on(colours[device])},
            showlegend=False,
            marker={"color": colours[device], "line": {"width": 0}},
            hovertemplate=f"{plain(first)}<br>… {plain(last)}<br>{count} layers run on {plain(device)}<extra></extra>",
        )
        start += count


def _layer_ticks(plan: Plan) -> tuple[list[int], list[str]]:
    """Return where ticks stand and what they say: about eight of the numbers in layers' names."""
    numbered = []
    for position, layer in enumerate(plan.graph.layers):
        match = re.search(r"\.(\d+)$", layer.name)
        if match is not None:
            numbered.append((position, int(match[1])))
    spacing = next((step for step in (1, 2, 4, 5, 10, 20, 50, 100) if len(numbered) <= 8 * step), 200)
    chosen = [(position, str(number)) for position, number in numbered if number % spacing == 0]
    return [position for position, _ in chosen], [number for _, number in chosen]


def memory_by_device(plan: Plan) -> Any:
    """Return one bar for each memory: bytes by kind at the predicted peak, against its capacity.

    Bars have an axis each, so that a GPU is not dwarfed by a disk. Memories of `unused` ones are left out. Without a
    prediction the figure holds only the capacities.
    """
    empty = unused(plan)
    pools = [pool for pool in plan.hardware.pools if pool.name not in empty]
    colours = place_colours(plan.hardware)
    figure = make_subplots(rows=len(pools), cols=1, vertical_spacing=0.0)
    labels: list[dict[str, Any]] = []
    shapes: list[dict[str, Any]] = []
    for row, pool in enumerate(pools, start=1):
        parts = plan.prediction.peak_breakdown.get(pool.name, {}) if plan.prediction else {}
        peak = plan.prediction.peak_bytes.get(pool.name, 0) if plan.prediction else None
        _add_parts(figure, row, pool.name, parts, colours[pool.name])
        axis = "" if row == 1 else str(row)
        shapes += _capacity_shapes(pool, axis)
        labels.append(
            label(
                f"<b>{plain(pool.name)}</b> · {_of_capacity(peak, pool.capacity_bytes)}",
                yref=f"y{axis}",
                y=0.5,
            )
        )
        figure.update_xaxes(
            range=[0, 1.02 * max(pool.capacity_bytes, peak or 0, 1)],
            visible=False,
            fixedrange=True,
            row=row,
            col=1,
        )
        figure.update_yaxes(visible=False, range=[-0.75, 1.15], fixedrange=True, row=row, col=1)
    figure.update_layout(
        base_layout(
            12 + 64 * len(pools),
            barmode="stack",
            annotations=labels,
            shapes=shapes,
            margin={"l": 8, "r": 8, "t": 4, "b": 8},
            uniformtext={"mode": "hide", "minsize": 10},
        )
    )
    return figure


def _capacity_shapes(pool: MemoryPool, axis: str) -> list[dict[str, Any]]:
    """Return the shapes of one memory: its track, what is reserved for others, and the capacity line."""
    at = {
        "xref": f"x{axis}",
        "yref": f"y{axis}",
        "y0": -0.45,
        "y1": 0.45,
        "type": "rect",
        "line": {"width": 0},
    }
    end = pool.capacity_bytes
    track = {
        **at,
        "name": "track",
        "layer": "below",
        "x0": 0,
        "x1": end,
        "fillcolor": NEUTRAL_COLOUR,
        "opacity": 0.1,
    }
    reserved = {**track, "name": "reserved", "x0": pool.usable_bytes, "opacity": 0.3}
    line = {"color": LIMIT_COLOUR, "width": 2.5, "dash": "dash"}
    limit = {
        **at,
        "name": "capacity",
        "type": "line",
        "x0": end,
        "x1": end,
        "y0": -0.55,
        "y1": 0.55,
        "line": line,
    }
    return [track, *([reserved] if pool.reserved_bytes else []), limit]


def _add_parts(figure: Any, row: int, place: str, parts: dict[str, int], colour: str) -> None:
    """Stack the kinds of memory of one place, in the order in which `Plan` lists them."""
    for kind in (*KINDS_OF_MEMORY, *sorted(set(parts) - set(KINDS_OF_MEMORY))):
        nbytes = parts.get(kind, 0)
        if nbytes == 0:
            continue
        words = f"{kind_words(kind)} {format_bytes(nbytes)}"
        figure.add_bar(
            x=[nbytes],
            y=[0],
            orientation="h",
            width=[0.9],
            name=kind_words(kind),
            meta=place,
            text=[words],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            insidetextfont={"color": ink_on(kind_colour(kind, colour))},
            showlegend=False,
            marker={"color": kind_colour(kind, colour), "line": {"width": 0}},
            hovertemplate=f"{plain(place)}: {words}<extra></extra>",
            row=row,
            col=1,
        )


def _of_capacity(peak_bytes: int | None, capacity_bytes: int) -> str:
    if peak_bytes is None:
        return f"capacity {format_bytes(capacity_bytes)}"
    share = f" ({peak_bytes / capacity_bytes:.1%})" if capacity_bytes else ""
    return f"{format_bytes(peak_bytes)} of {format_bytes(capacity_bytes)}{share}"

"""Plan → the rows of "where every layer goes": neighbours that run in one place, exceptions below them."""

# ruff: noqa: RUF001 - the sign of multiplication is meant
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from planner.commands.layout import column_widths, fold, ranges
from planner.memory import waiting_slices, with_groups
from planner.plan import Placement, Plan
from planner.units import format_bytes

HEADER = ("layers", "parts", "runs on", "kept in", "size")
# Beyond this many numbers or ranges a row only counts its layers; --json names them.
_MOST_RANGES = 4
_MOST_NAMES = 3
# With more runs of neighbours than this times what differs, layers alternate, and adjacency is given up.
_MOST_RUNS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Parts of `count` layers that run in one place and are kept alike.

    exception: these are some of the layers above. only_counted: `layers` does not say which they are.
    """

    layers: str
    parts: str
    run_on: str
    kept: str
    nbytes: int
    count: int
    exception: bool
    only_counted: bool

    def cells(self) -> tuple[str, str, str, str, str]:
        indent = "  " if self.exception else ""
        size = format_bytes(self.nbytes) if self.parts else ""
        return indent + self.layers, self.parts, self.run_on, self.kept, size


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer with (group, kept in, bytes) of each of its parts. stem: its name up to its number, or None."""

    name: str
    stem: str | None
    number: int
    run_on: str
    parts: tuple[tuple[str, str, int], ...]


def placement_rows(plan: Plan) -> list[Row]:
    """Return the rows, in order of execution; a layer's bytes are in them once for each of its parts."""
    layers = _layers(plan)
    runs = [list(run) for _, run in groupby(layers, key=_run_key)]
    distinct = dict.fromkeys(_run_key(layer) for layer in layers)
    if len(runs) > _MOST_RUNS * len(distinct) + 4:
        runs = [[layer for layer in layers if _run_key(layer) == key] for key in distinct]
    return [row for run in runs for row in _run_rows(run)]


def table_lines(rows: Sequence[Row], width: int) -> list[str]:
    """Return the rows as lines of at most `width`, a header first; cells that do not fit are folded."""
    cells = [HEADER, *(row.cells() for row in rows)]
    widths = column_widths(cells, fixed=(4,), total=width, gap=2)
    lines = []
    for row in cells:
        indent = "  " if row[0].startswith(" ") else ""
        first = [indent + text for text in fold(row[0].strip(), widths[0] - len(indent))]
        folded = [first, *(fold(cell, room) for cell, room in zip(row[1:], widths[1:], strict=True))]
        for number in range(max(len(parts) for parts in folded)):
            texts = [parts[number] if number < len(parts) else "" for parts in folded]
            padded = [text.ljust(room) for text, room in zip(texts[:-1], widths[:-1], strict=True)]
            lines.append("  ".join([*padded, texts[-1].rjust(widths[-1])]).rstrip())
    return lines


def _layers(plan: Plan) -> list[_Layer]:
    parts: dict[str, list[tuple[str, str, int]]] = {layer.name: [] for layer in plan.graph.layers}
    for placement, group in with_groups(plan.graph, plan.placements):
        kept = _kept_words(placement, group.slices, waiting_slices(placement, group))
        parts[placement.layer].append((placement.group, kept, placement.nbytes))
    found = []
    for layer, run_on in zip(plan.graph.layers, plan.run_on(), strict=True):
        match = re.match(r"((?:.*?\.)??)(\d+)(?=\.|$)", layer.name)
        stem, number = (match[1], int(match[2])) if match else (None, 0)
        found.append(_Layer(layer.name, stem, number, run_on, tuple(parts[layer.name])))
    return found


def _kept_words(placement: Placement, slices: int, waiting: int) -> str:
    if waiting == 0:
        return placement.run_on
    home = f"{placement.home} (pinned)" if placement.memory == "pinned" else placement.home
    return (
        home if waiting == slices else f"{slices - waiting} of {slices} {placement.run_on}, {waiting} {home}"
    )


def _run_key(layer: _Layer) -> tuple[str, str | None]:
    return layer.run_on, layer.stem


def _run_rows(run: Sequence[_Layer]) -> list[Row]:
    """Return the row of what all layers of a run share, then one for each set of them that differs."""
    alike: dict[tuple[str, str], list[_Layer]] = {}
    for layer in run:
        for group, kept, _ in layer.parts:
            alike.setdefault((group, kept), []).append(layer)
    sets: dict[tuple[tuple[str, ...], str], list[str]] = {}
    members: dict[tuple[str, ...], list[_Layer]] = {}
    for (group, kept), layers in alike.items():
        names = tuple(layer.name for layer in layers)
        members[names] = layers
        sets.setdefault((names, kept), []).append(group)
    everyone = tuple(layer.name for layer in run)
    order = list(dict.fromkeys(group for group, _ in alike))
    rows = [
        _row(members[names], groups, kept, run if names != everyone else None)
        for (names, kept), groups in sorted(sets.items(), key=lambda item: order.index(item[1][0]))
    ]
    rows.sort(key=lambda row: row.exception)
    return rows if rows and not rows[0].exception else [_head(run), *rows]


def _head(run: Sequence[_Layer]) -> Row:
    """Return the row over layers that have nothing in common but where they run."""
    layers, only_counted = _title(run)
    return Row(
        layers=layers,
        parts="",
        run_on=run[0].run_on,
        kept="",
        nbytes=0,
        count=len(run),
        exception=False,
        only_counted=only_counted,
    )


def _row(layers: Sequence[_Layer], groups: Sequence[str], kept: str, some_of: Sequence[_Layer] | None) -> Row:
    nbytes = sum(
        size for layer in layers for group, where, size in layer.parts if group in groups and where == kept
    )
    whole = all(group in groups for layer in layers for group, _, _ in layer.parts)
    title, only_counted = _title(layers) if some_of is None else _some(layers, len(some_of))
    return Row(
        layers=title,
        parts="all" if whole else ", ".join(groups),
        run_on=layers[0].run_on,
        kept=kept,
        nbytes=nbytes,
        count=len(layers),
        exception=some_of is not None,
        only_counted=only_counted,
    )


def _title(layers: Sequence[_Layer]) -> tuple[str, bool]:
    """Return what a run of layers is called, and whether that leaves open which they are."""
    stem = layers[0].stem
    if stem is None:
        names = [layer.name or "(the model itself)" for layer in layers]
        few = len(names) <= _MOST_NAMES
        return (", ".join(names) if few else f"{names[0]} to {names[-1]} ×{len(names)}"), not few
    if len(layers) == 1:
        return layers[0].name, False
    numbers = ranges(sorted({layer.number for layer in layers}))
    few = len(numbers) <= _MOST_RANGES
    return f"{stem}{', '.join(numbers) if few else '…'} ×{len(layers)}", not few


def _some(layers: Sequence[_Layer], total: int) -> tuple[str, bool]:
    words = f"{len(layers)} of the {total}"
    if layers[0].stem is None:
        names = [layer.name for layer in layers]
    else:
        names = ranges(sorted({layer.number for layer in layers}))
    few = len(names) <= _MOST_RANGES
    return (f"{words}: {', '.join(names)}" if few else words), not few

"""Plan → the rows of "where every layer goes": neighbours that run in one place, exceptions below them."""

# ruff: noqa: RUF001, RUF002 - ranges are written with an en dash, counts with the sign of multiplication
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from planner import phrases
from planner.commands.layout import column_widths, fold
from planner.memory import waiting_slices, with_groups
from planner.phrases import ranges
from planner.plan import Plan
from planner.units import format_bytes

# What narrows first when the table is too wide, and how far: "kept in", then "parts", then "layers".
_LEAST_WIDTHS = {3: 22, 1: 12, 0: 24, 2: 8}
HEADER = ("layers", "parts", "runs on", "kept in", "size")
# Beyond this many numbers or ranges a row only counts its layers; --json names them.
_MOST_RANGES = 4
_MOST_NAMES = 3
# With more runs of neighbours than this times what differs, layers alternate, and adjacency is given up.
_MOST_RUNS = 3

# Where a part is kept, and in which precision if that was chosen.
_Place = tuple[str, str | None]


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
class _Part:
    """One weight group: where it is kept, how many of its slices stay where they run, and its precision if chosen."""

    group: str
    home: str
    resident: int
    slices: int
    nbytes: int
    dtype: str | None

    @property
    def place(self) -> _Place:
        return self.home, self.dtype


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer with its parts. stem: its name up to its number, or None."""

    name: str
    stem: str | None
    number: int
    run_on: str
    parts: tuple[_Part, ...]


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
    widths = column_widths(cells, least=_LEAST_WIDTHS, total=width, gap=2)
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
    parts: dict[str, list[_Part]] = {layer.name: [] for layer in plan.graph.layers}
    for placement, group in with_groups(plan.graph, plan.placements):
        waiting = waiting_slices(placement, group)
        part = _Part(
            placement.group,
            phrases.home(placement) if waiting else placement.run_on,
            group.slices - waiting,
            group.slices,
            placement.nbytes,
            placement.dtype,
        )
        parts[placement.layer].append(part)
    found = []
    for layer, run_on in zip(plan.graph.layers, plan.run_on(), strict=True):
        match = re.match(r"((?:.*?\.)??)(\d+)(?=\.|$)", layer.name)
        stem, number = (match[1], int(match[2])) if match else (None, 0)
        found.append(_Layer(layer.name, stem, number, run_on, tuple(parts[layer.name])))
    return found


def _kept_words(parts: Sequence[_Part], run_on: str) -> str:
    """Return where alike parts are kept: "cuda:0", "5 of 8 cuda:0, 3 cpu", "4–5 of 8 cuda:0, others cpu, in int8"."""
    home, slices = parts[0].home, parts[0].slices
    least, most = min(part.resident for part in parts), max(part.resident for part in parts)
    stored = "" if parts[0].dtype is None else f", in {parts[0].dtype}"
    if home == run_on or most == 0:
        return home + stored
    if least == most:
        return f"{most} of {slices} {run_on}, {slices - most} {home}{stored}"
    return f"{least}–{most} of {slices} {run_on}, others {home}{stored}"


def _run_key(layer: _Layer) -> tuple[str, str | None]:
    return layer.run_on, layer.stem


def _run_rows(run: Sequence[_Layer]) -> list[Row]:
    """Return the row of what all layers of a run share, then one for each set of them that differs.

    Experts that wait in one place are alike whatever their number, which the row tells.
    """
    alike: dict[tuple[str, _Place, int], list[str]] = {}
    for layer in run:
        for part in layer.parts:
            alike.setdefault((part.group, part.place, part.slices), []).append(layer.name)
    sets: dict[tuple[tuple[str, ...], _Place, int], list[str]] = {}
    for (group, place, slices), names in alike.items():
        apart = slices if place[0] != run[0].run_on else 1
        sets.setdefault((tuple(names), place, apart), []).append(group)
    order = list(dict.fromkeys(group for group, _, _ in alike))
    rows = []
    for (members, place, _), groups in sorted(sets.items(), key=lambda item: order.index(item[1][0])):
        rows.append(_row([layer for layer in run if layer.name in set(members)], groups, place, run))
    shared = [row for row in rows if not row.exception]
    shared[1:] = [replace(row, layers=f"the same {row.count}", exception=True) for row in shared[1:]]
    return [*(shared or [_head(run)]), *(row for row in rows if row.exception)]


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


def _row(layers: Sequence[_Layer], groups: Sequence[str], place: _Place, run: Sequence[_Layer]) -> Row:
    chosen = [part for layer in layers for part in layer.parts if part.group in groups and part.place == place]
    exception = len(layers) < len(run)
    title, only_counted = _some(layers, len(run)) if exception else _title(layers)
    return Row(
        layers=title,
        parts=_parts_words(layers, groups),
        run_on=layers[0].run_on,
        kept=_kept_words(chosen, layers[0].run_on),
        nbytes=sum(part.nbytes for part in chosen),
        count=len(layers),
        exception=exception,
        only_counted=only_counted,
    )


def _parts_words(layers: Sequence[_Layer], groups: Sequence[str]) -> str:
    others = list(dict.fromkeys(part.group for layer in layers for part in layer.parts if part.group not in groups))
    if not others:
        return "all"
    if len(groups) > 2 and len(others) == 1:
        return f"all but {others[0]}"
    return ", ".join(groups)


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
    if few:
        return f"{stem}{', '.join(numbers)} ×{len(layers)}", False
    return f"{len(layers)} of {stem}{layers[0].number}–{layers[-1].number}", True


def _some(layers: Sequence[_Layer], total: int) -> tuple[str, bool]:
    """Return how many of a run's layers, and which unless they are most of it: then the others say it."""
    words = f"{len(layers)} of the {total}"
    if len(layers) * 2 > total:
        return words, False
    if layers[0].stem is None:
        names = [layer.name for layer in layers]
    else:
        names = ranges(sorted({layer.number for layer in layers}))
    few = len(names) <= _MOST_RANGES
    return (f"{words}: {', '.join(names)}" if few else words), not few

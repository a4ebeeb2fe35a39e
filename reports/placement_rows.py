"""Plan → the rows of its placement table: alike placements together, neighbouring layers as ranges."""

# ruff: noqa: RUF001, RUF002 - ranges are written with an en dash
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from planner.memory import waiting_slices, with_groups
from planner.phrases import cpu_words
from planner.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRow:
    """Placements of one group that wait and run in the same places.

    names: their layers, in order of execution. positions: where those stand among all layers.
    resident: slices that stay on `run_on`, of `slices`. nbytes: of all of them together.
    cpu_up_to_tokens, dtype: as in `Placement`.
    """

    names: tuple[str, ...]
    positions: tuple[int, ...]
    group: str
    home: str
    memory: str
    run_on: str
    resident: int
    slices: int
    nbytes: int
    cpu_up_to_tokens: int
    dtype: str | None

    def layers(self) -> str:
        """Return the layers, neighbours as ranges: "model.layers.0–13, 15, model.norm"."""
        return ", ".join(layer_ranges(self.names))

    def place(self) -> str:
        """Return where it waits and runs: "cuda:0", or "cpu (pinned) → cuda:0, 5 of 8 stay"."""
        stored = f", in {self.dtype}" if self.dtype is not None else ""
        if self.resident == self.slices:
            return self.run_on + stored
        home = self.home if self.memory in ("device", "disk") else f"{self.home} ({self.memory})"
        partly = f", {self.resident} of {self.slices} stay" if self.resident else ""
        return f"{home} → {self.run_on}{partly}{cpu_words(self.cpu_up_to_tokens)}{stored}"

    def words(self) -> str:
        """Return the row as one line: "model.layers.0–13 · self_attn · cuda:0"."""
        return f"{self.layers()} · {self.group} · {self.place()}"


def placement_rows(plan: Plan) -> list[PlacementRow]:
    """Return the rows, ordered by their first layer and, within it, as the plan lists its groups."""
    index = {layer.name: position for position, layer in enumerate(plan.graph.layers)}
    alike: dict[tuple[str, str, str, str, int, int, int, str | None], list[tuple[int, str, int]]] = {}
    for placement, group in with_groups(plan.graph, plan.placements):
        resident = group.slices - waiting_slices(placement, group)
        key = (
            placement.group, placement.home, placement.memory, placement.run_on, resident, group.slices,
            placement.cpu_up_to_tokens, placement.dtype,
        )  # fmt: skip
        alike.setdefault(key, []).append((index[placement.layer], placement.layer, placement.nbytes))
    rows = []
    for (group_name, home, memory, run_on, resident, slices, cpu_up_to_tokens, dtype), members in alike.items():
        members.sort()
        rows.append(
            PlacementRow(
                names=tuple(name for _, name, _ in members),
                positions=tuple(position for position, _, _ in members),
                group=group_name,
                home=home,
                memory=memory,
                run_on=run_on,
                resident=resident,
                slices=slices,
                nbytes=sum(nbytes for _, _, nbytes in members),
                cpu_up_to_tokens=cpu_up_to_tokens,
                dtype=dtype,
            )
        )
    return sorted(rows, key=lambda row: row.positions[0])


def layer_ranges(names: Sequence[str]) -> list[str]:
    """Return names with runs of numbers folded: ["model.layers.0–13", "15", "model.norm"]."""
    result: list[str] = []
    stem_before: str | None = None
    first = last = 0
    for name in names:
        match = re.fullmatch(r"(.*\.)(\d+)", name)
        if match is None:
            result.append(name or "(the model itself)")
            stem_before = None
            continue
        stem, number = match[1], int(match[2])
        if stem == stem_before and number == last + 1:
            last = number
            prefix = result[-1][: len(stem)] if result[-1].startswith(stem) else ""
            result[-1] = f"{prefix}{first}–{last}"
            continue
        result.append(str(number) if stem == stem_before else name)
        stem_before, first, last = stem, number, number
    return result

"""How often a router chose each expert of each layer, as it was measured or is said, and what that makes of a graph.

The file (docs/popularity.md) holds counts by layer; a graph holds of each kind of layer one curve, in few steps, and of
each layer its ranking. So alike layers stay alike, and can be counted.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from planner.errors import InputError
from planner.graph import Bucket, LayerGraph, LayerKind, WeightGroup
from planner.serial import write_text

FILE_VERSION = 1
# Steps that a curve has at most: each is a variable wherever slices can wait.
MOST_BUCKETS = 8
# Counts beyond this are not told apart in floating point.
_MOST = 2**53
# Names of layers that a message lists.
_LISTED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """How often each expert of a layer was routed to, by its number."""

    layer: str
    counts: tuple[float, ...]

    def __post_init__(self) -> None:
        for number, count in enumerate(self.counts):
            if isinstance(count, bool) or not isinstance(count, (int, float)) or not 0 <= count <= _MOST:
                raise InputError(
                    f"the popularity of experts: expert {number} of {self.layer} has the count {count!r}; it must be a "
                    f"number from 0 to {_MOST:,}"
                )
        if not any(self.counts):
            raise InputError(
                f"the popularity of experts: {self.layer} routed to none of its {len(self.counts)} experts; leave the "
                "layer out where nothing is known of it"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Popularity:
    """How often experts were routed to, in layers of different names, in the order of these."""

    layers: tuple[Routed, ...]

    @classmethod
    def of(cls, given: str | Path | Mapping[str, Sequence[float]] | Popularity | None) -> Popularity | None:
        """Return what a path names, a mapping from layers to counts, or a Popularity says; None of None.

        Raises:
            InputError: the file cannot be read or is none of these, or counts are no counts.
        """
        if given is None or isinstance(given, Popularity):
            return given
        if isinstance(given, (str, Path)):
            return cls.load(given)
        if not given:
            raise InputError("the popularity of experts: there are no layers in it; leave it out if nothing is known")
        for layer, counts in given.items():
            if not isinstance(counts, (list, tuple)):
                raise InputError(f"the popularity of experts: {layer} must hold a list of counts, one for each expert")
        return cls(layers=tuple(Routed(layer=name, counts=tuple(given[name])) for name in sorted(given)))

    @classmethod
    def load(cls, path: str | Path) -> Popularity:
        """Read a file of counts.

        Raises:
            InputError: it cannot be read, or is no such file; the message says where.
        """
        try:
            data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as exc:
            raise InputError(f"cannot read the popularity of experts in {path}: {exc.strerror or exc}") from exc
        except (ValueError, RecursionError) as exc:
            raise InputError(f"the popularity of experts in {path} is not JSON: {exc}") from exc
        wanted = f'{{"schema_version": {FILE_VERSION}, "layers": {{"LAYER": [COUNT, ...], ...}}}}'
        if not isinstance(data, dict) or data.keys() != {"schema_version", "layers"}:
            raise InputError(f"the popularity of experts in {path}: the file must hold {wanted}")
        if data["schema_version"] != FILE_VERSION or not isinstance(data["layers"], dict):
            version = data["schema_version"]
            raise InputError(f"the popularity of experts in {path} is of version {version!r}; it must hold {wanted}")
        found = cls.of(data["layers"])
        assert found is not None
        return found

    def save(self, path: str | Path) -> None:
        """Write the counts as `load` reads them, all or nothing.

        Raises:
            InputError: the path cannot be written.
        """
        layers = ",\n".join(f"  {json.dumps(entry.layer)}: {json.dumps(entry.counts)}" for entry in self.layers)
        write_text(path, f'{{\n "schema_version": {FILE_VERSION},\n "layers": {{\n{layers}\n }}\n}}\n')

    def on(self, graph: LayerGraph) -> LayerGraph:
        """Return the graph with experts as popular as this says; of layers that are not named, all are alike.

        The curve of a kind is the mean over its layers of their experts' chances, each layer's sorted from the most
        popular one, in at most MOST_BUCKETS steps. Kinds of which no layer is named stay as they are.

        Raises:
            InputError: a layer is not in the graph, has no experts, or another number of them.
        """
        routed = {entry.layer: entry.counts for entry in self.layers}
        self._check(graph)
        kinds, layers = list(graph.kinds), list(graph.layers)
        for number, kind in enumerate(graph.kinds):
            members = [index for index, layer in enumerate(graph.layers) if layer.kind == number]
            if not any(graph.layers[index].name in routed for index in members):
                continue
            (group,) = _experts(kind)
            even = (1.0,) * group.slices
            counts = [routed.get(graph.layers[index].name, even) for index in members]
            buckets = _curve([sorted(each, reverse=True) for each in counts], group.used_slices)
            groups = (replace(entry, buckets=buckets) if entry is group else entry for entry in kind.groups)
            kinds[number] = replace(kind, groups=tuple(groups))
            for index, each in zip(members, counts, strict=True):
                ranking = tuple(sorted(range(group.slices), key=lambda expert: (-each[expert], expert)))
                is_own = bool(buckets) and ranking != tuple(range(group.slices))
                layers[index] = replace(layers[index], ranking=ranking if is_own else ())
        return replace(graph, kinds=tuple(kinds), layers=tuple(layers))

    def note(self, graph: LayerGraph) -> str:
        """Return in words what is assumed of the experts of a graph that this was made part of."""
        named = {entry.layer for entry in self.layers}
        unnamed = [
            layer.name for layer in graph.layers if _experts(graph.kinds[layer.kind]) and layer.name not in named
        ]
        text = described(graph) or "experts are equally popular (as was given)"
        if unnamed:
            more = f" and {len(unnamed) - _LISTED} more" if len(unnamed) > _LISTED else ""
            text += f"; equally popular where nothing was given: {', '.join(unnamed[:_LISTED])}{more}"
        return text

    def _check(self, graph: LayerGraph) -> None:
        kinds = {layer.name: graph.kinds[layer.kind] for layer in graph.layers}
        with_experts = [name for name, kind in kinds.items() if _experts(kind)]
        for entry in self.layers:
            said = f"the popularity of experts: {entry.layer!r}"
            if entry.layer not in kinds:
                raise InputError(f"{said} is no layer of {graph.model}; {_examples(entry.layer, with_experts)}")
            sliced = _experts(kinds[entry.layer])
            if not sliced:
                raise InputError(f"{said} has no experts in {graph.model}; {_examples(entry.layer, with_experts)}")
            if len(sliced) > 1:
                names = " and ".join(group.name for group in sliced)
                raise InputError(f"{said} has experts in {names}, and only one such group in a layer is carried")
            if len(entry.counts) != sliced[0].slices:
                raise InputError(f"{said} has {sliced[0].slices} experts, and {len(entry.counts)} counts were given")


def described(graph: LayerGraph) -> str | None:
    """Return in words how popular the experts of a graph are; None where all of a layer are alike."""
    steps = [len(group.buckets) for kind in graph.kinds for group in kind.groups if group.buckets]
    if not steps:
        return None
    return (
        "experts are as popular as was given, and the least popular wait: each kind of layer has one curve, the mean "
        f"of its layers' from the most popular expert to the least, in up to {max(steps)} steps; tokens choose "
        "independently of each other"
    )


def _experts(kind: LayerKind) -> list[WeightGroup]:
    return [group for group in kind.groups if group.slices > 1]


def _examples(wanted: str, names: list[str]) -> str:
    if not names:
        return "none of its layers has experts that can be placed one by one"
    close = difflib.get_close_matches(wanted, names, n=_LISTED, cutoff=0.6)
    listed = [name for name in names if name in close] + [name for name in names if name not in close]
    listed = listed[:_LISTED]
    more = f" (of {len(names)})" if len(names) > len(listed) else ""
    return f"layers with experts are {', '.join(repr(name) for name in listed)}{more}"


def _chances(counts: Sequence[float], used: int) -> list[float]:
    """Return the chance that one token uses each expert, in proportion to the counts; they add up to `used`.

    No token uses an expert twice: what would be above 1 is 1, and the others share the rest in proportion.
    """
    found = [0.0] * len(counts)
    rest = list(range(len(counts)))
    while rest:
        total, left = math.fsum(counts[i] for i in rest), used - (len(counts) - len(rest))
        certain = [i for i in rest if left * counts[i] > total]
        if not certain:
            for i in rest:
                found[i] = left * counts[i] / total if total else left / len(rest)
            break
        for i in certain:
            found[i] = 1.0
        rest = [i for i in rest if found[i] < 1.0]
    return found


def _curve(layers: Sequence[Sequence[float]], used: int) -> tuple[Bucket, ...]:
    """Return the mean chances of experts by rank, of layers with counts sorted from the most; none if all are alike."""
    chances = [_chances(counts, used) for counts in layers]
    means = [math.fsum(at_rank) / len(layers) for at_rank in zip(*chances, strict=True)]
    steps: list[tuple[int, float]] = []
    for chance in means:
        if steps and steps[-1][1] == chance:
            steps[-1] = (steps[-1][0] + 1, chance)
        else:
            steps.append((1, chance))
    while len(steps) > MOST_BUCKETS:
        # The two neighbours are joined that are nearest to their common mean, by the sum of squares (Ward, 1963).
        errors = [a * b / (a + b) * (one - other) ** 2 for (a, one), (b, other) in itertools.pairwise(steps)]
        at = errors.index(min(errors))
        (a, one), (b, other) = steps[at : at + 2]
        steps[at : at + 2] = [(a + b, (a * one + b * other) / (a + b))]
    if len(steps) == 1:
        return ()
    return tuple(Bucket(slices=count, chance=chance) for count, chance in steps)

"""A traced model: layers with byte-accurate weights, and what each forward pass needs of memory and arithmetic.

The graph is compact: layers that are alike share a `LayerKind`, and equal neighbouring spans of a pass are counted,
not listed. It holds everything that planning, simulating and verifying need; no torch is imported here.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from planner.errors import PlanFormatError
from planner.holdings import Holding, Lasting, problem
from planner.serial import OMITTED, canonical, decode
from planner.units import round_up

if TYPE_CHECKING:
    import networkx

# Tensors inside one slab start at multiples of this, so that any kernel may read them where they lie.
SLAB_ALIGNMENT_BYTES = 256
# Chances of a group's slices add up to how many one token uses, but for rounding.
_ROUNDING = 1e-6


def full_name(layer: str, name: str) -> str:
    """Return a name in a layer as the model has it; the layer "" is the model itself, the name "" the layer."""
    return f"{layer}.{name}" if layer and name else layer or name


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What a checkpoint's files hold of one tensor, as their headers say.

    dtype: torch's name of it; of several, that of most bytes.
    pieces: stored tensors that the tensor is made of; largest_bytes: of the largest of them.
    in_place: every piece is one run of bytes of the tensor, so that it can be read to where it belongs.
    """

    dtype: str
    item_bytes: int
    nbytes: int
    pieces: int
    largest_bytes: int
    in_place: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A parameter or buffer; `name` is relative to its layer ("self_attn.q_proj.weight").

    stored: what the checkpoint holds of it; None where no checkpoint was looked at, or it holds nothing of it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    buffer: bool = False
    persistent: bool = True
    stored: Stored | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes in the checkpoint's files; as many as in memory where these were not looked at."""
        return self.nbytes if self.stored is None else self.stored.nbytes

    @property
    def is_converted(self) -> bool:
        """Whether it is stored in another dtype than it is computed in."""
        return self.stored is not None and self.stored.dtype != self.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """So many slices of a group that are equally popular. chance: that one token uses a certain one of them."""

    slices: int
    chance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGroup:
    """Tensors of one layer that are stored and moved together.

    slices: 1, or the number of experts, which are the first dimension of every tensor; each can be placed by itself.
    used_slices: how many slices one token uses (top-k); 1 where slices is 1.
    streamable: whether the group may wait elsewhere than on the device that computes with it.
    buckets: of all slices, the most popular first; none: each is equally popular.
    by_rows: whether each token reads one row of it and nothing all: an embedding, whose weight only embeddings use.
    """

    name: str
    slices: int
    used_slices: int
    streamable: bool
    tensors: tuple[Tensor, ...]
    buckets: tuple[Bucket, ...] = field(default=(), metadata=OMITTED)
    by_rows: bool = field(default=False, metadata=OMITTED)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def slice_slab_bytes(self) -> int:
        """Bytes of one slice laid out in a slab, each tensor from an aligned start."""
        return sum(round_up(tensor.nbytes // self.slices, SLAB_ALIGNMENT_BYTES) for tensor in self.tensors)

    @property
    def slice_stored_bytes(self) -> int:
        """Bytes of one slice where it waits on disk: those of the checkpoint's files, or of a slab if not known."""
        if all(tensor.stored is None for tensor in self.tensors):
            return self.slice_slab_bytes
        return sum(tensor.stored_bytes for tensor in self.tensors) // self.slices

    @property
    def is_mappable(self) -> bool:
        """Whether the files hold each tensor as it is computed with, so that it can be used straight from there.

        Of experts that must be known: most files hold each of them apart.
        """
        if self.slices > 1 and any(t.stored is None for t in self.tensors):
            return False
        return all(t.stored is None or (t.stored.pieces == 1 and not t.is_converted) for t in self.tensors)

    @property
    def from_least(self) -> tuple[Bucket, ...]:
        """Return all slices, the least popular first: the order in which they are let wait."""
        if self.buckets:
            return self.buckets[::-1]
        return (Bucket(slices=self.slices, chance=self.used_slices / self.slices),)

    def waiting(self, slices: int) -> Iterator[tuple[int, Bucket]]:
        """Yield how many of each bucket wait where so many slices do: the least popular ones."""
        for bucket in self.from_least:
            taken = min(slices, bucket.slices)
            if taken:
                yield taken, bucket
            slices -= taken

    def used(self, bucket: Bucket, tokens: int) -> float:
        """Return the chance that any of `tokens` tokens uses a certain slice of a bucket: 1 - (1 - p)^T.

        Exact where tokens choose independently of each other, each using the slice with the bucket's chance p.
        """
        return 1.0 if self.slices == 1 else 1.0 - (1.0 - bucket.chance) ** tokens

    def expected_slices(self, tokens: int) -> float:
        """Return how many distinct slices `tokens` independent tokens are expected to use, the sum of all chances.

        Where each of E is equally popular and a token uses k of them, that is E * (1 - (1 - k/E)^T).
        """
        return sum(bucket.slices * self.used(bucket, tokens) for bucket in self.from_least)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """What alike layers share: their module class and weight groups."""

    name: str
    groups: tuple[WeightGroup, ...]

    @property
    def nbytes(self) -> int:
        return sum(group.nbytes for group in self.groups)

    def group(self, name: str) -> WeightGroup:
        return next(group for group in self.groups if group.name == name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer in execution order: its module path and the index of its kind.

    ranking: its experts by their numbers, the most popular first; none: in the order of their numbers.
    called_again: whether it is called more than once in a pass.
    """

    name: str
    kind: int
    ranking: tuple[int, ...] = field(default=(), metadata=OMITTED)
    called_again: bool = field(default=False, metadata=OMITTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """What `source` makes and `target` takes: so many bytes must move in a pass if the devices differ.

    tensor: edges from one source with the same name carry the same thing, which moves to each device once; the
        smaller ones are parts of the largest.
    may_cut: whether the two layers may run on different devices.
    """

    source: int
    target: int
    prefill_bytes: int
    decode_bytes: int
    tensor: str = ""
    may_cut: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredTime:
    """What a layer was measured to take on a device in each kind of pass, in ns; used instead of an estimate."""

    layer: int
    device: str
    prefill_ns: int
    decode_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What `count` neighbouring layers do alike in one pass: each from its start to the start of the next.

    held_bytes: neither weights nor cache, alive when the layer starts.
    peak_bytes: the most that is alive during the span, above what was alive (cache included) at its start.
    scratch_bytes: what kernels take beside that at the worst instant of the span.
    kv_before_bytes, kv_after_bytes: this layer's cache.
    input_bytes: tensors handed to the layer, which must be on its device.
    flops: of matrix products, attention and convolutions (a multiply-add is 2).
    moved_bytes: read and written by operators, weights included, experts' weights apart.
    operators: operators called.
    kv_host_bytes: of host memory that this layer's cache takes where it waits there (planner/host_cache.py).
    kv_down_bytes, kv_up_bytes: of it that are copied to the host and from there, in this pass.
    """

    count: int
    held_bytes: int
    peak_bytes: int
    scratch_bytes: int
    kv_before_bytes: int
    kv_after_bytes: int
    input_bytes: int
    flops: int
    moved_bytes: int
    operators: int
    kv_host_bytes: int = field(default=0, metadata=OMITTED)
    kv_down_bytes: int = field(default=0, metadata=OMITTED)
    kv_up_bytes: int = field(default=0, metadata=OMITTED)

    @property
    def requested_bytes(self) -> int:
        """The most bytes asked for while the layer runs, its kernels' scratch with them, cache before it apart."""
        return self.held_bytes + self.peak_bytes + self.scratch_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One forward call and the caller's code around it.

    tokens: per sequence in this call; context_tokens: per sequence in the cache when it ends.
    holdings, lasting: whose tensors are held while each layer runs, in the order of calls; none where that is not
        known, as in graphs for a CPU alone.
    """

    name: str
    tokens: int
    context_tokens: int
    spans: tuple[Span, ...]
    holdings: tuple[Holding, ...] = field(default=(), metadata=OMITTED)
    lasting: tuple[Lasting, ...] = field(default=(), metadata=OMITTED)

    def per_layer(self) -> tuple[Span, ...]:
        """Return one span for each layer, in order."""
        return tuple(span for span in self.spans for _ in range(span.count))


@functools.lru_cache(maxsize=16)
def _measured(times: tuple[MeasuredTime, ...]) -> dict[tuple[int, str], tuple[int, int]]:
    return {(time.layer, time.device): (time.prefill_ns, time.decode_ns) for time in times}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGraph:
    """The traced model.

    allocator_bytes: what a GPU's caching allocator reserves beyond what is requested of it, besides weights and slots.
    passes: "prefill", and where tokens are generated "decode_first" and "decode_last"; steps between are affine in
        the context length. Of a prefill in chunks "prefill" is the first, then come "prefill_next" and "prefill_last",
        whole chunks that those between are affine in, and "prefill_rest", a shorter one.
    ties: sets of full tensor names that share one storage.
    loose: tensors outside every layer (rotary tables and the like); they live with the first layer.
    measured: computing times that the user has measured.
    """

    model: str
    batch_size: int
    kinds: tuple[LayerKind, ...]
    layers: tuple[Layer, ...]
    edges: tuple[Edge, ...]
    ties: tuple[tuple[str, ...], ...]
    loose: tuple[Tensor, ...]
    allocator_bytes: int
    passes: tuple[Pass, ...]
    measured: tuple[MeasuredTime, ...] = ()

    def measured_ns(self, layer: int, device: str, *, prefill: bool) -> int | None:
        """Return what a layer was measured to take on a device, or None."""
        if not self.measured:
            return None
        found = _measured(self.measured).get((layer, device))
        return found if found is None else found[0 if prefill else 1]

    @property
    def prefill_passes(self) -> tuple[Pass, ...]:
        """The first pass, and those of further chunks of the prompt."""
        return (*self.passes[:1], *(entry for entry in self.passes[1:] if entry.name.startswith("prefill")))

    @property
    def decode_passes(self) -> tuple[Pass, ...]:
        return tuple(entry for entry in self.passes[1:] if not entry.name.startswith("prefill"))

    def kind_of(self, index: int) -> LayerKind:
        return self.kinds[self.layers[index].kind]

    def rankings(self) -> dict[str, tuple[int, ...]]:
        """Return the ranking of every layer that has one."""
        return {layer.name: layer.ranking for layer in self.layers if layer.ranking}

    def tensors(self) -> Iterator[tuple[int, WeightGroup, str, Tensor]]:
        """Yield (layer index, group, full name, tensor) for every tensor of every layer, ties repeated."""
        for index, layer in enumerate(self.layers):
            for group in self.kinds[layer.kind].groups:
                for tensor in group.tensors:
                    yield index, group, full_name(layer.name, tensor.name), tensor

    def tied_to_earlier(self) -> dict[str, str]:
        """Return {full name: the name of the tensor met first} for every tied tensor but the first of its set."""
        order = {name: position for position, (_, _, name, _) in enumerate(self.tensors())}
        result = {}
        for names in self.ties:
            known = sorted((name for name in names if name in order), key=order.__getitem__)
            result.update(dict.fromkeys(known[1:], known[0]))
        return result

    @property
    def num_parameters(self) -> int:
        """Parameters, each tied one counted once."""
        tied = self.tied_to_earlier()
        return sum(
            math.prod(tensor.shape) for _, _, name, tensor in self.tensors() if not tensor.buffer and name not in tied
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of parameters and buffers, each tied one counted once."""
        tied = self.tied_to_earlier()
        inside = sum(tensor.nbytes for _, _, name, tensor in self.tensors() if name not in tied)
        return inside + sum(tensor.nbytes for tensor in self.loose)

    def to_networkx(self) -> networkx.DiGraph[int]:
        """Return the layers as nodes (name, kind, bytes) and the edges with their bytes."""
        import networkx

        graph: networkx.DiGraph[int] = networkx.DiGraph()
        for index, layer in enumerate(self.layers):
            kind = self.kinds[layer.kind]
            graph.add_node(index, name=layer.name, kind=kind.name, nbytes=kind.nbytes)
        for edge in self.edges:
            known = graph.get_edge_data(edge.source, edge.target, {"prefill_bytes": 0, "decode_bytes": 0})
            graph.add_edge(
                edge.source,
                edge.target,
                prefill_bytes=known["prefill_bytes"] + edge.prefill_bytes,
                decode_bytes=known["decode_bytes"] + edge.decode_bytes,
            )
        return graph

    def to_json(self) -> str:
        return canonical(self)

    @classmethod
    def from_json(cls, text: str) -> LayerGraph:
        """Read a graph, also one written by hand: what has a default may be left out (docs/layer-graph.md).

        Raises:
            PlanFormatError: not JSON, a key is missing, unknown or of a wrong type, or parts contradict each other.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as exc:
            raise PlanFormatError(f"not a graph: line {exc.lineno} is not JSON ({exc.msg})") from exc
        except RecursionError as exc:
            raise PlanFormatError("not a graph: brackets are nested too deeply") from exc
        graph = decode(cls, data, where="graph", defaults=True)
        graph.check()
        return graph

    @classmethod
    def from_dict(cls, data: Any) -> LayerGraph:
        """Build a graph from JSON data and check that its parts agree.

        Raises:
            PlanFormatError: a key is missing, unknown or of a wrong type, or parts contradict each other.
        """
        graph = decode(cls, data, where="graph")
        graph.check()
        return graph

    def check(self) -> None:
        """Raise PlanFormatError where the parts of the graph contradict each other."""
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            raise PlanFormatError("graph names a layer twice")
        for layer in self.layers:
            if not 0 <= layer.kind < len(self.kinds):
                raise PlanFormatError(f"graph layer {layer.name} has kind {layer.kind}; there are {len(self.kinds)}")
        for entry in self.passes:
            spans = sum(span.count for span in entry.spans)
            if spans != len(self.layers):
                raise PlanFormatError(f"graph pass {entry.name} has {spans} spans for {len(self.layers)} layers")
            wrong = problem(entry.holdings, entry.lasting, len(self.layers))
            if wrong is not None:
                raise PlanFormatError(f"graph pass {entry.name}: {wrong}")
        for edge in self.edges:
            if not 0 <= edge.source < edge.target < len(self.layers):
                raise PlanFormatError(f"graph edge {edge.source} → {edge.target} does not point forward")
            if min(edge.prefill_bytes, edge.decode_bytes) < 0:
                raise PlanFormatError(f"graph edge {edge.source} → {edge.target} carries less than nothing")
        for time in self.measured:
            if not 0 <= time.layer < len(self.layers) or min(time.prefill_ns, time.decode_ns) < 0:
                raise PlanFormatError(f"graph holds a measured time of layer {time.layer} that cannot be")
        for kind in self.kinds:
            for group in kind.groups:
                if group.slices < 1 or any(
                    tensor.nbytes < 0 or tensor.nbytes % group.slices for tensor in group.tensors
                ):
                    raise PlanFormatError(
                        f"graph group {kind.name}.{group.name} cannot be cut into {group.slices} slices"
                    )
                _check_buckets(kind, group)
        for layer in self.layers:
            sliced = [group.slices for group in self.kinds[layer.kind].groups if group.slices > 1]
            if layer.ranking and (len(sliced) != 1 or sorted(layer.ranking) != list(range(sliced[0]))):
                raise PlanFormatError(
                    f"graph layer {layer.name} has a ranking that does not name each of its experts once"
                )


def _check_buckets(kind: LayerKind, group: WeightGroup) -> None:
    """Raise PlanFormatError where the popularity of a group's slices cannot be."""
    if not group.buckets:
        return
    chances = [bucket.chance for bucket in group.buckets]
    used = sum(bucket.slices * bucket.chance for bucket in group.buckets)
    if (
        sum(bucket.slices for bucket in group.buckets) != group.slices
        or min(bucket.slices for bucket in group.buckets) < 1
        or not all(0 <= chance <= 1 for chance in chances)
        or chances != sorted(chances, reverse=True)
        or abs(used - group.used_slices) > _ROUNDING * group.used_slices
    ):
        raise PlanFormatError(
            f"graph group {kind.name}.{group.name}: buckets hold its {group.slices} slices, the most popular first, "
            f"and their chances add up to the {group.used_slices} that one token uses"
        )

"""Runs a model's skeleton and keeps the stream of allocations, cut into passes and spans of layers.

A pass is a forward call and the caller's code after it. A span runs from the start of one layer to the start of the
next. A layer that is like one already run in the same pass is not run again: the events of the other are played with
blocks of its own, its part of the cache gets the state that the other's got, and a like output is handed on, so that
a model of 126 layers is traced at the price of a few. A layer whose effects cannot all be named that way runs itself.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from planner.journal import Taken
from planner.layers import weight_groups
from planner.lifetimes import Event
from planner.storages import StorageTracer, nbytes_of
from planner.template import Slot, Template, leaves, named_blocks, picture, shape_of, slot_state

# Names in `vars(module)` that say which layer it is, not what it does.
_NUMBERS = ("layer_idx", "layer_id", "training")


@dataclass(slots=True)
class RawSpan:
    """One layer in one pass: events [start, end) of its run. kv_before_bytes, kv_after_bytes: of the layer's cache."""

    layer: int
    start: int
    end: int = 0
    input_bytes: int = 0
    kv_before_bytes: int = 0
    kv_after_bytes: int = 0
    flops: int = 0
    moved_bytes: int = 0
    operators: int = 0


@dataclass(slots=True)
class RawPass:
    """Events [start, end) of a run, and the spans in them, in order."""

    start: int
    end: int = 0
    spans: list[RawSpan] = field(default_factory=list)


@dataclass(slots=True)
class Run:
    """One recorded call of the model or of `generate`.

    cache_blocks: blocks that were part of a cache. makers, taken: as the journal has them.
    """

    events: list[Event]
    passes: list[RawPass]
    maker: dict[int, int]
    flows: set[tuple[int, int]]
    unmodelled: set[str]
    cache_blocks: set[int]
    makers: dict[int, int | None]
    taken: list[Taken]


class _Enough(BaseException):
    """As many passes as were asked for have been recorded."""


class Recorder:
    """Wraps a model and its layers, whose tensors are fake; `record` runs a call and returns what it did.

    layers: (path, module) of what is told apart; none of them lies in another.
    replay: whether layers that are alike may stand for each other.
    """

    def __init__(self, model: torch.nn.Module, layers: list[tuple[str, torch.nn.Module]], *, replay: bool = True):
        self.model, self.layers, self.replay = model, layers, replay
        self._signatures = [_signature(module) for _, module in layers]
        self._numbers = [_layer_number(module) for _, module in layers]
        self._weights = {t.untyped_storage()._cdata for t in itertools.chain(model.parameters(), model.buffers())}
        self.borrowed: set[tuple[int, str]] = set()
        self._first_alike = {signature: index for index, signature in reversed(list(enumerate(self._signatures)))}
        self._groups: dict[int, tuple[int, str]] = {}
        self._tracer: StorageTracer
        self._run: Run
        self._open: RawSpan | None = None
        self._most_passes: int | None = None
        self._calls = 0
        self._depth = self._nested = 0
        self._templates: dict[Any, Template] = {}
        self._slots: dict[int, set[Slot]] = {}
        self._wrap()

    def record(self, call: Callable[[], Any], tracer: StorageTracer, *, passes: int | None = None) -> Run:
        """Run `call` under `tracer` and return its run, of at most `passes` forward calls."""
        self._tracer = tracer
        tracer.given |= self._weights
        tracer.group_storages = self._groups
        journal = tracer.journal
        self._run = Run(
            tracer.events, [], tracer.maker, tracer.flows, tracer.unmodelled, set(), journal.makers, journal.taken
        )
        self._most_passes = passes
        self._templates.clear()
        self._slots.clear()
        self._open = None
        self._depth = self._nested = 0
        self._begin_pass()
        self._calls = 0
        with tracer, contextlib.suppress(_Enough):
            kept = call()
            del kept
            self._close_span()
            self._run.passes[-1].end = len(tracer.events)
        self.borrowed |= tracer.borrowed
        return self._run

    def is_borrowed(self, layer: int, group: str) -> bool:
        """Tell whether a weight group of a layer was used by others than the module that it is named after."""
        return (self._first_alike[self._signatures[layer]], group) in self.borrowed

    def is_looked_up(self, layer: torch.nn.Module) -> bool:
        """Tell whether a layer is an embedding whose weight nothing but embeddings used."""
        return isinstance(layer, torch.nn.Embedding) and _table(layer) not in self.borrowed

    def where(self) -> str:
        """Return " in <layer>" for the layer that was running last, or nothing."""
        span = self._open
        path = self.layers[span.layer][0] if span is not None and span.layer >= 0 else ""
        return f" in {path!r}" if path else ""

    def _begin_pass(self) -> None:
        self._close_span()
        here = len(self._tracer.events)
        if self._run.passes:
            self._run.passes[-1].end = here
        self._run.passes.append(RawPass(start=here))
        self._open = None
        self._begin_span(-1)

    def _begin_span(self, layer: int) -> None:
        """Open the span of `layer`; what comes before a pass's first layer belongs to that layer (-1 until known)."""
        self._close_span()
        self._open = RawSpan(layer=layer, start=len(self._tracer.events))
        tracer = self._tracer
        tracer.layer = layer
        tracer.flops = tracer.moved_bytes = tracer.operators = 0

    def _close_span(self) -> None:
        span, tracer = self._open, self._tracer
        self._open = None
        if span is None:
            return
        span.end = len(tracer.events)
        span.flops, span.moved_bytes, span.operators = tracer.flops, tracer.moved_bytes, tracer.operators
        if span.layer >= 0 or span.end > span.start:
            self._run.passes[-1].spans.append(span)

    def _wrap(self) -> None:
        if not any(module is self.model for _, module in self.layers):
            forward = self.model.forward

            @functools.wraps(forward)
            def whole(*args: Any, **kwargs: Any) -> Any:
                if self._depth == 0:
                    self._begin_call((args, kwargs))
                tracer = self._tracer
                outer, tracer.in_forward = tracer.in_forward, True
                try:
                    return forward(*args, **kwargs)
                finally:
                    tracer.in_forward = outer
                    if not outer:
                        tracer.journal.end_call()

            self.model.forward = whole
        for index, (_, module) in enumerate(self.layers):
            if self._first_alike[self._signatures[index]] == index or isinstance(module, torch.nn.Embedding):
                self._watch_groups(index, module)
            module.forward = self._wrapped(index, module)

    def _watch_groups(self, index: int, layer: torch.nn.Module) -> None:
        """Have the tracer told when the module of each weight group of a layer runs; of alike layers, one is."""
        table = _table(layer) if isinstance(layer, torch.nn.Embedding) else None
        if table is not None:
            self._groups[table[0]] = table
            layer.forward = self._opening(layer.forward, table)
            return
        for group in weight_groups(layer):
            if not group.streamable or group.slices > 1:
                continue
            module, key = layer.get_submodule(group.name), (index, group.name)
            for tensor in group.tensors:
                if not tensor.buffer:
                    self._groups[layer.get_parameter(tensor.name).untyped_storage()._cdata] = key
            module.forward = self._opening(module.forward, key)

    def _opening(self, forward: Callable[..., Any], key: tuple[int, str]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def opened(*args: Any, **kwargs: Any) -> Any:
            self._tracer.open_groups.add(key)
            try:
                return forward(*args, **kwargs)
            finally:
                self._tracer.open_groups.discard(key)

        return opened

    def _begin_call(self, inputs: Any) -> None:
        self._calls += 1
        if self._calls > 1:
            if self._most_passes is not None and self._calls > self._most_passes:
                self._close_span()
                self._run.passes[-1].end = len(self._tracer.events)
                raise _Enough
            self._begin_pass()
        for cache in _caches(inputs):
            for slot in range(len(cache.layers)):
                self._mark_cache(leaves(vars(cache.layers[slot])))

    def _mark_cache(self, tensors: Iterator[torch.Tensor]) -> None:
        blocks = (self._tracer.block_of(tensor) for tensor in tensors)
        self._run.cache_blocks.update(block for block in blocks if block is not None)

    def _wrapped(self, index: int, module: torch.nn.Module) -> Any:
        forward = module.forward
        has_children = next(module.named_children(), None) is not None

        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            if module is self.model and self._depth == 0:
                self._begin_call((args, kwargs))
            inputs = list(leaves((args, kwargs)))
            caches = list(_caches((args, kwargs)))
            self._enter(index, inputs, caches)
            self._depth += 1
            self._nested += self._depth > 1
            self._tracer.inside = True
            try:
                if self.replay and has_children:
                    out = self._run_or_replay(index, forward, args, kwargs, inputs, caches)
                else:
                    out = forward(*args, **kwargs)
            finally:
                self._depth -= 1
                self._tracer.inside = self._depth > 0
            if caches:
                self._leave(index, caches)
            return out

        return call

    def _enter(self, index: int, inputs: list[torch.Tensor], caches: list[Any]) -> None:
        span = self._open
        if span is not None and span.layer < 0:
            span.layer = index
            self._tracer.layer = index
            for block in [b for b in self._tracer.maker if self._tracer.maker[b] < 0]:
                self._tracer.maker[block] = index
            early = {flow for flow in self._tracer.flows if flow[1] < 0}
            self._tracer.flows -= early
            self._tracer.flows |= {(block, index) for block, _ in early if self._tracer.maker[block] != index}
        elif span is None or span.layer != index or self._depth == 0:
            self._begin_span(index)
            span = self._open
        assert span is not None
        span.input_bytes += nbytes_of(inputs)
        for tensor in inputs:
            self._tracer.journal.take(tensor, self._tracer.maker_of(tensor), index)
        if caches:
            self._slots.setdefault(index, set()).update(self._own_slots(index, caches))
            span.kv_before_bytes += self._kv_bytes(index, caches)

    def _own_slots(self, index: int, caches: list[Any]) -> list[Slot]:
        number = self._numbers[index]
        if number is None:
            return []
        return [Slot(at, number) for at, cache in enumerate(caches) if number < len(cache.layers)]

    def _kv_bytes(self, index: int, caches: list[Any]) -> int:
        slots = [slot for slot in self._slots.get(index, ()) if slot.cache < len(caches)]
        return nbytes_of(leaf for slot in slots for leaf in leaves(vars(caches[slot.cache].layers[slot.layer])))

    def _leave(self, index: int, caches: list[Any]) -> None:
        self._slots.setdefault(index, set()).update(self._own_slots(index, caches))
        for slot in self._slots[index]:
            if slot.cache < len(caches):
                self._mark_cache(leaves(vars(caches[slot.cache].layers[slot.layer])))
        if self._open is not None:
            self._open.kv_after_bytes += self._kv_bytes(index, caches)

    def _run_or_replay(
        self, index: int, forward: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor], caches: list[Any]
    ) -> Any:
        number = self._numbers[index]
        state = [
            tuple(shape_of(leaf) for leaf in leaves(vars(caches[slot.cache].layers[slot.layer])))
            for slot in self._own_slots(index, caches)
        ]
        key = (len(self._run.passes), self._signatures[index], picture((args, kwargs)), tuple(state))
        template = self._templates.get(key)
        if template is not None:
            with torch._C.DisableTorchFunction():
                played = template.play(self._tracer, number, inputs, caches)
            if played is not None:
                return played[0]
        return self._run_as_template(key, number, forward, args, kwargs, inputs, caches)

    def _run_as_template(
        self, key: Any, number: int | None, forward: Any, args: Any, kwargs: Any, inputs: Any, caches: list[Any]
    ) -> Any:
        tracer = self._tracer
        start, nested = len(tracer.events), self._nested
        work = (tracer.flops, tracer.moved_bytes, tracer.operators)
        flows_before, tracer.flows = tracer.flows, set()
        names = named_blocks(tracer, inputs, caches)
        before = slot_state(caches)
        try:
            out = forward(*args, **kwargs)
        finally:
            used, tracer.flows = tracer.flows, flows_before
            tracer.flows |= used
        if nested == self._nested:
            changed = [slot for slot, value in slot_state(caches).items() if before.get(slot) != value]
            self._templates[key] = Template(
                tracer=tracer,
                number=number,
                events=tracer.events[start:],
                names=names,
                used=[names[block] for block, _ in used if block in names],
                work=(tracer.flops - work[0], tracer.moved_bytes - work[1], tracer.operators - work[2]),
                out=out,
                states={slot: vars(caches[slot.cache].layers[slot.layer]) for slot in changed},
                caches=caches,
            )
        return out


def _caches(values: Any) -> Iterator[Any]:
    """Yield every cache of transformers among arguments; of an encoder-decoder's, both halves."""
    for value in itertools.chain(values[0], values[1].values()):
        halves = [getattr(value, f"{name}_attention_cache", None) for name in ("self", "cross")]
        for cache in halves if halves[0] is not None else [value]:
            if hasattr(cache, "get_seq_length") and isinstance(getattr(cache, "layers", None), list):
                yield cache


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _table(embedding: torch.nn.Embedding) -> tuple[int, str]:
    """Return the key of an embedding's weight, which embeddings that are tied share."""
    return embedding.weight.untyped_storage()._cdata, "rows"


def _layer_number(module: torch.nn.Module) -> int | None:
    for child in module.modules():
        index = getattr(child, "layer_idx", None)
        if isinstance(index, int):
            return index
    return None


def _signature(module: torch.nn.Module) -> Any:
    """Return what makes two layers alike: classes, plain attributes but the layer's number, and tensors."""
    if next(module.named_children(), None) is None:
        return None
    parts: list[Any] = []
    for name, child in module.named_modules():
        plain = {key: value for key, value in vars(child).items() if key not in _NUMBERS and _is_plain(value)}
        parts.append((name, type(child).__qualname__, tuple(plain.items())))
    named = itertools.chain(module.named_parameters(), module.named_buffers())
    parts += [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in named]
    return tuple(parts)

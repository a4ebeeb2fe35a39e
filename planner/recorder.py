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
from torch.utils._python_dispatch import _disable_current_modes

from planner.journal import Taken
from planner.layers import weight_groups
from planner.lifetimes import Event
from planner.storages import StorageTracer, nbytes_of

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
        self._templates: dict[Any, _Template] = {}
        self._slots: dict[int, set[_Slot]] = {}
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

    def _own_slots(self, index: int, caches: list[Any]) -> list[_Slot]:
        number = self._numbers[index]
        if number is None:
            return []
        return [_Slot(at, number) for at, cache in enumerate(caches) if number < len(cache.layers)]

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
            tuple(_shape(leaf) for leaf in leaves(vars(caches[slot.cache].layers[slot.layer])))
            for slot in self._own_slots(index, caches)
        ]
        key = (len(self._run.passes), self._signatures[index], _plain((args, kwargs)), tuple(state))
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
        names = _names(tracer, inputs, caches)
        before = _slot_state(caches)
        try:
            out = forward(*args, **kwargs)
        finally:
            used, tracer.flows = tracer.flows, flows_before
            tracer.flows |= used
        if nested == self._nested:
            changed = [slot for slot, value in _slot_state(caches).items() if before.get(slot) != value]
            self._templates[key] = _Template(
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


@dataclass(frozen=True, slots=True)
class _Slot:
    """A layer of one of the caches handed to a layer of the model."""

    cache: int
    layer: int


# How a block that was there before a layer ran is found again for another layer: the layer's n-th input, or the n-th
# tensor of its cache (which cache, layers away from its own, position).
_Name = tuple[Any, ...]


class _UnnamedError(Exception):
    """A tensor cannot be found again from another layer."""


class _Template:
    """What a layer did, to be done again by one that is alike. `play` returns None where that cannot be."""

    def __init__(
        self,
        *,
        tracer: StorageTracer,
        number: int | None,
        events: list[Event],
        names: dict[int, _Name],
        used: list[_Name],
        work: tuple[int, int, int],
        out: Any,
        states: dict[_Slot, dict[str, Any]],
        caches: list[Any],
    ):
        self.events = [event for event in events if event.kind != "library"]
        self.used, self.work = used, work
        self.usable = True
        made = {event.block for event in self.events if event.nbytes > 0}
        freed = {event.block for event in self.events if event.nbytes < 0}
        own = number or 0
        self.names = {block: _relative(name, own) for block, name in names.items() if block in freed - made}
        self.used = [_relative(name, own) for name in used]
        known = {block: _relative(name, own) for block, name in names.items()}
        try:
            if states and number is None:
                raise _UnnamedError
            self.out = _blueprint(out, tracer, made, known)
            self.states = {
                (slot.cache, slot.layer - own): (
                    type(caches[slot.cache].layers[slot.layer]),
                    _blueprint(state, tracer, made, known),
                )
                for slot, state in states.items()
            }
        except _UnnamedError:
            self.usable = False
            return
        refs = list(_refs((self.out, [state for _, state in self.states.values()])))
        named = [*self.names.values(), *self.used, *(ref.name for ref in refs if ref.name)]
        self.slots = {(name[1], name[2]) for name in named if name[0] == "cache"} | set(self.states)
        kept = {ref.block for ref in refs}
        flags = [getattr(cache, "is_updated", None) for cache in caches]
        self.flags = [isinstance(flag, dict) and flag.get(own) for flag in flags]
        if made - freed - kept or (freed - made) - set(self.names):
            self.usable = False

    def play(
        self, tracer: StorageTracer, number: int | None, inputs: list[torch.Tensor], caches: list[Any]
    ) -> tuple[Any] | None:
        """Emit the events under blocks of this layer's own, and return (its output,)."""
        own = number or 0
        if not self.usable or any(not 0 <= own + layer <= len(caches[at].layers) for at, layer in self.states):
            return None
        slots = [(at, own + layer) for at, layer in self.slots if 0 <= own + layer < len(caches[at].layers)]
        here = {_relative(name, own): block for block, name in _names(tracer, inputs, caches, slots).items()}
        work = tracer.flops, tracer.moved_bytes, tracer.operators
        tracer.muted, tracer.muted_frees = True, []
        try:
            builder = _Builder(tracer, inputs, caches, own, slots)
            out = builder.build(self.out)
            fresh = {key: builder.build(state) for key, (_, state) in self.states.items()}
            blocks = {ref: tracer.block_of(tensor) for ref, tensor in builder.made.items()}
            del builder
            for (at, layer), state in fresh.items():
                _set_state(caches[at].layers, own + layer, self.states[at, layer][0], state)
            fresh.clear()
            for cache, flag in zip(caches, self.flags, strict=False):
                if flag:
                    cache.is_updated[own] = True
        finally:
            tracer.muted = False
        gone = set(tracer.muted_frees)
        mapped: dict[int, int] = {}
        for event in self.events:
            if event.nbytes > 0:
                mapped[event.block] = blocks.get(event.block) or tracer.fresh_block()
                tracer.events.append(Event(mapped[event.block], event.nbytes, event.kind))
                continue
            block = mapped.get(event.block) or here.get(self.names.get(event.block, ()))
            if event.block not in mapped:
                if block not in gone:
                    continue
                gone.discard(block)
            assert block is not None
            tracer.events.append(Event(block, event.nbytes, event.kind))
        assert not gone, "a replay freed what the layer it stands for did not"
        for name in self.used:
            block = here.get(name)
            if block is not None and tracer.maker[block] != tracer.layer:
                tracer.flows.add((block, tracer.layer))
        sums = (before + done for before, done in zip(work, self.work, strict=True))
        tracer.flops, tracer.moved_bytes, tracer.operators = sums
        return (out,)


@dataclass(frozen=True, slots=True)
class _Ref:
    """A tensor of a blueprint: how it lies in a storage that is new (`block`) or is named. value: of a real tensor."""

    block: int
    name: _Name
    nbytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    value: torch.Tensor | None


def _blueprint(value: Any, tracer: StorageTracer, made: set[int], known: dict[int, _Name]) -> Any:
    if isinstance(value, torch.Tensor):
        block = tracer.block_of(value)
        name: _Name = ()
        if block is None or block not in made:
            if block not in known:
                raise _UnnamedError
            name = known[block]
        real = None if hasattr(value, "fake_mode") else value
        return _Ref(
            block=0 if name or block is None else block,
            name=name,
            nbytes=value.untyped_storage().nbytes(),
            shape=tuple(value.shape),
            stride=tuple(value.stride()),
            offset=int(value.storage_offset()),
            dtype=value.dtype,
            value=None if real is None or name[:1] == ("input",) else _unseen_copy(real),
        )
    if isinstance(value, (list, tuple)):
        items = [_blueprint(item, tracer, made, known) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        blue = {key: _blueprint(item, tracer, made, known) for key, item in value.items()}
        return blue if type(value) is dict else type(value)(blue)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, type, torch.Size)):
        return value
    raise _UnnamedError


def _unseen_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a template's own, which the model never makes: no tracer may count it."""
    with _disable_current_modes():
        return tensor.detach().clone()


def _extent(ref: _Ref) -> int:
    """Return the bytes from a tensor's first element to its last, both included."""
    if 0 in ref.shape:
        return 0
    return (sum((n - 1) * step for n, step in zip(ref.shape, ref.stride, strict=True)) + 1) * ref.dtype.itemsize


def _refs(value: Any) -> Iterator[_Ref]:
    if isinstance(value, _Ref):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _refs(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _refs(item)


class _Builder:
    """Builds what a blueprint says. made: {block of the template: a tensor in the storage that stands for it}."""

    def __init__(
        self,
        tracer: StorageTracer,
        inputs: list[torch.Tensor],
        caches: list[Any],
        own: int,
        slots: list[tuple[int, int]],
    ):
        self._tracer = tracer
        self.made: dict[int, torch.Tensor] = {}
        self._inputs, self._own = inputs, own
        self._states = {(at, layer): list(leaves(vars(caches[at].layers[layer]))) for at, layer in slots}

    def build(self, value: Any) -> Any:
        if isinstance(value, _Ref):
            return self._tensor(value)
        if isinstance(value, (list, tuple)):
            items = [self.build(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, dict):
            built = {key: self.build(item) for key, item in value.items()}
            return built if type(value) is dict else type(value)(built)
        return value

    def _tensor(self, ref: _Ref) -> torch.Tensor:
        if ref.name:
            if ref.name[0] == "input":
                base = self._inputs[ref.name[1]]
            else:
                _, at, layer, position = ref.name
                base = self._states[at, self._own + layer][position]
                if ref.value is not None and base.shape == ref.value.shape:
                    base.copy_(ref.value)
        elif ref.block in self.made:
            base = self.made[ref.block]
        else:
            if ref.value is not None:
                base = ref.value.clone()
            elif ref.offset == 0 and _extent(ref) == ref.nbytes:
                base = self._tracer.stand_in(ref.shape, ref.stride, ref.dtype)
            else:
                base = self._tracer.stand_in((ref.nbytes // ref.dtype.itemsize,), (1,), ref.dtype)
            self.made[ref.block] = base
        if (*base.shape,) == ref.shape and base.stride() == ref.stride and base.storage_offset() == ref.offset:
            return base
        return base.as_strided(ref.shape, ref.stride, ref.offset)


def _set_state(layers: list[Any], index: int, kind: Any, state: dict[str, Any]) -> None:
    if index == len(layers):
        layers.append(kind.__new__(kind))
    vars(layers[index]).clear()
    vars(layers[index]).update(state)


def _names(
    tracer: StorageTracer,
    inputs: list[torch.Tensor],
    caches: list[Any],
    slots: list[tuple[int, int]] | None = None,
) -> dict[int, _Name]:
    """Return {block: how it is called} of everything that a layer is handed; of caches, of these layers of theirs."""
    if slots is None:
        slots = [(at, number) for at, cache in enumerate(caches) for number in range(len(cache.layers))]
    found: dict[int, _Name] = {}
    for position, tensor in enumerate(inputs):
        block = tracer.block_of(tensor)
        if block is not None:
            found.setdefault(block, ("input", position))
    for at, number in slots:
        for position, tensor in enumerate(leaves(vars(caches[at].layers[number]))):
            block = tracer.block_of(tensor)
            if block is not None:
                found[block] = ("cache", at, number, position)
    return found


def _relative(name: _Name, own: int) -> _Name:
    return name if name[0] == "input" else (name[0], name[1], name[2] - own, name[3])


def _slot_state(caches: list[Any]) -> dict[_Slot, Any]:
    """Return what tells whether a layer of a cache has changed: its tensors' identities and its plain attributes."""
    return {
        _Slot(at, number): (
            tuple((id(leaf), _shape(leaf), _small_value(leaf)) for leaf in leaves(vars(layer))),
            _plain(vars(layer)),
        )
        for at, cache in enumerate(caches)
        for number, layer in enumerate(cache.layers)
    }


def _small_value(tensor: torch.Tensor) -> Any:
    """Return the value of a real tensor that counts something; it may be changed in place."""
    return tensor.tolist() if tensor.numel() <= 1 and not hasattr(tensor, "fake_mode") else None


def _caches(values: Any) -> Iterator[Any]:
    """Yield every cache of transformers among arguments; of an encoder-decoder's, both halves."""
    for value in itertools.chain(values[0], values[1].values()):
        halves = [getattr(value, f"{name}_attention_cache", None) for name in ("self", "cross")]
        for cache in halves if halves[0] is not None else [value]:
            if hasattr(cache, "get_seq_length") and isinstance(getattr(cache, "layers", None), list):
                yield cache


def leaves(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested lists, tuples and dicts, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)


def _shape(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (*tensor.shape, tensor.dtype)


def _plain(value: Any) -> Any:
    """Return a hashable picture of arguments: shapes of tensors, plain values, classes of the rest."""
    if isinstance(value, torch.Tensor):
        return _shape(value)
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _plain(item)) for key, item in value.items())
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return type(value)


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

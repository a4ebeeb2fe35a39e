"""What one layer did, kept so that it can be done again by one that is alike, with blocks of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from planner.lifetimes import Event
from planner.storages import StorageTracer


@dataclass(frozen=True, slots=True)
class Slot:
    """A layer of one of the caches handed to a layer of the model."""

    cache: int
    layer: int


# How a block that was there before a layer ran is found again for another layer: the layer's n-th input, or the n-th
# tensor of its cache (which cache, layers away from its own, position).
Name = tuple[Any, ...]


class _UnnamedError(Exception):
    """A tensor cannot be found again from another layer."""


class Template:
    """What a layer did, to be done again by one that is alike. `play` returns None where that cannot be."""

    def __init__(
        self,
        *,
        tracer: StorageTracer,
        number: int | None,
        events: list[Event],
        names: dict[int, Name],
        used: list[Name],
        work: tuple[int, int, int],
        out: Any,
        states: dict[Slot, dict[str, Any]],
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
        here = {_relative(name, own): block for block, name in named_blocks(tracer, inputs, caches, slots).items()}
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
    name: Name
    nbytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    value: torch.Tensor | None


def _blueprint(value: Any, tracer: StorageTracer, made: set[int], known: dict[int, Name]) -> Any:
    if isinstance(value, torch.Tensor):
        block = tracer.block_of(value)
        name: Name = ()
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


def named_blocks(
    tracer: StorageTracer,
    inputs: list[torch.Tensor],
    caches: list[Any],
    slots: list[tuple[int, int]] | None = None,
) -> dict[int, Name]:
    """Return {block: how it is called} of everything that a layer is handed; of caches, of these layers of theirs."""
    if slots is None:
        slots = [(at, number) for at, cache in enumerate(caches) for number in range(len(cache.layers))]
    found: dict[int, Name] = {}
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


def _relative(name: Name, own: int) -> Name:
    return name if name[0] == "input" else (name[0], name[1], name[2] - own, name[3])


def slot_state(caches: list[Any]) -> dict[Slot, Any]:
    """Return what tells whether a layer of a cache has changed: its tensors' identities and its plain attributes."""
    return {
        Slot(at, number): (
            tuple((id(leaf), shape_of(leaf), _small_value(leaf)) for leaf in leaves(vars(layer))),
            picture(vars(layer)),
        )
        for at, cache in enumerate(caches)
        for number, layer in enumerate(cache.layers)
    }


def _small_value(tensor: torch.Tensor) -> Any:
    """Return the value of a real tensor that counts something; it may be changed in place."""
    return tensor.tolist() if tensor.numel() <= 1 and not hasattr(tensor, "fake_mode") else None


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


def shape_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (*tensor.shape, tensor.dtype)


def picture(value: Any) -> Any:
    """Return a hashable picture of arguments: shapes of tensors, plain values, classes of the rest."""
    if isinstance(value, torch.Tensor):
        return shape_of(value)
    if isinstance(value, (list, tuple)):
        return tuple(picture(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, picture(item)) for key, item in value.items())
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return type(value)

"""Every tensor of a model, wherever it comes from: the model itself, a checkpoint, or a rule that computes it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from dispatch import page_cache, place
from dispatch.buffers import Buffers
from dispatch.checkpoint import Checkpoint
from dispatch.sources import TensorSource, resolve_sources
from dispatch.stores import DiskStore, HostStore, Layout, Store, host_slab, new_slab
from planner.errors import InputError, TraceError

_CPU = torch.device("cpu")


class Weights:
    """The tensors of one model. Nothing of the model is changed here.

    loaded: is told of bytes as they are read, in bytes as they are stored.
    offloaded: the checkpoint holds what waits on disk of a loaded model, as it is there (`dispatch.offload_folder`).
    sources: where tensors come from, if that is known already. given: tensors that take the place of the model's.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        checkpoint: Checkpoint | None,
        *,
        offloaded: bool = False,
        sources: dict[str, TensorSource] | None = None,
        given: Mapping[str, torch.Tensor] | None = None,
    ):
        self.model, self.checkpoint, self.offloaded = model, checkpoint, offloaded
        self.given = given or {}
        self._owners: dict[str, tuple[torch.nn.Module, str]] = {}
        self.on_meta = any(parameter.is_meta for parameter in model.parameters())
        # Whether values may have been written since to where they wait, which no checkpoint holds.
        self.changed = False
        if self.on_meta and checkpoint is None and not self.given:
            raise InputError("the model is on meta: give the checkpoint that its weights are to come from")
        self.sources: dict[str, TensorSource] = {}
        if sources is not None:
            self.sources = sources
        elif checkpoint is not None:
            self.sources = resolve_sources(model, checkpoint)
        self.computed = recomputed_buffers(model)
        self.loaded: Callable[[int], None] = _untold
        # Whether copies of the model, or pickles, read the files too.
        self.lent = False
        self._buffers = Buffers(0, 0)

    def again(
        self, model: torch.nn.Module, checkpoint: Checkpoint | None, owners: dict[str, tuple[torch.nn.Module, str]]
    ) -> Weights:
        """Return the same for a copy of the model, which holds what is in no file; the files then have two readers.

        owners: where each tensor is; adapters may have come between.
        """
        made = copy.copy(self)
        made.model, made.checkpoint, made.given, made.computed, made._owners = model, checkpoint, {}, {}, owners
        made.lent = self.lent = True
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("loaded", "_buffers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, loaded=_untold, _buffers=Buffers(0, 0))

    @contextmanager
    def reading(self, readers: int, reads: Iterable[tuple[str, torch.device, bool]]) -> Iterator[None]:
        """Hold the buffers that so many threads read through: one each, as large as the largest of `reads` wants.

        reads: (name, device that it is read to, whether slice by slice).
        """
        needs = (
            self.sources[name].buffer_bytes(device, sliced=sliced)
            for name, device, sliced in reads
            if name not in self.computed and self._held(name) is None
        )
        self._buffers = Buffers(readers, max(needs, default=0))
        try:
            yield
        finally:
            self._buffers = Buffers(0, 0)

    def load(self, name: str, device: torch.device = _CPU) -> torch.Tensor:
        """Return a tensor on `device`: the model's own where it is there, else copied, or read from the checkpoint."""
        held = self._held(name)
        current = self._current(name)
        if held is not None:
            found = held.to(device, current.dtype)
            if found.stride() == current.stride() or place.strides_of(current) is None:
                return found
            return place.empty(current, device).copy_(held)
        if name in self.computed:
            return self.computed[name].to(device)
        tensor = place.empty(current, device)
        self._fill(name, tensor, None)
        return tensor

    def check_complete(self) -> None:
        """Raise InputError where a tensor has no values: it is on meta, and nothing that was given holds it."""
        names = [name for name, _ in place.named_tensors(self.model)]
        empty = [n for n in names if n not in self.sources and n not in self.computed and self._held(n) is None]
        if empty:
            raise InputError(
                f"{empty[0]} and {len(empty) - 1:,} more tensors have no values: they are on meta, and no checkpoint, "
                "state_dict or offload folder that was given holds them"
            )

    def stored_bytes(self, names: Iterable[str]) -> int:
        """Return what is read to load the named tensors, in bytes as they are stored."""
        return sum(
            piece.entry.nbytes
            for name in names
            if name in self.sources and self._held(name) is None
            for piece in self.sources[name].pieces
        )

    def file_order(self, name: str, expert: int | None = None) -> tuple[str, int]:
        """Return a key by which tensors, or slices of them, come in the order in which they are stored; what no file
        holds comes first.
        """
        if name in self.computed or name not in self.sources:
            return "", 0
        entry, start, _, _ = next(self.sources[name].ranges(expert))
        return str(entry.file), entry.offset_bytes + start

    def same_on_disk(self, name: str) -> bool:
        """Tell whether the checkpoint holds the very bytes that the loaded model has."""
        held = self._held(name)
        return held is None or self.sources[name].same(self._checkpoint(), held)

    def check_mappable(self, name: str) -> None:
        """Raise InputError unless `map` can give this tensor."""
        if name not in self.computed and self.sources[name].whole_entry() is None:
            raise InputError(
                f"{name} is planned to be used straight from the checkpoint's file, which holds it in another dtype, "
                "in pieces or in another order of dimensions; plan with the checkpoint's own dtype, or with more RAM"
            )

    def map(self, name: str) -> torch.Tensor:
        """Return a tensor as a view of the checkpoint's mapped file.

        Raises:
            InputError: the file does not hold exactly this tensor (another dtype, or pieces).
        """
        if name in self.computed:
            return self.computed[name]
        self.check_mappable(name)
        entry = self.sources[name].whole_entry()
        assert entry is not None
        strides = place.strides_of(self._current(name))
        return self.sources[name].as_used(self._checkpoint().map(entry), strides)

    def is_as_mapped(self, name: str, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor is what `map` gave for this name, and nothing was written to it since."""
        if not self.in_pages(name) or self.map(name).data_ptr() != tensor.data_ptr():
            return False
        untouched = page_cache.written(tensor.data_ptr(), tensor.nbytes) is False
        return untouched or self.sources[name].same(self._checkpoint(), tensor.detach())

    def in_pages(self, name: str) -> bool:
        """Tell whether what `map` returns lies in the page cache, and not in memory of its own."""
        source = None if name in self.computed else self.sources.get(name)
        entry = None if source is None else source.whole_entry()
        return entry is not None and self._checkpoint().mappable(entry)

    def view(self, name: str) -> torch.Tensor | None:
        """Return a tensor as a view of the checkpoint's mapped file; None where that does not hold it as it is, or has
        changed since.
        """
        if not self.in_pages(name):
            return None
        try:
            self._checkpoint().check_unchanged()
        except InputError:
            return None
        return self.map(name)

    def store(
        self, names: list[str], *, on_disk: bool, target: torch.device, expert: int | None = None, pinned: bool = True
    ) -> Store:
        """Return where the named tensors wait to be copied to `target`; with `expert`, that slice of each.

        pinned: whether host memory is pinned, where the target is a GPU.
        """
        layout = self._layout(names, expert)
        if on_disk:
            return DiskStore(layout, self._checkpoint(), [self.sources[name] for name in names], expert)
        slab = host_slab(layout.nbytes, target) if pinned else new_slab(layout.nbytes, _CPU)
        for name, view in layout.views(slab).items():
            self._fill(name, view, expert)
        return HostStore(layout, slab)

    def slab(self, names: list[str], device: torch.device, *, expert: int | None = None) -> dict[str, torch.Tensor]:
        """Return the named tensors, or one slice of each, as views into one slab on `device`."""
        layout = self._layout(names, expert)
        views = layout.views(new_slab(layout.nbytes, device))
        for name, view in views.items():
            self._fill(name, view, expert)
        return views

    def _layout(self, names: list[str], expert: int | None) -> Layout:
        tensors = [(name, self._current(name)) for name in names]
        if expert is not None:
            tensors = [(name, tensor[0]) for name, tensor in tensors]
        strides = {name: place.strides_of(tensor) for name, tensor in tensors}
        return Layout.of([(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors], strides)

    def _fill(self, name: str, view: torch.Tensor, expert: int | None) -> None:
        held = self._held(name)
        if held is not None:
            view.copy_(held if expert is None else held[expert])
        elif name in self.computed:
            view.copy_(self.computed[name])
        else:
            with self._buffers.lend() as buffer:
                if expert is None:
                    self.sources[name].fill(self._checkpoint(), view, buffer)
                else:
                    self.sources[name].fill_slice(self._checkpoint(), expert, view, buffer)
            source = self.sources[name]
            stored = sum(piece.entry.nbytes for piece in source.pieces)
            self.loaded(stored if expert is None else stored // source.shape[0])

    def _held(self, name: str) -> torch.Tensor | None:
        """Return a tensor that is in memory already, or None."""
        if name in self.given:
            return self.given[name].detach()
        current = self._current(name)
        return None if current.is_meta else current

    def _current(self, name: str) -> torch.Tensor:
        """Return what the model has under a name."""
        owner = self._owners.get(name)
        if owner is None:
            owner = self._owners[name] = place.owner(self.model, name)
        return place.get(*owner)

    def _checkpoint(self) -> Checkpoint:
        assert self.checkpoint is not None
        return self.checkpoint


def _untold(nbytes: int) -> None:
    pass


def recomputed_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return {name: value} of non-persistent buffers on meta: no checkpoint holds them, so the model's own rule
    (`_init_weights` of transformers) computes them anew. The model is left as it was.

    Raises:
        TraceError: the rule leaves a buffer as it was.
    """
    found: dict[str, torch.Tensor] = {}
    initialise: Any = getattr(model, "_init_weights", None)
    for path, module in model.named_modules():
        leaves = [
            leaf for leaf in module._non_persistent_buffers_set
            if (buffer := module._buffers.get(leaf)) is not None and buffer.is_meta
        ]  # fmt: skip
        if not leaves:
            continue
        before = {leaf: module._buffers[leaf] for leaf in leaves}
        try:
            for leaf, buffer in before.items():
                assert buffer is not None
                module._buffers[leaf] = _poisoned(buffer)
            if initialise is not None:
                with torch.no_grad():
                    initialise(module)
            for leaf in sorted(leaves):
                value = module._buffers[leaf]
                assert value is not None
                name = f"{path}.{leaf}" if path else leaf
                if bool((value == _poisoned(value)).all()) or (value.is_floating_point() and bool(value.isnan().any())):
                    raise TraceError(
                        f"{name} is in no checkpoint and {type(model).__name__} does not say how to compute it; "
                        "load the model first, then dispatch it"
                    )
                found[name] = value
        finally:
            module._buffers.update(before)
    return found


def _poisoned(like: torch.Tensor) -> torch.Tensor:
    if like.is_floating_point():
        return torch.full(like.shape, float("nan"), dtype=like.dtype)
    return (
        torch.full(like.shape, torch.iinfo(like.dtype).min, dtype=like.dtype)
        if like.dtype != torch.bool
        else (torch.zeros(like.shape, dtype=torch.bool))
    )

"""What autograd saves of weights in slots: notes of which they are, by which a backward pass has them brought again."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dispatch.slots import SlotRing
from dispatch.stores import Store
from planner.errors import InputError

_autograd: Any = torch._C._autograd
# On a hook of ours: where it has weights brought.
_IN_HAND = "_loadplan_in_hand"


class InHand:
    """What backward passes have in hand of the weights that pass through a ring's slots: those of one store at a time,
    in memory of their own, until others are asked for or the pass ends.

    Asked by autograd's threads too, also while another thread waits for them in the middle of a call: nothing here
    waits for the model's lock.
    """

    def __init__(self, ring: SlotRing):
        self._ring = ring
        self._lock = threading.Lock()
        self._key: tuple[Any, ...] | None = None
        self._slab: torch.Tensor | None = None

    def bring(self, store: Store) -> torch.Tensor:
        """Return a slab with a store's weights, ordered before what the current stream does next.

        Raises:
            InputError: they cannot be read any more.
        """
        with self._lock:
            key = (store, store.changes, self._ring.stream())
            if self._slab is not None and key == self._key:
                return self._slab
            # Before other memory is taken.
            self._key = self._slab = None
            slab = self._ring.bring(store)
            if torch._C._current_graph_task_id() != -1:
                self._key, self._slab = key, slab
                torch.autograd.Variable._execution_engine.queue_callback(self.drop)
            return slab

    def drop(self) -> None:
        """Let go of what was brought."""
        with self._lock:
            self._key = self._slab = None


def takes_hooks() -> bool:
    """Tell whether autograd takes hooks here: the transforms of torch.func do not."""
    return _autograd._saved_tensors_hooks_get_disabled_error_message() is None


class SavedWeights:
    """Autograd's hooks while one module computes: of what lies in a slot only a note is saved, and all else goes on to
    the hooks that were there before.

    watched: whether the module may write to its weights. Slots of experts are used anew in the middle of a call.
    """

    def __init__(self, in_hand: InHand, *, watched: bool = True):
        self._in_hand, self._watched = in_hand, watched
        self._memory: int | None = None
        self._store: Store | None = None
        # What was noted while the module runs, as it is in the slot: with its version.
        self._noted: list[tuple[_Note, torch.Tensor, int]] = []
        self._outer: tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]] | None = None
        self._is_on = False
        # Also between graphs that torch.compile made, which would else look into them.
        self._hooks = torch.compiler.disable(self._pack), _unpacking()
        setattr(self._hooks[0], _IN_HAND, in_hand)

    def begin(self) -> None:
        """Take the place of the hooks of this thread, until `end`."""
        self._outer = _autograd._top_saved_tensors_default_hooks(True)
        # In this order, so that an interrupt in between leaves nothing that `end` would not undo.
        self._is_on = True
        _autograd._push_saved_tensors_default_hooks(*self._hooks)

    def lies_in(self, slab: torch.Tensor, store: Store) -> None:
        """Say in which slot the weights of a store are now, until `end` or the next."""
        self._memory, self._store = memory_of(slab), store

    def end(self) -> None:
        """Give the hooks that were there before their place back."""
        self._memory = self._store = None
        for note, tensor, version in self._noted:
            note.is_written |= tensor._version != version
        self._noted.clear()
        if not self._is_on:
            return
        top = _autograd._top_saved_tensors_default_hooks(True)
        if top is not None and top[0] is self._hooks[0]:
            _autograd._pop_saved_tensors_default_hooks()
        self._is_on, self._outer = False, None

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        if self._store is not None and memory_of(tensor) == self._memory:
            if not (tensor.is_conj() or tensor.is_neg()):
                place = (tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
                note = _Note(self._in_hand, self._store, self._store.changes, *place)
                if self._watched:
                    self._noted.append((note, tensor, tensor._version))
                return note
            tensor = tensor.clone()
        if self._outer is not None:
            pack, unpack = self._outer
            return _Passed(unpack, pack(tensor))
        # Detached: an operator's own result would else hold the operator, which holds what it saved.
        return _Kept(tensor.detach(), tensor._version)


def take_off(in_hands: Collection[InHand]) -> None:
    """Take off hooks on top of this thread's that an interrupted call left, and let go of what was in hand."""
    while (top := _autograd._top_saved_tensors_default_hooks(True)) and getattr(top[0], _IN_HAND, None) in in_hands:
        _autograd._pop_saved_tensors_default_hooks()
    for in_hand in in_hands:
        in_hand.drop()


class _Saved(Protocol):
    def tensor(self) -> torch.Tensor:
        """Return what was saved."""


@dataclass(slots=True)
class _Note:
    """Weights, or a view of some, by their place in a slab of their store's.

    is_written: whether the module wrote to them after they were saved.
    """

    in_hand: InHand
    store: Store
    changes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    is_written: bool = False

    def tensor(self) -> torch.Tensor:
        if self.is_written:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"weight or buffer of {list(self.shape)} that waits elsewhere, which the forward of its module wrote to"
            )
        if self.store.changes != self.changes:
            names = ", ".join(piece.name for piece in self.store.layout.pieces)
            raise InputError(
                f"{names} changed where they wait since the forward pass whose gradients are computed now: call the "
                "model again, and load or merge weights before it or after its backward pass"
            )
        return self.in_hand.bring(self.store).view(self.dtype).as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True, slots=True)
class _Passed:
    """Something for the hooks that were there before."""

    unpack: Callable[[Any], torch.Tensor]
    packed: Any

    def tensor(self) -> torch.Tensor:
        return self.unpack(self.packed)


@dataclass(frozen=True, slots=True)
class _Kept:
    """The tensor itself, watched as autograd watches what it saves without hooks."""

    saved: torch.Tensor
    version: int

    def tensor(self) -> torch.Tensor:
        if self.saved._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{self.saved.type()} {list(self.saved.shape)}] is at version {self.saved._version}; expected version "
                f"{self.version} instead"
            )
        return self.saved


def _unpack(saved: _Saved) -> torch.Tensor:
    return saved.tensor()


@functools.cache
def _unpacking() -> Callable[[_Saved], torch.Tensor]:
    unpack: Callable[[_Saved], torch.Tensor] = torch.compiler.disable(_unpack)
    return unpack


def memory_of(tensor: torch.Tensor) -> int | None:
    """Return what tells a tensor's memory from others while it lives; None of tensors that have none of their own."""
    # On pretended devices a tensor wraps the one that has the memory.
    tensor = getattr(tensor, "stand_in", tensor)
    try:
        found: int = tensor.untyped_storage()._cdata
    except RuntimeError:  # sparse ones
        return None
    return found

"""What a module's forward makes of its weights while they are in a slot: written to where they wait, or refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from dispatch import place
from dispatch.stores import HostStore, Store
from planner.errors import InputError


class Changes:
    """The changes that forwards make to the weights of one group.

    Buffers are written back after each forward, as a BatchNorm that is trained changes them; parameters where PyTorch
    counted a change, or where another took the place. What is written through `.data` of a parameter is not seen.

    buffers: their names. tied: names of what waits once more under another name.
    moves: whether the module may put its parameters into other memory, as cuDNN's layers do.
    """

    def __init__(
        self,
        owners: Mapping[str, tuple[torch.nn.Module, str]],
        store: Store,
        *,
        buffers: Collection[str],
        tied: Collection[str],
        moves: bool,
    ):
        self._owners, self._store, self._buffers, self._tied, self._moves = owners, store, buffers, tied, moves
        self._arrived: Mapping[str, torch.Tensor] = {}
        self._states: dict[str, tuple[int, int]] = {}
        self._before: dict[str, torch.Tensor] = {}

    def begin(self, arrived: Mapping[str, torch.Tensor]) -> None:
        """Take note of weights before a forward."""
        self._arrived = arrived
        self._states = {name: self._state(tensor) for name, tensor in arrived.items()}
        if not isinstance(self._store, HostStore):
            self._before = {name: arrived[name].clone() for name in self._buffers}

    def end(self) -> None:
        """Write what a forward changed to where it waits.

        Raises:
            InputError: it waits in a file, or under several names, or is no longer of one shape and dtype.
        """
        changed = {name: found for name in self._arrived if (found := self._changed(name)) is not None}
        self._arrived, self._before = {}, {}
        if not changed:
            return
        if not isinstance(self._store, HostStore):
            raise _refused(next(iter(changed)), "waits in a file, which is not written to")
        views = self._store.views()
        for name, tensor in changed.items():
            if name in self._tied:
                raise _refused(name, "waits under several names")
            if (tensor.shape, tensor.dtype) != (views[name].shape, views[name].dtype):
                raise _refused(name, f"waits as {list(views[name].shape)} of {views[name].dtype}")
            views[name].copy_(tensor.detach())
        if changed.keys() - set(self._buffers):
            # Gradients of what was computed with parameters before are refused.
            self._store.changes += 1

    def _changed(self, name: str) -> torch.Tensor | None:
        """Return what a weight is now where it may be another; None where it is the same."""
        arrived, now = self._arrived[name], place.here(*self._owners[name])
        if now is None:
            raise _refused(name, "is not there any more")
        if now is not arrived or self._state(now) != self._states[name]:
            return now
        if name not in self._buffers:
            return None
        before = self._before.get(name)
        return now if before is None or not _same_bytes(before, now) else None

    def _state(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Return what differs once a weight was written to, or its memory is another."""
        count = 0 if tensor.is_inference() else tensor._version
        return count, 0 if self._moves else tensor.data_ptr()


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _refused(name: str, why: str) -> InputError:
    return InputError(
        f"{name} was changed by the forward of its module, and {why}: let its module stay on the device that runs it, "
        "leave out offload_buffers, or call model.eval() if it is not to be trained"
    )

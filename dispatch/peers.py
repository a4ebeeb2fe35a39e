"""Copies from one GPU straight to another: tried once before they are trusted, and sent through host memory where they
are corrupted, as some systems do without any error.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import torch

# Enough for several of the packets that drivers cut copies into.
_CHECKED_BYTES = 8 * 2**20
_TIMES = 3
Copy = Callable[[torch.Tensor, torch.device], torch.Tensor]


def straight(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on a device, as PyTorch makes it."""
    return tensor.to(device)


def through_host(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on a device that was in host memory on its way."""
    return tensor.to("cpu").to(device)


def arrives(source: torch.device, target: torch.device, copy: Copy = straight) -> bool:
    """Tell whether what is copied from one device to another is, each time with other numbers, what was sent."""
    for seed in range(_TIMES):
        generator = torch.Generator().manual_seed(seed)
        sent = torch.randint(-(2**62), 2**62, (_CHECKED_BYTES // 8,), generator=generator)
        if not torch.equal(copy(sent.to(source), target).cpu(), sent):
            return False
    return True


class Peers:
    """Which ways between GPUs are trusted, found out when one is first needed."""

    def __init__(self, copy: Copy = straight, kinds: tuple[str, ...] = ("cuda",)):
        self._copy, self._kinds = copy, kinds
        self._trusted: dict[tuple[torch.device, torch.device], bool] = {}
        self._lock = threading.Lock()

    def bring(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return a tensor on a device: itself if it is there, else a copy."""
        if tensor.device == device:
            return tensor
        if tensor.device.type not in self._kinds or device.type not in self._kinds:
            return straight(tensor, device)
        return (self._copy if self.trusts(tensor.device, device) else through_host)(tensor, device)

    def trusts(self, source: torch.device, target: torch.device) -> bool:
        """Tell whether copies of this way arrive; it is tried once, and where they do not, that is told."""
        with self._lock:
            found = self._trusted.get((source, target))
            if found is None:
                found = self._trusted[source, target] = arrives(source, target, self._copy)
                if not found:
                    warnings.warn(
                        f"copies from {source} straight to {target} do not arrive as they were sent: this machine "
                        "corrupts them. They go through host memory from now on, which is right and slower",
                        stacklevel=2,
                    )
        return found


# One for the process: what a machine corrupts, it corrupts for every model.
_PEERS = Peers()


def bring(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device; copies between GPUs go through host memory where they would be corrupted."""
    return _PEERS.bring(tensor, device)


def check(devices: list[torch.device]) -> None:
    """Try every way between GPUs of these, so that no call has to; what that takes of their memory is given back."""
    gpus = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
    for source in gpus:
        for target in gpus:
            if source != target:
                _PEERS.trusts(source, target)
    if len(gpus) > 1:
        torch.cuda.empty_cache()

"""What a dispatched model refuses: it would meet weights that are elsewhere."""

from __future__ import annotations

from typing import Any

import torch

from planner.errors import InputError

_REFUSED = {"_apply": "moving or converting it", "load_state_dict": "load_state_dict", "state_dict": "state_dict"}


def refuse(model: torch.nn.Module) -> None:
    """Refuse to move a model, and to take its state or load one."""
    vars(model).update({name: _refusal(what) for name, what in _REFUSED.items()})


def allow(model: torch.nn.Module) -> None:
    """Undo `refuse`, and what else was put on the model under these names."""
    for name in _REFUSED:
        vars(model).pop(name, None)


def _refusal(what: str) -> Any:
    def refusing(*args: Any, **kwargs: Any) -> Any:
        raise InputError(
            f"{what} is not carried yet for a model whose weights are streamed: call dispatch.remove first"
        )

    return refusing

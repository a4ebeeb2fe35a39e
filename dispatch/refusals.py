"""What a dispatched model refuses: it would meet weights that are elsewhere, or call what it was copied from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from planner.errors import InputError

_COPYING = {"__deepcopy__": "copying it", "__reduce_ex__": "pickling it"}
_OF_THE_MODEL = {"_apply": "moving or converting it", "load_state_dict": "load_state_dict", "state_dict": "state_dict"}


def refuse(model: torch.nn.Module, parts: Iterable[torch.nn.Module]) -> None:
    """Refuse to move a model or to take its state, and to copy or pickle it or one of its parts that have hooks."""
    vars(model).update({name: _refusal(what) for name, what in (_OF_THE_MODEL | _COPYING).items()})
    for part in parts:
        refuse_copies(part)


def refuse_copies(module: torch.nn.Module) -> None:
    """Refuse to copy or pickle a module that has hooks: the copy's would call what it was copied from."""
    vars(module).update({name: _refusal(what) for name, what in _COPYING.items()})


def allow(model: torch.nn.Module, parts: Iterable[torch.nn.Module]) -> None:
    """Undo `refuse`, and what else was put on the model under these names."""
    for part in (model, *parts):
        for name in _OF_THE_MODEL | _COPYING if part is model else _COPYING:
            vars(part).pop(name, None)


def _refusal(what: str) -> Any:
    def refusing(*args: Any, **kwargs: Any) -> Any:
        raise InputError(
            f"{what} is not carried yet for a model whose weights are streamed: call dispatch.remove first"
        )

    return refusing

"""Checkpoints that PyTorch pickled (.bin, .pt): read as plain tensors alone, with nothing in them run, and mapped."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch

from planner.errors import InputError
from planner.headers import os_errors

_SUFFIXES = {".bin", ".pt", ".pth"}
_WHOLE = "pytorch_model.bin"


def find_pickled(where: Path) -> tuple[Path, ...]:
    """Return the pickled files of a checkpoint; none where it is not pickled. A folder with safetensors files is not.

    Raises:
        InputError: it cannot be read, or its index names files that are not there.
    """
    with os_errors(where):
        if not where.is_dir():
            if where.suffix in _SUFFIXES:
                return (where,)
            return _indexed(where) if where.suffix == ".json" else ()
        if any(where.glob("*.safetensors")):
            return ()
        if (where / _WHOLE).is_file():
            return (where / _WHOLE,)
        indexes = sorted(where.glob("*.bin.index.json"))
    if len(indexes) > 1:
        raise InputError(f"{where} holds several indexes; name one of {[path.name for path in indexes]}")
    return _indexed(indexes[0]) if indexes else ()


def read_pickled(files: tuple[Path, ...]) -> dict[str, torch.Tensor]:
    """Return the tensors of pickled files, over their mapped pages where the format allows it.

    Raises:
        InputError: a file is damaged, or holds anything else than tensors by their names.
    """
    found: dict[str, torch.Tensor] = {}
    for file in files:
        for name, value in _load(file).items():
            if isinstance(value, torch.Tensor):
                if name in found:
                    raise InputError(f"{file} holds the tensor {name!r}, which another file of the checkpoint has too")
                found[name] = value
    return found


def _load(file: Path) -> dict[str, object]:
    try:
        with os_errors(file):
            try:
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:
                # Files of before PyTorch 1.6 cannot be mapped.
                state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as exc:
        raise InputError(
            f"{file} is damaged, or holds more than tensors, which would run code when it is read: save the model as "
            "safetensors, with save_pretrained or safetensors.torch.save_file"
        ) from exc
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{file} holds a {type(state).__name__}, and not tensors by their names; save a state_dict()")
    return state


def _indexed(index: Path) -> tuple[Path, ...]:
    try:
        told = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(told.get("weight_map", told).values()))
        files = tuple(index.parent / name for name in names)
    except (json.JSONDecodeError, AttributeError, TypeError) as exc:
        raise InputError(f"{index} is no index of a checkpoint; download or save it again") from exc
    if not files or not all(file.suffix in _SUFFIXES for file in files):
        return ()
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{index} names {missing[0]}, which is not there; download or save it again")
    return files

"""Folders where weights of a loaded model wait: written here as one safetensors file, tensor by tensor; or an index of
where each is, as Accelerate writes it, whose files are used as they are.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dispatch import place
from dispatch.checkpoint import Checkpoint, TensorEntry
from dispatch.sources import Piece, TensorSource
from planner.errors import InputError
from planner.headers import DTYPES, os_errors
from planner.serial import write_text
from planner.units import round_up

OFFLOAD_FILE = "loadplan-offload.safetensors"
INDEX_FILE = "index.json"
_STORED_NAMES = {torch_name: name for name, (torch_name, _) in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Waiting:
    """Tensors of a model that wait in files, by the model's names."""

    checkpoint: Checkpoint
    sources: dict[str, TensorSource]


def write(model: torch.nn.Module, names: Iterable[str], folder: str | Path) -> Waiting:
    """Write the named tensors of a loaded model to `folder`, each once, and open what was written.

    Raises:
        InputError: the folder cannot be written, or holds such a file already.
    """
    target = Path(folder) / OFFLOAD_FILE
    if target.exists():
        raise InputError(f"{target} exists: give another offload_dir, or remove it")
    first: dict[int, str] = {}
    stored = {name: first.setdefault(id(_tensor(model, name)), name) for name in names}
    tensors = {name: place.get(*place.owner(model, name)) for name in first.values()}
    checkpoint = write_ordered(target, {name: (tensor, tensor.detach) for name, tensor in tensors.items()})
    return Waiting(checkpoint, {name: ordered_source(model, name, checkpoint, given) for name, given in stored.items()})


def find(model: torch.nn.Module, names: Collection[str], folder: str | Path) -> Waiting | None:
    """Return where tensors of a model wait in a folder that was written before, by us or by Accelerate; None where it
    holds no such thing.

    Raises:
        InputError: it lacks some of them, or has other weights than the model.
    """
    where = Path(folder)
    with os_errors(where):
        has_index, has_file = (where / INDEX_FILE).is_file(), (where / OFFLOAD_FILE).is_file()
    if has_index:
        with os_errors(where / INDEX_FILE):
            text = (where / INDEX_FILE).read_text(encoding="utf-8")
        try:
            index = json.loads(text)
        except json.JSONDecodeError as exc:
            raise InputError(f"{where / INDEX_FILE} is not JSON ({exc.msg}); remove it, and load again") from exc
        waiting = of_index(model, names, index, where)
    elif has_file:
        checkpoint = Checkpoint.open(where / OFFLOAD_FILE)
        there = {name for name in names if name in checkpoint or _ordered_name(model, name) in checkpoint}
        first: dict[int, str] = {id(_tensor(model, name)): name for name in names if name in there}
        stored = {name: first.get(id(_tensor(model, name)), name) for name in names}
        _check_all(names, [name for name in names if stored[name] in there], where / OFFLOAD_FILE)
        waiting = Waiting(
            checkpoint, {name: ordered_source(model, name, checkpoint, given) for name, given in stored.items()}
        )
    else:
        return None
    for name, source in waiting.sources.items():
        held = place.get(*place.owner(model, name))
        if not held.is_meta and not source.same(waiting.checkpoint, held):
            raise InputError(
                f"{where} holds other values of {name} than the model: they are another model's, or older; give "
                "another offload_dir, or remove this one"
            )
    return waiting


def of_index(
    model: torch.nn.Module, names: Collection[str], index: Mapping[str, Any], folder: str | Path | None
) -> Waiting:
    """Return where tensors wait by an index {name: {"dtype", "shape"}}, of files NAME.dat in `folder`, or {name:
    {"safetensors_file", "weight_name", "dtype"}}, of any.

    Raises:
        InputError: a tensor is not in it, a file is missing or of another size, or the entry cannot be read.
    """
    named = f"the index in {folder}" if folder is not None else "the offload index"
    _check_all(names, index, named)
    opened: dict[str, Checkpoint] = {}
    entries = {name: _indexed(name, index[name], folder, opened, named) for name in names}
    sources = {name: _source(model, name, entry) for name, entry in entries.items()}
    return Waiting(Checkpoint.of(Path(folder or "."), entries), sources)


def write_index(sources: Iterable[TensorSource], folder: str | Path) -> None:
    """Write where tensors are, each whole in one file, as an index that Accelerate reads too.

    Raises:
        InputError: the folder cannot be written.
    """
    index = {}
    for source in sources:
        entry = source.pieces[0].entry
        index[source.name] = {
            "safetensors_file": str(entry.file),
            "weight_name": entry.name,
            "dtype": str(source.dtype).removeprefix("torch."),
            "shape": list(source.shape),
        }
    target = Path(folder) / INDEX_FILE
    make_folder(target.parent)
    write_text(target, json.dumps(index, indent=2) + "\n")


def write_tensors(target: Path, tensors: Mapping[str, tuple[torch.Tensor, Callable[[], torch.Tensor]]]) -> None:
    """Write a safetensors file, all or nothing, tensor by tensor, of {name: (what it is like, what gives its values)}.

    Raises:
        InputError: it cannot be written, or the format has no such dtype.
    """
    make_folder(target.parent)
    # The widest first, so that each starts at a multiple of its item and can be mapped.
    names = sorted(tensors, key=lambda name: -tensors[name][0].dtype.itemsize)
    header, offset = {}, 0
    for name in names:
        like = tensors[name][0]
        dtype = _STORED_NAMES.get(str(like.dtype).removeprefix("torch."))
        if dtype is None:
            raise InputError(f"{name} is {like.dtype}, which safetensors files do not hold; keep it in memory")
        nbytes = like.numel() * like.dtype.itemsize
        header[name] = {"dtype": dtype, "shape": list(like.shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text = text.ljust(round_up(len(text), 8))
    partial = target.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                flat = tensors[name][1]().detach().cpu().contiguous().reshape(-1)
                file.write(flat.view(torch.uint8).numpy().data)
        partial.replace(target)
    except BaseException as exc:
        partial.unlink(missing_ok=True)
        if isinstance(exc, OSError):
            raise InputError(f"cannot write {target}: {exc.strerror or exc}") from exc
        raise


def check_path(given: object, what: str) -> None:
    """Raise InputError unless what was given for a path, or for none, can be one."""
    if given is not None and not isinstance(given, (str, os.PathLike)):
        raise InputError(f"{what} is a {type(given).__name__}; it must be the path of one")


def write_ordered(target: Path, tensors: Mapping[str, tuple[torch.Tensor, Callable[[], torch.Tensor]]]) -> Checkpoint:
    """Write tensors as `write_tensors` does, and open the file. Those that lie in memory in another order than that of
    their dimensions, as channels-last ones, are written in it, so that they are read and mapped straight; their names
    in the file say which.
    """
    named: dict[str, tuple[torch.Tensor, Callable[[], torch.Tensor]]] = {}
    for name, (like, load) in tensors.items():
        order = place.order_of(like)
        if order is None:
            named[name] = like, load
        else:
            named[_marked(name, order)] = like.permute(order), partial(_permuted, load, order)
    write_tensors(target, named)
    return Checkpoint.open(target)


def ordered_source(model: torch.nn.Module, name: str, checkpoint: Checkpoint, given: str) -> TensorSource:
    """Return where a tensor of a model is in a file that `write_ordered` wrote, under the name that was `given` it."""
    current = place.get(*place.owner(model, name))
    marked = _ordered_name(model, given)
    if marked == given or marked not in checkpoint:
        return _source(model, name, checkpoint[given])
    order = place.order_of(current)
    assert order is not None
    entry = checkpoint[marked]
    shape = tuple(current.shape)
    if entry.shape != tuple(shape[dim] for dim in order):
        raise _another(entry, name, current)
    return TensorSource(
        name=name, shape=shape, dtype=current.dtype, pieces=(Piece(entry=entry, index=()),), order=order, in_order=True
    )


def _ordered_name(model: torch.nn.Module, name: str) -> str:
    order = place.order_of(place.get(*place.owner(model, name)))
    return name if order is None else _marked(name, order)


def _marked(name: str, order: tuple[int, ...]) -> str:
    return f"{name} in order {' '.join(map(str, order))}"


def _permuted(load: Callable[[], torch.Tensor], order: tuple[int, ...]) -> torch.Tensor:
    return load().permute(order)


def make_folder(folder: Path) -> None:
    """Make a folder where there is none.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as exc:
        # ValueError: of a path with a NUL in it.
        raise InputError(f"cannot write to {folder}: {getattr(exc, 'strerror', None) or exc}") from exc


def _tensor(model: torch.nn.Module, name: str) -> torch.Tensor | None:
    """Return the very object that the model has under a name."""
    module, leaf = place.owner(model, name)
    return module._parameters.get(leaf) if leaf in module._parameters else module._buffers[leaf]


def _check_all(names: Collection[str], held: Collection[str], where: object) -> None:
    missing = [name for name in names if name not in held]
    if missing:
        raise InputError(
            f"{where} lacks {len(missing):,} of the {len(names):,} tensors that wait on disk, such as {missing[0]}: it "
            "was written for another map or model; give another offload_dir, or remove it"
        )


def _indexed(name: str, told: Any, folder: str | Path | None, opened: dict[str, Checkpoint], named: str) -> TensorEntry:
    try:
        given = told.get("safetensors_file")
        if given is not None:
            if given not in opened:
                opened[given] = Checkpoint.open(given)
            return opened[given][told.get("weight_name", name)]
        dtype, shape = getattr(torch, told["dtype"]), tuple(int(size) for size in told["shape"])
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise InputError(f"{named} has an entry of {name} that cannot be read ({exc!r}); write it anew") from exc
    if folder is None:
        raise InputError(f"{named} says that {name} is in a file of its own: give the offload_dir that has it")
    return TensorEntry(
        name=name,
        file=Path(folder).absolute() / f"{name}.dat",
        dtype=dtype,
        shape=shape,
        offset_bytes=0,
        nbytes=math.prod(shape) * dtype.itemsize,
    )


def _source(model: torch.nn.Module, name: str, entry: TensorEntry) -> TensorSource:
    current = place.get(*place.owner(model, name))
    if entry.shape != tuple(current.shape):
        raise _another(entry, name, current)
    return TensorSource(
        name=name,
        shape=entry.shape,
        dtype=current.dtype,
        pieces=(Piece(entry=entry, index=()),),
        order=place.order_of(current),
    )


def _another(entry: TensorEntry, name: str, current: torch.Tensor) -> InputError:
    return InputError(
        f"{entry.file} holds {name} of shape {list(entry.shape)}, and the model has {list(current.shape)}: it is "
        "another model's; give another offload_dir, or remove it"
    )

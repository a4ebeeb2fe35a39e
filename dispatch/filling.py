"""Fills a model from a checkpoint: what comes from where is settled before anything is read, and nothing of the model
is changed by a load that fails.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dispatch import place
from dispatch.checkpoint import Checkpoint, TensorEntry
from dispatch.offload_folder import OFFLOAD_FILE, check_path, ordered_source, write_index, write_ordered
from dispatch.pickled import find_pickled, read_pickled
from dispatch.sources import TensorSource, resolve_sources
from dispatch.waiting import waiting_on_disk, waiting_tensors
from dispatch.weights import Weights
from planner.conversions import targets_of, tied_names
from planner.errors import InputError, PlanMismatchError
from planner.graph import full_name
from planner.memory import with_groups
from planner.plan import Plan

_SHOWN = 5
# Narrower than float32, which some modules are to keep.
_NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filling:
    """What a checkpoint gives to a model.

    checkpoint, sources: of tensors in safetensors files. given: of pickled ones.
    dtypes: what each tensor that it gives becomes. devices: where each was; the CPU for those on meta.
    """

    checkpoint: Checkpoint | None
    sources: dict[str, TensorSource] = field(default_factory=dict)
    given: dict[str, torch.Tensor] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype]
    devices: dict[str, torch.device]

    @classmethod
    def find(
        cls,
        model: torch.nn.Module,
        path: str | Path,
        *,
        strict: bool,
        dtype: str | torch.dtype | None = None,
        keep_in_fp32: Collection[str] = (),
    ) -> Filling:
        """Return what the checkpoint at `path` gives, by its headers alone, and tell of what it lacks and has beyond.

        Raises:
            InputError: it cannot be read, or with `strict` its names are not the model's. PlanMismatchError: a shape
            differs.
        """
        if path is None:
            raise InputError("there is no checkpoint: give the path of a file, an index or a folder")
        check_path(path, "the checkpoint")
        targets = targets_of(model)
        files = find_pickled(Path(path))
        checkpoint = None if files else Checkpoint.open(path)
        sources: dict[str, TensorSource] = {}
        given: dict[str, torch.Tensor] = {}
        if checkpoint is not None:
            sources = resolve_sources(model, checkpoint, partial=True)
            used = {piece.entry.name for source in sources.values() for piece in source.pieces}
            unexpected = [name for name in checkpoint.names() if name not in used]
        else:
            held = read_pickled(files)
            given = _given(targets, held)
            unexpected = [name for name in held if name not in targets]
        missing = [name for name in targets if name not in sources and name not in given]
        _tell(model, path, missing, unexpected, strict=strict)
        wanted = _dtype(dtype)
        dtypes = {
            name: _becomes(name, targets[name].dtype, wanted, keep_in_fp32)
            for name in targets
            if name in sources or name in given
        }
        return cls(
            checkpoint=checkpoint,
            sources={name: replace(source, dtype=dtypes[name]) for name, source in sources.items()},
            given=given,
            dtypes=dtypes,
            devices={name: torch.device("cpu") if targets[name].is_meta else targets[name].device for name in dtypes},
        )

    def weights(self, model: torch.nn.Module) -> Weights:
        """Return the model's tensors, all of them from here that are here; the model's own are to be emptied."""
        return Weights(model, self.checkpoint, offloaded=True, sources=self.sources, given=self.given)

    def with_disk(
        self, model: torch.nn.Module, plan: Plan, folder: str | Path | None, *, indexed: bool = False
    ) -> Filling:
        """Return this with everything that is to wait on disk in a file that holds it as it is needed: most stays where
        it is, and the rest is written to `folder`. indexed: an index of it is to follow.

        Raises:
            InputError: something must be written, and there is no folder, or it cannot be.
        """
        mapped = {name for placement, name, _ in waiting_tensors(plan) if placement.run_on == "cpu"}
        apart = [
            name
            for name in waiting_on_disk(plan)
            if name not in self.sources or (name in mapped and self.sources[name].whole_entry() is None)
        ]
        if not apart:
            return self
        if folder is None:
            raise InputError(
                f"{apart[0]} is to wait on disk, and no safetensors file holds it as it is needed: give an "
                "offload_folder to write it to"
            )
        weights = self.weights(model)
        weights.check_complete()
        likes = {name: place.get(*place.owner(model, name)) for name in apart}
        if indexed:
            # An index has no word for the order of dimensions.
            likes = {name: like.contiguous() for name, like in likes.items()}
        target = Path(folder).absolute() / OFFLOAD_FILE
        written = write_ordered(target, {name: (like, _loader(weights, name)) for name, like in likes.items()})
        sources = dict(self.sources)
        for name in apart:
            sources[name] = ordered_source(model, name, written, name)
        entries: dict[str, TensorEntry] = {}
        for source in sources.values():
            for piece in source.pieces:
                entries[f"{piece.entry.file}:{piece.entry.name}"] = piece.entry
        where = self.checkpoint.path if self.checkpoint is not None else target
        return replace(self, checkpoint=Checkpoint.of(where, entries), sources=sources)


@contextmanager
def emptied(model: torch.nn.Module, filling: Filling) -> Iterator[None]:
    """Put the tensors that a checkpoint gives on meta, in the dtypes that they become; put them back where it fails."""
    before: list[tuple[torch.nn.Module, str, torch.Tensor]] = []
    made: dict[int, torch.Tensor] = {}
    for name, tensor in list(place.named_tensors(model)):
        if name not in filling.dtypes:
            continue
        empty = place.empty(tensor.detach().to("meta", filling.dtypes[name]), torch.device("meta"))
        if isinstance(tensor, torch.nn.Parameter):
            empty = place.as_parameter(empty, requires_grad=tensor.requires_grad)
        before.append((*place.owner(model, name), tensor))
        place.set_tensor(*place.owner(model, name), made.setdefault(id(tensor), empty))
    try:
        yield
    except BaseException:
        for module, leaf, tensor in before:
            place.set_tensor(module, leaf, tensor)
        raise


def fill(
    model: torch.nn.Module,
    filling: Filling,
    plan: Plan | None,
    targets: Mapping[str, torch.device],
    folder: str | Path | None,
) -> None:
    """Give an emptied model its tensors, each where the plan lets it wait, or where it was; those on disk stay on meta,
    and `folder` gets an index of them.

    Raises:
        InputError: a tensor cannot be read, or there is no folder for an index.
    """
    homes: dict[str, torch.device | None] = dict(filling.devices)
    if plan is not None:
        on_disk = [name for name in waiting_on_disk(plan) if name in homes]
        if on_disk and folder is None:
            raise InputError(
                f"{on_disk[0]} and {len(on_disk) - 1:,} more tensors are to wait on disk: give an offload_folder, "
                "which gets an index of where they are"
            )
        homes.update({name: home for name, home in _homes(plan, targets).items() if name in homes})
        if on_disk and folder is not None:
            filling = filling.with_disk(model, plan, folder, indexed=True)
            # What must be put together of pieces cannot be indexed.
            write_index([filling.sources[name] for name in on_disk], folder)
    weights = filling.weights(model)
    loaded: dict[tuple[int, torch.device], torch.Tensor] = {}
    found = []
    for name in sorted(homes, key=weights.file_order):
        device = homes[name]
        if device is None:
            continue
        module, leaf = place.owner(model, name)
        empty = module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
        key = id(empty), device
        if key not in loaded:
            tensor = weights.load(name, device)
            if isinstance(empty, torch.nn.Parameter):
                tensor = place.as_parameter(tensor, requires_grad=empty.requires_grad)
            loaded[key] = tensor
        found.append((module, leaf, loaded[key]))
    for module, leaf, tensor in found:
        place.set_tensor(module, leaf, tensor)


def _homes(plan: Plan, targets: Mapping[str, torch.device]) -> dict[str, torch.device | None]:
    """Return where each tensor waits, by its full name; None for the disk."""
    homes: dict[str, torch.device | None] = {}
    for placement, group in with_groups(plan.graph, plan.placements):
        known = {**targets, "cpu": targets.get("cpu", torch.device("cpu"))}
        for tensor in group.tensors:
            homes[full_name(placement.layer, tensor.name)] = known.get(placement.home)
    for names in plan.graph.ties:
        first = next(name for name in names if name in homes)
        homes.update({name: homes[first] for name in names if name not in homes})
    return homes


def _loader(weights: Weights, name: str) -> Callable[[], torch.Tensor]:
    return lambda: weights.load(name)


def _given(targets: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what pickled files hold of a model, a tied tensor under each of its names."""
    given = {name: held[name] for name in targets if name in held}
    for names in tied_names(targets):
        known = [name for name in names if name in given]
        if any(not torch.equal(given[known[0]], given[name]) for name in known[1:]):
            raise InputError(f"the model ties {', '.join(names)}, and the checkpoint holds different values for them")
        given.update({name: given[known[0]] for name in names if known})
    for name, tensor in given.items():
        if tensor.shape != targets[name].shape:
            raise PlanMismatchError(
                f"{name} has the shape {tuple(tensor.shape)} in the checkpoint and {tuple(targets[name].shape)} in the "
                "model: the checkpoint is of another model"
            )
    return given


def _tell(model: torch.nn.Module, path: str | Path, missing: list[str], unexpected: list[str], *, strict: bool) -> None:
    said = []
    if missing:
        said.append(f"lacks {len(missing):,} tensors that the model has: {_some(missing)}")
    if unexpected:
        said.append(f"has {len(unexpected):,} that the model has not: {_some(unexpected)}")
    if not said:
        return
    text = f"the checkpoint {path} {', and '.join(said)}"
    if strict:
        raise InputError(f"{text}; with strict=False what is missing stays as it is, and the rest is passed over")
    what = "what is missing stays as it was in the " + type(model).__name__
    warnings.warn(f"{text}; {what if missing else 'these are passed over'}", stacklevel=4)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")


def _dtype(given: str | torch.dtype | None) -> torch.dtype | None:
    if given is None or isinstance(given, torch.dtype):
        return given
    found = getattr(torch, given.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise InputError(f"dtype is {given!r}, which torch does not have; one is 'float16'")
    return found


def _becomes(name: str, held: torch.dtype, wanted: torch.dtype | None, keep_in_fp32: Collection[str]) -> torch.dtype:
    """Return the dtype that a tensor of the model is loaded as."""
    if wanted is None or not held.is_floating_point:
        return held
    if wanted in _NARROW and any(f".{part}." in f".{name}." for part in keep_in_fp32):
        return torch.float32
    return wanted

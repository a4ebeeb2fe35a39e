"""Makes a model run as a Plan says: `apply`, and `remove`, which gives back a plain model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dispatch.built import as_module
from dispatch.checkpoint import Checkpoint
from dispatch.conventions import Conventions
from dispatch.copying import Blueprint
from dispatch.dispatched import ATTRIBUTE, MAP_ATTRIBUTE, Dispatched, check_plain
from dispatch.expert_cache import CacheStatistics
from dispatch.limits import Limits, OnExceed
from dispatch.match import check_matches
from dispatch.measure import NAMES_ATTRIBUTE
from dispatch.offload_folder import OFFLOAD_FILE, Waiting, write
from dispatch.replan import Given
from dispatch.session import AsItWasError, Dispatch, Session
from dispatch.targets import check_carried_out, find_targets
from dispatch.waiting import waiting_on_disk
from dispatch.weights import Weights
from planner.errors import InputError, PlanMismatchError
from planner.loading import read_bytes
from planner.plan import Plan


def apply(
    model: Any,
    plan: Plan,
    checkpoint: str | Path | None = None,
    *,
    devices: Mapping[str, torch.device | str] | None = None,
    offload_dir: str | Path | None = None,
    on_exceed: OnExceed | None = None,
    progress: bool | None = None,
) -> torch.nn.Module:
    """Put every weight of `model` where the plan says, and make it run so; return the model.

    model: on meta (filled from `checkpoint`), already loaded, or a name, folder or config to build it from.
    devices: real devices for the plan's names, {"cuda:0": "cuda:3"}; each is itself unless named.
    offload_dir: where a loaded model's weights go that are to wait on disk, if no checkpoint holds them.
    on_exceed: what is done about a call with more rows, tokens or context than planned: "warn" tells what it would take
        at least, and refuses what cannot fit by the plan's figures; "refuse" refuses it; "replan" plans for it and
        dispatches anew before a prompt is taken. None is "warn", but leaves a model that is wholly resident on one
        device without any hook, and so without a word.
    progress: whether a bar on stderr shows how far loading is; None shows it on a terminal.

    Everything that can be refused is refused before the model is changed.

    Raises:
        InputError: a device or file is missing or damaged. PlanMismatchError: the plan is for another model.
    """
    check_carried_out(plan)
    module, checkpoint = as_module(model, plan, checkpoint)
    check_plain(module)
    check_matches(module, plan)
    targets = find_targets(plan, devices or {})
    opened = Checkpoint.open(checkpoint) if checkpoint is not None else None
    offloaded = opened is None and not any(p.is_meta for p in module.parameters())
    waiting = _offload(module, plan, offload_dir) if offloaded else None
    if waiting is not None:
        opened = waiting.checkpoint
    weights = Weights(module, opened, offloaded=offloaded, sources=None if waiting is None else waiting.sources)
    limits = Limits(plan, targets, on_exceed or "warn")
    given = Given(checkpoint=checkpoint, devices=devices, offload_dir=offload_dir, on_exceed=on_exceed)
    state = Dispatched(module, plan, targets, weights, Conventions(), revive=revived, given=given)
    nbytes = read_bytes(plan) if weights.on_meta else 0
    state.start(
        limits, _by_another(state, given), served=on_exceed is not None, nbytes=nbytes, progress=progress
    )  # fmt: skip
    return module


def _by_another(state: Dispatched, given: Given) -> Dispatch:
    """Return what dispatches a model anew, as `apply` was told to, by a larger plan."""

    def dispatch(larger: Plan) -> Session:
        module, weights, told = state.model, state.weights, given
        _check_same(state, larger)
        if weights.on_meta and not weights.changed and not state.written():
            _let_go(module)
        else:
            remove(module)
            # All of it is in memory again, and the new plan's disk homes take its place.
            if weights.lent:
                told = told.another_folder()
            elif weights.offloaded and weights.checkpoint is not None and told.offload_dir is not None:
                (Path(told.offload_dir) / OFFLOAD_FILE).unlink(missing_ok=True)
        apply(
            module, larger, told.checkpoint, devices=told.devices, offload_dir=told.offload_dir,
            on_exceed=told.on_exceed,
        )  # fmt: skip
        following: Session = getattr(module, ATTRIBUTE).session
        return following

    return dispatch


def _check_same(state: Dispatched, larger: Plan) -> None:
    """Raise AsItWasError where a larger plan could not take the place of a model's, before anything is changed."""
    begins = "a call is larger than planned, and on_exceed='replan' cannot plan anew for it, since"
    ends = "call dispatch.remove, and dispatch the model with a plan for such calls"
    try:
        check_matches(state.model, larger)
    except PlanMismatchError as exc:
        raise AsItWasError(f"{begins} the model was changed after dispatch.apply ({exc}): {ends}") from exc
    # What load_state_dict wrote is no optimizer's.
    written = [] if state.weights.changed else state.written()
    trained = [name for name in written if state.parameter(name) is not None]
    if trained:
        raise AsItWasError(
            f"{begins} {trained[0]} and {len(trained) - 1:,} more are trained, and an optimizer would be left with "
            f"parameters that are used no more: {ends}"
        )


def revived(read: tuple[Blueprint]) -> torch.nn.Module:
    """Make a copy of a dispatched model run as that one does, with hooks and slots of its own; return it."""
    made = read[0]
    state = Dispatched(
        made.model, made.plan, made.here.targets, made.weights, made.conventions, revive=revived, given=made.given,
        parts=made.parts, names=made.names,
    )  # fmt: skip
    state.has.adopt(made.stores, made.experts, made.mapped, made.unwritten, made.written)
    limits = None if made.on_exceed is None else Limits(made.plan, state.targets, made.on_exceed)
    another = None if made.given is None else _by_another(state, made.given)
    state.run(limits, another, served=made.served)
    state.before = made.before
    if made.device_map is not None:
        setattr(made.model, MAP_ATTRIBUTE, dict(made.device_map))
    return made.model


def remove(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `apply`: no hooks, every weight in memory and tied as it was; return the model.

    A model that ran on one device stays there; one that was spread over several comes to the CPU.

    Raises:
        InputError: the model is not dispatched, or a file that its weights wait in is gone.
    """
    state: Dispatched | None = getattr(model, ATTRIBUTE, None)
    if state is None:
        raise InputError("this model is not dispatched")
    state.detach()
    delattr(model, ATTRIBUTE)
    delattr(model, NAMES_ATTRIBUTE)
    if not state.plan.graph.passes:
        vars(model).pop(MAP_ATTRIBUTE, None)
    return model


def forget(model: torch.nn.Module) -> None:
    """Let a model that has no hooks go on as a plain one."""
    state: Dispatched = getattr(model, ATTRIBUTE)
    if not state.waits:
        state.copies.detach()
        delattr(model, ATTRIBUTE)
        delattr(model, NAMES_ATTRIBUTE)


def _let_go(model: torch.nn.Module) -> None:
    """Undo `apply`, and leave the model on meta: nothing is read."""
    getattr(model, ATTRIBUTE).detach(read=False)
    delattr(model, ATTRIBUTE)
    delattr(model, NAMES_ATTRIBUTE)


def cache_statistics(model: torch.nn.Module) -> tuple[CacheStatistics, ...]:
    """Return what the slots for experts did since `apply`, device by device; none where no experts are copied.

    Raises:
        InputError: the model is not dispatched.
    """
    state: Dispatched | None = getattr(model, ATTRIBUTE, None)
    if state is None:
        raise InputError("this model is not dispatched")
    return tuple(
        CacheStatistics(
            device=device, slots=len(cache.ring), hits=cache.hits, copies=cache.copies, copied_bytes=cache.copied_bytes
        )
        for device, cache in state.has.caches.items()
    )


def _offload(model: torch.nn.Module, plan: Plan, folder: str | Path | None) -> Waiting | None:
    """Write the disk homes of a loaded model to `folder`, when one is given."""
    names = waiting_on_disk(plan)
    return write(model, names, folder) if folder is not None and names else None

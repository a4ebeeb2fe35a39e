"""Runs a model by a device map: its plan, where every tensor's values come from, and what is moved between modules."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dispatch import attach, place
from dispatch.conventions import Conventions
from dispatch.dispatched import MAP_ATTRIBUTE, Dispatched, check_plain
from dispatch.filling import Filling
from dispatch.offload_folder import Waiting, check_path, find, of_index, write
from dispatch.structure import Place, main_of, plan_of
from dispatch.targets import find_targets
from dispatch.waiting import waiting_on_disk, waiting_tensors
from dispatch.weights import Weights
from planner.errors import InputError
from planner.plan import Plan

Devices = Mapping[str, torch.device | str]


def dispatched(
    model: torch.nn.Module,
    device_map: Mapping[str, Place],
    *,
    main_device: Place | None = None,
    given: Mapping[str, torch.Tensor] | None = None,
    filling: Filling | None = None,
    offload_dir: str | Path | None = None,
    offload_index: Mapping[str, Any] | None = None,
    buffers_wait: bool = False,
    skip_keys: str | Sequence[str] | None = None,
    whole: Sequence[str] | None = None,
    forced: bool = False,
    devices: Devices | None = None,
    told: bool = True,
) -> torch.nn.Module:
    """Run a model by a device map. filling: where its values come from, instead of `given`, an index, and the model.

    told: the model says by which map it runs.
    """
    if not isinstance(device_map, Mapping):
        raise InputError(
            f"the device map is {device_map!r}; it must say where each module goes, as {{'layers.0': 0, 'head': 'cpu'}}"
        )
    check_plain(model)
    check_path(offload_dir, "the folder for what waits on disk")
    if next(place.named_tensors(model), None) is not None:
        plan = plan_of(model, device_map, main_device=main_device, buffers_wait=buffers_wait, whole=whole or ())
        _check_kinds(model, plan)
        targets = real_devices(plan, devices)
        weights = _weights(model, plan, given, filling, offload_dir, offload_index)
        skipped = (skip_keys,) if isinstance(skip_keys, str) else tuple(skip_keys or ())
        main = main_of(device_map, main_device)
        conventions = _conventions(plan, targets, main, forced=forced, skip_keys=skipped, buffers_wait=buffers_wait)
        away = set(waiting_on_disk(plan))
        nbytes = weights.stored_bytes(name for _, _, name, _ in plan.graph.tensors() if name not in away)
        Dispatched(model, plan, targets, weights, conventions, revive=attach.revived).start(nbytes=nbytes)
        attach.forget(model)
    if told:
        setattr(model, MAP_ATTRIBUTE, dict(device_map))
    return model


def _check_kinds(model: torch.nn.Module, plan: Plan) -> None:
    """Raise InputError where a parameter that waits is of a kind of its own: copied, it would be a plain one."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for _, name, _ in waiting_tensors(plan):
        found = parameters.get(name)
        if found is not None and type(found) is not torch.nn.Parameter and found.device.type in ("cpu", "cuda", "meta"):
            raise InputError(
                f"{name} is a {type(found).__name__}, as quantised weights are, and only plain ones wait elsewhere: "
                "let its module stay on the device that runs it"
            )


def _weights(
    model: torch.nn.Module,
    plan: Plan,
    given: Mapping[str, torch.Tensor] | None,
    filling: Filling | None,
    offload_dir: str | Path | None,
    offload_index: Mapping[str, Any] | None,
) -> Weights:
    """Return where every tensor's values come from.

    Raises:
        InputError: one has none, or is to wait on disk and there is no folder for it.
    """
    if filling is not None:
        weights = filling.with_disk(model, plan, offload_dir).weights(model)
    else:
        values = _checked(model, plan, given or {})
        waiting = _on_disk(model, waiting_on_disk(plan), offload_dir, offload_index)
        weights = Weights(
            model,
            waiting.checkpoint if waiting is not None else None,
            offloaded=True,
            sources=waiting.sources if waiting is not None else {},
            given=values,
        )
    weights.check_complete()
    return weights


def _on_disk(
    model: torch.nn.Module,
    names: list[str],
    folder: str | Path | None,
    index: Mapping[str, Any] | None,
) -> Waiting | None:
    if not names:
        return None
    if index is not None:
        return of_index(model, names, index, folder)
    if folder is None:
        raise InputError(
            f"{names[0]} and {len(names) - 1:,} more tensors are to wait on disk: give an offload_dir to write them to"
        )
    found = find(model, names, folder)
    if found is not None:
        return found
    empty = [name for name in names if place.get(*place.owner(model, name)).is_meta]
    if empty:
        raise InputError(
            f"{empty[0]} is on meta, and {folder} holds nothing of it: load the checkpoint with "
            "load_checkpoint_and_dispatch, or give the offload_index that says where it is"
        )
    return write(model, names, folder)


def _checked(model: torch.nn.Module, plan: Plan, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return of given tensors those of what waits, and of what the model has no values for."""
    waiting = {name for _, name, _ in waiting_tensors(plan)}
    shapes = dict(place.named_tensors(model))
    found = {n: t for n, t in given.items() if n in shapes and (n in waiting or shapes[n].is_meta)}
    for name, tensor in found.items():
        if tensor.is_meta or tensor.shape != shapes[name].shape:
            has = "no values" if tensor.is_meta else f"the shape {list(tensor.shape)}"
            raise InputError(f"{name} has {has} in the state_dict; the model has it as {list(shapes[name].shape)}")
    return found


def _conventions(
    plan: Plan,
    targets: Mapping[str, torch.device],
    main: str,
    *,
    forced: bool,
    skip_keys: Collection[str],
    buffers_wait: bool,
) -> Conventions:
    """Return that every module whose tensors are used on one device has its arguments brought there, and the model its
    to the main one; none where one device holds and runs all.
    """
    run_on = dict(zip((layer.name for layer in plan.graph.layers), plan.run_on(), strict=True))
    waits = any(p.home != p.run_on and p.run_on != "cpu" for p in plan.placements)
    if not (waits or forced or len(set(run_on.values())) > 1):
        return Conventions(keeps_training=True)
    below: dict[str, set[str]] = {}
    for name, device in run_on.items():
        path = name
        while path:
            below.setdefault(path, set()).add(device)
            path = path.rpartition(".")[0]
    used = {path: next(iter(found)) for path, found in below.items() if len(found) == 1} | run_on
    main = main if main in targets else plan.run_on()[0]
    arguments = {path: targets[name] for path, name in {"": main, **used}.items()}
    return Conventions(
        arguments=arguments, skip_keys=skip_keys, returns=True, buffers_wait=buffers_wait, keeps_training=True
    )


def real_devices(plan: Plan, devices: Devices | None) -> dict[str, torch.device]:
    """Return the real devices of those that a map uses; what is said of others is passed over."""
    known = {device.name for device in plan.hardware.devices}
    return find_targets(plan, {name: device for name, device in (devices or {}).items() if name in known})

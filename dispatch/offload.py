"""The functions that users of Accelerate know, with their names, arguments and meanings, run by this project's engine.

What each does here, and where it differs on purpose: docs/familiar.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dispatch import attach, place
from dispatch.alignment import WholeOffload
from dispatch.conventions import Conventions
from dispatch.filling import Filling, emptied, fill
from dispatch.offload_folder import Waiting, find, of_index, write
from dispatch.structure import Place, main_of, place_name, plan_of
from dispatch.targets import find_targets
from dispatch.waiting import waiting_on_disk, waiting_tensors
from dispatch.weights import Weights
from planner.errors import InputError
from planner.plan import Plan

Devices = Mapping[str, torch.device | str]
_CHOICES = ("auto", "balanced", "balanced_low_0", "sequential")
_MAP_ATTRIBUTE = "hf_device_map"


def dispatch_model(
    model: torch.nn.Module,
    device_map: Mapping[str, Place],
    main_device: Place | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    offload_dir: str | Path | None = None,
    offload_index: Mapping[str, Any] | None = None,
    offload_buffers: bool = False,
    skip_keys: str | Sequence[str] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    force_hooks: bool = False,
    *,
    devices: Devices | None = None,
) -> torch.nn.Module:
    """Put each module of a model where a device map says, and make it run so; return the model.

    device_map: {module or tensor: number of a GPU, device, "cpu" or "disk"}; what the longest name says counts.
    main_device: runs what the map has on "cpu" and "disk"; None: the first GPU of the map, else the CPU.
    state_dict: values of what waits, also where the model has others or none.
    offload_dir: where weights are written that are to wait on disk, or were written.
    offload_index: says where they are instead, as {name: {"safetensors_file", "weight_name", "dtype"}}.
    offload_buffers: persistent buffers of what waits are copied each time too, and do not stay on the main device.
    skip_keys: keyword arguments, and keys of outputs, that are left where they are.
    preload_module_classes: classes of modules that use their children's weights without calling them.
    force_hooks: also a model wholly on one device has its inputs brought there, and its outputs back.
    devices: real devices for the map's, as `dispatch.apply` takes them: {"cuda:0": "cpu"}.

    Everything that can be refused is refused before the model is changed.

    Raises:
        InputError: the map does not fit the model or this machine, or weights that are to wait have no values or place.
    """
    return _dispatched(
        model,
        device_map,
        main_device=main_device,
        given=state_dict,
        offload_dir=offload_dir,
        offload_index=offload_index,
        buffers_wait=offload_buffers,
        skip_keys=skip_keys,
        whole=preload_module_classes,
        forced=force_hooks,
        devices=devices,
    )


def cpu_offload(
    model: torch.nn.Module,
    execution_device: Place | None = None,
    offload_buffers: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    *,
    devices: Devices | None = None,
) -> torch.nn.Module:
    """Let all parameters of a model wait in host memory, and be copied to a device as they are used; return the model.

    execution_device: None is the device of the first parameter; on the CPU there is nothing to copy. The other
    arguments are those of `dispatch_model`.

    Raises:
        InputError: as `dispatch_model` does.
    """
    return _dispatched(
        model,
        {"": "cpu"},
        main_device=_own_device(model) if execution_device is None else execution_device,
        given=state_dict,
        buffers_wait=offload_buffers,
        whole=preload_module_classes,
        devices=devices,
        told=False,
    )


def disk_offload(
    model: torch.nn.Module,
    offload_dir: str | Path,
    execution_device: Place | None = None,
    offload_buffers: bool = False,
    preload_module_classes: Sequence[str] | None = None,
    *,
    devices: Devices | None = None,
) -> torch.nn.Module:
    """Let all parameters of a model wait on disk, and be read to a device as they are needed; return the model.

    offload_dir: where they are written, or were. execution_device: None is the device of the first parameter; the CPU
    computes straight from the mapped file. The other arguments are those of `dispatch_model`.

    Raises:
        InputError: as `dispatch_model` does.
    """
    return _dispatched(
        model,
        {"": "disk"},
        main_device=_own_device(model) if execution_device is None else execution_device,
        offload_dir=offload_dir,
        buffers_wait=offload_buffers,
        whole=preload_module_classes,
        devices=devices,
        told=False,
    )


def cpu_offload_with_hook(
    model: torch.nn.Module,
    execution_device: Place | None = None,
    prev_module_hook: WholeOffload | None = None,
) -> tuple[torch.nn.Module, WholeOffload]:
    """Keep a whole model in host memory until it is called; it then stays on its device until `offload` of the hook.

    execution_device: None is this machine's accelerator, else the CPU.
    prev_module_hook: of the model before it in a row, which goes back to host memory when this one is called.
    """
    if execution_device is None:
        execution_device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    attach.check_plain(model)
    return model, WholeOffload(model, torch.device(place_name(execution_device)), prev_module_hook)


def load_checkpoint_in_model(
    model: torch.nn.Module,
    checkpoint: str | Path,
    device_map: Mapping[str, Place] | None = None,
    offload_folder: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool = False,
    offload_buffers: bool = False,
    keep_in_fp32_modules: Sequence[str] | None = None,
    offload_8bit_bnb: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
    *,
    devices: Devices | None = None,
) -> None:
    """Read a checkpoint into a model, each tensor to where the device map has it; nothing is kept of a load that fails.

    checkpoint: a safetensors file, an index, or a folder; a pickled one (.bin) is read as plain tensors alone.
    device_map: None leaves each tensor on the device where it is, and brings those on meta to the CPU.
    offload_folder: gets an index of where in the checkpoint's files the tensors are that the map has on "disk".
    dtype: floating-point weights are converted to it; None: to what they are in the model.
    offload_state_dict: has no effect: nothing is held in memory but what stays there.
    keep_in_fp32_modules: parts of names whose weights are float32 whatever `dtype` says.
    strict: tensors that the checkpoint lacks, or has and the model does not, are an error.

    Raises:
        InputError: it is damaged or of another model, lacks tensors that the model has no values for, or its disk part
            has no offload_folder. PlanMismatchError: a shape differs.
    """
    _check_alone(offload_8bit_bnb=offload_8bit_bnb, broadcast_from_rank0=broadcast_from_rank0)
    attach.check_plain(model)
    filling = Filling.find(
        model, checkpoint, strict=strict, dtype=dtype, keep_in_fp32=tuple(keep_in_fp32_modules or ())
    )
    with emptied(model, filling):
        plan = None if device_map is None else plan_of(model, device_map, buffers_wait=offload_buffers)
        fill(model, filling, plan, {} if plan is None else _targets(plan, devices or {}), offload_folder)


def load_checkpoint_and_dispatch(
    model: torch.nn.Module,
    checkpoint: str | Path,
    device_map: str | Mapping[str, Place] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    no_split_module_classes: Sequence[str] | None = None,
    offload_folder: str | Path | None = None,
    offload_buffers: bool = False,
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool | None = None,
    skip_keys: str | Sequence[str] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    force_hooks: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
    *,
    devices: Devices | None = None,
) -> torch.nn.Module:
    """Read a checkpoint straight to where a device map has each weight, and make the model run so; return the model.

    device_map: also "auto", "balanced", "balanced_low_0" or "sequential", which ask `planner.infer_auto_device_map`
        with max_memory and no_split_module_classes; None: the model is loaded, and not dispatched.
    offload_folder: for what is to wait on disk and no safetensors file holds as it is needed; the rest stays in the
        checkpoint's own files.
    The other arguments are those of `load_checkpoint_in_model` and `dispatch_model`.

    Raises:
        InputError: as those do.
    """
    _check_alone(broadcast_from_rank0=broadcast_from_rank0)
    if isinstance(device_map, str):
        device_map = _inferred(
            model, device_map, max_memory, no_split_module_classes, dtype=dtype, offload_buffers=offload_buffers
        )
    if device_map is None:
        load_checkpoint_in_model(model, checkpoint, dtype=dtype, strict=strict)
        return model
    filling = Filling.find(model, checkpoint, strict=strict, dtype=dtype)
    with emptied(model, filling):
        return _dispatched(
            model,
            device_map,
            filling=filling,
            offload_dir=offload_folder,
            buffers_wait=offload_buffers,
            skip_keys=skip_keys,
            whole=preload_module_classes,
            forced=force_hooks,
            devices=devices,
        )


def remove_hook_from_submodules(module: torch.nn.Module) -> None:
    """Undo every dispatch of a module and of what is below it; all weights are in memory again afterwards."""
    for each in list(module.modules()):
        remove_hook_from_module(each)


def remove_hook_from_module(module: torch.nn.Module, recurse: bool = False) -> torch.nn.Module:
    """Undo the dispatch of a module, and with `recurse` of those below it; return the module.

    Raises:
        InputError: it is a part of a dispatched model, which is undone as a whole.
    """
    if recurse:
        remove_hook_from_submodules(module)
    elif attach.is_dispatched(module):
        attach.remove(module)
        vars(module).pop(_MAP_ATTRIBUTE, None)
    elif (hook := WholeOffload.of(module)) is not None:
        hook.remove()
    elif attach.GROUP_ATTRIBUTE in vars(module):
        raise InputError(
            f"this {type(module).__name__} is a part of a model that was dispatched as a whole: call "
            "remove_hook_from_submodules with that model"
        )
    return module


def _dispatched(
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
    attach.check_plain(model)
    if next(place.named_tensors(model), None) is not None:
        plan = plan_of(model, device_map, main_device=main_device, buffers_wait=buffers_wait, whole=whole or ())
        targets = _targets(plan, devices or {})
        weights = _weights(model, plan, given, filling, offload_dir, offload_index)
        skipped = (skip_keys,) if isinstance(skip_keys, str) else tuple(skip_keys or ())
        main = main_of(device_map, main_device)
        conventions = _conventions(plan, targets, main, forced=forced, skip_keys=skipped, buffers_wait=buffers_wait)
        away = set(waiting_on_disk(plan))
        nbytes = weights.stored_bytes(name for _, _, name, _ in plan.graph.tensors() if name not in away)
        attach.Dispatched(model, plan, targets, weights, conventions).start(nbytes=nbytes)
        attach.forget(model)
    if told:
        model.hf_device_map = dict(device_map)  # type: ignore[assignment]  # a module takes any attribute
    return model


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


def _targets(plan: Plan, devices: Devices) -> dict[str, torch.device]:
    """Return the real devices of those that a map uses; what is said of others is passed over."""
    return find_targets(
        plan, {device.name: devices[device.name] for device in plan.hardware.devices if device.name in devices}
    )


def _inferred(
    model: torch.nn.Module,
    choice: str,
    max_memory: Mapping[int | str, int | str] | None,
    no_split_module_classes: Sequence[str] | None,
    *,
    dtype: str | torch.dtype | None,
    offload_buffers: bool,
) -> Mapping[str, Place]:
    if choice not in _CHOICES:
        raise InputError(f"device_map is {choice!r}; it must be a map, or one of {', '.join(_CHOICES)}")
    # Placing is the planner's; running by a map that is given needs nothing of it.
    import planner

    names: Any = planner
    asked = {"no_split_module_classes": no_split_module_classes, "dtype": dtype}
    if choice != "sequential":
        max_memory = names.get_balanced_memory(
            model, max_memory=max_memory, low_zero=choice == "balanced_low_0", **asked
        )
    found: Mapping[str, Place] = names.infer_auto_device_map(
        model, max_memory=max_memory, offload_buffers=offload_buffers, **asked
    )
    return found


def _own_device(model: torch.nn.Module) -> torch.device:
    first = next((tensor for _, tensor in place.named_tensors(model) if not tensor.is_meta), None)
    return torch.device("cpu") if first is None else first.device


def _check_alone(**given: bool) -> None:
    for name, value in given.items():
        if value:
            raise InputError(f"{name}=True is not carried: one process loads, and quantised weights are not offloaded")

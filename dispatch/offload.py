"""The functions that users of Accelerate know, with their names, arguments and meanings, run by this project's engine.

What each does here, and where it differs on purpose: docs/familiar.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dispatch import accelerate_hooks, attach, place
from dispatch.alignment import WholeOffload
from dispatch.device_map import Devices, dispatched, real_devices
from dispatch.dispatched import GROUP_ATTRIBUTE, check_plain, is_dispatched
from dispatch.filling import Filling, emptied, fill
from dispatch.offload_folder import check_path
from dispatch.structure import Place, place_name, plan_of
from dispatch.targets import is_here
from planner.errors import InputError

_CHOICES = ("auto", "balanced", "balanced_low_0", "sequential")


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
    return dispatched(
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
    return dispatched(
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
    return dispatched(
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

    Raises:
        InputError: there is no such device, or the model is dispatched.
    """
    if execution_device is None:
        execution_device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    name = place_name(execution_device)
    if name == "disk" or not is_here(torch.device(name)):
        raise InputError(f"the model is to run on {name}, and this machine has no such device")
    if isinstance(model, torch.nn.Module) and (known := WholeOffload.of(model)) is not None:
        known.remove()
    check_plain(model)
    return model, WholeOffload(model, torch.device(name), prev_module_hook)


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
    check_plain(model)
    check_path(offload_folder, "the offload_folder")
    filling = Filling.find(
        model, checkpoint, strict=strict, dtype=dtype, keep_in_fp32=tuple(keep_in_fp32_modules or ())
    )
    with emptied(model, filling):
        plan = None if device_map is None else plan_of(model, device_map, buffers_wait=offload_buffers)
        fill(model, filling, plan, {} if plan is None else real_devices(plan, devices), offload_folder)


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
    place.check_module(model)
    if isinstance(device_map, str):
        device_map = _inferred(
            model, device_map, max_memory, no_split_module_classes, dtype=dtype, offload_buffers=offload_buffers
        )
    if device_map is None:
        load_checkpoint_in_model(model, checkpoint, dtype=dtype, strict=strict)
        return model
    filling = Filling.find(model, checkpoint, strict=strict, dtype=dtype)
    with emptied(model, filling):
        return dispatched(
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
    place.check_module(module)
    for each in list(module.modules()):
        remove_hook_from_module(each)


def remove_hook_from_module(module: torch.nn.Module, recurse: bool = False) -> torch.nn.Module:
    """Undo the dispatch of a module, and with `recurse` of those below it; return the module.

    Raises:
        InputError: it is a part of a dispatched model, which is undone as a whole.
    """
    place.check_module(module)
    if recurse:
        remove_hook_from_submodules(module)
    elif is_dispatched(module):
        attach.remove(module)
    elif (hook := WholeOffload.of(module)) is not None:
        hook.remove()
    elif accelerate_hooks.is_offloaded(module):
        accelerate_hooks.check(f"this {type(module).__name__}", module)
    elif GROUP_ATTRIBUTE in vars(module):
        raise InputError(
            f"this {type(module).__name__} is a part of a model that was dispatched as a whole: call "
            "remove_hook_from_submodules with that model"
        )
    return module


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
    place.check_module(model)
    first = next((tensor for _, tensor in place.named_tensors(model) if not tensor.is_meta), None)
    return torch.device("cpu") if first is None else first.device


def _check_alone(**given: bool) -> None:
    for name, value in given.items():
        if value:
            raise InputError(f"{name}=True is not carried: one process loads, and quantised weights are not offloaded")

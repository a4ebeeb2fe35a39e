"""What is handed to the familiar functions and cannot be what it should: one clear error, before anything is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import dispatch
from planner.errors import InputError

PLAYED = {"cuda:0": "cpu"}

TAKES_A_MODEL: dict[str, Callable[[Any, Path], Any]] = {
    "dispatch_model": lambda given, folder: dispatch.dispatch_model(given, {"": "cpu"}),
    "cpu_offload": lambda given, folder: dispatch.cpu_offload(given),
    "cpu_offload on a device": lambda given, folder: dispatch.cpu_offload(given, 0, devices=PLAYED),
    "disk_offload": lambda given, folder: dispatch.disk_offload(given, folder),
    "cpu_offload_with_hook": lambda given, folder: dispatch.cpu_offload_with_hook(given, "cpu"),
    "load_checkpoint_in_model": lambda given, folder: dispatch.load_checkpoint_in_model(given, folder),
    "load_checkpoint_and_dispatch": lambda given, folder: dispatch.load_checkpoint_and_dispatch(given, folder),
    "auto": lambda given, folder: dispatch.load_checkpoint_and_dispatch(given, folder, device_map="auto"),
    "by a map": lambda given, folder: dispatch.load_checkpoint_and_dispatch(given, folder, device_map={"": "cpu"}),
    "remove_hook_from_submodules": lambda given, folder: dispatch.remove_hook_from_submodules(given),
    "remove_hook_from_module": lambda given, folder: dispatch.remove_hook_from_module(given),
    "remove": lambda given, folder: dispatch.remove(given),
    "cache_statistics": lambda given, folder: dispatch.cache_statistics(given),
    "weights_at_home": lambda given, folder: dispatch.weights_at_home(given).__enter__(),
    "align_module_device": lambda given, folder: dispatch.align_module_device(given, "cpu").__enter__(),
    "has_offloaded_params": lambda given, folder: dispatch.has_offloaded_params(given),
    "infer_auto_device_map": lambda given, folder: dispatch.infer_auto_device_map(given, {0: 100}),
    "check_device_map": lambda given, folder: dispatch.check_device_map(given, {"": 0}),
    "get_balanced_memory": lambda given, folder: dispatch.get_balanced_memory(given, {0: 100, 1: 100}),
    "compute_module_sizes": lambda given, folder: dispatch.compute_module_sizes(given),
    "find_tied_parameters": lambda given, folder: dispatch.find_tied_parameters(given),
    "measure": lambda given, folder: dispatch.measure(given).__enter__(),
}


@pytest.mark.parametrize("name", TAKES_A_MODEL)
def test_what_is_no_model(name: str, tmp_path: Path) -> None:
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "model.safetensors")
    for given in ([nn.Linear(2, 2)], None, "gpt2", nn.Linear, 3, torch.ones(2)):
        with pytest.raises(InputError):
            TAKES_A_MODEL[name](given, tmp_path)


TAKES_A_FOLDER: dict[str, Callable[[Any, Path], Any]] = {
    "disk_offload": lambda given, file: dispatch.disk_offload(nn.Linear(2, 2), given, 0, devices=PLAYED),
    "dispatch_model": lambda given, file: dispatch.dispatch_model(
        nn.Linear(2, 2), {"": "disk"}, 0, offload_dir=given, devices=PLAYED
    ),
    "an index": lambda given, file: dispatch.dispatch_model(
        nn.Linear(2, 2), {"": "disk"}, offload_dir=given,
        offload_index={"weight": {"shape": [2, 2], "dtype": "float32"}, "bias": {"shape": [2], "dtype": "float32"}},
    ),
    "load_checkpoint_in_model": lambda given, file: dispatch.load_checkpoint_in_model(
        nn.Linear(2, 2), file, {"": "disk"}, offload_folder=given
    ),
    "in another dtype": lambda given, file: dispatch.load_checkpoint_and_dispatch(
        nn.Linear(2, 2), file, {"": "disk"}, offload_folder=given, dtype="float16"
    ),
    "a checkpoint": lambda given, file: dispatch.load_checkpoint_in_model(nn.Linear(2, 2), given),
    "and dispatched": lambda given, file: dispatch.load_checkpoint_and_dispatch(nn.Linear(2, 2), given, {"": "cpu"}),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKES_A_FOLDER)
def test_what_is_no_folder(name: str, tmp_path: Path) -> None:
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "model.safetensors")
    for given in ("a\0b", 5, nn.Linear(2, 2).state_dict(), None):
        with pytest.raises(InputError):
            TAKES_A_FOLDER[name](given, tmp_path / "model.safetensors")

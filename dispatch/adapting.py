"""Adding, loading and merging adapters in a dispatched model: its weights within reach where they wait."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dispatch.dispatched import MAP_ATTRIBUTE, Dispatched, state_of
from dispatch.scattered_tensor import ScatteredTensor
from dispatch.stores import HostStore
from dispatch.stream import StreamedGroup
from planner.errors import InputError

_CPU = torch.device("cpu")


@contextmanager
def weights_at_home(model: torch.nn.Module) -> Iterator[None]:
    """Have every weight that waits where it waits, inside the block: as a tensor over its host memory or its file.
    Fused experts that wait one by one are a `ScatteredTensor`, whose values come as they are asked for.

    For what changes the modules and not only calls them: `peft.get_peft_model`, `PeftModel.from_pretrained`,
    `merge_and_unload`. What is written to host memory stays; writing to a file is refused. What was added since the
    model was dispatched is on the CPU inside, beside weights that wait, and then where they are used. Inside, the model
    must not be called.

    model: dispatched, or with a dispatched model inside, as PEFT's are.

    Raises:
        InputError: it is not dispatched, or in the middle of a call; a weight on disk was written to, or given other
            values, which are then lost; an experts' parameter was taken from its module.
    """
    state = state_of(model)
    inner = state.model
    groups = [group for stream in state.streams for group in stream.groups]
    # Who finds a map with offloaded modules there takes off their hooks, and dispatches anew.
    told = vars(inner).pop(MAP_ATTRIBUTE, None)
    _move_added(state, home=True)
    try:
        with state.whole.at_home():
            homes = [{name: tensor.detach() for name, tensor in group.present().items()} for group in groups]
            files = {
                tensor.untyped_storage().data_ptr(): name
                for group, home in zip(groups, homes, strict=True)
                if not isinstance(group.store, HostStore)
                for name, tensor in home.items()
            }
            try:
                with _NotWritten(files):
                    yield
            finally:
                for group, home in zip(groups, homes, strict=True):
                    _keep(group, home)
                for _, source in state.has.experts:
                    source.keep()
    finally:
        state.whole.drop()
        if told is not None:
            setattr(inner, MAP_ATTRIBUTE, told)
        _move_added(state, home=False)


def _keep(group: StreamedGroup, home: Mapping[str, torch.Tensor]) -> None:
    """Write what was put in place of weights to where they wait."""
    for name, tensor in group.present().items():
        if tensor.data_ptr() == home[name].data_ptr():
            continue
        if not isinstance(group.store, HostStore):
            raise _in_a_file(name)
        with torch.no_grad():
            home[name].copy_(tensor)


def _move_added(state: Dispatched, *, home: bool) -> None:
    """Bring what was added to the model since it was dispatched to the CPU, where it is beside weights that wait, or to
    the device that runs the layer around it.
    """
    devices = {
        layer.name: state.targets[run_on]
        for layer, run_on in zip(state.plan.graph.layers, state.plan.run_on(), strict=True)
    }
    waiting = {group.layer for stream in state.streams for group in stream.groups}
    for path, module in state.model.named_modules():
        if module in state.known:
            continue
        around = path
        while around and around not in devices:
            around = around.rpartition(".")[0]
        if around not in devices or (home and around not in waiting):
            continue
        device = _CPU if home else devices[around]
        # What `Module.to` does, for this one alone: parameters stay the same objects, for whoever trains them.
        module._apply(partial(torch.Tensor.to, device=device), recurse=False)


class _NotWritten(TorchDispatchMode):
    """Refuses operators that write to certain storages. files: {address of a storage: name of its tensor}."""

    def __init__(self, files: Mapping[int, str]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._files = files

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for number, argument in enumerate(func._schema.arguments if self._files else ()):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            written = args[number] if number < len(args) else kwargs.get(argument.name)
            for tensor in written if isinstance(written, (list, tuple)) else (written,):
                if isinstance(tensor, ScatteredTensor):
                    continue  # they refuse by themselves
                if isinstance(tensor, torch.Tensor) and not tensor.is_meta and tensor.device.type == "cpu":
                    name = self._files.get(tensor.untyped_storage().data_ptr())
                    if name is not None:
                        raise _in_a_file(name)
        return func(*args, **kwargs)


def _in_a_file(name: str) -> InputError:
    return InputError(
        f"{name} waits in a file, which is not written to: let it wait on the 'cpu', or run the model on the CPU "
        "(main_device='cpu'), which keeps what is changed in memory"
    )

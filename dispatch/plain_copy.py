"""Deep copies of a module without what dispatching put on it, made as its class has them made.

The module itself is left alone: others may be calling it.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dispatch import hooks
from planner.errors import InputError

# What `copy.deepcopy` knows already, by the identities of the originals.
Memo = dict[int, Any]
COPYING = ("__deepcopy__", "__reduce_ex__")
_OURS = "_loadplan_"


def attributes(module: torch.nn.Module) -> dict[str, Any]:
    """Return what a module has of its own: not hooks, nor what makes it refuse or copy itself."""
    found = {name: value for name, value in vars(module).items() if not name.startswith(_OURS) and name not in COPYING}
    if "forward" in found:
        own = hooks.own_forward(module)
        found.pop("forward")
        if own is not None:
            found["forward"] = own
    return found


def plain_copy(
    module: torch.nn.Module, memo: Memo, *, kind: type | None = None, own: Mapping[str, Any] | None = None
) -> Any:
    """Return a deep copy of a module, and enter it in `memo`; what is in there is not copied again.

    kind: the class that it is to have. own: the attributes that it is a copy of.
    """
    kind = type(module) if kind is None else kind
    bare: Any = object.__new__(kind)
    vars(bare).update(attributes(module) if own is None else own)
    # What is known by an identity must live as long as that is asked for.
    memo.setdefault(id(memo), []).append(bare)
    copier = getattr(kind, "__deepcopy__", None)
    if copier is not None:
        memo[id(module)] = made = copier(bare, memo)
        return made
    function, arguments, *rest = bare.__reduce_ex__(4)
    # Known before what it holds is copied: that may point back to it.
    memo[id(module)] = made = function(*copy.deepcopy(arguments, memo))
    if rest and rest[0] is not None:
        made.__setstate__(copy.deepcopy(rest[0], memo))
    return made


class Pickled:
    """Stands for (value,) until that is read from a pickle, which needs nothing of ours for it.

    `copy.copy` asks for what `pickle` does, and takes it as it is: two models would have one set of weights.
    """

    def __init__(self, value: Any):
        self._value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, ([self._value],)

    def __getitem__(self, index: int) -> Any:
        """Raise InputError."""
        raise InputError(
            "copy.copy of a dispatched model, or of a part of one, would let two share what waits elsewhere: use "
            "copy.deepcopy"
        )


def itself(value: Any) -> tuple[Any, ...]:
    """Return what `pickle` takes of a thing in whose place `value` is to be read."""
    return operator.getitem, (Pickled(value), 0)


def tensors_below(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield every parameter and buffer of a module and of what is below it."""
    for each in module.modules():
        yield from (tensor for tensor in each._parameters.values() if tensor is not None)
        yield from (tensor for tensor in each._buffers.values() if tensor is not None)

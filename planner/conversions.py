"""Which stored tensors of a checkpoint make up each tensor of a model, by their names alone.

A checkpoint's names are not always the model's: base models lack a prefix, and transformers 5 holds all experts of a
layer in one 3-D parameter while checkpoints keep a tensor an expert. The rules are transformers' own.

Carried: renamings, MergeModulelist(dim=0), Concatenate, and the two in this order. Any other conversion that
a model needs (Transpose, Chunk, a quantiser's) is named in `Matched.blocked`.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from planner.errors import InputError


@dataclass(slots=True)
class Claim:
    """The stored names of one target, by source pattern and in the loader's order, and what is done with them."""

    operations: tuple[Any, ...]
    patterns: tuple[str, ...]
    names: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def columns(self) -> list[list[str]]:
        """Return the stored names, a list for each pattern that has any."""
        return [self.names[pattern] for pattern in self.patterns if pattern in self.names]


@dataclass(slots=True)
class Matched:
    """claims: {the model's name: what stands for it}; blocked: {the model's name: the conversion that is not carried};
    unexpected: {stored name: the name that it would have in the model}, of what the model does not have.
    """

    claims: dict[str, Claim]
    blocked: dict[str, str]
    unexpected: dict[str, str]


def targets_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and persistent buffers of `model` under every name, tied ones too."""
    targets: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in module._non_persistent_buffers_set:
                targets[f"{prefix}.{name}" if prefix else name] = buffer
    return targets


def tied_names(targets: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Return the sets of names that stand for one tensor."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in targets.items():
        names[id(tensor)].append(name)
    return [group for group in names.values() if len(group) > 1]


def match(model: nn.Module, targets: Mapping[str, torch.Tensor], stored: Iterable[str]) -> Matched:
    """Return which of the `stored` names stand for each target of `model`, which may be on meta.

    Raises:
        InputError: two stored tensors claim one place.
    """
    result = Matched({}, {}, {})
    names = _TransformersNames(model, targets) if _is_pretrained(model) else _PlainNames()
    for name in sorted(stored, key=names.order):
        target, converter, pattern = names.rename(name)
        if converter is not None and not _is_carried(converter.operations):
            first, conversion = converter.target_patterns[0], " + ".join(map(repr, converter.operations))
            for other in converter.target_patterns:
                result.blocked[target.replace(first, other)] = conversion
            result.unexpected[name] = target
        elif target not in targets:
            result.unexpected[name] = target
        else:
            operations = () if converter is None else tuple(converter.operations)
            patterns = ("",) if converter is None else tuple(converter.source_patterns)
            claim = result.claims.setdefault(target, Claim(operations, patterns))
            if claim.names and (converter is None or claim.patterns != patterns):
                other = next(iter(claim.names.values()))[0]
                raise InputError(
                    f"both {other!r} and {name!r} of the checkpoint stand for {target!r}; remove one of them"
                )
            claim.names[pattern or ""].append(name)
    return result


class _PlainNames:
    """Checkpoint name → (the model's name, no converter, no pattern): they are the same."""

    def order(self, name: str) -> Any:
        return name

    def rename(self, name: str) -> tuple[str, Any, str | None]:
        return name, None, None


def _is_pretrained(model: nn.Module) -> bool:
    if "transformers" not in sys.modules:  # then no model can be one of its classes
        return False
    from transformers.modeling_utils import PreTrainedModel

    return isinstance(model, PreTrainedModel)


class _TransformersNames:
    """Checkpoint name → (the model's name, converter, its pattern), as transformers' loader finds them.

    The rules and the renaming are transformers' own; what is called here is the same in 5.17 and 5.23 (read).
    """

    def __init__(self, model: Any, targets: Mapping[str, torch.Tensor]):
        from transformers import conversion_mapping, core_model_loading

        quantizer = getattr(model, "hf_quantizer", None)
        transforms = conversion_mapping.get_model_conversion_mapping(model, None, quantizer)
        self.order = core_model_loading.dot_natural_key
        self._rename = core_model_loading.rename_source_key
        self._renamings = [t for t in transforms if isinstance(t, core_model_loading.WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, core_model_loading.WeightConverter)]
        self._by_pattern = {pattern: c for c in self._converters for pattern in c.source_patterns}
        self._prefix = model.base_model_prefix
        self._targets = targets

    def rename(self, name: str) -> tuple[str, Any, str | None]:
        target, pattern = self._rename(name, self._renamings, self._converters, self._prefix, self._targets)
        if target not in self._targets and name in self._targets:
            # The checkpoint already has the model's own layout, which a pattern happened to match.
            target, pattern = self._rename(name, [], [], self._prefix, self._targets)
        return target, None if pattern is None else self._by_pattern[pattern], pattern


def _is_carried(operations: list[Any]) -> bool:
    from transformers.core_model_loading import Concatenate, MergeModulelist

    # By exact class, so that a subclass that does more is not taken for its parent.
    kinds = [type(operation) for operation in operations]
    if kinds == [Concatenate]:
        return bool(operations[0].dim >= 0)
    if kinds == [MergeModulelist, Concatenate]:
        return bool(operations[0].dim == 0 and operations[1].dim > 0)
    return bool(kinds == [MergeModulelist] and operations[0].dim == 0)

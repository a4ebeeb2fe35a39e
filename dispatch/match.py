"""Whether a model is the one that a plan was made for."""

from __future__ import annotations

import torch

from dispatch import place
from planner.errors import PlanMismatchError
from planner.plan import Plan


def check_matches(model: torch.nn.Module, plan: Plan) -> None:
    """Raise PlanMismatchError unless model and plan have the same tensors, alike in shape and dtype."""
    planned = {name: (tensor.shape, tensor.dtype) for _, _, name, tensor in plan.graph.tensors()}
    planned.update({tensor.name: (tensor.shape, tensor.dtype) for tensor in plan.graph.loose})
    actual = {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in place.named_tensors(model)
    }
    for name, (shape, dtype) in planned.items():
        if name not in actual:
            raise PlanMismatchError(f"the plan is for {plan.model.id}: this {type(model).__name__} has no {name}")
        if actual[name] != (shape, dtype):
            has = f"{actual[name][1]} {list(actual[name][0])}"
            raise PlanMismatchError(
                f"the plan is for {plan.model.id}: {name} is {dtype} {list(shape)} there and {has} in this model"
            )
    tied = {name for names in plan.graph.ties for name in names}
    extra = [name for name in actual if name not in planned and name not in tied]
    if extra:
        raise PlanMismatchError(
            f"the plan is for {plan.model.id}, which has no {extra[0]} ({len(extra)} more than planned)"
        )

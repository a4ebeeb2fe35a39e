"""A plan for a call that is larger than planned, made by the planner, which only this needs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dispatch.calls import Call
from dispatch.limits import OnExceed
from planner.errors import InputError
from planner.growth import Size
from planner.plan import Plan


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What `dispatch.apply` was told, to do it again by a larger plan."""

    checkpoint: str | Path | None
    devices: Mapping[str, torch.device | str] | None
    offload_dir: str | Path | None
    on_exceed: OnExceed | None

    def another_folder(self) -> Given:
        """Return the same with a new folder inside the one for what waits on disk: others read that one's file."""
        if self.offload_dir is None:
            return self
        folders = (Path(self.offload_dir) / f"replanned-{number}" for number in itertools.count(1))
        return dataclasses.replace(self, offload_dir=next(folder for folder in folders if not folder.exists()))


def larger_plan(plan: Plan, model: torch.nn.Module, call: Call) -> Plan:
    """Return a plan for the same model, machine and rules, and for work that this call is the prompt of.

    How popular experts are is not carried over.

    Raises:
        InputError: what plans is not installed, or the model is not one of transformers. InfeasibleError: the larger
            work does not fit either.
    """
    config: Any = getattr(model, "config", None)
    if config is None or plan.model.source in ("module", "graph"):
        raise InputError(
            f"{type(model).__name__} was planned by example inputs, which a new plan would need: plan for the larger "
            "call with planner.plan_model, and dispatch.apply that plan"
        )
    try:
        from planner.api import plan_model

        work = plan.workload
        larger = dataclasses.replace(
            work,
            batch_size=max(work.batch_size, -(-call.rows // (work.rows // work.batch_size))),
            prompt_tokens=max(work.prompt_tokens, call.new_tokens),
            prefill_chunk=None if call.new_tokens > (work.prefill_chunk or call.new_tokens) else work.prefill_chunk,
        )
        found = plan_model(
            config, hardware=plan.hardware, workload=larger, rules=plan.rules, weight_dtype=plan.model.weight_dtype
        )
    except ImportError as exc:
        raise InputError(
            f'on_exceed="replan" needs what plans, and {exc.name} is not installed here: install ortools, or plan on '
            "another machine for a larger call"
        ) from exc
    if not Size.of(found).holds(Size(rows=call.rows, tokens=call.new_tokens, context_tokens=call.context_tokens)):
        raise InputError(
            f"the rules let the planner take the prompt in chunks of {Size.of(found).tokens} tokens, and this call has "
            f"{call.new_tokens} at once: call generate with prefill_chunk_size={Size.of(found).tokens}"
        )
    return found

"""The model that is to be dispatched: the one that was given, or what a name, folder or config stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from planner.errors import PlanMismatchError
from planner.plan import Plan


def as_module(model: Any, plan: Plan, checkpoint: str | Path | None) -> tuple[torch.nn.Module, str | Path | None]:
    """Return the model to dispatch, built on meta from a name, folder or config, and where its weights are."""
    if isinstance(model, torch.nn.Module):
        return model, checkpoint
    # The planner knows how a name becomes a model; it is only needed where a name was given.
    from planner.given import build_on_meta, describe

    source = describe(model)
    if plan.model.config_digest and source.config_digest != plan.model.config_digest and source.source != "config":
        raise PlanMismatchError(f"the plan is for {plan.model.id}, and {source.id} has another config; plan again")
    built = build_on_meta(source, plan.model.weight_dtype).eval()
    if checkpoint is None:
        checkpoint = source.folder
    if checkpoint is not None and (Path(checkpoint) / "generation_config.json").is_file():
        from transformers import GenerationConfig

        built.generation_config = GenerationConfig.from_pretrained(checkpoint)
    return built, checkpoint

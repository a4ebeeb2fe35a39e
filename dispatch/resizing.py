"""`resize_token_embeddings` of transformers' models computes with the embeddings: what is said where these wait."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from dispatch.away import Away
from planner.errors import InputError

NAME = "resize_token_embeddings"


def explain(model: torch.nn.Module) -> None:
    """Let a model say, where resizing its embeddings fails because they wait, that they do."""
    resize: Callable[..., Any] | None = getattr(model, NAME, None)
    if not callable(resize):
        return

    @functools.wraps(resize)
    def explaining(*args: Any, **kwargs: Any) -> Any:
        try:
            return resize(*args, **kwargs)
        except RuntimeError as exc:
            if not _wait(model):
                raise
            raise InputError(
                "embeddings that wait elsewhere cannot be resized there: call dispatch.remove, resize them, and "
                "dispatch the model again"
            ) from exc

    vars(model)[NAME] = explaining


def leave(model: torch.nn.Module) -> None:
    """Undo `explain`."""
    vars(model).pop(NAME, None)


def _wait(model: Any) -> bool:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return any(isinstance(parameter, Away) for end in ends if end is not None for parameter in end.parameters())

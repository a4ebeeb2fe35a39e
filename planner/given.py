"""What the caller gave (a name, a folder, a config or a model): where it comes from, its dtype, the model on meta."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from planner.errors import InputError
from planner.models import ModelSource, load_config, resolve_model

if TYPE_CHECKING:
    import torch

    from planner.headers import Headers

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
# Looked in, in this order, for configs that do not name their architecture.
_AUTO_CLASSES = (
    "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText", "AutoModelForSpeechSeq2Seq",
    "AutoModel",
)  # fmt: skip


def describe(model: Any) -> ModelSource:
    """Return where a name, folder or config comes from, without loading anything heavy."""
    return source_of(model, hub=False, revision=None, trust_remote_code=False)[0]


def source_of(model: Any, *, hub: bool, revision: str | None, trust_remote_code: bool) -> tuple[ModelSource, Any]:
    """Return where the model comes from, and the model itself if it was given as one."""
    if isinstance(model, str):
        return resolve_model(model, hub=hub, revision=revision, trust_remote_code=trust_remote_code), None
    if hasattr(model, "to_diff_dict") and hasattr(model, "model_type"):
        return _from_config(model), None
    if hasattr(model, "named_parameters"):
        _check_not_offloaded(model)
        config = getattr(model, "config", None)
        note = f"the {type(model).__name__} given"
        if config is not None and hasattr(config, "to_diff_dict"):
            described = _from_config(config)
            return _as_module(described, note), model
        return ModelSource(id=type(model).__name__, source="module", revision=None, config={}, config_digest="",
                           folder=None, note=note), model  # fmt: skip
    raise InputError(f"a model is a name, a folder, a transformers config or a module, not {type(model).__name__}")


def _check_not_offloaded(model: Any) -> None:
    """Raise InputError where Accelerate brings a model's weights: its hooks cannot be traced."""
    for path, module in model.named_modules():
        if hasattr(module, "_hf_hook") and any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            raise InputError(
                f"{path or 'the model'} is offloaded by Accelerate, as from_pretrained(device_map=...) does: give the "
                "model's folder, its name or its config (model.config) instead"
            )


def _from_config(config: Any) -> ModelSource:
    data = json.loads(config.to_json_string(use_diff=True))
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    name = config.name_or_path or type(config).__name__
    return ModelSource(
        id=name, source="config", revision=None, config=data, config_digest=digest, folder=None, note="the config given"
    )


def _as_module(source: ModelSource, note: str) -> ModelSource:
    return ModelSource(
        id=source.id,
        source="module",
        revision=None,
        config=source.config,
        config_digest=source.config_digest,
        folder=None,
        note=note,
    )


def dtype_of(wanted: str | None, source: ModelSource, module: Any, stored: Headers | None, notes: list[str]) -> str:
    """Return what the weights run in: as the caller says, else as most of the checkpoint is stored, else as the
    config says.
    """
    if module is not None:
        own = {str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()}
        if wanted is not None and own != {DTYPES.get(wanted, wanted)}:
            raise InputError(f"the model has weights of {', '.join(sorted(own))}; convert it, or leave the dtype out")
        return max(sorted(own)) if own else "float32"
    if wanted is None:
        stated = source.config.get("dtype") or source.config.get("torch_dtype")
        text = source.config.get("text_config")
        if stated is None and isinstance(text, dict):
            stated = text.get("dtype") or text.get("torch_dtype")
        configured = str(stated).removeprefix("torch.") if stated else None
        in_files = stored.float_dtype() if stored is not None else None
        name = in_files or configured or "bfloat16"
        why = "as the checkpoint stores them" if in_files else "as the config says" if stated else "assumed"
        if in_files and configured and configured != in_files:
            why += f"; its config says {configured}"
        notes.append(f"weights in {name} ({why})")
    else:
        name = DTYPES.get(wanted, wanted)
    quantised = source.config.get("quantization_config")
    if stored is None and isinstance(quantised, dict):
        notes.append(
            f"the published weights are quantised ({quantised.get('quant_method', 'it is not said how')}): the plan is "
            f"for weights in {name}, and quantised ones are not carried yet"
        )
    if name not in ("bfloat16", "float16", "float32"):
        raise InputError(f"weights in {name} are not carried yet; choose bfloat16, float16 or float32")
    return name


def build_on_meta(source: ModelSource, dtype: str, *, trust_remote_code: bool = False) -> torch.nn.Module:
    """Return the model that a config describes, without memory for its weights.

    It is of the class that the config names as its architecture; where it names none, the first automatic class that
    knows the config chooses.

    Raises:
        TraceError: transformers has no class for the config.
    """
    import torch
    import transformers

    from planner.errors import TraceError

    config = load_config(source, trust_remote_code=trust_remote_code)
    wanted = (getattr(config, "architectures", None) or [None])[0]
    named = getattr(transformers, wanted, None) if wanted is not None else None
    with torch.device("meta"):
        if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), trust_remote_code=True
            )
        elif named is not None:
            model = named._from_config(config, dtype=getattr(torch, dtype))
        else:
            autos = (getattr(transformers, name) for name in _AUTO_CLASSES)
            auto = next((auto for auto in autos if type(config) in auto._model_mapping), None)
            if auto is None or wanted is not None:
                raise TraceError(f"{source.id} is a {wanted or config.model_type}, which transformers has no class for")
            model = auto.from_config(config, dtype=getattr(torch, dtype))
    result: torch.nn.Module = model
    return result

"""What a model is fed while it is traced, and the call that a user makes with it.

Token ids and masks are real and all ones; pictures, sound and other floating inputs are fake. They belong to the
caller, and are not counted.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from planner.chunks import Chunks, chunks
from planner.errors import InputError, TraceError
from planner.workload import Workload

# Inputs with one entry a token, which grow with the prompt.
_BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids")


class Inputs:
    """The inputs of one model for one workload.

    examples: inputs that the caller gave, by name; they replace what would be made up, and set the prompt's length.
    notes: what was assumed, in words.
    """

    def __init__(
        self,
        model: Any,
        workload: Workload,
        fake: FakeTensorMode,
        examples: Mapping[str, Any] | tuple[Any, ...] | None = None,
    ):
        self.model, self.workload, self._fake = model, workload, fake
        self.notes: list[str] = []
        self.generates = workload.caller == "generate" and can_generate(model)
        self._args: tuple[Any, ...] = ()
        self._given: dict[str, Any] = {}
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        if isinstance(examples, Mapping):
            self._given = {name: self._taken(value) for name, value in examples.items()}
        elif examples is not None:
            self._args = tuple(self._taken(value) for value in examples)
        elif getattr(model, "main_input_name", None) is None:
            raise InputError(
                f"{type(model).__name__} is not a model of transformers: give example inputs to trace it by"
            )
        else:
            self._given = self._made_up()
        self._check_generation()
        if examples is not None and not self.generates and can_generate(model) and not self._loops:
            self.notes.append("one forward call without a cache (use_cache=False, unless the inputs say otherwise)")
        if workload.caller == "generate" and not self.generates:
            self.notes.append(f"{type(model).__name__} does not generate: one forward call")

    @property
    def chunks(self) -> Chunks:
        """How the prompt is cut; a decoder that begins with one token takes it at once."""
        is_cut = self.generates and not _is_encoder_decoder(self.model)
        return chunks(self.workload.prompt_tokens, self.workload.prefill_chunk if is_cut else None)

    @property
    def steps(self) -> int:
        """Forward calls: those of the prefill, and one for every further token."""
        return self.chunks.count - 1 + (self.workload.new_tokens if self.generates or self._loops else 1)

    @property
    def _loops(self) -> bool:
        return self.workload.caller == "forward" and self.workload.new_tokens > 1 and can_generate(self.model)

    def _check_generation(self) -> None:
        """Refuse settings of the model's own that make further forward calls, and name those that are not followed."""
        config = getattr(self.model, "generation_config", None)
        if not self.generates or config is None:
            return
        if getattr(config, "guidance_scale", None) not in (None, 1, 1.0):
            raise TraceError(
                "generation_config.guidance_scale makes further forward calls, not carried yet: set it to None"
            )
        chunk = getattr(config, "prefill_chunk_size", None)
        if chunk is not None and self.workload.prefill_chunk is None:
            raise TraceError(
                f"generation_config.prefill_chunk_size cuts the prompt into chunks of {chunk} tokens: ask for that "
                f"(prefill_chunk={chunk}, --prefill-chunk {chunk}), or set it to None"
            )
        beams = getattr(config, "num_beams", None) or 1
        if beams != self.workload.num_beams:
            self.notes.append(
                f"{self.workload.num_beams} beams, as the workload says; the model's own setting is {beams}"
            )
        text = self.model.config.get_text_config()
        positions = getattr(text, "max_position_embeddings", None)
        longest = self.workload.prompt_tokens + self.workload.new_tokens
        if isinstance(positions, int) and longest > positions and not _is_encoder_decoder(self.model):
            self.notes.append(f"MORE TOKENS THAN THE MODEL KNOWS: prompt and answer have {longest}, it has {positions}")

    def call(self, *, longer: int = 0, new_tokens: int | None = None) -> Callable[[], Any]:
        """Return the user's call, its prompt longer by so many tokens, that makes `new_tokens` (the workload's).

        Of a prompt in many chunks those in the middle are one; a longer prompt in chunks is a single one.

        With the caller "forward" and several new tokens it is a plain loop: the prompt, then one token at a time with
        the cache that the call before returned.
        """
        work = self.workload
        given = self._lengthened(longer)
        if self.generates:
            options = generate_options(work)
            options["max_new_tokens"] = work.new_tokens if new_tokens is None else new_tokens
            if work.prefill_chunk is not None:
                options["prefill_chunk_size"] = work.prompt_tokens + longer if longer else list(self.chunks.sizes())
            return lambda: self.model.generate(**given, **options)
        if not self._loops:
            extra = {"use_cache": False} if can_generate(self.model) else {}
            return lambda: self.model(*self._args, **{**extra, **given})
        count = work.new_tokens if new_tokens is None else new_tokens
        name = "decoder_input_ids" if _is_encoder_decoder(self.model) else "input_ids"
        step = torch.ones(work.batch_size, 1, dtype=torch.long)
        return lambda: forward_loop(self.model, given, {name: step}, count)

    def _taken(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            # A tensor that is given twice stays one: modules ask whether query and key are the same.
            if id(value) not in self._seen:
                self._seen[id(value)] = (value, self._stand_in(value))
            return self._seen[id(value)][1]
        if isinstance(value, (list, tuple)):
            items = [self._taken(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, dict):
            taken = copy.copy(value)
            taken.update((name, self._taken(item)) for name, item in value.items())
            return taken
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            record: Any = copy.copy(value)
            for field in dataclasses.fields(value):
                object.__setattr__(record, field.name, self._taken(getattr(value, field.name)))
            return record
        return value

    def _stand_in(self, value: torch.Tensor) -> torch.Tensor:
        if value.layout != torch.strided or value.is_quantized:
            raise InputError(f"an example input is {value.layout} and {value.dtype}: give plain tensors")
        if value.dtype.is_floating_point or value.dtype.is_complex or value.is_meta:
            meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            return _fake_like(meta, self._fake)
        # A copy, for the model may change it in place.
        return value.detach().clone().cpu()

    def _made_up(self) -> dict[str, Any]:
        work, config = self.workload, self.model.config
        name = self.model.main_input_name
        ids = torch.ones(work.batch_size, work.prompt_tokens, dtype=torch.long)
        if name == "input_ids":
            vision = getattr(config, "vision_config", None)
            if vision is not None:
                self.notes.append("no picture in the prompt: give example inputs to count its tower")
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if _is_encoder_decoder(self.model) and not self.generates:
                given["decoder_input_ids"] = self._decoder_start()
            return given
        if name == "pixel_values":
            return {name: self._fake_floats(work.batch_size, *_image_shape(config))}
        if name == "input_features" and hasattr(config, "num_mel_bins"):
            frames = 2 * config.max_source_positions
            self.notes.append(f"sound of {frames} frames")
            given = {name: self._fake_floats(work.batch_size, config.num_mel_bins, frames)}
            if not self.generates:
                given["decoder_input_ids"] = self._decoder_start()
            return given
        raise InputError(f"{type(self.model).__name__} takes {name}: give example inputs to trace it by")

    def _decoder_start(self) -> torch.Tensor:
        first = self.model.generation_config.decoder_start_token_id if can_generate(self.model) else None
        return torch.full((self.workload.batch_size, 1), 1 if first is None else first, dtype=torch.long)

    def _fake_floats(self, *shape: int) -> torch.Tensor:
        dtype = next((p.dtype for p in self.model.parameters() if p.dtype.is_floating_point), torch.float32)
        return _fake_like(torch.empty(shape, dtype=dtype, device="meta"), self._fake)

    def _lengthened(self, longer: int) -> dict[str, Any]:
        if not longer:
            return dict(self._given)
        if _is_encoder_decoder(self.model):
            start = self._given.get("decoder_input_ids")
            if start is None:
                start = self._decoder_start()
            return {**self._given, "decoder_input_ids": _padded(start, longer)}
        return {name: _padded(v, longer) if name in _BY_TOKEN else v for name, v in self._given.items()}


def forward_loop(model: Any, first: Mapping[str, Any], step: Mapping[str, Any], calls: int) -> None:
    """Call `model` with `first`, then with `step` and the cache, `calls` times in all: the caller named "forward"."""
    out = model(**first, use_cache=True)
    for _ in range(calls - 1):
        name = "past_key_values" if hasattr(out, "past_key_values") else "cache_params"
        rest = {name: getattr(out, name)}
        if hasattr(out, "encoder_last_hidden_state"):
            rest["encoder_outputs"] = (out.encoder_last_hidden_state,)
        out = model(**step, **rest, use_cache=True)


def generate_options(work: Workload) -> dict[str, Any]:
    """Return the options of `generate` that a workload stands for, but the number of tokens."""
    options: dict[str, Any] = {"do_sample": work.sampling == "sample", "num_beams": work.num_beams}
    if work.num_return_sequences > 1:
        options["num_return_sequences"] = work.num_return_sequences
    if work.top_p is not None:
        options["top_p"] = work.top_p
    if work.cache == "offloaded":
        options["cache_implementation"] = "offloaded"
    elif work.cache == "static":
        options["cache_implementation"] = "static"
    elif work.cache == "fp8":
        options["cache_implementation"] = "quantized"
        options["cache_config"] = {"backend": "fp8"}
    if work.prefill_chunk is not None:
        options["prefill_chunk_size"] = work.prefill_chunk
    return options


def check_on_host(model: Any) -> None:
    """Raise TraceError where a model's cache cannot wait in host memory, or what would be there is not known."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    name = type(model).__name__
    if _is_encoder_decoder(model):
        raise TraceError(f"the offloaded cache of encoder-decoders ({name}) is not carried; take another (--cache)")
    try:
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    except Exception as exc:
        raise TraceError(f"{name} has no cache that transformers offloads ({exc}); take another (--cache)") from exc
    other = {type(layer).__name__ for layer in layers} - {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}
    if other or not layers:
        raise TraceError(
            f"{name} keeps more than keys and values ({', '.join(sorted(other)) or 'a cache of its own'}), which is "
            "not carried in host memory; take another (--cache)"
        )


def can_generate(model: Any) -> bool:
    """Tell whether a model answers prompts by `generate`."""
    return hasattr(model, "generate") and bool(model.can_generate())


def _is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _image_shape(config: Any) -> tuple[int, int, int]:
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        size = (size, size)
    if not size:
        raise InputError("the config names no image size: give example inputs")
    return getattr(config, "num_channels", 3), int(size[0]), int(size[1])


def _padded(tensor: torch.Tensor, longer: int) -> torch.Tensor:
    return torch.cat([tensor, tensor[..., -1:].expand(*tensor.shape[:-1], longer)], dim=-1)


def _fake_like(meta: torch.Tensor, fake: FakeTensorMode) -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensor

    result: torch.Tensor = FakeTensor(fake, meta, torch.device("cpu"))
    return result

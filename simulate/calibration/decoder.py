"""What a layer takes beside its products: each operator's share of the framework, and operators on activations.

Both are what is left of a small decoder of transformers, whose weights pass through the caches as those of large ones
do, when its products and its attention have been timed by themselves.
"""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from simulate.calibration.figures import Figure, Meter, figure_of
from simulate.calibration.processor import name_of

PROMPT_TOKENS = 384
STEPS = 16
_SHAPE = {
    "vocab_size": 4096, "hidden_size": 896, "intermediate_size": 2560, "num_hidden_layers": 6,
    "num_attention_heads": 14, "num_key_value_heads": 7,
}  # fmt: skip
# A decode step's context, short enough for attention to be little of it.
_CONTEXT_TOKENS = 32
_LEAST_RUNS = 3


class _Counted(TorchDispatchMode):
    """Counts operators that make something, and what they read and write that is no weight."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.operators = self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [value for value in _flat((out,)) if isinstance(value, torch.Tensor)]
        mutates = func._schema.is_mutable
        if not made or (func.is_view and not mutates):
            return out
        self.operators += 1
        read = [value for value in _flat(args) if isinstance(value, torch.Tensor)]
        self.nbytes += sum(t.nbytes for t in read if t.untyped_storage().data_ptr() not in self.weights)
        self.nbytes += 0 if mutates else sum(t.nbytes for t in made)
        return out


def _flat(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        found += _flat(value) if isinstance(value, (list, tuple)) else [value]
    return found


@torch.no_grad()
def operators(meter: Meter, dtype: torch.dtype, *, device: torch.device | str = "cpu") -> Figure:
    """Return what the framework takes for each operator of a decode step of `generate`, its own code shared out, in ns."""
    import transformers

    meter.report(f"measuring operators, {name_of(dtype)}")
    model = _model(transformers, dtype, device)
    prompt = torch.ones(1, _CONTEXT_TOKENS, dtype=torch.long, device=device)
    stamps = _stamps(transformers, meter)
    asked = {"max_new_tokens": STEPS + 1, "min_new_tokens": STEPS + 1, "do_sample": False, "pad_token_id": 0}
    taken: list[float] = []
    for _ in range(_LEAST_RUNS):
        stamps.times.clear()
        model.generate(prompt, stopping_criteria=[stamps], **asked)
        taken += [after - before for before, after in itertools.pairwise(stamps.times)]
    by_themselves = statistics.median(meter.samples(lambda: _products(model, 1, _CONTEXT_TOKENS + STEPS // 2)))
    cache = model(prompt, use_cache=True).past_key_values
    with _Counted(model) as counted:
        model(prompt[:, :1], past_key_values=cache, use_cache=True)
    values = [max(1.0, (step - by_themselves) * 1e9 / counted.operators) for step in taken]
    return figure_of("operators", name_of(dtype), "ns", values)


@torch.no_grad()
def activations(meter: Meter, dtype: torch.dtype, operator_ns: int, *, device: torch.device | str = "cpu") -> Figure:
    """Return what operators on the activations of a prompt read and write together, in bytes per second."""
    import transformers

    meter.report(f"measuring activations, {name_of(dtype)}")
    model = _model(transformers, dtype, device).model
    prompt = torch.ones(1, PROMPT_TOKENS, dtype=torch.long, device=device)
    with _Counted(model) as counted:
        model(prompt)
    by_themselves = statistics.median(meter.samples(lambda: _products(model, PROMPT_TOKENS, PROMPT_TOKENS)))
    fixed = by_themselves + counted.operators * operator_ns / 1e9
    whole = meter.samples(lambda: model(prompt))
    # Where nothing is left, it is hidden in the noise of the rest: then it is taken to be a hundredth.
    values = [counted.nbytes / max(taken - fixed, taken / 100) for taken in whole]
    return figure_of("activations", name_of(dtype), "B/s", values)


def _model(transformers: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    config = transformers.LlamaConfig(**_SHAPE, dtype=name_of(dtype))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to(device)


def _stamps(transformers: Any, meter: Meter) -> Any:
    class Stamps(transformers.StoppingCriteria):  # type: ignore[misc]
        """Notes when each token is there."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            self.times.append(meter.clock())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    return Stamps()


def _products(model: Any, rows: int, context: int) -> None:
    """Do the products and the attention of one pass, and nothing else."""
    config, like = model.config, next(model.parameters())
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            functional.linear(like.new_ones(1, rows, module.in_features), module.weight)
    heads = config.num_attention_heads
    query = like.new_ones(1, heads, rows, config.hidden_size // heads)
    states = like.new_ones(1, heads, context, config.hidden_size // heads)
    for _ in range(config.num_hidden_layers):
        functional.scaled_dot_product_attention(query, states, states, is_causal=rows > 1)

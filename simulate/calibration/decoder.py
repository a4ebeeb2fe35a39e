"""What a layer takes beside its products: each operator's share of the framework, and operators on activations.

Both are what is left of a small decoder of transformers, whose weights pass through the caches as those of large ones
do, when its products and its attention have been timed by themselves.
"""

from __future__ import annotations

import itertools
from statistics import fmean
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from simulate.calibration.figures import Figure, Meter, rate_of, time_of
from simulate.calibration.processor import name_of

PROMPT_TOKENS = 384
STEPS = 16
_SHAPE = {
    "vocab_size": 4096, "hidden_size": 896, "intermediate_size": 2560, "num_hidden_layers": 6,
    "num_attention_heads": 14, "num_key_value_heads": 7,
}  # fmt: skip
# A decode step's context, short enough for attention to be little of it.
_CONTEXT_TOKENS = 32
LEAST_RUNS = 3


class _Counted(TorchDispatchMode):
    """Counts operators that make something, and what they read and write that is no weight."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.operators = self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [value for value in _flat((out,)) if isinstance(value, torch.Tensor)]
        mutates = func._schema.is_mutable
        read = [value for value in _flat(args) if isinstance(value, torch.Tensor)]
        looks = {t.untyped_storage().data_ptr() for t in read} & {t.untyped_storage().data_ptr() for t in made}
        if not made or (looks and not mutates):
            return out
        self.operators += 1
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
    """Return what the framework takes for each operator of a decode step, the code of `generate` shared out, in ns."""
    import transformers

    meter.report(f"measuring operators, {name_of(dtype)}")
    model = _model(transformers, dtype, device)
    prompt = torch.ones(1, _CONTEXT_TOKENS, dtype=torch.long, device=device)
    products = _Products(model, 1, _CONTEXT_TOKENS + STEPS // 2)
    stamps = _stamps(transformers, meter, products)
    asked = {"max_new_tokens": STEPS + 1, "min_new_tokens": STEPS + 1, "do_sample": False, "pad_token_id": 0}
    steps: list[float] = []
    apart: list[float] = []
    spent = 0.0
    while not steps or spent < meter.seconds or len(steps) < LEAST_RUNS * STEPS:
        stamps.times.clear()
        model.generate(prompt, stopping_criteria=[stamps], **asked)
        # Each step, and the products that were done right before it.
        steps += [token - end for (_, end), (token, _) in itertools.pairwise(stamps.times)]
        apart += [end - done for done, end in stamps.times[:-1]]
        spent += stamps.times[-1][1] - stamps.times[0][0]
    cache = model(prompt, use_cache=True).past_key_values
    with _Counted(model) as counted:
        model(prompt[:, :1], past_key_values=cache, use_cache=True)
    products_s = fmean(apart)
    left = [max(1.0, (seconds - products_s) * 1e9 / counted.operators) for seconds in steps]
    return time_of("operators", name_of(dtype), left)


@torch.no_grad()
def activations(meter: Meter, dtype: torch.dtype, operator_ns: int, *, device: torch.device | str = "cpu") -> Figure:
    """Return what operators on the activations of a prompt read and write together, in bytes per second."""
    import transformers

    meter.report(f"measuring activations, {name_of(dtype)}")
    model = _model(transformers, dtype, device).model
    prompt = torch.ones(1, PROMPT_TOKENS, dtype=torch.long, device=device)
    with _Counted(model) as counted:
        model(prompt)
    products = _Products(model, PROMPT_TOKENS, PROMPT_TOKENS)
    overhead = counted.operators * operator_ns / 1e9
    passes: list[float] = []
    apart: list[float] = []
    spent = 0.0
    while len(passes) < LEAST_RUNS or spent < meter.seconds:
        started = meter.clock()
        model(prompt)
        between = meter.clock()
        products()
        ended = meter.clock()
        passes.append(between - started)
        apart.append(ended - between)
        spent += ended - started
    products_s = fmean(apart)
    # Where nothing is left, it is lost in the noise of the rest: then it is taken to be a hundredth.
    left = [max(seconds - products_s - overhead, seconds / 100) for seconds in passes]
    return rate_of("activations", name_of(dtype), "B/s", counted.nbytes, left)


def _model(transformers: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    config = transformers.LlamaConfig(**_SHAPE, dtype=name_of(dtype))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to(device)


def _stamps(transformers: Any, meter: Meter, products: _Products) -> Any:
    class Stamps(transformers.StoppingCriteria):  # type: ignore[misc]
        """Notes when each token is there, does the products of a step, and notes when they are done."""

        def __init__(self) -> None:
            self.times: list[tuple[float, float]] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            done = meter.clock()
            products()
            self.times.append((done, meter.clock()))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    return Stamps()


class _Products:
    """Does the products and the attention of one pass, and nothing else."""

    def __init__(self, model: Any, rows: int, context: int) -> None:
        config, like = model.config, next(model.parameters())
        heads = config.num_attention_heads
        self.weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
        self.inputs = {weight.shape[1]: like.new_ones(1, rows, weight.shape[1]) for weight in self.weights}
        self.layers, self.is_causal = config.num_hidden_layers, rows > 1
        self.query = like.new_ones(1, heads, rows, config.hidden_size // heads)
        self.states = like.new_ones(1, heads, context, config.hidden_size // heads)

    def __call__(self) -> None:
        for weight in self.weights:
            functional.linear(self.inputs[weight.shape[1]], weight)
        for _ in range(self.layers):
            functional.scaled_dot_product_attention(self.query, self.states, self.states, is_causal=self.is_causal)

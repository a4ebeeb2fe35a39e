"""What plans say of operator outputs, caches and weights against real runs on this CPU, to the byte.

Other architectures, and every call and layer: test_exact_memory.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, Qwen3Config

import planner
from live_storages import live_peak, tensors_of, weight_storage_bytes
from planner.execution import GROUPED_EXPERTS, register
from planner.plan import Plan
from planner.workload import Workload

SHAPE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE, num_hidden_layers=5),
    "llama tied": lambda: LlamaConfig(**SHAPE, num_hidden_layers=3, tie_word_embeddings=True),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_hidden_layers=4, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": lambda: GPT2Config(vocab_size=320, n_embd=64, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=None),
    "qwen3": lambda: Qwen3Config(**SHAPE, num_hidden_layers=4, head_dim=16),
}
# The last one holds the most in its last decode step.
WORK = [(1, 16, 1), (1, 16, 2), (2, 17, 3), (2, 17, 9), (1, 7, 60)]
FLOAT, HALF = torch.float32, torch.bfloat16


@functools.cache
def model_of(name: str, dtype: torch.dtype) -> Any:
    """Return a loaded model with random weights; mixtral runs the experts that a plan with resident ones names."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype).eval()
    if name == "mixtral":
        register()
        model.set_experts_implementation(GROUPED_EXPERTS)
    return model


pytestmark = pytest.mark.usefixtures("one_thread")


def plan_of(model: Any, work: Workload) -> Plan:
    return planner.plan_model(model, workload=work, use_cache=False)


def predicted(plan: Plan) -> int:
    assert plan.prediction is not None
    return plan.prediction.counters["cpu"]["operator_outputs"]


def ids_for(work: Workload) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(3, 320, (work.batch_size, work.prompt_tokens))


def generating(model: Any, work: Workload) -> Callable[[], Any]:
    """Return a call as a user makes it: ids and mask are the caller's own."""
    ids = ids_for(work)
    mask = torch.ones_like(ids)
    return lambda: model.generate(ids, attention_mask=mask, max_new_tokens=work.new_tokens, do_sample=False)


def forward_once(model: Any, work: Workload) -> Callable[[], Any]:
    ids = ids_for(work)
    mask = torch.ones_like(ids)
    return lambda: model(input_ids=ids, attention_mask=mask, use_cache=False)


def generate_work(shape: tuple[int, int, int]) -> Workload:
    return Workload(batch_size=shape[0], prompt_tokens=shape[1], new_tokens=shape[2])


DENSE = [(name, dtype) for name in ("llama", "llama tied", "gpt2", "qwen3") for dtype in (FLOAT, HALF)]


RUNS = [
    ("llama", FLOAT, (1, 7, 60)),
    ("llama tied", HALF, (1, 16, 1)),
    ("gpt2", HALF, (1, 16, 2)),
    ("qwen3", FLOAT, (2, 17, 3)),
    ("mixtral", HALF, (2, 17, 9)),
]


@pytest.mark.parametrize(("name", "dtype", "shape"), RUNS, ids=str)
def test_generate_holds_what_is_predicted(name: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    model, work = model_of(name, dtype), generate_work(shape)
    plan = plan_of(model, work)
    if name == "mixtral":
        assert plan.execution.experts == GROUPED_EXPERTS
    assert live_peak(model, generating(model, work)) == predicted(plan)


@pytest.mark.parametrize(("name", "dtype"), [("gpt2", FLOAT), ("mixtral", HALF)], ids=str)
def test_one_forward_holds_what_is_predicted(name: str, dtype: torch.dtype) -> None:
    model = model_of(name, dtype)
    work = Workload(caller="forward", batch_size=3, prompt_tokens=33, new_tokens=1)
    assert live_peak(model, forward_once(model, work)) == predicted(plan_of(model, work))


@pytest.mark.parametrize(("name", "dtype"), [("llama", FLOAT), ("gpt2", HALF), ("qwen3", FLOAT)], ids=str)
def test_torchs_own_tracker_agrees(name: str, dtype: torch.dtype) -> None:
    """torch's MemTracker counts a forward's activations; it was given the weights, which it counts apart."""
    from torch.distributed._tools.mem_tracker import MemTracker

    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype).eval()
    work = Workload(caller="forward", batch_size=2, prompt_tokens=24, new_tokens=1)
    ids = ids_for(work)
    mask = torch.ones_like(ids)
    tracker = MemTracker()
    tracker.track_external(model, ids, mask)
    with tracker, torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    given = weight_storage_bytes(model) + ids.nbytes + mask.nbytes
    assert peak["Total"] - given == predicted(plan_of(model, work))


# Caches


@pytest.mark.parametrize("shape", WORK, ids=str)
@pytest.mark.parametrize(("name", "dtype"), [("llama", HALF), ("gpt2", FLOAT), ("mixtral", HALF)], ids=str)
def test_the_cache_is_keys_and_values_of_every_token(
    name: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """2 · layers · batch · kv heads · tokens · head width · bytes, tokens being all but the last, never fed back."""
    model, (batch, prompt, new) = model_of(name, dtype), shape
    layers, heads = (4, 4) if name == "gpt2" else (model.config.num_hidden_layers, 2)
    graph = plan_of(model, generate_work(shape)).graph
    last = graph.passes[-1].per_layer()
    cached = 2 * layers * batch * heads * (prompt + new - 1) * 16 * dtype.itemsize
    assert sum(span.kv_after_bytes for span in last) == cached


# Weights


@pytest.mark.parametrize(("name", "dtype"), [*DENSE, ("mixtral", HALF), ("mixtral", FLOAT)], ids=str)
def test_weights_are_counted_once_and_all(name: str, dtype: torch.dtype) -> None:
    model = model_of(name, dtype)
    plan = plan_of(model, generate_work((1, 8, 2)))
    assert plan.model.weight_bytes == plan.graph.weight_bytes == weight_storage_bytes(model)
    assert plan.model.num_parameters == plan.graph.num_parameters == model.num_parameters()
    assert len(list(tensors_of(model))) == sum(1 for _ in plan.graph.tensors()) + len(plan.graph.loose) - len(
        plan.graph.tied_to_earlier()
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen3"])
def test_a_config_is_traced_as_its_loaded_model_is(name: str) -> None:
    model, work = model_of(name, HALF), generate_work((2, 9, 4))
    of_module = plan_of(model, work)
    of_config = planner.plan_model(CONFIGS[name](), workload=work, weight_dtype="bf16", use_cache=False)
    assert of_module.graph == of_config.graph
    assert of_module.placements == of_config.placements
    assert of_module.prediction == of_config.prediction

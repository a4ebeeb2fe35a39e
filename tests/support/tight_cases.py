"""Tiny models of twelve architectures, and machines with so little memory that plans for them are tight. For tests and
benchmarks.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

import planner
from planner import memory
from planner.execution import register
from planner.hardware import Device, Hardware, Link, MemoryPool
from planner.plan import Plan
from planner.rules import Rules
from planner.units import GB
from tiny_models import streamed, with_placements

# Models of experts route every token to the same ones (their routers are zeros), which is what plans count with.
_SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "pad_token_id": 0,
}  # fmt: skip
_GATED: dict[str, Any] = {**_SIZES, "intermediate_size": 176, "num_key_value_heads": 2}
_PLAIN: dict[str, Any] = {**_SIZES, "intermediate_size": 256}
_EXPERTS: dict[str, Any] = {**_GATED, "num_experts_per_tok": 2}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**_GATED),
    "mistral": lambda: tf.MistralConfig(**_GATED, sliding_window=None),
    "qwen3": lambda: tf.Qwen3Config(**_GATED, head_dim=16, tie_word_embeddings=True),
    "gemma": lambda: tf.GemmaConfig(**_GATED, head_dim=16),
    "phi": lambda: tf.PhiConfig(**_PLAIN),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=320, n_embd=64, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
    "gpt-neox": lambda: tf.GPTNeoXConfig(**_PLAIN),
    "opt": lambda: tf.OPTConfig(**_SIZES, ffn_dim=256, word_embed_proj_dim=64),
    "bloom": lambda: tf.BloomConfig(
        vocab_size=320, hidden_size=64, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
    "falcon": lambda: tf.FalconConfig(**_SIZES, bos_token_id=1, eos_token_id=2),
    "mixtral": lambda: tf.MixtralConfig(**_EXPERTS, num_local_experts=8),
    "qwen2-moe": lambda: tf.Qwen2MoeConfig(
        **_EXPERTS, num_experts=8, moe_intermediate_size=48, shared_expert_intermediate_size=96
    ),
}
WORK = {"batch_size": 2, "prompt_tokens": 9, "new_tokens": 3}
# How many GPUs, and how much of what lies between streaming everything and keeping everything each of them has.
SETTINGS = ((1, 0.0), (1, 0.4), (1, 0.8), (2, 0.0), (2, 0.25), (2, 0.5))
RULES = Rules(cpu_experts=False, never_on_disk=True)
_CONTEXT_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Setting:
    """One model on one machine. room_bytes: what tensors may take on each GPU, the caller's inputs apart."""

    name: str
    gpus: int
    room_bytes: int
    plan: Plan


@functools.cache
def model_of(name: str) -> Any:
    """Return a loaded model with random weights and routers of zeros; products of slices differ where weights need a
    gradient.
    """
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval().requires_grad_(False)
    for path, parameter in model.named_parameters():
        if path.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight")):
            torch.nn.init.zeros_(parameter)
    return model


def prompt() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(3, 320, (WORK["batch_size"], WORK["prompt_tokens"]))


def reference(name: str, experts: str | None) -> Any:
    """Return a model to change, that runs the experts implementation given."""
    model = copy.deepcopy(model_of(name))
    if experts is not None:
        register()
        model.set_experts_implementation(experts)
    return model


@functools.cache
def plain(name: str, experts: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `generate` returns for the model on the CPU."""
    return generate(reference(name, experts), prompt())


def generate(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens, and the logits that each was chosen by, on the CPU; nothing is kept on the model's devices."""
    heard: list[torch.Tensor] = []
    hook = model.register_forward_hook(lambda module, args, out: heard.append(out.logits[:, -1].cpu()))
    mask = torch.ones_like(ids)
    try:
        out = model.generate(ids, attention_mask=mask, max_new_tokens=WORK["new_tokens"], do_sample=False)
    finally:
        hook.remove()
    return out.cpu(), torch.stack(heard)


def machine(gpus: int, capacity_bytes: int) -> Hardware:
    """Return GPUs whose context is small, beside a slow CPU behind slow links."""
    devices = [
        Device(
            name=f"cuda:{index}", kind="cuda", product="small", pool=f"cuda:{index}",
            flops_per_s={"default": 10**12}, bytes_per_s=100 * GB, operator_ns=2000, context_bytes=_CONTEXT_BYTES,
            workspace_bytes=0,
        )
        for index in range(gpus)
    ]  # fmt: skip
    host = Device(
        name="cpu", kind="cpu", product="slow", pool="cpu", flops_per_s={"default": 10**8}, bytes_per_s=GB // 10,
        operator_ns=10**6, context_bytes=0, workspace_bytes=0,
    )  # fmt: skip
    names = [device.name for device in devices]
    ways = [("disk", "cpu"), *((a, b) for a in ("cpu", *names) for b in ("cpu", *names) if a != b)]
    hardware = Hardware(
        devices=(*devices, host),
        pools=(
            *(MemoryPool(name=name, capacity_bytes=capacity_bytes, reserved_bytes=0) for name in names),
            MemoryPool(name="cpu", capacity_bytes=GB, reserved_bytes=0),
            MemoryPool(name="disk", capacity_bytes=GB, reserved_bytes=0),
        ),
        links=tuple(
            Link(source=a, target=b, bytes_per_s=GB // 10 if "cpu" in (a, b) else 10 * GB, latency_ns=1000)
            for a, b in ways
        ),
    )
    hardware.check()
    return hardware


def resident(name: str, choose: Callable[[int], int]) -> Plan:
    """Return a plan that keeps all of a model on three GPUs, layer i on number `choose(i)`."""
    plan = planner.plan_model(CONFIGS[name](), hardware=machine(3, GB), rules=RULES, weight_dtype="float32", **WORK)
    device = {layer.name: f"cuda:{choose(index)}" for index, layer in enumerate(plan.graph.layers)}
    return with_placements(
        plan, lambda p, group: dataclasses.replace(p, run_on=device[p.layer], home=device[p.layer], memory="device")
    )


@functools.cache
def settings(name: str) -> tuple[Setting, ...]:
    """Return a model with a plan for each of SETTINGS."""
    config = CONFIGS[name]()
    whole = planner.plan_model(config, hardware=machine(1, GB), rules=RULES, weight_dtype="float32", **WORK)
    away = streamed(whole, "cpu", resident_slices=0)
    least, most = (
        memory.planned_bytes(whole.graph, whole.hardware, plan.placements, plan.slots)["cuda:0"]
        for plan in (away, whole)
    )
    fixed = least.context + least.workspace
    found = []
    for gpus, fraction in SETTINGS:
        capacity = int(least.total + fraction * (most.total - least.total))
        plan = planner.plan_model(config, hardware=machine(gpus, capacity), rules=RULES, weight_dtype="float32", **WORK)
        found.append(Setting(name, gpus, capacity - fixed, plan))
    return tuple(found)

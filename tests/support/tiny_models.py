"""Tiny models with their checkpoints, and plans that force a kind of placement. For tests only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, Qwen3MoeConfig

import planner
from planner import memory
from planner.plan import Placement, Plan, Slots

SHAPE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE, num_hidden_layers=5),
    "tied-llama": lambda: LlamaConfig(**SHAPE, num_hidden_layers=3, tie_word_embeddings=True),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_hidden_layers=3, num_local_experts=8, num_experts_per_tok=2),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **SHAPE, num_hidden_layers=3, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16
    ),
    "gpt2": lambda: GPT2Config(vocab_size=320, n_embd=64, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2),
}
WORK = {"batch_size": 2, "prompt_tokens": 13, "new_tokens": 6}


@dataclasses.dataclass
class Case:
    """A loaded reference model, its config and the folder that `save_pretrained` wrote."""

    config: Any
    reference: Any
    folder: Path
    dtype: torch.dtype
    ids: torch.Tensor

    def meta(self) -> Any:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config, dtype=self.dtype).eval()

    def loaded(self) -> Any:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(self.config, dtype=self.dtype).eval()

    def plan(self, **options: Any) -> Plan:
        return planner.plan_model(self.config, weight_dtype=str(self.dtype).removeprefix("torch."), **WORK, **options)

    def run_like(self, plan: Plan) -> None:
        """Give the reference the implementations that the plan names, so that results may be compared bit by bit."""
        if plan.execution.experts is not None:
            from planner.execution import register

            register()
            self.reference.set_experts_implementation(plan.execution.experts)

    def logits(self, model: Any) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = model(self.ids, attention_mask=torch.ones_like(self.ids)).logits
        return result

    def generate(self, model: Any) -> torch.Tensor:
        mask = torch.ones_like(self.ids)
        result: torch.Tensor = model.generate(
            self.ids, attention_mask=mask, max_new_tokens=WORK["new_tokens"], do_sample=False, pad_token_id=0
        )
        return result


def build_case(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Case:
    """Build the tiny model called `name`, and save it to `folder` in several shards."""
    config = CONFIGS[name]()
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    reference.save_pretrained(folder, max_shard_size="100KB")
    torch.manual_seed(1)
    ids = torch.randint(3, 320, (WORK["batch_size"], WORK["prompt_tokens"]))
    return Case(config, reference, folder, dtype, ids)


def with_placements(plan: Plan, change: Callable[[Placement, Any], Placement]) -> Plan:
    """Return the plan with its placements changed, its slots and prediction made to fit, still verified."""
    placements = tuple(change(p, group) for p, group in memory.with_groups(plan.graph, plan.placements))
    slots = memory.needed_slots(plan.graph, plan.hardware, placements)
    changed = dataclasses.replace(plan, placements=placements, slots=slots, prediction=None, solver=None)
    waits = any(p.home != p.run_on for p in placements if p.resident_slices is not None)
    if waits:
        execution = dataclasses.replace(plan.execution, experts="loadplan_routed")
        changed = dataclasses.replace(changed, execution=execution)
    assert planner.verify_plan(changed) == ()
    return changed


def streamed(plan: Plan, home: str, *, resident_slices: int = 3) -> Plan:
    """Return the plan with every group that may wait waiting at `home`."""

    def change(p: Placement, group: Any) -> Placement:
        if not group.streamable:
            return p
        kept = None if p.resident_slices is None else resident_slices
        kind: Any = "disk" if home == "disk" else "pageable" if p.run_on == "cpu" else "pinned"
        return dataclasses.replace(p, home=home, memory=kind, resident_slices=kept)

    return with_placements(plan, change)


def experts_away(plan: Plan, *, limit: int, kept: int = 1, count: int = 2) -> Plan:
    """Return the plan with all but `kept` experts of each layer waiting, computed by the CPU in calls up to `limit`."""

    def change(p: Placement, group: Any) -> Placement:
        if p.resident_slices is None:
            return p
        return dataclasses.replace(p, home="cpu", memory="pinned", resident_slices=kept, cpu_up_to_tokens=limit)

    away = with_placements(plan, change)
    # Slots whatever the planner thinks is needed.
    size = max(
        group.slice_slab_bytes for _, group in memory.with_groups(plan.graph, away.placements) if group.slices > 1
    )
    return dataclasses.replace(
        away, slots=(Slots(device="cuda:0", count=count, slot_bytes=size, holds="experts"),) if count else ()
    )


def on_cpu(plan: Plan) -> dict[str, str]:
    """Return devices that let the CPU play every GPU of a plan: the same code, no accelerator."""
    return {device.name: "cpu" for device in plan.hardware.gpus}


def spread_over_two(plan: Plan) -> Plan:
    """Return the plan with its layers alternating between cuda:0 and cuda:1."""
    device = {layer.name: f"cuda:{index % 2}" for index, layer in enumerate(plan.graph.layers)}

    def change(p: Placement, group: Any) -> Placement:
        here = device[p.layer]
        stays = p.home == p.run_on
        return dataclasses.replace(
            p, run_on=here, home=here if stays else p.home, memory="device" if stays else p.memory
        )

    return with_placements(plan, change)


def with_slots(plan: Plan, count: int) -> Plan:
    """Return the plan with so many slots of every kind on every device that has any."""
    return dataclasses.replace(plan, slots=tuple(dataclasses.replace(entry, count=count) for entry in plan.slots))

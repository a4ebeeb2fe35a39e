"""What dispatch costs a resident model per call, in ns of the host's time.

python benchmarks/overhead.py [--json]

On one device no module has a hook, so there is nothing to time: their number is the answer. Over several devices layers
whose inputs may move have one, which looks where its arguments are. Its cost is that of calling a module which does
nothing, handed what a decoder layer is handed, with the hook and without, in the thread's own processor time.
"""

from __future__ import annotations

import argparse
import json
import time
import timeit
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import dispatch
import planner
from dispatch import hooks
from dispatch.mover import mover
from machine import describe

CALLS, ROUNDS = 5000, 25
CONFIG = LlamaConfig(
    vocab_size=320, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


class Nothing(torch.nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> None:
        return None


def arguments(model: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a decoder layer is handed in a decode step."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = model.model.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: found.append((args, kwargs)), with_kwargs=True
    )
    model.generate(torch.ones(1, 8, dtype=torch.long), max_new_tokens=3, do_sample=False, pad_token_id=0)
    handle.remove()
    return found[-1]


def call_ns(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    taken = timeit.repeat(lambda: module(*args, **kwargs), number=CALLS, repeat=ROUNDS, timer=time.thread_time)
    return min(taken) / CALLS * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    wanted = parser.parse_args()
    model = AutoModelForCausalLM.from_config(CONFIG).eval()
    plan = planner.plan_model(CONFIG, gpus=0, weight_dtype="float32", prompt_tokens=8, new_tokens=3, use_cache=False)
    model = dispatch.apply(model, plan)
    hooked = sum("forward" in vars(module) for module in model.modules())
    args, kwargs = arguments(model)
    plain = call_ns(Nothing(), args, kwargs)
    with_hook = Nothing()
    hooks.attach(with_hook, before=mover(torch.device("cpu"), {}))
    layer_ns = call_ns(with_hook, args, kwargs) - plain
    modules = sum(1 for _ in model.model.layers[1].modules())
    found = {
        "one_device": {"modules": sum(1 for _ in model.modules()), "modules_with_hooks": hooked},
        "several_devices": {
            "ns_per_layer": round(layer_ns), "modules_per_layer": modules, "ns_per_module": round(layer_ns / modules),
        },
    }  # fmt: skip
    if wanted.json:
        print(json.dumps({"machine": describe(), **found}, indent=2))
        return
    one, several = found["one_device"], found["several_devices"]
    print(f"one device: {one['modules_with_hooks']} of {one['modules']} modules have hooks")
    print(f"several devices: {several['ns_per_layer']} ns a layer, {several['ns_per_module']} ns a module")


if __name__ == "__main__":
    main()

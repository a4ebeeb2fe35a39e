"""A model of which half waits on disk, run on the CPU: Loadplan beside Accelerate, same files, outputs compared.

    pip install accelerate && python benchmarks/host_disk.py [--layers 16] [--steps 8]

Both get the same share of the weights in memory. Accelerate copies what waits on disk into a folder of its own first;
its loading time contains that. The page cache is warm for both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers

import dispatch
import planner
from machine import describe

PROMPT_TOKENS = 32


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def decode(model: Any, steps: int) -> tuple[torch.Tensor, list[float]]:
    """Return the logits of the last step and the seconds of each decode step after the prefill."""
    tokens = torch.arange(PROMPT_TOKENS)[None] + 5
    times = []
    with torch.no_grad():
        out = model(tokens, use_cache=True)
        for _ in range(steps):
            token = out.logits[:, -1:].argmax(-1)
            out, seconds = timed(lambda out=out, token=token: model(token, past_key_values=out.past_key_values))
            times.append(seconds)
    return out.logits, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=options.layers,
        num_attention_heads=16, num_key_value_heads=8, dtype="bfloat16",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        plain.save_pretrained(folder / "model")
        weight_bytes = sum(p.numel() * p.element_size() for p in plain.parameters())
        del plain
        plain, load = timed(lambda: transformers.AutoModelForCausalLM.from_pretrained(folder / "model"))
        want, resident_times = decode(plain.eval(), options.steps)
        del plain
        result = {
            "resident": {"load_s": round(load, 3), "decode_s": round(statistics.median(resident_times), 4)},
            "loadplan": ours(folder, weight_bytes, options.steps, want),
            "accelerate": theirs(folder, weight_bytes, options.steps, want, config),
        }
    head = {"benchmark": "host_disk", "weight_bytes": weight_bytes}
    print(json.dumps({**head, **result, "machine": describe()}, indent=1))


def ours(folder: Path, weight_bytes: int, steps: int, want: torch.Tensor) -> dict[str, object]:
    size = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": steps + 1, "weight_dtype": "bfloat16", "use_cache": False}
    whole = planner.plan_model(str(folder / "model"), gpus=0, **size)
    cap = whole.prediction.peak_bytes["cpu"] - weight_bytes // 2
    plan = planner.plan_model(str(folder / "model"), gpus=0, max_memory={"cpu": cap}, **size)
    model, load = timed(lambda: dispatch.apply(str(folder / "model"), plan))
    logits, times = decode(model, steps)
    on_disk = sum(p.nbytes for p in plan.placements if p.home == "disk")
    return report(load, times, torch.equal(logits, want), on_disk)


def theirs(folder: Path, weight_bytes: int, steps: int, want: torch.Tensor, config: Any) -> dict[str, object]:
    with accelerate.init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.tie_weights()
    device_map = accelerate.infer_auto_device_map(
        model, max_memory={"cpu": weight_bytes // 2}, no_split_module_classes=model._no_split_modules
    )
    model, load = timed(
        lambda: accelerate.load_checkpoint_and_dispatch(
            model, str(folder / "model"), device_map=device_map, offload_folder=str(folder / "offload"),
            no_split_module_classes=model._no_split_modules, dtype=torch.bfloat16, force_hooks=True,
        )
    )  # fmt: skip
    on_disk = sum(path.stat().st_size for path in (folder / "offload").glob("*"))
    logits, times = decode(model, steps)
    return report(load, times, torch.equal(logits, want), on_disk)


def report(load: float, times: list[float], same: bool, on_disk: int) -> dict[str, object]:
    return {
        "load_s": round(load, 3),
        "decode_s": round(statistics.median(times), 4),
        "same_bits_as_resident": same,
        "bytes_waiting_on_disk": on_disk,
    }


if __name__ == "__main__":
    main()

"""How long simulations take, and how far steps that are left out are from simulating every one.

python benchmarks/simulator.py [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import planner
import simulate
from machine import describe
from simulate import series

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("70B, 80 layers, offloaded, 10,000 steps", "meta-llama/Llama-3.1-70B", {"gpus": "2x24GB", "new_tokens": 10_001}),
    ("Mixtral, 10,000 steps", "mistralai/Mixtral-8x7B", {"gpus": "2x24GB", "new_tokens": 10_001}),
    ("Mixtral, 128 tokens", "mistralai/Mixtral-8x7B", {"gpus": "2x24GB"}),
    ("GPT-2, 1,000 steps, every one", "gpt2", {"gpus": "650MB", "new_tokens": 1001, "prompt_tokens": 16}),
]
RUNS = 5


def timed(plan: planner.Plan, **options: Any) -> tuple[simulate.Timeline, float]:
    found = []
    for _ in range(RUNS):
        started = time.perf_counter()
        timeline = simulate.run(plan, **options)
        found.append(time.perf_counter() - started)
    return timeline, statistics.median(found)


def row(name: str, model: str, options: dict[str, Any]) -> dict[str, Any]:
    plan = planner.plan_model(model, use_cache=False, **options)
    timeline, seconds = timed(plan)
    result = {
        "case": name, "seconds": round(seconds, 3), "steps": plan.workload.decode_steps,
        "total_s": round(timeline.total_ns / 1e9, 4),
    }  # fmt: skip
    drawn, drawn_seconds = timed(plan, seed=0)
    if drawn != timeline:
        result |= {"drawn_seconds": round(drawn_seconds, 3), "drawn_total_s": round(drawn.total_ns / 1e9, 4)}
    if name.endswith("every one"):
        kept, series.STEPS_AT_EACH_END = series.STEPS_AT_EACH_END, plan.workload.decode_steps
        started = time.perf_counter()
        whole = simulate.run(plan)
        result |= {
            "every_step_seconds": round(time.perf_counter() - started, 3),
            "left_out_error": round(abs(timeline.total_ns / whole.total_ns - 1), 7),
            "left_out_worst_step": round(
                max(abs(a / b - 1) for a, b in zip(timeline.step_ns, whole.step_ns, strict=True)), 7
            ),
        }
        series.STEPS_AT_EACH_END = kept
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [row(*case) for case in CASES]
    if options.json:
        print(json.dumps({"machine": describe(), "rows": rows}, indent=1))
        return
    for entry in rows:
        print("  ".join(f"{key} {value}" for key, value in entry.items()))


if __name__ == "__main__":
    main()

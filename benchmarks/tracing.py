"""How long every model of the catalogue takes to build on meta and to trace, imports apart, and the memory of that.

python benchmarks/tracing.py [--only NAME ...]

Each model is built and traced in one process, as `plan --gpus 1x24GB` would: a prompt of 512 tokens and 128 new ones.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
import time

from machine import describe
from planner import execution
from planner.given import build_on_meta, source_of
from planner.models import catalogue
from planner.tracer import allocator_bytes, tracing_for
from planner.workload import Workload


def measured(name: str) -> dict[str, object]:
    source, _ = source_of(name, hub=False, revision=None, trust_remote_code=False)
    started = time.perf_counter()
    model = build_on_meta(source, "bfloat16")
    built = time.perf_counter()
    experts = execution.GROUPED_EXPERTS if execution.experts_modules(model) else None
    tracing = tracing_for(model, Workload(), gpu="rtx4090", experts=experts)
    graph = tracing.graph(allocator_bytes=allocator_bytes(tracing))
    traced = time.perf_counter()
    return {
        "model": name,
        "layers": len(graph.layers),
        "build_s": round(built - started, 3),
        "trace_s": round(traced - built, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    names = parser.parse_args().only or [entry.id for entry in catalogue()]
    measured("openai-community/gpt2")  # what torch and transformers import late is not the models'
    gc.disable()
    rows = []
    for name in names:
        rows.append(measured(name))
        print(f"{name:44} build {rows[-1]['build_s']:6} s  trace {rows[-1]['trace_s']:6} s", file=sys.stderr)
        gc.collect()
    result = {
        "benchmark": "tracing",
        "models": len(rows),
        "most_trace_s": max(rows, key=lambda row: row["trace_s"]),  # type: ignore[arg-type,return-value]
        "traced_within_2_s": sum(row["trace_s"] <= 2 for row in rows),  # type: ignore[operator]
        "peak_resident_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000,
        "rows": rows,
        "machine": describe(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

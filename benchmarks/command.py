"""Whole-process times of the Mixtral command: nothing cached, the answer cached, and only the trace cached.

python benchmarks/command.py [--runs 5]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe

MODEL = ["--model", "mistralai/Mixtral-8x7B"]


def seconds(arguments: list[str], cache: str) -> float:
    command = [str(Path(sys.executable).with_name("plan")), *arguments]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "LOADPLAN_CACHE": cache})
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    times: dict[str, list[float]] = {"nothing cached": [], "trace cached": [], "answer cached": []}
    for _ in range(runs):
        cache = tempfile.mkdtemp()
        times["nothing cached"].append(seconds([*MODEL, "--gpus", "2x24GB"], cache))
        times["trace cached"].append(seconds([*MODEL, "--gpus", "2x24GB", "--ram", "96GB"], cache))
        times["answer cached"].append(seconds([*MODEL, "--gpus", "2x24GB"], cache))
        shutil.rmtree(cache)
    result = {
        name: {"median_s": round(statistics.median(t), 3), "min_s": round(min(t), 3), "max_s": round(max(t), 3)}
        for name, t in times.items()
    }
    print(json.dumps({"benchmark": "command", "runs": runs, **result, "machine": describe()}, indent=1))


if __name__ == "__main__":
    main()

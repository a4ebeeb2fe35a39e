"""What a calibrated machine is predicted to take, beside what it then takes: small models, in memory and half on disk.

    python benchmarks/validation_calibrated.py [--hardware here.json] [--folder DIR] [--json]

Every row is predicted before anything of it is run. Models have random weights. "warm": the page cache holds the files;
"cold": it is emptied before every pass, as where memory is too short to keep them. Times are means over
passes of `generate`, one sequence, greedy, as those of calibration are.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import dispatch
import planner
from machine import describe
from planner import Hardware, Plan
from simulate.calibration import calibrate

PROMPT_TOKENS, NEW_TOKENS = 256, 9
CALLS = {"memory": 6, "warm": 6, "cold": 2}
DTYPES = ("bfloat16", "float32")
SHAPES: dict[str, Callable[[str], Any]] = {
    "llama": lambda dtype: transformers.LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=8, dtype=dtype,
    ),
    "gpt2": lambda dtype: transformers.GPT2Config(n_embd=1024, n_layer=12, n_head=16, dtype=dtype),
    "mixtral": lambda dtype: transformers.MixtralConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12,
        num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2, dtype=dtype,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure, predicted and then measured; error: predicted / measured - 1."""

    id: str
    metric: str
    predicted: int
    measured: int
    error: float
    kind: str = "calibrated"


def rows(hardware: Hardware | None = None, *, folder: str | Path | None = None) -> Iterator[Row]:
    """Yield every row; the machine is calibrated first where it is not given."""
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(dir=folder, prefix="validation.") as name:
        if hardware is None:
            hardware = calibrate(folder=name).hardware
        for (shape, config), dtype in itertools.product(SHAPES.items(), DTYPES):
            path = Path(name) / f"{shape}-{dtype}"
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config(dtype), dtype=getattr(torch, dtype))
            model.save_pretrained(path)
            del model
            plans = predicted(str(path), hardware)
            for where, plan in plans.items():
                yield from _rows(f"{shape} {dtype} {where}", where, plan, path)
            for file in path.iterdir():
                file.unlink()


def predicted(path: str, hardware: Hardware) -> dict[str, Plan]:
    """Return plans with their predictions: all in memory, and half on disk with a warm and with a cold page cache."""
    asked: dict[str, Any] = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "batch_size": 1}
    memory = planner.plan_model(path, hardware=hardware, **asked)
    assert memory.prediction is not None
    cap = {"cpu": memory.prediction.peak_bytes["cpu"] - memory.graph.weight_bytes // 2}
    return {
        "memory": memory,
        "warm": planner.plan_model(path, hardware=hardware.with_page_cache(), max_memory=cap, **asked),
        "cold": planner.plan_model(path, hardware=hardware, max_memory=cap, **asked),
    }


def _rows(name: str, where: str, plan: Plan, path: Path) -> Iterator[Row]:
    model = dispatch.apply(str(path), plan)
    forget = (lambda: drop(path)) if where == "cold" else None
    prefill, decode = measured(model, calls=CALLS[where], before_each_pass=forget)
    assert plan.prediction is not None
    for metric, said, took in (
        ("prefill_ns", plan.prediction.prefill_ns, prefill),
        ("decode_ns_per_token", plan.prediction.decode_ns_per_token, decode),
    ):
        yield Row(id=name, metric=metric, predicted=said, measured=took, error=round(said / took - 1, 4))


class Stamps(transformers.StoppingCriteria):  # type: ignore[misc]
    """Notes when each token is there, and when the next pass begins."""

    def __init__(self, before_each_pass: Callable[[], None] | None):
        self.before, self.times = before_each_pass, [self._begin(before_each_pass)]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        done = time.perf_counter()
        begun, _ = self.times[-1]
        self.times[-1] = begun, done
        self.times.append(self._begin(self.before))
        return torch.zeros(len(input_ids), dtype=torch.bool)

    @staticmethod
    def _begin(before: Callable[[], None] | None) -> tuple[float, float]:
        if before is not None:
            before()
        return time.perf_counter(), 0.0


def measured(model: Any, *, calls: int, before_each_pass: Callable[[], None] | None = None) -> tuple[int, int]:
    """Return the times of a prefill and of a decode step, in ns: means, as calibration takes them. The first call
    warms up.
    """
    prefills, steps = [], []
    prompt = torch.randint(5, 30000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    asked = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    for number in range(calls + 1):
        stamps = Stamps(before_each_pass)
        model.generate(prompt, stopping_criteria=[stamps], **asked)
        if number:
            first, *later = [done - begun for begun, done in stamps.times[:-1]]
            prefills.append(first)
            steps += later
    return round(statistics.fmean(prefills) * 1e9), round(statistics.fmean(steps) * 1e9)


def drop(folder: Path) -> None:
    """Let go of this process's mapped pages of the files in `folder`, and let the page cache forget them."""
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, _, path = line.partition(" ")
        if str(folder.resolve()) in path:
            start, end = (int(part, 16) for part in span.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def summary_of(found: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return the median and the worst error of all rows, and of those whose files are cold, dense models apart."""
    groups: dict[str, list[float]] = {"all": [abs(row.error) for row in found]}
    for row in found:
        shape, _, where = row.id.split()
        kind = "Mixtral-shaped" if shape == "mixtral" else "dense"
        name = f"{kind}, {'cold' if where == 'cold' else 'in memory or warm'}"
        groups.setdefault(name, []).append(abs(row.error))
    return {
        name: {"median": round(statistics.median(errors), 4), "worst": max(errors), "rows": len(errors)}
        for name, errors in groups.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hardware", metavar="FILE", help="what plan calibrate wrote; measured anew where left out")
    parser.add_argument("--folder", metavar="DIR", help="where models are written; its disk is what is measured")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    hardware = None if options.hardware is None else Hardware.load(options.hardware)
    found = []
    for row in rows(hardware, folder=options.folder):
        found.append(row)
        if not options.json:
            figures = f"{row.predicted / 1e6:9.1f} ms  {row.measured / 1e6:9.1f} ms"
            print(f"{row.id:26} {row.metric:20} {figures}  {row.error:+.1%}", flush=True)
    summary = summary_of(found)
    if options.json:
        print(json.dumps({"rows": [asdict(row) for row in found], "summary": summary, "machine": describe()}, indent=1))
    else:
        for name, each in summary.items():
            print(f"{name}: median error {each['median']:.1%}, worst {each['worst']:.1%}, of {each['rows']} figures")


if __name__ == "__main__":
    main()

"""Predicted peaks of loading against the kernel's own count of resident memory, for checkpoints of 130 to 270 MB."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import planner
from planner import loading
from planner.plan import Plan
from planner.units import MIB
from tiny_models import CONFIGS, WORK, streamed

WIDE: dict[str, Any] = {
    "vocab_size": 8000, "hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8
}  # fmt: skip
MEDIUM = {
    "llama": lambda: LlamaConfig(**WIDE, intermediate_size=2816, num_hidden_layers=4),
    "mixtral": lambda: MixtralConfig(
        **WIDE, intermediate_size=1024, num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=2
    ),
}
# Model, dtype that it is stored in, where it goes, whether it is loaded already. All run in bfloat16.
CASES = [
    ("llama", "bfloat16", "cpu", False),
    ("llama", "float32", "cpu", False),
    ("llama", "bfloat16", "gpu", False),
    ("llama", "float32", "gpu", False),
    ("llama", "float32", "from host", False),
    ("llama", "bfloat16", "from disk", False),
    ("llama", "bfloat16", "from host", True),
    ("llama", "bfloat16", "gpu", True),
    ("mixtral", "bfloat16", "cpu", False),
    ("mixtral", "float32", "from host", False),
    ("mixtral", "float32", "gpu", False),
    ("mixtral", "bfloat16", "disk", False),
]
# The heap's small blocks, torch's own state of new threads, and headers: what the prediction leaves out.
SLACK_BYTES = 2 * MIB
# What is asked for and touched only in part while loading: buffers longer than most reads, and slots for experts.
PARTLY_TOUCHED = {("llama", "bfloat16", "gpu"), ("llama", "bfloat16", "from disk"), ("mixtral", "bfloat16", "disk"),
                  ("mixtral", "float32", "gpu"), ("mixtral", "float32", "from host")}  # fmt: skip


def plan_for(folder: Path, mode: str) -> Plan:
    options: dict[str, Any] = {**WORK, "weight_dtype": "bfloat16"}
    if mode in ("cpu", "disk"):
        plan = planner.plan_model(str(folder), gpus=0, **options)
        if mode == "cpu":
            return plan
        assert plan.prediction is not None
        cap = plan.prediction.peak_bytes["cpu"] - plan.model.weight_bytes // 2
        return planner.plan_model(str(folder), gpus=0, max_memory={"cpu": cap}, **options)
    one = planner.plan_model(str(folder), gpus="1x24GB", **options)
    return one if mode == "gpu" else streamed(one, {"from host": "cpu", "from disk": "disk"}[mode])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Plan, int]]:
    """Return each case's plan and what loading by it took, all measured in one process of their own."""
    root = tmp_path_factory.mktemp("medium")
    folders: dict[tuple[str, str], Path] = {}
    plans, told = [], []

    def add(name: str, config: Any, stored: str, mode: str, *, loaded: bool, tiny: bool) -> None:
        if (name, stored) not in folders:
            folder = folders[name, stored] = root / f"{name}-{stored}"
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, stored))
            model.save_pretrained(folder, max_shard_size="60MB")
        folder = folders[name, stored]
        plan = plan_for(folder, mode)
        if loaded:  # as `plan_model` says of a model that is given
            plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, loaded=True))
        path = root / f"{len(told)}.json"
        path.write_text(dataclasses.replace(plan, prediction=None, solver=None).to_json())
        plans.append(plan)
        # The readers' buffers are full together in most loads, not in all.
        repeats = 1 if loaded else 5
        told.append({"folder": str(folder), "plan": str(path), "loaded": loaded, "tiny": tiny, "repeats": repeats})

    add("tiny", CONFIGS["mixtral"](), "float32", "cpu", loaded=False, tiny=True)
    add("tiny", CONFIGS["mixtral"](), "float32", "gpu", loaded=True, tiny=True)
    for name, stored, mode, loaded in CASES:
        add(name, MEDIUM[name](), stored, mode, loaded=loaded, tiny=False)
    (root / "cases.json").write_text(json.dumps(told))
    here = Path(__file__).parents[1]
    # Every block of memory of its own, given back when it is freed: the allocator keeps nothing for later.
    env = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": f"{here.parent}{os.pathsep}{here / 'support'}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(here / "support" / "load_once.py"), str(root / "cases.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return list(zip(plans[2:], found, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark of resident memory is Linux's")
@pytest.mark.parametrize("index", range(len(CASES)), ids=[" ".join(map(str, case)) for case in CASES])
def test_the_kernel_counts_what_is_predicted(measured: list[tuple[Plan, int]], index: int) -> None:
    plan, resident = measured[index]
    usage = loading.load_peak(plan)["cpu"]
    print(f"{CASES[index]}: predicted {usage.total:,}, resident {resident:,}, {resident / usage.total - 1:+.2%}")
    least = usage.weights if CASES[index][:3] in PARTLY_TOUCHED else usage.total
    assert least - SLACK_BYTES <= resident <= usage.total + SLACK_BYTES

"""Loads checkpoints by plans in a process of its own, and prints the most that the kernel says any load took:
`python load_once.py CASES.json`, a list of {"folder", "plan", "loaded", "tiny", "repeats"}. Imports nothing that
predicts.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from load_meter import resident_peak
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import dispatch
from planner.plan import Plan


def model_for(folder: str, plan: Plan, *, loaded: bool) -> Any:
    dtype = getattr(torch, plan.model.weight_dtype)
    with torch.device("cpu" if loaded else "meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype).eval()


def load(case: dict[str, Any]) -> int:
    """Return the most bytes that were resident above the start; a loaded model's own are made inside."""
    gc.collect()
    plan = Plan.load(case["plan"])
    devices = {device.name: "meta" for device in plan.hardware.gpus}
    model = None if case["loaded"] else model_for(case["folder"], plan, loaded=False)
    with resident_peak() as peak:
        if model is None:
            model = model_for(case["folder"], plan, loaded=True)
            dispatch.apply(model, plan, devices=devices)
        else:
            dispatch.apply(model, plan, checkpoint=case["folder"], devices=devices)
    return peak.bytes


def main() -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    found = []
    for case in json.loads(Path(sys.argv[1]).read_text()):
        if case["tiny"]:  # what is imported and built once is not what loading takes
            load(case)
        else:
            found.append(max(load(case) for _ in range(case["repeats"])))
    print(json.dumps(found))


if __name__ == "__main__":
    main()

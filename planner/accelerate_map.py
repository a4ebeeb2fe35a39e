"""The device map that Accelerate makes itself for a model on a machine, where Accelerate is installed."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from typing import Any

from planner.errors import InputError
from planner.hardware import Hardware


def auto_map(model: Any, hardware: Hardware) -> dict[str, int | str]:
    """Return what `device_map="auto"` makes of a model (on meta will do), told the usable capacities as `max_memory`.

    It counts weights alone: what else a device holds has no room but what it leaves to balance GPUs.

    Raises:
        InputError: Accelerate is not installed, or the machine has several nodes, which it does not know.
    """
    if len(hardware.nodes) > 1:
        raise InputError("Accelerate's own map is for one machine, and this one has several nodes")
    try:
        modeling = importlib.import_module("accelerate.utils.modeling")
    except ImportError as exc:
        raise InputError("Accelerate's own map needs Accelerate: pip install accelerate, or give --device-map") from exc
    whole = sorted(getattr(model, "_no_split_modules", None) or [])
    caps: dict[int | str, int] = {
        number: hardware.pool(gpu.pool).usable_bytes for number, gpu in enumerate(hardware.gpus)
    }
    caps["cpu"] = hardware.pool(hardware.hosts[0].pool).usable_bytes
    with quiet():
        if hasattr(model, "tie_weights"):
            model.tie_weights()
        balanced = modeling.get_balanced_memory(model, max_memory=caps, no_split_module_classes=whole)
        return dict(modeling.infer_auto_device_map(model, max_memory=balanced, no_split_module_classes=whole))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Accelerate from telling of every GPU that this machine has none."""
    logger = logging.getLogger("accelerate.utils.modeling")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)

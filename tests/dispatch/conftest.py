from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from tiny_models import Case, build_case


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture
def make_case(tmp_path: Path) -> Callable[..., Case]:
    def make(name: str, dtype: torch.dtype = torch.float32) -> Case:
        return build_case(name, tmp_path / "checkpoint", dtype)

    return make

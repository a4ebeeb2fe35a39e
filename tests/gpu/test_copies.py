"""Copies and pickles of models whose weights wait for a GPU that is one."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import dispatch
from dispatch.stores import HostStore
from tiny_models import build_case, streamed


def slabs(model: Any) -> list[torch.Tensor]:
    stores = [pair[1].store for each in model.modules() if (pair := vars(each).get("_loadplan_group"))]
    return [store.slab for store in stores if isinstance(store, HostStore)]


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_copies_wait_in_pinned_memory_of_their_own(home: str, tmp_path: Path) -> None:
    case = build_case("llama", tmp_path / "checkpoint")
    model: Any = dispatch.apply(case.meta(), streamed(case.plan(gpus="1x24GB"), home), checkpoint=case.folder)
    ids = case.ids.to("cuda:0")
    with torch.no_grad():
        expected = model(ids).logits
        # Its copies to the GPU are under way while it is copied.
        for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(slab.is_pinned() for slab in slabs(made))
            assert not {slab.data_ptr() for slab in slabs(made)} & {slab.data_ptr() for slab in slabs(model)}
            assert torch.equal(made(ids).logits, expected)
            assert torch.equal(model(ids).logits, expected)
        part = copy.deepcopy(model.model.layers[1].mlp)
        states = torch.rand(1, 3, 64)
        torch.testing.assert_close(part.to("cpu")(states), case.reference.model.layers[1].mlp(states))

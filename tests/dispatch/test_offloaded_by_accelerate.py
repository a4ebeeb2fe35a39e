"""Models that `from_pretrained(device_map=...)` let Accelerate offload: what is refused, and what works instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import dispatch
import planner
from planner.errors import InputError

accelerate = pytest.importorskip("accelerate")

PLAYED = {"cuda:0": "cpu"}
PLACES = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
    "model.rotary_emb": "cpu", "lm_head": "disk",
}  # fmt: skip
IDS = torch.tensor([[1, 2, 39]])
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def plain(tmp_path: Path) -> Any:
    """Return a model whose checkpoint is in tmp_path / "model"."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    return model


def theirs(folder: Path, places: dict[str, Any] = PLACES) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=dict(places), offload_folder=folder / "offloaded"
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


MEETS: dict[str, Callable[[Any, Path], Any]] = {
    "dispatch_model": lambda model, folder: dispatch.dispatch_model(model, PLACES, 0, devices=PLAYED),
    "cpu_offload": lambda model, folder: dispatch.cpu_offload(model, 0, devices=PLAYED),
    "disk_offload": lambda model, folder: dispatch.disk_offload(model, folder / "new", 0, devices=PLAYED),
    "cpu_offload_with_hook": lambda model, folder: dispatch.cpu_offload_with_hook(model, "cpu"),
    "remove_hook_from_submodules": lambda model, folder: dispatch.remove_hook_from_submodules(model),
    "align_module_device": lambda model, folder: dispatch.align_module_device(model.lm_head, "cpu").__enter__(),
    "load_checkpoint_in_model": lambda model, folder: dispatch.load_checkpoint_in_model(model, folder / "model"),
    "load_checkpoint_and_dispatch": lambda model, folder: dispatch.load_checkpoint_and_dispatch(
        model, folder / "model", {"": "cpu"}
    ),
    "apply": lambda model, folder: dispatch.apply(
        model, planner.plan_from_device_map(str(folder / "model"), PLACES, gpus=0)
    ),
    "plan_from_device_map": lambda model, folder: planner.plan_from_device_map(model, PLACES, gpus="24GB"),
    "plan_model": lambda model, folder: planner.plan_model(model, gpus="24GB"),
}  # fmt: skip


def test_what_meets_such_a_model_says_what_to_do(plain: Any, tmp_path: Path) -> None:
    model = theirs(tmp_path)
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    for name, meets in MEETS.items():
        with pytest.raises(InputError, match="offloaded by Accelerate, as from_pretrained"):
            print(name, meets(model, tmp_path))
    # It is theirs still.
    assert torch.equal(logits(model), logits(plain))
    assert dispatch.has_offloaded_params(model.lm_head)
    assert not dispatch.has_offloaded_params(model)


def test_its_map_goes_on(plain: Any, tmp_path: Path) -> None:
    places = theirs(tmp_path).hf_device_map
    plan = planner.plan_from_device_map(str(tmp_path / "model"), places, gpus=0)
    assert torch.equal(logits(dispatch.apply(str(tmp_path / "model"), plan)), logits(plain))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    dispatch.dispatch_model(model, places, 0, offload_dir=tmp_path / "new", devices=PLAYED)
    assert torch.equal(logits(model), logits(plain))
    with dispatch.init_empty_weights():
        empty = transformers.AutoModelForCausalLM.from_config(plain.config)
    dispatch.load_checkpoint_and_dispatch(empty, tmp_path / "model", places)
    assert torch.equal(logits(empty.eval()), logits(plain))


def test_a_model_without_their_hooks_is_taken_over(plain: Any, tmp_path: Path) -> None:
    # Without a disk all of it is in memory once the hooks are off.
    places = dict.fromkeys(PLACES, "cpu")
    for hooked in (theirs(tmp_path, {"": "cpu"}), accelerate.cpu_offload(theirs(tmp_path, places), "cpu")):
        accelerate.hooks.remove_hook_from_submodules(hooked)
        dispatch.dispatch_model(hooked, {"": "cpu"}, 0, devices=PLAYED)
        assert torch.equal(logits(hooked), logits(plain))

"""The state of dispatched models: what the plain model's is, where it waits; saved, and loaded into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain_modules import ZOO, rows, tensors_in
from torch import nn

import dispatch
from planner.errors import InputError

PLAYED = {"cuda:0": "cpu"}
pytestmark = pytest.mark.usefixtures("one_thread")


def places_of(name: str, *homes: Any) -> dict[str, Any]:
    return {block: homes[index % len(homes)] for index, block in enumerate(ZOO[name].blocks)}


def dispatched(name: str, folder: Path, *homes: Any, main: Any = 0) -> nn.Module:
    entry = ZOO[name]
    return dispatch.dispatch_model(
        entry.build(), places_of(name, *homes), main_device=main, offload_dir=folder,
        preload_module_classes=entry.preload, devices=PLAYED,
    )  # fmt: skip


@pytest.mark.parametrize("homes", [("cpu",), ("disk",), ("cpu", 0, "disk")])
@pytest.mark.parametrize("name", ["rooted", "tied", "uncalled", "convolved", "recurrent", "parametrized"])
def test_the_state_of_the_plain_module(
    name: str, homes: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ZOO[name].build().state_dict()
    model = dispatched(name, tmp_path, *homes)
    answer = tensors_in(ZOO[name].call(model, torch.device("cpu")))
    with monkeypatch.context() as patch:
        patch.setattr(dispatch.Checkpoint, "read_into", None)
        state = model.state_dict()
        whole = nn.ModuleDict({"inside": model}).state_dict()
    for found, prefix in ((state, ""), (whole, "inside.")):
        assert list(found) == [f"{prefix}{each}" for each in expected]
        assert all(torch.equal(found[f"{prefix}{each}"], tensor) for each, tensor in expected.items())
    for waiting in model.modules():
        pair: Any = vars(waiting).get("_loadplan_group")
        for each in (pair[1].names if pair else ()) if homes == ("cpu",) else ():
            views = pair[1].store.views()
            tied = [names for names in (("embed.weight", "head.weight"),) if each in names]
            assert state[each].data_ptr() == views[each].data_ptr() or tied
            assert state[each].untyped_storage().nbytes() == state[each].nbytes
    if name == "tied" and len(homes) == 1:
        assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    assert any(parameter.is_meta for parameter in model.parameters())
    assert all(
        torch.equal(a, b) for a, b in zip(answer, tensors_in(ZOO[name].call(model, torch.device("cpu"))), strict=True)
    )


@pytest.mark.parametrize("name", ["rooted", "tied", "shuffled", "nested"])
def test_values_are_loaded_to_where_they_wait(name: str, tmp_path: Path) -> None:
    model = dispatched(name, tmp_path, "cpu", 0)
    other = ZOO[name].build()
    with torch.no_grad():
        for number, parameter in enumerate(other.parameters()):
            parameter.mul_(-2).add_(number)
        for _ in range(2):
            ZOO[name].call(model, torch.device("cpu"))
        state = other.state_dict()
        if name == "tied":
            del state["head.weight"]
            assert model.load_state_dict(state, strict=False).missing_keys == []
        else:
            model.load_state_dict(state)
        found = tensors_in(ZOO[name].call(model, torch.device("cpu")))
        expected = tensors_in(ZOO[name].call(other, torch.device("cpu")))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_cannot_be_loaded_changes_nothing(tmp_path: Path) -> None:
    expected = ZOO["shuffled"].build().state_dict()
    for homes, main, change, error in (
        (("cpu", "disk"), 0, {}, InputError),
        (("cpu", "disk"), "cpu", {}, InputError),
        (("cpu",), 0, {"extra": torch.ones(1)}, RuntimeError),
    ):
        model = dispatched("shuffled", tmp_path, *homes, main=main)
        with pytest.raises(error):
            model.load_state_dict({name: torch.zeros_like(t) for name, t in expected.items()} | change)
        if error is InputError:
            assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())
        with pytest.raises(InputError, match="assign"):
            model.load_state_dict(expected, assign=True)
    partly = dispatched("shuffled", tmp_path, "cpu", "disk")
    partly.load_state_dict({"layers.0.bias": expected["layers.0.bias"] + 1}, strict=False)
    assert torch.equal(partly.state_dict()["layers.0.bias"], expected["layers.0.bias"] + 1)


def test_a_state_is_not_taken_in_the_middle_of_a_call(tmp_path: Path) -> None:
    model = dispatched("nested", tmp_path, "cpu")

    def ask(*_: Any) -> None:
        model.state_dict()

    # Its parents hold their weights in slots.
    handle = model.get_submodule("inner.inner").register_forward_hook(ask)
    with pytest.raises(InputError, match="in the middle of a call"), torch.no_grad():
        model(rows())
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(rows()), ZOO["nested"].build()(rows()))


@pytest.mark.parametrize(("name", "home"), [("tied-llama", "cpu"), ("llama", "disk"), ("mixtral", "cpu")])
def test_saving_a_dispatched_model(
    name: str, home: str, make_case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, modeling_utils

    case = make_case(name)
    model: Any = dispatch.load_checkpoint_and_dispatch(
        case.meta(), case.folder, {"": home, "model.norm": 0}, devices=PLAYED
    )
    known = {tensor.data_ptr() for tensor in model.state_dict().values()}
    save, shards = modeling_utils.safe_save_file, []

    def saved(tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
        # Nothing is gathered: what is handed over lies where it waits. Experts are taken apart shard by shard.
        shards.append(sum(t.nbytes for t in tensors.values()))
        if name != "mixtral" and home == "cpu":
            assert {t.data_ptr() for t in tensors.values()} <= known
        save(tensors, *args, **kwargs)

    monkeypatch.setattr(modeling_utils, "safe_save_file", saved)
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path / "saved", max_shard_size="300KB")
    assert len(shards) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=case.dtype)
    expected = case.reference.state_dict()
    assert all(torch.equal(t, expected[each]) for each, t in again.state_dict().items())
    assert torch.equal(case.logits(model), case.logits(case.reference))

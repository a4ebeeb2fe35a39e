"""Adapters on dispatched models: added, trained, loaded, merged and saved where weights wait."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_modules import WIDTH, ZOO, rows
from torch import nn

import dispatch
import simulate
from planner.errors import InputError
from simulate.virtual_machine import Machine
from tiny_models import on_cpu, streamed

PLAYED = {"cuda:0": "cpu"}
LAYERS = [f"model.layers.{index}" for index in range(5)]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT asks transformers by a name that transformers will not keep.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]


def place_map(home: str) -> dict[str, Any]:
    """Return a map of the tiny Llama: all waits at one place, or (mixed) layers in turn at every one."""
    homes = ["cpu", 0, "disk"] if home == "mixed" else [home]
    rest = dict.fromkeys(("model.embed_tokens", "lm_head"), homes[0])
    return {layer: homes[index % len(homes)] for index, layer in enumerate(LAYERS)} | rest | {"model.norm": 0}


def loaded(case: Any, home: str, devices: Any = PLAYED) -> Any:
    """Return the tiny Llama dispatched; mapped: wholly on disk, for the CPU."""
    places = {"": "disk"} if home == "mapped" else place_map(home)
    return dispatch.load_checkpoint_and_dispatch(case.meta(), case.folder, places, devices=devices)


def with_adapters(model: Any) -> Any:
    import peft

    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    return peft.get_peft_model(model, config)


def trained(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Take one step of plain descent; return the gradients."""
    model(ids, labels=ids).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= p.grad
    return found


@pytest.mark.parametrize("home", ["cpu", "disk", "mixed", "mapped"])
def test_added_trained_saved_and_merged(home: str, make_case: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    case = make_case("llama")
    reference = with_adapters(case.loaded())
    model = loaded(case, home)
    places = dict(model.hf_device_map)
    waits = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    with dispatch.weights_at_home(model):
        assert not any(parameter.is_meta for parameter in model.parameters())
        adapted = with_adapters(model)
    assert model.hf_device_map == places
    assert len([name for name, parameter in model.named_parameters() if parameter.is_meta]) == len(waits)
    expected = trained(reference, case.ids)
    found = trained(adapted, case.ids)
    assert expected
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert torch.equal(case.logits(adapted), case.logits(reference))
    assert {name: t.shape for name, t in adapted.state_dict().items()} == {
        name: t.shape for name, t in reference.state_dict().items()
    }

    # Another model gets what was saved.
    adapted.save_pretrained(tmp_path / "adapter")
    other = loaded(case, home)
    with dispatch.weights_at_home(other):
        again = peft.PeftModel.from_pretrained(other, tmp_path / "adapter")
    assert torch.equal(case.logits(again), case.logits(reference))

    plain = reference.merge_and_unload()
    if home in ("disk", "mixed"):
        with pytest.raises(InputError, match="waits in a file"), dispatch.weights_at_home(model):
            adapted.merge_and_unload()
        # Some layers are merged, the others have their adapters.
        torch.testing.assert_close(case.logits(adapted), case.logits(plain), rtol=1e-4, atol=1e-5)
        return
    with dispatch.weights_at_home(model):
        merged = adapted.merge_and_unload(safe_merge=home == "cpu")
    assert merged is model
    assert torch.equal(case.logits(model), case.logits(plain))
    state = plain.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    dispatch.remove_hook_from_submodules(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("home", ["cpu", "disk", "mixed", "mapped"])
def test_hooks_are_removed_around_adapters(home: str, make_case: Any) -> None:
    pytest.importorskip("peft")
    case = make_case("llama")
    model = loaded(case, home)
    with dispatch.weights_at_home(model):
        adapted = with_adapters(model)
    dispatch.remove_hook_from_submodules(model)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(case.logits(adapted), case.logits(with_adapters(case.loaded())))


@pytest.mark.parametrize("kept", ["lm_head", "embed_tokens", "mlp"])
@pytest.mark.parametrize("home", ["cpu", "disk", "mapped"])
def test_modules_that_are_copied_to_be_trained(kept: str, home: str, make_case: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    case = make_case("llama")

    def adapted(model: Any) -> Any:
        torch.manual_seed(5)
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj"], modules_to_save=[kept], task_type="CAUSAL_LM", init_lora_weights=False
        )
        return peft.get_peft_model(model, config)

    reference, dispatched = adapted(case.loaded()), loaded(case, home)
    with dispatch.weights_at_home(dispatched):
        model = adapted(dispatched)
    for _ in range(2):
        expected, found = trained(reference, case.ids), trained(model, case.ids)
        assert any(kept in name for name in found)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert torch.equal(case.logits(model), case.logits(reference))
    model.save_pretrained(tmp_path / "adapter")
    other = loaded(case, home)
    with dispatch.weights_at_home(other):
        again = peft.PeftModel.from_pretrained(other, tmp_path / "adapter")
    for each in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(case.logits(each), case.logits(reference))
    if home != "disk":
        with dispatch.weights_at_home(dispatched):
            merged = model.merge_and_unload()
        plain = reference.merge_and_unload()
        for each in (merged, copy.deepcopy(merged), dispatch.remove(merged)):
            assert torch.equal(case.logits(each), case.logits(plain))


# Without PEFT


class Adapted(nn.Module):
    """A layer with another beside it."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.beside = base, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.base(x) + self.beside(x)
        return found


def adapt(model: Any) -> None:
    torch.manual_seed(3)
    model.layers[2] = Adapted(model.layers[2])


def test_what_is_added_goes_where_the_layer_runs() -> None:
    simulate.virtual("1x1GB")  # lets PyTorch know the devices
    plain = ZOO["shuffled"].build()
    adapt(plain)
    with Machine({"cuda:0": 10**6}) as box, torch.no_grad():
        device = box.devices["cuda:0"]
        model: Any = dispatch.cpu_offload(ZOO["shuffled"].build(), device)
        with dispatch.weights_at_home(model):
            adapt(model)
            assert model.layers[2].base.weight.device.type == model.layers[2].beside.weight.device.type == "cpu"
        assert model.layers[2].beside.weight.device == device
        assert torch.equal(model(rows()), plain(rows()))
        beside = model.layers[2].beside
        with dispatch.weights_at_home(model):
            for each in (model, plain):
                each.layers[2].base.weight += each.layers[2].beside.weight
        assert model.layers[2].beside is beside
        assert torch.equal(model(rows()), plain(rows()))


@pytest.mark.parametrize("home", ["cpu", "disk", "mapped"])
def test_what_was_added_is_copied_and_pickled(home: str, tmp_path: Path) -> None:
    plain = ZOO["shuffled"].build()
    adapt(plain)
    model: Any = dispatch.dispatch_model(
        ZOO["shuffled"].build(), {"": "disk" if home == "mapped" else home},
        main_device="cpu" if home == "mapped" else 0, offload_dir=tmp_path, devices=PLAYED,
    )  # fmt: skip
    with dispatch.weights_at_home(model):
        adapt(model)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        for other in others:
            assert torch.equal(other(rows()), plain(rows()))
            other.layers[2].beside.weight.zero_()
            # Its own weights are within reach as the model's are.
            with dispatch.weights_at_home(other):
                assert torch.equal(other.layers[2].base.weight, plain.layers[2].base.weight)  # type: ignore[index, union-attr]
            dispatch.remove_hook_from_submodules(other)
            assert torch.equal(other.layers[2].base.weight, plain.layers[2].base.weight)  # type: ignore[index, union-attr]
            part = copy.deepcopy(model.layers[2])
            assert torch.equal(part(rows()), plain.layers[2](rows()))  # type: ignore[index, operator]
        assert torch.equal(model(rows()), plain(rows()))


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_values_that_change_at_home(home: str, tmp_path: Path) -> None:
    changed = ZOO["shuffled"].build()
    model: Any = dispatch.dispatch_model(
        ZOO["shuffled"].build(), {"": home}, main_device=0, offload_dir=tmp_path, devices=PLAYED
    )
    before = model(rows())
    with torch.no_grad():
        changed.layers[0].weight.mul_(3)
        changed.layers[1].weight.data = changed.layers[1].weight + 1

        def in_place() -> None:
            model.layers[0].weight.mul_(3)

        def anew() -> None:
            model.layers[1].weight.data = model.layers[1].weight + 1

        for change in (in_place, anew):
            if home == "cpu":
                with dispatch.weights_at_home(model):
                    model.state_dict()  # looks, and leaves them where they are
                    change()
            else:
                with pytest.raises(InputError, match="waits in a file"), dispatch.weights_at_home(model):
                    change()
        assert torch.equal(model(rows()), changed(rows()) if home == "cpu" else before)


def test_what_has_no_weights_at_home() -> None:
    with pytest.raises(InputError, match="not dispatched"), dispatch.weights_at_home(nn.Linear(1, 1)):
        pass


def test_a_plan_takes_adapters_too(make_case: Any) -> None:
    pytest.importorskip("peft")
    case = make_case("llama")
    plan = streamed(case.plan(gpus="1x24GB"), "cpu")
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    with dispatch.weights_at_home(model):
        adapted = with_adapters(model)
    reference = with_adapters(case.loaded())
    assert torch.equal(case.logits(adapted), case.logits(reference))
    expected, found = trained(reference, case.ids), trained(adapted, case.ids)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    with dispatch.weights_at_home(model):
        adapted.merge_and_unload()
    assert torch.equal(case.logits(model), case.logits(reference.merge_and_unload()))

"""What is given to weights that wait, or put in their places, is refused or stays: it is never lost without a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from plain_modules import WIDTH, rows
from torch import nn
from torch.nn import functional

import dispatch
from planner.errors import InputError

PLAYED = {"cuda:0": "cpu"}
ONES = torch.ones(WIDTH, WIDTH)
pytestmark = pytest.mark.usefixtures("one_thread")


def build() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))


def no_grad(write: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return torch.no_grad()(write)


WRITES: dict[str, Callable[[Any], Any]] = {
    "data.zero_": lambda m: m[0].weight.data.zero_(),
    "data.copy_": lambda m: m[0].weight.data.copy_(ONES),
    "data.copy_ of one that waits": lambda m: m[0].weight.data.copy_(m[1].weight.data),
    "data =": lambda m: setattr(m[0].weight, "data", ONES),
    "data = one that waits": lambda m: setattr(m[0].weight, "data", m[1].weight.data),
    "data *=": lambda m: m[0].weight.data.mul_(2),
    "zero_": no_grad(lambda m: m[0].weight.zero_()),
    "[0] =": no_grad(lambda m: m[0].weight.__setitem__(0, 2.0)),
    "data[0] =": lambda m: m[0].weight.data.__setitem__(0, ONES[0]),
    "a row": no_grad(lambda m: m[0].weight[0].zero_()),
    "a view": no_grad(lambda m: m[0].weight.view(-1).zero_()),
    "detach": lambda m: m[0].weight.detach().zero_(),
    "init": lambda m: nn.init.ones_(m[0].weight),
    "init of a fan": lambda m: nn.init.xavier_uniform_(m[0].weight),
    "reset_parameters": lambda m: m[0].reset_parameters(),
    "apply": lambda m: m.apply(lambda one: nn.init.ones_(one.weight) if isinstance(one, nn.Linear) else None),
    "out": no_grad(lambda m: torch.mul(m[0].weight, 2, out=m[0].weight.data)),
    "foreach": no_grad(lambda m: torch._foreach_mul_([m[0].weight], 2.0)),
    "vectors": lambda m: nn.utils.vector_to_parameters(torch.empty(200, device="meta"), m.parameters()),
    "a part converted": lambda m: m[0].double(),
    "into a new layer on meta": no_grad(
        lambda m: nn.Linear(WIDTH, WIDTH, device="meta").weight.copy_(m[0].weight)
    ),
}  # fmt: skip


@pytest.mark.parametrize("home", ["cpu", "disk"])
@pytest.mark.parametrize("name", WRITES)
def test_writes_are_refused(name: str, home: str, tmp_path: Path) -> None:
    model = dispatch.dispatch_model(build(), {"": home}, 0, offload_dir=tmp_path, devices=PLAYED)
    with pytest.raises(InputError, match="values were given to weights that wait elsewhere"):
        WRITES[name](model)
    with torch.no_grad():
        assert torch.equal(model(rows()), build()(rows()))


@pytest.mark.parametrize(
    "ask", [lambda w: bool(w.sum()), lambda w: w.sum().item(), lambda w: w.cpu(), lambda w: w.tolist()]
)
def test_values_that_are_asked_for(ask: Callable[[torch.Tensor], Any]) -> None:
    model: Any = dispatch.cpu_offload(build(), 0, devices=PLAYED)
    with pytest.raises(InputError, match="were used without calling"):
        ask(model[0].weight)


def test_what_changes_nothing_may_be_called() -> None:
    model: Any = dispatch.cpu_offload(build(), 0, devices=PLAYED)
    model.zero_grad()
    model.requires_grad_(False)
    model[0].weight.grad = None
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert model[0].weight.data.half().T.shape == (WIDTH, WIDTH)
    assert torch.zeros_like(model[0].weight, device="cpu").add_(1).sum() == WIDTH * WIDTH
    with torch.no_grad():
        assert torch.equal(model(rows()), build()(rows()))


def swapped(model: Any) -> None:
    torch.utils.swap_tensors(model[0].weight, nn.Parameter(ONES))


def registered_anew(model: Any) -> None:
    del model[0].weight
    model[0].register_parameter("weight", nn.Parameter(ONES))


REPLACED: dict[str, Callable[[Any], Any]] = {
    "assigned": lambda m: setattr(m[0], "weight", nn.Parameter(ONES)),
    "tied to another": lambda m: setattr(m[0], "weight", m[1].weight),
    "registered anew": registered_anew,
    "taken away": lambda m: delattr(m[0], "weight"),
    "swapped": swapped,
    "none": lambda m: setattr(m[0], "bias", None),
}


@pytest.mark.parametrize("name", REPLACED)
def test_parameters_put_in_place_of_what_waits(name: str) -> None:
    model: Any = dispatch.cpu_offload(build(), 0, devices=PLAYED)
    REPLACED[name](model)
    for use in (model, lambda x: model.state_dict(), lambda x: dispatch.align_module_device(model[0]).__enter__()):
        with pytest.raises(InputError, match="was replaced"), torch.no_grad():
            use(rows())


def test_parameters_that_were_put_in_place_stay_after_hooks_are_removed() -> None:
    model: Any = dispatch.cpu_offload(build(), 0, devices=PLAYED)
    model[0].weight = nn.Parameter(ONES)
    model[1].bias = None
    del model[0].bias
    dispatch.remove_hook_from_submodules(model)
    assert torch.equal(model[0].weight, ONES)
    assert model[1].bias is None
    assert not hasattr(model[0], "bias")
    assert torch.equal(model[1].weight, build()[1].weight)


def swap(model: Any) -> None:
    model[0], model[1] = model[1], model[0]


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_modules_put_in_place_of_hooked_ones_are_used(home: str, tmp_path: Path) -> None:
    changes: list[Callable[[Any], Any]] = [
        lambda m: m.add_module("0", nn.Linear(WIDTH, WIDTH)),
        swap,
        lambda m: m.__setitem__(0, m[1]),
        lambda m: m.append(nn.Linear(WIDTH, WIDTH)),
        lambda m: m.register_parameter("extra", nn.Parameter(ONES)),
        lambda m: m[0].register_parameter("extra", nn.Parameter(ONES)),
        lambda m: m[0].register_buffer("extra", ONES),
        lambda m: m.__delitem__(0),
    ]
    for number, change in enumerate(changes):
        model, reference = build(), build()
        dispatch.dispatch_model(model, {"": home}, 0, offload_dir=tmp_path / str(number), devices=PLAYED)
        for each in (model, reference):
            torch.manual_seed(1)
            change(each)
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(model(rows()), reference(rows()))
            assert_same_state(model, reference)
        dispatch.remove_hook_from_submodules(model)
        assert_same_state(model, reference)


def assert_same_state(model: nn.Module, reference: nn.Module) -> None:
    state, expected = model.state_dict(), reference.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def llama(*, tied: bool) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


EMBEDDINGS: dict[str, Callable[[Any], Any]] = {
    "tie_weights": lambda m: m.tie_weights(),
    "resized": lambda m: m.resize_token_embeddings(44),
    "resized without a mean": lambda m: m.resize_token_embeddings(44, mean_resizing=False),
    "resized to the same": lambda m: m.resize_token_embeddings(40),
    "set": lambda m: m.set_input_embeddings(nn.Embedding(40, 16)),
    "set and tied": lambda m: (m.set_input_embeddings(nn.Embedding(40, 16)), m.tie_weights()),
    "head set": lambda m: m.set_output_embeddings(nn.Linear(16, 40, bias=False)),
}
# What is refused, by whether the ends are tied and which of them waits.
REFUSED = {
    (True, "both"): {"resized", "resized without a mean", "set and tied"},
    (False, "both"): {"resized", "resized without a mean"},
    (True, "head"): {"tie_weights", "resized", "resized without a mean", "resized to the same", "set and tied"},
    (False, "head"): {"resized", "resized without a mean"},
    (True, "none"): set(),
    (False, "none"): set(),
}


@pytest.mark.parametrize("waits", ["both", "head", "none"])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_of_a_dispatched_model(tied: bool, waits: str) -> None:
    places = {"": "cpu"} | {
        "both": {},
        "head": {"model.embed_tokens": 0},
        "none": {"model.embed_tokens": 0, "lm_head": 0},
    }[waits]
    ids = torch.tensor([[1, 2, 39]])
    refused = set()
    for name, change in EMBEDDINGS.items():
        model, reference = llama(tied=tied), llama(tied=tied)
        dispatch.dispatch_model(model, places, main_device=0, devices=PLAYED)
        torch.manual_seed(1)
        with torch.no_grad():
            try:
                change(model)
                found = model(ids).logits
            except InputError:
                refused.add(name)
                continue
            torch.manual_seed(1)
            change(reference)
            assert torch.equal(found, reference(ids).logits), name
            assert_same_state(model, reference)
    assert refused == REFUSED[tied, waits]


def test_what_waits_cannot_be_resized_and_is_as_it_was() -> None:
    model, ids = llama(tied=True), torch.tensor([[1, 2, 39]])
    dispatch.cpu_offload(model, 0, devices=PLAYED)
    for how in (True, False):
        with pytest.raises(InputError, match=r"call dispatch\.remove"):
            model.resize_token_embeddings(44, mean_resizing=how)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, llama(tied=True)(ids).logits)
    dispatch.remove_hook_from_submodules(model)
    assert model.resize_token_embeddings(44).num_embeddings == 44
    assert functional.embedding(ids, model.lm_head.weight).shape == (1, 3, 16)

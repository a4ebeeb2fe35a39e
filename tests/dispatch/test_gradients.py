"""Gradients through weights that wait: the plain model's bits, and no weights kept until the backward pass."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dispatch
from dispatch.slots import SlotRing
from dispatch.stream import GroupStream
from interrupts import interrupt
from live_storages import LiveStorages, tensors_of
from planner.errors import InputError
from tiny_models import experts_away, on_cpu, streamed

ROOT = Path(__file__).parents[2]
WIDTH, COUNT = 8, 5
PLAYED = {"cuda:0": "cpu"}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _hooks_are_taken_off() -> Iterator[None]:
    yield
    assert top_hooks() is None


def top_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]


class Block(nn.Module):
    """A layer, or a use of weights, with the way from tokens to tokens around it."""

    def __init__(self, layer: nn.Module, use: Callable[[Any, torch.Tensor], torch.Tensor] = lambda f, x: f(x)):
        super().__init__()
        self.layer, self.use = layer, use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.use(self.layer, x).tanh()


class Used(nn.Module):
    """Weights of its own, used otherwise than layers do."""

    def __init__(self, use: Callable[..., torch.Tensor], dtype: torch.dtype = torch.float32):
        super().__init__()
        self.use = use
        self.first, self.other = (nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=dtype)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(x, self.first, self.other)


def conjugated(x: torch.Tensor, first: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return ((x.to(first.dtype) @ first.conj()) @ other).abs() + x @ other.conj().imag


def paired(x: torch.Tensor, first: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(first.view(WIDTH, WIDTH // 2, 2))
    return (x.to(pairs.dtype) @ pairs[:, 1:]).abs() @ other[:3]


def viewed(x: torch.Tensor, first: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    x = x @ first.t()[:, 2:] @ other[1:7] * other[3, :] + x[..., ::2] @ first[::2]
    return x @ other.view(2, 4, 8).sum(1).T[:, :1]


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Block(nn.Linear(WIDTH, WIDTH)),
    "norm": lambda: Block(nn.LayerNorm(WIDTH)),
    "convolution": lambda: Block(nn.Conv1d(4, 4, 3, padding=1)),
    "transposed": lambda: Block(nn.ConvTranspose1d(4, 4, 3, padding=1)),
    "embedding": lambda: Block(nn.Embedding(4, WIDTH), lambda f, x: f(torch.arange(4)) * x),
    "attention": lambda: Block(
        nn.MultiheadAttention(WIDTH, 2, batch_first=True), lambda f, x: f(x, x.flip(1), x * 2)[0]
    ),
    "recurrent": lambda: Block(nn.LSTM(WIDTH, WIDTH, batch_first=True), lambda f, x: f(x)[0]),
    "twice": lambda: Block(nn.Linear(WIDTH, WIDTH), lambda f, x: f(f(x))),
    "views": lambda: Block(Used(viewed)),
    "conjugated": lambda: Block(Used(conjugated, torch.complex64)),
    "other_dtype": lambda: Block(Used(paired)),
}  # fmt: skip
HOMES = ["cpu", "disk"]


def stacked(name: str) -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(*(BLOCKS[name]() for _ in range(COUNT)))


def tokens() -> torch.Tensor:
    torch.manual_seed(7)
    return torch.randn(2, 4, WIDTH, requires_grad=True)


def waiting(model: nn.Module, home: str, folder: Path, device: Any = 0) -> Any:
    return dispatch.dispatch_model(model, {"": home}, main_device=device, offload_dir=folder, devices=PLAYED)


def gradient(model: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    x = tokens()
    model(x).square().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_are_those_of_the_plain_model(name: str, home: str, tmp_path: Path) -> None:
    expected = gradient(stacked(name).requires_grad_(False))
    model = waiting(stacked(name), home, tmp_path)
    for _ in range(2):
        assert torch.equal(gradient(model), expected)


class Handing(nn.Module):
    """Returns views of its weights, as layers of positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, WIDTH))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"rows": [self.weight[: x.shape[1]].expand(2, 4, WIDTH)], "x": x}


class Positioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.positions = nn.ModuleList(Handing() for _ in range(COUNT))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(COUNT))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for positions, layer in zip(self.positions, self.layers, strict=True):
            found = positions(x)
            x = layer(found["x"] * found["rows"][0])
        return x


@pytest.mark.parametrize("home", HOMES)
def test_weights_that_a_module_hands_out(home: str, tmp_path: Path) -> None:
    plain, model = Positioned().requires_grad_(False), waiting(Positioned(), home, tmp_path)
    with torch.no_grad():
        assert torch.equal(model(tokens()), plain(tokens()))
    assert torch.equal(gradient(model), gradient(plain))


# Memory


def held(model: nn.Module, call: Callable[[], torch.Tensor]) -> tuple[int, int, int]:
    """Return the bytes alive that operators made: after a forward pass, at most, and after a backward pass."""
    tracker = LiveStorages(tensors_of(model))
    with tracker:
        loss = call()
        forward = tracker.live_bytes
        loss.backward()
        peak = tracker.peak_bytes
        del loss
    return forward, peak, tracker.live_bytes


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("name", ["linear", "attention", "transposed"])
def test_nothing_of_the_weights_is_kept_until_the_backward_pass(name: str, home: str, tmp_path: Path) -> None:
    plain, model = stacked(name).requires_grad_(False), waiting(stacked(name), home, tmp_path)
    gradient(model)  # what is made once
    forward, peak, after = held(plain, lambda: plain(tokens()).square().sum())
    in_hand = max(group.store.layout.nbytes for group in groups_of(model))
    found = held(model, lambda: model(tokens()).square().sum())
    assert found[0] == forward, "of weights, only notes are saved"
    assert found[1] <= peak + in_hand
    assert found[2] == after, "what the backward pass had in hand is gone with it"
    assert in_hand * 2 < sum(group.store.layout.nbytes for group in groups_of(model))


def groups_of(model: nn.Module) -> list[Any]:
    return [found[1] for module in model.modules() if (found := vars(module).get("_loadplan_group")) is not None]


@pytest.fixture
def brought(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the stores that are brought for backward passes."""
    stores: list[Any] = []
    bring = SlotRing.bring

    def bring_and_tell(ring: SlotRing, store: Any) -> torch.Tensor:
        stores.append(store)
        return bring(ring, store)

    monkeypatch.setattr(SlotRing, "bring", bring_and_tell)
    return stores


@pytest.mark.parametrize("name", ["recurrent", "attention", "linear"])
def test_weights_that_several_steps_use_are_brought_once(name: str, tmp_path: Path, brought: list[Any]) -> None:
    model = waiting(stacked(name), "cpu", tmp_path)
    gradient(model)
    assert brought == [group.store for group in reversed(groups_of(model))]


def test_on_a_pretended_device() -> None:
    """In a process of its own: autograd has threads for the devices that were known at the first backward pass."""
    code = "import training_on_pretended as each; each.step_within_capacity(); each.differentiated_in_a_call()"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr


# Models of transformers


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("kind", ["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_gradients_of_whole_models(name: str, home: str, kind: str, make_case: Any) -> None:
    case = make_case(name)
    plan = streamed(case.plan(gpus="1x24GB"), home, resident_slices=1)
    case.run_like(plan)
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    # Through attention, norms and experts, of which all but one wait.
    expected, found = (of_embeddings(each, case, kind) for each in (case.reference.requires_grad_(False), model))
    assert torch.equal(found, expected)


def of_embeddings(model: Any, case: Any, kind: str = "plain") -> torch.Tensor:
    torch.manual_seed(3)
    rows = torch.randn(*case.ids.shape, case.config.hidden_size, requires_grad=True)
    if kind != "plain":
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    model(inputs_embeds=rows, labels=case.ids).loss.backward()
    assert rows.grad is not None
    return rows.grad


@pytest.mark.parametrize("limit", [0, 1000])
def test_nothing_of_experts_is_kept(limit: int, make_case: Any) -> None:
    """Copied through fewer slots than are routed, or computed by the CPU from where they wait."""
    case = make_case("mixtral")
    plan = experts_away(case.plan(gpus="1x24GB"), limit=limit)
    case.run_like(plan)
    reference = case.reference.requires_grad_(False)
    model: Any = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    rows = torch.randn(*case.ids.shape, case.config.hidden_size, requires_grad=True)

    def step(each: Any) -> torch.Tensor:
        loss: torch.Tensor = each(inputs_embeds=rows, labels=case.ids).loss
        return loss

    for each in (reference, model):
        step(each).backward()  # what is made once
    forward, peak, _ = held(reference, lambda: step(reference))
    found = held(model, lambda: step(model))
    expert_bytes = 3 * 64 * 176 * 4
    # Copied where the reference computes with views: none is alive after its expert has computed.
    assert found[0] - forward < expert_bytes / 2
    assert found[1] <= peak + expert_bytes + expert_bytes / 2


class LowRank(nn.Module):
    """An adapter around a layer."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("by", ["plan", "map"])
def test_adapters_inside_of_what_waits(by: str, make_case: Any) -> None:
    case = make_case("llama")
    reference: Any = case.loaded().requires_grad_(False)
    if by == "plan":
        plan = streamed(case.plan(gpus="1x24GB"), "cpu")
        model: Any = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    else:
        places = {"": "cpu", "model.norm": 0}
        model = dispatch.load_checkpoint_and_dispatch(case.meta(), case.folder, places, devices=PLAYED)
    model.requires_grad_(False)
    with dispatch.weights_at_home(model):
        for each in (reference, model):
            torch.manual_seed(6)
            for layer in each.model.layers:
                layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
                layer.mlp.down_proj = LowRank(layer.mlp.down_proj)

    def step(each: Any) -> torch.Tensor:
        each.zero_grad()
        loss: torch.Tensor = each(case.ids, labels=case.ids).loss
        return loss

    forward, peak, _ = held(reference, lambda: step(reference))
    held_bytes, most, _ = held(model, lambda: step(model))
    assert held_bytes == forward
    assert most <= peak + max(group.store.layout.nbytes for group in groups_of(model))
    gradients = [{n: p.grad for n, p in each.named_parameters() if p.grad is not None} for each in (reference, model)]
    assert len(gradients[0]) == 4 * 5
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[1][name], tensor) for name, tensor in gradients[0].items())


# Beside hooks of others


def seen_by_hooks(model: Callable[[torch.Tensor], torch.Tensor]) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    shapes = []

    def pack(tensor: torch.Tensor) -> list[torch.Tensor]:
        shapes.append(tuple(tensor.shape))
        return [tensor.detach().clone()]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0]):
        found = gradient(model)
        # Of all that `gradient` saves outside of modules too, in order.
        return shapes, found


@pytest.mark.parametrize("name", ["linear", "attention", "recurrent"])
def test_hooks_from_outside_see_all_but_weights(name: str, tmp_path: Path) -> None:
    plain = stacked(name).requires_grad_(False)
    weights = {parameter.untyped_storage().data_ptr() for parameter in plain.parameters()}
    expected: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            expected.append(tuple(tensor.shape))
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        gradients = gradient(plain)
    shapes, found = seen_by_hooks(waiting(stacked(name), "cpu", tmp_path))
    assert shapes == expected
    assert len(shapes) > COUNT
    assert torch.equal(found, gradients)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_in_checkpoints_on_the_host(reentrant: bool, tmp_path: Path) -> None:
    def checkpointed(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def inner(x: torch.Tensor) -> torch.Tensor:
            for block in model[1:4]:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x  # type: ignore[no-any-return]

        def call(x: torch.Tensor) -> torch.Tensor:
            with torch.autograd.graph.save_on_cpu():
                return model[4](checkpoint(inner, model[0](x), use_reentrant=reentrant))  # type: ignore[no-any-return]

        return call

    for name in ("attention", "recurrent"):
        # Sums of gradients are in another order than without checkpoints.
        expected = gradient(checkpointed(stacked(name).requires_grad_(False)))
        assert torch.equal(gradient(checkpointed(waiting(stacked(name), "cpu", tmp_path))), expected)


class Failing(nn.Linear):
    fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fails:
            raise ValueError("by intent")
        return super().forward(x)


def test_hooks_are_taken_off_where_a_module_fails(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(*(Failing(WIDTH, WIDTH) for _ in range(4)))

    model, plain = waiting(build(), "cpu", tmp_path), build()
    model[2].fails = True
    outer = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda packed: packed)
    with outer:
        with pytest.raises(ValueError, match="by intent"):
            model(tokens())
        assert top_hooks()[0] is outer.pack_hook
    model[2].fails = False
    assert torch.equal(gradient(model), gradient(plain))


def test_hooks_are_taken_off_where_experts_fail(make_case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("mixtral")
    plan = experts_away(case.plan(gpus="1x24GB"), limit=0)
    case.run_like(plan)
    model: Any = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    expected = of_embeddings(case.reference.requires_grad_(False), case)
    experts = type(model.model.layers[1].mlp.experts)
    with monkeypatch.context() as patched:
        patched.setattr(experts, "_apply_gate", lambda self, x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            of_embeddings(model, case)
    assert top_hooks() is None
    assert torch.equal(of_embeddings(model, case), expected)


@pytest.mark.parametrize("number", [1, 4])
def test_an_interrupt_between_hooks_and_module(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = waiting(stacked("linear"), "cpu", tmp_path)
    acquire, calls = GroupStream.acquire, []

    def interrupted(stream: GroupStream, group: Any) -> None:
        calls.append(group)
        acquire(stream, group)
        if len(calls) == number:
            raise KeyboardInterrupt

    outer = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda packed: packed)
    with monkeypatch.context() as patched, outer:
        patched.setattr(GroupStream, "acquire", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(tokens())
        assert top_hooks()[0] is outer.pack_hook
    assert torch.equal(gradient(model), gradient(stacked("linear")))


# Some come where Python can only report them, and others while it does.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_steps_that_are_interrupted_anywhere(name: str, make_case: Any) -> None:
    case = make_case(name)
    plan = streamed(case.plan(gpus="1x24GB"), "cpu", resident_slices=1)
    case.run_like(plan)
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    rows = torch.randn(*case.ids.shape, case.config.hidden_size, requires_grad=True)
    loss = model(inputs_embeds=rows, labels=case.ids).loss
    interrupt(lambda: of_embeddings(model, case), times=25)
    interrupt(lambda: loss.backward(retain_graph=True), times=25)
    assert top_hooks() is None
    assert torch.equal(of_embeddings(model, case), of_embeddings(case.reference.requires_grad_(False), case))


# Other ways to go backward


def test_twice_and_of_gradients(tmp_path: Path) -> None:
    plain, model = stacked("attention").requires_grad_(False), waiting(stacked("attention"), "disk", tmp_path)

    def found(each: Any) -> list[torch.Tensor]:
        x = tokens()
        loss = each(x).square().sum()
        first = torch.autograd.grad(loss, x, retain_graph=True)[0]
        again = torch.autograd.grad(loss, x, create_graph=True)[0]
        return [first, again.detach(), torch.autograd.grad(again.square().sum(), x)[0]]

    assert all(torch.equal(one, other) for one, other in zip(found(model), found(plain), strict=True))


def test_transforms_that_take_no_hooks(tmp_path: Path) -> None:
    plain, model = stacked("linear").requires_grad_(False), waiting(stacked("linear"), "cpu", tmp_path)
    assert torch.equal(gradient(torch.vmap(model)), gradient(torch.vmap(plain)))


def test_experts_where_no_hooks_are_taken(make_case: Any) -> None:
    case = make_case("mixtral")
    plan = experts_away(case.plan(gpus="1x24GB"), limit=0)
    case.run_like(plan)
    model = dispatch.apply(case.meta(), plan, checkpoint=case.folder, devices=on_cpu(plan))
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        expected, found = (of_embeddings(each, case) for each in (case.reference.requires_grad_(False), model))
    assert torch.equal(found, expected)


def test_a_backward_pass_of_another_thread(tmp_path: Path) -> None:
    model, found = waiting(stacked("recurrent"), "cpu", tmp_path), []
    x = tokens()
    loss = model(x).square().sum()

    def backward() -> None:
        loss.backward()
        found.append(x.grad)

    with model_is_called(model):
        thread = threading.Thread(target=backward, daemon=True)
        thread.start()
        thread.join(60)
    assert found, "a backward pass waits for no call"
    assert torch.equal(found[0], gradient(stacked("recurrent")))


def model_is_called(model: Any) -> Any:
    """Return what is held while a call is under way."""
    return model._loadplan_dispatch.alone


def test_after_the_hooks_are_removed(tmp_path: Path) -> None:
    model = waiting(stacked("linear"), "disk", tmp_path)
    x = tokens()
    loss = model(x).square().sum()
    dispatch.remove_hook_from_submodules(model)
    loss.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, gradient(stacked("linear")))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_between_the_hooks(tmp_path: Path) -> None:
    torch.compiler.reset()
    plain, model = stacked("linear").requires_grad_(False), waiting(stacked("linear"), "cpu", tmp_path)
    compiled = torch.compile(model, backend="aot_eager")
    expected = gradient(plain)
    for _ in range(3):
        assert torch.equal(gradient(compiled), expected)
    torch.compiler.reset()


# What changes in between


def test_weights_that_change_before_the_backward_pass(tmp_path: Path) -> None:
    plain, model = stacked("linear"), waiting(stacked("linear"), "cpu", tmp_path)
    x = tokens()
    loss = model(x).square().sum()
    model.state_dict()
    loss.backward(retain_graph=True)
    assert torch.equal(x.grad, gradient(plain))  # type: ignore[arg-type]
    new = {name: tensor * 2 for name, tensor in plain.state_dict().items()}
    for each in (plain, model):
        each.load_state_dict(new)
    with pytest.raises(InputError, match="changed where they wait"):
        loss.backward()
    assert torch.equal(gradient(model), gradient(plain))
    with dispatch.align_module_device(model[0].layer, "cpu"), torch.no_grad():
        model[0].layer.weight.mul_(2)
    with torch.no_grad():
        plain[0].layer.weight.mul_(2)
    assert torch.equal(gradient(model), gradient(plain))


def test_files_that_change_before_the_backward_pass(tmp_path: Path) -> None:
    model = waiting(stacked("linear"), "disk", tmp_path)
    loss = model(tokens()).square().sum()
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="written to"):
        loss.backward()


class Overwriting(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = super().forward(x).exp()
        made.mul_(2)
        return made


def test_results_that_change_in_place_are_noticed_as_ever(tmp_path: Path) -> None:
    for model in (Overwriting(WIDTH, WIDTH), waiting(Overwriting(WIDTH, WIDTH), "cpu", tmp_path)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient(model)


def test_what_a_failed_backward_pass_has_in_hand_goes_with_the_next_call(tmp_path: Path) -> None:
    model = waiting(stacked("linear"), "cpu", tmp_path)
    x = tokens()
    loss = model(x).square().sum()
    x.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    in_hand = model._loadplan_dispatch.streams[0].in_hand
    assert in_hand._slab is not None
    # Another call of that layer alone does not meet what has changed since.
    plain = stacked("linear")
    new = {name: tensor * 2 for name, tensor in plain.state_dict().items()}
    for each in (plain, model):
        each.load_state_dict(new)
    assert torch.equal(gradient(model[0]), gradient(plain[0]))
    with pytest.raises(ZeroDivisionError):
        model(x).sum().backward()
    assert in_hand._slab is not None
    with torch.no_grad():
        model(tokens())
    assert in_hand._slab is None

"""Modules that no one planned for: each is traced to the byte, or refused by a TraceError that says where and why."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torch.utils._pytree import tree_leaves

import planner
from live_storages import LiveStorages, tensors_of, weight_storage_bytes
from planner import PlanError, TraceError, layers, storages, trace
from planner.graph import LayerGraph
from planner.workload import Workload

ONE_CALL = Workload(caller="forward", new_tokens=1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they give with modules as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


class Does(nn.Module):
    """A module with the given children, parameters and buffers, whose forward is `run(self, ...)`."""

    def __init__(self, run: Callable[..., Any], **members: Any):
        super().__init__()
        for name, value in members.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


class Residual(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(functional.gelu(self.up(x)))


def linear(inputs: int = 8, outputs: int = 8) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def call(module: nn.Module, examples: Any) -> Any:
    if isinstance(examples, dict):
        return module(**examples)
    return module(*examples) if type(examples) is tuple else module(examples)


def held_by_a_real_run(module: nn.Module, examples: Any) -> int:
    given = [leaf for leaf in tree_leaves(examples) if isinstance(leaf, torch.Tensor)]
    tracker = LiveStorages([*tensors_of(module), *given])
    with tracker, torch.no_grad():
        call(module, examples)
    return tracker.peak_bytes


def graph_of(module: nn.Module, examples: Any) -> LayerGraph:
    given = examples if isinstance(examples, dict) or type(examples) is tuple else (examples,)
    return trace.trace(module, ONE_CALL, examples=given)


def most_held(graph: LayerGraph) -> int:
    (prefill,) = graph.passes
    return max(span.held_bytes + span.peak_bytes for span in prefill.per_layer())


def assert_exact(module: nn.Module, examples: Any) -> LayerGraph:
    """Check peak and weights, of the prediction and of the graph, against a real run on this CPU."""
    module.eval()
    predicted, graph = planner.predict_memory(module, examples), graph_of(module, examples)
    graph.check()
    real = held_by_a_real_run(module, examples)
    assert (predicted.peak.operator_output_bytes, most_held(graph)) == (real, real)
    weights = weight_storage_bytes(module)
    assert (predicted.weight_bytes, graph.weight_bytes) == (weights, weights)
    return graph


def refused(module: nn.Module, examples: Any, *parts: str) -> None:
    """Check that prediction and graph refuse a module in the same words, `parts` among them, as a plan does."""
    with pytest.raises(TraceError) as predicted:
        planner.predict_memory(module, examples)
    with pytest.raises(TraceError) as graphed:
        graph_of(module, examples)
    assert str(predicted.value) == str(graphed.value)
    for part in parts:
        assert part in str(predicted.value)


def edges_of(graph: LayerGraph) -> dict[tuple[str, str], int]:
    names = [layer.name for layer in graph.layers]
    found: dict[tuple[str, str], int] = {}
    for edge in graph.edges:
        pair = (names[edge.source], names[edge.target])
        found[pair] = found.get(pair, 0) + edge.prefill_bytes
    return found


# Forwards that depend on data


def gated(run: Callable[[Any, torch.Tensor], Any]) -> nn.Module:
    """Return a model in which the forward of "encoder.gate" is `run`, with a Linear "lin" to use."""
    encoder = nn.Sequential(collections.OrderedDict(gate=Does(run, lin=linear())))
    return nn.Sequential(collections.OrderedDict(stem=linear(), encoder=encoder))


def caught(module: Any, x: torch.Tensor) -> torch.Tensor:
    try:
        return module.lin(x)[: int(x.sum().item())]
    except Exception:
        return x


def written_then_read(module: Any, x: torch.Tensor) -> torch.Tensor:
    lengths = torch.zeros(3, dtype=torch.long)
    lengths.copy_(x.sum(-1))
    return module.lin(x)[: int((lengths + 1).max())]


LOOKS: dict[str, tuple[Callable[[Any, torch.Tensor], Any], str]] = {
    "if": (lambda m, x: m.lin(x) if x.sum() > 0 else x, "_local_scalar_dense"),
    "if any": (lambda m, x: m.lin(x) if (x > 0).any() else x, "_local_scalar_dense"),
    "item as size": (lambda m, x: m.lin(x)[: int(x.abs().max().item())], "_local_scalar_dense"),
    "float": (lambda m, x: m.lin(x) * float(x.mean()), "_local_scalar_dense"),
    "loop": (lambda m, x: [m.lin(x) for _ in range(int(x.abs().sum()))], "_local_scalar_dense"),
    "tolist": (lambda m, x: m.lin(x) * sum(x[0].tolist()), "_local_scalar_dense"),
    "a weight's value": (lambda m, x: m.lin(x) if m.lin.bias[0] > 0 else x, "_local_scalar_dense"),
    "argmax": (lambda m, x: m.lin(x)[: int(x.argmax())], "_local_scalar_dense"),
    "rounded": (lambda m, x: m.lin(x)[: int(x.long().abs().sum())], "_local_scalar_dense"),
    "top-k": (lambda m, x: m.lin(x)[: int(x.topk(2).indices[0, 1])], "_local_scalar_dense"),
    "nonzero": (lambda m, x: m.lin(x)[x.nonzero()[:, 0]], "aten.nonzero"),
    "where": (lambda m, x: m.lin(x)[torch.where(x > 0)[0]], "aten.nonzero"),
    "mask": (lambda m, x: m.lin(x)[x > 0], "aten.index.Tensor"),
    "masked_select": (lambda m, x: torch.masked_select(m.lin(x), x > 0), "aten.masked_select"),
    "unique": (lambda m, x: m.lin(x)[: torch.unique(x).numel()], "aten._unique2"),
    "bincount": (lambda m, x: m.lin(x)[: torch.bincount(x.argmax(-1)).numel()], "aten.bincount"),
    "repeat": (lambda m, x: m.lin(x).repeat_interleave((x.sum(-1) > 0).long() + 1, 0), "aten.repeat_interleave"),
    "equal": (lambda m, x: m.lin(x) if torch.equal(x, x + 1) else x, "aten.equal"),
    "allclose": (lambda m, x: m.lin(x) if torch.allclose(x, x + 1) else x, "aten.allclose"),
    "numpy": (lambda m, x: m.lin(x) * float(x.numpy().sum()), ".numpy()"),
    "caught by the model": (caught, "_local_scalar_dense"),
    "written to integers": (written_then_read, "_local_scalar_dense"),
}


@pytest.mark.parametrize("name", LOOKS)
def test_looking_at_a_number_that_no_one_knows_is_refused(name: str) -> None:
    run, operator = LOOKS[name]
    model = gated(run)
    with torch.no_grad():
        call(model, floats(3, 8))
    refused(model, floats(3, 8), "Sequential", "'encoder.gate'", operator)


def test_a_plan_refuses_it_in_the_same_words() -> None:
    model = gated(LOOKS["nonzero"][0])
    with pytest.raises(TraceError) as planned:
        planner.plan_model(model, gpus="1x24GB", ram="8GB", workload=ONE_CALL, example_inputs=(floats(3, 8),))
    refused(model, floats(3, 8), str(planned.value))


def test_a_look_in_the_model_itself_names_the_operator() -> None:
    refused(
        Does(lambda m, x: m.a(x)[: int(x.sum())], a=linear()), floats(3, 8), "Does could not be traced: aten._local"
    )


IDS = torch.tensor([[1, 2, 5, 0], [3, 4, 0, 0]])


@pytest.mark.parametrize(
    "run",
    [
        lambda m, ids: m.table(ids)[ids > 0],
        lambda m, ids: m.table(ids)[:, (ids > 0).any(0)],
        lambda m, ids: torch.masked_select(m.table(ids), (ids > 0)[..., None]),
        lambda m, ids: m.table(torch.unique(ids)),
        lambda m, ids: m.table(ids)[:, : int(ids.max()) - 2],
        lambda m, ids: m.table(ids[ids.nonzero(as_tuple=True)]),
        lambda m, ids: m.table(ids) if ids.sum() > 3 else ids,
        lambda m, ids: [m.table(row[: int(n)]) for row, n in zip(ids, (ids > 0).sum(-1), strict=True)],
        lambda m, ids: torch.cat([m.table(ids)] * ids[0].tolist()[1]),
        lambda m, ids: m.table(ids).repeat_interleave(ids[:, 0], 0),
        lambda m, ids: m.table(ids)[m.keep],
        lambda m, ids: m.table(ids)[:, : int(m.keep.sum()) + 1],
        lambda m, ids: m.table(ids)[torch.ones_like(m.table(ids)[..., 0], dtype=torch.bool)],
        lambda m, ids: m.table(ids) if float(torch.ones(1)) > 0 else ids,
    ],
)  # fmt: skip
def test_integers_that_were_given_may_be_looked_at(run: Callable[..., Any]) -> None:
    model = Does(run, table=nn.Embedding(8, 8), keep=torch.tensor([True, False]))
    assert_exact(model, IDS.clone())


def test_integers_without_values_are_not_made_up() -> None:
    on_meta = Does(lambda m, x: m.a(x)[: int(m.count)], a=linear(), count=torch.tensor(2)).to("meta")
    refused(on_meta, floats(3, 8), "_local_scalar_dense")


# Modules inside modules


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = linear()
        self.child = Does(lambda m, x: m.second(x), second=linear())
        self.child.parent = self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.child(functional.relu(self.first(x)))

    def eval(self) -> Parent:
        """Not torch's, which walks in circles."""
        return self


def test_a_child_that_has_its_parent_as_a_child() -> None:
    graph = assert_exact(Parent(), floats(3, 8))
    assert [layer.name for layer in graph.layers] == ["first", "child.second"]
    assert edges_of(graph) == {("first", "child.second"): 96}


def test_two_names_of_one_module() -> None:
    one = nn.BatchNorm1d(8)
    model = Does(lambda m, x: m.head(m.b(functional.relu(m.a(x)))), a=one, b=one, head=linear())
    graph = assert_exact(model, floats(3, 8))
    assert [layer.name for layer in graph.layers] == ["a", "head"]
    assert ("a.weight", "b.weight") in graph.ties


def test_three_names_of_one_parameter() -> None:
    one, two, three = linear(), linear(), linear()
    two.weight = three.weight = one.weight
    inner = Does(lambda m, x: m.three(x), three=three)
    model = Does(lambda m, x: m.inner(m.two(m.one(x))), one=one, two=two, inner=inner)
    graph = assert_exact(model, floats(3, 8))
    assert graph.ties == (("inner.three.weight", "one.weight", "two.weight"),)
    assert graph.weight_bytes == 4 * (64 + 3 * 8)
    assert graph.num_parameters == 64 + 3 * 8


def test_a_loose_parameter_that_a_layer_has_too() -> None:
    table = nn.Embedding(6, 8)
    model = Does(lambda m, ids: m.table(ids) @ m.out.T, table=table)
    model.out = table.weight
    graph = assert_exact(model, IDS)
    assert graph.ties == (("out", "table.weight"),)
    assert graph.loose == ()


@pytest.mark.parametrize("shared", [linear, Residual])
def test_a_layer_called_three_times(shared: Callable[[], nn.Module]) -> None:
    def run(m: Any, x: torch.Tensor) -> Any:
        return m.head(m.block(m.block(m.block(m.stem(x)))))

    assert_exact(Does(run, stem=linear(), block=shared(), head=linear(8, 4)), floats(3, 8))


@pytest.mark.parametrize(
    "model",
    [
        Does(lambda m, x: m.head(m.attend(x, x, x)[0]), attend=nn.MultiheadAttention(8, 2), head=linear()),
        Does(lambda m, x: m.attend(x, x + 1, x)[0], attend=nn.MultiheadAttention(8, 2)),
        Does(lambda m, x: m.head(functional.linear(m.a(x), m.other.weight)), a=linear(), other=linear(), head=linear()),
        Does(lambda m, x: m.a(x), a=linear(), never=linear()),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        Does(lambda m, x: (x @ m.ws[0]) @ m.ws[1], ws=nn.ParameterList([floats(8, 8), floats(8, 4)])),
        Does(lambda m, x: m.head(m.rnn(x)[0]), rnn=nn.LSTM(8, 8), head=linear()),
    ],
    ids=["attention", "no fast path", "a weight alone", "never called", "encoder", "list", "recurrent"],
)  # fmt: skip
def test_weights_that_are_used_without_their_module(model: nn.Module) -> None:
    graph = assert_exact(model, floats(2, 5, 8))
    names = {name for _, _, name, _ in graph.tensors()}
    assert names == {name for name, _ in model.named_parameters()}


def test_blocks_that_use_their_childrens_weights_are_layers() -> None:
    model = nn.Transformer(8, 2, 2, 2, 16, batch_first=True)
    graph = assert_exact(model, (floats(2, 5, 8), floats(2, 3, 8)))
    source, target = 2 * 5 * 8 * 4, 2 * 3 * 8 * 4
    assert edges_of(graph) == {
        ("encoder.layers.0", "encoder.layers.1"): source,
        ("encoder.layers.1", "encoder.norm"): source,
        ("encoder.norm", "decoder.layers.0"): source,
        ("encoder.norm", "decoder.layers.1"): source,
        ("decoder.layers.0", "decoder.layers.1"): target,
        ("decoder.layers.1", "decoder.norm"): target,
    }


def stack(count: int) -> nn.Sequential:
    return nn.Sequential(*(Residual() for _ in range(count)))


def test_a_models_own_parameter_does_not_make_it_one_layer() -> None:
    def run(m: Any, x: torch.Tensor) -> Any:
        return m.blocks(x + m.token) * m.scale.exp()

    model = Does(run, blocks=stack(2), token=nn.Parameter(floats(8)), scale=nn.Parameter(torch.tensor(1.0)))
    graph = assert_exact(model, floats(3, 8))
    paths = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert [layer.name for layer in graph.layers] == paths
    assert [tensor.name for tensor in graph.loose] == ["token", "scale"]
    # The same further in: a backbone with a token of its own.
    inside = graph_of(nn.Sequential(model, linear()), floats(3, 8))
    assert [layer.name for layer in inside.layers] == [*(f"0.{path}" for path in paths), "1"]
    assert inside.weight_bytes == graph.weight_bytes + 4 * 72


def test_a_small_module_with_parameters_and_children_is_one_layer() -> None:
    embed = Does(lambda m, x: m.project(x) + m.position, project=linear(), position=nn.Parameter(floats(8)))
    graph = assert_exact(nn.Sequential(embed, linear()), floats(3, 8))
    assert [layer.name for layer in graph.layers] == ["0", "1"]


# Odd tensors


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(linear(), nn.ReLU(), linear()), torch.empty(0, 8)),
        (Does(lambda m, x: (x @ m.thin) @ m.wide, thin=nn.Parameter(torch.ones(8, 0)), wide=torch.ones(0, 8)),
         torch.ones(3, 8)),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), torch.empty(0, 3, 5, 5)),
        (Does(lambda m, x: m.a(x) * m.p + m.b, a=linear(), p=nn.Parameter(torch.tensor(2.0)), b=torch.tensor(1.0)),
         torch.ones(3, 8)),
        (nn.Sequential(nn.ReLU(), nn.Softmax(-1)), torch.ones(3, 8)),
        (nn.Identity(), torch.ones(3, 8)),
    ],
    ids=["no rows", "no columns", "no pictures", "scalars", "no parameters", "nothing"],
)  # fmt: skip
def test_little_or_nothing(model: nn.Module, x: torch.Tensor) -> None:
    assert_exact(model, x)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_weights(dtype: torch.dtype) -> None:
    def run(m: Any, x: torch.Tensor) -> Any:
        y = m.second(m.first(x) @ m.w)
        return torch.view_as_real(y * y.conj()).sum(-1), y.abs()

    complex_linear = {name: nn.Linear(8, 8, dtype=dtype) for name in ("first", "second")}
    model = Does(run, **complex_linear, w=nn.Parameter(torch.randn(8, 8, dtype=dtype)))
    graph = assert_exact(model, torch.randn(3, 8, dtype=dtype))
    assert graph.weight_bytes == 3 * 64 * dtype.itemsize + 2 * 8 * dtype.itemsize


FP8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")


@pytest.mark.parametrize("dtype", FP8)
def test_fp8_weights_that_are_cast(dtype: str) -> None:
    model = Does(
        lambda m, x: functional.linear(x, m.w.to(torch.bfloat16)),
        w=nn.Parameter(floats(16, 8).abs().to(getattr(torch, dtype)), requires_grad=False),
    )
    assert assert_exact(model, floats(3, 8, dtype=torch.bfloat16)).weight_bytes == 16 * 8


# One byte an element in torch, whatever their name says; of two in a byte, the shape counts bytes.
NARROW = (
    *(f"{sign}int{bits}" for sign in ("u", "") for bits in range(1, 8)),
    "float4_e2m1fn_x2", "bits8", "bits1x8", "bits2x4", "bits4x2",
)  # fmt: skip


@pytest.mark.parametrize("dtype", NARROW)
def test_weights_narrower_than_a_byte(dtype: str) -> None:
    weight = nn.Parameter(torch.zeros(16, 8, dtype=torch.uint8).view(getattr(torch, dtype)), requires_grad=False)
    model = Does(lambda m, x: functional.linear(x, m.w.view(torch.uint8).float()), w=weight)
    assert assert_exact(model, floats(3, 8)).weight_bytes == 16 * 8


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16, torch.uint32, torch.int64], ids=str)
def test_views_of_integer_weights_are_no_storages(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(16, 8).to(dtype), requires_grad=False)
    model = Does(lambda m, x: functional.linear(x, m.w.view(-1)[:64].view(8, 8).float()), w=weight)
    assert_exact(model, floats(3, 8))


def quantised(dtype: torch.dtype) -> torch.Tensor:
    if dtype in (torch.quint4x2, torch.quint2x4):
        return torch.quantize_per_channel(floats(16, 8), torch.ones(16), torch.zeros(16), 0, dtype)
    return torch.quantize_per_tensor(floats(16, 8), 0.1, 0, dtype)


class Pair(torch.Tensor):
    """A tensor made of two, as packages for quantisation make theirs."""

    @staticmethod
    def __new__(cls, one: torch.Tensor, two: torch.Tensor) -> Pair:
        made: Pair = torch.Tensor._make_wrapper_subclass(cls, one.shape, dtype=one.dtype)  # type: ignore[attr-defined]
        made.one, made.two = one, two
        return made

    one: torch.Tensor
    two: torch.Tensor

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["one", "two"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(value: Any) -> Any:
            return value.one if isinstance(value, Pair) else value

        return func(*map(plain, args), **(kwargs or {}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: quantised(torch.quint8), "torch.quint8"),
        (lambda: quantised(torch.qint8), "torch.qint8"),
        (lambda: quantised(torch.qint32), "torch.qint32"),
        (lambda: quantised(torch.quint4x2), "torch.quint4x2"),
        (lambda: quantised(torch.quint2x4), "torch.quint2x4"),
        (lambda: torch.eye(8).to_sparse(), "torch.sparse_coo"),
        (lambda: torch.eye(8).to_sparse_csr(), "torch.sparse_csr"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        (lambda: Pair(floats(8, 8), floats(8, 8)), "a Pair, which does its own operators"),
    ],
    ids=["quint8", "qint8", "qint32", "quint4x2", "quint2x4", "sparse", "csr", "nested", "wrapper"],
)  # fmt: skip
def test_tensors_whose_bytes_are_not_in_their_shape_are_refused(make: Callable[[], torch.Tensor], what: str) -> None:
    try:
        odd = make()
    except RuntimeError as exc:
        pytest.skip(f"this torch cannot make it: {exc}")
    inner = Does(lambda m, x: m.a(x), a=linear(), odd=odd)
    refused(nn.Sequential(linear(), inner), floats(3, 8), "1.odd is", what)


# Inputs and outputs


class Named(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


@dataclasses.dataclass
class Record:
    a: torch.Tensor
    b: torch.Tensor


class Ordered(collections.OrderedDict[str, Any]):
    """A dict with more to it than its items, as outputs of transformers are."""

    @property
    def last(self) -> Any:
        return self["last"]


def pair(m: Any, value: Any) -> Any:
    return m.head(functional.relu(m.a(value.a) + value.b))


X = torch.ones(3, 8)
SIGNATURES: dict[str, tuple[Callable[..., Any], Any]] = {
    "keywords only": (lambda m, *, one, two: m.head(m.a(one) + two), {"one": X, "two": X + 1}),
    "nested": (lambda m, d, ls: m.head(m.a(d["x"][0]) + ls[0]["y"]), ({"x": [X, X]}, [{"y": X}])),
    "named tuple": (pair, (Named(X, X + 1),)),
    "dataclass": (pair, (Record(X, X + 1),)),
    "dict of its own": (lambda m, d: m.head(m.a(d.last)), (Ordered(last=X),)),
    "none, text": (lambda m, x, mode, mask=None: m.head(m.a(x)) if mode == "a" else x, (X, "a", None)),
    "one tensor": (lambda m, x: m.head(m.a(x)), X),
    "dict out": (lambda m, x: {"a": m.a(x), "b": [m.head(x), x]}, X),
    "dataclass out": (lambda m, x: Record(m.a(x), m.head(x)), X),
    "named tuple out": (lambda m, x: Named(m.a(x), m.head(x)), X),
    "nothing out": (lambda m, x: [m.head(m.a(x)), None][1], X),
    "same tensor": (lambda m, x, y: m.head(m.a(x)) if x is y else x, (X, X)),
    "in place": (lambda m, x: m.head(m.a(x).add_(x.clone())), X),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    run, examples = SIGNATURES[name]
    assert_exact(Does(run, a=linear(), head=linear()), examples)


def test_a_module_that_keeps_what_it_made() -> None:
    def run(m: Any, x: torch.Tensor) -> Any:
        m.kept = m.a(x)
        m.all = [*getattr(m, "all", []), functional.relu(m.kept)]
        return m.head(m.kept)

    fresh, used = (Does(run, a=linear(), head=linear()) for _ in range(2))
    assert_exact(fresh, X)
    # What a run with gradients left behind cannot be copied as such, and is freed when it is made anew.
    used(X)
    assert used.kept.grad_fn is not None
    assert planner.predict_memory(used, X).peak.operator_output_bytes == held_by_a_real_run(used, X)


def test_an_input_that_is_changed_in_place_stays_the_callers() -> None:
    def run(m: Any, x: torch.Tensor, ids: torch.Tensor) -> Any:
        return m.a(x.mul_(2)) + ids.add_(1)[:, None]

    model, x, ids = Does(run, a=linear()), X.clone(), torch.tensor([1, 2, 3])
    predicted = planner.predict_memory(model, (x, ids))
    assert torch.equal(x, X)
    assert ids.tolist() == [1, 2, 3]
    assert predicted.peak.operator_output_bytes == held_by_a_real_run(model, (x, ids))


# States and wrappings


def test_weights_on_meta_in_part_or_whole() -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 8))

    expected = assert_exact(model(), X)
    half = model()
    half[0].to("meta")
    for module, x in ((half, X), (model().to("meta"), X), (model(), X.to("meta")), (model().to("meta"), X.to("meta"))):
        assert graph_of(module, x) == expected


def test_training_mode_is_traced_as_evaluation_and_said() -> None:
    model = nn.Sequential(linear(), nn.Dropout(0.5), nn.BatchNorm1d(8), linear()).train()
    predicted = planner.predict_memory(model, X)
    assert any("as in evaluation" in text for text in predicted.assumptions)
    assert all(module.training for module in model.modules())
    assert_exact(model, X)
    assert not any("as in evaluation" in text for text in planner.predict_memory(model, X).assumptions)


class Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).T


def hooked() -> nn.Module:
    model = nn.Sequential(linear(), linear())
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    model[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return model


def parametrized() -> nn.Module:
    model = nn.Sequential(linear(), linear())
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    return model


def autocast() -> nn.Module:
    def run(m: Any, x: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return m.b(m.a(x))

    return Does(run, a=linear(), b=linear())


def checkpointed() -> nn.Module:
    def run(m: Any, x: torch.Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(m.block, x, use_reentrant=False)

    return Does(run, block=Residual())


WRAPPINGS: dict[str, Callable[[], nn.Module]] = {
    "hooks": hooked,
    "parametrized": parametrized,
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(linear()), linear()),
    "weight norm, old": lambda: nn.Sequential(nn.utils.weight_norm(linear()), linear()),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(linear()), linear()),
    "compiled": lambda: torch.compile(nn.Sequential(linear(), nn.ReLU(), linear()), backend="eager"),
    "compiled in part": lambda: nn.Sequential(linear(), torch.compile(linear(), backend="eager")),
    "data parallel": lambda: nn.DataParallel(nn.Sequential(linear(), nn.ReLU(), linear())),
    "autocast": autocast,
    "checkpointed": checkpointed,
    "frozen": lambda: nn.Sequential(linear(), linear()).requires_grad_(False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRAPPINGS)
def test_wrappings(name: str) -> None:
    assert_exact(WRAPPINGS[name](), X)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["", "1"])
def test_a_script_module_is_refused(where: str) -> None:
    script = torch.jit.script(linear())
    refused(nn.Sequential(linear(), script) if where else script, X, "torch.jit", repr(where) if where else "the model")


def test_lazy_parameters_are_refused_until_they_have_a_shape() -> None:
    model = nn.Sequential(linear(), nn.Sequential(nn.LazyLinear(4)))
    refused(model, X, "1.0.weight has no shape yet")
    model(X)
    assert_exact(model, X)


@pytest.mark.parametrize(
    ("value", "kind"), [(threading.Lock(), "lock"), ((n for n in range(3)), "generator")], ids=["lock", "generator"]
)
def test_what_cannot_be_copied_is_named(value: Any, kind: str) -> None:
    model = nn.Sequential(linear(), nn.Sequential(linear()))
    model[1][0].state = value
    refused(model, X, f"1.0.state (a {kind}) cannot be copied")


@pytest.mark.parametrize(
    ("inner", "parts"),
    [
        (linear(9), ("'1.inner'", "aten.addmm", "reduction dim")),
        (Does(lambda m, x: m.nothing(x)), ("'1.inner'", "AttributeError")),
        (Does(lambda m, x, y: x), ("'1.inner'", "TypeError")),
    ],
    ids=["shapes", "attribute", "arguments"],
)
def test_a_models_own_error_is_placed(inner: nn.Module, parts: tuple[str, ...]) -> None:
    model = nn.Sequential(linear(), nn.Sequential(collections.OrderedDict(inner=inner)))
    refused(model, X, *parts)


def picture(model: nn.Module) -> Any:
    """Return all that tracing could leave changed in a model."""
    return [
        (name, id(module), module.training, sorted(vars(module)), [id(v) for v in vars(module).values()],
         [(leaf, id(t), t._version, t.requires_grad, t.device, t.data_ptr(), t.grad) for leaf, t in
          (*module._parameters.items(), *module._buffers.items())],
         dict(module._forward_hooks), dict(module._forward_pre_hooks), module.forward.__func__)
        for name, module in model.named_modules()
    ]  # fmt: skip


def drawing(m: Any, x: torch.Tensor) -> Any:
    picks = torch.randint(0, 3, (2,), generator=m.draws), torch.randperm(3)
    m.seen.append(m.a(x))
    m.count += 1
    m.total.add_(1)
    return m.seen[-1][picks[0]] + torch.rand(8, generator=m.draws)


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_given_is_left_alone(fails: bool) -> None:
    def run(m: Any, x: torch.Tensor) -> Any:
        out = drawing(m, x)
        return out[: int(out.sum())] if fails else out

    inner = Does(run, a=linear(), total=torch.tensor(0))
    inner.draws, inner.seen, inner.count = torch.Generator(), [], 0
    model = nn.Sequential(linear(), nn.Dropout(0.5), inner).train()
    model[0].weight.requires_grad_(False)
    model[0].register_forward_hook(lambda module, args, out: out + 1)
    x = X.clone().requires_grad_()
    before, drawn, global_state = picture(model), inner.draws.get_state(), torch.get_rng_state()
    ways: list[Callable[[], Any]] = [
        lambda: planner.predict_memory(model, x),
        lambda: graph_of(model, x),
        lambda: planner.plan_model(model, gpus="1x24GB", ram="8GB", workload=ONE_CALL, example_inputs=(x,)),
    ]
    for way in ways:
        with pytest.raises(TraceError) if fails else contextlib.nullcontext():
            way()
        assert picture(model) == before
        assert (inner.seen, inner.count, int(inner.total)) == ([], 0, 0)
        assert torch.equal(inner.draws.get_state(), drawn)
        assert torch.equal(torch.get_rng_state(), global_state)
        assert x.requires_grad
        assert x._version == 0
        assert torch.is_grad_enabled()
        assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    # It still runs.
    torch.manual_seed(0)
    model(x).sum().backward()


# Edges


class Classifier(nn.Module):
    """As ResNets are built: a stem, a block whose input is added, one whose input is projected, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.down, self.skip = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Conv2d(8, 16, 1, stride=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> Any:
        x = functional.relu(self.norm(self.stem(x)))
        x = functional.relu(x + self.two(functional.relu(self.one(x))))
        x = functional.relu(self.down(x) + self.skip(x))
        return self.head(x.mean((2, 3)))


def test_edges_of_a_classifier() -> None:
    graph = assert_exact(Classifier(), floats(2, 3, 8, 8))
    full, half = 2 * 8 * 8 * 8 * 4, 2 * 16 * 4 * 4 * 4
    assert edges_of(graph) == {
        ("stem", "norm"): full,
        ("norm", "one"): full,
        # What the norm's span made is added after "two"; relu(one) is used by "two" itself.
        ("norm", "two"): full,
        ("one", "two"): full,
        ("two", "down"): full,
        ("two", "skip"): full,
        ("down", "skip"): half,
        ("skip", "head"): 2 * 16 * 4,
    }


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in1, self.in2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.mid = nn.Conv2d(8, 8, 3, padding=1)
        self.up2, self.out2 = nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Conv2d(16, 4, 3, padding=1)
        self.up1, self.out1 = nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> Any:
        one = functional.relu(self.in1(x))
        two = functional.relu(self.in2(functional.max_pool2d(one, 2)))
        y = self.mid(functional.max_pool2d(two, 2))
        y = self.out2(torch.cat([self.up2(y), two], 1))
        return self.out1(torch.cat([self.up1(y), one], 1))


def test_edges_of_a_unet_skip() -> None:
    graph = assert_exact(UNet(), floats(1, 3, 16, 16))
    one, two = 4 * 16 * 16 * 4, 8 * 8 * 8 * 4
    assert edges_of(graph) == {
        # max_pool2d runs after "in1": its pooled output goes on, and its indices do not.
        ("in1", "in2"): one // 4,
        ("in2", "mid"): two // 4,
        ("mid", "up2"): two // 4,
        # The skips are put beside what "up" made, in the spans of "up".
        ("in2", "up2"): two,
        ("up2", "out2"): 2 * two,
        ("out2", "up1"): one // 4,
        ("in1", "up1"): one,
        ("up1", "out1"): 2 * one,
    }


def test_an_edge_for_each_user_and_none_where_nothing_flows() -> None:
    def run(m: Any, x: torch.Tensor) -> Any:
        y = m.a(x)
        return m.b(y), m.c(y.view(-1, 4).view(3, 8)), m.d(y[:2]), m.alone(x)

    names = ("a", "b", "c", "d", "alone")
    graph = assert_exact(Does(run, **{name: linear() for name in names}), X)
    assert edges_of(graph) == {("a", "b"): 96, ("a", "c"): 96, ("a", "d"): 96}


def test_a_residual_over_several_layers() -> None:
    def run(m: Any, x: torch.Tensor) -> Any:
        y = m.a(x)
        return m.e(m.d(m.c(m.b(y))) + y)

    graph = assert_exact(Does(run, **{name: linear() for name in "abcde"}), X)
    pairs = [("a", "b"), ("b", "c"), ("c", "d"), ("a", "d"), ("d", "e")]
    assert edges_of(graph) == dict.fromkeys(pairs, 96)


def test_cross_attention_is_an_edge_from_the_encoder_to_every_decoder_layer() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    ids, start = torch.ones(2, 7, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
    given = {"input_ids": ids, "decoder_input_ids": start}
    edges = edges_of(graph_of(model, given))
    encoded = 2 * 7 * 16 * 4
    last = "encoder.final_layer_norm"
    for number in range(2):
        assert edges[last, f"decoder.block.{number}"] == encoded
    assert not any(one.startswith("encoder.block") and two.startswith("decoder") for one, two in edges)


# Large models


def calls_of(work: Callable[[], Any]) -> int:
    """Count the Python functions and builtins that `work` calls."""
    count = 0

    def tally(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(tally)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def wide(count: int) -> nn.Module:
    return nn.Sequential(*(linear(4, 4) for _ in range(count)))


def around(count: int) -> nn.Module:
    """Return a layer of its own with very many children."""
    kids = {f"m{n}": linear(4, 4) for n in range(count)}
    return nn.Sequential(linear(4, 4), Does(lambda m, x: m.m0(x) + m.p, p=nn.Parameter(floats(4)), **kids))


def with_buffers(count: int) -> nn.Module:
    """Return a model of very many layers, with as many tensors outside of them."""

    def member() -> nn.Module:
        return Does(lambda m, x: m.a(x) + m.shift, a=linear(4, 4), shift=torch.zeros(4))

    return nn.Sequential(*(member() for _ in range(count)))


@pytest.mark.parametrize("build", [wide, around, with_buffers])
def test_tracing_is_linear_in_modules(build: Callable[[int], nn.Module]) -> None:
    small, large = build(60), build(240)
    graph_of(build(2), floats(2, 4))
    few, many = (calls_of(lambda model=model: graph_of(model, floats(2, 4))) for model in (small, large))  # type: ignore[misc]
    assert many < 4.3 * few


def test_ten_thousand_modules() -> None:
    model = wide(10_000)
    graph = graph_of(model, floats(2, 4))
    assert len(graph.layers) == 10_000
    assert graph.weight_bytes == 10_000 * 20 * 4
    assert len(graph.edges) == 9_999
    assert most_held(graph) == 64


def nested(depth: int) -> nn.Module:
    model: nn.Module = linear(4, 4)
    for _ in range(depth):
        model = nn.Sequential(model)
    return model


def test_a_nest_as_deep_as_python_can_run() -> None:
    limit = sys.getrecursionlimit() - len(inspect.stack())
    assert_exact(nested(limit // 5), floats(2, 4))


def test_a_deeper_nest_is_refused() -> None:
    limit = sys.getrecursionlimit() - len(inspect.stack())
    deep = nested(limit // 2)
    with pytest.raises(RecursionError):
        deep(floats(2, 4))
    refused(deep, floats(2, 4), "RecursionError")


# The tests above can fail


FAULTS: dict[str, tuple[Any, str, Any, Callable[[], None]]] = {
    "numbers are made up": (
        storages.StorageTracer, "_look_at", lambda self, func, tensor: 1,
        lambda: refused(gated(LOOKS["if"][0]), X, "encoder.gate"),
    ),
    "masks are not looked at": (
        storages.StorageTracer, "_positions", lambda self, func, indices: list(indices),
        lambda: assert_exact(Does(lambda m, ids: m.table(ids)[ids > 0], table=nn.Embedding(8, 8)), IDS),
    ),
    "an alias is loose": (
        trace, "loose_tensors", lambda model, found: layers.loose_tensors(model, []),
        test_two_names_of_one_module,
    ),
    "flows are not seen": (
        trace, "_edges", lambda traced, position: (), test_edges_of_a_unet_skip,
    ),
    "gradients are not asked for": (
        trace, "_stand_in",
        lambda *args, **known: _STAND_IN(*args, **known).requires_grad_(False),
        lambda: test_wrappings("autocast"),
    ),
}  # fmt: skip
_STAND_IN = trace._stand_in


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, fault, test = FAULTS[name]
    test()
    monkeypatch.setattr(owner, attribute, fault)
    with pytest.raises((AssertionError, PlanError, pytest.fail.Exception)):
        test()

"""Small modules of every kind that a device map may meet, each with a call and names to map. For tests only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

WIDTH = 8


@dataclass
class Zoo:
    """build: makes the module anew, the same each time. call: runs it, on tensors of a device.

    blocks: names that cover its tensors. preload: classes whose children are not called.
    in_accelerate: whether Accelerate 1.15 runs it too.
    """

    build: Callable[[], nn.Module]
    blocks: tuple[str, ...]
    call: Callable[[nn.Module, torch.device], Any] = lambda module, device: module(rows(device))
    preload: tuple[str, ...] = ()
    in_accelerate: bool = True


def rows(device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH).sin().to(device)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return every tensor of an answer, also of objects that are not mappings."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return tensors_in(vars(value)) if hasattr(value, "__dict__") else []


class Rooted(nn.Module):
    """Parameters and buffers at the root, an argument by keyword alone, and a dict for an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.register_buffer("shift", torch.rand(WIDTH))
        self.register_buffer("passing", torch.rand(WIDTH), persistent=False)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, WIDTH))

    def forward(self, *, x: torch.Tensor) -> dict[str, torch.Tensor]:
        middle = self.first(x * self.scale + self.passing)
        return {"middle": middle, "out": self.second(middle) + self.shift}


@dataclass
class Answer:
    out: torch.Tensor
    parts: list[torch.Tensor]
    label: str = "answer"


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class Tied(nn.Module):
    """A head that is its embedding, a layer under two names, and a dataclass for an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.again = self.body
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> Answer:
        middle = self.again(self.body(self.embed(ids)))
        return Answer(self.head(middle), [middle])


class Uncalled(nn.Module):
    """Computes with its children's weights, and does not call them."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> Pair:
        left = nn.functional.linear(x, self.dense.weight, self.dense.bias)
        return Pair(left, left * self.norm.weight)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Uncalled()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        pair = self.inner(x)
        return [self.head(pair.left + pair.right)]


class Shuffled(nn.Module):
    """Calls its layers in another order than they are registered in, one of them twice, one by what was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in (3, 1, 5, 1, 0):
            x = torch.tanh(self.layers[index](x))
        return self.layers[4](x) if bool(x.sum() > 1e9) else self.layers[2](x)


class Nested(nn.Module):
    """Modules that own weights inside of others that do, three deep."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(WIDTH))
        self.inner: nn.Module = Nested(depth - 1) if depth > 1 else nn.Linear(WIDTH, WIDTH)
        self.after = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.after(self.inner(x * self.gain)) * self.gain
        return out


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)
        for index, buffer in enumerate(self.features[1].buffers()):
            buffer.copy_(torch.arange(buffer.numel()).reshape(buffer.shape) + 1 + index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.features(x.reshape(1, 1, 3, WIDTH)).mean((2, 3)))
        return out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(WIDTH, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        out, state = self.cell(x[None])
        return self.head(out), state


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def _attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _parametrized() -> nn.Module:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))
    parametrize.register_parametrization(module[0], "weight", Doubled())
    return module


def _graph() -> nn.Module:
    return torch.fx.symbolic_trace(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 3)))


class Holder(nn.Module):
    """Holds weights, and cannot be called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH, WIDTH))
        self.inner = nn.ParameterDict({"bias": nn.Parameter(torch.rand(WIDTH))})


class Holding(nn.Module):
    """Computes with lists and dicts of parameters, and with a module that only holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.rand(WIDTH)) for _ in range(3)])
        self.pair = Holder()
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for scale in self.scales:
            x = x * scale
        out: torch.Tensor = self.last(nn.functional.linear(x, self.pair.weight, self.pair.inner["bias"]))
        return out


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    return build


ZOO = {
    "rooted": Zoo(
        _seeded(Rooted), ("scale", "shift", "passing", "first", "second.0", "second.2"),
        lambda module, device: module(x=rows(device)),
    ),
    "tied": Zoo(
        _seeded(Tied), ("embed", "body", "head"),
        lambda module, device: module(torch.tensor([[1, 4, 10]], device=device)),
    ),
    "uncalled": Zoo(_seeded(Whole), ("inner", "head"), preload=("Uncalled",)),
    "shuffled": Zoo(_seeded(Shuffled), tuple(f"layers.{index}" for index in range(6))),
    "nested": Zoo(_seeded(Nested), ("gain", "inner", "after")),
    "convolved": Zoo(_seeded(Convolved), ("features.0", "features.1", "head")),
    "recurrent": Zoo(_seeded(Recurrent), ("cell", "head")),
    "attention": Zoo(
        _seeded(_attention), ("layers.0", "layers.1"), lambda module, device: module(rows(device)[None]),
        in_accelerate=False,
    ),
    "holding": Zoo(_seeded(Holding), ("scales", "pair", "last"), in_accelerate=False),
    "parametrized": Zoo(_seeded(_parametrized), ("0", "2")),
    "graph": Zoo(_seeded(_graph), ("0", "2")),
}  # fmt: skip

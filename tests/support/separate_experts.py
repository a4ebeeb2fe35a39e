"""A model whose experts are modules of their own, called only when the router chose them. For tests only."""

from __future__ import annotations

import torch
from torch import nn

WIDTH = 16


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(states)))  # type: ignore[no-any-return]


class Mixture(nn.Module):
    def __init__(self, experts: int, chosen: int) -> None:
        super().__init__()
        self.gate, self.chosen = nn.Linear(WIDTH, experts, bias=False), chosen
        self.experts = nn.ModuleList(Expert() for _ in range(experts))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(states).softmax(-1).topk(self.chosen, -1)
        out = torch.zeros_like(states)
        for number, expert in enumerate(self.experts):
            rows, rank = torch.where(chosen == number)
            if rows.numel():
                out.index_add_(0, rows, expert(states[rows]) * weights[rows, rank, None])
        return out


class Block(nn.Module):
    def __init__(self, experts: int, chosen: int) -> None:
        super().__init__()
        self.norm, self.mix, self.moe = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), Mixture(experts, chosen)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = states + self.mix(states)
        return states + self.moe(self.norm(states))  # type: ignore[no-any-return]


class SeparateExperts(nn.Module):
    """Rows of states (tokens, width) through blocks of a matrix and a mixture of experts."""

    _no_split_modules = ("Block",)
    main_input_name = "states"

    def __init__(self, blocks: int = 3, experts: int = 6, chosen: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(experts, chosen) for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            states = block(states)
        return self.head(states)  # type: ignore[no-any-return]

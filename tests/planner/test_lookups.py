"""Which embeddings are read row by row: those whose weight no other layer uses, tied or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from planner.graph import LayerGraph
from planner.trace import trace
from planner.workload import Workload

IDS = torch.tensor([[1, 2, 3]])
ONE_CALL = Workload(caller="forward", new_tokens=1)


class Tables(nn.Module):
    """Two embeddings, and a matrix; `uses`: what the weight of the first is used for besides."""

    def __init__(self, uses: str):
        super().__init__()
        self.uses, self.first, self.second, self.head = uses, nn.Embedding(16, 8), nn.Embedding(16, 8), nn.Linear(8, 16)
        if uses == "the second":
            self.second.weight = self.first.weight
        if uses == "the head":
            self.head.weight = self.first.weight

    def forward(self, ids: torch.Tensor) -> Any:
        found = self.first(ids) + self.second(ids)
        return found @ self.first.weight.T if self.uses == "the model" else self.head(found)


def looked_up(graph: LayerGraph) -> set[str]:
    return {layer.name for layer in graph.layers for group in graph.kinds[layer.kind].groups if group.by_rows}


@pytest.mark.parametrize(
    ("uses", "names"),
    [
        ("nothing", {"first", "second"}),
        ("the second", {"first", "second"}),
        ("the head", {"second"}),
        ("the model", {"second"}),
    ],
)
def test_an_embedding_is_looked_up_where_embeddings_alone_use_its_weight(uses: str, names: set[str]) -> None:
    assert looked_up(trace(Tables(uses), ONE_CALL, examples=(IDS,))) == names


@pytest.mark.parametrize(("is_tied", "names"), [(False, {"model.embed_tokens"}), (True, set())])
def test_in_generation_an_embedding_is_looked_up_unless_the_head_is_tied_to_it(is_tied: bool, names: set[str]) -> None:
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=is_tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert looked_up(trace(model, Workload(prompt_tokens=8, new_tokens=3))) == names

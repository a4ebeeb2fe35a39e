"""The implementations that a Plan may name, registered with transformers: traced by the planner, run by dispatch.

`routed_experts` computes a mixture-of-experts layer one routed expert at a time, so that only the experts which
the router chose need to be on the device. Its arithmetic is that of transformers' "eager" experts.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, Protocol

import torch
from torch.nn.functional import linear

ROUTED_EXPERTS = "loadplan_routed"
# transformers' grouped matmul under a name of ours: `generate` swaps "grouped_mm" for "batched_mm" while decoding on
# a GPU, which gathers experts' weights per token and takes gigabytes that no plan counted.
GROUPED_EXPERTS = "loadplan_grouped"
SOURCE_ATTRIBUTE = "_loadplan_experts"


class ExpertSource(Protocol):
    """Gives the tensors of one expert, on the device where its layer runs or in the host's memory."""

    def host_computes(self, tokens: int) -> Set[int]:
        """Return the experts that the host computes in a call of so many tokens."""

    def begin(self, module: torch.nn.Module, experts: list[int]) -> None:
        """Announce which experts this call will fetch, in order."""

    def fetch(self, expert: int) -> dict[str, torch.Tensor]:
        """Return {parameter name: that expert's slice} on the device; valid until the next `fetch`."""

    def end(self) -> None:
        """Say that the last fetched expert is no longer needed, also where the call failed."""

    def on_host(self, expert: int) -> dict[str, torch.Tensor]:
        """Return {parameter name: that expert's slice} where it waits in the host's memory."""


def routed_experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return the experts' output for `hidden_states` (tokens, hidden); index and weights are (tokens, top_k).

    One read of the routed ids by the host; then each routed expert once, in ascending order. Rows of an expert are
    ordered by rank, then token, as transformers' eager experts order them, so that both give the same bits.

    While the host computes its experts, the device does what it was given before: all of its own, where those that wait
    have the highest numbers. Tokens go to the host once, with the routed ids; an expert's products come back as soon as
    they are there.
    """
    final = torch.zeros_like(hidden_states)
    top_k = top_k_index.shape[-1]
    tokens = hidden_states.shape[0]
    by_rank = top_k_index.t().reshape(-1)
    order = torch.argsort(by_rank, stable=True)
    # Counted without `bincount`, which would make the host wait for a GPU once more.
    tally = by_rank.new_zeros(self.num_experts + 1).scatter_add_(0, by_rank, torch.ones_like(by_rank))
    source: ExpertSource | None = getattr(self, SOURCE_ATTRIBUTE, None)
    on_host: Set[int] = frozenset() if source is None else source.host_computes(tokens)
    # Sent ahead of the counts, on the same stream: when the host has those, these are there too.
    sent = (_to_host(hidden_states), _to_host(order)) if on_host else None
    counts = tally[: self.num_experts].tolist()
    routed = [expert for expert, count in enumerate(counts) if count]
    start = 0
    try:
        if source is not None:
            source.begin(self, [expert for expert in routed if expert not in on_host])
        for expert in routed:
            span = slice(start, start + counts[expert])
            start += counts[expert]
            rows = order[span]
            token, rank = rows % tokens, torch.div(rows, tokens, rounding_mode="floor")
            if source is not None and sent is not None and expert in on_host:
                states, places = sent
                product = _one_expert(self, states[places[span] % tokens], source.on_host(expert))
                value = _to_device(product, final.device) * top_k_weights[token, rank, None]
            else:
                weights = source.fetch(expert) if source is not None else _slices(self, expert)
                value = _one_expert(self, hidden_states[token], weights) * top_k_weights[token, rank, None]
            final.index_add_(0, token, value.to(final.dtype))
    finally:
        if source is not None:
            source.end()
    assert start <= tokens * top_k
    return final


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Queue a copy to host memory, pinned if from a GPU: it is there when the host has waited for a later one."""
    return tensor.to("cpu", non_blocking=True)


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Queue a copy to `device`; from pageable memory the host would wait for what the GPU was given before."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _slices(module: Any, expert: int) -> dict[str, torch.Tensor]:
    return {name: parameter[expert] for name, parameter in module.named_parameters(recurse=False)}


def _one_expert(module: Any, states: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    def project(states: torch.Tensor, name: str) -> torch.Tensor:
        weight = weights[name]
        return linear(states, weight.t() if module.is_transposed else weight, weights.get(f"{name}_bias"))

    if module.has_gate:
        states = module._apply_gate(project(states, "gate_up_proj"))
    else:
        states = module.act_fn(project(states, "up_proj"))
    states = project(states, "down_proj")
    return module.post_expert_norm(states) if module.has_post_expert_norm else states


def register() -> None:
    """Make the implementations known to transformers under their names. Harmless when repeated."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

    ALL_EXPERTS_FUNCTIONS.register(GROUPED_EXPERTS, grouped_mm_experts_forward)
    # The host reads the routing and brings experts in between: nothing that torch.compile could put into a graph.
    ALL_EXPERTS_FUNCTIONS.register(ROUTED_EXPERTS, torch.compiler.disable(routed_experts))


def experts_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return {path: module} of fused experts: modules that transformers' experts interface runs."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "_is_expert_parallel") and hasattr(module, "num_experts")
    }

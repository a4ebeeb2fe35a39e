"""Training steps on pretended devices, whose backward passes have a thread of their own. For tests only."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

import dispatch
import simulate
from simulate.virtual_machine import Machine

# Before the first backward pass: this lets PyTorch know the devices.
simulate.virtual("1x1GB")
WIDTH, COUNT = 256, 8


def layers() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(COUNT)))


def step_within_capacity() -> None:
    """Train on a device that holds less than half of the weights."""
    x = torch.ones(1, WIDTH).requires_grad_()
    layers()(x).sum().backward()
    # Two slots, what a backward pass has in hand, and some for the rows of one token.
    layer_bytes = (WIDTH + 1) * WIDTH * 4
    capacity = 3 * layer_bytes + 4 * COUNT * WIDTH * 4
    assert capacity < COUNT * layer_bytes / 2
    threads = set[int]()

    def tell(gradient: torch.Tensor) -> None:
        threads.add(threading.get_ident())

    with Machine({"cuda:0": capacity}) as box:
        model = dispatch.cpu_offload(layers(), box.devices["cuda:0"])
        for _ in range(2):
            y: Any = x.detach().to(box.devices["cuda:0"]).requires_grad_()
            y.register_hook(tell)
            model(y).sum().backward()
            assert torch.equal(y.grad.cpu(), x.grad)  # type: ignore[arg-type]
    assert len(threads) == 1
    assert threading.get_ident() not in threads


class Forces(nn.Module):
    """Differentiates in the middle of its forward pass, as models of energies do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(self.layers(x).sum(), x)[0]


def differentiated_in_a_call() -> None:
    """Have autograd's thread ask for weights while the caller's, which waits for it, is in the middle of a call."""
    found = []
    with Machine({"cuda:0": 10**8}) as box:
        device = box.devices["cuda:0"]
        model = dispatch.cpu_offload(Forces(), device)

        def call() -> None:
            found.append(model(torch.ones(1, WIDTH, device=device)).cpu())

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(60)
        assert found, "one thread waits for the other"
    assert torch.equal(found[0], Forces()(torch.ones(1, WIDTH)))

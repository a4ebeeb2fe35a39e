"""A copy between two GPUs that corrupts is found out, told of once, and gone around. The GPUs are virtual ones, and the
function that copies corrupts.
"""

from __future__ import annotations

import warnings

import pytest
import torch

import dispatch.peers as peers
import simulate
from simulate.virtual_machine import Machine


@pytest.fixture
def two() -> list[torch.device]:
    return list(simulate.virtual("2x1GB").devices.values())


class Corrupting:
    """Copies as it should, but for one bit of what goes from the first device to the second."""

    def __init__(self, first: torch.device, bit_at: float):
        self.first, self.bit_at, self.calls = first, bit_at, 0

    def __call__(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        self.calls += 1
        if tensor.device != self.first:
            return peers.straight(tensor, device)
        changed = tensor.cpu().clone()
        flat = changed.view(-1).view(torch.uint8)
        flat[int(self.bit_at * (flat.numel() - 1))] ^= 1
        return changed.to(device)


@pytest.mark.parametrize("bit_at", [0.0, 0.37, 1.0])
def test_a_copy_that_corrupts_is_gone_around(two: list[torch.device], bit_at: float) -> None:
    first, second = two
    copy = Corrupting(first, bit_at)
    ways = peers.Peers(copy, kinds=("virtual",))
    with Machine({"cuda:0": 10**9, "cuda:1": 10**9}) as machine:
        value = torch.arange(1000.0)
        here = value.to(first)
        with pytest.warns(UserWarning, match="through host memory"):
            there = ways.bring(here, second)
        assert there.device == second
        assert torch.equal(there.cpu(), value)
        assert machine.copied_bytes["cuda:0", "cpu"] >= here.nbytes
        calls = copy.calls
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(ways.bring(here, second).cpu(), value)
            assert copy.calls == calls, "it is tried once, and not used again"
            before = machine.copied_bytes.get(("cuda:1", "cuda:0"), 0)
            assert torch.equal(ways.bring(there, first).cpu(), value)
        assert not before
        assert machine.copied_bytes["cuda:1", "cuda:0"] > here.nbytes, "the other way is trusted"
        assert ways.bring(here, first) is here


def test_a_copy_that_corrupts_now_and_then_is_found_out(two: list[torch.device]) -> None:
    times = iter((False, False, True))

    def copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        sent = tensor.cpu().clone()
        sent[5] += next(times)
        return sent

    cpu = torch.device("cpu")
    assert not peers.arrives(cpu, cpu, copy)
    assert peers.arrives(cpu, cpu)
    assert not peers.arrives(cpu, cpu, lambda tensor, device: torch.zeros_like(tensor))


def test_other_copies_are_not_tried() -> None:
    def never(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        raise AssertionError("not between GPUs")

    ways = peers.Peers(never)
    assert ways.bring(torch.ones(3), torch.device("meta")).is_meta
    peers.check([torch.device("cpu"), torch.device("cpu")])

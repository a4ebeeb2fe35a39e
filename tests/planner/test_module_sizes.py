"""Sizes, caps and models without memory: held to Accelerate's where those are right, and to sums where they are not."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights as their_empty_weights
from accelerate.utils import modeling

import module_trees
import planner
from planner.accelerate_map import quiet
from planner.errors import InputError
from planner.map_fill import in_order
from planner.module_units import rows_of
from planner.units import GIB, parse_memory


def test_sizes_are_those_of_accelerate() -> None:
    chance = random.Random(5)
    for _ in range(150):
        model = module_trees.draw(chance, leaves=chance.randint(1, 9))
        special = {name: torch.float64 for name, _ in model.named_parameters() if chance.random() < 0.2}
        dtype = chance.choice([None, torch.float16, "bfloat16", "torch.float16"])
        for buffers_only in (False, True):
            theirs = modeling.compute_module_sizes(model, dtype, special, buffers_only)
            assert planner.compute_module_sizes(model, dtype, special, buffers_only) == theirs
        ours = sorted(planner.find_tied_parameters(model))
        assert ours == sorted(modeling.find_tied_parameters(model))


def test_truth_values_small_integers_and_wider_types_take_what_they_take() -> None:
    model = torch.nn.Linear(5, 3)
    model.register_buffer("mask", torch.zeros(10, dtype=torch.bool))
    sizes = planner.compute_module_sizes(model)
    assert sizes["mask"] == model.mask.untyped_storage().nbytes() == 10
    assert planner.compute_module_sizes(model, "int4")["weight"] == 8  # 15 of 4 bits
    assert planner.compute_module_sizes(model, special_dtypes={"bias": torch.uint4})["bias"] == 2
    assert planner.compute_module_sizes(model.half(), torch.float32)["weight"] == 60
    assert sizes["no.such.module"] == 0
    for wrong in ("float17", 3, "nn"):
        with pytest.raises(InputError, match="is no dtype"):
            planner.compute_module_sizes(model, wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "10GB",
        "10Gb",
        "10gb",
        "10GiB",
        "1.5GiB",
        "3MB",
        "3Mb",
        "7KB",
        "7kb",
        "2.5kB",
        "9KIB",
        "0.1GB",
        123,
        "10MIB",
        "8mb",
    ],
)
def test_caps_are_read_as_accelerate_reads_them(text: str | int) -> None:
    assert parse_memory(text) == modeling.convert_file_size_to_int(text)


def test_caps_are_read_where_accelerate_cannot_and_refused_where_nobody_can() -> None:
    assert parse_memory("10Gbit") == parse_memory("10Gb") == 1_250_000_000
    assert parse_memory("1TB") == 10**12
    assert parse_memory(0.9 * GIB) == 966_367_641
    for wrong in ("", "10 apples", "-1GB", -1, True, -0.5, "GB"):
        with pytest.raises(InputError):
            parse_memory(wrong)


def test_caps_are_sorted_and_what_was_given_is_not_changed() -> None:
    given: dict[Any, Any] = {"disk": "1TB", "cpu": "2GiB", 3: "10Gb", 0: 5}
    before = copy.deepcopy(given)
    assert list(planner.get_max_memory(given).items()) == [
        (0, 5), (3, 1_250_000_000), ("cpu", 2 * GIB), ("disk", 10**12)
    ]  # fmt: skip
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    planner.get_balanced_memory(model, given)
    planner.infer_auto_device_map(model, given)
    assert given == before
    for wrong in ({"gpu": 1}, {-1: 5}, {"cuda:0": 5}, {True: 1}):
        with pytest.raises(InputError, match="which is no device"):
            planner.get_max_memory(wrong)


def test_free_memory_is_the_caps_where_none_are_given() -> None:
    caps = planner.get_max_memory()
    assert sorted(map(str, caps)) == sorted([*map(str, range(torch.cuda.device_count())), "cpu"])
    assert 0 < caps["cpu"] < 2**50


def test_balanced_caps_are_the_least_with_which_all_fits() -> None:
    chance = random.Random(11)
    tried = 0
    for _ in range(120):
        model = module_trees.draw(chance, leaves=chance.randint(3, 9), own=False)
        total = planner.compute_module_sizes(model)[""]
        given: dict[Any, int] = {gpu: int(total * chance.uniform(0.3, 1.2)) for gpu in range(chance.randint(2, 3))}
        caps = planner.get_balanced_memory(model, given, ["Block"])
        low = planner.get_balanced_memory(model, given, ["Block"], low_zero=True)
        assert all(caps[gpu] <= size for gpu, size in given.items())
        row = rows_of(model, ["Block"], None, None)[0]
        if in_order(row, list(given.values())) is None:
            assert caps == low == given
            continue
        tried += 1
        assert set(planner.infer_auto_device_map(model, caps, ["Block"]).values()) <= set(given)
        # The last keeps its own.
        common = next(cap for cap in itertools.count() if in_order(row, [min(cap, own) for own in given.values()]))
        last = max(given)
        assert caps == {gpu: own if gpu == last else min(common, own) for gpu, own in given.items()}
        zero = low[0]
        rest = list(given.values())[1:]
        assert in_order(row, [zero, *rest]) is not None
        assert zero == 0 or in_order(row, [zero - 1, *rest]) is None
    assert tried > 40


def test_without_gpus_or_with_one_there_is_nothing_to_balance() -> None:
    model = torch.nn.Linear(4, 4)
    assert planner.get_balanced_memory(model, {"cpu": "1KB"}) == {"cpu": 1000}
    assert planner.get_balanced_memory(model, {0: "1KB", "cpu": 7}, low_zero=True) == {0: 1000, "cpu": 7}


class _Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(4, 4)
        self.other = torch.nn.Linear(4, 4)
        self.other.weight = self.one.weight
        shared = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.first, self.second = shared, shared
        self.norm = torch.nn.BatchNorm1d(4)
        self.register_buffer("table", torch.arange(5.0))
        self.register_parameter("none", None)


def test_empty_weights_have_no_memory_and_stay_tied() -> None:
    with planner.init_empty_weights():
        model = _Tied()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert torch.equal(model.table, torch.arange(5.0))
    assert model.other.weight is model.one.weight
    assert model.first is model.second
    assert not model.first.requires_grad
    assert model.one.weight.requires_grad
    with quiet(), their_empty_weights():
        theirs = _Tied()
    assert [(n, p.shape) for n, p in model.state_dict().items()] == [
        (n, p.shape) for n, p in theirs.state_dict().items()
    ]
    with planner.init_empty_weights(include_buffers=True):
        assert all(tensor.is_meta for tensor in _Tied().state_dict().values())
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_a_class_and_marks_of_parameters_are_kept() -> None:
    class Marked(torch.nn.Parameter):
        pass

    module = torch.nn.Module()
    parameter = Marked(torch.ones(2))
    parameter.mark = "kept"
    with planner.init_on_device("meta"):
        module.weight = parameter
        module.late = torch.nn.LazyLinear(3)
    assert isinstance(module.weight, Marked)
    assert module.weight.is_meta
    assert module.weight.mark == "kept"
    assert not parameter.is_meta


def test_what_is_built_after_an_error_is_real() -> None:
    with pytest.raises(ZeroDivisionError), planner.init_empty_weights():
        _ = 1 // 0
    assert not torch.nn.Linear(2, 2).weight.is_meta

"""Checkpoints that lie, are cut off or no checkpoints: one InputError each, no byte read past the end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dispatch.checkpoint import Checkpoint
from planner.errors import InputError
from planner.headers import read_headers


def write(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """Write a file of the safetensors layout around `header` (bytes, or what JSON makes of it)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refused(path: Path, match: str) -> None:
    """Check that a plan and a dispatch refuse the checkpoint at `path` in the same words."""
    with pytest.raises(InputError, match=match) as caught:
        Checkpoint.open(path)
    assert str(path.name) in str(caught.value)
    with pytest.raises(InputError) as planned:
        read_headers(path)
    assert str(planned.value) == str(caught.value)


@pytest.mark.parametrize("size", range(8))
def test_shorter_than_its_length_field(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(size))
    refused(path, f"has {size} bytes, and a safetensors file has at least 8")


def test_every_truncation_of_a_good_file_is_refused(tmp_path: Path) -> None:
    good, path = tmp_path / "good.safetensors", tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, good)
    content = good.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(InputError):
            Checkpoint.open(path)
    path.write_bytes(content + b"\0")
    refused(path, "bytes that belong to no tensor")


def test_every_changed_byte_of_the_header_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, path)
    content = path.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    for at in range(header_end):
        for value in (0, 0x22, 0x31, 0xFF):
            path.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
            try:
                checkpoint = Checkpoint.open(path)
            except InputError:
                continue
            for name in checkpoint.names():
                assert checkpoint[name].offset_bytes + checkpoint[name].nbytes <= len(content)
                checkpoint.read(checkpoint[name])


@pytest.mark.parametrize(
    ("length", "match"),
    [
        (2**64 - 1, "header would have 18,446,744,073,709,551,615 bytes"),
        (100_000_001, "at most 100,000,000 are allowed"),
        (100_000_000, "is truncated: .* its header needs 100,000,008"),
        (0, "not valid JSON"),
        (3, "not valid JSON"),
    ],
)
def test_a_header_length_that_lies(tmp_path: Path, length: int, match: str) -> None:
    refused(write(tmp_path / "x.safetensors", {"a": entry()}, bytes(8), length=length), match)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe",
        b"[]",
        b"3",
        b"",
        b"[" * 100_000,
        b'{"a": ' * 50_000,
        b'{"a": ' + b"9" * 10_000 + b"}",
        b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0], "shape": [0]}}',
        b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": {}}',
    ],
)
def test_a_header_that_is_no_json_object(tmp_path: Path, header: bytes) -> None:
    refused(write(tmp_path / "x.safetensors", header), "JSON")


@pytest.mark.parametrize(
    ("described", "match"),
    [
        (3, "without dtype, shape and data_offsets"),
        ({"dtype": "F32", "shape": [2]}, "without dtype, shape and data_offsets"),
        (entry(dtype="F31"), "dtype 'F31'"),
        (entry(dtype="F4"), "dtype 'F4'"),
        (entry(dtype=["F32"]), "dtype"),
        (entry(shape=(-2,)), "shape"),
        (entry(shape=(2.0,)), "shape"),
        (entry(shape=(True, 2)), "shape"),
        (entry(shape="2"), "shape"),
        (entry(shape=(2**62, 4, 0), offsets=(0, 0)), "shape"),
        (entry(shape=(2**40, 2**40)), "shape"),
        (entry(offsets=(8, 0)), "offsets"),
        (entry(offsets=(-8, 0)), "offsets"),
        (entry(offsets=(0,)), "offsets"),
        (entry(offsets=(0, 8.0)), "offsets"),
        (entry(offsets=None), "offsets"),
        (entry(offsets=(0, 4)), r"has 4 bytes, and F32 \[2\] needs 8"),
        (entry(shape=(), offsets=(0, 8)), "has 8 bytes, and F32 .* needs 4"),
        (entry(shape=(2**40,), offsets=(0, 2**42)), "is truncated: .* its tensors need 4,398,"),
        (entry(offsets=(2**70, 2**70 + 8)), "leaves a gap"),
    ],
)
def test_a_tensor_described_wrongly(tmp_path: Path, described: object, match: str) -> None:
    refused(write(tmp_path / "x.safetensors", {"a": described}, bytes(8)), match)


def test_truncated_data_says_what_is_there_and_what_is_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": entry(shape=[1000], offsets=[0, 4000])}, bytes(3999))
    size = path.stat().st_size
    refused(path, f"is truncated: {size:,} bytes are there, and its tensors need {size + 1:,}")


@pytest.mark.parametrize(
    ("second", "match"),
    [((4, 12), "'b' overlaps 'a'"), ((0, 8), "overlaps"), ((12, 20), "'b' leaves a gap after 'a'")],
)
def test_tensors_that_overlap_or_leave_a_gap(tmp_path: Path, second: tuple[int, int], match: str) -> None:
    refused(write(tmp_path / "x.safetensors", {"a": entry(), "b": entry(offsets=second)}, bytes(20)), match)


def test_one_tensor_in_two_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(3)}, tmp_path / "y.safetensors")
    refused(tmp_path, r"'a' twice, in x\.safetensors and y\.safetensors")


@pytest.mark.parametrize(
    ("index", "match"),
    [
        (
            {"weight_map": {"a": "x.safetensors", "b": "gone.safetensors"}},
            r"gone\.safetensors, which is missing",
        ),
        (
            {"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}},
            r"x\.safetensors holds 'b': it does not",
        ),
        ({"weight_map": {"a": "/etc/passwd"}}, "outside of its folder"),
        ({"weight_map": {"a": "../x.safetensors"}}, "outside of its folder"),
        ({"weight_map": {"a": "pytorch_model-1.bin"}}, "pickled checkpoint.*convert it to safetensors"),
        ({"weight_map": {"a": 3}}, "no file name"),
        ({"weight_map": {"a": ["x.safetensors"]}}, "no file name"),
        ({"weight_map": {"a": ""}}, "no file name"),
        ({"weight_map": {"a": "x\0"}}, "no file name"),
        ({"weight_map": {"a": "."}}, "not a regular file"),
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": ["a"]}, "no weight_map"),
        ({}, "no weight_map"),
        ([], "not a JSON object"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, index: object, match: str) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=match):
        Checkpoint.open(tmp_path)


def test_an_index_that_puts_a_tensor_into_the_wrong_shard(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "y.safetensors")
    weight_map = {"a": "y.safetensors", "b": "x.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(tmp_path, r"y\.safetensors holds 'a': it does not")


def test_several_indexes(tmp_path: Path) -> None:
    for name in ("model.fp16", "model.fp32"):
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    refused(tmp_path, "several indexes")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickled_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK")
    for path in (tmp_path, tmp_path / name):
        refused(path, "pickled checkpoint, and those are not carried yet; convert it to safetensors")


def test_a_git_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    refused(path, "git lfs pull")


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path, "no .safetensors file")
    refused(tmp_path / "absent", "No such file or directory")
    refused(tmp_path / "a\0b", "null byte")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "not a regular file")


def test_a_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "cannot be read")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, path)
    path.chmod(0)
    refused(path, "Permission denied")

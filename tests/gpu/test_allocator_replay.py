"""Our model of the caching allocator against the real one: same addresses, same segments, same statistics."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cuda_snapshot import Recording, differences, from_json

SCRIPT = Path(__file__).parents[2] / "scripts" / "record_cuda_snapshot"
SETTINGS = ("default", "expandable", "split limit", "divisions")


def record(case: str, setting: str) -> Recording:
    """Return what the real allocator did in a fresh process, in which nothing was allocated before."""
    command = [sys.executable, str(SCRIPT), "--case", case, "--setting", setting]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    (recording,) = json.loads(done.stdout)["recordings"]
    return from_json(recording)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_random_stream_on_three_streams_leaves_the_same_segments(setting: str) -> None:
    recording = record("random", setting)
    assert {step.action for step in recording.steps} == {"alloc", "free", "empty_cache"}
    assert len({segment.stream for segment in recording.segments}) > 1
    assert differences(recording) == []


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_transformer_leaves_the_same_segments(setting: str) -> None:
    recording = record("transformer", setting)
    assert len(recording.steps) > 100
    assert differences(recording) == []


@pytest.mark.parametrize("setting", [setting for setting in SETTINGS if setting != "expandable"])
def test_a_full_device_gives_back_and_fails_alike(setting: str) -> None:
    recording = record("full", setting)
    assert "oom" in {step.action for step in recording.steps}
    assert differences(recording) == []

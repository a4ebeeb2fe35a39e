"""`plan compare`: what it tells of placements, against the pieces that it is made of."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import planner
import simulate
from planner import api
from planner.commands import compare
from planner.commands.main import main

WORDS = ("compare", "--model", "gpt2", "--prompt", "16", "--new-tokens", "4", "--dtype", "float32")


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([*WORDS, "--quiet", *words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def half(tmp_path: Path) -> tuple[str, dict[str, Any]]:
    found = {"": 0, "transformer.h.3": 1, "transformer.h.4": "cpu", "transformer.h.5": "disk"}
    path = tmp_path / "half.json"
    path.write_text(json.dumps(found))
    return str(path), found


def test_rows_are_the_plan_and_each_map_under_both_engines(
    capsys: pytest.CaptureFixture[str], half: tuple[str, dict[str, Any]]
) -> None:
    path, device_map = half
    code, out, err = ask(capsys, "--gpus", "2x1.5GB", "--device-map", path, "--no-auto", "--json")
    assert (code, err) == (0, "")
    rows = {(row["placement"], row["engine"]): row for row in json.loads(out)["rows"]}
    assert list(rows) == [("Loadplan", "loadplan"), (path, "loadplan"), (path, "accelerate")]
    hardware = planner.Hardware.from_options("2x1.5GB")
    options: dict[str, Any] = {"prompt_tokens": 16, "new_tokens": 4, "weight_dtype": "float32", "hardware": hardware}
    best = planner.plan_model("gpt2", **options)
    assert best.prediction is not None
    assert rows["Loadplan", "loadplan"]["total_ns"] == best.prediction.total_ns
    mapped = planner.plan_from_device_map("gpt2", device_map, **options)
    for engine, timeline in (
        ("loadplan", simulate.run(mapped)), ("accelerate", simulate.run_accelerate(mapped, device_map)),
    ):  # fmt: skip
        row = rows[path, engine]
        assert (row["prefill_ns"], row["decode_ns_per_token"]) == (timeline.prefill_ns, timeline.decode_ns_per_token)
        assert row["over_bytes"] == {}
    assert rows[path, "accelerate"]["decode_ns_per_token"] > rows[path, "loadplan"]["decode_ns_per_token"]
    assert rows[path, "accelerate"]["peak_bytes"]["cuda:1"] == simulate.run_accelerate(mapped).peak_bytes("cuda:1")


def test_what_does_not_fit_says_by_how_much(
    capsys: pytest.CaptureFixture[str], half: tuple[str, dict[str, Any]]
) -> None:
    words = ("--gpus", "2x700MB", "--device-map", half[0], "--no-auto")
    code, out, err = ask(capsys, *words, "--json")
    assert (code, err) == (0, "")
    row = json.loads(out)["rows"][1]
    assert row["over_bytes"] == {"cuda:0": row["peak_bytes"]["cuda:0"] - 700_000_000}
    code, text, _ = ask(capsys, *words)
    assert code == 0
    assert f"no: cuda:0 by {row['over_bytes']['cuda:0'] / 1e6:.1f} MB" in text
    assert "times of what does not fit" in text


def test_accelerates_own_map_stands_beside(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate")
    code, out, err = ask(capsys, "--gpus", "2x1.5GB")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert lines[4].startswith("Loadplan")
    assert lines[5] == compare.AUTO
    assert [line.split("'s")[0] for line in lines[6:8]] == ["  by Loadplan", "  by Accelerate"]
    assert len(re.findall(r"yes: cuda:[01] \d+%", out)) == 3


def test_without_accelerate_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate.utils.modeling", None)
    code, out, _ = ask(capsys, "--gpus", "24GB")
    assert code == 0
    assert "pip install accelerate" in " ".join(out.split())
    assert "by Accelerate" not in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "it is not JSON"),
        ("[1]", "write one object of modules and places"),
        ('{"": 1.5}', "write one object of modules and places"),
        ('{"": 5}', "there is no such device"),
        ('{"transformer.h.99": 0, "": 0}', "the model has no such module"),
        ("{}", "the device map is empty"),
    ],
)
def test_a_wrong_map_is_one_message(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "map.json"
    path.write_text(text)
    code, out, err = ask(capsys, "--gpus", "24GB", "--no-auto", "--device-map", str(path))
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_missing_file_is_one_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = ask(capsys, "--gpus", "24GB", "--device-map", str(tmp_path / "none.json"))
    assert code == 2
    assert "cannot read the device map" in err


def test_where_ours_fits_nowhere_maps_are_still_told(
    capsys: pytest.CaptureFixture[str], half: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What would make it fit takes long to look for, and is not told here.
    monkeypatch.setattr(api, "with_fixes", lambda error, *others: error)
    words = ("--gpus", "2x350MB", "--ram", "4.05GB", "--disk", "10MB", "--device-map", half[0], "--no-auto")
    code, out, _ = ask(capsys, *words, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["left_out"][0].startswith("Loadplan: ")
    assert all(row["over_bytes"] for row in found["rows"])

"""The catalogue of products: complete, in itself consistent, sourced, and read as the command and the docs say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from planner.commands.main import main
from planner.errors import InputError
from planner.hardware import Hardware, products
from planner.kernels import cuda
from planner.products import Product, called_by_torch, catalogue, find, kernels_of, nearest, product

ROOT = Path(__file__).parents[2]
DATA = products()
ALL = catalogue()
PLANNED = [key for key, each in ALL.items() if each.refused is None]
NVIDIA = list(DATA["products"])
each_product = pytest.mark.parametrize("key", ALL)
# TFLOP/s grow in this order wherever two of them are known.
ORDER = ("fp32", "tf32", "bf16", "fp8", "fp4")
NEEDED = {
    "v100-16gb", "v100-32gb", "t4", "l4", "a10", "a40", "l40s", "rtx6000ada", "rtxpro6000", "gh200", "b200", "b300",
    "titanrtx", "a5000", "rtx2080ti", "rtx3090", "rtx4090", "rtx5090", "a100-40gb", "a100-80gb", "h100", "h200",
    "mi210", "mi250x", "mi300x", "mi325x", "mi350x", "mi355x", "gaudi2", "gaudi3", "m1", "m2-ultra", "m3-max", "m4-pro",
}  # fmt: skip


def test_what_was_promised_is_there() -> None:
    assert len(ALL) >= 40
    assert set(ALL) >= NEEDED
    assert sum(len(DATA[table]) for table in ("products", "rocm", "others")) == len(ALL), "a key stands in two tables"


@each_product
def test_every_figure_has_a_source(key: str) -> None:
    each = ALL[key]
    assert set(each.sources) == {"peak", "memory", "usable"}
    for words in (*each.sources.values(), each.achieved.source):
        assert len(words) > 20
        stated = ("fetched", "github.com/", "measured", "first version", "by rule: ")
        assert any(word in words for word in stated), words


def test_no_source_or_rule_stands_unused() -> None:
    entries = [entry for table in ("products", "rocm", "others") for entry in DATA[table].values()]
    assert set(DATA["sources"]) == {source for entry in entries for source in entry["sources"].values()}
    assert set(DATA["usable_rules"]) == {entry["usable_rule"] for entry in entries if "usable_rule" in entry}
    assert set(DATA["achieved"]) == {entry.get("achieved", "default") for entry in entries}


@each_product
def test_rates_are_in_order(key: str) -> None:
    peaks = ALL[key].peak_tflops
    known = [peaks[dtype] for dtype in ORDER if dtype in peaks]
    assert known == sorted(known)
    assert peaks["fp16"] >= peaks.get("fp32", 0)
    assert peaks.get("bf16", peaks["fp16"]) == peaks["fp16"]
    assert set(peaks) <= {*ORDER, "fp16", "int8"}


@pytest.mark.parametrize("key", [key for key, each in ALL.items() if each.units is not None])
def test_fp32_is_units_times_lanes_times_clock(key: str) -> None:
    """Two multiply-add operations a lane and clock: figures that datasheets print apart from each other."""
    units = ALL[key].units
    assert units is not None
    assert units.count * units.lanes * 2 * units.clock_mhz * 1e6 == pytest.approx(
        ALL[key].peak_tflops["fp32"] * 1e12, rel=0.012
    )


@pytest.mark.parametrize("key", NVIDIA)
def test_units_are_those_of_the_kernels(key: str) -> None:
    facts = cuda._gpus()["gpus"][key]
    units = ALL[key].units
    assert units is not None
    assert units.count == facts["multiprocessors"]
    assert units.lanes == {(7, 0): 64, (7, 5): 64, (8, 0): 64}.get(tuple(facts["capability"]), 128)


@pytest.mark.parametrize("key", NVIDIA)
def test_matrix_units_do_what_their_architecture_does(key: str) -> None:
    """fp16 over fp32, a clock: tensor cores of GeForce accumulate in fp32 at half the rate of others'."""
    each = ALL[key]
    major, minor = cuda._gpus()["gpus"][key]["capability"]
    half_rate = "GeForce" in each.name or key == "l40"
    ratios = {(7, 0): 8, (7, 5): 8, (8, 0): 16, (8, 6): 4, (8, 9): 4, (12, 0): 4}
    if (major, minor) in ratios:
        expected = ratios[major, minor] / (2 if half_rate else 1)
        assert each.half_tflops / each.peak_tflops["fp32"] == pytest.approx(expected, rel=0.02)
    assert ("bf16" in each.peak_tflops) == ("tf32" in each.peak_tflops) == (major >= 8)
    assert ("fp8" in each.peak_tflops) == ((major, minor) >= (8, 9))
    assert ("fp4" in each.peak_tflops) == (major >= 10)
    if "fp8" in each.peak_tflops:
        assert each.peak_tflops["fp8"] == pytest.approx(2 * each.half_tflops, rel=0.02)


@each_product
def test_usable_memory_is_less_than_the_label(key: str) -> None:
    each = ALL[key]
    assert 0.65 * each.label_gb < each.usable_gib < each.label_gb
    assert each.name.endswith(f" {each.label_gb}GB")


@pytest.mark.parametrize(("rule", "generation"), [("rtx20", 20), ("rtx30", 30), ("rtx40", 40), ("rtx50", 50)])
def test_rules_for_usable_memory_leave_out_the_most_that_is_missing(rule: str, generation: int) -> None:
    series = {key: entry for key, entry in DATA["products"].items() if key.startswith(f"rtx{generation}")}
    missing = {key: entry["label_gb"] - entry["usable_gib"] for key, entry in series.items()}
    known = [missing[key] for key, entry in series.items() if entry["sources"]["usable"] != "rule"]
    stated = DATA["usable_rules"][rule]["missing_gib"]
    assert max(known) <= stated < max(known) + 0.05
    for key, entry in series.items():
        if entry["sources"]["usable"] == "rule":
            assert missing[key] == pytest.approx(stated)
            assert entry["usable_rule"] == rule


@pytest.mark.parametrize("key", PLANNED)
def test_plans_take_peaks_times_what_is_achieved(key: str) -> None:
    each = ALL[key]
    device, cpu = Hardware.from_options(key).devices
    assert cpu.kind == "cpu"
    matmul, bandwidth = each.achieved.matmul, each.achieved.bandwidth
    assert 0 < matmul < 1
    assert 0 < bandwidth < 1
    assert device.flops_for("float16") == pytest.approx(each.peak_tflops["fp16"] * 1e12 * matmul, rel=1e-9)
    assert device.flops_for("float32") == pytest.approx(each.peak_tflops["fp32"] * 1e12 * matmul, rel=1e-9)
    bf16 = each.peak_tflops.get("bf16", each.peak_tflops["fp32"])
    assert device.flops_for("bfloat16") == pytest.approx(bf16 * 1e12 * matmul, rel=1e-9)
    assert device.bytes_per_s == pytest.approx(each.memory_gb_per_s * 1e9 * bandwidth, rel=1e-9)


def test_what_is_taken_for_granted_of_a_product_is_told() -> None:
    assert any("no bfloat16" in note for note in Hardware.from_options("1xt4").assumptions)
    assert not any("no bfloat16" in note for note in Hardware.from_options("1xl4").assumptions)
    assert any("scratch" in note and "MI300X" in note for note in Hardware.from_options("8xmi300x").assumptions)


def test_amd_is_not_said_to_run_kernels_that_are_modelled() -> None:
    assert kernels_of(ALL["l4"].name) == ALL["l4"].name
    assert kernels_of("an abacus") == "an abacus"
    assert "RTX 4090 24GB (assumed" in kernels_of(ALL["mi300x"].name)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("rtx4090", "rtx4090"), ("RTX-4090", "rtx4090"), ("rtx_4090", "rtx4090"), ("GeForce RTX 4090", "rtx4090"),
        ("A100-80GB", "a100-80gb"), ("a10080gb", "a100-80gb"), ("AMD Instinct MI300X", "mi300x"), ("M4 Max", "m4-max"),
    ],
)  # fmt: skip
def test_names_are_read_whatever_their_spelling(text: str, key: str) -> None:
    assert find(text) is ALL[key]


def test_no_two_names_mean_the_same() -> None:
    assert [key for key, each in ALL.items() if find(key) is not each] == []


@pytest.mark.parametrize("text", ["", "24GB", "24", "rtx", "a100", "4090", "voodoo"])
def test_what_is_no_product_finds_none(text: str) -> None:
    assert find(text) is None


@pytest.mark.parametrize(
    ("text", "first"),
    [("a100", ["a100-40gb", "a100-80gb"]), ("rtx-4099", ["rtx4090"]), ("v100", ["v100-16gb", "v100-32gb"])],
)
def test_unknown_names_get_the_nearest(text: str, first: list[str]) -> None:
    assert nearest(text)[: len(first)] == first
    with pytest.raises(InputError, match=rf"{text}.*nearest: {', '.join(first)}"):
        product(text)
    with pytest.raises(InputError, match=rf"^--gpus 2x{text}: .*nearest: {', '.join(first)}"):
        Hardware.from_options(f"2x{text}")


@pytest.mark.parametrize(("key", "why"), [("m4-max", "shares one memory with the CPU"), ("gaudi3", "hpu")])
def test_products_that_plans_cannot_use_say_why(key: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^--gpus {key}: .*{why}"):
        Hardware.from_options(key)
    path = tmp_path / "box.json"
    path.write_text(json.dumps({"gpus": [{"product": key}]}))
    with pytest.raises(InputError, match=why):
        Hardware.load(path)


def test_torch_names_find_products_of_their_memory() -> None:
    for each in ALL.values():
        for name in each.torch_names:
            assert called_by_torch(name, each.usable_bytes) is each
    assert called_by_torch("NVIDIA GeForce RTX 3080", 12 * 2**30) is None, "the 12 GB one is another product"
    assert called_by_torch("Voodoo 5", 2**25) is None


# The command


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["gpus", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_table_has_a_row_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ask(capsys)
    lines = out.splitlines()
    assert code == 0
    assert max(map(len, lines)) <= 80
    assert "…" not in out
    rows = {line.split()[0]: line for line in lines if line.split() and line.split()[0] in ALL}
    assert list(rows) == list(ALL)
    assert rows["rtx4090"].split()[-4:] == ["25.39", "165", "1008", "24GB"]


@each_product
def test_one_product_is_printed_with_every_figure(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ask(capsys, key)
    each = ALL[key]
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    # Long lines are folded, at spaces and inside addresses.
    printed = "".join(out.split())
    figures = [f"{dtype} {rate:g}" for dtype, rate in each.peak_tflops.items()]
    for expected in (each.name, f"{each.usable_gib} GiB", *figures, *each.sources.values()):
        assert "".join(expected.split()) in printed
    assert ("cannotbeplannedfor" in printed) == (each.refused is not None)
    facts = json.loads(ask(capsys, key, "--json")[1])[key]
    assert facts["peak_tflops"] == each.peak_tflops
    assert ("planned" in facts) == (each.refused is None)


def test_some_are_listed_and_none_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(ask(capsys, "a100", "--json")[1])
    assert list(found) == ["a100-40gb", "a100-80gb"]
    code, out, err = ask(capsys, "rtx4099")
    assert (code, out) == (2, "")
    assert "rtx4090" in err


def test_the_catalogue_is_read_only_when_it_is_needed() -> None:
    code = (
        "import planner, planner.commands.main\nfrom planner import Hardware\nHardware.from_options(0)\n"
        "from planner.hardware import products\nprint(products.cache_info().currsize)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "0"


def test_products_are_frozen_values() -> None:
    assert isinstance(ALL["l4"], Product)
    with pytest.raises(AttributeError):
        ALL["l4"].name = "other"  # type: ignore[misc]

"""`--hardware local`: this machine, read from files that stand for /proc and from a torch that pretends to see GPUs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from planner import local
from planner.commands.main import main
from planner.hardware import Hardware
from planner.products import catalogue

ROOT = Path(__file__).parents[2]
GIB = 2**30
CPU = (
    "processor : 0\nmodel name : Abacus 9\nphysical id : 0\ncore id : {core}\ncpu MHz : 2000.0\nflags : sse {flags}\n\n"
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 4 cores of 2 GHz with 32 GiB free, no control group and no GPU."""
    write(tmp_path, "proc/meminfo", f"MemTotal: 99999999 kB\nMemAvailable: {32 * 2**20} kB\n")
    write(tmp_path, "proc/cpuinfo", "".join(CPU.format(core=core % 4, flags="avx2") for core in range(8)))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_machine_without_gpus(root: Path) -> None:
    hardware = local.machine(root).hardware()
    (cpu,) = hardware.devices
    assert hardware.pool("cpu").capacity_bytes == 32 * GIB
    assert abs(hardware.pool("disk").capacity_bytes - shutil.disk_usage(Path.cwd()).free) < GIB
    # 4 cores of two threads each: 2 multiply-adds of 8 lanes a clock, of which 80 %.
    assert cpu.flops_for("float32") == pytest.approx(4 * 2 * 2 * 8 * 2e9 * 0.8)
    assert cpu.bytes_per_s == 60 * 10**9
    notes = " ".join(hardware.assumptions)
    for words in ("Abacus 9, 4 cores", "no GPU driver", "by /proc/meminfo", "is not measured", "(assumed)"):
        assert words in notes


@pytest.mark.parametrize(("flags", "per_clock"), [("avx2 avx512f", 32), ("avx2", 32), ("avx", 8)])
def test_what_a_core_does_in_a_clock(flags: str, per_clock: int, root: Path) -> None:
    write(root, "proc/cpuinfo", CPU.format(core=0, flags=flags))
    cpu = local.machine(root).hardware().device("cpu")
    assert cpu.flops_for("float32") == pytest.approx(per_clock * 2e9 * 0.8)
    assert cpu.bytes_per_s == 15 * 10**9


def test_a_process_may_be_kept_to_some_threads(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert local.machine(root).hardware().device("cpu").bytes_per_s == 2 * 15 * 10**9


@pytest.mark.parametrize("above", [False, True])
def test_control_groups_limit_memory(above: bool, root: Path) -> None:
    """Version 2: what is used counts, but for cached files; the group above binds the one below."""
    write(root, "proc/self/cgroup", "0::/jobs/one\n")
    group = "sys/fs/cgroup/jobs" if above else "sys/fs/cgroup/jobs/one"
    write(root, f"{group}/memory.max", f"{8 * GIB}\n")
    write(root, f"{group}/memory.current", f"{3 * GIB}\n")
    write(root, f"{group}/memory.stat", f"anon 5\ninactive_file {GIB}\n")
    if above:
        write(root, "sys/fs/cgroup/jobs/one/memory.max", "max\n")
        write(root, "sys/fs/cgroup/jobs/one/memory.current", f"{GIB}\n")
    assert local.free_ram(root)[0] == 6 * GIB


def test_control_groups_of_version_1(root: Path) -> None:
    write(root, "proc/self/cgroup", "5:cpu:/\n4:memory:/box\n")
    write(root, "sys/fs/cgroup/memory/box/memory.limit_in_bytes", f"{4 * GIB}\n")
    write(root, "sys/fs/cgroup/memory/box/memory.usage_in_bytes", f"{GIB}\n")
    assert local.free_ram(root)[0] == 3 * GIB


def test_a_machine_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    hardware = local.machine(tmp_path).hardware()
    assert "host RAM 128.0 GB (assumed)" in " ".join(hardware.assumptions)
    assert "is not known here" in " ".join(hardware.assumptions)


# GPUs


def pretend(monkeypatch: pytest.MonkeyPatch, *gpus: tuple[str, int, int, int], peers: bool = False) -> None:
    """Let torch see GPUs: (name, multiprocessors, total and free bytes) of each."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties",
        lambda i: SimpleNamespace(name=gpus[i][0], multi_processor_count=gpus[i][1], total_memory=gpus[i][2]),
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (gpus[i][3], gpus[i][2]))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: peers)


def total(key: str) -> int:
    return catalogue()[key].usable_bytes


def test_gpus_are_read_and_found_in_the_catalogue(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, "dev/nvidiactl", "")
    pretend(
        monkeypatch,
        ("NVIDIA GeForce RTX 4090", 128, total("rtx4090"), 20 * GIB),
        ("NVIDIA A100-SXM4-80GB", 108, total("a100-80gb"), total("a100-80gb") - 1000),
        ("NVIDIA Something Else", 108, total("a100-40gb"), GIB),
        ("Voodoo 5", 3, 16 * GIB, GIB),
    )
    hardware = local.machine(root).hardware()
    names = [gpu.product for gpu in hardware.gpus]
    assert names[:3] == [catalogue()[key].name for key in ("rtx4090", "a100-80gb", "a100-40gb")]
    # What is free, and the context that asking made; never more than there is.
    assert hardware.pool("cuda:0").capacity_bytes == 20 * GIB + 300 * 10**6
    assert hardware.pool("cuda:1").capacity_bytes == total("a100-80gb")
    notes = " ".join(hardware.assumptions)
    assert "cuda:2 is NVIDIA Something Else, taken as NVIDIA A100 40GB (assumed, by its" in notes
    assert "cuda:3 is Voodoo 5, which the catalogue does not have" in notes
    assert hardware.link("cuda:0", "cuda:1").bytes_per_s == 22_500_000_000 // 2


def test_peers_copy_directly(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, "dev/nvidiactl", "")
    pretend(monkeypatch, *[("NVIDIA L4", 58, total("l4"), GIB)] * 2, peers=True)
    hardware = local.machine(root).hardware()
    assert hardware.link("cuda:0", "cuda:1").bytes_per_s == 22_500_000_000
    assert "NVLink is not read" in " ".join(hardware.assumptions)


def test_a_driver_without_gpus(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, "dev/nvidiactl", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local.machine(root).hardware().gpus == ()


# The command


def test_this_machine_can_be_planned_for() -> None:
    Hardware.local().check()


def test_the_command_plans_for_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "gpt2", "--prompt", "8", "--new-tokens", "2", "--hardware", "local", "--json", "--no-cache"]
    assert main([*words, "--max-memory", "cpu=8GB"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert any("read from this machine" in note for note in plan["assumptions"])
    assert {pool["name"]: pool["capacity_bytes"] for pool in plan["hardware"]["pools"]}["cpu"] <= 8 * 10**9


def test_what_describes_another_machine_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "gpt2", "--hardware", "local", "--ram", "8GB"]) == 2
    assert "--hardware local reads this machine, and --ram describes one" in capsys.readouterr().err


@pytest.mark.skipif(any((Path("/") / name).exists() for name in local._DRIVERS), reason="a GPU's driver is loaded")
def test_without_a_driver_torch_is_not_loaded() -> None:
    code = "import sys\nfrom planner import Hardware\nHardware.local()\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ohmygpu.core import hardware
from ohmygpu.core.hardware import Gpu, parse_gpu

GIB = 1 << 30


@pytest.fixture(autouse=True)
def linux_with_eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(hardware, "_allowed", lambda: set(range(8)))


def machine(root: Path, **texts: str) -> Path:
    """A file system with the given files below it (`__` stands for `/`)."""
    for name, text in texts.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def topology(root: Path, siblings: list[str]) -> Path:
    for cpu, text in enumerate(siblings):
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
        (folder / "physical_package_id").write_text("0\n")
    return root


def test_hyperthreads_share_a_physical_core(tmp_path: Path) -> None:
    topology(tmp_path, ["0,4", "1,5", "2,6", "3,7"] * 2)
    assert hardware.physical_cores(tmp_path) == 4
    assert hardware.logical_cores(tmp_path) == 8


def test_affinity_limits_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topology(tmp_path, ["0,4", "1,5", "2,6", "3,7"] * 2)
    monkeypatch.setattr(hardware, "_allowed", lambda: {0, 4, 1})
    assert hardware.physical_cores(tmp_path) == 2
    assert hardware.logical_cores(tmp_path) == 3


def test_without_a_topology_every_cpu_counts(tmp_path: Path) -> None:
    assert hardware.physical_cores(tmp_path) == 8


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("250000 100000", 3), ("max 100000", 8), ("50000 100000", 1), ("", 8), ("x y", 8), ("0 0", 8)],
)
def test_a_cpu_quota_of_version_2_limits_the_cores(tmp_path: Path, quota: str, cores: int) -> None:
    machine(tmp_path, proc__self__cgroup="0::/app/job\n")
    machine(tmp_path / "sys/fs/cgroup/app", **{"cpu.max": quota})
    (tmp_path / "sys/fs/cgroup/app/job").mkdir()
    assert hardware.physical_cores(tmp_path) == hardware.logical_cores(tmp_path) == cores


def test_a_cpu_quota_of_version_1_limits_the_cores(tmp_path: Path) -> None:
    machine(tmp_path, proc__self__cgroup="4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc\n")
    folder = tmp_path / "sys/fs/cgroup/cpu"  # in a container the host's path is not there
    machine(folder, **{"cpu.cfs_quota_us": "200000\n", "cpu.cfs_period_us": "100000\n"})
    assert hardware.physical_cores(tmp_path) == 2


MEMINFO = "MemTotal:       16777216 kB\nMemFree: 1048576 kB\nMemAvailable:   8388608 kB\n"


def test_memory_without_limits_is_the_machines(tmp_path: Path) -> None:
    machine(tmp_path, proc__meminfo=MEMINFO)
    assert hardware.memory_available_bytes(tmp_path) == 8 * GIB


def test_a_memory_limit_of_version_2_counts_without_droppable_cache(tmp_path: Path) -> None:
    machine(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/job\n")
    texts = {
        "memory.max": str(4 * GIB),
        "memory.current": str(3 * GIB),
        "memory.stat": f"anon {GIB}\ninactive_file {GIB}\n",
    }
    machine(tmp_path / "sys/fs/cgroup/job", **texts)
    machine(tmp_path / "sys/fs/cgroup", **{"memory.max": "max"})
    assert hardware.memory_available_bytes(tmp_path) == 2 * GIB


def test_a_memory_limit_of_version_1_counts(tmp_path: Path) -> None:
    machine(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="3:memory:/\n")
    texts = {"memory.limit_in_bytes": str(2 * GIB), "memory.usage_in_bytes": str(3 * GIB)}
    machine(tmp_path / "sys/fs/cgroup/memory", **texts)
    assert hardware.memory_available_bytes(tmp_path) == 0
    machine(tmp_path / "sys/fs/cgroup/memory", **{"memory.limit_in_bytes": str(2**63 - 4096)})
    assert hardware.memory_available_bytes(tmp_path) == 8 * GIB


def test_a_line_of_nvidia_smi_is_a_gpu() -> None:
    gpu = parse_gpu("NVIDIA H200, 580.95.05, 143771, 9.0")
    assert gpu == Gpu("NVIDIA H200", "580.95.05", 143771 << 20, (9, 0))
    assert gpu.problem is None
    assert parse_gpu("No devices were found") is None
    assert parse_gpu("a, b, [N/A], 9.0") is None


def test_a_gpu_says_why_it_cannot_be_used() -> None:
    assert "older than 580" in (Gpu("x", "535.1", GIB, (9, 0)).problem or "")
    assert "7.0 is below 7.5" in (Gpu("x", "590.1", GIB, (7, 0)).problem or "")


@pytest.mark.parametrize(
    ("answer", "count"), [("A, 580.1, 100, 8.6\nB, 580.1, 100, 8.6\n", 2), ("garbage\n", 0)]
)
def test_gpus_are_those_the_driver_lists(
    monkeypatch: pytest.MonkeyPatch, answer: str, count: int
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[0] == "nvidia-smi"
        return subprocess.CompletedProcess(command, 0, answer, "")

    monkeypatch.setattr(subprocess, "run", run)
    assert len(hardware.nvidia_gpus()) == count


@pytest.mark.parametrize(
    "error", [FileNotFoundError(), subprocess.TimeoutExpired("x", 1), PermissionError()]
)
def test_no_driver_or_a_broken_one_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    assert hardware.nvidia_gpus() == ()


@pytest.mark.parametrize(
    ("setting", "arch", "package", "driver", "target"),
    [
        ("auto", "x86_64", True, "580.1", "cuda"),
        ("auto", "x86_64", True, "535.1", "cpu"),
        ("auto", "x86_64", False, "580.1", "cpu"),
        ("auto", "arm64", True, "580.1", "cpu"),
        ("CPU", "x86_64", True, "580.1", "cpu"),
        ("CUDA", "arm64", False, "535.1", "cuda"),
    ],
)
def test_the_target_is_cuda_only_where_it_can_run_or_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    arch: str,
    package: bool,
    driver: str,
    target: str,
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: arch)
    monkeypatch.setattr(hardware, "_has_package", lambda _: package)
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: (Gpu("x", driver, GIB, (9, 0)),))
    assert hardware.target(setting) == target


def test_this_machine_has_cores_and_memory() -> None:
    assert 1 <= hardware.physical_cores() <= hardware.logical_cores()
    assert hardware.memory_available_bytes() > 0


def test_the_machine_is_described_by_what_decides_speed_and_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = machine(
        tmp_path,
        proc__cpuinfo="flags\t\t: fpu avx2 avx512f avx_vnni avx512_vnni\nbugs : x\n",
        proc__meminfo=f"MemTotal:       {16 * GIB // 1024} kB\n",
    )
    assert hardware.instruction_sets(root) == ("AVX2", "AVX-512", "VNNI")
    assert hardware.memory_total_bytes(root) == 16 * GIB
    arm = machine(tmp_path / "arm", proc__cpuinfo="Features\t: fp asimd asimddp i8mm\n")
    assert hardware.instruction_sets(arm) == ("DotProd", "I8MM")
    assert hardware.memory_total_bytes(arm) == 0
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(hardware, "instruction_sets", lambda: ("AVX2", "VNNI"))
    monkeypatch.setattr(hardware, "physical_cores", lambda: 1)
    monkeypatch.setattr(hardware, "memory_total_bytes", lambda: 8 * 10**9)
    assert hardware.describe() == "x86_64 with AVX2, VNNI, 1 core, 8 GB of memory"
    monkeypatch.setattr(hardware, "memory_total_bytes", lambda: 0)
    assert hardware.describe() == "x86_64 with AVX2, VNNI, 1 core"


@pytest.mark.parametrize(
    ("sets", "fast"),
    [
        ((), False),
        (("AVX2", "AVX-512"), False),
        (("AVX2", "VNNI"), True),
        (("AVX2", "AVX-512", "AMX"), True),
        (("DotProd",), False),
        (("DotProd", "I8MM"), True),
    ],
)
def test_integers_are_fast_with_vnni_amx_or_i8mm(
    sets: tuple[str, ...], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "instruction_sets", lambda: sets)
    assert hardware.multiplies_integers() == fast


def test_a_container_has_the_memory_of_its_control_group(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        proc__meminfo=f"MemTotal:       {16 * GIB // 1024} kB\n",
        proc__self__cgroup="0::/\n",
    )
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "sys/fs/cgroup/memory.max").write_text(str(2 * GIB))
    assert hardware.memory_total_bytes(root) == 2 * GIB

"""What this machine has: cores, memory, NVIDIA GPUs. Standard library only.

Limits of the process count, not those of the machine: CPU affinity, and the CPU and memory limits
of its control groups (containers), versions 1 and 2.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from .sizes import human_bytes

MIN_DRIVER = 580  # the first NVIDIA driver with CUDA 13
MIN_COMPUTE_CAPABILITY = (7, 5)

_INSTRUCTION_SETS = {  # flag in /proc/cpuinfo → its usual name
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "VNNI",
    "avx512_vnni": "VNNI",
    "amx_int8": "AMX",
    "asimddp": "DotProd",
    "i8mm": "I8MM",
    "sve": "SVE",
}
FAST_INTEGERS = ("VNNI", "AMX", "I8MM")
"""Instruction sets that multiply 8-bit integers several times faster than floats."""

_NO_LIMIT_BYTES = 1 << 60  # control groups of version 1 write "no limit" as a huge number


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU as its driver describes it."""

    name: str
    driver: str  # "580.95.05"
    memory_bytes: int
    compute_capability: tuple[int, int]

    @property
    def problem(self) -> str | None:
        """Why ONNX Runtime cannot use it, in words; None when it can."""
        driver_major = int(self.driver.partition(".")[0] or 0)
        if driver_major < MIN_DRIVER:
            return f"driver {self.driver} is older than {MIN_DRIVER}"
        if self.compute_capability < MIN_COMPUTE_CAPABILITY:
            found = ".".join(map(str, self.compute_capability))
            return f"compute capability {found} is below 7.5"
        return None


def target(execution_provider: str = "auto") -> str:
    """What to compile for: `cuda` or `cpu`.

    `execution_provider` is the setting: CPU and CUDA decide, auto means CUDA when a GPU can be
    used and ONNX Runtime for it is installed.
    """
    if execution_provider != "auto":
        return execution_provider.lower()
    if platform.machine().lower() not in ("x86_64", "amd64") or not _has_package("onnxruntime-gpu"):
        return "cpu"
    return "cuda" if any(gpu.problem is None for gpu in nvidia_gpus()) else "cpu"


def logical_cores(root: Path = Path("/")) -> int:
    """Logical processors this process may run on; a CPU quota counts, rounded up."""
    count = len(_allowed())
    quota = _cpu_quota(root)
    return max(1, min(count, math.ceil(quota)) if quota else count)


def physical_cores(root: Path = Path("/")) -> int:
    """Physical cores this process may run on; a CPU quota counts, rounded up."""
    if sys.platform == "darwin":
        fast = _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu")
        return int(fast or os.cpu_count() or 1)
    allowed = _allowed()
    cores: set[str] = set()
    for cpu in allowed:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        siblings = _read(topology / "thread_siblings_list")
        package = _read(topology / "physical_package_id")
        cores.add(f"{package}:{siblings}" if siblings else f"cpu{cpu}")
    quota = _cpu_quota(root)
    return max(1, min(len(cores), math.ceil(quota)) if quota else len(cores))


def memory_available_bytes(root: Path = Path("/")) -> int:
    """Memory this process can still take without swapping; caches that can be dropped count."""
    if sys.platform == "darwin":
        return _darwin_available()
    info = _meminfo(root)
    available = info.get("MemAvailable", info.get("MemFree", 0) + info.get("Cached", 0))
    return max(0, min([available, *(limit - used for limit, used in _memory_groups(root))]))


def memory_total_bytes(root: Path = Path("/")) -> int:
    """Memory this process may have at most; 0 where the system does not say."""
    if sys.platform == "darwin":
        return int(_sysctl("hw.memsize") or 0)
    total = _meminfo(root).get("MemTotal", 0)
    return min([total, *(limit for limit, _ in _memory_groups(root))])


def instruction_sets(root: Path = Path("/")) -> tuple[str, ...]:
    """What the processor can do that decides how fast matrices are: AVX2, AVX-512, VNNI, …"""
    if sys.platform == "darwin":
        known = {"hw.optional.arm.FEAT_I8MM": "I8MM", "hw.optional.arm.FEAT_DotProd": "DotProd"}
        return tuple(name for key, name in known.items() if _sysctl(key) == "1")
    text = _read(root / "proc/cpuinfo")
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return tuple(dict.fromkeys(name for flag, name in _INSTRUCTION_SETS.items() if flag in flags))


def multiplies_integers() -> bool:
    """Whether products of 8-bit integers are several times faster here than those of floats."""
    return any(name in FAST_INTEGERS for name in instruction_sets())


def describe() -> str:
    """This machine in words: processor, cores, memory."""
    sets = ", ".join(instruction_sets())
    cores = physical_cores()
    parts = [
        f"{platform.machine() or 'unknown processor'}{f' with {sets}' if sets else ''}",
        "1 core" if cores == 1 else f"{cores} cores",
    ]
    if total := memory_total_bytes():
        parts.append(f"{human_bytes(total)} of memory")
    return ", ".join(parts)


def nvidia_gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs whose driver answers; empty without one."""
    fields = "name,driver_version,memory.total,compute_cap"
    try:
        result = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ()  # no driver, or one that does not work: the same to us
    return tuple(gpu for line in result.stdout.splitlines() if (gpu := parse_gpu(line)))


def parse_gpu(line: str) -> Gpu | None:
    """One line of nvidia-smi's answer (name, driver, MiB, capability); None when it is not one."""
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != 4:
        return None
    name, driver, memory, capability = parts
    try:
        major, _, minor = capability.partition(".")
        return Gpu(name, driver, int(memory) * 2**20, (int(major), int(minor or 0)))
    except ValueError:
        return None


def _allowed() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _has_package(name: str) -> bool:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version(name))
    return False


def _meminfo(root: Path) -> dict[str, int]:
    """`/proc/meminfo` in bytes."""
    pairs = re.findall(r"^(\w+):\s+(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE)
    return {name: int(value) * 1024 for name, value in pairs}


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the process's control groups for `controller`, from its own to the top."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        folder = top / path.lstrip("/")
        while True:  # in a container the path may be the host's: then only the top is there
            if folder.is_dir():
                yield folder
            if folder == top or top not in folder.parents:
                break
            folder = folder.parent


def _cpu_quota(root: Path) -> float | None:
    """The tightest CPU limit in processors; None without one."""
    quotas: list[float] = []
    for folder in _groups(root, "cpu"):
        limit, _, period = _read(folder / "cpu.max").strip().partition(" ")
        if not limit:
            limit, period = (
                _read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
            )
        if limit.isdigit() and period.isdigit() and int(limit) and int(period):
            quotas.append(int(limit) / int(period))
    return min(quotas, default=None)


def _memory_groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that cannot be dropped) of each control group with a limit."""
    for folder in _groups(root, "memory"):
        for limit_name, used_name, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = (_read(folder / name).strip() for name in (limit_name, used_name))
            if limit.isdigit() and int(limit) < _NO_LIMIT_BYTES:
                stat = _read(folder / "memory.stat")
                match = re.search(rf"^{cache} (\d+)$", stat, re.MULTILINE)
                droppable = int(match[1]) if match else 0
                in_use = int(used) if used.isdigit() else 0
                yield int(limit), max(0, in_use - droppable)


def _darwin_available() -> int:
    output = _run(["vm_stat"])
    page = re.search(r"page size of (\d+) bytes", output)
    pages = re.findall(r"^Pages (free|inactive|purgeable|speculative):\s+(\d+)", output, re.M)
    return sum(int(count) for _, count in pages) * int(page[1] if page else 4096)


def _sysctl(name: str) -> str:
    return _run(["sysctl", "-n", name]).strip()


def _run(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout if result.returncode == 0 else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

"""What the numbers depend on: the hardware and the versions; and what /proc says of a process."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from inferstream.settings import cores

PACKAGES = ("aiokafka", "torch", "transformers", "sentence-transformers", "tokenizers", "numpy", "orjson")
BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def hardware() -> dict[str, str]:
    cpuinfo = _cpuinfo()
    flags = cpuinfo.get("flags", cpuinfo.get("Features", "")).split()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = {
        "cpu": cpuinfo.get("model name", platform.machine()),
        "cores": str(cores()),
        "bfloat16": ", ".join(flag for flag in BFLOAT16_FLAGS if flag in flags) or "not in hardware",
        "memory": f"{memory:.0f} GiB",
    }
    if gpu := _gpu():
        found["gpu"] = gpu
    return found


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware."""
    return hardware()["bfloat16"] != "not in hardware"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "kernel": platform.release()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries."""
    entries: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        entries.setdefault(name.strip(), value.strip())
    return entries


def _gpu() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip().splitlines()[0] if said.returncode == 0 and said.stdout.strip() else None


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far, all its threads, in seconds (resolution 10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def thread_cpu_seconds(thread_id: int) -> float:
    """CPU time of a thread of this process so far, in seconds; ``thread_id`` is the kernel's."""
    nanoseconds = Path(f"/proc/self/task/{thread_id}/schedstat").read_text().split()[0]
    return int(nanoseconds) / 1e9


def peak_rss(pid: int) -> int:
    """The most physical memory a process has held so far, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/{pid}/status has no VmHWM")

"""What this machine allows the process: cores and memory; and the kind of device it has."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from inferstream.settings.tree import Settings

HASH_MODEL = "builtin:hash"
DRIVER = ("dev/nvidiactl", "dev/nvidia0", "proc/driver/nvidia/version", "dev/dxg")  # the last in WSL


def cores(root: Path = Path("/")) -> int:
    """The cores this process may use: the smaller of its affinity and its control group's quota, at least 1.

    A quota of 2.5 cores counts as 2: a third thread would be throttled half of the time and hold up the rest.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return max(1, allowed if quota is None else min(allowed, int(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The CPU quota in cores of this process's control group or the tightest one above it; None without one.

    Reads version 2 (``cpu.max``) and version 1 (``cpu.cfs_quota_us``); where they are looked for, see
    :func:`_control_groups`.
    """
    quotas = (_quota(group) for group in _control_groups("cpu", root))
    return min((quota for quota in quotas if quota is not None), default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """The bytes of memory above which this process is killed; None where it cannot be told.

    The smallest of what the machine has, and of the limits of its control group and those above it: version 2
    (``memory.max``) or version 1 (``memory.limit_in_bytes``).
    """
    limits = [_memory_of_machine(root), *(_memory(group) for group in _control_groups("memory", root))]
    return min((limit for limit in limits if limit is not None), default=None)


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's control group and of those above it, in each place where they may lie.

    They are mounted at ``/sys/fs/cgroup`` below ``root``.  In a container the group's path may be that of the host,
    which is not mounted: then the mount's root is the group.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    base = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = {base, base / "unified"}
        elif controller in controllers.split(","):
            mounts = {base / controller, base / controllers}
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        if ".." in group.parts:  # a group outside of what this namespace sees
            group = PurePosixPath()
        for part in (group, *group.parents) if group.parts else (group,):
            yield from (mount / part for mount in mounts)


def _quota(group: Path) -> float | None:
    try:
        if (group / "cpu.max").exists():
            limit, period = (group / "cpu.max").read_text().split()
            return None if limit == "max" else int(limit) / int(period)
        limit_us = int((group / "cpu.cfs_quota_us").read_text())
        return None if limit_us <= 0 else limit_us / int((group / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _memory(group: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            return int((group / name).read_text())
        except (OSError, ValueError):  # not there, or "max"
            continue
    return None


def _memory_of_machine(root: Path) -> int | None:
    try:
        found = re.search(r"^MemTotal: +(\d+) kB$", (root / "proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024


def device_kind(settings: Settings, root: Path = Path("/")) -> str:
    """Which device the worker will use, for :func:`resolve`: ``hash``, ``cpu`` or ``cuda``.

    ``auto`` is ``cuda`` if torch can use a GPU.  torch is asked, which takes seconds, only where there is an NVIDIA
    driver.  Whether a GPU that was asked for can be had shows when the model is loaded: a settings file may be
    checked on another machine.
    """
    if settings.model.id == HASH_MODEL:
        return "hash"
    if settings.model.device != "auto":
        return settings.model.device.partition(":")[0]
    return "cuda" if any((root / path).exists() for path in DRIVER) and _torch_has_gpu() else "cpu"


def _torch_has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()

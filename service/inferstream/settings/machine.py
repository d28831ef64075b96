"""What settings derive from: the cores this process may use, and the kind of device."""

from __future__ import annotations

import os
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

    Reads version 2 (``cpu.max``) and version 1 (``cpu.cfs_quota_us``), mounted at ``/sys/fs/cgroup`` below
    ``root``.  In a container the group's path may be that of the host, which is not mounted: then the mount's
    root is the group.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    base = root / "sys/fs/cgroup"
    quotas: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            quotas += [quota for mount in (base, base / "unified") for quota in _quotas(mount, path)]
        elif "cpu" in controllers.split(","):
            mounts = {base / "cpu", base / controllers}
            quotas += [quota for mount in mounts for quota in _quotas(mount, path)]
    return min(quotas, default=None)


def _quotas(mount: Path, path: str) -> list[float]:
    group = PurePosixPath(path.lstrip("/"))
    if ".." in group.parts:  # a group outside of what this namespace sees
        group = PurePosixPath()
    groups = (group, *group.parents) if group.parts else (group,)
    return [quota for part in groups if (quota := _quota(mount / part)) is not None]


def _quota(group: Path) -> float | None:
    try:
        if (group / "cpu.max").exists():
            limit, period = (group / "cpu.max").read_text().split()
            return None if limit == "max" else int(limit) / int(period)
        limit_us = int((group / "cpu.cfs_quota_us").read_text())
        return None if limit_us <= 0 else limit_us / int((group / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError, ZeroDivisionError):
        return None


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

"""The machine under the measurement: what it is, whether it is idle, and what a tree of processes holds in memory."""

import os
import platform
import time
from pathlib import Path
from typing import Any

import psutil

IDLE_SHARE = 0.1


def facts() -> dict[str, Any]:
    """What a reader needs to judge absolute figures."""
    flags = _cpu_line("flags").split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
    return {
        "cpu": _cpu_line("model name") or platform.processor(),
        "cpus": os.cpu_count(),
        "features": [flag for flag in wanted if flag in flags],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def wait_idle(seconds: float) -> dict[str, Any]:
    """Wait, at most that long, until other work takes less than a tenth of the processors; what was seen at the end."""
    until = time.monotonic() + seconds
    while (busy := psutil.cpu_percent(interval=0.5) / 100) > IDLE_SHARE and time.monotonic() < until:
        continue
    return {"busy_before": round(busy, 3), "load_average": round(os.getloadavg()[0], 2)}


def memory(root: psutil.Process) -> dict[str, Any]:
    """Resident memory of all that a process started: shared pages once (PSS), and as each sees it (RSS)."""
    held: dict[str, float] = {}
    resident = 0
    for child in root.children(recursive=True):
        try:
            full, name = child.memory_full_info(), _label(child)
        except psutil.NoSuchProcess:
            continue
        held[name] = held.get(name, 0) + full.pss / 1e6
        resident += full.rss
    large = {name: round(size) for name, size in sorted(held.items()) if size >= 1}
    return {"pss_mb": round(sum(held.values())), "rss_mb": round(resident / 1e6), "processes_mb": large}


def _label(process: psutil.Process) -> str:
    """The module of `python -m`, else the program's name."""
    command = process.cmdline()
    module = command[command.index("-m") + 1] if "-m" in command[:-1] and "python" in command[0] else ""
    return module or process.name().split(":")[0]


def _cpu_line(name: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")

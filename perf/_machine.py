"""The machine: what it is, and the ceilings it was measured to have."""

from __future__ import annotations

import gc
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from _cells import DTYPES
from _timing import BRIEF, Effort, Spread, clock_for, interleave

import gssf_triton
from gssf_triton.kernels.devices import identify

ROOT = Path(__file__).resolve().parent.parent
#: Bytes of the buffer that is copied to measure the bandwidth: far beyond any cache.
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
#: Side of the square matrices whose product measures the matrix rate.
MATRIX_SIDE = {"cuda": 8192, "cpu": 2048}
#: Half precision has no fast product on many CPUs: a smaller one tells as much.
MATRIX_SIDE_CPU_HALF = 512
CEILING_SAMPLES = 5, 20
#: Of both, to see that it runs.
SMALL_BYTES, SMALL_SIDE = 2**16, 32
#: The commit of a copy of the checkout that has no git.
COMMIT_VARIABLE = "GSSF_COMMIT"


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_named(name: str | None) -> torch.device:
    """The device of this name, by default a GPU where there is one; a GPU has its number, which may be left out.

    Raises:
        ValueError: there is none to measure on.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device {device}: there is none to measure on")
    if device == torch.device("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return device


def synchronize(device: torch.device) -> None:
    """Wait for all that a GPU was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back all memory that nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def slug(device: torch.device) -> str:
    """The device's folder under perf/results."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu-{cores()}core"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe(device: torch.device) -> dict[str, Any]:
    """What must agree before two runs may be compared, and what explains them when they don't."""
    gpu = device.type == "cuda"
    driver = None
    if gpu:
        driver = torch.version.hip or _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = driver.splitlines()[0] if driver else None
    return {
        "device": {
            "type": device.type,
            "slug": slug(device),
            "name": torch.cuda.get_device_name(device) if gpu else _cpu_model(),
            "memory_bytes": torch.cuda.get_device_properties(device).total_memory if gpu else None,
            "capability": list(torch.cuda.get_device_capability(device)) if gpu else None,
        },
        "driver": driver,
        "cpu": {"name": _cpu_model(), "cores": cores(), "threads": torch.get_num_threads()},
        "system": f"{platform.system()} {platform.machine()}",
    }


def load() -> float | None:
    """Processes that wanted to run in the last minute: what else went on when a run began."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def versions() -> dict[str, str | None]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "gssf_triton": gssf_triton.__version__,
    }


def commit() -> dict[str, Any]:
    """The checkout's commit, and whether code differs from it; the results themselves are no code.

    A copy without git is told it by `COMMIT_VARIABLE`.
    """
    if told := os.environ.get(COMMIT_VARIABLE):
        return {"hash": told, "dirty": None}
    revision = _output("git", "rev-parse", "HEAD")
    changes = _output("git", "status", "--porcelain", "--", ".", ":!perf/results")
    return {"hash": revision, "dirty": None if revision is None else bool(changes)}


def assembler(device: torch.device) -> dict[str, Any] | None:
    """The program that makes machine code of what Triton compiles for this device."""
    arch = identify(device).arch
    if not arch.startswith("sm_"):
        return None
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(int(arch.removeprefix("sm_")))
    return {"path": tool.path, "version": tool.version}


def copy_bandwidth(device: torch.device, effort: Effort, size: int) -> Spread:
    """Bytes a second of a copy, reads and writes counted (a CPU's reads of the lines it is to write are not)."""
    source = torch.randint(0, 2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    (samples,) = interleave({"copy": lambda: target.copy_(source)}, clock_for(device, effort), effort).values()
    return Spread.of([2 * source.numel() * 4 / s.seconds for s in samples], largest_is_best=True)


def matrix_rate(dtype: str, device: torch.device, effort: Effort, n: int) -> Spread:
    """FLOP/s of the library's square product."""
    x, y = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in range(2))
    (samples,) = interleave({"product": lambda: x @ y.T}, clock_for(device, effort), effort).values()
    return Spread.of([2 * n**3 / s.seconds for s in samples], largest_is_best=True)


def ceilings(device: torch.device, dtypes: list[str], seconds: float, *, small: bool = False) -> dict[str, Any]:
    """The roofline's two lines for each dtype, each from samples of about `seconds`; `small`: to see that it runs."""
    effort = BRIEF if small else Effort(*CEILING_SAMPLES, seconds)

    def side(dtype: str) -> int:
        half_on_cpu = device.type == "cpu" and dtype != "fp32"
        return SMALL_SIDE if small else MATRIX_SIDE_CPU_HALF if half_on_cpu else MATRIX_SIDE[device.type]

    size = SMALL_BYTES if small else COPY_BYTES[device.type]
    return {
        "copy_bytes_per_second": copy_bandwidth(device, effort, size).as_dict(),
        "flops_per_second": {dtype: matrix_rate(dtype, device, effort, side(dtype)).as_dict() for dtype in dtypes},
    }


def higher(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Of two measurements of the ceilings, each line from the one that reached higher."""

    def pick(x: dict[str, Any], y: dict[str, Any]) -> dict[str, Any]:
        return max(x, y, key=lambda spread: float(spread["best"]))

    rates = {**one["flops_per_second"], **other["flops_per_second"]}
    for dtype in one["flops_per_second"].keys() & other["flops_per_second"].keys():
        rates[dtype] = pick(one["flops_per_second"][dtype], other["flops_per_second"][dtype])
    copies = pick(one["copy_bytes_per_second"], other["copy_bytes_per_second"])
    return {"copy_bytes_per_second": copies, "flops_per_second": rates}

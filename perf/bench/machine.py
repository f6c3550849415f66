"""The machine: what it is, and the ceilings it was measured to have."""

from __future__ import annotations

import argparse
import gc
import os
import platform
from typing import Any

import torch

import gssf_triton
from bench.cells import DTYPES
from bench.timing import BRIEF, Effort, clock_for, interleave, spread
from gssf_triton.autotune import tuner
from gssf_triton.kernels import devices

#: Bytes of the buffer that is copied to measure the bandwidth: far beyond any cache.
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
#: Side of the square matrices whose product measures the matrix rate.
MATRIX_SIDE = {"cuda": 8192, "cpu": 2048}
#: In half precision on a CPU: many have no fast product.
MATRIX_SIDE_CPU_HALF = 512
CEILING_SAMPLES = 5, 20
#: Of both, to see that it runs.
SMALL_BYTES, SMALL_SIDE = 2**16, 32
#: The commit of a copy of the checkout that has no git.
COMMIT_VARIABLE = "GSSF_COMMIT"


def device_named(name: str | None, parser: argparse.ArgumentParser) -> torch.device:
    """The device of this name, by default a GPU where there is one, made the current one; a refusal of any other.

    A GPU has its number, which may be left out.
    """
    gpu = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if gpu else "cpu"))
        if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not gpu):
            parser.error(f"--device {device}: there is none to measure on")
        if device == torch.device("cuda"):
            device = torch.device("cuda", torch.cuda.current_device())
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except RuntimeError as error:
        parser.error(str(error).splitlines()[0])
    return device


def synchronize(device: torch.device) -> None:
    """Wait for all that a GPU has queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back all memory that nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe(device: torch.device) -> dict[str, Any]:
    """The device, the versions and the commit: two runs may be compared only where they agree."""
    gpu = device.type == "cuda"
    known, cpu, cores = devices.identify(device), devices.cpu_model(), devices.cores()
    return {
        "device": {
            "type": device.type,
            "slug": known.slug if gpu else f"cpu-{cores}core",  # its folder under perf/results
            "name": known.name if gpu else cpu,
            "memory_bytes": torch.cuda.get_device_properties(device).total_memory if gpu else None,
            "capability": list(torch.cuda.get_device_capability(device)) if gpu else None,
        },
        "driver": devices.driver(known) if gpu else None,
        "cpu": {"name": cpu, "cores": cores, "threads": torch.get_num_threads()},
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": devices.package_version("triton"),
            "gssf_triton": gssf_triton.__version__,
        },
        "commit": commit(),
    }


def load() -> float | None:
    """Processes that wanted to run in the last minute: what else went on when a run began."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def commit() -> dict[str, Any]:
    """The checkout's commit, or `COMMIT_VARIABLE`, and whether code differs from it, results aside."""
    revision = os.environ.get(COMMIT_VARIABLE)
    if revision or not (revision := tuner.commit()):
        return {"hash": revision or None, "dirty": None}
    return {"hash": revision, "dirty": bool(tuner.git("status", "--porcelain", "--", ".", ":!perf/results"))}


def assembler(device: torch.device) -> dict[str, Any] | None:
    """The program that makes machine code of what Triton compiles for this device."""
    arch = devices.identify(device).arch
    if not arch.startswith("sm_"):
        return None
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(int(arch.removeprefix("sm_")))
    return {"path": tool.path, "version": tool.version}


def copy_bandwidth(device: torch.device, effort: Effort, size: int) -> dict[str, Any]:
    """Bytes a second of a copy, reads and writes counted (a CPU's reads of the lines it is to write are not)."""
    source = torch.randint(0, 2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    (samples,) = interleave({"copy": lambda: target.copy_(source)}, clock_for(device, effort), effort).values()
    return spread([2 * source.numel() * 4 / s.seconds for s in samples], largest_is_best=True)


def matrix_rate(dtype: str, device: torch.device, effort: Effort, n: int) -> dict[str, Any]:
    """FLOP/s of the library's square product."""
    x, y = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in range(2))
    (samples,) = interleave({"product": lambda: x @ y.T}, clock_for(device, effort), effort).values()
    return spread([2 * n**3 / s.seconds for s in samples], largest_is_best=True)


def ceilings(device: torch.device, dtypes: list[str], seconds: float, *, small: bool = False) -> dict[str, Any]:
    """The roofline's two lines for each dtype, each from samples of about `seconds`; `small`: to see that it runs."""
    effort = BRIEF if small else Effort(*CEILING_SAMPLES, seconds)

    def side(dtype: str) -> int:
        half_on_cpu = device.type == "cpu" and dtype != "fp32"
        return SMALL_SIDE if small else MATRIX_SIDE_CPU_HALF if half_on_cpu else MATRIX_SIDE[device.type]

    size = SMALL_BYTES if small else COPY_BYTES[device.type]
    return {
        "copy_bytes_per_second": copy_bandwidth(device, effort, size),
        "flops_per_second": {dtype: matrix_rate(dtype, device, effort, side(dtype)) for dtype in dtypes},
    }


def higher(one: dict[str, Any] | None, other: dict[str, Any]) -> dict[str, Any]:
    """Of two measurements of the ceilings, each line from the one that reached higher."""
    if one is None:
        return other
    rates = dict(other["flops_per_second"])
    for dtype, rate in one["flops_per_second"].items():
        rates[dtype] = _higher(rate, rates.get(dtype, rate))
    copies = _higher(one["copy_bytes_per_second"], other["copy_bytes_per_second"])
    return {"copy_bytes_per_second": copies, "flops_per_second": rates}


def _higher(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return max(one, other, key=lambda spread: float(spread["best"]))

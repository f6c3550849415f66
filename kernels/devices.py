"""Which device a table is for. Nothing here touches a GPU before it is asked about one."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import torch


@dataclass(frozen=True)
class Device:
    """A device as tables know it.

    Attributes:
        slug: Its name as a file name has it: "nvidia-h200", "cpu-8" (by threads), "interpreter".
        name: Its name as its maker has it.
        arch: What configurations are chosen by: "sm_90", "gfx942", "interpreter", "cpu".
    """

    slug: str
    name: str
    arch: str


def slug(name: str) -> str:
    """`name` in lower case, runs of anything but letters, digits and dots as one hyphen."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


@cache
def _gpu(index: int) -> Device:
    name = torch.cuda.get_device_name(index)
    if torch.version.hip is not None:
        arch = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(index)
        arch = f"sm_{major}{minor}"
    return Device(slug(name), name, arch)


@cache
def cpu_model() -> str:
    """The processor by its maker's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


@cache
def _cpu(threads: int) -> Device:
    return Device(f"cpu-{threads}", cpu_model(), "cpu")


INTERPRETER = Device("interpreter", "Triton's interpreter", "interpreter")


def identify(device: torch.device) -> Device:
    """The device that Triton's kernels run on for tensors of `device`: a GPU, or the interpreter."""
    if device.type != "cuda":
        return INTERPRETER
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


def identify_for_torch(device: torch.device) -> Device:
    """The device that torch itself runs on: a GPU, or the CPU by its number of threads.

    Example:
        >>> import torch
        >>> from gssf_triton.kernels.devices import identify_for_torch
        >>> identify_for_torch(torch.device("cpu")).slug == f"cpu-{torch.get_num_threads()}"
        True
    """
    if device.type == "cuda":
        return identify(device)
    if device.type == "cpu":
        return _cpu(torch.get_num_threads())
    return Device(device.type, device.type, device.type)


@cache
def _kernel_driver() -> str | None:
    """The GPU driver's version by /proc or /sys; no GPU is touched."""
    for path, pattern in (
        ("/proc/driver/nvidia/version", r"Kernel Module\s+(?:for \S+\s+)?(\d[\d.]*)"),
        ("/sys/module/amdgpu/version", r"(\S+)"),
    ):
        try:
            found = re.search(pattern, Path(path).read_text(encoding="utf-8"))
        except OSError:
            continue
        if found:
            return found.group(1)
    return None


def driver(device: Device) -> str:
    """What runs below torch on `device`: the GPU driver's version, or the processor's model for a CPU."""
    if device.arch in ("cpu", "interpreter"):
        return cpu_model()
    return _kernel_driver() or str(torch.version.hip or torch.version.cuda or "unknown")


def package_version(name: str) -> str:
    """The version of an installed package, "none" where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

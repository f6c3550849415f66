"""The steps of gpu_check.py that are programs of their own, and all steps in their order."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool

from bench import ROOT, processes
from bench.check.errors import Finding, finding
from bench.check.steps import Machine, determinism, errors, graphs, large, launched

#: Processes that compile.
COMPILERS = 14
#: Calls whose kernels read back what they wrote: what a race would show in.
READ_BACK = ("transform", "pairwise_sim, one pass", "topk")


def _check(machine: Machine, *arguments: str, calls: tuple[str, ...] = ()) -> list[str]:
    """This check as a program of its own, of these calls alone where there are any, which keeps nothing."""
    program = str(ROOT / "perf/gpu_check.py")
    command = [sys.executable, program, "--device", str(machine.device), "--out", os.devnull, *arguments]
    chosen = calls or machine.names
    return [*command, "--calls", *chosen] if chosen else command


def compiled(machine: Machine) -> Iterator[Finding]:
    """The kernels of the steps to come, compiled by several processes: one would take minutes."""
    jobs = min(COMPILERS, os.cpu_count() or 1, len(machine.calls))
    # Sanitizers run over small inputs, which are specialised otherwise.
    steps = [["errors", "launched", "--small"]] if machine.small else [["errors"], ["launched", "--small"]]
    parts = [_check(machine, "--only", *step, "--part", f"{i}/{jobs}") for step in steps for i in range(jobs)]
    try:
        with ThreadPool(jobs) as pool:
            results = pool.map(lambda part: processes.output(part, machine.deadline - time.monotonic(), {}), parts)
    finally:
        processes.kill_all()
    # Wrong results are reported by the steps to come; a program that ends without a summary broke.
    broken = [
        processes.tail(output) for _, output in results if not re.search(r"^(errors|launched) ", output, re.MULTILINE)
    ]
    yield finding("compiled", not broken, processes=len(parts), broken=broken[:3])


def _sanitized(tool: str, calls: tuple[str, ...] = ()) -> Callable[[Machine], Iterator[Finding]]:
    def step(machine: Machine) -> Iterator[Finding]:
        program = shutil.which("compute-sanitizer")
        if program is None:
            yield finding(tool, False, reason="compute-sanitizer is not installed")
            return
        launch_all = _check(machine, "--only", "launched", "--small", calls=calls)
        # Compiling inside a sanitizer takes as many times as long as everything else does there.
        done, output = processes.output(launch_all, machine.left, {})
        if done != 0:
            last = processes.tail(output)
            yield finding(tool, False, reason="the launches fail without it", exit_status=done, last=last)
            return
        command = [program, "--tool", tool, "--error-exitcode", "9"]
        if tool == "memcheck":
            # torch asks the driver for what it may not have, and goes on without: such errors are no kernel's.
            command += ["--report-api-errors", "no"]
        command += launch_all
        # Without torch's cache every tensor is an allocation of its own, so that reading past one is noticed.
        done, output = processes.output(command, machine.left, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        if "Device not supported" in output:
            yield finding(tool, False, reason="compute-sanitizer does not work here", exit_status=done)
            return
        found = re.findall(r"^=+ *((?:Invalid|Error|Warning|.*hazard).*)", output, flags=re.MULTILINE)
        reports = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
        yield finding(tool, done == 0, exit_status=done, reports=reports or processes.tail(output), found=found[:10])

    step.__doc__ = f"compute-sanitizer's {tool} over one launch of every kernel{' of these calls' if calls else ''}."
    return step


memcheck, racecheck = _sanitized("memcheck"), _sanitized("racecheck", READ_BACK)


def goals(machine: Machine) -> Iterator[Finding]:
    """The goals' cells beside their peers: perf/sweep.py's suite of that name, whose run lies beside this check's."""
    out = machine.folder / "goals.json"
    command = [sys.executable, str(ROOT / "perf/sweep.py"), "--suite", "goals", "--no-plots"]
    # A cell that was begun goes on beyond the limit.
    command += ["--time-limit", f"{machine.left * 0.8:.0f}", "--device", str(machine.device), "--out", str(out)]
    if machine.small:
        command += ["--small", "--contenders", "gssf"]
    done, output = processes.output([*command, "--resume"], machine.left, {})
    yield finding("goals", done == 0, exit_status=done, last=processes.tail(output, 40))


@dataclass(frozen=True)
class Step:
    """What it does, the seconds it may take beyond what those before it left over, and whether it needs a GPU."""

    run: Callable[[Machine], Iterator[Finding]]
    seconds: float
    needs_gpu: bool = False


#: The most telling first. `launched` is what a sanitizer is run over, and not part of a whole check.
STEPS: dict[str, Step] = {
    "compiled": Step(compiled, 50, needs_gpu=True),
    "errors": Step(errors, 20),
    "large": Step(large, 30, needs_gpu=True),
    "determinism": Step(determinism, 20),
    "memcheck": Step(memcheck, 75, needs_gpu=True),
    "racecheck": Step(racecheck, 45, needs_gpu=True),
    "goals": Step(goals, 120, needs_gpu=True),
    "graphs": Step(graphs, 15, needs_gpu=True),
    "launched": Step(launched, 30),
}
WHOLE = tuple(name for name in STEPS if name != "launched")

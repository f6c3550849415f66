"""The second program on a GPU, in under six and a half minutes: what only a GPU can show once first_run.py was right.

    python perf/gpu_check.py                     # into perf/results/DEVICE/gpu_check.json; a CPU's into runs/
    python perf/gpu_check.py --only errors large
    python perf/gpu_check.py --resume            # the steps that a run cut short did not finish
    python perf/gpu_check.py --assembler PATH    # Triton's kernels by another ptxas
    TRITON_INTERPRET=1 python perf/gpu_check.py --device cpu    # what needs no GPU, in Triton's interpreter

The steps, the most telling first: the kernels compiled; errors of every function in fp32, TF32, fp16 and bf16 against
the contract, or, of chains of products, against wider bounds; S, features and searches past 2³¹ entries; the same bits
from 100 repeats under load; compute-sanitizer's memcheck over a launch of every kernel, and its racecheck over those
that read back what they wrote; the goals' cells beside their peers (goals.json, a run of sweep.py); forward and
backward captured in CUDA graphs. Nothing need be installed. The file is rewritten after each step. Exit status: 0, or 1
where something failed, 2 for arguments that don't fit, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.dont_write_bytecode = True  # before anything of the checkout is imported

from bench import ROOT, checkout, results
from bench.check.calls import CALLS
from bench.check.programs import STEPS, WHOLE
from bench.check.steps import Machine
from bench.machine import assembler, device_named
from gssf_triton import console
from gssf_triton.command.usage import UsageError, check_output
from gssf_triton.progress import bar as progress_bar
from gssf_triton.storage import replaceable

#: Seconds that a run may take.
BUDGET = 380.0
#: What a run that goes on must have in common with the one before.
SAME = ("device", "driver", "versions", "commit", "assembler")
#: Where a check without a GPU is written, which is not kept with the results.
WITHOUT_GPU = ROOT / "runs" / "gpu_check.json"


def run_step(name: str, machine: Machine) -> dict[str, Any]:
    """A step's findings, and whether all are as they should be; a step that breaks off keeps what it had."""
    step = STEPS[name]
    if step.needs_gpu and machine.kind != "cuda":
        return {"status": "needs a GPU", "findings": []}
    if machine.left < 1:
        return {"status": "no time left", "findings": []}
    started = time.monotonic()
    findings: list[dict[str, Any]] = []
    status = ""
    try:
        for found in step.run(machine):
            findings.append(found)
            if machine.left <= 0:
                status = "no time left"
                break
    except Exception as error:  # the next steps still run
        status = f"{type(error).__name__}: {error}"
    status = status or ("ok" if all(found["ok"] for found in findings) else "failed")
    return {"status": status, "seconds": round(time.monotonic() - started, 1), "findings": findings}


def summary(check: dict[str, Any]) -> str:
    """A line a step, and one for each finding that is not as it should be."""
    lines = []
    for name, step in check["steps"].items():
        good = sum(found["ok"] for found in step["findings"])
        lines.append(f"{name:16} {step['status']:12} {good} of {len(step['findings'])}")
        lines += [f"    {found}" for found in step["findings"] if not found["ok"]]
    return "\n".join(lines)


def failed(check: dict[str, Any]) -> bool:
    return any(step["status"] not in ("ok", "needs a GPU") for step in check["steps"].values())


def _part(text: str) -> tuple[int, int]:
    i, n = (int(number) for number in text.split("/"))
    if not 0 <= i < n:
        raise ValueError(text)
    return i, n


def main(argv: list[str] | None = None) -> int:
    console.ready()
    p = argparse.ArgumentParser(prog="perf/gpu_check.py", description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--device", help="cpu, cuda, … (default: a GPU where there is one)")
    p.add_argument("--only", nargs="+", choices=list(STEPS), default=WHOLE, metavar="STEP", help="these steps")
    p.add_argument("--calls", nargs="+", choices=[call.name for call in CALLS], default=(), help="these calls alone")
    p.add_argument("--out", type=Path, metavar="JSON", help="default: perf/results/DEVICE/gpu_check.json")
    p.add_argument("--resume", action="store_true", help="keep the steps of the file that went well")
    p.add_argument("--small", action="store_true", help="inputs as small as the interpreter's")
    p.add_argument(
        "--assembler", type=checkout.assembled_with, default={}, metavar="PATH",
        help="the ptxas that Triton's kernels are assembled with",
    )  # fmt: skip
    p.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="the calls of the I-th of N parts")
    p.add_argument(
        "--budget", type=float, default=BUDGET,
        help="seconds in all, from which the steps have theirs (default: %(default)g)",
    )  # fmt: skip
    args = p.parse_args(argv)
    checkout.keep_clean()
    os.environ |= checkout.REPEATABLE | args.assembler
    device = device_named(args.device, p)
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        p.error("without a GPU the kernels run in Triton's interpreter: set TRITON_INTERPRET=1")
    # A shell that starts this in the background has it ignore interrupts, and all that it starts in turn; programs
    # whose time is up are interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    check = results.new("gpu_check", device, assembler=assembler(device), steps={})
    usual = results.RESULTS / check["device"]["slug"] / "gpu_check.json" if device.type == "cuda" else WITHOUT_GPU
    out = args.out or usual
    end = time.monotonic() + args.budget
    try:
        check_output("--out", out)
    except UsageError as error:
        p.error(str(error))
    keeps = out != Path(os.devnull)
    if keeps and not replaceable(out):
        p.error(f"--out: {out} is no file, which is rewritten after each step")
    machine = Machine(device, end, args.small, args.part, tuple(args.calls), folder=out.parent)
    if args.resume and out.exists():
        try:
            held = results.read(out, ("steps", *SAME))
        except ValueError as error:
            p.error(str(error))
        if reasons := results.differences(held, check, SAME):
            p.error(f"--resume: {out} is another run:\n  " + "\n  ".join(reasons))
        check["steps"] = {name: step for name, step in held["steps"].items() if step["status"] == "ok"}
    try:
        with progress_bar([name for name in args.only if name not in check["steps"]], unit="step") as bar:
            limit = time.monotonic()
            for name in bar:
                bar.set_description(name)
                # A step alone has all the time there is; of several none takes what those to come need.
                limit = end if len(args.only) == 1 else limit + STEPS[name].seconds * args.budget / BUDGET
                check["steps"][name] = run_step(name, replace(machine, deadline=min(limit, end)))
                if keeps:
                    results.write(out, check)
    except KeyboardInterrupt:
        print(f"interrupted; the finished steps are in {out}, --resume goes on", file=sys.stderr)
        return 130
    print(summary(check))
    print(out)
    return int(failed(check))


if __name__ == "__main__":
    sys.exit(main())

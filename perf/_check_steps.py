"""The steps of gpu_check.py. Each yields findings, rows of a table, that it has as soon as it has them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _check_calls import CALLS, KERNELS, Problem, launches
from _machine import slug
from _operation import FLOOR, FLOOR_TF32, relative_error
from torch import Tensor

import gssf_triton

ROOT = Path(__file__).resolve().parent.parent
Finding = dict[str, Any]

#: (numerics, dtype of the features, float32 precision, the contract's largest error).
NUMERICS = (
    ("fp32", torch.float32, "highest", FLOOR["fp32"]),
    ("tf32", torch.float32, "high", FLOOR_TF32),
    ("fp16", torch.float16, "highest", FLOOR["fp16"]),
    ("bf16", torch.bfloat16, "highest", FLOOR["bf16"]),
)
REPEATS = {"cuda": 100, "cpu": 3}
#: Of one suite of the sweep.
SWEEP_SECONDS = 50.0
#: Rows and columns of a large result that are held to float64.
PROBED = 64


@dataclass(frozen=True)
class Machine:
    """Where the steps run, and until when (`time.monotonic()`); `small`: on inputs as small as the interpreter's."""

    device: torch.device
    deadline: float
    small: bool = False

    @property
    def kind(self) -> str:
        return self.device.type

    @property
    def left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())


@contextmanager
def precision(name: str) -> Iterator[None]:
    """torch.set_float32_matmul_precision for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def finding(name: str, ok: bool, **facts: Any) -> Finding:
    return {"name": name, "ok": ok, **facts}


def errors(machine: Machine) -> Iterator[Finding]:
    """Every call against the torch backend in float64, which the tests hold to the definition, in every numerics."""
    for name, dtype, setting, bound in NUMERICS:
        for seed, call in enumerate(CALLS):
            problem = Problem.make(call, machine.device, dtype, seed)
            exact = problem.double().results("torch")
            with precision(setting):
                found = problem.results("triton")
            if call.exact:
                worst, where = float((found["out"] != exact["out"]).double().mean()), "out"
            else:
                worst, where = max((relative_error(found[part], exact[part]), part) for part in found)
            yield finding(
                f"{call.name}, {name}", worst <= (0 if call.exact else bound), error=worst, of=where,
                bound=0 if call.exact else bound,
            )  # fmt: skip


def launched(machine: Machine) -> Iterator[Finding]:
    """One launch at least of every kernel: what a sanitizer is run over."""
    with launches() as seen:
        for seed, call in enumerate(CALLS):
            results = Problem.make(call, machine.device, torch.float32, seed, machine.small).results("triton")
            finite = all(bool(torch.isfinite(x).all()) for x in results.values())
            yield finding(call.name, finite, kernels=sorted(seen))
    yield finding("every kernel", seen == set(KERNELS), missing=sorted(set(KERNELS) - seen))


def determinism(machine: Machine) -> Iterator[Finding]:
    """The same bits from every repeat while another stream keeps the device busy."""
    for seed, call in enumerate(CALLS):
        problem = Problem.make(call, machine.device, torch.bfloat16 if machine.kind == "cuda" else torch.float32, seed)
        first = problem.results("triton")
        differing = 0
        with _load(machine.device):
            for _ in range(REPEATS[machine.kind] - 1):
                again = problem.results("triton")
                # NaN equals NaN here: the question is the bits.
                differing += any(not torch.equal(_bits(first[part]), _bits(again[part])) for part in first)
        yield finding(call.name, differing == 0, repeats=REPEATS[machine.kind], differing=differing)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8) if x.dim() else x.view(1).view(torch.uint8)


@contextmanager
def _load(device: torch.device) -> Iterator[None]:
    """Products on a stream of their own for as long as this lasts, enough of them queued at a time."""
    if device.type != "cuda":
        yield
        return
    stream, x = torch.cuda.Stream(device), torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    with torch.cuda.stream(stream):
        for _ in range(2000):
            x = (x @ x).clamp_(-1, 1)
    yield
    torch.cuda.synchronize(device)


def graphs(machine: Machine) -> Iterator[Finding]:
    """Forward and backward captured in a CUDA graph, replayed on other inputs: the eager call's bits."""
    for seed, call in enumerate(CALLS):
        problem = Problem.make(call, machine.device, torch.bfloat16, seed)
        other = Problem.make(call, machine.device, torch.bfloat16, seed + 1000)
        try:
            replayed = _replay(problem, other)
        except RuntimeError as error:  # a capture that fails is a finding, not the end of the check
            torch.cuda.synchronize(machine.device)
            yield finding(call.name, False, reason=str(error).splitlines()[0])
            continue
        eager = other.results("triton")
        unequal = [part for part in eager if not torch.equal(_bits(eager[part]), _bits(replayed[part]))]
        yield finding(call.name, not unequal, unequal=unequal)


def _replay(problem: Problem, other: Problem) -> dict[str, Tensor]:
    """`problem` captured, then replayed with `other`'s numbers in its tensors."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compilation, the allocator and the libraries' handles settle outside the capture
            problem.results("triton")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.results("triton")
    with torch.no_grad():
        for mine, theirs in ((problem.leaves, other.leaves), (problem.fixed, other.fixed)):
            for name, x in mine.items():
                x.copy_(theirs[name])
    graph.replay()
    torch.cuda.synchronize()
    return captured


def large(machine: Machine) -> Iterator[Finding]:
    """Past 2³¹ entries: S and its gradient, the features alone, a search, and a loss whose S would have as many."""
    bf16, device = torch.bfloat16, machine.device
    D, B = 256, 32
    side = 46_400  # side² = 2.15 · 10⁹ > 2³¹
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = bf16) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    W = {"W_diag": normal(D, dtype=torch.float32), "W_blocks": normal(D // B, B, B, dtype=torch.float32) / B**0.5}
    exact_W = {name: w.double() for name, w in W.items()}
    last = torch.arange(side - PROBED, side, device=device)

    a, b = normal(side, D).requires_grad_(), normal(side, D)
    S = gssf_triton.pairwise_sim(a, b, **W, backend="triton")
    exact = gssf_triton.pairwise_sim(a[last].double(), b[last].double(), **exact_W, backend="torch")
    error = relative_error(S[-PROBED:, -PROBED:], exact)
    yield finding("S of 46,400 × 46,400", error <= FLOOR["bf16"], error=error, entries=S.numel())
    dS = torch.zeros_like(S)
    dS[:, -PROBED:] = normal(side, PROBED)
    (da,) = torch.autograd.grad(S, a, dS)
    exact = gssf_triton.transform(dS[last, -PROBED:].double() @ b[last].double(), **exact_W, side="b", backend="torch")
    error = relative_error(da[last], exact)
    yield finding("its gradient's last rows", error <= FLOOR["bf16"], error=error)
    del S, dS, da, exact

    rows = 2**31 // D + 1000
    x = normal(rows, D)
    few = normal(PROBED, D)
    S = gssf_triton.pairwise_sim(few, x, **W, backend="triton")
    exact = gssf_triton.pairwise_sim(few.double(), x[-PROBED:].double(), **exact_W, backend="torch")
    error = relative_error(S[:, -PROBED:], exact)
    yield finding("features past 2³¹ numbers", error <= FLOOR["bf16"], error=error, rows=rows)
    del S
    x[-1] = 40 * few[0]
    found = gssf_triton.topk(few[:1], x, torch.ones(D, device=device), k=1, backend="triton")[1]
    yield finding("topk finds their last row", int(found) == rows - 1, found=int(found), wanted=rows - 1)
    del x

    N = 65_536
    a, b = normal(N, D), normal(N, D)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    options: dict[str, Any] = {"logit_scale": 20.0, "normalize": True}
    loss = gssf_triton.info_nce(a, b, **W, **options, backend="triton")
    peak = torch.cuda.max_memory_allocated(device) - before
    held = gssf_triton.info_nce(a.float(), b.float(), **W, **options, backend="torch")
    error = relative_error(loss.double(), held.double())
    yield finding("info_nce at 65,536 pairs", error <= FLOOR["bf16"], error=error, mib=peak // 2**20)


def _sanitized(tool: str) -> Callable[[Machine], Iterator[Finding]]:
    def step(machine: Machine) -> Iterator[Finding]:
        program = shutil.which("compute-sanitizer")
        if program is None:
            yield finding(tool, False, reason="compute-sanitizer is not installed")
            return
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "perf/gpu_check.py"]
        # A sanitized kernel runs tens of times as long.
        command += ["--only", "launched", "--small", "--out", os.devnull]
        # Without torch's cache every tensor is an allocation of its own, so that reading past one is noticed.
        done, output = _output(command, machine.left, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        reports = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
        yield finding(tool, done == 0, exit_status=done, reports=reports or output.splitlines()[-5:])

    step.__doc__ = f"compute-sanitizer's {tool} over one launch of every kernel."
    return step


memcheck, racecheck = _sanitized("memcheck"), _sanitized("racecheck")


def _output(command: list[str], seconds: float, environment: dict[str, str]) -> tuple[int | None, str]:
    """Exit status, None where the time was up, and what was printed."""
    environment = os.environ | environment
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, text=True, timeout=max(1.0, seconds), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        text = late.stdout or b""
        return None, text.decode(errors="replace") if isinstance(text, bytes) else text
    return done.returncode, done.stdout


def sweep(suite: str) -> Callable[[Machine], Iterator[Finding]]:
    def step(machine: Machine) -> Iterator[Finding]:
        limit = min(machine.left - 5, SWEEP_SECONDS)
        command = [sys.executable, "perf/sweep.py", "--suite", suite, "--time-limit", f"{limit:.0f}"]
        out = ROOT / "perf/results" / slug(machine.device) / f"{suite}.json"
        command += ["--device", str(machine.device), "--out", str(out)]
        done, output = _output(command, machine.left, {})
        yield finding(f"sweep, {suite}", done == 0, exit_status=done, last=output.splitlines()[-3:])

    step.__doc__ = f"perf/sweep.py's suite {suite}, as much of it as SWEEP_SECONDS take."
    return step


def tests(machine: Machine) -> Iterator[Finding]:
    """The whole test suite, its kernels on this device."""
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=50", "-p", "no:cacheprovider", "-n", "auto"]
    # What the sweeps take is theirs.
    done, output = _output(command, machine.left - 3 * SWEEP_SECONDS, {})
    counts = re.findall(r"(\d+) (passed|failed|errors?|skipped)", output.splitlines()[-1] if output else "")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, flags=re.MULTILINE)
    yield finding(
        "pytest", done == 0, exit_status=done, counts={kind: int(n) for n, kind in counts}, failed=failed[:50]
    )


#: Step → (what it does, whether it needs a GPU), the most telling first.
STEPS: dict[str, tuple[Callable[[Machine], Iterator[Finding]], bool]] = {
    "errors": (errors, False),
    "launched": (launched, False),
    "determinism": (determinism, False),
    "graphs": (graphs, True),
    "large": (large, True),
    "memcheck": (memcheck, True),
    "racecheck": (racecheck, True),
    "tests": (tests, True),
    "sweep quick": (sweep("quick"), True),
    "sweep losses": (sweep("losses"), True),
    "sweep retrieval": (sweep("retrieval"), True),
}

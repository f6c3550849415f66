"""The steps of gpu_check.py. Each yields findings, rows of a table, that it has as soon as it has them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import torch
from _check_calls import CALLS, KERNELS, Call, Problem, launches
from _losses import BARS
from _machine import slug
from _operation import FLOOR, FLOOR_TF32, relative_error
from torch import Tensor

import gssf_triton
from gssf_triton.autotune.plans import force_plan

ROOT = Path(__file__).resolve().parent.parent
Finding = dict[str, Any]

#: (numerics, dtype of the features, float32 precision, the contract's largest error, a chain of products' largest:
#: a loss's bar, and in TF32, where a product after another adds its bias to it, as much again for each of three).
NUMERICS = (
    ("fp32", torch.float32, "highest", FLOOR["fp32"], BARS["fp32"]),
    ("tf32", torch.float32, "high", FLOOR_TF32, 3 * FLOOR_TF32),
    ("fp16", torch.float16, "highest", FLOOR["fp16"], max(FLOOR["fp16"], BARS["fp16"])),
    ("bf16", torch.bfloat16, "highest", FLOOR["bf16"], max(FLOOR["bf16"], BARS["bf16"])),
)
REPEATS = {"cuda": 100, "cpu": 3}
#: Processes that compile at once, and how long they may take together.
COMPILERS, COMPILE_SECONDS = 12, 120.0
#: Products that keep the device busy while a call is repeated once.
LOAD = 20
#: Of one sanitizer; the launches that it is told to watch are compiled before, and take seconds.
SANITIZER_SECONDS = 60.0
#: What a program is given to end by itself once it is interrupted.
GRACE_SECONDS = 10.0
#: What the tests import, and what those of integrations import besides.
TESTED = ("pytest", "xdist", "hypothesis", "matplotlib", "PIL", "scipy", "sklearn", "tqdm")
INTEGRATED = ("faiss", "open_clip", "pytorch_metric_learning", "sentence_transformers", "timm", "transformers")
#: Of one suite of the sweep.
SWEEP_SECONDS = 50.0
#: Rows and columns of a large result that are held to float64.
PROBED = 64


@dataclass(frozen=True)
class Machine:
    """Where the steps run, and until when (`time.monotonic()`); `small`: on inputs as small as the interpreter's.

    Of n parts of the calls the i-th is run, `part` (i, n).
    """

    device: torch.device
    deadline: float
    small: bool = False
    part: tuple[int, int] = (0, 1)

    @property
    def kind(self) -> str:
        return self.device.type

    @property
    def calls(self) -> Sequence[Call]:
        return CALLS[self.part[0] :: self.part[1]]

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


def compiled(machine: Machine) -> Iterator[Finding]:
    """The kernels of the steps to come, compiled by several processes at once: one would take minutes."""
    jobs = min(COMPILERS, os.cpu_count() or 1, len(CALLS))
    deadline = time.monotonic() + min(machine.left, COMPILE_SECONDS)
    command = [sys.executable, "perf/gpu_check.py", "--device", str(machine.device), "--out", os.devnull]
    parts = [
        [*command, "--only", *steps, "--part", f"{i}/{jobs}"]
        for steps in (["errors"], ["launched", "--small"])
        for i in range(jobs)
    ]
    try:
        with ThreadPool(jobs) as pool:
            results = pool.map(lambda part: _output(part, deadline - time.monotonic(), {}), parts)
    finally:
        for group in list(RUNNING):
            _kill(group)
    # What is wrong with a result, the steps to come will say; a program that ends before it says anything broke.
    broken = [_tail(output) for _, output in results if not re.search(r"^(errors|launched) ", output, re.MULTILINE)]
    yield finding("compiled", not broken, processes=len(parts), broken=broken[:3])


def errors(machine: Machine) -> Iterator[Finding]:
    """Every call against the torch backend in float64, which the tests hold to the definition, in every numerics."""
    for name, dtype, setting, product, chain in NUMERICS:
        for seed, call in enumerate(machine.calls):
            bound = 0.0 if call.exact else chain if call.chain else product
            problem = Problem.make(call, machine.device, dtype, seed)
            exact = problem.double().results("torch")
            with precision(setting):
                found = problem.results("triton")
            if call.exact:
                worst, where = float((found["out"] != exact["out"]).double().mean()), "out"
            else:
                worst, where = max((relative_error(found[part], exact[part]), part) for part in found)
            yield finding(
                f"{call.name}, {name}", worst <= bound, error=worst, of=where, bound=bound,
            )  # fmt: skip


def launched(machine: Machine) -> Iterator[Finding]:
    """One launch at least of every kernel, in float32 and bfloat16: what a sanitizer is run over."""
    dtypes = (torch.float32, torch.bfloat16) if machine.kind == "cuda" else (torch.float32,)
    with launches() as seen:
        for seed, call in enumerate(machine.calls):
            for dtype in dtypes:
                results = Problem.make(call, machine.device, dtype, seed, machine.small).results("triton")
                finite = all(bool(torch.isfinite(x).all()) for x in results.values())
                yield finding(f"{call.name}, {dtype}", finite, kernels=sorted(seen))
    yield finding("every kernel", seen == set(KERNELS), missing=sorted(set(KERNELS) - seen))


def determinism(machine: Machine) -> Iterator[Finding]:
    """The same bits from every repeat while another stream keeps the device busy."""
    for seed, call in enumerate(machine.calls):
        problem = Problem.make(call, machine.device, torch.bfloat16 if machine.kind == "cuda" else torch.float32, seed)
        differing = 0
        with _load(machine.device) as keep_busy, _deterministic(call.fused):
            first = problem.results("triton")
            for _ in range(REPEATS[machine.kind] - 1):
                keep_busy()
                again = problem.results("triton")
                # NaN equals NaN here: the question is the bits.
                differing += any(not torch.equal(_bits(first[part]), _bits(again[part])) for part in first)
        yield finding(call.name, differing == 0, repeats=REPEATS[machine.kind], differing=differing)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8) if x.dim() else x.view(1).view(torch.uint8)


@contextmanager
def _load(device: torch.device) -> Iterator[Callable[[], None]]:
    """What queues some products on a stream of their own: a few at a time, or the queue is full and the host waits."""
    if device.type != "cuda":
        yield lambda: None
        return
    stream, x = torch.cuda.Stream(device), torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    stream.wait_stream(torch.cuda.current_stream(device))

    def keep_busy() -> None:
        with torch.cuda.stream(stream):
            for _ in range(LOAD):
                torch.mm(x, x)

    yield keep_busy
    torch.cuda.synchronize(device)


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """torch.use_deterministic_algorithms, or the default, for a while."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def graphs(machine: Machine) -> Iterator[Finding]:
    """Forward and backward captured in a CUDA graph, replayed on other inputs: the eager call's bits."""
    for seed, call in enumerate(machine.calls):
        problem = Problem.make(call, machine.device, torch.bfloat16, seed)
        other = Problem.make(call, machine.device, torch.bfloat16, seed + 1000)
        try:
            with _deterministic(call.fused):
                replayed, eager = _replay(problem, other), other.results("triton")
        except RuntimeError as error:  # a capture that fails is a finding, not the end of the check
            torch.cuda.synchronize(machine.device)
            yield finding(call.name, False, reason=str(error).splitlines()[0])
            continue
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
    # In one pass: the other plan leaves S and its gradient to the library.
    with force_plan("one_pass"):
        S = gssf_triton.pairwise_sim(a, b, **W, backend="triton")
    exact = gssf_triton.pairwise_sim(a[last].double(), b[last].double(), **exact_W, backend="torch")
    error = relative_error(S[-PROBED:, -PROBED:], exact)
    yield finding("S of 46,400 × 46,400", error <= FLOOR["bf16"], error=error, entries=S.numel())
    dS = torch.zeros_like(S)
    dS[:, -PROBED:] = normal(side, PROBED)
    with force_plan("one_pass"):
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
        launches = [sys.executable, "perf/gpu_check.py", "--only", "launched", "--small", "--out", os.devnull]
        # Compiling inside a sanitizer takes as many times as long as everything else does there.
        done, output = _output(launches, min(machine.left, SANITIZER_SECONDS), {})
        if done != 0:
            yield finding(tool, False, reason="the launches fail without it", exit_status=done, last=_tail(output))
            return
        command = [program, "--tool", tool, "--error-exitcode", "9"]
        if tool == "memcheck":
            # torch asks the driver for what it may not have, and goes on without: such errors are no kernel's.
            command += ["--report-api-errors", "no"]
        command += launches
        # Without torch's cache every tensor is an allocation of its own, so that reading past one is noticed.
        seconds = min(machine.left, SANITIZER_SECONDS)
        done, output = _output(command, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        if "Device not supported" in output:
            yield finding(tool, False, reason="compute-sanitizer does not work here", exit_status=done)
            return
        found = re.findall(r"^=+ *((?:Invalid|Error|Warning|.*hazard).*)", output, flags=re.MULTILINE)
        reports = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
        yield finding(tool, done == 0, exit_status=done, reports=reports or _tail(output), found=found[:10])

    step.__doc__ = f"compute-sanitizer's {tool} over one launch of every kernel."
    return step


memcheck, racecheck = _sanitized("memcheck"), _sanitized("racecheck")


def _tail(output: str) -> list[str]:
    return output.splitlines()[-5:]


def _output(command: list[str], seconds: float, environment: dict[str, str]) -> tuple[int | None, str]:
    """Exit status, None where the time was up, and what was printed.

    A program whose time is up is interrupted, with all that it started, so that it can say what it knows; what is still
    there after that would share the device with the steps to come, and is killed.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, text=True, errors="replace", stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    RUNNING.add(process.pid)
    done = None
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds))
        done = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            _kill(process.pid)
            output, _ = process.communicate()
    finally:
        _kill(process.pid)
    return done, output


#: The process groups that were started and not yet killed.
RUNNING: set[int] = set()


def _kill(group: int) -> None:
    RUNNING.discard(group)
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def sweep(suite: str) -> Callable[[Machine], Iterator[Finding]]:
    def step(machine: Machine) -> Iterator[Finding]:
        limit = min(machine.left - 5, SWEEP_SECONDS)
        command = [sys.executable, "perf/sweep.py", "--suite", suite, "--time-limit", f"{limit:.0f}"]
        out = ROOT / "perf/results" / slug(machine.device) / f"{suite}.json"
        command += ["--device", str(machine.device), "--out", str(out), "--no-plots"]
        done, output = _output(command, machine.left - GRACE_SECONDS, {})
        yield finding(f"sweep, {suite}", done == 0, exit_status=done, last=_tail(output))

    step.__doc__ = f"perf/sweep.py's suite {suite}, as much of it as SWEEP_SECONDS take."
    return step


def _missing(modules: Sequence[str]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def tests(machine: Machine) -> Iterator[Finding]:
    """The whole test suite, its kernels on this device."""
    if lacking := _missing(TESTED):
        yield finding("pytest", False, reason=f"the tests need {', '.join(lacking)}")
        return
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=50", "-p", "no:cacheprovider", "-n", "auto"]
    if missing := _missing(INTEGRATED):
        command.append("--ignore=tests/integrations")
    # What the sweeps take is theirs.
    done, output = _output(command, machine.left - 3 * SWEEP_SECONDS, {})
    counts = re.findall(r"(\d+) (passed|failed|errors?|skipped)", output.splitlines()[-1] if output else "")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, flags=re.MULTILINE)
    yield finding(
        "pytest",
        done == 0,
        exit_status=done,
        counts={kind: int(n) for n, kind in counts},
        failed=failed[:50],
        integrations_lack=missing,
    )


#: Step → (what it does, whether it needs a GPU), the most telling first.
STEPS: dict[str, tuple[Callable[[Machine], Iterator[Finding]], bool]] = {
    "compiled": (compiled, True),
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

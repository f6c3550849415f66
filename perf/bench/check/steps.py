"""The steps of gpu_check.py that run in its own process. Each yields findings as soon as it has them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gssf_triton
from bench.check.calls import CALLS, KERNELS, Call, Problem
from bench.check.errors import NUMERICS, Finding, finding, held_to_float64, setting, where_wrong
from bench.check.watch import watched
from bench.operation import FLOOR, relative_error
from gssf_triton.kernels import toolchain
from gssf_triton.kernels.choice import force_plan
from gssf_triton.kernels.devices import identify

REPEATS = {"cuda": 100, "cpu": 3}
#: Products that keep the device busy while a call is repeated once.
LOAD, LOAD_SIDE = 20, 4096
#: Rows of what is large, where inputs are to be small.
SMALL = 80
#: Rows and columns of a large result that are held to float64.
PROBED = 64


@dataclass(frozen=True)
class Machine:
    """Where the steps run, and until when (`time.monotonic()`); `small`: on inputs as small as the interpreter's.

    Of n parts of the calls the i-th is run, `part` (i, n); of all calls only those of these `names`, where there are
    any. `repeats`: how often a call is repeated, where not as often as usual. `folder`: where programs that a step
    starts leave their results.
    """

    device: torch.device
    deadline: float
    small: bool = False
    part: tuple[int, int] = (0, 1)
    names: tuple[str, ...] = ()
    repeats: int | None = None
    folder: Path = Path()

    @property
    def kind(self) -> str:
        return self.device.type

    @property
    def calls(self) -> Sequence[Call]:
        chosen = [call for call in CALLS if not self.names or call.name in self.names]
        return chosen[self.part[0] :: self.part[1]]

    @property
    def left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())


def errors(machine: Machine) -> Iterator[Finding]:
    """Every call against the torch backend in float64, in every numerics."""
    for name, numerics in NUMERICS.items():
        for seed, call in enumerate(machine.calls):
            problem = Problem.make(call, machine.device, numerics.dtype, seed, machine.small)
            found, results, exact = held_to_float64(problem, name)
            if not found["ok"]:
                found["where"] = where_wrong(results[found["of"]], exact[found["of"]], found["bound"])
            yield found


def launched(machine: Machine) -> Iterator[Finding]:
    """One launch at least of every kernel, in float32 and bfloat16: what a sanitizer is run over."""
    dtypes = (torch.float32, torch.bfloat16) if machine.kind == "cuda" else (torch.float32,)
    with watched() as notes:
        for seed, call in enumerate(machine.calls):
            for dtype in dtypes:
                results = Problem.make(call, machine.device, dtype, seed, machine.small).results("triton")
                finite = all(bool(torch.isfinite(x).all()) for x in results.values())
                yield finding(f"{call.name}, {dtype}", finite, kernels=sorted({note["kernel"] for note in notes}))
    if machine.names:
        return
    missing = set(KERNELS) - {note["kernel"] for note in notes}
    # What the compiler of this machine would make wrong is left to torch.
    unsound = not toolchain.is_sound(identify(machine.device).arch)
    left = {name for name in missing if unsound and toolchain.is_watched(f"{name}_kernel")}
    yield finding("every kernel", missing == left, missing=sorted(missing - left), left_to_torch=sorted(left))


def determinism(machine: Machine) -> Iterator[Finding]:
    """The same bits from every repeat while another stream keeps the device busy."""
    dtype = torch.bfloat16 if machine.kind == "cuda" else torch.float32
    repeats = machine.repeats or REPEATS["cpu" if machine.small else machine.kind]
    for seed, call in enumerate(machine.calls):
        problem = Problem.make(call, machine.device, dtype, seed, machine.small)
        differing = 0
        with _load(machine.device, SMALL if machine.small else LOAD_SIDE) as keep_busy, _deterministic(call.fused):
            first = problem.results("triton")
            for _ in range(repeats - 1):
                keep_busy()
                again = problem.results("triton")
                # NaN equals NaN here: the question is the bits.
                differing += any(not torch.equal(_bits(first[part]), _bits(again[part])) for part in first)
        yield finding(call.name, differing == 0, repeats=repeats, differing=differing)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8) if x.dim() else x.view(1).view(torch.uint8)


@contextmanager
def _load(device: torch.device, side: int) -> Iterator[Callable[[], None]]:
    """What queues some products on a stream of their own: a few at a time, or the queue is full and the host waits."""
    if device.type != "cuda":
        yield lambda: None
        return
    stream, x = torch.cuda.Stream(device), torch.randn(side, side, device=device, dtype=torch.bfloat16)
    stream.wait_stream(torch.cuda.current_stream(device))

    def keep_busy() -> None:
        with torch.cuda.stream(stream):
            for _ in range(LOAD):
                torch.mm(x, x)

    yield keep_busy
    torch.cuda.synchronize(device)


def _deterministic(wanted: bool) -> AbstractContextManager[None]:
    return setting(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, wanted)


def graphs(machine: Machine) -> Iterator[Finding]:
    """Forward and backward captured in a CUDA graph, replayed on other inputs: the eager call's bits."""
    for seed, call in enumerate(machine.calls):
        problem, other = (
            Problem.make(call, machine.device, torch.bfloat16, number, machine.small) for number in (seed, seed + 1000)
        )
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
    side = SMALL if machine.small else 46_400  # side² = 2.15 · 10⁹ > 2³¹
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
    error = relative_error(S.detach()[-PROBED:, -PROBED:], exact)
    yield finding(f"S of {side:,} × {side:,}", error <= FLOOR["bf16"], error=error, entries=S.numel())
    dS = torch.zeros_like(S)
    dS[:, -PROBED:] = normal(side, PROBED)
    with force_plan("one_pass"):
        (da,) = torch.autograd.grad(S, a, dS)
    exact = gssf_triton.transform(dS[last, -PROBED:].double() @ b[last].double(), **exact_W, side="b", backend="torch")
    error = relative_error(da[last], exact)
    yield finding("its gradient's last rows", error <= FLOOR["bf16"], error=error)
    del S, dS, da, exact

    rows = SMALL if machine.small else 2**31 // D + 1000
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

    N = SMALL if machine.small else 65_536
    a, b = normal(N, D), normal(N, D)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    options: dict[str, Any] = {"logit_scale": 20.0, "normalize": True}
    loss = gssf_triton.info_nce(a, b, **W, **options, backend="triton")
    peak = torch.cuda.max_memory_allocated(device) - before
    held = gssf_triton.info_nce(a.float(), b.float(), **W, **options, backend="torch")
    error = relative_error(loss.double(), held.double())
    yield finding(f"info_nce at {N:,} pairs", error <= FLOOR["bf16"], error=error, mib=peak // 2**20)

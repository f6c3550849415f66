"""The first two stages of first_run.py: where it runs, and what the machine gives at most."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import _machine
import torch
import triton
from _first_cases import Place
from _operation import relative_error
from _timing import Effort, Spread, spreads

from gssf_triton.autotune import lookup
from gssf_triton.kernels import toolchain
from gssf_triton.kernels.devices import identify

Row = dict[str, Any]
Plan = dict[str, list[list[dict[str, Any]]]]

#: What nvidia-smi is asked for; nothing is set.
CLOCKS = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,power.limit,pstate"
EFFORT = Effort(5, 20, 0.5)
#: Launches of an empty kernel that are timed together.
LAUNCHES = 500


@triton.jit
def nothing() -> None:
    """An empty kernel."""


def _clocks() -> str | None:
    try:
        command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def environment(place: Place, plan: Plan) -> Iterator[Row]:
    """What it runs on and with, the plan of what is to come, and the first look-up."""
    device = place.device
    arch = identify(device).arch
    facts = {
        **_machine.describe(device), "versions": _machine.versions(), "commit": _machine.commit(),
        "arch": arch, "assembler": _machine.assembler(device), "toolchain": toolchain.describe(arch),
        "clocks": _clocks(),
    }  # fmt: skip
    yield {"name": "environment", "ok": True, "facts": facts, "plan": plan}
    began = time.perf_counter()
    config = lookup.choose("pairwise", device, torch.bfloat16, 8192, 8192, 1024, 32)
    yield {"name": "first look-up", "ok": True, "seconds": time.perf_counter() - began, "config": str(config)}


def _rate(name: str, call: Callable[[], Any], place: Place, *, flops: float = 0.0, moved: float = 0.0) -> Row:
    """A ceiling: the call's time, and what it makes of it at best."""
    (samples,) = place.samples({name: call}, EFFORT).values()
    row: Row = {"name": name, "ok": True, **spreads(samples)}
    median = row["seconds"]["median"]
    return (
        row | ({"tflops": flops / median / 1e12} if flops else {}) | ({"gbps": moved / median / 1e9} if moved else {})
    )


def ceilings(place: Place) -> Iterator[Row]:
    """Copy, the library's products, its product of halves into float32 sums, and what a launch costs."""
    source = torch.randint(0, 2**31 - 1, (place.size(2**28, 2**12),), dtype=torch.int32, device=place.device)
    target = torch.empty_like(source)
    yield _rate("copy", partial(target.copy_, source), place, moved=8.0 * source.numel())
    del source, target
    for M, K in ((8192, 8192), (8192, 1024)):
        M, K = place.size(M, 64), place.size(K, 32)
        x, y = place.normal(M, K), place.normal(M, K)
        yield _rate(f"library, bf16, {M}² × {K}", partial(torch.mm, x, y.T), place, flops=2.0 * M * M * K)
    yield _addmm(place)
    yield _launches(place)


def _addmm(place: Place) -> Row:
    """`torch.addmm` of float16 operands into float32 sums in place: whether there is one, its error and its rate."""
    M, K, D = place.size(4096, 64), place.size(16384, 96), place.size(1024, 32)
    p, x = (place.normal(*shape, dtype=torch.float16) for shape in ((M, K), (K, D)))
    out = place.normal(M, D, dtype=torch.float32)
    name = "addmm, float16 into float32"
    wanted = out.double() + p.double() @ x.double()
    try:
        torch.addmm(out, p, x, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError) as refused:
        return {"name": name, "ok": True, "reason": str(refused).splitlines()[0]}
    error = relative_error(out, wanted)
    call = partial(torch.addmm, out, p, x, out_dtype=torch.float32, out=out)
    return _rate(name, call, place, flops=2.0 * M * K * D) | {"error": error}


def _launches(place: Place) -> Row:
    """Host time of an empty kernel's launch, and how fast a row of them goes through."""
    count = 3 if place.small else LAUNCHES
    hosts, through = [], []
    nothing[(1,)]()
    for _ in range(5):
        _machine.synchronize(place.device)
        began = time.perf_counter()
        for _ in range(count):
            nothing[(1,)]()
        hosts.append((time.perf_counter() - began) / count)
        _machine.synchronize(place.device)
        through.append((time.perf_counter() - began) / count)
    spread = {"seconds": Spread.of(through).as_dict(), "host_seconds": Spread.of(hosts).as_dict()}
    return {"name": "an empty kernel's launch", "ok": True, **spread}

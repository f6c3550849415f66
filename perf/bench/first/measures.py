"""What first_run.py measures: the machine and its ceilings, kernels and tiles beside the library, whole calls."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from bench import machine
from bench.check.watch import short, watched
from bench.first.cases import Bench, Place, Whole, refusal, tile_name, tiled
from bench.operation import relative_error
from bench.timing import Effort, peak_bytes, ratios, spread, spreads
from gssf_triton.autotune.measure import Call, Sample
from gssf_triton.kernels import choice, toolchain
from gssf_triton.kernels.configs import PairwiseConfig
from gssf_triton.kernels.devices import identify

Row = dict[str, Any]
Plan = dict[str, list[list[dict[str, Any]]]]

#: Samples of a ceiling, of a kernel, of a tile, and of a whole call.
CEILING, KERNEL, TILE, WHOLE = Effort(5, 20, 0.5), Effort(20, 20, 2.0), Effort(10, 10, 1.0), Effort(5, 20, 2.0)
#: What a kernel's result may be off from torch's in the same dtype.
TOLERANCE = 2e-2


# ---------------------------------------------------------------------------------------- the machine


#: What nvidia-smi is asked for; nothing is set.
CLOCKS = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,power.limit,pstate"
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
        **machine.describe(device),
        "arch": arch, "assembler": machine.assembler(device), "toolchain": toolchain.describe(arch),
        "clocks": _clocks(),
    }  # fmt: skip
    yield {"name": "environment", "ok": True, "facts": facts, "plan": plan}
    began = time.perf_counter()
    config = choice.choose("pairwise", device, torch.bfloat16, 8192, 8192, 1024, 32)
    yield {"name": "first look-up", "ok": True, "seconds": time.perf_counter() - began, "config": str(config)}


def _rates(samples: list[Sample], flops: float, moved: float) -> Row:
    """The times, and the rates of a call that has flops to do or bytes to move."""
    row: Row = spreads(samples)
    median = row["seconds"]["median"]
    if flops:
        row["tflops"] = flops / median / 1e12
    if moved:
        row["gbps"] = moved / median / 1e9
    return row


def _rate(name: str, call: Callable[[], Any], place: Place, *, flops: float = 0.0, moved: float = 0.0) -> Row:
    """A ceiling: the call's time, and what it makes of it at best."""
    (samples,) = place.samples({name: call}, CEILING).values()
    return {"name": name, "ok": True, **_rates(samples, flops, moved)}


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
        machine.synchronize(place.device)
        began = time.perf_counter()
        for _ in range(count):
            nothing[(1,)]()
        hosts.append((time.perf_counter() - began) / count)
        machine.synchronize(place.device)
        through.append((time.perf_counter() - began) / count)
    times = {"seconds": spread(through), "host_seconds": spread(hosts)}
    return {"name": "an empty kernel's launch", "ok": True, **times}


# -------------------------------------------------------------------------------- kernels and calls


def _apart(found: Any, expected: Any) -> float | None:
    """The relative difference of two results, where they are tensors of one shape."""
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        return None
    scale = torch.linalg.vector_norm(expected.float())
    if found.shape == expected.shape and not found.dtype.is_floating_point:
        return float((found != expected).float().mean())
    # A slope is stored times a power of two, which the two norms tell.
    ratio = torch.linalg.vector_norm(found.float()) / scale
    factor = 2.0 ** float(torch.log2(ratio).round()) if bool(torch.isfinite(ratio)) and float(ratio) > 0 else 1.0
    return relative_error(found.float() / factor, expected.float())


def _timed(name: str, bench: Bench, place: Place, effort: Effort) -> Row:
    """The row of a bench: its times, rates, and its share of the library's."""
    with watched() as launches:
        found = bench.ours()
    row: Row = {"name": name, "ok": True, "launches": [short(launch) for launch in launches] or ["library"]}
    if bench.expected is not None:
        row["error"] = _apart(found, bench.expected())
        row["ok"] = row["error"] is not None and row["error"] <= TOLERANCE
    del found
    calls: dict[str, Call] = {"ours": bench.ours}
    if bench.library is not None:
        calls["library"] = bench.library
    samples = place.samples(calls, effort)
    row |= _rates(samples["ours"], bench.flops, bench.bytes)
    if bench.library is not None:
        row["library_seconds"] = spread([s.seconds for s in samples["library"]])
        row["share"] = ratios(samples["library"], samples["ours"])["median"]
    return row


def kernel(name: str, build: Callable[[Place], Bench], place: Place) -> Iterator[Row]:
    """A headline kernel, or why it is left to torch."""
    try:
        yield _timed(name, build(place), place, KERNEL)
    except RuntimeError as error:
        yield {"name": name, "ok": True, "reason": refusal(error)}


def tile(kernel: str, config: PairwiseConfig, place: Place) -> Iterator[Row]:
    """A kernel in one tile; one that the compiler or the device refuses has a reason in a time's place."""
    name = tile_name(kernel, config)
    try:
        row = _timed(name, tiled(kernel, config, place), place, TILE)
    except OutOfResources as error:
        row = {"name": name, "ok": True, "reason": str(error).splitlines()[0]}
    yield row | {"kernel": kernel, "config": vars(config)}


def _wall(call: Call, device: torch.device, repeats: int) -> dict[str, Any]:
    """Seconds from an idle device until it is idle again, as a user waits for them."""
    seconds = []
    for _ in range(repeats):
        machine.synchronize(device)
        began = time.perf_counter()
        call()
        machine.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return spread(seconds)


def whole(name: str, case: Whole, place: Place) -> Iterator[Row]:
    """A whole call, alone and then beside each of its peers."""
    reference: dict[str, Tensor] = {}
    calls: dict[str, Call] = {}
    for contender in ("gssf", *case.peers):
        row: Row = {"name": f"{name}: {contender}", "ok": True}
        try:
            program = case.program(place, contender)
            found = program.results(case.cell.mode)
            reference = reference or found
            row["apart"] = _differences(found, reference)
            del found
            calls[contender] = program.call(case.cell.mode)
            row["peak_bytes"] = peak_bytes(calls[contender], place.device)
            row["wall_seconds"] = _wall(calls[contender], place.device, 1 if place.small else 5)
            # In turn with ours, whose times of then are the ones to compare with.
            pair = {other: calls[other] for other in dict.fromkeys(("gssf", contender))}
            samples = place.samples(pair, WHOLE)
            row |= spreads(samples[contender])
            ours, its = (statistics.median(s.seconds for s in samples[who]) for who in ("gssf", contender))
            row["ours_relative"] = ours / its
        except torch.OutOfMemoryError as error:
            row["reason"] = str(error).splitlines()[0]
        yield row
        if contender != "gssf":
            calls.pop(contender, None)
            machine.release(place.device)


def _differences(found: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """How far a contender's results are from the first one's, which computes with fewer roundings or more."""
    shared = found.keys() & reference.keys()
    return {part: relative_error(found[part].float(), reference[part].float()) for part in sorted(shared)}

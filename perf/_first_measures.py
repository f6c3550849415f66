"""The timed stages of first_run.py: kernels and tiles beside the library's product, whole calls beside their peers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import _machine
import torch
from _first_cases import Bench, Place, Whole, refusal, tile_name, tiled
from _operation import relative_error
from _timing import Call, Effort, Spread, peak_bytes, spreads
from _watch import short, watched
from torch import Tensor
from triton.runtime.errors import OutOfResources

from gssf_triton.kernels.configs import PairwiseConfig

Row = dict[str, Any]

#: Samples of a kernel, of a tile, and of a whole call.
KERNEL, TILE, WHOLE = Effort(20, 20, 2.0), Effort(10, 10, 1.0), Effort(5, 20, 2.0)
#: What a kernel's result may be off from torch's in the same dtype.
TOLERANCE = 2e-2


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
    row |= spreads(samples["ours"])
    median = row["seconds"]["median"]
    if bench.flops:
        row["tflops"] = bench.flops / median / 1e12
    if bench.bytes:
        row["gbps"] = bench.bytes / median / 1e9
    if bench.library is not None:
        row["library_seconds"] = Spread.of([s.seconds for s in samples["library"]]).as_dict()
        ratios = [its.seconds / mine.seconds for mine, its in zip(samples["ours"], samples["library"], strict=True)]
        row["share"] = Spread.of(ratios).as_dict()["median"]
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
        _machine.synchronize(device)
        began = time.perf_counter()
        call()
        _machine.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return Spread.of(seconds).as_dict()


def whole(name: str, case: Whole, place: Place) -> Iterator[Row]:
    """A whole call, alone and then beside each of its peers."""
    reference: dict[str, Tensor] = {}
    calls: dict[str, Call] = {}
    for contender in ("gssf", *case.peers):
        row: Row = {"name": f"{name}: {contender}", "ok": True}
        try:
            ((_, program),) = case.programs(place, (contender,))
            found = program.results(case.mode)
            reference = reference or found
            row["apart"] = _differences(found, reference)
            del found
            calls[contender] = program.call(case.mode)
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
            _machine.release(place.device)


def _differences(found: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """How far a contender's results are from the first one's, which computes with fewer roundings or more."""
    shared = found.keys() & reference.keys()
    return {part: relative_error(found[part].float(), reference[part].float()) for part in sorted(shared)}

"""One cell: set every contender up, check it, and time those whose results are right."""

from __future__ import annotations

import time
import zlib
from typing import Any

import torch
from torch import Tensor

from bench import machine
from bench.cells import DTYPES, Cell
from bench.costs import cost
from bench.operation import (
    HOPELESS,
    YARDSTICK_FACTOR,
    YARDSTICK_LIMIT,
    Contender,
    Inputs,
    Operation,
    Probe,
    Program,
    disagreement,
    error_floor,
    largest_error,
)
from bench.registry import OPERATIONS, contenders_for
from bench.timing import Effort, clock_for, interleave, peak_bytes, ratios, spread, spreads


class Referee:
    """Holds each contender's results to float64, and to the yardstick's."""

    def __init__(self, operation: Operation, inputs: Inputs, cell: Cell) -> None:
        self.operation, self.inputs, self.cell = operation, inputs, cell
        self.floor = error_floor(cell.dtype)
        self.allowed = self.floor
        self.bar = None if operation.bars is None else operation.bars[cell.dtype]
        self.agreed: dict[str, Tensor] | None = None
        self.probes: dict[str, list[Probe]] = {}

    def verdict(self, contender: Contender, found: dict[str, Tensor]) -> tuple[float, str | None]:
        """The error of what it found against float64, and what is wrong, or None."""
        mathematics = contender.mathematics
        if mathematics not in self.probes:
            self.probes[mathematics] = list(self.operation.probes(self.inputs, mathematics, self.cell.mode))
        error = largest_error(found, self.probes[mathematics])
        plain = contender.name in (self.operation.baseline, self.operation.yardstick)
        allowed = self.floor * YARDSTICK_LIMIT if plain else self.allowed
        if self.bar is not None:
            allowed = self.bar if contender.ours else HOPELESS
        if not error <= allowed:
            return error, f"relative error {error:.2g} against float64, {allowed:.2g} allowed"
        if self.bar is not None:
            return error, None
        if contender.name == self.operation.yardstick:
            self.allowed, self.agreed = max(self.floor, YARDSTICK_FACTOR * error), found
        elif self.agreed is not None and not plain:
            apart = disagreement(found, self.agreed)
            if not apart <= 2 * self.allowed:
                return error, f"relative difference {apart:.2g} from {self.operation.yardstick}"
        return error, None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"


def measure(cell: Cell, device: torch.device, effort: Effort, seed: int, wanted: set[str] | None) -> dict[str, Any]:
    """The cell's entry in the results.

    A contender whose result is wrong, or that cannot run (out of memory, say), has a status and a reason and no time.
    """
    operation = OPERATIONS[cell.operation]
    itemsize = DTYPES[cell.dtype].itemsize
    # Both passes of a shape see the same numbers, in this run and in one that takes it up again.
    generator = torch.Generator(device=device).manual_seed(seed + zlib.crc32(f"{cell.dtype}/{cell.shape}".encode()))
    inputs = operation.make_inputs(cell, device, generator)
    referee = Referee(operation, inputs, cell)
    entries: dict[str, dict[str, Any]] = {}
    programs: dict[str, Program] = {}
    for contender in contenders_for(cell, device.type, wanted):
        work = cost(contender.mathematics, cell.mode, cell.shape, itemsize)
        entry: dict[str, Any] = {"status": "ok", "reason": None, "ours": contender.ours}
        entry |= {"flops": work.flops, "bytes": work.bytes}
        entries[contender.name] = entry
        try:
            program = contender.build(inputs)
            if cell.stored:
                start = time.perf_counter()
                found = program.results(cell.mode)
                once = time.perf_counter() - start
                entry["error"], entry["reason"] = referee.verdict(contender, found)
                del found
            if entry["reason"]:
                entry["status"] = "wrong"
                continue
            start = time.perf_counter()
            entry["peak_bytes"] = peak_bytes(program.call(cell.mode), device)
            if not cell.stored:
                once = time.perf_counter() - start
            if cell.once or not cell.stored:
                entry["seconds"] = spread([once])
            else:
                programs[contender.name] = program
        except Exception as error:  # one contender that cannot run leaves the others' figures standing
            entry |= {"status": "failed", "reason": _first_line(error)}
        machine.release(device)
    referee.agreed = None
    machine.release(device)
    samples = interleave({name: p.call(cell.mode) for name, p in programs.items()}, clock_for(device, effort), effort)
    for name, taken in samples.items():
        entries[name] |= spreads(taken)
        if baseline := samples.get(operation.baseline):
            entries[name]["relative"] = ratios(taken, baseline)
    return {
        "operation": cell.operation,
        "mode": cell.mode,
        "dtype": cell.dtype,
        **cell.shape.sizes,
        "sizes": list(cell.shape.sizes),
        "baseline": operation.baseline,
        "unit": operation.unit,
        "count": operation.count(cell.shape),
        "contenders": entries,
    }

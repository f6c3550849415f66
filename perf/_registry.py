"""The operations that can be measured.

A new one is an `Operation` here, its mathematics in `_costs.TABLE` and, for a suite of its own, its cells in
`_cells.SUITES`. A suite is offered once an operation belongs to it.
"""

from __future__ import annotations

from _cells import Cell
from _operation import Contender, Operation
from _pairwise import PAIRWISE

OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in (PAIRWISE,)}


def suites() -> list[str]:
    """Those that some operation belongs to."""
    return sorted({suite for operation in OPERATIONS.values() for suite in operation.suites}, reverse=True)


def members(suite: str) -> list[str]:
    """The operations measured in `suite`."""
    return [operation.name for operation in OPERATIONS.values() if suite in operation.suites]


def contender_names() -> list[str]:
    return list(dict.fromkeys(c.name for operation in OPERATIONS.values() for c in operation.contenders))


def labels() -> dict[str, str]:
    """Contender to its name in plots and tables."""
    return {c.name: c.label for operation in OPERATIONS.values() for c in operation.contenders}


def contenders_for(cell: Cell, device_type: str, wanted: set[str] | None = None) -> list[Contender]:
    """Those that run here, the baseline and the yardstick always among them, the yardstick right after the baseline."""
    operation = OPERATIONS[cell.operation]
    kept = {operation.baseline, operation.yardstick}
    chosen = [
        c
        for c in operation.contenders
        if c.name in kept
        or (
            (wanted is None or c.name in wanted)
            and (cell.compiled or not c.compiled)
            and (device_type == "cuda" or not c.gpu_only)
        )
    ]
    return sorted(chosen, key=lambda c: (c.name != operation.baseline, c.name != operation.yardstick))

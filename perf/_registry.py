"""The operations that can be measured.

A new one is an `Operation` here, with cells of the suites it belongs to, and its mathematics in `_costs.TABLE`. A suite
is offered once an operation belongs to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from _attention import ATTENTION
from _cells import Cell, Shape, grid
from _goals import GOALS
from _losses import LOSSES
from _operation import Contender, Operation
from _pairwise import PAIRWISE
from _region_word import CROSS_ATTENTION, LATE_INTERACTION
from _retrieval import RANKS, TOPK


def _with_goals(operation: Operation) -> Operation:
    goals = {("goals", kind): cells for kind, cells in GOALS.get(operation.name, {}).items()}
    return replace(operation, cells={**operation.cells, **goals})


OPERATIONS: dict[str, Operation] = {
    operation.name: _with_goals(operation)
    for operation in (PAIRWISE, *LOSSES, TOPK, RANKS, LATE_INTERACTION, CROSS_ATTENTION, ATTENTION)
}

#: In the order they are offered.
SUITES = ("quick", "full", "losses", "retrieval", "attention", "goals")


def suites() -> list[str]:
    """Those that some operation belongs to."""
    return [suite for suite in SUITES if members(suite)]


def members(suite: str) -> list[str]:
    """The operations measured in `suite`."""
    return [operation.name for operation in OPERATIONS.values() if suite in operation.suites]


def _least_work_first(cells: list[Cell]) -> list[Cell]:
    """A run cut short has measured as many shapes of every operation as it could."""
    return sorted(cells, key=lambda cell: cell.shape.M * cell.shape.N * cell.shape.D)


def suite_cells(suite: str, device_type: str) -> list[Cell]:
    """The cells of `suite` on a kind of device, of every operation that belongs to it."""
    found = [OPERATIONS[name].cells.get((suite, device_type)) for name in members(suite)]
    return _least_work_first([cell for cells in found if cells for cell in cells()])


def custom_cells(operations: Iterable[str], shapes: Iterable[Shape], dtypes: Iterable[str]) -> list[Cell]:
    """These operations at shapes of the user's own.

    Raises:
        ValueError: a size that one of them does not have.
    """
    shapes, dtypes = list(shapes), list(dtypes)
    cells: list[Cell] = []
    for name in operations:
        operation = OPERATIONS[name]
        cells += grid(name, [operation.shape(shape) for shape in shapes], dtypes, modes=operation.modes)
    return _least_work_first(cells)


def contender_names(operations: Iterable[str] | None = None) -> list[str]:
    """Of these operations, or of all."""
    chosen = list(OPERATIONS) if operations is None else operations
    return list(dict.fromkeys(c.name for name in chosen for c in OPERATIONS[name].contenders))


def labels(operation: str) -> dict[str, str]:
    """Contender to its name in plots and tables."""
    return {c.name: c.label for c in OPERATIONS[operation].contenders}


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
    if not cell.stored:
        chosen = [c for c in chosen if not c.stores]
    return sorted(chosen, key=lambda c: (c.name != operation.baseline, c.name != operation.yardstick))

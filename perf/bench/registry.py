"""The operations that can be measured.

A new one is an `Operation` here, with cells of the suites it belongs to, and its mathematics in `costs.TABLE`. A suite
is offered once an operation belongs to it.
"""

from __future__ import annotations

from collections.abc import Iterable

from bench.cells import Cell, Shape, grid
from bench.operation import Contender, Operation
from bench.operations.attention import ATTENTION
from bench.operations.losses import LOSSES
from bench.operations.pairwise import PAIRWISE
from bench.operations.region_word import CROSS_ATTENTION, LATE_INTERACTION
from bench.operations.retrieval import RANKS, TOPK

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
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
    found = [operation.cells.get((suite, device_type), []) for operation in OPERATIONS.values()]
    return _least_work_first([cell for cells in found for cell in cells])


def custom_cells(operations: Iterable[str], shapes: list[Shape], dtypes: list[str]) -> list[Cell]:
    """These operations at shapes of the user's own.

    Raises:
        ValueError: a size that one of them does not have.
    """
    cells: list[Cell] = []
    for operation in map(OPERATIONS.__getitem__, operations):
        cells += grid(operation.name, map(operation.shape, shapes), *dtypes, modes=operation.modes)
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
    first = (operation.baseline, operation.yardstick)

    def runs(c: Contender) -> bool:
        if c.stores and not cell.stored:
            return False
        fits = (cell.compiled or not c.compiled) and (device_type == "cuda" or not c.gpu_only)
        return c.name in first or (fits and (wanted is None or c.name in wanted))

    return sorted(filter(runs, operation.contenders), key=lambda c: [c.name != name for name in first])

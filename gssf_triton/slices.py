"""A range cut into runs."""

from __future__ import annotations

from collections.abc import Iterator


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """`start:stop` in runs of `step`, the last one shorter.

    Example:
        >>> [(run.start, run.stop) for run in slices(2, 7, 2)]
        [(2, 4), (4, 6), (6, 7)]
    """
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))

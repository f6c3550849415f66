"""Progress bars, for whoever asks for one; tqdm is needed only then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

#: Takes the number of steps just done.
Tick = Callable[[int], object]


def no_tick(steps: int) -> None:
    """Nobody watches."""


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm, or leave progress=False") from error
    return tqdm


def progress_bar(wanted: bool, description: str) -> Callable[[Iterator[T]], Iterator[T]]:
    """tqdm around an iterator of batches, or nothing.

    Raises:
        ImportError: where a bar is wanted and tqdm is not installed.
    """
    if not wanted:
        return lambda batches: batches
    tqdm = _tqdm()

    def bar(batches: Iterator[T]) -> Iterator[T]:
        return iter(tqdm(list(batches), desc=description, unit="batch"))

    return bar


@contextmanager
def counting(wanted: bool, description: str, total: int, unit: str) -> Iterator[Tick]:
    """A bar that is told what was done, of `total` steps, or nothing.

    Raises:
        ImportError: where a bar is wanted and tqdm is not installed.
    """
    if not wanted:
        yield no_tick
        return
    with _tqdm()(total=total, desc=description, unit=unit, unit_scale=True) as bar:
        yield bar.update

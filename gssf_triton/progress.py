"""Progress bars: tqdm's in functions that are asked for one, plain lines in programs that run without tqdm."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

#: Seconds between two lines of a program without tqdm.
LINE_SECONDS = 10.0

#: Called with the number of steps just done.
Tick = Callable[[int], object]


def no_tick(steps: int) -> None:
    """No progress shown."""


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm, or leave progress=False") from error
    return tqdm


def progress_bar(wanted: bool, description: str) -> Callable[[Iterator[T]], Iterator[T]]:
    """A function that wraps an iterator of batches in tqdm, or returns it unchanged.

    Raises:
        ImportError: a bar is wanted and tqdm is not installed.
    """
    if not wanted:
        return lambda batches: batches
    tqdm = _tqdm()

    def bar(batches: Iterator[T]) -> Iterator[T]:
        return iter(tqdm(list(batches), desc=description, unit="batch"))

    return bar


@contextmanager
def counting(wanted: bool, description: str, total: int, unit: str) -> Iterator[Tick]:
    """A bar of `total` steps, if wanted. Yields the function that advances it.

    Raises:
        ImportError: a bar is wanted and tqdm is not installed.
    """
    if not wanted:
        yield no_tick
        return
    with _tqdm()(total=total, desc=description, unit=unit, unit_scale=True) as bar:
        yield bar.update


class Lines:
    """The part of tqdm that programs here use, if it is not installed: prints a line now and then."""

    def __init__(
        self, iterable: Iterable[Any] | None = None, *, desc: str = "", total: int | None = None, unit: str = "it",
        initial: int = 0, disable: bool = False, **of_the_bar_alone: object,
    ) -> None:  # fmt: skip
        self.iterable, self.desc, self.unit, self.n, self.disable = iterable, desc, unit, initial, disable
        self.total = len(iterable) if total is None and isinstance(iterable, Sized) else total
        self.postfix, self.said = "", time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable or ():
            yield item
            self.update()

    def update(self, steps: int = 1) -> None:
        self.n += steps
        if self.n == self.total or time.monotonic() - self.said > LINE_SECONDS:
            self.said = time.monotonic()
            of = "" if self.total is None else f"/{self.total}"
            if not self.disable:
                print(f"{self.desc}: {self.n}{of} {self.unit}  {self.postfix}".strip(": "), file=sys.stderr, flush=True)

    def write(self, text: str) -> None:
        print(text, flush=True)

    def set_description(self, text: str) -> None:
        self.desc = text

    def set_postfix_str(self, text: str) -> None:
        self.postfix = text

    def close(self) -> None:
        """Nothing to close."""


def bar(*arguments: Any, **options: Any) -> Any:
    """tqdm for a program of this project, or `Lines` if tqdm is not installed."""
    try:
        return _tqdm()(*arguments, **options)
    except ImportError:
        return Lines(*arguments, **options)

"""Every public function by name, and the case of a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from fuzz import attention, losses, modules, region_word, retrieval, similarities
from fuzz.draw import Draw
from fuzz.ways import Way


class Runnable(Protocol):
    """What every family's cases have in common."""

    @property
    def backend(self) -> str:
        """What computes it."""

    @property
    def tags(self) -> set[str]:
        """The features of the case."""

    @property
    def function(self) -> str:
        """What is called."""

    def run(self) -> None:
        """Raise where a promise is broken."""


FAMILIES: dict[str, Callable[[Draw], Runnable]] = {
    **similarities.FAMILY,
    **losses.FAMILY,
    **region_word.FAMILY,
    **attention.FAMILY,
    **retrieval.FAMILY,
    **modules.FAMILY,
}


class _AnyWay:
    """A case run in the way drawn for it."""

    def __init__(self, inner: Runnable, way: Way) -> None:
        self.inner, self.way = inner, way

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run(self) -> None:
        with self.way.taken():
            self.inner.run()


def case(seed: int, function: str | None = None) -> Runnable:
    """The case of a seed: of any function, or of the one named."""
    torch.manual_seed(seed)  # modules start from torch's own generator
    d = Draw(seed)
    way = Way(d)
    names = list(FAMILIES)
    drawn: Any = _AnyWay(FAMILIES[function or names[seed % len(names)]](d), way)
    made: Runnable = drawn
    return made

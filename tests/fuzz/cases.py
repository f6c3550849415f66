"""Every public function by name, and the case of a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fuzz import attention, losses, modules, region_word, retrieval, similarities
from fuzz.draw import Draw


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


def case(seed: int, function: str | None = None) -> Runnable:
    """The case of a seed: of any function, or of the one named."""
    d = Draw(seed)
    names = list(FAMILIES)
    chosen = names[seed % len(names)]
    return FAMILIES[function or chosen](d)

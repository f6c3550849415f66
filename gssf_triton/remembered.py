"""Answers remembered for calls like an earlier one, which need not be checked and planned again."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import suppress
from typing import Generic, TypeVar

import torch
from torch import Tensor

Answer = TypeVar("Answer")

#: Answers remembered before all are forgotten: bounds the memory of a program in which every batch has another size.
MOST_REMEMBERED = 4_096


def look(x: object) -> Hashable:
    """All of a tensor that checks look at; anything else with its type, since 1, 1.0 and True are equal."""
    return (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else (type(x), x)


class Remembered(Generic[Answer]):
    """Answers by key. What an answer depends on besides is asked anew every time."""

    def __init__(self) -> None:
        self._answers: dict[Hashable, Answer] = {}

    def get(self, key: Hashable | None) -> Answer | None:
        """The answer; None of no key, of one that cannot be hashed, and under a compiler, which cannot hash sizes."""
        if key is None or torch.compiler.is_compiling():
            return None
        try:
            return self._answers.get(key)
        except TypeError:
            return None

    def put(self, key: Hashable | None, answer: Answer) -> None:
        if key is None or torch.compiler.is_compiling():
            return
        if len(self._answers) >= MOST_REMEMBERED:
            self._answers.clear()
        with suppress(TypeError):  # sizes that torch.fx traces cannot be hashed
            self._answers[key] = answer

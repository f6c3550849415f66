"""Fresh buffers hold NaN, not lucky zeros: an output element that no program writes fails its test."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch


def _poisoned(allocate: Any) -> Any:
    def allocate_and_poison(*args: Any, **kwargs: Any) -> torch.Tensor:
        buffer: torch.Tensor = allocate(*args, **kwargs)
        with torch.no_grad():
            if buffer.dtype.is_floating_point:
                buffer.fill_(float("nan"))
            elif buffer.dtype in (torch.int32, torch.int64):
                buffer.fill_(torch.iinfo(buffer.dtype).max)
        return buffer

    return allocate_and_poison


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every way to allocate without writing, poisoned."""
    with contextlib.ExitStack() as stack:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
            (torch.Tensor, "new_empty_strided"),
        ):
            stack.enter_context(mock.patch.object(owner, name, _poisoned(getattr(owner, name))))
        yield

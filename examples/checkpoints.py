"""Checkpoints: written whole or not at all, and read as data only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gssf_triton.storage import reason, regular, replacing, unusable

REMEDY = "remove it, choose another --out, or start over with --fresh"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all."""
    with replacing(path) as file:
        torch.save(state, file)


def load_checkpoint(path: Path, fields: Sequence[str]) -> dict[str, Any]:
    """A checkpoint with at least `fields`, on the CPU: tensors and plain values only.

    Raises:
        ValueError: it is no such file; the message says what to do.
    """
    expected = f"a checkpoint with {', '.join(fields)}"
    with regular(path).open("rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        # A damaged file can raise almost any exception.
        except Exception as error:
            found = f"a file that cannot be read ({reason(error)}): {REMEDY}"
            raise unusable(path, expected, found) from error
    if not isinstance(state, dict) or not isinstance(state.get("identity"), dict):
        raise unusable(path, expected, f"one of another form: {REMEDY}")
    if missing := [name for name in fields if name not in state]:
        raise unusable(path, expected, f"one without {', '.join(missing)}: {REMEDY}")
    return state


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Turns errors of loading a checkpoint's state into a ValueError that names the file.

    Raises:
        ValueError: the state does not fit.
    """
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise unusable(
            path, "a checkpoint of this run", f"one that does not fit ({reason(error)}): {REMEDY}"
        ) from error

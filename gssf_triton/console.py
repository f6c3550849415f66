"""Consoles of any encoding, and none: what a program prints never stops it."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TextIO


def ready() -> None:
    """To be called first in a program: what the console's encoding lacks is escaped.

    A console that was closed takes everything: Python has None for it, which nothing can be printed to.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def knows_unicode() -> bool:
    """Whether standard output can be written any text as it is."""
    return (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "").startswith("utf")


def give_up_output() -> None:
    """Standard output takes no more: Python would complain of it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leads_to(stream: TextIO | None, path: Path | None) -> bool:
    """Whether what is printed to `stream` arrives in `path` (/dev/stdout): among results it would spoil them."""
    try:
        return path is not None and stream is not None and os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
    except (AttributeError, OSError, ValueError):  # not there, or a stream without a descriptor
        return False


def say(text: str, results: Path | None = None) -> None:
    """A line about a program's work, which is none of its results: on stderr, left out where `results` go there."""
    if not leads_to(sys.stderr, results):
        print(text, file=sys.stderr)

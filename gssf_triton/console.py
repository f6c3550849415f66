"""Printing that never stops a program: to a console of any encoding, to a closed one, to none."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TextIO


def ready() -> None:
    """To be called first in a program: characters that the console's encoding lacks are escaped.

    A closed stream, which Python replaces by None, is replaced by os.devnull.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def knows_unicode() -> bool:
    """Whether standard output can encode any text."""
    return (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "").startswith("utf")


def give_up_output() -> None:
    """Discard further standard output: Python would report the broken stream again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leads_to(stream: TextIO | None, path: Path | None) -> bool:
    """Whether what is printed to `stream` lands in `path` (/dev/stdout), among the results."""
    try:
        return path is not None and stream is not None and os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
    except (AttributeError, OSError, ValueError):  # no such file, or a stream without a descriptor
        return False


def say(text: str, results: Path | None = None) -> None:
    """Print a line about the work on stderr, unless the `results` go there."""
    if not leads_to(sys.stderr, results):
        print(text, file=sys.stderr)

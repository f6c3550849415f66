"""The installed Triton, found without importing it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

#: The kernels are written and tested for it and all later releases. torch 2.8 and 2.9 bring older ones.
OLDEST_TRITON = "3.6"


def _installed_triton() -> str | None:
    """The version that Triton's source states, whatever its distribution is called; None without Triton."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    stated = re.search(r"^__version__ = ['\"]([^'\"]+)", Path(spec.origin).read_text(encoding="utf-8"), re.MULTILINE)
    return stated.group(1) if stated else None


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number of "3.6.0+git1234"."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


TRITON_VERSION = _installed_triton()
#: Major and minor number; empty without Triton.
TRITON_RELEASE = _release(TRITON_VERSION or "")
#: Whether a Triton is installed that the kernels run with.
HAS_TRITON = TRITON_VERSION is not None and _release(OLDEST_TRITON) <= TRITON_RELEASE

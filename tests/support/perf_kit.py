"""What the benchmark's tests share: measurements that take no time."""

from __future__ import annotations

from pathlib import Path

import _machine
import pytest

PERF = Path(__file__).resolve().parents[2] / "perf"


def quick(patch: pytest.MonkeyPatch) -> None:
    """Small ceilings, and between contenders no collection of all the garbage of a test run."""
    patch.setitem(_machine.COPY_BYTES, "cpu", 2**16)
    patch.setitem(_machine.MATRIX_SIDE, "cpu", 32)
    patch.setattr(_machine, "release", lambda *_: None)

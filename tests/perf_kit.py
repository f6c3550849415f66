"""What the benchmark's tests share: a machine whose ceilings take no time to measure."""

from __future__ import annotations

from pathlib import Path

import _machine
import pytest

PERF = Path(__file__).resolve().parent.parent / "perf"


def small_ceilings(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(_machine.COPY_BYTES, "cpu", 2**16)
    patch.setitem(_machine.MATRIX_SIDE, "cpu", 32)

"""What test_tuner_store.py's processes do; apart, so that a process need not import pytest."""

from __future__ import annotations

import os
from itertools import count, islice
from pathlib import Path

from gssf_triton.autotune.space import Key
from gssf_triton.autotune.store import Store
from gssf_triton.autotune.tables import Entry
from gssf_triton.kernels.configs import ChunkConfig
from gssf_triton.kernels.devices import Device

DEVICE = Device("cpu-1", "a CPU", "cpu")


def add_results(first: str, path: str, each: str) -> None:
    """Add `each` results (0: without end) of D = first, first + 1, …, and report each that was added in a file."""
    store = Store(DEVICE, Path(path))
    report = os.open(f"{path}.reported-{first}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for D in islice(count(int(first)), int(each) or None):
        store.add({Key("chunk", "fp32", D, 0, 64, 64): Entry(ChunkConfig(512, 4096), 0.5, 0.1, *"ttc")})
        os.write(report, f"{D}\n".encode())


def reported(path: Path) -> set[int]:
    """All that was added, by those that were killed too."""
    files = path.parent.glob(f"{path.name}.reported-*")
    return {int(line) for file in files for line in file.read_text().split()}

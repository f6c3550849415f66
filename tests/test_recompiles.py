"""A new batch size compiles nothing: Triton's own cache keys, counted on the stub of a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.kernels

COUNT = Path(__file__).parent / "support" / "compilations.py"


def test_no_batch_size_compiles_anew(tmp_path: Path) -> None:
    """Once an even and a ragged size have been seen; the losses, and S without gradients, from the first call on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, str(COUNT), "float32", "bfloat16"],
        capture_output=True, text=True, env=environment, timeout=600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    for dtype, found in json.loads(run.stdout).items():
        assert len(found) >= 40
        assert {name: sizes for name, sizes in found.items() if any(new for _, new in sizes)} == {}, dtype

"""CUDA graphs: nothing that a call does forbids its capture, and docs/training.md's examples run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

#: Plant → part of the fault that must be found for it.
PLANTED = {
    "item": ".item() cannot be called",
    "bool": ".item() cannot be called",
    "mask": "torch.nonzero()",
    "put": "index_put_ by a mask",
    "nonzero": "torch.nonzero()",
    "equal": "aten::equal",
    "unique": "aten::_unique2",
    "to host": "Cannot copy out of meta tensor",
    "to device": "_to_copy between host and device",
    "number to device": "_to_copy between host and device",
    "copy_": "copy_ between host and device",
    "tensor": "tensor",
    "new_tensor": "new_tensor",
    "synchronize": "synchronize",
    "event": "Event",
}
PROGRAM = Path(__file__).parent / "support" / "capture.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    """What the program prints: group → call → its faults."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    run = subprocess.run(
        [sys.executable, str(PROGRAM)], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    groups: dict[str, dict[str, list[str]]] = json.loads(run.stdout)
    return groups


@pytest.mark.kernels
@pytest.mark.parametrize("group", ["calls", "harmless"])
def test_a_capture_meets_nothing_forbidden(found: dict[str, dict[str, list[str]]], group: str) -> None:
    assert found[group] and {name: faults for name, faults in found[group].items() if faults} == {}


@pytest.mark.kernels
def test_what_is_forbidden_is_found(found: dict[str, dict[str, list[str]]]) -> None:
    planted = found["planted"]
    assert planted.keys() == PLANTED.keys()
    assert {name: faults for name, faults in planted.items() if not any(PLANTED[name] in x for x in faults)} == {}


@pytest.mark.kernels
def test_the_pages_examples_run(found: dict[str, dict[str, list[str]]]) -> None:
    """Those for a GPU on the stub, the others on the CPU."""
    assert len(found["page"]) >= 4 and {name: faults for name, faults in found["page"].items() if faults} == {}

"""For programs of perf/ that are rehearsed without a GPU: torch sees a stubbed one, and some packages are missing.

Python imports this at its start where this folder is on the path. The kernels run in Triton's interpreter.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from typing import Any

#: What the first machines with a GPU do not hold.
MISSING = ("platformdirs", "faiss", "xdist", "open_clip")
#: Of perf/, what computes; what only starts it needs no GPU.
REHEARSED = ("bench.first.worker", "gpu_check.py", "sweep.py")
#: A task of first_run.py in which the process is to die, as at an illegal access, or to hang.
ABORT, HANG = "GSSF_REHEARSAL_ABORT", "GSSF_REHEARSAL_HANG"


class Hiding:
    """A finder of modules that does not find some."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        if name.partition(".")[0] in MISSING:
            return None
        find = getattr(self.finder, "find_spec", None)
        return None if find is None else find(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def _rehearse() -> None:
    sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
    from gssf_triton.autotune.stub import stub_gpu

    stub = stub_gpu("sm_90", backing="cpu")
    stub.__enter__()
    import torch

    # These make what is on a device without an operation that the stub would see.
    generator, tensor = torch.Generator, torch.tensor
    torch.Generator = lambda device=None: generator()  # type: ignore[assignment,misc]
    torch.tensor = lambda data, device=None, **options: tensor(data, **options)  # type: ignore[assignment]
    atexit.register(stub.__exit__, None, None, None)


if any(os.path.basename(argument) in REHEARSED for argument in sys.orig_argv):
    _rehearse()

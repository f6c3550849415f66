"""When the package may look at tables, and when it may tune: `GSSF_AUTOTUNE`, and the moments it never does at."""

from __future__ import annotations

import os
import warnings
from functools import cache

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

VARIABLE = "GSSF_AUTOTUNE"
#: off: the model alone, no file is read. cached: tables, and the model for the rest. on: keys that no table has are
#: tuned at their first use.
MODES = ("off", "cached", "on")
DEFAULT = "cached"
#: Tune the interpreter's kernels too: their times say nothing about a GPU's.
INTERPRETER_VARIABLE = "GSSF_AUTOTUNE_INTERPRETER"


@cache
def _complain(value: str) -> None:
    warnings.warn(f"{VARIABLE} must be one of {', '.join(MODES)}, got {value!r}: taken as {DEFAULT}", stacklevel=4)


def mode() -> str:
    """The mode by the environment, `cached` where nothing, or nothing known, is set."""
    value = os.environ.get(VARIABLE, DEFAULT).strip().lower() or DEFAULT
    if value not in MODES:
        _complain(value)
        return DEFAULT
    return value


def interpreter_may_be_tuned() -> bool:
    return os.environ.get(INTERPRETER_VARIABLE, "0") == "1"


def is_tracing() -> bool:
    """True while torch.compile, export or another dispatch mode looks on: there may be no data, and no time to pass."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def is_capturing(device: torch.device) -> bool:
    """True while a CUDA graph is captured: a synchronisation would break the capture."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()

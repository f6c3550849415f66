"""The tuner's answer to `kernels.choice`: when tables are read, and when a key may be tuned (`GSSF_AUTOTUNE`)."""

from __future__ import annotations

import os
import warnings
from functools import cache

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from gssf_triton.autotune import lookup, tuner
from gssf_triton.autotune.space import WITHOUT_COLUMNS, make_key, numerics
from gssf_triton.kernels.choice import Call, Config, device_of

VARIABLE = "GSSF_AUTOTUNE"
#: off: the model alone, no file is read. cached: tables, and the model for the rest. on: keys that no table has are
#: tuned at their first use.
MODES = ("off", "cached", "on")
DEFAULT = "cached"
#: Set to 1, the interpreter's kernels are tuned too; their times are not a GPU's.
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


def is_tracing() -> bool:
    """True under torch.compile, export or another dispatch mode: there may be no data, and timing means nothing."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def is_capturing(device: torch.device) -> bool:
    """True while a CUDA graph is captured: a synchronisation would break the capture."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _may_tune(arch: str, where: torch.device) -> bool:
    """Whether the tuner may run at this moment."""
    if lookup.is_tuning or where.type not in ("cuda", "cpu") or is_tracing() or is_capturing(where):
        return False
    return arch != "interpreter" or os.environ.get(INTERPRETER_VARIABLE, "0") == "1"


def answer(call: Call) -> tuple[Config | None, bool]:
    """The finder of `kernels.choice`: (measured configuration or None, whether it may be remembered)."""
    kernel, where, dtype, tf32, M, N, D, B, batch = call
    chosen = mode()
    if chosen == "off" or not M * D * batch or (not N and kernel not in WITHOUT_COLUMNS):
        return None, True
    device = device_of(call)
    key = make_key(kernel, numerics(dtype, tf32), M, N, D, B, batch)
    lasting = True
    with lookup.lock:
        if chosen == "on" and key not in lookup.entries_for(device) and (device, key) not in lookup.tried:
            if _may_tune(device.arch, where):
                lookup.tried.add((device, key))
                tuner.tune_on_first_use(key, where)
            else:
                # During a capture, for example: the key is tuned at its next use.
                lasting = lookup.is_tuning or device.arch == "interpreter"
        found = lookup.find(key, device.arch, lookup.entries_for(device))
        return found.entry.config if found else None, lasting

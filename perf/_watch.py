"""Launches as they happen: which kernel, with what tile, specialised how, and what the compiler made of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

#: What of a compiled kernel is noted, by the name it has in the results.
FACTS = {"registers": "n_regs", "spills": "n_spills"}


def _kind(value: Any) -> str:
    """An argument as Triton specialises it: by dtype and alignment, by divisibility, or by its value."""
    if isinstance(value, Tensor):
        aligned = value.device.type == "meta" or value.data_ptr() % 16 == 0
        return f"*{str(value.dtype).removeprefix('torch.')}{':16' if aligned else ''}"
    if isinstance(value, bool) or not isinstance(value, int):
        return type(value).__name__
    if value == 1:
        return "=1"
    return f"{'i32' if -(2**31) <= value < 2**31 else 'i64'}{':16' if value % 16 == 0 else ''}"


#: The compiler's, among a launch's arguments.
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


def _constants(kernel: Any) -> set[str]:
    """The kernel's constexpr parameters."""
    return {name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)}


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, str)) else getattr(value, "__name__", str(value))


def _note(kernel: Any, compiled: Any, grid: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """A launch in a few words."""
    fixed = _constants(kernel) | set(OPTIONS)
    note: dict[str, Any] = {
        "kernel": kernel.fn.__name__.removesuffix("_kernel"),
        "grid": list(grid),
        "config": {name: _plain(value) for name, value in arguments.items() if name in fixed},
        "signature": {name: _kind(value) for name, value in arguments.items() if name not in fixed},
        "sizes": {n: v for n, v in arguments.items() if n not in fixed and n.isupper() and isinstance(v, int)},
    }
    if compiled is not None:
        # Only once it is loaded does a kernel know its registers; one that the device refuses raises at its launch.
        with suppress(Exception):
            compiled._init_handles()
        note |= {name: getattr(compiled, attribute, None) for name, attribute in FACTS.items()}
        note["shared"] = compiled.metadata.shared
    return note


def _zeroed(allocate: Any) -> Any:
    return lambda *args, **kwargs: allocate(*args, **kwargs).zero_()


@contextmanager
def zeroed_memory() -> Iterator[None]:
    """Fresh buffers hold zeros: where no kernel writes an index, what reads it must find one that exists."""
    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, _zeroed(getattr(owner, name))))
        yield


@contextmanager
def watched(*, launch: bool = True) -> Iterator[list[dict[str, Any]]]:
    """The different launches inside, in order; without `launch` they are compiled, and that is all."""
    notes: list[dict[str, Any]] = []
    seen: set[str] = set()

    def replacing(run: Any) -> Any:
        def noted(self: Any, *args: Any, grid: Any, warmup: bool, **arguments: Any) -> Any:
            try:
                compiled = run(self, *args, grid=grid, warmup=warmup or not launch, **arguments)
            except Exception:
                notes.append(_note(self, None, grid, arguments))
                raise
            note = _note(self, compiled, grid, arguments)
            if (key := repr(note)) not in seen:
                seen.add(key)
                notes.append(note)
            return compiled

        return noted

    with ExitStack() as stack:
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(mock.patch.object(kind, "run", replacing(kind.run)))
        if not launch:
            stack.enter_context(zeroed_memory())
        yield notes


def short(note: dict[str, Any]) -> str:
    """A launch for a table: "stream M128 N64 K64 w8 s3, 98 registers"."""
    config = note["config"]
    tile = " ".join(f"{n.removeprefix('BLOCK_')}{v}" for n, v in config.items() if n.startswith("BLOCK_"))
    text = f"{note['kernel']} {tile} w{config.get('num_warps')} s{config.get('num_stages')}"
    if note.get("registers") is not None:
        text += f", {note['registers']} registers"
    return text + (f", {note['spills']} spilled" if note.get("spills") else "")

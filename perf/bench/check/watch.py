"""Launches as they happen: which kernel, with what tile, specialised how, and what the compiler made of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields, is_dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

#: What of a compiled kernel is noted, by the name it has in the results.
FACTS = {"registers": "n_regs", "spills": "n_spills"}
#: The compiler's, among a launch's arguments.
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


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


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """An argument's values, of named values within it each by its path: "a.ptr"."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        for field, inner in zip(value._fields, value, strict=True):
            yield from _flat(f"{name}.{field}", inner)
    else:
        yield name, value


def _constants(name: str, value: Any) -> dict[str, Any]:
    """What a launch is compiled for, of one argument: the fields of a tile, or a value."""
    if is_dataclass(value):
        return {k: v for field in fields(value) for k, v in _constants(field.name, getattr(value, field.name)).items()}
    value = getattr(value, "value", value)
    return {name: value if isinstance(value, (int, str)) else getattr(value, "__name__", str(value))}


def _note(kernel: Any, compiled: Any, grid: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """A launch in a few words."""
    fixed = {name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)} | set(OPTIONS)
    config = [_constants(name, value) for name, value in arguments.items() if name in fixed]
    given = {k: v for name, value in arguments.items() if name not in fixed for k, v in _flat(name, value)}
    note: dict[str, Any] = {
        "kernel": kernel.fn.__name__.removesuffix("_kernel"),
        "grid": list(grid),
        "config": {name: value for one in config for name, value in one.items()},
        "signature": {name: _kind(value) for name, value in given.items()},
        "sizes": {name: value for name, value in given.items() if name.isupper() and isinstance(value, int)},
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
def watched(*, launch: bool = True) -> Iterator[list[dict[str, Any]]]:
    """The different launches inside, in order; without `launch` they are compiled, and that is all.

    Fresh buffers then hold zeros: where no kernel writes an index, what reads it must find one that exists.
    """
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

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
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            if not launch:
                stack.enter_context(mock.patch.object(owner, name, _zeroed(getattr(owner, name))))
        yield notes


def short(note: dict[str, Any]) -> str:
    """A launch for a table: "stream M128 N64 K64 w8 s3, 98 registers"."""
    config = note["config"]
    tile = " ".join(f"{n.removeprefix('BLOCK_')}{v}" for n, v in config.items() if n.startswith("BLOCK_") and v)
    text = f"{note['kernel']} {tile} w{config.get('num_warps')} s{config.get('num_stages')}"
    if note.get("registers") is not None:
        text += f", {note['registers']} registers"
    return text + (f", {note['spills']} spilled" if note.get("spills") else "")

"""Starts compiled kernels again: the one place that knows Triton from inside.

Triton binds, specialises and hashes the arguments of every launch anew, which is most of its host time. Two memories
save that: `again` knows the kernel that such arguments ran before, and a `remembered` launcher the whole launch that it
made of such tensors. Both tell apart all that Triton compiles for, more finely than Triton does, and neither holds an
address. Where there is more to a launch (the interpreter, a replaced `run`, another Triton), it takes Triton's own way.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gssf_triton.kernels import choice
from gssf_triton.kernels.configs import tf32_allowed
from gssf_triton.kernels.tile import INTERPRETED
from gssf_triton.metric import Metric

try:
    from triton import knobs
    from triton.compiler import CompiledKernel
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    #: Triton's own. Another one, a test's for example, wants to see every launch.
    _run = JITFunction.run
    _usable = not INTERPRETED
except (ImportError, AttributeError):
    _usable = False

#: Launches remembered before all are forgotten: bounds the memory of a program in which every batch has another size.
MOST_REMEMBERED = 4096
#: Sizes from here on are 64-bit in kernels.
INT32_LIMIT = 2**31
#: The bits of an address that say whether 16 divides it.
LOW_BITS = 15
#: Triton for AMD compiles for storages below 2 GiB, too.
_on_amd = torch.version.hip is not None

Key = tuple[Any, ...]
Arguments = Mapping[str, Any]


class Launch(NamedTuple):
    """A launch: the compiled kernel, None if that is not known; the grid's three sides; the arguments in order."""

    compiled: Any
    grid: tuple[int, ...]
    values: list[Any]


class Known(NamedTuple):
    """A launcher's launch. `slots`: (position, argument) of the arguments that hold tensors, as `_slots` has them."""

    launch: Launch
    slots: list[tuple[int, Any]]


class Slot(NamedTuple):
    """In place of a tensor: which of the inputs' tensors it is; and the rest of a tuple that begins with it."""

    tensor: int
    rest: tuple[Any, ...] | None


class _Watch(threading.local):
    """What a launcher starts in this thread, while one is watched."""

    launches: list[Launch] | None = None


_watch = _Watch()
_kernels: dict[Key, Any] = {}
_known: dict[Key, Known] = {}
#: A kernel's parameters, by its function: the name, and whether Triton compiles for an integer's width alone.
_parameters: dict[Any, list[tuple[str, bool]]] = {}


def forget() -> None:
    """Forget every launch."""
    _kernels.clear()
    _known.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=forget)


def _remember(memory: dict[Key, Any], key: Key, value: Any) -> None:
    if len(memory) >= MOST_REMEMBERED:
        memory.clear()
    memory[key] = value


def _state() -> list[Any] | None:
    """The current device and Triton's settings; None where every launch must take Triton's own way."""
    if not _usable or JITFunction.run is not _run or getattr(knobs.runtime, "add_stages_inspection_hook", None):
        return None
    compilation = knobs.compilation  # Triton compiles anew when one of these settings changes
    casts = getattr(compilation, "fpsan_homomorphic_casts", None)
    return [driver.active.get_current_device(), knobs.runtime.debug, compilation.instrumentation_mode, casts]


def _add(key: list[Any], values: Iterable[Any], leaves: list[Any] | None = None) -> None:
    """Add to a key all that Triton may compile for in arguments; with `leaves`, which get the tensors, in inputs."""
    for value in values:
        kind = type(value)
        if kind is int or value is None:
            key.append(value)
        elif kind is Tensor or isinstance(value, Tensor):
            key.append(value.dtype)
            key.append(value.data_ptr() & LOW_BITS)
            if _on_amd:
                key.append(value.untyped_storage().nbytes() < INT32_LIMIT)
            if leaves is not None:
                key.append(value.shape)
                key.append(value.stride())
                leaves.append(value)
        elif kind is Metric:
            _add(key, (value.W_diag, value.W_blocks), leaves)
        elif isinstance(value, tuple):
            key.append(kind)
            _add(key, value, leaves)
        elif kind is JITFunction:
            key.append(value.fn)  # the hash of the function itself takes a lock
        else:
            key.append(kind)
            key.append(value)


def _start(launch: Launch) -> bool:
    """Start a launch on the current stream; False, from then on, if this Triton starts kernels otherwise."""
    global _usable
    try:
        launch.compiled[launch.grid](*launch.values)
    except TypeError:
        _usable = False
        return False
    if _watch.launches is not None:
        _watch.launches.append(launch)
    return True


# ------------------------------------------------------------------------------------------- by a launch's arguments


def _parameters_of(kernel: Any) -> list[tuple[str, bool]]:
    found = _parameters.get(kernel.fn)
    if found is None:
        found = _parameters[kernel.fn] = [(name, name in kernel.do_not_specialize) for name in kernel.arg_names]
    return found


def _read(kernel: Any, options: Arguments, arguments: Arguments) -> tuple[Key | None, list[Any]]:
    """(the key of a launch, None where it must take Triton's own way; its arguments in order)."""
    values: list[Any] = []
    strict: list[Any] = []
    state = _state()
    if state is None or type(kernel) is not JITFunction or kernel.pre_run_hooks:
        return None, values
    key = [kernel.fn, *options.values(), *state]
    for name, by_width in _parameters_of(kernel):
        value = arguments[name]
        values.append(value)
        if by_width and type(value) is int:
            key.append(0 <= value < INT32_LIMIT or value)
        else:
            strict.append(value)
    _add(key, strict)
    return tuple(key), values


def again(kernel: Any, grid: tuple[int, ...], options: Arguments, arguments: Arguments) -> bool:
    """Start a kernel on the current device if it is known what such arguments run; False if not."""
    key, values = _read(kernel, options, arguments)
    compiled = None if key is None else _kernels.get(key)
    return compiled is not None and _start(Launch(compiled, (*grid, 1, 1)[:3], values))


def learn(compiled: Any, kernel: Any, grid: tuple[int, ...], options: Arguments, arguments: Arguments) -> None:
    """Remember what Triton has started."""
    key, values = _read(kernel, options, arguments)
    if key is None or not isinstance(compiled, CompiledKernel):
        compiled = None
    else:
        _remember(_kernels, key, compiled)
    if _watch.launches is not None:
        _watch.launches.append(Launch(compiled, (*grid, 1, 1)[:3], values))


# ------------------------------------------------------------------------------------------- by a launcher's inputs


def _look(launcher: Any, inputs: tuple[Any, ...], named: Arguments) -> tuple[Key | None, list[Any]]:
    """(the key of a launcher's inputs, None where the launch must take the launcher's own way; their tensors)."""
    tensors: list[Any] = []
    state, version = _state(), choice.version()
    if state is None or version is None:
        return None, tensors
    key = [launcher, version, tf32_allowed(), *state, *named]
    _add(key, inputs, tensors)
    if named:
        _add(key, named.values(), tensors)
    where = tensors[0].device
    return None if where.type == "cuda" and where.index != state[0] else tuple(key), tensors


def _slots(value: Any, tensors: list[Any]) -> Any:
    """An argument with slots in place of tensors. A LookupError for a tensor that is no input, or several."""
    if isinstance(value, Tensor):
        found = [i for i, x in enumerate(tensors) if x is value]
        if len(found) != 1:
            raise LookupError
        return Slot(found[0], None)
    if not isinstance(value, tuple):
        return value
    first, *rest = parts = [_slots(part, tensors) for part in value]
    if not any(type(part) in (Slot, list) for part in parts):
        return value
    alone = type(first) is Slot and first.rest is None and not any(type(part) in (Slot, list) for part in rest)
    return Slot(first.tensor, tuple(rest)) if alone else parts


def _filled(value: Any, tensors: list[Any]) -> Any:
    if type(value) is Slot:
        index, rest = value
        return tensors[index] if rest is None else (tensors[index], *rest)
    return tuple([_filled(part, tensors) for part in value]) if type(value) is list else value


def remembered(launcher: Callable[..., None]) -> Callable[..., None]:
    """A launcher whose launch is remembered by what its inputs look like.

    What it starts must follow from the sizes, strides, dtypes and devices of its inputs: tensors, None, a `Metric`,
    other hashable values, and tuples of them. It is remembered if it starts one kernel on these very tensors, and that
    must be all it does.
    """

    @wraps(launcher)
    def launch(*inputs: Any, **named: Any) -> None:
        key, tensors = _look(launcher, inputs, named)
        known = None if key is None else _known.get(key)
        if known is not None:
            values = known.launch.values.copy()
            for position, value in known.slots:
                values[position] = _filled(value, tensors)
            if _start(Launch(known.launch.compiled, known.launch.grid, values)):
                return
        if key is None or _watch.launches is not None:
            launcher(*inputs, **named)
            return
        launches: list[Launch] = []
        _watch.launches = launches
        try:
            launcher(*inputs, **named)
        finally:
            _watch.launches = None
        # A choice that does not last, made while a graph is captured for example, has changed the version.
        if len(launches) == 1 and launches[0].compiled is not None and choice.version() == key[1]:
            with suppress(LookupError):
                _remember(_known, key, _without_tensors(launches[0], tensors))

    return launch


def _without_tensors(launch: Launch, tensors: list[Any]) -> Known:
    """A launch that holds no tensor of its own."""
    parts = [_slots(value, tensors) for value in launch.values]
    slots = [(i, part) for i, part in enumerate(parts) if type(part) in (Slot, list)]
    return Known(launch._replace(values=[None if type(part) in (Slot, list) else part for part in parts]), slots)

"""Starts compiled kernels again: the one place that knows Triton from inside.

Triton binds, specialises and hashes the arguments of every launch anew, which is most of its host time. Two memories
save that: `again` knows the kernel that such arguments ran before, and a `remembered` launcher all that it made,
started and returned of such tensors. Both tell apart all that Triton compiles for, more finely than Triton does, and
neither holds an address. Where there is more to a launch (the interpreter, a hook, a replaced `run`, a subclass of
Tensor, another Triton), it takes Triton's own way.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

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

R = TypeVar("R")
Key = tuple[Any, ...]
#: Where a launcher's key has the current device, and the version of the choices.
DEVICE, VERSION = 0, 4
Arguments = Mapping[str, Any]


class Launch(NamedTuple):
    """A launch: the compiled kernel, None if that is not known; the grid's three sides; the arguments in order."""

    compiled: Any
    grid: tuple[int, ...]
    values: list[Any]


class Step(NamedTuple):
    """A launch without its tensors.

    Attributes:
        launch: With None in their place.
        slots: (position, which tensor, the rest of a tuple that begins with it, or None).
        tuples: (position, argument) of the tuples that hold tensors elsewhere, as `_slots` has them.
    """

    launch: Launch
    slots: list[tuple[int, int, tuple[Any, ...] | None]]
    tuples: list[tuple[int, list[Any]]]


class Known(NamedTuple):
    """What a launcher does. Tensors count from the inputs' on; those that it makes come next.

    Attributes:
        made: (shape, dtype) of the tensors that it makes.
        steps: Its launches.
        result: As `_slots` has it.
    """

    made: list[tuple[Any, ...]]
    steps: list[Step]
    result: Any


#: Of a launcher that was called once: it is watched the second time, when no key is left to be tuned.
ONCE = Known([], [], None)
#: Of one that cannot be repeated.
NEVER = Known([], [], None)


class Slot(NamedTuple):
    """In place of a tensor: which of them it is; and the rest of a tuple that begins with it."""

    tensor: int
    rest: tuple[Any, ...] | None


class _Watch(NamedTuple):
    """What a launcher starts and makes."""

    launches: list[Launch]
    made: list[Tensor]


class _Current(threading.local):
    """The watch of a launcher in this thread, if one is watched."""

    watch: _Watch | None = None


_current = _Current()


def empty(shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, which a launcher makes its tensors with, so that it can be repeated; of one dimension at least."""
    watch = _current.watch
    if watch is None:
        return torch.empty(*shape, dtype=dtype, device=device)
    with torch.inference_mode(False):  # whose tensors do not tell that torch wrote them
        made = torch.empty(*shape, dtype=dtype, device=device)
    watch.made.append(made)
    return made


_kernels: dict[Key, Any] = {}
_known: dict[Key, Known] = {}
#: A kernel's parameters, by its function: the name, and whether Triton compiles for an integer's width alone.
_parameters: dict[Any, list[tuple[str, bool]]] = {}


#: Types whose values equal no other's that may be in their place; 1 equals True.
_ALONE = frozenset((int, type(None), torch.dtype))


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
    runtime, compilation = knobs.runtime, knobs.compilation
    if not _usable or JITFunction.run is not _run or getattr(runtime, "add_stages_inspection_hook", None):
        return None
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    if getattr(before, "calls", before) or getattr(after, "calls", after):  # somebody watches launches
        return None
    # Triton compiles anew when one of these settings changes.
    casts = getattr(compilation, "fpsan_homomorphic_casts", None)
    return [driver.active.get_current_device(), runtime.debug, compilation.instrumentation_mode, casts]


def _add(key: list[Any], values: Iterable[Any], leaves: list[Any] | None = None) -> None:
    """Add to a key all that Triton may compile for in arguments; with `leaves`, which get the tensors, in inputs.

    A LookupError for a subclass of Tensor.
    """
    for value in values:
        kind = type(value)
        if kind in _ALONE:
            key.append(value)
        elif kind is Tensor or kind is Parameter:
            if leaves is None:
                key += value.dtype, value.data_ptr() & LOW_BITS
            else:
                key += value.dtype, value.data_ptr() & LOW_BITS, value.shape, value.stride()
                leaves.append(value)
            if _on_amd:
                key.append(value.untyped_storage().nbytes() < INT32_LIMIT)
        elif kind is Metric:
            _add(key, (value.W_diag, value.W_blocks), leaves)
        elif isinstance(value, tuple):
            key += kind, len(value)
            _add(key, value, leaves)
        elif kind is JITFunction:
            key.append(value.fn)  # the hash of the function itself takes a lock
        elif isinstance(value, Tensor):
            raise LookupError  # of another class: it may be anything
        else:
            key += kind, value


def _start(device: int, compiled: Any, grid: tuple[int, ...], values: list[Any]) -> bool:
    """Start a kernel on the device's stream; False, from then on, if this Triton starts kernels otherwise."""
    global _usable
    try:
        x, y, z = grid
        stream = driver.active.get_current_stream(device)
        compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)
        return True
    except (AttributeError, TypeError):
        _usable = False
        return False


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
    try:
        _add(key, strict)
    except LookupError:
        return None, values
    return tuple(key), values


def again(kernel: Any, grid: tuple[int, ...], options: Arguments, arguments: Arguments) -> bool:
    """Start a kernel on the current device if it is known what such arguments run; False if not."""
    key, values = _read(kernel, options, arguments)
    compiled = None if key is None else _kernels.get(key)
    grid = (*grid, 1, 1)[:3]
    if compiled is None or not _start(driver.active.get_current_device(), compiled, grid, values):
        return False
    if _current.watch is not None:
        _current.watch.launches.append(Launch(compiled, grid, values))
    return True


def learn(compiled: Any, kernel: Any, grid: tuple[int, ...], options: Arguments, arguments: Arguments) -> None:
    """Remember what Triton has started."""
    key, values = _read(kernel, options, arguments)
    if key is None or not isinstance(compiled, CompiledKernel):
        compiled = None
    else:
        _remember(_kernels, key, compiled)
    if _current.watch is not None:
        _current.watch.launches.append(Launch(compiled, (*grid, 1, 1)[:3], values))


# ------------------------------------------------------------------------------------------- by a launcher's inputs


def _look(launcher: Any, inputs: tuple[Any, ...]) -> tuple[Key | None, list[Any]]:
    """(the key of a launcher's inputs, None where the launch must take the launcher's own way; their tensors)."""
    tensors: list[Any] = []
    state, version = _state(), choice.version()
    if state is None or version is None:
        return None, tensors
    key = [*state, version, launcher, tf32_allowed()]
    try:
        _add(key, inputs, tensors)
    except LookupError:
        return None, tensors
    where = tensors[0].device
    return None if where.index != state[0] and where.type == "cuda" else tuple(key), tensors


def _slots(value: Any, tensors: list[Any]) -> Any:
    """An argument with slots in place of tensors. A LookupError for a tensor that is none of them, or several."""
    if isinstance(value, Tensor):
        found = [i for i, x in enumerate(tensors) if x is value]
        if len(found) != 1:
            raise LookupError
        return Slot(found[0], None)
    if not isinstance(value, tuple) or not value:
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


def remembered(launcher: Callable[..., R]) -> Callable[..., R]:
    """A launcher that is remembered by what its inputs look like: what it makes, starts and returns.

    That must follow from the sizes, strides, dtypes and devices of its inputs: tensors, None, a `Metric`, other
    hashable values, and tuples of them. It is repeated if kernels take no tensor but its inputs and what it makes with
    `empty`, if torch writes none of these, and if its results are such tensors, None, and tuples of them.
    """

    @wraps(launcher)
    def launch(*inputs: Any) -> R:
        if _current.watch is not None:
            return launcher(*inputs)
        key, tensors = _look(launcher, inputs)
        if key is None:
            return launcher(*inputs)
        known = _known.get(key)
        if known is None or known is NEVER:
            if known is None:
                _remember(_known, key, ONCE)
            return launcher(*inputs)
        if known is ONCE:
            return _watched(launcher, inputs, key, tensors)
        made, steps, result = known
        if made:
            where = tensors[0].device
            tensors += [torch.empty(*shape, dtype=dtype, device=where) for shape, dtype in made]
        for (compiled, grid, values), slots, tuples in steps:
            values = values.copy()
            for position, index, rest in slots:
                values[position] = tensors[index] if rest is None else (tensors[index], *rest)
            for position, parts in tuples:
                values[position] = _filled(parts, tensors)
            if not _start(key[DEVICE], compiled, grid, values):
                return launcher(*inputs)
        found: R = _filled(result, tensors)
        return found

    return launch


def _watched(launcher: Callable[..., R], inputs: Any, key: Key, tensors: list[Any]) -> R:
    """The launcher's result, and what it does remembered."""
    if len({id(x) for x in tensors}) < len(tensors):  # which of the two a kernel takes cannot be told
        return launcher(*inputs)
    _current.watch = watch = _Watch([], [])
    before = _versions(tensors)
    try:
        result = launcher(*inputs)
    finally:
        _current.watch = None
    # A choice that does not last, made while a graph is captured for example, has changed the version.
    if choice.version() == key[VERSION]:
        written = _versions(tensors) != before or any(_versions(watch.made))
        _remember(_known, key, NEVER if written else _without_tensors(watch, result, tensors))
    return result


def _versions(tensors: list[Tensor]) -> list[int]:
    """How often torch has written each of them. Inference tensors, which do not tell, are only ever inputs."""
    return [0 if x.is_inference() else x._version for x in tensors]


def _without_tensors(watch: _Watch, result: Any, tensors: list[Any]) -> Known:
    """What a launcher did, with no tensor; `NEVER` where it cannot be repeated."""
    elsewhere = any(x.device != tensors[0].device for x in watch.made)
    if elsewhere or not watch.launches or any(step.compiled is None for step in watch.launches):
        return NEVER
    tensors = [*tensors, *watch.made]
    steps = []
    with suppress(LookupError):
        for launch in watch.launches:
            parts = [_slots(value, tensors) for value in launch.values]
            steps.append(Step(
                launch._replace(values=[None if type(part) in (Slot, list) else part for part in parts]),
                [(i, *part) for i, part in enumerate(parts) if type(part) is Slot],
                [(i, part) for i, part in enumerate(parts) if type(part) is list],
            ))  # fmt: skip
        return Known([(tuple(x.shape), x.dtype) for x in watch.made], steps, _slots(result, tensors))
    return NEVER

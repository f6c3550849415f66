"""What a public call would run on a GPU, recorded without one: its launches and its eager operations.

Inside `recording` everything runs on the stub (`stub`). Nothing is compiled or computed; a call on 32,768 pairs takes a
second. A `Launch` holds what Triton would compile, as data that any process can compile (`compiled`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._pytree import tree_flatten

from gssf_triton.autotune.stub import stub_driver, stub_gpu

#: The names of strides in tuples of arguments (`kernels.args`).
STRIDES = ("batch", "row", "column", "channel", "stride", "group", "p", "q")
#: Marks of constants that cannot be sent to another process: functions and dtypes go by name, tiles by field.
FUNCTION, DTYPE, TILE = "@function", "@dtype", "@tile"


@dataclass(frozen=True)
class Launch:
    """One compilation: a kernel for an architecture, with the arguments that the compiler sees.

    Attributes:
        arch: "sm_90", …
        module: Where the kernel is defined.
        kernel: Its name, "stream_kernel".
        signature: (parameter, type) in order: "*bf16", "i32", "constexpr", …, for a tuple a tuple of types.
        constants: (path of the parameter, value) of the constants, including arguments that equal 1.
        attributes: (path of the parameter, attributes), such as a divisibility by 16.
        options: The compiler's options, by name.
    """

    arch: str
    module: str
    kernel: str
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], tuple[tuple[Any, ...], ...]], ...]
    options: tuple[tuple[str, Any], ...]

    @cached_property
    def leaves(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Every argument the compiler sees, by name ("a.row" of the tuple a): (path, type)."""
        found: dict[str, tuple[tuple[int, ...], str]] = {}

        def walk(name: str, path: tuple[int, ...], kind: Any) -> None:
            if isinstance(kind, str):
                found[name] = path, kind
                return
            for number, (part, value) in enumerate(zip(kind._fields, kind, strict=True)):
                walk(f"{name}.{part}", (*path, number), value)

        for number, (name, kind) in enumerate(self.signature):
            walk(name, (number,), kind)
        return found

    @cached_property
    def values(self) -> dict[str, Any]:
        """The constants by name. The tile's fields go by their own names."""
        constants = dict(self.constants)
        found = {name: constants[path] for name, (path, _) in self.leaves.items() if path in constants}
        tile = found.get("TILE")
        return found if tile is None else found | dict(tile[3])

    def arguments(self) -> dict[str, Any]:
        """The arguments as `kernels.toolchain` reads them: the values of constants, the types of others."""
        constants = dict(self.constants)

        def value(path: tuple[int, ...], kind: Any) -> Any:
            if isinstance(kind, str):
                return _thaw(constants[path]) if path in constants else kind
            return type(kind)(*(value((*path, number), part) for number, part in enumerate(kind)))

        return {name: value((number,), kind) for number, (name, kind) in enumerate(self.signature)}

    def constant(self, name: str) -> Any:
        """The value of a constant or of a field of the tile; None for any other name."""
        return self.values.get(name)

    def is_divisible(self, name: str) -> bool:
        """True if the compiler knows that 16 divides the argument (a pointer's address)."""
        found = dict(self.attributes).get(self.leaves[name][0], ())
        return any(attribute[0] == "tt.divisibility" for attribute in found)

    @property
    def strides(self) -> list[str]:
        """The names of all strides."""
        return [name for name in self.leaves if name.startswith("stride_") or name.rpartition(".")[2] in STRIDES]

    @property
    def short_name(self) -> str:
        """The kernel's name without "_kernel"."""
        return self.kernel.removesuffix("_kernel")

    @property
    def name(self) -> str:
        """The kernel's short name, with the function that it is compiled for, if any."""
        short = self.short_name
        epilogue = next((v for _, v in self.constants if isinstance(v, tuple) and v[0] == FUNCTION), None)
        return short if epilogue is None else f"{short}/{epilogue[2]}"

    @property
    def num_warps(self) -> int:
        return int(dict(self.options)["num_warps"])

    @property
    def tile(self) -> str:
        """The tile in a few letters: "M128 N64 K64 w8 s3"."""
        short = {"BLOCK_M": "M", "BLOCK_N": "N", "CAPTIONS": "T", "WORDS": "L", "BLOCK_K": "K", "BLOCK_C": "C",
                 "BLOCK_P": "P"}  # fmt: skip
        sizes = [f"{letter}{self.values[name]}" for name, letter in short.items() if self.values.get(name)]
        options = dict(self.options)
        return " ".join([*sizes, f"w{options['num_warps']}", f"s{options['num_stages']}"])

    @property
    def numerics(self) -> str:
        """The dtype of the first pointer, and its products' precision unless that is "ieee"."""
        dtype = next(kind[1:] for _, kind in self.leaves.values() if kind.startswith("*"))
        precision = self.constant("PRECISION")
        return dtype if precision in (None, "ieee") else f"{dtype}/{precision}"

    def source(self) -> Any:
        """The source for `triton.compile`."""
        from triton.compiler import ASTSource

        return ASTSource(
            fn=getattr(import_module(self.module), self.kernel),
            signature=dict(self.signature),
            constexprs={path: _thaw(value) for path, value in self.constants},
            attrs={path: [list(attribute) for attribute in attributes] for path, attributes in self.attributes},
        )


@dataclass
class Record:
    """What one call did: launches with their grids, operations that start a torch kernel, views and allocations.

    `moved`: bytes of the operations' arguments and results. `keys`: Triton's cache keys of the launches.
    """

    launches: list[tuple[Launch, tuple[int, ...]]] = field(default_factory=list)
    operations: Counter[str] = field(default_factory=Counter)
    views: Counter[str] = field(default_factory=Counter)
    moved: int = 0
    keys: set[tuple[str, str]] = field(default_factory=set)

    def distinct(self) -> list[Launch]:
        """The compilations, each once, in order."""
        return list(dict.fromkeys(launch for launch, _ in self.launches))


def _freeze(value: Any) -> Any:
    """A constant as plain data: functions and dtypes by name, tiles by field."""
    from triton.runtime.jit import JITFunction

    from gssf_triton.kernels.args import Tile

    if isinstance(value, JITFunction):
        return (FUNCTION, value.fn.__module__, value.fn.__name__)
    if isinstance(value, Tile):
        constants = tuple((name, _freeze(constant.value)) for name, constant in vars(value).items())
        return (TILE, type(value).__module__, type(value).__name__, constants)
    if value.__class__.__name__ == "dtype":  # Triton's
        return (DTYPE, value.name)
    return value


def _thaw(value: Any) -> Any:
    import triton.language as tl

    if isinstance(value, tuple) and value and value[0] == FUNCTION:
        return getattr(import_module(value[1]), value[2])
    if isinstance(value, tuple) and value and value[0] == TILE:
        return getattr(import_module(value[1]), value[2])(**{name: _thaw(constant) for name, constant in value[3]})
    if isinstance(value, tuple) and value and value[0] == DTYPE:
        return next(x for x in vars(tl).values() if isinstance(x, tl.dtype) and x.name == value[1])
    return value


#: The compiler's options that launches choose.
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg", "ptx_options")


def _options_alone(name: str, signature: Any, constants: Any, attrs: Any, options: Any, *_: Any) -> str:
    return json.dumps({name: getattr(options, name, None) for name in OPTIONS})


def _launch(arch: str, info: Any, compile: dict[str, Any]) -> Launch:
    chosen = json.loads(compile["specialization_data"])
    options = {name: chosen[name] for name in OPTIONS if chosen.get(name) is not None}
    return Launch(
        arch,
        info.jit_function.fn.__module__,
        info.jit_function.fn.__name__,
        tuple(compile["signature"].items()),
        tuple((path, _freeze(value)) for path, value in compile["constants"].items()),
        tuple((path, tuple(map(tuple, found))) for path, found in compile["configs"][0].items() if found),
        tuple(options.items()),
    )


def _bytes(values: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_flatten(values)[0] if isinstance(x, Tensor))


#: Operations that only allocate memory, or query dtypes.
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "promote_types", "resize_")


def _starts_a_kernel(func: Any) -> bool:
    """False for views, allocations and queries."""
    name = func._schema.name.split("::")[1]
    if name in ALLOCATIONS or not func._schema.returns:
        return False
    # A view's result is an alias that it does not write to.
    return not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


class Tape:
    """Records launches and operations, until `cut` returns them."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.record = Record()
        self._grid: tuple[int, ...] = ()

    def cut(self) -> Record:
        """What was recorded since the last cut."""
        done, self.record = self.record, Record()
        return done

    def grid(self, grid: tuple[int, ...]) -> None:
        """The grid of the launch to come."""
        self._grid = tuple(grid)

    def compilation(self, *, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Triton's hook before it compiles: record the launch, and compile nothing."""
        self.record.launches.append((_launch(self.arch, fn, compile), self._grid))
        self.record.keys.add((fn.name, str(key)))
        return True

    def operation(self, func: Any, arguments: Any, out: Any) -> None:
        """One operation of torch's."""
        record, name = self.record, func._schema.name.split("::")[1]
        if _starts_a_kernel(func):
            record.operations[name] += 1
            record.moved += _bytes((arguments, out))
        else:
            record.views[name] += 1


@contextmanager
def recording(arch: str) -> Iterator[Tape]:
    """Record what is launched and computed inside, on the stub of a GPU of `arch`.

    Example:
        >>> import torch, gssf_triton
        >>> from gssf_triton.autotune.rehearsal import recording
        >>> with recording("sm_90") as tape:  # doctest: +SKIP
        ...     a = torch.empty(8192, 1024, device="cuda", dtype=torch.bfloat16)
        ...     S = gssf_triton.pairwise_sim(a, a, torch.ones(1024, device="cuda"))
        >>> [launch.name for launch, grid in tape.cut().launches]  # doctest: +SKIP
        ['fold']
    """
    import triton
    from triton.runtime import jit
    from triton.runtime.jit import JITFunction

    if triton.knobs.runtime.interpret:
        raise RuntimeError("launches can be recorded only without Triton's interpreter: unset TRITON_INTERPRET")
    tape = Tape(arch)
    run = JITFunction.run

    def noted(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        tape.grid(grid)
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    with (
        stub_gpu(arch, seen=tape.operation),
        stub_driver(arch),
        mock.patch.object(JITFunction, "run", noted),
        # Triton calls it for each hook, and 3.6 cannot serialise a constant that is a function.
        mock.patch.object(jit, "serialize_specialization_data", _options_alone),
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", tape.compilation),
    ):
        yield tape

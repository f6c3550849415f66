"""Triton's GPU dialect (TTGIR) as text: how each tile is loaded and stored, and which products share an accumulator.

The text is read line by line. Each value is defined once, so names alone lead from a pointer back to the kernel's
argument, and from a product back to the loads that feed it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

from gssf_triton.autotune.layouts import layout

#: The widest load or store of one lane, in bytes.
LANE_BYTES = 16

_VALUE = re.compile(r"%[\w.-]+(?:#\d+)?")
_OPERATION = re.compile(r"^(?:(%[^=]+?) = )?\"?((?:tt|ttg|ttng|scf|arith|math|amdg|amdgpu)\.\w+)\"?(.*)$")
_PAIR = re.compile(r"(%[\w.-]+) = (%[\w.#-]+)")
_ARGUMENT = re.compile(r"(%[\w.]+): ([^%]*)")

_KINDS = {
    "tt.load": "load",
    "amdg.buffer_load": "load",
    "tt.store": "store",
    "amdg.buffer_store": "store",
    "ttg.async_copy_global_to_local": "async",
    "amdg.buffer_load_to_local": "async",
    "tt.descriptor_load": "tma",
    "tt.descriptor_store": "tma",
    "ttng.async_tma_copy_global_to_local": "tma",
    "ttng.async_tma_copy_local_to_global": "tma",
}
_PRODUCTS = ("tt.dot", "tt.dot_scaled", "ttng.warp_group_dot", "ttng.tc_gen5_mma", "ttng.tc_gen5_mma_scaled")
#: Their results are not the loaded values: addresses, masks, sums, and values loaded from a loaded address.
_ENDS = (*_PRODUCTS, *_KINDS, "tt.addptr", "tt.reduce", "arith.cmpi", "arith.cmpf")
_VIEWS = ("ttg.memdesc_index", "ttg.memdesc_subslice", "ttg.memdesc_subview", "ttg.memdesc_trans")
_UNCHANGED = ("arith.extsi", "arith.extui", "arith.trunci", "ttg.convert_layout", "tt.broadcast", "tt.bitcast")


@dataclass(frozen=True)
class Access:
    """One load or store of a tile in the final TTGIR.

    `kind`: "load", "store", "async" (a copy into shared memory that the thread does not wait for) or "tma" (a load or
    store by descriptor). `argument`: the name of the kernel's pointer or descriptor; None if unknown. `contiguous`: the
    dimension along which addresses step by one element; None if the text shows none, as with a stride that is not the
    constant 1. `fastest`: the dimension that the layout treats as contiguous. `vector_bytes`: what one lane moves in
    one instruction, at most 16. `run_bytes`: what a warp moves side by side. Both are along `contiguous`, or along
    `fastest` if that is None, and 0 for an unknown layout. `per_thread`: the tile's elements divided by the program's
    threads, at least 1.
    """

    kind: str
    argument: str | None
    shape: tuple[int, ...]
    bits: int
    vector_bytes: int
    run_bytes: int
    in_loop: bool
    feeds_dot: bool
    per_thread: int
    contiguous: int | None = None
    fastest: int | None = None


@dataclass
class _Operation:
    name: str
    results: list[str]
    operands: list[str]
    head: str  # the text after the name, as written
    types: str
    region: int
    in_loop: bool

    def named(self, text: str) -> str:
        """The value that a name in this line refers to."""
        return dict(zip(_VALUE.findall(self.head), self.operands, strict=False)).get(text, text)


def _tensors(text: str) -> list[tuple[tuple[int, ...], str, str]]:
    """The tensor types of a line: (shape, element, layout)."""
    found = []
    for start in (x.end() for x in re.finditer(r"tensor<", text)):
        depth, end = 1, start
        while depth and end < len(text):
            depth += {"<": 1, ">": -1}.get(text[end], 0)
            end += 1
        match = re.match(r"((?:\d+x)*)(?:!tt\.ptr<)?([a-zA-Z]\w*)[^#]*(#.*)?$", text[start : end - 1])
        if match:
            found.append((tuple(int(x) for x in match[1].split("x")[:-1]), match[2], match[3] or ""))
    return found


class Module:
    """The operations of a TTGIR text, and the origin of each value."""

    def __init__(self, text: str):
        self.layouts: dict[str, str] = {}
        self.arguments: dict[str, str] = {}
        self.operations: list[_Operation] = []
        self.defined: dict[str, _Operation] = {}
        self.origins: dict[str, list[str]] = {}  # of a loop's values: the first ones, and what an iteration yields
        #: Open regions: (number, operation that has it, names its yields assign, values a `while` continues with).
        self._open: list[tuple[int, str, list[list[str]], list[str]]] = [(0, "", [], [])]
        #: Names in scope, outermost region first: two regions of the text may use the same names.
        self._scopes: list[dict[str, str]] = [{}]
        self._regions = 0
        self._steps: dict[str, tuple[int | None, ...]] = {}
        warps = re.search(r'"ttg\.num-warps" = (\d+)', text)
        lanes = re.search(r'"ttg\.threads-per-warp" = (\d+)', text)
        self.threads = int(warps[1] if warps else 4) * int(lanes[1] if lanes else 32)
        for line in text.splitlines():
            self._read(line.strip())

    def _read(self, line: str) -> None:
        if line.startswith("#"):
            name, _, value = line.partition(" = ")
            if value.startswith("#ttg"):
                self.layouts[name] = value
            return
        if "tt.func" in line:
            for value, rest in _ARGUMENT.findall(line):
                located = re.search(r'loc\("([\w.]+)"', rest)
                self.arguments[self._define(value)] = located[1] if located else value[1:]
        line = re.sub(r" loc\(.*$", "", line)
        if line.startswith("}"):
            _, owner, targets, going = self._open.pop()
            self._scopes.pop()
            if line.endswith("{"):
                self._enter(owner, targets, going)
            return
        if line.startswith("^bb0("):
            for value, origin in zip(_VALUE.findall(line), self._open[-1][3], strict=False):
                self.origins.setdefault(self._define(value), []).append(origin)
            return
        match = _OPERATION.match(line)
        if match and "tt.func" not in line:
            self._operation(match[1] or "", match[2], match[3], line.endswith("{"))
        elif line.endswith("{"):
            self._enter("", [], [])

    def _define(self, name: str) -> str:
        """A unique name for a value that is defined here."""
        unique = f"{name}.{self._regions}" if self._regions else name
        self._scopes[-1][name] = unique
        return unique

    def _use(self, name: str) -> str:
        base, mark, index = name.partition("#")
        known = next((x[base] for x in reversed(self._scopes) if base in x), base)
        return known + mark + index

    def _enter(self, owner: str, targets: list[list[str]], going: list[str]) -> None:
        self._regions += 1
        self._open.append((self._regions, owner, targets, going))
        self._scopes.append({})

    def _operation(self, left: str, name: str, rest: str, opens: bool) -> None:
        head, _, types = re.sub(r" <?\{[^{}]*\}>?", "", rest).partition(" : ")
        loop = name in ("scf.for", "scf.while")
        if loop:
            head = rest.partition(" -> ")[0]
        operands = [self._use(x) for x in _VALUE.findall(head)]
        results = []
        for value in left.split(", ") if left else ():
            base, _, count = value.partition(":")
            unique = self._define(base)
            results += [f"{unique}#{i}" for i in range(int(count))] if count else [unique]
        in_loop = any(owner in ("scf.for", "scf.while") for _, owner, _, _ in self._open)
        operation = _Operation(name, results, operands, rest, types, self._open[-1][0], in_loop)
        self.operations.append(operation)
        self.defined.update(dict.fromkeys(results, operation))
        if loop:
            pairs = [(x, self._use(y)) for x, y in _PAIR.findall(head.partition("iter_args")[2] or head)]
            pairs = pairs if "iter_args" in head or name == "scf.while" else []
            self._enter(name, [], results)
            values = [self._define(x) for x, _ in pairs]
            self._open[-1][2].extend([values, results] if name == "scf.for" else [values])
            for names in self._open[-1][2]:
                for value, (_, origin) in zip(names, pairs, strict=False):
                    self.origins.setdefault(value, []).append(origin)
        elif name in ("scf.yield", "scf.condition"):
            _, owner, targets, going = self._open[-1]
            if name == "scf.condition":  # the loop's results, and the arguments of its second half
                operands = operands[1:]
                targets = [list(going)]
                going[:] = operands
            for names in targets if owner.startswith("scf.") else ():
                for value, origin in zip(names, operands, strict=False):
                    self.origins.setdefault(value, []).append(origin)
        elif opens:
            self._enter(name, [results], [])

    def sources(self, value: str) -> list[str]:
        """The values that a pointer or a buffer is made from."""
        if value in self.origins:
            return self.origins[value]
        operation = self.defined.get(value)
        if operation is None or operation.name in _KINDS:
            return []
        if operation.name == "ttng.reinterpret_tensor_descriptor":  # a descriptor that the kernel writes itself
            made = [x for x in self.operations if x.name == "ttng.tensormap_create"]
            return [x.operands[1] for x in made if x.operands[:1] == operation.operands[:1]]
        return operation.operands[1:3] if operation.name == "arith.select" else operation.operands[:1]

    def argument(self, value: str) -> str | None:
        """The kernel's argument that an address comes from; None unless there is exactly one."""
        found, seen, todo = set(), set(), [value]
        while todo:
            at = todo.pop()
            if at in seen:
                continue
            seen.add(at)
            if at in self.arguments:
                found.add(self.arguments[at])
            todo += self.sources(at)
        return found.pop() if len(found) == 1 else None

    def buffer(self, value: str) -> str:
        """The allocation behind a view."""
        while (operation := self.defined.get(value)) is not None and operation.name in _VIEWS:
            value = operation.operands[0]
        return value

    @cached_property
    def multiplied(self) -> set[str]:
        """Every value and buffer that goes into the factors of a product."""
        stored: dict[str, list[str]] = {}
        for x in self.operations:
            if x.name in ("ttg.local_store", "ttng.tmem_store"):
                stored.setdefault(self.buffer(x.operands[1]), []).append(x.operands[0])
        seen: set[str] = set()
        todo = [v for x in self.operations if x.name in _PRODUCTS for v in x.operands[:2]]
        while todo:
            value = todo.pop()
            if value in seen:
                continue
            seen.add(value)
            todo += self.origins.get(value, []) + stored.get(value, [])
            operation = self.defined.get(value)
            if operation is not None and operation.name not in _ENDS:
                todo += operation.operands[1:] if operation.name == "arith.select" else operation.operands
        return seen

    def steps(self, value: str) -> tuple[int | None, ...]:
        """The step of a tensor of numbers or pointers along each dimension: 0, 1, or None for anything else."""
        if value not in self._steps:
            self._steps[value] = ()  # ends the recursion of a value that depends on itself
            self._steps[value] = self._grows(value)
        return self._steps[value]

    def _grows(self, value: str) -> tuple[int | None, ...]:
        if value in self.origins:
            return self.steps(self.origins[value][0])
        x = self.defined.get(value)
        if x is None:
            return ()
        shapes = [shape for shape, _, _ in _tensors(x.types)]
        rank = len(shapes[-1]) if shapes else 0
        unknown: tuple[int | None, ...] = (None,) * rank
        if x.name == "tt.make_range":
            return (1,)
        if x.name == "tt.splat" or (x.name == "arith.constant" and "dense<[" not in x.head):
            return (0,) * rank
        inner = [self.steps(v) for v in x.operands]
        if x.name in _UNCHANGED:
            return inner[0]
        if x.name == "tt.expand_dims":
            axis = int(re.search(r"axis = (\d+)", x.head)[1])  # type: ignore[index]
            return (*inner[0][:axis], 0, *inner[0][axis:])
        if x.name == "arith.select":
            inner = inner[1:]
        if len(inner) != 2 or any(len(y) != rank for y in inner):
            return unknown
        pairs = list(zip(*inner, strict=True))
        if x.name in ("arith.addi", "tt.addptr"):
            return tuple(p + q if p is not None and q is not None and p + q < 2 else None for p, q in pairs)
        if x.name in ("arith.select", "arith.minsi", "arith.maxsi"):  # a clamp: its step where it does not clamp
            return tuple(None if None in pair else max(pair, key=bool) for pair in pairs)
        if x.name in ("arith.remsi", "arith.remui"):  # its step up to the wrap-around
            return tuple(p if q == 0 else None for p, q in pairs)
        if x.name in ("arith.muli", "arith.divsi", "arith.divui"):  # a quotient repeats
            return tuple(0 if q == 0 and (p == 0 or x.name != "arith.muli") else None for p, q in pairs)
        return unknown


def _pointed(module: Module, x: _Operation) -> Iterator[Access]:
    """The access of a load, store or copy of a tile; the layout is that of its addresses, else of its value."""
    tensors = _tensors(x.types)
    if not tensors or not tensors[0][0]:
        return
    pointers = [t for t in tensors if f"{t[1]}>" in x.types and "!tt.ptr<" in x.types]
    shape, element, text = (pointers or tensors)[0]
    bits = max(8, int(re.search(r"\d+", element)[0]))  # type: ignore[index]
    store = x.name == "amdg.buffer_store"
    address = x.operands[1 if store else 0]
    # AMD's buffer operations take one pointer and a tensor of offsets.
    steps = module.steps(x.operands[2 if store else 1] if x.name.startswith("amdg.") else address)
    units = [d for d, step in enumerate(steps) if step == 1 and d < len(shape) and shape[d] > 1]
    contiguous = units[0] if len(units) == 1 else None
    found = layout(text, module.layouts)
    vector = run = 0
    if found:
        dim = found.fastest if contiguous is None else contiguous
        vector = found.vector(dim, shape[dim])
        limit = re.search(r"contiguity = (\d+)", x.head)
        vector = min(vector, int(limit[1])) if limit else vector
        run = max(found.run(dim, shape[dim]), vector) * bits // 8
    kind = _KINDS[x.name]
    values = x.results if kind == "load" else [module.buffer(x.operands[1])] if kind == "async" else []
    yield Access(
        kind, module.argument(address), shape, bits, min(vector * bits // 8, LANE_BYTES), run, x.in_loop,
        any(v in module.multiplied for v in values), max(1, prod(shape) // module.threads),
        contiguous, found.fastest if found else None,
    )  # fmt: skip


def _described(module: Module, x: _Operation) -> Iterator[Access]:
    """The access of a load or store by descriptor: whole rows, not moved by threads."""
    tile = re.search(r"tensordesc<(?:tensor<)?((?:\d+x)+)([a-z]+)(\d+)", x.types)
    if tile is None:
        return
    shape = tuple(int(d) for d in tile[1].split("x")[:-1])
    bits = max(8, int(tile[3]))
    buffer = re.search(r"\]\s*(%[\w#-]+)", x.head)
    values = [module.buffer(x.named(buffer[1]))] if buffer and "global_to_local" in x.name else x.results
    yield Access(
        "tma", module.argument(x.operands[0]), shape, bits, LANE_BYTES, shape[-1] * bits // 8, x.in_loop,
        any(v in module.multiplied for v in values), max(1, prod(shape) // module.threads),
        len(shape) - 1, len(shape) - 1,
    )  # fmt: skip


def accesses(module: Module) -> tuple[Access, ...]:
    """Every access of a tile, in the order of the text. Loads and stores of single numbers are left out."""
    found: list[Access] = []
    for x in module.operations:
        if x.name in _KINDS:
            found += _described(module, x) if _KINDS[x.name] == "tma" else _pointed(module, x)
    return tuple(found)


def chained(module: Module) -> bool:
    """Whether two products of Blackwell's tensor cores add to one accumulator directly one after the other.

    That is: two `tc_gen5_mma` of one region, the accumulator neither read nor set between them, the second not starting
    from zero.
    """
    live: set[tuple[int, str]] = set()
    for x in module.operations:
        if x.name.startswith("ttng.tc_gen5_mma"):
            parts = re.sub(r"\[[^\]]*\]", "", x.head.partition(" : ")[0]).split(",")
            key = (x.region, x.named(parts[2].strip()))
            start = module.defined.get(x.named(parts[3].strip()))
            from_zero = start is not None and start.name == "arith.constant" and "false" in start.head
            if key in live and not from_zero:
                return True
            live.add(key)
        elif x.name in ("ttng.tmem_load", "ttng.tmem_store"):
            place = x.operands[0 if x.name == "ttng.tmem_load" else 1]
            live = {key for key in live if key[1] != place}
    return False


def products(module: Module) -> Iterator[tuple[tuple[int, int, int], int, bool, bool]]:
    """Blackwell's products: ((rows, columns, summed), bits of a factor, A in tensor memory, in a loop)."""
    for x in module.operations:
        if x.name == "ttng.tc_gen5_mma":
            a, b = re.findall(r"memdesc<(\d+)x(\d+)x[a-z]+(\d+), (#\w+)", x.types)[:2]
            yield (int(a[0]), int(b[1]), int(a[1])), int(a[2]), a[3].startswith("#tmem"), x.in_loop

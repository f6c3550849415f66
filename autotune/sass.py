"""NVIDIA machine code as its disassemblers print it: instructions, the registers they write, control flow and loops.

Everything is a function of the text, so tests can use lines written by hand. `hazards` reports the registers that an
asynchronous tensor instruction may still use when another instruction touches them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*)([\w.]*)\s*([^;]*?)\s*;", re.M)
_FUNCTION = re.compile(r"^(?:\s*Function\s*: |\.text\.)(\S+?):?$", re.M)
_LABEL = re.compile(r"^(\S+):\s*$(?=[^;]*?/\*([0-9a-f]{4,})\*/)", re.M)
_ADDRESS = re.compile(r"(?<![\w\[+])0x([0-9a-f]+)\b")
_REGISTER = re.compile(r"(?<![\w.])R(\d+)(?![\w])")
_PREDICATE = re.compile(r"^!?U?P(\d|T)$")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Opcodes that write no general register, though their first operand may be one.
_NO_RESULT = _words(
    "ST STG STS STL STSM STT STTM STAS RED REDG REDS R2P R2UR R2B LDGSTS UTMASTG UTMALDG UTMAPF UTMAREDG UTMACMDFLUSH "
    "UTMACCTL UBLKCP UBLKPF UBLKRED BRX JMX JMP BRA CALL RET WARPSYNC BAR BMOV NANOSLEEP CCTL CCTLL CCTLT PREFETCH "
    "MEMBAR ERRBAR DEPBAR LDGDEPBAR ARRIVES KILL BREAK BPT PMTRIG SUST SURED EXIT FENCE NOP YIELD BSSY BSYNC WARPGROUP "
    "UTCHMMA UTCQMMA UTCIMMA UTCOMMA UTCBAR UTCCP UTCSHIFT UTCATOMSWS ACQBULK SETCTAID USETMAXREG ENDCOLLECTIVE"
)
#: Opcodes that name another address, or after which the next instruction need not follow.
_JUMPS = _words("BRA BRX JMP JMX CALL RET BSSY WARPSYNC BREAK EXIT KILL")
#: Tensor-core opcodes, asynchronous ones first.
WARPGROUP_MMA = _words("HGMMA QGMMA IGMMA BGMMA")
TENSOR = WARPGROUP_MMA | _words("HMMA IMMA DMMA QMMA OMMA BMMA UTCHMMA UTCQMMA UTCIMMA UTCOMMA")

#: Classes by which a loop's instructions are counted. All others are "integer" (addresses, masks, moves).
CLASSES = {
    "tensor": TENSOR,
    "shared": _words("LDS STS LDSM STSM ATOMS"),
    "global": _words("LD LDG ST STG LDGSTS ATOM ATOMG RED REDG UTMALDG UTMASTG UTMAREDG UTMAPF UBLKCP"),
    "local": _words("LDL STL"),
    "exponential": _words("MUFU"),
    "float": _words(
        "FADD FMUL FFMA FMNMX FMNMX3 FSEL FSETP FSET FCHK FADD2 FMUL2 FFMA2 F2F F2I I2F F2FP HADD2 HMUL2 HFMA2 HMNMX2 "
        "HSETP2 HSET2 FRND DADD DMUL DFMA DSETP"
    ),
    "wait": _words(
        "BAR WARPSYNC WARPGROUP SYNCS DEPBAR LDGDEPBAR FENCE ERRBAR MEMBAR ARRIVES NANOSLEEP UTCBAR BSSY BSYNC"
    ),
    "control": _words("BRA BRX JMP JMX CALL RET EXIT NOP BREAK KILL YIELD BPT BMOV"),
}
_CLASS_OF = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes}


@dataclass(frozen=True)
class Instruction:
    """One instruction: `modifiers` keeps its leading dot (".E.128"), operands are as printed."""

    address: int
    predicate: str
    opcode: str
    modifiers: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        head = f"@{self.predicate} " if self.predicate else ""
        return f"{head}{self.opcode}{self.modifiers} {', '.join(self.operands)}".strip()

    @property
    def target(self) -> int | None:
        """The address that a jump names; None if it names none."""
        if self.opcode not in _JUMPS:
            return None
        found = [_ADDRESS.search(x) for x in self.operands]
        return next((int(x[1], 16) for x in reversed(found) if x), None)


def parse(text: str) -> dict[str, list[Instruction]]:
    """The functions of a disassembly by name. A text without names is one function.

    Jumps may name addresses (`cuobjdump -sass`) or labels (`nvdisasm -c`).
    """
    marks = [(x.group(1), x.end()) for x in _FUNCTION.finditer(text)] or [("", 0)]
    ends = [start for _, start in marks[1:]] + [len(text)]
    return {name: _instructions(text[start:end]) for (name, start), end in zip(marks, ends, strict=True)}


def _instructions(text: str) -> list[Instruction]:
    labels = dict(_LABEL.findall(text))
    text = re.sub(r"`\(([^()\s]+)\)", lambda x: f"0x{labels.get(x[1], '')}", text)
    return [
        Instruction(
            int(at, 16), predicate, opcode, modifiers, tuple(x.strip() for x in operands.split(",") if x.strip())
        )
        for at, predicate, opcode, modifiers, operands in _LINE.findall(text)
    ]


def _width(x: Instruction) -> int:
    """How many registers an instruction's result fills."""
    op, parts = x.opcode, x.modifiers.split(".")[1:]
    if op in WARPGROUP_MMA:
        columns = int(parts[0].split("x")[1])
        # 64 × columns results over 128 threads: two half-precision ones share a register.
        return columns // 4 if parts[1] == "F16" else columns // 2
    if op in ("HMMA", "QMMA", "OMMA"):
        return 2 if len(parts) > 1 and parts[1] == "F16" else 4
    if op in ("IMMA", "BMMA"):
        return 2 if parts and parts[0].startswith("8") else 4
    if op == "DMMA":
        return 4 if parts and parts[0] == "884" else 8
    if op in ("LDSM", "MOVM"):
        return int(parts[-1]) if parts[-1].isdigit() else 1
    if op in ("LDTM", "LDT"):
        repeat = re.search(r"\.x(\d+)", x.modifiers)
        lanes = {"16dp256bit": 4, "16dp128bit": 2}.get(next((p for p in parts if p.startswith("16dp")), ""), 1)
        return int(repeat[1]) * lanes if repeat else lanes
    if op in ("DADD", "DMUL", "DFMA", "DMNMX", "FADD2", "FMUL2", "FFMA2", "LEPC"):
        return 2
    if op in ("IMAD", "IDP") and "WIDE" in parts:
        return 2
    if op == "CS2R":
        return 1 if "32" in parts else 2
    if op in ("TEX", "TLD", "TLD4", "TXQ", "SULD", "SUATOM"):
        return 4
    if op in ("F2F", "I2F", "FRND"):  # the first type is the result's
        return 2 if parts and parts[0] == "F64" else 1
    if op == "F2I":
        return 2 if "S64" in parts or "U64" in parts else 1
    if op in ("SHF", "MUFU", "LOP3", "LEA", "I2I"):
        return 1
    if "256" in parts:
        return 8
    if "128" in parts:
        return 4
    return 2 if "64" in parts else 1


def writes(x: Instruction) -> range:
    """The general registers that an instruction writes if its predicate is true.

    The result is the first operand that is no predicate ("SHFL.BFLY PT, R8, …"). Comparisons and votes write predicates
    only. An unknown opcode is assumed to write its first register.
    """
    none = range(0)
    if x.opcode in _NO_RESULT or not x.operands or "SETP" in x.opcode or x.opcode in ("FCHK", "PLOP3", "ELECT"):
        return none
    if x.opcode == "SYNCS" and "EXCH" not in x.modifiers and "ATOMS" not in x.modifiers:
        return none
    first = 0
    while first < len(x.operands) - 1 and _PREDICATE.match(x.operands[first]):
        first += 1
    result = re.fullmatch(r"R(\d+)(?:\.\w+)*", x.operands[first])
    return range(int(result[1]), int(result[1]) + _width(x)) if result else none


@dataclass(frozen=True)
class Block:
    """Instructions that run one after another, and the numbers of the blocks that may follow."""

    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]


def _followers(
    x: Instruction, after: int | None, returns: list[int], joins: dict[str, list[int]], starts: set[int]
) -> Sequence[int | None]:
    """Addresses that may follow `x`, the last instruction of a block. There may be too many, never too few."""
    following = [] if after is None else [after]
    if x.opcode in ("BRX", "JMX") or (x.opcode in ("BRA", "JMP") and x.target is None):
        return sorted(starts)  # an address from a table: any block
    if x.opcode in ("BRA", "JMP"):
        always = not x.predicate and len(x.operands) == 1
        return [x.target] + ([] if always else following)
    if x.opcode == "RET":
        return returns + (following if x.predicate else [])
    if x.opcode in ("EXIT", "KILL"):
        return following if x.predicate else []
    if x.opcode == "BSYNC":
        # Goes on at the next address if a BSSY of this barrier names it, else at any address that one names.
        return following if after in joins.get(x.operands[0], []) else joins.get(x.operands[0], []) + following
    if x.opcode in ("CALL", "WARPSYNC") and x.target is not None:
        return [x.target, *following]
    return following


def blocks(instructions: Sequence[Instruction]) -> list[Block]:
    """The control-flow graph of a function; its first block is the entry.

    A return may go behind any call: that gives more paths than there are, and misses none.
    """
    addresses = [x.address for x in instructions]
    next_address = dict(pairwise(addresses))
    returns = [next_address[x.address] for x in instructions if x.opcode == "CALL" and x.address in next_address]
    joins: dict[str, list[int]] = {}
    starts = set(addresses[:1])
    for x in instructions:
        if x.opcode not in _JUMPS and x.opcode != "BSYNC":
            continue
        if x.target is not None:
            starts.add(x.target)
        if x.opcode == "BSSY" and x.target is not None:
            joins.setdefault(x.operands[0], []).append(x.target)
        if x.address in next_address:
            starts.add(next_address[x.address])
    starts &= set(addresses)
    number = {address: index for index, address in enumerate(sorted(starts))}
    bodies: list[list[Instruction]] = [[] for _ in number]
    current = -1
    for x in instructions:
        current = number.get(x.address, current)
        bodies[current].append(x)
    result = []
    for body in bodies:
        follow = _followers(body[-1], next_address.get(body[-1].address), returns, joins, starts)
        result.append(
            Block(tuple(body), tuple(dict.fromkeys(number[a] for a in follow if a is not None and a in number)))
        )
    return result


def _dominators(graph: Sequence[Block], predecessors: Sequence[Sequence[int]]) -> list[int]:
    """For each block, as bits, the blocks on every path to it. Unreachable blocks keep all bits."""
    every = (1 << len(graph)) - 1
    found = [every] * len(graph)
    found[0] = 1
    changed = True
    while changed:
        changed = False
        for index in range(1, len(graph)):
            common = every
            for p in predecessors[index]:
                common &= found[p]
            common |= 1 << index
            changed |= common != found[index]
            found[index] = common
    return found


def loops(graph: Sequence[Block]) -> list[frozenset[int]]:
    """The natural loops of a graph as sets of blocks, smallest first. Back edges to the same block make one loop."""
    if not graph:
        return []
    predecessors: list[list[int]] = [[] for _ in graph]
    for index, block in enumerate(graph):
        for successor in block.successors:
            predecessors[successor].append(index)
    reached, todo = {0}, [0]
    while todo:
        fresh = [x for x in graph[todo.pop()].successors if x not in reached]
        reached.update(fresh)
        todo += fresh
    dominators = _dominators(graph, predecessors)
    bodies: dict[int, set[int]] = {}
    for tail in sorted(reached):
        for head in graph[tail].successors:
            if not dominators[tail] >> head & 1:
                continue
            body = bodies.setdefault(head, {head})
            stack = [tail]
            while stack:
                index = stack.pop()
                if index not in body and index in reached:
                    body.add(index)
                    stack += predecessors[index]
    return sorted((frozenset(x) for x in bodies.values()), key=len)


def hot_loop(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The instructions of the main loop: the innermost with the most tensor instructions, else the longest.

    An inner loop without tensor instructions, such as a spin on a barrier, is part of the loop around it.
    """
    graph = blocks(instructions)
    found = loops(graph)
    bodies = {x: [i for index in sorted(x) for i in graph[index].instructions] for x in found}
    tensor = {x: sum(i.opcode in TENSOR for i in body) for x, body in bodies.items()}
    candidates = [x for x in found if tensor[x]] or found
    innermost = [x for x in candidates if not any(y < x for y in candidates)]
    return bodies[max(innermost, key=lambda x: (tensor[x], len(bodies[x])))] if innermost else []


def mix(instructions: Iterable[Instruction]) -> Counter[str]:
    """The number of instructions of each class in `CLASSES`; the rest is "integer".

    An instruction that never runs (predicate "!PT") is a filler before a fence, and counts as "wait".
    """
    return Counter("wait" if x.predicate == "!PT" else _CLASS_OF.get(x.opcode, "integer") for x in instructions)


def lane_bytes(x: Instruction) -> int:
    """Bytes that a lane moves in a memory instruction."""
    if x.predicate == "!PT":
        return 0
    parts = x.modifiers.split(".")
    if x.opcode in ("LDSM", "STSM"):
        return 4 * (int(parts[-1]) if parts[-1].isdigit() else 1)
    widths = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[p] for p in parts if p in widths), 4)


def operand_registers(x: Instruction) -> range:
    """The registers from which an asynchronous tensor instruction reads A; empty if A is in shared memory.

    64 rows of 32 bytes over 128 threads are four registers, for every dtype.
    """
    first = re.fullmatch(r"R(\d+)", x.operands[1]) if x.opcode in WARPGROUP_MMA else None
    return range(int(first[1]), int(first[1]) + 4) if first else range(0)


#: (operand or result, register) → (groups committed since, address of the tensor instruction).
_Pending = dict[tuple[str, int], tuple[int, int]]
_OPERAND, _RESULT = "operand", "result"
#: More groups than any wait leaves.
_OLDEST = 64


def _advance(pending: _Pending, x: Instruction) -> None:
    """Update `pending` by one instruction. If unsure, an entry counts as young: young ones stay pending longer."""
    if x.opcode in WARPGROUP_MMA:
        for kind, registers in ((_OPERAND, operand_registers(x)), (_RESULT, writes(x))):
            pending.update({(kind, r): (-1, x.address) for r in registers})
        if "gsb0" in x.operands and not x.predicate:
            for key, (age, address) in pending.items():
                pending[key] = (min(age + 1, _OLDEST), address)
    elif x.opcode == "WARPGROUP" and x.modifiers == ".DEPBAR.LE" and not x.predicate:
        left = int(x.operands[1], 16)
        for key in [key for key, (age, _) in pending.items() if age >= left]:
            del pending[key]


def _faults(pending: _Pending, x: Instruction, results: dict[int, range]) -> dict[tuple[str, int], int]:
    """Pending registers that an instruction overwrites or reads too early → the tensor instruction using them."""
    written, found = writes(x), {}
    for r in written:
        for kind in (_OPERAND, _RESULT):
            if (kind, r) in pending:
                address = pending[kind, r][1]
                # Tensor instructions run in order: one may add to the accumulator of another.
                if not (kind == _RESULT and x.opcode in WARPGROUP_MMA and results[address] == written):
                    found[kind, r] = address
    read: Iterable[int] = operand_registers(x)
    if x.opcode not in WARPGROUP_MMA:
        result = f"R{written.start}" if written else ""
        read = (int(r) for o in x.operands if o.split(".")[0] != result for r in _REGISTER.findall(o))
    for r in read:
        if (_RESULT, r) in pending:
            found.setdefault((_RESULT, r), pending[_RESULT, r][1])
    return found


def hazards(instructions: Sequence[Instruction]) -> tuple[str, ...]:
    """Descriptions of the registers of an asynchronous wgmma that another instruction touches before a wait.

    An HGMMA may read A's registers and fill its accumulator until a `WARPGROUP.DEPBAR.LE gsb0, N`, which waits for all
    groups but the N youngest. "gsb0" on an HGMMA closes a group. The pending registers are followed along every path of
    the control flow, back edges too, until nothing changes. Where paths meet, the younger entry is kept. A predicated
    write counts as a write. So a report may be harmless, but no hazard is missed.
    """
    results = {x.address: writes(x) for x in instructions if x.opcode in WARPGROUP_MMA}
    if not results:
        return ()
    graph = blocks(instructions)
    entering: list[_Pending | None] = [None] * len(graph)
    entering[0] = {}
    todo = [0]
    while todo:
        index = todo.pop()
        pending = dict(entering[index] or {})
        for x in graph[index].instructions:
            _advance(pending, x)
        for successor in graph[index].successors:
            known = entering[successor]
            merged = dict(known or {})
            for key, value in pending.items():
                merged[key] = min(value, merged.get(key, value))
            if known is None or merged != known:
                entering[successor] = merged
                todo.append(successor)
    found = []
    for block, state in zip(graph, entering, strict=True):
        pending = dict(state or {})
        for x in block.instructions:
            if pending and x.opcode == "CALL" and x.target is None:
                found.append(f"{x.address:#x} {x} leaves the function while tensor instructions run")
            faults = _faults(pending, x, results) if pending else {}
            for kind, address in sorted({(kind, address) for (kind, _), address in faults.items()}):
                registers = ", ".join(f"R{r}" for k, r in sorted(faults) if k == kind and faults[k, r] == address)
                use = "may still read" if kind == _OPERAND else "has yet to fill"
                found.append(f"{x.address:#x} {x} touches {registers}, which the HGMMA at {address:#x} {use}")
            _advance(pending, x)
    return tuple(found)

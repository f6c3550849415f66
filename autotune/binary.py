"""What a compiled kernel consists of and what it costs, as far as its texts show without a GPU.

`inspect` reads the texts of a compilation (TTGIR, PTX or AMD assembly, machine code, the assembler's log).
`predicted_share` computes from what it found. Triton is imported only for its disassembler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from gssf_triton.autotune import sass, ttgir
from gssf_triton.autotune.ttgir import Access
from gssf_triton.kernels.targets import ARCHITECTURES

#: Bytes of shared memory that every block loses to the driver.
RESERVED_SHARED = 1024
#: Registers are allocated to a warp in this unit. Warps are spread evenly over a multiprocessor's four quarters.
REGISTER_UNIT, QUARTERS = 256, 4
WARP = 32


@dataclass(frozen=True)
class Processor:
    """One multiprocessor: its capacity, and its throughput per cycle.

    `flop`: dense bfloat16 operations of the tensor cores. `sync_flop`: those that the older `mma.sync` reaches.
    """

    shared: int
    flop: int
    sync_flop: int
    registers: int = 65_536
    warps: int = 64
    blocks: int = 32
    shared_bytes: int = 128
    exponentials: int = 16
    issues: int = 4
    #: Bytes that the second-level cache delivers to one multiprocessor.
    cache_bytes: int = 64


PROCESSORS = {
    80: Processor(167_936, 2048, 2048),
    90: Processor(233_472, 4096, 2540),
    100: Processor(233_472, 8192, 2048),
}


@dataclass(frozen=True)
class Work:
    """Cycles for which a section of a program keeps each unit of its multiprocessor busy, all warps together.

    `ideal`: its products at the tensor cores' peak. `tensor`: its tensor instructions at best.
    """

    ideal: float = 0.0
    tensor: float = 0.0
    shared: float = 0.0
    exponential: float = 0.0
    issue: float = 0.0
    memory: float = 0.0

    def units(self) -> tuple[float, ...]:
        """The cycles of each unit that can be the bottleneck."""
        return self.tensor, self.shared, self.exponential, self.issue, self.memory


@dataclass(frozen=True)
class Facts:
    """What is known of one compiled kernel.

    `registers`: of a thread. `shared`: bytes of a block. `spills`: bytes (NVIDIA) or registers (AMD). `tensor_ops`: the
    number of the target's own tensor instructions. `wgmma`: (shape, count, count with A from registers). `tcgen05`:
    (kind, count). `mma_sync`: the number of older tensor instructions. `ptx_widths`: global loads and stores by width
    ("ld.v4.b32", "st.b16"). `cp_async`: asynchronous copies by bytes. `tma`: the number of copies by descriptor.
    `serialised`: the assembler's C75xx lines. `hazards`: see `sass.hazards`. `loop`: the hot loop's instructions by
    `sass.CLASSES`. `chained`: see `ttgir.chained`. `error`: the compiler's error; all else is then empty.
    """

    registers: int = 0
    shared: int = 0
    spills: int = 0
    tensor_ops: int = 0
    wgmma: tuple[tuple[str, int, int], ...] = ()
    tcgen05: tuple[tuple[str, int], ...] = ()
    mma_sync: int = 0
    accesses: tuple[Access, ...] = ()
    ptx_widths: Mapping[str, int] = field(default_factory=dict)
    cp_async: Mapping[int, int] = field(default_factory=dict)
    tma: int = 0
    serialised: tuple[str, ...] = ()
    hazards: tuple[str, ...] = ()
    loop: Mapping[str, int] = field(default_factory=dict)
    loop_instructions: int = 0
    instructions: int = 0
    programs_per_sm: int = 0
    chained: bool = False
    loop_work: Work = Work()
    rest_work: Work = Work()
    error: str = ""


def programs_per_sm(registers: int, num_warps: int, shared: int, code: int | str) -> int:
    """Programs that fit one multiprocessor side by side, by registers, shared memory, warps and blocks.

    On AMD, a compute unit: four units, each with 512 vector registers a lane and at most eight waves.
    """
    if not isinstance(code, int):
        waves = 4 * min(8, 512 // (-(-max(registers, 1) // 8) * 8))
        return min(waves // num_warps, 65_536 // max(shared, 1))
    processor = PROCESSORS[code]
    a_warp = -(-max(registers, 1) * WARP // REGISTER_UNIT) * REGISTER_UNIT
    warps = min(processor.registers // a_warp // QUARTERS * QUARTERS, processor.warps)
    return min(warps // num_warps, processor.shared // (shared + RESERVED_SHARED), processor.blocks)


def serialised(log: str) -> tuple[str, ...]:
    """The lines in which ptxas reports serialised wgmma instructions (C7510 and similar)."""
    return tuple(line.strip() for line in log.splitlines() if re.search(r"\(C75\d\d\)", line))


def _wgmma(ptx: str) -> tuple[tuple[str, int, int], ...]:
    total: Counter[str] = Counter()
    from_registers: Counter[str] = Counter()
    for shape, operands in re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)\.([^;]*);", ptx):
        total[shape] += 1
        # Two lists of registers: the accumulator's, and A's.
        from_registers[shape] += bool(re.search(r"\}\s*,\s*\{", operands))
    return tuple((shape, total[shape], from_registers[shape]) for shape in sorted(total))


def has_register_operands(ptx: str) -> bool:
    """True if a wgmma takes operand A from registers."""
    return any(taken for _, _, taken in _wgmma(ptx))


def _widths(assembly: str, backend: str) -> dict[str, int]:
    if backend == "hip":
        pairs = re.findall(r"\b(?:global|buffer|flat)_(load|store)_(\w+)", assembly)
        return dict(Counter(f"{'ld' if kind == 'load' else 'st'}.{width}" for kind, width in pairs))
    pattern = r"\b(ld|st)\.global(?:\.[a-zA-Z][\w:]*?)*?\.((?:v\d\.)?[bsuf]\d+)\b"
    return dict(Counter(f"{kind}.{width}" for kind, width in re.findall(pattern, assembly)))


def _copies(ptx: str) -> dict[int, int]:
    found = re.findall(r"cp\.async\.c[ag]\.shared\.global[^\[]*\[[^\]]*\],\s*\[[^\]]*\],\s*(0x[0-9a-f]+|\d+)", ptx)
    return dict(Counter(int(x, 0) for x in found))


def disassemble(cubin: bytes) -> str:
    """The machine code of a cubin, by the disassembler that Triton ships."""
    from triton.backends import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # Without dataflow analysis (-ndf) it takes two thirds of the time of `cuobjdump -sass`.
        command = [str(Path(nvidia.__file__).parent / "bin" / "nvdisasm"), "-c", "-ndf", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _largest(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    if not found:
        raise RuntimeError(f"no {pattern!r} in the tool's answer: {text[:200]!r}")
    return max(int(x) for x in found)


def _tile_bytes(x: Access) -> int:
    return prod(x.shape) * x.bits // 8


def _memory(accesses: Iterable[Access]) -> float:
    """Bytes through the second-level cache, which moves whole sectors of 32 bytes."""
    return sum(_tile_bytes(x) * max(1.0, 32 / x.run_bytes if x.run_bytes else 1.0) for x in accesses)


def _mma_sync_flop(x: sass.Instruction) -> int:
    """Cost of a warp's mma.sync (16 × 8 × 32 bytes) in bfloat16 operations; TF32, twice as wide, counts double."""
    parts = x.modifiers.split(".")
    summed = {"16816": 16, "1688": 8, "1684": 4, "16832": 32}.get(parts[1] if len(parts) > 1 else "", 16)
    return 2 * 16 * 8 * summed * (2 if "TF32" in parts else 1)


def work(instructions: Sequence[sass.Instruction], code: int, num_warps: int, tiles: Sequence[Access] = (),
         products: Iterable[tuple[tuple[int, int, int], int, bool]] = ()) -> Work:  # fmt: skip
    """The cycles of a section of machine code that every warp runs once.

    Four warps' wgmma of 64 × N × 32 bytes takes N / 2 cycles of a Hopper multiprocessor. It reads N × 32 bytes of B
    from shared memory, and 2,048 bytes of A unless A is in registers. Copies write their bytes to shared memory.
    `tiles`: the section's accesses in TTGIR. `products`: Blackwell's, ((rows, columns, summed), bits, A in tensor
    memory), each for a whole program.
    """
    processor = PROCESSORS[code]
    flop = sync_flop = shared = 0.0
    for x in instructions:
        if x.opcode in sass.WARPGROUP_MMA:
            columns = int(x.modifiers.split(".")[1].split("x")[1])
            flop += 2 * 64 * columns * 16 / 4
            shared += 32 * (columns + (0 if sass.operand_registers(x) else 64)) / 4
        elif x.opcode in ("HMMA", "IMMA", "QMMA"):
            sync_flop += _mma_sync_flop(x)
        elif x.opcode in sass.CLASSES["shared"] or x.opcode == "LDGSTS":
            shared += WARP * max(4, sass.lane_bytes(x)) if sass.lane_bytes(x) else 0
    by_program = sum(_tile_bytes(x) for x in tiles if x.kind == "tma")
    for (rows, columns, summed), bits, in_tensor_memory in products:
        flop += 2 * rows * columns * summed * (bits / 16) / num_warps
        by_program += summed * bits // 8 * (columns + (0 if in_tensor_memory else rows))
    counts = sass.mix(instructions)
    return Work(
        ideal=(flop + sync_flop) * num_warps / processor.flop,
        tensor=(flop / processor.flop + sync_flop / processor.sync_flop) * num_warps,
        shared=(shared * num_warps + by_program) / processor.shared_bytes,
        exponential=counts["exponential"] * WARP * num_warps / processor.exponentials,
        issue=len(instructions) * num_warps / processor.issues,
        memory=_memory(tiles) / processor.cache_bytes,
    )


def predicted_share(facts: Facts, arch: str, iterations: int) -> float | None:
    """The share of the tensor cores' peak that a kernel can reach at best, by counting; None if it uses none.

    A program runs its hot loop `iterations` times and all its other code once. In a cycle a Hopper multiprocessor does
    4,096 dense bfloat16 operations (TF32: half as many), moves 128 bytes of shared memory and 64 bytes of the
    second-level cache, computes 16 exponentials and issues 4 instructions (Ampere and Blackwell: 2,048 and 8,192
    operations). Let u_loop and u_rest be the cycles that unit u is busy in one iteration and in the rest (see `work`):

        two programs or more side by side: time = max over u of iterations × u_loop + u_rest
        one program alone:                 time = iterations × t_loop + t_rest

    t_loop is the largest u_loop if the products are asynchronous and not serialised. Otherwise, and always for t_rest
    (alone, nothing runs under an epilogue), it is max(tensor, shared) + exponential + issue, or memory if larger. The
    share is iterations × the loop's products at the peak / time. It is an upper bound: latency is not counted.
    """
    if arch not in ARCHITECTURES or not isinstance(ARCHITECTURES[arch].code, int) or not facts.loop_work.ideal:
        return None
    loop, rest = facts.loop_work, facts.rest_work
    if facts.programs_per_sm >= 2:
        time = max(iterations * x + y for x, y in zip(loop.units(), rest.units(), strict=True))
    else:
        overlapped = bool(facts.wgmma or facts.tcgen05) and not facts.serialised
        time = iterations * (max(loop.units()) if overlapped else _alone(loop)) + _alone(rest)
    return iterations * loop.ideal / time


def _alone(x: Work) -> float:
    return max(max(x.tensor, x.shared) + x.exponential + x.issue, x.memory)


def _assembly(ptx: str) -> dict[str, Any]:
    """The facts in PTX."""
    return {
        "wgmma": _wgmma(ptx),
        "tcgen05": tuple(sorted(Counter(re.findall(r"tcgen05\.mma[\w:.]*?\.kind::(\w+)", ptx)).items())),
        "mma_sync": ptx.count("mma.sync"),
        "cp_async": _copies(ptx),
        "tma": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
    }


def _machine_code(cubin: bytes, module: ttgir.Module, code: int, num_warps: int) -> dict[str, Any]:
    """The facts that only the machine code shows."""
    accesses = ttgir.accesses(module)
    products = list(ttgir.products(module))
    functions = list(sass.parse(disassemble(cubin)).values())
    hot = max((sass.hot_loop(x) for x in functions), key=lambda x: (sass.mix(x)["tensor"], len(x)), default=[])
    inside = {id(x) for x in hot}
    everything = [x for function in functions for x in function if x.opcode != "NOP"]
    works = [
        work(
            [x for x in everything if (id(x) in inside) == looped],
            code,
            num_warps,
            [x for x in accesses if x.in_loop == looped],
            [x[:3] for x in products if x[3] == looped],
        )
        for looped in (True, False)
    ]
    return {
        "hazards": tuple(x for function in functions for x in sass.hazards(function)),
        "loop": dict(sass.mix(hot)),
        "loop_instructions": len(hot),
        "instructions": len(everything),
        "loop_work": works[0],
        "rest_work": works[1],
    }


def inspect(
    asm: Mapping[str, str | bytes], *, backend: str, code: int | str, num_warps: int, shared: int, log: str,
    machine_code: bool = True,
) -> Facts:  # fmt: skip
    """The facts in the texts of a kernel's compilation.

    Args:
        asm: "ttgir", "ptx" and "cubin" for backend "cuda", "ttgir" and "amdgcn" for "hip".
        backend: "cuda" or "hip".
        code: 80, 90, 100, or "gfx942".
        num_warps: Warps of a program.
        shared: Its shared memory in bytes, from the compilation's metadata.
        log: The output of ptxas with -v.
        machine_code: Also disassemble, for hazards and counts of instructions. Takes half a second.
    """
    target = next(x for x in ARCHITECTURES.values() if x.backend == backend and x.code == code)
    module = ttgir.Module(str(asm["ttgir"]))
    assembly = str(asm["amdgcn" if backend == "hip" else "ptx"])
    if backend == "hip":
        # Spilled scalar registers do not count: they go to lanes of vector registers, not to memory.
        found: dict[str, Any] = {
            "registers": _largest(r"\.vgpr_count:\s*(\d+)", assembly),
            "spills": _largest(r"\.vgpr_spill_count:\s*(\d+)", assembly),
        }
    else:
        cubin = asm["cubin"]
        assert isinstance(code, int) and isinstance(cubin, bytes)
        found = {
            "registers": _largest(r"Used (\d+) registers", log),
            "spills": _largest(r"(\d+) bytes stack frame", log),
            **_assembly(assembly),
        }
        if machine_code:
            found |= _machine_code(cubin, module, code, num_warps)
    return Facts(
        shared=shared,
        tensor_ops=assembly.count(target.tensor_instruction),
        accesses=ttgir.accesses(module),
        ptx_widths=_widths(assembly, backend),
        serialised=serialised(log),
        programs_per_sm=programs_per_sm(found["registers"], num_warps, shared, code),
        chained=ttgir.chained(module),
        **found,
    )

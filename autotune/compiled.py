"""Compile a recorded launch without its GPU, and inspect the result."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from dataclasses import dataclass

from gssf_triton.autotune.binary import Facts, has_register_operands, inspect
from gssf_triton.autotune.rehearsal import Launch
from gssf_triton.kernels.targets import ARCHITECTURES

#: A product in Triton's dialect (TTIR): its operands' type and its result's rows; and how float32 is multiplied.
DOT = re.compile(r"tt\.dot\b.*: tensor<\d+x\d+x(\w+)> \* tensor<[^>]*> -> tensor<(\d+)x")
PRECISION = re.compile(r"inputPrecision = (\w+)")


@dataclass(frozen=True)
class Dot:
    """A product of the source: the rows of its result, the operands' type, and how float32 is multiplied."""

    rows: int
    dtype: str
    precision: str

    @property
    def wants_tensor_cores(self) -> bool:
        """False for exact float32, which runs on NVIDIA's FMA units, and for float64."""
        return self.dtype in ("f16", "bf16") or (self.dtype == "f32" and self.precision != "ieee")


@dataclass(frozen=True)
class Compiled:
    """A launch's products and what the compiler made of it; `facts.error` if it failed."""

    facts: Facts
    dots: tuple[Dot, ...] = ()


def dots_of(ttir: str) -> tuple[Dot, ...]:
    """The products in a text of Triton's dialect (TTIR)."""
    found = []
    for line in ttir.splitlines():
        if dot := DOT.search(line):
            precision = PRECISION.search(line)
            found.append(Dot(int(dot[2]), dot[1], precision[1].lower() if precision else "ieee"))
    return tuple(found)


def compile_launch(launch: Launch, instructions: bool = False) -> Compiled:
    """Compile and inspect one launch; a compiler's error is a result, not an exception.

    `instructions`: always read the machine code, not only if it may overwrite operands in registers.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    arch = ARCHITECTURES[launch.arch]
    log = io.StringIO()
    try:
        with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), redirect_stdout(log):
            triton.knobs.nvidia.dump_ptxas_log = True
            triton.knobs.compilation.always_compile = True  # a cached kernel has no log
            compiled = triton.compile(
                launch.source(), target=GPUTarget(arch.backend, arch.code, arch.warp), options=dict(launch.options)
            )
    except Exception as error:  # the compiler raises many kinds; the gate reports each
        lines = str(error).strip().splitlines() or [""]
        return Compiled(Facts(error=f"{type(error).__name__}: {lines[-1]}"))
    facts = inspect(
        compiled.asm,
        backend=arch.backend,
        code=arch.code,
        num_warps=launch.num_warps,
        shared=compiled.metadata.shared,
        log=log.getvalue(),
        machine_code=instructions or ("ptx" in compiled.asm and has_register_operands(compiled.asm["ptx"])),
    )
    return Compiled(facts, dots_of(compiled.asm["ttir"]))

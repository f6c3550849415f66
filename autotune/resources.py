"""What a compiled launch takes of a GPU: registers, shared memory, spills and tensor-core instructions."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gssf_triton.autotune.launches import Launch
from gssf_triton.autotune.targets import ARCHITECTURES, Architecture


@dataclass(frozen=True)
class Resources:
    """Registers a thread, shared bytes a block, spilled bytes (NVIDIA) or registers (AMD), tensor instructions."""

    registers: int = 0
    shared: int = 0
    spills: int = 0
    tensor_ops: int = 0
    error: str = ""


#: Pointers with a dtype of their own: weights and their gradients stay float32 beside half-precision features.
FLOAT32_POINTERS = {"w_diag_ptr", "dw_diag_ptr", "dw_blocks_ptr", "row_in_ptr", "column_in_ptr", "scalars_ptr",
                    "row_out_ptr", "column_out_ptr", "totals_ptr", "scale_ptr", "region_scale_ptr", "word_scale_ptr",
                    "word_share_ptr", "gram_ptr", "out_ptr"}  # fmt: skip
INTEGER_POINTERS = {
    "exclude_ptr": "*i64", "mask_ptr": "*u8", "a_ids_ptr": "*i64", "b_ids_ptr": "*i64", "a_cams_ptr": "*i64",
    "b_cams_ptr": "*i64", "bar_ptr": "*i64", "part_ptr": "*i64", "row_ids_ptr": "*i64", "column_ids_ptr": "*i64",
    "region_mask_ptr": "*i8", "order_ptr": "*i64",
}  # fmt: skip
FLOAT_ARGUMENTS = {"sharpness", "smooth", "slope", "eps", "slope_scale"}
POINTER_TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32", "tf32": "*fp32"}
#: Contiguous rows, the common case: Triton makes a constant of an argument that equals 1.
UNIT_STRIDES = {"stride_ad", "stride_bd", "stride_xd", "stride_yd", "stride_td", "stride_rd", "stride_pn", "stride_sn",
                "stride_wd", "stride_wq", "stride_ud", "stride_vd", "stride_rm", "stride_cn", "stride_zd"}  # fmt: skip


def _kernel(name: str) -> Any:
    """`late_interaction` is `late_interaction_kernel` of gssf_triton.kernels.late_interaction, and so on."""
    return getattr(importlib.import_module(f"gssf_triton.kernels.{name}"), f"{name}_kernel")


def _epilogue(name: str) -> Any:
    from gssf_triton.kernels.epilogues import EPILOGUES

    return EPILOGUES[name][0]


def _source(launch: Launch) -> Any:
    import triton.language as tl
    from triton.compiler import ASTSource

    kernel = _kernel(launch.kernel)
    constants = dict(launch.constants)
    constants["ACC"] = tl.float32
    if "EPILOGUE" in constants:
        constants["EPILOGUE"] = _epilogue(constants["EPILOGUE"])
    signature, constexprs, attrs = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            constexprs[name] = constants[name]
        elif name in UNIT_STRIDES:
            signature[name] = "constexpr"
            constexprs[name] = 1
        elif name.endswith("_ptr"):
            wide = name in FLOAT32_POINTERS or (name == "w_blocks_ptr" and launch.kernel == "gradient")
            signature[name] = INTEGER_POINTERS.get(name) or ("*fp32" if wide else POINTER_TYPES[launch.numerics])
            attrs[(index,)] = [["tt.divisibility", 16]]
        elif name in FLOAT_ARGUMENTS:
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name.startswith("stride_") or name in ("D", "M", "N"):
                attrs[(index,)] = [["tt.divisibility", 16]]
    missing = set(constants) - set(kernel.arg_names)
    assert not missing, f"{launch.kernel} has no {missing}"
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, spilled bytes) by the disassembler that Triton ships."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers = [int(x) for x in re.findall(r"REG:(\d+)", text)]
    stack = [int(x) for x in re.findall(r"STACK:(\d+)", text)]
    if not registers or not stack:
        raise RuntimeError(f"no resource usage in the disassembler's answer: {text!r}")
    return max(registers), max(stack)


def _amd_usage(assembly: str) -> tuple[int, int]:
    """(vector registers, spilled registers) from the code object's metadata."""

    def field(name: str) -> int:
        return max(int(x) for x in re.findall(rf"\.{name}:\s*(\d+)", assembly))

    # Scalar registers spill into lanes of vector registers, not into memory: they do not count.
    return field("vgpr_count"), field("vgpr_spill_count")


def compile_launch(launch: Launch) -> Resources:
    """Compile one launch and measure it; a compiler error is a result, not an exception."""
    import triton
    from triton.backends.compiler import GPUTarget

    arch: Architecture = ARCHITECTURES[launch.arch]
    target = GPUTarget(arch.backend, arch.code, arch.warp)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    try:
        compiled = triton.compile(_source(launch), target=target, options=options)
    except Exception as error:  # the compiler raises many kinds, and each is what the gate is there to report
        lines = str(error).strip().splitlines() or [""]
        return Resources(error=f"{type(error).__name__}: {lines[-1]}")
    if arch.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        registers, spills = _amd_usage(assembly)
    else:
        assembly = compiled.asm["ptx"]
        registers, spills = _nvidia_usage(compiled.asm["cubin"])
    return Resources(registers, compiled.metadata.shared, spills, assembly.count(launch.tensor_instruction))

"""Which launches the installed compiler makes wrong code for, and what runs instead: the one place that says so.

* sm_90, register operands: its tensor cores read operand A asynchronously, also from registers. ptxas before 13.1 may
  write to those registers before they were read (triton-lang/triton #11781, fla-org/flash-linear-attention #1262), and
  so may Triton 3.6 itself where it keeps several such products in flight (triton-lang/triton #9433).
* sm_10x, chained products: Triton before 3.9 computes wrongly what several products of one step add to one
  accumulator (triton-lang/triton #10821). Exact float32 in three TF32 products is such a chain.

Nothing raises but `launch`'s last check. Importing this module does not import Triton.
"""

from __future__ import annotations

import re
import subprocess
import threading
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gssf_triton.backend import TRITON_RELEASE
from gssf_triton.kernels import devices
from gssf_triton.kernels.configs import dot_precision

#: The oldest assembler that register operands are safe with: 13.0 is reported to fail, 13.1 not to (#1262 above).
SAFE_ASSEMBLER = (13, 1)
#: The first release of Triton that copies register operands before a product reads them.
COPIES_OPERANDS = (3, 7)
#: The first release of Triton that uses CUDA 13's assembler for sm_90, and that adds chained products up rightly.
SOUND_TRITON = (3, 9)
#: What Triton passes to CUDA 13's assembler since it uses it. Kernels compiled for us by another assembler than
#: Triton's own also have it in their cache key, which Triton computes of its own assembler's version.
ASSEMBLER_OPTION = "--regAllocOptLevel=2"
#: Kernels that may have register operands or chained products, by the pointer that tells the products' dtype.
WATCHED = {
    "pairwise_kernel": "a_ptr",
    "fold_kernel": "x_ptr",
    "paired_kernel": "a_ptr",
    "gradient_kernel": "x_ptr",
    "cross_attention_kernel": "x_ptr",
}

HALVES = (torch.float16, torch.bfloat16)


class NotLaunched(RuntimeError):
    """A kernel that would be compiled wrongly was about to be launched."""


@dataclass(frozen=True)
class Assembler:
    """A ptxas, and its version; None where it could not be asked."""

    path: str
    version: tuple[int, ...] | None

    @property
    def is_safe(self) -> bool:
        return self.version is not None and self.version >= SAFE_ASSEMBLER

    def __str__(self) -> str:
        return f"ptxas {'unknown' if self.version is None else _dotted(self.version)} ({self.path})"


@dataclass(frozen=True)
class Toolchain:
    """What Triton assembles an architecture's kernels with, and what it carries and we use instead for some."""

    assembler: Assembler
    replacement: Assembler | None = None

    @property
    def is_safe(self) -> bool:
        """True where kernels with register operands can be compiled."""
        return self.assembler.is_safe or self.replacement is not None


def _version(text: str | None) -> tuple[int, ...] | None:
    numbers = re.findall(r"\d+", text or "")
    return tuple(map(int, numbers[:2])) if numbers else None


def _of_triton(code: int) -> Assembler:
    """The assembler that Triton uses for an architecture, by its own rules and environment variables."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas, get_ptxas_version

        # Triton remembers its answer for the cache keys: the right one, before any other assembler is in use.
        get_ptxas_version(code)
        tool = get_ptxas(code)
        return Assembler(tool.path, _version(tool.version))
    except (ImportError, AttributeError, OSError, RuntimeError, subprocess.SubprocessError) as fault:
        return Assembler(f"not usable: {fault}", None)


def _bundled() -> list[Assembler]:
    """The assemblers that the installed Triton carries, the newest first."""
    try:
        import triton.backends.nvidia
        from triton.knobs import NvidiaTool

        folder = Path(triton.backends.nvidia.__file__ or "").parent / "bin"
        tools = [tool for path in sorted(folder.glob("ptxas*")) if (tool := NvidiaTool.from_path(str(path)))]
    except (ImportError, AttributeError, OSError, subprocess.SubprocessError):
        return []
    found = [Assembler(tool.path, _version(tool.version)) for tool in tools]
    return sorted(found, key=lambda tool: tool.version or (), reverse=True)


def _replaced_by(found: Assembler, code: int) -> Toolchain:
    """A toolchain with a carried safe assembler in place of `found`, where there is one and Triton takes it."""
    best = next((tool for tool in _bundled() if tool.is_safe), None)
    if best is None:
        return Toolchain(found)
    with _in_use(best.path):
        taken = _of_triton(code)
    return Toolchain(found, best if taken == best else None)


@cache
def toolchain(arch: str) -> Toolchain:
    """The assembler of an NVIDIA architecture, asked once a process. Never raises: what cannot be asked is not safe."""
    code = int(re.findall(r"\d+", arch)[0])
    found = _of_triton(code)
    return Toolchain(found) if found.is_safe or not arch.startswith("sm_90") else _replaced_by(found, code)


# ------------------------------------------------------------------------------------------------------------ launches


@dataclass(frozen=True)
class Launch:
    """What decides whether a kernel has register operands: its name and what it is compiled for.

    Attributes:
        kernel: Its name, "fold".
        half: Its products' operands are in half precision.
        precision: `input_precision` of the products whose operand may come from registers.
        has_diag, has_blocks: Whether the kernel itself folds by the weight; of the gradient's, whether it multiplies
            by blocks or sums their gradient.
    """

    kernel: str
    half: bool
    precision: str
    has_diag: bool
    has_blocks: bool

    @property
    def takes_registers(self) -> bool:
        """True where sm_90's tensor cores may take operand A from registers: where the kernel has computed it.

        What goes from memory to the tensor cores as it is comes from shared memory, exact float32 does not meet tensor
        cores. Held to what the compiler makes of the kernels by the compile gate.
        """
        tf32 = self.precision.startswith("tf32")
        if self.kernel == "pairwise":
            return (self.half or tf32) and (self.has_diag or self.has_blocks)
        if self.kernel == "fold":  # in half precision where blocks share a tile, and NaN is kept apart
            return (self.half or tf32) and self.has_blocks
        if self.kernel in ("paired", "gradient"):
            return tf32 and self.has_blocks
        return tf32 and self.kernel == "cross_attention"

    @property
    def chains_products(self) -> bool:
        """True where several products of one step may go to one accumulator."""
        return self.precision == "tf32x3" and (self.has_blocks or self.kernel == "cross_attention")


def _as_launched(kernel: str, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a `Launch` is made of, by its kernel's name, "fold_kernel", and the arguments it gets."""
    name = kernel.removesuffix("_kernel")
    features = arguments.get(WATCHED.get(kernel, ""))
    precision, blocks = arguments.get("PRECISION", "ieee"), bool(arguments.get("HAS_BLOCKS"))
    if name == "gradient":
        precision = arguments["EPILOGUE_PRECISION"]
        blocks = bool(arguments["GRAD_BLOCKS"] or (arguments["ROWS"] and blocks))
    elif name == "cross_attention":
        precision = arguments["GRAM_PRECISION"]
    half = features is not None and features.dtype in HALVES
    return name, half, precision, bool(arguments.get("HAS_DIAG")), blocks


def takes_registers(kernel: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a launch of `kernel` ("fold_kernel") may read operands of asynchronous products from registers."""
    return Launch(*_as_launched(kernel, arguments)).takes_registers


def chains_products(kernel: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a launch of `kernel` may add several products of one step to one accumulator."""
    return Launch(*_as_launched(kernel, arguments)).chains_products


def _fault(launch: Launch, arch: str) -> str | None:
    """Why a launch would compute wrong numbers on `arch`, with the remedy; None where it does not."""
    if arch.startswith("sm_90") and launch.takes_registers:
        if not toolchain(arch).is_safe:
            return (
                f"{toolchain(arch).assembler} may overwrite operands in registers before {arch}'s tensor cores have "
                f'read them: pip install "triton>=3.9", or set {_variable()} to a ptxas of CUDA 13.1 or newer'
            )
        if launch.kernel == "pairwise" and TRITON_RELEASE < COPIES_OPERANDS:
            return (
                f'Triton {_dotted(TRITON_RELEASE)} overwrites operands that are being read: pip install "triton>=3.7"'
            )
    if arch.startswith("sm_10") and launch.chains_products and TRITON_RELEASE < SOUND_TRITON:
        return f'Triton {_dotted(TRITON_RELEASE)} adds chained products up wrongly on {arch}: pip install "triton>=3.9"'
    return None


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _variable() -> str:
    """The environment variable by which Triton takes another assembler for sm_90."""
    return "TRITON_PTXAS_PATH" if TRITON_RELEASE < SOUND_TRITON else "TRITON_PTXAS_BLACKWELL_PATH"


@cache
def _warn_once(fault: str) -> None:
    warnings.warn(
        f"some kernels are left to torch's own operations: {fault}. `python -m gssf_triton.autotune doctor` says more",
        stacklevel=4,
    )


@cache
def _fault_of(kernel: str, dtype: torch.dtype, arch: str, tf32: bool, has_diag: bool, has_blocks: bool) -> str | None:
    """`_fault` of a launch that is still to be configured; `tf32`: float32 products may round to it."""
    half = dtype in HALVES
    if kernel in ("gradient", "cross_attention"):
        # Their products over whole rows are in float32 at least.
        wide = torch.promote_types(dtype, torch.float32)
        precision = dot_precision(wide, arch, tf32=tf32 or (half and kernel == "gradient"), whole_rows=True)
    else:
        precision = dot_precision(dtype, arch, tf32=tf32)
    return _fault(Launch(kernel, half, precision, has_diag, has_blocks), arch)


def may_launch(
    kernel: str, dtype: torch.dtype, device: torch.device, *, has_diag: bool = False, has_blocks: bool = False
) -> bool:
    """Whether a kernel may run over features of `dtype`; warns once a process where it may not.

    Args:
        kernel: Its name, "fold".
        dtype: The features'.
        device: Where they lie; True on all but sm_90 and sm_10x.
        has_diag: Whether it is called with the weight.
        has_blocks: The same; of the gradient, whether it multiplies by blocks or sums their gradient.
    """
    arch = devices.identify(device).arch
    if is_sound(arch):
        return True
    tf32 = torch.get_float32_matmul_precision() != "highest"
    fault = _fault_of(kernel, dtype, arch, tf32, has_diag, has_blocks)
    if fault is not None:
        _warn_once(fault)
    return fault is None


# ----------------------------------------------------------------------------------------------------------- compiling


def is_watched(kernel: str) -> bool:
    """True for kernels ("fold_kernel") of which some launches may be wrong."""
    return kernel in WATCHED


@cache
def is_sound(arch: str) -> bool:
    """True where every kernel is compiled as it is, with nothing looked at a launch."""
    if arch.startswith("sm_90"):
        return TRITON_RELEASE >= SOUND_TRITON and toolchain(arch).assembler.is_safe
    return TRITON_RELEASE >= SOUND_TRITON or not arch.startswith("sm_10")


class _InUse:
    """Has Triton assemble with another ptxas, in every thread, from the first one's entry to the last one's exit.

    The knob is set where Triton reads it first: set the usual way it would also be in the environment, and so in
    programs that another thread starts. What others compile meanwhile is assembled by the newer ptxas, too.
    """

    def __init__(self, path: str) -> None:
        from triton import knobs

        self.path, self.knobs = path, vars(knobs.nvidia)
        self.name = "ptxas" if TRITON_RELEASE < SOUND_TRITON else "ptxas_blackwell"
        self.before: dict[str, Any] = {}
        self.users = 0
        self.lock = threading.Lock()

    def __enter__(self) -> None:
        with self.lock:
            if not self.users:
                self.before = {self.name: self.knobs[self.name]} if self.name in self.knobs else {}
                self.knobs[self.name] = self.path
            self.users += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                del self.knobs[self.name]
                self.knobs.update(self.before)


#: One for each path: it counts who is inside.
_in_use = cache(_InUse)


@cache
def _compiled(launch: tuple[Any, ...], arch: str) -> tuple[str | None, dict[str, Any], AbstractContextManager[None]]:
    """(why it must not be launched, the options it is launched with, the context it is launched in)."""
    described = Launch(*launch)
    fault = _fault(described, arch)
    if fault is not None or not arch.startswith("sm_90") or not described.takes_registers:
        return fault, {}, nullcontext()
    replacement = toolchain(arch).replacement
    options = {"ptx_options": _assembler_options()} if TRITON_RELEASE < SOUND_TRITON or replacement else {}
    return None, options, _in_use(replacement.path) if replacement else nullcontext()


def compiled(
    kernel: str, arguments: Mapping[str, Any], arch: str
) -> tuple[dict[str, Any], AbstractContextManager[None]]:
    """The further options that a launch gets, and the context in which it is compiled by a safe assembler.

    Raises:
        NotLaunched: there is none. The operators ask `may_launch` first, so only a direct launch comes here.
    """
    fault, options, context = _compiled(_as_launched(kernel, arguments), arch)
    if fault is not None:
        raise NotLaunched(f"{kernel} is not launched: {fault}")
    return options, context


@cache
def _assembler_options() -> str:
    """`ASSEMBLER_OPTION` after the user's own, from $PTXAS_OPTIONS."""
    from triton import knobs

    return " ".join(filter(None, (knobs.nvidia.ptxas_options, ASSEMBLER_OPTION)))


def describe(arch: str) -> str:
    """The assembler of an architecture's kernels and what follows from it, in a line."""
    if not arch.startswith("sm_"):
        return f"none for {arch}"
    tools = toolchain(arch)
    found, kept = str(tools.assembler), "left to torch's own operations"
    if arch.startswith("sm_90"):
        if not tools.is_safe:
            return f"{found}: kernels with operands in registers are {kept}; triton >= 3.9 or {_variable()} runs them"
        if tools.replacement:
            found += f", for kernels with operands in registers {tools.replacement}"
        if TRITON_RELEASE < COPIES_OPERANDS:
            return f"{found}: the one-pass kernel is {kept}; triton >= 3.7 runs it"
    elif not is_sound(arch):
        return f"{found}: exact float32 in three products is {kept}; triton >= {_dotted(SOUND_TRITON)} runs it"
    return f"{found}: all kernels run"


def forget() -> None:
    """Ask again: for tests that change what is installed."""
    for remembered in (toolchain, is_sound, _fault_of, _warn_once, _in_use, _compiled, _assembler_options):
        remembered.cache_clear()

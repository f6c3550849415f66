"""Which launches the installed compiler would compile wrongly, decided in this file alone.

* sm_90, register operands: the tensor cores read operand A asynchronously, also from registers. ptxas before 13.1 may
  overwrite these registers too early (triton-lang/triton #11781, fla-org/flash-linear-attention #1262). So may Triton
  3.6 itself, when it keeps several such products in flight (triton-lang/triton #9433).
* sm_10x, chained products: Triton before 3.9 computes wrong sums when several products of one step add to one
  accumulator (triton-lang/triton #10821). Exact float32 in three TF32 products is such a chain.

Operators ask `may_launch` first, and use torch's own operations if it returns False. Only a direct launch raises
`NotLaunched`. Importing this module does not import Triton.
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
from typing import Any, NamedTuple

import torch

from gssf_triton.kernels import devices
from gssf_triton.kernels.configs import dot_precision, tf32_allowed
from gssf_triton.kernels.release import TRITON_RELEASE

#: The oldest assembler that is safe with register operands: 13.0 is reported to fail, 13.1 not (#1262 above).
SAFE_ASSEMBLER = (13, 1)
#: The first release of Triton that copies register operands before a product reads them.
COPIES_OPERANDS = (3, 7)
#: The first release of Triton that uses CUDA 13's assembler for sm_90 and adds up chained products correctly.
SOUND_TRITON = (3, 9)
#: The option that Triton passes to CUDA 13's assembler. It is part of the cache key, which otherwise holds the version
#: of Triton's own assembler only: so it marks kernels that a replacement has compiled.
ASSEMBLER_OPTION = "--regAllocOptLevel=2"
#: Kernels that may have register operands or chained products → the `Matrix` with the dtype of their products.
WATCHED = {
    "pairwise_kernel": "a",
    "fold_kernel": "x",
    "paired_kernel": "a",
    "gradient_kernel": "x",
    "cross_attention_kernel": "x",
}

#: Products with fewer rows don't use sm_90's asynchronous instructions, and so none that reads overwritten registers.
ASYNCHRONOUS_ROWS = 64

#: Half precision as torch's dtypes, and as the compiler's types of pointers.
HALVES = (torch.float16, torch.bfloat16, "*fp16", "*bf16")


class NotLaunched(RuntimeError):
    """A kernel that would be compiled wrongly was about to be launched."""


@dataclass(frozen=True)
class Assembler:
    """A ptxas and its version; None if that is unknown."""

    path: str
    version: tuple[int, ...] | None

    @property
    def is_safe(self) -> bool:
        return self.version is not None and self.version >= SAFE_ASSEMBLER

    def __str__(self) -> str:
        return f"ptxas {'unknown' if self.version is None else _dotted(self.version)} ({self.path})"


@dataclass(frozen=True)
class Toolchain:
    """The assembler that Triton uses for an architecture, and the one that it ships and some kernels use instead."""

    assembler: Assembler
    replacement: Assembler | None = None

    @property
    def is_safe(self) -> bool:
        """True if kernels with register operands can be compiled."""
        return self.assembler.is_safe or self.replacement is not None


def _version(text: str | None) -> tuple[int, ...] | None:
    numbers = re.findall(r"\d+", text or "")
    return tuple(map(int, numbers[:2])) if numbers else None


def _of_triton(code: int) -> Assembler:
    """The assembler that Triton uses for an architecture, by its own rules and environment variables."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas, get_ptxas_version

        # Triton remembers this version for its cache keys. So ask before another assembler is in use.
        get_ptxas_version(code)
        tool = get_ptxas(code)
        return Assembler(tool.path, _version(tool.version))
    except (ImportError, AttributeError, OSError, RuntimeError, subprocess.SubprocessError) as fault:
        return Assembler(f"not usable: {fault}", None)


def _bundled() -> list[Assembler]:
    """The assemblers that the installed Triton ships, newest first."""
    try:
        import triton.backends.nvidia
        from triton.knobs import NvidiaTool

        folder = Path(triton.backends.nvidia.__file__ or "").parent / "bin"
        tools = [tool for path in sorted(folder.glob("ptxas*")) if (tool := NvidiaTool.from_path(str(path)))]
    except (ImportError, AttributeError, OSError, subprocess.SubprocessError):
        return []
    found = [Assembler(tool.path, _version(tool.version)) for tool in tools]
    return sorted(found, key=lambda tool: tool.version or (), reverse=True)


@cache
def toolchain(arch: str) -> Toolchain:
    """The assembler of an NVIDIA architecture, found once a process. Never raises: an unknown version is not safe."""
    code = int(re.findall(r"\d+", arch)[0])
    found = _of_triton(code)
    if found.is_safe or not arch.startswith("sm_90"):
        return Toolchain(found)
    shipped = next((tool for tool in _bundled() if tool.is_safe), None)
    if shipped is None:
        return Toolchain(found)
    with _in_use(shipped.path):  # Triton may not accept it
        return Toolchain(found, shipped if _of_triton(code) == shipped else None)


# ------------------------------------------------------------------------------------------------------------ launches


class Variant(NamedTuple):
    """What decides whether a kernel has register operands: its name and what it is compiled for.

    Attributes:
        kernel: Its name, "fold".
        half: Whether its products' operands are in half precision.
        precision: `input_precision` of the products whose operand may come from registers.
        has_diag: Whether the kernel folds by W_diag.
        has_blocks: Whether it folds by W_blocks; the gradient kernel: whether it multiplies by blocks or sums their
            gradient.
        rows: Of its products, at least; of `fold` and `gradient` alone.
    """

    kernel: str
    half: bool = False
    precision: str = "ieee"
    has_diag: bool = False
    has_blocks: bool = False
    rows: int = ASYNCHRONOUS_ROWS

    @property
    def takes_registers(self) -> bool:
        """True if sm_90's tensor cores may read operand A from registers: if the kernel computes it.

        An operand that comes unchanged from memory is read from shared memory. Exact float32 does not use tensor cores.
        The compile gate checks the answer against compiled kernels.
        """
        tf32 = self.precision.startswith("tf32")
        if self.rows < ASYNCHRONOUS_ROWS:
            return False
        if self.kernel == "pairwise":
            return (self.half or tf32) and (self.has_diag or self.has_blocks)
        if self.kernel == "fold":  # half precision: where blocks share a tile and NaN is confined
            return (self.half or tf32) and self.has_blocks
        if self.kernel in ("paired", "gradient"):
            return tf32 and self.has_blocks
        return tf32 and self.kernel == "cross_attention"

    @property
    def chains_products(self) -> bool:
        """True if several products of one step may add to one accumulator."""
        return self.precision == "tf32x3" and (self.has_blocks or self.kernel == "cross_attention")


def variant_of(kernel: str, arguments: Mapping[str, Any]) -> Variant:
    """The variant of a kernel ("fold_kernel") that a launch with these arguments runs."""
    if kernel not in WATCHED:
        return Variant(kernel.removesuffix("_kernel"))
    features, tile, weights = arguments[WATCHED[kernel]].ptr, arguments["TILE"], arguments.get("weights")
    precision, has_blocks = tile.PRECISION, weights is not None and weights.blocks is not None
    if kernel == "gradient_kernel":
        precision = tile.EPILOGUE_PRECISION
        has_blocks = arguments["dw_blocks_ptr"] is not None or (arguments["rows"] is not None and has_blocks)
    elif kernel == "cross_attention_kernel":
        precision = tile.GRAM_PRECISION
    rows = tile.BLOCK_M if kernel in ("fold_kernel", "gradient_kernel") else ASYNCHRONOUS_ROWS
    rows = getattr(rows, "value", rows)
    half = getattr(features, "dtype", features) in HALVES
    has_diag = weights is not None and weights.diag is not None
    precision = getattr(precision, "value", precision)
    return Variant(kernel.removesuffix("_kernel"), half, precision, has_diag, has_blocks, rows)


def overwrites_operands(arch: str) -> bool:
    """True if operands in registers may be overwritten, but for products of fewer rows than `ASYNCHRONOUS_ROWS`."""
    return arch.startswith("sm_90") and not toolchain(arch).is_safe


def adds_chains(arch: str) -> bool:
    """False if several products that add to one accumulator are added up wrongly."""
    return TRITON_RELEASE >= SOUND_TRITON or not arch.startswith("sm_10")


def _fault(variant: Variant, arch: str) -> str | None:
    """Why a kernel would compute wrong numbers on `arch`, with the remedy; None if it would not."""
    if arch.startswith("sm_90") and variant.takes_registers:
        if not toolchain(arch).is_safe:
            return (
                f"{toolchain(arch).assembler} may overwrite operands in registers before {arch}'s tensor cores have "
                f'read them: pip install "triton>=3.9", or set {_variable()} to a ptxas of CUDA 13.1 or newer'
            )
        if variant.kernel == "pairwise" and TRITON_RELEASE < COPIES_OPERANDS:
            return (
                f'Triton {_dotted(TRITON_RELEASE)} overwrites operands that are being read: pip install "triton>=3.7"'
            )
    if variant.chains_products and not adds_chains(arch):
        return f'Triton {_dotted(TRITON_RELEASE)} adds chained products up wrongly on {arch}: pip install "triton>=3.9"'
    return None


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _variable() -> str:
    """The environment variable that chooses Triton's assembler for sm_90."""
    return "TRITON_PTXAS_PATH" if TRITON_RELEASE < SOUND_TRITON else "TRITON_PTXAS_BLACKWELL_PATH"


@cache
def _warn_once(fault: str) -> None:
    warnings.warn(
        f"some kernels are left to torch's own operations: {fault}. `python -m gssf_triton.autotune doctor` says more",
        stacklevel=4,
    )


@cache
def _fault_of(kernel: str, dtype: torch.dtype, arch: str, tf32: bool, has_diag: bool, has_blocks: bool) -> str | None:
    """`_fault` of a launch before its tile is chosen. `tf32`: float32 products may round to TF32."""
    half = dtype in HALVES
    if kernel in ("gradient", "cross_attention"):
        # Their products over whole rows are in float32 at least.
        wide = torch.promote_types(dtype, torch.float32)
        precision = dot_precision(wide, arch, tf32=tf32 or (half and kernel == "gradient"), whole_rows=True)
    else:
        precision = dot_precision(dtype, arch, tf32=tf32)
    return _fault(Variant(kernel, half, precision, has_diag, has_blocks), arch)


def may_launch(
    kernel: str, dtype: torch.dtype, device: torch.device, *, has_diag: bool = False, has_blocks: bool = False
) -> bool:
    """Whether a kernel may run over features of `dtype`; warns once a process if it may not.

    Args:
        kernel: Its name, "fold".
        dtype: The features' dtype.
        device: Their device. The result is True on all but sm_90 and sm_10x.
        has_diag: Whether the kernel gets W_diag.
        has_blocks: Whether it gets W_blocks; the gradient kernel: whether it multiplies by blocks or sums their
            gradient.
    """
    arch = devices.identify(device).arch
    if is_sound(arch):
        return True
    tf32 = tf32_allowed()
    fault = _fault_of(kernel, dtype, arch, tf32, has_diag, has_blocks)
    if fault is not None:
        _warn_once(fault)
    return fault is None


# ----------------------------------------------------------------------------------------------------------- compiling


def is_watched(kernel: str) -> bool:
    """True if some launches of a kernel ("fold_kernel") may be wrong."""
    return kernel in WATCHED


@cache
def is_sound(arch: str) -> bool:
    """True if every kernel is compiled correctly, so that launches need no check."""
    if arch.startswith("sm_90"):
        return TRITON_RELEASE >= SOUND_TRITON and toolchain(arch).assembler.is_safe
    return adds_chains(arch)


class _InUse:
    """Makes Triton use another ptxas, in every thread, from the first entry to the last exit.

    The knob is set in its object's dictionary, where Triton looks first. Set the usual way, it would also be in the
    environment, and so in programs that another thread starts. What other threads compile meanwhile also gets the newer
    ptxas.
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


#: One for each path, since it counts its users.
_in_use = cache(_InUse)


@cache
def _launch_options(variant: Variant, arch: str) -> tuple[str | None, dict[str, Any], AbstractContextManager[None]]:
    """(why it must not be launched, further options of the launch, context of the launch)."""
    fault = _fault(variant, arch)
    if fault is not None or not arch.startswith("sm_90") or not variant.takes_registers:
        return fault, {}, nullcontext()
    replacement = toolchain(arch).replacement
    options = {"ptx_options": _assembler_options()} if TRITON_RELEASE < SOUND_TRITON or replacement else {}
    return None, options, _in_use(replacement.path) if replacement else nullcontext()


def launch_options(
    kernel: str, arguments: Mapping[str, Any], arch: str
) -> tuple[dict[str, Any], AbstractContextManager[None]]:
    """Further options of a launch, and the context in which a safe assembler compiles it.

    Raises:
        NotLaunched: It would compute wrong numbers. The operators ask `may_launch` first, so only a direct launch can
        raise.
    """
    fault, options, context = _launch_options(variant_of(kernel, arguments), arch)
    if fault is not None:
        raise NotLaunched(f"{kernel} is not launched: {fault}")
    return options, context


@cache
def _assembler_options() -> str:
    """The user's options ($PTXAS_OPTIONS), then `ASSEMBLER_OPTION`."""
    from triton import knobs

    return " ".join(filter(None, (knobs.nvidia.ptxas_options, ASSEMBLER_OPTION)))


def describe(arch: str) -> str:
    """One line: the assembler of an architecture's kernels, and which kernels run."""
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
    """Forget all answers, for tests that change what is installed."""
    for remembered in (toolchain, is_sound, _fault_of, _warn_once, _in_use, _launch_options, _assembler_options):
        remembered.cache_clear()

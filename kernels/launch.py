"""What every launcher needs: the kernels' arguments, the numerics of a dtype, and the start of a kernel."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from operator import le
from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.kernels import toolchain, warm
from gssf_triton.kernels.args import Blocks, Matrix, Tile, Vector, Weights
from gssf_triton.kernels.configs import BoundedConfig, dot_precision, padded_block, tf32_allowed
from gssf_triton.kernels.devices import identify
from gssf_triton.kernels.targets import MAX_GRID
from gssf_triton.kernels.tile import INTERPRETED
from gssf_triton.metric import Metric, accumulate_dtype

#: Offsets below this fit the 32-bit arithmetic that Triton uses for 32-bit operands.
INT32_LIMIT = 2**31

#: A multiple of every BLOCK_K there is.
LONGEST_STEP = 256

#: If sizes and strides are multiples of this, tiles move 16 bytes at a time, in every dtype.
ALIGNMENT = 16


def architecture(device: torch.device) -> str:
    """The architecture by which configurations are chosen: "sm_90", "gfx942", or "interpreter"."""
    return identify(device).arch


def needs_wide_channels(*tensors: Tensor) -> bool:
    """True if channel × stride exceeds 32 bits in one of the tensors (rows and batches are always 64-bit)."""
    return any(x.stride(-1) != 1 and x.shape[-1] * abs(x.stride(-1)) >= INT32_LIMIT for x in tensors)


def acc_type(dtype: torch.dtype) -> tl.dtype:
    """The accumulators' dtype in the kernels."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def precision(dtype: torch.dtype, device: torch.device, *, whole_rows: bool = False) -> str:
    """`configs.dot_precision` under the user's setting, torch.set_float32_matmul_precision."""
    tf32 = tf32_allowed()
    return dot_precision(dtype, architecture(device), tf32=tf32, whole_rows=whole_rows)


class Options(Hashable, Protocol):
    """The fields of every configuration that a launch needs."""

    @property
    def num_warps(self) -> int: ...

    @property
    def num_stages(self) -> int: ...


def matrix(x: Tensor) -> Matrix:
    """x (Z, M, D) or (M, D) as a kernel's argument. For a batch of one the batch stride is 0: it is never used."""
    if x.dim() == 2:
        return Matrix(x, None, *x.stride())
    return Matrix(x, 0 if x.shape[0] == 1 else x.stride(0), x.stride(1), x.stride(2))


def batch_of(x: Tensor) -> Matrix:
    """`matrix` of x (Z, M, D), or of plain rows (M, D) as a batch of one, which runs the same kernel."""
    return matrix(x)._replace(batch=0) if x.dim() == 2 else matrix(x)


def weights(metric: Metric) -> Weights:
    """The weights as a kernel's argument."""
    W_diag, W_blocks = metric.W_diag, metric.W_blocks
    return Weights(
        None if W_diag is None else Vector(W_diag, W_diag.stride(0)),
        None if W_blocks is None else Blocks(W_blocks, *W_blocks.stride()),
    )


def blocks_like(x: Tensor, metric: Metric) -> Metric:
    """The metric with its blocks in x's dtype, so that both operands of the fold's product have one.

    The G·B·B numbers are cast once a call rather than once a tile.
    """
    W_blocks = metric.W_blocks
    return metric if W_blocks is None or W_blocks.dtype == x.dtype else Metric(metric.W_diag, W_blocks.to(x.dtype))


class PairStrides(NamedTuple):
    """The strides of a `PairMatrix` (batch, row, column), and whether it is even."""

    batch: int | None
    row: int | None
    column: int | None
    even: bool


def pair_strides(x: Tensor) -> PairStrides:
    """The strides of a matrix of pairs (Z, M, N) or (M, N), such that all sizes share two kernels, even and ragged.

    Triton compiles anew when an argument becomes 1, or a multiple of 16. So these strides are not specialised, and the
    kernel gets only what matters: which side is contiguous, and `even`. With `even` at run time and a branch for each
    case, one kernel serves all sizes. That is free if the branch is only behind the loop; around the gradient's loads
    it makes ptxas serialise sm_90's products in TF32 (C7515).
    """
    sizes, strides = x.shape[-2:], x.stride()
    # If both strides are 1, the side with a single number counts as the contiguous one: in a contiguous matrix its
    # length is the other side's stride.
    unit = min((side for side in (-1, -2) if strides[side] == 1), key=lambda side: sizes[side], default=None)
    batch = strides[0] if len(strides) == 3 and x.shape[0] != 1 else 0
    row, column = strides[-2:]
    pitches = (batch, sizes[-2] if unit == -2 else row, sizes[-1] if unit == -1 else column)
    even = all(pitch % ALIGNMENT == 0 for pitch in pitches)
    return PairStrides(batch, None if unit == -2 else row, None if unit == -1 else column, even)


@cache
def _tile(
    kind: Any, config: Options, B: int, D: int, wide: bool, dtype: torch.dtype, arch: str, tf32: bool,
    constants: tuple[tuple[str, Any], ...],
) -> Tile:  # fmt: skip
    sizes = {name: size for name, size in vars(config).items() if name in kind.__dataclass_fields__}
    padded = padded_block(B)
    assert LONGEST_STEP % sizes.get("BLOCK_K", 1) == 0, config
    found: Tile = kind(**{
        **sizes, "B": B, "BLOCK_B": padded, "EVEN_D": padded == B and D % sizes.get("BLOCK_K", 1) == 0, "WIDE": wide,
        "PRECISION": dot_precision(dtype, arch, tf32=tf32), "ACC": acc_type(accumulate_dtype(dtype)), **dict(constants),
    })  # fmt: skip
    return found


def tile(config: Options, *features: Tensor, B: int = 0, kind: Any = Tile, **constants: Any) -> Tile:
    """The `Tile` of a kernel over `features` (…, D) in blocks of B; equal values give one object.

    `constants`: further fields of `kind`, or replacements of those that follow from the features.
    """
    x = features[0]
    wide, tf32 = needs_wide_channels(*features), tf32_allowed()
    constants = {name: getattr(value, "value", value) for name, value in constants.items()}
    # D matters only modulo BLOCK_K. With D itself in the key, the cache would fill the memory.
    D = x.shape[-1] % LONGEST_STEP
    return _tile(kind, config, B, D, wide, x.dtype, architecture(x.device), tf32, tuple(constants.items()))


def cdiv(n: int, step: int) -> int:
    """n / step, rounded up. `triton.cdiv` costs some microseconds on the host."""
    return -(-n // step)


def lanes(channels: int, B: int) -> int:
    """Channels, with every block padded to a power of two."""
    return channels // B * (1 << (B - 1).bit_length()) if B else channels


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, config: Options, /, **arguments: Any) -> None:
    """Start a kernel on `device`, on its current stream, with the compiler's options of `config`.

    Triton starts kernels on the current device. With tensors of another device they fail, or, if one device can read
    the other's memory, run on the wrong device, unordered with what writes the tensors.
    """
    assert all(map(le, grid, MAX_GRID)), f"a grid of {grid}, beyond {MAX_GRID}"
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        with torch.cuda.device(device):
            _launch(kernel, grid, device, config, arguments)
    else:
        _launch(kernel, grid, device, config, arguments)


def _launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, config: Options, arguments: dict[str, Any]
) -> None:
    # Fused multiply-adds are set explicitly: Triton's default is changing.
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    if isinstance(config, BoundedConfig):
        options["maxnreg"] = config.maxnreg
    if warm.again(kernel, grid, options, arguments):
        return
    find_room()
    further: dict[str, Any] = {}
    context: AbstractContextManager[None] = nullcontext()
    name = getattr(kernel, "__name__", "")
    if toolchain.is_watched(name) and not toolchain.is_sound(arch := architecture(device)):
        further, context = toolchain.launch_options(name, arguments, arch)
    with context:
        compiled = kernel[grid](**arguments, **options, **further)
    warm.learn(compiled, kernel, grid, options, arguments)


@cache
def find_room() -> None:
    """Once a process: if Triton's cache cannot be written, set a temporary folder instead, and warn."""
    if INTERPRETED:
        return
    folder = triton.knobs.cache.dir
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as fault:
        instead = tempfile.TemporaryDirectory(prefix="gssf-triton-")
        _kept.append(instead)  # removed when the process ends
        triton.knobs.cache.dir = instead.name
        warnings.warn(
            f"Triton's cache {folder} cannot be written ({fault}): kernels are compiled anew in every process; set "
            "TRITON_CACHE_DIR to a folder that can",
            stacklevel=3,
        )


_kept: list[tempfile.TemporaryDirectory[str]] = []


def items_a_grid(programs: int) -> int:
    """How many items, each of `programs` programs, fit one launch; at least one."""
    return max(1, MAX_GRID[0] // programs)


def runs(items: int, programs: int) -> Iterator[slice]:
    """[0, items) in runs that fit one launch each, with `programs` programs an item."""
    step = items_a_grid(programs)
    for start in range(0, items, step):
        yield slice(start, min(start + step, items))

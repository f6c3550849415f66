"""What every launcher needs: the weights as kernel arguments, the numerics of a dtype, and the device in words."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.kernels import toolchain
from gssf_triton.kernels.configs import dot_precision
from gssf_triton.kernels.devices import identify
from gssf_triton.kernels.tile import INTERPRETED

#: Offsets below this fit the 32-bit arithmetic that Triton uses for 32-bit operands.
INT32_LIMIT = 2**31

#: The most programs of a launch along each axis of its grid: CUDA's limits.
MAX_GRID = (2**31 - 1, 65_535, 65_535)

#: Sizes and strides that are multiples of this let tiles move 16 bytes at a time, whatever the dtype.
ALIGNMENT = 16


def describe(device: torch.device) -> str:
    """The architecture configurations are chosen by: "sm_90", "gfx942", or "interpreter"."""
    return identify(device).arch


def needs_wide_channels(*tensors: Tensor) -> bool:
    """True where channel × stride leaves 32 bits in one of the tensors (rows and batches are always 64-bit)."""
    return any(x.shape[-1] * abs(x.stride(-1)) >= INT32_LIMIT for x in tensors)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What products of `dtype` operands are summed in."""
    return torch.promote_types(dtype, torch.float32)


def acc_type(dtype: torch.dtype) -> tl.dtype:
    """The accumulator dtype as the kernels take it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def precision(dtype: torch.dtype, device: torch.device, *, from_half: bool = False, whole_rows: bool = False) -> str:
    """`configs.dot_precision` under the user's setting, torch.set_float32_matmul_precision."""
    tf32 = from_half or torch.get_float32_matmul_precision() != "highest"
    return dot_precision(dtype, describe(device), tf32=tf32, whole_rows=whole_rows)


def pointer(name: str, x: Tensor | None, dims: str, absent: Tensor, stride: str | None = None) -> dict[str, Any]:
    """A tensor as a kernel's pointer and, next to it, its strides: `x_ptr`, `stride_xm`, `stride_xd` for dims "md".

    An absent tensor gets a pointer that is never read, and strides of 0; so has the batch "z" of a single matrix, whose
    stride would change with the matrix's size, and mean nothing.
    """
    letter = stride or name
    tensor = absent if x is None else x
    strides = [0] * len(dims) if x is None else x.stride()
    if x is not None and dims[0] == "z" and x.shape[0] == 1:
        strides = (0, *strides[1:])
    return {f"{name}_ptr": tensor} | {f"stride_{letter}{d}": s for d, s in zip(dims, strides, strict=True)}


def matrix(name: str, x: Tensor | None, dims: str, absent: Tensor, stride: str | None = None) -> dict[str, Any]:
    """As `pointer`, for a matrix with a side as long as a batch: all sizes share two kernels, even and ragged ones.

    Triton compiles anew for an argument that is 1, or a multiple of 16, where it was not before. So the kernel is not
    to specialise these strides, and is told what matters of them: the stride along the contiguous side is None, and
    EVEN_S (of a matrix "s") tells that this side and all other strides are multiples of 16. A kernel reads them by
    `tile.stride_of` and `tile.side_of`. One that is told at run time instead, with a branch for each, serves all sizes:
    that is free where the branch stands behind the loop alone. Around the gradient's loads it makes ptxas serialise
    sm_90's products in TF32 (C7515).
    """
    letter, even = stride or name, f"EVEN_{name.upper()}"
    arguments = pointer(name, x, dims, absent, letter)
    if x is None:
        return arguments | {even: False}
    sizes, strides = x.shape[-2:], x.stride()[-2:]
    # Of two strides of 1, one side has a single number, and counts as the contiguous one: its length is the other's
    # stride in any matrix that is contiguous.
    unit = min((side for side in (1, 0) if strides[side] == 1), key=lambda side: sizes[side], default=None)
    pitches = [arguments[f"stride_{letter}{d}"] for d in dims]
    if unit is not None:
        arguments[f"stride_{letter}{dims[-2:][unit]}"] = None
        pitches[unit - 2] = sizes[unit]
    return arguments | {even: all(pitch % ALIGNMENT == 0 for pitch in pitches)}


@dataclass(frozen=True)
class Metric:
    """The two weights, either of them None (both: the identity, for rows that were folded before)."""

    W_diag: Tensor | None
    W_blocks: Tensor | None

    @property
    def block_size(self) -> int:
        """B, or 0 where there is no block term."""
        return 0 if self.W_blocks is None else self.W_blocks.shape[-1]

    @property
    def padded_block(self) -> int:
        return triton.next_power_of_2(self.block_size) if self.block_size else 0

    @property
    def transposed(self) -> Metric:
        """The metric seen from the other side."""
        return Metric(self.W_diag, None if self.W_blocks is None else self.W_blocks.mT)

    def lanes(self, channels: int) -> int:
        """Channels, with every block padded to a power of two."""
        return channels if not self.block_size else channels // self.block_size * self.padded_block

    def is_even(self, channels: int, BLOCK_K: int) -> bool:
        """True where every lane of every chunk is a channel, so that no load needs a mask."""
        return self.padded_block == self.block_size and channels % BLOCK_K == 0

    @property
    def is_identity(self) -> bool:
        return self.W_diag is None and self.W_blocks is None

    def arguments(self, features: Tensor, cast: bool = True) -> dict[str, Any]:
        """The weights as kernel arguments.

        `cast` brings the blocks in the features' dtype, so that both operands of the fold's product are of one dtype:
        G·B·B numbers, cast once a call rather than once a tile.
        """
        W_blocks = self.W_blocks
        if W_blocks is not None and cast:
            W_blocks = W_blocks.to(features.dtype)
        return {
            **pointer("w_diag", self.W_diag, "d", features, stride="w"),
            **pointer("w_blocks", W_blocks, "gpq", features, stride="w"),
            "B": self.block_size,
            "BLOCK_B": self.padded_block,
            "HAS_DIAG": self.W_diag is not None,
            "HAS_BLOCKS": W_blocks is not None,
        }


def numerics(x: Tensor) -> dict[str, Any]:
    """Precision and accumulator of a kernel over features like x."""
    return {"PRECISION": precision(x.dtype, x.device), "ACC": acc_type(accumulator(x.dtype))}


class Config(Protocol):
    """What every configuration has."""

    @property
    def num_warps(self) -> int: ...

    @property
    def num_stages(self) -> int: ...


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, /, **arguments: Any) -> None:
    """Start a kernel on `device`, on its current stream.

    Triton starts kernels on the current device, whichever that is: beside tensors of another one they fail, or, where
    one device may read the other's memory, run on the wrong one, unordered with what writes the tensors.
    """
    assert all(n <= most for n, most in zip(grid, MAX_GRID, strict=False)), f"a grid of {grid}, beyond {MAX_GRID}"
    find_room()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        name = getattr(kernel, "__name__", "")
        if not toolchain.is_watched(name) or toolchain.is_sound(arch := describe(device)):
            kernel[grid](**arguments)
            return
        further, context = toolchain.compiled(name, arguments, arch)
        with context:
            kernel[grid](**arguments, **further)


@cache
def find_room() -> None:
    """Once a process: where Triton cannot write what it compiles, have it write into a temporary folder, and warn."""
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
    """How many items of so many programs each one launch takes, at least one."""
    return max(1, MAX_GRID[0] // programs)


def runs(items: int, programs: int) -> Iterator[slice]:
    """[0, items) in runs whose launches, of `programs` programs an item, fit a grid."""
    step = items_a_grid(programs)
    for start in range(0, items, step):
        yield slice(start, min(start + step, items))


def options(config: Config) -> dict[str, Any]:
    """The compiler's options; fused multiply-adds are asked for, since Triton's default for them is changing."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}

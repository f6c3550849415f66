"""What every launcher needs: the weights as kernel arguments, the numerics of a dtype, and the device in words."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.autotune.configs import dot_precision
from gssf_triton.autotune.devices import identify

#: Offsets below this fit the 32-bit arithmetic that Triton uses for 32-bit operands.
INT32_LIMIT = 2**31


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

    An absent tensor gets a pointer that is never read, and strides of 0.
    """
    letter = stride or name
    tensor = absent if x is None else x
    strides = [0] * len(dims) if x is None else x.stride()
    return {f"{name}_ptr": tensor} | {f"stride_{letter}{d}": s for d, s in zip(dims, strides, strict=True)}


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
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments)


def options(config: Config) -> dict[str, Any]:
    """The compiler's options; fused multiply-adds are asked for, since Triton's default for them is changing."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}

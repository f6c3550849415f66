"""Which backend computes a call: Triton where it compiles for the tensors' GPU, plain torch elsewhere."""

from __future__ import annotations

import os
import warnings

import torch
from torch import Tensor

from gssf_triton import kernels
from gssf_triton.checks import check_choice
from gssf_triton.kernels.release import HAS_TRITON, OLDEST_TRITON, TRITON_VERSION

CHOICES = ("auto", "triton", "torch")

#: Ampere is the oldest NVIDIA architecture with bfloat16 and TF32 tensor cores, which the configurations assume.
OLDEST_CAPABILITY = (8, 0)

#: The largest block the kernels hold in one tile; torch folds larger ones.
LARGEST_TRITON_BLOCK = 256


def interpreter_is_on() -> bool:
    """True if the kernels are decorated for Triton's interpreter, or will be at import."""
    if not HAS_TRITON:
        return False
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("1", "true", "on", "yes", "y"):
        return False
    return kernels.tile.INTERPRETED


def gpu_is_supported(index: int) -> bool:
    """True where Triton compiles for GPU number `index`."""
    if not HAS_TRITON:
        return False
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.startswith("gfx9")
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor) >= OLDEST_CAPABILITY


def resolve_backend(backend: str, x: Tensor, W_blocks: Tensor | None) -> str:
    """The backend, "triton" or "torch", that computes a call on features like `x`.

    Raises:
        ValueError: an unknown backend, or blocks larger than the kernels take.
        RuntimeError: `backend="triton"` where Triton cannot run, and how to get it.
    """
    check_choice("backend", backend, CHOICES)
    if backend == "torch":
        return "torch"
    on_gpu = x.device.type == "cuda"
    block_fits = W_blocks is None or W_blocks.shape[-1] <= LARGEST_TRITON_BLOCK
    if backend == "auto":
        # In float64 no kernel of ours is faster than the library's product.
        if not on_gpu or x.dtype == torch.float64 or not block_fits:
            return "torch"
        if TRITON_VERSION and not HAS_TRITON and not torch.compiler.is_compiling():
            warnings.warn(
                f"Triton {TRITON_VERSION} is older than the kernels need: the torch backend computes on the GPU. "
                f'pip install "triton>={OLDEST_TRITON}", which comes with torch 2.10 and later',
                stacklevel=4,
            )
        return "triton" if gpu_is_supported(x.device.index or 0) else "torch"
    if not HAS_TRITON:
        raise RuntimeError(
            f'backend="triton" needs Triton {OLDEST_TRITON} or newer, '
            f"{f'{TRITON_VERSION} is' if TRITON_VERSION else 'none is'} installed: "
            f'pip install "triton>={OLDEST_TRITON}", or use backend="torch" or "auto"'
        )
    if on_gpu:
        if not gpu_is_supported(x.device.index or 0):
            raise RuntimeError(
                f'backend="triton" does not support {torch.cuda.get_device_name(x.device)}: it needs compute '
                'capability 8.0 or newer, or AMD gfx9; use backend="torch" or "auto"'
            )
    elif x.device.type != "cpu" or not interpreter_is_on():
        raise RuntimeError(
            f'backend="triton" cannot run on {x.device} tensors: move them to a GPU, or, on the CPU, set the '
            "environment variable TRITON_INTERPRET=1 before the process starts to run the kernels in Triton's "
            'interpreter (slow, for testing); backend="torch" or "auto" needs neither'
        )
    if not block_fits:
        assert W_blocks is not None
        raise ValueError(
            f'W_blocks of shape {tuple(W_blocks.shape)} has blocks of {W_blocks.shape[-1]}; backend="triton" takes '
            f'up to {LARGEST_TRITON_BLOCK}: use backend="torch" or "auto"'
        )
    return "triton"

"""The GPUs that configurations are chosen and compiled for, and their limits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """A target: its compiler backend and code, its limits, and how its tensor cores show.

    `shared_bytes`: shared memory of a block. `tensor_instruction`: the text of a tensor-core instruction in the
    assembly, `tensor_rows`: the rows that it needs.
    `processors`: multiprocessors of the data-centre part, so the least number of blocks that run side by side.
    """

    backend: str
    code: int | str
    warp: int
    shared_bytes: int
    tensor_instruction: str
    tensor_rows: int
    processors: int


ARCHITECTURES = {
    "sm_80": Architecture("cuda", 80, 32, 166_912, "mma.sync", 16, 108),
    "sm_90": Architecture("cuda", 90, 32, 232_448, "wgmma.mma_async", 64, 132),
    "sm_100": Architecture("cuda", 100, 32, 232_448, "tcgen05.mma", 64, 148),
    "gfx942": Architecture("hip", "gfx942", 64, 65_536, "v_mfma", 16, 304),
}

#: The most programs of a launch along each axis of its grid: CUDA's limits.
MAX_GRID = (2**31 - 1, 65_535, 65_535)

#: GPUs that the gate does not compile for: (architecture they resemble, shared bytes of a block). An unknown one is
#: assumed to have the least.
_KIN = {
    "sm_86": ("sm_80", 101_376),
    "sm_87": ("sm_80", 166_912),
    "sm_89": ("sm_80", 101_376),
    "sm_103": ("sm_100", 232_448),
    "sm_120": ("sm_80", 101_376),
    "sm_121": ("sm_80", 101_376),
}


def kin(arch: str) -> str | None:
    """The gate's architecture that `arch` resembles; None if `arch` is no GPU.

    Example:
        >>> from gssf_triton.kernels.targets import kin
        >>> kin("sm_90"), kin("sm_89"), kin("gfx90a"), kin("interpreter")
        ('sm_90', 'sm_80', 'gfx942', None)
    """
    if arch in ARCHITECTURES:
        return arch
    if arch in _KIN:
        return _KIN[arch][0]
    return "sm_80" if arch.startswith("sm_") else "gfx942" if arch.startswith("gfx") else None


def shared_bytes(arch: str) -> int:
    """The shared memory of a block, in bytes."""
    if arch in ARCHITECTURES:
        return ARCHITECTURES[arch].shared_bytes
    if arch in _KIN:
        return _KIN[arch][1]
    return 101_376 if arch.startswith("sm_") else ARCHITECTURES["gfx942"].shared_bytes


#: A data-centre card of each architecture: (slug, architecture, how the names of cards with its chip begin).
KNOWN_CARDS = (
    ("nvidia-a100", "sm_80", ("NVIDIA A100",)),
    ("nvidia-h100", "sm_90", ("NVIDIA H100", "NVIDIA H200")),
    ("nvidia-b200", "sm_100", ("NVIDIA B200",)),
    ("amd-mi300x", "gfx942", ("AMD Instinct MI300X",)),
)

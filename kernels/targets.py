"""The GPUs that configurations are chosen and compiled for: what a block has, and what a program runs against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """What a target gives a block, the instruction its tensor cores show up as, and the rows that one needs.

    `processors` is how many blocks run side by side at least: the multiprocessors of the data-centre part.
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

#: GPUs the gate does not compile for, and what they resemble: (kin, shared bytes a block has). Of an unknown one the
#: least is assumed.
_KIN = {
    "sm_86": ("sm_80", 101_376),
    "sm_87": ("sm_80", 166_912),
    "sm_89": ("sm_80", 101_376),
    "sm_103": ("sm_100", 232_448),
    "sm_120": ("sm_80", 101_376),
    "sm_121": ("sm_80", 101_376),
}


def kin(arch: str) -> str | None:
    """The architecture of the gate that `arch` compiles and runs like; None for what is no GPU.

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
    """The shared memory a block of `arch` has."""
    if arch in ARCHITECTURES:
        return ARCHITECTURES[arch].shared_bytes
    if arch in _KIN:
        return _KIN[arch][1]
    return 101_376 if arch.startswith("sm_") else ARCHITECTURES["gfx942"].shared_bytes


#: Tables are keyed by the card, one table serves the cards that share a chip: (slug, architecture, names it matches).
SHIPPED_DEVICES = (
    ("nvidia-a100", "sm_80", ("NVIDIA A100",)),
    ("nvidia-h100", "sm_90", ("NVIDIA H100", "NVIDIA H200")),
    ("nvidia-b200", "sm_100", ("NVIDIA B200",)),
    ("amd-mi300x", "gfx942", ("AMD Instinct MI300X",)),
)

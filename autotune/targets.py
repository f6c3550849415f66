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

#: Tables are keyed by the card, one table serves the cards that share a chip: (slug, architecture, names it matches).
SHIPPED_DEVICES = (
    ("nvidia-a100", "sm_80", ("NVIDIA A100",)),
    ("nvidia-h100", "sm_90", ("NVIDIA H100", "NVIDIA H200")),
    ("nvidia-b200", "sm_100", ("NVIDIA B200",)),
    ("amd-mi300x", "gfx942", ("AMD Instinct MI300X",)),
)

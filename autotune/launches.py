"""Every launch the package can make, as data: kernel, architecture, numerics, variant and configuration.

A launch differs from another only in what the compiler sees: the constexpr arguments, the dtypes and the options. Sizes
enter through the configuration they lead to and through whether loads need masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gssf_triton.autotune.configs import (
    cross_attention_config,
    dot_precision,
    fold_config,
    gradient_config,
    late_interaction_config,
    padded_block,
    pairwise_config,
)


@dataclass(frozen=True)
class Architecture:
    """What a target gives a block, the instruction its tensor cores show up as, and the rows that one needs."""

    backend: str
    code: int | str
    warp: int
    shared_bytes: int
    tensor_instruction: str
    tensor_rows: int


ARCHITECTURES = {
    "sm_80": Architecture("cuda", 80, 32, 166_912, "mma.sync", 16),
    "sm_90": Architecture("cuda", 90, 32, 232_448, "wgmma.mma_async", 64),
    "sm_100": Architecture("cuda", 100, 32, 232_448, "tcgen05.mma", 64),
    "gfx942": Architecture("hip", "gfx942", 64, 65_536, "v_mfma", 16),
}

#: What NVIDIA's tiles of fewer rows than the newest instruction takes are multiplied with.
SMALL_TILE_INSTRUCTION = "mma.sync"

#: (name, dtype, precision of its products).
NUMERICS = (
    ("bf16", torch.bfloat16, "ieee"),
    ("fp16", torch.float16, "ieee"),
    ("fp32", torch.float32, "ieee"),
    ("tf32", torch.float32, "tf32"),
)

#: Block sizes that lead to different code: none, padded to a power of two, packed, one a chunk, split over chunks.
BLOCK_SIZES = (0, 24, 32, 64, 128, 256)
#: Past this the tile loops run longer, in the same code; only the gradient kernel, which holds whole blocks, differs.
LARGEST_DISTINCT_TILE_BLOCK = 128

#: float16 and TF32 take the configurations of bfloat16 and float32: their plain variants stand for the rest.
BRIEF = ("fp16", "tf32")

#: Rows on each side that lead to the configurations for small and for large S.
ROWS = (64, 8192)
CHANNELS = 1024
#: Of an image and of a caption.
REGIONS, WORDS = 36, 32


@dataclass(frozen=True)
class Launch:
    """One compilation: `constants` are the kernel's constexpr arguments, sorted by name, `B` among them."""

    kernel: str
    arch: str
    numerics: str
    variant: str
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    wants_tensor_cores: bool

    @property
    def tensor_instruction(self) -> str:
        """The tensor-core instruction that a tile of this many rows compiles to."""
        arch = ARCHITECTURES[self.arch]
        enough = dict(self.constants)["BLOCK_M"] >= arch.tensor_rows
        return arch.tensor_instruction if enough else SMALL_TILE_INSTRUCTION

    @property
    def config_text(self) -> str:
        short = {"BLOCK_M": "M", "BLOCK_N": "N", "CAPTIONS": "T", "WORDS": "L", "BLOCK_K": "K", "BLOCK_C": "C", "BLOCK_P": "P"}
        tile = " ".join(f"{short[name]}{value}" for name, value in self.constants if name in short)
        return f"{tile} w{self.num_warps} s{self.num_stages}"


def _numerics(name: str) -> tuple[torch.dtype, str]:
    return next((dtype, precision) for label, dtype, precision in NUMERICS if label == name)


def _make(
    kernel: str, arch: str, numerics: str, variant: str, config: Any, flags: dict[str, Any], dots: bool
) -> Launch:
    tile = {k: v for k, v in asdict(config).items() if k.isupper()}
    dtype, precision = _numerics(numerics)
    constants = tile | flags
    return Launch(
        kernel,
        arch,
        numerics,
        variant,
        tuple(sorted(constants.items())),
        config.num_warps,
        config.num_stages,
        wants_tensor_cores=dots and (dtype != torch.float32 or precision == "tf32"),
    )


def _metric(B: int, diag: bool) -> dict[str, Any]:
    return {"B": B, "BLOCK_B": padded_block(B), "HAS_DIAG": diag, "HAS_BLOCKS": B > 0}


def _pairwise(arch: str, numerics: str) -> Iterator[Launch]:
    dtype, precision = _numerics(numerics)
    small, large = ROWS
    for B in BLOCK_SIZES:
        if B > LARGEST_DISTINCT_TILE_BLOCK:
            continue
        for label, rows, terms, normalize in (
            ("large", large, False, False),
            ("small", small, False, False),
            ("normalize", large, False, True),
            ("terms", large, True, True),
        ):
            if (terms and B == 0) or (numerics in BRIEF and normalize):
                continue
            config = pairwise_config(rows, rows, CHANNELS, B, dtype, arch, terms=terms)
            flags = _metric(B, diag=B > 0 or normalize) | {
                "TERMS": terms, "NORMALIZE": normalize, "EVEN_D": padded_block(B) == B, "WIDE": False,
                "PRECISION": precision, "ACC": "fp32",
            }  # fmt: skip
            yield _make("pairwise", arch, numerics, f"B={B} {label}", config, flags, dots=True)


def _rowwise(kernel: str, arch: str, numerics: str) -> Iterator[Launch]:
    dtype, precision = _numerics(numerics)
    for B in BLOCK_SIZES:
        if B > LARGEST_DISTINCT_TILE_BLOCK:
            continue
        config = fold_config(ROWS[1], CHANNELS, B, dtype, arch)
        flags = _metric(B, True) | {
            "NORMALIZE": True, "EVEN_D": padded_block(B) == B, "WIDE": False, "PRECISION": precision, "ACC": "fp32",
        }  # fmt: skip
        yield _make(kernel, arch, numerics, f"B={B} normalize", config, flags, dots=B > 0)


def _gradient(arch: str, numerics: str) -> Iterator[Launch]:
    dtype, precision = _numerics(numerics)
    for B in BLOCK_SIZES:
        config = gradient_config(B, dtype, arch, tf32=numerics != "fp32")
        variants = [("a and weights", True, True, True), ("b", True, True, False), ("fold", False, True, True)]
        if config.rows_apart:
            variants = [("weights", False, False, True)]
        for label, product, rows, weights in variants[: 1 if numerics in BRIEF else None]:
            flags = _metric(B, True) | {
                "PRODUCT": product, "ROWS": rows, "GRAD_DIAG": weights, "GRAD_BLOCKS": weights and B > 0,
                "WIDE": False, "PRECISION": precision, "ACC": "fp32",
                "EPILOGUE_PRECISION": dot_precision(torch.float32, arch, tf32=numerics != "fp32", whole_rows=True),
            }  # fmt: skip
            yield _make("gradient", arch, numerics, f"B={B} {label}", config, flags, dots=product or B > 0)


def _late_interaction(arch: str, numerics: str) -> Iterator[Launch]:
    dtype, precision = _numerics(numerics)
    config = late_interaction_config(REGIONS, WORDS, CHANNELS, dtype, arch)
    for label, mode, smooth in (("scores max", 0, False), ("weights lse", 2, True))[: 1 if numerics in BRIEF else None]:
        flags = {
            "IMAGES": config.images(REGIONS), "MODE": mode, "SMOOTH": smooth,
            "TWO_PARTS": mode == 2 and dtype != torch.float32, "HAS_REGION_MASK": True, "SCALE_REGIONS": False,
            "SCALE_WORDS": True, "EVEN_D": True, "WIDE": False, "PRECISION": precision, "ACC": "fp32",
        }  # fmt: skip
        yield _make("late_interaction", arch, numerics, label, config, flags, dots=True)


def _cross_attention(arch: str, numerics: str) -> Iterator[Launch]:
    dtype, precision = _numerics(numerics)
    for label, R, L in (("36 regions", REGIONS, WORDS), ("largest", 64, 128))[: 1 if numerics in BRIEF else None]:
        flags = {
            "HAS_REGION_MASK": True, "EVEN_D": True, "WIDE": False, "PRECISION": precision, "ACC": "fp32",
            "GRAM_PRECISION": dot_precision(torch.float32, arch, tf32=numerics == "tf32", whole_rows=True),
        }  # fmt: skip
        config = cross_attention_config(R, L, dtype, arch)
        yield _make("cross_attention", arch, numerics, label, config, flags, dots=True)


def all_launches(architectures: Iterable[str] = tuple(ARCHITECTURES)) -> list[Launch]:
    """Every distinct launch for these architectures, in a fixed order."""
    launches: dict[tuple[Any, ...], Launch] = {}
    for arch in architectures:
        for numerics, _, _ in NUMERICS:
            for source in (
                _pairwise(arch, numerics),
                _rowwise("fold", arch, numerics),
                _rowwise("paired", arch, numerics),
                _gradient(arch, numerics),
                _late_interaction(arch, numerics),
                _cross_attention(arch, numerics),
            ):
                for launch in source:
                    key = (launch.kernel, arch, numerics, launch.constants, launch.num_warps, launch.num_stages)
                    launches.setdefault(key, launch)
    return list(launches.values())

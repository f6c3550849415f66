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
    CROSS_ATTENTION_WORDS,
    REGIONS,
    WORDS,
    CrossAttentionConfig,
    FoldConfig,
    GradientConfig,
    LateInteractionConfig,
    PairwiseConfig,
    cross_attention_config,
    dot_precision,
    fold_config,
    gradient_config,
    late_interaction_config,
    padded_block,
    pairwise_config,
    stream_config,
)
from gssf_triton.autotune.keys import STREAM_KERNELS, Key
from gssf_triton.autotune.retrieval_configs import LARGEST_KERNEL_K, RetrievalConfig, retrieval_config
from gssf_triton.autotune.tables import Table, shipped
from gssf_triton.autotune.targets import ARCHITECTURES as ARCHITECTURES

#: What NVIDIA's tiles of fewer rows than the newest instruction takes are multiplied with.
SMALL_TILE_INSTRUCTION = "mma.sync"

#: (name, dtype, precision of its products).
NUMERICS = (
    ("bf16", torch.bfloat16, "ieee"),
    ("fp16", torch.float16, "ieee"),
    ("fp32", torch.float32, "ieee"),
    ("tf32", torch.float32, "tf32"),
)

#: The numerics the gate compiles: float64 has no tensor-core configuration to hold to anything.
COMPILED = tuple(name for name, _, _ in NUMERICS)

#: Block sizes that lead to different code: none, padded to a power of two, packed, one a chunk, split over chunks.
BLOCK_SIZES = (0, 24, 32, 64, 128, 256)
LARGEST_BLOCK = BLOCK_SIZES[-1]
#: It differs from the one above it by masks alone: one variant of it is enough.
MASKED_BLOCK = 24
#: Past this the tile loops run longer, in the same code; only the gradient kernel, which holds whole blocks, differs.
LARGEST_DISTINCT_TILE_BLOCK = 128

#: float16 and TF32 take the code of bfloat16 and float32 but for one instruction: of these the plain variants, one
#: block size a tile, stand for the rest.
BRIEF = ("fp16", "tf32")
BRIEF_BLOCK_SIZES = (32, 128, 256)
#: Compiled for this architecture alone, and held there for all: float16, which differs from bfloat16 by the
#: instruction's name (not so in the losses' kernel, whose operands are float16 for both, nor in the gradients', which
#: rounds float16's products alone), and, of fold and matched pairs, which hold one small tile, the block sizes beyond
#: `PLAIN_BLOCK_SIZES`.
FULL_ARCH = "sm_90"
PLAIN_BLOCK_SIZES = (0, 32, 128)
#: Exact float32 runs on FMA units, which `FULL_ARCH` has in common with this one; gradients and losses, whose tiles are
#: other ones, and the tables are compiled nonetheless.
SAME_UNITS = ("fp32", "sm_80")

#: Variants that do less than another in the same tile are held to the gate where blocks share a tile and where they
#: fill one; of gradients, beyond `FULL_ARCH`, the one that has no product.
LIGHTER_AT = (32, 256)

#: Rows on each side that lead to the configurations for small and for large S.
ROWS = (64, 8192)
CHANNELS = 1024


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
        short = {
            "BLOCK_M": "M",
            "BLOCK_N": "N",
            "CAPTIONS": "T",
            "WORDS": "L",
            "BLOCK_K": "K",
            "BLOCK_C": "C",
            "BLOCK_P": "P",
        }
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


def _block_sizes(numerics: str, largest: int = LARGEST_DISTINCT_TILE_BLOCK) -> list[int]:
    sizes = BRIEF_BLOCK_SIZES if numerics in BRIEF else BLOCK_SIZES
    return [B for B in sizes if largest >= B]


def _metric(B: int, diag: bool) -> dict[str, Any]:
    return {"B": B, "BLOCK_B": padded_block(B), "HAS_DIAG": diag, "HAS_BLOCKS": B > 0}


def _pairwise(arch: str, numerics: str) -> Iterator[Launch]:
    dtype, precision = _numerics(numerics)
    small, large = ROWS
    for B in _block_sizes(numerics):
        for label, rows, terms, normalize in (
            ("large", large, False, False),
            ("small", small, False, False),
            ("normalize", large, False, True),
            ("terms", large, True, True),
        ):
            if (terms and B == 0) or (numerics in BRIEF and normalize) or (B == MASKED_BLOCK and label != "large"):
                continue
            if normalize and B not in (0, LARGEST_DISTINCT_TILE_BLOCK):
                continue
            config = pairwise_config(rows, rows, CHANNELS, B, dtype, arch, terms=terms)
            flags = _metric(B, diag=B > 0 or normalize) | {
                "TERMS": terms, "NORMALIZE": normalize, "EVEN_D": padded_block(B) == B, "WIDE": False,
                "PRECISION": precision, "ACC": "fp32",
            }  # fmt: skip
            yield _make("pairwise", arch, numerics, f"B={B} {label}", config, flags, dots=True)


def _rowwise(kernel: str, arch: str, numerics: str) -> Iterator[Launch]:
    dtype, precision = _numerics(numerics)
    for B in _block_sizes(numerics):
        if arch != FULL_ARCH and B not in PLAIN_BLOCK_SIZES:
            continue
        config = fold_config(ROWS[1], CHANNELS, B, dtype, arch)
        flags = _metric(B, True) | {
            "NORMALIZE": True, "EVEN_D": padded_block(B) == B, "WIDE": False, "PRECISION": precision, "ACC": "fp32",
        }  # fmt: skip
        yield _make(kernel, arch, numerics, f"B={B} normalize", config, flags, dots=B > 0)


def _gradient(arch: str, numerics: str) -> Iterator[Launch]:
    dtype, precision = _numerics(numerics)
    for B in _block_sizes(numerics, LARGEST_BLOCK):
        config = gradient_config(B, dtype, arch, tf32=numerics != "fp32")
        variants = [("a and weights", True, True, True), ("fold", False, True, True), ("b", True, True, False)]
        if arch != FULL_ARCH:
            variants.pop()
        if config.rows_apart:
            variants = [("weights", False, False, True)]
        for label, product, rows, weights in variants[: 1 if numerics in BRIEF or B not in LIGHTER_AT else None]:
            flags = _metric(B, True) | {
                "PRODUCT": product, "ROWS": rows, "GRAD_DIAG": weights, "GRAD_BLOCKS": weights and B > 0,
                "WIDE": False, "PRECISION": precision, "ACC": "fp32",
                "EPILOGUE_PRECISION": dot_precision(torch.float32, arch, tf32=numerics != "fp32", whole_rows=True),
            }  # fmt: skip
            yield _make("gradient", arch, numerics, f"B={B} {label}", config, flags, dots=product or B > 0)


#: (epilogue, makes a slope, has a second similarity) of the streaming kernel, the heaviest variant of each.
STREAMED = (
    ("softmax_sums_both", False, False),
    ("softmax_slope_both", True, False),
    ("sigmoid", True, False),
    ("hinge_hardest", False, False),
    ("hinge_all", True, False),
    ("distillation", False, True),
    ("distillation_slope", True, True),
)
#: Of these another holds as much and does more: beyond `FULL_ARCH` that one stands for them.
LIGHTER_STREAMED = ("sigmoid", "distillation")


def _stream(arch: str, numerics: str) -> Iterator[Launch]:
    if numerics == "bf16":  # its operands are float16
        return
    dtype, _ = _numerics(numerics)
    for teacher in (False, True):
        yield from _streamed(arch, numerics, stream_config(dtype, arch, teacher=teacher), teacher)


def _streamed(arch: str, numerics: str, config: PairwiseConfig, with_teacher: bool) -> Iterator[Launch]:
    _, precision = _numerics(numerics)
    for epilogue, slope, teacher in STREAMED:
        brief = numerics == "tf32" and epilogue not in ("softmax_slope_both", "distillation_slope")
        if teacher != with_teacher or brief or (arch != FULL_ARCH and epilogue in LIGHTER_STREAMED):
            continue
        flags = {
            "EPILOGUE": epilogue, "COLUMNS": epilogue.endswith("both"), "SUMS": "_sums_" in epilogue, "TEACHER":
            teacher, "HAS_IDS": not teacher, "SLOPE": slope, "EVEN_D": True, "EVEN_E": True, "WIDE": False,
            "PRECISION": precision, "ACC": "fp32",
        }  # fmt: skip
        yield _make("stream", arch, numerics, epilogue, config, flags, dots=True)


def _retrieval(arch: str, numerics: str) -> Iterator[Launch]:
    dtype, precision = _numerics(numerics)
    yield from _ranked(arch, numerics, retrieval_config(dtype, arch, precision))


def _ranked(arch: str, numerics: str, config: RetrievalConfig) -> Iterator[Launch]:
    """The retrieval kernels with every exclusion there is; the metric is folded before."""
    _, precision = _numerics(numerics)
    common = {
        "HAS_SCALE": True, "HAS_EXCLUDE": True, "HAS_MASK": True, "EVEN_D": True, "WIDE": False,
        "PRECISION": precision, "ACC": "fp32",
    }  # fmt: skip
    for K in (LARGEST_KERNEL_K,) if numerics in BRIEF else (16, LARGEST_KERNEL_K):
        flags = common | {"K": K, "HAS_IDS": False, "HAS_CAMS": False}
        yield _make("topk", arch, numerics, f"k={K}", config, flags, dots=True)
    for label, count in (("best", False), ("count", True))[: 1 if numerics in BRIEF else None]:
        flags = common | {"COUNT": count, "HAS_IDS": True, "HAS_CAMS": True}
        yield _make("rank", arch, numerics, label, config, flags, dots=True)


def _late_interaction(arch: str, numerics: str) -> Iterator[Launch]:
    dtype, _ = _numerics(numerics)
    yield from _pooled(arch, numerics, late_interaction_config(REGIONS, WORDS, CHANNELS, dtype, arch))


def _pooled(arch: str, numerics: str, config: LateInteractionConfig) -> Iterator[Launch]:
    dtype, precision = _numerics(numerics)
    for label, mode, smooth in (("scores max", 0, False), ("weights lse", 2, True))[: 1 if numerics in BRIEF else None]:
        flags = {
            "IMAGES": config.images(REGIONS), "MODE": mode, "SMOOTH": smooth,
            "TWO_PARTS": mode == 2 and dtype != torch.float32, "HAS_REGION_MASK": True, "SCALE_REGIONS": False,
            "SCALE_WORDS": True, "EVEN_D": True, "WIDE": False, "PRECISION": precision, "ACC": "fp32",
        }  # fmt: skip
        yield _make("late_interaction", arch, numerics, label, config, flags, dots=True)


#: (regions, words) of the widest tile and of the common one.
CROSS_ATTENTIONS = (("64 words", REGIONS, CROSS_ATTENTION_WORDS), ("32 words", REGIONS, WORDS))


def _cross_attention(arch: str, numerics: str) -> Iterator[Launch]:
    dtype, _ = _numerics(numerics)
    for label, R, L in CROSS_ATTENTIONS[: 1 if numerics in BRIEF else None]:
        yield _attended(arch, numerics, label, cross_attention_config(R, L, dtype, arch))


def _attended(arch: str, numerics: str, label: str, config: CrossAttentionConfig) -> Launch:
    _, precision = _numerics(numerics)
    flags = {
        "HAS_REGION_MASK": True, "EVEN_D": True, "WIDE": False, "PRECISION": precision, "ACC": "fp32",
        "GRAM_PRECISION": dot_precision(torch.float32, arch, tf32=numerics == "tf32", whole_rows=True),
    }  # fmt: skip
    return _make("cross_attention", arch, numerics, label, config, flags, dots=True)


def _from_entry(key: Key, config: Any, arch: str) -> Iterator[Launch]:
    """The launches that a table's entry leads to, with loads that need no mask: the common case."""
    if key.dtype not in COMPILED:
        return
    _, precision = _numerics(key.dtype)
    variant = f"B={key.B} table"
    common = {"WIDE": False, "PRECISION": precision, "ACC": "fp32"}
    even = {"EVEN_D": padded_block(key.B) == key.B and key.D % getattr(config, "BLOCK_K", 1) == 0}
    if key.kernel in STREAM_KERNELS:
        yield from _streamed(arch, key.dtype, config, key.kernel == "stream_teacher")
    elif isinstance(config, RetrievalConfig):
        yield from _ranked(arch, key.dtype, config)
    elif isinstance(config, LateInteractionConfig):
        yield from _pooled(arch, key.dtype, config)
    elif isinstance(config, CrossAttentionConfig):
        yield _attended(arch, key.dtype, "table", config)
    elif isinstance(config, PairwiseConfig):
        diag = key.kernel != "product" and (key.B > 0 or key.kernel == "pairwise")
        flags = _metric(key.B, diag) | common | even | {"TERMS": key.kernel == "terms", "NORMALIZE": False}
        yield _make("pairwise", arch, key.dtype, variant, config, flags, dots=True)
    elif isinstance(config, FoldConfig):
        flags = _metric(key.B, True) | common | even | {"NORMALIZE": True}
        yield _make(key.kernel, arch, key.dtype, variant, config, flags, dots=key.B > 0)
    elif isinstance(config, GradientConfig):
        tf32 = key.dtype != "fp32"
        rows = not config.rows_apart
        product = key.N > 0 and rows
        flags = _metric(key.B, True) | common | {
            "PRODUCT": product, "ROWS": rows, "GRAD_DIAG": True, "GRAD_BLOCKS": key.B > 0,
            "EPILOGUE_PRECISION": dot_precision(torch.float32, arch, tf32=tf32, whole_rows=True),
        }  # fmt: skip
        yield _make("gradient", arch, key.dtype, variant, config, flags, dots=product or key.B > 0)


def table_launches(table: Table) -> list[Launch]:
    """Every distinct launch of a table's configurations; none for targets the gate does not compile for."""
    if table.arch not in ARCHITECTURES:
        return []
    return _distinct(
        launch for key, entry in table.entries.items() for launch in _from_entry(key, entry.config, table.arch)
    )


def _distinct(launches: Iterable[Launch]) -> list[Launch]:
    """The first of those that the compiler cannot tell apart."""
    found: dict[tuple[Any, ...], Launch] = {}
    for launch in launches:
        # The order of tiles is an address computation: it changes neither registers nor shared memory.
        constants = tuple((name, value) for name, value in launch.constants if name != "GROUP_M")
        key = (launch.kernel, launch.arch, launch.numerics, constants, launch.num_warps, launch.num_stages)
        found.setdefault(key, launch)
    return list(found.values())


def all_launches(architectures: Iterable[str] = tuple(ARCHITECTURES)) -> list[Launch]:
    """Every distinct launch for these architectures, in a fixed order: the model's, and the shipped tables'."""

    def launches() -> Iterator[Launch]:
        for arch in architectures:
            for numerics, _, _ in NUMERICS:
                yield from _stream(arch, numerics)
                yield from _gradient(arch, numerics)
                if (numerics, arch) == SAME_UNITS or (numerics == "fp16" and arch != FULL_ARCH):
                    continue
                yield from _pairwise(arch, numerics)
                yield from _rowwise("fold", arch, numerics)
                yield from _rowwise("paired", arch, numerics)
                yield from _retrieval(arch, numerics)
                yield from _late_interaction(arch, numerics)
                yield from _cross_attention(arch, numerics)
        for table in shipped():
            if table.arch in architectures:
                yield from table_launches(table)

    return _distinct(launches())

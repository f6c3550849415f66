"""Shapes to tune: the sets that ship, and how users write their own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gssf_triton.autotune.space import NUMERICS, PAIR_KERNELS, STREAM_KERNELS, Key, make_key
from gssf_triton.kernels.configs import REGIONS, WORDS, cross_attention_fits
from gssf_triton.kernels.retrieval_configs import RANKED_ROWS
from gssf_triton.storage import read_text


@dataclass(frozen=True)
class Shape:
    """S (M, N) over D channels in blocks of B (0: the diagonal alone)."""

    M: int
    N: int
    D: int
    B: int
    dtype: str


_ROWS = ((512, 512), (2048, 2048), (8192, 8192), (32768, 32768), (64, 10**6))

#: Name → shapes. "full" is what the tables that ship cover.
SETS: dict[str, tuple[Shape, ...]] = {
    "quick": (Shape(2048, 2048, 512, 32, "bf16"), Shape(2048, 2048, 512, 32, "fp32")),
    "full": tuple(
        Shape(M, N, D, B, dtype)
        for dtype in ("bf16", "fp32")
        for D in (256, 512, 1024)
        for B in (16, 32, 64, 128)
        for M, N in _ROWS
    ),
    "cpu": tuple(Shape(n, n, D, 0, "fp32") for D in (256, 1024) for n in (2048, 8192, 32768)),
}

#: What each shape is tuned for on a GPU, unless kernels are named.
GPU_KERNELS = (
    "pairwise", "product", "fold", "gradient", "plan", "gradient_plan", *STREAM_KERNELS, "ranked", *PAIR_KERNELS,
)  # fmt: skip
CPU_KERNELS = ("chunk",)


def calls_of(shape: Shape, kernels: Iterable[str]) -> Iterator[tuple[str, int, int, int]]:
    """(kernel, M, N, B) of what a call of this shape, and its backward pass, launch.

    For the kernels of region–word scores M × N are an image's regions × a caption's words; where they are too many for
    a pair, pairs of the usual size are taken.
    """
    M, N, B = shape.M, shape.N, shape.B
    fewer, more = sorted((M, N))
    for kernel in kernels:
        if kernel in ("product", "chunk", *STREAM_KERNELS):
            yield kernel, M, N, 0
        elif kernel == "ranked":
            yield kernel, *RANKED_ROWS, 0
        elif kernel in PAIR_KERNELS:
            yield kernel, *((M, N) if cross_attention_fits(M, N) else (REGIONS, WORDS)), 0
        elif kernel in ("fold", "paired"):
            yield kernel, fewer, 0, B
        elif kernel in ("gradient", "gradient_plan"):
            # The folded side's gradient, and the other side's.
            yield kernel, fewer, more, B
            yield kernel, more, fewer, B
            if kernel == "gradient":  # what is left of them where the library multiplies
                yield kernel, fewer, 0, B
                yield kernel, more, 0, B
        elif kernel != "terms" or B:
            yield kernel, M, N, B


def numerics_in(kernel: str, numerics: str, *, on_cpu: bool = False) -> str:
    """What a kernel multiplies features of these numerics in.

    The losses' slopes need more bits than bfloat16 has; what the torch backend streams on a CPU was folded in float32.
    """
    if kernel == "chunk" and on_cpu and numerics in ("bf16", "fp16"):
        return "fp32"
    return "fp16" if kernel in ("chunk", *STREAM_KERNELS) and numerics == "bf16" else numerics


def keys_for(shapes: Iterable[Shape], kernels: Iterable[str], *, on_cpu: bool = False) -> list[Key]:
    """The keys of several shapes, each once, in order."""
    kernels = tuple(kernels)
    return sorted(
        {
            make_key(kernel, numerics_in(kernel, shape.dtype, on_cpu=on_cpu), M, N, shape.D, B)
            for shape in shapes
            for kernel, M, N, B in calls_of(shape, kernels)
        }
    )


def parse_shape(text: str, dtypes: Sequence[str]) -> list[Shape]:
    """The shapes of "MxNxDxB", one a dtype; B may be left out, for the diagonal alone.

    Raises:
        ValueError: text of another form, or sizes that do not go together.

    Example:
        >>> from gssf_triton.autotune.shapes import parse_shape
        >>> parse_shape("64x1000x256x32", ["bf16"])
        [Shape(M=64, N=1000, D=256, B=32, dtype='bf16')]
    """
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?:x(\d+))?", text.strip().lower())
    if not found:
        raise ValueError(f"a shape must be MxNxD or MxNxDxB, such as 8192x8192x1024x32, got {text!r}")
    M, N, D, B = (int(part or 0) for part in found.groups())
    return [check_shape({"M": M, "N": N, "D": D, "B": B, "dtype": dtype}) for dtype in dtypes]


def check_shape(fields: object) -> Shape:
    """The shape that an object of a JSON file describes.

    Raises:
        ValueError: a field that is missing, unknown, of another type or out of range.
    """
    if not isinstance(fields, dict) or sorted(fields) != ["B", "D", "M", "N", "dtype"]:
        raise ValueError(f"a shape must be an object with M, N, D, B and dtype, got {fields!r}")
    for name, least in (("M", 1), ("N", 1), ("D", 1), ("B", 0)):
        if type(fields[name]) is not int or fields[name] < least:
            raise ValueError(f"{name} of a shape must be a whole number from {least} up, got {fields[name]!r}")
    if fields["dtype"] not in NUMERICS:
        raise ValueError(f"dtype of a shape must be one of {', '.join(NUMERICS)}, got {fields['dtype']!r}")
    if fields["B"] and fields["D"] % fields["B"]:
        raise ValueError(f"B of a shape must divide D, got D = {fields['D']}, B = {fields['B']}")
    return Shape(**fields)


def read_shapes(path: Path) -> list[Shape]:
    """The shapes of a JSON file, a list of objects with M, N, D, B and dtype.

    Raises:
        ValueError: a file of another form.
        OSError: a file that cannot be read.
    """
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as fault:
        raise ValueError(f"{path} is no JSON: {fault}") from None
    if not isinstance(data, list) or not data:
        raise ValueError(f"{path} must hold a list of shapes")
    try:
        return [check_shape(fields) for fields in data]
    except ValueError as fault:
        raise ValueError(f"{path}: {fault}") from None

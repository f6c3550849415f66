"""The public calls that the compile gate and the rehearsal make, at the sizes that users have.

The list is the gate's promise: what these calls launch is compiled for every architecture and checked by its rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import gssf_triton
from gssf_triton.autotune.rehearsal import Record, Tape
from gssf_triton.kernels.choice import force_plan
from gssf_triton.kernels.toolchain import is_sound

#: Numerics → (dtype of the features, torch's setting for float32 products).
NUMERICS = {
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
    "fp32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
}

#: Pairs of a large batch, and of one whose chunks of S are ragged.
PAIRS, RAGGED_PAIRS = 32_768, 5_003
#: Channels, and a number of them that 24 divides.
CHANNELS, CHANNELS_24 = 1024, 960
#: Block sizes with different code: only the diagonal, several blocks a tile, blocks padded to a power of two, the
#: default, one block a tile, blocks split over tiles. 256 differs from 128 in the gradient kernel only.
BLOCK_SIZES = (0, 16, 24, 32, 64, 128, 256)
#: Those that every architecture compiles.
MAIN_BLOCK_SIZES = (0, 32, 128)
#: The architecture that compiles every variant. The others compile those with the most registers.
FULL_ARCH = "sm_90"

#: Tensors that require gradients: name → (shape, whether it is a weight). Weights stay float32.
Leaves = dict[str, tuple[tuple[int, ...], bool]]
#: Other tensors: name → (shape, dtype).
Fixed = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class PublicCall:
    """A public function on inputs of a size.

    Attributes:
        name: What is called, and how.
        run: The call.
        leaves: The features and weights.
        fixed: Other arguments.
        backward: Whether a backward pass follows.
        plan: The plan to force; None for the one that a user gets.
    """

    name: str
    run: Callable[..., Any]
    leaves: Leaves
    fixed: Fixed = field(default_factory=dict)
    backward: bool = True
    plan: str | None = None

    def rehearse(self, tape: Tape, numerics: str) -> tuple[Record, Record]:
        """The records of the forward and the backward pass on the stub."""
        dtype, setting = NUMERICS[numerics]
        leaves = {
            name: torch.empty(shape, device="cuda", dtype=torch.float32 if weight else dtype).requires_grad_(
                self.backward
            )
            for name, (shape, weight) in self.leaves.items()
        }
        fixed = {name: torch.empty(shape, device="cuda", dtype=kind) for name, (shape, kind) in self.fixed.items()}
        tape.cut()
        with _setting(setting, self.plan):
            out = self.run(**leaves, **fixed)
            forward = tape.cut()
            if self.backward:
                upstream = torch.empty_like(out)
                tape.cut()
                torch.autograd.grad(out, list(leaves.values()), upstream)
        return forward, tape.cut()

    def on_the_host(self, numerics: str) -> tuple[Callable[[], Any], Callable[[], Any] | None]:
        """Both passes as functions without arguments, on random CPU tensors, for timing."""
        dtype, setting = NUMERICS[numerics]
        leaves = {
            name: torch.randn(shape).to(torch.float32 if weight else dtype).requires_grad_(self.backward)
            for name, (shape, weight) in self.leaves.items()
        }
        fixed = {
            name: torch.randn(shape).to(kind) if kind.is_floating_point else torch.ones(shape, dtype=kind)
            for name, (shape, kind) in self.fixed.items()
        }

        def forward() -> Any:
            with _setting(setting, self.plan):
                return self.run(**leaves, **fixed, backend="triton")

        if not self.backward:
            return forward, None
        # No kernel runs, so indices that it would have written are undefined. Zeros are valid ones.
        with mock.patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros):
            out = forward()
        upstream = torch.ones_like(out)
        return forward, lambda: torch.autograd.grad(out, list(leaves.values()), upstream, retain_graph=True)

    def least_bytes(self, numerics: str) -> int:
        """Bytes of the features and weights, and of their gradients: the least that any implementation moves."""
        size = NUMERICS[numerics][0].itemsize
        inputs = sum(prod(shape) * (4 if weight else size) for shape, weight in self.leaves.values())
        return inputs * (2 if self.backward else 1)


def with_rows(call: PublicCall, rows: int) -> PublicCall:
    """The same call on at most `rows` rows, regions and words, with the plan of its original size."""

    def fewer(shape: tuple[int, ...], keep: int) -> tuple[int, ...]:
        return tuple(min(n, rows) for n in shape[: len(shape) - keep]) + shape[len(shape) - keep :]

    leaves = {name: (shape if weight else fewer(shape, 1), weight) for name, (shape, weight) in call.leaves.items()}
    fixed = {
        name: (fewer(shape, 1 if kind.is_floating_point else 0), kind) for name, (shape, kind) in call.fixed.items()
    }
    most = max(shape[0] for shape, weight in call.leaves.values() if not weight)
    plan = call.plan or ("fold_product" if most > 512 else "one_pass")
    return replace(call, leaves=leaves, fixed=fixed, plan=plan)


@contextmanager
def float32_precision(setting: str) -> Iterator[None]:
    """`torch.set_float32_matmul_precision` for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _setting(precision: str, plan: str | None) -> Iterator[None]:
    with float32_precision(precision), force_plan(plan) if plan else nullcontext():
        yield


def _bound(function: Callable[..., Any], **options: Any) -> Callable[..., Tensor]:
    def run(**tensors: Any) -> Tensor:
        out: Any = function(**tensors, **options)
        return torch.stack(out) if isinstance(out, tuple) and out[0].is_floating_point() else out

    return run


def channels(B: int) -> int:
    return CHANNELS_24 if B == 24 else CHANNELS


def weights(B: int, D: int | None = None) -> Leaves:
    """Both weights, or the diagonal alone if B is 0."""
    D = D or channels(B)
    blocks: Leaves = {"W_blocks": ((D // B, B, B), True)} if B else {}
    return {"W_diag": ((D,), True), **blocks}


def two_sides(M: int, N: int, D: int, names: tuple[str, str] = ("a", "b")) -> Leaves:
    return {names[0]: ((M, D), False), names[1]: ((N, D), False)}


def pairwise(
    M: int, N: int, B: int, *, plan: str | None = None, normalize: bool = True, out_dtype: torch.dtype | None = None
) -> PublicCall:
    """`pairwise_sim` of (M, D) and (N, D), both passes."""
    how = (f", {plan}" if plan else "") + (f", to {out_dtype}" if out_dtype else "")
    return PublicCall(
        f"pairwise_sim {M}×{N} B={B}{', normalize' if normalize else ''}{how}",
        _bound(gssf_triton.pairwise_sim, normalize=normalize, out_dtype=out_dtype),
        two_sides(M, N, channels(B)) | weights(B),
        plan=plan,
    )


def loss(function: str, pairs: int, *, ids: bool = False, D: int = CHANNELS, B: int = 32, **options: Any) -> PublicCall:
    """A loss over `pairs` pairs, both passes."""
    scales = {"info_nce": 20.0, "distillation_loss": 20.0, "sigmoid_loss": 10.0}
    if function in scales:
        options["logit_scale"] = scales[function]
    if function == "sigmoid_loss":
        options["logit_bias"] = -10.0
    fixed: Fixed = {"ids": ((pairs,), torch.int64)} if ids else {}
    words = "".join(f", {k}={v}" for k, v in options.items() if k not in ("logit_scale", "logit_bias"))
    return PublicCall(
        f"{function} {pairs:,} pairs{', ids' if ids else ''}{words}",
        _bound(getattr(gssf_triton, function), normalize=True, **options),
        two_sides(pairs, pairs, D) | weights(B, D),
        fixed,
    )


def distillation(pairs: int, numerics: str, D: int = CHANNELS) -> PublicCall:
    dtype = NUMERICS[numerics][0]
    base = loss("distillation_loss", pairs, D=D)
    teacher: Fixed = {"teacher_a": ((pairs, D // 2), dtype), "teacher_b": ((pairs, D // 2), dtype)}
    return PublicCall(base.name, base.run, base.leaves, teacher)


def search(Q: int, N: int, k: int, D: int = 512, *, B: int = 32, mask: bool = False) -> PublicCall:
    """`topk` of Q queries in N items, with `mask` every exclusion there is."""
    fixed: Fixed = {}
    if mask:
        fixed = {"exclude": ((Q,), torch.int64), "mask": ((Q, N), torch.bool)}

    def run(*, gallery: Tensor, **tensors: Any) -> Tensor:
        return gssf_triton.topk(gallery=gallery, **tensors, k=min(k, gallery.shape[0]), normalize=True)[0]

    return PublicCall(
        f"topk {Q:,}×{N:,} k={k}{', exclusions' if mask else ''}",
        run,
        two_sides(Q, N, D, ("queries", "gallery")) | weights(B, D),
        fixed,
        backward=False,
    )


def ranking(Q: int, N: int, D: int = 512, *, cameras: bool = False) -> PublicCall:
    labels: Fixed = {"query_ids": ((Q,), torch.int64), "gallery_ids": ((N,), torch.int64)}
    if cameras:
        labels |= {"query_cams": ((Q,), torch.int64), "gallery_cams": ((N,), torch.int64)}
    return PublicCall(
        f"ranks {Q:,}×{N:,}{', cameras' if cameras else ''}",
        _bound(gssf_triton.ranks, normalize=True),
        two_sides(Q, N, D, ("queries", "gallery")) | weights(32, D),
        labels,
        backward=False,
    )


def region_words(
    function: str, images: int, captions: int, R: int, L: int, D: int = CHANNELS, *, mask: bool = True, **options: Any
) -> PublicCall:
    """Region–word scores of images of R regions and captions of L words, both passes."""
    masks: Fixed = {"region_mask": ((images, R), torch.bool), "word_mask": ((captions, L), torch.bool)} if mask else {}
    if function == "late_interaction":
        options["normalize"] = True
    how = f", {options['pooling']}" if "pooling" in options else ""
    return PublicCall(
        f"{function} {images:,}×{captions:,}, {R} regions, {L} words{how}",
        _bound(getattr(gssf_triton, function), **options),
        {"regions": ((images, R, D), False), "words": ((captions, L, D), False)} | weights(32, D),
        masks,
    )


def headline(numerics: str = "bf16") -> list[PublicCall]:
    """The calls that the rehearsal's table shows: real sizes, a line each."""
    return [
        pairwise(8192, 8192, 32),
        pairwise(512, 512, 32),
        pairwise(64, 1_000_000, 32),
        PublicCall(
            "paired_sim 32,768", _bound(gssf_triton.paired_sim), two_sides(PAIRS, PAIRS, CHANNELS) | weights(32)
        ),
        PublicCall("transform 32,768", _bound(gssf_triton.transform), {"x": ((PAIRS, CHANNELS), False)} | weights(32)),
        loss("info_nce", 256),
        loss("info_nce", PAIRS),
        loss("info_nce", PAIRS, memory="fast"),
        loss("sigmoid_loss", PAIRS),
        loss("triplet_loss", PAIRS),
        loss("triplet_loss", PAIRS, hardest=False),
        distillation(PAIRS, numerics),
        search(1024, 1_000_000, 10),
        ranking(1024, 1_000_000),
        region_words("late_interaction", 1000, 5000, 36, 32, mask=False),
        region_words("cross_attention_sim", 1000, 5000, 36, 32, mask=False),
    ]


def gated(arch: str, numerics: str) -> Iterator[PublicCall]:
    """The calls whose launches the gate compiles for an architecture.

    Every variant is compiled for `FULL_ARCH` in bfloat16. float16 differs from it in an instruction's name only; the
    losses use float16 operands for both. TF32 differs from exact float32 in its products only, so other architectures
    compile just the calls with the most of them.
    """
    full = arch == FULL_ARCH
    main = full and numerics == "bf16"
    plain = numerics in ("bf16", "fp32")
    # ------------------------------------------------------------------------------------------- similarities
    for B in BLOCK_SIZES if main else MAIN_BLOCK_SIZES:
        if plain or full or numerics == "tf32":
            yield pairwise(8192, 8192, B)
        if plain or full:
            yield pairwise(512, 512, B, plan="one_pass", normalize=numerics != "fp16")
        if main:
            yield pairwise(64, 64, B, normalize=False)
    if plain:
        yield pairwise(1301, 1000, 32, plan="one_pass", normalize=False)
        other = torch.bfloat16 if NUMERICS[numerics][0] == torch.float32 else torch.float32
        yield pairwise(8192, 8192, 32, plan="fold_product", out_dtype=other)
        for B in (32, 128):
            yield PublicCall(
                f"pairwise_terms 8192×8192 B={B}", _bound(gssf_triton.pairwise_terms, normalize=True),
                two_sides(8192, 8192, CHANNELS) | weights(B), backward=main,
            )  # fmt: skip
            yield PublicCall(
                f"paired_sim B={B}", _bound(gssf_triton.paired_sim, normalize=True),
                two_sides(PAIRS, PAIRS, CHANNELS) | weights(B), backward=False,
            )  # fmt: skip
    # ------------------------------------------------------------------------------------------------- losses
    if main or numerics != "bf16":
        yield loss("info_nce", PAIRS, ids=True, label_smoothing=0.1)
        yield loss("triplet_loss", PAIRS, ids=True)
        yield loss("triplet_loss", PAIRS, hardest=False)
        yield loss("sigmoid_loss", PAIRS)
        yield distillation(PAIRS, numerics)
        yield loss("info_nce", PAIRS, ids=True, label_smoothing=0.1, memory="fast")
    if main:
        yield loss("info_nce", PAIRS, memory="fast")
        yield loss("info_nce", PAIRS)
        yield loss("info_nce", RAGGED_PAIRS)
        yield loss("info_nce", PAIRS, symmetric=False)
        yield loss("sigmoid_loss", PAIRS, ids=True)
    # -------------------------------------------------------------------------- retrieval, regions and words
    if plain or (full and numerics == "tf32"):
        yield search(1024, 1_000_000, 64, mask=True)
        yield ranking(1024, 1_000_000, cameras=True)
        yield region_words("late_interaction", 100, 500, 36, 32)
        yield region_words("late_interaction", 100, 500, 36, 32, pooling="lse-mean")
    if main:
        yield search(1024, 1_000_000, 10)
        yield region_words("late_interaction", 16, 64, 1024, 32, 128, mask=False, pooling="max-sum")
        # More pairs than a grid has programs.
        yield replace(region_words("late_interaction", 31_783, 158_915, 36, 32, 64, mask=False), backward=False)
    # Elsewhere this call consists of very many torch operations: nothing to compile.
    if is_sound(arch) and (plain or (full and numerics == "tf32")):
        yield region_words("cross_attention_sim", 100, 500, 36, 32)
        if main:
            yield region_words("cross_attention_sim", 100, 500, 36, 64)
            yield replace(region_words("cross_attention_sim", 31_783, 158_915, 36, 32, 64, mask=False), backward=False)

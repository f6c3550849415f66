"""The public calls that the compile gate and the rehearsal make, at the sizes that users have.

The list is the gate's promise: what these calls launch is compiled for every architecture and held to its rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import gssf_triton
from gssf_triton.autotune.rehearsal import Record, Tape
from gssf_triton.kernels.plans import force_plan
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
#: Channels, and those that blocks of 24 divide.
CHANNELS, CHANNELS_24 = 1024, 960
#: Block sizes that lead to different code: the diagonal alone, a tile of several blocks, one padded to a power of two,
#: the default, one a tile, split over tiles. The last differs from the one before in the gradient kernel alone.
BLOCK_SIZES = (0, 16, 24, 32, 64, 128, 256)
#: Those that every architecture compiles.
MAIN_BLOCK_SIZES = (0, 32, 128)
#: The architecture that compiles every variant; the others compile those that use most registers.
FULL_ARCH = "sm_90"


@dataclass(frozen=True)
class PublicCall:
    """A public function on inputs of a size.

    Attributes:
        name: What is called, and how.
        run: The call.
        leaves: Tensors that want gradients: name → (shape, whether it is a weight, which stays float32).
        fixed: Other arguments, made on the device: name → (shape, dtype).
        backward: Whether a backward pass follows.
        plan: The plan to force; None for the one that a user gets.
    """

    name: str
    run: Callable[..., Any]
    leaves: Mapping[str, tuple[tuple[int, ...], bool]]
    fixed: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    backward: bool = True
    plan: str | None = None

    def rehearse(self, tape: Tape, numerics: str) -> tuple[Record, Record]:
        """What the forward and the backward pass ask for, on the stub."""
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
        """The passes as functions of nothing, on CPU tensors of random numbers, for whoever times them."""
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
        # Nothing is launched, so what a kernel would have written are indices of no row; zeros are some.
        with mock.patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros):
            out = forward()
        upstream = torch.ones_like(out)
        return forward, lambda: torch.autograd.grad(out, list(leaves.values()), upstream, retain_graph=True)

    def least_bytes(self, numerics: str) -> int:
        """Bytes of the features and weights, and of their gradients: what any way to compute the call moves."""
        size = NUMERICS[numerics][0].itemsize
        inputs = sum(_count(shape) * (4 if weight else size) for shape, weight in self.leaves.values())
        return inputs * (2 if self.backward else 1)


def rows_of(call: PublicCall) -> int:
    """The most rows of a side."""
    return max(shape[0] for shape, weight in call.leaves.values() if not weight)


def with_rows(call: PublicCall, rows: int) -> PublicCall:
    """The same call on at most `rows` rows, regions and words, by the plan that its own size has."""

    def fewer(shape: tuple[int, ...], keep: int) -> tuple[int, ...]:
        return tuple(min(n, rows) for n in shape[: len(shape) - keep]) + shape[len(shape) - keep :]

    leaves = {name: (shape if weight else fewer(shape, 1), weight) for name, (shape, weight) in call.leaves.items()}
    fixed = {
        name: (fewer(shape, 1 if kind.is_floating_point else 0), kind) for name, (shape, kind) in call.fixed.items()
    }
    plan = call.plan or ("fold_product" if rows_of(call) > 512 else "one_pass")
    return replace(call, leaves=leaves, fixed=fixed, plan=plan)


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


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


def _fixed(function: Callable[..., Any], **options: Any) -> Callable[..., Tensor]:
    def run(**tensors: Any) -> Tensor:
        out: Any = function(**tensors, **options)
        return torch.stack(out) if isinstance(out, tuple) and out[0].is_floating_point() else out

    return run


def channels(B: int) -> int:
    return CHANNELS_24 if B == 24 else CHANNELS


def metric(B: int, diag: bool = True, D: int | None = None) -> dict[str, tuple[tuple[int, ...], bool]]:
    """The weights as leaves."""
    D = D or channels(B)
    weights: dict[str, tuple[tuple[int, ...], bool]] = {"W_diag": ((D,), True)} if diag or not B else {}
    return weights | ({"W_blocks": ((D // B, B, B), True)} if B else {})


def two_sides(M: int, N: int, D: int, names: tuple[str, str] = ("a", "b")) -> dict[str, tuple[tuple[int, ...], bool]]:
    return {names[0]: ((M, D), False), names[1]: ((N, D), False)}


def pairwise(M: int, N: int, B: int, *, plan: str | None = None, normalize: bool = True) -> PublicCall:
    """`pairwise_sim` of (M, D) and (N, D), both passes."""
    how = f", {plan}" if plan else ""
    return PublicCall(
        f"pairwise_sim {M}×{N} B={B}{', normalize' if normalize else ''}{how}",
        _fixed(gssf_triton.pairwise_sim, normalize=normalize),
        two_sides(M, N, channels(B)) | metric(B),
        plan=plan,
    )


def loss(function: str, pairs: int, *, ids: bool = False, D: int = CHANNELS, B: int = 32, **options: Any) -> PublicCall:
    """A loss over `pairs` pairs, both passes."""
    scales = {"info_nce": 20.0, "distillation_loss": 20.0, "sigmoid_loss": 10.0}
    if function in scales:
        options["logit_scale"] = scales[function]
    if function == "sigmoid_loss":
        options["logit_bias"] = -10.0
    fixed: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"ids": ((pairs,), torch.int64)} if ids else {}
    words = "".join(f", {k}={v}" for k, v in options.items() if k not in ("logit_scale", "logit_bias"))
    return PublicCall(
        f"{function} {pairs:,} pairs{', ids' if ids else ''}{words}",
        _fixed(getattr(gssf_triton, function), normalize=True, **options),
        two_sides(pairs, pairs, D) | metric(B, D=D),
        fixed,
    )


def distillation(pairs: int, numerics: str, D: int = CHANNELS) -> PublicCall:
    dtype = NUMERICS[numerics][0]
    base = loss("distillation_loss", pairs, D=D)
    teacher = {"teacher_a": ((pairs, D // 2), dtype), "teacher_b": ((pairs, D // 2), dtype)}
    return PublicCall(base.name, base.run, base.leaves, teacher)


def search(Q: int, N: int, k: int, D: int = 512, *, B: int = 32, mask: bool = False) -> PublicCall:
    """`topk` of Q queries in N items, with `mask` every exclusion there is."""
    fixed: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if mask:
        fixed = {"exclude": ((Q,), torch.int64), "mask": ((Q, N), torch.bool)}

    def run(*, gallery: Tensor, **tensors: Any) -> Tensor:
        return gssf_triton.topk(gallery=gallery, **tensors, k=min(k, gallery.shape[0]), normalize=True)[0]

    return PublicCall(
        f"topk {Q:,}×{N:,} k={k}{', exclusions' if mask else ''}",
        run,
        two_sides(Q, N, D, ("queries", "gallery")) | metric(B, D=D),
        fixed,
        backward=False,
    )


def ranking(Q: int, N: int, D: int = 512, *, cameras: bool = False) -> PublicCall:
    labels = {"query_ids": ((Q,), torch.int64), "gallery_ids": ((N,), torch.int64)}
    if cameras:
        labels |= {"query_cams": ((Q,), torch.int64), "gallery_cams": ((N,), torch.int64)}
    return PublicCall(
        f"ranks {Q:,}×{N:,}{', cameras' if cameras else ''}",
        _fixed(gssf_triton.ranks, normalize=True),
        two_sides(Q, N, D, ("queries", "gallery")) | metric(32, D=D),
        labels,
        backward=False,
    )


def region_words(
    function: str, images: int, captions: int, R: int, L: int, D: int = CHANNELS, *, mask: bool = True, **options: Any
) -> PublicCall:
    """Region–word scores of images of R regions and captions of L words, both passes."""
    masks = {"region_mask": ((images, R), torch.bool), "word_mask": ((captions, L), torch.bool)} if mask else {}
    if function == "late_interaction":
        options["normalize"] = True
    how = f", {options['pooling']}" if "pooling" in options else ""
    return PublicCall(
        f"{function} {images:,}×{captions:,}, {R} regions, {L} words{how}",
        _fixed(getattr(gssf_triton, function), **options),
        {"regions": ((images, R, D), False), "words": ((captions, L, D), False)} | metric(32, D=D),
        masks,
    )


def headline(numerics: str = "bf16") -> list[PublicCall]:
    """The calls that the rehearsal's table shows: real sizes, a line each."""
    return [
        pairwise(8192, 8192, 32),
        pairwise(512, 512, 32),
        pairwise(64, 1_000_000, 32),
        PublicCall("paired_sim 32,768", _fixed(gssf_triton.paired_sim), two_sides(PAIRS, PAIRS, CHANNELS) | metric(32)),
        PublicCall("transform 32,768", _fixed(gssf_triton.transform), {"x": ((PAIRS, CHANNELS), False)} | metric(32)),
        loss("info_nce", 256),
        loss("info_nce", PAIRS),
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
    """The calls whose launches the gate compiles for an architecture, the stated list.

    Every variant is compiled for `FULL_ARCH` in bfloat16. float16 differs from it by an instruction's name, but for the
    losses, whose operands are float16 for both; TF32 from exact float32 by the products, compiled beyond `FULL_ARCH`
    where there are most of them.
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
        yield pairwise(8192, 8192, 32, plan="fold_own_product")
        for B in (32, 128):
            yield PublicCall(
                f"pairwise_terms 8192×8192 B={B}", _fixed(gssf_triton.pairwise_terms, normalize=True),
                two_sides(8192, 8192, CHANNELS) | metric(B), backward=main,
            )  # fmt: skip
            yield PublicCall(
                f"paired_sim B={B}", _fixed(gssf_triton.paired_sim, normalize=True),
                two_sides(PAIRS, PAIRS, CHANNELS) | metric(B), backward=False,
            )  # fmt: skip
    # ------------------------------------------------------------------------------------------------- losses
    if main or numerics != "bf16":
        yield loss("info_nce", PAIRS, ids=True, label_smoothing=0.1)
        yield loss("triplet_loss", PAIRS, ids=True)
        yield loss("triplet_loss", PAIRS, hardest=False)
        yield loss("sigmoid_loss", PAIRS)
        yield distillation(PAIRS, numerics)
    if main:
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
    # Elsewhere this one is torch's own operations: nothing to compile, and a great many of them.
    if is_sound(arch) and (plain or (full and numerics == "tf32")):
        yield region_words("cross_attention_sim", 100, 500, 36, 32)
        if main:
            yield region_words("cross_attention_sim", 100, 500, 36, 64)
            yield replace(region_words("cross_attention_sim", 31_783, 158_915, 36, 32, 64, mask=False), backward=False)

"""Calls that between them launch every kernel: what gpu_check.py holds to float64, captures, repeats and sanitizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gssf_triton
from bench.operation import Normal
from gssf_triton.kernels.choice import force_plan

#: Every kernel of the package.
KERNELS = (
    "cross_attention", "finish", "fold", "gradient", "late_interaction", "merge", "paired", "pairwise", "rank",
    "stream", "topk", "unit",
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Of the inputs: M and N rows or items, D channels in blocks of B, R regions, L words."""

    M: int
    N: int
    D: int
    B: int
    R: int
    L: int


#: Tensors that have a gradient, and those that have none.
Tensors = tuple[dict[str, Tensor], dict[str, Tensor]]
Make = Callable[[Normal, Size], Tensors]

#: No size is a tile's, and on a GPU M is more row tiles than weight gradients have partial sums. The interpreter takes
#: a hundred thousand times as long as a GPU.
SIZES = {"cuda": Size(4099, 1301, 480, 32, 36, 20), "cpu": Size(35, 41, 48, 16, 5, 3)}
SCALE, K = 20.0, 10
#: What scalar results are multiplied by for the backward pass, as a gradient scaler does, so that float16 holds the
#: gradients: a mean's are as small, a sum's as large as there are pairs many.
MEAN, SUM = 2.0**12, 2.0**-6


@dataclass(frozen=True)
class Call:
    """One public function on random inputs.

    Attributes:
        name: Of the call.
        make: Its tensors.
        run: Of all tensors and `backend` to the result; it must not read a tensor's values on the host.
        differentiable: Its backward pass runs, too.
        exact: Its result is whole numbers, of inputs whose similarities every dtype holds exactly.
        chain: Rounded products go into further products: it may err as losses may.
        upstream: The gradient of a scalar result.
        fused: Its backward pass is PyTorch's own, which repeats its bits only under deterministic algorithms.
    """

    name: str
    make: Make
    run: Callable[..., Tensor]
    differentiable: bool = True
    exact: bool = False
    chain: bool = False
    upstream: float = 1.0
    fused: bool = False


def _metric(normal: Normal, s: Size) -> dict[str, Tensor]:
    return {"W_diag": 1 + 0.3 * normal(s.D), "W_blocks": s.B**-0.5 * normal(s.D // s.B, s.B, s.B)}


def _matrix(normal: Normal, s: Size) -> Tensors:
    return {"a": normal(s.M, s.D), "b": normal(s.N, s.D), **_metric(normal, s)}, {}


def _pairs(normal: Normal, s: Size) -> Tensors:
    return {"a": normal(s.M, s.D), "b": normal(s.M, s.D), **_metric(normal, s)}, {}


def _one(normal: Normal, s: Size) -> Tensors:
    return {"x": normal(s.M, s.D), **_metric(normal, s)}, {}


def _taught(normal: Normal, s: Size) -> Tensors:
    student, _ = _pairs(normal, s)
    return student, {"teacher_a": normal(s.M, s.D), "teacher_b": normal(s.M, s.D)}


def _words(normal: Normal, s: Size) -> Tensors:
    items = {"regions": normal(max(2, s.M // 20), s.R, s.D), "words": normal(max(2, s.N // 20), s.L, s.D)}
    return items | _metric(normal, s), {}


def _coarse(normal: Normal, *size: int) -> Tensor:
    """Numbers of 0 and ±1, whose products add up exactly in every dtype: all ties are true ones."""
    return normal(*size).sign() * (normal(*size) > 0)


def _coarse_metric(normal: Normal, s: Size) -> dict[str, Tensor]:
    return {"W_diag": _coarse(normal, s.D), "W_blocks": _coarse(normal, s.D // s.B, s.B, s.B)}


def _coarse_pairs(normal: Normal, s: Size) -> Tensors:
    return {"a": _coarse(normal, s.M, s.D), "b": _coarse(normal, s.M, s.D), **_coarse_metric(normal, s)}, {}


def _masked_words(normal: Normal, s: Size) -> Tensors:
    images, captions = max(2, s.M // 20), max(2, s.N // 20)
    items = {"regions": _coarse(normal, images, s.R, s.D), "words": _coarse(normal, captions, s.L, s.D)}
    masks = {"region_mask": normal(images, s.R) > -1, "word_mask": normal(captions, s.L) > -1}
    return items | _coarse_metric(normal, s), masks


def _retrieval(*labels: str) -> Make:
    """Coarse features and metric, and these labels."""

    def make(normal: Normal, s: Size) -> Tensors:
        tensors = {"queries": _coarse(normal, s.M, s.D), "gallery": _coarse(normal, s.N, s.D)}
        known = {
            "query_ids": torch.arange(s.M) % 97, "gallery_ids": torch.arange(s.N) % 89,
            "query_cams": torch.arange(s.M) % 3, "gallery_cams": torch.arange(s.N) % 2,
            "exclude": torch.arange(s.M) % s.N,
        }  # fmt: skip
        device = normal(1).device
        return {}, tensors | _coarse_metric(normal, s) | {name: known[name].to(device) for name in labels}

    return make


def _with_ids(normal: Normal, s: Size) -> Tensors:
    return _pairs(normal, s)[0], {"ids": (torch.arange(s.M) // 2).to(normal(1).device)}


def _heads(normal: Normal, s: Size) -> Tensors:
    H, D = 4, 4 * s.B
    q, k, v = normal(1, H, s.M, D), normal(1, H, s.N, D), normal(1, H, s.N, D)
    return {"q": q, "k": k, "v": v, "W_diag": 1 + 0.3 * normal(H, D), "W_blocks": 0.2 * normal(H, 4, s.B, s.B)}, {}


def _planned(plan: str) -> Callable[..., Tensor]:
    def run(**tensors: Any) -> Tensor:
        with force_plan(plan):
            return gssf_triton.pairwise_sim(**tensors)

    return run


def _topk(**tensors: Any) -> Tensor:
    return gssf_triton.topk(**tensors, k=K)[1]


def _terms(**tensors: Any) -> Tensor:
    return torch.stack(gssf_triton.pairwise_terms(**tensors))


def _loss(name: str, function: Callable[..., Tensor], make: Make = _pairs, **options: Any) -> Call:
    return Call(name, make, partial(function, logit_scale=SCALE, normalize=True, **options), chain=True, upstream=MEAN)


def _unlike(name: str, make: Make, run: Callable[..., Tensor]) -> Call:
    """Half precision decides which negative or region is the nearest: there is no gradient to compare."""
    return Call(name, make, partial(run, normalize=True), differentiable=False)


def _searched(name: str, run: Callable[..., Tensor], *labels: str) -> Call:
    return Call(name, _retrieval(*labels), run, differentiable=False, exact=True)


CALLS = (
    Call("pairwise_sim, one pass", _matrix, _planned("one_pass")),
    Call("pairwise_sim, fold + product", _matrix, _planned("fold_product")),
    Call("pairwise_sim, normalize", _matrix, partial(gssf_triton.pairwise_sim, normalize=True)),
    Call("pairwise_terms", _matrix, _terms),
    Call("paired_sim", _pairs, gssf_triton.paired_sim),
    Call("transform", _one, gssf_triton.transform),
    _loss("info_nce", gssf_triton.info_nce),
    _loss("info_nce, ids and smoothing", gssf_triton.info_nce, _with_ids, label_smoothing=0.1),
    _loss("sigmoid_loss", gssf_triton.sigmoid_loss, logit_bias=-5.0),
    # Which negatives violate the margin is no matter of rounding where similarities are whole numbers.
    Call(
        "triplet_loss, all", _coarse_pairs, partial(gssf_triton.triplet_loss, hardest=False, margin=0.5), chain=True,
        upstream=SUM,
    ),
    _unlike("triplet_loss, hardest", _pairs, gssf_triton.triplet_loss),
    _unlike("late_interaction", _words, gssf_triton.late_interaction),
    Call("late_interaction, masks", _masked_words, gssf_triton.late_interaction),
    _loss("distillation_loss", gssf_triton.distillation_loss, _taught),
    Call(
        "late_interaction, lse-mean", _words,
        partial(gssf_triton.late_interaction, pooling="lse-mean", sharpness=6.0, normalize=True), chain=True,
    ),
    Call("cross_attention_sim", _words, gssf_triton.cross_attention_sim, chain=True),
    Call("attention", _heads, gssf_triton.attention, chain=True, fused=True),
    _searched("topk", _topk),
    _searched("topk, exclude", _topk, "exclude"),
    _searched("ranks", gssf_triton.ranks, "query_ids", "gallery_ids"),
    _searched("ranks, cameras", gssf_triton.ranks, "query_ids", "gallery_ids", "query_cams", "gallery_cams"),
)  # fmt: skip


@dataclass
class Problem:
    """A call on its inputs."""

    call: Call
    leaves: dict[str, Tensor]
    fixed: dict[str, Tensor]

    @classmethod
    def make(cls, call: Call, device: torch.device, dtype: torch.dtype, seed: int, small: bool = False) -> Problem:
        """Random inputs, features in `dtype`, weights in float32 beside half precision."""
        generator = torch.Generator(device=device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        wide = torch.promote_types(dtype, torch.float32)
        leaves, fixed = call.make(normal, SIZES["cpu" if small else device.type])

        def cast(name: str, x: Tensor) -> Tensor:
            keeps = not x.is_floating_point()
            return x if keeps else x.to(wide if "W_" in name and not call.name.startswith("attention") else dtype)

        leaves = {name: cast(name, x).requires_grad_() for name, x in leaves.items()}
        return cls(call, leaves, {name: cast(name, x) for name, x in fixed.items()})

    def double(self) -> Problem:
        """The same numbers in float64."""
        leaves = {name: x.detach().double().requires_grad_() for name, x in self.leaves.items()}
        fixed = {name: x.double() if x.is_floating_point() else x for name, x in self.fixed.items()}
        return Problem(self.call, leaves, fixed)

    def results(self, backend: str) -> dict[str, Tensor]:
        """The result, "out", and a gradient a leaf, of an upstream gradient that a seed fixes."""
        out = self.call.run(**self.leaves, **self.fixed, backend=backend)
        if not self.call.differentiable:
            return {"out": out.detach()}
        upstream = torch.linspace(-1, 1, max(1, out.numel()), dtype=torch.float64, device=out.device)
        upstream = (upstream * 37).sin() if out.dim() else torch.full_like(upstream, self.call.upstream)
        grads = torch.autograd.grad(out, tuple(self.leaves.values()), upstream.view(out.shape).to(out.dtype))
        return {"out": out.detach()} | {f"d{name}": g for name, g in zip(self.leaves, grads, strict=True)}

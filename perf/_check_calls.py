"""Calls that between them launch every kernel: what gpu_check.py holds to float64, captures, repeats and sanitizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import gssf_triton
from gssf_triton.kernels.plans import force_plan

#: Modules of gssf_triton.kernels that hold a kernel called after them.
KERNELS = (
    "cross_attention", "fold", "gradient", "late_interaction", "paired", "pairwise", "rank", "stream", "topk",
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
        make: (normal, size) to the tensors that have a gradient and those that have none.
        run: Of all tensors and `backend` to the result; it must not read a tensor's values on the host.
        differentiable: Its backward pass runs, too.
        exact: Its result is whole numbers, of inputs whose similarities every dtype holds exactly.
        chain: Rounded products go into further products: it may err as losses may.
        upstream: The gradient of a scalar result.
        fused: Its backward pass is PyTorch's own, which repeats its bits only under deterministic algorithms.
    """

    name: str
    make: Callable[[Callable[..., Tensor], Size], tuple[dict[str, Tensor], dict[str, Tensor]]]
    run: Callable[..., Tensor]
    differentiable: bool = True
    exact: bool = False
    chain: bool = False
    upstream: float = 1.0
    fused: bool = False


def _metric(normal: Callable[..., Tensor], s: Size) -> dict[str, Tensor]:
    return {"W_diag": 1 + 0.3 * normal(s.D), "W_blocks": s.B**-0.5 * normal(s.D // s.B, s.B, s.B)}


def _two(rows_of_b: str) -> Callable[[Callable[..., Tensor], Size], Any]:
    """a (M, D), b (M or N, D) and a metric."""

    def make(normal: Callable[..., Tensor], s: Size) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"a": normal(s.M, s.D), "b": normal(getattr(s, rows_of_b), s.D), **_metric(normal, s)}, {}

    return make


def _one(normal: Callable[..., Tensor], s: Size) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {"x": normal(s.M, s.D), **_metric(normal, s)}, {}


def _taught(normal: Callable[..., Tensor], s: Size) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    student, _ = _two("M")(normal, s)
    return student, {"teacher_a": normal(s.M, s.D), "teacher_b": normal(s.M, s.D)}


def _words(normal: Callable[..., Tensor], s: Size) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    items = {"regions": normal(max(2, s.M // 20), s.R, s.D), "words": normal(max(2, s.N // 20), s.L, s.D)}
    return items | _metric(normal, s), {}


def _coarse(normal: Callable[..., Tensor], *size: int) -> Tensor:
    """Numbers of 0 and ±1, whose products add up exactly in every dtype: all ties are true ones."""
    return normal(*size).sign() * (normal(*size) > 0)


def _coarse_metric(normal: Callable[..., Tensor], s: Size) -> dict[str, Tensor]:
    return {"W_diag": _coarse(normal, s.D), "W_blocks": _coarse(normal, s.D // s.B, s.B, s.B)}


def _coarse_pairs(normal: Callable[..., Tensor], s: Size) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {"a": _coarse(normal, s.M, s.D), "b": _coarse(normal, s.M, s.D), **_coarse_metric(normal, s)}, {}


def _masked_words(normal: Callable[..., Tensor], s: Size) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    images, captions = max(2, s.M // 20), max(2, s.N // 20)
    items = {"regions": _coarse(normal, images, s.R, s.D), "words": _coarse(normal, captions, s.L, s.D)}
    masks = {"region_mask": normal(images, s.R) > -1, "word_mask": normal(captions, s.L) > -1}
    return items | _coarse_metric(normal, s), masks


def _retrieval(*labels: str) -> Callable[[Callable[..., Tensor], Size], Any]:
    """Coarse features and metric, and these labels."""

    def make(normal: Callable[..., Tensor], s: Size) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        tensors = {"queries": _coarse(normal, s.M, s.D), "gallery": _coarse(normal, s.N, s.D)}
        known = {
            "query_ids": torch.arange(s.M) % 97, "gallery_ids": torch.arange(s.N) % 89,
            "query_cams": torch.arange(s.M) % 3, "gallery_cams": torch.arange(s.N) % 2,
            "exclude": torch.arange(s.M) % s.N,
        }  # fmt: skip
        device = normal(1).device
        return {}, tensors | _coarse_metric(normal, s) | {name: known[name].to(device) for name in labels}

    return make


def _with_ids(normal: Callable[..., Tensor], s: Size) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return _two("M")(normal, s)[0], {"ids": (torch.arange(s.M) // 2).to(normal(1).device)}


def _heads(normal: Callable[..., Tensor], s: Size) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
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


def _fixed(function: Callable[..., Any], **options: Any) -> Callable[..., Tensor]:
    def run(**tensors: Any) -> Tensor:
        out: Tensor = function(**tensors, **options)
        return out

    return run


CALLS = (
    Call("pairwise_sim, one pass", _two("N"), _planned("one_pass")),
    Call("pairwise_sim, fold + product", _two("N"), _planned("fold_product")),
    Call("pairwise_sim, normalize", _two("N"), _fixed(gssf_triton.pairwise_sim, normalize=True)),
    Call("pairwise_terms", _two("N"), _terms),
    Call("paired_sim", _two("M"), _fixed(gssf_triton.paired_sim)),
    Call("transform", _one, _fixed(gssf_triton.transform)),
    Call(
        "info_nce",
        _two("M"),
        _fixed(gssf_triton.info_nce, logit_scale=SCALE, normalize=True),
        chain=True,
        upstream=MEAN,
    ),
    Call(
        "info_nce, ids and smoothing",
        _with_ids,
        _fixed(gssf_triton.info_nce, logit_scale=SCALE, normalize=True, label_smoothing=0.1),
        chain=True,
        upstream=MEAN,
    ),
    Call(
        "sigmoid_loss",
        _two("M"),
        _fixed(gssf_triton.sigmoid_loss, logit_scale=SCALE, logit_bias=-5.0, normalize=True),
        chain=True,
        upstream=MEAN,
    ),
    # Which negatives violate the margin is no matter of rounding where similarities are whole numbers.
    Call(
        "triplet_loss, all",
        _coarse_pairs,
        _fixed(gssf_triton.triplet_loss, hardest=False, margin=0.5),
        chain=True,
        upstream=SUM,
    ),
    # Which negative or region is the nearest is a matter of rounding in half precision: no gradient to compare.
    Call("triplet_loss, hardest", _two("M"), _fixed(gssf_triton.triplet_loss, normalize=True), differentiable=False),
    Call("late_interaction", _words, _fixed(gssf_triton.late_interaction, normalize=True), differentiable=False),
    Call("late_interaction, masks", _masked_words, _fixed(gssf_triton.late_interaction)),
    Call(
        "distillation_loss",
        _taught,
        _fixed(gssf_triton.distillation_loss, logit_scale=SCALE, normalize=True),
        chain=True,
        upstream=MEAN,
    ),
    Call(
        "late_interaction, lse-mean",
        _words,
        _fixed(gssf_triton.late_interaction, pooling="lse-mean", sharpness=6.0, normalize=True),
        chain=True,
    ),
    Call("cross_attention_sim", _words, _fixed(gssf_triton.cross_attention_sim), chain=True),
    Call("attention", _heads, _fixed(gssf_triton.attention), chain=True, fused=True),
    Call("topk", _retrieval(), _topk, differentiable=False, exact=True),
    Call("topk, exclude", _retrieval("exclude"), _topk, differentiable=False, exact=True),
    Call("ranks", _retrieval("query_ids", "gallery_ids"), _fixed(gssf_triton.ranks), differentiable=False, exact=True),
    Call(
        "ranks, cameras",
        _retrieval("query_ids", "gallery_ids", "query_cams", "gallery_cams"),
        _fixed(gssf_triton.ranks),
        differentiable=False,
        exact=True,
    ),
)


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


class _Counted:
    """A kernel that notes that it was launched."""

    def __init__(self, kernel: Any, name: str, launched: set[str]) -> None:
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid: Any) -> Any:
        self.launched.add(self.name)
        return self.kernel[grid]


@contextmanager
def launches() -> Iterator[set[str]]:
    """The names of the kernels launched inside."""
    launched: set[str] = set()
    modules = {name: import_module(f"gssf_triton.kernels.{name}") for name in KERNELS}
    kernels = {name: getattr(module, f"{name}_kernel") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            setattr(module, f"{name}_kernel", _Counted(kernels[name], name, launched))
        yield launched
    finally:
        for name, module in modules.items():
            setattr(module, f"{name}_kernel", kernels[name])

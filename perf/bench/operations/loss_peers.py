"""The losses as others compute them: from T(a) and b on the unit sphere, S stored, or by a fused kernel.

Libraries know cosine alone, and some of them one direction of it. They are given T(a) in a's place and called once a
direction, so all of them compute the same loss, and all pay for the same fold.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.operation import Contender, Inputs, Program, compiled, installed
from bench.operations.pairwise import fold_in_torch

#: A loss of T(a) and b, normalised, and its scalars.
Loss = Callable[..., Tensor]

MARGIN = 0.2


def sides(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """T(a) and b on the unit sphere, in the features' dtype."""
    t = fold_in_torch(F.normalize(leaves["a"]), leaves["W_diag"], leaves["W_blocks"])
    return t, F.normalize(leaves["b"])


# ---------------------------------------------------------------------------------------------- S stored, in torch


def info_nce(t: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
    logits = logit_scale * (t @ y.T).float()
    target = torch.arange(len(t), device=t.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid_loss(t: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    logits = logit_scale * (t @ y.T).float() + logit_bias
    sign = 2 * torch.eye(len(t), device=t.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(t)


def triplet_loss(t: Tensor, y: Tensor) -> Tensor:
    S = (t @ y.T).float()
    match = S.diagonal()
    negatives = S.masked_fill(torch.eye(len(t), dtype=torch.bool, device=t.device), float("-inf"))
    rows = (MARGIN + negatives.amax(1) - match).clamp_min(0)
    columns = (MARGIN + negatives.amax(0) - match).clamp_min(0)
    return (rows + columns).sum()


def distillation_loss(t: Tensor, y: Tensor, logit_scale: Tensor, teacher_a: Tensor, teacher_b: Tensor) -> Tensor:
    student = (logit_scale * (t @ y.T).float()).log_softmax(1)
    teacher = (logit_scale.detach() * (F.normalize(teacher_a) @ F.normalize(teacher_b).T).float()).log_softmax(1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _log_sum_exps(S: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z = S.float() * scale
    return z.logsumexp(1), z.logsumexp(0), z.diagonal().sum()


def _shared_slope(S: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    z = S.float() * scale
    eye = torch.eye(len(S), device=S.device)
    slope = weight * (torch.exp(z - rows[:, None]) + torch.exp(z - columns) - 2 * eye)
    return slope.to(S.dtype), (slope * S).sum()


class _Shared(torch.autograd.Function):
    """S computed once and kept in the features' dtype, both softmaxes from it: the fewest products, three."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, y: Tensor, scale: Tensor, stats: Loss, slope: Loss) -> Tensor:
        S = t @ y.T
        rows, columns, matches = stats(S, scale)
        ctx.save_for_backward(t, y, scale, S, rows, columns)
        ctx.slope = slope
        loss: Tensor = ((rows.sum() + columns.sum()) / 2 - matches) / len(t)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        t, y, scale, S, rows, columns = ctx.saved_tensors
        slope, d_scale = ctx.slope(S, scale, rows, columns, grad * scale / (2 * len(t)))
        return slope @ y, slope.T @ t, d_scale / scale, None, None


# --------------------------------------------------------------------------------------------------- libraries


@cache
def _open_clip_losses() -> Any:
    """open_clip/loss.py alone: its package imports all of torchvision, which no loss needs."""
    package = find_spec("open_clip")
    assert package is not None and package.submodule_search_locations
    spec = spec_from_file_location("open_clip_loss", Path(package.submodule_search_locations[0]) / "loss.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _open_clip(t: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None) -> Tensor:
    losses = _open_clip_losses()
    if logit_bias is None:
        loss: Tensor = losses.ClipLoss()(t, y, logit_scale)
    else:
        loss = losses.SigLipLoss()(t, y, logit_scale, logit_bias)
    return loss.float()


def _both_ways(one: Callable[[Tensor, Tensor, Tensor], Tensor], t: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
    """The mean of a cross entropy of rows and of columns: one(rows, columns, target)."""
    target, scaled = torch.arange(len(t), device=t.device), (logit_scale * t).to(t.dtype)
    return (one(scaled, y, target) + one(y, scaled, target)).float() / 2


def _inf_cl(t: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
    from inf_cl import cal_flash_loss

    loss: Tensor = (cal_flash_loss(t, y, scale=logit_scale) + cal_flash_loss(y, t, scale=logit_scale)).mean() / 2
    return loss


def _cut_cross_entropy(t: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return _both_ways(linear_cross_entropy, t, y, logit_scale)


def _liger(t: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    one = LigerFusedLinearCrossEntropyLoss()
    return _both_ways(lambda rows, columns, target: one(columns, rows, target), t, y, logit_scale)


def _siglip_kernel(t: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    from siglip_kernel import fused_siglip_loss

    loss: Tensor = fused_siglip_loss(t, y, logit_scale.log(), logit_bias)
    return loss.float()


# -------------------------------------------------------------------------------------------------- contenders


def _autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    return torch.autocast(device.type, dtype) if dtype.itemsize == 2 else nullcontext()


def program(loss: Loss, compile: bool, autocast: bool, inputs: Inputs) -> Program:
    """A loss of T(a) and b as a program; the teacher's features are no leaves."""
    scalars = [name for name in ("logit_scale", "logit_bias") if name in inputs.tensors]
    leaves = inputs.leaves("a", "b", "W_diag", "W_blocks", *scalars)
    fixed = {name: x for name, x in inputs.tensors.items() if name.startswith("teacher")}

    def whole(**tensors: Tensor) -> Tensor:
        return loss(*sides(tensors), **{name: tensors[name] for name in scalars}, **fixed)

    run = compiled(whole) if compile else whole
    built = Program(lambda: run(**leaves), leaves, inputs.upstream)
    if autocast:
        built.around = partial(_autocast, leaves["a"].dtype, leaves["a"].device)
    return built


def _ideal(inputs: Inputs) -> Program:
    stats: Callable[..., Any] = _log_sum_exps
    slope: Callable[..., Any] = _shared_slope
    if inputs.tensors["a"].device.type == "cuda":  # a CPU's time is in the products, and compiling takes a minute
        stats, slope = (torch.compile(f, dynamic=False, fullgraph=True) for f in (stats, slope))

    def loss(t: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
        out: Tensor = _Shared.apply(t, y, logit_scale, stats, slope)
        return out

    return program(loss, False, False, inputs)


def _peer(
    name: str, label: str, loss: Loss, mathematics: str = "gssf_loss", *, autocast: bool = False, **how: bool
) -> Contender:
    build = partial(program, loss, how.get("compiled", False), autocast)
    return Contender(name, label, build, mathematics, **how)


def stored_forms(loss: Loss, mathematics: str) -> tuple[Contender, ...]:
    """Torch's own, eager, which is the baseline, and compiled."""
    return (
        _peer("torch", "torch, S stored", loss, mathematics, stores=True),
        _peer("torch_compile", "torch.compile, S stored", loss, mathematics, compiled=True, stores=True),
    )


_OPEN_CLIP = "open_clip", _peer("open_clip", "open_clip", _open_clip, autocast=True, stores=True)
#: Beside the stored forms: the ideal one, and the libraries that are installed.
INFO_NCE_PEERS = (
    Contender("ideal", "ideal: S once, shared", _ideal, "gssf_loss", stores=True),
    *installed(
        _OPEN_CLIP,
        ("inf_cl", _peer("inf_cl", "Inf-CL", _inf_cl, gpu_only=True)),
        ("cut_cross_entropy", _peer("cce", "Cut Cross-Entropy", _cut_cross_entropy, gpu_only=True)),
        ("liger_kernel", _peer("liger", "Liger-Kernel", _liger, gpu_only=True)),
    ),
)
SIGMOID_PEERS = installed(
    _OPEN_CLIP, ("siglip_kernel", _peer("siglip_kernel", "siglip-kernel", _siglip_kernel, gpu_only=True))
)

"""A loss call as data: its tensors, its options, and how to hold it to the stored matrix in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import gssf_triton
from support import losses_reference
from support.reference import assert_close, features, tolerance, weights

LOSSES = ("info_nce", "sigmoid_loss", "triplet_loss", "distillation_loss")


@dataclass
class Problem:
    """`leaves` are all the tensors with gradients; `fixed` those without; `options` plain values."""

    loss: str
    leaves: dict[str, Tensor]
    fixed: dict[str, Tensor | None] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def call(self, backend: str, **more: Any) -> Tensor:
        """The loss as a user calls it."""
        out: Tensor = getattr(gssf_triton, self.loss)(
            **self.leaves, **self.fixed, **self.options, **more, backend=backend
        )
        return out

    def exact(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The stored form in float64, and its leaves."""
        leaves = {name: x.detach().double().cpu().requires_grad_() for name, x in self.leaves.items()}
        fixed: dict[str, Any] = {name: None if x is None else x.cpu() for name, x in self.fixed.items()}
        if self.loss == "distillation_loss":
            fixed = {"teacher": fixed}
        given = {"W_diag": None, "W_blocks": None} | leaves
        return getattr(losses_reference, self.loss)(**given, **fixed, **self.options), leaves

    def check(self, backend: str, factor: float = 1.0) -> Tensor:
        """Value and every gradient against float64, within `factor` times the contract's tolerance."""
        for x in self.leaves.values():
            x.grad = None
        loss = self.call(backend)
        expected, exact_leaves = self.exact()
        assert loss.dtype == torch.promote_types(self.leaves["a"].dtype, torch.float32)
        incoming = torch.randn_like(loss)
        loss.backward(incoming)
        expected.backward(incoming.double().cpu())
        tol = factor * tolerance(self.leaves["a"].dtype)
        # A loss is a difference of logits, and its error is theirs: near 0 it has no digits to be relative to.
        size = torch.full_like(expected.detach(), float(self.scale()))
        assert_close(loss.cpu(), expected, tol, name=self.loss, size=size)
        for name, x in self.leaves.items():
            assert x.grad is not None and x.grad.dtype == x.dtype, f"no gradient of {name} in {x.dtype}"
            grad = exact_leaves[name].grad
            assert grad is not None
            assert_close(x.grad.cpu(), grad, tol, name=f"{self.loss} d{name}", size=self._size(name, grad))
        return loss

    def scale(self) -> float:
        """About how large a logit is."""
        scale = self.leaves.get("logit_scale")
        return 1.0 if scale is None else max(1.0, float(scale.detach()))

    def _size(self, name: str, grad: Tensor) -> Tensor:
        """A floor for what errors are relative to: gradients may cancel to nothing."""
        if name in ("logit_scale", "logit_bias"):
            return torch.ones_like(grad)
        return torch.full_like(grad, 0.25 * self.scale() / len(self.leaves["a"]))


def problem(
    loss: str,
    N: int,
    *,
    G: int = 3,
    B: int = 5,
    dtype: torch.dtype = torch.float32,
    kind: str = "diag+blocks",
    ids: bool = False,
    scale: float = 4.0,
    device: str = "cpu",
    **options: Any,
) -> Problem:
    """Random features, of about unit norm."""
    D = G * B
    wide = torch.promote_types(dtype, torch.float32)

    def rows(n: int, channels: int = D) -> Tensor:
        return (features(n, channels, dtype=torch.float64) / channels**0.5).to(device, dtype)

    leaves: dict[str, Tensor | None] = {"a": rows(N), "b": rows(N), **weights(kind, G, B, wide, device)}
    if loss != "triplet_loss":
        leaves["logit_scale"] = torch.tensor(scale, dtype=wide, device=device)
    if loss == "sigmoid_loss":
        leaves["logit_bias"] = torch.tensor(-1.5, dtype=wide, device=device)
    fixed: dict[str, Tensor | None] = {}
    if loss == "distillation_loss":
        teacher = weights("diag", 1, 7, wide, device)
        fixed = {"teacher_a": rows(N, 7), "teacher_b": rows(N, 7)}
        fixed |= {f"teacher_{name}": w for name, w in teacher.items()}
    else:
        # About three pairs an id, in no order.
        fixed["ids"] = torch.randint(0, max(N // 3, 1), (N,), device=device) if ids else None
    given = {name: x.requires_grad_() for name, x in leaves.items() if x is not None}
    return Problem(loss, given, fixed, options)

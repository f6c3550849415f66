"""A learned factor that stays positive and below a bound, and that training can lead away from the bound again."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class _BoundedExp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(log: Tensor, bound: float) -> Tensor:
        # The second factor is 1 exactly: it carries the gradient where a transform looks through this function.
        return log.exp().clamp(max=bound).detach() * (1 + (log - log.detach()).nan_to_num(0.0))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        log, ctx.bound = inputs
        ctx.save_for_backward(log, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        log, value = ctx.saved_tensors
        slope = grad * value
        outwards = (log > math.log(ctx.bound)) & (slope < 0)
        return torch.where(outwards, torch.zeros_like(slope), slope), None


def bounded_exp(log: Tensor, bound: float) -> Tensor:
    """min(exp(log), bound), with a gradient past the bound too.

    There it is grad · bound, as if nothing were cut, where it makes the value smaller. A gradient that points further
    out is dropped: the logarithm would drift away, and take long to come back.
    """
    bounded: Tensor = _BoundedExp.apply(log, bound)
    return bounded

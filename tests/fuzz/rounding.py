"""How far a result may lie from the exact one: what the exact computation itself moves by when it rounds.

Monte Carlo arithmetic (Parker, "Monte Carlo Arithmetic", 1997): the float64 reference runs again with every operation's
result, forward and backward, off by a random relative error of the tolerance's size. A sum of terms that cancel, a
difference of logits, a softmax of large numbers move as they would in a computation that rounds; so no constant has to
be chosen for an ill-conditioned case, and the well-conditioned ones are held to the contract's tolerance alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
#: Differences inside one operator, where a rounding would stay unseen: as the operators they are made of.
_COMPOSITE = get_decompositions(
    [
        _aten._log_softmax_backward_data,
        _aten._softmax,
        _aten._softmax_backward_data,
        _aten.logsumexp,
        _aten.addmm,
        _aten.baddbmm,
    ]
)
REPEATS = 3


def _log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """As whoever streams has it: logits minus their log-sum-exp, each of which is rounded to its own size."""
    if not x.numel():
        return x.clone()
    top = x.amax(dim, keepdim=True)
    return x - (top + (x - top).exp().sum(dim, keepdim=True).log())


_COMPOSITE[_aten._log_softmax.default] = _log_softmax


class Rounding(TorchDispatchMode):
    """Every floating-point result of an operator times 1 + eps·ξ, ξ normal."""

    def __init__(self, eps: float, seed: int) -> None:
        super().__init__()
        self.eps = eps
        self.generator = torch.Generator().manual_seed(seed)

    def rounded(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            return x
        return x * (1 + self.eps * torch.randn(x.shape, generator=self.generator, dtype=x.dtype))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _COMPOSITE:
            with self:
                return _COMPOSITE[func](*args, **kwargs)
        out = func(*args, **kwargs)
        if func.is_view or func._schema.is_mutable or not any(isinstance(x, (Tensor, list, tuple)) for x in args):
            return out
        if isinstance(out, (tuple, list)):
            return type(out)(self.rounded(x) for x in out)
        return self.rounded(out)


def moves(
    compute: Callable[[Callable[[Tensor], Tensor]], list[Tensor]], exact: list[Tensor], eps: float
) -> list[Tensor]:
    """The root mean square of what each of compute's results moves by, for each of its numbers, over eps.

    `compute(rounded)` makes the results from inputs that it passes through `rounded`.
    """
    squares = [torch.zeros_like(x, dtype=torch.float64) for x in exact]
    for seed in range(REPEATS):
        mode = Rounding(eps, seed)
        with mode:
            found = compute(mode.rounded)
        for total, x, y in zip(squares, found, exact, strict=True):
            total += ((x - y) / eps).nan_to_num(0.0, 0.0, 0.0) ** 2
    return [(total / REPEATS).sqrt() for total in squares]
